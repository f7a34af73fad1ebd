//! far-node as a whole: what is opened in which order, what serves, and how it ends.
//!
//! 1. Lock the state folder: two far-nodes on one ledger would boot twice.
//! 2. Read ledger and machine.
//! 3. Bind and serve the Unix socket.
//! 4. Behind the serving: adopt what runs, clean up leftovers.
//! 5. With a controller: identity, mTLS server, heartbeats.
//!
//! Shutting down stops serving and leaves the microVMs to the next far-node.

use crate::{
    agent::{Blade, Limits},
    api::NodeApi,
    board::Board,
    capacity::{self, Machine},
    clock::Clock,
    config::{Config, Network},
    direct_host::{DirectHost, DirectHostOptions},
    epoch::{EpochGuard, Origin},
    fence::Fence,
    files::{make_private_dir, write_atomic},
    host::{Images, VmHost},
    ledger::{Ledger, Loaded},
    nics::{Live, NicOptions, Nics},
    remote::Remote,
    store::Store,
    supervisor::Supervisor,
    unix_socket,
};
use anyhow::{Context, Result, bail};
use std::{
    fs::{File, TryLockError},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Runs until `shutdown`.
///
/// # Errors
/// Something that far-node cannot be without: folders, ledger, images, sockets.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<()> {
    check_run_dir(&config.run_dir)?;
    let opened = {
        let (config, shutdown) = (config.clone(), shutdown.clone());
        tokio::task::spawn_blocking(move || open(&config, shutdown))
            .await
            .context("reading ledger and machine")??
    };
    let Opened {
        blade,
        machine,
        loaded,
        epochs,
    } = opened;
    let socket_path = config.run_dir.join("node.sock");
    let socket = unix_socket::bind(&socket_path).await?;
    let live = live(&loaded);
    let (supervisor, supervising) = Supervisor::start(blade.clone(), machine.room, loaded).await;
    // Behind the serving: the kernel's network may be full of what a crash left.
    let (nics, vms) = (blade.nics.clone(), config.run_dir.join("vm"));
    let opening = tokio::task::spawn_blocking(move || nics.start(&vms, &live));
    let names = tokio::spawn(blade.nics.clone().serve_names());
    blade.fence.catch_up(&supervisor).await;
    let mut serving = JoinSet::new();
    let (fenced, watching, until) = (blade.clone(), supervisor.clone(), shutdown.clone());
    serving.spawn(async move {
        fenced.fence.watch_over(watching, until).await;
        Ok(())
    });
    if let Some(address) = config.metrics_listen {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on --metrics-listen {address}"))?;
        let address = listener
            .local_addr()
            .context("reading the address of --metrics-listen")?;
        tracing::info!(%address, "metrics are served at /metrics");
        let served = crate::metrics::serve(listener, blade.clone(), shutdown.clone());
        serving.spawn(async {
            served.await;
            Ok(())
        });
    }
    let local = NodeApi::new(supervisor.clone(), machine.clone(), epochs.clone(), Origin::Blade);
    serving.spawn(unix_socket::serve(socket, local, shutdown.clone()));
    let address = match &config.controller {
        None => format!("unix:{}", socket_path.display()),
        Some(controller) => {
            let api = NodeApi::new(supervisor, machine.clone(), epochs.clone(), Origin::Controller);
            let remote = Remote::bind(&config.name, &config.state_dir, controller.clone(), api).await?;
            let address = remote.address();
            serving.spawn(remote.run(machine, epochs, blade, shutdown.clone()));
            address
        }
    };
    tracing::info!(blade = %config.name, %address, "far-node serves");
    if let Some(path) = &config.ready_file {
        write_atomic(path, address.as_bytes()).with_context(|| format!("writing the ready file {}", path.display()))?;
    }
    let ended = tokio::select! {
        // Servers end because of it as well.
        biased;
        () = shutdown.cancelled() => Ok(()),
        Some(served) = serving.join_next() => match served {
            Ok(Ok(())) => Err(anyhow::anyhow!("a server ended by itself")),
            Ok(Err(error)) => Err(error),
            Err(error) => Err(error.into()),
        },
    };
    shutdown.cancel();
    while serving.join_next().await.is_some() {}
    supervising.await.context("joining the supervisor")?;
    opening.await.context("opening the guests' network")?;
    names.abort();
    ended
}

/// The VMs that may run, with a NIC each.
fn live(loaded: &Loaded) -> Vec<Live> {
    let spawned = loaded
        .records
        .iter()
        .filter(|(record, _)| !record.is_ended() && record.spawn.is_some());
    let live = spawned.filter_map(|(record, spec)| {
        Some(Live {
            vm: record.vm_id.clone(),
            slot: record.launch.as_ref()?.nic.as_ref()?.slot?,
            // Without a spec nothing is let: it is the ledger's fault, not the agent's right.
            policy: spec.as_ref().map(|spec| spec.network.clone()).unwrap_or_default(),
        })
    });
    live.collect()
}

struct Opened {
    blade: Arc<Blade>,
    machine: Arc<Machine>,
    loaded: Loaded,
    epochs: Arc<EpochGuard>,
}

/// Everything that blocks: folders, ledger, machine, images.
fn open(config: &Config, shutdown: CancellationToken) -> Result<Opened> {
    let state = &config.state_dir;
    let vms = config.run_dir.join("vm");
    let logs = state.join("logs");
    for folder in [&vms, &logs] {
        make_private_dir(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let (kernel, initramfs) = (config.boot_kit.join("vmlinux"), config.boot_kit.join("initramfs.cpio"));
    for file in [&kernel, &initramfs] {
        if !file.is_file() {
            bail!(
                "the boot kit lacks {}: `make guest` makes it; --boot-kit names another folder",
                file.display()
            );
        }
    }
    let found = far_vmm::probe::run(&far_vmm::probe::ProbeOptions::default());
    if !found.can_run_vms() {
        tracing::warn!(qemu = %found.qemu.reason, vhost_device_vsock = %found.vhost_device_vsock.reason,
            firecracker = %found.firecracker.reason, kvm = %found.kvm.reason, "this machine cannot run microVMs");
    }
    let nics = match config.network {
        Network::None => Nics::none("no NIC: the blade runs with --network none; vsock only"),
        Network::Auto => Nics::new(NicOptions {
            max_vms: config.max_vms,
            has_ipv6: config.guest_ipv6,
            resolver: config.resolver,
        }),
    };
    let nics = Arc::new(nics);
    if let Some(lack) = nics.lack() {
        tracing::info!(reason = %lack, "microVMs of this blade have no NIC");
    }
    let boot_id = capacity::boot_id().context("reading the machine's boot id")?;
    let fence = Fence::open(state, &boot_id).context("reading the blade's lease")?;
    let options = DirectHostOptions {
        vms,
        kernel,
        initramfs,
        far_vmm: config.far_vmm.clone(),
        backend: config.backend,
        nics: nics.clone(),
        lease_file: fence.file().to_owned(),
    };
    let host: Arc<dyn VmHost> = Arc::new(DirectHost::new(options, found));
    let images: Arc<dyn Images> = Arc::new(Store::open(&state.join("images"))?);
    let ledger = Ledger::open(&state.join("ledger"))?;
    let loaded = ledger.load()?;
    let mut machine = Machine::read(
        host.facts(),
        config.reserved_cpu_millis,
        config.reserved_memory_mib,
        config.max_vms,
    )
    .context("reading what this machine has")?;
    machine.extended = config.extended.clone();
    let board = Board::open(&state.join("seq")).context("reading the event number")?;
    let epochs = EpochGuard::open(&state.join("epoch")).context("reading the newest epoch")?;
    let limits = Limits {
        boot_timeout: config.boot_timeout,
        log_max_bytes: config.log_max_bytes,
        heartbeat: config.heartbeat_interval,
    };
    let blade = Blade {
        clock: Clock::start(),
        ledger,
        board,
        host,
        images,
        nics,
        guests: crate::guests::Guests::default(),
        metrics: crate::metrics::Metrics::default(),
        limits,
        logs,
        boot_id,
        fence,
        images_changed: tokio::sync::Notify::new(),
        shutdown,
    };
    Ok(Opened {
        blade: Arc::new(blade),
        machine: Arc::new(machine),
        loaded,
        epochs: Arc::new(epochs),
    })
}

/// A far-node that was killed while it started a far-vmm leaves a copy of its lock in that child until exec: moments.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Holds the state folder for this process; the kernel lets go of it however the process ends. Drop it after the runtime:
/// what still works on a blocking thread when [`run`] is given up writes into the folder.
///
/// # Errors
/// Another far-node has it.
pub fn lock_state(folder: &Path) -> Result<File> {
    make_private_dir(folder).with_context(|| format!("making {}", folder.display()))?;
    let path = folder.join("lock");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < give_up => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another far-node uses {}: stop it, or use another --state-dir",
                folder.display()
            ),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("locking {}", path.display()));
            }
        }
        // Nothing is served yet, and a waiting lock has no time limit of its own.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(LOCK_PAUSE);
    }
}

/// The folder of the sockets must be ours alone: in /tmp somebody else could have made it first.
fn check_run_dir(folder: &Path) -> Result<()> {
    make_private_dir(folder).with_context(|| format!("making {}", folder.display()))?;
    let own = std::fs::metadata("/proc/self")
        .context("reading the own user id")?
        .uid();
    let found = std::fs::symlink_metadata(folder).with_context(|| format!("reading {}", folder.display()))?;
    if !found.is_dir() || found.uid() != own {
        bail!("{} belongs to somebody else: use another --run-dir", folder.display());
    }
    if found.mode() & 0o077 != 0 {
        bail!(
            "{} is open to others (mode {:o}): chmod 700 it",
            folder.display(),
            found.mode() & 0o777
        );
    }
    Ok(())
}
