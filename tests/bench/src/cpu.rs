//! CPU time of processes, from `/proc` while they run and from wait4(2) when they ended.

use std::fs;

use anyhow::{Context, Result};
use nix::{
    sys::resource::{UsageWho, getrusage},
    unistd::{SysconfVar, sysconf},
};

/// User and system CPU seconds of a live process (proc(5), fields 14 and 15 of `stat`), its waited-for children included
/// (fields 16 and 17).
pub(crate) fn of_process(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name in parentheses may hold spaces: count fields after the last one.
    let rest = text
        .rsplit_once(')')
        .map(|(_, rest)| rest)
        .with_context(|| format!("{path} has no name"))?;
    let ticks: u64 = rest
        .split_whitespace()
        .skip(11)
        .take(4)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick rate")?;
    Ok(ticks as f64 / per_second as f64)
}

/// CPU seconds of this process, all threads.
pub(crate) fn of_self() -> Result<f64> {
    usage(UsageWho::RUSAGE_SELF)
}

/// CPU seconds of this process's ended and waited-for children.
pub(crate) fn of_children() -> Result<f64> {
    usage(UsageWho::RUSAGE_CHILDREN)
}

fn usage(who: UsageWho) -> Result<f64> {
    let usage = getrusage(who)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}
