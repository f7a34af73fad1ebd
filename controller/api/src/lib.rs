//! Custom resources of the group `tiffany.dev`: the types, their schema and their rules, without a client.
//!
//! Everything a user can get wrong is refused by the schema or a CEL rule of the CRD: there is no webhook. The CRDs in
//! `crds/` are generated (`far-controller crds --out-dir controller/api/crds`, or this crate's tests with FAR_UPDATE_CRDS=1); a test fails when they differ from the types.
#![forbid(unsafe_code)]
// KubeSchema repeats each struct inside a function, where `pub` reaches nobody.
#![allow(unreachable_pub)]
// Print columns repeat `type_ = "string"`, as columns do.
#![allow(clippy::duplicated_attributes)]

pub mod agent;
pub mod crds;
pub mod network;
pub mod node;
pub mod placement;
pub mod pool;
pub mod quantity;
pub mod scheduling;
pub mod status;
pub mod storage;
pub mod task;

pub use agent::{
    DEFAULT_GRACE_SECONDS, Env, EnvFrom, FarAgent, FarAgentSpec, FileSource, KeyRef, LostPolicy, NameRef,
    OperatingMode, RestartPolicy, StartPolicy, ValueFrom,
};
pub use crds::{crds, crds_yaml};
pub use network::{EgressPort, EgressRule, Network, NetworkMode, Protocol};
pub use node::{
    Drain, DrainPolicy, FarNode, FarNodeSpec, FarNodeStatus, NodeImage, NodeInfo, NodeResources, Taint, TemplateMeta,
};
pub use pool::{
    AgentTemplate, Autoscale, FarAgentPool, FarAgentPoolSpec, FarAgentPoolStatus, FarAgentTemplate,
    FarAgentTemplateSpec, LocalRef, UpdateStrategy,
};
pub use quantity::Quantity;
pub use scheduling::TaintEffect;
pub use status::{BootResources, Claimed, FarAgentStatus, LastAttempt, Phase};
pub use storage::{EmptyDir, Scratch, Volume};
pub use task::{FarQueue, FarQueueSpec, FarQueueStatus, FarTask, FarTaskSpec, FarTaskStatus, TaskPhase};

/// API group of every kind here.
pub const GROUP: &str = "tiffany.dev";
/// Keeps a FarAgent until its microVM is gone.
pub const FINALIZER: &str = "tiffany.dev/microvm";
/// Label with the name of the pool that an agent is kept warm for.
pub const POOL_LABEL: &str = "tiffany.dev/pool";
/// Namespace of the Leases that blades renew through the controller.
pub const NODE_LEASE_NAMESPACE: &str = "far-node-lease";
/// Namespace of the controller's own Lease.
pub const SYSTEM_NAMESPACE: &str = "far-system";
/// Field manager of everything the controller writes.
pub const FIELD_MANAGER: &str = "far-controller";
