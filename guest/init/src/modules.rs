//! Kernel modules from the initramfs, in the order of `/lib/far/modules`: one absolute path per line, dependencies first.
//! Empty lines and lines starting with `#` are ignored; without the file everything is taken as built in.

use crate::{boot::BootReport, place::Place};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
};
use std::{fs, io::ErrorKind, path::Path};

/// Written by the image builder.
const LIST: &str = "/lib/far/modules";

/// Loads every listed module. A module that is missing or refused is a warning: what needed it says so later, with its
/// own name, and a built-in of another kernel needs no file.
pub(crate) fn load_listed(place: &Place, boot: &mut BootReport) {
    if !place.is_guest() {
        return;
    }
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) => return boot.warn(format!("reading {LIST}: {error}")),
    };
    for path in listed(&list) {
        if let Err(problem) = load(Path::new(path)) {
            boot.warn(format!("module {path}: {problem}"));
        }
    }
}

fn listed(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn load(path: &Path) -> Result<(), String> {
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        // Built in, or loaded before.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        // The file was just opened, so this is a missing symbol: another module must come first.
        Err(Errno::ENOENT) => Err("a module that it needs is not loaded yet".into()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_keeps_its_order_and_skips_comments() {
        let list = "# first\n/lib/a.ko\n\n  /lib/b.ko  \r\n#/lib/c.ko\n";
        assert_eq!(listed(list).collect::<Vec<_>>(), ["/lib/a.ko", "/lib/b.ko"]);
    }
}
