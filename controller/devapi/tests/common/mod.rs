//! A server in this process and a plain HTTPS client that hides nothing: no retries, one connection per request.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // Shared by test files, each of which uses its part.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use far_devapi::{Config, DevApi};
use far_testkit::servers::{self, ControlPlane, Part};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Far beyond what anything here takes, so that only a hang meets it.
pub const LIMIT: Duration = Duration::from_secs(60);
pub const AGENTS: &str = "/apis/tiffany.dev/v1/namespaces/default/faragents";
pub const MERGE: &str = "application/merge-patch+json";
pub const JSON_PATCH: &str = "application/json-patch+json";
pub const APPLY: &str = "application/apply-patch+yaml";

pub fn crd() -> Value {
    serde_saphyr::from_str(include_str!("crd.yaml")).expect("the test CRD is YAML")
}

pub fn agent(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": name}, "spec": spec})
}

/// Address and credentials of a server.
#[derive(Clone)]
pub struct Client {
    pub address: String,
    pub token: String,
    tls: Arc<rustls::ClientConfig>,
}

pub struct Answer {
    pub code: u16,
    pub body: Value,
    pub headers: hyper::HeaderMap,
}

impl Client {
    pub fn from_kubeconfig(text: &str) -> Self {
        let find = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.trim().strip_prefix(name))
                .expect("a field of the kubeconfig");
            line.trim().to_owned()
        };
        let pem = base64::engine::general_purpose::STANDARD
            .decode(find("certificate-authority-data:"))
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let address = find("server:")
            .strip_prefix("https://")
            .expect("the API is https")
            .to_owned();
        Self {
            address,
            token: find("token:"),
            tls: Arc::new(tls),
        }
    }

    /// A connection of its own, on which nothing was asked yet, and the task that ends with it.
    pub async fn connect(&self) -> anyhow::Result<(SendRequest<Full<Bytes>>, JoinHandle<()>)> {
        let stream = tokio::net::TcpStream::connect(&self.address).await?;
        let name = ServerName::try_from("127.0.0.1")?;
        let stream = tokio_rustls::TlsConnector::from(self.tls.clone())
            .connect(name, stream)
            .await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let ended = tokio::spawn(async { drop(connection.await) });
        Ok((sender, ended))
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> anyhow::Result<hyper::Response<Incoming>> {
        let (mut sender, _) = self.connect().await?;
        Ok(sender.send_request(request).await?)
    }

    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Request<Full<Bytes>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.address);
        request = request.header("user-agent", "test/1");
        if !self.token.is_empty() {
            request = request.header("authorization", format!("Bearer {}", self.token));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Full::new(body.into())).unwrap()
    }

    /// Errors are failures of the connection.
    pub async fn try_call(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> anyhow::Result<Answer> {
        let response = self.send(self.request(method, path, headers, body)).await?;
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await?.to_bytes();
        let body =
            serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into()));
        Ok(Answer {
            code: parts.status.as_u16(),
            body,
            headers: parts.headers,
        })
    }

    pub async fn call(&self, method: &str, path: &str, media: &str, body: &Value) -> (u16, Value) {
        let bytes = if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        };
        let answer = self
            .try_call(method, path, &[("content-type", media)], bytes)
            .await
            .expect("an answer");
        (answer.code, answer.body)
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, "application/json", &Value::Null).await
    }
    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.call("POST", path, "application/json", body).await
    }
    pub async fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        self.call("PUT", path, "application/json", body).await
    }
    pub async fn patch(&self, path: &str, media: &str, body: &Value) -> (u16, Value) {
        self.call("PATCH", path, media, body).await
    }
    pub async fn delete(&self, path: &str) -> (u16, Value) {
        self.call("DELETE", path, "application/json", &Value::Null).await
    }
    pub async fn apply(&self, name: &str, manager: &str, body: &Value) -> (u16, Value) {
        self.patch(&format!("{AGENTS}/{name}?fieldManager={manager}"), APPLY, body)
            .await
    }

    pub async fn watch(&self, path: &str) -> Watch {
        let response = self
            .send(self.request("GET", path, &[], Vec::new()))
            .await
            .expect("a watch");
        assert_eq!(response.status().as_u16(), 200, "{path}");
        Watch {
            body: response.into_body(),
            buffer: BytesMut::new(),
        }
    }

    pub async fn install_crd(&self) {
        let (code, body) = self
            .post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &crd())
            .await;
        assert_eq!(code, 201, "{body}");
        // A real server serves a new kind a moment later, and describes it after that.
        self.wait(AGENTS, |code, _| code == 200).await;
        self.wait("/openapi/v3", |_, index| {
            index["paths"]["apis/tiffany.dev/v1"].is_object()
        })
        .await;
    }

    /// Asks until the answer satisfies the predicate.
    pub async fn wait(&self, path: &str, until: impl Fn(u16, &Value) -> bool) -> Value {
        let asks = async {
            loop {
                let (code, body) = self.get(path).await;
                if until(code, &body) {
                    return body;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, asks)
            .await
            .unwrap_or_else(|_| panic!("{path} did not come to what was waited for"))
    }
}

pub struct Watch {
    body: Incoming,
    buffer: BytesMut,
}

impl Watch {
    /// Next event; `None` when the server ended the watch.
    pub async fn next(&mut self) -> Option<Value> {
        let read = async {
            loop {
                if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                    let line = self.buffer.split_to(end + 1);
                    return Some(serde_json::from_slice(&line).expect("an event is one line of JSON"));
                }
                match self.body.frame().await {
                    Some(Ok(frame)) => self.buffer.extend_from_slice(&frame.into_data().unwrap_or_default()),
                    Some(Err(_)) | None => return None,
                }
            }
        };
        tokio::time::timeout(LIMIT, read).await.expect("an event in time")
    }

    /// Type and name of the next event.
    pub async fn short(&mut self) -> (String, String) {
        let event = self.next().await.expect("an event");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&event["type"]), text(&event["object"]["metadata"]["name"]))
    }
}

/// A server of one test, gone with its data at the end: far-devapi in this process, or with `FAR_TEST_API=real` a real
/// kube-apiserver. What speaks of far-devapi alone is in modules named `embedded`, which the real half leaves out.
pub struct Server {
    pub client: Client,
    pub kubeconfig: String,
    pub api: Api,
    pub folder: tempfile::TempDir,
}

pub enum Api {
    Embedded(DevApi),
    Real(ControlPlane),
}

impl std::ops::Deref for Api {
    type Target = DevApi;
    fn deref(&self) -> &DevApi {
        match self {
            Self::Embedded(api) => api,
            Self::Real(_) => panic!("only far-devapi can do that: such a test belongs into a module named `embedded`"),
        }
    }
}

impl std::ops::Deref for Server {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

pub async fn start() -> Server {
    let folder = tempfile::tempdir().unwrap();
    let (api, kubeconfig) = if servers::are_asked_for() {
        let data = folder.path().join("servers");
        let start = move || ControlPlane::start(&data, &[Part::ControllerManager]);
        let plane = tokio::task::spawn_blocking(start).await.unwrap().unwrap();
        let kubeconfig = std::fs::read_to_string(&plane.kubeconfig).unwrap();
        (Api::Real(plane), kubeconfig)
    } else {
        let api = DevApi::start(Config {
            enable_fault_injection: true,
            ..Config::new(folder.path())
        });
        let api = api.await.unwrap();
        let kubeconfig = api.kubeconfig.clone();
        (Api::Embedded(api), kubeconfig)
    };
    Server {
        client: Client::from_kubeconfig(&kubeconfig),
        kubeconfig,
        api,
        folder,
    }
}

pub async fn start_with_crd() -> Server {
    let server = start().await;
    server.install_crd().await;
    server
}
