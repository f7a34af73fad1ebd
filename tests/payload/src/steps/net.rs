//! Steps of the network: honest ones, and frames that no guest has a right to send.

use super::{only_in_a_guest, text};
use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

/// For an answer; one that was dropped never comes.
const ANSWER: Duration = Duration::from_millis(1500);
/// Questions until nobody answers: packets may be lost on a busy machine.
const TRIES: usize = 3;
const NIC: &str = "eth0";
/// The blade, as every guest sees it.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);
/// Of the first two slots, as only the blade sees them.
const NEIGHBOURS: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 64, 0, 2), Ipv4Addr::new(100, 64, 0, 6)];

/// `address:port`: asks an echo over UDP and says what came.
pub(super) fn udp(to: &str) -> Result<(), String> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    socket.set_read_timeout(Some(ANSWER)).map_err(text)?;
    let mut buffer = [0; 2048];
    for _ in 0..TRIES {
        // An error is the kernel's word that nobody is there: as good as no answer.
        if socket.send_to(b"ping", to).is_ok()
            && let Ok((length, _)) = socket.recv_from(&mut buffer)
        {
            let told = String::from_utf8_lossy(&buffer[..length]);
            return writeln!(io::stdout(), "udp {to} {told}").map_err(text);
        }
    }
    writeln!(io::stdout(), "udp {to} nothing").map_err(text)
}

/// `address:port`: asks an echo over TCP and says what came.
pub(super) fn tcp(to: &str) -> Result<(), String> {
    let address: SocketAddr = to.parse().map_err(text)?;
    let asked = TcpStream::connect_timeout(&address, ANSWER).and_then(|mut stream| {
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(b"ping")?;
        let mut buffer = [0; 2048];
        let length = stream.read(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    });
    let told = asked.unwrap_or_else(|_| "nothing".to_owned());
    writeln!(io::stdout(), "tcp {to} {told}").map_err(text)
}

/// Asks the echo `address:port` again and again over one connection, until the file `/enough` is there.
pub(super) fn keep_asking(to: &str) -> Result<(), String> {
    let mut stream = TcpStream::connect(to).map_err(text)?;
    let mut buffer = [0; 2048];
    for number in 1.. {
        stream.write_all(format!("ping {number}").as_bytes()).map_err(text)?;
        let length = stream.read(&mut buffer).map_err(text)?;
        writeln!(io::stdout(), "{number}: {}", String::from_utf8_lossy(&buffer[..length])).map_err(text)?;
        if fs::metadata("/enough").is_ok() {
            return Ok(());
        }
        super::run("sleep", "100")?;
    }
    Ok(())
}

/// Asks the name server of /etc/resolv.conf for a name's IPv4 addresses and says them, or the answer's code.
pub(super) fn resolve(name: &str) -> Result<(), String> {
    let configured = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let server = configured.lines().find_map(|line| line.strip_prefix("nameserver "));
    let Some(server) = server else {
        return writeln!(io::stdout(), "{name} no name server").map_err(text);
    };
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(u8::try_from(label.len()).map_err(text)?);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
    socket.set_read_timeout(Some(ANSWER)).map_err(text)?;
    let mut buffer = [0; 4096];
    for _ in 0..TRIES {
        if socket.send_to(&question, (server.trim(), 53)).is_ok()
            && let Ok((length, _)) = socket.recv_from(&mut buffer)
        {
            let answer = &buffer[..length];
            return writeln!(io::stdout(), "{name} {}", addresses(answer, question.len())).map_err(text);
        }
    }
    writeln!(io::stdout(), "{name} nothing").map_err(text)
}

/// The A records of an answer whose question ends at `at`, with names as pointers.
fn addresses(answer: &[u8], mut at: usize) -> String {
    let code = answer.get(3).map_or(0, |flags| flags & 15);
    let mut found = Vec::new();
    while let Some(record) = answer.get(at..at + 12) {
        // An uncompressed name: no answer of the blade has one.
        if record[0] & 0xc0 != 0xc0 {
            break;
        }
        let length = usize::from(u16::from_be_bytes([record[10], record[11]]));
        if let (Some(&[a, b, c, d]), [0, 1]) = (answer.get(at + 12..at + 12 + length), &record[2..4]) {
            found.push(Ipv4Addr::new(a, b, c, d).to_string());
        }
        at += 12 + length;
    }
    if found.is_empty() {
        format!("code {code}")
    } else {
        found.join(" ")
    }
}

/// Answers everybody over UDP who asks on this port, and says who asked, until the file `/enough` is there.
pub(super) fn answer_udp(port: &str) -> Result<(), String> {
    let socket = UdpSocket::bind(("0.0.0.0", port.parse().map_err(text)?)).map_err(text)?;
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .map_err(text)?;
    writeln!(io::stdout(), "answering").map_err(text)?;
    let mut buffer = [0; 2048];
    while fs::metadata("/enough").is_err() {
        if let Ok((_, from)) = socket.recv_from(&mut buffer) {
            writeln!(io::stdout(), "asked by {from}").map_err(text)?;
        }
    }
    Ok(())
}

/// Sends what a hostile guest would: others' MACs and addresses over IPv4, IPv6, ARP and neighbour discovery, tagged frames,
/// and packets to other guests' slots, to the blade and to metadata services.
pub(super) fn attack() -> Result<(), String> {
    only_in_a_guest()?;
    let nic = RawNic::open()?;
    let mine = nic.mac;
    let gateway = nic.gateway()?;
    let other = [0x02, 0xfa, 0, 0, 0, 0x99];
    let own = Ipv4Addr::new(169, 254, 77, 2);
    let link = |from: [u8; 6], kind: &[u8], rest: &[u8]| [&gateway[..], &from, kind, rest].concat();
    let mut frames = Vec::new();
    // Spoofed MAC; spoofed addresses: a neighbour's, the gateway's, the world's.
    frames.push(link(other, &[8, 0], &packet(own, Ipv4Addr::new(203, 0, 113, 1), 7007)));
    for source in [NEIGHBOURS[0], NEIGHBOURS[1], GATEWAY, Ipv4Addr::new(203, 0, 113, 9)] {
        frames.push(link(
            mine,
            &[8, 0],
            &packet(source, Ipv4Addr::new(203, 0, 113, 1), 7007),
        ));
    }
    // A spoofed IPv6 source, and an advertisement of the gateway's address.
    let six = |source: [u8; 16], next: u8, body: &[u8]| {
        let length = u16::try_from(body.len()).unwrap_or(0).to_be_bytes();
        let mut all_nodes = [0; 16];
        (all_nodes[0], all_nodes[1], all_nodes[15]) = (0xff, 2, 1);
        let head = [&[0x60, 0, 0, 0][..], &length, &[next, 255], &source, &all_nodes].concat();
        link(mine, &[0x86, 0xdd], &[&head, body].concat())
    };
    let mut gateway6 = [0; 16];
    (gateway6[0], gateway6[1], gateway6[15]) = (0xfe, 0x80, 1);
    let advertisement = [&[136, 0, 0, 0, 0xa0, 0, 0, 0][..], &gateway6, &[2, 1], &mine].concat();
    frames.push(six(gateway6, 58, &advertisement));
    frames.push(six([0x20; 16], 17, &[0; 16]));
    // Gratuitous ARP for the gateway and for a neighbour.
    for address in [GATEWAY, NEIGHBOURS[0]] {
        let octets = address.octets();
        let body = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &mine, &octets, &[0xff; 6], &octets].concat();
        frames.push(link(mine, &[8, 6], &body));
    }
    // A tag, and a tag in a tag.
    let tagged = [&[0, 7, 8, 0][..], &packet(own, NEIGHBOURS[0], 7007)].concat();
    frames.push(link(mine, &[0x81, 0], &tagged));
    frames.push(link(mine, &[0x88, 0xa8], &[&[0, 7, 0x81, 0][..], &tagged].concat()));
    // As itself, to where nobody may: guests by their slots and by the address that all have, the blade, metadata.
    for to in NEIGHBOURS
        .into_iter()
        .chain([own, GATEWAY, Ipv4Addr::new(169, 254, 169, 254)])
    {
        for port in [7007, 22] {
            frames.push(link(mine, &[8, 0], &packet(own, to, port)));
        }
    }
    let mut sent = 0;
    for _ in 0..10 {
        for frame in &frames {
            nic.send(frame)?;
            sent += 1;
        }
    }
    writeln!(io::stdout(), "attacked with {sent} frames").map_err(text)
}

/// A UDP packet without checksum of the payload, which IPv4 allows.
fn packet(from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut head = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0];
    head.extend(from.octets());
    head.extend(to.octets());
    let mut sum: u32 = head
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    head[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    head.extend([0x1b, 0x5f]);
    head.extend(port.to_be_bytes());
    head.extend([0, 12, 0, 0]);
    head.extend(b"evil");
    head
}

/// Writes whole frames (packet(7)).
struct RawNic {
    fd: std::os::fd::OwnedFd,
    index: i32,
    mac: [u8; 6],
}

impl RawNic {
    fn open() -> Result<Self, String> {
        use std::os::fd::FromRawFd;
        let folder = format!("/sys/class/net/{NIC}");
        let index = fs::read_to_string(format!("{folder}/ifindex")).map_err(text)?;
        let mac = mac(&fs::read_to_string(format!("{folder}/address")).map_err(text)?)?;
        // SAFETY: socket(2) takes three integers; what it returns is nobody else's.
        let fd = unsafe {
            match libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) {
                -1 => return Err(io::Error::last_os_error().to_string()),
                fd => std::os::fd::OwnedFd::from_raw_fd(fd),
            }
        };
        Ok(Self {
            fd,
            index: index.trim().parse().map_err(text)?,
            mac,
        })
    }

    /// The MAC that the kernel learned for the gateway: an honest question makes it ask.
    fn gateway(&self) -> Result<[u8; 6], String> {
        let socket = UdpSocket::bind("0.0.0.0:0").map_err(text)?;
        let mut found = None;
        super::until(|| {
            let _ = socket.send_to(b"who", (GATEWAY, 9));
            let table = fs::read_to_string("/proc/net/arp").unwrap_or_default();
            let line = table.lines().find(|line| line.starts_with("169.254.77.1 "));
            found = line
                .and_then(|line| line.split_whitespace().nth(3))
                .and_then(|text| mac(text).ok())
                .filter(|mac| *mac != [0; 6]);
            found.is_some()
        })?;
        found.ok_or_else(|| "the gateway has no MAC".to_owned())
    }

    fn send(&self, frame: &[u8]) -> Result<(), String> {
        use std::os::fd::AsRawFd;
        // SAFETY: all zeroes is a value of this C structure of numbers.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = self.index;
        let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(text)?;
        // SAFETY: the frame and the address are whole for the call's length, with their lengths.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                std::ptr::from_ref(&to).cast(),
                size,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error().to_string());
        }
        Ok(())
    }
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Result<Vec<u8>, _> = text
        .trim()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect();
    bytes
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("{text:?} is no MAC"))
}
