//! The payload's two output pipes: read only while the window has room, so that a payload that writes too much waits.

use crate::{
    boot,
    control::outbox::{Channel, MAX_RECORD, Outbox},
    sys,
};
use std::{
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Read ends of stdout and stderr, in the order of [`Channel::BOTH`]; `None`: drained to its end.
#[derive(Debug)]
pub(crate) struct Pipes([Option<OwnedFd>; 2]);

impl Pipes {
    /// Both must be non-blocking.
    pub(crate) fn new(stdout: OwnedFd, stderr: OwnedFd) -> Self {
        Self([Some(stdout), Some(stderr)])
    }

    /// The pipe to poll, unless it is at its end or its window is full.
    pub(crate) fn interest(&self, channel: Channel, outbox: &Outbox) -> Option<BorrowedFd<'_>> {
        self.0[channel as usize]
            .as_ref()
            .filter(|_| outbox.room(channel) > 0)
            .map(AsFd::as_fd)
    }

    /// Moves at most one record from the pipe to the outbox.
    pub(crate) fn read(&mut self, channel: Channel, outbox: &mut Outbox) {
        let room = outbox.room(channel).min(MAX_RECORD);
        let slot = &mut self.0[channel as usize];
        let Some(pipe) = slot.as_ref().filter(|_| room > 0) else {
            return;
        };
        match sys::read_some(pipe, room) {
            Ok(data) if !data.is_empty() => outbox.push(channel, data, boot::wall_ns()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            // The end, or a pipe that broke: either way nothing more comes.
            Ok(_) | Err(_) => *slot = None,
        }
    }

    /// Whether both ended.
    pub(crate) fn are_drained(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }
}
