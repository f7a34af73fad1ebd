//! OpenAPI v3 documents per group version, as kubectl reads them for `explain`, validation and patches.

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::meta_schema::OBJECT_META;
use super::registry::Snapshot;
use super::resource::Resource;

const META_NAME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const LIST_META_NAME: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() {
        format!("api/{version}")
    } else {
        format!("apis/{group}/{version}")
    }
}

/// `/openapi/v3`: where each group version's document is, with a hash that changes with it.
pub(crate) fn index(snapshot: &Snapshot) -> Value {
    let mut paths = Map::new();
    for (group, versions) in snapshot.groups() {
        for version in versions {
            let path = path_of(&group, &version);
            let text = document(snapshot, &path).unwrap_or_default().to_string();
            let hash = hex(&Sha256::digest(text.as_bytes()));
            paths.insert(
                path.clone(),
                json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}")}),
            );
        }
    }
    json!({"paths": paths})
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// `path` is `api/v1` or `apis/G/V`.
pub(crate) fn document(snapshot: &Snapshot, path: &str) -> Option<Value> {
    let resources: Vec<_> = snapshot
        .resources
        .iter()
        .filter(|r| path_of(&r.group, &r.version) == path)
        .collect();
    if resources.is_empty() {
        return None;
    }
    let mut schemas = Map::new();
    schemas.insert(META_NAME.into(), OBJECT_META.clone());
    schemas.insert(
        LIST_META_NAME.into(),
        json!({"type": "object", "description": "Metadata of a list.", "properties": {
        "continue": {"type": "string", "description": "Token for the next page."},
        "remainingItemCount": {"type": "integer", "format": "int64", "description": "Items after this page."},
        "resourceVersion": {"type": "string", "description": "Version of the list."}}}),
    );
    let mut paths = Map::new();
    for resource in resources {
        let name = schema_name(resource);
        let gvk = json!([gvk(resource, &resource.kind)]);
        let mut schema = (*resource.schema).clone();
        schema["x-kubernetes-group-version-kind"] = gvk.clone();
        schema["properties"]["metadata"] = json!({"allOf": [{"$ref": format!("#/components/schemas/{META_NAME}")}], "default": {}, "description": "Standard object's metadata."});
        schemas.insert(format!("{name}List"), json!({
            "type": "object", "required": ["items"], "x-kubernetes-group-version-kind": [self::gvk(resource, &resource.list_kind)],
            "properties": {"apiVersion": {"type": "string"}, "kind": {"type": "string"},
                "metadata": {"allOf": [{"$ref": format!("#/components/schemas/{LIST_META_NAME}")}]},
                "items": {"type": "array", "items": {"allOf": [{"$ref": format!("#/components/schemas/{name}")}]}}},
        }));
        schemas.insert(name.clone(), schema);
        add_paths(&mut paths, resource, &name);
    }
    Some(
        json!({"openapi": "3.0.0", "info": {"title": "far-devapi", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths, "components": {"schemas": schemas}}),
    )
}

/// `dev.tiffany.v1.FarAgent`.
fn schema_name(resource: &Resource) -> String {
    let group = if resource.group.is_empty() {
        "core.api.k8s.io"
    } else {
        &resource.group
    };
    let reversed: Vec<_> = group.split('.').rev().collect();
    format!("{}.{}.{}", reversed.join("."), resource.version, resource.kind)
}

fn gvk(resource: &Resource, kind: &str) -> Value {
    json!({"group": resource.group, "version": resource.version, "kind": kind})
}

fn add_paths(paths: &mut Map<String, Value>, resource: &Resource, name: &str) {
    let root = path_of(&resource.group, &resource.version);
    let space = if resource.namespaced {
        "/namespaces/{namespace}"
    } else {
        ""
    };
    let collection = format!("/{root}{space}/{}", resource.plural);
    let parameter =
        |name: &str| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}});
    let write: Vec<_> = ["dryRun", "fieldManager", "fieldValidation"]
        .into_iter()
        .map(parameter)
        .collect();
    let patch: Vec<_> = ["dryRun", "fieldManager", "fieldValidation", "force"]
        .into_iter()
        .map(parameter)
        .collect();
    let reference = json!({"$ref": format!("#/components/schemas/{name}")});
    let list_reference = json!({"$ref": format!("#/components/schemas/{name}List")});
    let operation = |action: &str, verb: &str, parameters: &[Value], answer: &Value, has_body: bool| {
        let mut operation = json!({
            "operationId": format!("{verb}{}{}", resource.version, resource.kind), "parameters": parameters, "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk(resource, &resource.kind),
            "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": answer}}}},
        });
        if has_body {
            operation["requestBody"] = json!({"content": {"application/json": {"schema": reference}}});
        }
        operation
    };
    let in_path = |names: &[&str]| -> Vec<Value> {
        names.iter().map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "uniqueItems": true}})).collect()
    };
    let (outer, inner): (&[&str], &[&str]) = if resource.namespaced {
        (&["namespace"], &["name", "namespace"])
    } else {
        (&[], &["name"])
    };
    paths.insert(
        collection.clone(),
        json!({
            "get": operation("list", "list", &[], &list_reference, false),
            "post": operation("post", "create", &write, &reference, true),
            "parameters": in_path(outer),
        }),
    );
    paths.insert(
        format!("{collection}/{{name}}"),
        json!({
            "get": operation("get", "read", &[], &reference, false),
            "put": operation("put", "replace", &write, &reference, true),
            "patch": operation("patch", "patch", &patch, &reference, true),
            "delete": operation("delete", "delete", &[], &json!({"type": "object"}), false),
            "parameters": in_path(inner),
        }),
    );
}
