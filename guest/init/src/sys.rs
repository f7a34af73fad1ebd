//! The calls that neither std nor nix offers safely. Every `unsafe` block of this crate is in this file.
#![allow(unsafe_code)]

use bytes::BytesMut;
use nix::unistd::Pid;
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Freed memory that is kept for the next buffer, bytes: a window of output and what waits on the connection.
const KEPT_BYTES: libc::c_int = 1 << 20;

/// What Rust's own start would have done and this program needs: descriptors 0 to 2 are taken, so that nothing opened
/// later is mistaken for a standard stream. `false`: they were not, and lead nowhere now. SIGPIPE needs nothing: the kernel
/// spares a PID 1 every signal that it has no handler for (`SIGNAL_UNKILLABLE`, kernel/signal.c).
pub(crate) fn stand_on_own_feet() -> bool {
    // The kernel opens its console for all three or for none. SAFETY: takes two numbers.
    if unsafe { libc::fcntl(2, libc::F_GETFD) } >= 0 {
        return true;
    }
    loop {
        // SAFETY: the name is a NUL-terminated constant; a descriptor that is not kept below is closed.
        let fd = unsafe { libc::memfd_create(c"none".as_ptr(), 0) };
        if !(0..=2).contains(&fd) {
            // SAFETY: either the descriptor that was just made, or -1, which close(2) refuses.
            unsafe { libc::close(fd) };
            return false;
        }
    }
}

/// How a child ended, with what it and its reaped children used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) pid: Pid,
    pub(crate) how: How,
    pub(crate) user_us: u64,
    pub(crate) system_us: u64,
    /// Peak resident set, KiB.
    pub(crate) max_rss_kib: u64,
}

/// The two ways out of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Exited { code: u32 },
    Signaled { signal: u32, core_dumped: bool },
}

/// Reaps one child that has ended; `None` when no child is waiting to be reaped (or there is none at all).
///
/// # Errors
/// Whatever wait4(2) says except `ECHILD`.
pub(crate) fn reap_one() -> io::Result<Option<Ended>> {
    loop {
        let mut status: libc::c_int = 0;
        // SAFETY: rusage is plain old data for which all-zero is a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to live, writable values of the types wait4(2) fills.
        let pid = unsafe { libc::wait4(-1, &mut status, libc::WNOHANG, &mut usage) };
        if pid < 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECHILD) => return Ok(None),
                _ => return Err(error),
            }
        }
        if pid == 0 {
            return Ok(None);
        }
        let how = if libc::WIFSIGNALED(status) {
            How::Signaled {
                signal: unsigned(libc::WTERMSIG(status)),
                core_dumped: libc::WCOREDUMP(status),
            }
        } else {
            How::Exited {
                code: unsigned(libc::WEXITSTATUS(status)),
            }
        };
        return Ok(Some(Ended {
            pid: Pid::from_raw(pid),
            how,
            user_us: micros(usage.ru_utime),
            system_us: micros(usage.ru_stime),
            max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
        }));
    }
}

fn unsigned(number: libc::c_int) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

fn micros(time: libc::timeval) -> u64 {
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(time.tv_sec)
        .saturating_mul(1_000_000)
        .saturating_add(part(time.tv_usec))
}

/// How a child differs from its parent from its first instruction on, clone3(2).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Birth<'a> {
    /// In a mount namespace of its own.
    pub(crate) own_mounts: bool,
    /// In this cgroup, a folder of the hierarchy.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// Forks; the child runs `child`, which ends in exec or in the returned exit code, and never comes back.
///
/// # Errors
/// Whatever clone3(2) says.
pub(crate) fn fork_into(birth: Birth<'_>, child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: clone_args is plain old data for which all-zero is a value.
    let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
    how.exit_signal = libc::SIGCHLD as u64;
    if birth.own_mounts {
        how.flags |= libc::CLONE_NEWNS as u64;
    }
    if let Some(folder) = birth.cgroup {
        // CLONE_INTO_CGROUP, include/uapi/linux/sched.h; libc's constant is too narrow for it.
        how.flags |= 0x2_0000_0000;
        how.cgroup = folder.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and a stack this is fork(2): the child goes on with a copy of everything. The C library does
    // not hear of it, which matters to threads and to handlers of pthread_atfork; this program has neither, so the child
    // may do everything the parent may, allocation included.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const how, size_of::<libc::clone_args>()) } {
        0 => {
            let code = child();
            // SAFETY: ends the process at once; no destructor of the parent's state runs twice.
            unsafe { libc::_exit(code) }
        }
        pid if pid > 0 => Ok(Pid::from_raw(pid as libc::pid_t)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Reads once, at most `limit` bytes, into a vector of its own, which is as long as what came: no byte is written twice.
///
/// # Errors
/// Whatever read(2) says.
pub(crate) fn read_some(fd: &impl AsRawFd, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes: Vec<u8> = Vec::with_capacity(limit);
    // SAFETY: the kernel writes at most `limit` bytes to memory that the vector owns.
    let got = unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), limit) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel wrote so many of them, and they are within the capacity.
    unsafe { bytes.set_len(got) };
    if got < limit / 2 {
        bytes.shrink_to_fit();
    }
    Ok(bytes)
}

/// Reads once to the end of `buffer`, as much as it has room for without growing; answers how many bytes. A buffer without
/// room gives 0, as the end of a stream does.
///
/// # Errors
/// Whatever read(2) says.
pub(crate) fn read_into(fd: &impl AsRawFd, buffer: &mut BytesMut) -> io::Result<usize> {
    let held = buffer.len();
    let room = buffer.spare_capacity_mut();
    // SAFETY: the kernel writes at most that many bytes to spare memory of the buffer.
    let got = unsafe { libc::read(fd.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel wrote so many bytes behind those that were held.
    unsafe { buffer.set_len(held + got) };
    Ok(got)
}

/// From now on freed memory is kept until [`trim_memory`]: giving each buffer's pages back at once, as the C library does
/// beyond 128 KiB, makes the kernel clear new ones for the next. mallopt(3).
pub(crate) fn keep_memory() {
    for what in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: sets a number of the allocator; nothing else runs yet.
        unsafe { libc::mallopt(what, KEPT_BYTES) };
    }
}

/// Gives memory that nobody uses back to the kernel, malloc_trim(3).
pub(crate) fn trim_memory() {
    // SAFETY: touches only what the allocator itself holds.
    unsafe { libc::malloc_trim(0) };
}

/// Random bytes that need not wait for the kernel's generator to be seeded: `false` where there are none yet.
pub(crate) fn random_now(bytes: &mut [u8]) -> bool {
    // SAFETY: the kernel writes at most `bytes.len()` bytes to the live slice.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    usize::try_from(got) == Ok(bytes.len())
}

/// Memory of the machine that nothing uses, bytes; 0 when unknown.
pub(crate) fn free_memory_bytes() -> u64 {
    // SAFETY: sysinfo is plain old data for which all-zero is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the live, writable value.
    if unsafe { libc::sysinfo(&raw mut info) } == 0 {
        info.freeram.saturating_mul(u64::from(info.mem_unit))
    } else {
        0
    }
}

/// Gives the payload what a fresh process has: no blocked signal.
///
/// # Errors
/// Whatever sigprocmask(2) says.
pub(crate) fn reset_signals() -> io::Result<()> {
    Ok(nix::sys::signal::SigSet::empty().thread_set_mask()?)
}

/// Sends any signal number, real-time ones included, which nix's enum does not name.
///
/// # Errors
/// Whatever kill(2) says.
pub(crate) fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory of ours.
    if unsafe { libc::kill(pid.as_raw(), signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Makes the terminal behind `fd` the controlling one of this process's new session (ioctl_tty(2), `TIOCSCTTY`).
///
/// # Errors
/// Whatever the ioctl says.
pub(crate) fn take_terminal(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the request takes a number, not a pointer.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Unlocks the pseudo-terminal whose master is `master` and opens its other end, without any path.
///
/// # Errors
/// Whatever the ioctls say; a file that is no terminal's master is `ENOTTY`.
pub(crate) fn open_peer(master: &impl AsRawFd) -> io::Result<OwnedFd> {
    let unlocked: libc::c_int = 0;
    // SAFETY: the kernel reads one int from the pointer.
    checked(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the request takes open flags, not a pointer.
    let peer = checked(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(peer) })
}

/// Sets the size of a pseudo-terminal; the kernel tells its foreground processes by SIGWINCH.
///
/// # Errors
/// Whatever the ioctl says.
pub(crate) fn set_terminal_size(master: &impl AsRawFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one winsize from the pointer.
    checked(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

/// The foreground process group of a pseudo-terminal, asked through its master.
pub(crate) fn foreground_of(master: &impl AsRawFd) -> Option<Pid> {
    let mut group: libc::pid_t = 0;
    // SAFETY: the kernel writes one pid_t to the pointer.
    checked(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPGRP, &mut group) }).ok()?;
    (group > 1).then(|| Pid::from_raw(group))
}

/// Takes over a descriptor that a call of nix returned as a bare number.
pub(crate) fn own(fd: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: callers pass what accept4(2) just made for them, which nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Makes the kernel's generator take what the pool holds now (random(4), `RNDRESEEDCRNG`).
///
/// # Errors
/// Whatever the ioctl says.
pub(crate) fn reseed_generator(random: &std::fs::File) -> io::Result<()> {
    // _IO('R', 0x07), include/uapi/linux/random.h.
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    // SAFETY: the request takes no argument.
    checked(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// Longest piece of entropy credited in one call, bytes; the contract's limit for `Config.entropy`.
pub(crate) const MAX_ENTROPY: usize = 512;

/// Adds `bytes` to the kernel's random pool and credits all their bits (random(4), `RNDADDENTROPY`).
///
/// # Errors
/// Whatever the ioctl says.
pub(crate) fn credit_entropy(random: &std::fs::File, bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; MAX_ENTROPY],
    }
    let length = bytes.len().min(MAX_ENTROPY);
    let mut info = PoolInfo {
        entropy_count: (length * 8) as libc::c_int,
        buf_size: length as libc::c_int,
        buf: [0; MAX_ENTROPY],
    };
    info.buf[..length].copy_from_slice(&bytes[..length]);
    // _IOW('R', 0x03, int[2]), include/uapi/linux/random.h.
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    // SAFETY: the kernel reads the two counts and `buf_size` bytes behind them, all of which `info` holds.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &info) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
