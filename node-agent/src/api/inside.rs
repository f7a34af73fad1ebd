//! What people do inside a running agent: exec, cp, port-forward and stats.
//!
//! Each call is one channel of the agent's live control connection. Answers are pulled: nothing is taken from the guest
//! before the caller's transport has room for it, and a caller that goes away drops the channel, which closes it.

mod copy;
mod exec;
mod forward;

use super::NodeApi;
use crate::{
    control::channels::{Channel, Incoming, OpenError},
    guests::{Beat, Pressure},
    metrics::ChannelKind,
    names::AttemptKey,
    record::{Phase, Record},
    wire,
};
use far_proto::{
    guest::{self, ChannelEnd, ErrorKind},
    node::{self as proto, inside_server::Inside},
};
use futures::{future::BoxFuture, stream::BoxStream};
use std::time::Duration;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Request, Response, Status, Streaming};

/// From the call to its first message.
const START_LIMIT: Duration = Duration::from_secs(30);
/// A control connection that is being made again is waited for.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Longest path (control.proto), bytes.
const MAX_PATH: usize = 4095;
/// Longest piece of data in one message (node.proto), bytes.
const MAX_PIECE: usize = 1 << 20;

type Answers<T> = BoxStream<'static, Result<T, Status>>;
type Input = AbortOnDropHandle<Result<(), Status>>;

fn lost() -> Status {
    Status::unavailable("the control connection to the agent was lost: nothing is resumed, try again")
}

fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Accepted => "Accepted",
        Phase::Preparing => "Preparing",
        Phase::Starting => "Starting",
        Phase::Warm => "Warm",
        Phase::Running => "Running",
        Phase::Stopping => "Stopping",
        Phase::Ended => "Ended",
    }
}

/// An agent without a running payload has nothing inside.
fn check_runs(record: &Record) -> Result<(), Status> {
    let is_running = record.started_at.is_some() && record.exit.is_none();
    match record.phase {
        Phase::Running | Phase::Stopping if is_running => Ok(()),
        phase => Err(Status::failed_precondition(format!(
            "agent {}/{} is not running: its phase is {}",
            record.identity.namespace,
            record.identity.name,
            phase_word(phase)
        ))),
    }
}

/// What a guest's error means to the caller; `Ok` where there is none.
fn check_end(end: &ChannelEnd) -> Result<(), Status> {
    let text = if end.error.is_empty() {
        "the agent's init does not say why".to_owned()
    } else {
        end.error.clone()
    };
    match end.kind() {
        ErrorKind::Unspecified if end.error.is_empty() => Ok(()),
        ErrorKind::Unspecified | ErrorKind::Failed => Err(Status::unknown(text)),
        ErrorKind::Invalid => Err(Status::invalid_argument(text)),
        ErrorKind::NotFound => Err(Status::not_found(text)),
        ErrorKind::Refused => Err(Status::permission_denied(text)),
        ErrorKind::Busy => Err(Status::resource_exhausted(text)),
        ErrorKind::NotRunning => Err(Status::failed_precondition(text)),
    }
}

fn check_path(field: &str, path: &str) -> Result<(), Status> {
    let is_normal = path == "/"
        || path
            .strip_prefix('/')
            .is_some_and(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
    if is_normal && path.len() <= MAX_PATH && !path.contains('\0') {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "{field}: {path:?} is not an absolute path without \".\" and \"..\" parts of at most {MAX_PATH} bytes"
    )))
}

async fn first<T>(requests: &mut Streaming<T>) -> Result<T, Status> {
    match tokio::time::timeout(START_LIMIT, requests.message()).await {
        Ok(message) => message?.ok_or_else(|| Status::invalid_argument("start: missing, no message came")),
        Err(_) => Err(Status::deadline_exceeded("start: no message came")),
    }
}

fn no_start<T>() -> Result<T, Status> {
    Err(Status::invalid_argument(
        "start: must be the first message, and only the first",
    ))
}

/// A channel, what the caller sends into it, and the end of far-node: what a stream of answers waits for.
struct Talk {
    channel: Channel,
    /// Ends with an error where the caller broke a rule.
    input: Option<Input>,
    shutdown: CancellationToken,
}

impl Talk {
    fn new(
        channel: Channel,
        shutdown: CancellationToken,
        input: impl Future<Output = Result<(), Status>> + Send + 'static,
    ) -> Self {
        Self {
            channel,
            input: Some(AbortOnDropHandle::new(tokio::spawn(input))),
            shutdown,
        }
    }

    /// The next thing from the guest. Cancel-safe.
    async fn next(&mut self) -> Result<Incoming, Status> {
        loop {
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => {
                    return Err(Status::unavailable("far-node stops: the call is broken off, the agent goes on"));
                }
                incoming = self.channel.next() => return Ok(incoming),
                input = ended(&mut self.input) => {
                    self.input = None;
                    input?;
                }
            }
        }
    }
}

async fn ended(input: &mut Option<Input>) -> Result<(), Status> {
    match input {
        Some(input) => input
            .await
            .unwrap_or_else(|_| Err(Status::internal("a fault in far-node; see its log"))),
        None => std::future::pending().await,
    }
}

impl NodeApi {
    async fn open(
        &self,
        identity: Option<&proto::Identity>,
        kind: ChannelKind,
        request: impl FnOnce(u32) -> guest::host_message::Kind + Send,
    ) -> Result<Channel, Status> {
        let key = self.find(identity.unwrap_or(&proto::Identity::default()))?;
        self.check_key_runs(&key)?;
        let guests = &self.supervisor.blade().guests;
        let Some(channels) = guests.wait_for_channels(&key, CONNECTION_LIMIT).await else {
            // It may have ended meanwhile: that says more.
            self.check_key_runs(&key)?;
            return Err(Status::unavailable(
                "there is no control connection to the agent now: try again",
            ));
        };
        channels.open(kind, request).map_err(|error| match error {
            OpenError::TooMany => Status::resource_exhausted(error.to_string()),
            OpenError::Lost => lost(),
        })
    }

    fn check_key_runs(&self, key: &AttemptKey) -> Result<(), Status> {
        let entry = self
            .board()
            .entry(key)
            .ok_or_else(|| Status::not_found("the agent was forgotten meanwhile"))?;
        check_runs(&entry.record)
    }

    fn stats_of(&self, key: &AttemptKey) -> Option<proto::AgentStats> {
        let entry = self.board().entry(key)?;
        let blade = self.supervisor.blade();
        let state = wire::agent_state(&entry);
        let mut stats = proto::AgentStats {
            identity: state.identity,
            phase: state.phase,
            heartbeat_stale: state.heartbeat_stale,
            answers_pings: state.answers_pings,
            channels: blade
                .guests
                .channels(key)
                .map_or(0, |channels| u32::try_from(channels.count()).unwrap_or(u32::MAX)),
            cpu_limit_millis: entry.record.cpu_millis,
            ..proto::AgentStats::default()
        };
        if let Some(beat) = blade.guests.beat(key) {
            fill(&mut stats, &beat, blade.clock.now());
        }
        Some(stats)
    }
}

fn fill(stats: &mut proto::AgentStats, beat: &Beat, now: u64) {
    let pressure = |one: Option<Pressure>| {
        one.map(|one| proto::Pressure {
            some_avg10: one.some,
            full_avg10: one.full,
        })
    };
    let [cpu, memory, io] = beat.pressure;
    stats.heartbeat_age_ms = Some(now.saturating_sub(beat.at));
    stats.memory_total_kib = beat.memory_total_kib;
    stats.memory_available_kib = beat.memory_available_kib;
    stats.payload_memory_kib = beat.payload_memory_kib;
    stats.cpu_usage_us = beat.cpu_usage_us;
    stats.cpu_millis = beat.cpu_millis;
    stats.processes = beat.processes;
    stats.cpu_pressure = pressure(cpu);
    stats.memory_pressure = pressure(memory);
    stats.io_pressure = pressure(io);
}

#[tonic::async_trait]
impl Inside for NodeApi {
    type ExecStream = Answers<proto::ExecReply>;
    type CopyOutStream = Answers<proto::CopyOutReply>;
    type PortForwardStream = Answers<proto::PortForwardReply>;

    async fn exec(
        &self,
        request: Request<Streaming<proto::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        exec::exec(self, request.into_inner()).await.map(Response::new)
    }

    async fn copy_in(
        &self,
        request: Request<Streaming<proto::CopyInRequest>>,
    ) -> Result<Response<proto::CopyResult>, Status> {
        copy::copy_in(self, request.into_inner()).await.map(Response::new)
    }

    async fn copy_out(&self, request: Request<proto::CopyOutRequest>) -> Result<Response<Self::CopyOutStream>, Status> {
        copy::copy_out(self, request.into_inner()).await.map(Response::new)
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<proto::PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        forward::forward(self, request.into_inner()).await.map(Response::new)
    }

    async fn stats(&self, request: Request<proto::StatsRequest>) -> Result<Response<proto::StatsResponse>, Status> {
        let keys = match request.into_inner().identity {
            Some(identity) => {
                let key = self.find(&identity)?;
                self.check_key_runs(&key)?;
                vec![key]
            }
            None => {
                let (entries, _) = self.board().entries();
                entries
                    .iter()
                    .filter(|entry| check_runs(&entry.record).is_ok())
                    .map(|entry| entry.record.identity.key.clone())
                    .collect()
            }
        };
        Ok(Response::new(proto::StatsResponse {
            agents: keys.iter().filter_map(|key| self.stats_of(key)).collect(),
        }))
    }
}

/// Answers until `step` says that the last one was given. Pulled: nothing is taken ahead of the caller.
fn answers<S: Send + 'static, T: Send + 'static>(
    state: S,
    step: impl for<'a> Fn(&'a mut S) -> BoxFuture<'a, Result<Option<T>, Status>> + Send + Sync + 'static,
) -> Answers<T> {
    Box::pin(futures::stream::unfold(Some((state, step)), |state| async move {
        let (mut state, step) = state?;
        match step(&mut state).await {
            Ok(Some(answer)) => Some((Ok(answer), Some((state, step)))),
            Ok(None) => None,
            Err(status) => Some((Err(status), None)),
        }
    }))
}
