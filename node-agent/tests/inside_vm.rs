//! Inside agents in real microVMs: many programs, callers and far-nodes that go away, output that nobody reads.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, agent};
use far_proto::node::{
    ExecReply, ExecRequest, ExecStart, Identity, Phase, StatsRequest, exec_exit::How, exec_reply, exec_request,
    inside_client::InsideClient,
};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

/// Real programs under a software CPU on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

fn whose(uid: &str) -> Option<Identity> {
    Some(Identity {
        uid: uid.into(),
        ..Identity::default()
    })
}

/// A call; dropping it drops both of its halves, which is what resets an HTTP/2 stream.
#[derive(Debug)]
struct Call {
    _requests: mpsc::Sender<ExecRequest>,
    replies: Streaming<ExecReply>,
}

async fn exec(client: &InsideClient<Channel>, uid: &str, steps: &[&str]) -> Result<Call, Status> {
    let start = ExecStart {
        identity: whose(uid),
        argv: std::iter::once("/payload")
            .chain(steps.iter().copied())
            .map(str::to_owned)
            .collect(),
        ..ExecStart::default()
    };
    let first = ExecRequest {
        kind: Some(exec_request::Kind::Start(start)),
    };
    let (requests, queue) = mpsc::channel(1);
    requests.send(first).await.unwrap();
    let replies = client.clone().exec(ReceiverStream::new(queue)).await?.into_inner();
    Ok(Call {
        _requests: requests,
        replies,
    })
}

/// Output and exit of a program.
async fn to_exit(mut call: Call) -> Result<(String, How), Status> {
    let mut output = Vec::new();
    loop {
        let reply = tokio::time::timeout(LIMIT, call.replies.message())
            .await
            .expect("the program never ends")?;
        match reply.unwrap().kind.unwrap() {
            exec_reply::Kind::Stdout(data) => output.extend(data),
            exec_reply::Kind::Exit(exit) => return Ok((String::from_utf8(output).unwrap(), exit.how.unwrap())),
            exec_reply::Kind::Started(_) | exec_reply::Kind::Stderr(_) => {}
        }
    }
}

async fn until_output(call: &mut Call, text: &str) {
    let mut seen = String::new();
    while !seen.contains(text) {
        let reply = tokio::time::timeout(LIMIT, call.replies.message()).await.unwrap();
        if let Some(exec_reply::Kind::Stdout(data)) = reply.unwrap().unwrap().kind {
            seen += &String::from_utf8_lossy(&data);
        }
    }
}

/// Only the payload itself runs in the agent, and no call is open.
async fn until_alone(client: &InsideClient<Channel>, uid: &str) {
    let alone = async {
        loop {
            let identity = whose(uid);
            let stats = client
                .clone()
                .stats(StatsRequest { identity })
                .await
                .unwrap()
                .into_inner();
            if stats.agents[0].processes == 1 && stats.agents[0].channels == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(LIMIT, alone)
        .await
        .expect("something is left in the agent");
}

async fn running(test: &str, uid: &str) -> Option<Node> {
    let mut node = Node::start_with(test, &["--heartbeat-interval", "200ms"]).await?;
    node.load_payload().await?;
    let request = agent(uid, "payload", None, &["out=begin", "listen=7"], 128);
    node.client().ensure_agent(request).await.unwrap();
    node.until(uid, |state| state.phase() == Phase::Running).await;
    Some(node)
}

#[tokio::test]
async fn a_hundred_programs_in_turn_and_twenty_at_once_each_give_their_own_output() {
    let test = "a_hundred_programs_in_turn_and_twenty_at_once_each_give_their_own_output";
    let Some(mut node) = running(test, "many").await else {
        return;
    };
    let client = node.inside().await;
    let one = async |n: u32| {
        let (out, exit) = (format!("out={n}"), format!("exit={n}"));
        let call = exec(&client, "many", &[&out, &exit]).await.unwrap();
        assert_eq!(to_exit(call).await.unwrap(), (format!("{n}\n"), How::Code(n)));
    };
    for n in 0..100 {
        one(n).await;
    }
    futures::future::join_all((0..20).map(one)).await;
    until_alone(&client, "many").await;
    a_frozen_guest_answers_no_pings_until_it_goes_on(&mut node).await;
    node.stop().await;
}

/// Through the real vsock device. Questions that it could not answer in time harm nothing when it goes on, also where the
/// far-node that asked them is gone.
async fn a_frozen_guest_answers_no_pings_until_it_goes_on(node: &mut Node) {
    let vm_id = node.until("many", |state| !state.heartbeat_stale).await.vm_id;
    let socket = node.vm_folder(&vm_id).join("v.sock");
    let pinged = tokio::time::timeout(LIMIT, far_vmm::vsock::ping(&socket)).await;
    assert_eq!(pinged.expect("the guest answers"), Ok(()));
    node.signal_vmm(&vm_id, "STOP").await;
    let state = node.until("many", |state| state.answers_pings == Some(false)).await;
    assert!(
        state.heartbeat_stale && state.message.contains("answers no pings"),
        "{}",
        state.message
    );
    node.kill_and_restart().await;
    node.until("many", |state| state.answers_pings == Some(false)).await;
    node.signal_vmm(&vm_id, "CONT").await;
    let state = node.until("many", |state| !state.heartbeat_stale).await;
    assert_eq!((state.answers_pings, state.message.as_str()), (None, ""));
    let client = node.inside().await;
    let call = exec_once_connected(&client, "many", &["out=again", "exit=5"]).await;
    assert_eq!(to_exit(call).await.unwrap(), ("again\n".to_owned(), How::Code(5)));
}

/// The guest dials again when it notices that its connection is gone: until then callers are told to try again.
async fn exec_once_connected(client: &InsideClient<Channel>, uid: &str, steps: &[&str]) -> Call {
    let begun = std::time::Instant::now();
    loop {
        match exec(client, uid, steps).await {
            Ok(call) => return call,
            Err(status) if status.code() == Code::Unavailable && begun.elapsed() < LIMIT => {}
            Err(status) => panic!("{status}"),
        }
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_takes_its_program_along() {
    let test = "a_caller_that_goes_away_takes_its_program_along";
    let Some(node) = running(test, "gone").await else {
        return;
    };
    let client = node.inside().await;
    let mut call = exec(&client, "gone", &["out=sleeps", "sleep=600000"]).await.unwrap();
    until_output(&mut call, "sleeps").await;
    drop(call);
    until_alone(&client, "gone").await;
    node.stop().await;
}

#[tokio::test]
async fn a_killed_far_node_ends_programs_and_the_next_one_runs_new_ones() {
    let test = "a_killed_far_node_ends_programs_and_the_next_one_runs_new_ones";
    let Some(mut node) = running(test, "kept").await else {
        return;
    };
    let client = node.inside().await;
    let mut call = exec(&client, "kept", &["out=sleeps", "sleep=600000"]).await.unwrap();
    until_output(&mut call, "sleeps").await;
    node.kill_and_restart().await;
    assert!(to_exit(call).await.is_err(), "nothing is made up about its end");
    let client = node.inside().await;
    let call = exec_once_connected(&client, "kept", &["out=again", "exit=5"]).await;
    assert_eq!(to_exit(call).await.unwrap(), ("again\n".to_owned(), How::Code(5)));
    until_alone(&client, "kept").await;
    node.stop().await;
}

#[tokio::test]
async fn a_flood_that_nobody_reads_waits_and_holds_up_nothing() {
    let test = "a_flood_that_nobody_reads_waits_and_holds_up_nothing";
    let Some(mut node) = running(test, "flood").await else {
        return;
    };
    let client = node.inside().await;
    // 64 MiB: far more than all buffers on the way.
    let unread = exec(&client, "flood", &["flood=67108864"]).await.unwrap();
    for n in 0..5 {
        let out = format!("out={n}");
        let call = exec(&client, "flood", &[&out]).await.unwrap();
        assert_eq!(to_exit(call).await.unwrap(), (format!("{n}\n"), How::Code(0)));
    }
    node.until_output("flood", "begin\n").await;
    drop(unread);
    until_alone(&client, "flood").await;
    // An agent that is asked to end does so, and the next call names its phase.
    let identity = Some(Identity {
        attempt: 1,
        namespace: "default".into(),
        name: "flood".into(),
        ..whose("flood").unwrap()
    });
    let stop = far_proto::node::StopAgentRequest {
        identity,
        ..far_proto::node::StopAgentRequest::default()
    };
    node.client().stop_agent(stop).await.unwrap();
    node.until("flood", |state| state.phase() == Phase::Ended).await;
    let refused = exec(&client, "flood", &["out=x"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("Ended"), "{refused}");
    node.stop().await;
}
