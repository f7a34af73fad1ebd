//! Who holds room where. A reservation is assumed when a blade is chosen, bound when the choice is written, and confirmed
//! when the microVM is up:
//!
//! ```text
//! assumed ──bind──► bound ──confirm──► confirmed
//!    └───────────────┴──────────────────┴── release (and an assumed one by time alone)
//! ```

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use super::{
    fleet::{Fleet, Used},
    labels::Labels,
    request::{AgentTerm, Request},
};

/// How far an agent's life on its blade has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Chosen at this time; nobody but the placer knows.
    Assumed(Duration),
    /// Written.
    Bound,
    /// Up: no longer on its way.
    Confirmed,
}

/// Who an agent is to the terms of others; one for all that are alike.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Profile {
    pub(super) namespace: String,
    pub(super) labels: Labels,
}

/// Room taken on one blade.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) number: u32,
    pub(super) cpu_millis: u64,
    pub(super) memory_mib: u64,
    pub(super) extended: BTreeMap<String, u64>,
    pub(super) profile: Arc<Profile>,
    /// Agents it refuses beside it.
    pub(super) forbidden: Vec<Arc<AgentTerm>>,
    pub(super) pool: Option<Arc<str>>,
    pub(super) stage: Stage,
}

impl Held {
    fn is_starting(&self) -> bool {
        self.stage != Stage::Confirmed
    }

    /// The same room for the same agent, whatever its stage.
    fn is_same(&self, number: u32, request: &Request) -> bool {
        self.number == number
            && self.cpu_millis == request.cpu_millis
            && self.memory_mib == request.memory_mib
            && self.extended == request.extended
            && self.profile.namespace == request.namespace
            && self.profile.labels == request.labels
            && self.forbidden.len() == request.agents.forbidden.len()
            && self
                .forbidden
                .iter()
                .zip(&request.agents.forbidden)
                .all(|(held, asked)| **held == *asked)
            && self.pool.as_deref() == request.pool.as_ref().map(|pool| pool.name.as_str())
    }
}

#[derive(Debug, Default)]
pub(super) struct Reservations {
    held: HashMap<String, Held>,
    /// By fingerprint. Of two with the same one, only the first is shared.
    profiles: HashMap<u64, Arc<Profile>>,
    /// Agents of each pool.
    pools: HashMap<Arc<str>, u32>,
}

impl Reservations {
    pub(super) fn get(&self, uid: &str) -> Option<&Held> {
        self.held.get(uid)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Held> {
        self.held.values()
    }

    /// Agents of the pool that hold room.
    pub(super) fn of_pool(&self, name: &str) -> u32 {
        self.pools.get(name).copied().unwrap_or(0)
    }

    /// Whether `uid` holds exactly this already.
    pub(super) fn has(&self, uid: &str, number: u32, request: &Request) -> bool {
        self.held.get(uid).is_some_and(|held| held.is_same(number, request))
    }

    /// Takes the room. The caller released what `uid` held before.
    pub(super) fn add(
        &mut self,
        fleet: &mut Fleet,
        uid: &str,
        number: u32,
        request: &Request,
        forbidden: Vec<Arc<AgentTerm>>,
        stage: Stage,
    ) -> &Held {
        let pool = request.pool.as_ref().map(|pool| self.enter_pool(&pool.name));
        let held = Held {
            number,
            cpu_millis: request.cpu_millis,
            memory_mib: request.memory_mib,
            extended: request.extended.clone(),
            profile: self.profile(request),
            forbidden,
            pool,
            stage,
        };
        fleet.change(number, |slot| take(&mut slot.used, &held));
        self.held.entry(uid.to_owned()).insert_entry(held).into_mut()
    }

    /// Gives the room back.
    pub(super) fn remove(&mut self, fleet: &mut Fleet, uid: &str) -> Option<Held> {
        let held = self.held.remove(uid)?;
        fleet.change(held.number, |slot| give_back(&mut slot.used, &held));
        if let Some(pool) = &held.pool
            && let Some(count) = self.pools.get_mut(pool)
        {
            *count -= 1;
            if *count == 0 {
                self.pools.remove(pool);
            }
        }
        self.leave_profile(&held.profile);
        Some(held)
    }

    /// Moves an agent on; never back. Answers its blade where that frees a start.
    pub(super) fn advance(&mut self, fleet: &mut Fleet, uid: &str, to: Stage) -> Option<u32> {
        let held = self.held.get_mut(uid)?;
        let was_starting = held.is_starting();
        if was_starting {
            held.stage = to;
        }
        if was_starting && !held.is_starting() {
            fleet.change(held.number, |slot| {
                slot.used.starts = slot.used.starts.saturating_sub(1)
            });
            return Some(held.number);
        }
        None
    }

    /// An assumed choice was asked for again.
    pub(super) fn renew(&mut self, uid: &str, now: Duration) {
        if let Some(held) = self.held.get_mut(uid)
            && let Stage::Assumed(at) = &mut held.stage
        {
            *at = now;
        }
    }

    /// Agents whose blade was chosen before `moment`, and nothing was written since.
    pub(super) fn assumed_before(&self, moment: Duration) -> Vec<String> {
        let old = |held: &Held| matches!(held.stage, Stage::Assumed(at) if at < moment);
        let uids = self
            .held
            .iter()
            .filter(|(_, held)| old(held))
            .map(|(uid, _)| uid.clone());
        let mut uids: Vec<_> = uids.collect();
        // A map's order must not decide who hears first.
        uids.sort_unstable();
        uids
    }

    fn enter_pool(&mut self, name: &str) -> Arc<str> {
        if let Some((known, _)) = self.pools.get_key_value(name) {
            let known = known.clone();
            *self.pools.entry(known.clone()).or_insert(0) += 1;
            return known;
        }
        let name: Arc<str> = name.into();
        self.pools.insert(name.clone(), 1);
        name
    }

    fn profile(&mut self, request: &Request) -> Arc<Profile> {
        let fingerprint = fingerprint(&request.namespace, &request.labels);
        if let Some(known) = self.profiles.get(&fingerprint)
            && known.namespace == request.namespace
            && known.labels == request.labels
        {
            return known.clone();
        }
        let profile = Arc::new(Profile {
            namespace: request.namespace.clone(),
            labels: request.labels.clone(),
        });
        self.profiles.entry(fingerprint).or_insert_with(|| profile.clone());
        profile
    }

    /// Forgets a profile that only one agent had.
    fn leave_profile(&mut self, profile: &Arc<Profile>) {
        // This one, and the map's own.
        if Arc::strong_count(profile) > 2 {
            return;
        }
        let fingerprint = fingerprint(&profile.namespace, &profile.labels);
        if self
            .profiles
            .get(&fingerprint)
            .is_some_and(|known| Arc::ptr_eq(known, profile))
        {
            self.profiles.remove(&fingerprint);
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty() && self.profiles.is_empty() && self.pools.is_empty()
    }
}

fn fingerprint(namespace: &str, labels: &Labels) -> u64 {
    let mut hasher = DefaultHasher::new();
    (namespace, labels).hash(&mut hasher);
    hasher.finish()
}

fn take(used: &mut Used, held: &Held) {
    used.cpu_millis = used.cpu_millis.saturating_add(held.cpu_millis);
    used.memory_mib = used.memory_mib.saturating_add(held.memory_mib);
    used.vms = used.vms.saturating_add(1);
    used.starts = used.starts.saturating_add(u32::from(held.is_starting()));
    for (name, amount) in &held.extended {
        let sum = used.extended.entry(name.clone()).or_insert(0);
        *sum = sum.saturating_add(*amount);
    }
}

fn give_back(used: &mut Used, held: &Held) {
    used.cpu_millis = used.cpu_millis.saturating_sub(held.cpu_millis);
    used.memory_mib = used.memory_mib.saturating_sub(held.memory_mib);
    used.vms = used.vms.saturating_sub(1);
    used.starts = used.starts.saturating_sub(u32::from(held.is_starting()));
    for (name, amount) in &held.extended {
        if let Some(sum) = used.extended.get_mut(name) {
            *sum = sum.saturating_sub(*amount);
            if *sum == 0 {
                used.extended.remove(name);
            }
        }
    }
}
