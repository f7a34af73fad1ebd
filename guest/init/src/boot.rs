//! What the boot did: when each stage ended, and what it went on without. Both travel in `Ready`.

use far_proto::guest::StageTime;
use nix::time::{ClockId, clock_gettime};

/// Most warnings in `Ready`, and the longest of them in bytes (proto/far/guest/v1/control.proto).
const MAX_WARNINGS: usize = 16;
const MAX_WARNING_BYTES: usize = 256;

/// Stages and warnings, in order of time.
#[derive(Debug, Default)]
pub(crate) struct BootReport {
    stages: Vec<StageTime>,
    warnings: Vec<String>,
}

impl BootReport {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Notes the end of a stage; only its first end counts.
    pub(crate) fn done(&mut self, stage: &'static str) {
        if !self.stages.iter().any(|seen| seen.stage == stage) {
            self.stages.push(StageTime {
                stage: stage.into(),
                boot_ns: boot_ns(),
            });
        }
    }

    /// Notes something optional that is missing, here and on the console.
    pub(crate) fn warn(&mut self, text: impl Into<String>) {
        let text = shortened(text.into(), MAX_WARNING_BYTES);
        eprintln!("far-init: {text}");
        if self.warnings.len() < MAX_WARNINGS {
            self.warnings.push(text);
        }
    }

    pub(crate) fn stages(&self) -> Vec<StageTime> {
        self.stages.clone()
    }

    pub(crate) fn warnings(&self) -> Vec<String> {
        self.warnings.clone()
    }
}

/// Nanoseconds since the kernel started, suspend included.
pub(crate) fn boot_ns() -> u64 {
    nanos(ClockId::CLOCK_BOOTTIME)
}

/// Nanoseconds since the Unix epoch by the guest's wall clock.
pub(crate) fn wall_ns() -> u64 {
    nanos(ClockId::CLOCK_REALTIME)
}

fn nanos(clock: ClockId) -> u64 {
    let Ok(time) = clock_gettime(clock) else { return 0 };
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(time.tv_sec())
        .saturating_mul(1_000_000_000)
        .saturating_add(part(time.tv_nsec()))
}

/// `text` cut to at most `limit` bytes at a character's border.
pub(crate) fn shortened(mut text: String, limit: usize) -> String {
    if text.len() > limit {
        let end = (0..=limit).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(shortened("aé".into(), 2), "a");
        assert_eq!(shortened("aé".into(), 3), "aé");
        assert_eq!(shortened(String::new(), 0), "");
    }

    #[test]
    fn a_stage_is_noted_once_and_warnings_are_bounded() {
        let mut report = BootReport::new();
        report.done("mounts");
        let first = report.stages();
        report.done("mounts");
        assert_eq!(report.stages(), first);
        (0..40).for_each(|n| report.warn(format!("{n}{}", "x".repeat(1000))));
        assert_eq!(report.warnings().len(), MAX_WARNINGS);
        assert!(report.warnings().iter().all(|text| text.len() <= MAX_WARNING_BYTES));
    }
}
