//! `FarAgent` v1: what a user asks for. Everything that decides what boots is immutable; rules name the field.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    network::Network,
    pool::LocalRef,
    quantity::Quantity,
    scheduling::{Affinity, Toleration, TopologySpreadConstraint},
    status::FarAgentStatus,
    storage::{Scratch, Volume},
};

/// Seconds between TERM and KILL where the spec says nothing.
pub const DEFAULT_GRACE_SECONDS: u32 = 10;

/// What to run, and what it needs.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "tiffany.dev",
    version = "v1",
    kind = "FarAgent",
    plural = "faragents",
    shortname = "fa",
    category = "tiffany",
    namespaced,
    status = "FarAgentStatus",
    derive = "PartialEq",
    doc = "An agent that runs to its end in a microVM of its own on one blade.",
    selectable = ".spec.nodeName",
    selectable = ".status.phase",
    selectable = ".status.nodeName",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Blade", type_ = "string", json_path = ".status.nodeName"),
    printcolumn(name = "Exit", type_ = "integer", json_path = ".status.exitCode"),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restarts"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Image", type_ = "string", json_path = ".spec.image", priority = "1"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = "1"),
    printcolumn(name = "Pool", type_ = "string", json_path = ".spec.poolRef.name", priority = "1"),
    printcolumn(name = "Attempt", type_ = "integer", json_path = ".status.attempt", priority = "1")
)]
#[serde(rename_all = "camelCase")]
// What is always there is compared where it is: each look at a field from here costs the API server a walk over all of them,
// at every write of a status too.
#[x_kube(
    validation = Rule::new("has(self.entrypoint) ? has(oldSelf.entrypoint) && self.entrypoint == oldSelf.entrypoint : !has(oldSelf.entrypoint)").message("spec.entrypoint is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.args) ? has(oldSelf.args) && self.args == oldSelf.args : !has(oldSelf.args)").message("spec.args is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.workingDir) ? has(oldSelf.workingDir) && self.workingDir == oldSelf.workingDir : !has(oldSelf.workingDir)").message("spec.workingDir is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.env) ? has(oldSelf.env) && self.env == oldSelf.env : !has(oldSelf.env)").message("spec.env is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.files) ? has(oldSelf.files) && self.files == oldSelf.files : !has(oldSelf.files)").message("spec.files is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.nodeName) ? has(oldSelf.nodeName) && self.nodeName == oldSelf.nodeName : !has(oldSelf.nodeName)").message("spec.nodeName is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.envFrom) ? has(oldSelf.envFrom) && self.envFrom == oldSelf.envFrom : !has(oldSelf.envFrom)").message("spec.envFrom is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.network) ? has(oldSelf.network) && self.network == oldSelf.network : !has(oldSelf.network)").message("spec.network is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.poolRef) ? has(oldSelf.poolRef) && self.poolRef == oldSelf.poolRef : !has(oldSelf.poolRef)").message("spec.poolRef is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.scratch) ? has(oldSelf.scratch) && self.scratch == oldSelf.scratch : !has(oldSelf.scratch)").message("spec.scratch is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.volumes) ? has(oldSelf.volumes) && self.volumes == oldSelf.volumes : !has(oldSelf.volumes)").message("spec.volumes is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("has(self.resources) ? has(oldSelf.resources) && self.resources == oldSelf.resources : !has(oldSelf.resources)").message("spec.resources is immutable").reason(Reason::FieldValueForbidden),
    validation = Rule::new("!(self.startPolicy == 'OnClaim' && has(self.poolRef))").message("spec.poolRef and startPolicy OnClaim exclude each other"),
    validation = Rule::new("self.restartPolicy != 'Never' || !has(self.backoffLimit)").message("spec.backoffLimit needs restartPolicy OnFailure or Always")
)]
pub struct FarAgentSpec {
    /// Reference of the OCI image whose root file system the agent runs in, for example
    /// ghcr.io/microscaler/tiffany-vm:v0.3.1. Immutable.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("!self.contains(' ')").message("spec.image must not contain spaces"),
        validation = Rule::new("self == oldSelf").message("spec.image is immutable").reason(Reason::FieldValueForbidden)
    )]
    pub image: String,

    /// Memory of the guest as a quantity, at least 64Mi, rounded up to whole MiB. Default 512Mi. Immutable.
    #[serde(default = "default_memory")]
    #[x_kube(
        validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('64Mi')) >= 0")
        .message("spec.memory must be a quantity of at least 64Mi, for example 512Mi"),
        validation = Rule::new("string(self) == string(oldSelf)").message("spec.memory is immutable").reason(Reason::FieldValueForbidden)
    )]
    pub memory: Quantity,

    /// Processor time as a quantity of cores, at least 1m: 1, 500m. The microVM gets the next whole number of virtual
    /// processors and is limited to this share. Write 500m, not 0.5. Default 1. Immutable.
    #[serde(default = "default_cpu")]
    #[x_kube(
        validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('1m')) >= 0")
        .message("spec.cpu must be a positive quantity of cores, for example 1 or 500m"),
        validation = Rule::new("string(self) == string(oldSelf)").message("spec.cpu is immutable").reason(Reason::FieldValueForbidden)
    )]
    pub cpu: Quantity,

    /// Absolute path of the program inside the image. Absent: the image's own entrypoint. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4095))]
    #[x_kube(validation = Rule::new("self.startsWith('/')").message("spec.entrypoint must be an absolute path"))]
    pub entrypoint: Option<String>,

    /// Arguments of the program, without its own name. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), inner(length(max = 32768)))]
    pub args: Option<Vec<String>>,

    /// Folder the program starts in. Absent: the image's own, else "/". Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 4095))]
    #[x_kube(validation = Rule::new("self.startsWith('/')").message("spec.workingDir must be an absolute path"))]
    pub working_dir: Option<String>,

    /// Environment variables, over those of the image. Values of Secrets reach only the microVM. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Option<Vec<Env>>,

    /// Every key of these objects as an environment variable; env wins over them, later ones win over earlier. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub env_from: Option<Vec<EnvFrom>>,

    /// Files that lie in the guest's memory before the program starts; together at most 8 MiB. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["path".into()]))]
    pub files: Option<Vec<FileSource>>,

    /// Labels a blade must have, each with this value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub node_selector: Option<BTreeMap<String, String>>,

    /// Run on this blade and no other; it still has to be ready and to have room. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub node_name: Option<String>,

    /// Seconds from the start of the boot until the agent is ended with reason DeadlineExceeded. Absent: no deadline.
    /// Read when the agent is placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<u32>,

    /// Seconds the program has between TERM and KILL when it is asked to end. Default 10.
    #[serde(default = "default_grace")]
    #[schemars(range(min = 0, max = 86_400))]
    pub termination_grace_period_seconds: u32,

    /// What happens after an attempt ended. Never (the default): the agent has ended. OnFailure: a new attempt after
    /// every end but Completed, up to backoffLimit. Always: a new attempt after every end. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.restartPolicy is immutable").reason(Reason::FieldValueForbidden))]
    pub restart_policy: RestartPolicy,

    /// Failures of the agent itself after which it is Failed; failures of blades are not counted. Default 6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10_000))]
    pub backoff_limit: Option<u32>,

    /// Seconds after its end until the agent is deleted; absent: it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<u32>,

    /// true: the agent is not placed; one that has a blade is ended and placed anew when this is false again. For
    /// admission by queues such as Kueue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,

    /// Running (the default), or Sleeping: its memory is saved and the microVM ended until it is Running again.
    #[serde(default)]
    pub operating_mode: OperatingMode,

    /// What becomes of the agent when its blade is lost. Fail (the default), or Reschedule: a new attempt elsewhere once
    /// the lost blade must have ended its own.
    #[serde(default)]
    pub lost_policy: LostPolicy,

    /// Immediate (the default), or OnClaim: the microVM boots and waits, and the program starts when an agent with a
    /// poolRef takes it over. Pools make such agents. Immutable.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.startPolicy is immutable").reason(Reason::FieldValueForbidden))]
    pub start_policy: StartPolicy,

    /// Pool in the same namespace whose warm agents may be taken over instead of a boot, where image, memory, cpu,
    /// network, scratch and volumes are those of its template. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_ref: Option<LocalRef>,

    /// Which blades and neighbours the agent wants. Read when it is placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,

    /// Taints that do not keep the agent away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub tolerations: Option<Vec<Toleration>>,

    /// How evenly agents are spread over places. Read when it is placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,

    /// Greater is placed first. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1_000_000, max = 1_000_000))]
    pub priority: Option<i32>,

    /// Further resources by name, whole numbers, for example nvidia.com/gpu: 1. Counted on the blades that offer them.
    /// Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 16))]
    pub resources: Option<BTreeMap<String, u32>>,

    /// What the agent may reach. Absent: mode Restricted without rules, which is nothing. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,

    /// The writable layer over the image. Absent: half of the guest's memory at most. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<Scratch>,

    /// Further empty folders. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // The rule on sizeLimit costs more than kube-apiserver allows from 8 on: a quantity may be a text of any length.
    #[schemars(length(max = 7))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub volumes: Option<Vec<Volume>>,
}

/// Whether the agent's microVM runs or sleeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OperatingMode {
    /// It runs.
    #[default]
    Running,
    /// Its memory is saved, and no microVM runs.
    Sleeping,
}

/// What becomes of the agent when its blade is lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LostPolicy {
    /// It is Failed with reason NodeLost once the blade must have ended it.
    #[default]
    Fail,
    /// It gets a new attempt elsewhere once the lost blade must have ended its own.
    Reschedule,
}

/// When the program starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StartPolicy {
    /// As soon as the guest is ready.
    #[default]
    Immediate,
    /// When another agent takes the microVM over.
    OnClaim,
}

/// What happens after an attempt ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestartPolicy {
    /// Nothing: the agent is Completed or Failed.
    #[default]
    Never,
    /// A new attempt after every end but Completed.
    OnFailure,
    /// A new attempt after every end.
    Always,
}

/// All keys of one object as environment variables.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.secretRef) != has(self.configMapRef)").message("spec.envFrom[] needs exactly one of secretRef and configMapRef")
)]
pub struct EnvFrom {
    /// Put before every key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::new("!self.contains('=')").message("spec.envFrom[].prefix must not contain '='"))]
    pub prefix: Option<String>,
    /// A Secret in the agent's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<NameRef>,
    /// A ConfigMap in the agent's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<NameRef>,
}

/// One environment variable.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.value) && has(self.valueFrom))").message("spec.env[]: value and valueFrom exclude each other")
)]
pub struct Env {
    /// Name of the variable, without "=".
    #[schemars(length(min = 1, max = 255))]
    #[x_kube(validation = Rule::new("!self.contains('=')").message("spec.env[].name must not contain '='"))]
    pub name: String,
    /// Value of the variable; absent and without valueFrom: empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 131_071))]
    pub value: Option<String>,
    /// Where the value comes from instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_from: Option<ValueFrom>,
}

/// Source of one value: exactly one of the two.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.secretKeyRef) != has(self.configMapKeyRef)").message("spec.env[].valueFrom needs exactly one of secretKeyRef and configMapKeyRef")
)]
pub struct ValueFrom {
    /// One key of a Secret in the agent's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyRef>,
    /// One key of a ConfigMap in the agent's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyRef>,
}

/// One key of a Secret or ConfigMap in the agent's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key inside its data.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// A whole object in the agent's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NameRef {
    /// Name of the object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// One file, or one folder of files, with exactly one source.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.inline) ? 1 : 0) + (has(self.configMapKeyRef) ? 1 : 0) + (has(self.secretKeyRef) ? 1 : 0) + (has(self.configMapRef) ? 1 : 0) == 1")
        .message("spec.files[] needs exactly one of inline, configMapKeyRef, secretKeyRef and configMapRef")
)]
pub struct FileSource {
    /// Absolute path in the guest, without "." and ".." parts. With configMapRef: the folder the files are placed in.
    #[schemars(length(min = 2, max = 4095))]
    #[x_kube(
        validation = Rule::new("self.startsWith('/') && !self.endsWith('/') && !self.contains('//')").message("spec.files[].path must be an absolute path without empty parts"),
        validation = Rule::new("!(self + '/').contains('/../') && !(self + '/').contains('/./')").message("spec.files[].path must not contain '.' or '..' parts")
    )]
    pub path: String,
    /// Permission bits as a decimal number, at most 511 (octal 0777). Default: octal 0444, or 0400 from a Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 511))]
    pub mode: Option<u32>,
    /// The file's text itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 131_072))]
    pub inline: Option<String>,
    /// One key of a ConfigMap in the agent's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_key_ref: Option<KeyRef>,
    /// One key of a Secret in the agent's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<KeyRef>,
    /// Every key of a ConfigMap, each as one file of that name under path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<NameRef>,
}

fn default_memory() -> Quantity {
    "512Mi".into()
}

fn default_cpu() -> Quantity {
    1.into()
}

fn default_grace() -> u32 {
    DEFAULT_GRACE_SECONDS
}
