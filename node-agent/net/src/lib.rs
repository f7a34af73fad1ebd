//! Network of a blade's microVMs: taps in a network namespace of their own.
//!
//! The namespace has no uplink and forwards nothing, so a guest reaches the host end of its own tap and nothing else:
//! default deny by construction. Everything here needs CAP_NET_ADMIN and CAP_SYS_ADMIN; without them a guest has its
//! vsock device and no NIC, and [`capability`] says so in a sentence for the blade's status.
//!
//! Invariant: the machine's own network namespace is never changed. All changes are made by a helper thread that has
//! left it.

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

pub use bridge::{BridgeWatch, TapEvent};
pub use capability::{NoNic, capability};
pub use explain::{Explanation, Packet, Pinned, explain};
pub use netlink::Refused;
pub use netns::{GuestNetns, NetError};
pub use network::{Count, Counters, Network, NetworkError, Options, Proven, Reclaimed, Step};
pub use policy::{
    Cidr, CidrError, Destination, DnsName, DnsNameError, Limits, MAX_RATE, MAX_RULES, MAX_SERVICES, Mode, Policy,
    PolicyError, Protocol, Rule, Service, is_never, is_private,
};
pub use pool::{Lease, Pool};
pub use slot::{GATEWAY, GATEWAY6, GUEST, GUEST_PREFIX, Guest, MAX_SLOTS, Place, Slot, TapName, TapNameError, Wiring};
