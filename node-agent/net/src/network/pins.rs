//! Addresses that names resolved to: pinned for a while, and gone with the policy that has the name.

use super::{Attached, Network, NetworkError, State};
use crate::{
    elements,
    explain::Pinned,
    nft::{Batch, Element, Nft},
    policy::DnsName,
    slot::Slot,
    table::INET,
};
use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

/// Pins kept per VM; the oldest go for the newest.
const MAX_PINS: usize = 1024;

/// A pin that the kernel has, or had until it went by itself.
#[derive(Debug)]
pub(super) struct Pin {
    pub(super) set: &'static str,
    pub(super) key: Vec<u8>,
    /// As it was made, and until when it lasts; not known of one that was adopted.
    made: Option<(Element, Instant)>,
}

impl Pin {
    pub(super) fn adopted(set: &'static str, key: Vec<u8>) -> Self {
        Self { set, key, made: None }
    }

    fn is_of(&self, set: &str, element: &Element) -> bool {
        self.set == set && self.key == element.key
    }

    /// It says the same, and half of what this one would last is left.
    fn is_enough_for(&self, element: &Element, now: Instant) -> bool {
        self.made.as_ref().is_some_and(|(made, until)| {
            until.saturating_duration_since(now) >= time_of(element) / 2
                && made.data == element.data
                && made.comment == element.comment
        })
    }
}

fn time_of(element: &Element) -> Duration {
    Duration::from_millis(element.timeout.unwrap_or(0))
}

impl Network {
    /// Lets a VM reach an address that a name of its policy resolved to, for `lifetime` and up to as long again. False if no
    /// rule is for the name, or if the address is one that a name may not stand for (rebinding).
    ///
    /// # Errors
    /// The kernel's.
    pub fn pin(&self, slot: Slot, name: &DnsName, address: IpAddr, lifetime: Duration) -> Result<bool, NetworkError> {
        Ok(self.pin_all(slot, name, &[(address, lifetime)])? == 1)
    }

    /// The same for all addresses of one answer, in one transaction; how many different ones are pinned now. The kernel is
    /// not asked where a pin lasts long enough: they are made for twice their lifetime.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pin_all(&self, slot: Slot, name: &DnsName, addresses: &[(IpAddr, Duration)]) -> Result<usize, NetworkError> {
        let mut state = self.lock();
        let State { attached, nft, .. } = &mut *state;
        let none = NetworkError::NotAttached { slot: slot.number() };
        let attached = attached.get_mut(&slot.number()).ok_or(none)?;
        let allowed = addresses
            .iter()
            .filter(|(address, _)| !crate::policy::is_never(*address) && !crate::policy::is_private(*address));
        let mut wanted = elements::pins(&attached.place, &attached.policy, attached.generation, name, allowed);
        wanted.sort_unstable();
        wanted.dedup_by(|(set, element), (before, kept)| (&*set, &element.key) == (&*before, &kept.key));
        let now = Instant::now();
        let missing: Vec<&(&'static str, Element)> = wanted
            .iter()
            .filter(|(set, element)| {
                let mut known = attached.pins.iter();
                !known.any(|pin| pin.is_of(set, element) && pin.is_enough_for(element, now))
            })
            .collect();
        if missing.is_empty() {
            return Ok(wanted.len());
        }
        let (mut batch, mut bare) = (Batch::new(), Batch::new());
        for (set, element) in &missing {
            let is_known = attached.pins.iter().any(|pin| pin.is_of(set, element));
            // A pin that is there keeps its time in the kernel: it is made anew, for the longer time.
            if is_known && nft.element(INET, set, &element.key)?.is_some() {
                batch.delete_elements(INET, set, std::slice::from_ref(element));
            }
            batch.add_elements(INET, set, std::slice::from_ref(element));
            bare.add_elements(INET, set, std::slice::from_ref(element));
        }
        let is_new = match nft.commit(batch) {
            // One went by itself between the look and the change; others keep the time that they had.
            Err(refused) if refused.code() == libc::ENOENT => nft.commit(bare).map(|()| false)?,
            other => other.map(|()| true)?,
        };
        attached
            .pins
            .retain(|pin| !missing.iter().any(|(set, element)| pin.is_of(set, element)));
        attached.pins.extend(missing.iter().map(|(set, element)| {
            let until = now.checked_add(time_of(element)).filter(|_| is_new);
            Pin {
                set,
                key: element.key.clone(),
                made: until.map(|until| (element.clone(), until)),
            }
        }));
        let too_many = attached.pins.len().saturating_sub(MAX_PINS);
        remove(nft, attached.pins.drain(..too_many).collect());
        Ok(wanted.len())
    }

    /// The addresses that are pinned for a VM now, with the names that they were resolved for.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pins(&self, slot: Slot) -> Result<Pinned, NetworkError> {
        let mut state = self.lock();
        let none = NetworkError::NotAttached { slot: slot.number() };
        let attached = state.attached.get(&slot.number()).ok_or(none)?;
        let mark = elements::mark(&attached.place, attached.generation).to_ne_bytes();
        let mut pinned = Pinned::new();
        for set in ["pins4", "pins6"] {
            for seen in state.nft.elements(INET, set)? {
                let address = seen.key.strip_prefix(&mark[..]).and_then(|bytes| {
                    let of4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
                    of4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
                });
                let name = seen.comment.and_then(|name| name.parse::<DnsName>().ok());
                pinned.extend(address.zip(name));
            }
        }
        Ok(pinned)
    }
}

/// Removes the pins of a policy that is no longer in force.
pub(super) fn unpin(nft: &mut Nft, attached: &mut Attached) {
    remove(nft, std::mem::take(&mut attached.pins));
}

fn remove(nft: &mut Nft, pins: Vec<Pin>) {
    let batch_of = |pins: &[Pin]| {
        let mut batch = Batch::new();
        for pin in pins {
            batch.delete_elements(INET, pin.set, &[Element::of(pin.key.clone())]);
        }
        batch
    };
    if pins.is_empty() || nft.commit(batch_of(&pins)).is_ok() {
        return;
    }
    // Some have gone by themselves, which is as good.
    for pin in &pins {
        let _ = nft.commit(batch_of(std::slice::from_ref(pin)));
    }
}
