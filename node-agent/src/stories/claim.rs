//! A warm VM and those who claim it.

use super::doubles::*;
use crate::{
    agent::claim::NotClaimed,
    names::AttemptKey,
    outcome::VmmEnd,
    record::{EndReason, Phase},
    spec::{Identity, Spec, check_identity, tests::wire_identity},
    supervisor::Refusal,
};
use far_proto::guest::Stage;
use std::fs;
use tokio::time::Duration;

fn warm_spec() -> Spec {
    Spec {
        entrypoint: None,
        args: Vec::new(),
        env: Vec::new(),
        files: Vec::new(),
        start_on_claim: true,
        ..spec()
    }
}

fn claimant(uid: &str) -> Identity {
    check_identity(Some(wire_identity(uid, 1))).unwrap()
}

/// A blade whose one VM is warm, and its guest.
async fn warm() -> (World, Node, Guest) {
    let world = World::new();
    let node = world.start().await;
    node.supervisor.ensure(identity(1), warm_spec()).await.unwrap();
    let mut guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
    guest.welcome().await;
    node.until_phase(Phase::Warm).await;
    (world, node, guest)
}

/// Plays the guest to exit code 5 and looks at what is told of the claimant.
async fn to_the_end(world: &World, node: &Node, guest: &mut Guest, key: &AttemptKey) {
    guest.log(1, "claimed work\n").await;
    guest.exit(5, 1).await;
    assert!(guest.is_acknowledged().await);
    world.host.end(&vm(), VmmEnd::Clean);
    let record = node.until_of(key, |record| record.is_ended()).await;
    let end = record.end.clone().unwrap();
    assert_eq!(
        (end.reason, end.exit_code, end.tail.as_str()),
        (EndReason::Error, Some(5), "claimed work\n")
    );
    assert_eq!((&record.vm_id, world.host.boots(&vm())), (&vm(), 1));
    let warm = node.until_ended().await;
    assert_eq!((warm.reason, warm.exit_code), (EndReason::Evicted, None));
    assert_eq!(warm.message, "claimed by default/a");
    node.until_released().await;
}

#[tokio::test]
async fn of_many_claimants_exactly_one_gets_the_warm_vm() {
    let (world, node, mut guest) = warm().await;
    let names: Vec<String> = (0..8).map(|n| format!("claimant-{n}")).collect();
    // Each of them calls twice, as a controller does whose first answer was lost.
    let calls = names
        .iter()
        .chain(&names)
        .map(|name| node.supervisor.claim(key(), claimant(name), spec()));
    let answers = futures::future::join_all(calls).await;
    let mut winners = std::collections::BTreeSet::new();
    for answer in answers {
        match answer {
            Ok(entry) => drop(winners.insert(entry.record.identity.key.clone())),
            Err(Refusal::NotClaimed(NotClaimed::NotWarm(_)) | Refusal::Busy(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(winners.len(), 1);
    let winner = winners.pop_first().unwrap();
    let (config, files) = guest.start_after_welcome().await;
    assert_eq!(config.args, spec().args);
    assert!(config.env.iter().any(|env| env.value == "s3cret-env"));
    assert_eq!(files, [b"# a".to_vec(), b"s3cret-file".to_vec()]);
    node.until_of(&winner, |record| record.phase == Phase::Running).await;
    to_the_end(&world, &node, &mut guest, &winner).await;
    // The warm identity goes, and the claimant's output stays.
    node.supervisor.forget(key()).await.unwrap();
    assert_eq!(world.output(&vm()).0, b"claimed work\n");
    node.supervisor.forget(winner).await.unwrap();
    assert_eq!(world.output(&vm()).0, b"");
    // And no late call brings either back.
    assert!(
        node.supervisor
            .ensure(identity(1), warm_spec())
            .await
            .unwrap()
            .record
            .is_ended()
    );
    assert_eq!(world.host.boots(&vm()), 1);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Warm,
    ClaimWritten,
    Claimed,
    Delivered,
    Running,
}

#[tokio::test]
async fn killed_at_any_step_of_a_claim_the_vm_boots_once_and_the_claimant_gets_it() {
    for step in [
        Step::Warm,
        Step::ClaimWritten,
        Step::Claimed,
        Step::Delivered,
        Step::Running,
    ] {
        let (world, mut node, mut guest) = warm().await;
        if step == Step::Warm {
            node.kill().await;
            node = world.start().await;
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
            guest.welcome().await;
        }
        let warm_file = world.dir.path().join("ledger").join(format!("{}.json", vm()));
        let warm_record = fs::read(&warm_file).unwrap();
        if matches!(step, Step::ClaimWritten | Step::Claimed) {
            guest.hang_up().await;
        }
        let by = claimant("claimant");
        node.supervisor.claim(key(), by.clone(), spec()).await.unwrap();
        if matches!(step, Step::ClaimWritten | Step::Claimed) {
            node.kill().await;
            if step == Step::ClaimWritten {
                // As killed between the claimant's record and the warm one's end.
                fs::write(&warm_file, &warm_record).unwrap();
            }
            node = world.start().await;
            let late = node.supervisor.claim(key(), claimant("late"), spec()).await;
            assert!(
                matches!(late, Err(Refusal::NotClaimed(NotClaimed::NotWarm(_)))),
                "{step:?}"
            );
            // Secrets were not kept: they come again.
            node.supervisor.claim(key(), by.clone(), spec()).await.unwrap();
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::WaitingForConfig).await;
            guest.start().await;
        } else if step == Step::Delivered {
            node.kill().await;
            node = world.start().await;
            // The guest took Start, and its Ready was lost.
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
            guest.welcome().await;
        } else {
            guest.start_after_welcome().await;
        }
        node.until_of(&by.key, |record| record.phase == Phase::Running).await;
        if step == Step::Running {
            node.kill().await;
            node = world.start().await;
            guest = Guest::dial(&world.socket(&vm()), 1, Stage::Running).await;
            guest.welcome().await;
        }
        to_the_end(&world, &node, &mut guest, &by.key).await;
    }
}

#[tokio::test]
async fn a_stop_of_the_warm_attempt_that_comes_late_leaves_the_claimant_alone() {
    let (world, node, mut guest) = warm().await;
    let by = claimant("claimant");
    let (claimed, stopped) = tokio::join!(
        node.supervisor.claim(key(), by.clone(), spec()),
        node.supervisor.stop(identity(1), Some(0), None)
    );
    assert!(claimed.unwrap().record.claim.is_some() && stopped.is_ok());
    guest.start_after_welcome().await;
    node.until_of(&by.key, |record| record.phase == Phase::Running).await;
    to_the_end(&world, &node, &mut guest, &by.key).await;
}

#[tokio::test]
async fn a_stopped_or_ended_warm_attempt_is_not_claimed() {
    let (world, node, _guest) = warm().await;
    node.supervisor.stop(identity(1), Some(0), None).await.unwrap();
    let late = node.supervisor.claim(key(), claimant("late"), spec()).await;
    assert!(matches!(late, Err(Refusal::NotClaimed(NotClaimed::NotWarm(_)))));
    assert_eq!(node.until_ended().await.reason, EndReason::Evicted);
    let later = node.supervisor.claim(key(), claimant("late"), spec()).await;
    assert!(matches!(later, Err(Refusal::NotClaimed(NotClaimed::NotWarm(_)))));
    assert!(node.blade.board.entry(&claimant("late").key).is_none());
    assert_eq!(world.host.boots(&vm()), 1);
}

#[tokio::test]
async fn a_claim_that_does_not_fit_names_the_field_and_leaves_the_vm_warm() {
    let (_world, node, _guest) = warm().await;
    let other = Spec {
        memory_mib: 512,
        ..spec()
    };
    let refusal = node
        .supervisor
        .claim(key(), claimant("other"), other)
        .await
        .unwrap_err();
    assert!(refusal.to_string().starts_with("spec.memory"), "{refusal}");
    let missing = Spec {
        entrypoint: Some("/missing".into()),
        ..spec()
    };
    let refusal = node
        .supervisor
        .claim(key(), claimant("other"), missing)
        .await
        .unwrap_err();
    assert!(refusal.to_string().starts_with("spec.entrypoint"), "{refusal}");
    assert!(node.blade.board.entry(&claimant("other").key).is_none());
    assert!(node.supervisor.claim(key(), claimant("fits"), spec()).await.is_ok());
}

#[tokio::test]
async fn a_claim_that_was_withdrawn_before_it_came_stays_so() {
    let (_world, node, _guest) = warm().await;
    node.supervisor.stop(claimant("late"), None, None).await.unwrap();
    let entry = node.supervisor.claim(key(), claimant("late"), spec()).await.unwrap();
    assert!(entry.record.is_ended() && entry.record.booted_at.is_none());
    assert_eq!(node.blade.board.entry(&key()).unwrap().record.phase, Phase::Warm);
}

#[tokio::test(start_paused = true)]
async fn a_warm_vm_waits_for_ever_and_its_claimant_has_its_own_limits() {
    let (_world, node, mut guest) = warm().await;
    tokio::time::sleep(Duration::from_secs(3600 * 24)).await;
    assert_eq!(node.blade.board.entry(&key()).unwrap().record.phase, Phase::Warm);
    let by = claimant("claimant");
    let limited = Spec {
        deadline_s: 600,
        ..spec()
    };
    node.supervisor.claim(key(), by.clone(), limited).await.unwrap();
    guest.start_after_welcome().await;
    let record = node.until_of(&by.key, |record| record.phase == Phase::Running).await;
    assert!(record.stop.is_none());
    let stopped = node.until_of(&by.key, |record| record.stop.is_some()).await;
    let order = stopped.stop.clone().unwrap();
    assert_eq!(order.reason, Some(EndReason::DeadlineExceeded));
    assert!(order.at - record.claim.as_ref().unwrap().at >= 600_000);
}
