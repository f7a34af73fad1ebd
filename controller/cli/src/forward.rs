//! `far port-forward`: local ports on 127.0.0.1 that lead to ports of a running agent, until Ctrl-C.

use anyhow::Context;
use far_proto::node::{Piece, PortForwardRequest, PortForwardStart, port_forward_reply, port_forward_request::Kind};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};

use crate::{
    cluster::Cluster,
    exit::Outcome,
    folders::Folders,
    inside::{self, Inside},
    node::NodeError,
    output,
};

/// Connections at a time; more wait in the kernel's backlog. A blade takes 64 calls per agent.
const MAX_CONNECTIONS: usize = 60;
/// Bytes read from a local connection at once.
const READ_STEP: usize = 16 << 10;

pub(crate) const EXAMPLES: &str = "\
Examples:
  far port-forward embedder-worker-01 8080:80
  far port-forward embedder-worker-01 8080:80 5432     # the same port on both sides
  far port-forward embedder-worker-01 :80              # a free local port, which is printed

Stays until Ctrl-C. Listens on 127.0.0.1 only.";

/// A local port (0: the kernel picks) and the agent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    local: u16,
    remote: u16,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ForwardArgs {
    /// Name of the FarAgent
    #[arg(value_parser = crate::args::agent_name)]
    agent: String,
    /// [LOCAL]:REMOTE, or one port for both
    #[arg(required = true, value_name = "LOCAL:REMOTE", value_parser = parse_ports)]
    ports: Vec<Ports>,
}

fn parse_ports(text: &str) -> Result<Ports, String> {
    let wrong = || format!("{text:?} is not LOCAL:REMOTE, :REMOTE or PORT, with ports of 1 to 65535");
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong);
    match text.split_once(':') {
        None => port(text).map(|both| Ports {
            local: both,
            remote: both,
        }),
        Some(("", remote)) => Ok(Ports {
            local: 0,
            remote: port(remote)?,
        }),
        Some((local, remote)) => Ok(Ports {
            local: port(local)?,
            remote: port(remote)?,
        }),
    }
}

pub(crate) async fn forward(cluster: &Cluster, folders: &Folders, args: &ForwardArgs) -> anyhow::Result<Outcome> {
    let inside = Inside::find(cluster, folders, &args.agent).await?;
    let mut listening = JoinSet::new();
    for ports in &args.ports {
        let listener = TcpListener::bind(("127.0.0.1", ports.local))
            .await
            .with_context(|| format!("listening on 127.0.0.1:{}", ports.local))?;
        let local = listener.local_addr().context("reading the local port")?;
        output::line(&format!("Forwarding {local} -> {}:{}", args.agent, ports.remote));
        listening.spawn(listen(listener, ports.remote, inside.clone()));
    }
    tokio::select! {
        ended = tokio::signal::ctrl_c() => {
            ended.context("waiting for Ctrl-C")?;
            Ok(Outcome::Success)
        }
        Some(broken) = listening.join_next() => match broken {
            Ok(error) => Err(error),
            Err(error) => Err(error.into()),
        },
    }
}

/// Takes connections until the agent is gone.
async fn listen(listener: TcpListener, port: u16, inside: Inside) -> anyhow::Error {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(ended) = connections.join_next() => match ended {
                Ok(Ok(())) => {}
                Ok(Err(Broken::Agent(error))) => return error,
                Ok(Err(Broken::Connection(error))) => output::note(&format!("far: {}", crate::exit::chain(&error))),
                Err(error) => return error.into(),
            },
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connect(stream, port, inside.clone()));
                }
                Err(error) => return anyhow::Error::from(error).context("taking a connection"),
            },
        }
    }
}

enum Broken {
    /// This connection only.
    Connection(anyhow::Error),
    /// The agent does not run any more.
    Agent(anyhow::Error),
}

async fn connect(stream: TcpStream, port: u16, inside: Inside) -> Result<(), Broken> {
    let what = format!("port {port}");
    let mut client = inside.fresh_client().await.map_err(Broken::Connection)?;
    let refused = |status: tonic::Status| {
        let is_over = NodeError::of("")(status.clone()).is_not_running();
        let error = inside.refused(&what, status);
        if is_over {
            Broken::Agent(error)
        } else {
            Broken::Connection(error)
        }
    };
    let (requests, messages) = inside::queue();
    let start = Kind::Start(PortForwardStart {
        identity: Some(inside.identity.clone()),
        port: port.into(),
    });
    let _ = requests.send(PortForwardRequest { kind: Some(start) }).await;
    let mut replies = client.port_forward(messages).await.map_err(refused)?.into_inner();
    let (read, mut write) = stream.into_split();
    let reading = read_all(read, requests);
    let writing = async {
        while let Some(reply) = replies.message().await.map_err(refused)? {
            let Some(port_forward_reply::Kind::Data(piece)) = reply.kind else {
                continue;
            };
            let written = write.write_all(&piece.data).await;
            let written = match (written, piece.last) {
                (Ok(()), true) => write.shutdown().await,
                (written, _) => written,
            };
            if written.is_err() {
                // The local program closed: dropping the call closes the agent's end.
                return Ok(());
            }
        }
        Ok(())
    };
    // The call's end is the connection's end; the local end alone is told to the agent.
    tokio::select! {
        ended = writing => ended,
        never = reading => match never {},
    }
}

async fn read_all(
    mut read: tokio::net::tcp::OwnedReadHalf,
    requests: mpsc::Sender<PortForwardRequest>,
) -> std::convert::Infallible {
    let mut buffer = vec![0; READ_STEP];
    loop {
        let length = read.read(&mut buffer).await.unwrap_or(0);
        let piece = Piece {
            data: buffer[..length].to_vec(),
            last: length == 0,
        };
        let sent = requests
            .send(PortForwardRequest {
                kind: Some(Kind::Data(piece)),
            })
            .await;
        if sent.is_err() || length == 0 {
            return std::future::pending().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_kubectl_reads_them() {
        for (text, expected) in [
            ("8080:80", Some((8080, 80))),
            ("80", Some((80, 80))),
            (":80", Some((0, 80))),
            ("0:80", None),
            ("80:", None),
            ("80:0", None),
            ("70000", None),
            ("a:b", None),
            ("", None),
        ] {
            let expected = expected.map(|(local, remote)| Ports { local, remote });
            assert_eq!(parse_ports(text).ok(), expected, "{text:?}");
        }
    }
}
