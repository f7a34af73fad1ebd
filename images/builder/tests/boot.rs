//! What the builder makes, in a real microVM: the distribution's kernel, the initramfs' modules in their order, and an image
//! of [`far_image::oci`] as the store writes it. The init is a busybox script, so that nothing of ours is its own witness.
#![allow(clippy::unwrap_used, reason = "a panic in a test is the report")]

use far_image::{initramfs, oci::Builder};
use far_images::ImageStore;
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Longest time a boot may take. Slowest seen on a busy machine without KVM: 31 s.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Loads the modules, mounts the image and tells what is in it. Every line starts with `T:`.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
while read -r module; do
    $b insmod "$module" && echo "T:loaded $module" || echo "T:refused $module"
done </lib/far/modules
tries=0
until [ -b /dev/vda ] || [ $tries -ge 200 ]; do $b usleep 50000; tries=$((tries + 1)); done
$b mount -t squashfs -o ro /dev/vda /newroot && echo "T:mounted"
echo "T:greeting $($b cat /newroot/etc/greeting)"
echo "T:link $($b readlink /newroot/etc/link)"
echo "T:mode $($b stat -c '%a %u' /newroot/home/agent)"
echo "T:sum $($b sha256sum </newroot/big)"
$b mount -t tmpfs tmpfs /run && $b mkdir /run/upper /run/work /run/root
$b mount -t overlay -o lowerdir=/newroot,upperdir=/run/upper,workdir=/run/work overlay /run/root && echo "T:overlay"
echo changed >/run/root/etc/greeting && echo "T:written $($b cat /run/root/etc/greeting)"
$b reboot -f
"#;

#[test]
fn the_kernel_loads_every_module_in_order_and_mounts_an_image_of_the_builder() {
    const TEST: &str = "the_kernel_loads_every_module_in_order_and_mounts_an_image_of_the_builder";
    let Some(kernel) = kernel_folder() else {
        eprintln!("SKIPPED {TEST}: no kernel folder in FAR_KERNEL_DIR or FAR_BOOT_KIT (far-image kernel --out DIR)");
        return;
    };
    let Some(busybox) = static_busybox() else {
        eprintln!("SKIPPED {TEST}: no static busybox (apt-get install busybox-static)");
        return;
    };
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED {TEST}: no qemu-system-x86_64 (apt-get install qemu-system-x86)");
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let big: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    let rootfs = stored_image(work.path(), &big);
    let initrd = work.path().join("initramfs.cpio");
    fs::write(work.path().join("init"), INIT).unwrap();
    let mut archive = initramfs::build(&work.path().join("init"), &kernel.join("modules")).unwrap();
    // The kernel unpacks several archives in a row: the second brings the script's interpreter.
    archive.extend(one_file_cpio("bin/busybox", &busybox));
    fs::write(&initrd, archive).unwrap();

    let console = boot(&kernel.join("vmlinux"), &initrd, &rootfs, work.path());
    let lines: Vec<&str> = console
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("T:"))
        .collect();
    let order = fs::read_to_string(kernel.join("modules/order")).unwrap();
    let wanted: Vec<String> = order.lines().map(|name| format!("loaded /lib/far/{name}")).collect();
    let loaded: Vec<&str> = lines
        .iter()
        .copied()
        .filter(|line| line.contains("/lib/far/"))
        .collect();
    assert_eq!(loaded, wanted, "console:\n{console}");
    for said in [
        "mounted",
        "greeting hello from the image",
        "link greeting",
        "mode 700 1000",
        &format!("sum {}  -", sha256(&big)),
        "overlay",
        "written changed",
    ] {
        assert!(lines.contains(&said), "{said:?} is missing in the console:\n{console}");
    }
}

/// Folder with `vmlinux` and `modules/order`.
fn kernel_folder() -> Option<PathBuf> {
    ["FAR_KERNEL_DIR", "FAR_BOOT_KIT"]
        .iter()
        .filter_map(|name| env::var_os(name).map(PathBuf::from))
        .find(|folder| folder.join("vmlinux").is_file() && folder.join("modules/order").is_file())
}

/// Debian's busybox-static; the dynamic busybox of other packages names an ELF interpreter.
fn static_busybox() -> Option<Vec<u8>> {
    let bytes = ["/usr/bin/busybox", "/bin/busybox"]
        .iter()
        .find_map(|path| fs::read(path).ok())?;
    let is_dynamic = bytes.windows(8).any(|window| window == b"/ld-linu");
    (!is_dynamic).then_some(bytes)
}

fn stored_image(work: &Path, big: &[u8]) -> PathBuf {
    let mut image = Builder::new();
    image
        .file("/etc/greeting", 0o644, 0, "hello from the image")
        .unwrap()
        .symlink("/etc/link", "greeting")
        .unwrap()
        .folder("/home/agent", 0o700, 1000)
        .unwrap()
        .file("/big", 0o644, 0, big)
        .unwrap();
    let store = ImageStore::open(work.join("store")).unwrap();
    store
        .load_archive(image.build().as_slice(), "example.com/far/boot:test")
        .unwrap()
        .rootfs
}

fn boot(vmlinux: &Path, initrd: &Path, rootfs: &Path, work: &Path) -> String {
    let console = work.join("console");
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-no-reboot",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "256",
        ])
        .args(["-M", "microvm", "-serial"])
        .arg(format!("file:{}", console.display()))
        .arg("-kernel")
        .arg(vmlinux)
        .arg("-initrd")
        .arg(initrd)
        .arg("-append")
        // Without the timer's rate the kernel waits for a timer that microvm does not have.
        .arg(format!(
            "console=ttyS0 rdinit=/init panic=-1 quiet tsc=reliable no_timer_check tsc_early_khz={}",
            tsc_khz()
        ))
        .arg("-drive")
        .arg(format!(
            "if=none,file={},format=raw,readonly=on,id=d0",
            rootfs.display()
        ))
        .args(["-device", "virtio-blk-device,drive=d0"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + BOOT_LIMIT;
    while qemu.try_wait().unwrap().is_none() {
        if Instant::now() >= deadline {
            let _ = qemu.kill();
            let _ = qemu.wait();
            panic!("no end after {BOOT_LIMIT:?}; console:\n{}", text_of(&console));
        }
        #[allow(clippy::disallowed_methods)] // Looks at a process of its own; no other thread waits for this one.
        std::thread::sleep(Duration::from_millis(20));
    }
    text_of(&console)
}

fn text_of(console: &Path) -> String {
    String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned()
}

fn tsc_khz() -> u64 {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = cpuinfo.lines().find(|line| line.starts_with("cpu MHz")).unwrap();
    let mhz: f64 = line.rsplit(':').next().unwrap().trim().parse().unwrap();
    (mhz * 1000.0) as u64
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(bytes))
}

/// A newc archive with one executable and its folder, written apart from the builder's own.
fn one_file_cpio(path: &str, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut entry = |name: &str, mode: u32, inode: u32, bytes: &[u8]| {
        let size = bytes.len();
        let head = [
            inode,
            mode,
            0,
            0,
            1,
            0,
            size as u32,
            0,
            0,
            0,
            0,
            name.len() as u32 + 1,
            0,
        ];
        out.extend_from_slice(b"070701");
        head.iter()
            .for_each(|field| out.extend(format!("{field:08x}").into_bytes()));
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    let folder = path.rsplit_once('/').unwrap().0;
    entry(folder, 0o040_755, 900_001, b"");
    entry(path, 0o100_755, 900_002, bytes);
    entry("TRAILER!!!", 0, 0, b"");
    out
}
