//! Who is connected. A stranger has not shown yet who it is: it has little time, shares few places, and gives its place up
//! to the next one. So nobody without a credential keeps out who has one; and no name takes all places of the known.
//!
//! ```text
//! accepted ─► stranger ─credential─► known ─► ended
//!                └─ too late, or the oldest when a newcomer needs its place ─► ended
//! ```

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// All connections of one listener.
#[derive(Debug)]
pub struct Connections {
    max_strangers: usize,
    max_each: usize,
    /// The oldest first.
    strangers: Mutex<VecDeque<Arc<State>>>,
    places: Arc<Semaphore>,
    /// Places taken, by name.
    known: Mutex<HashMap<String, usize>>,
}

#[derive(Debug, Default)]
struct State {
    /// Held from the first request with a credential until the connection ends.
    place: OnceLock<Place>,
    evicted: CancellationToken,
}

/// A known connection's; given back when this is dropped.
#[derive(Debug)]
struct Place {
    all: Arc<Connections>,
    who: String,
    _place: OwnedSemaphorePermit,
}

/// One connection; it is forgotten when this is dropped.
#[derive(Debug)]
pub struct Connection {
    all: Arc<Connections>,
    state: Arc<State>,
}

impl Connections {
    /// Places of strangers and of known connections, and how many of the latter one name may have.
    #[must_use]
    pub fn new(max_strangers: usize, max_known: usize, max_each: usize) -> Arc<Self> {
        Arc::new(Self {
            max_strangers,
            max_each,
            strangers: Mutex::default(),
            places: Arc::new(Semaphore::new(max_known)),
            known: Mutex::default(),
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

    fn known(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place_for(self: &Arc<Self>, who: &str) -> Option<Place> {
        let mut known = self.known();
        if known.get(who).is_some_and(|taken| *taken >= self.max_each) {
            return None;
        }
        let place = self.places.clone().try_acquire_owned().ok()?;
        *known.entry(who.to_owned()).or_default() += 1;
        Some(Place {
            all: self.clone(),
            who: who.to_owned(),
            _place: place,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut known = self.all.known();
        if let Some(taken) = known.get_mut(&self.who) {
            *taken -= 1;
            if *taken == 0 {
                known.remove(&self.who);
            }
        }
    }
}

impl Connection {
    /// It has shown who it is. Answers whether there is a place for it; a known connection keeps its own, whoever else it
    /// shows to be.
    pub fn is_recognised(&self, who: &str) -> bool {
        if self.state.place.get().is_some() {
            return true;
        }
        let Some(place) = self.all.place_for(who) else {
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
        let connections = Connections::new(2, 8, 8);
        let known = connections.admit();
        assert!(known.is_recognised("a"));
        let strangers: Vec<_> = (0..5).map(|_| connections.admit()).collect();
        let evicted: Vec<_> = strangers.iter().map(is_evicted).collect();
        assert_eq!(evicted, [true, true, true, false, false]);
        assert!(!is_evicted(&known));
        assert!(strangers[4].is_recognised("a"));
        let newcomer = connections.admit();
        assert!(!is_evicted(&strangers[3]), "the one that became known made room");
        drop(newcomer);
        let _next = connections.admit();
        assert!(!is_evicted(&strangers[3]), "the one that left made room");
    }

    #[test]
    fn known_connections_are_bounded_and_give_their_place_back() {
        let connections = Connections::new(8, 1, 8);
        let (one, two) = (connections.admit(), connections.admit());
        assert!(one.is_recognised("a") && one.is_recognised("a"));
        assert!(!two.is_recognised("b"));
        drop(one);
        assert!(two.is_recognised("b"));
    }

    #[test]
    fn one_name_takes_so_many_places_and_leaves_the_others_to_others() {
        let connections = Connections::new(8, 8, 2);
        let mut all: Vec<_> = (0..4).map(|_| connections.admit()).collect();
        let of_a: Vec<_> = all[..3].iter().map(|one| one.is_recognised("a")).collect();
        assert_eq!(of_a, [true, true, false]);
        assert!(all[3].is_recognised("b"));
        assert!(all[0].is_recognised("a"), "it has its place");
        drop(all.remove(0));
        assert!(all[1].is_recognised("a"), "the one that left made room");
        drop(all);
        assert!(connections.known().is_empty());
    }
}
