//! Watches agents into the index and looks at each when something about it changed.
//!
//! A hundred thousand agents have ended and only wait to be deleted: their objects are not kept. What is kept is the row in
//! the index, and the newest objects of agents that still have something before them, a bounded number of them; a pass over
//! any other agent reads it anew.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use far_api::FarAgent;
use futures::{FutureExt as _, StreamExt, stream::FuturesUnordered};
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, reflector::ObjectRef, watcher::Event},
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    convert,
    queue::{Action, Queue},
    reconcile::{self, Context},
    watched::Watched,
    watching,
    world::{Teller, World},
};

/// Objects kept at most; about 4 KiB each.
const MAX_KEPT: usize = 4096;
/// Passes at most that wait for a turn to write, beside those that are under way.
const MAX_WAITING: usize = 4096;
/// After an object could not be read.
const RETRY: Duration = Duration::from_secs(1);

type Key = ObjectRef<FarAgent>;

/// Runs until `stop`, then ends what is under way. `known` is cancelled once every agent was listed.
pub(crate) async fn run(
    client: Client,
    world: Arc<World>,
    context: Arc<Context>,
    known: CancellationToken,
    concurrency: u16,
    stop: CancellationToken,
) {
    let mut watch = pin!(watching::watch(Api::<Watched>::all(client.clone())).backoff(Backoff::default()));
    let mut dirty = pin!(world.dirty.clone().stream());
    let mut queue = Queue::new();
    let mut kept = Kept::default();
    let mut passes = FuturesUnordered::new();
    let mut listed = HashSet::new();
    loop {
        // Who waits for a turn to write holds up nobody who waits for a blade. Looked at again when one more waits.
        let at_most = usize::from(concurrency) + context.turns.waiting().min(MAX_WAITING);
        tokio::select! {
            () = stop.cancelled() => break,
            () = context.turns.somebody_waits() => {}
            Some(event) = watch.next() => match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(Watched(agent))) => {
                    listed.extend(agent.uid());
                    see(agent, Teller::List, &world, &mut kept, &mut queue);
                }
                Ok(Event::InitDone) => {
                    world.keep_only(&listed);
                    kept.keep_only(&listed);
                    listed = HashSet::new();
                    known.cancel();
                }
                Ok(Event::Apply(Watched(agent))) => see(agent, Teller::Watch, &world, &mut kept, &mut queue),
                Ok(Event::Delete(Watched(agent))) => {
                    kept.remove(&ObjectRef::from_obj(&agent));
                    world.forget(&agent.uid().unwrap_or_default());
                }
                Err(error) => tracing::warn!(%error, "watching agents failed: trying again"),
            },
            Some(key) = dirty.next() => queue.ask(key, Duration::ZERO),
            key = queue.next(), if passes.len() < at_most => {
                let pass = pass(client.clone(), key.clone(), kept.get(&key), context.clone());
                passes.push(pass.map(move |action| (key, action)));
            }
            Some((key, (action, found))) = passes.next(), if !passes.is_empty() => {
                if !found {
                    // What is kept is of before; another may have its name.
                    kept.remove(&key);
                }
                queue.done(&key, action);
            }
        }
    }
    // What waits for its turn is left to the next leader.
    context.turns.close();
    let ends = poll_fn(|task| {
        loop {
            match passes.poll_next_unpin(task) {
                Poll::Ready(Some(_)) => {}
                Poll::Pending if passes.len() > context.turns.waiting() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => return Poll::Ready(()),
            }
        }
    });
    ends.await;
}

/// The watch tells of an agent.
fn see(agent: FarAgent, by: Teller, world: &World, kept: &mut Kept, queue: &mut Queue<Key>) {
    world.observe(&agent, by);
    let key = ObjectRef::from_obj(&agent);
    if convert::is_settled(&agent, &convert::status_from_api(agent.status.as_ref())) {
        kept.remove(&key);
    } else {
        kept.insert(key.clone(), Arc::new(agent));
        queue.ask(key, Duration::ZERO);
    }
}

/// Answers when to look again, and false where a write did not find the agent in the API.
async fn pass(client: Client, key: Key, kept: Option<Arc<FarAgent>>, context: Arc<Context>) -> (Action, bool) {
    let agent = match kept {
        Some(agent) => agent,
        None => {
            let api: Api<FarAgent> = Api::namespaced(client, key.namespace.as_deref().unwrap_or_default());
            match api.get_opt(&key.name).await {
                Ok(Some(agent)) => Arc::new(agent),
                Ok(None) => return (Action::await_change(), true),
                Err(error) => {
                    tracing::warn!(agent = %key, %error, "an agent was not read: trying again");
                    return (Action::requeue(RETRY), true);
                }
            }
        }
    };
    match reconcile::reconcile(agent.clone(), context.clone()).await {
        Ok(action) => (action, true),
        Err(error) => {
            let found = !error.is_not_found();
            (reconcile::on_error(agent, &error, context), found)
        }
    }
}

/// The newest objects, the one kept for longest given up first.
#[derive(Debug, Default)]
struct Kept {
    objects: HashMap<Key, Arc<FarAgent>>,
    /// In the order in which they came; may name some that are gone.
    order: VecDeque<Key>,
}

impl Kept {
    fn get(&self, key: &Key) -> Option<Arc<FarAgent>> {
        self.objects.get(key).cloned()
    }

    fn remove(&mut self, key: &Key) {
        self.objects.remove(key);
    }

    /// After a complete list: the watch says nothing of what went while it did not run.
    fn keep_only(&mut self, uids: &HashSet<String>) {
        let is_listed = |agent: &FarAgent| agent.uid().is_some_and(|uid| uids.contains(&uid));
        self.objects.retain(|_, agent| is_listed(agent));
    }

    fn insert(&mut self, key: Key, agent: Arc<FarAgent>) {
        if self.objects.insert(key.clone(), agent).is_some() {
            return;
        }
        self.order.push_back(key);
        while self.objects.len() > MAX_KEPT {
            let Some(oldest) = self.order.pop_front() else { break };
            self.objects.remove(&oldest);
        }
        if self.order.len() > 2 * MAX_KEPT {
            let objects = &self.objects;
            self.order.retain(|key| objects.contains_key(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(name: &str) -> FarAgent {
        let object = serde_json::json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent",
            "metadata": {"name": name, "namespace": "default"}, "spec": {"image": "a"}});
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn only_so_many_objects_are_kept_and_the_newest_are_among_them() {
        let mut kept = Kept::default();
        for round in 0..3 {
            for number in 0..MAX_KEPT {
                let agent = agent(&format!("a{round}-{number}"));
                let key = ObjectRef::from_obj(&agent);
                kept.insert(key.clone(), Arc::new(agent));
                assert!(kept.get(&key).is_some());
                if number % 2 == 0 {
                    kept.remove(&key);
                }
            }
        }
        assert!(kept.objects.len() <= MAX_KEPT && kept.order.len() <= 2 * MAX_KEPT);
    }

    #[test]
    fn what_a_list_does_not_have_is_not_kept() {
        let mut kept = Kept::default();
        for name in ["gone", "anew", "there"] {
            let mut agent = agent(name);
            agent.metadata.uid = Some(format!("uid of {name}"));
            kept.insert(ObjectRef::from_obj(&agent), Arc::new(agent));
        }
        kept.keep_only(&["uid of there", "another's uid"].map(str::to_owned).into());
        assert_eq!(kept.objects.keys().map(|key| &*key.name).collect::<Vec<_>>(), ["there"]);
    }

    #[test]
    fn what_ended_is_settled_unless_it_goes_or_expires() {
        let settled = |one: &FarAgent| convert::is_settled(one, &convert::status_from_api(one.status.as_ref()));
        let mut one = agent("a");
        assert!(!settled(&one));
        let status = serde_json::json!({"phase": "Completed", "nodeName": "b", "attempt": 1, "exitCode": 0, "reason": "Completed",
            "conditions": [{"type": "Completed", "status": "True", "reason": "Completed", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        one.status = serde_json::from_value(status).unwrap();
        assert!(settled(&one));
        one.spec.ttl_seconds_after_finished = Some(1);
        assert!(!settled(&one));
    }
}
