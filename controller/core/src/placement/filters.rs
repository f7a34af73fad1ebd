//! Which blades will not do, and why.
//!
//! A blade that already fails for what it is names only the first cause; a full one names everything it lacks.

use std::fmt;

use super::{
    blade::{Blade, Effect},
    fleet::{Room, Slot},
    request::Request,
};

/// Why one blade will not do; `Ord` is the order in which causes are looked at and said.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Their texts follow.
pub enum Cause {
    OtherBladeNamed,
    NotReady,
    Unreachable,
    Cordoned,
    /// The taint, as text.
    Tainted(String),
    SelectorDiffers,
    AffinityDiffers,
    RefusedLately,
    InsufficientCpu,
    InsufficientMemory,
    /// Name of the extended resource.
    Insufficient(String),
    TooManyVms,
    TooManyStarts,
    AgentAffinity,
    AgentAntiAffinity,
    Repelled,
    Skewed,
    /// Name of the pool.
    PoolFull(String),
}

impl Cause {
    /// Room on this very blade would help.
    #[must_use]
    pub fn is_room(&self) -> bool {
        matches!(
            self,
            Self::InsufficientCpu
                | Self::InsufficientMemory
                | Self::Insufficient(_)
                | Self::TooManyVms
                | Self::TooManyStarts
        )
    }

    /// Agents that come or go, on whatever blade, may help.
    #[must_use]
    pub fn is_about_agents(&self) -> bool {
        matches!(
            self,
            Self::AgentAffinity | Self::AgentAntiAffinity | Self::Repelled | Self::Skewed | Self::PoolFull(_)
        )
    }

    /// The filter that says so.
    #[must_use]
    pub fn filter(&self) -> Filter {
        match self {
            Self::OtherBladeNamed => Filter::NodeName,
            Self::NotReady | Self::Unreachable | Self::Cordoned => Filter::Ready,
            Self::Tainted(_) => Filter::Taints,
            Self::SelectorDiffers => Filter::Selector,
            Self::AffinityDiffers => Filter::Affinity,
            Self::InsufficientCpu => Filter::Cpu,
            Self::InsufficientMemory => Filter::Memory,
            Self::Insufficient(_) => Filter::Extended,
            Self::TooManyVms => Filter::Vms,
            Self::TooManyStarts => Filter::Starts,
            Self::AgentAffinity | Self::AgentAntiAffinity | Self::Repelled => Filter::Agents,
            Self::Skewed => Filter::Spread,
            Self::PoolFull(_) => Filter::Pool,
            Self::RefusedLately => Filter::Refusals,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherBladeNamed => "not named by spec.nodeName",
            Self::NotReady => "not ready",
            Self::Unreachable => "not reachable",
            Self::Cordoned => "unschedulable",
            Self::Tainted(taint) => return write!(f, "had untolerated taint {taint}"),
            Self::SelectorDiffers => "didn't match spec.nodeSelector",
            Self::AffinityDiffers => "didn't match the blade affinity",
            Self::RefusedLately => "refused lately",
            Self::InsufficientCpu => "insufficient cpu",
            Self::InsufficientMemory => "insufficient memory",
            Self::Insufficient(name) => return write!(f, "insufficient {name}"),
            Self::TooManyVms => "too many microVMs",
            Self::TooManyStarts => "too many microVMs starting",
            Self::AgentAffinity => "didn't match the agent affinity",
            Self::AgentAntiAffinity => "didn't match the agent anti-affinity",
            Self::Repelled => "had agents whose anti-affinity excludes this one",
            Self::Skewed => "didn't match the topology spread constraints",
            Self::PoolFull(pool) => return write!(f, "not for more agents of pool {pool}"),
        })
    }
}

/// The filters, in the order of the columns of an explanation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Their names follow.
pub enum Filter {
    NodeName,
    Ready,
    Taints,
    Selector,
    Affinity,
    Cpu,
    Memory,
    Extended,
    Vms,
    Starts,
    Agents,
    Spread,
    Pool,
    Refusals,
}

impl Filter {
    /// Every filter.
    pub const ALL: [Self; 14] = [
        Self::NodeName,
        Self::Ready,
        Self::Taints,
        Self::Selector,
        Self::Affinity,
        Self::Cpu,
        Self::Memory,
        Self::Extended,
        Self::Vms,
        Self::Starts,
        Self::Agents,
        Self::Spread,
        Self::Pool,
        Self::Refusals,
    ];

    /// Its name, as in JSON and in headings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NodeName => "nodeName",
            Self::Ready => "ready",
            Self::Taints => "taints",
            Self::Selector => "nodeSelector",
            Self::Affinity => "affinity",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Extended => "resources",
            Self::Vms => "vms",
            Self::Starts => "starts",
            Self::Agents => "agents",
            Self::Spread => "spread",
            Self::Pool => "pool",
            Self::Refusals => "refusals",
        }
    }
}

/// Against what a blade is, whatever runs on it. The name is looked at elsewhere: it picks a blade rather than filters.
const OF_THE_BLADE: [fn(&Blade, &Request) -> Option<Cause>; 7] = [
    |blade, _| (!blade.ready).then_some(Cause::NotReady),
    |blade, _| blade.unreachable.then_some(Cause::Unreachable),
    |blade, _| blade.cordoned.then_some(Cause::Cordoned),
    untolerated,
    |blade, request| {
        let mut wanted = request.node_selector.iter();
        wanted
            .any(|(key, value)| blade.labels.get(key) != Some(value))
            .then_some(Cause::SelectorDiffers)
    },
    |blade, request| (!request.node_affinity.allows(&blade.labels)).then_some(Cause::AffinityDiffers),
    |blade, request| {
        let has = |name: &String| blade.extended.get(name).copied().unwrap_or(0);
        let mut wanted = request.extended.iter();
        let lacking = wanted.find(|(name, amount)| **amount > has(name));
        lacking.map(|(name, _)| Cause::Insufficient(name.clone()))
    },
];

fn untolerated(blade: &Blade, request: &Request) -> Option<Cause> {
    let mut taints = blade.taints.iter();
    let against = taints.find(|taint| {
        taint.effect != Effect::PreferNoSchedule && !request.tolerations.iter().any(|one| one.tolerates(taint))
    });
    against.map(|taint| Cause::Tainted(taint.to_string()))
}

impl Blade {
    /// The first thing about the blade itself, apart from its name and its load, that keeps the agent away.
    #[must_use]
    pub fn refuses(&self, request: &Request) -> Option<Cause> {
        OF_THE_BLADE.iter().find_map(|filter| filter(self, request))
    }

    /// Every such thing.
    pub(super) fn refusals(&self, request: &Request) -> impl Iterator<Item = Cause> {
        OF_THE_BLADE.iter().filter_map(|filter| filter(self, request))
    }
}

/// Everything the blade has too little of.
pub(super) fn lacks(slot: &Slot, blade: &Blade, room: &Room, request: &Request) -> Vec<Cause> {
    let mut causes = Vec::new();
    if request.cpu_millis > room.cpu_millis {
        causes.push(Cause::InsufficientCpu);
    }
    let used = &slot.used;
    if !room.has_overhead || request.memory_mib > room.memory_mib {
        causes.push(Cause::InsufficientMemory);
    }
    causes.extend(lacks_extended(slot, blade, request).cloned().map(Cause::Insufficient));
    if blade.max_vms > 0 && used.vms >= blade.max_vms {
        causes.push(Cause::TooManyVms);
    }
    if blade.max_starts > 0 && used.starts >= blade.max_starts {
        causes.push(Cause::TooManyStarts);
    }
    causes
}

/// Extended resources of which too little is left.
pub(super) fn lacks_extended<'a>(
    slot: &'a Slot,
    blade: &'a Blade,
    request: &'a Request,
) -> impl Iterator<Item = &'a String> {
    let lacking = request.extended.iter().filter(|(name, amount)| {
        let has = blade.extended.get(*name).copied().unwrap_or(0);
        let used = slot.used.extended.get(*name).copied().unwrap_or(0);
        used.saturating_add(**amount) > has
    });
    lacking.map(|(name, _)| name)
}
