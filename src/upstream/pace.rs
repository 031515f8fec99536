//! How fast a backlog is replayed: not so fast that a cloud that has just come back is run over, never so slow that the backlog grows.

use std::time::{Duration, Instant};

use crate::units::Rate;

/// A bucket that fills at `replay_rate_max` and, besides, by every message that arrives meanwhile: the backlog shrinks by the rate, whatever comes in.
#[derive(Clone, Debug)]
pub struct Pace {
    nanos_per_token: u64,
    burst: f64,
    /// May be negative: a batch is let through whole and paid for afterwards.
    tokens: f64,
    filled: Instant,
    appended: u64,
}

impl Pace {
    pub fn new(rate: &Rate, appended: u64, now: Instant) -> Self {
        let burst = f64::from(rate.burst.max(1));
        Pace { nanos_per_token: rate.nanos_per_token().max(1), burst, tokens: burst, filled: now, appended }
    }

    /// Takes `records` and says how long to wait before they are sent. `appended` is what the queue has taken in its life.
    pub fn take(&mut self, records: usize, appended: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled).as_nanos() as f64;
        self.filled = now;
        // Time saves up a burst at the most; what has arrived counts in full.
        if self.tokens < self.burst {
            self.tokens = (self.tokens + passed / self.nanos_per_token as f64).min(self.burst);
        }
        let arrived = appended.saturating_sub(self.appended);
        self.appended = appended;
        self.tokens += arrived as f64 - records as f64;
        let owed = (-self.tokens).max(0.0) * self.nanos_per_token as f64;
        Duration::from_nanos(owed.min(PAUSE_NANOS_MAX) as u64)
    }

    /// The queue keeps up: what arrived so far is no backlog.
    pub fn live(&mut self, appended: u64, now: Instant) {
        self.take(0, appended, now);
        self.tokens = self.tokens.min(self.burst);
    }
}

/// No single pause is longer, so that a low rate and a large batch do not look like a standstill.
const PAUSE_NANOS_MAX: f64 = 60e9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_is_replayed_at_the_rate_after_the_burst() {
        let start = Instant::now();
        let mut pace = Pace::new(&Rate::per_second(100, 100), 0, start);
        assert_eq!(pace.take(100, 0, start), Duration::ZERO);
        assert_eq!(pace.take(100, 0, start), Duration::from_secs(1));
        assert_eq!(pace.take(100, 0, start + Duration::from_secs(1)), Duration::from_secs(1));
        assert_eq!(pace.take(50, 0, start + Duration::from_secs(60)), Duration::ZERO);
    }

    #[test]
    fn what_arrives_meanwhile_does_not_slow_the_replay() {
        let start = Instant::now();
        let mut pace = Pace::new(&Rate::per_second(100, 1), 0, start);
        let (mut now, mut appended, mut sent) = (start, 0, 0u64);
        // A thousand messages arrive each second; ten seconds of replay send them and a thousand of the backlog.
        while now < start + Duration::from_secs(10) {
            let pause = pace.take(100, appended, now).max(Duration::from_millis(1));
            sent += 100;
            now += pause;
            appended = (now - start).as_millis() as u64;
        }
        assert!((10_800..=11_300).contains(&sent), "{sent}");
    }

    #[test]
    fn live_traffic_saves_up_no_more_than_a_burst() {
        let start = Instant::now();
        let mut pace = Pace::new(&Rate::per_second(10, 10), 0, start);
        pace.live(1_000_000, start);
        assert_eq!(pace.take(20, 1_000_000, start), Duration::from_secs(1));
    }
}
