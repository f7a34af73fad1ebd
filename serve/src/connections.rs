//! Who is connected. A stranger has not shown yet who it is: it has little time, shares few places, and gives its place up
//! to the next one. So nobody without a credential keeps out who has one.
//!
//! ```text
//! accepted ─► stranger ─credential─► known ─► ended
//!                └─ too late, or the oldest when a newcomer needs its place ─► ended
//! ```

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// All connections of one listener.
#[derive(Debug)]
pub struct Connections {
    max_strangers: usize,
    /// The oldest first.
    strangers: Mutex<VecDeque<Arc<State>>>,
    places: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct State {
    /// Held from the first request with a credential until the connection ends.
    place: OnceLock<OwnedSemaphorePermit>,
    evicted: CancellationToken,
}

/// One connection; it is forgotten when this is dropped.
#[derive(Debug)]
pub struct Connection {
    all: Arc<Connections>,
    state: Arc<State>,
}

impl Connections {
    /// Places of strangers and of known connections.
    #[must_use]
    pub fn new(max_strangers: usize, max_known: usize) -> Arc<Self> {
        Arc::new(Self {
            max_strangers,
            strangers: Mutex::default(),
            places: Arc::new(Semaphore::new(max_known)),
        })
    }

    /// A new stranger, in the oldest one's place where there is no other.
    #[must_use]
    pub fn admit(self: &Arc<Self>) -> Connection {
        let state = Arc::new(State::default());
        let mut strangers = self.strangers();
        while strangers.len() >= self.max_strangers {
            let Some(oldest) = strangers.pop_front() else { break };
            oldest.evicted.cancel();
        }
        strangers.push_back(state.clone());
        drop(strangers);
        Connection {
            all: self.clone(),
            state,
        }
    }

    fn strangers(&self) -> MutexGuard<'_, VecDeque<Arc<State>>> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// It has shown who it is. Answers whether there is a place for it; a known connection keeps its own.
    pub fn is_recognised(&self) -> bool {
        if self.state.place.get().is_some() {
            return true;
        }
        let Ok(place) = self.all.places.clone().try_acquire_owned() else {
            return false;
        };
        // Two first requests at once: the second place is given back.
        let _ = self.state.place.set(place);
        self.leave_strangers();
        true
    }

    /// Returns when the connection has to end: evicted, or still a stranger after `limit`.
    pub async fn overstays(&self, limit: Duration) {
        tokio::select! {
            () = self.state.evicted.cancelled() => return,
            () = tokio::time::sleep(limit) => {}
        }
        if self.state.place.get().is_some() {
            std::future::pending().await
        }
    }

    fn leave_strangers(&self) {
        self.all.strangers().retain(|other| !Arc::ptr_eq(other, &self.state));
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.leave_strangers();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_evicted(connection: &Connection) -> bool {
        connection.state.evicted.is_cancelled()
    }

    #[test]
    fn a_newcomer_gets_the_oldest_strangers_place_and_never_a_known_ones() {
        let connections = Connections::new(2, 8);
        let known = connections.admit();
        assert!(known.is_recognised());
        let strangers: Vec<_> = (0..5).map(|_| connections.admit()).collect();
        let evicted: Vec<_> = strangers.iter().map(is_evicted).collect();
        assert_eq!(evicted, [true, true, true, false, false]);
        assert!(!is_evicted(&known));
        assert!(strangers[4].is_recognised());
        let newcomer = connections.admit();
        assert!(!is_evicted(&strangers[3]), "the one that became known made room");
        drop(newcomer);
        let _next = connections.admit();
        assert!(!is_evicted(&strangers[3]), "the one that left made room");
    }

    #[test]
    fn known_connections_are_bounded_and_give_their_place_back() {
        let connections = Connections::new(8, 1);
        let (one, two) = (connections.admit(), connections.admit());
        assert!(one.is_recognised() && one.is_recognised());
        assert!(!two.is_recognised());
        drop(one);
        assert!(two.is_recognised());
    }
}
