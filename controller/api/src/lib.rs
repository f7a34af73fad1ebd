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
pub mod node;
pub mod quantity;
pub mod status;

pub use agent::{
    DEFAULT_GRACE_SECONDS, Env, FarAgent, FarAgentSpec, FileSource, KeyRef, NameRef, RestartPolicy, ValueFrom,
};
pub use crds::{crds, crds_yaml};
pub use node::{FarNode, FarNodeSpec, FarNodeStatus, NodeImage, NodeInfo, NodeResources, Taint};
pub use quantity::Quantity;
pub use status::{BootResources, FarAgentStatus, Phase};

/// API group of every kind here.
pub const GROUP: &str = "tiffany.dev";
/// Keeps a FarAgent until its microVM is gone.
pub const FINALIZER: &str = "tiffany.dev/microvm";
/// Namespace of the Leases that blades renew through the controller.
pub const NODE_LEASE_NAMESPACE: &str = "far-node-lease";
/// Namespace of the controller's own Lease.
pub const SYSTEM_NAMESPACE: &str = "far-system";
/// Field manager of everything the controller writes.
pub const FIELD_MANAGER: &str = "far-controller";
