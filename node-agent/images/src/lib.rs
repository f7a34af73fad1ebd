//! The blade's image store: OCI image archives in, read-only root file systems out.
//!
//! An archive is hostile input. Its layers are merged in a tree of names in memory ([`tree`]), file contents go to one
//! spool file, and the result is written as one squashfs named by the manifest's digest ([`squash`]). No path of a layer
//! ever becomes a path of the blade (ADR 0005).
//!
//! ```text
//! archive.oci.tar ──► archive: index → manifest → config, every digest checked
//!                        └──► layer: tar entries ──► tree ──► squash ──► rootfs/<digest>.squashfs
//! ```
//!
//! The API is synchronous: callers on an async runtime use a blocking thread.
#![forbid(unsafe_code)]

mod archive;
mod digest;
mod entries;
mod error;
mod layer;
mod limits;
mod squash;
mod store;
mod tree;
mod unpack;

pub use error::ImageError;
pub use limits::Limits;
pub use store::{Image, ImageConfig, ImageStore};
