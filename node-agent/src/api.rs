//! The node API (`far.node.v1`), served on the Unix socket and, for the controller, over mTLS.
//!
//! Everything a call asks is decided by the supervisor and the board; here wire types are checked and converted.

mod inside;
mod logs;
mod network;

use crate::{
    agent::claim::NotClaimed,
    board::{Board, Watch},
    capacity::Machine,
    epoch::{EpochGuard, Origin},
    host::ImageFault,
    names::AttemptKey,
    record::Record,
    spec::{InvalidField, check_identity, check_spec},
    supervisor::{Refusal, Supervisor},
    wire,
};
use far_proto::node::{
    self as proto, AgentState, Event,
    inside_server::InsideServer,
    network_server::NetworkServer,
    node_server::{Node, NodeServer},
};
use futures::{StreamExt, stream::BoxStream};
use std::{collections::VecDeque, sync::Arc};
use tokio::{io::AsyncWriteExt, sync::broadcast::error::RecvError};
use tonic::{Request, Response, Status};

/// Longest message taken: a spec with 8 MiB of files, and room for the rest.
const MAX_REQUEST: usize = 16 << 20;
/// Largest image archive taken, bytes.
const MAX_ARCHIVE: u64 = 32 << 30;

/// One transport's service.
#[derive(Debug, Clone)]
pub struct NodeApi {
    supervisor: Supervisor,
    machine: Arc<Machine>,
    epochs: Arc<EpochGuard>,
    origin: Origin,
}

impl NodeApi {
    /// The service for calls that come from `origin`.
    #[must_use]
    pub fn new(supervisor: Supervisor, machine: Arc<Machine>, epochs: Arc<EpochGuard>, origin: Origin) -> Self {
        Self {
            supervisor,
            machine,
            epochs,
            origin,
        }
    }

    /// As tonic serves it.
    #[must_use]
    pub fn into_server(self) -> NodeServer<Self> {
        NodeServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    /// Exec, cp, port-forward and stats, for the same listener.
    #[must_use]
    pub fn into_inside_server(self) -> InsideServer<Self> {
        InsideServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    /// What agents may reach, for the same listener.
    #[must_use]
    pub fn into_network_server(self) -> NetworkServer<Self> {
        NetworkServer::new(self)
    }

    fn board(&self) -> &Board {
        &self.supervisor.blade().board
    }

    async fn check_epoch(&self, epoch: u64) -> Result<(), Status> {
        let (epochs, origin) = (self.epochs.clone(), self.origin);
        blocking(move || epochs.check(origin, epoch))
            .await?
            .map_err(|error| error.to_status())
    }

    fn only_from_the_blade(&self) -> Result<(), Status> {
        match self.origin {
            Origin::Blade => Ok(()),
            Origin::Controller => Err(Status::permission_denied(
                "images are loaded on the blade itself, over its Unix socket",
            )),
        }
    }

    /// The attempt that a reader means, see LogsRequest.
    fn find(&self, identity: &proto::Identity) -> Result<AttemptKey, Status> {
        let (entries, _) = self.board().entries();
        let matches = |record: &&Record| {
            let is_whose = if identity.uid.is_empty() {
                record.identity.namespace == identity.namespace && record.identity.name == identity.name
            } else {
                record.identity.key.uid == identity.uid
            };
            is_whose && (identity.attempt == 0 || record.identity.key.attempt == identity.attempt)
        };
        entries
            .iter()
            .map(|entry| &*entry.record)
            .filter(|record| record.forgotten_at.is_none())
            .filter(matches)
            .max_by_key(|record| (record.accepted_at, record.identity.key.attempt))
            .map(|record| record.identity.key.clone())
            .ok_or_else(|| {
                let who = if identity.uid.is_empty() {
                    format!("{}/{}", identity.namespace, identity.name)
                } else {
                    identity.uid.clone()
                };
                let attempt = if identity.attempt == 0 {
                    String::new()
                } else {
                    format!(" (attempt {})", identity.attempt)
                };
                Status::not_found(format!("agent {who}{attempt} is not known on this blade"))
            })
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Status::internal("a fault in far-node; see its log"))
}

impl From<InvalidField> for Status {
    fn from(error: InvalidField) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::NoRoom(_) => Self::resource_exhausted(text),
            Refusal::NewerKnown { .. } => Self::already_exists(text),
            Refusal::StillRuns(_) => Self::failed_precondition(text),
            Refusal::Busy(_) => Self::unavailable(text),
            Refusal::NotClaimed(NotClaimed::NotWarm(_) | NotClaimed::Unfit(_)) => Self::not_found(text),
            Refusal::NotClaimed(NotClaimed::Rejected(_)) => Self::invalid_argument(text),
            Refusal::NotClaimed(NotClaimed::Ledger(error)) => {
                tracing::error!(error = ?error, "the ledger cannot be written: a claim was refused");
                Self::unavailable(text)
            }
            Refusal::Ledger(error) => {
                tracing::error!(error = ?error, "the ledger cannot be written: a call was refused");
                Self::unavailable(text)
            }
        }
    }
}

impl From<ImageFault> for Status {
    fn from(fault: ImageFault) -> Self {
        let text = fault.to_string();
        match fault {
            ImageFault::Unknown { .. } => Self::not_found(text),
            ImageFault::Bad { .. } => Self::invalid_argument(text),
            ImageFault::Store { .. } => Self::internal(text),
        }
    }
}

fn no_sleep() -> Status {
    Status::unimplemented("this far-node cannot save the memory of microVMs yet")
}

#[tonic::async_trait]
impl Node for NodeApi {
    async fn ensure_agent(&self, request: Request<proto::EnsureAgentRequest>) -> Result<Response<AgentState>, Status> {
        let request = request.into_inner();
        self.check_epoch(request.epoch).await?;
        let identity = check_identity(request.identity)?;
        let spec = check_spec(request.spec)?;
        let entry = self.supervisor.ensure(identity, spec).await?;
        Ok(Response::new(wire::agent_state(&entry)))
    }

    async fn claim_agent(&self, request: Request<proto::ClaimAgentRequest>) -> Result<Response<AgentState>, Status> {
        let request = request.into_inner();
        self.check_epoch(request.epoch).await?;
        let warm = check_identity(request.warm).map_err(|error| InvalidField {
            field: error.field.replacen("identity", "warm", 1),
            ..error
        })?;
        let identity = check_identity(request.identity)?;
        let spec = check_spec(request.spec)?;
        let entry = self.supervisor.claim(warm.key, identity, spec).await?;
        Ok(Response::new(wire::agent_state(&entry)))
    }

    async fn stop_agent(&self, request: Request<proto::StopAgentRequest>) -> Result<Response<AgentState>, Status> {
        let request = request.into_inner();
        self.check_epoch(request.epoch).await?;
        let identity = check_identity(request.identity)?;
        if request.grace_s.is_some_and(|grace| grace > 86_400) {
            return Err(Status::invalid_argument("grace_s: must be at most 86400"));
        }
        let reason = wire::stop_reason(request.reason)
            .map_err(|()| Status::invalid_argument("reason: must be EVICTED, DEADLINE_EXCEEDED or UNSPECIFIED"))?;
        let entry = self.supervisor.stop(identity, request.grace_s, reason).await?;
        Ok(Response::new(wire::agent_state(&entry)))
    }

    async fn sleep_agent(&self, _: Request<proto::SleepAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(no_sleep())
    }

    async fn resurrect_agent(&self, _: Request<proto::ResurrectAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(no_sleep())
    }

    async fn forget_agent(
        &self,
        request: Request<proto::ForgetAgentRequest>,
    ) -> Result<Response<proto::ForgetAgentResponse>, Status> {
        let request = request.into_inner();
        self.check_epoch(request.epoch).await?;
        let identity = check_identity(request.identity)?;
        self.supervisor.forget(identity.key).await?;
        Ok(Response::new(proto::ForgetAgentResponse {}))
    }

    async fn list_agents(
        &self,
        _: Request<proto::ListAgentsRequest>,
    ) -> Result<Response<proto::ListAgentsResponse>, Status> {
        let (entries, seq) = self.board().entries();
        // Forgotten attempts are told in events only, where a watcher may still wait for their end.
        let kept = entries.iter().filter(|entry| entry.record.forgotten_at.is_none());
        Ok(Response::new(proto::ListAgentsResponse {
            agents: kept.map(wire::agent_state).collect(),
            seq,
            boot_id: self.supervisor.blade().boot_id.clone(),
        }))
    }

    type WatchEventsStream = BoxStream<'static, Result<Event, Status>>;

    async fn watch_events(
        &self,
        request: Request<proto::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        self.check_epoch(request.epoch).await?;
        let watch = self.board().watch(request.from_seq);
        let shutdown = self.supervisor.blade().shutdown.clone();
        let events = watch_stream(watch).take_until(shutdown.cancelled_owned());
        Ok(Response::new(events.boxed()))
    }

    type LogsStream = BoxStream<'static, Result<proto::LogChunk, Status>>;

    async fn logs(&self, request: Request<proto::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let key = self.find(&request.identity.clone().unwrap_or_default())?;
        let entry = self
            .board()
            .entry(&key)
            .ok_or_else(|| Status::not_found("the agent was forgotten meanwhile"))?;
        let blade = self.supervisor.blade();
        let chunks = logs::stream(blade.log_folder(&entry.record.vm_id), entry.log, &request)?;
        Ok(Response::new(
            chunks.take_until(blade.shutdown.clone().cancelled_owned()).boxed(),
        ))
    }

    async fn capacity(&self, _: Request<proto::CapacityRequest>) -> Result<Response<proto::NodeCapacity>, Status> {
        let (machine, images) = (self.machine.clone(), self.supervisor.blade().images.clone());
        Ok(Response::new(blocking(move || machine.capacity(&*images)).await?))
    }

    async fn load_image(
        &self,
        request: Request<tonic::Streaming<proto::LoadImageRequest>>,
    ) -> Result<Response<proto::Image>, Status> {
        self.only_from_the_blade()?;
        let images = self.supervisor.blade().images.clone();
        let archive = Archive(
            images
                .incoming()
                .join(format!("load-{:016x}.tar", rand::random::<u64>())),
        );
        let reference = receive(request.into_inner(), &archive.0).await?;
        let store = images.clone();
        let loaded = blocking(move || store.load(&reference, &archive.0)).await??;
        // The reference may have left another image behind.
        self.collect_images().await?;
        Ok(Response::new(wire::image(loaded)))
    }

    async fn list_images(
        &self,
        _: Request<proto::ListImagesRequest>,
    ) -> Result<Response<proto::ListImagesResponse>, Status> {
        let images = self.supervisor.blade().images.clone();
        let list = blocking(move || images.list()).await??;
        Ok(Response::new(proto::ListImagesResponse {
            images: list.into_iter().map(wire::image).collect(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<proto::RemoveImageRequest>,
    ) -> Result<Response<proto::RemoveImageResponse>, Status> {
        self.only_from_the_blade()?;
        let images = self.supervisor.blade().images.clone();
        let reference = request.into_inner().reference;
        blocking(move || images.remove(&reference)).await??;
        self.collect_images().await?;
        Ok(Response::new(proto::RemoveImageResponse {}))
    }
}

impl NodeApi {
    /// Removes images that have no name and no attempt. One that an attempt is being prepared from is not in its record
    /// yet: then nothing goes, and the next load or removal sees to it.
    async fn collect_images(&self) -> Result<(), Status> {
        let images = self.supervisor.blade().images.clone();
        let (entries, _) = self.board().entries();
        let live = entries.iter().filter(|entry| !entry.record.is_ended());
        let in_use: Option<_> = live.map(|entry| entry.record.image_digest.clone()).collect();
        if let Some(in_use) = in_use
            && let Err(error) = blocking(move || images.collect(&in_use)).await?
        {
            tracing::warn!(%error, "images without a name are left");
        }
        self.supervisor.blade().images_changed.notify_one();
        Ok(())
    }
}

/// An archive on its way into the store. Gone with the call, however that ends: callers may hang up.
struct Archive(std::path::PathBuf);

impl Drop for Archive {
    fn drop(&mut self) {
        if let Err(error) = crate::files::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a received archive is left");
        }
    }
}

/// Writes an archive as it comes; answers its reference.
async fn receive(
    mut parts: tonic::Streaming<proto::LoadImageRequest>,
    path: &std::path::Path,
) -> Result<String, Status> {
    let failed = |error: std::io::Error| Status::internal(format!("writing the archive {}: {error}", path.display()));
    let mut file = tokio::fs::File::create(path).await.map_err(failed)?;
    let (mut reference, mut size) = (String::new(), 0_u64);
    while let Some(part) = parts.message().await? {
        if reference.is_empty() {
            reference = part.reference;
            if reference.is_empty() {
                return Err(Status::invalid_argument("reference: missing in the first message"));
            }
        }
        size += part.data.len() as u64;
        if size > MAX_ARCHIVE {
            return Err(Status::invalid_argument(format!(
                "data: an archive may have {MAX_ARCHIVE} bytes"
            )));
        }
        file.write_all(&part.data).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    if reference.is_empty() {
        return Err(Status::invalid_argument("reference: missing, no message came"));
    }
    Ok(reference)
}

/// The replay, its end marked, then what comes; a watcher that is too slow is cut off and resumes by its last number.
fn watch_stream(watch: Watch) -> impl futures::Stream<Item = Result<Event, Status>> {
    let mut replay: VecDeque<Event> = watch
        .replay
        .iter()
        .map(|entry| Event {
            seq: entry.seq,
            state: Some(wire::agent_state(entry)),
            replay_done: false,
        })
        .collect();
    match replay.back_mut() {
        Some(last) => last.replay_done = true,
        None => replay.push_back(Event {
            seq: watch.seq,
            state: None,
            replay_done: true,
        }),
    }
    let state = Some((replay, watch.live));
    futures::stream::unfold(state, |state| async move {
        let (mut replay, mut live) = state?;
        if let Some(event) = replay.pop_front() {
            return Some((Ok(event), Some((replay, live))));
        }
        match live.recv().await {
            Ok(entry) => {
                let event = Event {
                    seq: entry.seq,
                    state: Some(wire::agent_state(&entry)),
                    replay_done: false,
                };
                Some((Ok(event), Some((replay, live))))
            }
            Err(RecvError::Lagged(missed)) => {
                let text = format!("this watcher fell {missed} events behind: resume from the last seq it got");
                Some((Err(Status::aborted(text)), None))
            }
            Err(RecvError::Closed) => None,
        }
    })
}
