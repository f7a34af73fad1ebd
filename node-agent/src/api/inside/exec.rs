//! `Exec`: a program beside the payload, with or without a terminal.

use super::{Answers, MAX_PIECE, NodeApi, Talk, answers, check_end, check_path, first, lost, no_start};
use crate::{
    control::channels::{Incoming, Sender},
    metrics::ChannelKind,
};
use far_proto::{
    guest::{self, ChannelEnd, ChannelStream, ExecResize, ExecSignal, channel_end::How, host_message},
    node::{
        ExecExit, ExecReply, ExecRequest, ExecStart, ExecStarted, TerminalSize, exec_exit, exec_reply, exec_request,
    },
};
use futures::FutureExt;
use tonic::{Status, Streaming};

/// Arguments and environment together (control.proto), bytes.
const MAX_WORDS: usize = 512 << 10;
/// Longest name of a user and group.
const MAX_USER: usize = 256;

pub(super) async fn exec(api: &NodeApi, mut requests: Streaming<ExecRequest>) -> Result<Answers<ExecReply>, Status> {
    let Some(exec_request::Kind::Start(start)) = first(&mut requests).await?.kind else {
        return no_start();
    };
    check(&start)?;
    let takes_input = start.stdin;
    let identity = start.identity.clone();
    let channel = api
        .open(identity.as_ref(), ChannelKind::Exec, |number| {
            host_message::Kind::Exec(message(number, start))
        })
        .await?;
    let input = pass_on(requests, channel.sender(), takes_input);
    let shutdown = api.supervisor.blade().shutdown.clone();
    let talk = Talk::new(channel, shutdown, input);
    Ok(answers((talk, false), |(talk, is_over)| step(talk, is_over).boxed()))
}

fn check(start: &ExecStart) -> Result<(), Status> {
    let bad = |text: String| Err(Status::invalid_argument(text));
    if start.argv.first().is_none_or(String::is_empty) {
        return bad("argv: names no program".to_owned());
    }
    if start.argv.iter().any(|word| word.contains('\0')) {
        return bad("argv: contains a NUL".to_owned());
    }
    for env in &start.env {
        if !(1..=255).contains(&env.name.len()) || env.name.contains(['=', '\0']) || env.value.contains('\0') {
            return bad(format!("env: {:?} cannot be a variable", env.name));
        }
    }
    let words = start.argv.iter().map(String::len).sum::<usize>();
    let variables = start
        .env
        .iter()
        .map(|env| env.name.len() + env.value.len() + 2)
        .sum::<usize>();
    if words + start.argv.len() + variables > MAX_WORDS {
        return bad(format!("argv: together with env at most {MAX_WORDS} bytes"));
    }
    if !start.working_dir.is_empty() {
        check_path("working_dir", &start.working_dir)?;
    }
    if start.user.len() > MAX_USER || start.user.contains('\0') {
        return bad(format!("user: at most {MAX_USER} bytes, no NUL"));
    }
    Ok(())
}

fn size(size: TerminalSize) -> guest::TerminalSize {
    guest::TerminalSize {
        rows: size.rows.clamp(1, 65535),
        columns: size.columns.clamp(1, 65535),
    }
}

fn message(channel: u32, start: ExecStart) -> guest::Exec {
    guest::Exec {
        channel,
        argv: start.argv,
        env: start
            .env
            .into_iter()
            .map(|env| guest::EnvVar {
                name: env.name,
                value: env.value,
            })
            .collect(),
        working_dir: start.working_dir,
        user: start.user,
        terminal: start.terminal.map(size),
        stdin: start.stdin,
    }
}

/// What the caller sends after the start.
async fn pass_on(mut requests: Streaming<ExecRequest>, sender: Sender, takes_input: bool) -> Result<(), Status> {
    let mut is_open = takes_input;
    while let Some(request) = requests.message().await? {
        let sent = match request.kind {
            Some(exec_request::Kind::Stdin(piece)) => {
                if !is_open {
                    return Err(Status::invalid_argument("stdin: was not announced, or is over"));
                }
                if piece.data.len() > MAX_PIECE {
                    return Err(Status::invalid_argument("stdin: at most 1 MiB in one message"));
                }
                if piece.data.is_empty() && !piece.last {
                    continue;
                }
                is_open = !piece.last;
                sender.send(ChannelStream::Stdin, &piece.data, piece.last).await
            }
            Some(exec_request::Kind::Resize(to)) => {
                let size = Some(size(to));
                sender
                    .tell(|channel| host_message::Kind::ExecResize(ExecResize { channel, size }))
                    .await
            }
            Some(exec_request::Kind::Signal(number @ 1..=64)) => {
                sender
                    .tell(|channel| host_message::Kind::ExecSignal(ExecSignal { channel, number }))
                    .await
            }
            Some(exec_request::Kind::Signal(_)) => return Err(Status::invalid_argument("signal: must be 1 to 64")),
            Some(exec_request::Kind::Start(_)) | None => return no_start(),
        };
        if sent.is_err() {
            return Ok(()); // It ended: the answers tell.
        }
    }
    // Nothing comes any more, so no input either.
    if is_open {
        let _ = sender.send(ChannelStream::Stdin, &[], true).await;
    }
    Ok(())
}

async fn step(talk: &mut Talk, is_over: &mut bool) -> Result<Option<ExecReply>, Status> {
    if *is_over {
        return Ok(None);
    }
    loop {
        let kind = match talk.next().await? {
            Incoming::Opened { pid } => exec_reply::Kind::Started(ExecStarted { pid }),
            Incoming::Data { data, .. } if data.is_empty() => continue,
            Incoming::Data {
                stream: ChannelStream::Stderr,
                data,
                ..
            } => exec_reply::Kind::Stderr(data),
            Incoming::Data { data, .. } => exec_reply::Kind::Stdout(data),
            Incoming::End(end) => {
                *is_over = true;
                exec_reply::Kind::Exit(exit(end)?)
            }
            Incoming::Entry(_) | Incoming::Lost => return Err(lost()),
        };
        return Ok(Some(ExecReply { kind: Some(kind) }));
    }
}

/// A program that ran, or could not be started for a reason of its own, has an exit; everything else is an error.
fn exit(end: ChannelEnd) -> Result<ExecExit, Status> {
    let how = match end.how {
        Some(How::Code(code)) => exec_exit::How::Code(code),
        Some(How::Signal(signal)) => exec_exit::How::Signal(signal),
        None => {
            check_end(&end)?;
            return Err(Status::unknown("the agent's init ended the program without saying how"));
        }
    };
    Ok(ExecExit {
        how: Some(how),
        error: end.error,
    })
}
