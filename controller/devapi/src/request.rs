//! From path, query and headers to what is asked.

use std::collections::HashMap;

use hyper::Method;
use hyper::http::HeaderMap;

use crate::error::ApiError;
use crate::table::{Form, Include};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Path {
    Core,
    Groups,
    Group {
        group: String,
    },
    Version {
        group: String,
        version: String,
    },
    Resource(ResourcePath),
    /// `/openapi/v3/...`, `/version`, probes and the like.
    Other(String),
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct ResourcePath {
    pub group: String,
    pub version: String,
    pub plural: String,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub subresource: Option<String>,
}

impl Path {
    pub(crate) fn parse(path: &str) -> Self {
        let segments: Vec<String> = path
            .split('/')
            .filter(|s| !s.is_empty())
            .map(|s| decode(s, false))
            .collect();
        let parts: Vec<&str> = segments.iter().map(String::as_str).collect();
        match parts.as_slice() {
            ["api"] => Self::Core,
            ["apis"] => Self::Groups,
            ["apis", group] => Self::Group {
                group: (*group).to_owned(),
            },
            ["api", version] => Self::Version {
                group: String::new(),
                version: (*version).to_owned(),
            },
            ["apis", group, version] => Self::Version {
                group: (*group).to_owned(),
                version: (*version).to_owned(),
            },
            ["api", version, rest @ ..] => {
                resource("", version, rest).map_or_else(|| Self::Other(path.to_owned()), Self::Resource)
            }
            ["apis", group, version, rest @ ..] => {
                resource(group, version, rest).map_or_else(|| Self::Other(path.to_owned()), Self::Resource)
            }
            _ => Self::Other(path.to_owned()),
        }
    }
}

fn resource(group: &str, version: &str, rest: &[&str]) -> Option<ResourcePath> {
    let base = ResourcePath {
        group: group.to_owned(),
        version: version.to_owned(),
        ..ResourcePath::default()
    };
    let own = |text: &&str| Some((**text).to_owned());
    match rest {
        ["namespaces", name, sub @ ("status" | "finalize")] if group.is_empty() => Some(ResourcePath {
            plural: "namespaces".into(),
            name: own(name),
            subresource: own(sub),
            ..base
        }),
        ["namespaces", namespace, plural, tail @ ..] if tail.len() <= 2 => Some(ResourcePath {
            plural: (*plural).to_owned(),
            namespace: own(namespace),
            name: tail.first().and_then(own),
            subresource: tail.get(1).and_then(own),
            ..base
        }),
        [plural, tail @ ..] if tail.len() <= 2 => Some(ResourcePath {
            plural: (*plural).to_owned(),
            name: tail.first().and_then(own),
            subresource: tail.get(1).and_then(own),
            ..base
        }),
        _ => None,
    }
}

fn decode(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = |i: usize| bytes.get(i).and_then(|b| char::from(*b).to_digit(16));
        match (bytes[at], hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 2;
            }
            (b'+', ..) if plus_is_space => out.push(b' '),
            (other, ..) => out.push(other),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Query parameters; of a repeated one the last counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(HashMap<String, String>);

impl Query {
    pub(crate) fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(k, v)| (decode(k, true), decode(v, true)))
                .collect(),
        )
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(crate) fn flag(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|value| matches!(value, "true" | "1" | "True"))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let parse = |text: &str| {
            text.parse()
                .map_err(|_| ApiError::BadRequest(format!("{name}: invalid value {text:?}: must be a number")))
        };
        self.get(name).map(parse).transpose()
    }
}

/// How unknown fields are met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

/// Everything about a request but its path and body.
#[derive(Debug, Clone)]
pub(crate) struct Parameters {
    pub query: Query,
    pub form: Form,
    pub include: Include,
    pub dry_run: bool,
    pub field_validation: FieldValidation,
    /// `fieldManager`, else the client's name from `User-Agent`.
    pub manager: String,
    pub manager_is_explicit: bool,
    pub force: bool,
    pub content_type: String,
}

impl Parameters {
    pub(crate) fn parse(query: &str, headers: &HeaderMap) -> Result<Self, ApiError> {
        let query = Query::parse(query);
        let header = |name: &str| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
        };
        let dry_run = match query.get("dryRun") {
            None => false,
            Some("All") => true,
            Some(other) => {
                return Err(ApiError::BadRequest(format!(
                    "dryRun: Unsupported value: {other:?}: supported values: \"All\""
                )));
            }
        };
        let field_validation = match query.get("fieldValidation") {
            None | Some("Warn") => FieldValidation::Warn,
            Some("Ignore") => FieldValidation::Ignore,
            Some("Strict") => FieldValidation::Strict,
            Some(other) => {
                let allowed = "supported values: \"\", \"Ignore\", \"Strict\", \"Warn\"";
                return Err(ApiError::BadRequest(format!(
                    "fieldValidation: Unsupported value: {other:?}: {allowed}"
                )));
            }
        };
        let agent = header("user-agent").split(['/', ' ']).next().unwrap_or_default();
        let explicit = query.get("fieldManager").map(str::to_owned);
        let content_type = header("content-type")
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        Ok(Self {
            form: Form::from_accept(header("accept")),
            include: Include::parse(query.get("includeObject")),
            dry_run,
            field_validation,
            manager_is_explicit: explicit.is_some(),
            manager: explicit.unwrap_or_else(|| {
                if agent.is_empty() {
                    "unknown".into()
                } else {
                    agent.to_owned()
                }
            }),
            force: query.flag("force"),
            content_type,
            query,
        })
    }
}

impl Parameters {
    /// For the server's own writes.
    pub(crate) fn internal(manager: &str) -> Self {
        Self {
            query: Query::default(),
            form: Form::Object,
            include: Include::None,
            dry_run: false,
            field_validation: FieldValidation::Ignore,
            manager: manager.to_owned(),
            manager_is_explicit: true,
            force: true,
            content_type: String::new(),
        }
    }
}

/// The verb as authorisation and faults name it.
pub(crate) fn verb(method: &Method, path: &ResourcePath, query: &Query) -> Result<&'static str, ApiError> {
    let named = path.name.is_some();
    Ok(match *method {
        Method::GET | Method::HEAD if query.flag("watch") => "watch",
        Method::GET | Method::HEAD if named => "get",
        Method::GET | Method::HEAD => "list",
        Method::POST => "create",
        Method::PUT if named => "update",
        Method::PATCH if named => "patch",
        Method::DELETE if named => "delete",
        Method::DELETE => "deletecollection",
        _ => return Err(ApiError::MethodNotAllowed),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_tell_namespaces_from_what_is_in_them() {
        let parse = |path: &str| match Path::parse(path) {
            Path::Resource(p) => (
                p.group,
                p.plural,
                p.namespace.unwrap_or_default(),
                p.name.unwrap_or_default(),
                p.subresource.unwrap_or_default(),
            ),
            other => panic!("{other:?}"),
        };
        let row = |g: &str, p: &str, ns: &str, n: &str, s: &str| {
            (g.to_owned(), p.to_owned(), ns.to_owned(), n.to_owned(), s.to_owned())
        };
        assert_eq!(parse("/api/v1/namespaces"), row("", "namespaces", "", "", ""));
        assert_eq!(parse("/api/v1/namespaces/a"), row("", "namespaces", "", "a", ""));
        assert_eq!(
            parse("/api/v1/namespaces/a/status"),
            row("", "namespaces", "", "a", "status")
        );
        assert_eq!(
            parse("/api/v1/namespaces/a/secrets/b"),
            row("", "secrets", "a", "b", "")
        );
        assert_eq!(
            parse("/apis/t.dev/v1/namespaces/a/fas/b/status"),
            row("t.dev", "fas", "a", "b", "status")
        );
        assert_eq!(
            parse("/apis/t.dev/v1/nodes/system%3Ab"),
            row("t.dev", "nodes", "", "system:b", "")
        );
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("labelSelector=a%3Db%2Cc&watch=1&limit=5&x=a+b");
        assert_eq!(query.get("labelSelector"), Some("a=b,c"));
        assert!(query.flag("watch"));
        assert_eq!(query.number("limit"), Ok(Some(5)));
        assert_eq!(query.get("x"), Some("a b"));
    }
}
