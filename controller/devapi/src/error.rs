//! Errors of the API as the `metav1.Status` bodies that clients parse. Texts follow the real server's, because kubectl
//! prints them and scripts match on them.

use serde_json::{Value, json};

/// One rejected field: becomes an entry of `status.details.causes`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired`, … as in `metav1.CauseType`.
    pub reason: String,
    /// Path such as `spec.env[0].name`; empty for the root.
    pub field: String,
    /// Text without the path, for example `Required value`.
    pub message: String,
}

impl Cause {
    pub(crate) fn new(reason: &str, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: reason.to_owned(),
            field: field.into(),
            message: message.into(),
        }
    }
    pub(crate) fn invalid(field: impl Into<String>, value: &Value, detail: &str) -> Self {
        Self::new(
            "FieldValueInvalid",
            field,
            format!("Invalid value: {}: {detail}", show(value)),
        )
    }
    pub(crate) fn required(field: impl Into<String>, detail: &str) -> Self {
        let text = if detail.is_empty() {
            "Required value".to_owned()
        } else {
            format!("Required value: {detail}")
        };
        Self::new("FieldValueRequired", field, text)
    }
    fn line(&self) -> String {
        format!(
            "{}: {}",
            if self.field.is_empty() { "<nil>" } else { &self.field },
            self.message
        )
    }
}

/// A value as the real server quotes it: scalars as JSON, containers by their kind.
pub(crate) fn show(value: &Value) -> String {
    match value {
        Value::Object(_) => "\"object\"".to_owned(),
        Value::Array(_) => "\"array\"".to_owned(),
        other => other.to_string(),
    }
}

/// What a request names, for error texts: `faragents.tiffany.dev "a"`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Subject {
    pub group: String,
    pub plural: String,
    pub kind: String,
    pub name: String,
}

impl Subject {
    fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.clone()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }
    fn qualified_kind(&self) -> String {
        if self.group.is_empty() {
            self.kind.clone()
        } else {
            format!("{}.{}", self.kind, self.group)
        }
    }
}

/// Every way a request is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("Unauthorized")]
    Unauthorized,
    #[error("the server could not find the requested resource")]
    UnknownPath,
    #[error("{} \"{}\" not found", .0.qualified(), .0.name)]
    NotFound(Subject),
    #[error("{} \"{}\" already exists", .0.qualified(), .0.name)]
    AlreadyExists(Subject),
    #[error("Operation cannot be fulfilled on {} \"{}\": {}", .0.qualified(), .0.name, .1)]
    Conflict(Subject, String),
    /// Server-side apply met fields of other managers.
    #[error("{message}")]
    ApplyConflict { message: String, causes: Vec<Cause> },
    #[error("{} \"{}\" is invalid: {}", .0.qualified_kind(), .0.name, lines(.1))]
    Invalid(Subject, Vec<Cause>),
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    Forbidden(String),
    #[error("{0}")]
    Gone(String),
    #[error("the server does not allow this method on the requested resource")]
    MethodNotAllowed,
    #[error("the body of the request was in an unknown format - accepted media types include: {0}")]
    UnsupportedMediaType(&'static str),
    #[error("Request entity too large: limit is {0}")]
    TooLarge(usize),
    #[error("{message}")]
    Injected {
        code: u16,
        message: String,
        retry_after: Option<u32>,
    },
    #[error("too many requests are waiting or too many clients are connected, please try again later")]
    Overloaded,
    #[error("Internal error occurred: {0}")]
    Internal(String),
}

fn lines(causes: &[Cause]) -> String {
    match causes {
        [one] => one.line(),
        many => format!("[{}]", many.iter().map(Cause::line).collect::<Vec<_>>().join(", ")),
    }
}

impl ApiError {
    pub(crate) fn code(&self) -> u16 {
        match self {
            Self::Unauthorized => 401,
            Self::Forbidden(_) => 403,
            Self::UnknownPath | Self::NotFound(_) => 404,
            Self::MethodNotAllowed => 405,
            Self::AlreadyExists(_) | Self::Conflict(..) | Self::ApplyConflict { .. } => 409,
            Self::Gone(_) => 410,
            Self::TooLarge(_) => 413,
            Self::UnsupportedMediaType(_) => 415,
            Self::Invalid(..) => 422,
            Self::Overloaded => 429,
            Self::BadRequest(_) => 400,
            Self::Injected { code, .. } => *code,
            Self::Internal(_) => 500,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden(_) => "Forbidden",
            Self::UnknownPath | Self::NotFound(_) => "NotFound",
            Self::MethodNotAllowed => "MethodNotAllowed",
            Self::AlreadyExists(_) => "AlreadyExists",
            Self::Conflict(..) | Self::ApplyConflict { .. } => "Conflict",
            Self::Gone(_) => "Expired",
            Self::TooLarge(_) => "RequestEntityTooLarge",
            Self::UnsupportedMediaType(_) => "UnsupportedMediaType",
            Self::Invalid(..) => "Invalid",
            Self::Overloaded => "TooManyRequests",
            Self::BadRequest(_) => "BadRequest",
            Self::Injected { code, .. } => match code {
                409 => "Conflict",
                410 => "Expired",
                429 => "TooManyRequests",
                503 => "ServiceUnavailable",
                504 => "Timeout",
                _ => "InternalError",
            },
            Self::Internal(_) => "InternalError",
        }
    }

    pub(crate) fn retry_after(&self) -> Option<u32> {
        match self {
            Self::Overloaded => Some(1),
            Self::Injected { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The `metav1.Status` body.
    pub(crate) fn status(&self) -> Value {
        let mut details = serde_json::Map::new();
        let (subject, causes): (Option<&Subject>, &[Cause]) = match self {
            Self::NotFound(s) | Self::AlreadyExists(s) | Self::Conflict(s, _) => (Some(s), &[]),
            Self::Invalid(s, causes) => (Some(s), causes),
            Self::ApplyConflict { causes, .. } => (None, causes),
            _ => (None, &[]),
        };
        if let Some(s) = subject {
            details.insert("name".into(), json!(s.name));
            if !s.group.is_empty() {
                details.insert("group".into(), json!(s.group));
            }
            let kind = if matches!(self, Self::Invalid(..)) {
                &s.kind
            } else {
                &s.plural
            };
            details.insert("kind".into(), json!(kind));
        }
        if !causes.is_empty() {
            let causes: Vec<_> = causes
                .iter()
                .map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field}))
                .collect();
            details.insert("causes".into(), json!(causes));
        }
        if let Some(seconds) = self.retry_after() {
            details.insert("retryAfterSeconds".into(), json!(seconds));
        }
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.to_string(), "reason": self.reason(), "code": self.code(),
        });
        if !details.is_empty() {
            status["details"] = Value::Object(details);
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_status_names_the_kind_and_each_field() {
        let subject = Subject {
            group: "tiffany.dev".into(),
            plural: "faragents".into(),
            kind: "FarAgent".into(),
            name: "a".into(),
        };
        let error = ApiError::Invalid(subject, vec![Cause::required("spec.image", "")]);
        let status = error.status();
        assert_eq!(
            status["message"],
            "FarAgent.tiffany.dev \"a\" is invalid: spec.image: Required value"
        );
        assert_eq!(status["details"]["kind"], "FarAgent");
        assert_eq!(status["details"]["causes"][0]["field"], "spec.image");
        assert_eq!(status["code"], 422);
    }

    #[test]
    fn a_core_resource_is_named_without_a_group() {
        let error = ApiError::NotFound(Subject {
            plural: "secrets".into(),
            name: "s".into(),
            ..Subject::default()
        });
        assert_eq!(error.to_string(), "secrets \"s\" not found");
    }
}
