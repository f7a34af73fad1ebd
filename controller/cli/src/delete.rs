//! `far delete`: deletes, then waits until the objects are gone, microVM included.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::{
    apply,
    args::DeleteArgs,
    cluster::{Api, Cluster},
    documents,
    exit::Outcome,
    get::parse_wanted,
    kinds::{self, Kind},
    output,
};

/// Pause between two looks at an object that is being deleted.
const LOOK: Duration = Duration::from_millis(200);

struct Target {
    kind: Kind,
    namespace: String,
    name: String,
}

pub(crate) async fn delete(cluster: &Cluster, args: &DeleteArgs) -> anyhow::Result<Outcome> {
    let api;
    let mut targets = Vec::new();
    if args.filename.is_empty() {
        let wanted = parse_wanted(&args.what)?;
        if let Some(one) = wanted.iter().find(|one| one.name.is_none()) {
            bail!("name what to delete: far delete {} NAME", one.kind);
        }
        api = cluster.connect().await?;
        for one in wanted {
            targets.push(Target {
                kind: kinds::find(&api, &one.kind).await?,
                namespace: api.namespace.clone(),
                name: one.name.unwrap_or_default(),
            });
        }
    } else {
        let mut documents = documents::read_all(&args.filename)?;
        // What was applied first is needed by what came after.
        documents.reverse();
        api = cluster.connect().await?;
        for document in documents {
            let (kind, namespace) = apply::place(&api, &document).await?;
            targets.push(Target {
                kind,
                namespace,
                name: document.name,
            });
        }
    }
    let mut begun = Vec::new();
    for target in targets {
        let path = target.kind.path(&target.namespace, &target.name);
        match api.delete(&path).await {
            Ok(_) => {
                output::line(&format!("{} \"{}\" deleted", target.kind.label(), target.name));
                begun.push(target);
            }
            Err(error) if error.is_not_found() && args.ignore_not_found => {}
            Err(error) => {
                return Err(error).with_context(|| format!("deleting {} {}", target.kind.label(), target.name));
            }
        }
    }
    if !args.no_wait {
        let deadline = Instant::now() + args.timeout;
        for target in &begun {
            wait_gone(&api, target, deadline, args.timeout).await?;
        }
    }
    Ok(Outcome::Success)
}

async fn wait_gone(api: &Api, target: &Target, deadline: Instant, limit: Duration) -> anyhow::Result<()> {
    let path = target.kind.path(&target.namespace, &target.name);
    let mut uid: Option<Value> = None;
    loop {
        match api.get::<Value>(&path).await {
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) if error.is_passing() => {}
            Err(error) => return Err(error.into()),
            Ok(object) => {
                let seen = object["metadata"]["uid"].clone();
                // Created again under the same name: the old one is gone.
                if uid.get_or_insert_with(|| seen.clone()) != &seen || object["metadata"]["deletionTimestamp"].is_null()
                {
                    return Ok(());
                }
                if Instant::now() > deadline {
                    bail!(
                        "{} {} is still there after {} s; its finalizers wait: {}. Look at `far describe {} {}`",
                        target.kind.label(),
                        target.name,
                        limit.as_secs(),
                        object["metadata"]["finalizers"],
                        target.kind.singular,
                        target.name
                    );
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
