//! What the real server adds to or refuses in the built-in kinds, beyond their schema.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::api::crd;
use crate::api::resource::Resource;
use crate::error::Cause;
use crate::meta;

/// Before validation; `now` is RFC 3339.
pub(crate) fn complete(resource: &Resource, object: &mut Value, now: &str) {
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "secrets") => secret(object),
        ("", "namespaces") => namespace(object),
        ("apiextensions.k8s.io", "customresourcedefinitions") => {
            crd::complete(object);
            crd::establish(object, now);
        }
        _ => {}
    }
}

/// `stringData` is for writing only.
fn secret(object: &mut Value) {
    let Some(map) = object.as_object_mut() else { return };
    if let Some(Value::Object(plain)) = map.remove("stringData") {
        let data = map.entry("data").or_insert_with(|| json!({}));
        for (key, value) in plain {
            data[key] = json!(STANDARD.encode(value.as_str().unwrap_or_default()));
        }
    }
    map.entry("type").or_insert_with(|| json!("Opaque"));
}

fn namespace(object: &mut Value) {
    let name = object["metadata"]["name"].clone();
    if !object["metadata"]["labels"].is_object() {
        meta::set(object, "labels", json!({}));
    }
    object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
    if !object["spec"].is_object() {
        object["spec"] = json!({"finalizers": ["kubernetes"]});
    }
    let phase = if meta::is_deleting(object) {
        "Terminating"
    } else {
        "Active"
    };
    object["status"] = json!({"phase": phase});
}

pub(crate) fn check(resource: &Resource, new: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = Vec::new();
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "secrets") => {
            if old.is_some_and(|old| old["type"] != new["type"]) {
                causes.push(Cause::invalid("type", &new["type"], "field is immutable"));
            }
            immutable(new, old, &["data"], &mut causes);
        }
        ("", "configmaps") => immutable(new, old, &["data", "binaryData"], &mut causes),
        ("apiextensions.k8s.io", "customresourcedefinitions") => {
            causes.extend(crd::check(new));
            for field in ["group", "scope"] {
                if old.is_some_and(|old| old["spec"][field] != new["spec"][field]) {
                    causes.push(Cause::invalid(
                        format!("spec.{field}"),
                        &new["spec"][field],
                        "field is immutable",
                    ));
                }
            }
            for field in ["plural", "kind"] {
                if old.is_some_and(|old| old["spec"]["names"][field] != new["spec"]["names"][field]) {
                    let value = &new["spec"]["names"][field];
                    causes.push(Cause::invalid(
                        format!("spec.names.{field}"),
                        value,
                        "field is immutable",
                    ));
                }
            }
        }
        _ => {}
    }
    causes
}

fn immutable(new: &Value, old: Option<&Value>, fields: &[&str], causes: &mut Vec<Cause>) {
    let Some(old) = old.filter(|old| old["immutable"] == true) else {
        return;
    };
    for field in fields.iter().chain(&["immutable"]) {
        if old[field] != new[field] {
            let text = "Forbidden: field is immutable when `immutable` is set";
            causes.push(Cause::new("FieldValueForbidden", *field, text));
        }
    }
}
