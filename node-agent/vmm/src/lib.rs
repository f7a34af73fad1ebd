//! Everything about one microVM's monitor: its description, what runs it, how it is asked and how it ended.
//!
//! The library is what far-node and `far doctor` use; the binary `far-vmm` is one process per VM.

#![deny(unsafe_code)]

pub mod additions;
pub mod backend;
pub mod config;
pub mod control;
pub mod exit;
pub mod lease;
pub mod probe;
pub mod pvh;
pub mod run;
pub mod sys;
pub mod vsock;

mod command;
mod console;

pub use additions::Additions;
pub use config::VmConfig;
pub use exit::ExitRecord;
