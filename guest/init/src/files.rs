//! Files that are placed before the payload starts: path rules, collecting their chunks, and writing them safely.
//!
//! They are held in memory until all have come and every SHA-256 is right, then written under the payload's root, where no
//! path part may be a symlink: an image cannot redirect a secret.

use crate::{
    plan::MAX_PATH,
    rootfs::{Root, RootError, Symlinks, kind_of},
    users::User,
};
use far_proto::guest::{FileChunk, FileEntry};
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, SFlag, fchmod},
    unistd::{Gid, Uid, UnlinkatFlags, fchown, unlinkat},
};
use sha2::{Digest, Sha256};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// All files of one agent together, bytes.
const MAX_TOTAL: u64 = 8 << 20;
/// Most files of one agent.
const MAX_FILES: usize = 4096;
/// Longest piece of one file, bytes.
const MAX_CHUNK: usize = 512 << 10;
/// Folders of the kernel: nothing may be placed there.
const KERNEL_FOLDERS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A checked entry of `Config.files`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileSpec {
    path: String,
    mode: u32,
    size: usize,
    sha256: [u8; 32],
    sealed: bool,
}

/// What is wrong with a file; the texts become the agent's `start_error`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum FilesError {
    #[error("spec.files[{index}].path: {path:?} {rule}")]
    Path {
        index: usize,
        path: String,
        rule: &'static str,
    },
    #[error("spec.files[{index}].mode: {mode:o} is more than 0777")]
    Mode { index: usize, mode: u32 },
    #[error("spec.files[{index}]: its SHA-256 has {bytes} bytes, not 32")]
    Digest { index: usize, bytes: usize },
    #[error("spec.files: more than {MAX_TOTAL} bytes or {MAX_FILES} files together")]
    TooMuch,
    #[error("spec.files[{index}].path: {path:?} is listed twice")]
    Twice { index: usize, path: String },
    #[error(
        "chunk of file {file} at {offset}: expected file {wanted_file} at {wanted_offset}, at most {MAX_CHUNK} bytes and its size"
    )]
    Chunk {
        file: u32,
        offset: u64,
        wanted_file: usize,
        wanted_offset: usize,
    },
    #[error("spec.files[{index}].path: {path:?} came incomplete: {got} of {size} bytes")]
    Incomplete {
        index: usize,
        path: String,
        got: usize,
        size: usize,
    },
    #[error("spec.files[{index}].path: the content of {path:?} does not have its SHA-256")]
    Content { index: usize, path: String },
    #[error("spec.files[{index}].path: placing {path:?}: {problem}")]
    Place {
        index: usize,
        path: String,
        problem: String,
    },
}

/// Checks the list of a configuration.
///
/// # Errors
/// The first entry that breaks a rule.
pub(crate) fn check(entries: Vec<FileEntry>) -> Result<Vec<FileSpec>, FilesError> {
    let total = entries.iter().fold(0_u64, |sum, entry| sum.saturating_add(entry.size));
    if total > MAX_TOTAL || entries.len() > MAX_FILES {
        return Err(FilesError::TooMuch);
    }
    let mut seen = std::collections::BTreeSet::new();
    entries
        .into_iter()
        .enumerate()
        .map(|(index, entry)| {
            if let Some(rule) = broken_path_rule(&entry.path) {
                return Err(FilesError::Path {
                    index,
                    path: entry.path,
                    rule,
                });
            }
            if entry.mode > 0o777 {
                return Err(FilesError::Mode {
                    index,
                    mode: entry.mode,
                });
            }
            if !seen.insert(entry.path.clone()) {
                return Err(FilesError::Twice {
                    index,
                    path: entry.path,
                });
            }
            let bytes = entry.sha256.len();
            let sha256 = entry
                .sha256
                .try_into()
                .map_err(|_| FilesError::Digest { index, bytes })?;
            let size = usize::try_from(entry.size).map_err(|_| FilesError::TooMuch)?;
            Ok(FileSpec {
                path: entry.path,
                mode: entry.mode,
                size,
                sha256,
                sealed: entry.sealed,
            })
        })
        .collect()
}

/// The rule that `path` breaks, if any.
pub(crate) fn broken_path_rule(path: &str) -> Option<&'static str> {
    let Some(rest) = path.strip_prefix('/') else {
        return Some("is not absolute");
    };
    if path.len() > MAX_PATH || rest.is_empty() {
        return Some("is not 2 to 4095 bytes long");
    }
    if path.contains('\0') {
        return Some("contains a NUL byte");
    }
    if rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Some("has an empty, \".\" or \"..\" part");
    }
    if rest.split('/').any(|part| part.len() > 255) {
        return Some("has a part of more than 255 bytes");
    }
    let below = |folder: &&str| {
        path.strip_prefix(*folder)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    KERNEL_FOLDERS
        .iter()
        .any(below)
        .then_some("lies in a folder of the kernel (/proc, /sys, /dev)")
}

/// Files on their way in. One connection's: a lost connection starts over.
pub(crate) struct Uploads {
    specs: Vec<FileSpec>,
    contents: Vec<Vec<u8>>,
}

impl Uploads {
    pub(crate) fn new(specs: Vec<FileSpec>) -> Self {
        Self {
            specs,
            contents: Vec::new(),
        }
    }

    /// Takes the next chunk: files in the order of the list, bytes in order and without gap. Empty files need none.
    pub(crate) fn accept(&mut self, chunk: FileChunk) -> Result<(), FilesError> {
        let file = chunk.file as usize;
        // A later file may only start when all before it are whole.
        while self.contents.len() <= file && self.contents.len() < self.specs.len() && self.is_whole() {
            self.contents.push(Vec::new());
        }
        let wanted_file = self.contents.len().saturating_sub(1);
        let wanted_offset = self.contents.last().map_or(0, Vec::len);
        let size = self.specs.get(file).map_or(0, |spec| spec.size);
        let fits = chunk.data.len() <= MAX_CHUNK && wanted_offset + chunk.data.len() <= size;
        if file != wanted_file || chunk.offset != wanted_offset as u64 || !fits || self.contents.is_empty() {
            return Err(FilesError::Chunk {
                file: chunk.file,
                offset: chunk.offset,
                wanted_file,
                wanted_offset,
            });
        }
        if let Some(content) = self.contents.last_mut() {
            content.extend_from_slice(&chunk.data);
        }
        Ok(())
    }

    fn is_whole(&self) -> bool {
        let current = self.contents.len().checked_sub(1);
        current.is_none_or(|index| self.contents[index].len() == self.specs[index].size)
    }

    /// Checks that every file is whole and right.
    pub(crate) fn verify(&mut self) -> Result<(), FilesError> {
        // Empty files at the end of the list had no chunk.
        self.contents.resize(self.specs.len(), Vec::new());
        for (index, (spec, content)) in self.specs.iter().zip(&self.contents).enumerate() {
            let path = || spec.path.clone();
            if content.len() != spec.size {
                return Err(FilesError::Incomplete {
                    index,
                    path: path(),
                    got: content.len(),
                    size: spec.size,
                });
            }
            if Sha256::digest(content)[..] != spec.sha256 {
                return Err(FilesError::Content { index, path: path() });
            }
        }
        Ok(())
    }

    /// Writes all files, owned by the payload's user, and forgets their contents. Call after [`Self::verify`].
    pub(crate) fn place(&mut self, root: &Root, owner: &User) -> Result<(), FilesError> {
        for (index, (spec, content)) in self.specs.iter().zip(&mut self.contents).enumerate() {
            let path = Path::new(&spec.path);
            let placed = write_file(root, path, content, spec.mode, owner)
                .and_then(|()| if spec.sealed { seal(root, path) } else { Ok(()) });
            placed.map_err(|problem| FilesError::Place {
                index,
                path: spec.path.clone(),
                problem: crate::power::with_sources(&problem),
            })?;
            wipe(content);
        }
        Ok(())
    }
}

/// Overwrites bytes that may be secret, and frees them.
fn wipe(content: &mut Vec<u8>) {
    content.fill(0);
    // Otherwise the compiler may see that nobody reads the zeros.
    std::hint::black_box(&content);
    *content = Vec::new();
}

/// Mounts the file read-only at its own path. Others in this mount namespace and its copies can then neither write nor
/// replace nor remove it.
fn seal(root: &Root, path: &Path) -> Result<(), WriteError> {
    let failed = |step| {
        move |source: Errno| WriteError::Step {
            step,
            source: source.into(),
        }
    };
    let at = || -> Result<_, WriteError> {
        let fd = root
            .open(path, OFlag::O_PATH, Mode::empty(), Symlinks::Refused)
            .map_err(failed("sealing it"))?;
        Ok((PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())), fd))
    };
    let (file, _fd) = at()?;
    mount(Some(&file), &file, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed("sealing it"))?;
    // Opened again: now the path leads to the new mount.
    let (file, _fd) = at()?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(None::<&str>, &file, None::<&str>, flags, None::<&str>).map_err(failed("sealing it"))
}

/// Overwrites and removes the files of a configuration after the payload's end. What the payload removed, replaced or
/// made unreachable is left alone: it may lead anywhere, and the VM's memory ends with the VM.
pub(crate) fn wipe_placed(root: &Root, specs: &[FileSpec]) {
    for spec in specs {
        let path = Path::new(&spec.path);
        if spec.sealed
            && let Ok(fd) = root.open(path, OFlag::O_PATH, Mode::empty(), Symlinks::Refused)
        {
            let mounted = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            // The payload has no way to this mount, so it is ours; if it is not there, there is nothing to undo.
            let _ = umount2(&mounted, MntFlags::MNT_DETACH);
        }
        let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let Ok(fd) = root.open(path, flags, Mode::empty(), Symlinks::Refused) else {
            continue;
        };
        if kind_of(&fd) != Ok(SFlag::S_IFREG) {
            continue;
        }
        let mut file = File::from(fd);
        let length = file.metadata().map_or(0, |meta| meta.len()).min(MAX_TOTAL);
        // Best effort, and in memory: a full tmpfs overwrites what it holds.
        let _ = io::copy(&mut io::repeat(0).take(length), &mut file);
        if let (Some(parent), Some(name)) = (path.parent(), path.file_name())
            && let Ok(folder) = root.make_folders(parent, Symlinks::Refused)
        {
            let _ = unlinkat(folder, name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Why one file could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("its folder (no part of the path may be a symlink)")]
    Folder(#[from] RootError),
    #[error("{step}")]
    Step { step: &'static str, source: std::io::Error },
}

/// Writes a file for all to read. Where nothing is there yet, which an image of few files is known for, it is one call.
pub(crate) fn write_plain(root: &Root, path: &Path, text: &str) -> Result<(), WriteError> {
    let mode = Mode::from_bits_truncate(0o644);
    match root.open(path, NEW_FILE, mode, Symlinks::Refused) {
        Ok(fd) => fill(fd, text.as_bytes()).map(drop),
        Err(_) => write_file(root, path, text.as_bytes(), 0o644, &User::root()),
    }
}

/// Writes one file inside `root`.
pub(crate) fn write_file(root: &Root, path: &Path, content: &[u8], mode: u32, owner: &User) -> Result<(), WriteError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed("taking its name")(Errno::EINVAL));
    };
    create(
        &root.make_folders(parent, Symlinks::Refused)?,
        name,
        content,
        mode,
        owner,
    )
}

fn failed(step: &'static str) -> impl FnOnce(Errno) -> WriteError {
    move |source| WriteError::Step {
        step,
        source: source.into(),
    }
}

const NEW_FILE: OFlag = OFlag::O_WRONLY
    .union(OFlag::O_CREAT)
    .union(OFlag::O_EXCL)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

fn fill(fd: OwnedFd, content: &[u8]) -> Result<File, WriteError> {
    let mut file = File::from(fd);
    file.write_all(content).map_err(|source| WriteError::Step {
        step: "writing it",
        source,
    })?;
    Ok(file)
}

/// A new inode every time, so that neither a hard link nor a symlink of the image is written through, and never readable
/// by more than its mode says.
fn create(folder: &OwnedFd, name: &OsStr, content: &[u8], mode: u32, owner: &User) -> Result<(), WriteError> {
    // Root's own plain files need no second look: what the process's mask takes from the mode, it may not have.
    let is_plain = owner.uid == 0 && owner.gid == 0 && mode & !0o755 == 0;
    let first_mode = if is_plain {
        Mode::from_bits_truncate(mode)
    } else {
        Mode::S_IRUSR | Mode::S_IWUSR
    };
    let fd = match openat(folder, name, NEW_FILE, first_mode) {
        Err(Errno::EEXIST) => {
            unlinkat(folder, name, UnlinkatFlags::NoRemoveDir).map_err(failed("replacing what the image has there"))?;
            openat(folder, name, NEW_FILE, first_mode)
        }
        other => other,
    };
    let file = fill(fd.map_err(failed("creating it"))?, content)?;
    if is_plain {
        return Ok(());
    }
    fchown(&file, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
        .map_err(failed("giving it to its owner"))?;
    fchmod(&file, Mode::from_bits_truncate(mode)).map_err(failed("setting its mode"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn entry(path: &str, content: &[u8]) -> FileEntry {
        FileEntry {
            path: path.into(),
            mode: 0o400,
            size: content.len() as u64,
            sha256: Sha256::digest(content).to_vec(),
            ..FileEntry::default()
        }
    }

    fn chunk(file: u32, offset: u64, data: &[u8]) -> FileChunk {
        FileChunk {
            file,
            offset,
            data: data.into(),
        }
    }

    #[test]
    fn paths_that_could_leave_or_hit_the_kernel_are_refused() {
        for path in [
            "",
            "/",
            "a",
            "a/b",
            "/a/../b",
            "/..",
            "/a/.",
            "/a//b",
            "/a/",
            "/a\0b",
            "/proc/x",
            "/sys",
            "/dev/null",
            "//a",
        ] {
            assert!(broken_path_rule(path).is_some(), "{path:?}");
        }
        assert!(broken_path_rule(&format!("/{}", "a".repeat(256))).is_some());
        for path in [
            "/a",
            "/task/notes.md",
            "/procedure",
            "/run/secrets/key",
            "/a/...",
            "/a/..b",
        ] {
            assert_eq!(broken_path_rule(path), None, "{path:?}");
        }
    }

    #[test]
    fn lists_that_break_a_limit_are_refused() {
        let with = |change: &dyn Fn(&mut FileEntry)| {
            let mut one = entry("/a", b"x");
            change(&mut one);
            check(vec![one])
        };
        assert!(matches!(with(&|e| e.mode = 0o4777), Err(FilesError::Mode { .. })));
        assert!(matches!(with(&|e| e.size = MAX_TOTAL + 1), Err(FilesError::TooMuch)));
        assert!(matches!(with(&|e| e.size = u64::MAX), Err(FilesError::TooMuch)));
        assert!(matches!(
            with(&|e| e.sha256.truncate(31)),
            Err(FilesError::Digest { .. })
        ));
        assert!(matches!(
            check(vec![entry("/a", b"x"), entry("/a", b"y")]),
            Err(FilesError::Twice { index: 1, .. })
        ));
    }

    #[test]
    fn chunks_out_of_order_are_refused() {
        let uploads =
            || Uploads::new(check(vec![entry("/a", b"abc"), entry("/empty", b""), entry("/b", b"de")]).unwrap());
        for bad in [
            chunk(1, 0, b"d"),
            chunk(0, 1, b"b"),
            chunk(0, 0, b"abcd"),
            chunk(9, 0, b""),
            chunk(2, 0, b"de"),
        ] {
            assert!(uploads().accept(bad.clone()).is_err(), "{bad:?}");
        }
        assert!(Uploads::new(Vec::new()).accept(chunk(0, 0, b"")).is_err());
        let mut short = uploads();
        short.accept(chunk(0, 0, b"ab")).unwrap();
        assert!(matches!(
            short.verify(),
            Err(FilesError::Incomplete { index: 0, got: 2, .. })
        ));
        let mut wrong = uploads();
        wrong.accept(chunk(0, 0, b"abX")).unwrap();
        wrong.accept(chunk(2, 0, b"de")).unwrap();
        assert!(matches!(wrong.verify(), Err(FilesError::Content { index: 0, .. })));
    }

    proptest! {
        #[test]
        fn any_cut_into_chunks_gives_the_files(
            contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..6),
            step in 1_usize..20,
        ) {
            let entries = contents.iter().enumerate().map(|(n, content)| entry(&format!("/f{n}"), content)).collect();
            let mut uploads = Uploads::new(check(entries).unwrap());
            for (file, content) in contents.iter().enumerate() {
                for (n, part) in content.chunks(step).enumerate() {
                    uploads.accept(chunk(file as u32, (n * step) as u64, part)).unwrap();
                }
            }
            uploads.verify().unwrap();
            prop_assert_eq!(uploads.contents, contents);
        }

        #[test]
        fn accepted_paths_have_no_part_that_leads_elsewhere(path in "[/a.\\PC]{0,30}") {
            if broken_path_rule(&path).is_none() {
                prop_assert!(path[1..].split('/').all(|part| !matches!(part, "" | "." | "..")));
            }
        }
    }

    #[test]
    fn a_file_replaces_what_the_image_has_and_never_writes_through_it() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        std::fs::write(&outside, "keep").unwrap();
        let path = folder.path().join("root");
        std::fs::create_dir_all(path.join("etc")).unwrap();
        symlink(&outside, path.join("etc/link")).unwrap();
        symlink("etc", path.join("alias")).unwrap();
        let root = Root::open_at(path.clone()).unwrap();
        let me = User {
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            groups: vec![],
            home: String::new(),
        };
        write_file(&root, Path::new("/etc/link"), b"new", 0o440, &me).unwrap();
        write_file(&root, Path::new("/deep/er/file"), b"x", 0o777, &me).unwrap();
        assert_eq!(std::fs::read(&outside).unwrap(), b"keep");
        let meta = std::fs::symlink_metadata(path.join("etc/link")).unwrap();
        assert!(meta.is_file());
        assert_eq!(meta.mode() & 0o7777, 0o440);
        assert_eq!(
            std::fs::metadata(path.join("deep/er/file")).unwrap().mode() & 0o7777,
            0o777
        );
        assert!(write_file(&root, Path::new("/alias/x"), b"x", 0o400, &me).is_err());
        assert!(write_file(&root, Path::new("/etc"), b"x", 0o400, &me).is_err());
    }
}
