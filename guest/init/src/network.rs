//! Loopback and the guest's NIC, by rtnetlink(7) messages built here: a handful of fixed layouts needs no library.
//!
//! Nothing here may end PID 1: an agent without its NIC still has the control stream, and `Ready` says what is missing.

use crate::{
    boot::BootReport,
    files,
    place::Place,
    plan::{Link, Plan},
    rootfs::Root,
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};
use std::{
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

// linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/netlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTM_GETLINK: u16 = 18;
const IFLA_ADDRESS: u16 = 1;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
/// struct nlmsghdr, bytes.
const HEADER: usize = 16;
const NLM_F_CREATE_REPLACE: u16 = 0x400 | 0x100;
const NLMSG_ERROR: u16 = 2;
/// The first link of every network namespace (net/core/dev.c).
const LOOPBACK_INDEX: u32 = 1;
const IFF_UP: u32 = 1;
/// IPv6 only: use the address at once, without waiting for duplicates to answer.
const IFA_F_NODAD: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// Raises `lo`, which many programs expect.
pub(crate) fn raise_loopback(place: &Place, boot: &mut BootReport) {
    if !place.is_guest() {
        return;
    }
    let raised = Netlink::open().and_then(|netlink| netlink.all(&[set_link(LOOPBACK_INDEX, 0)]));
    for (_, error) in raised.unwrap_or_else(|error| vec![(0, error)]) {
        boot.warn(format!("loopback: {error}"));
    }
}

/// Configures the NIC that the blade described; every lack is a warning.
pub(crate) fn configure(place: &Place, link: &Link, boot: &mut BootReport) {
    if !place.is_guest() {
        return;
    }
    let opened = Netlink::open().and_then(|netlink| Ok((netlink.index_by_mac(&link.mac)?, netlink)));
    let (index, netlink) = match opened {
        Ok((Some(index), netlink)) => (index, netlink),
        Ok((None, _)) => return boot.warn(format!("no NIC with MAC {}: ENODEV", mac_text(&link.mac))),
        Err(error) => return boot.warn(format!("NIC: asking for the links: {error}")),
    };
    let mut steps = vec!["raising the link".to_owned()];
    let mut requests = vec![set_link(index, link.mtu)];
    for &(address, prefix) in &link.addresses {
        steps.push(format!("address {address}/{prefix}"));
        requests.push(add_address(index, address, prefix));
    }
    for &gateway in &link.gateways {
        steps.push(format!("default route by {gateway}"));
        requests.push(default_route(index, gateway));
    }
    match netlink.all(&requests) {
        Ok(refused) => {
            for (at, error) in refused {
                let step = steps.get(at).map_or("", String::as_str);
                boot.warn(format!("NIC: {step}: {error}"));
            }
        }
        Err(error) => boot.warn(format!("NIC: netlink: {error}")),
    }
}

/// /etc/hosts, /etc/hostname and /etc/resolv.conf of the payload: the image's own would be another machine's. Each lack is
/// a warning.
pub(crate) fn write_names(plan: &Plan, root: &Root, boot: &mut BootReport) {
    let name = plan.hostname.as_str();
    let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    let link = plan.link.as_ref();
    let own = link
        .and_then(|link| link.addresses.first())
        .map(|(address, _)| address.to_string());
    for word in [own.as_deref().unwrap_or("127.0.1.1"), " ", name, "\n", &plan.more_hosts] {
        hosts.push_str(word);
    }
    let mut servers = String::new();
    for server in link.map_or(&[][..], |link| &link.name_servers) {
        servers.push_str("nameserver ");
        servers.push_str(&server.to_string());
        servers.push('\n');
    }
    for (path, text) in [
        ("/etc/hosts", hosts.as_str()),
        ("/etc/hostname", &[name, "\n"].concat()),
        ("/etc/resolv.conf", &servers),
    ] {
        // No name servers: the image's own file may name a local one.
        if !text.is_empty()
            && let Err(error) = files::write_plain(root, Path::new(path), text)
        {
            boot.warn([path, ": ", &crate::power::with_sources(&error)].concat());
        }
    }
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A request: its type, extra flags, and everything behind the netlink header.
struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.body.extend_from_slice(&length.to_ne_bytes());
        self.body.extend_from_slice(&kind.to_ne_bytes());
        self.body.extend_from_slice(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
    }

    /// `number` comes back with a refusal.
    fn bytes(&self, number: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&number.to_ne_bytes());
        // The port: the kernel's.
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Up, with an MTU unless it is 0. Body: struct ifinfomsg.
fn set_link(index: u32, mtu: u32) -> Message {
    let mut body = vec![0; 4];
    for word in [index, IFF_UP, IFF_UP] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    let mut message = Message {
        kind: RTM_NEWLINK,
        flags: 0,
        body,
    };
    if mtu != 0 {
        message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
    }
    message
}

/// Body: struct ifaddrmsg.
fn add_address(index: u32, address: IpAddr, prefix: u8) -> Message {
    let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
    let mut body = vec![family(address), prefix, flags, 0];
    body.extend_from_slice(&index.to_ne_bytes());
    let mut message = Message {
        kind: RTM_NEWADDR,
        flags: NLM_F_CREATE_REPLACE,
        body,
    };
    message.attribute(IFA_LOCAL, &octets(address));
    message.attribute(IFA_ADDRESS, &octets(address));
    message
}

/// Body: struct rtmsg.
fn default_route(index: u32, gateway: IpAddr) -> Message {
    let body = vec![
        family(gateway),
        0,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_BOOT,
        0,
        RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    let mut message = Message {
        kind: RTM_NEWROUTE,
        flags: NLM_F_CREATE_REPLACE,
        body,
    };
    message.attribute(RTA_GATEWAY, &octets(gateway));
    message.attribute(RTA_OIF, &index.to_ne_bytes());
    message
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    u8::try_from(family).unwrap_or(0)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A route netlink socket.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> Result<Self, Errno> {
        socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )
        .map(Self)
    }

    /// Sends all requests at once and gives those that were refused, by their place in `requests`. The kernel works on
    /// them within send(2) and answers only what it refuses, so this never waits.
    fn all(&self, requests: &[Message]) -> Result<Vec<(usize, Errno)>, Errno> {
        let bytes: Vec<u8> = (0..)
            .zip(requests)
            .flat_map(|(number, request)| request.bytes(number))
            .collect();
        send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
        let mut refused = Vec::new();
        while let Some(answer) = self.receive()? {
            refused.extend(messages(&answer).filter_map(refusal));
        }
        Ok(refused)
    }

    /// The index of the link with this address.
    fn index_by_mac(&self, mac: &[u8; 6]) -> Result<Option<u32>, Errno> {
        let question = Message {
            kind: RTM_GETLINK,
            flags: NLM_F_DUMP,
            // struct ifinfomsg: any link.
            body: vec![0; 16],
        };
        send(self.0.as_raw_fd(), &question.bytes(0), MsgFlags::empty())?;
        let mut found = None;
        while let Some(answer) = self.receive()? {
            found = found.or_else(|| messages(&answer).find_map(|message| link_with_mac(message, mac)));
        }
        Ok(found)
    }

    /// What waits to be read.
    fn receive(&self) -> Result<Option<Vec<u8>>, Errno> {
        // As long as the kernel's longest part of a dump (Documentation/userspace-api/netlink/intro.rst).
        let mut answer = vec![0; 32 << 10];
        match recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => {
                answer.truncate(length);
                Ok(Some(answer))
            }
            Err(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The messages in one answer, header included.
fn messages(mut answer: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = usize::try_from(word(answer, 0)?)
            .ok()
            .filter(|&length| length >= HEADER)?;
        let message = answer.get(..length)?;
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn kind_of(message: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?))
}

/// The number of the refused request and why, from NLMSG_ERROR.
fn refusal(message: &[u8]) -> Option<(usize, Errno)> {
    let code = word(message, HEADER).filter(|_| kind_of(message) == Some(NLMSG_ERROR))?;
    let errno = Errno::from_raw(code.cast_signed().wrapping_neg());
    (code != 0).then_some((usize::try_from(word(message, 8)?).ok()?, errno))
}

/// The index in an RTM_NEWLINK with this IFLA_ADDRESS.
fn link_with_mac(message: &[u8], mac: &[u8; 6]) -> Option<u32> {
    if kind_of(message) != Some(RTM_NEWLINK) {
        return None;
    }
    let mut rest = message.get(HEADER + 16..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        if kind == IFLA_ADDRESS && rest.get(4..length) == Some(mac.as_slice()) {
            return word(message, HEADER + 4);
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_kernel_s_layout() {
        let bytes = add_address(2, "10.0.0.2".parse().unwrap(), 30).bytes(0);
        assert_eq!(bytes.len(), 16 + 8 + 8 + 8);
        assert_eq!(bytes[..4], 40_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], RTM_NEWADDR.to_ne_bytes());
        assert_eq!(bytes[16..20], [2, 30, 0, 0]);
        assert_eq!(bytes[28..32], [10, 0, 0, 2]);
        assert_eq!(set_link(1, 0).bytes(0).len(), 32);
        assert_eq!(set_link(1, 1500).bytes(0).len(), 40);
        assert_eq!(
            default_route(1, "fd00::1".parse().unwrap()).bytes(0).len(),
            16 + 12 + 20 + 8
        );
    }

    #[test]
    fn refusals_are_read_by_their_number_and_short_answers_are_none() {
        let mut answer = [0; 36];
        answer[..4].copy_from_slice(&36_u32.to_ne_bytes());
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        answer[8..12].copy_from_slice(&3_u32.to_ne_bytes());
        let read = |answer: &[u8]| messages(answer).filter_map(refusal).collect::<Vec<_>>();
        assert_eq!(read(&answer), []);
        answer[16..20].copy_from_slice(&(-19_i32).to_ne_bytes());
        assert_eq!(read(&answer), [(3, Errno::ENODEV)]);
        assert_eq!(read(&[answer, answer].concat()).len(), 2);
        assert_eq!(read(&answer[..10]), []);
        assert_eq!(read(&[0; 36]), [], "a length of 0 ends it");
    }

    /// The machine's own links, as another tool's table has them.
    #[test]
    fn a_link_is_found_by_its_address() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.index_by_mac(&[2, 0xfa, 1, 2, 3, 4]), Ok(None));
        assert_eq!(
            netlink.index_by_mac(&[0; 6]),
            Ok(Some(LOOPBACK_INDEX)),
            "the loopback's own"
        );
        for folder in std::fs::read_dir("/sys/class/net").unwrap().flatten() {
            let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap_or_default();
            let mac: Vec<u8> = (read("address").trim().split(':'))
                .filter_map(|part| u8::from_str_radix(part, 16).ok())
                .collect();
            let Ok(mac) = <[u8; 6]>::try_from(mac) else { continue };
            let found = netlink.index_by_mac(&mac).unwrap().unwrap();
            assert!(read("address").trim() == mac_text(&mac) && found >= LOOPBACK_INDEX);
        }
    }

    #[test]
    fn macs_are_written_as_sysfs_writes_them() {
        assert_eq!(mac_text(&[6, 0, 0xab, 0, 0, 2]), "06:00:ab:00:00:02");
    }
}
