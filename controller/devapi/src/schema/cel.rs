//! `x-kubernetes-validations`, by the crate that kube itself uses for rules.
//!
//! Known difference to the real server: transition rules inside lists compare by index, not by list-map key, and
//! there is no cost budget.

use kube_cel::{CompiledSchema, ErrorKind, RootContext, Validator, compile_schema};
use serde_json::Value;

use crate::error::Cause;

/// Compiled rules of one resource.
pub(crate) struct Rules {
    schema: CompiledSchema,
    context: RootContext,
    any: bool,
}

impl Rules {
    pub(crate) fn compile(schema: &Value, group: &str, version: &str, kind: &str) -> Self {
        let context = RootContext {
            api_version: if group.is_empty() {
                version.to_owned()
            } else {
                format!("{group}/{version}")
            },
            api_group: group.to_owned(),
            kind: kind.to_owned(),
        };
        Self {
            schema: compile_schema(schema),
            context,
            any: has_rules(schema),
        }
    }

    pub(crate) fn check(&self, value: &Value, old: Option<&Value>) -> Vec<Cause> {
        if !self.any {
            return Vec::new();
        }
        // Made per call: the interpreter's context is cheap and not shared between threads.
        let outcome = Validator::new().validate_compiled_with_context(&self.schema, value, old, Some(&self.context));
        let Err(errors) = outcome else { return Vec::new() };
        // The real server runs no rule on a null.
        errors
            .into_iter()
            .filter(|error| !at(value, &error.field_path).is_some_and(Value::is_null))
            .map(|error| cause(error.reason.as_deref(), error.field_path, &error.kind, error.message))
            .collect()
    }
}

/// The value at a path such as `spec.env[0].name`; `None` where keys with dots make it ambiguous.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let mut parts = path.split(['.', '[']).filter(|part| !part.is_empty());
    parts.try_fold(value, |at, part| match part.strip_suffix(']') {
        Some(index) => at.get(index.parse::<usize>().ok()?),
        None => at.get(part),
    })
}

fn cause(reason: Option<&str>, path: String, kind: &ErrorKind, message: String) -> Cause {
    let message = match kind {
        ErrorKind::ValidationFailure => message,
        _ => format!("rule could not be evaluated: {message}"),
    };
    match reason {
        Some("FieldValueForbidden") => Cause::new("FieldValueForbidden", path, format!("Forbidden: {message}")),
        Some("FieldValueRequired") => Cause::required(path, &message),
        Some("FieldValueDuplicate") => Cause::new("FieldValueDuplicate", path, format!("Duplicate value: {message}")),
        _ => Cause::new("FieldValueInvalid", path, format!("Invalid value: {message}")),
    }
}

fn has_rules(schema: &Value) -> bool {
    match schema {
        Value::Object(map) => map.contains_key("x-kubernetes-validations") || map.values().any(has_rules),
        Value::Array(items) => items.iter().any(has_rules),
        _ => false,
    }
}

/// Rules of a schema that do not compile, with the path of the schema they stand at: a CRD with one is refused.
pub(crate) fn broken_rules(schema: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    collect_broken(schema, path, &mut causes);
    causes
}

fn collect_broken(schema: &Value, path: &str, causes: &mut Vec<Cause>) {
    match schema {
        Value::Object(map) => {
            for (index, rule) in map
                .get("x-kubernetes-validations")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .enumerate()
            {
                let text = rule["rule"].as_str().unwrap_or_default();
                if let Err(error) = kube_cel::cel::Program::compile(text) {
                    let field = format!("{path}.x-kubernetes-validations[{index}].rule");
                    causes.push(Cause::invalid(
                        field,
                        &rule["rule"],
                        &format!("compilation failed: {error}"),
                    ));
                }
            }
            for (name, child) in map {
                collect_broken(child, &format!("{path}.{name}"), causes);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect_broken(item, path, causes)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rules(schema: Value) -> Rules {
        Rules::compile(&schema, "tiffany.dev", "v1", "FarAgent")
    }

    #[test]
    fn a_transition_rule_runs_on_update_only() {
        let rules = rules(json!({"type": "object", "properties": {"spec": {"type": "object",
            "properties": {"image": {"type": "string"}},
            "x-kubernetes-validations": [{"rule": "self.image == oldSelf.image", "message": "image is immutable"}]}}}));
        let (a, b) = (json!({"spec": {"image": "a"}}), json!({"spec": {"image": "b"}}));
        assert_eq!(rules.check(&a, None), []);
        assert_eq!(rules.check(&a, Some(&a)), []);
        let causes = rules.check(&b, Some(&a));
        assert_eq!(
            (causes[0].field.as_str(), causes[0].message.as_str()),
            ("spec", "Invalid value: image is immutable")
        );
    }

    #[test]
    fn quantities_are_compared_whether_written_as_number_or_text() {
        let rules = rules(json!({"type": "object", "properties": {"spec": {"type": "object",
            "properties": {"memory": {"x-kubernetes-int-or-string": true}},
            "x-kubernetes-validations": [
                {"rule": "isQuantity(string(self.memory))", "message": "not a quantity"},
                {"rule": "!isQuantity(string(self.memory)) || quantity(string(self.memory)).isGreaterThan(quantity('0'))",
                 "message": "must be positive"}]}}}));
        let messages = |memory: Value| -> Vec<String> {
            rules
                .check(&json!({"spec": {"memory": memory}}), None)
                .into_iter()
                .map(|c| c.message)
                .collect()
        };
        assert!(messages(json!("512Mi")).is_empty());
        assert!(messages(json!(1)).is_empty());
        assert_eq!(messages(json!("0")), ["Invalid value: must be positive"]);
        assert_eq!(messages(json!("abc")), ["Invalid value: not a quantity"]);
    }

    #[test]
    fn a_null_is_not_held_to_the_rules_of_its_field() {
        let rules = rules(
            json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {"args": {"type": "array", "items":
            {"type": "string", "nullable": true, "x-kubernetes-validations": [{"rule": "self.startsWith('/')", "message": "not absolute"}]}}}}}}),
        );
        let causes = rules.check(&json!({"spec": {"args": [null, "/a", "b"]}}), None);
        assert_eq!(
            causes.iter().map(|c| c.field.as_str()).collect::<Vec<_>>(),
            ["spec.args[2]"]
        );
    }

    #[test]
    fn a_rule_that_does_not_compile_is_found_when_the_crd_is_made() {
        let schema = json!({"properties": {"a": {"x-kubernetes-validations": [{"rule": "self.("}]}}});
        assert_eq!(broken_rules(&schema, "s").len(), 1);
    }
}
