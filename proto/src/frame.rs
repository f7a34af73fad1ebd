//! Frames of the control stream: `u32` big-endian length, then one protobuf message.
//!
//! Both ends use this file: far-init over a non-blocking vsock, far-node over tokio. It owns no socket: bytes go in with
//! [`Decoder::push`], messages come out of [`Decoder::next`], so that one slow or hostile peer costs at most one frame
//! of memory.

use prost::Message;

/// Longest body of a frame, in bytes. A longer length is an attack or a broken peer: the stream ends.
pub const MAX_BODY: usize = 1 << 20;
/// Bytes of the length in front of a body.
pub const HEADER: usize = 4;

/// vsock port on the host (CID 2) where far-node listens for a guest's control stream.
pub const CONTROL_PORT: u32 = 5000;
/// The one protocol generation that exists so far.
pub const GENERATION: u32 = 1;

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
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) {
    let length = message.encoded_len();
    assert!(
        (1..=MAX_BODY).contains(&length),
        "a frame body of {length} bytes is outside 1 to {MAX_BODY}"
    );
    out.reserve(HEADER + length);
    out.extend_from_slice(&u32::try_from(length).expect("MAX_BODY fits u32").to_be_bytes());
    message.encode(out).expect("a Vec grows as needed");
}

/// Length of a message on the wire, bytes: what a `TransferEntry` costs in credit.
#[must_use]
pub fn length_of<M: Message>(message: &M) -> usize {
    message.encoded_len()
}

/// Splits a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes as they arrived. Call [`Decoder::next`] until it gives `None` before pushing more: then at most one
    /// incomplete frame is held.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is unusable afterwards, because the next frame's start is not known.
    // Not an iterator: the message's type is the caller's choice, and an error ends the stream.
    #[allow(clippy::should_implement_trait)]
    pub fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some(header) = rest.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*header);
        let body_len = length as usize;
        if !(1..=MAX_BODY).contains(&body_len) {
            return Err(FrameError::Length { length });
        }
        let Some(body) = rest.get(HEADER..HEADER + body_len) else {
            return Ok(None);
        };
        let message = M::decode(body).map_err(|source| FrameError::Body {
            length: body_len,
            source,
        })?;
        self.start += HEADER + body_len;
        Ok(Some(message))
    }

    /// Bytes held that are not yet a whole frame.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
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
                data,
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
    fn lengths_outside_the_range_end_the_stream() {
        for length in [0_u32, MAX_BODY as u32 + 1, u32::MAX] {
            let mut decoder = Decoder::new();
            decoder.push(&length.to_be_bytes());
            assert!(matches!(decoder.next::<GuestMessage>(), Err(FrameError::Length { length: l }) if l == length));
        }
    }
}
