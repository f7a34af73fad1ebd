//! The program itself: its commands, its files, its signals.
#![allow(clippy::unwrap_used)] // A panic in a test's helper is the report.

mod support;

use std::{
    path::Path,
    process::{Command, Output},
};

use support::{server::Server, until};

fn far_controller(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_far-controller"))
        .args(args)
        .output()
        .unwrap()
}

fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

#[test]
fn crds_prints_every_crd_and_writes_them_where_told() {
    let output = far_controller(&["crds"]);
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(printed.contains("name: faragents.tiffany.dev") && printed.contains("name: farnodes.tiffany.dev"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert!(far_controller(&["crds", "--out-dir", path]).status.success());
    let files = std::fs::read_dir(folder.path()).unwrap();
    let written: Vec<String> = files.map(|file| text(&file.unwrap().path()).unwrap()).collect();
    assert_eq!(printed.matches("---\n").count(), written.len());
    assert!(written.iter().all(|text| printed.contains(text.as_str())));
}

#[test]
fn bad_arguments_are_named() {
    for (args, name) in [
        (
            ["run", "--state-dir", "/x", "--heartbeat-ms", "1"].as_slice(),
            "--heartbeat-ms",
        ),
        (
            ["run", "--state-dir", "/x", "--node-lost-after", "soon"].as_slice(),
            "--node-lost-after",
        ),
        (
            ["token", "create", "--state-dir", "/x", "--seconds", "7200"].as_slice(),
            "--seconds",
        ),
        (["run"].as_slice(), "--state-dir"),
    ] {
        let output = far_controller(args);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(2) && errors.contains(name),
            "{args:?}: {errors}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_when_it_serves_and_ends_on_term_with_the_lead_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let api = Server::start(folder.path(), &[]).await;
    std::fs::write(at("kubeconfig"), api.kubeconfig()).unwrap();
    let mut process = tokio::process::Command::new(env!("CARGO_BIN_EXE_far-controller"))
        .arg("run")
        .args(["--kubeconfig".as_ref(), at("kubeconfig").as_os_str()])
        .args(["--state-dir".as_ref(), at("state").as_os_str()])
        .args(["--ready-file".as_ref(), at("ready").as_os_str()])
        .args(["--issue-join-token-file".as_ref(), at("token").as_os_str()])
        .args(["--ca-out".as_ref(), at("ca.pem").as_os_str()])
        .arg("--install-crds")
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let address = until("the ready file", async || text(&at("ready"))).await;
    assert!(address.trim().parse::<std::net::SocketAddr>().unwrap().port() > 0);
    assert!(text(&at("token")).unwrap().starts_with("far-join-"));
    assert!(text(&at("ca.pem")).unwrap().starts_with("-----BEGIN CERTIFICATE-----"));

    let state = at("state");
    let state = state.to_str().unwrap();
    let token = far_controller(&["token", "create", "--state-dir", state, "--blade", "b1"]);
    assert!(String::from_utf8(token.stdout).unwrap().starts_with("far-join-"));

    let pid = process.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let ended = tokio::time::timeout(support::PATIENCE, process.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(ended.code(), Some(0));
    let kubeconfig = kube::config::Kubeconfig::from_yaml(&api.kubeconfig()).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
        .await
        .unwrap();
    let client = kube::Client::try_from(config).unwrap();
    let leases: kube::Api<k8s_openapi::api::coordination::v1::Lease> = kube::Api::namespaced(client, "far-system");
    let lease = leases.get("far-controller").await.unwrap().spec.unwrap();
    assert_eq!(lease.holder_identity.as_deref(), Some(""));
}

/// What only far-devapi can do: see [`support::server`].
mod embedded {
    use far_devapi::DevApi;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn it_leads_again_after_the_api_was_away_for_longer_than_its_lease() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let api = DevApi::start(far_devapi::Config::new(at("devapi"))).await.unwrap();
        let listen = api.url.strip_prefix("https://").unwrap().parse().unwrap();
        std::fs::write(at("kubeconfig"), &api.kubeconfig).unwrap();
        let _process = tokio::process::Command::new(env!("CARGO_BIN_EXE_far-controller"))
            .args(["run", "--install-crds", "--lease-duration", "1"])
            .args(["--kubeconfig".as_ref(), at("kubeconfig").as_os_str()])
            .args(["--state-dir".as_ref(), at("state").as_os_str()])
            .args(["--ready-file".as_ref(), at("ready").as_os_str()])
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let before = until("the ready file", async || text(&at("ready"))).await;
        std::fs::remove_file(at("ready")).unwrap();
        let epoch = text(&at("state/epoch")).unwrap();
        api.shutdown().await;
        // The lease runs out while there is no API; then the same API is back.
        until("the lead to be lost", async || {
            std::fs::File::open(at("state/lock")).ok()?.try_lock().ok()
        })
        .await;
        let api = DevApi::start(far_devapi::Config {
            listen,
            ..far_devapi::Config::new(at("devapi"))
        })
        .await
        .unwrap();
        let after = until("the ready file again", async || text(&at("ready"))).await;
        assert_eq!(before, after, "blades find it where it was");
        assert!(text(&at("state/epoch")).unwrap() > epoch);
        let kubeconfig = kube::config::Kubeconfig::from_yaml(&api.kubeconfig).unwrap();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
            .await
            .unwrap();
        let agents: kube::Api<far_api::FarAgent> =
            kube::Api::namespaced(kube::Client::try_from(config).unwrap(), "default");
        let agent = serde_json::from_str(
            r#"{"apiVersion":"tiffany.dev/v1","kind":"FarAgent","metadata":{"name":"a"},"spec":{"image":"a"}}"#,
        );
        agents.create(&Default::default(), &agent.unwrap()).await.unwrap();
        until("the agent to be judged", async || agents.get("a").await.unwrap().status).await;
    }
}
