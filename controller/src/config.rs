//! What the controller is told, checked once.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use far_core::placement::Packing;

/// Options of `far-controller run`.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// kubeconfig of the Kubernetes API; default: KUBECONFIG, ~/.kube/config or the Pod's own account.
    #[arg(long, env = "FAR_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Folder for the CA's key, join tokens and this controller's identity; made with mode 0700.
    #[arg(long, env = "FAR_CONTROLLER_STATE")]
    pub state_dir: PathBuf,
    /// Where blades reach the controller; port 0 lets the kernel choose.
    #[arg(long, env = "FAR_CONTROLLER_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Further names or addresses in the server's certificate, besides controller.far.internal and localhost.
    #[arg(long, value_delimiter = ',')]
    pub server_name: Vec<String>,
    /// Where users reach the gateway (far exec, logs, cp, port-forward, top); without, there is none.
    #[arg(long, env = "FAR_GATEWAY_LISTEN")]
    pub gateway_listen: Option<SocketAddr>,
    /// Host and port that users are told in ConfigMap far-gateway; default: the bound address.
    #[arg(long, env = "FAR_GATEWAY_ADVERTISE", value_parser = endpoint)]
    pub gateway_advertise: Option<String>,
    /// Take only tokens that are for this audience; may be given more than once. Default: tokens for the Kubernetes API itself.
    #[arg(long, value_name = "AUDIENCE")]
    pub gateway_audience: Vec<String>,
    /// Serve Prometheus metrics here, at /metrics; without, they are not served.
    #[arg(long, env = "FAR_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// Serve /healthz and /readyz here; without, they are not served.
    #[arg(long, env = "FAR_HEALTH_LISTEN")]
    pub health_listen: Option<SocketAddr>,
    /// Written with the bound address (host:port) once the blade API serves.
    #[arg(long)]
    pub ready_file: Option<PathBuf>,
    /// Keep the CA, join tokens and revocations in Secret far-system/far-controller-state too, for other replicas.
    #[arg(long)]
    pub share_state: bool,
    /// Install or update the namespaces and CRDs at start.
    #[arg(long)]
    pub install_crds: bool,
    /// Keep a fresh one-use join token in this file (0600) while the controller runs.
    #[arg(long)]
    pub issue_join_token_file: Option<PathBuf>,
    /// The token in that file is for this blade only; without, it lets any new blade in, but replaces none.
    #[arg(long, requires = "issue_join_token_file")]
    pub join_token_blade: Option<String>,
    /// Write the CA's certificate (PEM) to this file.
    #[arg(long)]
    pub ca_out: Option<PathBuf>,
    /// How often blades are asked to send heartbeats, milliseconds, 100 to 60000.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(100..=60_000))]
    pub heartbeat_ms: u32,
    /// Seconds without a heartbeat after which a blade is not ready, and its agents are Unknown.
    #[arg(long, default_value = "40", value_parser = seconds)]
    pub node_lost_after: Duration,
    /// Seconds without an answer to its heartbeats after which a blade ends its agents by itself. Only then, and a margin
    /// later, the controller fails them or starts them elsewhere, or lets go of deleted ones unconfirmed.
    #[arg(long, default_value = "600", value_parser = seconds)]
    pub fence_after: Duration,
    /// Seconds after the fence time for the blade to end its agents, and for clocks that run apart.
    #[arg(long, default_value = "15", value_parser = seconds, hide = true)]
    pub fence_margin: Duration,
    /// Seconds from the first failure of an agent until its next attempt; doubles up to 30 times as long.
    #[arg(long, default_value = "10", value_parser = seconds, hide = true)]
    pub retry_after: Duration,
    /// Seconds between two looks for attempts on a blade that no agent owns any more.
    #[arg(long, default_value = "60", value_parser = seconds)]
    pub sweep_every: Duration,
    /// Life of blades' certificates in seconds, 60 to 2592000; blades renew at half of it.
    #[arg(long, default_value = "86400", value_parser = seconds)]
    pub certificate_life: Duration,
    /// Seconds until another controller may take over from one that is not heard of.
    #[arg(long, default_value = "15", value_parser = seconds)]
    pub lease_duration: Duration,
    /// Seconds between the first and the second try of a FarTask; doubled with each further one, at most 360.
    #[arg(long, default_value = "10", value_parser = seconds)]
    pub task_backoff: Duration,
    /// Agents worked on at the same time, beside those that wait for their turn to write.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub concurrency: u16,
    /// Which of the blades that will do is better: spread (the emptiest) or binpack (the fullest).
    #[arg(long, env = "FAR_PACKING", default_value = "spread", value_parser = packing)]
    pub packing: Packing,
    /// Decides ties between equal blades; default: random.
    #[arg(long)]
    pub seed: Option<u64>,
}

impl Config {
    /// The defaults of the command line, for tests and other programs.
    #[must_use]
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            kubeconfig: None,
            state_dir: state_dir.into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            server_name: Vec::new(),
            gateway_listen: None,
            gateway_advertise: None,
            gateway_audience: Vec::new(),
            metrics_listen: None,
            health_listen: None,
            ready_file: None,
            share_state: false,
            install_crds: false,
            issue_join_token_file: None,
            join_token_blade: None,
            ca_out: None,
            heartbeat_ms: 5_000,
            node_lost_after: Duration::from_secs(40),
            fence_after: Duration::from_secs(600),
            fence_margin: Duration::from_secs(15),
            retry_after: Duration::from_secs(10),
            sweep_every: Duration::from_secs(60),
            certificate_life: Duration::from_secs(86_400),
            lease_duration: Duration::from_secs(15),
            task_backoff: Duration::from_secs(10),
            concurrency: 128,
            packing: Packing::Spread,
            seed: None,
        }
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    let is_endpoint = text
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
    if is_endpoint && !text.contains('/') {
        Ok(text.to_owned())
    } else {
        Err("HOST:PORT is needed".to_owned())
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=31_536_000.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        Ok(_) | Err(_) => Err("a number of seconds from 0.1 to 31536000 is needed".to_owned()),
    }
}

fn packing(text: &str) -> Result<Packing, String> {
    match text {
        "spread" => Ok(Packing::Spread),
        "binpack" => Ok(Packing::Binpack),
        _ => Err("spread or binpack is needed".to_owned()),
    }
}
