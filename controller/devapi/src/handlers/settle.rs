//! From what a client sent to what may be stored: pruned, defaulted, completed, checked, with the server's own
//! metadata and the record of who set what.

use serde_json::{Value, json};

use super::Target;
use super::write::Origin;
use crate::admission;
use crate::api::builtin::NAMESPACE_STORAGE;
use crate::app::App;
use crate::error::{ApiError, Cause, Subject};
use crate::meta;
use crate::patch::managed::{self, Writer};
use crate::request::{FieldValidation, Parameters};
use crate::schema::{default, prune, validate};
use crate::store::Key;

/// The new object as it may be stored: server-owned metadata kept, subresources apart, defaults, checks, managers.
pub(super) fn revise(
    target: &Target,
    mut new: Value,
    live: &Value,
    parameters: &Parameters,
    origin: Origin,
) -> Result<(Value, Vec<String>), ApiError> {
    let resource = &target.resource;
    let now = meta::now();
    let managers = new["metadata"]["managedFields"].clone();
    match target.subresource.as_str() {
        "status" => {
            let status = new.get("status").cloned();
            new = live.clone();
            let map = new
                .as_object_mut()
                .ok_or_else(|| ApiError::Internal("stored object is not an object".into()))?;
            match status {
                Some(status) => map.insert("status".into(), status),
                None => map.remove("status"),
            };
            meta::set(&mut new, "managedFields", managers);
        }
        _ if resource.has_status && resource.is_custom() => match (live.get("status"), new.as_object_mut()) {
            (Some(status), Some(map)) => {
                map.insert("status".into(), status.clone());
            }
            (None, Some(map)) => {
                map.remove("status");
            }
            (_, None) => return Err(ApiError::BadRequest("the object is not a JSON object".into())),
        },
        _ => {}
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
        "generateName",
    ] {
        meta::set(
            &mut new,
            field,
            live["metadata"].get(field).cloned().unwrap_or(Value::Null),
        );
    }
    let warnings = settle(target, &mut new, Some(live), parameters, &now)?;
    if resource.has_generation && wanted_state(resource.has_status, &new) != wanted_state(resource.has_status, live) {
        let generation = live["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        meta::set(&mut new, "generation", json!(generation));
    }
    if origin == Origin::Sent {
        managed::record_update(
            &resource.schema,
            Some(live),
            &mut new,
            &writer(target, parameters, &now),
        );
    }
    meta::tidy(&mut new);
    Ok((new, warnings))
}

pub(super) fn writer(target: &Target, parameters: &Parameters, now: &str) -> Writer {
    Writer {
        manager: parameters.manager.clone(),
        api_version: target.resource.api_version(),
        subresource: target.subresource.clone(),
        now: now.to_owned(),
    }
}

/// Everything that raises `generation`.
fn wanted_state(has_status: bool, object: &Value) -> Value {
    let mut rest = object.clone();
    if let Some(map) = rest.as_object_mut() {
        map.remove("metadata");
        if has_status {
            map.remove("status");
        }
    }
    rest
}

/// Equal, the times of managers aside.
pub(super) fn same_but_stamps(new: &Value, live: &Value) -> bool {
    let plain = |object: &Value| {
        let mut object = object.clone();
        for entry in object["metadata"]["managedFields"].as_array_mut().into_iter().flatten() {
            entry["time"] = Value::Null;
        }
        object
    };
    new == live || plain(new) == plain(live)
}

/// Prunes, defaults, completes and validates. Returns warnings.
pub(super) fn settle(
    target: &Target,
    object: &mut Value,
    old: Option<&Value>,
    parameters: &Parameters,
    now: &str,
) -> Result<Vec<String>, ApiError> {
    let resource = &target.resource;
    let unknown = prune::prune(&resource.schema, object);
    let warnings: Vec<String> = unknown.iter().map(|path| format!("unknown field \"{path}\"")).collect();
    if !warnings.is_empty() && parameters.field_validation == FieldValidation::Strict {
        let text = format!(
            "{} in version \"{}\" cannot be handled as a {}: strict decoding error: {}",
            resource.kind,
            resource.version,
            resource.kind,
            warnings.join(", ")
        );
        return Err(ApiError::BadRequest(text));
    }
    default::drop_nulls(&resource.schema, object);
    default::apply(&resource.schema, object);
    admission::complete(resource, object, now);
    let mut causes = meta::check(object, resource.storage == NAMESPACE_STORAGE);
    causes.extend(validate::validate(&resource.schema, object, ""));
    causes.extend(admission::check(resource, object, old));
    if let Some(old) = old.filter(|old| meta::is_deleting(old)) {
        let known = meta::finalizers(old);
        if meta::finalizers(object)
            .iter()
            .any(|finalizer| !known.contains(finalizer))
        {
            let text = "Forbidden: no new finalizers can be added if the object is being deleted";
            causes.push(Cause::new("FieldValueForbidden", "metadata.finalizers", text));
        }
    }
    if causes.is_empty()
        && let Some(rules) = &resource.rules
    {
        causes = rules.check(object, old);
    }
    if !causes.is_empty() {
        return Err(ApiError::Invalid(resource.subject(&target.name), causes));
    }
    let warnings = if parameters.field_validation == FieldValidation::Ignore {
        Vec::new()
    } else {
        warnings
    };
    Ok(warnings)
}

pub(super) fn check_type(target: &Target, object: &Value) -> Result<(), ApiError> {
    let resource = &target.resource;
    if !object.is_object() {
        return Err(ApiError::BadRequest("the body is not a JSON object".into()));
    }
    let (kind, version) = (
        object["kind"].as_str().unwrap_or_default(),
        object["apiVersion"].as_str().unwrap_or_default(),
    );
    if kind.is_empty() {
        return Err(ApiError::BadRequest(format!(
            "Object 'Kind' is missing in '{}'",
            resource.kind
        )));
    }
    if kind != resource.kind || version != resource.api_version() {
        let text = format!(
            "the API version and kind in the data ({version}, {kind}) do not match the expected ones ({}, {})",
            resource.api_version(),
            resource.kind
        );
        return Err(ApiError::BadRequest(text));
    }
    Ok(())
}

/// The namespace of the URL counts; one in the body must agree.
pub(super) fn settle_namespace(target: &Target, object: &mut Value) -> Result<(), ApiError> {
    let sent = meta::text(object, "namespace").to_owned();
    match &target.namespace {
        Some(namespace) if !sent.is_empty() && sent != *namespace => Err(ApiError::BadRequest(format!(
            "the namespace of the provided object does not match the namespace sent on the request ({sent} is not {namespace})"
        ))),
        Some(namespace) => {
            meta::set(object, "namespace", json!(namespace));
            Ok(())
        }
        None if target.resource.namespaced => Err(ApiError::BadRequest(
            "an empty namespace may not be set during creation".into(),
        )),
        None => {
            meta::set(object, "namespace", Value::Null);
            Ok(())
        }
    }
}

/// Nothing is created in a namespace that is not there or on its way out.
pub(super) fn check_namespace(app: &App, target: &Target) -> Result<(), ApiError> {
    let Some(namespace) = &target.namespace else {
        return Ok(());
    };
    let key = Key {
        resource: NAMESPACE_STORAGE.into(),
        namespace: String::new(),
        name: namespace.clone(),
    };
    let subject = Subject {
        plural: "namespaces".into(),
        name: namespace.clone(),
        ..Subject::default()
    };
    let Some(found) = app.store.latest(&key) else {
        return Err(ApiError::NotFound(subject));
    };
    if meta::is_deleting(&found.value()) {
        let (plural, name) = (&target.resource.plural, &target.name);
        return Err(ApiError::Forbidden(format!(
            "{plural} \"{name}\" is forbidden: unable to create new content in namespace {namespace} because it is being terminated"
        )));
    }
    Ok(())
}
