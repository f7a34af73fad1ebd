//! Lives of agents: controller, embedded API and fake blades, everything real between them.

mod support;

use far_proto::node::{EndReason, Phase};
use kube::ResourceExt;
use serde_json::json;
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    until,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_scheduled_runs_and_completes_with_few_writes() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let created = cluster
        .create(
            "good",
            json!({"image": "a", "memory": "512Mi", "cpu": 1, "args": ["x"]}),
        )
        .await;
    let uid = created.uid().unwrap();

    cluster.wait_phase("good", "Starting").await;
    blade.fake.running(&uid);
    let running = cluster.wait_phase("good", "Running").await;
    assert_eq!(running["status"]["nodeName"], "b1");
    assert_eq!(running["status"]["exitCode"], json!(null));
    assert_eq!(running["metadata"]["finalizers"], json!(["tiffany.dev/microvm"]));
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    let done = cluster.wait_phase("good", "Completed").await;

    let status = &done["status"];
    assert_eq!(
        (&status["exitCode"], &status["reason"], &status["attempt"]),
        (&json!(0), &json!("Completed"), &json!(1))
    );
    assert_eq!(
        (&status["imageDigest"], &status["tail"]),
        (&json!("sha256:feed"), &json!("last words"))
    );
    assert_eq!(status["observedGeneration"], done["metadata"]["generation"]);
    let spec = blade.fake.spec(&uid).unwrap();
    assert_eq!(
        (spec.cpu_millis, spec.memory_mib, spec.termination_grace_s),
        (1000, 512, 10)
    );
    assert_eq!(blade.fake.most_boots(), 1);
    assert_eq!(done["spec"]["cpu"], json!(1), "the user's spec is as the user wrote it");
    for reason in ["Scheduled", "Started", "Completed"] {
        until(reason, async || {
            cluster.events("good").await.contains(&reason.to_owned()).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_agent_says_why_and_only_the_code_that_was_reported() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    for (name, reason, code, phase_reason) in [
        ("three", EndReason::Error, Some(3), "Error"),
        ("silent", EndReason::InitLost, None, "InitLost"),
        ("slow", EndReason::BootTimeout, None, "BootTimeout"),
        ("liar", EndReason::Completed, None, "InitLost"),
    ] {
        let uid = cluster
            .create(name, json!({"image": "a", "memory": "64Mi"}))
            .await
            .uid()
            .unwrap();
        until("the blade to have it", async || blade.fake.phase(&uid)).await;
        blade.fake.ended(&uid, reason, code, "because");
        let failed = cluster.wait_phase(name, "Failed").await;
        assert_eq!(failed["status"]["reason"], phase_reason);
        assert_eq!(failed["status"]["exitCode"], json!(code), "{failed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_room_counts_blades_and_is_placed_when_one_appears() {
    let cluster = Cluster::start().await;
    let _small = FakeBlade::start(&cluster, "small", capacity(1000, 256)).await;
    cluster.create("big", json!({"image": "a", "memory": "2Gi"})).await;
    let pending = cluster
        .wait("big", "to be judged", |status| {
            status["conditions"][0]["status"] == "False"
        })
        .await;
    let message = pending["status"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("0/1 blades are available: 1 insufficient memory."),
        "{message}"
    );
    assert!(
        message.contains("spec.memory (2048 MiB) is more than any blade has (256 MiB)."),
        "{message}"
    );
    assert_eq!(pending["status"]["phase"], "Pending");
    assert_eq!(
        pending["metadata"]["finalizers"],
        json!(null),
        "no blade has it: nothing keeps it"
    );

    let _large = FakeBlade::start(&cluster, "large", capacity(4000, 4096)).await;
    let placed = cluster
        .wait("big", "to be placed", |status| status["nodeName"] == "large")
        .await;
    assert_eq!(placed["status"]["attempt"], 1);
    until("an event", async || {
        cluster
            .events("big")
            .await
            .contains(&"FailedScheduling".to_owned())
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn room_of_a_finished_agent_is_given_to_the_next() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(1000, 512)).await;
    let first = cluster.create("first", json!({"image": "a"})).await.uid().unwrap();
    cluster
        .wait("first", "to be placed", |status| status["nodeName"] == "b1")
        .await;
    cluster.create("second", json!({"image": "a"})).await;
    cluster
        .wait("second", "to wait", |status| status["reason"] == "Unschedulable")
        .await;
    until("the blade to have it", async || blade.fake.phase(&first)).await;
    blade.fake.ended(&first, EndReason::Completed, Some(0), "");
    cluster
        .wait("second", "to be placed", |status| status["nodeName"] == "b1")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_stops_forgets_and_releases() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let uid = cluster.create("doomed", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.fake.running(&uid);
    cluster.wait_phase("doomed", "Running").await;
    cluster.delete("doomed").await;
    cluster.wait_gone("doomed").await;
    assert_eq!((blade.fake.phase(&uid), blade.fake.forgotten()), (None, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_never_placed_is_deleted_at_once() {
    let cluster = Cluster::start().await;
    cluster.create("waiting", json!({"image": "a"})).await;
    cluster
        .wait("waiting", "to be judged", |status| status["phase"] == "Pending")
        .await;
    cluster.delete("waiting").await;
    cluster.wait_gone("waiting").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_secret_is_named_and_the_agent_starts_when_it_is_there() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let env = json!([{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s1", "key": "k"}}}]);
    let files = json!([{"path": "/task", "configMapRef": {"name": "docs"}}]);
    let uid = cluster
        .create("needy", json!({"image": "a", "env": env, "files": files}))
        .await
        .uid()
        .unwrap();
    let waiting = cluster
        .wait("needy", "to name the secret", |status| {
            status["reason"] == "ReferenceMissing"
        })
        .await;
    let message = waiting["status"]["message"].as_str().unwrap();
    assert_eq!(message, "spec.env[0] (TOKEN): Secret \"s1\" does not exist");
    assert_eq!(waiting["status"]["phase"], "Scheduled");
    assert_eq!(blade.fake.ensured(), 0);

    let create = async |kind: &str, name: &str, field: &str, data: serde_json::Value| {
        let resource = kube::api::ApiResource {
            group: String::new(),
            version: "v1".into(),
            api_version: "v1".into(),
            kind: kind.into(),
            plural: format!("{}s", kind.to_lowercase()),
        };
        let api: kube::Api<kube::api::DynamicObject> =
            kube::Api::namespaced_with(cluster.client.clone(), "default", &resource);
        let mut object = kube::api::DynamicObject::new(name, &resource);
        object.data[field] = data;
        api.create(&Default::default(), &object).await.unwrap();
    };
    create("Secret", "s1", "stringData", json!({"k": "hush"})).await;
    create("ConfigMap", "docs", "data", json!({"b.md": "two", "a.md": "one"})).await;
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    let spec = blade.fake.spec(&uid).unwrap();
    assert!(spec.env[0].secret && spec.env[0].value == "hush");
    let files: Vec<_> = spec
        .files
        .iter()
        .map(|file| (file.path.as_str(), file.mode, file.secret))
        .collect();
    assert_eq!(files, [("/task/a.md", 0o444, false), ("/task/b.md", 0o444, false)]);
    let everything = serde_json::to_string(&cluster.agents().get("needy").await.unwrap()).unwrap();
    assert!(!everything.contains("hush"), "a secret's value reached the status");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_blade_is_a_soft_refusal_and_the_next_one_gets_another_attempt() {
    let cluster = Cluster::start().await;
    let full = FakeBlade::start(&cluster, "full", capacity(64_000, 65_536)).await;
    full.fake.full.store(true, std::sync::atomic::Ordering::SeqCst);
    let uid = cluster.create("tried", json!({"image": "a"})).await.uid().unwrap();
    until("a refusal", async || {
        cluster
            .events("tried")
            .await
            .contains(&"Refused".to_owned())
            .then_some(())
    })
    .await;
    let free = FakeBlade::start(&cluster, "free", capacity(4000, 4096)).await;
    let placed = cluster
        .wait("tried", "to be placed", |status| status["nodeName"] == "free")
        .await;
    assert!(placed["status"]["attempt"].as_u64().unwrap() >= 2, "{placed}");
    until("the other blade to have it", async || free.fake.phase(&uid)).await;
    // The full one keeps a mark that a late order cannot boot the first attempt, and nothing else.
    assert_eq!((full.fake.phase(&uid), full.fake.most_boots()), (Some(Phase::Ended), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_blade_rejects_is_failed_with_its_words() {
    let cluster = Cluster::start().await;
    let _blade = FakeBlade::start(&cluster, "b1", capacity(128_000, 4096)).await;
    cluster.create("huge", json!({"image": "a", "cpu": 100})).await;
    let failed = cluster.wait_phase("huge", "Failed").await;
    assert_eq!(failed["status"]["reason"], "Error");
    assert!(
        failed["status"]["message"]
            .as_str()
            .unwrap()
            .contains("spec.cpu: more than 64 cores"),
        "{failed}"
    );
    assert_eq!(failed["status"]["exitCode"], json!(null));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_lost_its_ledger_does_not_boot_the_attempt_again() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let uid = cluster.create("once", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.fake.running(&uid);
    cluster.wait_phase("once", "Running").await;
    let (credentials, fake) = blade.die().await;
    fake.lose_ledger();
    let again = FakeBlade::resume(&cluster, "b1", capacity(4000, 4096), credentials, fake).await;
    let failed = cluster.wait_phase("once", "Failed").await;
    assert_eq!(
        (&failed["status"]["reason"], &failed["status"]["exitCode"]),
        (&json!("NodeLost"), &json!(null))
    );
    assert_eq!((again.fake.phase(&uid), again.fake.attempts(&uid)), (None, vec![1]));
    assert_ne!(again.fake.phase(&uid), Some(Phase::Accepted));
}
