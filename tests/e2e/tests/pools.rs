//! Warm agents and queues, as a user meets them: the examples by kubectl, with real microVMs.

use far_e2e::far_or_skip;
use far_testkit::{find, skip, wait_for};
use serde_json::Value;

fn example(name: &str) -> String {
    find::repository()
        .join("examples")
        .join(name)
        .to_string_lossy()
        .into_owned()
}

/// Waits until an object's status is as `is` says.
fn wait_status(far: &far_testkit::Far, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    wait_for(&format!("{what} to be as wanted"), || {
        let object = far.kubectl(&["get", what, "-o", "json"]);
        let object: Value = serde_json::from_str(&object.stdout).unwrap_or_default();
        if is(&object["status"]) {
            Ok(object)
        } else {
            Err(object["status"].to_string())
        }
    })
}

#[test]
fn an_agent_takes_over_a_warm_microvm_and_the_pool_is_scaled_by_kubectl() {
    const TEST: &str = "an_agent_takes_over_a_warm_microvm_and_the_pool_is_scaled_by_kubectl";
    if let Err(missing) = find::kubectl() {
        return skip(TEST, &missing);
    }
    let Some(far) = far_or_skip(TEST) else { return };
    let text = std::fs::read_to_string(example("pool.yaml")).expect("the example is there");
    let (pool, agent) = text.rsplit_once("---\n").expect("the agent is the last document");
    let _ = far
        .kubectl_with(&["apply", "-f", "-"], &pool.replace("replicas: 2", "replicas: 1"))
        .ok();
    let seen = wait_status(&far, "fap/warm", |status| status["warm"] == 1);
    assert_eq!(seen["status"]["wanted"], 1, "{seen}");
    let listed = far
        .kubectl(&["get", "fa", "-l", "tiffany.dev/pool=warm", "-o", "json"])
        .ok();
    let listed: Value = serde_json::from_str(&listed).expect("kubectl prints JSON");
    let warm = listed["items"][0].clone();
    assert_eq!(
        (&warm["status"]["phase"], &warm["status"]["startedAt"]),
        (&"Starting".into(), &Value::Null)
    );
    let pid = far.pid_of("qemu-system-x86_64").expect("it is booted");

    let _ = far.kubectl_with(&["apply", "-f", "-"], agent).ok();
    let ended = far.wait_end("from-the-pool");
    assert_eq!(ended["status"]["phase"], "Completed", "{ended}");
    assert_eq!(ended["status"]["claimed"]["uid"], warm["metadata"]["uid"], "{ended}");
    assert!(far.far(&["logs", "from-the-pool"]).ok().contains("\"vector\""));
    wait_for("the VMM of the warm agent to be gone", || {
        let alive = far.processes().iter().any(|process| process.pid == pid);
        if alive { Err("it runs".to_owned()) } else { Ok(()) }
    });
    wait_status(&far, "fap/warm", |status| status["claimed"] == 1 && status["warm"] == 1);

    let _ = far.kubectl(&["scale", "fap/warm", "--replicas=2"]).ok();
    wait_status(&far, "fap/warm", |status| status["warm"] == 2);
    let table = far.kubectl(&["get", "fap"]).ok();
    assert!(table.contains("TEMPLATE") && table.contains("tiffany"), "{table}");
    let _ = far.kubectl(&["scale", "fap/warm", "--replicas=0"]).ok();
    wait_status(&far, "fap/warm", |status| status["replicas"] == 0);
    far.nothing_of_a_vm_is_left();
    assert_eq!(far.agent("from-the-pool")["status"]["phase"], "Completed");
    far.stop();
}

#[test]
fn tasks_of_a_queue_succeed_and_one_ends_as_a_dead_letter() {
    const TEST: &str = "tasks_of_a_queue_succeed_and_one_ends_as_a_dead_letter";
    if let Err(missing) = find::kubectl() {
        return skip(TEST, &missing);
    }
    let Some(far) = far_or_skip(TEST) else { return };
    let _ = far.kubectl(&["apply", "-f", &example("queue.yaml")]).ok();
    let good = wait_status(&far, "ft/self-test", |status| status["phase"] == "Succeeded");
    assert_eq!(
        (&good["status"]["attempts"], &good["status"]["exitCode"]),
        (&1.into(), &0.into())
    );
    let dead = wait_status(&far, "ft/no-documents", |status| status["phase"] == "Dead");
    let status = &dead["status"];
    assert_eq!(
        (&status["attempts"], &status["exitCode"]),
        (&2.into(), &3.into()),
        "{status}"
    );
    assert_eq!(
        (&status["reason"], &status["agentName"]),
        (&"Error".into(), &"no-documents-2".into())
    );
    wait_status(&far, "fq/embeddings", |status| {
        status["succeeded"] == 1 && status["dead"] == 1
    });
    let table = far.far(&["get", "ft"]).ok();
    assert!(
        table.contains("PHASE") && table.contains("Dead") && table.contains("Succeeded"),
        "{table}"
    );
    assert!(far.far(&["describe", "ft/no-documents"]).ok().contains("Dead"));
    let _ = far.kubectl(&["delete", "ft", "--all", "--timeout=120s"]).ok();
    far.nothing_of_a_vm_is_left();
    far.stop();
}
