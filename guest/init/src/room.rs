//! Room for what the payload writes: the limit of the layer over the image, and empty folders of their own. All of it is
//! the guest's memory, and gone with the microVM.

use crate::{
    files::broken_path_rule,
    mounts::{self, MountError},
    place::Place,
    rootfs::{Root, RootError, Symlinks},
};
use far_proto::guest::EmptyFolder;
use nix::mount::{MsFlags, mount};
use std::{
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

/// Most folders.
const MAX_FOLDERS: usize = 16;
/// Where nothing is said: a share of the guest's memory.
const DEFAULT_SIZE: &str = "50%";

/// Checked wishes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// MiB; 0: as it is.
    scratch_mib: u32,
    /// Parents before children.
    folders: Vec<(String, u32)>,
}

/// What is wrong with a wish, or why it cannot be fulfilled; the texts become the agent's `start_error`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RoomError {
    #[error("spec.volumes: {count}, at most {MAX_FOLDERS}")]
    TooMany { count: usize },
    #[error("spec.volumes: mountPath {path:?} {rule}")]
    Path { path: String, rule: &'static str },
    #[error("spec.volumes: mountPath {path:?} (no part of it may be a symlink of the image)")]
    Folder { path: String, source: RootError },
    #[error("spec.volumes: mountPath {path:?}")]
    Mount { path: String, source: MountError },
    #[error("spec.scratch.sizeLimit: {mib} MiB")]
    Scratch { mib: u32, source: nix::Error },
}

impl Room {
    /// # Errors
    /// [`RoomError`] of the first folder that cannot be.
    pub(crate) fn check(scratch_mib: u32, folders: Vec<EmptyFolder>) -> Result<Self, RoomError> {
        if folders.len() > MAX_FOLDERS {
            return Err(RoomError::TooMany { count: folders.len() });
        }
        let mut folders: Vec<_> = folders
            .into_iter()
            .map(|folder| (folder.path, folder.size_mib))
            .collect();
        folders.sort();
        for (index, (path, _)) in folders.iter().enumerate() {
            let is_twice = index > 0 && folders[index - 1].0 == *path;
            if let Some(rule) = broken_path_rule(path).or(is_twice.then_some("is listed twice")) {
                return Err(RoomError::Path {
                    path: path.clone(),
                    rule,
                });
            }
        }
        Ok(Self { scratch_mib, folders })
    }

    /// Before the payload's files are placed, which may lie in these folders.
    pub(crate) fn make(&self, place: &Place, root: &Root) -> Result<(), RoomError> {
        if self.scratch_mib > 0 {
            let (target, options) = (place.at("/far/scratch"), format!("size={}m", self.scratch_mib));
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NODEV;
            mount(None::<&str>, &target, None::<&str>, flags, Some(options.as_str())).map_err(|source| {
                RoomError::Scratch {
                    mib: self.scratch_mib,
                    source,
                }
            })?;
        }
        for (path, mib) in &self.folders {
            let folder = root.make_folders(Path::new(path), Symlinks::Refused);
            let folder = folder.map_err(|source| RoomError::Folder {
                path: path.clone(),
                source,
            })?;
            let size = match mib {
                0 => DEFAULT_SIZE.to_owned(),
                mib => format!("{mib}m"),
            };
            // By descriptor, so that the path is not walked a second time.
            let target = PathBuf::from(format!(
                "{}/{}",
                place.at("/proc/self/fd").display(),
                folder.as_raw_fd()
            ));
            let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
            let options = format!("mode=0777,size={size}");
            mounts::attach("tmpfs", "tmpfs", &target, flags, &options).map_err(|source| RoomError::Mount {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &str) -> EmptyFolder {
        EmptyFolder {
            path: path.into(),
            size_mib: 1,
        }
    }

    #[test]
    fn folders_come_parents_first_and_bad_ones_are_named() {
        let room = Room::check(0, vec![folder("/data/deep"), folder("/data"), folder("/a")]).unwrap();
        let paths: Vec<_> = room.folders.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(paths, ["/a", "/data", "/data/deep"]);
        for bad in [
            "", "/", "work", "/a/../b", "/a//b", "/proc/x", "/dev", "/sys/fs", "/a\0",
        ] {
            let error = Room::check(0, vec![folder(bad)]).unwrap_err();
            assert!(
                matches!(&error, RoomError::Path { path, .. } if path == bad),
                "{bad}: {error}"
            );
        }
        assert!(Room::check(0, vec![folder("/a"), folder("/b"), folder("/a")]).is_err());
        assert!(Room::check(0, vec![folder("/a"); 17]).is_err());
    }
}
