//! Where this program may act. It mounts, renames the machine and reboots it, so it first proves that the machine is its own.
//!
//! Invariant: nothing is mounted, named or rebooted before [`Place::claim`] said yes.

use nix::{
    sys::{stat::lstat, statfs::statfs},
    unistd::{Pid, getpgid, getpid, getsid},
};
use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

/// File system types of the kernel's first root (linux/magic.h): an initramfs is one of the two.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Inode numbers of the machine's first namespaces (include/linux/proc_ns.h); the first mount namespace had an ordinary
/// number, the lowest there is, on older kernels.
const FIRST_NAMESPACES: [(&str, [u32; 2]); 3] = [
    ("mnt", [0xefff_fff8, 0xf000_0000]),
    ("pid", [0xefff_fffc; 2]),
    ("uts", [0xefff_fffe; 2]),
];

/// Where the machine's root is and whether the whole machine is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// The guest's first process, in the initramfs.
    Guest,
    /// A test: PID 1 of its own mount, PID and UTS namespaces. Everything happens below this folder, nothing that has no
    /// namespace (clock, entropy, cgroups, reboot) is touched, the control stream is `control.sock` in it and the image
    /// is the folder `image`.
    TestRoot(PathBuf),
}

/// Why this program did nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("this is the init of a guest and refuses to act as process {pid}; it only runs as PID 1 of a microVM")]
    NotFirst { pid: i32 },
    #[error("process 1, but /proc is mounted already: not the first process of a guest; tests use --test-root DIR")]
    ProcIsMounted,
    #[error("process 1, but not started by a kernel from its initramfs ({missing})")]
    NotAGuest { missing: &'static str },
    #[error("--test-root needs an absolute path of an existing folder")]
    TestRoot,
    #[error("--test-root needs its own {kind} namespace; start it with `unshare -mpfu --propagation private`")]
    SharedNamespace { kind: &'static str },
    #[error(
        "--test-root: the mount at / is shared with other namespaces; start it with `unshare -mpfu --propagation private`"
    )]
    SharedMounts,
    #[error("--test-root: reading {path}")]
    Unknown { path: PathBuf, source: io::Error },
}

impl Place {
    /// Proves that acting is safe. Reads only. Unknown arguments are ignored: the kernel hands words of its command line
    /// to init.
    pub(crate) fn claim(mut arguments: impl Iterator<Item = OsString>) -> Result<Self, Refusal> {
        let pid = getpid();
        if pid != Pid::from_raw(1) {
            return Err(Refusal::NotFirst { pid: pid.as_raw() });
        }
        while let Some(argument) = arguments.next() {
            if argument == "--test-root" {
                return Self::claim_test_root(arguments.next());
            }
        }
        Self::claim_guest()
    }

    /// A guest's PID 1 has no /proc, a RAM file system as root, and the kernel's thread starter as process 2. In a PID
    /// namespace of a host there is either a /proc or no process 2.
    fn claim_guest() -> Result<Self, Refusal> {
        if lstat("/proc/self").is_ok() {
            return Err(Refusal::ProcIsMounted);
        }
        let kind = statfs("/").map_or(0, |root| root.filesystem_type().0);
        if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
            return Err(Refusal::NotAGuest {
                missing: "the root is not an initramfs",
            });
        }
        let kthreadd = Pid::from_raw(2);
        let none = Pid::from_raw(0);
        if getsid(Some(kthreadd)) != Ok(none) || getpgid(Some(kthreadd)) != Ok(none) {
            return Err(Refusal::NotAGuest {
                missing: "process 2 is not the kernel's",
            });
        }
        Ok(Self::Guest)
    }

    /// A namespace is own when it is not the machine's first one and no process outside (seen through the outer /proc,
    /// which is still mounted) lives in it, the parent aside: `unshare` itself enters what it makes.
    fn claim_test_root(folder: Option<OsString>) -> Result<Self, Refusal> {
        let folder = PathBuf::from(folder.ok_or(Refusal::TestRoot)?);
        if !folder.is_absolute() || folder == Path::new("/") || !folder.is_dir() {
            return Err(Refusal::TestRoot);
        }
        let unknown = |path: &str| {
            let path = PathBuf::from(path);
            move |source| Refusal::Unknown { path, source }
        };
        for (kind, first) in FIRST_NAMESPACES {
            let path = format!("/proc/self/ns/{kind}");
            let own = fs::read_link(&path).map_err(unknown(&path))?;
            let is_first = first
                .iter()
                .any(|number| own == Path::new(&format!("{kind}:[{number}]")));
            if is_first || outsiders_share(kind, &own) {
                return Err(Refusal::SharedNamespace { kind });
            }
        }
        let path = "/proc/self/mountinfo";
        let table = fs::read_to_string(path).map_err(unknown(path))?;
        if root_is_shared(&table) {
            return Err(Refusal::SharedMounts);
        }
        Ok(Self::TestRoot(folder))
    }

    /// Whether the whole machine is ours: clock, entropy, cgroups, power.
    pub(crate) fn is_guest(&self) -> bool {
        matches!(self, Self::Guest)
    }

    /// `path` (absolute) below the root of this place.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        match self {
            Self::Guest => path.into(),
            Self::TestRoot(root) => root.join(path.trim_start_matches('/')),
        }
    }
}

/// Whether a process other than this one and its parent is in the namespace `own`. Nobody else can be in ours yet.
fn outsiders_share(kind: &str, own: &Path) -> bool {
    // Ids as the outer /proc counts them.
    let family: Vec<String> = fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.strip_prefix("Pid:").or_else(|| line.strip_prefix("PPid:")))
        .map(|id| id.trim().to_owned())
        .collect();
    let Ok(processes) = fs::read_dir("/proc") else {
        return true;
    };
    processes
        .flatten()
        .filter(|entry| !family.iter().any(|id| entry.file_name() == id.as_str()))
        // Only processes: `self` and `thread-self` are this one.
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        // Those that are gone by now or hidden cannot be asked.
        .filter_map(|entry| fs::read_link(entry.path().join("ns").join(kind)).ok())
        .any(|other| other == own)
}

/// Whether the mount at `/` in a `mountinfo` table (proc_pid_mountinfo(5)) passes mounts on to other namespaces.
fn root_is_shared(table: &str) -> bool {
    table.lines().any(|line| {
        let mut fields = line.split(' ').skip(4);
        fields.next() == Some("/")
            && fields
                .skip(1)
                .take_while(|&field| field != "-")
                .any(|f| f.starts_with("shared:"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_pid_1_is_refused_with_and_without_a_test_root() {
        for arguments in [vec![], vec!["--test-root", "/tmp"]] {
            let refusal = Place::claim(arguments.into_iter().map(OsString::from)).unwrap_err();
            assert!(matches!(refusal, Refusal::NotFirst { .. }), "{refusal}");
        }
    }

    #[test]
    fn shared_root_mounts_are_seen() {
        for (table, shared) in [
            ("21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw", true),
            ("21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw", false),
            ("21 1 8:1 / / rw,relatime master:1 - ext4 shared:1 rw", false),
            (
                "22 21 0:5 / /dev rw shared:2 - devtmpfs dev rw\n21 1 8:1 / / rw - ext4 x rw",
                false,
            ),
        ] {
            assert_eq!(root_is_shared(table), shared, "{table}");
        }
    }

    #[test]
    fn paths_are_below_the_test_root() {
        assert_eq!(Place::TestRoot("/t".into()).at("/proc/self"), Path::new("/t/proc/self"));
        assert_eq!(Place::Guest.at("/proc/self"), Path::new("/proc/self"));
    }
}
