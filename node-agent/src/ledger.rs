//! The ledger: one record per attempt, on disk before anything is done about it.
//!
//! `<folder>/<VmId>.json` is the record, replaced as a whole at each change; `<VmId>.spec.json` the spec without its
//! secrets, written once before the record. A record that cannot be read is kept aside as `<VmId>.damaged` and its
//! attempt is never booted: not knowing is no permission.
//!
//! A record is named after its attempt; the VM it speaks of may be another's that it claimed.
//!
//! Invariant: one attempt boots at most once; the record says Starting (fsync) before the VMM is spawned.
//! Invariant: a warm attempt is claimed at most once: the claimant's record is the claim, and the warm one's end follows
//! from it, at the next start if not before.

use crate::{
    files::{read_if_there, remove_file, write_atomic},
    names::VmId,
    record::{Fact, Record, UnixMs},
    spec::{Spec, SpecWithoutSecrets},
};
use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long a forgotten attempt's identity is kept, so that a late EnsureAgent cannot boot it again.
pub(crate) const TOMBSTONE_KEPT: Duration = Duration::from_secs(24 * 3600);

/// The ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A write failed: nothing may be done about the attempt.
    #[error("writing {what} of {vm} to the ledger")]
    Write {
        /// "the record" or "the spec".
        what: &'static str,
        /// Whose.
        vm: VmId,
        /// Why.
        source: io::Error,
    },
    /// The folder cannot be read.
    #[error("reading the ledger folder {}", folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The records' folder.
#[derive(Debug, Clone)]
pub struct Ledger {
    folder: PathBuf,
}

/// What was found at start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Every readable record with its spec (absent for tombstones and attempts that never began).
    pub records: Vec<(Record, Option<Spec>)>,
    /// Attempts whose record cannot be read.
    pub damaged: BTreeSet<VmId>,
}

impl Ledger {
    /// The ledger in `folder`, made where it is not there.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(folder: &Path) -> Result<Self, LedgerError> {
        crate::files::make_private_dir(folder).map_err(|source| LedgerError::Folder {
            folder: folder.to_owned(),
            source,
        })?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    fn record_path(&self, vm: &VmId) -> PathBuf {
        self.folder.join(format!("{vm}.json"))
    }

    fn spec_path(&self, vm: &VmId) -> PathBuf {
        self.folder.join(format!("{vm}.spec.json"))
    }

    fn damaged_path(&self, vm: &VmId) -> PathBuf {
        self.folder.join(format!("{vm}.damaged"))
    }

    /// Writes the record down. Returns after fsync.
    ///
    /// # Errors
    /// The old record is still there.
    pub fn write(&self, record: &Record) -> Result<(), LedgerError> {
        let bytes = serde_json::to_vec(record).expect("a record is plain data");
        write_atomic(&self.record_path(&record.name()), &bytes).map_err(|source| LedgerError::Write {
            what: "the record",
            vm: record.name(),
            source,
        })
    }

    /// Writes a spec down, before its record.
    ///
    /// # Errors
    /// There is none then.
    pub fn write_spec(&self, vm: &VmId, spec: &SpecWithoutSecrets) -> Result<(), LedgerError> {
        let bytes = serde_json::to_vec(spec).expect("a spec is plain data");
        write_atomic(&self.spec_path(vm), &bytes).map_err(|source| LedgerError::Write {
            what: "the spec",
            vm: vm.clone(),
            source,
        })
    }

    /// Removes the spec of an ended attempt.
    ///
    /// # Errors
    /// It may still be there.
    pub fn remove_spec(&self, vm: &VmId) -> io::Result<()> {
        remove_file(&self.spec_path(vm))
    }

    /// Removes a tombstone.
    ///
    /// # Errors
    /// It may still be there.
    pub fn remove(&self, vm: &VmId) -> io::Result<()> {
        remove_file(&self.spec_path(vm))?;
        remove_file(&self.record_path(vm))
    }

    /// Reads everything; blocking.
    ///
    /// # Errors
    /// The folder cannot be listed. A single bad record is no error but in [`Loaded::damaged`].
    pub fn load(&self) -> Result<Loaded, LedgerError> {
        let in_folder = |source| LedgerError::Folder {
            folder: self.folder.clone(),
            source,
        };
        let mut loaded = Loaded::default();
        let mut specs = BTreeSet::new();
        for entry in fs::read_dir(&self.folder).map_err(in_folder)? {
            let name = entry.map_err(in_folder)?.file_name().to_string_lossy().into_owned();
            if let Some(vm) = name.strip_suffix(".damaged").and_then(VmId::parse) {
                loaded.damaged.insert(vm);
            } else if let Some(vm) = name.strip_suffix(".spec.json").and_then(VmId::parse) {
                specs.insert(vm);
            } else if let Some(vm) = name.strip_suffix(".json").and_then(VmId::parse) {
                match self.read(&vm) {
                    Some(record) if record.is_ended() => loaded.records.push((record, None)),
                    Some(record) => {
                        let spec = self.read_spec(&vm);
                        loaded.records.push((record, spec));
                    }
                    None => {
                        tracing::error!(vm.id = %vm, "a ledger record cannot be read: it is set aside and its attempt never booted");
                        fs::rename(self.record_path(&vm), self.damaged_path(&vm)).map_err(in_folder)?;
                        loaded.damaged.insert(vm);
                    }
                }
            } else if name.ends_with(".tmp") {
                // Left by a crash between write and rename: it was never true.
                remove_file(&self.folder.join(&name)).map_err(in_folder)?;
            }
        }
        for (record, _) in loaded.records.iter().filter(|(record, _)| !record.is_ended()) {
            specs.remove(&record.name());
        }
        // Left by a crash, or by a disk that failed, between a spec and its record, or between an end and its removal.
        for vm in specs {
            if let Err(error) = self.remove_spec(&vm) {
                tracing::warn!(vm.id = %vm, %error, "a spec that no live attempt has is left in the ledger");
            }
        }
        self.finish_claims(&mut loaded.records)?;
        loaded
            .records
            .sort_by(|(a, _), (b, _)| a.identity.key.cmp(&b.identity.key));
        Ok(loaded)
    }

    /// A claim whose claimant is on disk happened, also where far-node was killed before the warm record said so.
    fn finish_claims(&self, records: &mut [(Record, Option<Spec>)]) -> Result<(), LedgerError> {
        let claims: Vec<_> = records
            .iter()
            .filter_map(|(record, _)| Some((record.claim.clone()?, record.identity.clone())))
            .collect();
        for (claim, by) in claims {
            let warm = records
                .iter_mut()
                .map(|(record, _)| record)
                .find(|record| record.identity.key == claim.warm && !record.is_ended());
            if let Some(warm) = warm
                && warm.apply(Fact::Claimed { at: claim.at, by }).is_ok()
            {
                self.write(warm)?;
            }
        }
        Ok(())
    }

    fn read(&self, name: &VmId) -> Option<Record> {
        let bytes = read_if_there(&self.record_path(name)).ok()??;
        let record: Record = serde_json::from_slice(&bytes).ok()?;
        let owner = record.claim.as_ref().map_or(&record.identity.key, |claim| &claim.warm);
        (record.name() == *name && record.vm_id == VmId::of(owner) && record.end.is_some() == record.is_ended())
            .then_some(record)
    }

    fn read_spec(&self, vm: &VmId) -> Option<Spec> {
        let bytes = read_if_there(&self.spec_path(vm)).ok()??;
        serde_json::from_slice::<SpecWithoutSecrets>(&bytes)
            .ok()
            .map(Spec::from)
    }
}

/// True where a tombstone has lain long enough.
pub(crate) fn is_tombstone_over(record: &Record, now: UnixMs) -> bool {
    record
        .forgotten_at
        .is_some_and(|at| now.saturating_sub(at) >= crate::outcome::millis(TOMBSTONE_KEPT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        record::{
            EndReason,
            tests::{an_end, fresh},
        },
        spec::{check_spec, tests::wire_spec},
    };

    #[test]
    fn what_is_written_is_read_back_without_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let spec = check_spec(Some(wire_spec())).unwrap();
        let record = fresh();
        ledger.write_spec(&record.vm_id, &spec.without_secrets()).unwrap();
        ledger.write(&record).unwrap();
        let loaded = ledger.load().unwrap();
        assert_eq!(
            loaded.records,
            vec![(record.clone(), Some(spec.without_secrets().into()))]
        );
        for entry in fs::read_dir(folder.path()).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            // Base64 of "s3cret" begins so.
            assert!(!text.contains("s3cret") && !text.contains("czNjcmV0"), "{text}");
        }
        ledger.remove(&record.vm_id).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_spec_of_an_attempt_that_ended_or_never_was_recorded_goes_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let spec = check_spec(Some(wire_spec())).unwrap();
        let mut record = fresh();
        ledger.write_spec(&record.vm_id, &spec.without_secrets()).unwrap();
        // A crash before there was a record.
        assert_eq!(ledger.load().unwrap().records, vec![]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        ledger.write_spec(&record.vm_id, &spec.without_secrets()).unwrap();
        let end = Fact::Ended {
            at: 1,
            end: an_end(EndReason::Evicted),
            vmm_cpu_us: 0,
        };
        record.apply(end).unwrap();
        // A crash before the spec was removed.
        ledger.write(&record).unwrap();
        assert_eq!(ledger.load().unwrap().records, vec![(record.clone(), None)]);
        assert!(!folder.path().join(format!("{}.spec.json", record.vm_id)).exists());
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let record = fresh();
        ledger.write(&record).unwrap();
        fs::write(folder.path().join(format!("{}.json", record.vm_id)), b"{\"vm").unwrap();
        fs::write(folder.path().join("left.tmp"), b"half").unwrap();
        for _ in 0..2 {
            let loaded = ledger.load().unwrap();
            assert!(loaded.records.is_empty());
            assert!(loaded.damaged.contains(&record.vm_id));
        }
        assert!(!folder.path().join("left.tmp").exists());
    }

    #[test]
    fn tombstones_are_kept_for_a_day() {
        let mut record = fresh();
        record
            .apply(Fact::Ended {
                at: 0,
                end: an_end(EndReason::Completed),
                vmm_cpu_us: 0,
            })
            .unwrap();
        assert!(!is_tombstone_over(&record, u64::MAX));
        record.apply(Fact::Forgotten { at: 1000 }).unwrap();
        assert!(!is_tombstone_over(&record, 86_400_999));
        assert!(is_tombstone_over(&record, 86_401_000));
    }
}
