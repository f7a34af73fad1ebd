//! The walking skeleton's costs: boot, one whole agent, placement, each against the nearest plain thing.
//!
//! - boot: CPU of a microVM until its agent runs, and how much of the guest's time was far-init's;
//! - `far run` of a loaded image against plain QEMU with a busybox init in the same kernel, both doing `echo`;
//! - `kubectl apply` until the API shows Scheduled and Completed.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use far_testkit::{Far, Options, find};

use crate::{
    cpu, hello,
    report::{Goal, Row},
};

const DAEMONS: [&str; 3] = ["far-devapi", "far-controller", "far-node"];

/// All rows, `rounds` times interleaved.
pub(crate) fn rows(rounds: usize) -> Result<Vec<Row>> {
    let far = Far::start(Options::default()).map_err(anyhow::Error::msg)?;
    let peer = BusyboxVm::prepare()?;
    let (mut whole, mut boot, mut scheduled, mut completed) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut to_hello, mut share) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        let ours = whole_run(&far, round)?;
        let plain = peer.as_ref().map(BusyboxVm::run).transpose()?;
        whole.push((ours, plain));
        boot.push((boot_cpu(&far, round)?, plain));
        let alone = hello::boot()?;
        to_hello.push((alone.cpu_to_hello, plain));
        share.push((100.0 * alone.init_to_hello / alone.guest_at_hello, None));
        let (to_scheduled, to_completed) = apply_latency(&far, round)?;
        scheduled.push((to_scheduled, None));
        completed.push((to_completed, None));
    }
    far.stop();
    let name = Some("plain qemu, same kernel, busybox init");
    Ok(vec![
        Row::of(
            "boot to Hello: far-vmm, VMM and vsock daemon",
            "CPU s",
            to_hello,
            name,
            None,
        ),
        Row::of("share of far-init in the guest's time to Hello", "%", share, None, None),
        Row::of(
            "boot until the agent is seen running: VMM and helpers",
            "CPU s",
            boot,
            name,
            None,
        ),
        Row::of(
            "far run of a loaded image: VM and all daemons",
            "CPU s",
            whole,
            name,
            Some(Goal::RatioAtMost(2.0)),
        ),
        Row::of("kubectl apply until Scheduled is seen", "s", scheduled, None, None),
        Row::of("kubectl apply until Completed is seen", "s", completed, None, None),
    ])
}

fn agent(name: &str, steps: &str) -> String {
    format!(
        "apiVersion: tiffany.dev/v1\nkind: FarAgent\nmetadata:\n  name: {name}\nspec:\n  image: {}\n  memory: 128Mi\n  args: {steps}\n",
        far_testkit::images::PAYLOAD
    )
}

/// CPU seconds that one agent costs from apply to Completed: the VM's, as its daemons report them, and the daemons' own.
fn whole_run(far: &Far, round: usize) -> Result<f64> {
    let before = daemons_cpu(far)?;
    let name = format!("whole-{round}");
    far.apply(&agent(&name, "[\"out=hello\"]"));
    let ended = far.wait_end(&name);
    anyhow::ensure!(ended["status"]["phase"] == "Completed", "{ended}");
    far.nothing_of_a_vm_is_left();
    // The node agent waits for its far-vmm, which waited for the VMM: their time is in the node agent's children.
    Ok(daemons_cpu(far)? - before)
}

fn daemons_cpu(far: &Far) -> Result<f64> {
    DAEMONS.iter().try_fold(0.0, |sum, name| {
        let pid = far.pid_of(name).with_context(|| format!("{name} does not run"))?;
        Ok(sum + cpu::of_process(pid)?)
    })
}

/// CPU seconds of far-vmm, QEMU and the vsock daemon when the agent is seen running; it sleeps then, so that looking late costs little.
fn boot_cpu(far: &Far, round: usize) -> Result<f64> {
    let name = format!("boot-{round}");
    far.apply(&agent(&name, "[\"sleep=600000\"]"));
    let _ = far.wait_phase(&name, "Running");
    let mut sum = 0.0;
    for helper in ["far-vmm", "qemu-system-x86_64", "vhost-device-vsock"] {
        let pid = far.pid_of(helper).with_context(|| format!("{helper} does not run"))?;
        sum += cpu::of_process(pid)?;
    }
    let _ = far.far(&["delete", "faragent", &name]).ok();
    far.nothing_of_a_vm_is_left();
    Ok(sum)
}

/// Wall seconds from the start of `kubectl apply` until a watch shows Scheduled, and Completed.
fn apply_latency(far: &Far, round: usize) -> Result<(f64, f64)> {
    let kubectl = find::kubectl().map_err(anyhow::Error::msg)?;
    let name = format!("latency-{round}");
    let columns = "custom-columns=NAME:.metadata.name,PHASE:.status.phase";
    let mut watch = far
        .command(&kubectl)
        .args([
            "get",
            "faragents",
            "--watch-only",
            "--output-watch-events=false",
            "-o",
            columns,
            "--no-headers",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the watch")?;
    let lines = BufReader::new(watch.stdout.take().context("the watch has no output")?).lines();
    let start = Instant::now();
    let manifest = agent(&name, "[\"out=hello\"]");
    let _ = far.kubectl_with(&["apply", "-f", "-"], &manifest).ok();
    let (mut scheduled, mut completed) = (None, None);
    for line in lines {
        let line = line?;
        let mut words = line.split_whitespace();
        if words.next() != Some(name.as_str()) {
            continue;
        }
        match words.next() {
            Some("Failed") => bail!("{name} failed"),
            Some("Completed") => completed = Some(start.elapsed().as_secs_f64()),
            Some("Scheduled" | "Starting" | "Running") => {}
            _ => continue,
        }
        scheduled.get_or_insert(start.elapsed().as_secs_f64());
        if completed.is_some() {
            break;
        }
    }
    watch.kill().context("ending the watch")?;
    watch.wait().context("ending the watch")?;
    Ok((
        scheduled.context("Scheduled was not seen")?,
        completed.context("Completed was not seen")?,
    ))
}

/// The peer: the same kernel and QEMU without anything of ours.
struct BusyboxVm {
    dir: tempfile::TempDir,
    kernel: std::path::PathBuf,
}

impl BusyboxVm {
    /// `None` where there is no static busybox.
    fn prepare() -> Result<Option<Self>> {
        let busybox = Path::new("/bin/busybox");
        if !busybox.is_file() {
            return Ok(None);
        }
        let kernel = find::boot_kit().map_err(anyhow::Error::msg)?.join("vmlinux");
        let dir = tempfile::tempdir()?;
        let root = dir.path().join("root");
        for folder in ["bin", "proc", "dev"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::copy(busybox, root.join("bin/busybox"))?;
        let init = root.join("init");
        fs::write(
            &init,
            "#!/bin/busybox sh\n/bin/busybox mount -t proc none /proc\necho hello\n/bin/busybox reboot -f\n",
        )?;
        fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let archive = Command::new("sh")
            .args(["-c", "find . | cpio --quiet -o -H newc > ../initrd.cpio"])
            .current_dir(&root)
            .status()
            .context("cpio")?;
        anyhow::ensure!(archive.success(), "packing the busybox initramfs needs cpio");
        Ok(Some(Self { dir, kernel }))
    }

    /// CPU seconds of one boot to `hello` and reboot.
    fn run(&self) -> Result<f64> {
        let before = cpu::of_children()?;
        let khz = fs::read_to_string("/proc/cpuinfo")?
            .lines()
            .find_map(|line| {
                line.strip_prefix("cpu MHz")?
                    .trim_start_matches(['\t', ' ', ':'])
                    .parse::<f64>()
                    .ok()
            })
            .context("no cpu MHz in /proc/cpuinfo")?
            * 1000.0;
        let append = format!(
            "console=ttyS0 rdinit=/init panic=-1 quiet tsc=reliable no_timer_check cryptomgr.notests mitigations=off tsc_early_khz={khz:.0}"
        );
        let output = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-no-user-config",
                "-nographic",
                "-serial",
                "stdio",
                "-no-reboot",
                "-M",
                "microvm",
                "-accel",
                "tcg",
            ])
            .args(["-cpu", "max", "-m", "128", "-append", &append, "-kernel"])
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(self.dir.path().join("initrd.cpio"))
            .stdin(Stdio::null())
            .output()
            .context("qemu-system-x86_64")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !text.contains("hello") {
            std::io::stderr().write_all(&output.stderr)?;
            bail!("the busybox guest said no hello: {text}");
        }
        Ok(cpu::of_children()? - before)
    }
}
