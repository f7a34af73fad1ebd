//! Where the programs are that far-vmm runs, and whether they answer.

use super::{Finding, Tools};
use crate::command::run_bounded;
use std::{
    env,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// For `--version`: a program on a busy machine needs less than a second.
const VERSION_LIMIT: Duration = Duration::from_secs(20);
/// Oldest QEMU the command lines were run with.
const OLDEST_QEMU: (u32, u32) = (7, 2);

impl Tools {
    /// QEMU's path.
    pub(crate) fn find_qemu(&self) -> Option<PathBuf> {
        let name = format!("qemu-system-{}", env::consts::ARCH);
        self.qemu
            .clone()
            .or_else(|| named_by("FAR_QEMU"))
            .or_else(|| on_path(&name))
    }

    /// The vsock daemon's path.
    pub(crate) fn find_vhost_device_vsock(&self) -> Option<PathBuf> {
        const NAME: &str = "vhost-device-vsock";
        let in_cache = || {
            cache_folder()
                .map(|cache| cache.join("vhost/bin").join(NAME))
                .filter(|path| is_program(path))
        };
        self.vhost_device_vsock
            .clone()
            .or_else(|| named_by("FAR_VHOST_DEVICE_VSOCK"))
            .or_else(|| on_path(NAME))
            .or_else(in_cache)
    }

    /// Firecracker's path.
    pub(crate) fn find_firecracker(&self) -> Option<PathBuf> {
        self.firecracker
            .clone()
            .or_else(|| named_by("FIRECRACKER_BIN"))
            .or_else(|| on_path("firecracker"))
    }
}

pub(crate) fn qemu(tools: &Tools) -> Finding {
    let fix = "sudo apt-get install --no-install-recommends qemu-system-x86";
    let Some(path) = tools.find_qemu() else {
        return Finding::lack(format!("qemu-system-{} is not on PATH", env::consts::ARCH), fix);
    };
    let finding = version_of(path, fix);
    let version = finding.version.as_deref().and_then(major_minor);
    match version {
        Some(version) if finding.ok && version < OLDEST_QEMU => Finding {
            ok: false,
            reason: format!("QEMU {}.{} is older than 7.2", version.0, version.1),
            fix: Some(fix.into()),
            ..finding
        },
        _ => finding,
    }
}

pub(crate) fn vhost_device_vsock(tools: &Tools) -> Finding {
    let fix = "cargo install vhost-device-vsock --locked --root ~/.cache/far/vhost";
    match tools.find_vhost_device_vsock() {
        Some(path) => version_of(path, fix),
        None => Finding::lack(
            "vhost-device-vsock is neither on PATH nor in the cache's vhost/bin",
            fix,
        ),
    }
}

pub(crate) fn firecracker(tools: &Tools) -> Finding {
    let fix = "download a release of Firecracker and set FIRECRACKER_BIN to its binary (only needed with usable KVM)";
    match tools.find_firecracker() {
        Some(path) => version_of(path, fix),
        None => Finding::lack("FIRECRACKER_BIN is not set and firecracker is not on PATH", fix),
    }
}

fn version_of(path: PathBuf, fix: &str) -> Finding {
    let ended = match run_bounded(Command::new(&path).arg("--version"), VERSION_LIMIT) {
        Ok(ended) => ended,
        Err(error) => {
            let reason = format!("{} cannot be run: {error}", path.display());
            return Finding {
                path: Some(path),
                ..Finding::lack(reason, fix)
            };
        }
    };
    let text = String::from_utf8_lossy(&ended.output).into_owned();
    let version = text.split_whitespace().find_map(|word| {
        let word = word.trim_start_matches('v');
        word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.to_owned())
    });
    match version {
        Some(version) if ended.status.is_some_and(|status| status.success()) => {
            let reason = format!("{} {version}", path.display());
            Finding {
                path: Some(path),
                version: Some(version),
                ..Finding::has(reason)
            }
        }
        _ => {
            let reason = format!("{} --version failed or named no version", path.display());
            Finding {
                path: Some(path),
                ..Finding::lack(reason, fix)
            }
        }
    }
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn named_by(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| is_program(path))
}

/// `FAR_CACHE`, else `~/.cache/far`.
fn cache_folder() -> Option<PathBuf> {
    named_by("FAR_CACHE").or_else(|| named_by("HOME").map(|home| home.join(".cache/far")))
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        for (text, expected) in [
            ("7.2.22", Some((7, 2))),
            ("10.0.2", Some((10, 0))),
            ("x", None),
            ("7", None),
        ] {
            assert_eq!(major_minor(text), expected, "{text}");
        }
        assert!(major_minor("10.0.2") > Some(OLDEST_QEMU));
    }

    #[test]
    fn a_named_binary_that_does_not_exist_is_a_lack_that_names_it() {
        let tools = Tools {
            qemu: Some("/nonexistent/qemu".into()),
            ..Tools::default()
        };
        let finding = qemu(&tools);
        assert!(
            !finding.ok && finding.reason.contains("/nonexistent/qemu") && finding.fix.is_some(),
            "{finding:?}"
        );
    }

    #[test]
    fn a_program_that_is_no_qemu_is_a_lack() {
        let tools = Tools {
            qemu: Some("/bin/false".into()),
            ..Tools::default()
        };
        assert!(!qemu(&tools).ok);
    }
}
