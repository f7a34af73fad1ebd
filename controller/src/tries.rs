//! Agents that tasks made. Part of the world, under its lock.

use std::collections::{BTreeMap, HashMap};

use far_api::FarAgent;
use far_core::{
    status::{Phase, Status},
    tasks::{Agent, Failure},
};
use kube::ResourceExt;

/// Annotation of a task's agents with the name of the queue.
pub(crate) const QUEUE_ANNOTATION: &str = "tiffany.dev/queue";

/// (namespace, name) of a queue.
pub(crate) type QueueKey = (String, String);

/// An agent of a task.
#[derive(Debug, Clone)]
pub(crate) struct Try {
    pub(crate) uid: String,
    /// As tasks see it.
    pub(crate) agent: Agent,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    /// (namespace, task's uid) → agent's name. Owners are what an agent says: one of another namespace is none of the task's.
    of_task: HashMap<(String, String), BTreeMap<String, Try>>,
    /// Agent's uid → its task's uid, its own name, its queue; all are of one namespace.
    owners: HashMap<String, (String, String, QueueKey)>,
}

/// uid of the task that made an agent.
pub(crate) fn task_of(agent: &FarAgent) -> Option<&str> {
    let owners = agent.owner_references().iter();
    let mut tasks = owners.filter(|owner| owner.controller == Some(true) && owner.kind == "FarTask");
    tasks.next().map(|owner| owner.uid.as_str())
}

impl Tries {
    /// The API tells of an agent. Answers the queue to look at where its task may have to do something.
    pub(crate) fn observe(&mut self, agent: &FarAgent, status: &Status) -> Option<QueueKey> {
        let (uid, task) = (agent.uid()?, task_of(agent)?.to_owned());
        let queue = (agent.namespace()?, agent.annotations().get(QUEUE_ANNOTATION)?.clone());
        let seen = match status.phase() {
            Phase::Completed => Agent::Completed,
            Phase::Failed => Agent::Failed(Failure {
                exit_code: status.exit_code,
                reason: status.reason.clone().unwrap_or_default(),
                message: status.message.clone().unwrap_or_default(),
            }),
            Phase::Pending | Phase::Scheduled | Phase::Starting | Phase::Running | Phase::Sleeping | Phase::Unknown => {
                Agent::Lives
            }
        };
        let name = agent.name_any();
        self.owners
            .insert(uid.clone(), (task.clone(), name.clone(), queue.clone()));
        let before = self.of_task.entry((queue.0.clone(), task)).or_default().insert(
            name,
            Try {
                uid,
                agent: seen.clone(),
            },
        );
        before.is_none_or(|before| before.agent != seen).then_some(queue)
    }

    /// An agent is gone from the API. Answers the queue to look at.
    pub(crate) fn forget(&mut self, uid: &str) -> Option<QueueKey> {
        let (task, name, queue) = self.owners.remove(uid)?;
        let key = (queue.0.clone(), task);
        let tries = self.of_task.get_mut(&key)?;
        if tries.get(&name).is_some_and(|one| one.uid == uid) {
            tries.remove(&name);
        }
        if tries.is_empty() {
            self.of_task.remove(&key);
        }
        Some(queue)
    }

    /// An agent of a task.
    pub(crate) fn get(&self, namespace: &str, task: &str, agent: &str) -> Option<&Try> {
        self.of_task.get(&(namespace.to_owned(), task.to_owned()))?.get(agent)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn agent(namespace: &str, uid: &str) -> FarAgent {
        serde_json::from_value(json!({
            "apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "spec": {"image": "a"},
            "metadata": {
                "name": "job-1", "namespace": namespace, "uid": uid, "annotations": {QUEUE_ANNOTATION: "q"},
                "ownerReferences": [
                    {"apiVersion": "tiffany.dev/v1alpha1", "kind": "FarTask", "name": "job", "uid": "task", "controller": true},
                ],
            },
        }))
        .unwrap()
    }

    #[test]
    fn an_agent_of_another_namespace_says_nothing_of_a_task() {
        let mut tries = Tries::default();
        tries.observe(&agent("theirs", "forged"), &Status::default());
        assert!(tries.get("ours", "task", "job-1").is_none());
        tries.observe(&agent("ours", "true"), &Status::default());
        tries.forget("forged");
        assert_eq!(tries.get("ours", "task", "job-1").map(|one| &*one.uid), Some("true"));
        tries.forget("true");
        assert!(tries.of_task.is_empty() && tries.owners.is_empty());
    }
}
