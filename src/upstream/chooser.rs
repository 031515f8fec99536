//! Which endpoint of an upstream an attempt goes to: the balancer, what the health checks say, and the budget of retries.
//! Each user of an upstream has its own (the deliveries, and the request plane of every worker).

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{Counter, Histogram, counter, histogram};
use parking_lot::Mutex;

use super::health::Health;
use super::random::Random;
use super::{Config, settings};
use crate::balance::{Balancer, EndpointIndex, Outcome, RetryBudget};
use crate::telemetry::{UPSTREAM_REQUEST_SECONDS, UPSTREAM_REQUESTS_TOTAL};

pub struct Chooser {
    health: Arc<Health>,
    state: Mutex<State>,
}

struct State {
    balancer: Balancer,
    budget: RetryBudget,
    random: Random,
    /// The version of [`Health`] that the balancer knows.
    health: u64,
}

impl Chooser {
    pub fn new(config: &Config, health: Arc<Health>, now: Instant) -> Self {
        let balancer = Balancer::new(settings(config), &config.endpoints, now);
        let state = State { balancer, budget: RetryBudget::new(&config.retry, now), random: Random::new(), health: 0 };
        Chooser { health, state: Mutex::new(state) }
    }

    /// Reads what is known about the endpoints.
    pub fn with_balancer<T>(&self, read: impl FnOnce(&Balancer) -> T) -> T {
        let mut state = self.state.lock();
        self.learn_health(&mut state, Instant::now());
        read(&state.balancer)
    }

    /// An endpoint to send to that is not among `tried`; a first attempt feeds the budget of retries, a retry
    /// has to be in it. `key` steers hashing algorithms. Whoever gets one has to [`Self::report`].
    pub fn pick(&self, key: u64, tried: &[EndpointIndex], is_retry: bool, now: Instant) -> Option<EndpointIndex> {
        let mut state = self.state.lock();
        self.learn_health(&mut state, now);
        let random = state.random.next();
        let picked = state.balancer.pick(Some(key), now, random, tried)?;
        if !is_retry {
            state.budget.request();
        } else if !state.budget.take_retry(now) {
            state.balancer.report(picked, Outcome::Cancelled, Duration::ZERO, now);
            return None;
        }
        Some(picked)
    }

    /// How a picked endpoint did, and how long that took.
    pub fn report(&self, picked: EndpointIndex, outcome: Outcome, took: Duration, now: Instant) {
        self.state.lock().balancer.report(picked, outcome, took, now);
    }

    fn learn_health(&self, state: &mut State, now: Instant) {
        let version = self.health.version();
        if state.health != version {
            state.health = version;
            for (index, is_healthy) in self.health.all().enumerate() {
                state.balancer.set_health(EndpointIndex(index), is_healthy, now);
            }
        }
    }
}

/// What is counted about the requests to one upstream.
pub struct Meters {
    pub ok: Counter,
    pub refused: Counter,
    pub error: Counter,
    pub seconds: Histogram,
}

impl Meters {
    pub fn new(upstream: &str) -> Self {
        let outcome = |outcome: &'static str| counter!(UPSTREAM_REQUESTS_TOTAL, "upstream" => upstream.to_owned(), "outcome" => outcome);
        Meters {
            ok: outcome("ok"),
            refused: outcome("refused"),
            error: outcome("error"),
            seconds: histogram!(UPSTREAM_REQUEST_SECONDS, "upstream" => upstream.to_owned()),
        }
    }
}
