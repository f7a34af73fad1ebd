//! A FarAgent as the watch reads it: without what nobody reads here and what is most of an object, managedFields above all.
//! They are not even taken apart.

use std::{borrow::Cow, collections::BTreeMap};

use far_api::{FarAgent, FarAgentSpec, FarAgentStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::{Resource, core::NamespaceResourceScope};
use serde::{Deserialize, Deserializer};

/// What kubectl apply keeps for itself.
pub(crate) const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Watched(pub(crate) FarAgent);

#[derive(Deserialize)]
struct Parts {
    metadata: Meta,
    spec: FarAgentSpec,
    status: Option<FarAgentStatus>,
}

/// ObjectMeta (Kubernetes API, meta/v1) but for managedFields and what servers write no more.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    deletion_grace_period_seconds: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    owner_references: Option<Vec<OwnerReference>>,
    finalizers: Option<Vec<String>>,
}

impl From<Meta> for ObjectMeta {
    fn from(meta: Meta) -> Self {
        let mut annotations = meta.annotations;
        if let Some(annotations) = &mut annotations {
            annotations.remove(LAST_APPLIED);
        }
        Self {
            name: meta.name,
            namespace: meta.namespace,
            uid: meta.uid,
            resource_version: meta.resource_version,
            generation: meta.generation,
            creation_timestamp: meta.creation_timestamp,
            deletion_timestamp: meta.deletion_timestamp,
            deletion_grace_period_seconds: meta.deletion_grace_period_seconds,
            labels: meta.labels,
            annotations,
            owner_references: meta.owner_references,
            finalizers: meta.finalizers,
            ..Self::default()
        }
    }
}

impl<'de> Deserialize<'de> for Watched {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let parts = Parts::deserialize(deserializer)?;
        Ok(Self(FarAgent {
            metadata: parts.metadata.into(),
            spec: parts.spec,
            status: parts.status,
        }))
    }
}

impl Resource for Watched {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        FarAgent::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        FarAgent::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        FarAgent::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        FarAgent::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.0.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.0.metadata
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_read_but_who_wrote_which_field() {
        let object = serde_json::json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent",
            "metadata": {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": "7", "generation": 3,
                "creationTimestamp": "2026-01-01T00:00:00Z", "deletionTimestamp": "2026-01-02T00:00:00Z",
                "deletionGracePeriodSeconds": 0, "labels": {"l": "1"}, "annotations": {"b": "2", (LAST_APPLIED): "{}"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "o", "uid": "ou", "controller": true}],
                "finalizers": ["f"], "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}]},
            "spec": {"image": "i", "env": [{"name": "A", "value": "b"}]},
            "status": {"phase": "Running", "nodeName": "b", "attempt": 1}});
        let mut whole: FarAgent = serde_json::from_value(object.clone()).unwrap();
        let Watched(read) = serde_json::from_value(object).unwrap();
        whole.metadata.managed_fields = None;
        whole.metadata.annotations.as_mut().unwrap().remove(LAST_APPLIED);
        assert_eq!(
            serde_json::to_value(read).unwrap(),
            serde_json::to_value(whole).unwrap()
        );
    }
}
