//! The queue controller: tasks become agents, a bounded number at a time. far-core decides; agents are made and removed
//! here, and what became of each try is written to its task.
//!
//! The n-th try of task NAME is agent NAME-n. It is made first and written down then: a crash in between finds it under its
//! name. A name that somebody else's agent has is left alone.
//!
//! Invariant: one agent for each (task, try), by its name and by the task's uid in its owner reference.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use far_api::{
    Env, FarAgent, FarAgentPool, FarAgentTemplate, FarQueue, FarQueueStatus, FarTask, FarTaskStatus, LocalRef,
    StartPolicy, TaskPhase,
};
use far_core::tasks::{self, Agent, Failure, Phase, Plan, Step, Task};
use futures::{StreamExt, stream};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, PostParams, Preconditions},
    runtime::reflector::{ObjectRef, Store},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    pools::{condition, is_theirs},
    status_writer,
    tries::{QUEUE_ANNOTATION, QueueKey, Try, task_of},
    watching,
    world::{Teller, World},
};

/// Tasks served at the same time, and in one pass: a queue of thousands does not keep others waiting.
const CALLS: usize = 8;
const BATCH: usize = 100;
/// Changes are looked at together.
const COALESCE: Duration = Duration::from_millis(50);
/// Between two writes of a queue's status.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// After a failure of the API, and while a name is another's.
const RETRY: Duration = Duration::from_secs(1);
const TAKEN_LOOK: Duration = Duration::from_secs(30);
/// Longest name of an agent.
const MAX_NAME: usize = 253;

/// See the module.
pub(crate) struct Tasks {
    pub(crate) client: Client,
    pub(crate) world: Arc<World>,
    /// Between the first and the second try of a task.
    pub(crate) backoff: Duration,
    /// Cancelled when another controller leads.
    pub(crate) deposed: CancellationToken,
    /// Cancelled once agents are listed completely.
    pub(crate) agents_known: CancellationToken,
}

struct Keeper {
    own: Tasks,
    tasks: Store<FarTask>,
    queues: Store<FarQueue>,
    pools: Store<FarAgentPool>,
    templates: Store<FarAgentTemplate>,
    /// Newest objects our own writes returned, by uid, while the watch is behind them.
    written: Mutex<HashMap<String, Arc<FarTask>>>,
    wrote_queue: Mutex<HashMap<QueueKey, Instant>>,
}

/// What agents of a queue are made of.
struct Mould {
    template: Arc<FarAgentTemplate>,
    pool: Option<LocalRef>,
}

impl Tasks {
    /// Looks after queues until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mark = |world: &Arc<World>| {
            let world = world.clone();
            move |key: QueueKey| world.queue_work.mark_in(key, COALESCE)
        };
        let changed = mark(&self.world);
        let (tasks, watch_tasks) = watching::keep(self.client.clone(), move |task: &FarTask| changed(queue_of(task)));
        let changed = mark(&self.world);
        let (queues, watch_queues) = watching::keep(self.client.clone(), move |queue: &FarQueue| {
            changed(watching::key(queue))
        });
        // A template or pool that came may be what queues of its namespace wait for.
        let (changed, known) = (mark(&self.world), queues.clone());
        let (templates, watch_templates) = watching::keep(self.client.clone(), move |template: &FarAgentTemplate| {
            mark_namespace(&known, template.namespace(), &changed);
        });
        let (changed, known) = (mark(&self.world), queues.clone());
        let (pools, watch_pools) = watching::keep(self.client.clone(), move |pool: &FarAgentPool| {
            mark_namespace(&known, pool.namespace(), &changed);
        });
        let _watches = [watch_tasks, watch_queues, watch_templates, watch_pools].map(AbortOnDropHandle::new);
        let keeper = Keeper {
            own: self,
            tasks,
            queues,
            pools,
            templates,
            written: Mutex::default(),
            wrote_queue: Mutex::default(),
        };
        let _ = stop.run_until_cancelled(keeper.work()).await;
    }
}

/// Queue that a task is of.
fn queue_of(task: &FarTask) -> QueueKey {
    (task.namespace().unwrap_or_default(), task.spec.queue_ref.name.clone())
}

fn mark_namespace(queues: &Store<FarQueue>, namespace: Option<String>, mark: &impl Fn(QueueKey)) {
    let queues = queues.state();
    let here = queues.iter().filter(|queue| queue.namespace() == namespace);
    here.for_each(|queue| mark(watching::key(&**queue)));
}

fn version<K: ResourceExt>(object: &K) -> u64 {
    let version = object.resource_version();
    version.and_then(|version| version.parse().ok()).unwrap_or(0)
}

impl Keeper {
    async fn work(&self) {
        self.own.agents_known.cancelled().await;
        // They end with their watch tasks only, which outlive this.
        let _ = self.tasks.wait_until_ready().await;
        let _ = self.queues.wait_until_ready().await;
        let _ = self.pools.wait_until_ready().await;
        let _ = self.templates.wait_until_ready().await;
        loop {
            let key = self.own.world.queue_work.next().await;
            if self.own.deposed.is_cancelled() {
                // Another controller does this now; the end of this one is on its way.
                return std::future::pending().await;
            }
            match self.pass(&key).await {
                Ok(None) => {}
                Ok(Some(delay)) => self.own.world.queue_work.mark_in(key, delay),
                Err(error) => {
                    tracing::warn!(queue.namespace = key.0, queue.name = key.1, %error, "a queue is looked at again");
                    self.own.world.queue_work.mark_in(key, RETRY);
                }
            }
        }
    }

    /// Tasks of a queue, each as it was last seen or written.
    fn tasks_of(&self, key: &QueueKey) -> Vec<Arc<FarTask>> {
        let mut tasks: Vec<_> = self.tasks.state();
        let is_here = |task: &FarTask| task.metadata.namespace.as_ref() == Some(&key.0);
        tasks.retain(|task| task.spec.queue_ref.name == key.1 && is_here(task));
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        for task in &mut tasks {
            let uid = task.uid().unwrap_or_default();
            match written.get(&uid) {
                Some(newer) if version(&**newer) > version(&**task) => *task = newer.clone(),
                Some(_) => drop(written.remove(&uid)),
                None => {}
            }
        }
        tasks
    }

    /// One pass; answers when to look again.
    async fn pass(&self, key: &QueueKey) -> Result<Option<Duration>, kube::Error> {
        let queue = self.queues.get(&ObjectRef::new(&key.1).within(&key.0));
        let tasks = self.tasks_of(key);
        let mould = queue.as_deref().and_then(|queue| self.mould(queue));
        let bounds = queue.as_deref().map(|queue| tasks::Queue {
            parallelism: queue.spec.parallelism,
            max_attempts: queue.spec.max_attempts,
            suspended: queue.spec.suspend == Some(true),
        });
        let seen: Vec<Task> = tasks.iter().map(|task| self.seen(task)).collect();
        let now = Timestamp::now().as_second();
        let plan = tasks::plan(bounds, &seen, now, self.own.backoff.as_secs());
        let left = plan.steps.len() > BATCH;
        let steps: Vec<_> = plan.steps.iter().take(BATCH).cloned().collect();
        let calls = steps.into_iter().map(|(index, step)| {
            let (task, mould) = (tasks[index].clone(), mould.as_ref());
            async move { self.act(&task, &step, mould).await }
        });
        let outcomes: Vec<_> = stream::iter(calls).buffer_unordered(CALLS).collect().await;
        let outcome: Result<Vec<Option<Duration>>, kube::Error> = outcomes.into_iter().collect();
        let after_write = match &queue {
            Some(queue) => self.report(key, queue, mould.is_some(), &plan).await?,
            None => {
                let mut wrote = self.wrote_queue.lock().unwrap_or_else(PoisonError::into_inner);
                wrote.remove(key);
                None
            }
        };
        let at = plan
            .look_at
            .map(|at| Duration::from_secs(u64::try_from(at - now).unwrap_or(0)));
        let soon = outcome?.into_iter().flatten().min();
        // What did not work holds others back for a moment, and no longer spins.
        let next_batch = left.then_some(if soon.is_some() { RETRY } else { Duration::ZERO });
        let again = [next_batch, at, soon, after_write];
        Ok(again.into_iter().flatten().min())
    }

    fn mould(&self, queue: &FarQueue) -> Option<Mould> {
        let namespace = queue.namespace()?;
        let of = |name: &str| self.templates.get(&ObjectRef::new(name).within(&namespace));
        if let Some(template) = &queue.spec.template_ref {
            let template = of(&template.name)?;
            return Some(Mould { template, pool: None });
        }
        let reference = queue.spec.pool_ref.clone()?;
        let pool = self.pools.get(&ObjectRef::new(&reference.name).within(&namespace))?;
        let template = of(&pool.spec.template_ref.name)?;
        Some(Mould {
            template,
            pool: Some(reference),
        })
    }

    /// What is known of the task's agent of this name.
    fn agent_of(&self, task: &FarTask, name: &str) -> Option<Try> {
        let (namespace, uid) = (task.namespace().unwrap_or_default(), task.uid().unwrap_or_default());
        self.own.world.task_agent(&namespace, &uid, name)
    }

    fn seen(&self, task: &FarTask) -> Task {
        let status = task.status.clone().unwrap_or_default();
        let agent_of = |attempt: u32| {
            let agent = self.agent_of(task, &agent_name(task, attempt));
            agent.map(|one| one.agent).unwrap_or_default()
        };
        let phase = match status.phase {
            None | Some(TaskPhase::Pending) => Phase::Pending,
            Some(TaskPhase::Running) => Phase::Running,
            Some(TaskPhase::Succeeded) => Phase::Succeeded,
            Some(TaskPhase::Dead) => Phase::Dead,
        };
        Task {
            name: task.name_any(),
            priority: task.spec.priority.unwrap_or(0),
            created: seconds(task.meta().creation_timestamp.as_ref()).unwrap_or(0),
            deleting: task.meta().deletion_timestamp.is_some(),
            phase,
            reason: status.reason.unwrap_or_default(),
            attempts: status.attempts,
            retry_at: seconds(status.retry_at.as_ref()),
            finished_at: seconds(status.finished_at.as_ref()),
            ttl_s: task.spec.ttl_seconds_after_finished,
            agent: if phase == Phase::Running {
                agent_of(status.attempts)
            } else {
                Agent::Absent
            },
            next_agent: if phase == Phase::Pending {
                agent_of(status.attempts.saturating_add(1))
            } else {
                Agent::Absent
            },
        }
    }

    /// Does a step; answers when to look again.
    async fn act(&self, task: &FarTask, step: &Step, mould: Option<&Mould>) -> Result<Option<Duration>, kube::Error> {
        let old = task.status.clone().unwrap_or_default();
        let status = match step {
            Step::Begin { attempt } => return self.begin(task, *attempt, mould).await,
            Step::Remove => return self.remove(task).await.map(|()| None),
            Step::Wait { reason, message } => waiting(&old, reason, message),
            Step::Succeed => FarTaskStatus {
                phase: Some(TaskPhase::Succeeded),
                exit_code: Some(0),
                reason: Some("Completed".to_owned()),
                message: None,
                finished_at: now(),
                ..old
            },
            Step::Retry { failure, at } => FarTaskStatus {
                phase: Some(TaskPhase::Pending),
                retry_at: Timestamp::from_second(*at).ok().map(Time),
                ..failed(old, failure)
            },
            Step::Die { failure } => FarTaskStatus {
                phase: Some(TaskPhase::Dead),
                finished_at: now(),
                ..failed(old, failure)
            },
        };
        self.write(task, &status).await.map(|()| None)
    }

    async fn begin(
        &self,
        task: &FarTask,
        attempt: u32,
        mould: Option<&Mould>,
    ) -> Result<Option<Duration>, kube::Error> {
        let (old, uid) = (task.status.clone().unwrap_or_default(), task.uid().unwrap_or_default());
        let name = agent_name(task, attempt);
        if self.agent_of(task, &name).is_none() {
            let wait = |reason: &str, message: String| {
                let status = waiting(&old, reason, &message);
                async move { self.write(task, &status).await.map(|()| Some(TAKEN_LOOK)) }
            };
            let Some(mould) = mould else {
                let message = "the queue's template does not exist".to_owned();
                return wait("TemplateMissing", message).await;
            };
            if name.len() > MAX_NAME {
                let message = format!("metadata.name: {name} is longer than an agent's name may be");
                return wait("NameTooLong", message).await;
            }
            let api: Api<FarAgent> = Api::namespaced(self.own.client.clone(), &task.namespace().unwrap_or_default());
            let made = match api.create(&PostParams::default(), &agent(task, &name, mould)).await {
                Err(kube::Error::Api(error)) if error.code == 409 => api.get(&name).await?,
                // The template and the task do not fit together; another template may.
                Err(kube::Error::Api(error)) if error.code == 422 || error.code == 400 => {
                    return wait("InvalidAgent", error.message).await;
                }
                other => other?,
            };
            if task_of(&made) != Some(&*uid) {
                let message = format!("FarAgent {name} exists and is not this task's");
                return wait("NameTaken", message).await;
            }
            self.own.world.observe(&made, Teller::Creation);
        }
        let status = FarTaskStatus {
            phase: Some(TaskPhase::Running),
            attempts: attempt,
            agent_name: Some(name),
            started_at: now(),
            exit_code: None,
            reason: None,
            message: None,
            retry_at: None,
            finished_at: None,
        };
        self.write(task, &status).await?;
        if let Some(before) = old.agent_name {
            self.remove_agent(task, &before).await?;
        }
        Ok(None)
    }

    /// The agent of an earlier try: what is to be known of it is in the task.
    async fn remove_agent(&self, task: &FarTask, name: &str) -> Result<(), kube::Error> {
        let Some(known) = self.agent_of(task, name) else {
            return Ok(());
        };
        let api: Api<FarAgent> = Api::namespaced(self.own.client.clone(), &task.namespace().unwrap_or_default());
        gone(api.delete(name, &only(known.uid)).await)
    }

    async fn remove(&self, task: &FarTask) -> Result<(), kube::Error> {
        let api: Api<FarTask> = Api::namespaced(self.own.client.clone(), &task.namespace().unwrap_or_default());
        gone(
            api.delete(&task.name_any(), &only(task.uid().unwrap_or_default()))
                .await,
        )
    }

    async fn write(&self, task: &FarTask, status: &FarTaskStatus) -> Result<(), kube::Error> {
        if task.status.as_ref() == Some(status) {
            return Ok(());
        }
        let api: Api<FarTask> = Api::namespaced(self.own.client.clone(), &task.namespace().unwrap_or_default());
        match status_writer::write_to(&api, task, &task.status, status).await {
            Ok(task) => {
                let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
                let uid = task.uid().unwrap_or_default();
                written.insert(uid, Arc::new(task));
                Ok(())
            }
            // It is gone, or another of its name is there.
            Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn report(
        &self,
        key: &QueueKey,
        queue: &FarQueue,
        has_template: bool,
        plan: &Plan,
    ) -> Result<Option<Duration>, kube::Error> {
        let old = queue.status.clone().unwrap_or_default();
        let (generation, moment) = (queue.metadata.generation, Timestamp::now());
        let suspended = queue.spec.suspend == Some(true);
        let found = if has_template {
            ("Found", "")
        } else {
            ("TemplateMissing", "the template, or the pool, does not exist")
        };
        let suspend = if suspended { "Suspended" } else { "NotSuspended" };
        let conditions = [
            ("TemplateFound", has_template, found.0, found.1),
            ("Suspended", suspended, suspend, ""),
        ];
        let new = FarQueueStatus {
            observed_generation: generation,
            pending: plan.pending,
            running: plan.running,
            succeeded: plan.succeeded,
            dead: plan.dead,
            conditions: conditions
                .into_iter()
                .map(|(kind, holds, reason, message)| {
                    let before = old.conditions.iter().find(|one| one.type_ == kind);
                    condition(before, kind, holds, reason, message.to_owned(), generation, moment)
                })
                .collect(),
        };
        if new == old {
            return Ok(None);
        }
        let left = {
            let mut wrote = self.wrote_queue.lock().unwrap_or_else(PoisonError::into_inner);
            let since = wrote.get(key).map(Instant::elapsed);
            let left = since.and_then(|since| STATUS_EVERY.checked_sub(since));
            if left.is_none() {
                wrote.insert(key.clone(), Instant::now());
            }
            left
        };
        if left.is_some() {
            return Ok(left);
        }
        let api: Api<FarQueue> = Api::namespaced(self.own.client.clone(), &key.0);
        match status_writer::write_to(&api, queue, &queue.status, &new).await {
            Ok(_) => Ok(None),
            Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Of exactly this object, whatever has its name now.
fn only(uid: String) -> DeleteParams {
    DeleteParams {
        preconditions: Some(Preconditions {
            uid: Some(uid),
            resource_version: None,
        }),
        ..DeleteParams::background()
    }
}

fn gone<T>(deleted: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match deleted {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => Ok(()),
        Err(error) => Err(error),
    }
}

/// The agent of the n-th try.
fn agent_name(task: &FarTask, attempt: u32) -> String {
    format!("{}-{attempt}", task.name_any())
}

fn seconds(time: Option<&Time>) -> Option<i64> {
    time.map(|time| time.0.as_second())
}

fn now() -> Option<Time> {
    Timestamp::from_second(Timestamp::now().as_second()).ok().map(Time)
}

fn waiting(old: &FarTaskStatus, reason: &str, message: &str) -> FarTaskStatus {
    FarTaskStatus {
        phase: Some(TaskPhase::Pending),
        reason: Some(reason.to_owned()),
        message: Some(crate::convert::cut(message.to_owned(), 1024)),
        ..old.clone()
    }
}

fn failed(old: FarTaskStatus, failure: &Failure) -> FarTaskStatus {
    let text = |text: &str| Some(crate::convert::cut(text.to_owned(), 1024)).filter(|text| !text.is_empty());
    FarTaskStatus {
        exit_code: failure.exit_code,
        reason: text(&failure.reason),
        message: text(&failure.message),
        ..old
    }
}

fn agent(task: &FarTask, name: &str, mould: &Mould) -> FarAgent {
    let template = &mould.template.spec.template;
    let mut spec = template.spec.clone();
    spec.start_policy = StartPolicy::Immediate;
    spec.pool_ref.clone_from(&mould.pool);
    // The task keeps its newest agent, and its logs, until it goes itself.
    spec.ttl_seconds_after_finished = None;
    if let Some(args) = &task.spec.args {
        spec.args = Some(args.clone());
    }
    if let Some(own) = &task.spec.env {
        let mut env: Vec<Env> = spec.env.unwrap_or_default();
        env.retain(|one| own.iter().all(|own| own.name != one.name));
        env.extend(own.iter().cloned());
        spec.env = Some(env);
    }
    let mut agent = FarAgent::new(name, spec);
    let metadata = template.metadata.clone().unwrap_or_default();
    agent.metadata.namespace = task.namespace();
    agent.metadata.owner_references = task.controller_owner_ref(&()).map(|owner| vec![owner]);
    agent
        .labels_mut()
        .extend(metadata.labels.into_iter().filter(|(key, _)| is_theirs(key)));
    agent
        .annotations_mut()
        .extend(metadata.annotations.into_iter().filter(|(key, _)| is_theirs(key)));
    let queue = task.spec.queue_ref.name.clone();
    agent.annotations_mut().insert(QUEUE_ANNOTATION.to_owned(), queue);
    agent
}
