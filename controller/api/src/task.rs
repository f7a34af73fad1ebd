//! Queues of tasks: each task becomes an agent, is tried again when it fails, and ends as a dead letter when that is
//! of no use.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{agent::Env, pool::LocalRef};

/// What agents of a queue look like, and how many there are at a time.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tiffany.dev",
    version = "v1alpha1",
    kind = "FarQueue",
    plural = "farqueues",
    shortname = "fq",
    category = "tiffany",
    namespaced,
    status = "FarQueueStatus",
    derive = "PartialEq",
    doc = "Turns FarTasks into agents, a bounded number at a time.",
    printcolumn(name = "Pending", type_ = "integer", json_path = ".status.pending"),
    printcolumn(name = "Running", type_ = "integer", json_path = ".status.running"),
    printcolumn(name = "Succeeded", type_ = "integer", json_path = ".status.succeeded"),
    printcolumn(name = "Dead", type_ = "integer", json_path = ".status.dead"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.templateRef) != has(self.poolRef)").message("spec needs exactly one of templateRef and poolRef")
)]
pub struct FarQueueSpec {
    /// Template of the agents, in the same namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_ref: Option<LocalRef>,
    /// Pool whose template is used and whose warm agents are taken over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_ref: Option<LocalRef>,
    /// Most agents at the same time. Default 10.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 10_000))]
    pub parallelism: u32,
    /// How often a task is tried before it is a dead letter. Default 3.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 100))]
    pub max_attempts: u32,
    /// true: no task is begun; those that run go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,
}

/// What was seen of a queue.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FarQueueStatus {
    /// metadata.generation of the spec this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Tasks that wait.
    #[serde(default)]
    pub pending: u32,
    /// Tasks that have an agent.
    #[serde(default)]
    pub running: u32,
    /// Tasks that succeeded and are still there.
    #[serde(default)]
    pub succeeded: u32,
    /// Dead letters that are still there.
    #[serde(default)]
    pub dead: u32,
    /// TemplateFound, Suspended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// One piece of work.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tiffany.dev",
    version = "v1alpha1",
    kind = "FarTask",
    plural = "fartasks",
    shortname = "ft",
    category = "tiffany",
    namespaced,
    status = "FarTaskStatus",
    derive = "PartialEq",
    doc = "One piece of work of a FarQueue.",
    selectable = ".spec.queueRef.name",
    selectable = ".status.phase",
    printcolumn(name = "Queue", type_ = "string", json_path = ".spec.queueRef.name"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Attempts", type_ = "integer", json_path = ".status.attempts"),
    printcolumn(name = "Agent", type_ = "string", json_path = ".status.agentName"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = "1")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self == oldSelf").message("spec of a FarTask is immutable").reason(Reason::FieldValueForbidden))]
pub struct FarTaskSpec {
    /// Queue in the same namespace.
    pub queue_ref: LocalRef,
    /// Arguments of the program, in the place of the template's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub args: Option<Vec<String>>,
    /// Environment variables, added to the template's or replacing them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Option<Vec<Env>>,
    /// Greater goes first. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: Option<i32>,
    /// Seconds after which a finished task is removed; absent: it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<u32>,
}

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TaskPhase {
    /// Waits for its turn, or to be tried again.
    Pending,
    /// Has an agent.
    Running,
    /// Its agent completed.
    Succeeded,
    /// A dead letter: tried as often as the queue allows.
    Dead,
}

/// What was seen of a task.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FarTaskStatus {
    /// Where it stands, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<TaskPhase>,
    /// How often it was tried; the agent of the n-th try is NAME-n.
    #[serde(default)]
    pub attempts: u32,
    /// Agent of the newest try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub agent_name: Option<String>,
    /// Exit code of the newest try, where one was reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Why the newest try ended, or why the task waits, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
    /// The same as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub message: Option<String>,
    /// When the newest try began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it is tried again at the earliest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Time>,
    /// When it succeeded or died.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
}

fn ten() -> u32 {
    10
}

fn three() -> u32 {
    3
}
