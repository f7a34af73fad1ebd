//! One function per verb. Each takes what is asked and gives an answer or an `ApiError`.

pub(crate) mod delete;
pub(crate) mod read;
pub(crate) mod review;
pub(crate) mod scale;
mod settle;
pub(crate) mod watch;
pub(crate) mod write;

use std::sync::Arc;

use serde_json::{Value, json};

use crate::api::builtin::EVENT_STORAGE;
use crate::api::events;
use crate::api::resource::Resource;
use crate::error::ApiError;
use crate::store::{Key, Object, WriteError};

/// What is addressed: a served kind and, for most verbs, one object.
#[derive(Clone)]
pub(crate) struct Target {
    pub resource: Arc<Resource>,
    /// `None`: all namespaces, or a cluster-scoped kind.
    pub namespace: Option<String>,
    pub name: String,
    pub subresource: String,
}

impl Target {
    pub(crate) fn key(&self) -> Key {
        Key {
            resource: self.resource.storage.clone(),
            namespace: self.namespace.clone().unwrap_or_default(),
            name: self.name.clone(),
        }
    }

    pub(crate) fn not_found(&self) -> ApiError {
        ApiError::NotFound(self.resource.subject(&self.name))
    }

    pub(crate) fn write_error(&self, error: WriteError) -> ApiError {
        match error {
            WriteError::Exists => ApiError::AlreadyExists(self.resource.subject(&self.name)),
            WriteError::Changed => self.modified(),
            WriteError::Overloaded => ApiError::Overloaded,
            WriteError::Failed(cause) => ApiError::Internal(cause),
        }
    }

    pub(crate) fn modified(&self) -> ApiError {
        let text = "the object has been modified; please apply your changes to the latest version and try again";
        ApiError::Conflict(self.resource.subject(&self.name), text.to_owned())
    }
}

/// The stored form in the version that was asked for.
pub(crate) fn present(resource: &Resource, mut stored: Value) -> Value {
    if resource.storage == EVENT_STORAGE {
        if resource.group == "events.k8s.io" {
            events::from_core(&mut stored);
        }
    } else {
        stored["apiVersion"] = json!(resource.api_version());
    }
    stored
}

/// The form the store keeps.
pub(crate) fn to_stored(resource: &Resource, mut object: Value) -> Value {
    if resource.storage == EVENT_STORAGE {
        if resource.group == "events.k8s.io" {
            events::to_core(&mut object);
        }
    } else {
        object["apiVersion"] = json!(resource.storage_api_version());
    }
    object
}

/// Whether stored bytes can be sent as they are.
pub(crate) fn is_stored_form(resource: &Resource) -> bool {
    resource.group != "events.k8s.io" && resource.version == resource.storage_version
}

pub(crate) fn presented(resource: &Resource, object: &Object) -> Value {
    present(resource, object.value())
}
