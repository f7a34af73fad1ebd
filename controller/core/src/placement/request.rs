//! What one agent asks of placement.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    blade::{Effect, Taint},
    labels::{Labels, Selector},
};

/// What one agent needs, wants and is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// The agent's namespace: fairness, and whose agents its terms speak of.
    pub namespace: String,
    /// The agent's own labels: what the terms of others look at.
    pub labels: Labels,
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// MiB of the guest, without the overhead of its microVM.
    pub memory_mib: u64,
    /// Devices and the like, by name.
    pub extended: BTreeMap<String, u64>,
    /// Image reference, for locality only.
    pub image: String,
    /// Snapshot it would begin from, for locality only.
    pub snapshot: Option<String>,
    /// Pool it belongs to.
    pub pool: Option<Pool>,
    /// Labels a blade must have.
    pub node_selector: Labels,
    /// What blades it needs and wants.
    pub node_affinity: NodeAffinity,
    /// Taints it bears.
    pub tolerations: Vec<Toleration>,
    /// What agents it needs, wants and refuses beside it.
    pub agents: AgentAffinity,
    /// How agents like it are to be spread.
    pub spread: Vec<Spread>,
    /// More is placed first among those that wait.
    pub priority: i32,
    /// Instead of the placer's own.
    pub packing: Option<Packing>,
    /// The only blade that will do.
    pub node_name: Option<String>,
    /// Blades not to use now: they refused lately.
    pub avoid: BTreeSet<String>,
}

/// The pool an agent belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pool {
    /// Namespace and name, or whatever else tells pools apart.
    pub name: String,
    /// Most agents of it at a time; `None`: no limit.
    pub max: Option<u32>,
}

/// Which blade is better: the emptier or the fuller one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Least allocated first.
    #[default]
    Spread,
    /// Most allocated first: keeps whole blades free for large agents.
    Binpack,
}

/// Affinity to blades.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct NodeAffinity {
    /// One of these must match; none: every blade will do. A term without requirements matches no blade.
    pub required: Vec<Selector>,
    /// Weight (1 to 100) and what earns it.
    pub preferred: Vec<(i32, Selector)>,
}

impl NodeAffinity {
    pub(super) fn allows(&self, labels: &Labels) -> bool {
        self.required.is_empty() || self.required.iter().any(|term| term_matches(term, labels))
    }

    /// Share of the preferred weights that the labels earn, thousandths; 0 where nothing is preferred.
    pub(super) fn earned(&self, labels: &Labels) -> i32 {
        let all: i64 = self.preferred.iter().map(|(weight, _)| i64::from(*weight)).sum();
        let earning = self.preferred.iter().filter(|(_, term)| term_matches(term, labels));
        let earned: i64 = earning.map(|(weight, _)| i64::from(*weight)).sum();
        i32::try_from(earned * 1000 / all.max(1)).unwrap_or(0)
    }
}

/// As in Kubernetes, a node selector term without requirements matches nothing.
fn term_matches(term: &Selector, labels: &Labels) -> bool {
    !term.requirements.is_empty() && term.matches(labels)
}

/// A taint, or a kind of taints, that an agent bears.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Toleration {
    /// Name of the taint; `None`: of any name.
    pub key: Option<String>,
    /// Value of the taint; `None`: any value.
    pub value: Option<String>,
    /// Effect of the taint; `None`: any effect.
    pub effect: Option<Effect>,
}

impl Toleration {
    /// Whether this taint is meant.
    #[must_use]
    pub fn tolerates(&self, taint: &Taint) -> bool {
        self.effect.is_none_or(|effect| effect == taint.effect)
            && self.key.as_ref().is_none_or(|key| *key == taint.key)
            && self.value.as_ref().is_none_or(|value| *value == taint.value)
    }
}

/// Affinity to other agents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentAffinity {
    /// Each must have a match in the blade's domain.
    pub required: Vec<AgentTerm>,
    /// None may have a match in the blade's domain; and no agent that a term of these matches comes there later.
    pub forbidden: Vec<AgentTerm>,
    /// Weight (1 to 100, or negative for agents that are rather not wanted) and what earns it.
    pub preferred: Vec<(i32, AgentTerm)>,
}

/// Some agents within a domain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AgentTerm {
    /// Namespaces of the agents that are meant.
    pub namespaces: BTreeSet<String>,
    /// Their labels.
    pub selector: Selector,
    /// Label of blades; blades with the same value are one domain, blades without it are in none.
    pub topology_key: String,
}

impl AgentTerm {
    /// Whether an agent of this namespace with these labels is meant.
    #[must_use]
    pub fn matches(&self, namespace: &str, labels: &Labels) -> bool {
        self.namespaces.contains(namespace) && self.selector.matches(labels)
    }
}

/// How agents are to be spread over domains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spread {
    /// Which agents are counted, and over which domains.
    pub term: AgentTerm,
    /// Most that a domain may have more than the one with the fewest; at least 1.
    pub max_skew: u32,
    /// Rather wait than exceed it; else it only lowers the score.
    pub is_required: bool,
}
