//! The last events of one resource, bounded in number and bytes. Watchers read from here with a cursor, so a slow
//! watcher costs nothing: when it falls behind the history it is told 410 and lists again.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Object, TooOld};

/// Events kept per resource.
const MAX_EVENTS: usize = 8192;
/// Bytes of object JSON kept per resource.
const MAX_BYTES: usize = 32 << 20;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum EventKind {
    Added,
    Modified,
    Deleted,
}

#[derive(Debug)]
pub(crate) struct Event {
    pub kind: EventKind,
    pub object: Arc<Object>,
    /// The state before, for selectors that an object leaves or enters.
    pub previous: Option<Arc<Object>>,
}

#[derive(Default)]
pub(super) struct History {
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Every event after this resource version is still here.
    complete_after: u64,
}

impl History {
    pub(super) fn starting_at(revision: u64) -> Self {
        Self {
            complete_after: revision,
            ..Self::default()
        }
    }

    pub(super) fn push(&mut self, event: Event) {
        self.bytes += event.object.json.len();
        self.events.push_back(Arc::new(event));
        while self.events.len() > MAX_EVENTS || self.bytes > MAX_BYTES {
            let Some(evicted) = self.events.pop_front() else { break };
            self.bytes -= evicted.object.json.len();
            self.complete_after = evicted.object.revision;
        }
    }

    pub(super) fn after(&self, after: u64, limit: usize, committed: u64) -> Result<(Vec<Arc<Event>>, u64), TooOld> {
        if after < self.complete_after {
            return Err(TooOld {
                requested: after,
                oldest: self.complete_after,
            });
        }
        let start = self.events.partition_point(|event| event.object.revision <= after);
        let events: Vec<_> = self.events.range(start..).take(limit).cloned().collect();
        let reached = match events.last() {
            Some(last) if events.len() == limit => last.object.revision,
            _ => committed.max(after),
        };
        Ok((events, reached))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Key;

    fn event(revision: u64) -> Event {
        let key = Key {
            resource: "r".into(),
            namespace: String::new(),
            name: "n".into(),
        };
        let object = Arc::new(Object {
            key,
            revision,
            json: bytes::Bytes::from_static(b"{}"),
        });
        Event {
            kind: EventKind::Added,
            object,
            previous: None,
        }
    }

    #[test]
    fn an_evicted_event_makes_older_versions_too_old() {
        let mut history = History::starting_at(1);
        for revision in 2..(MAX_EVENTS as u64 + 5) {
            history.push(event(revision));
        }
        let error = history.after(1, 10, 9000).unwrap_err();
        assert_eq!(error.oldest, 4);
        assert_eq!(history.after(4, 1, 9000).unwrap().0[0].object.revision, 5);
    }

    #[test]
    fn a_reader_goes_on_in_chunks_without_loss() {
        let mut history = History::starting_at(1);
        for revision in [2, 5, 9] {
            history.push(event(revision));
        }
        let (first, reached) = history.after(1, 2, 12).unwrap();
        assert_eq!((first.len(), reached), (2, 5));
        let (rest, reached) = history.after(reached, 2, 12).unwrap();
        assert_eq!((rest.len(), reached), (1, 12));
    }
}
