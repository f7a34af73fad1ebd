//! The supervisor: owns one task per attempt that has not ended, admits new ones, forgets old ones.
//!
//! It is a task itself and takes one command after the other, so that two EnsureAgent for one attempt, a stop that
//! overtakes a start, and a blade that is nearly full all have one answer. It never waits for an attempt's task.

use crate::{
    agent::{AgentTask, Blade, REQUESTS, Request, claim::NotClaimed},
    board::Entry,
    files::remove_dir,
    ledger::{LedgerError, Loaded, is_tombstone_over},
    log_sink::LogSignal,
    names::{AttemptKey, VmId},
    pulse::Heartbeat,
    record::{End, EndReason, Fact, Record},
    spec::{Identity, Spec},
};
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{Id, JoinSet},
};

/// Commands that may wait.
const COMMANDS: usize = 256;
/// Ended attempts kept with their logs; beyond that the oldest are forgotten.
const MAX_ENDED: usize = 500;
/// Between two looks for tombstones that lay long enough.
const SWEEP: Duration = Duration::from_secs(3600);

/// What the blade gives to agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// MiB.
    pub memory_mib: u64,
    /// Most microVMs at a time.
    pub max_vms: u32,
}

/// Why a command was refused.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The texts say it.
pub enum Refusal {
    #[error("{0}")]
    NoRoom(String),
    #[error("attempt {newer} of this agent is known here; attempt {asked} is too old")]
    NewerKnown { asked: u32, newer: u32 },
    #[error("attempt {0} has not ended")]
    StillRuns(AttemptKey),
    #[error("the blade is busy: {0}")]
    Busy(&'static str),
    #[error(transparent)]
    NotClaimed(NotClaimed),
    #[error("the ledger cannot be written")]
    Ledger(#[source] LedgerError),
}

enum Command {
    Ensure {
        identity: Identity,
        spec: Box<Spec>,
        reply: oneshot::Sender<Result<Entry, Refusal>>,
    },
    Claim {
        warm: AttemptKey,
        identity: Identity,
        spec: Box<Spec>,
        reply: oneshot::Sender<Result<Entry, Refusal>>,
    },
    Stop {
        identity: Identity,
        grace_s: Option<u32>,
        reason: Option<EndReason>,
        reply: oneshot::Sender<Result<Stopping, Refusal>>,
    },
    Forget {
        key: AttemptKey,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
}

/// A stop that was handed over.
struct Stopping(Option<oneshot::Receiver<()>>);

/// Handle to the supervisor. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Supervisor {
    commands: mpsc::Sender<Command>,
    blade: Arc<Blade>,
}

impl Supervisor {
    /// Takes over what the ledger says: every record goes onto the board, every one that has not ended gets its task.
    /// Leftovers without a record are cleaned up behind it. Returns the handle and the task, which ends after the
    /// blade's shutdown token.
    pub async fn start(blade: Arc<Blade>, room: Room, loaded: Loaded) -> (Self, tokio::task::JoinHandle<()>) {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let mut actor = Actor {
            blade: blade.clone(),
            room,
            damaged: loaded.damaged,
            tasks: JoinSet::new(),
            keys: HashMap::new(),
            handles: BTreeMap::new(),
            signals: BTreeMap::new(),
            claims: FuturesUnordered::new(),
            claiming: BTreeSet::new(),
        };
        let live: BTreeSet<VmId> = loaded
            .records
            .iter()
            .filter(|(record, _)| !record.is_ended())
            .map(|(record, _)| record.vm_id.clone())
            .collect();
        let known: BTreeSet<VmId> = loaded
            .records
            .iter()
            .filter(|(record, _)| record.forgotten_at.is_none())
            .map(|(record, _)| record.vm_id.clone())
            .collect();
        for (record, spec) in loaded.records {
            actor.take_over(record, spec);
        }
        actor.clean_up(live, known).await;
        let task = tokio::spawn(actor.run(inbox));
        (Self { commands, blade }, task)
    }

    /// The blade that is supervised.
    #[must_use]
    pub fn blade(&self) -> &Arc<Blade> {
        &self.blade
    }

    async fn ask<T>(&self, command: Command, answer: oneshot::Receiver<Result<T, Refusal>>) -> Result<T, Refusal> {
        self.commands
            .try_send(command)
            .map_err(|_| Refusal::Busy("too many calls at once, or it shuts down"))?;
        answer.await.unwrap_or(Err(Refusal::Busy("it shuts down")))
    }

    /// See `EnsureAgent` in node.proto.
    ///
    /// # Errors
    /// [`Refusal`]; nothing was recorded then.
    pub async fn ensure(&self, identity: Identity, spec: Spec) -> Result<Entry, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.ask(
            Command::Ensure {
                identity,
                spec: Box::new(spec),
                reply,
            },
            answer,
        )
        .await
    }

    /// See `ClaimAgent` in node.proto. Answers once the claim is in the ledger.
    ///
    /// # Errors
    /// [`Refusal`]; nothing was recorded then.
    pub async fn claim(&self, warm: AttemptKey, identity: Identity, spec: Spec) -> Result<Entry, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.ask(
            Command::Claim {
                warm,
                identity,
                spec: Box::new(spec),
                reply,
            },
            answer,
        )
        .await
    }

    /// See `StopAgent` in node.proto. Answers once the order is in the ledger.
    ///
    /// # Errors
    /// [`Refusal`]; the order was not recorded then.
    pub async fn stop(
        &self,
        identity: Identity,
        grace_s: Option<u32>,
        reason: Option<EndReason>,
    ) -> Result<Entry, Refusal> {
        let (reply, answer) = oneshot::channel();
        let key = identity.key.clone();
        let Stopping(done) = self
            .ask(
                Command::Stop {
                    identity,
                    grace_s,
                    reason,
                    reply,
                },
                answer,
            )
            .await?;
        if let Some(done) = done {
            // A task that ended meanwhile drops the sender: the board tells.
            let _ = done.await;
        }
        self.blade
            .board
            .entry(&key)
            .ok_or(Refusal::Busy("the attempt was forgotten meanwhile"))
    }

    /// See `ForgetAgent` in node.proto.
    ///
    /// # Errors
    /// It has not ended, or the ledger cannot be written.
    pub async fn forget(&self, key: AttemptKey) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Forget { key, reply }, answer).await
    }
}

/// Whether an agent of this size finds room beside those that run.
///
/// # Errors
/// What is missing, in a sentence.
pub fn admit(cpu_millis: u32, memory_mib: u32, running: &[(u32, u32)], room: Room) -> Result<(), String> {
    let sum = |pick: fn(&(u32, u32)) -> u32| running.iter().map(|one| u64::from(pick(one))).sum::<u64>();
    let (cpu_used, memory_used) = (sum(|one| one.0), sum(|one| one.1));
    if running.len() as u64 >= u64::from(room.max_vms) {
        return Err(format!("the blade runs {} microVMs, its limit", running.len()));
    }
    if cpu_used + u64::from(cpu_millis) > room.cpu_millis {
        return Err(format!(
            "spec.cpu asks for {cpu_millis} thousandths of a core, {} of {} are free",
            room.cpu_millis.saturating_sub(cpu_used),
            room.cpu_millis
        ));
    }
    if memory_used + u64::from(memory_mib) > room.memory_mib {
        return Err(format!(
            "spec.memory asks for {memory_mib} MiB, {} of {} are free",
            room.memory_mib.saturating_sub(memory_used),
            room.memory_mib
        ));
    }
    Ok(())
}

struct Actor {
    blade: Arc<Blade>,
    room: Room,
    damaged: BTreeSet<VmId>,
    tasks: JoinSet<()>,
    keys: HashMap<Id, AttemptKey>,
    handles: BTreeMap<AttemptKey, mpsc::Sender<Request>>,
    signals: BTreeMap<AttemptKey, watch::Sender<LogSignal>>,
    /// Claims that tasks were asked for; each brings its task's answer.
    claims: FuturesUnordered<BoxFuture<'static, Claimed>>,
    /// Their claimants: nothing else is begun or ended under these names meanwhile.
    claiming: BTreeSet<AttemptKey>,
}

/// What a task answered to a claim; no answer: it ended, or broke.
struct Claimed {
    warm: AttemptKey,
    key: AttemptKey,
    answer: Option<Result<(), NotClaimed>>,
    reply: oneshot::Sender<Result<Entry, Refusal>>,
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let shutdown = self.blade.shutdown.clone();
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ended) = self.tasks.join_next_with_id() => match ended {
                    Ok((id, ())) => self.after_task(id),
                    Err(error) => self.after_panic(error.id()),
                },
                Some(claimed) = self.claims.next() => self.after_claim(claimed),
                Some(command) = inbox.recv() => self.obey(command).await,
                _ = sweep.tick() => self.sweep().await,
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    fn spawn(&mut self, record: Arc<Record>, spec: Option<Spec>, broken: bool) {
        let key = record.identity.key.clone();
        let (send, requests) = mpsc::channel(REQUESTS);
        let signal = self
            .signals
            .entry(key.clone())
            .or_insert_with(|| watch::channel(LogSignal::default()).0)
            .clone();
        let task = AgentTask::new(self.blade.clone(), record, spec, requests, signal);
        let task = if broken { task.after_panic() } else { task };
        let id = self.tasks.spawn(task.run()).id();
        self.keys.insert(id, key.clone());
        self.handles.insert(key, send);
    }

    fn after_task(&mut self, id: Id) {
        if let Some(key) = self.keys.remove(&id) {
            self.handles.remove(&key);
        }
    }

    /// A panic is that attempt's end, not the blade's.
    fn after_panic(&mut self, id: Id) {
        let Some(key) = self.keys.remove(&id) else { return };
        self.handles.remove(&key);
        if let Some(entry) = self.blade.board.entry(&key)
            && !entry.record.is_ended()
        {
            tracing::error!(vm.id = %entry.record.vm_id, "the task of an agent panicked: the agent is ended");
            self.spawn(entry.record, None, true);
        }
    }

    fn take_over(&mut self, record: Record, spec: Option<Spec>) {
        let record = Arc::new(record);
        let key = record.identity.key.clone();
        let signal = watch::channel(LogSignal {
            rounds: 0,
            is_closed: record.is_ended(),
        })
        .0;
        self.blade
            .board
            .publish(record.clone(), Heartbeat::Regular, &signal.subscribe());
        self.signals.insert(key, signal);
        if !record.is_ended() {
            self.spawn(record, spec, false);
        }
    }

    /// Ends and removes what no live record owns. The list is made now, before new attempts can add to it; the work is
    /// done behind.
    async fn clean_up(&mut self, live: BTreeSet<VmId>, known: BTreeSet<VmId>) {
        let blade = self.blade.clone();
        let found = tokio::task::spawn_blocking(move || {
            let folders: Vec<_> = blade
                .host
                .leftovers()
                .into_iter()
                .filter(|vm| !live.contains(vm))
                .collect();
            let logs: Vec<_> = std::fs::read_dir(&blade.logs)
                .into_iter()
                .flatten()
                .filter_map(|entry| VmId::parse(entry.ok()?.file_name().to_str()?))
                .filter(|vm| !known.contains(vm))
                .collect();
            (folders, logs)
        });
        let Ok((folders, logs)) = found.await else { return };
        let blade = self.blade.clone();
        let id = self.tasks.spawn(async move {
            for vm in logs {
                let _ = remove_dir(&blade.log_folder(&vm));
            }
            for vm in folders {
                tracing::info!(vm.id = %vm, "a leftover of an earlier far-node is removed");
                if let Err(error) = blade.host.release(&vm).await {
                    tracing::warn!(vm.id = %vm, %error, "a leftover cannot be removed");
                }
            }
        });
        // Not an attempt's task: no key.
        drop(id);
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Ensure { identity, spec, reply } => {
                let _ = reply.send(self.ensure(identity, *spec).await);
            }
            Command::Claim {
                warm,
                identity,
                spec,
                reply,
            } => {
                if let Some((answer, reply)) = self.claim(warm, identity, spec, reply).await {
                    let _ = reply.send(answer);
                }
            }
            Command::Stop {
                identity,
                grace_s,
                reason,
                reply,
            } => {
                let _ = reply.send(self.stop(identity, grace_s, reason).await);
            }
            Command::Forget { key, reply } => {
                let _ = reply.send(self.forget(&key).await);
            }
        }
    }

    /// The attempt where it is known here; its task gets the spec for secrets that it may miss.
    fn refresh(&self, key: &AttemptKey, spec: &Spec) -> Option<Entry> {
        let entry = self.blade.board.entry(key)?;
        if let Some(handle) = self.handles.get(key) {
            // A full queue loses nothing: the caller calls again until the agent runs.
            let _ = handle.try_send(Request::Refresh {
                key: key.clone(),
                spec: Box::new(spec.clone()),
            });
        }
        Some(entry)
    }

    /// No newer attempt of this agent is known, every older one has ended, and none is just being claimed.
    fn check_turn(&self, key: &AttemptKey, entries: &[Entry]) -> Result<(), Refusal> {
        if self.claiming.contains(key) {
            return Err(Refusal::Busy("the attempt is claiming a warm agent"));
        }
        for other in entries
            .iter()
            .map(|entry| &entry.record)
            .filter(|other| other.identity.key.uid == key.uid)
        {
            let newer = other.identity.key.attempt;
            if newer > key.attempt {
                return Err(Refusal::NewerKnown {
                    asked: key.attempt,
                    newer,
                });
            }
            if !other.is_ended() {
                return Err(Refusal::NoRoom(format!(
                    "attempt {newer} of this agent has not ended here"
                )));
            }
        }
        Ok(())
    }

    async fn ensure(&mut self, identity: Identity, spec: Spec) -> Result<Entry, Refusal> {
        let key = identity.key.clone();
        if let Some(entry) = self.refresh(&key, &spec) {
            return Ok(entry);
        }
        let (entries, _) = self.blade.board.entries();
        self.check_turn(&key, &entries)?;
        let mut record = Record::accepted(identity, &spec, &self.blade.boot_id, self.blade.clock.now());
        if self.damaged.contains(&record.vm_id) {
            return self.refuse_damaged(record).await;
        }
        let running: Vec<_> = entries
            .iter()
            .filter(|entry| !entry.record.is_ended())
            .map(|entry| (entry.record.cpu_millis, entry.record.memory_mib))
            .collect();
        admit(spec.cpu_millis, spec.memory_mib, &running, self.room).map_err(Refusal::NoRoom)?;
        let (blade, vm, kept) = (self.blade.clone(), record.vm_id.clone(), spec.without_secrets());
        run_blocking(move || blade.ledger.write_spec(&vm, &kept)).await?;
        record.message.clear();
        let record = self.record(record, false).await?;
        self.spawn(record, Some(spec), false);
        self.forget_oldest(&entries).await;
        self.blade
            .board
            .entry(&key)
            .ok_or(Refusal::Busy("the attempt was forgotten meanwhile"))
    }

    /// Asks the warm attempt's task; `None`: its answer is waited for beside other commands.
    #[allow(clippy::type_complexity)] // An answer and whom it is for.
    async fn claim(
        &mut self,
        warm: AttemptKey,
        identity: Identity,
        spec: Box<Spec>,
        reply: oneshot::Sender<Result<Entry, Refusal>>,
    ) -> Option<(Result<Entry, Refusal>, oneshot::Sender<Result<Entry, Refusal>>)> {
        let key = identity.key.clone();
        if let Some(entry) = self.refresh(&key, &spec) {
            return Some((Ok(entry), reply));
        }
        let (entries, _) = self.blade.board.entries();
        if let Err(refusal) = self.check_turn(&key, &entries) {
            return Some((Err(refusal), reply));
        }
        let record = Record::accepted(identity.clone(), &spec, &self.blade.boot_id, self.blade.clock.now());
        if self.damaged.contains(&record.vm_id) {
            return Some((self.refuse_damaged(record).await, reply));
        }
        let not_warm = |text: String| Err(Refusal::NotClaimed(NotClaimed::NotWarm(text)));
        let Some(handle) = self.handles.get(&warm) else {
            return Some((not_warm(format!("attempt {warm} does not run here")), reply));
        };
        let (done, answer) = oneshot::channel();
        match handle.try_send(Request::Claim { identity, spec, done }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                return Some((
                    Err(Refusal::Busy("the warm agent has too many requests waiting")),
                    reply,
                ));
            }
            Err(mpsc::error::TrySendError::Closed(_)) => {
                return Some((not_warm(format!("attempt {warm} ends just now")), reply));
            }
        }
        self.claiming.insert(key.clone());
        self.claims.push(Box::pin(async move {
            let answer = answer.await.ok();
            Claimed {
                warm,
                key,
                answer,
                reply,
            }
        }));
        None
    }

    /// The task serves its new attempt from now on, wherever others look for it.
    fn after_claim(&mut self, claimed: Claimed) {
        let Claimed {
            warm,
            key,
            answer,
            reply,
        } = claimed;
        self.claiming.remove(&key);
        let entry = self.blade.board.entry(&key);
        if let Some(entry) = &entry {
            if let Some(signal) = self.signals.remove(&warm) {
                self.signals.insert(key.clone(), signal);
            }
            match self.handles.remove(&warm) {
                Some(handle) => {
                    self.keys
                        .values_mut()
                        .filter(|one| **one == warm)
                        .for_each(|one| *one = key.clone());
                    self.handles.insert(key, handle);
                }
                // It broke between the claim and its answer.
                None if !entry.record.is_ended() => self.spawn(entry.record.clone(), None, true),
                None => {}
            }
        }
        let answer = match (entry, answer) {
            (Some(entry), _) => Ok(entry),
            (None, Some(Err(refusal))) => Err(Refusal::NotClaimed(refusal)),
            (None, Some(Ok(())) | None) => Err(Refusal::NotClaimed(NotClaimed::NotWarm(format!(
                "attempt {warm} ended meanwhile"
            )))),
        };
        let _ = reply.send(answer);
    }

    async fn refuse_damaged(&mut self, mut record: Record) -> Result<Entry, Refusal> {
        let end = End {
            reason: EndReason::InitLost,
            exit_code: None,
            signal: None,
            message: "the blade's record of this attempt was damaged: it may have run, and is not booted again"
                .to_owned(),
            tail: String::new(),
        };
        let key = record.identity.key.clone();
        let _ = record.apply(Fact::Ended {
            at: self.blade.clock.now(),
            end,
            vmm_cpu_us: 0,
        });
        self.record(record, true).await?;
        self.blade
            .board
            .entry(&key)
            .ok_or(Refusal::Busy("the attempt was forgotten meanwhile"))
    }

    /// Into the ledger, then onto the board.
    async fn record(&mut self, record: Record, is_closed: bool) -> Result<Arc<Record>, Refusal> {
        let record = Arc::new(record);
        let signal = watch::channel(LogSignal { rounds: 0, is_closed }).0;
        let (blade, written, log) = (self.blade.clone(), record.clone(), signal.subscribe());
        run_blocking(move || {
            blade.ledger.write(&written)?;
            blade.board.publish(written, Heartbeat::Regular, &log);
            Ok(())
        })
        .await?;
        self.signals.insert(record.identity.key.clone(), signal);
        Ok(record)
    }

    async fn stop(
        &mut self,
        identity: Identity,
        grace_s: Option<u32>,
        reason: Option<EndReason>,
    ) -> Result<Stopping, Refusal> {
        let key = identity.key.clone();
        // Also where the claimant is on the board already: its task is not known by this name yet.
        if self.claiming.contains(&key) {
            return Err(Refusal::Busy("the attempt is claiming a warm agent"));
        }
        match self.blade.board.entry(&key) {
            None => {
                self.record(Record::ended_before_it_began(identity, self.blade.clock.now()), true)
                    .await?;
                Ok(Stopping(None))
            }
            Some(entry) if entry.record.is_ended() => Ok(Stopping(None)),
            Some(_) => {
                let Some(handle) = self.handles.get(&key) else {
                    return Ok(Stopping(None));
                };
                let (done, ordered) = oneshot::channel();
                match handle.try_send(Request::Stop {
                    key: key.clone(),
                    grace_s,
                    reason,
                    done,
                }) {
                    Ok(()) => Ok(Stopping(Some(ordered))),
                    Err(mpsc::error::TrySendError::Full(_)) => {
                        Err(Refusal::Busy("the agent has too many requests waiting"))
                    }
                    Err(mpsc::error::TrySendError::Closed(_)) => Ok(Stopping(None)), // It ends just now.
                }
            }
        }
    }

    async fn forget(&mut self, key: &AttemptKey) -> Result<(), Refusal> {
        let Some(entry) = self.blade.board.entry(key) else {
            return Ok(());
        };
        if !entry.record.is_ended() {
            return Err(Refusal::StillRuns(key.clone()));
        }
        let mut record = (*entry.record).clone();
        let is_tombstone = record.forgotten_at.is_some();
        if is_tombstone
            || record
                .apply(Fact::Forgotten {
                    at: self.blade.clock.now(),
                })
                .is_err()
        {
            return Ok(());
        }
        // The end's words go with the logs; that it ended, and how, stays.
        if let Some(end) = &mut record.end {
            end.tail.clear();
        }
        // A claimed attempt's log is its claimant's.
        let folder = record
            .claimed_by
            .is_none()
            .then(|| self.blade.log_folder(&record.vm_id));
        self.record(record, true).await?;
        let Some(folder) = folder else { return Ok(()) };
        run_blocking(move || {
            if let Err(error) = remove_dir(&folder) {
                tracing::warn!(folder = %folder.display(), %error, "the log of a forgotten agent is left: the next start removes it");
            }
            Ok(())
        })
        .await
    }

    async fn forget_oldest(&mut self, entries: &[Entry]) {
        let mut ended: Vec<_> = entries
            .iter()
            .map(|entry| &entry.record)
            .filter(|record| record.is_ended() && record.forgotten_at.is_none())
            .collect();
        if ended.len() > MAX_ENDED {
            ended.sort_by_key(|record| record.finished_at);
            for record in &ended[..ended.len() - MAX_ENDED] {
                if let Err(error) = self.forget(&record.identity.key).await {
                    tracing::warn!(vm.id = %record.vm_id, %error, "an old ended agent cannot be forgotten");
                }
            }
        }
    }

    async fn sweep(&mut self) {
        let (entries, _) = self.blade.board.entries();
        let now = self.blade.clock.now();
        for record in entries
            .iter()
            .map(|entry| &entry.record)
            .filter(|record| is_tombstone_over(record, now))
        {
            let (blade, vm) = (self.blade.clone(), record.name());
            let removed = run_blocking(move || {
                if let Err(error) = blade.ledger.remove(&vm) {
                    tracing::warn!(vm.id = %vm, %error, "a tombstone cannot be removed");
                }
                Ok(())
            });
            if removed.await.is_ok() {
                self.blade.board.remove(&record.identity.key);
                self.signals.remove(&record.identity.key);
            }
        }
    }
}

async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LedgerError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Refusal::Ledger),
        Err(_) => Err(Refusal::Busy("a fault in far-node; see its log")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stories::doubles::{World, identity, key};

    #[test]
    fn admission_says_what_is_missing() {
        let room = Room {
            cpu_millis: 2000,
            memory_mib: 1024,
            max_vms: 2,
        };
        let cases = [
            ("empty blade", (2000, 1024), vec![], None),
            ("fits exactly", (1000, 512), vec![(1000, 512)], None),
            ("cpu", (1001, 1), vec![(1000, 512)], Some("spec.cpu")),
            ("memory", (1, 513), vec![(1000, 512)], Some("spec.memory")),
            ("too many", (1, 1), vec![(1, 1), (1, 1)], Some("2 microVMs")),
            (
                "no overflow",
                (u32::MAX, u32::MAX),
                vec![(u32::MAX, u32::MAX)],
                Some("spec.cpu"),
            ),
        ];
        for (why, (cpu, memory), running, expected) in cases {
            match (admit(cpu, memory, &running, room), expected) {
                (Ok(()), None) => {}
                (Err(text), Some(part)) => assert!(text.contains(part), "{why}: {text}"),
                (got, expected) => panic!("{why}: {got:?}, not {expected:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_stop_while_the_claim_is_being_written_is_not_taken_for_done() {
        let world = World::new();
        let node = world.start().await;
        node.ensure().await;
        // The claimant is on the board, and its task still goes by the warm attempt's name.
        let mut actor = Actor {
            blade: node.blade.clone(),
            room: Room {
                cpu_millis: 0,
                memory_mib: 0,
                max_vms: 0,
            },
            damaged: BTreeSet::new(),
            tasks: JoinSet::new(),
            keys: HashMap::new(),
            handles: BTreeMap::new(),
            signals: BTreeMap::new(),
            claims: FuturesUnordered::new(),
            claiming: BTreeSet::from([key()]),
        };
        let stopped = actor.stop(identity(1), None, None).await;
        assert!(matches!(stopped, Err(Refusal::Busy(_))));
    }
}
