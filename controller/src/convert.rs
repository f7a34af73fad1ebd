//! The edges: the API's status and the node API's messages become `far-core` types, and back.

pub(crate) use far_api::placement::{is_ready, request, taint, toleration};
use far_api::{
    BootResources, Claimed, FarAgent, FarAgentStatus, FarNode, LastAttempt as ApiLastAttempt, Phase as ApiPhase,
    placement,
};
pub(crate) use far_core::text::cut;
use far_core::{
    placement::Blade,
    retry::Counts,
    status::{
        Claim, Condition, ConditionKind, End, EndReason, LastAttempt, Phase, Report, Resources, Stage, Stamp, Status,
    },
};
use far_proto::node as wire;
use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition as ApiCondition, Time},
    jiff::Timestamp,
};

/// Longest uid, bytes: the API's are UUIDs of 36.
const MAX_UID: usize = 64;
/// Longest texts taken from a blade, bytes; its own bounds are 1 KiB and 2 KiB.
const MAX_TEXT: usize = 4096;

/// What placement needs of a blade.
pub(crate) fn blade(node: &FarNode) -> Blade {
    let (blade, complaints) = placement::blade(node);
    for complaint in complaints {
        tracing::warn!(
            blade = node.metadata.name,
            complaint,
            "a setting of a blade cannot be read"
        );
    }
    blade
}

/// Nothing will be done about the agent before the API changes it: it ended, and neither goes nor expires.
pub(crate) fn is_settled(agent: &FarAgent, status: &Status) -> bool {
    let stays = agent.metadata.deletion_timestamp.is_none() && agent.spec.ttl_seconds_after_finished.is_none();
    stays && status.is_final()
}

/// What the API claims of an agent.
pub(crate) fn status_from_api(status: Option<&FarAgentStatus>) -> Status {
    let Some(status) = status.cloned() else {
        return Status::default();
    };
    let mut conditions: Vec<Condition> = status
        .conditions
        .into_iter()
        .filter_map(|one| {
            let kind = ConditionKind::ALL.into_iter().find(|kind| kind.as_str() == one.type_)?;
            Some(Condition {
                kind,
                holds: one.status == "True",
                reason: one.reason,
                message: one.message,
            })
        })
        .collect();
    conditions.sort_by_key(|one| one.kind);
    conditions.dedup_by_key(|one| one.kind);
    Status {
        conditions,
        node: status.node_name,
        attempt: status.attempt.unwrap_or(0),
        exit_code: status.exit_code,
        signal: status.signal,
        reason: status.reason,
        message: status.message,
        started_at: status.started_at.map(|time| stamp(&time)),
        finished_at: status.finished_at.map(|time| stamp(&time)),
        image_digest: status.image_digest,
        resources: status.resources.map(|got| Resources {
            vcpus: got.vcpus.unwrap_or(0),
            memory_mib: got.memory_mib.unwrap_or(0),
            accelerator: got.accelerator.unwrap_or_default(),
            vmm: got.vmm.unwrap_or_default(),
            nic: got.nic.unwrap_or(false),
            no_nic_reason: got.no_nic_reason.unwrap_or_default(),
        }),
        tail: status.tail,
        claimed: status.claimed.map(|one| Claim {
            name: one.name,
            uid: one.uid,
            attempt: one.attempt,
        }),
        restarts: status.restarts.unwrap_or(0),
        counts: Counts {
            failures: status.failures.unwrap_or(0),
            blade_failures: status.infrastructure_failures.unwrap_or(0),
            blade_failures_since: status.infrastructure_failures_since.map(|time| time.0.as_second()),
        },
        active_since: status.active_since.map(|time| time.0.as_second()),
        next_attempt_at: status.next_attempt_at.map(|time| time.0.as_second()),
        last_attempt: status.last_attempt.map(|last| LastAttempt {
            attempt: last.attempt,
            node: last.node_name,
            reason: last.reason,
            message: last.message,
            exit_code: last.exit_code,
            signal: last.signal,
            finished_at: last.finished_at.map(|time| stamp(&time)),
            tail: last.tail,
        }),
    }
}

/// The status as the API writes it; conditions that did not turn keep their time.
pub(crate) fn status_to_api(
    status: &Status,
    old: Option<&FarAgentStatus>,
    generation: i64,
    now: Timestamp,
) -> FarAgentStatus {
    let conditions = status
        .conditions
        .iter()
        .map(|one| {
            let word = if one.holds { "True" } else { "False" };
            let kept = old
                .into_iter()
                .flat_map(|old| &old.conditions)
                .find(|old| old.type_ == one.kind.as_str() && old.status == word);
            ApiCondition {
                type_: one.kind.as_str().to_owned(),
                status: word.to_owned(),
                reason: one.reason.clone(),
                message: one.message.clone(),
                observed_generation: Some(generation),
                last_transition_time: kept.map_or(Time(now), |kept| kept.last_transition_time.clone()),
            }
        })
        .collect();
    FarAgentStatus {
        phase: Some(phase(status.phase())),
        conditions,
        observed_generation: Some(generation),
        node_name: status.node.clone(),
        attempt: (status.attempt > 0).then_some(status.attempt),
        exit_code: status.exit_code,
        signal: status.signal,
        reason: status.reason.clone(),
        message: status.message.clone(),
        started_at: status.started_at.and_then(time),
        finished_at: status.finished_at.and_then(time),
        restarts: (status.attempt > 0).then_some(status.restarts),
        failures: Some(status.counts.failures).filter(|count| *count > 0),
        infrastructure_failures: Some(status.counts.blade_failures).filter(|count| *count > 0),
        infrastructure_failures_since: status.counts.blade_failures_since.and_then(seconds),
        active_since: status.active_since.and_then(seconds),
        next_attempt_at: status.next_attempt_at.and_then(seconds),
        last_attempt: status.last_attempt.as_ref().map(|last| ApiLastAttempt {
            attempt: last.attempt,
            node_name: last.node.clone(),
            reason: last.reason.clone(),
            message: last.message.clone(),
            exit_code: last.exit_code,
            signal: last.signal,
            finished_at: last.finished_at.and_then(time),
            tail: last.tail.clone(),
        }),
        image_digest: status.image_digest.clone(),
        resources: status.resources.as_ref().map(|got| BootResources {
            vcpus: Some(got.vcpus),
            memory_mib: Some(got.memory_mib),
            accelerator: Some(got.accelerator.clone()),
            vmm: Some(got.vmm.clone()),
            nic: Some(got.nic),
            no_nic_reason: Some(got.no_nic_reason.clone()).filter(|text| !text.is_empty()),
        }),
        tail: status.tail.clone(),
        claimed: status.claimed.as_ref().map(|one| Claimed {
            name: one.name.clone(),
            uid: one.uid.clone(),
            attempt: one.attempt,
        }),
    }
}

fn phase(phase: Phase) -> ApiPhase {
    match phase {
        Phase::Pending => ApiPhase::Pending,
        Phase::Scheduled => ApiPhase::Scheduled,
        Phase::Starting => ApiPhase::Starting,
        Phase::Running => ApiPhase::Running,
        Phase::Sleeping => ApiPhase::Sleeping,
        Phase::Completed => ApiPhase::Completed,
        Phase::Failed => ApiPhase::Failed,
        Phase::Unknown => ApiPhase::Unknown,
    }
}

fn stamp(time: &Time) -> Stamp {
    // The API keeps seconds; so do statuses, or every comparison would see a change.
    Stamp {
        seconds: time.0.as_second(),
        nanos: 0,
    }
}

fn time(stamp: Stamp) -> Option<Time> {
    seconds(stamp.seconds)
}

fn seconds(seconds: i64) -> Option<Time> {
    Timestamp::from_second(seconds).ok().map(Time)
}

/// What a blade says of an attempt; `None`: it names none, or one that cannot be, or a phase nobody knows.
pub(crate) fn report(state: wire::AgentState) -> Option<(wire::Identity, Report)> {
    let stage = match state.phase() {
        wire::Phase::Unspecified => return None,
        wire::Phase::Accepted => Stage::Accepted,
        wire::Phase::Preparing => Stage::Preparing,
        wire::Phase::Starting => Stage::Starting,
        wire::Phase::Warm => Stage::Warm,
        wire::Phase::Running => Stage::Running,
        wire::Phase::Stopping => Stage::Stopping,
        wire::Phase::Ended => Stage::Ended,
    };
    let identity = state.identity.filter(|identity| identity.uid.len() <= MAX_UID)?;
    let moment = |at: Option<prost_types::Timestamp>| {
        // What the API cannot write would be another status at every look.
        at.filter(|at| seconds(at.seconds).is_some()).map(|at| Stamp {
            seconds: at.seconds,
            nanos: 0,
        })
    };
    let report = Report {
        attempt: identity.attempt,
        stage,
        image_digest: cut(state.image_digest, 128),
        resources: state.resources.map(|got| Resources {
            vcpus: got.vcpus,
            memory_mib: got.memory_mib,
            accelerator: cut(got.accelerator, 64),
            vmm: cut(got.vmm, 64),
            nic: got.nic,
            no_nic_reason: cut(got.no_nic_reason, 1024),
        }),
        booted: state.booted_at.is_some() || stage == Stage::Running,
        started_at: moment(state.started_at),
        finished_at: moment(state.finished_at),
        end: state.end.map(end),
        message: cut(state.message, MAX_TEXT),
    };
    Some((identity, report))
}

fn end(end: wire::End) -> End {
    let reason = match end.reason() {
        // A reason of a later version: it ended, and nothing more is known.
        wire::EndReason::Unspecified => EndReason::InitLost,
        wire::EndReason::Completed => EndReason::Completed,
        wire::EndReason::Error => EndReason::Error,
        wire::EndReason::Signal => EndReason::Signal,
        wire::EndReason::OomKilled => EndReason::OomKilled,
        wire::EndReason::KernelPanic => EndReason::KernelPanic,
        wire::EndReason::BootTimeout => EndReason::BootTimeout,
        wire::EndReason::VmmCrashed => EndReason::VmmCrashed,
        wire::EndReason::ImageError => EndReason::ImageError,
        wire::EndReason::NetworkError => EndReason::NetworkError,
        wire::EndReason::DeadlineExceeded => EndReason::DeadlineExceeded,
        wire::EndReason::Evicted => EndReason::Evicted,
        wire::EndReason::NodeLost => EndReason::NodeLost,
        wire::EndReason::BladeRebooted => EndReason::BladeRebooted,
        wire::EndReason::InitLost => EndReason::InitLost,
    };
    End {
        reason,
        exit_code: end.exit_code,
        signal: end.signal,
        message: cut(end.message, MAX_TEXT),
        tail: cut(end.tail, MAX_TEXT),
    }
}

#[cfg(test)]
mod tests {
    use far_core::status::Fact;

    use super::*;

    #[test]
    fn a_status_is_read_back_from_the_api_as_it_was_written() {
        let end = End {
            reason: EndReason::Error,
            exit_code: Some(3),
            signal: None,
            message: "m".into(),
            tail: "t".into(),
        };
        let resources = Resources {
            vcpus: 1,
            memory_mib: 512,
            ..Resources::default()
        };
        let at = Some(Stamp {
            seconds: 1_700_000_000,
            nanos: 0,
        });
        let report = Report {
            attempt: 1,
            stage: Stage::Ended,
            image_digest: "sha256:1".into(),
            resources: Some(resources),
            booted: true,
            started_at: at,
            finished_at: at,
            end: Some(end),
            message: String::new(),
        };
        let mut status = Status::default();
        for fact in [
            Fact::Unschedulable("no"),
            Fact::Placed { blade: "b" },
            Fact::Seen(&report),
        ] {
            status = status.after(&fact);
            let written = status_to_api(&status, None, 1, Timestamp::UNIX_EPOCH);
            let text = serde_json::to_string(&written).unwrap();
            assert_eq!(status_from_api(Some(&serde_json::from_str(&text).unwrap())), status);
        }
    }

    #[test]
    fn a_condition_that_did_not_turn_keeps_its_time() {
        let status = Status::default().after(&Fact::Placed { blade: "b" });
        let old = status_to_api(&status, None, 1, Timestamp::UNIX_EPOCH);
        let new = status_to_api(&status, Some(&old), 2, Timestamp::MAX);
        assert_eq!(new.conditions[0].last_transition_time, Time(Timestamp::UNIX_EPOCH));
    }

    #[test]
    fn a_blade_names_no_agent_and_no_time_that_cannot_be() {
        let state = |uid: &str, seconds| wire::AgentState {
            identity: Some(wire::Identity {
                uid: uid.to_owned(),
                attempt: 1,
                ..wire::Identity::default()
            }),
            phase: wire::Phase::Running.into(),
            started_at: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            ..wire::AgentState::default()
        };
        let started = |state| report(state).unwrap().1.started_at.map(|at| at.seconds);
        assert!(report(state(&"u".repeat(65), 1)).is_none());
        assert_eq!(started(state("u", 1)), Some(1));
        for seconds in [i64::MAX, i64::MIN, 1_000_000_000_000] {
            assert_eq!(started(state("u", seconds)), None, "{seconds}");
        }
    }
}
