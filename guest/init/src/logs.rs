//! The payload's two output pipes: read only while the window has room, so that a payload that writes too much waits.

use crate::{
    boot,
    control::outbox::{Channel, MAX_RECORD, Outbox},
    sys,
};
use nix::fcntl::{FcntlArg, fcntl};
use std::{
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What the pipe of a payload that writes much holds, bytes, so that it is not stopped and woken for each record. Others keep
/// the kernel's 64 KiB, pipe(7). Also the most that is read before everybody else gets a turn.
const WIDE: usize = 256 << 10;

/// Read ends of stdout and stderr, in the order of [`Channel::BOTH`]; `None`: drained to its end.
#[derive(Debug)]
pub(crate) struct Pipes {
    ends: [Option<OwnedFd>; 2],
    is_wide: [bool; 2],
}

impl Pipes {
    /// Both must be non-blocking.
    pub(crate) fn new(stdout: OwnedFd, stderr: OwnedFd) -> Self {
        Self {
            ends: [Some(stdout), Some(stderr)],
            is_wide: [false; 2],
        }
    }

    /// The pipe to poll, unless it is at its end or its window is full.
    pub(crate) fn interest(&self, channel: Channel, outbox: &Outbox) -> Option<BorrowedFd<'_>> {
        self.ends[channel as usize]
            .as_ref()
            .filter(|_| outbox.room(channel) > 0)
            .map(AsFd::as_fd)
    }

    /// Moves what is there from the pipe to the outbox.
    pub(crate) fn read(&mut self, channel: Channel, outbox: &mut Outbox) {
        let room = outbox.room(channel).min(WIDE);
        let slot = &mut self.ends[channel as usize];
        let Some(pipe) = slot.as_ref().filter(|_| room > 0) else {
            return;
        };
        match sys::read_some(pipe, room) {
            Ok(data) if !data.is_empty() => {
                if data.len() >= MAX_RECORD && !std::mem::replace(&mut self.is_wide[channel as usize], true) {
                    // Refused is as good as not asked.
                    let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(WIDE as libc::c_int));
                }
                outbox.push(channel, data.into(), boot::wall_ns());
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // The end, or a pipe that broke: either way nothing more comes.
            Ok(_) | Err(_) => *slot = None,
        }
    }

    /// Whether both ended.
    pub(crate) fn are_drained(&self) -> bool {
        self.ends.iter().all(Option::is_none)
    }
}
