//! Chooses a blade for an agent: filter, score, reserve. One writer owns the [`Placer`].
//!
//! A reservation is made the moment a blade is chosen, before anything is written, and holds until the agent has ended
//! or was placed elsewhere; so two agents chosen in one instant never get the same room.
//!
//! Invariant: the reservations made by [`Placer::place`] never exceed a blade's allocatable amounts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// What placement knows of one blade.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blade {
    /// Heard of lately.
    pub ready: bool,
    /// Calls do not reach it, whatever it says of itself.
    pub unreachable: bool,
    /// Cordoned by an operator, or tainted.
    pub cordoned: bool,
    /// Taint keys that keep new agents away.
    pub taints: BTreeSet<String>,
    /// For node selectors.
    pub labels: BTreeMap<String, String>,
    /// Allocatable CPU, thousandths of a core.
    pub cpu_millis: u64,
    /// Allocatable memory, MiB.
    pub memory_mib: u64,
    /// Most microVMs at a time; 0: no own limit.
    pub max_vms: u32,
    /// References and digests of images in the blade's store.
    pub images: BTreeSet<String>,
}

/// What one agent needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// MiB.
    pub memory_mib: u64,
    /// Image reference, for locality only.
    pub image: String,
    /// Labels a blade must have.
    pub node_selector: BTreeMap<String, String>,
    /// The only blade that will do.
    pub node_name: Option<String>,
    /// Blades not to use now: they refused lately.
    pub avoid: BTreeSet<String>,
}

/// Why one blade will not do; `Ord` is the order in which causes are looked at and said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Their texts follow.
pub enum Cause {
    OtherBladeNamed,
    NotReady,
    Unreachable,
    Cordoned,
    Tainted,
    SelectorDiffers,
    RefusedLately,
    InsufficientCpu,
    InsufficientMemory,
    TooManyVms,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherBladeNamed => "not named by spec.nodeName",
            Self::NotReady => "not ready",
            Self::Unreachable => "not reachable",
            Self::Cordoned => "unschedulable",
            Self::Tainted => "tainted",
            Self::SelectorDiffers => "didn't match spec.nodeSelector",
            Self::RefusedLately => "refused lately",
            Self::InsufficientCpu => "insufficient cpu",
            Self::InsufficientMemory => "insufficient memory",
            Self::TooManyVms => "too many microVMs",
        })
    }
}

/// No blade will do; the text counts blades by cause as kube-scheduler does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct Unschedulable {
    /// Blades looked at.
    pub blades: usize,
    /// How many of them have each cause; one blade may have several.
    pub causes: BTreeMap<Cause, usize>,
    /// Sentences about requests that no blade could ever hold.
    pub never: Vec<String>,
}

impl Unschedulable {
    fn text(&self) -> String {
        let mut text = format!("0/{} blades are available", self.blades);
        let mut counted: Vec<_> = self.causes.iter().collect();
        counted.sort_by_key(|(cause, count)| (std::cmp::Reverse(**count), **cause));
        for (index, (cause, count)) in counted.into_iter().enumerate() {
            text += &format!("{} {count} {cause}", if index == 0 { ":" } else { "," });
        }
        text += ".";
        for sentence in &self.never {
            text += &format!(" {sentence}");
        }
        text
    }
}

/// Room taken on one blade.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reservation {
    blade: String,
    cpu_millis: u64,
    memory_mib: u64,
}

#[derive(Debug, Default)]
struct Used {
    cpu_millis: u64,
    memory_mib: u64,
    vms: u32,
}

/// All blades and what is reserved on them.
#[derive(Debug)]
pub struct Placer {
    blades: BTreeMap<String, Blade>,
    used: HashMap<String, Used>,
    reservations: HashMap<String, Reservation>,
    seed: u64,
}

impl Placer {
    /// `seed` decides ties, and nothing else: the same seed and calls give the same placements.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            blades: BTreeMap::new(),
            used: HashMap::new(),
            reservations: HashMap::new(),
            seed,
        }
    }

    /// Adds or replaces a blade; true when something changed. Reservations stay.
    pub fn upsert_blade(&mut self, name: &str, blade: Blade) -> bool {
        if self.blades.get(name) == Some(&blade) {
            return false;
        }
        self.blades.insert(name.to_owned(), blade);
        true
    }

    /// Forgets a blade. Reservations on it stay: its agents may still run.
    pub fn remove_blade(&mut self, name: &str) {
        self.blades.remove(name);
    }

    /// Whether a blade of this name is known and ready.
    #[must_use]
    pub fn is_ready(&self, name: &str) -> bool {
        self.blades.get(name).is_some_and(|blade| blade.ready)
    }

    /// Notes that `uid` holds room on `blade`: what the API says after a restart. Never refused: it is so already.
    pub fn reserve(&mut self, uid: &str, blade: &str, request: &Request) {
        let wanted = Reservation {
            blade: blade.to_owned(),
            cpu_millis: request.cpu_millis,
            memory_mib: request.memory_mib,
        };
        if self.reservations.get(uid) == Some(&wanted) {
            return;
        }
        self.release(uid);
        let used = self.used.entry(blade.to_owned()).or_default();
        used.cpu_millis = used.cpu_millis.saturating_add(wanted.cpu_millis);
        used.memory_mib = used.memory_mib.saturating_add(wanted.memory_mib);
        used.vms = used.vms.saturating_add(1);
        self.reservations.insert(uid.to_owned(), wanted);
    }

    /// Gives the room of `uid` back; true when it held any.
    pub fn release(&mut self, uid: &str) -> bool {
        let Some(held) = self.reservations.remove(uid) else {
            return false;
        };
        if let Some(used) = self.used.get_mut(&held.blade) {
            used.cpu_millis = used.cpu_millis.saturating_sub(held.cpu_millis);
            used.memory_mib = used.memory_mib.saturating_sub(held.memory_mib);
            used.vms = used.vms.saturating_sub(1);
            if used.vms == 0 {
                self.used.remove(&held.blade);
            }
        }
        true
    }

    /// Blade on which `uid` holds room.
    #[must_use]
    pub fn reserved_on(&self, uid: &str) -> Option<&str> {
        self.reservations.get(uid).map(|held| held.blade.as_str())
    }

    /// Chooses a blade and reserves its room. An agent that holds room keeps its blade: asking twice is asking once.
    ///
    /// # Errors
    /// No blade will do; nothing was reserved.
    pub fn place(&mut self, uid: &str, request: &Request) -> Result<String, Unschedulable> {
        if let Some(held) = self.reservations.get(uid) {
            return Ok(held.blade.clone());
        }
        let mut causes = BTreeMap::new();
        let mut best: Option<(u64, u64, &String)> = None;
        for (name, blade) in &self.blades {
            let against = self.causes(name, blade, request);
            if against.is_empty() {
                let candidate = (self.score(name, blade, request), tie(self.seed, uid, name), name);
                if best.is_none_or(|best| (candidate.0, candidate.1) > (best.0, best.1)) {
                    best = Some(candidate);
                }
            }
            for cause in against {
                *causes.entry(cause).or_insert(0) += 1;
            }
        }
        match best.map(|(_, _, name)| name.clone()) {
            Some(name) => {
                self.reserve(uid, &name, request);
                Ok(name)
            }
            None => Err(Unschedulable {
                blades: self.blades.len(),
                causes,
                never: self.never(request),
            }),
        }
    }

    fn causes(&self, name: &str, blade: &Blade, request: &Request) -> Vec<Cause> {
        if request.node_name.as_deref().is_some_and(|wanted| wanted != name) {
            return vec![Cause::OtherBladeNamed];
        }
        if !blade.ready {
            return vec![Cause::NotReady];
        }
        if blade.unreachable {
            return vec![Cause::Unreachable];
        }
        if blade.cordoned {
            return vec![Cause::Cordoned];
        }
        if !blade.taints.is_empty() {
            return vec![Cause::Tainted];
        }
        if request
            .node_selector
            .iter()
            .any(|(key, value)| blade.labels.get(key) != Some(value))
        {
            return vec![Cause::SelectorDiffers];
        }
        let idle = Used::default();
        let used = self.used.get(name).unwrap_or(&idle);
        let mut causes = Vec::new();
        if used.cpu_millis.saturating_add(request.cpu_millis) > blade.cpu_millis {
            causes.push(Cause::InsufficientCpu);
        }
        if used.memory_mib.saturating_add(request.memory_mib) > blade.memory_mib {
            causes.push(Cause::InsufficientMemory);
        }
        if blade.max_vms > 0 && used.vms >= blade.max_vms {
            causes.push(Cause::TooManyVms);
        }
        if causes.is_empty() && request.avoid.contains(name) {
            causes.push(Cause::RefusedLately);
        }
        causes
    }

    /// 0 to 1100: the mean free share of CPU and memory after placing (least allocated first), and 100 for an image that
    /// need not be fetched.
    fn score(&self, name: &str, blade: &Blade, request: &Request) -> u64 {
        let idle = Used::default();
        let used = self.used.get(name).unwrap_or(&idle);
        let free = |total: u64, used: u64, wanted: u64| {
            let left = u128::from(total.saturating_sub(used).saturating_sub(wanted));
            u64::try_from(left * 1000 / u128::from(total.max(1))).unwrap_or(1000)
        };
        let cpu = free(blade.cpu_millis, used.cpu_millis, request.cpu_millis);
        let memory = free(blade.memory_mib, used.memory_mib, request.memory_mib);
        let local = if blade.images.contains(&request.image) { 100 } else { 0 };
        u64::midpoint(cpu, memory) + local
    }

    fn never(&self, request: &Request) -> Vec<String> {
        let mut sentences = Vec::new();
        let most = |amount: fn(&Blade) -> u64| self.blades.values().map(amount).max().unwrap_or(0);
        let (cpu, memory) = (most(|blade| blade.cpu_millis), most(|blade| blade.memory_mib));
        if !self.blades.is_empty() && request.cpu_millis > cpu {
            sentences.push(format!(
                "spec.cpu ({}m) is more than any blade has ({cpu}m).",
                request.cpu_millis
            ));
        }
        if !self.blades.is_empty() && request.memory_mib > memory {
            sentences.push(format!(
                "spec.memory ({} MiB) is more than any blade has ({memory} MiB).",
                request.memory_mib
            ));
        }
        if let Some(name) = request
            .node_name
            .as_ref()
            .filter(|name| !self.blades.contains_key(*name))
        {
            sentences.push(format!("spec.nodeName: there is no blade {name:?}."));
        }
        sentences
    }
}

/// FNV-1a over seed, uid and blade, then a finaliser: spreads ties without an order of names.
fn tie(seed: u64, uid: &str, blade: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ seed;
    for byte in uid.bytes().chain([0]).chain(blade.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests;
