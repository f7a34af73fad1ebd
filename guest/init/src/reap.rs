//! The death of children: SIGCHLD as a file descriptor, and reaping to exhaustion, because PID 1 inherits every orphan.

use crate::sys::{self, Ended};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use std::{io, os::fd::AsFd, os::fd::BorrowedFd};

/// Tells that children ended.
#[derive(Debug)]
pub(crate) struct Reaper {
    signals: SignalFd,
}

impl Reaper {
    /// Blocks SIGCHLD and opens its descriptor. All other signals keep their default, which for PID 1 is to be ignored.
    pub(crate) fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        Ok(Self {
            signals: SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// Reaps everything that has ended and tells of each.
    pub(crate) fn collect(&self, mut tell: impl FnMut(Ended)) -> io::Result<()> {
        // Signals coalesce, so their number says nothing: empty the descriptor, then ask the kernel.
        while let Ok(Some(_)) = self.signals.read_signal() {}
        while let Some(ended) = sys::reap_one()? {
            tell(ended);
        }
        Ok(())
    }
}
