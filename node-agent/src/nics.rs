//! NICs of the microVMs: one slot (tap, addresses, MAC) per VM, in a network namespace without uplink.
//!
//! VMs that an earlier far-node started keep their namespace and tap until they end; the slots here are those of the
//! namespace that this far-node made.

use crate::{
    names::VmId,
    outcome::{MAX_MESSAGE, clean_text},
};
use far_net::{GuestNetns, Slot};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

/// Where far-vmm finds the namespace: its standard input. A path into this process would be gone if far-node is killed
/// before far-vmm opens it.
const INHERITED: &str = "/proc/self/fd/0";

/// A guest's NIC, as the ledger keeps it and the guest is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// By which the guest finds the link.
    pub mac: [u8; 6],
    /// CIDR of the guest.
    pub address: String,
}

/// What a VM's description needs of its NIC.
#[derive(Debug, Clone)]
pub(crate) struct Attachment {
    pub(crate) tap: String,
    pub(crate) mac: String,
    pub(crate) netns: PathBuf,
    pub(crate) nic: Nic,
}

/// The blade's NICs, or why there are none.
#[derive(Debug)]
pub struct Nics {
    netns: Result<GuestNetns, String>,
    slots: Mutex<BTreeMap<u16, VmId>>,
}

impl Nics {
    /// NICs where this machine allows them. Blocking.
    #[must_use]
    pub fn open() -> Self {
        let netns = GuestNetns::create().map_err(|error| {
            let fix = match &error {
                far_net::NetError::NoNic(lack) => format!(" (cure: {})", lack.fix()),
                _ => String::new(),
            };
            clean_text(&format!("{error}{fix}: vsock only"), MAX_MESSAGE)
        });
        Self {
            netns,
            slots: Mutex::default(),
        }
    }

    /// No NICs, by the owner's wish.
    #[must_use]
    pub fn none(reason: &str) -> Self {
        Self {
            netns: Err(reason.to_owned()),
            slots: Mutex::default(),
        }
    }

    /// Why VMs have no NIC; `None` where they have one.
    #[must_use]
    pub fn lack(&self) -> Option<&str> {
        self.netns.as_ref().err().map(String::as_str)
    }

    /// Makes the VM's tap; the sentence says why it goes without. Blocking.
    pub(crate) fn attach(&self, vm: &VmId) -> Result<Attachment, String> {
        let netns = self.netns.as_ref().map_err(Clone::clone)?;
        let slot = self
            .take(vm)
            .ok_or("no NIC for this microVM: all network slots are in use")?;
        let tap = netns.create_tap(slot).map_err(|error| {
            self.forget(vm);
            clean_text(&format!("no NIC for this microVM: {error}"), MAX_MESSAGE)
        })?;
        let [high, low] = slot.number().to_be_bytes();
        let nic = Nic {
            // As Slot::guest_mac writes it.
            mac: [0x02, 0xfa, 0, 0, high, low],
            address: format!("{}/{}", slot.guest_address(), slot.prefix_length()),
        };
        Ok(Attachment {
            tap: tap.as_str().to_owned(),
            mac: slot.guest_mac(),
            netns: INHERITED.into(),
            nic,
        })
    }

    /// The namespace for a VM that was attached, as far-vmm's standard input.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn netns_of(&self, vm: &VmId) -> io::Result<Option<File>> {
        match (&self.netns, self.slot_of(vm)) {
            (Ok(netns), Some(_)) => File::open(netns.path()).map(Some),
            (Ok(_) | Err(_), _) => Ok(None),
        }
    }

    /// Removes the VM's tap, if this far-node made one. Blocking.
    ///
    /// # Errors
    /// The tap is still held; its slot stays taken.
    pub(crate) fn detach(&self, vm: &VmId) -> Result<(), far_net::NetError> {
        let (Ok(netns), Some(slot)) = (&self.netns, self.slot_of(vm)) else {
            return Ok(());
        };
        netns.delete_tap(&slot.tap())?;
        self.forget(vm);
        Ok(())
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, BTreeMap<u16, VmId>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM's slot, else the lowest free one.
    fn take(&self, vm: &VmId) -> Option<Slot> {
        if let Some(slot) = self.slot_of(vm) {
            return Some(slot);
        }
        let mut slots = self.slots();
        let number = (0..far_net::MAX_SLOTS).find(|number| !slots.contains_key(number))?;
        slots.insert(number, vm.clone());
        Slot::new(number)
    }

    fn slot_of(&self, vm: &VmId) -> Option<Slot> {
        let slots = self.slots();
        slots
            .iter()
            .find(|(_, owner)| *owner == vm)
            .and_then(|(number, _)| Slot::new(*number))
    }

    fn forget(&self, vm: &VmId) {
        self.slots().retain(|_, owner| owner != vm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::AttemptKey;

    fn vm(attempt: u32) -> VmId {
        VmId::of(&AttemptKey {
            uid: "u".into(),
            attempt,
        })
    }

    #[test]
    fn a_slot_has_one_owner_and_is_given_again_when_free() {
        let nics = Nics::none("none");
        let first = nics.take(&vm(1)).unwrap();
        assert_eq!(nics.take(&vm(1)), Some(first));
        let second = nics.take(&vm(2)).unwrap();
        assert_ne!(first, second);
        nics.forget(&vm(1));
        assert_eq!(nics.take(&vm(3)), Some(first));
    }

    #[test]
    fn without_nics_the_reason_is_told() {
        let nics = Nics::none("switched off");
        assert_eq!(nics.lack(), Some("switched off"));
        assert_eq!(nics.attach(&vm(1)).unwrap_err(), "switched off");
        assert!(nics.detach(&vm(1)).is_ok());
    }

    #[test]
    fn the_mac_told_to_the_guest_is_the_one_of_the_device() {
        for number in [0, 1, 300, far_net::MAX_SLOTS - 1] {
            let [high, low] = number.to_be_bytes();
            let told = format!("02:fa:00:00:{high:02x}:{low:02x}");
            assert_eq!(Slot::new(number).unwrap().guest_mac(), told);
        }
    }
}
