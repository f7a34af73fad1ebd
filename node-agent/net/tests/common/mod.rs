//! A blade's network in namespaces of the test: taps whose other end is the test itself, as a VMM's would be, and a
//! world behind an uplink that echoes.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses a part; in a test a panic is the report"
)]

use far_net::{GATEWAY, GuestNetns, Network, Options, Place, capability};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;
use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

/// Generous: these machines are slow and shared.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The world's address, and port of its echo.
pub(crate) const WORLD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub(crate) const WORLD6: Ipv6Addr = Ipv6Addr::new(0x2a00, 0xfa, 0, 0, 0, 0, 0, 1);
/// Not in 203.0.113.0/24.
pub(crate) const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
pub(crate) const ECHO: u16 = 7007;
/// Of `struct virtio_net_hdr`, which precedes each frame on a tap.
const VNET: usize = 10;

nix::ioctl_write_ptr_bad!(set_interface, 0x4004_54ca, libc::ifreq);

/// The lack, printed as the runner wants it.
pub(crate) fn lacks(test: &str, programs: &[&str]) -> bool {
    if let Err(lack) = capability() {
        eprintln!("SKIPPED {test}: {lack}");
        return true;
    }
    let missing = programs.iter().find(|program| {
        !Command::new("sh")
            .args(["-c", &format!("command -v {program} >/dev/null")])
            .status()
            .unwrap()
            .success()
    });
    if let Some(program) = missing {
        eprintln!("SKIPPED {test}: {program}");
    }
    missing.is_some()
}

pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(Instant::now() < end, "{what} did not come");
        #[allow(
            clippy::disallowed_methods,
            reason = "the kernel's counters tell nobody that they changed"
        )]
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn run_in(netns: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new("nsenter");
    let output = command
        .arg(format!("--net={}", netns.display()))
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub(crate) fn ip(netns: &Path, arguments: &str) {
    run_in(
        netns,
        &[&["ip"], arguments.split(' ').collect::<Vec<_>>().as_slice()].concat(),
    );
}

pub(crate) fn json(netns: &Path, arguments: &str) -> Value {
    let output = run_in(netns, &arguments.split(' ').collect::<Vec<_>>());
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

/// What `nft -j` lists in a set, as text.
pub(crate) fn nft_set(netns: &Path, family: &str, set: &str) -> String {
    json(netns, &format!("nft -j list set {family} far {set}")).to_string()
}

/// A blade with a world.
pub(crate) struct Blade {
    pub(crate) network: Network,
    pub(crate) world: GuestNetns,
}

impl Blade {
    pub(crate) fn new(options: Options) -> Self {
        let guests = GuestNetns::create().unwrap();
        let (inside, world) = (guests.path(), connect_world(&guests));
        let network = Network::open(guests, options).unwrap();
        network.forward().unwrap();
        let _ = inside;
        Self { network, world }
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.network.netns().unwrap().path()
    }

    pub(crate) fn tap(&self, place: &Place) -> Tap {
        Tap::attach(self.network.netns().unwrap(), place.tap.as_str())
    }
}

/// An uplink to a namespace that has the world's addresses and echoes UDP.
pub(crate) fn connect_world(guests: &GuestNetns) -> GuestNetns {
    let world = GuestNetns::create().unwrap();
    let inside = guests.path();
    run_in(
        &inside,
        &[
            "ip",
            "link",
            "add",
            "up0",
            "type",
            "veth",
            "peer",
            "name",
            "down0",
            "netns",
            world.path().to_str().unwrap(),
        ],
    );
    ip(&inside, "addr add 192.0.2.2/30 dev up0");
    ip(&inside, "addr add 2a00:ffff::2/64 dev up0 nodad");
    ip(&inside, "link set up0 up");
    let outside = world.path();
    ip(&outside, "link set lo up");
    for address in ["192.0.2.1/30", "2a00:ffff::1/64 nodad"] {
        let (address, rest) = address.split_once(' ').unwrap_or((address, ""));
        ip(&outside, format!("addr add {address} dev down0 {rest}").trim_end());
    }
    for address in [WORLD, ELSEWHERE, METADATA, PRIVATE] {
        ip(&outside, &format!("addr add {address}/32 dev lo"));
    }
    ip(&outside, &format!("addr add {WORLD6}/128 dev lo nodad"));
    ip(&outside, "link set down0 up");
    ip(&inside, "route add default via 192.0.2.1");
    ip(&inside, "-6 route add default via 2a00:ffff::1");
    for address in [WORLD, ELSEWHERE, METADATA, PRIVATE] {
        echo(&world, address.into(), ECHO);
    }
    echo(&world, WORLD6.into(), ECHO);
    world
}

/// Echoes UDP until the process ends; the answer begins with the asker's address.
pub(crate) fn echo(netns: &GuestNetns, address: IpAddr, port: u16) {
    let socket = netns.run_inside(|| {
        let domain = if address.is_ipv4() {
            nix::sys::socket::AddressFamily::Inet
        } else {
            nix::sys::socket::AddressFamily::Inet6
        };
        let kind = nix::sys::socket::SockType::Datagram;
        let fd = nix::sys::socket::socket(domain, kind, nix::sys::socket::SockFlag::SOCK_CLOEXEC, None).unwrap();
        let at: nix::sys::socket::SockaddrStorage = std::net::SocketAddr::new(address, port).into();
        nix::sys::socket::bind(fd.as_raw_fd(), &at).unwrap();
        UdpSocket::from(fd)
    });
    let socket = socket.unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 9000];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let answer = [from.ip().to_string().as_bytes(), b" ", &buffer[..length]].concat();
            let _ = socket.send_to(&answer, from);
        }
    });
}

/// The VMM's end of a tap: what is written comes from the guest.
pub(crate) struct Tap {
    file: File,
}

impl Tap {
    pub(crate) fn attach(netns: &GuestNetns, name: &str) -> Self {
        let file = netns.run_inside(|| {
            let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
            // SAFETY: all zeroes is a value of this C structure of numbers.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
            // Another test's child may hold a copy of the descriptor that made the tap, from its fork until its exec.
            wait_for("a tap that nobody holds", || {
                // SAFETY: TUNSETIFF reads and writes one ifreq.
                unsafe { set_interface(file.as_raw_fd(), &raw const request) }.ok()
            });
            file
        });
        Self { file: file.unwrap() }
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.file.write_all(&[&[0; VNET], frame].concat()).unwrap();
    }

    /// The next frame that `wanted` likes.
    pub(crate) fn receive<T>(&mut self, what: &str, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        let mut buffer = [0; 9000];
        loop {
            let mut polled = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut polled, PollTimeout::from(200_u16)).unwrap();
            if ready > 0 {
                let length = self.file.read(&mut buffer).unwrap();
                if let Some(found) = wanted(&buffer[VNET.min(length)..length]) {
                    return found;
                }
            }
            assert!(Instant::now() < end, "{what} did not come");
        }
    }

    /// The next echo.
    pub(crate) fn receive_echo(&mut self, what: &str) -> String {
        self.receive(what, |frame| {
            let (protocol, header) = match frame.get(12..14)? {
                [0x08, 0x00] => (*frame.get(23)?, 14 + 20),
                [0x86, 0xdd] => (*frame.get(20)?, 14 + 40),
                _ => return None,
            };
            (protocol == 17).then(|| String::from_utf8_lossy(&frame[header + 8..]).into_owned())
        })
    }
}

/// A guest's MAC and addresses as it writes them into a frame.
#[derive(Clone, Copy)]
pub(crate) struct From {
    pub(crate) mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    pub(crate) address6: Ipv6Addr,
}

impl From {
    pub(crate) fn place(place: &Place) -> Self {
        let address6 = place.guest.address6.unwrap_or(Ipv6Addr::UNSPECIFIED);
        Self {
            mac: place.guest.mac,
            address: place.guest.address,
            address6,
        }
    }

    fn link(&self, kind: u16, packet: &[u8]) -> Vec<u8> {
        // The taps take any destination that is a multicast or their own; broadcast is both to a raw IP stack.
        [
            &DESTINATION.with(std::cell::Cell::get)[..],
            &self.mac,
            &kind.to_be_bytes(),
            packet,
        ]
        .concat()
    }

    pub(crate) fn ipv4(&self, to: Ipv4Addr, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(20 + payload.len()).unwrap();
        let mut header = vec![0x45, 0];
        header.extend(length.to_be_bytes());
        header.extend([0x12, 0x34]);
        header.extend(fragment.to_be_bytes());
        header.extend([64, protocol, 0, 0]);
        header.extend(self.address.octets());
        header.extend(to.octets());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        self.link(0x0800, &[&header, payload].concat())
    }

    pub(crate) fn udp(&self, to: Ipv4Addr, port: u16, text: &str) -> Vec<u8> {
        self.ipv4(to, 17, 0, &self.udp_segment(to, port, text))
    }

    pub(crate) fn udp_segment(&self, to: Ipv4Addr, port: u16, text: &str) -> Vec<u8> {
        let segment = datagram(port, text.as_bytes());
        let length = u16::try_from(segment.len()).unwrap();
        let pseudo = [
            &self.address.octets()[..],
            &to.octets(),
            &[0, 17],
            &length.to_be_bytes(),
        ]
        .concat();
        summed(segment, &pseudo, 6)
    }

    pub(crate) fn ipv6(&self, to: Ipv6Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
        // 255 hops: neighbour discovery is believed with no less.
        packet.extend([protocol, 255]);
        packet.extend(self.address6.octets());
        packet.extend(to.octets());
        packet.extend(payload);
        self.link(0x86dd, &packet)
    }

    pub(crate) fn udp6(&self, to: Ipv6Addr, port: u16, text: &str) -> Vec<u8> {
        let segment = datagram(port, text.as_bytes());
        let pseudo = self.pseudo6(to, segment.len(), 17);
        self.ipv6(to, 17, &summed(segment, &pseudo, 6))
    }

    pub(crate) fn icmp6(&self, to: Ipv6Addr, body: &[u8]) -> Vec<u8> {
        let pseudo = self.pseudo6(to, body.len(), 58);
        self.ipv6(to, 58, &summed(body.to_vec(), &pseudo, 2))
    }

    fn pseudo6(&self, to: Ipv6Addr, length: usize, protocol: u8) -> Vec<u8> {
        let length = u32::try_from(length).unwrap().to_be_bytes();
        [&self.address6.octets()[..], &to.octets(), &length, &[0, 0, 0, protocol]].concat()
    }

    /// A request (1) or an answer (2) that says `sender` has this MAC.
    pub(crate) fn arp(&self, kind: u8, inner_mac: [u8; 6], target: Ipv4Addr) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, kind];
        packet.extend(inner_mac);
        packet.extend(self.address.octets());
        packet.extend([0; 6]);
        packet.extend(target.octets());
        self.link(0x0806, &packet)
    }
}

thread_local! {
    /// MAC that frames go to: the tap's own, as [`aim`] found it.
    static DESTINATION: std::cell::Cell<[u8; 6]> = const { std::cell::Cell::new([0xff; 6]) };
}

/// Sends this thread's frames to the MAC of a link.
pub(crate) fn aim(netns: &Path, link: &str) {
    let seen = json(netns, &format!("ip -j link show dev {link}"));
    let text = seen[0]["address"].as_str().unwrap();
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    DESTINATION.with(|to| to.set(bytes.try_into().unwrap()));
}

fn datagram(port: u16, text: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + text.len()).unwrap();
    let mut segment = 4000_u16.to_be_bytes().to_vec();
    segment.extend(port.to_be_bytes());
    segment.extend(length.to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(text);
    segment
}

fn summed(mut segment: Vec<u8>, pseudo: &[u8], at: usize) -> Vec<u8> {
    let sum = checksum(&[pseudo, &segment].concat());
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// RFC 1071.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The address that all requests of ARP tests ask for.
pub(crate) const ROUTER: Ipv4Addr = GATEWAY;
