//! The control socket of a far-vmm: one JSON object per line each way.
//!
//! ```text
//! {"op":"status"}   what is known now
//! {"op":"wait"}     the same, but answered only when the VMM has ended
//! {"op":"stop"}     the VMM is asked to end (SIGTERM: it flushes its drives), killed after 5 s. The guest itself is asked
//!                   over the control stream before, by far-node: that is not far-vmm's matter
//! {"op":"kill"}     the VMM is killed
//! {"op":"release"}  as kill if it runs; then far-vmm removes its sockets and ends
//! ```
//! Each answer is `{"status":{…}}` or `{"error":"…"}`. The end of the stream before an answer means that far-vmm is gone.

mod client;
mod tokio_client;

pub use client::Client;
pub use tokio_client::AsyncClient;

use crate::exit::ExitRecord;
use serde::{Deserialize, Serialize};
use std::{io, path::PathBuf, time::Duration};

/// Bytes of a request line.
pub(crate) const MAX_REQUEST_BYTES: usize = 1024;
/// Bytes of an answer: an exit record with its console tail, escaped as JSON.
pub(crate) const MAX_ANSWER_BYTES: u64 = 128 * 1024;
/// How long a client waits for an answer that far-vmm can give at once.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// What a client asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// Tell what is known.
    Status,
    /// Tell it when the VMM has ended.
    Wait,
    /// Ask the VMM to end.
    Stop,
    /// End the VMM by force.
    Kill,
    /// Go.
    Release,
}

/// A request's line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RequestLine {
    pub(crate) op: Request,
}

/// What far-vmm answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// As it is now.
    Status(Box<Status>),
    /// The request was not understood.
    Error(String),
}

/// What is known of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `--id` of far-vmm.
    pub vm_id: String,
    /// Where it stands.
    pub state: State,
    /// Process id of far-vmm.
    pub pid: i32,
    /// Process id of the VMM while it runs.
    pub vmm_pid: Option<i32>,
    /// Process id of the vsock daemon while it runs.
    pub vsock_pid: Option<i32>,
    /// `qemu` or `firecracker`; empty while starting.
    pub backend: String,
    /// `kvm` or `tcg`, with the reason; empty while starting.
    pub accel: String,
    /// Network namespace the VMM is in, or `none`.
    pub netns: String,
    /// How its resources are bound beyond its own arguments, for people.
    pub limits: String,
    /// Bytes the console gave so far, kept or not.
    pub console_bytes: u64,
    /// Set once `state` is `ended`.
    pub exit: Option<ExitRecord>,
}

/// Where a VM stands: starting → running → ended. It never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The VMM's process is being prepared.
    Starting,
    /// The VMM's process runs. This says nothing about the guest: only its Hello does.
    Running,
    /// The VMM's process is gone and the exit record is written.
    Ended,
}

/// Why a far-vmm did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens: far-vmm is not there, no longer, or not yet.
    #[error("connecting to the control socket {socket}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It went away before it answered.
    #[error("far-vmm at {socket} went away before it answered")]
    Gone {
        /// The socket.
        socket: PathBuf,
    },
    /// Reading or writing failed, or took too long.
    #[error("talking to far-vmm at {socket}")]
    Io {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It answered something else.
    #[error("far-vmm at {socket} answered: {message}")]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// What it said.
        message: String,
    },
}

impl ControlError {
    /// True where no far-vmm serves this socket (any more).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Connect { source, .. } => {
                matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                )
            }
            Self::Gone { .. } => true,
            Self::Io { .. } | Self::Refused { .. } => false,
        }
    }
}

/// The line of a request.
fn request_line(request: Request) -> Vec<u8> {
    let mut line = serde_json::to_vec(&RequestLine { op: request }).expect("a word has a JSON form");
    line.push(b'\n');
    line
}

/// The status in an answer's line.
fn read_answer(line: &[u8], socket: &std::path::Path) -> Result<Status, ControlError> {
    let refused = |message| ControlError::Refused {
        socket: socket.to_owned(),
        message,
    };
    if !line.ends_with(b"\n") {
        return Err(ControlError::Gone {
            socket: socket.to_owned(),
        });
    }
    match serde_json::from_slice(line) {
        Ok(Answer::Status(status)) => Ok(*status),
        Ok(Answer::Error(message)) => Err(refused(message)),
        Err(error) => Err(refused(format!("no answer of this protocol: {error}"))),
    }
}

/// An error of the stream as a client tells it: a reset is the same as the end of the stream.
fn stream_error(socket: &std::path::Path, source: io::Error) -> ControlError {
    match source.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => ControlError::Gone {
            socket: socket.to_owned(),
        },
        _ => ControlError::Io {
            socket: socket.to_owned(),
            source,
        },
    }
}
