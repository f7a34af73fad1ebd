//! The steps that end an attempt before its time, or that follow its end.

use far_core::status::{Fact, Status};
use far_proto::node::EndReason;
use k8s_openapi::jiff::Timestamp;
use kube::{
    ResourceExt,
    api::{DeleteParams, Preconditions},
    runtime::events::EventType,
};

use super::{Next, Pass, RECHECK, ReconcileError, WAITING};
use crate::{
    calls::{Blade, CallError},
    queue::Action,
    status_writer,
};

impl Pass<'_> {
    /// Ends the attempt with reason Evicted; one that has not begun never will.
    pub(super) async fn evict(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let (Some(blade), Some(identity)) = (status.node.clone(), self.identity(status)) else {
            return Ok(Next::Rest(Action::requeue(RECHECK)));
        };
        let Some(channel) = self.context.world.channel(&blade) else {
            return Ok(Next::Rest(Action::requeue(WAITING)));
        };
        let grace = self.agent.spec.termination_grace_period_seconds;
        let stopped = Blade::new(channel, self.context.epoch)
            .stop(identity, Some(grace), EndReason::Evicted)
            .await;
        match stopped.map_err(|source| self.blade_error("evicting the attempt", &blade, source))? {
            Some(report) => {
                self.context.world.told(&blade, &self.uid, report);
                if status.has_begun() && !status.is_suspending() {
                    let note =
                        format!("has to leave blade {blade}: it is emptied, or has a taint that is not tolerated");
                    self.context
                        .events
                        .say(&self.agent, EventType::Warning, "Evicting", &note);
                }
                Ok(Next::Again)
            }
            None => Ok(Next::Rest(Action::requeue(WAITING))),
        }
    }

    /// The blade must have ended the attempt itself by now.
    pub(super) async fn declare_fenced(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let blade = status.node.clone().unwrap_or_default();
        let message = format!("blade {blade} was not heard of for the whole fence time: it has ended the agent by now");
        self.learn(status, &Fact::Fenced { message: &message }).await
    }

    /// Asks the blade once; one that cannot do it says so, and the agent runs on.
    pub(super) async fn sleep(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        let (Some(blade), Some(identity)) = (status.node.clone(), self.identity(status)) else {
            return Ok(Next::Rest(Action::requeue(RECHECK)));
        };
        let Some(channel) = self.context.world.channel(&blade) else {
            return Ok(Next::Rest(Action::requeue(WAITING)));
        };
        match Blade::new(channel, self.context.epoch).sleep(identity).await {
            Ok(report) => {
                if let Some(report) = report {
                    self.context.world.told(&blade, &self.uid, report);
                }
                Ok(Next::Rest(Action::requeue(RECHECK)))
            }
            Err(CallError::Rejected(message)) => {
                let message = format!("blade {blade} cannot lay microVMs to sleep, the agent runs on: {message}");
                let fact = Fact::SleepRefused {
                    reason: "NotSupported",
                    message: &message,
                };
                self.learn(status, &fact).await
            }
            Err(source) => Err(self.blade_error("laying the agent to sleep", &blade, source)),
        }
    }

    /// Wakes what sleeps. Where the blade had refused to let it sleep there is nothing to wake.
    pub(super) async fn wake(&mut self, status: &Status) -> Result<Next, ReconcileError> {
        use far_core::status::ConditionKind;
        let sleeps = status.condition(ConditionKind::Sleeping).is_some_and(|one| one.holds);
        if let (true, Some(blade), Some(identity)) = (sleeps, status.node.clone(), self.identity(status)) {
            let Some(channel) = self.context.world.channel(&blade) else {
                return Ok(Next::Rest(Action::requeue(WAITING)));
            };
            let woken = Blade::new(channel, self.context.epoch).resurrect(identity).await;
            let report = woken.map_err(|source| self.blade_error("waking the agent", &blade, source))?;
            if let Some(report) = report {
                self.context.world.told(&blade, &self.uid, report);
            }
        }
        self.learn(status, &Fact::NotToSleep).await
    }

    /// Deletes exactly this agent as it was seen: the finalizer then sees to its blade.
    pub(super) async fn delete_expired(&mut self) -> Result<Next, ReconcileError> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: self.agent.uid(),
                resource_version: self.agent.resource_version(),
            }),
            ..DeleteParams::default()
        };
        let api = status_writer::api(&self.context.client, &self.agent);
        match api.delete(&self.agent.name_any(), &params).await {
            Ok(_) => Ok(Next::Rest(Action::await_change())),
            Err(kube::Error::Api(error)) if error.code == 404 => Ok(Next::Rest(Action::await_change())),
            Err(source) => Err(self.api_error("deleting what ended long enough ago", source)),
        }
    }

    /// At a time of the controller's clock, in seconds.
    pub(super) fn at(at: i64) -> Next {
        let left = at
            .saturating_mul(1000)
            .saturating_sub(Timestamp::now().as_millisecond());
        let left = u64::try_from(left).unwrap_or(0).max(20);
        // A clock may jump: looked at again within a while, whatever it says now.
        Next::Rest(Action::requeue(
            std::time::Duration::from_millis(left).min(RECHECK * 10),
        ))
    }
}
