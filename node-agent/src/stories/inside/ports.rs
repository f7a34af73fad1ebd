//! Ports of agents.

use super::*;

#[tokio::test]
async fn a_port_is_forwarded_both_ways_and_a_refusal_is_told() {
    let mut inside = running().await;
    let first = |port| PortForwardRequest {
        kind: Some(port_forward_request::Kind::Start(proto::PortForwardStart {
            identity: whose(),
            port,
        })),
    };
    let (requests, receiver) = mpsc::channel(4);
    requests.send(first(80)).await.unwrap();
    let mut replies = inside
        .client
        .port_forward(ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    let FromHost::Forward(forward) = inside.guest.heard().await else {
        panic!("no Forward")
    };
    assert_eq!(forward.port, 80);
    let channel = forward.channel;
    inside.guest.send(Kind::Opened(Opened { channel, pid: 0 })).await;
    let ping = Piece {
        data: b"ping".to_vec(),
        last: true,
    };
    requests
        .send(PortForwardRequest {
            kind: Some(port_forward_request::Kind::Data(ping)),
        })
        .await
        .unwrap();
    assert!(matches!(inside.guest.heard().await, FromHost::Data(data) if data.data == b"ping" && data.last));
    inside
        .guest
        .data(channel, ChannelStream::Unspecified, b"pong", true)
        .await;
    inside
        .guest
        .send(Kind::ChannelEnd(ChannelEnd {
            channel,
            ..ChannelEnd::default()
        }))
        .await;
    let opened = replies.message().await.unwrap().unwrap().kind;
    assert!(matches!(opened, Some(port_forward_reply::Kind::Opened(_))));
    let pong = replies.message().await.unwrap().unwrap().kind;
    assert!(matches!(pong, Some(port_forward_reply::Kind::Data(piece)) if piece.data == b"pong" && piece.last));
    assert!(replies.message().await.unwrap().is_none());

    let mut replies = inside
        .client
        .port_forward(tokio_stream::iter([first(81)]))
        .await
        .unwrap()
        .into_inner();
    let FromHost::Forward(forward) = inside.guest.heard().await else {
        panic!("no Forward")
    };
    let end = ChannelEnd {
        channel: forward.channel,
        error: "connecting to 127.0.0.1:81: connection refused".into(),
        kind: ErrorKind::NotFound.into(),
        ..ChannelEnd::default()
    };
    inside.guest.send(Kind::ChannelEnd(end)).await;
    let status = replies.message().await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("refused"), "{status}");
    let bad = inside.client.port_forward(tokio_stream::iter([first(0)])).await;
    assert_eq!(bad.err().map(|status| status.code()), Some(Code::InvalidArgument));
}
