//! Follows FarNodes: feeds placement, and keeps one link per blade with an endpoint.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use far_api::FarNode;
use futures::{StreamExt, pin_mut};
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher::Event},
};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    links::Links,
    registry::{self, Registry},
    watching,
    world::World,
};

pub(crate) struct Nodes {
    pub(crate) client: Client,
    pub(crate) world: Arc<World>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) links: Links,
    /// Cancelled once the list of blades is complete: only then agents are placed.
    pub(crate) known: CancellationToken,
}

impl Nodes {
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let stream = watching::watch(Api::<FarNode>::all(self.client.clone())).backoff(Backoff::default());
        pin_mut!(stream);
        let mut open: HashMap<String, (String, CancellationToken)> = HashMap::new();
        // Who writes down that a blade is emptied, or no more.
        let mut telling: HashMap<String, AbortHandle> = HashMap::new();
        let mut tasks = JoinSet::new();
        let mut listed = HashSet::new();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => break,
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended && !error.is_cancelled() {
                        tracing::error!(%error, "a blade's link failed");
                    }
                    continue;
                }
                event = stream.next() => event,
            };
            match event {
                Some(Ok(Event::Init)) => listed.clear(),
                Some(Ok(Event::InitApply(node))) => {
                    listed.insert(node.name_any());
                    self.apply(&node, &mut open, &mut telling, &mut tasks);
                }
                Some(Ok(Event::InitDone)) => {
                    let gone: Vec<String> = open.keys().filter(|name| !listed.contains(*name)).cloned().collect();
                    gone.iter().for_each(|name| self.delete(name, &mut open));
                    self.known.cancel();
                }
                Some(Ok(Event::Apply(node))) => self.apply(&node, &mut open, &mut telling, &mut tasks),
                Some(Ok(Event::Delete(node))) => self.delete(&node.name_any(), &mut open),
                Some(Err(error)) => tracing::warn!(%error, "watching blades failed: trying again"),
                None => break,
            }
        }
        open.values().for_each(|(_, stop)| stop.cancel());
        telling.values().for_each(AbortHandle::abort);
        while tasks.join_next().await.is_some() {}
    }

    fn apply(
        &self,
        node: &FarNode,
        open: &mut HashMap<String, (String, CancellationToken)>,
        telling: &mut HashMap<String, AbortHandle>,
        tasks: &mut JoinSet<()>,
    ) {
        let name = node.name_any();
        self.registry.expect(node);
        self.world.observe_node(node);
        if registry::untold_drain(node).is_some() {
            let (client, blade) = (self.client.clone(), name.clone());
            let told = tasks.spawn(async move {
                let mut backoff = Backoff::default();
                while let Err(error) = registry::tell_drain(&client, &blade).await {
                    tracing::warn!(blade, %error, "that the blade is emptied, or no more, was not written down: trying again");
                    tokio::time::sleep(backoff.after_failure()).await;
                }
            });
            telling.retain(|_, told| !told.is_finished());
            // One at a time, and the newest: it reads what the one before may have missed.
            if let Some(before) = telling.insert(name.clone(), told) {
                before.abort();
            }
        }
        let endpoint = node
            .status
            .as_ref()
            .and_then(|status| status.endpoint.clone())
            .unwrap_or_default();
        if open.get(&name).is_some_and(|(current, _)| *current == endpoint) {
            return;
        }
        let stop = CancellationToken::new();
        if let Some((_, before)) = open.insert(name.clone(), (endpoint.clone(), stop.clone())) {
            before.cancel();
        }
        if !endpoint.is_empty() {
            tasks.spawn(self.links.clone().run(name, endpoint, stop));
        }
    }

    fn delete(&self, name: &str, open: &mut HashMap<String, (String, CancellationToken)>) {
        if let Some((_, stop)) = open.remove(name) {
            stop.cancel();
        }
        self.registry.forget(name);
        self.world.forget_node(name);
    }
}
