//! A blade without microVMs: joins, heartbeats, keeps a ledger, and does with attempts what the test says.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use far_proto::{
    controller::{HeartbeatRequest, JoinRequest, JoinResponse, RenewRequest, blades_client::BladesClient},
    node::{
        node_server::{Node, NodeServer},
        *,
    },
};
use futures::{Stream, StreamExt};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use tokio::{
    net::TcpListener,
    sync::broadcast,
    task::{JoinHandle, JoinSet},
};
use tokio_stream::wrappers::{BroadcastStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming, async_trait,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity as TlsIdentity, Server, ServerTlsConfig},
};

use super::Cluster;

/// Between two heartbeats, milliseconds. Tests do not like to wait; a bench sets what the controller asks for.
pub static HEARTBEAT_MS: AtomicU64 = AtomicU64::new(200);

/// A key and a request for a name.
pub fn csr(name: &str) -> (KeyPair, String) {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::new(vec![format!("{name}.blade.far.internal")]).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let pem = params.serialize_request(&key).unwrap().pem().unwrap();
    (key, pem)
}

/// What a joined blade holds.
#[derive(Clone)]
pub struct Credentials {
    pub certificate_pem: String,
    pub key_pem: String,
    pub ca_pem: String,
}

pub async fn client(cluster: &Cluster, credentials: Option<&Credentials>) -> BladesClient<Channel> {
    let ca = std::fs::read_to_string(cluster.ca_file()).unwrap();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca))
        .domain_name("controller.far.internal");
    let tls = match credentials {
        Some(own) => tls.identity(TlsIdentity::from_pem(&own.certificate_pem, &own.key_pem)),
        None => tls,
    };
    let endpoint = Endpoint::from_shared(format!("https://{}", cluster.address))
        .unwrap()
        .tls_config(tls)
        .unwrap();
    BladesClient::new(endpoint.connect_lazy())
}

/// Joins as `blade` with a request for `named`.
pub async fn join(cluster: &Cluster, token: &str, blade: &str, named: &str) -> Result<Credentials, Status> {
    let (key, csr_pem) = csr(named);
    let request = JoinRequest {
        token: token.to_owned(),
        blade: blade.to_owned(),
        csr_pem,
    };
    let JoinResponse {
        certificate_pem,
        ca_pem,
        ..
    } = client(cluster, None).await.join(request).await?.into_inner();
    Ok(Credentials {
        certificate_pem,
        key_pem: key.serialize_pem(),
        ca_pem,
    })
}

pub async fn renew(cluster: &Cluster, credentials: &Credentials, named: &str) -> Result<Credentials, Status> {
    let (key, csr_pem) = csr(named);
    let answer = client(cluster, Some(credentials))
        .await
        .renew(RenewRequest { csr_pem })
        .await?
        .into_inner();
    Ok(Credentials {
        certificate_pem: answer.certificate_pem,
        key_pem: key.serialize_pem(),
        ca_pem: answer.ca_pem,
    })
}

#[derive(Default)]
struct Ledger {
    seq: u64,
    agents: BTreeMap<(String, u32), AgentState>,
    specs: BTreeMap<(String, u32), AgentSpec>,
    /// Boots of each identity: more than one is the bug everything here is about.
    boots: BTreeMap<(String, u32), u32>,
    ensured: u32,
    claims: u32,
    forgotten: u32,
    deposed: u32,
    epoch: u64,
}

#[derive(Clone)]
pub struct Fake {
    ledger: Arc<Mutex<Ledger>>,
    events: broadcast::Sender<Event>,
    /// Cancelled when the blade dies: every connection ends.
    dead: CancellationToken,
    /// Refuse new attempts as full.
    pub full: Arc<AtomicBool>,
    /// Write an attempt down, then answer as a connection that was closed in the middle does.
    pub breaks_after_writing: Arc<AtomicBool>,
    /// Agents that wait to be claimed are warm at once.
    pub warms: Arc<AtomicBool>,
    /// ClaimAgent is not answered.
    pub fails_claims: Arc<AtomicBool>,
    /// A warm agent that is claimed just ended.
    pub loses_claims: Arc<AtomicBool>,
    /// Claim to know a newer controller.
    pub claims_newer_epoch: Arc<AtomicBool>,
    /// Every new attempt runs and completes by itself.
    pub completes_by_itself: Arc<AtomicBool>,
}

/// A running fake blade; dropping it is its death.
pub struct FakeBlade {
    pub name: String,
    pub fake: Fake,
    pub credentials: Credentials,
    serving: JoinHandle<()>,
    tasks: JoinSet<()>,
}

pub fn capacity(cpu_millis: u64, memory_mib: u64) -> NodeCapacity {
    NodeCapacity {
        cpu_millis,
        memory_mib,
        allocatable_cpu_millis: cpu_millis,
        allocatable_memory_mib: memory_mib,
        max_vms: 100,
        arch: "amd64".into(),
        boot_id: "boot".into(),
        ..NodeCapacity::default()
    }
}

impl FakeBlade {
    pub async fn start(cluster: &Cluster, name: &str, room: NodeCapacity) -> Self {
        let token = cluster.new_token(Some(name));
        let credentials = join(cluster, &token, name, name).await.unwrap();
        let fake = Fake {
            ledger: Arc::default(),
            events: broadcast::channel(1024).0,
            dead: CancellationToken::new(),
            full: Arc::default(),
            breaks_after_writing: Arc::default(),
            warms: Arc::default(),
            fails_claims: Arc::default(),
            loses_claims: Arc::default(),
            claims_newer_epoch: Arc::default(),
            completes_by_itself: Arc::default(),
        };
        Self::resume(cluster, name, room, credentials, fake).await
    }

    /// Serves with what an earlier life kept: ledger and certificate.
    pub async fn resume(
        cluster: &Cluster,
        name: &str,
        room: NodeCapacity,
        credentials: Credentials,
        mut fake: Fake,
    ) -> Self {
        fake.dead = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let tls = ServerTlsConfig::new()
            .identity(TlsIdentity::from_pem(
                &credentials.certificate_pem,
                &credentials.key_pem,
            ))
            .client_ca_root(Certificate::from_pem(&credentials.ca_pem));
        let router = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(NodeServer::new(fake.clone()));
        let mut tasks = JoinSet::new();
        let dead = fake.dead.clone();
        let serving = tokio::spawn(async move {
            router
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), dead.cancelled_owned())
                .await
                .unwrap()
        });
        let mut client = client(cluster, Some(&credentials)).await;
        tasks.spawn(async move {
            loop {
                let request = HeartbeatRequest {
                    endpoint: endpoint.clone(),
                    capacity: Some(room.clone()),
                    labels: Default::default(),
                };
                // While the controller is away there is nobody to tell.
                let _ = client.heartbeat(request).await;
                tokio::time::sleep(Duration::from_millis(HEARTBEAT_MS.load(Ordering::Relaxed))).await;
            }
        });
        let blade = Self {
            name: name.to_owned(),
            fake,
            credentials,
            serving,
            tasks,
        };
        cluster.wait_ready(name, "True").await;
        super::until("the controller to listen to the blade", async || {
            (blade.fake.watchers() > 0).then_some(())
        })
        .await;
        blade
    }

    /// Cannot be called any more, but goes on to send heartbeats.
    pub async fn stop_serving(&mut self) {
        self.fake.dead.cancel();
        (&mut self.serving).await.unwrap();
    }

    pub async fn die(mut self) -> (Credentials, Fake) {
        self.tasks.shutdown().await;
        self.fake.dead.cancel();
        self.serving.await.unwrap();
        (self.credentials.clone(), self.fake.clone())
    }
}

impl Fake {
    fn change(&self, key: &(String, u32), change: impl FnOnce(&mut AgentState)) -> Option<AgentState> {
        let mut ledger = self.ledger.lock().unwrap();
        ledger.seq += 1;
        let seq = ledger.seq;
        let state = ledger.agents.get_mut(key)?;
        if state.phase() == Phase::Ended {
            return Some(state.clone());
        }
        change(state);
        state.seq = seq;
        let state = state.clone();
        let _ = self.events.send(Event {
            seq,
            state: Some(state.clone()),
            replay_done: false,
        });
        Some(state)
    }

    fn key(&self, uid: &str) -> (String, u32) {
        let ledger = self.ledger.lock().unwrap();
        ledger
            .agents
            .keys()
            .rfind(|(one, _)| one == uid)
            .cloned()
            .unwrap_or((uid.to_owned(), 1))
    }

    pub fn running(&self, uid: &str) {
        self.change(&self.key(uid), |state| {
            state.set_phase(Phase::Running);
            state.image_digest = "sha256:feed".into();
            state.booted_at = Some(now());
            state.started_at = Some(now());
        });
    }

    pub fn ended(&self, uid: &str, reason: EndReason, exit_code: Option<i32>, message: &str) {
        self.change(&self.key(uid), |state| end(state, reason, exit_code, message));
    }

    /// The blade's state folder was replaced.
    pub fn lose_ledger(&self) {
        let mut ledger = self.ledger.lock().unwrap();
        ledger.agents.clear();
    }

    pub fn attempts(&self, uid: &str) -> Vec<u32> {
        let ledger = self.ledger.lock().unwrap();
        ledger
            .boots
            .keys()
            .filter(|(one, _)| one == uid)
            .map(|(_, attempt)| *attempt)
            .collect()
    }

    /// Attempts of the agent that have not ended.
    pub fn live(&self, uid: &str) -> Vec<u32> {
        let ledger = self.ledger.lock().unwrap();
        let of_this = ledger
            .agents
            .iter()
            .filter(|((one, _), state)| one == uid && state.phase() != Phase::Ended);
        of_this.map(|((_, attempt), _)| *attempt).collect()
    }

    pub fn most_boots(&self) -> u32 {
        self.ledger.lock().unwrap().boots.values().copied().max().unwrap_or(0)
    }

    pub fn ensured(&self) -> u32 {
        self.ledger.lock().unwrap().ensured
    }

    /// Warm attempts that were handed over.
    pub fn claims(&self) -> u32 {
        self.ledger.lock().unwrap().claims
    }

    pub fn forgotten(&self) -> u32 {
        self.ledger.lock().unwrap().forgotten
    }

    /// Calls that were told of a newer controller.
    pub fn deposed(&self) -> u32 {
        self.ledger.lock().unwrap().deposed
    }

    /// Event streams that are open.
    pub fn watchers(&self) -> usize {
        self.events.receiver_count()
    }

    /// Identities in the ledger.
    pub fn kept(&self) -> usize {
        self.ledger.lock().unwrap().agents.len()
    }

    /// An EnsureAgent that was under way for long arrives now.
    pub async fn late_ensure(&self, uid: &str, attempt: u32) -> Phase {
        let request = EnsureAgentRequest {
            epoch: self.epoch(),
            identity: Some(Identity {
                uid: uid.to_owned(),
                attempt,
                ..Identity::default()
            }),
            spec: Some(AgentSpec::default()),
        };
        let state = self.ensure_agent(Request::new(request)).await.unwrap();
        state.into_inner().phase()
    }

    pub fn epoch(&self) -> u64 {
        self.ledger.lock().unwrap().epoch
    }

    pub fn spec(&self, uid: &str) -> Option<AgentSpec> {
        let ledger = self.ledger.lock().unwrap();
        let mut specs = ledger.specs.iter();
        specs.rfind(|((one, _), _)| one == uid).map(|(_, spec)| spec.clone())
    }

    pub fn phase(&self, uid: &str) -> Option<Phase> {
        let key = self.key(uid);
        self.ledger.lock().unwrap().agents.get(&key).map(AgentState::phase)
    }

    fn check(&self, epoch: u64) -> Result<(), Status> {
        let mut ledger = self.ledger.lock().unwrap();
        if self.claims_newer_epoch.load(Ordering::SeqCst) {
            ledger.deposed += 1;
            return Err(Status::failed_precondition("another controller leads, says this fake"));
        }
        if epoch < ledger.epoch {
            return Err(Status::failed_precondition(format!(
                "epoch {epoch} is older than {}",
                ledger.epoch
            )));
        }
        ledger.epoch = epoch;
        Ok(())
    }
}

fn now() -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: 1_700_000_000,
        nanos: 0,
    }
}

fn end(state: &mut AgentState, reason: EndReason, exit_code: Option<i32>, message: &str) {
    state.set_phase(Phase::Ended);
    state.finished_at = Some(now());
    state.end = Some(End {
        reason: reason.into(),
        exit_code,
        signal: None,
        message: message.to_owned(),
        tail: "last words".into(),
    });
}

fn key_of(identity: Option<Identity>) -> Result<(Identity, (String, u32)), Status> {
    let identity = identity.ok_or_else(|| Status::invalid_argument("identity is missing"))?;
    let key = (identity.uid.clone(), identity.attempt);
    Ok((identity, key))
}

type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl Node for Fake {
    async fn ensure_agent(&self, request: Request<EnsureAgentRequest>) -> Result<Response<AgentState>, Status> {
        let request = request.into_inner();
        self.check(request.epoch)?;
        let (identity, key) = key_of(request.identity)?;
        let mut ledger = self.ledger.lock().unwrap();
        ledger.ensured += 1;
        let of_this = ledger.agents.iter().filter(|((uid, _), _)| *uid == key.0);
        let newer = of_this.clone().any(|((_, attempt), _)| *attempt > key.1);
        let runs = of_this
            .clone()
            .any(|((_, attempt), state)| *attempt < key.1 && state.phase() != Phase::Ended);
        if newer {
            return Err(Status::already_exists("a newer attempt is known"));
        }
        if runs {
            return Err(Status::resource_exhausted("an older attempt has not ended"));
        }
        if let Some(state) = ledger.agents.get(&key) {
            return Ok(Response::new(state.clone()));
        }
        if self.full.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("no room in this fake"));
        }
        let spec = request
            .spec
            .ok_or_else(|| Status::invalid_argument("spec is missing"))?;
        if spec.cpu_millis > 64_000 {
            return Err(Status::invalid_argument("spec.cpu: more than 64 cores"));
        }
        *ledger.boots.entry(key.clone()).or_default() += 1;
        let is_warm = spec.start_on_claim && self.warms.load(Ordering::SeqCst);
        ledger.specs.insert(key.clone(), spec);
        ledger.seq += 1;
        let mut state = AgentState {
            identity: Some(identity),
            seq: ledger.seq,
            ..AgentState::default()
        };
        state.set_phase(Phase::Accepted);
        if is_warm {
            state.set_phase(Phase::Warm);
            state.booted_at = Some(now());
        }
        ledger.agents.insert(key, state.clone());
        let _ = self.events.send(Event {
            seq: ledger.seq,
            state: Some(state.clone()),
            replay_done: false,
        });
        drop(ledger);
        if self.completes_by_itself.load(Ordering::SeqCst) {
            let (fake, uid) = (self.clone(), state.identity.clone().unwrap_or_default().uid);
            tokio::spawn(async move {
                fake.running(&uid);
                tokio::time::sleep(Duration::from_millis(500)).await;
                fake.ended(&uid, EndReason::Completed, Some(0), "");
            });
        }
        if self.breaks_after_writing.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("h2: ENHANCE_YOUR_CALM"));
        }
        Ok(Response::new(state))
    }

    async fn claim_agent(&self, request: Request<ClaimAgentRequest>) -> Result<Response<AgentState>, Status> {
        let request = request.into_inner();
        self.check(request.epoch)?;
        if self.fails_claims.load(Ordering::SeqCst) {
            return Err(Status::unavailable("nobody answers claims"));
        }
        let (_, warm) = key_of(request.warm)?;
        if self.loses_claims.load(Ordering::SeqCst) {
            self.change(&warm, |state| end(state, EndReason::InitLost, None, "gone"));
            return Err(Status::not_found("it just ended"));
        }
        let (identity, key) = key_of(request.identity)?;
        if let Some(state) = self.ledger.lock().unwrap().agents.get(&key) {
            return Ok(Response::new(state.clone()));
        }
        let spec = request
            .spec
            .ok_or_else(|| Status::invalid_argument("spec is missing"))?;
        let is_warm = |state: &AgentState| state.phase() == Phase::Warm;
        let was = self.ledger.lock().unwrap().agents.get(&warm).cloned().filter(is_warm);
        let Some(was) = was else {
            return Err(Status::not_found("no such warm agent in this fake"));
        };
        let mut state = AgentState {
            identity: Some(identity.clone()),
            ..was
        };
        state.set_phase(Phase::Starting);
        {
            let mut ledger = self.ledger.lock().unwrap();
            ledger.claims += 1;
            ledger.specs.insert(key.clone(), spec);
            ledger.agents.insert(key.clone(), state);
        }
        let message = format!("claimed by {}/{}", identity.namespace, identity.name);
        self.change(&warm, |state| end(state, EndReason::Evicted, None, &message));
        let state = self.change(&key, |_| {});
        if self.breaks_after_writing.load(Ordering::SeqCst) {
            return Err(Status::resource_exhausted("h2: ENHANCE_YOUR_CALM"));
        }
        Ok(Response::new(state.unwrap()))
    }

    async fn stop_agent(&self, request: Request<StopAgentRequest>) -> Result<Response<AgentState>, Status> {
        let request = request.into_inner();
        self.check(request.epoch)?;
        let reason = match request.reason() {
            EndReason::Unspecified => EndReason::Signal,
            reason => reason,
        };
        let (identity, key) = key_of(request.identity)?;
        let known = self.change(&key, |state| end(state, reason, None, "stopped"));
        let state = known.unwrap_or_else(|| {
            let mut state = AgentState {
                identity: Some(identity),
                ..AgentState::default()
            };
            end(&mut state, EndReason::Evicted, None, "never began");
            self.ledger.lock().unwrap().agents.insert(key, state.clone());
            state
        });
        Ok(Response::new(state))
    }

    async fn sleep_agent(&self, _: Request<SleepAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(Status::unimplemented("a fake blade saves no memory"))
    }

    async fn resurrect_agent(&self, _: Request<ResurrectAgentRequest>) -> Result<Response<AgentState>, Status> {
        Err(Status::unimplemented("a fake blade saves no memory"))
    }

    async fn forget_agent(
        &self,
        request: Request<ForgetAgentRequest>,
    ) -> Result<Response<ForgetAgentResponse>, Status> {
        let request = request.into_inner();
        self.check(request.epoch)?;
        let (_, key) = key_of(request.identity)?;
        let mut ledger = self.ledger.lock().unwrap();
        if ledger
            .agents
            .get(&key)
            .is_some_and(|state| state.phase() != Phase::Ended)
        {
            return Err(Status::failed_precondition("still running"));
        }
        // An unknown attempt is success and no news: two passes over one agent may both ask.
        if ledger.agents.remove(&key).is_some() {
            ledger.forgotten += 1;
        }
        Ok(Response::new(ForgetAgentResponse {}))
    }

    async fn list_agents(&self, _: Request<ListAgentsRequest>) -> Result<Response<ListAgentsResponse>, Status> {
        let ledger = self.ledger.lock().unwrap();
        let agents = ledger.agents.values().cloned().collect();
        Ok(Response::new(ListAgentsResponse {
            agents,
            seq: ledger.seq,
            boot_id: "boot".into(),
        }))
    }

    type WatchEventsStream = Flow<Event>;

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Result<Response<Flow<Event>>, Status> {
        self.check(request.into_inner().epoch)?;
        let ledger = self.ledger.lock().unwrap();
        let live = BroadcastStream::new(self.events.subscribe());
        let mut replay: Vec<Result<Event, Status>> = ledger
            .agents
            .values()
            .map(|state| {
                Ok(Event {
                    seq: state.seq,
                    state: Some(state.clone()),
                    replay_done: false,
                })
            })
            .collect();
        replay.push(Ok(Event {
            seq: ledger.seq,
            state: None,
            replay_done: true,
        }));
        let live = live
            .map(|event| event.map_err(|_| Status::data_loss("too slow")))
            .take_until(self.dead.clone().cancelled_owned());
        Ok(Response::new(Box::pin(tokio_stream::iter(replay).chain(live))))
    }

    type LogsStream = Flow<LogChunk>;

    async fn logs(&self, _: Request<LogsRequest>) -> Result<Response<Flow<LogChunk>>, Status> {
        Err(Status::unimplemented("a fake blade keeps no logs"))
    }

    async fn capacity(&self, _: Request<CapacityRequest>) -> Result<Response<NodeCapacity>, Status> {
        Err(Status::unimplemented("told by heartbeat"))
    }

    async fn load_image(&self, _: Request<Streaming<LoadImageRequest>>) -> Result<Response<Image>, Status> {
        Err(Status::unimplemented("Unix socket only"))
    }

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Result<Response<ListImagesResponse>, Status> {
        Err(Status::unimplemented("a fake blade keeps no images"))
    }

    async fn remove_image(&self, _: Request<RemoveImageRequest>) -> Result<Response<RemoveImageResponse>, Status> {
        Err(Status::unimplemented("Unix socket only"))
    }
}
