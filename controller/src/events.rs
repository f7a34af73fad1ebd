//! Events on agents and blades, for `kubectl describe`. They are written behind the passes; a lost event is only
//! logged: status is what counts.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use far_api::{FIELD_MANAGER, FarAgent, FarNode, FarNodeSpec};
use futures::{StreamExt, stream};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{
    Client, Resource, ResourceExt,
    api::{PostParams, Request},
    runtime::events::EventType,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{convert::cut, turns::Turns};

/// Agents whose last event is remembered, to say nothing twice in a row; forgotten all at once beyond.
const MAX_REMEMBERED: usize = 10_000;
/// Events that wait to be written; about 1 KiB each.
const MAX_WAITING: usize = 10_000;
const AT_A_TIME: usize = 8;
/// An API that answers nothing must not hold all of them up for good.
const WITHIN: Duration = Duration::from_secs(30);
/// What was said before the end is written for this long.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// Bytes of a note, and characters of an event's name (events.k8s.io/v1; RFC 1123 subdomain).
const MAX_NOTE: usize = 1000;
const MAX_NAME: usize = 253;

/// Where passes say what happens.
pub(crate) struct Events {
    waiting: mpsc::Sender<Event>,
    last: Mutex<HashMap<String, (String, String)>>,
}

/// Writes what was said.
pub(crate) struct Writer {
    client: Client,
    waiting: mpsc::Receiver<Event>,
    turns: Arc<Turns>,
}

/// The two ends.
pub(crate) fn events(client: Client, turns: Arc<Turns>) -> (Events, Writer) {
    let (sender, waiting) = mpsc::channel(MAX_WAITING);
    let events = Events {
        waiting: sender,
        last: Mutex::default(),
    };
    (events, Writer { client, waiting, turns })
}

impl Events {
    /// Warns about a blade.
    pub(crate) fn warn_of_blade(&self, blade: &str, reason: &str, note: &str) {
        let blade = FarNode::new(blade, FarNodeSpec::default()).object_ref(&());
        self.put(blade, EventType::Warning, reason, note);
    }

    /// Says `reason` and `note` about an agent, unless that was the last thing said about it.
    pub(crate) fn say(&self, agent: &FarAgent, type_: EventType, reason: &str, note: &str) {
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
        self.put(agent.object_ref(&()), type_, reason, note);
    }

    fn put(&self, about: ObjectReference, type_: EventType, reason: &str, note: &str) {
        let event = event(about, type_, reason, note, Timestamp::now());
        if let Err(error) = self.waiting.try_send(event) {
            tracing::warn!(reason, %error, "an event was not written");
        }
    }
}

fn event(about: ObjectReference, type_: EventType, reason: &str, note: &str, now: Timestamp) -> Event {
    let type_ = match type_ {
        EventType::Normal => "Normal",
        EventType::Warning => "Warning",
    };
    // Two events of one object within a nanosecond do not happen.
    let unique = format!(".{:x}", now.as_nanosecond());
    let name = cut(about.name.clone().unwrap_or_default(), MAX_NAME - unique.len());
    Event {
        metadata: ObjectMeta {
            name: Some(name.trim_end_matches(['.', '-']).to_owned() + &unique),
            // What has no namespace has its events in this one, as blades of Kubernetes do.
            namespace: Some(about.namespace.clone().unwrap_or_else(|| "default".to_owned())),
            ..ObjectMeta::default()
        },
        action: Some(reason.to_owned()),
        event_time: Some(MicroTime(now)),
        note: Some(cut(note.to_owned(), MAX_NOTE)),
        reason: Some(reason.to_owned()),
        regarding: Some(about),
        reporting_controller: Some(FIELD_MANAGER.to_owned()),
        reporting_instance: Some(FIELD_MANAGER.to_owned()),
        type_: Some(type_.to_owned()),
        ..Event::default()
    }
}

impl Writer {
    /// Ends once nobody is left who could say something; after `stop` some seconds later at the latest.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let Self { client, waiting, turns } = self;
        let said = stream::unfold(waiting, |mut waiting| async { Some((waiting.recv().await?, waiting)) });
        let last_words = async {
            stop.cancelled().await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            () = said.for_each_concurrent(AT_A_TIME, |event| write(&client, &turns, event)) => {}
            () = last_words => {}
        }
    }
}

async fn write(client: &Client, turns: &Turns, event: Event) {
    let create = async {
        let body = serde_json::to_vec(&event).map_err(|error| error.to_string())?;
        let path = Event::url_path(&(), event.metadata.namespace.as_deref());
        let request = Request::new(path).create(&PostParams::default(), body);
        // Nobody reads the answer.
        let created = client.request_text(request.map_err(|error| error.to_string())?);
        let created = tokio::time::timeout(WITHIN, created).await;
        created
            .map_err(|late| late.to_string())?
            .map_err(|error| error.to_string())
    };
    if let Err(error) = turns.take_to_the_end(create).await {
        let about = event.regarding.as_ref().and_then(|about| about.name.as_deref());
        tracing::warn!(about, reason = event.reason, error, "an event was not written");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_enough_and_notes_too() {
        for name in ["a".repeat(253), format!("{}.b", "a".repeat(235)), "short".into()] {
            let about = ObjectReference {
                name: Some(name.clone()),
                ..ObjectReference::default()
            };
            let event = event(about, EventType::Warning, "Failed", &"é".repeat(3000), Timestamp::now());
            let own = event.metadata.name.unwrap();
            assert!(
                own.len() <= MAX_NAME && !own.contains("..") && own.starts_with(&name[..5]),
                "{own}"
            );
            assert!(event.note.unwrap().len() <= MAX_NOTE);
            assert_eq!(event.metadata.namespace.as_deref(), Some("default"));
        }
    }
}
