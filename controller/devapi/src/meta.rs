//! `metadata`: names, labels, and the fields only the server sets.

use std::sync::LazyLock;

use rand::Rng as _;
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::error::Cause;

/// Letters the real server draws generated names from: no vowels, no digits that read as letters.
const NAME_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const NAME_SUFFIX: usize = 5;
/// Length of a generated name's base, so that the whole stays a DNS label.
const MAX_GENERATED_BASE: usize = 63 - NAME_SUFFIX;
const MAX_ANNOTATION_BYTES: usize = 256 << 10;

pub(crate) fn now() -> String {
    stamp(time::OffsetDateTime::now_utc())
}

pub(crate) fn stamp(time: time::OffsetDateTime) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    time.format(&format)
        .expect("a year of four digits always has this form")
}

pub(crate) fn generate_name(base: &str) -> String {
    let mut rng = rand::rng();
    let suffix: String = (0..NAME_SUFFIX)
        .map(|_| char::from(NAME_LETTERS[rng.random_range(0..NAME_LETTERS.len())]))
        .collect();
    let cut = base
        .char_indices()
        .nth(MAX_GENERATED_BASE)
        .map_or(base.len(), |(at, _)| at);
    format!("{}{suffix}", &base[..cut])
}

pub(crate) fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

pub(crate) fn finalizers(object: &Value) -> Vec<&str> {
    object["metadata"]["finalizers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

pub(crate) fn is_deleting(object: &Value) -> bool {
    object["metadata"]["deletionTimestamp"].is_string()
}

/// The metadata object, made when absent or of another type (schema validation then names the fault elsewhere).
pub(crate) fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    object["metadata"].as_object_mut().expect("made an object above")
}

pub(crate) fn set(object: &mut Value, field: &str, value: Value) {
    let metadata = metadata(object);
    if value.is_null() {
        metadata.remove(field);
    } else {
        metadata.insert(field.to_owned(), value);
    }
}

/// Drops empty maps and lists that say nothing: the real server's metadata omits them.
pub(crate) fn tidy(object: &mut Value) {
    let metadata = metadata(object);
    for field in [
        "labels",
        "annotations",
        "finalizers",
        "ownerReferences",
        "managedFields",
    ] {
        let empty = match metadata.get(field) {
            Some(Value::Object(map)) => map.is_empty(),
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Null) => true,
            _ => false,
        };
        if empty {
            metadata.remove(field);
        }
    }
    metadata.retain(|_, value| !value.is_null());
}

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a fixed pattern")
}
static SUBDOMAIN: LazyLock<Regex> =
    LazyLock::new(|| regex(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"));
static LABEL: LazyLock<Regex> = LazyLock::new(|| regex(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"));
static QUALIFIED: LazyLock<Regex> = LazyLock::new(|| regex(r"^([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$"));

const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_RULE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";

/// `is_label`: the name must fit one DNS label (namespaces).
pub(crate) fn check(object: &Value, is_label: bool) -> Vec<Cause> {
    let mut causes = Vec::new();
    let metadata = &object["metadata"];
    let name = text(object, "name");
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else if is_label && (!LABEL.is_match(name) || name.len() > 63) {
        causes.push(Cause::invalid("metadata.name", &metadata["name"], LABEL_RULE));
    } else if !SUBDOMAIN.is_match(name) || name.len() > 253 {
        causes.push(Cause::invalid("metadata.name", &metadata["name"], SUBDOMAIN_RULE));
    }
    for (key, value) in metadata["labels"].as_object().into_iter().flatten() {
        check_key(key, "metadata.labels", &mut causes);
        let fits = value
            .as_str()
            .is_some_and(|v| v.is_empty() || (v.len() <= 63 && QUALIFIED.is_match(v)));
        if !fits {
            let rule = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
            causes.push(Cause::invalid("metadata.labels", value, rule));
        }
    }
    let mut bytes = 0;
    for (key, value) in metadata["annotations"].as_object().into_iter().flatten() {
        check_key(key, "metadata.annotations", &mut causes);
        bytes += key.len() + value.as_str().map_or(0, str::len);
    }
    if bytes > MAX_ANNOTATION_BYTES {
        let text = format!("Too long: may not be more than {MAX_ANNOTATION_BYTES} bytes");
        causes.push(Cause::new("FieldValueTooLong", "metadata.annotations", text));
    }
    for (index, finalizer) in finalizers(object).into_iter().enumerate() {
        let standard = matches!(finalizer, "orphan" | "foregroundDeletion" | "kubernetes");
        if !standard && !finalizer.contains('/') && !finalizer.contains('.') {
            let rule = "name is neither a standard finalizer name nor is it fully qualified";
            causes.push(Cause::invalid(
                format!("metadata.finalizers[{index}]"),
                &json!(finalizer),
                rule,
            ));
        }
    }
    let owners = metadata["ownerReferences"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    for (index, owner) in owners.iter().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().unwrap_or_default().is_empty() {
                causes.push(Cause::required(
                    format!("metadata.ownerReferences[{index}].{field}"),
                    "",
                ));
            }
        }
    }
    if owners.iter().filter(|owner| owner["controller"] == true).count() > 1 {
        let text = "Invalid value: Only one reference can have Controller set to true";
        causes.push(Cause::new("FieldValueInvalid", "metadata.ownerReferences", text));
    }
    causes
}

fn check_key(key: &str, field: &str, causes: &mut Vec<Cause>) {
    let (prefix, name) = key
        .split_once('/')
        .map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let fits = name.len() <= 63
        && QUALIFIED.is_match(name)
        && prefix.is_none_or(|prefix| prefix.len() <= 253 && SUBDOMAIN.is_match(&prefix.to_lowercase()));
    if !fits {
        let rule = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
        causes.push(Cause::invalid(field, &json!(key), rule));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_held_to_their_grammar() {
        let fields = |object: Value| -> Vec<String> { check(&object, false).into_iter().map(|c| c.field).collect() };
        assert!(fields(json!({"metadata": {"name": "a.b-c", "labels": {"x.y/z": "V_1"}, "finalizers": ["tiffany.dev/microvm"]}})).is_empty());
        assert_eq!(fields(json!({"metadata": {"name": "Upper"}})), ["metadata.name"]);
        assert_eq!(fields(json!({"metadata": {}})), ["metadata.name"]);
        assert_eq!(
            fields(json!({"metadata": {"name": "a", "labels": {"-bad": "x", "ok": "no good"}}})),
            ["metadata.labels", "metadata.labels"]
        );
        assert_eq!(
            fields(json!({"metadata": {"name": "a", "finalizers": ["plain"]}})),
            ["metadata.finalizers[0]"]
        );
        assert!(!check(&json!({"metadata": {"name": "a.b"}}), true).is_empty());
    }

    #[test]
    fn generated_names_keep_the_base_and_stay_a_label() {
        let name = generate_name("agent-");
        assert!(name.starts_with("agent-") && name.len() == 11, "{name}");
        assert_eq!(generate_name(&"a".repeat(100)).len(), 63);
    }
}
