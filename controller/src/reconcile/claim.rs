//! An agent takes over a warm one of its pool: promise, intent, ClaimAgent, and the warm agent goes.
//!
//! Invariant: the claim is in the status, with resourceVersion, before the blade is called; so after a crash the same claim
//! is made again, and the blade's ledger makes it the same one.

use far_core::status::{Claim, Fact, Report, Status};
use far_proto::node::{AgentSpec, Identity};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Preconditions},
    runtime::events::EventType,
};

use super::{Next, Pass, ReconcileError};
use crate::calls::{Blade, CallError};

impl Pass<'_> {
    /// Writes down that the agent takes over a warm one; `None`: there is none for it.
    pub(super) async fn take_over(&mut self, status: &Status) -> Result<Option<Next>, ReconcileError> {
        let Some((blade, claim)) = self.context.world.take_warm(&self.agent) else {
            return Ok(None);
        };
        let fact = Fact::Claiming {
            blade: &blade,
            claim: &claim,
        };
        let written = self.learn(status, &fact).await;
        if written.is_err() {
            self.context.world.give_warm_back(&self.uid);
        }
        written?;
        let note = format!("takes over warm agent {} on blade {blade}", claim.name);
        self.context
            .events
            .say(&self.agent, EventType::Normal, "Scheduled", &note);
        Ok(Some(Self::placed()))
    }

    /// Says that an agent with a pool boots all the same.
    pub(super) async fn say_cold(&self) {
        if let Some(pool) = &self.agent.spec.pool_ref {
            let note = format!("pool {} has no warm agent that fits: booting", pool.name);
            let events = &self.context.events;
            events.say(&self.agent, EventType::Normal, "ColdStart", &note);
        }
    }

    /// Makes sure the blade has the attempt: booted, or in the warm agent's microVM.
    pub(super) async fn ensure_on(
        &self,
        status: &Status,
        mut blade: Blade,
        identity: Identity,
        spec: AgentSpec,
    ) -> Result<Option<Report>, CallError> {
        let Some(claim) = &status.claimed else {
            return blade.ensure(identity, spec).await;
        };
        let warm = Identity {
            uid: claim.uid.clone(),
            attempt: claim.attempt,
            namespace: self.agent.namespace().unwrap_or_default(),
            name: claim.name.clone(),
        };
        blade.claim(warm, identity, spec).await
    }

    /// Once the blade has the attempt, the warm agent has nothing any more and goes.
    pub(super) async fn note_claim(&self, status: &Status, report: Option<&Report>) {
        let (Some(claim), Some(report)) = (&status.claimed, report) else {
            return;
        };
        let is_done = report.attempt == status.attempt && !report.is_withdrawn();
        if is_done && self.context.world.warm_claimed(&claim.uid) {
            self.remove_warm(claim).await;
        }
    }

    /// It has no microVM any more. Its pool removes it too, should this fail.
    async fn remove_warm(&self, claim: &Claim) {
        let api: Api<far_api::FarAgent> =
            Api::namespaced(self.context.client.clone(), &self.agent.namespace().unwrap_or_default());
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(claim.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match api.delete(&claim.name, &params).await {
            Ok(_) => {}
            Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => {}
            Err(error) => {
                tracing::warn!(agent.name = claim.name, %error, "a claimed warm agent was not removed: its pool will");
                self.context.world.warm_left(&claim.uid);
            }
        }
    }
}
