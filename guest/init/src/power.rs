//! The ways out: the console's last line, and the reboot that ends the VM.
//!
//! A guest ends by reboot(RB_AUTOBOOT): QEMU runs with `-no-reboot`, Firecracker ends on the i8042 reset that `reboot=k`
//! on the kernel command line selects. Powering off is not wired up on QEMU's microvm machine.

use crate::{mounts::MountError, place::Place};
use nix::sys::reboot::{RebootMode, reboot};
use std::{
    fs::OpenOptions,
    io::{self, Write},
};

/// What PID 1 cannot go on without. The VM ends without an exit report, which the blade shows as `InitLost`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("watching for the end of children")]
    Signals(#[source] io::Error),
    #[error("waiting for events")]
    Poll(#[source] io::Error),
    #[error("drawing the boot nonce from /dev/urandom")]
    Nonce(#[source] io::Error),
}

/// Opens /dev/console for the standard streams, where the kernel did not: the initramfs has no console node.
pub(crate) fn open_console(place: &Place) {
    if !place.is_guest() {
        return;
    }
    if let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") {
        // Without a console there is nowhere to complain, and nothing needs one.
        let _ = nix::unistd::dup2_stdin(&console);
        let _ = nix::unistd::dup2_stdout(&console);
        let _ = nix::unistd::dup2_stderr(&console);
    }
}

/// Makes a panic end the VM with one line on the console instead of a kernel panic.
pub(crate) fn install_last_word(is_guest: bool) {
    std::panic::set_hook(Box::new(move |panic| {
        say(&format!("panicked: {panic}"));
        if is_guest {
            end_vm();
        }
    }));
}

/// Ends the VM (in a test: the process), after one line when something was fatal.
pub(crate) fn leave(place: &Place, end: Result<(), Fatal>) -> u8 {
    let code = match end {
        Ok(()) => 0,
        Err(fatal) => {
            say(&with_sources(&fatal));
            1
        }
    };
    if place.is_guest() {
        end_vm();
    }
    code
}

/// An error and its sources on one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

/// One line on the console; a console that is gone is no reason to fail.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "far-init: {}", text.replace(['\n', '\r'], " "));
}

fn end_vm() {
    nix::unistd::sync();
    // reboot(2) returns only when it failed.
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    say(&format!("rebooting: {error}"));
}
