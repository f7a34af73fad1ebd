//! What the host opened beside the payload: exec, put, get and forward, each under a number of the host's choice.
//!
//! ```text
//! open -> works -> ChannelEnd queued -> forgotten        lost connection: everything is dropped, processes are given up
//! ```
//! Channels belong to one connection. They take turns, one message each, and only while little is queued: logs, Ready,
//! Heartbeat and Exit go before.
//! Invariant: at most [`MAX_CHANNELS`], each holding at most one window; a channel that was opened gets exactly one ChannelEnd.

pub(crate) mod exec;
mod flow;
mod forward;
mod get;
mod put;
mod streams;

use crate::{boot, cgroup::Cgroup, control::connection::Link, plan::Limit, rootfs::Root, sys::Ended, users::User};
use exec::Process;
use far_proto::{
    frame::MAX_CHANNELS,
    guest::{
        ChannelEnd, Credit, Data, ErrorKind, Exec, ExecResize, Forward, Get, GuestMessage, Put, TransferEntry,
        guest_message::Kind as Say,
    },
};
use forward::Tunnel;
use nix::{errno::Errno, poll::PollFlags};
use std::{
    ffi::CString,
    os::fd::{BorrowedFd, OwnedFd},
    time::Instant,
};

/// Longest error text, bytes.
const MAX_ERROR: usize = 1024;

/// What exec shares with the payload.
pub(crate) struct Companion {
    /// With the defaults filled in.
    pub(crate) env: Vec<(String, String)>,
    pub(crate) user: User,
    pub(crate) working_dir: CString,
    pub(crate) limits: Vec<Limit>,
    pub(crate) allow_new_privileges: bool,
    /// `None`: the payload ended before it could be opened.
    pub(crate) namespace: Option<OwnedFd>,
}

/// Where channels work.
pub(crate) struct Ground<'a> {
    pub(crate) root: &'a Root,
    pub(crate) cgroup: Option<&'a Cgroup>,
    pub(crate) companion: &'a Companion,
}

/// Why a channel ended: what travels in its ChannelEnd.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    kind: ErrorKind,
    text: String,
}

impl Problem {
    pub(crate) fn new(kind: ErrorKind, text: String) -> Self {
        Self { kind, text }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    fn invalid(text: &str) -> Self {
        Self::new(ErrorKind::Invalid, text.into())
    }

    fn failed(step: &str, errno: Errno) -> Self {
        Self::new(ErrorKind::Failed, [step, ": ", errno.desc()].concat())
    }

    fn at(self, path: &str) -> Self {
        Self {
            text: [path, ": ", &self.text].concat(),
            ..self
        }
    }

    fn end(self, channel: u32) -> ChannelEnd {
        ChannelEnd {
            channel,
            error: boot::shortened(self.text, MAX_ERROR),
            kind: self.kind.into(),
            ..ChannelEnd::default()
        }
    }
}

impl From<flow::Overrun> for Problem {
    fn from(flow::Overrun: flow::Overrun) -> Self {
        Self::invalid("more Data than there was credit for")
    }
}

/// The number is open already.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the blade opened channel {0}, which is 0 or open")]
pub(crate) struct InUse(u32);

/// What the host asks for.
pub(crate) enum Request {
    Exec(Exec),
    Put(Put),
    Get(Get),
    Forward(Forward),
}

impl Request {
    fn channel(&self) -> u32 {
        match self {
            Self::Exec(exec) => exec.channel,
            Self::Put(put) => put.channel,
            Self::Get(get) => get.channel,
            Self::Forward(forward) => forward.channel,
        }
    }

    fn begin(self, ground: &Ground) -> Result<Work, Problem> {
        Ok(match self {
            Self::Exec(exec) => Work::Exec(Box::new(exec::start(
                exec,
                ground.root,
                ground.cgroup,
                ground.companion,
            )?)),
            Self::Put(put) => Work::Put(Box::new(put::Receiver::new(put)?)),
            Self::Get(get) => Work::Get(Box::new(get::Sender::new(&get, ground.root)?)),
            Self::Forward(forward) => Work::Forward(Box::new(forward::start(forward)?)),
        })
    }
}

enum Work {
    Exec(Box<Process>),
    Put(Box<put::Receiver>),
    Get(Box<get::Sender>),
    Forward(Box<Tunnel>),
    /// Over, but its end was not queued yet.
    Ended(Box<ChannelEnd>),
    /// A process of a connection that is gone, or of a channel that ended by an error: given up, not reaped yet.
    Orphan(Box<Process>),
}

struct Channel {
    /// 0: an orphan.
    id: u32,
    work: Work,
}

/// All that are open.
pub(crate) struct Channels {
    list: Vec<Channel>,
    /// Who is first in the next round.
    turn: usize,
    /// The last round left something that could be said at once.
    has_more: bool,
}

impl Channels {
    pub(crate) fn new() -> Self {
        Self {
            list: Vec::new(),
            turn: 0,
            has_more: false,
        }
    }

    /// Opens a channel; `ground` is `None` when there is no running payload.
    pub(crate) fn open(&mut self, request: Request, ground: Option<&Ground>) -> Result<(), InUse> {
        let id = request.channel();
        if id == 0 || self.find(id).is_some() {
            return Err(InUse(id));
        }
        let begun = if self.list.len() >= MAX_CHANNELS {
            Err(Problem::new(ErrorKind::Busy, "too many channels are open".into()))
        } else {
            match ground {
                None => Err(Problem::new(ErrorKind::NotRunning, "the agent is not running".into())),
                Some(ground) => request.begin(ground),
            }
        };
        let work = begun.unwrap_or_else(|problem| Work::Ended(Box::new(problem.end(id))));
        // Refusals are bounded by the link: it reads nothing more while too much is to be said.
        self.list.push(Channel { id, work });
        Ok(())
    }

    fn find(&mut self, id: u32) -> Option<&mut Channel> {
        self.list.iter_mut().find(|channel| channel.id == id)
    }

    /// How many of this connection are open.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.list.iter().filter(|channel| channel.id != 0).count()).unwrap_or(0)
    }

    /// Whether more ends wait than a peer that listens would leave.
    pub(crate) fn is_crowded(&self) -> bool {
        self.list.len() >= 2 * MAX_CHANNELS
    }

    pub(crate) fn take_data(&mut self, data: &Data, now: Instant) {
        let Some(channel) = self.find(data.channel) else { return };
        let result = match &mut channel.work {
            Work::Exec(process) => process.take(&data.data, data.last),
            Work::Put(receiver) => receiver.take(&data.data, data.last),
            Work::Forward(tunnel) => tunnel.take(&data.data, data.last),
            Work::Get(_) => Err(Problem::invalid("Data for a Get")),
            Work::Ended(_) | Work::Orphan(_) => Ok(()),
        };
        self.settle(data.channel, result, now);
    }

    pub(crate) fn take_entry(&mut self, entry: TransferEntry, ground: Option<&Ground>, now: Instant) {
        let id = entry.channel;
        let Some(channel) = self.find(id) else { return };
        let result = match (&mut channel.work, ground) {
            (Work::Put(receiver), Some(ground)) => receiver.enter(ground.root, &ground.companion.user, entry),
            (Work::Put(_), None) => Err(Problem::new(ErrorKind::NotRunning, "the agent is not running".into())),
            (Work::Exec(_) | Work::Get(_) | Work::Forward(_), _) => Err(Problem::invalid("an entry outside a Put")),
            (Work::Ended(_) | Work::Orphan(_), _) => Ok(()),
        };
        self.settle(id, result, now);
    }

    /// A problem ends the channel.
    fn settle(&mut self, id: u32, result: Result<(), Problem>, now: Instant) {
        let Err(problem) = result else { return };
        let Some(channel) = self.find(id) else { return };
        let end = match &channel.work {
            Work::Put(receiver) => {
                let so_far = receiver.summary();
                ChannelEnd {
                    files: so_far.files,
                    bytes: so_far.bytes,
                    ..problem.end(id)
                }
            }
            _ => problem.end(id),
        };
        let before = std::mem::replace(&mut channel.work, Work::Ended(Box::new(end)));
        self.bury(before, now);
    }

    /// A process outlives its channel until it is reaped.
    fn bury(&mut self, work: Work, now: Instant) {
        if let Work::Exec(mut process) = work
            && !process.has_ended()
        {
            process.give_up(now);
            self.list.push(Channel {
                id: 0,
                work: Work::Orphan(process),
            });
        }
    }

    pub(crate) fn credit(&mut self, credit: Credit) {
        let Some(channel) = self.find(credit.channel) else {
            return;
        };
        match &mut channel.work {
            Work::Exec(process) => process.credit(credit.stream(), credit.bytes),
            Work::Get(sender) => sender.allowance.give(credit.bytes),
            Work::Forward(tunnel) => tunnel.credit(credit.bytes),
            Work::Put(_) | Work::Ended(_) | Work::Orphan(_) => {}
        }
    }

    pub(crate) fn close(&mut self, id: u32, now: Instant) {
        let Some(channel) = self.find(id) else { return };
        let end = match &mut channel.work {
            // Its end tells how it left.
            Work::Exec(process) => return process.give_up(now),
            Work::Put(receiver) => receiver.summary(),
            Work::Get(sender) => sender.summary(),
            Work::Forward(_) => ChannelEnd {
                channel: id,
                ..ChannelEnd::default()
            },
            Work::Ended(_) | Work::Orphan(_) => return,
        };
        channel.work = Work::Ended(Box::new(end));
    }

    pub(crate) fn resize(&mut self, resize: &ExecResize) {
        if let (
            Some(Channel {
                work: Work::Exec(process),
                ..
            }),
            Some(size),
        ) = (self.find(resize.channel), resize.size)
        {
            process.resize(size);
        }
    }

    pub(crate) fn signal(&mut self, id: u32, number: u32) {
        if let Some(Channel {
            work: Work::Exec(process),
            ..
        }) = self.find(id)
        {
            process.signal(number);
        }
    }

    /// A child was reaped.
    pub(crate) fn reaped(&mut self, ended: &Ended, now: Instant) {
        for channel in &mut self.list {
            if let Work::Exec(process) | Work::Orphan(process) = &mut channel.work
                && process.pid() == ended.pid
                && !process.has_ended()
            {
                process.reaped(ended.how, now);
            }
        }
        self.list
            .retain(|channel| !matches!(&channel.work, Work::Orphan(process) if process.has_ended()));
    }

    /// The connection is gone, and with it everything that was said on it.
    pub(crate) fn connection_lost(&mut self, now: Instant) {
        for channel in std::mem::take(&mut self.list) {
            match channel.work {
                Work::Orphan(_) => self.list.push(channel),
                work => self.bury(work, now),
            }
        }
        self.has_more = false;
    }

    /// The payload ended: all channels end with it, and their ends are said now, before Exit.
    pub(crate) fn farewell(&mut self, link: &mut Link) {
        for channel in std::mem::take(&mut self.list) {
            let over = Problem::new(ErrorKind::NotRunning, "the agent ended".into());
            let end = match channel.work {
                Work::Ended(end) => *end,
                Work::Orphan(_) => continue,
                Work::Exec(process) if process.has_ended() => ChannelEnd {
                    how: process.how_it_ended(channel.id).how,
                    ..over.end(channel.id)
                },
                Work::Exec(_) | Work::Put(_) | Work::Get(_) | Work::Forward(_) => over.end(channel.id),
            };
            link.queue(&GuestMessage {
                kind: Some(Say::ChannelEnd(end)),
            });
        }
    }

    /// What to poll for, in the order of [`Self::found`].
    pub(crate) fn ports<'a>(&'a self, port: &mut dyn FnMut(BorrowedFd<'a>, PollFlags)) {
        for channel in &self.list {
            match &channel.work {
                Work::Exec(process) => process.ports(port),
                Work::Forward(tunnel) => tunnel.ports(port),
                Work::Put(_) | Work::Get(_) | Work::Ended(_) | Work::Orphan(_) => {}
            }
        }
    }

    /// What poll found, in the order of [`Self::ports`].
    pub(crate) fn found(&mut self, next: &mut dyn FnMut() -> PollFlags) {
        for channel in &mut self.list {
            match &mut channel.work {
                Work::Exec(process) => process.found(next),
                Work::Forward(tunnel) => tunnel.found(next),
                Work::Put(_) | Work::Get(_) | Work::Ended(_) | Work::Orphan(_) => {}
            }
        }
    }

    /// When to be asked again. Without `may_speak` only what needs no word to the host counts: processes to be killed.
    pub(crate) fn deadline(&self, now: Instant, may_speak: bool) -> Option<Instant> {
        if self.has_more && may_speak {
            return Some(now);
        }
        self.list
            .iter()
            .filter_map(|channel| match &channel.work {
                Work::Exec(process) | Work::Orphan(process) if may_speak || !process.has_ended() => process.deadline(),
                Work::Exec(_) | Work::Orphan(_) | Work::Put(_) | Work::Get(_) | Work::Forward(_) | Work::Ended(_) => {
                    None
                }
            })
            .min()
    }

    pub(crate) fn keep_time(&mut self, now: Instant) {
        for channel in &mut self.list {
            if let Work::Exec(process) | Work::Orphan(process) = &mut channel.work {
                process.keep_time(now);
            }
        }
    }

    /// One round of turns, as far as the link has room. Poll is asked again between two rounds, so that nobody starves.
    pub(crate) fn speak(&mut self, link: &mut Link, now: Instant) {
        self.has_more = false;
        let count = self.list.len();
        let mut over = false;
        for offset in 0..count {
            let at = (self.turn + offset) % count;
            if !link.has_room_for_channels() {
                // Whoever did not get a turn is the first of the next round, which is due as soon as there is room: the
                // link may be flushed right after this, and then nothing else would wake us.
                self.turn = at;
                self.has_more = true;
                break;
            }
            let channel = &mut self.list[at];
            let id = channel.id;
            let said = match &mut channel.work {
                Work::Exec(process) => process.next(id, now),
                Work::Put(receiver) => receiver
                    .credit()
                    .map(Say::Credit)
                    .or_else(|| receiver.end().map(Say::ChannelEnd)),
                Work::Get(sender) => {
                    let said = sender.next();
                    self.has_more |= said.is_none() && sender.has_work();
                    said
                }
                Work::Forward(tunnel) => tunnel.next(id),
                Work::Ended(end) => Some(Say::ChannelEnd((**end).clone())),
                Work::Orphan(_) => None,
            };
            let Some(said) = said else { continue };
            self.has_more = true;
            if matches!(said, Say::ChannelEnd(_)) {
                // An exec that could not start leaves a child that ends by itself; it is reaped like any other.
                channel.id = 0;
                over = true;
            }
            link.queue(&GuestMessage { kind: Some(said) });
        }
        if over {
            self.list
                .retain(|channel| channel.id != 0 || matches!(channel.work, Work::Orphan(_)));
        }
    }
}
