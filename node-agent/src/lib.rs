//! Node agent of a blade: ledger, microVM supervisor, control streams, logs, node API.
#![forbid(unsafe_code)]

pub mod clock;
mod files;
pub mod ledger;
pub mod logs;
pub mod names;
pub mod outcome;
pub mod record;
pub mod spec;
