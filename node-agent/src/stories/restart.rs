//! far-node is killed at every step of an attempt's life and started again.

use super::doubles::*;
use crate::{
    outcome::VmmEnd,
    record::{EndReason, Phase},
    spec::{check_identity, tests::wire_identity},
};
use far_proto::guest::Stage;
use std::time::Duration;

/// Steps at which far-node is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Starting,
    Hello,
    Running,
    Output,
    ExitStored,
    Ended,
}

#[tokio::test]
async fn killed_at_any_step_the_attempt_boots_once_and_ends_rightly() {
    for step in [
        Step::Starting,
        Step::Hello,
        Step::Running,
        Step::Output,
        Step::ExitStored,
        Step::Ended,
    ] {
        let world = World::new();
        let mut node = world.start().await;
        node.ensure().await;
        node.until_phase(Phase::Starting).await;
        while world.host.boots(&vm()) == 0 {
            tokio::task::yield_now().await;
        }
        if step == Step::Starting {
            node.kill().await;
            node = world.start().await;
            // Secrets were not delivered: they come again.
            node.ensure().await;
        }
        let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
        if step == Step::Hello {
            node.until(|record| record.booted_at.is_some()).await;
            node.kill().await;
            node = world.start().await;
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
            node.ensure().await;
        }
        guest.start().await;
        node.until_phase(Phase::Running).await;
        if step == Step::Running {
            node.kill().await;
            node = world.start().await;
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
            assert_eq!(guest.welcome().await.stored_stdout_seq, 0);
        }
        guest.log(1, "one\n").await;
        if step == Step::Output {
            while world.output(&vm()).0 != b"one\n" {
                tokio::task::yield_now().await;
            }
            node.kill().await;
            node = world.start().await;
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
            assert_eq!(guest.welcome().await.stored_stdout_seq, 1);
        }
        guest.log(2, "two\n").await;
        guest.exit(3, 2).await;
        node.until(|record| record.exit.is_some()).await;
        if step == Step::ExitStored {
            node.kill().await;
            node = world.start().await;
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::Exited).await;
            assert_eq!(guest.welcome().await.stored_stdout_seq, 2);
            guest.exit(3, 2).await;
        }
        assert!(guest.is_acknowledged().await, "{step:?}");
        world.host.end(&vm(), VmmEnd::Clean);
        let mut end = node.until_ended().await;
        if step == Step::Ended {
            node.kill().await;
            node = world.start().await;
            end = node.until_ended().await;
        }
        assert_eq!((end.reason, end.exit_code), (EndReason::Error, Some(3)), "{step:?}");
        assert_eq!(end.tail, "one\ntwo\n", "{step:?}");
        node.until_released().await;
        assert_eq!(world.host.boots(&vm()), 1, "{step:?}");
    }
}

#[tokio::test]
async fn a_vm_that_ended_while_far_node_was_down_gets_its_end() {
    for (vmm, reason) in [
        (VmmEnd::Clean, EndReason::InitLost),
        (VmmEnd::Crashed { message: "x".into() }, EndReason::VmmCrashed),
        (VmmEnd::Vanished { blade_rebooted: false }, EndReason::InitLost),
    ] {
        let world = World::new();
        let node = world.start().await;
        node.ensure().await;
        let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
        guest.start().await;
        node.until_phase(Phase::Running).await;
        node.kill().await;
        world.host.end(&vm(), vmm);
        let node = world.start().await;
        let end = node.until_ended().await;
        assert_eq!((end.reason, end.exit_code), (reason, None));
        assert_eq!(world.host.boots(&vm()), 1);
    }
}

#[tokio::test]
async fn a_blade_that_was_started_anew_says_so() {
    let mut world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    node.kill().await;
    world.host.end(&vm(), VmmEnd::Vanished { blade_rebooted: false });
    world.boot_id = "boot-2".into();
    let node = world.start().await;
    assert_eq!(node.until_ended().await.reason, EndReason::BladeRebooted);
}

#[tokio::test]
async fn an_accepted_attempt_waits_for_its_secrets_after_a_restart() {
    let world = World::new();
    // Recorded and killed before anything was done.
    let ledger = crate::ledger::Ledger::open(&world.dir.path().join("ledger")).unwrap();
    let record = crate::record::Record::accepted(identity(1), &spec(), "boot-1", 1);
    ledger.write_spec(&record.vm_id, &spec().without_secrets()).unwrap();
    ledger.write(&record).unwrap();
    let node = world.start().await;
    node.until_phase(Phase::Accepted).await;
    assert_eq!(world.host.boots(&vm()), 0);
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    let (config, _) = guest.start().await;
    assert!(config.env.iter().any(|env| env.value == "s3cret-env"));
}

#[tokio::test]
async fn killed_between_record_and_spawn_the_attempt_is_not_booted_again() {
    let world = World::new();
    let ledger = crate::ledger::Ledger::open(&world.dir.path().join("ledger")).unwrap();
    let mut record = crate::record::Record::accepted(identity(1), &spec(), "boot-1", 1);
    record.apply(crate::record::Fact::Preparing).unwrap();
    record.apply(crate::record::tests::spawning(1)).unwrap();
    ledger.write(&record).unwrap();
    let node = world.start().await;
    let end = node.until_ended().await;
    assert_eq!(end.exit_code, None);
    assert!(node.ensure().await.record.is_ended());
    assert_eq!(world.host.boots(&vm()), 0);
}

#[tokio::test]
async fn shutting_down_leaves_the_vm_to_the_next_far_node() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    node.shut_down().await;
    assert!(!world.host.is_dead(&vm()));
    let node = world.start().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::Exited).await;
    guest.welcome().await;
    guest.exit(0, 0).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.reason, EndReason::Completed);
}

#[tokio::test]
async fn leftovers_without_a_record_are_removed_and_the_rest_is_left() {
    let world = World::new();
    let stranger = crate::names::VmId::of(&crate::names::AttemptKey {
        uid: "stranger".into(),
        attempt: 1,
    });
    let folder = world.dir.path().join("vm");
    std::fs::create_dir(folder.join(stranger.as_str())).unwrap();
    std::fs::create_dir_all(world.dir.path().join("logs").join(stranger.as_str())).unwrap();
    std::fs::create_dir(folder.join("somebody-elses")).unwrap();
    let _node = world.start().await;
    while folder.join(stranger.as_str()).exists() || world.dir.path().join("logs").join(stranger.as_str()).exists() {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert!(folder.join("somebody-elses").exists());
}

/// Moves everything that limits count from an hour into the past, as if far-node had been down that long.
fn an_hour_passed(world: &World) {
    const HOUR: u64 = 3_600_000;
    let ledger = crate::ledger::Ledger::open(&world.dir.path().join("ledger")).unwrap();
    for (mut record, _) in ledger.load().unwrap().records {
        record.spawn.as_mut().unwrap().at -= HOUR;
        record.booted_at = record.booted_at.map(|at| at - HOUR);
        record.started_at = record.started_at.map(|at| at - HOUR);
        record.deadline_s = 60;
        ledger.write(&record).unwrap();
    }
}

#[tokio::test]
async fn a_guest_that_boots_while_far_node_is_down_for_long_still_runs() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    node.until_phase(Phase::Starting).await;
    while world.host.boots(&vm()) == 0 {
        tokio::task::yield_now().await;
    }
    node.kill().await;
    an_hour_passed(&world);
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    guest.exit(0, 0).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.reason, EndReason::Completed);
}

#[tokio::test]
async fn an_exit_report_held_past_the_deadline_still_counts() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.start().await;
    node.until_phase(Phase::Running).await;
    node.kill().await;
    an_hour_passed(&world);
    let node = world.start().await;
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::Exited).await;
    guest.exit(0, 0).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.reason, EndReason::Completed);
}

#[tokio::test]
async fn after_a_reboot_of_the_blade_no_limit_speaks_first() {
    let mut world = World::new();
    let node = world.start().await;
    node.ensure().await;
    node.until_phase(Phase::Starting).await;
    while world.host.boots(&vm()) == 0 {
        tokio::task::yield_now().await;
    }
    node.kill().await;
    an_hour_passed(&world);
    world.boot_id = "boot-2".into();
    let node = world.start().await;
    assert_eq!(node.until_ended().await.reason, EndReason::BladeRebooted);
}

#[tokio::test]
async fn when_the_lease_is_over_the_agents_end_also_while_far_node_is_dead() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    node.until_phase(Phase::Starting).await;
    while world.host.boots(&vm()) == 0 {
        tokio::task::yield_now().await;
    }
    node.supervisor.blade().fence.renew(0, Some(Duration::ZERO)).unwrap();
    node.kill().await;
    // far-vmm reads the same lease.
    world.host.end(&vm(), VmmEnd::Fenced);
    let node = world.start().await;
    assert_eq!(node.until_ended().await.reason, EndReason::NodeLost);
    assert_eq!(world.host.boots(&vm()), 1);
}

#[tokio::test]
async fn an_attempt_that_has_no_microvm_when_the_lease_is_over_never_gets_one() {
    let world = World::new();
    let node = world.start().await;
    // Without its secrets it waits.
    let waiting = spec().without_secrets().into();
    node.supervisor.ensure(identity(1), waiting).await.unwrap();
    node.supervisor.blade().fence.renew(0, Some(Duration::ZERO)).unwrap();
    node.kill().await;
    let node = world.start().await;
    node.supervisor.blade().fence.catch_up(&node.supervisor).await;
    assert_eq!(node.until_ended().await.reason, EndReason::NodeLost);
    node.ensure().await;
    assert_eq!(world.host.boots(&vm()), 0, "also when they come later");
}

#[tokio::test]
async fn an_attempt_that_had_no_microvm_when_the_machine_went_down_never_gets_one() {
    let mut world = World::new();
    let node = world.start().await;
    // Without its secrets it waits.
    let waiting = spec().without_secrets().into();
    node.supervisor.ensure(identity(1), waiting).await.unwrap();
    node.kill().await;
    // It was away for nobody knows how long: the attempt may run elsewhere. The old lease is not of this clock.
    world.boot_id = "boot-2".into();
    let node = world.start().await;
    node.supervisor.blade().fence.catch_up(&node.supervisor).await;
    assert_eq!(node.until_ended().await.reason, EndReason::BladeRebooted);
    node.ensure().await;
    assert_eq!(world.host.boots(&vm()), 0, "also when they come later");
}

#[tokio::test]
async fn a_control_socket_that_could_not_be_bound_is_bound_later() {
    let world = World::new();
    let node = world.start().await;
    node.ensure().await;
    node.until_phase(Phase::Starting).await;
    while world.host.boots(&vm()) == 0 {
        tokio::task::yield_now().await;
    }
    node.kill().await;
    // Nothing can be bound where a folder lies: as bad as having no file descriptor left.
    let in_the_way = world.socket(&vm());
    let _ = std::fs::remove_file(&in_the_way);
    std::fs::create_dir(&in_the_way).unwrap();
    let node = world.start().await;
    node.ensure().await;
    // The answer comes from a task that has tried to bind.
    let other = check_identity(Some(wire_identity("other", 1))).unwrap();
    assert!(node.supervisor.claim(key(), other, spec()).await.is_err());
    std::fs::remove_dir(&in_the_way).unwrap();
    let mut guest = Guest::dial(&in_the_way, 1, Stage::WaitingForConfig).await;
    guest.start().await;
    guest.exit(0, 0).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    assert_eq!(node.until_ended().await.reason, EndReason::Completed);
}
