//! Taps that others put on a bridge, one of them hostile, in namespaces of the test.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

mod common;

use common::{ECHO, From, METADATA, Tap, WORLD, aim, connect_world, ip, json, lacks, wait_for};
use far_net::{
    BridgeWatch, Destination, Guest, GuestNetns, Mode, Network, Options, Place, Policy, Protocol, Rule, Slot, TapEvent,
};
use std::time::Duration;

fn policy() -> Policy {
    let rule = Rule {
        to: Destination::Cidr("203.0.113.0/24".parse().unwrap()),
        protocol: Protocol::Udp,
        ports: ECHO..=ECHO,
    };
    Policy {
        mode: Mode::Restricted,
        egress: vec![rule],
        ..Policy::default()
    }
}

fn place(number: u16, name: &str) -> Place {
    let last = number.to_be_bytes()[1] + 2;
    let guest = Guest {
        mac: [2, 0, 0, 0, 1, last],
        address: [172, 30, 0, last].into(),
        address6: None,
    };
    Place::bridged(Slot::new(number).unwrap(), name.parse().unwrap(), guest)
}

#[test]
fn taps_on_a_bridge_are_isolated_when_they_appear_and_let_when_their_vm_is_known() {
    if lacks(
        "taps_on_a_bridge_are_isolated_when_they_appear_and_let_when_their_vm_is_known",
        &["ip", "nft", "bridge"],
    ) {
        return;
    }
    let host = GuestNetns::create().unwrap();
    let path = host.path();
    let _world = connect_world(&host);
    ip(&path, "link add br-fl type bridge");
    ip(&path, "addr add 172.30.0.1/24 dev br-fl");
    ip(&path, "link set br-fl up");
    host.run_inside(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap())
        .unwrap();
    let network = host
        .run_inside(|| Network::open_here(Options::default()))
        .unwrap()
        .unwrap();
    let mut watch = host
        .run_inside(|| BridgeWatch::open(&network, "br-fl".parse().unwrap()))
        .unwrap()
        .unwrap();
    assert_eq!(watch.next(Duration::from_millis(1)).unwrap(), []);
    // As Flintlock does it, and a name that is nobody's of ours.
    for name in ["fltapaaaaaaa", "fltapbbbbbbb", "vnet0"] {
        ip(&path, &format!("tuntap add dev {name} mode tap vnet_hdr"));
        ip(&path, &format!("link set {name} master br-fl up"));
    }
    let mut appeared = Vec::new();
    wait_for("both taps", || {
        appeared.extend(watch.next(Duration::from_millis(100)).unwrap());
        (appeared.len() == 2).then_some(())
    });
    let name = |text: &str| text.parse().unwrap();
    appeared.sort();
    assert_eq!(
        appeared,
        [
            TapEvent::Appeared(name("fltapaaaaaaa")),
            TapEvent::Appeared(name("fltapbbbbbbb"))
        ]
    );
    for (port, isolated) in [("fltapaaaaaaa", true), ("fltapbbbbbbb", true), ("vnet0", false)] {
        let seen = json(&path, &format!("bridge -j -d link show dev {port}"));
        assert_eq!(seen[0]["isolated"].as_bool(), Some(isolated), "{port}: {seen}");
    }
    let (good, bad) = (place(0, "fltapaaaaaaa"), place(1, "fltapbbbbbbb"));
    let (mut good_tap, mut bad_tap) = (
        Tap::attach(&host, good.tap.as_str()),
        Tap::attach(&host, bad.tap.as_str()),
    );
    let (from_good, from_bad) = (From::place(&good), From::place(&bad));
    // Before anything is known of it, a tap is mute, though it is up.
    good_tap.send(&from_good.arp(1, from_good.mac, [172, 30, 0, 1].into()));
    network.attach_bridged(good.clone(), policy()).unwrap();
    network.attach_bridged(bad.clone(), policy()).unwrap();
    let spoofed = || network.counters(bad.slot).unwrap().spoofed.packets;
    aim(&path, "br-fl");
    good_tap.send(&from_good.arp(1, from_good.mac, [172, 30, 0, 1].into()));
    let answer = |frame: &[u8]| (frame[12..14] == [8, 6] && frame[21] == 2).then_some(());
    good_tap.receive("the bridge's answer", answer);
    good_tap.send(&from_good.udp(WORLD, ECHO, "good"));
    assert_eq!(good_tap.receive_echo("the echo"), "192.0.2.2 good");
    // The hostile one: as the other's MAC and address, over ARP, tagged, as a router, and to the other directly.
    let as_good = From {
        address: good.guest.address,
        ..from_bad
    };
    let with_mac = From {
        mac: good.guest.mac,
        ..from_bad
    };
    let plain = from_bad.udp(WORLD, ECHO, "tagged");
    let tagged = [&plain[..12], &[0x81, 0, 0, 5], &plain[12..]].concat();
    let frames = [
        as_good.udp(WORLD, ECHO, "address"),
        with_mac.udp(WORLD, ECHO, "mac"),
        as_good.arp(2, from_bad.mac, [172, 30, 0, 1].into()),
        with_mac.arp(1, with_mac.mac, [172, 30, 0, 1].into()),
        tagged,
        from_bad.icmp6(
            "ff02::1".parse().unwrap(),
            &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
    ];
    for frame in &frames {
        bad_tap.send(frame);
    }
    wait_for("the drops", || (spoofed() == frames.len() as u64).then_some(()));
    let before = network.counters(bad.slot).unwrap().denied.packets;
    bad_tap.send(&from_bad.udp(METADATA, ECHO, "metadata"));
    bad_tap.send(&from_bad.udp([172, 30, 0, 1].into(), ECHO, "the blade"));
    wait_for("the denials", || {
        (network.counters(bad.slot).unwrap().denied.packets == before + 2).then_some(())
    });
    // Its honest question tells the blade where it is.
    bad_tap.send(&from_bad.arp(1, from_bad.mac, [172, 30, 0, 1].into()));
    bad_tap.receive("the bridge's answer", answer);
    // To the other guest's MAC: the bridge has learnt it and would deliver.
    let mut direct = from_bad.udp(good.guest.address, ECHO, "direct");
    direct[..6].copy_from_slice(&good.guest.mac);
    bad_tap.send(&direct);
    bad_tap.send(&from_bad.udp(WORLD, ECHO, "bad, but allowed"));
    assert_eq!(bad_tap.receive_echo("the echo"), "192.0.2.2 bad, but allowed");
    good_tap.send(&from_good.udp(WORLD, ECHO, "still good"));
    assert_eq!(
        good_tap.receive_echo("the first that the good one gets"),
        "192.0.2.2 still good"
    );
    drop(bad_tap);
    ip(&path, "link del fltapbbbbbbb");
    wait_for("the end of the tap", || {
        watch
            .next(Duration::from_millis(100))
            .unwrap()
            .contains(&TapEvent::Gone(name("fltapbbbbbbb")))
            .then_some(())
    });
    network.detach(bad.slot).unwrap();
    let left = common::json(&path, "nft -j list table bridge far").to_string();
    assert!(
        !left.contains("fltapbbbbbbb") && left.contains("fltapaaaaaaa"),
        "{left}"
    );
}
