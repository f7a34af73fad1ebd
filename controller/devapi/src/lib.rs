//! Embedded Kubernetes API for one machine: what `far up` and the tests use where there is no cluster. It serves the
//! kinds FAR needs with the real server's semantics (versions, watches, server-side apply, CRDs with CEL rules, RBAC), to
//! an administrator and to service accounts, from one file. Not for production, and not a whole Kubernetes: see the README for what differs.
//!
//! ```text
//! server (TLS, token, routes) ─► handlers (one per verb) ─► store (memory + fsynced file + bounded history)
//!        │                            │
//!        ├─► auth (tokens, RBAC)      │
//!        └─► api (kinds, discovery)   └─► schema, patch, admission, table (pure)      gc (owners, namespaces, CRDs)
//! ```
#![forbid(unsafe_code)]

mod admission;
mod api;
mod app;
mod auth;
mod error;
pub mod faults;
mod gc;
mod handlers;
mod jsonpath;
mod meta;
mod patch;
mod protobuf;
mod request;
mod schema;
mod selector;
mod server;
mod store;
mod table;
mod tls;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::app::App;
pub use crate::faults::Faults;
use crate::handlers::{Target, write};

/// Namespaces that are there from the start.
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// How to start a server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Store, CA and token; made with mode 0700 when missing.
    pub data_dir: PathBuf,
    /// Loopback address; port 0 takes the last run's port again where it is free, else one that the kernel picks.
    pub listen: SocketAddr,
    /// Serve `/debug/faults`. The handle in [`DevApi::faults`] works in any case.
    pub enable_fault_injection: bool,
}

impl Config {
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            enable_fault_injection: false,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0} is not a loopback address: the embedded API serves this machine only")]
    NotLoopback(SocketAddr),
    #[error("making the data folder {path}")]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("listening on {address}: is the port taken?")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("opening the API's store")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("setting up the API's identity")]
    Tls(#[from] tls::TlsError),
    #[error("making the first objects: {0}")]
    Seed(String),
}

/// A running server. Dropping it stops it without waiting; [`DevApi::shutdown`] waits.
pub struct DevApi {
    /// `https://127.0.0.1:port`.
    pub url: String,
    /// kubeconfig text with CA and token, context `far`.
    pub kubeconfig: String,
    pub faults: Faults,
    app: Arc<App>,
    tasks: Vec<JoinHandle<()>>,
}

impl DevApi {
    pub async fn start(config: Config) -> Result<Self, StartError> {
        if !config.listen.ip().is_loopback() {
            return Err(StartError::NotLoopback(config.listen));
        }
        make_folder(&config.data_dir)?;
        let identity = tls::Identity::load_or_make(&config.data_dir)?;
        let path = config.data_dir.join("store.redb");
        let opened = tokio::task::spawn_blocking(move || store::Store::open(&path)).await;
        let store = opened
            .map_err(|error| StartError::Store(error.into()))?
            .map_err(|error| StartError::Store(error.into()))?;
        let (listener, address) = listen(&config).await?;
        let registry = api::registry::Registry::new(&app::stored_crds(&store));
        let faults = Faults::default();
        let app = Arc::new(App {
            store,
            registry,
            faults: faults.clone(),
            debug_faults: config.enable_fault_injection,
            tokens: auth::Tokens::new(identity.token.clone()),
            stopping: CancellationToken::new(),
            address: address.to_string(),
        });
        seed(&app).await?;
        let url = format!("https://{address}");
        let tasks = vec![
            tokio::spawn(server::serve(app.clone(), listener, identity.server.clone())),
            tokio::spawn(gc::run(app.clone())),
        ];
        tracing::info!(url, "the embedded API serves");
        Ok(Self {
            kubeconfig: identity.kubeconfig(&url),
            url,
            faults,
            app,
            tasks,
        })
    }

    /// Ends watches, lets running requests finish (at most 5 s), and closes the store.
    pub async fn shutdown(mut self) {
        self.app.stopping.cancel();
        for task in self.tasks.drain(..) {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task of the embedded API failed");
            }
        }
        let app = self.app.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || app.store.close()).await {
            tracing::error!(%error, "closing the store failed");
        }
    }

    /// Forgets the rests of paged lists, as time does: their tokens answer 410.
    pub fn expire_pages(&self) {
        self.app.store.forget_snapshots();
    }
}

impl DevApi {
    /// Ends every token that service accounts have, as time does.
    pub fn expire_tokens(&self) {
        self.app.tokens.expire();
    }
}

impl Drop for DevApi {
    fn drop(&mut self) {
        self.app.stopping.cancel();
    }
}

/// Writes a file for this user only (0600), by atomic rename.
pub fn write_private_file(path: &Path, text: &str) -> Result<(), tls::TlsError> {
    tls::write_private(path, text)
}

pub use tls::TlsError;

/// With port 0 the port of the last run is taken again where it is free: a server that was killed and started again
/// is then where its clients still look for it.
async fn listen(config: &Config) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen {
        address: config.listen,
        source,
    };
    let remembered = config.data_dir.join("port");
    let last = std::fs::read_to_string(&remembered)
        .ok()
        .and_then(|text| text.trim().parse::<u16>().ok());
    let mut listener = None;
    if let (0, Some(port)) = (config.listen.port(), last) {
        listener = TcpListener::bind(SocketAddr::new(config.listen.ip(), port)).await.ok();
    }
    let listener = match listener {
        Some(listener) => listener,
        None => TcpListener::bind(config.listen).await.map_err(failed)?,
    };
    let address = listener.local_addr().map_err(failed)?;
    tls::write_private(&remembered, &address.port().to_string())?;
    Ok((listener, address))
}

fn make_folder(path: &Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| StartError::Folder {
        path: path.to_owned(),
        source,
    })
}

async fn seed(app: &App) -> Result<(), StartError> {
    let snapshot = app.registry.snapshot();
    let namespaces = snapshot.find("", "v1", "namespaces").expect("a built-in kind").clone();
    for name in NAMESPACES {
        let target = Target {
            resource: namespaces.clone(),
            namespace: None,
            name: name.into(),
            subresource: String::new(),
        };
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        write::ensure(app, target, object)
            .await
            .map_err(|error| StartError::Seed(error.to_string()))?;
    }
    Ok(())
}
