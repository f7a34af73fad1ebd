//! `/api`, `/apis` and the resource lists, in the plain form and in the aggregated one (`apidiscovery.k8s.io/v2`).

use serde_json::{Value, json};

use super::registry::Snapshot;
use super::resource::{Origin, Resource};

const VERBS: [&str; 8] = [
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];
/// Kinds that only answer a question: (group, kind, plural).
pub(crate) const REVIEWS: [(&str, &str, &str); 5] = [
    ("authentication.k8s.io", "TokenReview", "tokenreviews"),
    ("authorization.k8s.io", "SubjectAccessReview", "subjectaccessreviews"),
    ("authentication.k8s.io", "SelfSubjectReview", "selfsubjectreviews"),
    (
        "authorization.k8s.io",
        "SelfSubjectAccessReview",
        "selfsubjectaccessreviews",
    ),
    (
        "authorization.k8s.io",
        "SelfSubjectRulesReview",
        "selfsubjectrulesreviews",
    ),
];

/// Groups with versions, review-only groups included.
pub(crate) fn groups(snapshot: &Snapshot) -> Vec<(String, Vec<String>)> {
    let mut groups = snapshot.groups();
    for (group, _, _) in REVIEWS {
        if !groups.iter().any(|(have, _)| have == group) {
            groups.push((group.to_owned(), vec!["v1".to_owned()]));
        }
    }
    groups
}

pub(crate) fn core_versions(address: &str) -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]})
}

pub(crate) fn group(group: &str, versions: &[String]) -> Value {
    let entries: Vec<_> = versions
        .iter()
        .map(|version| json!({"groupVersion": format!("{group}/{version}"), "version": version}))
        .collect();
    json!({"kind": "APIGroup", "apiVersion": "v1", "name": group, "versions": entries, "preferredVersion": entries[0]})
}

pub(crate) fn group_list(snapshot: &Snapshot) -> Value {
    let groups: Vec<_> = groups(snapshot)
        .iter()
        .filter(|(name, _)| !name.is_empty())
        .map(|(name, versions)| group(name, versions))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

pub(crate) fn resource_list(snapshot: &Snapshot, group: &str, version: &str) -> Option<Value> {
    let mut entries = Vec::new();
    for resource in snapshot
        .resources
        .iter()
        .filter(|r| r.group == group && r.version == version)
    {
        entries.push(entry(resource));
        if resource.has_status {
            let verbs = ["get", "patch", "update"];
            entries.push(sub_entry(resource, "status", &resource.kind, &verbs, None));
        }
        if resource.scale.is_some() {
            let verbs = ["get", "patch", "update"];
            entries.push(sub_entry(
                resource,
                "scale",
                "Scale",
                &verbs,
                Some(("autoscaling", "v1")),
            ));
        }
    }
    if group.is_empty() && version == "v1" {
        entries.push(
            json!({"name": "serviceaccounts/token", "singularName": "", "namespaced": true,
            "group": "authentication.k8s.io", "version": "v1", "kind": "TokenRequest", "verbs": ["create"]}),
        );
    }
    for (_, kind, plural) in REVIEWS.iter().filter(|(of, _, _)| *of == group && version == "v1") {
        entries.push(json!({"name": plural, "singularName": kind.to_lowercase(), "namespaced": false, "kind": kind, "verbs": ["create"]}));
    }
    let group_version = if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    };
    (!entries.is_empty()).then(
        || json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": entries}),
    )
}

fn entry(resource: &Resource) -> Value {
    let mut entry = json!({
        "name": resource.plural, "singularName": resource.singular, "namespaced": resource.namespaced,
        "kind": resource.kind, "verbs": VERBS,
    });
    if !resource.short_names.is_empty() {
        entry["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        entry["categories"] = json!(resource.categories);
    }
    if resource.origin == Origin::Custom {
        entry["storageVersionHash"] = json!("");
    }
    entry
}

fn sub_entry(resource: &Resource, sub: &str, kind: &str, verbs: &[&str], other: Option<(&str, &str)>) -> Value {
    let mut entry = json!({
        "name": format!("{}/{sub}", resource.plural), "singularName": "", "namespaced": resource.namespaced,
        "kind": kind, "verbs": verbs,
    });
    if let Some((group, version)) = other {
        entry["group"] = json!(group);
        entry["version"] = json!(version);
    }
    entry
}

/// The aggregated document for `/api` (core only) or `/apis` (everything else).
pub(crate) fn aggregated(snapshot: &Snapshot, core: bool) -> Value {
    let items: Vec<_> = groups(snapshot)
        .iter()
        .filter(|(name, _)| name.is_empty() == core)
        .map(|(name, versions)| {
            let versions: Vec<_> = versions
                .iter()
                .map(|version| json!({"version": version, "freshness": "Current", "resources": aggregated_resources(snapshot, name, version)}))
                .collect();
            let metadata = if core { json!({"creationTimestamp": null}) } else { json!({"name": name, "creationTimestamp": null}) };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn aggregated_resources(snapshot: &Snapshot, group: &str, version: &str) -> Vec<Value> {
    let mut entries = Vec::new();
    for resource in snapshot
        .resources
        .iter()
        .filter(|r| r.group == group && r.version == version)
    {
        let mut subresources = Vec::new();
        let verbs = ["get", "patch", "update"];
        if resource.has_status {
            let kind = json!({"group": group, "version": version, "kind": resource.kind});
            subresources.push(json!({"subresource": "status", "responseKind": kind, "verbs": verbs}));
        }
        if resource.scale.is_some() {
            let kind = json!({"group": "autoscaling", "version": "v1", "kind": "Scale"});
            subresources.push(json!({"subresource": "scale", "responseKind": kind, "verbs": verbs}));
        }
        if resource.is("", "serviceaccounts") {
            let kind = json!({"group": "authentication.k8s.io", "version": "v1", "kind": "TokenRequest"});
            subresources.push(json!({"subresource": "token", "responseKind": kind, "verbs": ["create"]}));
        }
        let mut entry = json!({
            "resource": resource.plural, "singularResource": resource.singular,
            "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
            "responseKind": {"group": group, "version": version, "kind": resource.kind}, "verbs": VERBS,
        });
        for (name, list) in [
            ("shortNames", &resource.short_names),
            ("categories", &resource.categories),
        ] {
            if !list.is_empty() {
                entry[name] = json!(list);
            }
        }
        if !subresources.is_empty() {
            entry["subresources"] = json!(subresources);
        }
        entries.push(entry);
    }
    for (_, kind, plural) in REVIEWS.iter().filter(|(of, _, _)| *of == group && version == "v1") {
        entries.push(
            json!({"resource": plural, "singularResource": kind.to_lowercase(), "scope": "Cluster",
            "responseKind": {"group": group, "version": version, "kind": kind}, "verbs": ["create"]}),
        );
    }
    entries
}
