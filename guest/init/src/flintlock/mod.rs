//! Flintlock's guest-agent protocol v1 on vsock port 1024, so that Liquid Metal's own tools work on this guest: exec, ping
//! and info. Frames of a type byte, a u32 big-endian length and at most 16 MiB; the first one is a JSON request.
//!
//! ```text
//! Asking --request--> Running (exec) --process ended--> Closing        ping, info, refused: Asking -> Closing
//!                        \-- host gone or time-out: TERM, KILL after 5 s
//! ```
//! Only the host may ask: the payload could reach the port through a local vsock, and would become root by it.

mod json;

use crate::{
    boot::{self, BootReport},
    channels::{
        Ground,
        exec::{self, Process},
    },
    place::Place,
    sys::Ended,
};
use far_proto::guest::{ChannelEnd, ChannelStream, EnvVar, Exec, channel_end::How, guest_message::Kind as Say};
use json::{Json, quoted};
use nix::{
    errno::Errno,
    poll::PollFlags,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, accept4, bind, getpeername,
        listen, socket,
    },
};
use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

/// The port that Flintlock's tools ask.
const PORT: u32 = 1024;
const HOST_CID: u32 = 2;
/// Most connections at once; one more is closed.
const MAX_PEERS: usize = 8;
/// Longest request, bytes. The protocol allows 16 MiB, for which nobody has a use.
const MAX_REQUEST: usize = 256 << 10;
/// The protocol's longest frame, bytes.
const MAX_FRAME: usize = 16 << 20;
const HEADER: usize = 5;
/// More than this waiting to be written: the program's output waits.
const OUT_LIMIT: usize = 64 << 10;
const READ_SIZE: usize = 16 << 10;
/// Most messages of one program before everybody else gets a turn.
const TURNS: usize = 4;
/// How long a connection may take to say what it wants.
const ASK_LIMIT: Duration = Duration::from_secs(30);
/// Longest time-out that is told apart from none, seconds.
const MAX_TIMEOUT_S: i64 = 86_400 * 365;

// Frame types.
const REQUEST: u8 = 1;
const STDIN: u8 = 2;
const STDIN_EOF: u8 = 3;
const STDOUT: u8 = 4;
const STDERR: u8 = 5;
const EXIT: u8 = 6;
const ERROR: u8 = 7;

/// Everybody who asks.
pub(crate) struct Agents {
    listener: Option<OwnedFd>,
    has_callers: bool,
    peers: Vec<Peer>,
}

struct Peer {
    /// `None`: gone; a process may still be on its way out.
    fd: Option<OwnedFd>,
    is_readable: bool,
    inbox: Vec<u8>,
    /// Type and bytes to come of a frame that is passed on as it arrives.
    frame: Option<(u8, usize)>,
    out: Vec<u8>,
    state: State,
    time_out_at: Option<Instant>,
    /// The program has more to say, and the socket may take it.
    has_more: bool,
}

enum State {
    Asking,
    Running(Box<Process>),
    Closing,
}

/// A request that was understood.
#[derive(Debug, PartialEq)]
enum Request {
    Ping,
    Info,
    Exec { exec: Box<Exec>, timeout: Option<Duration> },
}

impl Agents {
    /// Listens; a guest without vsock has no such port, which is worth a warning.
    pub(crate) fn listen(place: &Place, boot: &mut BootReport) -> Self {
        let listener = match place {
            Place::Guest => listen_at(AddressFamily::Vsock, &VsockAddr::new(libc::VMADDR_CID_ANY, PORT)),
            Place::TestRoot(_) => UnixAddr::new(&place.at("/guest-agent.sock"))
                .and_then(|address| listen_at(AddressFamily::Unix, &address)),
        };
        if let Err(errno) = listener {
            boot.warn(["vsock port 1024 (Flintlock's guest agent): ", errno.desc()].concat());
        }
        Self {
            listener: listener.ok(),
            has_callers: false,
            peers: Vec::new(),
        }
    }

    pub(crate) fn ports<'a>(&'a self, port: &mut dyn FnMut(BorrowedFd<'a>, PollFlags)) {
        if let Some(listener) = &self.listener {
            port(listener.as_fd(), PollFlags::POLLIN);
        }
        for peer in &self.peers {
            if let Some((fd, flags)) = peer.interest() {
                port(fd, flags);
            }
            if let State::Running(process) = &peer.state {
                process.ports(port);
            }
        }
    }

    /// Mirrors [`Self::ports`].
    pub(crate) fn found(&mut self, next: &mut dyn FnMut() -> PollFlags) {
        if self.listener.is_some() {
            self.has_callers |= !next().is_empty();
        }
        for peer in &mut self.peers {
            if peer.interest().is_some() {
                peer.is_readable = next().intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR);
            }
            if let State::Running(process) = &mut peer.state {
                process.found(next);
            }
        }
    }

    pub(crate) fn reaped(&mut self, ended: &Ended, now: Instant) {
        for peer in &mut self.peers {
            if let State::Running(process) = &mut peer.state
                && process.pid() == ended.pid
                && !process.has_ended()
            {
                process.reaped(ended.how, now);
            }
        }
    }

    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        if self.peers.iter().any(|peer| peer.has_more) {
            return Some(now);
        }
        self.peers
            .iter()
            .flat_map(|peer| {
                let process = match &peer.state {
                    State::Running(process) => process.deadline(),
                    State::Asking | State::Closing => None,
                };
                [peer.time_out_at, process]
            })
            .flatten()
            .min()
    }

    /// Accepts, reads, runs and answers, as far as nobody has to wait.
    pub(crate) fn work(&mut self, ground: Option<&Ground>, now: Instant) {
        for peer in &mut self.peers {
            peer.work(ground, now);
        }
        self.peers.retain(|peer| !peer.is_over());
        // After those who left made room.
        if std::mem::take(&mut self.has_callers) {
            self.accept(now);
        }
    }

    fn accept(&mut self, now: Instant) {
        let Some(listener) = &self.listener else { return };
        // One at a time: poll tells of the next, and of those who left meanwhile.
        if let Ok(fd) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            let fd = crate::sys::own(fd);
            // A local caller has another number. Unix sockets, in tests, have none.
            let is_host = getpeername::<VsockAddr>(fd.as_raw_fd()).map_or(true, |peer| peer.cid() == HOST_CID);
            if is_host && self.peers.len() < MAX_PEERS {
                self.peers.push(Peer::new(fd, now));
            }
        }
    }
}

fn listen_at(family: AddressFamily, address: &dyn SockaddrLike) -> nix::Result<OwnedFd> {
    let fd = socket(
        family,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    bind(fd.as_raw_fd(), address)?;
    listen(&fd, Backlog::new(8)?)?;
    Ok(fd)
}

impl Peer {
    fn new(fd: OwnedFd, now: Instant) -> Self {
        Self {
            fd: Some(fd),
            is_readable: false,
            inbox: Vec::new(),
            frame: None,
            out: Vec::new(),
            state: State::Asking,
            time_out_at: Some(now + ASK_LIMIT),
            has_more: false,
        }
    }

    fn is_over(&self) -> bool {
        let is_gone = self.fd.is_none() || self.out.is_empty();
        match &self.state {
            State::Asking => self.fd.is_none(),
            State::Running(process) => self.fd.is_none() && process.has_ended(),
            State::Closing => is_gone,
        }
    }

    /// Always polled, because poll then tells of a host that went away.
    fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let mut flags = PollFlags::empty();
        if self.is_listening() {
            flags |= PollFlags::POLLIN;
        }
        if !self.out.is_empty() {
            flags |= PollFlags::POLLOUT;
        }
        Some((self.fd.as_ref()?.as_fd(), flags))
    }

    /// Of what came, at most the beginning of a header is left when the program took everything: its rest is to come.
    fn is_listening(&self) -> bool {
        match &self.state {
            State::Running(process) => self.inbox.len() < HEADER && process.stdin_is_idle(),
            State::Asking | State::Closing => true,
        }
    }

    fn work(&mut self, ground: Option<&Ground>, now: Instant) {
        if std::mem::take(&mut self.is_readable) {
            self.read(now);
        }
        self.digest(ground, now);
        if self.time_out_at.is_some_and(|at| at <= now) {
            self.time_out_at = None;
            self.give_up(now);
        }
        if let State::Running(process) = &mut self.state {
            process.keep_time(now);
        }
        // Before it is asked whether there is room: what was full and is empty after it would be polled for nothing.
        let mut is_there = self.flush();
        for turn in 0.. {
            self.has_more = turn == TURNS;
            if self.has_more || self.out.len() >= OUT_LIMIT || !is_there {
                break;
            }
            let State::Running(process) = &mut self.state else {
                break;
            };
            let Some(said) = process.next(0, now) else { break };
            match said {
                Say::Data(data) => {
                    // The socket's own buffer is the window.
                    let bytes = u32::try_from(data.data.len()).unwrap_or(0);
                    process.credit(data.stream(), bytes);
                    let kind = if data.stream() == ChannelStream::Stderr {
                        STDERR
                    } else {
                        STDOUT
                    };
                    if !data.data.is_empty() {
                        frame(kind, &data.data, &mut self.out);
                    }
                }
                Say::ChannelEnd(end) => self.finish(&end),
                _ => {}
            }
            is_there = self.flush();
        }
        if !is_there {
            self.give_up(now);
        }
    }

    fn read(&mut self, now: Instant) {
        let Some(fd) = &self.fd else { return };
        let mut buffer = vec![0; READ_SIZE];
        match nix::unistd::read(fd, &mut buffer) {
            Ok(count) if count > 0 => {
                if !matches!(self.state, State::Closing) {
                    self.inbox.extend_from_slice(&buffer[..count]);
                }
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(_) | Err(_) => {
                self.fd = None;
                self.give_up(now);
            }
        }
    }

    /// The host is gone, or its time is up.
    fn give_up(&mut self, now: Instant) {
        match &mut self.state {
            State::Asking => self.fd = None,
            State::Running(process) => process.give_up(now),
            State::Closing => {}
        }
    }

    /// Whole requests, and pieces of stdin as far as the program takes them.
    fn digest(&mut self, ground: Option<&Ground>, now: Instant) {
        loop {
            match &mut self.state {
                State::Closing => return self.inbox.clear(),
                State::Asking => {
                    let Some((kind, length)) = self.header() else { return };
                    if kind != REQUEST || length > MAX_REQUEST {
                        return self.refuse("the first frame is not a request of at most 256 KiB", 1);
                    }
                    if self.inbox.len() < HEADER + length {
                        return;
                    }
                    let request = understand(&self.inbox[HEADER..HEADER + length]);
                    self.inbox.drain(..HEADER + length);
                    self.carry_out(request, ground, now);
                }
                State::Running(process) => {
                    if let Some((kind, left)) = self.frame {
                        let count = left.min(self.inbox.len());
                        if left > 0 && (count == 0 || !process.stdin_is_idle()) {
                            return;
                        }
                        if kind == STDIN {
                            // The program took all that came before, and one read is less than what it then may take.
                            process.forget_credit();
                            if process.take(&self.inbox[..count], false).is_err() {
                                self.fd = None;
                                return self.give_up(now);
                            }
                        }
                        self.inbox.drain(..count);
                        self.frame = (left > count).then_some((kind, left - count));
                    } else {
                        let Some((kind, length)) = self.header() else { return };
                        if length > MAX_FRAME {
                            self.fd = None;
                            return self.give_up(now);
                        }
                        self.inbox.drain(..HEADER);
                        if kind == STDIN_EOF
                            && let State::Running(process) = &mut self.state
                        {
                            let _ = process.take(&[], true);
                        }
                        self.frame = Some((kind, length));
                    }
                }
            }
        }
    }

    fn header(&self) -> Option<(u8, usize)> {
        let [kind, length @ ..] = *self.inbox.first_chunk::<HEADER>()?;
        Some((kind, u32::from_be_bytes(length) as usize))
    }

    fn carry_out(&mut self, request: Result<Request, &'static str>, ground: Option<&Ground>, now: Instant) {
        match request {
            Err(text) => self.refuse(text, 1),
            Ok(Request::Ping) => self.close(0),
            Ok(Request::Info) => {
                frame(STDOUT, info().as_bytes(), &mut self.out);
                self.close(0);
            }
            Ok(Request::Exec { exec, timeout }) => {
                let Some(ground) = ground else {
                    return self.refuse("the agent is not running", 126);
                };
                match exec::start(*exec, ground.root, ground.cgroup, ground.companion) {
                    Ok(process) => {
                        self.state = State::Running(Box::new(process));
                        self.time_out_at = timeout.map(|timeout| now + timeout);
                    }
                    Err(problem) => self.refuse(problem.text(), 126),
                }
            }
        }
    }

    fn finish(&mut self, end: &ChannelEnd) {
        if !end.error.is_empty() {
            let text = ["{\"msg\":", &quoted(&end.error), "}"].concat();
            frame(ERROR, text.as_bytes(), &mut self.out);
        }
        self.close(match end.how {
            Some(How::Code(code)) => code,
            Some(How::Signal(signal)) => 128 + signal,
            None => 126,
        });
    }

    fn refuse(&mut self, text: &str, code: u32) {
        let text = ["{\"msg\":", &quoted(text), "}"].concat();
        frame(ERROR, text.as_bytes(), &mut self.out);
        self.close(code);
    }

    fn close(&mut self, code: u32) {
        let text = ["{\"code\":", &code.to_string(), "}"].concat();
        frame(EXIT, text.as_bytes(), &mut self.out);
        self.state = State::Closing;
        self.time_out_at = None;
    }

    /// Writes what the socket takes; `false`: the host is gone.
    fn flush(&mut self) -> bool {
        let Some(fd) = &self.fd else {
            self.out.clear();
            return true;
        };
        let mut written = 0;
        while written < self.out.len() {
            match nix::unistd::write(fd, &self.out[written..]) {
                Ok(count) if count > 0 => written += count,
                Err(Errno::EINTR) => {}
                Ok(_) | Err(Errno::EAGAIN) => break,
                Err(_) => {
                    self.fd = None;
                    return false;
                }
            }
        }
        self.out.drain(..written);
        true
    }
}

fn frame(kind: u8, payload: &[u8], out: &mut Vec<u8>) {
    out.push(kind);
    out.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_be_bytes());
    out.extend_from_slice(payload);
}

/// For the fuzzer.
pub(crate) fn try_request(bytes: &[u8]) {
    let _ = understand(bytes);
}

/// The request's JSON as what is to be done.
fn understand(bytes: &[u8]) -> Result<Request, &'static str> {
    let json = Json::parse(bytes).ok_or("the request is not JSON")?;
    if json.get("version") != &Json::Number(1) {
        return Err("unsupported protocol version, want 1");
    }
    match json.get("op") {
        Json::Text(op) if op == "ping" => Ok(Request::Ping),
        Json::Text(op) if op == "info" => Ok(Request::Info),
        Json::Text(op) if op == "exec" => command(json.get("exec")),
        _ => Err("unknown op"),
    }
}

fn command(json: &Json) -> Result<Request, &'static str> {
    let text = |value: &Json| match value {
        Json::Text(text) => Ok(text.clone()),
        Json::Null => Ok(String::new()),
        _ => Err("exec: a field is not a string"),
    };
    let flag = |value: &Json| match value {
        Json::Bool(flag) => Ok(*flag),
        Json::Null => Ok(false),
        _ => Err("exec: a field is not true or false"),
    };
    let mut argv = vec![text(json.get("cmd"))?];
    match json.get("args") {
        Json::Null => {}
        Json::List(args) => {
            for arg in args {
                argv.push(text(arg)?);
            }
        }
        _ => return Err("exec: args is not a list"),
    }
    if flag(json.get("shell"))? {
        argv = vec!["sh".into(), "-c".into(), argv.join(" ")];
    }
    let env = match json.get("env") {
        Json::Null => Vec::new(),
        Json::Object(vars) => vars
            .iter()
            .map(|(name, value)| {
                Ok(EnvVar {
                    name: name.clone(),
                    value: text(value)?,
                })
            })
            .collect::<Result<_, &str>>()?,
        _ => return Err("exec: env is not an object"),
    };
    let timeout = match json.get("timeout_sec") {
        Json::Null => None,
        Json::Number(seconds) => u64::try_from((*seconds).min(MAX_TIMEOUT_S))
            .ok()
            .filter(|&seconds| seconds > 0)
            .map(Duration::from_secs),
        _ => return Err("exec: timeout_sec is not a number"),
    };
    Ok(Request::Exec {
        exec: Box::new(Exec {
            argv,
            env,
            working_dir: text(json.get("cwd"))?,
            user: text(json.get("user"))?,
            stdin: flag(json.get("has_stdin"))?,
            ..Exec::default()
        }),
        timeout,
    })
}

fn info() -> String {
    let uname = nix::sys::utsname::uname().map_or(String::new(), |name| {
        let part = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
        [part(name.sysname()), part(name.release()), part(name.machine())].join(" ")
    });
    let uptime = (boot::boot_ns() / 1_000_000_000).to_string();
    [
        "{\"version\":",
        &quoted(concat!("far-init ", env!("CARGO_PKG_VERSION"))),
        ",\"uname\":",
        &quoted(&uname),
        ",\"uptime\":",
        &quoted(&[&uptime, "s"].concat()),
        "}",
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_understood_as_the_tools_send_them() {
        assert_eq!(understand(br#"{"version":1,"op":"ping"}"#), Ok(Request::Ping));
        assert_eq!(understand(br#"{"version":1,"op":"info","new":[]}"#), Ok(Request::Info));
        let text = br#"{"version":1,"op":"exec","exec":{"cmd":"ls","args":["-l","/"],"cwd":"/tmp","env":{"A":"b"},"user":"agent","timeout_sec":3,"has_stdin":true}}"#;
        let Ok(Request::Exec { exec, timeout }) = understand(text) else {
            panic!()
        };
        assert_eq!(exec.argv, ["ls", "-l", "/"]);
        assert_eq!(
            (exec.working_dir.as_str(), exec.user.as_str(), exec.stdin),
            ("/tmp", "agent", true)
        );
        assert_eq!((exec.env.len(), timeout), (1, Some(Duration::from_secs(3))));
        let Ok(Request::Exec { exec, timeout: None }) =
            understand(br#"{"version":1,"op":"exec","exec":{"cmd":"echo","args":["a","|","cat"],"shell":true}}"#)
        else {
            panic!()
        };
        assert_eq!(exec.argv, ["sh", "-c", "echo a | cat"]);
        for bad in [
            &b"{}"[..],
            b"no",
            br#"{"version":2,"op":"ping"}"#,
            br#"{"version":1,"op":"reboot"}"#,
            br#"{"version":1,"op":"exec","exec":{"cmd":1}}"#,
            br#"{"version":1,"op":"exec","exec":{"cmd":"a","args":"b"}}"#,
            br#"{"version":1,"op":"exec","exec":{"cmd":"a","env":["A=b"]}}"#,
        ] {
            assert!(understand(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
