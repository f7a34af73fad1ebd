//! Plain pages over HTTP/1.1 for Prometheus and for probes: `GET` only, bounded in connections and time.

use std::{convert::Infallible, time::Duration};

use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    task::{JoinSet, spawn_blocking},
};
use tokio_util::sync::CancellationToken;

/// Connections at a time; more wait in the backlog.
const MAX_CONNECTIONS: usize = 16;
/// After a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// From accept to the answer.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// HTTP status code.
    pub code: u16,
    /// `Content-Type`.
    pub kind: &'static str,
    /// The body.
    pub text: String,
}

impl Page {
    /// Plain text.
    #[must_use]
    pub fn plain(code: u16, text: impl Into<String>) -> Self {
        Self {
            code,
            kind: "text/plain; charset=utf-8",
            text: text.into(),
        }
    }
}

/// Answers `GET` with the page of a path until `shutdown`; `None` is 404. `page` may block.
pub async fn pages(
    listener: TcpListener,
    page: impl Fn(&str) -> Option<Page> + Clone + Send + 'static,
    shutdown: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                let Ok((stream, _)) = accepted else {
                    // EMFILE and its like: the backlog waits a moment.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                };
                let page = page.clone();
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        let page = page.clone();
                        async move { Ok::<_, Infallible>(answer(&request, page).await) }
                    });
                    let serving = http1::Builder::new()
                        .timer(TokioTimer::new())
                        .keep_alive(false)
                        .serve_connection(TokioIo::new(stream), service);
                    // A client that breaks off or stalls is no concern of ours.
                    let _ = tokio::time::timeout(REQUEST_LIMIT, serving).await;
                });
            }
        }
    }
}

async fn answer(
    request: &Request<Incoming>,
    page: impl Fn(&str) -> Option<Page> + Send + 'static,
) -> Response<Full<Bytes>> {
    let mut found = None;
    if request.method() == "GET" {
        let path = request.uri().path().to_owned();
        found = spawn_blocking(move || page(&path)).await.ok().flatten();
    }
    let page = found.unwrap_or_else(|| Page::plain(404, "not found\n"));
    let mut response = Response::new(Full::new(Bytes::from(page.text)));
    *response.status_mut() = StatusCode::from_u16(page.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
        .headers_mut()
        .insert("content-type", hyper::header::HeaderValue::from_static(page.kind));
    response
}
