//! Log records that the host has not acknowledged yet. Pure: no socket, no clock.
//!
//! ```text
//! push -> [ kept, in order of seq ] -> next (to the connection, from `sent` on) -> acknowledge (forgotten)
//!                                  resume: a new connection starts after what the host has stored
//! ```
//! Invariant: the bytes of a sequence number never change once a connection was given them, so that the host may drop
//! what it has twice.
//! Invariant: kept bytes never exceed the window, and records never exceed [`MAX_RECORDS`].

use bytes::Bytes;
use far_proto::guest::Stream;
use std::collections::VecDeque;

/// Longest data of one record, bytes (the contract's limit).
pub(crate) const MAX_RECORD: usize = 64 << 10;
/// Most unacknowledged records of one stream: bounds the overhead of a payload that writes single bytes.
const MAX_RECORDS: usize = 1024;
/// Window before the host said one, and the range of what it may say, bytes.
const DEFAULT_WINDOW: usize = 64 << 10;
const WINDOW_RANGE: (usize, usize) = (4 << 10, 1 << 20);

/// One of the payload's two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    Stdout,
    Stderr,
}

impl Channel {
    pub(crate) const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];

    fn stream(self) -> Stream {
        match self {
            Self::Stdout => Stream::Stdout,
            Self::Stderr => Stream::Stderr,
        }
    }

    fn from_wire(stream: i32) -> Option<Self> {
        match Stream::try_from(stream) {
            Ok(Stream::Stdout) => Some(Self::Stdout),
            Ok(Stream::Stderr) => Some(Self::Stderr),
            Ok(Stream::Unspecified) | Err(_) => None,
        }
    }
}

/// What the host said about logs that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum OutboxError {
    #[error("the host names log stream {stream}, which does not exist")]
    Stream { stream: i32 },
    #[error("the host has {stored} records of a stream that has {written}")]
    Ahead { stored: u64, written: u64 },
}

struct Record {
    seq: u64,
    time_unix_ns: u64,
    data: Bytes,
}

#[derive(Default)]
struct Backlog {
    records: VecDeque<Record>,
    bytes: usize,
    /// Last number given to a record; 0: none.
    last: u64,
    /// Highest number that any connection was given: these records are frozen.
    offered: u64,
    /// Highest number that this connection was given.
    sent: u64,
}

impl Backlog {
    fn push(&mut self, data: Bytes, time_unix_ns: u64) {
        self.bytes += data.len();
        if let Some(tail) = self.records.back_mut()
            && tail.seq > self.offered
            && tail.data.len() + data.len() <= MAX_RECORD
        {
            // Nobody else holds it yet: nothing is copied but what is new.
            let mut joined = Vec::from(std::mem::take(&mut tail.data));
            joined.extend_from_slice(&data);
            tail.data = joined.into();
            return;
        }
        self.last += 1;
        self.records.push_back(Record {
            seq: self.last,
            time_unix_ns,
            data,
        });
    }

    fn forget(&mut self, seq: u64) -> Result<(), OutboxError> {
        // A record that was never given away cannot be stored anywhere.
        if seq > self.offered {
            return Err(OutboxError::Ahead {
                stored: seq,
                written: self.offered,
            });
        }
        while self.records.front().is_some_and(|record| record.seq <= seq) {
            self.bytes -= self.records.pop_front().map_or(0, |record| record.data.len());
        }
        Ok(())
    }

    fn next(&mut self) -> Option<&Record> {
        let first = self.records.front()?.seq;
        let wanted = (self.sent + 1).max(first);
        let record = self.records.get(usize::try_from(wanted - first).ok()?)?;
        self.sent = record.seq;
        self.offered = self.offered.max(record.seq);
        Some(record)
    }
}

/// A record on its way: the data is sent from where it is kept.
pub(crate) struct Offer<'a> {
    pub(crate) stream: Stream,
    pub(crate) seq: u64,
    pub(crate) time_unix_ns: u64,
    pub(crate) data: &'a Bytes,
}

/// Both streams and their window.
pub(crate) struct Outbox {
    streams: [Backlog; 2],
    window: usize,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Self {
            streams: Default::default(),
            window: DEFAULT_WINDOW,
        }
    }

    /// How many bytes of `channel` may be read from the payload now.
    pub(crate) fn room(&self, channel: Channel) -> usize {
        let stream = &self.streams[channel as usize];
        if stream.records.len() >= MAX_RECORDS {
            0
        } else {
            self.window.saturating_sub(stream.bytes)
        }
    }

    /// Keeps what was read, 1 byte to [`Self::room`], as records that share its buffer.
    pub(crate) fn push(&mut self, channel: Channel, mut data: Bytes, time_unix_ns: u64) {
        while !data.is_empty() {
            let record = data.split_to(data.len().min(MAX_RECORD));
            self.streams[channel as usize].push(record, time_unix_ns);
        }
    }

    /// A new connection: the host has stored everything up to these numbers.
    pub(crate) fn resume(&mut self, stored: [u64; 2], window: usize) -> Result<(), OutboxError> {
        self.window = window.clamp(WINDOW_RANGE.0, WINDOW_RANGE.1);
        for (stream, stored) in self.streams.iter_mut().zip(stored) {
            stream.forget(stored)?;
            stream.sent = stored;
        }
        Ok(())
    }

    /// The host has stored everything of `stream` up to `seq`.
    pub(crate) fn acknowledge(&mut self, stream: i32, seq: u64) -> Result<(), OutboxError> {
        let channel = Channel::from_wire(stream).ok_or(OutboxError::Stream { stream })?;
        self.streams[channel as usize].forget(seq)
    }

    /// The next record for this connection.
    pub(crate) fn next(&mut self, channel: Channel) -> Option<Offer<'_>> {
        let record = self.streams[channel as usize].next()?;
        Some(Offer {
            stream: channel.stream(),
            seq: record.seq,
            time_unix_ns: record.time_unix_ns,
            data: &record.data,
        })
    }

    /// Last number of both streams.
    pub(crate) fn last(&self) -> [u64; 2] {
        [self.streams[0].last, self.streams[1].last]
    }

    /// Whether this connection was given everything that the host does not have.
    pub(crate) fn all_sent(&self) -> bool {
        self.streams
            .iter()
            .all(|stream| stream.records.is_empty() || stream.sent >= stream.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq)]
    struct Log {
        seq: u64,
        data: Vec<u8>,
    }

    impl Outbox {
        fn give(&mut self, channel: Channel) -> Option<Log> {
            self.next(channel).map(|offer| Log {
                seq: offer.seq,
                data: offer.data.to_vec(),
            })
        }
    }

    #[test]
    fn records_are_numbered_from_one_and_sent_once_per_connection() {
        let mut outbox = Outbox::new();
        outbox.push(Channel::Stdout, Bytes::from_static(b"a"), 1);
        assert_eq!(outbox.give(Channel::Stdout).unwrap().seq, 1);
        outbox.push(Channel::Stdout, Bytes::from_static(b"b"), 2);
        assert_eq!(outbox.give(Channel::Stdout).unwrap().seq, 2);
        assert_eq!(outbox.give(Channel::Stdout), None);
        assert_eq!(outbox.give(Channel::Stderr), None);
        assert!(outbox.all_sent());
        outbox.resume([1, 0], 0).unwrap();
        assert!(!outbox.all_sent());
        assert_eq!(outbox.give(Channel::Stdout).unwrap().data, b"b");
    }

    #[test]
    fn what_is_read_at_once_becomes_records_of_at_most_64_kib_without_a_copy() {
        let mut outbox = Outbox::new();
        outbox.resume([0, 0], 1 << 20).unwrap();
        let data = Bytes::from(vec![7; 2 * MAX_RECORD + 1]);
        outbox.push(Channel::Stdout, data.clone(), 1);
        let mut at = 0;
        for (seq, length) in [(1, MAX_RECORD), (2, MAX_RECORD), (3, 1)] {
            let record = outbox.next(Channel::Stdout).unwrap();
            assert_eq!((record.seq, record.data.len()), (seq, length));
            assert_eq!(record.data.as_ptr(), data[at..].as_ptr());
            at += length;
        }
        assert!(outbox.next(Channel::Stdout).is_none());
    }

    #[test]
    fn the_window_closes_and_opens_with_the_host_s_word() {
        let mut outbox = Outbox::new();
        outbox.resume([0, 0], 1).unwrap();
        assert_eq!(outbox.room(Channel::Stdout), 4096, "never below the contract's lowest");
        outbox.push(Channel::Stdout, vec![0; 4096].into(), 0);
        assert_eq!(outbox.room(Channel::Stdout), 0);
        assert_eq!(outbox.room(Channel::Stderr), 4096, "the other stream has its own");
        outbox.give(Channel::Stdout).unwrap();
        outbox.acknowledge(1, 1).unwrap();
        assert_eq!(outbox.room(Channel::Stdout), 4096);
    }

    #[test]
    fn single_bytes_cannot_pile_up_without_bound() {
        let mut outbox = Outbox::new();
        while outbox.room(Channel::Stderr) > 0 {
            outbox.push(Channel::Stderr, Bytes::from_static(b"x"), 0);
            outbox.give(Channel::Stderr);
        }
        assert_eq!(outbox.last(), [0, MAX_RECORDS as u64]);
    }

    #[test]
    fn a_host_that_is_ahead_or_names_no_stream_is_an_error() {
        let mut outbox = Outbox::new();
        outbox.push(Channel::Stdout, Bytes::from_static(b"never sent"), 0);
        assert_eq!(
            outbox.acknowledge(1, 1),
            Err(OutboxError::Ahead { stored: 1, written: 0 })
        );
        assert_eq!(outbox.acknowledge(3, 0), Err(OutboxError::Stream { stream: 3 }));
        assert!(outbox.resume([0, 7], 4096).is_err());
    }

    proptest! {
        /// A host that stores what comes in order, acknowledges now and then, and loses its connection at any moment
        /// has at the end exactly what was written.
        #[test]
        fn no_byte_is_lost_or_doubled_over_reconnects(
            steps in proptest::collection::vec((0_u8..5, 1_usize..400), 1..200),
        ) {
            let mut outbox = Outbox::new();
            let (mut written, mut stored) = (Vec::new(), Vec::new());
            let (mut stored_seq, mut in_flight) = (0, VecDeque::new());
            let mut store = |log: Log, stored_seq: &mut u64| {
                if log.seq == *stored_seq + 1 {
                    stored.extend_from_slice(&log.data);
                    *stored_seq = log.seq;
                } else {
                    assert!(log.seq <= *stored_seq, "gap: {} after {}", log.seq, stored_seq);
                }
            };
            for (what, size) in steps {
                match what {
                    0 => {
                        let data: Vec<u8> = (0..size.min(outbox.room(Channel::Stdout))).map(|n| (written.len() + n) as u8).collect();
                        if !data.is_empty() {
                            written.extend_from_slice(&data);
                            outbox.push(Channel::Stdout, data.into(), 0);
                        }
                    }
                    1 => in_flight.extend(outbox.give(Channel::Stdout)),
                    2 => if let Some(log) = in_flight.pop_front() { store(log, &mut stored_seq) },
                    3 => outbox.acknowledge(1, stored_seq).unwrap(),
                    _ => {
                        in_flight.clear();
                        outbox.resume([stored_seq, 0], 4096).unwrap();
                    }
                }
                prop_assert!(outbox.streams[0].bytes <= DEFAULT_WINDOW);
            }
            in_flight.into_iter().for_each(|log| store(log, &mut stored_seq));
            while let Some(log) = outbox.give(Channel::Stdout) {
                store(log, &mut stored_seq);
            }
            prop_assert!(outbox.all_sent());
            prop_assert_eq!(stored, written);
        }
    }
}
