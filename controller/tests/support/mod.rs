//! A real controller on an API of its own ([`server`]) with fake blades: in-process node APIs that join with a real token over mTLS.
// Each test binary uses its part of this, and a panic here is a test's report.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod blade;
pub mod inside;
pub mod server;
pub mod users;

use std::{path::PathBuf, time::Duration};

use far_api::{FarAgent, FarNode};
use far_controller::{Config, Running};
use far_testkit::servers::Part;
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use server::Server;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Generous: the machine may be busy. Nothing is asserted about time.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `look` answers something.
pub async fn until<T>(what: &str, look: impl AsyncFnMut() -> Option<T>) -> T {
    until_within(PATIENCE, what, look).await
}

/// The same for what takes its time by design.
pub async fn until_within<T>(patience: Duration, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let seen = tokio::time::timeout(patience, async {
        loop {
            if let Some(seen) = look().await {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    seen.await.unwrap_or_else(|_| panic!("waited in vain for: {what}"))
}

pub struct Cluster {
    pub dir: TempDir,
    pub api: Server,
    pub client: Client,
    controller: Option<(CancellationToken, JoinHandle<anyhow::Result<()>>)>,
    pub address: String,
    /// Of the user gateway, where the controller has one.
    pub gateway: Option<std::net::SocketAddr>,
    pub epoch: u64,
}

impl Cluster {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let mut cluster = Self::without_controller(&[]).await;
        cluster.start_controller(change).await;
        cluster
    }

    /// With the parts of a control plane that a test is about.
    pub async fn start_beside(with: &'static [Part]) -> Self {
        let mut cluster = Self::without_controller(with).await;
        cluster.start_controller(|_| {}).await;
        cluster
    }

    async fn without_controller(with: &'static [Part]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let api = Server::start(dir.path(), with).await;
        Self::on(dir, api).await
    }

    /// On an API that runs; no controller yet.
    pub async fn on(dir: TempDir, api: Server) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let kubeconfig = api.kubeconfig();
        std::fs::write(dir.path().join("kubeconfig"), &kubeconfig).unwrap();
        let kubeconfig = Kubeconfig::from_yaml(&kubeconfig).unwrap();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .unwrap();
        Self {
            dir,
            api,
            client: Client::try_from(config).unwrap(),
            controller: None,
            address: String::new(),
            gateway: None,
            epoch: 0,
        }
    }

    pub fn config(&self) -> Config {
        let mut config = Config::new(self.dir.path().join("controller"));
        config.kubeconfig = Some(self.dir.path().join("kubeconfig"));
        config.install_crds = true;
        config.issue_join_token_file = Some(self.token_file());
        config.ca_out = Some(self.ca_file());
        config.heartbeat_ms = 200;
        config.fence_margin = Duration::from_millis(200);
        config.retry_after = Duration::from_millis(100);
        // Blades keep one address across restarts of the controller.
        if !self.address.is_empty() {
            config.listen = self.address.parse().unwrap();
        }
        config
    }

    pub fn token_file(&self) -> PathBuf {
        self.dir.path().join("join-token")
    }

    pub fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    pub fn new_token(&self, blade: Option<&str>) -> String {
        let tokens = far_controller::tokens::Tokens::new(&self.dir.path().join("controller"));
        tokens.create(blade, Duration::from_secs(600)).unwrap()
    }

    pub async fn start_controller(&mut self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config();
        change(&mut config);
        let shutdown = CancellationToken::new();
        let running: Running = far_controller::start(config, shutdown.clone()).await.unwrap();
        self.address = running.address.to_string();
        self.gateway = running.gateway;
        self.epoch = running.epoch;
        self.controller = Some((shutdown, tokio::spawn(running.wait())));
    }

    /// As a crash: nothing is given back, nothing is finished.
    pub async fn kill_controller(&mut self) {
        if let Some((_, task)) = self.controller.take() {
            task.abort();
            let _ = task.await;
        }
    }

    pub async fn stop_controller(&mut self) {
        if let Some((shutdown, task)) = self.controller.take() {
            shutdown.cancel();
            task.await.unwrap().unwrap();
        }
    }

    pub fn agents(&self) -> Api<FarAgent> {
        Api::namespaced(self.client.clone(), "default")
    }

    pub fn nodes(&self) -> Api<FarNode> {
        Api::all(self.client.clone())
    }

    pub async fn create(&self, name: &str, spec: Value) -> FarAgent {
        let agent =
            json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": name}, "spec": spec});
        self.agents()
            .create(&PostParams::default(), &serde_json::from_value(agent).unwrap())
            .await
            .unwrap()
    }

    pub async fn delete(&self, name: &str) {
        self.agents().delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub async fn take_finalizers_off(&self, name: &str) {
        let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        self.agents().patch(name, &Default::default(), &patch).await.unwrap();
    }

    /// Waits until the agent's status is as `is` says; answers the whole object as JSON.
    pub async fn wait(&self, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let last = std::sync::Mutex::new(Value::Null);
        let look = async || {
            let agent = self.agents().get_opt(name).await.unwrap()?;
            let agent = serde_json::to_value(agent).unwrap();
            *last.lock().unwrap() = agent.clone();
            is(&agent["status"]).then_some(agent)
        };
        let text = format!("{name} {what}");
        tokio::select! {
            seen = until(&text, look) => seen,
            () = tokio::time::sleep(PATIENCE - Duration::from_secs(1)) => {
                panic!("{name} never came {what}; last seen: {}", last.lock().unwrap())
            }
        }
    }

    pub async fn wait_phase(&self, name: &str, phase: &str) -> Value {
        self.wait(name, &format!("to be {phase}"), |status| status["phase"] == phase)
            .await
    }

    pub async fn wait_gone(&self, name: &str) {
        until(&format!("{name} to be gone"), async || {
            self.agents().get_opt(name).await.unwrap().is_none().then_some(())
        })
        .await;
    }

    pub async fn wait_ready(&self, blade: &str, ready: &str) {
        until(&format!("blade {blade} to be Ready={ready}"), async || {
            let node = self.nodes().get_opt(blade).await.unwrap()?;
            let conditions = node.status?.conditions;
            conditions
                .iter()
                .any(|one| one.type_ == "Ready" && one.status == ready)
                .then_some(())
        })
        .await;
    }

    /// Reasons of the events about an agent, as `kubectl describe` finds them.
    pub async fn events(&self, name: &str) -> Vec<String> {
        let events: Api<k8s_openapi::api::events::v1::Event> = Api::namespaced(self.client.clone(), "default");
        let all = events.list(&Default::default()).await.unwrap();
        let about = all
            .items
            .into_iter()
            .filter(|event| event.regarding.as_ref().and_then(|one| one.name.as_deref()) == Some(name));
        about.filter_map(|event| event.reason).collect()
    }
}
