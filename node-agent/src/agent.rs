//! The task of one attempt: it alone changes the attempt's record and its VM.
//!
//! ```text
//!           ┌ prepare: secrets there? image, folder, log, listener ┐      ┌ watch over ─────────────────────┐
//! accepted ─┤ (a stop or a refusal leads straight to the end)      ├─ Starting (fsync) ─ spawn ─► Hello, Ready,│─► finish
//!           └──────────────────────────────────────────────────────┘      │ stop, time limits, VMM's end    │
//! adopted (spawned by an earlier far-node) ───────────────────────────────► as well                         │
//!                                                                         └─────────────────────────────────┘
//! ```
//! A warm attempt's task holds Config back after Hello. When another attempt claims the VM, the task becomes that
//! attempt's: see [`claim`].
//!
//! What to do is decided in [`crate::record`], [`crate::outcome`] and [`crate::control::protocol`]; here it is done. When
//! far-node shuts down, the task ends and its VM stays: the next far-node adopts it.
//!
//! Invariant: each fact is in the ledger before it is acted upon, told, or acknowledged to the guest.

pub(crate) mod claim;

use crate::{
    board::Board,
    clock::Clock,
    control::{
        delivery::{self, Launch, LaunchError},
        listener::{Dialled, Listener},
        protocol::Violation,
        session::{Session, SessionEvent},
    },
    fence::Fence,
    guests::Guests,
    host::{ImageFault, Images, PrepareError, ReadyImage, VmHost, VmPlan},
    ledger::Ledger,
    log_sink::{LogSignal, LogSink},
    logs::read_tail,
    metrics::Metrics,
    names::{AttemptKey, VmId},
    nics::Nics,
    outcome::{Alarm, Forced, VmmEnd, decide_end, millis, next_alarm},
    pulse::Pulse,
    record::{EndReason, ExitReport, Fact, Misfit, Record, Resources, Spawn, StopOrder, UnixMs},
    spec::{Identity, Spec},
};
use claim::NotClaimed;
use far_proto::{
    frame::CONTROL_PORT,
    guest::{ExitAck, HostMessage, Reseed, SetTime, Shutdown, Stage, host_message::Kind},
};
use rand::RngCore;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// Bytes of output told with an end.
const TAIL: usize = 2 << 10;
/// After the VMM's end: for what the guest sent just before.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// A kill that did not work is tried again.
const KILL_AGAIN: Duration = Duration::from_secs(10);
/// Until the control socket of an adopted VM is tried again: a moment without file descriptors must not cost its agent.
const BIND_AGAIN: Duration = Duration::from_secs(1);
/// Broken connections of one VM until its init counts as lost.
const MAX_VIOLATIONS: u32 = 16;
/// A full disk under the ledger: until the next try.
const LEDGER_RETRY: Duration = Duration::from_secs(1);
/// A connection that was away so long gets time and entropy when it is back.
const GAP: Duration = Duration::from_secs(5);
/// Fresh bytes for the guest's random pool (control.proto: 32 to 512).
const ENTROPY: usize = 64;
/// Requests that may wait for one task.
pub(crate) const REQUESTS: usize = 16;

/// Bounds that the blade's owner sets.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Until Hello, and again until Ready.
    pub boot_timeout: Duration,
    /// Output kept on disk per attempt.
    pub log_max_bytes: u64,
    /// How often guests say that they live.
    pub heartbeat: Duration,
}

/// What all tasks share.
#[derive(Debug)]
pub struct Blade {
    /// Time.
    pub clock: Clock,
    /// Records on disk.
    pub ledger: Ledger,
    /// Records as told.
    pub board: Board,
    /// VMs.
    pub host: Arc<dyn VmHost>,
    /// Images.
    pub images: Arc<dyn Images>,
    /// Networks of the VMs.
    pub nics: Arc<Nics>,
    /// Guests that run, and their connections.
    pub guests: Guests,
    /// Numbers for Prometheus.
    pub metrics: Metrics,
    /// Bounds.
    pub limits: Limits,
    /// Folder of the logs, one folder per VM.
    pub logs: PathBuf,
    /// Of this start of the blade's kernel.
    pub boot_id: String,
    /// Until when agents may run without a controller.
    pub fence: Fence,
    /// Told when images come or go: the controller hears of it at once.
    pub images_changed: Notify,
    /// Ends all tasks; VMs stay.
    pub shutdown: CancellationToken,
}

impl Blade {
    /// Folder of one attempt's log.
    #[must_use]
    pub fn log_folder(&self, vm: &VmId) -> PathBuf {
        self.logs.join(vm.as_str())
    }
}

/// What others ask of a task.
#[derive(Debug)]
pub(crate) enum Request {
    /// End the attempt; answered when the order is in the ledger.
    Stop {
        /// Whom it is for: a claim may have come first.
        key: AttemptKey,
        grace_s: Option<u32>,
        reason: Option<EndReason>,
        done: oneshot::Sender<()>,
    },
    /// The same spec again, with secrets that may be missing here.
    Refresh { key: AttemptKey, spec: Box<Spec> },
    /// Hand the warm VM over to this attempt; answered when that is in the ledger.
    Claim {
        identity: Identity,
        spec: Box<Spec>,
        done: oneshot::Sender<Result<(), NotClaimed>>,
    },
}

/// Leads out of a task before its end.
enum Leave {
    /// far-node shuts down; the VM stays.
    Shutdown,
    /// The attempt is over before its VM was spawned.
    Over,
}

pub(crate) struct AgentTask {
    blade: Arc<Blade>,
    record: Arc<Record>,
    spec: Option<Spec>,
    requests: mpsc::Receiver<Request>,
    signal: watch::Sender<LogSignal>,
    /// Given to each session; its events come tagged with its number.
    tell: mpsc::Sender<(u64, SessionEvent)>,
    told: mpsc::Receiver<(u64, SessionEvent)>,
    session: Option<Session>,
    /// When the last connection was lost, while there is none.
    lost_at: Option<UnixMs>,
    sessions: u64,
    /// Work on image and folder; a stop does not wait for it, the release does.
    preparing: Option<JoinHandle<()>>,
    violations: u32,
    /// Start was sent, or may have been by an earlier far-node.
    may_have_started: bool,
    pending_exit: Option<ExitReport>,
    forced: Option<Forced>,
    killed_at: Option<UnixMs>,
    /// When this far-node took over a VM that an earlier one spawned.
    adopted_at: Option<UnixMs>,
    pulse: Pulse,
}

impl AgentTask {
    /// The task of a record that is in the ledger; one that was spawned before is adopted.
    pub(crate) fn new(
        blade: Arc<Blade>,
        record: Arc<Record>,
        spec: Option<Spec>,
        requests: mpsc::Receiver<Request>,
        signal: watch::Sender<LogSignal>,
    ) -> Self {
        let may_have_started = record.spawn.is_some() && !record.start_on_claim;
        let (tell, told) = mpsc::channel(64);
        let pulse = Pulse::new(blade.host.clone(), record.vm_id.clone(), blade.limits.heartbeat);
        Self {
            blade,
            record,
            spec,
            requests,
            signal,
            tell,
            told,
            session: None,
            lost_at: None,
            sessions: 0,
            preparing: None,
            violations: 0,
            may_have_started,
            pending_exit: None,
            forced: None,
            killed_at: None,
            adopted_at: None,
            pulse,
        }
    }

    /// The task of a record whose earlier task broke: it only ends the VM.
    pub(crate) fn after_panic(mut self) -> Self {
        self.forced = Some(Forced::InitLost {
            message: "a fault in far-node ended the agent; see its log".to_owned(),
        });
        self
    }

    /// Runs until the attempt ended or far-node shuts down.
    pub(crate) async fn run(mut self) {
        let shutdown = self.blade.shutdown.clone();
        let end = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            end = self.live() => end,
        };
        match end {
            Ok(end) => self.finish(end).await,
            Err(Leave::Over) => self.finish(VmmEnd::NeverBooted).await,
            Err(Leave::Shutdown) => {}
        }
    }

    async fn live(&mut self) -> Result<VmmEnd, Leave> {
        // Also one without a VM: the lease went with that start, and the attempt may run elsewhere by now.
        if self.record.boot() != self.blade.boot_id {
            return Ok(VmmEnd::Vanished { blade_rebooted: true });
        }
        if self.record.spawn.is_some() {
            self.adopted_at = Some(self.blade.clock.now());
            if self.forced.is_some() {
                self.kill().await;
            }
            let log = self.open_log().await?;
            let listener = self.bind();
            tracing::info!(vm.id = %self.record.vm_id, "a microVM of an earlier far-node is adopted");
            return self.watch_over(listener, log).await;
        }
        if self.forced.is_some() {
            return Err(Leave::Over);
        }
        let (plan, spawning) = self.prepare().await?;
        let log = self.open_log().await?;
        let listener = self.bind();
        if listener.is_none() {
            return Err(Leave::Over);
        }
        while let Ok(request) = self.requests.try_recv() {
            self.on_request(request).await?;
        }
        self.must_change(spawning).await;
        let blade = self.blade.clone();
        if let Err(error) = blade.host.boot(&plan.vm).await {
            return Ok(VmmEnd::Crashed {
                message: error.to_string(),
            });
        }
        self.watch_over(listener, log).await
    }

    // ---- before the VM ----

    async fn prepare(&mut self) -> Result<(VmPlan, Fact), Leave> {
        if self.record.stop.is_some() {
            return Err(Leave::Over);
        }
        let spec = self.wait_for_secrets().await?;
        self.must_change(Fact::Preparing).await;
        let blade = self.blade.clone();
        let vm = self.record.vm_id.clone();
        let (send, result) = oneshot::channel();
        self.preparing = Some(tokio::task::spawn_blocking(move || {
            let _ = send.send(prepare_blocking(&blade, vm, &spec));
        }));
        match self.while_answering(result).await? {
            Ok(Ok((plan, image_digest, launch, resources, notice))) => {
                let spawn = Spawn {
                    at: self.blade.clock.now(),
                    boot_id: self.blade.boot_id.clone(),
                };
                let message = if resources.nic {
                    notice
                } else {
                    resources.no_nic_reason.clone()
                };
                Ok((
                    plan,
                    Fact::Spawning {
                        spawn,
                        image_digest,
                        resources,
                        launch: Box::new(launch),
                        message,
                    },
                ))
            }
            Ok(Err(refused)) => self.refuse(refused),
            Err(_) => self.refuse(Forced::InitLost {
                message: "a fault in far-node; see its log".to_owned(),
            }),
        }
    }

    fn refuse<T>(&mut self, why: Forced) -> Result<T, Leave> {
        self.forced = Some(why);
        Err(Leave::Over)
    }

    async fn wait_for_secrets(&mut self) -> Result<Spec, Leave> {
        loop {
            match &self.spec {
                None => {
                    let message = "the blade's ledger lost the spec of this attempt".to_owned();
                    return self.refuse(Forced::Refused {
                        reason: EndReason::Error,
                        message,
                    });
                }
                Some(spec) if spec.is_complete() => return Ok(spec.clone()),
                Some(_) => {}
            }
            match self.requests.recv().await {
                Some(request) => self.on_request(request).await?,
                None => return Err(Leave::Shutdown),
            }
        }
    }

    /// Waits for work that runs elsewhere and answers requests meanwhile; a stop does not wait for it.
    async fn while_answering<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Leave> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                request = self.requests.recv() => match request {
                    Some(request) => self.on_request(request).await?,
                    None => return Err(Leave::Shutdown),
                },
            }
        }
    }

    async fn open_log(&mut self) -> Result<LogSink, Leave> {
        let (folder, signal) = (self.blade.log_folder(&self.record.vm_id), self.signal.clone());
        let max = self.blade.limits.log_max_bytes;
        loop {
            let (folder, signal) = (folder.clone(), signal.clone());
            match tokio::task::spawn_blocking(move || LogSink::open(&folder, max, signal)).await {
                Ok(Ok(log)) => return Ok(log),
                Ok(Err(error)) => {
                    tracing::error!(vm.id = %self.record.vm_id, %error, "the log of an agent cannot be opened: trying again");
                    self.while_answering(tokio::time::sleep(LEDGER_RETRY)).await?;
                }
                Err(_) => return Err(Leave::Shutdown),
            }
        }
    }

    /// Without a listener a new VM is refused; an adopted one is watched all the same.
    fn bind(&mut self) -> Option<Listener> {
        let path = self
            .blade
            .host
            .folder(&self.record.vm_id)
            .join(format!("v.sock_{CONTROL_PORT}"));
        match Listener::bind(&path) {
            Ok(listener) => Some(listener),
            Err(error) => {
                tracing::warn!(vm.id = %self.record.vm_id, path = %path.display(), %error, "the control socket cannot be bound");
                if self.record.spawn.is_none() {
                    let message = format!("binding the control socket {}: {error}", path.display());
                    self.forced = Some(Forced::Refused {
                        reason: EndReason::Error,
                        message,
                    });
                }
                None
            }
        }
    }

    // ---- while the VM runs ----

    async fn watch_over(&mut self, mut listener: Option<Listener>, log: LogSink) -> Result<VmmEnd, Leave> {
        let blade = self.blade.clone();
        let mut ended = blade.host.ended(&self.record.vm_id);
        if self.record.stop.is_some() && self.record.started_at.is_none() {
            self.kill().await;
        }
        if self.record.booted_at.is_some() {
            self.note_heartbeat();
        }
        loop {
            let alarm = self.next_alarm();
            // Biased: what already happened comes before what is still asked. Every branch is cancel-safe.
            tokio::select! {
                biased;
                end = &mut ended => return Ok(end),
                Some((number, event)) = self.told.recv() => self.on_session(number, event).await,
                Some(dialled) = next_dialled(&mut listener) => self.on_dialled(dialled, &log).await,
                request = self.requests.recv() => match request {
                    Some(request) => {
                        // Only a stop before the spawn leads out; that is behind us.
                        if let Err(Leave::Shutdown) = self.on_request(request).await {
                            return Err(Leave::Shutdown);
                        }
                    }
                    None => return Err(Leave::Shutdown),
                },
                () = blade.clock.until(alarm.as_ref().map(|(at, _)| *at)) => {
                    if let Some((_, alarm)) = alarm {
                        self.on_alarm(alarm).await;
                    }
                }
                () = self.pulse.changed(&blade.clock) => self.tell_heartbeat(),
                () = tokio::time::sleep(BIND_AGAIN), if listener.is_none() => listener = self.bind(),
            }
        }
    }

    fn next_alarm(&self) -> Option<(UnixMs, Alarm)> {
        match self.killed_at {
            Some(at) => Some((at + millis(KILL_AGAIN), Alarm::Kill(None))),
            None => next_alarm(&self.record, self.blade.limits.boot_timeout, self.adopted_at),
        }
    }

    async fn on_alarm(&mut self, alarm: Alarm) {
        match alarm {
            Alarm::Kill(forced) => {
                self.forced = self.forced.take().or(forced);
                self.kill().await;
            }
            Alarm::Deadline => {
                self.order_stop(self.record.grace_s, Some(EndReason::DeadlineExceeded))
                    .await;
            }
        }
    }

    async fn kill(&mut self) {
        tracing::info!(vm.id = %self.record.vm_id, "the microVM is ended by force");
        self.killed_at = Some(self.blade.clock.now());
        let blade = self.blade.clone();
        blade.host.kill(&self.record.vm_id).await;
    }

    async fn on_request(&mut self, request: Request) -> Result<(), Leave> {
        match request {
            // For the warm attempt that this one was.
            Request::Refresh { key, .. } | Request::Stop { key, .. } if key != self.record.identity.key => Ok(()),
            Request::Refresh { spec, .. } => {
                if self.spec.as_ref().is_none_or(|spec| !spec.is_complete()) {
                    self.spec = Some(*spec);
                    self.deliver().await;
                }
                Ok(())
            }
            Request::Claim { identity, spec, done } => {
                let _ = done.send(self.claim(identity, *spec).await);
                Ok(())
            }
            Request::Stop {
                grace_s, reason, done, ..
            } => {
                self.order_stop(grace_s.unwrap_or(self.record.grace_s), reason).await;
                let _ = done.send(()); // The asker may have gone away.
                if self.record.spawn.is_none() {
                    Err(Leave::Over)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// A second order moves nothing.
    async fn order_stop(&mut self, grace_s: u32, reason: Option<EndReason>) {
        if self.record.stop.is_some() {
            return;
        }
        let order = StopOrder {
            at: self.blade.clock.now(),
            grace_s,
            reason,
        };
        self.must_change(Fact::StopOrdered(order)).await;
        if self.record.started_at.is_some() {
            self.send_shutdown();
        } else if self.record.spawn.is_some() {
            // No payload to be polite to.
            self.kill().await;
        }
    }

    fn send_shutdown(&mut self) {
        if let (Some(session), Some(order)) = (&self.session, &self.record.stop) {
            let passed = self.blade.clock.now().saturating_sub(order.at) / 1000;
            let grace_s = order.grace_s.saturating_sub(u32::try_from(passed).unwrap_or(u32::MAX));
            session.send(vec![HostMessage {
                kind: Some(Kind::Shutdown(Shutdown { grace_s })),
            }]);
        }
    }

    // ---- the guest ----

    async fn on_dialled(&mut self, dialled: Dialled, log: &LogSink) {
        let stage = dialled.greeting.stage;
        let version = dialled.greeting.init_version.clone();
        match &self.record.boot_nonce {
            None => {
                let nonce = dialled.greeting.nonce.clone();
                self.must_change(Fact::Hello {
                    at: self.blade.clock.now(),
                    nonce,
                })
                .await;
                tracing::info!(vm.id = %self.record.vm_id, init.version = %version, "the guest said Hello");
            }
            Some(nonce) if *nonce == dialled.greeting.nonce => {}
            Some(_) => {
                let message = "the guest's init started anew inside the microVM (its boot nonce changed)".to_owned();
                self.forced.get_or_insert(Forced::InitLost { message });
                self.kill().await;
                return;
            }
        }
        let problem = match stage {
            Stage::WaitingForConfig if self.record.started_at.is_some() => Some("it waits for a config after Ready"),
            Stage::Running if !self.may_have_started => Some("it claims to run before Start"),
            Stage::Unspecified => Some("it has no stage"),
            Stage::WaitingForConfig | Stage::Running | Stage::Exited => None,
        };
        if let Some(problem) = problem {
            self.on_violation(&Violation(problem.to_owned())).await;
            return;
        }
        self.sessions += 1;
        let (number, heartbeat) = (self.sessions, self.blade.limits.heartbeat);
        self.session = Some(Session::start(
            number,
            dialled,
            log.clone(),
            heartbeat,
            self.blade.metrics.channels.clone(),
            self.tell.clone(),
        ));
        self.blade.metrics.connections.inc();
        self.note_heartbeat();
        match stage {
            Stage::WaitingForConfig => self.deliver().await,
            // Its Ready may have been lost with a connection.
            Stage::Running if self.record.started_at.is_none() => self.note_ready(String::new()).await,
            Stage::Running | Stage::Exited | Stage::Unspecified => {}
        }
        self.after_gap();
        self.offer_channels();
        self.send_shutdown();
    }

    /// Sends Config, files and Start to a guest that waits, once all secrets are known.
    async fn deliver(&mut self) {
        let (Some(session), Some(spec), Some(launch)) = (&self.session, &self.spec, &self.record.launch) else {
            return;
        };
        if self.record.start_on_claim || self.record.started_at.is_some() || self.record.stop.is_some() {
            return;
        }
        // Megabytes of files are digested.
        let (launch, spec, name) = (launch.clone(), spec.clone(), self.record.identity.name.clone());
        let now = self.blade.clock.now();
        let made = tokio::task::spawn_blocking(move || delivery::messages(&launch, &spec, &name, now)).await;
        match made {
            Ok(Some(messages)) => {
                self.may_have_started = true;
                session.send(messages);
            }
            Ok(None) => {}
            Err(error) => tracing::error!(vm.id = %self.record.vm_id, %error, "the guest's config cannot be made"),
        }
    }

    async fn on_session(&mut self, number: u64, event: SessionEvent) {
        if self.session.as_ref().is_none_or(|session| session.number() != number) {
            return; // Of a connection that was replaced.
        }
        match event {
            SessionEvent::Ready { message } => self.note_ready(message).await,
            SessionEvent::Heartbeat(heartbeat) => {
                self.blade.metrics.heartbeats.inc();
                let now = self.blade.clock.now();
                self.blade.guests.heard(&self.record.identity.key, &heartbeat, now);
                self.note_heartbeat();
            }
            SessionEvent::Exit {
                how,
                oom_killed,
                start_error,
            } => {
                let at = self.blade.clock.now();
                self.pending_exit = Some(ExitReport {
                    at,
                    how,
                    oom_killed,
                    start_error,
                });
            }
            SessionEvent::ExitComplete => self.store_exit().await,
            SessionEvent::Closed(violation) => {
                self.session = None;
                self.lost_at = Some(self.blade.clock.now());
                self.blade.guests.disconnected(&self.record.identity.key);
                if let Some(violation) = violation {
                    self.on_violation(&violation).await;
                }
            }
        }
    }

    async fn note_ready(&mut self, message: String) {
        // A Ready that repeats (connection lost right after it) says nothing new.
        let _ = self
            .change(Fact::Ready {
                at: self.blade.clock.now(),
                message,
            })
            .await;
        self.note_heartbeat();
        self.offer_channels();
    }

    /// Calls into the guest may use this connection once its payload runs.
    fn offer_channels(&self) {
        if let Some(session) = self.session.as_ref().filter(|_| self.record.started_at.is_some()) {
            let key = &self.record.identity.key;
            self.blade.guests.connected(key, session.channels().clone());
        }
    }

    /// A guest that was away so long may have been stopped or restored: its clock stood still, and its random numbers
    /// may be another VM's too.
    fn after_gap(&mut self) {
        let Some(lost_at) = self.lost_at.take() else { return };
        let now = self.blade.clock.now();
        if now.saturating_sub(lost_at) < millis(GAP) || self.record.started_at.is_none() {
            return;
        }
        let Some(session) = &self.session else { return };
        tracing::info!(vm.id = %self.record.vm_id, away_ms = now - lost_at, "the guest gets the time and fresh entropy after a gap");
        let unix_ns = now.saturating_mul(1_000_000);
        let mut entropy = vec![0; ENTROPY];
        rand::rng().fill_bytes(&mut entropy);
        // Without an answer it is no worse off than before.
        let _ = session.channels().ask(|id| Kind::SetTime(SetTime { id, unix_ns }));
        let _ = session.channels().ask(|id| Kind::Reseed(Reseed { id, entropy }));
    }

    /// The first report counts; a repeated one is only acknowledged again.
    async fn store_exit(&mut self) {
        if let Some(report) = self.pending_exit.take()
            && self.record.exit.is_none()
        {
            let _ = self.change(Fact::Exited(report)).await;
        }
        if let (Some(session), Some(_)) = (&self.session, &self.record.exit) {
            session.send(vec![HostMessage {
                kind: Some(Kind::ExitAck(ExitAck {})),
            }]);
        }
    }

    async fn on_violation(&mut self, violation: &Violation) {
        tracing::warn!(vm.id = %self.record.vm_id, error = %violation, "a control connection was cut");
        self.violations += 1;
        self.blade.metrics.violations.inc();
        if self.violations >= MAX_VIOLATIONS && self.killed_at.is_none() {
            self.forced.get_or_insert(Forced::InitLost {
                message: violation.to_string(),
            });
            self.kill().await;
        }
    }

    fn note_heartbeat(&mut self) {
        if self.pulse.beat(self.blade.clock.now()) {
            self.tell_heartbeat();
        }
    }

    fn tell_heartbeat(&self) {
        let (record, log) = (self.record.clone(), self.signal.subscribe());
        self.blade.board.publish(record, self.pulse.state(), &log);
    }

    // ---- the end ----

    async fn finish(mut self, mut vmm: VmmEnd) {
        // A stored report means that all output came before it.
        if self.session.is_some() && self.record.exit.is_none() {
            let _ = tokio::time::timeout(DRAIN_LIMIT, self.drain()).await;
        }
        if let Some(report) = self.pending_exit.take() {
            // The guest went before all of its output came; its report was seen all the same.
            let _ = self.change(Fact::Exited(report)).await;
        }
        self.session = None;
        self.blade.guests.forget(&self.record.identity.key);
        if let VmmEnd::Vanished { .. } = vmm {
            vmm = VmmEnd::Vanished {
                blade_rebooted: self.record.boot() != self.blade.boot_id,
            };
        }
        let (blade, vm) = (self.blade.clone(), self.record.vm_id.clone());
        let vmm_cpu_us = match self.record.spawn {
            Some(_) => blade.host.cpu_us(&vm).await,
            None => 0,
        };
        let folder = blade.log_folder(&vm);
        let tail = tokio::task::spawn_blocking(move || read_tail(&folder, TAIL))
            .await
            .unwrap_or_default();
        let end = decide_end(&self.record, &vmm, self.forced.as_ref(), tail);
        tracing::info!(vm.id = %vm, agent.namespace = %self.record.identity.namespace, agent.name = %self.record.identity.name,
            reason = ?end.reason, exit_code = ?end.exit_code, "an agent ended");
        self.must_change(Fact::Ended {
            at: blade.clock.now(),
            end,
            vmm_cpu_us,
        })
        .await;
        self.signal.send_modify(|signal| signal.is_closed = true);
        if let Some(preparing) = self.preparing.take() {
            let _ = preparing.await;
        }
        if let Err(error) = blade.host.release(&vm).await {
            tracing::warn!(vm.id = %vm, %error, "something of an ended microVM is left: the next start cleans it up");
        }
        if let Err(error) = blade.ledger.remove_spec(&self.record.name()) {
            tracing::warn!(vm.id = %vm, %error, "the spec of an ended attempt is left in the ledger");
        }
    }

    /// Takes what the guest sent before its end, until its connection is over.
    async fn drain(&mut self) {
        while self.session.is_some() {
            match self.told.recv().await {
                Some((number, event)) => self.on_session(number, event).await,
                None => return,
            }
        }
    }

    // ---- the ledger ----

    /// Takes a fact: in the ledger, then on the board. While the disk is full nothing goes on.
    async fn change(&mut self, fact: Fact) -> Result<(), Misfit> {
        let mut record = (*self.record).clone();
        record.apply(fact)?;
        self.keep(Arc::new(record)).await;
        Ok(())
    }

    /// The task's record from now on.
    async fn keep(&mut self, record: Arc<Record>) {
        loop {
            let (blade, written) = (self.blade.clone(), record.clone());
            let (heartbeat, log) = (self.pulse.state(), self.signal.subscribe());
            let work = move || {
                blade.ledger.write(&written)?;
                blade.board.publish(written, heartbeat, &log);
                Ok::<_, crate::ledger::LedgerError>(())
            };
            match tokio::task::spawn_blocking(work).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    tracing::error!(vm.id = %record.vm_id, error = ?error, "the ledger cannot be written: trying again")
                }
                Err(error) => {
                    tracing::error!(vm.id = %record.vm_id, %error, "the ledger cannot be written: trying again")
                }
            }
            tokio::time::sleep(LEDGER_RETRY).await;
        }
        self.record = record;
    }

    /// For facts that fit wherever they are stated.
    async fn must_change(&mut self, fact: Fact) {
        if let Err(misfit) = self.change(fact).await {
            tracing::error!(vm.id = %self.record.vm_id, error = %misfit, "a fact did not fit its record");
        }
    }
}

async fn next_dialled(listener: &mut Option<Listener>) -> Option<Dialled> {
    match listener {
        Some(listener) => listener.next().await,
        None => std::future::pending().await,
    }
}

type Prepared = (VmPlan, String, delivery::Launch, Resources, String);

/// Everything before the spawn that takes time: image, program, folder.
fn prepare_blocking(blade: &Blade, vm: VmId, spec: &Spec) -> Result<Prepared, Forced> {
    let refused = |reason, message| Forced::Refused { reason, message };
    let (image, mut launch) = resolve(blade, spec)?;
    let plan = VmPlan {
        vm,
        rootfs: image.rootfs,
        vcpus: spec.vcpus(),
        memory_mib: spec.memory_mib,
        network: spec.network.clone(),
    };
    let prepared = blade.host.prepare(&plan).map_err(|error| {
        let reason = match error {
            PrepareError::Files(_) => EndReason::Error,
            PrepareError::Network(_) => EndReason::NetworkError,
        };
        refused(reason, error.to_string())
    })?;
    launch.nic = prepared.nic;
    Ok((plan, image.digest, launch, prepared.resources, prepared.notice))
}

/// Image and program. Blocking.
fn resolve(blade: &Blade, spec: &Spec) -> Result<(ReadyImage, Launch), Forced> {
    let refused = |reason, message| Forced::Refused { reason, message };
    let image = blade.images.prepare(&spec.image).map_err(|fault| match fault {
        ImageFault::Unknown { .. } => refused(
            EndReason::ImageError,
            format!("spec.image: {fault}; load it with `far image load`"),
        ),
        ImageFault::Bad { .. } | ImageFault::Store { .. } => {
            refused(EndReason::ImageError, format!("spec.image: {fault}"))
        }
    })?;
    if spec.start_on_claim {
        let launch = Launch::idle(&image.settings);
        return Ok((image, launch));
    }
    let launch =
        delivery::launch(spec, &image.settings, |paths| blade.images.has_files(&image, paths)).map_err(|error| {
            let reason = match error {
                LaunchError::NoProgram { .. } | LaunchError::Missing { .. } => EndReason::Error,
                LaunchError::Settings { .. } => EndReason::ImageError,
            };
            refused(reason, error.to_string())
        })?;
    Ok((image, launch))
}
