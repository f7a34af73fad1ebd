//! The static tables of a blade: all chains and rules, and the sets that VMs have elements in. Nothing here is per VM.
//!
//! ```text
//! tap ─ arp far / input          sender (interface, MACs, address) must be the VM's
//! tap ─ inet far / from_guest    source must be the VM's; mark; packet rate; count; guest's address -> slot's address
//!         ├ to_host              the blade's services that the VM may use
//!         └ forward / egress     never-list, connection limits, pinned names, allow list (lists_N), open; else denied
//!              └ nat             masquerade
//! uplink ─ forward / to_guest    answers only ─ deliver: count; slot's address -> guest's address
//! bridge port ─ bridge far       the same checks on the port, then marked for inet far; nothing is bridged to a port
//! ```
//!
//! Invariant: what is not in a set is dropped. A tap without elements passes nothing, so a rule that is late closes,
//! never opens.
//!
//! Rules run in raw priority, before connection tracking: a spoofed packet makes no connection. Fragments are put
//! together before that (defragmentation is at -400), so every rule sees ports.

mod chains;

use crate::{
    nft::{
        Batch, Element, Family, INTERVAL, MAP, SetKind, TIMEOUT, Table,
        datatype::{ETHER, IFNAME, IPV4, IPV6, MARK, PORT, PROTOCOL, VERDICT},
    },
    slot::Slot,
};
use std::sync::LazyLock;

/// Policy of routed taps, and of bridged ones above the link.
pub(crate) const INET: Table = Table {
    family: Family::Inet,
    name: "far",
};
/// Who may say what over ARP on routed taps.
pub(crate) const ARP: Table = Table {
    family: Family::Arp,
    name: "far",
};
/// What bridge ports may send.
pub(crate) const BRIDGE: Table = Table {
    family: Family::Bridge,
    name: "far",
};

/// Comment of `inet far`: tables of another version are made anew.
pub(crate) const LAYOUT: &str = "far-net layout 2";

/// Names of taps that FAR makes begin so: in the guests' namespace every such link is a guest's.
pub(crate) const ROUTED_PREFIX: &str = "fa";
/// Names of taps that Flintlock makes.
pub(crate) const BRIDGED_PREFIX: &str = "fltap";
/// Low byte of a packet's mark that says: from a guest. Above it are the policy's generation and the slot.
pub(crate) const MARK_BYTE: u8 = 0xfa;
/// Where the mark has the generation: masked out for what outlives a change of policy.
pub(crate) const LASTING: u32 = 0xffff_00ff;
/// A lasting mark that no slot has.
pub(crate) const MARK_OF_NOBODY: u32 = 0xffff_0000 | MARK_BYTE as u32;

/// Before connection tracking (-200), after defragmentation (-400).
const RAW: i32 = -300;
const FILTER: i32 = 0;
/// NF_IP_PRI_NAT_SRC.
const SOURCE_NAT: i32 = 100;
/// After source NAT.
const LATE: i32 = 300;

const fn set(name: &'static str, key: &'static [u32]) -> SetKind {
    SetKind {
        name,
        key,
        data: None,
        flags: 0,
    }
}

const fn map(name: &'static str, key: &'static [u32], data: (u32, u32)) -> SetKind {
    SetKind {
        name,
        key,
        data: Some(data),
        flags: MAP,
    }
}

const fn intervals(of: SetKind) -> SetKind {
    SetKind {
        flags: of.flags | INTERVAL,
        ..of
    }
}

const fn timed(of: SetKind) -> SetKind {
    SetKind {
        flags: of.flags | TIMEOUT,
        ..of
    }
}

/// Sets of `inet far`, then of the others, without the shards'.
const SETS: &[(Table, SetKind)] = &[
    (INET, map("vm", &[IFNAME], (MARK, 4))),
    (INET, set("source4", &[IFNAME, ETHER, IPV4])),
    (INET, set("source6", &[IFNAME, ETHER, IPV6])),
    (INET, set("neighbor6", &[IFNAME, IPV6])),
    (INET, map("inward4", &[IFNAME], (IPV4, 4))),
    (INET, map("inward6", &[IFNAME, IPV6], (IPV6, 16))),
    (INET, map("outward4", &[IFNAME], (IPV4, 4))),
    (INET, map("outward6", &[IFNAME, IPV6], (IPV6, 16))),
    (INET, set("bridges", &[IFNAME])),
    (INET, intervals(set("never4", &[IPV4]))),
    (INET, intervals(set("never6", &[IPV6]))),
    (INET, intervals(set("private4", &[IPV4]))),
    (INET, intervals(set("private6", &[IPV6]))),
    (INET, timed(map("pins4", &[MARK, IPV4], (MARK, 4)))),
    (INET, timed(map("pins6", &[MARK, IPV6], (MARK, 4)))),
    (INET, map(SHARD_MAP, &[MARK], (VERDICT, 0))),
    (INET, set("open", &[MARK])),
    (INET, set("live", &[MARK])),
    (INET, set("services", &[MARK, PROTOCOL, PORT])),
    (INET, set("packets_over", &[MARK])),
    (INET, set("connects_over", &[MARK])),
    (INET, set("connections_over", &[MARK])),
    (INET, set("sent", &[MARK])),
    (INET, set("received", &[IFNAME])),
    (INET, set("spoofed", &[IFNAME])),
    (INET, set("limited", &[MARK])),
    (INET, set("denied", &[MARK])),
    (ARP, set("sender", &[IFNAME, ETHER, ETHER, IPV4])),
    (BRIDGE, map("vm", &[IFNAME], (MARK, 4))),
    (BRIDGE, set("sender", &[IFNAME, ETHER, ETHER, IPV4])),
    (BRIDGE, set("source4", &[IFNAME, ETHER, IPV4])),
    (BRIDGE, set("source6", &[IFNAME, ETHER, IPV6])),
    (BRIDGE, set("neighbor6", &[IFNAME, IPV6])),
    (BRIDGE, set("spoofed", &[IFNAME])),
    (BRIDGE, set("received", &[IFNAME])),
];

/// Trees of intervals are in so many shards, each with the VMs of every so manieth slot: the kernel may rebuild a whole tree
/// at each commit (6.18 does), and a look-up costs a tree's depth.
pub(crate) const SHARDS: u16 = 64;
/// From the slot's bits in a mark to the chain of its shard.
pub(crate) const SHARD_MAP: &str = "shards";

/// Names of one shard's sets and chain. A key has its VM in front of the address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shard {
    pub(crate) egress4: &'static str,
    pub(crate) egress6: &'static str,
    pub(crate) ports: &'static str,
    pub(crate) chain: &'static str,
}

static ALL_SHARDS: LazyLock<Vec<Shard>> = LazyLock::new(|| {
    let named = |what: &str, number: u16| -> &'static str { format!("{what}_{number}").leak() };
    let shards = (0..SHARDS).map(|number| Shard {
        egress4: named("egress4", number),
        egress6: named("egress6", number),
        ports: named("ports", number),
        chain: named("lists", number),
    });
    shards.collect()
});

/// The shards by their number.
pub(crate) fn shards() -> &'static [Shard] {
    &ALL_SHARDS
}

/// The shard of a slot.
pub(crate) fn shard_of(slot: Slot) -> Shard {
    // As the rules see it: a mark has the slot's number and one.
    shards()[usize::from((slot.number() + 1) % SHARDS)]
}

/// All sets with their tables.
pub(crate) fn sets() -> &'static [(Table, SetKind)] {
    static ALL: LazyLock<Vec<(Table, SetKind)>> = LazyLock::new(|| {
        let sharded = shards().iter().flat_map(|shard| {
            [
                (INET, intervals(map(shard.egress4, &[MARK, IPV4], (MARK, 4)))),
                (INET, intervals(map(shard.egress6, &[MARK, IPV6], (MARK, 4)))),
                (INET, intervals(set(shard.ports, &[MARK, PROTOCOL, PORT]))),
            ]
        });
        SETS.iter().copied().chain(sharded).collect()
    });
    &ALL
}

/// Addresses that no rule of a spec opens: first and last.
pub(crate) const NEVER4: &[([u8; 4], [u8; 4])] = &[
    ([0, 0, 0, 0], [0, 255, 255, 255]),
    // The slots (RFC 6598), and what carriers have there.
    ([100, 64, 0, 0], [100, 127, 255, 255]),
    ([127, 0, 0, 0], [127, 255, 255, 255]),
    // Link-local: metadata services of clouds and of Firecracker.
    ([169, 254, 0, 0], [169, 254, 255, 255]),
    // Multicast, reserved, broadcast.
    ([224, 0, 0, 0], [255, 255, 255, 255]),
];
/// Private addresses: only a rule that names them opens them (RFC 1918, 5737, 2544, 6890).
pub(crate) const PRIVATE4: &[([u8; 4], [u8; 4])] = &[
    ([10, 0, 0, 0], [10, 255, 255, 255]),
    ([172, 16, 0, 0], [172, 31, 255, 255]),
    ([192, 0, 0, 0], [192, 0, 0, 255]),
    ([192, 168, 0, 0], [192, 168, 255, 255]),
    ([198, 18, 0, 0], [198, 19, 255, 255]),
];
/// As first and last group pairs: everything below 2000::/3 and above it but unique local addresses, which are private.
pub(crate) const NEVER6: &[(u128, u128)] = &[
    // Unspecified, loopback, IPv4-mapped, NAT64 (64:ff9b::/96): they are IPv4 addresses in disguise.
    (0, (0x2000_u128 << 112) - 1),
    // 6to4 and Teredo carry IPv4 addresses.
    (0x2002_u128 << 112, (0x2003_u128 << 112) - 1),
    (0x2001_0000_u128 << 96, (0x2001_0001_u128 << 96) - 1),
    (0x4000_u128 << 112, (0xfc00_u128 << 112) - 1),
    // The slots' own network, inside the unique local ones.
    (SLOTS6, SLOTS6 | ((1 << 64) - 1)),
    (0xfe00_u128 << 112, u128::MAX),
];
/// Unique local addresses.
pub(crate) const PRIVATE6: &[(u128, u128)] = &[(0xfc00_u128 << 112, (0xfe00_u128 << 112) - 1)];
/// fdfa:fa::/64: slot n is ::n+1 in it.
pub(crate) const SLOTS6: u128 = 0xfdfa_00fa_u128 << 96;

/// A key's bytes of an interface's name.
pub(crate) fn name_key(name: &str) -> Vec<u8> {
    let mut key = name.as_bytes().to_vec();
    key.resize(16, 0);
    key
}

/// The key right behind `key`, as numbers of that many bytes are counted. Zeroes behind the last.
pub(crate) fn successor(mut key: Vec<u8>) -> Vec<u8> {
    for byte in key.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            break;
        }
    }
    key
}

/// The two elements of an interval, both ends included.
pub(crate) fn interval(first: Vec<u8>, last: Vec<u8>, data: Option<Vec<u8>>) -> Vec<Element> {
    let end = successor(last);
    let mut elements = vec![Element {
        data,
        ..Element::of(first)
    }];
    // Behind the last key of all nothing can end.
    if end.iter().any(|&byte| byte != 0) {
        elements.push(Element {
            is_end: true,
            ..Element::of(end)
        });
    }
    elements
}

/// Replaces the three tables in one batch: packets meet the old ones or the new ones, never none.
pub(crate) fn install() -> Batch {
    let mut batch = Batch::new();
    for table in [INET, ARP, BRIDGE] {
        batch.table(table);
        batch.delete_table(table);
        batch.table_with(table, 0, LAYOUT);
    }
    for (number, (table, set)) in (1..).zip(sets()) {
        batch.set(*table, set, number);
    }
    let constant4 = |ranges: &[([u8; 4], [u8; 4])]| -> Vec<Element> {
        let of = ranges
            .iter()
            .flat_map(|(first, last)| interval(first.to_vec(), last.to_vec(), None));
        of.collect()
    };
    let constant6 = |ranges: &[(u128, u128)]| -> Vec<Element> {
        let bytes = |address: u128| address.to_be_bytes().to_vec();
        let of = ranges
            .iter()
            .flat_map(|(first, last)| interval(bytes(*first), bytes(*last), None));
        of.collect()
    };
    batch.add_elements(INET, "never4", &constant4(NEVER4));
    batch.add_elements(INET, "private4", &constant4(PRIVATE4));
    batch.add_elements(INET, "never6", &constant6(NEVER6));
    batch.add_elements(INET, "private6", &constant6(PRIVATE6));
    for chain in chains::all() {
        batch.chain(chain.table, chain.name, chain.hook);
    }
    batch.add_elements(INET, SHARD_MAP, &shard_elements());
    for chain in chains::all() {
        for rule in &chain.rules {
            batch.rule(chain.table, chain.name, rule);
        }
    }
    batch
}

/// From each shard's bits of a mark to its chain.
fn shard_elements() -> Vec<Element> {
    let elements = (0_u32..).zip(shards()).map(|(number, shard)| Element {
        jump: Some(shard.chain),
        ..Element::of((number << 16_u32).to_ne_bytes().to_vec())
    });
    elements.collect()
}
