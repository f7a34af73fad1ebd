//! Exec, cp, port-forward and stats: a real gRPC client, the node API on a Unix socket, and a fake guest behind a real
//! control socket, which behaves or does not.

mod copies;
mod images;
mod ports;
mod signs;

use super::doubles::*;
use crate::{
    api::NodeApi,
    capacity::Machine,
    client::connect_inside_unix,
    control::channels::WINDOW,
    epoch::{EpochGuard, Origin},
    host::HostFacts,
    outcome::VmmEnd,
    record::Phase,
    supervisor::Room,
    unix_socket,
};
use far_proto::{
    frame::{CHANNEL_WINDOW, MAX_CHANNELS},
    guest::{
        ChannelEnd, ChannelStream, Credit, Data, Done, ErrorKind, Heartbeat, Opened, Stage, TransferEntry,
        TransferKind, channel_end, guest_message::Kind, host_message::Kind as FromHost,
    },
    node::{
        self as proto, CopyInRequest, CopyOutRequest, ExecReply, ExecRequest, ExecStart, Piece, PortForwardRequest,
        copy_in_request, copy_out_reply, exec_exit, exec_reply, exec_request, inside_client::InsideClient,
        port_forward_reply, port_forward_request,
    },
};
use std::sync::Arc;
use tokio::{sync::mpsc, time::Duration};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};

struct Inside {
    world: World,
    node: Node,
    guest: Guest,
    client: InsideClient<Channel>,
}

fn whose() -> Option<proto::Identity> {
    let identity = identity(1);
    Some(proto::Identity {
        namespace: identity.namespace,
        name: identity.name,
        ..proto::Identity::default()
    })
}

fn api(world: &World, node: &Node) -> NodeApi {
    let machine = Machine {
        cpu_millis: 4000,
        memory_mib: 4096,
        room: Room {
            cpu_millis: 4000,
            memory_mib: 4096,
            max_vms: 8,
        },
        kernel_version: String::new(),
        boot_id: String::new(),
        host: HostFacts::default(),
        extended: Default::default(),
    };
    let epochs = EpochGuard::open(&world.dir.path().join("epoch")).unwrap();
    NodeApi::new(
        node.supervisor.clone(),
        Arc::new(machine),
        Arc::new(epochs),
        Origin::Blade,
    )
}

async fn serve(world: &World, node: &Node) -> InsideClient<Channel> {
    let path = world.dir.path().join("node.sock");
    let socket = unix_socket::bind(&path).await.unwrap();
    tokio::spawn(unix_socket::serve(
        socket,
        api(world, node),
        node.blade.shutdown.clone(),
    ));
    connect_inside_unix(&path).await.unwrap()
}

async fn running() -> Inside {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    let client = serve(&world, &node).await;
    Inside {
        world,
        node,
        guest,
        client,
    }
}

/// A call's requests and answers.
struct Call {
    requests: mpsc::Sender<ExecRequest>,
    replies: Streaming<ExecReply>,
}

fn start(argv: &[&str], stdin: bool) -> exec_request::Kind {
    exec_request::Kind::Start(ExecStart {
        identity: whose(),
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        stdin,
        ..ExecStart::default()
    })
}

async fn try_exec(client: &InsideClient<Channel>, first: exec_request::Kind) -> Result<Call, tonic::Status> {
    let (requests, receiver) = mpsc::channel(64);
    requests.send(ExecRequest { kind: Some(first) }).await.unwrap();
    let replies = client.clone().exec(ReceiverStream::new(receiver)).await?.into_inner();
    Ok(Call { requests, replies })
}

async fn exec(client: &InsideClient<Channel>, argv: &[&str]) -> Call {
    try_exec(client, start(argv, true)).await.unwrap()
}

impl Call {
    async fn send(&self, kind: exec_request::Kind) {
        self.requests.send(ExecRequest { kind: Some(kind) }).await.unwrap();
    }

    async fn next(&mut self) -> Result<exec_reply::Kind, Code> {
        match tokio::time::timeout(Duration::from_secs(60), self.replies.message())
            .await
            .unwrap()
        {
            Ok(Some(reply)) => Ok(reply.kind.unwrap()),
            Ok(None) => Err(Code::Ok),
            Err(status) => Err(status.code()),
        }
    }

    /// Standard output, and the exit.
    async fn until_exit(mut self) -> (Vec<u8>, proto::ExecExit) {
        let mut output = Vec::new();
        loop {
            match self.next().await.unwrap() {
                exec_reply::Kind::Stdout(data) => output.extend(data),
                exec_reply::Kind::Exit(exit) => return (output, exit),
                exec_reply::Kind::Started(_) | exec_reply::Kind::Stderr(_) => {}
            }
        }
    }
}

impl Guest {
    /// The next message that is no Credit.
    async fn heard(&mut self) -> FromHost {
        let wait = async {
            loop {
                match self.receive().await {
                    Some(FromHost::Credit(_) | FromHost::LogAck(_)) => {}
                    other => return other.expect("the host closed"),
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait)
            .await
            .expect("the host says nothing")
    }

    /// Takes an Exec and says that it runs; answers its channel and program.
    async fn opened(&mut self) -> (u32, String) {
        let FromHost::Exec(exec) = self.heard().await else {
            panic!("no Exec");
        };
        self.send(Kind::Opened(Opened {
            channel: exec.channel,
            pid: 7,
        }))
        .await;
        (exec.channel, exec.argv[0].clone())
    }

    async fn data(&mut self, channel: u32, stream: ChannelStream, data: &[u8], last: bool) {
        self.send(Kind::Data(Data {
            channel,
            stream: stream.into(),
            data: data.to_vec(),
            last,
        }))
        .await;
    }

    async fn end(&mut self, channel: u32, code: u32) {
        self.send(Kind::ChannelEnd(ChannelEnd {
            channel,
            how: Some(channel_end::How::Code(code)),
            ..ChannelEnd::default()
        }))
        .await;
    }

    async fn until_cut(&mut self) {
        let wait = async { while self.receive().await.is_some() {} };
        tokio::time::timeout(Duration::from_secs(60), wait)
            .await
            .expect("the host goes on with it");
    }
}

#[tokio::test]
async fn a_program_gets_its_input_and_gives_output_and_exit_code() {
    let mut inside = running().await;
    let mut call = exec(&inside.client, &["cat", "-"]).await;
    let FromHost::Exec(wire) = inside.guest.heard().await else {
        panic!("no Exec")
    };
    assert_eq!(
        (wire.argv.as_slice(), wire.stdin),
        (["cat".to_owned(), "-".to_owned()].as_slice(), true)
    );
    let channel = wire.channel;
    inside.guest.send(Kind::Opened(Opened { channel, pid: 9 })).await;
    assert_eq!(
        call.next().await,
        Ok(exec_reply::Kind::Started(proto::ExecStarted { pid: 9 }))
    );
    let piece = Piece {
        data: b"hello".to_vec(),
        last: true,
    };
    call.send(exec_request::Kind::Stdin(piece)).await;
    let FromHost::Data(data) = inside.guest.heard().await else {
        panic!("no Data")
    };
    assert_eq!((data.data.as_slice(), data.last), (b"hello".as_slice(), true));
    call.send(exec_request::Kind::Resize(proto::TerminalSize { rows: 3, columns: 0 }))
        .await;
    call.send(exec_request::Kind::Signal(2)).await;
    let FromHost::ExecResize(resize) = inside.guest.heard().await else {
        panic!("no resize")
    };
    assert_eq!(resize.size.map(|size| (size.rows, size.columns)), Some((3, 1)));
    assert!(matches!(inside.guest.heard().await, FromHost::ExecSignal(signal) if signal.number == 2));
    inside.guest.data(channel, ChannelStream::Stdout, b"out", true).await;
    inside.guest.data(channel, ChannelStream::Stderr, b"err", true).await;
    inside.guest.end(channel, 42).await;
    assert_eq!(call.next().await, Ok(exec_reply::Kind::Stdout(b"out".to_vec())));
    assert_eq!(call.next().await, Ok(exec_reply::Kind::Stderr(b"err".to_vec())));
    let Ok(exec_reply::Kind::Exit(exit)) = call.next().await else {
        panic!("no exit")
    };
    assert_eq!(exit.how, Some(exec_exit::How::Code(42)));
    assert_eq!(call.next().await, Err(Code::Ok), "nothing follows");
}

#[tokio::test]
async fn a_hundred_programs_in_turn_and_many_at_once_leave_no_channel() {
    let mut inside = running().await;
    for n in 0..100_u32 {
        let call = exec(&inside.client, &[&n.to_string()]).await;
        let (channel, program) = inside.guest.opened().await;
        assert_eq!(program, n.to_string());
        inside.guest.end(channel, n % 256).await;
        assert_eq!(call.until_exit().await.1.how, Some(exec_exit::How::Code(n % 256)));
    }
    let calls = futures::future::join_all((0..MAX_CHANNELS).map(|n| {
        let client = inside.client.clone();
        async move { (n, exec(&client, &[&n.to_string()]).await) }
    }))
    .await;
    let mut channels = Vec::new();
    for _ in 0..MAX_CHANNELS {
        channels.push(inside.guest.opened().await);
    }
    let refused = try_exec(&inside.client, start(&["x"], false)).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    // Ended in another order than begun.
    for (channel, program) in channels.iter().rev() {
        inside
            .guest
            .data(*channel, ChannelStream::Stdout, program.as_bytes(), true)
            .await;
        inside.guest.end(*channel, program.parse().unwrap()).await;
    }
    for (n, call) in calls {
        let (output, exit) = call.until_exit().await;
        assert_eq!(String::from_utf8(output).unwrap(), n.to_string());
        assert_eq!(exit.how, Some(exec_exit::How::Code(u32::try_from(n).unwrap())));
    }
    assert_eq!(inside.node.blade.metrics.channels.open(), 0);
}

#[tokio::test]
async fn a_caller_that_goes_away_closes_its_program_and_nothing_else() {
    let mut inside = running().await;
    let gone = exec(&inside.client, &["gone"]).await;
    let stays = exec(&inside.client, &["stays"]).await;
    let mut channels = [inside.guest.opened().await, inside.guest.opened().await];
    channels.sort_by(|a, b| a.1.cmp(&b.1));
    drop(gone);
    assert!(matches!(inside.guest.heard().await, FromHost::Close(close) if close.channel == channels[0].0));
    // What crosses the close is dropped, and its end frees the place.
    inside
        .guest
        .data(channels[0].0, ChannelStream::Stdout, b"late", false)
        .await;
    inside.guest.end(channels[0].0, 143).await;
    inside
        .guest
        .data(channels[1].0, ChannelStream::Stdout, b"here", true)
        .await;
    inside.guest.end(channels[1].0, 0).await;
    assert_eq!(stays.until_exit().await.0, b"here");
    assert_eq!(inside.node.blade.metrics.channels.open(), 0);
}

#[tokio::test]
async fn a_caller_that_does_not_read_holds_up_neither_logs_nor_other_programs() {
    let mut inside = running().await;
    let slow = exec(&inside.client, &["slow"]).await;
    let (channel, _) = inside.guest.opened().await;
    // The guest sends as long as it may; the transport's own windows take some of it, then credit stops coming.
    let mut allowed = CHANNEL_WINDOW;
    let mut sent = 0;
    loop {
        while allowed >= 1024 {
            inside
                .guest
                .data(channel, ChannelStream::Stdout, &[b'x'; 1024], false)
                .await;
            allowed -= 1024;
            sent += 1024;
        }
        match tokio::time::timeout(Duration::from_millis(500), inside.guest.receive()).await {
            Ok(Some(FromHost::Credit(credit))) if credit.stream() == ChannelStream::Stdout => {
                allowed += credit.bytes as usize;
            }
            Ok(Some(FromHost::Credit(_))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(_) => break,
        }
        assert!(sent < 64 << 20, "nobody reads, and credit never ends");
    }
    // Logs and another program go on.
    inside.guest.log(1, "still here\n").await;
    let other = exec(&inside.client, &["other"]).await;
    let (second, _) = inside.guest.opened().await;
    inside.guest.data(second, ChannelStream::Stdout, b"quick", true).await;
    inside.guest.end(second, 0).await;
    assert_eq!(other.until_exit().await.0, b"quick");
    let stored = async {
        while inside.world.output(&vm()).0 != b"still here\n" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), stored)
        .await
        .expect("the log waits");
    // Once it is read, everything is there.
    let reading = tokio::spawn(slow.until_exit());
    inside.guest.end(channel, 0).await;
    assert_eq!(reading.await.unwrap().0.len(), sent);
}

#[tokio::test]
async fn nothing_is_sent_into_what_does_not_exist_yet() {
    let mut inside = running().await;
    let call = exec(&inside.client, &["late"]).await;
    let piece = Piece {
        data: b"early".to_vec(),
        last: true,
    };
    call.send(exec_request::Kind::Stdin(piece)).await;
    let FromHost::Exec(wire) = inside.guest.heard().await else {
        panic!("no Exec")
    };
    // Another program is opened after the input was given: it would come first if the input were not held back.
    let second = exec(&inside.client, &["second"]).await;
    let (other, _) = inside.guest.opened().await;
    let channel = wire.channel;
    inside.guest.send(Kind::Opened(Opened { channel, pid: 1 })).await;
    assert!(matches!(inside.guest.heard().await, FromHost::Data(data) if data.channel == channel && data.last));
    inside.guest.end(channel, 0).await;
    inside.guest.end(other, 0).await;
    call.until_exit().await;
    second.until_exit().await;
}

#[tokio::test]
async fn input_waits_for_the_guests_credit() {
    let mut inside = running().await;
    let call = exec(&inside.client, &["eats"]).await;
    let (channel, _) = inside.guest.opened().await;
    let all: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let piece = Piece {
        data: all.clone(),
        last: true,
    };
    call.send(exec_request::Kind::Stdin(piece)).await;
    let (mut got, mut unacknowledged) = (Vec::new(), 0);
    loop {
        let FromHost::Data(data) = inside.guest.heard().await else {
            panic!("no Data")
        };
        unacknowledged += data.data.len();
        assert!(unacknowledged <= CHANNEL_WINDOW, "{unacknowledged} bytes beyond credit");
        got.extend(data.data);
        if data.last {
            break;
        }
        let credit = Credit {
            channel,
            stream: ChannelStream::Stdin.into(),
            bytes: u32::try_from(unacknowledged).unwrap(),
        };
        inside.guest.send(Kind::Credit(credit)).await;
        unacknowledged = 0;
    }
    assert!(got == all);
    inside.guest.end(channel, 0).await;
    call.until_exit().await;
}

#[tokio::test]
async fn a_lost_connection_ends_calls_and_the_next_one_takes_new_ones() {
    let mut inside = running().await;
    let mut call = exec(&inside.client, &["x"]).await;
    inside.guest.opened().await;
    assert!(matches!(call.next().await, Ok(exec_reply::Kind::Started(_))));
    drop(inside.guest);
    assert_eq!(call.next().await, Err(Code::Unavailable));
    let mut guest = Guest::dial(&inside.world.socket(&vm()), 1, Stage::Running).await;
    guest.welcome().await;
    let call = exec(&inside.client, &["again"]).await;
    let (channel, _) = guest.opened().await;
    guest.end(channel, 5).await;
    assert_eq!(call.until_exit().await.1.how, Some(exec_exit::How::Code(5)));
    assert_eq!(inside.node.blade.metrics.channels.open(), 0);
}

#[tokio::test]
async fn guests_that_break_the_rules_of_channels_are_cut() {
    let data = |channel, stream: ChannelStream, length, last| {
        Kind::Data(Data {
            channel,
            stream: stream.into(),
            data: vec![0; length],
            last,
        })
    };
    let credit = |channel, bytes| {
        Kind::Credit(Credit {
            channel,
            stream: ChannelStream::Stdin.into(),
            bytes,
        })
    };
    type Say = Box<dyn Fn(u32) -> Vec<Kind>>;
    let cases: Vec<(&str, Say)> = vec![
        (
            "data beyond credit",
            Box::new(move |c| vec![data(c, ChannelStream::Stdout, CHANNEL_WINDOW, false); WINDOW / CHANNEL_WINDOW + 1]),
        ),
        (
            "a piece that is too long",
            Box::new(move |c| vec![data(c, ChannelStream::Stdout, CHANNEL_WINDOW + 1, false)]),
        ),
        (
            "empty data",
            Box::new(move |c| vec![data(c, ChannelStream::Stdout, 0, false)]),
        ),
        (
            "a stream it does not have",
            Box::new(move |c| vec![data(c, ChannelStream::Unspecified, 1, false)]),
        ),
        (
            "data after the last",
            Box::new(move |c| {
                vec![
                    data(c, ChannelStream::Stdout, 1, true),
                    data(c, ChannelStream::Stdout, 1, false),
                ]
            }),
        ),
        ("credit for nothing", Box::new(move |c| vec![credit(c, 1)])),
        (
            "opened twice",
            Box::new(|c| vec![Kind::Opened(Opened { channel: c, pid: 1 }); 2]),
        ),
        (
            "a transfer in a program",
            Box::new(|c| {
                vec![Kind::TransferEntry(TransferEntry {
                    channel: c,
                    ..TransferEntry::default()
                })]
            }),
        ),
        (
            "exit code 256",
            Box::new(|c| {
                vec![Kind::ChannelEnd(ChannelEnd {
                    channel: c,
                    how: Some(channel_end::How::Code(256)),
                    ..ChannelEnd::default()
                })]
            }),
        ),
        (
            "an answer to nothing",
            Box::new(|_| {
                vec![Kind::Done(Done {
                    id: 1,
                    error: String::new(),
                })]
            }),
        ),
    ];
    for (why, say) in cases {
        let mut inside = running().await;
        let mut call = exec(&inside.client, &["x"]).await;
        let (channel, _) = inside.guest.opened().await;
        for kind in say(channel) {
            inside.guest.send(kind).await;
        }
        inside.guest.until_cut().await;
        loop {
            match call.next().await {
                Ok(exec_reply::Kind::Exit(exit)) => panic!("{why}: {exit:?}"),
                Ok(_) => {}
                Err(code) => {
                    assert_eq!(code, Code::Unavailable, "{why}");
                    break;
                }
            }
        }
        // The agent itself goes on.
        let mut guest = Guest::dial(&inside.world.socket(&vm()), 1, Stage::Running).await;
        guest.welcome().await;
        guest.exit(0, 0).await;
        assert!(guest.is_acknowledged().await, "{why}");
        inside.world.host.end(&vm(), VmmEnd::Clean);
        inside.node.until_ended().await;
    }
}

#[tokio::test]
async fn messages_of_unknown_channels_and_second_ends_are_dropped() {
    let mut inside = running().await;
    let call = exec(&inside.client, &["x"]).await;
    let (channel, _) = inside.guest.opened().await;
    for unknown in [0, channel + 1, u32::MAX] {
        inside.guest.data(unknown, ChannelStream::Stdout, b"x", false).await;
        inside.guest.end(unknown, 1).await;
        inside
            .guest
            .send(Kind::Opened(Opened {
                channel: unknown,
                pid: 1,
            }))
            .await;
    }
    inside.guest.end(channel, 3).await;
    inside.guest.end(channel, 4).await;
    inside.guest.data(channel, ChannelStream::Stdout, b"late", false).await;
    assert_eq!(call.until_exit().await.1.how, Some(exec_exit::How::Code(3)));
    let call = exec(&inside.client, &["y"]).await;
    let (next, _) = inside.guest.opened().await;
    assert_ne!(next, channel, "numbers are not reused");
    inside.guest.end(next, 0).await;
    call.until_exit().await;
}

#[tokio::test]
async fn calls_say_what_is_wrong() {
    let mut inside = running().await;
    let code = |result: Result<Call, tonic::Status>| result.err().map(|status| status.code());
    let client = &inside.client;
    assert_eq!(
        code(try_exec(client, exec_request::Kind::Signal(1)).await),
        Some(Code::InvalidArgument)
    );
    assert_eq!(
        code(try_exec(client, start(&[], false)).await),
        Some(Code::InvalidArgument)
    );
    assert_eq!(
        code(try_exec(client, start(&["a\0"], false)).await),
        Some(Code::InvalidArgument)
    );
    let stranger = exec_request::Kind::Start(ExecStart {
        identity: Some(proto::Identity {
            uid: "nobody".into(),
            ..proto::Identity::default()
        }),
        argv: vec!["x".into()],
        ..ExecStart::default()
    });
    assert_eq!(code(try_exec(client, stranger).await), Some(Code::NotFound));
    for path in ["relative", "/a/../b", "/a//b", ""] {
        let request = CopyOutRequest {
            identity: whose(),
            path: path.into(),
        };
        let refused = inside.client.copy_out(request).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument, "{path}");
    }
    // What the guest says becomes the call's status.
    for (kind, expected) in [
        (ErrorKind::NotFound, Code::NotFound),
        (ErrorKind::Refused, Code::PermissionDenied),
        (ErrorKind::Busy, Code::ResourceExhausted),
        (ErrorKind::NotRunning, Code::FailedPrecondition),
        (ErrorKind::Invalid, Code::InvalidArgument),
        (ErrorKind::Failed, Code::Unknown),
    ] {
        let mut call = exec(&inside.client, &["x"]).await;
        let FromHost::Exec(wire) = inside.guest.heard().await else {
            panic!("no Exec")
        };
        let end = ChannelEnd {
            channel: wire.channel,
            error: "because".into(),
            kind: kind.into(),
            ..ChannelEnd::default()
        };
        inside.guest.send(Kind::ChannelEnd(end)).await;
        assert_eq!(call.next().await, Err(expected));
    }
    // An ended agent names its phase.
    inside.guest.exit(0, 0).await;
    assert!(inside.guest.is_acknowledged().await);
    inside.world.host.end(&vm(), VmmEnd::Clean);
    inside.node.until_ended().await;
    let refused = try_exec(&inside.client, start(&["x"], false)).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("Ended"), "{refused}");
}

#[tokio::test]
async fn an_agent_that_only_boots_is_not_entered() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    node.until_phase(Phase::Starting).await;
    let client = serve(&world, &node).await;
    let refused = try_exec(&client, start(&["x"], false)).await.err().unwrap();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("Starting"), "{refused}");
}
