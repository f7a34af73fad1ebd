//! Numbers of a blade for Prometheus, `--metrics-listen`.
//!
//! Labels are closed sets: no name, id or text of an agent ever becomes one. Sums over agents are taken when somebody asks.

use crate::{agent::Blade, record::Phase};
use far_serve::Page;
use prometheus::{Encoder, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What a channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelKind {
    /// A program beside the payload.
    Exec,
    /// Files into the guest.
    Put,
    /// Files out of the guest.
    Get,
    /// A TCP connection into the guest.
    Forward,
}

impl ChannelKind {
    const ALL: [Self; 4] = [Self::Exec, Self::Put, Self::Get, Self::Forward];

    fn label(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Put => "put",
            Self::Get => "get",
            Self::Forward => "forward",
        }
    }
}

/// Counters that channels keep themselves.
#[derive(Debug, Clone)]
pub(crate) struct ChannelCounters {
    opened: IntCounterVec,
    open: IntGaugeVec,
    pub(crate) refused: IntCounter,
    /// Bytes from guests.
    pub(crate) received: IntCounter,
    /// Bytes to guests.
    pub(crate) sent: IntCounter,
}

impl ChannelCounters {
    pub(crate) fn opened(&self, kind: ChannelKind) {
        self.opened.with_label_values(&[kind.label()]).inc();
        self.open.with_label_values(&[kind.label()]).inc();
    }

    pub(crate) fn ended(&self, kind: ChannelKind) {
        self.open.with_label_values(&[kind.label()]).dec();
    }

    #[cfg(test)]
    pub(crate) fn open(&self) -> i64 {
        ChannelKind::ALL
            .iter()
            .map(|kind| self.open.with_label_values(&[kind.label()]).get())
            .sum()
    }
}

/// All numbers of one far-node.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    agents: IntGaugeVec,
    stale: IntGauge,
    heartbeat_age_ms: IntGauge,
    memory_total: IntGauge,
    memory_used: IntGauge,
    cpu_millis: IntGauge,
    processes: IntGauge,
    pressure: IntGaugeVec,
    slots: IntGaugeVec,
    network_packets: IntCounterVec,
    network_bytes: IntCounterVec,
    pub(crate) heartbeats: IntCounter,
    pub(crate) connections: IntCounter,
    pub(crate) violations: IntCounter,
    pub(crate) claims: IntCounter,
    pub(crate) channels: ChannelCounters,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| registered(&registry, IntGauge::with_opts(Opts::new(name, help)));
        let gauges = |name: &str, help: &str, label: &str| {
            registered(&registry, IntGaugeVec::new(Opts::new(name, help), &[label]))
        };
        let counter = |name: &str, help: &str| registered(&registry, IntCounter::with_opts(Opts::new(name, help)));
        // A slot's number is one of a closed set; no agent's name is.
        let by_slot = |name: &str, help: &str| {
            registered(
                &registry,
                IntCounterVec::new(Opts::new(name, help), &["slot", "verdict"]),
            )
        };
        let bytes = registered(
            &registry,
            IntCounterVec::new(
                Opts::new("far_node_channel_bytes_total", "Bytes of exec, cp and port-forward"),
                &["direction"],
            ),
        );
        let opened = registered(
            &registry,
            IntCounterVec::new(
                Opts::new(
                    "far_node_channels_total",
                    "exec, cp and port-forward calls that were opened",
                ),
                &["kind"],
            ),
        );
        let open = gauges(
            "far_node_channels",
            "exec, cp and port-forward calls that are open",
            "kind",
        );
        for kind in ChannelKind::ALL {
            opened.with_label_values(&[kind.label()]);
            open.with_label_values(&[kind.label()]);
        }
        Self {
            agents: gauges("far_node_agents", "Attempts on this blade by phase", "phase"),
            stale: gauge(
                "far_node_heartbeat_stale_agents",
                "Running agents whose last heartbeat is old",
            ),
            heartbeat_age_ms: gauge(
                "far_node_heartbeat_age_milliseconds",
                "Age of the oldest last heartbeat of a running agent",
            ),
            memory_total: gauge("far_node_guest_memory_bytes", "Memory of all guests, as they see it"),
            memory_used: gauge(
                "far_node_guest_memory_used_bytes",
                "Memory that guests say is not available any more",
            ),
            cpu_millis: gauge(
                "far_node_guest_cpu_millicores",
                "CPU of all payloads between their last heartbeats",
            ),
            processes: gauge("far_node_guest_processes", "Processes and threads of all payloads"),
            pressure: gauges(
                "far_node_guest_pressure_max",
                "Highest share of the last 10 s in which some tasks of a payload waited, hundredths of a percent",
                "resource",
            ),
            slots: gauges("far_node_network_slots", "Network slots of this blade", "state"),
            network_packets: by_slot(
                "far_node_network_packets_total",
                "Packets of the microVM on a slot, by what became of them; anew with each microVM",
            ),
            network_bytes: by_slot(
                "far_node_network_bytes_total",
                "Bytes of the microVM on a slot, by what became of them; anew with each microVM",
            ),
            heartbeats: counter("far_node_heartbeats_total", "Heartbeats of guests"),
            connections: counter(
                "far_node_control_connections_total",
                "Control connections that said Hello and were taken",
            ),
            claims: counter("far_node_claims_total", "Warm microVMs that another attempt took over"),
            violations: counter(
                "far_node_control_violations_total",
                "Control connections cut because the guest broke the protocol",
            ),
            channels: ChannelCounters {
                opened,
                open,
                refused: counter(
                    "far_node_channels_refused_total",
                    "Calls refused because too many were open on the agent",
                ),
                received: bytes.with_label_values(&["out"]),
                sent: bytes.with_label_values(&["in"]),
            },
            registry,
        }
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
    /// Prometheus' text format, with the sums over agents as of now.
    #[must_use]
    pub fn text(&self, blade: &Blade) -> String {
        self.sum(blade);
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::warn!(%error, "metrics cannot be written");
        }
        String::from_utf8(text).unwrap_or_default()
    }

    fn sum(&self, blade: &Blade) {
        let (entries, _) = blade.board.entries();
        for (phase, label) in [
            (Phase::Accepted, "accepted"),
            (Phase::Preparing, "preparing"),
            (Phase::Starting, "starting"),
            (Phase::Warm, "warm"),
            (Phase::Running, "running"),
            (Phase::Stopping, "stopping"),
            (Phase::Ended, "ended"),
        ] {
            let count = entries
                .iter()
                .filter(|entry| entry.record.phase == phase && entry.record.forgotten_at.is_none())
                .count();
            self.agents.with_label_values(&[label]).set(whole(count as u64));
        }
        let (mut stale, mut age, mut total, mut used, mut cpu, mut processes) = (0, 0, 0_u64, 0_u64, 0, 0);
        let mut pressure = [0; 3];
        let now = blade.clock.now();
        for entry in entries.iter().filter(|entry| !entry.record.is_ended()) {
            stale += u64::from(entry.heartbeat.is_stale());
            let Some(beat) = blade.guests.beat(&entry.record.identity.key) else {
                continue;
            };
            age = age.max(now.saturating_sub(beat.at));
            total = total.saturating_add(beat.memory_total_kib);
            used = used.saturating_add(beat.memory_total_kib.saturating_sub(beat.memory_available_kib));
            cpu += u64::from(beat.cpu_millis.unwrap_or(0));
            processes += u64::from(beat.processes);
            for (highest, one) in pressure.iter_mut().zip(&beat.pressure) {
                *highest = (*highest).max(one.map_or(0, |one| one.some));
            }
        }
        self.stale.set(whole(stale));
        self.heartbeat_age_ms.set(whole(age));
        self.memory_total.set(whole(total.saturating_mul(1024)));
        self.memory_used.set(whole(used.saturating_mul(1024)));
        self.cpu_millis.set(whole(cpu));
        self.processes.set(whole(processes));
        for (label, highest) in ["cpu", "memory", "io"].into_iter().zip(pressure) {
            self.pressure.with_label_values(&[label]).set(i64::from(highest));
        }
        self.sum_network(blade);
    }

    /// As the kernel counts now.
    fn sum_network(&self, blade: &Blade) {
        let Some(open) = blade.nics.now() else { return };
        let (taken, all) = open.network.use_of_slots();
        self.slots.with_label_values(&["taken"]).set(whole(taken as u64));
        self.slots.with_label_values(&["free"]).set(whole((all - taken) as u64));
        let counters = match open.network.all_counters() {
            Ok(counters) => counters,
            Err(error) => return tracing::warn!(%error, "the network's counters cannot be read"),
        };
        self.network_packets.reset();
        self.network_bytes.reset();
        for (slot, counted) in counters {
            let slot = slot.number().to_string();
            for (verdict, count) in [
                ("sent", counted.sent),
                ("received", counted.received),
                ("spoofed", counted.spoofed),
                ("limited", counted.limited),
                ("denied", counted.denied),
            ] {
                let labels = [slot.as_str(), verdict];
                self.network_packets.with_label_values(&labels).inc_by(count.packets);
                self.network_bytes.with_label_values(&labels).inc_by(count.bytes);
            }
        }
    }
}

fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Serves `GET /metrics` until `shutdown`.
pub(crate) async fn serve(listener: TcpListener, blade: Arc<Blade>, shutdown: CancellationToken) {
    let page = move |path: &str| match path {
        "/metrics" => Some(Page {
            code: 200,
            kind: prometheus::TEXT_FORMAT,
            text: blade.metrics.text(&blade),
        }),
        "/healthz" => Some(Page::plain(200, "ok\n")),
        _ => None,
    };
    far_serve::pages(listener, page, shutdown).await;
}
