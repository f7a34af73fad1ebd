//! Objects over real HTTPS: create, change, delete, and what is refused.
#![allow(clippy::unwrap_used)] // A panic in a test is its report.

mod common;

use common::{AGENTS, APPLY, JSON_PATCH, MERGE, agent, start, start_with_crd};
use serde_json::{Value, json};

#[tokio::test]
async fn a_request_without_the_token_is_refused() {
    let server = start().await;
    let mut stranger = server.client.clone();
    stranger.token = "wrong".into();
    let (code, body) = stranger.get("/api/v1/namespaces").await;
    assert_eq!((code, body["reason"].as_str()), (401, Some("Unauthorized")));
    stranger.token = String::new();
    let (code, body) = stranger.get("/readyz").await;
    assert_eq!((code, body), (200, json!("ok")), "probes need no token");
}

#[tokio::test]
async fn an_object_lives_through_create_update_and_delete() {
    let server = start_with_crd().await;
    let (code, made) = server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    assert_eq!(code, 201, "{made}");
    assert_eq!(
        made["spec"],
        json!({"image": "i", "cpu": 1, "memory": "512Mi", "restartPolicy": "Never"}),
        "defaults"
    );
    let metadata = &made["metadata"];
    assert_eq!(
        (metadata["generation"].as_i64(), metadata["namespace"].as_str()),
        (Some(1), Some("default"))
    );
    assert!(metadata["uid"].as_str().unwrap().len() == 36 && metadata["creationTimestamp"].is_string());

    let (code, again) = server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    assert_eq!(
        (code, again["message"].as_str()),
        (409, Some("faragents.tiffany.dev \"a\" already exists"))
    );

    let mut changed = made.clone();
    changed["spec"]["nodeName"] = json!("blade-1");
    let path = format!("{AGENTS}/a");
    let (code, updated) = server.put(&path, &changed).await;
    assert_eq!((code, updated["metadata"]["generation"].as_i64()), (200, Some(2)));
    let (code, stale) = server.put(&path, &changed).await;
    assert_eq!((code, stale["reason"].as_str()), (409, Some("Conflict")));
    assert!(
        stale["message"]
            .as_str()
            .unwrap()
            .contains("the object has been modified")
    );

    let (code, gone) = server.delete(&path).await;
    assert_eq!((code, gone["status"].as_str()), (200, Some("Success")));
    let (code, missing) = server.get(&path).await;
    assert_eq!(
        (code, missing["message"].as_str()),
        (404, Some("faragents.tiffany.dev \"a\" not found"))
    );
}

#[tokio::test]
async fn status_and_spec_are_written_apart() {
    let server = start_with_crd().await;
    let mut with_status = agent("a", json!({"image": "i"}));
    with_status["status"] = json!({"phase": "Running"});
    let (_, made) = server.post(AGENTS, &with_status).await;
    assert!(made.get("status").is_none(), "status is not set by create");
    let both = json!({"spec": {"nodeName": "n"}, "status": {"phase": "Running"}, "metadata": {"labels": {"x": "y"}}});
    let (_, after) = server.patch(&format!("{AGENTS}/a/status"), MERGE, &both).await;
    assert_eq!(
        (&after["status"]["phase"], after["spec"].get("nodeName")),
        (&json!("Running"), None)
    );
    assert_eq!(
        (
            after["metadata"]["generation"].as_i64(),
            after["metadata"].get("labels")
        ),
        (Some(1), None)
    );
    let (_, after) = server
        .patch(
            &format!("{AGENTS}/a"),
            MERGE,
            &json!({"spec": {"nodeName": "n"}, "status": {"phase": "Failed"}}),
        )
        .await;
    assert_eq!(
        (&after["status"]["phase"], &after["spec"]["nodeName"]),
        (&json!("Running"), &json!("n"))
    );
    assert_eq!(after["metadata"]["generation"], 2);
}

#[tokio::test]
async fn a_write_that_changes_nothing_keeps_the_version() {
    let server = start_with_crd().await;
    let (_, made) = server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    let (code, same) = server
        .patch(&format!("{AGENTS}/a"), MERGE, &json!({"spec": {"image": "i"}}))
        .await;
    assert_eq!(
        (code, &same["metadata"]["resourceVersion"]),
        (200, &made["metadata"]["resourceVersion"])
    );
}

#[tokio::test]
async fn what_is_wrong_is_refused_with_the_field_named() {
    let server = start_with_crd().await;
    let cases = [
        (json!({}), "spec.image", "FieldValueRequired"),
        (json!({"image": ""}), "spec.image", "FieldValueInvalid"),
        (json!({"image": "i", "cpu": 0.5}), "spec.cpu", "FieldValueTypeInvalid"),
        (
            json!({"image": "i", "replicas": -1}),
            "spec.replicas",
            "FieldValueInvalid",
        ),
        (
            json!({"image": "i", "restartPolicy": "Sometimes"}),
            "spec.restartPolicy",
            "FieldValueNotSupported",
        ),
        (
            json!({"image": "i", "args": ["1", "2", "3", "4", "5"]}),
            "spec.args",
            "FieldValueTooMany",
        ),
        (
            json!({"image": "i", "env": [{"name": "A"}, {"name": "A"}]}),
            "spec.env[1]",
            "FieldValueDuplicate",
        ),
        (json!({"image": "i", "memory": "abc"}), "spec", "FieldValueInvalid"),
    ];
    for (spec, field, reason) in cases {
        let (code, body) = server.post(AGENTS, &agent("a", spec.clone())).await;
        let cause = &body["details"]["causes"][0];
        assert_eq!(
            (code, cause["field"].as_str(), cause["reason"].as_str()),
            (422, Some(field), Some(reason)),
            "{spec}: {body}"
        );
        assert_eq!(body["details"]["kind"], "FarAgent");
    }
    let (code, body) = server.post(AGENTS, &agent("Not A Name", json!({"image": "i"}))).await;
    assert_eq!(
        (code, body["details"]["causes"][0]["field"].as_str()),
        (422, Some("metadata.name"))
    );
}

#[tokio::test]
async fn the_image_cannot_be_changed_by_any_kind_of_write() {
    let server = start_with_crd().await;
    let (_, mut made) = server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    let path = format!("{AGENTS}/a");
    let other = json!({"spec": {"image": "j"}});
    let apply = agent("a", json!({"image": "j"}));
    let answers = [
        server.patch(&path, MERGE, &other).await,
        server
            .patch(
                &path,
                JSON_PATCH,
                &json!([{"op": "replace", "path": "/spec/image", "value": "j"}]),
            )
            .await,
        server
            .patch(&format!("{path}?fieldManager=m&force=true"), APPLY, &apply)
            .await,
        {
            made["spec"]["image"] = json!("j");
            server.put(&path, &made).await
        },
    ];
    for (code, body) in answers {
        assert_eq!(
            (code, body["message"].as_str()),
            (
                422,
                Some("FarAgent.tiffany.dev \"a\" is invalid: spec: Forbidden: image is immutable")
            )
        );
    }
}

#[tokio::test]
async fn unknown_fields_are_dropped_warned_about_or_refused() {
    let server = start_with_crd().await;
    let object = |name: &str| agent(name, json!({"image": "i", "imagee": 1})).to_string().into_bytes();
    let json = [("content-type", "application/json")];
    let strict = server
        .try_call("POST", &format!("{AGENTS}?fieldValidation=Strict"), &json, object("a"))
        .await
        .unwrap();
    assert_eq!(strict.code, 400);
    assert!(
        strict.body["message"]
            .as_str()
            .unwrap()
            .contains("strict decoding error: unknown field \"spec.imagee\"")
    );
    let warned = server.try_call("POST", AGENTS, &json, object("b")).await.unwrap();
    assert_eq!(
        (warned.code, warned.headers["warning"].to_str().unwrap()),
        (201, "299 - \"unknown field \\\"spec.imagee\\\"\"")
    );
    assert!(warned.body["spec"].get("imagee").is_none());
    let ignored = server
        .try_call("POST", &format!("{AGENTS}?fieldValidation=Ignore"), &json, object("c"))
        .await
        .unwrap();
    assert_eq!((ignored.code, ignored.headers.get("warning")), (201, None));
}

#[tokio::test]
async fn dry_run_checks_and_stores_nothing() {
    let server = start_with_crd().await;
    let path = format!("{AGENTS}?dryRun=All");
    let (code, body) = server.post(&path, &agent("a", json!({"image": "i"}))).await;
    assert_eq!((code, &body["spec"]["cpu"]), (201, &json!(1)));
    assert_eq!(server.post(&path, &agent("a", json!({}))).await.0, 422);
    assert_eq!(server.get(&format!("{AGENTS}/a")).await.0, 404);
    server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    server
        .patch(
            &format!("{AGENTS}/a?dryRun=All"),
            MERGE,
            &json!({"spec": {"nodeName": "n"}}),
        )
        .await;
    server
        .call(
            "DELETE",
            &format!("{AGENTS}/a?dryRun=All"),
            "application/json",
            &Value::Null,
        )
        .await;
    let (code, kept) = server.get(&format!("{AGENTS}/a")).await;
    assert_eq!((code, kept["spec"].get("nodeName")), (200, None));
}

#[tokio::test]
async fn generated_names_differ() {
    let server = start_with_crd().await;
    let mut object = agent("x", json!({"image": "i"}));
    object["metadata"] = json!({"generateName": "job-"});
    let (_, one) = server.post(AGENTS, &object).await;
    let (_, two) = server.post(AGENTS, &object).await;
    let name = |body: &Value| body["metadata"]["name"].as_str().unwrap().to_owned();
    assert!(name(&one).starts_with("job-") && name(&one) != name(&two));
}

#[tokio::test]
async fn a_finalizer_holds_the_object_until_it_is_removed() {
    let server = start_with_crd().await;
    let mut object = agent("a", json!({"image": "i"}));
    object["metadata"]["finalizers"] = json!(["tiffany.dev/microvm"]);
    server.post(AGENTS, &object).await;
    let path = format!("{AGENTS}/a");
    let (code, waits) = server.delete(&path).await;
    assert_eq!(code, 200);
    assert!(waits["metadata"]["deletionTimestamp"].is_string() && waits["metadata"]["generation"] == 2);
    let (_, again) = server.delete(&path).await;
    assert_eq!(
        again["metadata"]["deletionTimestamp"], waits["metadata"]["deletionTimestamp"],
        "a second delete changes nothing"
    );
    let more = json!({"metadata": {"finalizers": ["tiffany.dev/microvm", "tiffany.dev/other"]}});
    let (code, body) = server.patch(&path, MERGE, &more).await;
    assert_eq!(
        (code, body["details"]["causes"][0]["field"].as_str()),
        (422, Some("metadata.finalizers"))
    );
    assert_eq!(
        server
            .patch(&path, MERGE, &json!({"metadata": {"finalizers": null}}))
            .await
            .0,
        200
    );
    assert_eq!(server.get(&path).await.0, 404);
}

#[tokio::test]
async fn preconditions_protect_a_recreated_object_from_a_late_delete() {
    let server = start_with_crd().await;
    let (_, first) = server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    let path = format!("{AGENTS}/a");
    server.delete(&path).await;
    let (_, second) = server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    assert_ne!(first["metadata"]["uid"], second["metadata"]["uid"]);
    let options = json!({"preconditions": {"uid": first["metadata"]["uid"]}});
    assert_eq!(server.call("DELETE", &path, "application/json", &options).await.0, 409);
    assert_eq!(server.get(&path).await.0, 200);
}

#[tokio::test]
async fn dependents_go_with_their_owner_unless_orphaned() {
    let server = start_with_crd().await;
    for (owner, policy, dependent_goes) in [
        ("one", "Background", true),
        ("two", "Foreground", true),
        ("three", "Orphan", false),
    ] {
        let (_, made) = server.post(AGENTS, &agent(owner, json!({"image": "i"}))).await;
        let reference = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "name": owner, "uid": made["metadata"]["uid"], "blockOwnerDeletion": true});
        let dependent = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("of-{owner}"), "ownerReferences": [reference]}});
        let maps = "/api/v1/namespaces/default/configmaps";
        assert_eq!(server.post(maps, &dependent).await.0, 201);
        let options = json!({"propagationPolicy": policy});
        server
            .call("DELETE", &format!("{AGENTS}/{owner}"), "application/json", &options)
            .await;
        server.wait(&format!("{AGENTS}/{owner}"), |code, _| code == 404).await;
        let path = format!("{maps}/of-{owner}");
        if dependent_goes {
            server.wait(&path, |code, _| code == 404).await;
        } else {
            server
                .wait(&path, |code, body| {
                    code == 200 && body["metadata"].get("ownerReferences").is_none()
                })
                .await;
        }
    }
}

#[tokio::test]
async fn a_namespace_goes_when_it_is_empty_and_takes_nothing_new_meanwhile() {
    let server = start_with_crd().await;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}});
    assert_eq!(server.post("/api/v1/namespaces", &namespace).await.0, 201);
    let agents = "/apis/tiffany.dev/v1/namespaces/team/faragents";
    let mut held = agent("held", json!({"image": "i"}));
    held["metadata"]["finalizers"] = json!(["tiffany.dev/microvm"]);
    server.post(agents, &held).await;
    server
        .post(
            "/api/v1/namespaces/team/configmaps",
            &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}),
        )
        .await;
    let (_, ending) = server.delete("/api/v1/namespaces/team").await;
    assert_eq!(ending["status"]["phase"], "Terminating");
    assert_eq!(server.post(agents, &agent("late", json!({"image": "i"}))).await.0, 403);
    server
        .wait("/api/v1/namespaces/team/configmaps/c", |code, _| code == 404)
        .await;
    assert_eq!(
        server.get("/api/v1/namespaces/team").await.0,
        200,
        "the held agent keeps the namespace"
    );
    server
        .patch(
            &format!("{agents}/held"),
            MERGE,
            &json!({"metadata": {"finalizers": []}}),
        )
        .await;
    server.wait("/api/v1/namespaces/team", |code, _| code == 404).await;
    assert_eq!(server.post(agents, &agent("late", json!({"image": "i"}))).await.0, 404);
}

#[tokio::test]
async fn deleting_a_crd_takes_its_objects_and_its_paths_along() {
    let server = start_with_crd().await;
    server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    let crd = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/faragents.tiffany.dev";
    let (_, established) = server.get(crd).await;
    let conditions: Vec<_> = established["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["type"].clone(), c["status"].clone()))
        .collect();
    assert_eq!(
        conditions,
        [
            (json!("NamesAccepted"), json!("True")),
            (json!("Established"), json!("True"))
        ]
    );
    server.delete(crd).await;
    server.wait(crd, |code, _| code == 404).await;
    assert_eq!(server.get(AGENTS).await.0, 404);
    assert_eq!(server.get("/apis/tiffany.dev/v1").await.0, 404);
    server.install_crd().await;
    assert_eq!(server.get(AGENTS).await.1["items"], json!([]), "nothing comes back");
}

#[tokio::test]
async fn an_event_is_one_object_in_both_groups() {
    let server = start().await;
    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"}, "reason": "Scheduled", "note": "placed",
        "type": "Normal", "action": "Place", "reportingController": "far", "reportingInstance": "far-1", "eventTime": "2026-01-01T00:00:00.000000Z",
        "regarding": {"kind": "FarAgent", "name": "a", "namespace": "default"}});
    let (code, body) = server
        .post("/apis/events.k8s.io/v1/namespaces/default/events", &event)
        .await;
    assert_eq!(code, 201, "{body}");
    let (_, list) = server
        .get("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Da")
        .await;
    assert_eq!(
        (
            &list["items"][0]["message"],
            &list["items"][0]["involvedObject"]["kind"]
        ),
        (&json!("placed"), &json!("FarAgent"))
    );
    let path = "/apis/events.k8s.io/v1/namespaces/default/events/e";
    let series = json!({"series": {"count": 2, "lastObservedTime": "2026-01-01T00:00:01.000000Z"}});
    let (code, patched) = server.patch(path, MERGE, &series).await;
    assert_eq!(
        (code, &patched["note"], &patched["series"]["count"]),
        (200, &json!("placed"), &json!(2)),
        "{patched}"
    );
}

#[tokio::test]
async fn racing_patches_all_land() {
    let server = start_with_crd().await;
    server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    let patches = (0..10).map(|number| {
        let client = server.client.clone();
        tokio::spawn(async move {
            let label = json!({"metadata": {"labels": {format!("l{number}"): "x"}}});
            client.patch(&format!("{AGENTS}/a"), MERGE, &label).await.0
        })
    });
    for patch in patches.collect::<Vec<_>>() {
        assert_eq!(patch.await.unwrap(), 200);
    }
    let (_, object) = server.get(&format!("{AGENTS}/a")).await;
    assert_eq!(object["metadata"]["labels"].as_object().unwrap().len(), 10);
}

#[tokio::test]
async fn a_dependent_made_right_after_its_owner_is_not_collected() {
    let server = start_with_crd().await;
    for number in 0..30 {
        let name = format!("o{number}");
        let (_, owner) = server.post(AGENTS, &agent(&name, json!({"image": "i"}))).await;
        let reference =
            json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "name": name, "uid": owner["metadata"]["uid"]});
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "ownerReferences": [reference]}});
        assert_eq!(server.post("/api/v1/namespaces/default/configmaps", &map).await.0, 201);
    }
    // One whose owner never was goes: then the collector has seen all the others.
    let nobody = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "name": "nobody", "uid": "0"});
    let stray =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "stray", "ownerReferences": [nobody]}});
    server.post("/api/v1/namespaces/default/configmaps", &stray).await;
    server
        .wait("/api/v1/namespaces/default/configmaps/stray", |code, _| code == 404)
        .await;
    let (_, list) = server.get("/api/v1/namespaces/default/configmaps").await;
    assert_eq!(list["items"].as_array().unwrap().len(), 30);
}
