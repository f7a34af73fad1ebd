//! `far logs`: the output that a blade keeps of an agent.
//!
//! The FarAgent says which blade and which attempt; the output itself is read from the node agent's socket where that is
//! this machine's, else through the controller's gateway. Where there is neither, it says so, and shows the tail that the
//! status has.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use anyhow::bail;
use far_proto::node::{Identity, LogChunk, LogsRequest, Stream};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tonic::Streaming;

use crate::{
    args::LogsArgs,
    cluster::{Api, Cluster},
    exit::Outcome,
    folders::Folders,
    gateway::Gateway,
    kinds,
    node::{self, NodeError},
    output,
    wait::{self, FINAL_PHASES},
};

/// Pause before a blade is asked again for an attempt it has not heard of yet.
const AGAIN: Duration = Duration::from_millis(200);
/// A gateway that is lost while output is followed is looked for this long: a controller restarts within it.
const LOST_LIMIT: Duration = Duration::from_secs(60);

/// From when on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Since {
    Ago(Duration),
    At(OffsetDateTime),
}

pub(crate) fn parse_since(text: &str) -> Result<Since, String> {
    if let Ok(at) = OffsetDateTime::parse(text, &Rfc3339) {
        return Ok(Since::At(at));
    }
    crate::args::duration(text)
        .map(Since::Ago)
        .map_err(|_| format!("{text:?} is neither a time span (10m) nor a time (2026-01-31T10:00:00Z)"))
}

impl Since {
    fn timestamp(self) -> prost_types::Timestamp {
        let at = match self {
            Self::Ago(span) => SystemTime::now().checked_sub(span).unwrap_or(SystemTime::UNIX_EPOCH),
            Self::At(at) => at.into(),
        };
        at.into()
    }
}

/// The boot of an agent that output is wanted of, as its status has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Boot {
    pub(crate) identity: Identity,
    pub(crate) blade: String,
}

impl Boot {
    /// `None` while no blade is chosen.
    pub(crate) fn of(agent: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let status = &agent["status"];
        let blade = text(&status["nodeName"]);
        let attempt = status["attempt"]
            .as_u64()
            .and_then(|attempt| u32::try_from(attempt).ok())?;
        if blade.is_empty() || attempt == 0 {
            return None;
        }
        Some(Self {
            identity: Identity {
                uid: text(&agent["metadata"]["uid"]),
                attempt,
                namespace: text(&agent["metadata"]["namespace"]),
                name: text(&agent["metadata"]["name"]),
            },
            blade,
        })
    }
}

pub(crate) async fn logs(cluster: &Cluster, folders: &Folders, args: &LogsArgs) -> anyhow::Result<Outcome> {
    let api = cluster.connect().await?;
    let found = wait::until(&api, &args.agent, |agent| {
        let Some(agent) = agent else { return Some(None) };
        let boot = Boot::of(agent);
        let is_over = FINAL_PHASES.contains(&wait::phase(agent));
        (boot.is_some() || !args.follow || is_over).then(|| Some((boot, agent.clone())))
    })
    .await?;
    let Some((boot, agent)) = found else {
        bail!(
            "there is no FarAgent {} in namespace {}: with its resource, an agent's output is gone",
            args.agent,
            api.namespace
        );
    };
    let Some(mut boot) = boot else {
        bail!(
            "{} has no output: it was on no blade yet ({})",
            args.agent,
            wait::summary(&agent)
        );
    };
    if let Some(attempt) = args.attempt {
        if attempt > boot.identity.attempt {
            bail!(
                "--attempt {attempt}: {} is at attempt {}",
                args.agent,
                boot.identity.attempt
            );
        }
        boot.identity.attempt = attempt;
    }
    let request = LogsRequest {
        identity: Some(boot.identity.clone()),
        follow: args.follow,
        tail_lines: args.tail,
        stream: match (args.stdout, args.stderr) {
            (true, _) => Stream::Stdout,
            (_, true) => Stream::Stderr,
            _ => Stream::Unspecified,
        }
        .into(),
        since: args.since.map(Since::timestamp),
    };
    let mut printer = Printer::new(args.timestamps);
    let is_coming = async || args.follow && is_coming(&api, &boot).await;
    match stream(&api, folders, request, is_coming, |chunk| {
        output::bytes(&printer.format(chunk));
    })
    .await
    {
        Ok(()) => Ok(Outcome::Success),
        Err(error) => Err(elsewhere(error, &boot, &agent)),
    }
}

/// Whether a blade that does not know this boot may still hear of it: the agent is there, has not ended, and has neither
/// lost its blade nor got another attempt.
pub(crate) async fn is_coming(api: &Api, boot: &Boot) -> bool {
    let path = kinds::far_agent().path(&api.namespace, &boot.identity.name);
    match api.get::<Value>(&path).await {
        Ok(agent) => is_still(&agent, boot),
        Err(error) => error.is_passing(),
    }
}

fn is_still(agent: &Value, boot: &Boot) -> bool {
    Boot::of(agent).as_ref() == Some(boot) && !FINAL_PHASES.contains(&wait::phase(agent))
}

/// Passes each chunk to `take` until the output ends. `is_coming` is asked when the blade does not know the attempt. While
/// following through the gateway, a way that is lost is looked for again: records are numbered, so none is told twice.
pub(crate) async fn stream(
    api: &Api,
    folders: &Folders,
    mut request: LogsRequest,
    is_coming: impl AsyncFn() -> bool,
    mut take: impl FnMut(&LogChunk),
) -> Result<(), NodeError> {
    // Of each stream, the last record that was told.
    let mut told: HashMap<i32, u64> = HashMap::new();
    let mut lost: Option<Instant> = None;
    loop {
        let error = match open(api, folders, &request, &is_coming).await {
            Ok((mut chunks, is_gateway)) => loop {
                match chunks.message().await {
                    Ok(Some(chunk)) => {
                        lost = None;
                        let last = told.entry(chunk.stream).or_default();
                        if chunk.seq == 0 || chunk.seq > *last {
                            *last = chunk.seq;
                            take(&chunk);
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => {
                        let error = NodeError::of("reading the output")(status);
                        if !is_gateway {
                            return Err(error);
                        }
                        break error;
                    }
                }
            },
            Err(error) => error,
        };
        let since = *lost.get_or_insert_with(Instant::now);
        if !request.follow || !error.is_passing() || since.elapsed() >= LOST_LIMIT {
            return Err(error);
        }
        if !told.is_empty() {
            request.tail_lines = None;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Opens the stream of output; answers whether it comes through the gateway.
async fn open(
    api: &Api,
    folders: &Folders,
    request: &LogsRequest,
    is_coming: &impl AsyncFn() -> bool,
) -> Result<(Streaming<LogChunk>, bool), NodeError> {
    let mut may_come = true;
    loop {
        match ask(api, folders, request).await {
            // Once more after the last yes: it may have come and ended between the two questions.
            Err(error) if error.is_not_found() && may_come => {
                may_come = is_coming().await;
                if may_come {
                    tokio::time::sleep(AGAIN).await;
                }
            }
            answer => return answer,
        }
    }
}

/// This machine's blade is asked first, then the gateway.
async fn ask(api: &Api, folders: &Folders, request: &LogsRequest) -> Result<(Streaming<LogChunk>, bool), NodeError> {
    let what = "reading the output";
    let mut not_here = None;
    if folders.socket.is_some() || api.gateway.gateway.is_none() {
        let here = match node::connect(&folders.node_socket()).await {
            Ok(mut client) => client.logs(request.clone()).await.map_err(NodeError::of(what)),
            Err(error) => Err(error),
        };
        match here {
            Ok(chunks) => return Ok((chunks.into_inner(), false)),
            Err(error) if folders.socket.is_none() && (error.is_not_found() || error.is_no_blade()) => {
                not_here = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    match (Gateway::find(api).await?, not_here) {
        (Some(gateway), _) => {
            let chunks = gateway.output().await?.logs(request.clone()).await;
            Ok((chunks.map_err(NodeError::of(what))?.into_inner(), true))
        }
        (None, Some(error)) => Err(error),
        (None, None) => Err(NodeError::NoSocket {
            socket: folders.node_socket(),
        }),
    }
}

/// The blade of this machine does not have it: says where it is, and what the status kept of it.
fn elsewhere(error: NodeError, boot: &Boot, agent: &Value) -> anyhow::Error {
    let is_here = !error.is_no_blade() && !error.is_not_found();
    if is_here {
        return error.into();
    }
    let tail = agent["status"]["tail"].as_str().unwrap_or_default();
    if !tail.is_empty() {
        output::note("The end of the output, as the status has it:");
        output::line(tail.trim_end());
    }
    anyhow::Error::from(error).context(format!(
        "attempt {} ran on blade {}, and its output is kept there, but the cluster publishes no gateway to it: run `far logs {}` on that machine",
        boot.identity.attempt, boot.blade, boot.identity.name
    ))
}

/// Chunks as bytes to print: with times before lines if wanted, and a line where bytes were dropped.
pub(crate) struct Printer {
    timestamps: bool,
    /// Stream whose line is still open.
    open: Option<i32>,
}

impl Printer {
    pub(crate) fn new(timestamps: bool) -> Self {
        Self { timestamps, open: None }
    }

    pub(crate) fn format(&mut self, chunk: &LogChunk) -> Vec<u8> {
        let mut out = Vec::with_capacity(chunk.data.len());
        if chunk.dropped_bytes > 0 {
            self.close(&mut out);
            out.extend_from_slice(
                format!(
                    "[{} bytes were dropped here: the blade's bound was reached]\n",
                    chunk.dropped_bytes
                )
                .as_bytes(),
            );
        }
        if !self.timestamps {
            out.extend_from_slice(&chunk.data);
            if let Some(last) = chunk.data.last() {
                self.open = (*last != b'\n').then_some(chunk.stream);
            }
            return out;
        }
        if self.open.is_some_and(|stream| stream != chunk.stream) {
            self.close(&mut out);
        }
        let stamp = chunk
            .time
            .and_then(|time| SystemTime::try_from(time).ok())
            .map(OffsetDateTime::from)
            .and_then(|time| time.format(&Rfc3339).ok())
            .unwrap_or_else(|| "-".to_owned());
        for line in chunk.data.split_inclusive(|byte| *byte == b'\n') {
            if self.open.is_none() {
                out.extend_from_slice(stamp.as_bytes());
                out.push(b' ');
            }
            out.extend_from_slice(line);
            self.open = (!line.ends_with(b"\n")).then_some(chunk.stream);
        }
        out
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if self.open.take().is_some() {
            out.push(b'\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chunk(stream: Stream, data: &str) -> LogChunk {
        LogChunk {
            stream: stream.into(),
            time: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
            data: data.into(),
            ..LogChunk::default()
        }
    }

    fn printed(timestamps: bool, chunks: &[LogChunk]) -> String {
        let mut printer = Printer::new(timestamps);
        let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| printer.format(chunk)).collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_get_one_time_however_they_are_cut() {
        let chunks = [
            chunk(Stream::Stdout, "one\ntw"),
            chunk(Stream::Stdout, "o\n"),
            chunk(Stream::Stdout, "part"),
            chunk(Stream::Stderr, "error\n"),
        ];
        assert_eq!(
            printed(true, &chunks),
            "1970-01-01T00:00:00Z one\n1970-01-01T00:00:00Z two\n1970-01-01T00:00:00Z part\n1970-01-01T00:00:00Z error\n"
        );
        assert_eq!(printed(false, &chunks), "one\ntwo\nparterror\n");
    }

    #[test]
    fn dropped_bytes_are_said_where_they_are_missing() {
        let mut second = chunk(Stream::Stdout, "end\n");
        second.dropped_bytes = 7;
        let text = printed(false, &[chunk(Stream::Stdout, "begin"), second]);
        assert!(text.starts_with("begin\n[7 bytes were dropped here"), "{text}");
        assert!(text.ends_with("]\nend\n"), "{text}");
    }

    #[test]
    fn a_boot_is_known_once_a_blade_and_an_attempt_are_written() {
        let agent = |status: Value| json!({"metadata": {"uid": "u", "name": "a", "namespace": "n"}, "status": status});
        for (why, status) in [
            ("nothing", json!(null)),
            ("no attempt", json!({"nodeName": "b"})),
            ("no blade", json!({"attempt": 1})),
            ("attempt zero", json!({"nodeName": "b", "attempt": 0})),
        ] {
            assert_eq!(Boot::of(&agent(status)), None, "{why}");
        }
        let boot = Boot::of(&agent(json!({"nodeName": "b", "attempt": 2}))).unwrap();
        assert_eq!((boot.identity.attempt, boot.blade.as_str()), (2, "b"));
    }

    #[test]
    fn an_attempt_is_waited_for_only_while_the_agent_has_it() {
        let agent = |phase: &str, blade: &str, attempt: u32, uid: &str| {
            json!({"metadata": {"uid": uid, "name": "a", "namespace": "n"},
                "status": {"phase": phase, "nodeName": blade, "attempt": attempt}})
        };
        let boot = Boot::of(&agent("Scheduled", "b", 1, "u")).unwrap();
        for (why, seen, expected) in [
            ("placed", agent("Scheduled", "b", 1, "u"), true),
            ("starting", agent("Starting", "b", 1, "u"), true),
            ("failed before it booted", agent("Failed", "b", 1, "u"), false),
            ("another attempt", agent("Scheduled", "b", 2, "u"), false),
            ("another blade", agent("Scheduled", "c", 1, "u"), false),
            ("no blade any more", agent("Pending", "", 1, "u"), false),
            ("another agent of this name", agent("Scheduled", "b", 1, "v"), false),
        ] {
            assert_eq!(is_still(&seen, &boot), expected, "{why}");
        }
    }

    #[test]
    fn since_is_a_span_or_a_time() {
        assert_eq!(parse_since("10m").unwrap(), Since::Ago(Duration::from_secs(600)));
        assert_eq!(parse_since("1970-01-01T00:01:00Z").unwrap().timestamp().seconds, 60);
        assert!(parse_since("yesterday").is_err());
    }
}
