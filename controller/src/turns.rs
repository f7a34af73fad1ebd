//! How many writes are under way at a time that nobody waits for: everything but the choice of a blade.
//!
//! Where many agents change at once the API server is what there is too little of. It answers all that it was asked together
//! and each of it the later, so a choice of a blade would wait behind the ends of other agents. How many writes go
//! together is found by how long they take, as TCP Vegas does it (Brakmo and Peterson, 1995): one more for every round of
//! quick answers, fewer when they come late.

use std::{
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

const FEWEST: f64 = 1.0;
const FIRST: f64 = 4.0;
const MOST: f64 = 64.0;
/// What a late answer leaves.
const CUT: f64 = 0.7;
/// Late is what takes longer than the quickest answer this often, and a little.
const LATE_TIMES: u32 = 3;
const LATE: Duration = Duration::from_millis(2);
/// The quickest answer is found anew after this long: servers change, and others keep them busy. Not sooner, and not from late
/// answers: what keeps the server busy may be this controller's own choices, and more writes would make it worse.
const REMEMBERED: Duration = Duration::from_secs(60);
/// A write that takes longer goes on, and is no longer counted: what hangs must not hold up the others.
const HANGS: Duration = Duration::from_secs(1);

/// How many, from how long they took. Pure.
#[derive(Debug)]
struct Limit {
    limit: f64,
    quickest: Duration,
    quickest_at: Instant,
    cut_at: Option<Instant>,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self {
            limit: FIRST,
            quickest: Duration::MAX,
            quickest_at: now,
            cut_at: None,
        }
    }

    fn get(&self) -> usize {
        // At most MOST, and at least FEWEST.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let whole = self.limit as usize;
        whole
    }

    /// A write ended at `now` that took so long; `in_demand`: others wait for its place.
    fn learn(&mut self, took: Duration, in_demand: bool, now: Instant) {
        if took <= self.quickest || now.duration_since(self.quickest_at) > REMEMBERED {
            (self.quickest, self.quickest_at) = (took, now);
        }
        let is_late = took > self.quickest.saturating_mul(LATE_TIMES).saturating_add(LATE);
        // Those that were under way at the last cut say nothing about what it did.
        let is_news = self.cut_at.is_none_or(|at| now.duration_since(at) >= took);
        if is_late && is_news {
            self.limit = (self.limit * CUT).max(FEWEST);
            self.cut_at = Some(now);
        } else if !is_late && in_demand {
            self.limit = (self.limit + 1.0 / self.limit).min(MOST);
        }
    }
}

#[derive(Debug)]
struct State {
    limit: Limit,
    /// Places that there are, free and taken.
    places: usize,
}

/// Lets writes through.
#[derive(Debug)]
pub(crate) struct Turns {
    state: Mutex<State>,
    free: Semaphore,
    waiting: AtomicUsize,
    came: Notify,
    closed: CancellationToken,
}

/// Counted also where the wait is given up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn count(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place; given back, or away where there are too many.
struct Place<'a> {
    turns: &'a Turns,
    /// How long a write took that says something of the server: a refusal may be quick, and a broken connection is.
    took: Option<Duration>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.turns.leave(self.took);
    }
}

impl Default for Turns {
    fn default() -> Self {
        let limit = Limit::new(Instant::now());
        let places = limit.get();
        Self {
            state: Mutex::new(State { limit, places }),
            free: Semaphore::new(places),
            waiting: AtomicUsize::new(0),
            came: Notify::new(),
            closed: CancellationToken::new(),
        }
    }
}

impl Turns {
    /// How many wait now.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Waits until somebody more waits than at the last call. For one caller.
    pub(crate) async fn somebody_waits(&self) {
        self.came.notified().await;
    }

    /// From now on [`Self::take`] gives no turn: who waits, waits until it is dropped.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// Waits for a turn, and writes. Only what is `Ok` tells how quick the server is.
    pub(crate) async fn take<T, E>(&self, write: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let place = tokio::select! {
            biased;
            () = self.closed.cancelled() => {
                let _waiting = Waiting::count(&self.waiting);
                std::future::pending().await
            }
            place = self.enter() => place,
        };
        Self::write(place, write).await
    }

    /// The same for last words: also after [`Self::close`].
    pub(crate) async fn take_to_the_end<T, E>(&self, write: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        Self::write(self.enter().await, write).await
    }

    async fn write<T, E>(mut place: Place<'_>, write: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let since = Instant::now();
        let mut write = pin!(write);
        let written = tokio::time::timeout(HANGS, &mut write).await;
        let says_something = written.as_ref().map_or(true, Result::is_ok);
        place.took = says_something.then(|| since.elapsed());
        drop(place);
        match written {
            Ok(written) => written,
            Err(_) => write.await,
        }
    }

    async fn enter(&self) -> Place<'_> {
        match self.free.try_acquire() {
            Ok(permit) => permit.forget(),
            Err(_) => self.wait().await,
        }
        Place {
            turns: self,
            took: None,
        }
    }

    async fn wait(&self) {
        let _waiting = Waiting::count(&self.waiting);
        self.came.notify_one();
        // An error says that it was closed, which nobody does.
        if let Ok(permit) = self.free.acquire().await {
            permit.forget();
        }
    }

    fn leave(&self, took: Option<Duration>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(took) = took {
            state.limit.learn(took, self.waiting() > 0, Instant::now());
        }
        // This place and what is missing, or nothing.
        let wanted = state.limit.get();
        let added = (wanted + 1).saturating_sub(state.places);
        state.places = state.places - 1 + added;
        self.free.add_permits(added);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn quick_answers_let_more_through_and_late_ones_fewer() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        let mut now = start;
        let mut learn = |limit: &mut Limit, took: Duration, in_demand| {
            now += took;
            limit.learn(took, in_demand, now);
            limit.get()
        };
        assert_eq!(learn(&mut limit, 3 * MS, false), 4, "nobody waits");
        for _ in 0..5 {
            learn(&mut limit, 3 * MS, true);
        }
        assert_eq!(limit.get(), 5, "one more a round");
        assert_eq!(
            learn(&mut limit, 11 * MS, true),
            5,
            "three times the quickest and 2 ms is not late"
        );
        assert_eq!(learn(&mut limit, 12 * MS, true), 3);
        for _ in 0..4 {
            learn(&mut limit, 50 * MS, true);
        }
        assert_eq!(limit.get(), 1);
        for _ in 0..10_000 {
            learn(&mut limit, 3 * MS, true);
        }
        assert_eq!(limit.get(), 64);
    }

    #[test]
    fn a_server_that_others_made_slow_is_found_out_within_a_minute() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        limit.learn(2 * MS, true, start + MS);
        for round in 1..5_900 {
            limit.learn(9 * MS, true, start + round * 10 * MS);
        }
        assert_eq!(limit.get(), 1);
        for round in 5_900..6_200 {
            limit.learn(9 * MS, true, start + round * 10 * MS);
        }
        assert!(limit.get() > 4, "{limit:?}");
    }

    #[test]
    fn those_that_were_under_way_at_a_cut_do_not_cut_again() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        limit.learn(MS, true, start + MS);
        for later in 0..4 {
            limit.learn(100 * MS, true, start + (110 + later) * MS);
        }
        assert_eq!(limit.get(), 2, "4.25 once by 0.7");
        limit.learn(100 * MS, true, start + 300 * MS);
        assert_eq!(limit.get(), 2, "2.98 by 0.7");
        limit.learn(100 * MS, true, start + 500 * MS);
        assert_eq!(limit.get(), 1);
    }

    #[test]
    fn a_server_that_became_slow_for_good_is_not_taken_for_busy_for_ever() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        limit.learn(MS, true, start + MS);
        for second in 1..=1000 {
            limit.learn(40 * MS, true, start + Duration::from_secs(second));
        }
        assert!(limit.get() > 10, "{limit:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_write_as_have_places_and_what_hangs_holds_up_nobody() {
        let turns = Arc::new(Turns::default());
        let hang = || {
            let turns = turns.clone();
            tokio::spawn(async move { turns.take(std::future::pending::<Result<(), ()>>()).await })
        };
        let hung: Vec<_> = (0..4).map(|_| hang()).collect();
        tokio::task::yield_now().await;
        let start = tokio::time::Instant::now();
        assert_eq!(
            (turns.take(async { Err::<(), _>(7) }).await, start.elapsed()),
            (Err(7), HANGS)
        );
        assert_eq!(turns.waiting(), 0);
        hung.iter().for_each(tokio::task::JoinHandle::abort);
        for one in hung {
            assert!(one.await.unwrap_err().is_cancelled());
        }
        // Whoever gives up leaves nothing behind.
        let sleep = async |time| {
            tokio::time::sleep(time).await;
            Ok::<_, ()>(())
        };
        for _ in 0..100 {
            let _ = tokio::time::timeout(MS, turns.take(sleep(5 * MS))).await;
        }
        assert_eq!(turns.waiting(), 0);
        assert_eq!(turns.take(async { Ok::<_, ()>(8) }).await, Ok(8));
        turns.close();
        let late = tokio::time::timeout(60 * HANGS, turns.take(async { Ok::<_, ()>(9) })).await;
        assert!(late.is_err(), "nobody gets a turn any more");
        assert_eq!(turns.take_to_the_end(async { Ok::<_, ()>(10) }).await, Ok(10));
    }
}
