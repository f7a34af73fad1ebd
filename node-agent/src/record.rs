//! One attempt's record in the ledger, and the one-way road it takes.
//!
//! ```text
//! Accepted ─► Preparing ─► Starting ─► Running ─► Stopping ─► Ended
//!     │           │            │ │        └──────────────────► ▲
//!     └───────────┴────────────┴─┼► Stopping (asked to end) ──┘
//!                                └► Warm ─► Ended (claimed)    and straight to Ended from anywhere
//! ```
//! A warm attempt waits after Hello until another attempt claims its microVM. The claimant's record begins in Starting and
//! holds the VM from then on; the warm one's only says that it ended and who has its VM.
//!
//! Pure: times come in as arguments. Every change is a [`Fact`]; a fact that does not fit the record's state is refused,
//! so that a hostile guest or a repeated call cannot move a record backwards.
//!
//! Invariant: nothing changes an ended record except that it is forgotten.

use crate::{
    control::delivery::Launch,
    names::{AttemptKey, VmId},
    spec::{Identity, Spec},
};
use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch.
pub type UnixMs = u64;

/// Where an attempt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// In the ledger.
    Accepted,
    /// Image and files.
    Preparing,
    /// VMM about to be spawned or spawned, no payload yet.
    Starting,
    /// The guest said Hello and waits until another attempt claims it.
    Warm,
    /// The guest said Ready.
    Running,
    /// Asked to end.
    Stopping,
    /// Final.
    Ended,
}

/// Why an attempt ended: closed set, design section 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)] // The names say it; node.proto has the texts.
pub enum EndReason {
    Completed,
    Error,
    Signal,
    OomKilled,
    KernelPanic,
    BootTimeout,
    VmmCrashed,
    ImageError,
    NetworkError,
    DeadlineExceeded,
    Evicted,
    NodeLost,
    BladeRebooted,
    InitLost,
}

/// The VMM of this attempt was or is about to be spawned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawn {
    /// When.
    pub at: UnixMs,
    /// Boot id of the blade's kernel then.
    pub boot_id: String,
}

/// The attempt took over the VM of a warm one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// When.
    pub at: UnixMs,
    /// Whose VM it was.
    pub warm: AttemptKey,
}

/// Someone asked the attempt to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopOrder {
    /// When.
    pub at: UnixMs,
    /// Seconds between TERM and KILL.
    pub grace_s: u32,
    /// `None`: the end keeps its own reason.
    pub reason: Option<EndReason>,
}

/// What the guest reported of its payload's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// When it arrived.
    pub at: UnixMs,
    /// How the payload ended.
    pub how: ExitHow,
    /// The guest's kernel killed for memory.
    pub oom_killed: bool,
    /// Why the payload never ran; empty where it did.
    pub start_error: String,
}

/// How a payload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitHow {
    /// exit(2) code, 0 to 255.
    Code(u8),
    /// Signal number, 1 to 64.
    Signal(u8),
}

/// What the VM got.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// vCPUs.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u32,
    /// "kvm" or "tcg".
    pub accelerator: String,
    /// "firecracker" or "qemu".
    pub vmm: String,
    /// A NIC besides vsock.
    pub nic: bool,
    /// Why there is none.
    pub no_nic_reason: String,
}

/// The end of an attempt, as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// Only from an exit report.
    pub exit_code: Option<i32>,
    /// Only from an exit report.
    pub signal: Option<i32>,
    /// For people, at most 1 KiB.
    pub message: String,
    /// Last 2 KiB of output.
    pub tail: String,
}

/// One attempt, as the ledger keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whose.
    pub identity: Identity,
    /// Name of the VM: the attempt's own name, or that of the warm attempt it claimed.
    pub vm_id: VmId,
    /// Where it stands.
    pub phase: Phase,
    /// CPU it was admitted with, thousandths of a core.
    pub cpu_millis: u32,
    /// Memory it was admitted with, MiB.
    pub memory_mib: u32,
    /// The spec's grace period, seconds.
    pub grace_s: u32,
    /// Seconds from the spawn on; 0: none.
    pub deadline_s: u32,
    /// Waits after its boot until another attempt claims its VM.
    #[serde(default)]
    pub start_on_claim: bool,
    /// The VM was a warm attempt's.
    #[serde(default)]
    pub claim: Option<Claim>,
    /// The attempt that has this one's VM now: VM, log and slot are no longer this one's.
    #[serde(default)]
    pub claimed_by: Option<AttemptKey>,
    /// When it was recorded.
    pub accepted_at: UnixMs,
    /// Boot id of the blade's kernel then; empty in a ledger of an earlier far-node.
    #[serde(default)]
    pub boot_id: String,
    /// Written before the VMM is spawned.
    pub spawn: Option<Spawn>,
    /// Hello.
    pub booted_at: Option<UnixMs>,
    /// Ready.
    pub started_at: Option<UnixMs>,
    /// Ended.
    pub finished_at: Option<UnixMs>,
    /// Digest of the image's manifest.
    pub image_digest: Option<String>,
    /// What the VM got.
    pub resources: Option<Resources>,
    /// What the guest is told to run, as it was resolved with that image.
    pub launch: Option<Launch>,
    /// Hex of the guest's boot nonce.
    pub boot_nonce: Option<String>,
    /// Somebody asked it to end.
    pub stop: Option<StopOrder>,
    /// The guest's exit report.
    pub exit: Option<ExitReport>,
    /// Present exactly in [`Phase::Ended`].
    pub end: Option<End>,
    /// What it waits for or goes without, for people, at most 1 KiB.
    pub message: String,
    /// CPU time of the VMM, microseconds; 0: not known.
    pub vmm_cpu_us: u64,
    /// Set when forgotten: what is left is a tombstone.
    pub forgotten_at: Option<UnixMs>,
}

/// Something that happened to an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// Work on the image began.
    Preparing,
    /// The VMM is about to be spawned.
    Spawning {
        /// When and under which boot of the blade.
        spawn: Spawn,
        /// Digest of the image.
        image_digest: String,
        /// What the VM gets.
        resources: Resources,
        /// What the guest is to run.
        launch: Box<Launch>,
        /// What it goes without.
        message: String,
    },
    /// First Hello of the guest.
    Hello {
        /// When.
        at: UnixMs,
        /// Hex of the boot nonce.
        nonce: String,
    },
    /// The payload runs.
    Ready {
        /// When.
        at: UnixMs,
        /// Warnings of the guest, joined.
        message: String,
    },
    /// Somebody asked it to end. A second order changes nothing.
    StopOrdered(StopOrder),
    /// The guest reported the end of its payload.
    Exited(ExitReport),
    /// Another attempt has its VM now.
    Claimed {
        /// When.
        at: UnixMs,
        /// Whose it is.
        by: Identity,
    },
    /// It is over.
    Ended {
        /// When.
        at: UnixMs,
        /// How.
        end: End,
        /// CPU time of the VMM, microseconds; 0: not known.
        vmm_cpu_us: u64,
    },
    /// It may be forgotten.
    Forgotten {
        /// When.
        at: UnixMs,
    },
}

/// A fact that does not fit the record's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("attempt in phase {phase:?} cannot take the fact {fact}")]
pub struct Misfit {
    /// Phase of the record.
    pub phase: Phase,
    /// Kind of the fact.
    pub fact: &'static str,
}

impl Record {
    /// The start of the blade's kernel that its VM belongs to, or would.
    #[must_use]
    pub fn boot(&self) -> &str {
        self.spawn.as_ref().map_or(&self.boot_id, |spawn| &spawn.boot_id)
    }

    /// A new record in [`Phase::Accepted`].
    #[must_use]
    pub fn accepted(identity: Identity, spec: &Spec, boot_id: &str, at: UnixMs) -> Self {
        let mut record = Self::bare(identity, at);
        boot_id.clone_into(&mut record.boot_id);
        record.cpu_millis = spec.cpu_millis;
        record.memory_mib = spec.memory_mib;
        record.grace_s = spec.grace_s;
        record.deadline_s = spec.deadline_s;
        record.start_on_claim = spec.start_on_claim;
        record
    }

    /// The record of an attempt that takes over the VM of this warm one, which says how it was booted.
    #[must_use]
    pub fn claimant(&self, identity: Identity, spec: &Spec, launch: Launch, at: UnixMs) -> Self {
        Self {
            vm_id: self.vm_id.clone(),
            phase: Phase::Starting,
            start_on_claim: false,
            claim: Some(Claim {
                at,
                warm: self.identity.key.clone(),
            }),
            spawn: self.spawn.clone(),
            booted_at: self.booted_at,
            boot_nonce: self.boot_nonce.clone(),
            image_digest: self.image_digest.clone(),
            resources: self.resources.clone(),
            launch: Some(launch),
            message: self.message.clone(),
            ..Self::accepted(identity, spec, &self.boot_id, at)
        }
    }

    /// Name of the record in the ledger.
    #[must_use]
    pub fn name(&self) -> VmId {
        VmId::of(&self.identity.key)
    }

    /// When the work began: the spawn, or the claim of a VM that ran already.
    #[must_use]
    pub fn began_at(&self) -> Option<UnixMs> {
        let claimed_at = self.claim.as_ref().map(|claim| claim.at);
        claimed_at.or_else(|| self.spawn.as_ref().map(|spawn| spawn.at))
    }

    /// The record of an attempt that was told to stop before it was ever asked for: it ended before it began.
    #[must_use]
    pub fn ended_before_it_began(identity: Identity, at: UnixMs) -> Self {
        let mut record = Self::bare(identity, at);
        record.phase = Phase::Ended;
        record.finished_at = Some(at);
        record.end = Some(End {
            reason: EndReason::Evicted,
            exit_code: None,
            signal: None,
            message: "stopped before it was started on this blade".to_owned(),
            tail: String::new(),
        });
        record
    }

    fn bare(identity: Identity, at: UnixMs) -> Self {
        Self {
            vm_id: VmId::of(&identity.key),
            identity,
            phase: Phase::Accepted,
            cpu_millis: 0,
            memory_mib: 0,
            grace_s: 0,
            deadline_s: 0,
            start_on_claim: false,
            claim: None,
            claimed_by: None,
            accepted_at: at,
            boot_id: String::new(),
            spawn: None,
            booted_at: None,
            started_at: None,
            finished_at: None,
            image_digest: None,
            resources: None,
            launch: None,
            boot_nonce: None,
            stop: None,
            exit: None,
            end: None,
            message: String::new(),
            vmm_cpu_us: 0,
            forgotten_at: None,
        }
    }

    /// True once it is over.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Takes a fact.
    ///
    /// # Errors
    /// [`Misfit`], and the record is unchanged.
    pub fn apply(&mut self, fact: Fact) -> Result<(), Misfit> {
        let misfit = |fact| {
            Err(Misfit {
                phase: self.phase,
                fact,
            })
        };
        match fact {
            Fact::Preparing => match self.phase {
                Phase::Accepted => self.phase = Phase::Preparing,
                Phase::Preparing => {}
                Phase::Starting | Phase::Warm | Phase::Running | Phase::Stopping | Phase::Ended => {
                    return misfit("Preparing");
                }
            },
            Fact::Spawning {
                spawn,
                image_digest,
                resources,
                launch,
                message,
            } => {
                if self.phase != Phase::Preparing || self.spawn.is_some() {
                    return misfit("Spawning");
                }
                self.phase = Phase::Starting;
                self.spawn = Some(spawn);
                self.image_digest = Some(image_digest);
                self.resources = Some(resources);
                self.launch = Some(*launch);
                self.message = message;
            }
            Fact::Hello { at, nonce } => {
                if self.is_ended() || self.spawn.is_none() || self.boot_nonce.is_some() {
                    return misfit("Hello");
                }
                if self.start_on_claim && self.phase == Phase::Starting {
                    self.phase = Phase::Warm;
                }
                self.booted_at = Some(at);
                self.boot_nonce = Some(nonce);
            }
            Fact::Ready { at, message } => {
                if self.is_ended() || self.start_on_claim || self.booted_at.is_none() || self.started_at.is_some() {
                    return misfit("Ready");
                }
                if self.phase == Phase::Starting {
                    self.phase = Phase::Running;
                }
                self.started_at = Some(at);
                if !message.is_empty() {
                    self.message = message;
                }
            }
            Fact::StopOrdered(order) => {
                if self.is_ended() {
                    return misfit("StopOrdered");
                }
                self.phase = Phase::Stopping;
                self.stop.get_or_insert(order);
            }
            Fact::Exited(report) => {
                if self.is_ended() || self.start_on_claim || self.booted_at.is_none() || self.exit.is_some() {
                    return misfit("Exited");
                }
                self.exit = Some(report);
            }
            Fact::Claimed { at, by } => {
                if self.phase != Phase::Warm {
                    return misfit("Claimed");
                }
                self.phase = Phase::Ended;
                self.finished_at = Some(at);
                self.end = Some(End {
                    reason: EndReason::Evicted,
                    exit_code: None,
                    signal: None,
                    message: format!("claimed by {}/{}", by.namespace, by.name),
                    tail: String::new(),
                });
                self.claimed_by = Some(by.key);
                self.message.clear();
            }
            Fact::Ended { at, end, vmm_cpu_us } => {
                if self.is_ended() {
                    return misfit("Ended");
                }
                self.phase = Phase::Ended;
                self.finished_at = Some(at);
                self.end = Some(end);
                self.vmm_cpu_us = vmm_cpu_us.max(self.vmm_cpu_us);
                self.message.clear();
            }
            Fact::Forgotten { at } => {
                if !self.is_ended() {
                    return misfit("Forgotten");
                }
                self.forgotten_at.get_or_insert(at);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::spec::{
        check_identity, check_spec,
        tests::{wire_identity, wire_spec},
    };
    use proptest::prelude::*;

    pub(crate) fn fresh() -> Record {
        let identity = check_identity(Some(wire_identity("u", 1))).unwrap();
        Record::accepted(identity, &check_spec(Some(wire_spec())).unwrap(), "boot-1", 1000)
    }

    pub(crate) fn an_end(reason: EndReason) -> End {
        End {
            reason,
            exit_code: None,
            signal: None,
            message: String::new(),
            tail: String::new(),
        }
    }

    pub(crate) fn spawning(at: UnixMs) -> Fact {
        Fact::Spawning {
            spawn: Spawn {
                at,
                boot_id: "boot-1".into(),
            },
            image_digest: "sha256:0".into(),
            resources: Resources::default(),
            launch: Box::new(Launch {
                program: "/bin/true".into(),
                args: vec![],
                image_env: vec![],
                working_dir: "/".into(),
                user: String::new(),
                nic: None,
            }),
            message: String::new(),
        }
    }

    fn exited(at: UnixMs) -> Fact {
        Fact::Exited(ExitReport {
            at,
            how: ExitHow::Code(0),
            oom_killed: false,
            start_error: String::new(),
        })
    }

    fn any_fact() -> impl Strategy<Value = Fact> {
        let stop = |grace_s| {
            Fact::StopOrdered(StopOrder {
                at: 5,
                grace_s,
                reason: None,
            })
        };
        prop_oneof![
            Just(Fact::Preparing),
            Just(spawning(2)),
            Just(Fact::Hello {
                at: 3,
                nonce: "n".into()
            }),
            Just(Fact::Ready {
                at: 4,
                message: String::new()
            }),
            (0_u32..9).prop_map(stop),
            Just(exited(6)),
            Just(Fact::Ended {
                at: 7,
                end: an_end(EndReason::Completed),
                vmm_cpu_us: 1
            }),
            Just(Fact::Forgotten { at: 8 }),
        ]
    }

    proptest! {
        #[test]
        fn no_order_of_facts_moves_a_record_backwards(facts in proptest::collection::vec(any_fact(), 0..30)) {
            let mut record = fresh();
            for fact in facts {
                let before = record.clone();
                let taken = record.apply(fact.clone());
                prop_assert!(record.phase >= before.phase, "{fact:?}");
                prop_assert_eq!(record.end.is_some(), record.is_ended());
                if taken.is_err() { prop_assert_eq!(&record, &before); }
                if before.is_ended() {
                    prop_assert_eq!(Record { forgotten_at: None, ..record.clone() }, Record { forgotten_at: None, ..before.clone() });
                }
                if before.spawn.is_some() { prop_assert_eq!(&record.spawn, &before.spawn); }
                if before.stop.is_some() { prop_assert_eq!(&record.stop, &before.stop); }
                if before.exit.is_some() { prop_assert_eq!(&record.exit, &before.exit); }
            }
        }
    }

    #[test]
    fn the_straight_road_is_taken() {
        let mut record = fresh();
        let road = [
            (Fact::Preparing, Phase::Preparing),
            (spawning(1), Phase::Starting),
            (
                Fact::Hello {
                    at: 2,
                    nonce: "n".into(),
                },
                Phase::Starting,
            ),
            (
                Fact::Ready {
                    at: 3,
                    message: String::new(),
                },
                Phase::Running,
            ),
            (exited(4), Phase::Running),
            (
                Fact::Ended {
                    at: 5,
                    end: an_end(EndReason::Completed),
                    vmm_cpu_us: 0,
                },
                Phase::Ended,
            ),
        ];
        for (fact, phase) in road {
            record.apply(fact).unwrap();
            assert_eq!(record.phase, phase);
        }
    }

    #[test]
    fn an_exit_before_hello_is_refused() {
        let mut record = fresh();
        record.apply(Fact::Preparing).unwrap();
        record.apply(spawning(1)).unwrap();
        assert!(record.apply(exited(2)).is_err());
    }

    #[test]
    fn a_stop_during_preparation_keeps_the_vmm_from_being_spawned() {
        let mut record = fresh();
        record.apply(Fact::Preparing).unwrap();
        record
            .apply(Fact::StopOrdered(StopOrder {
                at: 1,
                grace_s: 1,
                reason: None,
            }))
            .unwrap();
        assert!(record.apply(spawning(2)).is_err());
    }
}
