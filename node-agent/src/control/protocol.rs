//! Order and bounds of a guest's messages. Pure.

use crate::{
    logs::{LogRecord, Stored, Stream},
    outcome::{MAX_MESSAGE, clean_text},
    record::ExitHow,
};
use far_proto::{
    frame::GENERATION,
    guest::{self, GuestMessage, Heartbeat, Hello, Stage, exit::How, guest_message::Kind},
};

/// Longest piece of output in one message, bytes (control.proto).
const MAX_LOG_DATA: usize = 64 << 10;

/// A guest broke the protocol: its connection is cut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest broke the control protocol: {0}")]
pub(crate) struct Violation(pub(crate) String);

pub(crate) fn violation<T>(text: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(text.into()))
}

/// A Hello that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// Hex of the 16 bytes.
    pub(crate) nonce: String,
    pub(crate) stage: Stage,
    pub(crate) init_version: String,
}

/// Checks the first message of a connection.
pub(crate) fn check_hello(message: GuestMessage) -> Result<Greeting, Violation> {
    let Some(Kind::Hello(hello)) = message.kind else {
        return violation("the first message is not Hello");
    };
    let Hello {
        lowest_generation,
        highest_generation,
        boot_nonce,
        init_version,
        stage,
        boot_ns: _,
    } = hello;
    if lowest_generation == 0 || lowest_generation > highest_generation {
        return violation("Hello has no valid range of generations");
    }
    if !(lowest_generation..=highest_generation).contains(&GENERATION) {
        return violation(format!(
            "the guest speaks generations {lowest_generation} to {highest_generation}, this blade speaks {GENERATION}"
        ));
    }
    if boot_nonce.len() != 16 {
        return violation("Hello has no boot nonce of 16 bytes");
    }
    if init_version.len() > 64
        || init_version
            .bytes()
            .any(|byte| !(byte.is_ascii_graphic() || byte == b' '))
    {
        return violation("Hello's version is not at most 64 bytes of printable ASCII");
    }
    match Stage::try_from(stage) {
        Ok(stage @ (Stage::WaitingForConfig | Stage::Running | Stage::Exited)) => Ok(Greeting {
            nonce: hex::encode(boot_nonce),
            stage,
            init_version,
        }),
        Ok(Stage::Unspecified) | Err(_) => violation("Hello has no known stage"),
    }
}

/// What a valid message asks for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Step {
    /// The payload runs; warnings joined for people.
    Ready { message: String },
    /// Store this.
    Log(LogRecord),
    /// The guest lives.
    Heartbeat(Box<Heartbeat>),
    /// Something of a channel, or an answer to a question about the machine.
    Channel(Kind),
    /// The payload ended; complete only when [`Protocol::is_exit_complete`].
    Exit {
        how: ExitHow,
        oom_killed: bool,
        start_error: String,
    },
}

/// Where one connection stands.
#[derive(Debug)]
pub(crate) struct Protocol {
    /// Config and Start were sent (on this or an earlier connection), or the guest's stage says so.
    started: bool,
    is_ready: bool,
    seen: Stored,
    /// Streams of which this connection has not brought anything, of a guest that ran before it. Its first piece may come
    /// after a gap: what an earlier far-node acknowledged and a full disk did not keep exists nowhere any more.
    may_lack: [bool; 2],
    exit_last: Option<Stored>,
}

impl Protocol {
    /// After Hello and Welcome.
    pub(crate) fn new(stage: Stage, stored: Stored) -> Self {
        Self {
            started: stage != Stage::WaitingForConfig,
            is_ready: false,
            seen: stored,
            may_lack: [stage != Stage::WaitingForConfig; 2],
            exit_last: None,
        }
    }

    /// The host sent Start.
    pub(crate) fn note_start(&mut self) {
        self.started = true;
    }

    /// Highest numbers seen.
    #[cfg(test)]
    pub(crate) fn seen(&self) -> Stored {
        self.seen
    }

    /// True once Exit and everything before it arrived.
    pub(crate) fn is_exit_complete(&self) -> bool {
        self.exit_last == Some(self.seen)
    }

    /// Takes the next message.
    pub(crate) fn take(&mut self, message: GuestMessage) -> Result<Step, Violation> {
        match message.kind {
            None => violation("a message of an unknown kind"),
            Some(Kind::Hello(_)) => violation("Hello twice on one connection"),
            Some(Kind::Heartbeat(heartbeat)) => Ok(Step::Heartbeat(Box::new(heartbeat))),
            Some(Kind::Ready(ready)) => self.take_ready(ready),
            Some(Kind::Log(log)) => self.take_log(log),
            Some(Kind::Exit(exit)) => self.take_exit(exit),
            Some(
                kind @ (Kind::Opened(_)
                | Kind::Data(_)
                | Kind::TransferEntry(_)
                | Kind::Credit(_)
                | Kind::ChannelEnd(_)
                | Kind::Done(_)),
            ) => Ok(Step::Channel(kind)),
        }
    }

    fn take_ready(&mut self, ready: guest::Ready) -> Result<Step, Violation> {
        if !self.started {
            return violation("Ready before Start");
        }
        if self.is_ready || self.exit_last.is_some() {
            return violation("Ready twice or after Exit");
        }
        self.is_ready = true;
        let warnings: Vec<_> = ready
            .warnings
            .iter()
            .take(16)
            .map(|warning| clean_text(warning, 256))
            .collect();
        Ok(Step::Ready {
            message: clean_text(&warnings.join("; "), MAX_MESSAGE),
        })
    }

    fn take_log(&mut self, log: guest::Log) -> Result<Step, Violation> {
        if !self.started {
            return violation("Log before Start");
        }
        let stream = match guest::Stream::try_from(log.stream) {
            Ok(guest::Stream::Stdout) => Stream::Stdout,
            Ok(guest::Stream::Stderr) => Stream::Stderr,
            Ok(guest::Stream::Unspecified) | Err(_) => return violation("Log of an unknown stream"),
        };
        let seen = self.seen.of(stream);
        let may_lack = std::mem::take(&mut self.may_lack[stream as usize]);
        let follows = Some(log.seq) == seen.checked_add(1);
        let is_a_loss = may_lack && log.seq > seen;
        if !follows && !is_a_loss {
            return violation(format!("Log number {} of {stream:?} after number {seen}", log.seq));
        }
        if !(1..=MAX_LOG_DATA).contains(&log.data.len()) {
            return violation(format!("Log of {} bytes", log.data.len()));
        }
        if self.exit_last.is_some_and(|last| log.seq > last.of(stream)) {
            return violation("Log after the last one that Exit announced");
        }
        self.seen.set(stream, log.seq);
        Ok(Step::Log(LogRecord {
            stream,
            seq: log.seq,
            time_ns: log.time_unix_ns,
            data: log.data,
        }))
    }

    fn take_exit(&mut self, exit: guest::Exit) -> Result<Step, Violation> {
        if self.exit_last.is_some() {
            return violation("Exit twice on one connection");
        }
        if !self.started && exit.start_error.is_empty() {
            return violation("Exit of a payload before Start");
        }
        let how = match exit.how {
            Some(How::Code(code)) => match u8::try_from(code) {
                Ok(code) => ExitHow::Code(code),
                Err(_) => return violation(format!("Exit with code {code}")),
            },
            Some(How::Signal(signal @ 1..=64)) => ExitHow::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
            Some(How::Signal(signal)) => return violation(format!("Exit with signal {signal}")),
            None => return violation("Exit with neither code nor signal"),
        };
        let last = Stored {
            stdout_seq: exit.last_stdout_seq,
            stderr_seq: exit.last_stderr_seq,
        };
        if last.stdout_seq < self.seen.stdout_seq || last.stderr_seq < self.seen.stderr_seq {
            return violation("Exit announces less output than was sent");
        }
        // A guest says Exit after everything that it still has.
        for stream in [Stream::Stdout, Stream::Stderr] {
            if self.may_lack[stream as usize] {
                self.seen.set(stream, last.of(stream));
            }
        }
        self.exit_last = Some(last);
        Ok(Step::Exit {
            how,
            oom_killed: exit.oom_killed,
            start_error: clean_text(&exit.start_error, MAX_MESSAGE),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use far_proto::guest::{Exit, Log, Ready};
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            lowest_generation: 1,
            highest_generation: 2,
            boot_nonce: vec![7; 16],
            init_version: "far-init 0.1.0".into(),
            stage: Stage::WaitingForConfig.into(),
            boot_ns: 5,
        }
    }

    fn message(kind: Kind) -> GuestMessage {
        GuestMessage { kind: Some(kind) }
    }

    fn log(seq: u64) -> GuestMessage {
        message(Kind::Log(Log {
            stream: 1,
            seq,
            data: b"x".as_slice().into(),
            time_unix_ns: 1,
        }))
    }

    fn exit(code: u32, last_stdout_seq: u64) -> GuestMessage {
        message(Kind::Exit(Exit {
            how: Some(How::Code(code)),
            last_stdout_seq,
            ..Exit::default()
        }))
    }

    fn ready() -> GuestMessage {
        message(Kind::Ready(Ready::default()))
    }

    #[test]
    fn only_a_sound_hello_is_taken() {
        assert!(check_hello(message(Kind::Hello(hello()))).is_ok());
        let bad = [
            Hello {
                lowest_generation: 0,
                ..hello()
            },
            Hello {
                lowest_generation: 3,
                ..hello()
            },
            Hello {
                lowest_generation: 2,
                highest_generation: 9,
                ..hello()
            },
            Hello {
                boot_nonce: vec![],
                ..hello()
            },
            Hello {
                boot_nonce: vec![0; 17],
                ..hello()
            },
            Hello {
                init_version: "a\x1b[0m".into(),
                ..hello()
            },
            Hello {
                init_version: "v".repeat(65),
                ..hello()
            },
            Hello { stage: 0, ..hello() },
            Hello { stage: 99, ..hello() },
        ];
        for hello in bad {
            assert!(check_hello(message(Kind::Hello(hello.clone()))).is_err(), "{hello:?}");
        }
        assert!(check_hello(log(1)).is_err());
        assert!(check_hello(GuestMessage { kind: None }).is_err());
    }

    #[test]
    fn messages_out_of_order_are_violations() {
        let waiting = || Protocol::new(Stage::WaitingForConfig, Stored::default());
        let running = || {
            Protocol::new(
                Stage::Running,
                Stored {
                    stdout_seq: 4,
                    stderr_seq: 0,
                },
            )
        };
        let cases: Vec<(&str, Protocol, Vec<GuestMessage>)> = vec![
            ("Ready before Start", waiting(), vec![ready()]),
            ("Log before Start", waiting(), vec![log(1)]),
            ("forged Exit before Start", waiting(), vec![exit(0, 0)]),
            ("gap", running(), vec![log(5), log(7)]),
            ("backwards", running(), vec![log(4)]),
            ("Ready twice", running(), vec![ready(), ready()]),
            ("Exit twice", running(), vec![exit(0, 4), exit(0, 4)]),
            ("exit code 256", running(), vec![exit(256, 4)]),
            ("Exit forgets output", running(), vec![exit(0, 3)]),
            ("Log after the last", running(), vec![exit(0, 4), log(5)]),
            ("Ready after Exit", running(), vec![exit(0, 4), ready()]),
            ("Hello twice", running(), vec![message(Kind::Hello(hello()))]),
            ("unknown kind", running(), vec![GuestMessage { kind: None }]),
            (
                "signal 0",
                running(),
                vec![message(Kind::Exit(Exit {
                    how: Some(How::Signal(0)),
                    ..Exit::default()
                }))],
            ),
        ];
        for (why, mut protocol, mut messages) in cases {
            let last = messages.pop().unwrap();
            for message in messages {
                protocol.take(message).unwrap();
            }
            assert!(protocol.take(last).is_err(), "{why}");
        }
    }

    #[test]
    fn exit_is_complete_when_the_announced_output_is_there() {
        let mut protocol = Protocol::new(
            Stage::Running,
            Stored {
                stdout_seq: 4,
                stderr_seq: 0,
            },
        );
        protocol.take(log(5)).unwrap();
        protocol.take(exit(0, 6)).unwrap();
        assert!(!protocol.is_exit_complete());
        protocol.take(log(6)).unwrap();
        assert!(protocol.is_exit_complete());
        assert_eq!(protocol.seen().stdout_seq, 6);
    }

    /// The disk was full, output was dropped and acknowledged, and the next far-node does not know of it.
    #[test]
    fn what_was_acknowledged_and_is_lost_is_a_gap_once_and_ends_no_healthy_agent() {
        let resumed = || {
            Protocol::new(
                Stage::Running,
                Stored {
                    stdout_seq: 4,
                    stderr_seq: 0,
                },
            )
        };
        let mut protocol = resumed();
        protocol.take(log(9)).unwrap();
        protocol.take(log(10)).unwrap();
        assert!(protocol.take(log(12)).is_err(), "a second gap is the guest's own");
        let mut protocol = resumed();
        protocol.take(exit(0, 9)).unwrap();
        assert!(protocol.is_exit_complete(), "nothing more comes");
        let mut fresh = Protocol::new(Stage::WaitingForConfig, Stored::default());
        fresh.note_start();
        assert!(
            fresh.take(log(2)).is_err(),
            "nothing can be lost of a payload that just started"
        );
    }

    #[test]
    fn a_payload_that_could_not_be_started_may_end_before_start() {
        let mut protocol = Protocol::new(Stage::WaitingForConfig, Stored::default());
        let exit = Exit {
            how: Some(How::Code(127)),
            start_error: "mounting /dev/vda".into(),
            ..Exit::default()
        };
        assert!(protocol.take(message(Kind::Exit(exit))).is_ok());
    }

    proptest! {
        #[test]
        fn whatever_a_guest_sends_numbers_only_grow_by_one(seqs in proptest::collection::vec(0_u64..6, 0..40)) {
            let mut protocol = Protocol::new(Stage::WaitingForConfig, Stored::default());
            protocol.note_start();
            let mut taken = 0;
            for seq in seqs {
                if protocol.take(log(seq)).is_ok() {
                    taken += 1;
                    prop_assert_eq!(seq, taken);
                }
                protocol.take(message(Kind::Heartbeat(Heartbeat::default()))).unwrap();
            }
        }
    }
}
