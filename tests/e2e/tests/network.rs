//! `spec.network` from the YAML to the wire. The machine of this FAR is a network namespace of the test, with a world behind
//! it that echoes on port 7007 and answers every DNS question with 198.51.100.1 and an address of a metadata service.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, UdpSocket},
    path::Path,
    process::Command,
};

use far_e2e::{far_or_skip, far_with_or_skip, payload_agent, payload_agent_with};
use far_net::GuestNetns;
use far_testkit::{Far, Options, skip, wait_for};
use serde_json::Value;

const RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

fn inside(netns: &Path, script: &str) {
    let status = Command::new("nsenter")
        .arg(format!("--net={}", netns.display()))
        .args(["sh", "-ec", script])
        .status();
    assert!(status.expect("nsenter runs").success(), "{script}");
}

/// The machine's namespace and the world's; both go when dropped.
fn world() -> (GuestNetns, GuestNetns) {
    let make = || GuestNetns::create().expect("the test asked whether it may");
    let (machine, world) = (make(), make());
    inside(
        &machine.path(),
        &format!(
            "ip link set lo up; ip link add eth7 type veth peer name down0 netns {}; ip addr add 192.0.2.2/30 dev eth7; \
             ip link set eth7 up; ip route add default via {RESOLVER}; echo 1 > /proc/sys/net/ipv4/ip_forward",
            world.path().display()
        ),
    );
    inside(
        &world.path(),
        "ip link set lo up; for a in 203.0.113.1 198.51.100.1 169.254.169.254; do ip addr add $a/32 dev lo; done; \
         ip addr add 192.0.2.1/30 dev down0; ip link set down0 up",
    );
    let listen = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7007)).expect("the namespace is new");
    for netns in [&machine, &world] {
        let listener = netns.run_inside(listen).expect("the namespace is ours");
        std::thread::spawn(move || {
            while let Ok((mut stream, from)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut buffer = [0; 1024];
                    if let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let _ = stream.write_all(&[from.ip().to_string().as_bytes(), b" ", &buffer[..length]].concat());
                    }
                });
            }
        });
    }
    let bind = || UdpSocket::bind((RESOLVER, 53)).expect("the namespace is new");
    let resolver = world.run_inside(bind).expect("the namespace is ours");
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = resolver.recv_from(&mut buffer) {
            // The question, as an answer with two addresses whose names point at it.
            let mut answer = buffer[..length].to_vec();
            (answer[2], answer[3], answer[7]) = (0x81, 0x80, 2);
            for address in [[198, 51, 100, 1], [169, 254, 169, 254]] {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(address);
            }
            let _ = resolver.send_to(&answer, from);
        }
    });
    (machine, world)
}

fn networked(name: &str, steps: &[&str]) -> String {
    let network = "  network:\n    egress:\n    - cidr: 203.0.113.0/24\n      ports: [{port: 7007}]\n    - dnsName: api.example.com\n      ports: [{port: 7000, endPort: 7010}]";
    payload_agent_with(name, steps, network)
}

fn json(far: &Far, args: &[&str]) -> Value {
    serde_json::from_str(&far.far(args).ok()).expect("the command prints JSON")
}

#[test]
fn an_agent_reaches_what_its_yaml_lists_and_far_net_says_why() {
    let test = "an_agent_reaches_what_its_yaml_lists_and_far_net_says_why";
    if let Err(lack) = far_net::capability() {
        return skip(test, &lack.to_string());
    }
    let (machine, _world) = world();
    let options = Options {
        env: vec![("FAR_RESOLVER".into(), RESOLVER.to_string())],
        netns: Some(machine.path()),
        ..Options::default()
    };
    let Some(far) = far_with_or_skip(test, options) else {
        return;
    };
    let steps = [
        "tcp=203.0.113.1:7007",
        "tcp=198.51.100.1:7007",
        "resolve=api.example.com",
        "tcp=198.51.100.1:7007",
        "tcp=169.254.169.254:7007",
        "tcp=192.0.2.2:7007",
        "out=done",
        "sleep=600000",
    ];
    far.apply(&networked("lists", &steps));
    wait_for("the agent's last word", || {
        let seen = far.far(&["logs", "lists"]).stdout;
        if seen.contains("done") { Ok(()) } else { Err(seen) }
    });
    assert_eq!(
        far.far(&["logs", "lists"]).ok(),
        "tcp 203.0.113.1:7007 192.0.2.2 ping\ntcp 198.51.100.1:7007 nothing\napi.example.com 198.51.100.1\n\
         tcp 198.51.100.1:7007 192.0.2.2 ping\ntcp 169.254.169.254:7007 nothing\ntcp 192.0.2.2:7007 nothing\ndone\n"
    );
    let told = json(&far, &["net", "ls", "-o", "json"]);
    let agent = &told["agents"][0];
    assert_eq!(
        (agent["name"].as_str(), agent["mode"].as_str()),
        (Some("lists"), Some("Restricted"))
    );
    assert!(agent["counters"]["denied"]["packets"].as_u64() > Some(2), "{told}");
    assert_eq!(agent["pinned"][0]["name"], "api.example.com", "{told}");
    assert_eq!(told["blade"]["uplinkLink"], "eth7", "{told}");
    assert!(far.far(&["net", "ls"]).ok().contains("lists"));
    let described = far.far(&["describe", "lists"]).ok();
    assert!(
        described.contains("Denied:") && described.contains("for api.example.com"),
        "{described}"
    );

    for (destination, code, says) in [
        ("203.0.113.1:7007", 0, "PASSES: spec.network.egress[0].ports[0]"),
        ("api.example.com:7005", 0, "PASSES: spec.network.egress[1].ports[0]"),
        ("203.0.113.1:443", 1, "DROPPED: no rule lets it: default deny"),
        ("169.254.169.254:80", 1, "never reachable"),
        ("evil.example.org:443", 1, "refuses the question"),
    ] {
        let run = far.far(&["net", "explain", "lists", destination]);
        assert_eq!(run.code, code, "{destination}: {} {}", run.stdout, run.stderr);
        assert!(run.stdout.contains(says), "{destination}: {}", run.stdout);
    }
    let refused = far.far(&["net", "explain", "nobody", "203.0.113.1:443"]).err();
    assert!(refused.contains("nobody"), "{refused}");
    far.stop();
}

#[test]
fn wrong_networks_are_refused_by_field_and_an_agent_without_any_reaches_nothing() {
    let test = "wrong_networks_are_refused_by_field_and_an_agent_without_any_reaches_nothing";
    let Some(far) = far_or_skip(test) else { return };
    for (network, field) in [
        ("{mode: Sometimes}", "spec.network.mode"),
        ("{mode: Open, egress: [{cidr: 10.0.0.0/8}]}", "spec.network.egress"),
        ("{egress: [{cidr: 10.0.0.0/33}]}", "cidr"),
        ("{egress: [{cidr: 10.0.0.0/8, dnsName: a.example.com}]}", "exactly one"),
        ("{egress: [{}]}", "exactly one"),
        ("{egress: [{dnsName: 'not a name'}]}", "dnsName"),
        ("{egress: [{cidr: 10.0.0.0/8, ports: [{port: 0}]}]}", "port"),
        (
            "{egress: [{cidr: 10.0.0.0/8, ports: [{port: 9, endPort: 8}]}]}",
            "endPort",
        ),
        (
            "{egress: [{cidr: 10.0.0.0/8, ports: [{port: 9, protocol: GRE}]}]}",
            "protocol",
        ),
    ] {
        let manifest = payload_agent_with("wrong", &["out=never"], &format!("  network: {network}"));
        let refused = far.far_with(&["apply", "-f", "-"], &manifest).err();
        assert!(refused.contains(field), "{network}: {refused}");
    }
    // Without a network, and with none: nothing of the world, no name server, and for None no card.
    let asks = ["tcp=203.0.113.1:7007", "resolve=api.example.com"];
    let expected = "tcp 203.0.113.1:7007 nothing\napi.example.com no name server\n";
    far.apply(&payload_agent("default", &asks));
    far.apply(&payload_agent_with("none", &asks, "  network: {mode: None}"));
    for name in ["default", "none"] {
        let _ = far.wait_phase(name, "Completed");
        assert_eq!(far.far(&["logs", name]).ok(), expected, "{name}");
    }
    far.stop();
}
