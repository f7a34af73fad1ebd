//! `far apply`: server-side apply of every document, with what became of each.

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::{
    args::ApplyArgs,
    cluster::{Api, Cluster},
    documents::{self, Document},
    exit::{self, Outcome},
    kinds::{self, Kind},
    output,
};

pub(crate) async fn apply(cluster: &Cluster, args: &ApplyArgs) -> anyhow::Result<Outcome> {
    // Everything is read and checked before anything is sent.
    let documents = documents::read_all(&args.filename)?;
    let api = cluster.connect().await?;
    let mut failed = 0;
    let total = documents.len();
    for document in documents {
        let what = format!("{} {}", document.kind, document.name);
        match apply_one(&api, &document, args.force_conflicts, args.dry_run).await {
            Ok((kind, name, change)) => {
                let dry = if args.dry_run { " (dry run)" } else { "" };
                output::line(&format!("{}/{name} {change}{dry}", kind.label()));
            }
            // One bad object does not keep the others from being applied.
            Err(error) => {
                output::error(&exit::chain(&error.context(format!("applying {what}"))));
                failed += 1;
            }
        }
    }
    if failed > 0 && total > 1 {
        output::note(&format!("{failed} of {total} objects were not applied"));
    }
    Ok(if failed == 0 {
        Outcome::Success
    } else {
        Outcome::Negative
    })
}

/// Applies one document; answers its kind, name and what changed.
pub(crate) async fn apply_one(
    api: &Api,
    document: &Document,
    force: bool,
    dry_run: bool,
) -> anyhow::Result<(Kind, String, &'static str)> {
    let (kind, namespace) = place(api, document).await?;
    if document.name.is_empty() {
        bail!("metadata.generateName cannot be applied, only created: give metadata.name, or use `far run`");
    }
    let path = kind.path(&namespace, &document.name);
    let before: Option<Value> = match api.get(&path).await {
        Ok(object) => Some(object),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error.into()),
    };
    let mut object = document.object.clone();
    if kind.is_namespaced {
        object["metadata"]["namespace"] = json!(namespace);
    }
    let after = api
        .apply(&path, &object, force, dry_run)
        .await
        .map_err(|error| match error {
            crate::cluster::ClusterError::Refused { code: 409, .. } => anyhow::Error::from(error)
                .context("fields belong to another manager; --force-conflicts takes them over"),
            other => other.into(),
        })?;
    let change = match before {
        None => "created",
        Some(before) if is_same(&before, &after) => "unchanged",
        Some(_) => "configured",
    };
    Ok((kind, document.name.clone(), change))
}

/// Unchanged: the API stored nothing new, and (a dry run stores nothing ever) would not.
fn is_same(before: &Value, after: &Value) -> bool {
    let content = |object: &Value| {
        let mut object = object.clone();
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        object
    };
    before["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"] && content(before) == content(after)
}

/// Kind and namespace of a document.
pub(crate) async fn place(api: &Api, document: &Document) -> anyhow::Result<(Kind, String)> {
    let kind = kinds::of_object(api, &document.api_version, &document.kind).await?;
    let namespace = match &document.namespace {
        Some(own) if api.has_named_namespace && *own != api.namespace => bail!(
            "metadata.namespace is {own}, but --namespace says {}: make them equal, or leave one out",
            api.namespace
        ),
        Some(own) => own.clone(),
        None => api.namespace.clone(),
    };
    Ok((kind, namespace))
}

/// Creates a document under its own name, or under one derived from it when that is taken.
pub(crate) async fn create_unique(api: &Api, document: &Document) -> anyhow::Result<Value> {
    let (kind, namespace) = place(api, document).await?;
    let path = kind.list_path(Some(&namespace));
    let mut object = document.object.clone();
    object["metadata"]["namespace"] = json!(namespace);
    if !document.name.is_empty() {
        match api.create(&path, &object).await {
            Err(error) if error.is_already_there() => {
                if let Some(metadata) = object["metadata"].as_object_mut() {
                    metadata.remove("name");
                    metadata.insert("generateName".into(), json!(format!("{}-", document.name)));
                }
            }
            other => return other.with_context(|| format!("creating {} {}", document.kind, document.name)),
        }
    }
    api.create(&path, &object)
        .await
        .with_context(|| format!("creating {} {}", document.kind, object["metadata"]["generateName"]))
}
