//! Ends that only a blade sees, each provoked with a real microVM. Skipped by name where one cannot boot here.
//! docs/truthful-ends.md lists all reasons and their tests.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, Victim, agent};
use far_proto::node::{EndReason, Phase};
use std::os::unix::fs::MetadataExt;

/// Runs until told otherwise.
const STEPS: &[&str] = &["out=up", "sleep=3600000"];

#[tokio::test]
async fn a_far_vmm_killed_while_far_node_was_away_is_a_crash_of_the_vmm() {
    const TEST: &str = "a_far_vmm_killed_while_far_node_was_away_is_a_crash_of_the_vmm";
    let Some(mut node) = Node::start(TEST).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let request = agent("alone", "payload", None, STEPS, 128);
    node.client().ensure_agent(request).await.unwrap();
    let state = node.until("alone", |state| state.phase() == Phase::Running).await;
    node.kill();
    node.kill_part(&state.vm_id, Victim::FarVmm).await;
    node.restart().await;
    let state = node.until("alone", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!(
        (end.reason(), end.exit_code, end.signal),
        (EndReason::VmmCrashed, None, None),
        "{}",
        node.report()
    );
    node.until_nothing_is_left(&state.vm_id).await;
}

/// The blade's kernel draws a new boot id at each start; far-node reads this one in a mount namespace of its own.
#[tokio::test]
async fn a_blade_that_was_started_anew_says_so() {
    const TEST: &str = "a_blade_that_was_started_anew_says_so";
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("SKIPPED {TEST}: root, for a mount namespace");
        return;
    }
    let Some(mut node) = Node::start_booted_as(TEST, "11111111-1111-4111-8111-111111111111").await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let request = agent("old", "payload", None, STEPS, 128);
    node.client().ensure_agent(request).await.unwrap();
    let state = node.until("old", |state| state.phase() == Phase::Running).await;
    // As a power cut: every process at once, nobody writes anything down.
    node.kill();
    node.kill_part(&state.vm_id, Victim::FarVmm).await;
    node.set_boot_id("22222222-2222-4222-8222-222222222222");
    node.restart().await;
    let state = node.until("old", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!(
        (end.reason(), end.exit_code, end.signal),
        (EndReason::BladeRebooted, None, None),
        "{}",
        node.report()
    );
    node.until_nothing_is_left(&state.vm_id).await;
}

#[tokio::test]
async fn folders_and_the_writable_layer_hold_what_their_limits_say() {
    const TEST: &str = "folders_and_the_writable_layer_hold_what_their_limits_say";
    let Some(mut node) = Node::start(TEST).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let steps = ["fill=/data/deep/a", "fill=/b", "stat=/data", "exit=0"];
    let mut request = agent("room", "payload", None, &steps, 256);
    let spec = request.spec.as_mut().unwrap();
    spec.scratch_mib = 3;
    spec.folders = [("/data/deep", 2), ("/data", 0)]
        .map(|(path, size_mib)| far_proto::node::EmptyFolder {
            path: path.into(),
            size_mib,
        })
        .into();
    // A file may lie in such a folder.
    spec.files.push(far_proto::node::File {
        path: "/data/task.txt".into(),
        mode: 0o444,
        data: b"task".to_vec(),
        secret: false,
    });
    node.client().ensure_agent(request).await.unwrap();
    let state = node.until("room", |state| state.phase() == Phase::Ended).await;
    let output = node.output("room").await;
    assert_eq!(
        state.end.unwrap().reason(),
        EndReason::Completed,
        "{output}\n{}",
        node.report()
    );
    let took = |path: &str| -> u64 {
        let line = output
            .lines()
            .find_map(|line| line.strip_prefix(path)?.strip_prefix(" took "))
            .unwrap();
        line.trim_end_matches(" KiB").parse().unwrap()
    };
    assert_eq!(took("/data/deep/a"), 2048, "{output}");
    // Folders and what far-init wrote take some of it.
    assert!((2700..=3072).contains(&took("/b")), "{output}");
    assert!(output.contains("/data mode=777 uid=0"), "{output}");
}

#[tokio::test]
async fn a_name_that_moves_to_another_image_frees_the_first_and_a_broken_upload_leaves_nothing() {
    const TEST: &str = "a_name_that_moves_to_another_image_frees_the_first_and_a_broken_upload_leaves_nothing";
    let Some(mut node) = Node::start(TEST).await else {
        return;
    };
    node.load_tiffany("moves").await;
    assert_eq!(node.files_in("state/images/store/rootfs").len(), 1);
    node.load_image_of("moves", b"another").await;
    assert_eq!(
        node.files_in("state/images/store/rootfs").len(),
        1,
        "the first image is gone"
    );

    let (parts, inbox) = tokio::sync::mpsc::channel(1);
    let part = |data: &[u8]| far_proto::node::LoadImageRequest {
        reference: "never".into(),
        data: data.to_vec(),
    };
    parts.send(part(&[0; 1000])).await.unwrap();
    let mut client = node.client().clone();
    let call = tokio::spawn(async move {
        client
            .load_image(tokio_stream::wrappers::ReceiverStream::new(inbox))
            .await
    });
    node.until_files("state/images/incoming", 1).await;
    call.abort();
    node.until_files("state/images/incoming", 0).await;
}

#[tokio::test]
async fn the_state_stays_locked_until_the_last_blocking_work_is_done() {
    const TEST: &str = "the_state_stays_locked_until_the_last_blocking_work_is_done";
    let Some(mut node) = Node::start(TEST).await else {
        return;
    };
    let mut content = vec![0; 24 << 20];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut content);
    let mut image = far_image::oci::Builder::new();
    image.file("/file", 0o644, 0, content).unwrap();
    let archive = image.build();
    let size = archive.len() as u64;
    let parts: Vec<_> = archive
        .chunks(1 << 20)
        .map(|data| far_proto::node::LoadImageRequest {
            reference: "large".into(),
            data: data.to_vec(),
        })
        .collect();
    let mut client = node.client().clone();
    let call = tokio::spawn(async move { client.load_image(tokio_stream::iter(parts)).await });
    // All of it came: now it is unpacked, on a blocking thread.
    while !node
        .tree("state/images/incoming")
        .iter()
        .any(|(_, length)| *length == size)
    {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    while node.files_in("state/images/store/tmp").is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    node.terminate_twice();
    let _lock = node.lock_state().await;
    let seen = node.tree("state");
    node.wait_for_the_end();
    assert_eq!(node.tree("state"), seen, "it wrote without the lock");
    let _ = call.await;
}

/// The blade's rules vanish beneath far-node: nothing may be connected that nothing keeps in.
#[tokio::test]
async fn a_blade_that_cannot_connect_a_microvm_is_a_network_error() {
    const TEST: &str = "a_blade_that_cannot_connect_a_microvm_is_a_network_error";
    let Some(mut node) = Node::start(TEST).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let request = agent("first", "payload", None, STEPS, 128);
    node.client().ensure_agent(request).await.unwrap();
    let state = node.until("first", |state| state.phase() == Phase::Running).await;
    let resources = state.resources.unwrap();
    if !resources.nic {
        eprintln!("SKIPPED {TEST}: {}", resources.no_nic_reason);
        return;
    }
    // Its VMM is in the guests' network namespace.
    let vmm = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let vmm = vmm
        .filter(|path| std::fs::read_link(path.join("exe")).is_ok_and(|exe| exe.to_string_lossy().contains("qemu")))
        .find(|path| {
            let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&state.vm_id)
        });
    let Some(vmm) = vmm else {
        eprintln!("SKIPPED {TEST}: the VMM is not QEMU");
        return;
    };
    let flushed = std::process::Command::new("nsenter")
        .arg(format!("--net={}", vmm.join("ns/net").display()))
        .args(["nft", "flush", "ruleset"])
        .output();
    let Ok(flushed) = flushed else {
        eprintln!("SKIPPED {TEST}: nsenter");
        return;
    };
    let error = String::from_utf8_lossy(&flushed.stderr);
    if error.contains("No such file") {
        eprintln!("SKIPPED {TEST}: nft");
        return;
    }
    assert!(flushed.status.success(), "{error}");
    node.client()
        .ensure_agent(agent("second", "payload", None, STEPS, 128))
        .await
        .unwrap();
    let state = node.until("second", |state| state.phase() == Phase::Ended).await;
    let end = state.end.unwrap();
    assert_eq!(
        (end.reason(), end.exit_code, end.signal),
        (EndReason::NetworkError, None, None),
        "{}",
        node.report()
    );
    assert!(end.message.contains("spec.network"), "{}", end.message);
}
