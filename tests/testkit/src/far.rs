//! A whole FAR on this machine, in folders of its own: API, controller, node agent, microVMs.
//!
//! Owns its folders and everything that runs in them. [`Far::stop`] ends it the way a user does (`far down`) and checks
//! that nothing is left; a panicking test is cleaned up the hard way, with its logs printed.

use std::{
    fs,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{find, images, processes, wait_for};

/// What differs from `far up` with its defaults.
#[derive(Debug, Default, Clone)]
pub struct Options {
    /// Another boot kit than the project's own.
    pub boot_kit: Option<PathBuf>,
    /// Additional environment of every command, for example shorter limits.
    pub env: Vec<(String, String)>,
    /// Run everything as this user instead of the caller (needs root).
    pub user: Option<u32>,
    /// Run everything in this network namespace, as if it were a machine's own.
    pub netns: Option<PathBuf>,
}

/// The result of one command, as text.
#[derive(Debug, Clone)]
pub struct Run {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    fn of(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The output of a command that must succeed.
    ///
    /// # Panics
    /// When it did not; prints both streams.
    #[must_use]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }

    /// Both streams of a command that must fail.
    ///
    /// # Panics
    /// When it succeeded.
    #[must_use]
    pub fn err(self) -> String {
        assert_ne!(self.code, 0, "expected a failure, got stdout: {}", self.stdout);
        self.stdout + &self.stderr
    }
}

/// A running FAR.
#[derive(Debug)]
pub struct Far {
    dir: TempDir,
    options: Options,
    tools: Tools,
    stopped: bool,
}

/// The files that this FAR runs from.
#[derive(Debug)]
struct Tools {
    binaries: PathBuf,
    vhost_vsock: PathBuf,
    boot_kit: PathBuf,
    payload: PathBuf,
    guest: PathBuf,
}

impl Tools {
    /// Where the build left them.
    fn built(options: &Options) -> Result<Self, String> {
        let kit = find::boot_kit()?;
        Ok(Self {
            binaries: find::binaries(),
            vhost_vsock: vhost_vsock(),
            guest: kit.join("tiffany-vm.oci.tar"),
            boot_kit: options.boot_kit.clone().unwrap_or(kit),
            payload: images::payload_archive()?,
        })
    }

    /// Copies below `folder`, for a user who may not look into the builder's home.
    fn copied_to(self, folder: &Path) -> Self {
        let copy = |from: &Path, to: PathBuf| {
            fs::create_dir_all(to.parent().expect("copies lie in a folder")).expect("the test's folder is writable");
            fs::copy(from, &to).unwrap_or_else(|error| panic!("copying {}: {error}", from.display()));
            to
        };
        let binaries = folder.join("bin");
        for name in [
            "far",
            "kubectl-far",
            "far-devapi",
            "far-controller",
            "far-node",
            "far-vmm",
        ] {
            copy(&self.binaries.join(name), binaries.join(name));
        }
        let kit = folder.join("kit");
        for name in ["vmlinux", "initramfs.cpio"] {
            copy(&self.boot_kit.join(name), kit.join(name));
        }
        Self {
            vhost_vsock: copy(&self.vhost_vsock, binaries.join("vhost-device-vsock")),
            guest: copy(&self.guest, kit.join("tiffany-vm.oci.tar")),
            payload: copy(&self.payload, kit.join("payload.oci.tar")),
            boot_kit: kit,
            binaries,
        }
    }
}

impl Far {
    /// Starts API, controller and node agent with `far up` and loads the payload image and the project's guest image.
    ///
    /// # Errors
    /// What this machine lacks, for a skip by name.
    ///
    /// # Panics
    /// When everything is there and it does not start.
    pub fn start(options: Options) -> Result<Self, String> {
        let tools = Tools::built(&options)?;
        // Short, because socket paths end at 107 bytes.
        let dir = tempfile::Builder::new()
            .prefix("fe")
            .tempdir_in("/tmp")
            .expect("/tmp is writable");
        let tools = if let Some(user) = options.user {
            std::os::unix::fs::chown(dir.path(), Some(user), Some(user))
                .expect("chown needs root, and so does Options::user");
            tools.copied_to(dir.path())
        } else {
            tools
        };
        let far = Self {
            dir,
            options,
            tools,
            stopped: false,
        };
        let _ = far.far(&["up"]).ok();
        for (archive, reference) in [
            (&far.tools.payload, images::PAYLOAD),
            (&far.tools.guest, "ghcr.io/microscaler/tiffany-vm:v0.3.1"),
        ] {
            let _ = far
                .far(&["image", "load", &archive.to_string_lossy(), "--as", reference])
                .ok();
        }
        Ok(far)
    }

    /// The folder of this FAR.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Runs `far` with these arguments.
    #[must_use]
    pub fn far(&self, args: &[&str]) -> Run {
        self.run(self.command(&self.tools.binaries.join("far")).args(args), "")
    }

    /// Runs `far` with text on its standard input.
    #[must_use]
    pub fn far_with(&self, args: &[&str], input: &str) -> Run {
        self.run(self.command(&self.tools.binaries.join("far")).args(args), input)
    }

    /// Runs the real kubectl against this FAR's API.
    ///
    /// # Panics
    /// When there is no kubectl; ask [`find::kubectl`] first and skip by name.
    #[must_use]
    pub fn kubectl(&self, args: &[&str]) -> Run {
        self.kubectl_with(args, "")
    }

    /// As [`Far::kubectl`], with text on its standard input.
    ///
    /// # Panics
    /// When there is no kubectl.
    #[must_use]
    pub fn kubectl_with(&self, args: &[&str], input: &str) -> Run {
        let kubectl = find::kubectl().expect("the test asked for kubectl first");
        self.run(self.command(&kubectl).args(args), input)
    }

    /// Applies a manifest by `far apply`.
    pub fn apply(&self, manifest: &str) {
        let _ = self.far_with(&["apply", "-f", "-"], manifest).ok();
    }

    /// A command in this FAR's environment.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = match &self.options.netns {
            None => Command::new(program),
            Some(netns) => {
                // Becomes the program.
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", netns.display())).arg(program);
                command
            }
        };
        let at = |name: &str| self.dir.path().join(name);
        command
            .env("FAR_STATE", at("state"))
            .env("FAR_RUN", at("run"))
            .env("FAR_BOOT_KIT", &self.tools.boot_kit)
            .env("KUBECONFIG", at("state").join("kubeconfig"))
            .env("HOME", at("home"))
            .env("FAR_VHOST_DEVICE_VSOCK", &self.tools.vhost_vsock)
            .env("PATH", path_with(&self.tools.binaries))
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command.envs(self.options.env.iter().map(|(name, value)| (name, value)));
        if let Some(user) = self.options.user {
            command.uid(user).gid(user);
        }
        command
    }

    fn run(&self, command: &mut Command, input: &str) -> Run {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let text = input.to_owned();
        // Written beside the reading: a command that answers before it has read all would block both.
        let writer = std::thread::spawn(move || {
            let _ = stdin.write_all(text.as_bytes());
        });
        let output = child.wait_with_output().expect("the command's pipes are ours");
        let _ = writer.join();
        Run::of(&output)
    }

    /// The FarAgent as the API has it; `Null` when there is none.
    #[must_use]
    pub fn agent(&self, name: &str) -> Value {
        let run = self.far(&["get", "faragent", name, "-o", "json"]);
        if run.code == 0 {
            serde_json::from_str(&run.stdout).expect("far get -o json prints JSON")
        } else {
            Value::Null
        }
    }

    /// Waits until the agent's status passes `wanted`, and answers the agent.
    pub fn wait_agent(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(&format!("{name} {what}"), || {
            let agent = self.agent(name);
            if wanted(&agent["status"]) {
                Ok(agent)
            } else {
                Err(agent["status"].to_string())
            }
        })
    }

    /// Waits for a final phase.
    pub fn wait_end(&self, name: &str) -> Value {
        self.wait_agent(name, "to end", |status| {
            matches!(status["phase"].as_str(), Some("Completed" | "Failed"))
        })
    }

    /// Waits for this phase.
    pub fn wait_phase(&self, name: &str, phase: &str) -> Value {
        self.wait_agent(name, phase, |status| status["phase"] == phase)
    }

    /// Pid of a daemon ("far-devapi", "far-controller", "far-node") or helper ("qemu-system-x86_64") of this FAR.
    #[must_use]
    pub fn pid_of(&self, program: &str) -> Option<u32> {
        self.processes()
            .into_iter()
            .find(|process| runs(&process.command, program))
            .map(|process| process.pid)
    }

    /// Everything of this FAR that runs.
    #[must_use]
    pub fn processes(&self) -> Vec<processes::Process> {
        processes::mentioning(self.dir.path())
    }

    /// Ends one of this FAR's processes by SIGKILL and waits until it is gone.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&self, program: &str) {
        let pid = self
            .pid_of(program)
            .unwrap_or_else(|| panic!("{program} does not run: {:?}", self.processes()));
        kill(pid);
        wait_for(&format!("{program} ({pid}) to be gone"), || {
            if processes::is_alive(pid) {
                Err("still there".into())
            } else {
                Ok(())
            }
        });
    }

    /// Starts again what is dead, as a user would.
    pub fn up_again(&self) {
        let _ = self.far(&["up"]).ok();
    }

    /// Waits until no microVM and no file of one is left.
    ///
    /// # Panics
    /// When something stays.
    pub fn nothing_of_a_vm_is_left(&self) {
        wait_for("no VM process and no VM folder", || {
            let left: Vec<_> = self
                .processes()
                .into_iter()
                .filter(|process| {
                    ["far-vmm", "qemu-system-x86_64", "vhost-device-vsock"]
                        .iter()
                        .any(|name| runs(&process.command, name))
                })
                .collect();
            let folders: Vec<_> = fs::read_dir(self.dir.path().join("run/vm"))
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect();
            if left.is_empty() && folders.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?} {folders:?}"))
            }
        });
    }

    /// Ends everything with `far down` and checks that no process and no socket is left.
    ///
    /// # Panics
    /// When something stays.
    pub fn stop(mut self) {
        let _ = self.far(&["down"]).ok();
        wait_for("no process of this FAR", || {
            let left = self.processes();
            if left.is_empty() {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            }
        });
        let sockets = sockets_below(self.dir.path());
        assert!(sockets.is_empty(), "far down left sockets: {sockets:?}");
        self.stopped = true;
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        if std::thread::panicking() {
            self.print_logs();
        }
        for process in self.processes() {
            kill(process.pid);
        }
    }
}

impl Far {
    fn print_logs(&self) {
        for entry in fs::read_dir(self.dir.path().join("state/logs"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            eprintln!(
                "--- {}\n{}",
                entry.path().display(),
                lines[lines.len().saturating_sub(60)..].join("\n")
            );
        }
    }
}

/// Whether a command line's program is `name`, by its last path part.
fn runs(command: &str, name: &str) -> bool {
    command.split(' ').next().and_then(|program| program.rsplit('/').next()) == Some(name)
}

fn kill(pid: u32) {
    // The shell's own kill: this crate has no unsafe code and needs no more than this.
    let _ = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .stderr(Stdio::null())
        .status();
}

fn path_with(folder: &Path) -> String {
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}

fn vhost_vsock() -> PathBuf {
    std::env::var_os("FAR_VHOST_DEVICE_VSOCK")
        .map_or_else(|| find::cache().join("vhost/bin/vhost-device-vsock"), PathBuf::from)
}

fn sockets_below(folder: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_socket() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}
