//! Why and when agents have to leave a blade: it is emptied, or it has a taint with effect NoExecute.

use std::time::{Duration, Instant};

use far_api::{Drain, DrainPolicy, FarNode};
use far_core::{
    eviction::{Patience, leaves_at},
    placement::{Effect, Taint},
};
use k8s_openapi::jiff::Timestamp;

use crate::{convert, registry::DRAINING};

#[derive(Debug, Default)]
pub(super) struct Leaving {
    /// Each with when this controller first saw it: the API keeps no time of a taint.
    taints: Vec<(Taint, Instant)>,
    /// When a drain ends what runs; `Some(None)`: it waits for ever.
    drain: Option<Option<Instant>>,
}

impl Leaving {
    /// What the API tells of the blade.
    pub(super) fn of(node: &FarNode, before: &Self) -> Self {
        let now = Instant::now();
        let taints = node.spec.taints.iter().flatten().map(convert::taint);
        Self {
            taints: taints
                .filter(|taint| taint.effect == Effect::NoExecute)
                .map(|taint| {
                    let known = before
                        .taints
                        .iter()
                        .find(|(one, _)| *one == taint)
                        .map(|(_, since)| *since);
                    (taint, known.unwrap_or(now))
                })
                .collect(),
            drain: node.spec.drain.as_ref().map(|drain| ends_at(drain, node, now)),
        }
    }

    /// When an agent that bears these taints has to leave; `None`: it may stay.
    pub(super) fn at(&self, patience: &[Patience]) -> Option<Instant> {
        let first = self.taints.iter().map(|(_, since)| *since).min();
        let by_taints = first.and_then(|first| {
            let taints: Vec<(Taint, Duration)> = self
                .taints
                .iter()
                .map(|(taint, since)| (taint.clone(), since.duration_since(first)))
                .collect();
            leaves_at(&taints, patience).map(|after| first + after)
        });
        [by_taints, self.drain.flatten()].into_iter().flatten().min()
    }

    /// Whether something changed for the blade's agents.
    pub(super) fn differs(&self, other: &Self) -> bool {
        self.drain.is_some() != other.drain.is_some()
            || self.drain.flatten().is_some() != other.drain.flatten().is_some()
            || self.taints != other.taints
    }
}

fn ends_at(drain: &Drain, node: &FarNode, now: Instant) -> Option<Instant> {
    let seconds = match drain.policy {
        DrainPolicy::Evict => return Some(now),
        DrainPolicy::Wait => drain.deadline_seconds?,
    };
    // The condition outlives controllers; where it is not written yet, the drain begins now.
    let conditions = node.status.iter().flat_map(|status| &status.conditions);
    let since = conditions
        .filter(|one| one.type_ == DRAINING && one.status == "True")
        .map(|one| Timestamp::now().duration_since(one.last_transition_time.0).as_secs())
        .next();
    let passed = u64::try_from(since.unwrap_or(0)).unwrap_or(0);
    Some(now + Duration::from_secs(u64::from(seconds).saturating_sub(passed)))
}
