//! Fills in `default` values, at every depth, where the parent exists.

use serde_json::Value;

use super::field;

/// Also drops `null` where the schema has a default and is not nullable, as the real server does.
pub(crate) fn apply(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
                for (name, property) in properties {
                    let Some(default) = property.get("default") else {
                        continue;
                    };
                    let missing = match map.get(name) {
                        None => true,
                        Some(Value::Null) => property["nullable"] != true,
                        Some(_) => false,
                    };
                    if missing {
                        map.insert(name.clone(), default.clone());
                    }
                }
            }
            for (name, child) in map.iter_mut() {
                if let Some(schema) = field(schema, name) {
                    apply(schema, child);
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                items.iter_mut().for_each(|item| apply(schema, item));
            }
        }
        _ => {}
    }
}

/// Removes `null` fields that the schema does not call nullable: clients with optional fields send them.
pub(crate) fn drop_nulls(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|name, child| {
                !child.is_null()
                    || field(schema, name).is_none_or(|s| s["nullable"] == true || super::preserves_unknown(s))
            });
            for (name, child) in map.iter_mut() {
                if let Some(schema) = field(schema, name) {
                    drop_nulls(schema, child);
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                items.iter_mut().for_each(|item| drop_nulls(schema, item));
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
    fn defaults_reach_into_lists_and_maps_but_do_not_make_parents() {
        let schema = json!({"properties": {
            "spec": {"properties": {"cpu": {"default": 1}, "items": {"items": {"properties": {"mode": {"default": "a"}}}}}},
            "status": {"properties": {"phase": {"default": "Pending"}}}
        }});
        let mut value = json!({"spec": {"items": [{}, {"mode": "b"}]}});
        apply(&schema, &mut value);
        assert_eq!(
            value,
            json!({"spec": {"cpu": 1, "items": [{"mode": "a"}, {"mode": "b"}]}})
        );
    }

    #[test]
    fn a_default_object_gets_its_own_defaults() {
        let schema = json!({"properties": {"s": {"default": {}, "properties": {"x": {"default": 3}}}}});
        let mut value = json!({});
        apply(&schema, &mut value);
        assert_eq!(value, json!({"s": {"x": 3}}));
    }
}
