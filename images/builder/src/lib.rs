//! Builds what guests boot from, bit for bit the same from the same inputs, with Nix or without it.
//!
//! - [`kernel`]: a distribution's own kernel package, its boot image unpacked to the ELF that microVMs take, and the few
//!   modules a guest needs, in load order;
//! - [`initramfs`]: far-init and those modules as one cpio archive;
//! - [`oci`]: OCI image archives from single files;
//! - [`inspect`]: what such an archive holds;
//! - [`kit`]: kernel, initramfs and guest image together, as a blade wants them.
#![forbid(unsafe_code)]

mod bzimage;
mod cpio;
mod error;
pub mod initramfs;
pub mod inspect;
pub mod kernel;
pub mod kit;
mod modules;
pub mod oci;
mod unpack;
mod write;

pub use error::BuildError;

/// Puts `bytes` at `path` whole or not at all; a file that has them already is left alone.
///
/// # Errors
/// [`BuildError::Io`].
pub fn write_whole(path: &std::path::Path, bytes: &[u8]) -> Result<(), BuildError> {
    write::if_changed(path, bytes).map(drop)
}
