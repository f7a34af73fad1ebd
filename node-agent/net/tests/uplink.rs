//! The way out, and what a restart of its owner leaves of it, in namespaces of the test.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

mod common;

use common::{ECHO, ELSEWHERE, From, Tap, WORLD, WORLD6, aim, echo, lacks, run_in, wait_for};
use far_net::{Destination, GuestNetns, Mode, Network, Options, Place, Policy, Protocol, Proven, Rule};
use std::{collections::BTreeSet, net::IpAddr, time::Duration};

/// The blade's end of the uplink.
const OUTER: std::net::Ipv4Addr = std::net::Ipv4Addr::new(100, 127, 255, 253);
/// The blade on its own network.
const BLADE: std::net::Ipv4Addr = std::net::Ipv4Addr::new(192, 0, 2, 2);

fn to(destinations: &[&str]) -> Policy {
    let rule = |text: &&str| Rule {
        to: match text.parse() {
            Ok(cidr) => Destination::Cidr(cidr),
            Err(_) => Destination::Name(text.parse().unwrap()),
        },
        protocol: Protocol::Udp,
        ports: ECHO..=ECHO,
    };
    Policy {
        mode: Mode::Restricted,
        egress: destinations.iter().map(rule).collect(),
        ..Policy::default()
    }
}

/// A blade that forwards, with a world behind it and a service that listens everywhere.
fn blade() -> (GuestNetns, GuestNetns) {
    let blade = GuestNetns::create().unwrap();
    let world = common::connect_world(&blade);
    run_in(
        &blade.path(),
        &[
            "sysctl",
            "-qw",
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
        ],
    );
    (blade, world)
}

fn guest(network: &Network, policy: Policy) -> (Place, Tap, From) {
    let place = network.attach(policy).unwrap();
    let inside = network.netns().unwrap();
    let tap = Tap::attach(inside, place.tap.as_str());
    aim(&inside.path(), place.tap.as_str());
    let from = From::place(&place);
    (place, tap, from)
}

#[test]
fn an_uplink_joins_the_guests_namespace_with_the_blades() {
    if lacks(
        "an_uplink_joins_the_guests_namespace_with_the_blades",
        &["ip", "nft", "sysctl"],
    ) {
        return;
    }
    let (blade, _world) = blade();
    let network = Network::open(GuestNetns::create().unwrap(), Options::default()).unwrap();
    network.connect_uplink(&blade).unwrap();
    network.connect_uplink(&blade).unwrap();
    let (place, mut tap, from) = guest(&network, to(&["203.0.113.0/24", "100.64.0.0/10", "2a00::/16"]));
    tap.send(&from.udp(OUTER, ECHO, "the blade's end"));
    tap.send(&from.udp(WORLD, ECHO, "out"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 out");
    assert_eq!(network.counters(place.slot).unwrap().denied.packets, 1);
    tap.send(&from.udp6(WORLD6, ECHO, "out"));
    assert_eq!(tap.receive_echo("the echo over IPv6"), "2a00:ffff::2 out");
}

#[test]
fn the_blade_itself_takes_nothing_from_guests_that_may_reach_its_network() {
    let name = "the_blade_itself_takes_nothing_from_guests_that_may_reach_its_network";
    if lacks(name, &["ip", "nft", "sysctl", "tcpdump"]) {
        return;
    }
    let (blade, _world) = blade();
    echo(&blade, BLADE.into(), ECHO);
    let network = Network::open(GuestNetns::create().unwrap(), Options::default()).unwrap();
    network.connect_uplink(&blade).unwrap();
    let (place, mut tap, from) = guest(&network, to(&["192.0.2.0/24", "203.0.113.0/24"]));
    // What arrives at the blade's end, as tcpdump sees it: the rule lets it out, the blade does not take it in.
    let inside = format!("--net={}", blade.path().display());
    let mut command = std::process::Command::new("nsenter");
    command.args([
        &inside,
        "tcpdump",
        "-lnni",
        "tb-guests",
        "-c",
        "1",
        "udp",
        "and",
        "dst",
        "host",
        "192.0.2.2",
    ]);
    let mut dump = command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // tcpdump says nowhere that it listens: the guest goes on until something was seen.
    wait_for("a packet at the blade's end", || {
        tap.send(&from.udp(BLADE, ECHO, "to the blade"));
        dump.try_wait().unwrap()
    });
    let output = dump.wait_with_output().unwrap();
    let seen = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        seen.contains("100.127.255.254") && seen.contains("192.0.2.2.7007"),
        "{seen}"
    );
    tap.send(&from.udp(WORLD, ECHO, "to the world"));
    assert_eq!(tap.receive_echo("the first answer of all"), "192.0.2.2 to the world");
    assert_eq!(network.counters(place.slot).unwrap().denied.packets, 0);
}

#[test]
fn the_way_out_is_found_by_the_default_route() {
    if lacks("the_way_out_is_found_by_the_default_route", &["ip", "sysctl"]) {
        return;
    }
    let alone = GuestNetns::create().unwrap();
    assert_eq!(far_net::uplink::way_out(&alone).unwrap(), None);
    let (blade, _world) = blade();
    run_in(&blade.path(), &["ip", "link", "set", "up0", "mtu", "1450"]);
    let way = far_net::uplink::way_out(&blade).unwrap().unwrap();
    assert_eq!((way.link.as_str(), way.mtu), ("up0", 1450));
    assert_eq!(blade.forwards().unwrap(), (true, true));
}

#[test]
fn connections_and_pins_of_an_adopted_vm_go_on_and_a_changed_policy_takes_hold() {
    let name = "connections_and_pins_of_an_adopted_vm_go_on_and_a_changed_policy_takes_hold";
    if lacks(name, &["ip", "nft", "sysctl"]) {
        return;
    }
    let (blade, _world) = blade();
    let netns = GuestNetns::create().unwrap();
    // A second handle, as one found by a VMM's process is.
    let again = netns.run_inside(|| GuestNetns::current().unwrap()).unwrap();
    let third = netns.run_inside(|| GuestNetns::current().unwrap()).unwrap();
    let network = Network::open(netns, Options::default()).unwrap();
    network.connect_uplink(&blade).unwrap();
    let policy = to(&["203.0.113.0/24", "api.example.com"]);
    let (place, mut tap, from) = guest(&network, policy.clone());
    let api = "api.example.com".parse().unwrap();
    let minute = Duration::from_secs(600);
    assert!(network.pin(place.slot, &api, IpAddr::from(ELSEWHERE), minute).unwrap());
    tap.send(&from.udp(ELSEWHERE, ECHO, "pinned"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 pinned");
    let sent = network.counters(place.slot).unwrap().sent.packets;
    drop(network);

    let proven = |policy: Policy| Proven {
        live: vec![(place.clone(), policy)],
        ours: BTreeSet::from([place.tap.clone()]),
    };
    let network = Network::open(again, Options::default()).unwrap();
    assert_eq!(network.reclaim(&proven(policy)).unwrap().adopted, 1);
    let pins = network.pins(place.slot).unwrap();
    assert_eq!(pins.get(&IpAddr::from(ELSEWHERE)), Some(&api));
    tap.send(&from.udp(ELSEWHERE, ECHO, "adopted"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 adopted");
    assert!(
        network.counters(place.slot).unwrap().sent.packets > sent,
        "counters go on"
    );
    drop(network);

    let network = Network::open(third, Options::default()).unwrap();
    assert_eq!(network.reclaim(&proven(to(&["203.0.113.0/24"]))).unwrap().adopted, 1);
    assert!(network.pins(place.slot).unwrap().is_empty());
    tap.send(&from.udp(ELSEWHERE, ECHO, "changed"));
    wait_for("the denial", || {
        (network.counters(place.slot).unwrap().denied.packets == 1).then_some(())
    });
    tap.send(&from.udp(WORLD, ECHO, "still"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 still");
}

#[test]
fn a_trace_tells_what_passes_and_what_is_dropped_and_leaves_nothing() {
    let name = "a_trace_tells_what_passes_and_what_is_dropped_and_leaves_nothing";
    if lacks(name, &["ip", "nft", "sysctl"]) {
        return;
    }
    let (blade, _world) = blade();
    let network = Network::open(GuestNetns::create().unwrap(), Options::default()).unwrap();
    network.connect_uplink(&blade).unwrap();
    let (place, mut tap, from) = guest(&network, to(&["203.0.113.0/24"]));
    let mut trace = network.trace(&place.tap).unwrap();
    assert!(network.trace(&place.tap).is_err(), "one at a time");
    let forged = From {
        address: [10, 0, 0, 7].into(),
        ..from
    };
    tap.send(&from.udp(WORLD, ECHO, "passes"));
    tap.send(&from.udp(ELSEWHERE, ECHO, "denied"));
    tap.send(&forged.udp(WORLD, ECHO, "spoofed"));
    let mut told = Vec::new();
    wait_for("three packets", || {
        told.extend(trace.next(Duration::from_millis(100)).unwrap());
        (told.len() >= 3).then_some(())
    });
    let last = |destination: IpAddr, source: IpAddr| {
        let one = told
            .iter()
            .find(|one| one.destination == destination && one.source == source);
        let one = one.unwrap_or_else(|| panic!("{told:?}"));
        (one.passed, one.chains.clone(), one.port)
    };
    let (passed, chains, port) = last(WORLD.into(), place.guest.address.into());
    assert!(passed && port == ECHO && chains.contains(&"let".to_owned()), "{told:?}");
    let (passed, chains, _) = last(ELSEWHERE.into(), place.guest.address.into());
    assert!(
        !passed && chains.last().is_some_and(|chain| chain == "denied"),
        "{told:?}"
    );
    let (passed, chains, _) = last(WORLD.into(), forged.address.into());
    assert!(
        !passed && chains.last().is_some_and(|chain| chain == "spoofed"),
        "{told:?}"
    );
    let tables = || common::json(&network.netns().unwrap().path(), "nft -j list tables").to_string();
    assert!(tables().contains("far-trace"));
    drop(trace);
    wait_for("the end of the trace's table", || {
        (!tables().contains("far-trace")).then_some(())
    });
}

#[test]
fn each_slot_has_its_own_list_whatever_its_shard() {
    if lacks(
        "each_slot_has_its_own_list_whatever_its_shard",
        &["ip", "nft", "sysctl"],
    ) {
        return;
    }
    let (blade, _world) = blade();
    let options = Options {
        has_ipv6: false,
        ..Options::default()
    };
    let network = Network::open(GuestNetns::create().unwrap(), options).unwrap();
    network.connect_uplink(&blade).unwrap();
    // More than there are shards; every other one may reach the world.
    let policies = (0..130).map(|number| {
        if number % 2 == 0 {
            to(&["203.0.113.0/24"])
        } else {
            to(&["198.51.100.0/24"])
        }
    });
    let places: Vec<Place> = policies.map(|policy| network.attach(policy).unwrap()).collect();
    for place in [
        &places[0],
        &places[1],
        &places[63],
        &places[64],
        &places[127],
        &places[128],
        &places[129],
    ] {
        let inside = network.netns().unwrap();
        let mut tap = Tap::attach(inside, place.tap.as_str());
        aim(&inside.path(), place.tap.as_str());
        let from = From::place(place);
        let (may, may_not) = match place.slot.number() % 2 {
            0 => (WORLD, ELSEWHERE),
            _ => (ELSEWHERE, WORLD),
        };
        tap.send(&from.udp(may_not, ECHO, "denied"));
        tap.send(&from.udp(may, ECHO, "let"));
        assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 let", "{:?}", place.slot);
        assert_eq!(network.counters(place.slot).unwrap().denied.packets, 1);
    }
}
