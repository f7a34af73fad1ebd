//! What all requests share.

use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::api::builtin::{CRD_STORAGE, NAMESPACE_STORAGE};
use crate::api::registry::Registry;
use crate::api::resource::Resource;
use crate::auth::Tokens;
use crate::faults::Faults;
use crate::meta;
use crate::store::Store;

pub(crate) struct App {
    pub store: Store,
    pub registry: Registry,
    pub faults: Faults,
    /// `/debug/faults` exists.
    pub debug_faults: bool,
    pub tokens: Tokens,
    pub stopping: CancellationToken,
    /// `host:port` that is served.
    pub address: String,
}

impl App {
    /// Keeps the served kinds in step with the CRDs.
    pub(crate) fn after_write(&self, resource: &Resource) {
        if resource.storage == CRD_STORAGE {
            self.registry.refresh(|| stored_crds(&self.store));
        }
    }

    /// Namespaces stay until they are empty.
    pub(crate) fn keeps(&self, resource: &Resource, object: &Value) -> bool {
        resource.storage == NAMESPACE_STORAGE && !self.store.namespace_is_empty(meta::text(object, "name"))
    }

    /// Whether a CRD has objects.
    pub(crate) fn has_instances(&self, crd: &Value) -> bool {
        !self.store.list(&instances(crd), None).1.is_empty()
    }
}

/// Where a CRD's objects are stored.
pub(crate) fn instances(crd: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!(
        "{}/{}",
        text(&crd["spec"]["group"]),
        text(&crd["spec"]["names"]["plural"])
    )
}

pub(crate) fn stored_crds(store: &Store) -> Vec<Value> {
    store
        .list(CRD_STORAGE, None)
        .1
        .iter()
        .map(|object| object.value())
        .collect()
}
