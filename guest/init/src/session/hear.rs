//! What the blade says, and what the guest does about it. A blade that breaks the order loses its connection; a
//! configuration that cannot be carried out becomes an exit report.

use super::{Beat, Misuse, Offer, Running, Said, Session, State, Stop, combine};
use crate::{
    channels::{Companion, Request},
    files::Uploads,
    machine, network,
    payload::{self, NOT_EXECUTABLE},
    plan::Plan,
    power::{self, with_sources},
    sys,
};
use far_proto::{
    frame::GENERATION,
    guest::{
        self, Config, Done, FileChunk, GuestMessage, HostMessage, Ready, Welcome, guest_message::Kind as Say,
        host_message::Kind as Heard,
    },
};
use std::{
    fs, io,
    time::{Duration, Instant},
};

/// A blade that answers heartbeats is never taken for dead sooner: it may be busy.
const SILENCE: Duration = Duration::from_secs(10);
/// Range of the heartbeat interval, ms (the contract's limits).
const HEARTBEAT_MS: (u32, u32) = (100, 60_000);
/// Latest wall clock, ns since the Unix epoch: year 2262, as far as the kernel counts.
const MAX_UNIX_NS: u64 = i64::MAX as u64;

impl Session<'_> {
    pub(super) fn listen(&mut self, now: Instant) {
        if let Err(error) = self.link.read() {
            return self.lose(&error, now);
        }
        loop {
            match self.link.receive() {
                Ok(None) => return,
                Err(error) => return self.lose(&error, now),
                Ok(Some(HostMessage { kind: None })) => {
                    // A kind of a later generation: not for us.
                }
                Ok(Some(HostMessage { kind: Some(heard) })) => {
                    if let Err(misuse) = self.hear(heard, now) {
                        return self.lose(&misuse, now);
                    }
                }
            }
        }
    }

    pub(super) fn lose(&mut self, error: &dyn std::error::Error, now: Instant) {
        // Dialling in vain is ordinary while the blade restarts; the console hears of a connection that was good.
        if self.said.welcomed {
            power::say(&with_sources(error));
        }
        self.said = Said::default();
        self.channels.connection_lost(now);
        // The snapshot that was prepared on this connection does not come.
        if !self.stillness.forget().is_empty() {
            let _ = self.set_frozen(false);
        }
        self.link.hang_up(now);
        if let State::Waiting { offer } = &mut self.state {
            *offer = None;
        }
    }

    fn hear(&mut self, heard: Heard, now: Instant) -> Result<(), Misuse> {
        if !self.said.welcomed && !matches!(heard, Heard::Welcome(_)) {
            return Err(Misuse::BeforeWelcome);
        }
        match heard {
            Heard::Welcome(welcome) => self.welcome(&welcome, now),
            Heard::Config(config) => self.take_config(config),
            Heard::FileChunk(chunk) => self.take_chunk(chunk),
            Heard::Start(guest::Start {}) => self.start(),
            Heard::LogAck(ack) => Ok(self.outbox.acknowledge(ack.stream, ack.seq)?),
            Heard::Heard(guest::Heard {}) => {
                self.expect_answers();
                Ok(())
            }
            Heard::ExitAck(guest::ExitAck {}) => {
                // Only an answer to an Exit that was sent ends the VM.
                self.done |= self.said.exit;
                Ok(())
            }
            Heard::Signal(signal) => {
                self.signal(signal.number);
                Ok(())
            }
            Heard::Shutdown(shutdown) => {
                self.shut_down(shutdown.grace_s, now);
                Ok(())
            }
            Heard::Exec(exec) => self.open(Request::Exec(exec)),
            Heard::Put(put) => self.open(Request::Put(put)),
            Heard::Get(get) => self.open(Request::Get(get)),
            Heard::Forward(forward) => self.open(Request::Forward(forward)),
            heard => {
                self.hear_of_channels(heard, now);
                Ok(())
            }
        }
    }

    fn open(&mut self, request: Request) -> Result<(), Misuse> {
        if self.channels.is_crowded() {
            return Err(Misuse::TooManyChannels);
        }
        let (channels, ground) = self.ground();
        Ok(channels.open(request, ground.as_ref())?)
    }

    fn hear_of_channels(&mut self, heard: Heard, now: Instant) {
        match heard {
            Heard::Data(data) => self.channels.take_data(&data, now),
            Heard::TransferEntry(entry) => {
                let (channels, ground) = self.ground();
                channels.take_entry(entry, ground.as_ref(), now);
            }
            Heard::Credit(credit) => self.channels.credit(credit),
            Heard::Close(close) => self.channels.close(close.channel, now),
            Heard::ExecResize(resize) => self.channels.resize(&resize),
            Heard::ExecSignal(signal) => self.channels.signal(signal.channel, signal.number),
            Heard::SetTime(set) => {
                let result = match set.unix_ns {
                    1..=MAX_UNIX_NS => self.only_in_guest(|| machine::set_time(set.unix_ns)),
                    _ => Err("unix_ns is not 1 to 2^63-1".into()),
                };
                self.answer(set.id, result);
            }
            Heard::Reseed(reseed) => {
                let result = match reseed.entropy.len() {
                    32..=512 => self.only_in_guest(|| machine::reseed(&reseed.entropy)),
                    _ => Err("entropy is not 32 to 512 bytes".into()),
                };
                self.answer(reseed.id, result);
            }
            Heard::Freeze(freeze) => self.freeze(freeze.id),
            Heard::Thaw(thaw) => {
                self.tell_no_stillness("thawed before everything stood still");
                let result = self.set_frozen(false);
                self.answer(thaw.id, result);
            }
            // All heard before.
            _ => {}
        }
    }

    /// Clock and entropy have no namespace: a test must not touch them.
    fn only_in_guest(&self, act: impl FnOnce() -> io::Result<()>) -> Result<(), String> {
        if !self.place.is_guest() {
            return Err("not in a guest of its own".into());
        }
        act().map_err(|error| error.to_string())
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), String> {
        match &self.cgroup {
            Some(cgroup) => cgroup.set_frozen(frozen).map_err(|error| error.to_string()),
            None => Err("this guest has no cgroups".into()),
        }
    }

    fn freeze(&mut self, id: u64) {
        let result = match &self.state {
            State::Running(running) if running.ended.is_none() && running.stop.is_none() => self.set_frozen(true),
            _ => Err("the agent is not running, or was asked to stop".into()),
        };
        match result {
            Err(text) => self.answer(id, Err(text)),
            Ok(()) if !self.stillness.ask(id) => self.answer(id, Err("too many requests wait".into())),
            // Perhaps at once: nothing may have run.
            Ok(()) => self.tell_stillness(),
        }
    }

    pub(super) fn tell_stillness(&mut self) {
        for id in self.stillness.reached(self.cgroup.as_ref()) {
            self.answer(id, Ok(()));
        }
    }

    pub(super) fn tell_no_stillness(&mut self, why: &str) {
        for id in self.stillness.forget() {
            self.answer(id, Err(why.into()));
        }
    }

    fn answer(&mut self, id: u64, result: Result<(), String>) {
        let error = result.err().unwrap_or_default();
        self.link.queue(&GuestMessage {
            kind: Some(Say::Done(Done { id, error })),
        });
    }

    fn welcome(&mut self, welcome: &Welcome, now: Instant) -> Result<(), Misuse> {
        if self.said.welcomed {
            return Err(Misuse::WelcomeTwice);
        }
        if welcome.generation != GENERATION {
            return Err(Misuse::Generation(welcome.generation));
        }
        let stored = [welcome.stored_stdout_seq, welcome.stored_stderr_seq];
        self.outbox.resume(stored, welcome.log_window_bytes as usize)?;
        self.link.welcomed();
        self.said.welcomed = true;
        self.said.heartbeat = (welcome.heartbeat_interval_ms > 0).then(|| {
            let ms = welcome.heartbeat_interval_ms.clamp(HEARTBEAT_MS.0, HEARTBEAT_MS.1);
            let every = Duration::from_millis(ms.into());
            Beat {
                every,
                next: now + every,
            }
        });
        if welcome.answers_heartbeats {
            self.expect_answers();
        }
        Ok(())
    }

    fn expect_answers(&mut self) {
        if let Some(beat) = self.said.heartbeat {
            self.link.expect_answers((beat.every * 3).max(SILENCE));
        }
    }

    fn take_config(&mut self, config: Config) -> Result<(), Misuse> {
        let State::Waiting { offer } = &mut self.state else {
            // The host missed what happened since its Hello; Ready or Exit tells it.
            return Ok(());
        };
        if offer.is_some() {
            return Err(Misuse::ConfigTwice);
        }
        match Plan::from_config(config) {
            Ok(plan) => {
                let uploads = Uploads::new(plan.files.clone());
                *offer = Some(Offer {
                    plan: Box::new(plan),
                    uploads,
                });
                self.boot.done("config");
            }
            Err(error) => self.fail(NOT_EXECUTABLE, with_sources(&error)),
        }
        Ok(())
    }

    fn take_chunk(&mut self, chunk: FileChunk) -> Result<(), Misuse> {
        let State::Waiting { offer } = &mut self.state else {
            return Ok(());
        };
        let offer = offer.as_mut().ok_or(Misuse::NoConfig)?;
        if let Err(error) = offer.uploads.accept(chunk) {
            self.fail(NOT_EXECUTABLE, with_sources(&error));
        }
        Ok(())
    }

    /// Start: everything between the configuration and the payload's process.
    fn start(&mut self) -> Result<(), Misuse> {
        let State::Waiting { offer } = &mut self.state else {
            return Ok(());
        };
        let Offer { plan, mut uploads } = offer.take().ok_or(Misuse::NoConfig)?;
        if let Err((code, text)) = self.launch(&plan, &mut uploads) {
            self.fail(code, text);
        }
        Ok(())
    }

    fn launch(&mut self, plan: &Plan, uploads: &mut Uploads) -> Result<(), (u32, String)> {
        let refused = |error: &dyn std::error::Error| (NOT_EXECUTABLE, with_sources(error));
        uploads.verify().map_err(|error| refused(&error))?;
        self.settle(plan);
        let root = self
            .root
            .as_ref()
            .map_err(|error| (NOT_EXECUTABLE, format!("spec.image: {}", with_sources(error))))?;
        if let Some(link) = &plan.link {
            network::configure(self.place, link, &mut self.boot);
        }
        network::write_names(plan, root, &mut self.boot);
        self.boot.done("network");
        let failed = |error: payload::StartError| (error.code(), with_sources(&error));
        let user = payload::identity(root, &plan.user).map_err(failed)?;
        plan.room.make(self.place, root).map_err(|error| refused(&error))?;
        uploads.place(root, &user).map_err(|error| refused(&error))?;
        let started = payload::start(plan, root, self.cgroup.as_ref(), &user).map_err(failed)?;
        self.boot.done("spawn");
        self.ready = Some(Ready {
            pid: u32::try_from(started.pid.as_raw()).unwrap_or(0),
            stages: self.boot.stages(),
            warnings: self.boot.warnings(),
        });
        let namespace = self.place.at(&format!("/proc/{}/ns/mnt", started.pid));
        let companion = Companion {
            env: plan.env_pairs(&user.home),
            user,
            working_dir: plan.working_dir.clone(),
            limits: plan.limits.clone(),
            allow_new_privileges: plan.allow_new_privileges,
            // It may have ended already; then there is nobody to be beside.
            namespace: fs::File::open(namespace).ok().map(Into::into),
        };
        self.state = State::Running(Box::new(Running {
            pid: started.pid,
            companion,
            files: plan.files.clone(),
            pipes: started.pipes,
            ended: None,
            stop: None,
        }));
        Ok(())
    }

    /// Name, clock and entropy. Each has a default that works, so each failure is a warning.
    fn settle(&mut self, plan: &Plan) {
        if let Err(error) = nix::unistd::sethostname(&plan.hostname) {
            self.boot.warn(format!("host name: {error}"));
        }
        if !self.place.is_guest() {
            return;
        }
        if plan.wall_time_unix_ns > 0
            && let Err(error) = machine::set_time(plan.wall_time_unix_ns)
        {
            self.boot.warn(format!("wall clock: {error}"));
        }
        if !plan.entropy.is_empty() {
            let credited = machine::reseed(&plan.entropy);
            if let Err(error) = credited {
                self.boot.warn(format!("entropy: {error}"));
            }
        }
    }

    fn signal(&self, number: u32) {
        let State::Running(running) = &self.state else { return };
        if running.ended.is_some() {
            return;
        }
        if let Some(number) = i32::try_from(number).ok().filter(|number| (1..=64).contains(number)) {
            // ESRCH cannot be: the process is not reaped yet. EINVAL is the host's mistake and harms nobody.
            let _ = sys::kill(running.pid, number);
        }
    }

    fn shut_down(&mut self, grace_s: u32, now: Instant) {
        let asked = Stop {
            kill_at: now + Duration::from_secs(grace_s.min(86_400).into()),
            killed: false,
        };
        match &mut self.state {
            State::Waiting { .. } => self.fail(NOT_EXECUTABLE, "asked to stop before the payload was started".into()),
            State::Running(running) => {
                let first = running.stop.is_none();
                running.stop = Some(combine(running.stop, asked));
                if first && grace_s > 0 && running.ended.is_none() {
                    // What is frozen cannot hear TERM.
                    if let Some(cgroup) = &self.cgroup {
                        let _ = cgroup.set_frozen(false);
                    }
                    for number in [libc::SIGTERM, libc::SIGCONT] {
                        let _ = sys::kill(running.pid, number);
                    }
                }
            }
            State::Exited(_) => {}
        }
    }
}
