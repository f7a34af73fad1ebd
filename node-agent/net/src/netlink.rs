//! Netlink messages and sockets: the thin layer that both rtnetlink and nf_tables go through (ADR 0007).
//!
//! Many messages are one send; the kernel works through them in order and answers those that asked for it. A socket
//! belongs to the network namespace of the thread that opened it, and may be used from any thread afterwards.

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
        sockopt,
    },
    sys::time::TimeVal,
};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Ask for a message to be handled; every message has it.
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
/// The message is to be answered when it is done.
const ACK: u16 = libc::NLM_F_ACK as u16;
/// All objects are to be told.
pub(crate) const DUMP: u16 = libc::NLM_F_DUMP as u16;
/// Make it if it is not there.
pub(crate) const CREATE: u16 = libc::NLM_F_CREATE as u16;
/// Change it if it is there.
pub(crate) const REPLACE: u16 = libc::NLM_F_REPLACE as u16;
/// It is an error if it is there.
pub(crate) const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
/// Behind those that are there.
pub(crate) const APPEND: u16 = libc::NLM_F_APPEND as u16;
/// Marks an attribute that holds attributes.
const NESTED: u16 = libc::NLA_F_NESTED as u16;
/// The kernel never sends more in one datagram (NLMSG_GOODSIZE and the 32 KiB of dumps).
const RECEIVE_BYTES: usize = 64 << 10;
/// For many answers at once, and for link events while the reader is busy.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// The kernel answers at once; without an answer something is broken.
const ANSWER_SECONDS: i64 = 30;

/// Which family of messages.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Protocol {
    Route,
    Netfilter,
}

/// Attributes of a message being written; lengths and padding are kept right.
#[derive(Debug, Default)]
pub(crate) struct Attributes {
    bytes: Vec<u8>,
}

impl Attributes {
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).expect("attributes are far below 64 KiB: lists are sent in parts");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        pad(&mut self.bytes);
        self
    }

    pub(crate) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.put(kind, &bytes)
    }

    /// nf_tables takes numbers in network order.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    pub(crate) fn be64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// rtnetlink takes them in the machine's.
    pub(crate) fn ne32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_ne_bytes())
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let length = u16::try_from(self.bytes.len() - start).expect("nests are far below 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Messages that are sent together.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    bytes: Vec<u8>,
    /// What each message is for, by its place; for the error's text.
    what: Vec<String>,
    last: usize,
}

impl Messages {
    /// Adds a message: its family's fixed header, then its attributes.
    pub(crate) fn add(
        &mut self,
        what: impl Into<String>,
        kind: u16,
        flags: u16,
        fixed: &[u8],
        fill: impl FnOnce(&mut Attributes),
    ) {
        self.last = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(fixed);
        pad(&mut self.bytes);
        let mut attributes = Attributes {
            bytes: std::mem::take(&mut self.bytes),
        };
        fill(&mut attributes);
        self.bytes = attributes.bytes;
        let length = u32::try_from(self.bytes.len() - self.last).expect("a message is far below 4 GiB");
        self.bytes[self.last..self.last + 4].copy_from_slice(&length.to_ne_bytes());
        self.what.push(what.into());
    }

    /// Has the last message answered.
    pub(crate) fn answer_last(&mut self) {
        let at = self.last + 6;
        let flags = u16::from_ne_bytes([self.bytes[at], self.bytes[at + 1]]) | ACK;
        self.bytes[at..at + 2].copy_from_slice(&flags.to_ne_bytes());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.what.is_empty()
    }

    /// Numbers the messages from `first` on.
    fn number(&mut self, first: u32) {
        let mut at = 0;
        let mut sequence = first;
        while at < self.bytes.len() {
            let length = read_u32(&self.bytes[at..]).unwrap_or(0) as usize;
            self.bytes[at + 8..at + 12].copy_from_slice(&sequence.to_ne_bytes());
            at += length.next_multiple_of(4);
            sequence = sequence.wrapping_add(1);
        }
    }
}

/// The kernel refused one of the messages.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Refused {
    /// What the message was to do.
    pub what: String,
    /// Why not.
    pub source: io::Error,
}

impl Refused {
    /// The kernel's error number.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }

    pub(crate) fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// A netlink socket.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// A socket in the calling thread's namespace, told of the `groups`' events.
    pub(crate) fn open(protocol: Protocol, groups: u32) -> Result<Self, Refused> {
        let refused = |error: Errno| Refused::new("opening a netlink socket", error);
        let protocol = match protocol {
            Protocol::Route => SockProtocol::NetlinkRoute,
            Protocol::Netfilter => SockProtocol::NetlinkNetFilter,
        };
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).map_err(refused)?;
        // The FORCE variants need CAP_NET_ADMIN, which whoever comes here has; without them the system's limit stands.
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES);
        let _ = setsockopt(&fd, sockopt::SndBufForce, &SOCKET_BUFFER_BYTES);
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_SECONDS, 0)).map_err(refused)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups)).map_err(refused)?;
        Ok(Self { fd, sequence: 1 })
    }

    /// Sends all messages and waits until the kernel has done the last; an error of any of them is returned.
    ///
    /// A batch of nf_tables is atomic: after an error nothing of it is done. rtnetlink's messages are done one by one.
    pub(crate) fn do_all(&mut self, mut messages: Messages, batch: bool) -> Result<(), Refused> {
        if messages.is_empty() {
            return Ok(());
        }
        if !batch {
            messages.answer_last();
        }
        let first = self.sequence;
        let count = u32::try_from(messages.what.len()).expect("messages are counted in thousands");
        messages.number(first);
        self.sequence = first.wrapping_add(count);
        let lost = |error: Errno| Refused::new("talking to the kernel over netlink", error);
        send(self.fd.as_raw_fd(), &messages.bytes, MsgFlags::empty()).map_err(lost)?;
        // A batch's end is not answered by every kernel, the message before it is.
        let last = if batch { count.saturating_sub(2) } else { count - 1 };
        let mut refused = None;
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(lost)?;
            let mut is_done = false;
            for message in parse(&buffer[..length]) {
                let place = message.sequence.wrapping_sub(first);
                if i32::from(message.kind) != libc::NLMSG_ERROR || place >= count {
                    continue;
                }
                let code = read_u32(message.body).map_or(0, |code| code.cast_signed());
                if code != 0 && refused.is_none() {
                    let what = messages.what[place as usize].clone();
                    refused = Some(Refused::new(what, io::Error::from_raw_os_error(-code)));
                }
                // An error of the batch's begin is one of the commit: nothing more follows.
                is_done |= place == last || (batch && place == 0 && code != 0);
            }
            if is_done {
                return refused.map_or(Ok(()), Err);
            }
        }
    }

    /// Sends one question and hands each answer to `take`: its kind and its body.
    pub(crate) fn ask(&mut self, mut question: Messages, mut take: impl FnMut(u16, &[u8])) -> Result<(), Refused> {
        let what = question.what.join(", ");
        let is_dump = read_u32(&question.bytes[4..]).is_some_and(|word| (word >> 16) as u16 & DUMP == DUMP);
        let sequence = self.sequence;
        question.number(sequence);
        self.sequence = sequence.wrapping_add(1);
        let lost = |error: Errno| Refused::new(what.clone(), error);
        send(self.fd.as_raw_fd(), &question.bytes, MsgFlags::empty()).map_err(lost)?;
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(lost)?;
            for message in parse(&buffer[..length]) {
                if message.sequence != sequence {
                    continue;
                }
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        let code = read_u32(message.body).map_or(0, |code| code.cast_signed());
                        return match code {
                            0 => Ok(()),
                            code => Err(Refused::new(what, io::Error::from_raw_os_error(-code))),
                        };
                    }
                    _ => {
                        take(message.kind, message.body);
                        if !is_dump {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    /// The next datagram of events, each handed to `take`; false when there is none within `patience`, and an error
    /// of `ENOBUFS` when events were lost.
    pub(crate) fn events(
        &self,
        patience: std::time::Duration,
        mut take: impl FnMut(u16, &[u8]),
    ) -> Result<bool, Refused> {
        let lost = |error: Errno| Refused::new("reading link events", error);
        let patience = TimeVal::new(
            i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            patience.subsec_micros().max(1).into(),
        );
        setsockopt(&self.fd, sockopt::ReceiveTimeout, &patience).map_err(lost)?;
        let mut buffer = vec![0; RECEIVE_BYTES];
        match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => {
                parse(&buffer[..length]).for_each(|message| take(message.kind, message.body));
                Ok(true)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(error) => Err(lost(error)),
        }
    }
}

/// A message that was received.
struct Received<'a> {
    kind: u16,
    sequence: u32,
    body: &'a [u8],
}

fn parse(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = read_u32(bytes)? as usize;
        let whole = bytes.get(..length).filter(|_| length >= HEADER)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: u16::from_ne_bytes([whole[4], whole[5]]),
            sequence: read_u32(&whole[8..])?,
            body: &whole[HEADER..],
        })
    })
}

/// The attributes in `bytes`: kind without flags, and value. Stops at the first that does not fit.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let word = read_u32(bytes)?;
        let (length, kind) = ((word & 0xffff) as usize, (word >> 16) as u16);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The two highest bits are "nested" and "network order" (linux/netlink.h).
        Some((kind & 0x3fff, value))
    })
}

/// The value of one attribute.
pub(crate) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// The first four bytes as a number of this machine (little-endian, as on every blade that is built for).
pub(crate) fn read_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The text of an attribute, without its NUL.
pub(crate) fn read_text(value: &[u8]) -> &str {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_back_as_they_were_written() {
        let mut written = Attributes::default();
        written.text(1, "fa7").nest(2, |inner| {
            inner.be32(3, 0x0102_0304).put(4, &[9]);
        });
        let read: Vec<_> = attributes(written.bytes()).collect();
        assert_eq!(read[0], (1, b"fa7\0".as_slice()));
        assert_eq!(attribute(read[1].1, 3), Some([1, 2, 3, 4].as_slice()));
        assert_eq!(attribute(read[1].1, 4), Some([9].as_slice()));
    }

    #[test]
    fn broken_answers_end_the_reading_and_nothing_else() {
        for bytes in [&[][..], &[1], &[0; 4], &[0xff; 8], &[3, 0, 0, 0, 0, 0], &[0; 64]] {
            assert!(attributes(bytes).count() < 2, "{bytes:?}");
            assert_eq!(parse(bytes).count(), 0, "{bytes:?}");
        }
    }
}
