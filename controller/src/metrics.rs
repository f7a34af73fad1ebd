//! Numbers of a controller for Prometheus, `--metrics-listen`. Labels are closed sets: no name of an agent, blade or user
//! ever becomes one.

use std::sync::Arc;

use prometheus::{Encoder, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::{gateway::Action, world::Census};

/// Handle to all numbers; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics(Arc<Numbers>);

#[derive(Debug)]
struct Numbers {
    registry: Registry,
    leads: IntGauge,
    epoch: IntGauge,
    agents: IntGaugeVec,
    blades: IntGaugeVec,
    joins: IntCounterVec,
    heartbeats: IntCounterVec,
    calls: IntGaugeVec,
    calls_ended: IntCounterVec,
    reviews: IntCounterVec,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| registered(&registry, IntGauge::with_opts(Opts::new(name, help)));
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            registered(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let numbers = Numbers {
            leads: gauge("far_controller_leads", "1 while this controller leads"),
            epoch: gauge(
                "far_controller_epoch",
                "Leader epoch that this controller sends to blades",
            ),
            agents: gauges(
                "far_controller_agents",
                "Agents that are known, by whether they have a blade",
                &["state"],
            ),
            blades: gauges(
                "far_controller_blades",
                "Blades that are known, by whether they are connected",
                &["state"],
            ),
            joins: counters("far_controller_joins_total", "Blades that asked to join", &["outcome"]),
            heartbeats: counters("far_controller_heartbeats_total", "Heartbeats of blades", &["outcome"]),
            calls: gauges(
                "far_controller_gateway_calls",
                "Calls of users that are open",
                &["action"],
            ),
            calls_ended: counters(
                "far_controller_gateway_calls_total",
                "Calls of users that ended: by themselves (ok, refused, failed), because their caller went away (gone), or before they began (denied)",
                &["action", "outcome"],
            ),
            reviews: counters(
                "far_controller_gateway_reviews_total",
                "Questions to the Kubernetes API about callers",
                &["kind", "outcome"],
            ),
            registry,
        };
        // Every series is there from the start: a rate of the first failure needs the zero before it.
        for action in Action::ALL {
            numbers.calls.with_label_values(&[action.label()]);
            for outcome in ["ok", "refused", "failed", "gone", "denied"] {
                numbers.calls_ended.with_label_values(&[action.label(), outcome]);
            }
        }
        for outcome in ["ok", "refused"] {
            numbers.joins.with_label_values(&[outcome]);
            numbers.heartbeats.with_label_values(&[outcome]);
        }
        for kind in ["token", "access"] {
            for outcome in ["answered", "failed"] {
                numbers.reviews.with_label_values(&[kind, outcome]);
            }
        }
        Self(Arc::new(numbers))
    }
}

/// Names are constants of this file: a clash is a bug that the first test finds.
fn registered<T: prometheus::core::Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<T>) -> T {
    let made = made.expect("the names and labels of this file are valid");
    registry
        .register(Box::new(made.clone()))
        .expect("each name of this file is used once");
    made
}

impl Metrics {
    pub(crate) fn leads(&self, epoch: u64) {
        self.0.leads.set(1);
        self.0.epoch.set(whole(epoch));
    }

    pub(crate) fn joined(&self, is_ok: bool) {
        self.0.joins.with_label_values(&[ok_or_refused(is_ok)]).inc();
    }

    pub(crate) fn heartbeat(&self, is_ok: bool) {
        self.0.heartbeats.with_label_values(&[ok_or_refused(is_ok)]).inc();
    }

    pub(crate) fn review(&self, kind: &'static str, is_answered: bool) {
        let outcome = if is_answered { "answered" } else { "failed" };
        self.0.reviews.with_label_values(&[kind, outcome]).inc();
    }

    pub(crate) fn call_opened(&self, action: Action) {
        self.0.calls.with_label_values(&[action.label()]).inc();
    }

    pub(crate) fn call_ended(&self, action: Action, outcome: &'static str) {
        self.0.calls.with_label_values(&[action.label()]).dec();
        self.0.calls_ended.with_label_values(&[action.label(), outcome]).inc();
    }

    pub(crate) fn call_denied(&self, action: Action) {
        self.0.calls_ended.with_label_values(&[action.label(), "denied"]).inc();
    }

    /// Prometheus' text format, with the census as of now.
    pub(crate) fn text(&self, census: &Census) -> String {
        let numbers = &self.0;
        for (gauge, state, count) in [
            (&numbers.agents, "placed", census.placed),
            (&numbers.agents, "unplaced", census.agents - census.placed),
            (&numbers.blades, "connected", census.connected),
            (&numbers.blades, "unconnected", census.blades - census.connected),
        ] {
            gauge.with_label_values(&[state]).set(whole(count as u64));
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&numbers.registry.gather(), &mut text) {
            tracing::warn!(%error, "metrics cannot be written");
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

fn ok_or_refused(is_ok: bool) -> &'static str {
    if is_ok { "ok" } else { "refused" }
}

fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
