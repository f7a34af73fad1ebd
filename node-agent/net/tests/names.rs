//! A guest that asks the blade's DNS proxy, in namespaces of the test.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

mod common;

use common::{Blade, ECHO, ELSEWHERE, From, METADATA, WORLD, aim, lacks, wait_for};
use far_net::{Destination, GATEWAY, Mode, Options, Policy, Protocol, Rule, Service, dns};
use hickory_proto::{
    op::{Message, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use std::{net::UdpSocket, sync::Arc};

/// Says that every name has a public and a metadata address.
fn resolver() -> std::net::SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let asked = Message::from_vec(&buffer[..length]).unwrap();
            let mut answer = Message::response(asked.metadata.id, OpCode::Query);
            answer.add_query(asked.queries[0].clone());
            for address in [ELSEWHERE, METADATA] {
                let name = asked.queries[0].name().clone();
                answer.add_answer(Record::from_rdata(name, 60, RData::A(A(address))));
            }
            socket.send_to(&answer.to_vec().unwrap(), from).unwrap();
        }
    });
    address
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
    let world = "203.0.113.0/24".parse().unwrap();
    let rule = |to| Rule {
        to,
        protocol: Protocol::Udp,
        ports: ECHO..=ECHO,
    };
    let policy = Policy {
        mode: Mode::Restricted,
        egress: vec![
            rule(Destination::Cidr(world)),
            rule(Destination::Name("*.example.com".parse().unwrap())),
        ],
        services: vec![Service::DNS],
        ..Policy::default()
    };
    let place = blade.network.attach(policy).unwrap();
    let mut tap = blade.tap(&place);
    aim(&blade.path(), place.tap.as_str());
    let from = From::place(&place);
    let inside = blade.network.netns().unwrap();
    let socket = inside.run_inside(|| UdpSocket::bind((GATEWAY, 53)).unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let Blade { network, world: _world } = blade;
    let network = Arc::new(network);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (served, resolver) = (network.clone(), resolver());
    runtime.spawn(async move {
        let socket = Arc::new(tokio::net::UdpSocket::from_std(socket).unwrap());
        dns::serve(served, socket, resolver).await
    });
    let ask = |tap: &mut common::Tap, name: &str| {
        tap.send(&from.udp(GATEWAY, 53, &question(name)));
        tap.receive("the proxy's answer", |frame| {
            let is_dns = frame.get(12..14)? == [8, 0] && frame.get(34..36)? == 53_u16.to_be_bytes();
            is_dns.then(|| Message::from_vec(&frame[42..]).unwrap())
        })
    };
    let refused = ask(&mut tap, "evil.example.org.");
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    tap.send(&from.udp(ELSEWHERE, ECHO, "before"));
    wait_for("the denial", || {
        (network.counters(place.slot).unwrap().denied.packets == 1).then_some(())
    });
    let told = ask(&mut tap, "api.example.com.");
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
