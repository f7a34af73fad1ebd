//! One process of a VM.

use crate::{backend::Program, sys};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::ExitStatusExt,
    },
    process::{Child, Command, ExitStatus, Stdio},
};

/// Most bytes that wait in a pipe: what an unprivileged process may make of it (`/proc/sys/fs/pipe-max-size`, pipe(7)).
const PIPE_BYTES: usize = 1 << 20;

/// A pipe's end that never blocks.
#[derive(Debug)]
pub(crate) struct Pipe(Option<File>);

impl Pipe {
    fn new(end: impl Into<std::os::fd::OwnedFd>) -> io::Result<Self> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let file = File::from(end.into());
        fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self(Some(file)))
    }

    /// `None` after the end of the stream.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// Reads what is there into `take`, at most `bound` bytes, so that one stream cannot starve the others.
    pub(crate) fn read(&mut self, bound: usize, mut take: impl FnMut(&[u8])) {
        let Some(file) = &mut self.0 else { return };
        let mut buffer = [0; 16 * 1024];
        let mut count = 0;
        while count < bound {
            match file.read(&mut buffer) {
                Ok(0) => {
                    self.0 = None;
                    return;
                }
                Ok(bytes) => {
                    take(&buffer[..bytes]);
                    count += bytes;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.0 = None;
                    return;
                }
            }
        }
    }

    /// Reads what an ended process left: a pipe's content and no more, so that whoever still writes holds up nobody.
    pub(crate) fn read_rest(&mut self, take: impl FnMut(&[u8])) {
        self.read(PIPE_BYTES, take);
    }
}

/// A process with its two output pipes.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    pub(crate) stdout: Pipe,
    pub(crate) stderr: Pipe,
}

impl Process {
    /// Starts `program` in `folder` and, if given, in the network namespace `netns`.
    pub(crate) fn spawn(program: &Program, folder: &std::path::Path, netns: Option<File>) -> io::Result<Self> {
        let mut command = Command::new(&program.path);
        command.args(&program.args).current_dir(folder);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Tools may print more than the pipes' readers want, in the user's language, with the user's proxies: none of it
        // concerns a VMM.
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("RUST_LOG", "warn");
        sys::tie_to_this_process(&mut command, netns);
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().expect("standard output was asked to be a pipe");
        let stderr = child.stderr.take().expect("standard error was asked to be a pipe");
        Ok(Self {
            child,
            stdout: Pipe::new(stdout)?,
            stderr: Pipe::new(stderr)?,
        })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal; to a process that has ended and was reaped none is sent.
    pub(crate) fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            // It may end between the two lines: as long as it was not reaped, its number is not given to another.
            let _ = kill(Pid::from_raw(self.pid()), signal);
        }
    }

    /// Kills and reaps it.
    pub(crate) fn kill_and_reap(&mut self) -> io::Result<ExitStatus> {
        self.signal(Signal::SIGKILL);
        self.child.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // On every way out no process of a VM outlives far-vmm, nor stays a zombie.
        let _ = self.kill_and_reap();
    }
}

/// `code 3` or `signal 9`.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_of_a_stream_that_never_runs_dry_is_bounded() {
        let mut endless = Pipe::new(File::open("/dev/zero").unwrap()).unwrap();
        let mut count = 0;
        endless.read_rest(|bytes| {
            count += bytes.len();
            assert!(count <= 2 * PIPE_BYTES, "it is read without end");
        });
        assert_eq!(count, PIPE_BYTES);
    }
}
