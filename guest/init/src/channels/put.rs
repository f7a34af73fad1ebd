//! Files and folders on their way into the payload's root. The payload runs meanwhile and may be hostile: every folder is
//! reached without symlinks inside the root, and then only single names are used in it.

use super::{Problem, flow::Grant};
use crate::{
    files::broken_path_rule,
    plan::MAX_PATH,
    rootfs::{Root, RootError, Symlinks},
    spawn::errno_of,
    users::User,
};
use far_proto::guest::{ChannelEnd, Credit, ErrorKind, Put, TransferEntry, TransferKind};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, renameat},
    sys::{
        stat::{Mode, fchmod, futimens, mkdirat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat},
};
use std::{fs::File, io::Write, os::fd::OwnedFd, path::Path};

/// A transfer into the guest.
pub(crate) struct Receiver {
    base: String,
    name_in_folder: String,
    started: bool,
    /// Numbers the temporary names.
    serial: u64,
    channel: u32,
    current: Option<Current>,
    grant: Grant,
    files: u64,
    bytes: u64,
    is_complete: bool,
}

/// A file that is not whole yet, under a temporary name. Dropped: removed.
struct Current {
    folder: OwnedFd,
    temporary: String,
    name: String,
    file: File,
    mode: u32,
    modified_unix_s: i64,
    is_placed: bool,
}

impl Drop for Current {
    fn drop(&mut self) {
        if !self.is_placed {
            // Somebody else may have removed it: that is what was wanted.
            let _ = unlinkat(&self.folder, self.temporary.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

impl Receiver {
    pub(crate) fn new(put: Put) -> Result<Self, Problem> {
        check(&put.path)?;
        let name = &put.name_in_folder;
        if name.len() > 255 || name.contains(['/', '\0']) || matches!(name.as_str(), "." | "..") {
            return Err(Problem::invalid("name_in_folder is not a single name"));
        }
        Ok(Self {
            base: put.path,
            name_in_folder: put.name_in_folder,
            started: false,
            serial: 0,
            channel: put.channel,
            current: None,
            grant: Grant::new(),
            files: 0,
            bytes: 0,
            is_complete: false,
        })
    }

    /// The next file, folder or symlink, or the end of all.
    pub(crate) fn enter(&mut self, root: &Root, owner: &User, entry: TransferEntry) -> Result<(), Problem> {
        let cost = prost_len(&entry);
        self.grant.take(cost)?;
        self.grant.consume(cost);
        if self.current.is_some() {
            return Err(Problem::invalid("an entry before the file before it was whole"));
        }
        if entry.kind() == TransferKind::End {
            self.is_complete = true;
            return Ok(());
        }
        if self.is_complete {
            return Err(Problem::invalid("an entry after the end"));
        }
        if entry.mode > 0o777 {
            return Err(Problem::invalid("mode is more than 0777"));
        }
        if !self.started {
            self.started = true;
            let into = !self.name_in_folder.is_empty() && is_folder(root, &self.base);
            if into {
                if !self.base.ends_with('/') {
                    self.base.push('/');
                }
                self.base.push_str(&self.name_in_folder);
            }
            if !entry.path.is_empty() {
                return Err(Problem::invalid("the first entry has a path"));
            }
        } else if entry.path.is_empty() {
            return Err(Problem::invalid("a later entry has no path"));
        }
        let path = match entry.path.as_str() {
            "" => self.base.clone(),
            path => [self.base.as_str(), path].join(if self.base.ends_with('/') { "" } else { "/" }),
        };
        self.place(root, owner, &path, entry)
            .map_err(|problem| problem.at(&path))
    }

    fn place(&mut self, root: &Root, owner: &User, path: &str, entry: TransferEntry) -> Result<(), Problem> {
        if path == "/" && entry.kind() == TransferKind::Folder {
            return Ok(());
        }
        check(path)?;
        let path = Path::new(path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            return Err(Problem::invalid("a path has no name"));
        };
        let folder = root.make_folders(parent, Symlinks::Refused).map_err(of_root)?;
        let (uid, gid) = (Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)));
        let mode = Mode::from_bits_truncate(entry.mode);
        self.serial += 1;
        let temporary = format!(".far-put-{}-{}", self.channel, self.serial);
        match entry.kind() {
            TransferKind::File => {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let fd = openat(&folder, temporary.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(of_errno)?;
                let current = Current {
                    folder,
                    temporary,
                    name: name.into(),
                    file: File::from(fd),
                    mode: entry.mode,
                    modified_unix_s: entry.modified_unix_s,
                    is_placed: false,
                };
                fchown(&current.file, uid, gid).map_err(of_errno)?;
                self.current = Some(current);
            }
            TransferKind::Folder => match mkdirat(&folder, name, mode) {
                Ok(()) => {
                    fchownat(&folder, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(of_errno)?;
                    // After mkdir: the process's mask would cut it. A symlink that was planted in between is refused.
                    if let Ok(fd) = root.open(
                        path,
                        OFlag::O_RDONLY | OFlag::O_DIRECTORY,
                        Mode::empty(),
                        Symlinks::Refused,
                    ) {
                        fchmod(&fd, mode).map_err(of_errno)?;
                    }
                }
                Err(Errno::EEXIST) if is_folder(root, &path.to_string_lossy()) => {}
                Err(errno) => return Err(of_errno(errno)),
            },
            TransferKind::Symlink => {
                if entry.target.is_empty() || entry.target.len() > MAX_PATH || entry.target.contains('\0') {
                    return Err(Problem::invalid(
                        "a symlink's target is empty, too long or has a NUL byte",
                    ));
                }
                symlinkat(entry.target.as_str(), &folder, temporary.as_str()).map_err(of_errno)?;
                let placed = fchownat(&folder, temporary.as_str(), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)
                    .and_then(|()| renameat(&folder, temporary.as_str(), &folder, name));
                if let Err(errno) = placed {
                    let _ = unlinkat(&folder, temporary.as_str(), UnlinkatFlags::NoRemoveDir);
                    return Err(of_errno(errno));
                }
                self.files += 1;
            }
            TransferKind::End | TransferKind::Unspecified => return Err(Problem::invalid("an entry of no kind")),
        }
        Ok(())
    }

    pub(crate) fn take(&mut self, data: &[u8], last: bool) -> Result<(), Problem> {
        self.grant.take(data.len())?;
        self.grant.consume(data.len());
        let Some(current) = &mut self.current else {
            return Err(Problem::invalid("Data without a file"));
        };
        current
            .file
            .write_all(data)
            .map_err(|error| of_errno(errno_of(&error)))?;
        self.bytes += data.len() as u64;
        if last && let Some(mut current) = self.current.take() {
            current.finish().map_err(of_errno)?;
            self.files += 1;
        }
        Ok(())
    }

    pub(crate) fn credit(&mut self) -> Option<Credit> {
        Some(Credit {
            channel: self.channel,
            stream: 0,
            bytes: self.grant.due()?,
        })
    }

    pub(crate) fn end(&self) -> Option<ChannelEnd> {
        self.is_complete.then(|| self.summary())
    }

    /// What is in place so far.
    pub(crate) fn summary(&self) -> ChannelEnd {
        ChannelEnd {
            channel: self.channel,
            files: self.files,
            bytes: self.bytes,
            ..ChannelEnd::default()
        }
    }
}

impl Current {
    fn finish(&mut self) -> nix::Result<()> {
        fchmod(&self.file, Mode::from_bits_truncate(self.mode))?;
        if self.modified_unix_s > 0 {
            let time = TimeSpec::new(self.modified_unix_s, 0);
            futimens(&self.file, &time, &time)?;
        }
        renameat(&self.folder, self.temporary.as_str(), &self.folder, self.name.as_str())?;
        self.is_placed = true;
        Ok(())
    }
}

fn prost_len(entry: &TransferEntry) -> usize {
    far_proto::frame::length_of(entry)
}

/// The rule for every path of a transfer; "/" alone is fine as the base.
fn check(path: &str) -> Result<(), Problem> {
    match broken_path_rule(path) {
        Some(_) if path == "/" => Ok(()),
        Some(rule) => Err(Problem::new(ErrorKind::Refused, ["the path ", rule].concat())),
        None => Ok(()),
    }
}

fn is_folder(root: &Root, path: &str) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    root.open(Path::new(path), flags, Mode::empty(), Symlinks::Refused)
        .is_ok()
}

fn of_root(error: RootError) -> Problem {
    match error {
        RootError::Open { source, .. } | RootError::Folder { source, .. } => of_errno(source),
        other => Problem::new(ErrorKind::Failed, crate::power::with_sources(&other)),
    }
}

pub(super) fn of_errno(errno: Errno) -> Problem {
    match errno {
        Errno::ELOOP => Problem::new(ErrorKind::Refused, "a part of the path is a symlink".into()),
        Errno::EXDEV | Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::EBUSY => {
            Problem::new(ErrorKind::Refused, errno.desc().into())
        }
        Errno::ENOENT => Problem::new(ErrorKind::NotFound, errno.desc().into()),
        errno => Problem::new(ErrorKind::Failed, errno.desc().into()),
    }
}
