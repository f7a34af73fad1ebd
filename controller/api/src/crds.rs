//! The CustomResourceDefinitions as objects and as YAML.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

use crate::{FarAgent, FarNode};

/// Every CRD of the group, in the order to install them.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    vec![FarAgent::crd(), FarNode::crd()]
}

/// The same as YAML documents: (file name, text).
///
/// # Errors
/// Only when a schema cannot be written as YAML, which would be a bug of this crate.
pub fn crds_yaml() -> Result<Vec<(String, String)>, serde_json::Error> {
    crds()
        .iter()
        .map(|crd| {
            // Through a JSON value: keys come out sorted, so the files change only where the types do.
            let value = serde_json::to_value(crd)?;
            let text = serde_saphyr::to_string(&value).map_err(serde::ser::Error::custom)?;
            Ok((format!("{}.yaml", crd.spec.names.plural), text))
        })
        .collect()
}
