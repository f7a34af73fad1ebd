//! The VMMs that can run a guest: each is a pure function from the description to the programs to start.

pub mod firecracker;
pub mod qemu;

use std::{ffi::OsString, path::PathBuf};

/// One program to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its file.
    pub path: PathBuf,
    /// Its arguments, without its own name.
    pub args: Vec<OsString>,
}
