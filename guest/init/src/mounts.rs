//! The file systems of the machine, as tables: those PID 1 itself needs, and those the payload finds in its root.

use crate::{boot::BootReport, place::Place};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::stat::Mode,
    unistd::mkdir,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

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

/// What PID 1 works with.
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
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: SAFER,
        options: "",
        need: Need::WishInGuest,
    },
];

/// What the payload finds. The sizes are shares of the guest's memory; tmpfs pages count as the payload's own.
/// [`PAYLOAD_FOLDERS`] has every target.
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

/// Folders laid over the image, so that each target of [`PAYLOAD`] is a folder of ours: whatever a hostile image has there,
/// a symlink out of its root for one, is hidden by the overlay.
const PAYLOAD_FOLDERS: [&str; 5] = ["proc", "sys", "dev", "run", "tmp"];
/// Folders in every devtmpfs, PID 1's and the payload's being one; a test's `/dev` is an ordinary folder.
const DEVICE_FOLDERS: [&str; 2] = ["pts", "shm"];

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
/// When /dev or /proc cannot be mounted; everything else becomes a warning.
pub(crate) fn mount_base(place: &Place, boot: &mut BootReport) -> Result<(), MountError> {
    for line in BASE {
        if !place.is_guest() && matches!(line.need, Need::MustInGuest | Need::WishInGuest) {
            continue;
        }
        let target = place.at(line.target);
        let result = attach(line.kind, line.kind, &target, line.flags, line.options);
        match (result, line.need) {
            (Ok(()), _) => {}
            (Err(error), Need::Must | Need::MustInGuest) => return Err(error),
            (Err(error), Need::Wish | Need::WishInGuest) => boot.warn(crate::power::with_sources(&error)),
        }
    }
    if place.is_guest() {
        furnish_devices(boot);
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

/// Makes [`DEVICE_LINKS`] and [`DEVICE_FOLDERS`].
fn furnish_devices(boot: &mut BootReport) {
    for name in DEVICE_FOLDERS {
        if let Err(error) = make_folder(&Path::new("/dev").join(name)) {
            boot.warn(crate::power::with_sources(&error));
        }
    }
    for (link, target) in DEVICE_LINKS {
        if let Err(error) = std::os::unix::fs::symlink(target, link) {
            boot.warn(format!("{link}: {error}"));
        }
    }
}

/// Makes the targets of [`mount_for_payload`] in `upper`, which becomes the overlay's own layer.
pub(crate) fn make_payload_folders(place: &Place, upper: &Path) -> Result<(), MountError> {
    for name in PAYLOAD_FOLDERS {
        make_folder(&upper.join(name))?;
    }
    if !place.is_guest() {
        make_folder(&upper.join("dev/pts"))?;
    }
    Ok(())
}

/// Mounts what the payload finds in the overlay at `root`.
pub(crate) fn mount_for_payload(place: &Place, root: &Path, boot: &mut BootReport) {
    for line in PAYLOAD {
        if !place.is_guest() && line.need == Need::WishInGuest {
            continue;
        }
        let target = root.join(line.target.trim_start_matches('/'));
        if let Err(error) = attach(line.kind, line.kind, &target, line.flags, line.options) {
            let error = crate::power::with_sources(&error);
            boot.warn(format!("payload's {}: {error}", line.target));
        }
    }
}

/// Creates the folder `target`; an existing one is fine.
pub(crate) fn make_folder(target: &Path) -> Result<(), MountError> {
    match mkdir(target, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(source) => Err(MountError::MountPoint {
            target: target.into(),
            source: source.into(),
        }),
    }
}

/// mount(2) with an error that names what and where. The mount point is made where it is missing: the initramfs has all.
pub(crate) fn attach(source: &str, kind: &str, target: &Path, flags: MsFlags, options: &str) -> Result<(), MountError> {
    let data = (!options.is_empty()).then_some(options);
    let attempt = || mount(Some(source), target, Some(kind), flags, data);
    let mut result = attempt();
    if result == Err(Errno::ENOENT) && fs::symlink_metadata(target).is_err() {
        fs::create_dir_all(target).map_err(|source| MountError::MountPoint {
            target: target.into(),
            source,
        })?;
        result = attempt();
    }
    result.map_err(|error| MountError::Mount {
        kind: kind.into(),
        target: target.into(),
        source: error,
    })
}
