//! Where a VM's output goes: the writer behind a lock that only blocking threads hold, and a signal for who follows.

use crate::logs::{LogRecord, LogWriter, Stored};
use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::watch;

/// What followers wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogSignal {
    /// Grows with each round of output.
    pub rounds: u64,
    /// Nothing comes any more.
    pub is_closed: bool,
}

/// Shared between the sessions of one VM, which come one after the other.
#[derive(Debug, Clone)]
pub(crate) struct LogSink {
    writer: Arc<Mutex<LogWriter>>,
    /// Who may work on the writer. Waited for without a thread: a guest that dials again and again while the disk is slow
    /// parks none beside the one that writes.
    turn: Arc<tokio::sync::Mutex<()>>,
    signal: watch::Sender<LogSignal>,
}

impl LogSink {
    /// Opens the log in `folder`. Blocking.
    pub(crate) fn open(folder: &Path, max_bytes: u64, signal: watch::Sender<LogSignal>) -> io::Result<Self> {
        let writer = LogWriter::open(folder, max_bytes)?;
        Ok(Self {
            writer: Arc::new(Mutex::new(writer)),
            turn: Arc::default(),
            signal,
        })
    }

    /// What is stored; waits for a round that is being written.
    pub(crate) async fn stored(&self) -> Stored {
        self.append(Vec::new()).await
    }

    /// Stores records and answers what is stored then. A slow disk holds up this VM's output only.
    pub(crate) async fn append(&self, records: Vec<LogRecord>) -> Stored {
        let turn = self.turn.clone().lock_owned().await;
        let sink = self.clone();
        let round = tokio::task::spawn_blocking(move || {
            // Kept by the thread, not by the caller, who may be gone before it ends.
            let _turn = turn;
            let mut writer = sink.writer.lock().unwrap_or_else(PoisonError::into_inner);
            writer.append(&records);
            if !records.is_empty() {
                sink.signal.send_modify(|signal| signal.rounds += 1);
            }
            writer.stored()
        });
        // Only a panic in there or the end of the runtime: nothing is acknowledged then.
        round.await.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn callers_that_come_and_go_while_the_disk_is_slow_park_one_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(2)
            .build()
            .unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let sink = LogSink::open(folder.path(), 1 << 20, watch::Sender::default()).unwrap();
            let disk = sink.writer.clone();
            let (locked, is_locked) = std::sync::mpsc::channel();
            let (release, released) = std::sync::mpsc::channel::<()>();
            let slow = std::thread::spawn(move || {
                let _writer = disk.lock().unwrap();
                locked.send(()).unwrap();
                let _ = released.recv();
            });
            is_locked.recv().unwrap();
            let callers: Vec<_> = (0..8)
                .map(|_| {
                    let sink = sink.clone();
                    tokio::spawn(async move { sink.stored().await })
                })
                .collect();
            tokio::task::yield_now().await;
            callers[1..].iter().for_each(|caller| caller.abort());
            let other = tokio::task::spawn_blocking(|| 7);
            let other = tokio::time::timeout(Duration::from_secs(20), other).await;
            drop(release);
            slow.join().unwrap();
            assert_eq!(other.expect("a thread for others").unwrap(), 7);
        });
    }
}
