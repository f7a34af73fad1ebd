//! The file systems of the machine, as tables: those PID 1 itself needs, and those the payload finds in its root.

use crate::{
    boot::BootReport,
    place::Place,
    rootfs::{Root, Symlinks},
};
use nix::mount::{MsFlags, mount};
use std::{fs, os::fd::AsRawFd, path::Path, path::PathBuf};

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const SAFER: MsFlags = SAFE.union(MsFlags::MS_NOEXEC);

/// One line of a mount table.
#[derive(Debug, Clone, Copy)]
struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
    need: Need,
}

/// What it means when a mount fails, and whether it may be tried outside a real guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// PID 1 cannot work without it.
    Must,
    /// PID 1 cannot work without it; in a test the machine's own is used.
    MustInGuest,
    /// Worth a warning; only in a guest, because it has no namespace of its own.
    WishInGuest,
    /// Worth a warning.
    Wish,
}

/// What PID 1 works with. /run is where the image and its overlay are put together.
const BASE: &[Mount] = &[
    Mount {
        kind: "devtmpfs",
        target: "/dev",
        flags: MsFlags::MS_NOSUID,
        options: "mode=0755",
        need: Need::MustInGuest,
    },
    Mount {
        kind: "proc",
        target: "/proc",
        flags: SAFER,
        options: "",
        need: Need::Must,
    },
    Mount {
        kind: "sysfs",
        target: "/sys",
        flags: SAFER,
        options: "",
        need: Need::WishInGuest,
    },
    Mount {
        kind: "tmpfs",
        target: "/run",
        flags: SAFE,
        options: "mode=0755,size=16m",
        need: Need::Must,
    },
    Mount {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: SAFER,
        options: "",
        need: Need::WishInGuest,
    },
];

/// What the payload finds. The sizes are shares of the guest's memory; tmpfs pages count as the payload's own.
const PAYLOAD: &[Mount] = &[
    Mount {
        kind: "proc",
        target: "/proc",
        flags: SAFER,
        options: "",
        need: Need::Wish,
    },
    Mount {
        kind: "sysfs",
        target: "/sys",
        flags: SAFER,
        options: "",
        need: Need::WishInGuest,
    },
    Mount {
        kind: "devtmpfs",
        target: "/dev",
        flags: MsFlags::MS_NOSUID,
        options: "mode=0755",
        need: Need::WishInGuest,
    },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=0620,ptmxmode=0666",
        need: Need::Wish,
    },
    Mount {
        kind: "tmpfs",
        target: "/dev/shm",
        flags: SAFE,
        options: "mode=1777,size=50%",
        need: Need::WishInGuest,
    },
    Mount {
        kind: "tmpfs",
        target: "/run",
        flags: SAFE,
        options: "mode=0755,size=20%",
        need: Need::Wish,
    },
    Mount {
        kind: "tmpfs",
        target: "/tmp",
        flags: SAFE,
        options: "mode=1777,size=50%",
        need: Need::Wish,
    },
];

/// Which mount failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    #[error("making the mount point {target}")]
    MountPoint { target: PathBuf, source: std::io::Error },
    #[error("mounting {kind} on {target}")]
    Mount {
        kind: String,
        target: PathBuf,
        source: nix::Error,
    },
}

/// Mounts what PID 1 works with.
///
/// # Errors
/// When /dev, /proc or /run cannot be mounted; everything else becomes a warning.
pub(crate) fn mount_base(place: &Place, boot: &mut BootReport) -> Result<(), MountError> {
    for line in BASE {
        if !place.is_guest() && matches!(line.need, Need::MustInGuest | Need::WishInGuest) {
            continue;
        }
        let target = place.at(line.target);
        let result =
            make_folder(&target).and_then(|()| attach(line.kind, line.kind, &target, line.flags, line.options));
        match (result, line.need) {
            (Ok(()), _) => {}
            (Err(error), Need::Must | Need::MustInGuest) => return Err(error),
            (Err(error), Need::Wish | Need::WishInGuest) => boot.warn(crate::power::with_sources(&error)),
        }
    }
    if place.is_guest() {
        link_devices(boot);
    }
    Ok(())
}

/// Links in /dev that programs expect and devtmpfs does not make. Every mount of devtmpfs shows them.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Makes [`DEVICE_LINKS`].
fn link_devices(boot: &mut BootReport) {
    for (link, target) in DEVICE_LINKS {
        if let Err(error) = std::os::unix::fs::symlink(target, link) {
            boot.warn(format!("{link}: {error}"));
        }
    }
}

/// Mounts what the payload finds. The image may be hostile: every target is resolved inside `root`, so that a symlink
/// named `proc` cannot move a mount over PID 1's own tree.
pub(crate) fn mount_for_payload(place: &Place, root: &Root, boot: &mut BootReport) {
    for line in PAYLOAD {
        if !place.is_guest() && line.need == Need::WishInGuest {
            continue;
        }
        match root.make_folders(Path::new(line.target), Symlinks::InsideRoot) {
            Ok(folder) => {
                let target = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
                if let Err(error) = attach(line.kind, line.kind, &target, line.flags, line.options) {
                    boot.warn(format!(
                        "payload's {}: {}",
                        line.target,
                        crate::power::with_sources(&error)
                    ));
                }
            }
            Err(error) => boot.warn(format!(
                "payload's {}: {}",
                line.target,
                crate::power::with_sources(&error)
            )),
        }
    }
}

/// Creates `target` with its parents; an existing folder is fine.
pub(crate) fn make_folder(target: &Path) -> Result<(), MountError> {
    fs::create_dir_all(target).map_err(|source| MountError::MountPoint {
        target: target.into(),
        source,
    })
}

/// mount(2) with an error that names what and where.
pub(crate) fn attach(source: &str, kind: &str, target: &Path, flags: MsFlags, options: &str) -> Result<(), MountError> {
    let data = (!options.is_empty()).then_some(options);
    mount(Some(source), target, Some(kind), flags, data).map_err(|error| MountError::Mount {
        kind: kind.into(),
        target: target.into(),
        source: error,
    })
}
