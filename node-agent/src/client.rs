//! A client of the node API over the blade's Unix socket, for `far` and for tests.

use far_proto::node::{inside_client::InsideClient, network_client::NetworkClient, node_client::NodeClient};
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// No far-node answers at the socket.
#[derive(Debug, thiserror::Error)]
#[error("connecting to far-node at {}", socket.display())]
pub struct ConnectError {
    /// The socket.
    pub socket: PathBuf,
    /// Why.
    pub source: tonic::transport::Error,
}

/// Connects to what people do inside agents (exec, cp, port-forward, stats) at a Unix socket.
///
/// # Errors
/// Nobody listens there.
pub async fn connect_inside_unix(socket: &Path) -> Result<InsideClient<Channel>, ConnectError> {
    let channel = channel(socket).await?;
    Ok(InsideClient::new(channel).max_decoding_message_size(16 << 20))
}

/// Connects to what agents may reach at a Unix socket.
///
/// # Errors
/// Nobody listens there.
pub async fn connect_network_unix(socket: &Path) -> Result<NetworkClient<Channel>, ConnectError> {
    Ok(NetworkClient::new(channel(socket).await?).max_decoding_message_size(16 << 20))
}

/// Connects to the node API at a Unix socket (`$FAR_RUN/node.sock`).
///
/// # Errors
/// Nobody listens there.
pub async fn connect_unix(socket: &Path) -> Result<NodeClient<Channel>, ConnectError> {
    let channel = channel(socket).await?;
    Ok(NodeClient::new(channel).max_decoding_message_size(16 << 20))
}

async fn channel(socket: &Path) -> Result<Channel, ConnectError> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is only a form: the connector does not look at it.
    Endpoint::from_static("http://blade.invalid")
        .connect_with_connector(connector)
        .await
        .map_err(|source| ConnectError {
            socket: socket.to_owned(),
            source,
        })
}
