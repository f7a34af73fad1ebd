//! `far doctor`: what this machine can do, how that is known, and the command that mends each lack.

use std::path::{Path, PathBuf};

use far_vmm::probe::{Capabilities, Finding, ProbeOptions};
use serde_json::json;

use crate::{
    args::OutputArgs,
    daemons::find_program,
    exit::Outcome,
    folders::Folders,
    output::{self, Colour, coloured},
};

/// Files of a boot kit (ARCHITECTURE.md).
const BOOT_KIT: [&str; 3] = ["vmlinux", "initramfs.cpio", "tiffany-vm.oci.tar"];
/// Oldest kubectl that the project is tested with.
const KUBECTL_MINIMUM: (u32, u32) = (1, 30);

/// The first file that a boot kit lacks.
pub(crate) fn missing_in_boot_kit(folder: &Path) -> Option<String> {
    BOOT_KIT
        .iter()
        .map(|file| folder.join(file))
        .find(|path| !path.is_file())
        .map(|path| path.display().to_string())
}

/// How much a lack matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Without it no agent runs here.
    Needed,
    /// Agents run, but slower or with less.
    Better,
    Optional,
}

#[derive(Debug)]
struct Check {
    name: &'static str,
    need: Need,
    is_ok: bool,
    reason: String,
    fix: Option<String>,
}

impl Check {
    fn of(name: &'static str, need: Need, finding: &Finding) -> Self {
        Self {
            name,
            need,
            is_ok: finding.ok,
            reason: finding.reason.clone(),
            fix: finding.fix.clone(),
        }
    }
}

pub(crate) async fn doctor(folders: &Folders, args: &OutputArgs) -> anyhow::Result<Outcome> {
    if args.output.is_none() {
        output::note("Looking at this machine (up to half a minute where /dev/kvm opens but does not run guests) …");
    }
    // Runs programs and waits for them: on a thread of its own, which lives until it returns.
    let found = tokio::task::spawn_blocking(|| far_vmm::probe::run(&ProbeOptions::default())).await?;
    let kubectl = tokio::task::spawn_blocking(kubectl).await?;
    let mut checks = of_capabilities(&found);
    checks.push(programs());
    let kit = std::env::var_os("FAR_BOOT_KIT").map_or_else(|| folders.cache.join("guest"), PathBuf::from);
    checks.push(boot_kit(&kit));
    checks.push(folders_check(folders));
    checks.push(kubectl);
    if args.output.is_some() {
        print_json(&checks, &found)?;
    } else {
        print_text(&checks);
    }
    let is_fit = checks.iter().all(|check| check.is_ok || check.need != Need::Needed);
    Ok(if is_fit { Outcome::Success } else { Outcome::Negative })
}

/// What the microVM side found. Firecracker on KVM stands in for QEMU and its vsock daemon.
fn of_capabilities(found: &Capabilities) -> Vec<Check> {
    let has_firecracker = found.firecracker.ok && found.kvm.ok;
    let qemu = if has_firecracker { Need::Optional } else { Need::Needed };
    vec![
        Check::of("KVM", Need::Better, &found.kvm),
        Check::of("QEMU", qemu, &found.qemu),
        Check::of("vsock daemon", qemu, &found.vhost_device_vsock),
        Check::of("Firecracker", Need::Optional, &found.firecracker),
        Check::of("guest network", Need::Better, &found.tap),
    ]
}

fn programs() -> Check {
    let missing = ["far-devapi", "far-controller", "far-node", "far-vmm"]
        .into_iter()
        .find_map(|program| find_program(program).err());
    Check {
        name: "programs",
        need: Need::Needed,
        is_ok: missing.is_none(),
        reason: missing.as_ref().map_or_else(
            || "far-devapi, far-controller, far-node and far-vmm are there".to_owned(),
            ToString::to_string,
        ),
        fix: missing.map(|_| "make build".to_owned()),
    }
}

fn boot_kit(folder: &Path) -> Check {
    let missing = missing_in_boot_kit(folder);
    Check {
        name: "boot kit",
        need: Need::Needed,
        is_ok: missing.is_none(),
        reason: missing.as_ref().map_or_else(
            || format!("kernel, initramfs and guest image are in {}", folder.display()),
            |path| format!("{path} is missing"),
        ),
        fix: missing.map(|_| "make guest".to_owned()),
    }
}

fn folders_check(folders: &Folders) -> Check {
    let prepared = folders.prepare();
    Check {
        name: "folders",
        need: Need::Needed,
        is_ok: prepared.is_ok(),
        reason: match &prepared {
            Ok(()) => format!("{} and {} are private", folders.state.display(), folders.run.display()),
            Err(error) => error.to_string(),
        },
        fix: prepared
            .err()
            .map(|_| "export FAR_STATE=… FAR_RUN=… with folders of your own".to_owned()),
    }
}

fn kubectl() -> Check {
    let program = std::env::var_os("KUBECTL").unwrap_or_else(|| "kubectl".into());
    let seen = std::process::Command::new(program)
        .args(["version", "--client"])
        .output()
        .ok()
        .and_then(|output| kubectl_version(&String::from_utf8_lossy(&output.stdout)));
    let (major, minor) = KUBECTL_MINIMUM;
    Check {
        name: "kubectl",
        need: Need::Optional,
        is_ok: seen.is_some_and(|seen| seen >= KUBECTL_MINIMUM),
        reason: match seen {
            None => "there is none on PATH; far apply, get, describe, delete, wait and logs do without".to_owned(),
            Some((major, minor)) => format!("version {major}.{minor}"),
        },
        fix: match seen {
            Some(seen) if seen >= KUBECTL_MINIMUM => None,
            _ => Some(format!(
                "install kubectl {major}.{minor} or newer (https://kubernetes.io/docs/tasks/tools)"
            )),
        },
    }
}

/// Major and minor out of `Client Version: v1.32.4`.
fn kubectl_version(text: &str) -> Option<(u32, u32)> {
    let version = text.lines().find_map(|line| line.strip_prefix("Client Version: v"))?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn print_text(checks: &[Check]) {
    for check in checks {
        let (mark, colour) = match (check.is_ok, check.need) {
            (true, _) => ("ok     ", Colour::Green),
            (false, Need::Needed) => ("missing", Colour::Red),
            (false, Need::Better | Need::Optional) => ("without", Colour::Yellow),
        };
        output::line(&format!(
            "{}  {:<14} {}",
            coloured(mark, colour),
            check.name,
            check.reason
        ));
        if let Some(fix) = &check.fix {
            output::line(&format!("{:25}fix: {fix}", ""));
        }
    }
    let lacks = |need| checks.iter().filter(|check| !check.is_ok && check.need == need).count();
    output::line(match (lacks(Need::Needed), lacks(Need::Better)) {
        (0, 0) => "\nThis machine runs agents.",
        (0, _) => "\nThis machine runs agents, with less than it could (see above).",
        _ => "\nThis machine cannot run agents yet: mend what is missing.",
    });
}

fn print_json(checks: &[Check], found: &Capabilities) -> anyhow::Result<()> {
    let rows: Vec<_> = checks
        .iter()
        .map(|check| {
            json!({
                "name": check.name,
                "needed": check.need == Need::Needed,
                "ok": check.is_ok,
                "reason": check.reason,
                "fix": check.fix,
            })
        })
        .collect();
    let doctor = json!({
        "ok": checks.iter().all(|check| check.is_ok || check.need != Need::Needed),
        "checks": rows,
        "tscKhz": found.tsc_khz,
    });
    output::line(&serde_json::to_string_pretty(&doctor)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(ok: bool) -> Finding {
        Finding {
            ok,
            reason: "seen".into(),
            fix: (!ok).then(|| "apt-get install it".into()),
            path: None,
            version: None,
        }
    }

    fn capabilities(kvm: bool, qemu: bool, vsock: bool, firecracker: bool) -> Capabilities {
        Capabilities {
            kvm: finding(kvm),
            qemu: finding(qemu),
            vhost_device_vsock: finding(vsock),
            firecracker: finding(firecracker),
            tap: finding(false),
            tsc_khz: None,
        }
    }

    #[test]
    fn a_machine_is_fit_exactly_when_the_microvm_side_says_so() {
        for bits in 0..16_u8 {
            let has = |bit: u8| bits & (1 << bit) != 0;
            let found = capabilities(has(0), has(1), has(2), has(3));
            let is_fit = of_capabilities(&found)
                .iter()
                .all(|check| check.is_ok || check.need != Need::Needed);
            assert_eq!(is_fit, found.can_run_vms(), "{bits:04b}");
        }
    }

    #[test]
    fn every_lack_of_something_needed_has_a_fix() {
        let lacks = of_capabilities(&capabilities(false, false, false, false));
        assert!(lacks.iter().all(|check| check.is_ok || check.fix.is_some()));
        assert!(boot_kit(Path::new("/no/such")).fix.is_some());
    }

    #[test]
    fn kubectl_versions_are_read_whatever_follows_the_minor() {
        for (text, expected) in [
            ("Client Version: v1.32.4\nKustomize Version: v5.5.0\n", Some((1, 32))),
            ("Client Version: v1.29.3-dispatcher\n", Some((1, 29))),
            ("Client Version: v1.31+\n", Some((1, 31))),
            ("error", None),
        ] {
            assert_eq!(kubectl_version(text), expected, "{text:?}");
        }
    }
}
