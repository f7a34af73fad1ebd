//! Guests that lie, flood, stall and break frames.

use super::doubles::*;
use crate::{
    outcome::VmmEnd,
    record::{EndReason, Phase},
};
use far_proto::guest::{Stage, guest_message::Kind};
use tokio::{io::AsyncWriteExt, time::Duration};

/// A guest that behaves can still run its agent to the end.
async fn runs_on(world: &World, node: &Node) {
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    guest.exit(0, 0).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.reason, EndReason::Completed);
}

#[tokio::test]
async fn broken_openings_are_cut_and_change_nothing() {
    let half = [0, 0, 0, 9, 1, 2];
    let huge = u32::MAX.to_be_bytes();
    let zero = [0; 4];
    let noise = [0, 0, 0, 4, 0xFF, 0xFF, 0xFF, 0xFF];
    let openings: [&[u8]; 4] = [&half, &huge, &zero, &noise];
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut open = Vec::new();
    for opening in openings {
        let mut guest = Guest::connect(&world.socket(&vm())).await;
        guest.stream.write_all(opening).await.unwrap();
        open.push(guest);
    }
    for guest in &mut open[1..] {
        assert!(guest.receive().await.is_none());
    }
    runs_on(&world, &node).await;
}

#[tokio::test]
async fn a_thousand_silent_connections_do_not_keep_the_guest_out() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut silent = Vec::new();
    for _ in 0..1000 {
        silent.push(Guest::connect(&world.socket(&vm())).await);
    }
    drop(silent);
    // Those were let go once the peer closed; a new one is heard, as soon as a place is free.
    loop {
        let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
        if guest.receive().await.is_some() {
            break;
        }
    }
    runs_on(&world, &node).await;
}

#[tokio::test]
async fn messages_out_of_order_cut_the_connection() {
    for forged in [exit(0, 0), Kind::Ready(Default::default()), hello(1, Stage::Running)] {
        let world = World::new();
        let node = world.start().await;
        // Without secrets nothing is sent, so that nothing has started when the forged message comes.
        node.ensure().await;
        node.until_phase(Phase::Starting).await;
        while world.host.boots(&vm()) == 0 {
            tokio::task::yield_now().await;
        }
        node.kill().await;
        let node = world.start().await;
        let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
        guest.welcome().await;
        guest.send(forged).await;
        assert!(guest.receive().await.is_none());
        let record = node.blade.board.entry(&key()).unwrap().record;
        assert!(record.exit.is_none() && record.started_at.is_none());
        node.ensure().await;
        runs_on(&world, &node).await;
    }
}

#[tokio::test]
async fn a_guest_that_breaks_the_protocol_again_and_again_is_ended() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    while !world.host.is_dead(&vm()) {
        let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
        guest.log(7, "what a full disk lost, perhaps").await;
        guest.log(9, "gap").await;
        while guest.receive().await.is_some() {}
    }
    let end = node.until_ended().await;
    assert_eq!((end.reason, end.exit_code), (EndReason::InitLost, None));
}

#[tokio::test]
async fn another_nonce_is_another_boot_and_ends_the_attempt() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    let _other = Guest::dial(&world.socket(&vm()), 2, Stage::WaitingForConfig).await;
    let end = node.until_ended().await;
    assert_eq!((end.reason, end.exit_code), (EndReason::InitLost, None));
    assert!(world.host.is_dead(&vm()));
}

#[tokio::test]
async fn a_newer_connection_replaces_the_older_without_gap_or_duplicate() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut old = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    old.start().await;
    old.log(1, "one ").await;
    while world.output(&vm()).0 != b"one " {
        tokio::task::yield_now().await;
    }
    let mut new = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
    assert_eq!(new.welcome().await.stored_stdout_seq, 1);
    while old.receive().await.is_some() {}
    new.log(2, "two").await;
    new.exit(0, 2).await;
    assert!(new.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.tail, "one two");
}

#[tokio::test]
async fn a_flood_fills_neither_disk_nor_memory_and_is_told() {
    let world = World {
        log_max_bytes: 256 << 10,
        ..World::new()
    };
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    let (read, write) = guest.stream.into_split();
    let acks = tokio::spawn(async move {
        // The acknowledgements are read, as a guest must.
        let mut read = read;
        tokio::io::copy(&mut read, &mut tokio::io::sink()).await
    });
    let piece = bytes::Bytes::from(vec![b'x'; 64 << 10]);
    let mut write = write;
    let total = 32 << 20;
    for seq in 1..=total / piece.len() as u64 {
        let log = far_proto::guest::Log {
            stream: 1,
            seq,
            data: piece.clone(),
            time_unix_ns: 1,
        };
        let mut frame = Vec::new();
        far_proto::frame::encode(
            &far_proto::guest::GuestMessage {
                kind: Some(Kind::Log(log)),
            },
            &mut frame,
        );
        write.write_all(&frame).await.unwrap();
    }
    let mut frame = Vec::new();
    let last = total / piece.len() as u64;
    far_proto::frame::encode(
        &far_proto::guest::GuestMessage {
            kind: Some(exit(0, last)),
        },
        &mut frame,
    );
    write.write_all(&frame).await.unwrap();
    node.until(|record| record.exit.is_some()).await;
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.tail.len(), 2048);
    let (kept, dropped) = world.output(&vm());
    assert_eq!(kept.len() as u64 + dropped, total);
    let folder = world.dir.path().join("logs").join(vm().as_str());
    let on_disk: u64 = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(on_disk <= 256 << 10, "{on_disk}");
    acks.abort();
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_comes_byte_by_byte_must_be_whole_in_time() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    let length = 1_u32 << 20;
    guest.stream.write_all(&length.to_be_bytes()).await.unwrap();
    let mut bytes = 0;
    while guest.stream.write_all(&[0]).await.is_ok() {
        bytes += 1;
        assert!(bytes < 10, "half a frame holds its connection");
        tokio::time::sleep(Duration::from_secs(30)).await;
    }
    let mut again = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
    again.welcome().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_no_acknowledgements_is_cut_off_and_may_dial_again() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    let write = async {
        for seq in 1.. {
            let mut frame = Vec::new();
            let log = far_proto::guest::Log {
                stream: 1,
                seq,
                data: b"x".as_slice().into(),
                time_unix_ns: 1,
            };
            far_proto::frame::encode(
                &far_proto::guest::GuestMessage {
                    kind: Some(Kind::Log(log)),
                },
                &mut frame,
            );
            if guest.stream.write_all(&frame).await.is_err() {
                return seq;
            }
            tokio::task::yield_now().await;
        }
        0
    };
    tokio::select! {
        seq = write => assert!(seq > 1),
        () = tokio::time::sleep(LONG) => panic!("a stuck guest held its connection"),
    }
    let mut again = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
    assert!(again.welcome().await.stored_stdout_seq > 0);
}
