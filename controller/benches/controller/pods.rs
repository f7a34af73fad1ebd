//! The peer: kube-scheduler, with nodes and Pods that kwok brings to Ready, Running and Succeeded.

use std::{path::Path, process::Child};

use anyhow::{Context, Result, bail};
use far_testkit::{find, servers::ControlPlane};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};

use crate::{load::Arm, tied};

/// What kwok does with nodes and Pods: as our fake blades do with agents, half a second after the start everything ends.
const STAGES: &str = r#"apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: node-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions:
      - {key: '.status.conditions.[] | select( .type == "Ready" ) | .status', operator: NotIn, values: ["True"]}
  next:
    statusTemplate: |
      conditions:
        - {type: Ready, status: "True", reason: Kwok, message: ready, lastHeartbeatTime: {{ Now | Quote }}, lastTransitionTime: {{ Now | Quote }}}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-running}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
      - {key: .spec.nodeName, operator: Exists}
      - {key: .status.phase, operator: In, values: [Pending]}
  next:
    statusTemplate: |
      phase: Running
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-succeeded}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
      - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
      - {key: .status.phase, operator: In, values: [Running]}
  delay: {durationMilliseconds: 500}
  next:
    statusTemplate: |
      phase: Succeeded
"#;

pub(crate) struct Pods {
    pub(crate) arm: Arm,
    kwok: Child,
}

impl Drop for Pods {
    fn drop(&mut self) {
        let _ = self.kwok.kill();
        let _ = self.kwok.wait();
    }
}

impl Pods {
    /// kwok beside the control plane's scheduler, with as many nodes as there are blades.
    pub(crate) async fn start(plane: &ControlPlane, client: &Client, dir: &Path, nodes: usize) -> Result<Self> {
        let output = std::process::Command::new(find::repository().join("scripts/servers"))
            .arg("kwok")
            .output()?;
        if !output.status.success() {
            bail!("scripts/servers kwok: {}", String::from_utf8_lossy(&output.stderr));
        }
        let program = String::from_utf8(output.stdout)?;
        std::fs::write(dir.join("stages.yaml"), STAGES)?;
        let kwok = tied(program.trim())
            .args([
                "--manage-all-nodes=true".as_ref(),
                "--config".as_ref(),
                dir.join("stages.yaml").as_os_str(),
            ])
            .args(["--kubeconfig".as_ref(), plane.kubeconfig.as_os_str()])
            .stderr(std::fs::File::create(dir.join("kwok.log"))?)
            .spawn()?;
        let scheduler = plane.pid("scheduler").context("kube-scheduler does not run")?;
        let kind = |kind: &str, plural: &str| {
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), plural)
        };
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &kind("Node", "nodes"));
        let room = json!({"cpu": "64", "memory": "256Gi", "pods": "100000"});
        for number in 0..nodes {
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{number}")},
                "status": {"capacity": room, "allocatable": room}});
            api.create(&PostParams::default(), &serde_json::from_value(node)?)
                .await?;
            // Set at the creation of every node, and taken off by a controller that has no part in this.
            let taints = Patch::Merge(json!({"spec": {"taints": null}}));
            api.patch(&format!("node-{number}"), &PatchParams::default(), &taints)
                .await?;
        }
        let arm = Arm {
            client: client.clone(),
            api: Api::namespaced_with(client.clone(), "default", &kind("Pod", "pods")),
            object: pod,
            is_placed: |pod| pod["spec"]["nodeName"].is_string(),
            has_ended: |pod| pod["status"]["phase"] == "Succeeded",
            resources: &["pods"],
            leaves: None,
            placer: scheduler,
        };
        Ok(Self { arm, kwok })
    }
}

/// As much as an agent of the other arm.
fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
        "restartPolicy": "Never",
        "containers": [{"name": "c", "image": "a", "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}}}]}})
}
