//! Bytes on their way to the blade, in order. Output is not copied here: its records lie in the outbox until they are
//! acknowledged, and a part of this queue is a hold on one.

use super::outbox::Offer;
use bytes::{Buf, Bytes, BytesMut};
use far_proto::{frame, guest::GuestMessage};
use nix::errno::Errno;
use std::{collections::VecDeque, io::IoSlice, os::fd::AsFd};

/// Shorter records are copied, so that one write takes many of them, bytes.
const UNCOPIED: usize = 4 << 10;
/// Parts that one write takes.
const PARTS: usize = 16;

#[derive(Default)]
pub(crate) struct Queue {
    parts: VecDeque<Bytes>,
    /// Comes after the parts and still grows.
    open: BytesMut,
    length: usize,
}

impl Queue {
    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn push(&mut self, message: &GuestMessage) {
        let before = self.open.len();
        frame::encode(message, &mut self.open);
        self.length += self.open.len() - before;
    }

    pub(crate) fn push_log(&mut self, log: &Offer<'_>) {
        let before = self.open.len();
        frame::log_head(log.stream, log.seq, log.time_unix_ns, log.data.len(), &mut self.open);
        self.length += self.open.len() - before + log.data.len();
        if log.data.len() < UNCOPIED {
            self.open.extend_from_slice(log.data);
        } else {
            self.parts.push_back(self.open.split().freeze());
            self.parts.push_back(log.data.clone());
        }
    }

    /// Writes what the descriptor takes, or says why it takes nothing.
    pub(crate) fn write_to(&mut self, fd: &impl AsFd) -> Result<usize, Errno> {
        let mut slices = [IoSlice::new(&[]); PARTS];
        let all = self.parts.iter().map(|part| &part[..]).chain([&self.open[..]]);
        let mut count = 0;
        for (slice, part) in slices.iter_mut().zip(all) {
            *slice = IoSlice::new(part);
            count += 1;
        }
        let written = nix::sys::uio::writev(fd, &slices[..count])?;
        self.forget(written);
        Ok(written)
    }

    fn forget(&mut self, written: usize) {
        self.length -= written;
        let mut left = written;
        while let Some(part) = self.parts.front_mut() {
            if left < part.len() {
                return part.advance(left);
            }
            left -= part.len();
            self.parts.pop_front();
        }
        self.open.advance(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use far_proto::{
        frame::Decoder,
        guest::{Done, Stream, guest_message::Kind},
    };
    use proptest::prelude::*;
    use std::io::Read;

    proptest! {
        /// Whatever is queued, in whatever pieces the socket takes it, comes out in order and whole.
        #[test]
        fn a_socket_that_takes_little_gets_everything_in_order(
            sizes in proptest::collection::vec(prop_oneof![0_usize..64, 3000_usize..5000, 60_000_usize..=65_536], 1..40),
        ) {
            let (mut host, guest) = std::os::unix::net::UnixStream::pair().unwrap();
            guest.set_nonblocking(true).unwrap();
            let (mut queue, mut decoder, mut buffer) = (Queue::default(), Decoder::new(), vec![0; 10_000]);
            let records: Vec<Bytes> = sizes.iter().map(|&size| vec![size as u8; size.max(1)].into()).collect();
            for (seq, data) in (1..).zip(&records) {
                queue.push_log(&Offer { stream: Stream::Stdout, seq, time_unix_ns: 7, data });
                queue.push(&GuestMessage { kind: Some(Kind::Done(Done { id: seq, ..Done::default() })) });
            }
            let (mut got, mut answers) = (Vec::new(), 0);
            loop {
                while queue.len() > 0 && queue.write_to(&guest).is_ok() {}
                while let Some(message) = decoder.next::<GuestMessage>().unwrap() {
                    match message.kind {
                        Some(Kind::Log(log)) => got.push(log.data),
                        Some(Kind::Done(done)) => {
                            answers += 1;
                            prop_assert_eq!((done.id, got.len() as u64), (answers, answers));
                        }
                        other => panic!("{other:?}"),
                    }
                }
                if answers == records.len() as u64 {
                    break;
                }
                let read = host.read(&mut buffer).unwrap();
                decoder.push(&buffer[..read]);
            }
            prop_assert_eq!((got, queue.len()), (records, 0));
        }
    }
}
