//! `far wait`: until an agent ended, is gone, or shows a phase or condition. Ends early when that cannot come any more.

use std::{pin::pin, time::Duration};

use anyhow::{Context, bail};
use futures::StreamExt;
use kube::core::WatchEvent;
use serde_json::Value;

use crate::{
    args::WaitArgs,
    cluster::{Api, Cluster, escaped},
    exit::Outcome,
    kinds, output,
};

/// Pause before the API is asked again after a watch ended.
const AGAIN: Duration = Duration::from_millis(500);

/// Phases that a FarAgent never leaves (design, section 4).
pub(crate) const FINAL_PHASES: [&str; 2] = ["Completed", "Failed"];
const PHASES: [&str; 8] = [
    "Pending",
    "Scheduled",
    "Starting",
    "Running",
    "Sleeping",
    "Completed",
    "Failed",
    "Unknown",
];

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Goal {
    End,
    Gone,
    Phase(String),
    Condition { kind: String, status: String },
}

pub(crate) fn parse_goal(text: &str) -> Result<Goal, String> {
    match text.split_once('=') {
        None if text == "end" => Ok(Goal::End),
        None if text == "delete" => Ok(Goal::Gone),
        Some(("phase", phase)) if PHASES.contains(&phase) => Ok(Goal::Phase(phase.to_owned())),
        Some(("phase", phase)) => Err(format!("{phase:?} is no phase; phases are {}", PHASES.join(", "))),
        Some(("condition", condition)) if !condition.is_empty() => {
            let (kind, status) = condition.split_once('=').unwrap_or((condition, "True"));
            match status {
                "True" | "False" | "Unknown" => Ok(Goal::Condition {
                    kind: kind.to_owned(),
                    status: status.to_owned(),
                }),
                _ => Err(format!("a condition is True, False or Unknown, not {status:?}")),
            }
        }
        _ => Err("write end, delete, phase=PHASE or condition=TYPE".to_owned()),
    }
}

/// What one look at the agent says about the goal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Reached,
    /// `End` was reached by failing.
    Failed,
    /// The agent ended in another way: it cannot come any more.
    Never,
    NotYet,
}

fn judge(goal: &Goal, agent: &Value) -> Verdict {
    let phase = phase(agent);
    let is_final = FINAL_PHASES.contains(&phase);
    let is_reached = match goal {
        Goal::End if phase == "Failed" => return Verdict::Failed,
        Goal::End => is_final,
        Goal::Gone => false,
        Goal::Phase(wanted) => phase == wanted,
        Goal::Condition { kind, status } => agent["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|one| one["type"] == **kind && one["status"] == **status),
    };
    match (is_reached, goal) {
        (true, _) => Verdict::Reached,
        (false, Goal::Gone) => Verdict::NotYet,
        (false, _) if is_final => Verdict::Never,
        (false, _) => Verdict::NotYet,
    }
}

/// `status.phase`; an agent nobody has looked at yet is Pending.
pub(crate) fn phase(agent: &Value) -> &str {
    agent["status"]["phase"].as_str().unwrap_or("Pending")
}

/// Phase, reason and message in one line, and what a failing condition says while it is not final.
pub(crate) fn summary(agent: &Value) -> String {
    let status = &agent["status"];
    let mut text = phase(agent).to_owned();
    if let Some(code) = status["exitCode"].as_i64() {
        text.push_str(&format!(", exit code {code}"));
    }
    if let Some(reason) = status["reason"].as_str().filter(|reason| *reason != phase(agent)) {
        text.push_str(&format!(", {reason}"));
    }
    let waiting = status["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|one| one["type"] == "Scheduled" && one["status"] == "False");
    let message = status["message"]
        .as_str()
        .filter(|message| !message.is_empty())
        .or_else(|| waiting.and_then(|one| one["message"].as_str()));
    if let Some(message) = message {
        text.push_str(&format!(": {}", crate::table::printable(message)));
    }
    text
}

pub(crate) async fn wait(cluster: &Cluster, args: &WaitArgs) -> anyhow::Result<Outcome> {
    let api = cluster.connect().await?;
    let mut last = String::new();
    let seen = until(&api, &args.agent, |agent| {
        let Some(agent) = agent else {
            return match args.goal {
                Goal::Gone => Some(Verdict::Reached),
                _ => Some(Verdict::Never),
            };
        };
        let now = summary(agent);
        if now != last {
            output::note(&format!("{}: {now}", args.agent));
            last = now;
        }
        Some(judge(&args.goal, agent)).filter(|verdict| *verdict != Verdict::NotYet)
    });
    let verdict = match tokio::time::timeout(args.timeout, seen).await {
        Ok(verdict) => verdict?,
        Err(_) => bail!(
            "{} did not get there within {} s; last seen: {last}",
            args.agent,
            args.timeout.as_secs()
        ),
    };
    match verdict {
        Verdict::Reached => Ok(Outcome::Success),
        Verdict::Failed => Ok(Outcome::Negative),
        Verdict::Never | Verdict::NotYet if last.is_empty() => {
            bail!("there is no FarAgent {} in namespace {}", args.agent, api.namespace)
        }
        Verdict::Never | Verdict::NotYet => bail!("{} ended otherwise: {last}", args.agent),
    }
}

/// Looks at the FarAgent now and after every change, until `look` answers. `None` is an agent that does not exist.
/// An API that is away for a while is waited for: agents run on without it.
pub(crate) async fn until<T>(
    api: &Api,
    name: &str,
    mut look: impl FnMut(Option<&Value>) -> Option<T>,
) -> anyhow::Result<T> {
    let kind = kinds::far_agent();
    let path = kind.path(&api.namespace, name);
    let list = kind.list_path(Some(&api.namespace));
    let fields = escaped(&format!("metadata.name={name}"));
    let mut has_answered = false;
    loop {
        let agent: Option<Value> = match api.get(&path).await {
            Ok(agent) => Some(agent),
            Err(error) if error.is_not_found() => None,
            Err(error) if error.is_passing() && has_answered => {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            Err(error) => return Err(error).with_context(|| format!("getting FarAgent {name}")),
        };
        has_answered = true;
        if let Some(answer) = look(agent.as_ref()) {
            return Ok(answer);
        }
        let version = agent
            .as_ref()
            .and_then(|agent| agent["metadata"]["resourceVersion"].as_str())
            .unwrap_or("0")
            .to_owned();
        let watch = format!("{list}?watch=true&fieldSelector={fields}&resourceVersion={version}");
        // A watch that cannot begin or breaks is no failure: the next look at the object decides.
        if let Ok(events) = api.watch(&watch, false).await {
            let mut events = pin!(events);
            while let Some(Ok(event)) = events.next().await {
                let answer = match &event {
                    WatchEvent::Added(agent) | WatchEvent::Modified(agent) => look(Some(agent)),
                    WatchEvent::Deleted(_) => look(None),
                    WatchEvent::Bookmark(_) | WatchEvent::Error(_) => None,
                };
                if let Some(answer) = answer {
                    return Ok(answer);
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn goals_are_read_and_wrong_ones_name_the_choices() {
        for (text, expected) in [
            ("end", Some(Goal::End)),
            ("delete", Some(Goal::Gone)),
            ("phase=Running", Some(Goal::Phase("Running".into()))),
            (
                "condition=Ready",
                Some(Goal::Condition {
                    kind: "Ready".into(),
                    status: "True".into(),
                }),
            ),
            (
                "condition=Scheduled=False",
                Some(Goal::Condition {
                    kind: "Scheduled".into(),
                    status: "False".into(),
                }),
            ),
            ("phase=running", None),
            ("condition=", None),
            ("condition=Ready=Maybe", None),
            ("sunshine", None),
        ] {
            assert_eq!(parse_goal(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_goal_that_cannot_come_any_more_ends_the_wait() {
        let agent =
            |phase: &str| json!({"status": {"phase": phase, "conditions": [{"type": "Scheduled", "status": "True"}]}});
        let running = Goal::Phase("Running".into());
        let scheduled = parse_goal("condition=Scheduled").unwrap();
        for (why, goal, agent, expected) in [
            ("not looked at yet", &Goal::End, json!({}), Verdict::NotYet),
            ("still running", &Goal::End, agent("Running"), Verdict::NotYet),
            ("completed", &Goal::End, agent("Completed"), Verdict::Reached),
            ("failed", &Goal::End, agent("Failed"), Verdict::Failed),
            ("the phase", &running, agent("Running"), Verdict::Reached),
            ("too late for the phase", &running, agent("Failed"), Verdict::Never),
            ("the condition", &scheduled, agent("Pending"), Verdict::Reached),
            ("ended but not deleted", &Goal::Gone, agent("Failed"), Verdict::NotYet),
        ] {
            assert_eq!(judge(goal, &agent), expected, "{why}");
        }
    }

    #[test]
    fn a_waiting_agent_says_what_it_waits_for() {
        let agent = json!({"status": {"phase": "Pending", "conditions": [
            {"type": "Scheduled", "status": "False", "message": "0/1 blades: 1 insufficient memory"}]}});
        assert_eq!(summary(&agent), "Pending: 0/1 blades: 1 insufficient memory");
        let agent = json!({"status": {"phase": "Failed", "reason": "Error", "exitCode": 3, "message": "m"}});
        assert_eq!(summary(&agent), "Failed, exit code 3, Error: m");
    }
}
