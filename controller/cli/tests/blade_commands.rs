//! What `far` asks of the blade on this machine, and `far run` from creation to exit code.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{AGENT, Machine, PATIENCE, Ran, blade::Blade, finish, until};
use far_proto::node::Stream;
use serde_json::{Value, json};

fn placed(phase: &str, more: &Value) -> Value {
    let mut status = json!({"phase": phase, "nodeName": "this-blade", "attempt": 1});
    for (key, value) in more.as_object().into_iter().flatten() {
        status[key] = value.clone();
    }
    status
}

#[tokio::test]
async fn images_are_loaded_whole_listed_and_removed() {
    let machine = Machine::bare();
    let (code, _, err) = machine.far(&["image", "ls"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("far up"), "{err}");

    let blade = Blade::serve(&machine.dir.path().join("run"));
    // More than one message, and not a multiple of its size.
    let archive: Vec<u8> = (0..700_001_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::fs::write(machine.dir.path().join("image.tar"), &archive).unwrap();
    let (code, out, err) = machine
        .far(&["image", "load", "image.tar", "--as", "example.com/x:v1"])
        .await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(out, "loaded example.com/x:v1 (sha256:00112233)\n");
    assert!(blade.loaded_bytes() == archive, "the archive arrived whole");
    let (_, out, _) = machine.far(&["image", "ls"]).await;
    assert!(out.contains("example.com/x:v1") && out.contains("sha256:0011"), "{out}");
    let (_, out, _) = machine.far(&["image", "ls", "-o", "json"]).await;
    let images: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(images[0]["sizeBytes"], 700_001);
    assert_eq!(machine.far(&["image", "rm", "example.com/x:v1"]).await.0, 0);
    let (code, _, err) = machine.far(&["image", "rm", "example.com/x:v1"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("no image example.com/x:v1"), "{err}");

    machine.file("broken.tar", "broken");
    let (code, _, err) = machine.far(&["image", "load", "broken.tar", "--as", "y"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("broken.tar") && err.contains("index.json"), "{err}");
    let (code, _, err) = machine.far(&["image", "load", "nowhere.tar", "--as", "y"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("nowhere.tar"), "{err}");
}

#[tokio::test]
async fn logs_come_from_the_attempt_that_the_status_names() {
    let Some(machine) = Machine::with_api("logs_come_from_the_attempt_that_the_status_names").await else {
        return;
    };
    let file = machine.file("a.yaml", AGENT);
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let (code, _, err) = machine.far(&["logs", "a"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("on no blade yet"), "{err}");

    machine
        .set_status(
            "a",
            &placed("Completed", &json!({"attempt": 2, "tail": "the end", "exitCode": 0})),
        )
        .await;
    let (code, out, err) = machine.far(&["logs", "a"]).await;
    assert_eq!((code, out.as_str()), (1, "the end\n"), "the status keeps the tail");
    assert!(err.contains("blade this-blade"), "{err}");

    let blade = Blade::serve(&machine.dir.path().join("run"));
    blade.says(Stream::Stdout, "one\n");
    blade.says(Stream::Stderr, "two\n");
    assert_eq!(machine.far(&["logs", "a"]).await.1, "one\ntwo\n");
    assert_eq!(machine.far(&["logs", "fa/a", "--stderr"]).await.1, "two\n");
    assert_eq!(
        machine.far(&["logs", "a", "--stdout", "--timestamps"]).await.1,
        "1970-01-01T00:00:00Z one\n"
    );
    let plugin = machine.command("kubectl-far", &["logs", "a", "--tail", "5", "--attempt", "1"]);
    let mut plugin = plugin;
    assert_eq!(finish(plugin.spawn().unwrap()).await.1, "one\ntwo\n");
    let requests = blade.log_requests();
    let attempts: Vec<_> = requests
        .iter()
        .map(|request| request.identity.as_ref().unwrap().attempt)
        .collect();
    assert_eq!(attempts, [2, 2, 2, 1]);
    assert_eq!(requests[3].tail_lines, Some(5));
    let (code, _, err) = machine.far(&["logs", "a", "--attempt", "3"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("at attempt 2"), "{err}");
}

/// Plays the controller: waits for the agent `name` and gives it these statuses.
async fn play(machine: &Machine, name: &str, statuses: &[Value]) {
    for _ in 0..600 {
        if machine.far(&["get", "fa", name]).await.0 == 0 {
            for status in statuses {
                machine.set_status(name, status).await;
            }
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("{name} was not created");
}

#[tokio::test]
async fn run_streams_the_output_and_exits_as_the_agent_did() {
    let Some(machine) = Machine::with_api("run_streams_the_output_and_exits_as_the_agent_did").await else {
        return;
    };
    let blade = Blade::serve(&machine.dir.path().join("run"));
    blade.says(Stream::Stdout, "out\n");
    blade.says(Stream::Stderr, "err\n");
    for (name, end, expected) in [
        ("zero", json!({"phase": "Completed", "exitCode": 0}), 0),
        ("three", json!({"phase": "Failed", "exitCode": 3, "reason": "Error"}), 3),
        (
            "signal",
            json!({"phase": "Failed", "signal": 9, "reason": "Signal"}),
            137,
        ),
        (
            "lost",
            json!({"phase": "Failed", "reason": "InitLost", "message": "no report"}),
            125,
        ),
    ] {
        let file = machine.file("run.yaml", &AGENT.replace("name: a", &format!("name: {name}")));
        let run = machine.spawn(&["run", &file]);
        play(&machine, name, &[placed("Running", &json!({})), placed("Failed", &end)]).await;
        let (code, out, err) = finish(run).await;
        assert_eq!((code, out.as_str()), (expected, "out\n"), "{name}: {err}");
        assert!(err.contains("err\n"), "{name}: {err}");
    }
}

/// As `finish`, for what hung once.
async fn finish_or_fail(what: &str, child: std::process::Child) -> Ran {
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    tokio::time::timeout(PATIENCE, finish(child)).await.unwrap_or_else(|_| {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        panic!("{what}: still running")
    })
}

#[tokio::test]
async fn run_and_logs_do_not_wait_for_an_attempt_that_its_blade_will_never_hear_of() {
    let Some(machine) =
        Machine::with_api("run_and_logs_do_not_wait_for_an_attempt_that_its_blade_will_never_hear_of").await
    else {
        return;
    };
    // Knows no attempt at all.
    let blade = Blade::serve(&machine.dir.path().join("run"));
    let is_asked = async |name: &str, tail: Option<u32>| {
        until("the blade is asked for the output", || {
            blade.log_requests().iter().any(|request| {
                request.tail_lines == tail && request.identity.as_ref().is_some_and(|identity| identity.name == name)
            })
        })
        .await;
    };
    for (name, end, expected, said) in [
        (
            "refused",
            Some(json!({"phase": "Failed", "nodeName": "b", "attempt": 1, "reason": "InvalidSpec"})),
            125,
            "InvalidSpec",
        ),
        (
            "second",
            Some(json!({"phase": "Completed", "nodeName": "b", "attempt": 2, "exitCode": 0})),
            0,
            "",
        ),
        ("deleted", None, 125, "deleted"),
    ] {
        let file = machine.file("run.yaml", &AGENT.replace("name: a", &format!("name: {name}")));
        let run = machine.spawn(&["run", &file]);
        play(&machine, name, &[placed("Scheduled", &json!({}))]).await;
        is_asked(name, None).await;
        let logs = machine.spawn(&["logs", "-f", "--tail", "7", name]);
        is_asked(name, Some(7)).await;
        match end {
            Some(end) => machine.set_status(name, &end).await,
            None => assert_eq!(machine.far(&["delete", "fa", name]).await.0, 0),
        }
        let (code, _, err) = finish_or_fail(&format!("far run {name}"), run).await;
        assert_eq!(code, expected, "{name}: {err}");
        assert!(err.contains(said), "{name}: {err}");
        let (code, _, err) = finish_or_fail(&format!("far logs -f {name}"), logs).await;
        assert_eq!(code, 1, "{name}: {err}");
    }
}

#[tokio::test]
async fn run_takes_a_name_of_its_own_where_one_is_taken_and_applies_what_the_agent_needs() {
    let Some(machine) =
        Machine::with_api("run_takes_a_name_of_its_own_where_one_is_taken_and_applies_what_the_agent_needs").await
    else {
        return;
    };
    let blade = Blade::serve(&machine.dir.path().join("run"));
    blade.says(Stream::Stdout, "out\n");
    let file = machine.file(
        "run.yaml",
        &format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\n---\n{AGENT}"),
    );
    assert_eq!(machine.far(&["apply", "-f", &file]).await.0, 0);
    let run = machine.spawn(&["run", &file]);
    let mut second = String::new();
    for _ in 0..600 {
        let (_, out, _) = machine.far(&["get", "fa", "-o", "name"]).await;
        if let Some(name) = out
            .lines()
            .find_map(|line| line.strip_prefix("faragent.tiffany.dev/a-"))
        {
            second = format!("a-{name}");
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert!(!second.is_empty(), "a second agent with a name of its own");
    machine
        .set_status(&second, &placed("Completed", &json!({"exitCode": 0})))
        .await;
    let (code, out, err) = finish(run).await;
    assert_eq!((code, out.as_str()), (0, "out\n"), "{err}");
    assert!(err.contains("configmap/m unchanged"), "{err}");
}

#[tokio::test]
async fn ctrl_c_deletes_the_agent_that_runs() {
    let Some(machine) = Machine::with_api("ctrl_c_deletes_the_agent_that_runs").await else {
        return;
    };
    let blade = Blade::serve(&machine.dir.path().join("run"));
    blade.says(Stream::Stdout, "out\n");
    blade.keeps_running();
    let file = machine.file("run.yaml", AGENT);
    let run = machine.spawn(&["run", &file]);
    play(&machine, "a", &[placed("Running", &json!({}))]).await;
    until("the output is being read", || !blade.log_requests().is_empty()).await;
    let pid = nix::unistd::Pid::from_raw(run.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let (code, _, err) = finish(run).await;
    assert_eq!(code, 130, "{err}");
    let (code, _, err) = machine.far(&["get", "fa", "a"]).await;
    assert_eq!(code, 1, "deleted: {err}");
}

#[tokio::test]
async fn run_of_what_cannot_be_created_is_told_from_an_agents_own_exit_code() {
    let Some(machine) = Machine::with_api("run_of_what_cannot_be_created_is_told_from_an_agents_own_exit_code").await
    else {
        return;
    };
    let file = machine.file("bad.yaml", &AGENT.replace("image:", "memory: lots, image:"));
    let (code, _, err) = machine.far(&["run", &file]).await;
    assert_eq!(code, 125);
    assert!(err.contains("memory"), "{err}");
}

#[tokio::test]
async fn doctor_names_each_part_and_a_fix_for_what_is_missing() {
    let machine = Machine::bare();
    let (code, out, err) = machine.far(&["doctor", "-o", "json"]).await;
    let doctor: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    assert_eq!(code == 0, doctor["ok"] == true);
    let checks = doctor["checks"].as_array().unwrap();
    for name in [
        "KVM",
        "QEMU",
        "vsock daemon",
        "guest network",
        "programs",
        "boot kit",
        "kubectl",
    ] {
        assert!(checks.iter().any(|check| check["name"] == name), "{name}: {out}");
    }
    // No cache in this machine's home: there cannot be a boot kit.
    assert_eq!(code, 1);
    let kit = checks.iter().find(|check| check["name"] == "boot kit").unwrap();
    assert_eq!((&kit["ok"], &kit["fix"]), (&json!(false), &json!("make guest")));
    for check in checks {
        assert!(!check["reason"].as_str().unwrap().is_empty(), "{check}");
        if check["needed"] == true && check["ok"] == false {
            assert!(check["fix"].is_string(), "{check}");
        }
    }
    let (_, text, _) = machine.far(&["doctor"]).await;
    assert!(text.contains("fix: make guest"), "{text}");
}

#[tokio::test]
async fn up_without_a_boot_kit_starts_nothing_and_names_the_cure() {
    let machine = Machine::bare();
    let (code, _, err) = machine.far(&["up"]).await;
    assert_eq!(code, 1);
    assert!(err.contains("vmlinux") && err.contains("make guest"), "{err}");
    let (code, out, _) = machine.far(&["status"]).await;
    assert_eq!(code, 0);
    assert!(out.contains("Nothing runs"), "{out}");
    assert_eq!(machine.far(&["down"]).await.0, 0);
}
