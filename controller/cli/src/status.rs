//! `far status`: what runs on this machine.

use far_proto::node::{CapacityRequest, ListAgentsRequest, NodeCapacity, Phase};
use serde_json::json;

use crate::{
    args::OutputArgs,
    daemons::Daemon,
    describe::span,
    exit::Outcome,
    folders::Folders,
    node::{self, NodeError},
    output::{self, Colour, coloured},
    table::aligned,
};

struct Seen {
    daemon: Daemon,
    state: &'static str,
    pid: Option<i32>,
    address: Option<String>,
    age: Option<std::time::Duration>,
}

impl Seen {
    fn of(daemon: Daemon, folders: &Folders) -> Self {
        let process = daemon.process(folders);
        let address = process.as_ref().and_then(|_| daemon.address(folders));
        let state = match (&process, &address) {
            (Some(_), Some(_)) => "running",
            (Some(_), None) => "starting",
            (None, _) if daemon.was_started(folders) => "dead",
            (None, _) => "stopped",
        };
        Self {
            daemon,
            state,
            pid: process.as_ref().map(|process| process.pid),
            age: process.as_ref().and_then(crate::processes::Process::age),
            address,
        }
    }
}

/// What the node agent says of itself.
struct Blade {
    capacity: NodeCapacity,
    live: usize,
    ended: usize,
}

/// Exit code 1 where a daemon was started and is dead.
pub(crate) async fn status(folders: &Folders, args: &OutputArgs) -> anyhow::Result<Outcome> {
    let seen = Daemon::ALL.map(|daemon| Seen::of(daemon, folders));
    let blade = match seen.iter().any(|one| one.daemon == Daemon::Node && one.pid.is_some()) {
        true => Some(ask_blade(folders).await),
        false => None,
    };
    if args.output.is_some() {
        print_json(folders, &seen, blade.as_ref())?;
    } else {
        print_text(folders, &seen, blade.as_ref());
    }
    let has_dead = seen.iter().any(|one| one.state == "dead");
    Ok(if has_dead { Outcome::Negative } else { Outcome::Success })
}

async fn ask_blade(folders: &Folders) -> Result<Blade, NodeError> {
    let mut client = node::connect(&folders.node_socket()).await?;
    let capacity = client
        .capacity(CapacityRequest {})
        .await
        .map_err(NodeError::of("asking for the capacity"))?
        .into_inner();
    let agents = client
        .list_agents(ListAgentsRequest {})
        .await
        .map_err(NodeError::of("listing agents"))?
        .into_inner()
        .agents;
    let ended = agents.iter().filter(|agent| agent.phase() == Phase::Ended).count();
    Ok(Blade {
        capacity,
        live: agents.len() - ended,
        ended,
    })
}

fn print_text(folders: &Folders, seen: &[Seen], blade: Option<&Result<Blade, NodeError>>) {
    let mut rows = vec![["PART", "STATE", "PID", "ADDRESS", "AGE"].map(str::to_owned).to_vec()];
    for one in seen {
        rows.push(vec![
            one.daemon.program().to_owned(),
            one.state.to_owned(),
            one.pid.map_or_else(String::new, |pid| pid.to_string()),
            one.address.clone().unwrap_or_default(),
            one.age
                .and_then(|age| time::Duration::try_from(age).ok())
                .map_or_else(String::new, span),
        ]);
    }
    for line in aligned(&rows) {
        output::line(&colour_state(&line));
    }
    if seen.iter().any(|one| one.state == "dead") {
        output::line(&format!(
            "\nA part is dead: `far up` starts it again; its log is in {}",
            folders.logs().display()
        ));
    } else if seen.iter().all(|one| one.state == "stopped") {
        output::line("\nNothing runs: `far up` starts it.");
    }
    match blade {
        None => {}
        Some(Err(error)) => output::line(&format!("\nBlade: {error}")),
        Some(Ok(blade)) => {
            let capacity = &blade.capacity;
            output::line(&format!(
                "\nBlade: {} of {} millicores and {} of {} MiB for agents; {} agents run, {} ended; {} images",
                capacity.allocatable_cpu_millis,
                capacity.cpu_millis,
                capacity.allocatable_memory_mib,
                capacity.memory_mib,
                blade.live,
                blade.ended,
                capacity.images.len()
            ));
            let why = if capacity.kvm_reason.is_empty() {
                String::new()
            } else {
                format!(" (no KVM: {})", capacity.kvm_reason)
            };
            output::line(&format!("microVMs: {} on {}{why}", capacity.vmm, capacity.accelerator));
        }
    }
    output::line(&format!(
        "State: {}\nKubeconfig: {}",
        folders.state.display(),
        folders.kubeconfig().display()
    ));
}

/// Colours after aligning: escape sequences have no width on the terminal, but characters in the cell.
fn colour_state(line: &str) -> String {
    for (state, colour) in [
        ("running", Colour::Green),
        ("starting", Colour::Yellow),
        ("dead", Colour::Red),
    ] {
        if let Some(at) = line.find(&format!("   {state}")) {
            let (before, rest) = line.split_at(at + 3);
            return format!("{before}{}{}", coloured(state, colour), &rest[state.len()..]);
        }
    }
    line.to_owned()
}

fn print_json(folders: &Folders, seen: &[Seen], blade: Option<&Result<Blade, NodeError>>) -> anyhow::Result<()> {
    let parts: Vec<_> = seen
        .iter()
        .map(|one| {
            json!({
                "name": one.daemon.program(),
                "state": one.state,
                "pid": one.pid,
                "address": one.address,
                "ageSeconds": one.age.map(|age| age.as_secs()),
            })
        })
        .collect();
    let blade = match blade {
        None => json!(null),
        Some(Err(error)) => json!({"error": error.to_string()}),
        Some(Ok(blade)) => json!({
            "cpuMillis": blade.capacity.cpu_millis,
            "allocatableCpuMillis": blade.capacity.allocatable_cpu_millis,
            "memoryMiB": blade.capacity.memory_mib,
            "allocatableMemoryMiB": blade.capacity.allocatable_memory_mib,
            "vmm": blade.capacity.vmm,
            "accelerator": blade.capacity.accelerator,
            "kvmReason": blade.capacity.kvm_reason,
            "agents": {"live": blade.live, "ended": blade.ended},
        }),
    };
    let status = json!({
        "parts": parts,
        "blade": blade,
        "state": folders.state,
        "run": folders.run,
        "kubeconfig": folders.kubeconfig(),
    });
    output::line(&serde_json::to_string_pretty(&status)?);
    Ok(())
}
