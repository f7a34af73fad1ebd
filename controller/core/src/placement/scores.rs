//! Which blade is better. Each part has a fixed range, so that a column of an explanation can be read by itself.

use super::{
    blade::{Blade, Effect},
    fleet::{Room, share},
    request::{Packing, Request},
};

/// For an image that need not be fetched and is large, or of unknown size.
const IMAGE: i32 = 100;
/// For a small image that need not be fetched.
const SMALL_IMAGE: i32 = 20;
/// Below the first an image is small, from the second on large, bytes (kube-scheduler's ImageLocality).
const IMAGE_SIZES: (u64, u64) = (23 << 20, 1000 << 20);
/// For a snapshot that need not be fetched.
const SNAPSHOT: i32 = 150;
/// For a warm agent of the pool: more than an empty blade is worth, because nothing boots.
const WARM: i32 = 1500;
/// For all preferences that speak of blades.
const BLADES: i32 = 200;
/// For all preferences that speak of agents, either way.
const AGENTS: i32 = 200;
/// Against a blade, for each taint that asks politely.
const POLITE_TAINT: i32 = 100;
/// Against a blade, for each agent above a soft spread constraint.
const SKEW: i32 = 50;
/// Against a blade, for each failure of the last minutes.
const FAILURE: i32 = 50;
/// Most that any one thing counts against a blade.
const MOST_AGAINST: i32 = 400;
/// For CPU and memory that are equally used.
const BALANCE: i32 = 50;

/// What one blade is worth to one agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scores {
    /// 0 to 1000: the mean share of CPU and memory that stays free (or, binpacked, is used) after placing.
    pub room: i32,
    /// 0 to 50: how equally CPU and memory are used after placing.
    pub balance: i32,
    /// 0 to 100: bytes of the image that need not be fetched.
    pub image: i32,
    /// 0 or 150: the snapshot need not be fetched.
    pub snapshot: i32,
    /// 0 or 1500: a warm agent of the pool waits there.
    pub warm: i32,
    /// 0 to 200: preferred blades.
    pub blades: i32,
    /// -200 to 200: preferred and unwanted agents.
    pub agents: i32,
    /// -400 to 0: taints that ask agents to stay away.
    pub taints: i32,
    /// -400 to 0: agents above soft spread constraints.
    pub spread: i32,
    /// -400 to 0: failures of the last minutes.
    pub failures: i32,
}

impl Scores {
    /// Every part with its name.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, i32); 10] {
        [
            ("room", self.room),
            ("balance", self.balance),
            ("image", self.image),
            ("snapshot", self.snapshot),
            ("warm", self.warm),
            ("blades", self.blades),
            ("agents", self.agents),
            ("taints", self.taints),
            ("spread", self.spread),
            ("failures", self.failures),
        ]
    }

    /// What decides.
    #[must_use]
    pub fn total(&self) -> i32 {
        self.parts().iter().map(|(_, part)| part).sum()
    }

    /// These parts and those, which are others.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            room: self.room + other.room,
            balance: self.balance + other.balance,
            image: self.image + other.image,
            snapshot: self.snapshot + other.snapshot,
            warm: self.warm + other.warm,
            blades: self.blades + other.blades,
            agents: self.agents + other.agents,
            taints: self.taints + other.taints,
            spread: self.spread + other.spread,
            failures: self.failures + other.failures,
        }
    }
}

/// The parts that change while agents come and go. `liking` and `skew` are those of the agents in the blade's domains.
pub(super) fn passing(room: &Room, request: &Request, packing: Packing, liking: i32, skew: u32) -> Scores {
    let left = |free: u64, wanted: u64, all: u64| i32::from(share(free.saturating_sub(wanted), all));
    let cpu_left = left(room.cpu_millis, request.cpu_millis, room.all_cpu_millis);
    let memory_left = left(room.memory_mib, request.memory_mib, room.all_memory_mib);
    Scores {
        room: packed(i32::midpoint(cpu_left, memory_left), packing),
        balance: (1000 - (cpu_left - memory_left).abs()) * BALANCE / 1000,
        agents: liking * AGENTS / 1000,
        spread: against(skew, SKEW),
        failures: against(u32::from(room.failures), FAILURE),
        ..Scores::default()
    }
}

/// What changes with the load alone, before the agent is there: nearly its part of [`passing`], for the index.
pub(super) fn passing_total(room: &Room, packing: Packing) -> i32 {
    packed(i32::from(room.free_share), packing) + against(u32::from(room.failures), FAILURE)
}

fn packed(free: i32, packing: Packing) -> i32 {
    match packing {
        Packing::Spread => free,
        Packing::Binpack => 1000 - free,
    }
}

/// The parts that do not change while agents come and go.
pub(super) fn lasting(blade: &Blade, request: &Request) -> Scores {
    let pool = request.pool.as_ref();
    let is_warm = pool.is_some_and(|pool| blade.warm.get(&pool.name).is_some_and(|count| *count > 0));
    let has_snapshot = request
        .snapshot
        .as_ref()
        .is_some_and(|name| blade.snapshots.contains(name));
    let polite = blade.taints.iter().filter(|taint| {
        taint.effect == Effect::PreferNoSchedule && !request.tolerations.iter().any(|one| one.tolerates(taint))
    });
    Scores {
        image: blade.images.get(&request.image).map_or(0, |bytes| image(*bytes)),
        snapshot: if has_snapshot { SNAPSHOT } else { 0 },
        warm: if is_warm { WARM } else { 0 },
        blades: request.node_affinity.earned(&blade.labels) * BLADES / 1000,
        taints: against(u32::try_from(polite.count()).unwrap_or(u32::MAX), POLITE_TAINT),
        ..Scores::default()
    }
}

fn image(bytes: u64) -> i32 {
    let (small, large) = IMAGE_SIZES;
    if bytes == 0 || bytes >= large {
        return IMAGE;
    }
    let part = share(bytes.saturating_sub(small), large - small);
    SMALL_IMAGE + (IMAGE - SMALL_IMAGE) * i32::from(part) / 1000
}

fn against(count: u32, each: i32) -> i32 {
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    -count.saturating_mul(each).min(MOST_AGAINST)
}
