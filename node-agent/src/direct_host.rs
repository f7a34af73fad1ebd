//! The direct host: far-node itself writes a VM's description and spawns far-vmm, one process per VM.
//!
//! far-vmm puts itself into its own session and outlives far-node; everything else is asked over its control socket, so
//! that a VM spawned by an earlier far-node is handled like one of ours.

use crate::{
    files::{make_private_dir, remove_dir, write_atomic},
    host::{HostError, HostFacts, PrepareError, Prepared, VmHost, VmPlan},
    names::VmId,
    nics::{Attachment, Nics, NoNic},
    outcome::{MAX_MESSAGE, VmmEnd, clean_text},
    pulse::Pinged,
    record::Resources,
};
use far_vmm::{
    additions::{Additions, Backend},
    config::{BootSource, Drive, Entropy, MAX_VCPUS, MachineConfig, NetworkInterface, VmConfig, Vsock},
    control::AsyncClient,
    exit::{Asked, ExitCause, ExitRecord},
    probe::Capabilities,
};
use futures::{FutureExt, future::BoxFuture};
use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout};

/// The same for every VM: user-space vsock has no shared CID space.
const GUEST_CID: u32 = 3;
/// Bytes of a guest's console kept beside its VM.
const CONSOLE_MAX_BYTES: u64 = 1 << 20;
/// From spawn until far-vmm answers its control socket: it may probe the machine first.
const SPAWN_LIMIT: Duration = Duration::from_secs(60);
/// A far-vmm that was spawned just before far-node was killed may not listen yet.
const PATIENCE: Duration = Duration::from_secs(10);
/// Until a released far-vmm is gone.
const RELEASE_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at a socket or file that is to appear or go.
const LOOK: Duration = Duration::from_millis(20);
/// What far-init needs of the kernel; backends append their own. Never user text, never secrets.
const BOOT_ARGS: &str = "rdinit=/init console=ttyS0 quiet panic=-1";

/// Where things are.
#[derive(Debug)]
pub struct DirectHostOptions {
    /// Folder of the VMs' folders; short, because socket paths hold 107 bytes.
    pub vms: PathBuf,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Guest initramfs with far-init.
    pub initramfs: PathBuf,
    /// far-vmm's binary.
    pub far_vmm: PathBuf,
    /// Which VMM.
    pub backend: Backend,
    /// NICs, or why there are none.
    pub nics: Arc<Nics>,
    /// The blade's lease, as every far-vmm reads it.
    pub lease_file: PathBuf,
}

/// See the module's text.
#[derive(Debug)]
pub struct DirectHost {
    options: Arc<DirectHostOptions>,
    machine: Capabilities,
}

impl DirectHost {
    /// A host on a machine that was probed.
    #[must_use]
    pub fn new(options: DirectHostOptions, machine: Capabilities) -> Self {
        Self {
            options: Arc::new(options),
            machine,
        }
    }

    fn backend(&self) -> Backend {
        match self.options.backend {
            Backend::Auto if self.machine.firecracker.ok && self.machine.kvm.ok => Backend::Firecracker,
            Backend::Auto => Backend::Qemu,
            named @ (Backend::Qemu | Backend::Firecracker) => named,
        }
    }

    fn config(&self, plan: &VmPlan, nic: Option<&Attachment>) -> VmConfig {
        VmConfig {
            boot_source: BootSource {
                kernel_image_path: self.options.kernel.clone(),
                boot_args: Some(BOOT_ARGS.to_owned()),
                initrd_path: Some(self.options.initramfs.clone()),
            },
            drives: vec![Drive {
                drive_id: "rootfs".to_owned(),
                path_on_host: plan.rootfs.clone(),
                // The initramfs is the root; far-init mounts the drive itself.
                is_root_device: false,
                is_read_only: true,
                cache_type: None,
                io_engine: None,
            }],
            machine_config: MachineConfig {
                vcpu_count: vcpus(plan),
                mem_size_mib: plan.memory_mib,
                smt: None,
                track_dirty_pages: None,
            },
            network_interfaces: nic
                .map(|nic| NetworkInterface {
                    iface_id: "eth0".to_owned(),
                    host_dev_name: nic.tap.clone(),
                    guest_mac: Some(nic.mac.clone()),
                })
                .into_iter()
                .collect(),
            vsock: Some(Vsock {
                vsock_id: None,
                guest_cid: GUEST_CID,
                uds_path: self.folder(&plan.vm).join("v.sock"),
            }),
            entropy: Some(Entropy {}),
            logger: None,
            metrics: None,
            mmds_config: None,
        }
    }

    fn additions(&self, nic: Option<&Attachment>) -> Additions {
        Additions {
            backend: self.backend(),
            accel: self.machine.accel(),
            console_max_bytes: Some(CONSOLE_MAX_BYTES),
            tsc_khz: self.machine.tsc_khz,
            netns: nic.map(|nic| nic.netns.clone()),
            lease_file: Some(self.options.lease_file.clone()),
            ..Additions::default()
        }
    }

    fn client(&self, vm: &VmId) -> AsyncClient {
        AsyncClient::new(self.folder(vm).join("vmm.sock"))
    }
}

fn vcpus(plan: &VmPlan) -> u8 {
    u8::try_from(plan.vcpus).unwrap_or(MAX_VCPUS).clamp(1, MAX_VCPUS)
}

impl VmHost for DirectHost {
    fn facts(&self) -> HostFacts {
        let kvm = &self.machine.kvm;
        HostFacts {
            vmm: match self.backend() {
                Backend::Firecracker => "firecracker".to_owned(),
                Backend::Qemu | Backend::Auto => "qemu".to_owned(),
            },
            accelerator: if kvm.ok { "kvm" } else { "tcg" }.to_owned(),
            kvm_reason: if kvm.ok { String::new() } else { kvm.reason.clone() },
        }
    }

    fn folder(&self, vm: &VmId) -> PathBuf {
        self.options.vms.join(vm.as_str())
    }

    fn prepare(&self, plan: &VmPlan) -> Result<Prepared, PrepareError> {
        let folder = self.folder(&plan.vm);
        let failed = |error: &dyn std::fmt::Display| HostError {
            message: format!(
                "writing the description of VM {} into {}: {error}",
                plan.vm,
                folder.display()
            ),
        };
        remove_dir(&folder).map_err(|error| failed(&error))?;
        make_private_dir(&folder).map_err(|error| failed(&error))?;
        let attached = match self.options.nics.attach(&plan.vm, &plan.network) {
            Ok(attached) => Ok(attached),
            Err(NoNic::Without(why)) => Err(why),
            Err(NoNic::Failed(why)) => return Err(PrepareError::Network(why)),
        };
        let config = self.config(plan, attached.as_ref().ok());
        config.check().map_err(|error| failed(&error))?;
        let additions = self.additions(attached.as_ref().ok());
        let files = [
            ("vm.json", config.to_json()),
            (far_vmm::additions::FILE_NAME, additions.to_json()),
        ];
        for (name, text) in files {
            write_atomic(&folder.join(name), text.as_bytes()).map_err(|error| failed(&error))?;
        }
        let facts = self.facts();
        let resources = Resources {
            vcpus: vcpus(plan).into(),
            memory_mib: plan.memory_mib,
            accelerator: facts.accelerator,
            vmm: facts.vmm,
            nic: attached.is_ok(),
            no_nic_reason: attached.as_ref().err().cloned().unwrap_or_default(),
        };
        let notice = attached
            .as_ref()
            .map_or(String::new(), |attachment| attachment.notice.clone());
        Ok(Prepared {
            resources,
            nic: attached.ok().map(|attachment| attachment.nic),
            notice,
        })
    }

    fn boot<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), HostError>> {
        async move {
            let folder = self.folder(vm);
            let failed = |what: &str, cause: String| HostError {
                message: format!("{what} of VM {vm}: {cause}"),
            };
            let log_path = folder.join("far-vmm.log");
            let log = || OpenOptions::new().append(true).create(true).mode(0o600).open(&log_path);
            let (out, err) = log()
                .and_then(|out| Ok((out, log()?)))
                .map_err(|error| failed("opening far-vmm's log", error.to_string()))?;
            let netns = self.options.nics.netns_of(vm);
            let netns = netns.map_err(|error| failed("opening the network namespace", error.to_string()))?;
            // Dropping the child neither kills nor forgets it: tokio reaps it when it ends.
            let mut child = tokio::process::Command::new(&self.options.far_vmm)
                .args(["--id", vm.as_str(), "--no-api", "--config-file"])
                .arg(folder.join("vm.json"))
                .stdin(netns.map_or_else(Stdio::null, Stdio::from))
                .stdout(out)
                .stderr(err)
                .current_dir(&folder)
                .spawn()
                .map_err(|error| {
                    failed(
                        "starting far-vmm",
                        format!("{}: {error}", self.options.far_vmm.display()),
                    )
                })?;
            let client = self.client(vm);
            let deadline = Instant::now() + SPAWN_LIMIT;
            loop {
                if client.status().await.is_ok() {
                    return Ok(());
                }
                if let Ok(Some(status)) = child.try_wait() {
                    // An exit record says more: who watches reads it.
                    if matches!(ExitRecord::read(&folder.join("exit.json")), Ok(Some(_))) {
                        return Ok(());
                    }
                    return Err(failed(
                        "running far-vmm",
                        format!("{status}: {}", last_words(&log_path)),
                    ));
                }
                if Instant::now() > deadline {
                    let _ = child.kill().await;
                    return Err(failed(
                        "running far-vmm",
                        format!(
                            "no answer within {} s: {}",
                            SPAWN_LIMIT.as_secs(),
                            last_words(&log_path)
                        ),
                    ));
                }
                sleep(LOOK).await;
            }
        }
        .boxed()
    }

    fn ping(&self, vm: &VmId) -> BoxFuture<'static, Pinged> {
        let socket = self.folder(vm).join("v.sock");
        // Not killed when nobody waits any more: hanging up on a guest that stands still would cost it its vsock.
        let asking = tokio::process::Command::new(&self.options.far_vmm)
            .arg("--ping")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        async move {
            let asked = async { asking?.wait_with_output().await }.await;
            let answer = asked.map_err(|error| format!("it could not be asked: {error}"))?;
            match answer.status.success() {
                true => Ok(()),
                false => Err(String::from_utf8_lossy(&answer.stdout).trim().to_owned()),
            }
        }
        .boxed()
    }

    fn ended(&self, vm: &VmId) -> BoxFuture<'static, VmmEnd> {
        let (client, folder) = (self.client(vm), self.folder(vm));
        let exit_file = folder.join("exit.json");
        async move {
            let started = Instant::now();
            let mut was_there = false;
            loop {
                let error = match client.wait().await {
                    Ok(status) => match status.exit {
                        Some(exit) => return vmm_end(&exit),
                        None => {
                            was_there = true;
                            continue;
                        }
                    },
                    Err(error) => error,
                };
                match ExitRecord::read(&exit_file) {
                    Ok(Some(exit)) => return vmm_end(&exit),
                    Ok(None) => {}
                    Err(error) => tracing::warn!(path = %exit_file.display(), %error, "an exit record cannot be read"),
                }
                was_there |= matches!(error, far_vmm::control::ControlError::Gone { .. });
                let is_late = started.elapsed() > PATIENCE;
                // The marker outlives a far-vmm that ended while no far-node was there to see it.
                if error.is_gone() && (was_there || is_late && folder.join(far_vmm::run::BOOT_MARKER).exists()) {
                    let message = "far-vmm ended without a record of how; it was killed or it failed".to_owned();
                    return VmmEnd::Crashed { message };
                }
                if error.is_gone() && is_late {
                    return VmmEnd::Vanished { blade_rebooted: false };
                }
                sleep(LOOK * 5).await;
            }
        }
        .boxed()
    }

    fn kill<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, ()> {
        async move {
            if let Err(error) = self.client(vm).kill().await
                && !error.is_gone()
            {
                tracing::warn!(vm.id = %vm, %error, "far-vmm did not take a kill");
            }
        }
        .boxed()
    }

    fn cpu_us<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, u64> {
        async move {
            let exit = ExitRecord::read(&self.folder(vm).join("exit.json"));
            exit.ok().flatten().map_or(0, |exit| exit.vmm_cpu_us)
        }
        .boxed()
    }

    fn release<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<(), HostError>> {
        async move {
            let folder = self.folder(vm);
            let client = self.client(vm);
            let gone = async {
                loop {
                    match client.release().await {
                        Err(error) if error.is_gone() => return,
                        Ok(_) | Err(_) => sleep(LOOK).await,
                    }
                }
            };
            let is_gone = timeout(RELEASE_LIMIT, gone).await.is_ok();
            let (options, owner) = (self.options.clone(), vm.clone());
            let removing = move || {
                // Kept by a VMM that did not go: the slot stays taken, and goes with the namespace.
                if let Err(error) = options.nics.detach(&owner) {
                    tracing::warn!(vm.id = %owner, %error, "a tap is left");
                }
                // far-vmm goes as well when its folder is gone.
                remove_dir(&folder)
            };
            let removed = tokio::task::spawn_blocking(removing).await;
            match removed {
                Ok(Ok(())) if is_gone => Ok(()),
                Ok(Ok(())) => Err(HostError {
                    message: format!("far-vmm of VM {vm} did not go when released"),
                }),
                Ok(Err(error)) => Err(HostError {
                    message: format!("removing the folder of VM {vm}: {error}"),
                }),
                Err(error) => Err(HostError {
                    message: format!("removing the folder of VM {vm}: {error}"),
                }),
            }
        }
        .boxed()
    }

    fn leftovers(&self) -> Vec<VmId> {
        let entries = std::fs::read_dir(&self.options.vms).into_iter().flatten();
        entries
            .filter_map(|entry| VmId::parse(entry.ok()?.file_name().to_str()?))
            .collect()
    }
}

fn vmm_end(exit: &ExitRecord) -> VmmEnd {
    let message = || clean_text(&exit.message, MAX_MESSAGE);
    if exit.asked == Some(Asked::LeaseOver) {
        return VmmEnd::Fenced;
    }
    if exit.kernel_panic {
        return VmmEnd::KernelPanic { message: message() };
    }
    if exit.is_clean() && exit.cause != ExitCause::StartFailed {
        return VmmEnd::Clean;
    }
    let what = match exit.cause {
        ExitCause::StartFailed => "the VMM could not start".to_owned(),
        ExitCause::Exited => format!("the VMM ended with code {}", exit.code.unwrap_or(-1)),
        ExitCause::Signaled => format!("the VMM was ended by signal {}", exit.signal.unwrap_or(0)),
    };
    VmmEnd::Crashed {
        message: format!("{what}: {}", message()),
    }
}

/// The last line of a log, for an error's text.
fn last_words(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(2000)..];
    let text = String::from_utf8_lossy(tail);
    let line = text
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it said nothing");
    clean_text(line, 400)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As an adopting far-node finds it, where far-vmm was killed while there was none.
    #[tokio::test(start_paused = true)]
    async fn a_far_vmm_that_booted_and_is_gone_without_a_record_crashed() {
        let vms = tempfile::tempdir().unwrap();
        let options = DirectHostOptions {
            vms: vms.path().to_owned(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            far_vmm: PathBuf::new(),
            backend: Backend::Qemu,
            nics: Arc::new(Nics::none("a test")),
            lease_file: vms.path().join("lease"),
        };
        let host = DirectHost::new(options, far_vmm::probe::run(&far_vmm::probe::ProbeOptions::default()));
        let vm = VmId::parse("fa-0123456789ab-1").unwrap();
        assert_eq!(host.ended(&vm).await, VmmEnd::Vanished { blade_rebooted: false });
        std::fs::create_dir(host.folder(&vm)).unwrap();
        std::fs::write(host.folder(&vm).join(far_vmm::run::BOOT_MARKER), "").unwrap();
        assert!(matches!(host.ended(&vm).await, VmmEnd::Crashed { .. }));
    }
}
