//! `far cordon`, `far uncordon` and `far drain`: whether a blade takes agents, and how it is emptied.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    args::{OutputArgs, duration},
    cluster::{Api, Cluster, ClusterError, escaped},
    exit::Outcome,
    output,
};

/// Pause between two looks at a blade that is emptied.
const LOOK: Duration = Duration::from_millis(500);

pub(crate) const EXAMPLES: &str = "Examples:\n  far drain b7                   waits until its agents have ended by themselves\n  \
    far drain b7 --deadline 10m    ends those that have not ended by then\n  \
    far drain b7 --evict           ends them now, with their grace period\n  \
    far uncordon b7                lets it take agents again";

#[derive(Debug, Args)]
pub(crate) struct CordonArgs {
    /// Name of the FarNode
    #[arg(value_name = "BLADE")]
    pub(crate) blade: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Name of the FarNode
    #[arg(value_name = "BLADE")]
    pub(crate) blade: String,
    /// End its agents now; those that may be tried again are placed elsewhere
    #[arg(long, conflicts_with = "deadline")]
    pub(crate) evict: bool,
    /// End those that have not ended by themselves after this time, for example 90s or 5m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) deadline: Option<Duration>,
    /// Do not wait until the blade is empty
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// How long to wait, for example 90s or 5m
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// No new agents; those that run stay.
pub(crate) async fn cordon(cluster: &Cluster, args: &CordonArgs) -> anyhow::Result<Outcome> {
    let api = cluster.connect().await?;
    change(&api, &args.blade, json!({"unschedulable": true})).await?;
    say(&args.output, &args.blade, "cordoned", &[])
}

/// Takes agents again, and is no longer emptied.
pub(crate) async fn uncordon(cluster: &Cluster, args: &CordonArgs) -> anyhow::Result<Outcome> {
    let api = cluster.connect().await?;
    change(&api, &args.blade, json!({"unschedulable": null, "drain": null})).await?;
    say(&args.output, &args.blade, "uncordoned", &[])
}

/// Empties a blade; it stays without agents until it is uncordoned.
pub(crate) async fn drain(cluster: &Cluster, args: &DrainArgs) -> anyhow::Result<Outcome> {
    let api = cluster.connect().await?;
    let policy = if args.evict { "Evict" } else { "Wait" };
    let deadline = args.deadline.map(|deadline| deadline.as_secs());
    let drain = json!({"policy": policy, "deadlineSeconds": deadline});
    change(&api, &args.blade, json!({"drain": drain})).await?;
    let mut left = agents_on(&api, &args.blade).await?;
    if args.no_wait {
        return say(&args.output, &args.blade, "draining", &left);
    }
    let begun = Instant::now();
    while !left.is_empty() {
        if begun.elapsed() > args.timeout {
            let (count, some) = (left.len(), left[..left.len().min(3)].join(", "));
            bail!(
                "blade {} still has {count} agents after {} s: {some}; it takes no more, and goes on being emptied",
                args.blade,
                args.timeout.as_secs()
            );
        }
        tokio::time::sleep(LOOK).await;
        left = match agents_on(&api, &args.blade).await {
            Ok(left) => left,
            Err(error) if error.is_passing() => continue,
            Err(error) => return Err(error.into()),
        };
    }
    say(&args.output, &args.blade, "drained", &[])
}

async fn change(api: &Api, blade: &str, spec: Value) -> anyhow::Result<()> {
    let path = format!("/apis/tiffany.dev/v1alpha1/farnodes/{}", escaped(blade));
    let changed = api.merge(&path, &json!({ "spec": spec })).await;
    changed.with_context(|| format!("changing FarNode {blade}"))?;
    Ok(())
}

/// Agents of the blade that have not ended, as NAMESPACE/NAME.
async fn agents_on(api: &Api, blade: &str) -> Result<Vec<String>, ClusterError> {
    let path = format!(
        "/apis/tiffany.dev/v1/faragents?fieldSelector=status.nodeName%3D{}",
        escaped(blade)
    );
    let list: Value = api.get(&path).await?;
    let agents = list["items"].as_array().into_iter().flatten();
    let live = agents.filter(|agent| !matches!(agent["status"]["phase"].as_str(), Some("Completed" | "Failed")));
    Ok(live
        .map(|agent| {
            let text = |field: &str| agent["metadata"][field].as_str().unwrap_or_default().to_owned();
            format!("{}/{}", text("namespace"), text("name"))
        })
        .collect())
}

fn say(args: &OutputArgs, blade: &str, word: &str, left: &[String]) -> anyhow::Result<Outcome> {
    if args.output.is_some() {
        let told = json!({"blade": blade, "state": word, "agents": left});
        output::line(&serde_json::to_string_pretty(&told)?);
    } else if left.is_empty() {
        output::line(&format!("blade {blade} {word}"));
    } else {
        output::line(&format!("blade {blade} {word}: {} agents are left", left.len()));
    }
    Ok(Outcome::Success)
}
