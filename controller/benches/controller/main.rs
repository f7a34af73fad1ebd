//! The controller against kube-scheduler and against the agent-sandbox controller, both with kwok, in turn on one real
//! kube-apiserver: `make bench-controller`.
//!
//! The defaults take some minutes; `--full` are the sizes of the project's goals.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)] // Counts and shares.

#[path = "../../../tests/bench/src/cpu.rs"]
#[allow(dead_code)] // Shared with the other benches.
mod cpu;
mod far;
mod load;
mod pods;
#[path = "../../../tests/bench/src/report.rs"]
#[allow(dead_code, unused_imports)] // Shared with the other benches; its tests run with them.
mod report;
mod sandboxes;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::{path::PathBuf, process::Command};

use anyhow::Result;
use clap::Parser;
use far_testkit::servers::Part;
use load::{Arm, percentile};
use report::{Goal, Row};

use crate::{
    far::Far,
    pods::Pods,
    sandboxes::Sandboxes,
    support::{Cluster, server::Server},
};

/// Sizes of the run.
#[derive(Debug, Clone, Parser)]
struct Sizes {
    /// How often each arm runs, in turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where controller.json is written.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Agents (and Pods) of one load.
    #[arg(long, default_value_t = 300)]
    agents: usize,
    /// Blades (and nodes).
    #[arg(long, default_value_t = 10)]
    blades: usize,
    /// Creations a second of the load whose latency is measured.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// Existing agents between which latency may not grow.
    #[arg(long, default_value_t = 200)]
    few: usize,
    /// And as many in the end.
    #[arg(long, default_value_t = 3_000)]
    many: usize,
    /// Blades known by their FarNode when memory is measured.
    #[arg(long, default_value_t = 500)]
    known_blades: usize,
    /// The sizes of the goals: 1,000 and 50,000 existing agents, then 100,000 of them and 10,000 blades.
    #[arg(long)]
    full: bool,
    /// Keeps the servers' data and logs.
    #[arg(long)]
    keep: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A program that the kernel ends with this one's main thread, which starts it.
fn tied(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

/// One load on one arm.
struct Load {
    p50: f64,
    p99: f64,
    /// Of the placer, for 1,000 objects from creation to end.
    cpu: f64,
    writes: f64,
    events: f64,
    bound: f64,
}

async fn load(arm: &Arm, sizes: &Sizes, round: usize) -> Result<Load> {
    let count = sizes.agents as f64;
    let (before, cpu_before) = (arm.writes().await?, cpu::of_process(arm.placer)?);
    let latencies = arm.latencies(&format!("l{round}"), sizes.agents, sizes.rate).await?;
    arm.all_ended().await?;
    let (after, cpu_after) = (arm.writes().await?, cpu::of_process(arm.placer)?);
    let bound = arm.burst(&format!("b{round}"), sizes.agents).await?;
    arm.all_ended().await?;
    arm.clear().await?;
    Ok(Load {
        p50: percentile(&latencies, 0.5),
        p99: percentile(&latencies, 0.99),
        cpu: (cpu_after - cpu_before) / count * 1e3,
        writes: (after.0 - before.0) / count,
        events: (after.1 - before.1) / count,
        bound,
    })
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut sizes = Sizes::parse();
    let mut held = sizes.many;
    if sizes.full {
        (sizes.agents, sizes.few, sizes.many, sizes.known_blades) = (2_000, 1_000, 50_000, 10_000);
        held = 100_000;
    }
    let mut dir = tempfile::tempdir()?;
    dir.disable_cleanup(sizes.keep);
    if sizes.keep {
        eprintln!("data and logs: {}", dir.path().display());
    }
    let server = Server::real(dir.path(), &[Part::Scheduler]).await;
    let cluster = Cluster::on(dir, server).await;
    let (pods, sandboxes) = {
        let Server::Real(plane) = &cluster.api else {
            unreachable!("a real one was asked for")
        };
        let pods = Pods::start(plane, &cluster.client, cluster.dir.path(), sizes.blades).await?;
        let sandboxes = Sandboxes::start(plane, &cluster.client, cluster.dir.path()).await;
        (pods, sandboxes)
    };
    if let Err(error) = &sandboxes {
        eprintln!("SKIPPED agent-sandbox: {error:#}");
    }
    let mut far = Far::start(cluster, sizes.blades).await?;

    let mut rounds = Vec::new();
    for round in 0..sizes.rounds {
        eprintln!("round {} of {}", round + 1, sizes.rounds);
        let ours = load(&far.arm, &sizes, round).await?;
        let scheduler = load(&pods.arm, &sizes, round).await?;
        let sandbox = match &sandboxes {
            Ok(sandboxes) => Some(load(&sandboxes.arm, &sizes, round).await?),
            Err(_) => None,
        };
        rounds.push((ours, scheduler, sandbox));
    }
    drop((pods, sandboxes));

    eprintln!("latency with {} and with {} existing agents", sizes.few, sizes.many);
    let mut growth = Vec::new();
    far.kill()?;
    far.existing("old", 0, sizes.few).await?;
    far.restart("with-few").await?;
    let few = far.arm.latencies("few", sizes.agents, sizes.rate).await?;
    far.kill()?;
    far.existing("old", sizes.few, sizes.many).await?;
    far.restart("with-many").await?;
    let many = far.arm.latencies("many", sizes.agents, sizes.rate).await?;
    growth.push((percentile(&many, 0.5), Some(percentile(&few, 0.5))));

    eprintln!(
        "memory and restart with {held} agents and {} blades",
        sizes.known_blades
    );
    far.kill()?;
    far.existing("old", sizes.many, held).await?;
    far.known_blades(sizes.known_blades).await?;
    let restart = far.restart("after-restart").await?;
    let memory = far.memory_mib()?;

    let both = |ours: fn(&Load) -> f64| -> Vec<(f64, Option<f64>)> {
        rounds
            .iter()
            .map(|(far, pods, _)| (ours(far), Some(ours(pods))))
            .collect()
    };
    let with_sandbox = |ours: fn(&Load) -> f64| -> Vec<(f64, Option<f64>)> {
        rounds
            .iter()
            .map(|(far, _, sandbox)| (ours(far), sandbox.as_ref().map(ours)))
            .collect()
    };
    let scheduler = Some("kube-scheduler v1.36.3 with kwok v0.8.0");
    let sandbox = Some("agent-sandbox v0.5.6 with kube-scheduler and kwok");
    let rate = sizes.rate;
    let rows = [
        Row::of(
            "writes to an agent, create to Completed",
            "writes",
            both(|one| one.writes),
            scheduler,
            Some(Goal::AtMost(5.0)),
        ),
        Row::of(
            "writes of Events for an agent",
            "writes",
            both(|one| one.events),
            scheduler,
            None,
        ),
        Row::of(
            "placer's CPU for 1,000 agents",
            "CPU s",
            both(|one| one.cpu),
            scheduler,
            Some(Goal::RatioAtMost(1.0)),
        ),
        Row::of(
            &format!("create to Scheduled at {rate}/s, p50"),
            "ms",
            both(|one| one.p50),
            scheduler,
            Some(Goal::AtMost(10.0)),
        ),
        Row::of(
            &format!("create to Scheduled at {rate}/s, p99"),
            "ms",
            both(|one| one.p99),
            scheduler,
            Some(Goal::AtMost(50.0)),
        ),
        Row::of(
            "bound agents",
            "per s",
            both(|one| one.bound),
            scheduler,
            Some(Goal::RatioAtLeast(2.0)),
        ),
        Row::of(
            &format!("p50 with {} existing agents (peer: with {})", sizes.many, sizes.few),
            "ms",
            growth,
            Some("the same with few"),
            Some(Goal::RatioAtMost(1.2)),
        ),
        Row::of(
            &format!(
                "controller's memory, {held} agents, {} blades known",
                sizes.known_blades
            ),
            "MiB",
            vec![(memory, None)],
            None,
            Some(Goal::AtMost(150.0)),
        ),
        Row::of(
            "restart until an agent is placed",
            "s",
            vec![(restart, None)],
            None,
            Some(Goal::AtMost(10.0)),
        ),
        Row::of(
            "controller's CPU for 1,000 agents",
            "CPU s",
            with_sandbox(|one| one.cpu),
            sandbox,
            Some(Goal::RatioAtMost(1.0)),
        ),
        Row::of(
            "writes to an agent and its Pod, create to end",
            "writes",
            with_sandbox(|one| one.writes),
            sandbox,
            None,
        ),
        Row::of(
            &format!("create to a blade known at {rate}/s, p50"),
            "ms",
            with_sandbox(|one| one.p50),
            sandbox,
            None,
        ),
        Row::of(
            &format!("create to a blade known at {rate}/s, p99"),
            "ms",
            with_sandbox(|one| one.p99),
            sandbox,
            None,
        ),
    ];
    report::publish("controller", &sizes.out, &rows)
}
