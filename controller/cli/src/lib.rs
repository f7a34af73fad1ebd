//! The user's commands: `far` and, with the same code, `kubectl-far`.
//!
//! Two halves. One is this machine: `up`, `down`, `status`, `image`, `doctor` start the daemons as processes of their own
//! and speak to the node agent's socket. The other is a cluster: `apply`, `get`, `describe`, `delete`, `wait`, `logs`, `run`
//! speak to whatever Kubernetes API the kubeconfig names, with dynamic objects, so that they work on any kind.
//! Commands are the program's edge and use `anyhow`; what they are made of has errors of its own.

mod apply;
mod args;
mod cluster;
mod cp;
mod daemons;
mod delete;
mod describe;
mod doctor;
mod documents;
mod down;
mod drain;
mod exec;
mod exit;
mod explain;
mod folders;
mod forward;
mod gateway;
mod get;
mod image;
mod inside;
mod kinds;
mod logs;
mod net;
mod node;
mod os;
mod output;
mod processes;
mod run;
mod status;
mod table;
mod terminal;
mod token;
mod top;
mod tree;
mod up;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Command, Far, KubectlFar, PluginCommand};
use cluster::Cluster;
use exit::Outcome;
use folders::Folders;

/// Runs `far`.
#[must_use]
pub fn far() -> ExitCode {
    let far = Far::parse();
    finish(|| async move {
        let folders = Folders::from_environment(&far.folders)?;
        let cluster = Cluster::of_far(&far.cluster, &folders);
        match far.command {
            Command::Up(args) => up::up(&folders, &args).await,
            Command::Down(args) => down::down(&folders, &args).await,
            Command::Status(args) => status::status(&folders, &args).await,
            Command::Image(args) => image::image(&folders, &args).await,
            Command::Doctor(args) => doctor::doctor(&folders, &args).await,
            Command::Kubeconfig => {
                output::line(&folders.kubeconfig().display().to_string());
                Ok(Outcome::Success)
            }
            Command::Apply(args) => apply::apply(&cluster, &args).await,
            Command::Get(args) => get::get(&cluster, &args).await,
            Command::Explain(args) => explain::explain(&cluster, &args).await,
            Command::Describe(args) => describe::describe(&cluster, &folders, &args).await,
            Command::Delete(args) => delete::delete(&cluster, &args).await,
            Command::Wait(args) => wait::wait(&cluster, &args).await,
            Command::Logs(args) => logs::logs(&cluster, &folders, &args).await,
            Command::Run(args) => run::run(&cluster, &folders, &args).await,
            Command::Exec(args) => exec::exec(&cluster, &folders, &args).await,
            Command::Cp(args) => cp::cp(&cluster, &folders, &args).await,
            Command::PortForward(args) => forward::forward(&cluster, &folders, &args).await,
            Command::Top(args) => top::top(&cluster, &folders, &args).await,
            Command::Token(args) => token::token(&cluster, &args).await,
            Command::Net(command) => net::net(&cluster, &folders, &command).await,
            Command::Cordon(args) => drain::cordon(&cluster, &args).await,
            Command::Uncordon(args) => drain::uncordon(&cluster, &args).await,
            Command::Drain(args) => drain::drain(&cluster, &args).await,
            Command::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Far::command(), "far", &mut script);
                output::bytes(&script);
                Ok(Outcome::Success)
            }
            Command::Version => version(),
        }
    })
}

/// Runs `kubectl-far`.
#[must_use]
pub fn kubectl_far() -> ExitCode {
    let plugin = KubectlFar::parse();
    finish(|| async move {
        let folders = Folders::from_environment(&plugin.folders)?;
        let cluster = Cluster::of_kubectl(&plugin.cluster, &folders);
        match plugin.command {
            PluginCommand::Logs(args) => logs::logs(&cluster, &folders, &args).await,
            PluginCommand::Run(args) => run::run(&cluster, &folders, &args).await,
            PluginCommand::Exec(args) => exec::exec(&cluster, &folders, &args).await,
            PluginCommand::Cp(args) => cp::cp(&cluster, &folders, &args).await,
            PluginCommand::PortForward(args) => forward::forward(&cluster, &folders, &args).await,
            PluginCommand::Top(args) => top::top(&cluster, &folders, &args).await,
            PluginCommand::Explain(args) => explain::explain(&cluster, &args).await,
            PluginCommand::Net(command) => net::net(&cluster, &folders, &command).await,
            PluginCommand::Cordon(args) => drain::cordon(&cluster, &args).await,
            PluginCommand::Uncordon(args) => drain::uncordon(&cluster, &args).await,
            PluginCommand::Drain(args) => drain::drain(&cluster, &args).await,
            PluginCommand::Wait(args) => wait::wait(&cluster, &args).await,
            PluginCommand::Image(args) => image::image(&folders, &args).await,
            PluginCommand::Status(args) => status::status(&folders, &args).await,
            PluginCommand::Doctor(args) => doctor::doctor(&folders, &args).await,
            PluginCommand::Version => version(),
        }
    })
}

fn version() -> anyhow::Result<Outcome> {
    output::line(&format!("far {}", env!("CARGO_PKG_VERSION")));
    Ok(Outcome::Success)
}

fn finish<F, T>(command: F) -> ExitCode
where
    F: FnOnce() -> T,
    T: Future<Output = anyhow::Result<Outcome>>,
{
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&format!("starting the runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(command()) {
        Ok(outcome) => outcome.code(),
        Err(error) => {
            output::error(&exit::chain(&error));
            exit::code_of(&error)
        }
    }
}
