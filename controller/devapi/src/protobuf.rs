//! Reads Kubernetes' protobuf bodies of the few kinds that kubectl creates with typed clients (`kubectl create
//! configmap`, `create secret`, `auth whoami`, …). Answers are always JSON, which those clients accept.
//!
//! A body is `k8s\0` and a `runtime.Unknown` message around the object. Messages are described by tables: field
//! number, JSON name, kind of field. Fields that a table does not know are refused, not dropped.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::meta;

pub(crate) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
const MAGIC: &[u8] = b"k8s\0";
/// Nesting that any of the tables can reach, with room.
const MAX_DEPTH: usize = 16;

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Bytes,
    Integer,
    Bool,
    /// `metav1.Time`: seconds and nanoseconds.
    Time,
    Message(&'static [Field]),
    TextMap,
    BytesMap,
    /// Known, but of no meaning here.
    Ignored,
}

#[derive(Clone, Copy)]
struct Field(u64, &'static str, Kind, bool);

const fn one(number: u64, name: &'static str, kind: Kind) -> Field {
    Field(number, name, kind, false)
}
const fn many(number: u64, name: &'static str, kind: Kind) -> Field {
    Field(number, name, kind, true)
}

const OWNER: &[Field] = &[
    one(1, "kind", Kind::Text),
    one(3, "name", Kind::Text),
    one(4, "uid", Kind::Text),
    one(5, "apiVersion", Kind::Text),
    one(6, "controller", Kind::Bool),
    one(7, "blockOwnerDeletion", Kind::Bool),
];
const META: &[Field] = &[
    one(1, "name", Kind::Text),
    one(2, "generateName", Kind::Text),
    one(3, "namespace", Kind::Text),
    one(4, "selfLink", Kind::Text),
    one(5, "uid", Kind::Text),
    one(6, "resourceVersion", Kind::Text),
    one(7, "generation", Kind::Integer),
    one(8, "creationTimestamp", Kind::Time),
    one(9, "deletionTimestamp", Kind::Time),
    one(10, "deletionGracePeriodSeconds", Kind::Integer),
    one(11, "labels", Kind::TextMap),
    one(12, "annotations", Kind::TextMap),
    many(13, "ownerReferences", Kind::Message(OWNER)),
    many(14, "finalizers", Kind::Text),
    many(17, "managedFields", Kind::Ignored),
];
const CONFIG_MAP: &[Field] = &[
    one(1, "metadata", Kind::Message(META)),
    one(2, "data", Kind::TextMap),
    one(3, "binaryData", Kind::BytesMap),
    one(4, "immutable", Kind::Bool),
];
const SECRET: &[Field] = &[
    one(1, "metadata", Kind::Message(META)),
    one(2, "data", Kind::BytesMap),
    one(3, "type", Kind::Text),
    one(4, "stringData", Kind::TextMap),
    one(5, "immutable", Kind::Bool),
];
const NAMESPACE: &[Field] = &[
    one(1, "metadata", Kind::Message(META)),
    one(2, "spec", Kind::Message(&[many(1, "finalizers", Kind::Text)])),
    one(3, "status", Kind::Message(&[one(1, "phase", Kind::Text)])),
];
const REFERENCE: &[Field] = &[
    one(1, "kind", Kind::Text),
    one(2, "namespace", Kind::Text),
    one(3, "name", Kind::Text),
    one(4, "uid", Kind::Text),
    one(5, "apiVersion", Kind::Text),
    one(6, "resourceVersion", Kind::Text),
    one(7, "fieldPath", Kind::Text),
];
const SERVICE_ACCOUNT: &[Field] = &[
    one(1, "metadata", Kind::Message(META)),
    many(2, "secrets", Kind::Message(REFERENCE)),
    many(3, "imagePullSecrets", Kind::Message(&[one(1, "name", Kind::Text)])),
    one(4, "automountServiceAccountToken", Kind::Bool),
];
/// A question: metadata, what is asked, and the answer that is still empty.
const fn review(spec: &'static [Field]) -> [Field; 3] {
    [
        one(1, "metadata", Kind::Message(META)),
        one(2, "spec", Kind::Message(spec)),
        one(3, "status", Kind::Ignored),
    ]
}
const RESOURCE_ATTRIBUTES: &[Field] = &[
    one(1, "namespace", Kind::Text),
    one(2, "verb", Kind::Text),
    one(3, "group", Kind::Text),
    one(4, "version", Kind::Text),
    one(5, "resource", Kind::Text),
    one(6, "subresource", Kind::Text),
    one(7, "name", Kind::Text),
    one(8, "fieldSelector", Kind::Ignored),
    one(9, "labelSelector", Kind::Ignored),
];
const PATH_ATTRIBUTES: &[Field] = &[one(1, "path", Kind::Text), one(2, "verb", Kind::Text)];
const ACCESS_REVIEW: &[Field] = &review(&[
    one(1, "resourceAttributes", Kind::Message(RESOURCE_ATTRIBUTES)),
    one(2, "nonResourceAttributes", Kind::Message(PATH_ATTRIBUTES)),
]);
const RULES_REVIEW: &[Field] = &review(&[one(1, "namespace", Kind::Text)]);
const TOKEN_REVIEW: &[Field] = &review(&[one(1, "token", Kind::Text), many(2, "audiences", Kind::Text)]);
const TOKEN_REQUEST: &[Field] = &review(&[
    many(1, "audiences", Kind::Text),
    one(3, "boundObjectRef", Kind::Ignored),
    one(4, "expirationSeconds", Kind::Integer),
]);
/// `SelfSubjectReview` has no spec: its second field is the answer.
const SELF_REVIEW: &[Field] = &[one(1, "metadata", Kind::Message(META)), one(2, "status", Kind::Ignored)];
const RULE: &[Field] = &[
    many(1, "verbs", Kind::Text),
    many(2, "apiGroups", Kind::Text),
    many(3, "resources", Kind::Text),
    many(4, "resourceNames", Kind::Text),
    many(5, "nonResourceURLs", Kind::Text),
];
const ROLE: &[Field] = &[
    one(1, "metadata", Kind::Message(META)),
    many(2, "rules", Kind::Message(RULE)),
];
const BINDING: &[Field] = &[
    one(1, "metadata", Kind::Message(META)),
    many(
        2,
        "subjects",
        Kind::Message(&[
            one(1, "kind", Kind::Text),
            one(2, "apiGroup", Kind::Text),
            one(3, "name", Kind::Text),
            one(4, "namespace", Kind::Text),
        ]),
    ),
    one(
        3,
        "roleRef",
        Kind::Message(&[
            one(1, "apiGroup", Kind::Text),
            one(2, "kind", Kind::Text),
            one(3, "name", Kind::Text),
        ]),
    ),
];
const DELETE_OPTIONS: &[Field] = &[
    one(1, "gracePeriodSeconds", Kind::Integer),
    one(
        2,
        "preconditions",
        Kind::Message(&[one(1, "uid", Kind::Text), one(2, "resourceVersion", Kind::Text)]),
    ),
    one(3, "orphanDependents", Kind::Bool),
    one(4, "propagationPolicy", Kind::Text),
    many(5, "dryRun", Kind::Text),
];

fn table(kind: &str) -> Option<&'static [Field]> {
    match kind {
        "ConfigMap" => Some(CONFIG_MAP),
        "Secret" => Some(SECRET),
        "Namespace" => Some(NAMESPACE),
        "ServiceAccount" => Some(SERVICE_ACCOUNT),
        "SelfSubjectReview" => Some(SELF_REVIEW),
        "SelfSubjectAccessReview" => Some(ACCESS_REVIEW),
        "SelfSubjectRulesReview" => Some(RULES_REVIEW),
        "TokenReview" => Some(TOKEN_REVIEW),
        "TokenRequest" => Some(TOKEN_REQUEST),
        "Role" | "ClusterRole" => Some(ROLE),
        "RoleBinding" | "ClusterRoleBinding" => Some(BINDING),
        "DeleteOptions" => Some(DELETE_OPTIONS),
        _ => None,
    }
}

/// The object of a protobuf body as JSON.
pub(crate) fn decode(body: &[u8]) -> Result<Value, ApiError> {
    let broken = || ApiError::BadRequest("the protobuf body is broken or holds unknown fields".into());
    let mut unknown = Reader(body.strip_prefix(MAGIC).ok_or_else(broken)?);
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    while let Some((number, payload)) = unknown.next().map_err(|Broken| broken())? {
        match (number, payload) {
            (1, Payload::Bytes(bytes)) => {
                let mut type_meta = Reader(bytes);
                while let Some((number, payload)) = type_meta.next().map_err(|Broken| broken())? {
                    let text = payload.text().map_err(|Broken| broken())?;
                    match number {
                        1 => api_version = text,
                        2 => kind = text,
                        _ => return Err(broken()),
                    }
                }
            }
            (2, Payload::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let Some(fields) = table(&kind) else {
        return Err(ApiError::UnsupportedMediaType("application/json, application/yaml"));
    };
    let mut object = message(raw, fields, 0).map_err(|Broken| broken())?;
    object["apiVersion"] = json!(api_version);
    object["kind"] = json!(kind);
    Ok(object)
}

/// The bytes are no message of this kind.
struct Broken;

enum Payload<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl Payload<'_> {
    fn text(&self) -> Result<String, Broken> {
        match self {
            Self::Bytes(bytes) => std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Broken),
            Self::Number(_) => Err(Broken),
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Result<u64, Broken> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(Broken)?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Broken)
    }

    /// Next field's number and content; `None` at the end.
    fn next(&mut self) -> Result<Option<(u64, Payload<'a>)>, Broken> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let payload = match tag & 7 {
            0 => Payload::Number(self.varint()?),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Broken)?;
                let (bytes, rest) = self.0.split_at_checked(length).ok_or(Broken)?;
                self.0 = rest;
                Payload::Bytes(bytes)
            }
            _ => return Err(Broken),
        };
        Ok(Some((tag >> 3, payload)))
    }
}

fn message(bytes: &[u8], fields: &[Field], depth: usize) -> Result<Value, Broken> {
    if depth > MAX_DEPTH {
        return Err(Broken);
    }
    let mut object = Map::new();
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.next()? {
        let Field(_, name, kind, repeated) = fields.iter().find(|field| field.0 == number).ok_or(Broken)?;
        match kind {
            Kind::Ignored => {}
            Kind::TextMap | Kind::BytesMap => {
                let (key, value) = entry(&payload, matches!(kind, Kind::BytesMap))?;
                let map = object.entry(*name).or_insert_with(|| json!({}));
                map[key] = value;
            }
            _ => {
                let value = scalar(&payload, *kind, depth)?;
                if *repeated {
                    let list = object.entry(*name).or_insert_with(|| json!([]));
                    list.as_array_mut().ok_or(Broken)?.push(value);
                } else if !is_zero(&value) {
                    object.insert((*name).to_owned(), value);
                }
            }
        }
    }
    Ok(Value::Object(object))
}

/// gogo-protobuf writes zero values of required fields; JSON leaves them out. `false` is kept: it comes from pointers.
fn is_zero(value: &Value) -> bool {
    value.is_null() || value == "" || *value == json!(0) || value.as_object().is_some_and(Map::is_empty)
}

fn scalar(payload: &Payload<'_>, kind: Kind, depth: usize) -> Result<Value, Broken> {
    match (kind, payload) {
        (Kind::Text, payload) => payload.text().map(Value::String),
        (Kind::Bytes, Payload::Bytes(bytes)) => Ok(json!(STANDARD.encode(bytes))),
        (Kind::Integer, Payload::Number(number)) => Ok(json!(number.cast_signed())),
        (Kind::Bool, Payload::Number(number)) => Ok(json!(*number != 0)),
        (Kind::Message(fields), Payload::Bytes(bytes)) => message(bytes, fields, depth + 1),
        (Kind::Time, Payload::Bytes(bytes)) => {
            let parts = message(
                bytes,
                &[one(1, "seconds", Kind::Integer), one(2, "nanos", Kind::Integer)],
                depth + 1,
            )?;
            let Some(seconds) = parts["seconds"].as_i64() else {
                return Ok(Value::Null);
            };
            // Go's zero time is far before 1970 and means absent.
            match time::OffsetDateTime::from_unix_timestamp(seconds) {
                Ok(at) if seconds > 0 => Ok(json!(meta::stamp(at))),
                _ => Ok(Value::Null),
            }
        }
        _ => Err(Broken),
    }
}

fn entry(payload: &Payload<'_>, is_bytes: bool) -> Result<(String, Value), Broken> {
    let Payload::Bytes(bytes) = payload else {
        return Err(Broken);
    };
    let value_kind = if is_bytes { Kind::Bytes } else { Kind::Text };
    let (mut key, mut value) = (String::new(), json!(""));
    let mut reader = Reader(bytes);
    while let Some((number, payload)) = reader.next()? {
        match number {
            1 => key = payload.text()?,
            2 => value = scalar(&payload, value_kind, 0)?,
            _ => return Err(Broken),
        }
    }
    Ok((key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend(bytes);
        out
    }
    fn body(version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let type_meta = [field(1, version.as_bytes()), field(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), field(1, &type_meta), field(2, raw)].concat()
    }

    #[test]
    fn a_secret_of_a_typed_client_is_read() {
        let metadata = [
            field(1, b"s"),
            field(8, &[]),
            field(11, &[field(1, b"k"), field(2, b"v")].concat()),
        ]
        .concat();
        let raw = [
            field(1, &metadata),
            field(2, &[field(1, b"p"), field(2, b"q")].concat()),
            field(3, b"Opaque"),
        ]
        .concat();
        let expected = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "labels": {"k": "v"}},
            "data": {"p": "cQ=="}, "type": "Opaque"});
        assert_eq!(decode(&body("v1", "Secret", &raw)), Ok(expected));
    }

    #[test]
    fn other_kinds_and_broken_bodies_are_refused() {
        assert_eq!(decode(&body("v1", "Pod", &[])).unwrap_err().code(), 415);
        assert_eq!(decode(&body("v1", "Secret", &field(9, b"x"))).unwrap_err().code(), 400);
        assert_eq!(decode(b"k8s\0\x12\xff").unwrap_err().code(), 400);
        assert_eq!(decode(b"{}").unwrap_err().code(), 400);
    }
}
