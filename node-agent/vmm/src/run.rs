//! The life of one VM: start its VMM, watch it, write down its end, stay until released.
//!
//! ```text
//! starting ──► running ──► ended (exit.json) ──► gone
//!     └── could not be started ──► ended
//! ```
//! One thread around poll(2): a far-vmm costs little beside its VM, and its children die with it whatever happens.
//!
//! Invariant: a folder boots at most once: a marker is written and synced before the first process of a VM starts, and
//! far-vmm refuses to boot where that marker or an exit record exists.

mod child;
mod folder;
mod monitor;
mod server;
mod start;

use crate::{
    additions::Additions,
    config::ConfigError,
    exit::{ExitCause, ExitRecord},
};
use folder::VmFolder;
use monitor::Monitor;
use std::{io, path::PathBuf};

pub use folder::{BOOT_MARKER, FolderError};

/// Signals that ended a process are told as 128 + their number, as shells do.
const SIGNAL_BASE: i32 = 128;

/// What far-vmm was started for.
#[derive(Debug, Clone)]
pub struct Job {
    /// 1 to 64 of `[A-Za-z0-9-]`, as Firecracker's `--id`.
    pub vm_id: String,
    /// The description; `far.json` may lie beside it.
    pub config_file: PathBuf,
    /// Handed to Firecracker.
    pub metadata: Option<PathBuf>,
    /// Handed to Firecracker.
    pub boot_timer: bool,
    /// Handed to Firecracker.
    pub api_sock: Option<PathBuf>,
}

/// Why a VM was not even tried: nothing was written, no process was started.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// `--id` is no name.
    #[error("--id {vm_id:?}: 1 to 64 of [A-Za-z0-9-] are allowed")]
    VmId {
        /// What was given.
        vm_id: String,
    },
    /// `far.json` cannot be used.
    #[error("the additions (far.json) cannot be used")]
    Additions {
        /// Why.
        #[source]
        source: ConfigError,
    },
    /// The folder cannot be used, or was booted before.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The control socket or the signals cannot be set up.
    #[error("{operation}")]
    Setup {
        /// What was done.
        operation: String,
        /// Why.
        source: io::Error,
    },
}

/// Runs the VM and returns the code that far-vmm should end with: the VMM's own, 128 + n after signal n, 1 when it did
/// not start. Only for the main thread of the process: the VMM dies with the thread that starts it.
///
/// # Errors
/// The VM was not tried; see [`RunError`].
pub fn run(job: &Job) -> Result<i32, RunError> {
    let fits = (1..=64).contains(&job.vm_id.len());
    if !fits || !job.vm_id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(RunError::VmId {
            vm_id: job.vm_id.clone(),
        });
    }
    let folder = VmFolder::lock(&job.config_file)?;
    let additions = |source| RunError::Additions { source };
    let settings = Additions::load_beside(&folder.config_file()).map_err(additions)?;
    let settings = settings.resolve(folder.path()).map_err(additions)?;
    folder.refuse_second_boot(&settings.exit_file)?;
    let mut monitor = Monitor::new(job.clone(), settings, folder)?;
    let record = match start::start(&mut monitor) {
        Ok(()) => monitor.watch_vmm(),
        Err(error) => monitor.start_failed(&error),
    };
    let code = exit_code(&record);
    monitor.end(record);
    Ok(code)
}

fn exit_code(record: &ExitRecord) -> i32 {
    match record.cause {
        ExitCause::Exited => record.code.unwrap_or(1),
        ExitCause::Signaled => SIGNAL_BASE + record.signal.unwrap_or(0),
        ExitCause::StartFailed => 1,
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
