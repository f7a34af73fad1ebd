//! One connection and one event stream per blade. A stream that ends is opened again, from the blade's full state: what
//! the blade no longer speaks of is then known to be gone.
//!
//! ```text
//! connect ─► replay (every state) ─► synced ─► changes … ─┐
//!    ▲                                                    │ ended, silent (HTTP/2 ping) or refused
//!    └───────────────── wait, doubling ◄──────────────────┘
//! ```

use std::{collections::HashSet, sync::Arc, time::Duration};

use far_core::status::Stage;
use far_proto::node::{EndReason, WatchEventsRequest};
use futures::FutureExt;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::{
    backoff::Backoff,
    ca,
    calls::{self, Blade, CallError},
    convert,
    events::Events,
    leader::Doubts,
    tokens::Revocations,
    world::World,
};

/// A silent blade is asked whether it lives after this long, and has this long to answer.
const PING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(10));
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A blade that speaks of a controller that does not lead is left alone for this long.
const DISTRUST: Duration = Duration::from_secs(60);
/// Between two looks whether the blade was revoked.
const REVOKED_LOOK: Duration = Duration::from_secs(2);

/// Agents that a blade tells of when its stream begins; a blade that speaks of more is broken or hostile.
const MAX_TOLD: usize = 65_536;
/// Calls of users to one blade at a time. HTTP/2 servers take 200 at least on a connection.
pub(crate) const MAX_CALLS_PER_BLADE: usize = 192;
/// What a blade may send ahead in one call, bytes. The connection's window holds that of every call: one whose caller does
/// not read never holds up another. far-node has the same for what it receives.
const CALL_WINDOW: u32 = 128 * 1024;

/// Who the controller is towards blades.
#[derive(Clone)]
pub(crate) struct Credentials {
    pub(crate) ca_pem: String,
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

/// What every link needs.
#[derive(Clone)]
pub(crate) struct Links {
    pub(crate) world: Arc<World>,
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) epoch: u64,
    pub(crate) doubts: Arc<Doubts>,
    pub(crate) revocations: Revocations,
    pub(crate) events: Arc<Events>,
    /// Cancelled once the list of agents is complete: before that nothing can be called an orphan.
    pub(crate) agents_known: CancellationToken,
    /// Between two looks for attempts that no agent owns.
    pub(crate) sweep_every: Duration,
}

impl Links {
    /// Keeps the blade's events coming in until cancelled. While the blade is revoked there is no connection to it.
    pub(crate) async fn run(self, blade: String, endpoint: String, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                // Another link may have taken over already: its state is not touched.
                () = stop.cancelled() => return,
                () = self.until_revoked(&blade, false) => {}
            }
            let (channel, user_channel) = match self.channels(&blade, &endpoint) {
                Ok(channels) => channels,
                Err(error) => {
                    tracing::warn!(blade, endpoint, %error, "the blade's endpoint cannot be used");
                    return;
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.until_revoked(&blade, true) => {
                    tracing::warn!(blade, "the blade was revoked: it is not called until it joins again");
                }
                () = self.keep(&blade, channel, user_channel) => return,
            }
        }
    }

    /// Waits until the blade is revoked, or until it is not. The mark is a file: another process may have set it.
    async fn until_revoked(&self, blade: &str, wanted: bool) {
        loop {
            let is_revoked = self.revocations.is_blade_revoked(blade);
            if is_revoked {
                self.world.revoked(blade);
            }
            if is_revoked == wanted {
                return;
            }
            tokio::time::sleep(REVOKED_LOOK).await;
        }
    }

    /// Opens the event stream again and again; ends only when another controller leads.
    async fn keep(&self, blade: &str, channel: Channel, user_channel: Channel) {
        let distrusted = self.world.set_channel(blade, channel.clone(), user_channel);
        let mut backoff = Backoff::default();
        loop {
            let synced = CancellationToken::new();
            let ended = tokio::select! {
                ended = self.follow(blade, channel.clone(), &synced) => ended,
                () = self.sweep(blade, channel.clone(), synced.clone()) => continue,
                () = distrusted.notified() => Status::failed_precondition("as its answers to calls say"),
            };
            self.world.unsynced(blade);
            if ended.code() == Code::FailedPrecondition {
                if self.doubts.is_deposed().await {
                    return;
                }
                let note = format!(
                    "the blade claims that another controller leads, which is not so: it is left alone for {} s ({})",
                    DISTRUST.as_secs(),
                    ended.message()
                );
                tracing::error!(blade, note, "a blade is not trusted");
                self.events.warn_of_blade(blade, "NotTrusted", &note);
                tokio::time::sleep(DISTRUST).await;
                // Of calls that were under way: they count for the time that is over.
                let _ = distrusted.notified().now_or_never();
                continue;
            }
            if synced.is_cancelled() {
                backoff.succeeded();
            }
            tracing::info!(
                blade,
                error = ended.message(),
                "the blade's event stream ended: opening it again"
            );
            tokio::time::sleep(backoff.after_failure()).await;
        }
    }

    /// The controller's own connection and that of users' calls; neither is made before it is used.
    fn channels(&self, blade: &str, endpoint: &str) -> Result<(Channel, Channel), tonic::transport::Error> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.credentials.ca_pem))
            .identity(Identity::from_pem(
                &self.credentials.certificate_pem,
                &self.credentials.key_pem,
            ))
            .domain_name(ca::blade_server_name(blade));
        let endpoint = Endpoint::from_shared(format!("https://{endpoint}"))?
            .connect_timeout(CONNECT_WITHIN)
            .http2_keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .keep_alive_while_idle(true)
            .tls_config(tls)?;
        let of_users = endpoint
            .clone()
            .initial_stream_window_size(CALL_WINDOW)
            .initial_connection_window_size(CALL_WINDOW * MAX_CALLS_PER_BLADE as u32);
        Ok((endpoint.connect_lazy(), of_users.connect_lazy()))
    }

    /// Ends with the reason the stream ended.
    async fn follow(&self, blade: &str, channel: Channel, synced: &CancellationToken) -> Status {
        // Before that nothing is known to be there, and of what is not there no texts are kept.
        self.agents_known.cancelled().await;
        let mut client = calls::client(channel);
        let request = WatchEventsRequest {
            epoch: self.epoch,
            from_seq: 0,
        };
        let mut events = match client.watch_events(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return status,
        };
        let mut told = HashSet::new();
        loop {
            let event = match events.message().await {
                Ok(Some(event)) => event,
                Ok(None) => return Status::unavailable("the blade ended the stream"),
                Err(status) => return status,
            };
            if let Some((identity, report)) = event.state.and_then(convert::report) {
                if !synced.is_cancelled() {
                    told.insert(identity.uid.clone());
                    if told.len() > MAX_TOLD {
                        return Status::resource_exhausted(format!("the blade speaks of more than {MAX_TOLD} agents"));
                    }
                }
                self.world.told(blade, &identity.uid, report);
            }
            if event.replay_done && !synced.is_cancelled() {
                tracing::info!(blade, agents = told.len(), "the blade is connected");
                self.world.synced(blade, &std::mem::take(&mut told));
                synced.cancel();
            }
        }
    }

    /// Once the blade is connected, and then again and again: ends and forgets what no agent owns. Beside the event stream,
    /// never in it: a slow answer holds no event back.
    async fn sweep(&self, blade: &str, channel: Channel, synced: CancellationToken) {
        synced.cancelled().await;
        let mut blade_calls = Blade::new(channel, self.epoch);
        loop {
            if let Err(error) = self.remove_orphans(blade, &mut blade_calls).await {
                tracing::warn!(blade, %error, "attempts that no agent owns could not be removed");
            }
            tokio::time::sleep(self.sweep_every).await;
        }
    }

    /// What is ended now is forgotten the next time. One that cannot be removed holds no other back.
    async fn remove_orphans(&self, blade: &str, calls: &mut Blade) -> Result<(), CallError> {
        let all = calls.list().await?;
        let listed = all.iter().map(|(identity, _)| identity.uid.clone()).collect();
        self.world.keep_reports(blade, &listed);
        for (identity, report) in all {
            let (uid, attempt) = (identity.uid.clone(), identity.attempt);
            if !self.world.is_orphan(blade, &uid, &report) {
                continue;
            }
            tracing::info!(blade, uid, attempt, stage = ?report.stage, "no agent owns an attempt on the blade: it is removed");
            let done = match report.stage {
                Stage::Ended => calls.forget(identity).await,
                Stage::Stopping => Ok(()),
                Stage::Accepted | Stage::Preparing | Stage::Starting | Stage::Warm | Stage::Running => {
                    calls.stop(identity, None, EndReason::Evicted).await.map(drop)
                }
            };
            match done {
                Ok(()) if report.stage == Stage::Ended => self.world.untold(blade, &uid, attempt),
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(blade, uid, attempt, %error, "an attempt that no agent owns was not removed")
                }
            }
        }
        Ok(())
    }
}
