//! A program beside the payload.
//!
//! ```text
//! report pending -> runs (Opened) -> ended, output at its end or silent for 1 s -> ChannelEnd
//!      \-- could not start: ChannelEnd with 126 or 127       Close, lost connection: HUP, TERM, after 5 s KILL
//! ```
//! PID 1 waits for nothing here: an image may make exec itself hang, and then only this channel does.

use super::{
    Companion, Problem,
    streams::{AtEnd, Sink, Source},
};
use crate::{
    cgroup::Cgroup,
    payload, plan,
    rootfs::{Root, Symlinks},
    spawn::{self, Child, Step, World, errno_of},
    sys::{self, How},
};
use far_proto::guest::{
    ChannelEnd, ChannelStream, EnvVar, ErrorKind, Exec, Opened, TerminalSize, channel_end, guest_message::Kind as Say,
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::PollFlags,
    sys::stat::Mode,
    unistd::{self, Gid, Pid, Uid},
};
use std::{
    ffi::CString,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

/// Arguments and environment together, bytes.
const MAX_ARGS_AND_ENV: usize = 512 << 10;
/// Between TERM and KILL when the channel was given up.
const GRACE: Duration = Duration::from_secs(5);
/// How long output may be held open by somebody else after the process's end.
const LINGER: Duration = Duration::from_secs(1);
/// Most folders of PATH that are looked at.
const MAX_PATH_FOLDERS: usize = 64;

/// A program on its way in, running, or on its way out.
pub(crate) struct Process {
    pid: Pid,
    program: String,
    report: Option<OwnedFd>,
    report_is_ready: bool,
    opened: bool,
    failure: Option<(Step, Errno)>,
    stdin: Sink,
    stdout: Source,
    stderr: Option<Source>,
    terminal: Option<OwnedFd>,
    ended: Option<(How, Instant)>,
    kill_at: Option<Instant>,
}

/// Starts what `exec` asks for.
pub(crate) fn start(
    exec: Exec,
    root: &Root,
    cgroup: Option<&Cgroup>,
    companion: &Companion,
) -> Result<Process, Problem> {
    let failed = |step: &'static str| move |errno: Errno| Problem::failed(step, errno);
    let io_failed = |step: &'static str| move |error: std::io::Error| Problem::failed(step, errno_of(&error));
    let program = exec.argv.first().filter(|name| !name.is_empty());
    let program = program.ok_or_else(|| Problem::invalid("argv is empty"))?.clone();
    let size = exec.argv.iter().map(String::len).sum::<usize>()
        + exec
            .env
            .iter()
            .map(|var| var.name.len() + var.value.len())
            .sum::<usize>();
    if size > MAX_ARGS_AND_ENV {
        return Err(Problem::invalid("argv and env are more than 512 KiB"));
    }
    let working_dir = match exec.working_dir.as_str() {
        "" => companion.working_dir.clone(),
        path if path.starts_with('/') && path.len() <= plan::MAX_PATH => text(path)?,
        _ => return Err(Problem::invalid("working_dir is not an absolute path")),
    };
    let other_user = match exec.user.as_str() {
        "" => None,
        name => Some(
            payload::identity(root, name)
                .map_err(|error| Problem::new(ErrorKind::NotFound, crate::power::with_sources(&error)))?,
        ),
    };
    let user = other_user.as_ref().unwrap_or(&companion.user);
    let vars = environment(companion, exec.env, other_user.as_ref().map(|user| user.home.as_str()))?;
    let programs = candidates(&program, &vars)?;
    let argv = exec.argv.iter().map(|word| text(word)).collect::<Result<Vec<_>, _>>()?;
    let env = vars
        .iter()
        .map(|(name, value)| text(&[name.as_str(), value.as_str()].join("=")))
        .collect::<Result<Vec<_>, _>>()?;
    let namespace = companion
        .namespace
        .as_ref()
        .ok_or_else(|| Problem::new(ErrorKind::NotRunning, "the payload's mount namespace is gone".into()))?;

    let ours = |fd: &OwnedFd| fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map(drop);
    let (stdin, stdout, stderr, terminal, theirs);
    if let Some(size) = exec.terminal {
        let (master, peer) = open_terminal(root, user.uid).map_err(failed("opening a terminal (/dev/pts/ptmx)"))?;
        resize(&master, size);
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(io_failed("copying a descriptor"));
        stdin = Sink::new(
            exec.stdin.then(|| copy(&master)).transpose()?,
            ChannelStream::Stdin,
            AtEnd::Type,
        );
        stdout = Source::new(copy(&master)?, ChannelStream::Stdout);
        stderr = None;
        terminal = Some(master);
        theirs = (copy(&peer)?, copy(&peer)?, peer);
    } else {
        let pipe = || unistd::pipe2(OFlag::O_CLOEXEC).map_err(failed("making a pipe"));
        let ((out, out_child), (err, err_child)) = (pipe()?, pipe()?);
        for fd in [&out, &err] {
            ours(fd).map_err(failed("setting up a pipe"))?;
        }
        let in_child = if exec.stdin {
            let (in_child, input) = pipe()?;
            ours(&input).map_err(failed("setting up a pipe"))?;
            stdin = Sink::new(Some(input), ChannelStream::Stdin, AtEnd::Close);
            in_child
        } else {
            stdin = Sink::new(None, ChannelStream::Stdin, AtEnd::Close);
            File::open("/dev/null").map_err(io_failed("opening /dev/null"))?.into()
        };
        for fd in [&in_child, &out_child, &err_child] {
            // So that /dev/stdout can be opened; /dev/null is not ours to give away.
            if exec.stdin || !std::ptr::eq(fd, &in_child) {
                unistd::fchown(fd, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))
                    .map_err(failed("setting up a pipe"))?;
            }
        }
        stdout = Source::new(out, ChannelStream::Stdout);
        stderr = Some(Source::new(err, ChannelStream::Stderr));
        terminal = None;
        theirs = (in_child, out_child, err_child);
    }
    let child = Child {
        world: World::OfPayload(namespace),
        user,
        limits: &companion.limits,
        allow_new_privileges: companion.allow_new_privileges,
        cgroup: cgroup.map(Cgroup::folder),
        stdin: theirs.0,
        stdout: theirs.1,
        stderr: theirs.2,
        terminal: terminal.is_some(),
        working_dir: &working_dir,
        programs: &programs,
        argv: &argv,
        env: &env,
    };
    let (pid, report) = child.spawn().map_err(io_failed("fork"))?;
    ours(&report).map_err(failed("setting up a pipe"))?;
    Ok(Process {
        pid,
        program,
        report: Some(report),
        report_is_ready: false,
        opened: false,
        failure: None,
        stdin,
        stdout,
        stderr,
        terminal,
        ended: None,
        kill_at: None,
    })
}

fn text(value: &str) -> Result<CString, Problem> {
    CString::new(value).map_err(|_| Problem::invalid("argv, env or a path contains a NUL byte"))
}

/// The payload's environment with `more` over it; `home` replaces HOME when another user was asked for.
fn environment(companion: &Companion, more: Vec<EnvVar>, home: Option<&str>) -> Result<Vec<(String, String)>, Problem> {
    let var = |name: &str, value: &str| EnvVar {
        name: name.into(),
        value: value.into(),
    };
    let mut all: Vec<EnvVar> = companion.env.iter().map(|(name, value)| var(name, value)).collect();
    if let Some(home) = home {
        all.push(var("HOME", if home.is_empty() { "/" } else { home }));
    }
    all.extend(more);
    plan::environment(all).map_err(|_| Problem::invalid("env: a name is empty, too long, or has \"=\" or NUL"))
}

/// Where the program may be.
fn candidates(program: &str, env: &[(String, String)]) -> Result<Vec<CString>, Problem> {
    if program.contains('/') {
        return Ok(vec![text(program)?]);
    }
    let folders = env
        .iter()
        .find(|(name, _)| name == "PATH")
        .map_or("", |(_, value)| value.as_str());
    folders
        .split(':')
        .filter(|folder| folder.starts_with('/'))
        .take(MAX_PATH_FOLDERS)
        .map(|folder| text(&[folder, program].join("/")))
        .collect()
}

/// A pseudo-terminal of the payload's own devpts: master (non-blocking) and the other end, which belongs to `uid`.
fn open_terminal(root: &Root, uid: u32) -> nix::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let master = root.open(Path::new("/dev/pts/ptmx"), flags, Mode::empty(), Symlinks::InsideRoot)?;
    let peer = sys::open_peer(&master).map_err(|error| errno_of(&error))?;
    unistd::fchown(&peer, Some(Uid::from_raw(uid)), None)?;
    Ok((master, peer))
}

fn resize(master: &OwnedFd, size: TerminalSize) {
    let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX).max(1);
    // A master always has a size.
    let _ = sys::set_terminal_size(master, clamp(size.rows), clamp(size.columns));
}

impl Process {
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// The kernel says how it ended.
    pub(crate) fn reaped(&mut self, how: How, now: Instant) {
        self.ended = Some((how, now));
        self.stdin.close();
    }

    pub(crate) fn resize(&mut self, size: TerminalSize) {
        if let Some(master) = &self.terminal {
            resize(master, size);
        }
    }

    /// To the terminal's foreground group, or to the process's own.
    pub(crate) fn signal(&self, number: u32) {
        let Some(number) = i32::try_from(number).ok().filter(|number| (1..=64).contains(number)) else {
            return;
        };
        if self.ended.is_none() {
            let group = self.terminal.as_ref().and_then(sys::foreground_of).unwrap_or(self.pid);
            self.kill(group, number);
        }
    }

    fn kill(&self, group: Pid, number: i32) {
        // Before the child's setsid there is no such group yet. The process is not reaped, so its number is its own.
        if sys::kill(Pid::from_raw(-group.as_raw()), number).is_err() {
            let _ = sys::kill(self.pid, number);
        }
    }

    /// Nobody wants it any more.
    pub(crate) fn give_up(&mut self, now: Instant) {
        self.stdin.close();
        self.stdout.discard();
        if let Some(stderr) = &mut self.stderr {
            stderr.discard();
        }
        if self.ended.is_none() && self.kill_at.is_none() {
            for number in [libc::SIGHUP, libc::SIGTERM, libc::SIGCONT] {
                self.kill(self.pid, number);
            }
            self.kill_at = Some(now + GRACE);
        }
        self.terminal = None;
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.ended {
            None => self.kill_at,
            Some((_, at)) if self.is_only_lingering() => Some(at + LINGER),
            Some(_) => None,
        }
    }

    pub(crate) fn keep_time(&mut self, now: Instant) {
        if self.ended.is_none() && self.kill_at.is_some_and(|at| at <= now) {
            self.kill(self.pid, libc::SIGKILL);
            self.kill_at = None;
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    fn sources(&self) -> impl Iterator<Item = &Source> {
        std::iter::once(&self.stdout).chain(&self.stderr)
    }

    fn is_only_lingering(&self) -> bool {
        self.sources().all(|source| source.is_over() || source.is_silent())
    }

    pub(crate) fn ports<'a>(&'a self, port: &mut dyn FnMut(BorrowedFd<'a>, PollFlags)) {
        if let Some(report) = &self.report {
            port(report.as_fd(), PollFlags::POLLIN);
        }
        let streams = self.sources().filter_map(Source::interest).chain(self.stdin.interest());
        for (fd, flags) in streams {
            port(fd, flags);
        }
    }

    /// Mirrors [`Self::ports`].
    pub(crate) fn found(&mut self, next: &mut dyn FnMut() -> PollFlags) {
        if self.report.is_some() {
            self.report_is_ready |= !next().is_empty();
        }
        for source in std::iter::once(&mut self.stdout).chain(&mut self.stderr) {
            if source.interest().is_some() {
                source.found(next());
            }
        }
        if self.stdin.interest().is_some() {
            self.stdin.found(next());
        }
    }

    pub(crate) fn take(&mut self, data: &[u8], last: bool) -> Result<(), Problem> {
        self.stdin.take(data, last).map_err(Problem::from)
    }

    /// Whether the program took everything that came, or never will.
    pub(crate) fn stdin_is_idle(&self) -> bool {
        self.stdin.interest().is_none()
    }

    /// For a host that gives no credit because its protocol has none.
    pub(crate) fn forget_credit(&mut self) {
        let _ = self.stdin.credit(0);
    }

    pub(crate) fn credit(&mut self, stream: ChannelStream, bytes: u32) {
        match stream {
            ChannelStream::Stdout => self.stdout.allowance.give(bytes),
            ChannelStream::Stderr => {
                if let Some(stderr) = &mut self.stderr {
                    stderr.allowance.give(bytes);
                }
            }
            ChannelStream::Stdin | ChannelStream::Unspecified => {}
        }
    }

    /// The next message; `None`: nothing now.
    pub(crate) fn next(&mut self, channel: u32, now: Instant) -> Option<Say> {
        if std::mem::take(&mut self.report_is_ready)
            && let Some(report) = self.report.take()
        {
            self.failure = spawn::read_report(report);
            if self.failure.is_none() {
                self.opened = true;
                return Some(Say::Opened(Opened {
                    channel,
                    pid: u32::try_from(self.pid.as_raw()).unwrap_or(0),
                }));
            }
        }
        if self.failure.is_none() && self.opened {
            if let Some(data) = self.stdout.next(channel) {
                return Some(Say::Data(data));
            }
            if let Some(data) = self.stderr.as_mut().and_then(|stderr| stderr.next(channel)) {
                return Some(Say::Data(data));
            }
            if let Some(credit) = self.stdin.credit(channel) {
                return Some(Say::Credit(credit));
            }
        }
        self.end(channel, now).map(Say::ChannelEnd)
    }

    fn end(&self, channel: u32, now: Instant) -> Option<ChannelEnd> {
        if let Some((step, errno)) = self.failure {
            return Some(self.not_started(channel, step, errno));
        }
        let (_, at) = self.ended?;
        // The report is there by now: the child that would write it is gone.
        let is_told = self.report.is_none();
        let is_drained = self.sources().all(Source::is_over) || (self.is_only_lingering() && now >= at + LINGER);
        (is_told && is_drained).then(|| self.how_it_ended(channel))
    }

    /// Code or signal, as far as it is known.
    pub(crate) fn how_it_ended(&self, channel: u32) -> ChannelEnd {
        let how = self.ended.map(|(how, _)| match how {
            How::Exited { code } => channel_end::How::Code(code),
            How::Signaled { signal, .. } => channel_end::How::Signal(signal),
        });
        ChannelEnd {
            channel,
            how,
            ..ChannelEnd::default()
        }
    }

    fn not_started(&self, channel: u32, step: Step, errno: Errno) -> ChannelEnd {
        let is_missing = step == Step::Exec && errno == Errno::ENOENT;
        let what = if step == Step::Exec { &self.program } else { step.name() };
        let problem = if is_missing {
            Problem::new(
                ErrorKind::NotFound,
                [what, ": not found in the agent's file system"].concat(),
            )
        } else {
            Problem::failed(what, errno)
        };
        ChannelEnd {
            how: Some(channel_end::How::Code(if is_missing {
                payload::NOT_FOUND
            } else {
                payload::NOT_EXECUTABLE
            })),
            ..problem.end(channel)
        }
    }
}
