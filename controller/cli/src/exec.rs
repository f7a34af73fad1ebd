//! `far exec`: a command in a running agent, with or without a terminal.
//!
//! With `-t` the local terminal is raw, so that Ctrl-C and all other keys reach the remote program, and its size follows
//! ours. Without, Ctrl-C is passed on as a signal; a second one ends `far exec` itself.

use std::io::{self, IsTerminal, Read, Write};

use anyhow::Context;
use far_proto::node::{
    EnvVar, ExecExit, ExecReply, ExecRequest, ExecStart, Piece, TerminalSize, exec_exit, exec_reply, exec_request::Kind,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{
    cluster::Cluster,
    exit::{ExecFailed, INTERRUPTED, Outcome},
    folders::Folders,
    inside::{self, Inside},
    output, terminal,
};

/// Bytes read from standard input at once.
const READ_STEP: usize = 16 << 10;
/// What a shell shows for a program that SIGPIPE ended.
const BROKEN_PIPE: u8 = 141;

pub(crate) const EXAMPLES: &str = "\
Examples:
  far exec embedder-worker-01 -- ls /task
  far exec -it embedder-worker-01 -- sh
  tar c . | far exec -i embedder-worker-01 -- tar x -C /tmp

Exit code: the command's; 128 + n for signal n; 126 or 127 when it could not be started; 125 when far itself failed.";

#[derive(Debug, clap::Args)]
pub(crate) struct ExecArgs {
    /// Name of the FarAgent
    #[arg(value_parser = crate::args::agent_name)]
    agent: String,
    /// Pass standard input on
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// As this user of the image: name, uid, name:group or uid:gid [default: the agent's own]
    #[arg(short, long, value_name = "USER", default_value = "")]
    user: String,
    /// In this folder [default: the agent's own]
    #[arg(short, long, value_name = "DIR", default_value = "")]
    workdir: String,
    /// A variable of its environment; repeatable
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// The command, after --
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not NAME=VALUE")),
    }
}

pub(crate) async fn exec(cluster: &Cluster, folders: &Folders, args: &ExecArgs) -> anyhow::Result<Outcome> {
    run(cluster, folders, args).await.context(ExecFailed)
}

async fn run(cluster: &Cluster, folders: &Folders, args: &ExecArgs) -> anyhow::Result<Outcome> {
    let mut inside = Inside::find(cluster, folders, &args.agent).await?;
    let has_terminal = args.tty && io::stdin().is_terminal();
    if args.tty && !has_terminal {
        output::note("far: standard input is no terminal: the command gets none");
    }
    let (requests, messages) = inside::queue();
    let start = Kind::Start(ExecStart {
        identity: Some(inside.identity.clone()),
        argv: args.command.clone(),
        env: args
            .env
            .iter()
            .map(|(name, value)| EnvVar {
                name: name.clone(),
                value: value.clone(),
                secret: false,
            })
            .collect(),
        working_dir: args.workdir.clone(),
        user: args.user.clone(),
        terminal: has_terminal.then(size),
        stdin: args.stdin,
    });
    requests
        .send(ExecRequest { kind: Some(start) })
        .await
        .context("starting the call")?;
    let mut replies = match inside.client.exec(messages).await {
        Ok(replies) => replies.into_inner(),
        Err(status) => return Err(inside.refused("exec", status)),
    };
    // Raw only once the call stands: until then Ctrl-C ends us as usual.
    let raw = if has_terminal && args.stdin {
        terminal::Raw::begin().context("making the terminal raw")?
    } else {
        None
    };
    if args.stdin {
        let requests = requests.clone();
        std::thread::spawn(move || read_input(&requests));
    }
    let passing = pass_signals(requests, has_terminal);
    tokio::pin!(passing);
    let ended = loop {
        let reply = tokio::select! {
            reply = replies.message() => reply,
            code = &mut passing => break Err(code),
        };
        let kind = match reply {
            Ok(Some(ExecReply { kind })) => kind,
            Ok(None) => break Ok(Err(anyhow::anyhow!("the blade ended the call without an exit code"))),
            Err(status) => break Ok(Err(inside.refused("exec", status))),
        };
        let written = match kind {
            Some(exec_reply::Kind::Stdout(data)) => write(io::stdout(), data, &mut passing).await,
            Some(exec_reply::Kind::Stderr(data)) => write(io::stderr(), data, &mut passing).await,
            Some(exec_reply::Kind::Exit(exit)) => break Ok(Ok(Outcome::Code(code(&exit)))),
            Some(exec_reply::Kind::Started(_)) | None => Ok(()),
        };
        if let Err(code) = written {
            break Err(code);
        }
    };
    drop(raw);
    match ended {
        Ok(ended) => ended,
        // A write that stalls would hold up an ordinary return.
        Err(code) => std::process::exit(code.into()),
    }
}

fn size() -> TerminalSize {
    let (rows, columns) = terminal::size().unwrap_or((24, 80));
    TerminalSize {
        rows: rows.into(),
        columns: columns.into(),
    }
}

/// A reader that stalls must not hold up signals: written on another thread.
async fn write(
    mut to: impl Write + Send + 'static,
    data: Vec<u8>,
    passing: &mut (impl Future<Output = u8> + Unpin),
) -> Result<(), u8> {
    let writing = tokio::task::spawn_blocking(move || to.write_all(&data).and_then(|()| to.flush()));
    tokio::select! {
        written = writing => match written {
            Ok(Ok(())) => Ok(()),
            _ => Err(BROKEN_PIPE),
        },
        code = passing => Err(code),
    }
}

/// On a thread of its own: a read from a terminal cannot be broken off.
fn read_input(requests: &mpsc::Sender<ExecRequest>) {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; READ_STEP];
    loop {
        let length = match stdin.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        let piece = Piece {
            data: buffer[..length].to_vec(),
            last: length == 0,
        };
        let kind = Some(Kind::Stdin(piece));
        if requests.blocking_send(ExecRequest { kind }).is_err() || length == 0 {
            return;
        }
    }
}

/// Signals and new sizes of the terminal go to the remote program. Completes with an exit code when a second Ctrl-C or
/// TERM asks for our own end.
async fn pass_signals(requests: mpsc::Sender<ExecRequest>, has_terminal: bool) -> u8 {
    let kinds = [
        SignalKind::window_change(),
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ];
    let [
        Ok(mut resized),
        Ok(mut interrupted),
        Ok(mut terminated),
        Ok(mut hung_up),
    ] = kinds.map(signal)
    else {
        return std::future::pending().await;
    };
    let mut asked = false;
    // Behind input that the remote program does not read there may never be a place for it.
    let mut waiting = None;
    loop {
        let (kind, code) = tokio::select! {
            place = requests.reserve(), if waiting.is_some() => {
                if let (Ok(place), Some(request)) = (place, waiting.take()) {
                    place.send(request);
                }
                continue;
            }
            Some(()) = resized.recv() => {
                if has_terminal {
                    // One that finds no place is followed by others.
                    let _ = requests.try_send(ExecRequest { kind: Some(Kind::Resize(size())) });
                }
                continue;
            }
            Some(()) = interrupted.recv() => (SignalKind::interrupt(), INTERRUPTED),
            Some(()) = terminated.recv() => (SignalKind::terminate(), 143),
            // The caller's terminal is gone: the remote program's goes with us.
            Some(()) = hung_up.recv() => return 129,
            else => return std::future::pending().await,
        };
        if asked {
            return code;
        }
        asked = true;
        let number = u32::try_from(kind.as_raw_value()).unwrap_or(15);
        waiting = Some(ExecRequest {
            kind: Some(Kind::Signal(number)),
        });
    }
}

fn code(exit: &ExecExit) -> u8 {
    if !exit.error.is_empty() {
        output::error(&crate::table::printable(&exit.error));
    }
    match exit.how {
        Some(exec_exit::How::Code(code)) => u8::try_from(code).unwrap_or(u8::MAX),
        Some(exec_exit::How::Signal(signal)) => u8::try_from(128 + (signal & 127)).unwrap_or(u8::MAX),
        None => crate::exit::NO_EXIT_CODE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, raise};

    #[test]
    fn exit_codes_and_signals_are_passed_on_as_shells_do() {
        let exit = |how| ExecExit {
            how: Some(how),
            error: String::new(),
        };
        assert_eq!(code(&exit(exec_exit::How::Code(42))), 42);
        assert_eq!(code(&exit(exec_exit::How::Signal(9))), 137);
        assert_eq!(code(&ExecExit::default()), 125);
    }

    #[test]
    fn variables_have_a_name() {
        assert_eq!(parse_env("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert!(parse_env("A").is_err() && parse_env("=b").is_err());
    }

    // One test: signals are the whole process's.
    #[tokio::test]
    async fn a_signal_goes_out_when_there_is_a_place_and_a_second_one_ends_the_call_in_any_case() {
        let (requests, mut messages) = mpsc::channel(1);
        requests.try_send(ExecRequest::default()).unwrap();
        let passing = pass_signals(requests, false);
        tokio::pin!(passing);
        // It listens from its first look on.
        assert!(futures::poll!(&mut passing).is_pending());
        raise(Signal::SIGTERM).unwrap();
        let passed = async {
            messages.recv().await;
            messages.recv().await.unwrap().kind
        };
        tokio::select! {
            code = &mut passing => panic!("it ended with {code}"),
            kind = passed => assert_eq!(kind, Some(Kind::Signal(15))),
        }

        let (requests, _full) = mpsc::channel(1);
        requests.try_send(ExecRequest::default()).unwrap();
        let passing = pass_signals(requests, false);
        tokio::pin!(passing);
        assert!(futures::poll!(&mut passing).is_pending());
        // Those that come together are one: again and again.
        let interrupting = async {
            loop {
                raise(Signal::SIGINT).unwrap();
                tokio::task::yield_now().await;
            }
        };
        let limit = tokio::time::sleep(std::time::Duration::from_secs(60));
        tokio::select! {
            code = &mut passing => assert_eq!(code, INTERRUPTED),
            () = interrupting => {}
            () = limit => panic!("the call cannot be ended"),
        }
    }
}
