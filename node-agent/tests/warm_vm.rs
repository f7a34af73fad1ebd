//! Warm real microVMs that other agents take over. Skipped by name where the boot kit, far-vmm or QEMU is missing.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, agent};
use far_proto::node::{AgentState, ClaimAgentRequest, EndReason, EnvVar, File, ListAgentsRequest, Phase};

/// Boots an agent that waits to be claimed.
async fn warm(node: &mut Node, uid: &str) -> AgentState {
    let mut request = agent(uid, "payload", None, &[], 128);
    request.spec.as_mut().unwrap().start_on_claim = true;
    node.client().ensure_agent(request).await.unwrap();
    node.until(uid, |state| matches!(state.phase(), Phase::Warm | Phase::Ended))
        .await
}

/// The claim of `warm` by `uid`, with things that only the claimant knows.
fn claim(warm: &str, uid: &str, exit: &str) -> ClaimAgentRequest {
    let mut wanted = agent(
        uid,
        "payload",
        None,
        &["env=WHO", "cat=/task/who.txt", &format!("exit={exit}")],
        128,
    );
    let spec = wanted.spec.as_mut().unwrap();
    spec.env.push(EnvVar {
        name: "WHO".into(),
        value: uid.into(),
        secret: true,
    });
    spec.files.push(File {
        path: "/task/who.txt".into(),
        mode: 0o400,
        data: format!("file of {uid}\n").into_bytes(),
        secret: false,
    });
    ClaimAgentRequest {
        epoch: 0,
        warm: agent(warm, "payload", None, &[], 128).identity,
        identity: wanted.identity,
        spec: wanted.spec,
    }
}

/// The claimant ended as it asked for, in the warm agent's VM, without another boot.
async fn ended_rightly(node: &mut Node, was: &AgentState, uid: &str, code: i32) {
    let state = node.until(uid, |state| state.phase() == Phase::Ended).await;
    let end = state.end.clone().unwrap();
    assert_eq!(
        (end.reason(), end.exit_code),
        (EndReason::Error, Some(code)),
        "{state:#?}\n{}",
        node.report()
    );
    assert_eq!((&state.vm_id, state.booted_at), (&was.vm_id, was.booted_at));
    let output = node.output(uid).await;
    assert_eq!(output, format!("WHO={uid}\nfile of {uid}\n"), "{}", node.report());
    node.until_nothing_is_left(&state.vm_id).await;
}

async fn boots(node: &mut Node) -> usize {
    let agents = node
        .client()
        .list_agents(ListAgentsRequest {})
        .await
        .unwrap()
        .into_inner();
    let vms: std::collections::BTreeSet<_> = agents.agents.into_iter().map(|state| state.vm_id).collect();
    vms.len()
}

#[tokio::test]
async fn two_claims_get_their_env_args_and_files_in_warm_vms_without_a_new_boot() {
    let test = "two_claims_get_their_env_args_and_files_in_warm_vms_without_a_new_boot";
    let Some(mut node) = Node::start(test).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let mut was = Vec::new();
    for uid in ["warm-0", "warm-1"] {
        let state = warm(&mut node, uid).await;
        assert_eq!(state.phase(), Phase::Warm, "{state:#?}\n{}", node.report());
        assert!(state.booted_at.is_some() && state.started_at.is_none());
        was.push(state);
    }
    for (n, code) in [(0, 3), (1, 4)] {
        let (warm, uid) = (format!("warm-{n}"), format!("claimant-{n}"));
        let began = std::time::Instant::now();
        let state = node
            .client()
            .claim_agent(claim(&warm, &uid, &code.to_string()))
            .await
            .unwrap()
            .into_inner();
        println!("claim {n}: {} us at the blade", began.elapsed().as_micros());
        assert_eq!(state.vm_id, was[n].vm_id);
        let taken = node.until(&warm, |state| state.phase() == Phase::Ended).await;
        assert_eq!(taken.end.unwrap().message, format!("claimed by default/{uid}"));
        let late = node.client().claim_agent(claim(&warm, "late", "0")).await.unwrap_err();
        assert_eq!(late.code(), tonic::Code::NotFound, "{late}");
    }
    for (n, code) in [(0, 3), (1, 4)] {
        ended_rightly(&mut node, &was[n], &format!("claimant-{n}"), code).await;
    }
    assert_eq!(boots(&mut node).await, 2);
    node.stop().await;
}

#[tokio::test]
async fn far_node_killed_between_ledger_and_delivery_delivers_once_it_is_back() {
    let test = "far_node_killed_between_ledger_and_delivery_delivers_once_it_is_back";
    let Some(mut node) = Node::start(test).await else {
        return;
    };
    let Some(()) = node.load_payload().await else { return };
    let was = warm(&mut node, "warm").await;
    assert_eq!(was.phase(), Phase::Warm, "{was:#?}\n{}", node.report());
    // Adopted as warm.
    node.kill_and_restart().await;
    node.until("warm", |state| state.phase() == Phase::Warm).await;
    // A VM that stands still has received nothing when far-node dies.
    node.signal_vmm(&was.vm_id, "STOP").await;
    let request = claim("warm", "claimant", "6");
    node.client().claim_agent(request.clone()).await.unwrap();
    node.kill_and_restart().await;
    node.signal_vmm(&was.vm_id, "CONT").await;
    // Its secret was in memory only.
    node.client().claim_agent(request).await.unwrap();
    ended_rightly(&mut node, &was, "claimant", 6).await;
    assert_eq!(boots(&mut node).await, 1);
    node.stop().await;
}
