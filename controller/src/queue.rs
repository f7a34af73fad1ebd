//! Which keys to look at, and when. One key is looked at by one pass at a time; of several times asked for the earliest counts.
//!
//! ```text
//! ask ──► due (in a row now, or a timer each) ── next ──► busy ── done ──► (asked for meanwhile, or by the pass itself) ──► due
//! ```

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    hash::Hash,
    task::Poll,
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::time::{DelayQueue, delay_queue};

/// Longest time between two looks that were asked for: timers of tokio-util end at two years, lives of agents do not.
const LONGEST: Duration = Duration::from_secs(86_400);

/// When a pass wants to look again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Action {
    after: Option<Duration>,
}

impl Action {
    /// After this time, whatever happens.
    pub(crate) const fn requeue(after: Duration) -> Self {
        Self { after: Some(after) }
    }

    /// Only when something changes.
    pub(crate) const fn await_change() -> Self {
        Self { after: None }
    }

    /// As this one, and after this time at the latest.
    pub(crate) fn at_latest(self, after: Duration) -> Self {
        Self::requeue(self.after.map_or(after, |own| own.min(after)))
    }
}

/// The keys that are due or will be.
#[derive(Debug)]
pub(crate) struct Queue<K> {
    timers: DelayQueue<K>,
    /// Due now, the first first.
    row: VecDeque<K>,
    /// In the row, or at which timer.
    due: HashMap<K, Option<(delay_queue::Key, Instant)>>,
    /// Under way, with the time of the next look that was asked for meanwhile.
    busy: HashMap<K, Option<Instant>>,
}

impl<K: Clone + Eq + Hash> Queue<K> {
    pub(crate) fn new() -> Self {
        Self {
            timers: DelayQueue::new(),
            row: VecDeque::new(),
            due: HashMap::new(),
            busy: HashMap::new(),
        }
    }

    /// Look at `key` after this time at the latest.
    pub(crate) fn ask(&mut self, key: K, after: Duration) {
        self.ask_at(key, Instant::now() + after.min(LONGEST));
    }

    fn ask_at(&mut self, key: K, at: Instant) {
        if let Some(again) = self.busy.get_mut(&key) {
            *again = Some(again.map_or(at, |asked| asked.min(at)));
            return;
        }
        let is_now = at <= Instant::now();
        match self.due.get_mut(&key) {
            // In the row.
            Some(None) => {}
            Some(Some((_, due))) if *due <= at => {}
            Some(Some((timer, due))) if !is_now => {
                self.timers.reset_at(timer, at);
                *due = at;
            }
            None if !is_now => {
                let timer = self.timers.insert_at(key.clone(), at);
                self.due.insert(key, Some((timer, at)));
            }
            Some(timer) => {
                if let Some((timer, _)) = timer.take() {
                    self.timers.remove(&timer);
                }
                self.row.push_back(key);
            }
            None => {
                self.due.insert(key.clone(), None);
                self.row.push_back(key);
            }
        }
    }

    /// Waits for a key that is due; from now on it is under way. Cancel-safe.
    pub(crate) async fn next(&mut self) -> K {
        let key = poll_fn(|context| {
            while let Poll::Ready(Some(expired)) = self.timers.poll_expired(context) {
                let key = expired.into_inner();
                self.due.insert(key.clone(), None);
                self.row.push_back(key);
            }
            // Nothing, and no timer: whoever asks wakes the caller, which asks and waits in one task.
            self.row.pop_front().map_or(Poll::Pending, Poll::Ready)
        })
        .await;
        self.due.remove(&key);
        self.busy.insert(key.clone(), None);
        key
    }

    /// The pass over `key` ended.
    pub(crate) fn done(&mut self, key: &K, action: Action) {
        let again = self.busy.remove(key).flatten();
        let wanted = action.after.map(|after| Instant::now() + after.min(LONGEST));
        if let Some(at) = again.into_iter().chain(wanted).min() {
            self.ask_at(key.clone(), at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn the_earliest_time_counts_and_the_order_is_by_time() {
        let mut queue = Queue::new();
        queue.ask("late", 5 * SECOND);
        queue.ask("soon", 3 * SECOND);
        queue.ask("late", SECOND);
        queue.ask("late", 9 * SECOND);
        let start = Instant::now();
        assert_eq!((queue.next().await, start.elapsed().as_secs()), ("late", 1));
        assert_eq!((queue.next().await, start.elapsed().as_secs()), ("soon", 3));
        assert!(
            tokio::time::timeout(100 * SECOND, queue.next()).await.is_err(),
            "nothing is left"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_now_goes_in_the_order_in_which_it_was_asked_for() {
        let mut queue = Queue::new();
        queue.ask("timed", SECOND);
        queue.ask("later", 9 * SECOND);
        for key in ["a", "b", "a", "later"] {
            queue.ask(key, Duration::ZERO);
        }
        tokio::time::advance(SECOND).await;
        queue.ask("c", Duration::ZERO);
        let mut order = Vec::new();
        for _ in 0..5 {
            order.push(queue.next().await);
        }
        assert_eq!(order, ["a", "b", "later", "c", "timed"]);
        for key in order {
            queue.done(&key, Action::await_change());
        }
        assert!(tokio::time::timeout(100 * SECOND, queue.next()).await.is_err());
    }

    #[test]
    fn a_later_time_never_puts_off_an_earlier_one() {
        let at_latest = |action: Action, seconds| action.at_latest(seconds * SECOND);
        assert_eq!(at_latest(Action::await_change(), 5), Action::requeue(5 * SECOND));
        assert_eq!(at_latest(Action::requeue(SECOND), 5), Action::requeue(SECOND));
        assert_eq!(at_latest(Action::requeue(9 * SECOND), 5), Action::requeue(5 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn a_far_time_is_looked_at_before_a_timer_can_not_hold_it() {
        let mut queue = Queue::new();
        queue.ask("a", Duration::from_secs(u64::from(u32::MAX)));
        let start = Instant::now();
        assert_eq!((queue.next().await, start.elapsed()), ("a", LONGEST));
        queue.done(&"a", Action::requeue(Duration::MAX));
        queue.next().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_under_way_is_not_given_again_before_it_is_done() {
        let mut queue = Queue::new();
        queue.ask("a", Duration::ZERO);
        assert_eq!(queue.next().await, "a");
        queue.ask("a", Duration::ZERO);
        queue.ask("a", SECOND);
        assert!(tokio::time::timeout(9 * SECOND, queue.next()).await.is_err());
        queue.done(&"a", Action::requeue(60 * SECOND));
        let start = Instant::now();
        assert_eq!(
            (queue.next().await, start.elapsed().as_secs()),
            ("a", 0),
            "as was asked meanwhile"
        );
        queue.done(&"a", Action::requeue(60 * SECOND));
        assert_eq!((queue.next().await, start.elapsed().as_secs()), ("a", 60));
        queue.done(&"a", Action::await_change());
        assert!(tokio::time::timeout(900 * SECOND, queue.next()).await.is_err());
    }
}
