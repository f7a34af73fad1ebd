//! Which leader may speak: calls of an older controller epoch are refused, also after a restart.

use crate::files::{read_if_there, write_atomic};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Where a call came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The Unix socket: the blade's owner.
    Blade,
    /// mTLS: the controller.
    Controller,
}

/// A call may not be obeyed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The texts say it.
pub enum EpochError {
    #[error("epoch {asked} is older than {newest}: another controller leads")]
    Old { asked: u64, newest: u64 },
    #[error("epoch 0 passes on the blade's Unix socket only")]
    Zero,
    #[error("keeping epoch {epoch}: {source}")]
    Keep { epoch: u64, source: io::Error },
}

impl EpochError {
    pub(crate) fn to_status(&self) -> tonic::Status {
        match self {
            Self::Old { .. } | Self::Zero => tonic::Status::failed_precondition(self.to_string()),
            Self::Keep { .. } => tonic::Status::unavailable(self.to_string()),
        }
    }
}

/// The newest epoch seen, on disk.
#[derive(Debug)]
pub struct EpochGuard {
    path: PathBuf,
    newest: Mutex<u64>,
}

impl EpochGuard {
    /// Goes on from what is kept at `path`. Blocking.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let newest = match read_if_there(path)? {
            Some(text) => std::str::from_utf8(&text)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the epoch is not a number"))?,
            None => 0,
        };
        Ok(Self {
            path: path.to_owned(),
            newest: Mutex::new(newest),
        })
    }

    /// Lets a call pass, and remembers a newer epoch before it does. Blocking when it is newer.
    ///
    /// # Errors
    /// The epoch is old, or a newer one cannot be kept.
    pub fn check(&self, origin: Origin, epoch: u64) -> Result<(), EpochError> {
        if epoch == 0 {
            return match origin {
                Origin::Blade => Ok(()),
                Origin::Controller => Err(EpochError::Zero),
            };
        }
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if epoch < *newest {
            return Err(EpochError::Old {
                asked: epoch,
                newest: *newest,
            });
        }
        if epoch > *newest {
            write_atomic(&self.path, epoch.to_string().as_bytes())
                .map_err(|source| EpochError::Keep { epoch, source })?;
            *newest = epoch;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_epochs_are_refused_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("epoch");
        let guard = EpochGuard::open(&path).unwrap();
        assert!(guard.check(Origin::Controller, 0).is_err());
        assert!(guard.check(Origin::Blade, 0).is_ok());
        assert!(guard.check(Origin::Controller, 5).is_ok());
        let guard = EpochGuard::open(&path).unwrap();
        assert!(guard.check(Origin::Controller, 4).is_err());
        assert!(guard.check(Origin::Controller, 5).is_ok());
        assert!(guard.check(Origin::Blade, 0).is_ok());
    }
}
