//! A blade that is cut off, killed and started anew, whose network loses answers and repeats requests, and whose clock runs
//! apart. Its disk (the ledger) and its microVMs outlive its daemon.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use far_proto::{
    controller::{HeartbeatRequest, JoinRequest, blades_client::BladesClient},
    node::{
        node_server::{Node, NodeServer},
        *,
    },
};
use futures::{Stream, StreamExt};
use rand::Rng;
use tokio::{net::TcpListener, sync::broadcast};
use tokio_stream::wrappers::{BroadcastStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming, async_trait,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity as TlsIdentity, Server, ServerTlsConfig},
};

use crate::{
    support::blade::{Credentials, capacity, csr},
    truth::{Key, Truth},
};

/// How an attempt will go, from its spec's args: `ms=…`, `exit=…`, `fails=n` (the first n attempts), `breaks=n`.
struct Plan {
    runs_at: Instant,
    ends_at: Instant,
    reason: EndReason,
    exit_code: Option<i32>,
}

#[derive(Default)]
struct Disk {
    seq: u64,
    epoch: u64,
    agents: BTreeMap<Key, AgentState>,
    /// Forgotten, and never to be booted again.
    tombs: HashMap<Key, AgentState>,
    plans: HashMap<Key, Plan>,
    /// When the agents are to be ended because no controller was heard of.
    fenced_at: Option<Instant>,
}

pub struct ChaosBlade {
    pub name: String,
    room: NodeCapacity,
    credentials: Credentials,
    /// Where controllers say that they serve.
    ready_files: Vec<PathBuf>,
    disk: Mutex<Disk>,
    events: broadcast::Sender<Event>,
    truth: Arc<Truth>,
    /// Seconds its wall clock is off, and how fast its monotonic clock runs.
    skew: (i64, f64),
    /// Nothing goes wrong any more.
    pub calm: Arc<AtomicBool>,
    stop: CancellationToken,
}

fn tls(ca: &str, credentials: Option<&Credentials>) -> ClientTlsConfig {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca))
        .domain_name("controller.far.internal");
    match credentials {
        Some(own) => tls.identity(TlsIdentity::from_pem(&own.certificate_pem, &own.key_pem)),
        None => tls,
    }
}

fn client(address: &str, ca: &str, credentials: Option<&Credentials>) -> BladesClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("https://{address}"))
        .unwrap()
        .connect_timeout(Duration::from_secs(2))
        .timeout(Duration::from_secs(5))
        .tls_config(tls(ca, credentials))
        .unwrap();
    BladesClient::new(endpoint.connect_lazy())
}

pub struct Setup<'a> {
    pub name: &'a str,
    pub address: &'a str,
    pub ca: &'a str,
    pub token: String,
    pub ready_files: Vec<PathBuf>,
    pub truth: Arc<Truth>,
    pub calm: Arc<AtomicBool>,
    pub stop: CancellationToken,
}

impl ChaosBlade {
    pub async fn join(setup: Setup<'_>) -> Arc<Self> {
        let (key, csr_pem) = csr(setup.name);
        let request = JoinRequest {
            token: setup.token,
            blade: setup.name.to_owned(),
            csr_pem,
        };
        let joined = client(setup.address, setup.ca, None)
            .join(request)
            .await
            .unwrap()
            .into_inner();
        let mut rng = rand::rng();
        Arc::new(Self {
            name: setup.name.to_owned(),
            room: capacity(4000, 4096),
            credentials: Credentials {
                certificate_pem: joined.certificate_pem,
                key_pem: key.serialize_pem(),
                ca_pem: joined.ca_pem,
            },
            ready_files: setup.ready_files,
            disk: Mutex::default(),
            events: broadcast::channel(8192).0,
            truth: setup.truth,
            skew: (rng.random_range(-7200..7200), rng.random_range(0.95..1.05)),
            calm: setup.calm,
            stop: setup.stop,
        })
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::SeqCst)
    }

    fn happens(&self, chance: f64) -> bool {
        !self.is_calm() && rand::rng().random_bool(chance)
    }

    fn now(&self) -> prost_types::Timestamp {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        prost_types::Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap() + self.skew.0,
            nanos: 0,
        }
    }

    /// Attempts on the blade's disk.
    pub fn kept(&self) -> usize {
        self.disk.lock().unwrap().agents.len()
    }

    pub async fn run(self: Arc<Self>) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.clone().hypervise() => {}
            () = self.live_and_die() => {}
        }
    }

    /// The daemon: lives for a while, then it is killed or cut off, then it is there again at another address.
    async fn live_and_die(self: Arc<Self>) {
        loop {
            let dead = CancellationToken::new();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = listener.local_addr().unwrap().to_string();
            let tls = ServerTlsConfig::new()
                .identity(TlsIdentity::from_pem(
                    &self.credentials.certificate_pem,
                    &self.credentials.key_pem,
                ))
                .client_ca_root(Certificate::from_pem(&self.credentials.ca_pem));
            let service = Serving {
                blade: self.clone(),
                dead: dead.clone(),
            };
            let router = Server::builder()
                .tls_config(tls)
                .unwrap()
                .add_service(NodeServer::new(service));
            let served = dead.clone();
            let serving = tokio::spawn(async move {
                let _ = router
                    .serve_with_incoming_shutdown(TcpListenerStream::new(listener), served.cancelled_owned())
                    .await;
            });
            let life = Duration::from_millis(rand::rng().random_range(3_000..20_000));
            let until = Instant::now() + life;
            let over = async {
                while self.is_calm() || Instant::now() < until {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            tokio::select! {
                () = over => {}
                () = self.heartbeats(&endpoint) => {}
            }
            dead.cancel();
            serving.abort();
            let _ = serving.await;
            self.truth.count("blades killed or cut off");
            // Mostly back at once, sometimes away for longer than the fence time.
            let away = match rand::rng().random_range(0..10) {
                0 => 9_000,
                1..4 => rand::rng().random_range(1_000..4_000),
                _ => rand::rng().random_range(50..500),
            };
            tokio::time::sleep(Duration::from_millis(away)).await;
        }
    }

    async fn heartbeats(&self, endpoint: &str) {
        let mut clients: HashMap<String, BladesClient<Channel>> = HashMap::new();
        loop {
            let request = HeartbeatRequest {
                endpoint: endpoint.to_owned(),
                capacity: Some(self.room.clone()),
                labels: HashMap::default(),
            };
            for file in &self.ready_files {
                let Ok(address) = std::fs::read_to_string(file) else {
                    continue;
                };
                let address = address.trim().to_owned();
                let ca = &self.credentials.ca_pem;
                let client = clients
                    .entry(address.clone())
                    .or_insert_with(|| client(&address, ca, Some(&self.credentials)));
                let sent = Instant::now();
                let Ok(answer) = client.heartbeat(request.clone()).await else {
                    continue;
                };
                let answer = answer.into_inner();
                if self.happens(0.02) {
                    // The answer was lost: it puts nothing off.
                    continue;
                }
                let mut disk = self.disk.lock().unwrap();
                if answer.epoch >= disk.epoch && !answer.unreached {
                    disk.epoch = answer.epoch;
                    let fence = Duration::from_millis(answer.fence_after_ms).mul_f64(self.skew.1);
                    disk.fenced_at = Some(sent + fence);
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The microVMs and what watches over their lease: goes on whether or not the daemon lives.
    async fn hypervise(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = Instant::now();
            let mut disk = self.disk.lock().unwrap();
            let fenced = disk.fenced_at.is_some_and(|at| at <= now);
            let live: Vec<Key> = disk
                .agents
                .iter()
                .filter(|(_, state)| state.phase() != Phase::Ended)
                .map(|(key, _)| key.clone())
                .collect();
            for key in live {
                let (runs, ends, reason, code) = match disk.plans.get(&key) {
                    Some(plan) => (plan.runs_at <= now, plan.ends_at <= now, plan.reason, plan.exit_code),
                    None => (false, true, EndReason::InitLost, None),
                };
                let phase = disk.agents[&key].phase();
                if fenced {
                    self.truth.count("attempts ended by the fence");
                    self.end(&mut disk, &key, EndReason::NodeLost, None);
                } else if ends {
                    self.end(&mut disk, &key, reason, code);
                } else if runs && phase != Phase::Running {
                    let at = self.now();
                    self.change(&mut disk, &key, |state| {
                        state.set_phase(Phase::Running);
                        state.booted_at = Some(at);
                        state.started_at = Some(at);
                    });
                }
            }
        }
    }

    fn end(&self, disk: &mut Disk, key: &Key, reason: EndReason, exit_code: Option<i32>) {
        let at = self.now();
        self.truth.ended(key, &self.name, reason, exit_code);
        self.change(disk, key, |state| {
            state.set_phase(Phase::Ended);
            state.finished_at = Some(at);
            state.end = Some(End {
                reason: reason.into(),
                exit_code,
                ..End::default()
            });
        });
    }

    fn change(&self, disk: &mut Disk, key: &Key, change: impl FnOnce(&mut AgentState)) {
        disk.seq += 1;
        let seq = disk.seq;
        if let Some(state) = disk.agents.get_mut(key) {
            change(state);
            state.seq = seq;
            let _ = self.events.send(Event {
                seq,
                state: Some(state.clone()),
                replay_done: false,
            });
        }
    }

    fn check(&self, disk: &mut Disk, epoch: u64) -> Result<(), Status> {
        if epoch < disk.epoch {
            self.truth.count("calls of deposed controllers refused");
            return Err(Status::failed_precondition(format!(
                "epoch {epoch} is older than {}",
                disk.epoch
            )));
        }
        disk.epoch = epoch;
        Ok(())
    }

    fn ensure(&self, request: EnsureAgentRequest) -> Result<AgentState, Status> {
        let mut disk = self.disk.lock().unwrap();
        self.check(&mut disk, request.epoch)?;
        let identity = request.identity.unwrap();
        let key = (identity.uid.clone(), identity.attempt);
        if let Some(known) = disk.agents.get(&key).or_else(|| disk.tombs.get(&key)) {
            return Ok(known.clone());
        }
        let of_this = || disk.agents.iter().filter(|((uid, _), _)| *uid == key.0);
        if of_this().any(|((_, attempt), _)| *attempt > key.1) {
            return Err(Status::already_exists("a newer attempt is known"));
        }
        if of_this().any(|(_, state)| state.phase() != Phase::Ended) {
            return Err(Status::resource_exhausted("an older attempt has not ended"));
        }
        if self.happens(0.02) {
            return Err(Status::resource_exhausted("no room, says chaos"));
        }
        let now = Instant::now();
        let args = request.spec.unwrap_or_default().args;
        let arg = |name: &str| args.iter().find_map(|arg| arg.strip_prefix(name)?.parse::<u64>().ok());
        let (reason, exit_code) = if arg("fails=").is_some_and(|count| u64::from(key.1) <= count) {
            (EndReason::Error, Some(7))
        } else if arg("breaks=").is_some_and(|count| u64::from(key.1) <= count) {
            (EndReason::VmmCrashed, None)
        } else {
            match i32::try_from(arg("exit=").unwrap_or(0)).unwrap() {
                0 => (EndReason::Completed, Some(0)),
                code => (EndReason::Error, Some(code)),
            }
        };
        let plan = Plan {
            runs_at: now + Duration::from_millis(30),
            ends_at: now + Duration::from_millis(40 + arg("ms=").unwrap_or(100)),
            reason,
            exit_code,
        };
        self.truth.booted(&key, &self.name);
        disk.plans.insert(key.clone(), plan);
        let mut state = AgentState {
            identity: Some(identity),
            ..AgentState::default()
        };
        state.set_phase(Phase::Accepted);
        disk.agents.insert(key.clone(), state);
        self.change(&mut disk, &key, |_| {});
        Ok(disk.agents[&key].clone())
    }

    fn stop_attempt(&self, request: StopAgentRequest) -> Result<AgentState, Status> {
        let mut disk = self.disk.lock().unwrap();
        self.check(&mut disk, request.epoch)?;
        let reason = match request.reason() {
            EndReason::Unspecified => EndReason::Signal,
            reason => reason,
        };
        let identity = request.identity.unwrap();
        let key = (identity.uid.clone(), identity.attempt);
        if let Some(tomb) = disk.tombs.get(&key) {
            return Ok(tomb.clone());
        }
        match disk.agents.get(&key).map(AgentState::phase) {
            Some(Phase::Ended) => {}
            Some(_) => self.end(&mut disk, &key, reason, None),
            None => {
                let mut state = AgentState {
                    identity: Some(identity),
                    end: Some(End {
                        reason: EndReason::Evicted.into(),
                        ..End::default()
                    }),
                    ..AgentState::default()
                };
                state.set_phase(Phase::Ended);
                disk.agents.insert(key.clone(), state);
                self.change(&mut disk, &key, |_| {});
            }
        }
        Ok(disk.agents[&key].clone())
    }

    fn forget(&self, request: ForgetAgentRequest) -> Result<ForgetAgentResponse, Status> {
        let mut disk = self.disk.lock().unwrap();
        self.check(&mut disk, request.epoch)?;
        let identity = request.identity.unwrap();
        let key = (identity.uid, identity.attempt);
        match disk.agents.get(&key).map(AgentState::phase) {
            Some(Phase::Ended) => {
                let state = disk.agents.remove(&key).unwrap();
                disk.plans.remove(&key);
                disk.tombs.insert(key, state);
            }
            Some(_) => return Err(Status::failed_precondition("still running")),
            None => {}
        }
        Ok(ForgetAgentResponse {})
    }
}

/// One life of the daemon.
struct Serving {
    blade: Arc<ChaosBlade>,
    dead: CancellationToken,
}

impl Serving {
    /// What the network does to a call: the request is lost, or comes again later, or the answer is lost.
    async fn call<R, A>(
        &self,
        request: R,
        act: impl Fn(&ChaosBlade, R) -> Result<A, Status> + Send + 'static,
    ) -> Result<Response<A>, Status>
    where
        R: Clone + Send + 'static,
        A: Send,
    {
        let blade = self.blade.clone();
        if blade.happens(0.01) {
            blade.truth.count("requests lost");
            return Err(Status::unavailable("lost on the way"));
        }
        if blade.happens(0.05) {
            let pause = Duration::from_millis(rand::rng().random_range(1..300));
            tokio::time::sleep(pause).await;
        }
        let answer = act(&blade, request.clone());
        if blade.happens(0.03) {
            blade.truth.count("requests repeated");
            let delay = Duration::from_millis(rand::rng().random_range(1..6_000));
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let _ = act(&blade, request);
            });
        }
        if self.blade.happens(0.03) {
            self.blade.truth.count("answers lost");
            // As an HTTP/2 connection in trouble says it, which is also what a full blade says.
            let code = if rand::rng().random_bool(0.5) {
                Status::unavailable("the answer is lost")
            } else {
                Status::resource_exhausted("the answer is lost")
            };
            return Err(code);
        }
        answer.map(Response::new)
    }
}

type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl Node for Serving {
    async fn ensure_agent(&self, request: Request<EnsureAgentRequest>) -> Result<Response<AgentState>, Status> {
        self.call(request.into_inner(), ChaosBlade::ensure).await
    }

    async fn stop_agent(&self, request: Request<StopAgentRequest>) -> Result<Response<AgentState>, Status> {
        self.call(request.into_inner(), ChaosBlade::stop_attempt).await
    }

    async fn claim_agent(&self, _: Request<ClaimAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(Status::unimplemented("no warm agents in chaos"))
    }

    async fn sleep_agent(&self, _: Request<SleepAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(Status::unimplemented("no sleep in chaos"))
    }

    async fn resurrect_agent(&self, _: Request<ResurrectAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(Status::unimplemented("no sleep in chaos"))
    }

    async fn forget_agent(
        &self,
        request: Request<ForgetAgentRequest>,
    ) -> Result<Response<ForgetAgentResponse>, Status> {
        self.call(request.into_inner(), ChaosBlade::forget).await
    }

    async fn list_agents(&self, _: Request<ListAgentsRequest>) -> Result<Response<ListAgentsResponse>, Status> {
        if self.blade.happens(0.03) {
            return Err(Status::unavailable("lost on the way"));
        }
        let disk = self.blade.disk.lock().unwrap();
        Ok(Response::new(ListAgentsResponse {
            agents: disk.agents.values().cloned().collect(),
            seq: disk.seq,
            boot_id: "boot".into(),
        }))
    }

    type WatchEventsStream = Flow<Event>;

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Result<Response<Flow<Event>>, Status> {
        let mut disk = self.blade.disk.lock().unwrap();
        self.blade.check(&mut disk, request.into_inner().epoch)?;
        let live = BroadcastStream::new(self.blade.events.subscribe());
        let event = |state: Option<AgentState>| Event {
            seq: state.as_ref().map_or(disk.seq, |state| state.seq),
            replay_done: state.is_none(),
            state,
        };
        let states = disk.agents.values().cloned().map(Some).chain([None]);
        let replay: Vec<Result<Event, Status>> = states.map(|state| Ok(event(state))).collect();
        let live = live
            .map(|event| event.map_err(|_| Status::data_loss("too slow")))
            .take_until(self.dead.clone().cancelled_owned());
        Ok(Response::new(Box::pin(tokio_stream::iter(replay).chain(live))))
    }

    type LogsStream = Flow<LogChunk>;

    async fn logs(&self, _: Request<LogsRequest>) -> Result<Response<Flow<LogChunk>>, Status> {
        Err(Status::unimplemented("no logs in chaos"))
    }

    async fn capacity(&self, _: Request<CapacityRequest>) -> Result<Response<NodeCapacity>, Status> {
        Err(Status::unimplemented("told by heartbeat"))
    }

    async fn load_image(&self, _: Request<Streaming<LoadImageRequest>>) -> Result<Response<Image>, Status> {
        Err(Status::unimplemented("no images in chaos"))
    }

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Result<Response<ListImagesResponse>, Status> {
        Err(Status::unimplemented("no images in chaos"))
    }

    async fn remove_image(&self, _: Request<RemoveImageRequest>) -> Result<Response<RemoveImageResponse>, Status> {
        Err(Status::unimplemented("no images in chaos"))
    }
}
