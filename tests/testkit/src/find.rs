//! Where the things are that tests run: our binaries, the boot kit, kubectl.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// One of our binaries. Tests run from `<target>/<profile>/deps`, the binaries lie one folder up.
///
/// # Panics
/// When it was not built: a missing binary must not look like a passed or skipped test.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(
        path.is_file(),
        "{} is missing: build it with `cargo build --workspace`",
        path.display()
    );
    path
}

/// The folder with our binaries: `FAR_BIN_DIR`, else the one that cargo built this test beside.
#[must_use]
pub fn binaries() -> PathBuf {
    if let Some(folder) = env::var_os("FAR_BIN_DIR") {
        return folder.into();
    }
    let test = env::current_exe().expect("a running test has a path");
    test.ancestors()
        .nth(2)
        .expect("tests lie in <profile>/deps")
        .to_path_buf()
}

/// The cache outside the tree: `FAR_CACHE`, else `~/.cache/far`.
#[must_use]
pub fn cache() -> PathBuf {
    env::var_os("FAR_CACHE").map_or_else(
        || PathBuf::from(env::var_os("HOME").expect("HOME or FAR_CACHE is set")).join(".cache/far"),
        PathBuf::from,
    )
}

/// The boot kit (kernel, initramfs, guest image), or the missing file's name.
///
/// # Errors
/// The first file that is missing, with the command that makes it.
pub fn boot_kit() -> Result<PathBuf, String> {
    let folder = env::var_os("FAR_BOOT_KIT").map_or_else(|| cache().join("guest"), PathBuf::from);
    for file in ["vmlinux", "initramfs.cpio", "tiffany-vm.oci.tar"] {
        if !folder.join(file).is_file() {
            return Err(format!("boot kit has no {file}: run `make guest`"));
        }
    }
    Ok(folder)
}

/// A kubectl of 1.30 or newer: `KUBECTL`, else the one on PATH.
///
/// # Errors
/// Why there is none.
pub fn kubectl() -> Result<PathBuf, String> {
    let program = env::var_os("KUBECTL").map_or_else(|| PathBuf::from("kubectl"), PathBuf::from);
    let version = Command::new(&program)
        .args(["version", "--client", "-o", "json"])
        .output()
        .map_err(|error| format!("kubectl: {error}"))?;
    let parsed: serde_json::Value =
        serde_json::from_slice(&version.stdout).map_err(|error| format!("kubectl version: {error}"))?;
    let minor = parsed["clientVersion"]["minor"].as_str().unwrap_or("0");
    let number: u32 = minor
        .trim_end_matches(|c: char| !c.is_ascii_digit())
        .parse()
        .unwrap_or(0);
    if number >= 30 {
        Ok(program)
    } else {
        Err(format!("kubectl 1.{minor} is older than 1.30"))
    }
}

/// The repository's folder, from this crate's own place in it.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("tests/testkit is two folders deep")
}
