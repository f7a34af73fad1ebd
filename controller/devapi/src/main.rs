//! Embedded Kubernetes API for one machine, for far up and for tests; never for production.
#![forbid(unsafe_code)]

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Parser;
use far_devapi::{Config, DevApi, write_private_file};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Folder for the store, the CA and the token
    #[arg(long)]
    data_dir: PathBuf,
    /// Loopback address to serve on; port 0 takes the last run's port again, else a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// File that gets the https URL once the API serves
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// File that gets a kubeconfig (mode 0600, context `far`)
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Serve /debug/faults: lets clients ask for faults, for tests only
    #[arg(long)]
    enable_fault_injection: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    if let Some(path) = &arguments.ready_file {
        // One that an earlier run left would say "ready" too early.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing the old ready file {}", path.display()));
            }
            _ => {}
        }
    }
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let server = DevApi::start(Config {
        data_dir: arguments.data_dir,
        listen: arguments.listen,
        enable_fault_injection: arguments.enable_fault_injection,
    })
    .await?;
    if let Some(path) = &arguments.kubeconfig {
        write_private_file(path, &server.kubeconfig)?;
    }
    if let Some(path) = &arguments.ready_file {
        write_private_file(path, &server.url)?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    server.shutdown().await;
    Ok(())
}
