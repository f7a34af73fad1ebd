//! Merges one layer into the tree. Contents go to the spool, names into memory, nothing anywhere else.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
};

use tar::EntryType;

use crate::{
    ImageError, Limits,
    archive::Layer,
    entries::{self, Item, Stop},
    tree::{Content, Kind, Meta, Node, Tree},
    unpack::{Packing, Unpacked},
};

/// Contents of all files of an image, end to end, and what the image has used of its limits.
#[derive(Debug)]
pub(crate) struct Spool {
    pub(crate) file: File,
    end: u64,
    unpacked: u64,
    entries: usize,
    names: u64,
}

impl Spool {
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            end: 0,
            unpacked: 0,
            entries: 0,
            names: 0,
        }
    }

    /// Appends a file's content. How much that may be is bounded by the layer's stream, which it comes from.
    fn take(&mut self, from: &mut dyn Read, wanted: u64) -> Result<Content, Fault> {
        let offset = self.end;
        let mut chunk = vec![0; 64 << 10];
        loop {
            let got = match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Fault::Stream(error)),
            };
            io::Write::write_all(&mut self.file, &chunk[..got])
                .map_err(|error| Fault::Image(ImageError::io("unpacking into", "the image store")(error)))?;
            self.end += got as u64;
        }
        let len = self.end - offset;
        if len < wanted {
            return Err(Fault::Entry("ends before its content does"));
        }
        Ok(Content { offset, len })
    }

    fn count_bytes(&mut self, bytes: u64, limits: &Limits) -> Result<(), ImageError> {
        self.unpacked = self.unpacked.saturating_add(bytes);
        if self.unpacked > limits.content_bytes {
            return Err(ImageError::TooLarge {
                what: "the unpacked content",
                limit: limits.content_bytes,
            });
        }
        Ok(())
    }

    fn count_entry(&mut self, item: &Item, limits: &Limits) -> Result<(), ImageError> {
        self.count_names(1, (item.path.len() + item.link.len()) as u64, limits)
    }

    fn count_names(&mut self, names: usize, bytes: u64, limits: &Limits) -> Result<(), ImageError> {
        self.entries += names;
        if self.entries > limits.entries {
            return Err(ImageError::TooLarge {
                what: "the number of entries",
                limit: limits.entries as u64,
            });
        }
        self.names += bytes;
        if self.names > limits.name_bytes {
            return Err(ImageError::TooLarge {
                what: "the length of all names together",
                limit: limits.name_bytes,
            });
        }
        Ok(())
    }
}

/// What is wrong with an entry, before the layer and the entry are named.
enum Fault {
    Entry(&'static str),
    Stream(io::Error),
    Image(ImageError),
}

/// Adds the layer's entries to `tree`, and checks that the layer unpacks to what the config says.
pub(crate) fn merge(layer: &Layer, tree: &mut Tree, spool: &mut Spool, limits: &Limits) -> Result<(), ImageError> {
    let broken = |error: io::Error| ImageError::Archive {
        what: format!("layer {} is not a readable tar: {error}", layer.digest),
    };
    let refuse = |path: &[u8], why| ImageError::Entry {
        layer: layer.digest.to_string(),
        entry: String::from_utf8_lossy(path).into_owned(),
        why,
    };
    let mut stream = unpacked(layer, limits.content_bytes.saturating_sub(spool.unpacked))?;
    let merged = entries::each(&mut stream, |item, content| {
        spool.count_entry(item, limits)?;
        one(item, content, tree, spool, limits).map_err(|fault| match fault {
            Fault::Entry(why) => refuse(&item.path, why),
            Fault::Stream(error) => broken(error),
            Fault::Image(error) => error,
        })?;
        // A folder that an entry implies costs what one with an entry of its own does.
        let implied = tree.take_implied();
        spool.count_names(implied.folders, implied.path_bytes, limits)
    });
    // What stands behind the tar's end belongs to the layer's digest, and may be a bomb as well.
    let merged = merged.and_then(|()| io::copy(&mut stream, &mut io::sink()).map_err(Stop::Stream));
    if stream.is_over() {
        return Err(ImageError::TooLarge {
            what: "the unpacked content",
            limit: limits.content_bytes,
        });
    }
    merged.map_err(|stop| match stop {
        Stop::Stream(error) => broken(error),
        Stop::Header { path, why } => refuse(&path, why),
        Stop::Visitor(error) => error,
    })?;
    let (bytes, seen) = stream.finish();
    spool.count_bytes(bytes, limits)?;
    if seen != layer.diff_id {
        return Err(ImageError::Mismatch {
            object: format!("layer {}, unpacked,", layer.digest),
            field: "digest",
            seen: seen.to_string(),
            wanted: layer.diff_id.to_string(),
        });
    }
    Ok(())
}

/// The layer's tar stream, of at most `limit` bytes.
fn unpacked(layer: &Layer, limit: u64) -> Result<Unpacked, ImageError> {
    let file = File::open(&layer.path).map_err(ImageError::io("opening", &layer.path))?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let head = reader.fill_buf().map_err(ImageError::io("reading", &layer.path))?;
    let packing = Packing::of(head);
    if packing == Packing::Plain && (layer.media_type.ends_with("gzip") || layer.media_type.ends_with("zstd")) {
        return Err(ImageError::Archive {
            what: format!(
                "layer {} is not packed as its media type {} says",
                layer.digest, layer.media_type
            ),
        });
    }
    Ok(Unpacked::new(reader, packing, limit))
}

fn one(item: &Item, content: &mut dyn Read, tree: &mut Tree, spool: &mut Spool, limits: &Limits) -> Result<(), Fault> {
    let path = parts(&item.path, limits).map_err(Fault::Entry)?;
    if let Some((name, parents)) = path.split_last() {
        if name == b".wh..wh..opq" {
            tree.opaque(parents);
            return Ok(());
        }
        if let Some(gone) = name.strip_prefix(b".wh.") {
            if gone.is_empty() || gone == b"." || gone == b".." {
                return Err(Fault::Entry("is a whiteout of nothing"));
            }
            let target: Vec<_> = parents.iter().cloned().chain([gone.to_vec()]).collect();
            tree.whiteout(&target);
            return Ok(());
        }
    }
    let meta = Meta {
        mode: item.mode,
        uid: item.uid,
        gid: item.gid,
    };
    let kind = match item.kind {
        EntryType::Regular | EntryType::Continuous => Kind::File(spool.take(content, item.size)?),
        EntryType::Directory => Kind::Folder(BTreeMap::new()),
        EntryType::Symlink => Kind::Symlink(link_target(&item.link, limits).map_err(Fault::Entry)?),
        EntryType::Link => {
            // One file under two names: owner and mode are the target's, whatever this header says.
            let (meta, kind) = hard_link(&item.link, tree, limits).map_err(Fault::Entry)?;
            match &kind {
                Kind::File(content) => spool.count_bytes(content.len, limits),
                Kind::Symlink(target) => spool.count_names(0, target.len() as u64, limits),
                Kind::Folder(_) => Ok(()),
            }
            .map_err(Fault::Image)?;
            return tree.put(&path, meta, kind).map_err(Fault::Entry);
        }
        // A guest gets its devices from its own kernel: none comes from an image. Dropped, as rootless tools do.
        EntryType::Char | EntryType::Block | EntryType::Fifo => return Ok(()),
        // A header of 512 bytes can announce terabytes of zeros.
        EntryType::GNUSparse => return Err(Fault::Entry("is a sparse file, which layers do not have")),
        _ => return Err(Fault::Entry("has a type that layers do not have")),
    };
    tree.put(&path, meta, kind).map_err(Fault::Entry)
}

/// A hard link shares what its target has now. It must be a file of this image.
fn hard_link(target: &[u8], tree: &Tree, limits: &Limits) -> Result<(Meta, Kind), &'static str> {
    match tree.get(&parts(target, limits)?) {
        Some(Node {
            meta,
            kind: kind @ (Kind::File(_) | Kind::Symlink(_)),
            ..
        }) => Ok((*meta, kind.clone())),
        Some(Node {
            kind: Kind::Folder(_), ..
        }) => Err("is a hard link to a folder"),
        None => Err("is a hard link to something the image does not have"),
    }
}

fn link_target(target: &[u8], limits: &Limits) -> Result<Vec<u8>, &'static str> {
    if target.is_empty() || target.contains(&0) {
        return Err("is a symbolic link to nothing");
    }
    if target.len() > limits.path_bytes {
        return Err("is a symbolic link that is too long");
    }
    // Wherever it points, it is resolved by the guest's kernel inside the guest's root.
    Ok(target.to_vec())
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
