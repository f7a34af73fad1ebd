//! `far explain`: what the placer would decide about an agent now, and why: every blade, every filter, every score.
//!
//! Computed here from the API's objects with the controller's own code. Two things only the controller knows: which blades
//! its calls do not reach, and its seed, which decides between blades of the same score.

use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use far_api::{FarAgent, FarNode, placement};
use far_core::placement::{Explanation, Filter, Packing, Request, Row, Scheduler};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    cluster::{Api, Cluster},
    exit::Outcome,
    kinds::{self, Kind},
    output,
    table::aligned,
};

pub(crate) const EXAMPLES: &str = "\
Examples:
  far explain embedder-worker-01
  far explain embedder-worker-01 -o json

Shows what the placer would decide now, computed from the FarNodes and FarAgents of the API: this needs the rights to get
and list them in all namespaces, and nothing else. Blades that only the controller cannot reach count as reachable here,
and between blades of the same score its own seed decides.";

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The FarAgent
    #[arg(value_name = "AGENT")]
    name: String,
    /// As the controller's own --packing
    #[arg(long, value_enum, default_value_t = Packed::Spread)]
    packing: Packed,
    /// Print JSON instead of tables
    #[arg(short, long)]
    output: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Packed {
    Spread,
    Binpack,
}

#[derive(Debug, Deserialize)]
struct List<T> {
    items: Vec<T>,
}

pub(crate) async fn explain(cluster: &Cluster, args: &ExplainArgs) -> anyhow::Result<Outcome> {
    let api = cluster.connect().await?;
    let kind = kinds::far_agent();
    let agent: FarAgent = api
        .get(&kind.path(&api.namespace, &args.name))
        .await
        .with_context(|| format!("getting FarAgent {}", args.name))?;
    let nodes: List<FarNode> = list(&api, &far_node()).await?;
    let agents: List<FarAgent> = list(&api, &kind).await?;
    let request = placement::request(&agent).map_err(|message| anyhow!(message))?;
    let packing = match args.packing {
        Packed::Spread => Packing::Spread,
        Packed::Binpack => Packing::Binpack,
    };
    let (explanation, complaints) = decide(packing, &agent, &request, &nodes.items, &agents.items);
    for complaint in complaints {
        output::note(&format!("note: {complaint}, and counts as absent"));
    }
    if args.output == Some(Format::Json) {
        let text = serde_json::to_string_pretty(&as_json(&agent, &explanation)).context("writing JSON")?;
        output::line(&text);
        return Ok(Outcome::Success);
    }
    for line in as_text(&agent, &explanation) {
        output::line(&line);
    }
    Ok(Outcome::Success)
}

async fn list<T: serde::de::DeserializeOwned>(api: &Api, kind: &Kind) -> anyhow::Result<List<T>> {
    let listed = api.get(&kind.list_path(None)).await;
    listed.with_context(|| format!("listing {} in all namespaces", kind.plural))
}

fn far_node() -> Kind {
    Kind {
        group: "tiffany.dev".into(),
        version: "v1alpha1".into(),
        kind: "FarNode".into(),
        plural: "farnodes".into(),
        singular: "farnode".into(),
        short_names: vec!["fn".into()],
        is_namespaced: false,
    }
}

/// The placer's table for one agent, beside all others that hold room; and what is wrong with the blades' settings.
fn decide(
    packing: Packing,
    agent: &FarAgent,
    request: &Request,
    nodes: &[FarNode],
    agents: &[FarAgent],
) -> (Explanation, Vec<String>) {
    let now = Duration::ZERO;
    let mut scheduler = Scheduler::new(0, packing);
    let mut complaints = Vec::new();
    for node in nodes {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let (blade, wrong) = placement::blade(node);
        complaints.extend(wrong.into_iter().map(|text| format!("FarNode {name}: {text}")));
        scheduler.upsert_blade(name, blade, now);
    }
    let uid = agent.metadata.uid.as_deref().unwrap_or_default();
    for other in agents {
        let Some(other_uid) = other.metadata.uid.as_deref().filter(|other| *other != uid) else {
            continue;
        };
        if let (Some(blade), Ok(held)) = (holds_room_on(other), placement::request(other)) {
            scheduler.reserve(other_uid, blade, &held, now);
            if has_condition(other, "Booted") {
                scheduler.confirm(other_uid, now);
            }
        }
    }
    (scheduler.explain(uid, request), complaints)
}

/// The blade that an agent has and has not left.
fn holds_room_on(agent: &FarAgent) -> Option<&str> {
    let status = agent.status.as_ref()?;
    let has_ended = status.phase.is_some_and(|phase| phase.is_final());
    status.node_name.as_deref().filter(|_| !has_ended)
}

fn has_condition(agent: &FarAgent, kind: &str) -> bool {
    let conditions = agent.status.iter().flat_map(|status| &status.conditions);
    conditions
        .into_iter()
        .any(|one| one.type_ == kind && one.status == "True")
}

/// Where the agent is, or what it waits for, in the controller's words.
fn standing(agent: &FarAgent) -> String {
    let status = agent.status.as_ref();
    let phase = status
        .and_then(|status| status.phase)
        .map_or("Pending", |phase| phase.as_str());
    let scheduled = status
        .iter()
        .flat_map(|status| &status.conditions)
        .find(|one| one.type_ == "Scheduled");
    let why = scheduled
        .map(|one| one.message.trim())
        .filter(|message| !message.is_empty());
    let why = why.map(|message| format!(": {message}")).unwrap_or_default();
    match status.and_then(|status| status.node_name.as_deref()) {
        Some(blade) if holds_room_on(agent).is_some() => format!("{phase} on blade {blade}{why}"),
        Some(blade) => format!("{phase}; it ran on blade {blade}{why}"),
        None => format!("{phase}, on no blade{why}"),
    }
}

fn decision(agent: &FarAgent, explanation: &Explanation) -> String {
    let has_blade = agent.status.as_ref().is_some_and(|status| status.node_name.is_some());
    let if_placed = if has_blade {
        "If it were placed anew now: "
    } else {
        "Now: "
    };
    match &explanation.outcome {
        Ok(blade) => format!("{if_placed}blade {blade}"),
        Err(unschedulable) => format!("{if_placed}no blade: {unschedulable}"),
    }
}

fn as_text(agent: &FarAgent, explanation: &Explanation) -> Vec<String> {
    let namespace = agent.metadata.namespace.as_deref().unwrap_or_default();
    let name = agent.metadata.name.as_deref().unwrap_or_default();
    let mut lines = vec![
        format!("FarAgent {namespace}/{name}: {}", standing(agent)),
        decision(agent, explanation),
    ];
    if explanation.rows.is_empty() {
        return lines;
    }
    let heading = |text: &str| text.to_uppercase();
    let filters = Filter::ALL.into_iter().map(|filter| heading(filter.as_str()));
    let mut table = vec![
        ["BLADE".to_owned(), "FITS".to_owned()]
            .into_iter()
            .chain(filters)
            .chain(["WHY NOT".to_owned()])
            .collect::<Vec<_>>(),
    ];
    for row in &explanation.rows {
        let verdicts = Filter::ALL
            .into_iter()
            .map(|filter| if row.passes(filter) { "ok" } else { "NO" }.to_owned());
        let causes: Vec<String> = row.causes.iter().map(ToString::to_string).collect();
        let mut cells = vec![row.blade.clone(), if fits(row) { "yes" } else { "NO" }.to_owned()];
        cells.extend(verdicts);
        cells.push(causes.join(", "));
        table.push(cells);
    }
    lines.push(String::new());
    lines.extend(aligned(&table));
    let parts = explanation.rows[0].scores.parts();
    let parts = parts.iter().map(|(part, _)| heading(part));
    let mut table = vec![
        ["BLADE".to_owned(), "SCORE".to_owned()]
            .into_iter()
            .chain(parts)
            .collect::<Vec<_>>(),
    ];
    let mut ranked: Vec<&Row> = explanation.rows.iter().collect();
    ranked.sort_by_key(|row| (!fits(row), std::cmp::Reverse(row.scores.total())));
    for row in ranked {
        let total = row.scores.total().to_string();
        let mut cells = vec![row.blade.clone(), if fits(row) { total } else { format!("({total})") }];
        cells.extend(row.scores.parts().iter().map(|(_, part)| part.to_string()));
        table.push(cells);
    }
    lines.push(String::new());
    lines.extend(aligned(&table));
    lines
}

fn fits(row: &Row) -> bool {
    row.causes.is_empty()
}

fn as_json(agent: &FarAgent, explanation: &Explanation) -> Value {
    let blades = explanation.rows.iter().map(|row| {
        let filters = Filter::ALL
            .into_iter()
            .map(|filter| (filter.as_str().to_owned(), json!(row.passes(filter))));
        let causes = row
            .causes
            .iter()
            .map(|cause| json!({"filter": cause.filter().as_str(), "cause": cause.to_string()}));
        let scores = row
            .scores
            .parts()
            .into_iter()
            .map(|(part, score)| (part.to_owned(), json!(score)));
        json!({
            "blade": row.blade,
            "fits": fits(row),
            "filters": filters.collect::<serde_json::Map<_, _>>(),
            "causes": causes.collect::<Vec<_>>(),
            "score": row.scores.total(),
            "scores": scores.collect::<serde_json::Map<_, _>>(),
        })
    });
    let (chosen, message) = match &explanation.outcome {
        Ok(blade) => (Some(blade), None),
        Err(unschedulable) => (None, Some(unschedulable.to_string())),
    };
    json!({
        "namespace": agent.metadata.namespace,
        "name": agent.metadata.name,
        "phase": agent.status.as_ref().and_then(|status| status.phase).map_or("Pending", |phase| phase.as_str()),
        "placedOn": agent.status.as_ref().and_then(|status| status.node_name.as_ref()),
        "standing": standing(agent),
        "wouldBePlacedOn": chosen,
        "message": message,
        "blades": blades.collect::<Vec<_>>(),
    })
}
