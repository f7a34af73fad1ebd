//! `far-vmm`: runs one VMM and owns its life. Takes Firecracker's command line, so that whatever starts Firecracker can
//! start it instead.

#![forbid(unsafe_code)]

use clap::Parser;
use far_vmm::{
    probe,
    run::{self, Job, RunError},
    vsock,
};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::exit,
};

/// Firecracker's own code for a bad configuration.
const BAD_CONFIGURATION: i32 = 152;
/// Firecracker's own code for bad arguments.
const BAD_ARGUMENTS: i32 = 153;
/// The VM was booted before, or another far-vmm has its folder.
const REFUSED: i32 = 3;

/// Runs one microVM from Firecracker's JSON description and owns its life.
///
/// Ends with the VMM's code, 128 + n after signal n, 1 if the VMM could not be started (exit.json says why), 3 if the VM
/// was booted before, 152 for unusable additions, 153 for wrong arguments.
#[derive(Debug, Parser)]
#[command(name = "far-vmm", version, about)]
struct Args {
    /// Name of the VM: 1 to 64 of [A-Za-z0-9-]
    #[arg(long, default_value = "anonymous-instance")]
    id: String,
    /// The VM's description in Firecracker's JSON; far.json is looked for beside it
    #[arg(long, required_unless_present_any = ["probe", "ping"])]
    config_file: Option<PathBuf>,
    /// Content of Firecracker's metadata service (firecracker only)
    #[arg(long)]
    metadata: Option<PathBuf>,
    /// Accepted because Firecracker has it: without --api-sock there is no API
    #[arg(long, conflicts_with = "api_sock")]
    no_api: bool,
    /// Log the boot's time (firecracker only)
    #[arg(long)]
    boot_timer: bool,
    /// Socket of Firecracker's API (firecracker only)
    #[arg(long)]
    api_sock: Option<PathBuf>,
    /// Print as JSON what this machine can do for microVMs, and end
    #[arg(long, conflicts_with = "config_file")]
    probe: bool,
    /// Ping the guest behind this vsock socket on port 1024, however long it takes; print why it did not answer, and end with 0
    /// if it did
    #[arg(long, value_name = "UDS_PATH", conflicts_with_all = ["config_file", "probe"])]
    ping: Option<PathBuf>,
}

fn main() {
    far_vmm::sys::close_inherited_files();
    let args = Args::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        exit(if error.use_stderr() { BAD_ARGUMENTS } else { 0 });
    });
    if args.probe {
        let found = probe::run(&probe::ProbeOptions::default());
        println!(
            "{}",
            serde_json::to_string_pretty(&found).expect("plain data has a JSON form")
        );
        return;
    }
    if let Some(uds_path) = args.ping {
        stand_alone();
        exit(ping(&uds_path));
    }
    let Some(config_file) = args.config_file else {
        exit(BAD_ARGUMENTS)
    };
    stand_alone();
    let Args {
        id: vm_id,
        metadata,
        boot_timer,
        api_sock,
        ..
    } = args;
    let job = Job {
        vm_id,
        config_file,
        metadata,
        boot_timer,
        api_sock,
    };
    exit(run::run(&job).unwrap_or_else(|error| {
        eprintln!("far-vmm {}: {}", job.vm_id, run::chain(&error));
        match error {
            RunError::VmId { .. } => BAD_ARGUMENTS,
            RunError::Additions { .. } => BAD_CONFIGURATION,
            RunError::Folder(_) => REFUSED,
            RunError::Setup { .. } => 1,
        }
    }));
}

/// Answers the exit code. Whoever asked may be gone: then nobody reads why.
fn ping(uds_path: &Path) -> i32 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let pinged = runtime.map(|runtime| runtime.block_on(vsock::ping(uds_path)));
    let why = match pinged {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    let _ = writeln!(std::io::stdout(), "{why}");
    1
}

/// Own session, so that what ends the parent's does not end the VM; private files; no core dump of a guest's memory.
fn stand_alone() {
    use nix::sys::{
        resource::{Resource, setrlimit},
        stat::{Mode, umask},
    };
    // Fails only where far-vmm leads a process group already, as when it was started by setsid(1) or a shell's job control.
    let _ = nix::unistd::setsid();
    umask(Mode::from_bits_truncate(0o077));
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        eprintln!("far-vmm: core dumps stay possible: {error}");
    }
}
