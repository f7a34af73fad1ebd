//! Says what an OCI image archive holds, checking each digest on the way. Reads [`crate::oci`]'s archives and other tools'.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    fs::File,
    io::Read,
    path::Path,
};

use serde::Serialize;
use serde_json::Value;

use crate::{BuildError, write};

/// Largest index, manifest or config; registries refuse manifests over 4 MiB.
const DOCUMENT_BYTES: u64 = 4 << 20;

/// An archive's images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order of the index.
    pub images: Vec<Image>,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Image {
    /// `sha256:…` of the manifest: the image's identity.
    pub digest: String,
    /// For example `linux/amd64`.
    pub platform: String,
    /// Lowest first.
    pub layers: Vec<Layer>,
    /// The config's `config`: entrypoint, environment and the like, as written.
    pub config: Value,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Of the blob.
    pub digest: String,
    /// As announced.
    pub media_type: String,
    /// Of the blob, in bytes.
    pub size: u64,
}

/// Reads the archive at `path`.
///
/// # Errors
/// [`BuildError`] naming the archive and what in it is missing, damaged or not understood.
pub fn inspect(path: &Path) -> Result<Report, BuildError> {
    let wrong = |what: String| BuildError::input(path, what);
    let documents = Documents::read(path)?;
    let index = documents
        .named
        .get("index.json")
        .ok_or_else(|| wrong("has no index.json: not an OCI image archive".into()))?;
    let index: Value = serde_json::from_slice(index).map_err(|error| wrong(format!("index.json: {error}")))?;
    let mut images = Vec::new();
    for descriptor in index["manifests"].as_array().into_iter().flatten() {
        let manifest = documents.json(descriptor).map_err(wrong)?;
        if manifest.get("manifests").is_some() {
            return Err(wrong(
                "holds an index inside its index: name one image when exporting".into(),
            ));
        }
        let config = documents.json(&manifest["config"]).map_err(wrong)?;
        let mut layers = Vec::new();
        for layer in manifest["layers"].as_array().into_iter().flatten() {
            let digest = text(&layer["digest"]);
            let size = *documents
                .sizes
                .get(&digest)
                .ok_or_else(|| wrong(format!("layer {digest} is missing")))?;
            layers.push(Layer {
                digest,
                media_type: text(&layer["mediaType"]),
                size,
            });
        }
        images.push(Image {
            digest: text(&descriptor["digest"]),
            platform: format!("{}/{}", text(&config["os"]), text(&config["architecture"])),
            layers,
            config: config["config"].clone(),
        });
    }
    Ok(Report { images })
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Small files by name, and the size of every blob by its digest.
struct Documents {
    named: BTreeMap<String, Vec<u8>>,
    sizes: BTreeMap<String, u64>,
}

impl Documents {
    fn read(path: &Path) -> Result<Self, BuildError> {
        let file = File::open(path).map_err(BuildError::io("opening", path))?;
        let broken = |error: std::io::Error| BuildError::input(path, format!("is not a readable tar file: {error}"));
        let mut documents = Self {
            named: BTreeMap::new(),
            sizes: BTreeMap::new(),
        };
        for entry in tar::Archive::new(file).entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            let name = String::from_utf8_lossy(&entry.path_bytes())
                .trim_start_matches("./")
                .to_owned();
            let size = entry.size();
            let mut bytes = Vec::new();
            if let Some(hex) = name.strip_prefix("blobs/sha256/") {
                // Large ones are layers: hashed in passing, not kept.
                let seen = if size <= DOCUMENT_BYTES {
                    entry.read_to_end(&mut bytes).map_err(broken)?;
                    write::sha256(&bytes)
                } else {
                    write::sha256_of(&mut entry).map_err(broken)?
                };
                if seen != hex {
                    return Err(BuildError::input(
                        path,
                        format!("blob sha256:{hex} has the digest sha256:{seen}"),
                    ));
                }
                documents.sizes.insert(format!("sha256:{hex}"), size);
            } else if size <= DOCUMENT_BYTES {
                entry.read_to_end(&mut bytes).map_err(broken)?;
            }
            // A small layer is kept as well: nothing tells it from a document before the manifest is read.
            let key = name
                .strip_prefix("blobs/sha256/")
                .map_or(name.clone(), |hex| format!("sha256:{hex}"));
            documents.named.insert(key, bytes);
        }
        Ok(documents)
    }

    fn json(&self, descriptor: &Value) -> Result<Value, String> {
        let digest = text(&descriptor["digest"]);
        let bytes = self
            .named
            .get(&digest)
            .ok_or_else(|| format!("blob {digest:?} is missing"))?;
        if descriptor["size"].as_u64() != self.sizes.get(&digest).copied() {
            return Err(format!("blob {digest} is not as long as its descriptor says"));
        }
        serde_json::from_slice(bytes).map_err(|error| format!("blob {digest}: {error}"))
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for image in &self.images {
            writeln!(f, "image   {} ({})", image.digest, image.platform)?;
            for layer in &image.layers {
                writeln!(f, "layer   {} {} bytes, {}", layer.digest, layer.size, layer.media_type)?;
            }
            for (key, value) in image.config.as_object().into_iter().flatten() {
                writeln!(f, "config  {key}: {value}")?;
            }
        }
        Ok(())
    }
}
