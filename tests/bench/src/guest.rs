//! What PID 1 of a guest costs: against the same work over tonic, and against inits of the distribution's packages.
//!
//! Everything runs as PID 1 of namespaces made here, so that no machine stands between what is compared. Of a stream or a
//! call both ends are counted: the init's process and this program; what the payload itself uses is not.

mod inits;
mod ours;
pub(crate) mod peer;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};

use crate::report::{Goal, Row};
use inits::Init;
use ours::Guest;
use peer::Tonic;

/// Output that is streamed, bytes.
const FLOOD: u64 = 64 << 20;
const CALLS: u64 = 20_000;
const EXECS: u64 = 100;
const ORPHANS: u64 = 10_000;

/// Static programs of `make guest`.
fn program(name: &str) -> Result<PathBuf> {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| far_testkit::find::cache().join("target"), PathBuf::from);
    let path = target.join("x86_64-unknown-linux-gnu/guest").join(name);
    ensure!(path.is_file(), "{} is missing: `make guest` builds it", path.display());
    Ok(path)
}

/// All rows, `rounds` times interleaved.
pub(crate) fn rows(rounds: usize) -> Result<Vec<Row>> {
    ensure!(nix::unistd::geteuid().is_root(), "root is needed, for namespaces");
    let peers = inits::fetch();
    let mut table = Table::default();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        streams(&mut table)?;
        table.pairs(
            "exec and exit of a program through the init",
            "CPU µs",
            || Ok((ours::execs(EXECS)?, peer::execs(EXECS)?)),
            peer::NAME,
            None,
        )?;
        for peer in &peers {
            compare(&mut table, peer)?;
        }
    }
    let size = |path: &PathBuf| Ok::<_, anyhow::Error>(fs::metadata(path)?.len() as f64);
    let own = size(&program("far-init")?)?;
    for peer in &peers {
        let theirs = peer.path.as_ref().map(size).transpose()?;
        let what = format!("binary, against {}", peer.name);
        table.add(
            &what,
            "bytes",
            (own, theirs),
            Some(peer.name),
            Some(Goal::AtMost(1_300_000.0)),
        );
    }
    Ok(table.rows())
}

fn streams(table: &mut Table) -> Result<()> {
    let mib = (FLOOD >> 20) as f64;
    let logs = || {
        let (mine, theirs) = (ours::flood(FLOOD)?, peer::flood(FLOOD)?);
        Ok((mib / mine, mib / theirs))
    };
    table.pairs(
        "output of the payload, both ends counted",
        "MiB/CPU s",
        logs,
        peer::NAME,
        Some(Goal::RatioAtLeast(2.0)),
    )?;
    let calls = || {
        let (mut guest, mut tonic) = (Guest::start(&["sleep=3600000"])?, Tonic::start()?);
        let (mine, theirs) = (guest.calls(CALLS)?, tonic.calls(CALLS)?);
        guest.end()?;
        Ok((CALLS as f64 / mine, CALLS as f64 / theirs))
    };
    table.pairs(
        "small call and its answer, both ends counted",
        "calls/CPU s",
        calls,
        peer::NAME,
        Some(Goal::RatioAtLeast(2.0)),
    )
}

/// What every init does.
fn compare(table: &mut Table, peer: &Init) -> Result<()> {
    let none = || Ok::<_, anyhow::Error>(None);
    let name = Some(peer.name);
    let resident = (
        ours::resident_kib()?,
        peer.path
            .as_ref()
            .map_or_else(none, |path| inits::resident_kib(path).map(Some))?,
    );
    table.add(
        &format!("resident with a payload, against {}", peer.name),
        "KiB",
        resident,
        name,
        Some(Goal::AtMost(1024.0)),
    );
    let own = ours::system_calls()?;
    let theirs = peer.path.as_ref().map_or_else(none, |path| inits::system_calls(path))?;
    if let Some(own) = own {
        table.add(
            &format!("system calls from exec to payload, against {}", peer.name),
            "calls",
            (own, theirs),
            name,
            Some(Goal::AtMost(80.0)),
        );
    }
    let reaped = (
        ours::orphans(ORPHANS)?,
        peer.path
            .as_ref()
            .map_or_else(none, |path| inits::orphans(path, ORPHANS).map(Some))?,
    );
    table.add(
        &format!("{ORPHANS} orphans reaped, none left, against {}", peer.name),
        "CPU s",
        reaped,
        name,
        None,
    );
    let ended = (
        ours::exit_ms()?,
        peer.path
            .as_ref()
            .map_or_else(none, |path| inits::exit_ms(path).map(Some))?,
    );
    table.add(
        &format!("kill of the payload until the host knows, against {}", peer.name),
        "ms",
        ended,
        name,
        None,
    );
    Ok(())
}

/// CPU seconds of this process so far.
fn own_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// CPU seconds of all threads of a live process, exact to the nanosecond (proc(5), `schedstat`).
fn cpu_of(pid: u32) -> Result<f64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let text = fs::read_to_string(task.path().join("schedstat"))?;
        sum += text
            .split(' ')
            .next()
            .and_then(|ns| ns.parse::<u64>().ok())
            .context("schedstat")?;
    }
    Ok(sum as f64 / 1e9)
}

/// The only child of a process.
fn child_of(pid: u32) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    children
        .split_whitespace()
        .next()
        .context("no child")?
        .parse()
        .context("a pid")
}

fn resident_of(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Waits for what `look` finds; a bound against hanging, never a measurement.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    for _ in 0..60_000 {
        if let Some(found) = look() {
            return Ok(found);
        }
        nix::poll::poll(&mut [], 1_u16)?;
    }
    anyhow::bail!("{what}: not within a minute")
}

/// Calls in a trace of strace(1) from the exec of `init` to the payload's: the init's and its first child's.
fn calls_in(trace: &str, init: &str, skip: impl Fn(&[&str]) -> usize) -> Option<f64> {
    let lines: Vec<(u32, &str)> = trace
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(pid, call)| Some((pid.parse().ok()?, call.trim_start())))
        .collect();
    let begin = format!("execve(\"{init}\"");
    let start = lines.iter().rposition(|(_, call)| call.starts_with(&begin))?;
    let own = lines[start].0;
    // Process ids grow: the parent of the init has a smaller one.
    let child = lines[start..].iter().map(|(pid, _)| *pid).find(|pid| *pid > own)?;
    let mut calls = Vec::new();
    for &(pid, call) in &lines[start + 1..] {
        // The end of a call that was counted, a signal, an exit.
        let is_call = !["<...", "---", "+++"].iter().any(|mark| call.starts_with(mark));
        if is_call && (pid == own || pid == child) {
            calls.push(call);
            if pid == child && call.starts_with("execve(") {
                return Some((calls.len() - skip(&calls)) as f64);
            }
        }
    }
    None
}

#[derive(Default)]
struct Table(Vec<(Row, Option<Goal>)>);

impl Table {
    fn pairs(
        &mut self,
        what: &str,
        unit: &str,
        measure: impl FnOnce() -> Result<(f64, f64)>,
        peer: &str,
        goal: Option<Goal>,
    ) -> Result<()> {
        let (ours, theirs) = measure()?;
        self.add(what, unit, (ours, Some(theirs)), Some(peer), goal);
        Ok(())
    }

    fn add(&mut self, what: &str, unit: &str, round: (f64, Option<f64>), peer: Option<&str>, goal: Option<Goal>) {
        match self.0.iter_mut().find(|(row, _)| row.what == what) {
            Some((row, _)) => row.rounds.push(round),
            None => self.0.push((Row::of(what, unit, vec![round], peer, goal), goal)),
        }
    }

    fn rows(self) -> Vec<Row> {
        let again = |(row, goal): (Row, Option<Goal>)| {
            Row::of(&row.what, &row.unit, row.rounds, row.peer_name.as_deref(), goal)
        };
        self.0.into_iter().map(again).collect()
    }
}
