//! Users of a cluster, as any real API server has them: service accounts with tokens of TokenRequest, and RBAC objects.

use kube::core::Request as Requests;
use serde_json::{Value, json};
use tonic::{
    metadata::{Ascii, MetadataValue},
    service::interceptor::InterceptedService,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};

use far_proto::{gateway::output_client::OutputClient, node::inside_client::InsideClient};

use super::Cluster;

/// What a role gives: verbs on a resource of tiffany.dev, of some names (none: of all).
pub struct Rule(
    pub &'static [&'static str],
    pub &'static str,
    pub &'static [&'static str],
);

/// Everything inside agents.
pub const ALL: &[Rule] = &[
    Rule(&["get", "list", "watch"], "faragents", &[]),
    Rule(&["get"], "faragents/log", &[]),
    Rule(&["create"], "faragents/exec", &[]),
    Rule(&["create"], "faragents/cp", &[]),
    Rule(&["create"], "faragents/portforward", &[]),
    Rule(&["get"], "faragents/stats", &[]),
];

async fn post(cluster: &Cluster, path: &str, object: &Value) -> Value {
    let request = Requests::new(path)
        .create(&Default::default(), object.to_string().into_bytes())
        .unwrap();
    let answer = cluster.client.request::<Value>(request).await;
    answer.unwrap_or_else(|error| panic!("creating {object} at {path}: {error}"))
}

impl Cluster {
    /// A service account in namespace default that may do this there; answers its token.
    pub async fn user(&self, name: &str, rules: &[Rule]) -> String {
        self.account(name).await;
        self.allow(name, "default", rules).await;
        self.token(name, &[]).await
    }

    pub async fn account(&self, name: &str) {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
        post(self, "/api/v1/namespaces/default/serviceaccounts", &account).await;
    }

    /// Gives the account these rights in a namespace.
    pub async fn allow(&self, name: &str, namespace: &str, rules: &[Rule]) {
        let rules: Vec<Value> = rules
            .iter()
            .map(|Rule(verbs, resource, names)| {
                let mut rule = json!({"apiGroups": ["tiffany.dev"], "resources": [resource], "verbs": verbs});
                if !names.is_empty() {
                    rule["resourceNames"] = json!(names);
                }
                rule
            })
            .collect();
        let at = |plural: &str| format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/{plural}");
        let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name}, "rules": rules});
        post(self, &at("roles"), &role).await;
        let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "default"}],
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}});
        post(self, &at("rolebindings"), &binding).await;
    }

    /// A token of the account, for these audiences (none: the API itself).
    pub async fn token(&self, name: &str, audiences: &[&str]) -> String {
        let mut request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}});
        if !audiences.is_empty() {
            request["spec"]["audiences"] = json!(audiences);
        }
        let path = format!("/api/v1/namespaces/default/serviceaccounts/{name}/token");
        let answer = post(self, &path, &request).await;
        answer["status"]["token"].as_str().unwrap().to_owned()
    }

    /// A connection of its own to the gateway.
    pub async fn gateway_channel(&self) -> Channel {
        let ca = std::fs::read_to_string(self.ca_file()).unwrap();
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(ca))
            .domain_name("controller.far.internal");
        Endpoint::from_shared(format!("https://{}", self.gateway.unwrap()))
            .unwrap()
            // As far has it: one call that is not read holds up no other.
            .initial_stream_window_size(128 * 1024)
            .initial_connection_window_size(8 << 20)
            .tls_config(tls)
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    pub async fn inside(&self, token: &str) -> InsideClient<Line> {
        InsideClient::with_interceptor(self.gateway_channel().await, Bearer::new(&format!("Bearer {token}")))
    }

    pub async fn output(&self, token: &str) -> OutputClient<Line> {
        OutputClient::with_interceptor(self.gateway_channel().await, Bearer::new(&format!("Bearer {token}")))
    }
}

pub type Line = InterceptedService<Channel, Bearer>;

/// Puts a header on each call.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    /// An empty text: no header.
    pub fn new(header: &str) -> Self {
        Self((!header.is_empty()).then(|| header.parse().unwrap()))
    }
}

impl tonic::service::Interceptor for Bearer {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}
