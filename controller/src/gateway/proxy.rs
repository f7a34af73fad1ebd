//! The calls themselves: each is checked, its agent found, and then passed on message by message.

use std::{collections::HashMap, sync::Arc, time::Duration};

use far_proto::{
    gateway::output_server::Output,
    node::{
        CopyInRequest, CopyOutReply, CopyOutRequest, CopyResult, ExecReply, ExecRequest, Identity, LogChunk,
        LogsRequest, PortForwardReply, PortForwardRequest, StatsRequest, StatsResponse, copy_in_request,
        copy_out_reply, exec_reply, exec_request, inside_client::InsideClient, inside_server::Inside,
        node_client::NodeClient, port_forward_request,
    },
};
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Response, Status, Streaming, transport::Channel};

use super::{
    Gateway,
    access::{Action, Scope, User},
    calls::Call,
    find::{self, Seat},
};
use crate::{convert, door::Visit};

/// From the call to its first message.
const START_LIMIT: Duration = Duration::from_secs(30);
/// What blades get to answer when all are asked, and how many are asked at a time.
const STATS_LIMIT: Duration = Duration::from_secs(10);
const STATS_AT_A_TIME: usize = 16;
/// Largest answer about all agents of one blade, bytes.
const MAX_STATS: usize = 16 << 20;
/// Blades that an answer names as not reached.
const MAX_UNREACHED: usize = 20;
/// Longest text of a blade's error, bytes.
const MAX_TEXT: usize = 1024;

type Answers<T> = BoxStream<'static, Result<T, Status>>;
/// Told when what the caller sends cannot go on; `None`: it will not be. Dropped, it ends what is passed on: HTTP/2 resets a
/// call only once both of its sides are let go of.
struct Broken(Option<(oneshot::Receiver<Status>, DropGuard)>);

/// A call that may be passed on.
struct Admitted {
    seat: Seat,
    channel: Channel,
    call: Call,
}

impl Gateway {
    /// Who calls. Until then the connection is a stranger's.
    async fn enter<T>(&self, request: &Request<T>) -> Result<Arc<User>, Status> {
        let user = self.access.user(request.metadata()).await?;
        let visit = request.extensions().get::<Visit>();
        if visit.is_some_and(|visit| !visit.is_recognised(&user.name)) {
            return Err(Status::resource_exhausted(
                "too many callers are connected, or you too often: try again later",
            ));
        }
        Ok(user)
    }

    async fn check(&self, user: &User, action: Action, scope: &Scope) -> Result<(), Status> {
        let checked = self.access.check(user, action, scope).await;
        if let Err(status) = &checked {
            self.metrics.call_denied(action);
            tracing::info!(
                target: "far_controller::audit",
                user = user.name.as_str(),
                action = action.label(),
                agent.namespace = scope.namespace.as_str(),
                agent.name = scope.name.as_str(),
                code = ?status.code(),
                "a user's call is refused"
            );
        }
        checked
    }

    async fn admit(&self, user: &User, action: Action, asked: Option<&Identity>) -> Result<Admitted, Status> {
        let scope = find::scope(asked)?;
        if scope.namespace.is_empty() || scope.name.is_empty() {
            return Err(Status::invalid_argument("identity: namespace and name are needed"));
        }
        // Before anything is said about the agent.
        self.check(user, action, &scope).await?;
        let asked = asked.cloned().unwrap_or_default();
        let seat = find::seat(&self.client, action, &scope, &asked).await?;
        let channel = self.channel(&seat.blade)?;
        let call = self.calls.open(user, action, &scope, &seat.blade)?;
        Ok(Admitted { seat, channel, call })
    }

    fn channel(&self, blade: &str) -> Result<Channel, Status> {
        self.world
            .user_channel(blade)
            .ok_or_else(|| Status::unavailable(format!("blade {blade} is not reached now: try again later")))
    }

    /// Waits for the blade, unless the gateway ends or the caller breaks a rule first.
    async fn during<T>(
        &self,
        broken: &mut Broken,
        calling: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(ends()),
            status = said(broken) => Err(status),
            answer = calling => answer.map(Response::into_inner),
        }
    }

    /// A call that is answered by a stream.
    async fn stream<T: Send + 'static>(
        &self,
        mut call: Call,
        blade: &str,
        mut broken: Broken,
        is_last: fn(&T) -> bool,
        calling: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
    ) -> Result<Response<Answers<T>>, Status> {
        let replies = match self.during(&mut broken, calling).await {
            Ok(replies) => replies,
            Err(status) => {
                let status = of_blade(blade, &status);
                call.ended(status.code());
                return Err(status);
            }
        };
        let state = Passing {
            call,
            replies,
            broken,
            is_last,
            gateway: self.clone(),
            blade: blade.to_owned(),
        };
        Ok(Response::new(stream::unfold(Some(state), Passing::step).boxed()))
    }
}

/// Answers on their way: each is taken from the blade when the caller's transport has room for it.
struct Passing<T> {
    call: Call,
    replies: Streaming<T>,
    broken: Broken,
    /// With it the call did what it should; callers seldom wait for the stream's own end.
    is_last: fn(&T) -> bool,
    gateway: Gateway,
    blade: String,
}

impl<T: Send + 'static> Passing<T> {
    async fn step(state: Option<Self>) -> Option<(Result<T, Status>, Option<Self>)> {
        let mut state = state?;
        let next = tokio::select! {
            biased;
            () = state.gateway.stop.cancelled() => Err(ends()),
            status = said(&mut state.broken) => Err(status),
            reply = state.replies.message() => reply,
        };
        match next {
            Ok(Some(reply)) => {
                if (state.is_last)(&reply) {
                    state.call.ended(Code::Ok);
                }
                Some((Ok(reply), Some(state)))
            }
            Ok(None) => {
                state.call.ended(Code::Ok);
                None
            }
            Err(status) => {
                let status = of_blade(&state.blade, &status);
                state.call.ended(status.code());
                Some((Err(status), None))
            }
        }
    }
}

fn ends() -> Status {
    Status::unavailable("the controller ends or leads no more: the call is broken off, nothing is resumed")
}

/// The reason why the caller's messages cannot go on; never completes while they can, or once they ended well.
async fn said(broken: &mut Broken) -> Status {
    match &mut broken.0 {
        Some((receiver, _)) if !receiver.is_terminated() => match receiver.await {
            Ok(status) => status,
            Err(_) => std::future::pending().await,
        },
        Some(_) | None => std::future::pending().await,
    }
}

/// Nobody can break this call from the caller's side.
fn unbroken() -> Broken {
    Broken(None)
}

/// What a blade, or the way to it, says: its code and text, bounded, and nothing else of it.
fn of_blade(blade: &str, status: &Status) -> Status {
    if std::error::Error::source(status).is_some() {
        return Status::unavailable(format!(
            "the connection to blade {blade} was lost: nothing is resumed, try again"
        ));
    }
    Status::new(status.code(), convert::cut(status.message().to_owned(), MAX_TEXT))
}

async fn first<T>(requests: &mut Streaming<T>) -> Result<T, Status> {
    match tokio::time::timeout(START_LIMIT, requests.message()).await {
        Ok(message) => message?.ok_or_else(no_start),
        Err(_) => Err(Status::deadline_exceeded("start: no message came")),
    }
}

fn no_start() -> Status {
    Status::invalid_argument("start: must be the first message, and only the first")
}

/// What the caller sends, on its way to the blade. A caller that breaks off must not look like one that came to its end: the
/// stream to the blade then stays open until the call is dropped, which resets it.
fn pass_on<T: Send + 'static>(
    start: T,
    rest: Streaming<T>,
    is_start: fn(&T) -> bool,
) -> (impl Stream<Item = T> + Send + 'static, Broken) {
    let (break_off, broken) = oneshot::channel();
    let over = CancellationToken::new();
    let state = Some((rest, break_off, over.clone()));
    let rest = stream::unfold(state, move |state| async move {
        let (mut rest, break_off, over) = state?;
        let next = tokio::select! {
            () = over.cancelled() => return None,
            next = rest.message() => next,
        };
        let status = match next {
            Ok(Some(message)) if is_start(&message) => no_start(),
            Ok(Some(message)) => return Some((message, Some((rest, break_off, over)))),
            // Its end is told to the blade, and the call goes on.
            Ok(None) => return None,
            Err(status) => status,
        };
        let _ = break_off.send(status);
        over.cancelled().await;
        None
    });
    let broken = Broken(Some((broken, over.drop_guard())));
    (stream::once(async { start }).chain(rest), broken)
}

#[tonic::async_trait]
impl Inside for Gateway {
    type ExecStream = Answers<ExecReply>;
    type CopyOutStream = Answers<CopyOutReply>;
    type PortForwardStream = Answers<PortForwardReply>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let user = self.enter(&request).await?;
        let mut requests = request.into_inner();
        let Some(exec_request::Kind::Start(mut start)) = first(&mut requests).await?.kind else {
            return Err(no_start());
        };
        let Admitted { seat, channel, call } = self.admit(&user, Action::Exec, start.identity.as_ref()).await?;
        start.identity = Some(seat.identity);
        let start = ExecRequest {
            kind: Some(exec_request::Kind::Start(start)),
        };
        let is_start = |request: &ExecRequest| matches!(request.kind, Some(exec_request::Kind::Start(_)));
        let (messages, broken) = pass_on(start, requests, is_start);
        let mut client = InsideClient::new(channel);
        let is_last = |reply: &ExecReply| matches!(reply.kind, Some(exec_reply::Kind::Exit(_)));
        self.stream(call, &seat.blade, broken, is_last, client.exec(messages))
            .await
    }

    async fn copy_in(&self, request: Request<Streaming<CopyInRequest>>) -> Result<Response<CopyResult>, Status> {
        let user = self.enter(&request).await?;
        let mut requests = request.into_inner();
        let Some(copy_in_request::Kind::Start(mut start)) = first(&mut requests).await?.kind else {
            return Err(no_start());
        };
        let Admitted {
            seat,
            channel,
            mut call,
        } = self.admit(&user, Action::Copy, start.identity.as_ref()).await?;
        start.identity = Some(seat.identity);
        let start = CopyInRequest {
            kind: Some(copy_in_request::Kind::Start(start)),
        };
        let is_start = |request: &CopyInRequest| matches!(request.kind, Some(copy_in_request::Kind::Start(_)));
        let (messages, mut broken) = pass_on(start, requests, is_start);
        let mut client = InsideClient::new(channel);
        let copied = self.during(&mut broken, client.copy_in(messages)).await;
        let copied = copied.map_err(|status| of_blade(&seat.blade, &status));
        call.ended(copied.as_ref().map_or_else(Status::code, |_| Code::Ok));
        copied.map(Response::new)
    }

    async fn copy_out(&self, request: Request<CopyOutRequest>) -> Result<Response<Self::CopyOutStream>, Status> {
        let user = self.enter(&request).await?;
        let mut asked = request.into_inner();
        let Admitted { seat, channel, call } = self.admit(&user, Action::Copy, asked.identity.as_ref()).await?;
        asked.identity = Some(seat.identity);
        let mut client = InsideClient::new(channel);
        let is_last = |reply: &CopyOutReply| matches!(reply.kind, Some(copy_out_reply::Kind::Result(_)));
        self.stream(call, &seat.blade, unbroken(), is_last, client.copy_out(asked))
            .await
    }

    async fn port_forward(
        &self,
        request: Request<Streaming<PortForwardRequest>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let user = self.enter(&request).await?;
        let mut requests = request.into_inner();
        let Some(port_forward_request::Kind::Start(mut start)) = first(&mut requests).await?.kind else {
            return Err(no_start());
        };
        let Admitted { seat, channel, call } = self.admit(&user, Action::PortForward, start.identity.as_ref()).await?;
        start.identity = Some(seat.identity);
        let start = PortForwardRequest {
            kind: Some(port_forward_request::Kind::Start(start)),
        };
        let is_start =
            |request: &PortForwardRequest| matches!(request.kind, Some(port_forward_request::Kind::Start(_)));
        let (messages, broken) = pass_on(start, requests, is_start);
        let mut client = InsideClient::new(channel);
        self.stream(call, &seat.blade, broken, |_| false, client.port_forward(messages))
            .await
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let user = self.enter(&request).await?;
        let asked = request.into_inner().identity;
        let scope = find::scope(asked.as_ref())?;
        if scope.name.is_empty() {
            self.check(&user, Action::Stats, &scope).await?;
            return self.stats_of_all(&user, &scope).await;
        }
        let Admitted {
            seat,
            channel,
            mut call,
        } = self.admit(&user, Action::Stats, asked.as_ref()).await?;
        let mut client = InsideClient::new(channel);
        let request = StatsRequest {
            identity: Some(seat.identity.clone()),
        };
        let answer = self.during(&mut unbroken(), client.stats(request)).await;
        let answer = answer.map_err(|status| of_blade(&seat.blade, &status));
        call.ended(answer.as_ref().map_or_else(Status::code, |_| Code::Ok));
        let expected = HashMap::from([(seat.identity.uid.clone(), seat.identity)]);
        Ok(Response::new(believed(answer?, &expected)))
    }
}

impl Gateway {
    /// Asks every blade that has agents of the scope.
    async fn stats_of_all(&self, user: &User, scope: &Scope) -> Result<Response<StatsResponse>, Status> {
        let placed = self.world.placed(&scope.namespace);
        let mut call = self.calls.open(user, Action::Stats, scope, "")?;
        let mut answers = stream::iter(placed)
            .map(|(blade, expected)| async move {
                let asked = async {
                    let mut client = InsideClient::new(self.channel(&blade)?).max_decoding_message_size(MAX_STATS);
                    client.stats(StatsRequest::default()).await.map(Response::into_inner)
                };
                match tokio::time::timeout(STATS_LIMIT, asked).await {
                    Ok(Ok(answer)) => Ok(believed(answer, &expected)),
                    Ok(Err(_)) | Err(_) => Err(blade),
                }
            })
            .buffer_unordered(STATS_AT_A_TIME);
        let (mut all, mut unreached) = (StatsResponse::default(), Vec::new());
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(answer) => all.agents.extend(answer.agents),
                Err(blade) => unreached.push(blade),
            }
        }
        call.ended(Code::Ok);
        let mut response = Response::new(all);
        if !unreached.is_empty() {
            unreached.sort_unstable();
            unreached.truncate(MAX_UNREACHED);
            if let Ok(names) = unreached.join(",").parse() {
                response.metadata_mut().insert("far-unreached", names);
            }
        }
        Ok(response)
    }
}

/// What a blade may speak of: the agents that are its own, under the names that we know, each once.
fn believed(answer: StatsResponse, expected: &HashMap<String, Identity>) -> StatsResponse {
    let mut told = std::collections::HashSet::new();
    let agents = answer.agents.into_iter().filter_map(|mut one| {
        let said = one.identity.take()?;
        let known = expected
            .get(&said.uid)
            .filter(|known| known.attempt == said.attempt && told.insert(said.uid.clone()))?;
        one.identity = Some(known.clone());
        Some(one)
    });
    StatsResponse {
        agents: agents.collect(),
    }
}

#[tonic::async_trait]
impl Output for Gateway {
    type LogsStream = Answers<LogChunk>;

    async fn logs(&self, request: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let user = self.enter(&request).await?;
        let mut asked = request.into_inner();
        let Admitted { seat, channel, call } = self.admit(&user, Action::Logs, asked.identity.as_ref()).await?;
        asked.identity = Some(seat.identity);
        let mut client = NodeClient::new(channel);
        self.stream(call, &seat.blade, unbroken(), |_| false, client.logs(asked))
            .await
    }
}

#[cfg(test)]
mod tests {
    use far_proto::node::AgentStats;

    use super::*;

    #[test]
    fn a_blade_speaks_of_its_own_agents_only_and_under_our_names() {
        let identity = |uid: &str, attempt, name: &str| Identity {
            uid: uid.into(),
            attempt,
            namespace: "n".into(),
            name: name.into(),
        };
        let said = |uid: &str, attempt, name: &str| AgentStats {
            identity: Some(identity(uid, attempt, name)),
            ..AgentStats::default()
        };
        let answer = StatsResponse {
            agents: vec![
                said("mine", 1, "lie"),
                said("mine", 1, "again"),
                said("mine", 2, "later"),
                said("other", 1, "victim"),
                AgentStats::default(),
            ],
        };
        let expected = HashMap::from([("mine".to_owned(), identity("mine", 1, "truth"))]);
        let names: Vec<_> = believed(answer, &expected)
            .agents
            .into_iter()
            .map(|one| one.identity.unwrap().name)
            .collect();
        assert_eq!(names, ["truth"]);
    }

    #[test]
    fn of_a_blades_error_only_code_and_a_bounded_text_come_through() {
        let mut status = Status::permission_denied("x".repeat(100_000));
        status.metadata_mut().insert("authorization", "secret".parse().unwrap());
        let passed = of_blade("b", &status);
        assert_eq!(passed.code(), Code::PermissionDenied);
        assert!(passed.message().len() <= MAX_TEXT + 8 && passed.metadata().is_empty());
    }
}
