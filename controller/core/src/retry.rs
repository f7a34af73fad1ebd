//! What follows the end of an attempt: the agent's end, or another attempt, and when. Pure; the controller's clock comes
//! in as a number.
//!
//! | the attempt ended with | it is a failure of | OnFailure | Always | Never |
//! |---|---|---|---|---|
//! | Completed | nobody | Completed | again | Completed |
//! | Error, Signal, OOMKilled, KernelPanic after the program started | the agent | again, counted | again, counted | Failed |
//! | DeadlineExceeded | the agent | Failed | Failed | Failed |
//! | ImageError, BootTimeout, VMMCrashed, InitLost, NetworkError, BladeRebooted, Evicted, KernelPanic before | the blade | again | again | Failed |
//! | NodeLost | the blade | as `lostPolicy` says | as `lostPolicy` says | as `lostPolicy` says |
//!
//! An attempt that a blade refused, or that was withdrawn before it began, did not end: it is placed anew, whatever the
//! policy, and counts nowhere.

use crate::status::EndReason;

/// Failures of blades after which an agent is Failed, when they come within [`BLADE_FAILURES_WITHIN`].
pub const MAX_BLADE_FAILURES: u32 = 20;
/// Seconds.
pub const BLADE_FAILURES_WITHIN: i64 = 600;
/// Failures of the agent itself where the spec says nothing, as for Jobs.
pub const DEFAULT_BACKOFF_LIMIT: u32 = 6;
/// Milliseconds until the attempt after the first failure of an agent; doubles, up to [`LONGEST`] times as long.
pub const FIRST_DELAY_MS: u64 = 10_000;
/// 10 s become 5 min.
const LONGEST: u64 = 30;
/// A failure of a blade is tried again ten times sooner, and at most three times as late as a first failure of an agent:
/// the cap ends it, not the wait.
const BLADE_SOONER: u64 = 10;
const BLADE_LONGEST: u64 = 3;

/// `spec.restartPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub enum Restart {
    #[default]
    Never,
    OnFailure,
    Always,
}

/// What the spec says of ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// `spec.restartPolicy`.
    pub restart: Restart,
    /// `spec.backoffLimit`.
    pub backoff_limit: u32,
    /// `spec.lostPolicy` is Reschedule.
    pub reschedules: bool,
    /// `spec.activeDeadlineSeconds`, over all attempts.
    pub deadline_s: Option<u32>,
    /// See [`FIRST_DELAY_MS`].
    pub first_delay_ms: u64,
    /// The controller's clock, milliseconds since the Unix epoch.
    pub now_ms: i64,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            restart: Restart::Never,
            backoff_limit: DEFAULT_BACKOFF_LIMIT,
            reschedules: false,
            deadline_s: None,
            first_delay_ms: FIRST_DELAY_MS,
            now_ms: 0,
        }
    }
}

impl Rules {
    /// The controller's clock in seconds.
    #[must_use]
    pub fn now(&self) -> i64 {
        self.now_ms.div_euclid(1000)
    }

    /// Seconds of the deadline that are left of an agent that was first placed at `since`; `None`: it has no deadline.
    #[must_use]
    pub fn deadline_left(&self, since: Option<i64>) -> Option<i64> {
        let limit = i64::from(self.deadline_s?);
        Some(limit - since.map_or(0, |since| self.now().saturating_sub(since).max(0)))
    }
}

/// What was counted so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ends that were the agent's own failures.
    pub failures: u32,
    /// Failures of blades since `blade_failures_since`.
    pub blade_failures: u32,
    /// When the first of them was, seconds.
    pub blade_failures_since: Option<i64>,
}

/// What follows an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The agent has ended. The sentence says which limit was reached, where one was.
    Final(Option<String>),
    /// Another attempt.
    Again {
        /// With this end.
        counts: Counts,
        /// Seconds since the Unix epoch: not before.
        at: i64,
    },
}

/// Whose failure an end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nobodys,
    Agents,
    Blades,
    Lost,
    /// No further attempt could do better.
    Limit,
}

fn fault(reason: EndReason, had_started: bool) -> Fault {
    match reason {
        EndReason::Completed => Fault::Nobodys,
        EndReason::KernelPanic if !had_started => Fault::Blades,
        EndReason::Error | EndReason::Signal | EndReason::OomKilled | EndReason::KernelPanic => Fault::Agents,
        EndReason::DeadlineExceeded => Fault::Limit,
        EndReason::ImageError
        | EndReason::BootTimeout
        | EndReason::VmmCrashed
        | EndReason::InitLost
        | EndReason::NetworkError
        | EndReason::BladeRebooted
        | EndReason::Evicted => Fault::Blades,
        EndReason::NodeLost => Fault::Lost,
    }
}

/// What follows the end of an attempt, by the table above. `had_started`: its program ran. `since`: when the agent was
/// first placed, for the deadline.
#[must_use]
pub fn verdict(reason: EndReason, had_started: bool, counts: Counts, since: Option<i64>, rules: &Rules) -> Verdict {
    let fault = fault(reason, had_started);
    let goes_on = match (fault, rules.restart) {
        (Fault::Limit, _) => false,
        (Fault::Lost, _) => rules.reschedules,
        (Fault::Nobodys | Fault::Agents | Fault::Blades, Restart::Never) => false,
        (Fault::Nobodys, Restart::OnFailure) => false,
        (Fault::Nobodys, Restart::Always) | (Fault::Agents | Fault::Blades, Restart::OnFailure | Restart::Always) => {
            true
        }
    };
    if !goes_on {
        return Verdict::Final(None);
    }
    let mut counts = counts;
    let delay = match fault {
        Fault::Nobodys => rules.first_delay_ms,
        Fault::Agents => {
            if counts.failures >= rules.backoff_limit {
                let text = format!(
                    "the limit of {} retries (spec.backoffLimit) is reached",
                    rules.backoff_limit
                );
                return Verdict::Final(Some(text));
            }
            counts.failures += 1;
            doubled(rules.first_delay_ms, counts.failures, LONGEST)
        }
        Fault::Blades | Fault::Lost | Fault::Limit => {
            let since = counts.blade_failures_since;
            if since.is_none_or(|since| rules.now().saturating_sub(since) >= BLADE_FAILURES_WITHIN) {
                (counts.blade_failures, counts.blade_failures_since) = (0, Some(rules.now()));
            }
            if counts.blade_failures >= MAX_BLADE_FAILURES {
                let minutes = BLADE_FAILURES_WITHIN / 60;
                return Verdict::Final(Some(format!(
                    "blades failed it more than {MAX_BLADE_FAILURES} times within {minutes} minutes"
                )));
            }
            counts.blade_failures += 1;
            let first = rules.first_delay_ms / BLADE_SOONER;
            doubled(first, counts.blade_failures, BLADE_SOONER * BLADE_LONGEST)
        }
    };
    let at = rules.now_ms.saturating_add_unsigned(delay).div_euclid(1000);
    match rules.deadline_left(since) {
        Some(left) if at >= rules.now().saturating_add(left) => Verdict::Final(Some(format!(
            "no time is left for another attempt (spec.activeDeadlineSeconds: {} s)",
            rules.deadline_s.unwrap_or(0)
        ))),
        Some(_) | None => Verdict::Again { counts, at },
    }
}

/// `first` doubled for every failure after the first, at most `longest` times as long.
fn doubled(first: u64, failures: u32, longest: u64) -> u64 {
    let times = 1_u64.checked_shl(failures.saturating_sub(1)).unwrap_or(u64::MAX);
    first.saturating_mul(times.min(longest))
}

#[cfg(test)]
mod tests;
