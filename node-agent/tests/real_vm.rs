//! far-node, far-vmm and real microVMs. Skipped by name where the boot kit, far-vmm or QEMU is missing.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, Victim, agent};
use far_proto::node::{EndReason, Phase, StopAgentRequest};
use std::time::Duration;

#[tokio::test]
async fn the_seeds_embedder_completes_and_its_output_is_kept() {
    let Some(mut node) = Node::start("the_seeds_embedder_completes_and_its_output_is_kept").await else {
        return;
    };
    node.load_tiffany("ghcr.io/microscaler/tiffany-vm:v0.3.1").await;
    let request = agent(
        "seed",
        "ghcr.io/microscaler/tiffany-vm:v0.3.1",
        Some("/usr/local/bin/tiffany"),
        &["--task", "embedder"],
        512,
    );
    node.client().ensure_agent(request).await.unwrap();
    let state = node.until("seed", |state| state.phase() == Phase::Ended).await;
    let end = state.end.clone().unwrap();
    assert_eq!(
        (end.reason(), end.exit_code),
        (EndReason::Completed, Some(0)),
        "{state:#?}\n{}",
        node.report()
    );
    assert!(state.booted_at.is_some() && state.started_at.is_some() && state.vmm_cpu_us > 0);
    assert!(state.image_digest.starts_with("sha256:"));
    let output = node.output("seed").await;
    assert!(!output.is_empty());
    assert!(
        output.ends_with(&end.tail) || end.tail.len() >= 2000,
        "{output:?} {:?}",
        end.tail
    );
    node.until_nothing_is_left(&state.vm_id).await;
    println!("VMM CPU {} ms", state.vmm_cpu_us / 1000);
}

#[tokio::test]
async fn an_exit_code_is_told_as_an_error() {
    let Some(mut node) = Node::start("an_exit_code_is_told_as_an_error").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    node.client()
        .ensure_agent(agent(
            "three",
            "payload",
            None,
            &["out=hello", "err=oops", "exit=3"],
            128,
        ))
        .await
        .unwrap();
    let state = node.until("three", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!(
        (end.reason(), end.exit_code),
        (EndReason::Error, Some(3)),
        "{}",
        node.report()
    );
    let output = node.output("three").await;
    assert!(output.contains("hello\n") && output.contains("oops\n"), "{output:?}");
}

#[tokio::test]
async fn secrets_and_files_arrive_and_are_nowhere_on_disk() {
    let Some(mut node) = Node::start("secrets_and_files_arrive_and_are_nowhere_on_disk").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let mut request = agent(
        "files",
        "payload",
        None,
        &["env=TOKEN", "cat=/task/a.txt", "stat=/task/a.txt", "sleep=1"],
        128,
    );
    let spec = request.spec.as_mut().unwrap();
    spec.env.push(far_proto::node::EnvVar {
        name: "TOKEN".into(),
        value: "hunter2hunter2".into(),
        secret: true,
    });
    spec.files.push(far_proto::node::File {
        path: "/task/a.txt".into(),
        mode: 0o400,
        data: b"content-of-a\n".to_vec(),
        secret: true,
    });
    node.client().ensure_agent(request).await.unwrap();
    let state = node
        .until("files", |state| {
            state.phase() == Phase::Running || state.phase() == Phase::Ended
        })
        .await;
    // Everything on disk while it runs, but what it prints itself.
    let vm_id = state.vm_id;
    node.assert_nowhere_on_disk(b"hunter2hunter2", &vm_id);
    node.until("files", |state| state.phase() == Phase::Ended).await;
    let output = node.output("files").await;
    assert!(
        output.contains("TOKEN=hunter2hunter2") && output.contains("content-of-a"),
        "{output:?} {}",
        node.report()
    );
}

#[tokio::test]
async fn killed_in_the_middle_far_node_adopts_the_vm_and_loses_no_line() {
    let test = "killed_in_the_middle_far_node_adopts_the_vm_and_loses_no_line";
    let Some(mut node) = Node::start(test).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    node.client()
        .ensure_agent(agent("adopted", "payload", None, &["count-to=60", "exit=3"], 128))
        .await
        .unwrap();
    node.until("adopted", |state| state.phase() == Phase::Running).await;
    node.until_output("adopted", "line 5\n").await;
    for _ in 0..2 {
        node.kill_and_restart().await;
        node.until("adopted", |state| state.phase() != Phase::Accepted).await;
    }
    let state = node.until("adopted", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!(
        (end.reason(), end.exit_code),
        (EndReason::Error, Some(3)),
        "{}",
        node.report()
    );
    let expected: String = (1..=60).map(|n| format!("line {n}\n")).collect();
    assert_eq!(node.output("adopted").await, expected);
    node.until_nothing_is_left(&state.vm_id).await;
}

#[tokio::test]
async fn killed_during_the_boot_nothing_is_lost_or_left() {
    let Some(mut node) = Node::start("killed_during_the_boot_nothing_is_lost_or_left").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let request = agent("early", "payload", None, &["out=hello"], 128);
    node.client().ensure_agent(request.clone()).await.unwrap();
    node.until("early", |state| state.phase() >= Phase::Starting).await;
    node.kill_and_restart().await;
    node.client().ensure_agent(request).await.unwrap();
    let state = node.until("early", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    // Killed before far-vmm was spawned, nobody knows; after that it runs on.
    match end.reason() {
        EndReason::Completed => assert_eq!(end.exit_code, Some(0)),
        EndReason::InitLost | EndReason::VmmCrashed => assert_eq!(end.exit_code, None),
        other => panic!("{other:?} {end:?} {}", node.report()),
    }
    node.until_nothing_is_left(&state.vm_id).await;
}

#[tokio::test]
async fn a_stop_asks_first_and_kills_what_does_not_listen() {
    let Some(mut node) = Node::start("a_stop_asks_first_and_kills_what_does_not_listen").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let request = agent(
        "stubborn",
        "payload",
        None,
        &["ignore-term", "out=ready", "sleep=600000"],
        128,
    );
    node.client().ensure_agent(request.clone()).await.unwrap();
    node.until_output("stubborn", "ready\n").await;
    let stop = StopAgentRequest {
        epoch: 0,
        identity: request.identity,
        grace_s: Some(1),
        reason: 0,
    };
    node.client().stop_agent(stop).await.unwrap();
    let state = node.until("stubborn", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!(
        (end.reason(), end.signal),
        (EndReason::Signal, Some(9)),
        "{end:?} {}",
        node.report()
    );
    node.until_nothing_is_left(&state.vm_id).await;
}

#[tokio::test]
async fn a_killed_vmm_is_told_as_such() {
    let Some(mut node) = Node::start("a_killed_vmm_is_told_as_such").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    for victim in [Victim::Vmm, Victim::FarVmm, Victim::Vsock] {
        let uid = format!("{victim:?}").to_lowercase();
        let request = agent(&uid, "payload", None, &["out=ready", "sleep=600000"], 128);
        node.client().ensure_agent(request).await.unwrap();
        node.until_output(&uid, "ready\n").await;
        let state = node.until(&uid, |state| state.phase() == Phase::Running).await;
        node.kill_part(&state.vm_id, victim).await;
        let state = node.until(&uid, |state| state.phase() == Phase::Ended).await;
        let end = state.end.unwrap();
        assert_eq!(
            (end.reason(), end.exit_code),
            (EndReason::VmmCrashed, None),
            "{uid}: {end:?} {}",
            node.report()
        );
        node.until_nothing_is_left(&state.vm_id).await;
    }
}

#[tokio::test]
async fn a_guest_that_dies_without_a_report_has_no_exit_code() {
    let test = "a_guest_that_dies_without_a_report_has_no_exit_code";
    let Some(mut node) = Node::start(test).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    for (step, reason) in [("power-off", EndReason::InitLost), ("sysrq=c", EndReason::KernelPanic)] {
        let uid = step.split('=').next().unwrap();
        node.client()
            .ensure_agent(agent(uid, "payload", None, &["out=ready", step], 128))
            .await
            .unwrap();
        let end = node
            .until(uid, |state| state.phase() == Phase::Ended)
            .await
            .end
            .unwrap();
        assert_eq!(
            (end.reason(), end.exit_code, end.signal),
            (reason, None, None),
            "{step}: {end:?} {}",
            node.report()
        );
    }
}

#[tokio::test]
async fn a_flood_is_bounded_and_ends_well() {
    let Some(mut node) = Node::start("a_flood_is_bounded_and_ends_well").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let began = std::time::Instant::now();
    node.client()
        .ensure_agent(agent("flood", "payload", None, &["flood=67108864", "out=done"], 128))
        .await
        .unwrap();
    let state = node.until("flood", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!(
        (end.reason(), end.exit_code),
        (EndReason::Completed, Some(0)),
        "{}",
        node.report()
    );
    println!("64 MiB of output: {:?} with the boot", began.elapsed());
    let (output, dropped) = node.output_and_drops("flood").await;
    assert!(output.ends_with(b"done\n") && dropped > 0);
    assert!(output.len() as u64 + dropped >= 64 << 20);
    assert!(node.log_bytes(&state.vm_id) <= common::LOG_MAX_BYTES);
}

#[tokio::test]
async fn a_silent_guest_is_a_boot_timeout() {
    let Some(mut node) = Node::start_with("a_silent_guest_is_a_boot_timeout", &["--boot-timeout", "1s"]).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    node.client()
        .ensure_agent(agent("silent", "payload", None, &["out=x"], 128))
        .await
        .unwrap();
    let state = node.until("silent", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!((end.reason(), end.exit_code), (EndReason::BootTimeout, None), "{end:?}");
    node.until_nothing_is_left(&state.vm_id).await;
}

#[tokio::test]
async fn bad_images_and_programs_are_told_before_a_boot() {
    let Some(mut node) = Node::start("bad_images_and_programs_are_told_before_a_boot").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    node.client()
        .ensure_agent(agent("noimage", "example.test/none:v1", None, &[], 128))
        .await
        .unwrap();
    let end = node
        .until("noimage", |state| state.phase() == Phase::Ended)
        .await
        .end
        .unwrap();
    assert_eq!(end.reason(), EndReason::ImageError);
    assert!(
        end.message.contains("spec.image") && end.message.contains("example.test/none:v1"),
        "{}",
        end.message
    );
    node.client()
        .ensure_agent(agent("noprogram", "payload", Some("/nowhere"), &[], 128))
        .await
        .unwrap();
    let end = node
        .until("noprogram", |state| state.phase() == Phase::Ended)
        .await
        .end
        .unwrap();
    assert_eq!(end.reason(), EndReason::Error);
    assert!(
        end.message.contains("spec.entrypoint") && end.message.contains("/nowhere"),
        "{}",
        end.message
    );
    let too_much = node
        .client()
        .ensure_agent(agent("huge", "payload", None, &[], 1_000_000))
        .await
        .unwrap_err();
    assert_eq!(too_much.code(), tonic::Code::ResourceExhausted);
    let wrong = node
        .client()
        .ensure_agent(agent("zero", "payload", None, &[], 0))
        .await
        .unwrap_err();
    assert_eq!(wrong.code(), tonic::Code::InvalidArgument);
    assert!(wrong.message().contains("spec.memory"));
    tokio::time::timeout(Duration::from_secs(60), node.stop())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_guest_has_a_nic_or_the_status_says_why_not() {
    let test = "a_guest_has_a_nic_or_the_status_says_why_not";
    for (more, may_have_one) in [(&[][..], true), (&["--network", "none"][..], false)] {
        let Some(mut node) = Node::start_with(test, more).await else {
            return;
        };
        let Some(()) = node.load_payload().await else { return };
        let request = agent(
            "nic",
            "payload",
            None,
            &["cat=/proc/net/dev", "cat=/proc/net/fib_trie"],
            128,
        );
        node.client().ensure_agent(request).await.unwrap();
        let state = node.until("nic", |state| state.phase() == Phase::Ended).await;
        assert_eq!(state.end.as_ref().unwrap().exit_code, Some(0), "{}", node.report());
        let resources = state.resources.clone().unwrap();
        assert_eq!(resources.nic, resources.no_nic_reason.is_empty(), "{resources:?}");
        assert!(may_have_one || !resources.nic);
        let output = node.output("nic").await;
        assert_eq!(output.contains("169.254.77.2"), resources.nic, "{output}\n{state:#?}");
        eprintln!("nic: {} {}", resources.nic, resources.no_nic_reason);
        node.until_nothing_is_left(&state.vm_id).await;
    }
}

#[tokio::test]
async fn killed_at_any_stage_after_the_spawn_the_agent_still_completes_once() {
    let test = "killed_at_any_stage_after_the_spawn_the_agent_still_completes_once";
    let Some(mut node) = Node::start(test).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    for stage in ["far-vmm", "vhost-device-vsock", "qemu-system"] {
        let uid = format!("at-{stage}");
        let request = agent(&uid, "payload", None, &["out=done"], 128);
        let state = node.client().ensure_agent(request.clone()).await.unwrap().into_inner();
        node.until_process(&state.vm_id, stage).await;
        node.kill_and_restart().await;
        node.client().ensure_agent(request).await.unwrap();
        let state = node.until(&uid, |state| state.phase() == Phase::Ended).await;
        let end = state.end.unwrap();
        assert_eq!(
            (end.reason(), end.exit_code),
            (EndReason::Completed, Some(0)),
            "{stage}: {end:?}\n{}",
            node.report()
        );
        assert_eq!(node.output(&uid).await, "done\n", "{stage}");
        node.until_nothing_is_left(&state.vm_id).await;
    }
}
