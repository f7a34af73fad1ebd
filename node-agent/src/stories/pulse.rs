//! A guest that sends no heartbeats is pinged.

use super::doubles::*;
use crate::{host::VmHost, record::Phase};
use far_proto::guest::Stage;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    sync::watch,
    task::JoinHandle,
};

/// The vsock of a VM whose guest agent gives this answer to each ping; the answer may be changed.
fn guest_agent(world: &World, answer: &'static [u8]) -> (watch::Sender<&'static [u8]>, JoinHandle<()>) {
    let listener = UnixListener::bind(world.host.folder(&vm()).join("v.sock")).unwrap();
    let (send, answers) = watch::channel(answer);
    let serving = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = *answers.borrow();
            let (mut connect, mut ping) = ([0; 13], [0; 30]);
            stream.read_exact(&mut connect).await.unwrap();
            assert_eq!(&connect, b"CONNECT 1024\n");
            stream.write_all(b"OK 1024\n").await.unwrap();
            stream.read_exact(&mut ping).await.unwrap();
            assert!(ping.ends_with(b"{\"version\":1,\"op\":\"ping\"}"));
            stream.write_all(answer).await.unwrap();
            if answer.is_empty() {
                std::future::pending::<()>().await;
            }
        }
    });
    (send, serving)
}

#[tokio::test(start_paused = true)]
async fn a_guest_without_heartbeats_is_asked_whether_it_lives() {
    const PONG: &[u8] = b"\x06\0\0\0\x0a{\"code\":0}";
    const REFUSED: &[u8] = b"\x06\0\0\0\x0a{\"code\":1}";
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    let told = async |text: &str, answers: Option<bool>| loop {
        let state = crate::wire::agent_state(&node.blade.board.entry(&key()).unwrap());
        if state.message.contains(text) && state.answers_pings == answers {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let (answer, serving) = guest_agent(&world, PONG);
    told("its control stream is stuck", Some(true)).await;
    answer.send_replace(REFUSED);
    told("answers what the protocol does not know", Some(false)).await;
    answer.send_replace(PONG);
    told("its control stream is stuck", Some(true)).await;
    // It hangs now, and nobody hangs up on it.
    answer.send_replace(b"");
    told("nothing came within 10 s", Some(false)).await;
    serving.abort();
    told("the connection broke", Some(false)).await;
    let beat = far_proto::guest::Heartbeat::default();
    guest.send(far_proto::guest::guest_message::Kind::Heartbeat(beat)).await;
    told("", None).await;
    assert!(!node.blade.board.entry(&key()).unwrap().heartbeat.is_stale());
}
