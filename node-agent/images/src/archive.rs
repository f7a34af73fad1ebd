//! Reads an image archive: a tar of an OCI image layout (image spec, image-layout.md).
//!
//! Entries come in any order, so the blobs are first copied beside the store, each under the digest it really has; then
//! index, manifest and config are followed by digest. A blob that is not what its name says is refused at once.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    ImageError, Limits,
    digest::{Digest, HashingWriter},
    entries::{self, Stop},
};

/// A descriptor (image spec, descriptor.md), as far as we use it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// The image's configuration, as far as a blade uses it (image spec, config.md).
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ConfigDocument {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) config: Option<RunConfig>,
    #[serde(default)]
    rootfs: RootFs,
}

#[derive(Debug, Default, Deserialize)]
struct RootFs {
    /// Digests of the unpacked layers, lowest first.
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// What to run by default. Docker writes `null` for absent lists.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct RunConfig {
    pub(crate) entrypoint: Option<Vec<String>>,
    pub(crate) cmd: Option<Vec<String>>,
    pub(crate) env: Option<Vec<String>>,
    pub(crate) working_dir: Option<String>,
    pub(crate) user: Option<String>,
}

/// One layer, on disk and checked.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) digest: Digest,
    /// Digest of the unpacked layer, to be checked by who unpacks it.
    pub(crate) diff_id: Digest,
    pub(crate) media_type: String,
    pub(crate) path: PathBuf,
}

/// A whole checked image.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) manifest: Digest,
    pub(crate) config: ConfigDocument,
    pub(crate) layers: Vec<Layer>,
}

/// Reads the archive; blobs are kept in `folder` until the caller removes it.
pub(crate) fn open(archive: impl Read, folder: &Path, limits: &Limits) -> Result<Opened, ImageError> {
    let spooled = spool(archive, folder, limits)?;
    let manifest_descriptor = choose(&spooled, limits)?;
    let manifest_digest = Digest::parse(&manifest_descriptor.digest)?;
    let manifest: Manifest = spooled.document("manifest", &manifest_descriptor, limits)?;
    let config: ConfigDocument = spooled.document("config", &manifest.config, limits)?;
    if (config.os.as_str(), config.architecture.as_str()) != ("linux", architecture()) {
        return Err(ImageError::Archive {
            what: format!(
                "the image is for {}/{}, this blade is linux/{}",
                config.os,
                config.architecture,
                architecture()
            ),
        });
    }
    let diff_ids = &config.rootfs.diff_ids;
    if manifest.layers.len() != diff_ids.len() {
        let (layers, ids) = (manifest.layers.len(), diff_ids.len());
        return Err(ImageError::Archive {
            what: format!("its manifest has {layers} layers, its config describes {ids} (rootfs.diff_ids)"),
        });
    }
    let layers = manifest
        .layers
        .into_iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            let digest = Digest::parse(&layer.digest)?;
            let path = spooled.blob("layer", &layer)?;
            Ok(Layer {
                digest,
                diff_id: Digest::parse(diff_id)?,
                media_type: layer.media_type,
                path,
            })
        })
        .collect::<Result<_, ImageError>>()?;
    Ok(Opened {
        manifest: manifest_digest,
        config,
        layers,
    })
}

/// GOARCH word of this machine, as images use it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

struct Spooled {
    index: Vec<u8>,
    folder: PathBuf,
    sizes: BTreeMap<Digest, u64>,
}

impl Spooled {
    /// Copies a blob beside the store, checked against its name.
    fn take_blob(&mut self, hex: &str, content: &mut dyn Read) -> Result<(), ImageError> {
        let wanted = Digest::parse(&format!("sha256:{hex}"))?;
        let target = self.folder.join(wanted.hex());
        let file = File::create(&target).map_err(ImageError::io("creating", &target))?;
        let mut writer = HashingWriter::new(file);
        let size = io::copy(content, &mut writer).map_err(ImageError::io("writing", &target))?;
        let (_, seen) = writer.finish();
        if seen != wanted {
            return Err(ImageError::Mismatch {
                object: format!("blob {wanted}"),
                field: "digest",
                seen: seen.to_string(),
                wanted: wanted.to_string(),
            });
        }
        self.sizes.insert(wanted, size);
        Ok(())
    }

    /// The file of a blob, when it is there and has the announced size. Its digest was checked when it was written.
    fn blob(&self, what: &str, descriptor: &Descriptor) -> Result<PathBuf, ImageError> {
        let digest = Digest::parse(&descriptor.digest)?;
        let size = self.sizes.get(&digest).ok_or_else(|| ImageError::Archive {
            what: format!("{what} {digest} is missing"),
        })?;
        if *size != descriptor.size {
            return Err(ImageError::Mismatch {
                object: format!("{what} {digest}"),
                field: "size",
                seen: size.to_string(),
                wanted: descriptor.size.to_string(),
            });
        }
        Ok(self.folder.join(digest.hex()))
    }

    fn document<T: for<'de> Deserialize<'de>>(
        &self,
        what: &str,
        descriptor: &Descriptor,
        limits: &Limits,
    ) -> Result<T, ImageError> {
        if descriptor.size > limits.document_bytes {
            return Err(ImageError::TooLarge {
                what: "a manifest or config",
                limit: limits.document_bytes,
            });
        }
        let path = self.blob(what, descriptor)?;
        let bytes = std::fs::read(&path).map_err(ImageError::io("reading", path))?;
        parse(what, &bytes)
    }
}

fn parse<T: for<'de> Deserialize<'de>>(what: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::Archive {
        what: format!("{what} is not readable: {error}"),
    })
}

/// Copies the blobs beside the store, each checked against its name.
fn spool(archive: impl Read, folder: &Path, limits: &Limits) -> Result<Spooled, ImageError> {
    let mut spooled = Spooled {
        index: Vec::new(),
        folder: folder.to_path_buf(),
        sizes: BTreeMap::new(),
    };
    let mut left = limits.archive_bytes;
    let mut count = 0;
    let broken = |error: io::Error| ImageError::Archive {
        what: format!("not a readable tar file: {error}"),
    };
    entries::each(archive, |item, content| {
        count += 1;
        if count > limits.entries {
            return Err(ImageError::TooLarge {
                what: "the number of entries",
                limit: limits.entries as u64,
            });
        }
        let name = String::from_utf8_lossy(&item.path).trim_start_matches("./").to_owned();
        left = left.checked_sub(item.size).ok_or(ImageError::TooLarge {
            what: "the archive",
            limit: limits.archive_bytes,
        })?;
        if name == "index.json" {
            if item.size > limits.document_bytes {
                return Err(ImageError::TooLarge {
                    what: "index.json",
                    limit: limits.document_bytes,
                });
            }
            spooled.index.clear();
            content.read_to_end(&mut spooled.index).map_err(broken)?;
        } else if let Some(hex) = name.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
            spooled.take_blob(hex, content)?;
        }
        Ok(())
    })
    .map_err(|stop| match stop {
        Stop::Stream(error) => broken(error),
        Stop::Header { path, why } => ImageError::Archive {
            what: format!("entry {:?} {why}", String::from_utf8_lossy(&path)),
        },
        Stop::Visitor(error) => error,
    })?;
    if spooled.index.is_empty() {
        return Err(ImageError::Archive {
            what: "it has no index.json: not an OCI image layout".into(),
        });
    }
    Ok(spooled)
}

/// The one manifest for this machine; an index inside the index is followed once.
fn choose(spooled: &Spooled, limits: &Limits) -> Result<Descriptor, ImageError> {
    let index: Index = parse("index.json", &spooled.index)?;
    let mut candidates = Vec::new();
    for descriptor in index.manifests {
        if descriptor.media_type.ends_with(".index.v1+json")
            || descriptor.media_type.ends_with(".manifest.list.v2+json")
        {
            let inner: Index = spooled.document("index", &descriptor, limits)?;
            candidates.extend(inner.manifests);
        } else {
            candidates.push(descriptor);
        }
    }
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform
            .as_ref()
            .is_none_or(|platform| platform.os == "linux" && platform.architecture == architecture())
    };
    let mut fitting = candidates.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(one), None) => Ok(one.clone()),
        (None, _) => Err(ImageError::Archive {
            what: format!("it has no image for linux/{}", architecture()),
        }),
        (Some(_), Some(_)) => Err(ImageError::Archive {
            what: "it has more than one image for this machine: save one image per archive".into(),
        }),
    }
}
