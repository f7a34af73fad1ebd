//! What the controller knows at this moment: agents, blades, reservations, and what blades say. One lock, held only for
//! plain computation, never over an await.
//!
//! All of it is derived: from the watches, from the blades' event streams, and from the answers to our own writes.

mod leaving;
mod owned;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use far_api::{FarAgent, FarNode};
use far_core::{
    eviction::Patience,
    lifecycle::BladeView,
    placement::{Blade, Packing, Request, Scheduler, Unschedulable},
    status::{End, EndReason, Report, Stage, Status},
};
use far_proto::node::Identity;
use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, ObjectRefExtra},
};
use tokio::sync::Notify;
use tonic::transport::Channel;

use crate::{
    convert,
    dirty::Dirty,
    stock::{PoolKey, Stock, never_runs},
    tries::{QueueKey, Tries},
    work::Work,
};
use leaving::Leaving;
pub(crate) use owned::{Asked, PoolMember};

/// Ends that speak against the blade rather than the agent.
const BLADES_FAULTS: [EndReason; 4] = [
    EndReason::BootTimeout,
    EndReason::VmmCrashed,
    EndReason::NetworkError,
    EndReason::InitLost,
];
/// A blade that is not connected for less than this is expected back any moment: as long as a connection may take.
const SETTLING: Duration = Duration::from_secs(10);
/// Between two searches for agents that wait, of all of them together, and between two for one.
const SEARCH_EVERY: Duration = Duration::from_millis(100);
const SEARCHES: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(600));
/// Reports that are kept of one blade of agents that are not there: soon known to be, or orphans. Those that are there have
/// their place besides.
const MAX_STRAY_REPORTS: usize = 1024;

/// An agent as the index keeps it.
#[derive(Debug)]
struct Agent {
    reference: ObjectRef<FarAgent>,
    node: Option<String>,
    /// The newest attempt.
    attempt: u32,
    /// Nothing will be done about it before the API changes it.
    settled: bool,
    /// Version of the newest object that was told of.
    seen: u64,
    /// The newest object our own writes returned, while the watch lags behind it.
    written: Option<Arc<FarAgent>>,
    /// When the status was last written.
    wrote_at: Option<Instant>,
}

/// Who tells of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Teller {
    /// The watch, while it lists: in any order.
    List,
    /// The watch: in the order of versions, over all agents.
    Watch,
    /// The answer to a write of ours.
    Write,
    /// The answer to a creation of ours. The watch may not have come that far.
    Creation,
}

/// A blade as the index keeps it.
#[derive(Debug)]
struct Node {
    /// Of the controller's own calls.
    channel: Option<Channel>,
    /// Of users' calls through the gateway: what they do not read must not hold back the controller's.
    user_channel: Option<Channel>,
    /// Since when not every state of the blade's agents is known, or changes do not come in; `None`: it is connected.
    unsynced_since: Option<Instant>,
    ready: bool,
    /// Since when it is not ready.
    lost_since: Option<Instant>,
    /// As the API tells of it.
    blade: Blade,
    /// An operator revoked it: no new agents, no calls.
    revoked: bool,
    /// Told when the blade's link has to begin anew, after a while.
    distrusted: Arc<Notify>,
    /// What makes its agents leave.
    leaving: Leaving,
}

/// What is known of an agent's blade.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) blade: BladeView,
    /// What the blade says of the agent.
    pub(crate) report: Option<Report>,
    /// When the agent has to leave it.
    pub(crate) leaves_at: Option<Instant>,
}

impl Node {
    /// Since when its agents' fate is unknown: it is silent, or it speaks but has not been reached for `patience`.
    fn lost_since(&self, patience: Duration) -> Option<Instant> {
        let unsynced = self.unsynced_since?;
        let unreached = (unsynced.elapsed() >= patience).then(|| unsynced + patience);
        [self.lost_since, unreached].into_iter().flatten().min()
    }
}

/// How many there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Census {
    pub(crate) agents: usize,
    /// Of them, those that have a blade.
    pub(crate) placed: usize,
    pub(crate) blades: usize,
    /// Of them, those whose events come in.
    pub(crate) connected: usize,
}

#[derive(Debug)]
struct Inner {
    scheduler: Scheduler,
    agents: HashMap<String, Agent>,
    /// Version of the newest agent that the watch told of: what is not newer and has no row is gone.
    watched: u64,
    on_blade: HashMap<String, HashSet<String>>,
    nodes: HashMap<String, Node>,
    /// Blades that are named but not there, since when.
    missing: HashMap<String, Instant>,
    /// When a blade was last told that it need not end its agents.
    fence_put_off: HashMap<String, Instant>,
    /// Agents that pools keep warm, and agents of tasks.
    stock: Stock,
    tries: Tries,
    /// (blade, uid): the newest attempt the blade speaks of.
    reports: HashMap<String, HashMap<String, Report>>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct World {
    inner: Mutex<Inner>,
    /// Placement's clock begins here.
    begun: Instant,
    pub(crate) dirty: Arc<Dirty>,
    /// Pools and queues to look at.
    pub(crate) pool_work: Work<PoolKey>,
    pub(crate) queue_work: Work<QueueKey>,
    lost_after: Duration,
    fence_after: Duration,
}

impl World {
    pub(crate) fn new(seed: u64, packing: Packing, lost_after: Duration, fence_after: Duration) -> Self {
        let inner = Inner {
            scheduler: Scheduler::new(seed, packing),
            agents: HashMap::new(),
            watched: 0,
            on_blade: HashMap::new(),
            nodes: HashMap::new(),
            missing: HashMap::new(),
            fence_put_off: HashMap::new(),
            stock: Stock::default(),
            tries: Tries::default(),
            reports: HashMap::new(),
        };
        Self {
            inner: Mutex::new(inner),
            begun: Instant::now(),
            dirty: Arc::default(),
            pool_work: Work::default(),
            queue_work: Work::default(),
            lost_after,
            fence_after,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in here panics half-way through a change that others rely on.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Agents, as the API tells of them.

    /// The watch, or an answer to our own write, tells of an agent. Answers come late: one that is not newer than what is
    /// known, or of an agent that is gone meanwhile, says nothing.
    pub(crate) fn observe(&self, agent: &FarAgent, by: Teller) {
        let Some(uid) = agent.uid() else { return };
        let (status, version) = (convert::status_from_api(agent.status.as_ref()), version(agent));
        let mut inner = self.lock();
        if by == Teller::Watch {
            inner.watched = inner.watched.max(version);
        }
        let may_be_new = match by {
            Teller::List | Teller::Watch => true,
            Teller::Creation => version > inner.watched,
            Teller::Write => false,
        };
        if may_be_new {
            inner.agents.entry(uid.clone()).or_insert_with(|| Agent {
                reference: reference_to(agent),
                node: None,
                attempt: 0,
                settled: false,
                seen: 0,
                written: None,
                wrote_at: None,
            });
        }
        let Some(entry) = inner.agents.get_mut(&uid) else {
            return;
        };
        match by {
            Teller::List | Teller::Watch => {
                if entry.written.is_some() && version < entry.seen {
                    // The watch is behind our own write: nothing new.
                    return;
                }
                entry.written = None;
            }
            Teller::Write | Teller::Creation => {
                entry.wrote_at = Some(Instant::now());
                if version <= entry.seen {
                    return;
                }
                entry.written = Some(Arc::new(agent.clone()));
            }
        }
        entry.seen = version;
        entry.attempt = status.attempt;
        entry.settled = convert::is_settled(agent, &status);
        let before = std::mem::replace(&mut entry.node, status.node.clone());
        if before != status.node {
            inner.leave(before.as_deref(), &uid);
        }
        self.note_owned(&mut inner, agent, &status);
        let Some(node) = &status.node else {
            // Its attempt is over, or it asks for no blade any more: neither holds room nor stands in line. (A blade that
            // is chosen and not written yet is no change from one blade to none.)
            let is_wanted = agent.metadata.deletion_timestamp.is_none() && agent.spec.suspend != Some(true);
            if before.is_some() || !is_wanted {
                self.release_locked(&mut inner, &uid);
            }
            // It is to be tried again, after an end there.
            let ended = status
                .last_attempt
                .filter(|last| last.attempt == status.attempt && last.node == before);
            if let (Some(last), Some(blade)) = (ended, &before)
                && is_fault_of_blade(&last.reason)
            {
                inner.scheduler.note_failure(blade, self.now());
            }
            return;
        };
        inner.on_blade.entry(node.clone()).or_default().insert(uid.clone());
        if status.is_final() || never_runs(agent, &status) {
            let is_news = self.release_locked(&mut inner, &uid) && status.is_final();
            if is_news && status.reason.as_deref().is_some_and(is_fault_of_blade) {
                inner.scheduler.note_failure(node, self.now());
            }
        } else if let Ok(request) = convert::request(agent) {
            inner.scheduler.reserve(&uid, node, &request, self.now());
            if status.is_booted() {
                inner.scheduler.confirm(&uid, self.now());
            }
            self.tell_woken(&mut inner);
        }
    }

    /// The agent is gone from the API.
    pub(crate) fn forget(&self, uid: &str) {
        let mut inner = self.lock();
        if let Some(agent) = inner.agents.remove(uid) {
            inner.leave(agent.node.as_deref(), uid);
            if let Some(reports) = agent.node.and_then(|node| inner.reports.get_mut(&node)) {
                reports.remove(uid);
            }
        }
        inner.scheduler.forget(uid, self.now());
        self.tell_woken(&mut inner);
        self.forget_owned(&mut inner, uid);
    }

    /// After a complete list: whatever is not in it is gone.
    pub(crate) fn keep_only(&self, uids: &HashSet<String>) {
        let mut inner = self.lock();
        // Versions begin anew where the API was restored.
        inner.watched = 0;
        let gone: Vec<String> = inner
            .agents
            .keys()
            .filter(|uid| !uids.contains(*uid))
            .cloned()
            .collect();
        drop(inner);
        gone.iter().for_each(|uid| self.forget(uid));
    }

    /// The newest known object of an agent: what the watch says, or what our last write returned.
    pub(crate) fn newest(&self, seen: Arc<FarAgent>) -> Arc<FarAgent> {
        let written = seen.uid().and_then(|uid| self.lock().agents.get(&uid)?.written.clone());
        written
            .filter(|written| version(written) > version(&seen))
            .unwrap_or(seen)
    }

    /// How long ago the agent's status was written.
    pub(crate) fn since_written(&self, uid: &str) -> Option<Duration> {
        self.lock().agents.get(uid)?.wrote_at.map(|at| at.elapsed())
    }

    // Placement.

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Chooses a blade and holds its room until the choice is written or given back. Where there is none the agent waits
    /// in line, and is looked at again when it has a blade.
    /// One that is gone meanwhile neither gets room nor waits.
    pub(crate) fn place(&self, uid: &str, request: &Request) -> Result<String, Unschedulable> {
        let mut inner = self.lock();
        if !inner.agents.contains_key(uid) {
            return Err(Unschedulable::default());
        }
        let placed = inner.scheduler.place(uid, request, self.now());
        self.tell_woken(&mut inner);
        placed
    }

    /// Time passed: backoffs and refusals end.
    pub(crate) fn tick(&self) {
        let mut inner = self.lock();
        inner.scheduler.tick(self.now());
        self.tell_woken(&mut inner);
    }

    /// When to search again for an agent that waits: each search costs, so the more wait the rarer is each one's.
    pub(crate) fn until_next_search(&self) -> Duration {
        let waiting = u32::try_from(self.lock().scheduler.waiting()).unwrap_or(u32::MAX);
        SEARCH_EVERY.saturating_mul(waiting).clamp(SEARCHES.0, SEARCHES.1)
    }

    /// Whether an agent stands in line for room.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.lock().scheduler.waiting() > 0
    }

    /// A blade that only has to be connected to may take an agent in a moment: then nothing is said about it yet.
    pub(crate) fn is_settling(&self) -> bool {
        let inner = self.lock();
        inner
            .nodes
            .values()
            .any(|node| node.ready && node.unsynced_since.is_some_and(|since| since.elapsed() < SETTLING))
    }

    /// Gives the room back: the choice was not written, or the blade refused. Those who wait hear only of a refusal: what
    /// was not written is tried again in a moment, and waking others at every try would spin as fast as the API fails.
    pub(crate) fn unplace(&self, uid: &str, refused_by: Option<&str>) {
        let mut inner = self.lock();
        if !inner.agents.contains_key(uid) {
            return;
        }
        match refused_by {
            Some(blade) => inner.scheduler.refused(uid, blade, self.now()),
            None => inner.scheduler.unwritten(uid),
        }
        self.tell_woken(&mut inner);
    }

    /// The agent holds no room any more, and stands in no line; true when it held any.
    fn release_locked(&self, inner: &mut Inner, uid: &str) -> bool {
        let held = inner.scheduler.release(uid, self.now());
        self.tell_woken(inner);
        held
    }

    /// Agents that were placed while others asked, or should ask again.
    fn tell_woken(&self, inner: &mut Inner) {
        for uid in inner.scheduler.take_woken() {
            if let Some(agent) = inner.agents.get(&uid) {
                self.dirty.mark(agent.reference.clone());
            }
        }
    }

    // Blades, as the API tells of them.

    /// The watch tells of a blade.
    pub(crate) fn observe_node(&self, node: &FarNode) {
        let name = node.name_any();
        let mut inner = self.lock();
        inner.missing.remove(&name);
        let ready = convert::is_ready(node);
        let entry = inner.nodes.entry(name.clone()).or_insert_with(|| Node {
            channel: None,
            user_channel: None,
            unsynced_since: Some(Instant::now()),
            ready,
            lost_since: None,
            blade: Blade::default(),
            revoked: false,
            distrusted: Arc::default(),
            leaving: Leaving::default(),
        });
        let turned = entry.ready != ready;
        entry.ready = ready;
        entry.lost_since = if ready {
            None
        } else {
            entry.lost_since.or_else(|| Some(Instant::now()))
        };
        entry.blade = convert::blade(node);
        let leaving = Leaving::of(node, &entry.leaving);
        let must_look = leaving.differs(&entry.leaving);
        entry.leaving = leaving;
        self.offer(&mut inner, &name);
        if turned || must_look {
            self.wake_blade(&inner, &name);
        }
    }

    /// Tells placement what a blade is worth now.
    fn offer(&self, inner: &mut Inner, name: &str) {
        let Some(node) = inner.nodes.get(name) else { return };
        let blade = Blade {
            unreachable: node.unsynced_since.is_some() && !node.revoked,
            cordoned: node.revoked || node.blade.cordoned,
            ..node.blade.clone()
        };
        inner.scheduler.upsert_blade(name, blade, self.now());
        self.tell_woken(inner);
    }

    /// The blade is gone from the API.
    pub(crate) fn forget_node(&self, name: &str) {
        let mut inner = self.lock();
        inner.nodes.remove(name);
        inner.reports.remove(name);
        inner.scheduler.remove_blade(name, self.now());
        inner.missing.insert(name.to_owned(), Instant::now());
        self.wake_blade(&inner, name);
        self.tell_woken(&mut inner);
    }

    fn wake_blade(&self, inner: &Inner, name: &str) {
        for uid in inner.on_blade.get(name).into_iter().flatten() {
            // A blade's ended agents outnumber the others by far.
            if let Some(agent) = inner.agents.get(uid).filter(|agent| !agent.settled) {
                self.dirty.mark(agent.reference.clone());
            }
        }
    }

    /// What is known of a blade, and what it says of an agent.
    pub(crate) fn view(&self, uid: &str, status: &Status, patience: &[Patience]) -> View {
        let Some(name) = &status.node else {
            return View {
                blade: BladeView::Unreachable,
                report: None,
                leaves_at: None,
            };
        };
        let mut inner = self.lock();
        let report = inner.reports.get(name).and_then(|reports| reports.get(uid)).cloned();
        // Before this controller led, another may have put the fence off.
        let put_off = inner.fence_put_off.get(name).copied().unwrap_or(self.begun);
        let lost = match inner.nodes.get(name) {
            Some(node) => node.lost_since(self.lost_after).is_some(),
            None => {
                let since = *inner.missing.entry(name.clone()).or_insert_with(Instant::now);
                since.elapsed() >= self.lost_after
            }
        };
        let node = inner.nodes.get(name);
        let blade = match node {
            Some(node) if node.unsynced_since.is_none() => BladeView::Connected,
            Some(_) | None if !lost => BladeView::Unreachable,
            Some(_) | None if put_off.elapsed() >= self.fence_after => BladeView::Fenced,
            Some(_) | None => BladeView::Lost,
        };
        View {
            blade,
            report,
            leaves_at: node.and_then(|node| node.leaving.at(patience)),
        }
    }

    /// A heartbeat of the blade is about to be answered. False: calls do not reach it, so its agents' fate is unknown here,
    /// and it has to end them when its fence time is over. True: it need not, for that long again.
    pub(crate) fn puts_fence_off(&self, blade: &str) -> bool {
        let mut inner = self.lock();
        let unsynced = inner.nodes.get(blade).and_then(|node| node.unsynced_since);
        let is_reached = unsynced.is_none_or(|since| since.elapsed() < self.lost_after);
        if is_reached {
            inner.fence_put_off.insert(blade.to_owned(), Instant::now());
        }
        is_reached
    }

    // Blades, as they tell of themselves.

    /// How calls reach a blade.
    pub(crate) fn channel(&self, blade: &str) -> Option<Channel> {
        self.lock().nodes.get(blade)?.channel.clone()
    }

    /// How users' calls reach a blade.
    pub(crate) fn user_channel(&self, blade: &str) -> Option<Channel> {
        self.lock().nodes.get(blade)?.user_channel.clone()
    }

    /// The agents that live on blades, by blade and uid: of one namespace, or of all (an empty text).
    pub(crate) fn placed(&self, namespace: &str) -> Vec<(String, HashMap<String, Identity>)> {
        let inner = self.lock();
        let on_blade = |uids: &HashSet<String>| -> HashMap<String, Identity> {
            uids.iter()
                .filter_map(|uid| {
                    // A blade's ended agents outnumber the others by far.
                    let agent = inner.agents.get(uid).filter(|agent| !agent.settled)?;
                    let own = agent.reference.namespace.as_deref().unwrap_or_default();
                    (namespace.is_empty() || own == namespace).then(|| {
                        let identity = Identity {
                            uid: uid.clone(),
                            attempt: agent.attempt,
                            namespace: own.to_owned(),
                            name: agent.reference.name.clone(),
                        };
                        (uid.clone(), identity)
                    })
                })
                .collect()
        };
        inner
            .on_blade
            .iter()
            .map(|(blade, uids)| (blade.clone(), on_blade(uids)))
            .filter(|(_, agents)| !agents.is_empty())
            .collect()
    }

    pub(crate) fn census(&self) -> Census {
        let inner = self.lock();
        Census {
            agents: inner.agents.len(),
            placed: inner.on_blade.values().map(HashSet::len).sum(),
            blades: inner.nodes.len(),
            connected: inner
                .nodes
                .values()
                .filter(|node| node.unsynced_since.is_none())
                .count(),
        }
    }

    /// Answers what tells the link that its blade is distrusted.
    pub(crate) fn set_channel(&self, blade: &str, channel: Channel, user_channel: Channel) -> Arc<Notify> {
        let distrusted = self.lock().nodes.get_mut(blade).map(|node| {
            node.channel = Some(channel);
            node.user_channel = Some(user_channel);
            node.revoked = false;
            node.distrusted.clone()
        });
        self.unsynced(blade);
        distrusted.unwrap_or_default()
    }

    /// The blade was revoked: as good as cordoned, and not to be called.
    pub(crate) fn revoked(&self, blade: &str) {
        if let Some(node) = self.lock().nodes.get_mut(blade) {
            (node.channel, node.user_channel) = (None, None);
            node.revoked = true;
        }
        self.unsynced(blade);
    }

    /// The blade answers what cannot be: it is left alone until its link was made anew.
    pub(crate) fn distrust(&self, blade: &str) {
        self.unsynced(blade);
        if let Some(node) = self.lock().nodes.get(blade) {
            node.distrusted.notify_one();
        }
    }

    /// The blade told everything it knows; `told` are the uids of it. What it no longer speaks of is forgotten.
    pub(crate) fn synced(&self, blade: &str, told: &HashSet<String>) {
        let mut inner = self.lock();
        if let Some(reports) = inner.reports.get_mut(blade) {
            reports.retain(|uid, _| told.contains(uid));
        }
        if let Some(node) = inner.nodes.get_mut(blade) {
            node.unsynced_since = None;
        }
        self.offer(&mut inner, blade);
        self.wake_blade(&inner, blade);
    }

    /// Changes of the blade's agents do not come in any more.
    pub(crate) fn unsynced(&self, blade: &str) {
        let mut inner = self.lock();
        if let Some(node) = inner.nodes.get_mut(blade) {
            node.unsynced_since.get_or_insert_with(Instant::now);
        }
        self.offer(&mut inner, blade);
    }

    /// A blade told everything it keeps; `listed` are the uids of it. What it says nothing of, and has no agent there, is
    /// forgotten.
    pub(crate) fn keep_reports(&self, blade: &str, listed: &HashSet<String>) {
        let mut inner = self.lock();
        let Inner { reports, on_blade, .. } = &mut *inner;
        let here = on_blade.get(blade);
        if let Some(reports) = reports.get_mut(blade) {
            reports.retain(|uid, _| listed.contains(uid) || here.is_some_and(|here| here.contains(uid)));
        }
    }

    /// A blade speaks of an attempt. An older attempt than the newest known says nothing.
    pub(crate) fn told(&self, blade: &str, uid: &str, report: Report) {
        let mut inner = self.lock();
        let Some(reference) = inner
            .agents
            .get(uid)
            .filter(|agent| agent.node.as_deref().is_none_or(|node| node == blade))
            .map(|agent| (!agent.settled).then(|| agent.reference.clone()))
        else {
            // Not (yet) known to the watch, or another blade's: kept, so that it is there when the watch catches up.
            inner.keep_report(blade, uid, report);
            return;
        };
        inner.keep_report(blade, uid, report);
        drop(inner);
        if let Some(reference) = reference {
            self.dirty.mark(reference);
        }
    }

    /// The blade forgot the attempt because we told it to.
    pub(crate) fn untold(&self, blade: &str, uid: &str, attempt: u32) {
        if let Some(reports) = self.lock().reports.get_mut(blade)
            && reports.get(uid).is_some_and(|report| report.attempt == attempt)
        {
            reports.remove(uid);
        }
    }

    /// No agent owns this attempt on this blade: its agent is gone from the API, elsewhere, or at a newer attempt. An
    /// attempt is in the API, and known here, before its blade hears of it; so a new one is never taken for an orphan.
    ///
    /// The ended attempt before the current one stays while its agent is there: people read its output.
    pub(crate) fn is_orphan(&self, blade: &str, uid: &str, report: &Report) -> bool {
        let inner = self.lock();
        let Some(agent) = inner.agents.get(uid) else {
            return true;
        };
        let is_current = agent.node.as_deref() == Some(blade) && agent.attempt <= report.attempt;
        let newest_ended = if agent.node.is_some() {
            agent.attempt.saturating_sub(1)
        } else {
            agent.attempt
        };
        let is_last = report.stage == Stage::Ended && !report.is_withdrawn() && report.attempt == newest_ended;
        !is_current && !is_last
    }
}

impl Inner {
    fn leave(&mut self, blade: Option<&str>, uid: &str) {
        let Some(blade) = blade else { return };
        if let Some(uids) = self.on_blade.get_mut(blade) {
            uids.remove(uid);
            if uids.is_empty() {
                self.on_blade.remove(blade);
            }
        }
    }

    /// Of an agent that is not there only where it stands: a blade may speak of any number of them.
    fn keep_report(&mut self, blade: &str, uid: &str, report: Report) {
        let here = self.on_blade.get(blade);
        let is_here = here.is_some_and(|here| here.contains(uid));
        let most = here.map_or(0, HashSet::len) + MAX_STRAY_REPORTS;
        let reports = self.reports.entry(blade.to_owned()).or_default();
        let is_old = match reports.get(uid) {
            Some(known) => (known.attempt, known.stage) > (report.attempt, report.stage),
            None => !is_here && reports.len() >= most,
        };
        if !is_old {
            let report = if is_here { report } else { without_texts(report) };
            reports.insert(uid.to_owned(), report);
        }
    }
}

fn without_texts(report: Report) -> Report {
    Report {
        image_digest: String::new(),
        resources: None,
        end: report.end.map(|end| End {
            message: String::new(),
            tail: String::new(),
            ..end
        }),
        message: String::new(),
        ..report
    }
}

fn is_fault_of_blade(reason: &str) -> bool {
    BLADES_FAULTS.iter().any(|fault| fault.as_str() == reason)
}

/// Without uid and version, which are most of it and tell no agent from another here.
fn reference_to(agent: &FarAgent) -> ObjectRef<FarAgent> {
    let mut reference = ObjectRef::from_obj(agent);
    reference.extra = ObjectRefExtra::default();
    reference
}

/// resourceVersion as the number it is in every API server; 0 where it is none.
fn version(agent: &FarAgent) -> u64 {
    agent
        .resource_version()
        .and_then(|version| version.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
