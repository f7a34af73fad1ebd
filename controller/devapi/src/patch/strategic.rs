//! Strategic merge patch for the built-in kinds, simplified: a merge patch that knows `$patch: delete|replace`,
//! `$retainKeys`, `$deleteFromPrimitiveList`, and merges the two metadata lists by their keys. No built-in kind here
//! has another list with a merge key that clients patch this way, except a service account's secrets.

use serde_json::{Map, Value};

/// Lists that merge: field name → key of their items; an empty key means a list of scalars.
const MERGED_LISTS: [(&str, &str); 4] = [
    ("ownerReferences", "uid"),
    ("finalizers", ""),
    ("secrets", "name"),
    ("imagePullSecrets", "name"),
];

pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if patch.get("$patch").is_some_and(|directive| directive == "replace") || !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Some(map) = target.as_object_mut() else { return };
    if let Some(keys) = patch.get("$retainKeys").and_then(Value::as_array) {
        map.retain(|name, _| keys.iter().any(|key| key == name));
    }
    for (name, value) in patch {
        if let Some(field) = name.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().cloned().unwrap_or_default();
            if let Some(Value::Array(items)) = map.get_mut(field) {
                items.retain(|item| !gone.contains(item));
            }
            continue;
        }
        if name.starts_with('$') {
            continue;
        }
        let merged = MERGED_LISTS.iter().find(|(list, _)| list == name);
        match (value, merged) {
            (Value::Null, _) => {
                map.remove(name);
            }
            (Value::Object(inner), _) if inner.get("$patch").is_some_and(|directive| directive == "delete") => {
                map.remove(name);
            }
            (Value::Array(items), Some((_, key))) => {
                let list = map.entry(name.clone()).or_insert_with(|| Value::Array(Vec::new()));
                merge_list(list, items, key);
            }
            _ => merge(map.entry(name.clone()).or_insert(Value::Null), value),
        }
    }
}

fn merge_list(target: &mut Value, patch: &[Value], key: &str) {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Some(items) = target.as_array_mut() else { return };
    for item in patch {
        let same = |have: &Value| {
            if key.is_empty() {
                have == item
            } else {
                have[key] == item[key]
            }
        };
        let deletes = item.get("$patch").is_some_and(|directive| directive == "delete");
        match items.iter().position(same) {
            Some(at) if deletes => {
                items.remove(at);
            }
            Some(at) => merge(&mut items[at], item),
            None if deletes => {}
            None => items.push(item.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn directives_and_keyed_lists_are_followed() {
        let mut target = json!({"data": {"a": "1", "b": "2"}, "metadata": {"finalizers": ["x/y"], "ownerReferences": [{"uid": "1", "name": "a"}]}});
        let patch = json!({"data": {"a": null, "c": "3"}, "metadata": {"finalizers": ["z/w"],
            "ownerReferences": [{"uid": "1", "$patch": "delete"}, {"uid": "2", "name": "b"}]}});
        merge(&mut target, &patch);
        assert_eq!(
            target,
            json!({"data": {"b": "2", "c": "3"}, "metadata": {"finalizers": ["x/y", "z/w"], "ownerReferences": [{"uid": "2", "name": "b"}]}})
        );
        merge(
            &mut target,
            &json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["x/y"]}, "data": {"$patch": "replace", "n": "1"}}),
        );
        assert_eq!(target["metadata"]["finalizers"], json!(["z/w"]));
        assert_eq!(target["data"], json!({"n": "1"}));
    }
}
