//! Finds good blades without looking at all of them.
//!
//! Requests that ask the same of a blade itself (selector, affinity, tolerations, image, pool and the like) have one
//! shape. For each shape the index keeps one key per blade, 0 where the blade is filtered out, else what it is worth by
//! its load and by what lasts; and the greatest key of each block of 32 blades. A search looks at the best blocks only.
//! Changes are noted once and caught up by a shape when it is used.
//!
//! Invariant: a search finds a blade that fits and is accepted whenever there is one: it goes on through all blocks.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use super::{
    blade::Blade,
    filters,
    fleet::{Fleet, Room},
    labels::Labels,
    peers::Topology,
    request::{NodeAffinity, Packing, Request, Toleration},
    scores,
};

/// Blades per block.
const BLOCK: usize = 32;
/// Blocks that are looked at even where the first already gave enough.
const FIRST_BLOCKS: usize = 2;
/// Candidates of one search.
const CANDIDATES: usize = 16;
/// With so many from the first blocks a search looks no further.
const ENOUGH: usize = 4;
/// Blades taken at random beside them.
const RANDOM: u64 = 2;
/// Shapes that are kept; one costs 8 bytes per blade.
const MAX_SHAPES: usize = 64;
/// Changes that are kept for shapes to catch up.
const MAX_CHANGES: usize = 8192;
/// Keys are worth plus this, so that 0 means "filtered out"; more than anything that counts against a blade.
const BASE: i32 = 4000;
/// Instead of a worth: filtered out.
const OUT: i32 = i32::MIN;

/// What makes the shape of a request.
#[derive(Hash, PartialEq)]
struct View<'a> {
    selector: &'a Labels,
    affinity: &'a NodeAffinity,
    tolerations: &'a [Toleration],
    extended: &'a BTreeMap<String, u64>,
    image: &'a str,
    snapshot: Option<&'a str>,
    pool: Option<&'a str>,
    packing: Packing,
}

impl<'a> View<'a> {
    fn of(request: &'a Request, fleet: &Fleet, packing: Packing) -> Self {
        // An image that no blade has tells no blades apart: agents with ever new images share a shape.
        let is_there = fleet.has_image(&request.image);
        Self::with(request, if is_there { &request.image } else { "" }, packing)
    }

    fn with(request: &'a Request, image: &'a str, packing: Packing) -> Self {
        Self {
            selector: &request.node_selector,
            affinity: &request.node_affinity,
            tolerations: &request.tolerations,
            extended: &request.extended,
            image,
            snapshot: request.snapshot.as_deref(),
            pool: request.pool.as_ref().map(|pool| pool.name.as_str()),
            packing,
        }
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// One shape and its keys.
#[derive(Debug)]
struct Shape {
    /// A request of this shape; its image is empty where no blade has it.
    request: Request,
    packing: Packing,
    /// Worth that lasts, by slot; [`OUT`] where filtered out.
    lasting: Vec<i32>,
    keys: Vec<u32>,
    /// Greatest key of each block.
    greatest: Vec<u32>,
    /// Changes that are in the keys.
    caught_up: u64,
    used: u64,
    /// Domains of the blades that are not filtered out, by [`Topology::id`].
    domains: HashMap<u64, Arc<Vec<u32>>>,
}

impl Shape {
    fn new(request: &Request, image: &str, packing: Packing, fleet: &Fleet) -> Self {
        let request = Request {
            image: image.to_owned(),
            ..request.clone()
        };
        let mut shape = Self {
            request,
            packing,
            lasting: vec![OUT; fleet.len()],
            keys: vec![0; fleet.len()],
            greatest: vec![0; fleet.len().div_ceil(BLOCK)],
            caught_up: 0,
            used: 0,
            domains: HashMap::new(),
        };
        for (number, _, blade) in fleet.blades() {
            shape.judge(number, Some(blade));
        }
        shape.rebuild(fleet);
        shape
    }

    /// What the blade is to requests of this shape, apart from its load.
    fn judge(&mut self, number: u32, blade: Option<&Blade>) {
        let at = number as usize;
        if at >= self.lasting.len() {
            self.lasting.resize(at + 1, OUT);
            self.keys.resize(at + 1, 0);
            self.greatest.resize((at + 1).div_ceil(BLOCK), 0);
        }
        self.lasting[at] = match blade {
            Some(blade) if blade.refuses(&self.request).is_none() => scores::lasting(blade, &self.request).total(),
            Some(_) | None => OUT,
        };
        self.domains.clear();
    }

    fn key(&self, at: usize, fleet: &Fleet) -> u32 {
        if self.lasting[at] == OUT || !self.has_devices(at, fleet) {
            return 0;
        }
        let worth = BASE + self.lasting[at] + scores::passing_total(&fleet.rooms()[at], self.packing);
        worth.max(1).unsigned_abs()
    }

    /// All requests of this shape want the same devices, so that the keys can know whether they are there.
    fn has_devices(&self, at: usize, fleet: &Fleet) -> bool {
        let wanted = &self.request.extended;
        wanted.is_empty() || {
            let blade = u32::try_from(at).ok().and_then(|number| fleet.blade(number));
            blade.is_some_and(|(slot, blade)| filters::lacks_extended(slot, blade, &self.request).next().is_none())
        }
    }

    fn rebuild(&mut self, fleet: &Fleet) {
        for at in 0..self.lasting.len() {
            self.keys[at] = self.key(at, fleet);
        }
        for (block, keys) in self.keys.chunks(BLOCK).enumerate() {
            self.greatest[block] = keys.iter().copied().max().unwrap_or(0);
        }
    }

    fn renew(&mut self, at: usize, fleet: &Fleet) {
        if at >= self.keys.len() {
            // Reserved on, but not known as a blade yet.
            return;
        }
        let key = self.key(at, fleet);
        let old = std::mem::replace(&mut self.keys[at], key);
        let block = at / BLOCK;
        if key >= self.greatest[block] {
            self.greatest[block] = key;
        } else if old == self.greatest[block] {
            let end = self.keys.len().min((block + 1) * BLOCK);
            self.greatest[block] = self.keys[block * BLOCK..end].iter().copied().max().unwrap_or(0);
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Index {
    shapes: HashMap<u64, Shape>,
    /// Slots whose load changed, oldest first; `forgotten` more came before them.
    changes: Vec<u32>,
    forgotten: u64,
    clock: u64,
    /// Blocks of one search with their greatest keys; kept for its memory.
    blocks: Vec<(u32, usize)>,
}

impl Index {
    /// The blade itself changed, came or went; its load may have, too.
    pub(super) fn blade_changed(&mut self, fleet: &Fleet, number: u32) {
        let blade = fleet.blade(number).map(|(_, blade)| blade);
        for shape in self.shapes.values_mut() {
            shape.judge(number, blade);
        }
        self.load_changed(number);
    }

    /// What is reserved on the blade changed.
    pub(super) fn load_changed(&mut self, number: u32) {
        if self.shapes.is_empty() {
            return;
        }
        self.changes.push(number);
        if self.changes.len() > MAX_CHANGES {
            self.forget_changes();
        }
    }

    /// Forgets what every shape in use knows. One that was not used for long makes all its keys anew.
    fn forget_changes(&mut self) {
        let newest = self.forgotten + self.changes.len() as u64;
        let recent = newest - MAX_CHANGES as u64 / 2;
        let known = self.shapes.values().map(|shape| shape.caught_up);
        let needed = known.filter(|known| *known >= recent).min().unwrap_or(newest);
        let count = usize::try_from(needed - self.forgotten).unwrap_or(usize::MAX);
        self.changes.drain(..count.min(self.changes.len()));
        self.forgotten = needed;
    }

    /// Domains of a topology among the blades that are not filtered out for what they are.
    pub(super) fn domains(&mut self, shape: u64, topology: &Topology) -> Arc<Vec<u32>> {
        let Some(shape) = self.shapes.get_mut(&shape) else {
            return Arc::default();
        };
        let lasting = &shape.lasting;
        let known = shape.domains.entry(topology.id()).or_insert_with(|| {
            let open = (0_u32..).zip(lasting).filter(|(_, lasting)| **lasting != OUT);
            let mut domains: Vec<u32> = open.filter_map(|(number, _)| topology.domain(number)).collect();
            domains.sort_unstable();
            domains.dedup();
            Arc::new(domains)
        });
        known.clone()
    }

    /// What lasts of a blade's worth to requests of this shape.
    pub(super) fn lasting(&self, shape: u64, number: u32) -> i32 {
        let shape = self.shapes.get(&shape);
        shape
            .and_then(|shape| shape.lasting.get(number as usize))
            .copied()
            .unwrap_or(OUT)
    }

    /// The shape of a request, with its keys made or brought up to date.
    pub(super) fn shape(&mut self, fleet: &Fleet, request: &Request, packing: Packing) -> u64 {
        let view = View::of(request, fleet, packing);
        let id = view.fingerprint();
        self.clock += 1;
        let newest = self.forgotten + self.changes.len() as u64;
        let is_known = self
            .shapes
            .get(&id)
            .is_some_and(|shape| View::with(&shape.request, &shape.request.image, shape.packing) == view);
        if !is_known {
            self.make_room();
            let mut shape = Shape::new(request, view.image, packing, fleet);
            shape.caught_up = newest;
            self.shapes.insert(id, shape);
        }
        if let Some(shape) = self.shapes.get_mut(&id) {
            match shape.caught_up.checked_sub(self.forgotten) {
                Some(known) => {
                    for number in &self.changes[usize::try_from(known).unwrap_or(usize::MAX).min(self.changes.len())..]
                    {
                        shape.renew(*number as usize, fleet);
                    }
                }
                None => shape.rebuild(fleet),
            }
            shape.caught_up = newest;
            shape.used = self.clock;
        }
        id
    }

    /// Forgets the shape that was not used for longest where there are too many.
    fn make_room(&mut self) {
        if self.shapes.len() < MAX_SHAPES {
            return;
        }
        let oldest = self
            .shapes
            .iter()
            .min_by_key(|(_, shape)| shape.used)
            .map(|(id, _)| *id);
        if let Some(oldest) = oldest {
            self.shapes.remove(&oldest);
        }
    }

    /// Blades with room for the request that `accepts` takes: the best by their keys, and a few at random. `salt` decides
    /// between equal keys, and which are the random ones.
    pub(super) fn candidates(
        &mut self,
        shape: u64,
        rooms: &[Room],
        request: &Request,
        salt: u64,
        mut accepts: impl FnMut(u32) -> bool,
    ) -> Vec<u32> {
        let Some(shape) = self.shapes.get(&shape) else {
            return Vec::new();
        };
        let mut best = Best::default();
        let mut look_at = |block: usize, best: &mut Best| {
            let start = block * BLOCK;
            let keys = &shape.keys[start..shape.keys.len().min(start + BLOCK)];
            for (at, key) in (start..).zip(keys) {
                if *key < best.least || *key == 0 || !rooms[at].fits(request) {
                    continue;
                }
                let number = u32::try_from(at).unwrap_or(u32::MAX);
                let rank = u64::from(*key) << 32 | mix(salt ^ at as u64) >> 32;
                if rank > best.floor && accepts(number) {
                    best.add(rank, number);
                }
            }
        };
        // Begun at a random block, so that among equals none is always first.
        let count = shape.greatest.len();
        let turn = (mix(salt) % (count.max(1) as u64)) as usize;
        let (before, after) = shape.greatest.split_at(turn);
        let mut first = [(0, 0); FIRST_BLOCKS];
        for (start, part) in [(turn, after), (0, before)] {
            for (block, greatest) in (start..).zip(part) {
                if *greatest > first[FIRST_BLOCKS - 1].0 {
                    let at = first.partition_point(|(other, _)| other >= greatest);
                    first[at..].rotate_right(1);
                    first[at] = (*greatest, block);
                }
            }
        }
        for (greatest, block) in first {
            if greatest > 0 && greatest >= best.least {
                look_at(block, &mut best);
            }
        }
        if best.count < ENOUGH {
            let blocks = &mut self.blocks;
            blocks.clear();
            let rest = (0..count).filter(|block| first.iter().all(|(_, one)| one != block));
            blocks.extend(
                rest.map(|block| (shape.greatest[block], block))
                    .filter(|(greatest, _)| *greatest > 0),
            );
            blocks.sort_unstable_by(|one, other| other.cmp(one));
            for (_, block) in blocks {
                look_at(*block, &mut best);
                if best.count >= ENOUGH {
                    break;
                }
            }
        }
        let mut found: Vec<u32> = best.ranks[..best.count].iter().map(|(_, number)| *number).collect();
        for turn in 0..RANDOM {
            let at = (mix(salt.wrapping_add(turn + 1)) % (shape.keys.len().max(1) as u64)) as usize;
            let number = u32::try_from(at).unwrap_or(u32::MAX);
            let is_open = shape.keys.get(at).is_some_and(|key| *key > 0) && rooms[at].fits(request);
            if is_open && !found.contains(&number) && accepts(number) {
                found.push(number);
            }
        }
        found
    }
}

/// The best so far, best first.
#[derive(Default)]
struct Best {
    ranks: [(u64, u32); CANDIDATES],
    count: usize,
    /// What a newcomer must exceed.
    floor: u64,
    /// The key in it.
    least: u32,
}

impl Best {
    fn is_full(&self) -> bool {
        self.count == CANDIDATES
    }

    fn add(&mut self, rank: u64, number: u32) {
        let at = self.ranks[..self.count].partition_point(|(other, _)| *other > rank);
        if at >= CANDIDATES {
            return;
        }
        let end = self.count.min(CANDIDATES - 1);
        self.ranks.copy_within(at..end, at + 1);
        self.ranks[at] = (rank, number);
        self.count = (self.count + 1).min(CANDIDATES);
        if self.is_full() {
            self.floor = self.ranks[CANDIDATES - 1].0;
            self.least = (self.floor >> 32) as u32;
        }
    }
}

/// SplitMix64's finaliser: spreads numbers without an order.
pub(super) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
