//! Users besides the administrator: tokens, reviews and RBAC, as the real server has them.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{AGENTS, Client, Server, start_with_crd};
use serde_json::{Value, json};

const ACCOUNTS: &str = "/api/v1/namespaces/default/serviceaccounts";
const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";

fn object(kind: &str, name: &str, mut parts: Value) -> Value {
    let version = if kind == "ServiceAccount" {
        "v1"
    } else {
        "rbac.authorization.k8s.io/v1"
    };
    parts["apiVersion"] = json!(version);
    parts["kind"] = json!(kind);
    parts["metadata"] = json!({"name": name});
    parts
}

/// A service account, and a client that is it.
async fn account(server: &Server, name: &str) -> Client {
    let (code, body) = server.post(ACCOUNTS, &object("ServiceAccount", name, json!({}))).await;
    assert_eq!(code, 201, "{body}");
    let (code, body) = server
        .post(&format!("{ACCOUNTS}/{name}/token"), &json!({"spec": {}}))
        .await;
    assert_eq!(code, 201, "{body}");
    let mut client = server.client.clone();
    client.token = body["status"]["token"].as_str().unwrap().to_owned();
    client
}

async fn give(server: &Server, name: &str, rules: Value) {
    let at = |plural: &str| format!("{RBAC}/namespaces/default/{plural}");
    let role = object("Role", name, json!({"rules": rules}));
    let (code, body) = server.post(&at("roles"), &role).await;
    assert_eq!(code, 201, "{body}");
    let parts = json!({"subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "default"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}});
    let binding = object("RoleBinding", name, parts);
    let (code, body) = server.post(&at("rolebindings"), &binding).await;
    assert_eq!(code, 201, "{body}");
}

#[tokio::test]
async fn cluster_roles_and_groups_count_too() {
    let server = start_with_crd().await;
    let user = account(&server, "one").await;
    let rules = json!([{"apiGroups": ["tiffany.dev"], "resources": ["faragents"], "verbs": ["list"]}]);
    let role = object("ClusterRole", "lists", json!({"rules": rules}));
    assert_eq!(server.post(&format!("{RBAC}/clusterroles"), &role).await.0, 201);
    let binding = |kind: &str| {
        let parts = json!({"subjects": [{"kind": "Group", "name": "system:serviceaccounts:default", "apiGroup": "rbac.authorization.k8s.io"}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "lists"}});
        object(kind, "lists", parts)
    };
    // In one namespace, then everywhere.
    let path = format!("{RBAC}/namespaces/default/rolebindings");
    assert_eq!(server.post(&path, &binding("RoleBinding")).await.0, 201);
    assert_eq!(user.get(AGENTS).await.0, 200);
    assert_eq!(user.get("/apis/tiffany.dev/v1/faragents").await.0, 403);
    assert_eq!(
        server
            .post(&format!("{RBAC}/clusterrolebindings"), &binding("ClusterRoleBinding"))
            .await
            .0,
        201
    );
    assert_eq!(user.get("/apis/tiffany.dev/v1/faragents").await.0, 200);
}

/// Names of the embedded API's own first user, its rule against escalation, and tokens that end at once: a real server
/// lets its administrators escalate and keeps the word on a token for some seconds.
mod embedded {
    use super::*;

    #[tokio::test]
    async fn a_user_may_what_a_binding_gives_and_nothing_else() {
        let server = start_with_crd().await;
        let user = account(&server, "reader").await;
        let (code, body) = user.get(AGENTS).await;
        assert_eq!(code, 403);
        assert_eq!(
            body["message"],
            "faragents.tiffany.dev is forbidden: User \"system:serviceaccount:default:reader\" cannot list resource \
         \"faragents\" in API group \"tiffany.dev\" in the namespace \"default\""
        );
        give(
            &server,
            "reader",
            json!([{"apiGroups": ["tiffany.dev"], "resources": ["faragents"], "verbs": ["get", "list", "watch"]}]),
        )
        .await;
        assert_eq!(user.get(AGENTS).await.0, 200);
        assert_eq!(
            user.get("/apis/tiffany.dev/v1/faragents").await.0,
            403,
            "not in all namespaces"
        );
        assert_eq!(
            user.get("/apis/tiffany.dev/v1/namespaces/kube-system/faragents")
                .await
                .0,
            403
        );
        assert_eq!(user.get("/api/v1/namespaces/default/secrets").await.0, 403);
        let agent = json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": "a"}, "spec": {"image": "i"}});
        assert_eq!(user.post(AGENTS, &agent).await.0, 403);
        assert_eq!(user.apply("a", "m", &agent).await.0, 403);
        assert_eq!(user.delete(AGENTS).await.0, 403);
        // Discovery is everybody's; the faults and the roles are the administrator's.
        assert_eq!(user.get("/apis").await.0, 200);
        assert_eq!(user.get("/version").await.0, 200);
        assert_eq!(user.get("/debug/faults").await.0, 403);
        let all = object(
            "Role",
            "more",
            json!({"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]}),
        );
        give(
            &server,
            "roles",
            json!([{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]),
        )
        .await;
        let namer = account(&server, "roles").await;
        assert_eq!(namer.get("/api/v1/namespaces/default/secrets").await.0, 200);
        assert_eq!(
            namer.post(&format!("{RBAC}/namespaces/default/roles"), &all).await.0,
            403,
            "no escalation"
        );
    }

    #[tokio::test]
    async fn reviews_say_who_a_token_is_and_what_a_user_may() {
        let server = start_with_crd().await;
        let user = account(&server, "bot").await;
        give(
        &server,
        "bot",
        json!([{"apiGroups": ["tiffany.dev"], "resources": ["faragents/exec"], "resourceNames": ["a"], "verbs": ["create"]}]),
    )
    .await;
        let review = async |token: &str, audiences: Value| {
            let body = json!({"spec": {"token": token, "audiences": audiences}});
            let (code, body) = server.post("/apis/authentication.k8s.io/v1/tokenreviews", &body).await;
            assert_eq!(code, 201, "{body}");
            body["status"].clone()
        };
        let status = review(&user.token, json!([])).await;
        assert_eq!(status["authenticated"], true, "{status}");
        assert_eq!(status["user"]["username"], "system:serviceaccount:default:bot");
        assert_eq!(
            status["user"]["groups"],
            json!([
                "system:serviceaccounts",
                "system:serviceaccounts:default",
                "system:authenticated"
            ])
        );
        assert_eq!(review(&server.token, json!([])).await["user"]["username"], "far-admin");
        assert_eq!(review("garbage", json!([])).await["authenticated"], Value::Null);
        assert_eq!(
            review(&user.token, json!(["elsewhere"])).await["authenticated"],
            Value::Null
        );
        let path = format!("{ACCOUNTS}/bot/token");
        let (_, elsewhere) = server.post(&path, &json!({"spec": {"audiences": ["elsewhere"]}})).await;
        let elsewhere = elsewhere["status"]["token"].as_str().unwrap();
        assert_eq!(
            review(elsewhere, json!(["elsewhere", "x"])).await["audiences"],
            json!(["elsewhere"])
        );
        assert_eq!(
            review(elsewhere, json!([])).await["authenticated"],
            Value::Null,
            "not for the API"
        );
        let mut stranger = server.client.clone();
        stranger.token = elsewhere.to_owned();
        assert_eq!(stranger.get("/version").await.0, 401);

        let attributes = |name: &str| json!({"verb": "create", "group": "tiffany.dev", "resource": "faragents", "subresource": "exec", "namespace": "default", "name": name});
        for (name, expected) in [("a", true), ("b", false)] {
            let spec =
                json!({"spec": {"user": "system:serviceaccount:default:bot", "resourceAttributes": attributes(name)}});
            let (_, body) = server
                .post("/apis/authorization.k8s.io/v1/subjectaccessreviews", &spec)
                .await;
            assert_eq!(body["status"]["allowed"], expected, "{body}");
            let spec = json!({"spec": {"resourceAttributes": attributes(name)}});
            let (_, body) = user
                .post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &spec)
                .await;
            assert_eq!(body["status"]["allowed"], expected, "{body}");
        }
        // To ask about others is a right of its own.
        let spec = json!({"spec": {"user": "far-admin", "resourceAttributes": attributes("a")}});
        assert_eq!(
            user.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", &spec)
                .await
                .0,
            403
        );
        let token = json!({"spec": {"token": server.token}});
        assert_eq!(
            user.post("/apis/authentication.k8s.io/v1/tokenreviews", &token).await.0,
            403
        );
        for bad in [
            json!({"spec": {"user": "x"}}),
            json!({"spec": {"resourceAttributes": attributes("a")}}),
        ] {
            assert_eq!(
                server
                    .post("/apis/authorization.k8s.io/v1/subjectaccessreviews", &bad)
                    .await
                    .0,
                400,
                "{bad}"
            );
        }
    }

    #[tokio::test]
    async fn a_token_ends_with_its_time_and_with_its_account() {
        let server = start_with_crd().await;
        let (one, two) = (account(&server, "one").await, account(&server, "two").await);
        assert_eq!((one.get("/version").await.0, two.get("/version").await.0), (200, 200));
        assert_eq!(server.delete(&format!("{ACCOUNTS}/one")).await.0, 200);
        assert_eq!((one.get("/version").await.0, two.get("/version").await.0), (401, 200));
        // One of the same name is another account.
        account(&server, "one").await;
        assert_eq!(one.get("/version").await.0, 401);
        server.api.expire_tokens();
        assert_eq!(two.get("/version").await.0, 401);
        assert_eq!(server.get("/version").await.0, 200, "the administrator's stays");
        assert_eq!(
            server.post(&format!("{ACCOUNTS}/nobody/token"), &json!({})).await.0,
            404
        );
        assert_eq!(server.get(&format!("{ACCOUNTS}/two/token")).await.0, 405);
    }
}
