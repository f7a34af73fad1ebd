//! Why an image cannot be had, with the object at fault and, where there is one, the way out.

use std::{io, path::PathBuf};

/// Errors of the image store.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The reference is not on this blade.
    #[error("image {reference} is not on this blade: load it with `far image load FILE --as {reference}`")]
    Unknown {
        /// As asked for.
        reference: String,
    },
    /// The reference cannot be one.
    #[error("image reference {reference:?} {why}")]
    Reference {
        /// As given.
        reference: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The archive is not an OCI image layout, or not for this machine.
    #[error("image archive: {what}")]
    Archive {
        /// What is missing or wrong, and where.
        what: String,
    },
    /// Content does not have the digest or size that names it.
    #[error("image archive: {object} has {field} {seen}, but {wanted} was announced")]
    Mismatch {
        /// Which blob.
        object: String,
        /// "digest" or "size".
        field: &'static str,
        /// What it has.
        seen: String,
        /// What the descriptor says.
        wanted: String,
    },
    /// A layer entry that no honest image has.
    #[error("layer {layer}: entry {entry:?} {why}")]
    Entry {
        /// Digest of the layer.
        layer: String,
        /// Path as written in the layer, lossy UTF-8.
        entry: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// A bound of [`crate::Limits`] was reached.
    #[error("image is too large: {what} is over the limit of {limit}")]
    TooLarge {
        /// Which bound.
        what: &'static str,
        /// Its value.
        limit: u64,
    },
    /// Which programs the image has is not on record: there are too many of them. Its guest will tell.
    #[error("which programs image {digest} has is not known: only lists of up to {limit} bytes are kept")]
    ProgramsUnknown {
        /// `sha256:…` of the manifest.
        digest: String,
        /// Bytes of all their paths together.
        limit: usize,
    },
    /// The machine failed, not the image.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl ImageError {
    /// For `map_err` on file operations.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// Whether the image itself is at fault (and a retry is of no use).
    #[must_use]
    pub fn is_the_images_fault(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }
}
