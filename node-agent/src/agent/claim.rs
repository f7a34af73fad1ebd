//! A warm VM changes hands: the task of the warm attempt becomes the claimant's.
//!
//! ```text
//! asked ─► does it fit, what is to be run ─► claimant's spec ─► claimant's record (fsync: this is the claim)
//!                                                                 ─► warm record ended ─► Config, files, Start
//! ```
//! A far-node that is killed before the claimant's record leaves a warm VM; one that is killed after it finds the claimant,
//! whose VM this is: the ledger ends the warm record when it loads, and the guest that dials again gets its Config.
//!
//! Invariant: only the task of the VM claims it, one claim after the other; so exactly one is done.

use super::{AgentTask, Blade, resolve};
use crate::{
    ledger::LedgerError,
    log_sink::LogSignal,
    outcome::Forced,
    pulse::Heartbeat,
    record::{EndReason, Fact, Phase, Record},
    spec::{Identity, InvalidField, Spec},
};
use std::sync::Arc;
use tokio::sync::watch;

/// Why a warm VM was not handed over; nothing was recorded.
#[derive(Debug, thiserror::Error)]
pub enum NotClaimed {
    /// Another may do.
    #[error("no warm agent to claim: {0}")]
    NotWarm(String),
    /// The specs do not fit together.
    #[error(transparent)]
    Unfit(#[from] InvalidField),
    /// The spec names something that the image does not have.
    #[error("{0}")]
    Rejected(String),
    /// Nothing can be recorded now.
    #[error("the ledger cannot be written")]
    Ledger(#[source] LedgerError),
}

impl AgentTask {
    /// Takes the VM over for another attempt. The same claim again is done already.
    pub(super) async fn claim(&mut self, identity: Identity, spec: Spec) -> Result<(), NotClaimed> {
        if self.record.identity.key == identity.key {
            return Ok(());
        }
        let (Phase::Warm, None, None, Some(warm_spec)) = (self.record.phase, self.killed_at, &self.forced, &self.spec)
        else {
            return Err(NotClaimed::NotWarm(format!(
                "attempt {} does not wait for one",
                self.record.identity.key
            )));
        };
        spec.check_fit(warm_spec)?;
        let blade = self.blade.clone();
        let (warm, wanted) = (self.record.clone(), (identity.clone(), spec.clone()));
        let prepared = tokio::task::spawn_blocking(move || {
            let (identity, spec) = wanted;
            let (image, mut launch) = resolve(&blade, &spec).map_err(refused)?;
            if warm.image_digest.as_ref() != Some(&image.digest) {
                let text = format!("image {} is another than the one it was booted from", spec.image);
                return Err(NotClaimed::NotWarm(text));
            }
            launch.nic = warm.launch.as_ref().and_then(|launch| launch.nic.clone());
            let claimant = warm.claimant(identity, &spec, launch, blade.clock.now());
            let kept = blade.ledger.write_spec(&claimant.name(), &spec.without_secrets());
            kept.map_err(NotClaimed::Ledger)?;
            Ok(claimant)
        });
        let fault = |_| NotClaimed::NotWarm("a fault in far-node; see its log".to_owned());
        let claimant = prepared.await.map_err(fault)??;
        let (blade, warm, at) = (self.blade.clone(), self.record.clone(), claimant.accepted_at);
        // Tried again until it is done: whether a failed write left the record on disk is not known, and another claimant
        // must not come between.
        self.keep(Arc::new(claimant)).await;
        self.spec = Some(spec);
        self.deliver().await;
        tracing::info!(vm.id = %self.record.vm_id, agent.namespace = %self.record.identity.namespace,
            agent.name = %self.record.identity.name, "a warm microVM is claimed");
        blade.metrics.claims.inc();
        blade.guests.forget(&warm.identity.key);
        let ended = tokio::task::spawn_blocking(move || end_warm(&blade, (*warm).clone(), at, identity));
        // A fault in there costs what the next start does again.
        let _ = ended.await;
        Ok(())
    }
}

/// The claim is on disk already: a warm record that cannot be written now is ended when the ledger is read again.
fn end_warm(blade: &Blade, mut warm: Record, at: u64, by: Identity) {
    if let Err(misfit) = warm.apply(Fact::Claimed { at, by }) {
        tracing::error!(vm.id = %warm.vm_id, error = %misfit, "a fact did not fit its record");
        return;
    }
    if let Err(error) = blade.ledger.write(&warm) {
        tracing::error!(vm.id = %warm.vm_id, error = ?error, "the end of a claimed record is not in the ledger yet");
    }
    let closed = watch::channel(LogSignal {
        rounds: 0,
        is_closed: true,
    });
    let name = warm.name();
    blade.board.publish(Arc::new(warm), Heartbeat::Regular, &closed.1);
    if let Err(error) = blade.ledger.remove_spec(&name) {
        tracing::warn!(vm.id = %name, %error, "the spec of a claimed attempt is left in the ledger");
    }
}

fn refused(why: Forced) -> NotClaimed {
    match why {
        Forced::Refused {
            reason: EndReason::ImageError,
            message,
        } => NotClaimed::NotWarm(message),
        Forced::Refused { message, .. } | Forced::BootTimeout { message } | Forced::InitLost { message } => {
            NotClaimed::Rejected(message)
        }
    }
}
