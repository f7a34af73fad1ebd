//! The edge: own types become the node API's.

use crate::{
    board::Entry,
    host::StoredImage,
    logs::Stream,
    outcome::{MAX_MESSAGE, clean_text},
    pulse::Heartbeat,
    record::{End, EndReason, Phase, Record, Resources, UnixMs},
    spec::Identity,
};
use far_proto::node as wire;
use prost_types::Timestamp;

pub(crate) fn timestamp(at: UnixMs) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(at / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(at % 1000 * 1_000_000).unwrap_or(0),
    }
}

pub(crate) fn timestamp_of_ns(at: u64) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(at / 1_000_000_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(at % 1_000_000_000).unwrap_or(0),
    }
}

/// Nanoseconds since the epoch; before it: 0.
pub(crate) fn ns_of(at: Timestamp) -> u64 {
    let seconds = u64::try_from(at.seconds).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(at.nanos).unwrap_or(0))
}

fn phase(phase: Phase) -> wire::Phase {
    match phase {
        Phase::Accepted => wire::Phase::Accepted,
        Phase::Preparing => wire::Phase::Preparing,
        Phase::Starting => wire::Phase::Starting,
        Phase::Warm => wire::Phase::Warm,
        Phase::Running => wire::Phase::Running,
        Phase::Stopping => wire::Phase::Stopping,
        Phase::Ended => wire::Phase::Ended,
    }
}

fn reason(reason: EndReason) -> wire::EndReason {
    match reason {
        EndReason::Completed => wire::EndReason::Completed,
        EndReason::Error => wire::EndReason::Error,
        EndReason::Signal => wire::EndReason::Signal,
        EndReason::OomKilled => wire::EndReason::OomKilled,
        EndReason::KernelPanic => wire::EndReason::KernelPanic,
        EndReason::BootTimeout => wire::EndReason::BootTimeout,
        EndReason::VmmCrashed => wire::EndReason::VmmCrashed,
        EndReason::ImageError => wire::EndReason::ImageError,
        EndReason::NetworkError => wire::EndReason::NetworkError,
        EndReason::DeadlineExceeded => wire::EndReason::DeadlineExceeded,
        EndReason::Evicted => wire::EndReason::Evicted,
        EndReason::NodeLost => wire::EndReason::NodeLost,
        EndReason::BladeRebooted => wire::EndReason::BladeRebooted,
        EndReason::InitLost => wire::EndReason::InitLost,
    }
}

/// The reason of a stop: UNSPECIFIED is none; others than EVICTED and DEADLINE_EXCEEDED are refused.
pub(crate) fn stop_reason(reason: i32) -> Result<Option<EndReason>, ()> {
    match wire::EndReason::try_from(reason) {
        Ok(wire::EndReason::Unspecified) => Ok(None),
        Ok(wire::EndReason::Evicted) => Ok(Some(EndReason::Evicted)),
        Ok(wire::EndReason::DeadlineExceeded) => Ok(Some(EndReason::DeadlineExceeded)),
        Ok(_) | Err(_) => Err(()),
    }
}

pub(crate) fn stream(stream: Stream) -> wire::Stream {
    match stream {
        Stream::Stdout => wire::Stream::Stdout,
        Stream::Stderr => wire::Stream::Stderr,
    }
}

pub(crate) fn identity(identity: &Identity) -> wire::Identity {
    wire::Identity {
        uid: identity.key.uid.clone(),
        attempt: identity.key.attempt,
        namespace: identity.namespace.clone(),
        name: identity.name.clone(),
    }
}

fn resources(resources: &Resources) -> wire::Resources {
    wire::Resources {
        vcpus: resources.vcpus,
        memory_mib: resources.memory_mib,
        accelerator: resources.accelerator.clone(),
        vmm: resources.vmm.clone(),
        nic: resources.nic,
        no_nic_reason: resources.no_nic_reason.clone(),
    }
}

fn end(end: &End) -> wire::End {
    wire::End {
        reason: reason(end.reason).into(),
        exit_code: end.exit_code,
        signal: end.signal,
        message: end.message.clone(),
        tail: end.tail.clone(),
    }
}

/// One attempt as it is told.
pub(crate) fn agent_state(entry: &Entry) -> wire::AgentState {
    let record: &Record = &entry.record;
    // Nothing is said of the heartbeats of an end.
    let heartbeat = match record.is_ended() {
        true => Heartbeat::Regular,
        false => entry.heartbeat.clone(),
    };
    let note = heartbeat.note();
    let said = [Some(record.message.clone()).filter(|text| !text.is_empty()), note];
    let message: Vec<String> = said.into_iter().flatten().collect();
    wire::AgentState {
        identity: Some(identity(&record.identity)),
        phase: phase(record.phase).into(),
        seq: entry.seq,
        image_digest: record.image_digest.clone().unwrap_or_default(),
        resources: record.resources.as_ref().map(resources),
        accepted_at: Some(timestamp(record.accepted_at)),
        booted_at: record.booted_at.map(timestamp),
        started_at: record.started_at.map(timestamp),
        finished_at: record.finished_at.map(timestamp),
        end: record.end.as_ref().map(end),
        message: clean_text(&message.join("; "), MAX_MESSAGE),
        vm_id: record.vm_id.to_string(),
        vmm_cpu_us: record.vmm_cpu_us,
        heartbeat_stale: heartbeat.is_stale(),
        answers_pings: match &heartbeat {
            Heartbeat::Stale(Some(answer)) => Some(answer.is_ok()),
            Heartbeat::Stale(None) | Heartbeat::Regular => None,
        },
    }
}

pub(crate) fn image(image: StoredImage) -> wire::Image {
    wire::Image {
        digest: image.digest,
        references: image.references,
        size_bytes: image.size_bytes,
    }
}
