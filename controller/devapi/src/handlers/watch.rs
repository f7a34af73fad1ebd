//! Watches: a stream of events that a task reads from the bounded history. A client that reads too slowly is not
//! buffered for: it falls out of the history and is told 410.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Target, is_stored_form, presented, read};
use crate::app::App;
use crate::error::ApiError;
use crate::faults;
use crate::request::Parameters;
use crate::selector::Selector;
use crate::store::{Event, EventKind, Object};
use crate::table::{self, Form};

/// Chunks that wait for the connection; more wait in the history.
const CHANNEL: usize = 16;
const EVENTS_PER_READ: usize = 256;
/// A client that takes nothing for so long is cut off.
const STALL: Duration = Duration::from_secs(60);
const BOOKMARK_EVERY: Duration = Duration::from_secs(30);
/// Watches without `timeoutSeconds` end after 30 to 60 minutes, as on the real server.
const DEFAULT_TIMEOUT_SECONDS: u64 = 1800;

struct Watch {
    app: Arc<App>,
    target: Target,
    parameters: Parameters,
    selector: Selector,
    fault_target: faults::Target,
    sender: mpsc::Sender<Bytes>,
    bookmarks: bool,
    first_table: bool,
}

/// Starts a watch; errors that are known at once are answered as such, later ones are events of the stream.
pub(crate) fn start(
    app: &Arc<App>,
    target: &Target,
    parameters: &Parameters,
    fault_target: faults::Target,
) -> Result<mpsc::Receiver<Bytes>, ApiError> {
    let resource = &target.resource;
    let query = &parameters.query;
    let mut selector = Selector::parse(
        query.get("labelSelector"),
        query.get("fieldSelector"),
        &resource.selectable,
    )?;
    if !target.name.is_empty() {
        selector.require_name(&target.name);
    }
    let timeout = query
        .number("timeoutSeconds")?
        .unwrap_or_else(|| DEFAULT_TIMEOUT_SECONDS + rand::rng().random_range(0..DEFAULT_TIMEOUT_SECONDS));
    let revision = query.number("resourceVersion")?.unwrap_or(0);
    let initial = match query.get("sendInitialEvents") {
        Some("true") => {
            if query.get("resourceVersionMatch") != Some("NotOlderThan") {
                return Err(ApiError::BadRequest("resourceVersionMatch: Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan".into()));
            }
            true
        }
        Some("false") => false,
        _ => revision == 0,
    };
    let current = app.store.revision();
    if revision > current {
        // A version of another store: the client must list anew.
        return Err(ApiError::Gone(format!(
            "too large resource version: {revision} (current: {current})"
        )));
    }
    if revision > 0 && !initial {
        app.store
            .events(&resource.storage, revision, 0)
            .map_err(|too_old| gone(&too_old))?;
    }
    let (sender, receiver) = mpsc::channel(CHANNEL);
    let watch = Watch {
        app: app.clone(),
        target: target.clone(),
        selector,
        fault_target,
        sender,
        bookmarks: query.flag("allowWatchBookmarks"),
        first_table: true,
        parameters: parameters.clone(),
    };
    let asked_initial = query.flag("sendInitialEvents");
    let from = match (initial, revision) {
        (true, _) => None,
        (false, 0) => Some(current),
        (false, revision) => Some(revision),
    };
    tokio::spawn(watch.run(from, asked_initial, Instant::now() + Duration::from_secs(timeout)));
    Ok(receiver)
}

fn gone(too_old: &crate::store::TooOld) -> ApiError {
    ApiError::Gone(format!(
        "too old resource version: {} ({})",
        too_old.requested, too_old.oldest
    ))
}

/// The client is gone or too slow.
struct Ended;

impl Watch {
    async fn run(mut self, from: Option<u64>, asked_initial: bool, deadline: Instant) {
        let stopping = self.app.stopping.clone();
        let sender = self.sender.clone();
        tokio::select! {
            () = stopping.cancelled() => {}
            () = sender.closed() => {}
            () = tokio::time::sleep_until(deadline) => {}
            _ = self.serve(from, asked_initial) => {}
        }
    }

    async fn serve(&mut self, from: Option<u64>, asked_initial: bool) -> Result<(), Ended> {
        let mut committed = self.app.store.subscribe();
        let mut faults = self.app.faults.subscribe();
        let mut cursor = match from {
            Some(revision) => revision,
            None => self.send_initial(asked_initial).await?,
        };
        let mut next_bookmark = Instant::now() + BOOKMARK_EVERY;
        loop {
            if self.app.faults.expires_watch(&self.fault_target) {
                return self
                    .send_error(&ApiError::Gone("too old resource version (fault injected)".into()))
                    .await;
            }
            committed.borrow_and_update();
            match self
                .app
                .store
                .events(&self.target.resource.storage, cursor, EVENTS_PER_READ)
            {
                Ok((events, reached)) => {
                    let full = events.len() == EVENTS_PER_READ;
                    let mut chunk = BytesMut::new();
                    events.iter().for_each(|event| self.encode(event, &mut chunk));
                    if !chunk.is_empty() {
                        self.send(chunk.freeze()).await?;
                    }
                    cursor = reached;
                    if full {
                        continue;
                    }
                }
                Err(too_old) => return self.send_error(&gone(&too_old)).await,
            }
            if self.bookmarks && Instant::now() >= next_bookmark {
                self.send(self.bookmark(cursor, false)).await?;
                next_bookmark = Instant::now() + BOOKMARK_EVERY;
            }
            tokio::select! {
                changed = committed.changed() => if changed.is_err() { return Ok(()) },
                changed = faults.changed() => if changed.is_err() { return Ok(()) },
                () = tokio::time::sleep_until(next_bookmark) => {
                    if !self.bookmarks {
                        next_bookmark = Instant::now() + BOOKMARK_EVERY;
                    }
                }
            }
        }
    }

    /// All present objects as ADDED, then the bookmark that ends them when it was asked for.
    async fn send_initial(&mut self, asked: bool) -> Result<u64, Ended> {
        let (revision, objects) = self
            .app
            .store
            .list(&self.target.resource.storage, self.target.namespace.as_deref());
        for chunk in objects.chunks(EVENTS_PER_READ) {
            let mut out = BytesMut::new();
            for object in chunk {
                if self.matches(object) {
                    self.put("ADDED", object, &mut out);
                }
            }
            if !out.is_empty() {
                self.send(out.freeze()).await?;
            }
        }
        if asked {
            self.send(self.bookmark(revision, true)).await?;
        }
        Ok(revision)
    }

    fn matches(&self, object: &Object) -> bool {
        self.target
            .namespace
            .as_ref()
            .is_none_or(|namespace| object.key.namespace == *namespace)
            && (self.selector.is_empty() || self.selector.matches(&presented(&self.target.resource, object)))
    }

    /// An object that enters or leaves the selection is added or deleted for this client.
    fn encode(&mut self, event: &Event, out: &mut BytesMut) {
        let before = event.previous.as_ref().is_some_and(|previous| self.matches(previous));
        let kind = match event.kind {
            EventKind::Deleted if before || (event.previous.is_none() && self.matches(&event.object)) => "DELETED",
            EventKind::Deleted => return,
            EventKind::Added | EventKind::Modified => match (before, self.matches(&event.object)) {
                (false, true) => "ADDED",
                (true, true) => "MODIFIED",
                (true, false) => "DELETED",
                (false, false) => return,
            },
        };
        self.put(kind, &event.object, out);
    }

    fn put(&mut self, kind: &str, object: &Object, out: &mut BytesMut) {
        let resource = &self.target.resource;
        out.put_slice(b"{\"type\":\"");
        out.put_slice(kind.as_bytes());
        out.put_slice(b"\",\"object\":");
        match self.parameters.form {
            Form::Object if is_stored_form(resource) => out.put_slice(&object.json),
            Form::Object => out.put_slice(&read::bytes(&presented(resource, object))),
            Form::PartialMetadata => out.put_slice(&read::bytes(&table::partial(&presented(resource, object)))),
            Form::Table => {
                let metadata = json!({"resourceVersion": object.revision.to_string()});
                let values = [presented(resource, object)];
                let headers = std::mem::take(&mut self.first_table);
                out.put_slice(&read::bytes(&table::table(
                    resource,
                    &values,
                    metadata,
                    self.parameters.include,
                    headers,
                )));
            }
        }
        out.put_slice(b"}\n");
    }

    fn bookmark(&self, revision: u64, ends_initial: bool) -> Bytes {
        let resource = &self.target.resource;
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if ends_initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object: Value = match self.parameters.form {
            Form::Object => json!({"kind": resource.kind, "apiVersion": resource.api_version(), "metadata": metadata}),
            Form::PartialMetadata => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
            }
            Form::Table => table::table(resource, &[], metadata, self.parameters.include, false),
        };
        line("BOOKMARK", &object)
    }

    async fn send_error(&self, error: &ApiError) -> Result<(), Ended> {
        self.send(line("ERROR", &error.status())).await
    }

    async fn send(&self, chunk: Bytes) -> Result<(), Ended> {
        match self.sender.send_timeout(chunk, STALL).await {
            Ok(()) => Ok(()),
            Err(_) => {
                tracing::debug!(resource = %self.target.resource.plural, "a watcher went away or did not read");
                Err(Ended)
            }
        }
    }
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut line = json!({"type": kind, "object": object}).to_string();
    line.push('\n');
    line.into()
}
