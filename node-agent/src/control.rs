//! Host side of a VM's control stream (`far.guest.v1`): who may speak, in which order, and what is kept.
//!
//! ```text
//! v.sock_5000 ─► Listener: accepts at once, reads one Hello per connection (10 s, at most 8 at a time)
//!                   │ Dialled
//!                   ▼
//!               VM task: checks the nonce, replaces the session ─► session task: order, logs, acks
//!                   ▲                                                   │ SessionEvent
//!                   └───────────────────────────────────────────────────┘
//! ```
//! Calls of the node API that go into the guest (exec, cp, port-forward) are [`channels`] of the live session.
//! The guest is hostile until proven otherwise: each message is checked by [`protocol`] before anything is done with it,
//! and every queue and buffer here has a bound. The socket's path is the VM's identity; nothing a guest says is.

pub(crate) mod channels;
pub mod delivery;
mod inbox;
pub(crate) mod listener;
pub(crate) mod protocol;
pub(crate) mod session;
