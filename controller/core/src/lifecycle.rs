//! What to do next with one agent. Pure: the same facts give the same decision, however often it is asked.
//!
//! The intent (blade, attempt) is in the status before the blade is called; so after a crash the same call is made
//! again with the same identity, and the blade's ledger makes it the same boot.

use crate::status::{Report, Stage, Status};

/// What is known of the blade an agent belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BladeView {
    /// Its states are known completely, and calls reach it.
    Connected,
    /// Not connected now, but not long enough to worry.
    Unreachable,
    /// Not heard of for longer than the controller waits.
    Lost,
    /// Not heard of for so long that the fence time is over.
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
    /// Write down what the blade says.
    Tell,
    /// The blade will never boot the attempt: write that down, and another blade may be chosen.
    PlaceAnew,
    /// Ask the attempt to end.
    Stop,
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
        return Decision::Rest;
    }
    if seen.status.node.is_none() {
        return Decision::Place;
    }
    match (seen.blade, report) {
        (BladeView::Lost | BladeView::Fenced, _) => Decision::DeclareLost,
        (BladeView::Connected, None) if seen.status.has_begun() => Decision::DeclareForgotten,
        (BladeView::Connected, None) => Decision::Ensure,
        (BladeView::Connected | BladeView::Unreachable, Some(report)) => {
            if report.is_withdrawn() && !seen.status.has_begun() {
                Decision::PlaceAnew
            } else {
                Decision::Tell
            }
        }
        (BladeView::Unreachable, None) => Decision::Rest,
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
