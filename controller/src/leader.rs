//! Leader election by a Lease: one controller works at a time, and its epoch goes on every call to a blade.
//!
//! ```text
//! follow ── expired, released, or ours from before ──► lead (epoch = leaseTransitions) ── not renewed in time ──► lost: end
//! ```
//! The epoch counts up at every acquisition, also by the same holder; blades refuse a smaller one than they have seen. A
//! controller whose state folder (locked) made the last claim takes over at once: its predecessor is gone for certain.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use far_api::SYSTEM_NAMESPACE;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio_util::sync::CancellationToken;

use crate::files;

const LEASE: &str = "far-controller";

/// Proof of being the only process with this state folder; released by the kernel when the process ends.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) identity: String,
    epoch_file: PathBuf,
    _lock: File,
}

impl Holder {
    /// The identity kept in the folder, with its lock.
    pub(crate) fn claim(state_dir: &Path) -> Result<Self> {
        files::private_folder(state_dir).with_context(|| format!("making {}", state_dir.display()))?;
        let path = state_dir.join("lock");
        let lock = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        if lock.try_lock().is_err() {
            bail!("another far-controller uses {}", state_dir.display());
        }
        let path = state_dir.join("holder");
        let identity = match std::fs::read_to_string(&path) {
            Ok(text) if !text.trim().is_empty() => text.trim().to_owned(),
            Ok(_) | Err(_) => {
                let identity = format!("far-controller-{}", hex::encode(rand::random::<[u8; 8]>()));
                files::write_private(&path, identity.as_bytes())
                    .with_context(|| format!("writing {}", path.display()))?;
                identity
            }
        };
        Ok(Self {
            identity,
            epoch_file: state_dir.join("epoch"),
            _lock: lock,
        })
    }
}

impl Holder {
    /// The newest epoch this folder's controllers had. Blades remember epochs; an API that lost its Lease does not.
    pub(crate) fn epoch(&self) -> i32 {
        std::fs::read_to_string(&self.epoch_file)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Keeps the epoch of a lead.
    pub(crate) fn keep_epoch(&self, epoch: u64) -> Result<()> {
        files::write_private(&self.epoch_file, epoch.to_string().as_bytes())
            .with_context(|| format!("writing {}", self.epoch_file.display()))
    }
}

/// The lead, as long as `lost` is not cancelled.
#[derive(Debug, Clone)]
pub(crate) struct Lead {
    pub(crate) epoch: u64,
    /// Cancelled when the lead may have gone to another.
    pub(crate) lost: CancellationToken,
    lease: Arc<Mutex<Lease>>,
    /// When the claim or renewal was sent that was answered last, and how long it holds.
    renewed: Arc<Mutex<Instant>>,
    duration: Duration,
}

impl Lead {
    /// Nobody else can lead yet: also true of a process that was stopped and has not yet seen what it missed.
    pub(crate) fn is_fresh(&self) -> bool {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        !self.lost.is_cancelled() && renewed.elapsed() < self.duration
    }
}

pub(crate) struct Elector {
    pub(crate) api: Api<Lease>,
    pub(crate) identity: String,
    pub(crate) duration: Duration,
    /// Epochs up to this one were used.
    pub(crate) used_epoch: i32,
}

impl Elector {
    pub(crate) fn new(client: Client, holder: &Holder, duration: Duration) -> Self {
        Self {
            api: Api::namespaced(client, SYSTEM_NAMESPACE),
            identity: holder.identity.clone(),
            duration,
            used_epoch: holder.epoch(),
        }
    }

    /// Waits until this controller leads.
    pub(crate) async fn lead(&self) -> Lead {
        // (what the lease said, since when by our own clock): expiry never compares two machines' clocks.
        let mut watched: Option<(Option<Timestamp>, Instant)> = None;
        let mut told = false;
        loop {
            match self.try_acquire(&mut watched).await {
                Ok(Some(lead)) => return lead,
                Ok(None) if !told => {
                    told = true;
                    tracing::info!("another controller leads: waiting");
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "the leader's lease cannot be read or written"),
            }
            tokio::time::sleep(self.duration / 7).await;
        }
    }

    async fn try_acquire(
        &self,
        watched: &mut Option<(Option<Timestamp>, Instant)>,
    ) -> Result<Option<Lead>, kube::Error> {
        let Some(found) = self.api.get_opt(LEASE).await? else {
            let metadata = ObjectMeta {
                name: Some(LEASE.to_owned()),
                ..ObjectMeta::default()
            };
            let lease = Lease {
                metadata,
                spec: Some(self.claim(0)),
            };
            let sent = Instant::now();
            return self.won(sent, self.api.create(&PostParams::default(), &lease).await);
        };
        let spec = found.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let renewed = spec.renew_time.map(|time| time.0);
        let since = match watched {
            Some((seen, since)) if *seen == renewed => *since,
            Some(_) | None => {
                let now = Instant::now();
                *watched = Some((renewed, now));
                now
            }
        };
        let life = Duration::from_secs(u64::try_from(spec.lease_duration_seconds.unwrap_or(15)).unwrap_or(15));
        if !(holder.is_empty() || holder == self.identity || since.elapsed() > life) {
            return Ok(None);
        }
        let lease = Lease {
            spec: Some(self.claim(spec.lease_transitions.unwrap_or(0))),
            ..found
        };
        let sent = Instant::now();
        self.won(sent, self.api.replace(LEASE, &PostParams::default(), &lease).await)
    }

    fn won(&self, sent: Instant, written: Result<Lease, kube::Error>) -> Result<Option<Lead>, kube::Error> {
        match written {
            Ok(lease) => {
                let transitions = lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or(1);
                Ok(Some(Lead {
                    epoch: u64::try_from(transitions).unwrap_or(1),
                    lost: CancellationToken::new(),
                    lease: Arc::new(Mutex::new(lease)),
                    renewed: Arc::new(Mutex::new(sent)),
                    duration: self.duration,
                }))
            }
            // Another was faster.
            Err(kube::Error::Api(error)) if error.code == 409 => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn claim(&self, transitions: i32) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.duration.as_secs()).unwrap_or(15).max(1)),
            lease_transitions: Some(transitions.max(self.used_epoch).saturating_add(1)),
            ..LeaseSpec::default()
        }
    }

    /// Renews until the lead is lost or `shutdown`; then gives it back.
    pub(crate) async fn keep(&self, lead: &Lead, shutdown: CancellationToken) {
        let mut renewed = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = tokio::time::sleep(self.duration / 3) => {}
            }
            let left = (self.duration * 2 / 3).saturating_sub(renewed.elapsed().saturating_sub(self.duration / 3));
            let sent = Instant::now();
            match tokio::time::timeout(left, self.renew(lead)).await {
                Ok(Ok(())) => {
                    renewed = Instant::now();
                    *lead.renewed.lock().unwrap_or_else(PoisonError::into_inner) = sent;
                }
                Ok(Err(kube::Error::Api(error))) if error.code == 409 || error.code == 404 => {
                    tracing::error!("the leader's lease was taken: this controller ends");
                    lead.lost.cancel();
                    return;
                }
                Ok(Err(error)) => tracing::warn!(%error, "the leader's lease was not renewed"),
                Err(_) => tracing::warn!("the leader's lease was not renewed in time"),
            }
            if renewed.elapsed() >= self.duration {
                tracing::error!("the leader's lease ran out: this controller ends");
                lead.lost.cancel();
                return;
            }
        }
        if let Err(error) = self.release(lead).await {
            tracing::warn!(%error, "the leader's lease was not given back");
        }
    }

    async fn renew(&self, lead: &Lead) -> Result<(), kube::Error> {
        self.change(lead, |spec| spec.renew_time = Some(MicroTime(Timestamp::now())))
            .await
    }

    async fn release(&self, lead: &Lead) -> Result<(), kube::Error> {
        self.change(lead, |spec| spec.holder_identity = Some(String::new()))
            .await
    }

    async fn change(&self, lead: &Lead, change: impl FnOnce(&mut LeaseSpec)) -> Result<(), kube::Error> {
        let mut lease = lead.lease.lock().unwrap_or_else(PoisonError::into_inner).clone();
        change(lease.spec.get_or_insert_default());
        let kept = self.api.replace(LEASE, &PostParams::default(), &lease).await?;
        *lead.lease.lock().unwrap_or_else(PoisonError::into_inner) = kept;
        Ok(())
    }
}

/// For when a blade says that another controller leads: the Lease decides, never one blade.
#[derive(Debug)]
pub(crate) struct Doubts {
    api: Api<Lease>,
    identity: String,
    lead: Lead,
}

impl Doubts {
    pub(crate) fn new(client: Client, holder: &Holder, lead: &Lead) -> Self {
        Self {
            api: Api::namespaced(client, SYSTEM_NAMESPACE),
            identity: holder.identity.clone(),
            lead: lead.clone(),
        }
    }

    /// True: another leads, and this controller's lead is lost from now on.
    pub(crate) async fn is_deposed(&self) -> bool {
        match self.api.get_opt(LEASE).await {
            Ok(lease) if is_held(lease.as_ref(), &self.identity, self.lead.epoch) => false,
            Ok(_) => {
                tracing::error!("another controller leads: this one ends");
                self.lead.lost.cancel();
                true
            }
            // Whether it is renewed in time is looked after elsewhere.
            Err(error) => {
                tracing::warn!(%error, "the leader's lease cannot be read");
                self.lead.lost.is_cancelled()
            }
        }
    }
}

/// The Lease names this holder, and no acquisition after ours.
fn is_held(lease: Option<&Lease>, identity: &str, epoch: u64) -> bool {
    let spec = lease.and_then(|lease| lease.spec.as_ref());
    spec.is_some_and(|spec| {
        let transitions = spec.lease_transitions.and_then(|count| u64::try_from(count).ok());
        spec.holder_identity.as_deref() == Some(identity) && transitions == Some(epoch)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_lease_says_that_another_leads() {
        let lease = |holder: &str, transitions| Lease {
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_transitions: Some(transitions),
                ..LeaseSpec::default()
            }),
            ..Lease::default()
        };
        assert!(is_held(Some(&lease("me", 3)), "me", 3));
        assert!(!is_held(Some(&lease("other", 3)), "me", 3));
        assert!(!is_held(Some(&lease("me", 4)), "me", 3), "the same folder's next life");
        assert!(!is_held(Some(&lease("", 3)), "me", 3) && !is_held(None, "me", 3));
    }
}
