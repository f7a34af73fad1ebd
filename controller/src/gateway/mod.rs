//! The user gateway (`far.gateway.v1`): exec, cp, port-forward, stats and logs of agents, from anywhere, with the caller's
//! own Kubernetes credentials.
//!
//! ```text
//! far ──TLS, Bearer token──► door ─► access (TokenReview, SubjectAccessReview) ─► find (API) ─► proxy ──mTLS──► far-node
//! ```
//! Back-pressure goes from end to end: a message is taken from one side when the other has room. A call to a blade uses a
//! connection of its own beside the controller's, whose window holds a full stream of every call that may be open.
//!
//! Invariant: what a caller sends decides neither which blade is called nor as whom. Nothing of a call's content is logged.

mod access;
mod calls;
mod find;
mod proxy;
mod publish;
mod recent;

use std::{net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context, Result, bail};
use far_proto::{gateway::output_server::OutputServer, node::inside_server::InsideServer};
use kube::Client;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

pub(crate) use access::Action;

use crate::{Config, ca::Ca, door, files, metrics::Metrics, world::World};

/// Callers that have shown a good token.
const MAX_KNOWN: usize = 1024;
/// Of them, of one user: each of a user's calls may come on a connection of its own.
const MAX_KNOWN_PER_USER: usize = calls::MAX_CALLS_PER_USER;
/// Calls of one connection; `far port-forward` opens 60.
const MAX_STREAMS: u32 = 64;
/// What a caller may send ahead in one call, bytes; a connection's window holds that of every call.
const CALL_WINDOW: u32 = 128 * 1024;
/// All headers of a call, bytes: a token has 16 KiB at most.
const MAX_HEADERS: u32 = 32 * 1024;
/// A caller that is silent is asked whether it lives.
const PING: std::time::Duration = std::time::Duration::from_secs(30);

/// What serves callers; clones share everything.
#[derive(Clone)]
pub(crate) struct Gateway {
    client: Client,
    world: Arc<World>,
    access: Arc<access::Access>,
    calls: calls::Calls,
    metrics: Metrics,
    stop: CancellationToken,
}

/// Starts the gateway where the configuration asks for one; answers its address.
///
/// # Errors
/// It cannot be bound, or nobody could find it.
pub(crate) async fn start(
    config: &Config,
    client: Client,
    ca: &Ca,
    world: Arc<World>,
    metrics: Metrics,
    stop: &CancellationToken,
    tasks: &mut JoinSet<Result<()>>,
) -> Result<Option<SocketAddr>> {
    let Some(address) = config.gateway_listen else {
        return Ok(None);
    };
    let listener = bind(address, &config.state_dir.join("gateway-port"))
        .await
        .with_context(|| format!("binding --gateway-listen {address}"))?;
    let bound = listener.local_addr().context("reading the bound address")?;
    let endpoint = match &config.gateway_advertise {
        Some(endpoint) => endpoint.clone(),
        None if bound.ip().is_unspecified() => {
            bail!(
                "--gateway-listen {address} is every address of this machine: say with --gateway-advertise which one users reach"
            )
        }
        None => bound.to_string(),
    };
    let own = ca.own_identity(&config.server_name)?;
    let tls = door::tls(&own, None).context("preparing the gateway's TLS")?;
    let (accepting, visitors) = door::open(listener, tls, MAX_KNOWN, MAX_KNOWN_PER_USER);
    let gateway = Gateway {
        access: Arc::new(access::Access::new(
            client.clone(),
            config.gateway_audience.clone(),
            metrics.clone(),
        )),
        calls: calls::Calls::new(metrics.clone()),
        client: client.clone(),
        world,
        metrics,
        stop: stop.clone(),
    };
    let mut server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CALL_WINDOW * MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keepalive_interval(Some(PING));
    let router = server
        .add_service(InsideServer::new(gateway.clone()))
        .add_service(OutputServer::new(gateway));
    let stopped = stop.clone().cancelled_owned();
    tasks.spawn(async move {
        tokio::select! {
            served = router.serve_with_incoming_shutdown(visitors, stopped) => served.context("serving the gateway"),
            never = accepting => match never {},
        }
    });
    let (ca_pem, stopped) = (ca.certificate_pem().to_owned(), stop.clone());
    tracing::info!(address = %bound, endpoint, "the user gateway serves");
    tasks.spawn(async move {
        publish::publish(client, endpoint, ca_pem, stopped).await;
        Ok(())
    });
    Ok(Some(bound))
}

/// With port 0 the port of the last time is taken again where it is free: whoever is connected finds the gateway there.
async fn bind(address: SocketAddr, remembered: &Path) -> std::io::Result<TcpListener> {
    if address.port() != 0 {
        return TcpListener::bind(address).await;
    }
    let last = std::fs::read_to_string(remembered).ok();
    if let Some(port) = last.and_then(|text| text.trim().parse::<u16>().ok())
        && let Ok(listener) = TcpListener::bind(SocketAddr::new(address.ip(), port)).await
    {
        return Ok(listener);
    }
    let listener = TcpListener::bind(address).await?;
    files::write_private(remembered, listener.local_addr()?.port().to_string().as_bytes())?;
    Ok(listener)
}
