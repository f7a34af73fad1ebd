//! `far down`: ends agents, then daemons, then whatever is left of microVMs, and says what it did.
//!
//! The controller goes first, so that it places nothing more while agents are being ended.

use std::{
    collections::BTreeSet,
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use far_proto::node::{
    AgentState, EndReason, Identity, ListAgentsRequest, Phase, StopAgentRequest, node_client::NodeClient,
};
use tonic::transport::Channel;

use crate::{
    args::DownArgs,
    daemons::{Daemon, Stopped},
    exit::{self, Outcome},
    folders::Folders,
    node::{self, NodeError},
    output, processes, up,
};

/// Time for a daemon to end by itself after TERM.
const DAEMON_GRACE: Duration = Duration::from_secs(20);
/// Time for a far-vmm that nobody looks after any more.
const VMM_GRACE: Duration = Duration::from_secs(5);
/// Added to the longest grace period of an agent: ending a VM and taking its folder away.
const BEYOND_GRACE: Duration = Duration::from_secs(30);
/// An agent may ask for a day; who calls `far down` wants an end.
const MAX_AGENT_GRACE_S: u32 = 30;
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// What `far up` keeps below its state folder; nothing else there is ours to remove.
const KEPT: [&str; 7] = [
    "kubeconfig",
    "blade-name",
    "devapi",
    "controller",
    "node",
    "logs",
    "run",
];

pub(crate) async fn down(folders: &Folders, args: &DownArgs) -> anyhow::Result<Outcome> {
    if !folders.pids().is_dir() {
        output::line("Nothing runs.");
        return Ok(Outcome::Success);
    }
    let only = up::lock(folders)?;
    let mut had_something = false;
    // Each step is tried, whatever became of the ones before.
    let mut failures = Vec::new();
    let mut stop = async |daemon: Daemon| match daemon.stop(folders, DAEMON_GRACE).await {
        Ok(Stopped::DidNotRun) => {}
        Ok(Stopped::ByItself) => {
            had_something = true;
            output::line(&format!("{} stopped", daemon.program()));
        }
        Ok(Stopped::Killed) => {
            had_something = true;
            output::line(&format!(
                "{} killed: it did not end within {} s",
                daemon.program(),
                DAEMON_GRACE.as_secs()
            ));
        }
        Err(error) => failures.push(exit::chain(&error.into())),
    };
    stop(Daemon::Controller).await;
    if Daemon::Node.process(folders).is_some()
        && let Err(error) = end_agents(folders).await
    {
        output::note(&format!(
            "the node agent could not end its agents ({}); their microVMs are ended without it",
            exit::chain(&error)
        ));
    }
    stop(Daemon::Node).await;
    stop(Daemon::Devapi).await;
    match end_vms(folders).await {
        Ok(0) => {}
        Ok(count) => {
            had_something = true;
            output::line(&format!("{count} microVMs ended"));
        }
        Err(error) => failures.push(exit::chain(&error)),
    }
    if let Err(error) = clear_run_folder(folders) {
        failures.push(exit::chain(&error));
    }
    if args.purge {
        match purge(folders) {
            Ok(()) => output::line(&format!("{} removed", folders.state.display())),
            Err(error) => failures.push(exit::chain(&error)),
        }
    } else if !had_something {
        output::line("Nothing runs.");
    }
    drop(only);
    if failures.is_empty() {
        Ok(Outcome::Success)
    } else {
        bail!("not everything could be stopped: {}", failures.join("; "))
    }
}

/// Asks the node agent to end every agent, and waits until it has.
async fn end_agents(folders: &Folders) -> anyhow::Result<()> {
    let mut client = tokio::time::timeout(DAEMON_GRACE, node::connect(&folders.node_socket()))
        .await
        .context("connecting to the node agent took too long")??;
    let live = live_agents(&mut client).await?;
    if live.is_empty() {
        return Ok(());
    }
    output::note(&format!("ending {} agents …", live.len()));
    // A claim that is just being done gives a warm agent another name.
    let mut told = BTreeSet::new();
    let limit = Duration::from_secs(MAX_AGENT_GRACE_S.into()) + BEYOND_GRACE;
    let begin = Instant::now();
    loop {
        let left = live_agents(&mut client).await?;
        if left.is_empty() && is_empty(&folders.vms()) {
            output::line(&format!("{} agents ended", live.len()));
            return Ok(());
        }
        for AgentState { identity, .. } in &left {
            let name = identity.as_ref().map(|of| (of.uid.clone(), of.attempt));
            if told.contains(&name) {
                continue;
            }
            match stop_agent(&mut client, identity.clone()).await {
                Ok(()) => drop(told.insert(name)),
                // Asked for again. One that does not answer at all is not waited for.
                Err(error) if error.is_busy() => {}
                Err(error) => return Err(error.into()),
            }
        }
        if begin.elapsed() > limit {
            bail!("{} agents are left after {} s", left.len(), limit.as_secs());
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn stop_agent(client: &mut NodeClient<Channel>, identity: Option<Identity>) -> Result<(), NodeError> {
    let mut request = tonic::Request::new(StopAgentRequest {
        epoch: 0,
        identity,
        grace_s: Some(MAX_AGENT_GRACE_S),
        reason: EndReason::Evicted.into(),
    });
    request.set_timeout(DAEMON_GRACE);
    let stopped = client.stop_agent(request).await;
    stopped.map(drop).map_err(NodeError::of("stopping an agent"))
}

async fn live_agents(client: &mut NodeClient<Channel>) -> Result<Vec<AgentState>, NodeError> {
    let mut call = tonic::Request::new(ListAgentsRequest {});
    call.set_timeout(DAEMON_GRACE);
    let mut agents = client
        .list_agents(call)
        .await
        .map_err(NodeError::of("listing agents"))?
        .into_inner()
        .agents;
    agents.retain(|agent| agent.phase() != Phase::Ended);
    Ok(agents)
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

/// Ends microVMs whose node agent is gone. A far-vmm takes its VMM and vsock daemon with it; one that had to be killed
/// leaves them to the kernel, which ends them with their parent.
async fn end_vms(folders: &Folders) -> anyhow::Result<usize> {
    let mut count = 0;
    for program in ["far-vmm", "qemu-system-x86_64", "vhost-device-vsock"] {
        for process in processes::with_argument(program, &folders.vms())? {
            process.end(VMM_GRACE).await?;
            if program == "far-vmm" {
                count += 1;
            }
        }
    }
    Ok(count)
}

/// Nothing runs any more: sockets and VM folders are left-overs.
fn clear_run_folder(folders: &Folders) -> anyhow::Result<()> {
    for path in [folders.node_socket(), folders.vms()] {
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        ignore_missing(removed).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// Removes what `far up` kept, by name, and the folders themselves when nothing else is in them.
fn purge(folders: &Folders) -> anyhow::Result<()> {
    for name in KEPT {
        let path = folders.state.join(name);
        let removed = if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        ignore_missing(removed).with_context(|| format!("removing {}", path.display()))?;
    }
    for folder in [&folders.state, &folders.run] {
        match fs::remove_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                output::note(&format!("{} has files that are not far's: it stays", folder.display()));
            }
            other => ignore_missing(other).with_context(|| format!("removing {}", folder.display()))?,
        }
    }
    Ok(())
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(base: &Path) -> Folders {
        Folders {
            state: base.join("state"),
            run: base.join("run"),
            cache: base.join("cache"),
            home: None,
            socket: None,
        }
    }

    #[tokio::test]
    async fn down_where_nothing_was_ever_started_is_no_error() {
        let base = tempfile::tempdir().unwrap();
        let outcome = down(&folders(base.path()), &DownArgs { purge: true }).await.unwrap();
        assert_eq!(outcome, Outcome::Success);
        assert!(!base.path().join("state").exists());
    }

    #[tokio::test]
    async fn purge_removes_what_is_ours_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let folders = folders(base.path());
        folders.prepare().unwrap();
        fs::create_dir_all(folders.state.join("node/logs")).unwrap();
        fs::write(folders.state.join("thesis.txt"), "mine").unwrap();
        fs::create_dir_all(folders.vms().join("fa-0-1")).unwrap();
        down(&folders, &DownArgs { purge: true }).await.unwrap();
        let left: Vec<_> = fs::read_dir(&folders.state)
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, ["thesis.txt"]);
        assert!(!folders.run.exists());
    }
}
