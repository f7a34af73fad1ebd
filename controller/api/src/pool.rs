//! Templates and pools of warm agents.
//!
//! A pool keeps agents warm: booted up to the guest's Hello, with nothing started in them. An agent with spec.poolRef takes
//! one of them over; its entrypoint, arguments, environment and files reach the guest without a new boot.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{agent::FarAgentSpec, node::TemplateMeta};

/// A blueprint of agents.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tiffany.dev",
    version = "v1alpha1",
    kind = "FarAgentTemplate",
    plural = "faragenttemplates",
    shortname = "fat",
    category = "tiffany",
    namespaced,
    derive = "PartialEq",
    doc = "A blueprint of agents, for pools and queues.",
    printcolumn(name = "Image", type_ = "string", json_path = ".spec.template.spec.image"),
    printcolumn(name = "Memory", type_ = "string", json_path = ".spec.template.spec.memory"),
    printcolumn(name = "CPU", type_ = "string", json_path = ".spec.template.spec.cpu"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct FarAgentTemplateSpec {
    /// What an agent made from it looks like.
    pub template: AgentTemplate,
}

/// What an agent made from a template looks like.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.spec.poolRef) && !has(self.spec.nodeName)").message("spec.template.spec must not have poolRef and nodeName")
)]
pub struct AgentTemplate {
    /// Labels and annotations of the agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<TemplateMeta>,
    /// Spec of the agents. Immutable in the same fields as an agent's: make another template instead.
    pub spec: FarAgentSpec,
}

/// How many agents are kept warm.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tiffany.dev",
    version = "v1alpha1",
    kind = "FarAgentPool",
    plural = "faragentpools",
    shortname = "fap",
    category = "tiffany",
    namespaced,
    status = "FarAgentPoolStatus",
    derive = "PartialEq",
    doc = "Keeps agents warm, for agents with spec.poolRef to take over without a boot.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Template", type_ = "string", json_path = ".spec.templateRef.name"),
    printcolumn(name = "Wanted", type_ = "integer", json_path = ".status.wanted"),
    printcolumn(name = "Warm", type_ = "integer", json_path = ".status.warm"),
    printcolumn(name = "Claimed", type_ = "integer", json_path = ".status.claimed"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct FarAgentPoolSpec {
    /// Agents to keep warm; with autoscale, where to begin. Default 1.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 10_000))]
    pub replicas: u32,
    /// Template in the same namespace.
    pub template_ref: LocalRef,
    /// Keeps as many warm as demand asks for; absent: replicas, always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<Autoscale>,
    /// What happens to warm agents of an older template.
    #[serde(default)]
    pub update_strategy: UpdateStrategy,
}

/// Bounds of a pool that follows demand.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("spec.autoscale: min must not be greater than max"))]
pub struct Autoscale {
    /// Fewest warm agents while there is demand; 0: down to none when idle.
    #[serde(default)]
    #[schemars(range(min = 0, max = 10_000))]
    pub min: u32,
    /// Most warm agents.
    #[schemars(range(min = 1, max = 10_000))]
    pub max: u32,
    /// Warm agents to have beyond the claims of the last minute. Default 1.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 10_000))]
    pub target_idle: u32,
    /// Seconds without a claim after which the pool goes down to min. Default 300.
    #[serde(default = "idle_seconds")]
    #[schemars(range(min = 1, max = 86_400))]
    pub scale_to_zero_after_seconds: u32,
}

/// What happens to warm agents of an older template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum UpdateStrategy {
    /// They stay until they are claimed; new ones are of the new template.
    #[default]
    OnReplenish,
    /// They are replaced.
    Recreate,
}

/// An object in the same namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LocalRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What was seen of a pool.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FarAgentPoolStatus {
    /// metadata.generation of the spec this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Warm agents that exist, ready or not.
    #[serde(default)]
    pub replicas: u32,
    /// Warm agents that the pool wants now.
    #[serde(default)]
    pub wanted: u32,
    /// Warm agents that can be claimed.
    #[serde(default)]
    pub warm: u32,
    /// Agents that were claimed from the pool since it was made.
    #[serde(default)]
    pub claimed: u64,
    /// When the last claim was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_claim_at: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
    /// Label selector of the pool's warm agents, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,
    /// Ready: as many are warm as are wanted; TemplateFound.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

fn one() -> u32 {
    1
}

fn idle_seconds() -> u32 {
    300
}

/// Labels that choose the warm agents of a pool.
#[must_use]
pub fn warm_labels(pool: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(crate::POOL_LABEL.to_owned(), pool.to_owned())])
}
