//! Inits of the distribution's packages, unpacked into a folder: nothing is installed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use super::{calls_in, child_of, cpu_of, program, resident_of, until};

/// A peer; `path` is `None` where its package cannot be had here.
pub(crate) struct Init {
    pub(crate) name: &'static str,
    pub(crate) path: Option<PathBuf>,
}

const PEERS: [(&str, &str, &str); 2] = [
    ("tini", "tini", "usr/bin/tini-static"),
    ("dumb-init", "dumb-init", "usr/bin/dumb-init"),
];

/// Downloads and unpacks what is not there yet, into the cache.
pub(crate) fn fetch() -> Vec<Init> {
    let folder = far_testkit::find::cache().join("tools/inits");
    let unpack = |package: &str, file: &str| -> Result<PathBuf> {
        let into = folder.join(package);
        let found = into.join(file);
        if !found.is_file() {
            fs::create_dir_all(&into)?;
            let quiet = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status();
            ensure!(
                quiet(Command::new("apt-get").args(["download", package]).current_dir(&into))?.success(),
                "apt-get"
            );
            let archive = fs::read_dir(&into)?.flatten().map(|entry| entry.path());
            let archive = archive
                .filter(|path| path.extension().is_some_and(|end| end == "deb"))
                .last();
            let archive = archive.context("no package came")?;
            ensure!(
                quiet(Command::new("dpkg-deb").arg("-x").arg(archive).arg(&into))?.success(),
                "dpkg-deb"
            );
        }
        let mode = fs::metadata(&found)?.permissions().mode();
        ensure!(mode & 0o111 != 0, "not a program");
        Ok(found)
    };
    PEERS
        .map(|(name, package, file)| Init {
            name,
            path: unpack(package, file).ok(),
        })
        .into()
}

/// The init as PID 1 of its own namespaces, over a payload of these steps.
struct Running(Child);

impl Running {
    fn start(init: &Path, steps: &[String]) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["-mpf", "--mount-proc", "--propagation", "private", "--kill-child"]);
        command
            .arg(init)
            .arg("--")
            .arg(program("far-payload")?)
            .args(steps)
            .stdin(Stdio::null());
        Ok(Self(command.spawn().context("unshare")?))
    }

    /// Once its payload runs.
    fn pids(&self) -> Result<(u32, u32)> {
        let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        until("the payload", || {
            let init = child_of(self.0.id()).ok()?;
            let payload = child_of(init).ok()?;
            name(payload).starts_with("far-payload").then_some((init, payload))
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn resident_kib(init: &Path) -> Result<f64> {
    resident_of(Running::start(init, &["sleep=3600000".into()])?.pids()?.0)
}

/// CPU seconds of the init. The payload says when it is over and then waits, so that the init can still be asked.
pub(crate) fn orphans(init: &Path, count: u64) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let done = folder.path().join("done");
    let steps = [
        format!("orphans={count}"),
        "await-no-zombies".into(),
        format!("write={}:x", done.display()),
        "sleep=3600000".into(),
    ];
    let running = Running::start(init, &steps)?;
    let (pid, _) = running.pids()?;
    until("all orphans reaped", || done.exists().then_some(()))?;
    cpu_of(pid)
}

pub(crate) fn exit_ms(init: &Path) -> Result<f64> {
    let mut running = Running::start(init, &["sleep=3600000".into()])?;
    let (_, payload) = running.pids()?;
    let start = Instant::now();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(payload.cast_signed()),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    running.0.wait()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

pub(crate) fn has_strace() -> bool {
    Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

pub(crate) fn system_calls(init: &Path) -> Result<Option<f64>> {
    if !has_strace() {
        return Ok(None);
    }
    let folder = tempfile::tempdir()?;
    let trace = folder.path().join("trace");
    let mut command = Command::new("strace");
    command
        .arg("-f")
        .arg("-o")
        .arg(&trace)
        .args(["unshare", "-mpf", "--mount-proc", "--propagation", "private"]);
    command
        .arg(init)
        .arg("--")
        .arg(program("far-payload")?)
        .arg("exit=0")
        .stdin(Stdio::null());
    ensure!(command.status()?.success(), "strace of {}", init.display());
    Ok(calls_in(
        &fs::read_to_string(trace)?,
        &init.display().to_string(),
        |_| 0,
    ))
}
