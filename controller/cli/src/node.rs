//! The node agent's socket on this machine.

use std::{
    io,
    path::{Path, PathBuf},
};

use far_proto::node::{inside_client::InsideClient, network_client::NetworkClient, node_client::NodeClient};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::gateway::{Caller, GatewayError, Line};

/// Largest answer: a list of all agents of a blade with their tails.
pub(crate) const MAX_ANSWER_BYTES: usize = 64 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("no blade runs on this machine: there is no {socket}; `far up` starts one")]
    NoSocket { socket: PathBuf },
    #[error("the node agent does not answer on {socket}: `far status` shows whether it runs, `far up` starts it")]
    Connect {
        socket: PathBuf,
        source: tonic::transport::Error,
    },
    #[error("{socket} is not this user's: remove it, or choose another folder with FAR_RUN")]
    Foreign { socket: PathBuf, source: io::Error },
    #[error(transparent)]
    Gateway(#[from] GatewayError),
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

    /// Says itself that the call may be made again. A broken connection says so as well, and the next call that it is broken.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if status.code() == tonic::Code::Unavailable)
    }

    /// Nobody serves the socket.
    pub(crate) fn is_no_blade(&self) -> bool {
        matches!(self, Self::NoSocket { .. } | Self::Connect { .. })
    }

    /// The way to the blade was lost, or is not there now.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Gateway(error) => error.is_passing(),
            Self::Refused { status, .. } => {
                // What tonic itself says of a broken connection has a source.
                status.code() == tonic::Code::Unavailable || std::error::Error::source(&**status).is_some()
            }
            Self::NoSocket { .. } | Self::Connect { .. } | Self::Foreign { .. } => false,
        }
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
pub(crate) async fn connect_inside(socket: &Path) -> Result<InsideClient<Line>, NodeError> {
    let channel = channel(socket).await?;
    Ok(InsideClient::with_interceptor(channel, Caller::default()).max_decoding_message_size(MAX_ANSWER_BYTES))
}

/// Connects to what the agents of this machine's blade may reach.
pub(crate) async fn connect_network(socket: &Path) -> Result<NetworkClient<Channel>, NodeError> {
    let channel = channel(socket).await?;
    Ok(NetworkClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES))
}

async fn channel(socket: &Path) -> Result<Channel, NodeError> {
    if !socket.exists() {
        return Err(NodeError::NoSocket {
            socket: socket.to_path_buf(),
        });
    }
    if let Err(source) = open(socket).await
        && source.kind() == io::ErrorKind::PermissionDenied
    {
        return Err(NodeError::Foreign {
            socket: socket.to_path_buf(),
            source,
        });
    }
    let path = socket.to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { open(&path).await.map(TokioIo::new) }
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

/// Whether the node agent's socket is there and somebody listens on it.
pub(crate) async fn is_served(socket: &Path) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    !open(socket)
        .await
        .is_err_and(|error| matches!(error.kind(), NotFound | ConnectionRefused | PermissionDenied))
}

/// Speaks to nobody but this user and root: in /tmp another user may have made the folder first, and would be told
/// secrets. The kernel says who listens (`SO_PEERCRED`, unix(7)).
async fn open(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket).await?;
    let (owner, me) = (stream.peer_cred()?.uid(), nix::unistd::getuid().as_raw());
    if owner != me && owner != 0 {
        let why = format!("user {owner} listens on it");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, process::CommandExt};

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

    #[tokio::test]
    async fn a_socket_that_another_user_serves_is_not_spoken_to() {
        let test = "a_socket_that_another_user_serves_is_not_spoken_to";
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let socket = folder.path().join("node.sock");
        let squatter = std::process::Command::new("perl")
            .args(["-MIO::Socket::UNIX", "-e"])
            .arg("$s = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 8) or die; chmod 0777, $ARGV[0]; sleep 600")
            .arg(&socket)
            // nobody on Debian and Ubuntu.
            .uid(65534)
            .gid(65534)
            .spawn();
        let mut squatter = match squatter {
            Ok(squatter) => squatter,
            Err(error) => return eprintln!("SKIPPED {test}: starting perl as another user: {error}"),
        };
        while std::fs::metadata(&socket).map_or(true, |seen| seen.permissions().mode() & 0o777 != 0o777) {
            assert!(
                squatter.try_wait().unwrap().is_none(),
                "the other user's program listens"
            );
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let connected = connect(&socket).await;
        squatter.kill().unwrap();
        squatter.wait().unwrap();
        let error = crate::exit::chain(&connected.unwrap_err().into());
        assert!(error.contains("user 65534") && error.contains("FAR_RUN"), "{error}");
    }
}
