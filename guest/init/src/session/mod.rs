//! The guest's life after boot: one loop over the control stream, the payload's pipes and the death of children.
//!
//! ```text
//! Waiting --Config, FileChunk*, Start--> Running --main process ended, rest killed, pipes drained--> Exited --ExitAck--> done
//!    \-- configuration or start failed, or Shutdown -------------------------------------------------^
//! ```
//! The connection may come and go in every state: after each Welcome the guest says again what the host may not know
//! (Ready, unacknowledged logs, Exit), and the host drops what it has.
//! Invariant: the payload is started at most once per boot.

mod hear;
mod speak;

use crate::{
    boot::{self, BootReport},
    cgroup::Cgroup,
    channels::{Channels, Companion, Ground, InUse},
    control::{
        connection::{Link, Progress},
        outbox::{Channel, Outbox, OutboxError},
    },
    files::{self, FileSpec, Uploads},
    flintlock::Agents,
    logs::Pipes,
    machine::Stillness,
    place::Place,
    plan::Plan,
    power::{self, Fatal, with_sources},
    reap::Reaper,
    rootfs::{Root, RootError},
    sys::{self, Ended, How},
};
use far_proto::{
    frame::GENERATION,
    guest::{Exit, Ready, exit},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::Pid,
};
use std::{
    fs::File,
    io::Read,
    os::fd::AsFd,
    time::{Duration, Instant},
};

/// Longest `start_error`, bytes.
const MAX_START_ERROR: usize = 1024;

enum State {
    Waiting { offer: Option<Offer> },
    Running(Box<Running>),
    Exited(Box<Exit>),
}

/// A configuration whose files are on their way. Belongs to one connection.
struct Offer {
    plan: Box<Plan>,
    uploads: Uploads,
}

struct Running {
    pid: Pid,
    companion: Companion,
    files: Vec<FileSpec>,
    pipes: Pipes,
    ended: Option<(Ended, u64)>,
    stop: Option<Stop>,
}

/// A stop that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stop {
    kill_at: Instant,
    killed: bool,
}

/// What the host said that it must not say; the connection ends, and the next one starts over.
#[derive(Debug, thiserror::Error)]
enum Misuse {
    #[error("the blade spoke before Welcome")]
    BeforeWelcome,
    #[error("the blade said Welcome twice")]
    WelcomeTwice,
    #[error("the blade speaks generation {0}, this guest {GENERATION}")]
    Generation(u32),
    #[error("the blade sent Config twice")]
    ConfigTwice,
    #[error("the blade sent files or Start without Config")]
    NoConfig,
    #[error("the blade opens channels faster than it hears of their end")]
    TooManyChannels,
    #[error(transparent)]
    Channel(#[from] InUse),
    #[error(transparent)]
    Logs(#[from] OutboxError),
}

/// What was said on this connection.
#[derive(Default)]
struct Said {
    welcomed: bool,
    ready: bool,
    exit: bool,
    heartbeat: Option<Beat>,
}

#[derive(Clone, Copy)]
struct Beat {
    every: Duration,
    next: Instant,
}

pub(crate) struct Session<'a> {
    place: &'a Place,
    boot: BootReport,
    root: Result<Root, RootError>,
    cgroup: Option<Cgroup>,
    reaper: Reaper,
    nonce: Vec<u8>,
    link: Link,
    said: Said,
    outbox: Outbox,
    channels: Channels,
    agents: Agents,
    stillness: Stillness,
    state: State,
    ready: Option<Ready>,
    heartbeats: u64,
    done: bool,
}

impl<'a> Session<'a> {
    /// # Errors
    /// When children cannot be watched or no nonce can be drawn.
    pub(crate) fn new(
        place: &'a Place,
        mut boot: BootReport,
        root: Result<Root, RootError>,
        cgroup: Option<Cgroup>,
    ) -> Result<Self, Fatal> {
        let now = Instant::now();
        let mut nonce = vec![0; 16];
        if !sys::random_now(&mut nonce) {
            // It never blocks, and a boot nonce only has to differ from the last boot's.
            File::open("/dev/urandom")
                .and_then(|mut random| random.read_exact(&mut nonce))
                .map_err(Fatal::Nonce)?;
        }
        if let Err(error) = &root {
            power::say(&with_sources(error));
        }
        let agents = Agents::listen(place, &mut boot);
        Ok(Self {
            place,
            boot,
            root,
            cgroup,
            reaper: Reaper::new().map_err(Fatal::Signals)?,
            nonce,
            link: Link::new(place, now),
            said: Said::default(),
            outbox: Outbox::new(),
            channels: Channels::new(),
            agents,
            stillness: Stillness::default(),
            state: State::Waiting { offer: None },
            ready: None,
            heartbeats: 0,
            done: false,
        })
    }

    /// Serves until the exit report is acknowledged.
    ///
    /// # Errors
    /// [`Fatal`] when poll fails.
    pub(crate) fn run(mut self) -> Result<(), Fatal> {
        // Dials at once.
        self.act(PollFlags::empty(), PollFlags::empty(), [PollFlags::empty(); 2])?;
        while !self.done {
            let now = Instant::now();
            self.keep_time(now);
            // Until nothing is left to say or the socket is full: then poll wakes us.
            while self.speak(now) {
                if let Err(error) = self.link.flush() {
                    self.lose(&error, now);
                }
                if !self.link.is_flushed() {
                    break;
                }
            }
            self.serve_agents(now);
            if self.said.welcomed {
                self.channels.speak(&mut self.link, now);
            }
            if let Err(error) = self.link.flush() {
                self.lose(&error, now);
            }
            self.wait(now)?;
        }
        Ok(())
    }

    /// One poll, and everything that it found.
    fn wait(&mut self, now: Instant) -> Result<(), Fatal> {
        let timeout = self.next_deadline(now).map_or(PollTimeout::NONE, |at| {
            // Rounded up: a timer is never early, so it never spins.
            let ms = at.saturating_duration_since(now).as_micros().div_ceil(1000);
            PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
        });
        let events = self.frozen_events();
        self.tell_stillness();
        let mut fds = vec![PollFd::new(self.reaper.fd(), PollFlags::POLLIN)];
        let link_at = self.link.interest().map(|(fd, flags)| {
            fds.push(PollFd::new(fd, flags));
            fds.len() - 1
        });
        let mut pipes_at = [None; 2];
        if let State::Running(running) = &self.state {
            for channel in Channel::BOTH {
                pipes_at[channel as usize] = running.pipes.interest(channel, &self.outbox).map(|fd| {
                    fds.push(PollFd::new(fd, PollFlags::POLLIN));
                    fds.len() - 1
                });
            }
        }
        let still_at = events.as_ref().map(|events| {
            fds.push(PollFd::new(events.as_fd(), PollFlags::POLLPRI));
            fds.len() - 1
        });
        let channels_at = fds.len();
        self.channels.ports(&mut |fd, flags| fds.push(PollFd::new(fd, flags)));
        self.agents.ports(&mut |fd, flags| fds.push(PollFd::new(fd, flags)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Fatal::Poll(error.into())),
        }
        let found = |at: Option<usize>| at.and_then(|at| fds[at].revents()).unwrap_or(PollFlags::empty());
        let (children, link) = (found(Some(0)), found(link_at));
        let pipes = pipes_at.map(found);
        let is_still = !found(still_at).is_empty();
        let channels: Vec<PollFlags> = fds[channels_at..]
            .iter()
            .map(|fd| fd.revents().unwrap_or(PollFlags::empty()))
            .collect();
        let mut channels = channels.into_iter();
        self.channels
            .found(&mut || channels.next().unwrap_or(PollFlags::empty()));
        self.agents.found(&mut || channels.next().unwrap_or(PollFlags::empty()));
        if is_still {
            self.tell_stillness();
        }
        self.act(children, link, pipes)
    }

    /// Opened for each poll: who waits for a snapshot pays for it, nobody else.
    fn frozen_events(&self) -> Option<File> {
        let cgroup = self.cgroup.as_ref().filter(|_| self.stillness.is_asked_for())?;
        let mut events = cgroup.events().ok()?;
        // Reading arms it: poll tells of changes since. What it says is looked at right after.
        events.read_to_end(&mut Vec::new()).ok()?;
        Some(events)
    }

    fn act(&mut self, children: PollFlags, link: PollFlags, pipes: [PollFlags; 2]) -> Result<(), Fatal> {
        let now = Instant::now();
        if !children.is_empty() {
            self.collect_children()?;
        }
        if let State::Running(running) = &mut self.state {
            for channel in Channel::BOTH {
                if !pipes[channel as usize].is_empty() {
                    running.pipes.read(channel, &mut self.outbox);
                }
            }
        }
        self.conclude();
        match self.link.advance(link, now) {
            Progress::Nothing => {}
            Progress::Connected => self.greet(),
            Progress::Readable => self.listen(now),
            Progress::Lost(error) => self.lose(&error, now),
        }
        Ok(())
    }

    fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let beat = self
            .said
            .heartbeat
            .filter(|_| self.link.has_room())
            .map(|beat| beat.next);
        let state = match &self.state {
            State::Waiting { .. } => None,
            State::Running(running) if running.ended.is_some() => None,
            State::Running(running) => running.stop.filter(|stop| !stop.killed).map(|stop| stop.kill_at),
            // However long the blade is away: an exit report that nobody heard is an agent without a truthful end.
            State::Exited(_) => None,
        };
        let channels = self.channels.deadline(now, self.link.has_room_for_channels());
        [self.link.deadline(), beat, state, channels, self.agents.deadline(now)]
            .into_iter()
            .flatten()
            .min()
            .map(|at| at.max(now))
    }

    fn keep_time(&mut self, now: Instant) {
        self.channels.keep_time(now);
        if let State::Running(running) = &mut self.state
            && let Some(stop) = &mut running.stop
            && !stop.killed
            && stop.kill_at <= now
        {
            stop.killed = true;
            kill_everything();
        }
    }

    fn collect_children(&mut self) -> Result<(), Fatal> {
        let main = match &self.state {
            State::Running(running) if running.ended.is_none() => Some(running.pid),
            State::Running(_) | State::Waiting { .. } | State::Exited(_) => None,
        };
        let now = Instant::now();
        let mut found = None;
        let (channels, agents) = (&mut self.channels, &mut self.agents);
        self.reaper
            .collect(|ended| {
                if Some(ended.pid) == main {
                    found = Some(ended);
                } else {
                    channels.reaped(&ended, now);
                    agents.reaped(&ended, now);
                }
            })
            .map_err(Fatal::Signals)?;
        if let (Some(ended), State::Running(running)) = (found, &mut self.state) {
            running.ended = Some((ended, boot::wall_ns()));
            // Orphans may hold the pipes open for ever: the agent is its main process.
            kill_everything();
        }
        Ok(())
    }

    /// Running -> Exited, when the main process ended and every byte it wrote was read.
    fn conclude(&mut self) {
        let State::Running(running) = &self.state else { return };
        let Some((ended, finished_unix_ns)) = running.ended.filter(|_| running.pipes.are_drained()) else {
            return;
        };
        if let Ok(root) = &self.root {
            files::wipe_placed(root, &running.files);
        }
        let [last_stdout_seq, last_stderr_seq] = self.outbox.last();
        let (how, core_dumped) = match ended.how {
            How::Exited { code } => (exit::How::Code(code), false),
            How::Signaled { signal, core_dumped } => (exit::How::Signal(signal), core_dumped),
        };
        self.exit(Exit {
            how: Some(how),
            core_dumped,
            oom_killed: self.cgroup.as_ref().is_some_and(Cgroup::was_oom_killed),
            start_error: String::new(),
            user_us: ended.user_us,
            system_us: ended.system_us,
            max_rss_kib: ended.max_rss_kib,
            finished_unix_ns,
            last_stdout_seq,
            last_stderr_seq,
        });
    }

    /// The payload never ran.
    fn fail(&mut self, code: u32, text: String) {
        let start_error = boot::shortened(text, MAX_START_ERROR);
        power::say(&start_error);
        self.exit(Exit {
            how: Some(exit::How::Code(code)),
            start_error,
            finished_unix_ns: boot::wall_ns(),
            ..Exit::default()
        });
    }

    /// The channels, and where they work: beside a running payload.
    fn ground(&mut self) -> (&mut Channels, Option<Ground<'_>>) {
        let ground = ground(&self.state, &self.root, self.cgroup.as_ref());
        (&mut self.channels, ground)
    }

    fn serve_agents(&mut self, now: Instant) {
        let ground = ground(&self.state, &self.root, self.cgroup.as_ref());
        self.agents.work(ground.as_ref(), now);
    }

    fn exit(&mut self, exit: Exit) {
        self.channels.farewell(&mut self.link);
        self.tell_no_stillness("the agent ended");
        self.state = State::Exited(Box::new(exit));
    }
}

fn ground<'a>(state: &'a State, root: &'a Result<Root, RootError>, cgroup: Option<&'a Cgroup>) -> Option<Ground<'a>> {
    match (state, root) {
        (State::Running(running), Ok(root)) if running.ended.is_none() => Some(Ground {
            root,
            cgroup,
            companion: &running.companion,
        }),
        _ => None,
    }
}

/// A second stop may shorten the grace period, never extend it.
fn combine(first: Option<Stop>, second: Stop) -> Stop {
    match first {
        Some(first) if first.killed || first.kill_at <= second.kill_at => first,
        Some(_) | None => second,
    }
}

/// Everything in this machine but PID 1 belongs to the payload. One call ends a fork bomb too: kill(2) with -1 signals
/// all under one lock, and a fork with a pending SIGKILL does not happen.
fn kill_everything() {
    // ESRCH: nothing is left, which is what was wanted.
    let _ = sys::kill(Pid::from_raw(-1), libc::SIGKILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_stop_may_shorten_the_grace_period_and_never_extends_it() {
        let now = Instant::now();
        let stop = |seconds, killed| Stop {
            kill_at: now + Duration::from_secs(seconds),
            killed,
        };
        for (why, first, second, expected) in [
            ("the first", None, stop(5, false), stop(5, false)),
            ("later", Some(stop(5, false)), stop(50, false), stop(5, false)),
            ("sooner", Some(stop(5, false)), stop(0, false), stop(0, false)),
            ("after the kill", Some(stop(5, true)), stop(0, false), stop(5, true)),
        ] {
            assert_eq!(combine(first, second), expected, "{why}");
        }
    }
}
