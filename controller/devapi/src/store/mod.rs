//! Objects in memory, each write fsynced before it is acknowledged, and a bounded history for watches.
//!
//! A write is *pending* (checked against the newest state, given its resource version), then *committed* (on disk),
//! then visible to readers and watchers. The writer thread commits everything that waits in one transaction, so many
//! writers share one fsync. Readers never see what a crash could take back.

mod disk;
mod history;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::{oneshot, watch};

pub(crate) use disk::StoreError;
use disk::{Disk, DiskChange};
use history::History;
pub(crate) use history::{Event, EventKind};

/// Writes that may wait for the disk at once; more are refused with 429.
const MAX_PENDING: usize = 4096;
/// Paged lists whose rest is remembered; an older page's token then answers 410.
const MAX_SNAPSHOTS: usize = 64;
/// As long as a real server keeps old versions.
const SNAPSHOT_LIFETIME: Duration = Duration::from_secs(300);

/// Where an object lives. `resource` is the storage name, for example `tiffany.dev/faragents`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub resource: String,
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    pub name: String,
}

/// One stored object at one resource version, as the JSON that is sent to clients.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub key: Key,
    pub revision: u64,
    pub json: Bytes,
}

impl Object {
    pub(crate) fn value(&self) -> Value {
        serde_json::from_slice(&self.json).expect("the store holds only what it serialised itself")
    }
}

/// What the writer believes is stored; the write fails when it is not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Expect {
    Absent,
    Revision(u64),
}

#[derive(Debug)]
pub(crate) enum Change {
    Put(Value),
    /// The object's last state, as watchers see it.
    Delete(Value),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("the object exists already")]
    Exists,
    #[error("the object changed since it was read")]
    Changed,
    #[error("more than {MAX_PENDING} writes wait for the disk")]
    Overloaded,
    #[error("the store cannot write any more: {0}; free disk space and restart")]
    Failed(String),
}

/// Why a watch cannot go on from a resource version.
#[derive(Debug, PartialEq)]
pub(crate) struct TooOld {
    pub requested: u64,
    pub oldest: u64,
}

#[derive(Default)]
struct Collection {
    objects: BTreeMap<(String, String), Arc<Object>>,
    history: History,
}

/// The rest of a paged list.
struct Snapshot {
    id: u64,
    made: Instant,
    rest: Arc<Vec<Arc<Object>>>,
}

/// Comes when the write is on disk.
type Acknowledgement = oneshot::Receiver<Result<(), WriteError>>;

struct Pending {
    object: Arc<Object>,
    kind: EventKind,
    done: oneshot::Sender<Result<(), WriteError>>,
}

struct State {
    /// Last resource version given out, and the last one that is committed.
    assigned: u64,
    committed: u64,
    /// Where this process began: history before it is gone.
    opened_at: u64,
    /// Newest pending state by key; `None` is a pending deletion.
    overlay: HashMap<Key, (u64, Option<Arc<Object>>)>,
    queue: VecDeque<Pending>,
    collections: HashMap<String, Collection>,
    snapshots: VecDeque<Snapshot>,
    next_snapshot: u64,
    failed: Option<String>,
    closing: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Committed resource version: wakes watchers.
    committed: watch::Sender<u64>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while holding the lock leaves the maps whole: each is changed in one step.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

pub(crate) struct Store {
    shared: Arc<Shared>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let disk = Disk::open(path)?;
        let loaded = disk.load()?;
        let mut collections: HashMap<String, Collection> = HashMap::new();
        for object in loaded.objects {
            let collection = collections.entry(object.key.resource.clone()).or_default();
            let slot = (object.key.namespace.clone(), object.key.name.clone());
            collection.objects.insert(slot, Arc::new(object));
        }
        let revision = loaded.revision.max(1);
        for collection in collections.values_mut() {
            collection.history = History::starting_at(revision);
        }
        let state = State {
            assigned: revision,
            committed: revision,
            opened_at: revision,
            overlay: HashMap::new(),
            queue: VecDeque::new(),
            collections,
            snapshots: VecDeque::new(),
            next_snapshot: 1,
            failed: None,
            closing: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            work: Condvar::new(),
            committed: watch::channel(revision).0,
        });
        let writer = std::thread::Builder::new()
            .name("devapi-store".into())
            .spawn({
                let shared = shared.clone();
                move || write_loop(&shared, &disk)
            })
            .map_err(StoreError::Thread)?;
        Ok(Self {
            shared,
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Newest state including writes that are not on disk yet: what a read-modify-write starts from.
    pub(crate) fn latest(&self, key: &Key) -> Option<Arc<Object>> {
        self.shared.lock().latest(key)
    }

    /// Committed state: what readers see.
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Object>> {
        let state = self.shared.lock();
        let collection = state.collections.get(&key.resource)?;
        collection
            .objects
            .get(&(key.namespace.clone(), key.name.clone()))
            .cloned()
    }

    /// All committed objects of a resource, in one namespace or all, with the resource version of this moment.
    pub(crate) fn list(&self, resource: &str, namespace: Option<&str>) -> (u64, Vec<Arc<Object>>) {
        let state = self.shared.lock();
        let Some(collection) = state.collections.get(resource) else {
            return (state.committed, Vec::new());
        };
        let objects = match namespace {
            None => collection.objects.values().cloned().collect(),
            Some(namespace) => collection
                .objects
                .range((namespace.to_owned(), String::new())..)
                .take_while(|((ns, _), _)| ns == namespace)
                .map(|(_, object)| object.clone())
                .collect(),
        };
        (state.committed, objects)
    }

    pub(crate) fn revision(&self) -> u64 {
        self.shared.lock().committed
    }

    /// Names of all storage collections that hold objects.
    pub(crate) fn resources(&self) -> Vec<String> {
        let state = self.shared.lock();
        state
            .collections
            .iter()
            .filter(|(_, c)| !c.objects.is_empty())
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Checks `expect`, writes, and returns once the change is on disk and visible. `metadata.resourceVersion` is set here.
    pub(crate) async fn write(&self, key: Key, expect: Expect, change: Change) -> Result<Arc<Object>, WriteError> {
        let (object, done) = self.enqueue(key, expect, change)?;
        done.await
            .unwrap_or_else(|_| Err(WriteError::Failed("the store was closed".into())))?;
        Ok(object)
    }

    fn enqueue(&self, key: Key, expect: Expect, change: Change) -> Result<(Arc<Object>, Acknowledgement), WriteError> {
        let mut state = self.shared.lock();
        if let Some(cause) = &state.failed {
            return Err(WriteError::Failed(cause.clone()));
        }
        if state.closing {
            return Err(WriteError::Failed("the server is stopping".into()));
        }
        if state.queue.len() >= MAX_PENDING {
            return Err(WriteError::Overloaded);
        }
        match (expect, state.latest(&key)) {
            (Expect::Absent, Some(_)) => return Err(WriteError::Exists),
            (Expect::Revision(want), Some(found)) if found.revision == want => {}
            (Expect::Revision(_), _) => return Err(WriteError::Changed),
            (Expect::Absent, None) => {}
        }
        let revision = state.assigned + 1;
        let (mut value, kind) = match (change, expect) {
            (Change::Put(value), Expect::Absent) => (value, EventKind::Added),
            (Change::Put(value), Expect::Revision(_)) => (value, EventKind::Modified),
            (Change::Delete(value), _) => (value, EventKind::Deleted),
        };
        value["metadata"]["resourceVersion"] = Value::String(revision.to_string());
        let json = serde_json::to_vec(&value)
            .expect("a JSON value always serialises")
            .into();
        let object = Arc::new(Object {
            key: key.clone(),
            revision,
            json,
        });
        let visible = (kind != EventKind::Deleted).then(|| object.clone());
        state.assigned = revision;
        state.overlay.insert(key, (revision, visible));
        let (done, receiver) = oneshot::channel();
        state.queue.push_back(Pending {
            object: object.clone(),
            kind,
            done,
        });
        drop(state);
        self.shared.work.notify_one();
        Ok((object, receiver))
    }

    /// Whether any object is in the namespace, pending writes included.
    pub(crate) fn namespace_is_empty(&self, namespace: &str) -> bool {
        let state = self.shared.lock();
        let committed = state.collections.values().any(|collection| {
            let mut from = collection.objects.range((namespace.to_owned(), String::new())..);
            from.next().is_some_and(|((found, _), _)| found == namespace)
        });
        !committed
            && !state
                .overlay
                .iter()
                .any(|(key, (_, object))| key.namespace == namespace && object.is_some())
    }

    /// Wakes when something was committed.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.committed.subscribe()
    }

    /// Events of a resource after `after`, at most `limit`, and the resource version they reach.
    pub(crate) fn events(&self, resource: &str, after: u64, limit: usize) -> Result<(Vec<Arc<Event>>, u64), TooOld> {
        let state = self.shared.lock();
        match state.collections.get(resource) {
            Some(collection) => collection.history.after(after, limit, state.committed),
            None if after < state.opened_at => Err(TooOld {
                requested: after,
                oldest: state.opened_at,
            }),
            None => Ok((Vec::new(), state.committed.max(after))),
        }
    }

    /// Remembers the rest of a paged list; the oldest is forgotten when there are too many.
    pub(crate) fn keep_snapshot(&self, rest: Arc<Vec<Arc<Object>>>) -> u64 {
        let mut state = self.shared.lock();
        let id = state.next_snapshot;
        state.next_snapshot += 1;
        state
            .snapshots
            .retain(|snapshot| snapshot.made.elapsed() < SNAPSHOT_LIFETIME);
        if state.snapshots.len() >= MAX_SNAPSHOTS {
            state.snapshots.pop_front();
        }
        state.snapshots.push_back(Snapshot {
            id,
            made: Instant::now(),
            rest,
        });
        id
    }

    pub(crate) fn snapshot(&self, id: u64) -> Option<Arc<Vec<Arc<Object>>>> {
        let state = self.shared.lock();
        let found = state.snapshots.iter().find(|snapshot| snapshot.id == id);
        found
            .filter(|snapshot| snapshot.made.elapsed() < SNAPSHOT_LIFETIME)
            .map(|snapshot| snapshot.rest.clone())
    }

    pub(crate) fn forget_snapshots(&self) {
        self.shared.lock().snapshots.clear();
    }

    /// Commits what waits, then ends the writer. Later writes fail.
    pub(crate) fn close(&self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        if let Some(writer) = writer
            && writer.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    fn latest(&self, key: &Key) -> Option<Arc<Object>> {
        if let Some((_, object)) = self.overlay.get(key) {
            return object.clone();
        }
        let collection = self.collections.get(&key.resource)?;
        collection
            .objects
            .get(&(key.namespace.clone(), key.name.clone()))
            .cloned()
    }

    /// Makes a committed change visible to readers and watchers.
    fn publish(&mut self, object: &Arc<Object>, kind: EventKind) {
        let start = self.opened_at;
        let collection = self
            .collections
            .entry(object.key.resource.clone())
            .or_insert_with(|| Collection {
                history: History::starting_at(start),
                ..Collection::default()
            });
        let slot = (object.key.namespace.clone(), object.key.name.clone());
        let previous = match kind {
            EventKind::Deleted => collection.objects.remove(&slot),
            EventKind::Added | EventKind::Modified => collection.objects.insert(slot, object.clone()),
        };
        collection.history.push(Event {
            kind,
            object: object.clone(),
            previous,
        });
        self.committed = object.revision;
        if self
            .overlay
            .get(&object.key)
            .is_some_and(|(revision, _)| *revision == object.revision)
        {
            self.overlay.remove(&object.key);
        }
    }
}

fn write_loop(shared: &Shared, disk: &Disk) {
    loop {
        let batch: Vec<Pending> = {
            let mut state = shared.lock();
            while state.queue.is_empty() && !state.closing {
                state = shared
                    .work
                    .wait(state)
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            if state.queue.is_empty() {
                return;
            }
            state.queue.drain(..).collect()
        };
        let changes = batch.iter().map(|pending| match pending.kind {
            EventKind::Deleted => DiskChange::Remove(&pending.object),
            EventKind::Added | EventKind::Modified => DiskChange::Put(&pending.object),
        });
        let outcome = disk.commit(changes);
        let mut state = shared.lock();
        match outcome {
            Ok(()) => {
                for pending in &batch {
                    state.publish(&pending.object, pending.kind);
                }
                let committed = state.committed;
                drop(state);
                shared.committed.send_replace(committed);
                for pending in batch {
                    let _ = pending.done.send(Ok(())); // The request may be gone; the write stands.
                }
            }
            Err(error) => {
                tracing::error!(%error, "writing the store failed; no further write is accepted");
                let cause = error.to_string();
                state.failed = Some(cause.clone());
                let waiting: Vec<Pending> = state.queue.drain(..).collect();
                state.overlay.clear();
                drop(state);
                for pending in batch.into_iter().chain(waiting) {
                    let _ = pending.done.send(Err(WriteError::Failed(cause.clone())));
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn key(name: &str) -> Key {
        Key {
            resource: "things".into(),
            namespace: "default".into(),
            name: name.into(),
        }
    }
    fn thing(name: &str) -> Value {
        json!({"metadata": {"name": name}})
    }

    #[tokio::test]
    async fn what_was_acknowledged_is_there_after_reopening_and_versions_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store.redb");
        let store = Store::open(&path).unwrap();
        let first = store
            .write(key("a"), Expect::Absent, Change::Put(thing("a")))
            .await
            .unwrap();
        let second = store
            .write(key("b"), Expect::Absent, Change::Put(thing("b")))
            .await
            .unwrap();
        store
            .write(key("a"), Expect::Revision(first.revision), Change::Delete(thing("a")))
            .await
            .unwrap();
        drop(store);
        let store = Store::open(&path).unwrap();
        assert!(store.get(&key("a")).is_none());
        assert_eq!(store.get(&key("b")).unwrap().revision, second.revision);
        let third = store
            .write(key("c"), Expect::Absent, Change::Put(thing("c")))
            .await
            .unwrap();
        assert_eq!(
            third.revision,
            second.revision + 2,
            "the deletion's version is never given out again"
        );
        assert_eq!(store.events("things", 1, 10).unwrap_err().requested, 1);
    }

    #[tokio::test]
    async fn a_write_against_an_old_revision_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("s")).unwrap();
        let first = store
            .write(key("a"), Expect::Absent, Change::Put(thing("a")))
            .await
            .unwrap();
        store
            .write(key("a"), Expect::Revision(first.revision), Change::Put(thing("a")))
            .await
            .unwrap();
        let stale = store
            .write(key("a"), Expect::Revision(first.revision), Change::Put(thing("a")))
            .await;
        assert!(matches!(stale, Err(WriteError::Changed)));
        let twice = store.write(key("a"), Expect::Absent, Change::Put(thing("a"))).await;
        assert!(matches!(twice, Err(WriteError::Exists)));
    }

    #[tokio::test]
    async fn of_many_writers_with_one_revision_exactly_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&folder.path().join("s")).unwrap());
        let first = store
            .write(key("a"), Expect::Absent, Change::Put(thing("a")))
            .await
            .unwrap();
        let writers: Vec<_> = (0..50)
            .map(|_| {
                let (store, revision) = (store.clone(), first.revision);
                tokio::spawn(async move {
                    store
                        .write(key("a"), Expect::Revision(revision), Change::Put(thing("a")))
                        .await
                })
            })
            .collect();
        let mut won = 0;
        for writer in writers {
            won += usize::from(writer.await.unwrap().is_ok());
        }
        assert_eq!(won, 1);
        let (events, reached) = store.events("things", first.revision, 10).unwrap();
        assert_eq!((events.len(), reached), (1, store.revision()));
    }
}
