//! The host's way into a guest: hybrid vsock, as Firecracker and vhost-device-vsock offer it on the microVM's Unix socket.
//!
//! ```text
//! connect to uds_path ─ "CONNECT <port>\n" ─┬─► "OK <number>\n", then the guest's bytes
//!                                           └─► end of stream without a word: nobody listens there
//! ```
//! The number is the guest's port (vhost-device-vsock) or one of the host's (Firecracker, docs/vsock.md): any u32.
//!
//! Who dials must not hang up before the answer: vhost-device-vsock 0.3 panics when a guest that stood still goes on and the `OK`
//! for it cannot be written (`src/vsock_conn.rs`, `write_all(…).unwrap()`); the microVM then has no vsock any more. So a ping is a
//! process of its own (`far-vmm --ping`), which lives until the guest answers or its microVM ends, whatever becomes of
//! far-node.

use std::{io, path::Path};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Longest answer, bytes: `OK 4294967295\n`.
pub const MAX_ANSWER: usize = 14;
const VERB: &[u8] = b"OK ";

/// Why a guest was not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// The socket is not there, or broke.
    #[error("the microVM's vsock socket is out of order ({0})")]
    Socket(io::ErrorKind),
    /// The end came instead of an answer.
    #[error("nobody listens on this vsock port in the guest")]
    NoListener,
    /// The vsock device said something else than OK and a number.
    #[error(transparent)]
    NotOk(#[from] NotOk),
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error.kind())
    }
}

/// The bytes are no beginning of `OK <number>\n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the microVM's vsock device does not answer with OK and a number")]
pub struct NotOk;

/// The number in the `OK <number>\n` that `bytes` begin with, and how long that line is; `None`: more must come.
///
/// # Errors
/// No continuation can make it such a line. The number is decimal, of a u32, without sign or leading zeros.
pub fn parse_answer(bytes: &[u8]) -> Result<Option<(u32, usize)>, NotOk> {
    let (verb, rest) = bytes.split_at(bytes.len().min(VERB.len()));
    if !VERB.starts_with(verb) {
        return Err(NotOk);
    }
    let mut number: Option<u32> = None;
    for (at, byte) in rest.iter().enumerate() {
        match (byte, number) {
            (b'\n', Some(number)) => return Ok(Some((number, VERB.len() + at + 1))),
            // After a leading zero only the end of the line may come.
            (b'0'..=b'9', None | Some(1..)) => {
                let digit = u32::from(byte - b'0');
                let shifted = number.unwrap_or(0).checked_mul(10);
                number = Some(shifted.and_then(|shifted| shifted.checked_add(digit)).ok_or(NotOk)?);
            }
            _ => return Err(NotOk),
        }
    }
    Ok(None)
}

/// Connects to a port in the guest. Takes as long as the guest does: one that hangs never answers, and hanging up on it is
/// no good (see above).
///
/// # Errors
/// See [`DialError`].
pub async fn dial(uds_path: &Path, port: u32) -> Result<UnixStream, DialError> {
    let mut stream = UnixStream::connect(uds_path).await?;
    // In one write: Firecracker drops a handshake that comes in two.
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let (mut line, mut length) = ([0; MAX_ANSWER], 0);
    loop {
        // Byte by byte: what comes after the line is the caller's.
        if stream.read(&mut line[length..=length]).await? == 0 {
            return Err(DialError::NoListener);
        }
        length += 1;
        // A line of MAX_ANSWER bytes is whole or wrong.
        if parse_answer(&line[..length])?.is_some() {
            return Ok(stream);
        }
    }
}

/// Port, question and answer of Flintlock's guest-agent protocol v1: type, u32 big-endian length, JSON.
const AGENT_PORT: u32 = 1024;
const PING: &[u8] = b"\x01\0\0\0\x19{\"version\":1,\"op\":\"ping\"}";
const PONG: &[u8] = b"\x06\0\0\0\x0a{\"code\":0}";

/// Why a ping was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PingError {
    /// Its port could not be reached.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The connection broke.
    #[error("the connection broke ({0})")]
    Broken(io::ErrorKind),
    /// Something else than the protocol's answer came.
    #[error("it answers what the protocol does not know")]
    NotPong,
}

/// Asks the guest's agent whether it lives. Takes as long as the guest does; costs 15 bytes, whatever it says.
///
/// # Errors
/// See [`PingError`].
pub async fn ping(uds_path: &Path) -> Result<(), PingError> {
    let broken = |error: io::Error| PingError::Broken(error.kind());
    let mut stream = dial(uds_path, AGENT_PORT).await?;
    stream.write_all(PING).await.map_err(broken)?;
    let mut answer = [0; PONG.len()];
    stream.read_exact(&mut answer).await.map_err(broken)?;
    if answer == PONG {
        Ok(())
    } else {
        Err(PingError::NotPong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[test]
    fn only_ok_and_a_u32_is_an_answer() {
        for (text, number, length) in [
            ("OK 0\n", 0, 5),
            ("OK 1024\n", 1024, 8),
            ("OK 1073741824\n", 1 << 30, 14),
            ("OK 4294967295\n", u32::MAX, 14),
            ("OK 7\nOK 8\n", 7, 5),
        ] {
            assert_eq!(parse_answer(text.as_bytes()), Ok(Some((number, length))), "{text:?}");
            // Whatever is cut off has to come yet.
            for end in 0..length {
                assert_eq!(parse_answer(&text.as_bytes()[..end]), Ok(None), "{text:?} up to {end}");
            }
        }
        for bad in [
            "\n",
            "ok 1\n",
            "OK\n",
            "OK\t1\n",
            "OK \n",
            "OK  1\n",
            "OK +1\n",
            "OK -1\n",
            "OK 01\n",
            "OK 00",
            "OK 1 \n",
            "OK 1\r\n",
            "OK 0x1\n",
            "OK 4294967296",
            "OK 99999999999",
            "OK 1\0\n",
            "OK one\n",
            "ERR 1\n",
            "CONNECT 1024\n",
            "\u{ff}",
        ] {
            assert_eq!(parse_answer(bad.as_bytes()), Err(NotOk), "{bad:?}");
        }
    }

    /// A device that says this to whoever connects, and then no more.
    async fn dial_to(answer: &'static [u8]) -> Result<Vec<u8>, DialError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let device = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 64];
            let length = stream.read(&mut asked).await.unwrap();
            assert_eq!(&asked[..length], b"CONNECT 1024\n");
            // The dialler may be gone before it has heard everything.
            let _ = stream.write_all(answer).await;
        };
        let (dialled, ()) = tokio::join!(dial(&path, 1024), device);
        let mut rest = Vec::new();
        dialled?.read_to_end(&mut rest).await?;
        Ok(rest)
    }

    #[tokio::test]
    async fn what_comes_after_the_answer_is_the_callers() {
        assert_eq!(dial_to(b"OK 5\nhello").await, Ok(b"hello".to_vec()));
        assert_eq!(dial_to(b"").await, Err(DialError::NoListener));
        assert_eq!(dial_to(b"OK 5").await, Err(DialError::NoListener));
        assert_eq!(dial_to(b"OK five\n").await, Err(DialError::NotOk(NotOk)));
        assert_eq!(dial_to(&[b'1'; 100_000]).await, Err(DialError::NotOk(NotOk)));
        let nowhere = dial(Path::new("/nowhere/v.sock"), 1).await;
        assert!(matches!(nowhere, Err(DialError::Socket(io::ErrorKind::NotFound))));
    }
}
