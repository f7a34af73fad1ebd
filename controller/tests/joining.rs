//! Who a blade is: tokens, certificates, and what a hostile blade can not do.

mod support;

use far_proto::{
    controller::HeartbeatRequest,
    node::{EnsureAgentRequest, node_client::NodeClient},
};
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Secret};
use kube::{Api, ResourceExt};
use serde_json::json;
use support::{
    Cluster,
    blade::{FakeBlade, capacity, client, join, renew},
    until,
};
use tonic::{
    Code,
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_join_token_works_once() {
    let cluster = Cluster::start().await;
    let token = std::fs::read_to_string(cluster.token_file()).unwrap();
    join(&cluster, token.trim(), "b1", "b1").await.unwrap();
    let again = join(&cluster, token.trim(), "b1", "b1").await.err().unwrap();
    assert_eq!(again.code(), Code::Unauthenticated);
    let unknown = join(&cluster, "far-join-0", "b1", "b1").await.err().unwrap();
    assert_eq!(
        unknown.message(),
        again.message(),
        "nobody learns whether a token ever was one"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_another_blade_and_a_request_for_another_name_are_refused() {
    let cluster = Cluster::start().await;
    let bound = cluster.new_token(Some("b1"));
    assert_eq!(
        join(&cluster, &bound, "b2", "b2").await.err().unwrap().code(),
        Code::Unauthenticated
    );
    assert_eq!(
        join(&cluster, &cluster.new_token(None), "b1", "b2")
            .await
            .err()
            .unwrap()
            .code(),
        Code::PermissionDenied
    );
    assert_eq!(
        join(&cluster, &cluster.new_token(None), "Not.A.Label", "x")
            .await
            .err()
            .unwrap()
            .code(),
        Code::InvalidArgument
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn renewing_needs_a_certificate_of_the_same_blade() {
    let cluster = Cluster::start().await;
    let b1 = join(&cluster, &cluster.new_token(None), "b1", "b1").await.unwrap();
    let newer = renew(&cluster, &b1, "b1").await.unwrap();
    assert_ne!(newer.certificate_pem, b1.certificate_pem);
    assert_eq!(
        renew(&cluster, &newer, "b2").await.err().unwrap().code(),
        Code::PermissionDenied
    );
    let heartbeat = HeartbeatRequest {
        endpoint: "127.0.0.1:1".into(),
        capacity: Some(capacity(1, 1)),
        labels: Default::default(),
    };
    let anonymous = client(&cluster, None).await.heartbeat(heartbeat).await.err().unwrap();
    assert_eq!(anonymous.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_blade_is_refused_until_it_joins_again() {
    let cluster = Cluster::start().await;
    let b1 = join(&cluster, &cluster.new_token(None), "b1", "b1").await.unwrap();
    let revocations = far_controller::tokens::Revocations::new(&cluster.dir.path().join("controller"));
    assert_eq!(revocations.revoke("b1").unwrap(), 1);
    assert_eq!(
        renew(&cluster, &b1, "b1").await.err().unwrap().code(),
        Code::PermissionDenied
    );
    let again = join(&cluster, &cluster.new_token(Some("b1")), "b1", "b1")
        .await
        .unwrap();
    renew(&cluster, &again, "b1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_speaks_for_itself_only_and_may_not_use_the_controllers_labels() {
    let cluster = Cluster::start().await;
    let honest = FakeBlade::start(&cluster, "honest", capacity(4000, 4096)).await;
    let before = cluster.nodes().get("honest").await.unwrap().status;
    let hostile = join(&cluster, &cluster.new_token(None), "hostile", "hostile")
        .await
        .unwrap();
    let mut api = client(&cluster, Some(&hostile)).await;
    let mut request = HeartbeatRequest {
        endpoint: "127.0.0.1:1".into(),
        capacity: Some(capacity(1, 1)),
        labels: Default::default(),
    };
    api.heartbeat(request.clone()).await.unwrap();
    request.labels.insert("tiffany.dev/blade".into(), "honest".into());
    assert_eq!(
        api.heartbeat(request).await.err().unwrap().code(),
        Code::InvalidArgument
    );
    assert_eq!(
        cluster.nodes().get("honest").await.unwrap().status,
        before,
        "another blade's FarNode is untouched"
    );
    assert_eq!(
        cluster
            .nodes()
            .get("hostile")
            .await
            .unwrap()
            .status
            .unwrap()
            .endpoint
            .as_deref(),
        Some("127.0.0.1:1")
    );
    drop(honest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_ca_reaches_neither_side() {
    let cluster = Cluster::start().await;
    let other = Cluster::start().await;
    let foreign = join(&other, &other.new_token(None), "b1", "b1").await.unwrap();
    assert!(renew(&cluster, &foreign, "b1").await.is_err());

    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let endpoint = cluster
        .nodes()
        .get("b1")
        .await
        .unwrap()
        .status
        .unwrap()
        .endpoint
        .unwrap();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&blade.credentials.ca_pem))
        .identity(Identity::from_pem(&foreign.certificate_pem, &foreign.key_pem))
        .domain_name("b1.blade.far.internal");
    let channel = Endpoint::from_shared(format!("https://{endpoint}"))
        .unwrap()
        .tls_config(tls)
        .unwrap()
        .connect_lazy();
    assert!(
        NodeClient::new(channel)
            .ensure_agent(EnsureAgentRequest::default())
            .await
            .is_err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_in_the_state_folder_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let cluster = Cluster::start().await;
    let mode = |path: std::path::PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let state = cluster.dir.path().join("controller");
    assert_eq!(
        (mode(state.clone()), mode(state.join("ca")), mode(state.join("tokens"))),
        (0o700, 0o700, 0o700)
    );
    assert_eq!(
        (mode(state.join("ca/ca-key.pem")), mode(cluster.token_file())),
        (0o600, 0o600)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_has_joined_is_replaced_only_with_a_token_bound_to_it() {
    let cluster = Cluster::start().await;
    join(&cluster, &cluster.new_token(None), "b1", "b1").await.unwrap();
    let open = cluster.new_token(None);
    let taken = join(&cluster, &open, "b1", "b1").await.err().unwrap();
    assert_eq!(taken.code(), Code::Unauthenticated);
    assert!(taken.message().contains("--blade"), "{taken}");
    join(&cluster, &open, "b2", "b2").await.unwrap();
    join(&cluster, &cluster.new_token(Some("b1")), "b1", "b1")
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_holds_a_fresh_join_token_again_as_soon_as_one_was_used() {
    let cluster = Cluster::start().await;
    let used = std::fs::read_to_string(cluster.token_file()).unwrap();
    join(&cluster, used.trim(), "b1", "b1").await.unwrap();
    let fresh = until("another token", async || {
        std::fs::read_to_string(cluster.token_file())
            .ok()
            .filter(|token| *token != used && !token.is_empty())
    })
    .await;
    join(&cluster, fresh.trim(), "b2", "b2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_refused_leaves_its_join_token_unused() {
    let cluster = Cluster::start().await;
    let token = cluster.new_token(Some("b1"));
    let refused = join(&cluster, &token, "b1", "b2").await.err().unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
    join(&cluster, &token, "b1", "b1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_blade_is_not_called_either_until_it_joins_again() {
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    until("the controller to watch it", async || {
        (blade.fake.watchers() == 1).then_some(())
    })
    .await;
    let revocations = far_controller::tokens::Revocations::new(&cluster.dir.path().join("controller"));
    assert_eq!(revocations.revoke("b1").unwrap(), 1);
    until("the controller to leave it", async || {
        (blade.fake.watchers() == 0).then_some(())
    })
    .await;
    let uid = cluster.create("later", json!({"image": "a"})).await.uid().unwrap();
    cluster
        .wait("later", "to be told why", |status| status["reason"] == "Unschedulable")
        .await;
    assert_eq!((blade.fake.watchers(), blade.fake.phase(&uid)), (0, None));

    let (_, fake) = blade.die().await;
    let token = cluster.new_token(Some("b1"));
    let credentials = join(&cluster, &token, "b1", "b1").await.unwrap();
    let again = FakeBlade::resume(&cluster, "b1", capacity(4000, 4096), credentials, fake).await;
    until("the blade to have it", async || again.fake.phase(&uid)).await;
}

fn shared_state(cluster: &Cluster) -> Api<Secret> {
    Api::namespaced(cluster.client.clone(), "far-system")
}

/// How many join tokens replicas share.
async fn shared_tokens(cluster: &Cluster) -> usize {
    let shared = shared_state(cluster).get("far-controller-state").await;
    let data = shared
        .expect("a controller that shares its state makes it")
        .data
        .unwrap_or_default();
    data.keys().filter(|key| key.starts_with("tokens.")).count()
}

/// What only far-devapi can do: see [`support::server`].
mod embedded {
    use far_devapi::faults::{Action, Fault, Match};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_replicas_share_is_written_again_after_a_reply_was_lost() {
        let cluster = Cluster::start_with(|config| config.share_state = true).await;
        until("the controller's own token", async || {
            (shared_tokens(&cluster).await == 1).then_some(())
        })
        .await;
        let on = Match {
            verb: Some("update".into()),
            resource: Some("secrets".into()),
            ..Match::default()
        };
        let action = Action::DropAfter;
        assert!(cluster.api.faults.add(Fault { on, action, times: 1 }));
        cluster.new_token(None);
        until("the lost reply", async || {
            (shared_tokens(&cluster).await == 2).then_some(())
        })
        .await;
        assert_eq!(cluster.api.faults.pending(), []);
        cluster.new_token(None);
        until("the next token", async || {
            (shared_tokens(&cluster).await == 3).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_ends_shares_its_last_word_before_it_gives_the_lead_back() {
    let mut cluster = Cluster::start_with(|config| config.share_state = true).await;
    until("its token", async || (shared_tokens(&cluster).await == 1).then_some(())).await;
    cluster.stop_controller().await;
    assert_eq!(shared_tokens(&cluster).await, 0, "its own token was withdrawn");
    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), "far-system");
    let lease = leases.get("far-controller").await.unwrap();
    assert_eq!(lease.spec.as_ref().unwrap().holder_identity.as_deref(), Some(""));
    let version = |version: Option<String>| version.unwrap().parse::<u64>().unwrap();
    let shared = shared_state(&cluster).get("far-controller-state").await.unwrap();
    assert!(version(lease.resource_version()) > version(shared.resource_version()));
}
