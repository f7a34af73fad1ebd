//! The board: what is known of every attempt now, with a sequence number per change, and who watches.
//!
//! Numbers never go backwards over restarts: a ceiling is on disk before any number below it is given out, and a
//! restart goes on from the ceiling. Then every state gets a new number, so that a watcher that resumes from an old one
//! sees all that may have changed meanwhile.

use crate::{
    files::{read_if_there, write_atomic},
    log_sink::LogSignal,
    names::AttemptKey,
    pulse::Heartbeat,
    record::Record,
};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{broadcast, watch};

/// Numbers given out per write of the ceiling.
const BLOCK: u64 = 1000;
/// Changes a watcher may lag behind before it is cut off and must resume.
const WATCH_QUEUE: usize = 1024;

/// One attempt on the board.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The record as it is in the ledger.
    pub record: Arc<Record>,
    /// Number of its last change.
    pub seq: u64,
    /// A sign only.
    pub heartbeat: Heartbeat,
    /// Signal of its log.
    pub log: watch::Receiver<LogSignal>,
}

#[derive(Debug)]
struct Inner {
    seq: u64,
    ceiling: u64,
    entries: BTreeMap<AttemptKey, Entry>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Board {
    path: PathBuf,
    inner: Mutex<Inner>,
    changes: broadcast::Sender<Entry>,
}

/// A watcher's start: what changed after its number, then what changes from now on, without gap.
#[derive(Debug)]
pub struct Watch {
    /// Current states that are newer, oldest change first.
    pub replay: Vec<Entry>,
    /// Number of the newest change in the replay.
    pub seq: u64,
    /// Changes from now on.
    pub live: broadcast::Receiver<Entry>,
}

impl Board {
    /// A board that goes on from the ceiling kept at `path`. Blocking.
    ///
    /// # Errors
    /// The ceiling cannot be read or written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let ceiling = match read_if_there(path)? {
            Some(text) => std::str::from_utf8(&text)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the event number is not a number"))?,
            None => 0,
        };
        let inner = Inner {
            seq: ceiling,
            ceiling,
            entries: BTreeMap::new(),
        };
        Ok(Self {
            path: path.to_owned(),
            inner: Mutex::new(inner),
            changes: broadcast::Sender::new(WATCH_QUEUE),
        })
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a change. Blocking once in a thousand.
    pub(crate) fn publish(&self, record: Arc<Record>, heartbeat: Heartbeat, log: &watch::Receiver<LogSignal>) {
        let mut inner = self.locked();
        if inner.seq >= inner.ceiling {
            let ceiling = inner.seq + BLOCK;
            match write_atomic(&self.path, ceiling.to_string().as_bytes()) {
                Ok(()) => inner.ceiling = ceiling,
                // Told all the same: a watcher that waits would be worse off. The next change tries again.
                Err(error) => tracing::error!(path = %self.path.display(), %error, "the event number cannot be kept"),
            }
        }
        inner.seq += 1;
        let key = record.identity.key.clone();
        let entry = Entry {
            record,
            seq: inner.seq,
            heartbeat,
            log: log.clone(),
        };
        inner.entries.insert(key, entry.clone());
        // Nobody watching is fine. Sent under the lock: numbers arrive in order.
        let _ = self.changes.send(entry);
    }

    /// Takes an attempt off the board.
    pub(crate) fn remove(&self, key: &AttemptKey) {
        self.locked().entries.remove(key);
    }

    /// One attempt.
    #[must_use]
    pub fn entry(&self, key: &AttemptKey) -> Option<Entry> {
        self.locked().entries.get(key).cloned()
    }

    /// Every attempt, and the newest number.
    #[must_use]
    pub fn entries(&self) -> (Vec<Entry>, u64) {
        let inner = self.locked();
        (inner.entries.values().cloned().collect(), inner.seq)
    }

    /// Starts to watch after `from_seq`. A number of the future (the blade lost its state) counts as 0.
    #[must_use]
    pub fn watch(&self, from_seq: u64) -> Watch {
        let inner = self.locked();
        let from_seq = if from_seq > inner.seq { 0 } else { from_seq };
        let mut replay: Vec<_> = inner
            .entries
            .values()
            .filter(|entry| entry.seq > from_seq)
            .cloned()
            .collect();
        replay.sort_by_key(|entry| entry.seq);
        Watch {
            replay,
            seq: inner.seq,
            live: self.changes.subscribe(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::fresh;

    fn publish(board: &Board) -> u64 {
        board.publish(
            Arc::new(fresh()),
            Heartbeat::Regular,
            &watch::channel(LogSignal::default()).1,
        );
        board.entry(&fresh().identity.key).unwrap().seq
    }

    #[test]
    fn numbers_never_go_backwards_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let mut last = 0;
        for _ in 0..3 {
            let board = Board::open(&folder.path().join("seq")).unwrap();
            for _ in 0..1500 {
                let seq = publish(&board);
                assert!(seq > last);
                last = seq;
            }
        }
    }

    #[test]
    fn a_watcher_gets_what_is_newer_and_then_what_comes() {
        let folder = tempfile::tempdir().unwrap();
        let board = Board::open(&folder.path().join("seq")).unwrap();
        let first = publish(&board);
        assert_eq!(board.watch(0).replay.len(), 1);
        assert!(board.watch(first).replay.is_empty());
        assert_eq!(board.watch(first + 1000).replay.len(), 1);
        let mut watch = board.watch(first);
        let second = publish(&board);
        assert_eq!(watch.live.try_recv().unwrap().seq, second);
    }

    #[test]
    fn a_slow_watcher_is_told_that_it_lags() {
        let folder = tempfile::tempdir().unwrap();
        let board = Board::open(&folder.path().join("seq")).unwrap();
        let mut watch = board.watch(0);
        for _ in 0..=WATCH_QUEUE {
            publish(&board);
        }
        assert!(matches!(
            watch.live.try_recv(),
            Err(broadcast::error::TryRecvError::Lagged(_))
        ));
    }
}
