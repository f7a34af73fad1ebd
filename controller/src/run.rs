//! Puts the parts together: lead, list, serve, and end in order.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use far_proto::controller::blades_server::BladesServer;
use kube::{
    Client,
    client::{Body, ClientBuilder},
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{net::TcpListener, sync::Mutex, task::JoinSet, time::MissedTickBehavior};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::transport::Server;
use tower::util::MapRequestLayer;

use crate::{
    Config, agents,
    blades::BladeApi,
    ca::Ca,
    door, events, files, gateway, install,
    leader::{Doubts, Elector, Holder, Lead},
    links::{Credentials, Links},
    metrics::Metrics,
    nodes::Nodes,
    pace::Pace,
    pages::{Pages, Told, Works},
    pools::Pools,
    reconcile::Context,
    registry::Registry,
    shared::{self, Shared},
    tasks::Tasks,
    tokens::{self, Revocations, Tokens},
    turns::Turns,
    watching,
    world::World,
};

/// What still runs this long after the order to end is dropped.
const DRAIN: Duration = Duration::from_secs(10);

/// Between two looks whether somebody who waits for a blade has waited long enough to be tried again.
const PLACEMENT_TICK: Duration = Duration::from_secs(1);
/// Connections of blades, which have a certificate.
const MAX_BLADE_CONNECTIONS: usize = 20_000;
/// Of one blade: it uses one, and those it lost are noticed within a minute.
const MAX_CONNECTIONS_PER_BLADE: usize = 8;

/// Between two looks whether the join token in the file still works.
const TOKEN_LOOK: Duration = Duration::from_secs(2);

/// A controller that leads and serves.
#[derive(Debug)]
pub struct Running {
    /// Where blades reach it.
    pub address: SocketAddr,
    /// Where users reach its gateway.
    pub gateway: Option<SocketAddr>,
    /// Where its metrics are.
    pub metrics: Option<SocketAddr>,
    /// Where its health is told.
    pub health: Option<SocketAddr>,
    /// Its leader epoch.
    pub epoch: u64,
    shutdown: CancellationToken,
    lost: CancellationToken,
    elector: AbortOnDropHandle<()>,
    /// Lets the elector give the lead back.
    give_back: CancellationToken,
    tasks: JoinSet<Result<()>>,
    shared: Option<(Arc<Mutex<Shared>>, Arc<Doubts>)>,
    token: Option<Keeper>,
    _pages: Pages,
    _holder: Holder,
}

#[derive(Debug)]
struct Keeper {
    tokens: Tokens,
    blade: Option<String>,
    current: Arc<std::sync::Mutex<String>>,
}

/// Connects, waits for the lead, and starts everything. `shutdown` ends the waiting and, later, the controller.
///
/// # Errors
/// What cannot be read, written, reached or bound.
pub async fn start(config: Config, shutdown: CancellationToken) -> Result<Running> {
    let holder = Holder::claim(&config.state_dir)?;
    let told = Told::default();
    let pages = Pages::start(&config, &told).await?;
    let client = connect(&config).await?;
    if config.install_crds {
        install::namespaces(&client).await?;
        install::crds(&client).await?;
    }
    let elector = Elector::new(client.clone(), &holder, config.lease_duration);
    let lead = tokio::select! {
        lead = elector.lead() => lead,
        () = shutdown.cancelled() => bail!("told to end before this controller led"),
    };
    holder.keep_epoch(lead.epoch)?;
    tracing::info!(epoch = lead.epoch, "this controller leads");
    told.metrics.leads(lead.epoch);
    let give_back = CancellationToken::new();
    let elector = {
        let (lead, give_back) = (lead.clone(), give_back.clone());
        AbortOnDropHandle::new(tokio::spawn(async move { elector.keep(&lead, give_back).await }))
    };
    let doubts = Arc::new(Doubts::new(client.clone(), &holder, &lead));
    // Ends the parts: told to end, or the lead is lost.
    let stop = shutdown.child_token();
    let mut tasks = JoinSet::new();
    let shared = match config.share_state {
        true => Some(Shared::take_over(client.clone(), &config.state_dir).await?),
        false => None,
    };
    let ca = Arc::new(Ca::load_or_make(&config.state_dir.join("ca"))?);
    let shared = match shared {
        Some(mut shared) => {
            // Before any blade trusts the CA.
            shared.keep(&doubts).await?;
            let shared = Arc::new(Mutex::new(shared));
            let following = shared::follow(shared.clone(), doubts.clone(), stop.clone());
            tasks.spawn(async move {
                following.await;
                Ok(())
            });
            Some((shared, doubts.clone()))
        }
        None => None,
    };
    let registry = Arc::new(Registry::new(client.clone(), config.node_lost_after));
    let world = Arc::new(World::new(
        config.seed.unwrap_or_else(rand::random),
        config.packing,
        config.node_lost_after,
        config.fence_after + config.fence_margin,
    ));
    let address = serve(&config, &ca, &registry, &world, &told.metrics, &lead, &stop, &mut tasks).await?;
    let works = work(
        &config,
        client.clone(),
        &ca,
        &registry,
        &world,
        &doubts,
        &lead,
        &stop,
        &mut tasks,
    )?;
    let gateway = gateway::start(&config, client, &ca, world, told.metrics.clone(), &stop, &mut tasks).await?;
    told.works(works);
    let token = match config.issue_join_token_file.clone() {
        Some(path) => {
            let keeper = Keeper {
                tokens: Tokens::new(&config.state_dir),
                blade: config.join_token_blade.clone(),
                current: Arc::default(),
            };
            issue(&keeper, &path)?;
            let (again, stop) = (
                Keeper {
                    tokens: keeper.tokens.clone(),
                    blade: keeper.blade.clone(),
                    current: keeper.current.clone(),
                },
                stop.clone(),
            );
            tasks.spawn(async move { reissue(again, path, stop).await });
            Some(keeper)
        }
        None => None,
    };
    if let Some(path) = &config.ca_out {
        files::write_private(path, ca.certificate_pem().as_bytes())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &config.ready_file {
        files::write_private(path, format!("{address}\n").as_bytes())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    tracing::info!(%address, "the blade API serves");
    Ok(Running {
        address,
        gateway,
        metrics: pages.metrics,
        health: pages.health,
        epoch: lead.epoch,
        shutdown: stop,
        lost: lead.lost,
        elector,
        give_back,
        tasks,
        shared,
        token,
        _pages: pages,
        _holder: holder,
    })
}

impl Running {
    /// Waits until the controller ends: told to, or because its lead or a part was lost, which is an error.
    ///
    /// # Errors
    /// The lead was lost, or a part failed: the caller starts anew.
    pub async fn wait(mut self) -> Result<()> {
        let outcome = tokio::select! {
            () = self.shutdown.cancelled() => Ok(()),
            () = self.lost.cancelled() => Err(anyhow::anyhow!("this controller leads no more")),
            Some(ended) = self.tasks.join_next() => match ended {
                Ok(Ok(())) if self.shutdown.is_cancelled() => Ok(()),
                Ok(Ok(())) => Err(anyhow::anyhow!("a part of the controller ended by itself")),
                Ok(Err(error)) => Err(error),
                Err(error) => Err(error).context("a part of the controller failed"),
            },
        };
        self.shutdown.cancel();
        let drained = tokio::time::timeout(DRAIN, async { while self.tasks.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            tracing::warn!("parts of the controller did not end in time");
            self.tasks.abort_all();
        }
        if let Some(keeper) = &self.token {
            keeper
                .tokens
                .withdraw(&keeper.current.lock().map(|token| token.clone()).unwrap_or_default());
        }
        if let Some((shared, doubts)) = &self.shared
            && !self.lost.is_cancelled()
        {
            // The last word, while this controller still leads: its successor reads it.
            let kept = tokio::time::timeout(DRAIN, async { shared.lock().await.keep(doubts).await }).await;
            if let Err(error) = kept.map_err(anyhow::Error::from).and_then(|kept| kept) {
                tracing::warn!(error = %format!("{error:#}"), "the state that replicas share was not written");
            }
        }
        // Given back only now: nothing of this controller acts any more. Aborted: it was lost or its end is an error.
        match outcome {
            Ok(()) => self.give_back.cancel(),
            Err(_) => self.elector.abort(),
        }
        let _ = tokio::time::timeout(DRAIN, self.elector).await;
        outcome
    }
}

async fn connect(config: &Config) -> Result<Client> {
    let kube_config = match &config.kubeconfig {
        Some(path) => {
            let kubeconfig =
                Kubeconfig::read_from(path).with_context(|| format!("reading --kubeconfig {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .context("reading the kubeconfig")?
        }
        None => kube::Config::infer()
            .await
            .context("no kubeconfig was given, and none was found")?,
    };
    let client = ClientBuilder::try_from(kube_config).context("preparing the Kubernetes client")?;
    Ok(client
        .with_layer(&MapRequestLayer::new(watching::consistently::<Body>))
        .build())
}

#[allow(clippy::too_many_arguments)] // Each is a part that exists once.
async fn serve(
    config: &Config,
    ca: &Arc<Ca>,
    registry: &Arc<Registry>,
    world: &Arc<World>,
    metrics: &Metrics,
    lead: &Lead,
    stop: &CancellationToken,
    tasks: &mut JoinSet<Result<()>>,
) -> Result<SocketAddr> {
    let own = ca.own_identity(&config.server_name)?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("binding --listen {}", config.listen))?;
    let address = listener.local_addr().context("reading the bound address")?;
    let tls = door::tls(&own, Some(ca.certificate_pem())).context("preparing the blade API's TLS")?;
    let (accepting, visitors) = door::open(listener, tls, MAX_BLADE_CONNECTIONS, MAX_CONNECTIONS_PER_BLADE);
    let api = BladeApi {
        ca: ca.clone(),
        tokens: Tokens::new(&config.state_dir),
        signing: std::sync::Mutex::default(),
        revocations: Revocations::new(&config.state_dir),
        registry: registry.clone(),
        metrics: metrics.clone(),
        certificate_life: config.certificate_life,
        heartbeat_ms: config.heartbeat_ms,
        lead: lead.clone(),
        world: world.clone(),
        fence_after: config.fence_after,
    };
    let mut server = Server::builder()
        .concurrency_limit_per_connection(16)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .timeout(Duration::from_secs(30));
    let router = server.add_service(BladesServer::new(api).max_decoding_message_size(1024 * 1024));
    let stopped = stop.clone().cancelled_owned();
    tasks.spawn(async move {
        tokio::select! {
            served = router.serve_with_incoming_shutdown(visitors, stopped) => served.context("serving the blade API"),
            never = accepting => match never {},
        }
    });
    Ok(address)
}

#[allow(clippy::too_many_arguments)] // Each is a part that exists once.
fn work(
    config: &Config,
    client: Client,
    ca: &Arc<Ca>,
    registry: &Arc<Registry>,
    world: &Arc<World>,
    doubts: &Arc<Doubts>,
    lead: &Lead,
    stop: &CancellationToken,
    tasks: &mut JoinSet<Result<()>>,
) -> Result<Works> {
    let (agents_known, nodes_known) = (CancellationToken::new(), CancellationToken::new());
    let own = ca.own_identity(&[])?;
    let credentials = Arc::new(Credentials {
        ca_pem: ca.certificate_pem().to_owned(),
        certificate_pem: own.certificate_pem,
        key_pem: own.key_pem,
    });
    let turns = Arc::<Turns>::default();
    let (events, writer) = events::events(client.clone(), turns.clone());
    let events = Arc::new(events);
    tasks.spawn({
        let stop = stop.clone();
        async move {
            writer.run(stop).await;
            Ok(())
        }
    });
    let links = Links {
        world: world.clone(),
        credentials,
        epoch: lead.epoch,
        doubts: doubts.clone(),
        revocations: Revocations::new(&config.state_dir),
        events: events.clone(),
        agents_known: agents_known.clone(),
        sweep_every: config.sweep_every,
    };
    let nodes = Nodes {
        client: client.clone(),
        world: world.clone(),
        registry: registry.clone(),
        links,
        known: nodes_known.clone(),
    };
    let stopped = stop.clone();
    tasks.spawn(async move {
        nodes.run(stopped).await;
        Ok(())
    });
    let (watching, stopped) = (registry.clone(), stop.clone());
    tasks.spawn(async move {
        watching.watch_over(stopped).await;
        Ok(())
    });
    let (waiting, stopped) = (world.clone(), stop.clone());
    tasks.spawn(async move {
        let mut every = tokio::time::interval(PLACEMENT_TICK);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stopped.run_until_cancelled(every.tick()).await.is_some() {
            waiting.tick();
        }
        Ok(())
    });
    let context = Arc::new(Context {
        client: client.clone(),
        world: world.clone(),
        events,
        epoch: lead.epoch,
        deposed: lead.lost.clone(),
        doubts: doubts.clone(),
        agents_known: agents_known.clone(),
        nodes_known: nodes_known.clone(),
        first_delay: config.retry_after,
        pace: Pace::default(),
        turns,
    });
    let works = Works {
        world: world.clone(),
        agents_known: agents_known.clone(),
        nodes_known,
        stop: stop.clone(),
    };
    let pools = Pools {
        client: client.clone(),
        world: world.clone(),
        deposed: lead.lost.clone(),
        agents_known: agents_known.clone(),
    };
    let stopped = stop.clone();
    tasks.spawn(async move {
        pools.run(stopped).await;
        Ok(())
    });
    let queues = Tasks {
        client: client.clone(),
        world: world.clone(),
        backoff: config.task_backoff,
        deposed: lead.lost.clone(),
        agents_known: agents_known.clone(),
    };
    let stopped = stop.clone();
    tasks.spawn(async move {
        queues.run(stopped).await;
        Ok(())
    });
    let (concurrency, stopped, world) = (config.concurrency, stop.clone(), world.clone());
    tasks.spawn(async move {
        agents::run(client, world, context, agents_known, concurrency, stopped).await;
        Ok(())
    });
    Ok(works)
}

fn issue(keeper: &Keeper, path: &std::path::Path) -> Result<()> {
    let token = keeper
        .tokens
        .create(keeper.blade.as_deref(), tokens::MAX_LIFE)
        .context("making a join token")?;
    files::write_private(path, token.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
    let before = keeper
        .current
        .lock()
        .map(|mut current| std::mem::replace(&mut *current, token))
        .unwrap_or_default();
    if !before.is_empty() {
        keeper.tokens.withdraw(&before);
    }
    Ok(())
}

/// A token lives for an hour at most and works once; a blade may need one at any time. Asked by the clock that tokens end
/// by: a machine that slept has other ideas of how long it waited.
async fn reissue(keeper: Keeper, path: std::path::PathBuf, stop: CancellationToken) -> Result<()> {
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(TOKEN_LOOK) => {}
        }
        let current = keeper.current.lock().map(|token| token.clone()).unwrap_or_default();
        let left = keeper.tokens.left(&current);
        if left.is_some_and(|left| left >= tokens::MAX_LIFE / 2) {
            continue;
        }
        if let Err(error) = issue(&keeper, &path) {
            tracing::warn!(error = %format!("{error:#}"), "the join token was not made anew");
        }
    }
}
