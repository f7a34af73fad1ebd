//! `rbac.authorization.k8s.io/v1` as the real authorizer evaluates it: rules only add, and no match is a no.

use std::sync::Arc;

use serde_json::{Value, json};

use super::User;
use crate::store::{Key, Object, Store};

const GROUP: &str = crate::server::RBAC_GROUP;
/// What everybody who is authenticated may read (ClusterRoles system:discovery and system:public-info-viewer).
const DISCOVERY: [&str; 9] = [
    "/api",
    "/api/*",
    "/apis",
    "/apis/*",
    "/openapi",
    "/openapi/*",
    "/version",
    "/version/",
    "/healthz",
];

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub verb: String,
    pub group: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    /// Empty: no single object.
    pub name: String,
    /// A path that is no resource; then the fields above but the verb mean nothing.
    pub path: Option<String>,
}

impl Attributes {
    /// Of `spec.resourceAttributes` or `spec.nonResourceAttributes` of a review; `None`: it has neither.
    pub(crate) fn of_review(spec: &Value) -> Option<Self> {
        let text = |object: &Value, name: &str| object[name].as_str().unwrap_or_default().to_owned();
        let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
        if resource.is_object() {
            return Some(Self {
                verb: text(resource, "verb"),
                group: text(resource, "group"),
                resource: text(resource, "resource"),
                subresource: text(resource, "subresource"),
                namespace: text(resource, "namespace"),
                name: text(resource, "name"),
                path: None,
            });
        }
        path.is_object().then(|| Self {
            verb: text(path, "verb"),
            path: Some(text(path, "path")),
            ..Self::default()
        })
    }

    /// As a real server words its refusal.
    pub(crate) fn refusal(&self, user: &User) -> String {
        let Self {
            verb,
            group,
            resource,
            subresource,
            namespace,
            name,
            path,
        } = self;
        let who = &user.name;
        if let Some(path) = path {
            return format!("forbidden: User {who:?} cannot {verb} path {path:?}");
        }
        let qualified = if group.is_empty() {
            resource.clone()
        } else {
            format!("{resource}.{group}")
        };
        let named = if name.is_empty() {
            String::new()
        } else {
            format!(" {name:?}")
        };
        let full = if subresource.is_empty() {
            resource.clone()
        } else {
            format!("{resource}/{subresource}")
        };
        let place = if namespace.is_empty() {
            "at the cluster scope".to_owned()
        } else {
            format!("in the namespace {namespace:?}")
        };
        format!(
            "{qualified}{named} is forbidden: User {who:?} cannot {verb} resource {full:?} in API group {group:?} {place}"
        )
    }
}

/// Whether the user may, and by what.
pub(crate) fn allows(store: &Store, user: &User, asked: &Attributes) -> Option<String> {
    if user.is_master() {
        return Some("a member of system:masters may do everything".to_owned());
    }
    let is_about_self = asked.path.is_none()
        && asked.verb == "create"
        && asked.resource.starts_with("selfsubject")
        && matches!(asked.group.as_str(), "authorization.k8s.io" | "authentication.k8s.io");
    let is_discovery = asked.path.as_deref().is_some_and(|path| {
        matches!(asked.verb.as_str(), "get" | "head") && DISCOVERY.iter().any(|pattern| path_fits(pattern, path))
    });
    if is_about_self || is_discovery {
        return Some("everybody who is authenticated may".to_owned());
    }
    granted(store, user, &asked.namespace)
        .into_iter()
        .find(|(_, rules)| rules.iter().any(|rule| fits(rule, asked)))
        .map(|(by, _)| by)
}

/// The user's rules in a namespace, for SelfSubjectRulesReview.
pub(crate) fn rules_of(store: &Store, user: &User, namespace: &str) -> Vec<Value> {
    granted(store, user, namespace)
        .into_iter()
        .flat_map(|(_, rules)| rules)
        .collect()
}

/// Which bindings give the user which rules, cluster-wide and in the namespace.
fn granted(store: &Store, user: &User, namespace: &str) -> Vec<(String, Vec<Value>)> {
    let of_cluster = store.list(&storage("clusterrolebindings"), None).1;
    let of_namespace = if namespace.is_empty() {
        Vec::new()
    } else {
        store.list(&storage("rolebindings"), Some(namespace)).1
    };
    of_cluster
        .iter()
        .chain(&of_namespace)
        .filter_map(|binding| grant(store, user, binding))
        .collect()
}

fn storage(plural: &str) -> String {
    format!("{GROUP}/{plural}")
}

fn grant(store: &Store, user: &User, object: &Arc<Object>) -> Option<(String, Vec<Value>)> {
    let (binding, namespace) = (object.value(), object.key.namespace.as_str());
    let subjects = binding["subjects"].as_array()?;
    if !subjects.iter().any(|subject| is_meant(user, subject, namespace)) {
        return None;
    }
    let reference = &binding["roleRef"];
    let (plural, role_namespace) = match reference["kind"].as_str() {
        Some("ClusterRole") => ("clusterroles", ""),
        Some("Role") => ("roles", namespace),
        _ => return None,
    };
    let key = Key {
        resource: storage(plural),
        namespace: role_namespace.to_owned(),
        name: reference["name"].as_str()?.to_owned(),
    };
    let role = store.get(&key)?.value();
    let by = format!("RBAC: allowed by binding {:?}", object.key.name);
    Some((by, role["rules"].as_array().cloned().unwrap_or_default()))
}

fn is_meant(user: &User, subject: &Value, binding_namespace: &str) -> bool {
    let name = subject["name"].as_str().unwrap_or_default();
    match subject["kind"].as_str() {
        Some("User") => name == user.name,
        Some("Group") => user.groups.iter().any(|group| group == name),
        Some("ServiceAccount") => {
            let namespace = subject["namespace"].as_str().unwrap_or(binding_namespace);
            user.name == format!("system:serviceaccount:{namespace}:{name}")
        }
        _ => false,
    }
}

fn has(rule: &Value, field: &str, wanted: impl Fn(&str) -> bool) -> bool {
    let entries = rule[field].as_array();
    entries.is_some_and(|entries| entries.iter().filter_map(Value::as_str).any(wanted))
}

fn fits(rule: &Value, asked: &Attributes) -> bool {
    if !has(rule, "verbs", |verb| verb == "*" || verb == asked.verb) {
        return false;
    }
    if let Some(path) = &asked.path {
        return has(rule, "nonResourceURLs", |pattern| path_fits(pattern, path));
    }
    let combined = if asked.subresource.is_empty() {
        asked.resource.clone()
    } else {
        format!("{}/{}", asked.resource, asked.subresource)
    };
    let any_sub = (!asked.subresource.is_empty()).then(|| format!("*/{}", asked.subresource));
    let names = rule["resourceNames"].as_array().is_none_or(Vec::is_empty)
        || (!asked.name.is_empty() && has(rule, "resourceNames", |name| name == asked.name));
    has(rule, "apiGroups", |group| group == "*" || group == asked.group)
        && has(rule, "resources", |resource| {
            resource == "*" || resource == combined || any_sub.as_deref() == Some(resource)
        })
        && names
}

fn path_fits(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => path.starts_with(prefix),
        None => pattern == path,
    }
}

/// The rules everybody has, for SelfSubjectRulesReview.
pub(crate) fn common_rules() -> Value {
    json!([{"verbs": ["create"], "apiGroups": ["authorization.k8s.io"],
        "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]}])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(verb: &str, resource: &str, subresource: &str, name: &str) -> Attributes {
        Attributes {
            verb: verb.into(),
            group: "tiffany.dev".into(),
            resource: resource.into(),
            subresource: subresource.into(),
            namespace: "n".into(),
            name: name.into(),
            path: None,
        }
    }

    #[test]
    fn a_rule_fits_what_it_names_and_nothing_else() {
        let rule = |resources: Value| json!({"verbs": ["get"], "apiGroups": ["tiffany.dev"], "resources": resources});
        let agents = rule(json!(["faragents"]));
        let exec = rule(json!(["faragents/exec"]));
        let any_exec = rule(json!(["*/exec"]));
        let all = rule(json!(["*"]));
        let mut one = agents.clone();
        one["resourceNames"] = json!(["a"]);
        for (why, rule, asked, expected) in [
            ("the object", &agents, asked("get", "faragents", "", "a"), true),
            (
                "not its subresource",
                &agents,
                asked("get", "faragents", "exec", "a"),
                false,
            ),
            ("not another verb", &agents, asked("list", "faragents", "", ""), false),
            ("the subresource", &exec, asked("get", "faragents", "exec", "a"), true),
            ("not the object", &exec, asked("get", "faragents", "", "a"), false),
            (
                "any kind's exec",
                &any_exec,
                asked("get", "faragents", "exec", "a"),
                true,
            ),
            ("but no other", &any_exec, asked("get", "faragents", "log", "a"), false),
            ("all", &all, asked("get", "faragents", "exec", "a"), true),
            ("the named one", &one, asked("get", "faragents", "", "a"), true),
            ("no other", &one, asked("get", "faragents", "", "b"), false),
            ("not without a name", &one, asked("get", "faragents", "", ""), false),
        ] {
            assert_eq!(fits(rule, &asked), expected, "{why}");
        }
        let other_group = Attributes {
            group: "apps".into(),
            ..asked("get", "faragents", "", "a")
        };
        assert!(!fits(&agents, &other_group));
    }

    #[test]
    fn subjects_are_users_groups_and_service_accounts() {
        let user = User::service_account("n", "bot", "u");
        for (subject, expected) in [
            (json!({"kind": "User", "name": "system:serviceaccount:n:bot"}), true),
            (json!({"kind": "User", "name": "bot"}), false),
            (json!({"kind": "Group", "name": "system:authenticated"}), true),
            (json!({"kind": "Group", "name": "system:masters"}), false),
            (json!({"kind": "ServiceAccount", "name": "bot", "namespace": "n"}), true),
            (
                json!({"kind": "ServiceAccount", "name": "bot", "namespace": "m"}),
                false,
            ),
            (json!({"kind": "ServiceAccount", "name": "bot"}), true),
        ] {
            assert_eq!(is_meant(&user, &subject, "n"), expected, "{subject}");
        }
    }

    #[test]
    fn a_refusal_says_what_a_real_server_says() {
        let user = User::service_account("n", "bot", "u");
        assert_eq!(
            asked("create", "faragents", "exec", "a").refusal(&user),
            "faragents.tiffany.dev \"a\" is forbidden: User \"system:serviceaccount:n:bot\" cannot create resource \
             \"faragents/exec\" in API group \"tiffany.dev\" in the namespace \"n\""
        );
    }
}
