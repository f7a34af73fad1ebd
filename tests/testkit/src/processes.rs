//! Processes that belong to one test, found by the folder in their command line: never by name alone.

use std::{fs, path::Path};

/// A running process, as `/proc` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Its arguments, joined by spaces.
    pub command: String,
}

/// Every live process whose command line mentions `folder`. Zombies have no command line and are not listed.
#[must_use]
pub fn mentioning(folder: &Path) -> Vec<Process> {
    let folder = folder.to_string_lossy();
    let me = std::process::id();
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let raw = fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&raw).trim_end_matches('\0').replace('\0', " ");
            (pid != me && command.contains(folder.as_ref())).then_some(Process { pid, command })
        })
        .collect()
}

/// Whether the process is still there and not only waiting to be reaped (proc(5), field 3 of `stat`). Its command line
/// is empty earlier than that, while it is being torn down.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.trim_start().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}
