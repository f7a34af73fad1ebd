//! The loop: signals, control requests, the console and the ends of processes, one thing at a time.

use super::{
    Job, RunError, chain,
    child::{Process, describe},
    folder::VmFolder,
    server::{Server, remove_socket},
    start::StartError,
};
use crate::{
    additions::Settings,
    console::{Console, Tail},
    control::{Answer, Request, State, Status},
    exit::{Asked, CONSOLE_TAIL_BYTES, ExitCause, ExitRecord},
    lease,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{UsageWho, getrusage},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        time::TimeValLike,
    },
};
use std::{
    io,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::PathBuf,
    process::ExitStatus,
    time::{Duration, Instant},
};
use time::OffsetDateTime;

/// From a stop to the kill, for a VMM that does not end.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How often the folder is looked for.
const FOLDER_LOOK: Duration = Duration::from_secs(1);
/// Bytes of the console read in one turn, so that a guest that writes without end does not keep requests waiting.
const CONSOLE_SHARE: usize = 256 * 1024;
/// Bytes of the processes' messages that are kept.
const MESSAGES_BYTES: usize = 4096;

/// Writes a line to standard error; a reader that is gone must not end the VM, as `eprintln!` would.
macro_rules! tell {
    ($($words:tt)*) => {
        { use std::io::Write; let _ = writeln!(std::io::stderr(), $($words)*); }
    };
}

/// The VMM's process.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) process: Process,
}

/// All that far-vmm knows and holds.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) job: Job,
    pub(crate) settings: Settings,
    pub(crate) folder: VmFolder,
    pub(crate) backend: String,
    pub(crate) accel: String,
    /// Socket files to remove in the end, beside the control socket.
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) vsock: Option<Process>,
    vmm: Option<Vmm>,
    signals: SignalFd,
    server: Server,
    console: Console,
    messages: Tail,
    asked: Option<Asked>,
    kill_at: Option<Instant>,
    /// Do not stay after the VMM's end.
    going: bool,
    folder_looked: Instant,
    ended: Option<ExitRecord>,
}

/// What poll(2) woke up for.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Listener,
    Client(usize),
    Vmm,
    Vsock,
}

impl Monitor {
    /// Blocks the signals, listens on the control socket, opens the console's file.
    pub(crate) fn new(job: Job, settings: Settings, folder: VmFolder) -> Result<Self, RunError> {
        let setup = |operation: String| move |source: io::Error| RunError::Setup { operation, source };
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
            set.add(signal);
        }
        set.thread_block()
            .map_err(io::Error::from)
            .map_err(setup("blocking signals".into()))?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
        let signals = signals
            .map_err(io::Error::from)
            .map_err(setup("listening for signals".into()))?;
        let control = &settings.control_socket;
        let listening = setup(format!("listening on the control socket {}", control.display()));
        let server = Server::listen(control).map_err(listening)?;
        let console = setup(format!(
            "creating the console's file {}",
            settings.console_file.display()
        ));
        let console =
            Console::create(&settings.console_file, settings.console_max_bytes, CONSOLE_TAIL_BYTES).map_err(console)?;
        Ok(Self {
            job,
            settings,
            folder,
            backend: String::new(),
            accel: String::new(),
            sockets: Vec::new(),
            vsock: None,
            vmm: None,
            signals,
            server,
            console,
            messages: Tail::new(MESSAGES_BYTES),
            asked: None,
            kill_at: None,
            going: false,
            folder_looked: Instant::now(),
            ended: None,
        })
    }

    pub(crate) fn started(&mut self, vmm: Vmm) {
        self.vmm = Some(vmm);
    }

    /// True once far-vmm was told to go, also in the middle of a start.
    pub(crate) fn is_going(&self) -> bool {
        self.going || self.asked.is_some()
    }

    /// The last line that a process wrote on its standard error.
    pub(crate) fn last_words(&self) -> String {
        let text = self.messages.text();
        let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
        last.unwrap_or("it said nothing")
            .chars()
            .filter(|c| !c.is_control())
            .take(512)
            .collect()
    }

    /// Until the VMM has ended; its record.
    pub(crate) fn watch_vmm(&mut self) -> ExitRecord {
        self.look_at_lease();
        loop {
            if let Some(status) = self.vmm.as_mut().and_then(|vmm| vmm.process.ended()) {
                return self.vmm_ended(status);
            }
            if self.asked.is_none()
                && let Some(status) = self.vsock.as_mut().and_then(Process::ended)
            {
                // Its last words, and not the VMM's console: the VMM still writes that.
                self.read_vsock();
                let words = self.last_words();
                self.messages
                    .push(format!("\nthe vsock daemon ended ({}): {words}\n", describe(status)).as_bytes());
                self.kill(Asked::VsockLost);
            }
            self.turn(FOLDER_LOOK);
        }
    }

    /// One turn of the loop: waits at most `limit` for something to happen and deals with it.
    pub(crate) fn turn(&mut self, limit: Duration) {
        for source in self.wait(limit) {
            match source {
                Source::Signals => self.read_signals(),
                Source::Listener => self.server.accept(),
                Source::Client(place) => self.read_request(place),
                Source::Vmm => self.read_vmm(CONSOLE_SHARE),
                Source::Vsock => self.read_vsock(),
            }
        }
        if self.kill_at.is_some_and(|at| Instant::now() >= at) {
            self.kill_at = None;
            self.signal_vmm(Signal::SIGKILL);
        }
        if self.folder_looked.elapsed() >= FOLDER_LOOK {
            self.folder_looked = Instant::now();
            if !self.folder.is_there() {
                self.going = true;
                self.kill(Asked::Release);
            }
            self.look_at_lease();
        }
    }

    /// Nobody but far-vmm may be left to end the VM.
    fn look_at_lease(&mut self) {
        let file = self.settings.lease_file.as_ref();
        if self.asked.is_none() && file.is_some_and(|file| lease::is_over(file, lease::now_ms())) {
            self.kill(Asked::LeaseOver);
        }
    }

    fn wait(&self, limit: Duration) -> Vec<Source> {
        let mut fds = vec![
            (Source::Signals, self.signals.as_fd()),
            (Source::Listener, self.server.listener_fd()),
        ];
        fds.extend(self.server.client_fds().map(|(place, fd)| (Source::Client(place), fd)));
        if let Some(Vmm { process }) = &self.vmm {
            fds.extend(
                [process.stdout.fd(), process.stderr.fd()]
                    .into_iter()
                    .flatten()
                    .map(|fd| (Source::Vmm, fd)),
            );
        }
        if let Some(process) = &self.vsock {
            fds.extend(
                [process.stdout.fd(), process.stderr.fd()]
                    .into_iter()
                    .flatten()
                    .map(|fd| (Source::Vsock, fd)),
            );
        }
        let mut polled: Vec<PollFd> = fds.iter().map(|&(_, fd)| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let until_kill = self
            .kill_at
            .map_or(limit, |at| at.saturating_duration_since(Instant::now()));
        // Rounded up: a wait of 0.4 ms must not become a loop of waits of 0 ms.
        let limit = limit.min(until_kill) + Duration::from_micros(999);
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        if poll(&mut polled, timeout).is_err() {
            return Vec::new(); // EINTR: the caller's loop comes again
        }
        let woken = |fd: &PollFd| fd.revents().is_some_and(|events| !events.is_empty());
        polled
            .iter()
            .zip(&fds)
            .filter(|(fd, _)| woken(fd))
            .map(|(_, &(source, _))| source)
            .collect()
    }

    fn read_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            // SIGCHLD only ends the wait: who has ended is asked of the processes themselves.
            if Signal::try_from(info.ssi_signo.cast_signed()) != Ok(Signal::SIGCHLD) {
                self.going = true;
                self.kill(Asked::Signal);
            }
        }
    }

    fn read_request(&mut self, place: usize) {
        let Some(request) = self.server.read(place) else { return };
        match request {
            Request::Status => {}
            Request::Wait if self.ended.is_none() => return self.server.keep_waiting(place),
            Request::Wait => {}
            Request::Stop => self.stop(),
            Request::Kill => self.kill(Asked::Kill),
            Request::Release => {
                self.going = true;
                self.kill(Asked::Release);
            }
        }
        let status = self.status();
        self.server.answer(place, &Answer::Status(Box::new(status)));
    }

    /// A second stop moves nothing.
    fn stop(&mut self) {
        if self.ended.is_some() || self.asked.is_some() {
            return;
        }
        self.asked = Some(Asked::Stop);
        self.kill_at = Some(Instant::now() + STOP_LIMIT);
        self.signal_vmm(Signal::SIGTERM);
    }

    fn kill(&mut self, asked: Asked) {
        if self.ended.is_some() {
            return;
        }
        self.asked.get_or_insert(asked);
        self.kill_at = None;
        self.signal_vmm(Signal::SIGKILL);
    }

    fn signal_vmm(&mut self, signal: Signal) {
        if let Some(vmm) = &mut self.vmm {
            vmm.process.signal(signal);
        }
    }

    fn read_vmm(&mut self, bound: usize) {
        let Some(Vmm { process }) = &mut self.vmm else { return };
        process.stdout.read(bound, |bytes| self.console.push(bytes));
        process.stderr.read(MESSAGES_BYTES, |bytes| self.messages.push(bytes));
    }

    fn read_vsock(&mut self) {
        let Some(process) = &mut self.vsock else { return };
        process.stdout.read(MESSAGES_BYTES, |_| {});
        process.stderr.read(MESSAGES_BYTES, |bytes| self.messages.push(bytes));
    }

    /// Reads what ended processes left in their pipes.
    fn drain(&mut self) {
        if let Some(Vmm { process }) = &mut self.vmm {
            process.stdout.read_rest(|bytes| self.console.push(bytes));
            process.stderr.read(MESSAGES_BYTES, |bytes| self.messages.push(bytes));
        }
        self.read_vsock();
    }

    pub(crate) fn status(&self) -> Status {
        let state = match (&self.ended, &self.vmm) {
            (Some(_), _) => State::Ended,
            (None, Some(_)) => State::Running,
            (None, None) => State::Starting,
        };
        Status {
            vm_id: self.job.vm_id.clone(),
            state,
            pid: std::process::id().cast_signed(),
            vmm_pid: self.vmm.as_ref().map(|vmm| vmm.process.pid()),
            vsock_pid: self.vsock.as_ref().map(Process::pid),
            backend: self.backend.clone(),
            accel: self.accel.clone(),
            netns: self
                .settings
                .netns
                .as_ref()
                .map_or("none".into(), |path| path.display().to_string()),
            limits: "no cgroup: none is delegated to far-vmm; no core dumps".into(),
            console_bytes: self.console.total(),
            exit: self.ended.clone(),
        }
    }

    fn vmm_ended(&mut self, status: ExitStatus) -> ExitRecord {
        self.drain();
        let panic = self.console.panic_line();
        let words = self.last_words();
        let message = match (&panic, self.asked) {
            (_, Some(Asked::VsockLost)) => words,
            (_, Some(Asked::LeaseOver)) => "the blade's lease was not renewed in time".into(),
            (Some(line), _) => line.clone(),
            (None, Some(asked)) => format!("the VMM was ended on request ({asked:?}): {}", describe(status)),
            (None, None) if status.success() => "the VMM ended by itself: the guest reset or powered off".into(),
            (None, None) => format!("the VMM ended with {}: {words}", describe(status)),
        };
        let cause = if status.code().is_some() {
            ExitCause::Exited
        } else {
            ExitCause::Signaled
        };
        ExitRecord {
            code: status.code(),
            signal: status.signal(),
            ..self.record(cause, message)
        }
    }

    pub(crate) fn start_failed(&mut self, error: &StartError) -> ExitRecord {
        self.drain();
        let text = chain(error);
        tell!("far-vmm {}: {text}", self.job.vm_id);
        self.record(ExitCause::StartFailed, text)
    }

    /// Ends all processes and tells what is the same for every end.
    fn record(&mut self, cause: ExitCause, message: String) -> ExitRecord {
        self.vmm = None;
        self.vsock = None;
        ExitRecord {
            vm_id: self.job.vm_id.clone(),
            ended_at: OffsetDateTime::now_utc(),
            cause,
            code: None,
            signal: None,
            asked: self.asked,
            message,
            vmm_cpu_us: children_cpu_us(),
            kernel_panic: self.console.panic_line().is_some(),
            console_tail: self.console.tail(),
        }
    }

    /// Writes the record, tells those who wait, and stays until released, told to go by a signal, or without folder.
    pub(crate) fn end(mut self, record: ExitRecord) {
        if let Some(error) = self.console.broken() {
            tell!("far-vmm {}: writing the console: {error}", self.job.vm_id);
        }
        if self.folder.is_there()
            && let Err(error) = record.write(&self.settings.exit_file)
        {
            let path = self.settings.exit_file.display();
            tell!("far-vmm {}: writing the exit record {path}: {error}", self.job.vm_id);
        }
        self.ended = Some(record);
        self.server.answer_waiting(&self.status());
        while self.settings.tombstone && !self.going {
            self.turn(FOLDER_LOOK);
        }
        // Where the folder is another one by now, the names may already be those of another VM.
        let sockets = self
            .sockets
            .iter()
            .filter(|path| self.folder.is_there() || !path.starts_with(self.folder.path()));
        for socket in sockets {
            let _ = remove_socket(socket);
        }
        if self.folder.is_there() || !self.settings.control_socket.starts_with(self.folder.path()) {
            let _ = self.server.remove_file();
        }
    }
}

/// CPU time of all processes that were reaped: the VMM, the vsock daemon and a probe's guest.
fn children_cpu_us() -> u64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else {
        return 0;
    };
    u64::try_from(usage.user_time().num_microseconds() + usage.system_time().num_microseconds()).unwrap_or(0)
}
