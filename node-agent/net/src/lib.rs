//! Taps of the blade's microVMs, in a network namespace of their own.

mod capability;

pub use capability::{NoNic, capability};
