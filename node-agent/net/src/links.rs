//! Links, routes and neighbours over rtnetlink.

use crate::{
    netlink::{
        Attributes, CREATE, DUMP, EXCLUSIVE, Messages, Protocol, REPLACE, Refused, Socket, attribute, read_text,
        read_u32,
    },
    slot::{GATEWAY, GATEWAY6, Place},
};
use std::net::IpAddr;

const UP: u32 = libc::IFF_UP as u32;
/// `struct ifinfomsg`.
const LINK_HEADER: usize = 16;
/// Attributes of `linux/if_link.h` that libc does not name: IFLA_PROTINFO, IFLA_BRPORT_ISOLATED.
const PORT_INFO: u16 = 12;
const PORT_ISOLATED: u16 = 33;
/// VETH_INFO_PEER of `linux/veth.h`.
const VETH_PEER: u16 = 1;
/// RTNLGRP_LINK as a bit of the old masks.
const LINK_EVENTS: u32 = libc::RTMGRP_LINK as u32;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) is_up: bool,
    /// Whether something holds the other end.
    pub(crate) has_carrier: bool,
    /// Index of its bridge.
    pub(crate) master: Option<u32>,
    pub(crate) mtu: u32,
}

/// What happened to a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// It is there, new or changed.
    There(Link),
    /// It is gone.
    Gone(Link),
}

/// rtnetlink of one namespace.
#[derive(Debug)]
pub(crate) struct Links {
    socket: Socket,
}

fn link_header(index: u32, flags: u32, change: u32, family: u8) -> [u8; LINK_HEADER] {
    let mut header = [0; LINK_HEADER];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

/// `struct rtmsg`: a route to one address, in the main table.
fn route_header(address: IpAddr) -> [u8; 12] {
    let (family, bits) = family(address);
    let scope = if address.is_ipv4() {
        libc::RT_SCOPE_LINK
    } else {
        libc::RT_SCOPE_UNIVERSE
    };
    [
        family,
        bits,
        0,
        0,
        libc::RT_TABLE_MAIN,
        libc::RTPROT_STATIC,
        scope,
        libc::RTN_UNICAST,
        0,
        0,
        0,
        0,
    ]
}

fn family(address: IpAddr) -> (u8, u8) {
    match address {
        IpAddr::V4(_) => (libc::AF_INET as u8, 32),
        IpAddr::V6(_) => (libc::AF_INET6 as u8, 128),
    }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

impl Links {
    /// In the calling thread's namespace.
    pub(crate) fn open() -> Result<Self, Refused> {
        Ok(Self {
            socket: Socket::open(Protocol::Route, 0)?,
        })
    }

    /// The link that a namespace's packets leave by, and its MTU: that of the default route with the lowest metric.
    pub(crate) fn way_out(&mut self) -> Result<Option<(String, u32)>, Refused> {
        let mut question = Messages::default();
        // `struct rtmsg` of any IPv4 route.
        let mut header = [0; 12];
        header[0] = libc::AF_INET as u8;
        question.add("listing routes", libc::RTM_GETROUTE, DUMP, &header, |_| {});
        let mut best: Option<(u32, u32)> = None;
        self.socket.ask(question, |_, body| {
            let Some(rest) = body
                .get(12..)
                .filter(|_| body[1] == 0 && body[4] == libc::RT_TABLE_MAIN)
            else {
                return;
            };
            let metric = attribute(rest, libc::RTA_PRIORITY).and_then(read_u32).unwrap_or(0);
            let index = attribute(rest, libc::RTA_OIF).and_then(read_u32);
            let found = index.map(|index| (metric, index));
            best = match (best, found) {
                (Some(before), Some(found)) => Some(before.min(found)),
                (before, found) => before.or(found),
            };
        })?;
        let Some((_, index)) = best else { return Ok(None) };
        let link = self.list()?.into_iter().find(|link| link.index == index);
        Ok(link.map(|link| (link.name, link.mtu)))
    }

    /// Brings a routed tap up and makes the way to its guest: the neighbour is written down, so that no answer of any
    /// guest changes it.
    pub(crate) fn bring_up(&mut self, index: u32, place: &Place, mtu: u32) -> Result<(), Refused> {
        let tap = &place.tap;
        let mut messages = Messages::default();
        messages.add(
            format!("bringing {tap} up"),
            libc::RTM_NEWLINK,
            0,
            &link_header(index, UP, UP, 0),
            |to| {
                if mtu != 0 {
                    to.ne32(libc::IFLA_MTU, mtu);
                }
            },
        );
        // Routes are looked up by the slot's address; neighbours are by the guest's, which packets have by then.
        let both = [
            Some((IpAddr::V4(place.address), IpAddr::V4(place.guest.address))),
            place.address6.map(IpAddr::V6).zip(place.guest.address6.map(IpAddr::V6)),
        ];
        for (address, guest) in both.into_iter().flatten() {
            let what = format!("making the neighbour {guest} on {tap}");
            // `struct ndmsg`: family, padding, index, state, flags, type.
            let mut header = [0; 12];
            header[0] = family(address).0;
            header[4..8].copy_from_slice(&index.to_ne_bytes());
            header[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
            messages.add(what, libc::RTM_NEWNEIGH, CREATE | REPLACE, &header, |to| {
                to.put(libc::NDA_DST, &bytes(guest))
                    .put(libc::NDA_LLADDR, &place.guest.mac);
            });
            let what = format!("routing {address} to {tap}");
            messages.add(
                what,
                libc::RTM_NEWROUTE,
                CREATE | REPLACE,
                &route_header(address),
                |to| {
                    to.put(libc::RTA_DST, &bytes(address)).ne32(libc::RTA_OIF, index);
                    if address.is_ipv4() {
                        to.put(libc::RTA_PREFSRC, &GATEWAY.octets());
                    }
                },
            );
        }
        if place.address6.is_some() {
            add_address(&mut messages, index, tap.as_str(), IpAddr::V6(GATEWAY6), 64);
        }
        self.socket.do_all(messages, false)
    }

    /// Takes the way to a guest away, then its tap down. The kernel would find the IPv4 route by itself, by walking through
    /// those of all VMs.
    pub(crate) fn disconnect(&mut self, index: u32, place: &Place) -> Result<(), Refused> {
        let mut messages = Messages::default();
        let address = IpAddr::V4(place.address);
        let what = format!("removing the route to {address}");
        messages.add(what, libc::RTM_DELROUTE, 0, &route_header(address), |to| {
            to.put(libc::RTA_DST, &bytes(address)).ne32(libc::RTA_OIF, index);
        });
        // Gone already is as good, and what is left goes with the link.
        let _ = self.socket.do_all(messages, false);
        self.take_down(index, place.tap.as_str())
    }

    /// Takes a tap down; its routes and neighbours go with that.
    pub(crate) fn take_down(&mut self, index: u32, name: &str) -> Result<(), Refused> {
        self.set_up(index, name, false)
    }

    /// Up or down and nothing else.
    pub(crate) fn set_up(&mut self, index: u32, name: &str, is_up: bool) -> Result<(), Refused> {
        let mut messages = Messages::default();
        let what = format!("taking {name} {}", if is_up { "up" } else { "down" });
        let flags = if is_up { UP } else { 0 };
        messages.add(what, libc::RTM_NEWLINK, 0, &link_header(index, flags, UP, 0), |_| {});
        self.socket.do_all(messages, false)
    }

    /// Gives loopback the address at which guests find the blade.
    pub(crate) fn add_gateway(&mut self, loopback: u32) -> Result<(), Refused> {
        let mut messages = Messages::default();
        messages.add(
            "bringing lo up",
            libc::RTM_NEWLINK,
            0,
            &link_header(loopback, UP, UP, 0),
            |_| {},
        );
        add_address(&mut messages, loopback, "lo", IpAddr::V4(GATEWAY), 32);
        self.socket.do_all(messages, false)
    }

    /// Makes a pair of links, one here, the other in the namespace of `peers`.
    pub(crate) fn make_pair(
        &mut self,
        here: &str,
        there: &str,
        peers: &std::fs::File,
        mtu: u32,
    ) -> Result<(), Refused> {
        use std::os::fd::AsRawFd;
        let mut peer = Attributes::default();
        let namespace = peers.as_raw_fd().cast_unsigned();
        peer.text(libc::IFLA_IFNAME, there)
            .ne32(libc::IFLA_NET_NS_FD, namespace);
        if mtu != 0 {
            peer.ne32(libc::IFLA_MTU, mtu);
        }
        let peer = [&link_header(0, 0, 0, 0)[..], peer.bytes()].concat();
        let mut messages = Messages::default();
        let what = format!("making the pair {here} and {there}");
        messages.add(
            what,
            libc::RTM_NEWLINK,
            CREATE | EXCLUSIVE,
            &link_header(0, 0, 0, 0),
            |to| {
                if mtu != 0 {
                    to.ne32(libc::IFLA_MTU, mtu);
                }
                to.text(libc::IFLA_IFNAME, here).nest(libc::IFLA_LINKINFO, |info| {
                    info.put(libc::IFLA_INFO_KIND, b"veth")
                        .nest(libc::IFLA_INFO_DATA, |data| {
                            data.put(VETH_PEER, &peer);
                        });
                });
            },
        );
        self.socket.do_all(messages, false)
    }

    /// Gives a link its addresses, brings it up, and makes the gateways the way to everywhere.
    pub(crate) fn connect_end(
        &mut self,
        name: &str,
        addresses: &[(IpAddr, u8)],
        gateways: &[IpAddr],
    ) -> Result<(), Refused> {
        let gone = || {
            Refused::new(
                format!("looking for link {name}"),
                std::io::Error::from_raw_os_error(libc::ENODEV),
            )
        };
        let index = self.find(name)?.ok_or_else(gone)?.index;
        let mut messages = Messages::default();
        for &(address, prefix) in addresses {
            add_address(&mut messages, index, name, address, prefix);
        }
        messages.add(
            format!("bringing {name} up"),
            libc::RTM_NEWLINK,
            0,
            &link_header(index, UP, UP, 0),
            |_| {},
        );
        for &gateway in gateways {
            let mut header = route_header(gateway);
            // To everywhere, over a gateway: no bits, scope of the universe.
            (header[1], header[6]) = (0, libc::RT_SCOPE_UNIVERSE);
            let what = format!("routing everything to {gateway}");
            messages.add(what, libc::RTM_NEWROUTE, CREATE | REPLACE, &header, |to| {
                to.put(libc::RTA_GATEWAY, &bytes(gateway)).ne32(libc::RTA_OIF, index);
            });
        }
        self.socket.do_all(messages, false)
    }

    /// Removes a link; one that is gone already is success.
    pub(crate) fn delete(&mut self, index: u32, name: &str) -> Result<(), Refused> {
        let mut messages = Messages::default();
        messages.add(
            format!("deleting {name}"),
            libc::RTM_DELLINK,
            0,
            &link_header(index, 0, 0, 0),
            |_| {},
        );
        match self.socket.do_all(messages, false) {
            Err(refused) if refused.code() == libc::ENODEV => Ok(()),
            other => other,
        }
    }

    /// Keeps a bridge's port from its other isolated ports.
    pub(crate) fn isolate(&mut self, index: u32, name: &str) -> Result<(), Refused> {
        let mut messages = Messages::default();
        let header = link_header(index, 0, 0, libc::AF_BRIDGE as u8);
        messages.add(format!("isolating port {name}"), libc::RTM_SETLINK, 0, &header, |to| {
            to.nest(PORT_INFO, |port| {
                port.put(PORT_ISOLATED, &[1]);
            });
        });
        self.socket.do_all(messages, false)
    }

    /// All links of the namespace.
    pub(crate) fn list(&mut self) -> Result<Vec<Link>, Refused> {
        let mut question = Messages::default();
        question.add(
            "listing links",
            libc::RTM_GETLINK,
            DUMP,
            &link_header(0, 0, 0, 0),
            |_| {},
        );
        let mut links = Vec::new();
        self.socket.ask(question, |_, body| links.extend(parse_link(body)))?;
        Ok(links)
    }

    /// The link of this name.
    pub(crate) fn find(&mut self, name: &str) -> Result<Option<Link>, Refused> {
        let mut question = Messages::default();
        let what = format!("looking for link {name}");
        question.add(what, libc::RTM_GETLINK, 0, &link_header(0, 0, 0, 0), |to| {
            to.text(libc::IFLA_IFNAME, name);
        });
        let mut found = None;
        match self.socket.ask(question, |_, body| found = parse_link(body)) {
            Ok(()) => Ok(found),
            Err(refused) if refused.code() == libc::ENODEV => Ok(None),
            Err(refused) => Err(refused),
        }
    }
}

fn add_address(messages: &mut Messages, index: u32, name: &str, address: IpAddr, prefix: u8) {
    // IFA_F_NODAD | IFA_F_PERMANENT: nobody else may have it, so nothing is asked on the link.
    let (family, flags) = (family(address).0, 0x02 | 0x80);
    let scope = if address.is_ipv4() {
        libc::RT_SCOPE_UNIVERSE
    } else {
        libc::RT_SCOPE_LINK
    };
    let mut header = [family, prefix, flags, scope, 0, 0, 0, 0];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let what = format!("giving {name} the address {address}");
    messages.add(what, libc::RTM_NEWADDR, CREATE | REPLACE, &header, |to| {
        to.put(libc::IFA_LOCAL, &bytes(address))
            .put(libc::IFA_ADDRESS, &bytes(address));
    });
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let (flags, rest) = (read_u32(body.get(8..)?)?, body.get(LINK_HEADER..)?);
    Some(Link {
        index: read_u32(body.get(4..)?)?,
        name: read_text(attribute(rest, libc::IFLA_IFNAME)?).to_owned(),
        is_up: flags & UP != 0,
        has_carrier: flags & libc::IFF_LOWER_UP as u32 != 0,
        master: attribute(rest, libc::IFLA_MASTER).and_then(read_u32),
        mtu: attribute(rest, libc::IFLA_MTU).and_then(read_u32).unwrap_or(0),
    })
}

/// Events of a namespace's links.
#[derive(Debug)]
pub(crate) struct LinkEvents {
    socket: Socket,
}

impl LinkEvents {
    /// From now on, in the calling thread's namespace. Open it before listing, so that nothing falls between.
    pub(crate) fn open() -> Result<Self, Refused> {
        Ok(Self {
            socket: Socket::open(Protocol::Route, LINK_EVENTS)?,
        })
    }

    /// What came within `patience`; an error of `ENOBUFS` says that events were lost and links must be listed anew.
    pub(crate) fn next(&self, patience: std::time::Duration) -> Result<Vec<Event>, Refused> {
        let mut events = Vec::new();
        self.socket.events(patience, |kind, body| {
            // Bridges tell of their ports in their own family as well: what is gone then is the port, not the link.
            let is_bridges = body.first() == Some(&(libc::AF_BRIDGE as u8));
            events.extend(match (kind, parse_link(body)) {
                (libc::RTM_NEWLINK, Some(link)) => Some(Event::There(link)),
                (libc::RTM_DELLINK, Some(link)) if !is_bridges => Some(Event::Gone(link)),
                _ => None,
            });
        })?;
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_answers_are_no_links() {
        for length in 0..LINK_HEADER + 4 {
            assert_eq!(parse_link(&vec![0; length]), None);
        }
    }
}
