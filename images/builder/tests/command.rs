//! The command `far-image` as a user runs it.
#![allow(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn far_image(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_far-image"));
    command.current_dir(folder);
    command
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Inputs of a kit: programs and kernel are any bytes, the builder does not run them.
fn inputs(folder: &Path) {
    fs::write(folder.join("far-init"), "an init").unwrap();
    fs::write(folder.join("tiffany"), "an agent").unwrap();
    fs::create_dir_all(folder.join("kernel/modules")).unwrap();
    fs::write(folder.join("kernel/vmlinux"), "a kernel").unwrap();
    fs::write(folder.join("kernel/modules/b.ko"), "B").unwrap();
    fs::write(folder.join("kernel/modules/a.ko"), "A").unwrap();
    fs::write(folder.join("kernel/modules/order"), "b.ko\na.ko\n").unwrap();
}

const KIT: [&str; 9] = [
    "kit",
    "--init",
    "far-init",
    "--tiffany",
    "tiffany",
    "--kernel-dir",
    "kernel",
    "--out",
    "kit",
];
const MADE: [&str; 4] = ["vmlinux", "initramfs.cpio", "tiffany-vm.oci.tar", "kit.json"];

#[test]
fn a_kit_is_the_same_in_another_place_mask_time_zone_and_locale() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    inputs(one.path());
    inputs(other.path());
    // Inputs of another age and mode: neither is part of what is made.
    fs::File::open(other.path().join("tiffany"))
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000))
        .unwrap();
    let first = far_image(one.path())
        .args(KIT)
        .env("TZ", "UTC")
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert!(first.status.success(), "{}", said(&first));
    let second = Command::new("sh")
        .args(["-c", "umask 077; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_far-image")])
        .args(KIT)
        .current_dir(other.path())
        .env("TZ", "Pacific/Chatham")
        .env("LC_ALL", "tr_TR.UTF-8")
        .env("SOURCE_DATE_EPOCH", "1234567890")
        .env("HOME", other.path())
        .output()
        .unwrap();
    assert!(second.status.success(), "{}", said(&second));
    for name in MADE {
        let made = |folder: &Path| fs::read(folder.join("kit").join(name)).unwrap();
        assert!(made(one.path()) == made(other.path()), "{name} differs");
    }
}

#[test]
fn a_second_kit_of_the_same_inputs_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    inputs(folder.path());
    assert!(far_image(folder.path()).args(KIT).output().unwrap().status.success());
    let stamps = || {
        MADE.map(|name| {
            fs::metadata(folder.path().join("kit").join(name))
                .unwrap()
                .modified()
                .unwrap()
        })
    };
    let before = stamps();
    assert!(far_image(folder.path()).args(KIT).output().unwrap().status.success());
    assert_eq!(stamps(), before);
    fs::write(folder.path().join("tiffany"), "another agent").unwrap();
    assert!(far_image(folder.path()).args(KIT).output().unwrap().status.success());
    let after = stamps();
    assert_eq!(after[..2], before[..2], "kernel and initramfs did not change");
    assert_ne!(after[2], before[2]);
}

#[test]
fn an_image_can_be_inspected_by_people_and_programs() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("agent"), "an agent").unwrap();
    let made = far_image(folder.path())
        .args([
            "oci",
            "--file",
            "agent:/bin/agent:0755",
            "--dir",
            "/work:1777",
            "--entrypoint",
            "/bin/agent",
            "--env",
            "A=b",
        ])
        .args(["--out", "a.tar"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", said(&made));
    let shown = far_image(folder.path()).args(["inspect", "a.tar"]).output().unwrap();
    assert!(
        said(&shown).contains("linux/amd64") && said(&shown).contains("/bin/agent"),
        "{}",
        said(&shown)
    );
    let json = far_image(folder.path())
        .args(["inspect", "a.tar", "-o", "json"])
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let image = &json["images"][0];
    assert_eq!(image["config"]["Entrypoint"][0], "/bin/agent");
    assert_eq!(image["config"]["Env"][0], "A=b");
    // The store is the other reader: both must mean the same image.
    let store = far_images::ImageStore::open(folder.path().join("store")).unwrap();
    let loaded = store
        .load_archive(fs::File::open(folder.path().join("a.tar")).unwrap(), "example.com/a:1")
        .unwrap();
    assert_eq!(image["digest"], loaded.digest.as_str());

    let mut bytes = fs::read(folder.path().join("a.tar")).unwrap();
    let at = bytes.windows(8).position(|window| window == b"an agent").unwrap();
    bytes[at] ^= 1;
    fs::write(folder.path().join("flipped.tar"), bytes).unwrap();
    let refused = far_image(folder.path())
        .args(["inspect", "flipped.tar"])
        .output()
        .unwrap();
    assert!(
        !refused.status.success() && said(&refused).contains("digest"),
        "{}",
        said(&refused)
    );
}

#[test]
fn bad_input_is_told_by_name_and_leaves_no_output() {
    let folder = tempfile::tempdir().unwrap();
    inputs(folder.path());
    let cases: &[(&[&str], &str)] = &[
        (&["oci", "--file", "missing:/a", "--out", "out"], "missing"),
        (&["oci", "--file", "tiffany:a", "--out", "out"], "\"a\""),
        (&["oci", "--file", "tiffany:/a/../b", "--out", "out"], "/a/../b"),
        (&["oci", "--file", "tiffany:/a:0999", "--out", "out"], "0999"),
        (
            &["oci", "--file", "tiffany:/a", "--env", "broken", "--out", "out"],
            "--env broken",
        ),
        (
            &["oci", "--file", "tiffany:/a", "--dir", "relative", "--out", "out"],
            "relative",
        ),
        (
            &[
                "initramfs",
                "--init",
                "missing",
                "--modules",
                "kernel/modules",
                "--out",
                "out",
            ],
            "missing",
        ),
        (
            &["kit", "--init", "far-init", "--tiffany", "tiffany", "--out", "out"],
            "far-image kernel",
        ),
        (&["kernel", "--deb", "tiffany", "--out", "out"], "dpkg"),
        (&["inspect", "tiffany"], "tar"),
    ];
    for (arguments, word) in cases {
        let output = far_image(folder.path()).args(*arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(said(&output).contains(word), "{arguments:?}: {}", said(&output));
        let out = folder.path().join("out");
        let left = out.is_file() || out.join("vmlinux").exists() || out.join("kit.json").exists();
        assert!(!left, "{arguments:?} left something");
    }
}
