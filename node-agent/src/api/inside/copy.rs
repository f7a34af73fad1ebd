//! `CopyIn` and `CopyOut`: files and folders into and out of an agent's root.

use super::{Answers, MAX_PATH, MAX_PIECE, NodeApi, Talk, answers, check_end, check_path, first, lost, no_start};
use crate::{
    control::channels::{Incoming, Over, Sender, is_sound_below},
    metrics::ChannelKind,
};
use far_proto::{
    guest::{ChannelEnd, ChannelStream, Get, Put, TransferEntry, TransferKind, host_message},
    node::{
        CopyEntry, CopyInRequest, CopyKind, CopyOutReply, CopyOutRequest, CopyResult, Piece, copy_in_request,
        copy_out_reply,
    },
};
use futures::FutureExt;
use tonic::{Status, Streaming};

fn bad<T>(text: impl Into<String>) -> Result<T, Status> {
    Err(Status::invalid_argument(text))
}

fn result(end: &ChannelEnd) -> Result<CopyResult, Status> {
    check_end(end)?;
    Ok(CopyResult {
        files: end.files,
        bytes: end.bytes,
        skipped: end.skipped,
    })
}

pub(super) async fn copy_in(api: &NodeApi, mut requests: Streaming<CopyInRequest>) -> Result<CopyResult, Status> {
    let Some(copy_in_request::Kind::Start(start)) = first(&mut requests).await?.kind else {
        return no_start();
    };
    check_path("path", &start.path)?;
    let name = start.name_in_folder;
    if name.len() > 255 || name.contains(['/', '\0']) || matches!(name.as_str(), "." | "..") {
        return bad(format!("name_in_folder: {name:?} is no name of a file"));
    }
    let path = start.path;
    let channel = api
        .open(start.identity.as_ref(), ChannelKind::Put, |channel| {
            host_message::Kind::Put(Put {
                channel,
                path,
                name_in_folder: name,
            })
        })
        .await?;
    let input = pass_on(requests, channel.sender());
    let mut talk = Talk::new(channel, api.supervisor.blade().shutdown.clone(), input);
    loop {
        match talk.next().await? {
            Incoming::End(end) => return result(&end),
            Incoming::Lost => return Err(lost()),
            Incoming::Opened { .. } | Incoming::Data { .. } | Incoming::Entry(_) => {}
        }
    }
}

async fn pass_on(mut requests: Streaming<CopyInRequest>, sender: Sender) -> Result<(), Status> {
    let (mut in_file, mut is_first) = (false, true);
    while let Some(request) = requests.message().await? {
        let sent = match request.kind {
            Some(copy_in_request::Kind::Entry(entry)) => {
                if in_file {
                    return bad("entry: the file before it has no end (a last piece of data)");
                }
                let is_end = entry.kind() == CopyKind::End;
                let entry = check_entry(entry, is_first)?;
                is_first = false;
                in_file = entry.kind() == TransferKind::File;
                let sent = sender.send_entry(entry).await;
                if is_end {
                    // What comes after the end is not read.
                    return Ok(());
                }
                sent
            }
            Some(copy_in_request::Kind::Data(piece)) => {
                if !in_file || piece.data.len() > MAX_PIECE {
                    return bad("data: belongs to no file, or has more than 1 MiB");
                }
                in_file = !piece.last;
                if piece.data.is_empty() && !piece.last {
                    continue;
                }
                sender.send(ChannelStream::Unspecified, &piece.data, piece.last).await
            }
            Some(copy_in_request::Kind::Start(_)) | None => return no_start(),
        };
        if sent == Err(Over) {
            return Ok(()); // The end says why.
        }
    }
    bad("entry: the copy stopped before its end (an entry of kind END)")
}

fn check_entry(entry: CopyEntry, is_first: bool) -> Result<TransferEntry, Status> {
    let kind = match entry.kind() {
        CopyKind::File => TransferKind::File,
        CopyKind::Folder => TransferKind::Folder,
        CopyKind::Symlink => TransferKind::Symlink,
        CopyKind::End => {
            return Ok(TransferEntry {
                kind: TransferKind::End.into(),
                ..TransferEntry::default()
            });
        }
        CopyKind::Unspecified => return bad("entry.kind: unknown"),
    };
    if !is_sound_below(&entry.path) || entry.path.is_empty() != is_first {
        return bad(format!(
            "entry.path: {:?} is not below the copy's path (the first entry is the path itself: empty)",
            entry.path
        ));
    }
    if entry.mode > 0o777 {
        return bad(format!("entry.mode: {:o} is more than 777", entry.mode));
    }
    let is_target = (1..=MAX_PATH).contains(&entry.target.len()) && !entry.target.contains('\0');
    if (kind == TransferKind::Symlink) != is_target {
        return bad(format!(
            "entry.target: a symlink has one, nothing else has ({:?})",
            entry.path
        ));
    }
    Ok(TransferEntry {
        channel: 0,
        kind: kind.into(),
        path: entry.path,
        mode: entry.mode,
        size: entry.size,
        target: entry.target,
        modified_unix_s: entry.modified_unix_s,
    })
}

pub(super) async fn copy_out(api: &NodeApi, request: CopyOutRequest) -> Result<Answers<CopyOutReply>, Status> {
    check_path("path", &request.path)?;
    let path = request.path;
    let channel = api
        .open(request.identity.as_ref(), ChannelKind::Get, |channel| {
            host_message::Kind::Get(Get { channel, path })
        })
        .await?;
    let talk = Talk::new(channel, api.supervisor.blade().shutdown.clone(), async { Ok(()) });
    Ok(answers((talk, false), |(talk, is_over)| step(talk, is_over).boxed()))
}

async fn step(talk: &mut Talk, is_over: &mut bool) -> Result<Option<CopyOutReply>, Status> {
    if *is_over {
        return Ok(None);
    }
    let kind = match talk.next().await? {
        Incoming::Entry(entry) => copy_out_reply::Kind::Entry(told(entry)),
        Incoming::Data { data, last, .. } => copy_out_reply::Kind::Data(Piece { data, last }),
        Incoming::End(end) => {
            *is_over = true;
            copy_out_reply::Kind::Result(result(&end)?)
        }
        Incoming::Opened { .. } | Incoming::Lost => return Err(lost()),
    };
    Ok(Some(CopyOutReply { kind: Some(kind) }))
}

fn told(entry: TransferEntry) -> CopyEntry {
    let kind = match entry.kind() {
        TransferKind::File => CopyKind::File,
        TransferKind::Folder => CopyKind::Folder,
        TransferKind::Symlink => CopyKind::Symlink,
        TransferKind::End | TransferKind::Unspecified => CopyKind::Unspecified,
    };
    CopyEntry {
        kind: kind.into(),
        path: entry.path,
        mode: entry.mode,
        size: entry.size,
        target: entry.target,
        modified_unix_s: entry.modified_unix_s,
    }
}
