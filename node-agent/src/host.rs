//! The two things an attempt needs from its blade, as traits owned here: a place to run VMs, and images.
//!
//! The real ones are [`crate::direct_host`] (far-vmm) and [`crate::store`] (far-images); tests have theirs in memory.

use crate::{names::VmId, nics::Nic, outcome::VmmEnd, pulse::Pinged, record::Resources};
use futures::future::BoxFuture;
use std::{
    collections::BTreeSet,
    fmt::Debug,
    path::{Path, PathBuf},
};

/// What a VM is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPlan {
    /// Its name.
    pub vm: VmId,
    /// Read-only squashfs of the image.
    pub rootfs: PathBuf,
    /// 1 and up.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u32,
    /// What it may reach.
    pub network: far_net::Policy,
}

/// What a VM that was prepared will get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// As it is told.
    pub resources: Resources,
    /// What the guest is told of its NIC; `None`: none.
    pub nic: Option<Nic>,
    /// What the spec asks of the network and this blade cannot give now; empty: nothing.
    pub notice: String,
}

/// A VM could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Its files.
    #[error(transparent)]
    Files(#[from] HostError),
    /// Its network: it must not run without.
    #[error("{0}")]
    Network(String),
}

/// A VM could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct HostError {
    /// Operation, object and cause, for people.
    pub message: String,
}

/// Which VMM and accelerator this blade uses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// "firecracker" or "qemu".
    pub vmm: String,
    /// "kvm" or "tcg".
    pub accelerator: String,
    /// Why not KVM; empty where it is.
    pub kvm_reason: String,
}

/// Runs VMs that outlive far-node. All calls but `boot` are idempotent; a VM that is gone is no error.
pub trait VmHost: Debug + Send + Sync + 'static {
    /// What VMs run on.
    fn facts(&self) -> HostFacts;
    /// Folder of a VM's files and sockets.
    fn folder(&self, vm: &VmId) -> PathBuf;
    /// Makes the VM's folder, in place of what may lie there, and its NIC. Nothing runs yet. Blocking.
    ///
    /// # Errors
    /// What could not be made. Going without a NIC on a blade that has none is no error.
    fn prepare(&self, plan: &VmPlan) -> Result<Prepared, PrepareError>;
    /// Spawns the VMM, detached.
    fn boot<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), HostError>>;
    /// Completes when the VMM ended, also one that an earlier far-node spawned. Cancel-safe.
    fn ended(&self, vm: &VmId) -> BoxFuture<'static, VmmEnd>;
    /// Ends the VMM by force; [`VmHost::ended`] tells when it is done.
    fn kill<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, ()>;
    /// Asks the guest's agent whether it lives. Takes as long as the guest does, and the question outlives the future.
    fn ping(&self, vm: &VmId) -> BoxFuture<'static, Pinged>;
    /// CPU time of the VMM and its helpers so far, microseconds; 0: not known.
    fn cpu_us<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, u64>;
    /// Ends what still runs of the VM and removes its folder.
    fn release<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), HostError>>;
    /// VMs that have a folder. Blocking.
    fn leftovers(&self) -> Vec<VmId>;
}

/// Settings of an image's OCI config.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)] // Named as in the OCI image specification.
pub struct ImageSettings {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub working_dir: String,
    pub user: String,
}

/// An image that can be booted from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyImage {
    /// "sha256:…" of the manifest.
    pub digest: String,
    /// Read-only squashfs.
    pub rootfs: PathBuf,
    /// Its own settings.
    pub settings: ImageSettings,
}

/// An image in the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredImage {
    /// "sha256:…" of the manifest.
    pub digest: String,
    /// Names that point to it.
    pub references: Vec<String>,
    /// On disk.
    pub size_bytes: u64,
}

/// An image call failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageFault {
    /// No such reference.
    #[error("image {reference} is not on this blade")]
    Unknown {
        /// As asked.
        reference: String,
    },
    /// The archive, the image or the reference is bad.
    #[error("{message}")]
    Bad {
        /// What and why.
        message: String,
    },
    /// The store failed.
    #[error("{message}")]
    Store {
        /// What and why.
        message: String,
    },
}

/// Images by reference. All calls block.
pub trait Images: Debug + Send + Sync + 'static {
    /// The image under a reference, its root file system made where it is not yet.
    ///
    /// # Errors
    /// Unknown reference, bad image, or the store fails.
    fn prepare(&self, reference: &str) -> Result<ReadyImage, ImageFault>;
    /// For each absolute path, whether it leads to a file in the image; `None`: the store cannot tell.
    fn has_files(&self, image: &ReadyImage, paths: &[String]) -> Option<Vec<bool>>;
    /// Everything stored.
    ///
    /// # Errors
    /// The store fails.
    fn list(&self) -> Result<Vec<StoredImage>, ImageFault>;
    /// Loads an OCI archive under a reference.
    ///
    /// # Errors
    /// Bad archive or reference, or the store fails; nothing is stored then.
    fn load(&self, reference: &str, archive: &Path) -> Result<StoredImage, ImageFault>;
    /// Removes a reference; its image stays until it is collected. Unknown is success.
    ///
    /// # Errors
    /// The store fails.
    fn remove(&self, reference: &str) -> Result<(), ImageFault>;
    /// Removes what no reference names any more and is not in use.
    ///
    /// # Errors
    /// The store fails.
    fn collect(&self, in_use: &BTreeSet<String>) -> Result<(), ImageFault>;
    /// Folder for archives that are being received.
    fn incoming(&self) -> PathBuf;
}
