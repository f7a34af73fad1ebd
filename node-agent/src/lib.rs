//! Node agent of a blade: ledger, microVM supervisor, control streams, logs, node API.
#![forbid(unsafe_code)]

pub mod agent;
pub mod board;
pub mod clock;
pub mod control;
mod files;
pub mod host;
pub mod ledger;
mod log_sink;
pub mod logs;
pub mod names;
pub mod outcome;
pub mod record;
pub mod spec;
pub mod supervisor;

pub use log_sink::LogSignal;
