//! A small blade for tests: the host's end of the control stream on a Unix socket, and the static guest programs.
//!
//! It stores log records like a real host (in order, once) and can drop its connection at any moment.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod host;
pub mod sandbox;

use anyhow::{Context, bail, ensure};
use far_proto::{
    frame::{self, Decoder},
    guest::{
        Config, Exit, ExitAck, FileChunk, FileEntry, GuestMessage, Heartbeat, Hello, HostMessage, LogAck, Ready, Stage,
        Start, Welcome, guest_message::Kind as FromGuest, host_message::Kind as ToGuest,
    },
};
use nix::poll::{PollFd, PollFlags, poll};
use sha2::{Digest, Sha256};
use std::{
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Longest wait for anything, seconds: a busy machine is no reason to fail.
pub const LIMIT_S: u16 = 120;

/// The blade's side of one VM.
pub struct Blade {
    listener: UnixListener,
    pub config: Config,
    pub files: Vec<(String, u32, Vec<u8>)>,
    /// Paths of `files` that are sealed.
    pub sealed: Vec<String>,
    pub window: u32,
    pub heartbeat_ms: u32,
    pub answers_heartbeats: bool,
    pub hellos: Vec<Hello>,
    pub ready: Option<Ready>,
    pub heartbeats: u64,
    pub last_heartbeat: Option<Heartbeat>,
    /// Stored bytes and last sequence number of stdout and stderr.
    pub stored: [(Vec<u8>, u64); 2],
    /// Records that came again after a reconnect.
    pub repeated: usize,
}

/// One connection of the guest.
pub struct Connection {
    stream: UnixStream,
    decoder: Decoder,
}

/// What a step of the conversation brought.
#[derive(Debug)]
pub enum Event {
    Ready,
    Log,
    Heartbeat,
    Exit(Exit),
    /// A message of a channel, or the answer to a request.
    Other(FromGuest),
}

impl Blade {
    pub fn listen(socket: &Path, entrypoint: &str, args: &[&str]) -> anyhow::Result<Self> {
        let config = Config {
            entrypoint: entrypoint.into(),
            args: args.iter().map(ToString::to_string).collect(),
            termination_grace_s: 5,
            ..Config::default()
        };
        Ok(Self {
            listener: UnixListener::bind(socket)?,
            config,
            files: vec![],
            sealed: vec![],
            window: 64 << 10,
            heartbeat_ms: 0,
            answers_heartbeats: false,
            hellos: vec![],
            ready: None,
            heartbeats: 0,
            last_heartbeat: None,
            stored: Default::default(),
            repeated: 0,
        })
    }

    pub fn text(&self, stream: usize) -> String {
        String::from_utf8_lossy(&self.stored[stream].0).into_owned()
    }

    /// Waits for the guest and answers its Hello; sends the configuration when the guest waits for it.
    pub fn accept(&mut self) -> anyhow::Result<Connection> {
        let mut connection = self.accept_silently()?;
        let mut words = vec![ToGuest::Welcome(Welcome {
            generation: 1,
            stored_stdout_seq: self.stored[0].1,
            stored_stderr_seq: self.stored[1].1,
            log_window_bytes: self.window,
            heartbeat_interval_ms: self.heartbeat_ms,
            answers_heartbeats: self.answers_heartbeats,
        })];
        if self.hellos.last().unwrap().stage() == Stage::WaitingForConfig {
            words.extend(self.configuration());
        }
        // In one piece, as far-node does.
        let mut bytes = Vec::new();
        for kind in words {
            frame::encode(&HostMessage { kind: Some(kind) }, &mut bytes);
        }
        connection.send_raw(&bytes)?;
        Ok(connection)
    }

    /// Waits for the guest and its Hello, and says nothing.
    pub fn accept_silently(&mut self) -> anyhow::Result<Connection> {
        wait_readable(&self.listener).context("no guest connected")?;
        let (stream, _) = self.listener.accept()?;
        let mut connection = Connection {
            stream,
            decoder: Decoder::new(),
        };
        let Some(FromGuest::Hello(hello)) = connection.next()? else {
            bail!("the first message is not Hello")
        };
        ensure!(hello.boot_nonce.len() == 16 && hello.lowest_generation == 1);
        if let Some(first) = self.hellos.first() {
            ensure!(first.boot_nonce == hello.boot_nonce, "another nonce in the same boot");
        }
        self.hellos.push(hello);
        Ok(connection)
    }

    fn configuration(&self) -> Vec<ToGuest> {
        let mut config = self.config.clone();
        config
            .files
            .extend(self.files.iter().map(|(path, mode, data)| FileEntry {
                path: path.clone(),
                mode: *mode,
                size: data.len() as u64,
                sha256: Sha256::digest(data).to_vec(),
                sealed: self.sealed.contains(path),
            }));
        let mut words = vec![ToGuest::Config(config)];
        for (file, (_, _, data)) in self.files.iter().enumerate() {
            for (n, part) in data.chunks(100_000).enumerate() {
                let offset = n as u64 * 100_000;
                words.push(ToGuest::FileChunk(FileChunk {
                    file: file as u32,
                    offset,
                    data: part.to_vec(),
                }));
            }
        }
        words.push(ToGuest::Start(Start {}));
        words
    }

    /// Reads one message, stores and acknowledges what is to be stored. `None`: the guest is gone.
    pub fn step(&mut self, connection: &mut Connection) -> anyhow::Result<Option<Event>> {
        Ok(match connection.next()? {
            None => None,
            Some(FromGuest::Hello(_)) => bail!("a second Hello on one connection"),
            Some(FromGuest::Ready(ready)) => {
                self.ready = Some(ready);
                Some(Event::Ready)
            }
            Some(FromGuest::Heartbeat(heartbeat)) => {
                self.heartbeats += 1;
                ensure!(heartbeat.seq > self.last_heartbeat.as_ref().map_or(0, |last| last.seq));
                self.last_heartbeat = Some(heartbeat);
                Some(Event::Heartbeat)
            }
            Some(FromGuest::Log(log)) => {
                let (bytes, last) = &mut self.stored[usize::try_from(log.stream - 1)?];
                ensure!(!log.data.is_empty() && log.data.len() <= 64 << 10 && log.time_unix_ns > 0);
                ensure!(log.seq <= *last + 1, "a gap: record {} after {last}", log.seq);
                if log.seq == *last + 1 {
                    bytes.extend_from_slice(&log.data);
                    *last = log.seq;
                } else {
                    self.repeated += 1;
                }
                let seq = *last;
                // The guest may be gone in a test that kills it.
                let _ = connection.send(ToGuest::LogAck(LogAck {
                    stream: log.stream,
                    seq,
                }));
                Some(Event::Log)
            }
            Some(FromGuest::Exit(exit)) => Some(Event::Exit(exit)),
            Some(other) => Some(Event::Other(other)),
        })
    }

    /// Serves until the exit report; does not acknowledge it.
    pub fn until_exit(&mut self, connection: &mut Connection) -> anyhow::Result<Exit> {
        loop {
            match self.step(connection)? {
                Some(Event::Exit(exit)) => {
                    ensure!(exit.last_stdout_seq == self.stored[0].1, "stdout is not complete");
                    ensure!(exit.last_stderr_seq == self.stored[1].1, "stderr is not complete");
                    return Ok(exit);
                }
                Some(_) => {}
                None => bail!("the guest went away without an exit report"),
            }
        }
    }

    /// The whole life on one connection, acknowledged.
    pub fn serve(&mut self) -> anyhow::Result<Exit> {
        let mut connection = self.accept()?;
        let exit = self.until_exit(&mut connection)?;
        connection.send(ToGuest::ExitAck(ExitAck {}))?;
        Ok(exit)
    }
}

impl Connection {
    pub fn send(&mut self, kind: ToGuest) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        frame::encode(&HostMessage { kind: Some(kind) }, &mut bytes);
        Ok(self.stream.write_all(&bytes)?)
    }

    pub fn send_raw(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.stream.write_all(bytes)?)
    }

    /// The next message; `None`: the guest closed the connection.
    pub fn next(&mut self) -> anyhow::Result<Option<FromGuest>> {
        loop {
            if let Some(message) = self.decoder.next::<GuestMessage>()? {
                return Ok(Some(message.kind.context("a message without a kind")?));
            }
            wait_readable(&self.stream).context("the guest is silent")?;
            let mut buffer = vec![0; 65536];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether the guest closes the connection; everything before is dropped.
    pub fn is_closed_by_guest(&mut self) -> anyhow::Result<()> {
        while self.next()?.is_some() {}
        Ok(())
    }
}

fn wait_readable(fd: &impl AsFd) -> anyhow::Result<()> {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let count = poll(&mut fds, LIMIT_S.saturating_mul(500))?;
    ensure!(count == 1, "nothing came within {} s", LIMIT_S / 2);
    Ok(())
}

/// Says why a test did not run.
pub fn skip(test: &str, missing: &str) {
    eprintln!("SKIPPED {test}: {missing}");
}

/// The folder with the static guest programs (`far-init`, `tiffany`, `far-payload`): `FAR_GUEST_BIN_DIR`, else built now.
pub fn guest_programs() -> anyhow::Result<&'static Path> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| match std::env::var_os("FAR_GUEST_BIN_DIR") {
        Some(folder) => Ok(folder.into()),
        None => build_guest_programs().map_err(|error| format!("{error:#}")),
    });
    folder.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn build_guest_programs() -> anyhow::Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    // The test itself lies in <target>/<profile>/deps.
    let own = std::env::current_exe()?;
    let target = own
        .ancestors()
        .nth(3)
        .context("the target folder above the test")?
        .to_owned();
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--profile", "guest", "--target", TARGET])
        .args(["-p", "far-init", "-p", "tiffany", "-p", "far-payload", "--target-dir"])
        .arg(&target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()?;
    ensure!(status.success(), "building the guest programs");
    Ok(target.join(TARGET).join("guest"))
}

/// Kills and reaps a child when the test ends, however it ends.
pub struct Child(pub std::process::Child);

impl Child {
    /// Waits for the end, at most [`LIMIT_S`].
    pub fn wait(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        let pidfd = pidfd(self.0.id())?;
        wait_readable(&pidfd).context("the process does not end")?;
        Ok(self.0.wait()?)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pidfd(pid: u32) -> anyhow::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: pidfd_open(2) takes two numbers; the result is a new descriptor that nobody else owns.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::c_long, 0_i64) };
    ensure!(fd >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
    // SAFETY: as above.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd as i32) })
}
