//! What the network of one microVM costs, against programs that do the same: `ip` + `nft`, and CNI plugins.
//!
//! Everything runs in namespaces that the bench makes. CPU is that of this process or of its ended children: what the
//! kernel does later, in its own threads, is on neither side.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use far_net::{Destination, GuestNetns, Mode, Network, Options, Policy, Pool, Protocol, Rule};
use nix::sys::resource::{UsageWho, getrusage};

use crate::{
    cpu,
    report::{Goal, Row},
};

/// VMs per measurement: CPU time is told in microseconds and charged in ticks on some kernels.
const BATCH: u32 = 200;
const COMMANDS: u32 = 10;
const PLUGINS: &str = "/usr/lib/cni";

/// All rows, `rounds` times interleaved.
pub(crate) fn rows(rounds: usize) -> Result<Vec<Row>> {
    let (mut commands, mut ptp, mut bridge) = (Vec::new(), Vec::new(), Vec::new());
    let (mut pool, mut many, mut rule) = (Vec::new(), Vec::new(), Vec::new());
    let (mut attached, mut many6, mut stream) = (Vec::new(), Vec::new(), Vec::new());
    let has_iperf = Command::new("iperf3").arg("--version").output().is_ok();
    let has_plugins = Path::new(PLUGINS).join("ptp").is_file();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let ours = with_vms(10, false)?.both;
        commands.push((ours, Some(ip_and_nft()?)));
        ptp.push((ours, has_plugins.then(|| cni("ptp")).transpose()?));
        bridge.push((ours, has_plugins.then(|| cni("bridge")).transpose()?));
        pool.push((hand_out(), Some(50.0)));
        let (beside_many, beside_few) = (with_vms(1000, false)?, with_vms(10, false)?);
        attached.push((beside_few.attach, Some(50.0)));
        many.push((beside_many.both, Some(beside_few.both)));
        many6.push((with_vms(1000, true)?.both, Some(with_vms(10, true)?.both)));
        rule.push((per_packet(1000)?, Some(per_packet(1)?)));
        if has_iperf {
            stream.push((per_megabyte(1000)?, Some(per_megabyte(1)?)));
        }
    }
    let twentieth = Some(Goal::RatioAtMost(0.05));
    let mut rows = vec![
        Row::of(
            "set up and tear down one VM's network",
            "CPU us",
            commands,
            Some("ip and nft commands"),
            twentieth,
        ),
        Row::of(
            "the same",
            "CPU us",
            ptp,
            Some("CNI ptp + host-local + firewall"),
            twentieth,
        ),
        Row::of(
            "the same",
            "CPU us",
            bridge,
            Some("CNI bridge + host-local + firewall"),
            twentieth,
        ),
        Row::of(
            "hand out a pooled slot",
            "CPU us",
            pool,
            Some("the goal, 50 us"),
            Some(Goal::RatioAtMost(1.0)),
        ),
        Row::of(
            "set up and tear down beside 1000 VMs",
            "CPU us",
            many,
            Some("beside 10 VMs"),
            Some(Goal::RatioAtMost(1.5)),
        ),
        Row::of(
            "one packet out of a tap, 1000 VMs",
            "CPU us",
            rule,
            Some("1 VM"),
            Some(Goal::RatioAtMost(1.25)),
        ),
        Row::of(
            "connect a VM on a pooled slot: policy, tap up, route",
            "CPU us",
            attached,
            Some("the hand-out's goal, 50 us"),
            None,
        ),
        Row::of(
            "set up and tear down beside 1000 VMs, IPv6 on",
            "CPU us",
            many6,
            Some("beside 10 VMs, IPv6 on"),
            None,
        ),
    ];
    if has_iperf {
        rows.push(Row::of(
            "iperf3 through one slot, 1000 VMs",
            "CPU us per MB",
            stream,
            Some("1 VM"),
            Some(Goal::RatioAtMost(1.25)),
        ));
    } else {
        eprintln!("SKIPPED iperf3 through one slot: iperf3");
    }
    Ok(rows)
}

fn policy() -> Policy {
    let networks = ["203.0.113.0/24", "198.51.100.0/25", "10.1.0.0/16"];
    let rule = |network: &str| -> Result<Rule> {
        Ok(Rule {
            to: Destination::Cidr(network.parse()?),
            protocol: Protocol::Udp,
            ports: 1..=9999,
        })
    };
    let egress = networks
        .iter()
        .map(|network| rule(network))
        .collect::<Result<_>>()
        .unwrap_or_default();
    Policy {
        mode: Mode::Restricted,
        egress,
        ..Policy::default()
    }
}

/// CPU microseconds of this process, all threads.
fn own_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 * 1e6 + time.tv_usec() as f64;
    Ok(micros(usage.user_time()) + micros(usage.system_time()))
}

fn full(count: u16, has_ipv6: bool) -> Result<Network> {
    let network = Network::open(
        GuestNetns::create()?,
        Options {
            capacity: count + 8,
            has_ipv6,
            ..Options::default()
        },
    )?;
    network.prepare(count + 8)?;
    for _ in 0..count {
        network.attach(policy())?;
    }
    Ok(network)
}

/// CPU microseconds per VM.
struct Cost {
    attach: f64,
    both: f64,
}

/// One attach and detach beside so many VMs.
fn with_vms(count: u16, has_ipv6: bool) -> Result<Cost> {
    let network = full(count, has_ipv6)?;
    let (mut attach, mut both) = (0.0, 0.0);
    // Eight slots are free: attached together, so that a clock that ticks coarsely sees more than one.
    for _ in 0..BATCH / 8 {
        let before = own_cpu()?;
        let places: Vec<_> = (0..8).map(|_| network.attach(policy())).collect::<Result<_, _>>()?;
        attach += own_cpu()? - before;
        for place in places {
            network.detach(place.slot)?;
        }
        both += own_cpu()? - before;
    }
    let turns = f64::from(BATCH / 8 * 8);
    Ok(Cost {
        attach: attach / turns,
        both: both / turns,
    })
}

/// CPU of a slot's way out of the pool and back.
fn hand_out() -> f64 {
    let mut pool = Pool::new(16_384);
    let times = 100_000_u32;
    let before = own_cpu().unwrap_or(0.0);
    for _ in 0..times {
        if let Some(lease) = pool.take() {
            pool.give_back(std::hint::black_box(lease));
        }
    }
    (own_cpu().unwrap_or(0.0) - before) / f64::from(times)
}

/// CPU of one packet from a tap through all rules, to an address that the last of the VMs may reach.
fn per_packet(count: u16) -> Result<f64> {
    let netns = GuestNetns::create()?;
    inside(
        &netns.path(),
        "ip link add up0 type veth peer name down0 && ip addr add 192.0.2.2/30 dev up0 && ip link set up0 up && ip link set down0 up && ip route add default via 192.0.2.1 && ip neigh add 192.0.2.1 lladdr 02:00:00:00:00:07 dev up0 nud permanent",
    )?;
    let network = Network::open(
        netns,
        Options {
            capacity: count,
            ..Options::default()
        },
    )?;
    network.forward()?;
    network.prepare(count)?;
    let limits = far_net::Limits {
        packets: far_net::MAX_RATE,
        ..far_net::Limits::default()
    };
    let mut last = None;
    for _ in 0..count {
        last = Some(network.attach(Policy { limits, ..policy() })?);
    }
    let place = last.context("no VM")?;
    let tap = crate::tap::Tap::attach(network.netns().context("no namespace")?, place.tap.as_str())?;
    let frame = tap.udp_frame(&place, [203, 0, 113, 1], 7007);
    let packets = 100_000_u32;
    for _ in 0..1000 {
        tap.send(&frame)?;
    }
    let before = own_cpu()?;
    for _ in 0..packets {
        tap.send(&frame)?;
    }
    let spent = own_cpu()? - before;
    let seen = network.counters(place.slot)?;
    ensure!(
        seen.sent.packets >= u64::from(packets) && seen.denied.packets == 0,
        "not all packets went the way that is measured: {seen:?}"
    );
    Ok(spent / f64::from(packets))
}

/// CPU of client and server for a megabyte of TCP that a guest sends through its slot, beside so many VMs. The guest is a
/// namespace, its link a veth with a tap's name: rules know links by their names.
fn per_megabyte(count: u16) -> Result<f64> {
    let (netns, guest, world) = (GuestNetns::create()?, GuestNetns::create()?, GuestNetns::create()?);
    inside(
        &netns.path(),
        &format!(
            "ip link add up0 type veth peer name down0 netns {}; ip addr add 192.0.2.2/30 dev up0; ip link set up0 up; \
             ip route add default via 192.0.2.1; ip link add fa0 type veth peer name eth0 netns {}",
            world.path().display(),
            guest.path().display()
        ),
    )?;
    inside(
        &world.path(),
        "ip link set lo up; ip addr add 192.0.2.1/30 dev down0; ip link set down0 up; ip addr add 203.0.113.1/32 dev lo",
    )?;
    inside(
        &guest.path(),
        "ip link set eth0 address 02:fa:00:00:00:01; ip addr add 169.254.77.2/30 dev eth0; ip link set eth0 up; \
         ip route add default via 169.254.77.1",
    )?;
    let options = Options {
        capacity: count,
        has_ipv6: false,
        ..Options::default()
    };
    let network = Network::open(netns, options)?;
    network.forward()?;
    // Finds the link that is there.
    network.reclaim(&far_net::Proven::default())?;
    let limits = far_net::Limits {
        packets: far_net::MAX_RATE,
        ..far_net::Limits::default()
    };
    let tcp = Rule {
        to: Destination::Cidr("203.0.113.0/24".parse()?),
        protocol: Protocol::Tcp,
        ports: 5201..=5201,
    };
    for _ in 0..count {
        let mut policy = Policy { limits, ..policy() };
        policy.egress.push(tcp.clone());
        network.attach(policy)?;
    }
    let before = cpu::of_children()?;
    let server = format!("--net={}", world.path().display());
    let mut server = Command::new("nsenter")
        .args([&server, "iperf3", "--server", "--one-off", "--bind", "203.0.113.1"])
        .stdout(Stdio::null())
        .spawn()?;
    let mut client = Command::new("nsenter");
    client.arg(format!("--net={}", guest.path().display()));
    client.args([
        "iperf3",
        "--json",
        "--bytes",
        "512M",
        "--client",
        "203.0.113.1",
        "--connect-timeout",
        "5000",
    ]);
    // The server tells nobody that it listens.
    let mut output = client.output()?;
    for _ in 0..50 {
        if output.status.success() {
            break;
        }
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(std::time::Duration::from_millis(100));
        output = client.output()?;
    }
    if !output.status.success() {
        server.kill()?;
    }
    server.wait()?;
    ensure!(
        output.status.success(),
        "iperf3: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok((cpu::of_children()? - before) * 1e6 / 512.0)
}

fn inside(netns: &Path, script: &str) -> Result<()> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns.display()))
        .args(["sh", "-ec", script])
        .stdout(Stdio::null());
    ensure!(command.status().context("nsenter")?.success(), "failed: {script}");
    Ok(())
}

/// CPU microseconds of the children that `act` runs, per turn.
fn children(turns: u32, mut act: impl FnMut(u32) -> Result<()>) -> Result<f64> {
    let before = cpu::of_children()?;
    for turn in 0..turns {
        act(turn)?;
    }
    Ok((cpu::of_children()? - before) * 1e6 / f64::from(turns))
}

/// The same with commands: a tap, its anti-spoof rules, its allow list; one shell per VM and its commands in it.
fn ip_and_nft() -> Result<f64> {
    let netns = GuestNetns::create()?;
    inside(
        &netns.path(),
        "nft 'table inet t { set source { type ifname . ether_addr . ipv4_addr; }; set egress { type ifname . ipv4_addr . inet_proto . inet_service; flags interval; }; chain c { type filter hook prerouting priority raw; iifname . ether saddr . ip saddr != @source drop; }; }'",
    )?;
    children(COMMANDS, |turn| {
        let tap = format!("t{turn}");
        let element = format!("'{{ {tap} . 02:fa:00:00:00:01 . 169.254.77.2 }}'");
        let lists = ["203.0.113.0/24", "198.51.100.0/25", "10.1.0.0/16"]
            .map(|network| format!("{tap} . {network} . udp . 1-9999"));
        let egress = format!("'{{ {} }}'", lists.join(", "));
        inside(
            &netns.path(),
            &format!(
                "ip tuntap add dev {tap} mode tap; nft add element inet t source {element}; nft add element inet t egress {egress}; ip link set {tap} up; ip route add 100.64.0.{turn}/32 dev {tap}; \
                 ip link set {tap} down; nft delete element inet t source {element}; nft delete element inet t egress {egress}; ip link del {tap}"
            ),
        )
    })
}

/// ADD and DEL of a chain of plugins, as a container runtime calls them.
fn cni(kind: &str) -> Result<f64> {
    let host = GuestNetns::create()?;
    inside(&host.path(), "ip link set lo up")?;
    let folder = tempfile::tempdir()?;
    let guest = GuestNetns::create()?;
    let main = match kind {
        "bridge" => r#""type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":false"#,
        _ => r#""type":"ptp","ipMasq":false"#,
    };
    let ipam = format!(
        r#""ipam":{{"type":"host-local","subnet":"10.88.0.0/16","dataDir":{:?}}}"#,
        folder.path()
    );
    let first = format!(r#"{{"cniVersion":"0.4.0","name":"b",{main},{ipam}}}"#);
    children(COMMANDS, |turn| {
        let call =
            |plugin: &str, command: &str, config: &str| plugin_call(&host, &guest, turn, plugin, command, config);
        let result = call(kind, "ADD", &first)?;
        let second = format!(
            r#"{{"cniVersion":"0.4.0","name":"b","type":"firewall","backend":"iptables","prevResult":{}}}"#,
            String::from_utf8_lossy(&result)
        );
        call("firewall", "ADD", &second)?;
        call("firewall", "DEL", &second)?;
        call(kind, "DEL", &first)?;
        Ok(())
    })
}

fn plugin_call(
    host: &GuestNetns,
    guest: &GuestNetns,
    turn: u32,
    plugin: &str,
    command: &str,
    config: &str,
) -> Result<Vec<u8>> {
    let program: PathBuf = Path::new(PLUGINS).join(plugin);
    let mut child = Command::new("nsenter")
        .arg(format!("--net={}", host.path().display()))
        .arg(program)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", format!("far-bench-{turn}"))
        .env("CNI_NETNS", guest.path())
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", PLUGINS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| plugin.to_owned())?;
    child.stdin.take().context("no stdin")?.write_all(config.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{plugin} {command}: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(output.stdout)
}
