//! Server-side apply, other patches and the scale subresource over real HTTPS.
#![allow(clippy::unwrap_used)] // A panic in a test is its report.

mod common;

use common::{AGENTS, APPLY, JSON_PATCH, MERGE, agent, start, start_with_crd};
use serde_json::{Value, json};

#[tokio::test]
async fn apply_creates_changes_and_gives_up_fields() {
    let server = start_with_crd().await;
    let (code, made) = server
        .apply(
            "a",
            "one",
            &agent(
                "a",
                json!({"image": "i", "nodeName": "n", "env": [{"name": "A", "value": "1"}]}),
            ),
        )
        .await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(made["metadata"]["managedFields"][0]["operation"], "Apply");
    let (code, changed) = server
        .apply(
            "a",
            "one",
            &agent("a", json!({"image": "i", "env": [{"name": "B", "value": "2"}]})),
        )
        .await;
    assert_eq!(
        (code, changed["spec"].get("nodeName")),
        (200, None),
        "what is no longer applied goes"
    );
    assert_eq!(changed["spec"]["env"], json!([{"name": "B", "value": "2"}]));
    let (_, same) = server
        .apply(
            "a",
            "one",
            &agent("a", json!({"image": "i", "env": [{"name": "B", "value": "2"}]})),
        )
        .await;
    assert_eq!(
        same["metadata"]["resourceVersion"], changed["metadata"]["resourceVersion"],
        "the same again is no write"
    );
}

#[tokio::test]
async fn a_field_of_another_manager_conflicts_until_forced() {
    let server = start_with_crd().await;
    server
        .apply("a", "one", &agent("a", json!({"image": "i", "nodeName": "n1"})))
        .await;
    let other = agent("a", json!({"image": "i", "nodeName": "n2"}));
    let (code, body) = server.apply("a", "two", &other).await;
    assert_eq!((code, body["reason"].as_str()), (409, Some("Conflict")));
    let cause = &body["details"]["causes"][0];
    assert_eq!(
        (cause["reason"].as_str(), cause["field"].as_str()),
        (Some("FieldManagerConflict"), Some(".spec.nodeName"))
    );
    let (code, forced) = server
        .patch(&format!("{AGENTS}/a?fieldManager=two&force=true"), APPLY, &other)
        .await;
    assert_eq!((code, &forced["spec"]["nodeName"]), (200, &json!("n2")));
    let (code, _) = server.apply("a", "one", &agent("a", json!({"image": "i"}))).await;
    assert_eq!(code, 200);
    assert_eq!(
        server.get(&format!("{AGENTS}/a")).await.1["spec"]["nodeName"],
        "n2",
        "one gave up what two took"
    );
}

#[tokio::test]
async fn two_controllers_write_their_own_status_fields() {
    let server = start_with_crd().await;
    server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    let status = |status: Value| json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": "a"}, "status": status});
    let apply = async |manager: &str, body: Value| {
        server
            .patch(&format!("{AGENTS}/a/status?fieldManager={manager}"), APPLY, &body)
            .await
    };
    apply(
        "far-controller",
        status(json!({"conditions": [{"type": "Scheduled", "status": "True"}]})),
    )
    .await;
    let (code, both) = apply(
        "far-node-agent",
        status(json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]})),
    )
    .await;
    assert_eq!(code, 200, "{both}");
    assert_eq!(
        (
            both["status"]["conditions"].as_array().unwrap().len(),
            both["metadata"]["generation"].as_i64()
        ),
        (2, Some(1))
    );
    let (code, clash) = apply("far-controller", status(json!({"phase": "Failed"}))).await;
    assert_eq!(
        (code, clash["details"]["causes"][0]["field"].as_str()),
        (409, Some(".status.phase"))
    );
}

#[tokio::test]
async fn apply_bodies_may_be_yaml_and_need_a_manager_and_known_fields() {
    let server = start_with_crd().await;
    let yaml = "apiVersion: tiffany.dev/v1\nkind: FarAgent\nmetadata: {name: made}\nspec:\n  image: i\n  cpu: 2\n";
    let headers = [("content-type", APPLY)];
    let made = server
        .try_call("PATCH", &format!("{AGENTS}/made?fieldManager=m"), &headers, yaml.into())
        .await
        .unwrap();
    assert_eq!((made.code, &made.body["spec"]["cpu"]), (201, &json!(2)));
    let nobody = server
        .try_call("PATCH", &format!("{AGENTS}/made"), &headers, yaml.into())
        .await
        .unwrap();
    assert_eq!(
        (nobody.code, &nobody.body["message"]),
        (
            422,
            &json!(
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch"
            )
        )
    );
    let (code, body) = server
        .apply("z", "m", &agent("z", json!({"image": "i", "imagee": 1})))
        .await;
    assert!(
        code >= 400
            && body["message"]
                .as_str()
                .unwrap()
                .contains(".spec.imagee: field not declared in schema")
    );
}

#[tokio::test]
async fn an_update_takes_fields_from_an_applier() {
    let server = start_with_crd().await;
    server
        .apply("a", "one", &agent("a", json!({"image": "i", "nodeName": "n1"})))
        .await;
    server
        .patch(
            &format!("{AGENTS}/a?fieldManager=editor"),
            MERGE,
            &json!({"spec": {"nodeName": "n2"}}),
        )
        .await;
    let (code, body) = server
        .apply("a", "one", &agent("a", json!({"image": "i", "nodeName": "n1"})))
        .await;
    assert_eq!(code, 409);
    assert_eq!(
        body["message"],
        "Apply failed with 1 conflict: conflict with \"editor\" using tiffany.dev/v1: .spec.nodeName"
    );
}

#[tokio::test]
async fn patches_are_applied_by_their_media_type() {
    let server = start_with_crd().await;
    server
        .post(AGENTS, &agent("a", json!({"image": "i", "args": ["1"]})))
        .await;
    let path = format!("{AGENTS}/a");
    let (_, merged) = server.patch(&path, MERGE, &json!({"spec": {"args": ["2", "3"]}})).await;
    assert_eq!(merged["spec"]["args"], json!(["2", "3"]));
    let (_, patched) = server
        .patch(&path, JSON_PATCH, &json!([{"op": "remove", "path": "/spec/args/0"}]))
        .await;
    assert_eq!(patched["spec"]["args"], json!(["3"]));
    assert_eq!(
        server
            .patch(
                &path,
                JSON_PATCH,
                &json!([{"op": "test", "path": "/spec/args/0", "value": "x"}])
            )
            .await
            .0,
        422
    );
    assert_eq!(
        server
            .patch(&path, "application/strategic-merge-patch+json", &json!({}))
            .await
            .0,
        415
    );
    let stale = json!({"metadata": {"resourceVersion": "1"}, "spec": {"args": []}});
    assert_eq!(
        server.patch(&path, MERGE, &stale).await.0,
        409,
        "a version in a patch is a condition"
    );
    let secrets = "/api/v1/namespaces/default/secrets";
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"p": "q"}});
    let (_, made) = server.post(secrets, &secret).await;
    assert_eq!(
        (&made["data"]["p"], made.get("stringData"), &made["type"]),
        (&json!("cQ=="), None, &json!("Opaque"))
    );
    let (code, patched) = server
        .patch(
            &format!("{secrets}/s"),
            "application/strategic-merge-patch+json",
            &json!({"data": {"p": null, "n": "bQ=="}}),
        )
        .await;
    assert_eq!((code, &patched["data"]), (200, &json!({"n": "bQ=="})));
}

#[tokio::test]
async fn scale_reads_and_writes_the_replicas_of_the_object() {
    let server = start_with_crd().await;
    server
        .post(AGENTS, &agent("a", json!({"image": "i", "replicas": 2})))
        .await;
    server
        .patch(
            &format!("{AGENTS}/a/status"),
            MERGE,
            &json!({"status": {"replicas": 1, "selector": "app=a"}}),
        )
        .await;
    let path = format!("{AGENTS}/a/scale");
    let (_, mut scale) = server.get(&path).await;
    assert_eq!(
        (&scale["kind"], &scale["spec"], &scale["status"]),
        (
            &json!("Scale"),
            &json!({"replicas": 2}),
            &json!({"replicas": 1, "selector": "app=a"})
        )
    );
    scale["spec"]["replicas"] = json!(5);
    assert_eq!(server.put(&path, &scale).await.0, 200);
    assert_eq!(server.put(&path, &scale).await.0, 409, "the version is old now");
    let (_, patched) = server.patch(&path, MERGE, &json!({"spec": {"replicas": 7}})).await;
    assert_eq!(patched["spec"]["replicas"], 7);
    assert_eq!(
        server.patch(&path, MERGE, &json!({"spec": {"replicas": -1}})).await.0,
        422
    );
    assert_eq!(server.get(&format!("{AGENTS}/a")).await.1["spec"]["replicas"], 7);
}

#[tokio::test]
async fn a_broken_crd_is_refused() {
    let server = start().await;
    let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let mut crd = common::crd();
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"] = json!([{"rule": "self.("}]);
    let (code, body) = server.post(path, &crd).await;
    assert_eq!(code, 422);
    assert!(
        body["details"]["causes"][0]["field"]
            .as_str()
            .unwrap()
            .ends_with("x-kubernetes-validations[0].rule"),
        "{body}"
    );
}

#[tokio::test]
async fn clients_find_kinds_by_both_forms_of_discovery_and_by_openapi() {
    let server = start_with_crd().await;
    let (_, list) = server.get("/apis/tiffany.dev/v1").await;
    let found: Vec<_> = list["resources"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["name"].as_str().unwrap())
        .collect();
    assert_eq!(found, ["faragents", "faragents/status", "faragents/scale"]);
    assert_eq!(list["resources"][0]["shortNames"], json!(["fa", "far"]));
    let accept = [(
        "accept",
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json",
    )];
    let both = server.try_call("GET", "/apis", &accept, Vec::new()).await.unwrap();
    assert!(
        both.headers["content-type"]
            .to_str()
            .unwrap()
            .contains("APIGroupDiscoveryList")
    );
    assert!(
        both.body["items"]
            .as_array()
            .unwrap()
            .iter()
            .any(|group| group["metadata"]["name"] == "tiffany.dev")
    );
    let (_, index) = server.get("/openapi/v3").await;
    let place = index["paths"]["apis/tiffany.dev/v1"]["serverRelativeURL"]
        .as_str()
        .unwrap();
    let (_, document) = server.get(place).await;
    let schema = &document["components"]["schemas"]["dev.tiffany.v1.FarAgent"];
    assert_eq!(
        schema["properties"]["spec"]["properties"]["image"]["description"],
        "The OCI image to boot."
    );
}
