//! The other peer: the agent-sandbox controller, whose Pods kube-scheduler places and kwok brings to their end.
//!
//! `AGENT_SANDBOX_CONTROLLER` names its program and `AGENT_SANDBOX_CRDS` the file or folder with its CRDs; without them
//! `scripts/servers agent-sandbox` builds the pinned one.

use std::{
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use far_testkit::{find, servers::ControlPlane};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams, PostParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};

use crate::{load::Arm, tied};

/// Its objects have a namespace of their own: what is left of them is no load of the other arm.
const NAMESPACE: &str = "sandboxes";

pub(crate) struct Sandboxes {
    pub(crate) arm: Arm,
    controller: Child,
}

impl Drop for Sandboxes {
    fn drop(&mut self) {
        let _ = self.controller.kill();
        let _ = self.controller.wait();
    }
}

/// The controller's program and the files of its CRDs.
fn program() -> Result<(PathBuf, Vec<PathBuf>)> {
    let (program, crds) = match std::env::var_os("AGENT_SANDBOX_CONTROLLER") {
        Some(program) => {
            let crds = std::env::var_os("AGENT_SANDBOX_CRDS")
                .context("AGENT_SANDBOX_CONTROLLER is set and AGENT_SANDBOX_CRDS is not: it names the CRDs")?;
            (PathBuf::from(program), PathBuf::from(crds))
        }
        None => {
            let output = std::process::Command::new(find::repository().join("scripts/servers"))
                .arg("agent-sandbox")
                .output()?;
            if !output.status.success() {
                bail!(
                    "scripts/servers agent-sandbox: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            let text = String::from_utf8(output.stdout)?;
            let (program, crds) = text.trim().split_once('\n').context("program and CRDs")?;
            (PathBuf::from(program), PathBuf::from(crds))
        }
    };
    if crds.is_file() {
        return Ok((program, vec![crds]));
    }
    let entries = std::fs::read_dir(&crds).with_context(|| format!("reading {}", crds.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    Ok((program, files))
}

fn kind(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

impl Sandboxes {
    /// Beside the control plane's scheduler and the kwok of [`crate::pods::Pods`].
    pub(crate) async fn start(plane: &ControlPlane, client: &Client, dir: &Path) -> Result<Self> {
        let (program, files) = program()?;
        let crds = kind(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
            "customresourcedefinitions",
        );
        let crds: Api<DynamicObject> = Api::all_with(client.clone(), &crds);
        for file in files {
            let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            for part in text.split("\n---").filter(|part| part.contains("kind:")) {
                let mut crd: Value =
                    serde_saphyr::from_str(part).with_context(|| format!("{} is no YAML", file.display()))?;
                // No webhook runs here; every object is of the stored version.
                crd["spec"]["conversion"] = json!({"strategy": "None"});
                crds.create(&PostParams::default(), &serde_json::from_value(crd)?)
                    .await?;
            }
        }
        let namespaces: Api<DynamicObject> = Api::all_with(client.clone(), &kind("", "v1", "Namespace", "namespaces"));
        let own = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        namespaces
            .create(&PostParams::default(), &serde_json::from_value(own)?)
            .await?;
        let controller = tied(&program.display().to_string())
            .args(["--leader-elect=false", "--enable-webhook=false"])
            .args(["--metrics-bind-address=0", "--health-probe-bind-address=0"])
            .args(["--kubeconfig".as_ref(), plane.kubeconfig.as_os_str()])
            .stderr(std::fs::File::create(dir.join("agent-sandbox.log"))?)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let sandboxes = kind("agents.x-k8s.io", "v1beta1", "Sandbox", "sandboxes");
        let arm = Arm {
            client: client.clone(),
            api: Api::namespaced_with(client.clone(), NAMESPACE, &sandboxes),
            object: sandbox,
            is_placed: |sandbox| {
                sandbox["status"]["nodeName"]
                    .as_str()
                    .is_some_and(|name| !name.is_empty())
            },
            has_ended: |sandbox| {
                let conditions = sandbox["status"]["conditions"].as_array();
                let is_end = |one: &Value| one["type"] == "Finished" && one["status"] == "True";
                conditions.is_some_and(|all| all.iter().any(is_end))
            },
            resources: &["sandboxes", "pods", "services"],
            leaves: Some(Api::namespaced_with(
                client.clone(),
                NAMESPACE,
                &kind("", "v1", "Pod", "pods"),
            )),
            placer: controller.id(),
        };
        // Served, before anybody counts on it.
        let served = async {
            while arm.api.list(&ListParams::default().limit(1)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), served)
            .await
            .context("the CRDs of agent-sandbox are not served")?;
        Ok(Self { arm, controller })
    }
}

/// As much as an agent of our arm.
fn sandbox(name: &str) -> Value {
    json!({"apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox", "metadata": {"name": name}, "spec": {
        "service": false,
        "podTemplate": {"spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "c", "image": "a", "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}}}]}}}})
}
