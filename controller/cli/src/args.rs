//! The command line. Raw arguments only; each command checks its own.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::{folders::FolderArgs, gateway::GatewayArgs};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed, or the answer is no (far wait: the agent failed; far doctor: something needed is missing)
  2    wrong usage
  far run exits as the agent does: its exit code, 128 + n for signal n, 125 when there is no exit code, 130 after Ctrl-C
  far exec exits as the command does, in the same way; 126 and 127 when it could not be started

Kubeconfig: --kubeconfig, else $KUBECONFIG, else the one of `far up` where there is one, else ~/.kube/config";

const PLUGIN_KUBECONFIG: &str = "\
Kubeconfig, context and namespace as kubectl takes them: --kubeconfig, else $KUBECONFIG, else ~/.kube/config; where there
is none of these, the one of `far up`.";

/// Runs agents in microVMs: on this machine alone, or on the blades of a cluster
#[derive(Debug, Parser)]
#[command(name = "far", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Far {
    #[command(flatten)]
    pub(crate) folders: FolderArgs,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start everything on this machine: API, controller, node agent
    #[command(after_help = "Example:\n  far up && export KUBECONFIG=$(far kubeconfig)\n\n\
        Runs what is not running; what runs already is left alone.")]
    Up(UpArgs),
    /// Stop everything that `far up` started, agents included
    Down(DownArgs),
    /// Show what runs on this machine
    Status(OutputArgs),
    /// Load, list and remove guest images on this machine's blade
    #[command(subcommand)]
    Image(ImageCommand),
    /// Say what this machine can do, and the command that mends each lack
    Doctor(OutputArgs),
    /// Print the path of the kubeconfig of `far up`
    Kubeconfig,
    /// Create or change resources from YAML or JSON (server-side apply)
    #[command(after_help = "Examples:\n  far apply -f examples/embedder.yaml\n  far apply -f - < agent.yaml")]
    Apply(ApplyArgs),
    /// List resources, as tables the API prints
    #[command(
        after_help = "Examples:\n  far get\n  far get faragents -w\n  far get fa embedder-worker-01 -o yaml\n  \
        far get farnodes,faragents -A"
    )]
    Get(GetArgs),
    /// Show one resource with its conditions and events
    Describe(DescribeArgs),
    /// Show what the placer would decide about an agent now, and why: every blade, filter and score
    #[command(after_help = crate::explain::EXAMPLES)]
    Explain(crate::explain::ExplainArgs),
    /// Delete resources and wait until they are gone
    #[command(
        after_help = "Examples:\n  far delete faragent embedder-worker-01\n  far delete -f examples/embedder.yaml"
    )]
    Delete(DeleteArgs),
    /// Wait until an agent has ended, or for a phase or condition
    #[command(after_help = WAIT_EXAMPLES)]
    Wait(WaitArgs),
    /// Print an agent's output
    #[command(after_help = LOGS_EXAMPLES)]
    Logs(LogsArgs),
    /// Run the agent in a file, stream its output and exit with its exit code
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Run a command in a running agent
    #[command(after_help = crate::exec::EXAMPLES)]
    Exec(crate::exec::ExecArgs),
    /// Copy files and folders into and out of a running agent
    #[command(after_help = crate::cp::EXAMPLES)]
    Cp(crate::cp::CpArgs),
    /// Reach a port of a running agent under 127.0.0.1
    #[command(after_help = crate::forward::EXAMPLES)]
    PortForward(crate::forward::ForwardArgs),
    /// Show what running agents use
    Top(crate::top::TopArgs),
    /// Print a token of a service account
    #[command(after_help = crate::token::EXAMPLES)]
    Token(crate::token::TokenArgs),
    /// Show what agents may reach, and why a packet passes or not
    #[command(subcommand)]
    Net(crate::net::NetCommand),
    /// Let a blade take no new agents; those that run stay
    Cordon(crate::drain::CordonArgs),
    /// Let a blade take agents again
    Uncordon(crate::drain::CordonArgs),
    /// Empty a blade, and wait until it is empty
    #[command(after_help = crate::drain::EXAMPLES)]
    Drain(crate::drain::DrainArgs),
    /// Print the completion script of a shell
    #[command(after_help = "Example:\n  source <(far completion bash)")]
    Completion { shell: Shell },
    /// Print the version
    Version,
}

/// Runs agents in microVMs: what kubectl itself cannot do
#[derive(Debug, Parser)]
#[command(name = "kubectl-far", bin_name = "kubectl far", version, after_help = PLUGIN_KUBECONFIG)]
pub(crate) struct KubectlFar {
    #[command(flatten)]
    pub(crate) folders: FolderArgs,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    #[command(subcommand)]
    pub(crate) command: PluginCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Print an agent's output
    Logs(LogsArgs),
    /// Run the agent in a file, stream its output and exit with its exit code
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// Run a command in a running agent
    Exec(crate::exec::ExecArgs),
    /// Copy files and folders into and out of a running agent
    Cp(crate::cp::CpArgs),
    /// Reach a port of a running agent under 127.0.0.1
    PortForward(crate::forward::ForwardArgs),
    /// Show what running agents use
    Top(crate::top::TopArgs),
    /// Show what the placer would decide about an agent now, and why: every blade, filter and score
    #[command(after_help = crate::explain::EXAMPLES)]
    Explain(crate::explain::ExplainArgs),
    /// Show what agents may reach, and why a packet passes or not
    #[command(subcommand)]
    Net(crate::net::NetCommand),
    /// Let a blade take no new agents; those that run stay
    Cordon(crate::drain::CordonArgs),
    /// Let a blade take agents again
    Uncordon(crate::drain::CordonArgs),
    /// Empty a blade, and wait until it is empty
    #[command(after_help = crate::drain::EXAMPLES)]
    Drain(crate::drain::DrainArgs),
    /// Wait until an agent has ended, or for a phase or condition
    Wait(WaitArgs),
    /// Load, list and remove guest images on this machine's blade
    #[command(subcommand)]
    Image(ImageCommand),
    /// Show what `far up` runs on this machine
    Status(OutputArgs),
    /// Say what this machine can do, and the command that mends each lack
    Doctor(OutputArgs),
    /// Print the version
    Version,
}

const WAIT_EXAMPLES: &str = "\
Examples:
  far wait embedder-worker-01                          # until it ended; exit code 1 when it failed
  far wait embedder-worker-01 --for phase=Running
  far wait embedder-worker-01 --for condition=Scheduled --timeout 30s
  far wait embedder-worker-01 --for delete";

const LOGS_EXAMPLES: &str = "\
Examples:
  far logs embedder-worker-01
  far logs embedder-worker-01 -f --timestamps
  far logs embedder-worker-01 --stderr --tail 20

Both streams are printed to standard output, in order of arrival. The output is read on the blade that ran the agent: by its
socket on that machine, else through the controller's gateway. With -f, a controller that restarts is waited for.";

const RUN_EXAMPLES: &str = "\
Examples:
  far run examples/fails.yaml; echo $?
  far run - < agent.yaml

FILE holds one FarAgent, and may hold what it needs (ConfigMaps, Secrets), which is applied first. Where an agent of that
name exists, the new one gets a name of its own. Nothing is deleted at the end; Ctrl-C deletes the agent.

Exit code: the agent's; 128 + n for signal n; 125 when there is none (it never ran, or its microVM was lost); 130 after Ctrl-C.";

/// Which cluster.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct ClusterArgs {
    /// Kubeconfig file
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, value_name = "NAME", global = true)]
    pub(crate) context: Option<String>,
    /// Namespace [default: the context's, else "default"]
    #[arg(short, long, value_name = "NAME", global = true)]
    pub(crate) namespace: Option<String>,
    /// Token for the Kubernetes API and the gateway, instead of the kubeconfig's credentials
    #[arg(long, env = "FAR_TOKEN", value_name = "TOKEN", global = true, hide_env_values = true)]
    pub(crate) token: Option<String>,
    #[command(flatten)]
    pub(crate) gateway: GatewayArgs,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Kernel, initramfs and guest image, as `make guest` builds them [default: $FAR_CACHE/guest]
    #[arg(long, env = "FAR_BOOT_KIT", value_name = "DIR", hide_env_values = true)]
    pub(crate) boot_kit: Option<PathBuf>,
    /// Stay until Ctrl-C, then stop everything
    #[arg(long)]
    pub(crate) foreground: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    /// Also remove everything that was kept: the API's objects, images, logs
    #[arg(long)]
    pub(crate) purge: bool,
}

#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// As JSON, for programs
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<Machine>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Machine {
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Load an OCI archive under a reference, as `kind load` does
    #[command(after_help = "Example:\n  far image load tiffany-vm.oci.tar --as ghcr.io/microscaler/tiffany-vm:v0.3.1")]
    Load {
        /// Tar file of an OCI layout
        file: PathBuf,
        /// Reference that agents name in spec.image
        #[arg(long = "as", value_name = "REF")]
        reference: String,
    },
    /// List the blade's images
    Ls(OutputArgs),
    /// Remove a reference, and the image when nothing else names it
    Rm {
        #[arg(value_name = "REF")]
        reference: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// File, folder of .yaml, .yml and .json files, or - for standard input; may be given more than once
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    pub(crate) filename: Vec<PathBuf>,
    /// Take over fields that another manager set
    #[arg(long)]
    pub(crate) force_conflicts: bool,
    /// Let the API check everything and store nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// Kind (or kinds, by commas), and names; or KIND/NAME [default: faragents]
    #[arg(value_name = "KIND NAME")]
    pub(crate) what: Vec<String>,
    /// How to print
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<Format>,
    /// Then print every change, until Ctrl-C
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// In all namespaces
    #[arg(short = 'A', long)]
    pub(crate) all_namespaces: bool,
    /// Only those with these labels, for example app=embedder
    #[arg(short = 'l', long, value_name = "LABELS")]
    pub(crate) selector: Option<String>,
    /// Only those with these fields, for example status.phase=Running
    #[arg(long, value_name = "FIELDS")]
    pub(crate) field_selector: Option<String>,
    /// Without the headings
    #[arg(long)]
    pub(crate) no_headers: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Json,
    Yaml,
    Wide,
    Name,
}

#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    /// Kind and name, or KIND/NAME; a lone NAME is a FarAgent
    #[arg(value_name = "KIND NAME", required = true, num_args = 1..=2)]
    pub(crate) what: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Kind and names, or KIND/NAME
    #[arg(
        value_name = "KIND NAME",
        required_unless_present = "filename",
        conflicts_with = "filename"
    )]
    pub(crate) what: Vec<String>,
    /// What these files describe
    #[arg(short, long = "filename", value_name = "FILE")]
    pub(crate) filename: Vec<PathBuf>,
    /// Do not wait until they are gone
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// No error when it does not exist
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
    /// How long to wait, for example 90s or 5m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// Name of the FarAgent
    #[arg(value_parser = agent_name)]
    pub(crate) agent: String,
    /// end, delete, phase=PHASE or condition=TYPE[=STATUS]
    #[arg(long = "for", value_name = "WHAT", default_value = "end", value_parser = crate::wait::parse_goal)]
    pub(crate) goal: crate::wait::Goal,
    /// How long to wait at most, for example 90s or 5m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Name of the FarAgent
    #[arg(value_parser = agent_name)]
    pub(crate) agent: String,
    /// Go on with new output until the agent ended
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<u32>,
    /// Only standard output
    #[arg(long, conflicts_with = "stderr")]
    pub(crate) stdout: bool,
    /// Only standard error
    #[arg(long)]
    pub(crate) stderr: bool,
    /// With the time before each line
    #[arg(long)]
    pub(crate) timestamps: bool,
    /// Only what is newer: a time span (10m) or a time (2026-01-31T10:00:00Z)
    #[arg(long, value_name = "TIME", value_parser = crate::logs::parse_since)]
    pub(crate) since: Option<crate::logs::Since>,
    /// Of an earlier attempt, counted from 1 [default: the newest]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) attempt: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// File with one FarAgent, or - for standard input
    pub(crate) file: PathBuf,
}

/// A time span as Go and Kubernetes write it: 300ms, 90s, 5m, 1h30m; a plain number is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time span: write 90s, 5m or 1h30m");
    if let Ok(seconds) = text.parse::<u32>() {
        return Ok(Duration::from_secs(seconds.into()));
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let count: u32 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = &rest[digits..];
        let unit = &unit[..unit.find(|c: char| c.is_ascii_digit()).unwrap_or(unit.len())];
        let one = match unit {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(wrong()),
        };
        total = one
            .checked_mul(count)
            .and_then(|more| total.checked_add(more))
            .ok_or_else(wrong)?;
        rest = &rest[digits + unit.len()..];
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// The name of a FarAgent, also as `far get -o name` and kubectl write it.
pub(crate) fn agent_name(text: &str) -> Result<String, String> {
    let name = match text.split_once('/') {
        None => text,
        Some((kind, name)) => {
            let kind = kind.to_ascii_lowercase();
            let kind = kind.strip_suffix(".tiffany.dev").unwrap_or(&kind);
            if !matches!(kind, "fa" | "faragent" | "faragents") {
                return Err(format!("{kind} has no output: name a FarAgent"));
            }
            name
        }
    };
    if name.is_empty() {
        return Err("the name of the FarAgent is empty".to_owned());
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_lines_are_consistent() {
        Far::command().debug_assert();
        KubectlFar::command().debug_assert();
    }

    #[test]
    fn completion_scripts_name_the_commands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Far::command(), "far", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(
                script.contains("doctor") && script.contains("apply") && script.contains("explain"),
                "{shell}"
            );
        }
    }

    #[test]
    fn time_spans_are_read_as_kubectl_reads_them() {
        for (text, expected) in [
            ("90s", Some(90_000)),
            ("5m", Some(300_000)),
            ("1h30m", Some(5_400_000)),
            ("250ms", Some(250)),
            ("30", Some(30_000)),
            ("0", Some(0)),
            ("", None),
            ("m", None),
            ("-5s", None),
            ("5 minutes", None),
            ("5d", None),
            ("99999999999s", None),
        ] {
            assert_eq!(duration(text).ok(), expected.map(Duration::from_millis), "{text:?}");
        }
    }

    #[test]
    fn agents_are_named_with_or_without_their_kind() {
        for (text, expected) in [
            ("a", Some("a")),
            ("fa/a", Some("a")),
            ("faragent/a", Some("a")),
            ("faragent.tiffany.dev/a", Some("a")),
            ("FarAgent/a", Some("a")),
            ("pod/a", None),
            ("fa/", None),
        ] {
            assert_eq!(agent_name(text).ok().as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn wrong_usage_is_refused_with_the_argument_named() {
        for (why, line, names) in [
            ("no file", "far apply", "--filename"),
            ("no reference", "far image load x.tar", "--as"),
            ("both streams", "far logs a --stdout --stderr", "--stderr"),
            ("attempts count from one", "far logs a --attempt 0", "--attempt"),
            ("bad goal", "far wait a --for sunshine", "--for"),
            ("bad time", "far wait a --timeout soon", "--timeout"),
            ("nothing to delete", "far delete", "KIND NAME"),
            ("unknown format", "far get -o xml", "--output"),
            ("no destination", "far net explain a", "DESTINATION"),
            ("no port", "far net explain a 10.0.0.1:x", "is no port"),
            (
                "unknown protocol",
                "far net explain a 10.0.0.1 --protocol gre",
                "--protocol",
            ),
        ] {
            let error = Far::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{why}");
            assert!(error.to_string().contains(names), "{why}: {error}");
        }
    }
}
