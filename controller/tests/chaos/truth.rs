//! What really happened, as only the test can know: it is every blade at once.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Mutex, MutexGuard},
};

use far_proto::node::EndReason;

/// Identity of a boot.
pub type Key = (String, u32);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    pub blade: String,
    pub reason: EndReason,
    pub exit_code: Option<i32>,
}

#[derive(Default)]
pub struct Facts {
    pub boots: HashMap<Key, u32>,
    pub live: HashMap<String, BTreeSet<(u32, String)>>,
    pub ended: HashMap<Key, Ended>,
    pub violations: Vec<String>,
    pub counted: BTreeMap<&'static str, u64>,
}

#[derive(Default)]
pub struct Truth(Mutex<Facts>);

impl Truth {
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap()
    }

    pub fn count(&self, what: &'static str) {
        *self.facts().counted.entry(what).or_default() += 1;
    }

    /// A blade takes an attempt: from now on its microVM may run.
    pub fn booted(&self, key: &Key, blade: &str) {
        let mut facts = self.facts();
        let boots = facts.boots.entry(key.clone()).or_default();
        *boots += 1;
        if *boots > 1 {
            facts.violations.push(format!("{key:?} booted again on {blade}"));
        }
        let live = facts.live.entry(key.0.clone()).or_default();
        live.insert((key.1, blade.to_owned()));
        if live.len() > 1 {
            let text = format!("two live attempts of {}: {live:?}", key.0);
            facts.violations.push(text);
        }
    }

    pub fn ended(&self, key: &Key, blade: &str, reason: EndReason, exit_code: Option<i32>) {
        let mut facts = self.facts();
        if let Some(live) = facts.live.get_mut(&key.0) {
            live.remove(&(key.1, blade.to_owned()));
            if live.is_empty() {
                facts.live.remove(&key.0);
            }
        }
        let end = Ended {
            blade: blade.to_owned(),
            reason,
            exit_code,
        };
        facts.ended.insert(key.clone(), end);
    }
}
