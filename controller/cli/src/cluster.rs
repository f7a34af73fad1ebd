//! The Kubernetes API that the kubeconfig names: finding it, asking it, and saying plainly why it does not answer.
//!
//! Objects are plain JSON values: `far` shows and passes on what it does not know, as kubectl does.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::{Stream, StreamExt, stream::BoxStream};
use http::{HeaderValue, Method, Request, header};
use kube::{
    Client, Config,
    client::{Body, ConfigExt},
    config::{AuthInfo, KubeConfigOptions, Kubeconfig, KubeconfigError},
    core::WatchEvent,
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tower::{Layer, ServiceExt};

use crate::{args::ClusterArgs, folders::Folders, gateway::GatewayArgs};

/// Who `far` is in `metadata.managedFields`.
pub(crate) const FIELD_MANAGER: &str = "far";
/// What a list or get asks for to receive a Table, with plain JSON where the API has none.
const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    #[error(
        "there is no kubeconfig: start everything on this machine with `far up`, or name one with --kubeconfig or KUBECONFIG"
    )]
    NoKubeconfig,
    #[error("there is no kubeconfig {path}: `far up` makes it")]
    NotUp { path: PathBuf },
    #[error("reading kubeconfig {from}")]
    Kubeconfig { from: String, source: KubeconfigError },
    #[error("using kubeconfig {from}")]
    Client { from: String, source: kube::Error },
    #[error("{message}")]
    Refused { code: u16, reason: String, message: String },
    #[error("the API at {url} does not answer{hint}")]
    Unreachable {
        url: String,
        hint: &'static str,
        source: kube::Error,
    },
    #[error("building the request {what}")]
    Request { what: String, source: http::Error },
}

impl ClusterError {
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: 404, .. })
    }

    /// Created by somebody else before.
    pub(crate) fn is_already_there(&self) -> bool {
        matches!(self, Self::Refused { code: 409, reason, .. } if reason == "AlreadyExists")
    }

    /// The watch began at a version that is no longer kept: list again.
    pub(crate) fn is_expired(&self) -> bool {
        matches!(self, Self::Refused { code: 410, .. })
    }

    /// The API may be back in a moment: it did not answer, or said that it is overloaded.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Refused {
                    code: 429 | 500..=599,
                    ..
                }
        )
    }
}

/// Which kubeconfig, context and namespace; nothing is read before a command needs it.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    args: ClusterArgs,
    source: Source,
}

/// Where the kubeconfig is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    File(PathBuf),
    /// `KUBECONFIG`: possibly several files, merged.
    Environment,
    None,
}

impl Cluster {
    /// As `far` looks for it.
    pub(crate) fn of_far(args: &ClusterArgs, folders: &Folders) -> Self {
        Self::find(args, &[Some(folders.kubeconfig()), of_kubectl(folders)])
    }

    /// As kubectl looks for it, and then the one of `far up`.
    pub(crate) fn of_kubectl(args: &ClusterArgs, folders: &Folders) -> Self {
        Self::find(args, &[of_kubectl(folders), Some(folders.kubeconfig())])
    }

    fn find(args: &ClusterArgs, defaults: &[Option<PathBuf>]) -> Self {
        let has_variable = std::env::var_os("KUBECONFIG").is_some_and(|value| !value.is_empty());
        Self {
            args: args.clone(),
            source: choose(args.kubeconfig.as_deref(), has_variable, defaults, Path::exists),
        }
    }

    /// Reads the kubeconfig and makes a client. Nothing is sent yet.
    pub(crate) async fn connect(&self) -> Result<Api, ClusterError> {
        let (kubeconfig, from) = match &self.source {
            Source::File(path) => (Kubeconfig::read_from(path), path.display().to_string()),
            Source::Environment => {
                let path = PathBuf::from(std::env::var_os("KUBECONFIG").unwrap_or_default());
                // One file that is not there: most likely `far up` was not run yet.
                if path.file_name().is_some_and(|name| name == "kubeconfig") && !path.exists() {
                    return Err(ClusterError::NotUp { path });
                }
                (
                    Kubeconfig::from_env().map(Option::unwrap_or_default),
                    "KUBECONFIG".to_owned(),
                )
            }
            Source::None => return Err(ClusterError::NoKubeconfig),
        };
        let options = KubeConfigOptions {
            context: self.args.context.clone(),
            ..KubeConfigOptions::default()
        };
        let named = |source| ClusterError::Kubeconfig {
            from: from.clone(),
            source,
        };
        let mut config = Config::from_custom_kubeconfig(kubeconfig.map_err(named)?, &options)
            .await
            .map_err(named)?;
        if let Some(token) = &self.args.token {
            config.auth_info = AuthInfo {
                token: Some(token.clone().into()),
                ..AuthInfo::default()
            };
        }
        let url = config.cluster_url.to_string();
        let namespace = self
            .args
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config.clone()).map_err(|source| ClusterError::Client { from, source })?;
        Ok(Api {
            client,
            config: Arc::new(config),
            gateway: self.args.gateway.clone(),
            url,
            namespace,
            has_named_namespace: self.args.namespace.is_some(),
        })
    }
}

fn of_kubectl(folders: &Folders) -> Option<PathBuf> {
    folders.home.as_ref().map(|home| home.join(".kube/config"))
}

fn choose(
    option: Option<&Path>,
    has_variable: bool,
    defaults: &[Option<PathBuf>],
    exists: impl Fn(&Path) -> bool,
) -> Source {
    if let Some(path) = option {
        return Source::File(path.to_path_buf());
    }
    if has_variable {
        return Source::Environment;
    }
    defaults
        .iter()
        .flatten()
        .find(|path| exists(path))
        .map_or(Source::None, |path| Source::File(path.clone()))
}

/// An API that can be asked.
#[derive(Clone)]
pub(crate) struct Api {
    client: Client,
    config: Arc<Config>,
    url: String,
    /// Which gateway the user named.
    pub(crate) gateway: GatewayArgs,
    /// The namespace of this command.
    pub(crate) namespace: String,
    /// The user named it, so that a file may not name another.
    pub(crate) has_named_namespace: bool,
}

impl Api {
    /// The `Authorization` header that requests to the API carry, by whatever way the kubeconfig names (a token, a file, a
    /// program); `None`: they carry none.
    pub(crate) async fn authorization(&self) -> Result<Option<HeaderValue>, ClusterError> {
        let (config, runtime) = (self.config.clone(), tokio::runtime::Handle::current());
        // A credential plugin is a program that is waited for: on a thread of its own.
        let reading = tokio::task::spawn_blocking(move || {
            let Some(layer) = config.auth_layer()? else {
                return Ok(None);
            };
            // kube's own layer puts the header on a request that goes nowhere.
            let read = layer.layer(tower::service_fn(|request: Request<Body>| async move {
                let header = request.headers().get(header::AUTHORIZATION).cloned();
                Ok::<_, tower::BoxError>(http::Response::new(header))
            }));
            let answer = runtime.block_on(read.oneshot(Request::new(Body::empty())));
            answer.map(http::Response::into_body).map_err(kube::Error::Service)
        });
        let read = reading
            .await
            .map_err(|error| kube::Error::Service(error.into()))
            .flatten();
        read.map_err(|source| ClusterError::Client {
            from: "of the current user".to_owned(),
            source,
        })
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClusterError> {
        self.send(Method::GET, path, None, "application/json").await
    }

    /// One object or a list, as the API's own table.
    pub(crate) async fn table(&self, path: &str) -> Result<Value, ClusterError> {
        self.send(Method::GET, path, None, TABLE).await
    }

    pub(crate) async fn create(&self, path: &str, object: &Value) -> Result<Value, ClusterError> {
        let path = format!("{path}?fieldManager={FIELD_MANAGER}&fieldValidation=Strict");
        self.send(
            Method::POST,
            &path,
            Some(("application/json", object)),
            "application/json",
        )
        .await
    }

    /// Server-side apply.
    pub(crate) async fn apply(
        &self,
        path: &str,
        object: &Value,
        force: bool,
        dry_run: bool,
    ) -> Result<Value, ClusterError> {
        let mut path = format!("{path}?fieldManager={FIELD_MANAGER}&fieldValidation=Strict&force={force}");
        if dry_run {
            path.push_str("&dryRun=All");
        }
        let body = Some(("application/apply-patch+yaml", object));
        self.send(Method::PATCH, &path, body, "application/json").await
    }

    /// Merge patch of exactly what is given.
    pub(crate) async fn merge(&self, path: &str, change: &Value) -> Result<Value, ClusterError> {
        let path = format!("{path}?fieldManager={FIELD_MANAGER}&fieldValidation=Strict");
        let body = Some(("application/merge-patch+json", change));
        self.send(Method::PATCH, &path, body, "application/json").await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<Value, ClusterError> {
        self.send(Method::DELETE, path, None, "application/json").await
    }

    /// Changes of objects, as objects or (`as_table`) as tables of one row each.
    pub(crate) async fn watch(
        &self,
        path: &str,
        as_table: bool,
    ) -> Result<impl Stream<Item = Result<WatchEvent<Value>, ClusterError>> + use<>, ClusterError> {
        let request = self.request(
            Method::GET,
            path,
            None,
            if as_table { TABLE } else { "application/json" },
        )?;
        let events: BoxStream<'static, kube::Result<WatchEvent<Value>>> = self
            .client
            .request_events::<Value>(request)
            .await
            .map_err(|error| self.error(error))
            .map(|events| Box::pin(events) as BoxStream<_>)?;
        let api = self.clone();
        Ok(events.map(move |event| match event {
            Ok(WatchEvent::Error(status)) => Err(refused(&status)),
            Ok(event) => Ok(event),
            Err(error) => Err(api.error(error)),
        }))
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<(&str, &Value)>,
        accept: &str,
    ) -> Result<T, ClusterError> {
        let request = self.request(method, path, body, accept)?;
        self.client.request(request).await.map_err(|error| self.error(error))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<(&str, &Value)>,
        accept: &str,
    ) -> Result<Request<Vec<u8>>, ClusterError> {
        let what = format!("{method} {path}");
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::ACCEPT, accept);
        let bytes = match body {
            Some((kind, value)) => {
                request = request.header(header::CONTENT_TYPE, kind);
                value.to_string().into_bytes()
            }
            None => Vec::new(),
        };
        request
            .body(bytes)
            .map_err(|source| ClusterError::Request { what, source })
    }

    fn error(&self, error: kube::Error) -> ClusterError {
        match error {
            kube::Error::Api(status) => refused(&status),
            source => ClusterError::Unreachable {
                url: self.url.clone(),
                hint: if self.url.contains("//127.0.0.1:") {
                    ": on this machine `far status` shows what runs, `far up` starts it"
                } else {
                    ""
                },
                source,
            },
        }
    }
}

/// The API's own words: they name the object and the field.
fn refused(status: &kube::core::Status) -> ClusterError {
    let message = if status.message.is_empty() {
        format!("the API refused this with {} {}", status.code, status.reason)
    } else {
        status.message.clone()
    };
    ClusterError::Refused {
        code: status.code,
        reason: status.reason.clone(),
        message,
    }
}

/// A part of a URL's path or query, with everything but unreserved characters escaped (RFC 3986, section 2.3).
pub(crate) fn escaped(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubeconfig_is_looked_for_in_the_documented_order() {
        let far = Some(PathBuf::from("/far"));
        let kubectl = Some(PathBuf::from("/kube"));
        let defaults = [far.clone(), kubectl.clone()];
        for (why, option, variable, there, expected) in [
            (
                "option first",
                Some("/x"),
                true,
                vec!["/far"],
                Source::File("/x".into()),
            ),
            ("then the variable", None, true, vec!["/far"], Source::Environment),
            (
                "then far up's",
                None,
                false,
                vec!["/far", "/kube"],
                Source::File("/far".into()),
            ),
            (
                "then kubectl's",
                None,
                false,
                vec!["/kube"],
                Source::File("/kube".into()),
            ),
            ("then none", None, false, vec![], Source::None),
        ] {
            let chosen = choose(option.map(Path::new), variable, &defaults, |path| {
                there.contains(&path.to_str().unwrap())
            });
            assert_eq!(chosen, expected, "{why}");
        }
    }

    #[test]
    fn what_a_user_types_cannot_leave_its_part_of_the_url() {
        assert_eq!(escaped("a/../b?c=d&e"), "a%2F..%2Fb%3Fc%3Dd%26e");
        assert_eq!(escaped("app=x,tier in (a)"), "app%3Dx%2Ctier%20in%20%28a%29");
        assert_eq!(escaped("embedder-worker-01"), "embedder-worker-01");
    }

    #[tokio::test]
    async fn an_api_that_does_not_answer_is_named_with_the_way_to_start_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config");
        // A port nobody listens on: bound and let go at once.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        std::fs::write(
            &file,
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{port}'}}}}]\n\
                 contexts: [{{name: c, context: {{cluster: c, user: u, namespace: team}}}}]\nusers: [{{name: u, user: {{}}}}]\n"
            ),
        )
        .unwrap();
        let args = ClusterArgs {
            kubeconfig: Some(file),
            ..ClusterArgs::default()
        };
        let api = Cluster::find(&args, &[]).connect().await.unwrap();
        assert_eq!(api.namespace, "team");
        let error = api.get::<Value>("/version").await.unwrap_err();
        assert!(error.is_passing());
        assert!(error.to_string().contains("far up"), "{error}");
    }
}
