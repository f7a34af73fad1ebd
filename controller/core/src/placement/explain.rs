//! The whole table behind one decision: every blade, every filter, every score.

use super::{
    Placer,
    filters::{self, Cause, Filter},
    request::Request,
    scores::{self, Scores},
    text::{self, Unschedulable},
};

/// What the placer would decide now, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The blade that would be chosen, or what keeps all of them away.
    pub outcome: Result<String, Unschedulable>,
    /// One row per blade, in the order of their names.
    pub rows: Vec<Row>,
}

/// One blade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub blade: String,
    /// Everything that keeps the agent away from it; none: it will do.
    pub causes: Vec<Cause>,
    /// What it is worth, whether it will do or not.
    pub scores: Scores,
}

impl Row {
    /// Whether the blade passes a filter.
    #[must_use]
    pub fn passes(&self, filter: Filter) -> bool {
        self.causes.iter().all(|cause| cause.filter() != filter)
    }
}

impl Placer {
    /// The table behind what [`Placer::place`] would decide now. Nothing is reserved.
    pub fn explain(&mut self, uid: &str, request: &Request) -> Explanation {
        let prepared = self.prepare(request);
        let chosen = self.choose(uid, request, &prepared);
        let mut rows = Vec::with_capacity(self.fleet.known());
        for (number, slot, blade) in self.fleet.blades() {
            let mut causes = Vec::new();
            if request.node_name.as_deref().is_some_and(|name| *name != *slot.name) {
                causes.push(Cause::OtherBladeNamed);
            }
            causes.extend(blade.refusals(request));
            let room = &self.fleet.rooms()[number as usize];
            for cause in filters::lacks(slot, blade, room, request) {
                if !causes.contains(&cause) {
                    causes.push(cause);
                }
            }
            causes.extend(prepared.relations.causes(&self.peers, number));
            causes.extend(self.pool_cause(request));
            if request.avoid.contains(&*slot.name) {
                causes.push(Cause::RefusedLately);
            }
            let passing = self.passing(number, request, &prepared);
            rows.push(Row {
                blade: slot.name.to_string(),
                causes,
                scores: scores::lasting(blade, request).and(passing),
            });
        }
        rows.sort_by(|one, other| one.blade.cmp(&other.blade));
        Explanation {
            outcome: match chosen {
                Some(number) => Ok(self.name(number)),
                None => Err(self.count_causes(request, &prepared)),
            },
            rows,
        }
    }

    /// The full scan: why each blade will not do.
    pub(super) fn count_causes(&self, request: &Request, prepared: &super::Prepared) -> Unschedulable {
        let mut unschedulable = Unschedulable {
            blades: self.fleet.known(),
            causes: std::collections::BTreeMap::new(),
            never: text::never(&self.fleet, request),
        };
        for (number, slot, blade) in self.fleet.blades() {
            for cause in self.causes(number, slot, blade, request, prepared) {
                *unschedulable.causes.entry(cause).or_insert(0) += 1;
            }
        }
        unschedulable
    }
}
