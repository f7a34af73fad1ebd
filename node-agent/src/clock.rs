//! Wall time that only moves forward and that tests can pause: the wall clock at start plus tokio's clock.
//!
//! A step of the wall clock (NTP at boot) therefore never makes a deadline fire early or late; stamps of this process
//! are off by such a step until it restarts.

use crate::{outcome::millis, record::UnixMs};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// Source of time for records and deadlines.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    unix_at_start: Duration,
    start: Instant,
}

impl Clock {
    /// Reads the wall clock once.
    #[must_use]
    pub fn start() -> Self {
        let unix_at_start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            unix_at_start,
            start: Instant::now(),
        }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> UnixMs {
        millis(self.unix_at_start + self.start.elapsed())
    }

    /// Completes at a time; never for `None`.
    pub(crate) async fn until(&self, at: Option<UnixMs>) {
        match at {
            Some(at) => tokio::time::sleep(Duration::from_millis(at.saturating_sub(self.now()))).await,
            None => std::future::pending().await,
        }
    }
}
