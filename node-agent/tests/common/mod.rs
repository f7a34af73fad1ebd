//! One far-node as a real process, in folders of its own.
// Each test program compiles this file for itself and uses a part of it.
#![allow(dead_code)]

use far_node::client::{connect_inside_unix, connect_network_unix, connect_unix};
use far_proto::node::{
    AgentSpec, AgentState, CopyEntry, CopyInRequest, CopyInStart, CopyKind, EnsureAgentRequest, Identity,
    ListAgentsRequest, LoadImageRequest, LogChunk, LogsRequest, Piece, WatchEventsRequest, copy_in_request,
    inside_client::InsideClient, network_client::NetworkClient, node_client::NodeClient,
};
use futures::StreamExt;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tonic::transport::Channel;

/// Real boots under a software CPU on a busy machine.
const LIMIT: Duration = Duration::from_secs(240);
/// Output kept per attempt in these tests.
pub(crate) const LOG_MAX_BYTES: u64 = 1 << 20;

/// A process of one VM.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Victim {
    Vmm,
    FarVmm,
    Vsock,
}

pub(crate) struct Node {
    dir: tempfile::TempDir,
    args: Vec<String>,
    process: Child,
    client: NodeClient<Channel>,
    /// The namespace that is its blade's; `None`: this process's own.
    netns: Option<PathBuf>,
}

/// The request for an agent whose uid and name are `uid`.
pub(crate) fn agent(
    uid: &str,
    image: &str,
    entrypoint: Option<&str>,
    args: &[&str],
    memory_mib: u32,
) -> EnsureAgentRequest {
    EnsureAgentRequest {
        epoch: 0,
        identity: Some(Identity {
            uid: uid.into(),
            attempt: 1,
            namespace: "default".into(),
            name: uid.into(),
        }),
        spec: Some(AgentSpec {
            image: image.into(),
            cpu_millis: 1000,
            memory_mib,
            entrypoint: entrypoint.map(Into::into),
            args: args.iter().map(|arg| (*arg).into()).collect(),
            termination_grace_s: 5,
            ..AgentSpec::default()
        }),
    }
}

fn cache() -> PathBuf {
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    std::env::var_os("FAR_CACHE").map_or_else(|| home.join(".cache/far"), PathBuf::from)
}

fn boot_kit() -> PathBuf {
    std::env::var_os("FAR_BOOT_KIT").map_or_else(|| cache().join("guest"), PathBuf::from)
}

/// Where cargo put the programs.
fn programs() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_far-node")).parent().unwrap().to_owned()
}

fn missing() -> Option<String> {
    let kit = boot_kit();
    let needed = [
        (kit.join("vmlinux"), "the boot kit, made by `make guest`"),
        (kit.join("initramfs.cpio"), "the boot kit, made by `make guest`"),
        (kit.join("tiffany-vm.oci.tar"), "the boot kit, made by `make guest`"),
        (programs().join("far-vmm"), "far-vmm: cargo build -p far-vmm"),
    ];
    let lack = needed.iter().find(|(path, _)| !path.is_file());
    if let Some((path, what)) = lack {
        return Some(format!("{} ({what})", path.display()));
    }
    let found = far_vmm::probe::run(&far_vmm::probe::ProbeOptions::default());
    (!found.can_run_vms()).then(|| format!("a VMM: {}; {}", found.qemu.reason, found.vhost_device_vsock.reason))
}

impl Node {
    pub(crate) async fn start(test: &str) -> Option<Self> {
        Self::start_with(test, &[]).await
    }

    /// On a blade whose kernel says this boot id, as [`Self::set_boot_id`] may change it for the next start.
    pub(crate) async fn start_booted_as(test: &str, boot_id: &str) -> Option<Self> {
        Self::start_on(test, &[], Some(boot_id), None).await
    }

    pub(crate) async fn start_with(test: &str, more: &[&str]) -> Option<Self> {
        Self::start_on(test, more, None, None).await
    }

    /// On a blade whose network is a namespace of the test.
    pub(crate) async fn start_in(test: &str, more: &[&str], netns: Option<PathBuf>) -> Option<Self> {
        Self::start_on(test, more, None, netns).await
    }

    async fn start_on(test: &str, more: &[&str], boot_id: Option<&str>, netns: Option<PathBuf>) -> Option<Self> {
        if let Some(missing) = missing() {
            eprintln!("SKIPPED {test}: {missing}");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("fn").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let mut args: Vec<String> = vec![
            "--state-dir".into(),
            at("state"),
            "--run-dir".into(),
            at("run"),
            "--ready-file".into(),
            at("ready"),
            "--boot-kit".into(),
            boot_kit().display().to_string(),
            "--name".into(),
            "blade".into(),
            "--log-max-bytes".into(),
            LOG_MAX_BYTES.to_string(),
            "--boot-timeout".into(),
            "120s".into(),
            "--system-reserved-memory".into(),
            "0MiB".into(),
        ];
        // Later ones override.
        for pair in more.chunks(2) {
            match args.iter().position(|arg| arg == pair[0]) {
                Some(at) => args[at + 1] = pair[1].into(),
                None => args.extend(pair.iter().map(|arg| (*arg).to_owned())),
            }
        }
        if let Some(boot_id) = boot_id {
            fs::write(dir.path().join("boot_id"), format!("{boot_id}\n")).unwrap();
        }
        let process = spawn(&args, dir.path(), netns.as_deref());
        let client = connect(dir.path()).await;
        Some(Self {
            dir,
            args,
            process,
            client,
            netns,
        })
    }

    pub(crate) fn client(&mut self) -> &mut NodeClient<Channel> {
        &mut self.client
    }

    /// A client for what people do inside agents.
    pub(crate) async fn inside(&self) -> InsideClient<Channel> {
        connect_inside_unix(&self.at("run/node.sock")).await.unwrap()
    }

    /// A client for what agents may reach.
    pub(crate) async fn network(&self) -> NetworkClient<Channel> {
        connect_network_unix(&self.at("run/node.sock")).await.unwrap()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// SIGKILL, then a new far-node with the same folders.
    pub(crate) async fn kill_and_restart(&mut self) {
        self.kill();
        self.restart().await;
    }

    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub(crate) async fn restart(&mut self) {
        let _ = fs::remove_file(self.at("ready"));
        self.process = spawn(&self.args, self.dir.path(), self.netns.as_deref());
        self.client = connect(self.dir.path()).await;
    }

    /// TERM and TERM again: far-node ends at once.
    pub(crate) fn terminate_twice(&self) {
        for _ in 0..2 {
            let pid = self.process.id().to_string();
            assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        }
    }

    /// Waits until nobody holds the state folder, and holds it.
    pub(crate) async fn lock_state(&self) -> fs::File {
        let file = fs::File::options().write(true).open(self.at("state/lock")).unwrap();
        let wait = async {
            while file.try_lock().is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.unwrap();
        file
    }

    pub(crate) fn wait_for_the_end(&mut self) {
        self.process.wait().unwrap();
    }

    /// Every file below a folder, with its length.
    pub(crate) fn tree(&self, folder: &str) -> Vec<(PathBuf, u64)> {
        let mut folders = vec![self.at(folder)];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                match entry.metadata() {
                    Ok(metadata) if metadata.is_dir() => folders.push(entry.path()),
                    Ok(metadata) => files.push((entry.path(), metadata.len())),
                    Err(_) => {}
                }
            }
        }
        files.sort();
        files
    }

    /// Resident memory of far-node, KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn set_boot_id(&self, boot_id: &str) {
        fs::write(self.at("boot_id"), format!("{boot_id}\n")).unwrap();
    }

    pub(crate) fn files_in(&self, folder: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.at(folder)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    pub(crate) async fn until_files(&self, folder: &str, count: usize) {
        let wait = async {
            while self.files_in(folder).len() != count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait)
            .await
            .unwrap_or_else(|_| panic!("{folder} has {:?}, not {count} files", self.files_in(folder)));
    }

    /// An image of one file with this content, under `reference`.
    pub(crate) async fn load_image_of(&mut self, reference: &str, content: &[u8]) {
        let mut image = far_image::oci::Builder::new();
        image.file("/file", 0o755, 0, content.to_vec()).unwrap();
        let archive = self.at("image.tar");
        fs::write(&archive, image.build()).unwrap();
        self.load(&archive, reference).await;
    }

    pub(crate) async fn load_tiffany(&mut self, reference: &str) {
        self.load(&boot_kit().join("tiffany-vm.oci.tar"), reference).await;
    }

    /// The test program as image `payload`; `None` (and a SKIPPED line) where it was not built.
    pub(crate) async fn load_payload(&mut self) -> Option<()> {
        let built = programs()
            .parent()
            .unwrap()
            .join("x86_64-unknown-linux-gnu/guest/far-payload");
        let program = std::env::var_os("FAR_PAYLOAD").map_or(built, PathBuf::from);
        let Ok(bytes) = fs::read(&program) else {
            eprintln!(
                "SKIPPED {}: {} (made by `make guest`)",
                std::thread::current().name().unwrap_or_default(),
                program.display()
            );
            return None;
        };
        let mut image = far_image::oci::Builder::new();
        image.file("/payload", 0o755, 0, bytes).unwrap();
        image.entrypoint(["/payload".to_owned()]);
        let archive = self.at("payload.tar");
        fs::write(&archive, image.build()).unwrap();
        self.load(&archive, "payload").await;
        Some(())
    }

    async fn load(&mut self, archive: &Path, reference: &str) {
        let bytes = fs::read(archive).unwrap();
        let mut parts: Vec<_> = bytes
            .chunks(1 << 20)
            .map(|data| LoadImageRequest {
                reference: String::new(),
                data: data.to_vec(),
            })
            .collect();
        parts[0].reference = reference.into();
        self.client.load_image(tokio_stream::iter(parts)).await.unwrap();
    }

    /// Watches until the agent's state fulfils a claim.
    pub(crate) async fn until(&mut self, uid: &str, claim: impl Fn(&AgentState) -> bool) -> AgentState {
        let mut last = None;
        let wait = async {
            let mut events = self
                .client
                .watch_events(WatchEventsRequest::default())
                .await
                .unwrap()
                .into_inner();
            loop {
                let event = events.message().await.unwrap().unwrap();
                let Some(state) = event.state else { continue };
                if state.identity.as_ref().unwrap().uid != uid {
                    continue;
                }
                if claim(&state) {
                    return state;
                }
                last = Some(state);
            }
        };
        match tokio::time::timeout(LIMIT, wait).await {
            Ok(state) => state,
            Err(_) => panic!("{uid} never got there, last {last:#?}\n{}", self.report()),
        }
    }

    async fn chunks(&mut self, uid: &str, follow: bool) -> tonic::Streaming<LogChunk> {
        let identity = Some(Identity {
            uid: uid.into(),
            ..Identity::default()
        });
        self.client
            .logs(LogsRequest {
                identity,
                follow,
                ..LogsRequest::default()
            })
            .await
            .unwrap()
            .into_inner()
    }

    /// Output as stored, with what was dropped.
    pub(crate) async fn output_and_drops(&mut self, uid: &str) -> (Vec<u8>, u64) {
        let (mut output, mut dropped) = (Vec::new(), 0);
        let mut chunks = self.chunks(uid, false).await;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.unwrap();
            dropped += chunk.dropped_bytes;
            output.extend(chunk.data);
        }
        (output, dropped)
    }

    pub(crate) async fn output(&mut self, uid: &str) -> String {
        String::from_utf8(self.output_and_drops(uid).await.0).unwrap()
    }

    /// Follows until the output has this text.
    pub(crate) async fn until_output(&mut self, uid: &str, text: &str) {
        self.until_claim(uid, |seen| seen.contains(text)).await;
    }

    /// Follows until the output fulfils a claim.
    pub(crate) async fn until_claim(&mut self, uid: &str, claim: impl Fn(&str) -> bool) {
        let mut seen = String::new();
        let mut chunks = self.chunks(uid, true).await;
        let wait = async {
            while !claim(&seen) {
                match chunks.next().await {
                    Some(chunk) => seen += &String::from_utf8_lossy(&chunk.unwrap().data),
                    None => panic!("the output ended without what was to come: {seen:?}"),
                }
            }
        };
        tokio::time::timeout(LIMIT, wait)
            .await
            .unwrap_or_else(|_| panic!("what was to be put out did not come\n{}", self.report()));
    }

    /// Writes a file inside an agent.
    pub(crate) async fn write(&self, uid: &str, path: &str, data: &[u8]) {
        use copy_in_request::Kind;
        let identity = Some(Identity {
            uid: uid.into(),
            ..Identity::default()
        });
        let entry = |kind: CopyKind| CopyEntry {
            kind: kind.into(),
            mode: 0o644,
            ..CopyEntry::default()
        };
        let start = CopyInStart {
            identity,
            path: path.into(),
            ..CopyInStart::default()
        };
        let piece = Piece {
            data: data.to_vec(),
            last: true,
        };
        let kinds = [
            Kind::Start(start),
            Kind::Entry(entry(CopyKind::File)),
            Kind::Data(piece),
            Kind::Entry(entry(CopyKind::End)),
        ];
        let requests = kinds.map(|kind| CopyInRequest { kind: Some(kind) });
        let copied = self.inside().await.copy_in(tokio_stream::iter(requests)).await;
        copied.unwrap_or_else(|refused| panic!("writing {path} into {uid}: {refused}\n{}", self.report()));
    }

    /// Neither processes nor files of this VM are there any more.
    pub(crate) async fn until_nothing_is_left(&self, vm_id: &str) {
        let folder = self.at("run").join("vm").join(vm_id);
        let needle = folder.display().to_string();
        let wait = async {
            while folder.exists() || !processes_with(&needle).is_empty() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(60), wait).await.is_err() {
            panic!(
                "left of {vm_id}: folder {}, processes {:?}",
                folder.exists(),
                processes_with(&needle)
            );
        }
    }

    /// Waits until a process of this VM runs a program whose path has this name in it.
    pub(crate) async fn until_process(&self, vm_id: &str, program: &str) {
        let wait = async {
            loop {
                let lines = processes_with(vm_id);
                if lines
                    .iter()
                    .any(|line| line.split(' ').next().is_some_and(|name| name.contains(program)))
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait)
            .await
            .unwrap_or_else(|_| panic!("no {program} came\n{}", self.report()));
    }

    /// Where a VM's sockets are.
    pub(crate) fn vm_folder(&self, vm_id: &str) -> PathBuf {
        self.at("run").join("vm").join(vm_id)
    }

    /// Sends the VMM a signal by name.
    pub(crate) async fn signal_vmm(&self, vm_id: &str, signal: &str) {
        let socket = self.vm_folder(vm_id).join("vmm.sock");
        let status = far_vmm::control::AsyncClient::new(socket).status().await.unwrap();
        let pid = status.vmm_pid.expect("the VMM runs").to_string();
        let sent = Command::new("kill").args([&format!("-{signal}"), &pid]).status();
        assert!(sent.unwrap().success());
    }

    async fn vmm_status(&self, vm_id: &str) -> far_vmm::control::Status {
        let socket = self.vm_folder(vm_id).join("vmm.sock");
        far_vmm::control::AsyncClient::new(socket).status().await.unwrap()
    }

    /// Process id of a VM's VMM.
    pub(crate) async fn pid_of_vmm(&self, vm_id: &str) -> i32 {
        self.vmm_status(vm_id).await.vmm_pid.expect("the VMM runs")
    }

    /// Kills one of the VM's processes.
    pub(crate) async fn kill_part(&self, vm_id: &str, victim: Victim) {
        let status = self.vmm_status(vm_id).await;
        let pid = match victim {
            Victim::Vmm => status.vmm_pid.expect("the VMM runs"),
            Victim::FarVmm => status.pid,
            Victim::Vsock => status.vsock_pid.expect("the vsock daemon runs"),
        };
        let killed = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        assert!(killed.unwrap().success());
    }

    /// No file of this far-node has these bytes; the VM's own log is left out.
    pub(crate) fn assert_nowhere_on_disk(&self, secret: &[u8], vm_id: &str) {
        let own_log = self.at("state").join("logs").join(vm_id);
        let mut folders = vec![self.at("state"), self.at("run")];
        while let Some(folder) = folders.pop().filter(|folder| *folder != own_log) {
            for entry in fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() {
                    let bytes = fs::read(entry.path()).unwrap();
                    let found = bytes.windows(secret.len()).any(|part| part == secret);
                    assert!(!found, "a secret is in {}", entry.path().display());
                }
            }
        }
    }

    pub(crate) fn log_bytes(&self, vm_id: &str) -> u64 {
        let folder = self.at("state").join("logs").join(vm_id);
        fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum()
    }

    /// What a person would look at after a failure.
    pub(crate) fn report(&self) -> String {
        let tail = |path: PathBuf| {
            let bytes = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(3000)..]).into_owned();
            format!("== {}\n{text}\n", path.display())
        };
        let mut report = tail(self.at("far-node.log"));
        for vm in fs::read_dir(self.at("run/vm")).into_iter().flatten().flatten() {
            for name in ["far-vmm.log", "exit.json", "console.log"] {
                report += &tail(vm.path().join(name));
            }
        }
        report
    }

    /// SIGTERM, and waits.
    pub(crate) async fn stop(mut self) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        while self.process.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // far-vmm goes, and takes its VMM along, when its folder is gone.
        let _ = fs::remove_dir_all(self.at("run"));
    }
}

fn spawn(args: &[String], dir: &Path, netns: Option<&Path>) -> Child {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("far-node.log"))
        .unwrap();
    let program = env!("CARGO_BIN_EXE_far-node");
    let boot_id = dir.join("boot_id");
    // Each becomes far-node: the process keeps its id.
    let mut command = match netns {
        Some(netns) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={}", netns.display())).arg(program);
            command
        }
        None if boot_id.exists() => {
            let mut command = Command::new("unshare");
            let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
            command.args(["-m", "--propagation", "private", "sh", "-c", script]);
            command.arg(boot_id).arg(program);
            command
        }
        None => Command::new(program),
    };
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Waits for the ready file, then connects.
async fn connect(dir: &Path) -> NodeClient<Channel> {
    let ready = async {
        while !dir.join("ready").exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(Duration::from_secs(60), ready).await.is_err() {
        panic!(
            "far-node did not start: {}",
            fs::read_to_string(dir.join("far-node.log")).unwrap_or_default()
        );
    }
    let mut client = connect_unix(&dir.join("run/node.sock")).await.unwrap();
    client.list_agents(ListAgentsRequest {}).await.unwrap();
    client
}

fn processes_with(needle: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            entry.file_name().to_str()?.parse::<u32>().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains(needle).then_some(line)
        })
        .collect()
}
