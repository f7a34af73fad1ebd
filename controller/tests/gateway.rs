//! The user gateway: who may do what inside which agent, from anywhere, and that a call comes through whole.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::Ordering;

use far_proto::node::{
    AgentStats, CopyEntry, CopyInRequest, CopyInStart, CopyKind, CopyOutRequest, ExecReply, ExecRequest, ExecStart,
    Identity, LogsRequest, Piece, PortForwardRequest, PortForwardStart, StatsRequest, TerminalSize, copy_in_request,
    copy_out_reply, exec_exit, exec_reply, exec_request, port_forward_reply, port_forward_request,
};
use futures::{Stream, StreamExt, stream};
use kube::ResourceExt;
use serde_json::json;
use support::{
    Cluster,
    blade::{FakeBlade, capacity},
    inside::FLOOD,
    until,
    users::{ALL, Bearer, Rule},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

async fn start() -> Cluster {
    Cluster::start_with(|config| config.gateway_listen = Some("127.0.0.1:0".parse().unwrap())).await
}

/// A cluster with blade b1 and agent `a` running on it; answers the agent's uid too.
async fn running() -> (Cluster, FakeBlade, String) {
    let cluster = start().await;
    let blade = FakeBlade::start(&cluster, "b1", capacity(64_000, 65_536)).await;
    let uid = run(&cluster, &blade, "a").await;
    (cluster, blade, uid)
}

async fn run(cluster: &Cluster, blade: &FakeBlade, name: &str) -> String {
    let spec = json!({"image": "i", "nodeName": blade.name});
    let uid = cluster.create(name, spec).await.uid().unwrap();
    until("the blade to have it", async || blade.fake.phase(&uid)).await;
    blade.fake.running(&uid);
    cluster.wait_phase(name, "Running").await;
    uid
}

fn named(name: &str) -> Option<Identity> {
    Some(Identity {
        namespace: "default".into(),
        name: name.into(),
        ..Identity::default()
    })
}

fn exec(identity: Option<Identity>, program: &str) -> ExecRequest {
    ExecRequest {
        kind: Some(exec_request::Kind::Start(ExecStart {
            identity,
            argv: vec![program.into()],
            stdin: true,
            ..ExecStart::default()
        })),
    }
}

fn input(data: &[u8], last: bool) -> ExecRequest {
    ExecRequest {
        kind: Some(exec_request::Kind::Stdin(Piece {
            data: data.to_vec(),
            last,
        })),
    }
}

/// The requests, and then nothing for ever: a caller that is still there.
fn and_stay<T: Send + 'static>(requests: Vec<T>) -> impl Stream<Item = T> + Send + 'static {
    stream::iter(requests).chain(stream::pending())
}

/// Standard output, standard error and the exit code.
async fn outcome(mut replies: Streaming<ExecReply>) -> Result<(Vec<u8>, Vec<u8>, u32), Status> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while let Some(reply) = replies.message().await? {
        match reply.kind {
            Some(exec_reply::Kind::Stdout(data)) => out.extend(data),
            Some(exec_reply::Kind::Stderr(data)) => err.extend(data),
            Some(exec_reply::Kind::Exit(exit)) => match exit.how {
                Some(exec_exit::How::Code(code)) => return Ok((out, err, code)),
                other => panic!("{other:?}"),
            },
            Some(exec_reply::Kind::Started(_)) | None => {}
        }
    }
    Err(Status::data_loss("no exit code came"))
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_goes_through_whole_and_its_exit_code_comes_back() {
    let (cluster, blade, uid) = running().await;
    let token = cluster.user("jane", ALL).await;
    let mut client = cluster.inside(&token).await;
    let size = TerminalSize { rows: 40, columns: 100 };
    let mut requests = vec![
        exec(named("a"), "cat"),
        ExecRequest {
            kind: Some(exec_request::Kind::Resize(size)),
        },
        ExecRequest {
            kind: Some(exec_request::Kind::Signal(2)),
        },
    ];
    // More than every window on the way.
    let data: Vec<u8> = (0..1_500_000_u32).map(|n| (n % 251) as u8).collect();
    requests.extend(data.chunks(50_000).map(|piece| input(piece, false)));
    requests.push(input(b"", true));
    let replies = client.exec(and_stay(requests)).await.unwrap().into_inner();
    let (out, err, code) = outcome(replies).await.unwrap();
    assert!(out == data, "{} of {} bytes came back", out.len(), data.len());
    assert_eq!(
        (String::from_utf8(err).unwrap().as_str(), code),
        ("40x100\nsignal 2\n", 7)
    );
    let (_, asked) = blade.fake.inside.calls()[0].clone();
    assert_eq!(
        (asked.uid, asked.attempt, asked.namespace.as_str(), asked.name.as_str()),
        (uid, 1, "default", "a"),
        "the identity is the API's, not the caller's"
    );
    until("the call to be over on the blade", async || {
        (blade.fake.inside.open.load(Ordering::SeqCst) == 0).then_some(())
    })
    .await;
    let refused = client
        .exec(and_stay(vec![exec(named("a"), "refuses")]))
        .await
        .err()
        .unwrap();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::NotFound, "no such program: refuses")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_caller_says_decides_neither_blade_nor_agent() {
    let (cluster, blade, uid) = running().await;
    let other = run(&cluster, &blade, "other").await;
    let token = cluster
        .user("jane", &[Rule(&["create"], "faragents/exec", &["a"])])
        .await;
    let mut client = cluster.inside(&token).await;
    let mut asked = named("a").unwrap();
    for (why, uid, attempt, expected) in [
        (
            "another agent's uid under a name that is allowed",
            other.as_str(),
            0,
            Code::NotFound,
        ),
        ("an attempt that never was", uid.as_str(), 9, Code::NotFound),
    ] {
        asked.uid = uid.into();
        asked.attempt = attempt;
        let refused = client
            .exec(and_stay(vec![exec(Some(asked.clone()), "cat")]))
            .await
            .err()
            .unwrap();
        assert_eq!(refused.code(), expected, "{why}: {refused}");
    }
    for (why, identity) in [
        ("no identity", None),
        ("no name", named("")),
        ("a path as a name", named("a/../other")),
        (
            "only a uid",
            Some(Identity {
                uid: uid.clone(),
                ..Identity::default()
            }),
        ),
    ] {
        let refused = client.exec(and_stay(vec![exec(identity, "cat")])).await.err().unwrap();
        assert_eq!(refused.code(), Code::InvalidArgument, "{why}: {refused}");
    }
    assert_eq!(blade.fake.inside.calls(), [], "the blade heard of none of these");
    // A second start in the middle of a call would name another agent.
    let requests = vec![exec(named("a"), "cat"), exec(named("other"), "cat")];
    let refused = match client.exec(and_stay(requests)).await {
        Ok(replies) => outcome(replies.into_inner()).await.unwrap_err(),
        Err(refused) => refused,
    };
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(blade.fake.inside.calls().iter().all(|(_, asked)| asked.uid == uid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_may_read_agents_but_not_exec_is_refused() {
    let (cluster, blade, _) = running().await;
    blade.fake.inside.says("one");
    let reads = [
        Rule(&["get", "list", "watch"], "faragents", &[]),
        Rule(&["get"], "faragents/log", &[]),
    ];
    let token = cluster.user("reader", &reads).await;
    let mut client = cluster.inside(&token).await;
    let refused = client
        .exec(and_stay(vec![exec(named("a"), "cat")]))
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(
        refused.message(),
        "faragents.tiffany.dev \"a\" is forbidden: User \"system:serviceaccount:default:reader\" cannot create resource \
         \"faragents/exec\" in API group \"tiffany.dev\" in the namespace \"default\""
    );
    let copy = copy_in_request::Kind::Start(CopyInStart {
        identity: named("a"),
        path: "/x".into(),
        ..CopyInStart::default()
    });
    let copied = client.copy_in(and_stay(vec![CopyInRequest { kind: Some(copy) }])).await;
    let out = client
        .copy_out(CopyOutRequest {
            identity: named("a"),
            path: "/x".into(),
        })
        .await;
    let forward = port_forward_request::Kind::Start(PortForwardStart {
        identity: named("a"),
        port: 7777,
    });
    let forwarded = client
        .port_forward(and_stay(vec![PortForwardRequest { kind: Some(forward) }]))
        .await;
    let one = client.stats(StatsRequest { identity: named("a") }).await;
    let all = client.stats(StatsRequest { identity: named("") }).await;
    for (what, code) in [
        ("cp in", copied.err().unwrap().code()),
        ("cp out", out.err().unwrap().code()),
        ("port-forward", forwarded.err().unwrap().code()),
        ("top of one", one.err().unwrap().code()),
        ("top of all", all.err().unwrap().code()),
    ] {
        assert_eq!(code, Code::PermissionDenied, "{what}");
    }
    // An agent that does not exist is refused alike: nothing is learned.
    let nobody = client
        .exec(and_stay(vec![exec(named("nobody"), "cat")]))
        .await
        .err()
        .unwrap();
    assert_eq!(nobody.code(), Code::PermissionDenied);
    let mut chunks = cluster
        .output(&token)
        .await
        .logs(LogsRequest {
            identity: named("a"),
            ..LogsRequest::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(chunks.message().await.unwrap().unwrap().data, b"one\n");
    let kinds: Vec<_> = blade.fake.inside.calls().into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, ["logs"], "the blade heard of nothing that was refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_end_at_their_namespace_and_their_names() {
    let (cluster, blade, _) = running().await;
    run(&cluster, &blade, "b").await;
    let token = cluster
        .user("jane", &[Rule(&["create"], "faragents/exec", &["a"])])
        .await;
    let mut client = cluster.inside(&token).await;
    let start = |identity| and_stay(vec![exec(identity, "cat"), input(b"", true)]);
    let replies = client.exec(start(named("a"))).await.unwrap().into_inner();
    assert_eq!(outcome(replies).await.unwrap().2, 7);
    let elsewhere = Some(Identity {
        namespace: "kube-system".into(),
        name: "a".into(),
        ..Identity::default()
    });
    for identity in [named("b"), elsewhere] {
        let refused = client.exec(start(identity)).await.err().unwrap();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
    // The right to the whole cluster's numbers is another one than to a namespace's.
    let stats = cluster.user("numbers", &[Rule(&["get"], "faragents/stats", &[])]).await;
    let mut client = cluster.inside(&stats).await;
    assert!(client.stats(StatsRequest { identity: named("") }).await.is_ok());
    let all = client.stats(StatsRequest { identity: None }).await.err().unwrap();
    assert_eq!(all.code(), Code::PermissionDenied);
    assert!(all.message().contains("at the cluster scope"), "{all}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_good_token_of_the_cluster_comes_in() {
    let (cluster, blade, _) = running().await;
    let good = cluster.user("jane", ALL).await;
    let foreign = cluster.token("jane", &["somebody-else"]).await;
    for (why, header) in [
        ("no token", String::new()),
        ("no scheme", good.clone()),
        ("another scheme", format!("Basic {good}")),
        ("garbage", "Bearer garbage".to_owned()),
        ("half a token", format!("Bearer {}", &good[..good.len() / 2])),
        ("a long one", format!("Bearer {}", "x".repeat(17_000))),
        ("another audience", format!("Bearer {foreign}")),
    ] {
        let channel = cluster.gateway_channel().await;
        let mut client = far_proto::node::inside_client::InsideClient::with_interceptor(channel, Bearer::new(&header));
        let refused = client
            .exec(and_stay(vec![exec(named("a"), "cat")]))
            .await
            .err()
            .unwrap();
        assert_eq!(refused.code(), Code::Unauthenticated, "{why}: {refused}");
    }
    assert_eq!(blade.fake.inside.calls(), []);
    let accounts: kube::Api<k8s_openapi::api::core::v1::ServiceAccount> =
        kube::Api::default_namespaced(cluster.client.clone());
    accounts.delete("jane", &Default::default()).await.unwrap();
    let mut client = cluster.inside(&good).await;
    let refused = client
        .exec(and_stay(vec![exec(named("a"), "cat")]))
        .await
        .err()
        .unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated, "its account is gone: {refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_with_an_audience_takes_tokens_for_it_and_no_others() {
    let cluster = Cluster::start_with(|config| {
        config.gateway_listen = Some("127.0.0.1:0".parse().unwrap());
        config.gateway_audience = vec!["far-gateway".into()];
    })
    .await;
    cluster.account("jane").await;
    cluster.allow("jane", "default", ALL).await;
    for (audiences, expected) in [
        (&["far-gateway"][..], Code::NotFound),
        (&["far-gateway", "more"], Code::NotFound),
        (&[], Code::Unauthenticated),
        (&["more"], Code::Unauthenticated),
    ] {
        let mut client = cluster.inside(&cluster.token("jane", audiences).await).await;
        let refused = client
            .exec(and_stay(vec![exec(named("nobody"), "cat")]))
            .await
            .err()
            .unwrap();
        assert_eq!(refused.code(), expected, "{audiences:?}: {refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_ports_come_through_both_ways() {
    let (cluster, blade, _) = running().await;
    let token = cluster.user("jane", ALL).await;
    let mut client = cluster.inside(&token).await;
    let big: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    let entry = |kind: CopyKind, path: &str| {
        copy_in_request::Kind::Entry(CopyEntry {
            kind: kind.into(),
            path: path.into(),
            ..CopyEntry::default()
        })
    };
    let mut kinds = vec![
        copy_in_request::Kind::Start(CopyInStart {
            identity: named("a"),
            path: "/tmp/x".into(),
            ..CopyInStart::default()
        }),
        entry(CopyKind::Folder, ""),
        entry(CopyKind::File, "big"),
    ];
    kinds.extend(big.chunks(100_000).map(|piece| {
        copy_in_request::Kind::Data(Piece {
            data: piece.to_vec(),
            last: false,
        })
    }));
    kinds.push(entry(CopyKind::End, ""));
    let requests: Vec<_> = kinds
        .into_iter()
        .map(|kind| CopyInRequest { kind: Some(kind) })
        .collect();
    let result = client.copy_in(stream::iter(requests)).await.unwrap().into_inner();
    assert_eq!((result.files, result.bytes), (1, big.len() as u64));
    assert!(blade.fake.inside.copied()["/tmp/x/big"] == big);
    let mut replies = client
        .copy_out(CopyOutRequest {
            identity: named("a"),
            path: "/tmp/x".into(),
        })
        .await
        .unwrap()
        .into_inner();
    let mut back = Vec::new();
    while let Some(reply) = replies.message().await.unwrap() {
        if let Some(copy_out_reply::Kind::Data(piece)) = reply.kind {
            back.extend(piece.data);
        }
    }
    assert!(back == big, "{} of {} bytes came back", back.len(), big.len());

    let (send, requests) = mpsc::channel(1);
    let start = |port| PortForwardRequest {
        kind: Some(port_forward_request::Kind::Start(PortForwardStart {
            identity: named("a"),
            port,
        })),
    };
    send.send(start(7777)).await.unwrap();
    let mut replies = client
        .port_forward(ReceiverStream::new(requests))
        .await
        .unwrap()
        .into_inner();
    let opened = replies.message().await.unwrap().unwrap().kind;
    assert!(
        matches!(opened, Some(port_forward_reply::Kind::Opened(_))),
        "{opened:?}"
    );
    for n in 0..3_u8 {
        let piece = Piece {
            data: vec![n; 10],
            last: n == 2,
        };
        let sent = PortForwardRequest {
            kind: Some(port_forward_request::Kind::Data(piece.clone())),
        };
        send.send(sent).await.unwrap();
        let back = replies.message().await.unwrap().unwrap().kind;
        assert_eq!(back, Some(port_forward_reply::Kind::Data(piece)), "a half-close too");
    }
    drop(send);
    assert_eq!(replies.message().await.unwrap(), None);
    let nobody = client.port_forward(and_stay(vec![start(1)])).await.err().unwrap();
    assert_eq!(nobody.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_ends_its_call_on_the_blade() {
    let (cluster, blade, _) = running().await;
    let token = cluster.user("jane", ALL).await;
    let open = async |count: usize| {
        until(&format!("{count} calls to be open on the blade"), async || {
            (blade.fake.inside.open.load(Ordering::SeqCst) == count).then_some(())
        })
        .await;
    };
    let mut client = cluster.inside(&token).await;
    let hold = async |client: &mut far_proto::node::inside_client::InsideClient<_>| {
        let (send, requests) = mpsc::channel(1);
        send.send(exec(named("a"), "hold")).await.unwrap();
        let replies = client.exec(ReceiverStream::new(requests)).await.unwrap();
        (send, replies)
    };
    let call = hold(&mut client).await;
    open(1).await;
    // The call only.
    drop(call);
    open(0).await;
    // A copy in the middle of a file: the blade must not take it for whole.
    let (send, requests) = mpsc::channel(1);
    let copying = tokio::spawn({
        let mut client = client.clone();
        async move { client.copy_in(ReceiverStream::new(requests)).await }
    });
    let start = copy_in_request::Kind::Start(CopyInStart {
        identity: named("a"),
        path: "/x".into(),
        ..CopyInStart::default()
    });
    send.send(CopyInRequest { kind: Some(start) }).await.unwrap();
    open(1).await;
    copying.abort();
    drop(send);
    open(0).await;
    assert!(blade.fake.inside.copied().is_empty());
    // The whole connection.
    let call = hold(&mut client).await;
    open(1).await;
    drop((client, call));
    open(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_does_not_read_holds_up_the_program_and_nobody_else() {
    let (cluster, blade, _) = running().await;
    let token = cluster.user("jane", ALL).await;
    let mut client = cluster.inside(&token).await;
    let mut stalled = Vec::new();
    for _ in 0..40 {
        stalled.push(client.exec(and_stay(vec![exec(named("a"), "flood")])).await.unwrap());
    }
    // On the same blade and the same connection, and on another.
    for mut client in [client.clone(), cluster.inside(&token).await] {
        let mut requests = vec![exec(named("a"), "cat")];
        requests.extend((0..64).map(|_| input(&[1; 32_000], false)));
        requests.push(input(b"", true));
        let replies = client.exec(and_stay(requests)).await.unwrap().into_inner();
        assert_eq!(outcome(replies).await.unwrap().0.len(), 64 * 32_000);
    }
    // Each could have printed for all that time: what the windows and buffers of two connections hold is all it could.
    let most = 40 * (4 << 20);
    let flooded = blade.fake.inside.flooded.load(Ordering::SeqCst);
    assert!(
        (40 * FLOOD as u64..most).contains(&flooded),
        "{flooded} bytes were taken from the programs"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_controller_is_said_and_the_next_one_serves_at_the_same_place() {
    let (mut cluster, blade, _) = running().await;
    let token = cluster.user("jane", ALL).await;
    let mut client = cluster.inside(&token).await;
    let mut replies = client
        .exec(and_stay(vec![exec(named("a"), "hold")]))
        .await
        .unwrap()
        .into_inner();
    let place = cluster.gateway;
    let ended = tokio::spawn(async move { replies.message().await });
    cluster.stop_controller().await;
    let status = ended.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("controller ends"), "{status}");
    cluster
        .start_controller(|config| config.gateway_listen = Some("127.0.0.1:0".parse().unwrap()))
        .await;
    assert_eq!(cluster.gateway, place, "the remembered port");
    until("the blade to be reached again", async || {
        let replies = client
            .exec(and_stay(vec![exec(named("a"), "cat"), input(b"", true)]))
            .await;
        outcome(replies.ok()?.into_inner()).await.ok()
    })
    .await;
    drop(blade);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_gateway_is_is_published_with_its_ca() {
    let cluster = start().await;
    let maps: kube::Api<k8s_openapi::api::core::v1::ConfigMap> =
        kube::Api::namespaced(cluster.client.clone(), "far-system");
    let data = until("the ConfigMap", async || {
        maps.get_opt("far-gateway").await.unwrap()?.data
    })
    .await;
    assert_eq!(data["endpoint"], cluster.gateway.unwrap().to_string());
    assert_eq!(data["ca.crt"], std::fs::read_to_string(cluster.ca_file()).unwrap());
    assert_eq!(data.len(), 2, "nothing else: everybody may read it");
}

#[tokio::test(flavor = "multi_thread")]
async fn top_asks_every_blade_and_believes_each_only_about_its_own() {
    let (cluster, one, uid) = running().await;
    let mut two = FakeBlade::start(&cluster, "b2", capacity(64_000, 65_536)).await;
    let other = run(&cluster, &two, "b").await;
    // Blade two speaks of blade one's agent, and of one that never was.
    let lie = |uid: &str| AgentStats {
        identity: Some(Identity {
            uid: uid.into(),
            attempt: 1,
            namespace: "default".into(),
            name: "a".into(),
        }),
        processes: 666,
        ..AgentStats::default()
    };
    *two.fake.inside.lies.lock().unwrap() = vec![lie(&uid), lie("nobody"), lie(&other)];
    let token = cluster.user("jane", ALL).await;
    let mut client = cluster.inside(&token).await;
    let top = async |client: &mut far_proto::node::inside_client::InsideClient<_>| {
        let answer = client.stats(StatsRequest { identity: named("") }).await.unwrap();
        let unreached = answer
            .metadata()
            .get("far-unreached")
            .map(|names| names.to_str().unwrap().to_owned());
        let mut names: Vec<_> = answer
            .into_inner()
            .agents
            .into_iter()
            .map(|agent| (agent.identity.unwrap().name, agent.processes))
            .collect();
        names.sort();
        (names, unreached)
    };
    assert_eq!(top(&mut client).await, (vec![("a".into(), 0), ("b".into(), 0)], None));
    let alone = client
        .stats(StatsRequest { identity: named("b") })
        .await
        .unwrap()
        .into_inner();
    assert_eq!((alone.agents.len(), alone.agents[0].processes), (1, 0));
    two.stop_serving().await;
    assert_eq!(top(&mut client).await, (vec![("a".into(), 0)], Some("b2".into())));
    drop(one);
}

#[tokio::test(flavor = "multi_thread")]
async fn followed_output_comes_as_it_is_said() {
    let (cluster, blade, _) = running().await;
    let token = cluster.user("jane", ALL).await;
    blade.fake.inside.says("one");
    let request = LogsRequest {
        identity: named("a"),
        follow: true,
        ..LogsRequest::default()
    };
    let mut chunks = cluster.output(&token).await.logs(request).await.unwrap().into_inner();
    assert_eq!(chunks.message().await.unwrap().unwrap().data, b"one\n");
    blade.fake.inside.says("two");
    let second = chunks.message().await.unwrap().unwrap();
    assert_eq!((second.data.as_slice(), second.seq), (b"two\n".as_slice(), 2));
    // The blade dies: said, not hung.
    blade.die().await;
    assert_eq!(
        chunks.message().await.err().map(|status| status.code()),
        Some(Code::Unavailable)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_health_are_on_listeners_of_their_own() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let any = Some("127.0.0.1:0".parse().unwrap());
    let mut pages = None;
    let cluster = Cluster::start_with(|config| {
        config.gateway_listen = any;
        // Fixed, so that the test knows them: bound and let go at once.
        let free = || {
            std::net::TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
        };
        let (metrics, health) = (free(), free());
        config.metrics_listen = Some(metrics);
        config.health_listen = Some(health);
        pages = Some((metrics, health));
    })
    .await;
    let (metrics, health) = pages.unwrap();
    let get = async |address: std::net::SocketAddr, path: &str| {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    assert!(get(health, "/healthz").await.starts_with("HTTP/1.1 200"));
    until("the controller to be ready", async || {
        get(health, "/readyz").await.starts_with("HTTP/1.1 200").then_some(())
    })
    .await;
    assert!(get(health, "/metrics").await.starts_with("HTTP/1.1 404"), "not here");
    assert!(get(metrics, "/healthz").await.starts_with("HTTP/1.1 404"), "nor there");
    let blade = FakeBlade::start(&cluster, "b1", capacity(64_000, 65_536)).await;
    run(&cluster, &blade, "a").await;
    let token = cluster.user("jane", ALL).await;
    let mut client = cluster.inside(&token).await;
    let replies = client
        .exec(and_stay(vec![exec(named("a"), "cat"), input(b"", true)]))
        .await
        .unwrap();
    outcome(replies.into_inner()).await.unwrap();
    drop(client);
    until("the call to be counted", async || {
        let text = get(metrics, "/metrics").await;
        let has = |line: &str| text.lines().any(|one| one == line);
        has("far_controller_gateway_calls_total{action=\"exec\",outcome=\"ok\"} 1").then_some(())
    })
    .await;
    let text = get(metrics, "/metrics").await;
    for line in [
        "far_controller_leads 1",
        "far_controller_agents{state=\"placed\"} 1",
        "far_controller_blades{state=\"connected\"} 1",
        "far_controller_joins_total{outcome=\"ok\"} 1",
        "far_controller_gateway_calls_total{action=\"exec\",outcome=\"denied\"} 0",
    ] {
        assert!(text.lines().any(|one| one == line), "{line} is not in\n{text}");
    }
    assert!(
        !text.contains("jane") && !text.contains("b1") && !text.contains("default"),
        "no names in labels:\n{text}"
    );
}
