//! Harness for real daemons and microVMs in tests.
//!
//! A test starts a whole FAR ([`Far::start`]) in folders of its own, drives it by the same commands a user has (`far`,
//! `kubectl`), and at the end the harness checks that nothing is left behind. Waiting is always for a predicate, within
//! [`PATIENCE`]: machines that run this are slow and shared.
#![forbid(unsafe_code)]

mod far;
pub mod find;
pub mod images;
pub mod processes;
pub mod servers;

pub use far::{Far, Options, Run};

use std::time::{Duration, Instant};

/// How long a predicate may take before a test gives up. One boot under TCG took up to 31 s on a busy machine; this is
/// a bound against hanging, never a measurement.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Asks `probe` again until it answers, at most [`PATIENCE`].
///
/// # Panics
/// When time is up; the text names what was waited for and the last thing seen.
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        let seen = match probe() {
            Ok(found) => return found,
            Err(seen) => seen,
        };
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} for {what}; last seen: {seen}"
        );
        // The pause between two looks, not a wait for something to have happened.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Says that a test cannot run here and why. The runner counts these lines; CI fails on ones it does not expect.
pub fn skip(test: &str, missing: &str) {
    eprintln!("SKIPPED {test}: {missing}");
}
