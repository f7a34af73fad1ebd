//! Loopback and the guest's NIC, by rtnetlink(7) messages built here: a handful of fixed layouts needs no library.
//!
//! Nothing here may end PID 1: an agent without its NIC still has the control stream, and `Ready` says what is missing.

use crate::{
    boot::BootReport,
    files,
    place::Place,
    plan::{Link, Plan},
    rootfs::Root,
    users::User,
};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};
use std::{
    fs,
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
const NLM_F_REQUEST_ACK: u16 = 0x1 | 0x4;
const NLM_F_CREATE_REPLACE: u16 = 0x400 | 0x100;
const NLMSG_ERROR: u16 = 2;
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
    let result = index_of(Path::new("/sys/class/net/lo"))
        .ok_or(Errno::ENODEV)
        .and_then(|index| Netlink::open()?.request(&set_link(index, 0)));
    if let Err(error) = result {
        boot.warn(format!("loopback: {error}"));
    }
}

/// Configures the NIC that the blade described; every lack is a warning.
pub(crate) fn configure(place: &Place, link: &Link, boot: &mut BootReport) {
    if !place.is_guest() {
        return;
    }
    let Some(index) = index_by_mac(&link.mac) else {
        return boot.warn(format!("no NIC with MAC {}: ENODEV", mac_text(&link.mac)));
    };
    let netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) => return boot.warn(format!("NIC: opening netlink: {error}")),
    };
    let mut step = |what: String, message: Message| {
        if let Err(error) = netlink.request(&message) {
            boot.warn(format!("NIC: {what}: {error}"));
        }
    };
    step("raising the link".into(), set_link(index, link.mtu));
    for &(address, prefix) in &link.addresses {
        step(
            format!("address {address}/{prefix}"),
            add_address(index, address, prefix),
        );
    }
    for &gateway in &link.gateways {
        step(format!("default route by {gateway}"), default_route(index, gateway));
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
    let owner = User {
        uid: 0,
        gid: 0,
        groups: vec![],
        home: String::new(),
    };
    for (path, text) in [
        ("/etc/hosts", hosts.as_str()),
        ("/etc/hostname", &[name, "\n"].concat()),
        ("/etc/resolv.conf", &servers),
    ] {
        // No name servers: the image's own file may name a local one.
        if !text.is_empty()
            && let Err(error) = files::write_file(root, Path::new(path), text.as_bytes(), 0o644, &owner)
        {
            boot.warn([path, ": ", &crate::power::with_sources(&error)].concat());
        }
    }
}

fn index_of(folder: &Path) -> Option<u32> {
    fs::read_to_string(folder.join("ifindex")).ok()?.trim().parse().ok()
}

fn index_by_mac(mac: &[u8; 6]) -> Option<u32> {
    let wanted = mac_text(mac);
    fs::read_dir("/sys/class/net")
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .find_map(|folder| {
            let address = fs::read_to_string(folder.join("address")).ok()?;
            (address.trim() == wanted).then(|| index_of(&folder))?
        })
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

    fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(16 + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | NLM_F_REQUEST_ACK).to_ne_bytes());
        // Sequence number and port: one request at a time on an own socket needs neither.
        bytes.extend_from_slice(&[0; 8]);
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

    /// Sends one request and reads its acknowledgement: the kernel answers within send(2), so this never waits.
    fn request(&self, message: &Message) -> Result<(), Errno> {
        send(self.0.as_raw_fd(), &message.bytes(), MsgFlags::empty())?;
        let mut answer = [0; 4096];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        verdict(&answer[..length])
    }
}

/// The error number in an NLMSG_ERROR message; 0 is success.
fn verdict(answer: &[u8]) -> Result<(), Errno> {
    let kind = answer
        .get(4..6)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_ne_bytes);
    let code = answer
        .get(16..20)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw(-code)),
        _ => Err(Errno::EPROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_kernel_s_layout() {
        let bytes = add_address(2, "10.0.0.2".parse().unwrap(), 30).bytes();
        assert_eq!(bytes.len(), 16 + 8 + 8 + 8);
        assert_eq!(bytes[..4], 40_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], RTM_NEWADDR.to_ne_bytes());
        assert_eq!(bytes[16..20], [2, 30, 0, 0]);
        assert_eq!(bytes[28..32], [10, 0, 0, 2]);
        assert_eq!(set_link(1, 0).bytes().len(), 32);
        assert_eq!(set_link(1, 1500).bytes().len(), 40);
        assert_eq!(
            default_route(1, "fd00::1".parse().unwrap()).bytes().len(),
            16 + 12 + 20 + 8
        );
    }

    #[test]
    fn verdicts_are_read_and_short_answers_are_errors() {
        let mut answer = [0; 36];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert_eq!(verdict(&answer), Ok(()));
        answer[16..20].copy_from_slice(&(-19_i32).to_ne_bytes());
        assert_eq!(verdict(&answer), Err(Errno::ENODEV));
        assert_eq!(verdict(&answer[..10]), Err(Errno::EPROTO));
    }

    #[test]
    fn macs_are_written_as_sysfs_writes_them() {
        assert_eq!(mac_text(&[6, 0, 0xab, 0, 0, 2]), "06:00:ab:00:00:02");
    }
}
