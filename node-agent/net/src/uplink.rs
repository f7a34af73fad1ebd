//! The way from the guests' namespace to the blade's own: a pair of links, a default route, and masquerading on the blade.
//!
//! What the blade itself does with such packets (bond, VLAN, firewall, whether it forwards at all) is the system's: this
//! adds a link and one table that concerns nobody else's packets, and changes no sysctl. The blade itself takes nothing from
//! this link but neighbour discovery: a guest that may reach the blade's network does not reach the blade.

use crate::{
    links::Links,
    netns::GuestNetns,
    network::{Network, NetworkError},
    nft::{
        Batch, Family, Hook, INPUT, Nft, POSTROUTING, Table,
        expression::{Base, Expression, Meta, R0, Verdict},
    },
    table::name_key,
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

/// Both ends; neither begins as a guest's tap does.
pub const INNER: &str = "up0";
/// The blade's end.
pub const OUTER: &str = "tb-guests";
/// Of the range of the slots, so that no guest's rule reaches them.
pub(crate) const INNER_ADDRESS: Ipv4Addr = Ipv4Addr::new(100, 127, 255, 254);
pub(crate) const OUTER_ADDRESS: Ipv4Addr = Ipv4Addr::new(100, 127, 255, 253);
pub(crate) const PREFIX: u8 = 30;
/// Beside the slots' fdfa:fa::/64.
const INNER_ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfdfa, 0xfa, 0, 0xffff, 0, 0, 0, 2);
const OUTER_ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfdfa, 0xfa, 0, 0xffff, 0, 0, 0, 1);
const PREFIX6: u8 = 64;
const TABLE: Table = Table {
    family: Family::Inet,
    name: "far-uplink",
};
/// The kernel takes a namespace that nobody holds any more apart by and by; until then its end of the pair is there.
const STALE_LIMIT: Duration = Duration::from_secs(10);
const STALE_PAUSE: Duration = Duration::from_millis(20);

/// What the blade's own packets leave by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WayOut {
    /// Name of the link, of a bond or VLAN as well.
    pub link: String,
    /// Its MTU, bytes.
    pub mtu: u32,
}

/// Looks for the blade's way out: its default route. Changes nothing.
///
/// # Errors
/// The kernel's.
pub fn way_out(blade: &GuestNetns) -> Result<Option<WayOut>, NetworkError> {
    let found = blade.run_inside(|| Links::open()?.way_out())??;
    Ok(found.map(|(link, mtu)| WayOut { link, mtu }))
}

impl Network {
    /// Connects the guests' namespace with `blade`, and lets packets pass between taps and the new link. The blade must
    /// forward (`net.ipv4.ip_forward`). A connection that is there is kept.
    ///
    /// # Errors
    /// The kernel's; `EEXIST` where another far-node of this blade has its guests behind a link of that name.
    pub fn connect_uplink(&self, blade: &GuestNetns) -> Result<(), NetworkError> {
        let Some(guests) = self.netns() else { return Ok(()) };
        let options = self.options();
        if guests.run_inside(|| Links::open()?.find(INNER))??.is_none() {
            make_pair(guests, blade, options.mtu)?;
        }
        let (mut inner, mut outer) = (
            vec![(IpAddr::V4(INNER_ADDRESS), PREFIX)],
            vec![(IpAddr::V4(OUTER_ADDRESS), PREFIX)],
        );
        if options.has_ipv6 {
            inner.push((INNER_ADDRESS6.into(), PREFIX6));
            outer.push((OUTER_ADDRESS6.into(), PREFIX6));
        }
        let gateways: Vec<IpAddr> = outer.iter().map(|(address, _)| *address).collect();
        blade.run_inside(|| -> Result<(), NetworkError> {
            // The table first: the link is never up without it.
            Nft::open()?.commit(table())?;
            Ok(Links::open()?.connect_end(OUTER, &outer, &[])?)
        })??;
        guests.run_inside(|| Links::open()?.connect_end(INNER, &inner, &gateways))??;
        self.forward()
    }
}

fn make_pair(guests: &GuestNetns, blade: &GuestNetns, mtu: u32) -> Result<(), NetworkError> {
    let give_up = Instant::now() + STALE_LIMIT;
    loop {
        match guests.run_inside(|| Links::open()?.make_pair(INNER, OUTER, blade.file(), mtu))? {
            Ok(()) => return Ok(()),
            Err(refused) if refused.code() == libc::EEXIST && Instant::now() < give_up => {}
            Err(refused) => return Err(refused.into()),
        }
        // The end of a namespace is told nowhere.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(STALE_PAUSE);
    }
}

/// The blade's table: what comes from guests is not for the blade, and leaves it under its own address.
fn table() -> Batch {
    let mut batch = Batch::new();
    batch.table(TABLE);
    batch.delete_table(TABLE);
    batch.table(TABLE);
    let hook = |number, priority, kind| Hook { number, priority, kind };
    batch.chain(TABLE, "nat", Some(hook(POSTROUTING, 100, "nat")));
    batch.chain(TABLE, "input", Some(hook(INPUT, 0, "filter")));
    // By the one source that they all have after their own masquerading: an incoming link is not known any more here.
    for (family, offset, address) in [
        (2, 12, INNER_ADDRESS.octets().to_vec()),
        (10, 8, INNER_ADDRESS6.octets().to_vec()),
    ] {
        let source = Expression::Payload {
            base: Base::Network,
            offset,
            length: u32::try_from(address.len()).unwrap_or(4),
            to: R0,
        };
        let rule = [
            vec![meta(Meta::NfProtocol), equals(&[family]), source, equals(&address)],
            vec![Expression::Masquerade],
        ];
        batch.rule(TABLE, "nat", &rule.concat());
    }
    let from_guests = vec![meta(Meta::InName), equals(&name_key(OUTER))];
    // Neighbour solicitation and advertisement.
    for kind in [135, 136] {
        let neighbour = vec![
            meta(Meta::Protocol),
            equals(&[58]),
            Expression::Payload {
                base: Base::Transport,
                offset: 0,
                length: 1,
                to: R0,
            },
            equals(&[kind]),
            Expression::Verdict(Verdict::Accept),
        ];
        batch.rule(TABLE, "input", &[from_guests.clone(), neighbour].concat());
    }
    batch.rule(
        TABLE,
        "input",
        &[from_guests, vec![Expression::Verdict(Verdict::Drop)]].concat(),
    );
    batch
}

fn meta(key: Meta) -> Expression {
    Expression::Meta { key, to: R0 }
}

fn equals(value: &[u8]) -> Expression {
    Expression::Compare {
        register: R0,
        is_equal: true,
        value: value.to_vec(),
    }
}
