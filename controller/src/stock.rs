//! Agents that pools keep warm, who takes them over, and how often they are asked for. Part of the world, under its lock.
//!
//! Invariant: a warm agent is promised to one claimant at a time: from the choice until its intent was written or given
//! up, and as long as a status names it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use far_api::{FINALIZER, FarAgent, POOL_LABEL, StartPolicy};
use far_core::status::{Claim, Status};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use crate::convert;

/// Annotation with the template an agent was made from.
pub(crate) const TEMPLATE_ANNOTATION: &str = "tiffany.dev/template-hash";
/// Demand is counted over this long.
const WINDOW: Duration = Duration::from_secs(60);
/// Moments of demand that are kept of one pool: no pool keeps more agents.
const MAX_MOMENTS: usize = 10_000;

/// (namespace, name) of a pool.
pub(crate) type PoolKey = (String, String);

/// What a boot settles, and what decided where it was made: an agent that differs cannot take it over.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fit {
    boot: Value,
    /// Where an agent asks for one of these, it has to be the same.
    place: [Value; 4],
}

impl Fit {
    pub(crate) fn of(agent: &FarAgent) -> Option<Self> {
        let (spec, request) = (&agent.spec, convert::request(agent).ok()?);
        Some(Self {
            boot: json!([
                spec.image,
                request.cpu_millis,
                request.memory_mib,
                spec.network.clone().unwrap_or_default(),
                spec.scratch,
                spec.volumes.clone().unwrap_or_default(),
                spec.resources.clone().unwrap_or_default(),
            ]),
            place: [
                json!(spec.node_selector),
                json!(spec.affinity),
                json!(spec.tolerations),
                json!(spec.topology_spread_constraints),
            ],
        })
    }

    /// Whether an agent of this kind may take over one of `warm`'s.
    pub(crate) fn may_take(&self, warm: &Self) -> bool {
        let mut places = self.place.iter().zip(&warm.place);
        self.boot == warm.boot && places.all(|(own, warm)| own.is_null() || own == warm)
    }
}

/// An agent of a pool, as the API tells of it.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) uid: String,
    /// uid of the pool that made it: a pool of the same name may be another.
    pub(crate) pool_uid: String,
    pub(crate) template: String,
    pub(crate) created: i64,
    pub(crate) deleting: bool,
    pub(crate) blade: Option<String>,
    pub(crate) attempt: u32,
    /// It ended, or its blade is lost; with why.
    pub(crate) over: Option<String>,
    /// Its microVM is another agent's.
    pub(crate) claimed: bool,
    /// And who took it over could not remove it.
    pub(crate) left: bool,
    fit: Option<Fit>,
}

/// Moments at which warm agents were asked for.
#[derive(Debug, Default)]
struct Asked {
    moments: VecDeque<Instant>,
    last: Option<Instant>,
    /// Claims that are not in the pool's status yet.
    claims: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Stock {
    members: HashMap<PoolKey, BTreeMap<String, Member>>,
    pools: HashMap<String, PoolKey>,
    /// Warm uid → claimant's uid.
    promised: HashMap<String, String>,
    /// Claimant's uid → what it was promised or refused.
    claimants: HashMap<String, Claimant>,
    asked: HashMap<PoolKey, Asked>,
    /// Templates as they are now.
    templates: HashMap<PoolKey, String>,
}

#[derive(Debug, Default)]
struct Claimant {
    warm: Option<String>,
    /// Blades did not hand these over: they are not tried again.
    refused: HashSet<String>,
    counted: bool,
}

/// Whether the agent goes before a blade heard of it, although others keep its object: nothing will run.
pub(crate) fn never_runs(agent: &FarAgent, status: &Status) -> bool {
    let is_held = agent.finalizers().iter().any(|one| one == FINALIZER);
    agent.metadata.deletion_timestamp.is_some() && !is_held && !status.has_begun()
}

/// The pool that made an agent: its key and uid.
pub(crate) fn pool_of(agent: &FarAgent) -> Option<(PoolKey, String)> {
    if agent.spec.start_policy != StartPolicy::OnClaim {
        return None;
    }
    let owner = agent
        .owner_references()
        .iter()
        .find(|owner| owner.controller == Some(true) && owner.kind == "FarAgentPool")?;
    let name = agent.labels().get(POOL_LABEL).filter(|name| **name == owner.name)?;
    Some(((agent.namespace()?, name.clone()), owner.uid.clone()))
}

impl Stock {
    /// The API tells of an agent. Answers the pool to look at.
    pub(crate) fn observe(&mut self, agent: &FarAgent, status: &Status) -> Option<PoolKey> {
        let uid = agent.uid()?;
        let claimed = status.claimed.as_ref().map(|claim| claim.uid.clone());
        if let Some(warm) = claimed.filter(|_| !status.is_final() && !never_runs(agent, status)) {
            self.promise(&uid, warm);
        } else if status.node.is_some() || status.is_final() {
            // Placed otherwise, or over.
            self.give_back(&uid);
        }
        let (key, pool_uid) = pool_of(agent)?;
        let phase = status.phase();
        let is_over = status.is_final() || phase == far_core::status::Phase::Unknown;
        let member = Member {
            name: agent.name_any(),
            uid: uid.clone(),
            pool_uid,
            template: agent
                .annotations()
                .get(TEMPLATE_ANNOTATION)
                .cloned()
                .unwrap_or_default(),
            created: agent
                .meta()
                .creation_timestamp
                .as_ref()
                .map_or(0, |time| time.0.as_second()),
            deleting: agent.meta().deletion_timestamp.is_some(),
            blade: status.node.clone(),
            attempt: status.attempt,
            over: is_over.then(|| {
                let (reason, message) = (status.reason.as_deref(), status.message.as_deref());
                format!("{}: {}", reason.unwrap_or_default(), message.unwrap_or_default())
            }),
            claimed: false,
            left: false,
            fit: Fit::of(agent),
        };
        self.pools.insert(uid.clone(), key.clone());
        let members = self.members.entry(key.clone()).or_default();
        let (claimed, left) = members
            .get(&uid)
            .map_or((false, false), |known| (known.claimed, known.left));
        members.insert(
            uid,
            Member {
                claimed,
                left,
                ..member
            },
        );
        Some(key)
    }

    /// An agent is gone from the API. Answers the pool to look at.
    pub(crate) fn forget(&mut self, uid: &str) -> Option<PoolKey> {
        self.give_back(uid);
        self.claimants.remove(uid);
        let key = self.pools.remove(uid)?;
        if let Some(members) = self.members.get_mut(&key) {
            members.remove(uid);
            if members.is_empty() {
                self.members.remove(&key);
            }
        }
        Some(key)
    }

    fn promise(&mut self, claimant: &str, warm: String) {
        let known = self.claimants.entry(claimant.to_owned()).or_default();
        if known.warm.as_ref() == Some(&warm) {
            return;
        }
        if let Some(before) = known.warm.replace(warm.clone()) {
            self.promised.remove(&before);
        }
        self.promised.insert(warm, claimant.to_owned());
    }

    /// The promise to a claimant is void.
    pub(crate) fn give_back(&mut self, claimant: &str) -> Option<String> {
        let warm = self.claimants.get_mut(claimant)?.warm.take()?;
        if self.promised.get(&warm).is_some_and(|by| by == claimant) {
            self.promised.remove(&warm);
        }
        Some(warm)
    }

    /// The blade did not hand this one over to the claimant.
    pub(crate) fn refused(&mut self, claimant: &str, warm: &str) {
        self.give_back(claimant);
        let known = self.claimants.entry(claimant.to_owned()).or_default();
        known.refused.insert(warm.to_owned());
    }

    /// Chooses a warm agent for a claimant of this pool and promises it; counts the demand either way. `is_warm` says whether
    /// an agent waits on a blade that can be called.
    pub(crate) fn take(
        &mut self,
        key: &PoolKey,
        claimant: &FarAgent,
        is_warm: impl Fn(&Member) -> bool,
    ) -> Option<(String, Claim)> {
        let uid = claimant.uid()?;
        let known = self.claimants.entry(uid.clone()).or_default();
        if !std::mem::replace(&mut known.counted, true) {
            self.asked.entry(key.clone()).or_default().count();
        }
        let wanted = Fit::of(claimant)?;
        let wanted_blade = claimant.spec.node_name.as_deref();
        let members = self.members.get(key)?;
        let candidates = members.values().filter(|one| {
            !one.deleting
                && one.over.is_none()
                && !one.claimed
                && !self.promised.contains_key(&one.uid)
                && !known.refused.contains(&one.uid)
                && wanted_blade.is_none_or(|blade| one.blade.as_deref() == Some(blade))
                && one.fit.as_ref().is_some_and(|fit| wanted.may_take(fit))
                && is_warm(one)
        });
        let template = self.templates.get(key);
        let is_current = |one: &Member| template.is_none_or(|template| *template == one.template);
        let chosen = far_core::pools::hand_out(candidates.map(|one| (is_current(one), one.created, one.uid.clone())))?;
        let member = members.get(&chosen)?;
        let (blade, claim) = (
            member.blade.clone()?,
            Claim {
                name: member.name.clone(),
                uid: chosen.clone(),
                attempt: member.attempt,
            },
        );
        self.promise(&uid, chosen);
        Some((blade, claim))
    }

    /// An agent was taken over. Answers its pool, the first time.
    pub(crate) fn claimed(&mut self, warm: &str) -> Option<PoolKey> {
        let key = self.pools.get(warm)?.clone();
        let member = self.members.get_mut(&key)?.get_mut(warm)?;
        if std::mem::replace(&mut member.claimed, true) {
            return None;
        }
        self.asked.entry(key.clone()).or_default().claims += 1;
        Some(key)
    }

    /// An agent that was taken over could not be removed. Answers its pool.
    pub(crate) fn left(&mut self, warm: &str) -> Option<PoolKey> {
        let key = self.pools.get(warm)?.clone();
        self.members.get_mut(&key)?.get_mut(warm)?.left = true;
        Some(key)
    }

    /// What the pool's template is now.
    pub(crate) fn set_template(&mut self, key: &PoolKey, template: &str) {
        if self.templates.get(key).is_none_or(|known| known != template) {
            self.templates.insert(key.clone(), template.to_owned());
        }
    }

    /// Agents of a pool, and whether each is promised.
    pub(crate) fn members(&self, key: &PoolKey, pool_uid: &str) -> Vec<(Member, bool)> {
        let members = self.members.get(key).into_iter().flat_map(BTreeMap::values);
        members
            .filter(|one| one.pool_uid == pool_uid)
            .map(|one| (one.clone(), self.promised.contains_key(&one.uid)))
            .collect()
    }

    /// (asked for in the last minute, time since it was last asked for, claims since this was last called).
    pub(crate) fn demand(&mut self, key: &PoolKey) -> (u32, Option<Duration>, u64) {
        let Some(asked) = self.asked.get_mut(key) else {
            return (0, None, 0);
        };
        asked.forget_old();
        let last_minute = u32::try_from(asked.moments.len()).unwrap_or(u32::MAX);
        let since = asked.last.map(|last| last.elapsed());
        (last_minute, since, std::mem::take(&mut asked.claims))
    }

    /// Claims whose count was not written after all.
    pub(crate) fn count_again(&mut self, key: &PoolKey, claims: u64) {
        if claims > 0 {
            self.asked.entry(key.clone()).or_default().claims += claims;
        }
    }

    /// The pool is gone.
    pub(crate) fn forget_pool(&mut self, key: &PoolKey) {
        self.asked.remove(key);
        self.templates.remove(key);
    }
}

impl Asked {
    fn count(&mut self) {
        self.forget_old();
        if self.moments.len() >= MAX_MOMENTS {
            self.moments.pop_front();
        }
        self.moments.push_back(Instant::now());
        self.last = self.moments.back().copied();
    }

    fn forget_old(&mut self) {
        while self.moments.front().is_some_and(|at| at.elapsed() >= WINDOW) {
            self.moments.pop_front();
        }
    }
}
