//! Whether KVM really runs guests here.
//!
//! That /dev/kvm opens, and even that it makes VMs and vCPUs, proves nothing: KVM in its PVM variant does all that and
//! then emulates a stock kernel instruction by instruction, which looks like a hang. So three cheap signs come first,
//! and then a tiny guest must print its text and end by a triple fault within a bound.

use super::Finding;
use crate::{
    command::run_bounded,
    pvh::{Then, tiny_guest},
};
use std::{
    fs, io,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// For a guest that needs 0.1 s even under translation.
const GUEST_LIMIT: Duration = Duration::from_secs(10);
const GUEST_TEXT: &[u8] = b"far-vmm: a guest ran\n";

/// Tries KVM, with QEMU if it is there, else with Firecracker.
pub(crate) fn probe(qemu: &Finding, firecracker: &Finding) -> Finding {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop);
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if let Some(lack) = decide_to_try(&opened, &cpuinfo, Path::new("/sys/module/kvm_pvm").exists()) {
        return lack;
    }
    match (program(qemu), program(firecracker)) {
        (Some(path), _) => run_guest("QEMU", |kernel| qemu_command(path, kernel)),
        (None, Some(path)) => run_guest("Firecracker", |kernel| firecracker_command(path, kernel)),
        (None, None) => {
            let fix = "sudo apt-get install --no-install-recommends qemu-system-x86";
            Finding::lack(
                "/dev/kvm opens, but neither QEMU nor Firecracker is there to prove that it runs a guest",
                fix,
            )
        }
    }
}

fn program(finding: &Finding) -> Option<&Path> {
    finding.path.as_deref().filter(|_| finding.ok)
}

fn cannot_open(error: &io::Error) -> Finding {
    match error.kind() {
        io::ErrorKind::NotFound => Finding::lack(
            "there is no /dev/kvm",
            "enable virtualization in the firmware, then: sudo modprobe kvm_intel || sudo modprobe kvm_amd",
        ),
        io::ErrorKind::PermissionDenied => Finding::lack(
            "/dev/kvm may not be opened by this user",
            "sudo usermod -aG kvm \"$USER\" and log in again",
        ),
        _ => Finding {
            fix: None,
            ..Finding::lack(format!("/dev/kvm cannot be opened: {error}"), "")
        },
    }
}

/// Why not even to try. What no command of the user can change comes before a missing permission, so that nobody is
/// sent to join a group in vain.
fn decide_to_try(opened: &io::Result<()>, cpuinfo: &str, is_pvm: bool) -> Option<Finding> {
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(cannot_open(error)),
        Err(error) => Some(signs(cpuinfo, is_pvm).unwrap_or_else(|| cannot_open(error))),
        Ok(()) => signs(cpuinfo, is_pvm),
    }
}

/// What speaks against KVM before anything is run.
fn signs(cpuinfo: &str, is_pvm: bool) -> Option<Finding> {
    if is_pvm {
        let reason = "/dev/kvm is served by kvm_pvm, which runs no stock guest kernel";
        return Some(Finding {
            fix: None,
            ..Finding::lack(reason, "")
        });
    }
    if !cfg!(target_arch = "x86_64") {
        let reason = "no proof that KVM runs a guest exists for this processor yet";
        return Some(Finding {
            fix: None,
            ..Finding::lack(reason, "")
        });
    }
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags"))
        .unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return None;
    }
    let reason = "/dev/kvm opens, but the processor shows neither vmx nor svm: no hardware virtualization behind it";
    let fix = "enable virtualization in the firmware, or nested virtualization in the hypervisor above this machine";
    Some(Finding::lack(reason, fix))
}

fn run_guest(name: &str, command: impl Fn(&Path) -> io::Result<Command>) -> Finding {
    static PROBES: AtomicU32 = AtomicU32::new(0);
    let number = PROBES.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("far-kvm-probe-{}-{number}", std::process::id()));
    let finding = run_guest_in(&folder, name, command).unwrap_or_else(|error| Finding {
        fix: None,
        ..Finding::lack(
            format!("the probe's guest could not be started with {name}: {error}"),
            "",
        )
    });
    let _ = fs::remove_dir_all(&folder);
    finding
}

fn run_guest_in(folder: &Path, name: &str, command: impl Fn(&Path) -> io::Result<Command>) -> io::Result<Finding> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().mode(0o700).create(folder)?;
    let kernel = folder.join("guest");
    fs::write(&kernel, tiny_guest(GUEST_TEXT, Then::End))?;
    let ended = run_bounded(&mut command(&kernel)?, GUEST_LIMIT)?;
    let printed = ended
        .output
        .windows(GUEST_TEXT.len() - 1)
        .any(|bytes| bytes == &GUEST_TEXT[..GUEST_TEXT.len() - 1]);
    let lack = |what: &str| Finding {
        fix: None,
        ..Finding::lack(format!("under {name} with KVM a tiny guest {what}"), "")
    };
    Ok(match (printed, ended.status) {
        (true, Some(status)) if status.success() => Finding::has(format!("a tiny guest ran under {name} with KVM")),
        (true, Some(status)) => lack(&format!("printed, but the VMM failed: {status}")),
        (true, None) => lack(&format!("printed, but did not end within {} s", GUEST_LIMIT.as_secs())),
        (false, Some(status)) => lack(&format!("printed nothing: {status}")),
        (false, None) => lack(&format!("printed nothing within {} s", GUEST_LIMIT.as_secs())),
    })
}

fn qemu_command(qemu: &Path, kernel: &Path) -> io::Result<Command> {
    Ok(tiny_command(qemu, kernel, "kvm", "host"))
}

/// The tiny guest under QEMU's microvm machine.
pub(crate) fn tiny_command(qemu: &Path, kernel: &Path, accel: &str, cpu: &str) -> Command {
    let mut command = Command::new(qemu);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-serial",
        "stdio",
    ]);
    command
        .args(["-M", "microvm", "-accel", accel, "-cpu", cpu, "-m", "32", "-kernel"])
        .arg(kernel);
    command
}

fn firecracker_command(firecracker: &Path, kernel: &Path) -> io::Result<Command> {
    let config = kernel.with_file_name("vm.json");
    let text = serde_json::json!({
        "boot-source": {"kernel_image_path": kernel, "boot_args": ""},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
    });
    fs::write(&config, text.to_string())?;
    let mut command = Command::new(firecracker);
    command.arg("--no-api").arg("--config-file").arg(config);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_against_kvm_are_told_with_their_reason() {
        let cases = [
            ("PVM", "flags\t\t: fpu vmx\n", true, Some("kvm_pvm")),
            (
                "no flag",
                "flags\t\t: fpu hypervisor vmx2\n",
                false,
                Some("neither vmx nor svm"),
            ),
            ("Intel", "flags\t\t: fpu vmx\n", false, None),
            ("AMD", "flags\t\t: svm\n", false, None),
            ("empty", "", false, Some("neither")),
        ];
        for (why, cpuinfo, is_pvm, expected) in cases {
            let lack = signs(cpuinfo, is_pvm);
            match expected {
                None => assert_eq!(lack, None, "{why}"),
                Some(part) => assert!(lack.is_some_and(|lack| !lack.ok && lack.reason.contains(part)), "{why}"),
            }
        }
    }

    #[test]
    fn a_missing_permission_is_told_only_where_it_is_all_that_is_missing() {
        let opened = |kind: io::ErrorKind| Err(io::Error::from(kind));
        let cases = [
            (
                "no device",
                opened(io::ErrorKind::NotFound),
                "flags: vmx",
                false,
                "there is no /dev/kvm",
            ),
            (
                "no permission",
                opened(io::ErrorKind::PermissionDenied),
                "flags: vmx",
                false,
                "this user",
            ),
            (
                "no permission, and PVM",
                opened(io::ErrorKind::PermissionDenied),
                "flags: vmx",
                true,
                "kvm_pvm",
            ),
            ("opens, but PVM", Ok(()), "flags: vmx", true, "kvm_pvm"),
        ];
        for (why, opened, cpuinfo, is_pvm, part) in cases {
            let lack = decide_to_try(&opened, cpuinfo, is_pvm).unwrap();
            assert!(lack.reason.contains(part), "{why}: {lack:?}");
        }
        assert_eq!(decide_to_try(&Ok(()), "flags: vmx", false), None);
    }

    #[test]
    fn the_probes_guest_prints_and_ends_where_guests_run_at_all() {
        let Some(qemu) = super::super::Tools::default().find_qemu() else {
            eprintln!(
                "SKIPPED the_probes_guest_prints_and_ends_where_guests_run_at_all: qemu-system-x86_64 is missing"
            );
            return;
        };
        let finding = run_guest("QEMU", |kernel| Ok(tiny_command(&qemu, kernel, "tcg", "max")));
        assert!(finding.ok, "{finding:?}");
    }

    #[test]
    fn a_vmm_that_prints_nothing_is_no_proof() {
        let finding = run_guest("a VMM", |_| Ok(Command::new("true")));
        assert!(!finding.ok && finding.reason.contains("printed nothing"), "{finding:?}");
    }
}
