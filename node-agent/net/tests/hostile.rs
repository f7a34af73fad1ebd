//! What a hostile guest sends on its tap, and what comes of it, in namespaces of the test.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

mod common;

use common::{Blade, ECHO, ELSEWHERE, From, METADATA, PRIVATE, Tap, WORLD, WORLD6, aim, lacks, wait_for};
use far_net::{
    Count, Counters, Destination, GuestNetns, Mode, Network, Options, Place, Policy, Protocol, Proven, Rule,
};
use std::{collections::BTreeSet, net::UdpSocket};

fn restricted(networks: &[&str]) -> Policy {
    let rule = |network: &&str| Rule {
        to: Destination::Cidr(network.parse().unwrap()),
        protocol: Protocol::Udp,
        ports: ECHO..=ECHO,
    };
    Policy {
        mode: Mode::Restricted,
        egress: networks.iter().map(rule).collect(),
        ..Policy::default()
    }
}

fn guest(blade: &Blade, policy: Policy) -> (Place, Tap, From) {
    let place = blade.network.attach(policy).unwrap();
    let tap = blade.tap(&place);
    aim(&blade.path(), place.tap.as_str());
    let from = From::place(&place);
    (place, tap, from)
}

/// The counter rises by `frames`, and nothing of them came out: what is allowed and sent afterwards is answered first.
fn is_refused(blade: &Blade, place: &Place, tap: &mut Tap, frames: &[Vec<u8>], of: fn(&Counters) -> Count) {
    let before = of(&blade.network.counters(place.slot).unwrap()).packets;
    for frame in frames {
        tap.send(frame);
    }
    let wanted = before + frames.len() as u64;
    wait_for("the drop in the counter", || {
        let seen = of(&blade.network.counters(place.slot).unwrap()).packets;
        assert!(seen <= wanted, "{seen} drops for {} frames", frames.len());
        (seen == wanted).then_some(())
    });
    tap.send(&From::place(place).udp(WORLD, ECHO, "after"));
    assert_eq!(tap.receive_echo("the echo of what is allowed"), "192.0.2.2 after");
}

#[test]
fn what_is_allowed_comes_back_to_the_guests_own_address() {
    if lacks("what_is_allowed_comes_back_to_the_guests_own_address", &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (_, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24", "2a00:fa::/32"]));
    tap.send(&from.udp(WORLD, ECHO, "hello"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 hello");
    tap.send(&from.udp6(WORLD6, ECHO, "six"));
    assert_eq!(tap.receive_echo("the echo over IPv6"), "2a00:ffff::2 six");
}

#[test]
fn spoofed_macs_and_addresses_are_dropped_and_counted() {
    if lacks("spoofed_macs_and_addresses_are_dropped_and_counted", &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (place, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24", "2a00:fa::/32"]));
    let mac = From {
        mac: [2, 0, 0, 0, 0, 9],
        ..from
    };
    let ipv4 = From {
        address: [169, 254, 77, 3].into(),
        ..from
    };
    let slots_own = From {
        address: place.address,
        ..from
    };
    let ipv6 = From {
        address6: "2a00:ffff::2".parse().unwrap(),
        ..from
    };
    let frames = [
        mac.udp(WORLD, ECHO, "mac"),
        ipv4.udp(WORLD, ECHO, "address"),
        slots_own.udp(WORLD, ECHO, "the address behind the exchange"),
        mac.udp6(WORLD6, ECHO, "mac over IPv6"),
        ipv6.udp6(WORLD6, ECHO, "address over IPv6"),
    ];
    is_refused(&blade, &place, &mut tap, &frames, |counters| counters.spoofed);
}

#[test]
fn the_world_beyond_the_list_metadata_private_ranges_guests_and_the_blade_are_denied() {
    if lacks(
        "the_world_beyond_the_list_metadata_private_ranges_guests_and_the_blade_are_denied",
        &["ip", "nft"],
    ) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (other, mut other_tap, other_from) = guest(&blade, restricted(&["0.0.0.0/0"]));
    let (place, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24", "0.0.0.0/1"]));
    let frames = [
        from.udp(ELSEWHERE, ECHO, "not on the list"),
        from.udp(WORLD, ECHO + 1, "not this port"),
        from.udp(METADATA, ECHO, "metadata"),
        from.udp(PRIVATE, ECHO, "private, in a wide network"),
        from.udp([192, 0, 2, 2].into(), ECHO, "the blade's uplink"),
        from.udp(common::ROUTER, ECHO, "the blade"),
        from.udp(common::ROUTER, 53, "a service that is not allowed"),
    ];
    is_refused(&blade, &place, &mut tap, &frames, |counters| counters.denied);
    // To a guest: the forward chain drops it before it belongs to anybody's egress.
    tap.send(&from.udp(other.address, ECHO, "guest to guest"));
    tap.send(&from.udp(WORLD, ECHO, "after"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 after");
    aim(&blade.path(), other.tap.as_str());
    other_tap.send(&other_from.udp(WORLD, ECHO, "other"));
    assert_eq!(
        other_tap.receive_echo("the first that the other guest gets"),
        "192.0.2.2 other"
    );
}

#[test]
fn forged_arp_gets_no_answer_and_honest_arp_does() {
    if lacks("forged_arp_gets_no_answer_and_honest_arp_does", &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (_, mut tap, from) = guest(&blade, Policy::default());
    let other = From {
        address: [169, 254, 77, 9].into(),
        ..from
    };
    let alien = From {
        mac: [2, 0, 0, 0, 0, 9],
        ..from
    };
    for frame in [
        other.arp(1, from.mac, common::ROUTER),
        from.arp(1, alien.mac, common::ROUTER),
        alien.arp(1, from.mac, common::ROUTER),
        other.arp(2, from.mac, common::ROUTER),
    ] {
        tap.send(&frame);
    }
    tap.send(&from.arp(1, from.mac, common::ROUTER));
    let asked = tap.receive("the answer", |frame| {
        (frame[12..14] == [8, 6] && frame[21] == 2).then(|| frame[38..42].to_vec())
    });
    assert_eq!(
        asked,
        from.address.octets(),
        "the first answer is to the honest question"
    );
    let neighbors = common::json(&blade.path(), "ip -j neigh show dev fa0").to_string();
    assert!(
        !neighbors.contains("02:00:00:00:00:09") && !neighbors.contains("169.254.77.9"),
        "{neighbors}"
    );
}

#[test]
fn forged_neighbour_discovery_and_router_advertisements_are_dropped_and_counted() {
    if lacks(
        "forged_neighbour_discovery_and_router_advertisements_are_dropped_and_counted",
        &["ip", "nft"],
    ) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (place, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24"]));
    let router: std::net::Ipv6Addr = "fe80::1".parse().unwrap();
    let all = "ff02::1".parse().unwrap();
    let own = From {
        address6: place.guest.link_local(),
        ..from
    };
    let advert = |target: std::net::Ipv6Addr| {
        [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &from.mac].concat()
    };
    let frames = [
        own.icmp6(router, &advert(router)),
        own.icmp6(router, &advert("fdfa:fa::9".parse().unwrap())),
        own.icmp6(all, &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]),
        own.icmp6(
            all,
            &[&[137, 0, 0, 0, 0, 0, 0, 0][..], &router.octets(), &router.octets()].concat(),
        ),
        From {
            address6: router,
            ..from
        }
        .icmp6(all, &advert(router)),
    ];
    is_refused(&blade, &place, &mut tap, &frames, |counters| counters.spoofed);
    // The honest ones get through: the blade answers who it is.
    let solicit = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &router.octets(), &[1, 1], &from.mac].concat();
    tap.send(&own.icmp6(router, &solicit));
    tap.receive("the blade's advertisement", |frame| {
        (frame[12..14] == [0x86, 0xdd] && frame[20] == 58 && frame[54] == 136).then_some(())
    });
}

#[test]
fn fragments_pass_and_are_dropped_as_the_whole_would_be() {
    if lacks("fragments_pass_and_are_dropped_as_the_whole_would_be", &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (place, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24"]));
    let split = |to: std::net::Ipv4Addr, port| {
        let whole = from.udp_segment(to, port, &"f".repeat(40));
        // More fragments, offset 0; then offset 24 in units of 8.
        [
            from.ipv4(to, 17, 0x2000, &whole[..24]),
            from.ipv4(to, 17, 3, &whole[24..]),
        ]
    };
    for frame in split(WORLD, ECHO) {
        tap.send(&frame);
    }
    assert_eq!(
        tap.receive_echo("the echo of the whole"),
        format!("192.0.2.2 {}", "f".repeat(40))
    );
    // The port that decides is in the first; the second alone says nothing. One drop, of the whole.
    for to in [(WORLD, ECHO + 1), (METADATA, ECHO)] {
        let [first, second] = split(to.0, to.1);
        tap.send(&first);
        is_refused(&blade, &place, &mut tap, &[second], |counters| counters.denied);
    }
}

#[test]
fn tagged_frames_go_nowhere() {
    if lacks("tagged_frames_go_nowhere", &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (place, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24"]));
    let tagged = |tags: &[[u8; 4]], frame: &[u8]| [&frame[..12], &tags.concat(), &frame[12..]].concat();
    let frame = from.udp(WORLD, ECHO, "tagged");
    tap.send(&tagged(&[[0x81, 0, 0, 5]], &frame));
    tap.send(&tagged(&[[0x88, 0xa8, 0, 5], [0x81, 0, 0, 6]], &frame));
    tap.send(&from.udp(WORLD, ECHO, "plain"));
    assert_eq!(tap.receive_echo("the echo of the plain one"), "192.0.2.2 plain");
    // Priority tags name no VLAN: what is behind them is checked like anything else.
    let alien = From {
        mac: [2, 0, 0, 0, 0, 9],
        ..from
    };
    let frames = [tagged(&[[0x81, 0, 0, 0]], &alien.udp(WORLD, ECHO, "priority"))];
    is_refused(&blade, &place, &mut tap, &frames, |counters| counters.spoofed);
}

#[test]
fn a_policy_that_changes_while_traffic_flows_holds_for_open_connections_at_once() {
    if lacks(
        "a_policy_that_changes_while_traffic_flows_holds_for_open_connections_at_once",
        &["ip", "nft"],
    ) {
        return;
    }
    let blade = Blade::new(Options::default());
    let (place, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24", "198.51.100.0/24"]));
    tap.send(&from.udp(ELSEWHERE, ECHO, "before"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 before");
    let sent_before = blade.network.counters(place.slot).unwrap().sent.packets;
    blade
        .network
        .change(place.slot, restricted(&["203.0.113.0/24"]))
        .unwrap();
    is_refused(
        &blade,
        &place,
        &mut tap,
        &[from.udp(ELSEWHERE, ECHO, "same connection")],
        |counters| counters.denied,
    );
    blade
        .network
        .change(place.slot, restricted(&["203.0.113.0/24", "198.51.100.0/24"]))
        .unwrap();
    tap.send(&from.udp(ELSEWHERE, ECHO, "again"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 again");
    assert!(
        blade.network.counters(place.slot).unwrap().sent.packets > sent_before,
        "counters go on"
    );
    // Hundreds of changes under fire: what both policies let is never dropped.
    let before = blade.network.counters(place.slot).unwrap();
    for round in 0..300 {
        let networks: &[&str] = if round % 2 == 0 {
            &["203.0.113.0/24"]
        } else {
            &["203.0.113.0/24", "198.51.100.0/24"]
        };
        tap.send(&from.udp(WORLD, ECHO, "fire"));
        blade.network.change(place.slot, restricted(networks)).unwrap();
        tap.send(&from.udp(WORLD, ECHO, "fire"));
    }
    let after = wait_for("all packets in the counter", || {
        let seen = blade.network.counters(place.slot).unwrap();
        (seen.sent.packets >= before.sent.packets + 600).then_some(seen)
    });
    assert_eq!((after.denied, after.spoofed), (before.denied, before.spoofed));
}

#[test]
fn a_tap_that_is_removed_under_a_running_vm_takes_only_its_own_slot_along() {
    if lacks(
        "a_tap_that_is_removed_under_a_running_vm_takes_only_its_own_slot_along",
        &["ip", "nft"],
    ) {
        return;
    }
    let blade = Blade::new(Options {
        capacity: 2,
        ..Options::default()
    });
    let (other, mut other_tap, other_from) = guest(&blade, restricted(&["203.0.113.0/24"]));
    let (place, tap, _) = guest(&blade, restricted(&["203.0.113.0/24"]));
    common::ip(&blade.path(), &format!("link del {}", place.tap));
    drop(tap);
    aim(&blade.path(), other.tap.as_str());
    other_tap.send(&other_from.udp(WORLD, ECHO, "other"));
    assert_eq!(other_tap.receive_echo("the other's echo"), "192.0.2.2 other");
    blade.network.detach(place.slot).unwrap();
    assert!(!common::nft_set(&blade.path(), "inet", "source4").contains(place.tap.as_str()));
    // The slot comes back with a new tap.
    let (again, mut tap, from) = guest(&blade, restricted(&["203.0.113.0/24"]));
    assert_eq!(again.slot, place.slot);
    tap.send(&from.udp(WORLD, ECHO, "again"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 again");
}

#[test]
fn limits_hold_and_are_counted() {
    if lacks("limits_hold_and_are_counted", &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let limits = far_net::Limits {
        packets: 1_000_000,
        connects: 1_000_000,
        connections: 2,
    };
    let (place, mut tap, from) = guest(
        &blade,
        Policy {
            limits,
            ..restricted(&["203.0.113.0/24"])
        },
    );
    // Three connections: to three addresses of the world's network, of which two are let at once.
    for last in 1..=3 {
        tap.send(&from.udp([203, 0, 113, last].into(), ECHO, "one of three"));
    }
    wait_for("the drop of the third", || {
        (blade.network.counters(place.slot).unwrap().limited.packets == 1).then_some(())
    });
    let slow = far_net::Limits {
        packets: 3,
        ..far_net::Limits::default()
    };
    blade
        .network
        .change(
            place.slot,
            Policy {
                limits: slow,
                ..restricted(&["203.0.113.0/24"])
            },
        )
        .unwrap();
    for _ in 0..40 {
        tap.send(&from.udp(WORLD, ECHO, "flood"));
    }
    wait_for("drops of the flood", || {
        (blade.network.counters(place.slot).unwrap().limited.packets > 20).then_some(())
    });
}

#[test]
fn open_reaches_public_addresses_and_none_reaches_nothing() {
    if lacks("open_reaches_public_addresses_and_none_reaches_nothing", &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let open = Policy {
        mode: Mode::Open,
        ..Policy::default()
    };
    let (place, mut tap, from) = guest(&blade, open);
    tap.send(&from.udp(ELSEWHERE, ECHO, "anywhere"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 anywhere");
    let frames = [from.udp(PRIVATE, ECHO, "private"), from.udp(METADATA, ECHO, "metadata")];
    is_refused(&blade, &place, &mut tap, &frames, |counters| counters.denied);
    blade
        .network
        .change(
            place.slot,
            Policy {
                egress: restricted(&["10.9.9.0/24"]).egress,
                ..place_policy(Mode::Open)
            },
        )
        .unwrap();
    tap.send(&from.udp(PRIVATE, ECHO, "named"));
    assert_eq!(
        tap.receive_echo("the echo of a private address that is named"),
        "192.0.2.2 named"
    );
    let before = blade.network.counters(place.slot).unwrap().denied.packets;
    blade
        .network
        .change(
            place.slot,
            Policy {
                egress: restricted(&["203.0.113.0/24"]).egress,
                ..place_policy(Mode::None)
            },
        )
        .unwrap();
    tap.send(&from.udp(WORLD, ECHO, "none"));
    wait_for("the drop", || {
        (blade.network.counters(place.slot).unwrap().denied.packets > before).then_some(())
    });
}

fn place_policy(mode: Mode) -> Policy {
    Policy {
        mode,
        ..Policy::default()
    }
}

#[test]
fn a_pinned_name_opens_its_address_and_rebinding_is_refused() {
    if lacks(
        "a_pinned_name_opens_its_address_and_rebinding_is_refused",
        &["ip", "nft"],
    ) {
        return;
    }
    let blade = Blade::new(Options::default());
    let mut policy = restricted(&["203.0.113.0/24"]);
    let name = "*.example.com".parse().unwrap();
    policy.egress.push(Rule {
        to: Destination::Name(name),
        protocol: Protocol::Udp,
        ports: ECHO..=ECHO,
    });
    let (place, mut tap, from) = guest(&blade, policy);
    is_refused(
        &blade,
        &place,
        &mut tap,
        &[from.udp(ELSEWHERE, ECHO, "not yet")],
        |counters| counters.denied,
    );
    let pin = |name: &str, address: std::net::Ipv4Addr| {
        let lifetime = std::time::Duration::from_secs(300);
        blade
            .network
            .pin(place.slot, &name.parse().unwrap(), address.into(), lifetime)
            .unwrap()
    };
    assert!(pin("api.example.com", ELSEWHERE) && pin("api.example.com", ELSEWHERE));
    assert!(!pin("example.org", ELSEWHERE), "no rule is for it");
    assert!(
        !pin("api.example.com", METADATA) && !pin("api.example.com", PRIVATE),
        "rebinding"
    );
    tap.send(&from.udp(ELSEWHERE, ECHO, "pinned"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 pinned");
    let listed = common::json(&blade.path(), "nft -j list map inet far pins4").to_string();
    assert!(
        listed.contains("198.51.100.1") && listed.contains("\"timeout\":600"),
        "{listed}"
    );
    assert!(
        !listed.contains("169.254.169.254") && !listed.contains("10.9.9.9"),
        "{listed}"
    );
    blade
        .network
        .change(place.slot, restricted(&["203.0.113.0/24"]))
        .unwrap();
    is_refused(
        &blade,
        &place,
        &mut tap,
        &[from.udp(ELSEWHERE, ECHO, "policy gone")],
        |counters| counters.denied,
    );
}

/// A port of the world that says nothing by itself.
const LATE: u16 = 7010;

#[test]
fn what_comes_late_for_a_dead_vm_does_not_reach_the_next_one_on_its_slot() {
    let name = "what_comes_late_for_a_dead_vm_does_not_reach_the_next_one_on_its_slot";
    if lacks(name, &["ip", "nft"]) {
        return;
    }
    let one_slot = Options {
        capacity: 1,
        ..Options::default()
    };
    let mut policy = restricted(&["203.0.113.0/24"]);
    policy.egress[0].ports = ECHO..=LATE;
    for is_detached in [true, false] {
        let blade = Blade::new(one_slot);
        let socket = blade
            .world
            .run_inside(|| UdpSocket::bind((WORLD, LATE)).unwrap())
            .unwrap();
        let again = blade.network.netns().unwrap();
        let again = again.run_inside(|| GuestNetns::current().unwrap()).unwrap();
        let (first, mut tap, from) = guest(&blade, policy.clone());
        tap.send(&from.udp(WORLD, LATE, "first"));
        let (_, peer) = socket.recv_from(&mut [0; 64]).unwrap();
        drop(tap);
        if is_detached {
            blade.network.detach(first.slot).unwrap();
        }
        // far-node ends here, and the next one counts policies from the start.
        let Blade { network, world } = blade;
        drop(network);
        let network = Network::open(again, one_slot).unwrap();
        let proven = Proven {
            live: Vec::new(),
            ours: BTreeSet::from([first.tap.clone()]),
        };
        network.reclaim(&proven).unwrap();
        let blade = Blade { network, world };
        let (second, mut tap, from) = guest(&blade, policy.clone());
        assert_eq!(second.slot, first.slot);
        socket.send_to(b"late", peer).unwrap();
        tap.send(&from.udp(WORLD, ECHO, "second"));
        let seen = tap.receive_echo("the echo");
        assert_eq!(seen, "192.0.2.2 second", "the first was detached: {is_detached}");
    }
}
