//! Credit of one direction of one stream. Pure.

use far_proto::frame::{CHANNEL_WINDOW, MAX_CREDIT};

/// What we may still send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowance(usize);

impl Allowance {
    pub(crate) fn new() -> Self {
        Self(CHANNEL_WINDOW)
    }

    pub(crate) fn left(self) -> usize {
        self.0
    }

    /// `bytes` were sent; never more than [`Self::left`].
    pub(crate) fn spend(&mut self, bytes: usize) {
        self.0 = self.0.saturating_sub(bytes);
    }

    /// The host gave more; what exceeds the contract's bound is cut.
    pub(crate) fn give(&mut self, bytes: u32) {
        self.0 = self.0.saturating_add(bytes as usize).min(MAX_CREDIT);
    }
}

/// What the host may still send, and what it is to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grant {
    left: usize,
    consumed: usize,
}

/// The host sent more than it was given.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overrun;

impl Grant {
    pub(crate) fn new() -> Self {
        Self {
            left: CHANNEL_WINDOW,
            consumed: 0,
        }
    }

    /// `bytes` came.
    pub(crate) fn take(&mut self, bytes: usize) -> Result<(), Overrun> {
        self.left = self.left.checked_sub(bytes).ok_or(Overrun)?;
        Ok(())
    }

    /// `bytes` of what came are no longer held.
    pub(crate) fn consume(&mut self, bytes: usize) {
        self.consumed += bytes;
    }

    /// Credit to give back now: a quarter of the window at a time, so that single bytes are not answered one by one.
    pub(crate) fn due(&mut self) -> Option<u32> {
        if self.consumed < CHANNEL_WINDOW / 4 {
            return None;
        }
        let bytes = std::mem::take(&mut self.consumed);
        self.left += bytes;
        u32::try_from(bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_host_that_sends_more_than_it_was_given_is_seen() {
        let mut grant = Grant::new();
        grant.take(CHANNEL_WINDOW).unwrap();
        assert_eq!(grant.take(1), Err(Overrun));
        grant.consume(CHANNEL_WINDOW / 4);
        assert_eq!(grant.due(), Some(CHANNEL_WINDOW as u32 / 4));
        grant.take(CHANNEL_WINDOW / 4).unwrap();
        assert_eq!(grant.take(1), Err(Overrun));
    }

    #[test]
    fn credit_that_was_given_is_bounded() {
        let mut allowance = Allowance::new();
        allowance.give(u32::MAX);
        allowance.give(u32::MAX);
        assert_eq!(allowance.left(), MAX_CREDIT);
    }

    proptest! {
        /// A sender that respects its credit never overruns, never gets stuck, and the receiver never holds more than
        /// the window.
        #[test]
        fn honest_senders_always_get_through(sizes in proptest::collection::vec(1_usize..CHANNEL_WINDOW, 1..200)) {
            let (mut allowance, mut grant) = (Allowance::new(), Grant::new());
            for mut size in sizes {
                while size > 0 {
                    let part = size.min(allowance.left());
                    prop_assert!(part > 0, "stuck");
                    allowance.spend(part);
                    prop_assert_eq!(grant.take(part), Ok(()));
                    grant.consume(part);
                    if let Some(credit) = grant.due() {
                        allowance.give(credit);
                    }
                    prop_assert!(allowance.left() <= CHANNEL_WINDOW);
                    size -= part;
                }
            }
        }
    }
}
