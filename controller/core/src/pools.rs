//! How many agents a pool keeps warm, which it makes and removes, and which one is handed out. Pure.
//!
//! Invariant: an agent that somebody takes over is never removed by its pool.

/// Where an agent of a pool stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stand {
    /// It is being placed or booted.
    Coming,
    /// It can be handed out.
    Warm,
    /// An agent takes it over.
    Taken,
    /// It ended, or its blade is lost.
    Over,
    /// Its microVM is another agent's, and who took it over could not remove it.
    Spent,
    /// It was told to go.
    Leaving,
}

/// One agent of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its uid.
    pub uid: String,
    /// Where it stands.
    pub stand: Stand,
    /// It is of the pool's template as that is now.
    pub is_current: bool,
    /// Seconds since the Unix epoch.
    pub created: i64,
}

/// Bounds of a pool that follows demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Autoscale {
    /// Fewest, also when idle.
    pub min: u32,
    /// Most.
    pub max: u32,
    /// To have beyond the demand of the last minute.
    pub target_idle: u32,
    /// Seconds without demand until the pool goes down to `min`.
    pub idle_after_s: u64,
}

/// What a pool was asked for in the last time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// Agents that asked for a warm one in the last minute, whether they got one or not.
    pub last_minute: u32,
    /// Seconds since the last of them, or since the pool was made.
    pub idle_s: u64,
    /// Somebody asked since the pool was made.
    pub was_asked: bool,
}

/// How many agents are to be warm now.
#[must_use]
pub fn wanted(replicas: u32, autoscale: Option<Autoscale>, demand: Demand) -> u32 {
    let Some(scale) = autoscale else { return replicas };
    let most = scale.max.max(scale.min);
    if demand.idle_s >= scale.idle_after_s {
        return scale.min;
    }
    let by_demand = demand.last_minute.saturating_add(scale.target_idle);
    let begin = if demand.was_asked { 0 } else { replicas };
    by_demand.max(begin).clamp(scale.min, most)
}

/// What a pool does next.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Agents to make.
    pub create: u32,
    /// Agents to remove, by uid.
    pub remove: Vec<String>,
}

/// Steps from `members` to `wanted` warm agents; `replace` removes those of an older template too.
#[must_use]
pub fn plan(members: &[Member], wanted: u32, replace: bool) -> Plan {
    let (mut keep, mut plan) = (Vec::new(), Plan::default());
    for member in members {
        match member.stand {
            Stand::Over | Stand::Spent => plan.remove.push(member.uid.clone()),
            Stand::Taken | Stand::Leaving => {}
            Stand::Coming | Stand::Warm if replace && !member.is_current => plan.remove.push(member.uid.clone()),
            Stand::Coming | Stand::Warm => keep.push(member),
        }
    }
    let wanted = wanted as usize;
    // The old template's first, then those that cost least to lose.
    keep.sort_by_key(|member| {
        (
            !member.is_current,
            member.stand == Stand::Coming,
            member.created,
            &member.uid,
        )
    });
    plan.remove
        .extend(keep.iter().skip(wanted).map(|member| member.uid.clone()));
    plan.create = u32::try_from(wanted.saturating_sub(keep.len())).unwrap_or(u32::MAX);
    plan
}

/// Which of several warm agents is handed out: of the old template before the new one, then the one that waits longest.
/// `candidates`: (is current, seconds since the epoch of its creation, uid).
#[must_use]
pub fn hand_out(candidates: impl IntoIterator<Item = (bool, i64, String)>) -> Option<String> {
    candidates.into_iter().min().map(|(_, _, uid)| uid)
}

/// Seconds until agents are made again after `failures` in a row that never became warm.
#[must_use]
pub fn backoff_s(failures: u32) -> u64 {
    match failures {
        0 => 0,
        n => (1_u64 << n.min(9)).min(300),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scale(min: u32, max: u32) -> Option<Autoscale> {
        Some(Autoscale {
            min,
            max,
            target_idle: 2,
            idle_after_s: 300,
        })
    }

    fn demand(last_minute: u32, idle_s: u64, was_asked: bool) -> Demand {
        Demand {
            last_minute,
            idle_s,
            was_asked,
        }
    }

    #[test]
    fn a_pool_follows_demand_between_its_bounds_and_down_to_none_when_idle() {
        let cases = [
            ("fixed", 3, None, demand(50, 0, true), 3),
            ("fixed and idle", 3, None, demand(0, 9999, true), 3),
            ("begins with replicas", 3, scale(0, 10), demand(0, 0, false), 3),
            ("replicas above max", 30, scale(0, 10), demand(0, 0, false), 10),
            ("never asked, idle", 3, scale(0, 10), demand(0, 300, false), 0),
            ("demand and a reserve", 3, scale(0, 10), demand(4, 1, true), 6),
            ("no more than max", 3, scale(0, 10), demand(40, 1, true), 10),
            ("quiet minute: the reserve", 3, scale(0, 10), demand(0, 61, true), 2),
            ("quiet minute: min", 3, scale(4, 10), demand(0, 61, true), 4),
            ("idle: none", 3, scale(0, 10), demand(0, 300, true), 0),
            ("idle: min", 3, scale(1, 10), demand(0, 300, true), 1),
            ("from none by one claim", 0, scale(0, 10), demand(1, 0, true), 3),
            ("no overflow", 0, scale(0, 10), demand(u32::MAX, 0, true), 10),
        ];
        for (why, replicas, autoscale, demand, expected) in cases {
            assert_eq!(wanted(replicas, autoscale, demand), expected, "{why}");
        }
    }

    fn member(uid: &str, stand: Stand, is_current: bool, created: i64) -> Member {
        Member {
            uid: uid.to_owned(),
            stand,
            is_current,
            created,
        }
    }

    #[test]
    fn what_is_made_and_removed() {
        use Stand::{Coming, Leaving, Over, Spent, Taken, Warm};
        type Case = (&'static str, Vec<Member>, u32, bool, u32, &'static [&'static str]);
        let cases: [Case; 8] = [
            (
                "one that was taken and left behind goes",
                vec![member("a", Spent, true, 1), member("b", Warm, true, 1)],
                1,
                false,
                0,
                &["a"],
            ),
            ("empty", vec![], 2, false, 2, &[]),
            (
                "enough",
                vec![member("a", Warm, true, 1), member("b", Coming, true, 2)],
                2,
                false,
                0,
                &[],
            ),
            (
                "taken ones do not count and stay",
                vec![member("a", Taken, true, 1)],
                1,
                true,
                1,
                &[],
            ),
            (
                "leaving ones do not count",
                vec![member("a", Leaving, true, 1)],
                1,
                false,
                1,
                &[],
            ),
            (
                "ended ones are replaced",
                vec![member("a", Over, true, 1)],
                1,
                false,
                1,
                &["a"],
            ),
            (
                "too many: old template, then not warm yet, then the youngest",
                vec![
                    member("a", Warm, true, 1),
                    member("b", Warm, true, 2),
                    member("c", Coming, true, 0),
                    member("d", Warm, false, 0),
                ],
                1,
                false,
                0,
                &["b", "c", "d"],
            ),
            (
                "replace",
                vec![member("a", Warm, false, 1), member("b", Warm, true, 2)],
                2,
                true,
                1,
                &["a"],
            ),
        ];
        for (why, members, wanted, replace, create, remove) in cases {
            let plan = plan(&members, wanted, replace);
            assert_eq!(
                (plan.create, plan.remove),
                (create, remove.iter().map(|uid| (*uid).to_owned()).collect()),
                "{why}"
            );
        }
    }

    #[test]
    fn the_one_that_waits_longest_goes_first_and_old_templates_before_it() {
        let one = |current, created, uid: &str| (current, created, uid.to_owned());
        assert_eq!(hand_out([]), None);
        assert_eq!(hand_out([one(true, 1, "a"), one(true, 0, "b")]).as_deref(), Some("b"));
        assert_eq!(hand_out([one(true, 0, "a"), one(false, 5, "b")]).as_deref(), Some("b"));
    }

    #[test]
    fn agents_that_never_become_warm_are_made_ever_more_slowly() {
        assert_eq!([0, 1, 2, 8, 9, 100].map(backoff_s), [0, 2, 4, 256, 300, 300]);
    }

    fn any_member() -> impl Strategy<Value = (Stand, bool, i64)> {
        let stand = prop_oneof![
            Just(Stand::Coming),
            Just(Stand::Warm),
            Just(Stand::Taken),
            Just(Stand::Over),
            Just(Stand::Spent),
            Just(Stand::Leaving)
        ];
        (stand, any::<bool>(), 0..50_i64)
    }

    proptest! {
        #[test]
        fn applying_the_plan_reaches_what_is_wanted_and_planning_again_is_empty(
            seen in prop::collection::vec(any_member(), 0..20), wanted in 0..20_u32, replace in any::<bool>()
        ) {
            let mut members: Vec<Member> = (0..).zip(seen)
                .map(|(n, (stand, current, created)): (usize, _)| member(&format!("m{n}"), stand, current, created))
                .collect();
            let first = plan(&members, wanted, replace);
            for uid in &first.remove {
                let one = members.iter_mut().find(|member| member.uid == *uid).unwrap();
                prop_assert!(!matches!(one.stand, Stand::Taken | Stand::Leaving));
                one.stand = Stand::Leaving;
            }
            for n in 0..first.create {
                members.push(member(&format!("new{n}"), Stand::Coming, true, 99));
            }
            let ready = members.iter().filter(|member| matches!(member.stand, Stand::Coming | Stand::Warm)).count();
            prop_assert_eq!(ready, wanted as usize);
            prop_assert_eq!(plan(&members, wanted, replace), Plan::default());
        }
    }
}
