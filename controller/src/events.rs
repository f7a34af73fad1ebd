//! Events on agents and blades, for `kubectl describe`. A lost event is only logged: status is what counts.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use far_api::{FIELD_MANAGER, FarAgent, FarNode, FarNodeSpec};
use kube::{
    Client, Resource, ResourceExt,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

/// Agents whose last event is remembered, to say nothing twice in a row; forgotten all at once beyond.
const MAX_REMEMBERED: usize = 10_000;

pub(crate) struct Events {
    recorder: Recorder,
    last: Mutex<HashMap<String, (String, String)>>,
}

impl Events {
    pub(crate) fn new(client: Client) -> Self {
        let reporter = Reporter {
            controller: FIELD_MANAGER.to_owned(),
            instance: None,
        };
        Self {
            recorder: Recorder::new(client, reporter),
            last: Mutex::default(),
        }
    }

    /// Warns about a blade.
    pub(crate) async fn warn_of_blade(&self, blade: &str, reason: &str, note: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(crate::convert::cut(note.to_owned(), 1000)),
            action: reason.to_owned(),
            secondary: None,
        };
        let blade = FarNode::new(blade, FarNodeSpec::default()).object_ref(&());
        if let Err(error) = self.recorder.publish(&event, &blade).await {
            tracing::warn!(blade = blade.name, %error, "an event was not written");
        }
    }

    /// Says `reason` and `note` about an agent, unless that was the last thing said about it.
    pub(crate) async fn say(&self, agent: &FarAgent, type_: EventType, reason: &str, note: &str) {
        let uid = agent.uid().unwrap_or_default();
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let said = (reason.to_owned(), note.to_owned());
            if last.get(&uid) == Some(&said) {
                return;
            }
            if last.len() >= MAX_REMEMBERED {
                last.clear();
            }
            last.insert(uid, said);
        }
        // events.k8s.io/v1: a note has at most 1 kB.
        let note = crate::convert::cut(note.to_owned(), 1000);
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note),
            action: reason.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &agent.object_ref(&())).await {
            tracing::warn!(agent.name = agent.name_any(), %error, "an event was not written");
        }
    }
}
