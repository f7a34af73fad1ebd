//! Watches of whole kinds into memory, pruned, with a word for each object that came, changed or went.

use std::fmt::Debug;

use futures::StreamExt;
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{self, Store},
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
        })
        .reflect(writer)
        .for_each(move |event| {
            match event {
                Ok(Event::InitApply(object) | Event::Apply(object) | Event::Delete(object)) => changed(&object),
                Ok(Event::Init | Event::InitDone) => {}
                Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "a watch failed: trying again"),
            }
            std::future::ready(())
        });
    (reader, tokio::spawn(watch))
}

/// (namespace, name).
pub(crate) fn key<K: ResourceExt>(object: &K) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}
