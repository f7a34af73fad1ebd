//! Placement and lifecycle as pure functions: no kube, no tokio, no clock, no files.
//!
//! Facts come in as arguments, decisions and statuses go out as values; `far-controller` does the watching, calling and
//! writing. [`placement`] chooses blades, [`lifecycle`] says what to do next with one agent, [`status`] says what may be
//! claimed about it, [`pools`] how many agents are kept warm, [`tasks`] what a queue does next,
//! [`text`] bounds what others say.
#![forbid(unsafe_code)]

pub mod eviction;
pub mod identity;
pub mod lifecycle;
pub mod placement;
pub mod pools;
pub mod quantity;
pub mod retry;
pub mod status;
pub mod tasks;
pub mod text;
