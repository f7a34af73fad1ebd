//! Which process is whose: a pid alone may be another program's by now, so a pid file also says when the process began.
//!
//! Identity of a process: (boot id of the kernel, pid, start time in clock ticks since boot). Two processes never share it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Pause between two looks at a process.
const LOOK: Duration = Duration::from_millis(25);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("reading {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("writing {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("sending {signal} to process {pid}")]
    Signal {
        pid: i32,
        signal: Signal,
        source: nix::Error,
    },
    #[error("process {pid} is still there {seconds} s after SIGKILL")]
    Stuck { pid: i32, seconds: u64 },
}

/// One process, for as long as this kernel runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    start_ticks: u64,
    boot_id: String,
}

impl Process {
    /// The live process with this pid. A zombie is none: it does nothing any more, and in some containers nobody reaps it.
    pub(crate) fn live(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_ticks) = parse_stat(&stat)?;
        if matches!(state, 'Z' | 'X') {
            return None;
        }
        Some(Self {
            pid,
            start_ticks,
            boot_id: boot_id(),
        })
    }

    /// Whether exactly this process still runs.
    pub(crate) fn is_alive(&self) -> bool {
        Self::live(self.pid).as_ref() == Some(self)
    }

    /// The process a pid file names, when it still runs. A file that is missing, torn or of an earlier boot names none.
    pub(crate) fn from_file(path: &Path) -> Option<Self> {
        let recorded = Self::parse(&fs::read_to_string(path).ok()?)?;
        recorded.is_alive().then_some(recorded)
    }

    pub(crate) fn write_file(&self, path: &Path) -> Result<(), ProcessError> {
        fs::write(path, format!("{} {} {}\n", self.pid, self.start_ticks, self.boot_id)).map_err(|source| {
            ProcessError::Write {
                path: path.to_path_buf(),
                source,
            }
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        Some(Self {
            pid: words.next()?.parse().ok().filter(|pid| *pid > 0)?,
            start_ticks: words.next()?.parse().ok()?,
            boot_id: words.next()?.to_owned(),
        })
    }

    /// Sends a signal; a process that is gone already is no error.
    pub(crate) fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(source) => Err(ProcessError::Signal {
                pid: self.pid,
                signal,
                source,
            }),
        }
    }

    /// Waits until the process is gone; `false` when it is still there after `limit`.
    pub(crate) async fn is_gone_within(&self, limit: Duration) -> bool {
        let start = Instant::now();
        while self.is_alive() {
            if start.elapsed() > limit {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }

    /// TERM, then KILL after `grace`. Answers whether it went by itself.
    pub(crate) async fn end(&self, grace: Duration) -> Result<bool, ProcessError> {
        self.signal(Signal::SIGTERM)?;
        if self.is_gone_within(grace).await {
            return Ok(true);
        }
        self.signal(Signal::SIGKILL)?;
        // Only a process in uninterruptible sleep outlives SIGKILL for long.
        let limit = Duration::from_secs(30);
        if self.is_gone_within(limit).await {
            return Ok(false);
        }
        Err(ProcessError::Stuck {
            pid: self.pid,
            seconds: limit.as_secs(),
        })
    }

    /// Its program was replaced or removed since it started: the kernel marks the link so (proc(5), `/proc/pid/exe`).
    pub(crate) fn is_of_replaced_program(&self) -> bool {
        fs::read_link(format!("/proc/{}/exe", self.pid))
            .is_ok_and(|program| program.as_os_str().as_encoded_bytes().ends_with(b" (deleted)"))
    }

    /// How long it has run.
    pub(crate) fn age(&self) -> Option<Duration> {
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
        // Clock ticks in /proc are USER_HZ, 100 per second on every architecture Linux runs on for us (proc(5)).
        #[allow(clippy::cast_precision_loss)]
        let age = uptime - self.start_ticks as f64 / 100.0;
        Duration::try_from_secs_f64(age).ok()
    }
}

/// Live processes of the program `name` that have `argument` in their command line: as an argument's beginning, or as a list's
/// `path=`.
pub(crate) fn with_argument(name: &str, argument: &Path) -> Result<Vec<Process>, ProcessError> {
    let proc = Path::new("/proc");
    let entries = fs::read_dir(proc).map_err(|source| ProcessError::Read {
        path: proc.to_path_buf(),
        source,
    })?;
    let wanted = argument.as_os_str().as_encoded_bytes();
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let mut words = command.split(|byte| *byte == 0);
            let program = words.next()?.rsplit(|byte| *byte == b'/').next()?;
            (program == name.as_bytes() && words.any(|word| names(word, wanted))).then(|| Process::live(pid))?
        })
        .collect())
}

/// QEMU's words are lists: `socket,id=vsock,path=/run/far/vm/…`.
fn names(word: &[u8], path: &[u8]) -> bool {
    let mut parts = word.split(|byte| *byte == b',');
    word.starts_with(path) || parts.any(|part| part.strip_prefix(b"path=").is_some_and(|of| of.starts_with(path)))
}

/// State and start time out of `/proc/<pid>/stat`. The name in parentheses may itself have spaces and parentheses, so
/// the fields are counted from the last `)`: state is the 3rd of all, start time the 22nd (proc(5)).
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some((state, start_ticks))
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_else(|_| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_as_a_word_and_in_a_list_and_nowhere_else() {
        for (word, expected) in [
            ("/run/far/vm/x/v.sock", true),
            ("socket,id=vsock,path=/run/far/vm/x/vhost.sock", true),
            ("path=/run/far/vm", true),
            ("socket,path=/tmp/run/far/vm/x", false),
            ("/tmp/run/far/vm", false),
            ("guest=/run/far/vm", false),
        ] {
            assert_eq!(names(word.as_bytes(), b"/run/far/vm"), expected, "{word}");
        }
    }

    fn me() -> Process {
        Process::live(std::process::id().cast_signed()).unwrap()
    }

    #[test]
    fn start_time_is_found_behind_any_name() {
        let tail = "1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9";
        for (why, stat, expected) in [
            ("plain", format!("7 (far-node) S {tail}"), Some(('S', 4242))),
            (
                "name with spaces and )",
                format!("7 (a) b) Z {tail}"),
                Some(('Z', 4242)),
            ),
            ("torn", "7 (far-node) S 1 1".to_owned(), None),
            ("empty", String::new(), None),
        ] {
            assert_eq!(parse_stat(&stat), expected, "{why}");
        }
    }

    #[test]
    fn a_pid_file_names_its_process_and_no_later_one_with_the_same_pid() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.pid");
        me().write_file(&file).unwrap();
        assert_eq!(Process::from_file(&file), Some(me()));
        for (why, text) in [
            (
                "another start time",
                format!("{} {} {}", me().pid, me().start_ticks + 1, me().boot_id),
            ),
            ("an earlier boot", format!("{} {} old", me().pid, me().start_ticks)),
            ("torn", format!("{}", me().pid)),
            ("a process group", format!("-1 {} {}", me().start_ticks, me().boot_id)),
            ("empty", String::new()),
        ] {
            fs::write(&file, text).unwrap();
            assert_eq!(Process::from_file(&file), None, "{why}");
        }
    }

    #[tokio::test]
    async fn ending_a_process_waits_for_it_and_counts_a_zombie_as_gone() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let process = Process::live(child.id().cast_signed()).unwrap();
        // Not reaped before it ended: it stays as a zombie.
        assert!(process.end(Duration::from_secs(60)).await.unwrap());
        assert!(!process.is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn a_program_that_was_built_again_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("sleeper");
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = std::process::Command::new(&program).arg("600").spawn().unwrap();
        let process = Process::live(child.id().cast_signed()).unwrap();
        assert!(!process.is_of_replaced_program());
        fs::remove_file(&program).unwrap();
        fs::copy("/bin/sleep", &program).unwrap();
        assert!(process.is_of_replaced_program());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_process_that_ignores_term_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let ready = folder.path().join("ready");
        let script = format!("trap '' TERM; : > {}; while :; do sleep 1; done", ready.display());
        let mut child = std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
        let process = Process::live(child.id().cast_signed()).unwrap();
        while !ready.exists() {
            tokio::time::sleep(LOOK).await;
        }
        assert!(!process.end(Duration::from_millis(200)).await.unwrap());
        child.wait().unwrap();
    }
}
