//! Reading an attempt's log back, while it is written or after.
//!
//! A reader needs only the folder: it reads whole records up to the end of the newest segment and is called again
//! when there is more. It keeps its segment open, so that a removal under it costs nothing that it already reached.

use super::{
    LogRecord, ReadRecord,
    ring::{Entry, decode, segment_numbers, segment_path},
};
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// How much is read at once, bytes.
const STEP: usize = 256 << 10;

/// A place in an attempt's log. Blocking.
#[derive(Debug)]
pub struct LogReader {
    folder: PathBuf,
    open: Option<(u64, File)>,
    buffer: Vec<u8>,
    /// Position (payload bytes) that the next record should have.
    expected: u64,
}

impl LogReader {
    /// A reader at the beginning of what is kept.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            open: None,
            buffer: Vec::new(),
            expected: 0,
        }
    }

    /// The next records, at most some 256 KiB; empty where there are none now.
    ///
    /// # Errors
    /// A segment cannot be read. A log that does not exist is empty.
    pub fn read(&mut self) -> io::Result<Vec<ReadRecord>> {
        loop {
            let records = self.read_here()?;
            if !records.is_empty() {
                return Ok(records);
            }
            // Look for a successor first, then look here once more: the writer may have written between both.
            let Some(next) = self.successor()? else {
                return Ok(Vec::new());
            };
            let records = self.read_here()?;
            if !records.is_empty() {
                return Ok(records);
            }
            match File::open(segment_path(&self.folder, next)) {
                Ok(file) => (self.open, self.buffer) = (Some((next, file)), Vec::new()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {} // Rotated away: look again.
                Err(error) => return Err(error),
            }
        }
    }

    fn successor(&self) -> io::Result<Option<u64>> {
        let numbers = match segment_numbers(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let after = self.open.as_ref().map_or(0, |(number, _)| *number);
        Ok(numbers.into_iter().find(|number| *number > after))
    }

    fn read_here(&mut self) -> io::Result<Vec<ReadRecord>> {
        let Some((_, file)) = &mut self.open else {
            return Ok(Vec::new());
        };
        let mut records = Vec::new();
        loop {
            let before = self.buffer.len();
            file.take(STEP as u64).read_to_end(&mut self.buffer)?;
            let is_at_end = self.buffer.len() == before;
            let mut at = 0;
            while let Some((entry, length)) = decode(&self.buffer[at..]) {
                at += length;
                if let Entry::Log { record, position } = entry {
                    let dropped_bytes = position.saturating_sub(self.expected);
                    self.expected = position + record.data.len() as u64;
                    records.push(ReadRecord { record, dropped_bytes });
                }
            }
            self.buffer.drain(..at);
            if !records.is_empty() || is_at_end {
                return Ok(records);
            }
        }
    }
}

/// The last `max_bytes` of the stored output, both streams in order of arrival, as text. Blocking.
#[must_use]
pub fn read_tail(folder: &Path, max_bytes: usize) -> String {
    let mut reader = LogReader::new(folder);
    let mut tail = Vec::new();
    while let Ok(records) = reader.read()
        && !records.is_empty()
    {
        for LogRecord { data, .. } in records.into_iter().map(|read| read.record) {
            tail.extend_from_slice(&data);
        }
        if tail.len() > max_bytes {
            tail.drain(..tail.len() - max_bytes);
        }
    }
    // The cut may have split a character: its rest is no text.
    let start = tail
        .iter()
        .take(3)
        .take_while(|byte| (0x80..0xC0).contains(*byte))
        .count();
    let start = if tail.len() == max_bytes { start } else { 0 };
    let mut text = String::from_utf8_lossy(&tail[start..]).into_owned();
    // Each broken byte became three: the bound holds for the text as well.
    if text.len() > max_bytes {
        let cut = (text.len() - max_bytes..text.len())
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(text.len());
        text.drain(..cut);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::*, *};
    use proptest::prelude::*;
    use std::fs;

    fn record(stream: Stream, seq: u64, data: &[u8]) -> LogRecord {
        LogRecord {
            stream,
            seq,
            time_ns: seq,
            data: data.to_vec().into(),
        }
    }

    fn read_all(reader: &mut LogReader) -> Vec<ReadRecord> {
        let mut all = Vec::new();
        loop {
            let some = reader.read().unwrap();
            if some.is_empty() {
                return all;
            }
            all.extend(some);
        }
    }

    fn disk_use(folder: &Path) -> u64 {
        fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum()
    }

    #[test]
    fn output_is_read_back_in_order_also_after_opening_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut reader = LogReader::new(folder.path());
        let mut writer = LogWriter::open(folder.path(), 1 << 20).unwrap();
        writer.append(&[record(Stream::Stdout, 1, b"one\n"), record(Stream::Stderr, 1, b"two\n")]);
        assert_eq!(read_all(&mut reader).len(), 2);
        drop(writer);
        let mut writer = LogWriter::open(folder.path(), 1 << 20).unwrap();
        assert_eq!(
            writer.stored(),
            Stored {
                stdout_seq: 1,
                stderr_seq: 1
            }
        );
        writer.append(&[
            record(Stream::Stdout, 1, b"again\n"),
            record(Stream::Stdout, 2, b"three\n"),
        ]);
        let more = read_all(&mut reader);
        assert_eq!(more.len(), 1);
        assert_eq!(
            (more[0].record.data.as_ref(), more[0].dropped_bytes),
            (&b"three\n"[..], 0)
        );
        assert_eq!(read_tail(folder.path(), 10), "two\nthree\n");
    }

    #[test]
    fn a_half_record_of_a_crash_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        LogWriter::open(folder.path(), 1 << 20)
            .unwrap()
            .append(&[record(Stream::Stdout, 1, b"whole")]);
        let path = segment_path(folder.path(), 1);
        let mut bytes = fs::read(&path).unwrap();
        let whole = bytes.len();
        bytes.extend_from_slice(&[0, 0, 0, 60, 1, 0, 0]);
        fs::write(&path, &bytes).unwrap();
        let mut writer = LogWriter::open(folder.path(), 1 << 20).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), whole as u64);
        writer.append(&[record(Stream::Stdout, 2, b"next")]);
        assert_eq!(read_all(&mut LogReader::new(folder.path())).len(), 2);
    }

    #[test]
    fn a_flood_stays_within_the_bound_and_readers_learn_what_they_missed() {
        let folder = tempfile::tempdir().unwrap();
        let max = 256 << 10;
        let mut writer = LogWriter::open(folder.path(), max).unwrap();
        let mut early = LogReader::new(folder.path());
        let mut seen = 0;
        let total = 4_000_u64 * 1000;
        for seq in 1..=4_000 {
            writer.append(&[record(Stream::Stdout, seq, &[b'x'; 1000])]);
            assert!(disk_use(folder.path()) <= max);
            if seq == 10 {
                seen = read_all(&mut early).len() as u64;
            }
        }
        assert_eq!(seen, 10);
        for mut reader in [early, LogReader::new(folder.path())] {
            let before = reader.expected;
            let rest = read_all(&mut reader);
            let bytes: u64 = rest
                .iter()
                .map(|read| read.record.data.len() as u64 + read.dropped_bytes)
                .sum();
            assert_eq!(before + bytes, total);
            assert_eq!(rest.last().unwrap().record.seq, 4_000);
        }
        drop(writer);
        assert_eq!(LogWriter::open(folder.path(), max).unwrap().stored().stdout_seq, 4_000);
    }

    #[test]
    fn a_tail_never_begins_inside_a_character_and_keeps_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::open(folder.path(), 1 << 20).unwrap();
        writer.append(&[record(Stream::Stdout, 1, "aé".repeat(10).as_bytes())]);
        assert_eq!(read_tail(folder.path(), 4), "aé");
        writer.append(&[record(Stream::Stdout, 2, &[0xFF; 100])]);
        assert!(read_tail(folder.path(), 64).len() <= 64);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled_whatever_the_sizes_and_restarts(
            steps in proptest::collection::vec((any::<bool>(), 1_usize..6000, any::<bool>()), 1..60)
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = LogWriter::open(folder.path(), 64 << 10).unwrap();
            let mut reader = LogReader::new(folder.path());
            let (mut written, mut accounted) = (0_u64, 0_u64);
            for (is_stdout, size, restart) in steps {
                let stream = if is_stdout { Stream::Stdout } else { Stream::Stderr };
                let seq = writer.stored().of(stream) + 1;
                writer.append(&[record(stream, seq, &vec![7; size])]);
                written += size as u64;
                if restart {
                    let before = writer.stored();
                    drop(writer);
                    writer = LogWriter::open(folder.path(), 64 << 10).unwrap();
                    prop_assert_eq!(writer.stored(), before);
                    for read in read_all(&mut reader) {
                        accounted += read.record.data.len() as u64 + read.dropped_bytes;
                    }
                    prop_assert_eq!(accounted, written);
                }
            }
        }

        #[test]
        fn any_bytes_in_a_segment_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let folder = tempfile::tempdir().unwrap();
            fs::write(segment_path(folder.path(), 1), &bytes).unwrap();
            let _ = LogReader::new(folder.path()).read();
            let mut writer = LogWriter::open(folder.path(), 64 << 10).unwrap();
            let (next, at) = (writer.stored().stdout_seq.saturating_add(1), Stream::Stdout);
            writer.append(&[record(at, next, b"x")]);
        }
    }
}
