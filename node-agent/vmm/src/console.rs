//! The guest's serial console: read without pause, kept within a bound, watched for a kernel's panic.
//!
//! Invariant: a guest can neither stall far-vmm nor fill the blade with its console. The file holds at most its bound;
//! when it is full, the older half goes.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// What a Linux kernel prints when it panics (kernel/panic.c).
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Bytes of a panic's line that are kept.
const MAX_PANIC_LINE: usize = 256;

/// The newest bytes of a stream.
#[derive(Debug)]
pub(crate) struct Tail {
    bytes: VecDeque<u8>,
    bound: usize,
}

impl Tail {
    pub(crate) fn new(bound: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            bound,
        }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(self.bound)..];
        let excess = (self.bytes.len() + bytes.len()).saturating_sub(self.bound);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes);
    }

    pub(crate) fn text(&self) -> String {
        let (front, back) = self.bytes.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).into_owned()
    }
}

/// Notices a panic in a stream that comes in pieces.
#[derive(Debug, Default)]
struct PanicWatch {
    /// The line so far: at most [`MAX_PANIC_LINE`] bytes of it.
    line: Vec<u8>,
    found: Option<String>,
}

impl PanicWatch {
    fn push(&mut self, bytes: &[u8]) {
        if self.found.is_some() {
            return;
        }
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let room = MAX_PANIC_LINE - self.line.len();
            self.line.extend(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                if let Some(line) = self.panic_line() {
                    self.found = Some(line);
                    return;
                }
                self.line.clear();
            }
        }
    }

    fn panic_line(&self) -> Option<String> {
        let start = self.line.windows(PANIC.len()).position(|window| window == PANIC)?;
        Some(String::from_utf8_lossy(&self.line[start..]).trim().to_owned())
    }

    /// The panic's line, also if its end never came.
    fn line(&self) -> Option<String> {
        self.found.clone().or_else(|| self.panic_line())
    }
}

/// A console's file, tail and watch.
#[derive(Debug)]
pub(crate) struct Console {
    path: PathBuf,
    file: File,
    /// Bytes in the file.
    length: u64,
    max_bytes: u64,
    /// Bytes that came so far.
    total: u64,
    tail: Tail,
    panic: PanicWatch,
    /// The first error of the file: the console is still drained then.
    broken: Option<io::Error>,
}

impl Console {
    pub(crate) fn create(path: &Path, max_bytes: u64, tail_bytes: usize) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: open(path)?,
            length: 0,
            max_bytes,
            total: 0,
            tail: Tail::new(tail_bytes),
            panic: PanicWatch::default(),
            broken: None,
        })
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        self.tail.push(bytes);
        self.panic.push(bytes);
        if self.broken.is_none()
            && let Err(error) = self.write(bytes)
        {
            self.broken = Some(error);
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn tail(&self) -> String {
        self.tail.text()
    }

    pub(crate) fn panic_line(&self) -> Option<String> {
        self.panic.line()
    }

    pub(crate) fn broken(&self) -> Option<&io::Error> {
        self.broken.as_ref()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        // A piece never fills the bound alone: the reader's buffer is smaller than half of the smallest bound.
        let half = self.max_bytes / 2;
        let skip = bytes.len().saturating_sub(usize::try_from(half).unwrap_or(usize::MAX));
        let bytes = &bytes[skip..];
        if self.length + bytes.len() as u64 > self.max_bytes {
            self.forget_older_half(half - bytes.len() as u64)?;
        }
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Makes a new file of the newest `keep` bytes, so that a reader of the old one never sees bytes move.
    fn forget_older_half(&mut self, keep: u64) -> io::Result<()> {
        let keep = keep.min(self.length);
        let mut newest = Vec::new();
        self.file.seek(SeekFrom::Start(self.length - keep))?;
        (&self.file).take(keep).read_to_end(&mut newest)?;
        let temporary = self.path.with_extension("tmp");
        let mut file = open(&temporary)?;
        file.write_all(&newest)?;
        fs::rename(&temporary, &self.path)?;
        (self.file, self.length) = (file, newest.len() as u64);
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_never_passes_its_bound_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut console = Console::create(&path, 4096, 64).unwrap();
        let mut all = Vec::new();
        for number in 0..5000 {
            let line = format!("line {number}\n");
            all.extend(line.as_bytes());
            console.push(line.as_bytes());
            assert!(fs::metadata(&path).unwrap().len() <= 4096);
        }
        let kept = fs::read(&path).unwrap();
        assert!(kept.len() >= 2000, "{} bytes kept", kept.len());
        assert!(all.ends_with(&kept));
        assert_eq!(console.total(), all.len() as u64);
        assert_eq!(console.tail().as_bytes(), &all[all.len() - 64..]);
        assert!(console.broken().is_none());
    }

    #[test]
    fn one_piece_larger_than_the_bound_is_cut_to_its_newest_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut console = Console::create(&path, 4096, 64).unwrap();
        console.push(b"before");
        console.push(&[b'x'; 10_000]);
        console.push(b"after");
        let kept = fs::read(&path).unwrap();
        assert!(kept.len() <= 4096 && kept.ends_with(b"xafter"));
    }

    #[test]
    fn a_panic_is_seen_however_the_stream_is_cut() {
        let text = b"[ 0.1] booting\n[ 1.2] Kernel panic - not syncing: VFS: no root\n[ 1.3] CPU: 0\n";
        for cut in 0..text.len() {
            let mut watch = PanicWatch::default();
            watch.push(&text[..cut]);
            watch.push(&text[cut..]);
            assert_eq!(
                watch.line().as_deref(),
                Some("Kernel panic - not syncing: VFS: no root"),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn no_panic_is_seen_in_other_text_nor_kept_from_an_endless_line() {
        let mut watch = PanicWatch::default();
        watch.push(b"the payload says: kernel panic\n");
        watch.push(&vec![b'y'; 100_000]);
        assert_eq!(watch.line(), None);
        assert!(watch.line.len() <= MAX_PANIC_LINE);
    }

    #[test]
    fn a_panic_without_end_of_line_counts() {
        let mut watch = PanicWatch::default();
        watch.push(b"Kernel panic - not syncing: Attempted");
        assert!(watch.line().is_some());
    }
}
