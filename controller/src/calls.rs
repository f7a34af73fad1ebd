//! Calls to blades: each with the epoch, a deadline, and an answer that says what to do about a failure.

use std::time::Duration;

use far_core::status::Report;
use far_proto::node::{
    AgentSpec, ClaimAgentRequest, EndReason, EnsureAgentRequest, ForgetAgentRequest, Identity, ListAgentsRequest,
    ResurrectAgentRequest, SleepAgentRequest, StopAgentRequest, node_client::NodeClient,
};
use tonic::{Code, Status, transport::Channel};

use crate::convert;

/// A call that takes longer has failed; the blade only writes its ledger in it.
const LIMIT: Duration = Duration::from_secs(20);
/// Largest message: 8 MiB of files, and the rest.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// Why a call did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The blade has no room now. Also what HTTP/2 says of a connection in trouble: whether the blade wrote the attempt
    /// down has to be asked.
    #[error("the blade refused: {0}")]
    Refused(String),
    /// The request itself will never do.
    #[error("the blade rejects the request: {0}")]
    Rejected(String),
    /// Another controller leads.
    #[error("the blade knows a newer controller: {0}")]
    Deposed(String),
    /// Not the state the call needs; look again.
    #[error("the blade is not there yet: {0}")]
    NotYet(String),
    /// Worth another try.
    #[error("calling the blade: {0}")]
    Unreachable(String),
}

/// The client of one blade with one epoch.
pub(crate) struct Blade {
    client: NodeClient<Channel>,
    epoch: u64,
}

pub(crate) fn client(channel: Channel) -> NodeClient<Channel> {
    NodeClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE)
}

impl Blade {
    pub(crate) fn new(channel: Channel, epoch: u64) -> Self {
        Self {
            client: client(channel),
            epoch,
        }
    }

    pub(crate) async fn ensure(&mut self, identity: Identity, spec: AgentSpec) -> Result<Option<Report>, CallError> {
        let request = EnsureAgentRequest {
            epoch: self.epoch,
            identity: Some(identity),
            spec: Some(spec),
        };
        let state = within(self.client.ensure_agent(request))
            .await
            .map_err(|status| match status.code() {
                Code::ResourceExhausted => CallError::Refused(text(&status)),
                Code::InvalidArgument | Code::AlreadyExists => CallError::Rejected(text(&status)),
                Code::FailedPrecondition => CallError::Deposed(text(&status)),
                _ => CallError::Unreachable(text(&status)),
            })?;
        Ok(convert::report(state).map(|(_, report)| report))
    }

    /// Makes `identity` the owner of a warm attempt's microVM.
    pub(crate) async fn claim(
        &mut self,
        warm: Identity,
        identity: Identity,
        spec: AgentSpec,
    ) -> Result<Option<Report>, CallError> {
        let request = ClaimAgentRequest {
            epoch: self.epoch,
            warm: Some(warm),
            identity: Some(identity),
            spec: Some(spec),
        };
        let state = within(self.client.claim_agent(request))
            .await
            .map_err(|status| match status.code() {
                // Also of a blade of an earlier version.
                Code::NotFound | Code::ResourceExhausted | Code::Unimplemented => CallError::Refused(text(&status)),
                Code::InvalidArgument | Code::AlreadyExists => CallError::Rejected(text(&status)),
                Code::FailedPrecondition => CallError::Deposed(text(&status)),
                _ => CallError::Unreachable(text(&status)),
            })?;
        Ok(convert::report(state).map(|(_, report)| report))
    }

    pub(crate) async fn stop(
        &mut self,
        identity: Identity,
        grace_s: Option<u32>,
        reason: EndReason,
    ) -> Result<Option<Report>, CallError> {
        let reason = reason.into();
        let request = StopAgentRequest {
            epoch: self.epoch,
            identity: Some(identity),
            grace_s,
            reason,
        };
        let state = within(self.client.stop_agent(request))
            .await
            .map_err(|status| common(&status))?;
        Ok(convert::report(state).map(|(_, report)| report))
    }

    /// [`CallError::Rejected`]: the blade has no such thing as sleep.
    pub(crate) async fn sleep(&mut self, identity: Identity) -> Result<Option<Report>, CallError> {
        let request = SleepAgentRequest {
            epoch: self.epoch,
            identity: Some(identity),
        };
        let state = within(self.client.sleep_agent(request))
            .await
            .map_err(|status| slept(&status))?;
        Ok(convert::report(state).map(|(_, report)| report))
    }

    /// As [`Self::sleep`].
    pub(crate) async fn resurrect(&mut self, identity: Identity) -> Result<Option<Report>, CallError> {
        let request = ResurrectAgentRequest {
            epoch: self.epoch,
            identity: Some(identity),
        };
        let state = within(self.client.resurrect_agent(request))
            .await
            .map_err(|status| slept(&status))?;
        Ok(convert::report(state).map(|(_, report)| report))
    }

    /// Every attempt the blade keeps.
    pub(crate) async fn list(&mut self) -> Result<Vec<(Identity, Report)>, CallError> {
        let list = within(self.client.list_agents(ListAgentsRequest {}))
            .await
            .map_err(|status| common(&status))?;
        Ok(list.agents.into_iter().filter_map(convert::report).collect())
    }

    /// What the blade says of one attempt, asked directly.
    pub(crate) async fn find(&mut self, uid: &str, attempt: u32) -> Result<Option<Report>, CallError> {
        let mut all = self.list().await?.into_iter();
        Ok(all
            .find(|(identity, _)| identity.uid == uid && identity.attempt == attempt)
            .map(|(_, report)| report))
    }

    pub(crate) async fn forget(&mut self, identity: Identity) -> Result<(), CallError> {
        let request = ForgetAgentRequest {
            epoch: self.epoch,
            identity: Some(identity),
        };
        match within(self.client.forget_agent(request)).await {
            Ok(_) => Ok(()),
            // Either still running, or an old epoch; the next stop or watch tells which.
            Err(status) if status.code() == Code::FailedPrecondition => Err(CallError::NotYet(text(&status))),
            Err(status) => Err(common(&status)),
        }
    }
}

fn slept(status: &Status) -> CallError {
    match status.code() {
        Code::Unimplemented => CallError::Rejected(text(status)),
        _ => common(status),
    }
}

fn common(status: &Status) -> CallError {
    match status.code() {
        Code::InvalidArgument => CallError::Rejected(text(status)),
        Code::FailedPrecondition => CallError::Deposed(text(status)),
        _ => CallError::Unreachable(text(status)),
    }
}

/// What a blade says stays one line: these texts are logged.
fn text(status: &Status) -> String {
    let said = status.message().replace(char::is_control, " ");
    convert::cut(format!("{said} ({:?})", status.code()), 1024)
}

async fn within<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(LIMIT, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "no answer within {} s",
            LIMIT.as_secs()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_blade_says_is_one_line() {
        let status = Status::internal("no\n2026-01-01T00:00:00Z ERROR forged\u{1b}[2K");
        assert_eq!(text(&status), "no 2026-01-01T00:00:00Z ERROR forged [2K (Internal)");
    }
}
