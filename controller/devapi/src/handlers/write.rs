//! Create, update and patch: one pipeline from what the client sent to what is stored.

use std::sync::Arc;

use serde_json::{Value, json};

use super::settle::{check_namespace, check_type, revise, same_but_stamps, settle, settle_namespace, writer};
use super::{Target, present, presented, to_stored};
use crate::app::App;
use crate::error::{ApiError, Cause, Subject};
use crate::meta;
use crate::patch::{apply, managed, merge, strategic};
use crate::request::Parameters;
use crate::schema::{default, prune};
use crate::store::{Change, Expect, WriteError};

/// Attempts of a patch that races with other writers, as many as the real server makes.
const PATCH_ATTEMPTS: usize = 20;
const GENERATE_ATTEMPTS: usize = 8;

/// An object and the warnings that go with it.
#[derive(Debug)]
pub(crate) struct Written {
    pub object: Value,
    pub warnings: Vec<String>,
    pub created: bool,
}

pub(crate) async fn create(
    app: &App,
    target: &Target,
    mut body: Value,
    parameters: &Parameters,
) -> Result<Written, ApiError> {
    check_type(target, &body)?;
    let mut target = target.clone();
    settle_namespace(&target, &mut body)?;
    if !meta::text(&body, "resourceVersion").is_empty() {
        return Err(ApiError::BadRequest(
            "resourceVersion should not be set on objects to be created".into(),
        ));
    }
    let base = meta::text(&body, "generateName").to_owned();
    let generates = meta::text(&body, "name").is_empty() && !base.is_empty();
    for attempt in 1.. {
        let mut object = body.clone();
        if generates {
            meta::set(&mut object, "name", json!(meta::generate_name(&base)));
        }
        target.name = meta::text(&object, "name").to_owned();
        let outcome = insert(app, &target, object, parameters, Origin::Sent).await;
        match outcome {
            Err(ApiError::AlreadyExists(_)) if generates && attempt < GENERATE_ATTEMPTS => {}
            other => return other,
        }
    }
    Err(ApiError::Internal("no free generated name".into()))
}

async fn insert(
    app: &App,
    target: &Target,
    mut object: Value,
    parameters: &Parameters,
    origin: Origin,
) -> Result<Written, ApiError> {
    let resource = &target.resource;
    check_namespace(app, target)?;
    let now = meta::now();
    for field in [
        "resourceVersion",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "generation",
    ] {
        meta::set(&mut object, field, Value::Null);
    }
    meta::set(&mut object, "uid", json!(uuid::Uuid::new_v4().to_string()));
    meta::set(&mut object, "creationTimestamp", json!(now));
    if resource.has_generation {
        meta::set(&mut object, "generation", json!(1));
    }
    if resource.has_status
        && resource.is_custom()
        && let Some(map) = object.as_object_mut()
    {
        map.remove("status");
    }
    let warnings = settle(target, &mut object, None, parameters, &now)?;
    if origin == Origin::Sent {
        managed::record_update(&resource.schema, None, &mut object, &writer(target, parameters, &now));
    }
    meta::tidy(&mut object);
    if parameters.dry_run {
        if app.store.latest(&target.key()).is_some() {
            return Err(ApiError::AlreadyExists(resource.subject(&target.name)));
        }
        return Ok(Written {
            object,
            warnings,
            created: true,
        });
    }
    let stored = to_stored(resource, object);
    let written = app.store.write(target.key(), Expect::Absent, Change::Put(stored)).await;
    let written = written.map_err(|error| target.write_error(error))?;
    app.after_write(resource);
    Ok(Written {
        object: presented(resource, &written),
        warnings,
        created: true,
    })
}

pub(crate) async fn update(
    app: &App,
    target: &Target,
    mut body: Value,
    parameters: &Parameters,
) -> Result<Written, ApiError> {
    check_type(target, &body)?;
    settle_namespace(target, &mut body)?;
    if meta::text(&body, "name") != target.name {
        let text = format!(
            "the name of the object ({}) does not match the name on the URL ({})",
            meta::text(&body, "name"),
            target.name
        );
        return Err(ApiError::BadRequest(text));
    }
    if target.resource.is_custom() && meta::text(&body, "resourceVersion").is_empty() {
        let causes = vec![Cause::new(
            "FieldValueInvalid",
            "metadata.resourceVersion",
            "Invalid value: 0: must be specified for an update",
        )];
        return Err(ApiError::Invalid(target.resource.subject(&target.name), causes));
    }
    modify(app, target, parameters, |live| {
        live.map(|_| (body.clone(), Origin::Sent))
            .ok_or_else(|| target.not_found())
    })
    .await
}

/// The body of a patch, by its media type.
pub(crate) enum Patch {
    Json(Value),
    Merge(Value),
    Strategic(Value),
    Apply(Value),
}

impl Patch {
    pub(crate) fn parse(content_type: &str, body: &[u8]) -> Result<Self, ApiError> {
        let json = || {
            serde_json::from_slice(body).map_err(|error| ApiError::BadRequest(format!("error decoding patch: {error}")))
        };
        match content_type {
            "application/json-patch+json" => Ok(Self::Json(json()?)),
            "application/merge-patch+json" => Ok(Self::Merge(json()?)),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic(json()?)),
            "application/apply-patch+yaml" => Ok(Self::Apply(decode(body)?)),
            _ => Err(ApiError::UnsupportedMediaType(
                "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml, application/strategic-merge-patch+json",
            )),
        }
    }
}

/// JSON, or YAML when it is not.
pub(crate) fn decode(body: &[u8]) -> Result<Value, ApiError> {
    if let Ok(value) = serde_json::from_slice(body) {
        return Ok(value);
    }
    let text = std::str::from_utf8(body).map_err(|_| ApiError::BadRequest("the body is not UTF-8".into()))?;
    serde_saphyr::from_str(text).map_err(|error| ApiError::BadRequest(format!("error decoding the body: {error}")))
}

pub(crate) async fn patch(
    app: &App,
    target: &Target,
    patch: &Patch,
    parameters: &Parameters,
) -> Result<Written, ApiError> {
    let resource = &target.resource;
    match patch {
        Patch::Apply(config) => return server_side_apply(app, target, config, parameters).await,
        Patch::Strategic(_) if resource.is_custom() => {
            return Err(ApiError::UnsupportedMediaType(
                "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
            ));
        }
        Patch::Json(_) | Patch::Merge(_) | Patch::Strategic(_) => {}
    }
    modify(app, target, parameters, |live| {
        let mut patched = live.ok_or_else(|| target.not_found())?.clone();
        match patch {
            Patch::Json(patch) => merge::json_patch(&mut patched, patch).map_err(|error| match error {
                ApiError::Invalid(_, causes) => ApiError::Invalid(resource.subject(&target.name), causes),
                other => other,
            })?,
            Patch::Merge(patch) => merge::merge(&mut patched, patch),
            Patch::Strategic(patch) | Patch::Apply(patch) => strategic::merge(&mut patched, patch),
        }
        check_type(target, &patched)?;
        if meta::text(&patched, "name") != target.name {
            return Err(ApiError::BadRequest(
                "the name of the object cannot be changed by a patch".into(),
            ));
        }
        Ok((patched, Origin::Sent))
    })
    .await
}

async fn server_side_apply(
    app: &App,
    target: &Target,
    config: &Value,
    parameters: &Parameters,
) -> Result<Written, ApiError> {
    let resource = &target.resource;
    if !parameters.manager_is_explicit {
        let options = Subject {
            group: "meta.k8s.io".into(),
            kind: "PatchOptions".into(),
            ..Subject::default()
        };
        let missing = Cause::required("fieldManager", "is required for apply patch");
        return Err(ApiError::Invalid(options, vec![missing]));
    }
    let mut config = config.clone();
    check_type(target, &config)?;
    settle_namespace(target, &mut config)?;
    let sent = config["metadata"]["managedFields"]
        .as_array()
        .is_some_and(|list| !list.is_empty());
    if sent {
        return Err(ApiError::BadRequest("metadata.managedFields must be nil".into()));
    }
    let name = meta::text(&config, "name");
    if !name.is_empty() && name != target.name {
        let text = format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            target.name
        );
        return Err(ApiError::BadRequest(text));
    }
    meta::set(&mut config, "name", json!(target.name));
    let unknown = prune::prune(&resource.schema, &mut config.clone());
    if let Some(first) = unknown.first() {
        let place = target.namespace.clone().unwrap_or_default();
        let text = format!(
            "failed to create typed patch object ({place}/{}; {}, Kind={}): .{first}: field not declared in schema",
            target.name,
            resource.api_version(),
            resource.kind
        );
        return Err(ApiError::BadRequest(text));
    }
    default::drop_nulls(&resource.schema, &mut config);
    for _ in 0..PATCH_ATTEMPTS {
        let exists = app.store.latest(&target.key()).is_some();
        let writer = writer(target, parameters, &meta::now());
        let outcome = if exists {
            modify(app, target, parameters, |live| {
                let Some(live) = live else {
                    return Err(target.not_found());
                };
                let uid = meta::text(&config, "uid");
                if !uid.is_empty() && uid != meta::text(live, "uid") {
                    return Err(ApiError::Conflict(
                        resource.subject(&target.name),
                        "uid mismatch: the provided object does not have the uid of the existing object".into(),
                    ));
                }
                let mut applied = apply::apply(
                    &resource.schema,
                    resource.has_status,
                    Some(live),
                    &config,
                    &writer,
                    parameters.force,
                )?;
                let wanted = config["metadata"]
                    .get("resourceVersion")
                    .cloned()
                    .unwrap_or(Value::Null);
                meta::set(&mut applied, "resourceVersion", wanted);
                Ok((applied, Origin::Applied))
            })
            .await
        } else if target.subresource.is_empty() {
            if !meta::text(&config, "resourceVersion").is_empty() || !meta::text(&config, "uid").is_empty() {
                return Err(target.modified());
            }
            let created = apply::apply(
                &resource.schema,
                resource.has_status,
                None,
                &config,
                &writer,
                parameters.force,
            )?;
            insert(app, target, created, parameters, Origin::Applied).await
        } else {
            Err(target.not_found())
        };
        match outcome {
            // Created or deleted by somebody else in between.
            Err(ApiError::AlreadyExists(_)) if !exists => {}
            Err(ApiError::NotFound(_)) if exists && target.subresource.is_empty() => {}
            other => return other,
        }
    }
    Err(target.modified())
}

/// Who has written `managedFields`.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Origin {
    Sent,
    Applied,
}

/// Reads, lets `change` make the new object, and writes it against the version read; a lost race starts again unless
/// the client named a version.
pub(crate) async fn modify(
    app: &App,
    target: &Target,
    parameters: &Parameters,
    change: impl Fn(Option<&Value>) -> Result<(Value, Origin), ApiError>,
) -> Result<Written, ApiError> {
    let (resource, key) = (&target.resource, target.key());
    for _ in 0..PATCH_ATTEMPTS {
        let found = app.store.latest(&key);
        let live = found.as_ref().map(|object| presented(resource, object));
        let (new, origin) = change(live.as_ref())?;
        let (Some(found), Some(live)) = (found, live) else {
            return Err(target.not_found());
        };
        let wanted = meta::text(&new, "resourceVersion").to_owned();
        // A patch carries the live version along; only another one is a condition.
        if !wanted.is_empty() && wanted != found.revision.to_string() {
            return Err(target.modified());
        }
        let uid = meta::text(&new, "uid");
        if !uid.is_empty() && uid != meta::text(&live, "uid") {
            let text = format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                meta::text(&live, "uid")
            );
            return Err(ApiError::Conflict(resource.subject(&target.name), text));
        }
        let (object, warnings) = revise(target, new, &live, parameters, origin)?;
        if same_but_stamps(&object, &live) {
            return Ok(Written {
                object: live,
                warnings,
                created: false,
            });
        }
        if parameters.dry_run {
            return Ok(Written {
                object,
                warnings,
                created: false,
            });
        }
        let ends = meta::is_deleting(&object) && meta::finalizers(&object).is_empty() && !app.keeps(resource, &object);
        let stored = to_stored(resource, object);
        let step = if ends {
            Change::Delete(stored)
        } else {
            Change::Put(stored)
        };
        match app
            .store
            .write(key.clone(), Expect::Revision(found.revision), step)
            .await
        {
            Ok(written) => {
                app.after_write(resource);
                return Ok(Written {
                    object: presented(resource, &written),
                    warnings,
                    created: false,
                });
            }
            Err(WriteError::Changed) => {}
            Err(error) => return Err(target.write_error(error)),
        }
    }
    Err(target.modified())
}

/// For the server's own objects: created unless there.
pub(crate) async fn ensure(app: &App, target: Target, object: Value) -> Result<(), ApiError> {
    let parameters = Parameters::internal("far-devapi");
    match create(app, &target, object, &parameters).await {
        Ok(_) | Err(ApiError::AlreadyExists(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(crate) fn live(app: &App, target: &Target) -> Result<(Arc<crate::store::Object>, Value), ApiError> {
    let found = app.store.latest(&target.key()).ok_or_else(|| target.not_found())?;
    let value = present(&target.resource, found.value());
    Ok((found, value))
}
