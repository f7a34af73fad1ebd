//! When an agent has to leave a blade because of its taints with effect NoExecute, as pods leave Nodes.

use std::time::Duration;

use crate::placement::{Effect, Taint, Toleration};

/// A toleration, and for how long it holds for agents that run already; `None`: for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patience {
    /// Which taints are meant.
    pub toleration: Toleration,
    /// `tolerationSeconds`.
    pub seconds: Option<u32>,
}

/// How long after its blade got these taints an agent may stay. `None`: for ever. Each taint comes with when the blade
/// got it, on the same clock as the answer.
#[must_use]
pub fn leaves_at(taints: &[(Taint, Duration)], patience: &[Patience]) -> Option<Duration> {
    let times = taints.iter().filter(|(taint, _)| taint.effect == Effect::NoExecute);
    times
        .filter_map(|(taint, since)| {
            let mut bears = patience.iter().filter(|one| one.toleration.tolerates(taint)).peekable();
            if bears.peek().is_none() {
                return Some(*since);
            }
            // Where several are meant, the shortest that is one.
            let seconds = bears.filter_map(|one| one.seconds).min()?;
            Some(*since + Duration::from_secs(seconds.into()))
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(key: &str, effect: Effect, since: u64) -> (Taint, Duration) {
        let taint = Taint {
            key: key.into(),
            value: String::new(),
            effect,
        };
        (taint, Duration::from_secs(since))
    }

    fn bears(key: &str, seconds: Option<u32>) -> Patience {
        Patience {
            toleration: Toleration {
                key: Some(key.into()),
                ..Toleration::default()
            },
            seconds,
        }
    }

    #[test]
    fn only_taints_that_are_not_borne_or_no_longer_make_an_agent_leave() {
        let broken = taint("broken", Effect::NoExecute, 100);
        for (why, taints, patience, expected) in [
            ("no taints", vec![], vec![], None),
            (
                "it keeps others away only",
                vec![taint("a", Effect::NoSchedule, 1)],
                vec![],
                None,
            ),
            ("not borne", vec![broken.clone()], vec![], Some(100)),
            (
                "another is borne",
                vec![broken.clone()],
                vec![bears("other", None)],
                Some(100),
            ),
            (
                "borne for ever",
                vec![broken.clone()],
                vec![bears("broken", None)],
                None,
            ),
            (
                "borne for a while",
                vec![broken.clone()],
                vec![bears("broken", Some(30))],
                Some(130),
            ),
            (
                "not at all",
                vec![broken.clone()],
                vec![bears("broken", Some(0))],
                Some(100),
            ),
            (
                "the shortest of several",
                vec![broken.clone()],
                vec![
                    bears("broken", None),
                    bears("broken", Some(50)),
                    bears("broken", Some(20)),
                ],
                Some(120),
            ),
            (
                "the first of several taints",
                vec![broken.clone(), taint("hot", Effect::NoExecute, 90)],
                vec![bears("broken", Some(5)), bears("hot", Some(60))],
                Some(105),
            ),
        ] {
            assert_eq!(leaves_at(&taints, &patience).map(|at| at.as_secs()), expected, "{why}");
        }
    }
}
