//! What is known of guests that run now: their live control connection, and their last heartbeat.
//!
//! The task of an attempt writes here; calls of the node API and the metrics read. Nothing of it is kept on disk.

use crate::{control::channels::Channels, names::AttemptKey, record::UnixMs};
use far_proto::guest;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// Highest share of time, hundredths of a percent.
const MAX_SHARE: u32 = 10_000;

/// How long tasks waited, hundredths of a percent of the last 10 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub(crate) some: u32,
    pub(crate) full: u32,
}

/// The last heartbeat, within the bounds that make sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) at: UnixMs,
    pub(crate) memory_total_kib: u64,
    pub(crate) memory_available_kib: u64,
    pub(crate) payload_memory_kib: u64,
    pub(crate) cpu_usage_us: u64,
    /// The guest's own clock, for the rate.
    boot_ns: u64,
    pub(crate) cpu_millis: Option<u32>,
    pub(crate) processes: u32,
    /// CPU, memory, I/O.
    pub(crate) pressure: [Option<Pressure>; 3],
}

impl Beat {
    fn of(said: &guest::Heartbeat, before: Option<&Self>, at: UnixMs) -> Self {
        // A guest can say anything: more than 2^40 KiB is nonsense, and so is more memory free than there is.
        let kib = |value: u64| value.min(1 << 40);
        let share = |pressure: &guest::Pressure| Pressure {
            some: pressure.some_avg10.min(MAX_SHARE),
            full: pressure.full_avg10.min(MAX_SHARE),
        };
        let cpu_millis = before.and_then(|before| {
            let span = said.boot_ns.checked_sub(before.boot_ns).filter(|span| *span > 0)?;
            let used = said.cpu_usage_us.checked_sub(before.cpu_usage_us)?;
            u32::try_from(u128::from(used) * 1_000_000 / u128::from(span)).ok()
        });
        Self {
            at,
            memory_total_kib: kib(said.mem_total_kib),
            memory_available_kib: kib(said.mem_available_kib).min(kib(said.mem_total_kib)),
            payload_memory_kib: kib(said.payload_memory_kib),
            cpu_usage_us: said.cpu_usage_us,
            boot_ns: said.boot_ns,
            cpu_millis,
            processes: said.processes,
            pressure: [&said.cpu_pressure, &said.memory_pressure, &said.io_pressure]
                .map(|pressure| pressure.as_ref().map(share)),
        }
    }
}

#[derive(Debug, Default)]
struct Guest {
    channels: Option<Arc<Channels>>,
    beat: Option<Beat>,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Guests {
    known: Mutex<BTreeMap<AttemptKey, Guest>>,
    /// Grows with each connection that begins or ends.
    changes: watch::Sender<u64>,
}

impl Guests {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<AttemptKey, Guest>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn connected(&self, key: &AttemptKey, channels: Arc<Channels>) {
        self.locked().entry(key.clone()).or_default().channels = Some(channels);
        self.changes.send_modify(|changes| *changes += 1);
    }

    pub(crate) fn disconnected(&self, key: &AttemptKey) {
        if let Some(guest) = self.locked().get_mut(key) {
            guest.channels = None;
        }
        self.changes.send_modify(|changes| *changes += 1);
    }

    pub(crate) fn heard(&self, key: &AttemptKey, said: &guest::Heartbeat, at: UnixMs) {
        let mut known = self.locked();
        let guest = known.entry(key.clone()).or_default();
        guest.beat = Some(Beat::of(said, guest.beat.as_ref(), at));
    }

    /// The attempt ended.
    pub(crate) fn forget(&self, key: &AttemptKey) {
        self.locked().remove(key);
        self.changes.send_modify(|changes| *changes += 1);
    }

    pub(crate) fn beat(&self, key: &AttemptKey) -> Option<Beat> {
        self.locked().get(key)?.beat.clone()
    }

    /// The live connection, if there is one now.
    pub(crate) fn channels(&self, key: &AttemptKey) -> Option<Arc<Channels>> {
        self.locked().get(key)?.channels.clone()
    }

    /// The live connection; one that is just being made again is waited for.
    pub(crate) async fn wait_for_channels(&self, key: &AttemptKey, limit: Duration) -> Option<Arc<Channels>> {
        let mut changes = self.changes.subscribe();
        let wait = async {
            loop {
                if let Some(channels) = self.channels(key) {
                    return Some(channels);
                }
                changes.changed().await.ok()?;
            }
        };
        tokio::time::timeout(limit, wait).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(boot_s: u64, cpu_usage_us: u64) -> guest::Heartbeat {
        guest::Heartbeat {
            boot_ns: boot_s * 1_000_000_000,
            cpu_usage_us,
            mem_total_kib: 100,
            mem_available_kib: 40,
            ..guest::Heartbeat::default()
        }
    }

    #[test]
    fn the_rate_is_taken_between_two_heartbeats_and_never_from_nonsense() {
        let cases = [
            ("the first", None, None),
            ("half a core", Some(said(0, 500_000)), Some(500)),
            ("clock stood still", Some(said(2, 0)), None),
            ("clock went back", Some(said(9, 0)), None),
            ("usage went back", Some(said(0, 9_000_000)), None),
        ];
        for (why, before, expected) in cases {
            let before = before.map(|before| Beat::of(&before, None, 0));
            assert_eq!(
                Beat::of(&said(2, 1_500_000), before.as_ref(), 1).cpu_millis,
                expected,
                "{why}"
            );
        }
    }

    #[test]
    fn a_guest_that_lies_about_itself_stays_within_bounds() {
        let lie = guest::Heartbeat {
            mem_total_kib: 10,
            mem_available_kib: u64::MAX,
            payload_memory_kib: u64::MAX,
            cpu_usage_us: u64::MAX,
            cpu_pressure: Some(guest::Pressure {
                some_avg10: u32::MAX,
                ..guest::Pressure::default()
            }),
            ..guest::Heartbeat::default()
        };
        let beat = Beat::of(&lie, None, 0);
        assert_eq!((beat.memory_total_kib, beat.memory_available_kib), (10, 10));
        assert_eq!(beat.payload_memory_kib, 1 << 40);
        assert_eq!(beat.pressure[0].unwrap().some, 10_000);
        let later = guest::Heartbeat { boot_ns: 1, ..lie };
        assert_eq!(Beat::of(&later, Some(&beat), 0).cpu_millis, Some(0));
    }
}
