//! The terminal of the caller: raw while a remote program has it, as it was afterwards, and how large it is.

use std::{
    io::{self, IsTerminal},
    os::fd::AsFd,
};

use nix::sys::termios::{self, SetArg, Termios};

use crate::os;

/// Standard input in raw mode: every key, Ctrl-C too, is a byte for the remote program. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    /// `None` where standard input is no terminal.
    pub(crate) fn begin() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing is left to do where the terminal is gone.
        let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}

/// Rows and columns of the caller's terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    os::terminal_size(&io::stdout()).or_else(|| os::terminal_size(&io::stdin()))
}
