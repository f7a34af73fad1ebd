//! OCI image archives (tar of an image layout) from single files, bit for bit the same from the same inputs.
//!
//! One layer, plain tar: names sorted, times 0, owners given, no user names. One manifest for linux/amd64.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use serde_json::json;

use crate::{BuildError, write::sha256};

/// What an entry of the layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Folder,
    File(Vec<u8>),
    Symlink(String),
}

/// An image in the making.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    entries: BTreeMap<String, (u32, u32, Entry)>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    working_dir: Option<String>,
    user: Option<String>,
}

impl Builder {
    /// An image with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A file with these permission bits, owned by `owner` (uid and gid).
    ///
    /// # Errors
    /// [`BuildError::Option`] when `path` is not absolute and normalised.
    pub fn file(
        &mut self,
        path: &str,
        mode: u32,
        owner: u32,
        bytes: impl Into<Vec<u8>>,
    ) -> Result<&mut Self, BuildError> {
        self.add(path, mode, owner, Entry::File(bytes.into()))
    }

    /// A folder.
    ///
    /// # Errors
    /// As [`Builder::file`].
    pub fn folder(&mut self, path: &str, mode: u32, owner: u32) -> Result<&mut Self, BuildError> {
        self.add(path, mode, owner, Entry::Folder)
    }

    /// A symbolic link to `target`.
    ///
    /// # Errors
    /// As [`Builder::file`].
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self, BuildError> {
        self.add(path, 0o777, 0, Entry::Symlink(target.to_owned()))
    }

    /// Program and leading arguments.
    pub fn entrypoint(&mut self, words: impl IntoIterator<Item = String>) -> &mut Self {
        self.entrypoint = words.into_iter().collect();
        self
    }

    /// Default arguments.
    pub fn cmd(&mut self, words: impl IntoIterator<Item = String>) -> &mut Self {
        self.cmd = words.into_iter().collect();
        self
    }

    /// `NAME=value` entries.
    pub fn env(&mut self, entries: impl IntoIterator<Item = String>) -> &mut Self {
        self.env = entries.into_iter().collect();
        self
    }

    /// Working folder and user, as OCI writes them.
    pub fn run_as(&mut self, working_dir: Option<String>, user: Option<String>) -> &mut Self {
        self.working_dir = working_dir;
        self.user = user;
        self
    }

    fn add(&mut self, path: &str, mode: u32, owner: u32, entry: Entry) -> Result<&mut Self, BuildError> {
        let relative = path.strip_prefix('/').unwrap_or_default();
        let good = !relative.is_empty() && relative.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !good {
            return Err(BuildError::Option {
                option: "path in the image",
                what: format!("{path:?} is not absolute and normalised"),
            });
        }
        // Folders on the way, as every unpacker expects them before their children.
        for (at, _) in relative.match_indices('/') {
            self.entries
                .entry(relative[..at].to_owned())
                .or_insert((0o755, 0, Entry::Folder));
        }
        self.entries.insert(relative.to_owned(), (mode & 0o7777, owner, entry));
        Ok(self)
    }

    /// The archive.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let layer = self.layer();
        let layer_digest = sha256(&layer);
        let mut run = serde_json::Map::new();
        for (key, value) in [("Entrypoint", &self.entrypoint), ("Cmd", &self.cmd), ("Env", &self.env)] {
            if !value.is_empty() {
                run.insert(key.into(), json!(value));
            }
        }
        for (key, value) in [("WorkingDir", &self.working_dir), ("User", &self.user)] {
            if let Some(value) = value {
                run.insert(key.into(), json!(value));
            }
        }
        let config = document(&json!({
            "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z", "config": run,
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer_digest}")] },
        }));
        let manifest = document(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
        }));
        let index = document(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [descriptor("application/vnd.oci.image.manifest.v1+json", &manifest)],
        }));
        let mut blobs: Vec<(String, &[u8])> = [&config, &layer, &manifest]
            .into_iter()
            .map(|blob| (format!("blobs/sha256/{}", sha256(blob)), blob.as_slice()))
            .collect();
        blobs.sort();
        let mut out = tar::Builder::new(Vec::new());
        // The small files first: a reader can tell early that this is an image layout.
        let files = [
            ("index.json".to_owned(), index.as_slice()),
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#),
        ];
        for (name, bytes) in files.into_iter().chain(blobs) {
            append(&mut out, &name, 0o644, 0, &Entry::File(bytes.to_vec())).expect("writing to memory");
        }
        out.into_inner().expect("writing to memory")
    }

    fn layer(&self) -> Vec<u8> {
        let mut out = tar::Builder::new(Vec::new());
        for (path, (mode, owner, entry)) in &self.entries {
            append(&mut out, path, *mode, *owner, entry).expect("writing to memory");
        }
        out.into_inner().expect("writing to memory")
    }
}

fn append<W: Write>(out: &mut tar::Builder<W>, path: &str, mode: u32, owner: u32, entry: &Entry) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_uid(owner.into());
    header.set_gid(owner.into());
    header.set_mtime(0);
    match entry {
        Entry::Folder => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            out.append_data(&mut header, format!("{path}/"), io::empty())
        }
        Entry::File(bytes) => {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(bytes.len() as u64);
            out.append_data(&mut header, path, bytes.as_slice())
        }
        Entry::Symlink(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            out.append_link(&mut header, path, target)
        }
    }
}

fn document(value: &serde_json::Value) -> Vec<u8> {
    serde_json::to_vec(value).expect("maps with text keys are JSON")
}

fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{}", sha256(blob)), "size": blob.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut builder = Builder::new();
        builder
            .file("/usr/bin/hello", 0o755, 0, "#!hello")
            .unwrap()
            .symlink("/bin", "usr/bin")
            .unwrap();
        builder
            .folder("/tmp", 0o1777, 0)
            .unwrap()
            .entrypoint(["/usr/bin/hello".to_owned()]);
        builder.build()
    }

    #[test]
    fn the_same_calls_give_the_same_bytes() {
        assert_eq!(image(), image());
    }

    #[test]
    fn the_store_takes_what_the_builder_makes() {
        let dir = tempfile::tempdir().unwrap();
        let store = far_images::ImageStore::open(dir.path()).unwrap();
        let loaded = store.load_archive(image().as_slice(), "example.com/hello:1").unwrap();
        assert_eq!(loaded.config.entrypoint, ["/usr/bin/hello"]);
        let may = |path: &str| store.may_have_programs(&loaded.digest, &[path.to_owned()]).unwrap()[0];
        assert!(may("/usr/bin/hello"));
        assert!(may("/bin/hello"), "over a symlink: the guest decides");
        assert!(!may("/usr/bin/other"));
    }

    #[test]
    fn a_path_that_is_not_absolute_and_normalised_is_refused() {
        for path in ["", "/", "relative", "/a/../b", "/a//b", "/a/", "/./a"] {
            assert!(Builder::new().file(path, 0o644, 0, "x").is_err(), "{path:?}");
        }
    }
}
