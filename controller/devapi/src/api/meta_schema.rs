//! Schema of `metadata`, the same for every kind; the merge keys of its lists follow the real server.

use std::sync::LazyLock;

use serde_json::{Value, json};

pub(crate) static OBJECT_META: LazyLock<Value> = LazyLock::new(|| {
    let string = |text: &str| json!({"type": "string", "description": text});
    let time = |text: &str| json!({"type": "string", "format": "date-time", "description": text});
    let strings =
        |text: &str| json!({"type": "object", "additionalProperties": {"type": "string"}, "description": text});
    json!({
        "type": "object",
        "description": "Standard object's metadata.",
        "properties": {
            "annotations": strings("Unstructured key value map for tools; not queryable."),
            "creationTimestamp": time("When the server created the object. Read-only."),
            "deletionGracePeriodSeconds": {"type": "integer", "format": "int64", "description": "Seconds granted to end before removal. Read-only."},
            "deletionTimestamp": time("When the object was asked to be deleted. Read-only."),
            "finalizers": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set",
                "description": "Must be empty before the object is removed."},
            "generateName": string("Prefix for a name that the server makes unique."),
            "generation": {"type": "integer", "format": "int64", "description": "Counts changes of the wanted state. Read-only."},
            "labels": strings("Key value pairs to select objects by."),
            "managedFields": {"type": "array", "x-kubernetes-list-type": "atomic",
                "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                "description": "Which manager set which fields."},
            "name": string("Unique within a namespace; cannot be changed."),
            "namespace": string("Space within which the name is unique; cannot be changed."),
            "ownerReferences": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uid"],
                "description": "Objects this one depends on: when all are gone, it is deleted.",
                "items": {"type": "object", "required": ["apiVersion", "kind", "name", "uid"], "x-kubernetes-map-type": "atomic",
                    "properties": {
                        "apiVersion": string("API version of the owner."),
                        "blockOwnerDeletion": {"type": "boolean", "description": "Foreground deletion of the owner waits for this object."},
                        "controller": {"type": "boolean", "description": "The owner manages this object."},
                        "kind": string("Kind of the owner."),
                        "name": string("Name of the owner."),
                        "uid": string("UID of the owner."),
                    }}},
            "resourceVersion": string("Changes with every write; opaque. Read-only."),
            "selfLink": string("No longer set."),
            "uid": string("Unique in time and space. Read-only."),
        },
    })
});

/// Puts `apiVersion`, `kind` and `metadata` beside a schema's own properties.
pub(crate) fn with_object_meta(mut schema: Value) -> Value {
    if !schema["properties"].is_object() {
        schema["properties"] = json!({});
    }
    let properties = &mut schema["properties"];
    if !properties["apiVersion"]["description"].is_string() {
        properties["apiVersion"] =
            json!({"type": "string", "description": "Versioned schema of this representation of an object."});
    }
    if !properties["kind"]["description"].is_string() {
        properties["kind"] =
            json!({"type": "string", "description": "REST resource this object represents. In CamelCase."});
    }
    properties["metadata"] = OBJECT_META.clone();
    schema
}
