//! `Logs`: stored output, then (follow) what comes until the agent ended.

use crate::{
    LogSignal,
    logs::{LogReader, ReadRecord, Stream},
    wire,
};
use bytes::Buf;
use far_proto::node::{self as proto, LogChunk};
use futures::stream::{self, BoxStream, StreamExt};
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
};
use tokio::sync::watch;
use tonic::Status;

/// What a reader wants to see.
#[derive(Debug, Clone, Copy)]
struct Filter {
    stream: Option<Stream>,
    since_ns: u64,
}

impl Filter {
    fn passes(&self, read: &ReadRecord) -> bool {
        self.stream.is_none_or(|stream| stream == read.record.stream) && read.record.time_ns >= self.since_ns
    }
}

struct Feed {
    reader: LogReader,
    signal: watch::Receiver<LogSignal>,
    filter: Filter,
    follow: bool,
    /// Newlines to pass over before the first byte is told.
    skip_lines: u64,
    /// Dropped bytes of records that the filter held back.
    dropped: u64,
    ready: VecDeque<LogChunk>,
}

/// Starts to read.
pub(super) fn stream(
    folder: PathBuf,
    signal: watch::Receiver<LogSignal>,
    request: &proto::LogsRequest,
) -> Result<BoxStream<'static, Result<LogChunk, Status>>, Status> {
    let only = match proto::Stream::try_from(request.stream) {
        Ok(proto::Stream::Unspecified) => None,
        Ok(proto::Stream::Stdout) => Some(Stream::Stdout),
        Ok(proto::Stream::Stderr) => Some(Stream::Stderr),
        Err(_) => return Err(Status::invalid_argument("stream: unknown")),
    };
    let filter = Filter {
        stream: only,
        since_ns: request.since.map_or(0, wire::ns_of),
    };
    let (follow, tail_lines) = (request.follow, request.tail_lines);
    let start = async move {
        let skip_lines = match tail_lines {
            Some(lines) => {
                let folder = folder.clone();
                super::blocking(move || lines_before_tail(&folder, filter, u64::from(lines)))
                    .await?
                    .map_err(unreadable)?
            }
            None => 0,
        };
        Ok::<_, Status>(Feed {
            reader: LogReader::new(&folder),
            signal,
            filter,
            follow,
            skip_lines,
            dropped: 0,
            ready: VecDeque::new(),
        })
    };
    let chunks = stream::once(start).flat_map(|feed| match feed {
        Ok(feed) => stream::try_unfold(feed, |mut feed| async move {
            Ok(feed.next().await?.map(|chunk| (chunk, feed)))
        })
        .boxed(),
        Err(status) => stream::once(async { Err(status) }).boxed(),
    });
    Ok(chunks.boxed())
}

fn unreadable(error: std::io::Error) -> Status {
    Status::internal(format!("reading the stored output: {error}"))
}

impl Feed {
    async fn next(&mut self) -> Result<Option<LogChunk>, Status> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Ok(Some(chunk));
            }
            // The signal first: output that comes while we read is not missed.
            let signal = *self.signal.borrow_and_update();
            let mut reader = std::mem::replace(&mut self.reader, LogReader::new(Path::new("")));
            let (reader, records) = super::blocking(move || {
                let records = reader.read();
                (reader, records)
            })
            .await?;
            self.reader = reader;
            let records = records.map_err(unreadable)?;
            if records.is_empty() {
                if signal.is_closed || !self.follow || self.signal.changed().await.is_err() {
                    return Ok(None);
                }
                continue;
            }
            records.into_iter().for_each(|read| self.take(read));
        }
    }

    fn take(&mut self, read: ReadRecord) {
        self.dropped += read.dropped_bytes;
        if !self.filter.passes(&read) {
            return;
        }
        let mut data = read.record.data;
        while self.skip_lines > 0 {
            match data.iter().position(|byte| *byte == b'\n') {
                Some(at) => {
                    data.advance(at + 1);
                    self.skip_lines -= 1;
                }
                None => return,
            }
        }
        if data.is_empty() {
            return;
        }
        self.ready.push_back(LogChunk {
            stream: wire::stream(read.record.stream).into(),
            time: Some(wire::timestamp_of_ns(read.record.time_ns)),
            data: data.into(),
            dropped_bytes: std::mem::take(&mut self.dropped),
            seq: read.record.seq,
        });
    }
}

/// How many newlines lie before the last `lines` lines of what is stored now.
fn lines_before_tail(folder: &Path, filter: Filter, lines: u64) -> std::io::Result<u64> {
    let mut reader = LogReader::new(folder);
    let (mut newlines, mut last) = (0_u64, b'\n');
    loop {
        let records = reader.read()?;
        if records.is_empty() {
            break;
        }
        for read in records.iter().filter(|read| filter.passes(read)) {
            newlines += read.record.data.iter().filter(|byte| **byte == b'\n').count() as u64;
            last = read.record.data.last().copied().unwrap_or(last);
        }
    }
    let unfinished = u64::from(last != b'\n');
    Ok((newlines + unfinished).saturating_sub(lines))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::{LogRecord, LogWriter};

    fn write(folder: &Path, pieces: &[(Stream, &str)]) -> LogWriter {
        let mut writer = LogWriter::open(folder, 1 << 20).unwrap();
        for (stream, text) in pieces {
            let seq = writer.stored().of(*stream) + 1;
            writer.append(&[LogRecord {
                stream: *stream,
                seq,
                time_ns: seq * 1_000_000_000,
                data: text.as_bytes().to_vec().into(),
            }]);
        }
        writer
    }

    async fn read(folder: &Path, request: proto::LogsRequest) -> String {
        let signal = watch::channel(LogSignal {
            rounds: 0,
            is_closed: true,
        })
        .1;
        let chunks: Vec<_> = stream(folder.to_owned(), signal, &request).unwrap().collect().await;
        chunks
            .into_iter()
            .map(|chunk| String::from_utf8(chunk.unwrap().data).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn the_request_picks_lines_stream_and_time() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            &[
                (Stream::Stdout, "a\nb"),
                (Stream::Stderr, "err\n"),
                (Stream::Stdout, "c\nd\nun"),
                (Stream::Stdout, "done"),
            ],
        );
        let request = proto::LogsRequest::default;
        let tail = |lines| proto::LogsRequest {
            tail_lines: Some(lines),
            stream: 1,
            ..request()
        };
        assert_eq!(read(folder.path(), request()).await, "a\nberr\nc\nd\nundone");
        assert_eq!(read(folder.path(), tail(0)).await, "");
        assert_eq!(read(folder.path(), tail(1)).await, "undone");
        assert_eq!(read(folder.path(), tail(3)).await, "bc\nd\nundone");
        assert_eq!(read(folder.path(), tail(99)).await, "a\nbc\nd\nundone");
        let since = Some(prost_types::Timestamp { seconds: 2, nanos: 0 });
        assert_eq!(
            read(folder.path(), proto::LogsRequest { since, ..request() }).await,
            "c\nd\nundone"
        );
        assert_eq!(
            read(folder.path(), proto::LogsRequest { stream: 2, ..request() }).await,
            "err\n"
        );
        assert!(
            stream(
                folder.path().to_owned(),
                watch::channel(LogSignal::default()).1,
                &proto::LogsRequest { stream: 9, ..request() }
            )
            .is_err()
        );
    }

    #[tokio::test]
    async fn a_follower_gets_what_comes_and_ends_with_the_agent() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = write(folder.path(), &[(Stream::Stdout, "one\n")]);
        let (send, signal) = watch::channel(LogSignal::default());
        let request = proto::LogsRequest {
            follow: true,
            ..proto::LogsRequest::default()
        };
        let mut chunks = stream(folder.path().to_owned(), signal, &request).unwrap();
        assert_eq!(chunks.next().await.unwrap().unwrap().data, b"one\n");
        writer.append(&[LogRecord {
            stream: Stream::Stdout,
            seq: 2,
            time_ns: 1,
            data: b"two\n".as_slice().into(),
        }]);
        send.send_modify(|signal| signal.rounds += 1);
        assert_eq!(chunks.next().await.unwrap().unwrap().data, b"two\n");
        send.send_modify(|signal| signal.is_closed = true);
        assert!(chunks.next().await.is_none());
    }
}
