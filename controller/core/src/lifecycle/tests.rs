use super::*;
use crate::{
    retry::Restart,
    status::{End, EndReason, Fact},
};

const RULES: Rules = Rules {
    restart: Restart::OnFailure,
    backoff_limit: 6,
    reschedules: false,
    deadline_s: None,
    first_delay_ms: 10_000,
    now_ms: 1_000_000,
};

fn report(stage: Stage) -> Report {
    let end = End {
        reason: EndReason::Error,
        exit_code: Some(3),
        signal: None,
        message: String::new(),
        tail: String::new(),
    };
    Report {
        attempt: 1,
        stage,
        image_digest: String::new(),
        resources: None,
        booted: false,
        started_at: None,
        finished_at: None,
        end: (stage == Stage::Ended).then_some(end),
        message: String::new(),
    }
}

fn seen<'a>(status: &'a Status, blade: BladeView, report: Option<&'a Report>) -> Seen<'a> {
    Seen {
        status,
        deleting: false,
        held: true,
        blade,
        report,
        rules: &RULES,
        wanted: Wanted::default(),
        must_leave: false,
        final_since: Some(900),
    }
}

fn placed() -> Status {
    Status::default().follow(&Fact::Placed { blade: "b" }, &RULES)
}

fn begun() -> Status {
    placed().follow(&Fact::Seen(&report(Stage::Accepted)), &RULES)
}

fn deleting<'a>(status: &'a Status, blade: BladeView, report: Option<&'a Report>) -> Seen<'a> {
    Seen {
        deleting: true,
        ..seen(status, blade, report)
    }
}

#[test]
fn an_agent_is_placed_then_ensured_then_told() {
    let new = Status::default();
    let placed = new.after(&Fact::Placed { blade: "b" });
    let accepted = report(Stage::Accepted);
    assert_eq!(decide(&seen(&new, BladeView::Unreachable, None)), Decision::Place);
    assert_eq!(decide(&seen(&placed, BladeView::Connected, None)), Decision::Ensure);
    assert_eq!(decide(&seen(&placed, BladeView::Unreachable, None)), Decision::Rest);
    assert_eq!(
        decide(&seen(&placed, BladeView::Connected, Some(&accepted))),
        Decision::Tell
    );
    assert_eq!(
        decide(&seen(&placed, BladeView::Lost, Some(&accepted))),
        Decision::DeclareLost
    );
}

#[test]
fn an_attempt_that_had_begun_is_never_ensured_again() {
    let begun = Status::default()
        .after(&Fact::Placed { blade: "b" })
        .after(&Fact::Seen(&report(Stage::Accepted)));
    assert_eq!(
        decide(&seen(&begun, BladeView::Connected, None)),
        Decision::DeclareForgotten
    );
    let stale = Report {
        attempt: 7,
        ..report(Stage::Running)
    };
    assert_eq!(
        decide(&seen(&begun, BladeView::Connected, Some(&stale))),
        Decision::DeclareForgotten
    );
}

#[test]
fn an_attempt_that_was_withdrawn_before_it_began_is_placed_anew_and_never_told_as_a_failure() {
    let placed = Status::default().after(&Fact::Placed { blade: "b" });
    let mut withdrawn = report(Stage::Ended);
    withdrawn.end.as_mut().unwrap().reason = EndReason::Evicted;
    let next = |status: &Status, report: &Report| decide(&seen(status, BladeView::Connected, Some(report)));
    assert_eq!(next(&placed, &withdrawn), Decision::PlaceAnew);
    assert_eq!(next(&placed, &report(Stage::Ended)), Decision::Tell);
    let booted = Report {
        booted: true,
        ..withdrawn.clone()
    };
    assert_eq!(next(&placed, &booted), Decision::Tell);
    let begun = placed.after(&Fact::Seen(&report(Stage::Accepted)));
    assert_eq!(next(&begun, &withdrawn), Decision::Tell);
}

#[test]
fn a_finished_agent_rests_until_it_is_deleted() {
    let ended = report(Stage::Ended);
    let done = Status::default()
        .after(&Fact::Placed { blade: "b" })
        .after(&Fact::Seen(&ended));
    for blade in [
        BladeView::Connected,
        BladeView::Unreachable,
        BladeView::Lost,
        BladeView::Fenced,
    ] {
        assert_eq!(decide(&seen(&done, blade, None)), Decision::Rest);
    }
    assert_eq!(
        decide(&deleting(&done, BladeView::Connected, Some(&ended))),
        Decision::ForgetAndRelease
    );
}

#[test]
fn deletion_stops_confirms_and_releases() {
    let placed = Status::default().after(&Fact::Placed { blade: "b" });
    let new = Status::default();
    for (why, seen, expected) in [
        (
            "never placed",
            deleting(&new, BladeView::Unreachable, None),
            Decision::Release,
        ),
        (
            "not held",
            Seen {
                held: false,
                ..deleting(&placed, BladeView::Connected, None)
            },
            Decision::Rest,
        ),
        (
            "unknown to the blade",
            deleting(&placed, BladeView::Connected, None),
            Decision::Stop,
        ),
        (
            "runs",
            deleting(&placed, BladeView::Connected, Some(&report(Stage::Running))),
            Decision::Stop,
        ),
        (
            "stops",
            deleting(&placed, BladeView::Connected, Some(&report(Stage::Stopping))),
            Decision::Rest,
        ),
        (
            "ended",
            deleting(&placed, BladeView::Connected, Some(&report(Stage::Ended))),
            Decision::ForgetAndRelease,
        ),
        (
            "unreachable",
            deleting(&placed, BladeView::Unreachable, Some(&report(Stage::Ended))),
            Decision::Rest,
        ),
        ("lost", deleting(&placed, BladeView::Lost, None), Decision::Rest),
        (
            "fenced",
            deleting(&placed, BladeView::Fenced, None),
            Decision::ReleaseUnconfirmed,
        ),
    ] {
        assert_eq!(decide(&seen), expected, "{why}");
        assert_eq!(decide(&seen), decide(&seen), "{why}: asked twice");
    }
}

#[test]
fn a_failed_attempt_is_followed_by_another_when_its_time_has_come() {
    let waits = begun().follow(&Fact::Seen(&report(Stage::Ended)), &RULES);
    assert_eq!((waits.restarts, waits.attempt, waits.node.as_deref()), (1, 1, None));
    assert_eq!(waits.last_attempt.as_ref().unwrap().exit_code, Some(3));
    assert_eq!(
        decide(&seen(&waits, BladeView::Unreachable, None)),
        Decision::WaitUntil(1010)
    );
    let later = Rules {
        now_ms: 1_010_000,
        ..RULES
    };
    let then = Seen {
        rules: &later,
        ..seen(&waits, BladeView::Unreachable, None)
    };
    assert_eq!(decide(&then), Decision::Place);
    assert_eq!(waits.follow(&Fact::Placed { blade: "c" }, &later).attempt, 2);
    let late = Rules {
        deadline_s: Some(60),
        now_ms: 1_061_000,
        ..RULES
    };
    let then = Seen {
        rules: &late,
        ..seen(&waits, BladeView::Unreachable, None)
    };
    assert_eq!(decide(&then), Decision::DeclareDeadline);
    let over = waits.follow(&Fact::DeadlinePassed, &late);
    assert_eq!(
        (over.is_final(), over.reason.as_deref()),
        (true, Some("DeadlineExceeded"))
    );
}

#[test]
fn a_suspended_agent_is_not_placed_and_a_placed_one_is_ended_and_waits_uncounted() {
    let suspended = |status: &Status, blade, report: Option<&Report>| {
        decide(&Seen {
            wanted: Wanted {
                suspended: true,
                ..Wanted::default()
            },
            ..seen(status, blade, report)
        })
    };
    let new = Status::default();
    assert_eq!(
        suspended(&new, BladeView::Unreachable, None),
        Decision::DeclareSuspended
    );
    let told = new.after(&Fact::Suspended);
    assert_eq!(suspended(&told, BladeView::Unreachable, None), Decision::Rest);
    assert_eq!(
        suspended(&placed(), BladeView::Connected, None),
        Decision::Evict,
        "it may not begin"
    );

    let runs = begun();
    let running = report(Stage::Running);
    assert_eq!(
        suspended(&runs, BladeView::Connected, Some(&running)),
        Decision::DeclareSuspended
    );
    let ending = runs.after(&Fact::Suspended);
    assert_eq!(
        suspended(&ending, BladeView::Connected, Some(&running)),
        Decision::Evict
    );
    assert_eq!(
        suspended(&ending, BladeView::Unreachable, Some(&running)),
        Decision::Tell
    );
    assert_eq!(
        decide(&seen(&ending, BladeView::Connected, Some(&running))),
        Decision::Evict,
        "taken back too late"
    );
    let mut ended = report(Stage::Ended);
    ended.end.as_mut().unwrap().reason = EndReason::Evicted;
    // Not suspended any more when the end is heard: it is placed anew all the same, whatever its restartPolicy.
    let waits = ending.after(&Fact::Seen(&ended));
    assert!(waits.is_suspended() && !waits.is_final());
    assert_eq!(
        (waits.restarts, waits.counts, waits.active_since),
        (0, Default::default(), None)
    );
    assert_eq!(decide(&seen(&waits, BladeView::Unreachable, None)), Decision::Place);
    let own = ending.follow(&Fact::Seen(&report(Stage::Ended)), &Rules::default());
    assert!(own.is_final(), "an end of its own is its end");
}

#[test]
fn an_agent_leaves_a_blade_that_is_emptied() {
    let must_leave = |status: &Status, report: Option<&Report>| {
        decide(&Seen {
            must_leave: true,
            ..seen(status, BladeView::Connected, report)
        })
    };
    let (running, stopping) = (report(Stage::Running), report(Stage::Stopping));
    assert_eq!(must_leave(&begun(), Some(&running)), Decision::Evict);
    assert_eq!(must_leave(&begun(), Some(&stopping)), Decision::Tell, "asked once");
    assert_eq!(must_leave(&placed(), None), Decision::Evict);
}

#[test]
fn a_fenced_blade_ends_the_attempt_as_the_lost_policy_says() {
    let lost = begun().after(&Fact::BladeLost { message: "gone" });
    assert_eq!(decide(&seen(&lost, BladeView::Lost, None)), Decision::DeclareLost);
    assert_eq!(decide(&seen(&lost, BladeView::Fenced, None)), Decision::DeclareFenced);
    let failed = lost.follow(&Fact::Fenced { message: "gone" }, &RULES);
    assert_eq!((failed.is_final(), failed.reason.as_deref()), (true, Some("NodeLost")));
    assert_eq!(failed.exit_code, None);
    let reschedules = Rules {
        reschedules: true,
        ..RULES
    };
    let again = lost.follow(&Fact::Fenced { message: "gone" }, &reschedules);
    assert_eq!((again.node.as_deref(), again.counts.blade_failures), (None, 1));
}

#[test]
fn a_blade_is_asked_once_to_lay_an_agent_to_sleep() {
    let asleep = |status: &Status, report: &Report| {
        let wanted = Wanted {
            asleep: true,
            ..Wanted::default()
        };
        decide(&Seen {
            wanted,
            ..seen(status, BladeView::Connected, Some(report))
        })
    };
    let (starting, running) = (report(Stage::Starting), report(Stage::Running));
    assert_eq!(
        asleep(&begun(), &starting),
        Decision::Tell,
        "there is nothing to lay to sleep yet"
    );
    assert_eq!(asleep(&begun(), &running), Decision::Tell, "that it runs is told first");
    let runs = begun().after(&Fact::Seen(&running));
    assert_eq!(asleep(&runs, &running), Decision::Sleep);
    let refused = runs.after(&Fact::SleepRefused {
        reason: "NotSupported",
        message: "no",
    });
    assert_eq!(asleep(&refused, &running), Decision::Tell);
    assert_eq!(
        decide(&seen(&refused, BladeView::Connected, Some(&running))),
        Decision::Wake
    );
    assert!(
        refused
            .after(&Fact::NotToSleep)
            .condition(ConditionKind::Sleeping)
            .is_none()
    );
}

#[test]
fn a_finished_agent_is_deleted_when_its_time_is_over() {
    let done = placed().after(&Fact::Seen(&report(Stage::Ended)));
    for (ttl_s, expected) in [
        (None, Decision::Rest),
        (Some(101), Decision::WaitUntil(1001)),
        (Some(100), Decision::Delete),
        (Some(0), Decision::Delete),
    ] {
        let wanted = Wanted {
            ttl_s,
            ..Wanted::default()
        };
        let seen = Seen {
            wanted,
            ..seen(&done, BladeView::Connected, None)
        };
        assert_eq!(decide(&seen), expected, "{ttl_s:?}");
    }
}
