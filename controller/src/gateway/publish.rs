//! Where the gateway is: ConfigMap `far-gateway` in the controller's namespace, which `far` reads.

use std::time::Duration;

use far_api::{FIELD_MANAGER, SYSTEM_NAMESPACE};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// The ConfigMap's name.
const NAME: &str = "far-gateway";
/// After a failure, and between two looks whether somebody changed it.
const AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Keeps the ConfigMap true until `stop`. An apply that changes nothing writes nothing.
pub(crate) async fn publish(client: Client, endpoint: String, ca_pem: String, stop: CancellationToken) {
    let api: Api<ConfigMap> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let wanted = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": NAME, "namespace": SYSTEM_NAMESPACE},
        "data": {"endpoint": endpoint, "ca.crt": ca_pem},
    });
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    loop {
        let written = api.patch(NAME, &parameters, &Patch::Apply(&wanted)).await;
        let wait = match written {
            Ok(_) => AGAIN.1,
            Err(error) => {
                tracing::warn!(%error, "where the gateway is could not be published: trying again");
                AGAIN.0
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}
