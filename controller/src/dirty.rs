//! Agents to look at again: a set, so that it never holds more than there are agents, however often one is marked.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use far_api::FarAgent;
use futures::{Stream, StreamExt, stream};
use kube::runtime::reflector::ObjectRef;
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(crate) struct Dirty {
    marked: Mutex<HashSet<ObjectRef<FarAgent>>>,
    more: Notify,
}

impl Dirty {
    pub(crate) fn mark(&self, agent: ObjectRef<FarAgent>) {
        self.marked.lock().unwrap_or_else(PoisonError::into_inner).insert(agent);
        self.more.notify_one();
    }

    /// Every marked agent, without end. One reader.
    pub(crate) fn stream(self: Arc<Self>) -> impl Stream<Item = ObjectRef<FarAgent>> + Send + 'static {
        stream::unfold(self, |dirty| async move {
            loop {
                let taken = std::mem::take(&mut *dirty.marked.lock().unwrap_or_else(PoisonError::into_inner));
                if !taken.is_empty() {
                    return Some((stream::iter(taken), dirty));
                }
                dirty.more.notified().await;
            }
        })
        .flatten()
    }
}
