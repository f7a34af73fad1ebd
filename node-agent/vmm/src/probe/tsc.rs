//! Rate of the time stamp counter, which a TCG guest on the microvm machine must be told (`tsc_early_khz=`).
//!
//! QEMU's translator hands the host's counter to the guest, and that machine has no timer a kernel could calibrate it
//! with. "cpu MHz" of /proc/cpuinfo is another rate where frequency scales, so it is measured.

/// The rate in kHz; `None` on processors without such a counter.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn measure_khz() -> Option<u32> {
    None
}

/// The rate in kHz, measured against CLOCK_MONOTONIC in about 30 ms; `None` if the counter stands still.
#[cfg(target_arch = "x86_64")]
pub(crate) fn measure_khz() -> Option<u32> {
    // The median of three: a machine that is paused between the two readings of a pair spoils one of them.
    let mut rates: Vec<u64> = (0..3).filter_map(|_| measure_once()).collect();
    rates.sort_unstable();
    let rate = u32::try_from(*rates.get(rates.len() / 2)?).ok()?;
    (rate > 0).then_some(rate)
}

#[cfg(target_arch = "x86_64")]
fn measure_once() -> Option<u64> {
    use nix::poll::{PollTimeout, poll};
    let (first_tick, first_time) = read_pair();
    // Time must pass: 10 ms make the reading's own 100 ns an error of 10 parts per million.
    let _ = poll(&mut [], PollTimeout::from(10_u8));
    let (last_tick, last_time) = read_pair();
    let nanos = u64::try_from(last_time.duration_since(first_time).as_nanos()).ok()?;
    (last_tick.saturating_sub(first_tick))
        .checked_mul(1_000_000)?
        .checked_div(nanos)
}

/// Counter and clock at the same moment: of eight tries the one with the least time between.
#[cfg(target_arch = "x86_64")]
fn read_pair() -> (u64, std::time::Instant) {
    let try_once = |_| {
        let before = crate::sys::time_stamp_counter();
        let now = std::time::Instant::now();
        let after = crate::sys::time_stamp_counter();
        (
            after.wrapping_sub(before),
            before.wrapping_add(after.wrapping_sub(before) / 2),
            now,
        )
    };
    let best = (0..8)
        .map(try_once)
        .min_by_key(|&(gap, _, _)| gap)
        .expect("eight is more than none");
    (best.1, best.2)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree_within_one_percent() {
        let (a, b) = (measure_khz().unwrap(), measure_khz().unwrap());
        assert!(a.abs_diff(b) < a / 100, "{a} kHz and {b} kHz");
    }
}
