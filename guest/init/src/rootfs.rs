//! The payload's root: the image (a read-only squashfs on /dev/vda) under a tmpfs overlay, and safe ways into it.
//!
//! ```text
//! /dev/vda -> /far/image (ro)   tmpfs -> /far/scratch/{upper,work}   overlay of both -> /far/root
//! ```
//! The image is untrusted: every path in it is resolved by openat2(2) inside its root, never by PID 1's own root.

use crate::{
    boot::BootReport,
    mounts::{self, MountError},
    place::Place,
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::MsFlags,
    sys::stat::{Mode, SFlag, fstat, mkdirat},
};
use std::{
    fs, io,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

/// The image's device: the first drive of every VM.
const DEVICE: &str = "/dev/vda";
/// How long the device may take to appear after its driver was loaded.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);
/// Pause between two looks for the device.
const DEVICE_LOOK_MS: u16 = 5;

/// Why there is no root for the payload, or why something in it cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    #[error("the image's device {DEVICE} did not appear within {} s", DEVICE_LIMIT.as_secs())]
    NoDevice,
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("opening {path} in the image")]
    Open { path: PathBuf, source: nix::Error },
    #[error("creating the folder {path} in the image")]
    Folder { path: PathBuf, source: nix::Error },
    #[error("{path} in the image is not a regular file")]
    NotAFile { path: PathBuf },
    #[error("{path} in the image is longer than {limit} bytes")]
    TooLong { path: PathBuf, limit: u64 },
    #[error("reading {path} in the image")]
    Read { path: PathBuf, source: io::Error },
}

/// How symlinks of the image are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Symlinks {
    /// Followed, with the image's root as `/`.
    InsideRoot,
    /// A symlink anywhere in the path is an error.
    Refused,
}

impl Symlinks {
    fn flags(self) -> ResolveFlag {
        let inside = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        match self {
            Self::InsideRoot => inside,
            Self::Refused => inside | ResolveFlag::RESOLVE_NO_SYMLINKS,
        }
    }
}

/// The payload's root directory.
#[derive(Debug)]
pub(crate) struct Root {
    folder: OwnedFd,
    path: PathBuf,
}

/// Puts the root together. An error is kept as a text for the exit report: a broken image must not leave the blade
/// without a word.
pub(crate) fn assemble(place: &Place, boot: &mut BootReport) -> Result<Root, RootError> {
    let image = attach_image(place)?;
    let scratch = place.at("/far/scratch");
    let plain = MsFlags::MS_NODEV;
    mounts::attach("tmpfs", "tmpfs", &scratch, plain, "mode=0755,size=50%")?;
    let (upper, work) = (scratch.join("upper"), scratch.join("work"));
    mounts::make_folder(&upper)?;
    mounts::make_folder(&work)?;
    mounts::make_payload_folders(place, &upper)?;
    let path = place.at("/far/root");
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.display(),
        upper.display(),
        work.display()
    );
    mounts::attach("overlay", "overlay", &path, plain, &options)?;
    mounts::mount_for_payload(place, &path, boot);
    Root::open_at(path)
}

/// The folder that holds the image's files.
fn attach_image(place: &Place) -> Result<PathBuf, RootError> {
    if !place.is_guest() {
        return Ok(place.at("/image"));
    }
    let image = place.at("/far/image");
    let deadline = Instant::now() + DEVICE_LIMIT;
    loop {
        match mounts::attach(DEVICE, "squashfs", &image, MsFlags::MS_RDONLY | MsFlags::MS_NODEV, "") {
            Ok(()) => return Ok(image),
            // Drivers may probe in the background, so the node can come a moment after the module was loaded.
            Err(MountError::Mount {
                source: Errno::ENOENT, ..
            }) if Instant::now() < deadline => {
                // A poll on nothing is the pause between two looks: there is nothing else to serve yet.
                let _ = nix::poll::poll(&mut [], DEVICE_LOOK_MS);
            }
            Err(MountError::Mount {
                source: Errno::ENOENT, ..
            }) => return Err(RootError::NoDevice),
            Err(error) => return Err(error.into()),
        }
    }
}

impl Root {
    /// The folder `path` as a root.
    pub(crate) fn open_at(path: PathBuf) -> Result<Self, RootError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let folder = nix::fcntl::open(&path, flags, Mode::empty()).map_err(|source| RootError::Open {
            path: path.clone(),
            source,
        })?;
        Ok(Self { folder, path })
    }

    /// The root in PID 1's own tree.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens `path` inside the root.
    pub(crate) fn open(&self, path: &Path, flags: OFlag, mode: Mode, symlinks: Symlinks) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(symlinks.flags());
        loop {
            match openat2(self.folder.as_fd(), path, how) {
                // openat2(2): a rename elsewhere made the walk uncertain; EINTR cannot happen without handlers.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                other => return other,
            }
        }
    }

    /// A regular file of the image, whole. Opening a FIFO or device does not block.
    ///
    /// # Errors
    /// Also when the file is longer than `limit` bytes. `Ok(None)`: it does not exist.
    pub(crate) fn read(&self, path: &Path, limit: u64) -> Result<Option<Vec<u8>>, RootError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let fd = match self.open(path, flags, Mode::empty(), Symlinks::InsideRoot) {
            Ok(fd) => fd,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
            Err(source) => {
                return Err(RootError::Open {
                    path: path.into(),
                    source,
                });
            }
        };
        let stat = fstat(&fd).map_err(|source| RootError::Open {
            path: path.into(),
            source,
        })?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(RootError::NotAFile { path: path.into() });
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        if length > limit {
            return Err(RootError::TooLong {
                path: path.into(),
                limit,
            });
        }
        // One that changes under the hand is an error or is cut.
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        fs::File::from(fd)
            .read_exact(&mut bytes)
            .map_err(|source| RootError::Read {
                path: path.into(),
                source,
            })?;
        Ok(Some(bytes))
    }

    /// The folder `path`, made with its parents (mode 0755, owned by root) where missing.
    pub(crate) fn make_folders(&self, path: &Path, symlinks: Symlinks) -> Result<OwnedFd, RootError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let open = |path: &Path| self.open(path, flags, Mode::empty(), symlinks);
        // Most are there: one call instead of a walk.
        if let Ok(folder) = open(path) {
            return Ok(folder);
        }
        let mut prefix = PathBuf::from("/");
        let mut folder = open(&prefix).map_err(|source| RootError::Open {
            path: prefix.clone(),
            source,
        })?;
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            prefix.push(name);
            folder = match open(&prefix) {
                Ok(folder) => folder,
                Err(Errno::ENOENT) => {
                    match mkdirat(&folder, name, Mode::from_bits_truncate(0o755)) {
                        Ok(()) | Err(Errno::EEXIST) => {}
                        Err(source) => return Err(RootError::Folder { path: prefix, source }),
                    }
                    open(&prefix).map_err(|source| RootError::Open {
                        path: prefix.clone(),
                        source,
                    })?
                }
                Err(source) => return Err(RootError::Open { path: prefix, source }),
            };
        }
        Ok(folder)
    }
}

/// File type bits of an open file.
pub(crate) fn kind_of(fd: &impl AsFd) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, Root) {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::open_at(folder.path().join("root")).or_else(|_| {
            fs::create_dir(folder.path().join("root")).unwrap();
            Root::open_at(folder.path().join("root"))
        });
        (folder, root.unwrap())
    }

    #[test]
    fn symlinks_of_the_image_never_lead_outside_it() {
        let (folder, root) = root();
        fs::write(folder.path().join("secret"), "host").unwrap();
        fs::write(root.path().join("inside"), "image").unwrap();
        symlink("/inside", root.path().join("absolute")).unwrap();
        symlink("../secret", root.path().join("upwards")).unwrap();
        symlink(folder.path().join("secret"), root.path().join("host")).unwrap();
        assert_eq!(
            root.read(Path::new("/absolute"), 100).unwrap().as_deref(),
            Some(&b"image"[..])
        );
        assert_eq!(root.read(Path::new("/upwards"), 100).unwrap(), None);
        assert_eq!(root.read(Path::new("/host"), 100).unwrap(), None);
        assert_eq!(root.read(Path::new("/../secret"), 100).unwrap(), None);
    }

    #[test]
    fn long_files_and_folders_are_refused() {
        let (_folder, root) = root();
        fs::write(root.path().join("long"), [0; 11]).unwrap();
        fs::create_dir(root.path().join("dir")).unwrap();
        assert!(matches!(
            root.read(Path::new("/long"), 10),
            Err(RootError::TooLong { .. })
        ));
        assert!(matches!(
            root.read(Path::new("/dir"), 10),
            Err(RootError::NotAFile { .. })
        ));
    }

    #[test]
    fn folders_are_made_inside_the_root_even_through_symlinks() {
        let (folder, root) = root();
        symlink("/../../var", root.path().join("link")).unwrap();
        fs::create_dir(root.path().join("var")).unwrap();
        root.make_folders(Path::new("/link/deep/er"), Symlinks::InsideRoot)
            .unwrap();
        assert!(root.path().join("var/deep/er").is_dir());
        assert!(!folder.path().join("var").exists());
        assert!(root.make_folders(Path::new("/link/other"), Symlinks::Refused).is_err());
        assert!(!root.path().join("var/other").exists());
    }
}
