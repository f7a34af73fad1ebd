//! Network of a blade's microVMs: taps in a network namespace of their own, under default-deny tables.
//!
//! - [`Network`]: slots, policies, counters and reclaim in one namespace; what a node agent calls.
//! - [`GuestNetns`] and [`Slot`]: the namespace and its numbers. A namespace alone has no uplink and forwards nothing, so a
//!   guest reaches the host end of its own tap and nothing else.
//! - [`Policy`], [`explain`]: what a spec allows, and why a packet passes or not; pure.
//! - [`dns`]: resolves the names of a policy. [`BridgeWatch`]: taps that others make. [`uplink`]: the way out.
//!
//! Everything here needs CAP_NET_ADMIN and CAP_SYS_ADMIN; without them a guest has its vsock device and no NIC, and
//! [`capability`] says so in a sentence for the blade's status. ADR 0007 says why it is built this way.
//!
//! Invariant: the machine's own network namespace is changed by [`Network::open_here`] and [`Network::connect_uplink`] only;
//! all else is done by a helper thread that has left it, or over sockets that it opened.

#![deny(unsafe_code)]

mod bridge;
mod capability;
pub mod dns;
mod elements;
mod explain;
mod links;
mod netlink;
mod netns;
mod network;
mod nft;
mod policy;
mod pool;
mod slot;
mod sys;
mod table;
mod trace;
pub mod uplink;

pub use bridge::{BridgeWatch, TapEvent};
pub use capability::{NoNic, capability};
pub use explain::{Explanation, Packet, Pinned, explain};
pub use netlink::Refused;
pub use netns::{GuestNetns, NetError};
pub use network::{Count, Counters, Network, NetworkError, Options, Proven, Reclaimed, Step};
pub use policy::{
    Cidr, CidrError, Destination, DnsName, DnsNameError, Limits, MAX_DESTINATIONS, MAX_RATE, MAX_RULES, MAX_SERVICES,
    Mode, Policy, PolicyError, Protocol, Rule, Service, is_never, is_private,
};
pub use pool::{Lease, Pool};
pub use slot::{GATEWAY, GATEWAY6, GUEST, GUEST_PREFIX, Guest, MAX_SLOTS, Place, Slot, TapName, TapNameError, Wiring};
pub use trace::{Trace, Traced};
