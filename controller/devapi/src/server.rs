//! TLS, connections, authentication, and the way from a request to its handler.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use far_serve::{Connection, Connections};
use futures::StreamExt as _;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;

use crate::api::{discovery, openapi};
use crate::app::App;
use crate::auth::{AUDIENCE, Attributes, User, allows};
use crate::error::ApiError;
use crate::faults::{self, Action, Fault};
use crate::handlers::delete::Options;
use crate::handlers::write::{Patch, Written};
use crate::handlers::{Target, delete, read, review, scale, watch, write};
use crate::protobuf;
use crate::request::{Parameters, Path, ResourcePath, verb};

/// Bodies beyond this are refused, as on the real server.
const MAX_BODY: usize = 3 << 20;
/// Connections that have shown the token.
const MAX_CONNECTIONS: usize = 1024;
/// Connections that have not: any user of this machine can open them.
const MAX_STRANGERS: usize = 256;
/// From accepting a connection to its first request with the token.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// Also how long an idle connection is kept: longer than clients keep theirs, so that they close first.
const HEADER_READ: Duration = Duration::from_secs(300);
/// HTTP/2 connections are asked whether somebody is still there, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_ANSWER: Duration = Duration::from_secs(30);
/// Time that running requests get at the end.
const DRAIN: Duration = Duration::from_secs(5);
/// The version of Kubernetes whose behaviour is followed.
const LIKE_MINOR: &str = "33";

pub(crate) const RBAC_GROUP: &str = "rbac.authorization.k8s.io";

type Body = BoxBody<Bytes, Infallible>;

/// A fault asked for the connection to be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("connection dropped on purpose")]
struct Dropped;

pub(crate) async fn serve(app: Arc<App>, listener: TcpListener, tls: Arc<rustls::ServerConfig>) {
    let acceptor = TlsAcceptor::from(tls);
    let graceful = GracefulShutdown::new();
    let connections = Connections::new(MAX_STRANGERS, MAX_CONNECTIONS, MAX_CONNECTIONS);
    loop {
        let accepted = tokio::select! {
            () = app.stopping.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await; // Out of descriptors: busy looping would not free any.
                continue;
            }
        };
        let connection = Arc::new(connections.admit());
        let (app, acceptor, watcher) = (app.clone(), acceptor.clone(), graceful.watcher());
        tokio::spawn(async move {
            let served = serve_connection(app, connection.clone(), stream, acceptor, watcher);
            tokio::select! {
                () = served => {}
                () = connection.overstays(FIRST_REQUEST) => tracing::debug!("a connection without the token is ended"),
            }
        });
    }
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::info!("some connections did not end in time");
    }
}

async fn serve_connection(
    app: Arc<App>,
    connection: Arc<Connection>,
    stream: TcpStream,
    acceptor: TlsAcceptor,
    watcher: Watcher,
) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let Ok(stream) = acceptor.accept(stream).await else {
        return;
    };
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_ANSWER)
        .max_concurrent_streams(1000);
    let service = hyper::service::service_fn(move |request| answer(app.clone(), connection.clone(), request));
    let served = builder.serve_connection(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(served).await {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

async fn answer(
    app: Arc<App>,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Dropped> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let (outcome, drops) = match route(&app, &connection, request).await {
        Ok(Routed { response, drops }) => (Ok(response), drops),
        Err(Refused::Error(error)) => (Err(error), false),
        Err(Refused::Dropped) => return Err(Dropped),
    };
    if drops {
        return Err(Dropped);
    }
    let response = outcome.unwrap_or_else(|error| failure(&error));
    tracing::debug!(%method, path, status = response.status().as_u16(), "answered");
    Ok(response)
}

struct Routed {
    response: Response<Body>,
    drops: bool,
}

enum Refused {
    Error(ApiError),
    Dropped,
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

async fn route(app: &Arc<App>, connection: &Connection, request: Request<Incoming>) -> Result<Routed, Refused> {
    let path = request.uri().path().to_owned();
    if matches!(path.as_str(), "/healthz" | "/readyz" | "/livez") {
        return Ok(text("ok").into());
    }
    let user = authenticate(app, &request)?;
    if !connection.is_recognised(&user.name) {
        tracing::warn!(limit = MAX_CONNECTIONS, "too many connections, one is refused");
        return Err(ApiError::Overloaded.into());
    }
    let query = request.uri().query().unwrap_or_default().to_owned();
    let parameters = Parameters::parse(&query, request.headers())?;
    let snapshot = app.registry.snapshot();
    let accept = request
        .headers()
        .get("accept")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let aggregated = wants_aggregated(accept);
    let parsed = Path::parse(&path);
    if !matches!(parsed, Path::Resource(_)) {
        let asked = Attributes {
            verb: request.method().as_str().to_lowercase(),
            path: Some(path.clone()),
            ..Attributes::default()
        };
        authorize(app, &user, &asked)?;
    }
    let document = match parsed {
        Path::Resource(resource) => return resource_request(app, &user, &resource, request, parameters).await,
        Path::Core if aggregated => return Ok(aggregated_json(&discovery::aggregated(&snapshot, true)).into()),
        Path::Groups if aggregated => return Ok(aggregated_json(&discovery::aggregated(&snapshot, false)).into()),
        Path::Core => discovery::core_versions(&app.address),
        Path::Groups => discovery::group_list(&snapshot),
        Path::Group { group } => {
            let found = discovery::groups(&snapshot)
                .into_iter()
                .find(|(name, _)| *name == group && !group.is_empty());
            let (group, versions) = found.ok_or(ApiError::UnknownPath)?;
            discovery::group(&group, &versions)
        }
        Path::Version { group, version } => {
            discovery::resource_list(&snapshot, &group, &version).ok_or(ApiError::UnknownPath)?
        }
        Path::Other(path) => match path.as_str() {
            "/version" | "/version/" => version(),
            "/openapi/v3" | "/openapi/v3/" => openapi::index(&snapshot),
            "/debug/faults" if app.debug_faults => return debug_faults(app, request).await,
            other => match other
                .strip_prefix("/openapi/v3/")
                .and_then(|path| openapi::document(&snapshot, path))
            {
                Some(document) => document,
                None => return Err(ApiError::UnknownPath.into()),
            },
        },
    };
    match *request.method() {
        Method::GET | Method::HEAD => Ok(json_answer(StatusCode::OK, read::bytes(&document), &[]).into()),
        _ => Err(ApiError::MethodNotAllowed.into()),
    }
}

/// Whether the aggregated discovery document, in the version served here, is among what the client accepts.
fn wants_aggregated(accept: &str) -> bool {
    accept.split(',').any(|part| {
        let has = |parameter: &str| part.split(';').any(|found| found.trim() == parameter);
        has("as=APIGroupDiscoveryList") && has("v=v2")
    })
}

fn authenticate(app: &App, request: &Request<Incoming>) -> Result<User, ApiError> {
    let header = request
        .headers()
        .get("authorization")
        .and_then(|value| value.to_str().ok());
    let token = header
        .and_then(|header| header.strip_prefix("Bearer "))
        .unwrap_or_default();
    let found = app.tokens.user(&app.store, token, &[AUDIENCE.to_owned()]);
    found.map(|(user, _)| user).ok_or(ApiError::Unauthorized)
}

fn authorize(app: &App, user: &User, asked: &Attributes) -> Result<(), ApiError> {
    match allows(&app.store, user, asked) {
        Some(_) => Ok(()),
        None => Err(ApiError::Forbidden(asked.refusal(user))),
    }
}

async fn resource_request(
    app: &Arc<App>,
    user: &User,
    path: &ResourcePath,
    request: Request<Incoming>,
    parameters: Parameters,
) -> Result<Routed, Refused> {
    let method = request.method().clone();
    let is_review = discovery::REVIEWS
        .iter()
        .any(|(group, _, plural)| *group == path.group && *plural == path.plural);
    if is_review && path.version == "v1" {
        if method != Method::POST {
            return Err(ApiError::MethodNotAllowed.into());
        }
        let asked = Attributes {
            verb: "create".to_owned(),
            group: path.group.clone(),
            resource: path.plural.clone(),
            ..Attributes::default()
        };
        authorize(app, user, &asked)?;
        let drops = meet_fault(app, &fault_target(&asked)).await?;
        let answer = review::answer(app, user, &path.group, &path.plural, body_of(request).await?)?;
        return Ok(Routed {
            response: json_answer(StatusCode::CREATED, read::bytes(&answer), &[]),
            drops,
        });
    }
    let snapshot = app.registry.snapshot();
    let resource = snapshot
        .find(&path.group, &path.version, &path.plural)
        .ok_or(ApiError::UnknownPath)?
        .clone();
    if path.namespace.is_some() && !resource.namespaced {
        return Err(ApiError::UnknownPath.into());
    }
    let subresource = path.subresource.clone().unwrap_or_default();
    let known = match subresource.as_str() {
        "" => true,
        "status" => resource.has_status,
        "scale" => resource.scale.is_some(),
        "finalize" => resource.is("", "namespaces"),
        "token" => resource.is("", "serviceaccounts"),
        _ => false,
    };
    if !known {
        return Err(ApiError::UnknownPath.into());
    }
    let verb = verb(&method, path, &parameters.query)?;
    if subresource == "token" && verb != "create" {
        return Err(ApiError::MethodNotAllowed.into());
    }
    let target = Target {
        resource,
        namespace: path.namespace.clone(),
        name: path.name.clone().unwrap_or_default(),
        subresource,
    };
    if target.resource.namespaced
        && target.namespace.is_none()
        && !matches!(verb, "list" | "watch" | "deletecollection")
        && !target.name.is_empty()
    {
        return Err(ApiError::UnknownPath.into());
    }
    let asked = Attributes {
        verb: verb.to_owned(),
        group: path.group.clone(),
        resource: path.plural.clone(),
        subresource: target.subresource.clone(),
        // A namespace is in itself, as a real server has it.
        namespace: if target.resource.is("", "namespaces") {
            target.name.clone()
        } else {
            target.namespace.clone().unwrap_or_default()
        },
        name: target.name.clone(),
        path: None,
    };
    authorize(app, user, &asked)?;
    let is_change = !matches!(verb, "get" | "list" | "watch");
    if is_change && path.group == RBAC_GROUP && !user.is_master() {
        // A real server lets a user give away what the user has; here only the administrator gives.
        return Err(ApiError::Forbidden("only the administrator changes roles and bindings here".into()).into());
    }
    let fault_target = fault_target(&asked);
    let drops = meet_fault(app, &fault_target).await?;
    let response = perform(app, verb, &target, request, &parameters, fault_target).await;
    if drops {
        return Ok(Routed {
            response: text(""),
            drops,
        });
    }
    Ok(response?.into())
}

fn fault_target(asked: &Attributes) -> faults::Target {
    faults::Target {
        verb: asked.verb.clone(),
        resource: asked.resource.clone(),
        subresource: asked.subresource.clone(),
        name: asked.name.clone(),
    }
}

/// Does what a fault says before the work; answers whether the connection is to be dropped after it.
async fn meet_fault(app: &App, target: &faults::Target) -> Result<bool, Refused> {
    match app.faults.take(target) {
        Some(Action::Answer { code, retry_after }) => {
            let message = format!(
                "fault injected: {} {} is answered with {code}",
                target.verb, target.resource
            );
            Err(ApiError::Injected {
                code,
                message,
                retry_after,
            }
            .into())
        }
        Some(Action::DropBefore) => Err(Refused::Dropped),
        Some(Action::DropAfter) => Ok(true),
        Some(action) => {
            if let Some(delay) = action.delay() {
                tokio::time::sleep(delay).await;
            }
            Ok(false)
        }
        None => Ok(false),
    }
}

async fn perform(
    app: &Arc<App>,
    verb: &str,
    target: &Target,
    request: Request<Incoming>,
    parameters: &Parameters,
    fault_target: faults::Target,
) -> Result<Response<Body>, ApiError> {
    let is_scale = target.subresource == "scale";
    match verb {
        "watch" => {
            let receiver = watch::start(app, target, parameters, fault_target)?;
            let stream = ReceiverStream::new(receiver).map(|chunk| Ok::<_, Infallible>(Frame::data(chunk)));
            Ok(respond(
                StatusCode::OK,
                "application/json",
                BodyExt::boxed(StreamBody::new(stream)),
                &[],
            ))
        }
        "list" => Ok(json_answer(StatusCode::OK, read::list(app, target, parameters)?, &[])),
        "get" if is_scale => Ok(json_answer(StatusCode::OK, read::bytes(&scale::get(app, target)?), &[])),
        "get" => Ok(json_answer(StatusCode::OK, read::get(app, target, parameters)?, &[])),
        "create" if target.subresource == "token" => {
            let answer = review::request_token(app, target, body_of(request).await?)?;
            Ok(json_answer(StatusCode::CREATED, read::bytes(&answer), &[]))
        }
        "create" if target.name.is_empty() => {
            let body = body_of(request).await?;
            written(target, write::create(app, target, body, parameters).await?, parameters)
        }
        "update" if is_scale => {
            let body = body_of(request).await?;
            plain(scale::update(app, target, &body, parameters).await?)
        }
        "update" => {
            let body = body_of(request).await?;
            written(target, write::update(app, target, body, parameters).await?, parameters)
        }
        "patch" => {
            let body = collect(request).await?;
            let patch = Patch::parse(&parameters.content_type, &body)?;
            if is_scale {
                return plain(scale::patch(app, target, &patch, parameters).await?);
            }
            written(target, write::patch(app, target, &patch, parameters).await?, parameters)
        }
        "delete" => {
            let options = Options::parse(&collect(request).await?, parameters)?;
            let deleted = delete::delete(app, target, &options).await?;
            Ok(json_answer(StatusCode::OK, read::bytes(&deleted.answer(target)), &[]))
        }
        "deletecollection" => {
            let options = Options::parse(&collect(request).await?, parameters)?;
            let items = delete::delete_collection(app, target, parameters, &options).await?;
            let (resource, revision) = (&target.resource, app.store.revision().to_string());
            let list = json!({"kind": resource.list_kind, "apiVersion": resource.api_version(), "metadata": {"resourceVersion": revision}, "items": items});
            Ok(json_answer(StatusCode::OK, read::bytes(&list), &[]))
        }
        _ => Err(ApiError::MethodNotAllowed),
    }
}

fn written(target: &Target, written: Written, parameters: &Parameters) -> Result<Response<Body>, ApiError> {
    let status = if written.created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let value = read::one(target, written.object, parameters);
    Ok(json_answer(status, read::bytes(&value), &written.warnings))
}

fn plain(written: Written) -> Result<Response<Body>, ApiError> {
    Ok(json_answer(
        StatusCode::OK,
        read::bytes(&written.object),
        &written.warnings,
    ))
}

async fn collect(request: Request<Incoming>) -> Result<Bytes, ApiError> {
    let media = request
        .headers()
        .get("content-type")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if media.contains("cbor") {
        return Err(ApiError::UnsupportedMediaType("application/json, application/yaml"));
    }
    let is_protobuf = media.starts_with(protobuf::MEDIA_TYPE);
    let body = match Limited::new(request.into_body(), MAX_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => return Err(ApiError::TooLarge(MAX_BODY)),
        Err(error) => return Err(ApiError::BadRequest(format!("reading the body: {error}"))),
    };
    if is_protobuf && !body.is_empty() {
        return Ok(read::bytes(&protobuf::decode(&body)?));
    }
    Ok(body)
}

async fn body_of(request: Request<Incoming>) -> Result<Value, ApiError> {
    write::decode(&collect(request).await?)
}

async fn debug_faults(app: &App, request: Request<Incoming>) -> Result<Routed, Refused> {
    match *request.method() {
        Method::GET => {}
        Method::DELETE => app.faults.clear(),
        Method::POST => {
            let fault: Fault = serde_json::from_slice(&collect(request).await?)
                .map_err(|error| ApiError::BadRequest(format!("reading the fault: {error}")))?;
            if !app.faults.add(fault) {
                return Err(ApiError::Overloaded.into());
            }
        }
        _ => return Err(ApiError::MethodNotAllowed.into()),
    }
    let pending = json!({"pending": app.faults.pending()});
    Ok(json_answer(StatusCode::OK, read::bytes(&pending), &[]).into())
}

fn version() -> Value {
    let like = format!("v1.{LIKE_MINOR}.0-far-devapi.{}", env!("CARGO_PKG_VERSION"));
    json!({"major": "1", "minor": LIKE_MINOR, "gitVersion": like, "gitCommit": "", "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc", "platform": format!("linux/{}", std::env::consts::ARCH)})
}

impl From<Response<Body>> for Routed {
    fn from(response: Response<Body>) -> Self {
        Self { response, drops: false }
    }
}

fn failure(error: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(error.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json_answer(status, read::bytes(&error.status()), &[]);
    if let Some(seconds) = error.retry_after() {
        response.headers_mut().insert("retry-after", seconds.into());
    }
    response
}

fn text(text: &'static str) -> Response<Body> {
    respond(
        StatusCode::OK,
        "text/plain; charset=utf-8",
        Full::new(Bytes::from_static(text.as_bytes())).boxed(),
        &[],
    )
}

fn aggregated_json(document: &Value) -> Response<Body> {
    let media = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    respond(StatusCode::OK, media, Full::new(read::bytes(document)).boxed(), &[])
}

fn json_answer(status: StatusCode, body: Bytes, warnings: &[String]) -> Response<Body> {
    respond(status, "application/json", Full::new(body).boxed(), warnings)
}

fn respond(status: StatusCode, media: &'static str, body: Body, warnings: &[String]) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert("content-type", hyper::header::HeaderValue::from_static(media));
    for warning in warnings {
        let text = format!("299 - \"{}\"", warning.replace('\\', "\\\\").replace('"', "\\\""));
        if let Ok(value) = hyper::header::HeaderValue::from_str(&text) {
            response.headers_mut().append("warning", value);
        }
    }
    response
}
