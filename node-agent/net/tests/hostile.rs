//! What a hostile guest sends on its tap, and what comes of it, in namespaces of the test.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

mod common;

use common::{Blade, ECHO, ELSEWHERE, From, METADATA, PRIVATE, Tap, WORLD, WORLD6, aim, lacks, wait_for};
use far_net::{Count, Counters, Destination, Mode, Options, Place, Policy, Protocol, Rule};

pub(crate) fn restricted(networks: &[&str]) -> Policy {
    let rule = |network: &&str| Rule {
        to: Destination::Cidr(network.parse().unwrap()),
        protocol: Protocol::Udp,
        ports: ECHO..=ECHO,
    };
    Policy { mode: Mode::Restricted, egress: networks.iter().map(rule).collect(), ..Policy::default() }
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
    let mac = From { mac: [2, 0, 0, 0, 0, 9], ..from };
    let ipv4 = From { address: [169, 254, 77, 3].into(), ..from };
    let slots_own = From { address: place.address, ..from };
    let ipv6 = From { address6: "2a00:ffff::2".parse().unwrap(), ..from };
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
    if lacks("the_world_beyond_the_list_metadata_private_ranges_guests_and_the_blade_are_denied", &["ip", "nft"]) {
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
    assert_eq!(other_tap.receive_echo("the first that the other guest gets"), "192.0.2.2 other");
}
