//! `FarNode` v1alpha1: one blade. Its status is written by the controller from the blade's heartbeats; blades hold no
//! Kubernetes credentials. That a blade lives is a Lease in [`crate::NODE_LEASE_NAMESPACE`], not a status write.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{quantity::Quantity, scheduling::TaintEffect};

/// Most images that a status lists.
pub const MAX_IMAGES: usize = 100;

/// What an operator asks of a blade.
#[derive(CustomResource, KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tiffany.dev",
    version = "v1alpha1",
    kind = "FarNode",
    plural = "farnodes",
    shortname = "fn",
    category = "tiffany",
    status = "FarNodeStatus",
    derive = "PartialEq",
    doc = "A blade: a physical machine that runs the node agent.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(name = "Arch", type_ = "string", json_path = ".status.nodeInfo.arch"),
    printcolumn(name = "CPU", type_ = "string", json_path = ".status.allocatable.cpu"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".status.allocatable.memory"),
    printcolumn(name = "VMs", type_ = "integer", json_path = ".status.allocatable.vms"),
    printcolumn(name = "Accelerator", type_ = "string", json_path = ".status.nodeInfo.accelerator"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Endpoint", type_ = "string", json_path = ".status.endpoint", priority = "1"),
    printcolumn(
        name = "Version",
        type_ = "string",
        json_path = ".status.nodeInfo.nodeVersion",
        priority = "1"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct FarNodeSpec {
    /// true: no new agents are placed here; those that run stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unschedulable: Option<bool>,
    /// Marks that keep agents away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub taints: Option<Vec<Taint>>,
    /// Present: the blade is emptied. As good as unschedulable; its agents are dealt with by the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Drain>,
}

/// How a blade is emptied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// Wait (the default): agents may end by themselves until the deadline. Evict: they are ended at once. Either way
    /// an ended agent with restartPolicy OnFailure or Always gets a new attempt elsewhere.
    #[serde(default)]
    pub policy: DrainPolicy,
    /// Seconds that Wait waits before it evicts; absent: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub deadline_seconds: Option<u32>,
}

/// What happens to the agents of a blade that is emptied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DrainPolicy {
    /// They may end by themselves until the deadline.
    #[default]
    Wait,
    /// They are ended at once, with their grace period.
    Evict,
}

/// Labels and annotations of objects made from a template.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TemplateMeta {
    /// Labels; those under tiffany.dev/ are the controller's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub annotations: BTreeMap<String, String>,
}

/// A mark that keeps agents away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Taint {
    /// Name of the mark.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
    /// Value of the mark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// What it does to agents that do not tolerate it.
    pub effect: TaintEffect,
}

/// What the blade said of itself.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FarNodeStatus {
    /// host:port where the blade serves the node API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 300))]
    pub endpoint: Option<String>,
    /// What the machine has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<NodeResources>,
    /// What agents may use of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocatable: Option<NodeResources>,
    /// Labels the blade was started with; metadata.labels win over them in node selectors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub labels: Option<BTreeMap<String, String>>,
    /// Ready: True while the blade is heard of, Unknown afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Images in the blade's store, at most 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 100))]
    pub images: Option<Vec<NodeImage>>,
    /// Versions and kind of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_info: Option<NodeInfo>,
}

/// Amounts of one blade.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeResources {
    /// Cores.
    pub cpu: Quantity,
    /// Memory.
    pub memory: Quantity,
    /// microVMs at the same time; 0: no own limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vms: Option<u32>,
    /// Further resources by name, whole numbers, for example nvidia.com/gpu: 2.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub extended: BTreeMap<String, u32>,
}

/// One image in the blade's store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeImage {
    /// Digest of the manifest, sha256:...
    #[schemars(length(max = 128))]
    pub digest: String,
    /// References it is known under, at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub names: Vec<String>,
    /// Size in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
}

/// Versions and kind of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeInfo {
    /// amd64 or arm64.
    #[serde(default)]
    pub arch: String,
    /// Version of the blade's kernel.
    #[serde(default)]
    pub kernel_version: String,
    /// Version of the node agent.
    #[serde(default)]
    pub node_version: String,
    /// Changes with every start of the blade's kernel.
    #[serde(default)]
    pub boot_id: String,
    /// firecracker or qemu.
    #[serde(default)]
    pub vmm: String,
    /// kvm or tcg.
    #[serde(default)]
    pub accelerator: String,
    /// Why not kvm, in one sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kvm_reason: String,
}
