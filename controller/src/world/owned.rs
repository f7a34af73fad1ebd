//! What pools and queues ask of the world.

use std::time::Duration;

use far_api::FarAgent;
use far_core::{
    pools::{Member, Stand},
    status::{Claim, Stage, Status},
};
use kube::ResourceExt;

use super::{Inner, World};
use crate::stock::{self, PoolKey};

/// An agent of a pool and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct PoolMember {
    pub(crate) name: String,
    /// Why it is over.
    pub(crate) why: Option<String>,
    pub(crate) seen: Member,
}

/// How a pool was asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Asked {
    pub(crate) last_minute: u32,
    pub(crate) since: Option<Duration>,
    /// Claims that the pool's status does not count yet; they are the caller's now.
    pub(crate) claims: u64,
}

impl World {
    /// Pools and queues hear of an agent that the API tells of.
    pub(super) fn note_owned(&self, inner: &mut Inner, agent: &FarAgent, status: &Status) {
        if let Some(pool) = inner.stock.observe(agent, status) {
            self.pool_work.mark(pool);
        }
        if let Some(queue) = inner.tries.observe(agent, status) {
            self.queue_work.mark(queue);
        }
    }

    /// And of one that is gone.
    pub(super) fn forget_owned(&self, inner: &mut Inner, uid: &str) {
        if let Some(pool) = inner.stock.forget(uid) {
            self.pool_work.mark(pool);
        }
        if let Some(queue) = inner.tries.forget(uid) {
            self.queue_work.mark(queue);
        }
    }

    /// Promises a warm agent of its pool to an agent: the blade, and whose microVM it is.
    pub(crate) fn take_warm(&self, agent: &FarAgent) -> Option<(String, Claim)> {
        let pool = agent.spec.pool_ref.as_ref()?;
        let key = (agent.namespace()?, pool.name.clone());
        let mut inner = self.lock();
        if !inner.agents.contains_key(&agent.uid()?) {
            return None;
        }
        let Inner {
            stock, nodes, reports, ..
        } = &mut *inner;
        let taken = stock.take(&key, agent, |member| {
            let node = member.blade.as_ref().and_then(|blade| nodes.get(blade));
            let is_open = node.is_some_and(|node| {
                node.ready && node.unsynced_since.is_none() && !node.revoked && !node.blade.cordoned
            });
            is_open && stage(reports, member) == Some(Stage::Warm)
        });
        // Also without one: the demand was counted.
        self.pool_work.mark(key);
        taken
    }

    /// The promise was not written.
    pub(crate) fn give_warm_back(&self, uid: &str) {
        self.lock().stock.give_back(uid);
    }

    /// The blade did not hand the warm agent over: it is not tried again for this claimant.
    pub(crate) fn warm_refused(&self, uid: &str, warm: &str) {
        let mut inner = self.lock();
        if inner.agents.contains_key(uid) {
            inner.stock.refused(uid, warm);
        }
    }

    /// The blade handed a warm agent over; true where that is news.
    pub(crate) fn warm_claimed(&self, warm: &str) -> bool {
        let pool = self.lock().stock.claimed(warm);
        let is_news = pool.is_some();
        if let Some(pool) = pool {
            self.pool_work.mark(pool);
        }
        is_news
    }

    /// A warm agent that was handed over could not be removed: its pool does that now.
    pub(crate) fn warm_left(&self, warm: &str) {
        if let Some(pool) = self.lock().stock.left(warm) {
            self.pool_work.mark(pool);
        }
    }

    /// Agents of a pool whose template is now `template`.
    pub(crate) fn pool_members(&self, key: &PoolKey, pool_uid: &str, template: &str) -> Vec<PoolMember> {
        let mut inner = self.lock();
        inner.stock.set_template(key, template);
        let (stock, reports) = (&inner.stock, &inner.reports);
        let members = stock.members(key, pool_uid).into_iter();
        members
            .map(|(member, promised)| {
                let stage = stage(reports, &member);
                let stand = if member.deleting {
                    Stand::Leaving
                } else if member.left {
                    Stand::Spent
                } else if promised || member.claimed {
                    Stand::Taken
                } else if member.over.is_some() || stage == Some(Stage::Ended) {
                    Stand::Over
                } else if stage == Some(Stage::Warm) {
                    Stand::Warm
                } else {
                    Stand::Coming
                };
                PoolMember {
                    name: member.name.clone(),
                    why: member.over.clone(),
                    seen: Member {
                        uid: member.uid.clone(),
                        stand,
                        is_current: member.template == template,
                        created: member.created,
                    },
                }
            })
            .collect()
    }

    /// How a pool was asked for lately.
    pub(crate) fn pool_asked(&self, key: &PoolKey) -> Asked {
        let (last_minute, since, claims) = self.lock().stock.demand(key);
        Asked {
            last_minute,
            since,
            claims,
        }
    }

    /// Claims that could not be counted after all.
    pub(crate) fn count_claims_again(&self, key: &PoolKey, claims: u64) {
        self.lock().stock.count_again(key, claims);
    }

    /// The pool is gone.
    pub(crate) fn forget_pool(&self, key: &PoolKey) {
        self.lock().stock.forget_pool(key);
    }

    /// What is known of an agent of a task: its uid, and how it goes.
    pub(crate) fn task_agent(&self, namespace: &str, task: &str, agent: &str) -> Option<crate::tries::Try> {
        self.lock().tries.get(namespace, task, agent).cloned()
    }
}

/// How far the blade has come with an agent of a pool.
fn stage(
    reports: &std::collections::HashMap<String, std::collections::HashMap<String, far_core::status::Report>>,
    member: &stock::Member,
) -> Option<Stage> {
    let report = reports.get(member.blade.as_ref()?)?.get(&member.uid)?;
    (report.attempt == member.attempt).then_some(report.stage)
}
