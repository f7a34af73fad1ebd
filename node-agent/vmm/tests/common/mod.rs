//! One far-vmm with a guest, and waiting for what it does. Only processes started here are signalled, by their number.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]
#![allow(dead_code, reason = "each test file uses a part of it")]

use far_vmm::{
    Additions, ExitRecord, VmConfig,
    additions::{Accel, Backend},
    control::{Client, State, Status},
    probe::{self, ProbeOptions, Tools},
    pvh::{Then, tiny_guest},
};
use nix::{
    sys::signal::{Signal, kill as send_signal},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

/// For anything real: a loaded machine is slow, and no test asserts a time.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
/// Bound of the console's file in these tests, bytes.
pub(crate) const CONSOLE_MAX: u64 = 64 * 1024;

/// The tools of a VM, or a line that says what is missing.
pub(crate) fn qemu_or_skip(test: &str) -> Option<Tools> {
    static FOUND: OnceLock<Result<Tools, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let found = probe::run(&ProbeOptions::default());
        for finding in [&found.qemu, &found.vhost_device_vsock] {
            if !finding.ok {
                return Err(finding.reason.clone());
            }
        }
        Ok(Tools {
            qemu: found.qemu.path,
            vhost_device_vsock: found.vhost_device_vsock.path,
            firecracker: None,
        })
    });
    match found {
        Ok(tools) => Some(tools.clone()),
        Err(missing) => {
            eprintln!("SKIPPED {test}: {missing}");
            None
        }
    }
}

/// A far-vmm that was started; ended when dropped.
pub(crate) struct Vm {
    folder: tempfile::TempDir,
    far_vmm: Child,
}

impl Vm {
    pub(crate) fn boot(tools: &Tools, text: &[u8], then: Then) -> Self {
        Self::boot_changed(tools, text, then, |_| {})
    }

    pub(crate) fn boot_changed(tools: &Tools, text: &[u8], then: Then, change: impl FnOnce(&mut Value)) -> Self {
        Self::boot_with(tools, text, then, change, |_| {})
    }

    pub(crate) fn boot_with(
        tools: &Tools,
        text: &[u8],
        then: Then,
        change: impl FnOnce(&mut Value),
        add: impl FnOnce(&mut Additions),
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("guest"), tiny_guest(text, then)).unwrap();
        let mut config = serde_json::json!({
            "boot-source": {"kernel_image_path": at("guest"), "boot_args": "quiet"},
            "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
            "vsock": {"guest_cid": 3, "uds_path": at("v.sock")},
            "entropy": {},
        });
        VmConfig::parse(config.to_string().as_bytes()).unwrap();
        change(&mut config);
        let mut additions = Additions {
            backend: Backend::Qemu,
            accel: Accel::Tcg,
            console_max_bytes: Some(CONSOLE_MAX),
            qemu: tools.qemu.clone(),
            vhost_device_vsock: tools.vhost_device_vsock.clone(),
            ..Additions::default()
        };
        add(&mut additions);
        fs::write(at("vm.json"), config.to_string()).unwrap();
        fs::write(at("far.json"), additions.to_json()).unwrap();
        let far_vmm = command(&folder).spawn().unwrap();
        Self { folder, far_vmm }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.path("vmm.sock"))
    }

    /// The VM's record as far-vmm tells it. Also proves that the record was written before.
    pub(crate) fn wait_ended(&self) -> ExitRecord {
        wait_for("the control socket", || {
            self.client().status().map(drop).map_err(|error| error.to_string())
        });
        let status = self.client().wait(LIMIT).unwrap();
        assert_eq!(status.state, State::Ended);
        status.exit.unwrap()
    }

    /// The status once the console shows `text`.
    pub(crate) fn wait_console(&self, text: &str) -> Status {
        wait_for(&format!("{text:?} on the console"), || {
            let console = fs::read_to_string(self.path("console.log")).unwrap_or_default();
            if !console.contains(text) {
                return Err(console);
            }
            self.client().status().map_err(|error| error.to_string())
        })
    }

    pub(crate) fn exit_record(&self) -> Option<ExitRecord> {
        ExitRecord::read(&self.path("exit.json")).unwrap()
    }

    /// Process ids of the VMM and the vsock daemon.
    pub(crate) fn children(&self) -> Vec<i32> {
        let status = self.client().status().unwrap();
        [status.vmm_pid, status.vsock_pid].into_iter().flatten().collect()
    }

    pub(crate) fn kill_far_vmm(&mut self) {
        self.far_vmm.kill().unwrap();
        self.far_vmm.wait().unwrap();
    }

    pub(crate) fn signal_far_vmm(&self, signal: &str) {
        let signal: Signal = format!("SIG{signal}").parse().unwrap();
        send_signal(Pid::from_raw(self.far_vmm.id().cast_signed()), signal).unwrap();
    }

    /// The code far-vmm ended with.
    pub(crate) fn wait_far_vmm(&mut self) -> Option<i32> {
        let child = &mut self.far_vmm;
        wait_for("far-vmm to end", || {
            child.try_wait().unwrap().ok_or_else(|| "it runs".into())
        })
        .code()
    }

    /// Starts far-vmm once more on the same folder, after the first has ended; it must end by itself.
    pub(crate) fn run_again(&mut self) -> (Option<i32>, String) {
        self.kill_far_vmm();
        self.second_far_vmm()
    }

    /// Starts a second far-vmm on the same folder; it must end by itself.
    pub(crate) fn second_far_vmm(&self) -> (Option<i32>, String) {
        let mut child = command(&self.folder).stderr(Stdio::piped()).spawn().unwrap();
        let status = wait_for("the second far-vmm to end", || {
            child.try_wait().unwrap().ok_or_else(|| "it runs".into())
        });
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        (status.code(), stderr)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.far_vmm.kill();
        let _ = self.far_vmm.wait();
    }
}

fn command(folder: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_far-vmm"));
    command
        .args(["--id", "fa-3f1c0a9b77de-1", "--no-api", "--config-file"])
        .arg(folder.path().join("vm.json"));
    command.stdin(Stdio::null());
    command
}

/// What the control socket answers to these bytes; nothing, if it closes the connection before they are all written.
pub(crate) fn ask(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let _ = stream.write_all(request.as_bytes());
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

/// Kills a process of a VM of this test, whose number its status told.
pub(crate) fn kill(pid: i32) {
    send_signal(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Waits until none of these processes is left (a zombie whose parent died is none: init reaps it).
pub(crate) fn wait_gone(pids: &[i32]) {
    wait_for("the processes to be gone", || {
        let left: Vec<_> = pids.iter().filter(|pid| is_alive(**pid)).collect();
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
}

fn is_alive(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Waits until `look` gives a value; panics with its last refusal after [`LIMIT`].
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        match look() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= deadline => panic!("waited {LIMIT:?} for {what}; last seen: {last}"),
            Err(_) => {}
        }
        nix::poll::poll(&mut [], nix::poll::PollTimeout::from(10_u8)).unwrap();
    }
}
