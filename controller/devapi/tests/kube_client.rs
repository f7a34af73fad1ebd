//! The client this API is for: kube's client, watcher and server-side apply.
#![allow(clippy::unwrap_used)] // A panic in a test is its report.

mod common;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use common::{LIMIT, agent, start_with_crd};
use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::finalizer::{Event as Finalizer, finalizer};
use kube::runtime::watcher;
use serde_json::json;

async fn client(kubeconfig: &str) -> kube::Client {
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    kube::Client::try_from(config).unwrap()
}

fn agents() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("tiffany.dev", "v1", "FarAgent"), "faragents")
}

async fn see_phase_change(config: watcher::Config) {
    let server = start_with_crd().await;
    let client = client(&server.kubeconfig).await;
    let api: Api<DynamicObject> = Api::default_namespaced_with(client, &agents());
    server
        .post(common::AGENTS, &agent("early", json!({"image": "i"})))
        .await;
    let mut events = pin!(watcher(api.clone(), config));
    let seen = async {
        loop {
            match events.next().await.unwrap().unwrap() {
                watcher::Event::InitDone => {
                    let object: DynamicObject = serde_json::from_value(agent("late", json!({"image": "i"}))).unwrap();
                    api.create(&PostParams::default(), &object).await.unwrap();
                }
                watcher::Event::Apply(object) if object.metadata.name.as_deref() == Some("late") => {
                    if object.data["status"]["phase"] == "Running" {
                        return object;
                    }
                    let status = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "status": {"phase": "Running",
                        "conditions": [{"type": "Ready", "status": "True"}]}});
                    let parameters = PatchParams::apply("far-node-agent");
                    api.patch_status("late", &parameters, &Patch::Apply(&status))
                        .await
                        .unwrap();
                }
                _ => {}
            }
        }
    };
    let object = tokio::time::timeout(LIMIT, seen)
        .await
        .expect("the watcher sees the status");
    assert_eq!(object.metadata.generation, Some(1));
    assert_eq!(object.data["status"]["conditions"][0]["type"], "Ready");
}

#[tokio::test]
async fn a_watcher_sees_what_a_status_apply_wrote() {
    see_phase_change(watcher::Config::default()).await;
}

#[tokio::test]
async fn a_streaming_list_works_as_well() {
    see_phase_change(watcher::Config::default().streaming_lists()).await;
}

#[tokio::test]
async fn a_lease_is_guarded_by_its_version() {
    let server = start_with_crd().await;
    let leases: Api<Lease> = Api::namespaced(client(&server.kubeconfig).await, "kube-system");
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "far"},
        "spec": {"holderIdentity": "one", "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"}});
    let made = leases
        .create(&PostParams::default(), &serde_json::from_value(lease).unwrap())
        .await
        .unwrap();
    let mut next = made.clone();
    next.spec.as_mut().unwrap().holder_identity = Some("two".into());
    let taken = leases.replace("far", &PostParams::default(), &next).await.unwrap();
    assert_eq!(taken.spec.unwrap().holder_identity.as_deref(), Some("two"));
    let late = leases.replace("far", &PostParams::default(), &made).await.unwrap_err();
    assert!(matches!(late, kube::Error::Api(status) if status.code == 409));
}

#[tokio::test]
async fn a_controller_with_a_finalizer_sees_the_object_come_and_go() {
    let server = start_with_crd().await;
    let api: Api<DynamicObject> = Api::default_namespaced_with(client(&server.kubeconfig).await, &agents());
    let reconcile = async |object: Arc<DynamicObject>, api: Arc<Api<DynamicObject>>| {
        let acts = async |event: Finalizer<DynamicObject>| -> Result<Action, kube::Error> {
            let (phase, object) = match event {
                Finalizer::Apply(object) => ("Running", object),
                Finalizer::Cleanup(object) => ("Stopped", object),
            };
            let status = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "status": {"phase": phase}});
            let name = object.metadata.name.clone().unwrap();
            api.patch_status(&name, &PatchParams::apply("far-controller"), &Patch::Apply(&status))
                .await?;
            Ok(Action::await_change())
        };
        finalizer(&api, "tiffany.dev/microvm", object, acts)
            .await
            .map_err(|error| std::io::Error::other(error.to_string()))
    };
    let retry = |_: Arc<DynamicObject>, _: &std::io::Error, _: Arc<Api<DynamicObject>>| {
        Action::requeue(Duration::from_millis(50))
    };
    let controller = Controller::new_with(api.clone(), watcher::Config::default(), agents());
    let runs = tokio::spawn(
        controller
            .run(reconcile, retry, Arc::new(api.clone()))
            .for_each(async |_| ()),
    );
    let mut watch = server.watch(&format!("{}?watch=1", common::AGENTS)).await;
    server.post(common::AGENTS, &agent("a", json!({"image": "i"}))).await;
    let path = format!("{}/a", common::AGENTS);
    let held = server.wait(&path, |_, body| body["status"]["phase"] == "Running").await;
    assert_eq!(held["metadata"]["finalizers"], json!(["tiffany.dev/microvm"]));
    server.delete(&path).await;
    server.wait(&path, |code, _| code == 404).await;
    let mut last = watch.next().await.unwrap();
    while last["type"] != "DELETED" {
        last = watch.next().await.unwrap();
    }
    assert_eq!(
        last["object"]["status"]["phase"], "Stopped",
        "clean-up ran before the object went"
    );
    runs.abort();
}

#[tokio::test]
async fn repeated_events_are_counted_in_one_object() {
    let server = start_with_crd().await;
    let (_, made) = server.post(common::AGENTS, &agent("a", json!({"image": "i"}))).await;
    let object: DynamicObject = serde_json::from_value(made).unwrap();
    let reference = kube::Resource::object_ref(&object, &agents());
    let recorder = Recorder::new(client(&server.kubeconfig).await, Reporter::from("far-controller"));
    let event = Event {
        type_: EventType::Normal,
        reason: "Scheduled".into(),
        note: Some("placed".into()),
        action: "Place".into(),
        secondary: None,
    };
    recorder.publish(&event, &reference).await.unwrap();
    recorder.publish(&event, &reference).await.unwrap();
    let (_, list) = server.get("/apis/events.k8s.io/v1/namespaces/default/events").await;
    let events = list["items"].as_array().unwrap();
    assert_eq!((events.len(), &events[0]["series"]["count"]), (1, &json!(2)), "{list}");
}
