//! Network of a blade's microVMs: taps in a network namespace of their own.
//!
//! The namespace has no uplink and forwards nothing, so a guest reaches the host end of its own tap and nothing else:
//! default deny by construction. Everything here needs CAP_NET_ADMIN and CAP_SYS_ADMIN; without them a guest has its
//! vsock device and no NIC, and [`capability`] says so in a sentence for the blade's status.
//!
//! Invariant: the machine's own network namespace is never changed. All changes are made by a helper thread that has
//! left it.

#![deny(unsafe_code)]

mod capability;
mod netns;
mod slot;
mod sys;

pub use capability::{NoNic, capability};
pub use netns::{GuestNetns, NetError};
pub use slot::{MAX_SLOTS, Slot, TapName, TapNameError};
