//! Image archives made by hand, so that they can be wrong in every way.
#![allow(dead_code, reason = "every test program uses its own part")]

use far_images::{Image, ImageError, ImageStore, Limits};
use sha2::{Digest, Sha256};
use std::io::Write;
use tar::{EntryType, Header};
use tempfile::TempDir;

/// One entry of a layer, written as it is: nothing is checked.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) kind: EntryType,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) owner: u64,
}

pub(crate) fn file(path: &str, bytes: impl Into<Vec<u8>>) -> Entry {
    entry(EntryType::Regular, path, "", bytes.into())
}

pub(crate) fn folder(path: &str) -> Entry {
    Entry {
        mode: 0o755,
        ..entry(EntryType::Directory, path, "", Vec::new())
    }
}

pub(crate) fn symlink(path: &str, target: &str) -> Entry {
    entry(EntryType::Symlink, path, target, Vec::new())
}

pub(crate) fn hard_link(path: &str, target: &str) -> Entry {
    entry(EntryType::Link, path, target, Vec::new())
}

pub(crate) fn entry(kind: EntryType, path: &str, link: &str, bytes: Vec<u8>) -> Entry {
    Entry {
        kind,
        path: path.into(),
        link: link.into(),
        bytes,
        mode: 0o644,
        owner: 0,
    }
}

/// A tar of the entries. Names are put into the header without the `tar` crate's own checks; at most 100 bytes.
pub(crate) fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(entry.kind);
        header.set_size(entry.bytes.len() as u64);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner);
        header.set_gid(entry.owner);
        header.set_mtime(1_700_000_000);
        header.as_old_mut().name[..entry.path.len()].copy_from_slice(&entry.path);
        header.as_old_mut().linkname[..entry.link.len()].copy_from_slice(&entry.link);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(&entry.bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// A layer as it lies in the archive.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) media_type: &'static str,
    /// Packed.
    pub(crate) blob: Vec<u8>,
    /// What the config says about the unpacked layer.
    pub(crate) diff_id: String,
}

pub(crate) fn plain(tar: Vec<u8>) -> Layer {
    Layer {
        media_type: "application/vnd.oci.image.layer.v1.tar",
        diff_id: digest(&tar),
        blob: tar,
    }
}

pub(crate) fn gzipped(tar: &[u8]) -> Layer {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(tar).unwrap();
    Layer {
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip",
        diff_id: digest(tar),
        blob: packer.finish().unwrap(),
    }
}

/// zstd of raw blocks only (RFC 8878, 3.1.1.2), one frame per piece, with a skippable frame in between: what
/// seekable and chunked layers look like.
pub(crate) fn zstd_frames(tar: &[u8], piece: usize) -> Layer {
    let mut blob = Vec::new();
    for piece in tar.chunks(piece) {
        blob.extend_from_slice(&0x184D_2A50_u32.to_le_bytes());
        blob.extend_from_slice(&3_u32.to_le_bytes());
        blob.extend_from_slice(b"far");
        blob.extend_from_slice(&0xFD2F_B528_u32.to_le_bytes());
        // No content size, no checksum; a window of 1 MiB.
        blob.extend_from_slice(&[0x00, 0x50]);
        let blocks: Vec<&[u8]> = piece.chunks(100_000).collect();
        for (number, block) in blocks.iter().enumerate() {
            let is_last = u32::from(number + 1 == blocks.len());
            let head = ((block.len() as u32) << 3) | is_last;
            blob.extend_from_slice(&head.to_le_bytes()[..3]);
            blob.extend_from_slice(block);
        }
    }
    Layer {
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd",
        diff_id: digest(tar),
        blob,
    }
}

/// An archive of these layers.
pub(crate) fn archive(layers: &[Layer]) -> Vec<u8> {
    let descriptor = |media_type: &str, blob: &[u8]| serde_json::json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() });
    let config = serde_json::to_vec(&serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Entrypoint": ["/bin/program"], "Cmd": null, "Env": ["A=b", "broken"] },
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>() },
    }))
    .unwrap();
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": layers.iter().map(|layer| descriptor(layer.media_type, &layer.blob)).collect::<Vec<_>>(),
    }))
    .unwrap();
    let index = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "manifests": [descriptor("application/vnd.oci.image.manifest.v1+json", &manifest)],
    }))
    .unwrap();
    let blob = |bytes: &[u8]| file(&format!("blobs/sha256/{}", &digest(bytes)[7..]), bytes);
    let mut entries = vec![blob(&config), blob(&manifest)];
    entries.extend(layers.iter().map(|layer| blob(&layer.blob)));
    entries.push(file("index.json", index));
    entries.push(file("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#));
    tar_of(&entries)
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// A store of its own.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) store: ImageStore,
    pub(crate) dir: TempDir,
}

pub(crate) fn place() -> Place {
    place_with(Limits::default())
}

pub(crate) fn place_with(limits: Limits) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open_with(dir.path().join("images"), limits).unwrap();
    Place { store, dir }
}

/// Loads plain layers into a new store.
pub(crate) fn load(layers: &[&[Entry]]) -> (Place, Result<Image, ImageError>) {
    let place = place();
    let layers: Vec<Layer> = layers.iter().map(|entries| plain(tar_of(entries))).collect();
    let loaded = place
        .store
        .load_archive(archive(&layers).as_slice(), "example.com/test:1");
    (place, loaded)
}

/// Every file below a folder, for "nothing is left".
pub(crate) fn files_below(folder: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path.display().to_string());
        }
    }
    found
}

/// `unsquashfs -lln`, without the date: mode, owner, size (of files), path. `None`: the program is not here.
pub(crate) fn listed(test: &str, image: &Image) -> Option<Vec<String>> {
    let Ok(output) = std::process::Command::new("unsquashfs")
        .args(["-lln", "-d", ""])
        .arg(&image.rootfs)
        .output()
    else {
        eprintln!("SKIPPED {test}: no unsquashfs (apt-get install squashfs-tools)");
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    Some(
        text.lines()
            .filter(|line| line.contains(':'))
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let is_folder = words[0].starts_with('d');
                let shown = if is_folder { &words[..2] } else { &words[..3] };
                [shown, &words[5..]].concat().join(" ")
            })
            .collect(),
    )
}

/// Paths of an image without the guest's own mount points, sorted; folders end with `/`.
pub(crate) fn listed_paths(image: &Image) -> Vec<String> {
    const MOUNT_POINTS: [&str; 6] = ["/", "/dev", "/proc", "/run", "/sys", "/tmp"];
    let file = std::io::BufReader::new(std::fs::File::open(&image.rootfs).unwrap());
    let squash = backhand::FilesystemReader::from_reader(file).unwrap();
    let mut paths: Vec<(String, bool)> = squash
        .files()
        .map(|node| {
            (
                node.fullpath.display().to_string(),
                matches!(node.inner, backhand::InnerNode::Dir(_)),
            )
        })
        .filter(|(path, _)| !MOUNT_POINTS.contains(&path.as_str()))
        .collect();
    paths.sort();
    paths
        .into_iter()
        .map(|(path, is_folder)| if is_folder { format!("{path}/") } else { path })
        .collect()
}
