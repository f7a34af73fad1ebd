//! What a queue does next with its tasks. Pure.
//!
//! ```text
//! Pending ─► Running ─► Succeeded
//!    ▲          │ failed
//!    └─ wait ◄──┴─► Dead (tried as often as the queue allows)
//! ```
//! Invariant: no more agents than the queue's parallelism. Invariant: each try of a task has one agent, named after it.

use std::cmp::Reverse;

/// Longest wait between two tries, seconds: that of a Job.
const MAX_BACKOFF_S: u64 = 360;

/// Bounds of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Most agents at a time.
    pub parallelism: u32,
    /// Tries of one task.
    pub max_attempts: u32,
    /// No task is begun.
    pub suspended: bool,
}

/// Where a task stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The words of the API; their texts are in far-api.
pub enum Phase {
    #[default]
    Pending,
    Running,
    Succeeded,
    Dead,
}

/// What is known of the agent of a try.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Agent {
    /// There is none.
    #[default]
    Absent,
    /// It has not ended.
    Lives,
    /// It ended with exit code 0.
    Completed,
    /// It ended otherwise.
    Failed(Failure),
}

/// How a try failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    /// Only where one was reported.
    pub exit_code: Option<i32>,
    /// One word.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

/// One task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Task {
    /// Its name.
    pub name: String,
    /// Greater goes first.
    pub priority: i32,
    /// Seconds since the Unix epoch.
    pub created: i64,
    /// It was told to go.
    pub deleting: bool,
    /// Where it stands.
    pub phase: Phase,
    /// Why it waits or what its last try ended with, as it is written down.
    pub reason: String,
    /// Tries that were begun.
    pub attempts: u32,
    /// Not before this second.
    pub retry_at: Option<i64>,
    /// When it succeeded or died.
    pub finished_at: Option<i64>,
    /// Seconds to keep it after that.
    pub ttl_s: Option<u32>,
    /// Agent of try `attempts`, while it runs.
    pub agent: Agent,
    /// Agent of the next try: it was made, and that it was is not written down yet.
    pub next_agent: Agent,
}

/// What to do with one task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the agent of this try (again: it is the same one), then write that down.
    Begin {
        /// 1 and up.
        attempt: u32,
    },
    /// Write down that it succeeded.
    Succeed,
    /// Write down that it failed, and when it is tried again.
    Retry {
        /// How.
        failure: Failure,
        /// Seconds since the Unix epoch.
        at: i64,
    },
    /// Write down that it failed for the last time.
    Die {
        /// How.
        failure: Failure,
    },
    /// Write down why it waits.
    Wait {
        /// One word.
        reason: &'static str,
        /// A sentence.
        message: &'static str,
    },
    /// It lay long enough.
    Remove,
}

/// Steps, and numbers for the queue's status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Index of the task and what to do with it. What is done already is not in it.
    pub steps: Vec<(usize, Step)>,
    /// When time alone asks for another look.
    pub look_at: Option<i64>,
    /// Tasks that wait.
    pub pending: u32,
    /// Tasks that have an agent.
    pub running: u32,
    /// Tasks that succeeded.
    pub succeeded: u32,
    /// Dead letters.
    pub dead: u32,
}

/// Next steps of a queue (`None`: it does not exist) at `now`, seconds since the Unix epoch. `first_backoff_s`: between the
/// first and the second try; doubled with each further one.
#[must_use]
pub fn plan(queue: Option<Queue>, tasks: &[Task], now: i64, first_backoff_s: u64) -> Plan {
    let mut plan = Plan::default();
    let mut waiting = Vec::new();
    for (index, task) in tasks.iter().enumerate() {
        plan.count(task.phase);
        if task.deleting {
            continue;
        }
        match task.phase {
            Phase::Succeeded | Phase::Dead => plan.keep_for_its_time(index, task, now),
            Phase::Running => plan
                .steps
                .extend(after_try(queue, task, now, first_backoff_s).map(|step| (index, step))),
            Phase::Pending => waiting.push(index),
        }
    }
    let Some(queue) = queue else {
        for index in waiting {
            plan.wait(index, &tasks[index], "QueueMissing", "the queue does not exist");
        }
        return plan;
    };
    // Those whose agent was made already hold their place, whatever else changed.
    waiting.sort_by_key(|&index| {
        let task = &tasks[index];
        (
            task.next_agent == Agent::Absent,
            Reverse(task.priority),
            task.created,
            &task.name,
        )
    });
    let mut free = queue.parallelism.saturating_sub(plan.running);
    for index in waiting {
        let task = &tasks[index];
        let attempt = task.attempts.saturating_add(1);
        let has_time = task.retry_at.is_none_or(|at| at <= now);
        if task.next_agent != Agent::Absent || (free > 0 && has_time && !queue.suspended) {
            plan.steps.push((index, Step::Begin { attempt }));
            free = free.saturating_sub(1);
        } else if queue.suspended {
            plan.wait(index, task, "Suspended", "spec.suspend of the queue is true");
        } else if let Some(at) = task.retry_at.filter(|_| !has_time) {
            plan.look_at(at);
        } else if task.attempts == 0 {
            plan.wait(index, task, "Queued", "waits for its turn");
        }
    }
    plan
}

impl Plan {
    fn count(&mut self, phase: Phase) {
        *match phase {
            Phase::Succeeded => &mut self.succeeded,
            Phase::Dead => &mut self.dead,
            Phase::Running => &mut self.running,
            Phase::Pending => &mut self.pending,
        } += 1;
    }

    fn look_at(&mut self, at: i64) {
        self.look_at = Some(self.look_at.map_or(at, |known| known.min(at)));
    }

    fn wait(&mut self, index: usize, task: &Task, reason: &'static str, message: &'static str) {
        if task.reason != reason {
            self.steps.push((index, Step::Wait { reason, message }));
        }
    }

    fn keep_for_its_time(&mut self, index: usize, task: &Task, now: i64) {
        if let (Some(ttl), Some(finished)) = (task.ttl_s, task.finished_at) {
            let at = finished.saturating_add(ttl.into());
            if at <= now {
                self.steps.push((index, Step::Remove));
            } else {
                self.look_at(at);
            }
        }
    }
}

fn after_try(queue: Option<Queue>, task: &Task, now: i64, first_backoff_s: u64) -> Option<Step> {
    let failure = match &task.agent {
        Agent::Lives => return None,
        Agent::Completed => return Some(Step::Succeed),
        Agent::Failed(failure) => failure.clone(),
        Agent::Absent => Failure {
            exit_code: None,
            reason: "AgentDeleted".to_owned(),
            message: "the agent of this try was removed before it ended".to_owned(),
        },
    };
    // Without its queue nobody says how often: that is asked once the queue is back.
    let most = queue.map_or(u32::MAX, |queue| queue.max_attempts);
    if task.attempts >= most {
        return Some(Step::Die { failure });
    }
    let wait = backoff_s(task.attempts, first_backoff_s);
    let at = now.saturating_add(i64::try_from(wait).unwrap_or(i64::MAX));
    Some(Step::Retry { failure, at })
}

/// Seconds between try `attempts` and the next.
#[must_use]
pub fn backoff_s(attempts: u32, first_s: u64) -> u64 {
    let doubled = attempts.saturating_sub(1).min(32);
    first_s.saturating_mul(1_u64 << doubled).min(MAX_BACKOFF_S.max(first_s))
}

#[cfg(test)]
mod tests;
