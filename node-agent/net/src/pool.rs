//! Which slots are free. Hand-out and return are O(1); a slot that came back is handed out last, so that late packets
//! of its former connections meet nobody.

use crate::slot::{MAX_SLOTS, Slot};
use std::collections::VecDeque;

/// A slot that is somebody's. There is one of it at most; it is given back by value.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a lease that is dropped keeps its slot taken"]
pub struct Lease {
    slot: Slot,
}

impl Lease {
    /// Its slot.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.slot
    }
}

/// The slots 0 to `capacity` - 1.
#[derive(Debug)]
pub struct Pool {
    is_taken: Vec<bool>,
    /// Free slots in the order they are handed out; what was adopted meanwhile is skipped.
    free: VecDeque<u16>,
    taken: usize,
}

impl Pool {
    /// All free; more than [`MAX_SLOTS`] are not possible.
    #[must_use]
    pub fn new(capacity: u16) -> Self {
        let capacity = capacity.min(MAX_SLOTS);
        Self {
            is_taken: vec![false; capacity.into()],
            free: (0..capacity).collect(),
            taken: 0,
        }
    }

    /// A free slot; `None` when all are taken.
    pub fn take(&mut self) -> Option<Lease> {
        while let Some(number) = self.free.pop_front() {
            if let Some(lease) = Slot::new(number).and_then(|slot| self.adopt(slot)) {
                return Some(lease);
            }
        }
        None
    }

    /// This very slot, as a ledger proves it; `None` if it is taken or beyond the capacity.
    pub fn adopt(&mut self, slot: Slot) -> Option<Lease> {
        let is_taken = self.is_taken.get_mut(usize::from(slot.number()))?;
        if std::mem::replace(is_taken, true) {
            return None;
        }
        self.taken += 1;
        Some(Lease { slot })
    }

    /// Free again.
    pub fn give_back(&mut self, lease: Lease) {
        let number = lease.slot.number();
        // A lease of another pool may be beyond this one's slots, or of a slot that is free here.
        if let Some(is_taken) = self.is_taken.get_mut(usize::from(number))
            && std::mem::replace(is_taken, false)
        {
            self.taken -= 1;
            self.free.push_back(number);
        }
    }

    /// Slots that are somebody's.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// All slots.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.is_taken.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Debug, Clone)]
    enum Act {
        Take,
        Adopt(u16),
        GiveBack(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            3 => Just(Act::Take),
            1 => (0_u16..12).prop_map(Act::Adopt),
            3 => any::<usize>().prop_map(Act::GiveBack),
        ]
    }

    proptest! {
        #[test]
        fn a_slot_is_never_handed_out_twice_and_none_is_lost(
            capacity in 0_u16..10,
            acts in prop::collection::vec(act(), 0..200),
        ) {
            let mut pool = Pool::new(capacity);
            // The model: who holds what.
            let mut held: Vec<Lease> = Vec::new();
            for act in acts {
                let numbers: BTreeSet<u16> = held.iter().map(|lease| lease.slot().number()).collect();
                match act {
                    Act::Take => match pool.take() {
                        Some(lease) => {
                            let number = lease.slot().number();
                            prop_assert!(number < capacity && !numbers.contains(&number));
                            held.push(lease);
                        }
                        None => prop_assert_eq!(numbers.len(), usize::from(capacity)),
                    },
                    Act::Adopt(number) => {
                        let lease = pool.adopt(Slot::new(number).unwrap());
                        prop_assert_eq!(lease.is_some(), number < capacity && !numbers.contains(&number));
                        held.extend(lease);
                    }
                    Act::GiveBack(which) if !held.is_empty() => {
                        let lease = held.swap_remove(which % held.len());
                        pool.give_back(lease);
                    }
                    Act::GiveBack(_) => {}
                }
                prop_assert_eq!(pool.taken(), held.len());
            }
            while let Some(lease) = pool.take() {
                held.push(lease);
            }
            let numbers: BTreeSet<u16> = held.iter().map(|lease| lease.slot().number()).collect();
            prop_assert_eq!(numbers, (0..capacity).collect::<BTreeSet<u16>>());
            prop_assert_eq!(held.len(), usize::from(capacity));
        }
    }

    #[test]
    fn a_slot_that_came_back_waits_behind_all_others() {
        let mut pool = Pool::new(3);
        let first = pool.take().unwrap();
        pool.give_back(first);
        let order: Vec<u16> = std::iter::from_fn(|| pool.take())
            .map(|lease| lease.slot().number())
            .collect();
        assert_eq!(order, [1, 2, 0]);
    }
}
