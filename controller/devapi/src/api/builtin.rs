//! The kinds every server has, as far as this project uses them. Schemas come from k8s-openapi's types.

use std::sync::Arc;

use k8s_openapi::api;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use schemars::JsonSchema;
use serde_json::{Value, json};

use super::meta_schema::with_object_meta;
use super::resource::{Cell, Column, Origin, Resource};

pub(crate) const CRD_STORAGE: &str = "apiextensions.k8s.io/customresourcedefinitions";
pub(crate) const NAMESPACE_STORAGE: &str = "core/namespaces";
pub(crate) const EVENT_STORAGE: &str = "core/events";

struct Row {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    namespaced: bool,
    storage: &'static str,
    status: bool,
    generation: bool,
    schema: fn() -> Value,
    columns: Vec<Column>,
    selectable: &'static [&'static str],
}

pub(crate) fn resources() -> Vec<Arc<Resource>> {
    rows().into_iter().map(|row| Arc::new(resource(row))).collect()
}

const EVENT_FIELDS: &[&str] = &[
    ".involvedObject.kind",
    ".involvedObject.namespace",
    ".involvedObject.name",
    ".involvedObject.uid",
    ".involvedObject.apiVersion",
    ".involvedObject.resourceVersion",
    ".involvedObject.fieldPath",
    ".reason",
    ".reportingComponent",
    ".source",
    ".type",
];
const EVENTS_K8S_IO_FIELDS: &[&str] = &[
    ".regarding.kind",
    ".regarding.namespace",
    ".regarding.name",
    ".regarding.uid",
    ".regarding.apiVersion",
    ".regarding.resourceVersion",
    ".regarding.fieldPath",
    ".reason",
    ".reportingController",
    ".type",
];

fn rows() -> Vec<Row> {
    let base = |kind, plural, short, schema, columns| Row {
        group: "",
        kind,
        plural,
        short,
        namespaced: true,
        storage: "",
        status: false,
        generation: false,
        schema,
        columns,
        selectable: &[],
    };
    vec![
        Row {
            namespaced: false,
            status: true,
            storage: NAMESPACE_STORAGE,
            selectable: &[".status.phase"],
            ..base(
                "Namespace",
                "namespaces",
                &["ns"],
                of::<api::core::v1::Namespace>,
                vec![path("Status", ".status.phase"), age()],
            )
        },
        Row {
            storage: "core/configmaps",
            ..base(
                "ConfigMap",
                "configmaps",
                &["cm"],
                of::<api::core::v1::ConfigMap>,
                vec![computed("Data", count_data), age()],
            )
        },
        Row {
            storage: "core/secrets",
            selectable: &[".type"],
            ..base(
                "Secret",
                "secrets",
                &[],
                of::<api::core::v1::Secret>,
                vec![path("Type", ".type"), computed("Data", count_data), age()],
            )
        },
        Row {
            storage: "core/serviceaccounts",
            ..base(
                "ServiceAccount",
                "serviceaccounts",
                &["sa"],
                of::<api::core::v1::ServiceAccount>,
                vec![computed("Secrets", count_secrets), age()],
            )
        },
        Row {
            storage: EVENT_STORAGE,
            selectable: EVENT_FIELDS,
            ..base(
                "Event",
                "events",
                &["ev"],
                of::<api::core::v1::Event>,
                core_event_columns(),
            )
        },
        Row {
            group: "events.k8s.io",
            storage: EVENT_STORAGE,
            selectable: EVENTS_K8S_IO_FIELDS,
            ..base(
                "Event",
                "events",
                &[],
                of::<api::events::v1::Event>,
                new_event_columns(),
            )
        },
        Row {
            group: "coordination.k8s.io",
            storage: "coordination.k8s.io/leases",
            ..base(
                "Lease",
                "leases",
                &[],
                of::<api::coordination::v1::Lease>,
                vec![path("Holder", ".spec.holderIdentity"), age()],
            )
        },
        Row {
            group: "rbac.authorization.k8s.io",
            namespaced: true,
            storage: "rbac.authorization.k8s.io/roles",
            ..base(
                "Role",
                "roles",
                &[],
                of::<api::rbac::v1::Role>,
                vec![path("Created At", ".metadata.creationTimestamp")],
            )
        },
        Row {
            group: "rbac.authorization.k8s.io",
            namespaced: false,
            storage: "rbac.authorization.k8s.io/clusterroles",
            ..base(
                "ClusterRole",
                "clusterroles",
                &[],
                of::<api::rbac::v1::ClusterRole>,
                vec![path("Created At", ".metadata.creationTimestamp")],
            )
        },
        Row {
            group: "rbac.authorization.k8s.io",
            namespaced: true,
            storage: "rbac.authorization.k8s.io/rolebindings",
            ..base(
                "RoleBinding",
                "rolebindings",
                &[],
                of::<api::rbac::v1::RoleBinding>,
                vec![computed("Role", role_of), age()],
            )
        },
        Row {
            group: "rbac.authorization.k8s.io",
            namespaced: false,
            storage: "rbac.authorization.k8s.io/clusterrolebindings",
            ..base(
                "ClusterRoleBinding",
                "clusterrolebindings",
                &[],
                of::<api::rbac::v1::ClusterRoleBinding>,
                vec![computed("Role", role_of), age()],
            )
        },
        Row {
            group: "apiextensions.k8s.io",
            namespaced: false,
            status: true,
            generation: true,
            storage: CRD_STORAGE,
            ..base(
                "CustomResourceDefinition",
                "customresourcedefinitions",
                &["crd", "crds"],
                crd_schema,
                vec![path("Created At", ".metadata.creationTimestamp")],
            )
        },
    ]
}

fn resource(row: Row) -> Resource {
    let mut columns = row.columns;
    columns.insert(0, name());
    Resource {
        group: row.group.to_owned(),
        version: "v1".to_owned(),
        kind: row.kind.to_owned(),
        list_kind: format!("{}List", row.kind),
        plural: row.plural.to_owned(),
        singular: row.kind.to_lowercase(),
        short_names: row.short.iter().map(|s| (*s).to_owned()).collect(),
        categories: if row.group == "apiextensions.k8s.io" {
            vec!["api-extensions".into()]
        } else {
            Vec::new()
        },
        namespaced: row.namespaced,
        storage: row.storage.to_owned(),
        storage_version: "v1".to_owned(),
        schema: Arc::new(with_object_meta((row.schema)())),
        rules: None,
        has_status: row.status,
        scale: None,
        columns,
        selectable: row.selectable.iter().map(|s| (*s).to_owned()).collect(),
        origin: Origin::BuiltIn,
        has_generation: row.generation,
    }
}

/// A type's schema with every reference put in place; the kinds here do not contain themselves.
fn of<T: JsonSchema>() -> Value {
    let settings = schemars::generate::SchemaSettings::openapi3().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    tidy(&mut schema);
    schema
}

/// The CRD's own schema contains itself (`JSONSchemaProps`), so it is described down to `openAPIV3Schema` only.
fn crd_schema() -> Value {
    let mut schema = schemars::generate::SchemaSettings::openapi3()
        .into_generator()
        .into_root_schema_for::<CustomResourceDefinition>()
        .to_value();
    let definitions = schema["components"]["schemas"].clone();
    inline(&mut schema, &definitions);
    if let Some(map) = schema.as_object_mut() {
        map.remove("components");
    }
    tidy(&mut schema);
    schema["properties"]["status"]["properties"]["conditions"]["x-kubernetes-list-type"] = json!("map");
    schema["properties"]["status"]["properties"]["conditions"]["x-kubernetes-list-map-keys"] = json!(["type"]);
    schema["properties"]["spec"]["properties"]["versions"]["x-kubernetes-list-type"] = json!("atomic");
    schema
}

fn inline(schema: &mut Value, definitions: &Value) {
    match schema {
        Value::Object(map) => {
            if let Some(reference) = map.get("$ref").and_then(Value::as_str) {
                let name = reference.rsplit('/').next().unwrap_or_default().to_owned();
                let description = map.get("description").cloned();
                let mut target = if name.ends_with("JSONSchemaProps") {
                    json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
                } else {
                    definitions[&name].clone()
                };
                if let Some(description) = description {
                    target["description"] = description;
                }
                inline(&mut target, definitions);
                *schema = target;
                return;
            }
            map.remove("components");
            map.values_mut().for_each(|child| inline(child, definitions));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| inline(item, definitions)),
        _ => {}
    }
}

/// From schemars' words to the server's: single-branch `allOf`/`anyOf` unwrapped, meta keywords dropped.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("$schema");
            map.remove("title");
            for keyword in ["allOf", "anyOf", "oneOf"] {
                let single = map
                    .get(keyword)
                    .and_then(Value::as_array)
                    .filter(|branches| branches.len() == 1);
                if let Some(Value::Object(inner)) = single.map(|branches| branches[0].clone()) {
                    map.remove(keyword);
                    for (key, value) in inner {
                        map.entry(key).or_insert(value);
                    }
                }
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

fn name() -> Column {
    Column {
        format: "name".into(),
        ..path("Name", ".metadata.name")
    }
}

fn age() -> Column {
    Column {
        kind: "date".into(),
        ..path("Age", ".metadata.creationTimestamp")
    }
}

fn path(name: &str, path: &str) -> Column {
    let (name, cell) = (name.to_owned(), Cell::Path(path.to_owned()));
    Column {
        description: name.clone(),
        name,
        kind: "string".into(),
        format: String::new(),
        priority: 0,
        cell,
    }
}

fn computed(name: &str, cell: fn(&Value) -> Value) -> Column {
    Column {
        kind: "string".into(),
        cell: Cell::Computed(cell),
        ..path(name, "")
    }
}

fn wide(column: Column) -> Column {
    Column { priority: 1, ..column }
}

fn core_event_columns() -> Vec<Column> {
    vec![
        Column {
            kind: "date".into(),
            ..computed("Last Seen", last_seen)
        },
        path("Type", ".type"),
        path("Reason", ".reason"),
        computed("Object", |event| subject(&event["involvedObject"])),
        wide(path("Source", ".source.component")),
        path("Message", ".message"),
        wide(path("Count", ".count")),
    ]
}

fn new_event_columns() -> Vec<Column> {
    vec![
        Column {
            kind: "date".into(),
            ..computed("Last Seen", last_seen)
        },
        path("Type", ".type"),
        path("Reason", ".reason"),
        computed("Object", |event| subject(&event["regarding"])),
        path("Message", ".note"),
    ]
}

fn subject(reference: &Value) -> Value {
    let part = |name: &str| reference[name].as_str().unwrap_or_default();
    json!(format!("{}/{}", part("kind").to_lowercase(), part("name")))
}

fn last_seen(event: &Value) -> Value {
    let candidates = [
        &event["series"]["lastObservedTime"],
        &event["lastTimestamp"],
        &event["deprecatedLastTimestamp"],
        &event["eventTime"],
    ];
    let found = candidates.into_iter().find(|value| value.is_string());
    found.unwrap_or(&event["metadata"]["creationTimestamp"]).clone()
}

fn count_data(object: &Value) -> Value {
    let entries = |name: &str| object[name].as_object().map_or(0, serde_json::Map::len);
    json!((entries("data") + entries("binaryData")).to_string())
}

fn role_of(binding: &Value) -> Value {
    let part = |name: &str| binding["roleRef"][name].as_str().unwrap_or_default();
    json!(format!("{}/{}", part("kind"), part("name")))
}

fn count_secrets(object: &Value) -> Value {
    json!(object["secrets"].as_array().map_or(0, Vec::len).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_of_built_in_kinds_are_whole_and_hold_no_references() {
        for resource in resources() {
            let text = resource.schema.to_string();
            assert!(!text.contains("$ref"), "{}", resource.kind);
            assert_eq!(
                resource.schema["properties"]["metadata"]["type"], "object",
                "{}",
                resource.kind
            );
        }
    }

    #[test]
    fn a_secrets_data_is_a_map_of_base64_text() {
        let all = resources();
        let secret = all.iter().find(|r| r.kind == "Secret").unwrap();
        assert_eq!(
            secret.schema["properties"]["data"]["additionalProperties"]["format"],
            "byte"
        );
    }
}
