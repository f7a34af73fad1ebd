//! Expressions of nf_tables' rules: small steps over registers of four bytes.

use crate::netlink::Attributes;

/// First of the sixteen registers of four bytes (NFT_REG32_00).
pub(crate) const R0: u32 = 8;
/// The verdict's register.
pub(crate) const VERDICT: u32 = 0;

/// What `meta` loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Meta {
    Mark = 3,
    InName = 6,
    OutName = 7,
    NfProtocol = 15,
    Protocol = 16,
}

/// Which header an offset counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Base {
    Link = 0,
    Network = 1,
    Transport = 2,
}

/// What a rule does with a packet that came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Verdict {
    Drop,
    Accept,
    Goto(&'static str),
}

/// One step. Registers are [`R0`] and up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Expression {
    Meta {
        key: Meta,
        to: u32,
    },
    SetMark {
        from: u32,
    },
    /// From here on the kernel tells what becomes of the packet.
    SetTrace {
        from: u32,
    },
    Immediate {
        value: u8,
        to: u32,
    },
    Payload {
        base: Base,
        offset: u32,
        length: u32,
        to: u32,
    },
    /// Changes an address in the network header; `header_sum` is the place of IPv4's checksum. The transport's follows.
    Rewrite {
        offset: u32,
        length: u32,
        header_sum: Option<u32>,
        from: u32,
    },
    Compare {
        register: u32,
        is_equal: bool,
        value: Vec<u8>,
    },
    /// And, then exclusive or.
    Mask {
        register: u32,
        mask: u32,
        xor: u32,
    },
    /// The rule goes on if the key is in the set (or not, if `is_absent`); a map's value goes `to` a register.
    Lookup {
        set: &'static str,
        key: u32,
        to: Option<u32>,
        is_absent: bool,
    },
    CtState {
        to: u32,
    },
    CtDirection {
        to: u32,
    },
    CtMark {
        to: u32,
    },
    SetCtMark {
        from: u32,
    },
    Verdict(Verdict),
    Masquerade,
    Counter {
        packets: u64,
        bytes: u64,
    },
    /// Goes on while at most `rate` a second came, and `burst` more at once.
    Limit {
        rate: u64,
        burst: u32,
        is_over: bool,
    },
    /// Goes on while more than `count` connections are open.
    ConnectionsOver {
        count: u32,
    },
}

impl Expression {
    /// The kernel's name, and its attributes.
    pub(crate) fn write(&self, to: &mut Attributes) {
        to.text(1, self.name()).nest(2, |data| self.write_data(data));
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Meta { .. } | Self::SetMark { .. } | Self::SetTrace { .. } => "meta",
            Self::Payload { .. } | Self::Rewrite { .. } => "payload",
            Self::Compare { .. } => "cmp",
            Self::Mask { .. } => "bitwise",
            Self::Lookup { .. } => "lookup",
            Self::CtState { .. } | Self::CtDirection { .. } | Self::CtMark { .. } | Self::SetCtMark { .. } => "ct",
            Self::Verdict(_) | Self::Immediate { .. } => "immediate",
            Self::Masquerade => "masq",
            Self::Counter { .. } => "counter",
            Self::Limit { .. } => "limit",
            Self::ConnectionsOver { .. } => "connlimit",
        }
    }

    fn write_data(&self, data: &mut Attributes) {
        match self {
            Self::Meta { key, to } => data.be32(1, *to).be32(2, *key as u32),
            Self::SetMark { from } => data.be32(2, Meta::Mark as u32).be32(3, *from),
            // NFT_META_NFTRACE.
            Self::SetTrace { from } => data.be32(2, 12).be32(3, *from),
            Self::Immediate { value, to } => data.be32(1, *to).nest(2, |nest| {
                nest.put(1, &[*value]);
            }),
            Self::Payload {
                base,
                offset,
                length,
                to,
            } => data
                .be32(1, *to)
                .be32(2, *base as u32)
                .be32(3, *offset)
                .be32(4, *length),
            Self::Rewrite {
                offset,
                length,
                header_sum,
                from,
            } => {
                data.be32(5, *from)
                    .be32(2, Base::Network as u32)
                    .be32(3, *offset)
                    .be32(4, *length);
                // NFT_PAYLOAD_CSUM_INET; NFT_PAYLOAD_L4CSUM_PSEUDOHDR.
                data.be32(6, u32::from(header_sum.is_some()))
                    .be32(7, header_sum.unwrap_or(0))
                    .be32(8, 1)
            }
            Self::Compare {
                register,
                is_equal,
                value,
            } => data.be32(1, *register).be32(2, u32::from(!is_equal)).nest(3, |nest| {
                nest.put(1, value);
            }),
            Self::Mask { register, mask, xor } => {
                data.be32(1, *register).be32(2, *register).be32(3, 4);
                data.nest(4, |nest| {
                    nest.put(1, &mask.to_ne_bytes());
                });
                data.nest(5, |nest| {
                    nest.put(1, &xor.to_ne_bytes());
                })
            }
            Self::Lookup {
                set,
                key,
                to,
                is_absent,
            } => {
                data.text(1, set).be32(2, *key);
                if let Some(to) = to {
                    data.be32(3, *to);
                }
                data.be32(5, u32::from(*is_absent))
            }
            Self::CtState { to } => data.be32(1, *to).be32(2, 0),
            Self::CtDirection { to } => data.be32(1, *to).be32(2, 1),
            Self::CtMark { to } => data.be32(1, *to).be32(2, 3),
            Self::SetCtMark { from } => data.be32(2, 3).be32(4, *from),
            Self::Verdict(verdict) => data.be32(1, VERDICT).nest(2, |nest| write_verdict(*verdict, nest)),
            Self::Masquerade => data,
            Self::Counter { packets, bytes } => data.be64(1, *bytes).be64(2, *packets),
            Self::Limit { rate, burst, is_over } => data
                .be64(1, *rate)
                .be64(2, 1)
                .be32(3, *burst)
                .be32(4, 0)
                .be32(5, u32::from(*is_over)),
            Self::ConnectionsOver { count } => data.be32(1, *count).be32(2, 1),
        };
    }
}

fn write_verdict(verdict: Verdict, to: &mut Attributes) {
    let (code, chain) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Goto(chain) => (-4_i32, Some(chain)),
    };
    to.nest(2, |nest| {
        nest.be32(1, code.cast_unsigned());
        if let Some(chain) = chain {
            nest.text(2, chain);
        }
    });
}
