//! When a queue will be empty, from how it has shrunk of late.

use std::time::{Duration, Instant};

/// Follows one queue. Looks at it at most once a second, whoever asks how often.
#[derive(Debug, Default)]
pub(super) struct Eta {
    seen: Option<(Instant, u64)>,
    /// Messages a second by which it shrinks; negative when it grows.
    rate: Option<f64>,
}

impl Eta {
    /// Seconds until the queue is empty at the present rate: 0 when it is, infinite when it does not shrink.
    pub fn secs(&mut self, queued: u64, now: Instant) -> f64 {
        let (since, before) = *self.seen.get_or_insert((now, queued));
        let passed = now.saturating_duration_since(since);
        if passed >= LOOK_EVERY {
            let rate = (before as f64 - queued as f64) / passed.as_secs_f64();
            self.rate = Some(self.rate.map_or(rate, |known| known * (1.0 - WEIGHT) + rate * WEIGHT));
            self.seen = Some((now, queued));
        }
        match self.rate {
            _ if queued == 0 => 0.0,
            Some(rate) if rate > 0.0 => queued as f64 / rate,
            Some(_) | None => f64::INFINITY,
        }
    }
}

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How much the newest look counts.
const WEIGHT: f64 = 0.5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_shrinks_steadily_ends_when_it_is_said_to() {
        let start = Instant::now();
        let mut eta = Eta::default();
        let at = |secs: u64| start + Duration::from_secs(secs);
        assert_eq!(eta.secs(1000, at(0)), f64::INFINITY, "nothing is known yet");
        assert_eq!(eta.secs(900, at(10)), 90.0);
        assert_eq!(eta.secs(890, at(11)), 89.0);
        assert_eq!(eta.secs(0, at(12)), 0.0);
    }

    #[test]
    fn a_queue_that_grows_has_no_end() {
        let start = Instant::now();
        let mut eta = Eta::default();
        eta.secs(10, start);
        assert_eq!(eta.secs(20, start + Duration::from_secs(5)), f64::INFINITY);
        assert!(eta.secs(0, start + Duration::from_secs(6)) == 0.0);
    }
}
