//! Channels of one control connection: exec, put, get and forward, with credit both ways.
//!
//! ```text
//! call of the node API ── Channel::next ◄── inbox (bounded by credit) ◄── take ◄── session's reader
//!                      └─ Sender::send ──► outbox, 16 messages ───────► session's writer ◄─ due: opens, credit, closes
//! ```
//! The reader never waits here: what a guest may send of a stream is bounded by the credit it was given, and credit is
//! given back only when the caller took the bytes. So a slow caller holds up its own channel, never the session or the
//! logs. The writer takes opens, credit and closes from the table, where each channel has room for one of each.
//!
//! Invariant: numbers are not reused while a connection lives, so what crosses an end never meets another channel.

use super::{
    inbox::Inbox,
    protocol::{Violation, violation},
};
use crate::{
    metrics::{ChannelCounters, ChannelKind},
    outcome::clean_text,
};
use far_proto::{
    frame::{self, CHANNEL_WINDOW, MAX_CHANNELS},
    guest::{
        self, ChannelEnd, ChannelStream, Close, Credit, Data, HostMessage, TransferEntry, TransferKind,
        channel_end::How, guest_message, host_message::Kind,
    },
};
use prost::Message;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, mpsc, oneshot};

/// What a guest may send of one stream before the caller took it, bytes. With [`MAX_CHANNELS`] of two streams each this
/// bounds what one VM makes its blade keep: 8 MiB of data, or 16 MiB of the smallest entries (see [`Inbox`]).
pub(crate) const WINDOW: usize = 64 << 10;
/// Credit is given back in steps of this size, bytes.
const STEP: usize = 16 << 10;
/// Data that waits to be written.
const OUTBOX: usize = 16;
/// Questions about the machine (SetTime, Freeze …) without an answer.
const MAX_ASKS: usize = 8;
/// Longest error text of a guest (control.proto), bytes.
const MAX_ERROR: usize = 1 << 10;
/// Longest path in a transfer (control.proto), bytes.
const MAX_PATH: usize = 4095;

/// What comes out of a channel.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Incoming {
    Opened {
        pid: u32,
    },
    Data {
        stream: ChannelStream,
        data: Vec<u8>,
        last: bool,
    },
    Entry(TransferEntry),
    /// The last thing of a channel.
    End(ChannelEnd),
    /// The connection is over; nothing is resumed.
    Lost,
}

/// Why no channel was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("{MAX_CHANNELS} exec, cp and port-forward calls are open on this agent, its limit")]
    TooMany,
    #[error("the control connection to the agent was lost")]
    Lost,
}

/// The channel takes nothing any more: it ended, or its connection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Over;

#[derive(Debug, Default)]
struct Flow {
    /// What the guest may still send.
    credit: usize,
    /// What the caller took, to be given back.
    owed: usize,
    /// `last` came.
    is_over: bool,
}

#[derive(Debug)]
struct State {
    /// Sent by the writer before anything else of this channel.
    request: Option<HostMessage>,
    inbox: Inbox,
    /// Guest to host: stdout or the only one, and stderr.
    flows: [Flow; 2],
    /// Host to guest: sent, and not given back.
    in_flight: usize,
    is_opened: bool,
    /// Get: a file's data is on its way.
    in_file: bool,
    has_entry: bool,
    /// The caller left; what comes is dropped.
    is_left: bool,
    is_close_sent: bool,
    /// ChannelEnd came, or the connection was lost.
    is_over: bool,
}

#[derive(Debug)]
struct Shared {
    number: u32,
    kind: ChannelKind,
    state: Mutex<State>,
    /// Something came.
    readable: Notify,
    /// Credit came, or the end.
    writable: Notify,
}

impl Shared {
    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.readable.notify_one();
        self.writable.notify_one();
    }
}

#[derive(Debug, Default)]
struct Table {
    open: BTreeMap<u32, Arc<Shared>>,
    last_number: u32,
    asks: BTreeMap<u64, oneshot::Sender<String>>,
    last_ask: u64,
    requests: VecDeque<HostMessage>,
    is_lost: bool,
}

/// All channels of one connection.
#[derive(Debug)]
pub(crate) struct Channels {
    table: Mutex<Table>,
    due: Notify,
    outbox: mpsc::Sender<HostMessage>,
    counters: ChannelCounters,
}

impl Channels {
    /// The channels of a new connection, and what its writer sends of them.
    pub(crate) fn new(counters: ChannelCounters) -> (Arc<Self>, mpsc::Receiver<HostMessage>) {
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let channels = Self {
            table: Mutex::default(),
            due: Notify::new(),
            outbox,
            counters,
        };
        (Arc::new(channels), messages)
    }

    fn locked(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are open.
    pub(crate) fn count(&self) -> usize {
        self.locked().open.len()
    }

    // ---- for callers ----

    /// Opens a channel; `request` makes the first message from its number.
    pub(crate) fn open(
        self: &Arc<Self>,
        kind: ChannelKind,
        request: impl FnOnce(u32) -> Kind,
    ) -> Result<Channel, OpenError> {
        let mut table = self.locked();
        if table.is_lost {
            return Err(OpenError::Lost);
        }
        if table.open.len() >= MAX_CHANNELS {
            self.counters.refused.inc();
            return Err(OpenError::TooMany);
        }
        let number = loop {
            table.last_number = table.last_number.wrapping_add(1).max(1);
            if !table.open.contains_key(&table.last_number) {
                break table.last_number;
            }
        };
        // Given with the opening: the contract's first window is smaller than ours.
        let flow = || Flow {
            credit: CHANNEL_WINDOW,
            owed: WINDOW - CHANNEL_WINDOW,
            is_over: false,
        };
        let flows = match kind {
            ChannelKind::Exec => [flow(), flow()],
            ChannelKind::Get | ChannelKind::Forward => [flow(), Flow::default()],
            ChannelKind::Put => [Flow::default(), Flow::default()],
        };
        let shared = Arc::new(Shared {
            number,
            kind,
            state: Mutex::new(State {
                request: Some(HostMessage {
                    kind: Some(request(number)),
                }),
                inbox: Inbox::default(),
                flows,
                in_flight: 0,
                is_opened: false,
                in_file: false,
                has_entry: false,
                is_left: false,
                is_close_sent: false,
                is_over: false,
            }),
            readable: Notify::new(),
            writable: Notify::new(),
        });
        table.open.insert(number, shared.clone());
        drop(table);
        self.counters.opened(kind);
        self.due.notify_one();
        Ok(Channel {
            sender: Sender {
                channels: self.clone(),
                shared,
            },
        })
    }

    /// Asks something of the machine; the answer is the guest's error text, empty when it was done. A lost connection
    /// drops the answer.
    pub(crate) fn ask(&self, request: impl FnOnce(u64) -> Kind) -> Result<oneshot::Receiver<String>, OpenError> {
        let mut table = self.locked();
        if table.is_lost {
            return Err(OpenError::Lost);
        }
        if table.asks.len() >= MAX_ASKS {
            return Err(OpenError::TooMany);
        }
        table.last_ask += 1;
        let (send, answer) = oneshot::channel();
        let id = table.last_ask;
        table.asks.insert(id, send);
        table.requests.push_back(HostMessage {
            kind: Some(request(id)),
        });
        drop(table);
        self.due.notify_one();
        Ok(answer)
    }

    /// Stops everything in the guest but its init: the moment for a snapshot.
    ///
    /// # Errors
    /// What the guest says, or that its connection was lost.
    // Used by sleep and snapshots, which come later; tested with the fake guest.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) async fn freeze(&self) -> Result<(), String> {
        self.asked(|id| Kind::Freeze(guest::Freeze { id })).await
    }

    /// Lets everything go on.
    ///
    /// # Errors
    /// As [`Channels::freeze`].
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) async fn thaw(&self) -> Result<(), String> {
        self.asked(|id| Kind::Thaw(guest::Thaw { id })).await
    }

    async fn asked(&self, request: impl FnOnce(u64) -> Kind) -> Result<(), String> {
        let answer = self.ask(request).map_err(|error| error.to_string())?;
        match answer.await {
            Ok(error) if error.is_empty() => Ok(()),
            Ok(error) => Err(error),
            Err(_) => Err(OpenError::Lost.to_string()),
        }
    }

    // ---- for the session's writer ----

    /// Completes when [`Channels::write_due`] has something. Cancel-safe.
    pub(crate) async fn due(&self) {
        self.due.notified().await;
    }

    /// Appends the frames of all opens, credit and closes that are due.
    pub(crate) fn write_due(&self, frames: &mut Vec<u8>) {
        let mut table = self.locked();
        for message in table.requests.drain(..) {
            frame::encode(&message, frames);
        }
        table.open.retain(|_, shared| {
            let mut state = shared.locked();
            if let Some(request) = state.request.take() {
                if state.is_left {
                    // Never told to the guest: nothing will end it.
                    self.counters.ended(shared.kind);
                    return false;
                }
                frame::encode(&request, frames);
            }
            let is_left = state.is_left;
            for (index, flow) in state.flows.iter_mut().enumerate() {
                let is_wanted = flow.owed >= STEP && !flow.is_over && !is_left;
                if is_wanted {
                    flow.credit += flow.owed;
                    let credit = Credit {
                        channel: shared.number,
                        stream: stream_of(shared.kind, index).into(),
                        bytes: u32::try_from(std::mem::take(&mut flow.owed)).unwrap_or(u32::MAX),
                    };
                    frame::encode(
                        &HostMessage {
                            kind: Some(Kind::Credit(credit)),
                        },
                        frames,
                    );
                }
            }
            if is_left && !state.is_close_sent {
                state.is_close_sent = true;
                let close = Close { channel: shared.number };
                frame::encode(
                    &HostMessage {
                        kind: Some(Kind::Close(close)),
                    },
                    frames,
                );
            }
            true
        });
    }

    // ---- for the session's reader ----

    /// Takes a guest's message about a channel. Never waits.
    pub(crate) fn take(&self, kind: guest_message::Kind) -> Result<(), Violation> {
        use guest_message::Kind;
        match kind {
            Kind::Opened(opened) => self.on(opened.channel, |shared, state| {
                if state.is_opened || !matches!(shared.kind, ChannelKind::Exec | ChannelKind::Forward) {
                    return violation("Opened of a channel that is open, or has none");
                }
                state.is_opened = true;
                state.push(guest_message::Kind::Opened(opened));
                Ok(())
            }),
            Kind::Data(data) => self.on(data.channel, |shared, state| state.take_data(shared.kind, data)),
            Kind::TransferEntry(entry) => self.on(entry.channel, |shared, state| {
                if shared.kind != ChannelKind::Get {
                    return violation("TransferEntry outside of a Get");
                }
                state.take_entry(entry)
            }),
            Kind::Credit(credit) => self.on(credit.channel, |_, state| {
                let bytes = usize::try_from(credit.bytes).unwrap_or(usize::MAX);
                if bytes == 0 || bytes > state.in_flight {
                    return violation(format!("Credit of {bytes} bytes where {} were sent", state.in_flight));
                }
                state.in_flight -= bytes;
                Ok(())
            }),
            Kind::ChannelEnd(end) => self.take_end(end),
            Kind::Done(done) => match self.locked().asks.remove(&done.id) {
                Some(asked) => {
                    let _ = asked.send(clean_text(&done.error, MAX_ERROR)); // The asker may have gone away.
                    Ok(())
                }
                None => violation("Done of what was never asked"),
            },
            Kind::Hello(_) | Kind::Ready(_) | Kind::Log(_) | Kind::Heartbeat(_) | Kind::Exit(_) => Ok(()),
        }
    }

    /// Messages of channels that are not open crossed their end: dropped.
    fn on(&self, number: u32, act: impl FnOnce(&Shared, &mut State) -> Result<(), Violation>) -> Result<(), Violation> {
        let Some(shared) = self.locked().open.get(&number).cloned() else {
            return Ok(());
        };
        let before;
        let result = {
            let mut state = shared.locked();
            if state.request.is_some() {
                return Ok(()); // Not told to the guest yet: it means another one.
            }
            before = state.received();
            let result = act(&shared, &mut state);
            self.counters
                .received
                .inc_by(before.saturating_sub(state.received()) as u64);
            result
        };
        shared.wake();
        result
    }

    fn take_end(&self, mut end: ChannelEnd) -> Result<(), Violation> {
        let mut table = self.locked();
        let Some(shared) = table.open.get(&end.channel).cloned() else {
            return Ok(());
        };
        let mut state = shared.locked();
        if state.request.is_some() {
            return Ok(());
        }
        match (&end.how, shared.kind) {
            (Some(How::Code(0..=255)) | Some(How::Signal(1..=64)), ChannelKind::Exec) | (None, _) => {}
            _ => return violation("ChannelEnd with an impossible code or signal"),
        }
        end.error = clean_text(&end.error, MAX_ERROR);
        table.open.remove(&end.channel);
        state.is_over = true;
        state.push(guest_message::Kind::ChannelEnd(end));
        drop(state);
        self.counters.ended(shared.kind);
        shared.wake();
        Ok(())
    }

    /// The connection is over: every channel ends, and no new one opens.
    pub(crate) fn lose(&self) {
        let mut table = self.locked();
        table.is_lost = true;
        table.asks.clear();
        table.requests.clear();
        for shared in std::mem::take(&mut table.open).into_values() {
            let mut state = shared.locked();
            state.is_over = true;
            drop(state);
            self.counters.ended(shared.kind);
            shared.wake();
        }
    }
}

/// Index into `flows` is 0 for stdout or the only stream, 1 for stderr.
fn stream_of(kind: ChannelKind, index: usize) -> ChannelStream {
    match (kind, index) {
        (ChannelKind::Exec, 0) => ChannelStream::Stdout,
        (ChannelKind::Exec, _) => ChannelStream::Stderr,
        _ => ChannelStream::Unspecified,
    }
}

impl State {
    fn push(&mut self, kind: guest_message::Kind) {
        if !self.is_left {
            self.inbox.push(kind);
        }
    }

    /// Credit that is left: goes down by what is received.
    fn received(&self) -> usize {
        self.flows.iter().map(|flow| flow.credit).sum()
    }

    fn spend(&mut self, index: usize, cost: usize) -> Result<(), Violation> {
        let flow = &mut self.flows[index];
        match flow.credit.checked_sub(cost) {
            Some(rest) => flow.credit = rest,
            None => return violation(format!("{cost} bytes where {} were allowed", flow.credit)),
        }
        Ok(())
    }

    fn take_data(&mut self, kind: ChannelKind, data: Data) -> Result<(), Violation> {
        let index = match (kind, ChannelStream::try_from(data.stream)) {
            (ChannelKind::Exec, Ok(ChannelStream::Stdout))
            | (ChannelKind::Get | ChannelKind::Forward, Ok(ChannelStream::Unspecified)) => 0,
            (ChannelKind::Exec, Ok(ChannelStream::Stderr)) => 1,
            _ => return violation("Data of a stream that this channel does not have"),
        };
        let is_ready = if kind == ChannelKind::Get {
            self.in_file
        } else {
            self.is_opened
        };
        if !is_ready {
            return violation("Data before Opened or outside of a file");
        }
        let (length, last) = (data.data.len(), data.last);
        if length > CHANNEL_WINDOW || (length == 0 && !last) {
            return violation(format!("Data of {length} bytes"));
        }
        if self.flows[index].is_over {
            return violation("Data after the last");
        }
        self.spend(index, length)?;
        if kind == ChannelKind::Get {
            self.in_file = !last;
        } else {
            self.flows[index].is_over = last;
        }
        self.push(guest_message::Kind::Data(data));
        Ok(())
    }

    fn take_entry(&mut self, entry: TransferEntry) -> Result<(), Violation> {
        if self.in_file {
            return violation("TransferEntry inside of a file");
        }
        if !is_sound_below(&entry.path) || entry.path.is_empty() == self.has_entry || entry.mode > 0o777 {
            return violation("TransferEntry with a path or mode that no transfer has");
        }
        match entry.kind() {
            TransferKind::File => self.in_file = true,
            TransferKind::Folder => {}
            TransferKind::Symlink if (1..=MAX_PATH).contains(&entry.target.len()) && !entry.target.contains('\0') => {}
            TransferKind::Symlink | TransferKind::End | TransferKind::Unspecified => {
                return violation("TransferEntry of a kind that Get does not have");
            }
        }
        self.has_entry = true;
        self.spend(0, entry.encoded_len())?;
        self.push(guest_message::Kind::TransferEntry(entry));
        Ok(())
    }
}

/// Empty, or a normalised relative path.
pub(crate) fn is_sound_below(path: &str) -> bool {
    path.is_empty()
        || path.len() <= MAX_PATH
            && !path.contains('\0')
            && path
                .split('/')
                .all(|part| !part.is_empty() && part != "." && part != ".." && part.len() <= 255)
}

/// The caller's end of a channel. Dropping it gives the channel up.
#[derive(Debug)]
pub(crate) struct Channel {
    sender: Sender,
}

impl Channel {
    /// What sends into this channel, to be used beside [`Channel::next`].
    pub(crate) fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// The next thing. After `End` or `Lost` only `Lost`. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Incoming {
        let Sender { channels, shared } = &self.sender;
        loop {
            {
                let mut state = shared.locked();
                if let Some(kind) = state.inbox.pop() {
                    let (index, cost, incoming) = taken(kind);
                    state.flows[index].owed += cost;
                    if state.flows[index].owed >= STEP {
                        channels.due.notify_one();
                    }
                    return incoming;
                }
                if state.is_over {
                    return Incoming::Lost;
                }
            }
            shared.readable.notified().await;
        }
    }
}

/// Of which flow it is, what its sender gets back for it, and what the caller gets.
fn taken(kind: guest_message::Kind) -> (usize, usize, Incoming) {
    use guest_message::Kind;
    match kind {
        Kind::Opened(opened) => (0, 0, Incoming::Opened { pid: opened.pid }),
        Kind::Data(Data { stream, data, last, .. }) => {
            let stream = ChannelStream::try_from(stream).unwrap_or_default();
            let index = usize::from(stream == ChannelStream::Stderr);
            (index, data.len(), Incoming::Data { stream, data, last })
        }
        Kind::TransferEntry(entry) => (0, entry.encoded_len(), Incoming::Entry(entry)),
        Kind::ChannelEnd(end) => (0, 0, Incoming::End(end)),
        // Nothing else is put into an inbox.
        Kind::Hello(_)
        | Kind::Ready(_)
        | Kind::Log(_)
        | Kind::Heartbeat(_)
        | Kind::Exit(_)
        | Kind::Credit(_)
        | Kind::Done(_) => (0, 0, Incoming::Lost),
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let Sender { channels, shared } = &self.sender;
        let mut state = shared.locked();
        state.is_left = true;
        state.inbox.clear();
        drop(state);
        channels.due.notify_one();
        shared.wake();
    }
}

/// Sends into a channel. Use one at a time: order is the caller's.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    channels: Arc<Channels>,
    shared: Arc<Shared>,
}

impl Sender {
    /// Sends bytes as credit allows; `last` with the last of them.
    pub(crate) async fn send(&self, stream: ChannelStream, data: &[u8], last: bool) -> Result<(), Over> {
        let mut rest = data;
        loop {
            let room = self.room(rest.len().min(1)).await?.min(rest.len());
            let (now, later) = rest.split_at(room);
            rest = later;
            self.shared.locked().in_flight += now.len();
            self.channels.counters.sent.inc_by(now.len() as u64);
            self.post(Kind::Data(Data {
                channel: self.shared.number,
                stream: stream.into(),
                data: now.to_vec(),
                last: last && rest.is_empty(),
            }))
            .await?;
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    /// Sends the next entry of a Put, which costs credit as data does.
    pub(crate) async fn send_entry(&self, mut entry: TransferEntry) -> Result<(), Over> {
        entry.channel = self.shared.number;
        let cost = entry.encoded_len();
        self.room(cost).await?;
        self.shared.locked().in_flight += cost;
        self.post(Kind::TransferEntry(entry)).await
    }

    /// Sends what costs no credit, once the channel works; `make` gets the channel's number.
    pub(crate) async fn tell(&self, make: impl FnOnce(u32) -> Kind) -> Result<(), Over> {
        self.room(0).await?;
        self.post(make(self.shared.number)).await
    }

    /// Waits until the channel works and for at least `least` bytes of credit; answers what there is.
    async fn room(&self, least: usize) -> Result<usize, Over> {
        loop {
            {
                let state = self.shared.locked();
                if state.is_over || state.is_left {
                    return Err(Over);
                }
                let room = CHANNEL_WINDOW.saturating_sub(state.in_flight);
                // A program or connection that does not exist yet takes nothing; files have no Opened.
                if room >= least && (state.is_opened || self.shared.kind == ChannelKind::Put) {
                    return Ok(room);
                }
            }
            self.shared.writable.notified().await;
        }
    }

    async fn post(&self, kind: Kind) -> Result<(), Over> {
        let message = HostMessage { kind: Some(kind) };
        self.channels.outbox.send(message).await.map_err(|_| Over)
    }
}
