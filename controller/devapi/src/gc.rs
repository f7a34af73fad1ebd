//! Background work: dependents of deleted owners, contents of terminating namespaces and CRDs, old events.
//!
//! The collector follows all collections by cursor, like a watcher, and keeps two small indexes: which uids live, and
//! which objects name a uid as owner. A deletion then costs what depends on it, not a scan.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::api::builtin::{CRD_STORAGE, EVENT_STORAGE, NAMESPACE_STORAGE};
use crate::api::crd::CLEANUP_FINALIZER;
use crate::app::{App, instances};
use crate::error::ApiError;
use crate::handlers::Target;
use crate::handlers::delete::{FOREGROUND, ORPHAN, Options, delete};
use crate::handlers::write::{Origin, modify};
use crate::meta;
use crate::request::Parameters;
use crate::store::{EventKind, Key, Object};

/// Events are dropped this long after they were last seen, as on the real server.
const EVENT_LIFETIME: Duration = Duration::from_secs(3600);
/// Sweep of old events, and a safety net over everything else.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
const EVENTS_PER_READ: usize = 1024;
/// A terminating namespace is gone through at most so often: each pass looks at all that is left in it.
const FINISH_EVERY: Duration = Duration::from_millis(50);

#[derive(Deserialize)]
struct Light {
    metadata: LightMeta,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct LightMeta {
    uid: String,
    owner_references: Vec<Owner>,
    deletion_timestamp: Option<String>,
    finalizers: Vec<String>,
}

#[derive(Deserialize, Clone, Default)]
#[serde(rename_all = "camelCase", default)]
struct Owner {
    api_version: String,
    kind: String,
    name: String,
    uid: String,
    block_owner_deletion: bool,
}

#[derive(Default)]
struct Collector {
    cursors: HashMap<String, u64>,
    living: HashMap<String, Key>,
    /// uid of an owner → its dependents.
    dependents: HashMap<String, HashSet<Key>>,
    owners: HashMap<Key, Vec<Owner>>,
    uids: HashMap<Key, String>,
    /// Deleting objects that wait for the collector.
    pending: HashSet<Key>,
}

pub(crate) async fn run(app: Arc<App>) {
    let mut collector = Collector::default();
    let mut committed = app.store.subscribe();
    let (mut next_sweep, mut next_finish) = (Instant::now(), Instant::now());
    loop {
        committed.borrow_and_update();
        let mut work = collector.follow(&app);
        if Instant::now() >= next_sweep {
            next_sweep = Instant::now() + SWEEP_EVERY;
            expire_events(&app).await;
            work.extend(collector.orphans());
        }
        for key in work {
            collector.collect(&app, &key).await;
        }
        if Instant::now() >= next_finish {
            let pending: Vec<Key> = collector.pending.iter().cloned().collect();
            for key in pending {
                collector.finish(&app, &key).await;
            }
            next_finish = Instant::now() + FINISH_EVERY;
        }
        let wake = if collector.pending.is_empty() {
            next_sweep
        } else {
            next_sweep.min(next_finish)
        };
        tokio::select! {
            () = app.stopping.cancelled() => return,
            changed = committed.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(wake) => {}
        }
    }
}

impl Collector {
    /// Takes in what happened since the last time; returns objects that may have lost their owners.
    fn follow(&mut self, app: &App) -> Vec<Key> {
        let mut suspects = Vec::new();
        let mut collections = app.store.resources();
        collections.extend(
            self.cursors
                .keys()
                .filter(|name| !collections.contains(name))
                .cloned()
                .collect::<Vec<_>>(),
        );
        for collection in collections {
            loop {
                let Some(&cursor) = self.cursors.get(&collection) else {
                    self.load(app, &collection, &mut suspects);
                    break;
                };
                let Ok((events, reached)) = app.store.events(&collection, cursor, EVENTS_PER_READ) else {
                    self.load(app, &collection, &mut suspects);
                    break;
                };
                for event in &events {
                    match event.kind {
                        EventKind::Deleted => self.forget(&event.object.key, &mut suspects),
                        EventKind::Added | EventKind::Modified => self.learn(&event.object, &mut suspects),
                    }
                }
                self.cursors.insert(collection.clone(), reached);
                if events.len() < EVENTS_PER_READ {
                    break;
                }
            }
        }
        suspects
    }

    fn load(&mut self, app: &App, collection: &str, suspects: &mut Vec<Key>) {
        let (revision, objects) = app.store.list(collection, None);
        let present: HashSet<&Key> = objects.iter().map(|object| &object.key).collect();
        let known = self
            .uids
            .keys()
            .filter(|key| key.resource == collection && !present.contains(key));
        for key in known.cloned().collect::<Vec<_>>() {
            self.forget(&key, suspects);
        }
        for object in &objects {
            self.learn(object, suspects);
        }
        self.cursors.insert(collection.to_owned(), revision);
    }

    fn learn(&mut self, object: &Object, suspects: &mut Vec<Key>) {
        let Ok(Light { metadata }) = serde_json::from_slice::<Light>(&object.json) else {
            return;
        };
        let key = &object.key;
        if self.uids.get(key).is_some_and(|known| *known != metadata.uid) {
            self.forget(key, suspects);
        }
        self.living.insert(metadata.uid.clone(), key.clone());
        self.uids.insert(key.clone(), metadata.uid);
        self.disown(key);
        if !metadata.owner_references.is_empty() {
            for owner in &metadata.owner_references {
                self.dependents
                    .entry(owner.uid.clone())
                    .or_default()
                    .insert(key.clone());
            }
            self.owners.insert(key.clone(), metadata.owner_references);
            suspects.push(key.clone());
        }
        let ours = |finalizer: &String| matches!(finalizer.as_str(), ORPHAN | FOREGROUND | CLEANUP_FINALIZER);
        let waits = key.resource == NAMESPACE_STORAGE || metadata.finalizers.iter().any(ours);
        if metadata.deletion_timestamp.is_some() && waits {
            self.pending.insert(key.clone());
        }
    }

    fn disown(&mut self, key: &Key) {
        for owner in self.owners.remove(key).unwrap_or_default() {
            if let Some(dependents) = self.dependents.get_mut(&owner.uid) {
                dependents.remove(key);
                if dependents.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
    }

    fn forget(&mut self, key: &Key, suspects: &mut Vec<Key>) {
        self.pending.remove(key);
        self.disown(key);
        if let Some(uid) = self.uids.remove(key) {
            self.living.remove(&uid);
            suspects.extend(self.dependents.get(&uid).into_iter().flatten().cloned());
        }
    }

    /// Everything whose owners should be looked at again.
    fn orphans(&self) -> Vec<Key> {
        self.owners.keys().cloned().collect()
    }

    /// Deletes an object when none of its owners lives. The index may lag behind for an owner that is newer than the
    /// last read of its collection, so each is looked up in the store before anything is deleted.
    async fn collect(&mut self, app: &App, key: &Key) {
        let Some(owners) = self.owners.get(key) else { return };
        let lives = |owner: &Owner| self.living.contains_key(&owner.uid) || may_live(app, key, owner);
        if owners.is_empty() || owners.iter().any(lives) {
            return;
        }
        remove(app, key).await;
    }

    /// Moves a deleting object on: contents first, then its finalizer.
    async fn finish(&mut self, app: &App, key: &Key) {
        let Some(object) = app
            .store
            .latest(key)
            .map(|object| object.value())
            .filter(meta::is_deleting)
        else {
            self.pending.remove(key);
            return;
        };
        match key.resource.as_str() {
            NAMESPACE_STORAGE => {
                for collection in app.store.resources() {
                    for inner in app.store.list(&collection, Some(&key.name)).1 {
                        remove(app, &inner.key).await;
                    }
                }
                if app.store.namespace_is_empty(&key.name) {
                    remove(app, key).await;
                }
            }
            CRD_STORAGE => {
                let contents = app.store.list(&instances(&object), None).1;
                for inner in &contents {
                    remove(app, &inner.key).await;
                }
                if !app.has_instances(&object) {
                    drop_finalizer(app, key, CLEANUP_FINALIZER).await;
                }
            }
            _ => self.propagate(app, key, &object).await,
        }
    }

    async fn propagate(&mut self, app: &App, key: &Key, object: &Value) {
        let uid = meta::text(object, "uid");
        let dependents: Vec<Key> = self.dependents.get(uid).into_iter().flatten().cloned().collect();
        if meta::finalizers(object).contains(&ORPHAN) {
            for dependent in &dependents {
                drop_owner(app, dependent, uid).await;
            }
            drop_finalizer(app, key, ORPHAN).await;
        }
        if meta::finalizers(object).contains(&FOREGROUND) {
            let mut blocked = false;
            for dependent in &dependents {
                remove(app, dependent).await;
                let blocks = self
                    .owners
                    .get(dependent)
                    .is_some_and(|owners| owners.iter().any(|o| o.uid == uid && o.block_owner_deletion));
                blocked |= blocks && app.store.latest(dependent).is_some();
            }
            if !blocked {
                drop_finalizer(app, key, FOREGROUND).await;
            }
        }
    }
}

/// Whether the owner is in the store, or of a kind that is not served (then nothing can be said).
fn may_live(app: &App, dependent: &Key, owner: &Owner) -> bool {
    let (group, _) = owner.api_version.split_once('/').unwrap_or(("", ""));
    let snapshot = app.registry.snapshot();
    let Some(resource) = snapshot
        .resources
        .iter()
        .find(|r| r.group == group && r.kind == owner.kind)
    else {
        return true;
    };
    let namespace = if resource.namespaced {
        dependent.namespace.clone()
    } else {
        String::new()
    };
    let key = Key {
        resource: resource.storage.clone(),
        namespace,
        name: owner.name.clone(),
    };
    app.store
        .latest(&key)
        .is_some_and(|found| meta::text(&found.value(), "uid") == owner.uid)
}

fn target(app: &App, key: &Key) -> Option<Target> {
    let snapshot = app.registry.snapshot();
    let resource = snapshot.by_storage(&key.resource)?.clone();
    let namespace = resource.namespaced.then(|| key.namespace.clone());
    Some(Target {
        resource,
        namespace,
        name: key.name.clone(),
        subresource: String::new(),
    })
}

async fn remove(app: &App, key: &Key) {
    let Some(target) = target(app, key) else { return };
    report(key, delete(app, &target, &Options::default()).await.map(|_| ()));
}

async fn drop_finalizer(app: &App, key: &Key, finalizer: &str) {
    edit(app, key, |object| {
        let left: Vec<_> = meta::finalizers(object)
            .into_iter()
            .filter(|have| *have != finalizer)
            .map(str::to_owned)
            .collect();
        meta::set(object, "finalizers", json!(left));
    })
    .await;
}

async fn drop_owner(app: &App, key: &Key, uid: &str) {
    edit(app, key, |object| {
        if let Some(owners) = object["metadata"]["ownerReferences"].as_array_mut() {
            owners.retain(|owner| owner["uid"] != uid);
        }
    })
    .await;
}

async fn edit(app: &App, key: &Key, change: impl Fn(&mut Value)) {
    let Some(target) = target(app, key) else { return };
    let parameters = Parameters::internal("far-devapi");
    let outcome = modify(app, &target, &parameters, |live| {
        let mut object = live.ok_or_else(|| target.not_found())?.clone();
        change(&mut object);
        Ok((object, Origin::Sent))
    });
    report(key, outcome.await.map(|_| ()));
}

fn report(key: &Key, outcome: Result<(), ApiError>) {
    match outcome {
        Ok(()) | Err(ApiError::NotFound(_) | ApiError::Conflict(..)) => {}
        Err(error) => {
            tracing::warn!(resource = %key.resource, name = %key.name, %error, "collecting an object failed; it is tried again")
        }
    }
}

async fn expire_events(app: &App) {
    let oldest = meta::stamp(time::OffsetDateTime::now_utc() - EVENT_LIFETIME);
    for object in app.store.list(EVENT_STORAGE, None).1 {
        let event = object.value();
        let seen = [
            &event["series"]["lastObservedTime"],
            &event["lastTimestamp"],
            &event["eventTime"],
        ];
        let last = seen
            .into_iter()
            .filter_map(Value::as_str)
            .max()
            .unwrap_or(meta::text(&event, "creationTimestamp"));
        // RFC 3339 in UTC with the same width up to the seconds sorts as text.
        if last.get(..19) < oldest.get(..19) {
            remove(app, &object.key).await;
        }
    }
}
