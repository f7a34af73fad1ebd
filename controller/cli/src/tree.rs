//! A file or folder of this machine as the entries of a copy, and entries written to this machine.
//!
//! What comes out of an agent is hostile until proven otherwise. Invariant: nothing is written outside of the
//! destination: each entry's folder was made (or found as a folder, not as a symlink) by this same copy, no path comes
//! twice, and files are written beside and renamed, so that a symlink in their place is replaced and never followed.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use far_proto::node::{CopyEntry, CopyKind, Piece, copy_in_request::Kind};

use crate::cp::shown;

/// Bytes of a file read at once.
const STEP: usize = 64 << 10;
/// Entries of one copy that this machine takes: what is kept of each is its path.
const MAX_ENTRIES: usize = 1_000_000;
/// Folders in each other; the agent's side reads no deeper either.
const MAX_DEPTH: usize = 64;
/// Permission bits.
const MODE: u32 = 0o777;

/// Reads a tree as the messages of a CopyIn: parents before their children, in order of names.
#[derive(Debug)]
pub(crate) struct Reader {
    root: PathBuf,
    /// Still to come, the next one last: path below the root, depth.
    waiting: Vec<(String, usize)>,
    file: Option<(String, File)>,
    skipped: u64,
    has_ended: bool,
}

impl Reader {
    pub(crate) fn open(root: &Path) -> anyhow::Result<Self> {
        // A symlink that is named is followed; those below are copied as they are.
        let root = fs::canonicalize(root).with_context(|| format!("reading {}", root.display()))?;
        Ok(Self {
            root,
            waiting: vec![(String::new(), 0)],
            file: None,
            skipped: 0,
            has_ended: false,
        })
    }

    /// The root's own name.
    pub(crate) fn name(&self) -> anyhow::Result<String> {
        match self.root.file_name() {
            None => Ok(String::new()),
            Some(name) => name
                .to_str()
                .map(str::to_owned)
                .with_context(|| format!("the name of {} is not UTF-8", self.root.display())),
        }
    }

    /// What is neither file, folder nor symlink, and was left out.
    pub(crate) fn skipped(&self) -> u64 {
        self.skipped
    }

    fn path_of(&self, below: &str) -> PathBuf {
        if below.is_empty() {
            self.root.clone()
        } else {
            self.root.join(below)
        }
    }

    /// The next message; `None` after the end.
    pub(crate) fn next(&mut self) -> anyhow::Result<Option<Kind>> {
        if let Some((below, file)) = &mut self.file {
            let mut data = vec![0; STEP];
            let length = loop {
                match file.read(&mut data) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => break read.with_context(|| format!("reading {}", self.root.join(below).display()))?,
                }
            };
            data.truncate(length);
            let last = length == 0;
            if last {
                self.file = None;
            }
            return Ok(Some(Kind::Data(Piece { data, last })));
        }
        while let Some((below, depth)) = self.waiting.pop() {
            if let Some(entry) = self.enter(below, depth)? {
                return Ok(Some(Kind::Entry(entry)));
            }
        }
        if self.has_ended {
            return Ok(None);
        }
        self.has_ended = true;
        Ok(Some(Kind::Entry(CopyEntry {
            kind: CopyKind::End.into(),
            ..CopyEntry::default()
        })))
    }

    fn enter(&mut self, below: String, depth: usize) -> anyhow::Result<Option<CopyEntry>> {
        let path = self.path_of(&below);
        let reading = || format!("reading {}", path.display());
        let found = fs::symlink_metadata(&path).with_context(reading)?;
        let mut entry = CopyEntry {
            path: below.clone(),
            mode: found.permissions().mode() & MODE,
            modified_unix_s: found
                .modified()
                .ok()
                .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
                .and_then(|since| i64::try_from(since.as_secs()).ok())
                .unwrap_or(0),
            ..CopyEntry::default()
        };
        if found.is_symlink() {
            let target = fs::read_link(&path).with_context(reading)?;
            let Some(target) = target.to_str() else {
                bail!("{} leads to a path that is not UTF-8", path.display());
            };
            entry.kind = CopyKind::Symlink.into();
            entry.mode = 0;
            target.clone_into(&mut entry.target);
        } else if found.is_dir() {
            if depth >= MAX_DEPTH {
                bail!("{} lies deeper than {MAX_DEPTH} folders", path.display());
            }
            entry.kind = CopyKind::Folder.into();
            let mut names = Vec::new();
            for child in fs::read_dir(&path).with_context(reading)? {
                let name = child.with_context(reading)?.file_name();
                let Some(name) = name.to_str() else {
                    bail!("{} is not UTF-8", path.join(&name).display());
                };
                names.push(if below.is_empty() {
                    name.to_owned()
                } else {
                    format!("{below}/{name}")
                });
            }
            names.sort_unstable_by(|a, b| b.cmp(a));
            self.waiting.extend(names.into_iter().map(|name| (name, depth + 1)));
        } else if found.is_file() {
            // Without following: it may have become a symlink since the look.
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .with_context(reading)?;
            entry.kind = CopyKind::File.into();
            entry.size = found.len();
            self.file = Some((below, file));
        } else {
            if below.is_empty() {
                bail!("{} is neither a file nor a folder", path.display());
            }
            self.skipped += 1;
            return Ok(None);
        }
        Ok(Some(entry))
    }
}

/// Writes the entries of a CopyOut below one path.
#[derive(Debug)]
pub(crate) struct Writer {
    to: PathBuf,
    /// Where the first entry goes, known with it.
    root: Option<PathBuf>,
    /// Every path that came.
    seen: HashSet<String>,
    /// Folders that may hold entries, with the mode they get at the end: until then they must be writable.
    folders: Vec<(String, u32)>,
    is_folder: HashSet<String>,
    file: Option<Open>,
}

#[derive(Debug)]
struct Open {
    file: File,
    beside: PathBuf,
    path: PathBuf,
    mode: u32,
    modified: Option<SystemTime>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // Renamed away where the file is whole.
        let _ = fs::remove_file(&self.beside);
    }
}

impl Writer {
    /// `name`: the source's own, used where `to` is a folder.
    pub(crate) fn new(to: PathBuf, name: &str) -> Self {
        let is_name = !matches!(name, "" | "." | "..") && !name.contains('/');
        let to = if to.is_dir() && is_name { to.join(name) } else { to };
        Self {
            to,
            root: None,
            seen: HashSet::new(),
            folders: Vec::new(),
            is_folder: HashSet::new(),
            file: None,
        }
    }

    pub(crate) fn entry(&mut self, entry: &CopyEntry) -> anyhow::Result<()> {
        if self.file.is_some() {
            bail!("the agent began {:?} inside of another file", shown(&entry.path));
        }
        self.check(&entry.path)?;
        let path = match &self.root {
            None => {
                self.root = Some(self.to.clone());
                self.to.clone()
            }
            Some(root) => root.join(&entry.path),
        };
        let writing = || format!("writing {}", path.display());
        match entry.kind() {
            CopyKind::Folder => {
                match fs::create_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        // What was named is followed; below it, nothing is.
                        let found = if entry.path.is_empty() {
                            fs::metadata(&path)
                        } else {
                            fs::symlink_metadata(&path)
                        };
                        if !found.with_context(writing)?.is_dir() {
                            bail!("{} is there and no folder", path.display());
                        }
                    }
                    made => made.with_context(writing)?,
                }
                self.is_folder.insert(entry.path.clone());
                self.folders.push((entry.path.clone(), entry.mode & MODE));
            }
            CopyKind::Symlink => {
                if fs::symlink_metadata(&path).is_ok_and(|found| !found.is_dir()) {
                    fs::remove_file(&path).with_context(writing)?;
                }
                std::os::unix::fs::symlink(&entry.target, &path).with_context(writing)?;
            }
            CopyKind::File => self.file = Some(begin(path, entry)?),
            CopyKind::End | CopyKind::Unspecified => {
                bail!("the agent sent {:?} of an unknown kind", shown(&entry.path))
            }
        }
        Ok(())
    }

    fn check(&mut self, below: &str) -> anyhow::Result<()> {
        let is_sound = below.is_empty() == self.root.is_none()
            && !below.contains('\0')
            && (below.is_empty() || below.split('/').all(|part| !matches!(part, "" | "." | "..")));
        let parent = below.rsplit_once('/').map_or("", |(parent, _)| parent);
        if !is_sound || (self.root.is_some() && !self.is_folder.contains(parent)) {
            bail!("the agent sent {:?}, which is in no folder of this copy", shown(below));
        }
        if self.seen.len() >= MAX_ENTRIES {
            bail!("the agent sent more than {MAX_ENTRIES} files");
        }
        if !self.seen.insert(below.to_owned()) {
            bail!("the agent sent {:?} twice", shown(below));
        }
        Ok(())
    }

    pub(crate) fn data(&mut self, data: &[u8], last: bool) -> anyhow::Result<()> {
        let Some(open) = &mut self.file else {
            bail!("the agent sent data of no file");
        };
        let path = open.path.clone();
        let writing = || format!("writing {}", path.display());
        open.file.write_all(data).with_context(writing)?;
        if last {
            let permissions = fs::Permissions::from_mode(open.mode);
            open.file.set_permissions(permissions).with_context(writing)?;
            if let Some(modified) = open.modified {
                open.file.set_modified(modified).with_context(writing)?;
            }
            fs::rename(&open.beside, &open.path).with_context(writing)?;
            self.file = None;
        }
        Ok(())
    }

    /// Everything came: folders get their modes.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        let Some(root) = &self.root else {
            bail!("the agent sent nothing");
        };
        if self.file.is_some() {
            bail!("the agent ended inside of a file");
        }
        // Children before their parents, which may become closed.
        for (below, mode) in self.folders.iter().rev() {
            let path = if below.is_empty() {
                root.clone()
            } else {
                root.join(below)
            };
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode))
                .with_context(|| format!("setting the mode of {}", path.display()))?;
        }
        Ok(())
    }
}

fn begin(path: PathBuf, entry: &CopyEntry) -> anyhow::Result<Open> {
    let name = path
        .file_name()
        .map_or_else(|| "file".into(), |name| name.to_string_lossy().into_owned());
    // Short enough for names of 255 bytes, and not there yet: O_EXCL follows no symlink.
    let short: String = name.chars().take(50).collect();
    let beside = path.with_file_name(format!(".{short}.{}.far", std::process::id()));
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .with_context(|| format!("writing {}", path.display()))?;
    let modified = u64::try_from(entry.modified_unix_s)
        .ok()
        .filter(|seconds| *seconds > 0)
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
    Ok(Open {
        file,
        beside,
        path,
        mode: entry.mode & MODE,
        modified,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: CopyKind, path: &str, target: &str) -> CopyEntry {
        CopyEntry {
            kind: kind.into(),
            path: path.into(),
            mode: 0o750,
            target: target.into(),
            ..CopyEntry::default()
        }
    }

    fn copy(from: &Path, to: &Path) -> anyhow::Result<u64> {
        let mut reader = Reader::open(from)?;
        let mut writer = Writer::new(to.to_owned(), &reader.name()?);
        while let Some(kind) = reader.next()? {
            match kind {
                Kind::Entry(entry) if entry.kind() == CopyKind::End => {}
                Kind::Entry(entry) => writer.entry(&entry)?,
                Kind::Data(piece) => writer.data(&piece.data, piece.last)?,
                Kind::Start(_) => unreachable!("the reader does not start calls"),
            }
        }
        writer.finish()?;
        Ok(reader.skipped())
    }

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir_all(from.join("deep/er")).unwrap();
        fs::write(from.join("big"), vec![7; STEP * 2 + 1]).unwrap();
        fs::write(from.join("deep/er/empty"), "").unwrap();
        std::os::unix::fs::symlink("big", from.join("link")).unwrap();
        fs::set_permissions(from.join("big"), fs::Permissions::from_mode(0o741)).unwrap();
        // A closed folder is filled all the same.
        fs::set_permissions(from.join("deep/er"), fs::Permissions::from_mode(0o555)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
        let to = dir.path().join("to");
        assert_eq!(copy(&from, &to).unwrap(), 1, "the socket is left out");
        assert_eq!(fs::read(to.join("big")).unwrap(), vec![7; STEP * 2 + 1]);
        assert_eq!(
            fs::metadata(to.join("big")).unwrap().permissions().mode() & 0o777,
            0o741
        );
        assert_eq!(
            fs::metadata(to.join("deep/er")).unwrap().permissions().mode() & 0o777,
            0o555
        );
        assert_eq!(fs::read(to.join("deep/er/empty")).unwrap(), b"");
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("big"));
        // Again, into what is there: as cp(1) does it goes below under its own name.
        copy(&from.join("big"), &to).unwrap();
        copy(&from.join("big"), &to.join("other")).unwrap();
        assert!(to.join("other").is_file());
        let left: Vec<_> = fs::read_dir(&to).unwrap().map(|one| one.unwrap().file_name()).collect();
        assert!(
            left.iter().all(|name| !name.to_string_lossy().ends_with(".far")),
            "{left:?}"
        );
    }

    #[test]
    fn a_hostile_agent_writes_nowhere_else() {
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().to_str().unwrap().to_owned();
        let file = |path| entry(CopyKind::File, path, "");
        let folder = |path| entry(CopyKind::Folder, path, "");
        let link = |path| entry(CopyKind::Symlink, path, &target);
        for (why, entries) in [
            ("up", vec![folder(""), file("../x")]),
            ("absolute", vec![folder(""), file("/x")]),
            ("through a symlink it sent", vec![folder(""), link("l"), file("l/x")]),
            (
                "a folder in place of its symlink",
                vec![folder(""), link("l"), folder("l"), file("l/x")],
            ),
            ("through the root", vec![link(""), file("x")]),
            ("in a folder that never came", vec![folder(""), file("d/x")]),
            (
                "through a symlink that was there",
                vec![folder(""), folder("there"), file("there/x")],
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let to = dir.path().join("to");
            if why.ends_with("was there") {
                fs::create_dir(&to).unwrap();
                std::os::unix::fs::symlink(&target, to.join("there")).unwrap();
            }
            // `to` itself, also where it is a folder.
            let mut writer = Writer::new(to, "");
            let result = entries.iter().try_for_each(|entry| {
                writer.entry(entry)?;
                if entry.kind() == CopyKind::File {
                    writer.data(b"x", true)?;
                }
                Ok::<_, anyhow::Error>(())
            });
            assert!(result.is_err(), "{why}");
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "{why}");
        }
    }

    #[test]
    fn a_file_replaces_a_symlink_and_does_not_follow_it() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "safe").unwrap();
        let to = dir.path().join("to");
        fs::create_dir(&to).unwrap();
        std::os::unix::fs::symlink(&victim, to.join("f")).unwrap();
        let mut writer = Writer::new(to.clone(), "");
        writer.entry(&entry(CopyKind::Folder, "", "")).unwrap();
        writer.entry(&entry(CopyKind::File, "f", "")).unwrap();
        writer.data(b"new", true).unwrap();
        writer.finish().unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"safe");
        assert_eq!(fs::read(to.join("f")).unwrap(), b"new");
    }

    #[test]
    fn what_stops_half_way_leaves_no_half_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(dir.path().join("f"), "");
        writer.entry(&entry(CopyKind::File, "", "")).unwrap();
        writer.data(b"half", false).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
