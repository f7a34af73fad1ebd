//! Delete and deletecollection: finalizers, preconditions and propagation.

use serde_json::{Value, json};

use super::{Target, present, presented, to_stored, write};
use crate::api::builtin::CRD_STORAGE;
use crate::api::crd::CLEANUP_FINALIZER;
use crate::app::App;
use crate::error::ApiError;
use crate::meta;
use crate::request::Parameters;
use crate::selector::Selector;
use crate::store::{Change, Expect, WriteError};

const ATTEMPTS: usize = 20;
pub(crate) const ORPHAN: &str = "orphan";
pub(crate) const FOREGROUND: &str = "foregroundDeletion";

#[derive(Debug, Default)]
pub(crate) struct Options {
    uid: Option<String>,
    revision: Option<String>,
    propagation: Option<String>,
    dry_run: bool,
}

impl Options {
    /// From the body, else the query.
    pub(crate) fn parse(body: &[u8], parameters: &Parameters) -> Result<Self, ApiError> {
        let body: Value = if body.is_empty() {
            Value::Null
        } else {
            write::decode(body)?
        };
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let propagation =
            text(&body["propagationPolicy"]).or_else(|| parameters.query.get("propagationPolicy").map(str::to_owned));
        let orphans = body["orphanDependents"] == true || parameters.query.flag("orphanDependents");
        let propagation = propagation.or_else(|| orphans.then(|| "Orphan".to_owned()));
        if let Some(other) = propagation
            .as_deref()
            .filter(|p| !matches!(*p, "Orphan" | "Background" | "Foreground"))
        {
            let allowed = "supported values: \"Background\", \"Foreground\", \"Orphan\"";
            return Err(ApiError::BadRequest(format!(
                "propagationPolicy: Unsupported value: {other:?}: {allowed}"
            )));
        }
        Ok(Self {
            uid: text(&body["preconditions"]["uid"]),
            revision: text(&body["preconditions"]["resourceVersion"]),
            propagation,
            dry_run: parameters.dry_run
                || body["dryRun"]
                    .as_array()
                    .is_some_and(|list| list.contains(&json!("All"))),
        })
    }
}

/// What became of the object.
#[derive(Debug)]
pub(crate) enum Deleted {
    Gone(Value),
    /// Finalizers hold it.
    Pending(Value),
}

impl Deleted {
    /// The answer as the real server gives it: the object while it waits, a Status once it is gone.
    pub(crate) fn answer(self, target: &Target) -> Value {
        match self {
            Self::Pending(object) => object,
            Self::Gone(object) => {
                let mut details =
                    json!({"name": target.name, "kind": target.resource.plural, "uid": object["metadata"]["uid"]});
                if !target.resource.group.is_empty() {
                    details["group"] = json!(target.resource.group);
                }
                json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
            }
        }
    }
}

pub(crate) async fn delete(app: &App, target: &Target, options: &Options) -> Result<Deleted, ApiError> {
    let resource = &target.resource;
    for _ in 0..ATTEMPTS {
        let (found, live) = write::live(app, target)?;
        let checks = [
            ("UID", &options.uid, meta::text(&live, "uid")),
            (
                "ResourceVersion",
                &options.revision,
                meta::text(&live, "resourceVersion"),
            ),
        ];
        for (what, wanted, is) in checks {
            if let Some(wanted) = wanted.as_deref().filter(|wanted| *wanted != is) {
                let text =
                    format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {is}");
                return Err(ApiError::Conflict(resource.subject(&target.name), text));
            }
        }
        let mut object = live.clone();
        add_finalizers(app, target, &mut object, options);
        let holds = !meta::finalizers(&object).is_empty() || app.keeps(resource, &object);
        if !holds {
            if options.dry_run {
                return Ok(Deleted::Gone(object));
            }
            let step = Change::Delete(to_stored(resource, object));
            match app
                .store
                .write(target.key(), Expect::Revision(found.revision), step)
                .await
            {
                Ok(gone) => {
                    app.after_write(resource);
                    return Ok(Deleted::Gone(presented(resource, &gone)));
                }
                Err(WriteError::Changed) => continue,
                Err(error) => return Err(target.write_error(error)),
            }
        }
        if !meta::is_deleting(&object) {
            meta::set(&mut object, "deletionTimestamp", json!(meta::now()));
            meta::set(&mut object, "deletionGracePeriodSeconds", json!(0));
            if let Some(generation) = live["metadata"]["generation"].as_i64() {
                meta::set(&mut object, "generation", json!(generation + 1));
            }
            crate::admission::complete(resource, &mut object, &meta::now());
        }
        if object == live || options.dry_run {
            return Ok(Deleted::Pending(object));
        }
        match app
            .store
            .write(
                target.key(),
                Expect::Revision(found.revision),
                Change::Put(to_stored(resource, object)),
            )
            .await
        {
            Ok(pending) => {
                app.after_write(resource);
                return Ok(Deleted::Pending(presented(resource, &pending)));
            }
            Err(WriteError::Changed) => {}
            Err(error) => return Err(target.write_error(error)),
        }
    }
    Err(target.modified())
}

fn add_finalizers(app: &App, target: &Target, object: &mut Value, options: &Options) {
    let mut wanted: Vec<String> = meta::finalizers(object).into_iter().map(str::to_owned).collect();
    let deleting = meta::is_deleting(object);
    let mut add = |finalizer: &str| {
        if !wanted.iter().any(|have| have == finalizer) {
            wanted.push(finalizer.to_owned());
        }
    };
    match options.propagation.as_deref() {
        Some("Orphan") if !deleting => add(ORPHAN),
        Some("Foreground") if !deleting => add(FOREGROUND),
        _ => {}
    }
    if target.resource.storage == CRD_STORAGE && !deleting && app.has_instances(object) {
        add(CLEANUP_FINALIZER);
    }
    meta::set(
        object,
        "finalizers",
        if wanted.is_empty() { Value::Null } else { json!(wanted) },
    );
}

/// Deletes what the selectors match; objects that vanish meanwhile are no fault.
pub(crate) async fn delete_collection(
    app: &App,
    target: &Target,
    parameters: &Parameters,
    options: &Options,
) -> Result<Vec<Value>, ApiError> {
    let resource = &target.resource;
    let selector = Selector::parse(
        parameters.query.get("labelSelector"),
        parameters.query.get("fieldSelector"),
        &resource.selectable,
    )?;
    let (_, objects) = app.store.list(&resource.storage, target.namespace.as_deref());
    let mut deleted = Vec::new();
    for object in objects {
        let value = present(resource, object.value());
        if !selector.matches(&value) {
            continue;
        }
        let namespace = resource.namespaced.then(|| object.key.namespace.clone());
        let one = Target {
            namespace,
            name: object.key.name.clone(),
            ..target.clone()
        };
        match delete(app, &one, options).await {
            Ok(Deleted::Gone(value) | Deleted::Pending(value)) => deleted.push(value),
            Err(ApiError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(deleted)
}
