//! The one place with `unsafe`: a daemon is put into a session of its own between fork and exec.
#![allow(unsafe_code)]

use std::{os::unix::process::CommandExt, process::Command};

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
