//! The blade's own socket: `node.sock`, mode 0600 in a folder of mode 0700.

use crate::api::NodeApi;
use anyhow::{Context, Result, bail};
use std::{fs, os::unix::fs::PermissionsExt, path::Path};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

/// Binds the socket in place of one that nobody serves any more.
///
/// # Errors
/// Another process serves it, or it cannot be bound.
pub(crate) async fn bind(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        bail!(
            "another far-node serves {}: stop it, or use another --run-dir",
            path.display()
        );
    }
    // Bound beside and renamed: the path never names a socket with other permissions or one that nobody accepts.
    let beside = path.with_extension("new");
    crate::files::remove_file(&beside).with_context(|| format!("removing {}", beside.display()))?;
    let socket = UnixListener::bind(&beside).with_context(|| format!("binding {}", beside.display()))?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&beside, path))
        .with_context(|| format!("binding {}", path.display()))?;
    Ok(socket)
}

/// Serves until `shutdown`.
pub(crate) async fn serve(socket: UnixListener, api: NodeApi, shutdown: CancellationToken) -> Result<()> {
    tonic::transport::Server::builder()
        .add_service(api.clone().into_server())
        .add_service(api.clone().into_inside_server())
        .add_service(api.into_network_server())
        .serve_with_incoming_shutdown(UnixListenerStream::new(socket), shutdown.cancelled_owned())
        .await
        .context("serving the node API on the Unix socket")
}
