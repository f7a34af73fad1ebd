//! Room for an agent's own files: in the guest's memory, gone with the microVM.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::Quantity;

/// The writable layer over the read-only image.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Scratch {
    /// Most it may hold, as a quantity of at least 1Mi; taken from the guest's memory.
    #[x_kube(validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('1Mi')) >= 0")
        .message("spec.scratch.sizeLimit must be a quantity of at least 1Mi, for example 64Mi"))]
    pub size_limit: Quantity,
}

/// One folder of its own.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// Name of the volume, a DNS-1123 label.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("spec.volumes[].name must be a lower-case label, for example work"))]
    pub name: String,
    /// Absolute path in the guest, without "." and ".." parts.
    #[schemars(length(min = 2, max = 4095))]
    #[x_kube(
        validation = Rule::new("self.startsWith('/') && !self.endsWith('/') && !self.contains('//')").message("spec.volumes[].mountPath must be an absolute path without empty parts"),
        validation = Rule::new("!(self + '/').contains('/../') && !(self + '/').contains('/./')").message("spec.volumes[].mountPath must not contain '.' or '..' parts")
    )]
    pub mount_path: String,
    /// An empty folder in the guest's memory.
    pub empty_dir: EmptyDir,
}

/// An empty folder in the guest's memory.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDir {
    /// Most it may hold, as a quantity of at least 1Mi; absent: half of the guest's memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("isQuantity(string(self)) && quantity(string(self)).compareTo(quantity('1Mi')) >= 0")
        .message("spec.volumes[].emptyDir.sizeLimit must be a quantity of at least 1Mi, for example 64Mi"))]
    pub size_limit: Option<Quantity>,
}
