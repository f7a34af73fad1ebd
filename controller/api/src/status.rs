//! `FarAgent.status`: what was seen. Written by the controller alone, never an input of the user.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is known of the agent. A field is absent until it was seen.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FarAgentStatus {
    /// Where the agent stands, in one word; derived from the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// What was seen, one by one: Scheduled, ImageReady, Booted, Ready, Completed, Failed, Sleeping, NodeLost.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// metadata.generation of the spec this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Blade the attempt belongs to. Written before the blade is called: the intent's home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub node_name: Option<String>,
    /// Number of the boot: 1, 2, 3 and so on. (uid, attempt) is the boot's identity everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub attempt: Option<u32>,
    /// Exit code the program reported, 0 to 255. Absent where no report was received: never 0 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Number of the signal that ended the program, where the report says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Why the agent ended, or waits. When ended one of: Completed, Error, Signal, OOMKilled, KernelPanic, BootTimeout,
    /// VMMCrashed, ImageError, NetworkError, DeadlineExceeded, Evicted, NodeLost, BladeRebooted, InitLost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
    /// The same as a sentence, naming the field or object at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub message: Option<String>,
    /// When the program started, by the blade's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When the attempt ended, by the blade's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// Attempts that had begun, ended, and were followed by another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u32>,
    /// Ends that count against spec.backoffLimit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failures: Option<u32>,
    /// Failures of blades since infrastructureFailuresSince: 20 within 10 minutes are the most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub infrastructure_failures: Option<u32>,
    /// When the first of them was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub infrastructure_failures_since: Option<Time>,
    /// When the agent was first placed: spec.activeDeadlineSeconds counts from here, over all attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_since: Option<Time>,
    /// Between two attempts: the next one is not placed before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<Time>,
    /// How the attempt before the current one ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_attempt: Option<LastAttempt>,
    /// Digest of the image that was booted, sha256:...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub image_digest: Option<String>,
    /// What the microVM really got.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<BootResources>,
    /// The last 2 KiB of output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8192))]
    pub tail: Option<String>,
    /// Warm agent whose microVM the attempt takes over instead of a boot. Written before the blade is called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claimed: Option<Claimed>,
}

/// One boot of a warm agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Claimed {
    /// Name of the warm agent.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Its metadata.uid.
    #[schemars(length(max = 64))]
    pub uid: String,
    /// Its attempt.
    pub attempt: u32,
}

/// How an attempt ended that was followed by another. The fields are those of the status of an ended agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastAttempt {
    /// Its number.
    pub attempt: u32,
    /// Its blade.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub node_name: Option<String>,
    /// Why it ended.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub reason: String,
    /// The same as a sentence.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub message: String,
    /// Exit code the program reported; absent where no report was received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Number of the signal that ended the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// When it ended, by its blade's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// The last 2 KiB of its output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8192))]
    pub tail: Option<String>,
}

/// Where the agent stands, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Waits for a blade with room.
    Pending,
    /// Has a blade; the blade may not know it yet.
    Scheduled,
    /// The blade prepares the image or boots the microVM.
    Starting,
    /// The program runs.
    Running,
    /// The microVM sleeps.
    Sleeping,
    /// The program ended with exit code 0.
    Completed,
    /// The agent ended in any other way.
    Failed,
    /// The blade was not heard of for too long.
    Unknown,
}

impl Phase {
    /// Never left again.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed)
    }

    /// The word as the API writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Scheduled => "Scheduled",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Sleeping => "Sleeping",
            Self::Completed => "Completed",
            Self::Failed => "Failed",
            Self::Unknown => "Unknown",
        }
    }
}

/// What the microVM really got.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BootResources {
    /// Virtual processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Guest memory in MiB.
    #[serde(rename = "memoryMiB", default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// kvm or tcg.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// firecracker or qemu.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// Whether the guest has a network interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<bool>,
    /// Why it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_nic_reason: Option<String>,
}
