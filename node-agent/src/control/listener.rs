//! Accepts a guest's connections, always: with a full backlog a guest's vsock device would stall its whole VM
//! (Firecracker connects to `v.sock_5000` with a blocking connect on its event thread).

use super::protocol::{Greeting, check_hello};
use crate::sparing::Sparing;
use far_proto::{frame::Decoder, guest::GuestMessage};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

/// From connect to a whole Hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Connections that have not said Hello yet; more are closed at once.
const MAX_HANDSHAKES: usize = 8;
/// A Hello is far shorter, bytes.
const MAX_HELLO: usize = 4 << 10;

/// A connection that said Hello.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) greeting: Greeting,
    pub(crate) stream: UnixStream,
    /// Holds what came after the Hello.
    pub(crate) decoder: Decoder,
}

/// The bound socket of one VM. Dropping it ends the accept loop and removes the socket.
#[derive(Debug)]
pub(crate) struct Listener {
    path: PathBuf,
    dialled: mpsc::Receiver<Dialled>,
    accepting: JoinHandle<()>,
}

impl Listener {
    /// Binds `path`, in place of what a killed run left there.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        crate::files::remove_file(path)?;
        let socket = UnixListener::bind(path)?;
        let (send, dialled) = mpsc::channel(2);
        Ok(Self {
            path: path.to_owned(),
            dialled,
            accepting: tokio::spawn(accept(socket, send)),
        })
    }

    /// The next connection that said Hello. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Dialled> {
        self.dialled.recv().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = crate::files::remove_file(&self.path);
    }
}

async fn accept(socket: UnixListener, dialled: mpsc::Sender<Dialled>) {
    let mut handshakes = JoinSet::new();
    // A guest may dial as often as it likes: its refusals must not fill the blade's log.
    let refusals = Arc::new(Sparing::default());
    loop {
        tokio::select! {
            Some(_) = handshakes.join_next() => {}
            accepted = socket.accept() => match accepted {
                Ok((stream, _)) if handshakes.len() < MAX_HANDSHAKES => {
                    let (dialled, refusals) = (dialled.clone(), refusals.clone());
                    handshakes.spawn(async move {
                        if let Ok(Some(hello)) = tokio::time::timeout(HELLO_LIMIT, read_hello(stream, &refusals)).await {
                            let _ = dialled.send(hello).await;
                        }
                    });
                }
                Ok((stream, _)) => drop(stream),
                // EMFILE and its like: the backlog waits a moment instead of this loop spinning.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
        }
    }
}

async fn read_hello(mut stream: UnixStream, refusals: &Sparing) -> Option<Dialled> {
    let mut decoder = Decoder::new();
    let mut buffer = [0; 1024];
    loop {
        match decoder.next::<GuestMessage>() {
            Ok(Some(message)) => {
                return match check_hello(message) {
                    Ok(greeting) => Some(Dialled {
                        greeting,
                        stream,
                        decoder,
                    }),
                    Err(violation) => {
                        if let Some(refusal) = refusals.next() {
                            tracing::warn!(refusal, error = %violation, "a control connection was refused");
                        }
                        None
                    }
                };
            }
            Ok(None) if decoder.pending() <= MAX_HELLO => {}
            Ok(None) | Err(_) => return None,
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(length) => decoder.push(&buffer[..length]),
        }
    }
}
