//! Writes the tree as squashfs, bit for bit the same for the same tree: sorted names, no times, no padding by chance.
//!
//! Uncompressed: under an emulated CPU reading packed pages costs more than the disk they save, and the file is shared by
//! all microVMs of one image.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use backhand::{
    BackhandError, FilesystemCompressor, FilesystemWriter, NodeHeader, SuperBlock,
    compression::{CompressionAction, Compressor},
    kind::Kind as Format,
};

use crate::{
    ImageError,
    tree::{Content, Kind, Node, Tree},
};

/// Folders that the guest mounts over: made where an image leaves them out (a scratch image has no `/proc`).
const MOUNT_POINTS: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];

/// Stores every block as it is. The format has no id for "uncompressed" (Linux refuses id 0, fs/squashfs/decompressor.c), only
/// blocks that did not shrink: each is "compressed" to one byte more, whereupon the writer keeps the original.
#[derive(Debug)]
struct Stored;

static STORED: Stored = Stored;

impl CompressionAction for Stored {
    type Error = BackhandError;
    type Compressor = Compressor;
    type FilesystemCompressor = FilesystemCompressor;
    type SuperBlock = SuperBlock;

    fn compress(&self, bytes: &[u8], _: FilesystemCompressor, _: u32) -> Result<Vec<u8>, BackhandError> {
        Ok(vec![0; bytes.len() + 1])
    }

    fn decompress(&self, _: &[u8], _: &mut Vec<u8>, compressor: Compressor) -> Result<(), BackhandError> {
        Err(BackhandError::UnsupportedCompression(format!("{compressor:?}")))
    }
}

/// Writes `tree` to `out`; contents come from `spool`.
pub(crate) fn write(tree: &Tree, spool: &Arc<File>, out: &Path) -> Result<(), ImageError> {
    let failed = |error: backhand::BackhandError| ImageError::Io {
        doing: "writing the root file system",
        path: out.to_path_buf(),
        source: io::Error::other(error),
    };
    let mut writer = FilesystemWriter::default();
    writer.set_time(0);
    writer.set_kind(Format::new_v4(&STORED));
    // The id that every kernel with squashfs knows; no block uses it.
    writer.set_compressor(FilesystemCompressor::new(Compressor::Gzip, None).map_err(failed)?);
    // Left out: it hashes every file once more, and images hardly repeat themselves.
    writer.set_no_duplicate_files(false);
    let root = tree.root();
    writer.set_root_mode(root.meta.mode);
    // The root folder stays root's: the writer has an id for an owner only where something below it has the same.
    let Kind::Folder(children) = &root.kind else {
        unreachable!("the root stays a folder: Tree::put refuses anything else")
    };
    for (name, node) in children {
        push(&mut writer, Path::new("/"), name, node, spool).map_err(failed)?;
    }
    for name in MOUNT_POINTS
        .iter()
        .filter(|name| !children.contains_key(name.as_bytes()))
    {
        let mode = if *name == "tmp" { 0o1777 } else { 0o755 };
        writer
            .push_dir(Path::new("/").join(name), NodeHeader::new(mode, 0, 0, 0))
            .map_err(failed)?;
    }
    let mut file = File::create(out).map_err(ImageError::io("creating", out))?;
    writer.write(&mut file).map_err(failed)?;
    file.sync_all().map_err(ImageError::io("syncing", out))
}

fn push<'a>(
    writer: &mut FilesystemWriter<'a, 'a, 'a>,
    parent: &Path,
    name: &[u8],
    node: &Node,
    spool: &Arc<File>,
) -> Result<(), backhand::BackhandError> {
    let path: PathBuf = parent.join(OsStr::from_bytes(name));
    let header = NodeHeader::new(node.meta.mode, node.meta.uid, node.meta.gid, 0);
    match &node.kind {
        Kind::File(content) => writer.push_file(Window::new(Arc::clone(spool), *content), &path, header),
        Kind::Symlink(target) => writer.push_symlink(Path::new(OsStr::from_bytes(target)), &path, header),
        Kind::Folder(children) => {
            writer.push_dir(&path, header)?;
            children
                .iter()
                .try_for_each(|(name, child)| push(writer, &path, name, child, spool))
        }
    }
}

/// One file's bytes in the spool. Reads by position, so that all windows share one open file.
struct Window {
    file: Arc<File>,
    content: Content,
    at: u64,
}

impl Window {
    fn new(file: Arc<File>, content: Content) -> Self {
        Self { file, content, at: 0 }
    }
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.content.len - self.at).unwrap_or(usize::MAX);
        let want = buffer.len().min(left);
        let got = self.file.read_at(&mut buffer[..want], self.content.offset + self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.content.len.checked_add_signed(n),
            SeekFrom::Current(n) => self.at.checked_add_signed(n),
        };
        self.at = target
            .filter(|&at| at <= self.content.len)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
