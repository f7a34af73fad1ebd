//! Who is placed next: more priority first, then namespaces in turn, then who came first.
//!
//! Namespaces take turns by deficit round robin (Shreedhar and Varghese, 1995): each turn is worth the same room, so a
//! namespace of many or large agents does not keep the others waiting.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use super::request::Request;

/// Room that one turn is worth, in [`cost`]'s unit.
const TURN: u64 = 1024;

/// An agent that wants a blade.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) uid: Arc<str>,
    pub(super) request: Arc<Request>,
    /// Who came earlier has less.
    pub(super) number: u64,
}

/// What an agent takes of its namespace's turn: a thousandth of a core is worth as much as a MiB.
fn cost(request: &Request) -> u64 {
    request.cpu_millis.saturating_add(request.memory_mib).max(1)
}

/// Entries in order.
#[derive(Debug, Default)]
pub(super) struct Queue {
    levels: BTreeMap<Reverse<i32>, Level>,
    /// Priority, namespace and number of each entry.
    places: HashMap<Arc<str>, (i32, Arc<str>, u64)>,
    /// Amounts of CPU and of memory that entries ask for, each with their number.
    cpu: BTreeMap<u64, usize>,
    memory: BTreeMap<u64, usize>,
}

fn count(amounts: &mut BTreeMap<u64, usize>, amount: u64) {
    *amounts.entry(amount).or_insert(0) += 1;
}

fn uncount(amounts: &mut BTreeMap<u64, usize>, amount: u64) {
    if let Some(left) = amounts.get_mut(&amount) {
        *left -= 1;
        if *left == 0 {
            amounts.remove(&amount);
        }
    }
}

/// Entries of one priority.
#[derive(Debug, Default)]
struct Level {
    flows: HashMap<Arc<str>, Flow>,
    /// Namespaces, whose turn it is first.
    turns: VecDeque<Arc<str>>,
}

/// Entries of one namespace.
#[derive(Debug, Default)]
struct Flow {
    entries: BTreeMap<u64, Entry>,
    /// Room it may take before others have their turn.
    deficit: u64,
}

impl Queue {
    pub(super) fn push(&mut self, entry: Entry) {
        self.remove(&entry.uid);
        let priority = entry.request.priority;
        let namespace: Arc<str> = entry.request.namespace.as_str().into();
        let place = (priority, namespace.clone(), entry.number);
        self.places.insert(entry.uid.clone(), place);
        count(&mut self.cpu, entry.request.cpu_millis);
        count(&mut self.memory, entry.request.memory_mib);
        let level = self.levels.entry(Reverse(priority)).or_default();
        let flow = level.flows.entry(namespace.clone()).or_insert_with(|| {
            level.turns.push_back(namespace);
            Flow::default()
        });
        flow.entries.insert(entry.number, entry);
    }

    pub(super) fn remove(&mut self, uid: &str) -> Option<Entry> {
        let (priority, namespace, number) = self.places.remove(uid)?;
        self.take(Reverse(priority), &namespace, number)
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// The least CPU and the least memory that any entry asks for, not necessarily the same one: a blade with less helps
    /// nobody.
    pub(super) fn least(&self) -> Option<(u64, u64)> {
        let (cpu, _) = self.cpu.first_key_value()?;
        let (memory, _) = self.memory.first_key_value()?;
        Some((*cpu, *memory))
    }

    fn take(&mut self, priority: Reverse<i32>, namespace: &str, number: u64) -> Option<Entry> {
        let level = self.levels.get_mut(&priority)?;
        let entry = level.take(namespace, number);
        if level.turns.is_empty() {
            self.levels.remove(&priority);
        }
        let entry = entry?;
        uncount(&mut self.cpu, entry.request.cpu_millis);
        uncount(&mut self.memory, entry.request.memory_mib);
        Some(entry)
    }

    /// Takes out the next of those that `wanted` picks.
    pub(super) fn pop(&mut self, mut wanted: impl FnMut(&Entry) -> bool) -> Option<Entry> {
        let (priority, namespace, number) = self.levels.iter_mut().find_map(|(priority, level)| {
            let (namespace, number) = level.next(&mut wanted)?;
            Some((*priority, namespace, number))
        })?;
        let entry = self.take(priority, &namespace, number)?;
        self.places.remove(&entry.uid);
        Some(entry)
    }
}

impl Level {
    /// Namespace and number of the next entry, whose cost is charged.
    fn next(&mut self, wanted: &mut impl FnMut(&Entry) -> bool) -> Option<(Arc<str>, u64)> {
        let heads = self.flows.iter().filter_map(|(namespace, flow)| {
            let head = flow.entries.values().find(|entry| wanted(entry))?;
            Some((namespace.clone(), (head.number, cost(&head.request))))
        });
        let heads: HashMap<Arc<str>, (u64, u64)> = heads.collect();
        // Turns until somebody can pay; all but the last of them at once.
        let turns_left = |(namespace, (_, cost)): (&Arc<str>, &(u64, u64))| {
            let deficit = self.flows.get(namespace).map_or(0, |flow| flow.deficit);
            cost.saturating_sub(deficit).div_ceil(TURN)
        };
        let skipped = heads.iter().map(turns_left).min()?.saturating_sub(1);
        for namespace in heads.keys() {
            if let Some(flow) = self.flows.get_mut(namespace) {
                flow.deficit = flow.deficit.saturating_add(skipped.saturating_mul(TURN));
            }
        }
        loop {
            let namespace = self.turns.front()?.clone();
            let head = heads.get(&namespace);
            if let (Some((number, cost)), Some(flow)) = (head, self.flows.get_mut(&namespace)) {
                if let Some(left) = flow.deficit.checked_sub(*cost) {
                    flow.deficit = left;
                    return Some((namespace, *number));
                }
                flow.deficit = flow.deficit.saturating_add(TURN);
            }
            self.turns.rotate_left(1);
        }
    }

    fn take(&mut self, namespace: &str, number: u64) -> Option<Entry> {
        let flow = self.flows.get_mut(namespace)?;
        let entry = flow.entries.remove(&number);
        if flow.entries.is_empty() {
            // What is left of a turn is not kept for later.
            self.flows.remove(namespace);
            self.turns.retain(|one| **one != *namespace);
        }
        entry
    }
}
