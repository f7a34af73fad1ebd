//! How a VMM ended, written once beside its description.
//!
//! Invariant: far-vmm refuses to boot where this record exists, so a VM that ended is never booted again.

use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};
use time::OffsetDateTime;

/// Bytes of a record that are read at most; the console's tail is its largest part.
const MAX_RECORD_BYTES: u64 = 64 * 1024;
/// Bytes of the console that a record keeps.
pub const CONSOLE_TAIL_BYTES: usize = 4096;

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// `--id` of far-vmm.
    pub vm_id: String,
    /// When far-vmm saw the end, by the blade's clock (RFC 3339 in the file).
    #[serde(with = "time::serde::rfc3339")]
    pub ended_at: OffsetDateTime,
    /// In which way.
    pub cause: ExitCause,
    /// Code of the VMM's process, 0 to 255; only with `exited`. Firecracker: 0 guest reset, else a fault of the VMM.
    pub code: Option<i32>,
    /// Signal that ended the VMM's process; only with `signaled`.
    pub signal: Option<i32>,
    /// Who asked for it; absent: nobody, the guest or the VMM ended by itself.
    #[serde(default)]
    pub asked: Option<Asked>,
    /// One sentence for people: the kernel's panic line, the VMM's last words, why it did not start.
    pub message: String,
    /// CPU time of the VMM and its vsock daemon, user and system, in microseconds.
    pub vmm_cpu_us: u64,
    /// The guest's console showed a kernel panic. The console is the guest's: a guest's root can claim one.
    pub kernel_panic: bool,
    /// Last [`CONSOLE_TAIL_BYTES`] of the console.
    #[serde(default)]
    pub console_tail: String,
}

/// In which way a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitCause {
    /// Its process ended with `code`.
    Exited,
    /// `signal` ended its process.
    Signaled,
    /// No guest ever ran; `message` says why.
    StartFailed,
}

/// Who asked for the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// `stop` on the control socket.
    Stop,
    /// `kill` on the control socket.
    Kill,
    /// `release` on the control socket while the VM ran, or its folder was removed.
    Release,
    /// SIGTERM, SIGINT or SIGHUP to far-vmm.
    Signal,
    /// far-vmm itself: the vsock daemon ended while the VM ran, which cuts the VM off for good.
    VsockLost,
    /// far-vmm itself: the lease was not renewed in time.
    LeaseOver,
}

impl ExitRecord {
    /// True for an end without sign of a fault of the VMM: its process ended with 0, or a caller asked for the end.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let by_caller = matches!(
            self.asked,
            Some(Asked::Stop | Asked::Kill | Asked::Release | Asked::Signal)
        );
        by_caller || (self.cause == ExitCause::Exited && self.code == Some(0) && self.asked.is_none())
    }

    /// `ended_at` in milliseconds since 1970.
    #[must_use]
    pub fn ended_at_unix_ms(&self) -> u64 {
        u64::try_from(self.ended_at.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
    }

    /// The record in `path`; `None` where there is none.
    ///
    /// # Errors
    /// The file cannot be read or is not a record.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        use io::Read;
        let mut text = Vec::new();
        match File::open(path) {
            Ok(file) => file.take(MAX_RECORD_BYTES).read_to_end(&mut text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("exit record {}: {error}", path.display()),
            )
        })
    }

    /// Writes the record so that after a crash there is all of it or nothing: temporary file, fsync, rename, fsync of
    /// the folder. Mode 0600.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension("json.tmp");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        serde_json::to_writer_pretty(&mut file, self)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ExitRecord {
        ExitRecord {
            vm_id: "fa-1".into(),
            ended_at: OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap(),
            cause: ExitCause::Exited,
            code: Some(0),
            signal: None,
            asked: None,
            message: "m".into(),
            vmm_cpu_us: 5,
            kernel_panic: false,
            console_tail: "\u{1b}[31m\u{fffd}".into(),
        }
    }

    #[test]
    fn a_record_reads_back_as_written_and_leaves_no_other_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exit.json");
        assert_eq!(ExitRecord::read(&path).unwrap(), None);
        record().write(&path).unwrap();
        assert_eq!(ExitRecord::read(&path).unwrap(), Some(record()));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn half_a_record_is_an_error_and_not_the_absence_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exit.json");
        std::fs::write(&path, "{\"vm_id\": \"fa").unwrap();
        assert!(ExitRecord::read(&path).is_err());
    }

    #[test]
    fn only_an_end_without_fault_is_clean() {
        let cases = [
            ("the guest ended", ExitCause::Exited, Some(0), None, true),
            ("the VMM failed", ExitCause::Exited, Some(1), None, false),
            ("somebody killed the VMM", ExitCause::Signaled, None, None, false),
            ("killed on request", ExitCause::Signaled, None, Some(Asked::Kill), true),
            (
                "the vsock daemon died",
                ExitCause::Signaled,
                None,
                Some(Asked::VsockLost),
                false,
            ),
            ("never started", ExitCause::StartFailed, None, None, false),
        ];
        for (why, cause, code, asked, clean) in cases {
            assert_eq!(
                ExitRecord {
                    cause,
                    code,
                    asked,
                    ..record()
                }
                .is_clean(),
                clean,
                "{why}"
            );
        }
    }
}
