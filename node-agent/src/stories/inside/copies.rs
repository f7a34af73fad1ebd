//! Files that go into agents and come out of them.

use super::*;

fn entry(kind: proto::CopyKind, path: &str) -> copy_in_request::Kind {
    copy_in_request::Kind::Entry(proto::CopyEntry {
        kind: kind.into(),
        path: path.into(),
        mode: 0o640,
        ..proto::CopyEntry::default()
    })
}

fn copy_in_start() -> copy_in_request::Kind {
    copy_in_request::Kind::Start(proto::CopyInStart {
        identity: whose(),
        path: "/data".into(),
        name_in_folder: "folder".into(),
    })
}

fn copy_in(
    client: &InsideClient<Channel>,
    kinds: Vec<copy_in_request::Kind>,
) -> tokio::task::JoinHandle<Result<proto::CopyResult, tonic::Status>> {
    let requests: Vec<_> = kinds
        .into_iter()
        .map(|kind| CopyInRequest { kind: Some(kind) })
        .collect();
    let mut client = client.clone();
    tokio::spawn(async move {
        let answer = client.copy_in(tokio_stream::iter(requests)).await?;
        Ok(answer.into_inner())
    })
}

#[tokio::test]
async fn files_go_in_with_their_modes_and_the_end_is_told() {
    let mut inside = running().await;
    let call = copy_in(
        &inside.client,
        vec![
            copy_in_start(),
            entry(proto::CopyKind::Folder, ""),
            entry(proto::CopyKind::File, "a"),
            copy_in_request::Kind::Data(Piece {
                data: vec![7; 40_000],
                last: true,
            }),
            entry(proto::CopyKind::End, ""),
        ],
    );
    let FromHost::Put(put) = inside.guest.heard().await else {
        panic!("no Put")
    };
    assert_eq!((put.path.as_str(), put.name_in_folder.as_str()), ("/data", "folder"));
    let (mut bytes, mut entries) = (0, Vec::new());
    loop {
        match inside.guest.heard().await {
            FromHost::TransferEntry(entry) if entry.kind() == TransferKind::End => break,
            FromHost::TransferEntry(entry) => entries.push((entry.path, entry.mode)),
            FromHost::Data(data) => {
                bytes += data.data.len();
                let credit = Credit {
                    channel: put.channel,
                    stream: 0,
                    bytes: u32::try_from(data.data.len()).unwrap(),
                };
                inside.guest.send(Kind::Credit(credit)).await;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bytes, 40_000);
    assert_eq!(entries, [(String::new(), 0o640), ("a".to_owned(), 0o640)]);
    let end = ChannelEnd {
        channel: put.channel,
        files: 1,
        bytes: 40_000,
        ..ChannelEnd::default()
    };
    inside.guest.send(Kind::ChannelEnd(end)).await;
    let result = call.await.unwrap().unwrap();
    assert_eq!((result.files, result.bytes), (1, 40_000));
}

#[tokio::test]
async fn copies_that_leave_their_path_or_stop_early_are_refused() {
    let mut inside = running().await;
    let folder = || entry(proto::CopyKind::Folder, "");
    for (why, kinds) in [
        (
            "up",
            vec![copy_in_start(), folder(), entry(proto::CopyKind::File, "../x")],
        ),
        (
            "absolute",
            vec![copy_in_start(), folder(), entry(proto::CopyKind::File, "/x")],
        ),
        ("two roots", vec![copy_in_start(), folder(), folder()]),
        ("no root", vec![copy_in_start(), entry(proto::CopyKind::File, "a")]),
        ("no end", vec![copy_in_start(), folder()]),
        (
            "file without its end",
            vec![copy_in_start(), entry(proto::CopyKind::File, ""), folder()],
        ),
        (
            "data of nothing",
            vec![copy_in_start(), copy_in_request::Kind::Data(Piece::default())],
        ),
    ] {
        let status = copy_in(&inside.client, kinds).await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{why}: {status}");
        // The guest is told to give it up.
        loop {
            if let FromHost::Close(close) = inside.guest.heard().await {
                inside
                    .guest
                    .send(Kind::ChannelEnd(ChannelEnd {
                        channel: close.channel,
                        ..ChannelEnd::default()
                    }))
                    .await;
                break;
            }
        }
    }
}

fn told(channel: u32, kind: TransferKind, path: &str) -> Kind {
    Kind::TransferEntry(TransferEntry {
        channel,
        kind: kind.into(),
        path: path.into(),
        mode: 0o600,
        target: if kind == TransferKind::Symlink {
            "t".into()
        } else {
            String::new()
        },
        ..TransferEntry::default()
    })
}

#[tokio::test]
async fn files_come_out_and_hostile_trees_do_not() {
    let mut inside = running().await;
    let request = CopyOutRequest {
        identity: whose(),
        path: "/data".into(),
    };
    let mut answers = inside.client.copy_out(request.clone()).await.unwrap().into_inner();
    let FromHost::Get(get) = inside.guest.heard().await else {
        panic!("no Get")
    };
    let channel = get.channel;
    inside.guest.send(told(channel, TransferKind::Folder, "")).await;
    inside.guest.send(told(channel, TransferKind::File, "a")).await;
    inside
        .guest
        .data(channel, ChannelStream::Unspecified, b"abc", true)
        .await;
    inside.guest.send(told(channel, TransferKind::Symlink, "l")).await;
    inside
        .guest
        .send(Kind::ChannelEnd(ChannelEnd {
            channel,
            files: 1,
            bytes: 3,
            skipped: 2,
            ..ChannelEnd::default()
        }))
        .await;
    let mut seen = Vec::new();
    while let Some(reply) = answers.message().await.unwrap() {
        seen.push(match reply.kind.unwrap() {
            copy_out_reply::Kind::Entry(entry) => format!("{:?} {:o} {}", entry.kind(), entry.mode, entry.path),
            copy_out_reply::Kind::Data(piece) => format!("{} bytes {}", piece.data.len(), piece.last),
            copy_out_reply::Kind::Result(result) => format!("{} {}", result.bytes, result.skipped),
        });
    }
    assert_eq!(
        seen,
        ["Folder 600 ", "File 600 a", "3 bytes true", "Symlink 600 l", "3 2"]
    );

    for (why, path, kind) in [
        ("up", "../x", TransferKind::Folder),
        ("hidden up", "a/../../x", TransferKind::Folder),
        ("absolute", "/x", TransferKind::Folder),
        ("two roots", "", TransferKind::Folder),
        ("an end", "x", TransferKind::End),
    ] {
        let mut inside = running().await;
        let mut answers = inside.client.copy_out(request.clone()).await.unwrap().into_inner();
        let FromHost::Get(get) = inside.guest.heard().await else {
            panic!("no Get")
        };
        inside.guest.send(told(get.channel, TransferKind::Folder, "")).await;
        inside.guest.send(told(get.channel, kind, path)).await;
        inside.guest.until_cut().await;
        let status = loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{why}: ended well"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::Unavailable, "{why}");
    }
}
