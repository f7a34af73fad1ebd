//! What came of one channel and was not taken yet, in about as many bytes as the guest paid credit for.
//!
//! The newest messages are kept as they are, so that small pieces of data are put together; those before them are kept
//! encoded: a guest that sends the smallest messages there are costs no more than a few times their bytes.

use far_proto::{
    frame::CHANNEL_WINDOW,
    guest::{Data, GuestMessage, guest_message::Kind},
};
use prost::Message;
use std::collections::VecDeque;

/// One of each stream of a program: pieces of both are put together also where they come in turn.
const NEWEST: usize = 2;

/// Messages in their order; of data, the order within each stream.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Messages with their lengths in front.
    older: VecDeque<u8>,
    newest: VecDeque<Kind>,
}

impl Inbox {
    pub(super) fn push(&mut self, kind: Kind) {
        let Some(kind) = self.put_together(kind) else { return };
        self.newest.push_back(kind);
        if self.newest.len() > NEWEST {
            let oldest = GuestMessage {
                kind: self.newest.pop_front(),
            };
            self.older.extend(oldest.encode_length_delimited_to_vec());
        }
    }

    pub(super) fn pop(&mut self) -> Option<Kind> {
        if self.older.is_empty() {
            return self.newest.pop_front();
        }
        let oldest = GuestMessage::decode_length_delimited(&mut self.older);
        oldest.expect("it was encoded here").kind
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Adds data to the last piece of its stream; what does not fit there comes back.
    fn put_together(&mut self, kind: Kind) -> Option<Kind> {
        let Kind::Data(Data { stream, data, last, .. }) = &kind else {
            return Some(kind);
        };
        for before in self.newest.iter_mut().rev() {
            match before {
                Kind::Data(open) if open.stream == *stream => {
                    if open.last || open.data.len() + data.len() > CHANNEL_WINDOW {
                        break;
                    }
                    open.data.extend_from_slice(data);
                    open.last = *last;
                    return None;
                }
                // Between two streams there is no order.
                Kind::Data(_) => {}
                _ => break,
            }
        }
        Some(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::channels::WINDOW;
    use far_proto::guest::TransferEntry;
    use proptest::prelude::*;

    fn data(stream: i32, data: &[u8], last: bool) -> Kind {
        Kind::Data(Data {
            channel: 1,
            stream,
            data: data.to_vec(),
            last,
        })
    }

    fn entry(path: &str) -> TransferEntry {
        TransferEntry {
            channel: 1,
            path: path.to_owned(),
            kind: 1,
            ..TransferEntry::default()
        }
    }

    /// Bytes that are allocated.
    fn kept(inbox: &Inbox) -> usize {
        let newest = inbox.newest.iter().map(|kind| match kind {
            Kind::Data(data) => data.data.capacity(),
            _ => 64,
        });
        inbox.older.capacity() + newest.sum::<usize>()
    }

    #[test]
    fn single_bytes_of_two_streams_in_turn_cost_what_they_are() {
        let mut inbox = Inbox::default();
        for _ in 0..WINDOW {
            inbox.push(data(1, b"o", false));
            inbox.push(data(2, b"e", false));
        }
        assert!(kept(&inbox) <= 4 * WINDOW, "{}", kept(&inbox));
        let taken: Vec<_> = std::iter::from_fn(|| inbox.pop()).collect();
        assert_eq!(taken.len(), 2 * WINDOW / CHANNEL_WINDOW);
    }

    #[test]
    fn the_smallest_files_of_a_transfer_cost_a_few_times_their_credit() {
        let mut inbox = Inbox::default();
        let files = WINDOW / entry("a").encoded_len();
        for _ in 0..files {
            inbox.push(Kind::TransferEntry(entry("a")));
            inbox.push(data(0, b"", true));
        }
        assert!(kept(&inbox) <= 4 * WINDOW, "{}", kept(&inbox));
        assert_eq!(std::iter::from_fn(|| inbox.pop()).count(), 2 * files);
    }

    proptest! {
        #[test]
        fn everything_comes_out_in_its_order(pieces in prop::collection::vec((0_i32..4, 0_usize..40_000, any::<bool>()), 0..60)) {
            let mut inbox = Inbox::default();
            let (mut pushed, mut taken) = (Vec::new(), Vec::new());
            for (n, (what, length, takes)) in pieces.into_iter().enumerate() {
                let kind = match what {
                    0 => Kind::TransferEntry(entry(&n.to_string())),
                    stream => data(stream % 2 + 1, &vec![n as u8; length.min(CHANNEL_WINDOW)], stream == 3),
                };
                pushed.push(kind.clone());
                inbox.push(kind);
                if takes {
                    taken.extend(inbox.pop());
                }
            }
            taken.extend(std::iter::from_fn(|| inbox.pop()));
            // Entries in order; each stream's bytes and ends in order between them.
            let told = |kinds: &[Kind], stream: i32| {
                let (mut bytes, mut marks) = (Vec::new(), Vec::new());
                for kind in kinds {
                    match kind {
                        Kind::Data(data) if data.stream == stream => {
                            bytes.extend_from_slice(&data.data);
                            if data.last { marks.push((bytes.len(), String::new())); }
                        }
                        Kind::TransferEntry(entry) => marks.push((bytes.len(), entry.path.clone())),
                        _ => {}
                    }
                }
                (bytes, marks)
            };
            for stream in [1, 2] {
                prop_assert_eq!(told(&taken, stream), told(&pushed, stream));
            }
        }
    }
}
