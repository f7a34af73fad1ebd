//! A machine for tests: folders of its own, the embedded API with the project's CRDs, and the real `far` binary.
//!
//! Each test program uses a part of it, and a panic in it is the report.
#![allow(dead_code, clippy::unwrap_used)]

pub(crate) mod blade;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use http::Request;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use tempfile::TempDir;

/// A bound against hanging, never a measurement.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Machine {
    pub(crate) dir: TempDir,
    api: Option<Child>,
}

/// Exit code, standard output, standard error.
pub(crate) type Ran = (i32, String, String);

impl Machine {
    /// Without an API.
    pub(crate) fn bare() -> Self {
        // Short: sockets lie below it.
        let dir = tempfile::Builder::new().prefix("fc").tempdir_in("/tmp").unwrap();
        Self { dir, api: None }
    }

    /// With the embedded API and the CRDs in it; `None` after saying why not.
    pub(crate) async fn with_api(test: &str) -> Option<Self> {
        let program = Path::new(env!("CARGO_BIN_EXE_far")).with_file_name("far-devapi");
        if !program.is_file() {
            eprintln!("SKIPPED {test}: {} is not built", program.display());
            return None;
        }
        let mut machine = Self::bare();
        let at = |name: &str| machine.dir.path().join(name);
        std::fs::create_dir_all(at("state")).unwrap();
        let child = Command::new(program)
            .arg("--data-dir")
            .arg(at("devapi"))
            .args(["--listen", "127.0.0.1:0", "--kubeconfig"])
            .arg(at("state/kubeconfig"))
            .arg("--ready-file")
            .arg(at("ready"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(at("devapi.log")).unwrap())
            .spawn()
            .unwrap();
        machine.api = Some(child);
        let ready = machine.dir.path().join("ready");
        until("far-devapi serves", || ready.exists()).await;
        machine.apply_crds().await;
        Some(machine)
    }

    async fn apply_crds(&self) {
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../api/crds");
        let (code, _, errors) = self.far(&["apply", "-f", crds.to_str().unwrap()]).await;
        assert_eq!(code, 0, "{errors}");
        for _ in 0..600 {
            if self.far(&["get", "fa,farnodes"]).await.0 == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("the CRDs were not served");
    }

    pub(crate) fn command(&self, program: &str, args: &[&str]) -> Command {
        let path = match program {
            "far" => env!("CARGO_BIN_EXE_far"),
            _ => env!("CARGO_BIN_EXE_kubectl-far"),
        };
        let mut command = Command::new(path);
        command
            .args(args)
            .current_dir(self.dir.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.dir.path().join("home"))
            .env("FAR_STATE", self.dir.path().join("state"))
            .env("FAR_RUN", self.dir.path().join("run"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn spawn(&self, args: &[&str]) -> Child {
        self.command("far", args).spawn().unwrap()
    }

    /// Runs `far` on a thread of its own: a blade of the test may have to answer meanwhile.
    pub(crate) async fn far(&self, args: &[&str]) -> Ran {
        finish(self.spawn(args)).await
    }

    /// Writes a file beside the test's folders and answers its path.
    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path: PathBuf = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Sets an agent's status, as the controller would.
    pub(crate) async fn set_status(&self, name: &str, status: &Value) {
        self.set_status_of("faragents", "v1", Some("default"), name, status)
            .await;
    }

    /// Sets the status of any of our objects.
    pub(crate) async fn set_status_of(
        &self,
        plural: &str,
        version: &str,
        namespace: Option<&str>,
        name: &str,
        status: &Value,
    ) {
        let kubeconfig = Kubeconfig::read_from(self.dir.path().join("state/kubeconfig")).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .unwrap();
        let within = namespace
            .map(|namespace| format!("namespaces/{namespace}/"))
            .unwrap_or_default();
        let request = Request::patch(format!("/apis/tiffany.dev/{version}/{within}{plural}/{name}/status"))
            .header("Content-Type", "application/merge-patch+json")
            .body(serde_json::json!({ "status": status }).to_string().into_bytes())
            .unwrap();
        let _: Value = Client::try_from(config).unwrap().request(request).await.unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut api) = self.api.take() {
            let _ = api.kill();
            let _ = api.wait();
        }
    }
}

pub(crate) async fn finish(child: Child) -> Ran {
    let output: Output = tokio::task::spawn_blocking(move || child.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap_or(-1),
        text(output.stdout),
        text(output.stderr),
    )
}

pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "waited for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) const AGENT: &str =
    "apiVersion: tiffany.dev/v1\nkind: FarAgent\nmetadata: {name: a}\nspec: {image: example.com/x:v1}\n";
