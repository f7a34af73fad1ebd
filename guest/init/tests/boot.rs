//! Real boots: far-init as the first process of a QEMU microvm (TCG), with the boot kit's kernel, a squashfs image and
//! vhost-device-vsock. Skipped by name where one of them is missing.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{
    Blade, Child, Event,
    host::{Host, exec},
};
use far_proto::guest::{
    ChannelStream, EnvVar, Exec, Exit, ExitAck, Freeze, Reseed, SetTime, Shutdown, Stage, TerminalSize, Thaw,
    TransferKind, channel_end, exit::How, host_message::Kind as ToGuest,
};
use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

/// What a real boot needs.
struct Parts {
    kernel: PathBuf,
    initramfs: PathBuf,
    vhost_vsock: PathBuf,
    qemu: PathBuf,
    mksquashfs: PathBuf,
}

/// Each part, or the name of the first that is missing.
fn parts() -> Result<Parts, String> {
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let cache = std::env::var_os("FAR_CACHE").map_or_else(|| home.join(".cache/far"), PathBuf::from);
    let kit = std::env::var_os("FAR_BOOT_KIT").map_or_else(|| cache.join("guest"), PathBuf::from);
    let existing = |path: PathBuf, what: &str| {
        if path.is_file() {
            Ok(path)
        } else {
            Err(format!("{what} ({})", path.display()))
        }
    };
    let vhost_vsock = match std::env::var_os("FAR_VHOST_VSOCK")
        .map(PathBuf::from)
        .or_else(|| on_path("vhost-device-vsock"))
    {
        Some(path) => path,
        None => cache.join("vhost/bin/vhost-device-vsock"),
    };
    Ok(Parts {
        kernel: existing(kit.join("vmlinux"), "the boot kit's kernel, made by `make guest`")?,
        initramfs: existing(
            kit.join("initramfs.cpio"),
            "the boot kit's initramfs, made by `make guest`",
        )?,
        vhost_vsock: existing(vhost_vsock, "vhost-device-vsock")?,
        qemu: on_path("qemu-system-x86_64").ok_or("qemu-system-x86_64")?,
        mksquashfs: on_path("mksquashfs").ok_or("mksquashfs")?,
    })
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// A VM before or after its start.
struct Vm {
    folder: tempfile::TempDir,
    blade: Blade,
    parts: Parts,
    machine: Option<(Child, Child)>,
    memory_mib: u32,
    /// Words behind the ordinary kernel command line.
    more_words: &'static str,
}

fn vm(test: &str, args: &[&str]) -> Option<Vm> {
    let parts = match parts() {
        Ok(parts) => parts,
        Err(missing) => {
            common::skip(test, &missing);
            return None;
        }
    };
    let folder = tempfile::Builder::new().prefix("far").tempdir().unwrap();
    let image = folder.path().join("image");
    fs::create_dir_all(image.join("bin")).unwrap();
    fs::copy(
        common::guest_programs().unwrap().join("far-payload"),
        image.join("bin/payload"),
    )
    .unwrap();
    let blade = Blade::listen(&folder.path().join("v.sock_5000"), "/bin/payload", args).unwrap();
    Some(Vm {
        folder,
        blade,
        parts,
        machine: None,
        memory_mib: 128,
        more_words: "",
    })
}

impl Vm {
    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.at("console")).unwrap_or_default()).into_owned()
    }

    fn make_image(&self) {
        let made = Command::new(&self.parts.mksquashfs)
            .arg(self.at("image"))
            .arg(self.at("image.squashfs"))
            .args(["-quiet", "-no-progress", "-all-root", "-comp", "zstd"])
            .stdout(Stdio::null())
            .status();
        assert!(made.unwrap().success());
    }

    fn start(&mut self) {
        if !self.at("image.squashfs").exists() {
            self.make_image();
        }
        // A second archive behind the kit's: its /init replaces the kit's.
        let mut initramfs = fs::read(&self.parts.initramfs).unwrap();
        let init = fs::read(common::guest_programs().unwrap().join("far-init")).unwrap();
        append_init(&mut initramfs, &init);
        fs::write(self.at("initramfs"), initramfs).unwrap();
        let vhost = Command::new(&self.parts.vhost_vsock)
            .args(["--guest-cid", "3", "--socket"])
            .arg(self.at("vhost.sock"))
            .arg("--uds-path")
            .arg(self.at("v.sock"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let vhost = Child(vhost.unwrap());
        wait_until("the vsock daemon listens", || self.at("vhost.sock").exists());
        let qemu = Command::new(&self.parts.qemu)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-nographic",
                "-no-reboot",
                "-accel",
                "tcg",
                "-cpu",
                "max",
            ])
            .args(["-M", "microvm,memory-backend=mem0", "-m", &self.memory_mib.to_string()])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=mem0,size={}M,share=on", self.memory_mib),
            ])
            .args(["-serial", &format!("file:{}", self.at("console").display())])
            .args([
                "-chardev",
                &format!("socket,id=vs0,path={}", self.at("vhost.sock").display()),
            ])
            .args(["-device", "vhost-user-vsock-device,chardev=vs0"])
            .args([
                "-drive",
                &format!(
                    "id=root,if=none,format=raw,readonly=on,file={}",
                    self.at("image.squashfs").display()
                ),
            ])
            .args(["-device", "virtio-blk-device,drive=root"])
            .args([
                "-netdev",
                "user,id=n0,restrict=on",
                "-device",
                "virtio-net-device,netdev=n0,mac=06:00:00:00:00:02",
            ])
            .arg("-kernel")
            .arg(&self.parts.kernel)
            .arg("-initrd")
            .arg(self.at("initramfs"))
            .args(["-append", &[command_line().as_str(), self.more_words].join(" ")])
            .stdin(Stdio::null())
            .spawn();
        self.machine = Some((Child(qemu.unwrap()), vhost));
    }

    /// Runs to the acknowledged exit and to the end of the VM.
    fn run(&mut self) -> Exit {
        self.start();
        let exit = self
            .blade
            .serve()
            .unwrap_or_else(|error| panic!("{error:#}; console:\n{}", self.console()));
        self.ends_well();
        exit
    }

    fn ends_well(&mut self) {
        let (qemu, _) = self.machine.as_mut().unwrap();
        assert!(qemu.wait().unwrap().success(), "console:\n{}", self.console());
        assert!(!self.console().contains("Kernel panic"), "console:\n{}", self.console());
    }
}

fn command_line() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpu
        .lines()
        .find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": ")?.1.parse::<f64>().ok());
    // TCG's rdtsc is the host's, and microvm has no other clock to measure it by.
    format!(
        "rdinit=/init console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check cryptomgr.notests mitigations=off tsc_early_khz={:.0}",
        mhz.unwrap_or(2000.0) * 1000.0
    )
}

/// Appends a newc archive with one executable file, `init` (Documentation/driver-api/early-userspace/buffer-format.rst).
fn append_init(archive: &mut Vec<u8>, init: &[u8]) {
    archive.resize(archive.len().next_multiple_of(512), 0);
    for (name, mode, data) in [("init", 0o100_755, init), ("TRAILER!!!", 0, &[][..])] {
        let fields = [7, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        write!(archive, "070701").unwrap();
        fields.iter().for_each(|field| write!(archive, "{field:08x}").unwrap());
        write!(archive, "{name}\0").unwrap();
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

fn wait_until(what: &str, predicate: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !predicate() {
        assert!(start.elapsed().as_secs() < 60, "{what}: not within 60 s");
        nix::poll::poll(&mut [], 10_u16).unwrap();
    }
}

#[test]
fn a_guest_says_hello_runs_its_payload_and_ends_with_exit_0() {
    let args = [
        "out=hello from the guest",
        "err=and its stderr",
        "cat=/proc/self/cgroup",
        "cat=/proc/self/oom_score_adj",
        "cat=/proc/sys/kernel/hostname",
        "stat=/dev/null",
        "stat=/dev/stdout",
        "stat=/tmp",
        "exit=0",
    ];
    let Some(mut vm) = vm("a_guest_says_hello_runs_its_payload_and_ends_with_exit_0", &args) else {
        return;
    };
    vm.blade.config.hostname = "embedder-worker-01".into();
    vm.blade.config.entropy = vec![0x5a; 64];
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    vm.blade.config.wall_time_unix_ns = now;
    vm.blade.config.nic = Some(far_proto::guest::Nic {
        mac: vec![6, 0, 0, 0, 0, 2],
        addresses: vec!["10.0.2.15/24".into(), "fd00::2/64".into()],
        gateways: vec!["10.0.2.2".into(), "fd00::1".into()],
        name_servers: vec!["10.0.2.3".into()],
        mtu: 1400,
    });
    let exit = vm.run();
    let out = vm.blade.text(0);
    assert_eq!(exit.how, Some(How::Code(0)), "{out}\n{}", vm.blade.text(1));
    assert!(
        out.starts_with("hello from the guest\n0::/payload\n0\nembedder-worker-01\n/dev/null mode=666 uid=0 size=0\n/dev/stdout mode="),
        "{out}"
    );
    assert!(out.ends_with("/tmp mode=1777 uid=0 size=40\n"), "{out}");
    assert_eq!(vm.blade.text(1), "and its stderr\n");
    let ready = vm.blade.ready.as_ref().unwrap();
    assert_eq!(ready.warnings, [""; 0]);
    assert!(exit.finished_unix_ns >= now, "the clock was set");
    assert!(!exit.oom_killed);
    for stage in &ready.stages {
        eprintln!(
            "{:>8}: {:.3} s after the kernel's start",
            stage.stage,
            stage.boot_ns as f64 / 1e9
        );
    }
}

/// Counted by the guest's own kernel, from the exec of /init to the payload's, without the three of each kernel module. A
/// guest does more than the 80 calls of `frugal.rs`: its cgroup, its devices and its loopback.
#[test]
fn a_real_start_takes_few_system_calls_and_less_than_1_mib_of_resident_memory() {
    const NAME: &str = "a_real_start_takes_few_system_calls_and_less_than_1_mib_of_resident_memory";
    const MAX_CALLS: usize = 128;
    const MAX_RESIDENT_KIB: u64 = 1024;
    let args = ["stop-trace", "cat=/sys/kernel/tracing/trace", "cat=/proc/1/status"];
    let Some(mut vm) = vm(NAME, &args) else { return };
    vm.more_words = "trace_event=raw_syscalls:sys_enter";
    fs::create_dir(vm.at("image/etc")).unwrap();
    fs::write(vm.at("image/etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
    let exit = vm.run();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", vm.blade.text(1));
    let text = vm.blade.text(0);
    // "            init-1       [000] .....     0.432101: sys_enter: NR 39 (…)"; a process has the name that it had last.
    let all: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once(" sys_enter: NR "))
        .filter(|(who, _)| {
            ["init-", "payload-"]
                .iter()
                .any(|name| who.trim_start().starts_with(name))
        })
        .filter_map(|(_, call)| call.split(' ').next())
        .collect();
    let exec = all.iter().position(|call| *call == "59").expect("the payload's exec");
    let calls = &all[..=exec];
    let modules = calls.iter().filter(|call| **call == "313").count();
    let own = calls.len() - 3 * modules;
    assert!(own <= MAX_CALLS, "{own} calls: {calls:?}");
    let resident = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(resident <= MAX_RESIDENT_KIB, "{resident} KiB resident");
    eprintln!("{own} system calls and 3 for each of {modules} modules, {resident} KiB resident");
}

#[test]
fn tiffany_embeds_the_documents_it_was_given() {
    let Some(mut vm) = vm("tiffany_embeds_the_documents_it_was_given", &["--task", "embedder"]) else {
        return;
    };
    fs::copy(
        common::guest_programs().unwrap().join("tiffany"),
        vm.at("image/bin/tiffany"),
    )
    .unwrap();
    vm.blade.config.entrypoint = "/bin/tiffany".into();
    vm.blade.files = vec![
        ("/task/a.md".into(), 0o444, b"# One\n\nText.\n".to_vec()),
        (
            "/task/long.txt".into(),
            0o444,
            "Some words here. ".repeat(100).into_bytes(),
        ),
    ];
    let exit = vm.run();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", vm.blade.text(1));
    assert_eq!(vm.blade.text(1), "embedded 3 chunks of 2 documents\n");
    assert_eq!(vm.blade.text(0).lines().count(), 3);
}

#[test]
fn without_documents_tiffany_embeds_its_own_corpus_in_the_guest() {
    let Some(mut vm) = vm(
        "without_documents_tiffany_embeds_its_own_corpus_in_the_guest",
        &["--task", "embedder"],
    ) else {
        return;
    };
    fs::copy(
        common::guest_programs().unwrap().join("tiffany"),
        vm.at("image/bin/tiffany"),
    )
    .unwrap();
    vm.blade.config.entrypoint = "/bin/tiffany".into();
    let exit = vm.run();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", vm.blade.text(1));
    assert!(
        vm.blade.text(1).ends_with("embedded 3 chunks of 3 documents\n"),
        "{}",
        vm.blade.text(1)
    );
}

#[test]
fn exit_3_of_a_guest_is_exit_3() {
    let Some(mut vm) = vm("exit_3_of_a_guest_is_exit_3", &["out=bad news", "exit=3"]) else {
        return;
    };
    let absent = vec![6, 0, 0, 0, 0, 0x99];
    vm.blade.config.nic = Some(far_proto::guest::Nic {
        mac: absent,
        ..Default::default()
    });
    let exit = vm.run();
    assert_eq!((exit.how, exit.start_error.as_str()), (Some(How::Code(3)), ""));
    assert_eq!(
        vm.blade.ready.unwrap().warnings,
        ["no NIC with MAC 06:00:00:00:00:99: ENODEV"]
    );
}

#[test]
fn a_guest_dials_again_and_loses_and_repeats_nothing() {
    let Some(mut vm) = vm(
        "a_guest_dials_again_and_loses_and_repeats_nothing",
        &["count-to=60", "err=done", "exit=0"],
    ) else {
        return;
    };
    vm.blade.heartbeat_ms = 100;
    vm.start();
    for stage in [Stage::WaitingForConfig, Stage::Running] {
        let mut connection = vm.blade.accept().unwrap();
        assert_eq!(vm.blade.hellos.last().unwrap().stage(), stage);
        let before = vm.blade.stored[0].1;
        while vm.blade.stored[0].1 < before + 5 {
            vm.blade.step(&mut connection).unwrap().unwrap();
        }
    }
    let exit = vm.blade.serve().unwrap();
    vm.ends_well();
    let heartbeat = vm.blade.last_heartbeat.as_ref().unwrap();
    assert!(
        heartbeat.mem_total_kib > heartbeat.mem_available_kib && heartbeat.mem_available_kib > 0,
        "{heartbeat:?}"
    );
    assert!(heartbeat.cpu_usage_us > 0 && heartbeat.boot_ns > 0, "{heartbeat:?}");
    assert_eq!(exit.how, Some(How::Code(0)));
    let expected: String = (1..=60).map(|n| format!("line {n}\n")).collect();
    assert_eq!((vm.blade.text(0), vm.blade.text(1)), (expected, "done\n".into()));
}

#[test]
fn a_blade_that_is_away_for_seconds_finds_its_guest_again() {
    const NAME: &str = "a_blade_that_is_away_for_seconds_finds_its_guest_again";
    let Some(mut vm) = vm(NAME, &["flood=1000000", "exit=6"]) else {
        return;
    };
    vm.start();
    let mut connection = vm.blade.accept().unwrap();
    while vm.blade.stored[0].1 == 0 {
        vm.blade.step(&mut connection).unwrap().unwrap();
    }
    // No listener at all: the daemon answers nothing, and the guest's connects time out after 2 s each.
    fs::rename(vm.at("v.sock_5000"), vm.at("away")).unwrap();
    drop(connection);
    // The blade's absence is the step: nothing to wait for.
    nix::poll::poll(&mut [], 3000_u16).unwrap();
    fs::rename(vm.at("away"), vm.at("v.sock_5000")).unwrap();
    let exit = vm.blade.serve().unwrap();
    vm.ends_well();
    assert_eq!(exit.how, Some(How::Code(6)));
    assert_eq!(vm.blade.text(0).len(), 1_000_000);
    assert!(
        vm.blade
            .text(0)
            .lines()
            .enumerate()
            .all(|(n, line)| line.parse() == Ok(n))
    );
}

#[test]
fn a_payload_that_takes_all_memory_is_reported_as_oom_killed() {
    let Some(mut vm) = vm(
        "a_payload_that_takes_all_memory_is_reported_as_oom_killed",
        &["out=hungry", "eat-memory"],
    ) else {
        return;
    };
    let exit = vm.run();
    assert_eq!((exit.how, exit.oom_killed), (Some(How::Signal(9)), true));
    assert_eq!(vm.blade.text(0), "hungry\n");
}

#[test]
fn a_payload_that_kills_pid_1_and_leaves_orphans_still_gets_its_exit_reported() {
    const NAME: &str = "a_payload_that_kills_pid_1_and_leaves_orphans_still_gets_its_exit_reported";
    let Some(mut vm) = vm(NAME, &["kill-init", "orphan=3600000", "out=alive", "exit=9"]) else {
        return;
    };
    assert_eq!(vm.run().how, Some(How::Code(9)));
    assert_eq!(vm.blade.text(0), "alive\n");
}

#[test]
fn an_image_that_is_no_squashfs_is_told_as_a_start_error() {
    let Some(mut vm) = vm("an_image_that_is_no_squashfs_is_told_as_a_start_error", &["out=never"]) else {
        return;
    };
    fs::write(vm.at("image.squashfs"), vec![0x55; 1 << 20]).unwrap();
    let exit = vm.run();
    assert!(
        exit.start_error
            .starts_with("spec.image: mounting squashfs on /far/image"),
        "{}",
        exit.start_error
    );
}

#[test]
fn environment_and_files_reach_a_real_guest() {
    let Some(mut vm) = vm(
        "environment_and_files_reach_a_real_guest",
        &["env=TOKEN", "cat=/task/notes.md", "stat=/task/notes.md"],
    ) else {
        return;
    };
    vm.blade.config.user = "4711:12".into();
    vm.blade.config.env = vec![EnvVar {
        name: "TOKEN".into(),
        value: "s3cret".into(),
    }];
    vm.blade.files = vec![("/task/notes.md".into(), 0o440, b"# Notes\n".to_vec())];
    vm.start();
    let mut connection = vm.blade.accept().unwrap();
    let exit = loop {
        match vm.blade.step(&mut connection).unwrap() {
            Some(Event::Exit(exit)) => break exit,
            Some(_) => {}
            None => panic!("{}", vm.console()),
        }
    };
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    vm.ends_well();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", vm.blade.text(1));
    assert_eq!(
        vm.blade.text(0),
        "TOKEN=s3cret\n# Notes\n/task/notes.md mode=440 uid=4711 size=8\n"
    );
    assert!(!vm.console().contains("s3cret"), "no secret on the console");
}

#[test]
fn a_real_guest_answers_exec_files_forward_time_entropy_and_freeze() {
    const NAME: &str = "a_real_guest_answers_exec_files_forward_time_entropy_and_freeze";
    let Some(mut vm) = vm(NAME, &["listen=80"]) else { return };
    vm.blade.heartbeat_ms = 100;
    vm.start();
    let mut connection = vm.blade.accept().unwrap();
    while vm.blade.text(0) != "listening\n" {
        assert!(vm.blade.step(&mut connection).unwrap().is_some(), "{}", vm.console());
    }
    let mut host = Host::new(&mut vm.blade, &mut connection);

    // Exec: in the payload's cgroup and root, with its code; and in a terminal whose size changes.
    host.exec(1, &["/bin/payload", "cat=/proc/self/cgroup", "err=oops", "exit=17"]);
    let heard = host.end(1);
    assert_eq!(
        heard.end.as_ref().unwrap().how,
        Some(channel_end::How::Code(17)),
        "{heard:?}"
    );
    assert_eq!(
        (&heard.stdout[..], &heard.stderr[..]),
        (&b"0::/payload\n"[..], &b"oops\n"[..])
    );
    let request = Exec {
        terminal: Some(TerminalSize { rows: 24, columns: 80 }),
        stdin: true,
        ..exec(
            2,
            &[
                "/bin/payload",
                "tty-size",
                "await-resize=40x120",
                "tty-size",
                "read-line",
                "exit=0",
            ],
        )
    };
    host.open(2, ToGuest::Exec(request));
    host.until("ready for a new size", |host| {
        host.channels[&2].stdout.ends_with(b"waiting\r\n")
    });
    host.resize(2, 40, 120);
    host.until("the new size", |host| host.channels[&2].stdout.ends_with(b"40x120\r\n"));
    host.type_in(2, "moin\n");
    let heard = host.end(2);
    assert_eq!(heard.end.as_ref().unwrap().how, Some(channel_end::How::Code(0)));
    assert_eq!(
        String::from_utf8_lossy(&heard.stdout),
        "24x80\r\nwaiting\r\n40x120\r\nmoin\r\nread moin\r\n"
    );

    // A folder goes in and comes out.
    let content: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    host.put(3, "/work", "");
    host.entry(3, TransferKind::Folder, "", 0o755, b"");
    host.entry(3, TransferKind::File, "data", 0o640, &content);
    host.entry(3, TransferKind::End, "", 0, b"");
    assert_eq!(host.end(3).end.as_ref().unwrap().error, "");
    let entries = &host.get(4, "/work").entries;
    assert_eq!(entries.len(), 2);
    assert!(entries[1].0.path == "data" && entries[1].0.mode == 0o640 && entries[1].1 == content);

    // An echo through the payload's port.
    host.forward(5, 80);
    host.until("the connection", |host| {
        host.channels[&5].opened.is_some() || host.channels[&5].end.is_some()
    });
    host.write(5, ChannelStream::Unspecified, &content, true);
    let heard = host.end(5);
    assert!(heard.plain == content, "{} bytes, {:?}", heard.plain.len(), heard.end);

    // Clock and entropy: a jump backwards and forwards harms nothing.
    let day_ns = 86_400_000_000_000;
    for (id, unix_ns) in [
        (1, day_ns),
        (2, 4_000_000_000_000_000_000),
        (3, 1_800_000_000_000_000_000),
    ] {
        host.send(ToGuest::SetTime(SetTime { id, unix_ns }));
        assert_eq!(host.answer(id), "");
        host.blade.last_heartbeat = None;
        host.until("a heartbeat with the new clock", |host| {
            let wall = host.blade.last_heartbeat.as_ref().map_or(0, |beat| beat.wall_unix_ns);
            wall >= unix_ns && wall < unix_ns + day_ns
        });
    }
    host.send(ToGuest::Reseed(Reseed {
        id: 4,
        entropy: vec![7; 64],
    }));
    assert_eq!(host.answer(4), "");
    host.send(ToGuest::Reseed(Reseed {
        id: 5,
        entropy: vec![7; 31],
    }));
    assert_ne!(host.answer(5), "");

    // Frozen, nothing of the payload runs; thawed, it goes on.
    host.exec(6, &["/bin/payload", "count-to=1000000"]);
    host.until("its lines", |host| host.channels[&6].stdout.len() > 20);
    host.send(ToGuest::Freeze(Freeze { id: 6 }));
    assert_eq!(host.answer(6), "");
    let heartbeats = host.blade.heartbeats;
    host.until("what was on its way", |host| host.blade.heartbeats > heartbeats + 2);
    let (still, heartbeats) = (host.channels[&6].stdout.len(), host.blade.heartbeats);
    host.until("time", |host| host.blade.heartbeats > heartbeats + 5);
    assert_eq!(host.channels[&6].stdout.len(), still, "it stands still");
    host.send(ToGuest::Thaw(Thaw { id: 7 }));
    assert_eq!(host.answer(7), "");
    host.until("more lines", |host| host.channels[&6].stdout.len() > still);

    let beat = host.blade.last_heartbeat.unwrap();
    eprintln!("{beat:?}");
    assert!(
        beat.channels == 1 && beat.payload_memory_kib > 0 && beat.processes >= 2,
        "{beat:?}"
    );
    connection.send(ToGuest::Shutdown(Shutdown { grace_s: 0 })).unwrap();
    let exit = vm.blade.until_exit(&mut connection).unwrap();
    assert_eq!(exit.how, Some(How::Signal(9)));
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    vm.ends_well();
}

#[test]
fn a_fork_bomb_meets_its_bound_and_the_guest_still_answers() {
    const NAME: &str = "a_fork_bomb_meets_its_bound_and_the_guest_still_answers";
    let Some(mut vm) = vm(NAME, &["out=up", "sleep=3600000"]) else {
        return;
    };
    vm.memory_mib = 256;
    vm.start();
    let mut connection = vm.blade.accept().unwrap();
    while vm.blade.text(0) != "up\n" {
        assert!(vm.blade.step(&mut connection).unwrap().is_some(), "{}", vm.console());
    }
    let mut host = Host::new(&mut vm.blade, &mut connection);
    host.exec(1, &["/bin/payload", "fork-bomb"]);
    host.until("the bomb", |host| host.channels[&1].opened.is_some());
    // Whatever the bomb does, the stop works: the memory limit may have ended the payload before.
    connection.send(ToGuest::Shutdown(Shutdown { grace_s: 0 })).unwrap();
    let exit = vm.blade.until_exit(&mut connection).unwrap();
    assert_eq!(exit.how, Some(How::Signal(9)));
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    vm.ends_well();
}
