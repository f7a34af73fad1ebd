//! `far top`: what running agents use, as their guests say it in heartbeats.

use far_proto::node::{AgentStats, Identity, Phase, Pressure, StatsRequest, StatsResponse};
use serde_json::{Value, json};

use crate::{
    args::Machine,
    cluster::Cluster,
    exit::Outcome,
    folders::Folders,
    gateway::Gateway,
    inside::Inside,
    node::{self, NodeError},
    output,
    table::{aligned, printable},
};

#[derive(Debug, clap::Args)]
pub(crate) struct TopArgs {
    /// Name of the FarAgent [default: all of the namespace; without a gateway, all on this machine's blade]
    #[arg(value_parser = crate::args::agent_name)]
    agent: Option<String>,
    /// Of all namespaces
    #[arg(short = 'A', long, conflicts_with = "agent")]
    all_namespaces: bool,
    /// As JSON, for programs
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    output: Option<Machine>,
}

pub(crate) async fn top(cluster: &Cluster, folders: &Folders, args: &TopArgs) -> anyhow::Result<Outcome> {
    let (stats, place) = match &args.agent {
        Some(agent) => {
            let mut inside = Inside::find(cluster, folders, agent).await?;
            let identity = Some(inside.identity.clone());
            match inside.client.stats(StatsRequest { identity }).await {
                Ok(stats) => (stats.into_inner(), String::new()),
                Err(status) => return Err(inside.refused("top", status)),
            }
        }
        None => all(cluster, folders, args.all_namespaces).await?,
    };
    let mut agents = stats.agents;
    agents.sort_by_key(|one| {
        one.identity
            .as_ref()
            .map(|who| (who.namespace.clone(), who.name.clone()))
    });
    match args.output {
        Some(Machine::Json) => {
            let agents: Vec<_> = agents.iter().map(as_json).collect();
            output::line(&serde_json::to_string_pretty(&agents)?);
        }
        None if agents.is_empty() => output::note(&format!("No agent runs {place}.")),
        None => aligned(&rows(&agents)).iter().for_each(|line| output::line(line)),
    }
    Ok(Outcome::Success)
}

/// Of the cluster through its gateway; without one, of this machine's blade. Answers also where that is.
async fn all(cluster: &Cluster, folders: &Folders, all_namespaces: bool) -> anyhow::Result<(StatsResponse, String)> {
    let gateway = match cluster.connect().await {
        Ok(api) if folders.socket.is_none() => Gateway::find(&api).await?.map(|gateway| (gateway, api)),
        // Without a cluster there may still be a blade.
        Ok(_) | Err(_) => None,
    };
    let Some((gateway, api)) = gateway else {
        let mut client = node::connect_inside(&folders.node_socket()).await?;
        let stats = client.stats(StatsRequest::default()).await;
        return Ok((
            stats.map_err(NodeError::of("top"))?.into_inner(),
            "on this machine".to_owned(),
        ));
    };
    let (identity, place) = if all_namespaces {
        (None, "in any namespace".to_owned())
    } else {
        let identity = Identity {
            namespace: api.namespace.clone(),
            ..Identity::default()
        };
        (Some(identity), format!("in namespace {}", api.namespace))
    };
    let stats = gateway.inside().await?.stats(StatsRequest { identity }).await;
    let stats = stats.map_err(NodeError::of("top"))?;
    if let Some(blades) = stats
        .metadata()
        .get("far-unreached")
        .and_then(|names| names.to_str().ok())
    {
        output::note(&format!(
            "far: not reached, so their agents are missing: blades {}",
            printable(blades)
        ));
    }
    Ok((stats.into_inner(), place))
}

fn rows(agents: &[AgentStats]) -> Vec<Vec<String>> {
    let headings = [
        "NAMESPACE",
        "NAME",
        "CPU",
        "MEMORY",
        "MEMORY%",
        "PROCESSES",
        "PRESSURE",
        "HEARTBEAT",
    ];
    let mut rows = vec![headings.map(str::to_owned).to_vec()];
    for one in agents {
        let who = one.identity.clone().unwrap_or_default();
        let mut row = vec![printable(&who.namespace), printable(&who.name)];
        match one.heartbeat_age_ms {
            None => row.extend(std::iter::repeat_n("-".to_owned(), 5).chain(["none yet".to_owned()])),
            Some(age) => {
                let used = one.memory_total_kib.saturating_sub(one.memory_available_kib);
                let share = (used * 100).checked_div(one.memory_total_kib);
                let stale = match (one.heartbeat_stale, one.answers_pings) {
                    (false, _) => "",
                    (true, None) => " (stale)",
                    (true, Some(true)) => " (stale, answers pings)",
                    (true, Some(false)) => " (stale, silent)",
                };
                row.extend([
                    one.cpu_millis.map_or_else(|| "-".to_owned(), |cpu| format!("{cpu}m")),
                    format!("{}MiB", used / 1024),
                    share.map_or_else(|| "-".to_owned(), |share| format!("{share}%")),
                    one.processes.to_string(),
                    pressures(one),
                    format!("{}.{}s{stale}", age / 1000, age % 1000 / 100),
                ]);
            }
        }
        rows.push(row);
    }
    rows
}

/// CPU, memory and I/O: the share of the last 10 s in which something waited.
fn pressures(one: &AgentStats) -> String {
    let all = [&one.cpu_pressure, &one.memory_pressure, &one.io_pressure];
    if all.iter().all(|pressure| pressure.is_none()) {
        return "-".to_owned();
    }
    let text = |pressure: &Option<Pressure>| {
        pressure.map_or_else(|| "-".to_owned(), |pressure| format!("{}%", pressure.some_avg10 / 100))
    };
    all.map(text).join("/")
}

fn as_json(one: &AgentStats) -> Value {
    let who = one.identity.clone().unwrap_or_default();
    let pressure = |pressure: &Option<Pressure>| {
        pressure.map(|pressure| json!({"someAvg10": pressure.some_avg10, "fullAvg10": pressure.full_avg10}))
    };
    json!({
        "namespace": who.namespace,
        "name": who.name,
        "uid": who.uid,
        "attempt": who.attempt,
        "phase": if one.phase() == Phase::Stopping { "Stopping" } else { "Running" },
        "heartbeatAgeMs": one.heartbeat_age_ms,
        "heartbeatStale": one.heartbeat_stale,
        "answersPings": one.answers_pings,
        "memoryTotalKib": one.memory_total_kib,
        "memoryAvailableKib": one.memory_available_kib,
        "payloadMemoryKib": one.payload_memory_kib,
        "cpuUsageUs": one.cpu_usage_us,
        "cpuMillis": one.cpu_millis,
        "cpuLimitMillis": one.cpu_limit_millis,
        "processes": one.processes,
        "cpuPressure": pressure(&one.cpu_pressure),
        "memoryPressure": pressure(&one.memory_pressure),
        "ioPressure": pressure(&one.io_pressure),
        "channels": one.channels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_a_dash_and_never_a_zero() {
        let silent = AgentStats::default();
        assert_eq!(rows(&[silent])[1][2..], ["-", "-", "-", "-", "-", "none yet"]);
        let speaks = AgentStats {
            heartbeat_age_ms: Some(1234),
            heartbeat_stale: true,
            memory_total_kib: 100 * 1024,
            memory_available_kib: 60 * 1024,
            processes: 3,
            memory_pressure: Some(Pressure {
                some_avg10: 1250,
                full_avg10: 0,
            }),
            ..AgentStats::default()
        };
        assert_eq!(
            rows(std::slice::from_ref(&speaks))[1][2..],
            ["-", "40MiB", "40%", "3", "-/12%/-", "1.2s (stale)"]
        );
        for (answers, expected) in [(true, "1.2s (stale, answers pings)"), (false, "1.2s (stale, silent)")] {
            let asked = AgentStats {
                answers_pings: Some(answers),
                ..speaks.clone()
            };
            assert_eq!(rows(&[asked])[1].last().unwrap(), expected);
        }
    }
}
