//! What waits in all outboxes together: many subscribers that are each a little slow must not fill the memory either.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of [`Message::cost_bytes`](crate::message::Message::cost_bytes), of one gateway. An outbox reports in steps of [`STEP_BYTES`], so that one whose
/// messages leave as they come reports nothing; a message that waits in several outboxes counts in each.
#[derive(Debug)]
pub struct Total {
    bytes: AtomicUsize,
    bytes_max: AtomicUsize,
}

/// What an outbox may hold beyond what it has reported.
const STEP_BYTES: usize = 1024;

impl Default for Total {
    /// Without bound.
    fn default() -> Self {
        Total::new(usize::MAX)
    }
}

impl Total {
    pub fn new(bytes_max: usize) -> Self {
        Total { bytes: AtomicUsize::new(0), bytes_max: AtomicUsize::new(bytes_max) }
    }

    /// Another bound, from now on.
    pub fn set_max(&self, bytes_max: usize) {
        self.bytes_max.store(bytes_max, Ordering::Relaxed);
    }

    /// Whether there is more than `factor` times the bound.
    pub fn is_above(&self, factor: usize) -> bool {
        self.bytes.load(Ordering::Relaxed) > self.bytes_max.load(Ordering::Relaxed).saturating_mul(factor)
    }

    /// Takes note of what an outbox holds now; `reported` is its own.
    pub fn report(&self, reported: &mut usize, bytes: usize) {
        if bytes.abs_diff(*reported) < STEP_BYTES && (bytes > 0 || *reported == 0) {
            return;
        }
        if bytes > *reported {
            self.bytes.fetch_add(bytes - *reported, Ordering::Relaxed);
        } else {
            self.bytes.fetch_sub(*reported - bytes, Ordering::Relaxed);
        }
        *reported = bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_reported_and_everything_is_given_back() {
        let (total, mut reported) = (Total::new(3000), 0);
        total.report(&mut reported, 1000);
        assert_eq!(reported, 0);
        total.report(&mut reported, 3001);
        assert!(total.is_above(1) && !total.is_above(2));
        total.report(&mut reported, 2500);
        assert_eq!(reported, 3001);
        total.report(&mut reported, 0);
        assert_eq!((reported, total.bytes.load(Ordering::Relaxed)), (0, 0));
        total.report(&mut reported, 3001);
        total.set_max(5000);
        assert!(!total.is_above(1));
    }
}
