//! far-init as PID 1 of its own namespaces, with this program as its blade: it reads, decodes and acknowledges as far-node
//! does, on one thread of tokio as the peer's end has it.

use std::{
    fs,
    os::unix::net::UnixListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use far_proto::{
    frame::{self, ACK_BYTES, ACK_RECORDS, Decoder},
    guest::{
        Config, Exec, ExitAck, GuestMessage, HostMessage, LogAck, SetTime, Shutdown, Start, Stream, Welcome,
        guest_message::Kind as Said, host_message::Kind,
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    runtime::Runtime,
};

use super::{calls_in, child_of, cpu_of, own_cpu, program, resident_of};

/// far-node's window.
const WINDOW: u32 = 512 << 10;
/// As much as far-node reads at once, bytes.
const READ_STEP: usize = 256 << 10;
const PATIENCE: Duration = Duration::from_secs(120);

/// A running payload under far-init.
pub(crate) struct Guest {
    _folder: tempfile::TempDir,
    unshare: Child,
    runtime: Runtime,
    line: Line,
    payload: u32,
}

impl Guest {
    pub(crate) fn start(steps: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        Self::start_by(steps, folder, |init, root| {
            let mut command = Command::new("unshare");
            command
                .args(["-mpfu", "--propagation", "private", "--kill-child"])
                .arg(init)
                .arg("--test-root")
                .arg(root);
            command
        })
    }

    /// The mount points are there, as the initramfs has them.
    fn start_by(steps: &[&str], folder: tempfile::TempDir, command: impl Fn(&Path, &Path) -> Command) -> Result<Self> {
        for name in ["image/bin", "image/etc", "proc", "far/root", "far/scratch"] {
            fs::create_dir_all(folder.path().join(name))?;
        }
        fs::copy(program("far-payload")?, folder.path().join("image/bin/payload"))?;
        let listener = UnixListener::bind(folder.path().join("control.sock"))?;
        let unshare = command(&program("far-init")?, folder.path())
            .stdin(Stdio::null())
            .spawn()
            .context("unshare")?;
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let stream = runtime.block_on(async { UnixStream::from_std(stream) })?;
        let mut guest = Self {
            _folder: folder,
            unshare,
            runtime,
            line: Line {
                stream,
                decoder: Decoder::new(),
            },
            payload: 0,
        };
        ensure!(matches!(guest.next()?, Said::Hello(_)), "the first word is not Hello");
        let config = Config {
            entrypoint: "/bin/payload".into(),
            args: steps.iter().map(ToString::to_string).collect(),
            hostname: "bench".into(),
            ..Config::default()
        };
        let welcome = Welcome {
            generation: 1,
            log_window_bytes: WINDOW,
            ..Welcome::default()
        };
        guest.send(&[Kind::Welcome(welcome), Kind::Config(config), Kind::Start(Start {})])?;
        match guest.next()? {
            Said::Ready(ready) => guest.payload = ready.pid,
            other => bail!("not Ready: {other:?}"),
        }
        Ok(guest)
    }

    fn next(&mut self) -> Result<Said> {
        self.runtime.block_on(self.line.next())
    }

    fn send(&mut self, kinds: &[Kind]) -> Result<()> {
        self.runtime.block_on(self.line.send(kinds))
    }

    /// far-init's process as this machine counts.
    fn init(&self) -> Result<u32> {
        child_of(self.unshare.id())
    }

    /// Takes all output to the exit; tells its bytes.
    fn drain(&mut self) -> Result<u64> {
        self.runtime.block_on(self.line.drain())
    }

    /// CPU seconds of both ends for calls that are answered one by one.
    pub(crate) fn calls(&mut self, count: u64) -> Result<f64> {
        let init = self.init()?;
        let before = own_cpu()? + cpu_of(init)?;
        let line = &mut self.line;
        self.runtime.block_on(async {
            for id in 1..=count {
                // Outside a guest its answer is a refusal: the same message.
                line.send(&[Kind::SetTime(SetTime { id, unix_ns: 1 })]).await?;
                ensure!(
                    matches!(line.next().await?, Said::Done(done) if done.id == id),
                    "another answer"
                );
            }
            Ok(())
        })?;
        Ok(own_cpu()? + cpu_of(init)? - before)
    }

    /// Ends the payload and far-init.
    pub(crate) fn end(mut self) -> Result<()> {
        self.send(&[Kind::Shutdown(Shutdown { grace_s: 0 })])?;
        self.drain()?;
        self.send(&[Kind::ExitAck(ExitAck {})])?;
        self.unshare.wait()?;
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// The control stream.
struct Line {
    stream: UnixStream,
    decoder: Decoder,
}

impl Line {
    async fn next(&mut self) -> Result<Said> {
        loop {
            if let Some(message) = self.decoder.next::<GuestMessage>()? {
                return message.kind.context("a message without kind");
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<()> {
        let reading = self.stream.read_buf(self.decoder.room(READ_STEP));
        let got = tokio::time::timeout(PATIENCE, reading)
            .await
            .context("the guest is silent")??;
        ensure!(got > 0, "the guest hung up");
        Ok(())
    }

    async fn send(&mut self, kinds: &[Kind]) -> Result<()> {
        let mut wire = Vec::new();
        for kind in kinds {
            frame::encode(
                &HostMessage {
                    kind: Some(kind.clone()),
                },
                &mut wire,
            );
        }
        self.stream.write_all(&wire).await.context("writing the control stream")
    }

    /// Acknowledges as far-node does, which stores between read and answer.
    async fn drain(&mut self) -> Result<u64> {
        let (mut bytes, mut unanswered) = (0, (0, 0));
        let mut stored = [None; 2];
        loop {
            while let Some(message) = self.decoder.next::<GuestMessage>()? {
                match message.kind.context("a message without kind")? {
                    Said::Log(log) => {
                        bytes += log.data.len() as u64;
                        unanswered = (unanswered.0 + log.data.len(), unanswered.1 + 1);
                        stored[usize::from(log.stream() == Stream::Stderr)] = Some((log.stream, log.seq));
                    }
                    Said::Exit(_) => return Ok(bytes),
                    _ => {}
                }
            }
            if unanswered.0 >= ACK_BYTES || unanswered.1 >= ACK_RECORDS {
                unanswered = (0, 0);
                let acks = std::mem::take(&mut stored).into_iter().flatten();
                let acks: Vec<Kind> = acks.map(|(stream, seq)| Kind::LogAck(LogAck { stream, seq })).collect();
                self.send(&acks).await?;
            }
            self.read().await?;
        }
    }
}

/// CPU seconds of both ends for a payload's output.
pub(crate) fn flood(bytes: u64) -> Result<f64> {
    let mut guest = Guest::start(&[&format!("flood={bytes}"), "exit=0"])?;
    let (init, before) = (guest.init()?, own_cpu()?);
    // What far-init spent before is its start, some milliseconds.
    let started = cpu_of(init)?;
    ensure!(guest.drain()? == bytes, "output is missing");
    let cpu = own_cpu()? - before + cpu_of(init)? - started;
    guest.send(&[Kind::ExitAck(ExitAck {})])?;
    guest.unshare.wait()?;
    Ok(cpu)
}

/// CPU microseconds of both ends for one program, started and ended.
pub(crate) fn execs(count: u64) -> Result<f64> {
    let mut guest = Guest::start(&["sleep=3600000"])?;
    let init = guest.init()?;
    let before = own_cpu()? + cpu_of(init)?;
    for channel in 1..=u32::try_from(count)? {
        let argv = vec!["/bin/payload".into(), "out=x".into()];
        guest.send(&[Kind::Exec(Exec {
            channel,
            argv,
            ..Exec::default()
        })])?;
        while !matches!(guest.next()?, Said::ChannelEnd(end) if end.channel == channel) {}
    }
    let cpu = own_cpu()? + cpu_of(init)? - before;
    guest.end()?;
    Ok(cpu * 1e6 / count as f64)
}

pub(crate) fn resident_kib() -> Result<f64> {
    let guest = Guest::start(&["sleep=3600000"])?;
    let resident = resident_of(guest.init()?)?;
    guest.end()?;
    Ok(resident)
}

/// CPU seconds of far-init while the payload leaves orphans and waits until none is a zombie.
pub(crate) fn orphans(count: u64) -> Result<f64> {
    let mut guest = Guest::start(&[&format!("orphans={count}"), "await-no-zombies", "exit=0"])?;
    guest.drain()?;
    let cpu = cpu_of(guest.init()?)?;
    guest.send(&[Kind::ExitAck(ExitAck {})])?;
    guest.unshare.wait()?;
    Ok(cpu)
}

/// Milliseconds from the kill of the payload until its exit report is here.
pub(crate) fn exit_ms() -> Result<f64> {
    let mut guest = Guest::start(&["sleep=3600000"])?;
    let payload = child_of(guest.init()?)?;
    let start = Instant::now();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(payload.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    guest.drain()?;
    let ms = start.elapsed().as_secs_f64() * 1e3;
    guest.send(&[Kind::ExitAck(ExitAck {})])?;
    guest.unshare.wait()?;
    Ok(ms)
}

/// From exec to the payload's exec, without the proof that the namespaces are its own; `None` without strace(1).
pub(crate) fn system_calls() -> Result<Option<f64>> {
    if !super::inits::has_strace() {
        return Ok(None);
    }
    let folder = tempfile::tempdir()?;
    let trace = folder.path().join("trace");
    let guest = Guest::start_by(&["sleep=3600000"], folder, |init, root| {
        let mut command = Command::new("strace");
        command.arg("-f").arg("-o").arg(root.join("trace")).args([
            "unshare",
            "-mpfu",
            "--propagation",
            "private",
            "--kill-child",
        ]);
        command.arg(init).arg("--test-root").arg(root);
        command
    })?;
    let init = program("far-init")?.display().to_string();
    let text = fs::read_to_string(&trace)?;
    guest.end()?;
    let at = |calls: &[&str], name: &str| calls.iter().position(|call| call.starts_with(name)).unwrap_or(0);
    Ok(calls_in(&text, &init, |calls| {
        at(calls, "mount(") - at(calls, "getpid(") - 1
    }))
}
