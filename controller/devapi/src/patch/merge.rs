//! JSON merge patch (RFC 7386) and JSON patch (RFC 6902).

use serde_json::Value;

use crate::error::{ApiError, Cause, Subject};

/// JSON patch operations in one request, as the real server limits them.
const MAX_OPERATIONS: usize = 10_000;

pub(crate) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Some(map) = target.as_object_mut() else { return };
    for (name, value) in patch {
        if value.is_null() {
            map.remove(name);
        } else {
            merge(map.entry(name.clone()).or_insert(Value::Null), value);
        }
    }
}

/// All operations or none. As on the real server, testing an absent path for `null` succeeds: kube's finalizer helper
/// relies on it.
pub(crate) fn json_patch(target: &mut Value, patch: &Value) -> Result<(), ApiError> {
    let patch: json_patch::Patch = serde_json::from_value(patch.clone())
        .map_err(|error| ApiError::BadRequest(format!("error decoding patch: {error}")))?;
    if patch.0.len() > MAX_OPERATIONS {
        return Err(ApiError::BadRequest(format!(
            "the allowed maximum operations in a JSON patch is {MAX_OPERATIONS}"
        )));
    }
    let mut patched = target.clone();
    for operation in patch.0 {
        if let json_patch::PatchOperation::Test(test) = &operation
            && test.value.is_null()
            && test.path.resolve(&patched).is_err()
        {
            continue;
        }
        json_patch::patch(&mut patched, &[operation]).map_err(|error| {
            // The real server answers 422 here: the patch was read but does not fit the object.
            let cause = Cause::new("FieldValueInvalid", "patch", format!("Invalid value: {error}"));
            ApiError::Invalid(Subject::default(), vec![cause])
        })?;
    }
    *target = patched;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn null_removes_and_lists_are_replaced() {
        let mut target = json!({"a": {"b": 1, "c": 2}, "l": [1, 2]});
        merge(
            &mut target,
            &json!({"a": {"b": null, "d": {"e": null, "f": 1}}, "l": [3]}),
        );
        assert_eq!(target, json!({"a": {"c": 2, "d": {"f": 1}}, "l": [3]}));
    }

    #[test]
    fn a_failed_test_operation_changes_nothing() {
        let mut target = json!({"a": 1});
        let patch = json!([{"op": "replace", "path": "/a", "value": 2}, {"op": "test", "path": "/a", "value": 3}]);
        assert!(json_patch(&mut target, &patch).is_err());
        assert_eq!(target, json!({"a": 1}));
    }

    #[test]
    fn an_absent_path_tests_equal_to_null() {
        let mut target = json!({"metadata": {}});
        let patch = json!([{"op": "test", "path": "/metadata/finalizers", "value": null}, {"op": "add", "path": "/metadata/finalizers", "value": ["x/y"]}]);
        json_patch(&mut target, &patch).unwrap();
        assert_eq!(target, json!({"metadata": {"finalizers": ["x/y"]}}));
        assert!(json_patch(&mut target, &patch).is_err(), "now there is one");
    }
}
