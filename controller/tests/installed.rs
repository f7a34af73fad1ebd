//! `deploy/far.yaml` on a real kube-apiserver: it is accepted, and the controller works with exactly the rights that it gives.
#![allow(clippy::unwrap_used)] // A panic in a test's helper is the report.

mod support;

use std::{collections::BTreeSet, path::Path, process::Command};

use far_proto::node::{EndReason, Identity, StatsRequest};
use far_testkit::{find, servers, servers::Part, skip};
use kube::ResourceExt;
use serde_json::{Value, json};
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    server::Server,
    until,
    users::ALL,
};

const USER: &str = "system:serviceaccount:far-system:far-controller";

fn kubectl(server: &Server, arguments: &[&str]) -> String {
    let Server::Real(plane) = server else {
        panic!("these tests start a real one")
    };
    let output = Command::new(&plane.kubectl)
        .arg("--kubeconfig")
        .arg(&plane.kubeconfig)
        .args(arguments)
        .env("HOME", plane.kubeconfig.parent().unwrap())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {arguments:?}: {errors}");
    assert!(!errors.contains("Warning"), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn deploy() -> std::path::PathBuf {
    find::repository().join("deploy")
}

/// One right: verb, API group, resource with subresource; a namespace and a name where it is limited to them.
type Right = (String, String, String, Option<String>, Option<String>);

/// What the roles in `deploy/base/rbac.yaml` give.
fn granted() -> BTreeSet<Right> {
    let text = std::fs::read_to_string(deploy().join("base/rbac.yaml")).unwrap();
    let mut rights = BTreeSet::new();
    for document in text.split("\n---\n") {
        let role: Value = serde_saphyr::from_str(document).unwrap();
        let namespace = role["metadata"]["namespace"].as_str().map(str::to_owned);
        let texts = |value: &Value| -> Vec<String> {
            let all = value.as_array().into_iter().flatten();
            all.map(|one| one.as_str().unwrap().to_owned()).collect()
        };
        for rule in role["rules"].as_array().into_iter().flatten() {
            let names = texts(&rule["resourceNames"]);
            let names = if names.is_empty() {
                vec![None]
            } else {
                names.into_iter().map(Some).collect()
            };
            for verb in texts(&rule["verbs"]) {
                for group in texts(&rule["apiGroups"]) {
                    for resource in texts(&rule["resources"]) {
                        for name in &names {
                            rights.insert((
                                verb.clone(),
                                group.clone(),
                                resource.clone(),
                                namespace.clone(),
                                name.clone(),
                            ));
                        }
                    }
                }
            }
        }
    }
    rights
}

/// What the controller's account asked for, and with which answer.
fn asked(audit_log: &Path) -> Vec<(Right, u64)> {
    let text = std::fs::read_to_string(audit_log).unwrap();
    let entries = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let own = entries.filter(|entry| entry["user"]["username"] == USER && entry["objectRef"].is_object());
    own.map(|entry| {
        let object = &entry["objectRef"];
        let text = |field: &str| object[field].as_str().map(str::to_owned);
        let resource = match text("subresource") {
            Some(subresource) => format!("{}/{subresource}", object["resource"].as_str().unwrap()),
            None => text("resource").unwrap(),
        };
        let verb = entry["verb"].as_str().unwrap().to_owned();
        let right = (
            verb,
            text("apiGroup").unwrap_or_default(),
            resource,
            text("namespace"),
            text("name"),
        );
        (right, entry["responseStatus"]["code"].as_u64().unwrap())
    })
    .collect()
}

/// Servers that stream lists (WatchList) are asked for a watch alone; others, of which this is none, for a list as well.
fn covers(right: &Right, asked: &Right) -> bool {
    let is_streamed = right.0 == "list" && right.1 == far_api::GROUP && asked.0 == "watch";
    let fits = |limit: &Option<String>, value: &Option<String>| limit.is_none() || limit == value;
    (right.0 == asked.0 || is_streamed)
        && (&right.1, &right.2) == (&asked.1, &asked.2)
        && fits(&right.3, &asked.3)
        && fits(&right.4, &asked.4)
}

/// Everything that the controller does with agents of its own.
async fn pools_and_queues(cluster: &Cluster, blade: &FakeBlade) {
    let file = cluster.dir.path().join("own.yaml");
    let text = "
apiVersion: tiffany.dev/v1alpha1
kind: FarAgentTemplate
metadata: {name: t}
spec: {template: {spec: {image: a, memory: 128Mi, cpu: 100m}}}
---
apiVersion: tiffany.dev/v1alpha1
kind: FarAgentPool
metadata: {name: p}
spec: {replicas: 1, templateRef: {name: t}}
---
apiVersion: tiffany.dev/v1alpha1
kind: FarQueue
metadata: {name: q}
spec: {templateRef: {name: t}}
---
apiVersion: tiffany.dev/v1alpha1
kind: FarTask
metadata: {name: brief}
spec: {queueRef: {name: q}, ttlSecondsAfterFinished: 0}
---
apiVersion: tiffany.dev/v1alpha1
kind: FarTask
metadata: {name: taken}
spec: {queueRef: {name: q}}
";
    std::fs::write(&file, text).unwrap();
    cluster
        .create("taken-1", json!({"image": "a", "memory": "900Gi"}))
        .await;
    kubectl(&cluster.api, &["apply", "-f", file.to_str().unwrap()]);
    let uid = until("the task's agent", async || {
        let uid = cluster.agents().get_opt("brief-1").await.unwrap()?.uid()?;
        blade.fake.phase(&uid).map(|_| uid)
    })
    .await;
    blade.fake.running(&uid);
    blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
    let wait = |what: &'static str| kubectl(&cluster.api, &["wait", "--timeout=60s", what, "--for=delete"]);
    wait("fartask/brief");
    let refused = "--for=jsonpath={.status.reason}=NameTaken";
    kubectl(&cluster.api, &["wait", "--timeout=60s", "fartask/taken", refused]);
    let warm = "--for=jsonpath={.status.replicas}=1";
    kubectl(&cluster.api, &["wait", "--timeout=60s", "fap/p", warm]);
    kubectl(&cluster.api, &["scale", "fap/p", "--replicas=0"]);
    until("the pool's agent to go", async || {
        let params = kube::api::ListParams::default().labels("tiffany.dev/pool=p");
        let list = cluster.agents().list(&params).await.unwrap();
        list.items.is_empty().then_some(())
    })
    .await;
}

/// What stands in `deploy/far.yaml` needs a real kube-apiserver in any case.
mod real {
    use super::*;

    async fn installed(test: &str, with: &'static [Part]) -> Option<Cluster> {
        if let Err(missing) = servers::programs() {
            skip(test, &missing);
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let server = Server::real(dir.path(), with).await;
        let file = deploy().join("far.yaml");
        let applied = kubectl(&server, &["apply", "-f", file.to_str().unwrap()]);
        assert!(
            applied.lines().count() > 8 && applied.lines().all(|line| line.ends_with(" created")),
            "{applied}"
        );
        kubectl(
            &server,
            &["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"],
        );
        Some(Cluster::on(dir, server).await)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_install_file_is_accepted_twice_and_by_server_side_apply() {
        let Some(cluster) = installed("the_install_file_is_accepted_twice_and_by_server_side_apply", &[]).await else {
            return;
        };
        let file = deploy().join("far.yaml");
        let file = file.to_str().unwrap();
        let again = kubectl(&cluster.api, &["apply", "-f", file]);
        assert!(again.lines().all(|line| line.ends_with(" unchanged")), "{again}");
        let strict = kubectl(
            &cluster.api,
            &[
                "apply",
                "--server-side",
                "--force-conflicts",
                "--validate=strict",
                "-f",
                file,
            ],
        );
        assert!(
            strict.lines().all(|line| line.ends_with(" serverside-applied")),
            "{strict}"
        );
        let kustomized = kubectl(&cluster.api, &["kustomize", deploy().to_str().unwrap()]);
        assert_eq!(
            kustomized.matches("\nkind: ").count(),
            std::fs::read_to_string(file).unwrap().matches("\nkind: ").count()
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_controller_works_with_exactly_the_rights_it_is_given_and_a_second_replica_goes_on() {
        const TEST: &str = "the_controller_works_with_exactly_the_rights_it_is_given_and_a_second_replica_goes_on";
        let Some(mut cluster) = installed(TEST, &[Part::ControllerManager, Part::AuditLog]).await else {
            return;
        };
        let token = kubectl(&cluster.api, &["create", "token", "far-controller", "-n", "far-system"]);
        let administrator = cluster.api.kubeconfig();
        let line = administrator
            .lines()
            .find(|line| line.trim().starts_with("token: "))
            .unwrap();
        let own = administrator.replace(line, &format!("    token: {}", token.trim()));
        std::fs::write(cluster.dir.path().join("kubeconfig"), own).unwrap();
        cluster
            .start_controller(|config| {
                config.install_crds = false;
                config.share_state = true;
                config.gateway_listen = Some("127.0.0.1:0".parse().unwrap());
            })
            .await;

        // Said twice about one agent, with other words: one event, changed.
        cluster.create("big", json!({"image": "a", "memory": "900Gi"})).await;
        cluster
            .wait("big", "to be judged", |status| status["reason"] == "Unschedulable")
            .await;
        let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
        cluster
            .wait("big", "to be judged again", |status| {
                status["message"]
                    .as_str()
                    .is_some_and(|text| text.contains("0/1 blades"))
            })
            .await;
        let env = json!([{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s1", "key": "k"}}}]);
        let files = json!([{"path": "/task", "configMapRef": {"name": "docs"}}]);
        kubectl(
            &cluster.api,
            &["create", "secret", "generic", "s1", "--from-literal=k=hush"],
        );
        kubectl(
            &cluster.api,
            &["create", "configmap", "docs", "--from-literal=a.md=one"],
        );
        let needy = cluster
            .create(
                "needy",
                json!({"image": "a", "env": env, "files": files, "ttlSecondsAfterFinished": 5}),
            )
            .await;
        let uid = needy.uid().unwrap();
        until("the blade to have it", async || blade.fake.phase(&uid)).await;
        blade.fake.running(&uid);
        cluster.wait_phase("needy", "Running").await;
        let token = cluster.user("jane", ALL).await;
        let identity = Identity {
            namespace: "default".into(),
            name: "needy".into(),
            ..Identity::default()
        };
        let request = StatsRequest {
            identity: Some(identity),
        };
        cluster.inside(&token).await.stats(request).await.unwrap();

        // Another replica, with a folder of its own: it has the CA, so the blade and its certificate are still good.
        cluster.stop_controller().await;
        let other = cluster.dir.path().join("other");
        cluster
            .start_controller(|config| {
                config.install_crds = false;
                config.share_state = true;
                config.state_dir = other;
            })
            .await;
        blade.fake.ended(&uid, EndReason::Completed, Some(0), "");
        cluster.wait_phase("needy", "Completed").await;
        cluster.wait_gone("needy").await;
        assert_eq!(blade.fake.attempts(&uid), [1]);
        pools_and_queues(&cluster, &blade).await;
        let Server::Real(plane) = &cluster.api else {
            unreachable!("installed() starts a real one")
        };
        // The blade's events came after its Lease: wait for what is still on its way into the log.
        let granted = granted();
        let unused = async || {
            let asked = asked(&plane.audit_log());
            let unused: Vec<_> = granted
                .iter()
                .filter(|right| !asked.iter().any(|(one, _)| covers(right, one)))
                .cloned()
                .collect();
            (unused.is_empty()).then_some(()).ok_or(unused)
        };
        let mut left = Vec::new();
        let all_used = tokio::time::timeout(support::PATIENCE, async {
            while let Err(unused) = unused().await {
                left = unused;
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        });
        assert!(all_used.await.is_ok(), "rights that nothing needs: {left:#?}");
        let refused: Vec<_> = asked(&plane.audit_log())
            .into_iter()
            .filter(|(_, code)| *code == 403)
            .collect();
        assert!(refused.is_empty(), "rights that are missing: {refused:#?}");
    }
}
