//! An API that conflicts, fails, drops connections and forgets watches: every agent still ends as it did.

mod support;

use far_proto::node::EndReason;
use futures::{StreamExt, TryStreamExt};
use kube::{
    ResourceExt,
    api::{Patch, WatchEvent, WatchParams},
};
use serde_json::json;
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    until,
};

/// What only far-devapi can do: see [`support::server`].
mod embedded {
    use far_devapi::faults::{Action, Fault, Match};

    use super::*;

    fn fault(verb: &str, resource: &str, action: Action, times: u32) -> Fault {
        let on = Match {
            verb: Some(verb.into()),
            resource: Some(resource.into()),
            ..Match::default()
        };
        Fault { on, action, times }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn agents_end_truly_and_boot_once_however_the_api_behaves() {
        let cluster = Cluster::start().await;
        let blade = FakeBlade::start(&cluster, "b1", capacity(64_000, 65_536)).await;
        let answer = |code| Action::Answer {
            code,
            retry_after: None,
        };
        for (verb, action) in [
            ("patch", answer(409)),
            ("patch", answer(500)),
            ("patch", Action::DropAfter),
            ("patch", Action::DropBefore),
            ("patch", Action::DropAfter),
            ("watch", Action::ExpireWatch),
            ("patch", answer(429)),
            ("list", answer(500)),
            ("update", answer(409)),
            ("update", answer(500)),
            ("update", Action::DropAfter),
            ("update", Action::DropBefore),
            ("update", answer(429)),
        ] {
            assert!(cluster.api.faults.add(fault(verb, "faragents", action, 3)));
        }
        assert!(cluster.api.faults.add(fault("create", "events", answer(500), 5)));
        let mut uids = Vec::new();
        for number in 0..12 {
            let spec = json!({"image": "a", "memory": "64Mi", "cpu": "100m"});
            uids.push(cluster.create(&format!("a{number}"), spec).await.uid().unwrap());
        }
        for (number, uid) in uids.iter().enumerate() {
            until("every agent to be on the blade", async || blade.fake.phase(uid)).await;
            blade.fake.running(uid);
            let code = i32::try_from(number % 3).unwrap();
            let reason = if code == 0 {
                EndReason::Completed
            } else {
                EndReason::Error
            };
            blade.fake.ended(uid, reason, Some(code), "");
        }
        for (number, uid) in uids.iter().enumerate() {
            let done = cluster
                .wait(&format!("a{number}"), "to end", |status| status["exitCode"].is_i64())
                .await;
            assert_eq!(done["status"]["exitCode"], number % 3);
            assert_eq!(
                done["status"]["phase"],
                if number % 3 == 0 { "Completed" } else { "Failed" }
            );
            assert_eq!(blade.fake.attempts(uid).len(), 1, "{done}");
        }
        assert_eq!(blade.fake.most_boots(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_blade_hears_of_an_agent_only_once_the_finalizer_holds_it() {
        let cluster = Cluster::start().await;
        let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
        let refusal = Action::Answer {
            code: 500,
            retry_after: None,
        };
        assert!(cluster.api.faults.add(fault("patch", "faragents", refusal, u32::MAX)));
        let free = cluster.create("free", json!({"image": "a"})).await.uid().unwrap();
        let placed = cluster.wait_phase("free", "Scheduled").await;
        assert_eq!(
            (&placed["status"]["nodeName"], &placed["metadata"]["finalizers"]),
            (&json!("b1"), &json!(null))
        );
        cluster.delete("free").await;
        cluster.wait_gone("free").await;
        cluster.create("held", json!({"image": "a", "cpu": "4"})).await;
        let held = cluster.wait_phase("held", "Scheduled").await;
        let held = held["metadata"]["uid"].as_str().unwrap();
        let drain = async |policy| {
            let patch = Patch::Merge(json!({"spec": {"drain": policy}}));
            cluster.nodes().patch("b1", &Default::default(), &patch).await.unwrap();
        };
        drain(json!({"policy": "Evict"})).await;
        cluster.wait_phase("held", "Pending").await;
        drain(json!(null)).await;
        cluster.wait_phase("held", "Scheduled").await;
        cluster.api.faults.clear();
        until("the blade to have what is held", async || blade.fake.phase(held)).await;
        let attempts = blade.fake.attempts(held);
        assert_eq!(attempts, [2], "no blade heard of the one that was taken back");
        assert_eq!(
            blade.fake.attempts(&free),
            [0_u32; 0],
            "its room is free, and no blade heard of it"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_costs_five_writes_at_most_besides_its_creation() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let created = cluster.create("counted", json!({"image": "a"})).await;
    let uid = created.uid().unwrap();
    let params = WatchParams::default().fields("metadata.name=counted");
    let version = created.resource_version().unwrap();
    let watch = cluster.agents().watch(&params, &version).await.unwrap();
    cluster.wait_phase("counted", "Starting").await;
    blade.fake.running(&uid);
    cluster.wait_phase("counted", "Running").await;
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    let writes = watch
        .try_filter_map(|event| async move {
            Ok(match event {
                WatchEvent::Modified(agent) => Some(agent),
                WatchEvent::Added(_) | WatchEvent::Deleted(_) | WatchEvent::Bookmark(_) | WatchEvent::Error(_) => None,
            })
        })
        .map(|agent| agent.unwrap())
        .scan(false, |done, agent| {
            let seen = (!*done).then(|| agent.clone());
            *done = agent.status.is_some_and(|status| status.exit_code.is_some());
            async move { seen }
        })
        .take_while(|agent| {
            let last = agent.status.as_ref().is_some_and(|status| status.exit_code.is_some());
            async move { !last }
        })
        .count();
    // The last one ended the count and is not in it.
    let writes = tokio::time::timeout(support::PATIENCE, Box::pin(writes)).await.unwrap() + 1;
    assert!((3..=5).contains(&writes), "{writes} writes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_used_again_is_another_agent() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let first = cluster.create("name", json!({"image": "a"})).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&first)).await;
    blade.fake.ended(&first, EndReason::Error, Some(3), "");
    cluster.wait_phase("name", "Failed").await;
    cluster.delete("name").await;
    cluster.wait_gone("name").await;
    let second = cluster.create("name", json!({"image": "a"})).await.uid().unwrap();
    assert_ne!(first, second);
    until("the blade to have the second", async || blade.fake.phase(&second)).await;
    blade.fake.ended(&second, EndReason::Completed, Some(0), "");
    let done = cluster.wait_phase("name", "Completed").await;
    assert_eq!(
        (&done["status"]["exitCode"], &done["status"]["attempt"]),
        (&json!(0), &json!(1))
    );
    assert_eq!(blade.fake.phase(&first), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_api_refuses_what_the_rules_refuse() {
    let cluster = Cluster::start().await;
    cluster.create("fixed", json!({"image": "a", "args": ["1"]})).await;
    let change = json!({"spec": {"args": ["2"]}});
    let patch = kube::api::Patch::Merge(change);
    let error = cluster
        .agents()
        .patch("fixed", &Default::default(), &patch)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("spec.args is immutable"), "{error}");
    let agent = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": "bad"}, "spec": {"image": "a", "memory": "lots"}});
    let error = cluster
        .agents()
        .create(&Default::default(), &serde_json::from_value(agent).unwrap())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("spec.memory"), "{error}");
    assert!(cluster.agents().get_opt("bad").await.unwrap().is_none());
}
