//! The chains of the static tables, rule by rule.

use super::{
    ARP, BRIDGE, BRIDGED_PREFIX, FILTER, INET, LASTING, LATE, MARK_BYTE, RAW, ROUTED_PREFIX, SHARD_MAP, SHARDS,
    SOURCE_NAT, Shard, shards,
};
use crate::nft::{
    ARP_INPUT, FORWARD, Hook, INPUT, OUTPUT, POSTROUTING, PREROUTING, Table,
    expression::{Base, Expression, Meta, R0, VERDICT, Verdict},
};

/// A chain and its rules.
pub(super) struct Chain {
    pub(super) table: Table,
    pub(super) name: &'static str,
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<Vec<Expression>>,
}

/// Chains that others jump to come first: the kernel wants them to be there.
pub(super) fn all() -> Vec<Chain> {
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
    let mut all = vec![
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
    ];
    // The chain that jumps to them is made before, its rules are not.
    all.extend(shards().iter().map(|shard| plain(INET, shard.chain, lists(shard))));
    all
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
    let mut rules = chatter();
    rules.extend([
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
    ]);
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

/// What every honest guest's kernel says over IPv6 when its link comes up, and nobody here answers: questions for routers
/// (133) and for its own address (135 from ::), memberships of groups (143). Neither forged nor denied.
fn chatter() -> Vec<Vec<Expression>> {
    let kind = |number: u8| {
        let of = vec![
            load(Meta::Protocol, R0),
            compare(R0, &[58]),
            payload(Base::Transport, 0, 1, R0),
        ];
        [ipv6(), of, vec![compare(R0, &[number])]].concat()
    };
    let nobody = vec![payload(Base::Network, 8, 16, R0), compare(R0, &[0; 16])];
    let drop = || vec![end(Verdict::Drop)];
    vec![
        [kind(133), drop()].concat(),
        [kind(143), drop()].concat(),
        [kind(135), nobody, drop()].concat(),
    ]
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
    rules.push(vec![
        load(Meta::Mark, R0),
        Expression::Mask {
            register: R0,
            mask: u32::from(SHARDS - 1) << 16,
            xor: 0,
        },
        Expression::Lookup {
            set: SHARD_MAP,
            key: R0,
            to: Some(VERDICT),
            is_absent: false,
        },
    ]);
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

/// What a shard's VMs list. The destination turns the mark into its class for a moment; the class has the ports. A class that
/// does not fit is turned back, and the next is tried.
fn lists(shard: &Shard) -> Vec<Vec<Expression>> {
    let mut rules = Vec::new();
    for (set4, set6) in [("pins4", "pins6"), (shard.egress4, shard.egress6)] {
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
            look(shard.ports, R0),
            end(Verdict::Goto("let")),
        ]);
        rules.push(unclassed());
    }
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
