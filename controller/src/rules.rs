//! What a spec says of ends, sleep and expiry, as `far-core` takes it.

use std::time::Duration;

use far_api::{FarAgent, LostPolicy, OperatingMode, RestartPolicy};
use far_core::{
    eviction::Patience,
    lifecycle::Wanted,
    retry::{DEFAULT_BACKOFF_LIMIT, Restart, Rules},
};
use k8s_openapi::jiff::Timestamp;

use crate::convert;

/// What follows this agent's ends, as of now.
pub(crate) fn rules(agent: &FarAgent, first_delay: Duration) -> Rules {
    let spec = &agent.spec;
    Rules {
        restart: match spec.restart_policy {
            RestartPolicy::Never => Restart::Never,
            RestartPolicy::OnFailure => Restart::OnFailure,
            RestartPolicy::Always => Restart::Always,
        },
        backoff_limit: spec.backoff_limit.unwrap_or(DEFAULT_BACKOFF_LIMIT),
        reschedules: spec.lost_policy == LostPolicy::Reschedule,
        deadline_s: spec.active_deadline_seconds,
        first_delay_ms: u64::try_from(first_delay.as_millis()).unwrap_or(u64::MAX),
        now_ms: Timestamp::now().as_millisecond(),
    }
}

/// What of the spec may change while the agent lives.
pub(crate) fn wanted(agent: &FarAgent) -> Wanted {
    Wanted {
        suspended: agent.spec.suspend.unwrap_or(false),
        asleep: agent.spec.operating_mode == OperatingMode::Sleeping,
        ttl_s: agent.spec.ttl_seconds_after_finished,
    }
}

/// Which taints the agent bears, and for how long.
pub(crate) fn patience(agent: &FarAgent) -> Vec<Patience> {
    let tolerations = agent.spec.tolerations.iter().flatten();
    tolerations
        .map(|one| Patience {
            toleration: convert::toleration(one),
            seconds: one.toleration_seconds,
        })
        .collect()
}

/// When the agent ended, by the controller's clock: the blade's own is never compared with it.
pub(crate) fn final_since(agent: &FarAgent) -> Option<i64> {
    let conditions = agent.status.iter().flat_map(|status| &status.conditions);
    conditions
        .filter(|one| matches!(one.type_.as_str(), "Completed" | "Failed") && one.status == "True")
        .map(|one| one.last_transition_time.0.as_second())
        .next()
}
