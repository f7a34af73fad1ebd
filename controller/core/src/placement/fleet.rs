//! The blades in numbered slots, and how much of each is reserved.
//!
//! A slot lives as long as its blade is known or something is reserved on it, and its number is used again afterwards.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{blade::Blade, request::Request};

/// What reservations take of one blade, without overheads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) cpu_millis: u64,
    pub(super) memory_mib: u64,
    pub(super) vms: u32,
    /// Of `vms`, those that are not up yet.
    pub(super) starts: u32,
    pub(super) extended: BTreeMap<String, u64>,
}

/// One blade: known, or only reserved on.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: Arc<str>,
    pub(super) blade: Option<Blade>,
    pub(super) used: Used,
    /// Failures of the last minutes.
    pub(super) failures: u32,
}

/// What is free on one blade for one more agent, compact because the index looks at many of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Room {
    /// Free.
    pub(super) cpu_millis: u64,
    /// Free; the overhead of the next microVM is taken off.
    pub(super) memory_mib: u64,
    /// Free and reserved.
    pub(super) all_cpu_millis: u64,
    pub(super) all_memory_mib: u64,
    /// Mean free share of CPU and memory, thousandths.
    pub(super) free_share: u16,
    pub(super) failures: u16,
    /// Whether there is memory for the next microVM's overhead.
    pub(super) has_overhead: bool,
    /// Whether the counts of microVMs and of starts allow one more.
    pub(super) is_open: bool,
}

impl Room {
    pub(super) fn fits(&self, request: &Request) -> bool {
        self.holds(request.cpu_millis, request.memory_mib)
    }

    pub(super) fn holds(&self, cpu_millis: u64, memory_mib: u64) -> bool {
        self.is_open && self.has_overhead && cpu_millis <= self.cpu_millis && memory_mib <= self.memory_mib
    }
}

#[derive(Debug, Default)]
pub(super) struct Fleet {
    numbers: HashMap<Arc<str>, u32>,
    slots: Vec<Option<Slot>>,
    rooms: Vec<Room>,
    vacant: Vec<u32>,
    /// Known blades.
    known: usize,
    /// On how many blades an image is.
    images: HashMap<String, u32>,
}

impl Fleet {
    pub(super) fn known(&self) -> usize {
        self.known
    }

    /// Slot numbers are below this.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn number(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    pub(super) fn slot(&self, number: u32) -> Option<&Slot> {
        self.slots.get(number as usize)?.as_ref()
    }

    /// The blade in a slot, where it is known.
    pub(super) fn blade(&self, number: u32) -> Option<(&Slot, &Blade)> {
        let slot = self.slot(number)?;
        Some((slot, slot.blade.as_ref()?))
    }

    /// Every known blade with its number.
    pub(super) fn blades(&self) -> impl Iterator<Item = (u32, &Slot, &Blade)> {
        let numbered = (0_u32..).zip(&self.slots);
        numbered.filter_map(|(number, slot)| {
            let slot = slot.as_ref()?;
            Some((number, slot, slot.blade.as_ref()?))
        })
    }

    pub(super) fn rooms(&self) -> &[Room] {
        &self.rooms
    }

    /// Whether any blade has the image: where none has it, it tells no blades apart.
    pub(super) fn has_image(&self, image: &str) -> bool {
        self.images.contains_key(image)
    }

    /// The slot of this name, made where there is none.
    pub(super) fn enter(&mut self, name: &str) -> u32 {
        if let Some(number) = self.number(name) {
            return number;
        }
        let name: Arc<str> = name.into();
        let slot = Slot {
            name: name.clone(),
            blade: None,
            used: Used::default(),
            failures: 0,
        };
        let number = match self.vacant.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(slot);
                number
            }
            None => {
                self.slots.push(Some(slot));
                self.rooms.push(Room::default());
                u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 blades")
            }
        };
        self.numbers.insert(name, number);
        number
    }

    /// Replaces what is known of the blade.
    pub(super) fn set_blade(&mut self, number: u32, blade: Option<Blade>) {
        let Some(slot) = self.slots[number as usize].as_mut() else {
            return;
        };
        for image in slot.blade.iter().flat_map(|blade| blade.images.keys()) {
            if let Some(count) = self.images.get_mut(image) {
                *count -= 1;
                if *count == 0 {
                    self.images.remove(image);
                }
            }
        }
        for image in blade.iter().flat_map(|blade| blade.images.keys()) {
            *self.images.entry(image.clone()).or_insert(0) += 1;
        }
        self.known += usize::from(blade.is_some());
        self.known -= usize::from(slot.blade.is_some());
        slot.blade = blade;
        self.refresh(number);
    }

    /// Changes what is reserved, or how often the blade failed.
    pub(super) fn change(&mut self, number: u32, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.slots[number as usize].as_mut() {
            change(slot);
            self.refresh(number);
        }
    }

    fn refresh(&mut self, number: u32) {
        let place = &mut self.slots[number as usize];
        let Some(slot) = place else { return };
        let Some(blade) = &slot.blade else {
            self.rooms[number as usize] = Room::default();
            if slot.used == Used::default() {
                self.numbers.remove(&slot.name);
                *place = None;
                self.vacant.push(number);
            }
            return;
        };
        self.rooms[number as usize] = room(blade, &slot.used, slot.failures);
    }
}

fn room(blade: &Blade, used: &Used, failures: u32) -> Room {
    let (cpu_room, memory_room) = (blade.cpu_room(), blade.memory_room());
    let overheads = blade.overhead_mib.saturating_mul(u64::from(used.vms));
    let cpu_millis = cpu_room.saturating_sub(used.cpu_millis);
    let memory_free = memory_room.saturating_sub(used.memory_mib.saturating_add(overheads));
    let is_open =
        (blade.max_vms == 0 || used.vms < blade.max_vms) && (blade.max_starts == 0 || used.starts < blade.max_starts);
    let memory_mib = memory_free.saturating_sub(blade.overhead_mib);
    Room {
        cpu_millis,
        memory_mib,
        all_cpu_millis: cpu_room,
        all_memory_mib: memory_room,
        free_share: u16::midpoint(share(cpu_millis, cpu_room), share(memory_mib, memory_room)),
        failures: u16::try_from(failures).unwrap_or(u16::MAX),
        has_overhead: memory_free >= blade.overhead_mib,
        is_open,
    }
}

/// `part` of `whole` in thousandths, 0 to 1000.
pub(super) fn share(part: u64, whole: u64) -> u16 {
    let thousandths = part.saturating_mul(1000) / whole.max(1);
    u16::try_from(thousandths.min(1000)).unwrap_or(1000)
}
