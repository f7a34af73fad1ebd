//! The node agent's socket on this machine.

use std::path::{Path, PathBuf};

use far_proto::node::{inside_client::InsideClient, node_client::NodeClient};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

/// Largest answer: a list of all agents of a blade with their tails.
const MAX_ANSWER_BYTES: usize = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("no blade runs on this machine: there is no {socket}; `far up` starts one")]
    NoSocket { socket: PathBuf },
    #[error("the node agent does not answer on {socket}: `far status` shows whether it runs, `far up` starts it")]
    Connect {
        socket: PathBuf,
        source: tonic::transport::Error,
    },
    #[error("{what}: {}", .status.message())]
    Refused { what: String, status: Box<tonic::Status> },
}

impl NodeError {
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if status.code() == tonic::Code::NotFound)
    }

    pub(crate) fn is_not_running(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if status.code() == tonic::Code::FailedPrecondition)
    }

    /// Turns a call's status into an error that names the call.
    pub(crate) fn of(what: impl Into<String>) -> impl FnOnce(tonic::Status) -> Self {
        let what = what.into();
        move |status| Self::Refused {
            what,
            status: Box::new(status),
        }
    }
}

/// Connects to the node agent at this socket.
pub(crate) async fn connect(socket: &Path) -> Result<NodeClient<Channel>, NodeError> {
    let channel = channel(socket).await?;
    Ok(NodeClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
}

/// Connects to what people do inside the agents of this machine's blade.
pub(crate) async fn connect_inside(socket: &Path) -> Result<InsideClient<Channel>, NodeError> {
    let channel = channel(socket).await?;
    Ok(InsideClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
}

async fn channel(socket: &Path) -> Result<Channel, NodeError> {
    if !socket.exists() {
        return Err(NodeError::NoSocket {
            socket: socket.to_path_buf(),
        });
    }
    let path = socket.to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is only the request's authority; the connector ignores it.
    Endpoint::from_static("http://node.far")
        .connect_with_connector(connector)
        .await
        .map_err(|source| NodeError::Connect {
            socket: socket.to_path_buf(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_blade_that_is_not_there_is_said_with_the_way_to_start_it() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("node.sock");
        let error = connect(&socket).await.unwrap_err().to_string();
        assert!(error.contains("no blade runs") && error.contains("far up"), "{error}");
        // Left behind by a killed node agent.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let error = connect(&socket).await.unwrap_err().to_string();
        assert!(error.contains("does not answer") && error.contains("far up"), "{error}");
    }
}
