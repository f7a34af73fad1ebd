//! The static tables of a blade: all chains and rules, and the sets that VMs have elements in. Nothing here is per VM.
//!
//! ```text
//! tap ─ arp far / input          sender (interface, MACs, address) must be the VM's
//! tap ─ inet far / from_guest    source must be the VM's; mark; packet rate; count; guest's address -> slot's address
//!         ├ to_host              the blade's services that the VM may use
//!         └ forward / egress     never-list, connection limits, pinned names, allow list, open; else denied
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

use crate::nft::{
    ARP_INPUT, Batch, Element, FORWARD, Family, Hook, INPUT, INTERVAL, MAP, OUTPUT, POSTROUTING, PREROUTING, SetKind,
    TIMEOUT, Table,
    datatype::{ETHER, IFNAME, IPV4, IPV6, MARK, PORT, PROTOCOL},
    expression::{Base, Expression, Meta, R0, Verdict},
};

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

/// Names of taps that FAR makes begin so: in the guests' namespace every such link is a guest's.
pub(crate) const ROUTED_PREFIX: &str = "fa";
/// Names of taps that Flintlock makes.
pub(crate) const BRIDGED_PREFIX: &str = "fltap";
/// Low byte of a packet's mark that says: from a guest. Above it are the policy's generation and the slot.
pub(crate) const MARK_BYTE: u8 = 0xfa;
/// Where the mark has the generation: masked out for what outlives a change of policy.
const LASTING: u32 = 0xffff_00ff;

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

/// Sets of `inet far`, then of the others. A set with intervals has its VM in front of the address, so that one tree
/// holds all VMs and a look-up costs its depth.
pub(crate) const SETS: &[(Table, SetKind)] = &[
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
    (INET, intervals(map("egress4", &[MARK, IPV4], (MARK, 4)))),
    (INET, intervals(map("egress6", &[MARK, IPV6], (MARK, 4)))),
    (INET, timed(map("pins4", &[MARK, IPV4], (MARK, 4)))),
    (INET, timed(map("pins6", &[MARK, IPV6], (MARK, 4)))),
    (INET, intervals(set("ports", &[MARK, PROTOCOL, PORT]))),
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
        batch.table(table);
    }
    for (number, (table, set)) in (1..).zip(SETS) {
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
    for chain in chains() {
        batch.chain(chain.table, chain.name, chain.hook);
    }
    for chain in chains() {
        for rule in &chain.rules {
            batch.rule(chain.table, chain.name, rule);
        }
    }
    batch
}

/// A chain and its rules.
struct Chain {
    table: Table,
    name: &'static str,
    hook: Option<Hook>,
    rules: Vec<Vec<Expression>>,
}

/// Chains that others jump to come first: the kernel wants them to be there.
fn chains() -> Vec<Chain> {
    use Verdict::{Accept, Drop, Goto};
    let plain = |table, name, rules| Chain {
        table,
        name,
        hook: None,
        rules,
    };
    let hooked = |table, name, kind, number, priority, rules| Chain {
        table,
        name,
        hook: Some(Hook { number, priority, kind }),
        rules,
    };
    let on = |prefix: &str, key, verdict| [name_begins(prefix, key), vec![end(verdict)]].concat();
    vec![
        plain(
            INET,
            "spoofed",
            vec![vec![load(Meta::InName, R0), look("spoofed", R0)], vec![end(Drop)]],
        ),
        plain(
            INET,
            "limited",
            vec![[load_mark(), vec![look("limited", R0)]].concat(), vec![end(Drop)]],
        ),
        plain(
            INET,
            "denied",
            vec![[load_mark(), vec![look("denied", R0)]].concat(), vec![end(Drop)]],
        ),
        plain(INET, "guest", guest()),
        plain(INET, "to_host", to_host()),
        plain(
            INET,
            "to_guest",
            vec![
                [
                    state(STATE_ANSWER),
                    vec![Expression::CtMark { to: R0 }, look("live", R0), end(Accept)],
                ]
                .concat(),
                vec![end(Drop)],
            ],
        ),
        plain(INET, "let", let_out()),
        plain(INET, "egress", egress()),
        plain(INET, "deliver", deliver()),
        hooked(
            INET,
            "from_guest",
            "filter",
            PREROUTING,
            RAW,
            vec![on(ROUTED_PREFIX, Meta::InName, Goto("guest"))],
        ),
        hooked(
            INET,
            "input",
            "filter",
            INPUT,
            FILTER,
            vec![[is_marked(), vec![end(Goto("to_host"))]].concat()],
        ),
        hooked(
            INET,
            "forward",
            "filter",
            FORWARD,
            FILTER,
            vec![
                // To a guest before from a guest: no rule of a spec opens another guest.
                on(ROUTED_PREFIX, Meta::OutName, Goto("to_guest")),
                vec![load(Meta::OutName, R0), look("bridges", R0), end(Goto("to_guest"))],
                [is_marked(), vec![end(Goto("egress"))]].concat(),
            ],
        ),
        hooked(
            INET,
            "nat",
            "nat",
            POSTROUTING,
            SOURCE_NAT,
            vec![[is_marked(), vec![Expression::Masquerade]].concat()],
        ),
        hooked(
            INET,
            "to_tap",
            "filter",
            POSTROUTING,
            LATE,
            vec![on(ROUTED_PREFIX, Meta::OutName, Goto("deliver"))],
        ),
        hooked(
            ARP,
            "input",
            "filter",
            ARP_INPUT,
            FILTER,
            vec![
                [
                    name_begins(ROUTED_PREFIX, Meta::InName),
                    arp_sender(),
                    vec![look_absent("sender", R0), end(Drop)],
                ]
                .concat(),
            ],
        ),
        plain(
            BRIDGE,
            "spoofed",
            vec![vec![load(Meta::InName, R0), look("spoofed", R0)], vec![end(Drop)]],
        ),
        plain(BRIDGE, "port", port()),
        hooked(
            BRIDGE,
            "from_port",
            "filter",
            PREROUTING,
            RAW,
            vec![on(BRIDGED_PREFIX, Meta::InName, Goto("port"))],
        ),
        hooked(
            BRIDGE,
            "forward",
            "filter",
            FORWARD,
            FILTER,
            vec![
                on(BRIDGED_PREFIX, Meta::InName, Drop),
                on(BRIDGED_PREFIX, Meta::OutName, Drop),
            ],
        ),
        hooked(
            BRIDGE,
            "output",
            "filter",
            OUTPUT,
            FILTER,
            vec![vec![load(Meta::OutName, R0), look("received", R0)]],
        ),
    ]
}

/// Answers are let in by the connection's mark, while the policy that it names is in force.
fn let_out() -> Vec<Vec<Expression>> {
    vec![
        unclassed(),
        vec![
            load(Meta::Mark, R0),
            Expression::SetCtMark { from: R0 },
            end(Verdict::Accept),
        ],
    ]
}

/// A class's mark becomes the packet's again.
fn unclassed() -> Vec<Expression> {
    let mask = Expression::Mask {
        register: R0,
        mask: 0xffff_ff00,
        xor: MARK_BYTE.into(),
    };
    vec![load(Meta::Mark, R0), mask, Expression::SetMark { from: R0 }]
}

/// From a routed tap, before connection tracking.
fn guest() -> Vec<Vec<Expression>> {
    let spoofed = || end(Verdict::Goto("spoofed"));
    let mut rules = vec![
        [ipv4(), source4(), vec![look_absent("source4", R0), spoofed()]].concat(),
        [ipv6(), source6(), vec![look_absent("source6", R0), spoofed()]].concat(),
        [vm_of(Meta::InName), vec![Expression::SetMark { from: R0 }]].concat(),
        // In no set: a tap that was not let.
        vec![
            load(Meta::Mark, R0),
            compare(R0, &0_u32.to_ne_bytes()),
            end(Verdict::Drop),
        ],
        [
            load_mark(),
            vec![look("packets_over", R0), end(Verdict::Goto("limited"))],
        ]
        .concat(),
    ];
    rules.extend(neighbor_rules(ipv6()));
    rules.extend([
        [load_mark(), vec![look("sent", R0)]].concat(),
        [ipv4(), vec![load(Meta::InName, R0), value("inward4", R0), rewrite4(12)]].concat(),
        [
            ipv6(),
            vec![
                load(Meta::InName, R0),
                payload(Base::Network, 8, 16, R0 + 4),
                value("inward6", R0),
                rewrite6(8),
            ],
        ]
        .concat(),
    ]);
    rules
}

/// Advertisements of others' addresses, routers' advertisements and redirects are never a guest's to send.
fn neighbor_rules(is_ipv6: Vec<Expression>) -> Vec<Vec<Expression>> {
    let kind = |number: u8| {
        let protocol = vec![
            load(Meta::Protocol, R0),
            compare(R0, &[58]),
            payload(Base::Transport, 0, 1, R0),
        ];
        [is_ipv6.clone(), protocol, vec![compare(R0, &[number])]].concat()
    };
    let spoofed = || end(Verdict::Goto("spoofed"));
    let target = vec![load(Meta::InName, R0), payload(Base::Transport, 8, 16, R0 + 4)];
    vec![
        [kind(136), target, vec![look_absent("neighbor6", R0), spoofed()]].concat(),
        [kind(134), vec![spoofed()]].concat(),
        [kind(137), vec![spoofed()]].concat(),
    ]
}

/// From a bridge's port, before the bridge.
fn port() -> Vec<Vec<Expression>> {
    let spoofed = || end(Verdict::Goto("spoofed"));
    // The type as it is on the wire: a tagged frame shows its tag here, not what is behind it.
    let is_type = |number: u16| vec![payload(Base::Link, 12, 2, R0), compare(R0, &number.to_be_bytes())];
    let pass = || end(Verdict::Accept);
    let mut rules = vec![
        [vm_of(Meta::InName), vec![Expression::SetMark { from: R0 }]].concat(),
        vec![
            load(Meta::Mark, R0),
            compare(R0, &0_u32.to_ne_bytes()),
            end(Verdict::Drop),
        ],
        [is_type(0x0806), arp_sender(), vec![look("sender", R0), pass()]].concat(),
        [is_type(0x0800), source4(), vec![look("source4", R0), pass()]].concat(),
    ];
    rules.extend(neighbor_rules(is_type(0x86dd)));
    rules.push([is_type(0x86dd), source6(), vec![look("source6", R0), pass()]].concat());
    rules.push(vec![spoofed()]);
    rules
}

fn to_host() -> Vec<Vec<Expression>> {
    let protocol_port = vec![
        load(Meta::Mark, R0),
        load(Meta::Protocol, R0 + 1),
        payload(Base::Transport, 2, 2, R0 + 2),
        look("services", R0),
        end(Verdict::Accept),
    ];
    let neighbor = |number: u8| {
        let of = vec![
            load(Meta::Protocol, R0),
            compare(R0, &[58]),
            payload(Base::Transport, 0, 1, R0),
        ];
        [ipv6(), of, vec![compare(R0, &[number]), end(Verdict::Accept)]].concat()
    };
    vec![
        bridged_limits(),
        // Answers to what the blade itself asked.
        [
            state(STATE_ANSWER),
            vec![
                Expression::CtDirection { to: R0 },
                compare(R0, &[1]),
                end(Verdict::Accept),
            ],
        ]
        .concat(),
        protocol_port,
        neighbor(135),
        neighbor(136),
        vec![end(Verdict::Goto("denied"))],
    ]
}

/// What came over a bridge was not counted by the tap's chain: its packet rate is kept here.
fn bridged_limits() -> Vec<Expression> {
    [
        vec![load(Meta::InName, R0), look("bridges", R0)],
        load_mark(),
        vec![look("packets_over", R0), end(Verdict::Goto("limited"))],
    ]
    .concat()
}

fn egress() -> Vec<Vec<Expression>> {
    let denied = || end(Verdict::Goto("denied"));
    let limited = || end(Verdict::Goto("limited"));
    let accept = || end(Verdict::Accept);
    let mut rules = vec![
        bridged_limits(),
        [
            vec![load(Meta::InName, R0), look("bridges", R0)],
            load_mark(),
            vec![look("sent", R0)],
        ]
        .concat(),
        [state(STATE_INVALID), vec![denied()]].concat(),
        [
            ipv4(),
            vec![payload(Base::Network, 16, 4, R0), look("never4", R0), denied()],
        ]
        .concat(),
        [
            ipv6(),
            vec![payload(Base::Network, 24, 16, R0), look("never6", R0), denied()],
        ]
        .concat(),
        [
            state(STATE_NEW),
            load_mark(),
            vec![look("connects_over", R0), limited()],
        ]
        .concat(),
        [
            state(STATE_NEW),
            load_mark(),
            vec![look("connections_over", R0), limited()],
        ]
        .concat(),
    ];
    // The destination turns the mark into its class for a moment; the class has the ports. A class that does not fit is
    // turned back, and the next is tried.
    for (set4, set6) in [("pins4", "pins6"), ("egress4", "egress6")] {
        for (is_family, set, offset, length) in [(ipv4(), set4, 16, 4), (ipv6(), set6, 24, 16)] {
            let class = vec![
                load(Meta::Mark, R0),
                payload(Base::Network, offset, length, R0 + 1),
                value(set, R0),
                Expression::SetMark { from: R0 },
            ];
            rules.push([is_family, class].concat());
        }
        rules.push(vec![
            load(Meta::Mark, R0),
            load(Meta::Protocol, R0 + 1),
            payload(Base::Transport, 2, 2, R0 + 2),
            look("ports", R0),
            end(Verdict::Goto("let")),
        ]);
        rules.push(unclassed());
    }
    for (is_family, private, offset, length) in [(ipv4(), "private4", 16, 4), (ipv6(), "private6", 24, 16)] {
        let open = vec![
            load(Meta::Mark, R0),
            look("open", R0),
            payload(Base::Network, offset, length, R0),
            look_absent(private, R0),
            end(Verdict::Goto("let")),
        ];
        rules.push([is_family, open].concat());
    }
    // What was let stays so under the policy that let it: a connection to a pinned address outlives the pin.
    rules.push(
        [
            state(STATE_ANSWER),
            vec![Expression::CtMark { to: R0 }, look("live", R0), accept()],
        ]
        .concat(),
    );
    rules.push(vec![denied()]);
    rules
}

/// To a routed tap, after everything else.
fn deliver() -> Vec<Vec<Expression>> {
    vec![
        vec![load(Meta::OutName, R0), look("received", R0)],
        [
            ipv4(),
            vec![load(Meta::OutName, R0), value("outward4", R0), rewrite4(16)],
        ]
        .concat(),
        [
            ipv6(),
            vec![
                load(Meta::OutName, R0),
                payload(Base::Network, 24, 16, R0 + 4),
                value("outward6", R0),
                rewrite6(24),
            ],
        ]
        .concat(),
    ]
}

/// Bits of `ct state` (enum nf_ct_state_bits).
const STATE_INVALID: u32 = 1;
const STATE_ANSWER: u32 = 2 | 4;
const STATE_NEW: u32 = 8;

fn state(bits: u32) -> Vec<Expression> {
    vec![
        Expression::CtState { to: R0 },
        Expression::Mask {
            register: R0,
            mask: bits,
            xor: 0,
        },
        Expression::Compare {
            register: R0,
            is_equal: false,
            value: 0_u32.to_ne_bytes().to_vec(),
        },
    ]
}

fn ipv4() -> Vec<Expression> {
    vec![load(Meta::NfProtocol, R0), compare(R0, &[2])]
}

fn ipv6() -> Vec<Expression> {
    vec![load(Meta::NfProtocol, R0), compare(R0, &[10])]
}

fn name_begins(prefix: &str, key: Meta) -> Vec<Expression> {
    vec![load(key, R0), compare(R0, prefix.as_bytes())]
}

/// The mark of the VM behind an interface.
fn vm_of(key: Meta) -> Vec<Expression> {
    vec![load(key, R0), value("vm", R0)]
}

/// Whether a guest sent it.
fn is_marked() -> Vec<Expression> {
    vec![
        load(Meta::Mark, R0),
        Expression::Mask {
            register: R0,
            mask: 0xff,
            xor: 0,
        },
        compare(R0, &u32::from(MARK_BYTE).to_ne_bytes()),
    ]
}

/// The mark without the policy's generation.
fn load_mark() -> Vec<Expression> {
    vec![
        load(Meta::Mark, R0),
        Expression::Mask {
            register: R0,
            mask: LASTING,
            xor: 0,
        },
    ]
}

fn source4() -> Vec<Expression> {
    vec![
        load(Meta::InName, R0),
        payload(Base::Link, 6, 6, R0 + 4),
        payload(Base::Network, 12, 4, R0 + 6),
    ]
}

fn source6() -> Vec<Expression> {
    vec![
        load(Meta::InName, R0),
        payload(Base::Link, 6, 6, R0 + 4),
        payload(Base::Network, 8, 16, R0 + 6),
    ]
}

/// Interface, the frame's MAC, the sender's MAC and address inside (RFC 826).
fn arp_sender() -> Vec<Expression> {
    vec![
        load(Meta::InName, R0),
        payload(Base::Link, 6, 6, R0 + 4),
        payload(Base::Network, 8, 6, R0 + 6),
        payload(Base::Network, 14, 4, R0 + 8),
    ]
}

fn load(key: Meta, to: u32) -> Expression {
    Expression::Meta { key, to }
}

fn payload(base: Base, offset: u32, length: u32, to: u32) -> Expression {
    Expression::Payload {
        base,
        offset,
        length,
        to,
    }
}

fn compare(register: u32, value: &[u8]) -> Expression {
    Expression::Compare {
        register,
        is_equal: true,
        value: value.to_vec(),
    }
}

fn look(set: &'static str, key: u32) -> Expression {
    Expression::Lookup {
        set,
        key,
        to: None,
        is_absent: false,
    }
}

fn look_absent(set: &'static str, key: u32) -> Expression {
    Expression::Lookup {
        set,
        key,
        to: None,
        is_absent: true,
    }
}

fn value(set: &'static str, key: u32) -> Expression {
    Expression::Lookup {
        set,
        key,
        to: Some(R0),
        is_absent: false,
    }
}

fn rewrite4(offset: u32) -> Expression {
    Expression::Rewrite {
        offset,
        length: 4,
        header_sum: Some(10),
        from: R0,
    }
}

fn rewrite6(offset: u32) -> Expression {
    Expression::Rewrite {
        offset,
        length: 16,
        header_sum: None,
        from: R0,
    }
}

fn end(verdict: Verdict) -> Expression {
    Expression::Verdict(verdict)
}
