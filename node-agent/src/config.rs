//! far-node's options: raw arguments become a checked [`Config`] once, at start.

use crate::names::{is_dns_label, to_dns_label};
use clap::Parser;
use far_vmm::additions::Backend;
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

/// Node agent of a blade: runs agents in microVMs.
///
/// Without --controller it serves only its Unix socket. SIGTERM ends far-node and leaves its microVMs running: the next
/// far-node with the same folders adopts them.
#[derive(Debug, Parser)]
#[command(name = "far-node", version)]
pub struct Args {
    /// Folder of ledger, images, logs and identity [default: $FAR_STATE/node, else ~/.local/state/far/node]
    #[arg(long, env = "FAR_NODE_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Folder of node.sock and the VMs' sockets; short [default: $FAR_RUN, else $XDG_RUNTIME_DIR/far, else /tmp/far-<uid>]
    #[arg(long, env = "FAR_RUN", value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Folder with vmlinux and initramfs.cpio [default: $FAR_CACHE/guest, else ~/.cache/far/guest]
    #[arg(long, env = "FAR_BOOT_KIT", value_name = "DIR")]
    boot_kit: Option<PathBuf>,
    /// Name of this blade, a DNS-1123 label [default: the machine's host name, cleaned]
    #[arg(long, env = "FAR_BLADE", value_name = "BLADE")]
    name: Option<String>,
    /// Address of the node API for the controller; port 0: the kernel picks. Used only with --controller
    #[arg(long, env = "FAR_NODE_LISTEN", default_value = "127.0.0.1:0", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// host:port that the controller is told to call [default: the address listened on]
    #[arg(long, env = "FAR_NODE_ADVERTISE", value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Blade API of far-controller, https://host:port; absent: standalone
    #[arg(long, env = "FAR_CONTROLLER", value_name = "URL", requires = "controller_ca")]
    controller: Option<String>,
    /// PEM of the CA that the controller's certificate must come from
    #[arg(long, env = "FAR_CONTROLLER_CA", value_name = "FILE")]
    controller_ca: Option<PathBuf>,
    /// File with the one-use join token; removed after a successful join. Not needed once joined
    #[arg(long, env = "FAR_JOIN_TOKEN_FILE", value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// Address of http://ADDRESS/metrics for Prometheus; port 0: the kernel picks, the log says; absent: none
    #[arg(long, env = "FAR_NODE_METRICS_LISTEN", value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Written once far-node serves: its address (host:port, or unix:PATH when standalone)
    #[arg(long, env = "FAR_NODE_READY_FILE", value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Label of the blade for placement; repeatable
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Further resource that agents may ask for by name, for example nvidia.com/gpu=2; repeatable
    #[arg(long = "resource", value_name = "NAME=COUNT", value_parser = parse_resource)]
    resources: Vec<(String, u32)>,
    /// From the start of a microVM until its init speaks, and again until the payload runs
    #[arg(long, env = "FAR_BOOT_TIMEOUT", default_value = "90s", value_parser = parse_duration, value_name = "TIME")]
    boot_timeout: Duration,
    /// How often guests say that they live, 100ms to 60s; 0s: never
    #[arg(long, default_value = "5s", value_parser = parse_duration, value_name = "TIME")]
    heartbeat_interval: Duration,
    /// Most microVMs at a time
    #[arg(long, env = "FAR_MAX_VMS", default_value_t = 250, value_name = "N")]
    max_vms: u32,
    /// CPU kept from agents, in cores (0.5) or thousandths (500m)
    #[arg(long, default_value = "0", value_parser = parse_cpu_millis, value_name = "CPU")]
    system_reserved_cpu: u64,
    /// Memory kept from agents
    #[arg(long, default_value = "512MiB", value_parser = parse_bytes, value_name = "SIZE")]
    system_reserved_memory: u64,
    /// Output kept on disk per attempt, 64KiB and more
    #[arg(long, env = "FAR_LOG_MAX_BYTES", default_value = "16MiB", value_parser = parse_bytes, value_name = "SIZE")]
    log_max_bytes: u64,
    /// auto: a NIC where the machine allows it; none: vsock only
    #[arg(long, env = "FAR_NETWORK", default_value = "auto", value_name = "MODE")]
    network: Network,
    /// Give guests IPv6 as well as IPv4
    #[arg(long, env = "FAR_GUEST_IPV6")]
    guest_ipv6: bool,
    /// DNS server that guests' questions go to, ADDRESS or ADDRESS:PORT [default: the first of /etc/resolv.conf]
    #[arg(long, env = "FAR_RESOLVER", value_parser = parse_resolver, value_name = "ADDRESS")]
    resolver: Option<SocketAddr>,
    /// Which VMM runs the guests
    #[arg(long, env = "FAR_BACKEND", default_value = "auto", value_parser = parse_backend, value_name = "auto|qemu|firecracker")]
    backend: Backend,
    /// far-vmm's binary [default: beside far-node, else on PATH]
    #[arg(long, env = "FAR_VMM", value_name = "FILE")]
    far_vmm: Option<PathBuf>,
}

/// Whether microVMs get a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// Where the machine allows it.
    Auto,
    /// Never.
    None,
}

/// What far-node runs with.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // The arguments' texts say it.
pub struct Config {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub boot_kit: PathBuf,
    pub name: String,
    pub controller: Option<ControllerConfig>,
    pub metrics_listen: Option<SocketAddr>,
    pub ready_file: Option<PathBuf>,
    pub boot_timeout: Duration,
    pub heartbeat_interval: Duration,
    pub max_vms: u32,
    pub extended: BTreeMap<String, u32>,
    pub reserved_cpu_millis: u64,
    pub reserved_memory_mib: u64,
    pub log_max_bytes: u64,
    pub network: Network,
    pub guest_ipv6: bool,
    pub resolver: Option<SocketAddr>,
    pub backend: Backend,
    pub far_vmm: PathBuf,
}

/// How the controller is reached.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // The arguments' texts say it.
pub struct ControllerConfig {
    pub url: String,
    pub ca_file: PathBuf,
    pub token_file: Option<PathBuf>,
    pub listen: SocketAddr,
    pub advertise: Option<String>,
    pub labels: BTreeMap<String, String>,
}

/// An option cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{option}: {problem}")]
pub struct ConfigError {
    option: &'static str,
    problem: String,
}

fn bad<T>(option: &'static str, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError {
        option,
        problem: problem.into(),
    })
}

impl Args {
    /// Checks the arguments and fills in what the environment says.
    ///
    /// # Errors
    /// Names the option.
    pub fn check(self, env: impl Fn(&str) -> Option<String>, uid: u32) -> Result<Config, ConfigError> {
        let env = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = env("HOME");
        let state = || {
            env("FAR_STATE")
                .or_else(|| env("XDG_STATE_HOME").map(|dir| dir.join("far")))
                .or_else(|| home.as_ref().map(|home| home.join(".local/state/far")))
                .unwrap_or_else(|| PathBuf::from("/var/lib/far"))
                .join("node")
        };
        let cache = || {
            env("FAR_CACHE")
                .or_else(|| home.as_ref().map(|home| home.join(".cache/far")))
                .unwrap_or_else(|| PathBuf::from("/var/cache/far"))
                .join("guest")
        };
        let run =
            || env("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from(format!("/tmp/far-{uid}")), |dir| dir.join("far"));
        let name = match self.name {
            Some(name) if is_dns_label(&name) => name,
            Some(name) => return bad("--name", format!("{name:?} is no DNS-1123 label: 1 to 63 of [a-z0-9-]")),
            None => {
                let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
                to_dns_label(host.trim().split('.').next().unwrap_or_default(), "blade")
            }
        };
        if self.boot_timeout < Duration::from_secs(1) {
            return bad("--boot-timeout", "must be 1s or more");
        }
        let heartbeat = self.heartbeat_interval;
        if !heartbeat.is_zero() && !(Duration::from_millis(100)..=Duration::from_secs(60)).contains(&heartbeat) {
            return bad("--heartbeat-interval", "must be 0s, or 100ms to 60s");
        }
        if self.log_max_bytes < 64 << 10 {
            return bad("--log-max-bytes", "must be 64KiB or more");
        }
        if self.labels.len() > 64 {
            return bad("--label", "at most 64 labels");
        }
        if self.resources.len() > 32 {
            return bad("--resource", "at most 32 resources");
        }
        let controller = match (self.controller, self.controller_ca) {
            (Some(url), _) if !url.starts_with("https://") => {
                return bad("--controller", format!("{url} does not begin with https://"));
            }
            (Some(url), Some(ca_file)) => Some(ControllerConfig {
                url,
                ca_file,
                token_file: self.join_token_file,
                listen: self.listen,
                advertise: self.advertise,
                labels: self.labels.into_iter().collect(),
            }),
            (Some(_), None) => return bad("--controller-ca", "is needed with --controller"),
            (None, _) => None,
        };
        let absolute = |option: &'static str, path: PathBuf| {
            std::path::absolute(&path).or_else(|error| bad(option, format!("{}: {error}", path.display())))
        };
        Ok(Config {
            state_dir: absolute("--state-dir", self.state_dir.unwrap_or_else(state))?,
            run_dir: absolute("--run-dir", self.run_dir.unwrap_or_else(run))?,
            boot_kit: absolute("--boot-kit", self.boot_kit.unwrap_or_else(cache))?,
            name,
            controller,
            metrics_listen: self.metrics_listen,
            ready_file: self.ready_file,
            boot_timeout: self.boot_timeout,
            heartbeat_interval: heartbeat,
            max_vms: self.max_vms,
            extended: self.resources.into_iter().collect(),
            reserved_cpu_millis: self.system_reserved_cpu,
            reserved_memory_mib: self.system_reserved_memory >> 20,
            log_max_bytes: self.log_max_bytes,
            network: self.network,
            guest_ipv6: self.guest_ipv6,
            resolver: self.resolver,
            backend: self.backend,
            far_vmm: self.far_vmm.map_or_else(|| find_beside("far-vmm"), Ok)?,
        })
    }
}

/// A program of this project: beside this executable, else on PATH.
fn find_beside(name: &'static str) -> Result<PathBuf, ConfigError> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join(name));
    match beside.into_iter().chain(on_path).find(|candidate| candidate.is_file()) {
        Some(found) => Ok(found),
        None => bad(
            "--far-vmm",
            format!("{name} is neither beside far-node nor on PATH: build it or name it"),
        ),
    }
}

fn parse_resource(text: &str) -> Result<(String, u32), String> {
    let (name, count) = text.split_once('=').ok_or("must be NAME=COUNT")?;
    if name.is_empty() || name.len() > 317 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)) {
        return Err("the name must be as nvidia.com/gpu: [A-Za-z0-9._/-]".to_owned());
    }
    let count = count.parse().map_err(|_| format!("{count:?} is no whole number"))?;
    Ok((name.to_owned(), count))
}

fn parse_resolver(text: &str) -> Result<SocketAddr, String> {
    let with_port = || text.parse::<SocketAddr>().ok();
    let alone = text.parse::<IpAddr>().ok();
    alone
        .map(|address| SocketAddr::new(address, 53))
        .or_else(with_port)
        .ok_or_else(|| format!("{text:?} is no address such as 192.0.2.53 or [2001:db8::53]:5353"))
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    let is_part =
        |text: &str| text.len() <= 63 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let name = key.rsplit_once('/').map_or(key, |(_, name)| name);
    if key.len() > 317 || name.is_empty() || !is_part(name) || !is_part(value) {
        return Err("must be a Kubernetes label: a key, and a value of at most 63 of [A-Za-z0-9._-]".to_owned());
    }
    if key.starts_with("tiffany.dev/") {
        return Err("keys under tiffany.dev/ are the controller's".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

fn split_unit(text: &str) -> Result<(u64, &str), String> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number = text[..at]
        .parse()
        .map_err(|_| format!("{text:?} does not begin with a whole number"))?;
    Ok((number, &text[at..]))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text)?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{text:?} has no unit: ms, s, m or h")),
    };
    number
        .checked_mul(millis)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is too long"))
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text)?;
    let shift = match unit {
        "" | "B" => 0,
        "KiB" | "Ki" => 10,
        "MiB" | "Mi" => 20,
        "GiB" | "Gi" => 30,
        _ => return Err(format!("{text:?} has an unknown unit: KiB, MiB or GiB")),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too much"))
}

fn parse_cpu_millis(text: &str) -> Result<u64, String> {
    if let Some(millis) = text.strip_suffix('m') {
        return millis.parse().map_err(|_| format!("{text:?} is no CPU quantity"));
    }
    let cores: f64 = text.parse().map_err(|_| format!("{text:?} is no CPU quantity"))?;
    if !(0.0..=4096.0).contains(&cores) {
        return Err(format!("{text:?} is outside 0 to 4096 cores"));
    }
    // Rounded up: at most 4096000, which f64 holds exactly.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok((cores * 1000.0).ceil() as u64)
}

fn parse_backend(text: &str) -> Result<Backend, String> {
    match text {
        "auto" => Ok(Backend::Auto),
        "qemu" => Ok(Backend::Qemu),
        "firecracker" => Ok(Backend::Firecracker),
        _ => Err("must be auto, qemu or firecracker".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(args: &[&str], env: &[(&str, &str)]) -> Result<Config, String> {
        let all = ["far-node", "--far-vmm", "/far-vmm"].iter().chain(args);
        let args = Args::try_parse_from(all).map_err(|error| error.to_string())?;
        let env = |name: &str| {
            env.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        args.check(env, 7).map_err(|error| error.to_string())
    }

    #[test]
    fn bad_options_are_named() {
        let cases: [&[&str]; 12] = [
            &["--name", "Blade_1"],
            &["--boot-timeout", "90"],
            &["--boot-timeout", "0s"],
            &["--log-max-bytes", "1KiB"],
            &["--label", "a"],
            &["--label", "tiffany.dev/x=y"],
            &["--resource", "nvidia.com/gpu"],
            &["--resource", "nvidia.com/gpu=-1"],
            &["--controller", "http://c", "--controller-ca", "ca"],
            &["--controller", "https://c"],
            &["--backend", "xen"],
            &["--heartbeat-interval", "1ms"],
        ];
        for args in cases {
            let error = check(args, &[]).unwrap_err();
            assert!(
                error.contains(args[0]) || error.contains("--controller-ca"),
                "{args:?}: {error}"
            );
        }
    }

    #[test]
    fn folders_follow_the_environment() {
        let config = check(&[], &[("HOME", "/h")]).unwrap();
        assert_eq!(config.state_dir, PathBuf::from("/h/.local/state/far/node"));
        assert_eq!(config.run_dir, PathBuf::from("/tmp/far-7"));
        assert_eq!(config.boot_kit, PathBuf::from("/h/.cache/far/guest"));
        let config = check(
            &["--state-dir", "/s"],
            &[("XDG_RUNTIME_DIR", "/r"), ("FAR_CACHE", "/c")],
        )
        .unwrap();
        assert_eq!(
            (config.state_dir, config.run_dir),
            (PathBuf::from("/s"), PathBuf::from("/r/far"))
        );
        assert_eq!(config.boot_kit, PathBuf::from("/c/guest"));
    }

    #[test]
    fn quantities_have_units() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_bytes("16MiB"), Ok(16 << 20));
        assert_eq!(parse_bytes("512Mi"), Ok(512 << 20));
        assert_eq!(parse_cpu_millis("0.5"), Ok(500));
        assert_eq!(parse_cpu_millis("250m"), Ok(250));
        assert!(parse_cpu_millis("-1").is_err() && parse_bytes("MiB").is_err() && parse_duration("").is_err());
    }
}
