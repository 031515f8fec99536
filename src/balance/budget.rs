//! The retry budget: retries are a share of the requests, so that they cannot multiply an outage.

use std::time::Instant;

use super::config::RetryConfig;

/// Tokens for retries. Requests pay in, retries take out; a little flows in with time.
#[derive(Clone, Debug)]
pub struct RetryBudget {
    budget_percent: u32,
    per_second_min: u32,
    /// In hundredths of a retry.
    credit: u64,
    paid_until: Instant,
}

const RETRY: u64 = 100;
/// Seconds of income, and retries, that may be saved up.
const SAVED_MAX: u64 = 10;

impl RetryBudget {
    pub fn new(config: &RetryConfig, now: Instant) -> Self {
        RetryBudget {
            budget_percent: config.budget_percent,
            per_second_min: config.per_second_min,
            credit: u64::from(config.per_second_min) * RETRY,
            paid_until: now,
        }
    }

    /// Counts a first attempt.
    pub fn request(&mut self) {
        self.credit = (self.credit + u64::from(self.budget_percent)).min(self.credit_max());
    }

    /// Takes one retry from the budget; false: pass the failure on.
    pub fn take_retry(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.paid_until).as_millis();
        let income = u128::from(self.per_second_min) * elapsed * u128::from(RETRY) / 1_000;
        // What is too little to be paid yet is paid with the next.
        if income > 0 {
            self.paid_until = now;
            self.credit = self.credit.saturating_add(u64::try_from(income).unwrap_or(u64::MAX)).min(self.credit_max());
        }
        if self.credit < RETRY {
            return false;
        }
        self.credit -= RETRY;
        true
    }

    fn credit_max(&self) -> u64 {
        // Requests may save up a hundred requests' share, or ten retries if that is more.
        let of_requests = u64::from(self.budget_percent) * 100;
        (of_requests + u64::from(self.per_second_min) * RETRY * SAVED_MAX)
            .max(RETRY * u64::from(self.budget_percent.min(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    #[test]
    fn without_requests_only_the_trickle_is_there() {
        let now = Instant::now();
        let mut budget = RetryBudget::new(&RetryConfig::default(), now);
        assert!(budget.take_retry(now));
        assert!(!budget.take_retry(now));
        assert!(!budget.take_retry(now + Duration::from_millis(999)));
        assert!(budget.take_retry(now + Duration::from_millis(2_000)));
    }

    #[test]
    fn a_budget_of_nothing_gives_nothing() {
        let now = Instant::now();
        let config = RetryConfig { budget_percent: 0, per_second_min: 0, ..RetryConfig::default() };
        let mut budget = RetryBudget::new(&config, now);
        for _ in 0..1_000 {
            budget.request();
        }
        assert!(!budget.take_retry(now + Duration::from_secs(3_600)));
    }

    proptest! {
        #[test]
        fn retries_never_exceed_the_share_and_the_trickle(
            percent in 0u32..200, trickle in 0u32..10,
            steps in prop::collection::vec((any::<bool>(), 0u64..500), 1..500),
        ) {
            let start = Instant::now();
            let config = RetryConfig { budget_percent: percent, per_second_min: trickle, ..RetryConfig::default() };
            let mut budget = RetryBudget::new(&config, start);
            let (mut now, mut requests, mut retries) = (start, 0u64, 0u64);
            for (is_request, wait) in steps {
                now += Duration::from_millis(wait);
                if is_request {
                    budget.request();
                    requests += 1;
                } else if budget.take_retry(now) {
                    retries += 1;
                }
                let elapsed_ms = (now - start).as_millis() as u64;
                let hundredths = requests * u64::from(percent) + u64::from(trickle) * 100 + u64::from(trickle) * elapsed_ms / 10;
                prop_assert!(retries * 100 <= hundredths);
            }
        }
    }
}
