//! The pool controller: keeps as many agents warm as a pool wants now. far-core decides how many and which; agents are
//! made and removed here, and what was seen is written to the pool's status.
//!
//! An agent that was made is in the world before the next look (the API's answer puts it there), so a slow watch makes no
//! second one. Claims are not made here: an agent with spec.poolRef does that itself (`reconcile/claim.rs`).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use far_api::{
    FarAgent, FarAgentPool, FarAgentPoolStatus, FarAgentTemplate, LostPolicy, POOL_LABEL, RestartPolicy, StartPolicy,
    UpdateStrategy, pool,
};
use far_core::pools::{self, Autoscale, Demand, Stand};
use futures::{StreamExt, stream};
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, PostParams, Preconditions},
    runtime::reflector::{ObjectRef, Store},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    status_writer,
    stock::{PoolKey, TEMPLATE_ANNOTATION},
    watching,
    world::{Asked, PoolMember, Teller, World},
};

/// Agents made or removed in one pass, and calls at the same time: a pool of thousands does not keep others waiting.
const BATCH: usize = 50;
const CALLS: usize = 8;
/// Between two writes of a pool's status.
const COALESCE: Duration = Duration::from_secs(1);
/// While time alone may change how many are wanted.
const AUTOSCALE_LOOK: Duration = Duration::from_secs(5);
/// After a failure of the API.
const RETRY: Duration = Duration::from_secs(1);
/// Longest value of a label.
const MAX_LABEL: usize = 63;

/// See the module.
pub(crate) struct Pools {
    pub(crate) client: Client,
    pub(crate) world: Arc<World>,
    /// Cancelled when another controller leads.
    pub(crate) deposed: CancellationToken,
    /// Cancelled once agents are listed completely.
    pub(crate) agents_known: CancellationToken,
}

/// What is remembered of a pool from one pass to the next.
#[derive(Debug, Default, Clone)]
struct Memory {
    wrote_at: Option<Instant>,
    /// Agents in a row that ended before they were warm.
    failures: u32,
    not_before: Option<Instant>,
    why: String,
}

struct Keeper {
    own: Pools,
    pools: Store<FarAgentPool>,
    templates: Store<FarAgentTemplate>,
    memory: Mutex<HashMap<PoolKey, Memory>>,
}

impl Pools {
    /// Looks after pools until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let world = self.world.clone();
        let (pools, watch_pools) = watching::keep(self.client.clone(), move |pool: &FarAgentPool| {
            world.pool_work.mark(watching::key(pool));
        });
        let (world, known) = (self.world.clone(), pools.clone());
        let (templates, watch_templates) = watching::keep(self.client.clone(), move |template: &FarAgentTemplate| {
            let (namespace, name) = watching::key(template);
            for pool in known.state() {
                if pool.namespace().as_deref() == Some(&namespace) && pool.spec.template_ref.name == name {
                    world.pool_work.mark(watching::key(&*pool));
                }
            }
        });
        let _watches = [watch_pools, watch_templates].map(AbortOnDropHandle::new);
        let keeper = Keeper {
            own: self,
            pools,
            templates,
            memory: Mutex::default(),
        };
        let _ = stop.run_until_cancelled(keeper.work()).await;
    }
}

impl Keeper {
    async fn work(&self) {
        self.own.agents_known.cancelled().await;
        // They end with their watch tasks only, which outlive this.
        let _ = self.pools.wait_until_ready().await;
        let _ = self.templates.wait_until_ready().await;
        loop {
            let key = self.own.world.pool_work.next().await;
            if self.own.deposed.is_cancelled() {
                // Another controller does this now; the end of this one is on its way.
                return std::future::pending().await;
            }
            match self.pass(&key).await {
                Ok(None) => {}
                Ok(Some(delay)) => self.own.world.pool_work.mark_in(key, delay),
                Err(error) => {
                    tracing::warn!(pool.namespace = key.0, pool.name = key.1, %error, "a pool is looked at again");
                    self.own.world.pool_work.mark_in(key, RETRY);
                }
            }
        }
    }

    fn remember<T>(&self, key: &PoolKey, change: impl FnOnce(&mut Memory) -> T) -> T {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        change(memory.entry(key.clone()).or_default())
    }

    /// One pass; answers when time alone asks for another.
    async fn pass(&self, key: &PoolKey) -> Result<Option<Duration>, kube::Error> {
        let world = &self.own.world;
        let Some(pool) = self.pools.get(&ObjectRef::new(&key.1).within(&key.0)) else {
            world.forget_pool(key);
            self.memory.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            return Ok(None);
        };
        if pool.metadata.deletion_timestamp.is_some() {
            return Ok(None);
        }
        let reference = ObjectRef::new(&pool.spec.template_ref.name).within(&key.0);
        let template = self.templates.get(&reference);
        let hash = template.as_deref().map(hash).unwrap_or_default();
        let uid = pool.uid().unwrap_or_default();
        let members = world.pool_members(key, &uid, &hash);
        let asked = world.pool_asked(key);
        let wanted = wanted(&pool, asked);
        let replace = pool.spec.update_strategy == UpdateStrategy::Recreate && template.is_some();
        let seen: Vec<_> = members.iter().map(|member| member.seen.clone()).collect();
        let plan = pools::plan(&seen, wanted, replace);
        let wait = self.note_failures(key, &members);

        let mut removed = members;
        removed.retain(|member| plan.remove.contains(&member.seen.uid));
        removed.truncate(BATCH);
        let mut outcome = self.remove(&key.0, removed).await;
        let may_create = template.as_ref().filter(|_| wait.is_none() && key.1.len() <= MAX_LABEL);
        if let Some(template) = may_create {
            let count = BATCH.min(plan.create as usize);
            outcome = outcome.and(self.create(&pool, template, &hash, count).await);
        }
        let left = plan.create as usize > BATCH || plan.remove.len() > BATCH;
        let written = self.report(key, &pool, template.is_some(), wanted, asked).await;
        let after_write = written.and_then(|again| outcome.map(|()| again))?;
        let soon = [
            left.then_some(Duration::ZERO),
            wait.filter(|_| plan.create > 0),
            after_write,
            pool.spec.autoscale.is_some().then_some(AUTOSCALE_LOOK),
        ];
        Ok(soon.into_iter().flatten().min())
    }

    /// Counts agents that ended before they were warm; answers how long none is made.
    fn note_failures(&self, key: &PoolKey, members: &[PoolMember]) -> Option<Duration> {
        let over = members.iter().filter(|member| member.seen.stand == Stand::Over);
        let is_warm = members.iter().any(|member| member.seen.stand == Stand::Warm);
        let (count, why) = over.fold((0_u32, None), |(count, _), member| (count + 1, member.why.clone()));
        self.remember(key, |memory| {
            if count > 0 {
                memory.failures = memory.failures.saturating_add(1);
                memory.not_before = Some(Instant::now() + Duration::from_secs(pools::backoff_s(memory.failures)));
                memory.why = why.unwrap_or_default();
            } else if is_warm {
                memory.failures = 0;
            }
            let left = memory.not_before?.checked_duration_since(Instant::now());
            if left.is_none() {
                memory.not_before = None;
            }
            left
        })
    }

    async fn remove(&self, namespace: &str, members: Vec<PoolMember>) -> Result<(), kube::Error> {
        let api: Api<FarAgent> = Api::namespaced(self.own.client.clone(), namespace);
        let calls = members.into_iter().map(|member| {
            let (api, world) = (api.clone(), self.own.world.clone());
            async move {
                let params = DeleteParams {
                    preconditions: Some(Preconditions {
                        uid: Some(member.seen.uid.clone()),
                        resource_version: None,
                    }),
                    ..DeleteParams::default()
                };
                match api.delete(&member.name, &params).await {
                    Ok(answer) => {
                        if let Some(agent) = answer
                            .left()
                            .filter(|agent| agent.metadata.deletion_timestamp.is_some())
                        {
                            world.observe(&agent, Teller::Write);
                        }
                        Ok(())
                    }
                    Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => Ok(()),
                    Err(error) => Err(error),
                }
            }
        });
        first_error(calls).await
    }

    async fn create(
        &self,
        pool: &FarAgentPool,
        template: &FarAgentTemplate,
        hash: &str,
        count: usize,
    ) -> Result<(), kube::Error> {
        let api: Api<FarAgent> = Api::namespaced(self.own.client.clone(), &pool.namespace().unwrap_or_default());
        let agent = warm_agent(pool, template, hash);
        let calls = (0..count).map(|_| {
            let (api, agent, world) = (api.clone(), agent.clone(), self.own.world.clone());
            async move {
                let made = api.create(&PostParams::default(), &agent).await?;
                world.observe(&made, Teller::Creation);
                Ok(())
            }
        });
        first_error(calls).await
    }

    /// Writes what was seen; answers when a write that came too early is due.
    async fn report(
        &self,
        key: &PoolKey,
        pool: &FarAgentPool,
        has_template: bool,
        wanted: u32,
        asked: Asked,
    ) -> Result<Option<Duration>, kube::Error> {
        let world = &self.own.world;
        let members = world.pool_members(key, &pool.uid().unwrap_or_default(), &self.hash_of(pool, key));
        let memory = self.remember(key, |memory| memory.clone());
        let old = pool.status.clone().unwrap_or_default();
        let count = |stand| members.iter().filter(|member| member.seen.stand == stand).count();
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let warm = count(Stand::Warm);
        let now = Timestamp::now();
        let mut new = FarAgentPoolStatus {
            observed_generation: pool.metadata.generation,
            replicas: number(warm + count(Stand::Coming)),
            wanted,
            warm: number(warm),
            claimed: old.claimed.saturating_add(asked.claims),
            last_claim_at: if asked.claims > 0 {
                Timestamp::from_second(now.as_second()).ok().map(Time)
            } else {
                old.last_claim_at.clone()
            },
            selector: Some(format!("{POOL_LABEL}={}", key.1)),
            conditions: Vec::new(),
        };
        let ready = if key.1.len() > MAX_LABEL {
            ("NameTooLong", format!("a pool's name has at most {MAX_LABEL} bytes"))
        } else if !has_template {
            ("TemplateMissing", "there is no template to make agents from".to_owned())
        } else if new.warm >= wanted {
            ("AsManyAsWanted", String::new())
        } else if memory.failures > 0 {
            ("AgentsFail", format!("agents end before they are warm: {}", memory.why))
        } else {
            ("Filling", format!("{warm} of {wanted} are warm"))
        };
        let found = if has_template {
            ("Found", String::new())
        } else {
            let name = &pool.spec.template_ref.name;
            ("TemplateMissing", format!("FarAgentTemplate {name:?} does not exist"))
        };
        let generation = pool.metadata.generation;
        for (kind, holds, (reason, message)) in [
            ("Ready", ready.0 == "AsManyAsWanted", ready),
            ("TemplateFound", has_template, found),
        ] {
            let before = old.conditions.iter().find(|one| one.type_ == kind);
            new.conditions
                .push(condition(before, kind, holds, reason, message, generation, now));
        }
        if new == old {
            return Ok(None);
        }
        // Reserved for this pass above: given back where it is not written.
        let wait = memory
            .wrote_at
            .and_then(|at| COALESCE.checked_sub(at.elapsed()))
            .filter(|left| !left.is_zero());
        if wait.is_some() {
            world.count_claims_again(key, asked.claims);
            return Ok(wait);
        }
        let api: Api<FarAgentPool> = Api::namespaced(self.own.client.clone(), &key.0);
        let written = status_writer::write_to(&api, pool, &pool.status, &new).await;
        if let Err(error) = written {
            world.count_claims_again(key, asked.claims);
            return match error {
                kube::Error::Api(error) if error.code == 404 => Ok(None),
                error => Err(error),
            };
        }
        self.remember(key, |memory| memory.wrote_at = Some(Instant::now()));
        Ok(None)
    }

    fn hash_of(&self, pool: &FarAgentPool, key: &PoolKey) -> String {
        let reference = ObjectRef::new(&pool.spec.template_ref.name).within(&key.0);
        self.templates.get(&reference).as_deref().map(hash).unwrap_or_default()
    }
}

async fn first_error(
    calls: impl Iterator<Item = impl Future<Output = Result<(), kube::Error>>>,
) -> Result<(), kube::Error> {
    let outcomes: Vec<_> = stream::iter(calls).buffer_unordered(CALLS).collect().await;
    outcomes.into_iter().collect()
}

/// A condition that keeps its time where it did not turn.
pub(crate) fn condition(
    before: Option<&Condition>,
    kind: &str,
    holds: bool,
    reason: &str,
    message: String,
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let status = if holds { "True" } else { "False" };
    let since = before
        .filter(|before| before.status == status)
        .map(|before| before.last_transition_time.clone());
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: crate::convert::cut(message, 1024),
        last_transition_time: since.unwrap_or(Time(now)),
        observed_generation: generation,
    }
}

fn wanted(pool: &FarAgentPool, asked: Asked) -> u32 {
    let status = pool.status.as_ref();
    let claimed_at = status.and_then(|status| status.last_claim_at.as_ref());
    let began_at = claimed_at.or(pool.metadata.creation_timestamp.as_ref());
    let by_api = began_at.map_or(0, |at| Timestamp::now().as_second().saturating_sub(at.0.as_second()));
    let idle_s = asked
        .since
        .map_or(u64::try_from(by_api).unwrap_or(0), |since| since.as_secs());
    let scale = pool.spec.autoscale.as_ref().map(|scale| Autoscale {
        min: scale.min,
        max: scale.max,
        target_idle: scale.target_idle,
        idle_after_s: scale.scale_to_zero_after_seconds.into(),
    });
    let demand = Demand {
        last_minute: asked.last_minute,
        idle_s,
        was_asked: asked.since.is_some() || claimed_at.is_some(),
    };
    pools::wanted(pool.spec.replicas, scale, demand)
}

/// Names what agents are made of: equal for equal templates.
fn hash(template: &FarAgentTemplate) -> String {
    use sha2::{Digest, Sha256};
    let text = serde_json::to_vec(&template.spec.template).unwrap_or_default();
    hex::encode(&Sha256::digest(text)[..8])
}

fn warm_agent(pool: &FarAgentPool, template: &FarAgentTemplate, hash: &str) -> FarAgent {
    let template = &template.spec.template;
    let mut spec = template.spec.clone();
    spec.start_policy = StartPolicy::OnClaim;
    spec.pool_ref = None;
    // Its pool replaces it, whatever becomes of it.
    spec.restart_policy = RestartPolicy::Never;
    spec.backoff_limit = None;
    spec.lost_policy = LostPolicy::Fail;
    spec.ttl_seconds_after_finished = None;
    spec.active_deadline_seconds = None;
    let mut agent = FarAgent::new("", spec);
    let metadata = template.metadata.clone().unwrap_or_default();
    agent.metadata = kube::api::ObjectMeta {
        generate_name: Some(format!("{}-", pool.name_any())),
        namespace: pool.namespace(),
        labels: Some(metadata.labels.into_iter().filter(|(key, _)| is_theirs(key)).collect()),
        annotations: Some(
            metadata
                .annotations
                .into_iter()
                .filter(|(key, _)| is_theirs(key))
                .collect(),
        ),
        owner_references: pool.controller_owner_ref(&()).map(|owner| vec![owner]),
        ..kube::api::ObjectMeta::default()
    };
    agent.labels_mut().extend(pool::warm_labels(&pool.name_any()));
    agent
        .annotations_mut()
        .insert(TEMPLATE_ANNOTATION.to_owned(), hash.to_owned());
    agent
}

/// Keys under our group are the controller's.
pub(crate) fn is_theirs(key: &str) -> bool {
    !key.starts_with("tiffany.dev/")
}
