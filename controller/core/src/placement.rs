//! Chooses a blade for an agent: filter, score, reserve. One writer owns the [`Placer`].
//!
//! ```text
//! Request ──► shape ──► index: best blocks of blades ──► 16 candidates + 2 at random ──► scores ──► reserved
//!                             │ none fits                                                  (assumed, bound, confirmed)
//!                             └──► full scan: blades counted by cause
//! ```
//!
//! A reservation is made the moment a blade is chosen, before anything is written, and holds until the agent has ended
//! or was placed elsewhere; so two agents chosen in one instant never get the same room.
//!
//! Invariant: the reservations made by [`Placer::place`] never exceed a blade's allocatable amounts times its overcommit.

mod blade;
mod explain;
mod filters;
mod fleet;
mod index;
mod labels;
mod peers;
mod queue;
mod request;
mod reservations;
mod scheduler;
mod scores;
mod text;

use std::{collections::VecDeque, sync::Arc, time::Duration};

pub use self::{
    blade::{Blade, Effect, Overcommit, Taint},
    explain::{Explanation, Row},
    filters::{Cause, Filter},
    labels::{Labels, Operator, Requirement, Selector},
    request::{AgentAffinity, AgentTerm, NodeAffinity, Packing, Pool, Request, Spread, Toleration},
    scheduler::Scheduler,
    scores::Scores,
    text::Unschedulable,
};
use self::{
    fleet::{Fleet, Slot},
    index::{Index, mix},
    peers::{Peers, Relations},
    reservations::{Profile, Reservations, Stage},
};

/// A failure counts against its blade for this long.
const FAILURE_MEMORY: Duration = Duration::from_secs(300);
/// Failures that are remembered at most; a flood of them tells no more.
const MAX_FAILURES: usize = 65_536;

/// All blades and what is reserved on them.
#[derive(Debug)]
pub struct Placer {
    fleet: Fleet,
    reservations: Reservations,
    index: Index,
    peers: Peers,
    packing: Packing,
    /// When a failure is forgiven, and whose it was; oldest first.
    failures: VecDeque<(Duration, Arc<str>)>,
    seed: u64,
}

/// What one request needs to be told of the others.
#[derive(Debug)]
struct Prepared {
    shape: u64,
    relations: Relations,
}

impl Placer {
    /// `seed` decides ties, and nothing else: the same seed and calls give the same placements.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with_packing(seed, Packing::default())
    }

    /// With a packing for requests that name none.
    #[must_use]
    pub fn with_packing(seed: u64, packing: Packing) -> Self {
        Self {
            fleet: Fleet::default(),
            reservations: Reservations::default(),
            index: Index::default(),
            peers: Peers::default(),
            packing,
            failures: VecDeque::new(),
            seed,
        }
    }

    /// Adds or replaces a blade; true when something changed. Reservations stay.
    pub fn upsert_blade(&mut self, name: &str, blade: Blade) -> bool {
        let number = self.fleet.enter(name);
        let known = self.fleet.blade(number).map(|(_, known)| known);
        if known == Some(&blade) {
            return false;
        }
        self.set_blade(number, Some(blade));
        true
    }

    /// Forgets a blade. Reservations on it stay: its agents may still run.
    pub fn remove_blade(&mut self, name: &str) {
        let Some(number) = self.fleet.number(name) else { return };
        self.set_blade(number, None);
    }

    fn set_blade(&mut self, number: u32, blade: Option<Blade>) {
        self.fleet.set_blade(number, blade);
        self.index.blade_changed(&self.fleet, number);
        self.peers.blade_changed(&self.fleet, number);
    }

    /// Whether a blade of this name is known and ready.
    #[must_use]
    pub fn is_ready(&self, name: &str) -> bool {
        let blade = self.fleet.number(name).and_then(|number| self.fleet.blade(number));
        blade.is_some_and(|(_, blade)| blade.ready)
    }

    /// Notes that `uid` holds room on `blade`: what the API says, after a restart too. Never refused: it is so already.
    pub fn reserve(&mut self, uid: &str, blade: &str, request: &Request) {
        if let Some(number) = self.fleet.number(blade)
            && self.reservations.has(uid, number, request)
        {
            self.reservations.advance(&mut self.fleet, uid, Stage::Bound);
            return;
        }
        self.release(uid);
        let number = self.fleet.enter(blade);
        self.take(uid, number, request, Stage::Bound);
    }

    /// The microVM of `uid` is up: it no longer counts among its blade's starts. Answers the blade where that is news.
    pub fn confirm(&mut self, uid: &str) -> Option<&str> {
        let number = self.reservations.advance(&mut self.fleet, uid, Stage::Confirmed)?;
        self.index.load_changed(number);
        self.fleet.slot(number).map(|slot| &*slot.name)
    }

    /// Gives the room of `uid` back; true when it held any.
    pub fn release(&mut self, uid: &str) -> bool {
        self.take_back(uid).is_some()
    }

    /// Gives the room of `uid` back; answers its blade, and who it was to the terms of others.
    fn take_back(&mut self, uid: &str) -> Option<(Arc<str>, Arc<Profile>)> {
        let name = self.fleet.slot(self.reservations.get(uid)?.number)?.name.clone();
        let held = self.reservations.remove(&mut self.fleet, uid)?;
        self.peers.went(&held);
        self.index.load_changed(held.number);
        Some((name, held.profile))
    }

    /// Blade on which `uid` holds room.
    #[must_use]
    pub fn reserved_on(&self, uid: &str) -> Option<&str> {
        let held = self.reservations.get(uid)?;
        self.fleet.slot(held.number).map(|slot| &*slot.name)
    }

    /// Agents whose blade was chosen before `moment` and for which nothing was written since: whoever asked for them
    /// has forgotten them.
    #[must_use]
    pub fn assumed_before(&self, moment: Duration) -> Vec<String> {
        self.reservations.assumed_before(moment)
    }

    /// A start on this blade failed at `now`; for some minutes others are rather tried.
    pub fn note_failure(&mut self, blade: &str, now: Duration) {
        let Some(number) = self.fleet.number(blade) else { return };
        if self.failures.len() >= MAX_FAILURES {
            return;
        }
        let Some(slot) = self.fleet.slot(number) else { return };
        self.failures.push_back((now + FAILURE_MEMORY, slot.name.clone()));
        self.fleet.change(number, |slot| slot.failures += 1);
        self.index.load_changed(number);
    }

    fn forgive(&mut self, now: Duration) {
        while self.failures.front().is_some_and(|(until, _)| *until <= now) {
            let Some((_, name)) = self.failures.pop_front() else {
                return;
            };
            if let Some(number) = self.fleet.number(&name) {
                self.fleet
                    .change(number, |slot| slot.failures = slot.failures.saturating_sub(1));
                self.index.load_changed(number);
            }
        }
    }

    /// Chooses a blade and reserves its room. An agent that holds room keeps its blade: asking twice is asking once,
    /// unless the choice was not written yet and its blade will not do any more. `now` is on any clock that only grows.
    ///
    /// # Errors
    /// No blade will do; nothing was reserved.
    pub fn place(&mut self, uid: &str, request: &Request, now: Duration) -> Result<String, Unschedulable> {
        self.forgive(now);
        if let Some(kept) = self.keep(uid, request, now) {
            return Ok(kept);
        }
        let prepared = self.prepare(request);
        match self.choose(uid, request, &prepared) {
            Some(number) => {
                self.take(uid, number, request, Stage::Assumed(now));
                Ok(self.name(number))
            }
            None => Err(self.count_causes(request, &prepared)),
        }
    }

    /// Whether this blade has room for an agent of this size, whatever else it asks for.
    pub(crate) fn has_room(&self, blade: &str, cpu_millis: u64, memory_mib: u64) -> bool {
        let number = self.fleet.number(blade);
        number.is_some_and(|number| self.fleet.rooms()[number as usize].holds(cpu_millis, memory_mib))
    }

    /// Whether this blade would take the agent now.
    pub fn would_take(&mut self, blade: &str, request: &Request) -> bool {
        let Some(number) = self.fleet.number(blade) else {
            return false;
        };
        let is_likely = self.fleet.rooms()[number as usize].fits(request);
        let Some((_, known)) = self.fleet.blade(number).filter(|_| is_likely) else {
            return false;
        };
        known.refuses(request).is_none() && {
            let prepared = self.prepare(request);
            self.fits(number, request, &prepared)
        }
    }

    fn keep(&mut self, uid: &str, request: &Request, now: Duration) -> Option<String> {
        let held = self.reservations.get(uid)?;
        let blade = self.fleet.blade(held.number);
        let is_good =
            blade.is_some_and(|(slot, blade)| blade.refuses(request).is_none() && !request.avoid.contains(&*slot.name));
        let number = held.number;
        if is_good || !matches!(held.stage, Stage::Assumed(_)) {
            self.reservations.renew(uid, now);
            return Some(self.name(number));
        }
        self.release(uid);
        None
    }

    fn take(&mut self, uid: &str, number: u32, request: &Request, stage: Stage) {
        let forbidden = self.peers.shared(&self.fleet, &request.agents.forbidden);
        let held = self
            .reservations
            .add(&mut self.fleet, uid, number, request, forbidden, stage);
        self.peers.came(held);
        self.index.load_changed(number);
    }

    fn packing(&self, request: &Request) -> Packing {
        request.packing.unwrap_or(self.packing)
    }

    fn name(&self, number: u32) -> String {
        self.fleet
            .slot(number)
            .map(|slot| slot.name.to_string())
            .unwrap_or_default()
    }

    fn prepare(&mut self, request: &Request) -> Prepared {
        let packing = self.packing(request);
        let shape = self.index.shape(&self.fleet, request, packing);
        let index = &mut self.index;
        let relations = self
            .peers
            .relations(&self.fleet, &self.reservations, request, |topology| {
                index.domains(shape, topology)
            });
        Prepared { shape, relations }
    }

    fn choose(&mut self, uid: &str, request: &Request, prepared: &Prepared) -> Option<u32> {
        if self.pool_cause(request).is_some() {
            return None;
        }
        if let Some(name) = &request.node_name {
            let number = self.fleet.number(name)?;
            return self.fits(number, request, prepared).then_some(number);
        }
        let salt = uid
            .bytes()
            .fold(mix(self.seed), |salt, byte| mix(salt ^ u64::from(byte)));
        let (fleet, peers) = (&self.fleet, &self.peers);
        let accepts = |number| accepts(fleet, peers, number, request, prepared);
        let candidates = self
            .index
            .candidates(prepared.shape, fleet.rooms(), request, salt, accepts);
        let worth = |number: u32| {
            let lasting = self.index.lasting(prepared.shape, number);
            let total = lasting + self.passing(number, request, prepared).total();
            (total, mix(salt ^ u64::from(number)))
        };
        candidates.into_iter().max_by_key(|number| worth(*number))
    }

    /// The scores of a blade that change while agents come and go.
    fn passing(&self, number: u32, request: &Request, prepared: &Prepared) -> Scores {
        let room = &self.fleet.rooms()[number as usize];
        let liking = prepared.relations.liking(&self.peers, number);
        let skew = prepared.relations.skew(&self.peers, number);
        scores::passing(room, request, self.packing(request), liking, skew)
    }

    /// Whether one blade will do.
    fn fits(&self, number: u32, request: &Request, prepared: &Prepared) -> bool {
        let blade = self.fleet.blade(number);
        blade.is_some_and(|(slot, blade)| self.causes(number, slot, blade, request, prepared).is_empty())
    }

    /// Why a blade will not do; empty: it will.
    fn causes(&self, number: u32, slot: &Slot, blade: &Blade, request: &Request, prepared: &Prepared) -> Vec<Cause> {
        if request.node_name.as_deref().is_some_and(|wanted| *wanted != *slot.name) {
            return vec![Cause::OtherBladeNamed];
        }
        if let Some(cause) = blade.refuses(request) {
            return vec![cause];
        }
        let room = &self.fleet.rooms()[number as usize];
        let mut causes = filters::lacks(slot, blade, room, request);
        if causes.is_empty() {
            let of_agents = prepared
                .relations
                .causes(&self.peers, number)
                .chain(self.pool_cause(request));
            causes.extend(of_agents.take(1));
        }
        if causes.is_empty() && request.avoid.contains(&*slot.name) {
            causes.push(Cause::RefusedLately);
        }
        causes
    }

    /// The agent's pool has as many agents as it may.
    fn pool_cause(&self, request: &Request) -> Option<Cause> {
        let pool = request.pool.as_ref()?;
        let is_full = pool.max.is_some_and(|max| self.reservations.of_pool(&pool.name) >= max);
        is_full.then(|| Cause::PoolFull(pool.name.clone()))
    }
}

/// What the index does not know of a blade that has room: a refusal, and the agents around it.
fn accepts(fleet: &Fleet, peers: &Peers, number: u32, request: &Request, prepared: &Prepared) -> bool {
    let is_avoided = || {
        fleet
            .slot(number)
            .is_none_or(|slot| request.avoid.contains(&*slot.name))
    };
    (request.avoid.is_empty() || !is_avoided())
        && (prepared.relations.is_free() || prepared.relations.causes(peers, number).next().is_none())
}

#[cfg(test)]
mod tests;
