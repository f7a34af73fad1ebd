//! One live control connection: reads, checks, stores output, acknowledges; writes what the VM task hands it.

use super::{
    channels::Channels,
    listener::Dialled,
    protocol::{Protocol, Step, Violation},
};
use crate::{
    log_sink::LogSink,
    logs::{LogRecord, Stored, Stream},
    metrics::ChannelCounters,
    record::ExitHow,
};
use far_proto::{
    frame::{self, ACK_BYTES, ACK_RECORDS, Decoder, GENERATION},
    guest::{self, GuestMessage, HostMessage, LogAck, Welcome, host_message::Kind},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::mpsc,
    task::JoinHandle,
    time::Instant,
};

/// Unacknowledged output of one stream, bytes (control.proto: 4 KiB to 1 MiB).
const LOG_WINDOW: u32 = 512 << 10;
/// How much is read at once, bytes: output is stored and acknowledged in rounds of about this size.
const READ_STEP: usize = 256 << 10;
/// A guest that takes none of our bytes for so long is cut off; it may dial again.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// A frame that was begun must be whole by then.
const FRAME_LIMIT: Duration = Duration::from_secs(60);
/// Batches of messages that wait to be written.
const OUTBOX: usize = 16;

/// What a session tells its VM task.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    Ready {
        message: String,
    },
    Heartbeat(Box<guest::Heartbeat>),
    /// The exit report arrived.
    Exit {
        how: ExitHow,
        oom_killed: bool,
        start_error: String,
    },
    /// All output that the report announced is stored.
    ExitComplete,
    /// The connection is over; with what the guest did wrong, if that is why.
    Closed(Option<Violation>),
}

/// The VM task's hold on a session. Dropping it cuts the connection.
#[derive(Debug)]
pub(crate) struct Session {
    number: u64,
    outbox: mpsc::Sender<Vec<HostMessage>>,
    channels: Arc<Channels>,
    task: JoinHandle<()>,
}

impl Session {
    /// Says Welcome and begins to listen; events come tagged with `number`.
    pub(crate) fn start(
        number: u64,
        dialled: Dialled,
        log: LogSink,
        heartbeat: Duration,
        counters: ChannelCounters,
        events: mpsc::Sender<(u64, SessionEvent)>,
    ) -> Self {
        let (outbox, inbox) = mpsc::channel(OUTBOX);
        let (channels, data) = Channels::new(counters);
        let table = LostAtTheEnd(channels.clone());
        let task = tokio::spawn(run(number, dialled, log, heartbeat, inbox, (table, data), events));
        Self {
            number,
            outbox,
            channels,
            task,
        }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Exec, cp and port-forward go through these.
    pub(crate) fn channels(&self) -> &Arc<Channels> {
        &self.channels
    }

    /// Hands messages over in order; false where the guest takes nothing any more.
    pub(crate) fn send(&self, messages: Vec<HostMessage>) -> bool {
        self.outbox.try_send(messages).is_ok()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// However the session's task ends, also by abort, the callers of its channels hear of it.
struct LostAtTheEnd(Arc<Channels>);

impl Drop for LostAtTheEnd {
    fn drop(&mut self) {
        self.0.lose();
    }
}

async fn run(
    number: u64,
    dialled: Dialled,
    log: LogSink,
    heartbeat: Duration,
    inbox: mpsc::Receiver<Vec<HostMessage>>,
    (channels, data): (LostAtTheEnd, mpsc::Receiver<HostMessage>),
    events: mpsc::Sender<(u64, SessionEvent)>,
) {
    let stored = log.stored().await;
    let protocol = Arc::new(Mutex::new(Protocol::new(dialled.greeting.stage, stored)));
    let (read, write) = dialled.stream.into_split();
    let (acks, pending_acks) = mpsc::channel(64);
    let welcome = HostMessage {
        kind: Some(Kind::Welcome(Welcome {
            generation: GENERATION,
            stored_stdout_seq: stored.stdout_seq,
            stored_stderr_seq: stored.stderr_seq,
            log_window_bytes: LOG_WINDOW,
            heartbeat_interval_ms: u32::try_from(heartbeat.as_millis()).unwrap_or(u32::MAX),
            answers_heartbeats: true,
        })),
    };
    let tell = |event| {
        let events = events.clone();
        async move { events.send((number, event)).await }
    };
    let violation = tokio::select! {
        violation = read_all(read, dialled.decoder, (&protocol, &channels.0), &log, acks, &tell) => violation,
        () = write_all(write, welcome, inbox, pending_acks, &protocol, (&channels.0, data)) => None,
    };
    drop(channels);
    let _ = tell(SessionEvent::Closed(violation)).await;
}

/// What the guest is answered without anybody else being asked.
enum Answer {
    /// Its output is kept up to here.
    Stored(Stored),
    /// It lives, and so does the connection.
    Heard,
}

/// Output that is stored and not acknowledged.
#[derive(Default)]
struct Unanswered {
    stored: Stored,
    bytes: usize,
    records: usize,
}

impl Unanswered {
    fn add(&mut self, output: &[LogRecord]) {
        self.bytes += output.iter().map(|record| record.data.len()).sum::<usize>();
        self.records += output.len();
    }

    /// What to acknowledge now; `all`: however little it is.
    fn take(&mut self, all: bool) -> Option<Stored> {
        let is_due = self.bytes >= ACK_BYTES || self.records >= ACK_RECORDS || (all && self.records > 0);
        is_due.then(|| {
            (self.bytes, self.records) = (0, 0);
            self.stored
        })
    }
}

fn locked(protocol: &Mutex<Protocol>) -> std::sync::MutexGuard<'_, Protocol> {
    protocol.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read_all<F>(
    mut read: OwnedReadHalf,
    mut decoder: Decoder,
    (protocol, channels): (&Mutex<Protocol>, &Channels),
    log: &LogSink,
    acks: mpsc::Sender<Answer>,
    tell: &impl Fn(SessionEvent) -> F,
) -> Option<Violation>
where
    F: Future<Output = Result<(), mpsc::error::SendError<(u64, SessionEvent)>>>,
{
    let (mut told_complete, mut unanswered) = (false, Unanswered::default());
    // Since when the frame at the decoder's front waits for its rest.
    let mut begun: Option<Instant> = None;
    loop {
        let held = decoder.pending();
        let mut output: Vec<LogRecord> = Vec::new();
        let mut others = Vec::new();
        let mut problem = None;
        loop {
            match decoder.next::<GuestMessage>() {
                Ok(None) => break,
                Ok(Some(message)) => match locked(protocol).take(message) {
                    Ok(Step::Log(record)) => output.push(record),
                    Ok(Step::Heartbeat(heartbeat)) => match others.last_mut() {
                        // Only the newest of several counts.
                        Some(SessionEvent::Heartbeat(last)) => *last = heartbeat,
                        _ => others.push(SessionEvent::Heartbeat(heartbeat)),
                    },
                    Ok(Step::Channel(kind)) => problem = channels.take(kind).err(),
                    Ok(Step::Ready { message }) => others.push(SessionEvent::Ready { message }),
                    Ok(Step::Exit {
                        how,
                        oom_killed,
                        start_error,
                    }) => {
                        others.push(SessionEvent::Exit {
                            how,
                            oom_killed,
                            start_error,
                        });
                    }
                    Err(violation) => problem = Some(violation),
                },
                Err(error) => problem = Some(Violation(error.to_string())),
            }
            if problem.is_some() {
                break;
            }
        }
        if !output.is_empty() {
            unanswered.add(&output);
            unanswered.stored = log.append(output).await;
        }
        let has_beaten = others.iter().any(|event| matches!(event, SessionEvent::Heartbeat(_)));
        if let Some(stored) = unanswered.take(has_beaten)
            && acks.send(Answer::Stored(stored)).await.is_err()
        {
            return None;
        }
        if has_beaten && acks.send(Answer::Heard).await.is_err() {
            return None;
        }
        for event in others {
            tell(event).await.ok()?;
        }
        if !told_complete && locked(protocol).is_exit_complete() {
            told_complete = true;
            tell(SessionEvent::ExitComplete).await.ok()?;
        }
        if problem.is_some() {
            return problem;
        }
        begun = match decoder.pending() {
            0 => None,
            // Nothing was whole yet: each of its bytes on time does not make the frame so.
            left if left == held => begun.or_else(|| Some(Instant::now())),
            _ => Some(Instant::now()),
        };
        let unfinished = || Some(Violation("a frame was begun and not finished".to_owned()));
        let rest = begun.map_or(Duration::MAX, |at| FRAME_LIMIT.saturating_sub(at.elapsed()));
        if rest.is_zero() {
            return unfinished();
        }
        match tokio::time::timeout(rest, read.read_buf(decoder.room(READ_STEP))).await {
            Ok(Ok(0) | Err(_)) => return None,
            Ok(Ok(_)) => {}
            Err(_) => return unfinished(),
        }
    }
}

async fn write_all(
    mut write: OwnedWriteHalf,
    welcome: HostMessage,
    mut inbox: mpsc::Receiver<Vec<HostMessage>>,
    mut acks: mpsc::Receiver<Answer>,
    protocol: &Mutex<Protocol>,
    (channels, mut data): (&Channels, mpsc::Receiver<HostMessage>),
) {
    let mut frames = Vec::new();
    frame::encode(&welcome, &mut frames);
    let mut told = Stored::default();
    loop {
        match tokio::time::timeout(WRITE_LIMIT, write.write_all(&frames)).await {
            Ok(Ok(())) => frames.clear(),
            Ok(Err(_)) | Err(_) => return,
        }
        tokio::select! {
            biased;
            Some(first) = acks.recv() => {
                let (mut stored, mut has_beaten) = (told, false);
                for answer in std::iter::once(first).chain(std::iter::from_fn(|| acks.try_recv().ok())) {
                    match answer {
                        Answer::Stored(newer) => stored = newer,
                        Answer::Heard => has_beaten = true,
                    }
                }
                if has_beaten {
                    let heard = HostMessage { kind: Some(Kind::Heard(guest::Heard {})) };
                    frame::encode(&heard, &mut frames);
                }
                for (stream, wire) in [(Stream::Stdout, guest::Stream::Stdout), (Stream::Stderr, guest::Stream::Stderr)] {
                    if stored.of(stream) != told.of(stream) {
                        let ack = LogAck { stream: wire.into(), seq: stored.of(stream) };
                        frame::encode(&HostMessage { kind: Some(Kind::LogAck(ack)) }, &mut frames);
                    }
                }
                told = stored;
            }
            Some(messages) = inbox.recv() => {
                for message in &messages {
                    if matches!(message.kind, Some(Kind::Start(_))) {
                        locked(protocol).note_start();
                    }
                    frame::encode(message, &mut frames);
                }
            }
            () = channels.due() => channels.write_due(&mut frames),
            Some(message) = data.recv() => {
                // An open goes before what belongs to it.
                channels.write_due(&mut frames);
                frame::encode(&message, &mut frames);
            }
            else => return,
        }
    }
}
