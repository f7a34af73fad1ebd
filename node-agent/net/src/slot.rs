//! The numbered set of tap, MAC and addresses that one VM holds.

use crate::table::SLOTS6;
use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// Slots of a blade: /30 networks in [`BASE`]/16.
pub const MAX_SLOTS: u16 = 16_384;
/// First address of the slots' networks: shared address space (RFC 6598), seen only inside the guests' namespace.
const BASE: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 0);
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

    /// Address of the guest.
    #[must_use]
    pub fn guest_address(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(BASE.to_bits() + u32::from(self.0) * 4 + 2)
    }

    /// IPv6 address of the guest, as the blade sees it.
    #[must_use]
    pub fn address6(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(SLOTS6 + u128::from(self.0) + 1)
    }

    /// The guest's vsock CID where CIDs are shared by the blade's VMs (vhost-vsock): 0 to 2 have a meaning (vsock(7)).
    #[must_use]
    pub fn cid(self) -> u32 {
        u32::from(self.0) + 3
    }

    /// The slot of a tap's name; `None` for names that are no slot's.
    #[must_use]
    pub fn of_tap(name: &str) -> Option<Self> {
        let number = name.strip_prefix("fa")?.parse().ok()?;
        // `fa007` and `fa+7` are numbers too, and other names.
        Self::new(number).filter(|slot| slot.tap().as_str() == name)
    }
}

/// What a guest of any slot is told, so that a snapshot of it wakes on any other slot and has nothing to change.
///
/// Link-local addresses, which no packet carries beyond the tap: `inet far` exchanges them for the slot's.
pub const GUEST: Guest = Guest {
    mac: [0x02, 0xfa, 0, 0, 0, 1],
    address: Ipv4Addr::new(169, 254, 77, 2),
    // fd00:fa:77::2
    address6: Some(Ipv6Addr::new(0xfd00, 0xfa, 0x77, 0, 0, 0, 0, 2)),
};
/// The blade as every guest sees it: router and DNS server. It is on the loopback of the guests' namespace.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);
/// The same on each tap.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Length of the prefix of [`GUEST`]'s address, with [`GATEWAY`] in it.
pub const GUEST_PREFIX: u8 = 30;

/// A guest's own side of its NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Guest {
    /// Its MAC.
    pub mac: [u8; 6],
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address, where IPv6 is wanted.
    pub address6: Option<Ipv6Addr>,
}

impl Guest {
    /// The address that the guest makes of its MAC (RFC 4291, appendix A).
    #[must_use]
    pub fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac;
        let half = |high: u8, low: u8| u16::from_be_bytes([high, low]);
        Ipv6Addr::new(
            0xfe80,
            0,
            0,
            0,
            half(a ^ 2, b),
            half(c, 0xff),
            half(0xfe, d),
            half(e, f),
        )
    }
}

/// How a tap is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wiring {
    /// A link of its own to the blade.
    Routed,
    /// A port of a bridge that others made.
    Bridged,
}

/// Where a VM is on the blade's network: everything but its policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its slot.
    pub slot: Slot,
    /// Its tap.
    pub tap: TapName,
    /// How the tap is connected.
    pub wiring: Wiring,
    /// What the guest has.
    pub guest: Guest,
    /// What the blade sees of it: the slot's address.
    pub address: Ipv4Addr,
    /// The same.
    pub address6: Option<Ipv6Addr>,
}

impl Place {
    /// On a routed tap with [`GUEST`]'s addresses.
    #[must_use]
    pub fn routed(slot: Slot, has_ipv6: bool) -> Self {
        let address6 = has_ipv6.then(|| slot.address6());
        Self {
            slot,
            tap: slot.tap(),
            wiring: Wiring::Routed,
            guest: Guest {
                address6: GUEST.address6.filter(|_| has_ipv6),
                ..GUEST
            },
            address: slot.guest_address(),
            address6,
        }
    }

    /// On a bridge's port, with the addresses that the guest was given there.
    #[must_use]
    pub fn bridged(slot: Slot, tap: TapName, guest: Guest) -> Self {
        let (address, address6) = (guest.address, guest.address6);
        Self {
            slot,
            tap,
            wiring: Wiring::Bridged,
            guest,
            address,
            address6,
        }
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
    use std::{collections::HashSet, net::IpAddr};

    #[test]
    fn a_slot_names_its_tap_and_addresses() {
        let slot = Slot::new(300).unwrap();
        assert_eq!(slot.tap().as_str(), "fa300");
        assert_eq!(slot.guest_address(), Ipv4Addr::new(100, 64, 4, 178));
        assert_eq!(slot.cid(), 303);
    }

    #[test]
    fn no_two_slots_share_anything() {
        let (mut taps, mut cids, mut addresses) = (HashSet::new(), HashSet::new(), HashSet::new());
        for slot in (0..MAX_SLOTS).filter_map(Slot::new) {
            assert_eq!(slot.tap().as_str().parse(), Ok(slot.tap()));
            assert!(taps.insert(slot.tap()) && cids.insert(slot.cid()));
            assert!(addresses.insert(slot.guest_address().into()) && addresses.insert(IpAddr::V6(slot.address6())));
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
