//! Our arm: the real `far-controller` as a process of its own, over fake blades in this one.

use std::{
    path::PathBuf,
    process::Child,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use kube::{
    Api,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};

use crate::{
    load::Arm,
    support::{
        Cluster,
        blade::{self, FakeBlade, capacity},
    },
    tied,
};

/// As the controller asks for by default.
const HEARTBEAT_MS: u64 = 5_000;

pub(crate) struct Far {
    cluster: Cluster,
    pub(crate) arm: Arm,
    _blades: Vec<FakeBlade>,
    controller: Child,
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.controller.kill();
        let _ = self.controller.wait();
    }
}

fn kind(version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("tiffany.dev", version, kind), plural)
}

fn start_controller(cluster: &Cluster) -> Result<Child> {
    let at = |name: &str| cluster.dir.path().join(name);
    let listen = if cluster.address.is_empty() {
        "127.0.0.1:0"
    } else {
        &cluster.address
    };
    tied(env!("CARGO_BIN_EXE_far-controller"))
        .args(["run", "--install-crds", "--lease-duration", "60", "--listen", listen])
        .args(["--kubeconfig".as_ref(), at("kubeconfig").as_os_str()])
        .args(["--state-dir".as_ref(), at("controller").as_os_str()])
        .args(["--ready-file".as_ref(), at("ready").as_os_str()])
        .args(["--ca-out".as_ref(), cluster.ca_file().as_os_str()])
        .stderr(std::fs::File::create(at("far-controller.log"))?)
        .spawn()
        .context("starting far-controller")
}

async fn ready(cluster: &Cluster) -> Result<String> {
    let ready: PathBuf = cluster.dir.path().join("ready");
    let waits = async {
        loop {
            if let Ok(address) = std::fs::read_to_string(&ready) {
                return address.trim().to_owned();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), waits)
        .await
        .context("far-controller did not get ready")
}

impl Far {
    pub(crate) async fn start(mut cluster: Cluster, blades: usize) -> Result<Self> {
        let controller = start_controller(&cluster)?;
        cluster.address = ready(&cluster).await?;
        let mut joined = Vec::new();
        for number in 0..blades {
            // Quick until it is known, then as in life.
            blade::HEARTBEAT_MS.store(200, Ordering::Relaxed);
            let blade = FakeBlade::start(&cluster, &format!("blade-{number}"), room()).await;
            blade.fake.completes_by_itself.store(true, Ordering::SeqCst);
            joined.push(blade);
        }
        blade::HEARTBEAT_MS.store(HEARTBEAT_MS, Ordering::Relaxed);
        let arm = Arm {
            client: cluster.client.clone(),
            api: Api::namespaced_with(cluster.client.clone(), "default", &kind("v1", "FarAgent", "faragents")),
            object: agent,
            is_placed: |agent| agent["status"]["nodeName"].is_string(),
            has_ended: |agent| agent["status"]["phase"] == "Completed",
            resources: &["faragents"],
            leaves: None,
            placer: controller.id(),
        };
        Ok(Self {
            cluster,
            arm,
            _blades: joined,
            controller,
        })
    }

    /// Ends the controller as a crash does.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.controller.kill()?;
        self.controller.wait()?;
        let _ = std::fs::remove_file(self.cluster.dir.path().join("ready"));
        Ok(())
    }

    /// Seconds from the start of a new controller, in place of one that was killed, until an agent that waits is placed.
    pub(crate) async fn restart(&mut self, name: &str) -> Result<f64> {
        self.arm
            .api
            .create(&PostParams::default(), &serde_json::from_value(agent(name))?)
            .await?;
        let start = Instant::now();
        self.controller = start_controller(&self.cluster)?;
        self.arm.placer = self.controller.id();
        let waits = async {
            loop {
                let seen = serde_json::to_value(self.arm.api.get(name).await?)?;
                if (self.arm.is_placed)(&seen) {
                    return anyhow::Ok(start.elapsed().as_secs_f64());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(600), waits)
            .await
            .context("nothing is placed after the restart")?
    }

    /// Agents that completed before anybody measures: created and ended through the API while no controller runs.
    pub(crate) async fn existing(&self, prefix: &str, from: usize, to: usize) -> Result<()> {
        let make = |number: usize| {
            let (api, name) = (&self.arm.api, format!("{prefix}-{number}"));
            async move {
                api.create(&PostParams::default(), &serde_json::from_value(agent(&name))?)
                    .await?;
                let status = json!({"status": {"phase": "Completed", "nodeName": format!("blade-{}", number % 10), "attempt": 1, "exitCode": 0,
                    "reason": "Completed", "conditions": [
                        condition("Scheduled"), condition("Booted"), condition("Completed")]}});
                api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
                    .await?;
                anyhow::Ok(())
            }
        };
        stream::iter(from..to)
            .map(make)
            .buffer_unordered(16)
            .try_collect::<Vec<()>>()
            .await?;
        Ok(())
    }

    /// Blades that are only known by their FarNode: nothing answers there.
    pub(crate) async fn known_blades(&self, count: usize) -> Result<()> {
        let nodes: Api<DynamicObject> =
            Api::all_with(self.cluster.client.clone(), &kind("v1alpha1", "FarNode", "farnodes"));
        let make = |number: usize| {
            let (nodes, name) = (&nodes, format!("known-{number}"));
            async move {
                let object = json!({"apiVersion": "tiffany.dev/v1alpha1", "kind": "FarNode", "metadata": {"name": name}, "spec": {}});
                nodes
                    .create(&PostParams::default(), &serde_json::from_value(object)?)
                    .await?;
                anyhow::Ok(())
            }
        };
        stream::iter(0..count)
            .map(make)
            .buffer_unordered(16)
            .try_collect::<Vec<()>>()
            .await?;
        Ok(())
    }

    /// MiB of memory the controller holds (proc(5), VmRSS).
    pub(crate) fn memory_mib(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.controller.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    }
}

fn room() -> far_proto::node::NodeCapacity {
    let mut room = capacity(64_000, 262_144);
    room.max_vms = 100_000;
    room
}

fn condition(name: &str) -> Value {
    json!({"type": name, "status": "True", "reason": name, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

/// As much as a Pod of the other arm.
fn agent(name: &str) -> Value {
    json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": name},
        "spec": {"image": "a", "cpu": "10m", "memory": "64Mi"}})
}
