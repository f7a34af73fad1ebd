//! The placer with its queue: agents for which there is no blade wait, and hear of what can help them, and of nothing
//! else.
//!
//! ```text
//! place ──► active ──► placed
//!             ▲  └─ no blade ─► waiting (by what keeps it away)
//!             │                    │ a blade came, changed or has room again, and would take it: placed at once
//!             └──── after backoff ─┘ agents it must avoid, join or balance came or went; a refusal is over
//! ```
//!
//! Invariant: who waits is placed in the queue's order: room that comes free goes to the first that fits it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use super::{
    AgentTerm, Blade, Cause, Explanation, Labels, Packing, Placer, Request, Unschedulable,
    queue::{Entry, Queue},
};

/// A blade that refused an agent is not asked again for this long.
const REFUSAL: Duration = Duration::from_secs(10);
/// Between two tries of an agent that only may have been helped; doubled with each, up to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// Room that was chosen and never written is given back after this, looked at no more often than every tenth of it.
const ASSUMED: Duration = Duration::from_secs(60);
/// Others that are tried before the one that asks: who calls holds a lock.
const MAX_TURNS: usize = 32;

/// Why an agent waits, and how patient it has to be.
#[derive(Debug)]
struct Waiting {
    request: Arc<Request>,
    causes: BTreeSet<Cause>,
    tries: u32,
    /// Not tried again before, unless a blade is known to take it.
    rests_until: Duration,
}

/// See the module. `now` is on any clock that only grows, the same for all calls.
#[derive(Debug)]
pub struct Scheduler {
    placer: Placer,
    active: Queue,
    waiting: Queue,
    details: HashMap<Arc<str>, Waiting>,
    /// Of those that wait, whoever other agents keep away.
    concerned: BTreeSet<Arc<str>>,
    /// Waiting agents that are tried again at a time.
    due: BTreeSet<(Duration, Arc<str>)>,
    /// Blades that refused an agent, and until when that counts.
    refusals: HashMap<String, BTreeMap<String, Duration>>,
    /// Blades whose room was given back without telling those who wait, by the agent that will want it again.
    quiet: HashMap<String, String>,
    /// Agents for which something was decided while others asked.
    woken: Vec<String>,
    next_number: u64,
    swept: Duration,
}

impl Scheduler {
    /// `seed` decides ties, and nothing else.
    #[must_use]
    pub fn new(seed: u64, packing: Packing) -> Self {
        Self {
            placer: Placer::with_packing(seed, packing),
            active: Queue::default(),
            waiting: Queue::default(),
            details: HashMap::new(),
            concerned: BTreeSet::new(),
            due: BTreeSet::new(),
            refusals: HashMap::new(),
            quiet: HashMap::new(),
            woken: Vec::new(),
            next_number: 0,
            swept: Duration::ZERO,
        }
    }

    /// What is reserved where.
    #[must_use]
    pub fn placer(&self) -> &Placer {
        &self.placer
    }

    /// How many agents wait for a blade.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Agents that have a blade now, or should ask again; each call answers what is new.
    pub fn take_woken(&mut self) -> Vec<String> {
        std::mem::take(&mut self.woken)
    }

    /// Chooses a blade and reserves its room, after those that come first. Asking again is asking once.
    ///
    /// # Errors
    /// No blade will do; the agent waits until one may.
    pub fn place(&mut self, uid: &str, request: &Request, now: Duration) -> Result<String, Unschedulable> {
        self.pass_time(now);
        self.quiet.remove(uid);
        let mut request = request.clone();
        request.avoid.extend(self.refusals_of(uid, now));
        if self.placer.reserved_on(uid).is_some() {
            self.forget_place(uid);
            let kept = self.placer.place(uid, &request, now);
            if kept.is_ok() {
                return kept;
            }
        }
        let entry = self.entry(uid, Arc::new(request));
        self.active.push(entry.clone());
        for _ in 0..MAX_TURNS {
            match self.active.pop(|_| true) {
                Some(next) if next.uid == entry.uid => break,
                Some(next) => {
                    if self.attempt(next.clone(), now).is_ok() {
                        self.woken.push(next.uid.to_string());
                    }
                }
                None => break,
            }
        }
        self.active.remove(uid);
        self.attempt(entry, now)
    }

    /// An agent in line, with the place it already has.
    fn entry(&mut self, uid: &str, request: Arc<Request>) -> Entry {
        let before = self.active.remove(uid).or_else(|| self.waiting.remove(uid));
        let number = before.map_or_else(
            || {
                self.next_number += 1;
                self.next_number
            },
            |entry| entry.number,
        );
        Entry {
            uid: uid.into(),
            request,
            number,
        }
    }

    /// Places an entry that is in no queue; where no blade will do it waits.
    fn attempt(&mut self, entry: Entry, now: Duration) -> Result<String, Unschedulable> {
        let placed = self.placer.place(&entry.uid, &entry.request, now);
        match &placed {
            Ok(_) => {
                self.forget_place(&entry.uid);
                self.agents_changed(&entry.request.namespace, &entry.request.labels, now);
            }
            Err(unschedulable) => self.park(entry, unschedulable, now),
        }
        placed
    }

    fn park(&mut self, entry: Entry, unschedulable: &Unschedulable, now: Duration) {
        let tries = self.details.get(&entry.uid).map_or(0, |known| known.tries);
        let (first, most) = BACKOFF;
        let causes: BTreeSet<Cause> = unschedulable.causes.keys().cloned().collect();
        if causes.contains(&Cause::RefusedLately) {
            self.due.insert((now + REFUSAL, entry.uid.clone()));
        }
        if causes.iter().any(Cause::is_about_agents) {
            self.concerned.insert(entry.uid.clone());
        } else {
            self.concerned.remove(&entry.uid);
        }
        let details = Waiting {
            request: entry.request.clone(),
            causes,
            tries: tries.saturating_add(1),
            rests_until: now + first.saturating_mul(1 << tries.min(8)).min(most),
        };
        self.details.insert(entry.uid.clone(), details);
        self.waiting.push(entry);
    }

    fn forget_place(&mut self, uid: &str) {
        self.active.remove(uid);
        self.waiting.remove(uid);
        self.details.remove(uid);
        self.concerned.remove(uid);
    }

    /// Does what is due.
    fn pass_time(&mut self, now: Duration) {
        while self.due.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, uid)) = self.due.pop_first() else { break };
            let Some(mut entry) = self.waiting.remove(&uid) else {
                continue;
            };
            let mut request = Request::clone(&entry.request);
            request.avoid = self.refusals_of(&uid, now).collect();
            entry.request = Arc::new(request);
            self.active.push(entry);
            self.woken.push(uid.to_string());
        }
        if now >= self.swept + ASSUMED / 10 {
            self.swept = now;
            for uid in self.placer.assumed_before(now.saturating_sub(ASSUMED)) {
                self.release(&uid, now);
            }
        }
    }

    fn refusals_of(&mut self, uid: &str, now: Duration) -> impl Iterator<Item = String> + use<> {
        let mut names = Vec::new();
        if let Some(refusals) = self.refusals.get_mut(uid) {
            refusals.retain(|_, until| *until > now);
            names.extend(refusals.keys().cloned());
            if refusals.is_empty() {
                self.refusals.remove(uid);
            }
        }
        names.into_iter()
    }

    /// The table behind what [`Self::place`] would decide now, if nobody stood before it in line.
    pub fn explain(&mut self, uid: &str, request: &Request) -> Explanation {
        self.placer.explain(uid, request)
    }

    // What happens to agents.

    /// The API says that `uid` is on this blade.
    pub fn reserve(&mut self, uid: &str, blade: &str, request: &Request, now: Duration) {
        self.forget_place(uid);
        let is_news = self.placer.reserved_on(uid) != Some(blade);
        self.placer.reserve(uid, blade, request);
        if is_news {
            self.agents_changed(&request.namespace, &request.labels, now);
        }
    }

    /// The agent's microVM is up: another may be started there.
    pub fn confirm(&mut self, uid: &str, now: Duration) {
        if let Some(blade) = self.placer.confirm(uid).map(str::to_owned) {
            self.blade_may_help(&blade, now);
        }
    }

    /// The choice could not be written. Those who wait hear nothing: it is tried again in a moment.
    pub fn unwritten(&mut self, uid: &str) {
        if let Some(blade) = self.placer.reserved_on(uid).map(str::to_owned) {
            self.placer.release(uid);
            self.quiet.insert(uid.to_owned(), blade);
        }
    }

    /// The blade will not have the agent: another is chosen next time, and this one not for some seconds.
    pub fn refused(&mut self, uid: &str, blade: &str, now: Duration) {
        let refusals = self.refusals.entry(uid.to_owned()).or_default();
        refusals.insert(blade.to_owned(), now + REFUSAL);
        self.placer.note_failure(blade, now);
        self.release(uid, now);
    }

    /// A start on this blade failed for a reason of the blade's.
    pub fn note_failure(&mut self, blade: &str, now: Duration) {
        self.placer.note_failure(blade, now);
    }

    /// The agent holds no room any more, and waits for none; true when it held any.
    pub fn release(&mut self, uid: &str, now: Duration) -> bool {
        self.forget_place(uid);
        let held = self.placer.take_back(uid);
        let quiet = self.quiet.remove(uid);
        match &held {
            Some((blade, profile)) => {
                self.blade_may_help(blade, now);
                self.agents_changed(&profile.namespace, &profile.labels, now);
            }
            None => {
                if let Some(blade) = quiet {
                    self.blade_may_help(&blade, now);
                }
            }
        }
        held.is_some()
    }

    /// The agent is gone for good.
    pub fn forget(&mut self, uid: &str, now: Duration) {
        self.release(uid, now);
        self.refusals.remove(uid);
    }

    // What happens to blades.

    /// Adds or replaces a blade; true when something changed.
    pub fn upsert_blade(&mut self, name: &str, blade: Blade, now: Duration) -> bool {
        let changed = self.placer.upsert_blade(name, blade);
        if changed {
            self.blade_may_help(name, now);
            self.domains_changed(now);
        }
        changed
    }

    /// Forgets a blade. Reservations on it stay: its agents may still run.
    pub fn remove_blade(&mut self, name: &str, now: Duration) {
        self.placer.remove_blade(name);
        self.domains_changed(now);
    }

    /// One blade changed for the better, perhaps: whoever it would take now is placed, in the queue's order.
    fn blade_may_help(&mut self, blade: &str, now: Duration) {
        while let Some((cpu, memory)) = self.waiting.least()
            && self.placer.has_room(blade, cpu, memory)
        {
            let placer = &mut self.placer;
            let Some(entry) = self.waiting.pop(|entry| placer.would_take(blade, &entry.request)) else {
                break;
            };
            let uid = entry.uid.to_string();
            let is_placed = self.attempt(entry, now).is_ok();
            self.woken.push(uid);
            if !is_placed {
                break;
            }
        }
    }

    /// Agents of this kind came or went.
    fn agents_changed(&mut self, namespace: &str, labels: &Labels, now: Duration) {
        self.try_later(now, |request, causes| {
            let is_meant = |term: &AgentTerm| term.matches(namespace, labels);
            causes.iter().any(|cause| match cause {
                Cause::AgentAffinity => request.agents.required.iter().any(is_meant),
                Cause::AgentAntiAffinity => request.agents.forbidden.iter().any(is_meant),
                Cause::Skewed => request.spread.iter().any(|one| is_meant(&one.term)),
                // Whose terms those were is not known any more.
                Cause::Repelled => true,
                Cause::PoolFull(_) => request.namespace == namespace,
                _ => false,
            })
        });
    }

    /// A blade came, went or changed: what is a domain may have, too.
    fn domains_changed(&mut self, now: Duration) {
        self.try_later(now, |_, causes| causes.iter().any(Cause::is_about_agents));
    }

    /// Agents that may have been helped are tried when their backoff is over.
    fn try_later(&mut self, now: Duration, may_help: impl Fn(&Request, &BTreeSet<Cause>) -> bool) {
        for uid in &self.concerned {
            if let Some(known) = self.details.get(uid)
                && may_help(&known.request, &known.causes)
            {
                self.due.insert((known.rests_until.max(now), uid.clone()));
            }
        }
    }

    /// When something is due; whoever asks to be called then calls [`Self::tick`].
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Time passed: tries those whose backoff is over.
    pub fn tick(&mut self, now: Duration) {
        self.pass_time(now);
        for _ in 0..MAX_TURNS {
            let Some(entry) = self.active.pop(|_| true) else { break };
            let uid = entry.uid.to_string();
            if self.attempt(entry, now).is_ok() {
                self.woken.push(uid);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn has_refusals(&self, uid: &str) -> bool {
        self.refusals.contains_key(uid)
    }

    #[cfg(test)]
    pub(super) fn would_take(&mut self, blade: &str, request: &Request) -> bool {
        self.placer.would_take(blade, request)
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.active.len() + self.waiting.len() == 0
            && self.details.is_empty()
            && self.concerned.is_empty()
            && self.refusals.is_empty()
            && self.quiet.is_empty()
            && self.placer.reservations.is_empty()
    }
}
