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
//! The guest is hostile until proven otherwise: each message is checked by [`protocol`] before anything is done with it,
//! and every queue and buffer here has a bound. The socket's path is the VM's identity; nothing a guest says is.

pub mod delivery;
pub(crate) mod listener;
pub(crate) mod protocol;
pub(crate) mod session;
