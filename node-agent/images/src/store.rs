//! The store on disk.
//!
//! ```text
//! <dir>/references.json    reference → manifest digest; replaced atomically
//! <dir>/images/<hex>.json  what the image says about itself; read by every listing
//! <dir>/programs/<hex>.json  what it can execute; read only when a program is looked for; absent: not known
//! <dir>/rootfs/<hex>.squashfs
//! <dir>/tmp/               work of a load; emptied when the store is opened
//! ```
//!
//! Invariant: a name in `rootfs/`, `programs/` or `images/` is complete: everything is written under `tmp/`, synced and renamed.
//! Order: root file system, programs, description, reference; a crash between them leaves content that nobody names, which
//! [`ImageStore::remove`], [`ImageStore::collect`] and the next open collect.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    ImageError, Limits, archive,
    archive::{ConfigDocument, RunConfig},
    layer::{self, Spool},
    squash,
    tree::{Kind, Node, Tree},
};

/// Longest reference, in bytes.
const REFERENCE_BYTES: usize = 512;
/// Most bytes of the paths of an image's programs: each search reads them all. A Debian with its toolchains has half of it.
const PROGRAMS_BYTES: usize = 1 << 20;
/// Folders with one entry per image.
const CONTENT: [&str; 3] = ["images", "programs", "rootfs"];

/// What an image runs when the FarAgent does not say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Program and leading arguments.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// `NAME=value`; entries without `=` are dropped when the image is loaded.
    pub env: Vec<String>,
    /// Absolute path; empty: not set.
    pub working_dir: String,
    /// As in OCI: user, uid, user:group, uid:gid; empty: root.
    pub user: String,
}

/// An image on this blade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `sha256:…` of the manifest.
    pub digest: String,
    /// Names it has on this blade, sorted.
    pub references: Vec<String>,
    /// The read-only root file system (squashfs).
    pub rootfs: PathBuf,
    /// Size of the root file system in bytes.
    pub size_bytes: u64,
    /// What it runs by default.
    pub config: ImageConfig,
}

/// What `images/<hex>.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    config: ImageConfig,
}

/// What `programs/<hex>.json` holds: every path that can be executed or leads on (files with an execute bit, symlinks).
/// Tells a missing entrypoint before a VM is booted for it.
#[derive(Debug, Serialize, Deserialize)]
struct Programs {
    programs: BTreeSet<String>,
}

/// A blade's images. Cheap to share behind an `Arc`; loads run one at a time.
#[derive(Debug)]
pub struct ImageStore {
    dir: PathBuf,
    limits: Limits,
    references: Mutex<BTreeMap<String, String>>,
    loading: Mutex<()>,
}

impl ImageStore {
    /// Opens the store, making `dir` (mode 0700) when it is missing, and collects what a crash left.
    ///
    /// # Errors
    /// [`ImageError::Io`], or [`ImageError::Archive`] when `references.json` is not ours.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, ImageError> {
        Self::open_with(dir, Limits::default())
    }

    /// As [`ImageStore::open`], with other limits.
    ///
    /// # Errors
    /// As [`ImageStore::open`].
    pub fn open_with(dir: impl Into<PathBuf>, limits: Limits) -> Result<Self, ImageError> {
        let dir = dir.into();
        let inner = CONTENT.iter().chain(&["tmp"]).map(|name| dir.join(name));
        for folder in std::iter::once(dir.clone()).chain(inner) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(ImageError::io("creating", &folder))?;
        }
        empty(&dir.join("tmp"))?;
        let file = dir.join("references.json");
        let references = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| ImageError::Archive {
                what: format!("{} is not readable: {error}", file.display()),
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(source) => {
                return Err(ImageError::Io {
                    doing: "reading",
                    path: file,
                    source,
                });
            }
        };
        let store = Self {
            dir,
            limits,
            references: Mutex::new(references),
            loading: Mutex::new(()),
        };
        store.collect_now(&BTreeSet::new())?;
        Ok(store)
    }

    /// Loads an OCI image archive under `reference`, which then names it and nothing else.
    ///
    /// # Errors
    /// [`ImageError`]; the store is as before.
    pub fn load_archive(&self, archive: impl Read, reference: &str) -> Result<Image, ImageError> {
        check_reference(reference)?;
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let work = tempfile::tempdir_in(self.dir.join("tmp"))
            .map_err(ImageError::io("creating a folder in", self.dir.join("tmp")))?;
        let opened = archive::open(archive, work.path(), &self.limits)?;
        let hex = opened.manifest.hex().to_owned();
        let digest = opened.manifest.to_string();
        if !matches!(self.image(&digest), Ok(Some(_))) {
            let spool_path = work.path().join("spool");
            let spool = File::options()
                .create_new(true)
                .read(true)
                .write(true)
                .open(&spool_path)
                .map_err(ImageError::io("creating", &spool_path))?;
            let mut spool = Spool::new(spool);
            let mut tree = Tree::new();
            for layer in &opened.layers {
                layer::merge(layer, &mut tree, &mut spool, &self.limits)?;
                tree.next_layer();
            }
            let fresh = work.path().join("rootfs");
            squash::write(&tree, &Arc::new(spool.file), &fresh)?;
            let target = self.rootfs(&hex);
            fs::rename(&fresh, &target).map_err(ImageError::io("renaming to", &target))?;
            sync_folder(&self.dir.join("rootfs"))?;
            match programs(&tree) {
                Some(programs) => write_atomically(&self.programs_file(&hex), &json(&Programs { programs }))?,
                None => remove_if_there(&self.programs_file(&hex))?,
            }
            let description = Description {
                config: config_of(&opened.config),
            };
            write_atomically(&self.description_file(&hex), &json(&description))?;
        }
        self.change_references(|references| references.insert(reference.to_owned(), digest.clone()))?;
        self.image(&digest)?.ok_or_else(|| ImageError::Archive {
            what: format!("image {digest} vanished while it was loaded"),
        })
    }

    /// The image that `reference` names: as it was loaded, or by digest (`sha256:…` or `name@sha256:…`).
    ///
    /// # Errors
    /// [`ImageError::Unknown`] when it is not here; [`ImageError::Io`].
    pub fn resolve(&self, reference: &str) -> Result<Image, ImageError> {
        let unknown = || ImageError::Unknown {
            reference: reference.to_owned(),
        };
        let by_name = self.references().get(reference).cloned();
        let digest = by_name.or_else(|| {
            let digest = reference.rsplit_once('@').map_or(reference, |(_, digest)| digest);
            self.references()
                .values()
                .find(|known| known.as_str() == digest)
                .cloned()
        });
        self.image(&digest.ok_or_else(unknown)?)?.ok_or_else(unknown)
    }

    /// For each path, whether the image may have a program there: `false` only when it certainly has none. A path that leads
    /// over a symbolic link is left to the guest's kernel.
    ///
    /// # Errors
    /// [`ImageError::ProgramsUnknown`] when the image has too many of them to be listed, or is not here.
    pub fn may_have_programs(&self, digest: &str, paths: &[String]) -> Result<Vec<bool>, ImageError> {
        let file = self.programs_file(digest.trim_start_matches("sha256:"));
        let Programs { programs } = read_json(&file)?.ok_or_else(|| ImageError::ProgramsUnknown {
            digest: digest.to_owned(),
            limit: PROGRAMS_BYTES,
        })?;
        let may_be_there = |path: &String| {
            let mut prefix = String::new();
            for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
                prefix.push('/');
                prefix.push_str(part);
                // Symlinks are listed with a trailing "@".
                if part == ".." || programs.contains(&format!("{prefix}@")) {
                    return true;
                }
            }
            programs.contains(&prefix)
        };
        Ok(paths.iter().map(may_be_there).collect())
    }

    /// All images that can be used, by digest. One that cannot be read hides no other: it is left out with a warning.
    ///
    /// # Errors
    /// None at present.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let digests: BTreeSet<String> = self.references().values().cloned().collect();
        let readable = |digest: &String| match self.image(digest) {
            Ok(image) => image,
            Err(error) => {
                let fix = "load it again";
                tracing::warn!(%digest, error = &error as &dyn std::error::Error, fix, "an image cannot be read");
                None
            }
        };
        Ok(digests.iter().filter_map(readable).collect())
    }

    /// Forgets a reference; its content stays until it is collected. Unknown: success.
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let _not_while_loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        self.change_references(|references| drop(references.remove(reference)))
    }

    /// Removes content that no reference names and that is not in `in_use` (digests of images that a microVM has open, or
    /// will have).
    ///
    /// # Errors
    /// [`ImageError::Io`].
    pub fn collect(&self, in_use: &BTreeSet<String>) -> Result<(), ImageError> {
        let _not_while_loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        self.collect_now(in_use)
    }

    fn references(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.references.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_references<T>(&self, change: impl FnOnce(&mut BTreeMap<String, String>) -> T) -> Result<(), ImageError> {
        let mut references = self.references();
        let mut next = references.clone();
        change(&mut next);
        if *references != next {
            write_atomically(&self.dir.join("references.json"), &json(&next))?;
            *references = next;
        }
        Ok(())
    }

    fn rootfs(&self, hex: &str) -> PathBuf {
        self.dir.join("rootfs").join(format!("{hex}.squashfs"))
    }

    fn description_file(&self, hex: &str) -> PathBuf {
        self.dir.join("images").join(format!("{hex}.json"))
    }

    fn programs_file(&self, hex: &str) -> PathBuf {
        self.dir.join("programs").join(format!("{hex}.json"))
    }

    fn image(&self, digest: &str) -> Result<Option<Image>, ImageError> {
        let hex = digest.trim_start_matches("sha256:");
        let Some(Description { config }) = read_json(&self.description_file(hex))? else {
            return Ok(None);
        };
        let rootfs = self.rootfs(hex);
        let size_bytes = match fs::metadata(&rootfs) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ImageError::io("reading", &rootfs)(error)),
        };
        let references = self
            .references()
            .iter()
            .filter(|(_, known)| *known == digest)
            .map(|(name, _)| name.clone())
            .collect();
        Ok(Some(Image {
            digest: digest.to_owned(),
            references,
            rootfs,
            size_bytes,
            config,
        }))
    }

    /// Removes content that no reference names and nobody uses.
    fn collect_now(&self, in_use: &BTreeSet<String>) -> Result<(), ImageError> {
        let wanted: BTreeSet<String> = self
            .references()
            .values()
            .chain(in_use)
            .map(|digest| digest.trim_start_matches("sha256:").to_owned())
            .collect();
        for folder in CONTENT {
            let folder = self.dir.join(folder);
            for entry in fs::read_dir(&folder)
                .map_err(ImageError::io("reading", &folder))?
                .flatten()
            {
                let path = entry.path();
                let named = path
                    .file_stem()
                    .and_then(|stem| stem.to_str())
                    .is_some_and(|stem| wanted.contains(stem));
                if !named {
                    remove_if_there(&path)?;
                }
            }
        }
        Ok(())
    }
}

fn config_of(document: &ConfigDocument) -> ImageConfig {
    let empty = RunConfig::default();
    let run = document.config.as_ref().unwrap_or(&empty);
    ImageConfig {
        entrypoint: run.entrypoint.clone().unwrap_or_default(),
        cmd: run.cmd.clone().unwrap_or_default(),
        env: run
            .env
            .clone()
            .unwrap_or_default()
            .into_iter()
            .filter(|entry| entry.find('=').is_some_and(|at| at > 0))
            .collect(),
        working_dir: run.working_dir.clone().unwrap_or_default(),
        user: run.user.clone().unwrap_or_default(),
    }
}

/// Paths with an execute bit, and symlinks with a trailing "@". Names that are not UTF-8 are left out: an entrypoint is text.
/// `None`: too many.
fn programs(tree: &Tree) -> Option<BTreeSet<String>> {
    fn walk(node: &Node, at: &str, out: &mut BTreeSet<String>, left: &mut usize) -> Option<()> {
        let Kind::Folder(children) = &node.kind else {
            return Some(());
        };
        for (name, child) in children {
            let Ok(name) = std::str::from_utf8(name) else { continue };
            let path = format!("{at}/{name}");
            let program = match &child.kind {
                Kind::File(_) if child.meta.mode & 0o111 != 0 => path,
                Kind::Symlink(_) => format!("{path}@"),
                Kind::File(_) => continue,
                Kind::Folder(_) => {
                    walk(child, &path, out, left)?;
                    continue;
                }
            };
            *left = left.checked_sub(program.len())?;
            out.insert(program);
        }
        Some(())
    }
    let mut out = BTreeSet::new();
    let mut left = PROGRAMS_BYTES;
    walk(tree.root(), "", &mut out, &mut left)?;
    Some(out)
}

fn check_reference(reference: &str) -> Result<(), ImageError> {
    let wrong = |why| {
        Err(ImageError::Reference {
            reference: reference.to_owned(),
            why,
        })
    };
    if reference.is_empty() {
        return wrong("is empty");
    }
    if reference.len() > REFERENCE_BYTES {
        return wrong("is longer than 512 bytes");
    }
    if reference.contains('@') {
        return wrong("has a digest: load it under a name and tag");
    }
    if !reference
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"._-/:".contains(&byte))
    {
        return wrong("has characters other than letters, digits and . _ - / :");
    }
    Ok(())
}

/// `None`: there is no such file.
fn read_json<T: DeserializeOwned>(file: &Path) -> Result<Option<T>, ImageError> {
    match fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| ImageError::Archive {
                what: format!("{} is not readable: {error}", file.display()),
            }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ImageError::io("reading", file)(error)),
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("maps with text keys are JSON")
}

/// Writes under a temporary name, syncs and renames; the file is complete or as before.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
    let folder = path.parent().expect("files of the store lie in a folder");
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(ImageError::io("creating a file in", folder))?;
    file.write_all(bytes).map_err(ImageError::io("writing", path))?;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(0o600))
        .map_err(ImageError::io("setting the mode of", path))?;
    file.as_file().sync_all().map_err(ImageError::io("syncing", path))?;
    file.persist(path).map_err(|error| ImageError::Io {
        doing: "renaming to",
        path: path.to_path_buf(),
        source: error.error,
    })?;
    sync_folder(folder)
}

/// Makes a rename last.
fn sync_folder(folder: &Path) -> Result<(), ImageError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(ImageError::io("syncing", folder))
}

fn empty(folder: &Path) -> Result<(), ImageError> {
    for entry in fs::read_dir(folder)
        .map_err(ImageError::io("reading", folder))?
        .flatten()
    {
        remove_if_there(&entry.path())?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<(), ImageError> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ImageError::Io {
            doing: "removing",
            path: path.to_path_buf(),
            source: error,
        }),
        _ => Ok(()),
    }
}
