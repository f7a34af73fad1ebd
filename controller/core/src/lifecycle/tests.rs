use super::*;
use crate::status::{End, EndReason, Fact};

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
    }
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
