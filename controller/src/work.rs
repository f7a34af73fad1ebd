//! Keys to look at: each once however often it is marked, some of them later. One reader.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// Keys and when to look at each.
#[derive(Debug)]
pub(crate) struct Work<K> {
    due: Mutex<BTreeMap<K, Instant>>,
    changed: Notify,
}

impl<K> Default for Work<K> {
    fn default() -> Self {
        Self {
            due: Mutex::default(),
            changed: Notify::new(),
        }
    }
}

impl<K: Ord + Clone> Work<K> {
    /// Look at `key` now.
    pub(crate) fn mark(&self, key: K) {
        self.mark_in(key, Duration::ZERO);
    }

    /// Look at `key` after `delay`, or earlier where that was asked for.
    pub(crate) fn mark_in(&self, key: K, delay: Duration) {
        let at = Instant::now() + delay;
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        due.entry(key).and_modify(|known| *known = at.min(*known)).or_insert(at);
        drop(due);
        self.changed.notify_one();
    }

    /// The next key, once its time has come.
    pub(crate) async fn next(&self) -> K {
        loop {
            let first = {
                let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
                let first = due
                    .iter()
                    .min_by_key(|(_, at)| **at)
                    .map(|(key, at)| (key.clone(), *at));
                if let Some((key, at)) = &first
                    && *at <= Instant::now()
                {
                    due.remove(key);
                    return key.clone();
                }
                first
            };
            let later = async {
                match first {
                    Some((_, at)) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = later => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_key_comes_once_and_at_the_earliest_time_asked_for() {
        let work = Work::default();
        work.mark_in("late", HOUR);
        work.mark_in("soon", HOUR);
        work.mark("soon");
        work.mark_in("soon", HOUR);
        work.mark("soon");
        assert_eq!(work.next().await, "soon");
        assert_eq!(work.next().now_or_never(), None);
        work.mark("late");
        assert_eq!(work.next().await, "late");
        assert_eq!(work.next().now_or_never(), None);
    }
}
