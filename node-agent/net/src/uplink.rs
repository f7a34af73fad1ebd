//! The way from the guests' namespace to the blade's own: a pair of links, a default route, and masquerading on the blade.
//!
//! What the blade itself does with such packets (bond, VLAN, firewall, whether it forwards at all) is the system's: this
//! adds a link and one table that concerns nobody else's packets, and changes no sysctl.

use crate::{
    links::Links,
    netns::GuestNetns,
    network::{Network, NetworkError},
    nft::{
        Batch, Family, Hook, Nft, POSTROUTING, Table,
        expression::{Base, Expression, Meta, R0},
    },
};
use std::net::Ipv4Addr;

/// Both ends; neither begins as a guest's tap does.
pub const INNER: &str = "up0";
/// The blade's end.
pub const OUTER: &str = "tb-guests";
/// Of the range of the slots, so that no guest's rule reaches them.
pub(crate) const INNER_ADDRESS: Ipv4Addr = Ipv4Addr::new(100, 127, 255, 254);
pub(crate) const OUTER_ADDRESS: Ipv4Addr = Ipv4Addr::new(100, 127, 255, 253);
pub(crate) const PREFIX: u8 = 30;
const TABLE: Table = Table {
    family: Family::Inet,
    name: "far-uplink",
};

impl Network {
    /// Connects the guests' namespace with `blade`, IPv4 only, and lets packets pass between taps and the new link. The
    /// blade must forward (`net.ipv4.ip_forward`). A connection that is there is kept.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect_uplink(&self, blade: &GuestNetns) -> Result<(), NetworkError> {
        let Some(guests) = self.netns() else { return Ok(()) };
        let is_there = guests.run_inside(|| Links::open()?.find(INNER))??.is_some();
        if !is_there {
            guests.run_inside(|| Links::open()?.make_pair(INNER, OUTER, blade.file()))??;
        }
        blade.run_inside(|| -> Result<(), NetworkError> {
            Links::open()?.connect_end(OUTER, OUTER_ADDRESS, PREFIX, None)?;
            Ok(Nft::open()?.commit(masquerade())?)
        })??;
        guests.run_inside(|| Links::open()?.connect_end(INNER, INNER_ADDRESS, PREFIX, Some(OUTER_ADDRESS)))??;
        self.forward()
    }
}

/// Of the guests' packets only: by the one source that they all have after their own masquerading.
fn masquerade() -> Batch {
    let mut batch = Batch::new();
    batch.table(TABLE);
    batch.delete_table(TABLE);
    batch.table(TABLE);
    let hook = Hook {
        number: POSTROUTING,
        priority: 100,
        kind: "nat",
    };
    batch.chain(TABLE, "nat", Some(hook));
    let equals = |value: &[u8]| Expression::Compare {
        register: R0,
        is_equal: true,
        value: value.to_vec(),
    };
    let rule = [
        Expression::Meta {
            key: Meta::NfProtocol,
            to: R0,
        },
        equals(&[2]),
        Expression::Payload {
            base: Base::Network,
            offset: 12,
            length: 4,
            to: R0,
        },
        equals(&INNER_ADDRESS.octets()),
        Expression::Masquerade,
    ];
    batch.rule(TABLE, "nat", &rule);
    batch
}
