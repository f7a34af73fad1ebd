//! What follows the end of an attempt, and what ends one: retries, suspension, expiry, sleep, lost blades, drains, taints.

#![allow(clippy::unwrap_used)] // A panic in a helper is the report.

mod support;

use std::time::Duration;

use far_proto::node::{EndReason, Phase};
use kube::{ResourceExt, api::Patch};
use serde_json::{Value, json};
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    until,
};

async fn blade(cluster: &Cluster, name: &str) -> FakeBlade {
    FakeBlade::start(cluster, name, capacity(8000, 8192)).await
}

async fn change(cluster: &Cluster, name: &str, spec: Value) {
    let patch = Patch::Merge(json!({ "spec": spec }));
    cluster.agents().patch(name, &Default::default(), &patch).await.unwrap();
}

async fn change_blade(cluster: &Cluster, name: &str, spec: Value) {
    let patch = Patch::Merge(json!({ "spec": spec }));
    cluster.nodes().patch(name, &Default::default(), &patch).await.unwrap();
}

/// The attempt is on the blade and has not ended.
async fn has(blade: &FakeBlade, uid: &str, attempt: u32) {
    until(&format!("attempt {attempt} on {}", blade.name), async || {
        (blade.fake.live(uid) == [attempt]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_fails_is_tried_again_until_its_backoff_limit() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let spec = json!({"image": "a", "restartPolicy": "OnFailure", "backoffLimit": 2});
    let uid = cluster.create("flaky", spec).await.uid().unwrap();
    for attempt in 1..=3 {
        has(&blade, &uid, attempt).await;
        blade.fake.running(&uid);
        cluster
            .wait("flaky", "to run", |status| {
                status["phase"] == "Running" && status["attempt"] == attempt && status["restarts"] == attempt - 1
            })
            .await;
        blade.fake.ended(&uid, EndReason::Error, Some(3), "exited with code 3");
    }
    let failed = cluster.wait_phase("flaky", "Failed").await;
    let status = &failed["status"];
    assert_eq!(
        (&status["attempt"], &status["exitCode"], &status["restarts"]),
        (&json!(3), &json!(3), &json!(2))
    );
    assert!(
        status["message"].as_str().unwrap().contains("spec.backoffLimit"),
        "{status}"
    );
    assert_eq!(
        (&status["failures"], &status["lastAttempt"]["exitCode"]),
        (&json!(2), &json!(3))
    );
    assert_eq!(blade.fake.most_boots(), 1, "each attempt booted once");
    assert!(cluster.events("flaky").await.contains(&"Retrying".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_a_blade_are_tried_again_and_count_nothing() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let spec = json!({"image": "a", "restartPolicy": "OnFailure", "backoffLimit": 0});
    let uid = cluster.create("unlucky", spec).await.uid().unwrap();
    let reasons = [
        EndReason::BootTimeout,
        EndReason::VmmCrashed,
        EndReason::InitLost,
        EndReason::ImageError,
        EndReason::NetworkError,
        EndReason::BladeRebooted,
        EndReason::KernelPanic,
    ];
    for (attempt, reason) in (1..).zip(reasons) {
        has(&blade, &uid, attempt).await;
        blade.fake.ended(&uid, reason, None, "the blade's fault");
    }
    has(&blade, &uid, 8).await;
    let starting = cluster
        .wait("unlucky", "its eighth attempt", |status| status["attempt"] == 8)
        .await;
    assert_eq!(starting["status"]["infrastructureFailures"], 7, "{starting}");
    assert_eq!(starting["status"]["failures"], Value::Null);
    blade.fake.ended(&uid, EndReason::Error, Some(1), "its own fault");
    let failed = cluster.wait_phase("unlucky", "Failed").await;
    assert_eq!(
        (&failed["status"]["reason"], &failed["status"]["exitCode"]),
        (&json!("Error"), &json!(1))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_restart_policy_never_is_not_tried_again() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let uid = cluster.create("once", json!({"image": "a"})).await.uid().unwrap();
    has(&blade, &uid, 1).await;
    blade.fake.ended(&uid, EndReason::VmmCrashed, None, "signal 11");
    let failed = cluster.wait_phase("once", "Failed").await;
    assert_eq!(
        (&failed["status"]["attempt"], &failed["status"]["reason"]),
        (&json!(1), &json!("VMMCrashed"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ran_longer_than_its_deadline_is_failed_and_not_tried_again() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let spec = json!({"image": "a", "restartPolicy": "Always", "activeDeadlineSeconds": 3600});
    let uid = cluster.create("slow", spec).await.uid().unwrap();
    has(&blade, &uid, 1).await;
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    has(&blade, &uid, 2).await;
    let left = blade.fake.spec(&uid).unwrap().active_deadline_s;
    assert!((1..=3600).contains(&left), "what is left of it: {left}");
    blade
        .fake
        .ended(&uid, EndReason::DeadlineExceeded, None, "ran too long");
    let failed = cluster.wait_phase("slow", "Failed").await;
    assert_eq!(
        (&failed["status"]["reason"], &failed["status"]["restarts"]),
        (&json!("DeadlineExceeded"), &json!(1))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_an_agent_that_still_waits_for_a_secret() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let env = json!([{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k"}}}]);
    let spec = json!({"image": "a", "activeDeadlineSeconds": 1, "env": env});
    let uid = cluster.create("waits", spec).await.uid().unwrap();
    let failed = cluster.wait_phase("waits", "Failed").await;
    assert_eq!(failed["status"]["reason"], "DeadlineExceeded", "{failed}");
    assert_eq!(blade.fake.attempts(&uid), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_agent_waits_and_one_that_runs_is_ended_and_placed_anew() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let uid = cluster
        .create("gated", json!({"image": "a", "suspend": true}))
        .await
        .uid()
        .unwrap();
    let gated = cluster
        .wait("gated", "to say so", |status| status["reason"] == "Suspended")
        .await;
    assert_eq!(
        (&gated["status"]["phase"], &gated["metadata"]["finalizers"]),
        (&json!("Pending"), &Value::Null)
    );
    change(&cluster, "gated", json!({"suspend": false})).await;
    has(&blade, &uid, 1).await;
    blade.fake.running(&uid);
    cluster.wait_phase("gated", "Running").await;
    change(&cluster, "gated", json!({"suspend": true})).await;
    let gated = cluster
        .wait("gated", "to wait again", |status| status["reason"] == "Suspended")
        .await;
    assert_eq!(
        (&gated["status"]["nodeName"], &gated["status"]["restarts"]),
        (&Value::Null, &json!(0))
    );
    assert_eq!(blade.fake.live(&uid), Vec::<u32>::new());
    change(&cluster, "gated", json!({"suspend": false})).await;
    has(&blade, &uid, 2).await;
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    cluster.wait_phase("gated", "Completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_agent_is_deleted_after_its_time_and_forgotten_by_its_blade() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let uid = cluster
        .create("brief", json!({"image": "a", "ttlSecondsAfterFinished": 1}))
        .await
        .uid()
        .unwrap();
    has(&blade, &uid, 1).await;
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    cluster.wait_gone("brief").await;
    until("the blade to forget it", async || {
        (blade.fake.kept() == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_keys_of_a_config_map_and_a_secret_become_variables_and_env_wins() {
    use k8s_openapi::api::core::v1::{ConfigMap, Secret};
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let maps = kube::Api::<ConfigMap>::namespaced(cluster.client.clone(), "default");
    let map = json!({"metadata": {"name": "settings"}, "data": {"A": "map", "B": "map", "C": "map"}});
    maps.create(&Default::default(), &serde_json::from_value(map).unwrap())
        .await
        .unwrap();
    let spec = json!({
        "image": "a",
        "envFrom": [{"configMapRef": {"name": "settings"}}, {"prefix": "S_", "secretRef": {"name": "keys"}},
            {"secretRef": {"name": "keys"}}],
        "env": [{"name": "C", "value": "own"}],
    });
    let uid = cluster.create("set", spec).await.uid().unwrap();
    cluster
        .wait("set", "to miss the Secret", |status| {
            status["reason"] == "ReferenceMissing"
        })
        .await;
    let secrets = kube::Api::<Secret>::namespaced(cluster.client.clone(), "default");
    let secret = json!({"metadata": {"name": "keys"}, "stringData": {"B": "secret"}});
    secrets
        .create(&Default::default(), &serde_json::from_value(secret).unwrap())
        .await
        .unwrap();
    has(&blade, &uid, 1).await;
    let mut env = blade.fake.spec(&uid).unwrap().env;
    env.sort_by(|one, other| one.name.cmp(&other.name));
    let env: Vec<_> = env
        .iter()
        .map(|one| (one.name.as_str(), one.value.as_str(), one.secret))
        .collect();
    assert_eq!(
        env,
        [
            ("A", "map", false),
            ("B", "secret", true),
            ("C", "own", false),
            ("S_B", "secret", true)
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_cannot_lay_an_agent_to_sleep_says_so_and_the_agent_runs_on() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let uid = cluster
        .create("tired", json!({"image": "a", "operatingMode": "Sleeping"}))
        .await
        .uid()
        .unwrap();
    has(&blade, &uid, 1).await;
    blade.fake.running(&uid);
    let sleeping = |status: &Value| {
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|one| one["type"] == "Sleeping")
    };
    let told = cluster
        .wait("tired", "to say it", |status| sleeping(status).is_some())
        .await;
    let condition = sleeping(&told["status"]).unwrap();
    assert_eq!(
        (&condition["status"], &condition["reason"]),
        (&json!("False"), &json!("NotSupported"))
    );
    assert_eq!(told["status"]["phase"], "Running");
    change(&cluster, "tired", json!({"operatingMode": "Running"})).await;
    cluster
        .wait("tired", "to speak no more of sleep", |status| {
            sleeping(status).is_none()
        })
        .await;
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    cluster.wait_phase("tired", "Completed").await;
}

async fn cluster_that_fences() -> Cluster {
    Cluster::start_with(|config| {
        config.node_lost_after = Duration::from_secs(1);
        config.fence_after = Duration::from_secs(3);
        config.fence_margin = Duration::from_millis(500);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_a_lost_blade_is_failed_once_the_blade_must_have_ended_it() {
    let cluster = cluster_that_fences().await;
    let lost = blade(&cluster, "b1").await;
    let uid = cluster
        .create("gone", json!({"image": "a", "restartPolicy": "Always"}))
        .await
        .uid()
        .unwrap();
    has(&lost, &uid, 1).await;
    lost.fake.running(&uid);
    cluster.wait_phase("gone", "Running").await;
    let _kept = lost.die().await;
    cluster.wait_phase("gone", "Unknown").await;
    let failed = cluster.wait_phase("gone", "Failed").await;
    assert_eq!(
        (&failed["status"]["reason"], &failed["status"]["exitCode"]),
        (&json!("NodeLost"), &Value::Null)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_a_lost_blade_is_rescheduled_once_the_blade_must_have_ended_it() {
    let cluster = cluster_that_fences().await;
    let lost = blade(&cluster, "b1").await;
    let uid = cluster
        .create("moves", json!({"image": "a", "lostPolicy": "Reschedule"}))
        .await
        .uid()
        .unwrap();
    has(&lost, &uid, 1).await;
    lost.fake.running(&uid);
    cluster.wait_phase("moves", "Running").await;
    let other = blade(&cluster, "b2").await;
    let last_heard = std::time::Instant::now();
    let (credentials, fake) = lost.die().await;
    has(&other, &uid, 2).await;
    assert!(
        last_heard.elapsed() >= Duration::from_secs(3),
        "not before the fence time"
    );
    let moved = cluster
        .wait("moves", "its second attempt", |status| status["attempt"] == 2)
        .await;
    assert_eq!(
        (&moved["status"]["nodeName"], &moved["status"]["lastAttempt"]["reason"]),
        (&json!("b2"), &json!("NodeLost"))
    );
    // The blade comes back with what it has ended itself: nobody is confused by it.
    fake.ended(&uid, EndReason::NodeLost, None, "fenced");
    let _back = FakeBlade::resume(&cluster, "b1", capacity(8000, 8192), credentials, fake).await;
    other.fake.ended(&uid, EndReason::Completed, Some(0), "");
    let done = cluster.wait_phase("moves", "Completed").await;
    assert_eq!(done["status"]["attempt"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_is_back_before_the_fence_time_has_lost_nothing() {
    let cluster = Cluster::start_with(|config| config.node_lost_after = Duration::from_secs(1)).await;
    let away = blade(&cluster, "b1").await;
    let uid = cluster
        .create("stays", json!({"image": "a", "lostPolicy": "Reschedule"}))
        .await
        .uid()
        .unwrap();
    has(&away, &uid, 1).await;
    away.fake.running(&uid);
    cluster.wait_phase("stays", "Running").await;
    let _other = blade(&cluster, "b2").await;
    let (credentials, fake) = away.die().await;
    cluster.wait_phase("stays", "Unknown").await;
    let back = FakeBlade::resume(&cluster, "b1", capacity(8000, 8192), credentials, fake).await;
    let runs = cluster.wait_phase("stays", "Running").await;
    assert_eq!(
        (&runs["status"]["attempt"], &runs["status"]["nodeName"]),
        (&json!(1), &json!("b1"))
    );
    assert_eq!(back.fake.live(&uid), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_was_started_anew_ends_its_agents_and_they_are_tried_again() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let uid = cluster
        .create("cut", json!({"image": "a", "restartPolicy": "OnFailure"}))
        .await
        .uid()
        .unwrap();
    has(&blade, &uid, 1).await;
    let (credentials, fake) = blade.die().await;
    // What far-node says of attempts of an earlier boot id.
    fake.ended(
        &uid,
        EndReason::BladeRebooted,
        None,
        "the blade was started anew before the agent ended",
    );
    let back = FakeBlade::resume(&cluster, "b1", capacity(8000, 8192), credentials, fake).await;
    has(&back, &uid, 2).await;
    let again = cluster
        .wait("cut", "its second attempt", |status| status["attempt"] == 2)
        .await;
    assert_eq!(again["status"]["lastAttempt"]["reason"], "BladeRebooted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_is_drained_ends_its_agents_and_takes_no_more() {
    let cluster = Cluster::start().await;
    let full = blade(&cluster, "b1").await;
    let again = json!({"image": "a", "restartPolicy": "OnFailure", "nodeSelector": {}});
    let (again, once) = (
        cluster.create("again", again).await,
        cluster.create("once", json!({"image": "a"})).await,
    );
    let (again, once) = (again.uid().unwrap(), once.uid().unwrap());
    for uid in [&again, &once] {
        has(&full, uid, 1).await;
        full.fake.running(uid);
    }
    cluster.wait_phase("once", "Running").await;
    cluster.wait_phase("again", "Running").await;
    change_blade(&cluster, "b1", json!({"drain": {"policy": "Wait"}})).await;
    cluster.create("new", json!({"image": "a"})).await;
    cluster
        .wait("new", "to wait", |status| status["reason"] == "Unschedulable")
        .await;
    assert_eq!(full.fake.live(&once), [1], "what runs may end by itself");
    change_blade(&cluster, "b1", json!({"drain": {"policy": "Evict"}})).await;
    let failed = cluster.wait_phase("once", "Failed").await;
    assert_eq!(failed["status"]["reason"], "Evicted");
    let other = blade(&cluster, "b2").await;
    has(&other, &again, 2).await;
    assert_eq!(full.fake.live(&again), Vec::<u32>::new());
    let node = serde_json::to_value(cluster.nodes().get("b1").await.unwrap()).unwrap();
    let conditions = node["status"]["conditions"].as_array().unwrap();
    assert!(
        conditions
            .iter()
            .any(|one| one["type"] == "Draining" && one["status"] == "True"),
        "{node}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taint_with_no_execute_evicts_those_that_do_not_tolerate_it() {
    let cluster = Cluster::start().await;
    let blade = blade(&cluster, "b1").await;
    let bears = |seconds: Value| {
        json!({"image": "a", "tolerations": [
            {"key": "hot", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}]})
    };
    for (name, spec) in [
        ("leaves", json!({"image": "a"})),
        ("later", bears(json!(1))),
        ("stays", bears(Value::Null)),
    ] {
        let uid = cluster.create(name, spec).await.uid().unwrap();
        has(&blade, &uid, 1).await;
        blade.fake.running(&uid);
        cluster.wait_phase(name, "Running").await;
    }
    change_blade(
        &cluster,
        "b1",
        json!({"taints": [{"key": "hot", "effect": "NoExecute"}]}),
    )
    .await;
    for name in ["leaves", "later"] {
        let evicted = cluster.wait_phase(name, "Failed").await;
        assert_eq!(evicted["status"]["reason"], "Evicted", "{name}");
    }
    let stays = cluster.agents().get("stays").await.unwrap();
    assert_eq!(blade.fake.phase(&stays.uid().unwrap()), Some(Phase::Running));
}

/// What only far-devapi can do: see [`support::server`].
mod embedded {
    use far_devapi::faults::{Action, Fault, Match};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn that_a_silent_blade_is_drained_is_told_however_often_the_write_fails() {
        let cluster = Cluster::start_with(|config| config.node_lost_after = Duration::from_secs(1)).await;
        blade(&cluster, "b1").await.die().await;
        cluster.wait_ready("b1", "Unknown").await;
        let on = Match {
            verb: Some("patch".into()),
            resource: Some("farnodes".into()),
            subresource: Some("status".into()),
            ..Match::default()
        };
        for code in [500, 409] {
            let retry_after = None;
            let action = Action::Answer { code, retry_after };
            let on = on.clone();
            assert!(cluster.api.faults.add(Fault { on, action, times: 1 }));
        }
        change_blade(&cluster, "b1", json!({"drain": {"policy": "Wait"}})).await;
        until("the drain to be told", async || {
            let conditions = cluster.nodes().get("b1").await.unwrap().status?.conditions;
            let is = |kind: &str, status: &str| conditions.iter().any(|one| one.type_ == kind && one.status == status);
            (is("Draining", "True") && is("Ready", "Unknown")).then_some(())
        })
        .await;
        assert_eq!(cluster.api.faults.pending(), []);
    }
}
