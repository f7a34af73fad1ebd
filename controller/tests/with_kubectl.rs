//! What users see through the real kubectl, and what Kubernetes does with our objects by itself: on far-devapi and on a real
//! kube-apiserver alike.
#![allow(clippy::unwrap_used)] // A panic in a test's helper is the report.

mod support;

use std::{path::PathBuf, process::Stdio};

use far_proto::node::EndReason;
use far_testkit::{find, servers, servers::Part, skip};
use kube::ResourceExt;
use serde_json::json;
use support::{
    Cluster, PATIENCE,
    blade::{FakeBlade, capacity},
    until, until_within,
};
use tokio::process::Command;

/// The real server's own, else the machine's; `None` with a skip by name.
fn kubectl(test: &str) -> Option<PathBuf> {
    let found = if servers::are_asked_for() {
        servers::programs().map(|folder| folder.join("kubectl"))
    } else {
        find::kubectl()
    };
    found.map_err(|missing| skip(test, &missing)).ok()
}

struct Shell<'a> {
    kubectl: PathBuf,
    cluster: &'a Cluster,
}

impl Shell<'_> {
    /// Output of a kubectl that must succeed.
    async fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new(&self.kubectl)
            .args(arguments)
            .env("KUBECONFIG", self.cluster.dir.path().join("kubeconfig"))
            .env("HOME", self.cluster.dir.path())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(5 * PATIENCE, output).await.unwrap().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The words of each line.
    async fn table(&self, arguments: &[&str]) -> Vec<Vec<String>> {
        let text = self.run(arguments).await;
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
        text.lines().map(words).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_shows_what_the_readme_promises() {
    let Some(kubectl) = kubectl("kubectl_shows_what_the_readme_promises") else {
        return;
    };
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let shell = Shell {
        kubectl,
        cluster: &cluster,
    };
    let example = find::repository().join("examples/embedder.yaml");
    let applied = shell.run(&["apply", "-f", example.to_str().unwrap()]).await;
    assert_eq!(applied, "faragent.tiffany.dev/embedder-worker-01 created\n");
    let agent = cluster.agents().get("embedder-worker-01").await.unwrap();
    let uid = agent.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.fake.running(&uid);
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    let waited = shell
        .run(&[
            "wait",
            "--for=jsonpath={.status.phase}=Completed",
            "fa/embedder-worker-01",
            "--timeout=60s",
        ])
        .await;
    assert_eq!(waited, "faragent.tiffany.dev/embedder-worker-01 condition met\n");
    let by_condition = shell
        .run(&[
            "wait",
            "--for=condition=Completed",
            "fa/embedder-worker-01",
            "--timeout=60s",
        ])
        .await;
    assert_eq!(by_condition, waited);

    let short = shell.table(&["get", "fa"]).await;
    assert_eq!(short[0], ["NAME", "PHASE", "BLADE", "EXIT", "RESTARTS", "AGE"]);
    assert_eq!(short[1][..5], ["embedder-worker-01", "Completed", "b1", "0", "0"]);
    let wide = shell.table(&["get", "fa", "-o", "wide"]).await;
    assert!(
        wide[0].contains(&"IMAGE".to_owned()) && wide[0].contains(&"REASON".to_owned()),
        "{wide:?}"
    );
    assert!(
        wide[1].contains(&"ghcr.io/microscaler/tiffany-vm:v0.3.1".to_owned()),
        "{wide:?}"
    );
    for selector in ["status.phase=Completed", "status.nodeName=b1"] {
        let found = shell
            .run(&["get", "fa", "--field-selector", selector, "-o", "name"])
            .await;
        assert_eq!(found, "faragent.tiffany.dev/embedder-worker-01\n", "{selector}");
    }
    let by_category = shell.run(&["get", "tiffany", "-o", "name"]).await;
    assert!(
        by_category.contains("faragent.tiffany.dev/embedder-worker-01"),
        "{by_category}"
    );
    let described = shell.run(&["describe", "fa", "embedder-worker-01"]).await;
    for line in ["Exit Code:", "Node Name:", "Reason:", "Scheduled", "Tail:"] {
        assert!(described.contains(line), "no {line} in:\n{described}");
    }
    let explained = shell.run(&["explain", "faragent.spec.memory"]).await;
    assert!(
        explained.contains("KIND:       FarAgent") && explained.contains("DESCRIPTION:"),
        "{explained}"
    );
    let deleted = shell
        .run(&["delete", "fa", "embedder-worker-01", "--timeout=60s"])
        .await;
    assert!(
        deleted.starts_with("faragent.tiffany.dev \"embedder-worker-01\" deleted"),
        "{deleted}"
    );
    assert_eq!(
        blade.fake.phase(&uid),
        None,
        "kubectl waited for the blade to forget it"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_applies_and_the_controller_do_not_fight() {
    let Some(kubectl) = kubectl("a_user_who_applies_and_the_controller_do_not_fight") else {
        return;
    };
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let shell = Shell {
        kubectl,
        cluster: &cluster,
    };
    let example = find::repository().join("examples/embedder.yaml");
    let apply = ["apply", "--server-side", "-f", example.to_str().unwrap()];
    shell.run(&apply).await;
    let uid = cluster.agents().get("embedder-worker-01").await.unwrap().uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.fake.running(&uid);
    let running = cluster.wait_phase("embedder-worker-01", "Running").await;
    shell.run(&apply).await;
    let after = cluster.agents().get("embedder-worker-01").await.unwrap();
    let after = serde_json::to_value(after).unwrap();
    assert_eq!(after["status"]["phase"], "Running");
    assert_eq!(after["metadata"]["finalizers"], running["metadata"]["finalizers"]);
    assert_eq!(after["metadata"]["generation"], 1);
    for entry in after["metadata"]["managedFields"].as_array().unwrap() {
        let owns_spec = entry["fieldsV1"].get("f:spec").is_some();
        assert_eq!(
            owns_spec,
            entry["manager"] == "kubectl",
            "the spec is its user's: {entry}"
        );
    }
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    cluster.wait_phase("embedder-worker-01", "Completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_owns_an_agent_and_its_namespace_take_it_along_and_the_blade_stops_it() {
    let Some(kubectl) = kubectl("what_owns_an_agent_and_its_namespace_take_it_along_and_the_blade_stops_it") else {
        return;
    };
    let cluster = Cluster::start_beside(&[Part::ControllerManager]).await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let shell = Shell {
        kubectl,
        cluster: &cluster,
    };
    shell.run(&["create", "namespace", "team"]).await;
    shell.run(&["create", "configmap", "owner", "-n", "team"]).await;
    let owner = shell
        .run(&[
            "get",
            "configmap",
            "owner",
            "-n",
            "team",
            "-o",
            "jsonpath={.metadata.uid}",
        ])
        .await;
    let agents: kube::Api<far_api::FarAgent> = kube::Api::namespaced(cluster.client.clone(), "team");
    let create = async |name: &str, owners: serde_json::Value| {
        let agent = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "spec": {"image": "a"},
            "metadata": {"name": name, "ownerReferences": owners}});
        let made = agents
            .create(&Default::default(), &serde_json::from_value(agent).unwrap())
            .await;
        made.unwrap().uid().unwrap()
    };
    let owned = create(
        "owned",
        json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner}]),
    )
    .await;
    let other = create("other", json!(null)).await;
    for uid in [&owned, &other] {
        until("the blade to have it", async || blade.fake.phase(uid)).await;
        blade.fake.running(uid);
    }
    shell.run(&["delete", "configmap", "owner", "-n", "team"]).await;
    // The garbage collector looks for new kinds every 30 s, and begins anew where one was not served yet.
    until_within(4 * PATIENCE, "the owned agent to be gone", async || {
        agents.get_opt("owned").await.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(blade.fake.phase(&owned), None);
    assert!(blade.fake.phase(&other).is_some());
    shell.run(&["delete", "namespace", "team", "--timeout=360s"]).await;
    assert_eq!(blade.fake.phase(&other), None, "the namespace waited for the blade");
}
