//! Frames of the control stream: `u32` big-endian length, then one protobuf message.
//!
//! Both ends use this file: far-init over a non-blocking vsock, far-node over tokio. It owns no socket: bytes are read into
//! [`Decoder::room`], messages come out of [`Decoder::next`], so that one slow or hostile peer costs at most one frame
//! of memory. Output of a payload, which is most of what goes over a stream, is copied by neither end: [`log_head`] lets
//! the sender send it from where it lies, and the data of a decoded `Log` is a part of the buffer it was read into.

use crate::guest::{Log, Stream};
use bytes::{BufMut, BytesMut};
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};

/// Longest body of a frame, in bytes. A longer length is an attack or a broken peer: the stream ends.
pub const MAX_BODY: usize = 1 << 20;
/// Bytes of the length in front of a body.
pub const HEADER: usize = 4;

/// vsock port on the host (CID 2) where far-node listens for a guest's control stream.
pub const CONTROL_PORT: u32 = 5000;
/// The one protocol generation that exists so far.
pub const GENERATION: u32 = 1;

/// Output that a host stores before it acknowledges, bytes and records: an answer to each record would wake the guest for
/// nothing. Less is acknowledged with the next heartbeat. Far below a window and below the 1024 records that a guest keeps.
pub const ACK_BYTES: usize = 128 << 10;
/// See [`ACK_BYTES`].
pub const ACK_RECORDS: usize = 256;

/// Most channels (exec, put, get, forward) open at once on one connection.
pub const MAX_CHANNELS: usize = 64;
/// Credit of each direction of each stream of a channel when it opens, bytes; also the longest `Data.data`.
pub const CHANNEL_WINDOW: usize = 32 << 10;
/// Most credit that counts: what is given beyond is cut, bytes.
pub const MAX_CREDIT: usize = 1 << 20;

/// Why a control stream cannot be read any further.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The announced length is 0 or above [`MAX_BODY`].
    #[error("frame of {length} bytes is outside 1 to {MAX_BODY}")]
    Length {
        /// Length in the frame's header.
        length: u32,
    },
    /// The body is not the expected message.
    #[error("decoding a frame of {length} bytes")]
    Body {
        /// Length of the body.
        length: usize,
        /// What prost says.
        source: prost::DecodeError,
    },
}

/// Appends the frame of `message` to `out`.
///
/// # Panics
/// When the message is empty on the wire or longer than [`MAX_BODY`]: both are errors of the sender's own code, which
/// splits log data and files into chunks far below the limit.
pub fn encode<M: Message>(message: &M, out: &mut impl BufMut) {
    let length = message.encoded_len();
    assert!(
        (1..=MAX_BODY).contains(&length),
        "a frame body of {length} bytes is outside 1 to {MAX_BODY}"
    );
    out.put_u32(u32::try_from(length).expect("MAX_BODY fits u32"));
    message.encode(out).expect("the buffer grows as needed");
}

/// Field of `Log` in `GuestMessage`, and of the data in `Log` (control.proto).
const LOG: u32 = 3;
const LOG_DATA: u32 = 3;

/// Appends the frame of a `Log` up to its data, of which `length` bytes must follow on the stream. The data comes last:
/// protobuf lets fields come in any order.
///
/// # Panics
/// When the frame is longer than [`MAX_BODY`], as [`encode`] does.
pub fn log_head(stream: Stream, seq: u64, time_unix_ns: u64, length: usize, out: &mut impl BufMut) {
    let log = Log {
        stream: stream.into(),
        seq,
        time_unix_ns,
        ..Log::default()
    };
    let log_len = log.encoded_len() + key_len(LOG_DATA) + encoded_len_varint(length as u64) + length;
    let body_len = key_len(LOG) + encoded_len_varint(log_len as u64) + log_len;
    assert!(
        body_len <= MAX_BODY,
        "a frame body of {body_len} bytes is longer than {MAX_BODY}"
    );
    out.put_u32(u32::try_from(body_len).expect("MAX_BODY fits u32"));
    encode_key(LOG, WireType::LengthDelimited, out);
    encode_varint(log_len as u64, out);
    log.encode(out).expect("the buffer grows as needed");
    encode_key(LOG_DATA, WireType::LengthDelimited, out);
    encode_varint(length as u64, out);
}

/// Length of a message on the wire, bytes: what a `TransferEntry` costs in credit.
#[must_use]
pub fn length_of<M: Message>(message: &M) -> usize {
    message.encoded_len()
}

/// Splits a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Where to append what comes, with room for `length` bytes without a reallocation. Call [`Decoder::next`] until it gives
    /// `None` before asking for more: then at most one incomplete frame is held.
    pub fn room(&mut self, length: usize) -> &mut BytesMut {
        self.buffer.reserve(length);
        &mut self.buffer
    }

    /// Takes bytes that were read elsewhere, as [`Decoder::room`] does.
    pub fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).extend_from_slice(bytes);
    }

    /// The next whole message, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is unusable afterwards, because the next frame's start is not known.
    // Not an iterator: the message's type is the caller's choice, and an error ends the stream.
    #[allow(clippy::should_implement_trait)]
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let Some(header) = self.buffer.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*header);
        let body_len = length as usize;
        if !(1..=MAX_BODY).contains(&body_len) {
            return Err(FrameError::Length { length });
        }
        if self.buffer.len() < HEADER + body_len {
            return Ok(None);
        }
        let body = self.buffer.split_to(HEADER + body_len).freeze().slice(HEADER..);
        M::decode(body).map(Some).map_err(|source| FrameError::Body {
            length: body_len,
            source,
        })
    }

    /// Bytes held that are not yet a whole frame.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{GuestMessage, Log, guest_message::Kind};
    use proptest::prelude::*;

    fn log(seq: u64, data: Vec<u8>) -> GuestMessage {
        GuestMessage {
            kind: Some(Kind::Log(Log {
                stream: 1,
                seq,
                data: data.into(),
                time_unix_ns: 7,
            })),
        }
    }

    proptest! {
        #[test]
        fn any_split_of_the_bytes_gives_the_same_messages(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..8),
            step in 1_usize..50,
        ) {
            let sent: Vec<_> = bodies.into_iter().enumerate().map(|(n, data)| log(n as u64 + 1, data)).collect();
            let mut wire = Vec::new();
            sent.iter().for_each(|message| encode(message, &mut wire));
            let (mut decoder, mut got) = (Decoder::new(), Vec::new());
            for part in wire.chunks(step) {
                decoder.push(part);
                while let Some(message) = decoder.next::<GuestMessage>().unwrap() {
                    got.push(message);
                }
            }
            prop_assert_eq!(got, sent);
            prop_assert_eq!(decoder.pending(), 0);
        }

        #[test]
        fn random_bytes_never_panic_and_never_hold_more_than_was_pushed(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::new();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next::<GuestMessage>() {}
            prop_assert!(decoder.pending() <= bytes.len());
        }
    }

    #[test]
    fn a_log_sent_in_two_parts_is_the_log() {
        for length in [1, 127, 128, 64 << 10] {
            let data = vec![b'x'; length];
            let mut wire = Vec::new();
            log_head(Stream::Stdout, u64::MAX, 7, length, &mut wire);
            wire.extend_from_slice(&data);
            let mut decoder = Decoder::new();
            decoder.push(&wire);
            assert_eq!(
                decoder.next::<GuestMessage>().unwrap(),
                Some(log(u64::MAX, data)),
                "{length} bytes"
            );
            assert_eq!(decoder.pending(), 0);
        }
    }

    #[test]
    fn the_data_of_a_log_lies_where_it_was_read_to() {
        let mut wire = Vec::new();
        log_head(Stream::Stderr, 1, 7, 4096, &mut wire);
        wire.extend_from_slice(&[1; 4096]);
        let mut decoder = Decoder::new();
        decoder.push(&wire);
        let held = decoder.buffer.as_ptr_range();
        let message = decoder.next::<GuestMessage>().unwrap().unwrap();
        let Some(Kind::Log(log)) = message.kind else {
            panic!("{message:?}")
        };
        assert!(held.contains(&log.data.as_ptr()));
    }

    #[test]
    fn lengths_outside_the_range_end_the_stream() {
        for length in [0_u32, MAX_BODY as u32 + 1, u32::MAX] {
            let mut decoder = Decoder::new();
            decoder.push(&length.to_be_bytes());
            assert!(matches!(decoder.next::<GuestMessage>(), Err(FrameError::Length { length: l }) if l == length));
        }
    }
}
