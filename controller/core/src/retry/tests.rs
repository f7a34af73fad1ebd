use proptest::prelude::*;

use super::*;

const ALL: [EndReason; 14] = [
    EndReason::Completed,
    EndReason::Error,
    EndReason::Signal,
    EndReason::OomKilled,
    EndReason::KernelPanic,
    EndReason::BootTimeout,
    EndReason::VmmCrashed,
    EndReason::ImageError,
    EndReason::NetworkError,
    EndReason::DeadlineExceeded,
    EndReason::Evicted,
    EndReason::NodeLost,
    EndReason::BladeRebooted,
    EndReason::InitLost,
];

fn rules(restart: Restart) -> Rules {
    Rules {
        restart,
        now_ms: 1_000_000_000,
        ..Rules::default()
    }
}

/// "final", "agent" or "blade": what one first end of a kind leads to.
fn word(reason: EndReason, had_started: bool, rules: &Rules) -> &'static str {
    match verdict(reason, had_started, Counts::default(), None, rules) {
        Verdict::Final(_) => "final",
        Verdict::Again { counts, .. } if counts.failures == 1 => "agent",
        Verdict::Again { counts, .. } if counts.blade_failures == 1 => "blade",
        Verdict::Again { .. } => "again",
    }
}

#[test]
fn each_end_is_somebodys_failure() {
    for (reason, had_started, on_failure, always) in [
        (EndReason::Completed, true, "final", "again"),
        (EndReason::Error, true, "agent", "agent"),
        (EndReason::Signal, true, "agent", "agent"),
        (EndReason::OomKilled, true, "agent", "agent"),
        (EndReason::KernelPanic, true, "agent", "agent"),
        (EndReason::KernelPanic, false, "blade", "blade"),
        (EndReason::DeadlineExceeded, true, "final", "final"),
        (EndReason::ImageError, false, "blade", "blade"),
        (EndReason::BootTimeout, false, "blade", "blade"),
        (EndReason::VmmCrashed, true, "blade", "blade"),
        (EndReason::InitLost, true, "blade", "blade"),
        (EndReason::NetworkError, false, "blade", "blade"),
        (EndReason::BladeRebooted, true, "blade", "blade"),
        (EndReason::Evicted, true, "blade", "blade"),
        (EndReason::NodeLost, true, "final", "final"),
    ] {
        assert_eq!(
            word(reason, had_started, &rules(Restart::OnFailure)),
            on_failure,
            "{reason:?}"
        );
        assert_eq!(word(reason, had_started, &rules(Restart::Always)), always, "{reason:?}");
        assert_eq!(word(reason, had_started, &rules(Restart::Never)), "final", "{reason:?}");
    }
}

#[test]
fn a_lost_blade_is_ruled_by_the_lost_policy_alone() {
    for restart in [Restart::Never, Restart::OnFailure, Restart::Always] {
        let rules = Rules {
            reschedules: true,
            ..rules(restart)
        };
        assert_eq!(word(EndReason::NodeLost, true, &rules), "blade");
    }
}

#[test]
fn waits_double_from_10_s_to_5_min_and_end_with_the_backoff_limit() {
    let rules = rules(Restart::OnFailure);
    let mut counts = Counts::default();
    let mut waits = Vec::new();
    while let Verdict::Again { counts: next, at } = verdict(EndReason::Error, true, counts, None, &rules) {
        waits.push(at - rules.now());
        counts = next;
    }
    assert_eq!(waits, [10, 20, 40, 80, 160, 300]);
    let last = verdict(EndReason::Error, true, counts, None, &rules);
    assert!(
        matches!(&last, Verdict::Final(Some(text)) if text.contains("spec.backoffLimit")),
        "{last:?}"
    );
    assert!(
        matches!(
            verdict(EndReason::InitLost, true, counts, None, &rules),
            Verdict::Again { .. }
        ),
        "failures of blades have their own limit"
    );
}

#[test]
fn blades_may_fail_an_agent_20_times_in_10_minutes_and_again_after_that() {
    let mut rules = rules(Restart::OnFailure);
    let mut counts = Counts::default();
    let begun = rules.now();
    let mut again = 0;
    while let Verdict::Again { counts: next, at } = verdict(EndReason::BootTimeout, false, counts, None, &rules) {
        (counts, again) = (next, again + 1);
        rules.now_ms = at * 1000;
    }
    assert_eq!(again, MAX_BLADE_FAILURES);
    assert!(
        rules.now() - begun < BLADE_FAILURES_WITHIN,
        "the cap is reached while it counts"
    );
    rules.now_ms = (begun + BLADE_FAILURES_WITHIN) * 1000;
    assert!(matches!(
        verdict(EndReason::BootTimeout, false, counts, None, &rules),
        Verdict::Again {
            counts: Counts { blade_failures: 1, .. },
            ..
        }
    ));
}

#[test]
fn no_attempt_begins_after_the_deadline_of_all_attempts() {
    let rules = Rules {
        deadline_s: Some(60),
        ..rules(Restart::OnFailure)
    };
    let of = |since| verdict(EndReason::Error, true, Counts::default(), Some(since), &rules);
    assert!(matches!(of(rules.now() - 49), Verdict::Again { .. }));
    assert!(matches!(of(rules.now() - 50), Verdict::Final(Some(_))));
    assert_eq!(rules.deadline_left(Some(rules.now() - 50)), Some(10));
    assert_eq!(
        rules.deadline_left(Some(rules.now() + 50)),
        Some(60),
        "a clock that jumped gives no more than there is"
    );
}

proptest! {
    /// Whatever ends come in whatever order, and however the clock jumps: no agent is tried for ever without a pause.
    #[test]
    fn every_retry_is_counted_or_paced(
        ends in proptest::collection::vec((0_usize..14, any::<bool>(), 0_i64..120_000), 1..200),
        limit in 0_u32..10,
        reschedules: bool,
    ) {
        let mut rules = Rules { backoff_limit: limit, reschedules, ..rules(Restart::Always) };
        let mut counts = Counts::default();
        for (reason, had_started, passed) in ends {
            rules.now_ms += passed;
            let Verdict::Again { counts: next, at } = verdict(ALL[reason], had_started, counts, None, &rules) else { break };
            prop_assert!(at > rules.now() || rules.now_ms % 1000 != 0);
            prop_assert!(at - rules.now() <= 301);
            prop_assert!(next.failures <= limit && next.blade_failures <= MAX_BLADE_FAILURES);
            counts = next;
        }
    }
}
