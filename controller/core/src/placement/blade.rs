//! What placement knows of one blade, apart from what is reserved on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::labels::Labels;

/// What placement knows of one blade.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blade {
    /// Heard of lately.
    pub ready: bool,
    /// Calls do not reach it, whatever it says of itself.
    pub unreachable: bool,
    /// Cordoned by an operator.
    pub cordoned: bool,
    /// Marks that keep agents away which do not tolerate them.
    pub taints: Vec<Taint>,
    /// For selectors, affinities and topology keys.
    pub labels: Labels,
    /// Allocatable CPU, thousandths of a core, before overcommit.
    pub cpu_millis: u64,
    /// Allocatable memory, MiB, before overcommit.
    pub memory_mib: u64,
    /// How much more than that may be reserved.
    pub overcommit: Overcommit,
    /// Memory one microVM takes beside its guest's, MiB.
    pub overhead_mib: u64,
    /// Most microVMs at a time; 0: no own limit.
    pub max_vms: u32,
    /// Most microVMs that are on their way up at a time; 0: no limit.
    pub max_starts: u32,
    /// Devices and the like, by name: whole numbers, never overcommitted.
    pub extended: BTreeMap<String, u64>,
    /// References and digests of images in the blade's store, with their size in bytes (0: not known).
    pub images: BTreeMap<String, u64>,
    /// Snapshots that lie on the blade.
    pub snapshots: BTreeSet<String>,
    /// Warm agents that wait to be claimed, by pool.
    pub warm: BTreeMap<String, u32>,
}

impl Blade {
    /// CPU that may be reserved, thousandths of a core.
    #[must_use]
    pub fn cpu_room(&self) -> u64 {
        percent_of(self.cpu_millis, self.overcommit.cpu_percent)
    }

    /// Memory that may be reserved, MiB, overheads included.
    #[must_use]
    pub fn memory_room(&self) -> u64 {
        percent_of(self.memory_mib, self.overcommit.memory_percent)
    }
}

fn percent_of(amount: u64, percent: u32) -> u64 {
    if percent == 100 {
        return amount;
    }
    let scaled = u128::from(amount) * u128::from(percent) / 100;
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// What may be reserved, in hundredths of what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overcommit {
    /// Of CPU; 100: no overcommit.
    pub cpu_percent: u32,
    /// Of memory; 100: no overcommit.
    pub memory_percent: u32,
}

impl Default for Overcommit {
    fn default() -> Self {
        Self {
            cpu_percent: 100,
            memory_percent: 100,
        }
    }
}

/// A mark that keeps agents away.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Taint {
    /// Name of the mark.
    pub key: String,
    /// Value of the mark, possibly empty.
    pub value: String,
    /// What it does to agents that do not tolerate it.
    pub effect: Effect,
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            write!(f, "{{{}}}", self.key)
        } else {
            write!(f, "{{{}: {}}}", self.key, self.value)
        }
    }
}

/// What a taint does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// No new agents.
    NoSchedule,
    /// No new agents where another blade will do.
    PreferNoSchedule,
    /// No new agents, and those that run there leave (which is not placement's to do).
    NoExecute,
}
