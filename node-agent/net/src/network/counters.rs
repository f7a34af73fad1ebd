//! What passed and what did not, per VM, as the kernel counts.

use super::{Network, NetworkError};
use crate::{
    elements,
    nft::Seen,
    slot::{Slot, Wiring},
    table::{self, BRIDGE, INET},
};
use std::collections::BTreeMap;

/// What passed, and what did not, since the VM was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Let through the anti-spoof rules.
    pub sent: Count,
    /// To the guest.
    pub received: Count,
    /// Dropped: not the VM's MAC or address, or frames that guests have no right to.
    pub spoofed: Count,
    /// Dropped: above a limit.
    pub limited: Count,
    /// Dropped: no rule lets it.
    pub denied: Count,
}

/// Of a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes, link headers not included.
    pub bytes: u64,
}

impl Count {
    fn of(seen: &Seen) -> Self {
        Self {
            packets: seen.packets,
            bytes: seen.bytes,
        }
    }
}

impl Network {
    /// What a VM sent, received, and was refused.
    ///
    /// # Errors
    /// The kernel's.
    pub fn counters(&self, slot: Slot) -> Result<Counters, NetworkError> {
        let mut state = self.lock();
        let none = NetworkError::NotAttached { slot: slot.number() };
        let place = state.attached.get(&slot.number()).ok_or(none)?.place.clone();
        let key = elements::lasting_mark(&place).to_ne_bytes();
        let name = table::name_key(place.tap.as_str());
        let table = match place.wiring {
            Wiring::Routed => INET,
            Wiring::Bridged => BRIDGE,
        };
        let mut of = |table, set, key: &[u8]| -> Result<Count, NetworkError> {
            let seen = state.nft.element(table, set, key)?;
            Ok(seen.map_or(Count::default(), |seen| Count::of(&seen)))
        };
        Ok(Counters {
            sent: of(INET, "sent", &key)?,
            received: of(table, "received", &name)?,
            spoofed: of(table, "spoofed", &name)?,
            limited: of(INET, "limited", &key)?,
            denied: of(INET, "denied", &key)?,
        })
    }

    /// The same of all VMs, in seven questions to the kernel however many they are.
    ///
    /// # Errors
    /// The kernel's.
    pub fn all_counters(&self) -> Result<BTreeMap<Slot, Counters>, NetworkError> {
        let mut state = self.lock();
        let mut by_key = |table, set| -> Result<BTreeMap<Vec<u8>, Count>, NetworkError> {
            let seen = state.nft.elements(table, set)?;
            Ok(seen
                .into_iter()
                .map(|seen| (seen.key.clone(), Count::of(&seen)))
                .collect())
        };
        let (sent, limited, denied) = (by_key(INET, "sent")?, by_key(INET, "limited")?, by_key(INET, "denied")?);
        let (mut received, mut spoofed) = (by_key(INET, "received")?, by_key(INET, "spoofed")?);
        received.extend(by_key(BRIDGE, "received")?);
        spoofed.extend(by_key(BRIDGE, "spoofed")?);
        let of = |counts: &BTreeMap<Vec<u8>, Count>, key: &[u8]| counts.get(key).copied().unwrap_or_default();
        let attached = state.attached.values().map(|attached| {
            let mark = elements::lasting_mark(&attached.place).to_ne_bytes();
            let name = table::name_key(attached.place.tap.as_str());
            let counters = Counters {
                sent: of(&sent, &mark),
                received: of(&received, &name),
                spoofed: of(&spoofed, &name),
                limited: of(&limited, &mark),
                denied: of(&denied, &mark),
            };
            (attached.place.slot, counters)
        });
        Ok(attached.collect())
    }
}
