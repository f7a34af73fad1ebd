//! A TCP connection to a port of the guest.

use super::{
    Problem,
    streams::{AtEnd, Sink, Source},
};
use crate::spawn::errno_of;
use far_proto::guest::{ChannelEnd, ChannelStream, ErrorKind, Forward, Opened, guest_message::Kind as Say};
use nix::{
    errno::Errno,
    poll::PollFlags,
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, getsockopt, socket, sockopt},
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// A connection on its way, or standing.
pub(crate) enum Tunnel {
    Connecting { fd: OwnedFd, is_ready: bool },
    Up { source: Source, sink: Sink },
}

/// Starts to connect.
pub(crate) fn start(forward: Forward) -> Result<Tunnel, Problem> {
    let port = u16::try_from(forward.port).ok().filter(|&port| port > 0);
    let port = port.ok_or_else(|| Problem::invalid("port is not 1 to 65535"))?;
    let fd = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .map_err(|errno| Problem::failed("making a socket", errno))?;
    match connect(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(Tunnel::Connecting { fd, is_ready: false }),
        Err(errno) => Err(refused(errno)),
    }
}

fn refused(errno: Errno) -> Problem {
    if errno == Errno::ECONNREFUSED {
        Problem::new(ErrorKind::NotFound, "nobody listens on this port of the agent".into())
    } else {
        Problem::failed("connecting", errno)
    }
}

impl Tunnel {
    pub(crate) fn ports<'a>(&'a self, port: &mut dyn FnMut(BorrowedFd<'a>, PollFlags)) {
        match self {
            Self::Connecting { fd, .. } => port(fd.as_fd(), PollFlags::POLLOUT),
            Self::Up { source, sink } => {
                for (fd, flags) in source.interest().into_iter().chain(sink.interest()) {
                    port(fd, flags);
                }
            }
        }
    }

    /// Mirrors [`Self::ports`].
    pub(crate) fn found(&mut self, next: &mut dyn FnMut() -> PollFlags) {
        match self {
            Self::Connecting { is_ready, .. } => *is_ready |= !next().is_empty(),
            Self::Up { source, sink } => {
                if source.interest().is_some() {
                    source.found(next());
                }
                if sink.interest().is_some() {
                    sink.found(next());
                }
            }
        }
    }

    pub(crate) fn take(&mut self, data: &[u8], last: bool) -> Result<(), Problem> {
        match self {
            Self::Connecting { .. } => Err(Problem::invalid("Data before Opened")),
            Self::Up { sink, .. } => sink.take(data, last).map_err(Problem::from),
        }
    }

    pub(crate) fn credit(&mut self, bytes: u32) {
        if let Self::Up { source, .. } = self {
            source.allowance.give(bytes);
        }
    }

    pub(crate) fn next(&mut self, channel: u32) -> Option<Say> {
        match self {
            Self::Connecting { is_ready: false, .. } => None,
            Self::Connecting { fd, .. } => Some(match connected(fd) {
                Ok(copy) => {
                    let sink = Sink::new(Some(copy), ChannelStream::Unspecified, AtEnd::Finish);
                    let source = match fd.try_clone() {
                        Ok(fd) => Source::new(fd, ChannelStream::Unspecified),
                        Err(error) => {
                            let problem = Problem::failed("copying a descriptor", errno_of(&error));
                            return Some(Say::ChannelEnd(problem.end(channel)));
                        }
                    };
                    *self = Self::Up { source, sink };
                    Say::Opened(Opened { channel, pid: 0 })
                }
                Err(problem) => Say::ChannelEnd(problem.end(channel)),
            }),
            Self::Up { source, sink } => {
                if let Some(data) = source.next(channel) {
                    return Some(Say::Data(data));
                }
                if let Some(credit) = sink.credit(channel) {
                    return Some(Say::Credit(credit));
                }
                let end = match source.broken {
                    Some(errno) => Problem::failed("reading from the agent's port", errno).end(channel),
                    None => ChannelEnd {
                        channel,
                        ..ChannelEnd::default()
                    },
                };
                (source.is_over() && (sink.is_over() || source.broken.is_some())).then_some(Say::ChannelEnd(end))
            }
        }
    }
}

fn connected(fd: &OwnedFd) -> Result<OwnedFd, Problem> {
    match getsockopt(fd, sockopt::SocketError) {
        Ok(0) => fd
            .try_clone()
            .map_err(|error| Problem::failed("copying a descriptor", errno_of(&error))),
        Ok(code) => Err(refused(Errno::from_raw(code))),
        Err(errno) => Err(Problem::failed("connecting", errno)),
    }
}
