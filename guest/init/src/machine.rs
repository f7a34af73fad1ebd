//! What the host does to the whole machine: clock, entropy, and standing still for a snapshot.

use crate::{cgroup::Cgroup, sys};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};
use std::{fs, io, time::Duration};

/// Sets the wall clock.
pub(crate) fn set_time(unix_ns: u64) -> io::Result<()> {
    let time = TimeSpec::from_duration(Duration::from_nanos(unix_ns));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

/// Adds entropy and makes the kernel's generator use it at once.
pub(crate) fn reseed(entropy: &[u8]) -> io::Result<()> {
    let random = fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    sys::credit_entropy(&random, entropy)?;
    sys::reseed_generator(&random)
}

/// Who waits for the payload to stand still.
#[derive(Default)]
pub(crate) struct Stillness {
    /// Most: one snapshot needs one.
    waiting: Vec<u64>,
}

/// Most requests that wait at once.
const MAX_WAITING: usize = 16;

impl Stillness {
    /// Asks for it; `false`: too many wait already.
    pub(crate) fn ask(&mut self, id: u64) -> bool {
        let has_room = self.waiting.len() < MAX_WAITING;
        if has_room {
            self.waiting.push(id);
        }
        has_room
    }

    pub(crate) fn is_asked_for(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Those to answer, when everything stands still.
    pub(crate) fn reached(&mut self, cgroup: Option<&Cgroup>) -> Vec<u64> {
        if self.waiting.is_empty() || !cgroup.is_some_and(Cgroup::is_frozen) {
            return Vec::new();
        }
        nix::unistd::sync();
        self.forget()
    }

    /// Those who will not get it.
    pub(crate) fn forget(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.waiting)
    }
}
