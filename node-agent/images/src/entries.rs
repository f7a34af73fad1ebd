//! Entries of a tar stream with their long names put together, in bounded memory.
//!
//! The `tar` crate reads extended headers of any size into memory, and lets them say another size than the header; here
//! they are read raw, cut off by a limit, and believed in names and owners only.

use std::io::{self, Read};

use tar::{EntryType, Header, PaxExtensions};

/// Longest extended header: a few names. Attributes, which can be long, come one by one below this.
const EXTENDED_HEADER_BYTES: u64 = 1 << 20;

/// One entry, without its content. Nothing in it is checked but its numbers.
#[derive(Debug)]
pub(crate) struct Item {
    /// As written.
    pub(crate) path: Vec<u8>,
    /// Target of a link; empty where there is none.
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryType,
    /// Length of the content.
    pub(crate) size: u64,
    /// Permission bits: 0 to 0o7777.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Why reading ended early.
#[derive(Debug)]
pub(crate) enum Stop<E> {
    /// The stream is no tar, or its source failed.
    Stream(io::Error),
    /// A header breaks a rule.
    Header { path: Vec<u8>, why: &'static str },
    /// What the visitor said.
    Visitor(E),
}

/// What extended headers said about the entry after them.
#[derive(Debug, Default)]
struct Extension {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pax: Vec<u8>,
}

/// Calls `visit` with each entry and its content.
pub(crate) fn each<R: Read, E>(
    reader: R,
    mut visit: impl FnMut(&Item, &mut dyn Read) -> Result<(), E>,
) -> Result<(), Stop<E>> {
    let mut archive = tar::Archive::new(reader);
    let mut extension = Extension::default();
    for entry in archive.entries().map_err(Stop::Stream)?.raw(true) {
        let mut entry = entry.map_err(Stop::Stream)?;
        let header = entry.header().clone();
        let wrong = |why| Stop::Header {
            path: header.path_bytes().into_owned(),
            why,
        };
        let kind = header.entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            continue;
        }
        if matches!(
            kind,
            EntryType::XHeader | EntryType::GNULongName | EntryType::GNULongLink
        ) {
            if entry.size() > EXTENDED_HEADER_BYTES {
                return Err(wrong("has an extended header over 1 MiB"));
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(Stop::Stream)?;
            match kind {
                EntryType::XHeader => extension.pax = bytes,
                EntryType::GNULongName => extension.long_name = Some(without_end(bytes)),
                _ => extension.long_link = Some(without_end(bytes)),
            }
            continue;
        }
        let item = put_together(&header, entry.size(), std::mem::take(&mut extension)).map_err(wrong)?;
        visit(&item, &mut entry).map_err(Stop::Visitor)?;
    }
    Ok(())
}

/// GNU long names end with a NUL.
fn without_end(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

fn put_together(header: &Header, size: u64, extension: Extension) -> Result<Item, &'static str> {
    let mut item = Item {
        path: extension.long_name.unwrap_or_else(|| header.path_bytes().into_owned()),
        link: extension
            .long_link
            .unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned()),
        kind: header.entry_type(),
        size,
        mode: header
            .mode()
            .ok()
            .and_then(|mode| u16::try_from(mode & 0o7777).ok())
            .ok_or("has an unreadable mode")?,
        uid: id(header.uid().ok())?,
        gid: id(header.gid().ok())?,
    };
    for record in PaxExtensions::new(&extension.pax) {
        let record = record.map_err(|_| "has an extended header that is not readable")?;
        let value = record.value_bytes();
        match record.key_bytes() {
            b"path" => item.path = value.to_vec(),
            b"linkpath" => item.link = value.to_vec(),
            b"uid" => item.uid = id(decimal(value))?,
            b"gid" => item.gid = id(decimal(value))?,
            // The stream is cut by the header's size alone: two readers must not disagree where the next entry is.
            b"size" if decimal(value) != Some(size) => return Err("has two different sizes"),
            key if key.starts_with(b"GNU.sparse.") => return Err("is a sparse file, which layers do not have"),
            // Times are not kept; attributes (capabilities, ACLs, labels) have no place in the root file system.
            _ => {}
        }
    }
    Ok(item)
}

fn decimal(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn id(value: Option<u64>) -> Result<u32, &'static str> {
    value
        .and_then(|value| u32::try_from(value).ok())
        .ok_or("has an owner or group outside 32 bits")
}
