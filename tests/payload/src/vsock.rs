//! What a hostile guest can do to its blade over vsock: the payload of a microVM is root and dials whatever it likes.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::Duration,
};

/// The blade, vsock(7).
const HOST: u32 = 2;
/// far-node's control port.
const CONTROL: u32 = 5000;

/// A connection that is being made.
fn dial(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers.
    let fd = unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a value of this plain data.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (HOST, port);
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: a live address of the length that is told.
    if unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) } == 0 {
        return Ok(fd);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(fd),
        error => Err(error),
    }
}

/// What poll(2) says of it within the time: `POLLOUT` alone is a connection.
fn events(fd: &OwnedFd, ms: i32) -> i16 {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut poll, 1, ms) };
    poll.revents
}

/// Dials the control port again and again and keeps every connection, without a word.
pub(crate) fn flood(count: u64) -> Result<(), String> {
    let limit = libc::rlimit {
        rlim_cur: count + 64,
        rlim_max: count + 64,
    };
    // SAFETY: the kernel reads one rlimit.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    let mut kept = Vec::new();
    for n in 0..count {
        match dial(CONTROL) {
            Ok(fd) => kept.push(fd),
            // The kernel's own bound: the next ones wait for it.
            Err(_) => pause(10),
        }
        if n % 500 == 0 {
            kept.last().map(|fd| events(fd, 200));
        }
    }
    writeln!(io::stdout(), "dialled {count} times").map_err(|error| error.to_string())
}

/// Tries ports that are not the control port.
pub(crate) fn scan(count: u64) -> Result<(), String> {
    let ports = (0..u32::MAX).step_by(usize::try_from(u64::from(u32::MAX) / count.max(1)).unwrap_or(1).max(1));
    let dialled: Vec<_> = ports
        .filter(|port| *port != CONTROL)
        .filter_map(|port| dial(port).ok())
        .collect();
    let reached = dialled.iter().filter(|fd| events(fd, 5) == libc::POLLOUT).count();
    writeln!(io::stdout(), "reached {reached} of {} other ports", dialled.len()).map_err(|error| error.to_string())
}

/// Speaks nonsense on the control port: lengths of 4 GiB and 0, half a frame, an endless number, another VM's Exit.
pub(crate) fn nonsense() -> Result<(), String> {
    let exit_before_hello = [0, 0, 0, 4, 0x2a, 2, 8, 0];
    let endless = [&[0, 0, 0, 20][..], &[0xff; 20]].concat();
    for words in [&[0xff; 4][..], &[0; 4], &[0, 0, 1, 0, 10], &endless, &exit_before_hello] {
        let fd = dial(CONTROL).map_err(|error| error.to_string())?;
        events(&fd, 2000);
        // The blade may be quicker with its answer, which is to hang up.
        let _ = File::from(fd.try_clone().map_err(|error| error.to_string())?).write_all(words);
        pause(50);
    }
    writeln!(io::stdout(), "spoke nonsense").map_err(|error| error.to_string())
}

/// Between two attempts there is nothing to wait for.
#[allow(clippy::disallowed_methods)]
fn pause(ms: u64) {
    thread::sleep(Duration::from_millis(ms));
}
