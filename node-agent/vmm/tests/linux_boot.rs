//! A real Linux kernel under far-vmm: of the boot kit (`FAR_BOOT_KIT`), or a single file (`FAR_TEST_KERNEL`).

mod common;

use common::{Vm, qemu_or_skip};
use far_vmm::{exit::ExitCause, pvh::Then};
use std::{env, fs, os::unix::net::UnixListener, path::PathBuf};

fn set(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn boot_kit() -> Option<PathBuf> {
    let cache = || set("FAR_CACHE").or_else(|| set("HOME").map(|home| home.join(".cache/far")));
    set("FAR_BOOT_KIT").or_else(|| cache().map(|cache| cache.join("guest")))
}

fn kernel_or_skip(test: &str) -> Option<PathBuf> {
    let kit = boot_kit();
    let found = [set("FAR_TEST_KERNEL"), kit.map(|kit| kit.join("vmlinux"))]
        .into_iter()
        .flatten()
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("SKIPPED {test}: no kernel in FAR_BOOT_KIT; make guest builds it");
    }
    found
}

#[test]
fn a_linux_kernel_without_an_init_panics_and_the_record_says_so() {
    let name = "a_linux_kernel_without_an_init_panics_and_the_record_says_so";
    let (Some(tools), Some(kernel)) = (qemu_or_skip(name), kernel_or_skip(name)) else {
        return;
    };
    let vm = Vm::boot_changed(&tools, b"", Then::End, |config| {
        config["boot-source"]["kernel_image_path"] = serde_json::json!(kernel);
        config["boot-source"]["boot_args"] = serde_json::json!("console=ttyS0 panic=-1");
        config["machine-config"]["mem_size_mib"] = serde_json::json!(256);
    });
    let record = vm.wait_ended();
    let console = fs::read_to_string(vm.path("console.log")).unwrap();
    assert!(console.contains("Kernel panic - not syncing"), "{console}");
    assert!(
        record.kernel_panic && record.message.starts_with("Kernel panic - not syncing"),
        "{record:?}"
    );
    assert_eq!(
        (record.cause, record.code),
        (ExitCause::Exited, Some(0)),
        "the kernel reset the machine"
    );
}

#[test]
fn the_boot_kits_init_reaches_the_host_over_vsock() {
    let name = "the_boot_kits_init_reaches_the_host_over_vsock";
    let Some(tools) = qemu_or_skip(name) else { return };
    let Some(kit) = boot_kit().filter(|kit| kit.join("vmlinux").is_file() && kit.join("initramfs.cpio").is_file())
    else {
        eprintln!("SKIPPED {name}: no kernel and initramfs in FAR_BOOT_KIT; make guest builds them");
        return;
    };
    let mut listener = None;
    let vm = Vm::boot_changed(&tools, b"", Then::End, |config| {
        let boot = &mut config["boot-source"];
        boot["kernel_image_path"] = serde_json::json!(kit.join("vmlinux"));
        boot["initrd_path"] = serde_json::json!(kit.join("initramfs.cpio"));
        boot["boot_args"] = serde_json::json!("rdinit=/init console=ttyS0 quiet panic=-1");
        config["machine-config"]["mem_size_mib"] = serde_json::json!(256);
        // No file system: init says so over the control stream, which is all that this test wants to hear.
        let drive = config["boot-source"]["kernel_image_path"].clone();
        config["drives"] = serde_json::json!([
            {"drive_id": "rootfs", "path_on_host": drive, "is_root_device": false, "is_read_only": true}
        ]);
        let uds = config["vsock"]["uds_path"].as_str().unwrap();
        // Firecracker's layout: the guest's connection to CID 2 port 5000 arrives here.
        let bound = UnixListener::bind(format!("{uds}_5000")).unwrap();
        bound.set_nonblocking(true).unwrap();
        listener = Some(bound);
    });
    let listener = listener.unwrap();
    common::wait_for("the guest's connection", || {
        let console = || fs::read_to_string(vm.path("console.log")).unwrap_or_default();
        listener
            .accept()
            .map_err(|error| format!("{error}; console: {}", console()))
    });
    vm.client().kill().unwrap();
    assert!(!vm.wait_ended().kernel_panic);
}
