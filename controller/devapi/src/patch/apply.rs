//! Server-side apply: the config is laid over the live object, fields the manager gave up go away, fields of others
//! conflict unless forced.

use serde_json::Value;

use super::fieldset::FieldSet;
use super::managed::{self, Entry, Writer};
use super::walk;
use crate::error::{ApiError, Cause};

/// What this endpoint may set: `status` only, or everything but it.
pub(crate) fn reset_fields(set: &mut FieldSet, has_status: bool, subresource: &str) {
    match subresource {
        "status" => set.retain_roots(|root| root == "f:status"),
        _ if has_status => set.retain_roots(|root| root != "f:status"),
        _ => {}
    }
}

/// `live` is `None` when the object is created by this apply. Returns the object with its new `managedFields`.
pub(crate) fn apply(
    schema: &Value,
    has_status: bool,
    live: Option<&Value>,
    config: &Value,
    writer: &Writer,
    force: bool,
) -> Result<Value, ApiError> {
    let mut config = config.clone();
    match writer.subresource.as_str() {
        "status" => retain(&mut config, |field| {
            matches!(field, "apiVersion" | "kind" | "metadata" | "status")
        }),
        _ if has_status => retain(&mut config, |field| field != "status"),
        _ => {}
    }
    let mut wanted = walk::fields(Some(schema), &config);
    managed::strip_unmanaged(&mut wanted);
    reset_fields(&mut wanted, has_status, &writer.subresource);

    let Some(live) = live else {
        let mut created = config;
        managed::write(&mut created, vec![Entry::new(writer, true, wanted)]);
        return Ok(created);
    };
    let mut over = config;
    if let Some(metadata) = over["metadata"].as_object_mut() {
        for server_owned in [
            "uid",
            "resourceVersion",
            "generation",
            "creationTimestamp",
            "deletionTimestamp",
            "managedFields",
        ] {
            metadata.remove(server_owned);
        }
    }
    let mut merged = walk::merge(Some(schema), live, &over);

    let mut entries = managed::read(live);
    let mut before = None;
    entries.retain(|entry| {
        let mine = entry.is(writer, true);
        if mine {
            before = Some(entry.clone());
        }
        !mine
    });
    let changed = walk::compare(Some(schema), Some(live), Some(&merged)).changed;
    let conflicts: Vec<(usize, FieldSet)> = entries
        .iter()
        .enumerate()
        .map(|(at, entry)| (at, entry.fields.intersection(&changed).intersection(&wanted)))
        .filter(|(_, common)| !common.is_empty())
        .collect();
    if !force && !conflicts.is_empty() {
        return Err(conflict(&entries, &conflicts));
    }
    for (at, common) in &conflicts {
        entries[*at].fields = entries[*at].fields.difference(common);
    }
    if let Some(before) = &before {
        let mut keep = wanted.clone();
        entries.iter().for_each(|entry| keep.union(&entry.fields));
        walk::remove(Some(schema), &mut merged, &walk::with_containers(&before.fields), &keep);
    }
    let unchanged = before.filter(|before| before.fields == wanted && before.api_version == writer.api_version);
    entries.push(unchanged.unwrap_or_else(|| Entry::new(writer, true, wanted)));
    managed::write(&mut merged, entries);
    Ok(merged)
}

fn retain(object: &mut Value, keep: impl Fn(&str) -> bool) {
    if let Some(map) = object.as_object_mut() {
        map.retain(|field, _| keep(field));
    }
}

fn conflict(entries: &[Entry], conflicts: &[(usize, FieldSet)]) -> ApiError {
    let mut causes = Vec::new();
    let mut texts = Vec::new();
    for (at, common) in conflicts {
        let entry = &entries[*at];
        let mut with = format!("{:?}", entry.manager);
        if !entry.subresource.is_empty() {
            with.push_str(&format!(" with subresource {:?}", entry.subresource));
        }
        // kube-apiserver 1.36 names the version of updates only, and no time.
        if !entry.is_apply {
            with.push_str(&format!(" using {}", entry.api_version));
        }
        let paths = common.paths();
        for path in &paths {
            causes.push(Cause::new(
                "FieldManagerConflict",
                path.clone(),
                format!("conflict with {with}"),
            ));
        }
        texts.push(match paths.as_slice() {
            [one] => format!("conflict with {with}: {one}"),
            many => format!("conflicts with {with}:\n- {}", many.join("\n- ")),
        });
    }
    let count = causes.len();
    let noun = if count == 1 { "conflict" } else { "conflicts" };
    ApiError::ApplyConflict {
        message: format!("Apply failed with {count} {noun}: {}", texts.join("\n")),
        causes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema() -> Value {
        let condition = json!({"type": "object", "properties": {"type": {}, "status": {}, "reason": {}}});
        json!({"properties": {
            "metadata": crate::api::meta_schema::OBJECT_META.clone(),
            "spec": {"properties": {"image": {}, "cpu": {}, "args": {"items": {}}, "nested": {"properties": {"x": {}}},
                "env": {"items": {"properties": {"name": {}, "value": {}}}, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}}},
            "status": {"properties": {"phase": {}, "conditions": {"items": condition, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}}}
        }})
    }
    fn by(manager: &str, subresource: &str) -> Writer {
        Writer {
            manager: manager.into(),
            api_version: "t/v1".into(),
            subresource: subresource.into(),
            now: "2026-01-01T00:00:00Z".into(),
        }
    }
    fn apply_spec(live: Option<&Value>, manager: &str, spec: Value, force: bool) -> Result<Value, ApiError> {
        apply(
            &schema(),
            true,
            live,
            &json!({"metadata": {"name": "a"}, "spec": spec}),
            &by(manager, ""),
            force,
        )
    }
    fn apply_status(live: &Value, manager: &str, status: Value) -> Result<Value, ApiError> {
        apply(
            &schema(),
            true,
            Some(live),
            &json!({"metadata": {"name": "a"}, "status": status}),
            &by(manager, "status"),
            false,
        )
    }

    #[test]
    fn what_the_manager_no_longer_applies_goes_away() {
        let first = apply_spec(None, "m", json!({"image": "a", "cpu": 1, "nested": {"x": 1}, "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}), false).unwrap();
        let second = apply_spec(
            Some(&first),
            "m",
            json!({"image": "a", "env": [{"name": "B", "value": "3"}]}),
            false,
        )
        .unwrap();
        assert_eq!(
            second["spec"],
            json!({"image": "a", "env": [{"name": "B", "value": "3"}]})
        );
    }

    #[test]
    fn another_managers_field_conflicts_unless_forced() {
        let first = apply_spec(None, "one", json!({"image": "a", "cpu": 1}), false).unwrap();
        let error = apply_spec(Some(&first), "two", json!({"image": "b"}), false).unwrap_err();
        assert_eq!(error.code(), 409);
        assert_eq!(
            error.to_string(),
            "Apply failed with 1 conflict: conflict with \"one\": .spec.image"
        );
        let forced = apply_spec(Some(&first), "two", json!({"image": "b"}), true).unwrap();
        assert_eq!(forced["spec"], json!({"image": "b", "cpu": 1}));
        let owned: Vec<_> = managed::read(&forced)
            .into_iter()
            .map(|e| (e.manager, e.fields.paths()))
            .collect();
        assert_eq!(
            owned,
            [
                ("one".to_owned(), vec![".spec.cpu".to_owned()]),
                ("two".to_owned(), vec![".spec.image".to_owned()])
            ]
        );
    }

    #[test]
    fn the_same_value_is_shared_without_conflict_and_stays_while_one_owns_it() {
        let first = apply_spec(None, "one", json!({"image": "a", "cpu": 1}), false).unwrap();
        let shared = apply_spec(Some(&first), "two", json!({"image": "a"}), false).unwrap();
        let left = apply_spec(Some(&shared), "one", json!({"cpu": 1}), false).unwrap();
        assert_eq!(left["spec"], json!({"image": "a", "cpu": 1}));
        let gone = apply_spec(Some(&left), "two", json!({}), false).unwrap();
        assert_eq!(gone["spec"], json!({"cpu": 1}));
    }

    #[test]
    fn two_managers_keep_their_own_conditions() {
        let object = apply_spec(None, "user", json!({"image": "a"}), false).unwrap();
        let one = apply_status(
            &object,
            "one",
            json!({"phase": "Pending", "conditions": [{"type": "A", "status": "True"}]}),
        )
        .unwrap();
        let two = apply_status(&one, "two", json!({"conditions": [{"type": "B", "status": "True"}]})).unwrap();
        assert_eq!(
            two["status"]["conditions"],
            json!([{"type": "A", "status": "True"}, {"type": "B", "status": "True"}])
        );
        let three = apply_status(&two, "one", json!({"phase": "Running"})).unwrap();
        assert_eq!(
            three["status"],
            json!({"phase": "Running", "conditions": [{"type": "B", "status": "True"}]})
        );
        assert_eq!(three["spec"], json!({"image": "a"}));
    }

    #[test]
    fn applying_the_same_again_changes_nothing() {
        let first = apply_spec(None, "m", json!({"image": "a", "env": [{"name": "A"}]}), false).unwrap();
        let mut later = by("m", "");
        later.now = "2027-01-01T00:00:00Z".into();
        let config = json!({"metadata": {"name": "a"}, "spec": {"image": "a", "env": [{"name": "A"}]}});
        assert_eq!(
            apply(&schema(), true, Some(&first), &config, &later, false).unwrap(),
            first
        );
    }

    mod any_sequence {
        use super::*;
        use crate::patch::fieldset::FieldSet;
        use proptest::prelude::*;

        fn schema() -> Value {
            json!({"properties": {"metadata": crate::api::meta_schema::OBJECT_META.clone(), "spec": {"properties": {
                "image": {}, "args": {"items": {}}, "tags": {"items": {}, "x-kubernetes-list-type": "set"},
                "nested": {"properties": {"x": {}, "y": {}}}, "labels": {"additionalProperties": {}},
                "env": {"items": {"properties": {"name": {}, "value": {}}}, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}}}}})
        }

        /// A spec in which every part may be missing.
        fn spec() -> impl Strategy<Value = Value> {
            let part = || prop::option::of(0..3_u8);
            let subset = || prop::collection::btree_map(prop::sample::select(vec!["a", "b", "c"]), 0..3_u8, 1..3);
            (
                part(),
                part(),
                part(),
                part(),
                prop::option::of(subset()),
                prop::option::of(subset()),
                prop::option::of(subset()),
            )
                .prop_map(|(image, args, x, y, labels, env, tags)| {
                    let mut spec = json!({});
                    if let Some(image) = image {
                        spec["image"] = json!(image);
                    }
                    if let Some(args) = args {
                        spec["args"] = json!([args]);
                    }
                    for (name, value) in [("x", x), ("y", y)] {
                        if let Some(value) = value {
                            spec["nested"][name] = json!(value);
                        }
                    }
                    if let Some(labels) = labels {
                        spec["labels"] = json!(labels);
                    }
                    if let Some(env) = env {
                        spec["env"] = env
                            .iter()
                            .map(|(name, value)| json!({"name": name, "value": value}))
                            .collect();
                    }
                    if let Some(tags) = tags {
                        spec["tags"] = tags.keys().map(|tag| json!(tag)).collect();
                    }
                    spec
                })
        }

        fn leaves(set: &FieldSet) -> FieldSet {
            let children = set
                .children
                .iter()
                .map(|(name, child)| (name.clone(), leaves(child)))
                .collect();
            FieldSet {
                member: set.member && set.children.is_empty(),
                children,
            }
        }

        proptest! {
            /// Whatever three managers apply in turn: the last config is in the object, every field has an owner,
            /// nobody owns what is not there, and the same again changes nothing.
            #[test]
            fn of_forced_applies_leaves_owned_and_present_fields(steps in prop::collection::vec((0..3_usize, spec()), 1..8)) {
                let schema = schema();
                let mut live: Option<Value> = None;
                for (manager, spec) in steps {
                    let writer = by(["one", "two", "three"][manager], "");
                    let config = json!({"metadata": {"name": "a"}, "spec": spec});
                    let applied = apply(&schema, false, live.as_ref(), &config, &writer, true).unwrap();
                    let wanted = leaves(&walk::fields(Some(&schema), &config));
                    let present = leaves(&walk::fields(Some(&schema), &applied));
                    prop_assert!(wanted.difference(&present).is_empty() || spec == json!({}), "{applied} lacks parts of {config}");
                    let mut owned = FieldSet::default();
                    managed::read(&applied).iter().for_each(|entry| owned.union(&leaves(&entry.fields)));
                    let mut unowned = present.difference(&owned);
                    managed::strip_unmanaged(&mut unowned);
                    prop_assert!(unowned.is_empty(), "nobody owns {:?} of {applied}", unowned.paths());
                    let again = apply(&schema, false, Some(&applied), &config, &writer, false).unwrap();
                    prop_assert_eq!(&again, &applied);
                    live = Some(applied);
                }
            }
        }
    }
}
