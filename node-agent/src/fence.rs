//! The blade's lease: until when its agents may run without an answer of the controller to a heartbeat. When it is over,
//! the controller may start them elsewhere; so they end here first.
//!
//! ```text
//! no lease ─ first answer with a fence time ─► lease ─ answers renew it … ─ over ─► every attempt ends (NodeLost)
//! ```
//! The lease is a file that every far-vmm reads as well, so that its VM ends in time where far-node is dead, stopped or
//! slow. What only far-node can end are attempts without a VM yet: it does that when the lease is over, or first thing
//! when it starts after that.
//!
//! Invariant: an answer renews the lease from the moment its heartbeat was sent, never from when the answer came.

use crate::{
    files::{gone_is_fine, remove_file},
    record::EndReason,
    supervisor::Supervisor,
};
use far_vmm::lease;
use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between two looks at the clock; far-vmm looks as often. tokio's own clock stands still while the machine sleeps.
const LOOK: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub struct Fence {
    file: PathBuf,
    /// Milliseconds of [`lease::now_ms`].
    until: watch::Sender<Option<u64>>,
}

impl Fence {
    /// Goes on with the lease of an earlier far-node of this start of the machine. Blocking.
    ///
    /// # Errors
    /// The folder cannot be read, or an old lease cannot be removed.
    pub fn open(state_dir: &Path, boot_id: &str) -> io::Result<Self> {
        let file = state_dir.join(format!("lease-{boot_id}"));
        for entry in fs::read_dir(state_dir)? {
            let path = entry?.path();
            let is_lease = path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("lease-"));
            if is_lease && path != file {
                remove_file(&path)?;
            }
        }
        let until = watch::channel(lease::read(&file)).0;
        Ok(Self { file, until })
    }

    /// What every far-vmm is to read.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Now, on the lease's clock.
    #[must_use]
    pub fn now() -> u64 {
        lease::now_ms()
    }

    /// A heartbeat that was sent at `sent` was answered. No fence time: there is no lease any more. Blocking.
    ///
    /// # Errors
    /// The lease cannot be written: the old one stays.
    pub fn renew(&self, sent: u64, fence_after: Option<Duration>) -> io::Result<()> {
        let Some(fence_after) = fence_after else {
            gone_is_fine(fs::remove_file(&self.file))?;
            self.until.send_replace(None);
            return Ok(());
        };
        let until = sent.saturating_add(crate::outcome::millis(fence_after));
        let line = lease::line(until);
        // No fsync: what the machine forgets when it dies is a lease of VMs that died with it.
        match File::options().write(true).open(&self.file) {
            // In place, as many bytes as before: a full disk ends nobody's lease.
            Ok(file) => file.write_all_at(line.as_bytes(), 0)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let temporary = self.file.with_extension("tmp");
                fs::write(&temporary, line)?;
                fs::rename(&temporary, &self.file)?;
            }
            Err(error) => return Err(error),
        }
        self.until.send_replace(Some(until));
        Ok(())
    }

    /// Whether the agents must have ended at `now`.
    #[must_use]
    pub fn is_over(&self, now: u64) -> bool {
        self.until.borrow().is_some_and(|until| until <= now)
    }

    /// Ends every attempt whenever the lease is over, until `shutdown`.
    pub(crate) async fn watch_over(&self, supervisor: Supervisor, shutdown: CancellationToken) {
        loop {
            if self.is_over(Self::now()) {
                end_all(&supervisor).await;
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// What an earlier far-node could not end any more. Before anything is served or renewed.
    pub(crate) async fn catch_up(&self, supervisor: &Supervisor) {
        if self.is_over(Self::now()) {
            end_all(supervisor).await;
        }
    }
}

/// Also those that have no VM yet, and would get one. VMs are ended by their far-vmm at the same time.
async fn end_all(supervisor: &Supervisor) {
    let (entries, _) = supervisor.blade().board.entries();
    for record in entries.iter().map(|entry| &entry.record) {
        if record.is_ended()
            || record
                .stop
                .as_ref()
                .is_some_and(|order| order.reason == Some(EndReason::NodeLost))
        {
            continue;
        }
        tracing::warn!(vm.id = %record.vm_id, "no controller answered for the whole fence time: the agent is ended");
        let stopped = supervisor
            .stop(record.identity.clone(), Some(0), Some(EndReason::NodeLost))
            .await;
        if let Err(error) = stopped {
            tracing::warn!(vm.id = %record.vm_id, %error, "the agent could not be ended yet: trying again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_renewed_from_when_the_heartbeat_was_sent_and_outlives_far_node() {
        let folder = tempfile::tempdir().unwrap();
        let fence = Fence::open(folder.path(), "boot1").unwrap();
        assert!(!fence.is_over(u64::MAX), "no controller asked for it");
        fence.renew(1_000, Some(Duration::from_secs(5))).unwrap();
        assert!(!fence.is_over(5_999) && fence.is_over(6_000));
        assert_eq!(lease::read(fence.file()), Some(6_000), "as far-vmm reads it");

        let next = Fence::open(folder.path(), "boot1").unwrap();
        assert!(
            !next.is_over(5_999) && next.is_over(6_000),
            "a far-node that starts anew"
        );
        next.renew(10_000, Some(Duration::from_secs(5))).unwrap();
        assert!(!next.is_over(6_000));
        next.renew(11_000, None).unwrap();
        assert!(!next.is_over(u64::MAX) && lease::read(next.file()).is_none());
        next.renew(12_000, Some(Duration::from_secs(5))).unwrap();
        let rebooted = Fence::open(folder.path(), "boot2").unwrap();
        assert!(!rebooted.is_over(u64::MAX), "the clock began anew with the machine");
        assert!(!next.file().exists());
    }

    #[test]
    fn a_lease_is_renewed_where_no_file_can_be_made() {
        let folder = tempfile::tempdir().unwrap();
        let fence = Fence::open(folder.path(), "boot1").unwrap();
        fence.renew(1_000, Some(Duration::from_secs(5))).unwrap();
        let size = fs::metadata(fence.file()).unwrap().len();
        // As on a full disk: a new file with content is refused.
        fs::create_dir(folder.path().join("lease-boot1.tmp")).unwrap();
        fence.renew(u64::MAX - 5_000, Some(Duration::from_secs(5))).unwrap();
        assert_eq!(lease::read(fence.file()), Some(u64::MAX));
        assert_eq!(fs::metadata(fence.file()).unwrap().len(), size, "it needs no new block");
    }
}
