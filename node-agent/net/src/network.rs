//! The network of one namespace's VMs: attach, change, detach, count, reclaim.
//!
//! ```text
//! free ──take──► leased ──elements acknowledged──► let ──tap up, way to the guest──► attached
//!   ▲                                               ▲                                  │
//!   └───────────elements gone (acknowledged)────────┴──────────tap down────────────────┘
//! ```
//!
//! Everything blocks for as long as the kernel needs; call it where blocking is allowed. All changes go through one lock,
//! as the kernel's own transactions do.

use crate::{
    elements::{self, Elements},
    links::{Link, Links},
    netlink::Refused,
    netns::{GuestNetns, NetError},
    nft::{Batch, Element, Family, Nft, Seen, Table, datatype},
    policy::{DnsName, Policy, PolicyError},
    pool::{Lease, Pool},
    slot::{Place, Slot, TapName, Wiring},
    table::{self, BRIDGE, INET, SETS},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Pins kept per VM; the oldest goes for the newest.
const MAX_PINS: usize = 1024;

/// What was just done, for whoever follows along: tests end the process there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// A slot is taken.
    Taken,
    /// The kernel has acknowledged the VM's elements.
    Let,
    /// The tap is up and the way to the guest is there.
    Up,
    /// The tap is down.
    Down,
    /// The kernel has acknowledged that the elements are gone.
    Unlet,
    /// The slot is free.
    Free,
}

/// Why a VM's network could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel did not do it.
    #[error("the blade's network: {}: {}", .0.what, .0.source)]
    Kernel(#[from] Refused),
    /// Making the namespace or a tap.
    #[error(transparent)]
    Tap(#[from] NetError),
    /// The policy cannot be kept.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// No slot is free.
    #[error("all {capacity} network slots are in use: end a microVM, or give the blade more slots")]
    Full {
        /// How many there are.
        capacity: usize,
    },
    /// The slot is not attached.
    #[error("network slot {slot} is not attached: attach it first")]
    NotAttached {
        /// Which.
        slot: u16,
    },
    /// The tap is not there.
    #[error("tap {tap} is not there: was it removed from outside?")]
    NoTap {
        /// Which.
        tap: TapName,
    },
}

/// How a network is.
#[derive(Clone, Copy)]
pub struct Options {
    /// Slots, at most [`crate::MAX_SLOTS`].
    pub capacity: u16,
    /// Whether guests have IPv6.
    pub has_ipv6: bool,
    /// Called after each step.
    pub on_step: fn(Step),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            capacity: 1024,
            has_ipv6: true,
            on_step: |_| {},
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} slots, IPv6 {}", self.capacity, self.has_ipv6)
    }
}

/// What passed, and what did not, since the VM was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Let through the anti-spoof rules.
    pub sent: Count,
    /// To the guest.
    pub received: Count,
    /// Dropped: not the VM's MAC or address, or frames that guests have no right to.
    pub spoofed: Count,
    /// Dropped: above a limit.
    pub limited: Count,
    /// Dropped: no rule lets it.
    pub denied: Count,
}

/// Of a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes, link headers not included.
    pub bytes: u64,
}

/// What of a network a ledger proves.
#[derive(Debug, Clone, Default)]
pub struct Proven {
    /// VMs that live, with their policies: adopted.
    pub live: Vec<(Place, Policy)>,
    /// Names of taps that are FAR's. Elements and routes of those that do not live are removed; other names are left.
    pub ours: BTreeSet<TapName>,
}

/// What a reclaim did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reclaimed {
    /// VMs that live.
    pub adopted: usize,
    /// Slots or ports that were leaked and are clean now.
    pub removed: usize,
}

#[derive(Debug)]
struct Attached {
    place: Place,
    policy: Policy,
    generation: u8,
    index: u32,
    lease: Option<Lease>,
    pins: Vec<(&'static str, Vec<u8>)>,
}

#[derive(Debug)]
struct State {
    pool: Pool,
    attached: BTreeMap<u16, Attached>,
    /// Indexes of the taps that were made.
    taps: BTreeMap<u16, u32>,
    /// A slot's next policy is never of the generation of one that is still in force.
    generations: Vec<u8>,
    nft: Nft,
    links: Links,
}

/// See the module's text.
#[derive(Debug)]
pub struct Network {
    netns: Option<GuestNetns>,
    options: Options,
    state: Mutex<State>,
}

impl Network {
    /// The network in a namespace of the guests'. Tables that are there already stay, with all that is in them.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or this process may not.
    pub fn open(netns: GuestNetns, options: Options) -> Result<Self, NetworkError> {
        let state = netns.run_inside(|| Self::state(options))??;
        Ok(Self {
            netns: Some(netns),
            options,
            state: Mutex::new(state),
        })
    }

    /// The network in the calling thread's namespace, for bridges that others made. No taps are made there.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_here(options: Options) -> Result<Self, NetworkError> {
        Ok(Self {
            netns: None,
            options,
            state: Mutex::new(Self::state(options)?),
        })
    }

    fn state(options: Options) -> Result<State, NetworkError> {
        let (mut nft, mut links) = (Nft::open()?, Links::open()?);
        if !nft.has_table(INET)? {
            nft.commit(table::install())?;
        }
        if let Some(loopback) = links.find("lo")? {
            links.add_gateway(loopback.index)?;
        }
        let pool = Pool::new(options.capacity);
        let generations = vec![0; pool.capacity()];
        Ok(State {
            pool,
            attached: BTreeMap::new(),
            taps: BTreeMap::new(),
            generations,
            nft,
            links,
        })
    }

    /// The namespace, for VMMs to enter; `None` for [`Self::open_here`].
    #[must_use]
    pub fn netns(&self) -> Option<&GuestNetns> {
        self.netns.as_ref()
    }

    /// Lets packets pass between taps and the namespace's uplink, as the tables say. Without it guests reach the blade's
    /// services at most.
    ///
    /// # Errors
    /// The kernel's.
    pub fn forward(&self) -> Result<(), NetworkError> {
        let Some(netns) = &self.netns else { return Ok(()) };
        Ok(netns.run_inside(|| crate::netns::enable_forwarding(self.options.has_ipv6))??)
    }

    /// Makes the taps of the first `count` slots ahead, down. Those that are there stay.
    ///
    /// # Errors
    /// Names the tap.
    pub fn prepare(&self, count: u16) -> Result<(), NetworkError> {
        let Some(netns) = &self.netns else { return Ok(()) };
        let slots: Vec<Slot> = (0..count.min(self.options.capacity)).filter_map(Slot::new).collect();
        netns.create_taps_down(&slots)?;
        let mut state = self.lock();
        let links = state.links.list()?;
        state.taps.extend(
            links
                .iter()
                .filter_map(|link| Some((Slot::of_tap(&link.name)?.number(), link.index))),
        );
        Ok(())
    }

    /// Takes a slot for a VM and connects it under its policy. The guest's addresses are [`crate::GUEST`] on every slot.
    ///
    /// # Errors
    /// Nothing of it is left after an error.
    pub fn attach(&self, policy: Policy) -> Result<Place, NetworkError> {
        policy.check()?;
        let mut state = self.lock();
        let lease = state.pool.take().ok_or(NetworkError::Full {
            capacity: state.pool.capacity(),
        })?;
        (self.options.on_step)(Step::Taken);
        let slot = lease.slot();
        let place = Place::routed(slot, self.options.has_ipv6);
        let index = match state.taps.get(&slot.number()) {
            Some(index) => Ok(*index),
            None => self.make_tap(&mut state, slot),
        };
        let index = match index {
            Ok(index) => index,
            Err(error) => {
                state.pool.give_back(lease);
                return Err(error);
            }
        };
        match self.connect(&mut state, place, policy, index) {
            Ok(attached) => {
                let place = attached.place.clone();
                state.attached.insert(
                    slot.number(),
                    Attached {
                        lease: Some(lease),
                        ..attached
                    },
                );
                Ok(place)
            }
            Err(error) => {
                state.pool.give_back(lease);
                Err(error)
            }
        }
    }

    fn make_tap(&self, state: &mut State, slot: Slot) -> Result<u32, NetworkError> {
        let none = || NetworkError::NoTap { tap: slot.tap() };
        let netns = self.netns.as_ref().ok_or_else(none)?;
        netns.create_taps_down(&[slot])?;
        let link = state.links.find(slot.tap().as_str())?.ok_or_else(none)?;
        state.taps.insert(slot.number(), link.index);
        Ok(link.index)
    }

    /// Applies a policy to a tap that others made and put on a bridge.
    ///
    /// # Errors
    /// The tap is not there, or the kernel's.
    pub fn attach_bridged(&self, place: Place, policy: Policy) -> Result<(), NetworkError> {
        policy.check()?;
        let mut state = self.lock();
        let link = state.links.find(place.tap.as_str())?;
        let link = link.ok_or_else(|| NetworkError::NoTap { tap: place.tap.clone() })?;
        let lease = state.pool.adopt(place.slot);
        let lease = lease.ok_or(NetworkError::Full {
            capacity: state.pool.capacity(),
        })?;
        let number = place.slot.number();
        match self.connect(&mut state, place, policy, link.index) {
            Ok(attached) => {
                state.attached.insert(
                    number,
                    Attached {
                        lease: Some(lease),
                        ..attached
                    },
                );
                Ok(())
            }
            Err(error) => {
                state.pool.give_back(lease);
                Err(error)
            }
        }
    }

    /// Elements first, tap afterwards.
    fn connect(&self, state: &mut State, place: Place, policy: Policy, index: u32) -> Result<Attached, NetworkError> {
        let generation = state.next_generation(place.slot);
        let mut batch = Batch::new();
        add(&mut batch, &everything(&place, &policy, generation));
        if place.wiring == Wiring::Bridged {
            state.links.isolate(index, place.tap.as_str())?;
        }
        state.nft.commit(batch)?;
        (self.options.on_step)(Step::Let);
        let attached = Attached {
            place,
            policy,
            generation,
            index,
            lease: None,
            pins: Vec::new(),
        };
        if attached.place.wiring == Wiring::Routed
            && let Err(refused) = state.links.bring_up(index, &attached.place)
        {
            state.remove(&attached)?;
            if refused.code() == libc::ENODEV {
                state.taps.remove(&attached.place.slot.number());
                return Err(NetworkError::NoTap {
                    tap: attached.place.tap,
                });
            }
            return Err(refused.into());
        }
        (self.options.on_step)(Step::Up);
        Ok(attached)
    }

    /// Puts another policy in the place of the VM's: in one transaction of the kernel, also for connections that are open.
    ///
    /// # Errors
    /// The old policy stays after an error.
    pub fn change(&self, slot: Slot, policy: Policy) -> Result<(), NetworkError> {
        policy.check()?;
        let mut state = self.lock();
        let generation = state.next_generation(slot);
        let State { attached, nft, .. } = &mut *state;
        let none = NetworkError::NotAttached { slot: slot.number() };
        let attached = attached.get_mut(&slot.number()).ok_or(none)?;
        let place = &attached.place;
        let mut batch = Batch::new();
        add(&mut batch, &elements::permissions(place, &policy, generation));
        if policy.limits != attached.policy.limits {
            delete(&mut batch, &elements::limits(place, &attached.policy.limits));
            add(&mut batch, &elements::limits(place, &policy.limits));
        }
        delete(&mut batch, &elements::gate(place, attached.generation));
        add(&mut batch, &elements::gate(place, generation));
        delete(
            &mut batch,
            &elements::permissions(place, &attached.policy, attached.generation),
        );
        nft.commit(batch)?;
        unpin(nft, attached);
        (attached.policy, attached.generation) = (policy, generation);
        Ok(())
    }

    /// Disconnects a VM: tap down, elements gone, slot free, in this order. One that is not attached is success.
    ///
    /// # Errors
    /// The slot stays taken, and a second try is possible.
    pub fn detach(&self, slot: Slot) -> Result<(), NetworkError> {
        let mut state = self.lock();
        let Some(mut attached) = state.attached.remove(&slot.number()) else {
            return Ok(());
        };
        match self.disconnect(&mut state, &mut attached) {
            Ok(()) => {
                if let Some(lease) = attached.lease {
                    state.pool.give_back(lease);
                }
                (self.options.on_step)(Step::Free);
                Ok(())
            }
            Err(error) => {
                state.attached.insert(slot.number(), attached);
                Err(error)
            }
        }
    }

    fn disconnect(&self, state: &mut State, attached: &mut Attached) -> Result<(), NetworkError> {
        if attached.place.wiring == Wiring::Routed {
            match state.links.disconnect(attached.index, &attached.place) {
                // Removed under us: the next VM on this slot gets a new one.
                Err(refused) if refused.code() == libc::ENODEV => {
                    state.taps.remove(&attached.place.slot.number());
                }
                other => other?,
            }
        }
        (self.options.on_step)(Step::Down);
        unpin(&mut state.nft, attached);
        state.remove(attached)?;
        (self.options.on_step)(Step::Unlet);
        Ok(())
    }

    /// Lets a VM reach an address that a name of its policy resolved to, for `lifetime`. False if no rule is for the name,
    /// or if the address is one that a name may not stand for (rebinding).
    ///
    /// # Errors
    /// The kernel's.
    pub fn pin(&self, slot: Slot, name: &DnsName, address: IpAddr, lifetime: Duration) -> Result<bool, NetworkError> {
        let mut state = self.lock();
        let State { attached, nft, .. } = &mut *state;
        let none = NetworkError::NotAttached { slot: slot.number() };
        let attached = attached.get_mut(&slot.number()).ok_or(none)?;
        if crate::policy::is_never(address) || crate::policy::is_private(address) {
            return Ok(false);
        }
        let milliseconds = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
        let Attached {
            place,
            policy,
            generation,
            ..
        } = &*attached;
        let Some((table, set, element)) = elements::pin(place, policy, *generation, name, address, milliseconds) else {
            return Ok(false);
        };
        let key = (set, element.key.clone());
        // A pin that is there keeps its time in the kernel: it is made anew, for the longer time.
        let mut batch = Batch::new();
        if nft.element(table, set, &element.key)?.is_some() {
            batch.delete_elements(table, set, std::slice::from_ref(&element));
        }
        batch.add_elements(table, set, std::slice::from_ref(&element));
        match nft.commit(batch) {
            // It went by itself between the look and the change.
            Err(refused) if refused.code() == libc::ENOENT => {
                let mut again = Batch::new();
                again.add_elements(table, set, &[element]);
                nft.commit(again)?;
            }
            other => other?,
        }
        attached.pins.retain(|pin| *pin != key);
        if attached.pins.len() >= MAX_PINS {
            let (set, key) = attached.pins.remove(0);
            let mut batch = Batch::new();
            batch.delete_elements(INET, set, &[Element::of(key)]);
            // One that has gone by itself is as good.
            let _ = nft.commit(batch);
        }
        attached.pins.push(key);
        Ok(true)
    }

    /// What a VM sent, received, and was refused.
    ///
    /// # Errors
    /// The kernel's.
    pub fn counters(&self, slot: Slot) -> Result<Counters, NetworkError> {
        let mut state = self.lock();
        let none = NetworkError::NotAttached { slot: slot.number() };
        let place = state.attached.get(&slot.number()).ok_or(none)?.place.clone();
        let key = elements::lasting_mark(&place).to_ne_bytes();
        let name = table::name_key(place.tap.as_str());
        let table = match place.wiring {
            Wiring::Routed => INET,
            Wiring::Bridged => BRIDGE,
        };
        let mut of = |table, set, key: &[u8]| -> Result<Count, NetworkError> {
            Ok(state
                .nft
                .element(table, set, key)?
                .map_or(Count::default(), |seen| Count::of(&seen)))
        };
        Ok(Counters {
            sent: of(INET, "sent", &key)?,
            received: of(table, "received", &name)?,
            spoofed: of(table, "spoofed", &name)?,
            limited: of(INET, "limited", &key)?,
            denied: of(INET, "denied", &key)?,
        })
    }

    /// Who is where under which policy.
    #[must_use]
    pub fn list(&self) -> Vec<(Place, Policy)> {
        let state = self.lock();
        state
            .attached
            .values()
            .map(|attached| (attached.place.clone(), attached.policy.clone()))
            .collect()
    }

    /// Slots taken and slots there are.
    #[must_use]
    pub fn use_of_slots(&self) -> (usize, usize) {
        let state = self.lock();
        (state.pool.taken(), state.pool.capacity())
    }

    /// The VM whose slot's address this is.
    #[must_use]
    pub fn of_address(&self, address: IpAddr) -> Option<(Place, Policy)> {
        let state = self.lock();
        let is_its = |place: &Place| match address {
            IpAddr::V4(address) => place.address == address,
            IpAddr::V6(address) => place.address6 == Some(address),
        };
        let found = state.attached.values().find(|attached| is_its(&attached.place))?;
        Some((found.place.clone(), found.policy.clone()))
    }

    /// After a restart: adopts what lives, cleans what is leaked, leaves what is nobody's of ours. Run it in the
    /// background, before the first attach.
    ///
    /// # Errors
    /// The kernel's; a second run goes on where the first ended.
    pub fn reclaim(&self, proven: &Proven) -> Result<Reclaimed, NetworkError> {
        let mut state = self.lock();
        let mut seen = seen_by_owner(&mut state.nft)?;
        let links = state.links.list()?;
        let mut done = Reclaimed::default();
        for link in &links {
            if let (Some(slot), true) = (Slot::of_tap(&link.name), self.netns.is_some()) {
                state.taps.insert(slot.number(), link.index);
            }
        }
        let live: BTreeSet<&TapName> = proven.live.iter().map(|(place, _)| &place.tap).collect();
        // Leaked first: it frees what the live ones may need.
        let leaked: Vec<&TapName> = proven.ours.iter().filter(|tap| !live.contains(tap)).collect();
        for tap in leaked {
            let link = links.iter().find(|link| link.name == tap.as_str());
            let is_routed = Slot::of_tap(tap.as_str()).is_some();
            let is_up = link.is_some_and(|link| link.is_up && is_routed);
            if let Some(link) = link.filter(|_| is_up) {
                state.links.take_down(link.index, &link.name)?;
            }
            let elements = seen.remove_tap(tap);
            let mut batch = Batch::new();
            for (table, set, of) in &elements {
                batch.delete_elements(*table, set, of);
            }
            if !elements.is_empty() {
                state.nft.commit(batch)?;
            }
            done.removed += usize::from(is_up || !elements.is_empty());
        }
        for (place, policy) in &proven.live {
            if self.adopt(&mut state, place, policy, &links, seen.remove_tap(&place.tap))? {
                done.adopted += 1;
            }
        }
        Ok(done)
    }

    /// Makes the kernel hold exactly what a live VM is to have, whatever it holds. Its counters go on.
    fn adopt(
        &self,
        state: &mut State,
        place: &Place,
        policy: &Policy,
        links: &[Link],
        seen: Elements,
    ) -> Result<bool, NetworkError> {
        let Some(link) = links.iter().find(|link| link.name == place.tap.as_str()) else {
            // The tap is gone, so its VM cannot live on: what is left of it goes.
            let mut batch = Batch::new();
            delete(&mut batch, &seen);
            state.nft.commit(batch)?;
            return Ok(false);
        };
        let Some(lease) = state.pool.adopt(place.slot) else {
            return Ok(false);
        };
        let gate = seen
            .iter()
            .find(|(_, set, _)| *set == "vm")
            .and_then(|(_, _, of)| of.first()?.data.clone());
        if let (Some(old), Some(next)) = (gate, state.generations.get_mut(usize::from(place.slot.number()))) {
            *next = old.get(1).copied().unwrap_or(0);
        }
        let generation = state.next_generation(place.slot);
        let is_counter = |set: &str| ["sent", "received", "spoofed", "limited", "denied"].contains(&set);
        let counted: BTreeSet<(Family, &str)> = seen
            .iter()
            .filter(|(_, set, _)| is_counter(set))
            .map(|(table, set, _)| (table.family, *set))
            .collect();
        let mut batch = Batch::new();
        let old: Elements = seen.iter().filter(|(_, set, _)| !is_counter(set)).cloned().collect();
        delete(&mut batch, &old);
        let mut new = everything(place, policy, generation);
        new.retain(|(table, set, _)| !counted.contains(&(table.family, *set)));
        add(&mut batch, &new);
        state.nft.commit(batch)?;
        match place.wiring {
            Wiring::Routed => state.links.bring_up(link.index, place)?,
            Wiring::Bridged => state.links.isolate(link.index, &link.name)?,
        }
        let attached = Attached {
            place: place.clone(),
            policy: policy.clone(),
            generation,
            index: link.index,
            lease: Some(lease),
            pins: Vec::new(),
        };
        state.attached.insert(place.slot.number(), attached);
        Ok(true)
    }

    /// Names a bridge whose guests' packets come to the blade through it. Once per bridge.
    ///
    /// # Errors
    /// The kernel's.
    pub fn guard_bridge(&self, bridge: &TapName) -> Result<(), NetworkError> {
        let mut batch = Batch::new();
        batch.add_elements(INET, "bridges", &[Element::of(table::name_key(bridge.as_str()))]);
        Ok(self.lock().nft.commit(batch)?)
    }

    pub(crate) fn isolate(&self, link: &Link) -> Result<(), NetworkError> {
        Ok(self.lock().links.isolate(link.index, &link.name)?)
    }

    pub(crate) fn links(&self) -> Result<Vec<Link>, NetworkError> {
        Ok(self.lock().links.list()?)
    }

    /// Removes a tap that a ledger proves to be an orphan of FAR's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_orphan(&self, tap: &TapName) -> Result<(), NetworkError> {
        let mut state = self.lock();
        match state.links.find(tap.as_str())? {
            Some(link) => Ok(state.links.delete(link.index, &link.name)?),
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic between two steps leaves what a kill would leave; the next reclaim sees to it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next_generation(&mut self, slot: Slot) -> u8 {
        let next = self.generations.get_mut(usize::from(slot.number()));
        next.map_or(1, |generation| {
            // 0 stands for no generation in marks of counters.
            *generation = generation.checked_add(1).unwrap_or(1);
            *generation
        })
    }

    fn remove(&mut self, attached: &Attached) -> Result<(), NetworkError> {
        let mut batch = Batch::new();
        let mut all = everything(&attached.place, &attached.policy, attached.generation);
        all.reverse();
        delete(&mut batch, &all);
        match self.nft.commit(batch) {
            // Somebody else took some of it away: what is left is found by looking.
            Err(refused) if refused.code() == libc::ENOENT => {
                let left = seen_by_owner(&mut self.nft)?.remove_tap(&attached.place.tap);
                let mut batch = Batch::new();
                delete(&mut batch, &left);
                Ok(self.nft.commit(batch)?)
            }
            other => Ok(other?),
        }
    }
}

impl Count {
    fn of(seen: &Seen) -> Self {
        Self {
            packets: seen.packets,
            bytes: seen.bytes,
        }
    }
}

/// All elements of a VM; the gate last.
fn everything(place: &Place, policy: &Policy, generation: u8) -> Elements {
    let mut all = elements::identity(place);
    all.extend(elements::limits(place, &policy.limits));
    all.extend(elements::permissions(place, policy, generation));
    all.extend(elements::gate(place, generation));
    all
}

fn add(batch: &mut Batch, elements: &Elements) {
    for (table, set, of) in elements {
        batch.add_elements(*table, set, of);
    }
}

fn delete(batch: &mut Batch, elements: &Elements) {
    for (table, set, of) in elements {
        batch.delete_elements(*table, set, of);
    }
}

/// Removes the pins of a policy that is no longer in force; those that went by themselves are gone already.
fn unpin(nft: &mut Nft, attached: &mut Attached) {
    for (set, key) in attached.pins.drain(..) {
        let mut batch = Batch::new();
        batch.delete_elements(INET, set, &[Element::of(key)]);
        let _ = nft.commit(batch);
    }
}

/// All per-VM elements of the kernel, by the tap's name or by the mark's slot.
#[derive(Debug, Default)]
struct SeenByOwner {
    by_name: BTreeMap<Vec<u8>, Vec<(Table, &'static str, Element)>>,
    by_slot: BTreeMap<u16, Vec<(Table, &'static str, Element)>>,
}

impl SeenByOwner {
    fn remove_tap(&mut self, tap: &TapName) -> Elements {
        let named = self.by_name.remove(&table::name_key(tap.as_str())).unwrap_or_default();
        // A bridged tap's slot is known by its gate alone.
        let gate = named
            .iter()
            .find(|(_, set, _)| *set == "vm")
            .and_then(|(_, _, element)| slot_of(element.data.as_ref()?));
        let slot = gate.or_else(|| Some(Slot::of_tap(tap.as_str())?.number()));
        let marked = slot.and_then(|slot| self.by_slot.remove(&slot)).unwrap_or_default();
        let mut all: Elements = Vec::new();
        for (table, set, element) in named.into_iter().chain(marked) {
            match all.iter_mut().find(|(of, name, _)| *of == table && *name == set) {
                Some((_, _, elements)) => elements.push(element),
                None => all.push((table, set, vec![element])),
            }
        }
        // The kernel wants an interval's begin, then its end. Where two meet, one ends before the next begins.
        for (_, _, elements) in &mut all {
            elements.sort_by(|one, other| (&one.key, !one.is_end).cmp(&(&other.key, !other.is_end)));
        }
        all
    }
}

/// The slot in a mark's bytes.
fn slot_of(mark: &[u8]) -> Option<u16> {
    let mark = crate::netlink::read_u32(mark)?;
    u16::try_from(mark >> 16).ok()?.checked_sub(1)
}

fn seen_by_owner(nft: &mut Nft) -> Result<SeenByOwner, Refused> {
    let mut all = SeenByOwner::default();
    for (table, set) in SETS {
        let is_named = set.key.first() == Some(&datatype::IFNAME) && set.name != "bridges";
        let is_marked = set.key.first() == Some(&datatype::MARK);
        if !is_named && !is_marked {
            continue;
        }
        for seen in nft.elements(*table, set.name)? {
            let element = Element {
                key: seen.key.clone(),
                data: seen.data,
                is_end: seen.is_end,
                timeout: None,
                expression: None,
            };
            let entry = (*table, set.name, element);
            if is_named {
                all.by_name
                    .entry(seen.key[..16.min(seen.key.len())].to_vec())
                    .or_default()
                    .push(entry);
            } else if let Some(slot) = slot_of(&seen.key) {
                all.by_slot.entry(slot).or_default().push(entry);
            }
        }
    }
    Ok(all)
}
