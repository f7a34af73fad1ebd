//! What a VM may reach: the policy as its spec says it, checked. Pure data.

use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    str::FromStr,
};

/// Networks and names of one VM. Each may cut another's network in two, and all pieces must have a number below 250.
pub const MAX_DESTINATIONS: usize = 64;
/// Rules of one VM: sixteen protocols and ports for each network or name.
pub const MAX_RULES: usize = 1024;
/// Services of the blade that one VM may use.
pub const MAX_SERVICES: usize = 16;
/// Packets or connections a second: the kernel counts a limit in whole nanoseconds per packet.
pub const MAX_RATE: u32 = 100_000_000;

/// `network.mode` of a spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Mode {
    /// Nothing at all passes, not even the blade's services.
    #[default]
    None,
    /// What the egress rules list, and the blade's services that are named.
    Restricted,
    /// Every public address as well. Private ranges still need a rule that names them.
    Open,
}

/// Protocol of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// All of them, ports ignored.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP to IPv4 addresses, ICMPv6 to others; ports ignored.
    Icmp,
}

/// Where a rule lets to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Destination {
    /// All addresses of a network.
    Cidr(Cidr),
    /// The addresses that the blade's DNS proxy resolved for this name.
    Name(DnsName),
}

/// One line of `network.egress`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Where to.
    pub to: Destination,
    /// By what.
    pub protocol: Protocol,
    /// To which ports; of TCP and UDP only.
    pub ports: RangeInclusive<u16>,
}

/// A service of the blade that guests may use, at any address of the blade in their namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Service {
    /// Whether it is TCP; UDP otherwise.
    pub is_tcp: bool,
    /// Its port.
    pub port: u16,
}

impl Service {
    /// The DNS proxy over UDP.
    pub const DNS: Self = Self {
        is_tcp: false,
        port: 53,
    };
}

/// Bounds on what a VM sends. Bursts are as much as one second brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Packets a second.
    pub packets: u32,
    /// New connections a second.
    pub connects: u32,
    /// Connections at once.
    pub connections: u32,
}

impl Default for Limits {
    /// Above what an agent's tools do, below what hurts a blade: measured nowhere, chosen.
    fn default() -> Self {
        Self {
            packets: 200_000,
            connects: 500,
            connections: 4096,
        }
    }
}

/// The policy of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Policy {
    /// What is allowed at all.
    pub mode: Mode,
    /// What is allowed beyond the mode; an order has no meaning.
    pub egress: Vec<Rule>,
    /// What of the blade.
    pub services: Vec<Service>,
    /// How much.
    pub limits: Limits,
    /// What the spec calls each rule of `egress`, for explanations; empty: their places.
    pub names: Vec<String>,
}

/// Why a policy cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// More rules than a VM may have.
    #[error("network.egress has {count} rules, at most {MAX_RULES} are possible: join ports")]
    TooManyRules {
        /// How many there are.
        count: usize,
    },
    /// More networks and names than a VM may have.
    #[error("network.egress has {count} networks and names, at most {MAX_DESTINATIONS} are possible: join networks")]
    TooManyDestinations {
        /// How many different ones there are.
        count: usize,
    },
    /// More services than a VM may have.
    #[error("{count} services of the blade are named, at most {MAX_SERVICES} are possible")]
    TooManyServices {
        /// How many there are.
        count: usize,
    },
    /// A rule that lets nothing.
    #[error("network.egress[{rule}].ports: the first port {first} is above the last {last}")]
    EmptyPorts {
        /// Its place.
        rule: usize,
        /// As written.
        first: u16,
        /// As written.
        last: u16,
    },
    /// A limit of nothing would let nothing pass, and the kernel cannot keep one that is too high.
    #[error("network.limits: each must be 1 to {MAX_RATE}; mode None lets nothing pass")]
    Limit,
}

impl Policy {
    /// Whether it can be kept.
    ///
    /// # Errors
    /// Names the field and the bound.
    pub fn check(&self) -> Result<(), PolicyError> {
        if self.egress.len() > MAX_RULES {
            return Err(PolicyError::TooManyRules {
                count: self.egress.len(),
            });
        }
        let destinations: BTreeSet<&Destination> = self.egress.iter().map(|rule| &rule.to).collect();
        if destinations.len() > MAX_DESTINATIONS {
            return Err(PolicyError::TooManyDestinations {
                count: destinations.len(),
            });
        }
        if self.services.len() > MAX_SERVICES {
            return Err(PolicyError::TooManyServices {
                count: self.services.len(),
            });
        }
        let limits = [self.limits.packets, self.limits.connects, self.limits.connections];
        if limits.iter().any(|limit| !(1..=MAX_RATE).contains(limit)) {
            return Err(PolicyError::Limit);
        }
        match self.egress.iter().position(|rule| rule.ports.is_empty()) {
            Some(rule) => Err(PolicyError::EmptyPorts {
                rule,
                first: *self.egress[rule].ports.start(),
                last: *self.egress[rule].ports.end(),
            }),
            None => Ok(()),
        }
    }

    /// What the spec calls a rule.
    #[must_use]
    pub fn name_of_rule(&self, number: usize) -> String {
        let name = self.names.get(number);
        name.map_or_else(|| format!("network.egress[{number}]"), Clone::clone)
    }

    /// Whether the DNS proxy answers for a name: a rule has it, or all public addresses are open anyway.
    #[must_use]
    pub fn resolves(&self, name: &DnsName) -> bool {
        self.mode == Mode::Open || self.rules_for_name(name).next().is_some()
    }

    /// The rules that a DNS name falls under.
    pub fn rules_for_name<'a>(&'a self, name: &'a DnsName) -> impl Iterator<Item = &'a Rule> {
        let allowed = self.egress.iter().filter(|_| self.mode != Mode::None);
        allowed.filter(move |rule| matches!(&rule.to, Destination::Name(pattern) if pattern.covers(name)))
    }
}

/// A network: `address/length`, host bits zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    address: IpAddr,
    length: u8,
}

/// A text that is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no network such as 192.0.2.0/24 or 2001:db8::/32 with all bits behind the prefix zero")]
pub struct CidrError {
    text: String,
}

impl Cidr {
    /// One address.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        let length = if address.is_ipv4() { 32 } else { 128 };
        Self { address, length }
    }

    /// Whether it is one of IPv4.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// First and last address as numbers.
    pub(crate) fn range(&self) -> RangeInclusive<u128> {
        let first = number(self.address);
        first..=first | self.host_bits()
    }

    fn host_bits(&self) -> u128 {
        let width: u32 = if self.is_ipv4() { 32 } else { 128 };
        let behind = width.saturating_sub(self.length.into());
        u128::MAX.checked_shr(128 - behind).unwrap_or(0)
    }

    /// Whether the address is in it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.is_ipv4() == address.is_ipv4() && self.range().contains(&number(address))
    }
}

/// An address as a number.
pub(crate) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let error = || CidrError { text: text.to_owned() };
        let (address, length) = text.split_once('/').unwrap_or((text, ""));
        let address: IpAddr = address.parse().map_err(|_| error())?;
        let widest = Self::host(address).length;
        let length = match length {
            "" if !text.contains('/') => widest,
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().map_err(|_| error())?,
            _ => return Err(error()),
        };
        let cidr = Self { address, length };
        if length > widest || number(address) & cidr.host_bits() != 0 {
            return Err(error());
        }
        Ok(cidr)
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;

    fn try_from(text: String) -> Result<Self, CidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(one: Cidr) -> Self {
        one.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// A DNS name in lower case without the root's dot, or `*.` and a name for all names below it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DnsName(String);

/// A text that is no DNS name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no DNS name of two labels or more such as api.example.com, or *.example.com for all below it")]
pub struct DnsNameError {
    text: String,
}

impl DnsName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `name` is this name, or below it where this is `*.`.
    #[must_use]
    pub fn covers(&self, name: &Self) -> bool {
        match self.0.strip_prefix('*') {
            Some(parent) => name.0.len() > parent.len() && name.0.ends_with(parent),
            None => self == name,
        }
    }
}

impl FromStr for DnsName {
    type Err = DnsNameError;

    fn from_str(text: &str) -> Result<Self, DnsNameError> {
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let plain = name.strip_prefix("*.").unwrap_or(&name);
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        // RFC 1035 2.3.4: 255 bytes on the wire are 253 of text.
        if name.len() <= 253 && plain.contains('.') && plain.split('.').all(is_label) {
            Ok(Self(name))
        } else {
            Err(DnsNameError { text: text.to_owned() })
        }
    }
}

impl TryFrom<String> for DnsName {
    type Error = DnsNameError;

    fn try_from(text: String) -> Result<Self, DnsNameError> {
        text.parse()
    }
}

impl From<DnsName> for String {
    fn from(one: DnsName) -> Self {
        one.to_string()
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether no rule opens an address: it is the blade's, a guest's, a metadata service's, or none of the net's at all.
#[must_use]
pub fn is_never(address: IpAddr) -> bool {
    in_ranges(address, crate::table::NEVER4, crate::table::NEVER6)
}

/// Whether only a rule that names it opens an address.
#[must_use]
pub fn is_private(address: IpAddr) -> bool {
    in_ranges(address, crate::table::PRIVATE4, crate::table::PRIVATE6)
}

fn in_ranges(address: IpAddr, of4: &[([u8; 4], [u8; 4])], of6: &[(u128, u128)]) -> bool {
    match address {
        IpAddr::V4(address) => of4
            .iter()
            .any(|&(first, last)| (Ipv4Addr::from(first)..=Ipv4Addr::from(last)).contains(&address)),
        IpAddr::V6(address) => of6
            .iter()
            .any(|&(first, last)| (Ipv6Addr::from(first)..=Ipv6Addr::from(last)).contains(&address)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_only_when_they_are_meant() {
        for text in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "192.0.2.7/32",
            "::/0",
            "2001:db8::/32",
            "2001:db8::1/128",
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "::1/64",
            "a/8",
            "1.2.3/24",
            "::/129",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
        assert_eq!("192.0.2.7".parse::<Cidr>().unwrap().to_string(), "192.0.2.7/32");
    }

    #[test]
    fn a_star_covers_what_is_below_and_not_the_name_itself_or_a_lookalike() {
        let star: DnsName = "*.Example.com.".parse().unwrap();
        for (name, is_covered) in [
            ("a.example.com", true),
            ("a.b.example.com", true),
            ("example.com", false),
            ("badexample.com", false),
            ("example.com.evil.org", false),
        ] {
            assert_eq!(star.covers(&name.parse().unwrap()), is_covered, "{name}");
        }
        for text in ["", ".", "com", "*.com", "a..b", "a b.c", "*.*.a.b", "a.*.b", "ä.de"] {
            assert!(text.parse::<DnsName>().is_err(), "{text}");
        }
    }

    #[test]
    fn policies_that_cannot_be_kept_are_refused_with_the_field() {
        let rule = Rule {
            to: Destination::Cidr("192.0.2.0/24".parse().unwrap()),
            protocol: Protocol::Tcp,
            ports: 1..=2,
        };
        let mut policy = Policy {
            egress: vec![rule.clone(); MAX_RULES],
            ..Policy::default()
        };
        assert_eq!(policy.check(), Ok(()));
        #[allow(clippy::reversed_empty_ranges, reason = "it is the case")]
        let empty = Rule {
            ports: 9..=8,
            ..rule.clone()
        };
        policy.egress[3] = empty;
        assert!(policy.check().unwrap_err().to_string().contains("egress[3]"));
        policy.egress.push(rule.clone());
        assert_eq!(policy.check(), Err(PolicyError::TooManyRules { count: 1025 }));
        let hosts = (0_u8..65).map(|last| Rule {
            to: Destination::Cidr(Cidr::host(Ipv4Addr::new(192, 0, 2, last).into())),
            ..rule.clone()
        });
        policy.egress = hosts.collect();
        assert_eq!(policy.check(), Err(PolicyError::TooManyDestinations { count: 65 }));
    }

    #[test]
    fn the_address_of_every_metadata_service_is_never_opened() {
        for text in [
            "169.254.169.254",
            "127.0.0.1",
            "100.64.0.1",
            "100.100.100.200",
            "224.0.0.1",
            "255.255.255.255",
            "0.0.0.0",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
            "fdfa:fa::5",
            "::",
        ] {
            assert!(is_never(text.parse().unwrap()), "{text}");
        }
        for text in ["10.1.2.3", "192.168.0.1", "172.31.9.9", "fd00:ec2::254", "fd12::1"] {
            let address = text.parse().unwrap();
            assert!(is_private(address) && !is_never(address), "{text}");
        }
        for text in ["1.1.1.1", "100.63.255.255", "2606:4700::1111", "2a00::1"] {
            let address = text.parse().unwrap();
            assert!(!is_private(address) && !is_never(address), "{text}");
        }
    }
}
