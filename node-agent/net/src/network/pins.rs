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
use std::{net::IpAddr, time::Duration};

/// Pins kept per VM; the oldest goes for the newest.
const MAX_PINS: usize = 1024;

impl Network {
    /// Lets a VM reach an address that a name of its policy resolved to, for `lifetime`. False if no rule is for the name,
    /// or if the address is one that a name may not stand for (rebinding).
    ///
    /// # Errors
    /// The kernel's.
    pub fn pin(&self, slot: Slot, name: &DnsName, address: IpAddr, lifetime: Duration) -> Result<bool, NetworkError> {
        let mut state = self.lock();
        let State { attached, nft, .. } = &mut *state;
        let none = NetworkError::NotAttached { slot: slot.number() };
        let attached = attached.get_mut(&slot.number()).ok_or(none)?;
        if crate::policy::is_never(address) || crate::policy::is_private(address) {
            return Ok(false);
        }
        let milliseconds = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
        let Attached {
            place,
            policy,
            generation,
            ..
        } = &*attached;
        let Some((table, set, element)) = elements::pin(place, policy, *generation, name, address, milliseconds) else {
            return Ok(false);
        };
        let key = (set, element.key.clone());
        // A pin that is there keeps its time in the kernel: it is made anew, for the longer time.
        let mut batch = Batch::new();
        if nft.element(table, set, &element.key)?.is_some() {
            batch.delete_elements(table, set, std::slice::from_ref(&element));
        }
        batch.add_elements(table, set, std::slice::from_ref(&element));
        match nft.commit(batch) {
            // It went by itself between the look and the change.
            Err(refused) if refused.code() == libc::ENOENT => {
                let mut again = Batch::new();
                again.add_elements(table, set, &[element]);
                nft.commit(again)?;
            }
            other => other?,
        }
        attached.pins.retain(|pin| *pin != key);
        if attached.pins.len() >= MAX_PINS {
            let (set, key) = attached.pins.remove(0);
            let mut batch = Batch::new();
            batch.delete_elements(INET, set, &[Element::of(key)]);
            // One that has gone by itself is as good.
            let _ = nft.commit(batch);
        }
        attached.pins.push(key);
        Ok(true)
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

/// Removes the pins of a policy that is no longer in force; those that went by themselves are gone already.
pub(super) fn unpin(nft: &mut Nft, attached: &mut Attached) {
    for (set, key) in attached.pins.drain(..) {
        let mut batch = Batch::new();
        batch.delete_elements(INET, set, &[Element::of(key)]);
        let _ = nft.commit(batch);
    }
}
