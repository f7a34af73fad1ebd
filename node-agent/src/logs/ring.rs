//! Writing and recovering the two segments.

use super::{LogRecord, Stream};
use bytes::Bytes;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader, IoSlice, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Bytes of a record before its data, without the length itself: stream, seq, time, position.
pub(super) const FIXED: usize = 1 + 8 + 8 + 8;
/// With the length.
const HEAD: usize = 4 + FIXED;
/// Longest data of one record: the control stream's bound for one Log is 64 KiB.
pub(super) const MAX_DATA: usize = 1 << 20;
const MARK: u8 = 0;

/// Highest sequence numbers that are stored or were deliberately dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Of stdout.
    pub stdout_seq: u64,
    /// Of stderr.
    pub stderr_seq: u64,
}

impl Stored {
    /// The number of one stream.
    #[must_use]
    pub fn of(&self, stream: Stream) -> u64 {
        match stream {
            Stream::Stdout => self.stdout_seq,
            Stream::Stderr => self.stderr_seq,
        }
    }

    pub(crate) fn set(&mut self, stream: Stream, seq: u64) {
        match stream {
            Stream::Stdout => self.stdout_seq = seq,
            Stream::Stderr => self.stderr_seq = seq,
        }
    }
}

/// What one entry of a segment says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Opens a segment: numbers so far, and the position where it begins.
    Mark { stored: Stored, position: u64 },
    /// Output.
    Log { record: LogRecord, position: u64 },
}

/// Appends to one attempt's log. Blocking.
#[derive(Debug)]
pub struct LogWriter {
    folder: PathBuf,
    segment_max: u64,
    number: u64,
    file: File,
    length: u64,
    stored: Stored,
    position: u64,
}

impl LogWriter {
    /// Opens or makes the log in `folder`, with at most `max_bytes` on disk (at least 64 KiB is kept whatever is asked).
    /// A half record left by a crash is cut off.
    ///
    /// # Errors
    /// The folder or a segment cannot be made, read or cut.
    pub fn open(folder: &Path, max_bytes: u64) -> io::Result<Self> {
        crate::files::make_private_dir(folder)?;
        let segment_max = (max_bytes / 2).max(32 << 10);
        let numbers = segment_numbers(folder)?;
        let mut stored = Stored::default();
        let mut position = 0;
        let mut valid_length = 0;
        for number in &numbers {
            let (entries, length) = scan(&segment_path(folder, *number), |entry| match entry {
                Entry::Mark {
                    stored: marked,
                    position: at,
                } => (stored, position) = (marked, at),
                Entry::Log { record, position: at } => {
                    stored.set(record.stream, record.seq);
                    position = at + record.data.len() as u64;
                }
            })?;
            valid_length = if entries == 0 { 0 } else { length };
        }
        let number = numbers.last().copied().unwrap_or(1);
        let file = open_segment(&segment_path(folder, number))?;
        file.set_len(valid_length)?;
        let mut writer = Self {
            folder: folder.to_owned(),
            segment_max,
            number,
            file,
            length: valid_length,
            stored,
            position,
        };
        if valid_length == 0 {
            writer.write_mark()?;
        }
        Ok(writer)
    }

    /// What is stored.
    #[must_use]
    pub fn stored(&self) -> Stored {
        self.stored
    }

    /// Stores records in order; those already stored (sent again after a lost connection) are passed over.
    ///
    /// When the disk takes no more, the older segment is given up; when that does not help, the record is dropped and
    /// counted, because output must never stop a payload or its blade.
    pub fn append(&mut self, records: &[LogRecord]) {
        let mut batch = Batch::default();
        for record in records {
            if record.seq <= self.stored.of(record.stream) || record.data.len() > MAX_DATA {
                continue;
            }
            let size = (HEAD + record.data.len()) as u64;
            if self.length + batch.length + size > self.segment_max {
                self.flush(&mut batch);
                self.rotate();
            }
            let head = head(
                Some(record.stream),
                record.seq,
                record.time_ns,
                self.position,
                record.data.len(),
            );
            batch.parts.push((head, &record.data));
            batch.length += size;
            self.position += record.data.len() as u64;
            self.stored.set(record.stream, record.seq);
        }
        self.flush(&mut batch);
    }

    fn flush(&mut self, batch: &mut Batch<'_>) {
        if batch.length > 0 && self.write(batch).is_err() {
            // ENOSPC, most likely: the older segment's space first, then it is a drop that `position` tells readers.
            let _ = self.remove_older();
            if let Err(error) = self.write(batch) {
                tracing::warn!(folder = %self.folder.display(), bytes = batch.length, %error, "output was dropped: it cannot be written");
            }
        }
        *batch = Batch::default();
    }

    fn write(&mut self, batch: &Batch<'_>) -> io::Result<()> {
        match batch.write(&self.file) {
            Ok(()) => {
                self.length += batch.length;
                Ok(())
            }
            Err(error) => {
                // O_APPEND: after a short write the file is cut back to whole records.
                self.file.set_len(self.length)?;
                Err(error)
            }
        }
    }

    fn rotate(&mut self) {
        let next = self.number + 1;
        match self
            .remove_older()
            .and_then(|()| open_segment(&segment_path(&self.folder, next)))
        {
            Ok(file) => {
                (self.file, self.number, self.length) = (file, next, 0);
                if let Err(error) = self.write_mark() {
                    tracing::warn!(folder = %self.folder.display(), %error, "a log segment cannot be begun");
                }
            }
            Err(error) => {
                // The bound comes first: start over in this segment. Readers see the jump.
                tracing::warn!(folder = %self.folder.display(), %error, "a log segment cannot be opened: the newest is emptied");
                if self.file.set_len(0).is_ok() {
                    self.length = 0;
                    let _ = self.write_mark();
                }
            }
        }
    }

    fn remove_older(&self) -> io::Result<()> {
        for number in segment_numbers(&self.folder)?
            .into_iter()
            .filter(|number| *number < self.number)
        {
            crate::files::remove_file(&segment_path(&self.folder, number))?;
        }
        Ok(())
    }

    fn write_mark(&mut self) -> io::Result<()> {
        let Stored { stdout_seq, stderr_seq } = self.stored;
        self.write(&Batch {
            parts: vec![(head(None, stdout_seq, stderr_seq, self.position, 0), &[])],
            length: HEAD as u64,
        })
    }
}

/// Records on their way to the file, from where their data lies.
#[derive(Default)]
struct Batch<'a> {
    parts: Vec<([u8; HEAD], &'a [u8])>,
    length: u64,
}

impl Batch<'_> {
    fn write(&self, mut file: &File) -> io::Result<()> {
        let parts = self.parts.iter();
        let mut slices: Vec<IoSlice<'_>> = parts
            .flat_map(|(head, data)| [IoSlice::new(head), IoSlice::new(data)])
            .collect();
        let mut left = slices.as_mut_slice();
        let mut written = 0;
        while written < self.length {
            match file.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    written += count as u64;
                    IoSlice::advance_slices(&mut left, count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

pub(super) fn segment_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("{number:010}.log"))
}

/// Numbers of the segments that exist, ascending.
pub(super) fn segment_numbers(folder: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        numbers.extend(
            name.to_str()
                .and_then(|name| name.strip_suffix(".log"))
                .and_then(|n| n.parse::<u64>().ok()),
        );
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn open_segment(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// Everything of a record but its `length` bytes of data; `None`: a mark.
fn head(stream: Option<Stream>, seq: u64, time: u64, position: u64, length: usize) -> [u8; HEAD] {
    let length = u32::try_from(FIXED + length).expect("MAX_DATA fits u32");
    let stream = match stream {
        None => MARK,
        Some(Stream::Stdout) => 1,
        Some(Stream::Stderr) => 2,
    };
    let mut head = [0; HEAD];
    let (first, numbers) = head.split_at_mut(5);
    first[..4].copy_from_slice(&length.to_be_bytes());
    first[4] = stream;
    for (place, number) in numbers.chunks_exact_mut(8).zip([seq, time, position]) {
        place.copy_from_slice(&number.to_be_bytes());
    }
    head
}

/// The entry at the start of `bytes` and its length; `None` where it is not whole or not ours.
pub(super) fn decode(bytes: &[u8]) -> Option<(Entry, usize)> {
    let length = u32::from_be_bytes(*bytes.first_chunk::<4>()?) as usize;
    if !(FIXED..=FIXED + MAX_DATA).contains(&length) {
        return None;
    }
    let body = bytes.get(4..4 + length)?;
    let number = |at: usize| body[at..].first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes));
    let (seq, time, position) = (number(1)?, number(9)?, number(17)?);
    let log = |stream| Entry::Log {
        record: LogRecord {
            stream,
            seq,
            time_ns: time,
            data: Bytes::copy_from_slice(&body[FIXED..]),
        },
        position,
    };
    let entry = match body[0] {
        MARK => Entry::Mark {
            stored: Stored {
                stdout_seq: seq,
                stderr_seq: time,
            },
            position,
        },
        1 => log(Stream::Stdout),
        2 => log(Stream::Stderr),
        _ => return None,
    };
    Some((entry, 4 + length))
}

/// Goes through a segment's whole entries: how many, and where the last one ends.
fn scan(path: &Path, mut each: impl FnMut(Entry)) -> io::Result<(usize, u64)> {
    let mut bytes = Vec::new();
    BufReader::new(File::open(path)?).read_to_end(&mut bytes)?;
    let (mut entries, mut at) = (0, 0);
    while let Some((entry, length)) = decode(&bytes[at..]) {
        each(entry);
        entries += 1;
        at += length;
    }
    Ok((entries, at as u64))
}
