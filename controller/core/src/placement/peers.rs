//! Agents beside agents: how many match a term in each domain, counted as reservations come and go.
//!
//! A term is counted from the moment somebody asks for it; terms nobody holds are forgotten when there are too many.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    blade::Blade,
    filters::Cause,
    fleet::Fleet,
    labels::Labels,
    request::{AgentTerm, Request},
    reservations::{Held, Reservations},
};

/// Terms that are counted at the same time, apart from those that a running agent holds.
const MAX_TERMS: usize = 1024;

/// Instead of a domain: the blade is in none.
const NOWHERE: u32 = u32::MAX;

/// Domains of one topology key: blades with the same value of that label are one domain.
#[derive(Debug)]
pub(super) struct Topology {
    key: String,
    id: u64,
    /// Domain of each slot.
    of_slot: Vec<u32>,
    names: HashMap<String, u32>,
}

impl Topology {
    /// Another for every key, and after each time that domains were numbered anew.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn domain(&self, number: u32) -> Option<u32> {
        self.of_slot
            .get(number as usize)
            .copied()
            .filter(|domain| *domain != NOWHERE)
    }

    /// Answers whether the slot is in another domain now.
    fn set(&mut self, number: u32, blade: Option<&Blade>) -> bool {
        let at = number as usize;
        if at >= self.of_slot.len() {
            self.of_slot.resize(at + 1, NOWHERE);
        }
        let domain = blade
            .and_then(|blade| blade.labels.get(&self.key))
            .map_or(NOWHERE, |name| {
                let next = u32::try_from(self.names.len()).unwrap_or(NOWHERE);
                match self.names.get(name) {
                    Some(known) => *known,
                    None => *self.names.entry(name.clone()).or_insert(next),
                }
            });
        std::mem::replace(&mut self.of_slot[at], domain) != domain
    }
}

/// Agents by domain.
#[derive(Debug, Default)]
struct Counts {
    of_domain: Vec<u32>,
    /// Domains with any.
    domains: usize,
}

impl Counts {
    fn get(&self, domain: Option<u32>) -> u32 {
        let count = domain.and_then(|domain| self.of_domain.get(domain as usize));
        count.copied().unwrap_or(0)
    }

    fn add(&mut self, domain: Option<u32>, by: i32) {
        let Some(at) = domain.map(|domain| domain as usize) else {
            return;
        };
        if at >= self.of_domain.len() {
            self.of_domain.resize(at + 1, 0);
        }
        let count = &mut self.of_domain[at];
        let before = *count;
        *count = count.saturating_add_signed(by);
        self.domains += usize::from(before == 0 && *count > 0);
        self.domains -= usize::from(before > 0 && *count == 0);
    }

    fn clear(&mut self) {
        self.of_domain.clear();
        self.domains = 0;
    }
}

/// One term and its counts.
#[derive(Debug)]
struct Tally {
    term: Arc<AgentTerm>,
    /// Its place in [`Peers::topologies`].
    topology: usize,
    /// Agents that match the term.
    matching: Counts,
    /// Agents that refuse those that match it.
    holders: Counts,
}

impl Tally {
    /// Counts everything that is reserved.
    fn count_all(&mut self, topology: &Topology, reservations: &Reservations) {
        self.matching.clear();
        self.holders.clear();
        for held in reservations.iter() {
            let domain = topology.domain(held.number);
            if self.term.matches(&held.profile.namespace, &held.profile.labels) {
                self.matching.add(domain, 1);
            }
            if held.forbidden.contains(&self.term) {
                self.holders.add(domain, 1);
            }
        }
    }
}

/// All terms that are counted.
#[derive(Debug, Default)]
pub(super) struct Peers {
    topologies: Vec<Topology>,
    tallies: Vec<Tally>,
    numbers: HashMap<Arc<AgentTerm>, usize>,
    /// Terms that ask for one of some values of a label, by label and value.
    by_label: HashMap<String, HashMap<String, Vec<usize>>>,
    /// The other terms.
    elsewhere: Vec<usize>,
    /// Blades moved to other domains under the counts.
    is_stale: bool,
    next_id: u64,
}

impl Peers {
    /// The blade came, went or changed. Where agents are on it, everything is counted again when it is next asked for.
    pub(super) fn blade_changed(&mut self, fleet: &Fleet, number: u32) {
        let blade = fleet.blade(number).map(|(_, blade)| blade);
        let is_in_use = fleet.slot(number).is_some_and(|slot| slot.used.vms > 0);
        for topology in &mut self.topologies {
            let has_moved = topology.set(number, blade);
            self.is_stale |= has_moved && is_in_use;
        }
    }

    /// The one copy of each term that agents hold.
    pub(super) fn shared(&mut self, fleet: &Fleet, terms: &[AgentTerm]) -> Vec<Arc<AgentTerm>> {
        let shared = terms.iter().map(|term| {
            let number = self.enter(term, fleet, None);
            self.tallies[number].term.clone()
        });
        shared.collect()
    }

    pub(super) fn came(&mut self, held: &Held) {
        self.count(held, 1);
    }

    pub(super) fn went(&mut self, held: &Held) {
        self.count(held, -1);
    }

    fn count(&mut self, held: &Held, by: i32) {
        if self.tallies.is_empty() || self.is_stale {
            return;
        }
        for number in self.matched(&held.profile.namespace, &held.profile.labels) {
            let tally = &mut self.tallies[number];
            tally
                .matching
                .add(self.topologies[tally.topology].domain(held.number), by);
        }
        for term in &held.forbidden {
            if let Some(number) = self.numbers.get(term) {
                let tally = &mut self.tallies[*number];
                tally
                    .holders
                    .add(self.topologies[tally.topology].domain(held.number), by);
            }
        }
    }

    /// Numbers of the terms that an agent matches.
    fn matched(&self, namespace: &str, labels: &Labels) -> Vec<usize> {
        let of_labels = labels
            .iter()
            .filter_map(|(key, value)| self.by_label.get(key)?.get(value))
            .flatten();
        let likely = of_labels.chain(&self.elsewhere).copied();
        likely
            .filter(|number| self.tallies[*number].term.matches(namespace, labels))
            .collect()
    }

    /// Number of a term. It is counted from now on; what is reserved already is counted at once where it is given.
    fn enter(&mut self, term: &AgentTerm, fleet: &Fleet, all: Option<&Reservations>) -> usize {
        if let Some(number) = self.numbers.get(term) {
            return *number;
        }
        let number = self.tallies.len();
        let term = Arc::new(term.clone());
        match term.selector.handle() {
            Some((key, values)) => {
                let by_value = self.by_label.entry(key.to_owned()).or_default();
                let values: BTreeSet<&String> = values.iter().collect();
                for value in values {
                    by_value.entry(value.clone()).or_default().push(number);
                }
            }
            None => self.elsewhere.push(number),
        }
        let mut tally = Tally {
            term: term.clone(),
            topology: self.topology(&term.topology_key, fleet),
            matching: Counts::default(),
            holders: Counts::default(),
        };
        match all {
            Some(reservations) => tally.count_all(&self.topologies[tally.topology], reservations),
            None => self.is_stale = true,
        }
        self.tallies.push(tally);
        self.numbers.insert(term, number);
        number
    }

    fn topology(&mut self, key: &str, fleet: &Fleet) -> usize {
        if let Some(at) = self.topologies.iter().position(|topology| topology.key == key) {
            return at;
        }
        self.next_id += 1;
        let mut topology = Topology {
            key: key.to_owned(),
            id: self.next_id,
            of_slot: vec![NOWHERE; fleet.len()],
            names: HashMap::new(),
        };
        for (number, _, blade) in fleet.blades() {
            topology.set(number, Some(blade));
        }
        self.topologies.push(topology);
        self.topologies.len() - 1
    }

    /// Counts again what is not to be trusted, and forgets what nobody needs.
    fn settle(&mut self, fleet: &Fleet, reservations: &Reservations) {
        // Domains of blades and labels that are gone.
        let most = 2 * fleet.len() + MAX_TERMS;
        let is_overgrown = self.topologies.iter().any(|topology| topology.names.len() > most);
        let held = self.tallies.iter().filter(|tally| tally.holders.domains > 0);
        let has_unused = self.tallies.len() > MAX_TERMS && held.count() < self.tallies.len() / 2;
        if is_overgrown || has_unused {
            let next_id = self.next_id;
            *self = Self {
                next_id,
                ..Self::default()
            };
            for term in reservations.iter().flat_map(|held| &held.forbidden) {
                self.enter(term, fleet, None);
            }
            self.is_stale = true;
        }
        if std::mem::take(&mut self.is_stale) {
            for tally in &mut self.tallies {
                tally.count_all(&self.topologies[tally.topology], reservations);
            }
        }
    }

    /// What the agents that are there mean to one that asks. `open` names the domains of a topology that it may use.
    pub(super) fn relations(
        &mut self,
        fleet: &Fleet,
        reservations: &Reservations,
        request: &Request,
        mut open: impl FnMut(&Topology) -> Arc<Vec<u32>>,
    ) -> Relations {
        let agents = &request.agents;
        let asks_nothing = agents.required.is_empty()
            && agents.forbidden.is_empty()
            && agents.preferred.is_empty()
            && request.spread.is_empty();
        if asks_nothing && self.tallies.is_empty() {
            return Relations::default();
        }
        self.settle(fleet, reservations);
        let mut number = |term: &AgentTerm| self.enter(term, fleet, Some(reservations));
        let required: Vec<usize> = agents.required.iter().map(&mut number).collect();
        let forbidden: Vec<usize> = agents.forbidden.iter().map(&mut number).collect();
        let preferred = agents.preferred.iter().map(|(weight, term)| (*weight, number(term)));
        let preferred: Vec<(i32, usize)> = preferred.collect();
        let spread: Vec<usize> = request.spread.iter().map(|one| number(&one.term)).collect();
        let is_itself = |number: usize| {
            let term = &self.tallies[number].term;
            term.matches(&request.namespace, &request.labels)
        };
        let skews = request.spread.iter().zip(spread).map(|(one, number)| Skew {
            number,
            fewest: self.fewest(number, &open(&self.topologies[self.tallies[number].topology])),
            itself: u32::from(is_itself(number)),
            most: one.max_skew,
            is_required: one.is_required,
        });
        let skews = skews.collect();
        let required = required.into_iter().map(|number| Need {
            number,
            // The first of agents that want to be together may go anywhere.
            is_first: self.tallies[number].matching.domains == 0 && is_itself(number),
        });
        let mut repelled = self.matched(&request.namespace, &request.labels);
        repelled.retain(|number| self.tallies[*number].holders.domains > 0);
        Relations {
            required: required.collect(),
            forbidden,
            preferred,
            repelled,
            skews,
        }
    }

    /// The fewest matches of an open domain.
    fn fewest(&self, number: usize, open: &[u32]) -> u32 {
        let matching = &self.tallies[number].matching;
        if matching.domains < open.len() {
            return 0;
        }
        let counts = open.iter().map(|domain| matching.get(Some(*domain)));
        counts.min().unwrap_or(0)
    }

    /// The domain that a slot is in, in the eyes of a term.
    fn domain(&self, tally: &Tally, slot: u32) -> Option<u32> {
        self.topologies[tally.topology].domain(slot)
    }

    fn matching(&self, number: usize, slot: u32) -> u32 {
        let tally = &self.tallies[number];
        tally.matching.get(self.domain(tally, slot))
    }

    fn holders(&self, number: usize, slot: u32) -> u32 {
        let tally = &self.tallies[number];
        tally.holders.get(self.domain(tally, slot))
    }

    fn is_somewhere(&self, number: usize, slot: u32) -> bool {
        self.domain(&self.tallies[number], slot).is_some()
    }
}

#[derive(Debug)]
struct Need {
    number: usize,
    is_first: bool,
}

#[derive(Debug)]
struct Skew {
    number: usize,
    /// The fewest matches of an open domain.
    fewest: u32,
    /// 1 where the agent counts itself.
    itself: u32,
    most: u32,
    is_required: bool,
}

impl Skew {
    /// `None`: the blade is in no domain.
    fn on(&self, peers: &Peers, slot: u32) -> Option<u32> {
        peers.is_somewhere(self.number, slot).then(|| {
            let there = peers.matching(self.number, slot).saturating_add(self.itself);
            there.saturating_sub(self.fewest)
        })
    }
}

/// What the agents that are there mean to one that asks; good until the next change of a reservation.
#[derive(Debug, Default)]
pub(super) struct Relations {
    required: Vec<Need>,
    forbidden: Vec<usize>,
    preferred: Vec<(i32, usize)>,
    /// Terms of others that refuse this one.
    repelled: Vec<usize>,
    skews: Vec<Skew>,
}

impl Relations {
    /// Whether the agents that are there keep this one from no blade.
    pub(super) fn is_free(&self) -> bool {
        self.required.is_empty()
            && self.forbidden.is_empty()
            && self.repelled.is_empty()
            && !self.skews.iter().any(|skew| skew.is_required)
    }

    /// Why the agents in the blade's domains keep this one away.
    pub(super) fn causes(&self, peers: &Peers, slot: u32) -> impl Iterator<Item = Cause> {
        let misses = self.required.iter().any(|need| {
            let is_met = need.is_first || peers.matching(need.number, slot) > 0;
            !is_met || !peers.is_somewhere(need.number, slot)
        });
        let meets = self.forbidden.iter().any(|number| peers.matching(*number, slot) > 0);
        let is_repelled = self.repelled.iter().any(|number| peers.holders(*number, slot) > 0);
        let mut bound = self.skews.iter().filter(|skew| skew.is_required);
        let is_skewed = bound.any(|skew| skew.on(peers, slot).is_none_or(|on| on > skew.most));
        let causes = [
            misses.then_some(Cause::AgentAffinity),
            meets.then_some(Cause::AgentAntiAffinity),
            is_repelled.then_some(Cause::Repelled),
            is_skewed.then_some(Cause::Skewed),
        ];
        causes.into_iter().flatten()
    }

    /// Preferred agents in the blade's domains: the share of all weights that is earned, thousandths, -1000 to 1000.
    pub(super) fn liking(&self, peers: &Peers, slot: u32) -> i32 {
        if self.preferred.is_empty() {
            return 0;
        }
        let all: i64 = self
            .preferred
            .iter()
            .map(|(weight, _)| i64::from(weight.unsigned_abs()))
            .sum();
        let earning = self
            .preferred
            .iter()
            .filter(|(_, number)| peers.matching(*number, slot) > 0);
        let earned: i64 = earning.map(|(weight, _)| i64::from(*weight)).sum();
        i32::try_from(earned * 1000 / all.max(1)).unwrap_or(0)
    }

    /// By how many agents the constraints that only lower the score are exceeded.
    pub(super) fn skew(&self, peers: &Peers, slot: u32) -> u32 {
        let soft = self.skews.iter().filter(|skew| !skew.is_required);
        let over = soft.map(|skew| skew.on(peers, slot).map_or(u32::MAX, |on| on.saturating_sub(skew.most)));
        over.fold(0, u32::saturating_add)
    }
}
