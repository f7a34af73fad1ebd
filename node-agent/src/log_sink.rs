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
    signal: watch::Sender<LogSignal>,
}

impl LogSink {
    /// Opens the log in `folder`. Blocking.
    pub(crate) fn open(folder: &Path, max_bytes: u64, signal: watch::Sender<LogSignal>) -> io::Result<Self> {
        let writer = LogWriter::open(folder, max_bytes)?;
        Ok(Self {
            writer: Arc::new(Mutex::new(writer)),
            signal,
        })
    }

    /// What is stored; waits for a round that is being written.
    pub(crate) async fn stored(&self) -> Stored {
        self.append(Vec::new()).await
    }

    /// Stores records and answers what is stored then. A slow disk holds up this VM's output only.
    pub(crate) async fn append(&self, records: Vec<LogRecord>) -> Stored {
        let sink = self.clone();
        let round = tokio::task::spawn_blocking(move || {
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
