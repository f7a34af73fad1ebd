//! Lists, paging, tables and watches over real HTTPS.
#![allow(clippy::unwrap_used)] // A panic in a test is its report.

mod common;

use common::{AGENTS, MERGE, Server, agent, start, start_with_crd};
use serde_json::{Value, json};

async fn make(server: &Server, name: &str, label: &str) -> Value {
    let mut object = agent(name, json!({"image": "i"}));
    object["metadata"]["labels"] = json!({"app": label});
    let (code, made) = server.post(AGENTS, &object).await;
    assert_eq!(code, 201, "{made}");
    made
}

fn names(list: &Value) -> Vec<&str> {
    list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["metadata"]["name"].as_str().unwrap())
        .collect()
}

fn event(kind: &str, name: &str) -> (String, String) {
    (kind.to_owned(), name.to_owned())
}

#[tokio::test]
async fn selectors_narrow_a_list() {
    let server = start_with_crd().await;
    for (name, label) in [("a", "x"), ("b", "y"), ("c", "x")] {
        make(&server, name, label).await;
    }
    server
        .patch(&format!("{AGENTS}/b"), MERGE, &json!({"spec": {"nodeName": "blade-7"}}))
        .await;
    assert_eq!(
        names(&server.get(&format!("{AGENTS}?labelSelector=app%3Dx")).await.1),
        ["a", "c"]
    );
    assert_eq!(
        names(
            &server
                .get(&format!("{AGENTS}?fieldSelector=spec.nodeName%3Dblade-7"))
                .await
                .1
        ),
        ["b"]
    );
    assert_eq!(
        names(
            &server
                .get(&format!("{AGENTS}?fieldSelector=metadata.name!%3Da"))
                .await
                .1
        ),
        ["b", "c"]
    );
    assert_eq!(
        server.get(&format!("{AGENTS}?fieldSelector=spec.image%3Di")).await.0,
        400
    );
    assert_eq!(
        names(&server.get("/apis/tiffany.dev/v1/faragents").await.1),
        ["a", "b", "c"],
        "over all namespaces"
    );
    let (code, _) = server.delete(&format!("{AGENTS}?labelSelector=app%3Dx")).await;
    assert_eq!(code, 200);
    assert_eq!(
        names(&server.get(AGENTS).await.1),
        ["b"],
        "deletecollection keeps what does not match"
    );
}

#[tokio::test]
async fn pages_are_one_consistent_list() {
    let server = start_with_crd().await;
    for name in ["a", "b", "c", "d", "e"] {
        make(&server, name, "x").await;
    }
    let (_, first) = server.get(&format!("{AGENTS}?limit=2")).await;
    assert_eq!(
        (names(&first), first["metadata"]["remainingItemCount"].as_i64()),
        (vec!["a", "b"], Some(3))
    );
    make(&server, "bb", "x").await;
    server.delete(&format!("{AGENTS}/c")).await;
    let token = first["metadata"]["continue"].as_str().unwrap();
    let (_, second) = server.get(&format!("{AGENTS}?limit=2&continue={token}")).await;
    assert_eq!(names(&second), ["c", "d"], "the list as it was");
    assert_eq!(
        second["metadata"]["resourceVersion"],
        first["metadata"]["resourceVersion"]
    );
    let token = second["metadata"]["continue"].as_str().unwrap();
    let (_, third) = server.get(&format!("{AGENTS}?limit=2&continue={token}")).await;
    assert_eq!((names(&third), &third["metadata"]["continue"]), (vec!["e"], &json!("")));
}

#[tokio::test]
async fn a_table_has_the_columns_of_the_crd() {
    let server = start_with_crd().await;
    make(&server, "a", "x").await;
    server
        .patch(
            &format!("{AGENTS}/a/status"),
            MERGE,
            &json!({"status": {"phase": "Running"}}),
        )
        .await;
    let accept = [(
        "accept",
        "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
    )];
    let table = server.try_call("GET", AGENTS, &accept, Vec::new()).await.unwrap().body;
    let columns: Vec<_> = table["columnDefinitions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| (c["name"].as_str().unwrap(), c["priority"].as_i64().unwrap()))
        .collect();
    assert_eq!(
        columns,
        [("Name", 0), ("Phase", 0), ("Blade", 0), ("Age", 0), ("Image", 1)]
    );
    let cells = table["rows"][0]["cells"].as_array().unwrap();
    assert_eq!(
        (&cells[0], &cells[1], &cells[2], &cells[4]),
        (&json!("a"), &json!("Running"), &Value::Null, &json!("i"))
    );
    assert!(cells[3].as_str().unwrap().ends_with('s'), "an age: {}", cells[3]);
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
}

#[tokio::test]
async fn a_watch_goes_on_from_where_a_list_ended() {
    let server = start_with_crd().await;
    make(&server, "a", "x").await;
    let (_, list) = server.get(AGENTS).await;
    let revision = list["metadata"]["resourceVersion"].as_str().unwrap();
    server.delete(&format!("{AGENTS}/a")).await;
    let mut watch = server
        .watch(&format!("{AGENTS}?watch=true&resourceVersion={revision}"))
        .await;
    assert_eq!(watch.short().await, event("DELETED", "a"));
    make(&server, "b", "x").await;
    assert_eq!(watch.short().await, event("ADDED", "b"));
    server
        .patch(&format!("{AGENTS}/b"), MERGE, &json!({"spec": {"nodeName": "n"}}))
        .await;
    let modified = watch.next().await.unwrap();
    assert_eq!(
        (&modified["type"], &modified["object"]["spec"]["nodeName"]),
        (&json!("MODIFIED"), &json!("n"))
    );
    let (_, now) = server.get(&format!("{AGENTS}/b")).await;
    assert_eq!(modified["object"], now, "an event holds the object as it is stored");
}

#[tokio::test]
async fn a_selected_object_comes_and_goes_with_its_labels() {
    let server = start_with_crd().await;
    let revision = make(&server, "a", "x").await["metadata"]["resourceVersion"]
        .as_str()
        .unwrap()
        .to_owned();
    let mut watch = server
        .watch(&format!(
            "{AGENTS}?watch=1&labelSelector=app%3Dy&resourceVersion={revision}"
        ))
        .await;
    let label = |value: &str| json!({"metadata": {"labels": {"app": value}}});
    for (value, kind) in [("y", "ADDED"), ("x", "DELETED"), ("y", "ADDED")] {
        server.patch(&format!("{AGENTS}/a"), MERGE, &label(value)).await;
        assert_eq!(watch.short().await, event(kind, "a"));
    }
    server.delete(&format!("{AGENTS}/a")).await;
    assert_eq!(watch.short().await, event("DELETED", "a"));
}

#[tokio::test]
async fn initial_events_end_with_a_bookmark() {
    let server = start_with_crd().await;
    make(&server, "a", "x").await;
    make(&server, "b", "x").await;
    let path =
        format!("{AGENTS}?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true");
    let mut watch = server.watch(&path).await;
    assert_eq!(watch.short().await, event("ADDED", "a"));
    assert_eq!(watch.short().await, event("ADDED", "b"));
    let bookmark = watch.next().await.unwrap();
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(
        bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"],
        "true"
    );
    make(&server, "c", "x").await;
    assert_eq!(watch.short().await, event("ADDED", "c"));
}

#[tokio::test]
async fn a_watch_ends_after_its_timeout() {
    let server = start().await;
    let mut watch = server
        .watch("/api/v1/namespaces/default/secrets?watch=1&timeoutSeconds=1")
        .await;
    assert_eq!(watch.next().await, None);
}

/// What far-devapi alone does, or does by a date of its own.
mod embedded {
    use far_devapi::faults::{Action, Fault, Match};

    use super::*;

    #[tokio::test]
    async fn a_page_of_a_list_that_expired_is_refused() {
        let server = start_with_crd().await;
        for name in ["a", "b"] {
            make(&server, name, "x").await;
        }
        let (_, first) = server.get(&format!("{AGENTS}?limit=1")).await;
        let token = first["metadata"]["continue"].as_str().unwrap();
        server.api.expire_pages();
        let (code, gone) = server.get(&format!("{AGENTS}?limit=1&continue={token}")).await;
        assert_eq!((code, gone["reason"].as_str()), (410, Some("Expired")));
    }

    #[tokio::test]
    async fn a_version_before_the_restart_is_too_old() {
        let server = start_with_crd().await;
        let revision = make(&server, "a", "x").await["metadata"]["resourceVersion"]
            .as_str()
            .unwrap()
            .to_owned();
        make(&server, "b", "x").await;
        let common::Server { api, folder, .. } = server;
        let common::Api::Embedded(api) = api else {
            panic!("far-devapi's own restart")
        };
        api.shutdown().await;
        let api = far_devapi::DevApi::start(far_devapi::Config::new(folder.path()))
            .await
            .unwrap();
        let client = common::Client::from_kubeconfig(&api.kubeconfig);
        let (code, body) = client
            .get(&format!("{AGENTS}?watch=1&resourceVersion={revision}"))
            .await;
        assert_eq!((code, body["reason"].as_str()), (410, Some("Expired")));
        let (_, list) = client.get(AGENTS).await;
        assert_eq!(names(&list), ["a", "b"]);
        let now = list["metadata"]["resourceVersion"].as_str().unwrap();
        let mut watch = client.watch(&format!("{AGENTS}?watch=1&resourceVersion={now}")).await;
        client.delete(&format!("{AGENTS}/a")).await;
        assert_eq!(watch.short().await, event("DELETED", "a"));
    }

    #[tokio::test]
    async fn a_watcher_that_does_not_read_is_cut_off_and_costs_no_memory() {
        let server = start().await;
        let (_, list) = server.get("/api/v1/namespaces/default/configmaps").await;
        let revision = list["metadata"]["resourceVersion"].as_str().unwrap();
        let mut watch = server
            .watch(&format!(
                "/api/v1/namespaces/default/configmaps?watch=1&resourceVersion={revision}"
            ))
            .await;
        // More than the history's 32 MiB and what sockets can hold.
        for number in 0..60 {
            let data = json!({"d": "x".repeat(1 << 20)});
            let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("m{number}")}, "data": data});
            assert_eq!(server.post("/api/v1/namespaces/default/configmaps", &map).await.0, 201);
        }
        let mut last = watch.next().await.unwrap();
        while let Some(event) = watch.next().await {
            last = event;
        }
        assert_eq!((&last["type"], &last["object"]["code"]), (&json!("ERROR"), &json!(410)));
    }

    #[tokio::test]
    async fn a_running_watch_can_be_expired_on_purpose() {
        let server = start_with_crd().await;
        let mut watch = server.watch(&format!("{AGENTS}?watch=1")).await;
        make(&server, "a", "x").await;
        assert_eq!(watch.short().await, event("ADDED", "a"));
        let on = Match {
            resource: Some("faragents".into()),
            ..Match::default()
        };
        assert!(server.api.faults.add(Fault {
            on,
            action: Action::ExpireWatch,
            times: 1
        }));
        let error = watch.next().await.unwrap();
        assert_eq!(
            (&error["type"], &error["object"]["reason"]),
            (&json!("ERROR"), &json!("Expired"))
        );
        assert_eq!(watch.next().await, None);
    }
}
