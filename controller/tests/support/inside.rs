//! What people do inside agents, on a fake blade: programs do what their name says, and everything asked is remembered.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use far_proto::node::{
    AgentStats, CopyEntry, CopyInRequest, CopyKind, CopyOutReply, CopyOutRequest, CopyResult, ExecExit, ExecReply,
    ExecRequest, Identity, LogChunk, LogsRequest, Phase, Piece, PortForwardOpened, PortForwardReply,
    PortForwardRequest, StatsRequest, StatsResponse, Stream as Output, copy_in_request, copy_out_reply, exec_exit,
    exec_reply, exec_request, inside_server::Inside, port_forward_reply, port_forward_request,
};
use futures::{StreamExt, stream::BoxStream};
use tokio::sync::watch;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::blade::Fake;

/// One piece of a flood.
pub const FLOOD: usize = 32 * 1024;

/// What happened inside.
#[derive(Default)]
pub struct Happened {
    /// Calls that are open now.
    pub open: AtomicUsize,
    /// Bytes of floods that were taken from the fake.
    pub flooded: AtomicU64,
    calls: Mutex<Vec<(&'static str, Identity)>>,
    /// The files that were copied in, by path; the first entry's is the destination.
    copied: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Answered to Stats besides the truth.
    pub lies: Mutex<Vec<AgentStats>>,
    output: watch::Sender<Vec<String>>,
}

impl Happened {
    /// The calls so far: kind, and the identity they came with.
    pub fn calls(&self) -> Vec<(&'static str, Identity)> {
        self.calls.lock().unwrap().clone()
    }

    pub fn copied(&self) -> BTreeMap<String, Vec<u8>> {
        self.copied.lock().unwrap().clone()
    }

    /// The agent prints a line.
    pub fn says(&self, line: &str) {
        self.output.send_modify(|lines| lines.push(line.to_owned()));
    }

    fn begin(self: &Arc<Self>, kind: &'static str, identity: Option<Identity>) -> Open {
        self.calls.lock().unwrap().push((kind, identity.unwrap_or_default()));
        self.open.fetch_add(1, Ordering::SeqCst);
        Open(self.clone())
    }
}

/// An open call.
struct Open(Arc<Happened>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

type Answers<T> = BoxStream<'static, Result<T, Status>>;

fn reply(kind: exec_reply::Kind) -> Result<ExecReply, Status> {
    Ok(ExecReply { kind: Some(kind) })
}

fn exit(code: u32) -> Result<ExecReply, Status> {
    reply(exec_reply::Kind::Exit(ExecExit {
        how: Some(exec_exit::How::Code(code)),
        error: String::new(),
    }))
}

#[async_trait]
impl Inside for Fake {
    type ExecStream = Answers<ExecReply>;
    type CopyOutStream = Answers<CopyOutReply>;
    type PortForwardStream = Answers<PortForwardReply>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let Some(exec_request::Kind::Start(start)) = requests.message().await?.unwrap().kind else {
            return Err(Status::invalid_argument("start"));
        };
        let open = self.inside.begin("exec", start.identity);
        let happened = self.inside.clone();
        let replies: Answers<ExecReply> = match start.argv[0].as_str() {
            // Never ends and says nothing.
            "hold" => futures::stream::pending().boxed(),
            // Prints for ever, as fast as it is taken.
            "flood" => futures::stream::repeat_with(move || {
                happened.flooded.fetch_add(FLOOD as u64, Ordering::SeqCst);
                reply(exec_reply::Kind::Stdout(vec![b'x'; FLOOD]))
            })
            .boxed(),
            "refuses" => return Err(Status::not_found("no such program: refuses")),
            // What comes in, and then an exit code; signals and sizes are printed.
            "cat" => futures::stream::unfold(Some(requests), |requests| async move {
                let mut requests = requests?;
                let next = match requests.message().await {
                    Ok(Some(request)) => match request.kind {
                        Some(exec_request::Kind::Stdin(piece)) if piece.last => return Some((exit(7), None)),
                        Some(exec_request::Kind::Stdin(piece)) => reply(exec_reply::Kind::Stdout(piece.data)),
                        Some(exec_request::Kind::Resize(size)) => {
                            let text = format!("{}x{}\n", size.rows, size.columns);
                            reply(exec_reply::Kind::Stderr(text.into_bytes()))
                        }
                        Some(exec_request::Kind::Signal(number)) => {
                            reply(exec_reply::Kind::Stderr(format!("signal {number}\n").into_bytes()))
                        }
                        Some(exec_request::Kind::Start(_)) | None => Err(Status::invalid_argument("start again")),
                    },
                    Ok(None) => Err(Status::invalid_argument("the caller ended too early")),
                    Err(status) => Err(status),
                };
                Some((next, Some(requests)))
            })
            .boxed(),
            other => return Err(Status::not_found(format!("no such program: {other}"))),
        };
        // The guard lives as long as the answers do.
        let replies = replies.inspect(move |_| {
            let _ = &open;
        });
        Ok(Response::new(replies.boxed()))
    }

    async fn copy_in(&self, request: Request<Streaming<CopyInRequest>>) -> Result<Response<CopyResult>, Status> {
        let mut requests = request.into_inner();
        let Some(copy_in_request::Kind::Start(start)) = requests.message().await?.unwrap().kind else {
            return Err(Status::invalid_argument("start"));
        };
        let _open = self.inside.begin("copy in", start.identity);
        let (mut result, mut current) = (CopyResult::default(), String::new());
        loop {
            match requests.message().await?.and_then(|request| request.kind) {
                Some(copy_in_request::Kind::Entry(entry)) if entry.kind() == CopyKind::End => {
                    return Ok(Response::new(result));
                }
                Some(copy_in_request::Kind::Entry(entry)) => {
                    current = format!("{}/{}", start.path, entry.path);
                    result.files += u64::from(entry.kind() == CopyKind::File);
                }
                Some(copy_in_request::Kind::Data(piece)) => {
                    result.bytes += piece.data.len() as u64;
                    let mut copied = self.inside.copied.lock().unwrap();
                    copied.entry(current.clone()).or_default().extend(piece.data);
                }
                Some(copy_in_request::Kind::Start(_)) | None => {
                    return Err(Status::invalid_argument("it ended before it was whole"));
                }
            }
        }
    }

    async fn copy_out(&self, request: Request<CopyOutRequest>) -> Result<Response<Self::CopyOutStream>, Status> {
        let request = request.into_inner();
        let open = self.inside.begin("copy out", request.identity);
        let mut kinds = Vec::new();
        for (path, data) in self.inside.copied() {
            kinds.push(copy_out_reply::Kind::Entry(CopyEntry {
                kind: CopyKind::File.into(),
                path,
                mode: 0o644,
                size: data.len() as u64,
                ..CopyEntry::default()
            }));
            kinds.push(copy_out_reply::Kind::Data(Piece { data, last: true }));
        }
        kinds.push(copy_out_reply::Kind::Result(CopyResult::default()));
        let replies = kinds.into_iter().map(|kind| Ok(CopyOutReply { kind: Some(kind) }));
        let replies = futures::stream::iter(replies.collect::<Vec<_>>()).inspect(move |_| {
            let _ = &open;
        });
        Ok(Response::new(replies.boxed()))
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let mut requests = request.into_inner();
        let Some(port_forward_request::Kind::Start(start)) = requests.message().await?.unwrap().kind else {
            return Err(Status::invalid_argument("start"));
        };
        let open = self.inside.begin("port-forward", start.identity);
        if start.port != 7777 {
            return Err(Status::not_found(format!("nobody listens on port {}", start.port)));
        }
        let opened = Ok(PortForwardReply {
            kind: Some(port_forward_reply::Kind::Opened(PortForwardOpened {})),
        });
        // An echo.
        let echo = requests.filter_map(move |request| {
            let _ = &open;
            let echoed = match request {
                Ok(PortForwardRequest {
                    kind: Some(port_forward_request::Kind::Data(piece)),
                }) => Some(Ok(PortForwardReply {
                    kind: Some(port_forward_reply::Kind::Data(piece)),
                })),
                Ok(_) => None,
                Err(status) => Some(Err(status)),
            };
            std::future::ready(echoed)
        });
        Ok(Response::new(futures::stream::iter([opened]).chain(echo).boxed()))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let asked = request.into_inner().identity;
        let _open = self.inside.begin("stats", asked.clone());
        let mut agents: Vec<_> = self
            .running_identities()
            .into_iter()
            .filter(|identity| asked.as_ref().is_none_or(|asked| asked.uid == identity.uid))
            .map(|identity| AgentStats {
                identity: Some(identity),
                phase: Phase::Running.into(),
                heartbeat_age_ms: Some(1),
                ..AgentStats::default()
            })
            .collect();
        agents.extend(self.inside.lies.lock().unwrap().iter().cloned());
        Ok(Response::new(StatsResponse { agents }))
    }
}

/// The lines so far, then (follow) what comes; each is a record with its number.
pub fn logs(fake: &Fake, request: LogsRequest) -> Answers<LogChunk> {
    let open = fake.inside.begin("logs", request.identity);
    let lines = fake.inside.output.subscribe();
    let follow = request.follow;
    futures::stream::unfold((lines, 0_usize), move |(mut lines, told)| async move {
        loop {
            let next = lines.borrow_and_update().get(told).cloned();
            if let Some(line) = next {
                let chunk = LogChunk {
                    stream: Output::Stdout.into(),
                    data: format!("{line}\n").into_bytes(),
                    seq: told as u64 + 1,
                    ..LogChunk::default()
                };
                return Some((Ok(chunk), (lines, told + 1)));
            }
            if !follow || lines.changed().await.is_err() {
                return None;
            }
        }
    })
    .inspect(move |_| {
        let _ = &open;
    })
    .boxed()
}
