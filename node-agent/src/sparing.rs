//! Keeps what strangers provoke out of the log's way: the first few lines are written, later ones only counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Lines that are written per source.
const WRITTEN: u64 = 8;

/// Counts one source of lines, such as a listener.
#[derive(Debug, Default)]
pub(crate) struct Sparing(AtomicU64);

impl Sparing {
    /// The line's number while it is to be written; `None` for those that are only counted.
    pub(crate) fn next(&self) -> Option<u64> {
        let number = self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        (number <= WRITTEN).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_few_lines_of_a_source_are_written() {
        let sparing = Sparing::default();
        let written = (0..10_000).filter(|_| sparing.next().is_some()).count();
        assert_eq!(written, 8);
    }
}
