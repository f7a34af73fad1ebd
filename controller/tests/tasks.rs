//! Queues of tasks: controller, API and a fake blade, everything real between them.
#![allow(clippy::unwrap_used)] // A panic in a test's helper is the report.

mod support;

use std::{sync::atomic::Ordering, time::Duration};

use far_api::{FarAgent, FarAgentPool, FarAgentTemplate, FarQueue, FarTask};
use far_proto::node::{EndReason, Phase};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    until,
};

fn api<K>(cluster: &Cluster) -> Api<K>
where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
{
    Api::namespaced(cluster.client.clone(), "default")
}

async fn apply<K>(cluster: &Cluster, kind: &str, name: &str, spec: Value) -> K
where
    K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let object = json!({"apiVersion": "tiffany.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
    let params = PatchParams::apply("test").force();
    api::<K>(cluster)
        .patch(name, &params, &Patch::Apply(&object))
        .await
        .unwrap()
}

/// A cluster whose tries follow each other at once, a blade, a template and a queue.
async fn start(queue: Value) -> (Cluster, FakeBlade) {
    let fast = |config: &mut far_controller::Config| config.task_backoff = Duration::from_millis(100);
    let mut cluster = Cluster::start_beside(&[far_testkit::servers::Part::ControllerManager]).await;
    cluster.stop_controller().await;
    cluster.start_controller(fast).await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    blade.fake.warms.store(true, Ordering::SeqCst);
    let spec = json!({"image": "a", "memory": "128Mi", "cpu": "100m", "args": ["of the template"],
        "env": [{"name": "BASE", "value": "1"}, {"name": "WHO", "value": "nobody"}]});
    apply::<FarAgentTemplate>(&cluster, "FarAgentTemplate", "t", json!({"template": {"spec": spec}})).await;
    apply::<FarQueue>(&cluster, "FarQueue", "q", queue).await;
    (cluster, blade)
}

async fn task(cluster: &Cluster, name: &str, more: Value) -> FarTask {
    let mut spec = more;
    spec["queueRef"] = json!({"name": "q"});
    apply(cluster, "FarTask", name, spec).await
}

async fn wait_task(cluster: &Cluster, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    until(&format!("task {name} {what}"), async || {
        let task = api::<FarTask>(cluster).get_opt(name).await.unwrap()?;
        let status = serde_json::to_value(task.status).unwrap();
        is(&status).then_some(status)
    })
    .await
}

/// Waits for an agent on the blade; answers its uid.
async fn on_blade(cluster: &Cluster, blade: &FakeBlade, name: &str) -> String {
    until(&format!("agent {name} on the blade"), async || {
        let uid = cluster.agents().get_opt(name).await.unwrap()?.uid()?;
        blade.fake.phase(&uid).map(|_| uid)
    })
    .await
}

async fn end(cluster: &Cluster, blade: &FakeBlade, name: &str, code: i32) {
    let uid = on_blade(cluster, blade, name).await;
    blade.fake.running(&uid);
    let reason = if code == 0 {
        EndReason::Completed
    } else {
        EndReason::Error
    };
    blade.fake.ended(&uid, reason, Some(code), "as the test says");
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_succeed_are_tried_again_and_end_as_dead_letters() {
    let (cluster, blade) = start(json!({"templateRef": {"name": "t"}, "maxAttempts": 2})).await;
    task(
        &cluster,
        "good",
        json!({"args": ["mine"], "env": [{"name": "WHO", "value": "good"}]}),
    )
    .await;
    let uid = on_blade(&cluster, &blade, "good-1").await;
    let spec = blade.fake.spec(&uid).unwrap();
    assert_eq!(spec.args, ["mine"]);
    let env: Vec<_> = spec
        .env
        .iter()
        .map(|env| (env.name.as_str(), env.value.as_str()))
        .collect();
    assert_eq!(env, [("BASE", "1"), ("WHO", "good")]);
    end(&cluster, &blade, "good-1", 0).await;
    let good = wait_task(&cluster, "good", "to succeed", |status| status["phase"] == "Succeeded").await;
    assert_eq!((&good["attempts"], &good["exitCode"]), (&json!(1), &json!(0)));

    task(&cluster, "bad", json!({})).await;
    end(&cluster, &blade, "bad-1", 3).await;
    end(&cluster, &blade, "bad-2", 4).await;
    let dead = wait_task(&cluster, "bad", "to die", |status| status["phase"] == "Dead").await;
    assert_eq!(
        (
            &dead["attempts"],
            &dead["exitCode"],
            &dead["reason"],
            &dead["agentName"]
        ),
        (&json!(2), &json!(4), &json!("Error"), &json!("bad-2"))
    );
    assert!(dead["message"].as_str().unwrap().contains("as the test says"));
    // The newest agent stays for its logs, the earlier one is gone, and no third comes.
    cluster.wait_gone("bad-1").await;
    assert!(cluster.agents().get_opt("bad-2").await.unwrap().is_some());
    until("the queue's numbers", async || {
        let queue = api::<FarQueue>(&cluster).get("q").await.unwrap().status?;
        (queue.succeeded == 1 && queue.dead == 1 && queue.running == 0 && queue.pending == 0).then_some(())
    })
    .await;
    assert!(cluster.agents().get_opt("bad-3").await.unwrap().is_none());
    assert_eq!(blade.fake.most_boots(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_agents_than_allowed_and_the_urgent_first() {
    let (cluster, blade) = start(json!({"templateRef": {"name": "t"}, "parallelism": 2, "suspend": true})).await;
    for n in 0..4 {
        task(&cluster, &format!("t{n}"), json!({"priority": n})).await;
        wait_task(&cluster, &format!("t{n}"), "to be held back", |status| {
            status["reason"] == "Suspended"
        })
        .await;
    }
    let go = Patch::Merge(json!({"spec": {"suspend": false}}));
    api::<FarQueue>(&cluster)
        .patch("q", &Default::default(), &go)
        .await
        .unwrap();
    for pair in [["t3-1", "t2-1"], ["t1-1", "t0-1"]] {
        for name in pair {
            on_blade(&cluster, &blade, name).await;
        }
        let live = cluster.agents().list(&Default::default()).await.unwrap().items;
        let live = live.iter().filter(|agent| {
            agent
                .status
                .as_ref()
                .and_then(|status| status.finished_at.as_ref())
                .is_none()
        });
        assert_eq!(live.count(), 2);
        for name in pair {
            end(&cluster, &blade, name, 0).await;
        }
    }
    for n in 0..4 {
        wait_task(&cluster, &format!("t{n}"), "to succeed", |status| {
            status["phase"] == "Succeeded"
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_made_before_a_crash_is_taken_up_and_anothers_is_left_alone() {
    let (mut cluster, blade) = start(json!({"templateRef": {"name": "t"}})).await;
    cluster.kill_controller().await;
    let mine = task(&cluster, "mine", json!({})).await;
    let spec = json!({"image": "a", "memory": "128Mi", "cpu": "100m"});
    // What a controller leaves that dies between the agent and the status of its task.
    let made = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "spec": spec, "metadata": {"name": "mine-1",
        "annotations": {"tiffany.dev/queue": "q"},
        "ownerReferences": [{"apiVersion": "tiffany.dev/v1alpha1", "kind": "FarTask", "name": "mine", "uid": mine.uid(),
            "controller": true}]}});
    let made: FarAgent = serde_json::from_value(made).unwrap();
    let made = cluster.agents().create(&PostParams::default(), &made).await.unwrap();
    let strange = cluster.create("taken-1", spec).await;
    task(&cluster, "taken", json!({})).await;
    cluster.start_controller(|_| {}).await;

    let status = wait_task(&cluster, "mine", "to run", |status| status["phase"] == "Running").await;
    assert_eq!(
        (&status["attempts"], &status["agentName"]),
        (&json!(1), &json!("mine-1"))
    );
    assert_eq!(cluster.agents().get("mine-1").await.unwrap().uid(), made.uid());
    let status = wait_task(&cluster, "taken", "to be refused", |status| {
        status["reason"] == "NameTaken"
    })
    .await;
    assert_eq!((&status["phase"], &status["attempts"]), (&json!("Pending"), &json!(0)));
    assert_eq!(cluster.agents().get("taken-1").await.unwrap().uid(), strange.uid());
    on_blade(&cluster, &blade, "mine-1").await;
    assert_eq!(blade.fake.most_boots(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_waits_for_its_queue_and_takes_its_agent_along() {
    let (cluster, blade) = start(json!({"templateRef": {"name": "t"}})).await;
    api::<FarQueue>(&cluster)
        .delete("q", &Default::default())
        .await
        .unwrap();
    task(&cluster, "early", json!({})).await;
    wait_task(&cluster, "early", "to wait for its queue", |status| {
        status["phase"] == "Pending" && status["reason"] == "QueueMissing"
    })
    .await;
    apply::<FarQueue>(&cluster, "FarQueue", "q", json!({"templateRef": {"name": "other"}})).await;
    wait_task(&cluster, "early", "to wait for the template", |status| {
        status["reason"] == "TemplateMissing"
    })
    .await;
    apply::<FarQueue>(&cluster, "FarQueue", "q", json!({"templateRef": {"name": "t"}})).await;
    let uid = on_blade(&cluster, &blade, "early-1").await;
    blade.fake.running(&uid);
    api::<FarTask>(&cluster)
        .delete("early", &Default::default())
        .await
        .unwrap();
    cluster.wait_gone("early-1").await;
    assert_ne!(blade.fake.phase(&uid), Some(Phase::Running));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_deleted_counts_as_a_failed_try() {
    let (cluster, blade) = start(json!({"templateRef": {"name": "t"}, "maxAttempts": 1})).await;
    task(&cluster, "gone", json!({})).await;
    on_blade(&cluster, &blade, "gone-1").await;
    wait_task(&cluster, "gone", "to run", |status| status["phase"] == "Running").await;
    cluster.delete("gone-1").await;
    let dead = wait_task(&cluster, "gone", "to die", |status| status["phase"] == "Dead").await;
    // Deleted while it ran: its end may be seen before it goes.
    assert!(
        dead["reason"] == "AgentDeleted" || dead["reason"] == "Signal" || dead["reason"] == "Evicted",
        "{dead}"
    );
    assert!(dead["exitCode"].is_null());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_task_goes_when_its_time_is_over() {
    let (cluster, blade) = start(json!({"templateRef": {"name": "t"}})).await;
    task(&cluster, "brief", json!({"ttlSecondsAfterFinished": 0})).await;
    end(&cluster, &blade, "brief-1", 0).await;
    until("the task to go", async || {
        api::<FarTask>(&cluster)
            .get_opt("brief")
            .await
            .unwrap()
            .is_none()
            .then_some(())
    })
    .await;
    cluster.wait_gone("brief-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_a_queue_with_a_pool_take_over_warm_agents() {
    let (cluster, blade) = start(json!({"poolRef": {"name": "p"}, "parallelism": 1})).await;
    apply::<FarAgentPool>(
        &cluster,
        "FarAgentPool",
        "p",
        json!({"templateRef": {"name": "t"}, "replicas": 1}),
    )
    .await;
    until("a warm agent", async || {
        let status = api::<FarAgentPool>(&cluster).get("p").await.unwrap().status?;
        (status.warm == 1).then_some(())
    })
    .await;
    task(&cluster, "warm", json!({"args": ["late"]})).await;
    let uid = on_blade(&cluster, &blade, "warm-1").await;
    assert!(blade.fake.attempts(&uid).is_empty(), "it needed no boot");
    assert_eq!(blade.fake.spec(&uid).unwrap().args, ["late"]);
    end(&cluster, &blade, "warm-1", 0).await;
    wait_task(&cluster, "warm", "to succeed", |status| status["phase"] == "Succeeded").await;
}
