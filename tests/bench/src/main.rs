//! Benches: ours and the peers interleaved in one run, on the real binaries. `make bench` runs them; nothing here is a
//! test, and no test has a time in it.
#![deny(unsafe_code)]

mod cpu;
mod guest;
mod hello;
mod net;
mod placement;
mod report;
mod skeleton;
mod tap;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Measures Tinkerbell FAR against the nearest plain thing, in one run.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
    /// How often each side runs, in turn.
    #[arg(long, default_value_t = 3, global = true)]
    rounds: usize,
    /// Where `<bench>.json` is written.
    #[arg(long, default_value = "target/bench", global = true)]
    out: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Boot, one whole agent, placement.
    Skeleton,
    /// A microVM's network, against commands and CNI plugins.
    Net,
    /// PID 1 of the guest, against the same over tonic and against inits of packages.
    Guest,
    /// The other end of what `guest` compares with.
    #[command(hide = true)]
    GuestPeer {
        #[arg(long)]
        socket: PathBuf,
    },
    /// Choosing a blade, against a full scan of all blades.
    Placement,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    match arguments.bench {
        Bench::Guest => report::publish("guest", &arguments.out, &guest::rows(arguments.rounds)?),
        Bench::GuestPeer { socket } => guest::peer::serve(&socket),
        Bench::Net => report::publish("net", &arguments.out, &net::rows(arguments.rounds)?),
        Bench::Placement => report::publish("placement", &arguments.out, &placement::rows(arguments.rounds)?),
        Bench::Skeleton => report::publish("skeleton", &arguments.out, &skeleton::rows(arguments.rounds)?),
    }
}
