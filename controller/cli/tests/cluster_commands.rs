//! What `far` asks of a Kubernetes API, against the embedded one with the project's CRDs.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{AGENT, Machine, finish};
use serde_json::{Value, json};

#[tokio::test]
async fn apply_says_what_became_of_each_object() {
    let Some(machine) = Machine::with_api("apply_says_what_became_of_each_object").await else {
        return;
    };
    let map = |value: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\ndata: {{k: {value}}}\n");
    let file = machine.file("all.yaml", &format!("{}---\n{AGENT}", map("one")));
    let apply = ["apply", "-f", file.as_str()];
    let (code, out, err) = machine.far(&apply).await;
    assert_eq!(
        (code, out.as_str()),
        (0, "configmap/m created\nfaragent.tiffany.dev/a created\n"),
        "{err}"
    );
    let (_, out, _) = machine.far(&apply).await;
    assert_eq!(out, "configmap/m unchanged\nfaragent.tiffany.dev/a unchanged\n");
    machine.file("all.yaml", &format!("{}---\n{AGENT}", map("two")));
    let (_, out, _) = machine.far(&["apply", "-f", &file, "--dry-run"]).await;
    assert_eq!(
        out,
        "configmap/m configured (dry run)\nfaragent.tiffany.dev/a unchanged (dry run)\n"
    );
    let (_, out, _) = machine.far(&apply).await;
    assert_eq!(out, "configmap/m configured\nfaragent.tiffany.dev/a unchanged\n");
}

#[tokio::test]
async fn one_bad_object_is_named_and_does_not_keep_the_others_out() {
    let Some(machine) = Machine::with_api("one_bad_object_is_named_and_does_not_keep_the_others_out").await else {
        return;
    };
    let bad = AGENT
        .replace("name: a", "name: bad")
        .replace("image:", "memory: 0, image:");
    let file = machine.file("all.yaml", &format!("{bad}---\n{AGENT}"));
    let (code, out, err) = machine.far(&["apply", "-f", &file]).await;
    assert_eq!((code, out.as_str()), (1, "faragent.tiffany.dev/a created\n"));
    assert!(
        err.contains("bad") && err.contains("memory") && err.contains("1 of 2"),
        "{err}"
    );
    let (code, _, err) = machine.far(&["apply", "-f", &file, "-n", "elsewhere"]).await;
    assert_eq!(code, 1, "{err}");
}

#[tokio::test]
async fn get_prints_tables_objects_and_names() {
    let Some(machine) = Machine::with_api("get_prints_tables_objects_and_names").await else {
        return;
    };
    let (code, out, err) = machine.far(&["get"]).await;
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
    assert!(err.contains("No faragents in namespace default"), "{err}");
    for name in ["a", "b"] {
        let file = machine.file("one.yaml", &AGENT.replace("name: a", &format!("name: {name}")));
        assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    }
    machine
        .set_status("b", &json!({"phase": "Failed", "exitCode": 3, "reason": "Error"}))
        .await;

    let (_, table, _) = machine.far(&["get"]).await;
    let lines: Vec<_> = table.lines().collect();
    assert!(lines.len() == 3 && lines[0].starts_with("NAME"), "{table}");
    assert!(lines[2].starts_with('b') && lines[2].contains("Failed"), "{table}");
    let (_, out, _) = machine.far(&["get", "fa", "-o", "name"]).await;
    assert_eq!(out, "faragent.tiffany.dev/a\nfaragent.tiffany.dev/b\n");
    let (_, out, _) = machine.far(&["get", "FarAgent", "b", "-o", "json"]).await;
    let agent: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&agent["kind"], &agent["status"]["exitCode"]),
        (&json!("FarAgent"), &json!(3))
    );
    assert!(agent["metadata"].get("managedFields").is_none());
    let (_, out, _) = machine.far(&["get", "fa", "-o", "json"]).await;
    let list: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&list["kind"], list["items"].as_array().unwrap().len()),
        (&json!("List"), 2)
    );
    let (_, wide, _) = machine
        .far(&["get", "fa", "a", "b", "-o", "wide", "--no-headers"])
        .await;
    assert_eq!(wide.lines().count(), 2, "{wide}");
    let (_, all, _) = machine.far(&["get", "faragents.tiffany.dev", "-A"]).await;
    assert!(all.starts_with("NAMESPACE") && all.contains("default"), "{all}");

    let (code, _, err) = machine.far(&["get", "fa", "nobody"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("nobody") && err.contains("not found"), "{err}");
    let (code, _, err) = machine.far(&["get", "unicorns"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("no kind \"unicorns\""), "{err}");
}

#[tokio::test]
async fn describe_shows_conditions_and_says_when_there_are_no_events() {
    let Some(machine) = Machine::with_api("describe_shows_conditions_and_says_when_there_are_no_events").await else {
        return;
    };
    let file = machine.file("a.yaml", AGENT);
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    machine
        .set_status(
            "a",
            &json!({"phase": "Completed", "exitCode": 0, "reason": "Completed"}),
        )
        .await;
    let (code, out, err) = machine.far(&["describe", "a"]).await;
    assert_eq!(code, 0, "{err}");
    for expected in ["Name:", "Image:  example.com/x:v1", "Exit Code:  0", "Events:  <none>"] {
        assert!(out.contains(expected), "{expected}: {out}");
    }
}

#[tokio::test]
async fn wait_ends_with_the_agent_and_tells_success_from_failure() {
    let Some(machine) = Machine::with_api("wait_ends_with_the_agent_and_tells_success_from_failure").await else {
        return;
    };
    for (name, phase, expected) in [("good", "Completed", 0), ("bad", "Failed", 1)] {
        let file = machine.file("one.yaml", &AGENT.replace("name: a", &format!("name: {name}")));
        assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
        let waiting = machine.spawn(&["wait", name, "--timeout", "2m"]);
        machine.set_status(name, &json!({"phase": "Running"})).await;
        machine.set_status(name, &json!({"phase": phase, "reason": "x"})).await;
        assert_eq!(finish(waiting).await.0, expected, "{name}");
    }
    let (code, _, err) = machine.far(&["wait", "bad", "--for", "phase=Running"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("ended otherwise"), "{err}");
    let (code, _, err) = machine.far(&["wait", "nobody"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("no FarAgent nobody"), "{err}");
    let file = machine.file("one.yaml", AGENT);
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let (code, _, err) = machine.far(&["wait", "a", "--timeout", "300ms"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("last seen: Pending"), "{err}");
}

#[tokio::test]
async fn delete_waits_until_it_is_gone_and_files_are_deleted_in_reverse() {
    let Some(machine) = Machine::with_api("delete_waits_until_it_is_gone_and_files_are_deleted_in_reverse").await
    else {
        return;
    };
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\n";
    let file = machine.file("all.yaml", &format!("{map}---\n{AGENT}"));
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let waiting = machine.spawn(&["wait", "a", "--for", "delete"]);
    let (code, out, err) = machine.far(&["delete", "-f", &file]).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(out, "faragent.tiffany.dev \"a\" deleted\nconfigmap \"m\" deleted\n");
    assert_eq!(finish(waiting).await.0, 0);
    let (code, _, err) = machine.far(&["delete", "fa", "a"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("not found"), "{err}");
    assert_eq!(machine.far(&["delete", "fa", "a", "--ignore-not-found"]).await.0, 0);
}

#[tokio::test]
async fn a_watch_prints_every_change() {
    use std::io::{BufRead, BufReader};
    let Some(machine) = Machine::with_api("a_watch_prints_every_change").await else {
        return;
    };
    let file = machine.file("a.yaml", AGENT);
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let mut watch = machine.spawn(&["get", "fa", "-w"]);
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert!(next().starts_with("NAME"));
    assert!(next().starts_with('a'));
    machine.set_status("a", &json!({"phase": "Running"})).await;
    assert!(next().contains("Running"));
    machine.set_status("a", &json!({"phase": "Completed"})).await;
    assert!(next().contains("Completed"));
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[tokio::test]
async fn a_watch_prints_whole_objects_one_by_one() {
    use std::io::{BufRead, BufReader};
    let Some(machine) = Machine::with_api("a_watch_prints_whole_objects_one_by_one").await else {
        return;
    };
    let file = machine.file("a.yaml", AGENT);
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let mut watch = machine.spawn(&["get", "fa", "-w", "-o", "json"]);
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    // Each ends with the only brace that begins a line.
    let mut next = || {
        let mut text = String::new();
        loop {
            let line = lines.next().unwrap().unwrap();
            text += &line;
            if line == "}" {
                return serde_json::from_str::<Value>(&text).unwrap();
            }
        }
    };
    let first = next();
    assert_eq!(
        (&first["kind"], &first["items"][0]["metadata"]["name"]),
        (&json!("List"), &json!("a"))
    );
    for phase in ["Running", "Completed"] {
        machine.set_status("a", &json!({"phase": phase})).await;
        let changed = next();
        assert_eq!(
            (&changed["kind"], &changed["status"]["phase"]),
            (&json!("FarAgent"), &json!(phase))
        );
    }
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[tokio::test]
async fn a_blade_is_cordoned_drained_and_let_back_in() {
    let Some(machine) = Machine::with_api("a_blade_is_cordoned_drained_and_let_back_in").await else {
        return;
    };
    let (code, _, err) = machine.far(&["cordon", "b7"]).await;
    assert!(
        code == 1 && err.contains("b7") && err.contains("not found"),
        "{code} {err}"
    );
    let file = machine.file(
        "blade.yaml",
        "apiVersion: tiffany.dev/v1alpha1\nkind: FarNode\nmetadata: {name: b7}\nspec: {}\n",
    );
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let spec = async || {
        let (_, out, _) = machine.far(&["get", "farnode", "b7", "-o", "json"]).await;
        serde_json::from_str::<Value>(&out).unwrap()["spec"].clone()
    };
    let (code, out, err) = machine.far(&["cordon", "b7"]).await;
    assert_eq!((code, out.as_str()), (0, "blade b7 cordoned\n"), "{err}");
    assert_eq!(spec().await, json!({"unschedulable": true}));
    let (code, out, err) = machine.far(&["drain", "b7", "--deadline", "10m", "-o", "json"]).await;
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, told),
        (0, json!({"blade": "b7", "state": "drained", "agents": []})),
        "{err}"
    );
    assert_eq!(spec().await["drain"], json!({"policy": "Wait", "deadlineSeconds": 600}));
    let (_, out, _) = machine.far(&["drain", "b7", "--evict", "--no-wait"]).await;
    assert_eq!(out, "blade b7 draining\n");
    assert_eq!(spec().await["drain"], json!({"policy": "Evict"}));
    let (_, out, _) = machine.far(&["uncordon", "b7"]).await;
    assert_eq!((out.as_str(), spec().await), ("blade b7 uncordoned\n", json!({})));
}
