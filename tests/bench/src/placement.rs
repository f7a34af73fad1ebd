//! What choosing a blade costs, against a full scan of all blades, in one process and without any API.
//!
//! Blades of three sizes in eight zones, a tenth of them with devices behind a taint; agents of eight kinds, so that
//! every filter and score has work. Each step places one agent and takes the oldest one away.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use far_core::placement::{
    AgentAffinity, AgentTerm, Blade, Effect, Labels, NodeAffinity, Operator, Overcommit, Packing, Placer, Pool,
    Request, Requirement, Selector, Spread, Taint, Toleration,
};

use crate::{
    cpu,
    report::{Goal, Row},
};

/// Blades.
const SIZES: [usize; 4] = [100, 1000, 5000, 10_000];
/// Agents per blade before it is measured.
const FILL: usize = 4;
/// Placements of ours per round.
const STEPS: usize = 100_000;
/// Blades that the full scan looks at per round, so that it takes about a second.
const SCANNED: usize = 4_000_000;
/// 200,000 placements per second of CPU.
const GOAL_MICROS: f64 = 5.0;
const SCAN: &str = "a full scan, without affinity between agents";

/// All rows, `rounds` times interleaved.
pub(crate) fn rows(rounds: usize) -> Result<Vec<Row>> {
    let mut measured: Vec<Vec<(Measured, Measured)>> = vec![Vec::new(); SIZES.len()];
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for (size, measured) in SIZES.iter().zip(&mut measured) {
            measured.push((ours(*size)?, scan(*size)?));
        }
    }
    let mut rows = Vec::new();
    for (size, measured) in SIZES.iter().zip(&measured) {
        let pick = |what: fn(&Measured) -> f64| {
            measured
                .iter()
                .map(|(ours, peer)| (what(ours), Some(what(peer))))
                .collect()
        };
        let what = format!("place one agent and take one away, {size} blades");
        rows.push(Row::of(
            &what,
            "CPU us",
            pick(|one| one.cpu_micros),
            Some(SCAN),
            Some(Goal::RatioAtMost(1.0)),
        ));
        let what = format!("p99 of placing, {size} blades");
        rows.push(Row::of(&what, "us", pick(|one| one.p99_micros), Some(SCAN), None));
    }
    let largest = measured.last().context("no size")?;
    let goal = largest
        .iter()
        .map(|(ours, _)| (ours.cpu_micros, Some(GOAL_MICROS)))
        .collect();
    rows.push(Row::of(
        "place one agent and take one away, 10000 blades",
        "CPU us",
        goal,
        Some("the goal, 5 us: 200,000 per second"),
        Some(Goal::RatioAtMost(1.0)),
    ));
    Ok(rows)
}

#[derive(Debug, Clone, Copy)]
struct Measured {
    /// Of placing one and taking one away.
    cpu_micros: f64,
    /// Of placing, by the clock.
    p99_micros: f64,
}

/// Runs `step` so many times.
fn measure(steps: usize, mut step: impl FnMut(usize) -> Result<Duration>) -> Result<Measured> {
    let mut times = Vec::with_capacity(steps);
    let before = cpu::of_self()?;
    for number in 0..steps {
        times.push(step(number)?);
    }
    let spent = cpu::of_self()? - before;
    times.sort_unstable();
    Ok(Measured {
        cpu_micros: spent * 1e6 / steps as f64,
        p99_micros: times[steps * 99 / 100].as_secs_f64() * 1e6,
    })
}

fn ours(blades: usize) -> Result<Measured> {
    let mut placer = Placer::with_packing(1, Packing::Spread);
    for number in 0..blades {
        placer.upsert_blade(&format!("blade-{number}"), blade(number));
    }
    let requests: Vec<Request> = (0..KINDS).map(request).collect();
    let mut there = VecDeque::new();
    for number in 0..blades * FILL {
        let uid = uid(number);
        placer.place(&uid, &requests[number % KINDS], Duration::ZERO)?;
        there.push_back(uid);
    }
    let mut newcomers: Vec<String> = (0..STEPS).map(|number| uid(blades * FILL + number)).collect();
    measure(STEPS, |number| {
        let uid = std::mem::take(&mut newcomers[number]);
        let begin = Instant::now();
        placer.place(&uid, &requests[number % KINDS], Duration::ZERO)?;
        let took = begin.elapsed();
        there.push_back(uid);
        if let Some(oldest) = there.pop_front() {
            placer.release(&oldest);
        }
        Ok(took)
    })
}

fn uid(number: usize) -> String {
    format!("3f1c0a9b-77de-4c1e-9d0a-{number:012}")
}

/// What a placer without an index does: looks at every blade, keeps the best.
#[derive(Default)]
struct Scan {
    blades: BTreeMap<String, (Blade, Load)>,
    held: HashMap<String, (String, usize)>,
}

#[derive(Default)]
struct Load {
    cpu_millis: u64,
    memory_mib: u64,
    devices: u64,
}

impl Scan {
    fn place(&mut self, uid: &str, kind: usize, request: &Request) -> Result<()> {
        let devices: u64 = request.extended.values().sum();
        let mut best: Option<(u64, &String)> = None;
        for (name, (blade, load)) in &self.blades {
            let left = |room: u64, used: u64, wanted: u64| room.checked_sub(used + wanted);
            let cpu = left(blade.cpu_room(), load.cpu_millis, request.cpu_millis);
            let memory = left(blade.memory_room(), load.memory_mib, request.memory_mib);
            let has: u64 = blade.extended.values().sum();
            let (Some(cpu), Some(memory)) = (cpu, memory) else {
                continue;
            };
            if load.devices + devices > has || blade.refuses(request).is_some() {
                continue;
            }
            let local = if blade.images.contains_key(&request.image) {
                100
            } else {
                0
            };
            let score = cpu * 500 / blade.cpu_room() + memory * 500 / blade.memory_room() + local;
            if best.is_none_or(|(other, _)| score > other) {
                best = Some((score, name));
            }
        }
        let name = best.context("no blade fits")?.1.clone();
        self.change(&name, request, true);
        self.held.insert(uid.to_owned(), (name, kind));
        Ok(())
    }

    fn release(&mut self, uid: &str, requests: &[Request]) {
        if let Some((name, kind)) = self.held.remove(uid) {
            self.change(&name, &requests[kind], false);
        }
    }

    fn change(&mut self, name: &str, request: &Request, more: bool) {
        let Some((_, load)) = self.blades.get_mut(name) else {
            return;
        };
        let devices: u64 = request.extended.values().sum();
        for (sum, amount) in [
            (&mut load.cpu_millis, request.cpu_millis),
            (&mut load.memory_mib, request.memory_mib),
            (&mut load.devices, devices),
        ] {
            *sum = if more { *sum + amount } else { *sum - amount };
        }
    }
}

fn scan(blades: usize) -> Result<Measured> {
    let mut scan = Scan::default();
    for number in 0..blades {
        scan.blades
            .insert(format!("blade-{number}"), (blade(number), Load::default()));
    }
    let requests: Vec<Request> = (0..KINDS).map(request).collect();
    let mut there = VecDeque::new();
    measure(SCANNED / blades, |number| {
        let uid = uid(number);
        let begin = Instant::now();
        scan.place(&uid, number % KINDS, &requests[number % KINDS])?;
        let took = begin.elapsed();
        there.push_back(uid);
        // As full as it gets in so few steps.
        if there.len() > blades
            && let Some(oldest) = there.pop_front()
        {
            scan.release(&oldest, &requests);
        }
        Ok(took)
    })
}

fn labels(pairs: &[(&str, String)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()))
        .collect()
}

fn blade(number: usize) -> Blade {
    let size = [1, 2, 4][number % 3];
    let has_devices = number.is_multiple_of(10);
    let image = |image: usize| (format!("example.com/agent:{image}"), 400 << 20);
    Blade {
        ready: true,
        taints: if has_devices { vec![gpu_taint()] } else { Vec::new() },
        labels: labels(&[
            ("tiffany.dev/blade", format!("blade-{number}")),
            ("topology.kubernetes.io/zone", format!("zone-{}", number % 8)),
            (
                "kubernetes.io/arch",
                if number.is_multiple_of(4) { "arm64" } else { "amd64" }.to_owned(),
            ),
            ("disk", if number.is_multiple_of(2) { "nvme" } else { "ssd" }.to_owned()),
        ]),
        cpu_millis: size * 16_000,
        memory_mib: size * 65_536,
        overcommit: Overcommit {
            cpu_percent: 400,
            memory_percent: 100,
        },
        overhead_mib: 16,
        max_vms: 500,
        extended: if has_devices {
            [(GPU.to_owned(), 8)].into()
        } else {
            BTreeMap::new()
        },
        images: (0..4).map(|offset| image((number + offset) % 16)).collect(),
        warm: if number.is_multiple_of(16) {
            [("default/warm".to_owned(), 2)].into()
        } else {
            BTreeMap::new()
        },
        ..Blade::default()
    }
}

const GPU: &str = "nvidia.com/gpu";

fn gpu_taint() -> Taint {
    Taint {
        key: GPU.into(),
        value: String::new(),
        effect: Effect::NoSchedule,
    }
}

/// Kinds of agents.
const KINDS: usize = 8;

fn one_of(key: &str, value: &str) -> Selector {
    Selector {
        requirements: vec![Requirement {
            key: key.into(),
            operator: Operator::In(vec![value.into()]),
        }],
    }
}

fn request(kind: usize) -> Request {
    let app = format!("app-{kind}");
    let term = |topology_key: &str| AgentTerm {
        namespaces: ["default".to_owned()].into(),
        selector: one_of("app", &app),
        topology_key: topology_key.into(),
    };
    let plain = Request {
        namespace: "default".into(),
        labels: labels(&[("app", app.clone())]),
        cpu_millis: 500,
        memory_mib: 512,
        image: format!("example.com/agent:{}", kind % 3),
        ..Request::default()
    };
    match kind {
        1 => Request {
            node_selector: labels(&[("kubernetes.io/arch", "arm64".into())]),
            ..plain
        },
        2 => Request {
            node_affinity: NodeAffinity {
                required: Vec::new(),
                preferred: vec![(50, one_of("disk", "nvme"))],
            },
            ..plain
        },
        3 => Request {
            tolerations: vec![Toleration {
                key: Some(GPU.into()),
                ..Toleration::default()
            }],
            extended: [(GPU.to_owned(), 1)].into(),
            ..plain
        },
        4 => Request {
            agents: AgentAffinity {
                forbidden: vec![term("tiffany.dev/blade")],
                ..AgentAffinity::default()
            },
            ..plain
        },
        5 => Request {
            spread: vec![Spread {
                term: term("topology.kubernetes.io/zone"),
                max_skew: 5,
                is_required: true,
            }],
            ..plain
        },
        6 => Request {
            pool: Some(Pool {
                name: "default/warm".into(),
                max: Some(1_000_000),
            }),
            ..plain
        },
        7 => Request {
            packing: Some(Packing::Binpack),
            ..plain
        },
        _ => plain,
    }
}
