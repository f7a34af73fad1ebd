//! `PortForward`: one TCP connection to a port inside an agent.

use super::{Answers, MAX_PIECE, NodeApi, Talk, answers, check_end, first, lost, no_start};
use crate::{
    control::channels::{Incoming, Sender},
    metrics::ChannelKind,
};
use far_proto::{
    guest::{ChannelStream, Forward, host_message},
    node::{Piece, PortForwardOpened, PortForwardReply, PortForwardRequest, port_forward_reply, port_forward_request},
};
use futures::FutureExt;
use tonic::{Status, Streaming};

pub(super) async fn forward(
    api: &NodeApi,
    mut requests: Streaming<PortForwardRequest>,
) -> Result<Answers<PortForwardReply>, Status> {
    let Some(port_forward_request::Kind::Start(start)) = first(&mut requests).await?.kind else {
        return no_start();
    };
    let port = start.port;
    if !(1..=65535).contains(&port) {
        return Err(Status::invalid_argument("port: must be 1 to 65535"));
    }
    let channel = api
        .open(start.identity.as_ref(), ChannelKind::Forward, |channel| {
            host_message::Kind::Forward(Forward { channel, port })
        })
        .await?;
    let input = pass_on(requests, channel.sender());
    let talk = Talk::new(channel, api.supervisor.blade().shutdown.clone(), input);
    Ok(answers(talk, |talk| step(talk).boxed()))
}

async fn pass_on(mut requests: Streaming<PortForwardRequest>, sender: Sender) -> Result<(), Status> {
    let mut is_open = true;
    while let Some(request) = requests.message().await? {
        let Some(port_forward_request::Kind::Data(piece)) = request.kind else {
            return no_start();
        };
        if !is_open || piece.data.len() > MAX_PIECE {
            return Err(Status::invalid_argument(
                "data: after the last piece, or more than 1 MiB",
            ));
        }
        if piece.data.is_empty() && !piece.last {
            continue;
        }
        is_open = !piece.last;
        if sender
            .send(ChannelStream::Unspecified, &piece.data, piece.last)
            .await
            .is_err()
        {
            return Ok(());
        }
    }
    if is_open {
        let _ = sender.send(ChannelStream::Unspecified, &[], true).await;
    }
    Ok(())
}

async fn step(talk: &mut Talk) -> Result<Option<PortForwardReply>, Status> {
    let kind = match talk.next().await? {
        Incoming::Opened { .. } => port_forward_reply::Kind::Opened(PortForwardOpened {}),
        Incoming::Data { data, last, .. } => port_forward_reply::Kind::Data(Piece { data, last }),
        Incoming::End(end) => {
            check_end(&end)?;
            return Ok(None);
        }
        Incoming::Entry(_) | Incoming::Lost => return Err(lost()),
    };
    Ok(Some(PortForwardReply { kind: Some(kind) }))
}
