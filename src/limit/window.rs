//! A sliding window, counted in slots.
//!
//! A window of length W is cut into [`SLOTS`] - 1 slots of a seventh of W each; one more is kept, for the one that the window's beginning lies in. What
//! is in any of them counts in full, so the error is on the safe side: never more than the count in any stretch of length W, and what was taken comes
//! back between W and 8/7 W later. A log of arrivals would be exact and as large as the count; the usual pair of counters, weighted, lets nearly twice the
//! count through across its boundary.

use std::time::Duration;

use super::gcra::Left;
use super::keyed::Count;
use crate::units::SlidingRate;

const SLOTS: usize = 8;

/// What one sender has taken lately. 48 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// The number of the newest slot, counted from the start of the clock.
    newest: u64,
    /// When all of it will have left the window.
    empty_at: u64,
    /// By the slot's number modulo their count.
    taken: [u32; SLOTS],
}

impl Count for Window {
    type Rate = SlidingRate;

    fn take(&mut self, now_nanos: u64, rate: SlidingRate, cost: u32) -> Result<Left, Duration> {
        let length = slot_nanos(rate);
        // Another thread may have read its clock a little later.
        let now_slot = (now_nanos / length).max(self.newest);
        self.slide(now_slot);
        let used: u64 = self.taken.iter().map(|taken| u64::from(*taken)).sum();
        let count = u64::from(rate.count);
        let cost = u64::from(cost);
        if used + cost > count {
            return Err(Duration::from_nanos(self.wait(used + cost - count, length).saturating_sub(now_nanos).max(1)));
        }
        if let Some(taken) = self.taken.get_mut(place(now_slot)) {
            *taken = taken.saturating_add(u32::try_from(cost).unwrap_or(u32::MAX));
        }
        if cost > 0 {
            self.empty_at = leaves_at(now_slot, length);
        }
        let tokens = u32::try_from(count - used - cost).unwrap_or(u32::MAX);
        Ok(Left { tokens, full_in: Duration::from_nanos(self.empty_at.saturating_sub(now_nanos)) })
    }

    fn is_as_new(&self, now_nanos: u64) -> bool {
        self.empty_at <= now_nanos
    }
}

impl Window {
    /// Forgets what lies before the slots that end with `now_slot`.
    fn slide(&mut self, now_slot: u64) {
        let passed = (now_slot - self.newest).min(SLOTS as u64);
        for slot in now_slot + 1 - passed..=now_slot {
            if let Some(taken) = self.taken.get_mut(place(slot)) {
                *taken = 0;
            }
        }
        self.newest = now_slot;
    }

    /// When at least `excess` of what was taken has left the window; when it is empty, if there is less.
    fn wait(&self, mut excess: u64, length: u64) -> u64 {
        let oldest = (self.newest + 1).saturating_sub(SLOTS as u64);
        for slot in oldest..=self.newest {
            let taken = u64::from(self.taken.get(place(slot)).copied().unwrap_or(0));
            if taken >= excess {
                return leaves_at(slot, length);
            }
            excess -= taken;
        }
        self.empty_at
    }
}

fn place(slot: u64) -> usize {
    (slot % SLOTS as u64) as usize
}

fn leaves_at(slot: u64, length: u64) -> u64 {
    slot.saturating_add(SLOTS as u64).saturating_mul(length)
}

/// Rounded up, so that seven of them are never less than the window.
fn slot_nanos(rate: SlidingRate) -> u64 {
    let period = u64::try_from(rate.period.duration().as_nanos()).unwrap_or(u64::MAX);
    period.div_ceil(SLOTS as u64 - 1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Period;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn rate(count: u32) -> SlidingRate {
        SlidingRate { count, period: Period::Second }
    }

    #[test]
    fn a_burst_before_the_boundary_leaves_nothing_after_it() {
        // Where fixed windows would let both through.
        let mut window = Window::default();
        assert!((0..10).all(|_| window.take(SECOND - 1, rate(10), 1).is_ok()));
        assert!(window.take(SECOND, rate(10), 1).is_err());
        assert!(window.take(2 * SECOND - 2, rate(10), 1).is_err());
        assert!(window.take(SECOND - 1 + SECOND / 7 * 8 + 8, rate(10), 10).is_ok());
    }

    #[test]
    fn what_is_left_and_when_all_is_back_are_told() {
        let mut window = Window::default();
        let slot = slot_nanos(rate(3));
        assert_eq!(window.take(0, rate(3), 1), Ok(Left { tokens: 2, full_in: Duration::from_nanos(8 * slot) }));
        assert_eq!(window.take(slot, rate(3), 2), Ok(Left { tokens: 0, full_in: Duration::from_nanos(8 * slot) }));
        assert_eq!(window.take(slot, rate(3), 1), Err(Duration::from_nanos(7 * slot)), "the first one leaves first");
        assert_eq!(window.take(slot, rate(3), 9), Err(Duration::from_nanos(8 * slot)), "more than there ever is");
        assert!(!window.is_as_new(9 * slot - 1) && window.is_as_new(9 * slot));
    }

    #[test]
    fn looking_takes_nothing() {
        let mut window = Window::default();
        assert_eq!(window.take(5 * SECOND, rate(3), 0), Ok(Left { tokens: 3, full_in: Duration::ZERO }));
        assert!(window.is_as_new(0));
    }

    #[test]
    fn a_clock_read_earlier_does_no_harm() {
        let mut window = Window::default();
        assert!(window.take(3 * SECOND, rate(2), 1).is_ok());
        assert!(window.take(2 * SECOND, rate(2), 1).is_ok());
        assert!(window.take(3 * SECOND, rate(2), 1).is_err());
    }

    proptest! {
        #[test]
        fn no_stretch_as_long_as_the_window_holds_more_than_the_count(
            count in 1u32..20,
            start in 0u64..u64::MAX / 4,
            steps in prop::collection::vec((prop_oneof![0u64..SECOND / 50, 0u64..SECOND], 1u32..4), 1..300),
        ) {
            let mut window = Window::default();
            let mut now = start;
            let mut admitted: Vec<(u64, u32)> = Vec::new();
            for (wait, cost) in steps {
                now += wait;
                if window.take(now, rate(count), cost).is_ok() {
                    admitted.push((now, cost));
                    let within: u32 = admitted.iter().filter(|(at, _)| *at + SECOND > now).map(|(_, cost)| cost).sum();
                    prop_assert!(within <= count, "{within} of {count}");
                }
            }
        }

        #[test]
        fn who_keeps_to_seven_eighths_of_the_rate_is_never_refused(
            count in 1u32..50,
            start in 0u64..u64::MAX / 4,
            jitters in prop::collection::vec(0u64..SECOND, 1..300),
        ) {
            let mut window = Window::default();
            let apart = (8 * slot_nanos(rate(count))).div_ceil(u64::from(count));
            let mut now = start;
            for jitter in jitters {
                now += apart + jitter;
                prop_assert!(window.take(now, rate(count), 1).is_ok());
            }
        }

        #[test]
        fn after_the_stated_wait_the_same_cost_passes_and_just_before_it_does_not(
            count in 1u32..20,
            start in 0u64..u64::MAX / 4,
            steps in prop::collection::vec((0u64..SECOND / 4, 1u32..5), 1..200),
        ) {
            let mut window = Window::default();
            let mut now = start;
            for (wait, cost) in steps {
                now += wait;
                if cost > count {
                    continue;
                }
                if let Err(wait) = window.take(now, rate(count), cost) {
                    let then = now + wait.as_nanos() as u64;
                    prop_assert!(window.take(then - 1, rate(count), cost).is_err());
                    prop_assert!(window.take(then, rate(count), cost).is_ok());
                    break;
                }
            }
        }

        #[test]
        fn what_is_as_new_may_be_forgotten(
            takes in prop::collection::vec((0u64..SECOND, 0u32..4), 1..20),
            later in 0u64..3 * SECOND,
            cost in 0u32..5,
        ) {
            let mut window = Window::default();
            let mut now = 0;
            for (wait, cost) in takes {
                now += wait;
                let _ = window.take(now, rate(5), cost);
            }
            now += later;
            if window.is_as_new(now) {
                prop_assert_eq!(window.take(now, rate(5), cost), Window::default().take(now, rate(5), cost));
            }
        }
    }
}
