//! The CustomResourceDefinitions as objects and as YAML.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::{FarAgent, FarAgentPool, FarAgentTemplate, FarNode, FarQueue, FarTask};

/// Every CRD of the group, in the order to install them.
#[must_use]
pub fn crds() -> Vec<CustomResourceDefinition> {
    let mut crds = vec![
        FarAgent::crd(),
        FarNode::crd(),
        FarAgentTemplate::crd(),
        FarAgentPool::crd(),
        FarQueue::crd(),
        FarTask::crd(),
    ];
    for version in crds.iter_mut().flat_map(|crd| &mut crd.spec.versions) {
        if let Some(schema) = version
            .schema
            .as_mut()
            .and_then(|schema| schema.open_api_v3_schema.as_mut())
        {
            quantities_are_never_null(schema);
            formats_are_known(schema);
        }
    }
    crds
}

/// schemars calls a schema without a type nullable. A null quantity would then be kept where the default belongs, and no
/// client could read the object.
fn quantities_are_never_null(schema: &mut JSONSchemaProps) {
    if schema.x_kubernetes_int_or_string == Some(true) {
        schema.nullable = None;
    }
    schema
        .properties
        .iter_mut()
        .flat_map(|all| all.values_mut())
        .for_each(quantities_are_never_null);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        quantities_are_never_null(items);
    }
}

/// schemars names Rust's own formats (`uint32`); kube-apiserver warns of each at every apply. The minimum says as much.
fn formats_are_known(schema: &mut JSONSchemaProps) {
    if schema
        .format
        .as_deref()
        .is_some_and(|format| format.starts_with("uint"))
    {
        schema.format = None;
    }
    let fields = schema.properties.iter_mut().flat_map(|all| all.values_mut());
    fields.for_each(formats_are_known);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        formats_are_known(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        formats_are_known(values);
    }
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
