//! Test images: the payload program in an OCI archive, built by our own image builder.

use std::{path::PathBuf, process::Command};

use crate::find;

/// Reference under which tests load the payload image.
pub const PAYLOAD: &str = "example.com/far/payload:test";
/// Where the program lies in it.
pub const PAYLOAD_PATH: &str = "/payload";

/// The payload image's archive, built when it is missing or older than the program.
///
/// # Errors
/// What is missing on this machine.
pub fn payload_archive() -> Result<PathBuf, String> {
    let program = payload_program()?;
    let archive = program.with_file_name("payload.oci.tar");
    // Written under a name of this process and renamed: tests run at the same time.
    let fresh = program.with_file_name(format!("payload.{}.oci.tar", std::process::id()));
    let built = Command::new(find::binary("far-image"))
        .args([
            "oci",
            "--file",
            &format!("{}:{PAYLOAD_PATH}:0755", program.display()),
            "--entrypoint",
            PAYLOAD_PATH,
            "--out",
        ])
        .arg(&fresh)
        .output()
        .map_err(|error| format!("far-image: {error}"))?;
    if !built.status.success() {
        return Err(format!("far-image oci: {}", String::from_utf8_lossy(&built.stderr)));
    }
    std::fs::rename(&fresh, &archive).map_err(|error| format!("{}: {error}", archive.display()))?;
    Ok(archive)
}

/// The static payload program: `FAR_PAYLOAD`, else where `make guest` builds it.
fn payload_program() -> Result<PathBuf, String> {
    let program = std::env::var_os("FAR_PAYLOAD").map_or_else(
        || {
            let target = find::binaries().parent().map(PathBuf::from).unwrap_or_default();
            target.join("x86_64-unknown-linux-gnu/guest/far-payload")
        },
        PathBuf::from,
    );
    if program.is_file() {
        Ok(program)
    } else {
        Err(format!("{} is missing: run `make guest`", program.display()))
    }
}

/// An initramfs whose init never speaks: the payload program, which as PID 1 only waits.
///
/// # Errors
/// What is missing on this machine.
pub fn silent_initramfs(out: &std::path::Path) -> Result<(), String> {
    let program = payload_program()?;
    let modules = tempfile::tempdir().map_err(|error| error.to_string())?;
    let built = Command::new(find::binary("far-image"))
        .args(["initramfs", "--init"])
        .arg(program)
        .arg("--modules")
        .arg(modules.path())
        .arg("--out")
        .arg(out)
        .output()
        .map_err(|error| format!("far-image: {error}"))?;
    if built.status.success() {
        Ok(())
    } else {
        Err(format!(
            "far-image initramfs: {}",
            String::from_utf8_lossy(&built.stderr)
        ))
    }
}
