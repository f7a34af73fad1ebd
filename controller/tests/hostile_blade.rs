//! A blade with a good certificate and bad intentions: it gets nothing of others and is believed about itself only.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    io::Write,
    sync::{Arc, Mutex, OnceLock},
};

use far_proto::{
    controller::{HeartbeatRequest, RenewRequest},
    node::{EndReason, Phase},
};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, ResourceExt, api::PostParams};
use serde_json::{Value, json};
use support::{
    Cluster,
    blade::{FakeBlade, capacity, client, join, renew},
    until,
};
use tonic::Code;

fn heartbeat(endpoint: &str) -> HeartbeatRequest {
    HeartbeatRequest {
        endpoint: endpoint.into(),
        capacity: Some(capacity(1000, 1024)),
        labels: Default::default(),
    }
}

/// Everything that this program logs, at every level.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

static LOGGED: OnceLock<Logged> = OnceLock::new();

/// Before the first cluster starts: later ones keep this subscriber.
fn log() -> &'static Logged {
    LOGGED.get_or_init(|| {
        let logged = Logged::default();
        let writer = logged.clone();
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::new("trace"))
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        logged
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_reaches_the_blade_that_runs_the_agent_and_nothing_else() {
    const CANARY: &str = "canary-3f9c1e77d0";
    let logged = log();
    let cluster = Cluster::start_with(|config| config.gateway_listen = Some("127.0.0.1:0".parse().unwrap())).await;
    let own = FakeBlade::start(&cluster, "own", capacity(4000, 4096)).await;
    let other = FakeBlade::start(&cluster, "other", capacity(4000, 4096)).await;
    let secrets: Api<Secret> = Api::default_namespaced(cluster.client.clone());
    let secret: Secret =
        serde_json::from_value(json!({"metadata": {"name": "s"}, "stringData": {"key": CANARY}})).unwrap();
    secrets.create(&PostParams::default(), &secret).await.unwrap();
    let spec = json!({"image": "i", "nodeName": "own",
        "env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}}],
        "files": [{"path": "/key", "secretKeyRef": {"name": "s", "key": "key"}}]});
    let uid = cluster.create("a", spec).await.uid().unwrap();
    until("its own blade to have it", async || own.fake.phase(&uid)).await;
    let sent = own.fake.spec(&uid).unwrap();
    assert_eq!(sent.env[0].value, CANARY, "it does reach the blade that runs the agent");
    assert_eq!(sent.files[0].data, CANARY.as_bytes());
    // The other blade claims the agent in every way it can.
    other.fake.lies_about(&uid, Phase::Running);
    // A wrong reference, so that errors about it are written, and the whole life to its end.
    let wrong =
        json!({"image": "i", "env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "nothing"}}}]});
    cluster.create("wrong", wrong).await;
    cluster
        .wait("wrong", "to say what is missing", |status| {
            status.to_string().contains("nothing")
        })
        .await;
    own.fake.running(&uid);
    cluster.wait_phase("a", "Running").await;
    own.fake.ended(&uid, EndReason::Completed, Some(0), "done");
    cluster.wait_phase("a", "Completed").await;

    assert_eq!(other.fake.ensured(), 0, "the other blade was asked for nothing");
    let mut texts = Vec::new();
    for path in [
        "/apis/tiffany.dev/v1/faragents",
        "/apis/tiffany.dev/v1alpha1/farnodes",
        "/apis/events.k8s.io/v1/events",
        "/api/v1/configmaps",
        "/apis/coordination.k8s.io/v1/leases",
    ] {
        let list: Value = cluster
            .client
            .request(http_get(path))
            .await
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(
            !list["items"].as_array().unwrap().is_empty(),
            "{path} has something to look at"
        );
        texts.push((path.to_owned(), list.to_string().into_bytes()));
    }
    let mut folders = vec![cluster.dir.path().join("controller")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                texts.push((path.display().to_string(), std::fs::read(&path).unwrap()));
            }
        }
    }
    texts.push(("the log".to_owned(), logged.0.lock().unwrap().clone()));
    let log = String::from_utf8_lossy(&texts.last().unwrap().1).into_owned();
    assert!(log.contains("the agent moved on"), "the log was caught");
    // As it is, in base64 (the API's form), and as the Debug of bytes.
    let forms = [
        CANARY.to_owned(),
        "Y2FuYXJ5LTNmOWMxZTc3ZDA".to_owned(),
        format!("{:?}", CANARY.as_bytes()),
    ];
    for (place, text) in &texts {
        for form in &forms {
            let has = text.windows(form.len()).any(|part| part == form.as_bytes());
            assert!(!has, "{form} is in {place}");
        }
    }
}

fn http_get(path: &str) -> http::Request<Vec<u8>> {
    http::Request::get(path).body(Vec::new()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_blade_says_of_another_ones_agent_is_not_believed() {
    let _ = log();
    let cluster = Cluster::start().await;
    let own = FakeBlade::start(&cluster, "own", capacity(4000, 4096)).await;
    let hostile = FakeBlade::start(&cluster, "hostile", capacity(4000, 4096)).await;
    let uid = cluster
        .create("a", json!({"image": "i", "nodeName": "own"}))
        .await
        .uid()
        .unwrap();
    until("its own blade to have it", async || own.fake.phase(&uid)).await;
    hostile.fake.lies_about(&uid, Phase::Running);
    hostile.fake.ended(&uid, EndReason::Error, Some(66), "lie");
    own.fake.running(&uid);
    let running = cluster.wait_phase("a", "Running").await;
    assert_eq!(running["status"]["nodeName"], "own");
    own.fake.ended(&uid, EndReason::Completed, Some(0), "done");
    let ended = cluster.wait_phase("a", "Completed").await;
    assert_eq!(ended["status"]["exitCode"], 0);
    assert!(!ended.to_string().contains("lie"), "{ended}");
    // Ten thousand agents that never were: kept apart, and the controller goes on.
    for n in 0..10_000 {
        hostile.fake.lies_about(&format!("ghost-{n}"), Phase::Running);
    }
    let more = cluster
        .create("b", json!({"image": "i", "nodeName": "own"}))
        .await
        .uid()
        .unwrap();
    until("the honest blade to get more", async || own.fake.phase(&more)).await;
    assert_eq!(cluster.agents().list(&Default::default()).await.unwrap().items.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_cannot_become_another_by_any_call() {
    let _ = log();
    let cluster = Cluster::start().await;
    let victim = FakeBlade::start(&cluster, "victim", capacity(4000, 4096)).await;
    let before = cluster.nodes().get("victim").await.unwrap();
    let hostile = join(&cluster, &cluster.new_token(None), "hostile", "hostile")
        .await
        .unwrap();
    // A certificate for the victim: by renewal, and by a request that names both.
    assert_eq!(
        renew(&cluster, &hostile, "victim").await.err().unwrap().code(),
        Code::PermissionDenied
    );
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    for names in [
        vec![
            "hostile.blade.far.internal".to_owned(),
            "victim.blade.far.internal".to_owned(),
        ],
        vec![
            "hostile.blade.far.internal".to_owned(),
            "controller.far.internal".to_owned(),
        ],
        vec!["controller.far.internal".to_owned()],
    ] {
        let params = rcgen::CertificateParams::new(names.clone()).unwrap();
        let csr_pem = params.serialize_request(&key).unwrap().pem().unwrap();
        let refused = client(&cluster, Some(&hostile))
            .await
            .renew(RenewRequest { csr_pem })
            .await;
        assert_eq!(refused.err().unwrap().code(), Code::PermissionDenied, "{names:?}");
    }
    // Its heartbeat with the victim's endpoint: the controller looks for `hostile` there, finds the victim's certificate,
    // and calls nobody.
    let endpoint = before.status.as_ref().unwrap().endpoint.clone().unwrap();
    client(&cluster, Some(&hostile))
        .await
        .heartbeat(heartbeat(&endpoint))
        .await
        .unwrap();
    let uid = cluster
        .create("a", json!({"image": "i", "nodeName": "hostile"}))
        .await
        .uid()
        .unwrap();
    cluster
        .wait("a", "to wait", |status| status["phase"] == "Pending")
        .await;
    assert_eq!(
        victim.fake.phase(&uid),
        None,
        "the victim was not taken for the hostile blade"
    );
    assert_eq!(cluster.nodes().get("victim").await.unwrap().status, before.status);
    // Open tokens do not make it the victim either.
    let taken = join(&cluster, &cluster.new_token(None), "victim", "victim")
        .await
        .err()
        .unwrap();
    assert_eq!(taken.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_changes_is_written_a_few_times_and_other_blades_go_on() {
    let _ = log();
    let cluster = Cluster::start().await;
    let hostile = join(&cluster, &cluster.new_token(None), "hostile", "hostile")
        .await
        .unwrap();
    let mut flooding = tokio::task::JoinSet::new();
    for task in 0..4_u32 {
        let mut client = client(&cluster, Some(&hostile)).await;
        flooding.spawn(async move {
            let (mut taken, mut refused) = (0_u64, 0_u64);
            for n in 0..500_u32 {
                let mut request = heartbeat("127.0.0.1:1");
                request.labels.insert("n".into(), format!("{task}-{n}"));
                match client.heartbeat(request).await {
                    Ok(_) => taken += 1,
                    // Unavailable: two of its own first heartbeats raced to make the same object.
                    Err(status) if matches!(status.code(), Code::ResourceExhausted | Code::Unavailable) => refused += 1,
                    Err(status) => panic!("{status}"),
                }
            }
            (taken, refused)
        });
    }
    // Meanwhile an honest one joins, is heard and works.
    let begin = std::time::Instant::now();
    let honest = FakeBlade::start(&cluster, "honest", capacity(4000, 4096)).await;
    let uid = cluster
        .create("a", json!({"image": "i", "nodeName": "honest"}))
        .await
        .uid()
        .unwrap();
    until("the honest blade to have it", async || honest.fake.phase(&uid)).await;
    let (mut taken, mut refused) = (0, 0);
    while let Some(counts) = flooding.join_next().await {
        let counts = counts.unwrap();
        (taken, refused) = (taken + counts.0, refused + counts.1);
    }
    // 20 at once and one a second, however long it took.
    assert!(taken <= 22 + begin.elapsed().as_secs(), "{taken} changes were written");
    assert_eq!(taken + refused, 2000);
}

#[tokio::test(flavor = "multi_thread")]
async fn renewing_again_and_again_hides_no_certificate_from_revocation() {
    let _ = log();
    let cluster = Cluster::start().await;
    let first = join(&cluster, &cluster.new_token(None), "hostile", "hostile")
        .await
        .unwrap();
    let mut got = vec![first.clone()];
    let refused = loop {
        match renew(&cluster, &first, "hostile").await {
            Ok(newer) => got.push(newer),
            Err(status) => break status,
        }
        assert!(got.len() < 100, "certificates of one blade are bounded");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    let revocations = far_controller::tokens::Revocations::new(&cluster.dir.path().join("controller"));
    assert_eq!(revocations.revoke("hostile").unwrap(), got.len());
    for credentials in &got {
        let refused = renew(&cluster, credentials, "hostile").await.err().unwrap();
        assert_eq!(refused.code(), Code::PermissionDenied);
    }
    // Also once the blade is trusted again: the old ones stay dead.
    join(&cluster, &cluster.new_token(Some("hostile")), "hostile", "hostile")
        .await
        .unwrap();
    for credentials in &got {
        let refused = renew(&cluster, credentials, "hostile").await.err().unwrap();
        assert_eq!(refused.code(), Code::PermissionDenied);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blade_that_speaks_of_more_agents_than_any_can_have_gets_none() {
    let _ = log();
    let cluster = Cluster::start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(4000, 4096)).await;
    let (credentials, fake) = blade.die().await;
    for n in 0..=65_536 {
        fake.lies_about(&format!("ghost-{n}"), Phase::Running);
    }
    let blade = FakeBlade::resume(&cluster, "b1", capacity(4000, 4096), credentials, fake).await;
    let uid = cluster.create("a", json!({"image": "i"})).await.uid().unwrap();
    let waits = cluster
        .wait("a", "to wait", |status| status["reason"] == "Unschedulable")
        .await;
    assert_eq!(waits["status"]["message"], "0/1 blades are available: 1 not reachable.");
    blade.fake.lose_ledger();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
}
