//! A hostile payload in a real microVM, against its blade: what it dials and says on vsock costs the blade little, other
//! agents nothing, and makes no file. Cases 1 to 5 and 8 of the project's list of hostile inputs.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, agent};
use far_proto::node::{EndReason, Phase};

/// What far-node may take for one hostile guest at most, KiB.
const BUDGET_KIB: u64 = 32 << 10;

#[tokio::test]
async fn a_payload_that_floods_scans_and_talks_nonsense_harms_nobody() {
    const TEST: &str = "a_payload_that_floods_scans_and_talks_nonsense_harms_nobody";
    let Some(mut node) = Node::start(TEST).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    // Once, so that far-node has what every agent costs.
    node.client()
        .ensure_agent(agent("calm", "payload", None, &["exit=0"], 128))
        .await
        .unwrap();
    node.until("calm", |state| state.phase() == Phase::Ended).await;
    let before = node.resident_kib();
    let steps = [
        "vsock-nonsense",
        "vsock-scan=300",
        "vsock-flood=10000",
        "vsock-nonsense",
        "out=done",
        "exit=5",
    ];
    node.client()
        .ensure_agent(agent("hostile", "payload", None, &steps, 192))
        .await
        .unwrap();
    let state = node.until("hostile", |state| state.phase() == Phase::Running).await;
    node.client()
        .ensure_agent(agent("other", "payload", None, &["out=fine", "exit=0"], 128))
        .await
        .unwrap();
    let other = node.until("other", |state| state.phase() == Phase::Ended).await;
    assert_eq!(other.end.unwrap().reason(), EndReason::Completed, "{}", node.report());
    let sockets = node.files_in(&format!("run/vm/{}", state.vm_id));
    let odd: Vec<_> = sockets
        .iter()
        .filter(|path| path.file_name().unwrap().to_string_lossy().contains("v.sock_"))
        .filter(|path| !path.to_string_lossy().ends_with("v.sock_5000"))
        .collect();
    assert!(odd.is_empty(), "a guest made files: {odd:?}");
    let state = node.until("hostile", |state| state.phase() == Phase::Ended).await;
    let output = node.output("hostile").await;
    let end = state.end.unwrap();
    // Its own report, by its own init, in spite of all that was said on its socket.
    assert_eq!(
        (end.reason(), end.exit_code),
        (EndReason::Error, Some(5)),
        "{output}\n{}",
        node.report()
    );
    assert!(
        output.contains("reached 0 of ") && output.contains("dialled 10000 times"),
        "{output}"
    );
    let after = node.resident_kib();
    assert!(
        after < before + BUDGET_KIB,
        "far-node grew from {before} to {after} KiB"
    );
    node.until_nothing_is_left(&state.vm_id).await;
}
