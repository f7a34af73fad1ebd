//! The real Kubernetes control plane of `scripts/servers`, one for each that asks, in a folder of its own. It ends when it
//! is dropped, and also when the process that started it is killed: its standard input ends then.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::find;

/// A further part of the control plane, beside etcd and the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Garbage collection, namespaces, service accounts, Deployments.
    ControllerManager,
    /// kube-scheduler, with client limits that do not hold it back.
    Scheduler,
    /// Who asked for what, one JSON object a line: [`ControlPlane::audit_log`].
    AuditLog,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::ControllerManager => "controller-manager",
            Self::Scheduler => "scheduler",
            Self::AuditLog => "audit-log",
        }
    }
}

/// Whether tests are asked to run on the real API server (`FAR_TEST_API=real`) and not on far-devapi.
#[must_use]
pub fn are_asked_for() -> bool {
    env::var_os("FAR_TEST_API").is_some_and(|api| api == "real")
}

/// The folder with `kube` and `kubectl`, built where that was not done yet.
///
/// # Errors
/// What is missing to build it.
pub fn programs() -> Result<PathBuf, String> {
    let output = Command::new(find::repository().join("scripts/servers"))
        .arg("build")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| format!("scripts/servers: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// A running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    /// Its kubeconfig, of an administrator.
    pub kubeconfig: PathBuf,
    /// The kubectl of the same release.
    pub kubectl: PathBuf,
    folder: PathBuf,
    process: Child,
}

impl ControlPlane {
    /// Starts one with its data in `folder`, and answers when its API server is ready.
    ///
    /// # Errors
    /// It cannot be built here, or did not start; the text says where to look.
    pub fn start(folder: &Path, with: &[Part]) -> Result<Self, String> {
        let programs = programs()?;
        let with: Vec<_> = with.iter().map(|part| part.name()).collect();
        let mut process = Command::new(programs.join("kube"))
            .args(["up", "--tied", "--with", &with.join(","), "--dir"])
            .arg(folder)
            // A small heap that is collected all the time is a third of what these cost here.
            .env("GOGC", "400")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("kube up: {error}"))?;
        let mut line = String::new();
        let out = process.stdout.take().ok_or("kube up has no output")?;
        let read = BufReader::new(out).read_line(&mut line);
        let plane = Self {
            kubeconfig: PathBuf::from(line.trim()),
            kubectl: programs.join("kubectl"),
            folder: folder.to_owned(),
            process,
        };
        match read {
            Ok(_) if !line.is_empty() => Ok(plane),
            Ok(_) => Err(format!("kube up did not start: see {}", plane.folder.display())),
            Err(error) => Err(format!("reading from kube up: {error}")),
        }
    }

    /// The file of [`Part::AuditLog`].
    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        self.folder.join("audit.log")
    }

    /// The process id of one of its programs, by its word: `apiserver`, `etcd`, `scheduler`, `controller-manager`.
    #[must_use]
    pub fn pid(&self, program: &str) -> Option<u32> {
        let children = format!("/proc/{0}/task/{0}/children", self.process.id());
        let children = std::fs::read_to_string(children).ok()?;
        children.split_whitespace().find_map(|pid| {
            let raw = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let is_it = raw.split(|byte| *byte == 0).nth(1) == Some(program.as_bytes());
            is_it.then(|| pid.parse().ok()).flatten()
        })
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // Its end: it kills what it started.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}
