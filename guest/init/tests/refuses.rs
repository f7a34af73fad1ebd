//! far-init started anywhere but as a guest's first process changes nothing.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, process::Command};

fn mounts_and_name() -> (String, String) {
    let read = |path| fs::read_to_string(path).unwrap();
    (read("/proc/self/mountinfo"), read("/proc/sys/kernel/hostname"))
}

#[test]
fn as_an_ordinary_process_it_exits_2_and_touches_neither_mounts_nor_the_host_name() {
    let folder = tempfile::tempdir().unwrap();
    let before = mounts_and_name();
    for arguments in [vec![], vec!["--test-root".into(), folder.path().as_os_str().to_owned()]] {
        let output = Command::new(env!("CARGO_BIN_EXE_far-init"))
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("refuses to act as process"));
    }
    assert_eq!(mounts_and_name(), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn as_pid_1_without_own_mounts_it_exits_2() {
    const NAME: &str = "as_pid_1_without_own_mounts_it_exits_2";
    if !nix::unistd::geteuid().is_root() {
        return common::skip(NAME, "root, for unshare");
    }
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_str().unwrap();
    let before = mounts_and_name();
    for (why, unshare, arguments) in [
        ("no own mounts", "-pfu", vec!["--test-root", root]),
        ("no own host name", "-pfm", vec!["--test-root", root]),
        ("no test root", "-pfmu", vec![]),
        ("no folder", "-pfmu", vec!["--test-root"]),
        ("relative folder", "-pfmu", vec!["--test-root", "tmp"]),
        ("the machine's root", "-pfmu", vec!["--test-root", "/"]),
    ] {
        let output = Command::new("unshare")
            .arg(unshare)
            .arg(env!("CARGO_BIN_EXE_far-init"))
            .args(arguments)
            .output();
        let output = output.expect("unshare is part of util-linux");
        assert_eq!(
            output.status.code(),
            Some(2),
            "{why}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    assert_eq!(mounts_and_name(), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn as_pid_1_of_a_chroot_without_proc_it_exits_2() {
    const NAME: &str = "as_pid_1_of_a_chroot_without_proc_it_exits_2";
    if !nix::unistd::geteuid().is_root() {
        return common::skip(NAME, "root, for unshare and chroot");
    }
    let init = common::guest_programs().unwrap().join("far-init");
    // Looks much like a guest: PID 1, a RAM file system as root, no /proc. Only the kernel's process 2 is missing.
    let script = "mount -t tmpfs none /mnt && cp \"$0\" /mnt/init && exec chroot /mnt /init";
    let before = mounts_and_name();
    let output = Command::new("unshare")
        .args(["-mpfu", "--propagation", "private", "sh", "-c", script])
        .arg(init)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("process 2 is not the kernel's"), "{text}");
    assert_eq!(mounts_and_name(), before);
}
