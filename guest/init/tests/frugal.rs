//! How many system calls lie between the exec of far-init and the payload's, counted by ptrace(2) in namespaces of its own.
//! Its own program: the tracer waits for every child there is.
//!
//! Left out is what only a test needs: the proof that the namespaces are its own. What only a guest does (cgroup, links,
//! kernel modules, clock) is counted by the guest's kernel in `boot.rs`.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::sandbox::sandbox;
use far_proto::guest::exit::How;
use nix::{
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

/// Goal of the project.
const MAX_CALLS: usize = 80;

/// The calls of far-init and of the payload's process until its exec, by number.
#[derive(Default)]
struct Count {
    init: Option<Pid>,
    /// The first fork of far-init is the payload.
    payload: Option<Pid>,
    calls: Vec<u64>,
    is_over: bool,
}

impl Count {
    fn entered(&mut self, pid: Pid, number: u64) {
        if !self.is_over && (Some(pid) == self.init || Some(pid) == self.payload) {
            self.calls.push(number);
        }
    }

    /// A program begins in `pid`.
    fn executed(&mut self, pid: Pid) {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "far-init" {
            self.init = Some(pid);
            self.calls.clear();
        }
        self.is_over |= Some(pid) == self.payload;
    }

    /// From the start to the first getpid(2), which begins the proof, and from the first mount(2), which follows it.
    fn counted(&self) -> Vec<u64> {
        let (getpid, mount) = (libc::SYS_getpid as u64, libc::SYS_mount as u64);
        let proof = self.calls.iter().position(|&call| call == getpid).unwrap();
        let mounts = self.calls.iter().position(|&call| call == mount).unwrap();
        [&self.calls[..=proof], &self.calls[mounts..]].concat()
    }
}

/// Follows the tracee and everything that it starts to its end.
fn trace(first: Pid) -> Count {
    let mut count = Count::default();
    waitpid(first, None).unwrap();
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(first, options).unwrap();
    ptrace::syscall(first, None).unwrap();
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) if pid == first => return count,
            Ok(WaitStatus::PtraceSyscall(pid)) => {
                if let Ok(info) = ptrace::syscall_info(pid)
                    && info.op == libc::PTRACE_SYSCALL_INFO_ENTRY
                {
                    // SAFETY: the kernel said which member it filled.
                    count.entered(pid, unsafe { info.u.entry.nr });
                }
                let _ = ptrace::syscall(pid, None);
            }
            Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                if event == libc::PTRACE_EVENT_EXEC {
                    count.executed(pid);
                } else if Some(pid) == count.init && count.payload.is_none() {
                    count.payload = ptrace::getevent(pid).ok().map(|child| Pid::from_raw(child as i32));
                }
                let _ = ptrace::syscall(pid, None);
            }
            // The stop of a new process is ptrace's own; other signals are the tracee's.
            Ok(WaitStatus::Stopped(pid, signal)) => {
                let _ = ptrace::syscall(pid, Some(signal).filter(|signal| *signal != Signal::SIGSTOP));
            }
            Ok(_) => {}
            Err(error) => panic!("waitpid: {error}"),
        }
    }
}

#[test]
fn from_exec_to_the_payload_are_at_most_80_system_calls() {
    const NAME: &str = "from_exec_to_the_payload_are_at_most_80_system_calls";
    let Some(mut guest) = sandbox(NAME, &["out=hello", "exit=3"]) else {
        return;
    };
    // The initramfs has the mount points.
    for folder in ["proc", "far/root", "far/scratch"] {
        fs::create_dir_all(guest.folder.path().join(folder)).unwrap();
    }
    guest.blade.config.hostname = "embedder".into();
    let mut command = Command::new("unshare");
    command
        .args(["-mpfu", "--propagation", "private", "--kill-child"])
        .arg(common::guest_programs().unwrap().join("far-init"))
        .arg("--test-root")
        .arg(guest.folder.path())
        .stdin(Stdio::null());
    // SAFETY: between fork and exec only one system call is made.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let blade = &mut guest.blade;
    let (count, exit) = std::thread::scope(|scope| {
        let exit = scope.spawn(|| blade.serve());
        // The trace reaps it.
        #[allow(clippy::zombie_processes)]
        let child = command.spawn().unwrap();
        let count = trace(Pid::from_raw(child.id() as i32));
        (count, exit.join().unwrap().unwrap())
    });
    assert_eq!(exit.how, Some(How::Code(3)));
    assert!(count.is_over, "the payload's exec was seen");
    let calls = count.counted();
    // The conversation comes in as many pieces as the blade makes of it.
    assert!(calls.len() <= MAX_CALLS, "{} calls: {calls:?}", calls.len());
    eprintln!("{} system calls from exec to payload: {calls:?}", calls.len());
}
