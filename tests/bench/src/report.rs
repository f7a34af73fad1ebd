//! What a bench prints and writes: one row per claim, ours and the peer from the same run, all rounds kept.
//!
//! Format: design section 12. A peer that is not installed has `peer: null` and is named; a row without a goal has `met: null`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde::Serialize;

/// What a goal compares.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) enum Goal {
    /// The ratio ours / peer is at most this.
    RatioAtMost(f64),
    /// The ratio ours / peer is at least this.
    RatioAtLeast(f64),
    /// Ours is at most this, whatever the peer's.
    AtMost(f64),
}

impl Goal {
    fn is_met(self, ours: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtMost(most) => ratio.map(|ratio| ratio <= most),
            Self::RatioAtLeast(least) => ratio.map(|ratio| ratio >= least),
            Self::AtMost(most) => Some(ours <= most),
        }
    }

    fn text(self) -> String {
        match self {
            Self::RatioAtMost(most) => format!("ratio <= {most}"),
            Self::RatioAtLeast(least) => format!("ratio >= {least}"),
            Self::AtMost(most) => format!("<= {most}"),
        }
    }
}

/// One claim.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) what: String,
    pub(crate) unit: String,
    /// Median of our rounds.
    pub(crate) ours: f64,
    /// Median of the peer's rounds; `None` where it is not installed or the row has no peer.
    pub(crate) peer: Option<f64>,
    pub(crate) peer_name: Option<String>,
    pub(crate) ratio: Option<f64>,
    pub(crate) goal: Option<String>,
    pub(crate) met: Option<bool>,
    /// Every round as `[ours, peer]`.
    pub(crate) rounds: Vec<(f64, Option<f64>)>,
}

impl Row {
    /// A row from interleaved rounds.
    pub(crate) fn of(
        what: &str,
        unit: &str,
        rounds: Vec<(f64, Option<f64>)>,
        peer_name: Option<&str>,
        goal: Option<Goal>,
    ) -> Self {
        let ours = median(rounds.iter().map(|round| round.0).collect());
        let peers: Vec<f64> = rounds.iter().filter_map(|round| round.1).collect();
        let peer = (!peers.is_empty()).then(|| median(peers));
        let ratio = peer.filter(|&value| value > 0.0).map(|value| ours / value);
        let met = goal.and_then(|goal| goal.is_met(ours, ratio));
        Self {
            what: what.into(),
            unit: unit.into(),
            ours,
            peer,
            peer_name: peer_name.map(Into::into),
            ratio,
            goal: goal.map(Goal::text),
            met,
            rounds,
        }
    }
}

/// The middle value; of an even number, the mean of the two middle ones. 0 for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

/// The machine, so that figures are never read without it.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    qemu: String,
}

impl Machine {
    pub(crate) fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let model = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .unwrap_or("")
            .trim_start_matches(['\t', ' ', ':']);
        let qemu = std::process::Command::new("qemu-system-x86_64")
            .arg("--version")
            .output();
        Self {
            cpu: model.into(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            qemu: qemu.map_or_else(
                |_| "none".into(),
                |out| String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or("").into(),
            ),
        }
    }
}

/// Prints the table for people and writes `<folder>/<name>.json`.
pub(crate) fn publish(name: &str, folder: &Path, rows: &[Row]) -> Result<()> {
    println!(
        "{:<58} {:>8} {:>10} {:>10} {:>7}  {:<14} met",
        "what", "unit", "ours", "peer", "ratio", "goal"
    );
    for row in rows {
        let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.3}"));
        println!(
            "{:<58} {:>8} {:>10.3} {:>10} {:>7}  {:<14} {}",
            row.what,
            row.unit,
            row.ours,
            number(row.peer),
            number(row.ratio),
            row.goal.as_deref().unwrap_or("-"),
            row.met.map_or("-", |met| if met { "yes" } else { "NO" }),
        );
        if let Some(peer) = &row.peer_name {
            println!(
                "    peer: {peer}{}",
                if row.peer.is_none() {
                    " (not installed here)"
                } else {
                    ""
                }
            );
        }
    }
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let file = folder.join(format!("{name}.json"));
    let text = serde_json::to_string_pretty(&serde_json::json!({ "machine": Machine::here(), "rows": rows }))?;
    fs::write(&file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
    println!("written: {}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_takes_medians_and_judges_only_where_there_is_a_goal_and_a_peer() {
        let rounds = vec![(1.0, Some(4.0)), (3.0, Some(2.0)), (2.0, Some(2.0))];
        let row = Row::of("w", "s", rounds.clone(), Some("p"), Some(Goal::RatioAtMost(1.0)));
        assert_eq!(
            (row.ours, row.peer, row.ratio, row.met),
            (2.0, Some(2.0), Some(1.0), Some(true))
        );
        assert_eq!(Row::of("w", "s", rounds, Some("p"), None).met, None);
        let alone = Row::of("w", "s", vec![(1.0, None)], Some("p"), Some(Goal::RatioAtMost(1.0)));
        assert_eq!((alone.peer, alone.ratio, alone.met), (None, None, None));
        let rounds = vec![(6.0, Some(2.0))];
        for (goal, met) in [
            (Goal::RatioAtLeast(3.0), true),
            (Goal::RatioAtLeast(3.1), false),
            (Goal::AtMost(6.0), true),
            (Goal::AtMost(5.0), false),
        ] {
            let row = Row::of("w", "s", rounds.clone(), Some("p"), Some(goal));
            assert_eq!(row.met, Some(met), "{goal:?}");
        }
    }
}
