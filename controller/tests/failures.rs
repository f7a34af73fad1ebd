//! What happens when something dies: controllers, blades, connections. One attempt boots at most once, nothing is lost.

mod support;

use std::{sync::atomic::Ordering, time::Duration};

use far_proto::node::{EndReason, Phase};
use kube::ResourceExt;
use serde_json::json;
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    until,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_controller_goes_on_where_it_was_and_boots_nothing_twice() {
    let mut cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let mut uids = Vec::new();
    for number in 0..6 {
        uids.push(
            cluster
                .create(
                    &format!("a{number}"),
                    json!({"image": "a", "memory": "128Mi", "cpu": "100m"}),
                )
                .await
                .uid()
                .unwrap(),
        );
    }
    until("one to be there", async || blade.fake.phase(&uids[0])).await;
    let first_epoch = cluster.epoch;
    cluster.kill_controller().await;
    // The blade goes on while nobody looks.
    let begun = uids
        .iter()
        .filter(|uid| blade.fake.phase(uid).is_some())
        .cloned()
        .collect::<Vec<_>>();
    blade.fake.running(&begun[0]);
    blade
        .fake
        .ended(&begun[0], EndReason::Error, Some(3), "while nobody looked");
    cluster.start_controller(|_| {}).await;
    assert!(cluster.epoch > first_epoch, "every controller has an epoch of its own");

    for (number, uid) in uids.iter().enumerate() {
        until("every agent to be on the blade", async || blade.fake.phase(uid)).await;
        blade.fake.ended(uid, EndReason::Completed, Some(0), "");
        let name = format!("a{number}");
        let done = cluster
            .wait(&name, "to end", |status| status["exitCode"].is_i64())
            .await;
        assert_eq!(done["status"]["attempt"], 1);
        let code = if *uid == begun[0] { 3 } else { 0 };
        assert_eq!(done["status"]["exitCode"], code, "{done}");
        assert_eq!(blade.fake.attempts(uid), [1]);
    }
    assert_eq!(blade.fake.most_boots(), 1);
    assert_eq!(blade.fake.epoch(), cluster.epoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_deleted_while_no_controller_runs_is_stopped_by_the_next() {
    let mut cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let uid = cluster.create("doomed", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    cluster.kill_controller().await;
    cluster.delete("doomed").await;
    assert!(
        cluster.agents().get_opt("doomed").await.unwrap().is_some(),
        "the finalizer keeps it"
    );
    cluster.start_controller(|_| {}).await;
    cluster.wait_gone("doomed").await;
    assert_eq!(blade.fake.phase(&uid), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_of_a_lost_blade_are_unknown_and_known_again_when_it_is_back() {
    let cluster = Cluster::start_with(|config| config.node_lost_after = Duration::from_secs(2)).await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let uid = cluster.create("away", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.fake.running(&uid);
    cluster.wait_phase("away", "Running").await;
    let (credentials, fake) = blade.die().await;
    cluster.wait_ready("b1", "Unknown").await;
    let lost = cluster.wait_phase("away", "Unknown").await;
    assert_eq!(
        (&lost["status"]["nodeName"], &lost["status"]["attempt"]),
        (&json!("b1"), &json!(1)),
        "nothing is started elsewhere"
    );
    let back = FakeBlade::resume(&cluster, "b1", capacity(8000, 8192), credentials, fake).await;
    cluster.wait_phase("away", "Running").await;
    assert_eq!(back.fake.most_boots(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_writes_about_a_blade_that_is_heard_of_is_put_right() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    cluster.wait_ready("b1", "True").await;
    // As a controller does that slept through the end of its lease.
    let node = cluster.nodes().get("b1").await.unwrap();
    let mut conditions = serde_json::to_value(node.status.unwrap().conditions).unwrap();
    conditions[0]["status"] = json!("Unknown");
    for status in [json!({ "conditions": conditions }), json!({"endpoint": "127.0.0.1:1"})] {
        let patch = kube::api::Patch::Merge(json!({ "status": status }));
        let nodes = cluster.nodes();
        nodes.patch_status("b1", &Default::default(), &patch).await.unwrap();
    }
    cluster.wait_ready("b1", "True").await;
    let uid = cluster.create("works", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_on_a_blade_that_never_comes_back_is_released_after_the_fence_time_only() {
    let cluster = Cluster::start_with(|config| {
        config.node_lost_after = Duration::from_secs(1);
        config.fence_after = Duration::from_secs(4);
    })
    .await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let uid = cluster.create("orphan", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    let (credentials, fake) = blade.die().await;
    cluster.delete("orphan").await;
    cluster.wait_ready("b1", "Unknown").await;
    assert!(
        cluster.agents().get_opt("orphan").await.unwrap().is_some(),
        "a lost blade alone releases nothing"
    );
    cluster.wait_gone("orphan").await;
    let events = cluster.events("orphan").await;
    assert!(events.contains(&"ReleasedUnconfirmed".to_owned()), "{events:?}");

    // The blade was only away: what it still runs has no agent any more, and is ended.
    let back = FakeBlade::resume(&cluster, "b1", capacity(8000, 8192), credentials, fake).await;
    until("the orphan to be ended", async || {
        matches!(back.fake.phase(&uid), None | Some(Phase::Ended)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_event_stream_is_opened_again_and_nothing_is_missed() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let uid = cluster.create("heard", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    let (credentials, fake) = blade.die().await;
    fake.running(&uid);
    fake.ended(&uid, EndReason::Completed, Some(0), "");
    let _back = FakeBlade::resume(&cluster, "b1", capacity(8000, 8192), credentials, fake).await;
    cluster.wait_phase("heard", "Completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_ends_gives_the_lead_back_and_a_second_one_waits_for_it() {
    let mut cluster = Cluster::start().await;
    let epoch = cluster.epoch;
    let mut second = cluster.config();
    second.state_dir = cluster.dir.path().join("second");
    second.listen = "127.0.0.1:0".parse().unwrap();
    let shutdown = tokio_util::sync::CancellationToken::new();
    let second = tokio::spawn(far_controller::start(second, shutdown.clone()));
    let leases: kube::Api<k8s_openapi::api::coordination::v1::Lease> =
        kube::Api::namespaced(cluster.client.clone(), "far-system");
    let holder = leases
        .get("far-controller")
        .await
        .unwrap()
        .spec
        .unwrap()
        .holder_identity;
    assert!(!second.is_finished() && holder.is_some());
    cluster.stop_controller().await;
    let second = tokio::time::timeout(support::PATIENCE, second)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(second.epoch > epoch);
    shutdown.cancel();
    second.wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_is_never_used_again_even_when_the_api_lost_the_lease() {
    let mut cluster = Cluster::start().await;
    cluster.kill_controller().await;
    cluster.start_controller(|_| {}).await;
    let epoch = cluster.epoch;
    cluster.kill_controller().await;
    let leases: kube::Api<k8s_openapi::api::coordination::v1::Lease> =
        kube::Api::namespaced(cluster.client.clone(), "far-system");
    leases.delete("far-controller", &Default::default()).await.unwrap();
    cluster.start_controller(|_| {}).await;
    assert!(cluster.epoch > epoch, "{} after {epoch}", cluster.epoch);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_controllers_never_share_a_state_folder() {
    let cluster = Cluster::start().await;
    let error = far_controller::start(cluster.config(), Default::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("another far-controller uses"), "{error:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_came_after_the_ledger_was_written_starts_no_second_attempt() {
    let cluster = Cluster::start().await;
    let one = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let two = FakeBlade::start(&cluster, "b2", capacity(8000, 8192)).await;
    for blade in [&one, &two] {
        blade.fake.breaks_after_writing.store(true, Ordering::SeqCst);
    }
    let uid = cluster.create("once", json!({"image": "a"})).await.uid().unwrap();
    let begun = cluster.wait_phase("once", "Starting").await;
    assert_eq!(begun["status"]["attempt"], 1, "{begun}");
    let attempts = [one.fake.attempts(&uid), two.fake.attempts(&uid)].concat();
    assert_eq!(attempts, [1], "one agent, one attempt");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_attempt_is_powerless_before_the_next_one_is_placed() {
    let cluster = Cluster::start().await;
    let full = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    full.fake.full.store(true, Ordering::SeqCst);
    let uid = cluster.create("moved", json!({"image": "a"})).await.uid().unwrap();
    until("the refusal", async || (full.fake.ensured() > 0).then_some(())).await;
    let free = FakeBlade::start(&cluster, "b2", capacity(8000, 8192)).await;
    until("the other blade to have it", async || free.fake.phase(&uid)).await;
    full.fake.full.store(false, Ordering::SeqCst);
    assert_eq!(full.fake.late_ensure(&uid, 1).await, Phase::Ended);
    assert_eq!(full.fake.attempts(&uid), Vec::<u32>::new(), "nothing boots there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_sends_heartbeats_but_cannot_be_called_is_lost_and_gets_no_agents() {
    let cluster = Cluster::start_with(|config| {
        config.node_lost_after = Duration::from_secs(2);
        config.fence_after = Duration::from_secs(2);
    })
    .await;
    let mut blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let uid = cluster.create("stuck", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.stop_serving().await;
    cluster.wait_phase("stuck", "Unknown").await;
    cluster.create("waits", json!({"image": "a"})).await;
    cluster
        .wait("waits", "to be told why", |status| {
            status["message"]
                .as_str()
                .is_some_and(|text| text.contains("not reachable"))
        })
        .await;
    cluster.delete("stuck").await;
    cluster.wait_gone("stuck").await;
    let events = cluster.events("stuck").await;
    assert!(events.contains(&"ReleasedUnconfirmed".to_owned()), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_lost_its_finalizer_is_ended_and_forgotten_while_its_blade_stays_connected() {
    let cluster = Cluster::start_with(|config| config.sweep_every = Duration::from_millis(300)).await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let uid = cluster.create("freed", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.fake.running(&uid);
    cluster.wait_phase("freed", "Running").await;
    // As an impatient person does it: without the finalizer nobody waits for the blade.
    cluster.take_finalizers_off("freed").await;
    cluster.delete("freed").await;
    cluster.wait_gone("freed").await;
    until("its attempt to be ended and forgotten", async || {
        (blade.fake.kept() == 0).then_some(())
    })
    .await;
    assert_eq!(blade.fake.attempts(&uid), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_blade_keeps_of_a_refused_attempt_is_forgotten_and_the_agent_runs_on() {
    let cluster = Cluster::start_with(|config| config.sweep_every = Duration::from_millis(300)).await;
    let full = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    full.fake.full.store(true, Ordering::SeqCst);
    let uid = cluster.create("moved", json!({"image": "a"})).await.uid().unwrap();
    until("the mark that makes it powerless", async || {
        (full.fake.kept() > 0).then_some(())
    })
    .await;
    let free = FakeBlade::start(&cluster, "b2", capacity(8000, 8192)).await;
    until("the other blade to have it", async || free.fake.phase(&uid)).await;
    free.fake.running(&uid);
    until("the mark to be forgotten", async || {
        (full.fake.kept() == 0).then_some(())
    })
    .await;
    cluster.wait_phase("moved", "Running").await;
    assert_eq!(free.fake.phase(&uid), Some(Phase::Running));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_blade_that_claims_to_know_a_newer_controller_ends_nothing() {
    let cluster = Cluster::start().await;
    let liar = FakeBlade::start(&cluster, "b1", capacity(8000, 8192)).await;
    let honest = FakeBlade::start(&cluster, "b2", capacity(8000, 8192)).await;
    liar.fake.claims_newer_epoch.store(true, Ordering::SeqCst);
    let held = json!({"image": "a", "nodeName": "b1"});
    cluster.create("held", held).await;
    until("the claim", async || (liar.fake.deposed() > 0).then_some(())).await;
    let uid = cluster
        .create("served", json!({"image": "a", "nodeName": "b2"}))
        .await
        .uid()
        .unwrap();
    until("the honest blade to have it", async || honest.fake.phase(&uid)).await;
    honest.fake.ended(&uid, EndReason::Completed, Some(0), "");
    cluster.wait_phase("served", "Completed").await;
    assert_eq!(honest.fake.epoch(), cluster.epoch, "the same controller leads");
}
