//! Get and list, with paging and the three forms of an answer.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{BufMut as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Target, is_stored_form, presented};
use crate::app::App;
use crate::error::ApiError;
use crate::request::Parameters;
use crate::selector::Selector;
use crate::store::Object;
use crate::table::{self, Form};

pub(crate) fn get(app: &App, target: &Target, parameters: &Parameters) -> Result<Bytes, ApiError> {
    let object = app.store.get(&target.key()).ok_or_else(|| target.not_found())?;
    if parameters.form == Form::Object && is_stored_form(&target.resource) {
        return Ok(object.json.clone());
    }
    let value = presented(&target.resource, &object);
    Ok(bytes(&one(target, value, parameters)))
}

/// One object in the form asked for.
pub(crate) fn one(target: &Target, value: Value, parameters: &Parameters) -> Value {
    match parameters.form {
        Form::Object => value,
        Form::PartialMetadata => table::partial(&value),
        Form::Table => {
            let metadata = json!({"resourceVersion": value["metadata"]["resourceVersion"]});
            table::table(&target.resource, &[value], metadata, parameters.include, true)
        }
    }
}

pub(crate) fn bytes(value: &Value) -> Bytes {
    serde_json::to_vec(value)
        .expect("a JSON value always serialises")
        .into()
}

/// Where the next page starts.
#[derive(Debug, Serialize, Deserialize)]
struct Continue {
    /// Remembered rest of the list.
    snapshot: u64,
    revision: u64,
    offset: usize,
    resource: String,
    namespace: Option<String>,
}

impl Continue {
    fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).expect("plain fields always serialise"))
    }
    fn decode(text: &str) -> Result<Self, ApiError> {
        let bad = || ApiError::BadRequest("continue key is not valid".into());
        let raw = URL_SAFE_NO_PAD.decode(text).map_err(|_| bad())?;
        serde_json::from_slice(&raw).map_err(|_| bad())
    }
}

pub(crate) fn list(app: &App, target: &Target, parameters: &Parameters) -> Result<Bytes, ApiError> {
    let resource = &target.resource;
    let query = &parameters.query;
    let selector = Selector::parse(
        query.get("labelSelector"),
        query.get("fieldSelector"),
        &resource.selectable,
    )?;
    let limit = query
        .number("limit")?
        .filter(|limit| *limit > 0)
        .map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
    check_revision(app, parameters)?;

    let (revision, all, offset, snapshot) = match query.get("continue") {
        None => {
            let (revision, objects) = app.store.list(&resource.storage, target.namespace.as_deref());
            (revision, Arc::new(objects), 0, None)
        }
        Some(token) => {
            let token = Continue::decode(token)?;
            if token.resource != resource.storage || token.namespace != target.namespace {
                return Err(ApiError::BadRequest("continue key is for another list".into()));
            }
            let gone = "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.";
            let objects = app
                .store
                .snapshot(token.snapshot)
                .filter(|_| token.revision <= app.store.revision());
            (
                token.revision,
                objects.ok_or_else(|| ApiError::Gone(gone.into()))?,
                token.offset,
                Some(token.snapshot),
            )
        }
    };
    let mut page: Vec<Arc<Object>> = Vec::new();
    let mut at = offset;
    while at < all.len() && limit.is_none_or(|limit| page.len() < limit) {
        let object = &all[at];
        at += 1;
        if selector.is_empty() || selector.matches(&presented(resource, object)) {
            page.push(object.clone());
        }
    }
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if at < all.len() {
        let remaining = all.len() - at;
        let snapshot = snapshot.unwrap_or_else(|| app.store.keep_snapshot(all));
        let token = Continue {
            snapshot,
            revision,
            offset: at,
            resource: resource.storage.clone(),
            namespace: target.namespace.clone(),
        };
        metadata["continue"] = json!(token.encode());
        if selector.is_empty() {
            metadata["remainingItemCount"] = json!(remaining);
        }
    } else if resource.is_custom() {
        // As kube-apiserver writes lists of custom kinds; of built-in ones it leaves an empty field out.
        metadata["continue"] = json!("");
    }
    Ok(render(target, &page, metadata, parameters))
}

/// An exact old version cannot be listed: only the present is kept.
fn check_revision(app: &App, parameters: &Parameters) -> Result<(), ApiError> {
    let Some(wanted) = parameters.query.number("resourceVersion")? else {
        return Ok(());
    };
    let current = app.store.revision();
    if wanted > current {
        let message = format!("Too large resource version: {wanted}, current: {current}");
        return Err(ApiError::Injected {
            code: 504,
            message,
            retry_after: Some(1),
        });
    }
    if parameters.query.get("resourceVersionMatch") == Some("Exact") && wanted != current {
        return Err(ApiError::Gone(format!(
            "The resourceVersion for the provided list is too old: {wanted}, only {current} is kept"
        )));
    }
    Ok(())
}

fn render(target: &Target, page: &[Arc<Object>], metadata: Value, parameters: &Parameters) -> Bytes {
    let resource = &target.resource;
    let values = || page.iter().map(|object| presented(resource, object));
    match parameters.form {
        Form::Table => {
            let values: Vec<_> = values().collect();
            bytes(&table::table(resource, &values, metadata, parameters.include, true))
        }
        Form::PartialMetadata => {
            let items: Vec<_> = values().map(|value| table::partial(&value)).collect();
            bytes(
                &json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items}),
            )
        }
        Form::Object => {
            let head = json!({"apiVersion": resource.api_version(), "kind": resource.list_kind, "metadata": metadata});
            let head = bytes(&head);
            let mut out = BytesMut::with_capacity(
                page.iter().map(|object| object.json.len() + 1).sum::<usize>() + head.len() + 16,
            );
            out.put_slice(&head[..head.len() - 1]);
            out.put_slice(b",\"items\":[");
            for (index, object) in page.iter().enumerate() {
                if index > 0 {
                    out.put_u8(b',');
                }
                if is_stored_form(resource) {
                    out.put_slice(&object.json);
                } else {
                    out.put_slice(&bytes(&presented(resource, object)));
                }
            }
            out.put_slice(b"]}");
            out.freeze()
        }
    }
}
