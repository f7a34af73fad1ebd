//! Each way an agent can end, provoked in a real microVM: the status tells what was seen, and nothing else.

use far_e2e::{far_or_skip, payload_agent, payload_agent_with};
use serde_json::Value;

fn no_exit_code(agent: &Value) -> bool {
    agent["status"].get("exitCode").is_none_or(Value::is_null)
}

#[test]
fn code_signal_and_lack_of_memory_are_told_apart() {
    let Some(far) = far_or_skip("code_signal_and_lack_of_memory_are_told_apart") else {
        return;
    };
    for (name, steps, reason, code, signal) in [
        ("completes", &["exit=0"][..], "Completed", Some(0), None),
        ("errs", &["exit=42"], "Error", Some(42), None),
        ("crashes", &["signal=6"], "Signal", None, Some(6)),
        ("eats", &["eat-memory"], "OOMKilled", None, Some(9)),
    ] {
        far.apply(&payload_agent(name, steps));
        let agent = far.wait_end(name);
        let status = &agent["status"];
        assert_eq!(status["reason"], reason, "{agent}");
        assert_eq!(status["exitCode"].as_i64(), code, "{agent}");
        assert_eq!(status["signal"].as_i64(), signal, "{agent}");
        assert_eq!(status["phase"] == "Completed", code == Some(0), "{agent}");
    }
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn an_agent_over_its_deadline_is_ended_and_says_so() {
    let Some(far) = far_or_skip("an_agent_over_its_deadline_is_ended_and_says_so") else {
        return;
    };
    let more = "  activeDeadlineSeconds: 10\n  terminationGracePeriodSeconds: 1\n";
    far.apply(&payload_agent_with("dawdles", &["ignore-term", "sleep=600000"], more));
    let agent = far.wait_end("dawdles");
    assert_eq!(agent["status"]["phase"], "Failed", "{agent}");
    assert_eq!(agent["status"]["reason"], "DeadlineExceeded", "{agent}");
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn an_agent_that_far_down_ends_is_evicted_and_stays_ended() {
    let Some(far) = far_or_skip("an_agent_that_far_down_ends_is_evicted_and_stays_ended") else {
        return;
    };
    let more = "  terminationGracePeriodSeconds: 1\n";
    far.apply(&payload_agent_with("displaced", &["ignore-term", "sleep=600000"], more));
    let _ = far.wait_phase("displaced", "Running");
    let _ = far.far(&["down"]).ok();
    far.up_again();
    let agent = far.wait_end("displaced");
    assert_eq!(agent["status"]["reason"], "Evicted", "{agent}");
    assert_eq!(agent["status"]["attempt"], 1, "never booted again: {agent}");
    assert!(no_exit_code(&agent) || agent["status"]["exitCode"] != 0, "{agent}");
    far.nothing_of_a_vm_is_left();
    far.stop();
}

#[test]
fn an_agent_whose_blade_is_silent_is_lost_and_no_exit_code_is_claimed() {
    const TEST: &str = "an_agent_whose_blade_is_silent_is_lost_and_no_exit_code_is_claimed";
    let Some(far) = far_or_skip(TEST) else { return };
    far.apply(&payload_agent("cut-off", &["out=up", "sleep=3600000"]));
    let _ = far.wait_phase("cut-off", "Running");
    // The microVM goes on; only nobody says so any more.
    far.kill("far-node");
    let agent = far.wait_agent("cut-off", "to be lost", |status| status["reason"] == "NodeLost");
    assert!(no_exit_code(&agent), "{agent}");
    assert!(agent["status"].get("signal").is_none_or(Value::is_null), "{agent}");
    assert_ne!(agent["status"]["phase"], "Completed", "{agent}");
    far.up_again();
    let _ = far.far(&["delete", "faragent", "cut-off"]).ok();
    far.nothing_of_a_vm_is_left();
    far.stop();
}
