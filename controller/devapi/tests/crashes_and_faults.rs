//! What survives `kill -9`, and faults on purpose.
#![allow(clippy::unwrap_used)] // A panic in a test is its report.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{AGENTS, Client, LIMIT, MERGE, agent, start_with_crd};
use far_devapi::faults::{Action, Fault, Match};
use http_body_util::BodyExt as _;
use hyper::client::conn::http1::SendRequest;
use serde_json::json;

/// The real binary; killed at the end.
struct Process {
    child: Child,
    client: Client,
}

impl Process {
    async fn start(folder: &Path) -> Self {
        let (ready, kubeconfig) = (folder.join("ready"), folder.join("kubeconfig"));
        let _ = std::fs::remove_file(&ready); // Of the run before: it would be seen before the new one removes it.
        let child = Command::new(env!("CARGO_BIN_EXE_far-devapi"))
            .arg("--data-dir")
            .arg(folder.join("data"))
            .arg("--ready-file")
            .arg(&ready)
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let comes = async {
            while !ready.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, comes).await.expect("the server gets ready");
        let client = Client::from_kubeconfig(&std::fs::read_to_string(&kubeconfig).unwrap());
        assert_eq!(
            std::fs::read_to_string(&ready).unwrap(),
            format!("https://{}", client.address)
        );
        Self { child, client }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn nothing_acknowledged_is_lost_by_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(folder.path()).await;
    process.client.install_crd().await;
    let (token, address) = (process.client.token.clone(), process.client.address.clone());
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let client = process.client.clone();
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for number in 0.. {
                    let name = format!("w{writer}-{number}");
                    let body = agent(&name, json!({"image": "i"})).to_string().into_bytes();
                    match client
                        .try_call("POST", AGENTS, &[("content-type", "application/json")], body)
                        .await
                    {
                        Ok(answer) if answer.code == 201 => {
                            let revision: u64 = answer.body["metadata"]["resourceVersion"]
                                .as_str()
                                .unwrap()
                                .parse()
                                .unwrap();
                            acknowledged.push((name, revision));
                        }
                        _ => break,
                    }
                }
                acknowledged
            })
        })
        .collect();
    let (mut watch, mut seen) = (process.client.watch(&format!("{AGENTS}?watch=1")).await, 0);
    while seen < 40 {
        watch.next().await.expect("the server lives");
        seen += 1;
    }
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    assert!(
        acknowledged.len() >= 30,
        "{} writes were acknowledged before the kill",
        acknowledged.len()
    );

    let process = Process::start(folder.path()).await;
    assert_eq!(
        (&process.client.token, &process.client.address),
        (&token, &address),
        "clients find it again"
    );
    let (_, list) = process.client.get(AGENTS).await;
    let kept: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["metadata"]["name"].as_str().unwrap())
        .collect();
    for (name, _) in &acknowledged {
        assert!(kept.contains(&name.as_str()), "{name} was acknowledged and is gone");
    }
    let newest = acknowledged.iter().map(|(_, revision)| *revision).max().unwrap();
    let (_, made) = process
        .client
        .post(AGENTS, &agent("after", json!({"image": "i"})))
        .await;
    let revision: u64 = made["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    assert!(revision > newest, "versions go on after the crash");
}

#[tokio::test]
async fn a_fault_answers_the_next_requests_and_then_is_gone() {
    let server = start_with_crd().await;
    let on = || Match {
        verb: Some("create".into()),
        resource: Some("faragents".into()),
        ..Match::default()
    };
    for (code, retry_after) in [(409, None), (429, Some(2)), (500, None)] {
        assert!(server.api.faults.add(Fault {
            on: on(),
            action: Action::Answer { code, retry_after },
            times: 1
        }));
        let body = agent("a", json!({"image": "i"})).to_string().into_bytes();
        let answer = server
            .try_call("POST", AGENTS, &[("content-type", "application/json")], body)
            .await
            .unwrap();
        assert_eq!(
            (
                answer.code,
                answer.headers.get("retry-after").map(|v| v.to_str().unwrap())
            ),
            (code, retry_after.map(|_| "2"))
        );
    }
    assert_eq!(server.post(AGENTS, &agent("a", json!({"image": "i"}))).await.0, 201);
    assert!(server.api.faults.pending().is_empty());
}

#[tokio::test]
async fn a_dropped_answer_leaves_the_write_done_and_a_dropped_request_does_not() {
    let server = start_with_crd().await;
    let json = [("content-type", "application/json")];
    for (name, action, exists) in [("before", Action::DropBefore, 404), ("after", Action::DropAfter, 200)] {
        let on = Match {
            verb: Some("create".into()),
            ..Match::default()
        };
        assert!(server.api.faults.add(Fault { on, action, times: 1 }));
        let body = agent(name, json!({"image": "i"})).to_string().into_bytes();
        assert!(
            server.try_call("POST", AGENTS, &json, body).await.is_err(),
            "the connection breaks"
        );
        assert_eq!(server.get(&format!("{AGENTS}/{name}")).await.0, exists);
    }
}

#[tokio::test]
async fn faults_can_be_asked_for_over_the_debug_path() {
    let server = start_with_crd().await;
    let fault = json!({"on": {"verb": "patch", "subresource": "status"}, "action": {"do": "answer", "code": 409, "retryAfterSeconds": null}, "times": 1});
    let (code, body) = server.post("/debug/faults", &fault).await;
    assert_eq!(
        (code, body["pending"].as_array().map(Vec::len)),
        (200, Some(1)),
        "{body}"
    );
    server.post(AGENTS, &agent("a", json!({"image": "i"}))).await;
    let status = json!({"status": {"phase": "Running"}});
    assert_eq!(server.patch(&format!("{AGENTS}/a/status"), MERGE, &status).await.0, 409);
    assert_eq!(server.patch(&format!("{AGENTS}/a/status"), MERGE, &status).await.0, 200);
}

#[tokio::test]
async fn the_debug_path_is_not_there_unless_switched_on() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path()).await;
    assert_eq!(process.client.get("/debug/faults").await.0, 404);
    let (code, version) = process.client.get("/version").await;
    assert_eq!((code, version["major"].as_str()), (200, Some("1")));
}

#[tokio::test]
async fn a_term_signal_ends_the_server_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(folder.path()).await;
    let mut watch = process.client.watch("/api/v1/namespaces?watch=1").await;
    assert_eq!(watch.next().await.unwrap()["type"], "ADDED");
    let pid = process.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let waits = async {
        loop {
            if let Some(status) = process.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let status = tokio::time::timeout(LIMIT, waits).await.expect("the server ends");
    assert!(status.success(), "{status}");
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::metadata(folder.path().join(name))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!((mode("kubeconfig"), mode("data")), (0o600, 0o700));
}

#[tokio::test]
async fn who_never_shows_the_token_is_disconnected_and_who_did_stays() {
    let server = start_with_crd().await;
    let client = &server.client;
    let get = |token: &str| {
        let mut client = client.clone();
        client.token = token.to_owned();
        client.request("GET", AGENTS, &[], Vec::new())
    };
    let ask = async |sender: &mut SendRequest<_>, token: &str| {
        let answer = sender.send_request(get(token)).await.unwrap();
        let code = answer.status().as_u16();
        answer.into_body().collect().await.unwrap();
        code
    };
    let (mut known, known_ended) = client.connect().await.unwrap();
    assert_eq!(ask(&mut known, &client.token).await, 200);
    let (_silent, silent_ended) = client.connect().await.unwrap();
    let (mut guesser, guesser_ended) = client.connect().await.unwrap();
    assert_eq!(ask(&mut guesser, "a guess").await, 401);
    for ended in [silent_ended, guesser_ended] {
        tokio::time::timeout(LIMIT, ended)
            .await
            .expect("a stranger's connection is ended")
            .unwrap();
    }
    assert!(!known_ended.is_finished());
    assert_eq!(ask(&mut known, &client.token).await, 200);
}
