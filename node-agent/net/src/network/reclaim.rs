//! After a restart: what the kernel still holds is brought in line with what a ledger proves.

use super::{Attached, Network, NetworkError, State, add, delete, everything, pins::Pin};
use crate::{
    elements::Elements,
    links::Link,
    netlink::Refused,
    nft::{Batch, Element, Family, Nft, Table, datatype},
    policy::Policy,
    slot::{Place, Slot, TapName, Wiring},
    table::{self, sets},
};
use std::collections::{BTreeMap, BTreeSet};

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

impl Network {
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
            let (slot, elements) = seen.remove_tap(tap);
            if let Some(slot) = slot.filter(|_| is_up || !elements.is_empty()) {
                state.forget_connections(slot)?;
            }
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
            if self.adopt(&mut state, place, policy, &links, seen.remove_tap(&place.tap).1)? {
                done.adopted += 1;
            }
        }
        Ok(done)
    }

    /// Makes the kernel hold exactly what a live VM is to have, whatever it holds. Its counters go on; where nothing is
    /// amiss, so do its connections and pins.
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
            state.forget_connections(place.slot)?;
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
            .and_then(|(_, _, of)| of.first()?.data.as_ref()?.get(1).copied());
        if let (Some(old), Some(next)) = (gate, state.generations.get_mut(usize::from(place.slot.number()))) {
            *next = old;
        }
        let (counters, rest): (Elements, Elements) = seen.into_iter().partition(|(_, set, _)| is_counter(set));
        let (pins, old): (Elements, Elements) = rest.into_iter().partition(|(_, set, _)| is_pin(set));
        // A name has no element of its own: its pins say whether it is still the policy's.
        let mut names = pins.iter().flat_map(|(_, _, of)| of).map(|pin| pin.comment.as_deref());
        let are_names_right = names.all(|name| {
            let name = name.and_then(|name| name.parse().ok());
            name.is_some_and(|name| policy.rules_for_name(&name).next().is_some())
        });
        let is_right = |generation: &u8| are_names_right && keys(&everything(place, policy, *generation)) == keys(&old);
        let kept = gate.filter(is_right);
        let generation = kept.unwrap_or_else(|| state.next_generation(place.slot));
        let counted: BTreeSet<(Family, &str)> = counters.iter().map(|(table, set, _)| (table.family, *set)).collect();
        let mut batch = Batch::new();
        let mut new = everything(place, policy, generation);
        new.retain(|(table, set, _)| {
            if is_counter(set) {
                !counted.contains(&(table.family, *set))
            } else {
                kept.is_none()
            }
        });
        if kept.is_none() {
            delete(&mut batch, &pins);
            delete(&mut batch, &old);
        }
        add(&mut batch, &new);
        state.nft.commit(batch)?;
        match place.wiring {
            Wiring::Routed => state.links.bring_up(link.index, place, self.options.mtu)?,
            Wiring::Bridged => state.links.isolate(link.index, &link.name)?,
        }
        let attached = Attached {
            place: place.clone(),
            policy: policy.clone(),
            generation,
            index: link.index,
            lease: Some(lease),
            pins: match kept {
                Some(_) => pins
                    .into_iter()
                    .flat_map(|(_, set, of)| of.into_iter().map(move |pin| Pin::adopted(set, pin.key)))
                    .collect(),
                None => Vec::new(),
            },
        };
        self.know(place.slot, Some((place, policy)));
        state.attached.insert(place.slot.number(), attached);
        Ok(true)
    }
}

fn is_counter(set: &str) -> bool {
    ["sent", "received", "spoofed", "limited", "denied"].contains(&set)
}

fn is_pin(set: &str) -> bool {
    ["pins4", "pins6"].contains(&set)
}

/// What of elements the kernel tells again, without counters: limits and time left are not compared.
fn keys(elements: &Elements) -> BTreeSet<(Table, &'static str, Element)> {
    let bare = |one: &Element| Element {
        data: one.data.clone(),
        is_end: one.is_end,
        ..Element::of(one.key.clone())
    };
    let others = elements.iter().filter(|(_, set, _)| !is_counter(set));
    others
        .flat_map(|(table, set, of)| of.iter().map(move |one| (*table, *set, bare(one))))
        .collect()
}

/// All per-VM elements of the kernel, by the tap's name or by the mark's slot.
#[derive(Debug, Default)]
pub(super) struct SeenByOwner {
    by_name: BTreeMap<Vec<u8>, Vec<(Table, &'static str, Element)>>,
    by_slot: BTreeMap<u16, Vec<(Table, &'static str, Element)>>,
}

impl SeenByOwner {
    /// The tap's slot, where it is known, and its elements.
    pub(super) fn remove_tap(&mut self, tap: &TapName) -> (Option<Slot>, Elements) {
        let named = self.by_name.remove(&table::name_key(tap.as_str())).unwrap_or_default();
        // A bridged tap's slot is known by its gate alone.
        let gate = named
            .iter()
            .find(|(_, set, _)| *set == "vm")
            .and_then(|(_, _, element)| slot_of(element.data.as_ref()?));
        let slot = gate.and_then(Slot::new).or_else(|| Slot::of_tap(tap.as_str()));
        let marked = slot
            .and_then(|slot| self.by_slot.remove(&slot.number()))
            .unwrap_or_default();
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
        (slot, all)
    }
}

/// The slot in a mark's bytes.
fn slot_of(mark: &[u8]) -> Option<u16> {
    let mark = crate::netlink::read_u32(mark)?;
    u16::try_from(mark >> 16).ok()?.checked_sub(1)
}

pub(super) fn seen_by_owner(nft: &mut Nft) -> Result<SeenByOwner, Refused> {
    let mut all = SeenByOwner::default();
    for (table, set) in sets() {
        let is_named = set.key.first() == Some(&datatype::IFNAME) && set.name != "bridges";
        let is_marked = set.key.first() == Some(&datatype::MARK) && set.name != table::SHARD_MAP;
        if !is_named && !is_marked {
            continue;
        }
        for seen in nft.elements(*table, set.name)? {
            let element = Element {
                key: seen.key.clone(),
                data: seen.data,
                is_end: seen.is_end,
                comment: seen.comment,
                ..Element::of(Vec::new())
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
