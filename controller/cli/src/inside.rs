//! The way into a running agent: its FarAgent says which attempt, the blade's socket or the gateway takes the call.
//!
//! On the blade that has the agent its socket is used: its owner needs nobody's permission. From anywhere else it is the
//! controller's gateway, with the user's own Kubernetes credentials.

use anyhow::{Context, bail};
use far_proto::node::{Identity, StatsRequest, inside_client::InsideClient};

use crate::{
    cluster::{Api, Cluster},
    folders::Folders,
    gateway::{Gateway, Line},
    logs::Boot,
    node::{self, NodeError},
    wait::{self, FINAL_PHASES},
};

/// Messages that wait on their way to the blade.
const QUEUE: usize = 8;

/// A running agent and the way to it.
#[derive(Clone)]
pub(crate) struct Inside {
    pub(crate) identity: Identity,
    pub(crate) client: InsideClient<Line>,
    blade: String,
    gateway: Option<Gateway>,
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
        let (client, gateway) = reach(&api, folders, &boot).await?;
        Ok(Self {
            identity: boot.identity,
            client,
            blade: boot.blade,
            gateway,
        })
    }

    /// A client for one more call of many: with a token that is still good.
    pub(crate) async fn fresh_client(&self) -> anyhow::Result<InsideClient<Line>> {
        match &self.gateway {
            None => Ok(self.client.clone()),
            Some(gateway) => Ok(gateway.inside().await?),
        }
    }

    /// Turns a call's status into an error that names the call, and the blade where this is the wrong one.
    pub(crate) fn refused(&self, what: &str, status: tonic::Status) -> anyhow::Error {
        let is_unknown = self.gateway.is_none() && is_not_here(&status);
        let error = NodeError::of(what)(status);
        if is_unknown {
            elsewhere(error, &self.blade)
        } else {
            error.into()
        }
    }
}

fn is_not_here(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::NotFound && status.message().contains("not known on this blade")
}

/// This machine's blade where it has the agent, else the gateway.
async fn reach(api: &Api, folders: &Folders, boot: &Boot) -> anyhow::Result<(InsideClient<Line>, Option<Gateway>)> {
    let mut not_here = None;
    if folders.socket.is_some() || api.gateway.gateway.is_none() {
        match node::connect_inside(&folders.node_socket()).await {
            Ok(mut client) => {
                if folders.socket.is_some() {
                    return Ok((client, None));
                }
                let request = StatsRequest {
                    identity: Some(boot.identity.clone()),
                };
                match client.stats(request).await {
                    Err(status) if is_not_here(&status) => {
                        not_here = Some(NodeError::of("looking for it here")(status))
                    }
                    // Whatever else is wrong with it, it is here.
                    Ok(_) | Err(_) => return Ok((client, None)),
                }
            }
            Err(error) => not_here = Some(error),
        }
    }
    if folders.socket.is_none()
        && let Some(gateway) = Gateway::find(api).await?
    {
        return Ok((gateway.inside().await?, Some(gateway)));
    }
    match not_here {
        Some(error) => Err(elsewhere(error, &boot.blade)),
        None => bail!("the cluster publishes no gateway"),
    }
}

fn elsewhere(error: NodeError, blade: &str) -> anyhow::Error {
    let is_other = !matches!(error, NodeError::Connect { .. });
    let error = anyhow::Error::from(error);
    if is_other {
        error.context(format!(
            "the agent runs on blade {blade}, and the cluster publishes no gateway to it: run this on that machine"
        ))
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
