//! Answers about the caller: one user, who may do everything.

use serde_json::{Value, json};

use crate::error::ApiError;

pub(crate) const USER: &str = "far-admin";

pub(crate) fn answer(group: &str, plural: &str, mut body: Value) -> Result<Value, ApiError> {
    body["status"] = match (group, plural) {
        ("authentication.k8s.io", "selfsubjectreviews") => {
            json!({"userInfo": {"username": USER, "groups": ["system:masters", "system:authenticated"]}})
        }
        ("authorization.k8s.io", "selfsubjectaccessreviews") => {
            json!({"allowed": true, "reason": "the embedded API has one user"})
        }
        ("authorization.k8s.io", "selfsubjectrulesreviews") => json!({
            "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}], "incomplete": false,
        }),
        _ => return Err(ApiError::UnknownPath),
    };
    Ok(body)
}
