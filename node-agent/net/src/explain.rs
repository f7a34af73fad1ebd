//! Which rule would let a packet through, and why not: the policy read as the tables read it. Pure.

use crate::{
    elements::opens,
    policy::{Destination, DnsName, Mode, Policy, Protocol, is_never, is_private},
    slot::Place,
};
use std::{collections::BTreeMap, fmt, net::IpAddr};

/// A packet that a guest might send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// MAC of the frame.
    pub mac: [u8; 6],
    /// As the guest writes it.
    pub source: IpAddr,
    /// Where to.
    pub destination: IpAddr,
    /// IP protocol number: 6 TCP, 17 UDP, 1 ICMP, 58 ICMPv6.
    pub protocol: u8,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
}

/// What would become of it, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Whether it passes.
    pub passes: bool,
    /// The rule that decides, as the spec names it.
    pub rule: String,
    /// What was looked at before, in order, and why it did not decide.
    pub passed_over: Vec<String>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.passed_over {
            writeln!(f, "  - {line}")?;
        }
        write!(f, "{}: {}", if self.passes { "PASSES" } else { "DROPPED" }, self.rule)
    }
}

/// Addresses that names resolved to, with the names.
pub type Pinned = BTreeMap<IpAddr, DnsName>;

/// Reads the policy for one packet. `blade` are the blade's addresses in the guests' namespace.
/// Limits depend on what came before and are not looked at.
#[must_use]
pub fn explain(place: &Place, policy: &Policy, pinned: &Pinned, blade: &[IpAddr], packet: &Packet) -> Explanation {
    let mut passed_over = Vec::new();
    let end = |passes, rule: String, over: &mut Vec<String>| Explanation {
        passes,
        rule,
        passed_over: std::mem::take(over),
    };
    let is_own = match packet.source {
        IpAddr::V4(source) => source == place.guest.address,
        IpAddr::V6(source) => {
            place.guest.address6 == Some(source)
                || (place.guest.address6.is_some() && place.guest.link_local() == source)
        }
    };
    if packet.mac != place.guest.mac || !is_own {
        let rule = format!("anti-spoof: {} may only send from its own MAC and addresses", place.tap);
        return end(false, rule, &mut passed_over);
    }
    passed_over.push(format!("anti-spoof: the source is that of {}", place.tap));
    if blade.contains(&packet.destination) {
        let service = policy.services.iter().find(|service| {
            (service.is_tcp, service.port) == (packet.protocol == 6, packet.port) && matches!(packet.protocol, 6 | 17)
        });
        return match service {
            Some(_) if policy.mode != Mode::None => end(
                true,
                format!("network.services: port {} of the blade", packet.port),
                &mut passed_over,
            ),
            _ => end(
                false,
                "the blade: this service is not among the spec's".to_owned(),
                &mut passed_over,
            ),
        };
    }
    if is_never(packet.destination) {
        let rule = format!(
            "{} is never reachable: other guests, metadata, link-local, multicast",
            packet.destination
        );
        return end(false, rule, &mut passed_over);
    }
    if policy.mode == Mode::None {
        return end(false, "network.mode is None".to_owned(), &mut passed_over);
    }
    for (number, rule) in policy.egress.iter().enumerate() {
        let over = match &rule.to {
            Destination::Cidr(cidr) if !cidr.contains(packet.destination) => {
                Some(format!("{} is not in {cidr}", packet.destination))
            }
            Destination::Cidr(cidr) if !opens(cidr, packet.destination) => Some(format!(
                "{} is private, and {cidr} is wider than the private range",
                packet.destination
            )),
            Destination::Cidr(_) => None,
            Destination::Name(pattern) => match pinned.get(&packet.destination) {
                Some(name) if pattern.covers(name) => None,
                Some(name) => Some(format!("{} was resolved for {name}", packet.destination)),
                None => Some(format!(
                    "{} was not resolved by the blade for {pattern}",
                    packet.destination
                )),
            },
        };
        let over = over.or_else(|| {
            let fits = match rule.protocol {
                Protocol::Any => return None,
                Protocol::Icmp => return (!matches!(packet.protocol, 1 | 58)).then(|| "it is not ICMP".to_owned()),
                Protocol::Tcp => packet.protocol == 6,
                Protocol::Udp => packet.protocol == 17,
            };
            match (fits, rule.ports.contains(&packet.port)) {
                (false, _) => Some(format!("protocol {} is not {:?}", packet.protocol, rule.protocol)),
                (true, false) => Some(format!("port {} is not in {:?}", packet.port, rule.ports)),
                (true, true) => None,
            }
        });
        match over {
            None => return end(true, policy.name_of_rule(number), &mut passed_over),
            Some(why) => passed_over.push(format!("{}: {why}", policy.name_of_rule(number))),
        }
    }
    match policy.mode {
        Mode::Open if !is_private(packet.destination) => end(true, "network.mode is Open".to_owned(), &mut passed_over),
        Mode::Open => end(
            false,
            "private ranges need a rule that names them".to_owned(),
            &mut passed_over,
        ),
        Mode::Restricted | Mode::None => end(false, "no rule lets it: default deny".to_owned(), &mut passed_over),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        elements::{gate, identity, permissions, pins as pins_of},
        nft::Element,
        policy::{Cidr, Rule, Service},
        slot::Slot,
        table::shard_of,
    };
    use proptest::prelude::*;
    use std::{net::Ipv4Addr, time::Duration};

    /// Looks a key up in a tree of intervals as the kernel does.
    fn interval_value(elements: &[Element], key: &[u8]) -> Option<Option<Vec<u8>>> {
        let mut sorted: Vec<_> = elements.iter().collect();
        sorted.sort_by(|one, other| (&one.key, !one.is_end).cmp(&(&other.key, !other.is_end)));
        let below = sorted.into_iter().rev().find(|element| element.key.as_slice() <= key)?;
        (!below.is_end).then(|| below.data.clone())
    }

    /// What the kernel would do with the elements that are compiled for the VM, for a packet to a public or private address.
    fn by_elements(place: &Place, policy: &Policy, pins: &Pinned, packet: &Packet) -> bool {
        let all: Vec<_> = [identity(place), permissions(place, policy, 3), gate(place, 3)].concat();
        let of = |set: &str| -> Vec<Element> {
            all.iter()
                .filter(|(_, name, _)| *name == set)
                .flat_map(|(_, _, of)| of.clone())
                .collect()
        };
        let mark = crate::elements::mark(place, 3).to_ne_bytes();
        let IpAddr::V4(to) = packet.destination else {
            return false;
        };
        let key = [&mark[..], &to.octets()].concat();
        let ports = |class: Vec<u8>| {
            let port = packet.port.to_be_bytes();
            let key = [&class[..], &[packet.protocol, 0, 0, 0], &port, &[0, 0]].concat();
            interval_value(&of(shard_of(place.slot).ports), &key).is_some()
        };
        let pinned: Vec<Element> = pins
            .iter()
            .flat_map(|(address, name)| pins_of(place, policy, 3, name, std::iter::once(&(*address, Duration::ZERO))))
            .map(|(_, element)| element)
            .collect();
        let by_name = pinned
            .iter()
            .find(|element| element.key == key)
            .and_then(|element| element.data.clone());
        let by_cidr = interval_value(&of(shard_of(place.slot).egress4), &key).flatten();
        let is_open = !of("open").is_empty() && !is_private(packet.destination);
        !is_never(packet.destination) && (by_name.is_some_and(ports) || by_cidr.is_some_and(ports) || is_open)
    }

    fn address() -> impl Strategy<Value = Ipv4Addr> {
        // Few networks, so that packets meet rules and borders.
        prop_oneof![
            (0_u8..4, 0_u8..3).prop_map(|(c, d)| Ipv4Addr::new(203, 0, c, d * 127)),
            (0_u8..3).prop_map(|d| Ipv4Addr::new(10, 0, 0, d)),
            Just(Ipv4Addr::new(9, 255, 255, 255)),
            Just(Ipv4Addr::new(11, 0, 0, 0)),
            Just(Ipv4Addr::new(169, 254, 169, 254)),
            Just(Ipv4Addr::new(255, 255, 255, 255)),
            any::<u32>().prop_map(Ipv4Addr::from_bits),
        ]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let cidr = (address(), 0_u8..=32).prop_map(|(address, length)| {
            let kept = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            let text = format!("{}/{length}", Ipv4Addr::from_bits(address.to_bits() & kept));
            Destination::Cidr(text.parse::<Cidr>().unwrap())
        });
        let name = prop_oneof![
            Just("*.example.com"),
            Just("*.b.example.com"),
            Just("a.b.example.com"),
            Just("x.org")
        ];
        let name = name.prop_map(|name| Destination::Name(name.parse().unwrap()));
        let protocol = prop_oneof![
            Just(Protocol::Any),
            Just(Protocol::Tcp),
            Just(Protocol::Udp),
            Just(Protocol::Icmp)
        ];
        let ports = prop_oneof![
            Just(0..=u16::MAX),
            Just(443..=443),
            Just(80..=442),
            Just(444..=444),
            Just(65535..=65535)
        ];
        (prop_oneof![3 => cidr, 1 => name], protocol, ports).prop_map(|(to, protocol, ports)| Rule {
            to,
            protocol,
            ports,
        })
    }

    proptest! {
        #[test]
        fn the_explanation_is_what_the_kernel_would_do_with_the_elements(
            mode in prop_oneof![Just(Mode::None), Just(Mode::Restricted), Just(Mode::Open)],
            egress in prop::collection::vec(rule(), 0..12),
            to in address(),
            pinned in prop::collection::vec((address(), prop_oneof![Just("a.b.example.com"), Just("c.example.com"), Just("x.org")]), 0..4),
            protocol in prop_oneof![Just(6_u8), Just(17), Just(1), Just(47)],
            port in prop_oneof![Just(0_u16), Just(80), Just(443), Just(444), Just(65535)],
        ) {
            let place = Place::routed(Slot::new(5).unwrap(), true);
            let policy = Policy { mode, egress, ..Policy::default() };
            // The proxy pins none that it refuses.
            let pinned: Pinned = pinned.into_iter()
                .filter(|(address, _)| !is_never((*address).into()) && !is_private((*address).into()))
                .map(|(address, name)| (address.into(), name.parse().unwrap()))
                .collect();
            let packet = Packet {
                mac: place.guest.mac,
                source: place.guest.address.into(),
                destination: to.into(),
                protocol,
                port,
            };
            let told = explain(&place, &policy, &pinned, &[], &packet);
            prop_assert_eq!(told.passes, by_elements(&place, &policy, &pinned, &packet), "{}", told);
        }
    }

    #[test]
    fn the_words_say_which_rule_and_why_the_others_do_not() {
        let place = Place::routed(Slot::new(5).unwrap(), true);
        let rule = |network: &str, port: u16| Rule {
            to: Destination::Cidr(network.parse().unwrap()),
            protocol: Protocol::Tcp,
            ports: port..=port,
        };
        let policy = Policy {
            mode: Mode::Restricted,
            egress: vec![rule("203.0.113.0/24", 80), rule("0.0.0.0/0", 443)],
            services: vec![Service::DNS],
            ..Policy::default()
        };
        let packet = Packet {
            mac: place.guest.mac,
            source: place.guest.address.into(),
            destination: "203.0.113.9".parse().unwrap(),
            protocol: 6,
            port: 443,
        };
        let blade = [IpAddr::V4(crate::GATEWAY)];
        let told = |packet| explain(&place, &policy, &Pinned::new(), &blade, &packet).to_string();
        assert_eq!(
            told(packet),
            "  - anti-spoof: the source is that of fa5\n  - network.egress[0]: port 443 is not in 80..=80\nPASSES: network.egress[1]"
        );
        let private = Packet {
            destination: "10.0.0.1".parse().unwrap(),
            ..packet
        };
        assert!(told(private).contains("[1]: 10.0.0.1 is private") && told(private).contains("DROPPED: no rule"));
        let dns = Packet {
            destination: blade[0],
            protocol: 17,
            port: 53,
            ..packet
        };
        assert!(told(dns).ends_with("PASSES: network.services: port 53 of the blade"));
        assert!(told(Packet { mac: [0; 6], ..packet }).starts_with("DROPPED: anti-spoof"));
    }
}
