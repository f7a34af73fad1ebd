//! QEMU's microvm machine with the devices Firecracker has, from the same description.
//!
//! The vsock device is a separate program, vhost-device-vsock, which offers Firecracker's socket layout and needs the
//! guest's memory shared. Everything here runs on QEMU 7.2 and later.

use super::Program;
use crate::config::{CacheType, Drive, NetworkInterface, VmConfig, Vsock};
use std::path::Path;

/// How guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By QEMU's translator, on a host whose time stamp counter has this rate in kHz, if it is known.
    Tcg {
        /// kHz.
        tsc_khz: Option<u32>,
    },
}

/// What the description does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options<'a> {
    /// Name of the VM, shown in the process list.
    pub vm_id: &'a str,
    /// How guest code runs.
    pub accelerator: Accelerator,
    /// Socket of the vsock daemon.
    pub vhost_socket: &'a Path,
    /// QEMU's seccomp filter.
    pub sandbox: bool,
}

/// The vsock daemon's command line.
#[must_use]
pub fn vsock_daemon(daemon: &Path, vsock: &Vsock, vhost_socket: &Path) -> Program {
    let args = vec![
        "--guest-cid".into(),
        vsock.guest_cid.to_string().into(),
        "--socket".into(),
        vhost_socket.into(),
        "--uds-path".into(),
        vsock.uds_path.as_path().into(),
    ];
    Program {
        path: daemon.to_owned(),
        args,
    }
}

/// QEMU's command line. The serial console is its standard output.
#[must_use]
pub fn program(qemu: &Path, config: &VmConfig, options: &Options) -> Program {
    let machine = &config.machine_config;
    let memory = format!("{}M", machine.mem_size_mib);
    let mut args = Args::default();
    args.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
    args.option("-display", "none");
    args.option("-name", format!("guest={}", escape(options.vm_id)));
    if options.sandbox {
        args.option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
    }
    args.option("-M", "microvm,memory-backend=mem0");
    match options.accelerator {
        Accelerator::Kvm => args.option("-accel", "kvm").option("-cpu", "host"),
        // `max` keeps the time stamp counter as the guest's clock; older models make it tick in steps of 4 ms.
        Accelerator::Tcg { .. } => args.option("-accel", "tcg").option("-cpu", "max"),
    };
    args.option("-smp", machine.vcpu_count.to_string())
        .option("-m", &memory);
    // Shared, because the vsock daemon reads and writes the guest's memory.
    args.option(
        "-object",
        format!("memory-backend-memfd,id=mem0,size={memory},share=on"),
    );
    args.option("-kernel", text(&config.boot_source.kernel_image_path));
    if let Some(initrd) = &config.boot_source.initrd_path {
        args.option("-initrd", text(initrd));
    }
    args.option("-append", boot_args(config, options.accelerator));
    args.option("-chardev", "stdio,id=console,signal=off")
        .option("-serial", "chardev:console");
    // No device names its transport: QEMU takes them from the last one on and lists them to the guest in the same order,
    // so the first drive is /dev/vda. A device on virtio-mmio-bus.0 silences what programs write to the serial port (7.2).
    for drive in &config.drives {
        args.drive(drive);
    }
    for interface in &config.network_interfaces {
        args.interface(interface);
    }
    if config.vsock.is_some() {
        args.option(
            "-chardev",
            format!("socket,id=vsock,path={}", escape(text(options.vhost_socket))),
        );
        args.option("-device", "vhost-user-vsock-device,chardev=vsock");
    }
    if config.entropy.is_some() {
        args.option("-object", "rng-random,id=entropy,filename=/dev/urandom");
        args.option("-device", "virtio-rng-device,rng=entropy");
    }
    Program {
        path: qemu.to_owned(),
        args: args.0.into_iter().map(Into::into).collect(),
    }
}

/// The description's command line with what this machine needs added where it says nothing about it.
#[must_use]
pub fn boot_args(config: &VmConfig, accelerator: Accelerator) -> String {
    let given = config
        .boot_source
        .boot_args
        .as_deref()
        .unwrap_or("console=ttyS0 panic=-1");
    let has = |key: &str| given.split_whitespace().any(|word| word.split('=').next() == Some(key));
    let mut all = given.trim().to_owned();
    let mut add = |key: &str, word: &str| {
        if !has(key) {
            all.push(' ');
            all.push_str(word);
        }
    };
    if let Some(root) = config.drives.iter().find(|drive| drive.is_root_device) {
        add("root", "root=/dev/vda");
        if !has("ro") && !has("rw") {
            add("ro", if root.is_read_only { "ro" } else { "rw" });
        }
    }
    if let Accelerator::Tcg { tsc_khz } = accelerator {
        // Without the rate the kernel marks the counter unstable and then hangs without a word: this machine has no
        // other timer that a kernel with ACPI uses.
        if let Some(khz) = tsc_khz {
            add("tsc_early_khz", &format!("tsc_early_khz={khz}"));
        }
        add("tsc", "tsc=reliable");
        add("no_timer_check", "no_timer_check");
    }
    all
}

#[derive(Default)]
struct Args(Vec<String>);

impl Args {
    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    fn option(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.0.push(name.to_owned());
        self.0.push(value.into());
        self
    }

    fn drive(&mut self, drive: &Drive) {
        let Drive {
            drive_id,
            path_on_host,
            is_read_only,
            cache_type,
            ..
        } = drive;
        let path = escape(text(path_on_host));
        let readonly = if *is_read_only { "on" } else { "off" };
        let cache = match cache_type {
            Some(CacheType::Writeback) => "writeback",
            Some(CacheType::Unsafe) | None => "unsafe",
        };
        let options = format!("id=drive-{drive_id},file={path},if=none,format=raw,readonly={readonly},cache={cache}");
        self.option("-drive", options);
        self.option("-device", format!("virtio-blk-device,drive=drive-{drive_id}"));
    }

    fn interface(&mut self, interface: &NetworkInterface) {
        let NetworkInterface {
            iface_id,
            host_dev_name,
            guest_mac,
        } = interface;
        self.option(
            "-netdev",
            format!("tap,id=net-{iface_id},ifname={host_dev_name},script=no,downscript=no"),
        );
        let mac = guest_mac.as_ref().map(|mac| format!(",mac={mac}")).unwrap_or_default();
        self.option("-device", format!("virtio-net-device,netdev=net-{iface_id}{mac}"));
    }
}

/// A path's text. The description's check has refused paths that are not UTF-8; others of far-vmm come from there.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A comma ends an option's value in QEMU; doubled it is a comma.
fn escape(value: impl AsRef<str>) -> String {
    value.as_ref().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> VmConfig {
        VmConfig::parse(json.as_bytes()).unwrap()
    }

    fn line(config: &VmConfig, accelerator: Accelerator, sandbox: bool) -> String {
        let options = Options {
            vm_id: "fa-1",
            accelerator,
            vhost_socket: Path::new("/r/vhost.sock"),
            sandbox,
        };
        let program = program(Path::new("/bin/qemu"), config, &options);
        program
            .args
            .iter()
            .map(|arg| arg.to_str().unwrap())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn a_full_description_becomes_this_command_line_under_tcg() {
        let config = config(
            r#"{"boot-source": {"kernel_image_path": "/k/vmlinux", "initrd_path": "/k/initramfs.cpio",
                "boot_args": "console=ttyS0 rdinit=/init panic=-1 quiet"},
              "drives": [{"drive_id": "rootfs", "path_on_host": "/i/a,b.squashfs", "is_root_device": false, "is_read_only": true},
                {"drive_id": "scratch", "path_on_host": "/r/scratch", "is_root_device": false, "cache_type": "Writeback"}],
              "machine-config": {"vcpu_count": 2, "mem_size_mib": 512},
              "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "fa7", "guest_mac": "02:00:00:00:00:07"}],
              "vsock": {"guest_cid": 3, "uds_path": "/r/v.sock"}, "entropy": {}}"#,
        );
        let expected = "-nodefaults -no-user-config -no-reboot -display none -name guest=fa-1 \
            -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
            -M microvm,memory-backend=mem0 -accel tcg -cpu max -smp 2 -m 512M \
            -object memory-backend-memfd,id=mem0,size=512M,share=on \
            -kernel /k/vmlinux -initrd /k/initramfs.cpio \
            -append console=ttyS0 rdinit=/init panic=-1 quiet tsc_early_khz=2000000 tsc=reliable no_timer_check \
            -chardev stdio,id=console,signal=off -serial chardev:console \
            -drive id=drive-rootfs,file=/i/a,,b.squashfs,if=none,format=raw,readonly=on,cache=unsafe \
            -device virtio-blk-device,drive=drive-rootfs \
            -drive id=drive-scratch,file=/r/scratch,if=none,format=raw,readonly=off,cache=writeback \
            -device virtio-blk-device,drive=drive-scratch \
            -netdev tap,id=net-eth0,ifname=fa7,script=no,downscript=no \
            -device virtio-net-device,netdev=net-eth0,mac=02:00:00:00:00:07 \
            -chardev socket,id=vsock,path=/r/vhost.sock -device vhost-user-vsock-device,chardev=vsock \
            -object rng-random,id=entropy,filename=/dev/urandom -device virtio-rng-device,rng=entropy";
        assert_eq!(
            line(
                &config,
                Accelerator::Tcg {
                    tsc_khz: Some(2_000_000)
                },
                true
            ),
            expected
        );
    }

    #[test]
    fn the_smallest_description_has_no_device_under_kvm() {
        let config = config(
            r#"{"boot-source": {"kernel_image_path": "/k"}, "machine-config": {"vcpu_count": 1, "mem_size_mib": 64}}"#,
        );
        let expected = "-nodefaults -no-user-config -no-reboot -display none -name guest=fa-1 \
            -M microvm,memory-backend=mem0 -accel kvm -cpu host -smp 1 -m 64M \
            -object memory-backend-memfd,id=mem0,size=64M,share=on -kernel /k -append console=ttyS0 panic=-1 \
            -chardev stdio,id=console,signal=off -serial chardev:console";
        assert_eq!(line(&config, Accelerator::Kvm, false), expected);
    }

    #[test]
    fn the_command_line_of_the_kernel_gets_only_what_it_lacks() {
        let tcg = Accelerator::Tcg { tsc_khz: Some(7) };
        let cases = [
            (
                "nothing said",
                "quiet",
                "",
                tcg,
                "quiet tsc_early_khz=7 tsc=reliable no_timer_check",
            ),
            (
                "all said",
                "tsc=unstable tsc_early_khz=1 no_timer_check",
                "",
                tcg,
                "tsc=unstable tsc_early_khz=1 no_timer_check",
            ),
            (
                "rate unknown",
                "a",
                "",
                Accelerator::Tcg { tsc_khz: None },
                "a tsc=reliable no_timer_check",
            ),
            ("KVM has a clock of its own", "a", "", Accelerator::Kvm, "a"),
            (
                "root, read only",
                "a",
                "true, \"is_read_only\": true",
                Accelerator::Kvm,
                "a root=/dev/vda ro",
            ),
            ("root, writable", "a", "true", Accelerator::Kvm, "a root=/dev/vda rw"),
            (
                "root said",
                "root=/dev/vdb rw",
                "true",
                Accelerator::Kvm,
                "root=/dev/vdb rw",
            ),
            ("no root", "a", "false", Accelerator::Kvm, "a"),
        ];
        for (why, given, root, accelerator, expected) in cases {
            let drives = match root {
                "" => String::new(),
                root => format!(r#"{{"drive_id": "r", "path_on_host": "/r", "is_root_device": {root}}}"#),
            };
            let config = config(&format!(
                r#"{{"boot-source": {{"kernel_image_path": "/k", "boot_args": "{given}"}}, "drives": [{drives}],
                    "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}}}}"#
            ));
            assert_eq!(boot_args(&config, accelerator), expected, "{why}");
        }
    }

    #[test]
    fn the_vsock_daemon_gets_the_descriptions_socket() {
        let vsock = Vsock {
            vsock_id: None,
            guest_cid: 3,
            uds_path: "/r/v.sock".into(),
        };
        let program = vsock_daemon(Path::new("/bin/d"), &vsock, Path::new("/r/vhost.sock"));
        assert_eq!(
            program.args,
            [
                "--guest-cid",
                "3",
                "--socket",
                "/r/vhost.sock",
                "--uds-path",
                "/r/v.sock"
            ]
        );
    }
}
