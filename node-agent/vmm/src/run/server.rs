//! far-vmm's side of the control socket: a bounded number of connections, one request each, never blocking.

use crate::control::{Answer, MAX_REQUEST_BYTES, Request, RequestLine, Status};
use std::{
    fs, io,
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::FileTypeExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

/// Connections at once. One far-node holds one `wait` per VM and asks one more thing at a time.
const MAX_CLIENTS: usize = 16;

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    waits: bool,
}

/// The listening socket and its connections.
#[derive(Debug)]
pub(crate) struct Server {
    path: PathBuf,
    listener: UnixListener,
    /// A connection keeps its place until it is closed, so that a place names it during one turn of the loop.
    clients: Vec<Option<Client>>,
}

impl Server {
    /// Listens on `path`, mode 0600. A socket left by a far-vmm that was killed is replaced: the folder's lock proves
    /// that nobody serves it.
    pub(crate) fn listen(path: &Path) -> io::Result<Self> {
        remove_socket(path)?;
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            clients: Vec::new(),
        })
    }

    pub(crate) fn listener_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    pub(crate) fn client_fds(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        self.clients
            .iter()
            .enumerate()
            .filter_map(|(place, client)| Some((place, client.as_ref()?.stream.as_fd())))
    }

    pub(crate) fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            let client = Client {
                stream,
                input: Vec::new(),
                waits: false,
            };
            match self.free_place() {
                Some(place) => self.clients[place] = Some(client),
                None => reply(client, &Answer::Error("busy: too many connections".into())),
            }
        }
    }

    /// A place for one more: an unused one, else that of a connection that has asked nothing yet.
    fn free_place(&mut self) -> Option<usize> {
        if let Some(place) = self.clients.iter().position(Option::is_none) {
            return Some(place);
        }
        if self.clients.len() < MAX_CLIENTS {
            self.clients.push(None);
            return Some(self.clients.len() - 1);
        }
        self.clients
            .iter()
            .position(|client| client.as_ref().is_some_and(|client| !client.waits))
    }

    /// Reads from a connection; a whole request is returned, everything else is dealt with here.
    pub(crate) fn read(&mut self, place: usize) -> Option<Request> {
        let client = self.clients.get_mut(place)?.as_mut()?;
        let mut buffer = [0; MAX_REQUEST_BYTES];
        match client.stream.read(&mut buffer) {
            Ok(0) => {
                self.clients[place] = None;
                return None;
            }
            Ok(count) => client.input.extend(&buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return None;
            }
            Err(_) => {
                self.clients[place] = None;
                return None;
            }
        }
        if client.waits {
            client.input.clear(); // one request per connection: more is not listened to
            return None;
        }
        let end = client.input.iter().position(|&byte| byte == b'\n');
        let request = match end {
            None if client.input.len() <= MAX_REQUEST_BYTES => return None,
            None => Err(format!("a request has at most {MAX_REQUEST_BYTES} bytes")),
            Some(end) => serde_json::from_slice::<RequestLine>(&client.input[..end]).map_err(|error| error.to_string()),
        };
        match request {
            Ok(RequestLine { op }) => Some(op),
            Err(message) => {
                self.answer(place, &Answer::Error(message));
                None
            }
        }
    }

    /// Answers and closes a connection.
    pub(crate) fn answer(&mut self, place: usize, answer: &Answer) {
        if let Some(client) = self.clients.get_mut(place).and_then(Option::take) {
            reply(client, answer);
        }
    }

    /// Keeps a connection until [`Server::answer_waiting`].
    pub(crate) fn keep_waiting(&mut self, place: usize) {
        if let Some(client) = self.clients.get_mut(place).and_then(Option::as_mut) {
            client.waits = true;
        }
    }

    pub(crate) fn answer_waiting(&mut self, status: &Status) {
        for client in self
            .clients
            .iter_mut()
            .filter_map(|client| client.take_if(|client| client.waits))
        {
            reply(client, &Answer::Status(Box::new(status.clone())));
        }
    }

    /// Removes the socket's file.
    pub(crate) fn remove_file(&self) -> io::Result<()> {
        remove_socket(&self.path)
    }
}

/// A peer that does not read (its buffer holds more than any answer) loses its answer.
fn reply(mut client: Client, answer: &Answer) {
    if let Ok(mut line) = serde_json::to_vec(answer) {
        line.push(b'\n');
        let _ = client.stream.write_all(&line);
    }
}

/// Removes a socket's file; absent is success; what is no socket is not removed.
pub(crate) fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(data) if !data.file_type().is_socket() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} exists and is no socket", path.display()),
        )),
        Ok(_) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        },
    }
}
