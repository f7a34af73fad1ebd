//! Drops fields the schema does not know and names them, for strict and warning field validation.

use serde_json::Value;

use super::{field, join, preserves_unknown};

/// Returns the paths of what was dropped. `apiVersion`, `kind` and `metadata` of the root are always known.
pub(crate) fn prune(schema: &Value, value: &mut Value) -> Vec<String> {
    let mut dropped = Vec::new();
    walk(schema, value, "", true, &mut dropped);
    dropped
}

fn walk(schema: &Value, value: &mut Value, path: &str, is_root: bool, dropped: &mut Vec<String>) {
    let is_object = is_root || schema["x-kubernetes-embedded-resource"] == true;
    match value {
        Value::Object(map) => {
            let keeps = preserves_unknown(schema);
            map.retain(|name, _| {
                let type_meta = is_object && matches!(name.as_str(), "apiVersion" | "kind" | "metadata");
                let known = keeps || type_meta || field(schema, name).is_some();
                if !known {
                    dropped.push(join(path, name));
                }
                known
            });
            for (name, child) in map.iter_mut() {
                if let Some(schema) = field(schema, name) {
                    walk(schema, child, &join(path, name), false, dropped);
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (index, item) in items.iter_mut().enumerate() {
                    walk(schema, item, &format!("{path}[{index}]"), false, dropped);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn unknown_fields_go_and_are_named_with_their_path() {
        let schema = json!({"properties": {
            "spec": {"properties": {"a": {"type": "string"}, "l": {"items": {"properties": {"x": {}}}},
                "free": {"x-kubernetes-preserve-unknown-fields": true}}}
        }});
        let mut value = json!({"apiVersion": "v1", "kind": "K", "metadata": {"name": "n"}, "extra": 1,
            "spec": {"a": "b", "bad": 1, "l": [{"x": 1, "y": 2}], "free": {"anything": {"goes": 1}}}});
        let dropped = prune(&schema, &mut value);
        assert_eq!(dropped, ["extra", "spec.bad", "spec.l[0].y"]);
        assert_eq!(
            value["spec"],
            json!({"a": "b", "l": [{"x": 1}], "free": {"anything": {"goes": 1}}})
        );
    }
}
