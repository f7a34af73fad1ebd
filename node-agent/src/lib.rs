//! Node agent of a blade: ledger, microVM supervisor, control streams, logs, node API.
#![forbid(unsafe_code)]

pub mod agent;
pub mod api;
pub mod board;
pub mod capacity;
pub mod client;
pub mod clock;
pub mod config;
pub mod control;
pub mod direct_host;
pub mod epoch;
pub mod fence;
mod files;
pub mod guests;
pub mod host;
pub mod ledger;
mod log_sink;
pub mod logs;
pub mod metrics;
pub mod names;
pub mod nics;
pub mod node;
pub mod outcome;
pub mod pulse;
pub mod record;
mod remote;
mod sparing;
pub mod spec;
pub mod store;
pub mod supervisor;
mod unix_socket;
mod wire;

#[cfg(test)]
mod stories;

pub use log_sink::LogSignal;
