//! The numbered set of tap, MAC and addresses that one VM holds.

use std::{fmt, net::Ipv4Addr, str::FromStr};

/// Slots of a blade: /30 networks in [`BASE`]/16.
pub const MAX_SLOTS: u16 = 16_384;
/// First address of the slots' networks: shared address space (RFC 6598), seen only inside the guests' namespace.
const BASE: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 0);
/// Each network holds its own address, the host's, the guest's and the broadcast.
const PREFIX_LENGTH: u8 = 30;
/// Bytes of an interface's name (netdevice(7): IFNAMSIZ is 16 with the closing NUL).
const MAX_NAME: usize = 15;

/// Number of a slot, 0 to [`MAX_SLOTS`] - 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u16);

impl Slot {
    /// The slot with this number; `None` from [`MAX_SLOTS`] on.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        (number < MAX_SLOTS).then_some(Self(number))
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u16 {
        self.0
    }

    /// `fa` + number.
    #[must_use]
    pub fn tap(self) -> TapName {
        TapName(format!("fa{}", self.0))
    }

    /// The guest's MAC: locally administered, unicast, `02:fa:00:00:` + number.
    #[must_use]
    pub fn guest_mac(self) -> String {
        let [high, low] = self.0.to_be_bytes();
        format!("02:fa:00:00:{high:02x}:{low:02x}")
    }

    /// Address of the tap.
    #[must_use]
    pub fn host_address(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(BASE.to_bits() + u32::from(self.0) * 4 + 1)
    }

    /// Address of the guest.
    #[must_use]
    pub fn guest_address(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(BASE.to_bits() + u32::from(self.0) * 4 + 2)
    }

    /// Length of both addresses' network prefix.
    #[must_use]
    pub fn prefix_length(self) -> u8 {
        PREFIX_LENGTH
    }

    pub(crate) fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - PREFIX_LENGTH))
    }
}

/// Name of a tap: 1 to 15 bytes of `[A-Za-z0-9_-]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TapName(String);

/// A text that is no tap's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no name of a tap: 1 to {MAX_NAME} of [A-Za-z0-9_-] are allowed")]
pub struct TapNameError {
    text: String,
}

impl TapName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TapName {
    type Err = TapNameError;

    fn from_str(text: &str) -> Result<Self, TapNameError> {
        let fits = (1..=MAX_NAME).contains(&text.len());
        if fits
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        {
            Ok(Self(text.to_owned()))
        } else {
            Err(TapNameError { text: text.to_owned() })
        }
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_slot_names_its_tap_and_addresses() {
        let slot = Slot::new(300).unwrap();
        assert_eq!(slot.tap().as_str(), "fa300");
        assert_eq!(slot.guest_mac(), "02:fa:00:00:01:2c");
        assert_eq!(slot.host_address(), Ipv4Addr::new(100, 64, 4, 177));
        assert_eq!(slot.guest_address(), Ipv4Addr::new(100, 64, 4, 178));
        assert_eq!(slot.netmask(), Ipv4Addr::new(255, 255, 255, 252));
    }

    #[test]
    fn no_two_slots_share_anything() {
        let (mut taps, mut macs, mut addresses) = (HashSet::new(), HashSet::new(), HashSet::new());
        for slot in (0..MAX_SLOTS).filter_map(Slot::new) {
            assert_eq!(slot.tap().as_str().parse(), Ok(slot.tap()));
            assert!(taps.insert(slot.tap()) && macs.insert(slot.guest_mac()));
            assert!(addresses.insert(slot.host_address()) && addresses.insert(slot.guest_address()));
        }
        assert_eq!(Slot::new(MAX_SLOTS), None);
    }

    #[test]
    fn texts_that_are_no_interface_names_are_refused() {
        for text in ["", "sixteen-bytes-xx", "a/b", "a b", "..", "fa%d", "fä"] {
            assert!(text.parse::<TapName>().is_err(), "{text}");
        }
        assert!("fifteen-bytes-x".parse::<TapName>().is_ok());
    }
}
