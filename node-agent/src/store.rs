//! The real [`Images`]: far-images behind the node agent's words.

use crate::host::{ImageFault, ImageSettings, Images, ReadyImage, StoredImage};
use far_images::{Image, ImageError, ImageStore};
use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
};

/// The blade's images in a folder.
#[derive(Debug)]
pub struct Store {
    images: ImageStore,
    incoming: PathBuf,
}

impl Store {
    /// Opens or makes the store. Blocking.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let incoming = folder.join("incoming");
        // Archives whose upload a crash cut off.
        crate::files::remove_dir(&incoming)?;
        crate::files::make_private_dir(&incoming)?;
        Ok(Self {
            images: ImageStore::open(folder.join("store"))?,
            incoming,
        })
    }
}

fn fault(error: ImageError) -> ImageFault {
    match error {
        ImageError::Unknown { reference } => ImageFault::Unknown { reference },
        error if error.is_the_images_fault() => ImageFault::Bad { message: chain(&error) },
        error => ImageFault::Store { message: chain(&error) },
    }
}

/// An error with its causes, for one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn stored(image: Image) -> StoredImage {
    StoredImage {
        digest: image.digest,
        references: image.references,
        size_bytes: image.size_bytes,
    }
}

impl Images for Store {
    fn prepare(&self, reference: &str) -> Result<ReadyImage, ImageFault> {
        let image = self.images.resolve(reference).map_err(fault)?;
        let config = image.config;
        Ok(ReadyImage {
            digest: image.digest,
            rootfs: image.rootfs,
            settings: ImageSettings {
                entrypoint: config.entrypoint,
                cmd: config.cmd,
                env: config.env,
                working_dir: config.working_dir,
                user: config.user,
            },
        })
    }

    fn has_files(&self, image: &ReadyImage, paths: &[String]) -> Option<Vec<bool>> {
        self.images.may_have_programs(&image.digest, paths).ok()
    }

    fn list(&self) -> Result<Vec<StoredImage>, ImageFault> {
        Ok(self.images.list().map_err(fault)?.into_iter().map(stored).collect())
    }

    fn load(&self, reference: &str, archive: &Path) -> Result<StoredImage, ImageFault> {
        let file = File::open(archive).map_err(|error| ImageFault::Store {
            message: format!("opening the received archive {}: {error}", archive.display()),
        })?;
        self.images.load_archive(file, reference).map(stored).map_err(fault)
    }

    fn remove(&self, reference: &str) -> Result<(), ImageFault> {
        self.images.remove(reference).map_err(fault)
    }

    fn collect(&self, in_use: &BTreeSet<String>) -> Result<(), ImageFault> {
        self.images.collect(in_use).map_err(fault)
    }

    fn incoming(&self) -> PathBuf {
        self.incoming.clone()
    }
}
