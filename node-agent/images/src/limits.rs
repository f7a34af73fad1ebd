//! What an image may cost its blade. Every bound is checked while reading, before the memory or disk is used.

/// Bounds of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all blobs of the archive together, as stored.
    pub archive_bytes: u64,
    /// Bytes that all layers unpack to, tar headers included, and once more for each hard link (the root file system holds
    /// a copy).
    pub content_bytes: u64,
    /// Entries of all layers together, and folders that have none but something below them.
    pub entries: usize,
    /// Bytes of one path inside the image (`PATH_MAX` less the final NUL, limits.h).
    pub path_bytes: usize,
    /// Bytes of all paths and link targets of what `entries` counts: what the tree costs in memory.
    pub name_bytes: u64,
    /// Parts of one path.
    pub path_depth: usize,
    /// Bytes of a manifest, an index or a config.
    pub document_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            archive_bytes: 4 << 30,
            content_bytes: 4 << 30,
            entries: 1_000_000,
            path_bytes: 4095,
            name_bytes: 256 << 20,
            path_depth: 128,
            // The bound of containerd and the distribution spec's advice: manifests up to 4 MiB.
            document_bytes: 4 << 20,
        }
    }
}
