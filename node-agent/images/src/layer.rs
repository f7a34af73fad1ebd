//! Merges one layer into the tree. Contents go to the spool, names into memory, nothing anywhere else.

use std::{
    fs::File,
    io::{self, BufReader, Read, Write},
};

use tar::{Entry, EntryType};

use crate::{
    ImageError, Limits,
    archive::Layer,
    tree::{Content, Kind, Meta, Node, Tree},
};

/// Contents of all files of an image, end to end, and what of the limits is left.
#[derive(Debug)]
pub(crate) struct Spool {
    pub(crate) file: File,
    end: u64,
    entries: usize,
}

impl Spool {
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            end: 0,
            entries: 0,
        }
    }

    fn take(&mut self, mut from: impl Read, limits: &Limits) -> Result<Content, ImageError> {
        let offset = self.end;
        let room = limits.content_bytes - offset;
        let mut bounded = (&mut from).take(room + 1);
        let len = io::copy(&mut bounded, &mut self.file)
            .map_err(ImageError::io("unpacking into the spool of", "the image store"))?;
        if len > room {
            return Err(ImageError::TooLarge {
                what: "the unpacked content",
                limit: limits.content_bytes,
            });
        }
        self.end += len;
        Ok(Content { offset, len })
    }
}

/// Adds the layer's entries to `tree`.
pub(crate) fn merge(layer: &Layer, tree: &mut Tree, spool: &mut Spool, limits: &Limits) -> Result<(), ImageError> {
    let file = File::open(&layer.path).map_err(ImageError::io("opening", &layer.path))?;
    let broken = |error: io::Error| ImageError::Archive {
        what: format!("layer {} is not a readable tar: {error}", layer.digest),
    };
    // Padding and headers count too: a bomb may be made of empty entries.
    let bound = limits.content_bytes.saturating_add(limits.entries as u64 * 2048);
    let mut tar = tar::Archive::new(decompress(file, layer)?.take(bound));
    for entry in tar.entries().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        spool.entries += 1;
        if spool.entries > limits.entries {
            return Err(ImageError::TooLarge {
                what: "the number of entries",
                limit: limits.entries as u64,
            });
        }
        let raw = entry.path_bytes().into_owned();
        let refuse = |why: &'static str| ImageError::Entry {
            layer: layer.digest.to_string(),
            entry: String::from_utf8_lossy(&raw).into_owned(),
            why,
        };
        let path = parts(&raw, limits).map_err(refuse)?;
        one(entry, &path, tree, spool, limits, &refuse)?;
    }
    spool
        .file
        .flush()
        .map_err(ImageError::io("writing the spool of", "the image store"))
}

fn one(
    entry: Entry<'_, impl Read>,
    path: &[Vec<u8>],
    tree: &mut Tree,
    spool: &mut Spool,
    limits: &Limits,
    refuse: &dyn Fn(&'static str) -> ImageError,
) -> Result<(), ImageError> {
    if let Some((name, parents)) = path.split_last() {
        if name == b".wh..wh..opq" {
            tree.opaque(parents);
            return Ok(());
        }
        if let Some(gone) = name.strip_prefix(b".wh.") {
            if gone.is_empty() || gone == b"." || gone == b".." {
                return Err(refuse("is a whiteout of nothing"));
            }
            let target: Vec<_> = parents.iter().cloned().chain([gone.to_vec()]).collect();
            tree.whiteout(&target);
            return Ok(());
        }
    }
    let header = entry.header().clone();
    let number = |value: io::Result<u64>, why| {
        value
            .ok()
            .and_then(|value| u32::try_from(value).ok())
            .ok_or_else(|| refuse(why))
    };
    let mode = header.mode().map_err(|_| refuse("has an unreadable mode"))? & 0o7777;
    let meta = Meta {
        mode: u16::try_from(mode).expect("twelve bits fit"),
        uid: number(header.uid(), "has an owner outside 32 bits")?,
        gid: number(header.gid(), "has a group outside 32 bits")?,
    };
    let kind = match header.entry_type() {
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File(spool.take(entry, limits)?),
        EntryType::Directory => Kind::Folder(std::collections::BTreeMap::new()),
        EntryType::Symlink => Kind::Symlink(link_target(&entry, limits).map_err(refuse)?),
        EntryType::Link => hardlink(&entry, tree, limits).map_err(refuse)?,
        // A guest gets its devices from its own kernel: none comes from an image. Dropped, as rootless tools do.
        EntryType::Char | EntryType::Block | EntryType::Fifo => return Ok(()),
        _ => return Err(refuse("has a type that layers do not have")),
    };
    tree.put(path, meta, kind).map_err(refuse)
}

/// A hard link shares what its target has now. It must be a file of this image.
fn hardlink(entry: &Entry<'_, impl Read>, tree: &Tree, limits: &Limits) -> Result<Kind, &'static str> {
    let target = entry
        .link_name_bytes()
        .ok_or("is a hard link without a target")?
        .into_owned();
    let target = parts(&target, limits)?;
    match tree.get(&target) {
        Some(Node {
            kind: kind @ (Kind::File(_) | Kind::Symlink(_)),
            ..
        }) => Ok(kind.clone()),
        Some(Node {
            kind: Kind::Folder(_), ..
        }) => Err("is a hard link to a folder"),
        None => Err("is a hard link to something the image does not have"),
    }
}

fn link_target(entry: &Entry<'_, impl Read>, limits: &Limits) -> Result<Vec<u8>, &'static str> {
    let target = entry
        .link_name_bytes()
        .ok_or("is a symbolic link without a target")?
        .into_owned();
    if target.is_empty() || target.contains(&0) {
        return Err("is a symbolic link to nothing");
    }
    if target.len() > limits.path_bytes {
        return Err("is a symbolic link that is too long");
    }
    // Wherever it points, it is resolved by the guest's kernel inside the guest's root.
    Ok(target)
}

/// The parts of a path of a layer. Leading "/" and "./" are harmless habits of tools; ".." never is.
fn parts(path: &[u8], limits: &Limits) -> Result<Vec<Vec<u8>>, &'static str> {
    if path.len() > limits.path_bytes {
        return Err("has a path that is too long");
    }
    if path.contains(&0) {
        return Err("has a NUL in its path");
    }
    let parts: Vec<Vec<u8>> = path
        .split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
        .collect();
    if parts.iter().any(|part| part == b"..") {
        return Err("has \"..\" in its path");
    }
    if parts.iter().any(|part| part.len() > 255) {
        return Err("has a name over 255 bytes");
    }
    if parts.len() > limits.path_depth {
        return Err("lies too deep");
    }
    Ok(parts)
}

/// The layer's tar stream. The media type says how it is packed; the content's first bytes decide, because registries
/// and tools have disagreed.
fn decompress(file: File, layer: &Layer) -> Result<Box<dyn Read>, ImageError> {
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let head = io::BufRead::fill_buf(&mut reader).map_err(ImageError::io("reading", &layer.path))?;
    if head.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader)));
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let decoder = ruzstd::decoding::StreamingDecoder::new(reader).map_err(|error| ImageError::Archive {
            what: format!("layer {}: {error}", layer.digest),
        })?;
        return Ok(Box::new(decoder));
    }
    if layer.media_type.ends_with("+gzip") || layer.media_type.ends_with("+zstd") {
        return Err(ImageError::Archive {
            what: format!(
                "layer {} is not packed as its media type {} says",
                layer.digest, layer.media_type
            ),
        });
    }
    Ok(Box::new(reader))
}
