//! A program on a real pseudo-terminal, for tests of `far exec -it`.

// A panic here is the test's report.
#![allow(clippy::missing_panics_doc)]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use far_testkit::{PATIENCE, wait_for};

/// Ctrl-C without a terminal.
///
/// # Panics
/// When there is no kill(1).
pub fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

/// A command on a real pseudo-terminal of its own.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    slave: File,
    child: Child,
    output: mpsc::Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    /// Starts `program` by this command of setsid(1), which makes the terminal the program's own.
    #[must_use]
    pub fn start(mut setsid: Command, program: &Path, args: &[&str]) -> Self {
        let size = nix::pty::Winsize {
            ws_row: 40,
            ws_col: 100,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = nix::pty::openpty(&size, None).expect("a pseudo-terminal");
        let (master, slave) = (File::from(pty.master), File::from(pty.slave));
        let stdio = || Stdio::from(slave.try_clone().expect("a second handle"));
        // setsid(1) makes it the controlling terminal: only then does a new size send SIGWINCH.
        let child = setsid
            .args(["--ctty", "--wait"])
            .arg(program)
            .args(args)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .expect("setsid is there");
        let (send, output) = mpsc::channel();
        let mut reader = master.try_clone().expect("a second handle");
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                if send.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            master,
            slave,
            child,
            output,
            seen: String::new(),
        }
    }

    /// Waits until this text was printed.
    pub fn until(&mut self, text: &str) {
        while !self.seen.contains(text) {
            match self.output.recv_timeout(PATIENCE) {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(_) => panic!("no {text:?} came: {:?}", self.seen),
            }
        }
    }

    /// Types keys.
    pub fn press(&mut self, keys: &[u8]) {
        self.master.write_all(keys).expect("the terminal takes keys");
    }

    /// Gives the terminal another size, as a window does.
    pub fn resize(&self, rows: u32, columns: u32) {
        let path = fs::read_link(format!("/proc/self/fd/{}", self.slave.as_raw_fd())).expect("the terminal's path");
        let done = Command::new("stty")
            .arg("-F")
            .arg(path)
            .args(["rows", &rows.to_string(), "cols", &columns.to_string()])
            .status();
        assert!(done.expect("stty is there").success());
    }

    /// The terminal's settings now.
    #[must_use]
    pub fn settings(&self) -> nix::sys::termios::Termios {
        nix::sys::termios::tcgetattr(&self.slave).expect("a terminal")
    }

    /// The program's end of the terminal, to look at after its end.
    #[must_use]
    pub fn slave(&self) -> File {
        self.slave.try_clone().expect("a second handle")
    }

    /// Waits for the program's end; answers its exit code and everything that was printed.
    #[must_use]
    pub fn code(mut self) -> (i32, String) {
        let code = wait_for("far exec to end", || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status.code().unwrap_or(-1)),
            _ => Err(self.seen.clone()),
        });
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(100)) {
            self.seen += &String::from_utf8_lossy(&bytes);
        }
        (code, self.seen)
    }
}
