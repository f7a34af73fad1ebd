//! Boot to Hello: one microVM by far-vmm alone, with this program as the host side of the control stream.
//!
//! Owns nothing but a folder: the VM is described as far-node describes it, and its first word is waited for on the
//! socket itself, so that the CPU time is read at that very moment.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use far_proto::{
    frame::{self, CONTROL_PORT, Decoder},
    guest::{
        Config, ExitAck, GuestMessage, Hello, HostMessage, Ready, Start, Welcome, guest_message, host_message::Kind,
    },
};
use far_testkit::{find, images, processes};
use far_vmm::{
    additions::Additions,
    config::{BootSource, Drive, Entropy, MachineConfig, VmConfig, Vsock},
};

use crate::cpu;

/// A bound against hanging, never a measurement.
const PATIENCE: Duration = Duration::from_secs(180);

/// What one boot showed.
pub(crate) struct Boot {
    /// CPU seconds of far-vmm, VMM and vsock daemon until Hello arrived.
    pub(crate) cpu_to_hello: f64,
    /// Seconds of the guest's clock at Hello.
    pub(crate) guest_at_hello: f64,
    /// Of those, from far-init's first instruction on.
    pub(crate) init_to_hello: f64,
}

/// Boots once, up to the payload's exit.
pub(crate) fn boot() -> Result<Boot> {
    let dir = tempfile::Builder::new().prefix("fb").tempdir_in("/tmp")?;
    let vm = dir.path().join("vm");
    fs::create_dir(&vm)?;
    let store = far_images::ImageStore::open(dir.path().join("images"))?;
    let archive = images::payload_archive().map_err(anyhow::Error::msg)?;
    let image = store.load_archive(fs::File::open(&archive)?, images::PAYLOAD)?;
    let kit = find::boot_kit().map_err(anyhow::Error::msg)?;
    let config = VmConfig {
        boot_source: BootSource {
            kernel_image_path: kit.join("vmlinux"),
            boot_args: Some("rdinit=/init console=ttyS0 quiet panic=-1".into()),
            initrd_path: Some(kit.join("initramfs.cpio")),
        },
        drives: vec![Drive {
            drive_id: "rootfs".into(),
            path_on_host: image.rootfs,
            is_root_device: false,
            is_read_only: true,
            cache_type: None,
            io_engine: None,
        }],
        machine_config: MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: None,
            track_dirty_pages: None,
        },
        network_interfaces: Vec::new(),
        vsock: Some(Vsock {
            vsock_id: None,
            guest_cid: 3,
            uds_path: vm.join("v.sock"),
        }),
        entropy: Some(Entropy {}),
        logger: None,
        metrics: None,
        mmds_config: None,
    };
    fs::write(vm.join("vm.json"), config.to_json())?;
    // TCG by name: otherwise the probe's own guest would be counted.
    let additions = Additions {
        accel: far_vmm::additions::Accel::Tcg,
        ..Additions::default()
    };
    fs::write(vm.join(far_vmm::additions::FILE_NAME), additions.to_json())?;
    let listener = UnixListener::bind(vm.join(format!("v.sock_{CONTROL_PORT}")))?;
    let mut far_vmm = Command::new(find::binary("far-vmm"))
        .args(["--id", "bench", "--no-api", "--config-file"])
        .arg(vm.join("vm.json"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .context("far-vmm")?;
    let result = talk(&listener, dir.path());
    end(&mut far_vmm, dir)?;
    result
}

/// far-vmm ends all it started when its folder goes.
fn end(far_vmm: &mut Child, dir: tempfile::TempDir) -> Result<()> {
    dir.close().context("removing the bench's folder")?;
    far_vmm.wait().context("waiting for far-vmm")?;
    Ok(())
}

fn talk(listener: &UnixListener, folder: &std::path::Path) -> Result<Boot> {
    let (stream, _) = listener.accept().context("waiting for the guest")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut guest = Guest {
        stream,
        decoder: Decoder::new(),
    };
    let hello: Hello = match guest.next()? {
        guest_message::Kind::Hello(hello) => hello,
        other => bail!("the guest's first word is {other:?}"),
    };
    // Now, before anything else is done.
    let running = processes::mentioning(folder);
    let cpu_to_hello = running.iter().try_fold(0.0, |sum, process| {
        Ok::<_, anyhow::Error>(sum + cpu::of_process(process.pid)?)
    })?;
    ensure!(
        running.iter().any(|process| process.command.contains("qemu")),
        "no VMM runs: {running:?}"
    );
    guest.send(Kind::Welcome(Welcome {
        generation: frame::GENERATION,
        log_window_bytes: 256 << 10,
        ..Welcome::default()
    }))?;
    guest.send(Kind::Config(Config {
        entrypoint: images::PAYLOAD_PATH.into(),
        ..Config::default()
    }))?;
    guest.send(Kind::Start(Start {}))?;
    let mut ready: Option<Ready> = None;
    loop {
        match guest.next()? {
            guest_message::Kind::Ready(seen) => ready = Some(seen),
            guest_message::Kind::Exit(_) => break,
            _ => {}
        }
    }
    guest.send(Kind::ExitAck(ExitAck {}))?;
    let ready = ready.context("the payload never ran")?;
    let init = ready
        .stages
        .iter()
        .find(|stage| stage.stage == "init")
        .context("far-init stamped no start")?;
    let seconds = |nanoseconds: u64| nanoseconds as f64 / 1e9;
    Ok(Boot {
        cpu_to_hello,
        guest_at_hello: seconds(hello.boot_ns),
        init_to_hello: seconds(hello.boot_ns.saturating_sub(init.boot_ns)),
    })
}

struct Guest {
    stream: UnixStream,
    decoder: Decoder,
}

impl Guest {
    fn next(&mut self) -> Result<guest_message::Kind> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(message) = self.decoder.next::<GuestMessage>()? {
                return message.kind.context("a message without kind");
            }
            let got = self.stream.read(&mut buffer).context("reading the control stream")?;
            ensure!(got > 0, "the guest hung up");
            self.decoder.push(&buffer[..got]);
        }
    }

    fn send(&mut self, kind: Kind) -> Result<()> {
        let mut wire = Vec::new();
        frame::encode(&HostMessage { kind: Some(kind) }, &mut wire);
        self.stream.write_all(&wire).context("writing the control stream")
    }
}
