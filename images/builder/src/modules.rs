//! Which kernel modules a guest needs, and in which order they load.
//!
//! A distribution's package has no `modules.dep` (that is made when it is installed), so the dependencies are read from
//! the modules themselves: the `.modinfo` section holds `depends=a,b` (kernel: include/linux/module.h, MODULE_INFO).

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use crate::{BuildError, unpack::unpack, write};

/// What a guest of ours uses beyond a distribution kernel's built-in code. Names with `_`, as the kernel has them.
const WANTED: [&str; 9] = [
    "virtio_mmio", // finds the devices on QEMU microvm and Firecracker
    "virtio_pci",  // and on q35
    "virtio_blk",  // root file system
    "virtio_rng",  // entropy
    "virtio_net",
    "vmw_vsock_virtio_transport", // control stream
    "squashfs",
    "overlay",
    "af_packet", // absent where it is built in
];

/// One module, ready to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// Kernel name.
    pub(crate) name: String,
    /// Its bytes, unpacked: finit_module(2) of a static init takes plain ELF.
    pub(crate) bytes: Vec<u8>,
}

/// The wanted modules and what they depend on, each after its dependencies. Modules that are neither there nor needed by
/// one that is there count as built in.
///
/// # Errors
/// [`BuildError`] when a module cannot be read or one that another depends on is missing.
pub(crate) fn collect(tree: &Path) -> Result<Vec<Module>, BuildError> {
    let files = index(tree)?;
    let builtin = builtin(tree);
    let mut ordered = Vec::new();
    let mut seen = BTreeSet::new();
    for name in WANTED {
        if files.contains_key(name) {
            visit(name, &files, &builtin, &mut seen, &mut ordered)?;
        }
    }
    if ordered.is_empty() {
        return Err(BuildError::input(tree, "holds none of the modules a guest needs"));
    }
    Ok(ordered)
}

fn visit(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    builtin: &BTreeSet<String>,
    seen: &mut BTreeSet<String>,
    ordered: &mut Vec<Module>,
) -> Result<(), BuildError> {
    if builtin.contains(name) || !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let path = files
        .get(name)
        .ok_or_else(|| BuildError::input(name, "another module depends on it, but the package does not have it"))?;
    let bytes = unpack(&write::read(path)?).map_err(|what| BuildError::input(path, what))?;
    for dependency in depends(&bytes) {
        visit(&dependency, files, builtin, seen, ordered)?;
    }
    ordered.push(Module {
        name: name.to_owned(),
        bytes,
    });
    Ok(())
}

/// Every module file below `tree`, by kernel name.
fn index(tree: &Path) -> Result<BTreeMap<String, PathBuf>, BuildError> {
    let mut found = BTreeMap::new();
    let mut folders = vec![tree.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(BuildError::io("reading", &folder))? {
            let entry = entry.map_err(BuildError::io("reading", &folder))?;
            let kind = entry.file_type().map_err(BuildError::io("reading", entry.path()))?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if let Some((stem, _)) = entry.file_name().to_str().and_then(|name| name.split_once(".ko")) {
                found.insert(kernel_name(stem), entry.path());
            }
        }
    }
    Ok(found)
}

/// Names in `modules.builtin`; none where the file is missing.
fn builtin(tree: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(tree.join("modules.builtin")).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko").map(kernel_name))
        .collect()
}

/// File names and `depends=` use `-` and `_` as they like; the kernel has `_`.
fn kernel_name(name: &str) -> String {
    name.replace('-', "_")
}

/// The names after `depends=` in a module's `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let at = (0..module.len().saturating_sub(KEY.len()))
        .find(|&at| module[at..].starts_with(KEY) && (at == 0 || module[at - 1] == 0));
    let Some(at) = at else { return Vec::new() };
    let value = module[at + KEY.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(kernel_name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, depends) in modules {
            let text = format!("\x7fELF\0license=GPL\0depends={depends}\0");
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn each_module_comes_after_what_it_depends_on() {
        let dir = tree(&[
            ("virtio_mmio.ko", "virtio,virtio_ring"),
            ("virtio.ko", ""),
            ("virtio_ring.ko", ""),
            ("virtio-rng.ko", "virtio"),
            (
                "vmw_vsock_virtio_transport.ko",
                "virtio,vsock,vmw_vsock_virtio_transport_common",
            ),
            ("vmw_vsock_virtio_transport_common.ko", "vsock"),
            ("vsock.ko", ""),
            ("unrelated.ko", ""),
        ]);
        let names: Vec<_> = collect(dir.path())
            .unwrap()
            .into_iter()
            .map(|module| module.name)
            .collect();
        assert_eq!(
            names,
            [
                "virtio",
                "virtio_ring",
                "virtio_mmio",
                "virtio_rng",
                "vsock",
                "vmw_vsock_virtio_transport_common",
                "vmw_vsock_virtio_transport"
            ]
        );
    }

    #[test]
    fn a_dependency_may_be_built_in_but_not_missing() {
        let dir = tree(&[("overlay.ko", "helper")]);
        assert!(collect(dir.path()).unwrap_err().to_string().contains("helper"));
        std::fs::write(dir.path().join("modules.builtin"), "kernel/lib/helper.ko\n").unwrap();
        assert_eq!(collect(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_ring_of_dependencies_ends() {
        let dir = tree(&[("overlay.ko", "squashfs"), ("squashfs.ko", "overlay")]);
        assert_eq!(collect(dir.path()).unwrap().len(), 2);
    }
}
