//! Output of attempts, kept on the blade after VM and agent are gone, and bounded.
//!
//! Each attempt has a folder with at most two segments; when the newer is full the older is removed and a new one
//! begun, so that between half of the bound and the bound is kept. A segment is a row of records
//!
//! ```text
//! u32 length of the rest | u8 stream | u64 seq | u64 time | u64 position | data       (big endian)
//! ```
//! where `position` counts the payload bytes of both streams before this record. A jump in it is what a reader reports
//! as dropped bytes, whatever the cause (bound reached, disk full). An empty record of stream 0 opens each segment and
//! carries the highest sequence numbers, so that they outlive the records.
//!
//! Invariant: a line is acknowledged to its guest only after write(2) took it, so killing far-node loses none.

mod reader;
mod ring;

use bytes::Bytes;

pub use reader::{LogReader, read_tail};
pub use ring::{LogWriter, Stored};

/// stdout or stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A piece of output as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// Which stream.
    pub stream: Stream,
    /// 1, 2, 3 … per stream.
    pub seq: u64,
    /// Nanoseconds since the Unix epoch, by the guest's clock.
    pub time_ns: u64,
    /// The bytes; a part of the buffer that they were read into.
    pub data: Bytes,
}

/// A piece of output as it is read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRecord {
    /// What was stored.
    pub record: LogRecord,
    /// Payload bytes of both streams that were dropped just before it.
    pub dropped_bytes: u64,
}
