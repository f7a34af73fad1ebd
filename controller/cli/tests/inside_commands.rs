//! `far exec`, `cp`, `port-forward` and `top` against a blade that this test plays, with an agent that may be hostile.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod common;

use std::{io::Write, path::Path, pin::Pin};

use common::{AGENT, Machine, finish};
use far_proto::node::{
    AgentStats, CopyEntry, CopyInRequest, CopyKind, CopyOutReply, CopyOutRequest, CopyResult, ExecExit, ExecReply,
    ExecRequest, Piece, PortForwardReply, PortForwardRequest, StatsRequest, StatsResponse, copy_in_request,
    copy_out_reply, exec_exit, exec_reply, exec_request,
    inside_server::{Inside, InsideServer},
};
use futures::{Stream, StreamExt};
use serde_json::json;
use tokio::net::UnixListener;
use tonic::{Request, Response, Status, Streaming};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// An agent whose programs do what their name says.
struct Agent;

fn reply(kind: exec_reply::Kind) -> Result<ExecReply, Status> {
    Ok(ExecReply { kind: Some(kind) })
}

fn exit(how: exec_exit::How) -> Result<ExecReply, Status> {
    reply(exec_reply::Kind::Exit(ExecExit {
        how: Some(how),
        error: String::new(),
    }))
}

#[tonic::async_trait]
impl Inside for Agent {
    type ExecStream = Answers<ExecReply>;
    type CopyOutStream = Answers<CopyOutReply>;
    type PortForwardStream = Answers<PortForwardReply>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let Some(exec_request::Kind::Start(start)) = requests.message().await?.unwrap().kind else {
            return Err(Status::invalid_argument("start"));
        };
        assert_eq!(start.identity.unwrap().attempt, 2, "the attempt of the status");
        Ok(Response::new(match start.argv[0].as_str() {
            "signal" => Box::pin(futures::stream::iter([exit(exec_exit::How::Signal(15))])),
            "lost" => Box::pin(futures::stream::iter([
                reply(exec_reply::Kind::Stdout(b"half".to_vec())),
                Err(Status::unavailable("the control connection to the agent was lost")),
            ])),
            "ended" => {
                return Err(Status::failed_precondition(
                    "agent default/a is not running: its phase is Ended",
                ));
            }
            // Everything that comes back, then the number of bytes as exit code.
            _ => {
                // Answered at once, as a blade does: input comes only once the call stands.
                let replies = async move {
                    let mut output = Vec::new();
                    loop {
                        match requests.message().await.unwrap().unwrap().kind {
                            Some(exec_request::Kind::Stdin(piece)) => {
                                output.extend(piece.data);
                                if piece.last {
                                    break;
                                }
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    let code = u32::try_from(output.len()).unwrap();
                    futures::stream::iter([
                        reply(exec_reply::Kind::Stderr(b"to stderr\n".to_vec())),
                        reply(exec_reply::Kind::Stdout(output)),
                        exit(exec_exit::How::Code(code)),
                    ])
                };
                Box::pin(futures::stream::once(replies).flatten())
            }
        }))
    }

    async fn copy_in(&self, request: Request<Streaming<CopyInRequest>>) -> Result<Response<CopyResult>, Status> {
        let mut requests = request.into_inner();
        let mut result = CopyResult::default();
        while let Some(request) = requests.message().await? {
            match request.kind.unwrap() {
                copy_in_request::Kind::Start(start) if start.path == "/refuses" => {
                    return Err(Status::permission_denied("no space for you"));
                }
                copy_in_request::Kind::Data(piece) => result.bytes += piece.data.len() as u64,
                copy_in_request::Kind::Start(_) | copy_in_request::Kind::Entry(_) => {}
            }
        }
        Ok(Response::new(result))
    }

    async fn copy_out(&self, request: Request<CopyOutRequest>) -> Result<Response<Self::CopyOutStream>, Status> {
        let path = request.into_inner().path;
        let entry = |kind: CopyKind, path: &str, target: &str| {
            copy_out_reply::Kind::Entry(CopyEntry {
                kind: kind.into(),
                path: path.into(),
                mode: 0o755,
                target: target.into(),
                ..CopyEntry::default()
            })
        };
        let data = || {
            copy_out_reply::Kind::Data(Piece {
                data: b"evil".to_vec(),
                last: true,
            })
        };
        let folder = entry(CopyKind::Folder, "", "");
        let mut kinds = match path.as_str() {
            "/up" => vec![folder, entry(CopyKind::File, "../escaped", ""), data()],
            "/link" => vec![
                folder,
                entry(CopyKind::Symlink, "l", ".."),
                entry(CopyKind::File, "l/escaped", ""),
                data(),
            ],
            "/bell" => vec![folder, entry(CopyKind::File, "a\x1b]0;x/../y", ""), data()],
            _ => vec![folder, entry(CopyKind::File, "fine", ""), data()],
        };
        kinds.push(copy_out_reply::Kind::Result(CopyResult::default()));
        let replies = kinds.into_iter().map(|kind| Ok(CopyOutReply { kind: Some(kind) }));
        Ok(Response::new(Box::pin(futures::stream::iter(
            replies.collect::<Vec<_>>(),
        ))))
    }

    async fn port_forward(
        &self,
        _: Request<Streaming<PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        Err(Status::not_found("nobody listens"))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        Ok(Response::new(StatsResponse {
            agents: vec![AgentStats {
                memory_total_kib: 2048,
                heartbeat_age_ms: Some(100),
                ..AgentStats::default()
            }],
        }))
    }
}

fn serve(run: &Path) {
    std::fs::create_dir_all(run).unwrap();
    let listener = UnixListener::bind(run.join("node.sock")).unwrap();
    let incoming = futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    })
    .boxed();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(InsideServer::new(Agent))
            .serve_with_incoming(incoming),
    );
}

/// A machine with a running agent `a`, as its FarAgent says.
async fn running(test: &str) -> Option<Machine> {
    let machine = Machine::with_api(test).await?;
    let file = machine.file("a.yaml", AGENT);
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let (code, _, err) = machine.far(&["exec", "a", "--", "x"]).await;
    assert_eq!(code, 125);
    assert!(err.contains("on no blade yet"), "{err}");
    let status = json!({"phase": "Running", "nodeName": "this-blade", "attempt": 2});
    machine.set_status("a", &status).await;
    let (code, _, err) = machine.far(&["exec", "a", "--", "x"]).await;
    assert_eq!(code, 125);
    assert!(err.contains("blade this-blade"), "{err}");
    serve(&machine.dir.path().join("run"));
    Some(machine)
}

#[tokio::test]
async fn exec_passes_everything_on_and_tells_its_own_failures_from_the_programs() {
    let Some(machine) = running("exec_passes_everything_on_and_tells_its_own_failures_from_the_programs").await else {
        return;
    };
    for program in ["far", "kubectl-far"] {
        let mut command = machine.command(program, &["exec", "-i", "a", "--", "count"]);
        let mut child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"12345").unwrap();
        let (code, out, err) = finish(child).await;
        assert_eq!(
            (code, out.as_str(), err.as_str()),
            (5, "12345", "to stderr\n"),
            "{program}"
        );
    }
    assert_eq!(machine.far(&["exec", "a", "--", "signal"]).await.0, 143);
    let (code, out, err) = machine.far(&["exec", "a", "--", "lost"]).await;
    assert_eq!((code, out.as_str()), (125, "half"));
    assert!(err.contains("connection to the agent was lost"), "{err}");
    let (code, _, err) = machine.far(&["exec", "a", "--", "ended"]).await;
    assert_eq!(code, 125);
    assert!(err.contains("its phase is Ended"), "{err}");
    // Wrong usage.
    for args in [
        &["exec", "a"][..],
        &["exec", "a", "ls"],
        &["cp", "a:/x"],
        &["cp", "a:x", "y"],
        &["port-forward", "a", "0"],
    ] {
        assert_eq!(machine.far(args).await.0, 2, "{args:?}");
    }
    let (code, out, err) = machine.far(&["top", "-o", "json"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("\"memoryTotalKib\": 2048"), "{out}");
    assert!(machine.far(&["top", "a"]).await.1.contains("2MiB"));
}

#[tokio::test]
async fn cp_keeps_to_its_destination_whatever_the_agent_sends() {
    let Some(machine) = running("cp_keeps_to_its_destination_whatever_the_agent_sends").await else {
        return;
    };
    let at = |name: &str| machine.dir.path().join(name);
    for source in ["up", "link", "bell"] {
        let (code, _, err) = machine.far(&["cp", &format!("a:/{source}"), "got"]).await;
        assert_eq!(code, 1, "{source}");
        assert!(
            err.contains("in no folder of this copy") && !err.contains('\x1b'),
            "{source}: {err:?}"
        );
        assert!(!at("escaped").exists() && !at("got/l/escaped").exists(), "{source}");
        let _ = std::fs::remove_dir_all(at("got"));
    }
    let (code, _, err) = machine.far(&["cp", "a:/fine", "got"]).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(std::fs::read(at("got/fine")).unwrap(), b"evil");
    // More than all windows on the way, to an agent that refuses at once: told, not stuck.
    std::fs::write(at("big"), vec![1; 8 << 20]).unwrap();
    let (code, _, err) = machine.far(&["cp", "big", "a:/refuses"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("/refuses") && err.contains("no space for you"), "{err}");
    assert_eq!(machine.far(&["cp", "big", "a:/takes"]).await.0, 0);
    for (args, names) in [
        (["cp", "big", "got"], "AGENT:/PATH"),
        (["cp", "a:/x", "a:/y"], "this machine"),
        (["cp", "nowhere", "a:/x"], "nowhere"),
    ] {
        let (code, _, err) = machine.far(&args).await;
        assert_eq!(code, 1, "{args:?}");
        assert!(err.contains(names), "{args:?}: {err}");
    }
}
