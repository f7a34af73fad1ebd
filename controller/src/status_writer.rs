//! Writes of statuses and finalizers, guarded by resourceVersion.

use std::fmt::Debug;

use far_api::{FIELD_MANAGER, FINALIZER, FarAgent, FarAgentStatus};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams, PostParams, Request},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

/// What is read of an answer to a write that was guarded by resourceVersion: all else is as it was, and as it was written.
#[derive(Debug, Deserialize)]
struct Answer {
    metadata: AnswerMeta,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnswerMeta {
    resource_version: Option<String>,
}

/// The agent's API in its own namespace.
pub(crate) fn api(client: &Client, agent: &FarAgent) -> Api<FarAgent> {
    Api::namespaced(client.clone(), &agent.namespace().unwrap_or_default())
}

/// Writes a status over the one `agent` has. 409: somebody wrote in between.
///
/// The whole status, not a patch of it: for a patch the API server decodes and encodes the object twice more. It takes nothing
/// but the status from what is sent to this subresource (Kubernetes API, "Status subresource"), so nothing else is.
pub(crate) async fn write(client: &Client, agent: &FarAgent, status: &FarAgentStatus) -> Result<FarAgent, kube::Error> {
    let body = json!({
        "apiVersion": FarAgent::api_version(&()),
        "kind": FarAgent::kind(&()),
        "metadata": {
            "namespace": agent.metadata.namespace,
            "name": agent.metadata.name,
            "resourceVersion": agent.metadata.resource_version,
            "uid": agent.metadata.uid,
        },
        "status": status,
    });
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    let body = serde_json::to_vec(&body).map_err(kube::Error::SerdeError)?;
    let path = FarAgent::url_path(&(), agent.metadata.namespace.as_deref());
    let request = Request::new(path).replace_subresource("status", &agent.name_any(), &params, body);
    let answer: Answer = client.request(request.map_err(kube::Error::BuildRequest)?).await?;
    let mut written = agent.clone();
    written.metadata.resource_version = answer.metadata.resource_version;
    written.status = Some(status.clone());
    Ok(written)
}

/// Writes the status of an object of another kind over the one it has. 409: somebody wrote in between.
pub(crate) async fn write_to<K, S>(api: &Api<K>, object: &K, old: &Option<S>, new: &S) -> Result<K, kube::Error>
where
    K: Resource + Clone + DeserializeOwned + Debug,
    S: Serialize,
{
    let value = |status: &S| serde_json::to_value(status).map_err(kube::Error::SerdeError);
    let old = old.as_ref().map_or(Ok(Value::Null), value)?;
    let meta = object.meta();
    let body = json!({
        "metadata": { "resourceVersion": meta.resource_version, "uid": meta.uid },
        "status": difference(&old, &value(new)?),
    });
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let name = meta.name.as_deref().unwrap_or_default();
    api.patch_status(name, &params, &Patch::Merge(body)).await
}

/// Adds or removes our finalizer.
pub(crate) async fn hold(client: &Client, agent: &FarAgent, held: bool) -> Result<FarAgent, kube::Error> {
    let mut finalizers: Vec<&str> = agent
        .finalizers()
        .iter()
        .map(String::as_str)
        .filter(|one| *one != FINALIZER)
        .collect();
    if held {
        finalizers.push(FINALIZER);
    }
    let body = json!({ "metadata": {
        "resourceVersion": agent.metadata.resource_version, "uid": agent.metadata.uid, "finalizers": finalizers,
    }});
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let finalizers = finalizers.into_iter().map(str::to_owned).collect();
    let path = FarAgent::url_path(&(), agent.metadata.namespace.as_deref());
    let request = Request::new(path).patch(&agent.name_any(), &params, &Patch::Merge(body));
    let answer: Answer = client.request(request.map_err(kube::Error::BuildRequest)?).await?;
    let mut written = agent.clone();
    written.metadata.resource_version = answer.metadata.resource_version;
    written.metadata.finalizers = Some(finalizers);
    Ok(written)
}

/// RFC 7386 patch that turns `old` into `new`; lists are replaced as a whole.
pub(crate) fn difference(old: &Value, new: &Value) -> Value {
    let (Value::Object(old), Value::Object(new)) = (old, new) else {
        return new.clone();
    };
    let mut patch = Map::new();
    for (key, value) in new {
        match old.get(key) {
            Some(before) if before == value => {}
            Some(before) => {
                patch.insert(key.clone(), difference(before, value));
            }
            None => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        patch.insert(key.clone(), Value::Null);
    }
    Value::Object(patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_holds_what_changed_and_nulls_what_went() {
        let old = json!({"a": 1, "b": {"c": 1, "d": 2}, "gone": 1, "list": [1, 2]});
        let new = json!({"a": 1, "b": {"c": 3, "d": 2}, "new": 5, "list": [2]});
        assert_eq!(
            difference(&old, &new),
            json!({"b": {"c": 3}, "gone": null, "new": 5, "list": [2]})
        );
        assert_eq!(difference(&new, &new), json!({}));
        assert_eq!(difference(&Value::Null, &new), new);
    }
}
