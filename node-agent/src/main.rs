//! Node agent of a blade: ledger, microVM supervisor, control streams, logs, node API.

use anyhow::{Context, Result};
use clap::Parser;
use far_node::config::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{os::unix::fs::MetadataExt, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FAR_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("far-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let uid = std::fs::metadata("/proc/self")
        .context("reading the own user id")?
        .uid();
    let config = Args::parse().check(|name| std::env::var(name).ok(), uid)?;
    raise_file_limit();
    // Dropped after the runtime, which waits for the work on its blocking threads.
    let _lock = far_node::node::lock_state(&config.state_dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut signals = Signals::new()?;
        let node = far_node::node::run(config, shutdown.clone());
        tokio::pin!(node);
        tokio::select! {
            ended = &mut node => return ended,
            () = signals.next() => {}
        }
        tracing::info!("far-node stops serving; its microVMs go on");
        shutdown.cancel();
        // A second signal ends at once.
        tokio::select! {
            ended = node => ended,
            () = signals.next() => Ok(()),
        }
    })
}

/// Each microVM, call and question of a guest takes file descriptors: the soft limit is for programs that use select(2).
fn raise_file_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

struct Signals {
    term: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate()).context("listening for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listening for SIGINT")?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
