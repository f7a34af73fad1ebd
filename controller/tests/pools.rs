//! Pools of warm agents and those who take them over: controller, API and fake blades, everything real between them.
#![allow(clippy::unwrap_used)] // A panic in a test's helper is the report.

mod support;

use std::{sync::atomic::Ordering, time::Duration};

use far_api::{FarAgentPool, FarAgentTemplate};
use far_proto::node::EndReason;
use kube::{Api, ResourceExt, api::Patch};
use serde_json::{Value, json};
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    until,
};

fn templates(cluster: &Cluster) -> Api<FarAgentTemplate> {
    Api::namespaced(cluster.client.clone(), "default")
}

fn pools(cluster: &Cluster) -> Api<FarAgentPool> {
    Api::namespaced(cluster.client.clone(), "default")
}

async fn template(cluster: &Cluster, image: &str) {
    template_named(cluster, "t", image).await;
}

async fn template_named(cluster: &Cluster, name: &str, image: &str) {
    let template = json!({
        "apiVersion": "tiffany.dev/v1alpha1", "kind": "FarAgentTemplate", "metadata": {"name": name},
        "spec": {"template": {"metadata": {"labels": {"app": "x"}}, "spec": {"image": image, "memory": "128Mi", "cpu": "100m"}}},
    });
    let params = kube::api::PatchParams::apply("test").force();
    templates(cluster)
        .patch(name, &params, &Patch::Apply(&template))
        .await
        .unwrap();
}

async fn pool(cluster: &Cluster, spec: Value) {
    let mut spec = spec;
    if spec["templateRef"].is_null() {
        spec["templateRef"] = json!({"name": "t"});
    }
    let pool = json!({
        "apiVersion": "tiffany.dev/v1alpha1", "kind": "FarAgentPool", "metadata": {"name": "p"}, "spec": spec,
    });
    let params = kube::api::PatchParams::apply("test").force();
    pools(cluster).patch("p", &params, &Patch::Apply(&pool)).await.unwrap();
}

/// Waits until the pool's status is as `is` says.
async fn wait_pool(cluster: &Cluster, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    until(what, async || {
        let pool = pools(cluster).get_opt("p").await.unwrap()?;
        let status = serde_json::to_value(pool.status).unwrap();
        is(&status).then_some(status)
    })
    .await
}

async fn wait_warm(cluster: &Cluster, count: u32) -> Value {
    wait_pool(cluster, &format!("{count} warm agents"), |status| {
        status["warm"] == count && status["replicas"] == count
    })
    .await
}

/// Names of the agents that the pool keeps.
async fn kept(cluster: &Cluster) -> Vec<String> {
    let params = kube::api::ListParams::default().labels("tiffany.dev/pool=p");
    let list = cluster.agents().list(&params).await.unwrap();
    list.items.iter().map(ResourceExt::name_any).collect()
}

fn claimant(args: &str) -> Value {
    json!({"image": "a", "memory": "128Mi", "cpu": "100m", "poolRef": {"name": "p"}, "args": [args],
        "env": [{"name": "WHO", "value": args}]})
}

async fn warm_blade(cluster: &Cluster, name: &str) -> FakeBlade {
    let blade = FakeBlade::start(cluster, name, capacity(4000, 4096)).await;
    blade.fake.warms.store(true, Ordering::SeqCst);
    blade
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_takes_over_a_warm_one_and_the_pool_makes_another() {
    let cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 2})).await;
    let status = wait_warm(&cluster, 2).await;
    assert_eq!(
        (&status["wanted"], &status["selector"]),
        (&json!(2), &json!("tiffany.dev/pool=p"))
    );
    let before = kept(&cluster).await;

    let created = cluster.create("mine", claimant("hello")).await;
    let uid = created.uid().unwrap();
    let placed = cluster
        .wait("mine", "to have claimed", |status| {
            !status["claimed"].is_null() && status["phase"] == "Starting"
        })
        .await;
    let warm = placed["status"]["claimed"]["name"].as_str().unwrap().to_owned();
    assert!(before.contains(&warm));
    let spec = blade.fake.spec(&uid).unwrap();
    assert_eq!((spec.args[0].as_str(), spec.env[0].value.as_str()), ("hello", "hello"));
    blade.fake.running(&uid);
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    cluster.wait_phase("mine", "Completed").await;
    // No boot of its own, the warm one is gone, and there are two warm ones again.
    assert!(blade.fake.attempts(&uid).is_empty());
    cluster.wait_gone(&warm).await;
    let status = wait_pool(&cluster, "the claim to be counted", |status| {
        status["claimed"] == 1 && status["warm"] == 2
    })
    .await;
    assert!(!status["lastClaimAt"].is_null());
    assert_eq!((blade.fake.claims(), blade.fake.most_boots()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_claimants_each_gets_a_warm_agent_of_its_own_or_boots() {
    let cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 3})).await;
    wait_warm(&cluster, 3).await;
    let mut uids = Vec::new();
    for n in 0..8 {
        let agent = cluster.create(&format!("c{n}"), claimant(&format!("c{n}"))).await;
        uids.push(agent.uid().unwrap());
    }
    let mut taken = std::collections::BTreeSet::new();
    for (n, uid) in uids.iter().enumerate() {
        let agent = cluster.wait_phase(&format!("c{n}"), "Starting").await;
        let claimed = &agent["status"]["claimed"];
        assert_eq!(blade.fake.attempts(uid).is_empty(), !claimed.is_null(), "{agent}");
        if !claimed.is_null() {
            assert!(
                taken.insert(claimed["uid"].to_string()),
                "one warm agent was handed out twice"
            );
        }
    }
    assert!(taken.len() >= 3);
    assert_eq!(
        (blade.fake.claims() as usize, blade.fake.most_boots()),
        (taken.len(), 1)
    );
    wait_warm(&cluster, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_does_not_fit_boots_and_an_event_says_so() {
    let cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 1})).await;
    wait_warm(&cluster, 1).await;
    let mut other = claimant("x");
    other["memory"] = json!("256Mi");
    let uid = cluster.create("other", other).await.uid().unwrap();
    cluster.wait_phase("other", "Starting").await;
    assert_eq!(blade.fake.attempts(&uid), [1]);
    until("ColdStart", async || {
        cluster
            .events("other")
            .await
            .contains(&"ColdStart".to_owned())
            .then_some(())
    })
    .await;
    assert_eq!(blade.fake.claims(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_killed_between_intent_and_claim_claims_the_same_agent() {
    let mut cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 1})).await;
    wait_warm(&cluster, 1).await;
    blade.fake.fails_claims.store(true, Ordering::SeqCst);
    let uid = cluster.create("mine", claimant("x")).await.uid().unwrap();
    let placed = cluster
        .wait("mine", "to intend a claim", |status| !status["claimed"].is_null())
        .await;
    cluster.kill_controller().await;
    blade.fake.fails_claims.store(false, Ordering::SeqCst);
    cluster.start_controller(|_| {}).await;
    let agent = cluster.wait_phase("mine", "Starting").await;
    assert_eq!(agent["status"]["claimed"], placed["status"]["claimed"]);
    assert_eq!(agent["status"]["attempt"], 1);
    assert!(blade.fake.attempts(&uid).is_empty());
    assert_eq!(blade.fake.claims(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_answer_was_lost_is_done_once() {
    let cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 1})).await;
    wait_warm(&cluster, 1).await;
    blade.fake.breaks_after_writing.store(true, Ordering::SeqCst);
    let uid = cluster.create("mine", claimant("x")).await.uid().unwrap();
    let agent = cluster.wait_phase("mine", "Starting").await;
    blade.fake.breaks_after_writing.store(false, Ordering::SeqCst);
    assert_eq!(agent["status"]["attempt"], 1);
    assert!(blade.fake.attempts(&uid).is_empty());
    assert_eq!(blade.fake.claims(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_agent_that_is_gone_at_the_claim_costs_an_attempt_and_no_agent() {
    let cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 1})).await;
    wait_warm(&cluster, 1).await;
    blade.fake.loses_claims.store(true, Ordering::SeqCst);
    let uid = cluster.create("mine", claimant("x")).await.uid().unwrap();
    let agent = cluster
        .wait("mine", "to boot", |status| {
            status["phase"] == "Starting" && status["claimed"].is_null()
        })
        .await;
    assert_eq!(agent["status"]["attempt"], blade.fake.attempts(&uid)[0]);
    assert_eq!((blade.fake.claims(), blade.fake.most_boots()), (0, 1));
    wait_warm(&cluster, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_agents_of_a_lost_blade_are_replaced_elsewhere() {
    let short = |config: &mut far_controller::Config| config.node_lost_after = Duration::from_secs(2);
    let cluster = Cluster::start_with(short).await;
    let lost = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 2})).await;
    wait_warm(&cluster, 2).await;
    let first = warm_blade(&cluster, "b2").await;
    drop(lost.die().await);
    until("the replacement", async || (first.fake.kept() >= 2).then_some(())).await;
    wait_warm(&cluster, 2).await;
    let uid = cluster.create("mine", claimant("x")).await.uid().unwrap();
    let agent = cluster.wait_phase("mine", "Starting").await;
    assert_eq!(agent["status"]["nodeName"], "b2");
    assert!(first.fake.attempts(&uid).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn scaling_down_and_deleting_a_pool_leaves_claimants_alone() {
    let cluster = Cluster::start_beside(&[far_testkit::servers::Part::ControllerManager]).await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 3})).await;
    wait_warm(&cluster, 3).await;
    let uid = cluster.create("mine", claimant("x")).await.uid().unwrap();
    cluster.wait_phase("mine", "Starting").await;
    blade.fake.running(&uid);
    let scale = Patch::Merge(json!({"spec": {"replicas": 1}}));
    pools(&cluster)
        .patch_scale("p", &Default::default(), &scale)
        .await
        .unwrap();
    wait_warm(&cluster, 1).await;
    until("the surplus to go", async || {
        (kept(&cluster).await.len() == 1).then_some(())
    })
    .await;
    pools(&cluster).delete("p", &Default::default()).await.unwrap();
    until("the pool's agents to go", async || {
        kept(&cluster).await.is_empty().then_some(())
    })
    .await;
    cluster.wait_phase("mine", "Running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_template_replaces_warm_agents_where_the_pool_says_so() {
    let cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    pool(&cluster, json!({"replicas": 1})).await;
    wait_warm(&cluster, 1).await;
    let old = kept(&cluster).await;
    template_named(&cluster, "t2", "b").await;
    // They stay, and still fit those who ask for the old image.
    pool(&cluster, json!({"replicas": 2, "templateRef": {"name": "t2"}})).await;
    wait_warm(&cluster, 2).await;
    assert!(kept(&cluster).await.contains(&old[0]));
    let replace = json!({"replicas": 2, "templateRef": {"name": "t2"}, "updateStrategy": "Recreate"});
    pool(&cluster, replace).await;
    cluster.wait_gone(&old[0]).await;
    wait_warm(&cluster, 2).await;
    assert_eq!(blade.fake.most_boots(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_follows_demand_and_goes_down_to_none_when_idle() {
    let cluster = Cluster::start().await;
    let blade = warm_blade(&cluster, "b1").await;
    template(&cluster, "a").await;
    let scale = json!({"min": 0, "max": 4, "targetIdle": 1, "scaleToZeroAfterSeconds": 10});
    pool(&cluster, json!({"replicas": 0, "autoscale": scale})).await;
    wait_pool(&cluster, "nothing wanted", |status| status["wanted"] == 0).await;
    let uid = cluster.create("first", claimant("x")).await.uid().unwrap();
    cluster.wait_phase("first", "Starting").await;
    // None was warm; the demand was seen.
    assert_eq!(blade.fake.attempts(&uid), [1]);
    wait_pool(&cluster, "one for the demand and one beyond", |status| {
        status["wanted"] == 2 && status["warm"] == 2
    })
    .await;
    wait_pool(&cluster, "none when idle", |status| {
        status["wanted"] == 0 && status["replicas"] == 0
    })
    .await;
    until("the warm agents to go", async || {
        kept(&cluster).await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_template_and_one_whose_agents_fail_say_so() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    pool(&cluster, json!({"replicas": 1})).await;
    let condition = |status: &Value, kind: &str| -> Value {
        let all = status["conditions"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|one| one["type"] == kind).unwrap_or_default()
    };
    wait_pool(&cluster, "TemplateFound=False", |status| {
        condition(status, "TemplateFound")["status"] == "False"
            && condition(status, "Ready")["reason"] == "TemplateMissing"
    })
    .await;
    template(&cluster, "a").await;
    let name = until("an agent", async || kept(&cluster).await.first().cloned()).await;
    let agent = cluster.wait_phase(&name, "Starting").await;
    let uid = agent["metadata"]["uid"].as_str().unwrap();
    blade
        .fake
        .ended(uid, EndReason::ImageError, None, "spec.image: no such image");
    wait_pool(&cluster, "the failure to be told", |status| {
        let ready = condition(status, "Ready");
        ready["reason"] == "AgentsFail"
            && ready["message"]
                .as_str()
                .is_some_and(|text| text.contains("no such image"))
    })
    .await;
    cluster.wait_gone(&name).await;
}

/// What only far-devapi can do: see [`support::server`].
mod embedded {
    use far_devapi::faults::{Action, Fault, Match};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_claimed_agent_that_could_not_be_removed_goes_all_the_same() {
        let cluster = Cluster::start().await;
        let blade = warm_blade(&cluster, "b1").await;
        template(&cluster, "a").await;
        pool(&cluster, json!({"replicas": 1})).await;
        wait_warm(&cluster, 1).await;
        let warm = kept(&cluster).await.remove(0);
        let on = Match {
            verb: Some("delete".into()),
            resource: Some("faragents".into()),
            ..Match::default()
        };
        let action = Action::Answer {
            code: 500,
            retry_after: None,
        };
        assert!(cluster.api.faults.add(Fault { on, action, times: 1 }));
        let uid = cluster.create("mine", claimant("hello")).await.uid().unwrap();
        until("the blade to have it", async || blade.fake.phase(&uid)).await;
        blade.fake.running(&uid);
        cluster.wait_phase("mine", "Running").await;
        cluster.wait_gone(&warm).await;
        assert_eq!(cluster.api.faults.pending(), []);
        wait_pool(&cluster, "another warm one", |status| {
            status["claimed"] == 1 && status["warm"] == 1
        })
        .await;
    }
}
