//! Watches of whole kinds into memory, pruned, with a word for each object that came, changed or went.

use std::{fmt::Debug, pin::pin, sync::Arc};

use futures::{Stream, StreamExt};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;

use crate::backoff::Backoff;

/// Keeps every object of a kind in the answered store; the task runs until it is aborted.
pub(crate) fn keep<K>(client: Client, changed: impl Fn(&K) + Send + 'static) -> (Store<K>, JoinHandle<()>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let watch = watcher::watcher(Api::<K>::all(client), watcher::Config::default())
        .backoff(Backoff::default())
        .modify(|object| {
            // Neither is read here, and together they are most of an object's memory.
            object.meta_mut().managed_fields = None;
            object
                .annotations_mut()
                .remove("kubectl.kubernetes.io/last-applied-configuration");
        });
    (reader.clone(), tokio::spawn(follow(watch, reader, writer, changed)))
}

async fn follow<K>(
    watch: impl Stream<Item = Result<Event<K>, watcher::Error>>,
    store: Store<K>,
    writer: Writer<K>,
    changed: impl Fn(&K),
) where
    K: Resource<DynamicType = ()> + Clone,
{
    let mut events = pin!(watch.reflect(writer));
    // Known before a list began: the watch says nothing of what went while it did not run.
    let mut before: Vec<Arc<K>> = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::InitApply(object) | Event::Apply(object) | Event::Delete(object)) => changed(&object),
            Ok(Event::Init) => before = store.state(),
            Ok(Event::InitDone) => {
                let known = std::mem::take(&mut before).into_iter();
                known
                    .filter(|object| store.get(&ObjectRef::from_obj(&**object)).is_none())
                    .for_each(|object| changed(&object));
            }
            Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "a watch failed: trying again"),
        }
    }
}

/// (namespace, name).
pub(crate) fn key<K: ResourceExt>(object: &K) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    #[tokio::test]
    async fn a_word_is_said_for_what_a_later_list_does_not_have_any_more() {
        let object = |name: &str| {
            let mut object = ConfigMap::default();
            object.metadata.name = Some(name.to_owned());
            object
        };
        let events = [
            Event::Init,
            Event::InitApply(object("gone")),
            Event::InitApply(object("there")),
            Event::InitDone,
            Event::Init,
            Event::InitApply(object("there")),
            Event::InitDone,
        ];
        let (reader, writer) = reflector::store();
        let said = Mutex::new(Vec::new());
        let say = |one: &ConfigMap| said.lock().unwrap().push(one.name_any());
        follow(futures::stream::iter(events.map(Ok)), reader, writer, say).await;
        assert_eq!(*said.lock().unwrap(), ["gone", "there", "there", "gone"]);
    }
}
