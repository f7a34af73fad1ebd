//! The three daemons of `far up`: starting them detached, knowing whether they run, waiting until they serve.
//!
//! ```text
//! stopped ─start─► starting ─ready file─► serving ─dies─► dead ─start─► …
//! ```
//!
//! Each has in `$FAR_STATE/run`: `NAME.pid` (who it is), `NAME.ready` (its address, written by itself once it serves, removed
//! before each start) and `NAME.address` (the last one, asked for again after a restart so that the others find it).

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::{
    folders::Folders,
    os,
    processes::{Process, ProcessError},
};

/// Time for a daemon to serve. Generous: a bound against hanging on a slow machine, not an expectation.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two looks for the ready file.
const LOOK: Duration = Duration::from_millis(25);
/// A log larger than this is cut at the next start or `far up`.
const LOG_MAX_BYTES: u64 = 16 << 20;
/// What is shown of a log on failure.
const LOG_TAIL_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error("there is no {program}: it is neither beside far ({beside}) nor on PATH; `make build` builds it")]
    NoProgram { program: &'static str, beside: PathBuf },
    #[error("starting {program}")]
    Spawn { program: &'static str, source: io::Error },
    #[error("using {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("{program} ended with {status} before it served. The end of {log}:\n{tail}")]
    Ended {
        program: &'static str,
        status: ExitStatus,
        log: PathBuf,
        tail: String,
    },
    #[error("{program} does not serve after {} s. The end of {log}:\n{tail}", READY_LIMIT.as_secs())]
    NotReady {
        program: &'static str,
        log: PathBuf,
        tail: String,
    },
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// One of the daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Daemon {
    Devapi,
    Controller,
    Node,
}

impl Daemon {
    /// In the order in which they start; they stop in reverse.
    pub(crate) const ALL: [Self; 3] = [Self::Devapi, Self::Controller, Self::Node];

    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::Devapi => "far-devapi",
            Self::Controller => "far-controller",
            Self::Node => "far-node",
        }
    }

    /// For people.
    pub(crate) const fn role(self) -> &'static str {
        match self {
            Self::Devapi => "Kubernetes API",
            Self::Controller => "controller",
            Self::Node => "node agent",
        }
    }

    fn file(self, folders: &Folders, end: &str) -> PathBuf {
        folders.pids().join(format!("{}.{end}", self.program()))
    }

    pub(crate) fn log(self, folders: &Folders) -> PathBuf {
        folders.logs().join(format!("{}.log", self.program()))
    }

    /// Removed before a start, written by the daemon.
    pub(crate) fn ready_file(self, folders: &Folders) -> PathBuf {
        self.file(folders, "ready")
    }

    /// The running daemon.
    pub(crate) fn process(self, folders: &Folders) -> Option<Process> {
        Process::from_file(&self.file(folders, "pid"))
    }

    /// It was started once and not stopped since.
    pub(crate) fn was_started(self, folders: &Folders) -> bool {
        self.file(folders, "pid").exists()
    }

    /// Where it serves; `None` before it does.
    pub(crate) fn address(self, folders: &Folders) -> Option<String> {
        read_address(&self.ready_file(folders))
    }

    /// Where to serve: as last time, else on a port that the kernel picks.
    pub(crate) fn listen(self, folders: &Folders) -> String {
        read_address(&self.file(folders, "address"))
            .filter(|address| std::net::TcpListener::bind(address.as_str()).is_ok())
            .unwrap_or_else(|| "127.0.0.1:0".to_owned())
    }

    /// Ends it and forgets its pid.
    pub(crate) async fn stop(self, folders: &Folders, grace: Duration) -> Result<Stopped, DaemonError> {
        let stopped = match self.process(folders) {
            None => Stopped::DidNotRun,
            Some(process) if process.end(grace).await? => Stopped::ByItself,
            Some(_) => Stopped::Killed,
        };
        for end in ["pid", "ready"] {
            remove(&self.file(folders, end))?;
        }
        Ok(stopped)
    }

    /// Starts it with these arguments and waits until it serves; answers its address.
    pub(crate) async fn start(self, folders: &Folders, arguments: Vec<String>) -> Result<String, DaemonError> {
        remove(&self.ready_file(folders))?;
        let log = self.log(folders);
        bound_log(&log)?;
        let from = fs::metadata(&log).map_or(0, |seen| seen.len());
        let mut child = self.spawn(folders, &log, arguments)?;
        let begin = Instant::now();
        loop {
            if let Some(address) = self.address(folders) {
                let path = self.file(folders, "address");
                fs::write(&path, format!("{address}\n")).map_err(|source| DaemonError::File { path, source })?;
                return Ok(address);
            }
            let ended = child.try_wait().map_err(|source| DaemonError::Spawn {
                program: self.program(),
                source,
            })?;
            if let Some(status) = ended {
                remove(&self.file(folders, "pid"))?;
                return Err(DaemonError::Ended {
                    program: self.program(),
                    status,
                    tail: tail(&log, from),
                    log,
                });
            }
            if begin.elapsed() > READY_LIMIT {
                // Left running, it would block the next try.
                let _ = self.stop(folders, Duration::from_secs(5)).await;
                return Err(DaemonError::NotReady {
                    program: self.program(),
                    tail: tail(&log, from),
                    log,
                });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn spawn(self, folders: &Folders, log: &Path, arguments: Vec<String>) -> Result<Child, DaemonError> {
        let program = find_program(self.program())?;
        let file_error = |source| DaemonError::File {
            path: log.to_path_buf(),
            source,
        };
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)
            .map_err(file_error)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("FAR_STATE", &folders.state)
            .env("FAR_RUN", &folders.run)
            .env("FAR_CACHE", &folders.cache)
            // Not the folder far was called in: that one may be unmounted or removed.
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(file_error)?)
            .stderr(output);
        let mut child = os::in_own_session(&mut command)
            .spawn()
            .map_err(|source| DaemonError::Spawn {
                program: self.program(),
                source,
            })?;
        let recorded = Process::live(child.id().cast_signed())
            .map_or(Ok(()), |process| process.write_file(&self.file(folders, "pid")));
        if let Err(error) = recorded {
            // Without its pid file nobody could stop it.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error.into());
        }
        Ok(child)
    }
}

/// How a daemon was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stopped {
    DidNotRun,
    ByItself,
    Killed,
}

/// A program of ours: beside this one, else on PATH.
pub(crate) fn find_program(program: &'static str) -> Result<PathBuf, DaemonError> {
    let beside = env::current_exe()
        .ok()
        .and_then(|me| me.parent().map(Path::to_path_buf))
        .unwrap_or_default();
    std::iter::once(beside.clone())
        .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default()))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
        .ok_or(DaemonError::NoProgram { program, beside })
}

/// `host:port` on the file's first line; `None` while there is none.
fn read_address(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().next()?.trim();
    let address = line
        .split_once("://")
        .map_or(line, |(_, address)| address)
        .trim_end_matches('/');
    (!address.is_empty()).then(|| address.to_owned())
}

/// Cuts a log that has grown too large to its newest half, in place: the daemon that writes it appends.
pub(crate) fn bound_log(log: &Path) -> Result<(), DaemonError> {
    let file_error = |source| DaemonError::File {
        path: log.to_path_buf(),
        source,
    };
    match fs::metadata(log) {
        Ok(seen) if seen.len() > LOG_MAX_BYTES => {}
        _ => return Ok(()),
    }
    let kept = read_from_end(log, LOG_MAX_BYTES / 2).map_err(file_error)?;
    fs::write(log, kept).map_err(file_error)
}

fn tail(log: &Path, from: u64) -> String {
    let size = fs::metadata(log).map_or(0, |seen| seen.len());
    let wanted = size.saturating_sub(from).min(LOG_TAIL_BYTES);
    let bytes = read_from_end(log, wanted).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_end();
    if text.is_empty() {
        "    (nothing was logged)".to_owned()
    } else {
        text.lines()
            .map(|line| format!("    {line}"))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

fn read_from_end(path: &Path, count: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(count)))?;
    let mut bytes = Vec::new();
    file.take(count).read_to_end(&mut bytes)?;
    Ok(bytes)
}

pub(crate) fn remove(path: &Path) -> Result<(), DaemonError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(DaemonError::File {
            path: path.to_path_buf(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_a_scheme() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ready");
        assert_eq!(read_address(&file), None, "not there yet");
        for (text, expected) in [
            ("127.0.0.1:4000\n", Some("127.0.0.1:4000")),
            ("https://127.0.0.1:4000/\n", Some("127.0.0.1:4000")),
            ("", None),
            ("\n", None),
        ] {
            fs::write(&file, text).unwrap();
            assert_eq!(read_address(&file).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_log_that_grew_too_large_keeps_its_newest_half() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("x.log");
        let size = usize::try_from(LOG_MAX_BYTES).unwrap();
        let mut text = vec![b'a'; size];
        fs::write(&log, &text).unwrap();
        bound_log(&log).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().len(), LOG_MAX_BYTES, "not too large yet");
        text.extend_from_slice(b"newest");
        fs::write(&log, &text).unwrap();
        bound_log(&log).unwrap();
        let kept = fs::read(&log).unwrap();
        assert_eq!(kept.len(), size / 2);
        assert!(kept.ends_with(b"newest"));
    }

    #[test]
    fn only_what_this_start_logged_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("x.log");
        fs::write(&log, "old\nnew\n").unwrap();
        assert_eq!(tail(&log, 4), "    new");
        assert_eq!(tail(&log, 8), "    (nothing was logged)");
    }

    #[test]
    fn a_program_that_is_nowhere_is_named_with_where_it_was_looked_for() {
        let error = find_program("far-no-such-program").unwrap_err().to_string();
        assert!(
            error.contains("far-no-such-program") && error.contains("PATH"),
            "{error}"
        );
    }
}
