//! The calls that have no safe form: the only module with `unsafe`.

#![allow(
    unsafe_code,
    reason = "each block proves its call; the rest of the crate denies unsafe code"
)]

use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::{SigSet, SigmaskHow, Signal, sigprocmask},
    },
    unistd::{Pid, getpid, getppid},
};
use std::{fs::File, io, os::unix::process::CommandExt, process::Command};

/// Makes a command's child die with this process, start with no blocked signal, and run in `netns` if given.
///
/// PR_SET_PDEATHSIG follows the thread that forks, so commands must be spawned by the main thread, which lives as long
/// as the process (prctl(2)).
pub(crate) fn tie_to_this_process(command: &mut Command, netns: Option<File>) {
    let parent = getpid();
    // SAFETY: between fork and exec the closure makes only system calls (prctl, getppid, sigprocmask, setns), which are
    // async-signal-safe, and allocates nothing: the errors it makes are plain error numbers.
    unsafe {
        command.pre_exec(move || prepare_child(parent, netns.as_ref()));
    }
}

fn prepare_child(parent: Pid, netns: Option<&File>) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have died before the line above: then nobody would end this child.
    if getppid() != parent {
        return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    if let Some(netns) = netns {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
    }
    Ok(())
}

/// Closes every file descriptor above standard error: far-vmm outlives its parent and must not keep its files open.
/// Only for the first lines of `main`, before anything was opened.
pub fn close_inherited_files() {
    // SAFETY: close_range takes three integers; closing descriptors is sound because nothing in this process owns one
    // above 2 yet (the caller's promise: first lines of `main`). A kernel before 5.9 answers ENOSYS, which is harmless.
    unsafe {
        nix::libc::syscall(nix::libc::SYS_close_range, 3_u32, u32::MAX, 0_u32);
    }
}

/// The time stamp counter.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp_counter() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}
