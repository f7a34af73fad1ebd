//! The VM's folder: locked by one far-vmm, booted at most once, and the VM's leash: without it far-vmm goes.

use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Lies in a VM's folder once far-vmm was about to boot it, whatever became of that.
pub const BOOT_MARKER: &str = "booted";

/// Why a folder cannot be used for a boot.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It cannot be opened.
    #[error("opening the folder of {path}")]
    Open {
        /// The description.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another far-vmm has it.
    #[error("another far-vmm runs the VM in {folder}")]
    Taken {
        /// The folder.
        folder: PathBuf,
    },
    /// The VM ended.
    #[error("refusing to boot: {exit_file} says that this VM has ended; a finished VM is never booted again")]
    Ended {
        /// The record.
        exit_file: PathBuf,
    },
    /// The VM was started before and left no record of its end.
    #[error("refusing to boot: {marker} says that this VM was booted before; each boot needs a new folder")]
    Booted {
        /// The marker.
        marker: PathBuf,
    },
    /// The marker cannot be looked at.
    #[error("looking for {path}")]
    Look {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A locked folder. The lock goes with the process.
#[derive(Debug)]
pub(crate) struct VmFolder {
    path: PathBuf,
    config_name: PathBuf,
    lock: Flock<File>,
    identity: (u64, u64),
}

impl VmFolder {
    pub(crate) fn lock(config_file: &Path) -> Result<Self, FolderError> {
        let at = |source| FolderError::Open {
            path: config_file.to_owned(),
            source,
        };
        let config = config_file.canonicalize().map_err(at)?;
        let (Some(path), Some(name)) = (config.parent(), config.file_name()) else {
            return Err(at(io::Error::from(io::ErrorKind::InvalidInput)));
        };
        let file = File::open(path).map_err(at)?;
        let data = file.metadata().map_err(at)?;
        let taken = || FolderError::Taken {
            folder: path.to_owned(),
        };
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::errno::Errno::EWOULDBLOCK => taken(),
            other => at(other.into()),
        })?;
        Ok(Self {
            path: path.to_owned(),
            config_name: name.into(),
            lock,
            identity: (data.dev(), data.ino()),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn config_file(&self) -> PathBuf {
        self.path.join(&self.config_name)
    }

    pub(crate) fn refuse_second_boot(&self, exit_file: &Path) -> Result<(), FolderError> {
        let marker = self.path.join(BOOT_MARKER);
        let exists = |path: &Path| {
            path.try_exists().map_err(|source| FolderError::Look {
                path: path.to_owned(),
                source,
            })
        };
        if exists(exit_file)? {
            return Err(FolderError::Ended {
                exit_file: exit_file.to_owned(),
            });
        }
        if exists(&marker)? {
            return Err(FolderError::Booted { marker });
        }
        Ok(())
    }

    /// Writes the marker so that it outlives a crash of the machine.
    pub(crate) fn mark_booted(&self) -> io::Result<()> {
        let path = self.path.join(BOOT_MARKER);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        writeln!(file, "{}", std::process::id())?;
        file.sync_all()?;
        self.lock.sync_all()
    }

    /// False once the folder was removed, or is another one under the same name.
    pub(crate) fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|data| (data.dev(), data.ino()) == self.identity)
    }
}
