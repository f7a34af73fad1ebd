//! The initramfs of every guest: far-init as `/init`, the kernel modules, and the order to load them in.

use std::path::Path;

use crate::{
    BuildError,
    cpio::{Archive, Entry},
    write,
};

/// Folder of the modules inside the initramfs.
const MODULES: &str = "lib/far";

/// The archive of `init` and every module listed in `<modules>/order` (file names, one per line, in load order); no modules
/// where that file is missing.
///
/// # Errors
/// [`BuildError::Io`] when an input cannot be read.
pub fn build(init: &Path, modules: &Path) -> Result<Vec<u8>, BuildError> {
    let init_bytes = write::read(init)?;
    let order = match std::fs::read_to_string(modules.join("order")) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(source) => {
            return Err(BuildError::Io {
                doing: "reading",
                path: modules.join("order"),
                source,
            });
        }
    };
    let mut archive = Archive::default();
    // Where far-init mounts: it makes what is missing, one call after another.
    for folder in [
        "dev",
        "far",
        "far/image",
        "far/root",
        "far/scratch",
        "lib",
        MODULES,
        "newroot",
        "proc",
        "run",
        "sys",
        "tmp",
    ] {
        archive.add(folder, 0o755, Entry::Folder);
    }
    // The kernel opens it for PID 1 before anything is mounted.
    archive.add("dev/console", 0o600, Entry::CharDevice(5, 1));
    archive.add("init", 0o755, Entry::File(&init_bytes));
    let mut listed = String::new();
    for name in order.lines().filter(|line| !line.is_empty()) {
        let bytes = write::read(&modules.join(name))?;
        archive.add(&format!("{MODULES}/{name}"), 0o644, Entry::File(&bytes));
        listed.push_str(&format!("/{MODULES}/{name}\n"));
    }
    archive.add(&format!("{MODULES}/modules"), 0o644, Entry::File(listed.as_bytes()));
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_inputs_elsewhere_give_the_same_bytes() {
        let make = || {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("far-init"), "init").unwrap();
            std::fs::write(dir.path().join("b.ko"), "B").unwrap();
            std::fs::write(dir.path().join("a.ko"), "A").unwrap();
            std::fs::write(dir.path().join("order"), "b.ko\na.ko\n").unwrap();
            build(&dir.path().join("far-init"), dir.path()).unwrap()
        };
        let one = make();
        assert_eq!(one, make());
        let text = String::from_utf8_lossy(&one);
        assert!(
            text.contains("/lib/far/b.ko\n/lib/far/a.ko\n"),
            "the load order is kept"
        );
    }
}
