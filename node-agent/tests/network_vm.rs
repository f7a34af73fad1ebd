//! Real microVMs of a far-node whose blade is a namespace of the test, with a world behind it.
//!
//! The world echoes UDP and TCP on port 7007 of public, private and metadata addresses, and has a DNS server that lies.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, agent};
use far_net::GuestNetns;
use far_proto::node::{
    EgressPort, EgressRule, EnsureAgentRequest, ExplainRequest, Identity, ListNetworksRequest, NetworkCounters,
    NetworkMode, NetworkSpec, Phase, Protocol, TraceRequest, egress_rule::To,
};
use hickory_proto::{
    op::{Message, OpCode},
    rr::{RData, Record, rdata::A},
};
use serde_json::Value;
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    process::Command,
};

const WORLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const BLADE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const RESOLVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ECHO: u16 = 7007;
/// Has the world's other address, and lies about metadata and private ones.
const NAME: &str = "api.example.com";

/// A blade's namespace and the world behind its uplink; both go with the test.
struct World {
    blade: GuestNetns,
    _world: GuestNetns,
}

fn inside(netns: &Path, script: &str) -> String {
    let output = Command::new("nsenter")
        .arg(format!("--net={}", netns.display()))
        .args(["sh", "-ec", script])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(netns: &Path, script: &str) -> Value {
    serde_json::from_str(&inside(netns, script)).unwrap()
}

impl World {
    /// `None` (and a SKIPPED line) where this process may not make namespaces.
    fn new(test: &str) -> Option<Self> {
        if let Err(lack) = far_net::capability() {
            eprintln!("SKIPPED {test}: {lack}");
            return None;
        }
        let (blade, world) = (GuestNetns::create().unwrap(), GuestNetns::create().unwrap());
        let script = format!(
            "ip link set lo up; ip link add eth7 mtu 1400 type veth peer name down0 netns {}; ip addr add {BLADE}/30 dev eth7; \
             ip link set eth7 up; ip route add default via {RESOLVER}; echo 1 > /proc/sys/net/ipv4/ip_forward",
            world.path().display()
        );
        inside(&blade.path(), &script);
        let others = [WORLD, ELSEWHERE, PRIVATE, METADATA];
        let addresses: String = others
            .iter()
            .map(|one| format!("ip addr add {one}/32 dev lo; "))
            .collect();
        inside(
            &world.path(),
            &format!("ip link set lo up; {addresses} ip addr add {RESOLVER}/30 dev down0; ip link set down0 up"),
        );
        // The blade's own services are as open as they can be: only the tables keep guests out.
        echo(&blade, &[BLADE]);
        echo(&world, &others);
        names(&world);
        Some(Self { blade, _world: world })
    }
}

/// Echoes until the process ends, over UDP on these addresses, over TCP on all; an answer begins with the asker's address.
fn echo(netns: &GuestNetns, addresses: &[Ipv4Addr]) {
    let tcp = netns
        .run_inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO)).unwrap())
        .unwrap();
    let answer = |from: SocketAddr, asked: &[u8]| [from.ip().to_string().as_bytes(), b" ", asked].concat();
    for address in addresses {
        let udp = netns.run_inside(|| UdpSocket::bind((*address, ECHO)).unwrap()).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&answer(from, &buffer[..length]), from);
            }
        });
    }
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = tcp.accept() {
            std::thread::spawn(move || {
                let mut buffer = [0; 2048];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&answer(from, &buffer[..length])).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// Says of every name that it is ELSEWHERE, and PRIVATE, and METADATA.
fn names(netns: &GuestNetns) {
    let socket = netns.run_inside(|| UdpSocket::bind((RESOLVER, 53)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let Ok(asked) = Message::from_vec(&buffer[..length]) else {
                continue;
            };
            let mut answer = Message::response(asked.metadata.id, OpCode::Query);
            answer.add_query(asked.queries[0].clone());
            for address in [ELSEWHERE, PRIVATE, METADATA] {
                let name = asked.queries[0].name().clone();
                answer.add_answer(Record::from_rdata(name, 60, RData::A(A(address))));
            }
            let _ = socket.send_to(&answer.to_vec().unwrap(), from);
        }
    });
}

async fn start(test: &str, world: &World) -> Option<Node> {
    let resolver = RESOLVER.to_string();
    let mut node = Node::start_in(test, &["--resolver", &resolver], Some(world.blade.path())).await?;
    node.load_payload().await?;
    Some(node)
}

fn rule(to: To) -> EgressRule {
    let port = |protocol: Protocol| EgressPort {
        protocol: protocol.into(),
        port: ECHO.into(),
        end_port: 0,
    };
    EgressRule {
        to: Some(to),
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
    }
}

fn networked(uid: &str, egress: Vec<EgressRule>, args: &[&str]) -> EnsureAgentRequest {
    let mut request = agent(uid, "payload", None, args, 128);
    request.spec.as_mut().unwrap().network = Some(NetworkSpec {
        mode: NetworkMode::Restricted.into(),
        egress,
    });
    request
}

fn identity(uid: &str) -> Option<Identity> {
    Some(Identity {
        uid: uid.into(),
        ..Identity::default()
    })
}

/// The namespace of an agent's VMM.
async fn guests(node: &Node, vm_id: &str) -> std::path::PathBuf {
    let pid = node.pid_of_vmm(vm_id).await;
    format!("/proc/{pid}/ns/net").into()
}

async fn counters(node: &Node, uid: &str) -> NetworkCounters {
    let mut client = node.network().await;
    let told = client
        .list_networks(ListNetworksRequest {
            identity: identity(uid),
        })
        .await
        .unwrap()
        .into_inner();
    told.networks[0].counters.unwrap()
}

/// A far-node that has just started serves before it knows its guests' network.
async fn until_adopted(node: &Node, uid: &str) -> NetworkCounters {
    let wait = async {
        loop {
            let request = ListNetworksRequest {
                identity: identity(uid),
            };
            match node.network().await.list_networks(request).await {
                Ok(told) => return told.into_inner().networks[0].counters.unwrap(),
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
    };
    let told = tokio::time::timeout(std::time::Duration::from_secs(60), wait).await;
    told.unwrap_or_else(|_| panic!("{uid} is not adopted\n{}", node.report()))
}

/// Ten more than there are now.
async fn until_more_lines(node: &mut Node, uid: &str) {
    let before = node.output(uid).await.lines().count();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while node.output(uid).await.lines().count() < before + 10 {
        assert!(std::time::Instant::now() < end, "nothing more came\n{}", node.report());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn an_agent_reaches_what_its_spec_lists_and_nothing_else() {
    let test = "an_agent_reaches_what_its_spec_lists_and_nothing_else";
    let Some(world) = World::new(test) else { return };
    let Some(mut node) = start(test, &world).await else {
        return;
    };
    let at = |address: Ipv4Addr| format!("{address}:{ECHO}");
    let steps = [
        format!("udp={}", at(WORLD)),
        format!("tcp={}", at(WORLD)),
        "resolve=evil.example.org".to_owned(),
        format!("udp={}", at(ELSEWHERE)),
        format!("resolve={NAME}"),
        format!("udp={}", at(ELSEWHERE)),
        format!("udp={}", at(PRIVATE)),
        format!("udp={}", at(METADATA)),
        format!("tcp={}", at(BLADE)),
        format!("tcp={}", at(Ipv4Addr::new(169, 254, 77, 1))),
        format!("tcp={}", at(Ipv4Addr::new(100, 127, 255, 253))),
        "cat=/sys/class/net/eth0/mtu".to_owned(),
        format!("keep-asking={}", at(WORLD)),
    ];
    let steps: Vec<&str> = steps.iter().map(String::as_str).collect();
    // The blade's own address is in a network that the spec lists.
    let egress = vec![
        rule(To::Cidr("203.0.113.0/24".into())),
        rule(To::Cidr("192.0.2.0/24".into())),
        rule(To::DnsName(NAME.into())),
    ];
    node.client()
        .ensure_agent(networked("lists", egress, &steps))
        .await
        .unwrap();
    node.until_output("lists", "3: ").await;
    let state = node.until("lists", |state| state.phase() == Phase::Running).await;
    assert_eq!(state.message, "", "{}", node.report());
    assert!(state.resources.as_ref().unwrap().nic);
    let output = node.output("lists").await;
    let (told, _) = output.split_once("1: ").unwrap();
    let expected = format!(
        "udp {world} {BLADE} ping\ntcp {world} {BLADE} ping\nevil.example.org code 5\nudp {elsewhere} nothing\n\
         {NAME} {ELSEWHERE}\nudp {elsewhere} {BLADE} ping\nudp {} nothing\nudp {} nothing\ntcp {} nothing\n\
         tcp 169.254.77.1:{ECHO} nothing\ntcp 100.127.255.253:{ECHO} nothing\n1400\n",
        at(PRIVATE),
        at(METADATA),
        at(BLADE),
        world = at(WORLD),
        elsewhere = at(ELSEWHERE),
    );
    assert_eq!(told, expected, "{}", node.report());

    // What other tools see in the guests' namespace.
    let netns = guests(&node, &state.vm_id).await;
    let links = json(&netns, "ip -j link show dev fa0");
    assert!(links[0]["flags"].to_string().contains("\"UP\""), "{links}");
    let pins = json(&netns, "nft -j list map inet far pins4").to_string();
    assert!(pins.contains(NAME), "{pins}");
    let seen = counters(&node, "lists").await;
    assert!(
        seen.denied.unwrap().packets >= 5 && seen.received.unwrap().packets >= 5,
        "{seen:?}"
    );
    assert_eq!(seen.spoofed.unwrap().packets, 0, "{seen:?}");
    explains(&node).await;
    traces(&node).await;

    // Its open connection and its pins outlive far-node.
    node.kill_and_restart().await;
    until_more_lines(&mut node, "lists").await;
    let adopted = until_adopted(&node, "lists").await;
    assert!(
        adopted.sent.unwrap().packets >= seen.sent.unwrap().packets,
        "counters go on"
    );
    let pins = json(&netns, "nft -j list map inet far pins4").to_string();
    assert!(pins.contains(NAME), "{pins}");
    node.write("lists", "/enough", b"yes").await;
    let state = node.until("lists", |state| state.phase() == Phase::Ended).await;
    assert_eq!(state.end.unwrap().exit_code, Some(0), "{}", node.report());
    node.until_nothing_is_left(&state.vm_id).await;
    // The next agent has the network to itself, and by default nothing of it.
    let step = format!("udp={}", at(WORLD));
    node.client()
        .ensure_agent(agent(
            "nothing",
            "payload",
            None,
            &[&step, "resolve=api.example.com"],
            128,
        ))
        .await
        .unwrap();
    node.until("nothing", |state| state.phase() == Phase::Ended).await;
    let output = node.output("nothing").await;
    assert_eq!(output, format!("udp {} nothing\n{NAME} no name server\n", at(WORLD)));
}

async fn explains(node: &Node) {
    let mut client = node.network().await;
    for (destination, protocol, port, passes, rule) in [
        ("203.0.113.1", 6, 7007, true, "spec.network.egress[0].ports[0]"),
        ("203.0.113.1", 17, 53, false, "default deny"),
        ("169.254.169.254", 6, 80, false, "never reachable"),
        (NAME, 17, 7007, true, "spec.network.egress[2].ports[1]"),
        ("evil.example.org", 6, 443, false, "no rule has evil.example.org"),
        ("10.9.9.9", 6, 7007, false, "default deny"),
    ] {
        let request = ExplainRequest {
            identity: identity("lists"),
            destination: destination.into(),
            protocol,
            port,
            source: String::new(),
        };
        let told = client.explain(request).await.unwrap().into_inner();
        assert_eq!(told.passes, passes, "{destination}: {told:?}");
        assert!(told.rule.contains(rule), "{destination}: {told:?}");
    }
    for (request, field) in [
        (
            ExplainRequest {
                identity: identity("lists"),
                destination: "a b".into(),
                ..ExplainRequest::default()
            },
            "destination",
        ),
        (
            ExplainRequest {
                identity: identity("lists"),
                destination: "10.0.0.1".into(),
                port: 65_536,
                ..ExplainRequest::default()
            },
            "port",
        ),
    ] {
        let refused = client.explain(request).await.unwrap_err();
        assert!(refused.message().contains(field), "{refused:?}");
    }
}

/// The agent keeps asking the world: its packets are told with the rule that lets them.
async fn traces(node: &Node) {
    let mut client = node.network().await;
    let request = TraceRequest {
        identity: identity("lists"),
    };
    let mut packets = client.trace(request.clone()).await.unwrap().into_inner();
    let another = node.network().await.trace(request).await.unwrap_err();
    assert_eq!(another.code(), tonic::Code::ResourceExhausted, "{another:?}");
    let packet = tokio::time::timeout(std::time::Duration::from_secs(120), packets.message());
    let packet = packet.await.expect("a packet is traced").unwrap().unwrap();
    assert_eq!(
        (packet.destination.as_str(), packet.port, packet.passed),
        ("203.0.113.1", 7007, true)
    );
    assert_eq!(packet.source, "169.254.77.2");
    assert!(packet.chains.iter().any(|chain| chain == "egress"), "{packet:?}");
    assert_eq!(packet.rule, "spec.network.egress[0].ports[0]", "{packet:?}");
}

#[tokio::test]
async fn a_hostile_microvm_reaches_neither_its_neighbour_nor_the_blade() {
    let test = "a_hostile_microvm_reaches_neither_its_neighbour_nor_the_blade";
    let Some(world) = World::new(test) else { return };
    let Some(mut node) = start(test, &world).await else {
        return;
    };
    let egress = || vec![rule(To::Cidr("203.0.113.0/24".into()))];
    let victim = networked("victim", egress(), &["answer-udp=7007"]);
    node.client().ensure_agent(victim).await.unwrap();
    node.until_output("victim", "answering").await;
    let asks = format!("udp={WORLD}:{ECHO}");
    let slots = ["udp=100.64.0.2:7007", "udp=100.64.0.6:7007", "udp=169.254.77.1:7007"];
    let steps = [&["attack", &asks], &slots[..], &["out=done", "answer-udp=7008"]].concat();
    node.client()
        .ensure_agent(networked("hostile", egress(), &steps))
        .await
        .unwrap();
    node.until_output("hostile", "done").await;
    let output = node.output("hostile").await;
    assert!(
        output.contains(&format!("udp {WORLD}:{ECHO} {BLADE} ping")),
        "itself it may: {output}"
    );
    for slot in slots {
        let (_, to) = slot.split_once('=').unwrap();
        assert!(output.contains(&format!("udp {to} nothing")), "{output}");
    }
    assert_eq!(
        node.output("victim").await,
        "answering\n",
        "nothing reached the neighbour"
    );

    let seen = counters(&node, "hostile").await;
    assert!(seen.spoofed.unwrap().packets >= 50, "{seen:?}");
    assert!(seen.denied.unwrap().packets >= 50, "{seen:?}");
    let unharmed = counters(&node, "victim").await;
    assert_eq!(unharmed.received.unwrap().packets, 0, "{unharmed:?}");
    assert_eq!(unharmed.spoofed.unwrap().packets, 0, "{unharmed:?}");
    // The neighbours that the blade believes in are those that far-node wrote down, as `ip` tells.
    let state = node.until("victim", |state| state.phase() == Phase::Running).await;
    let netns = guests(&node, &state.vm_id).await;
    let neighbours = json(&netns, "ip -j neigh show to 169.254.77.2");
    let neighbours = neighbours.as_array().unwrap();
    assert_eq!(neighbours.len(), 2, "{neighbours:?}");
    for one in neighbours {
        assert_eq!(one["lladdr"], "02:fa:00:00:00:01", "{one}");
        assert!(one["state"].to_string().contains("PERMANENT"), "{one}");
    }
    // The hostile one's tap is taken away under it: the neighbour's world stays.
    let tap = if seen.spoofed.unwrap().packets > 0 {
        "fa1"
    } else {
        "fa0"
    };
    inside(&netns, &format!("ip link del {tap}"));
    let mut client = node.network().await;
    let told = client
        .list_networks(ListNetworksRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(told.networks.len(), 2);
    assert_eq!(told.blade.unwrap().uplink_link, "eth7");
    node.write("hostile", "/enough", b"yes").await;
    let state = node.until("hostile", |state| state.phase() == Phase::Ended).await;
    node.until_nothing_is_left(&state.vm_id).await;
    node.write("victim", "/enough", b"yes").await;
    let state = node.until("victim", |state| state.phase() == Phase::Ended).await;
    assert_eq!(state.end.unwrap().exit_code, Some(0));
    node.until_nothing_is_left(&state.vm_id).await;
    let taken = client
        .list_networks(ListNetworksRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(taken.blade.unwrap().slots_taken, 0);
}
