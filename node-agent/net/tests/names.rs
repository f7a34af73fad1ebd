//! A guest that asks the blade's DNS proxy, in namespaces of the test.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

mod common;

use common::{Blade, ECHO, ELSEWHERE, From, METADATA, Tap, WORLD, aim, json, lacks, wait_for};
use far_net::{Destination, GATEWAY, Mode, Network, Options, Policy, Protocol, Rule, Service, dns};
use hickory_proto::{
    op::{Message, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use nix::sys::socket::{setsockopt, sockopt};
use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::runtime::Runtime;

/// Says that every name has a public and a metadata address, and of slow.example.com nothing: only how often it was asked.
fn resolver() -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let slow = Arc::new(AtomicUsize::new(0));
    let asked_for_slow = slow.clone();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let asked = Message::from_vec(&buffer[..length]).unwrap();
            if asked.queries[0].name().to_ascii() == "slow.example.com." {
                asked_for_slow.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            let mut answer = Message::response(asked.metadata.id, OpCode::Query);
            answer.add_query(asked.queries[0].clone());
            for address in [ELSEWHERE, METADATA] {
                let name = asked.queries[0].name().clone();
                answer.add_answer(Record::from_rdata(name, 60, RData::A(A(address))));
            }
            socket.send_to(&answer.to_vec().unwrap(), from).unwrap();
        }
    });
    (address, slow)
}

fn policy() -> Policy {
    let rule = |to| Rule {
        to,
        protocol: Protocol::Udp,
        ports: ECHO..=ECHO,
    };
    Policy {
        mode: Mode::Restricted,
        egress: vec![
            rule(Destination::Cidr("203.0.113.0/24".parse().unwrap())),
            rule(Destination::Name("*.example.com".parse().unwrap())),
        ],
        services: vec![Service::DNS],
        ..Policy::default()
    }
}

/// The proxy, served until the runtime is shut down.
fn serve(network: &Arc<Network>, resolver: SocketAddr) -> Runtime {
    let inside = network.netns().unwrap();
    let socket = inside.run_inside(|| UdpSocket::bind((GATEWAY, 53)).unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    // So that no question of a flood is lost before the proxy sees it.
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
    let runtime = Runtime::new().unwrap();
    let served = network.clone();
    runtime.spawn(async move {
        let socket = Arc::new(tokio::net::UdpSocket::from_std(socket).unwrap());
        dns::serve(served, socket, resolver).await
    });
    runtime
}

fn ask(tap: &mut Tap, from: &From, name: &str) -> Message {
    tap.send(&from.udp(GATEWAY, 53, &question(name)));
    tap.receive("the proxy's answer", |frame| {
        let is_dns = frame.get(12..14)? == [8, 0] && frame.get(34..36)? == 53_u16.to_be_bytes();
        is_dns.then(|| Message::from_vec(&frame[42..]).unwrap())
    })
}

fn question(name: &str) -> String {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    // All bytes of such a question are ASCII, so it is a text too.
    String::from_utf8(message.to_vec().unwrap()).unwrap()
}

#[test]
fn a_guest_reaches_what_the_proxy_resolved_and_nothing_else() {
    if lacks(
        "a_guest_reaches_what_the_proxy_resolved_and_nothing_else",
        &["ip", "nft"],
    ) {
        return;
    }
    let blade = Blade::new(Options::default());
    let place = blade.network.attach(policy()).unwrap();
    let mut tap = blade.tap(&place);
    aim(&blade.path(), place.tap.as_str());
    let from = From::place(&place);
    let Blade { network, world: _world } = blade;
    let network = Arc::new(network);
    let runtime = serve(&network, resolver().0);
    let refused = ask(&mut tap, &from, "evil.example.org.");
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    tap.send(&from.udp(ELSEWHERE, ECHO, "before"));
    wait_for("the denial", || {
        (network.counters(place.slot).unwrap().denied.packets == 1).then_some(())
    });
    let told = ask(&mut tap, &from, "api.example.com.");
    let addresses: Vec<_> = told.answers.iter().map(|record| record.data.clone()).collect();
    assert_eq!(addresses, [RData::A(A(ELSEWHERE))], "the metadata address is taken out");
    // At once: the pin was acknowledged before the answer came.
    tap.send(&from.udp(ELSEWHERE, ECHO, "after"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 after");
    tap.send(&from.udp(METADATA, ECHO, "metadata"));
    wait_for("the denial", || {
        (network.counters(place.slot).unwrap().denied.packets == 2).then_some(())
    });
    tap.send(&from.udp(WORLD, ECHO, "listed"));
    assert_eq!(tap.receive_echo("the echo"), "192.0.2.2 listed");
    runtime.shutdown_background();
}

#[test]
fn a_guest_that_asks_for_slow_names_keeps_no_other_from_resolving() {
    let name = "a_guest_that_asks_for_slow_names_keeps_no_other_from_resolving";
    if lacks(name, &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let places = [(); 2].map(|()| blade.network.attach(policy()).unwrap());
    let [mut hostile, mut other] = places.each_ref().map(|place| blade.tap(place));
    let [from_hostile, from_other] = places.each_ref().map(From::place);
    let path = blade.path();
    let Blade { network, world: _world } = blade;
    let network = Arc::new(network);
    let (resolver, slow) = resolver();
    let runtime = serve(&network, resolver);
    aim(&path, places[0].tap.as_str());
    // More than wait at once, of one VM and of all.
    for _ in 0..1000 {
        hostile.send(&from_hostile.udp(GATEWAY, 53, &question("slow.example.com.")));
    }
    wait_for("the hostile guest's share", || {
        (slow.load(Ordering::SeqCst) >= 16).then_some(())
    });
    aim(&path, places[1].tap.as_str());
    let told = ask(&mut other, &from_other, "api.example.com.");
    assert_eq!(told.answers.len(), 1);
    runtime.shutdown_background();
}

#[test]
fn the_addresses_of_one_answer_are_pinned_together_and_again_for_a_longer_time() {
    let name = "the_addresses_of_one_answer_are_pinned_together_and_again_for_a_longer_time";
    if lacks(name, &["ip", "nft"]) {
        return;
    }
    let blade = Blade::new(Options::default());
    let place = blade.network.attach(policy()).unwrap();
    let pin = |name: &str, addresses: std::ops::Range<u8>, seconds: u64| {
        let addresses = addresses.map(|last| ([198, 51, 100, last].into(), Duration::from_secs(seconds)));
        // Twice the same in one answer is once.
        let addresses: Vec<_> = addresses.clone().chain(addresses).collect();
        let name = name.parse().unwrap();
        blade.network.pin_all(place.slot, &name, &addresses).unwrap()
    };
    let pinned = || nft_map(&blade.path(), "pins4");
    assert_eq!(pin("api.example.com", 0..64, 300), 64);
    assert_eq!(pinned().len(), 64);
    // Fresh: nothing is changed, and what is new is added.
    assert_eq!(pin("api.example.com", 32..96, 300), 64);
    let seen = pinned();
    assert!(seen.len() == 96 && seen.iter().all(|(_, comment)| comment == "api.example.com"));
    // Another name's is another pin, and so is one that the kernel let go.
    assert_eq!(pin("cdn.example.com", 0..2, 300), 2);
    let of_cdn = pinned()
        .iter()
        .filter(|(_, comment)| comment == "cdn.example.com")
        .count();
    assert_eq!(of_cdn, 2);
    assert_eq!(pin("example.org", 0..2, 300), 0, "no rule is for it");
    // One that would not last long enough is made anew, for the longer time.
    assert_eq!(pin("api.example.com", 95..96, 3600), 1);
    assert_eq!(nft_set_text(&blade.path()).matches("\"timeout\":7200").count(), 1);
    // The oldest go, and what is told is what there is.
    for third in 0..20 {
        let addresses: Vec<_> = (0..64_u8)
            .map(|last| ([198, 51, third, last].into(), Duration::from_secs(300)))
            .collect();
        blade
            .network
            .pin_all(place.slot, &"api.example.com".parse().unwrap(), &addresses)
            .unwrap();
    }
    assert_eq!(pinned().len(), 1024);
    assert_eq!(blade.network.pins(place.slot).unwrap().len(), 1024);
}

fn nft_set_text(netns: &std::path::Path) -> String {
    json(netns, "nft -j list map inet far pins4").to_string()
}

/// Addresses and comments of a map of pins, as `nft` lists them.
fn nft_map(netns: &std::path::Path, map: &str) -> Vec<(String, String)> {
    let listed = json(netns, &format!("nft -j list map inet far {map}"));
    let elements = listed["nftables"][1]["map"]["elem"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    elements
        .iter()
        .map(|element| {
            let element = &element[0]["elem"];
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            (text(&element["val"]["concat"][1]), text(&element["comment"]))
        })
        .collect()
}
