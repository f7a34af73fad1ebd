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

/// Counts by domain, the value of the term's topology key.
type Counts = HashMap<String, u32>;

/// One term and its counts.
#[derive(Debug)]
struct Tally {
    term: Arc<AgentTerm>,
    /// Agents that match the term.
    matching: Counts,
    /// Agents that refuse those that match it.
    holders: Counts,
}

impl Tally {
    fn domain<'a>(&self, blade: &'a Blade) -> Option<&'a str> {
        blade.labels.get(&self.term.topology_key).map(String::as_str)
    }

    fn matching(&self, blade: &Blade) -> u32 {
        of_domain(&self.matching, self.domain(blade))
    }

    fn holders(&self, blade: &Blade) -> u32 {
        of_domain(&self.holders, self.domain(blade))
    }

    /// Counts everything that is reserved.
    fn count_all(&mut self, fleet: &Fleet, reservations: &Reservations) {
        self.matching.clear();
        self.holders.clear();
        for held in reservations.iter() {
            let Some((_, blade)) = fleet.blade(held.number) else {
                continue;
            };
            let domain = self.domain(blade);
            if self.term.matches(&held.profile.namespace, &held.profile.labels) {
                bump(&mut self.matching, domain, 1);
            }
            if held.forbidden.contains(&self.term) {
                bump(&mut self.holders, domain, 1);
            }
        }
    }
}

fn of_domain(counts: &Counts, domain: Option<&str>) -> u32 {
    domain.and_then(|domain| counts.get(domain)).copied().unwrap_or(0)
}

fn bump(counts: &mut Counts, domain: Option<&str>, by: i32) {
    let Some(domain) = domain else { return };
    let Some(count) = counts.get_mut(domain) else {
        if by > 0 {
            counts.insert(domain.to_owned(), by.unsigned_abs());
        }
        return;
    };
    *count = count.saturating_add_signed(by);
    if *count == 0 {
        counts.remove(domain);
    }
}

/// All terms that are counted.
#[derive(Debug, Default)]
pub(super) struct Peers {
    tallies: Vec<Tally>,
    numbers: HashMap<Arc<AgentTerm>, usize>,
    /// Terms that ask for one of some values of a label, by label and value.
    by_label: HashMap<String, HashMap<String, Vec<usize>>>,
    /// The other terms.
    elsewhere: Vec<usize>,
    /// The blades' labels changed under the counts.
    is_stale: bool,
}

impl Peers {
    /// Something about the domains of blades in use changed: everything is counted again when it is next asked for.
    pub(super) fn distrust(&mut self) {
        self.is_stale = !self.tallies.is_empty();
    }

    /// The one copy of each term that agents hold.
    pub(super) fn shared(&mut self, terms: &[AgentTerm]) -> Vec<Arc<AgentTerm>> {
        let shared = terms.iter().map(|term| {
            let number = self.enter(term, None);
            self.tallies[number].term.clone()
        });
        shared.collect()
    }

    pub(super) fn came(&mut self, fleet: &Fleet, held: &Held) {
        self.count(fleet, held, 1);
    }

    pub(super) fn went(&mut self, fleet: &Fleet, held: &Held) {
        self.count(fleet, held, -1);
    }

    fn count(&mut self, fleet: &Fleet, held: &Held, by: i32) {
        if self.tallies.is_empty() || self.is_stale {
            return;
        }
        let Some((_, blade)) = fleet.blade(held.number) else {
            return;
        };
        for number in self.matched(&held.profile.namespace, &held.profile.labels) {
            let tally = &mut self.tallies[number];
            let domain = tally.domain(blade);
            bump(&mut tally.matching, domain, by);
        }
        for term in &held.forbidden {
            if let Some(number) = self.numbers.get(term) {
                let tally = &mut self.tallies[*number];
                let domain = tally.domain(blade);
                bump(&mut tally.holders, domain, by);
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

    /// Number of a term. It is counted from now on; what is reserved already is counted at once where `all` is given.
    fn enter(&mut self, term: &AgentTerm, all: Option<(&Fleet, &Reservations)>) -> usize {
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
            matching: Counts::new(),
            holders: Counts::new(),
        };
        match all {
            Some((fleet, reservations)) => tally.count_all(fleet, reservations),
            None => self.is_stale = true,
        }
        self.tallies.push(tally);
        self.numbers.insert(term, number);
        number
    }

    /// Counts again what is not to be trusted, and forgets what nobody needs.
    fn settle(&mut self, fleet: &Fleet, reservations: &Reservations) {
        if self.tallies.len() > MAX_TERMS {
            let held = self.tallies.iter().filter(|tally| !tally.holders.is_empty());
            let held: Vec<_> = held.map(|tally| tally.term.clone()).collect();
            if self.is_stale || held.len() < self.tallies.len() / 2 {
                *self = Self::default();
                for term in reservations.iter().flat_map(|held| &held.forbidden).chain(&held) {
                    self.enter(term, None);
                }
            }
        }
        if std::mem::take(&mut self.is_stale) {
            for tally in &mut self.tallies {
                tally.count_all(fleet, reservations);
            }
        }
    }

    /// What the agents that are there mean to one that asks. `domains_of` names the domains of a topology key that are
    /// open to it.
    pub(super) fn relations(
        &mut self,
        fleet: &Fleet,
        reservations: &Reservations,
        request: &Request,
        mut domains_of: impl FnMut(&str) -> Arc<BTreeSet<String>>,
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
        let mut number = |term: &AgentTerm| self.enter(term, Some((fleet, reservations)));
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
            fewest: self.fewest(number, &domains_of(&one.term.topology_key)),
            itself: u32::from(is_itself(number)),
            most: one.max_skew,
            is_required: one.is_required,
        });
        let skews = skews.collect();
        let required = required.into_iter().map(|number| Need {
            number,
            // The first of agents that want to be together may go anywhere.
            is_first: self.tallies[number].matching.is_empty() && is_itself(number),
        });
        let mut repelled = self.matched(&request.namespace, &request.labels);
        repelled.retain(|number| !self.tallies[*number].holders.is_empty());
        Relations {
            required: required.collect(),
            forbidden,
            preferred,
            repelled,
            skews,
        }
    }

    /// The fewest matches of an open domain.
    fn fewest(&self, number: usize, open: &BTreeSet<String>) -> u32 {
        let matching = &self.tallies[number].matching;
        if matching.len() < open.len() {
            return 0;
        }
        let counts = open.iter().map(|domain| matching.get(domain).copied().unwrap_or(0));
        counts.min().unwrap_or(0)
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
    fn on(&self, peers: &Peers, blade: &Blade) -> Option<u32> {
        let tally = &peers.tallies[self.number];
        tally.domain(blade)?;
        Some((tally.matching(blade).saturating_add(self.itself)).saturating_sub(self.fewest))
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
    /// Why the agents in the blade's domains keep this one away.
    pub(super) fn causes(&self, peers: &Peers, blade: &Blade) -> impl Iterator<Item = Cause> {
        let misses = self.required.iter().any(|need| {
            let tally = &peers.tallies[need.number];
            tally.domain(blade).is_none() || (!need.is_first && tally.matching(blade) == 0)
        });
        let mut forbidden = self.forbidden.iter();
        let meets = forbidden.any(|number| peers.tallies[*number].matching(blade) > 0);
        let mut repelled = self.repelled.iter();
        let is_repelled = repelled.any(|number| peers.tallies[*number].holders(blade) > 0);
        let mut bound = self.skews.iter().filter(|skew| skew.is_required);
        let is_skewed = bound.any(|skew| skew.on(peers, blade).is_none_or(|on| on > skew.most));
        let causes = [
            misses.then_some(Cause::AgentAffinity),
            meets.then_some(Cause::AgentAntiAffinity),
            is_repelled.then_some(Cause::Repelled),
            is_skewed.then_some(Cause::Skewed),
        ];
        causes.into_iter().flatten()
    }

    /// Preferred agents in the blade's domains: the share of all weights that is earned, thousandths, -1000 to 1000.
    pub(super) fn liking(&self, peers: &Peers, blade: &Blade) -> i32 {
        let all: i64 = self
            .preferred
            .iter()
            .map(|(weight, _)| i64::from(weight.unsigned_abs()))
            .sum();
        let earning = self
            .preferred
            .iter()
            .filter(|(_, number)| peers.tallies[*number].matching(blade) > 0);
        let earned: i64 = earning.map(|(weight, _)| i64::from(*weight)).sum();
        i32::try_from(earned * 1000 / all.max(1)).unwrap_or(0)
    }

    /// By how many agents the constraints that only lower the score are exceeded.
    pub(super) fn skew(&self, peers: &Peers, blade: &Blade) -> u32 {
        let soft = self.skews.iter().filter(|skew| !skew.is_required);
        let over = soft.map(|skew| {
            skew.on(peers, blade)
                .map_or(u32::MAX, |on| on.saturating_sub(skew.most))
        });
        over.fold(0, u32::saturating_add)
    }
}
