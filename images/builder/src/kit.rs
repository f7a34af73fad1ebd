//! The boot kit of a blade: kernel, initramfs and the project's own guest image in one folder, with their digests.

use std::path::Path;

use serde_json::json;

use crate::{BuildError, initramfs, oci::Builder, write};

/// Path of tiffany in the guest image, as the seed's resource has it.
pub const TIFFANY: &str = "/usr/local/bin/tiffany";

/// The project's guest image: tiffany, an ordinary user for it, and the folders it uses.
///
/// # Errors
/// [`BuildError::Io`] when the program cannot be read.
pub fn guest_image(tiffany: &Path) -> Result<Vec<u8>, BuildError> {
    let mut image = Builder::new();
    image
        .file(TIFFANY, 0o755, 0, write::read(tiffany)?)?
        .file("/etc/passwd", 0o644, 0, "root:x:0:0:root:/root:/sbin/nologin\ntiffany:x:1000:1000:tiffany:/home/tiffany:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n")?
        .file("/etc/group", 0o644, 0, "root:x:0:\ntiffany:x:1000:\nnogroup:x:65534:\n")?
        .file("/etc/hosts", 0o644, 0, "127.0.0.1 localhost\n::1 localhost\n")?
        .folder("/home/tiffany", 0o755, 1000)?
        .folder("/root", 0o700, 0)?
        .folder("/task", 0o755, 1000)?
        .folder("/tmp", 0o1777, 0)?;
    image.entrypoint([TIFFANY.to_owned()]);
    Ok(image.build())
}

/// Fills `out` with `vmlinux`, `initramfs.cpio`, `tiffany-vm.oci.tar` and `kit.json`. The kernel and its modules come from the
/// folder `kernel`, which [`crate::kernel::build`] filled and which may be `out` itself.
/// Files that would not change are left alone.
///
/// # Errors
/// [`BuildError`], also when `kernel` has no `vmlinux`.
pub fn build(init: &Path, tiffany: &Path, kernel: &Path, out: &Path) -> Result<(), BuildError> {
    let vmlinux = kernel.join("vmlinux");
    if !vmlinux.is_file() {
        return Err(BuildError::input(
            vmlinux,
            "is missing: run `far-image kernel --out` for this folder first",
        ));
    }
    let files = [
        ("initramfs.cpio", initramfs::build(init, &kernel.join("modules"))?),
        ("tiffany-vm.oci.tar", guest_image(tiffany)?),
    ];
    let mut digests = serde_json::Map::new();
    let kernel_bytes = write::read(&vmlinux)?;
    write::if_changed(&out.join("vmlinux"), &kernel_bytes)?;
    digests.insert("vmlinux".into(), json!(write::sha256(&kernel_bytes)));
    for (name, bytes) in &files {
        write::if_changed(&out.join(name), bytes)?;
        digests.insert((*name).into(), json!(write::sha256(bytes)));
    }
    let text =
        serde_json::to_string_pretty(&json!({ "sha256": digests })).expect("maps with text keys are JSON") + "\n";
    write::if_changed(&out.join("kit.json"), text.as_bytes()).map(drop)
}
