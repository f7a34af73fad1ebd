//! Questions about users: who a token is, who the caller is, and what somebody may do.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::app::App;
use crate::auth::{AUDIENCE, Asked, Attributes, User, allows, common_rules, rules_of};
use crate::error::ApiError;
use crate::handlers::Target;
use crate::meta;

pub(crate) fn answer(app: &App, user: &User, group: &str, plural: &str, mut body: Value) -> Result<Value, ApiError> {
    body["status"] = match (group, plural) {
        ("authentication.k8s.io", "tokenreviews") => token(app, &body["spec"]),
        ("authentication.k8s.io", "selfsubjectreviews") => json!({"userInfo": info(user)}),
        ("authorization.k8s.io", "selfsubjectaccessreviews") => access(app, user, &body["spec"])?,
        ("authorization.k8s.io", "subjectaccessreviews") => access(app, &subject(&body["spec"])?, &body["spec"])?,
        ("authorization.k8s.io", "selfsubjectrulesreviews") => rules(app, user, &body["spec"]),
        _ => return Err(ApiError::UnknownPath),
    };
    Ok(body)
}

fn info(user: &User) -> Value {
    let mut info = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    info
}

fn texts(list: &Value) -> Vec<String> {
    let entries = list.as_array().map(Vec::as_slice).unwrap_or_default();
    entries.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn audiences(list: &Value) -> Vec<String> {
    let asked = texts(list);
    if asked.is_empty() {
        vec![AUDIENCE.to_owned()]
    } else {
        asked
    }
}

fn token(app: &App, spec: &Value) -> Value {
    let shown = spec["token"].as_str().unwrap_or_default();
    match app.tokens.user(&app.store, shown, &audiences(&spec["audiences"])) {
        Some((user, audiences)) => json!({"authenticated": true, "user": info(&user), "audiences": audiences}),
        None => json!({"user": {}, "error": "the token is unknown, ended, or for another audience"}),
    }
}

/// Whom a SubjectAccessReview is about.
fn subject(spec: &Value) -> Result<User, ApiError> {
    let text = |name: &str| spec[name].as_str().unwrap_or_default().to_owned();
    let user = User {
        name: text("user"),
        uid: text("uid"),
        groups: texts(&spec["groups"]),
    };
    if user.name.is_empty() && user.groups.is_empty() {
        return Err(ApiError::BadRequest(
            "spec.user: at least one of user or group must be specified".into(),
        ));
    }
    Ok(user)
}

fn access(app: &App, user: &User, spec: &Value) -> Result<Value, ApiError> {
    let asked = Attributes::of_review(spec).ok_or_else(|| {
        ApiError::BadRequest(
            "spec: exactly one of nonResourceAttributes or resourceAttributes must be specified".into(),
        )
    })?;
    Ok(match allows(&app.store, user, &asked) {
        Some(reason) => json!({"allowed": true, "reason": reason}),
        None => json!({"allowed": false}),
    })
}

fn rules(app: &App, user: &User, spec: &Value) -> Value {
    if user.is_master() {
        return json!({
            "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}], "incomplete": false,
        });
    }
    let mut resource_rules = common_rules();
    let granted = rules_of(&app.store, user, spec["namespace"].as_str().unwrap_or_default());
    let (paths, resources): (Vec<_>, Vec<_>) = granted.into_iter().partition(|rule| rule["nonResourceURLs"].is_array());
    if let Some(list) = resource_rules.as_array_mut() {
        list.extend(resources);
    }
    json!({"resourceRules": resource_rules, "nonResourceRules": paths, "incomplete": false})
}

/// `POST …/serviceaccounts/NAME/token`.
pub(crate) fn request_token(app: &App, target: &Target, mut body: Value) -> Result<Value, ApiError> {
    let account = app.store.get(&target.key()).ok_or_else(|| target.not_found())?.value();
    let asked = Asked {
        namespace: target.namespace.as_deref().unwrap_or_default(),
        account: &target.name,
        audiences: audiences(&body["spec"]["audiences"]),
        seconds: body["spec"]["expirationSeconds"].as_u64().unwrap_or(3600),
    };
    let (token, expires) = app.tokens.issue(&asked, meta::text(&account, "uid"));
    let left = expires
        .duration_since(SystemTime::now())
        .map_or(0, |left| left.as_secs() + 1);
    body["spec"]["expirationSeconds"] = json!(left);
    body["spec"]["audiences"] = json!(asked.audiences);
    body["status"] = json!({"token": token, "expirationTimestamp": meta::stamp(expires.into())});
    Ok(body)
}
