//! A TLS listener for tonic that strangers cannot fill: handshakes, connections without a credential and connections with
//! one each have their own bound and time (far-serve's `Connections`).
//!
//! ```text
//! accept ─► handshake ─► Visitor ─first call that shows who it is─► known
//!               └────────────┴─ too late, or its place is needed ─► closed
//! ```

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use far_serve::{Connection, Connections};
use futures::{Stream, future::BoxFuture};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::ca::OwnIdentity;

/// Connections that have not shown who they are; the next one takes the oldest one's place.
const MAX_STRANGERS: usize = 256;
/// From accept to the first call with a credential.
const FIRST_CALL: Duration = Duration::from_secs(20);

/// What went wrong with the TLS set-up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DoorError {
    #[error("reading the certificate or its key")]
    Pem(#[from] rustls::pki_types::pem::Error),
    #[error("preparing TLS")]
    Tls(#[from] rustls::Error),
    #[error("preparing the check of client certificates")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// TLS with the controller's certificate. With `clients` a client certificate of that CA (PEM) is verified where one is shown.
pub(crate) fn tls(own: &OwnIdentity, clients: Option<&str>) -> Result<Arc<ServerConfig>, DoorError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(ca_pem) => {
            let mut roots = RootCertStore::empty();
            for ca in certificates(ca_pem)? {
                roots.add(ca)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let key = PrivateKeyDer::from_pem_slice(own.key_pem.as_bytes())?;
    let mut config = builder.with_single_cert(certificates(&own.certificate_pem)?, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, DoorError> {
    Ok(CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>()?)
}

/// A connection as tonic serves it.
pub(crate) struct Visitor {
    stream: TlsStream<TcpStream>,
    info: Visit,
    overstays: BoxFuture<'static, ()>,
}

/// What calls of a connection know about it, in their extensions.
#[derive(Debug, Clone)]
pub(crate) struct Visit {
    connection: Arc<Connection>,
    certificate: Option<CertificateDer<'static>>,
}

impl Visit {
    /// The verified client certificate, DER.
    pub(crate) fn certificate(&self) -> Option<&[u8]> {
        self.certificate.as_deref()
    }

    /// A call showed who it is. Answers whether there is a place for it.
    pub(crate) fn is_recognised(&self, who: &str) -> bool {
        self.connection.is_recognised(who)
    }
}

/// Takes connections until dropped, at most `max_known` that showed who they are, `max_each` of each; gives them to tonic by
/// the stream. The future does the work and never ends.
pub(crate) fn open(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    max_known: usize,
    max_each: usize,
) -> (
    impl Future<Output = std::convert::Infallible> + Send + 'static,
    impl Stream<Item = io::Result<Visitor>> + Send + 'static,
) {
    let (send, visitors) = mpsc::channel(16);
    let accepting = accept(
        listener,
        TlsAcceptor::from(tls),
        Connections::new(MAX_STRANGERS, max_known, max_each),
        send,
    );
    (accepting, ReceiverStream::new(visitors))
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: Arc<Connections>,
    send: mpsc::Sender<io::Result<Visitor>>,
) -> std::convert::Infallible {
    // Never more than strangers: each task holds one's place until its handshake is done.
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = handshakes.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let connection = Arc::new(connections.admit());
                    let (acceptor, send) = (acceptor.clone(), send.clone());
                    handshakes.spawn(async move {
                        let visitor = tokio::select! {
                            visitor = shake(acceptor, stream, peer, connection.clone()) => visitor,
                            () = connection.overstays(FIRST_CALL) => None,
                        };
                        if let Some(visitor) = visitor {
                            let _ = send.send(Ok(visitor)).await;
                        }
                    });
                }
                // EMFILE and its like: a loop without a pause would free no descriptor.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
        }
    }
}

async fn shake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    connection: Arc<Connection>,
) -> Option<Visitor> {
    stream.set_nodelay(true).ok()?;
    let stream = match acceptor.accept(stream).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%peer, %error, "a caller did not finish its handshake");
            return None;
        }
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).cloned();
    let overstays = {
        let connection = connection.clone();
        Box::pin(async move { connection.overstays(FIRST_CALL).await })
    };
    let info = Visit {
        connection,
        certificate,
    };
    Some(Visitor {
        stream,
        info,
        overstays,
    })
}

impl Connected for Visitor {
    type ConnectInfo = Visit;

    fn connect_info(&self) -> Visit {
        self.info.clone()
    }
}

impl AsyncRead for Visitor {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Polled by every read, so the connection's task wakes for it.
        if self.overstays.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Visitor {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }
}
