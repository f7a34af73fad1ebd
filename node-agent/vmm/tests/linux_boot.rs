//! A real Linux kernel under far-vmm: of the boot kit (`FAR_BOOT_KIT`), or a single file (`FAR_TEST_KERNEL`).

mod common;

use common::{Vm, qemu_or_skip};
use far_vmm::{exit::ExitCause, pvh::Then};
use std::{env, fs, path::PathBuf};

fn kernel_or_skip(test: &str) -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || set("FAR_CACHE").or_else(|| set("HOME").map(|home| home.join(".cache/far")));
    let kit = set("FAR_BOOT_KIT").or_else(|| cache().map(|cache| cache.join("guest")));
    let found = [set("FAR_TEST_KERNEL"), kit.map(|kit| kit.join("vmlinux"))].into_iter().flatten().find(|path| path.is_file());
    if found.is_none() {
        eprintln!("SKIPPED {test}: no kernel in FAR_BOOT_KIT; make guest builds it");
    }
    found
}

#[test]
fn a_linux_kernel_without_an_init_panics_and_the_record_says_so() {
    let name = "a_linux_kernel_without_an_init_panics_and_the_record_says_so";
    let (Some(tools), Some(kernel)) = (qemu_or_skip(name), kernel_or_skip(name)) else { return };
    let vm = Vm::boot_changed(&tools, b"", Then::End, |config| {
        config["boot-source"]["kernel_image_path"] = serde_json::json!(kernel);
        config["boot-source"]["boot_args"] = serde_json::json!("console=ttyS0 panic=-1");
        config["machine-config"]["mem_size_mib"] = serde_json::json!(256);
    });
    let record = vm.wait_ended();
    let console = fs::read_to_string(vm.path("console.log")).unwrap();
    assert!(console.contains("Kernel panic - not syncing"), "{console}");
    assert!(record.kernel_panic && record.message.starts_with("Kernel panic - not syncing"), "{record:?}");
    assert_eq!((record.cause, record.code), (ExitCause::Exited, Some(0)), "the kernel reset the machine");
}
