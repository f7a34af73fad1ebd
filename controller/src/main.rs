//! `far-controller`: runs the controller, prints the CRDs, makes join tokens, revokes blades.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use far_controller::{
    Config,
    tokens::{MAX_LIFE, Revocations, Tokens},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A hundred thousand agents are some million small pieces.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pause before a controller that lost its lead starts anew.
const START_ANEW_AFTER: Duration = Duration::from_secs(2);

/// Kubernetes controller for FarAgents.
#[derive(Debug, Parser)]
#[command(name = "far-controller", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controller until TERM or INT.
    Run(Box<Config>),
    /// Print the CRDs as YAML, or write one file each.
    Crds {
        /// Folder to write to.
        #[arg(long)]
        out_dir: Option<PathBuf>,
    },
    /// Join tokens for blades.
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Refuse every certificate a blade has from now on; it has to join again.
    Revoke {
        /// State folder of the controller.
        #[arg(long, env = "FAR_CONTROLLER_STATE")]
        state_dir: PathBuf,
        /// Name of the blade.
        #[arg(long)]
        blade: String,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Print a new token that works once.
    Create {
        /// State folder of the controller.
        #[arg(long, env = "FAR_CONTROLLER_STATE")]
        state_dir: PathBuf,
        /// Only for this blade.
        #[arg(long)]
        blade: Option<String>,
        /// Seconds until it expires, at most 3600.
        #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
    },
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Run(config) => run(*config),
        Command::Crds { out_dir } => crds(out_dir),
        Command::Token {
            command:
                TokenCommand::Create {
                    state_dir,
                    blade,
                    seconds,
                },
        } => {
            let life = Duration::from_secs(seconds).min(MAX_LIFE);
            println!("{}", Tokens::new(&state_dir).create(blade.as_deref(), life)?);
            Ok(())
        }
        Command::Revoke { state_dir, blade } => {
            let count = Revocations::new(&state_dir).revoke(&blade).context("revoking")?;
            println!("{count} certificates of blade {blade} are refused from now on");
            Ok(())
        }
    }
}

fn crds(out_dir: Option<PathBuf>) -> Result<()> {
    for (name, text) in far_api::crds_yaml()? {
        match &out_dir {
            Some(folder) => {
                let path = folder.join(name);
                std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            }
            None => print!("---\n{text}"),
        }
    }
    Ok(())
}

/// Half the cores, at most four: nearly all of the work is waiting and taking JSON apart, and threads that wake each other cost
/// more than a second one gives.
fn run(config: Config) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 2).clamp(1, 4))
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(serve(config))
}

async fn serve(config: Config) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FAR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,kube_runtime=warn,kube_client=off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let shutdown = CancellationToken::new();
    let mut term = signal(SignalKind::terminate()).context("listening for TERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listening for INT")?;
    let asked = shutdown.clone();
    tokio::spawn(async move {
        for round in 0.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            if round > 0 {
                // The second signal ends at once.
                std::process::exit(130);
            }
            asked.cancel();
        }
    });
    lead_again_and_again(config, shutdown).await
}

/// Runs until told to end. A lead that is lost (the API was away for too long) is waited for again, on the same address,
/// so that blades find this controller where it was. What fails before the first lead is an error of the setting.
async fn lead_again_and_again(mut config: Config, shutdown: CancellationToken) -> Result<()> {
    let mut running = far_controller::start(config.clone(), shutdown.clone()).await?;
    config.listen = running.address;
    config.gateway_listen = running.gateway;
    config.metrics_listen = running.metrics;
    config.health_listen = running.health;
    loop {
        let Err(error) = running.wait().await else {
            return Ok(());
        };
        tracing::error!(error = %format!("{error:#}"), "the controller starts anew");
        running = loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(START_ANEW_AFTER) => {}
            }
            match far_controller::start(config.clone(), shutdown.clone()).await {
                Ok(running) => break running,
                Err(_) if shutdown.is_cancelled() => return Ok(()),
                Err(error) => {
                    tracing::error!(error = %format!("{error:#}"), "the controller did not start: trying again")
                }
            }
        };
    }
}
