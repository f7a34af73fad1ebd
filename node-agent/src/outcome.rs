//! Why an attempt ended and when it must: pure decisions over a record and what was seen of its VMM.
//!
//! Invariant: an exit code is told only where the guest reported one; nothing else ever becomes 0.

use crate::record::{End, EndReason, ExitHow, ExitReport, Phase, Record, UnixMs};
use std::time::Duration;

/// After the payload's grace period the guest still has to report, flush and power off before its VMM is killed.
pub(crate) const STOP_MARGIN: Duration = Duration::from_secs(10);
/// From the acknowledged exit report until the VMM is killed, should the guest not power off.
pub(crate) const POWER_OFF_LIMIT: Duration = Duration::from_secs(10);
/// From an adoption until a limit that passed while far-node was down counts: the guest dials again within seconds, and
/// the host needs up to 10 s to tell that a VMM is gone.
pub(crate) const ADOPTION_PATIENCE: Duration = Duration::from_secs(15);
/// Texts for people, bytes.
pub(crate) const MAX_MESSAGE: usize = 1024;

/// What is known of how a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmmEnd {
    /// It never was.
    NeverBooted,
    /// It ended by itself or by our order, without sign of a fault.
    Clean,
    /// The guest's kernel panicked.
    KernelPanic {
        /// What the console said.
        message: String,
    },
    /// Ended by a signal that was not ours, failed to start, or with an error.
    Crashed {
        /// What is known, for people.
        message: String,
    },
    /// far-vmm ended it because the blade's lease was over.
    Fenced,
    /// Neither a process nor a record of its end was found.
    Vanished {
        /// The blade's kernel started anew since.
        blade_rebooted: bool,
    },
}

/// Why far-node itself put an end to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forced {
    /// Nothing was heard of the guest, or no payload started, in time.
    BootTimeout {
        /// What was missing.
        message: String,
    },
    /// The guest booted again, or its init broke the protocol.
    InitLost {
        /// What happened.
        message: String,
    },
    /// The attempt could not be prepared.
    Refused {
        /// ImageError, Error, NetworkError …
        reason: EndReason,
        /// What was wrong, naming the field.
        message: String,
    },
}

/// The end of `record`, given how its VMM ended and whether far-node forced it.
#[must_use]
pub fn decide_end(record: &Record, vmm: &VmmEnd, forced: Option<&Forced>, tail: String) -> End {
    let (exit_code, signal) = match record.exit.as_ref().map(|exit| exit.how) {
        Some(ExitHow::Code(code)) => (Some(i32::from(code)), None),
        Some(ExitHow::Signal(signal)) => (None, Some(i32::from(signal))),
        None => (None, None),
    };
    let (reason, message) = decide_reason(record, vmm, forced);
    End {
        reason,
        exit_code,
        signal,
        message: clean_text(&message, MAX_MESSAGE),
        tail,
    }
}

fn decide_reason(record: &Record, vmm: &VmmEnd, forced: Option<&Forced>) -> (EndReason, String) {
    if let Some(order) = &record.stop
        && let Some(reason) = order.reason
    {
        let limit = record.deadline_s;
        return match reason {
            EndReason::DeadlineExceeded if limit > 0 => (
                reason,
                format!("ran longer than spec.activeDeadlineSeconds ({limit} s)"),
            ),
            EndReason::NodeLost => (
                reason,
                exit_text(
                    record.exit.as_ref(),
                    "no controller answered the blade for the whole fence time",
                ),
            ),
            _ => (reason, exit_text(record.exit.as_ref(), "was told to end")),
        };
    }
    if let Some(exit) = &record.exit {
        return decide_by_report(exit);
    }
    match (forced, vmm) {
        (_, VmmEnd::Fenced) => (
            EndReason::NodeLost,
            "no controller answered the blade for the whole fence time, after which the agent may be started elsewhere"
                .to_owned(),
        ),
        (Some(Forced::Refused { reason, message }), _) => (*reason, message.clone()),
        // What the machine itself said is nearer to the cause than our own time limit.
        (_, VmmEnd::KernelPanic { message }) => (
            EndReason::KernelPanic,
            format!("the guest's kernel panicked: {message}"),
        ),
        (Some(Forced::BootTimeout { message }), _) => (EndReason::BootTimeout, message.clone()),
        (Some(Forced::InitLost { message }), _) => (EndReason::InitLost, message.clone()),
        (None, _) if record.stop.is_some() => (
            EndReason::Evicted,
            "was told to end, and ended without an exit report".to_owned(),
        ),
        (None, VmmEnd::Crashed { message }) => (EndReason::VmmCrashed, message.clone()),
        (None, VmmEnd::Clean) => (
            EndReason::InitLost,
            "the microVM ended without an exit report of its init; no exit code is known".to_owned(),
        ),
        (None, VmmEnd::NeverBooted) => (EndReason::Evicted, "ended before its microVM was started".to_owned()),
        (None, VmmEnd::Vanished { blade_rebooted: true }) => (
            EndReason::BladeRebooted,
            "the blade was started anew before the agent ended".to_owned(),
        ),
        (None, VmmEnd::Vanished { blade_rebooted: false }) => (
            EndReason::InitLost,
            "the microVM is gone and left neither an exit report nor a record of its end".to_owned(),
        ),
    }
}

fn decide_by_report(exit: &ExitReport) -> (EndReason, String) {
    let reason = match exit.how {
        _ if !exit.start_error.is_empty() => EndReason::Error,
        // The payload outlived the OOM kill of a child and says itself that all is well.
        ExitHow::Code(0) => EndReason::Completed,
        _ if exit.oom_killed => EndReason::OomKilled,
        ExitHow::Code(_) => EndReason::Error,
        ExitHow::Signal(_) => EndReason::Signal,
    };
    (reason, exit_text(Some(exit), ""))
}

fn exit_text(exit: Option<&ExitReport>, otherwise: &str) -> String {
    let Some(exit) = exit else {
        return format!("{otherwise}; no exit report");
    };
    if !exit.start_error.is_empty() {
        return format!("the payload could not be started: {}", exit.start_error);
    }
    let how = match exit.how {
        ExitHow::Code(code) => format!("exited with code {code}"),
        ExitHow::Signal(signal) => format!("was ended by signal {signal}"),
    };
    let oom = if exit.oom_killed {
        "; the guest ran out of memory (spec.memory)"
    } else {
        ""
    };
    let told = if otherwise.is_empty() {
        String::new()
    } else {
        format!("{otherwise}, ")
    };
    format!("{told}{how}{oom}")
}

/// A time limit that ran out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alarm {
    /// Kill the VMM: the reason is known from the record, or is given.
    Kill(Option<Forced>),
    /// Order the attempt to stop, reason DeadlineExceeded.
    Deadline,
}

/// The next time limit of a spawned, not ended attempt, and what it asks for. What was to happen while far-node was down
/// could not be seen: for an adopted attempt the boot limits count from the adoption, and all others wait a little.
#[must_use]
pub fn next_alarm(record: &Record, boot_timeout: Duration, adopted_at: Option<UnixMs>) -> Option<(UnixMs, Alarm)> {
    let spawn = record.spawn.as_ref()?;
    let began_at = record.began_at()?;
    let after = |at: UnixMs, limit: Duration| at.saturating_add(millis(limit));
    let seconds = |s: u32| Duration::from_secs(s.into());
    let seen = |at: UnixMs| at.max(adopted_at.unwrap_or(0));
    let earliest = adopted_at.map_or(0, |at| after(at, ADOPTION_PATIENCE));
    let mut alarms = Vec::with_capacity(3);
    if let Some(exit) = &record.exit {
        alarms.push((after(exit.at, POWER_OFF_LIMIT), Alarm::Kill(None)));
    } else if let Some(order) = &record.stop {
        alarms.push((after(order.at, seconds(order.grace_s) + STOP_MARGIN), Alarm::Kill(None)));
    } else if record.phase == Phase::Warm {
        // Waits for as long as nobody claims it.
    } else if let Some(booted_at) = record.booted_at {
        if record.started_at.is_none() {
            let message = format!(
                "the guest's init started no payload within {} s",
                boot_timeout.as_secs()
            );
            alarms.push((
                after(seen(booted_at.max(began_at)), boot_timeout),
                Alarm::Kill(Some(Forced::BootTimeout { message })),
            ));
        }
    } else {
        let message = format!("no Hello of the guest's init within {} s", boot_timeout.as_secs());
        alarms.push((
            after(seen(spawn.at), boot_timeout),
            Alarm::Kill(Some(Forced::BootTimeout { message })),
        ));
    }
    if record.deadline_s > 0 && !record.start_on_claim && record.stop.is_none() && record.exit.is_none() {
        alarms.push((after(began_at, seconds(record.deadline_s)), Alarm::Deadline));
    }
    let (at, alarm) = alarms.into_iter().min_by_key(|(at, _)| *at)?;
    Some((at.max(earliest), alarm))
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Text of a guest or a console made safe for people's terminals: control characters become spaces, cut at `max` bytes.
#[must_use]
pub fn clean_text(text: &str, max: usize) -> String {
    let mut clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if clean.len() > max {
        let cut = (0..=max).rev().find(|&at| clean.is_char_boundary(at)).unwrap_or(0);
        clean.truncate(cut);
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{
        Fact, StopOrder,
        tests::{fresh, spawning},
    };

    fn report(how: ExitHow, oom_killed: bool, start_error: &str) -> ExitReport {
        ExitReport {
            at: 9,
            how,
            oom_killed,
            start_error: start_error.into(),
        }
    }

    fn record(exit: Option<ExitReport>, stop: Option<Option<EndReason>>) -> Record {
        let stop = stop.map(|reason| StopOrder {
            at: 5,
            grace_s: 3,
            reason,
        });
        Record { exit, stop, ..fresh() }
    }

    #[test]
    fn each_end_has_its_reason() {
        use EndReason as R;
        use ExitHow::{Code, Signal};
        let crash = || VmmEnd::Crashed {
            message: "signal 11".into(),
        };
        let panic = || VmmEnd::KernelPanic {
            message: "Attempted to kill init".into(),
        };
        let timeout = || Some(Forced::BootTimeout { message: "t".into() });
        let cases = [
            (
                "exit 0",
                record(Some(report(Code(0), false, "")), None),
                VmmEnd::Clean,
                None,
                R::Completed,
                Some(0),
                None,
            ),
            (
                "exit 3",
                record(Some(report(Code(3), false, "")), None),
                VmmEnd::Clean,
                None,
                R::Error,
                Some(3),
                None,
            ),
            (
                "signal",
                record(Some(report(Signal(11), false, "")), None),
                VmmEnd::Clean,
                None,
                R::Signal,
                None,
                Some(11),
            ),
            (
                "oom",
                record(Some(report(Signal(9), true, "")), None),
                VmmEnd::Clean,
                None,
                R::OomKilled,
                None,
                Some(9),
            ),
            (
                "oom of a child, exit 0",
                record(Some(report(Code(0), true, "")), None),
                VmmEnd::Clean,
                None,
                R::Completed,
                Some(0),
                None,
            ),
            (
                "not started",
                record(Some(report(Code(127), false, "exec")), None),
                VmmEnd::Clean,
                None,
                R::Error,
                Some(127),
                None,
            ),
            (
                "report, then the VMM crashed",
                record(Some(report(Code(0), false, "")), None),
                crash(),
                None,
                R::Completed,
                Some(0),
                None,
            ),
            (
                "evicted after exit 0",
                record(Some(report(Code(0), false, "")), Some(Some(R::Evicted))),
                VmmEnd::Clean,
                None,
                R::Evicted,
                Some(0),
                None,
            ),
            (
                "deadline, killed",
                record(None, Some(Some(R::DeadlineExceeded))),
                VmmEnd::Clean,
                None,
                R::DeadlineExceeded,
                None,
                None,
            ),
            (
                "deleted, ended by TERM",
                record(Some(report(Signal(15), false, "")), Some(None)),
                VmmEnd::Clean,
                None,
                R::Signal,
                None,
                Some(15),
            ),
            (
                "deleted, no report",
                record(None, Some(None)),
                VmmEnd::Clean,
                None,
                R::Evicted,
                None,
                None,
            ),
            (
                "no report",
                record(None, None),
                VmmEnd::Clean,
                None,
                R::InitLost,
                None,
                None,
            ),
            ("crash", record(None, None), crash(), None, R::VmmCrashed, None, None),
            ("panic", record(None, None), panic(), None, R::KernelPanic, None, None),
            (
                "panic before Hello",
                record(None, None),
                panic(),
                timeout(),
                R::KernelPanic,
                None,
                None,
            ),
            (
                "no Hello",
                record(None, None),
                VmmEnd::Clean,
                timeout(),
                R::BootTimeout,
                None,
                None,
            ),
            (
                "other nonce",
                record(None, None),
                VmmEnd::Clean,
                Some(Forced::InitLost { message: "n".into() }),
                R::InitLost,
                None,
                None,
            ),
            (
                "gone",
                record(None, None),
                VmmEnd::Vanished { blade_rebooted: false },
                None,
                R::InitLost,
                None,
                None,
            ),
            (
                "rebooted",
                record(None, None),
                VmmEnd::Vanished { blade_rebooted: true },
                None,
                R::BladeRebooted,
                None,
                None,
            ),
            (
                "no image",
                record(None, None),
                VmmEnd::NeverBooted,
                Some(Forced::Refused {
                    reason: R::ImageError,
                    message: "spec.image".into(),
                }),
                R::ImageError,
                None,
                None,
            ),
        ];
        for (why, record, vmm, forced, reason, code, signal) in cases {
            let end = decide_end(&record, &vmm, forced.as_ref(), String::new());
            assert_eq!((end.reason, end.exit_code, end.signal), (reason, code, signal), "{why}");
            assert!(!end.message.is_empty(), "{why}");
        }
    }

    #[test]
    fn without_a_report_there_is_never_an_exit_code() {
        for vmm in [
            VmmEnd::Clean,
            VmmEnd::NeverBooted,
            VmmEnd::Vanished { blade_rebooted: false },
        ] {
            for stop in [None, Some(None), Some(Some(EndReason::Evicted))] {
                let end = decide_end(&record(None, stop), &vmm, None, String::new());
                assert_eq!((end.exit_code, end.signal), (None, None));
                assert_ne!(end.reason, EndReason::Completed);
            }
        }
    }

    #[test]
    fn alarms_follow_the_state() {
        let boot = Duration::from_secs(90);
        let mut record = fresh();
        record.deadline_s = 200;
        assert_eq!(next_alarm(&record, boot, None), None);
        record.apply(Fact::Preparing).unwrap();
        record.apply(spawning(0)).unwrap();
        assert!(matches!(
            next_alarm(&record, boot, None),
            Some((90_000, Alarm::Kill(Some(Forced::BootTimeout { .. }))))
        ));
        record
            .apply(Fact::Hello {
                at: 30_000,
                nonce: "n".into(),
            })
            .unwrap();
        assert!(matches!(
            next_alarm(&record, boot, None),
            Some((120_000, Alarm::Kill(Some(Forced::BootTimeout { .. }))))
        ));
        record
            .apply(Fact::Ready {
                at: 40_000,
                message: String::new(),
            })
            .unwrap();
        assert_eq!(next_alarm(&record, boot, None), Some((200_000, Alarm::Deadline)));
        record
            .apply(Fact::StopOrdered(StopOrder {
                at: 50_000,
                grace_s: 3,
                reason: None,
            }))
            .unwrap();
        assert_eq!(next_alarm(&record, boot, None), Some((63_000, Alarm::Kill(None))));
        record.apply(Fact::Exited(report(ExitHow::Code(0), false, ""))).unwrap();
        assert_eq!(next_alarm(&record, boot, None), Some((10_009, Alarm::Kill(None))));
    }

    #[test]
    fn what_passed_before_an_adoption_waits_for_the_guest() {
        let boot = Duration::from_secs(90);
        let adopted = Some(1_000_000);
        let mut record = fresh();
        record.apply(Fact::Preparing).unwrap();
        record.apply(spawning(0)).unwrap();
        assert_eq!(next_alarm(&record, boot, adopted).unwrap().0, 1_090_000);
        record.booted_at = Some(1);
        assert_eq!(next_alarm(&record, boot, adopted).unwrap().0, 1_090_000);
        record.started_at = Some(2);
        record.deadline_s = 200;
        assert_eq!(next_alarm(&record, boot, adopted), Some((1_015_000, Alarm::Deadline)));
        record.stop = Some(StopOrder {
            at: 50_000,
            grace_s: 3,
            reason: None,
        });
        assert_eq!(next_alarm(&record, boot, adopted), Some((1_015_000, Alarm::Kill(None))));
    }

    #[test]
    fn texts_of_guests_carry_no_control_characters() {
        assert_eq!(clean_text("a\x1b[31mb\nc", 100), "a [31mb c");
        assert_eq!(clean_text("ééé", 3), "é");
    }
}
