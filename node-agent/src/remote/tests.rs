//! The remote side against a controller in this process: a CA, the blade API, and callers of all kinds.

use super::*;
use crate::{stories::doubles::World, supervisor::Room};
use far_proto::{
    controller::{
        HeartbeatResponse, JoinResponse, RenewResponse,
        blades_server::{Blades, BladesServer},
    },
    node::{EnsureAgentRequest, ListAgentsRequest, LoadImageRequest, node_client::NodeClient},
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};
use std::sync::Mutex;
use tonic::{Code, Response, Status, transport::ServerTlsConfig};

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Arc<Self> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Arc::new(Self(
            CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap(),
        ))
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// Certificate and key with this name.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// Answers a request with a certificate that lives `seconds`.
    fn sign(&self, csr_pem: &str, seconds: i64) -> String {
        let mut csr = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        let now = time::OffsetDateTime::now_utc();
        csr.params.not_before = now;
        csr.params.not_after = now + time::Duration::seconds(seconds);
        csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        csr.signed_by(&self.0).unwrap().pem()
    }
}

#[derive(Default)]
struct Seen {
    joins: u32,
    renewals: u32,
    heartbeats: Vec<HeartbeatRequest>,
}

#[derive(Clone)]
struct Controller {
    ca: Arc<Ca>,
    seen: Arc<Mutex<Seen>>,
    certificate_life_s: i64,
}

#[tonic::async_trait]
impl Blades for Controller {
    async fn join(&self, request: tonic::Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let request = request.into_inner();
        let mut seen = self.seen.lock().unwrap();
        if request.token != "far-join-good" || seen.joins > 0 {
            return Err(Status::unauthenticated("unknown, used or expired token"));
        }
        seen.joins += 1;
        let certificate_pem = self.ca.sign(&request.csr_pem, self.certificate_life_s);
        Ok(Response::new(JoinResponse {
            certificate_pem,
            ca_pem: self.ca.pem(),
            not_after: None,
        }))
    }

    async fn renew(&self, request: tonic::Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let certificate_pem = self.ca.sign(&request.into_inner().csr_pem, self.certificate_life_s);
        self.seen.lock().unwrap().renewals += 1;
        Ok(Response::new(RenewResponse {
            certificate_pem,
            ca_pem: self.ca.pem(),
            not_after: None,
        }))
    }

    async fn heartbeat(
        &self,
        request: tonic::Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatResponse>, Status> {
        if request.peer_certs().is_none_or(|certificates| certificates.is_empty()) {
            return Err(Status::unauthenticated("no certificate"));
        }
        self.seen.lock().unwrap().heartbeats.push(request.into_inner());
        Ok(Response::new(HeartbeatResponse {
            interval_ms: 100,
            epoch: 7,
            fence_after_ms: 0,
            unreached: false,
        }))
    }
}

struct Setup {
    world: World,
    controller: Controller,
    url: String,
    _serving: JoinSet<()>,
}

impl Setup {
    async fn new(certificate_life_s: i64) -> Self {
        let ca = Ca::new();
        let controller = Controller {
            ca: ca.clone(),
            seen: Arc::default(),
            certificate_life_s,
        };
        let (certificate, key) = ca.issue(CONTROLLER_NAME);
        let tls = ServerTlsConfig::new()
            .identity(tonic::transport::Identity::from_pem(certificate, key))
            .client_ca_root(Certificate::from_pem(ca.pem()))
            .client_auth_optional(true);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(BladesServer::new(controller.clone()))
            .serve_with_incoming(incoming);
        let mut serving = JoinSet::new();
        serving.spawn(async move { server.await.unwrap() });
        let world = World::new();
        std::fs::write(world.dir.path().join("ca.pem"), ca.pem()).unwrap();
        std::fs::write(world.dir.path().join("token"), "far-join-good\n").unwrap();
        Self {
            world,
            controller,
            url,
            _serving: serving,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.world.dir.path().join(name)
    }

    /// Starts a blade; answers its address and what ends it.
    async fn blade(&self, tasks: &mut JoinSet<()>) -> (String, CancellationToken) {
        let node = self.world.start().await;
        let shutdown = node.blade.shutdown.clone();
        let room = Room {
            cpu_millis: 1000,
            memory_mib: 1000,
            max_vms: 1,
        };
        let machine = Arc::new(Machine {
            cpu_millis: 2000,
            memory_mib: 2000,
            room,
            kernel_version: "1".into(),
            boot_id: "b".into(),
            host: crate::host::HostFacts::default(),
            extended: Default::default(),
        });
        let epochs = Arc::new(EpochGuard::open(&self.at("epoch")).unwrap());
        let api = NodeApi::new(
            node.supervisor.clone(),
            machine.clone(),
            epochs.clone(),
            Origin::Controller,
        );
        let config = ControllerConfig {
            url: self.url.clone(),
            ca_file: self.at("ca.pem"),
            token_file: Some(self.at("token")),
            listen: "127.0.0.1:0".parse().unwrap(),
            advertise: None,
            labels: [("zone".to_owned(), "a".to_owned())].into(),
        };
        let remote = Remote::bind("blade-1", self.world.dir.path(), config, api)
            .await
            .unwrap();
        let address = remote.address();
        let blade = node.blade.clone();
        let token = shutdown.clone();
        tasks.spawn(async move {
            let _node = node;
            remote.run(machine, epochs, blade, token).await.unwrap();
        });
        (address, shutdown)
    }

    async fn until(&self, claim: impl Fn(&Seen) -> bool) {
        let wait = async {
            while !claim(&self.controller.seen.lock().unwrap()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(60), wait)
            .await
            .expect("the controller never saw it");
    }

    async fn call_as(&self, address: &str, identity: Option<(String, String)>) -> Result<NodeClient<Channel>, String> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.controller.ca.pem()))
            .domain_name("blade-1.blade.far.internal");
        let tls = match identity {
            Some((certificate, key)) => tls.identity(tonic::transport::Identity::from_pem(certificate, key)),
            None => tls,
        };
        let channel = Endpoint::from_shared(format!("https://{address}"))
            .unwrap()
            .tls_config(tls)
            .unwrap();
        let channel = channel.connect().await.map_err(|error| error.to_string())?;
        let mut client = NodeClient::new(channel);
        client
            .list_agents(ListAgentsRequest {})
            .await
            .map_err(|status| status.to_string())?;
        Ok(client)
    }
}

#[tokio::test]
async fn a_blade_joins_once_serves_only_its_controller_and_comes_back_without_a_token() {
    let setup = Setup::new(3600).await;
    let mut tasks = JoinSet::new();
    let (address, shutdown) = setup.blade(&mut tasks).await;
    setup.until(|seen| seen.heartbeats.len() > 2).await;
    let heartbeat = setup.controller.seen.lock().unwrap().heartbeats[0].clone();
    assert_eq!(
        (heartbeat.endpoint.as_str(), heartbeat.labels["zone"].as_str()),
        (address.as_str(), "a")
    );
    assert_eq!(heartbeat.capacity.unwrap().allocatable_memory_mib, 1000);
    assert!(!setup.at("token").exists());
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(
        std::fs::metadata(setup.at("identity.json"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o600
    );

    let ca = &setup.controller.ca;
    let mut client = setup.call_as(&address, Some(ca.issue(CONTROLLER_NAME))).await.unwrap();
    let stranger = Ca::new();
    for (who, identity) in [
        ("nobody", None),
        ("another blade", Some(ca.issue("blade-2.blade.far.internal"))),
        (
            "a name below the controller's",
            Some(ca.issue("x.controller.far.internal")),
        ),
        ("another CA", Some(stranger.issue(CONTROLLER_NAME))),
    ] {
        assert!(setup.call_as(&address, identity).await.is_err(), "{who}");
    }

    // The heartbeat's answer said epoch 7.
    let old = client
        .ensure_agent(EnsureAgentRequest {
            epoch: 6,
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(old.code(), Code::FailedPrecondition);
    let zero = client.ensure_agent(EnsureAgentRequest::default()).await.unwrap_err();
    assert_eq!(zero.code(), Code::FailedPrecondition);
    let empty = client
        .ensure_agent(EnsureAgentRequest {
            epoch: 7,
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(
        (empty.code(), empty.message()),
        (Code::InvalidArgument, "identity: is missing")
    );
    let load = client
        .load_image(tokio_stream::iter([LoadImageRequest::default()]))
        .await
        .unwrap_err();
    assert_eq!(load.code(), Code::PermissionDenied);

    shutdown.cancel();
    while tasks.join_next().await.is_some() {}
    let before = setup.controller.seen.lock().unwrap().heartbeats.len();
    let _again = setup.blade(&mut tasks).await;
    setup.until(|seen| seen.heartbeats.len() > before).await;
    assert_eq!(setup.controller.seen.lock().unwrap().joins, 1);
}

#[tokio::test]
async fn a_certificate_is_renewed_at_half_its_life_and_used_at_once() {
    let setup = Setup::new(6).await;
    let mut tasks = JoinSet::new();
    let (address, _shutdown) = setup.blade(&mut tasks).await;
    setup.until(|seen| seen.renewals >= 2).await;
    setup
        .call_as(&address, Some(setup.controller.ca.issue(CONTROLLER_NAME)))
        .await
        .unwrap();
    let kept = IdentityFile::new(setup.at("identity.json")).load().unwrap().unwrap();
    assert!(kept.not_after > SystemTime::now());
}

#[tokio::test]
async fn renewing_drops_nothing_that_is_open() {
    use futures::FutureExt;
    let setup = Setup::new(6).await;
    let mut tasks = JoinSet::new();
    let (address, _shutdown) = setup.blade(&mut tasks).await;
    setup.until(|seen| !seen.heartbeats.is_empty()).await;
    let identity = setup.controller.ca.issue(CONTROLLER_NAME);
    let mut client = setup.call_as(&address, Some(identity)).await.unwrap();
    let request = far_proto::node::WatchEventsRequest { epoch: 7, from_seq: 0 };
    let mut events = client.watch_events(request).await.unwrap().into_inner();
    assert!(events.message().await.unwrap().unwrap().replay_done);
    setup.until(|seen| seen.renewals >= 2).await;
    assert!(events.message().now_or_never().is_none(), "the stream goes on");
}

#[tokio::test]
async fn a_certificate_for_another_key_is_not_taken() {
    let ca = Ca::new();
    let other = Request::new("blade-1").unwrap();
    let own = Request::new("blade-1").unwrap();
    let certificate = ca.sign(&other.csr_pem, 60);
    assert!(
        own.answered(certificate, ca.pem())
            .unwrap_err()
            .to_string()
            .contains("another key")
    );
}

#[test]
fn waits_grow_to_a_bound() {
    for failures in 0..40 {
        let wait = backoff(failures);
        assert!(wait >= BACKOFF.0 / 2 && wait <= BACKOFF.1);
    }
    assert!(backoff(30) >= BACKOFF.1 / 2);
}
