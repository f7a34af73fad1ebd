//! The blocking client of a control socket.

use super::{ANSWER_LIMIT, ControlError, MAX_ANSWER_BYTES, Request, Status, read_answer, request_line, stream_error};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// Asks one far-vmm; a connection per request, so that neither side keeps state.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the far-vmm that listens on `socket`. Connects with each request.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket it asks.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What is known now.
    ///
    /// # Errors
    /// No far-vmm answered within [`ANSWER_LIMIT`].
    pub fn status(&self) -> Result<Status, ControlError> {
        self.ask(Request::Status, ANSWER_LIMIT)
    }

    /// Waits until the VMM has ended, at most `limit`.
    ///
    /// # Errors
    /// far-vmm is gone, or the limit passed.
    pub fn wait(&self, limit: Duration) -> Result<Status, ControlError> {
        self.ask(Request::Wait, limit)
    }

    /// Asks the VMM to end; far-vmm kills it after 5 s. Returns at once.
    ///
    /// # Errors
    /// No far-vmm answered.
    pub fn stop(&self) -> Result<Status, ControlError> {
        self.ask(Request::Stop, ANSWER_LIMIT)
    }

    /// Kills the VMM. Returns at once; `wait` tells the end.
    ///
    /// # Errors
    /// No far-vmm answered.
    pub fn kill(&self) -> Result<Status, ControlError> {
        self.ask(Request::Kill, ANSWER_LIMIT)
    }

    /// Lets far-vmm go: it kills the VMM if it runs, removes its sockets and ends.
    ///
    /// # Errors
    /// No far-vmm answered.
    pub fn release(&self) -> Result<Status, ControlError> {
        self.ask(Request::Release, ANSWER_LIMIT)
    }

    fn ask(&self, request: Request, limit: Duration) -> Result<Status, ControlError> {
        let failed = |source| stream_error(&self.socket, source);
        let connect = |source| ControlError::Connect {
            socket: self.socket.clone(),
            source,
        };
        let mut stream = UnixStream::connect(&self.socket).map_err(connect)?;
        stream.set_read_timeout(Some(limit)).map_err(failed)?;
        stream.set_write_timeout(Some(ANSWER_LIMIT)).map_err(failed)?;
        stream.write_all(&request_line(request)).map_err(failed)?;
        let mut line = Vec::new();
        BufReader::new(stream.take(MAX_ANSWER_BYTES))
            .read_until(b'\n', &mut line)
            .map_err(failed)?;
        read_answer(&line, &self.socket)
    }
}
