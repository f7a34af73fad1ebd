//! The real kubectl against the server: what users type. Skipped by name where there is no kubectl of at least 1.30;
//! `KUBECTL` names another binary.
#![allow(clippy::unwrap_used)] // A panic in a test is its report.

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{LIMIT, MERGE, Server, start_with_crd};
use serde_json::{Value, json};
use tokio::process::Command;

const MINIMUM_MINOR: u32 = 30;

/// kubectl with its own home (it caches discovery there) and kubeconfig.
struct Kubectl {
    binary: PathBuf,
    server: Server,
}

struct Ran {
    ok: bool,
    out: String,
    err: String,
}

impl Ran {
    /// Output of a command that must succeed.
    #[track_caller]
    fn good(self) -> String {
        assert!(self.ok, "kubectl failed: {}{}", self.out, self.err);
        self.out
    }
    /// Error text of a command that must fail.
    #[track_caller]
    fn bad(self) -> String {
        assert!(!self.ok, "kubectl succeeded: {}", self.out);
        self.err
    }
}

async fn usable(binary: &Path) -> Result<(), String> {
    let shown = Command::new(binary)
        .args(["version", "--client", "-o", "json"])
        .output()
        .await;
    let shown = shown.map_err(|error| format!("{} cannot be run: {error}", binary.display()))?;
    let version: Value =
        serde_json::from_slice(&shown.stdout).map_err(|error| format!("its version is not JSON: {error}"))?;
    let minor = version["clientVersion"]["minor"].as_str().unwrap_or_default();
    let minor: u32 = minor
        .trim_end_matches('+')
        .parse()
        .map_err(|_| format!("its version is unreadable: {minor:?}"))?;
    if minor < MINIMUM_MINOR {
        Err(format!("kubectl 1.{minor} is older than 1.{MINIMUM_MINOR}"))
    } else {
        Ok(())
    }
}

impl Kubectl {
    /// `None`, with a line that names the test, when there is no usable kubectl.
    async fn start(test: &str) -> Option<Self> {
        let binary = std::env::var_os("KUBECTL").map_or_else(|| PathBuf::from("kubectl"), PathBuf::from);
        if let Err(missing) = usable(&binary).await {
            eprintln!("SKIPPED {test}: {missing}");
            return None;
        }
        let server = start_with_crd().await;
        std::fs::write(server.folder.path().join("kubeconfig"), &server.kubeconfig).unwrap();
        Some(Self { binary, server })
    }

    async fn run(&self, arguments: &[&str]) -> Ran {
        self.feed(arguments, "").await
    }

    /// With text on standard input, for `-f -`.
    async fn feed(&self, arguments: &[&str], input: &str) -> Ran {
        use tokio::io::AsyncWriteExt as _;
        let folder = self.server.folder.path();
        let mut child = Command::new(&self.binary)
            .arg("--kubeconfig")
            .arg(folder.join("kubeconfig"))
            .args(arguments)
            .env("HOME", folder)
            .env_remove("KUBECONFIG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).await.unwrap();
        drop(stdin);
        let output = tokio::time::timeout(LIMIT, child.wait_with_output())
            .await
            .expect("kubectl ends")
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ran {
            ok: output.status.success(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    async fn status(&self, name: &str, status: Value) {
        let path = format!("{}/{name}/status", common::AGENTS);
        let (code, body) = self.server.patch(&path, MERGE, &json!({"status": status})).await;
        assert_eq!(code, 200, "{body}");
    }
}

fn manifest(name: &str, extra: &str) -> String {
    format!(
        "apiVersion: tiffany.dev/v1\nkind: FarAgent\nmetadata:\n  name: {name}\n  labels: {{app: demo}}\nspec:\n  image: example.org/agent:1\n  cpu: 1\n  memory: 512Mi\n{extra}"
    )
}

#[tokio::test]
async fn apply_creates_changes_and_leaves_alone() {
    let Some(kubectl) = Kubectl::start("apply_creates_changes_and_leaves_alone").await else {
        return;
    };
    let apply = ["apply", "-f", "-"];
    assert_eq!(
        kubectl.feed(&apply, &manifest("a", "")).await.good(),
        "faragent.tiffany.dev/a created\n"
    );
    assert_eq!(
        kubectl.feed(&apply, &manifest("a", "")).await.good(),
        "faragent.tiffany.dev/a unchanged\n"
    );
    assert_eq!(
        kubectl.feed(&apply, &manifest("a", "  nodeName: n1\n")).await.good(),
        "faragent.tiffany.dev/a configured\n"
    );
    assert_eq!(
        kubectl.feed(&apply, &manifest("a", "")).await.good(),
        "faragent.tiffany.dev/a configured\n"
    );
    let spec = kubectl.run(&["get", "fa", "a", "-o", "jsonpath={.spec}"]).await.good();
    assert_eq!(
        spec,
        r#"{"cpu":1,"image":"example.org/agent:1","memory":"512Mi","restartPolicy":"Never"}"#
    );
    let wrong = kubectl.feed(&apply, &manifest("a", "  imagee: x\n")).await.bad();
    assert!(
        wrong.contains("strict decoding error: unknown field \"spec.imagee\""),
        "{wrong}"
    );
    let immutable = kubectl
        .feed(&apply, &manifest("a", "").replace("agent:1", "agent:2"))
        .await
        .bad();
    assert_eq!(
        immutable,
        "The FarAgent \"a\" is invalid: spec: Forbidden: image is immutable\n"
    );
}

#[tokio::test]
async fn server_side_apply_reports_conflicts_and_can_force() {
    let Some(kubectl) = Kubectl::start("server_side_apply_reports_conflicts_and_can_force").await else {
        return;
    };
    let apply = ["apply", "--server-side", "-f", "-"];
    let text = kubectl.feed(&apply, &manifest("a", "  nodeName: n1\n")).await.good();
    assert_eq!(text, "faragent.tiffany.dev/a serverside-applied\n");
    let other = manifest("a", "  nodeName: n2\n");
    let conflict = kubectl
        .feed(&["apply", "--server-side", "--field-manager=other", "-f", "-"], &other)
        .await
        .bad();
    assert!(
        conflict.contains("Apply failed with 1 conflict: conflict with \"kubectl\": .spec.nodeName"),
        "{conflict}"
    );
    kubectl
        .feed(
            &[
                "apply",
                "--server-side",
                "--field-manager=other",
                "--force-conflicts",
                "-f",
                "-",
            ],
            &other,
        )
        .await
        .good();
    assert_eq!(
        kubectl
            .run(&["get", "fa", "a", "-o", "jsonpath={.spec.nodeName}"])
            .await
            .good(),
        "n2"
    );
}

#[tokio::test]
async fn an_object_made_by_apply_can_move_to_server_side_apply() {
    let Some(kubectl) = Kubectl::start("an_object_made_by_apply_can_move_to_server_side_apply").await else {
        return;
    };
    kubectl
        .feed(&["apply", "-f", "-"], &manifest("a", "  nodeName: n1\n"))
        .await
        .good();
    kubectl
        .feed(&["apply", "--server-side", "-f", "-"], &manifest("a", ""))
        .await
        .good();
    let spec = kubectl
        .run(&["get", "fa", "a", "-o", "jsonpath={.spec.nodeName}"])
        .await
        .good();
    assert_eq!(
        spec, "",
        "kubectl moved ownership to the new manager, so what it no longer applies goes"
    );
}

#[tokio::test]
async fn get_prints_columns_and_narrows_by_selectors() {
    let Some(kubectl) = Kubectl::start("get_prints_columns_and_narrows_by_selectors").await else {
        return;
    };
    kubectl
        .feed(
            &["apply", "-f", "-"],
            &format!("{}---\n{}", manifest("a", "  nodeName: n1\n"), manifest("b", "")),
        )
        .await
        .good();
    kubectl.status("a", json!({"phase": "Running"})).await;
    let columns = |text: &str| -> Vec<Vec<String>> {
        text.lines()
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect()
    };
    let plain = columns(&kubectl.run(&["get", "fa"]).await.good());
    assert_eq!(plain[0], ["NAME", "PHASE", "BLADE", "AGE"]);
    assert_eq!(plain[1][..3], ["a", "Running", "n1"]);
    let wide = columns(&kubectl.run(&["get", "faragents", "-o", "wide"]).await.good());
    assert_eq!(
        (wide[0].last().unwrap().as_str(), wide[1].last().unwrap().as_str()),
        ("IMAGE", "example.org/agent:1")
    );
    let yaml = kubectl.run(&["get", "fa", "a", "-o", "yaml"]).await.good();
    assert!(
        yaml.contains("kind: FarAgent") && yaml.contains("phase: Running"),
        "{yaml}"
    );
    for (arguments, expected) in [
        (
            vec!["get", "far", "-l", "app=demo", "-o", "name"],
            "faragent.tiffany.dev/a\nfaragent.tiffany.dev/b\n",
        ),
        (vec!["get", "fa", "-l", "app!=demo", "-o", "name"], ""),
        (
            vec!["get", "fa", "--field-selector", "spec.nodeName=n1", "-o", "name"],
            "faragent.tiffany.dev/a\n",
        ),
        (
            vec![
                "get",
                "fa",
                "--field-selector",
                "status.phase=Running",
                "-A",
                "-o",
                "name",
            ],
            "faragent.tiffany.dev/a\n",
        ),
        (
            vec!["get", "tiffany", "--chunk-size=1", "-o", "name"],
            "faragent.tiffany.dev/a\nfaragent.tiffany.dev/b\n",
        ),
    ] {
        assert_eq!(kubectl.run(&arguments).await.good(), expected, "{arguments:?}");
    }
    let missing = kubectl.run(&["get", "fa", "nobody"]).await.bad();
    assert_eq!(
        missing,
        "Error from server (NotFound): faragents.tiffany.dev \"nobody\" not found\n"
    );
}

#[tokio::test]
async fn kinds_are_listed_and_explained() {
    let Some(kubectl) = Kubectl::start("kinds_are_listed_and_explained").await else {
        return;
    };
    let kinds = kubectl.run(&["api-resources", "--no-headers"]).await.good();
    let row = kinds
        .lines()
        .find(|line| line.starts_with("faragents"))
        .expect("the custom kind");
    assert_eq!(
        row.split_whitespace().collect::<Vec<_>>(),
        ["faragents", "fa,far", "tiffany.dev/v1", "true", "FarAgent"]
    );
    let spec = kubectl.run(&["explain", "faragent.spec"]).await.good();
    assert!(
        spec.contains("What to run.") && spec.contains("image\t<string> -required-"),
        "{spec}"
    );
    let image = kubectl.run(&["explain", "fa.spec.image"]).await.good();
    assert!(
        image.contains("FIELD: image <string>") && image.contains("The OCI image to boot."),
        "{image}"
    );
    let metadata = kubectl.run(&["explain", "fa.metadata.finalizers"]).await.good();
    assert!(metadata.contains("<[]string>"), "{metadata}");
    let secret = kubectl.run(&["explain", "secret.stringData"]).await.good();
    assert!(secret.contains("<map[string]string>"), "{secret}");
    let versions = kubectl.run(&["version", "-o", "json"]).await.good();
    assert!(versions.contains("serverVersion"), "{versions}");
    if !far_testkit::servers::are_asked_for() {
        assert!(versions.contains("far-devapi"), "{versions}");
    }
}

#[tokio::test]
async fn describe_shows_the_object_with_its_events() {
    let Some(kubectl) = Kubectl::start("describe_shows_the_object_with_its_events").await else {
        return;
    };
    kubectl.feed(&["apply", "-f", "-"], &manifest("a", "")).await.good();
    let uid = kubectl
        .run(&["get", "fa", "a", "-o", "jsonpath={.metadata.uid}"])
        .await
        .good();
    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "a.1"}, "reason": "Scheduled", "note": "placed on blade-1",
        "type": "Normal", "action": "Place", "reportingController": "far-controller", "reportingInstance": "c-1", "eventTime": "2026-01-01T00:00:00.000000Z",
        "regarding": {"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "name": "a", "namespace": "default", "uid": uid}});
    assert_eq!(
        kubectl
            .server
            .post("/apis/events.k8s.io/v1/namespaces/default/events", &event)
            .await
            .0,
        201
    );
    let described = kubectl.run(&["describe", "fa", "a"]).await.good();
    assert!(
        described.contains("Image:") && described.contains("Scheduled") && described.contains("placed on blade-1"),
        "{described}"
    );
    let events = kubectl.run(&["get", "events"]).await.good();
    assert!(
        events.contains("faragent/a") && events.contains("Scheduled"),
        "{events}"
    );
    let of_agent = kubectl.run(&["events", "--for", "faragent.tiffany.dev/a"]).await.good();
    assert!(of_agent.contains("placed on blade-1"), "{of_agent}");
}

#[tokio::test]
async fn wait_returns_when_the_status_comes() {
    let Some(kubectl) = Kubectl::start("wait_returns_when_the_status_comes").await else {
        return;
    };
    kubectl.feed(&["apply", "-f", "-"], &manifest("a", "")).await.good();
    let early = kubectl
        .run(&["wait", "fa/a", "--for=jsonpath={.status.phase}=Running", "--timeout=1s"])
        .await
        .bad();
    assert!(early.contains("timed out waiting"), "{early}");
    let waits = kubectl.run(&[
        "wait",
        "fa/a",
        "--for=jsonpath={.status.phase}=Running",
        "--timeout=60s",
    ]);
    let sets = kubectl.status(
        "a",
        json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
    );
    let (waited, ()) = tokio::join!(waits, sets);
    assert_eq!(waited.good(), "faragent.tiffany.dev/a condition met\n");
    kubectl
        .run(&["wait", "fa", "--all", "--for=condition=Ready", "--timeout=60s"])
        .await
        .good();
    let crd = kubectl
        .run(&[
            "wait",
            "crd/faragents.tiffany.dev",
            "--for=condition=Established",
            "--timeout=60s",
        ])
        .await;
    crd.good();
}

#[tokio::test]
async fn delete_waits_for_the_finalizer() {
    let Some(kubectl) = Kubectl::start("delete_waits_for_the_finalizer").await else {
        return;
    };
    let held = manifest("a", "").replace("  labels:", "  finalizers: [tiffany.dev/microvm]\n  labels:");
    kubectl.feed(&["apply", "-f", "-"], &held).await.good();
    let path = format!("{}/a", common::AGENTS);
    let deletes = kubectl.run(&["delete", "fa", "a", "--timeout=60s"]);
    let frees = async {
        kubectl
            .server
            .wait(&path, |_, body| body["metadata"]["deletionTimestamp"].is_string())
            .await;
        kubectl
            .run(&[
                "patch",
                "fa",
                "a",
                "--type=json",
                "-p",
                r#"[{"op":"remove","path":"/metadata/finalizers"}]"#,
            ])
            .await
            .good();
    };
    let (deleted, ()) = tokio::join!(deletes, frees);
    assert!(deleted.good().starts_with("faragent.tiffany.dev \"a\" deleted"));
    assert_eq!(kubectl.server.get(&path).await.0, 404);
    for policy in ["--cascade=foreground", "--cascade=orphan", "--now"] {
        kubectl.feed(&["apply", "-f", "-"], &manifest("b", "")).await.good();
        kubectl
            .run(&["delete", "fa", "b", policy, "--timeout=60s"])
            .await
            .good();
    }
}

#[tokio::test]
async fn built_in_kinds_are_made_patched_and_deleted() {
    let Some(kubectl) = Kubectl::start("built_in_kinds_are_made_patched_and_deleted").await else {
        return;
    };
    assert_eq!(
        kubectl
            .run(&["create", "configmap", "c", "--from-literal=a=1"])
            .await
            .good(),
        "configmap/c created\n"
    );
    kubectl
        .run(&["create", "secret", "generic", "s", "--from-literal=p=q"])
        .await
        .good();
    assert_eq!(
        kubectl
            .run(&["get", "secret", "s", "-o", "jsonpath={.data.p}"])
            .await
            .good(),
        "cQ=="
    );
    assert_eq!(
        kubectl
            .run(&["patch", "configmap", "c", "-p", r#"{"data":{"b":"2"}}"#])
            .await
            .good(),
        "configmap/c patched\n"
    );
    kubectl
        .run(&[
            "patch",
            "configmap",
            "c",
            "--type=merge",
            "-p",
            r#"{"data":{"a":null}}"#,
        ])
        .await
        .good();
    kubectl
        .run(&[
            "patch",
            "configmap",
            "c",
            "--type=json",
            "-p",
            r#"[{"op":"add","path":"/data/d","value":"4"}]"#,
        ])
        .await
        .good();
    assert_eq!(
        kubectl
            .run(&["get", "configmap", "c", "-o", "jsonpath={.data}"])
            .await
            .good(),
        r#"{"b":"2","d":"4"}"#
    );
    kubectl.run(&["create", "namespace", "team"]).await.good();
    kubectl
        .run(&["create", "serviceaccount", "robot", "-n", "team"])
        .await
        .good();
    let applied = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c2, namespace: team}\ndata: {x: one}\n";
    kubectl.feed(&["apply", "-f", "-"], applied).await.good();
    assert_eq!(
        kubectl
            .feed(&["apply", "-f", "-"], &applied.replace("x: one", "x: two"))
            .await
            .good(),
        "configmap/c2 configured\n"
    );
    kubectl
        .run(&["delete", "namespace", "team", "--timeout=60s"])
        .await
        .good();
    assert!(!kubectl.run(&["get", "configmap", "c2", "-n", "team"]).await.ok);
    assert_eq!(
        kubectl
            .run(&["auth", "can-i", "create", "faragents.tiffany.dev"])
            .await
            .good(),
        "yes\n"
    );
    kubectl.run(&["auth", "whoami"]).await.good();
}

#[tokio::test]
async fn custom_objects_are_patched_labelled_scaled_and_replaced() {
    let Some(kubectl) = Kubectl::start("custom_objects_are_patched_labelled_scaled_and_replaced").await else {
        return;
    };
    kubectl.feed(&["create", "-f", "-"], &manifest("a", "")).await.good();
    kubectl
        .run(&["patch", "fa", "a", "--type=merge", "-p", r#"{"spec":{"nodeName":"n"}}"#])
        .await
        .good();
    kubectl
        .run(&[
            "patch",
            "fa",
            "a",
            "--subresource=status",
            "--type=merge",
            "-p",
            r#"{"status":{"phase":"Running"}}"#,
        ])
        .await
        .good();
    let refused = kubectl.run(&["patch", "fa", "a", "-p", "{}"]).await.bad();
    assert!(
        refused.contains("strategic-merge-patch+json is not supported"),
        "{refused}"
    );
    kubectl.run(&["label", "fa", "a", "tier=one"]).await.good();
    kubectl.run(&["annotate", "fa", "a", "note=x"]).await.good();
    assert_eq!(
        kubectl.run(&["scale", "fa", "a", "--replicas=3"]).await.good(),
        "faragent.tiffany.dev/a scaled\n"
    );
    let shown = kubectl
        .run(&[
            "get",
            "fa",
            "a",
            "-o",
            "jsonpath={.spec.nodeName} {.status.phase} {.spec.replicas} {.metadata.labels.tier}",
        ])
        .await;
    assert_eq!(shown.good(), "n Running 3 one");
    kubectl
        .feed(&["replace", "-f", "-"], &manifest("a", "  replicas: 1\n"))
        .await
        .good();
    let shown = kubectl
        .run(&[
            "get",
            "fa",
            "a",
            "-o",
            "jsonpath={.spec.replicas}{.metadata.labels.tier}",
        ])
        .await;
    assert_eq!(shown.good(), "1");
    let dry = kubectl
        .feed(&["apply", "--dry-run=server", "-f", "-"], &manifest("never", ""))
        .await
        .good();
    assert_eq!(dry, "faragent.tiffany.dev/never created (server dry run)\n");
    assert!(!kubectl.run(&["get", "fa", "never"]).await.ok);
    let invalid = kubectl
        .feed(&["create", "-f", "-"], &manifest("bad", "  restartPolicy: Sometimes\n"))
        .await
        .bad();
    assert!(invalid.contains("spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Never\", \"OnFailure\", \"Always\""), "{invalid}");
}
