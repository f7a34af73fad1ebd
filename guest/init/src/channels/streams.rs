//! The two ends of bytes in a channel: a descriptor that is read into Data, and one that Data is written to. Both are
//! non-blocking and hold no more than one window.

use super::flow::{Allowance, Grant, Overrun};
use far_proto::guest::{ChannelStream, Credit, Data};
use nix::{errno::Errno, poll::PollFlags};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Longest piece that is read at once, bytes: half of what the contract allows, so that channels take turns.
const PIECE: usize = 16 << 10;

/// A descriptor that the guest reads.
pub(crate) struct Source {
    fd: Option<OwnedFd>,
    ready: bool,
    pub(crate) allowance: Allowance,
    stream: ChannelStream,
    /// The end was told, or is not to be told any more.
    is_over: bool,
    /// Why it ended, when that was not an ordinary end.
    pub(crate) broken: Option<Errno>,
}

impl Source {
    /// `fd` must be non-blocking.
    pub(crate) fn new(fd: OwnedFd, stream: ChannelStream) -> Self {
        Self {
            fd: Some(fd),
            ready: false,
            allowance: Allowance::new(),
            stream,
            is_over: false,
            broken: None,
        }
    }

    /// What to poll for: only what could be sent at once.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let fd = self.fd.as_ref().filter(|_| !self.ready && self.allowance.left() > 0)?;
        Some((fd.as_fd(), PollFlags::POLLIN))
    }

    pub(crate) fn found(&mut self, events: PollFlags) {
        self.ready |= !events.is_empty();
    }

    /// Whether [`Self::next`] would try to read.
    pub(crate) fn has_work(&self) -> bool {
        !self.is_over && (self.fd.is_none() || (self.ready && self.allowance.left() > 0))
    }

    /// Whether nothing is there although it could be sent: whoever still holds the other end is silent.
    pub(crate) fn is_silent(&self) -> bool {
        self.fd.is_some() && !self.ready && self.allowance.left() > 0
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Nobody wants the rest.
    pub(crate) fn discard(&mut self) {
        self.fd = None;
        self.is_over = true;
    }

    /// At most [`PIECE`] bytes, or the end.
    pub(crate) fn next(&mut self, channel: u32) -> Option<Data> {
        if !self.has_work() {
            return None;
        }
        let mut data = vec![0; self.allowance.left().min(PIECE)];
        if let Some(fd) = &self.fd {
            match nix::unistd::read(fd, &mut data) {
                Err(Errno::EAGAIN | Errno::EINTR) => {
                    self.ready = false;
                    return None;
                }
                Ok(count) if count > 0 => {
                    data.truncate(count);
                    self.allowance.spend(count);
                    return Some(self.data(channel, data, false));
                }
                // EIO: the last program closed the terminal.
                Ok(_) | Err(Errno::EIO) => {}
                Err(errno) => self.broken = Some(errno),
            }
        }
        self.discard();
        Some(self.data(channel, Vec::new(), true))
    }

    fn data(&self, channel: u32, data: Vec<u8>, last: bool) -> Data {
        Data {
            channel,
            stream: self.stream.into(),
            data,
            last,
        }
    }
}

/// What the end of the host's bytes means to the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtEnd {
    /// A pipe: close it.
    Close,
    /// A TCP connection: FIN.
    Finish,
    /// A terminal: its end-of-file character.
    Type,
}

/// VEOF of a fresh terminal, termios(3).
const END_OF_TRANSMISSION: u8 = 4;

/// A descriptor that the guest writes what the host sent.
pub(crate) struct Sink {
    fd: Option<OwnedFd>,
    queue: Vec<u8>,
    grant: Grant,
    stream: ChannelStream,
    at_end: AtEnd,
    is_last: bool,
    line_is_open: bool,
}

impl Sink {
    /// `fd` must be non-blocking; `None`: nobody reads, what comes is dropped.
    pub(crate) fn new(fd: Option<OwnedFd>, stream: ChannelStream, at_end: AtEnd) -> Self {
        Self {
            fd,
            queue: Vec::new(),
            grant: Grant::new(),
            stream,
            at_end,
            is_last: false,
            line_is_open: false,
        }
    }

    /// Takes what came and writes what the descriptor takes.
    pub(crate) fn take(&mut self, data: &[u8], last: bool) -> Result<(), Overrun> {
        self.grant.take(data.len())?;
        if self.is_last || self.fd.is_none() {
            self.grant.consume(data.len());
            return Ok(());
        }
        self.queue.extend_from_slice(data);
        self.is_last = last;
        if let Some(&byte) = data.last() {
            self.line_is_open = byte != b'\n';
        }
        if last && self.at_end == AtEnd::Type {
            // On an open line the first one only ends the line.
            let times = if self.line_is_open { 2 } else { 1 };
            self.queue.extend(std::iter::repeat_n(END_OF_TRANSMISSION, times));
        }
        self.write();
        Ok(())
    }

    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let fd = self.fd.as_ref().filter(|_| !self.queue.is_empty())?;
        Some((fd.as_fd(), PollFlags::POLLOUT))
    }

    pub(crate) fn found(&mut self, events: PollFlags) {
        if !events.is_empty() {
            self.write();
        }
    }

    /// Whether everything up to the host's `last` was passed on, or can not be any more.
    pub(crate) fn is_over(&self) -> bool {
        self.fd.is_none() || (self.is_last && self.queue.is_empty())
    }

    /// Nobody reads any more.
    pub(crate) fn close(&mut self) {
        self.fd = None;
        self.grant.consume(self.queue.len());
        self.queue.clear();
    }

    pub(crate) fn credit(&mut self, channel: u32) -> Option<Credit> {
        Some(Credit {
            channel,
            stream: self.stream.into(),
            bytes: self.grant.due()?,
        })
    }

    fn write(&mut self) {
        let Some(fd) = &self.fd else { return };
        let mut written = 0;
        while written < self.queue.len() {
            match nix::unistd::write(fd, &self.queue[written..]) {
                Ok(count) if count > 0 => written += count,
                Err(Errno::EINTR) => {}
                Ok(_) | Err(Errno::EAGAIN) => break,
                // The reader is gone; that is its right.
                Err(_) => return self.close(),
            }
        }
        self.queue.drain(..written);
        self.grant.consume(written);
        if self.queue.is_empty() && self.is_last {
            match self.at_end {
                AtEnd::Close => self.fd = None,
                AtEnd::Finish => {
                    // Not connected any more: then the other side has seen the end.
                    let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Write);
                }
                AtEnd::Type => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use far_proto::frame::CHANNEL_WINDOW;
    use nix::fcntl::OFlag;

    fn pipe() -> (OwnedFd, OwnedFd) {
        nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap()
    }

    #[test]
    fn a_sink_that_nobody_reads_holds_one_window_and_no_more() {
        let (_read, write) = pipe();
        nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        let mut sink = Sink::new(Some(write), ChannelStream::Stdin, AtEnd::Close);
        let mut sent = 0;
        while sink.take(&[7; 1024], false).is_ok() {
            sent += 1024;
            if sink.credit(1).is_some() {
                panic!("nothing but the pipe's 4 KiB was consumed");
            }
        }
        assert_eq!(sent, CHANNEL_WINDOW);
        assert!(sink.queue.len() <= CHANNEL_WINDOW);
    }

    #[test]
    fn a_source_without_credit_is_not_even_polled() {
        let (read, write) = pipe();
        nix::unistd::write(&write, &[1; 40_000]).unwrap();
        let mut source = Source::new(read, ChannelStream::Stdout);
        source.found(PollFlags::POLLIN);
        let mut got = 0;
        while let Some(data) = source.next(1) {
            got += data.data.len();
        }
        assert_eq!(got, CHANNEL_WINDOW);
        assert!(source.interest().is_none() && !source.has_work());
        source.allowance.give(10_000);
        drop(write);
        while let Some(data) = source.next(1) {
            got += data.data.len();
        }
        assert_eq!((got, source.is_over()), (40_000, true));
    }
}
