//! The asynchronous client of a control socket. Dropping a call's future drops its connection, and nothing else.

use super::{ANSWER_LIMIT, ControlError, MAX_ANSWER_BYTES, Request, Status, read_answer, request_line, stream_error};
use std::{
    io,
    path::{Path, PathBuf},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::timeout,
};

/// Asks one far-vmm; a connection per request. See [`super::Client`] for what each call does.
#[derive(Debug, Clone)]
pub struct AsyncClient {
    socket: PathBuf,
}

impl AsyncClient {
    /// A client of the far-vmm that listens on `socket`.
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
    pub async fn status(&self) -> Result<Status, ControlError> {
        self.ask_soon(Request::Status).await
    }

    /// Waits until the VMM has ended, without limit. [`ControlError::is_gone`] tells that far-vmm itself went.
    ///
    /// # Errors
    /// far-vmm is gone.
    pub async fn wait(&self) -> Result<Status, ControlError> {
        self.ask(Request::Wait).await
    }

    /// Asks the VMM to end; far-vmm kills it after 5 s.
    ///
    /// # Errors
    /// No far-vmm answered.
    pub async fn stop(&self) -> Result<Status, ControlError> {
        self.ask_soon(Request::Stop).await
    }

    /// Kills the VMM.
    ///
    /// # Errors
    /// No far-vmm answered.
    pub async fn kill(&self) -> Result<Status, ControlError> {
        self.ask_soon(Request::Kill).await
    }

    /// Lets far-vmm go.
    ///
    /// # Errors
    /// No far-vmm answered.
    pub async fn release(&self) -> Result<Status, ControlError> {
        self.ask_soon(Request::Release).await
    }

    async fn ask_soon(&self, request: Request) -> Result<Status, ControlError> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "no answer in time");
        timeout(ANSWER_LIMIT, self.ask(request)).await.unwrap_or_else(|_| {
            Err(ControlError::Io {
                socket: self.socket.clone(),
                source: late(),
            })
        })
    }

    async fn ask(&self, request: Request) -> Result<Status, ControlError> {
        let failed = |source| stream_error(&self.socket, source);
        let connect = |source| ControlError::Connect {
            socket: self.socket.clone(),
            source,
        };
        let mut stream = UnixStream::connect(&self.socket).await.map_err(connect)?;
        stream.write_all(&request_line(request)).await.map_err(failed)?;
        let mut line = Vec::new();
        BufReader::new(stream.take(MAX_ANSWER_BYTES))
            .read_until(b'\n', &mut line)
            .await
            .map_err(failed)?;
        read_answer(&line, &self.socket)
    }
}
