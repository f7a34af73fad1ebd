//! How often one agent's status is written while it changes. Where many agents change at once the API server is what there is
//! too little of: then more of what happens to an agent is told together. An end is always told at once.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two writes of a status that is not final.
const CALM: Duration = Duration::from_millis(250);
/// The same while [`MANY`] statuses are written in a second.
const BUSY: Duration = Duration::from_secs(1);
const MANY: u32 = 50;
const WINDOW: Duration = Duration::from_secs(1);

/// Counts the writes of statuses.
#[derive(Debug)]
pub(crate) struct Pace(Mutex<Window>);

#[derive(Debug)]
struct Window {
    since: Instant,
    writes: u32,
    /// Of the window before.
    before: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self(Mutex::new(Window {
            since: Instant::now(),
            writes: 0,
            before: 0,
        }))
    }
}

impl Window {
    fn turn(&mut self, now: Instant) {
        let windows = now.duration_since(self.since).as_nanos() / WINDOW.as_nanos();
        match windows {
            0 => return,
            1 => self.before = std::mem::take(&mut self.writes),
            _ => (self.before, self.writes) = (0, 0),
        }
        self.since = now;
    }
}

impl Pace {
    fn at(&self, now: Instant, writes: u32) -> Duration {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        window.turn(now);
        window.writes += writes;
        if window.writes.max(window.before) >= MANY {
            BUSY
        } else {
            CALM
        }
    }

    /// A status is written.
    pub(crate) fn count(&self) {
        self.at(Instant::now(), 1);
    }

    /// How long to wait after one write of a status before the next that is not final.
    pub(crate) fn between_writes(&self) -> Duration {
        self.at(Instant::now(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_writes_in_a_second_are_told_together_and_few_are_not() {
        let pace = Pace::default();
        let start = Instant::now();
        let at = |seconds: f64, writes| pace.at(start + Duration::from_secs_f64(seconds), writes);
        assert_eq!(at(0.1, 49), CALM);
        assert_eq!(at(0.2, 1), BUSY);
        assert_eq!(at(1.5, 0), BUSY, "the second before counts");
        assert_eq!(at(2.6, 0), CALM);
        assert_eq!(at(60.0, 60), BUSY);
        assert_eq!(at(120.0, 0), CALM, "what was long ago does not");
    }
}
