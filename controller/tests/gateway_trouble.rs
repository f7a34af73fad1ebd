//! The user gateway when the Kubernetes API fails, tokens end, and strangers come in crowds. The modules named
//! `embedded` ask the API for faults, which a real one has none of.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use far_devapi::faults::{Action, Fault, Match};
use far_proto::node::{Identity, StatsRequest};
use support::{
    Cluster, until,
    users::{ALL, Rule},
};
use tokio::{io::AsyncReadExt, net::TcpStream};
use tonic::Code;

async fn start() -> Cluster {
    Cluster::start_with(|config| config.gateway_listen = Some("127.0.0.1:0".parse().unwrap())).await
}

fn of_default() -> StatsRequest {
    StatsRequest {
        identity: Some(Identity {
            namespace: "default".into(),
            ..Identity::default()
        }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_strangers_is_bounded_and_keeps_nobody_out() {
    let cluster = start().await;
    let token = cluster.user("jane", ALL).await;
    let address = cluster.gateway.unwrap();
    let mut early = TcpStream::connect(address).await.unwrap();
    // They say nothing, or half a handshake, and stay.
    let mut crowd = Vec::new();
    for _ in 0..600 {
        crowd.push(TcpStream::connect(address).await.unwrap());
    }
    // The first of them gave its place up.
    let mut buffer = [0; 1];
    let read = tokio::time::timeout(support::PATIENCE, early.read(&mut buffer)).await;
    assert!(
        matches!(read, Ok(Ok(0) | Err(_))),
        "closed, although it was within its time"
    );
    let mut client = cluster.inside(&token).await;
    client.stats(of_default()).await.unwrap();
    // Who has shown a token keeps its connection, however many come after it.
    for _ in 0..600 {
        crowd.push(TcpStream::connect(address).await.unwrap());
    }
    client.stats(of_default()).await.unwrap();
    // Strangers with TLS and bad tokens cost the API a bounded number of questions at a time, and also find an end.
    let mut asking = tokio::task::JoinSet::new();
    for n in 0..64 {
        let mut client = cluster.inside(&format!("garbage-{n}")).await;
        asking.spawn(async move { client.stats(of_default()).await.err().unwrap().code() });
    }
    while let Some(code) = asking.join_next().await {
        assert_eq!(code.unwrap(), Code::Unauthenticated);
    }
    client.stats(of_default()).await.unwrap();
    drop(crowd);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_apis_door_is_not_filled_by_strangers_either() {
    let cluster = Cluster::start().await;
    let mut crowd = Vec::new();
    for _ in 0..600 {
        crowd.push(TcpStream::connect(&cluster.address).await.unwrap());
    }
    let token = cluster.new_token(Some("b1"));
    let joined = tokio::time::timeout(
        Duration::from_secs(60),
        support::blade::join(&cluster, &token, "b1", "b1"),
    );
    joined.await.expect("an answer in spite of them").unwrap();
    drop(crowd);
}

mod embedded {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_api_that_fails_is_named_and_lets_nobody_in() {
        let cluster = start().await;
        let token = cluster.user("jane", ALL).await;
        for (resource, kind) in [
            ("tokenreviews", "TokenReview"),
            ("subjectaccessreviews", "SubjectAccessReview"),
        ] {
            let on = Match {
                verb: Some("create".into()),
                resource: Some(resource.into()),
                ..Match::default()
            };
            let action = Action::Answer {
                code: 500,
                retry_after: None,
            };
            assert!(cluster.api.faults.add(Fault {
                on,
                action,
                times: 1000
            }));
            let mut client = cluster.inside(&token).await;
            let refused = client.stats(of_default()).await.err().unwrap();
            assert_eq!(refused.code(), Code::Unavailable, "{refused}");
            assert!(refused.message().contains(kind), "{refused}");
            cluster.api.faults.clear();
            if resource == "subjectaccessreviews" {
                // A no for the API's sake is not kept.
                client.stats(of_default()).await.unwrap();
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_token_that_ended_is_refused_and_a_right_that_was_withdrawn_too() {
        let cluster = start().await;
        let ended = cluster.user("jane", ALL).await;
        cluster.api.expire_tokens();
        let refused = cluster.inside(&ended).await.stats(of_default()).await.err().unwrap();
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
        // What the API said is kept for moments only.
        let token = cluster.user("bob", &[Rule(&["get"], "faragents/stats", &[])]).await;
        let mut client = cluster.inside(&token).await;
        client.stats(of_default()).await.unwrap();
        let bindings: kube::Api<k8s_openapi::api::rbac::v1::RoleBinding> =
            kube::Api::default_namespaced(cluster.client.clone());
        bindings.delete("bob", &Default::default()).await.unwrap();
        until("the right to be gone", async || {
            let refused = client.stats(of_default()).await.err()?;
            (refused.code() == Code::PermissionDenied).then_some(())
        })
        .await;
        cluster.api.expire_tokens();
        until("the token to be gone", async || {
            let refused = client.stats(of_default()).await.err()?;
            (refused.code() == Code::Unauthenticated).then_some(())
        })
        .await;
    }
}
