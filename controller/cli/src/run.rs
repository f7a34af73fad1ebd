//! `far run`: one agent from a file, its output as it comes, its exit code at the end.
//!
//! ```text
//! apply what it needs ─► create ─► output of each attempt ─► final phase ─► exit code
//!                          └─ Ctrl-C at any time: delete the agent, 130
//! ```

use std::path::PathBuf;

use anyhow::{Context, bail};
use far_proto::node::{LogsRequest, Stream};
use serde_json::Value;

use crate::{
    apply,
    args::RunArgs,
    cluster::{Api, Cluster},
    documents::{self, Document},
    exit::{self, INTERRUPTED, NO_EXIT_CODE, Outcome, RunFailed},
    folders::Folders,
    kinds,
    logs::{self, Boot, Printer},
    output,
    wait::{self, FINAL_PHASES},
};

pub(crate) async fn run(cluster: &Cluster, folders: &Folders, args: &RunArgs) -> anyhow::Result<Outcome> {
    run_agent(cluster, folders, &args.file)
        .await
        .map_err(|error| match error.downcast_ref::<RunFailed>() {
            Some(_) => error,
            None => error.context(RunFailed),
        })
}

async fn run_agent(cluster: &Cluster, folders: &Folders, file: &PathBuf) -> anyhow::Result<Outcome> {
    let (agent, others) = split(documents::read_all(std::slice::from_ref(file))?)?;
    let mut api = cluster.connect().await?;
    for other in &others {
        let (kind, name, change) = apply::apply_one(&api, other, false, false)
            .await
            .with_context(|| format!("applying {} {}", other.kind, other.name))?;
        output::note(&format!("{}/{name} {change}", kind.label()));
    }
    let created = apply::create_unique(&api, &agent).await?;
    let name = created["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    if let Some(namespace) = created["metadata"]["namespace"].as_str() {
        namespace.clone_into(&mut api.namespace);
    }
    output::note(&format!("faragent.tiffany.dev/{name} created"));

    tokio::select! {
        outcome = follow(&api, folders, &name) => outcome,
        signal = interrupted() => {
            signal?;
            interrupt(&api, &name).await
        }
    }
}

/// The one FarAgent, and everything else in the file.
fn split(documents: Vec<Document>) -> anyhow::Result<(Document, Vec<Document>)> {
    let (mut agents, others): (Vec<_>, Vec<_>) = documents
        .into_iter()
        .partition(|document| document.kind == "FarAgent" && document.api_version.starts_with("tiffany.dev/"));
    match (agents.pop(), agents.len()) {
        (Some(agent), 0) => Ok((agent, others)),
        (None, _) => bail!("the file has no FarAgent (apiVersion: tiffany.dev/v1, kind: FarAgent)"),
        (Some(_), more) => bail!(
            "the file has {} FarAgents: `far run` runs one; use `far apply`",
            more + 1
        ),
    }
}

/// What the agent's status asks for next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Print this attempt's output.
    Print(Boot),
    Ended,
    Gone,
}

/// Prints the output of each attempt, and answers how the last one ended.
async fn follow(api: &Api, folders: &Folders, name: &str) -> anyhow::Result<Outcome> {
    let mut printed = 0;
    let mut last = String::new();
    loop {
        let (step, agent) = wait::until(api, name, |agent| {
            let Some(agent) = agent else {
                return Some((Step::Gone, Value::Null));
            };
            let now = wait::summary(agent);
            // Progress until there is output; from then on the output is the progress.
            if printed == 0 && now != last && !FINAL_PHASES.contains(&wait::phase(agent)) {
                output::note(&format!("{name}: {now}"));
                last = now;
            }
            next(agent, printed).map(|step| (step, agent.clone()))
        })
        .await?;
        match step {
            Step::Gone => bail!("FarAgent {name} was deleted while it ran"),
            Step::Ended => return Ok(ended(name, &agent)),
            Step::Print(boot) => {
                printed = boot.identity.attempt;
                if let Err(error) = print(api, folders, &boot).await {
                    output::note(&format!(
                        "no output of attempt {printed} can be shown here; it was placed on blade {}: {}",
                        boot.blade,
                        exit::chain(&error.into())
                    ));
                }
            }
        }
    }
}

/// Output comes before the end: an attempt that was not printed yet is, even when the agent has ended meanwhile.
fn next(agent: &Value, printed: u32) -> Option<Step> {
    let boot = Boot::of(agent).filter(|boot| boot.identity.attempt > printed);
    match boot {
        Some(boot) => Some(Step::Print(boot)),
        None => FINAL_PHASES.contains(&wait::phase(agent)).then_some(Step::Ended),
    }
}

async fn print(api: &Api, folders: &Folders, boot: &Boot) -> Result<(), crate::node::NodeError> {
    let request = LogsRequest {
        identity: Some(boot.identity.clone()),
        follow: true,
        tail_lines: None,
        stream: Stream::Unspecified.into(),
        since: None,
    };
    let mut printer = Printer::new(false);
    let is_coming = async || logs::is_coming(api, boot).await;
    logs::stream(api, folders, request, is_coming, |chunk| {
        let bytes = printer.format(chunk);
        if chunk.stream() == Stream::Stderr {
            output::error_bytes(&bytes);
        } else {
            output::bytes(&bytes);
        }
    })
    .await
}

/// Says how it ended, and answers the exit code for it.
fn ended(name: &str, agent: &Value) -> Outcome {
    let code = exit_code(&agent["status"]);
    if code != 0 {
        output::note(&format!("{name}: {}", wait::summary(agent)));
    }
    Outcome::Code(code)
}

/// Exit code of `far run`: the agent's own, 128 + n after signal n as shells have it, 125 where no exit was reported.
fn exit_code(status: &Value) -> u8 {
    let byte = |value: &Value| value.as_i64().and_then(|number| u8::try_from(number & 0xff).ok());
    match (byte(&status["exitCode"]), byte(&status["signal"])) {
        (_, Some(signal)) if signal > 0 => 128_u8.saturating_add(signal),
        (Some(code), _) => code,
        (None, _) => NO_EXIT_CODE,
    }
}

/// Ctrl-C, or TERM as a supervisor sends it.
async fn interrupted() -> anyhow::Result<()> {
    let mut term =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).context("waiting for TERM")?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result.context("waiting for Ctrl-C"),
        _ = term.recv() => Ok(()),
    }
}

/// Deletes the agent; a second Ctrl-C does not wait for that.
async fn interrupt(api: &Api, name: &str) -> anyhow::Result<Outcome> {
    output::note(&format!(
        "interrupted: deleting faragent {name} (Ctrl-C again: do not wait)"
    ));
    let path = kinds::far_agent().path(&api.namespace, name);
    let delete = async {
        match api.delete(&path).await {
            Ok(_) => {}
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error).context("deleting the agent"),
        }
        wait::until(api, name, |agent| agent.is_none().then_some(())).await
    };
    tokio::select! {
        result = delete => result?,
        signal = interrupted() => signal?,
    }
    Ok(Outcome::Code(INTERRUPTED))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_exit_code_is_the_agents_and_never_invented() {
        for (why, status, expected) in [
            ("success", json!({"phase": "Completed", "exitCode": 0}), 0),
            ("its code", json!({"phase": "Failed", "exitCode": 3}), 3),
            ("a signal", json!({"phase": "Failed", "signal": 9}), 137),
            (
                "a signal with a code",
                json!({"phase": "Failed", "exitCode": 0, "signal": 15}),
                143,
            ),
            ("no report", json!({"phase": "Failed", "reason": "InitLost"}), 125),
            ("nothing", json!({}), 125),
        ] {
            assert_eq!(exit_code(&status), expected, "{why}");
        }
    }

    #[test]
    fn output_is_printed_before_the_end_and_each_attempt_once() {
        let agent = |phase: &str, attempt: u32| json!({"metadata": {"uid": "u", "name": "a"}, "status": {"phase": phase, "attempt": attempt, "nodeName": "b"}});
        let is_print = |step: Option<Step>, wanted: u32| matches!(step, Some(Step::Print(boot)) if boot.identity.attempt == wanted);
        assert_eq!(next(&json!({}), 0), None, "not placed");
        assert!(is_print(next(&agent("Starting", 1), 0), 1), "placed");
        assert!(
            is_print(next(&agent("Completed", 1), 0), 1),
            "ended before it was looked at"
        );
        assert_eq!(next(&agent("Running", 1), 1), None, "printed, not ended");
        assert!(is_print(next(&agent("Running", 2), 1), 2), "tried again");
        assert_eq!(next(&agent("Failed", 2), 2), Some(Step::Ended));
        assert_eq!(
            next(&json!({"status": {"phase": "Failed"}}), 0),
            Some(Step::Ended),
            "failed unplaced"
        );
    }

    #[test]
    fn a_file_must_have_exactly_one_agent() {
        let parse = |text: &str| split(documents::parse(std::path::Path::new("f"), text).unwrap());
        let agent = "apiVersion: tiffany.dev/v1\nkind: FarAgent\nmetadata: {name: a}\n";
        let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\n";
        let (found, others) = parse(&format!("{map}---\n{agent}")).unwrap();
        assert_eq!((found.name.as_str(), others.len()), ("a", 1));
        assert!(parse(map).unwrap_err().to_string().contains("no FarAgent"));
        assert!(
            parse(&format!("{agent}---\n{agent}"))
                .unwrap_err()
                .to_string()
                .contains("2 FarAgents")
        );
    }
}
