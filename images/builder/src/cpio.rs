//! The `newc` cpio format, as the kernel's initramfs takes it (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Everything that could differ between two builds is fixed: times 0, owner root, inode numbers by position.

use std::fmt::Write;

/// One entry's kind and content.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Entry<'a> {
    Folder,
    File(&'a [u8]),
    /// Major and minor number of a character device.
    CharDevice(u32, u32),
}

/// An archive in the making.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    out: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds `path` (relative, no leading "/") with these permission bits.
    pub(crate) fn add(&mut self, path: &str, mode: u32, entry: Entry<'_>) {
        let (kind, data, device) = match entry {
            Entry::Folder => (0o040_000, &[][..], (0, 0)),
            Entry::File(data) => (0o100_000, data, (0, 0)),
            Entry::CharDevice(major, minor) => (0o020_000, &[][..], (major, minor)),
        };
        self.record(path, kind | mode, data, device);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.record("TRAILER!!!", 0, &[], (0, 0));
        self.out
    }

    fn record(&mut self, path: &str, mode: u32, data: &[u8], device: (u32, u32)) {
        self.inode += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let size = u32::try_from(data.len()).expect("an initramfs file is far below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("paths are short");
        let mut header = String::from("070701");
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        for field in [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ] {
            write!(header, "{field:08x}").expect("a String grows as needed");
        }
        self.out.extend_from_slice(header.as_bytes());
        self.out.extend_from_slice(path.as_bytes());
        self.out.push(0);
        self.pad();
        self.out.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_tool_reads_what_was_written() {
        let mut archive = Archive::default();
        archive.add("dev", 0o755, Entry::Folder);
        archive.add("dev/console", 0o600, Entry::CharDevice(5, 1));
        archive.add("init", 0o755, Entry::File(b"hello"));
        let bytes = archive.finish();
        let Ok(mut cpio) = std::process::Command::new("cpio")
            .args(["-tv", "--quiet"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            return eprintln!("SKIPPED another_tool_reads_what_was_written: no cpio program");
        };
        std::io::Write::write_all(&mut cpio.stdin.take().unwrap(), &bytes).unwrap();
        let listed = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        for want in ["drwxr-xr-x", "5,   1", "dev/console", "-rwxr-xr-x", "init"] {
            assert!(listed.contains(want), "{want} is missing in {listed}");
        }
    }
}
