//! What has to be in the API before the controller works: its namespaces, and the CRDs where it is told to install them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use far_api::{FIELD_MANAGER, NODE_LEASE_NAMESPACE, SYSTEM_NAMESPACE};
use k8s_openapi::{
    api::core::v1::Namespace, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    runtime::{conditions, wait::await_condition},
};
use serde_json::json;

/// A server that takes longer to serve a CRD is not working.
const ESTABLISHED_WITHIN: Duration = Duration::from_secs(60);

pub(crate) async fn namespaces(client: &Client) -> Result<()> {
    let api: Api<Namespace> = Api::all(client.clone());
    for name in [SYSTEM_NAMESPACE, NODE_LEASE_NAMESPACE] {
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        match api.create(&PostParams::default(), &namespace).await {
            Ok(_) => {}
            Err(kube::Error::Api(error)) if error.code == 409 => {}
            Err(error) => return Err(error).with_context(|| format!("creating namespace {name}")),
        }
    }
    Ok(())
}

pub(crate) async fn crds(client: &Client) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in far_api::crds() {
        let name = crd.metadata.name.clone().context("a derived CRD has a name")?;
        let params = PatchParams::apply(FIELD_MANAGER).force();
        api.patch(&name, &params, &Patch::Apply(&crd))
            .await
            .with_context(|| format!("installing CRD {name}"))?;
        let established = await_condition(api.clone(), &name, conditions::is_crd_established());
        match tokio::time::timeout(ESTABLISHED_WITHIN, established).await {
            Ok(seen) => seen.map(drop).with_context(|| format!("waiting for CRD {name}"))?,
            Err(_) => bail!(
                "the API does not serve CRD {name} after {} s",
                ESTABLISHED_WITHIN.as_secs()
            ),
        }
    }
    Ok(())
}
