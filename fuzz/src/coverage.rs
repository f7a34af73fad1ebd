//! Which edges of the program an input reached: the counters of LLVM's sanitizer coverage, which the stable compiler puts in
//! with `-C passes=sancov-module` (see fuzz/run). Built without them, the fuzzer mutates blindly.
//!
//! The only `unsafe` of this crate.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering};

static START: AtomicPtr<AtomicU8> = AtomicPtr::new(std::ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Called by every instrumented object file before main; the linker puts their counters side by side.
///
/// # Safety
/// LLVM calls it with the bounds of one array of counters that lives as long as the program.
#[unsafe(no_mangle)]
unsafe extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
    START.store(start.cast(), Ordering::Relaxed);
    COUNT.store((stop as usize).saturating_sub(start as usize), Ordering::Relaxed);
}

/// All counters; empty without instrumentation.
fn counters() -> &'static [AtomicU8] {
    let start = START.load(Ordering::Relaxed);
    if start.is_null() {
        return &[];
    }
    // SAFETY: the bounds that LLVM gave; the array lives as long as the program, and atomics may alias its own writes.
    unsafe { std::slice::from_raw_parts(start, COUNT.load(Ordering::Relaxed)) }
}

/// Whether the program was built with counters.
pub(crate) fn is_on() -> bool {
    !counters().is_empty()
}

pub(crate) fn reset() {
    counters()
        .iter()
        .for_each(|counter| counter.store(0, Ordering::Relaxed));
}

/// Notes what this run reached in `seen` (one bit per order of magnitude of each counter); tells whether it is news.
pub(crate) fn note(seen: &mut Vec<u8>) -> bool {
    seen.resize(counters().len(), 0);
    let mut news = false;
    for (counter, seen) in counters().iter().zip(seen) {
        let count = counter.load(Ordering::Relaxed);
        let bit = if count == 0 { 0 } else { 1 << count.ilog2() };
        news |= bit & !*seen != 0;
        *seen |= bit;
    }
    news
}
