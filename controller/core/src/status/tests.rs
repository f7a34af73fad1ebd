use proptest::prelude::*;

use super::*;

fn report(stage: Stage) -> Report {
    Report {
        attempt: 1,
        stage,
        image_digest: "sha256:1".into(),
        resources: None,
        booted: stage >= Stage::Running,
        started_at: None,
        finished_at: None,
        end: None,
        message: String::new(),
    }
}

fn ended(reason: EndReason, exit_code: Option<i32>) -> Report {
    let end = End {
        reason,
        exit_code,
        signal: None,
        message: "why".into(),
        tail: "last words".into(),
    };
    Report {
        end: Some(end),
        ..report(Stage::Ended)
    }
}

fn placed() -> Status {
    Status::default().after(&Fact::Placed { blade: "b" })
}

#[test]
fn a_good_life_goes_through_the_phases_in_order() {
    let mut status = Status::default();
    assert_eq!(status.phase(), Phase::Pending);
    status = status.after(&Fact::Placed { blade: "b" });
    assert_eq!(
        (status.phase(), status.attempt, status.node.as_deref()),
        (Phase::Scheduled, 1, Some("b"))
    );
    status = status.after(&Fact::Seen(&report(Stage::Accepted)));
    assert_eq!(status.phase(), Phase::Starting);
    status = status.after(&Fact::Seen(&report(Stage::Running)));
    assert_eq!(status.phase(), Phase::Running);
    assert_eq!(status.exit_code, None);
    status = status.after(&Fact::Seen(&ended(EndReason::Completed, Some(0))));
    assert_eq!((status.phase(), status.exit_code), (Phase::Completed, Some(0)));
    assert_eq!(
        (status.reason.as_deref(), status.tail.as_deref()),
        (Some("Completed"), Some("last words"))
    );
}

#[test]
fn no_message_is_longer_than_the_api_takes() {
    let mut report = ended(EndReason::Error, Some(1));
    report.end.as_mut().unwrap().message = "ä".repeat(2048);
    let again = Rules {
        restart: crate::retry::Restart::OnFailure,
        ..Rules::default()
    };
    for rules in [Rules::default(), again] {
        let status = placed().follow(&Fact::Seen(&report), &rules);
        let last = status.last_attempt.iter().map(|last| &last.message);
        let messages = status
            .conditions
            .iter()
            .map(|one| &one.message)
            .chain(&status.message)
            .chain(last);
        assert_eq!(messages.map(String::len).max(), Some(4096));
    }
}

#[test]
fn a_warm_agent_is_booted_but_not_ready() {
    let warm = Report {
        booted: true,
        ..report(Stage::Warm)
    };
    let status = placed().after(&Fact::Seen(&warm));
    assert_eq!(status.phase(), Phase::Starting);
    let ready = status.condition(ConditionKind::Ready).unwrap();
    assert_eq!((ready.holds, ready.reason.as_str()), (false, "Warm"));
}

#[test]
fn every_other_end_is_failed_with_its_reason_and_only_the_reported_code() {
    for (said, code, reason) in [
        (EndReason::Error, Some(3), "Error"),
        (EndReason::Completed, Some(3), "Error"),
        (EndReason::Completed, None, "InitLost"),
        (EndReason::InitLost, None, "InitLost"),
        (EndReason::BootTimeout, None, "BootTimeout"),
        (EndReason::OomKilled, Some(137), "OOMKilled"),
    ] {
        let status = placed().after(&Fact::Seen(&ended(said, code)));
        assert_eq!(
            (status.phase(), status.reason.as_deref(), status.exit_code),
            (Phase::Failed, Some(reason), code)
        );
    }
}

#[test]
fn a_refusal_goes_back_to_pending_and_the_next_attempt_has_another_number() {
    let refused = placed().after(&Fact::Refused { message: "full" });
    assert_eq!((refused.phase(), refused.node.clone()), (Phase::Pending, None));
    assert_eq!(refused.after(&Fact::Placed { blade: "c" }).attempt, 2);
}

#[test]
fn a_missing_reference_is_told_and_leaves_the_agent_scheduled() {
    let waiting = placed().after(&Fact::Waiting {
        reason: "ReferenceMissing",
        message: "Secret \"x\" does not exist",
    });
    assert_eq!(waiting.phase(), Phase::Scheduled);
    assert!(!waiting.has_begun());
    assert_eq!(waiting.message.as_deref(), Some("Secret \"x\" does not exist"));
    let begun = waiting.after(&Fact::Seen(&report(Stage::Preparing)));
    assert_eq!((begun.phase(), begun.message), (Phase::Starting, None));
}

#[test]
fn a_lost_blade_makes_the_phase_unknown_until_it_speaks_again() {
    let lost = placed()
        .after(&Fact::Seen(&report(Stage::Running)))
        .after(&Fact::BladeLost { message: "gone" });
    assert_eq!(lost.phase(), Phase::Unknown);
    let back = lost.after(&Fact::Seen(&report(Stage::Running)));
    assert_eq!((back.phase(), back.reason), (Phase::Running, None));
}

#[test]
fn a_report_of_another_attempt_says_nothing() {
    let other = Report {
        attempt: 2,
        ..ended(EndReason::Completed, Some(0))
    };
    assert_eq!(placed().after(&Fact::Seen(&other)), placed());
}

fn any_report() -> impl Strategy<Value = Report> {
    let stage = prop_oneof![
        Just(Stage::Accepted),
        Just(Stage::Preparing),
        Just(Stage::Starting),
        Just(Stage::Running),
        Just(Stage::Stopping),
        Just(Stage::Ended)
    ];
    let end = prop_oneof![
        Just(EndReason::Completed),
        Just(EndReason::Error),
        Just(EndReason::InitLost),
        Just(EndReason::ImageError)
    ];
    (
        stage,
        any::<bool>(),
        proptest::option::of(end),
        proptest::option::of(0..256),
        1_u32..3,
    )
        .prop_map(|(stage, booted, end, exit_code, attempt)| Report {
            attempt,
            booted,
            end: end.map(|reason| End {
                reason,
                exit_code,
                signal: None,
                message: String::new(),
                tail: String::new(),
            }),
            ..report(stage)
        })
}

#[derive(Debug, Clone)]
enum Any {
    Unschedulable,
    Placed,
    Refused,
    Waiting,
    Lost,
    Seen(Box<Report>),
}

fn any_fact() -> impl Strategy<Value = Any> {
    prop_oneof![
        1 => Just(Any::Unschedulable),
        2 => Just(Any::Placed),
        1 => Just(Any::Refused),
        1 => Just(Any::Waiting),
        1 => Just(Any::Lost),
        6 => any_report().prop_map(|report| Any::Seen(Box::new(report))),
    ]
}

proptest! {
    #[test]
    fn no_order_of_facts_claims_more_than_was_seen(facts in proptest::collection::vec(any_fact(), 0..20)) {
        let mut status = Status::default();
        let mut reported = Vec::new();
        for fact in &facts {
            let fact = match fact {
                Any::Unschedulable => Fact::Unschedulable("no"),
                Any::Placed => Fact::Placed { blade: "b" },
                Any::Refused => Fact::Refused { message: "full" },
                Any::Waiting => Fact::Waiting { reason: "ReferenceMissing", message: "m" },
                Any::Lost => Fact::BladeLost { message: "gone" },
                Any::Seen(report) => {
                    if report.attempt == status.attempt && report.stage == Stage::Ended {
                        reported.extend(report.end.as_ref().and_then(|end| end.exit_code));
                    }
                    Fact::Seen(report)
                }
            };
            let next = status.after(&fact);
            if status.is_final() {
                prop_assert_eq!(&next, &status, "a final status changed");
            }
            if let Some(code) = next.exit_code {
                prop_assert!(reported.contains(&code), "an exit code nobody reported");
            }
            prop_assert!(next.phase() != Phase::Completed || next.exit_code == Some(0));
            prop_assert!(next.attempt >= status.attempt);
            // Telling the same again changes nothing, except that placing counts attempts.
            if !matches!(fact, Fact::Placed { .. }) {
                prop_assert_eq!(next.after(&fact), next.clone());
            }
            status = next;
        }
    }
}
