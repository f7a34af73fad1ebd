//! Whether a guest gives signs of life: its heartbeats, and when they stay away, pings of Flintlock's guest-agent protocol v1
//! on vsock port 1024, which tell a stuck control stream from a guest that hangs.
//!
//! ```text
//! Regular ─ three intervals without a heartbeat ─► Stale(asked) ─ answer, or none in time ─► Stale(answers | silent)
//!    ▲                                                ▲                                         │
//!    └──────────────── a heartbeat ───────────────────┴────────────── again after a while ──────┘
//! ```
//! A sign for people and never a reason to end anything. At most one ping is under way; it is not given up while the guest may
//! still answer ([`far_vmm::vsock`] says why).

use crate::{clock::Clock, host::VmHost, names::VmId, outcome::millis, record::UnixMs};
use futures::future::BoxFuture;
use std::{sync::Arc, time::Duration};

/// A guest that has not answered for so long is called silent. Generous: it may be slow because everything is.
const SILENT_AFTER: Duration = Duration::from_secs(10);
/// Between an answer and the next question.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// Heartbeats that may stay away.
const MISSED: u64 = 3;

/// What came of a ping: an answer, or why there is none, for people.
pub type Pinged = Result<(), String>;

/// What is known of a guest's heartbeats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heartbeat {
    /// They come, or none is due yet.
    Regular,
    /// They stay away; with what came of a ping, once that is known.
    Stale(Option<Pinged>),
}

impl Heartbeat {
    /// They stay away.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::Stale(_))
    }

    /// For people; `None`: nothing to say.
    pub(crate) fn note(&self) -> Option<String> {
        let silence = format!("no heartbeat came for {MISSED} intervals");
        match self {
            Self::Regular => None,
            Self::Stale(None) => Some(silence),
            Self::Stale(Some(Ok(()))) => Some(format!(
                "{silence}, but the guest answers pings: its control stream is stuck"
            )),
            Self::Stale(Some(Err(error))) => Some(format!("{silence}, and the guest answers no pings: {error}")),
        }
    }
}

/// One guest's.
pub(crate) struct Pulse {
    host: Arc<dyn VmHost>,
    vm: VmId,
    every: Duration,
    state: Heartbeat,
    asking: Option<BoxFuture<'static, Pinged>>,
    /// When the state changes by itself.
    turn_at: Option<UnixMs>,
}

impl Pulse {
    /// An interval of zero: no heartbeats are expected.
    pub(crate) fn new(host: Arc<dyn VmHost>, vm: VmId, every: Duration) -> Self {
        Self {
            host,
            vm,
            every,
            state: Heartbeat::Regular,
            asking: None,
            turn_at: None,
        }
    }

    pub(crate) fn state(&self) -> Heartbeat {
        self.state.clone()
    }

    /// The guest gave a sign of life. Answers whether that is news.
    pub(crate) fn beat(&mut self, now: UnixMs) -> bool {
        self.turn_at = (!self.every.is_zero()).then(|| now + millis(self.every) * MISSED);
        std::mem::replace(&mut self.state, Heartbeat::Regular) != Heartbeat::Regular
    }

    /// Completes when the state changed. Cancel-safe.
    pub(crate) async fn changed(&mut self, clock: &Clock) {
        loop {
            let state = tokio::select! {
                biased;
                answer = answered(&mut self.asking) => {
                    self.asking = None;
                    if !self.state.is_stale() {
                        continue;
                    }
                    self.turn_at = Some(clock.now() + millis(ASK_AGAIN));
                    Heartbeat::Stale(Some(answer))
                }
                () = clock.until(self.turn_at) => self.turn(clock.now()),
            };
            if self.state != state {
                self.state = state;
                return;
            }
        }
    }

    /// Its time came.
    fn turn(&mut self, now: UnixMs) -> Heartbeat {
        let is_waiting = self.asking.is_some();
        if !is_waiting {
            self.asking = Some(self.host.ping(&self.vm));
        }
        match &self.state {
            // Nothing more happens until it answers.
            Heartbeat::Stale(_) if is_waiting => {
                self.turn_at = None;
                Heartbeat::Stale(Some(Err(format!("nothing came within {} s", SILENT_AFTER.as_secs()))))
            }
            Heartbeat::Stale(known) => {
                self.turn_at = Some(now + millis(SILENT_AFTER));
                Heartbeat::Stale(known.clone())
            }
            Heartbeat::Regular => {
                self.turn_at = Some(now + millis(SILENT_AFTER));
                Heartbeat::Stale(None)
            }
        }
    }
}

async fn answered(asking: &mut Option<BoxFuture<'static, Pinged>>) -> Pinged {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}
