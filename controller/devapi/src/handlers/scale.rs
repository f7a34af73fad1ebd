//! The `/scale` subresource: replicas of a custom resource as `autoscaling/v1` Scale.

use serde_json::{Value, json};

use super::write::{self, Origin, Patch, Written};
use super::{Target, presented};
use crate::api::resource::ScalePaths;
use crate::app::App;
use crate::error::{ApiError, Cause};
use crate::jsonpath;
use crate::meta;
use crate::patch::{merge, strategic};
use crate::request::Parameters;

fn paths(target: &Target) -> Result<ScalePaths, ApiError> {
    target.resource.scale.clone().ok_or(ApiError::UnknownPath)
}

fn scale(paths: &ScalePaths, object: &Value) -> Value {
    let number = |path: &str| {
        jsonpath::find(object, path)
            .first()
            .and_then(|value| value.as_i64())
            .unwrap_or(0)
    };
    let metadata = &object["metadata"];
    let mut status = json!({"replicas": number(&paths.status)});
    if let Some(selector) = paths
        .selector
        .as_ref()
        .and_then(|path| jsonpath::find(object, path).first().copied())
    {
        status["selector"] = selector.clone();
    }
    let mut kept = json!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = metadata.get(field) {
            kept[field] = value.clone();
        }
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": kept, "spec": {"replicas": number(&paths.spec)}, "status": status})
}

pub(crate) fn get(app: &App, target: &Target) -> Result<Value, ApiError> {
    let object = app.store.get(&target.key()).ok_or_else(|| target.not_found())?;
    Ok(scale(&paths(target)?, &presented(&target.resource, &object)))
}

pub(crate) async fn update(
    app: &App,
    target: &Target,
    body: &Value,
    parameters: &Parameters,
) -> Result<Written, ApiError> {
    change(app, target, parameters, |_| Ok(body.clone())).await
}

pub(crate) async fn patch(
    app: &App,
    target: &Target,
    patch: &Patch,
    parameters: &Parameters,
) -> Result<Written, ApiError> {
    change(app, target, parameters, |mut current| {
        match patch {
            Patch::Json(patch) => merge::json_patch(&mut current, patch)?,
            Patch::Merge(patch) => merge::merge(&mut current, patch),
            Patch::Strategic(patch) => strategic::merge(&mut current, patch),
            Patch::Apply(_) => {
                return Err(ApiError::UnsupportedMediaType(
                    "application/json-patch+json, application/merge-patch+json",
                ));
            }
        }
        Ok(current)
    })
    .await
}

async fn change(
    app: &App,
    target: &Target,
    parameters: &Parameters,
    wanted: impl Fn(Value) -> Result<Value, ApiError>,
) -> Result<Written, ApiError> {
    let paths = paths(target)?;
    let main = Target {
        subresource: String::new(),
        ..target.clone()
    };
    let written = write::modify(app, &main, parameters, |live| {
        let live = live.ok_or_else(|| target.not_found())?;
        let new = wanted(scale(&paths, live))?;
        let replicas = new["spec"]["replicas"].as_i64().unwrap_or(0);
        if replicas < 0 {
            let causes = vec![Cause::invalid(
                "spec.replicas",
                &json!(replicas),
                "should be a non-negative integer",
            )];
            return Err(ApiError::Invalid(target.resource.subject(&target.name), causes));
        }
        let mut object = live.clone();
        jsonpath::set(&mut object, &paths.spec, json!(replicas));
        let revision = new["metadata"].get("resourceVersion").cloned().unwrap_or(Value::Null);
        meta::set(&mut object, "resourceVersion", revision);
        Ok((object, Origin::Sent))
    })
    .await?;
    Ok(Written {
        object: scale(&paths, &written.object),
        ..written
    })
}
