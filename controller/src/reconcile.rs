//! One pass over one agent: look, decide (far-core), act, write down what may be claimed. Level, not edge: a lost event
//! costs one recheck, and a failed act is tried again.
//!
//! Invariant: the intent (blade, attempt) is written with resourceVersion, and then the finalizer, before a blade is called.
//! Whoever is deleted, or has to leave, in between is let go at once, and no blade has heard of it.

mod claim;
mod ends;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use far_api::{FINALIZER, FarAgent};
use far_core::{
    lifecycle::{BladeView, Decision, Seen, decide},
    placement::Cause,
    retry::Rules,
    status::{Fact, Phase, Report, Status},
};
use far_proto::node::{EndReason, Identity};
use k8s_openapi::jiff::Timestamp;
use kube::{Client, ResourceExt, runtime::events::EventType};
use tokio_util::sync::CancellationToken;

use crate::{
    agent_spec::{self, SpecError},
    calls::{Blade, CallError},
    convert,
    events::Events,
    leader::Doubts,
    pace::Pace,
    queue::Action,
    rules, status_writer,
    turns::Turns,
    world::{Teller, View, World},
};

/// Steps of one pass: place, ensure, tell and their like. More than these means that something turns in a circle.
const MAX_STEPS: usize = 8;
/// A safety net where a change should wake the agent anyway.
const RECHECK: Duration = Duration::from_secs(60);
/// While waiting for a blade to come back, for a missing Secret, or for room after a refusal.
const WAITING: Duration = Duration::from_secs(3);
/// After a failed call or write.
const RETRY: Duration = Duration::from_secs(1);

/// Everything a pass needs.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) world: Arc<World>,
    pub(crate) events: Arc<Events>,
    pub(crate) epoch: u64,
    /// Cancelled when another controller leads.
    pub(crate) deposed: CancellationToken,
    pub(crate) doubts: Arc<Doubts>,
    /// Cancelled once agents and blades are listed completely: before that, reservations are not complete either.
    pub(crate) agents_known: CancellationToken,
    pub(crate) nodes_known: CancellationToken,
    /// From the first failure of an agent until its next attempt.
    pub(crate) first_delay: Duration,
    pub(crate) pace: Pace,
    pub(crate) turns: Arc<Turns>,
}

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error("{operation} of FarAgent {agent}")]
    Api {
        operation: &'static str,
        agent: String,
        source: Box<kube::Error>,
    },
    #[error("{operation} of FarAgent {agent} on blade {blade}")]
    Blade {
        operation: &'static str,
        agent: String,
        blade: String,
        source: CallError,
    },
    #[error("FarAgent {agent} does not come to rest after {MAX_STEPS} steps")]
    Restless { agent: String },
}

impl ReconcileError {
    /// Somebody wrote in between: the watch brings it, and the next pass looks again.
    fn is_conflict(&self) -> bool {
        self.code() == Some(409) || self.is_not_found()
    }

    /// The agent that was to be written is gone.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    fn code(&self) -> Option<u16> {
        match self {
            Self::Api { source, .. } => match &**source {
                kube::Error::Api(error) => Some(error.code),
                _ => None,
            },
            Self::Blade { .. } | Self::Restless { .. } => None,
        }
    }
}

/// What to do after a failed pass.
pub(crate) fn on_error(agent: Arc<FarAgent>, error: &ReconcileError, _: Arc<Context>) -> Action {
    if error.is_conflict() {
        return Action::requeue(RETRY / 10);
    }
    let chain = std::error::Error::source(error)
        .map(ToString::to_string)
        .unwrap_or_default();
    tracing::warn!(agent.namespace = agent.namespace(), agent.name = agent.name_any(), %error, cause = chain, "trying again");
    Action::requeue(RETRY.mul_f64(rand::random_range(0.5..1.5)))
}

/// One pass.
pub(crate) async fn reconcile(agent: Arc<FarAgent>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    context.agents_known.cancelled().await;
    context.nodes_known.cancelled().await;
    if context.deposed.is_cancelled() {
        return Ok(Action::await_change());
    }
    let mut pass = Pass {
        context: &context,
        uid: agent.uid().unwrap_or_default(),
        agent: context.world.newest(agent),
    };
    for _ in 0..MAX_STEPS {
        match pass.step().await {
            Ok(Next::Again) => {}
            Ok(Next::Rest(action)) => return Ok(action),
            Err(error) => {
                if let ReconcileError::Blade {
                    blade,
                    source: CallError::Deposed(_),
                    ..
                } = &error
                    && !context.doubts.is_deposed().await
                {
                    context.world.distrust(blade);
                }
                return Err(error);
            }
        }
    }
    Err(ReconcileError::Restless { agent: pass.name() })
}

enum Next {
    /// Something was done that may allow the next step.
    Again,
    Rest(Action),
}

struct Pass<'a> {
    context: &'a Context,
    uid: String,
    agent: Arc<FarAgent>,
}

impl Pass<'_> {
    fn name(&self) -> String {
        format!(
            "{}/{}",
            self.agent.namespace().unwrap_or_default(),
            self.agent.name_any()
        )
    }

    fn status(&self) -> Status {
        convert::status_from_api(self.agent.status.as_ref())
    }

    fn rules(&self) -> Rules {
        rules::rules(&self.agent, self.context.first_delay)
    }

    fn is_held(&self) -> bool {
        self.agent.finalizers().iter().any(|one| one == FINALIZER)
    }

    async fn step(&mut self) -> Result<Next, ReconcileError> {
        let status = self.status();
        let View {
            blade,
            report,
            leaves_at,
        } = self
            .context
            .world
            .view(&self.uid, &status, &rules::patience(&self.agent));
        let rules = rules::rules(&self.agent, self.context.first_delay);
        self.note_claim(&status, report.as_ref()).await;
        let seen = Seen {
            status: &status,
            deleting: self.agent.metadata.deletion_timestamp.is_some(),
            held: self.is_held(),
            blade,
            report: report.as_ref(),
            rules: &rules,
            wanted: rules::wanted(&self.agent),
            must_leave: leaves_at.is_some_and(|at| at <= Instant::now()),
            final_since: rules::final_since(&self.agent),
        };
        let next = self.act(&seen).await?;
        // Time alone makes it leave.
        Ok(match (next, leaves_at) {
            (Next::Rest(action), Some(at)) if !seen.must_leave && !status.is_final() => {
                let left = at.saturating_duration_since(Instant::now());
                Next::Rest(action.at_latest(left.clamp(Duration::from_millis(20), RECHECK)))
            }
            (next, _) => next,
        })
    }

    async fn act(&mut self, seen: &Seen<'_>) -> Result<Next, ReconcileError> {
        let (status, report) = (seen.status, seen.report);
        match decide(seen) {
            Decision::Rest => Ok(Next::Rest(rest(seen))),
            Decision::Place => self.place(status).await,
            Decision::Ensure => self.ensure(status).await,
            Decision::Tell => match report {
                // An unreachable blade is lost by time alone.
                Some(report) if seen.blade == BladeView::Unreachable => match self.tell(status, report).await? {
                    Next::Rest(_) => Ok(Next::Rest(Action::requeue(WAITING))),
                    Next::Again => Ok(Next::Again),
                },
                Some(report) => self.tell(status, report).await,
                None => Ok(Next::Rest(Action::requeue(RECHECK))),
            },
            Decision::DeclareForgotten => self.declare_forgotten(status).await,
            Decision::DeclareLost => {
                let blade = status.node.clone().unwrap_or_default();
                let message =
                    format!("blade {blade} is not heard of or cannot be called; the agent may still run there");
                self.learn(status, &Fact::BladeLost { message: &message }).await?;
                // Time alone makes it fenced.
                Ok(Next::Rest(Action::requeue(WAITING)))
            }
            Decision::DeclareFenced => self.declare_fenced(status).await,
            Decision::DeclareSuspended => self.learn(status, &Fact::Suspended).await,
            Decision::DeclareDeadline => self.learn(status, &Fact::DeadlinePassed).await,
            Decision::WaitUntil(at) => Ok(Self::at(at)),
            // No blade has heard of it, and the write is guarded against a finalizer that comes in between.
            Decision::Evict if !seen.held && report.is_none() => {
                let blade = status.node.clone().unwrap_or_default();
                let message = format!("taken back before blade {blade} heard of it");
                self.place_anew(status, &blade, &message).await
            }
            Decision::Evict => self.evict(status).await,
            Decision::Sleep => self.sleep(status).await,
            Decision::Wake => self.wake(status).await,
            Decision::Delete => self.delete_expired().await,
            Decision::PlaceAnew => {
                let blade = status.node.clone().unwrap_or_default();
                let message = format!("blade {blade} refused: the attempt was withdrawn before it began");
                self.place_anew(status, &blade, &message).await
            }
            Decision::Stop => self.stop(status).await,
            Decision::ForgetAndRelease => self.forget_and_release(status).await,
            Decision::Release => self.release().await,
            Decision::ReleaseUnconfirmed => {
                let blade = status.node.clone().unwrap_or_default();
                let note = format!(
                    "blade {blade} was not reached for the whole fence time: released without its confirmation"
                );
                self.context
                    .events
                    .say(&self.agent, EventType::Warning, "ReleasedUnconfirmed", &note);
                self.release().await
            }
        }
    }

    async fn place(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let world = &self.context.world;
        let request = match convert::request(&self.agent) {
            Ok(request) => request,
            Err(message) => return self.learn(status, &Fact::Rejected { message: &message }).await,
        };
        if let Some(next) = self.take_over(status).await? {
            return Ok(next);
        }
        match world.place(&self.uid, &request) {
            Err(unschedulable) if unschedulable.causes.contains_key(&Cause::Unreachable) && world.is_settling() => {
                tracing::debug!(uid = self.uid, %unschedulable, "waiting for a blade's connection");
                Ok(Next::Rest(Action::requeue(WAITING)))
            }
            Err(unschedulable) => {
                let message = unschedulable.to_string();
                let written = self.learn(status, &Fact::Unschedulable(&message)).await;
                self.context
                    .events
                    .say(&self.agent, EventType::Warning, "FailedScheduling", &message);
                written?;
                // It stands in line and hears of whatever may help it; its deadline comes by time alone, and so does a
                // newer text of what keeps it away.
                let left = self.rules().deadline_left(status.active_since);
                let left = left.and_then(|left| u64::try_from(left).ok()).map(Duration::from_secs);
                let recheck = world.until_next_search().mul_f64(rand::random_range(0.8..1.2));
                Ok(Next::Rest(Action::requeue(left.unwrap_or(recheck).min(recheck))))
            }
            Ok(blade) => {
                let placed = self.learn(status, &Fact::Placed { blade: &blade }).await;
                if placed.is_err() {
                    world.unplace(&self.uid, None);
                }
                placed?;
                let note = format!("placed on blade {blade}");
                self.context
                    .events
                    .say(&self.agent, EventType::Normal, "Scheduled", &note);
                self.say_cold().await;
                Ok(Self::placed())
            }
        }
    }

    /// Others that wait for a blade come first: theirs is a matter of milliseconds, a start is not.
    fn placed() -> Next {
        Next::Rest(Action::requeue(Duration::ZERO))
    }

    /// From the finalizer on the blade may have it.
    async fn hold(&mut self) -> Result<(), ReconcileError> {
        let hold = status_writer::hold(&self.context.client, &self.agent, true);
        let held = self.context.turns.take(hold).await;
        let agent = held.map_err(|source| self.api_error("adding the finalizer", source))?;
        self.context.world.observe(&agent, Teller::Write);
        self.agent = Arc::new(agent);
        Ok(())
    }

    async fn ensure(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let context = self.context;
        let (Some(blade), Some(identity)) = (status.node.clone(), self.identity(status)) else {
            return Ok(Next::Rest(Action::requeue(RECHECK)));
        };
        let Some(channel) = context.world.channel(&blade) else {
            return Ok(Next::Rest(Action::requeue(WAITING)));
        };
        let namespace = self.agent.namespace().unwrap_or_default();
        let spec = match agent_spec::resolve(&context.client, &namespace, &self.agent, &self.rules()).await {
            Ok(spec) => spec,
            Err(error @ SpecError::Missing { .. }) => {
                let message = error.to_string();
                let fact = Fact::Waiting {
                    reason: "ReferenceMissing",
                    message: &message,
                };
                self.learn(status, &fact).await?;
                context
                    .events
                    .say(&self.agent, EventType::Warning, "ReferenceMissing", &message);
                return Ok(Next::Rest(Action::requeue(WAITING)));
            }
            Err(SpecError::Invalid(message)) => return self.learn(status, &Fact::Rejected { message: &message }).await,
            Err(SpecError::Read { source, .. }) => return Err(self.api_error("reading the references", *source)),
        };
        if !self.is_held() {
            self.hold().await?;
        }
        let calls = Blade::new(channel, context.epoch);
        match self.ensure_on(status, calls, identity, spec).await {
            Ok(Some(report)) => {
                context.world.told(&blade, &self.uid, report);
                Ok(Next::Again)
            }
            Ok(None) => Ok(Next::Rest(Action::requeue(WAITING))),
            Err(CallError::Refused(message)) => self.refused(status, &blade, &message).await,
            Err(CallError::Rejected(message)) => {
                let message = format!("blade {blade}: {message}");
                self.learn(status, &Fact::Rejected { message: &message }).await
            }
            Err(source) => Err(self.blade_error("starting the attempt", &blade, source)),
        }
    }

    /// The answer may be a broken connection's, and the attempt in the blade's ledger. So the blade is asked; where it does
    /// not have the attempt, an order to stop makes an EnsureAgent that is still under way powerless. Only then another
    /// attempt may begin.
    async fn refused(&mut self, status: &Status, blade: &str, message: &str) -> Result<Next, ReconcileError> {
        let context = self.context;
        let (Some(channel), Some(identity)) = (context.world.channel(blade), self.identity(status)) else {
            return Ok(Next::Rest(Action::requeue(WAITING)));
        };
        let mut calls = Blade::new(channel, context.epoch);
        let known = calls.find(&self.uid, status.attempt).await;
        let known = known.map_err(|source| self.blade_error("looking for the attempt", blade, source))?;
        let state = match known {
            Some(report) => Some(report),
            None => {
                let stopped = calls.stop(identity, None, EndReason::Evicted).await;
                stopped.map_err(|source| self.blade_error("withdrawing the attempt", blade, source))?
            }
        };
        match state {
            Some(report) if report.is_withdrawn() => {
                self.place_anew(status, blade, &format!("blade {blade} refused: {message}"))
                    .await
            }
            // The blade has it, or it began in between: then it is this agent's attempt.
            Some(report) => {
                context.world.told(blade, &self.uid, report);
                Ok(Next::Again)
            }
            None => Ok(Next::Rest(Action::requeue(WAITING))),
        }
    }

    /// The blade will never boot the attempt. The room is given back only after that is written: until then the attempt is
    /// the blade's.
    async fn place_anew(&mut self, status: &Status, blade: &str, message: &str) -> Result<Next, ReconcileError> {
        let context = self.context;
        self.learn(status, &Fact::Refused { message }).await?;
        // A warm agent that was gone says nothing about the blade, and is not tried again.
        if let Some(claim) = &status.claimed {
            context.world.warm_refused(&self.uid, &claim.uid);
        }
        context
            .world
            .unplace(&self.uid, status.claimed.is_none().then_some(blade));
        context.events.say(&self.agent, EventType::Warning, "Refused", message);
        Ok(Next::Again)
    }

    async fn tell(&mut self, status: &Status, report: &Report) -> Result<Next, ReconcileError> {
        let next = status.follow(&Fact::Seen(report), &self.rules());
        if next == *status {
            return Ok(Next::Rest(Action::requeue(RECHECK)));
        }
        let since = self.context.world.since_written(&self.uid);
        if let Some(left) = since
            .and_then(|since| self.context.pace.between_writes().checked_sub(since))
            // An end is told at once.
            .filter(|_| !next.is_final() && next.node.is_some())
        {
            return Ok(Next::Rest(Action::requeue(left)));
        }
        self.learn(status, &Fact::Seen(report)).await
    }

    /// Writes what a fact changes, and says what people want to hear of it.
    async fn learn(&mut self, status: &Status, fact: &Fact<'_>) -> Result<Next, ReconcileError> {
        let next = status.follow(fact, &self.rules());
        if next == *status {
            return Ok(Next::Rest(Action::requeue(RECHECK)));
        }
        let generation = self.agent.metadata.generation.unwrap_or(0);
        let body = convert::status_to_api(&next, self.agent.status.as_ref(), generation, Timestamp::now());
        self.context.pace.count();
        let write = status_writer::write(&self.context.client, &self.agent, &body);
        let is_choice = matches!(fact, Fact::Placed { .. } | Fact::Claiming { .. });
        let leaves = next.is_final() || next.node.is_none();
        let gives_room = status.node.is_some() && (leaves || (next.is_booted() && !status.is_booted()));
        let written = if is_choice || (gives_room && self.context.world.is_waited_for()) {
            // Somebody waits for these: they wait for nobody.
            write.await
        } else {
            self.context.turns.take(write).await
        };
        let agent = Arc::new(written.map_err(|source| self.api_error("writing the status", source))?);
        self.context.world.observe(&agent, Teller::Write);
        self.agent = agent;
        self.announce(status, &next).await;
        Ok(Next::Again)
    }

    async fn announce(&self, status: &Status, next: &Status) {
        let (before, phase) = (status.phase(), next.phase());
        let events = &self.context.events;
        if next.restarts > status.restarts {
            let why = next.message.as_deref().unwrap_or_default();
            events.say(&self.agent, EventType::Warning, "Retrying", why);
        }
        if phase == before {
            return;
        }
        // A short life may be told in one write; that it started is still worth an event.
        if next.is_final() && before != Phase::Running && before != Phase::Unknown && next.started_at.is_some() {
            events.say(&self.agent, EventType::Normal, "Started", "the program runs");
        }
        let why = format!(
            "{}: {}",
            next.reason.as_deref().unwrap_or_default(),
            next.message.as_deref().unwrap_or_default()
        );
        match phase {
            Phase::Running => events.say(&self.agent, EventType::Normal, "Started", "the program runs"),
            Phase::Completed => events.say(&self.agent, EventType::Normal, "Completed", "ended with exit code 0"),
            Phase::Failed => events.say(&self.agent, EventType::Warning, "Failed", &why),
            Phase::Unknown => events.say(&self.agent, EventType::Warning, "NodeLost", &why),
            Phase::Pending | Phase::Scheduled | Phase::Starting | Phase::Sleeping => {}
        }
        tracing::info!(
            agent.namespace = self.agent.namespace(),
            agent.name = self.agent.name_any(),
            blade = next.node,
            ?phase,
            reason = next.reason,
            "the agent moved on"
        );
    }

    /// Final, so the blade is asked once more: an event may be on its way while a stream is opened again.
    async fn declare_forgotten(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let blade = status.node.clone().unwrap_or_default();
        let Some(channel) = self.context.world.channel(&blade) else {
            return Ok(Next::Rest(Action::requeue(WAITING)));
        };
        let known = Blade::new(channel, self.context.epoch)
            .find(&self.uid, status.attempt)
            .await;
        match known.map_err(|source| self.blade_error("looking for the attempt", &blade, source))? {
            Some(report) => {
                self.context.world.told(&blade, &self.uid, report);
                Ok(Next::Again)
            }
            None => self.learn(status, &Fact::Forgotten).await,
        }
    }

    async fn stop(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let (Some(blade), Some(identity)) = (status.node.clone(), self.identity(status)) else {
            return Ok(Next::Rest(Action::requeue(RECHECK)));
        };
        let Some(channel) = self.context.world.channel(&blade) else {
            return Ok(Next::Rest(Action::requeue(WAITING)));
        };
        let grace = self.agent.spec.termination_grace_period_seconds;
        let stopped = Blade::new(channel, self.context.epoch)
            .stop(identity, Some(grace), EndReason::Unspecified)
            .await;
        match stopped.map_err(|source| self.blade_error("stopping the attempt", &blade, source))? {
            Some(report) => self.context.world.told(&blade, &self.uid, report),
            None => return Ok(Next::Rest(Action::requeue(WAITING))),
        }
        Ok(Next::Again)
    }

    async fn forget_and_release(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let (Some(blade), Some(identity)) = (status.node.clone(), self.identity(status)) else {
            return Ok(Next::Rest(Action::requeue(RECHECK)));
        };
        let Some(channel) = self.context.world.channel(&blade) else {
            return Ok(Next::Rest(Action::requeue(WAITING)));
        };
        let forgotten = Blade::new(channel, self.context.epoch).forget(identity).await;
        forgotten.map_err(|source| self.blade_error("forgetting the attempt", &blade, source))?;
        self.release().await
    }

    async fn release(&mut self) -> Result<Next, ReconcileError> {
        let release = status_writer::hold(&self.context.client, &self.agent, false);
        match self.context.turns.take(release).await {
            Ok(_) => {}
            // It is gone, as it was to be.
            Err(kube::Error::Api(error)) if error.code == 404 => {}
            Err(source) => return Err(self.api_error("removing the finalizer", source)),
        }
        Ok(Next::Rest(Action::await_change()))
    }

    fn identity(&self, status: &Status) -> Option<Identity> {
        (status.attempt > 0).then(|| Identity {
            uid: self.uid.clone(),
            attempt: status.attempt,
            namespace: self.agent.namespace().unwrap_or_default(),
            name: self.agent.name_any(),
        })
    }

    fn api_error(&self, operation: &'static str, source: kube::Error) -> ReconcileError {
        ReconcileError::Api {
            operation,
            agent: self.name(),
            source: Box::new(source),
        }
    }

    fn blade_error(&self, operation: &'static str, blade: &str, source: CallError) -> ReconcileError {
        ReconcileError::Blade {
            operation,
            agent: self.name(),
            blade: blade.to_owned(),
            source,
        }
    }
}

/// When to look again although nothing changed.
fn rest(seen: &Seen<'_>) -> Action {
    match seen.blade {
        // Time alone turns these into something else.
        BladeView::Unreachable | BladeView::Lost if !seen.status.is_final() || seen.deleting => {
            Action::requeue(WAITING)
        }
        BladeView::Connected if seen.deleting => Action::requeue(WAITING),
        BladeView::Connected | BladeView::Unreachable | BladeView::Lost | BladeView::Fenced => Action::await_change(),
    }
}
