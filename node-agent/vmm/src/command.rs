//! A program run to its end with a bound on time and output.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    io::{self, Read},
    os::fd::AsFd,
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// Bytes of output that are kept.
const MAX_OUTPUT: usize = 16 * 1024;

/// What a program printed and how it ended.
pub(crate) struct Ended {
    /// Standard output, its first [`MAX_OUTPUT`] bytes.
    pub(crate) output: Vec<u8>,
    /// `None`: the limit passed and the program was killed.
    pub(crate) status: Option<ExitStatus>,
}

/// Runs `command` until it closes its standard output and ends, at most `limit`; standard error goes nowhere.
pub(crate) fn run_bounded(command: &mut Command, limit: Duration) -> io::Result<Ended> {
    crate::sys::tie_to_this_process(command, None);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdout = child.stdout.take().expect("standard output was asked to be a pipe");
    let deadline = Instant::now() + limit;
    let mut output = Vec::new();
    let finished = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => break false,
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let mut chunk = [0; 4096];
        let count = stdout.read(&mut chunk)?;
        if count == 0 {
            break true;
        }
        let room = MAX_OUTPUT.saturating_sub(output.len());
        output.extend(&chunk[..count.min(room)]);
    };
    // A program that closed its output and lives on is ended too: every program run here ends with its output.
    let ended_by_itself = finished && wait_until(&mut child, deadline)?;
    if !ended_by_itself {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(Ended {
        output,
        status: ended_by_itself.then_some(status),
    })
}

/// True once the child has ended, false at `deadline`.
fn wait_until(child: &mut std::process::Child, deadline: Instant) -> io::Result<bool> {
    loop {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        // Between the closed output and the end of a process are microseconds; poll(2) with no file is a short pause.
        poll(&mut [], PollTimeout::from(2_u8))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_end_are_told() {
        let ended = run_bounded(
            Command::new("sh").args(["-c", "echo hi; exit 3"]),
            Duration::from_secs(60),
        )
        .unwrap();
        assert_eq!(
            (ended.output.as_slice(), ended.status.and_then(|s| s.code())),
            (&b"hi\n"[..], Some(3))
        );
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_at_the_limit() {
        let ended = run_bounded(Command::new("sleep").arg("600"), Duration::from_millis(50)).unwrap();
        assert!(ended.status.is_none());
    }
}
