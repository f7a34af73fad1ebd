//! Processes killed at any moment: no agent is lost, none boots twice, nothing stays behind.

use far_e2e::{far_or_skip, payload_agent};

/// The lines `line 1` … `line n`, each once and in order.
fn assert_counted(output: &str, last: u32) {
    let expected: Vec<String> = (1..=last).map(|n| format!("line {n}")).collect();
    let got: Vec<&str> = output.lines().collect();
    assert_eq!(got, expected, "a gap or a duplicate");
}

#[test]
fn the_node_agent_killed_while_the_agent_writes_costs_no_line() {
    let Some(far) = far_or_skip("the_node_agent_killed_while_the_agent_writes_costs_no_line") else {
        return;
    };
    far.apply(&payload_agent("counts", &["count-to=300", "exit=7"]));
    let before = far.wait_phase("counts", "Running");
    for _ in 0..2 {
        far.kill("far-node");
        far.up_again();
    }
    let agent = far.wait_end("counts");
    assert_eq!(agent["status"]["exitCode"], 7, "{agent}");
    assert_eq!(agent["status"]["attempt"], 1, "booted once");
    assert_eq!(agent["status"]["startedAt"], before["status"]["startedAt"]);
    assert_counted(&far.far(&["logs", "counts"]).ok(), 300);
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn the_controller_killed_while_the_agent_runs_still_reports_its_end() {
    let Some(far) = far_or_skip("the_controller_killed_while_the_agent_runs_still_reports_its_end") else {
        return;
    };
    far.apply(&payload_agent("goes-on", &["count-to=100", "exit=0"]));
    let _ = far.wait_agent("goes-on", "to be placed", |status| status["nodeName"].is_string());
    far.kill("far-controller");
    far.up_again();
    let agent = far.wait_end("goes-on");
    assert_eq!(agent["status"]["phase"], "Completed", "{agent}");
    assert_eq!(agent["status"]["attempt"], 1);
    far.stop();
}

#[test]
fn every_daemon_killed_at_every_stage_of_a_boot_leaves_one_truthful_end() {
    let Some(far) = far_or_skip("every_daemon_killed_at_every_stage_of_a_boot_leaves_one_truthful_end") else {
        return;
    };
    // Each round kills at the moment a later process first shows: that is a stage, not a time.
    for (round, (victim, stage)) in [
        ("far-node", "far-vmm"),
        ("far-node", "qemu-system-x86_64"),
        ("far-controller", "far-vmm"),
        ("far-devapi", "far-vmm"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("round-{round}");
        far.apply(&payload_agent(&name, &["out=done", "exit=0"]));
        far_testkit::wait_for(&format!("{stage} to show"), || {
            far.pid_of(stage).ok_or_else(|| "not yet".into())
        });
        far.kill(victim);
        far.up_again();
        let agent = far.wait_end(&name);
        assert_eq!(agent["status"]["attempt"], 1, "{victim} at {stage}: {agent}");
        assert_eq!(agent["status"]["phase"], "Completed", "{victim} at {stage}: {agent}");
        assert_eq!(
            far.far(&["logs", &name]).ok(),
            "done\n",
            "{victim} at {stage}: ran exactly once"
        );
    }
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn the_vmm_killed_is_told_as_that_and_leaves_nothing() {
    let Some(far) = far_or_skip("the_vmm_killed_is_told_as_that_and_leaves_nothing") else {
        return;
    };
    for (name, victim) in [
        ("qemu-dies", "qemu-system-x86_64"),
        ("vmm-dies", "far-vmm"),
        ("vsock-dies", "vhost-device-vsock"),
    ] {
        far.apply(&payload_agent(name, &["count-to=2000"]));
        let _ = far.wait_phase(name, "Running");
        far.kill(victim);
        let agent = far.wait_end(name);
        assert_eq!(agent["status"]["reason"], "VMMCrashed", "{victim}: {agent}");
        assert!(
            agent["status"].get("exitCode").is_none_or(serde_json::Value::is_null),
            "{agent}"
        );
    }
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn deleting_a_running_agent_stops_its_vm_within_the_grace_period() {
    let Some(far) = far_or_skip("deleting_a_running_agent_stops_its_vm_within_the_grace_period") else {
        return;
    };
    far.apply(&payload_agent("stubborn", &["ignore-term", "count-to=5000"]));
    let _ = far.wait_phase("stubborn", "Running");
    let _ = far.far(&["delete", "faragent", "stubborn"]).ok();
    far_testkit::wait_for("the FarAgent to be gone", || {
        if far.agent("stubborn").is_null() {
            Ok(())
        } else {
            Err("still there".into())
        }
    });
    far.nothing_of_a_vm_is_left();
    far.stop();
}
