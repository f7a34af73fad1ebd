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

mod counters;
mod pins;
mod reclaim;

use pins::Pin;

pub use counters::{Count, Counters};
pub use reclaim::{Proven, Reclaimed};

use crate::{
    elements::{self, Elements},
    links::{Link, Links},
    netlink::Refused,
    netns::{GuestNetns, NetError},
    nft::{Batch, Element, Nft},
    policy::{Policy, PolicyError},
    pool::{Lease, Pool},
    slot::{Place, Slot, TapName, Wiring},
    table::{self, INET},
};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard},
};

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
    /// Of taps and uplink, bytes: the blade's own way out's, for no guest learns a smaller one. 0: the kernel's default.
    pub mtu: u32,
    /// Called after each step.
    pub on_step: fn(Step),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            capacity: 1024,
            has_ipv6: true,
            mtu: 0,
            on_step: |_| {},
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} slots, IPv6 {}", self.capacity, self.has_ipv6)
    }
}

#[derive(Debug)]
struct Attached {
    place: Place,
    policy: Policy,
    generation: u8,
    index: u32,
    lease: Option<Lease>,
    pins: Vec<Pin>,
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
    /// Who is where, for those who must not wait for the kernel: what `state` has attached.
    known: RwLock<BTreeMap<u16, (Place, Policy)>>,
}

impl Network {
    /// The network in a namespace of the guests'. Tables that are there already stay, with all that is in them.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or this process may not.
    pub fn open(netns: GuestNetns, options: Options) -> Result<Self, NetworkError> {
        netns.run_inside(|| crate::netns::set_ipv6(options.has_ipv6))??;
        let state = netns.run_inside(|| Self::state(options))??;
        Ok(Self {
            netns: Some(netns),
            options,
            state: Mutex::new(state),
            known: RwLock::default(),
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
            known: RwLock::default(),
        })
    }

    fn state(options: Options) -> Result<State, NetworkError> {
        let (mut nft, mut links) = (Nft::open()?, Links::open()?);
        // Those of another version go with what is in them: a reclaim adds anew what lives.
        if nft.table_comment(INET)?.as_deref() != Some(table::LAYOUT) {
            nft.commit(table::install())?;
        }
        // What every detach needs, asked for a mark of nobody: a kernel that lacks it is found out before there is a VM.
        nft.forget_connections(table::MARK_OF_NOBODY, table::LASTING)?;
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

    /// As it was opened.
    #[must_use]
    pub fn options(&self) -> Options {
        self.options
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
            && let Err(refused) = state.links.bring_up(index, &attached.place, self.options.mtu)
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
        self.know(attached.place.slot, Some((&attached.place, &attached.policy)));
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
        pins::unpin(nft, attached);
        (attached.policy, attached.generation) = (policy, generation);
        self.know(slot, Some((&attached.place, &attached.policy)));
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
                self.know(slot, None);
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
        state.forget_connections(attached.place.slot)?;
        pins::unpin(&mut state.nft, attached);
        state.remove(attached)?;
        (self.options.on_step)(Step::Unlet);
        Ok(())
    }

    /// Who is where under which policy. Does not wait for the kernel.
    #[must_use]
    pub fn list(&self) -> Vec<(Place, Policy)> {
        self.known().values().cloned().collect()
    }

    /// Who is on a slot under which policy. Does not wait for the kernel.
    #[must_use]
    pub fn of_slot(&self, slot: Slot) -> Option<(Place, Policy)> {
        self.known().get(&slot.number()).cloned()
    }

    /// Slots taken and slots there are.
    #[must_use]
    pub fn use_of_slots(&self) -> (usize, usize) {
        let state = self.lock();
        (state.pool.taken(), state.pool.capacity())
    }

    /// The VM whose slot's address this is. Does not wait for the kernel.
    #[must_use]
    pub fn of_address(&self, address: IpAddr) -> Option<(Place, Policy)> {
        let is_its = |place: &Place| match address {
            IpAddr::V4(address) => place.address == address,
            IpAddr::V6(address) => place.address6 == Some(address),
        };
        self.known().values().find(|(place, _)| is_its(place)).cloned()
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

    fn known(&self) -> RwLockReadGuard<'_, BTreeMap<u16, (Place, Policy)>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn know(&self, slot: Slot, who: Option<(&Place, &Policy)>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        match who {
            Some((place, policy)) => drop(known.insert(slot.number(), (place.clone(), policy.clone()))),
            None => drop(known.remove(&slot.number())),
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

    /// The slot's next VM has the same address and, after a restart, the same marks: nothing that comes for this one may
    /// reach it. While the elements are there, so that a reclaim sees what is left to be done.
    fn forget_connections(&mut self, slot: Slot) -> Result<(), Refused> {
        self.nft
            .forget_connections(elements::mark_of_slot(slot), table::LASTING)
    }

    fn remove(&mut self, attached: &Attached) -> Result<(), NetworkError> {
        let mut batch = Batch::new();
        let mut all = everything(&attached.place, &attached.policy, attached.generation);
        all.reverse();
        delete(&mut batch, &all);
        match self.nft.commit(batch) {
            // Somebody else took some of it away: what is left is found by looking.
            Err(refused) if refused.code() == libc::ENOENT => {
                let (_, left) = reclaim::seen_by_owner(&mut self.nft)?.remove_tap(&attached.place.tap);
                let mut batch = Batch::new();
                delete(&mut batch, &left);
                Ok(self.nft.commit(batch)?)
            }
            other => Ok(other?),
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
