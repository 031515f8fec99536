//! The generic cell rate algorithm: a token bucket in one integer.
//!
//! The integer is the theoretical arrival time (TAT): the instant at which the bucket would be full again. A bucket that was never
//! used holds zero and is full. Source: ITU-T I.371 annex A, in the form that counts from the far end:
//! a cell of cost `c` conforms if `max(TAT, now) + c * T <= now + burst * T`.

use std::time::Duration;

use portable_atomic::{AtomicU64, Ordering};

use super::keyed::Count;
use crate::units::Rate;

/// One lock-free token bucket. Eight bytes; the rate comes with each check, so that a reload changes it at once.
#[derive(Debug, Default)]
pub struct Gcra {
    tat: AtomicU64,
}

impl Gcra {
    pub const fn new() -> Self {
        Gcra { tat: AtomicU64::new(0) }
    }

    /// Takes `cost` tokens, or takes none and says when as many will be there.
    ///
    /// # Errors
    /// The time to wait. A cost above the burst never conforms; the answer is then the time to the full bucket, and the caller
    /// does better to refuse by size.
    pub fn check(&self, now_nanos: u64, rate: Rate, cost: u32) -> Result<(), Duration> {
        let mut seen = self.tat.load(Ordering::Relaxed);
        loop {
            let (next, verdict) = advance(seen, now_nanos, rate, cost);
            if next == seen {
                return verdict;
            }
            // Relaxed is enough: the bucket guards nothing but itself.
            match self.tat.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return verdict,
                Err(other) => seen = other,
            }
        }
    }

    /// True when the bucket is full, so that forgetting it changes nothing.
    pub fn is_full(&self, now_nanos: u64) -> bool {
        self.tat.load(Ordering::Relaxed) <= now_nanos
    }
}

/// A TAT this far beyond what the rate can leave behind was left by a slower rate before a reload. Less than that may be
/// another thread that read its clock later, and must not be forgiven.
const STALE_NANOS: u64 = 1_000_000_000;

/// The theoretical arrival time to keep, and whether `cost` tokens were taken at `now` or how long to wait for them.
pub(super) fn advance(tat: u64, now_nanos: u64, rate: Rate, cost: u32) -> (u64, Result<(), Duration>) {
    let interval = rate.nanos_per_token();
    let depth = interval.saturating_mul(u64::from(rate.burst.max(1)));
    let limit = now_nanos.saturating_add(depth);
    if cost == 0 {
        return (tat, Ok(()));
    }
    // After a reload an empty bucket of the new rate is the worst that the old debt can mean.
    let kept = if tat > limit.saturating_add(STALE_NANOS) { limit } else { tat };
    let base = kept.max(now_nanos);
    let price = interval.saturating_mul(u64::from(cost));
    let next = base.saturating_add(price);
    if next <= limit {
        return (next, Ok(()));
    }
    let wait = if price > depth { base - now_nanos } else { next - limit };
    (kept, Err(Duration::from_nanos(wait.max(1))))
}

/// The same bucket for one owner at a time, as a table keeps it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tat(u64);

impl Count for Tat {
    type Rate = Rate;

    fn take(&mut self, now_nanos: u64, rate: Rate, cost: u32) -> Result<Left, Duration> {
        let (next, verdict) = advance(self.0, now_nanos, rate, cost);
        self.0 = next;
        verdict.map(|()| left(next, now_nanos, rate))
    }

    fn is_as_new(&self, now_nanos: u64) -> bool {
        self.0 <= now_nanos
    }
}

/// What is left in a bucket, or of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    pub tokens: u32,
    /// Until all of it is there again.
    pub full_in: Duration,
}

fn left(tat: u64, now_nanos: u64, rate: Rate) -> Left {
    let interval = rate.nanos_per_token().max(1);
    let depth = interval.saturating_mul(u64::from(rate.burst.max(1)));
    let debt = tat.saturating_sub(now_nanos);
    let tokens = u32::try_from(depth.saturating_sub(debt) / interval).unwrap_or(u32::MAX);
    Left { tokens, full_in: Duration::from_nanos(debt) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Period;
    use proptest::prelude::*;

    fn any_rate() -> impl Strategy<Value = Rate> {
        (1u32..2_000_000, prop_oneof![Just(Period::Second), Just(Period::Minute), Just(Period::Hour)], 1u32..5_000)
            .prop_map(|(count, period, burst)| Rate { count, period, burst })
    }

    #[test]
    fn a_new_bucket_is_full_at_time_zero() {
        let bucket = Gcra::new();
        let rate = Rate::per_second(1, 3);
        for _ in 0..3 {
            assert_eq!(bucket.check(0, rate, 1), Ok(()));
        }
        assert_eq!(bucket.check(0, rate, 1), Err(Duration::from_secs(1)));
        assert_eq!(bucket.check(1_000_000_000, rate, 1), Ok(()));
    }

    #[test]
    fn a_cost_above_the_burst_never_passes_and_takes_nothing() {
        let bucket = Gcra::new();
        let rate = Rate::per_second(10, 2);
        assert!(bucket.check(5, rate, 3).is_err());
        assert_eq!(bucket.check(5, rate, 2), Ok(()));
    }

    #[test]
    fn a_faster_rate_takes_effect_at_once() {
        let bucket = Gcra::new();
        let slow: Rate = "1/h burst 10".parse().unwrap();
        for _ in 0..10 {
            assert_eq!(bucket.check(0, slow, 1), Ok(()));
        }
        let fast = Rate::per_second(100, 10);
        assert_eq!(bucket.check(0, fast, 1), Err(Duration::from_millis(10)));
        assert_eq!(bucket.check(10_000_000, fast, 1), Ok(()));
    }

    #[test]
    fn threads_that_race_for_one_bucket_get_the_burst_between_them() {
        let bucket = Gcra::new();
        let rate = Rate::per_second(1, 1_000);
        let admitted: u32 = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..1_000).filter(|_| bucket.check(7, rate, 1).is_ok()).count() as u32))
                .collect();
            workers.into_iter().map(|w| w.join().unwrap()).sum()
        });
        assert_eq!(admitted, 1_000);
    }

    proptest! {
        #[test]
        fn never_admits_more_than_the_burst_and_the_rate_allow(
            rate in any_rate(),
            start in 0u64..u64::MAX / 4,
            steps in prop::collection::vec((0u64..50_000_000_000, 1u32..20), 1..200),
        ) {
            let bucket = Gcra::new();
            let (mut now, mut admitted) = (start, 0u64);
            for (wait, cost) in steps {
                now += wait;
                if bucket.check(now, rate, cost).is_ok() {
                    admitted += u64::from(cost);
                }
                let allowed = u64::from(rate.burst) + (now - start) / rate.nanos_per_token();
                prop_assert!(admitted <= allowed, "{admitted} > {allowed}");
            }
        }

        #[test]
        fn always_admits_a_sender_that_keeps_to_the_rate(
            rate in any_rate(),
            start in 0u64..u64::MAX / 4,
            early in prop::collection::vec(0u64..1_000_000, 1..200),
        ) {
            // Message n leaves at n intervals or later, and no more than the burst ahead of it.
            let bucket = Gcra::new();
            let interval = rate.nanos_per_token();
            for (n, jitter) in early.into_iter().enumerate() {
                let now = start + n as u64 * interval + jitter.min(interval - 1);
                prop_assert_eq!(bucket.check(now, rate, 1), Ok(()));
            }
        }

        #[test]
        fn after_the_stated_wait_the_same_cost_passes_and_just_before_it_does_not(
            rate in any_rate(),
            now in 0u64..u64::MAX / 4,
            costs in prop::collection::vec(1u32..50, 1..200),
        ) {
            let bucket = Gcra::new();
            for cost in costs {
                if cost > rate.burst {
                    continue;
                }
                if let Err(wait) = bucket.check(now, rate, cost) {
                    let then = now + wait.as_nanos() as u64;
                    prop_assert!(bucket.check(then - 1, rate, cost).is_err());
                    prop_assert_eq!(bucket.check(then, rate, cost), Ok(()));
                    break;
                }
            }
        }
    }
}
