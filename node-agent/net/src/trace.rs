//! What becomes of each packet that a VM sends, as the kernel tells while it happens (nftables' own tracing).
//!
//! A table of one rule asks for it. The kernel ties that table to the socket that made it, so that nothing of a trace is left
//! however it ends; without a trace no packet meets anything of it.

use crate::{
    netlink::{attribute, attributes, read_text, read_u32},
    network::{Network, NetworkError},
    nft::{
        Batch, Family, Hook, Nft, PREROUTING, Table,
        expression::{Expression, Meta, R0},
    },
    slot::TapName,
    table::name_key,
};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

const TABLE: Table = Table {
    family: Family::Inet,
    name: "far-trace",
};
/// NFT_TABLE_F_OWNER.
const OWNED: u32 = 2;
/// NFNLGRP_NFTRACE as a bit of the old masks.
const TRACE_EVENTS: u32 = 1 << (9 - 1);
/// NFT_MSG_TRACE.
const TRACE: u16 = 10 << 8 | 17;
/// Packets a second that are traced: a hostile guest sends more, and each costs the blade a message per rule.
const RATE: u32 = 50;
/// Before the first of the static chains, after defragmentation.
const PRIORITY: i32 = -350;
/// After its last message a packet has come to its end.
const SILENCE: Duration = Duration::from_millis(200);
/// Packets that are followed at once.
const MAX_FOLLOWED: usize = 256;

/// A packet and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traced {
    /// As the guest wrote it.
    pub mac: [u8; 6],
    /// As the guest wrote it.
    pub source: IpAddr,
    /// Where to.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
    /// Bytes, from the network header on.
    pub length: u32,
    /// Whether no chain dropped it.
    pub passed: bool,
    /// The chains that it met, in order; the last one decided.
    pub chains: Vec<String>,
}

/// A trace that runs; ends when dropped.
#[derive(Debug)]
pub struct Trace {
    nft: Nft,
    followed: BTreeMap<u32, Followed>,
}

#[derive(Debug)]
struct Followed {
    last: Instant,
    head: Option<Traced>,
    chains: Vec<String>,
    is_dropped: bool,
}

impl Network {
    /// Follows what the VM behind this tap sends from now on, at most 50 packets a second.
    ///
    /// # Errors
    /// The kernel's; `EPERM` while another trace runs.
    pub fn trace(&self, tap: &TapName) -> Result<Trace, NetworkError> {
        let open = || Nft::open_for(TRACE_EVENTS);
        let mut nft = match self.netns() {
            Some(netns) => netns.run_inside(open)??,
            None => open()?,
        };
        let mut batch = Batch::new();
        batch.table_with(TABLE, OWNED, "");
        let hook = Hook {
            number: PREROUTING,
            priority: PRIORITY,
            kind: "filter",
        };
        batch.chain(TABLE, "trace", Some(hook));
        let rule = [
            Expression::Meta {
                key: Meta::InName,
                to: R0,
            },
            Expression::Compare {
                register: R0,
                is_equal: true,
                value: name_key(tap.as_str()),
            },
            Expression::Limit {
                rate: RATE.into(),
                burst: RATE,
                is_over: false,
            },
            Expression::Immediate { value: 1, to: R0 },
            Expression::SetTrace { from: R0 },
        ];
        batch.rule(TABLE, "trace", &rule);
        nft.commit(batch)?;
        Ok(Trace {
            nft,
            followed: BTreeMap::new(),
        })
    }
}

impl Trace {
    /// Packets that came to their end within `patience`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn next(&mut self, patience: Duration) -> Result<Vec<Traced>, NetworkError> {
        let now = Instant::now();
        let followed = &mut self.followed;
        let heard = self.nft.events(patience.min(SILENCE), |kind, body| {
            if kind == TRACE {
                follow(followed, body.get(4..).unwrap_or_default(), now);
            }
        });
        match heard {
            // More came than could be read: what is followed is told as far as it is known.
            Err(refused) if refused.code() == libc::ENOBUFS => {}
            other => other.map(drop)?,
        }
        let ended: Vec<u32> = followed
            .iter()
            .filter(|(_, one)| one.is_dropped || one.last.elapsed() > SILENCE)
            .map(|(id, _)| *id)
            .collect();
        let told = ended.into_iter().filter_map(|id| {
            let one = followed.remove(&id)?;
            Some(Traced {
                passed: !one.is_dropped,
                chains: one.chains,
                ..one.head?
            })
        });
        Ok(told.collect())
    }
}

/// One message: a packet met a rule, or a chain's end.
fn follow(followed: &mut BTreeMap<u32, Followed>, message: &[u8], now: Instant) {
    let Some(id) = attribute(message, 6).and_then(read_u32) else {
        return;
    };
    if followed.len() >= MAX_FOLLOWED && !followed.contains_key(&id) {
        return;
    }
    // Its own table's chain is no news.
    if attribute(message, 1).map(read_text) == Some(TABLE.name) {
        if let Some(head) = head(message) {
            followed.insert(id, Followed::new(now, Some(head)));
        }
        return;
    }
    let one = followed.entry(id).or_insert_with(|| Followed::new(now, None));
    one.last = now;
    if one.head.is_none() {
        one.head = head(message);
    }
    if let Some(chain) = attribute(message, 2).map(read_text)
        && one.chains.last().is_none_or(|last| last != chain)
    {
        one.chains.push(chain.to_owned());
    }
    let code = attribute(message, 5)
        .and_then(|verdict| attributes(verdict).find_map(|(kind, value)| (kind == 1).then_some(value)))
        .and_then(|code| <[u8; 4]>::try_from(code).ok());
    // NF_DROP of a rule; a policy's verdict comes apart, and none of ours drops.
    one.is_dropped |= code == Some([0; 4]);
}

impl Followed {
    fn new(now: Instant, head: Option<Traced>) -> Self {
        Self {
            last: now,
            head,
            chains: Vec::new(),
            is_dropped: false,
        }
    }
}

/// The headers, which the first message of a packet has.
fn head(message: &[u8]) -> Option<Traced> {
    let network = attribute(message, 8)?;
    let transport = attribute(message, 9).unwrap_or_default();
    let mac = attribute(message, 7)
        .and_then(|link| link.get(6..12)?.try_into().ok())
        .unwrap_or_default();
    let address = |range: std::ops::Range<usize>| -> Option<IpAddr> {
        let bytes = network.get(range)?;
        let of4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
        of4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
    };
    let number = |at: usize| Some(u32::from(u16::from_be_bytes(network.get(at..at + 2)?.try_into().ok()?)));
    let (source, destination, protocol, length) = match network.first()? >> 4 {
        4 => (address(12..16)?, address(16..20)?, *network.get(9)?, number(2)?),
        6 => (address(8..24)?, address(24..40)?, *network.get(6)?, number(4)? + 40),
        _ => return None,
    };
    let port = match (protocol, transport.get(2..4)) {
        (6 | 17, Some(&[high, low])) => u16::from_be_bytes([high, low]),
        _ => 0,
    };
    Some(Traced {
        mac,
        source,
        destination,
        protocol,
        port,
        length,
        passed: true,
        chains: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Attributes;

    #[test]
    fn a_packet_is_followed_from_its_head_to_its_drop_and_broken_messages_are_none() {
        let mut followed = BTreeMap::new();
        let now = Instant::now();
        let header = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 169, 254, 77, 2, 10, 0, 0, 1];
        let mut first = Attributes::default();
        first.text(1, TABLE.name).text(2, "trace").ne32(6, 7).put(8, &header);
        first.put(9, &[0, 9, 0, 53]);
        let mut last = Attributes::default();
        last.text(1, "far").text(2, "denied").ne32(6, 7).nest(5, |verdict| {
            verdict.be32(1, 0);
        });
        for length in 0..first.bytes().len() {
            follow(&mut BTreeMap::new(), &first.bytes()[..length], now);
        }
        follow(&mut followed, first.bytes(), now);
        follow(&mut followed, last.bytes(), now);
        let one = &followed[&7];
        let head = one.head.clone().unwrap();
        assert_eq!((head.port, head.length, one.is_dropped), (53, 28, true));
        assert_eq!(one.chains, ["denied"]);
    }
}
