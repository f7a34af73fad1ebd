//! What was answered a moment ago: bounded in number and in age.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    time::{Duration, Instant},
};

#[derive(Debug)]
pub(super) struct Recent<K, V> {
    life: Duration,
    most: usize,
    answers: HashMap<K, (V, Instant)>,
    /// In order of age; an entry that was replaced is older here than in the map.
    ages: VecDeque<(K, Instant)>,
}

impl<K: Hash + Eq + Clone, V: Clone> Recent<K, V> {
    pub(super) fn new(life: Duration, most: usize) -> Self {
        Self {
            life,
            most,
            answers: HashMap::new(),
            ages: VecDeque::new(),
        }
    }

    pub(super) fn get(&self, key: &K, now: Instant) -> Option<V> {
        let (value, at) = self.answers.get(key)?;
        (now.duration_since(*at) < self.life).then(|| value.clone())
    }

    pub(super) fn put(&mut self, key: K, value: V, now: Instant) {
        while self
            .ages
            .front()
            .is_some_and(|(_, at)| self.ages.len() >= self.most || now.duration_since(*at) >= self.life)
        {
            let Some((oldest, at)) = self.ages.pop_front() else {
                break;
            };
            if self.answers.get(&oldest).is_some_and(|(_, current)| *current == at) {
                self.answers.remove(&oldest);
            }
        }
        self.answers.insert(key.clone(), (value, now));
        self.ages.push_back((key, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_forgotten_by_age_and_by_number() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut recent = Recent::new(Duration::from_secs(10), 2);
        recent.put("a", 1, at(0));
        assert_eq!((recent.get(&"a", at(9)), recent.get(&"a", at(10))), (Some(1), None));
        recent.put("a", 2, at(5));
        assert_eq!(recent.get(&"a", at(14)), Some(2), "the newer one counts");
        recent.put("b", 3, at(6));
        recent.put("c", 4, at(7));
        assert_eq!((recent.get(&"a", at(7)), recent.get(&"c", at(7))), (None, Some(4)));
        for n in 0..1000 {
            recent.put("d", n, at(8));
        }
        assert!(recent.answers.len() <= 2 && recent.ages.len() <= 2);
        recent.put("e", 0, at(100));
        assert_eq!(recent.answers.len(), 1, "what is too old goes with the next answer");
    }
}
