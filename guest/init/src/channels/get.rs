//! Files and folders on their way out of the payload's root, one entry or piece at a time. The payload may change what is
//! read meanwhile: every file is looked at again after it was opened, and nothing is opened through a symlink.

use super::{Problem, flow::Allowance, put::of_errno};
use crate::{
    files::broken_path_rule,
    plan::MAX_PATH,
    rootfs::{Root, Symlinks},
    spawn::errno_of,
};
use far_proto::{
    frame,
    guest::{ChannelEnd, Data, ErrorKind, Get, TransferEntry, TransferKind, guest_message::Kind as Say},
};
use nix::{
    dir::{Dir, OwningIter},
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat, fstatat},
        statfs::fstatfs,
    },
};
use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

/// Folders below the path.
const MAX_DEPTH: usize = 64;
/// Longest piece that is read at once, bytes.
const PIECE: usize = 16 << 10;
/// Most names that are looked at in one turn: a folder of devices must not hold PID 1.
const LOOKS: usize = 64;
/// File systems of the kernel (linux/magic.h): proc, sysfs, cgroup2, debugfs, tracefs, securityfs. Their files may block,
/// act when read, or never end.
const KERNEL_FILE_SYSTEMS: [i64; 6] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x6462_6720, 0x7472_6163, 0x7363_6673];

/// A transfer out of the guest.
pub(crate) struct Sender {
    channel: u32,
    pub(crate) allowance: Allowance,
    /// Waits for credit.
    entry: Option<TransferEntry>,
    file: Option<File>,
    folders: Vec<Folder>,
    files: u64,
    bytes: u64,
    skipped: u64,
    is_over: bool,
}

struct Folder {
    fd: OwnedFd,
    names: OwningIter,
    /// Below the transfer's path; empty: the path itself.
    path: String,
}

impl Sender {
    pub(crate) fn new(get: &Get, root: &Root) -> Result<Self, Problem> {
        let mut sender = Self {
            channel: get.channel,
            allowance: Allowance::new(),
            entry: None,
            file: None,
            folders: Vec::new(),
            files: 0,
            bytes: 0,
            skipped: 0,
            is_over: false,
        };
        if get.path != "/"
            && let Some(rule) = broken_path_rule(&get.path)
        {
            return Err(Problem::new(ErrorKind::Refused, ["the path ", rule].concat()));
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let fd = root
            .open(Path::new(&get.path), OFlag::O_PATH, Mode::empty(), Symlinks::InsideRoot)
            .and_then(|found| match fstat(&found).map(|stat| kind(&stat))? {
                SFlag::S_IFREG | SFlag::S_IFDIR => {
                    root.open(Path::new(&get.path), flags, Mode::empty(), Symlinks::InsideRoot)
                }
                _ => Err(Errno::EPERM),
            })
            .map_err(|errno| of_errno(errno).at(&get.path))?;
        match sender.take_up(fd, String::new()) {
            Ok(true) => Ok(sender),
            Ok(false) => Err(Problem::new(
                ErrorKind::Refused,
                "neither a file nor a folder of the agent".into(),
            )),
            Err(errno) => Err(of_errno(errno).at(&get.path)),
        }
    }

    /// An open file or folder becomes the next entry; `false`: it is neither, or the kernel's.
    fn take_up(&mut self, fd: OwnedFd, path: String) -> nix::Result<bool> {
        let stat = fstat(&fd)?;
        let its = fstatfs(&fd)?.filesystem_type().0;
        let kind = match kind(&stat) {
            _ if KERNEL_FILE_SYSTEMS.contains(&its) => return Ok(false),
            SFlag::S_IFREG => TransferKind::File,
            SFlag::S_IFDIR if self.folders.len() < MAX_DEPTH => TransferKind::Folder,
            _ => return Ok(false),
        };
        self.entry = Some(self.describe(kind, &stat, path.clone()));
        if kind == TransferKind::File {
            self.file = Some(File::from(fd));
        } else {
            let names = fd.try_clone().map_err(|error| errno_of(&error))?;
            let names = Dir::from_fd(names)?.into_iter();
            self.folders.push(Folder { fd, names, path });
        }
        Ok(true)
    }

    fn describe(&self, kind: TransferKind, stat: &FileStat, path: String) -> TransferEntry {
        TransferEntry {
            channel: self.channel,
            kind: kind.into(),
            path,
            mode: if kind == TransferKind::Symlink {
                0
            } else {
                stat.st_mode & 0o777
            },
            size: if kind == TransferKind::File {
                u64::try_from(stat.st_size).unwrap_or(0)
            } else {
                0
            },
            target: String::new(),
            modified_unix_s: stat.st_mtime,
        }
    }

    /// Whether [`Self::next`] could do something now.
    pub(crate) fn has_work(&self) -> bool {
        match &self.entry {
            Some(entry) => frame::length_of(entry) <= self.allowance.left(),
            None => self.file.is_none() || self.allowance.left() > 0,
        }
    }

    pub(crate) fn next(&mut self) -> Option<Say> {
        if !self.has_work() || self.is_over {
            return None;
        }
        if let Some(entry) = self.entry.take() {
            self.allowance.spend(frame::length_of(&entry));
            self.files += u64::from(entry.kind() != TransferKind::Folder);
            return Some(Say::TransferEntry(entry));
        }
        if let Some(file) = &mut self.file {
            let mut data = vec![0; self.allowance.left().min(PIECE)];
            // An error in the middle ends the file like its end does: the entry's size shows what is missing.
            let (count, broken) = match file.read(&mut data) {
                Ok(count) => (count, None),
                Err(error) => (0, Some(errno_of(&error))),
            };
            data.truncate(count);
            self.allowance.spend(count);
            self.bytes += count as u64;
            if let Some(errno) = broken {
                self.is_over = true;
                return Some(Say::ChannelEnd(of_errno(errno).end(self.channel)));
            }
            if count == 0 {
                self.file = None;
            }
            return Some(Say::Data(Data {
                channel: self.channel,
                stream: 0,
                data,
                last: count == 0,
            }));
        }
        for _ in 0..LOOKS {
            if !self.look() {
                self.is_over = true;
                return Some(Say::ChannelEnd(self.summary()));
            }
            if self.entry.is_some() {
                return self.next();
            }
        }
        None
    }

    /// Looks at the next name; `false`: there is none left.
    fn look(&mut self) -> bool {
        let Some(folder) = self.folders.last_mut() else {
            return false;
        };
        let Some(Ok(name)) = folder.names.next() else {
            self.folders.pop();
            return true;
        };
        let name = name.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            return true;
        }
        let fd = folder.fd.as_fd();
        let found = name
            .to_str()
            .ok()
            .filter(|text| folder.path.len() + text.len() < MAX_PATH)
            .and_then(|text| {
                let path = match folder.path.as_str() {
                    "" => text.to_owned(),
                    parent => [parent, text].join("/"),
                };
                let stat = fstatat(fd, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
                Some((path, stat))
            });
        let Some((path, stat)) = found else {
            self.skipped += 1;
            return true;
        };
        let taken = match kind(&stat) {
            SFlag::S_IFLNK => readlinkat(fd, name)
                .ok()
                .and_then(|target| target.into_string().ok())
                .map(|target| {
                    self.entry = Some(TransferEntry {
                        target,
                        ..self.describe(TransferKind::Symlink, &stat, path)
                    });
                }),
            SFlag::S_IFREG | SFlag::S_IFDIR => {
                let flags =
                    OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                openat(fd, name, flags, Mode::empty())
                    .and_then(|fd| self.take_up(fd, path))
                    .ok()
                    .filter(|&taken| taken)
                    .map(drop)
            }
            _ => None,
        };
        self.skipped += u64::from(taken.is_none());
        true
    }

    /// What was sent so far.
    pub(crate) fn summary(&self) -> ChannelEnd {
        ChannelEnd {
            channel: self.channel,
            files: self.files,
            bytes: self.bytes,
            skipped: self.skipped,
            ..ChannelEnd::default()
        }
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}
