//! What guests say of themselves, and what is made good after they were away.

use super::*;

#[tokio::test]
async fn heartbeats_become_stats_and_metrics() {
    let mut inside = running().await;
    for n in 1..=2_u64 {
        let heartbeat = Heartbeat {
            seq: n,
            boot_ns: n * 1_000_000_000,
            mem_total_kib: 100_000,
            mem_available_kib: 60_000,
            cpu_usage_us: n * 250_000,
            processes: 3,
            payload_memory_kib: 1234,
            ..Heartbeat::default()
        };
        inside.guest.send(Kind::Heartbeat(heartbeat)).await;
        // One after the other: of several in one read only the newest counts.
        let heard = async {
            while inside.node.blade.metrics.heartbeats.get() < n {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), heard).await.unwrap();
    }
    for identity in [None, whose()] {
        let stats = inside
            .client
            .stats(proto::StatsRequest { identity })
            .await
            .unwrap()
            .into_inner();
        let [one] = stats.agents.as_slice() else {
            panic!("{stats:?}")
        };
        assert_eq!(
            (one.memory_total_kib, one.memory_available_kib, one.processes),
            (100_000, 60_000, 3)
        );
        assert_eq!((one.cpu_millis, one.payload_memory_kib), (Some(250), 1234));
        assert!(one.heartbeat_age_ms.is_some() && one.cpu_pressure.is_none());
    }
    let text = inside.node.blade.metrics.text(&inside.node.blade);
    for line in [
        "far_node_agents{phase=\"running\"} 1",
        "far_node_guest_memory_used_bytes 40960000",
        "far_node_guest_cpu_millicores 250",
        "far_node_heartbeats_total 2",
        "far_node_control_connections_total 1",
        "far_node_channels{kind=\"exec\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(
        !text.contains("uid-1") && !text.contains(vm().as_str()),
        "no names in labels:\n{text}"
    );
}

#[tokio::test]
async fn metrics_are_served_over_http_and_nothing_else_is() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let inside = running().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = inside.node.blade.shutdown.clone();
    let serving = tokio::spawn(crate::metrics::serve(
        listener,
        inside.node.blade.clone(),
        shutdown.clone(),
    ));
    for (path, expected) in [
        ("/metrics", "far_node_agents{phase=\"running\"} 1"),
        ("/healthz", "ok"),
        ("/other", "404"),
    ] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains(expected), "{path}: {answer}");
    }
    shutdown.cancel();
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_was_away_gets_time_and_entropy_and_one_that_blinked_does_not() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    drop(guest);
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
    guest.welcome().await;
    // Nothing but what an exec brings: an answer to nothing would be a violation.
    guest.send(Kind::Heartbeat(Heartbeat::default())).await;
    drop(guest);
    let gone = async {
        while node.blade.guests.channels(&key()).is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    gone.await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
    guest.welcome().await;
    let FromHost::SetTime(time) = guest.heard().await else {
        panic!("no SetTime")
    };
    assert!(time.unix_ns > 1_600_000_000_000_000_000);
    let FromHost::Reseed(reseed) = guest.heard().await else {
        panic!("no Reseed")
    };
    assert!((32..=512).contains(&reseed.entropy.len()) && reseed.entropy.iter().any(|byte| *byte != 0));
    assert_ne!(time.id, reseed.id);
    for id in [time.id, reseed.id] {
        guest
            .send(Kind::Done(Done {
                id,
                error: String::new(),
            }))
            .await;
    }
    // Freeze and thaw go the same way.
    let channels = node.blade.guests.channels(&key()).unwrap();
    let freezing = tokio::spawn(async move { (channels.freeze().await, channels.thaw().await) });
    let FromHost::Freeze(freeze) = guest.heard().await else {
        panic!("no Freeze: {:?}", node.blade.metrics.violations.get())
    };
    guest
        .send(Kind::Done(Done {
            id: freeze.id,
            error: String::new(),
        }))
        .await;
    let FromHost::Thaw(thaw) = guest.heard().await else {
        panic!("no Thaw")
    };
    guest
        .send(Kind::Done(Done {
            id: thaw.id,
            error: "not\u{1b} now".into(),
        }))
        .await;
    assert_eq!(freezing.await.unwrap(), (Ok(()), Err("not  now".into())));
}
