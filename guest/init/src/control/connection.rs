//! One connection at a time to the blade, dialled again whenever it is lost.
//!
//! ```text
//! Down(retry at) -> Connecting -> Up -> Down …      backoff 20 ms … 1 s, back to 20 ms after a Welcome
//! ```
//! Everything is non-blocking: the session polls [`Link::interest`] and calls [`Link::advance`].

use super::{outbox::Offer, queue::Queue};
use crate::{place::Place, sys};
use far_proto::{
    frame::{self, Decoder, FrameError},
    guest::{GuestMessage, HostMessage},
};
use nix::{
    errno::Errno,
    poll::PollFlags,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, getsockopt, socket, sockopt,
    },
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

/// The host's context id, vsock(7).
const HOST_CID: u32 = 2;
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(1);
/// How long a host may take from accepting to Welcome. Generous: blades may be busy.
const WELCOME_LIMIT: Duration = Duration::from_secs(30);
/// Bytes read at once.
const READ_SIZE: usize = 64 << 10;
/// More than this waiting to be written: nothing is added until the host reads. One frame may lie on top.
const OUT_LIMIT: usize = 128 << 10;

/// Channels add nothing beyond this: what has no credit of its own always finds room.
const CHANNELS_LIMIT: usize = 64 << 10;
/// Nothing is read while more than this waits: a host that asks and never listens stops being heard.
const HEAR_LIMIT: usize = 512 << 10;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("connecting to the blade")]
    Connect(#[source] Errno),
    #[error("the blade closed the control stream")]
    Closed,
    #[error("control stream")]
    Io(#[from] io::Error),
    #[error("control stream")]
    Frame(#[from] FrameError),
    #[error("the blade did not answer Hello within {} s", WELCOME_LIMIT.as_secs())]
    NoWelcome,
    #[error("nothing came from the blade any more, not even answers to heartbeats")]
    Silent,
}

enum Endpoint {
    Vsock,
    /// Tests: `control.sock` in the test root.
    Unix(PathBuf),
}

enum State {
    Down { retry_at: Instant },
    Connecting { fd: OwnedFd },
    Up(Box<Up>),
}

struct Up {
    fd: OwnedFd,
    decoder: Decoder,
    out: Queue,
    welcome_by: Option<Instant>,
    /// Since when a heartbeat waits for its answer, or for room to be sent.
    asked_at: Option<Instant>,
    /// How long a blade that answers heartbeats may leave one without an answer; `None`: for ever.
    silence: Option<Duration>,
}

impl Up {
    /// When the connection counts as dead. Not while it is not read from.
    fn silent_at(&self) -> Option<Instant> {
        let is_read = self.out.len() < HEAR_LIMIT;
        let limit = self.silence.filter(|_| is_read)?;
        Some(self.asked_at? + limit)
    }
}

/// What [`Link::advance`] found.
#[derive(Debug)]
pub(crate) enum Progress {
    Nothing,
    /// A new connection: say Hello.
    Connected,
    /// Messages may be waiting: call [`Link::receive`].
    Readable,
    Lost(LinkError),
}

/// The connection to the blade.
pub(crate) struct Link {
    endpoint: Endpoint,
    state: State,
    backoff: Duration,
}

impl Link {
    pub(crate) fn new(place: &Place, now: Instant) -> Self {
        let endpoint = match place {
            Place::Guest => Endpoint::Vsock,
            Place::TestRoot(_) => Endpoint::Unix(place.at("/control.sock")),
        };
        Self {
            endpoint,
            state: State::Down { retry_at: now },
            backoff: FIRST_BACKOFF,
        }
    }

    /// What to poll for.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.state {
            State::Down { .. } => None,
            State::Connecting { fd } => Some((fd.as_fd(), PollFlags::POLLOUT)),
            State::Up(up) => {
                let out = if up.out.len() > 0 {
                    PollFlags::POLLOUT
                } else {
                    PollFlags::empty()
                };
                let is_heard = up.out.len() < HEAR_LIMIT;
                let hear = if is_heard {
                    PollFlags::POLLIN
                } else {
                    PollFlags::empty()
                };
                Some((up.fd.as_fd(), hear | out))
            }
        }
    }

    /// When to call [`Self::advance`] even without an event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Down { retry_at } => Some(*retry_at),
            State::Connecting { .. } => None,
            State::Up(up) => [up.welcome_by, up.silent_at()].into_iter().flatten().min(),
        }
    }

    /// Dials, finishes a dial, or notes that bytes are there. `events` is what poll said about [`Self::interest`].
    pub(crate) fn advance(&mut self, events: PollFlags, now: Instant) -> Progress {
        match &mut self.state {
            State::Down { retry_at } if *retry_at > now => Progress::Nothing,
            State::Down { .. } => match dial(&self.endpoint) {
                Ok((fd, true)) => self.connected(fd, now),
                Ok((fd, false)) => {
                    self.state = State::Connecting { fd };
                    Progress::Nothing
                }
                Err(error) => Progress::Lost(LinkError::Connect(error)),
            },
            State::Connecting { fd } => {
                if events.is_empty() {
                    return Progress::Nothing;
                }
                match getsockopt(fd, sockopt::SocketError) {
                    Ok(0) => {
                        let down = State::Down { retry_at: now };
                        let State::Connecting { fd } = std::mem::replace(&mut self.state, down) else {
                            return Progress::Nothing;
                        };
                        self.connected(fd, now)
                    }
                    Ok(code) => Progress::Lost(LinkError::Connect(Errno::from_raw(code))),
                    Err(error) => Progress::Lost(LinkError::Connect(error)),
                }
            }
            State::Up(up) => {
                if up.welcome_by.is_some_and(|limit| limit <= now) {
                    return Progress::Lost(LinkError::NoWelcome);
                }
                if events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
                    return Progress::Readable;
                }
                if up.silent_at().is_some_and(|limit| limit <= now) {
                    return Progress::Lost(LinkError::Silent);
                }
                Progress::Nothing
            }
        }
    }

    fn connected(&mut self, fd: OwnedFd, now: Instant) -> Progress {
        self.state = State::Up(Box::new(Up {
            fd,
            decoder: Decoder::new(),
            out: Queue::default(),
            welcome_by: Some(now + WELCOME_LIMIT),
            asked_at: None,
            silence: None,
        }));
        Progress::Connected
    }

    /// The host said Welcome: the connection is good.
    pub(crate) fn welcomed(&mut self) {
        self.backoff = FIRST_BACKOFF;
        if let State::Up(up) = &mut self.state {
            up.welcome_by = None;
        }
    }

    /// The blade answers heartbeats, and takes no longer than this for it.
    pub(crate) fn expect_answers(&mut self, within: Duration) {
        if let State::Up(up) = &mut self.state {
            up.silence = Some(within);
        }
    }

    /// A heartbeat is on its way. Only from then on silence means anything: PID 1 itself may have been busy until now.
    pub(crate) fn asked(&mut self, now: Instant) {
        if let State::Up(up) = &mut self.state {
            up.asked_at.get_or_insert(now);
        }
    }

    /// Drops the connection, if any, and dials again after the backoff.
    pub(crate) fn hang_up(&mut self, now: Instant) {
        self.state = State::Down {
            retry_at: now + self.backoff,
        };
        self.backoff = (self.backoff * 2).min(LAST_BACKOFF);
    }

    /// Whether another message may be queued.
    pub(crate) fn has_room(&self) -> bool {
        matches!(&self.state, State::Up(up) if up.out.len() < OUT_LIMIT)
    }

    /// Whether a channel may queue another message.
    pub(crate) fn has_room_for_channels(&self) -> bool {
        matches!(&self.state, State::Up(up) if up.out.len() < CHANNELS_LIMIT)
    }

    /// Whether the socket took everything that was queued.
    pub(crate) fn is_flushed(&self) -> bool {
        !matches!(&self.state, State::Up(up) if up.out.len() > 0)
    }

    /// Queues a message; without a connection it is dropped, because every connection starts with the whole truth.
    pub(crate) fn queue(&mut self, message: &GuestMessage) {
        if let State::Up(up) = &mut self.state {
            up.out.push(message);
        }
    }

    /// Queues a record of output.
    pub(crate) fn queue_log(&mut self, log: &Offer<'_>) {
        if let State::Up(up) = &mut self.state {
            up.out.push_log(log);
        }
    }

    /// Writes what the socket takes.
    pub(crate) fn flush(&mut self) -> Result<(), LinkError> {
        let State::Up(up) = &mut self.state else { return Ok(()) };
        while up.out.len() > 0 {
            match up.out.write_to(&up.fd) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if up.out.len() >= OUT_LIMIT {
                        up.asked_at.get_or_insert_with(Instant::now);
                    }
                    break;
                }
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    /// Reads once and gives the messages that are whole. A full read is followed by another poll, so that one side
    /// never starves the other.
    pub(crate) fn read(&mut self) -> Result<(), LinkError> {
        let State::Up(up) = &mut self.state else { return Ok(()) };
        match sys::read_into(&up.fd, up.decoder.room(READ_SIZE)) {
            Ok(0) => Err(LinkError::Closed),
            Ok(_) => {
                up.asked_at = None;
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The next message that came whole.
    pub(crate) fn receive(&mut self) -> Result<Option<HostMessage>, LinkError> {
        match &mut self.state {
            State::Up(up) => Ok(up.decoder.next()?),
            State::Down { .. } | State::Connecting { .. } => Ok(None),
        }
    }
}

/// Starts a connection; `true`: it is there already.
fn dial(endpoint: &Endpoint) -> Result<(OwnedFd, bool), Errno> {
    match endpoint {
        Endpoint::Vsock => dial_to(AddressFamily::Vsock, &VsockAddr::new(HOST_CID, frame::CONTROL_PORT)),
        Endpoint::Unix(path) => dial_to(AddressFamily::Unix, &UnixAddr::new(path)?),
    }
}

fn dial_to(family: AddressFamily, address: &dyn SockaddrLike) -> Result<(OwnedFd, bool), Errno> {
    let fd = socket(
        family,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    match connect(fd.as_raw_fd(), address) {
        Ok(()) => Ok((fd, true)),
        Err(Errno::EINPROGRESS) => Ok((fd, false)),
        Err(error) => Err(error),
    }
}
