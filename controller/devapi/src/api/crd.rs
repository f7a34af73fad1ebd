//! CustomResourceDefinitions: checked, completed with the server's status, and turned into served kinds.

use std::cmp::Reverse;
use std::sync::Arc;

use regex::Regex;
use serde_json::{Value, json};

use super::meta_schema::with_object_meta;
use super::resource::{Cell, Column, Origin, Resource, ScalePaths};
use crate::error::Cause;
use crate::schema::{cel, validate};

/// Keeps a CRD until its objects are gone.
pub(crate) const CLEANUP_FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

/// Orders versions as clients should prefer them: GA before beta before alpha, higher numbers first, then by name.
pub(crate) fn version_priority(version: &str) -> (Reverse<u8>, Reverse<u64>, Reverse<u64>, String) {
    let parsed = version.strip_prefix('v').and_then(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let major: u64 = rest[..digits].parse().ok()?;
        let tail = &rest[digits..];
        match tail {
            "" => Some((3, major, 0)),
            _ => {
                let (rank, minor) = match tail.strip_prefix("beta") {
                    Some(minor) => (2, minor),
                    None => (1, tail.strip_prefix("alpha")?),
                };
                Some((rank, major, minor.parse().ok()?))
            }
        }
    });
    let (rank, major, minor) = parsed.unwrap_or((0, 0, 0));
    (Reverse(rank), Reverse(major), Reverse(minor), version.to_owned())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn versions(crd: &Value) -> impl Iterator<Item = &Value> {
    crd["spec"]["versions"].as_array().into_iter().flatten()
}

/// Fills in what a user may leave out: singular, listKind, conversion.
pub(crate) fn complete(crd: &mut Value) {
    let kind = text(&crd["spec"]["names"]["kind"]);
    let names = &mut crd["spec"]["names"];
    if !names["singular"].is_string() {
        names["singular"] = json!(kind.to_lowercase());
    }
    if !names["listKind"].is_string() {
        names["listKind"] = json!(format!("{kind}List"));
    }
    if !crd["spec"]["conversion"].is_object() {
        crd["spec"]["conversion"] = json!({"strategy": "None"});
    }
}

pub(crate) fn check(crd: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &crd["spec"];
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    for (field, value) in [
        ("spec.group", &spec["group"]),
        ("spec.names.plural", &spec["names"]["plural"]),
        ("spec.names.kind", &spec["names"]["kind"]),
    ] {
        if text(value).is_empty() {
            causes.push(Cause::required(field, ""));
        }
    }
    if crd["metadata"]["name"] != format!("{plural}.{group}") {
        let detail = "must be spec.names.plural+\".\"+spec.group";
        causes.push(Cause::invalid("metadata.name", &crd["metadata"]["name"], detail));
    }
    if !matches!(spec["scope"].as_str(), Some("Namespaced" | "Cluster")) {
        let message = format!(
            "Unsupported value: {}: supported values: \"Cluster\", \"Namespaced\"",
            spec["scope"]
        );
        causes.push(Cause::new("FieldValueNotSupported", "spec.scope", message));
    }
    if versions(crd).filter(|version| version["storage"] == true).count() != 1 {
        let detail = "must have exactly one version marked as storage version";
        causes.push(Cause::new(
            "FieldValueInvalid",
            "spec.versions",
            format!("Invalid value: {detail}"),
        ));
    }
    if spec["conversion"]["strategy"]
        .as_str()
        .is_some_and(|strategy| strategy != "None")
    {
        let message =
            "Unsupported value: conversion by webhook is not part of the embedded API: supported values: \"None\"";
        causes.push(Cause::new(
            "FieldValueNotSupported",
            "spec.conversion.strategy",
            message,
        ));
    }
    for (index, version) in versions(crd).enumerate() {
        let path = format!("spec.versions[{index}].schema.openAPIV3Schema");
        let schema = &version["schema"]["openAPIV3Schema"];
        if !schema.is_object() {
            causes.push(Cause::required(path, "schemas are required"));
            continue;
        }
        if schema["type"] != "object" {
            causes.push(Cause::invalid(
                format!("{path}.type"),
                &schema["type"],
                "must be object at the root",
            ));
        }
        check_structure(schema, &path, 0, &mut causes);
        causes.extend(cel::broken_rules(schema, &path));
    }
    causes
}

/// The structural rules that this server relies on: types everywhere, known list keys, patterns that compile, defaults that fit.
fn check_structure(schema: &Value, path: &str, depth: usize, causes: &mut Vec<Cause>) {
    let free = schema["x-kubernetes-int-or-string"] == true || schema["x-kubernetes-preserve-unknown-fields"] == true;
    if !schema["type"].is_string() && !free {
        causes.push(Cause::required(
            format!("{path}.type"),
            "must not be empty for specified object fields",
        ));
    }
    if depth > 64 {
        causes.push(Cause::new(
            "FieldValueInvalid",
            path,
            "Invalid value: schema is nested too deeply",
        ));
        return;
    }
    if let Some(pattern) = schema["pattern"].as_str()
        && let Err(error) = Regex::new(pattern)
    {
        causes.push(Cause::invalid(
            format!("{path}.pattern"),
            &schema["pattern"],
            &format!("must be a valid regular expression, but isn't: {error}"),
        ));
    }
    if let Some(default) = schema.get("default") {
        let mut whole = default.clone();
        crate::schema::default::apply(schema, &mut whole);
        causes.extend(validate::validate(schema, &whole, &format!("{path}.default")));
    }
    if schema["x-kubernetes-list-type"] == "map" && texts(&schema["x-kubernetes-list-map-keys"]).is_empty() {
        let detail = "must not be empty if x-kubernetes-list-type is map";
        causes.push(Cause::required(format!("{path}.x-kubernetes-list-map-keys"), detail));
    }
    if schema["type"] == "array" && !schema["items"].is_object() {
        causes.push(Cause::required(format!("{path}.items"), "must be specified"));
    }
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        if depth == 0 && name == "metadata" {
            continue;
        }
        check_structure(child, &format!("{path}.properties[{name}]"), depth + 1, causes);
    }
    for keyword in ["items", "additionalProperties"] {
        if schema[keyword].is_object() {
            check_structure(&schema[keyword], &format!("{path}.{keyword}"), depth + 1, causes);
        }
    }
}

/// Status as after a successful establishment; conditions keep their transition time.
pub(crate) fn establish(crd: &mut Value, now: &str) {
    let names = crd["spec"]["names"].clone();
    let storage: Vec<_> = versions(crd)
        .filter(|version| version["storage"] == true)
        .map(|v| v["name"].clone())
        .collect();
    let mut stored = crd["status"]["storedVersions"].as_array().cloned().unwrap_or_default();
    stored.extend(
        storage
            .into_iter()
            .filter(|name| !stored.contains(name))
            .collect::<Vec<_>>(),
    );
    let old = crd["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let condition = |kind: &str, reason: &str, message: &str| {
        let known = old.iter().find(|c| c["type"] == kind && c["status"] == "True");
        known.cloned().unwrap_or_else(
            || json!({"type": kind, "status": "True", "lastTransitionTime": now, "reason": reason, "message": message}),
        )
    };
    let mut conditions = vec![
        condition("NamesAccepted", "NoConflicts", "no conflicts found"),
        condition(
            "Established",
            "InitialNamesAccepted",
            "the initial names have been accepted",
        ),
    ];
    if crd["metadata"]["deletionTimestamp"].is_string() {
        conditions.push(condition(
            "Terminating",
            "InstanceDeletionPending",
            "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
        ));
    }
    crd["status"] = json!({"acceptedNames": names, "storedVersions": stored, "conditions": conditions});
}

/// One served kind per served version.
pub(crate) fn resources(crd: &Value) -> Vec<Arc<Resource>> {
    let spec = &crd["spec"];
    let storage_version = versions(crd)
        .find(|version| version["storage"] == true)
        .map(|v| text(&v["name"]))
        .unwrap_or_default();
    versions(crd)
        .filter(|version| version["served"] == true)
        .map(|version| Arc::new(resource(spec, version, &storage_version)))
        .collect()
}

fn resource(spec: &Value, version: &Value, storage_version: &str) -> Resource {
    let (group, names) = (text(&spec["group"]), &spec["names"]);
    let (kind, plural, name) = (text(&names["kind"]), text(&names["plural"]), text(&version["name"]));
    let schema = &version["schema"]["openAPIV3Schema"];
    let scale = &version["subresources"]["scale"];
    Resource {
        list_kind: names["listKind"]
            .as_str()
            .map_or_else(|| format!("{kind}List"), str::to_owned),
        singular: names["singular"]
            .as_str()
            .map_or_else(|| kind.to_lowercase(), str::to_owned),
        short_names: texts(&names["shortNames"]),
        categories: texts(&names["categories"]),
        namespaced: spec["scope"] != "Cluster",
        storage: format!("{group}/{plural}"),
        storage_version: storage_version.to_owned(),
        rules: Some(Arc::new(cel::Rules::compile(schema, &group, &name, &kind))),
        schema: Arc::new(with_object_meta(schema.clone())),
        has_status: version["subresources"]["status"].is_object(),
        scale: scale.is_object().then(|| ScalePaths {
            spec: text(&scale["specReplicasPath"]),
            status: text(&scale["statusReplicasPath"]),
            selector: scale["labelSelectorPath"].as_str().map(str::to_owned),
        }),
        columns: columns(version),
        selectable: version["selectableFields"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|f| text(&f["jsonPath"]))
            .collect(),
        origin: Origin::Custom,
        has_generation: true,
        version: name,
        group,
        kind,
        plural,
    }
}

fn columns(version: &Value) -> Vec<Column> {
    let column = |name: &str, kind: &str, format: &str, description: &str, priority: i64, path: &str| Column {
        name: name.to_owned(),
        kind: kind.to_owned(),
        format: format.to_owned(),
        description: description.to_owned(),
        priority,
        cell: Cell::Path(path.to_owned()),
    };
    let mut columns = vec![column(
        "Name",
        "string",
        "name",
        "Name must be unique within a namespace.",
        0,
        ".metadata.name",
    )];
    let own = version["additionalPrinterColumns"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    if own.is_empty() {
        columns.push(column(
            "Age",
            "date",
            "",
            "When the object was created.",
            0,
            ".metadata.creationTimestamp",
        ));
    }
    columns.extend(own.iter().map(|c| {
        let part = |name: &str| c[name].as_str().unwrap_or_default();
        column(
            part("name"),
            part("type"),
            part("format"),
            part("description"),
            c["priority"].as_i64().unwrap_or(0),
            part("jsonPath"),
        )
    }));
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_preferred_as_the_real_server_does() {
        let mut versions = vec!["v1alpha1", "v2beta1", "v1", "foo1", "v10", "v2"];
        versions.sort_by_key(|version| version_priority(version));
        assert_eq!(versions, ["v10", "v2", "v1", "v2beta1", "v1alpha1", "foo1"]);
    }

    #[test]
    fn a_wrong_definition_is_refused_with_the_field_named() {
        let crd = json!({"metadata": {"name": "wrong"}, "spec": {"group": "a.b", "scope": "Namespaced",
            "names": {"plural": "things", "kind": "Thing"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema":
                {"type": "object", "properties": {"spec": {"type": "object", "properties": {"x": {"type": "string", "pattern": "("}, "y": {}}}}}}}]}});
        let fields: Vec<_> = check(&crd).into_iter().map(|cause| cause.field).collect();
        let schema = "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties";
        assert_eq!(
            fields,
            [
                "metadata.name".to_owned(),
                format!("{schema}[x].pattern"),
                format!("{schema}[y].type")
            ]
        );
    }
}
