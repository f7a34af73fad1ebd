//! What may be claimed about an agent: the status after a fact, from the status before it.
//!
//! ```text
//! Pending ─► Scheduled ─► Starting ─► Running ─► Completed | Failed
//!    ▲           │            │    ◄──► Unknown (the blade is not heard of)
//!    └───────────┴────────────┘ (the blade refused; the attempt ended and another follows; suspended)
//! ```
//! Invariant: no exit code without an exit report. Invariant: nothing changes a final status.

use crate::{
    retry::{Counts, Rules, Verdict, verdict},
    text::cut,
};

/// Longest message in a status, bytes; the API takes as many characters.
const MAX_MESSAGE: usize = 4096;

/// Where an agent stands, in one word; derived from the conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)] // The words of the API; their texts are in far-api.
pub enum Phase {
    #[default]
    Pending,
    Scheduled,
    Starting,
    Running,
    Sleeping,
    Completed,
    Failed,
    Unknown,
}

/// Kinds of condition, in the order they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum ConditionKind {
    Scheduled,
    ImageReady,
    Booted,
    Ready,
    Completed,
    Failed,
    Sleeping,
    NodeLost,
}

impl ConditionKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Scheduled,
        Self::ImageReady,
        Self::Booted,
        Self::Ready,
        Self::Completed,
        Self::Failed,
        Self::Sleeping,
        Self::NodeLost,
    ];

    /// The word as the API writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "Scheduled",
            Self::ImageReady => "ImageReady",
            Self::Booted => "Booted",
            Self::Ready => "Ready",
            Self::Completed => "Completed",
            Self::Failed => "Failed",
            Self::Sleeping => "Sleeping",
            Self::NodeLost => "NodeLost",
        }
    }
}

/// One thing that was seen, or seen not to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// What it speaks of.
    pub kind: ConditionKind,
    /// Whether it is so.
    pub holds: bool,
    /// One word.
    pub reason: String,
    /// A sentence, or empty.
    pub message: String,
}

/// Why an attempt ended: the closed set of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum EndReason {
    Completed,
    Error,
    Signal,
    OomKilled,
    KernelPanic,
    BootTimeout,
    VmmCrashed,
    ImageError,
    NetworkError,
    DeadlineExceeded,
    Evicted,
    NodeLost,
    BladeRebooted,
    InitLost,
}

impl EndReason {
    /// The word as the API writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::Signal => "Signal",
            Self::OomKilled => "OOMKilled",
            Self::KernelPanic => "KernelPanic",
            Self::BootTimeout => "BootTimeout",
            Self::VmmCrashed => "VMMCrashed",
            Self::ImageError => "ImageError",
            Self::NetworkError => "NetworkError",
            Self::DeadlineExceeded => "DeadlineExceeded",
            Self::Evicted => "Evicted",
            Self::NodeLost => "NodeLost",
            Self::BladeRebooted => "BladeRebooted",
            Self::InitLost => "InitLost",
        }
    }
}

/// A moment by the blade's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    /// Seconds since the Unix epoch.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

/// What the microVM really got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Resources {
    pub vcpus: u32,
    pub memory_mib: u32,
    pub accelerator: String,
    pub vmm: String,
    pub nic: bool,
    pub no_nic_reason: String,
}

/// How far the blade has come with an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Stage {
    Accepted,
    Preparing,
    Starting,
    /// Booted, and waits until another agent claims the microVM.
    Warm,
    Running,
    Stopping,
    Ended,
}

/// How an attempt ended, as its blade said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// Only where an exit report was received.
    pub exit_code: Option<i32>,
    /// Only where an exit report said so.
    pub signal: Option<i32>,
    /// A sentence for people.
    pub message: String,
    /// The last output.
    pub tail: String,
}

/// What a blade says of one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Number of the attempt it speaks of.
    pub attempt: u32,
    /// How far it has come.
    pub stage: Stage,
    /// Empty until resolved.
    pub image_digest: String,
    /// Absent until known.
    pub resources: Option<Resources>,
    /// The guest said Hello.
    pub booted: bool,
    /// The program started.
    pub started_at: Option<Stamp>,
    /// The attempt ended.
    pub finished_at: Option<Stamp>,
    /// Present exactly in [`Stage::Ended`].
    pub end: Option<End>,
    /// What it waits for or goes without.
    pub message: String,
}

impl Report {
    /// The order to stop came before the attempt: nothing of it ever ran, and nothing ever will.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        let is_evicted = self.end.as_ref().is_some_and(|end| end.reason == EndReason::Evicted);
        self.stage == Stage::Ended && is_evicted && !self.booted && self.started_at.is_none()
    }
}

/// How the attempt before the current one ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)] // As in the status of an attempt that has ended.
pub struct LastAttempt {
    pub attempt: u32,
    pub node: Option<String>,
    pub reason: String,
    pub message: String,
    pub exit_code: Option<i32>,
    pub signal: Option<i32>,
    pub finished_at: Option<Stamp>,
    pub tail: Option<String>,
}

/// What is claimed of an agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Sorted by kind; one of each at most.
    pub conditions: Vec<Condition>,
    /// Blade of the current attempt.
    pub node: Option<String>,
    /// Number of the newest attempt; 0: none yet.
    pub attempt: u32,
    /// See [`End::exit_code`].
    pub exit_code: Option<i32>,
    /// See [`End::signal`].
    pub signal: Option<i32>,
    /// One word: why it ended or waits.
    pub reason: Option<String>,
    /// The same as a sentence.
    pub message: Option<String>,
    /// When the program started.
    pub started_at: Option<Stamp>,
    /// When the attempt ended.
    pub finished_at: Option<Stamp>,
    /// Digest of the image.
    pub image_digest: Option<String>,
    /// What the microVM got.
    pub resources: Option<Resources>,
    /// The last output.
    pub tail: Option<String>,
    /// Warm agent whose microVM the attempt takes over instead of a boot.
    pub claimed: Option<Claim>,
    /// Attempts that had begun and were followed by another.
    pub restarts: u32,
    /// What counts towards the limits of retries.
    pub counts: Counts,
    /// When the first attempt was placed, seconds by the controller's clock; the deadline counts from here.
    pub active_since: Option<i64>,
    /// The next attempt is not placed before, seconds by the controller's clock.
    pub next_attempt_at: Option<i64>,
    /// How the attempt before the current one ended.
    pub last_attempt: Option<LastAttempt>,
}

/// One boot of a warm agent.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // As in the API.
pub struct Claim {
    pub name: String,
    pub uid: String,
    pub attempt: u32,
}

/// Something that was learned about an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact<'a> {
    /// No blade will do, and why.
    Unschedulable(&'a str),
    /// A blade was chosen: the next attempt belongs to it. Written before the blade is called.
    Placed {
        /// The blade.
        blade: &'a str,
    },
    /// A warm agent was chosen: the next attempt takes over its microVM on this blade. Written before the blade is called.
    Claiming {
        /// The blade.
        blade: &'a str,
        /// Whose microVM.
        claim: &'a Claim,
    },
    /// The blade has no room now and recorded nothing: back to the queue.
    Refused {
        /// What it said.
        message: &'a str,
    },
    /// The attempt cannot begin yet.
    Waiting {
        /// One word.
        reason: &'a str,
        /// A sentence naming what is missing.
        message: &'a str,
    },
    /// The blade will never run this spec: the end.
    Rejected {
        /// What it said, naming the field.
        message: &'a str,
    },
    /// The blade spoke of the attempt.
    Seen(&'a Report),
    /// The blade no longer knows an attempt that it had begun: the end, without an exit code.
    Forgotten,
    /// The blade is not heard of.
    BladeLost {
        /// A sentence.
        message: &'a str,
    },
    /// The blade was not heard of for so long that it must have ended the attempt itself.
    Fenced {
        /// A sentence.
        message: &'a str,
    },
    /// `spec.suspend` is true. Of an agent with a blade: its attempt is about to be ended for that.
    Suspended,
    /// The deadline over all attempts has passed while none ran.
    DeadlinePassed,
    /// The blade was asked to lay the microVM to sleep, or to wake it, and said that it cannot.
    SleepRefused {
        /// One word.
        reason: &'a str,
        /// A sentence.
        message: &'a str,
    },
    /// The agent is no longer to sleep.
    NotToSleep,
}

impl Status {
    /// The condition of a kind.
    #[must_use]
    pub fn condition(&self, kind: ConditionKind) -> Option<&Condition> {
        self.conditions.iter().find(|one| one.kind == kind)
    }

    fn holds(&self, kind: ConditionKind) -> bool {
        self.condition(kind).is_some_and(|one| one.holds)
    }

    /// The one word, derived from the conditions.
    #[must_use]
    pub fn phase(&self) -> Phase {
        use ConditionKind as Kind;
        if self.holds(Kind::Completed) {
            Phase::Completed
        } else if self.holds(Kind::Failed) {
            Phase::Failed
        } else if self.holds(Kind::NodeLost) {
            Phase::Unknown
        } else if self.holds(Kind::Ready) {
            Phase::Running
        } else if !self.holds(Kind::Scheduled) {
            Phase::Pending
        } else if self.has_begun() {
            Phase::Starting
        } else {
            Phase::Scheduled
        }
    }

    /// The blade accepted the attempt: if it forgets it, nobody may boot it again.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.condition(ConditionKind::Booted)
            .is_some_and(|one| one.holds || one.reason == PREPARING)
    }

    /// The microVM is up: it is no longer one of the blade's starts.
    #[must_use]
    pub fn is_booted(&self) -> bool {
        self.condition(ConditionKind::Booted).is_some_and(|one| one.holds)
    }

    /// Completed or Failed.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self.phase(), Phase::Completed | Phase::Failed)
    }

    /// Its attempt is ended, or about to be, because the agent is suspended.
    #[must_use]
    pub fn is_suspending(&self) -> bool {
        self.node.is_some()
            && self
                .condition(ConditionKind::Scheduled)
                .is_some_and(|one| one.reason == SUSPENDED)
    }

    /// It is told that the agent is suspended.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        self.node.is_none()
            && self
                .condition(ConditionKind::Scheduled)
                .is_some_and(|one| one.reason == SUSPENDED)
    }

    /// [`Self::follow`] for an agent that is never tried again.
    #[must_use]
    pub fn after(&self, fact: &Fact<'_>) -> Self {
        self.follow(fact, &Rules::default())
    }

    /// The status after `fact`, for an agent with these rules. Pure; a final status stays as it is.
    #[must_use]
    pub fn follow(&self, fact: &Fact<'_>, rules: &Rules) -> Self {
        use ConditionKind as Kind;
        let mut next = self.clone();
        if self.is_final() {
            return next;
        }
        match fact {
            Fact::Unschedulable(message) => {
                next.node = None;
                next.set(Kind::Scheduled, false, "Unschedulable", message);
                next.why("Unschedulable", message);
            }
            Fact::Placed { blade } => {
                next = Self {
                    attempt: self.attempt.saturating_add(1),
                    node: Some((*blade).to_owned()),
                    active_since: self.active_since.or_else(|| Some(rules.now())),
                    ..self.between_attempts()
                };
                next.set(Kind::Scheduled, true, "Placed", &format!("placed on blade {blade}"));
            }
            Fact::Claiming { blade, claim } => {
                next = self.after(&Fact::Placed { blade });
                next.claimed = Some((*claim).clone());
            }
            Fact::Refused { message } => {
                next = self.between_attempts();
                next.set(Kind::Scheduled, false, "Refused", message);
                next.why("Refused", message);
            }
            Fact::Waiting { reason, message } => {
                if !self.has_begun() {
                    next.set(Kind::Booted, false, reason, message);
                    next.why(reason, message);
                }
            }
            Fact::Rejected { message } => {
                next.set(Kind::Booted, false, "Rejected", message);
                next.end(EndReason::Error, message);
            }
            Fact::Forgotten => next.conclude(
                EndReason::NodeLost,
                "the blade no longer knows this attempt, which it had begun; it is not booted a second time",
                rules,
            ),
            Fact::Fenced { message } => next.conclude(EndReason::NodeLost, message, rules),
            Fact::Suspended if self.node.is_some() => {
                next.set(
                    Kind::Scheduled,
                    true,
                    SUSPENDED,
                    "the attempt is ended because spec.suspend is true",
                );
            }
            Fact::Suspended => {
                next.set(Kind::Scheduled, false, SUSPENDED, "spec.suspend is true");
                next.why(SUSPENDED, "spec.suspend is true");
            }
            Fact::DeadlinePassed => {
                next.node = None;
                let limit = rules.deadline_s.unwrap_or(0);
                next.end(
                    EndReason::DeadlineExceeded,
                    &format!("spec.activeDeadlineSeconds ({limit} s) passed while no attempt ran"),
                );
            }
            Fact::SleepRefused { reason, message } => next.set(Kind::Sleeping, false, reason, message),
            Fact::NotToSleep => next.conditions.retain(|one| one.kind != Kind::Sleeping),
            Fact::BladeLost { message } => {
                next.set(Kind::NodeLost, true, "NodeLost", message);
                next.why("NodeLost", message);
            }
            Fact::Seen(report) => next.learn(report, rules),
        }
        next
    }

    /// What stays when an attempt is over and the next one is not there yet.
    fn between_attempts(&self) -> Self {
        Self {
            attempt: self.attempt,
            restarts: self.restarts,
            counts: self.counts,
            active_since: self.active_since,
            last_attempt: self.last_attempt.clone(),
            ..Self::default()
        }
    }

    fn learn(&mut self, report: &Report, rules: &Rules) {
        use ConditionKind as Kind;
        if report.attempt != self.attempt {
            return;
        }
        self.conditions.retain(|one| one.kind != Kind::NodeLost);
        (self.reason, self.message) = (None, Some(report.message.clone()).filter(|text| !text.is_empty()));
        if !report.image_digest.is_empty() {
            self.image_digest = Some(report.image_digest.clone());
            self.set(Kind::ImageReady, true, "Resolved", "");
        }
        if report.resources.is_some() {
            self.resources.clone_from(&report.resources);
        }
        self.started_at = report.started_at.or(self.started_at);
        if report.booted {
            self.set(Kind::Booted, true, "Booted", "");
        } else if !self.holds(Kind::Booted) {
            self.set(Kind::Booted, false, PREPARING, "");
        }
        match (report.stage, &report.end) {
            (Stage::Running, _) => self.set(Kind::Ready, true, "Started", ""),
            (Stage::Warm, _) => self.set(Kind::Ready, false, "Warm", "waits to be claimed"),
            (Stage::Ended, Some(end)) => self.finish(report, end, rules),
            // An end without its description is no end that could be told; the next report brings it.
            (Stage::Ended, None) | (Stage::Accepted | Stage::Preparing | Stage::Starting | Stage::Stopping, _) => {}
        }
    }

    fn finish(&mut self, report: &Report, end: &End, rules: &Rules) {
        use ConditionKind as Kind;
        self.finished_at = report.finished_at;
        (self.exit_code, self.signal) = (end.exit_code, end.signal);
        self.tail = Some(end.tail.clone()).filter(|text| !text.is_empty());
        if end.reason == EndReason::ImageError && self.image_digest.is_none() {
            self.set(Kind::ImageReady, false, "ImageError", &end.message);
        }
        if !report.booted {
            self.set(Kind::Booted, false, end.reason.as_str(), &end.message);
        }
        // A blade that says "Completed" must have an exit report with code 0; anything else is told as what it is.
        let (reason, message) = match (end.reason, end.exit_code) {
            (EndReason::Completed, Some(0)) => (EndReason::Completed, end.message.clone()),
            (EndReason::Completed, Some(code)) => {
                (EndReason::Error, format!("the program ended with exit code {code}"))
            }
            (EndReason::Completed, None) => (
                EndReason::InitLost,
                "the microVM ended without an exit report".to_owned(),
            ),
            (reason, _) => (reason, end.message.clone()),
        };
        self.conclude(reason, &message, rules);
    }

    /// The attempt has ended: so has the agent, or it waits for the next attempt.
    fn conclude(&mut self, reason: EndReason, message: &str, rules: &Rules) {
        if reason == EndReason::Evicted && self.is_suspending() {
            // As if it had never been placed; the deadline begins anew, as for Jobs.
            let last = self.as_last(reason, message);
            *self = Self {
                active_since: None,
                last_attempt: Some(last),
                ..self.between_attempts()
            };
            self.set(ConditionKind::Scheduled, false, SUSPENDED, "spec.suspend is true");
            self.why(SUSPENDED, "spec.suspend is true");
            return;
        }
        match verdict(reason, self.started_at.is_some(), self.counts, self.active_since, rules) {
            Verdict::Final(None) => self.end(reason, message),
            Verdict::Final(Some(limit)) => self.end(reason, &format!("{message}; {limit}")),
            Verdict::Again { counts, at } => self.go_on(reason, message, counts, at),
        }
    }

    fn go_on(&mut self, reason: EndReason, message: &str, counts: Counts, at: i64) {
        let text = format!(
            "attempt {} ended with {}: {message}; another follows",
            self.attempt,
            reason.as_str()
        );
        *self = Self {
            // Of an attempt that no blade spoke of nothing is known to have begun.
            restarts: self.restarts + u32::from(self.condition(ConditionKind::Booted).is_some()),
            counts,
            next_attempt_at: Some(at),
            last_attempt: Some(self.as_last(reason, message)),
            ..self.between_attempts()
        };
        self.set(ConditionKind::Scheduled, false, RETRYING, &text);
        self.why(RETRYING, &text);
    }

    fn as_last(&self, reason: EndReason, message: &str) -> LastAttempt {
        LastAttempt {
            attempt: self.attempt,
            node: self.node.clone(),
            reason: reason.as_str().to_owned(),
            message: bounded(message),
            exit_code: self.exit_code,
            signal: self.signal,
            finished_at: self.finished_at,
            tail: self.tail.clone(),
        }
    }

    fn end(&mut self, reason: EndReason, message: &str) {
        use ConditionKind as Kind;
        self.conditions.retain(|one| one.kind != Kind::NodeLost);
        if self.condition(Kind::Ready).is_some() {
            self.set(Kind::Ready, false, "Ended", "");
        }
        let kind = if reason == EndReason::Completed {
            Kind::Completed
        } else {
            Kind::Failed
        };
        self.set(kind, true, reason.as_str(), message);
        self.why(reason.as_str(), message);
    }

    fn why(&mut self, reason: &str, message: &str) {
        self.reason = Some(reason.to_owned());
        self.message = Some(bounded(message)).filter(|text| !text.is_empty());
    }

    fn set(&mut self, kind: ConditionKind, holds: bool, reason: &str, message: &str) {
        let condition = Condition {
            kind,
            holds,
            reason: reason.to_owned(),
            message: bounded(message),
        };
        match self.conditions.binary_search_by_key(&kind, |one| one.kind) {
            Ok(index) => self.conditions[index] = condition,
            Err(index) => self.conditions.insert(index, condition),
        }
    }
}

/// A longer one the API would refuse, and with it the whole status.
fn bounded(message: &str) -> String {
    cut(message.to_owned(), MAX_MESSAGE)
}

/// Reason of Booted while the blade works towards it.
const PREPARING: &str = "Preparing";
/// Reason of Scheduled while `spec.suspend` keeps the agent from a blade.
const SUSPENDED: &str = "Suspended";
/// Reason of Scheduled between two attempts.
const RETRYING: &str = "Retrying";

#[cfg(test)]
mod tests;
