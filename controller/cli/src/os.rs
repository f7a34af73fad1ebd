//! The one place with `unsafe`: a daemon is put into a session of its own between fork and exec, and the size of a terminal
//! is asked.
#![allow(unsafe_code)]

use std::{
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Command,
};

/// Makes the command's process the leader of a new session: no terminal, and no Ctrl-C of the caller's.
pub(crate) fn in_own_session(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. setsid(2) is one (signal-safety(7)); reading
    // errno into an io::Error neither allocates nor locks.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() == -1 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        })
    }
}

/// Rows and columns of a terminal; `None` where it is none, or does not know.
pub(crate) fn terminal_size(terminal: &impl AsRawFd) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize (ioctl_tty(2)), and `size` is one that lives over the call.
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (answer == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
