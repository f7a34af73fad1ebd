//! Faults on purpose, for tests of clients: only through the library's handle, or `/debug/faults` when switched on.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Rules kept at once; more are refused.
const MAX_FAULTS: usize = 256;

/// Which requests a fault meets; empty parts match everything.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Match {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub verb: Option<String>,
    /// Plural, for example `faragents`.
    pub resource: Option<String>,
    /// `status` or `scale`; the empty text matches the object itself only.
    pub subresource: Option<String>,
    pub name: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "do")]
pub enum Action {
    /// Answer with this code instead of doing the work.
    Answer {
        code: u16,
        #[serde(rename = "retryAfterSeconds")]
        retry_after: Option<u32>,
    },
    /// Do the work, then close the connection without an answer: the client cannot know.
    DropAfter,
    /// Close the connection without doing the work.
    DropBefore,
    /// Wait, then do the work.
    Delay { millis: u64 },
    /// Watches only: send a 410 as the next event and end. Running watches are met too.
    ExpireWatch,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    #[serde(default)]
    pub on: Match,
    pub action: Action,
    /// How many requests it meets before it is used up.
    pub times: u32,
}

/// What a request is, for matching.
#[derive(Debug, Clone, Default)]
pub(crate) struct Target {
    pub verb: String,
    pub resource: String,
    pub subresource: String,
    pub name: String,
}

/// Handle to a server's faults; clones share them.
#[derive(Debug, Clone)]
pub struct Faults {
    rules: Arc<Mutex<Vec<Fault>>>,
    /// Wakes running watches when a fault is added.
    added: Arc<tokio::sync::watch::Sender<u64>>,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            rules: Arc::default(),
            added: Arc::new(tokio::sync::watch::channel(0).0),
        }
    }
}

impl Faults {
    /// `false` when too many faults are waiting already.
    pub fn add(&self, fault: Fault) -> bool {
        let mut rules = self.lock();
        let room = rules.len() < MAX_FAULTS;
        if room {
            rules.push(fault);
        }
        drop(rules);
        self.added.send_modify(|count| *count = count.wrapping_add(1));
        room
    }

    pub fn clear(&self) {
        self.lock().clear();
    }

    /// Faults that are not used up yet.
    pub fn pending(&self) -> Vec<Fault> {
        self.lock().clone()
    }

    pub(crate) fn subscribe(&self) -> tokio::sync::watch::Receiver<u64> {
        self.added.subscribe()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Fault>> {
        self.rules.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn take(&self, target: &Target) -> Option<Action> {
        self.take_if(target, |action| *action != Action::ExpireWatch)
    }

    pub(crate) fn expires_watch(&self, target: &Target) -> bool {
        self.take_if(target, |action| *action == Action::ExpireWatch).is_some()
    }

    fn take_if(&self, target: &Target, wanted: impl Fn(&Action) -> bool) -> Option<Action> {
        let mut rules = self.lock();
        let at = rules
            .iter()
            .position(|rule| wanted(&rule.action) && rule.on.meets(target))?;
        let action = rules[at].action.clone();
        rules[at].times = rules[at].times.saturating_sub(1);
        if rules[at].times == 0 {
            rules.remove(at);
        }
        Some(action)
    }
}

impl Match {
    fn meets(&self, target: &Target) -> bool {
        let fits = |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        fits(&self.verb, &target.verb)
            && fits(&self.resource, &target.resource)
            && fits(&self.subresource, &target.subresource)
            && fits(&self.name, &target.name)
    }
}

impl Action {
    pub(crate) fn delay(&self) -> Option<Duration> {
        match self {
            Self::Delay { millis } => Some(Duration::from_millis(*millis)),
            Self::Answer { .. } | Self::DropAfter | Self::DropBefore | Self::ExpireWatch => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_meets_its_requests_and_is_then_used_up() {
        let faults = Faults::default();
        let on = Match {
            verb: Some("patch".into()),
            subresource: Some("status".into()),
            ..Match::default()
        };
        assert!(faults.add(Fault {
            on,
            action: Action::Answer {
                code: 409,
                retry_after: None
            },
            times: 2
        }));
        let status = Target {
            verb: "patch".into(),
            subresource: "status".into(),
            ..Target::default()
        };
        let main = Target {
            verb: "patch".into(),
            ..Target::default()
        };
        assert_eq!(faults.take(&main), None);
        assert!(faults.take(&status).is_some());
        assert!(!faults.expires_watch(&status));
        assert!(faults.take(&status).is_some());
        assert_eq!(faults.take(&status), None);
    }
}
