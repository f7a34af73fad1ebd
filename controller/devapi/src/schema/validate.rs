//! Structural validation with the real server's error texts.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

use regex::Regex;
use serde_json::{Map, Value};

use super::{field, is_int_or_string, join};
use crate::error::{Cause, show};

/// Compiled patterns kept; the CRDs of this project have a few dozen.
const MAX_PATTERNS: usize = 1024;

pub(crate) fn validate(schema: &Value, value: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    walk(schema, value, path, &mut causes);
    causes
}

fn walk(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    if value.is_null() && (schema["nullable"] == true || schema.get("type").is_none()) {
        return;
    }
    if let Some(wanted) = wrong_type(schema, value) {
        let seen = type_name(value);
        let at = if path.is_empty() { "body" } else { path };
        let text = format!("Invalid value: \"{seen}\": {at} in body must be of type {wanted}: \"{seen}\"");
        causes.push(Cause::new("FieldValueTypeInvalid", path, text));
        return;
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let allowed: Vec<_> = allowed.iter().map(Value::to_string).collect();
        let text = format!(
            "Unsupported value: {}: supported values: {}",
            show(value),
            allowed.join(", ")
        );
        causes.push(Cause::new("FieldValueNotSupported", path, text));
    }
    match value {
        Value::Object(map) => object(schema, map, path, causes),
        Value::Array(items) => array(schema, items, path, causes),
        Value::String(text) => string(schema, text, path, causes),
        Value::Number(_) => number(schema, value, path, causes),
        Value::Null | Value::Bool(_) => {}
    }
    combinations(schema, value, path, causes);
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The type the schema asks for, when the value has another.
fn wrong_type(schema: &Value, value: &Value) -> Option<String> {
    if is_int_or_string(schema) {
        let fits = value.is_string() || value.is_i64() || value.is_u64();
        return (!fits).then(|| "integer,string".to_owned());
    }
    let wanted = schema.get("type")?.as_str()?;
    let fits = match wanted {
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|v| v.fract() == 0.0),
        "number" => value.is_number(),
        other => other == type_name(value),
    };
    (!fits).then(|| wanted.to_owned())
}

fn object(schema: &Value, map: &Map<String, Value>, path: &str, causes: &mut Vec<Cause>) {
    for name in schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !map.contains_key(name) {
            causes.push(Cause::required(join(path, name), ""));
        }
    }
    let count = map.len() as u64;
    if let Some(max) = schema["maxProperties"].as_u64().filter(|max| count > *max) {
        causes.push(Cause::new(
            "FieldValueTooMany",
            path,
            format!("Too many: {count}: must have at most {max} items"),
        ));
    }
    if let Some(min) = schema["minProperties"].as_u64().filter(|min| count < *min) {
        let text = format!("Invalid value: {count}: {path} in body should have at least {min} properties");
        causes.push(Cause::new("FieldValueInvalid", path, text));
    }
    for (name, child) in map {
        if let Some(child_schema) = field(schema, name) {
            walk(child_schema, child, &join(path, name), causes);
        }
    }
}

fn array(schema: &Value, items: &[Value], path: &str, causes: &mut Vec<Cause>) {
    let count = items.len() as u64;
    if let Some(max) = schema["maxItems"].as_u64().filter(|max| count > *max) {
        causes.push(Cause::new(
            "FieldValueTooMany",
            path,
            format!("Too many: {count}: must have at most {max} items"),
        ));
    }
    if let Some(min) = schema["minItems"].as_u64().filter(|min| count < *min) {
        let text = format!("Invalid value: {count}: {path} in body should have at least {min} items");
        causes.push(Cause::new("FieldValueInvalid", path, text));
    }
    if let Some(item_schema) = schema.get("items") {
        for (index, item) in items.iter().enumerate() {
            walk(item_schema, item, &format!("{path}[{index}]"), causes);
        }
    }
    duplicates(schema, items, path, causes);
}

/// Items of `set` lists and keys of `map` lists occur once.
fn duplicates(schema: &Value, items: &[Value], path: &str, causes: &mut Vec<Cause>) {
    let identity = |item: &Value| match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => Some(item.clone()),
        Some("map") => {
            let keys = schema["x-kubernetes-list-map-keys"].as_array()?;
            let pairs = keys
                .iter()
                .filter_map(Value::as_str)
                .map(|key| (key.to_owned(), item[key].clone()));
            Some(Value::Object(pairs.collect()))
        }
        _ if schema["uniqueItems"] == true => Some(item.clone()),
        _ => None,
    };
    let mut seen: Vec<Value> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let Some(id) = identity(item) else { return };
        if seen.contains(&id) {
            let text = format!("Duplicate value: {id}");
            causes.push(Cause::new("FieldValueDuplicate", format!("{path}[{index}]"), text));
        }
        seen.push(id);
    }
}

fn string(schema: &Value, text: &str, path: &str, causes: &mut Vec<Cause>) {
    let value = Value::String(text.to_owned());
    let length = text.chars().count() as u64;
    if let Some(max) = schema["maxLength"].as_u64().filter(|max| length > *max) {
        causes.push(Cause::new(
            "FieldValueTooLong",
            path,
            format!("Too long: may not be more than {max} bytes"),
        ));
    }
    if let Some(min) = schema["minLength"].as_u64().filter(|min| length < *min) {
        causes.push(Cause::invalid(
            path,
            &value,
            &format!("{path} in body should be at least {min} chars long"),
        ));
    }
    if let Some(pattern) = schema["pattern"].as_str()
        && !matches(pattern, text)
    {
        causes.push(Cause::invalid(
            path,
            &value,
            &format!("{path} in body should match '{pattern}'"),
        ));
    }
    if let Some(format) = schema["format"].as_str()
        && !has_format(format, text)
    {
        causes.push(Cause::invalid(
            path,
            &value,
            &format!("{path} in body must be of type {format}: {value}"),
        ));
    }
}

/// A pattern this engine cannot compile accepts nothing; CRD creation refuses such patterns first.
fn matches(pattern: &str, text: &str) -> bool {
    static PATTERNS: LazyLock<Mutex<HashMap<String, Option<Regex>>>> = LazyLock::new(Mutex::default);
    let mut patterns = PATTERNS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if patterns.len() >= MAX_PATTERNS {
        patterns.clear();
    }
    let compiled = patterns
        .entry(pattern.to_owned())
        .or_insert_with(|| Regex::new(pattern).ok());
    compiled.as_ref().is_some_and(|regex| regex.is_match(text))
}

/// Formats the real server checks; any other is documentation.
fn has_format(format: &str, text: &str) -> bool {
    use base64::Engine as _;
    match format {
        "date-time" => time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).is_ok(),
        "byte" => base64::engine::general_purpose::STANDARD.decode(text).is_ok(),
        "uuid" => uuid::Uuid::try_parse(text).is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "date" => matches(r"^\d{4}-\d{2}-\d{2}$", text),
        "duration" => matches(r"^-?(\d+(\.\d+)?(ns|us|µs|ms|s|m|h|d|w) ?)+$|^0$", text),
        _ => true,
    }
}

fn number(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let Some(found) = value.as_f64() else { return };
    let mut refuse = |limit: &Value, words: &str| {
        causes.push(Cause::invalid(
            path,
            value,
            &format!("{path} in body should be {words} {limit}"),
        ));
    };
    if let Some(min) = schema["minimum"].as_f64() {
        let exclusive = schema["exclusiveMinimum"] == true;
        if found < min || (exclusive && found == min) {
            refuse(
                &schema["minimum"],
                if exclusive {
                    "greater than"
                } else {
                    "greater than or equal to"
                },
            );
        }
    }
    if let Some(max) = schema["maximum"].as_f64() {
        let exclusive = schema["exclusiveMaximum"] == true;
        if found > max || (exclusive && found == max) {
            refuse(
                &schema["maximum"],
                if exclusive {
                    "less than"
                } else {
                    "less than or equal to"
                },
            );
        }
    }
    if let Some(step) = schema["multipleOf"].as_f64()
        && (found / step).fract() != 0.0
    {
        refuse(&schema["multipleOf"], "a multiple of");
    }
    let fits = match schema["format"].as_str() {
        Some("int32") => value.as_i64().is_none_or(|v| i32::try_from(v).is_ok()),
        Some("int64") => value.as_u64().is_none_or(|v| i64::try_from(v).is_ok()),
        _ => true,
    };
    if !fits {
        let text = format!(
            "{path} in body must be of type {}",
            schema["format"].as_str().unwrap_or_default()
        );
        causes.push(Cause::invalid(path, value, &text));
    }
}

fn combinations(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let branches = |name: &str| schema.get(name).and_then(Value::as_array);
    let holds = |branch: &Value| validate(branch, value, path).is_empty();
    for branch in branches("allOf").into_iter().flatten() {
        walk(branch, value, path, causes);
    }
    let at = if path.is_empty() { "body" } else { path };
    if branches("anyOf").is_some_and(|any| !any.iter().any(holds)) {
        causes.push(Cause::invalid(
            path,
            value,
            &format!("{at} in body must validate at least one schema (anyOf)"),
        ));
    }
    if branches("oneOf").is_some_and(|one| one.iter().filter(|branch| holds(branch)).count() != 1) {
        causes.push(Cause::invalid(
            path,
            value,
            &format!("{at} in body must validate one and only one schema (oneOf)"),
        ));
    }
    if schema.get("not").is_some_and(holds) {
        causes.push(Cause::invalid(
            path,
            value,
            &format!("{at} in body must not validate the schema (not)"),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_constraint_names_its_field_in_the_servers_words() {
        let int_or_string = json!({"x-kubernetes-int-or-string": true});
        let cases = [
            (
                json!({"type": "integer"}),
                json!("a"),
                "Invalid value: \"string\": f in body must be of type integer: \"string\"",
            ),
            (
                int_or_string,
                json!(0.5),
                "Invalid value: \"number\": f in body must be of type integer,string: \"number\"",
            ),
            (
                json!({"enum": ["A", "B"]}),
                json!("C"),
                "Unsupported value: \"C\": supported values: \"A\", \"B\"",
            ),
            (
                json!({"pattern": "^a$"}),
                json!("b"),
                "Invalid value: \"b\": f in body should match '^a$'",
            ),
            (
                json!({"minimum": 1}),
                json!(0),
                "Invalid value: 0: f in body should be greater than or equal to 1",
            ),
            (
                json!({"maximum": 3}),
                json!(4),
                "Invalid value: 4: f in body should be less than or equal to 3",
            ),
            (
                json!({"maxLength": 2}),
                json!("abc"),
                "Too long: may not be more than 2 bytes",
            ),
            (
                json!({"maxItems": 1}),
                json!([1, 2]),
                "Too many: 2: must have at most 1 items",
            ),
            (
                json!({"format": "date-time"}),
                json!("x"),
                "Invalid value: \"x\": f in body must be of type date-time: \"x\"",
            ),
            (
                json!({"anyOf": [{"minimum": 3}]}),
                json!(1),
                "Invalid value: 1: f in body must validate at least one schema (anyOf)",
            ),
        ];
        for (schema, value, message) in cases {
            let causes = validate(&schema, &value, "f");
            assert_eq!(causes.len(), 1, "{schema}");
            assert_eq!((causes[0].field.as_str(), causes[0].message.as_str()), ("f", message));
        }
    }

    #[test]
    fn what_fits_passes() {
        let cases = [
            (json!({"x-kubernetes-int-or-string": true}), json!(1)),
            (json!({"x-kubernetes-int-or-string": true}), json!("500m")),
            (json!({"type": "string", "nullable": true}), Value::Null),
            (json!({"type": "integer"}), json!(1.0)),
            (
                json!({"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}}}),
                json!({"a": "b"}),
            ),
        ];
        for (schema, value) in cases {
            assert_eq!(validate(&schema, &value, "f"), [], "{schema}");
        }
    }

    #[test]
    fn missing_and_duplicate_are_found_at_depth() {
        let schema = json!({"properties": {"spec": {"required": ["image"], "properties": {
            "env": {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"], "items": {"type": "object"}}}}}});
        let causes = validate(&schema, &json!({"spec": {"env": [{"name": "A"}, {"name": "A"}]}}), "");
        let found: Vec<_> = causes.iter().map(|c| (c.field.as_str(), c.reason.as_str())).collect();
        assert_eq!(
            found,
            [
                ("spec.image", "FieldValueRequired"),
                ("spec.env[1]", "FieldValueDuplicate")
            ]
        );
    }
}
