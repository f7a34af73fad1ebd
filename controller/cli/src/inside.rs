//! The way into a running agent: its FarAgent says which blade and which attempt, the blade's socket takes the call.
//!
//! As with `far logs`, this works on the blade itself; for a blade elsewhere it says which one it is.

use anyhow::{Context, bail};
use far_proto::node::{Identity, inside_client::InsideClient};
use tonic::transport::Channel;

use crate::{
    cluster::Cluster,
    folders::Folders,
    logs::Boot,
    node::{self, NodeError},
    wait::{self, FINAL_PHASES},
};

/// Messages that wait on their way to the blade.
const QUEUE: usize = 8;

/// A running agent and the blade that has it.
#[derive(Debug, Clone)]
pub(crate) struct Inside {
    pub(crate) identity: Identity,
    pub(crate) client: InsideClient<Channel>,
    blade: String,
}

impl Inside {
    /// Finds the agent. Its blade says itself whether it can be entered.
    pub(crate) async fn find(cluster: &Cluster, folders: &Folders, agent: &str) -> anyhow::Result<Self> {
        let api = cluster.connect().await?;
        let found = wait::until(&api, agent, |agent| Some(agent.cloned())).await?;
        let Some(found) = found else {
            bail!("there is no FarAgent {agent} in namespace {}", api.namespace);
        };
        let Some(boot) = Boot::of(&found) else {
            bail!(
                "{agent} does not run: it was on no blade yet ({})",
                wait::summary(&found)
            );
        };
        if FINAL_PHASES.contains(&wait::phase(&found)) {
            bail!("{agent} does not run any more: {}", wait::summary(&found));
        }
        let client = node::connect_inside(&folders.node_socket())
            .await
            .map_err(|error| elsewhere(error, &boot.blade))?;
        Ok(Self {
            identity: boot.identity,
            client,
            blade: boot.blade,
        })
    }

    /// Turns a call's status into an error that names the call, and the blade where this is the wrong one.
    pub(crate) fn refused(&self, what: &str, status: tonic::Status) -> anyhow::Error {
        let is_unknown = status.code() == tonic::Code::NotFound && status.message().contains("not known on this blade");
        let error = NodeError::of(what)(status);
        if is_unknown {
            elsewhere(error, &self.blade)
        } else {
            error.into()
        }
    }
}

fn elsewhere(error: NodeError, blade: &str) -> anyhow::Error {
    let is_other = !matches!(error, NodeError::Connect { .. });
    let error = anyhow::Error::from(error);
    if is_other {
        error.context(format!("the agent runs on blade {blade}: run this on that machine"))
    } else {
        error
    }
}

/// A queue of messages, as a call takes them.
pub(crate) fn queue<T: Send + 'static>() -> (
    tokio::sync::mpsc::Sender<T>,
    impl futures::Stream<Item = T> + Send + 'static,
) {
    let (send, receive) = tokio::sync::mpsc::channel(QUEUE);
    let messages = futures::stream::unfold(receive, |mut receive| async move {
        let message = receive.recv().await?;
        Some((message, receive))
    });
    (send, messages)
}

/// Work that blocks, on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a thread broke down")?
}
