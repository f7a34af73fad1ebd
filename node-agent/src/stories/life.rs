//! One attempt from its start to each of its ends.

use super::doubles::*;
use crate::{
    outcome::VmmEnd,
    record::{EndReason, Phase},
    supervisor::Refusal,
};
use far_proto::guest::{Stage, host_message::Kind};
use tokio::time::{Duration, Instant};

#[tokio::test]
async fn an_agent_runs_to_its_end_and_leaves_only_its_output() {
    let world = World::new();
    let node = world.start().await;
    assert_eq!(node.ensure().await.record.phase, Phase::Accepted);
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    let (config, files) = guest.start().await;
    assert_eq!(config.entrypoint, "/usr/local/bin/tiffany");
    assert_eq!(files, [b"# a".to_vec(), b"s3cret-file".to_vec()]);
    assert!(
        config
            .env
            .iter()
            .any(|env| env.name == "TOKEN" && env.value == "s3cret-env")
    );
    node.until_phase(Phase::Running).await;
    guest.log(1, "one\n").await;
    guest.log(2, "two\n").await;
    guest.exit(0, 2).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    let end = node.until_ended().await;
    assert_eq!(
        (end.reason, end.exit_code, end.tail.as_str()),
        (EndReason::Completed, Some(0), "one\ntwo\n")
    );
    node.until_released().await;
    assert_eq!(world.output(&vm()).0, b"one\ntwo\n");
    assert_eq!(world.host.boots(&vm()), 1);
    let record = node.blade.board.entry(&key()).unwrap().record;
    assert!(record.booted_at.is_some() && record.started_at.is_some() && record.vmm_cpu_us == 42);
}

#[tokio::test]
async fn many_calls_for_one_attempt_boot_it_once() {
    let world = World::new();
    let node = world.start().await;
    let calls = (0..20).map(|_| node.supervisor.ensure(identity(1), spec()));
    for entry in futures::future::join_all(calls).await {
        assert_eq!(entry.unwrap().record.identity, identity(1));
    }
    node.until_phase(Phase::Starting).await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    guest.exit(3, 0).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.exit_code, Some(3));
    assert!(node.ensure().await.record.is_ended());
    assert_eq!(world.host.boots(&vm()), 1);
}

#[tokio::test]
async fn output_that_comes_after_the_exit_report_is_waited_for() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    guest.exit(0, 2).await;
    guest.log(1, "late ").await;
    guest.log(2, "words").await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.tail, "late words");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_says_hello_is_a_boot_timeout() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let end = node.until_ended().await;
    assert_eq!((end.reason, end.exit_code), (EndReason::BootTimeout, None));
    assert!(world.host.is_dead(&vm()));
    assert!(end.message.contains("Hello"), "{}", end.message);
}

#[tokio::test(start_paused = true)]
async fn an_init_that_starts_nothing_is_a_boot_timeout() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let _guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    let end = node.until_ended().await;
    assert_eq!(end.reason, EndReason::BootTimeout);
    assert!(end.message.contains("payload"), "{}", end.message);
}

#[tokio::test]
async fn a_vm_that_ends_without_a_report_has_no_exit_code() {
    let cases = [
        (VmmEnd::Clean, EndReason::InitLost),
        (
            VmmEnd::Crashed {
                message: "signal 9".into(),
            },
            EndReason::VmmCrashed,
        ),
        (VmmEnd::KernelPanic { message: "oops".into() }, EndReason::KernelPanic),
    ];
    for (vmm, reason) in cases {
        let world = World::new();
        let node = world.start().await;
        node.ensure().await;
        let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
        guest.start().await;
        node.until_phase(Phase::Running).await;
        drop(guest);
        world.host.end(&vm(), vmm);
        let end = node.until_ended().await;
        assert_eq!((end.reason, end.exit_code, end.signal), (reason, None, None));
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_stop_does_not_extend_the_grace_period() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    let asked = Instant::now();
    node.supervisor.stop(identity(1), Some(20), None).await.unwrap();
    assert!(matches!(guest.receive().await, Some(Kind::Shutdown(shutdown)) if shutdown.grace_s == 20));
    tokio::time::sleep(Duration::from_secs(15)).await;
    node.supervisor
        .stop(identity(1), Some(1000), Some(EndReason::Evicted))
        .await
        .unwrap();
    let end = node.until_ended().await;
    assert_eq!(end.exit_code, None);
    assert_eq!(end.reason, EndReason::Evicted, "{}", end.message);
    assert!(asked.elapsed() < Duration::from_secs(40), "{:?}", asked.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_agent_with_its_reason() {
    let world = World::new();
    let node = world.start().await;
    let spec = crate::spec::Spec {
        deadline_s: 60,
        ..spec()
    };
    node.supervisor.ensure(identity(1), spec).await.unwrap();
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    assert!(matches!(guest.receive().await, Some(Kind::Shutdown(shutdown)) if shutdown.grace_s == 5));
    guest.exit(143, 0).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    let end = node.until_ended().await;
    assert_eq!((end.reason, end.exit_code), (EndReason::DeadlineExceeded, Some(143)));
    assert!(end.message.contains("activeDeadlineSeconds"), "{}", end.message);
}

#[tokio::test]
async fn a_stop_that_overtakes_the_start_keeps_it_from_ever_booting() {
    let world = World::new();
    let node = world.start().await;
    let stopped = node.supervisor.stop(identity(1), None, None).await.unwrap();
    assert_eq!(stopped.record.end.as_ref().unwrap().reason, EndReason::Evicted);
    assert!(node.ensure().await.record.is_ended());
    node.supervisor.forget(key()).await.unwrap();
    assert!(node.ensure().await.record.is_ended());
    assert_eq!(world.host.boots(&vm()), 0);
}

#[tokio::test]
async fn what_cannot_be_prepared_names_the_field_and_boots_nothing() {
    let cases: [(&str, Option<&str>, EndReason, &str); 2] = [
        ("example.test/unknown:v1", None, EndReason::ImageError, "spec.image"),
        (
            "example.test/a:v1",
            Some("/missing"),
            EndReason::Error,
            "spec.entrypoint",
        ),
    ];
    for (image, entrypoint, reason, field) in cases {
        let world = World::new();
        let node = world.start().await;
        let mut spec = spec();
        spec.image = image.into();
        if let Some(entrypoint) = entrypoint {
            spec.entrypoint = Some(entrypoint.into());
        }
        node.supervisor.ensure(identity(1), spec).await.unwrap();
        let end = node.until_ended().await;
        assert_eq!((end.reason, end.exit_code), (reason, None));
        assert!(end.message.contains(field), "{}", end.message);
        assert_eq!(world.host.boots(&vm()), 0);
    }
}

#[tokio::test]
async fn a_full_blade_refuses_and_records_nothing() {
    let world = World::new();
    let node = world.start().await;
    let large = crate::spec::Spec {
        memory_mib: 5000,
        ..spec()
    };
    let refusal = node.supervisor.ensure(identity(1), large).await.unwrap_err();
    assert!(matches!(refusal, Refusal::NoRoom(text) if text.contains("spec.memory")));
    assert!(node.blade.board.entry(&key()).is_none());
    assert_eq!(node.ensure().await.record.phase, Phase::Accepted);
    let other = crate::spec::Identity {
        key: crate::names::AttemptKey {
            uid: "other".into(),
            attempt: 1,
        },
        ..identity(1)
    };
    let big = crate::spec::Spec {
        cpu_millis: 3001,
        ..spec()
    };
    assert!(
        matches!(node.supervisor.ensure(other, big).await, Err(Refusal::NoRoom(text)) if text.contains("spec.cpu"))
    );
}

#[tokio::test]
async fn an_old_attempt_is_refused_once_a_newer_one_is_known() {
    let world = World::new();
    let node = world.start().await;
    node.supervisor.stop(identity(2), None, None).await.unwrap();
    assert!(matches!(
        node.supervisor.ensure(identity(1), spec()).await,
        Err(Refusal::NewerKnown { asked: 1, newer: 2 })
    ));
}

#[tokio::test]
async fn only_an_ended_attempt_can_be_forgotten_and_its_output_goes() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    assert!(matches!(
        node.supervisor.forget(key()).await,
        Err(Refusal::StillRuns(_))
    ));
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    guest.log(1, "x").await;
    guest.exit(0, 1).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    node.until_ended().await;
    node.supervisor.forget(key()).await.unwrap();
    node.supervisor.forget(key()).await.unwrap();
    assert!(!world.dir.path().join("logs").join(vm().as_str()).exists());
    assert!(node.ensure().await.record.is_ended());
    assert_eq!(world.host.boots(&vm()), 1);
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_is_marked_and_not_ended() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let entry = node.blade.board.entry(&key()).unwrap();
    assert!(entry.heartbeat.is_stale() && entry.record.phase == Phase::Running);
    guest
        .send(far_proto::guest::guest_message::Kind::Heartbeat(
            far_proto::guest::Heartbeat {
                seq: 1,
                ..Default::default()
            },
        ))
        .await;
    node.until(|record| record.phase == Phase::Running).await;
    while node.blade.board.entry(&key()).unwrap().heartbeat.is_stale() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
