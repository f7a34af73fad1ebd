//! `far explain` and `kubectl far explain` against the embedded API: who fits where, and why not.
#![allow(clippy::unwrap_used)] // A panic here is the report.

mod common;

use common::{Machine, finish};
use serde_json::{Value, json};

/// Makes a blade with its status, as the controller would.
async fn blade(machine: &Machine, name: &str, cpu: u32, ready: &str, spec: Value) {
    let file = machine.file(
        "blade.yaml",
        &json!({"apiVersion": "tiffany.dev/v1alpha1", "kind": "FarNode", "metadata": {"name": name}, "spec": spec})
            .to_string(),
    );
    let (code, _, err) = machine.far(&["apply", "-f", &file]).await;
    assert_eq!(code, 0, "{err}");
    let room = json!({"cpu": cpu, "memory": "4Gi"});
    let condition = json!({
        "type": "Ready", "status": ready, "reason": "Test", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let status =
        json!({"allocatable": room, "capacity": room, "conditions": [condition], "nodeInfo": {"arch": "amd64"}});
    machine.set_status_of("farnodes", "v1alpha1", None, name, &status).await;
}

async fn agent(machine: &Machine, name: &str, spec: Value) {
    let mut whole = json!({"image": "example.com/x:v1"});
    for (key, value) in spec.as_object().unwrap() {
        whole[key] = value.clone();
    }
    let file = machine.file(
        "agent.yaml",
        &json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": name}, "spec": whole})
            .to_string(),
    );
    let (code, _, err) = machine.far(&["apply", "-f", &file]).await;
    assert_eq!(code, 0, "{err}");
}

/// Three blades: a good one, one that is too small and tainted, one that is not heard of.
async fn three(machine: &Machine) {
    blade(machine, "good", 4, "True", json!({})).await;
    let taints = json!({"taints": [{"key": "gpu", "effect": "NoSchedule"}]});
    blade(machine, "small", 1, "True", taints).await;
    blade(machine, "silent", 4, "Unknown", json!({})).await;
}

async fn explained(machine: &Machine, name: &str) -> Value {
    let (code, out, err) = machine.far(&["explain", name, "-o", "json"]).await;
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap()
}

#[tokio::test]
async fn every_blade_has_its_verdicts_and_scores_in_text_and_json() {
    let Some(machine) = Machine::with_api("every_blade_has_its_verdicts_and_scores_in_text_and_json").await else {
        return;
    };
    three(&machine).await;
    agent(&machine, "a", json!({"cpu": 2, "memory": "1Gi"})).await;
    let (code, out, err) = machine.far(&["explain", "a"]).await;
    assert_eq!(code, 0, "{err}");
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(
        lines[..2],
        ["FarAgent default/a: Pending, on no blade", "Now: blade good"],
        "{out}"
    );
    let row = |name: &str| {
        lines
            .iter()
            .find(|line| line.starts_with(name))
            .copied()
            .unwrap_or_default()
    };
    assert!(row("good").split_whitespace().nth(1) == Some("yes"), "{out}");
    assert!(
        row("small").ends_with("had untolerated taint {gpu}, insufficient cpu"),
        "{out}"
    );
    assert!(row("silent").ends_with("not ready"), "{out}");
    for heading in ["NODENAME", "TAINTS", "SPREAD", "SCORE", "BALANCE", "FAILURES"] {
        assert!(out.contains(heading), "{heading}: {out}");
    }
    // The plugin says the same.
    let (_, plugin, _) = finish(machine.command("kubectl-far", &["explain", "a"]).spawn().unwrap()).await;
    assert_eq!(plugin, out);

    let whole = explained(&machine, "a").await;
    assert_eq!(
        (&whole["wouldBePlacedOn"], &whole["message"]),
        (&json!("good"), &Value::Null)
    );
    let blades = whole["blades"].as_array().unwrap();
    let names: Vec<_> = blades.iter().map(|blade| blade["blade"].as_str().unwrap()).collect();
    assert_eq!(names, ["good", "silent", "small"]);
    assert_eq!(
        (&blades[0]["fits"], &blades[0]["scores"]["room"]),
        (&json!(true), &json!(625))
    );
    assert_eq!(
        (&blades[2]["filters"]["cpu"], &blades[2]["filters"]["memory"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(blades[1]["causes"], json!([{"filter": "ready", "cause": "not ready"}]));
}

#[tokio::test]
async fn an_agent_that_fits_nowhere_counts_its_blades_by_cause() {
    let Some(machine) = Machine::with_api("an_agent_that_fits_nowhere_counts_its_blades_by_cause").await else {
        return;
    };
    agent(&machine, "a", json!({"cpu": 64})).await;
    let (code, out, err) = machine.far(&["explain", "a"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("Now: no blade: 0/0 blades are available."), "{out}");
    three(&machine).await;
    let whole = explained(&machine, "a").await;
    assert_eq!(whole["wouldBePlacedOn"], Value::Null);
    let message = whole["message"].as_str().unwrap();
    assert!(
        message
            .starts_with("0/3 blades are available: 1 not ready, 1 had untolerated taint {gpu}, 1 insufficient cpu."),
        "{message}"
    );
    assert!(
        message.contains("spec.cpu (64000m) is more than any blade has (4000m)."),
        "{message}"
    );
}

#[tokio::test]
async fn an_agent_that_has_a_blade_says_where_and_why_and_its_own_room_is_not_in_its_way() {
    let Some(machine) =
        Machine::with_api("an_agent_that_has_a_blade_says_where_and_why_and_its_own_room_is_not_in_its_way").await
    else {
        return;
    };
    three(&machine).await;
    let condition = json!({
        "type": "Scheduled", "status": "True", "reason": "Placed", "message": "placed on blade good",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let on_good = |phase: &str| json!({"phase": phase, "nodeName": "good", "attempt": 1, "conditions": [condition]});
    agent(&machine, "a", json!({"cpu": 3})).await;
    machine.set_status("a", &on_good("Running")).await;
    let (code, out, err) = machine.far(&["explain", "a"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(
        out.starts_with(
            "FarAgent default/a: Running on blade good: placed on blade good\nIf it were placed anew now: blade good\n"
        ),
        "{out}"
    );
    // To another it is in the way, until it has ended.
    agent(&machine, "b", json!({"cpu": 2})).await;
    assert_eq!(explained(&machine, "b").await["wouldBePlacedOn"], Value::Null);
    machine.set_status("a", &on_good("Completed")).await;
    assert_eq!(explained(&machine, "b").await["wouldBePlacedOn"], json!("good"));
    assert!(
        explained(&machine, "a").await["standing"]
            .as_str()
            .unwrap()
            .starts_with("Completed; it ran on blade good")
    );
}

#[tokio::test]
async fn an_agent_that_does_not_exist_is_named() {
    let Some(machine) = Machine::with_api("an_agent_that_does_not_exist_is_named").await else {
        return;
    };
    let (code, out, err) = machine.far(&["explain", "nobody"]).await;
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("getting FarAgent nobody") && err.contains("not found"),
        "{err}"
    );
    let (code, _, err) = machine.far(&["explain"]).await;
    assert_eq!(code, 2, "{err}");
}

#[tokio::test]
async fn a_blades_setting_that_cannot_be_read_is_noted() {
    let Some(machine) = Machine::with_api("a_blades_setting_that_cannot_be_read_is_noted").await else {
        return;
    };
    let file = machine.file(
        "odd.yaml",
        "apiVersion: tiffany.dev/v1alpha1\nkind: FarNode\nmetadata: {name: odd, annotations: {tiffany.dev/cpu-overcommit: lots}}\nspec: {}\n",
    );
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    agent(&machine, "a", json!({})).await;
    let (code, _, err) = machine.far(&["explain", "a"]).await;
    assert_eq!(code, 0, "{err}");
    assert!(
        err.contains("FarNode odd: annotation tiffany.dev/cpu-overcommit: \"lots\" is not a factor"),
        "{err}"
    );
}
