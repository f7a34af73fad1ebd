//! `far cp`: files and folders into and out of a running agent.
//!
//! Which side is the agent's is said by `AGENT:`; exactly one is. As with cp(1), a destination that is a folder receives the
//! source under its own name.

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use far_proto::node::{
    CopyInRequest, CopyInStart, CopyOutReply, CopyOutRequest, CopyResult, copy_in_request, copy_out_reply,
};

use crate::{
    args::agent_name,
    cluster::Cluster,
    exit::Outcome,
    folders::Folders,
    inside::{self, Inside},
    output,
    table::printable,
    tree::{Reader, Writer},
};

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_millis(200);

pub(crate) const EXAMPLES: &str = "\
Examples:
  far cp report.json embedder-worker-01:/tmp/report.json
  far cp ./folder embedder-worker-01:/tmp             # becomes /tmp/folder
  far cp embedder-worker-01:/var/log ./log

Modes and symlinks are kept; in the agent everything belongs to its user. Devices, sockets and FIFOs are left out.";

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    /// Absolute and normalised.
    There {
        agent: String,
        path: String,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct CpArgs {
    /// A local path, or AGENT:/PATH
    #[arg(value_name = "SRC", value_parser = parse_place)]
    from: Place,
    /// A local path, or AGENT:/PATH
    #[arg(value_name = "DST", value_parser = parse_place)]
    to: Place,
}

fn parse_place(text: &str) -> Result<Place, String> {
    // As scp: a colon before any slash names the other side; ./a:b is a local file.
    let Some((agent, path)) = text.split_once(':').filter(|(agent, _)| !agent.starts_with(['.', '/'])) else {
        return if text.is_empty() {
            Err("the path is empty".to_owned())
        } else {
            Ok(Place::Here(PathBuf::from(text)))
        };
    };
    let agent = agent_name(agent)?;
    if !path.starts_with('/') {
        return Err(format!("{path:?} is not absolute: write {agent}:/{path}"));
    }
    let parts: Vec<_> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return Err(format!("{path:?} has a \"..\" part"));
    }
    Ok(Place::There {
        agent,
        path: format!("/{}", parts.join("/")),
    })
}

pub(crate) async fn cp(cluster: &Cluster, folders: &Folders, args: &CpArgs) -> anyhow::Result<Outcome> {
    let result = match (&args.from, &args.to) {
        (Place::Here(from), Place::There { agent, path }) => {
            let inside = Inside::find(cluster, folders, agent).await?;
            copy_in(inside, from.clone(), path).await?
        }
        (Place::There { agent, path }, Place::Here(to)) => {
            let inside = Inside::find(cluster, folders, agent).await?;
            copy_out(inside, path, to.clone()).await?
        }
        (Place::Here(_), Place::Here(_)) => bail!("neither side is an agent's: write AGENT:/PATH for one of them"),
        (Place::There { .. }, Place::There { .. }) => {
            bail!("both sides are agents': copy to this machine first")
        }
    };
    if result.skipped > 0 {
        output::note(&format!(
            "{} devices, sockets, FIFOs or too deep folders were left out",
            result.skipped
        ));
    }
    Ok(Outcome::Success)
}

async fn copy_in(inside: Inside, from: PathBuf, to: &str) -> anyhow::Result<CopyResult> {
    let mut reader = Reader::open(&from)?;
    let (requests, messages) = inside::queue();
    let start = copy_in_request::Kind::Start(CopyInStart {
        identity: Some(inside.identity.clone()),
        path: to.to_owned(),
        name_in_folder: reader.name()?,
    });
    let reading = inside::blocking(move || {
        let mut progress = Progress::new();
        let mut next = Some(start);
        while let Some(kind) = next {
            if let copy_in_request::Kind::Data(piece) = &kind {
                progress.moved(piece.data.len());
            }
            // A call that is over says itself why.
            if requests.blocking_send(CopyInRequest { kind: Some(kind) }).is_err() {
                break;
            }
            next = reader.next()?;
        }
        progress.done();
        Ok(reader.skipped())
    });
    let mut client = inside.client.clone();
    let calling = client.copy_in(messages);
    let (read, answered) = tokio::join!(reading, calling);
    let what = format!("copying {} to {to}", from.display());
    // A local error broke the call off: it is the cause.
    let skipped = read?;
    let mut result = answered.map_err(|status| inside.refused(&what, status))?.into_inner();
    result.skipped += skipped;
    Ok(result)
}

async fn copy_out(mut inside: Inside, from: &str, to: PathBuf) -> anyhow::Result<CopyResult> {
    let what = format!("copying {from} to {}", to.display());
    let request = CopyOutRequest {
        identity: Some(inside.identity.clone()),
        path: from.to_owned(),
    };
    let mut replies = match inside.client.copy_out(request).await {
        Ok(replies) => replies.into_inner(),
        Err(status) => return Err(inside.refused(&what, status)),
    };
    let name = from.rsplit('/').next().unwrap_or_default().to_owned();
    let (send, mut receive) = tokio::sync::mpsc::channel::<CopyOutReply>(8);
    let writing = inside::blocking(move || {
        let mut writer = Writer::new(to, &name);
        let mut progress = Progress::new();
        while let Some(reply) = receive.blocking_recv() {
            match reply.kind {
                Some(copy_out_reply::Kind::Entry(entry)) => writer.entry(&entry)?,
                Some(copy_out_reply::Kind::Data(piece)) => {
                    progress.moved(piece.data.len());
                    writer.data(&piece.data, piece.last)?;
                }
                Some(copy_out_reply::Kind::Result(result)) => {
                    writer.finish()?;
                    progress.done();
                    return Ok(Some(result));
                }
                None => {}
            }
        }
        progress.done();
        Ok(None)
    });
    let reading = async {
        while let Some(reply) = replies.message().await? {
            if send.send(reply).await.is_err() {
                break; // The writer says why.
            }
        }
        drop(send);
        Ok::<_, tonic::Status>(())
    };
    let (written, read) = tokio::join!(writing, reading);
    let result = written.with_context(|| what.clone())?;
    read.map_err(|status| inside.refused(&what, status))?;
    result.with_context(|| format!("{what}: it ended before it was whole"))
}

/// Bytes so far, on a terminal only.
struct Progress {
    is_shown: bool,
    bytes: u64,
    told: Instant,
    has_told: bool,
}

impl Progress {
    fn new() -> Self {
        Self {
            is_shown: io::stderr().is_terminal(),
            bytes: 0,
            told: Instant::now(),
            has_told: false,
        }
    }

    fn moved(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if self.is_shown && self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            self.has_told = true;
            output::error_bytes(format!("\r{} KiB\x1b[K", self.bytes >> 10).as_bytes());
        }
    }

    fn done(&self) {
        if self.has_told {
            output::error_bytes(b"\r\x1b[K");
        }
    }
}

/// A name as an error shows it.
pub(crate) fn shown(name: &str) -> String {
    printable(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_side_is_told_by_its_colon() {
        let there = |path: &str| {
            Some(Place::There {
                agent: "a".into(),
                path: path.into(),
            })
        };
        for (text, expected) in [
            ("a:/x", there("/x")),
            ("fa/a:/x//y/", there("/x/y")),
            ("a:/", there("/")),
            ("a:x", None),
            ("a:/../x", None),
            (":/x", None),
            ("", None),
            ("./a:b", Some(Place::Here("./a:b".into()))),
            ("/a:b", Some(Place::Here("/a:b".into()))),
            ("file", Some(Place::Here("file".into()))),
        ] {
            assert_eq!(parse_place(text).ok(), expected, "{text:?}");
        }
    }
}
