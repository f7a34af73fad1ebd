//! From the description to running processes.

use super::{
    child::{Process, describe},
    monitor::{Monitor, Vmm},
    server::remove_socket,
};
use crate::{
    additions::{Accel, Backend},
    backend::{
        Program, firecracker,
        qemu::{self, Accelerator},
    },
    config::{ConfigError, VmConfig, Vsock},
    probe,
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Until the vsock daemon listens. It needs milliseconds; a loaded machine may need seconds.
const VSOCK_LIMIT: Duration = Duration::from_secs(30);
/// How often its socket is looked for.
const VSOCK_LOOK: Duration = Duration::from_millis(2);

/// Why no guest ran.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("the VM's description cannot be used")]
    Config(#[source] ConfigError),
    #[error("field {field}: {path} cannot be opened")]
    File {
        field: String,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{program} is not installed; {fix}")]
    Missing { program: &'static str, fix: &'static str },
    #[error("the qemu backend has no API: start far-vmm without --api-sock")]
    NoApi,
    #[error("{operation}")]
    Io { operation: String, source: io::Error },
    #[error("the vsock daemon ended before it listened ({how}): {words}")]
    VsockEnded { how: String, words: String },
    #[error("the vsock daemon did not listen on {socket} within {} s", VSOCK_LIMIT.as_secs())]
    VsockSilent { socket: PathBuf },
    #[error("the start was broken off: far-vmm was told to go")]
    BrokenOff,
}

fn at<T>(operation: impl FnOnce() -> String, result: io::Result<T>) -> Result<T, StartError> {
    result.map_err(|source| StartError::Io {
        operation: operation(),
        source,
    })
}

/// Starts everything; on an error, what was started ends when the monitor drops it.
pub(crate) fn start(monitor: &mut Monitor) -> Result<(), StartError> {
    let mut config = VmConfig::load(&monitor.folder.config_file()).map_err(StartError::Config)?;
    make_absolute(&mut config, monitor.folder.path());
    open_files(&config)?;
    let netns = monitor.settings.netns.as_deref().map(open_netns).transpose()?;
    let chosen = choose(monitor)?;
    (monitor.backend, monitor.accel) = (chosen.backend().into(), chosen.why().into());
    if let Some(vsock) = &config.vsock {
        at(
            || "removing the vsock socket of an earlier run".into(),
            remove_socket(&vsock.uds_path),
        )?;
        monitor.sockets.push(vsock.uds_path.clone());
    }
    at(
        || "writing the marker of this boot".into(),
        monitor.folder.mark_booted(),
    )?;
    let program = match &chosen {
        Chosen::Firecracker { path, .. } => firecracker_program(monitor, path),
        Chosen::Qemu { path, accelerator, .. } => {
            if let Some(vsock) = &config.vsock {
                start_vsock(monitor, vsock)?;
            }
            qemu_program(monitor, path, &config, *accelerator)
        }
    };
    if monitor.is_going() {
        return Err(StartError::BrokenOff);
    }
    let process = Process::spawn(&program, monitor.folder.path(), netns);
    let process = at(|| format!("starting {}", program.path.display()), process)?;
    monitor.started(Vmm { process });
    Ok(())
}

/// Which VMM, and how it runs guest code.
enum Chosen {
    Qemu {
        path: PathBuf,
        accelerator: Accelerator,
        why: String,
    },
    Firecracker {
        path: PathBuf,
        why: String,
    },
}

impl Chosen {
    fn backend(&self) -> &'static str {
        match self {
            Self::Qemu { .. } => "qemu",
            Self::Firecracker { .. } => "firecracker",
        }
    }

    fn why(&self) -> &str {
        match self {
            Self::Qemu { why, .. } | Self::Firecracker { why, .. } => why,
        }
    }
}

fn choose(monitor: &Monitor) -> Result<Chosen, StartError> {
    let settings = &monitor.settings;
    let firecracker = settings.tools.find_firecracker();
    let kvm = || -> (bool, String) {
        match settings.accel {
            Accel::Kvm => (true, "kvm: asked for".into()),
            Accel::Tcg => (false, "tcg: asked for".into()),
            Accel::Auto => {
                let finding = probe::run_kvm(&settings.tools);
                (
                    finding.ok,
                    format!("{}: {}", if finding.ok { "kvm" } else { "tcg" }, finding.reason),
                )
            }
        }
    };
    let (wants_firecracker, (has_kvm, why)) = match settings.backend {
        Backend::Firecracker => (true, (true, "kvm: Firecracker has no other".to_owned())),
        Backend::Qemu => (false, kvm()),
        Backend::Auto => {
            let found = kvm();
            (firecracker.is_some() && found.0, found)
        }
    };
    if wants_firecracker {
        let missing = StartError::Missing {
            program: "firecracker",
            fix: "set FIRECRACKER_BIN to its binary",
        };
        return Ok(Chosen::Firecracker {
            path: firecracker.ok_or(missing)?,
            why,
        });
    }
    if monitor.job.api_sock.is_some() {
        return Err(StartError::NoApi);
    }
    let fix = "sudo apt-get install --no-install-recommends qemu-system-x86";
    let path = settings
        .tools
        .find_qemu()
        .ok_or(StartError::Missing { program: "QEMU", fix })?;
    let accelerator = if has_kvm {
        Accelerator::Kvm
    } else {
        Accelerator::Tcg {
            tsc_khz: settings.tsc_khz.or_else(probe::measure_khz),
        }
    };
    Ok(Chosen::Qemu { path, accelerator, why })
}

fn firecracker_program(monitor: &Monitor, path: &Path) -> Program {
    let job = &monitor.job;
    let options = firecracker::Options {
        vm_id: &job.vm_id,
        metadata: job.metadata.as_deref(),
        boot_timer: job.boot_timer,
        api_sock: job.api_sock.as_deref(),
    };
    firecracker::program(path, &monitor.folder.config_file(), &options)
}

fn qemu_program(monitor: &Monitor, path: &Path, config: &VmConfig, accelerator: Accelerator) -> Program {
    let options = qemu::Options {
        vm_id: &monitor.job.vm_id,
        accelerator,
        vhost_socket: &monitor.settings.vhost_socket,
        sandbox: monitor.settings.qemu_sandbox,
    };
    qemu::program(path, config, &options)
}

fn start_vsock(monitor: &mut Monitor, vsock: &Vsock) -> Result<(), StartError> {
    let fix = "cargo install vhost-device-vsock --locked --root ~/.cache/far/vhost";
    let missing = StartError::Missing {
        program: "vhost-device-vsock",
        fix,
    };
    let daemon = monitor.settings.tools.find_vhost_device_vsock().ok_or(missing)?;
    let socket = monitor.settings.vhost_socket.clone();
    at(
        || "removing the vsock daemon's socket of an earlier run".into(),
        remove_socket(&socket),
    )?;
    monitor.sockets.push(socket.clone());
    let program = qemu::vsock_daemon(&daemon, vsock, &socket);
    let process = Process::spawn(&program, monitor.folder.path(), None);
    monitor.vsock = Some(at(|| format!("starting {}", daemon.display()), process)?);
    let deadline = Instant::now() + VSOCK_LIMIT;
    // Not by connecting: the daemon takes the first connection for the VMM's.
    while !is_listening(&socket) {
        monitor.turn(VSOCK_LOOK);
        if monitor.is_going() {
            return Err(StartError::BrokenOff);
        }
        if let Some(status) = monitor.vsock.as_mut().and_then(Process::ended) {
            return Err(StartError::VsockEnded {
                how: describe(status),
                words: monitor.last_words(),
            });
        }
        if Instant::now() >= deadline {
            return Err(StartError::VsockSilent { socket });
        }
    }
    Ok(())
}

/// True once somebody listens on `socket`: the file appears with bind(2), but a connection is taken only after
/// listen(2). /proc/net/unix shows that as flag 0x10000 (`__SO_ACCEPTCON`, proc_net(5)); where it cannot be read, the file counts.
fn is_listening(socket: &Path) -> bool {
    let Ok(table) = fs::read_to_string("/proc/net/unix") else {
        return socket.exists();
    };
    let path = socket.to_string_lossy();
    table.lines().any(|line| {
        line.split_whitespace().nth(3) == Some("00010000") && line.ends_with(path.as_ref()) && {
            let before = &line[..line.len() - path.len()];
            before.ends_with(' ')
        }
    })
}

/// Relative paths of a description are relative to its folder, for every backend alike.
fn make_absolute(config: &mut VmConfig, folder: &Path) {
    let boot = &mut config.boot_source;
    boot.kernel_image_path = folder.join(&boot.kernel_image_path);
    boot.initrd_path = boot.initrd_path.take().map(|path| folder.join(path));
    for drive in &mut config.drives {
        drive.path_on_host = folder.join(&drive.path_on_host);
    }
    if let Some(vsock) = &mut config.vsock {
        vsock.uds_path = folder.join(&vsock.uds_path);
    }
}

/// Each file the VMM will open, opened once here, so that a missing one is told by its field.
fn open_files(config: &VmConfig) -> Result<(), StartError> {
    let open = |field: String, path: &Path, write: bool| {
        let opened = fs::OpenOptions::new().read(true).write(write).open(path);
        opened.map(drop).map_err(|source| StartError::File {
            field,
            path: path.to_owned(),
            source,
        })
    };
    open(
        "boot-source.kernel_image_path".into(),
        &config.boot_source.kernel_image_path,
        false,
    )?;
    if let Some(initrd) = &config.boot_source.initrd_path {
        open("boot-source.initrd_path".into(), initrd, false)?;
    }
    for (index, drive) in config.drives.iter().enumerate() {
        open(
            format!("drives[{index}].path_on_host"),
            &drive.path_on_host,
            !drive.is_read_only,
        )?;
    }
    Ok(())
}

fn open_netns(path: &Path) -> Result<File, StartError> {
    File::open(path).map_err(|source| StartError::File {
        field: "netns".into(),
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_socket_counts_as_listening_only_while_somebody_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        assert!(!is_listening(&path));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(is_listening(&path));
        assert!(!is_listening(&folder.path().join("sock")));
        drop(listener);
        assert!(!is_listening(&path), "the file is still there, but nobody listens");
    }
}
