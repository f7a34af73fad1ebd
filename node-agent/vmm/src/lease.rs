//! Until when a blade's VMs may run without far-node hearing of its controller: a file that far-node renews and every
//! far-vmm reads, so that they end in time also where far-node is dead.
//!
//! The file holds one number: milliseconds of CLOCK_BOOTTIME, which no step of the wall clock moves and which goes on while
//! the machine sleeps. It is overwritten in place, always with as many bytes. No file, or one that holds no number: no limit.

use nix::time::{ClockId, clock_gettime};
use std::path::Path;

/// A lease is a number of at most 20 digits and a line's end.
const MAX_BYTES: u64 = 64;

/// Milliseconds since the machine was started, sleep included.
#[must_use]
pub fn now_ms() -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_BOOTTIME) else {
        return 0; // Linux has this clock since 2.6.39.
    };
    let (seconds, nanos) = (now.tv_sec(), now.tv_nsec());
    u64::try_from(seconds).unwrap_or(0) * 1000 + u64::try_from(nanos).unwrap_or(0) / 1_000_000
}

/// What a lease's file holds: the same number of bytes for every number.
#[must_use]
pub fn line(until_ms: u64) -> String {
    format!("{until_ms:020}\n")
}

/// The end of the lease in `file`.
#[must_use]
pub fn read(file: &Path) -> Option<u64> {
    // One look may meet a renewal halfway: two that agree have not.
    let mut before = read_once(file);
    loop {
        let now = read_once(file);
        if now == before {
            return now;
        }
        before = now;
    }
}

fn read_once(file: &Path) -> Option<u64> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(file)
        .ok()?
        .take(MAX_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    text.trim().parse().ok()
}

/// Whether the lease in `file` is over at `now_ms`.
#[must_use]
pub fn is_over(file: &Path, now_ms: u64) -> bool {
    read(file).is_some_and(|until| until <= now_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_number_that_has_passed_ends_anything() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lease");
        assert!(!is_over(&file, u64::MAX), "no file");
        for (text, expected) in [
            ("", false),
            ("soon", false),
            ("-1", false),
            ("1001\n", false),
            ("1000\n", true),
            ("1", true),
            (&line(1001), false),
            (&line(1000), true),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(is_over(&file, 1000), expected, "{text:?}");
        }
        assert!(now_ms() > 0);
    }
}
