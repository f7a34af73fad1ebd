//! What `far-vmm` says to wrong arguments, and its probe.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

use far_vmm::probe::Capabilities;
use std::process::{Command, Output};

fn far_vmm(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_far-vmm")).args(args).output().unwrap()
}

#[test]
fn the_probe_prints_findings_and_each_lack_has_a_reason() {
    let output = far_vmm(&["--probe"]);
    let found: Capabilities = serde_json::from_slice(&output.stdout).unwrap();
    for finding in [
        &found.kvm,
        &found.qemu,
        &found.vhost_device_vsock,
        &found.firecracker,
        &found.tap,
    ] {
        assert!(!finding.reason.is_empty(), "{found:?}");
        assert!(!finding.ok || finding.fix.is_none(), "{found:?}");
    }
}

#[test]
fn wrong_arguments_and_wrong_additions_have_firecrackers_codes() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.json");
    let config = config.to_str().unwrap();
    std::fs::write(config, "{}").unwrap();
    std::fs::write(folder.path().join("far.json"), r#"{"backend": "xen"}"#).unwrap();
    let cases: [(&[&str], i32, &str); 5] = [
        (&[], 153, "--config-file"),
        (&["--config"], 153, "--config"),
        (&["--config-file", config, "--id", "a/b"], 153, "--id"),
        (&["--config-file", config], 152, "backend"),
        (&["--config-file", "/nonexistent/vm.json"], 3, "/nonexistent/vm.json"),
    ];
    for (args, code, part) in cases {
        let output = far_vmm(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(code) && stderr.contains(part),
            "{args:?}: {:?} {stderr}",
            output.status
        );
    }
    assert!(far_vmm(&["--version"]).stdout.starts_with(b"far-vmm "));
}
