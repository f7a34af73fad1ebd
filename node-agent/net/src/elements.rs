//! From a VM's place and policy to the elements that the kernel gets. Pure.
//!
//! A VM's marks are `(slot + 1) << 16 | generation << 8 | number`. Number 0xfa marks its packets; the others name classes of
//! protocols and ports, which addresses map to. A new policy has a new generation, so that the old one's elements and
//! connections go without a moment in which neither holds.

use crate::{
    nft::{Element, Table, expression::Expression},
    policy::{Destination, Limits, Mode, Policy, Protocol, Rule, is_never, is_private},
    slot::{Place, Slot, Wiring},
    table::{ARP, BRIDGE, INET, MARK_BYTE, NEVER4, NEVER6, PRIVATE4, PRIVATE6, interval, name_key, shard_of},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::RangeInclusive,
    time::Duration,
};

/// Elements with the sets that they are in, in the order in which they are added.
pub(crate) type Elements = Vec<(Table, &'static str, Vec<Element>)>;

/// Mark of a VM's packets under the policy of this generation.
pub(crate) fn mark(place: &Place, generation: u8) -> u32 {
    class(place.slot, generation, MARK_BYTE)
}

/// Mark without generation.
pub(crate) fn lasting_mark(place: &Place) -> u32 {
    mark_of_slot(place.slot)
}

/// The same.
pub(crate) fn mark_of_slot(slot: Slot) -> u32 {
    class(slot, 0, MARK_BYTE)
}

fn class(slot: Slot, generation: u8, number: u8) -> u32 {
    (u32::from(slot.number()) + 1) << 16 | u32::from(generation) << 8 | u32::from(number)
}

fn key(parts: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::new();
    for part in parts {
        key.extend_from_slice(part);
        key.resize(key.len().next_multiple_of(4), 0);
    }
    key
}

/// What says who the VM is. Stays as long as it is on its slot.
pub(crate) fn identity(place: &Place) -> Elements {
    let name = name_key(place.tap.as_str());
    let sender =
        |address: std::net::Ipv4Addr| Element::of(key(&[&name, &place.guest.mac, &place.guest.mac, &address.octets()]));
    let source4 = Element::of(key(&[&name, &place.guest.mac, &place.guest.address.octets()]));
    let sixes: Vec<_> = place
        .guest
        .address6
        .into_iter()
        .flat_map(|six| [six, place.guest.link_local()])
        .collect();
    let source6 = sixes
        .iter()
        .map(|six| Element::of(key(&[&name, &place.guest.mac, &six.octets()])));
    let source6: Vec<_> = source6.collect();
    let neighbor6: Vec<_> = sixes
        .iter()
        .map(|six| Element::of(key(&[&name, &six.octets()])))
        .collect();
    let lasting = lasting_mark(place).to_ne_bytes().to_vec();
    let counter = |key: Vec<u8>| vec![Element::running(key, Expression::Counter { packets: 0, bytes: 0 })];
    let mut elements = vec![];
    for counted in ["sent", "limited", "denied"] {
        elements.push((INET, counted, counter(lasting.clone())));
    }
    let table = match place.wiring {
        Wiring::Routed => INET,
        Wiring::Bridged => BRIDGE,
    };
    for counted in ["received", "spoofed"] {
        elements.push((table, counted, counter(name.clone())));
    }
    match place.wiring {
        Wiring::Routed => {
            elements.push((ARP, "sender", vec![sender(place.guest.address)]));
            elements.push((INET, "neighbor6", neighbor6));
            if place.guest.address != place.address {
                let inward = Element::with_data(name.clone(), place.address.octets().to_vec());
                let outward = Element::with_data(name.clone(), place.guest.address.octets().to_vec());
                elements.push((INET, "inward4", vec![inward]));
                elements.push((INET, "outward4", vec![outward]));
            }
            if let (Some(guest), Some(slot)) = (place.guest.address6, place.address6)
                && guest != slot
            {
                let of = |from: std::net::Ipv6Addr, to: std::net::Ipv6Addr| {
                    vec![Element::with_data(key(&[&name, &from.octets()]), to.octets().to_vec())]
                };
                elements.push((INET, "inward6", of(guest, slot)));
                elements.push((INET, "outward6", of(slot, guest)));
            }
            elements.push((INET, "source6", source6));
            elements.push((INET, "source4", vec![source4]));
        }
        Wiring::Bridged => {
            elements.push((BRIDGE, "neighbor6", neighbor6));
            elements.push((BRIDGE, "sender", vec![sender(place.guest.address)]));
            elements.push((BRIDGE, "source6", source6));
            elements.push((BRIDGE, "source4", vec![source4]));
        }
    }
    elements.retain(|(_, _, of)| !of.is_empty());
    elements
}

/// The element that puts a policy into force: without it a VM's packets have no mark and go nowhere.
pub(crate) fn gate(place: &Place, generation: u8) -> Elements {
    let data = mark(place, generation).to_ne_bytes().to_vec();
    let element = vec![Element::with_data(name_key(place.tap.as_str()), data)];
    match place.wiring {
        Wiring::Routed => vec![(INET, "vm", element)],
        Wiring::Bridged => vec![(BRIDGE, "vm", element)],
    }
}

/// How much a VM may do. Of its slot, not of a policy's generation: a change of policy gives no new burst.
pub(crate) fn limits(place: &Place, limits: &Limits) -> Elements {
    let key = lasting_mark(place).to_ne_bytes().to_vec();
    let over = |rate: u32| Expression::Limit {
        rate: rate.into(),
        burst: rate,
        is_over: true,
    };
    let connections = Expression::ConnectionsOver {
        count: limits.connections,
    };
    vec![
        (
            INET,
            "packets_over",
            vec![Element::running(key.clone(), over(limits.packets))],
        ),
        (
            INET,
            "connects_over",
            vec![Element::running(key.clone(), over(limits.connects))],
        ),
        (INET, "connections_over", vec![Element::running(key, connections)]),
    ]
}

/// What the policy of this generation lets.
pub(crate) fn permissions(place: &Place, policy: &Policy, generation: u8) -> Elements {
    let mark = mark(place, generation).to_ne_bytes();
    let mut elements = Vec::new();
    if policy.mode == Mode::None {
        return elements;
    }
    let services: BTreeSet<_> = policy.services.iter().copied().collect();
    let services = services.iter().map(|service| {
        let protocol = if service.is_tcp { 6 } else { 17 };
        Element::of(key(&[&mark, &[protocol], &service.port.to_be_bytes()]))
    });
    elements.push((INET, "services", services.collect()));
    let classes = Classes::of(policy);
    let ports = classes.numbers.iter().flat_map(|(ports, number)| {
        let class = class(place.slot, generation, *number).to_ne_bytes();
        ports.intervals().into_iter().flat_map(move |(first, last)| {
            let key = |(protocol, port): (u8, u16)| key(&[&class, &[protocol], &port.to_be_bytes()]);
            interval(key(first), key(last), None)
        })
    });
    let shard = shard_of(place.slot);
    elements.push((INET, shard.ports, ports.collect()));
    for (set, is_ipv4, pieces) in [
        (shard.egress4, true, &classes.pieces4),
        (shard.egress6, false, &classes.pieces6),
    ] {
        let of = pieces.iter().flat_map(|(range, ports)| {
            let address = |number: u128| {
                let bytes = number.to_be_bytes();
                if is_ipv4 { bytes[12..].to_vec() } else { bytes.to_vec() }
            };
            let class = class(place.slot, generation, classes.numbers[ports])
                .to_ne_bytes()
                .to_vec();
            interval(
                key(&[&mark, &address(*range.start())]),
                key(&[&mark, &address(*range.end())]),
                Some(class),
            )
        });
        elements.push((INET, set, of.collect()));
    }
    if policy.mode == Mode::Open {
        elements.push((INET, "open", vec![Element::of(mark.to_vec())]));
    }
    elements.push((INET, "live", vec![Element::of(mark.to_vec())]));
    elements.retain(|(_, _, of)| !of.is_empty());
    elements
}

/// The elements that pin resolved addresses, each for twice its time, with their sets of [`INET`]; none if no rule is for the name.
pub(crate) fn pins<'a>(
    place: &Place,
    policy: &Policy,
    generation: u8,
    name: &crate::policy::DnsName,
    addresses: impl Iterator<Item = &'a (IpAddr, Duration)>,
) -> Vec<(&'static str, Element)> {
    let ports = Ports::of(policy.rules_for_name(name));
    let Some(number) = Classes::of(policy).numbers.get(&ports).copied() else {
        return Vec::new();
    };
    let mark = mark(place, generation).to_ne_bytes();
    let data = class(place.slot, generation, number).to_ne_bytes();
    let pin = |(address, lifetime): &(IpAddr, Duration)| {
        let (set, key) = match address {
            IpAddr::V4(address) => ("pins4", key(&[&mark, &address.octets()])),
            IpAddr::V6(address) => ("pins6", key(&[&mark, &address.octets()])),
        };
        let element = Element {
            timeout: Some(u64::try_from(lifetime.as_millis().saturating_mul(2)).unwrap_or(u64::MAX)),
            comment: Some(name.as_str().to_owned()),
            ..Element::with_data(key, data.to_vec())
        };
        (set, element)
    };
    addresses.map(pin).collect()
}

/// Protocols with their ports, in the least number of ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Ports(BTreeMap<u8, Vec<(u16, u16)>>);

impl Ports {
    /// Of several rules together.
    fn of<'a>(rules: impl Iterator<Item = &'a Rule>) -> Self {
        let mut all: BTreeMap<u8, Vec<(u16, u16)>> = BTreeMap::new();
        for rule in rules {
            let ports = (*rule.ports.start(), *rule.ports.end());
            let every = (0, u16::MAX);
            match rule.protocol {
                Protocol::Any => {
                    let protocols = 0..=u8::MAX;
                    return Self(protocols.map(|protocol| (protocol, vec![every])).collect());
                }
                Protocol::Tcp => all.entry(6).or_default().push(ports),
                Protocol::Udp => all.entry(17).or_default().push(ports),
                Protocol::Icmp => {
                    all.entry(1).or_default().push(every);
                    all.entry(58).or_default().push(every);
                }
            }
        }
        for ranges in all.values_mut() {
            ranges.sort_unstable();
            let mut merged: Vec<(u16, u16)> = Vec::new();
            for &(first, last) in &*ranges {
                match merged.last_mut() {
                    Some(before) if u32::from(first) <= u32::from(before.1) + 1 => before.1 = before.1.max(last),
                    _ => merged.push((first, last)),
                }
            }
            *ranges = merged;
        }
        Self(all)
    }

    /// First and last protocol and port, in order; one for all protocols.
    fn intervals(&self) -> Vec<((u8, u16), (u8, u16))> {
        if self.0.len() == 256 {
            return vec![((0, 0), (u8::MAX, u16::MAX))];
        }
        let of = self.0.iter().flat_map(|(&protocol, ranges)| {
            ranges
                .iter()
                .map(move |&(first, last)| ((protocol, first), (protocol, last)))
        });
        of.collect()
    }
}

/// A policy's addresses cut into pieces that have the same ports each, and numbers for the different ports.
#[derive(Debug)]
struct Classes {
    pieces4: Vec<(RangeInclusive<u128>, Ports)>,
    pieces6: Vec<(RangeInclusive<u128>, Ports)>,
    numbers: BTreeMap<Ports, u8>,
}

impl Classes {
    fn of(policy: &Policy) -> Self {
        let (pieces4, pieces6) = (pieces(policy, true), pieces(policy, false));
        let mut all: BTreeSet<Ports> = pieces4.iter().chain(&pieces6).map(|(_, ports)| ports.clone()).collect();
        let names: Vec<_> = policy
            .egress
            .iter()
            .filter_map(|rule| match &rule.to {
                Destination::Name(name) => Some(name),
                Destination::Cidr(_) => None,
            })
            .collect();
        // What a resolved name gets depends on which patterns cover it: a pattern's own rules, with those of wider ones.
        for name in &names {
            let covering = policy.egress.iter().filter(
                |rule| matches!(&rule.to, Destination::Name(pattern) if pattern == *name || pattern.covers(name) ),
            );
            all.insert(Ports::of(covering));
        }
        let numbers = all.into_iter().zip(1..MARK_BYTE).collect();
        Self {
            pieces4,
            pieces6,
            numbers,
        }
    }
}

fn pieces(policy: &Policy, is_ipv4: bool) -> Vec<(RangeInclusive<u128>, Ports)> {
    let rules: Vec<(RangeInclusive<u128>, &Rule)> = policy
        .egress
        .iter()
        .filter_map(|rule| match &rule.to {
            Destination::Cidr(cidr) if cidr.is_ipv4() == is_ipv4 => Some((cidr.range(), rule)),
            Destination::Cidr(_) | Destination::Name(_) => None,
        })
        .collect();
    let last = if is_ipv4 { u128::from(u32::MAX) } else { u128::MAX };
    let closed = closed_ranges(is_ipv4);
    // Every address at which something may change.
    let mut starts = BTreeSet::from([0]);
    let edges = rules
        .iter()
        .map(|(range, _)| range)
        .chain(closed.iter().map(|(range, _)| range));
    for range in edges {
        starts.insert(*range.start());
        if *range.end() < last {
            starts.insert(range.end() + 1);
        }
    }
    let starts: Vec<u128> = starts.into_iter().collect();
    let mut pieces: Vec<(RangeInclusive<u128>, Ports)> = Vec::new();
    for (place, &start) in starts.iter().enumerate() {
        let end = starts.get(place + 1).map_or(last, |next| next - 1);
        let closing = closed.iter().find(|(range, _)| range.contains(&start));
        let letting = rules.iter().filter(|(range, _)| {
            range.contains(&start)
                && match closing {
                    None => true,
                    Some((_, true)) => false,
                    // Private: only a rule for a part of the very range names it.
                    Some((private, false)) => private.contains(range.start()) && private.contains(range.end()),
                }
        });
        let ports = Ports::of(letting.map(|(_, rule)| *rule));
        if ports.0.is_empty() {
            continue;
        }
        match pieces.last_mut() {
            Some((range, before)) if *before == ports && range.end() + 1 == start => *range = *range.start()..=end,
            _ => pieces.push((start..=end, ports)),
        }
    }
    pieces
}

/// Ranges that are closed, and whether no rule opens them.
fn closed_ranges(is_ipv4: bool) -> Vec<(RangeInclusive<u128>, bool)> {
    let of4 = |ranges: &[([u8; 4], [u8; 4])], is_never: bool| -> Vec<_> {
        let number = |bytes: [u8; 4]| u128::from(u32::from_be_bytes(bytes));
        ranges
            .iter()
            .map(|&(first, last)| (number(first)..=number(last), is_never))
            .collect()
    };
    let of6 = |ranges: &[(u128, u128)], is_never: bool| -> Vec<_> {
        ranges.iter().map(|&(first, last)| (first..=last, is_never)).collect()
    };
    if is_ipv4 {
        [of4(NEVER4, true), of4(PRIVATE4, false)].concat()
    } else {
        [of6(NEVER6, true), of6(PRIVATE6, false)].concat()
    }
}

/// Whether a CIDR rule may let to an address: a wide network does not open private ranges in it, and none opens the
/// never ones.
pub(crate) fn opens(rule: &crate::policy::Cidr, address: IpAddr) -> bool {
    if !rule.contains(address) || is_never(address) {
        return false;
    }
    let range = rule.range();
    !is_private(address)
        || closed_ranges(address.is_ipv4())
            .iter()
            .any(|(private, is_never)| !is_never && private.contains(range.start()) && private.contains(range.end()))
}
