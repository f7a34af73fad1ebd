//! nf_tables over netlink: tables, chains, rules, sets and elements, in atomic batches.
//!
//! Numbers and layouts are those of `include/uapi/linux/netfilter/nf_tables.h`.

pub(crate) mod expression;

use crate::netlink::{
    APPEND, Attributes, CREATE, DUMP, Messages, Protocol, Refused, Socket, attribute, attributes, read_text,
};
use expression::Expression;

const SUBSYSTEM: u16 = 10 << 8;
const NEW_TABLE: u16 = SUBSYSTEM;
const GET_TABLE: u16 = SUBSYSTEM | 1;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENT: u16 = SUBSYSTEM | 12;
const GET_ELEMENT: u16 = SUBSYSTEM | 13;
const DELETE_ELEMENT: u16 = SUBSYSTEM | 14;
/// Of connection tracking (nfnetlink_conntrack.h): IPCTNL_MSG_CT_DELETE, CTA_MARK and CTA_MARK_MASK.
const DELETE_CONNECTION: u16 = 1 << 8 | 2;
const CONNECTION_MARK: u16 = 8;
const CONNECTION_MARK_MASK: u16 = 21;
/// Messages without a subsystem that hold a batch together.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// Elements in one message, so that their list stays below the 64 KiB of an attribute.
const ELEMENTS_PER_MESSAGE: usize = 256;

/// Of a table and its hooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    /// IPv4 and IPv6.
    Inet,
    Arp,
    Bridge,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Arp => 3,
            Self::Bridge => 7,
        }
    }
}

/// Name of a table in its family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Table {
    pub(crate) family: Family,
    pub(crate) name: &'static str,
}

/// Where a chain is called from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hook {
    pub(crate) number: u32,
    pub(crate) priority: i32,
    pub(crate) kind: &'static str,
}

/// NF_INET_* and NF_BR_* are the same numbers; arp's input is 0.
pub(crate) const PREROUTING: u32 = 0;
pub(crate) const INPUT: u32 = 1;
pub(crate) const FORWARD: u32 = 2;
pub(crate) const OUTPUT: u32 = 3;
pub(crate) const POSTROUTING: u32 = 4;
pub(crate) const ARP_INPUT: u32 = 0;

/// Keys are intervals, in the byte order of the whole key.
pub(crate) const INTERVAL: u32 = 4;
/// Keys have values.
pub(crate) const MAP: u32 = 8;
/// Elements go by themselves.
pub(crate) const TIMEOUT: u32 = 0x10;

/// Names a type towards the `nft` program, which lists by it (libnftables' datatype.h). The kernel does not look at it.
pub(crate) mod datatype {
    pub(super) const INTEGER: u32 = 4;
    pub(crate) const IPV4: u32 = 7;
    pub(crate) const IPV6: u32 = 8;
    pub(crate) const ETHER: u32 = 9;
    pub(crate) const PROTOCOL: u32 = 12;
    pub(crate) const PORT: u32 = 13;
    pub(crate) const MARK: u32 = 19;
    pub(crate) const IFNAME: u32 = 41;
    /// NFT_DATA_VERDICT: a map's values are where to go on.
    pub(crate) const VERDICT: u32 = 0xffff_ff00;

    /// Type of a concatenation.
    pub(crate) fn concat(types: &[u32]) -> u32 {
        types.iter().fold(0, |all, one| all << 6 | one)
    }

    /// Bytes of a type in a key: whole registers of four.
    pub(crate) fn bytes(kind: u32) -> u32 {
        match kind {
            IPV6 | IFNAME => 16,
            ETHER => 8,
            _ => 4,
        }
    }
}

/// A set or map as it is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SetKind {
    pub(crate) name: &'static str,
    pub(crate) key: &'static [u32],
    /// Type and bytes of the values.
    pub(crate) data: Option<(u32, u32)>,
    pub(crate) flags: u32,
}

impl SetKind {
    /// `nft` 1.0.6 lists concatenations in a tree as those of another kind of set, and dies of it: to it, such a key is a
    /// number.
    fn key_type(&self) -> u32 {
        match self.key {
            [_, _, ..] if self.flags & INTERVAL != 0 => datatype::INTEGER,
            key => datatype::concat(key),
        }
    }

    /// How `nft` reads keys and values (NFTNL_UDATA_SET_KEYBYTEORDER, _DATABYTEORDER): kind, length, value each.
    fn byte_orders(&self) -> Vec<u8> {
        let order = |kind: u32| {
            if matches!(kind, datatype::MARK | datatype::IFNAME) {
                1_u32
            } else {
                2
            }
        };
        let key = match self.key {
            [one] => order(*one),
            _ => 2,
        };
        let mut told = vec![0, 4];
        told.extend(key.to_ne_bytes());
        if let Some((kind, _)) = self.data {
            told.extend([1, 4]);
            told.extend(order(kind).to_ne_bytes());
        }
        told
    }
}

/// One element.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    pub(crate) data: Option<Vec<u8>>,
    /// It ends the interval that begins before it.
    pub(crate) is_end: bool,
    /// Milliseconds until it goes by itself.
    pub(crate) timeout: Option<u64>,
    pub(crate) expression: Option<Expression>,
    /// A map's value: the chain to jump to.
    pub(crate) jump: Option<&'static str>,
    /// Kept by the kernel, and shown by `nft`.
    pub(crate) comment: Option<String>,
}

impl Element {
    pub(crate) fn of(key: Vec<u8>) -> Self {
        Self {
            key,
            data: None,
            is_end: false,
            timeout: None,
            expression: None,
            jump: None,
            comment: None,
        }
    }

    pub(crate) fn with_data(key: Vec<u8>, data: Vec<u8>) -> Self {
        Self {
            data: Some(data),
            ..Self::of(key)
        }
    }

    pub(crate) fn running(key: Vec<u8>, expression: Expression) -> Self {
        Self {
            expression: Some(expression),
            ..Self::of(key)
        }
    }

    fn write(&self, to: &mut Attributes, is_deletion: bool) {
        to.nest(1, |element| {
            element.nest(1, |key| {
                key.put(1, &self.key);
            });
            if self.is_end {
                element.be32(3, 1);
            }
            if is_deletion {
                return;
            }
            if let Some(data) = &self.data {
                element.nest(2, |value| {
                    value.put(1, data);
                });
            }
            if let Some(chain) = self.jump {
                // NFT_JUMP.
                element.nest(2, |value| {
                    value.nest(2, |verdict| {
                        verdict.be32(1, (-3_i32).cast_unsigned()).text(2, chain);
                    });
                });
            }
            if let Some(timeout) = self.timeout {
                element.be64(4, timeout);
            }
            if let Some(comment) = &self.comment {
                element.put(6, &comment_bytes(comment));
            }
            if let Some(expression) = &self.expression {
                element.nest(7, |nest| expression.write(nest));
            }
        });
    }
}

/// Longest comment: user data of 256 bytes, less kind, length and the closing NUL.
const MAX_COMMENT: usize = 253;

/// As `nft` writes it (NFTNL_UDATA_SET_ELEM_COMMENT, NFTNL_UDATA_TABLE_COMMENT): kind, length, text with its NUL.
fn comment_bytes(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(MAX_COMMENT)];
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    [&[0, length], text, &[0]].concat()
}

fn comment_of(user_data: &[u8]) -> Option<String> {
    match user_data {
        [0, _, text @ ..] => Some(read_text(text).to_owned()),
        _ => None,
    }
}

/// Changes that are done all or not at all.
#[derive(Debug)]
pub(crate) struct Batch {
    messages: Messages,
}

fn fixed(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

impl Batch {
    pub(crate) fn new() -> Self {
        let mut messages = Messages::default();
        messages.add(
            "committing the changes of nf_tables",
            BATCH_BEGIN,
            0,
            &fixed(0, 10),
            |_| {},
        );
        Self { messages }
    }

    fn add(&mut self, what: String, kind: u16, flags: u16, table: Table, fill: impl FnOnce(&mut Attributes)) {
        self.messages
            .add(what, kind, flags, &fixed(table.family.number(), 0), fill);
    }

    pub(crate) fn table(&mut self, table: Table) {
        self.table_with(table, 0, "");
    }

    /// A table with flags and a comment.
    pub(crate) fn table_with(&mut self, table: Table, flags: u32, comment: &str) {
        self.add(format!("making table {}", table.name), NEW_TABLE, CREATE, table, |to| {
            to.text(1, table.name).be32(2, flags);
            if !comment.is_empty() {
                to.put(6, &comment_bytes(comment));
            }
        });
    }

    /// Removes a table and all that is in it. It must be there: make it first in the same batch.
    pub(crate) fn delete_table(&mut self, table: Table) {
        self.add(format!("deleting table {}", table.name), DELETE_TABLE, 0, table, |to| {
            to.text(1, table.name);
        });
    }

    /// A chain whose packets pass when no rule decided.
    pub(crate) fn chain(&mut self, table: Table, name: &str, hook: Option<Hook>) {
        self.add(format!("making chain {name}"), NEW_CHAIN, CREATE, table, |to| {
            to.text(1, table.name).text(3, name);
            if let Some(hook) = hook {
                to.nest(4, |nest| {
                    nest.be32(1, hook.number).be32(2, hook.priority.cast_unsigned());
                });
                to.be32(5, 1).text(7, hook.kind);
            }
        });
    }

    pub(crate) fn rule(&mut self, table: Table, chain: &str, expressions: &[Expression]) {
        let what = format!("adding a rule to chain {chain}");
        self.add(what, NEW_RULE, CREATE | APPEND, table, |to| {
            to.text(1, table.name).text(2, chain).nest(4, |list| {
                for expression in expressions {
                    list.nest(1, |nest| expression.write(nest));
                }
            });
        });
    }

    /// `id` is unique in the batch.
    pub(crate) fn set(&mut self, table: Table, set: &SetKind, id: u32) {
        self.add(format!("making set {}", set.name), NEW_SET, CREATE, table, |to| {
            let bytes = set.key.iter().map(|&kind| datatype::bytes(kind)).sum();
            to.text(1, table.name)
                .text(2, set.name)
                .be32(3, set.flags)
                .be32(4, set.key_type())
                .be32(5, bytes)
                .be32(10, id);
            if let Some((kind, bytes)) = set.data {
                to.be32(6, kind).be32(7, bytes);
            }
            to.put(13, &set.byte_orders());
        });
    }

    pub(crate) fn add_elements(&mut self, table: Table, set: &str, elements: &[Element]) {
        self.elements(NEW_ELEMENT, CREATE, table, set, elements);
    }

    pub(crate) fn delete_elements(&mut self, table: Table, set: &str, elements: &[Element]) {
        self.elements(DELETE_ELEMENT, 0, table, set, elements);
    }

    fn elements(&mut self, kind: u16, flags: u16, table: Table, set: &str, elements: &[Element]) {
        let is_deletion = kind == DELETE_ELEMENT;
        let verb = if is_deletion { "deleting" } else { "adding" };
        for part in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let what = format!("{verb} {} elements of set {set}", part.len());
            self.add(what, kind, flags, table, |to| {
                to.text(1, table.name).text(2, set).nest(3, |list| {
                    for element in part {
                        element.write(list, is_deletion);
                    }
                });
            });
        }
    }
}

/// A connection to nf_tables of one namespace.
#[derive(Debug)]
pub(crate) struct Nft {
    socket: Socket,
}

impl Nft {
    /// In the calling thread's namespace.
    pub(crate) fn open() -> Result<Self, Refused> {
        Self::open_for(0)
    }

    /// The same, told of the events of these groups.
    pub(crate) fn open_for(groups: u32) -> Result<Self, Refused> {
        Ok(Self {
            socket: Socket::open(Protocol::Netfilter, groups)?,
        })
    }

    /// The next datagram of events, each handed to `take`; false when there is none within `patience`.
    pub(crate) fn events(&self, patience: std::time::Duration, take: impl FnMut(u16, &[u8])) -> Result<bool, Refused> {
        self.socket.events(patience, take)
    }

    /// Does all of a batch or nothing; returns when the kernel has acknowledged it.
    pub(crate) fn commit(&mut self, batch: Batch) -> Result<(), Refused> {
        let mut messages = batch.messages;
        messages.answer_last();
        messages.add("ending the batch", BATCH_END, 0, &fixed(0, 10), |_| {});
        self.socket.do_all(messages, true)
    }

    /// Forgets all connections whose mark is this one under the mask; success where there are none.
    pub(crate) fn forget_connections(&mut self, mark: u32, mask: u32) -> Result<(), Refused> {
        let mut messages = Messages::default();
        let what = "forgetting a microVM's connections (does the kernel have nf_conntrack_netlink?)";
        messages.add(what, DELETE_CONNECTION, 0, &fixed(0, 0), |to| {
            to.be32(CONNECTION_MARK, mark).be32(CONNECTION_MARK_MASK, mask);
        });
        self.socket.do_all(messages, false)
    }

    /// The comment of a table; `None` if there is no such table.
    pub(crate) fn table_comment(&mut self, table: Table) -> Result<Option<String>, Refused> {
        let mut question = Messages::default();
        let what = format!("looking for table {}", table.name);
        question.add(what, GET_TABLE, 0, &fixed(table.family.number(), 0), |to| {
            to.text(1, table.name);
        });
        let mut comment = String::new();
        let told = self.socket.ask(question, |_, body| {
            let of = body.get(4..).and_then(|rest| attribute(rest, 6));
            comment = of.and_then(comment_of).unwrap_or_default();
        });
        match told {
            Ok(()) => Ok(Some(comment)),
            Err(refused) if refused.code() == libc::ENOENT => Ok(None),
            Err(refused) => Err(refused),
        }
    }

    /// All elements of a set.
    pub(crate) fn elements(&mut self, table: Table, set: &str) -> Result<Vec<Seen>, Refused> {
        self.get(table, set, DUMP, None)
    }

    /// One element; `None` if it is not there.
    pub(crate) fn element(&mut self, table: Table, set: &str, key: &[u8]) -> Result<Option<Seen>, Refused> {
        match self.get(table, set, 0, Some(key)) {
            Ok(seen) => Ok(seen.into_iter().next()),
            Err(refused) if refused.code() == libc::ENOENT => Ok(None),
            Err(refused) => Err(refused),
        }
    }

    fn get(&mut self, table: Table, set: &str, flags: u16, key: Option<&[u8]>) -> Result<Vec<Seen>, Refused> {
        let mut question = Messages::default();
        let what = format!("reading set {set}");
        question.add(what, GET_ELEMENT, flags, &fixed(table.family.number(), 0), |to| {
            to.text(1, table.name).text(2, set);
            if let Some(key) = key {
                to.nest(3, |list| Element::of(key.to_vec()).write(list, true));
            }
        });
        let mut seen = Vec::new();
        self.socket.ask(question, |_, body| {
            let list = body.get(4..).and_then(|rest| attribute(rest, 3)).unwrap_or_default();
            seen.extend(attributes(list).filter_map(|(_, element)| Seen::parse(element)));
        })?;
        Ok(seen)
    }
}

/// An element as the kernel tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) key: Vec<u8>,
    pub(crate) data: Option<Vec<u8>>,
    pub(crate) is_end: bool,
    pub(crate) has_timeout: bool,
    pub(crate) comment: Option<String>,
    /// Of a counter.
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
}

impl Seen {
    fn parse(element: &[u8]) -> Option<Self> {
        let value = |kind| {
            attribute(element, kind)
                .and_then(|data| attribute(data, 1))
                .map(<[u8]>::to_vec)
        };
        let expression = attribute(element, 7)
            .and_then(|nest| attribute(nest, 2))
            .unwrap_or_default();
        let number = |kind| {
            let bytes = attribute(expression, kind)?;
            Some(u64::from_be_bytes(bytes.try_into().ok()?))
        };
        Some(Self {
            key: value(1)?,
            data: value(2),
            is_end: attribute(element, 3).is_some_and(|flags| flags.last() == Some(&1)),
            has_timeout: attribute(element, 4).is_some(),
            comment: attribute(element, 6).and_then(comment_of),
            bytes: number(1).unwrap_or(0),
            packets: number(2).unwrap_or(0),
        })
    }
}
