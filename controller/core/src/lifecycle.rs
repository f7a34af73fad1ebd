//! What to do next with one agent. Pure: the same facts give the same decision, however often it is asked.
//!
//! The intent (blade, attempt) is in the status before the blade is called; so after a crash the same call is made
//! again with the same identity, and the blade's ledger makes it the same boot.

use crate::{
    retry::Rules,
    status::{ConditionKind, Phase, Report, Stage, Status},
};

/// What is known of the blade an agent belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BladeView {
    /// Its states are known completely, and calls reach it.
    Connected,
    /// Not connected now, but not long enough to worry.
    Unreachable,
    /// Not heard of for longer than the controller waits.
    Lost,
    /// Not heard of for so long that it must have ended its agents itself.
    Fenced,
}

/// Everything a decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// What the API says was claimed and intended.
    pub status: &'a Status,
    /// The user deleted the agent.
    pub deleting: bool,
    /// Our finalizer is on it.
    pub held: bool,
    /// The blade of `status.node`; ignored where there is none.
    pub blade: BladeView,
    /// What that blade says of the current attempt; `None`: it does not know it.
    pub report: Option<&'a Report>,
    /// What the spec says of ends, and the time.
    pub rules: &'a Rules,
    /// What the spec wants now.
    pub wanted: Wanted,
    /// The blade is emptied, or has a taint that the agent does not bear (any longer).
    pub must_leave: bool,
    /// When the agent ended, seconds by the controller's clock.
    pub final_since: Option<i64>,
}

/// What of the spec may change while the agent lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `spec.suspend`.
    pub suspended: bool,
    /// `spec.operatingMode` is Sleeping.
    pub asleep: bool,
    /// `spec.ttlSecondsAfterFinished`.
    pub ttl_s: Option<u32>,
}

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing until something changes.
    Rest,
    /// Choose a blade and write the choice down.
    Place,
    /// Make sure the blade has the attempt.
    Ensure,
    /// The blade forgot what it had begun.
    DeclareForgotten,
    /// The blade is lost.
    DeclareLost,
    /// The blade must have ended the attempt itself by now.
    DeclareFenced,
    /// Write down that the agent is suspended, or is about to be.
    DeclareSuspended,
    /// The deadline has passed, and nothing runs.
    DeclareDeadline,
    /// The next attempt is not due, or the agent is not old enough to be deleted: look again at this time, seconds.
    WaitUntil(i64),
    /// Ask the blade to lay the microVM to sleep.
    Sleep,
    /// Ask the blade to wake the microVM, where it sleeps, and tell no more of sleep.
    Wake,
    /// It ended long enough ago: delete it.
    Delete,
    /// Write down what the blade says.
    Tell,
    /// The blade will never boot the attempt: write that down, and another blade may be chosen.
    PlaceAnew,
    /// Ask the attempt to end: the user deleted the agent.
    Stop,
    /// Ask the attempt to end, as evicted: it is suspended, its blade is emptied, or its time is over before it began.
    Evict,
    /// Forget the ended attempt on the blade, then let the agent go.
    ForgetAndRelease,
    /// Let the agent go: no blade has it.
    Release,
    /// Let the agent go although its blade never confirmed the end.
    ReleaseUnconfirmed,
}

/// The next step for an agent.
#[must_use]
pub fn decide(seen: &Seen<'_>) -> Decision {
    let report = seen.report.filter(|report| report.attempt == seen.status.attempt);
    if seen.deleting {
        return decide_deletion(seen, report);
    }
    if seen.status.is_final() {
        return decide_expiry(seen);
    }
    if seen.status.node.is_none() {
        return decide_pending(seen);
    }
    match (seen.blade, report) {
        (BladeView::Lost, _) => Decision::DeclareLost,
        (BladeView::Fenced, _) => Decision::DeclareFenced,
        (BladeView::Connected, None) if seen.status.has_begun() => Decision::DeclareForgotten,
        // Also where the blade may never have heard of it: the order makes a late EnsureAgent powerless.
        (BladeView::Connected, None) if must_end(seen) => Decision::Evict,
        (BladeView::Connected, None) => Decision::Ensure,
        (BladeView::Connected | BladeView::Unreachable, Some(report)) => decide_known(seen, report),
        (BladeView::Unreachable, None) => Decision::Rest,
    }
}

/// The blade knows the attempt.
fn decide_known(seen: &Seen<'_>, report: &Report) -> Decision {
    let is_called = seen.blade == BladeView::Connected;
    match report.stage {
        Stage::Ended if report.is_withdrawn() && !seen.status.has_begun() => Decision::PlaceAnew,
        Stage::Ended | Stage::Stopping => Decision::Tell,
        Stage::Accepted | Stage::Preparing | Stage::Starting | Stage::Warm | Stage::Running if is_called => {
            // What is on the blade is told before anything is asked of it. What was begun is done: a suspension that is taken
            // back before the attempt ended still ends it, and it is placed anew.
            let is_told = seen.status.has_begun();
            let word = seen.status.condition(ConditionKind::Sleeping).is_some();
            if is_told && seen.wanted.suspended && !seen.status.is_suspending() {
                Decision::DeclareSuspended
            } else if is_told && (seen.status.is_suspending() || seen.must_leave) {
                Decision::Evict
            } else if seen.wanted.asleep && !word && seen.status.phase() == Phase::Running {
                Decision::Sleep
            } else if !seen.wanted.asleep && word {
                Decision::Wake
            } else {
                Decision::Tell
            }
        }
        Stage::Accepted | Stage::Preparing | Stage::Starting | Stage::Warm | Stage::Running => Decision::Tell,
    }
}

/// An attempt that has not begun shall not begin any more. One that began ends by its blade's own clock.
fn must_end(seen: &Seen<'_>) -> bool {
    seen.wanted.suspended || seen.must_leave || is_late(seen)
}

fn is_late(seen: &Seen<'_>) -> bool {
    let left = seen.rules.deadline_left(seen.status.active_since);
    seen.status.active_since.is_some() && left.is_some_and(|left| left <= 0)
}

fn decide_pending(seen: &Seen<'_>) -> Decision {
    if seen.wanted.suspended {
        return if seen.status.is_suspended() {
            Decision::Rest
        } else {
            Decision::DeclareSuspended
        };
    }
    if is_late(seen) {
        return Decision::DeclareDeadline;
    }
    match seen.status.next_attempt_at {
        Some(at) if at > seen.rules.now() => Decision::WaitUntil(at),
        Some(_) | None => Decision::Place,
    }
}

fn decide_expiry(seen: &Seen<'_>) -> Decision {
    let Some((ttl, since)) = seen.wanted.ttl_s.zip(seen.final_since) else {
        return Decision::Rest;
    };
    let at = since.saturating_add(ttl.into());
    if at <= seen.rules.now() {
        Decision::Delete
    } else {
        Decision::WaitUntil(at)
    }
}

fn decide_deletion(seen: &Seen<'_>, report: Option<&Report>) -> Decision {
    if !seen.held {
        return Decision::Rest;
    }
    if seen.status.node.is_none() {
        return Decision::Release;
    }
    match (seen.blade, report.map(|report| report.stage)) {
        (BladeView::Fenced, _) => Decision::ReleaseUnconfirmed,
        (BladeView::Unreachable | BladeView::Lost, _) => Decision::Rest,
        (BladeView::Connected, Some(Stage::Ended)) => Decision::ForgetAndRelease,
        // The blade would say Stopping for as long as the grace period lasts: one order is enough.
        (BladeView::Connected, Some(Stage::Stopping)) => Decision::Rest,
        // Also where the blade does not know it: the order makes a late EnsureAgent powerless.
        (BladeView::Connected, _) => Decision::Stop,
    }
}

#[cfg(test)]
mod tests;
