//! Guests that do not behave: the status tells what was seen and no more, and the blade stays whole.

use far_e2e::{far_or_skip, far_with_or_skip, payload_agent};
use far_testkit::Options;

#[test]
fn a_guest_that_dies_without_a_report_is_init_lost_and_has_no_exit_code() {
    let Some(far) = far_or_skip("a_guest_that_dies_without_a_report_is_init_lost_and_has_no_exit_code") else {
        return;
    };
    far.apply(&payload_agent("vanishes", &["out=last words", "power-off"]));
    let agent = far.wait_end("vanishes");
    assert_eq!(agent["status"]["phase"], "Failed", "{agent}");
    assert_eq!(agent["status"]["reason"], "InitLost", "{agent}");
    assert!(
        agent["status"].get("exitCode").is_none_or(serde_json::Value::is_null),
        "{agent}"
    );
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn a_kernel_panic_is_told_apart() {
    let Some(far) = far_or_skip("a_kernel_panic_is_told_apart") else {
        return;
    };
    far.apply(&payload_agent("panics", &["sysrq=c"]));
    let agent = far.wait_end("panics");
    assert_eq!(agent["status"]["reason"], "KernelPanic", "{agent}");
    assert!(
        agent["status"].get("exitCode").is_none_or(serde_json::Value::is_null),
        "{agent}"
    );
    far.stop();
}

#[test]
fn one_gibibyte_of_output_neither_fills_nor_stalls_the_blade() {
    const TEST: &str = "one_gibibyte_of_output_neither_fills_nor_stalls_the_blade";
    let Some(far) = far_or_skip(TEST) else { return };
    far.apply(&payload_agent(
        "floods",
        &["flood=1073741824", "err=flood done", "exit=0"],
    ));
    // The blade goes on serving others meanwhile.
    far.apply(&payload_agent("quiet", &["out=hello", "exit=0"]));
    assert_eq!(far.wait_end("quiet")["status"]["phase"], "Completed");
    let agent = far.wait_end("floods");
    assert_eq!(agent["status"]["phase"], "Completed", "{agent}");
    let kept = far.far(&["logs", "floods", "--stdout"]).ok();
    assert!(kept.len() < 64 << 20, "{} bytes are kept", kept.len());
    assert!(
        kept.ends_with("000000067108863\n"),
        "the newest output is kept: …{}",
        &kept[kept.len().saturating_sub(40)..]
    );
    let errors = far.far(&["logs", "floods", "--stderr"]).ok();
    assert!(errors.contains("flood done"), "{errors}");
    far.stop();
}

#[test]
fn a_guest_that_never_says_hello_is_a_boot_timeout() {
    const TEST: &str = "a_guest_that_never_says_hello_is_a_boot_timeout";
    let kit = match silent_kit() {
        Ok(kit) => kit,
        Err(missing) => return far_testkit::skip(TEST, &missing),
    };
    let env = vec![("FAR_BOOT_TIMEOUT".into(), "20s".into())];
    let Some(far) = far_with_or_skip(
        TEST,
        Options {
            boot_kit: Some(kit.path().into()),
            env,
            ..Options::default()
        },
    ) else {
        return;
    };
    far.apply(&payload_agent("silent", &["exit=0"]));
    let agent = far.wait_end("silent");
    assert_eq!(agent["status"]["reason"], "BootTimeout", "{agent}");
    assert!(
        agent["status"].get("exitCode").is_none_or(serde_json::Value::is_null),
        "{agent}"
    );
    far.nothing_of_a_vm_is_left();
    far.stop();
}

/// A boot kit whose init only waits.
fn silent_kit() -> Result<tempfile::TempDir, String> {
    let good = far_testkit::find::boot_kit()?;
    let kit = tempfile::tempdir().map_err(|error| error.to_string())?;
    for file in ["vmlinux", "tiffany-vm.oci.tar"] {
        std::os::unix::fs::symlink(good.join(file), kit.path().join(file)).map_err(|error| error.to_string())?;
    }
    far_testkit::images::silent_initramfs(&kit.path().join("initramfs.cpio"))?;
    Ok(kit)
}
