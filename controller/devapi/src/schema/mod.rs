//! Structural schemas (OpenAPI v3 as CRDs carry it): defaulting, pruning, validation and CEL rules.

pub(crate) mod cel;
pub(crate) mod default;
pub(crate) mod prune;
pub(crate) mod validate;

use serde_json::Value;

/// Whether unknown fields stay: the schema says so, or says nothing about its content.
pub(crate) fn preserves_unknown(schema: &Value) -> bool {
    schema["x-kubernetes-preserve-unknown-fields"] == true
}

pub(crate) fn is_int_or_string(schema: &Value) -> bool {
    schema["x-kubernetes-int-or-string"] == true || schema["format"] == "int-or-string"
}

/// Schema of a field: a property, else the map's value schema.
pub(crate) fn field<'a>(schema: &'a Value, name: &str) -> Option<&'a Value> {
    match schema.get("properties").and_then(|properties| properties.get(name)) {
        Some(property) => Some(property),
        None => schema.get("additionalProperties").filter(|values| values.is_object()),
    }
}

/// `a.b` for plain names, `a[b.c]` for map keys that hold dots, as the real server writes paths.
pub(crate) fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}
