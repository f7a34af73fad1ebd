//! Everything between this blade and its controller: identity, the mTLS side of the node API, heartbeats.
//!
//! ```text
//! no identity ─ Join (token, CSR) ─► identity ─ heartbeat … ─┬─ half of its life is over: Renew ─► newer identity
//!      ▲                                                     │
//!      └────────────── the certificate ended unrenewed ──────┘
//! ```
//! The key never leaves the blade; a new one is made for each certificate. Connections that come before the first
//! identity wait in the listener's backlog. The server takes a newer identity for the next connection, without restart.

mod identity;
mod tls;

use crate::{
    agent::Blade,
    api::NodeApi,
    capacity::Machine,
    config::ControllerConfig,
    epoch::{EpochGuard, Origin},
    fence::Fence,
    sparing::Sparing,
};
use anyhow::{Context, Result};
use far_proto::controller::{HeartbeatRequest, JoinRequest, RenewRequest, blades_client::BladesClient};
use futures::StreamExt;
use identity::{Identity, IdentityFile, Request};
use rustls::ServerConfig;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// Name in the controller's certificate, as server and as client.
pub(crate) const CONTROLLER_NAME: &str = "controller.far.internal";
/// First and longest wait after a failed call.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// A call of the controller that takes longer has failed.
const CALL_LIMIT: Duration = Duration::from_secs(20);
/// From accept to a finished TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes at a time; more connections are closed.
const MAX_HANDSHAKES: usize = 64;

/// The remote side of a blade, bound and not yet known to its controller.
#[derive(Debug)]
pub(crate) struct Remote {
    blade: String,
    identity_path: PathBuf,
    config: ControllerConfig,
    listener: TcpListener,
    endpoint: String,
    api: NodeApi,
}

impl Remote {
    /// Binds the node API's port.
    pub(crate) async fn bind(blade: &str, state_dir: &Path, config: ControllerConfig, api: NodeApi) -> Result<Self> {
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("binding --listen {}", config.listen))?;
        let bound = listener.local_addr().context("reading the bound address")?;
        let endpoint = config.advertise.clone().unwrap_or_else(|| bound.to_string());
        let identity_path = state_dir.join("identity.json");
        Ok(Self {
            blade: blade.to_owned(),
            identity_path,
            config,
            listener,
            endpoint,
            api,
        })
    }

    /// Where the controller reaches this blade.
    pub(crate) fn address(&self) -> String {
        self.endpoint.clone()
    }

    /// Serves and reports until `shutdown`.
    pub(crate) async fn run(
        self,
        machine: Arc<Machine>,
        epochs: Arc<EpochGuard>,
        node: Arc<Blade>,
        shutdown: CancellationToken,
    ) -> Result<()> {
        let (tls, configs) = watch::channel(None);
        let Self {
            blade,
            identity_path,
            config,
            listener,
            endpoint,
            api,
        } = self;
        let agent = Agent {
            blade,
            file: IdentityFile::new(identity_path),
            config,
            endpoint,
            machine,
            epochs,
            node,
            tls,
        };
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            served = serve(listener, configs, api, shutdown.clone()) => served,
            never = agent.run() => match never {},
        }
    }
}

async fn serve(
    listener: TcpListener,
    configs: watch::Receiver<Option<Arc<ServerConfig>>>,
    api: NodeApi,
    shutdown: CancellationToken,
) -> Result<()> {
    let (send, connections) = mpsc::channel(16);
    let incoming = ReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
    let server = tonic::transport::Server::builder()
        .add_service(api.clone().into_server())
        .add_service(api.clone().into_inside_server())
        .add_service(api.into_network_server())
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned());
    tokio::select! {
        served = server => served.context("serving the node API"),
        () = accept(listener, configs, send) => Ok(()),
    }
}

async fn accept(
    listener: TcpListener,
    mut configs: watch::Receiver<Option<Arc<ServerConfig>>>,
    send: mpsc::Sender<TlsStream<TcpStream>>,
) {
    if configs.wait_for(Option::is_some).await.is_err() {
        return;
    }
    let mut handshakes = JoinSet::new();
    // Anybody who reaches the port can provoke these.
    let refusals = Arc::new(Sparing::default());
    loop {
        tokio::select! {
            Some(_) = handshakes.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) if handshakes.len() < MAX_HANDSHAKES => {
                    let Some(config) = configs.borrow().clone() else { continue };
                    let (send, refusals) = (send.clone(), refusals.clone());
                    handshakes.spawn(async move {
                        match timeout(HANDSHAKE_LIMIT, TlsAcceptor::from(config).accept(stream)).await {
                            Ok(Ok(stream)) => { let _ = send.send(stream).await; }
                            Ok(Err(error)) => if let Some(refusal) = refusals.next() {
                                tracing::warn!(refusal, %peer, %error, "a caller of the node API was refused");
                            },
                            Err(_) => if let Some(refusal) = refusals.next() {
                                tracing::warn!(refusal, %peer, "a caller of the node API did not finish its handshake");
                            },
                        }
                    });
                }
                Ok((stream, _)) => drop(stream),
                // EMFILE and its like.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
        }
    }
}

/// The part that calls the controller.
struct Agent {
    blade: String,
    file: IdentityFile,
    config: ControllerConfig,
    endpoint: String,
    machine: Arc<Machine>,
    epochs: Arc<EpochGuard>,
    node: Arc<Blade>,
    tls: watch::Sender<Option<Arc<ServerConfig>>>,
}

impl Agent {
    async fn run(self) -> std::convert::Infallible {
        let mut failures = 0;
        loop {
            match self.live(&mut failures).await {
                Ok(never) => match never {},
                Err(error) => {
                    tracing::warn!(controller = %self.config.url, error = %format!("{error:#}"), "the controller cannot be reached: trying again");
                    tokio::time::sleep(backoff(failures)).await;
                    failures += 1;
                }
            }
        }
    }

    /// Gets an identity, then heartbeats on one connection until something fails.
    async fn live(&self, failures: &mut u32) -> Result<std::convert::Infallible> {
        let mut identity = match self.file.load()? {
            Some(identity) if identity.not_after > SystemTime::now() => identity,
            Some(_) | None => self.join().await?,
        };
        self.use_identity(&identity)?;
        let mut client = self.connect(Some(&identity)).await?;
        loop {
            if identity.renew_at <= SystemTime::now() {
                identity = self.renew(&mut client).await?;
                self.use_identity(&identity)?;
                client = self.connect(Some(&identity)).await?;
            }
            let pause = self.heartbeat(&mut client).await?;
            *failures = 0;
            let renew_in = identity.renew_at.duration_since(SystemTime::now()).unwrap_or_default();
            tokio::select! {
                () = tokio::time::sleep_until(Instant::now() + pause.min(renew_in)) => {}
                () = self.node.images_changed.notified() => {}
            }
        }
    }

    fn use_identity(&self, identity: &Identity) -> Result<()> {
        let config = tls::server_config(identity).context("using the blade's certificate")?;
        self.tls.send_replace(Some(Arc::new(config)));
        Ok(())
    }

    async fn connect(&self, identity: Option<&Identity>) -> Result<BladesClient<Channel>> {
        let ca = match identity {
            Some(identity) => identity.ca_pem.clone(),
            None => {
                let path = &self.config.ca_file;
                std::fs::read_to_string(path).with_context(|| format!("reading --controller-ca {}", path.display()))?
            }
        };
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(ca))
            .domain_name(CONTROLLER_NAME);
        let tls = match identity {
            Some(identity) => tls.identity(tonic::transport::Identity::from_pem(
                &identity.certificate_pem,
                &identity.key_pem,
            )),
            None => tls,
        };
        let channel = Endpoint::from_shared(self.config.url.clone())
            .context("reading --controller")?
            .timeout(CALL_LIMIT)
            .connect_timeout(CALL_LIMIT)
            .tls_config(tls)
            .context("preparing TLS")?
            .connect()
            .await
            .context("connecting")?;
        Ok(BladesClient::new(channel))
    }

    async fn join(&self) -> Result<Identity> {
        let path = self
            .config
            .token_file
            .as_ref()
            .context("this blade has no valid certificate: give a fresh token with --join-token-file")?;
        let token = std::fs::read_to_string(path).with_context(|| {
            format!(
                "this blade has no valid certificate, and the join token {} cannot be read",
                path.display()
            )
        })?;
        let request = Request::new(&self.blade)?;
        let mut client = self.connect(None).await?;
        let answer = client
            .join(JoinRequest {
                token: token.trim().to_owned(),
                blade: self.blade.clone(),
                csr_pem: request.csr_pem.clone(),
            })
            .await
            .context("joining")?
            .into_inner();
        let identity = request.answered(answer.certificate_pem, answer.ca_pem)?;
        self.file.keep(&identity)?;
        // Used up: nobody shall find it and wonder.
        if let Err(error) = crate::files::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "the used join token cannot be removed");
        }
        tracing::info!(blade = %self.blade, "the blade joined its controller");
        Ok(identity)
    }

    async fn renew(&self, client: &mut BladesClient<Channel>) -> Result<Identity> {
        let request = Request::new(&self.blade)?;
        let answer = client
            .renew(RenewRequest {
                csr_pem: request.csr_pem.clone(),
            })
            .await
            .context("renewing the certificate")?
            .into_inner();
        let identity = request.answered(answer.certificate_pem, answer.ca_pem)?;
        self.file.keep(&identity)?;
        tracing::info!(blade = %self.blade, "the blade's certificate was renewed");
        Ok(identity)
    }

    /// Answers how long until the next one.
    async fn heartbeat(&self, client: &mut BladesClient<Channel>) -> Result<Duration> {
        let (machine, images) = (self.machine.clone(), self.node.images.clone());
        let capacity = tokio::task::spawn_blocking(move || machine.capacity(&*images)).await?;
        let request = HeartbeatRequest {
            endpoint: self.endpoint.clone(),
            capacity: Some(capacity),
            labels: self.config.labels.clone().into_iter().collect(),
        };
        let sent = Fence::now();
        let answer = client
            .heartbeat(request)
            .await
            .context("sending a heartbeat")?
            .into_inner();
        let old = match answer.epoch {
            0 => None,
            epoch => self.epochs.check(Origin::Controller, epoch).err(),
        };
        match old {
            Some(error) => tracing::warn!(%error, "a heartbeat was answered by an old controller"),
            None if answer.unreached => tracing::warn!("the controller cannot call this blade"),
            None => {
                let node = self.node.clone();
                let fence_after = (answer.fence_after_ms > 0).then(|| Duration::from_millis(answer.fence_after_ms));
                let renewed = tokio::task::spawn_blocking(move || node.fence.renew(sent, fence_after)).await?;
                renewed.context("renewing the blade's lease")?;
            }
        }
        Ok(Duration::from_millis(answer.interval_ms.clamp(100, 60_000).into()))
    }
}

/// Doubling waits with jitter, so that many blades do not come back at once.
fn backoff(failures: u32) -> Duration {
    let (first, longest) = BACKOFF;
    let wait = first.saturating_mul(1 << failures.min(16)).min(longest);
    wait.mul_f64(rand::random_range(0.5..1.0))
}

#[cfg(test)]
mod tests;
