//! The same work over tonic: a process that starts the payload and streams its output, and one call, on a Unix socket.

use std::{
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use far_proto::node::{
    CopyInRequest, CopyOutReply, CopyOutRequest, CopyResult, ExecExit, ExecReply, ExecRequest, ExecStart,
    PortForwardReply, PortForwardRequest, StatsRequest, StatsResponse,
    exec_exit::How,
    exec_reply, exec_request,
    inside_client::InsideClient,
    inside_server::{Inside, InsideServer},
};
use tokio::{io::AsyncReadExt, net::UnixStream, runtime::Runtime, sync::mpsc};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server},
};

use super::{cpu_of, own_cpu, program, until};

pub(crate) const NAME: &str = "tonic over a Unix socket";
/// As far-init reads a pipe.
const PIECE: usize = 64 << 10;

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Agent;

#[tonic::async_trait]
impl Inside for Agent {
    type ExecStream = ReceiverStream<Result<ExecReply, Status>>;
    type CopyOutStream = Out<CopyOutReply>;
    type PortForwardStream = Out<PortForwardReply>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let Some(ExecRequest {
            kind: Some(exec_request::Kind::Start(start)),
        }) = request.into_inner().message().await?
        else {
            return Err(Status::invalid_argument("no start"));
        };
        let (send, replies) = mpsc::channel(8);
        tokio::spawn(async move {
            if let Err(error) = relay(start, &send).await {
                let _ = send.send(Err(Status::internal(error.to_string()))).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        Ok(Response::new(StatsResponse::default()))
    }

    async fn copy_in(&self, _: Request<Streaming<CopyInRequest>>) -> Result<Response<CopyResult>, Status> {
        Err(Status::unimplemented("a peer of benches"))
    }

    async fn copy_out(&self, _: Request<CopyOutRequest>) -> Result<Response<Self::CopyOutStream>, Status> {
        Err(Status::unimplemented("a peer of benches"))
    }

    async fn port_forward(
        &self,
        _: Request<Streaming<PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        Err(Status::unimplemented("a peer of benches"))
    }
}

async fn relay(start: ExecStart, send: &mpsc::Sender<Result<ExecReply, Status>>) -> Result<()> {
    let (name, arguments) = start.argv.split_first().context("no program")?;
    let mut child = tokio::process::Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().context("no output")?;
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        if output.read_buf(&mut piece).await? == 0 {
            break;
        }
        send.send(Ok(ExecReply {
            kind: Some(exec_reply::Kind::Stdout(piece)),
        }))
        .await?;
    }
    let code = child.wait().await?.code().unwrap_or(255);
    let exit = ExecExit {
        how: Some(How::Code(code.cast_unsigned())),
        ..ExecExit::default()
    };
    send.send(Ok(ExecReply {
        kind: Some(exec_reply::Kind::Exit(exit)),
    }))
    .await?;
    Ok(())
}

/// The other end: one thread, as far-init.
pub(crate) fn serve(socket: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = UnixListenerStream::new(tokio::net::UnixListener::bind(socket)?);
        Ok(Server::builder()
            .add_service(InsideServer::new(Agent))
            .serve_with_incoming(listener)
            .await?)
    })
}

/// The other end as a process, and a client on this thread.
pub(crate) struct Tonic {
    process: Child,
    runtime: Runtime,
    client: InsideClient<Channel>,
    _folder: tempfile::TempDir,
}

impl Tonic {
    pub(crate) fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("s");
        let process = Command::new(std::env::current_exe()?)
            .arg("guest-peer")
            .arg("--socket")
            .arg(&socket)
            .spawn()?;
        // It is there a moment before it listens.
        until("the peer's socket", || {
            std::os::unix::net::UnixStream::connect(&socket).ok()
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(connect(socket))?;
        Ok(Self {
            process,
            runtime,
            client,
            _folder: folder,
        })
    }

    fn cpu(&self) -> Result<f64> {
        Ok(own_cpu()? + cpu_of(self.process.id())?)
    }

    pub(crate) fn calls(&mut self, count: u64) -> Result<f64> {
        let before = self.cpu()?;
        let client = &mut self.client;
        self.runtime.block_on(async {
            for _ in 0..count {
                client.stats(StatsRequest::default()).await?;
            }
            Ok::<_, Status>(())
        })?;
        Ok(self.cpu()? - before)
    }

    /// Bytes of output and code of one program.
    fn exec(&mut self, steps: &[&str]) -> Result<u64> {
        let mut argv = vec![program("far-payload")?.display().to_string()];
        argv.extend(steps.iter().map(ToString::to_string));
        let start = exec_request::Kind::Start(ExecStart {
            argv,
            ..ExecStart::default()
        });
        let client = &mut self.client;
        self.runtime.block_on(async {
            let mut replies = client
                .exec(tokio_stream::iter([ExecRequest { kind: Some(start) }]))
                .await?
                .into_inner();
            let mut bytes = 0;
            while let Some(reply) = replies.message().await? {
                match reply.kind {
                    Some(exec_reply::Kind::Stdout(piece)) => bytes += piece.len() as u64,
                    Some(exec_reply::Kind::Exit(exit)) if exit.how == Some(How::Code(0)) => return Ok(bytes),
                    other => bail!("{other:?}"),
                }
            }
            bail!("no exit")
        })
    }
}

impl Drop for Tonic {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn connect(socket: PathBuf) -> Result<InsideClient<Channel>> {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    let channel = Endpoint::try_from("http://peer")?
        .connect_with_connector(connector)
        .await?;
    Ok(InsideClient::new(channel))
}

pub(crate) fn flood(bytes: u64) -> Result<f64> {
    let mut tonic = Tonic::start()?;
    let before = tonic.cpu()?;
    ensure!(tonic.exec(&[&format!("flood={bytes}")])? == bytes, "output is missing");
    Ok(tonic.cpu()? - before)
}

pub(crate) fn execs(count: u64) -> Result<f64> {
    let mut tonic = Tonic::start()?;
    let before = tonic.cpu()?;
    for _ in 0..count {
        tonic.exec(&["out=x"])?;
    }
    Ok((tonic.cpu()? - before) * 1e6 / count as f64)
}
