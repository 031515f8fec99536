//! What is known about one endpoint: is it there, how busy is it, how fast does it answer.
//!
//! Three judges, each able to set it aside: the active health check (`set_health`), ejection after errors in a row, and the circuit
//! breaker by the share of errors. Ejection is bounded to a share of all endpoints; the breaker is not, for it also protects a single
//! backend from being hammered.

use std::time::{Duration, Instant};

use super::config::{BreakerConfig, EndpointConfig, Settings};

/// Time constant of the response-time average.
const TAU_SECS: f64 = 10.0;
/// What an error counts as in response time, at least: a fast failure must not look attractive.
const ERROR_SECS_MIN: f64 = 0.1;
const ERROR_FACTOR: f64 = 2.0;
/// Share of its weight with which a returning endpoint begins.
const SLOW_START_SHARE: f64 = 0.1;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An answer that says nothing against the endpoint (also a 4xx).
    Success,
    /// No answer, a broken one, or one that blames the endpoint (5xx).
    Failure,
    /// Given up by the asker before the endpoint could show anything.
    Cancelled,
}

/// Why an endpoint gets no requests, or that it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Available,
    /// The active health check says so.
    Unhealthy,
    /// Too many errors in a row.
    Ejected,
    /// The circuit breaker is open.
    Open,
    /// The breaker lets a few requests through on trial.
    HalfOpen,
    /// `in_flight_max` is reached.
    Busy,
}

impl State {
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Available => "available",
            State::Unhealthy => "unhealthy",
            State::Ejected => "ejected",
            State::Open => "open",
            State::HalfOpen => "half_open",
            State::Busy => "busy",
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// Hash of the URL: the endpoint's place in rendezvous hashing, the same after every restart.
    pub id: u64,
    pub url: String,
    pub weight: u32,
    pub priority: u8,
    in_flight_max: u32,
    pub in_flight: u32,
    pub picks: u64,
    /// State of the smooth weighted round robin.
    pub turn: i64,
    healthy: bool,
    /// When it came back, while its share grows.
    warming_since: Option<Instant>,
    errors_in_a_row: u32,
    ejected_until: Option<Instant>,
    /// Ejections in a row, each one longer than the one before.
    pub ejections: u32,
    breaker: Breaker,
    response: ResponseTime,
}

impl Endpoint {
    pub fn new(config: &EndpointConfig, now: Instant) -> Self {
        Endpoint {
            id: super::hash::text(&config.url),
            url: config.url.clone(),
            weight: config.weight.clamp(1, 1_000),
            priority: config.priority,
            in_flight_max: config.in_flight_max.max(1),
            in_flight: 0,
            picks: 0,
            turn: 0,
            healthy: true,
            warming_since: None,
            errors_in_a_row: 0,
            ejected_until: None,
            ejections: 0,
            breaker: Breaker::Closed(Window::new(now)),
            response: ResponseTime { secs: None, sampled: now },
        }
    }

    /// What a reload keeps: the judgement on the endpoint, not the requests that the old balancer counts.
    pub fn inherit(&mut self, old: &Endpoint) {
        self.healthy = old.healthy;
        self.warming_since = old.warming_since;
        self.errors_in_a_row = old.errors_in_a_row;
        self.ejected_until = old.ejected_until;
        self.ejections = old.ejections;
        self.breaker = match old.breaker {
            // Trial requests under way belong to the old one; begin the trial again.
            Breaker::HalfOpen { .. } => Breaker::HalfOpen { started: 0, succeeded: 0 },
            ref other => other.clone(),
        };
        self.response = old.response.clone();
    }

    pub fn state(&self, settings: &Settings, now: Instant) -> State {
        if !self.healthy {
            return State::Unhealthy;
        }
        if self.ejected_until.is_some_and(|until| now < until) {
            return State::Ejected;
        }
        match &self.breaker {
            Breaker::Open { until } if now < *until => State::Open,
            Breaker::HalfOpen { started, .. } if *started >= settings.breaker.probes => State::Open,
            _ if self.in_flight >= self.in_flight_max => State::Busy,
            Breaker::Closed(_) => State::Available,
            Breaker::Open { .. } | Breaker::HalfOpen { .. } => State::HalfOpen,
        }
    }

    /// The earliest time at which it can return by itself.
    pub fn returns_at(&self, now: Instant) -> Option<Instant> {
        if !self.healthy {
            return None;
        }
        let open_until = match &self.breaker {
            Breaker::Open { until } => Some(*until),
            Breaker::Closed(_) | Breaker::HalfOpen { .. } => None,
        };
        self.ejected_until.max(open_until).filter(|at| *at > now)
    }

    pub fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }

    pub fn picked(&mut self, now: Instant) {
        self.in_flight += 1;
        self.picks += 1;
        if let Some(until) = self.ejected_until
            && now >= until
        {
            self.ejected_until = None;
            self.errors_in_a_row = 0;
            self.warming_since = Some(until);
        }
        match &mut self.breaker {
            Breaker::Closed(_) => {}
            Breaker::Open { .. } => self.breaker = Breaker::HalfOpen { started: 1, succeeded: 0 },
            Breaker::HalfOpen { started, .. } => *started += 1,
        }
    }

    /// Returns true when the errors in a row call for ejection.
    pub fn reported(&mut self, outcome: Outcome, latency: Duration, settings: &Settings, now: Instant) -> bool {
        self.in_flight = self.in_flight.saturating_sub(1);
        match outcome {
            Outcome::Cancelled => {
                if let Breaker::HalfOpen { started, .. } = &mut self.breaker {
                    *started = started.saturating_sub(1);
                }
                return false;
            }
            Outcome::Success => {
                self.response.sample(latency.as_secs_f64(), now);
                self.errors_in_a_row = 0;
                // Well for as long as it was last set aside: the next ejection is a first one again.
                let base = Duration::from_millis(settings.eject.base_ms.into());
                let well = |since: Instant| now.saturating_duration_since(since) > base * self.ejections;
                if self.ejections > 0 && self.ejected_until.is_none() && self.warming_since.is_none_or(well) {
                    self.ejections = 0;
                }
            }
            Outcome::Failure => {
                let known = self.response.secs.unwrap_or(0.0) * ERROR_FACTOR;
                self.response.sample(latency.as_secs_f64().max(known.min(60.0)).max(ERROR_SECS_MIN), now);
                self.errors_in_a_row = self.errors_in_a_row.saturating_add(1);
            }
        }
        let failed = outcome == Outcome::Failure;
        if self.breaker.reported(failed, &settings.breaker, now) {
            self.warming_since = Some(now);
        }
        failed && self.errors_in_a_row >= settings.eject.consecutive_errors && !self.is_ejected(now)
    }

    pub fn eject(&mut self, settings: &Settings, now: Instant) {
        self.ejections = self.ejections.saturating_add(1);
        let span = u64::from(settings.eject.base_ms).saturating_mul(self.ejections.into());
        self.ejected_until = Some(now + Duration::from_millis(span.min(settings.eject.max_ms.into())));
        self.errors_in_a_row = 0;
    }

    pub fn set_health(&mut self, healthy: bool, now: Instant) {
        if healthy && !self.healthy {
            self.warming_since = Some(now);
            self.errors_in_a_row = 0;
        }
        self.healthy = healthy;
    }

    /// The share of its weight that it gets now, in (0, 1].
    pub fn warmth(&self, settings: &Settings, now: Instant) -> f64 {
        let Some(since) = self.warming_since else { return 1.0 };
        let span = f64::from(settings.slow_start_ms) / 1_000.0;
        let passed = now.saturating_duration_since(since).as_secs_f64();
        if passed >= span {
            return 1.0;
        }
        SLOW_START_SHARE + (1.0 - SLOW_START_SHARE) * passed / span
    }

    /// Expected response time for one request more; infinite for an endpoint on trial that nobody has heard from.
    pub fn cost(&self, settings: &Settings, now: Instant) -> f64 {
        let load = f64::from(self.in_flight) + 1.0;
        match self.response.estimate(now) {
            Some(secs) => secs * load / (f64::from(self.weight) * self.warmth(settings, now)),
            // Unknown: one request finds out, further ones wait for its answer elsewhere.
            None if self.in_flight == 0 => 0.0,
            None => f64::MAX / 1e6 * load,
        }
    }

    /// The average response time, if it ever answered.
    pub fn response_secs(&self) -> Option<f64> {
        self.response.secs
    }
}

/// Peak-sensitive exponentially weighted moving average (Finagle's peak EWMA): rises at once, falls with time.
#[derive(Clone, Debug)]
struct ResponseTime {
    secs: Option<f64>,
    sampled: Instant,
}

impl ResponseTime {
    fn sample(&mut self, secs: f64, now: Instant) {
        let passed = now.saturating_duration_since(self.sampled).as_secs_f64();
        self.secs = Some(match self.secs {
            Some(known) if secs < known => {
                let kept = (-passed / TAU_SECS).exp();
                known * kept + secs * (1.0 - kept)
            }
            Some(_) | None => secs,
        });
        self.sampled = now;
    }

    /// Fades while nothing is heard, so that a slow endpoint is tried again.
    fn estimate(&self, now: Instant) -> Option<f64> {
        let silent = now.saturating_duration_since(self.sampled).as_secs_f64();
        self.secs.map(|secs| (secs * (-silent / TAU_SECS).exp()).max(1e-6))
    }
}

#[derive(Clone, Debug)]
enum Breaker {
    Closed(Window),
    Open { until: Instant },
    HalfOpen { started: u32, succeeded: u32 },
}

/// Answers and errors of this half window and of the one before.
#[derive(Clone, Debug)]
struct Window {
    since: Instant,
    current: (u32, u32),
    before: (u32, u32),
}

impl Breaker {
    /// Returns true when it has just closed.
    fn reported(&mut self, failed: bool, config: &BreakerConfig, now: Instant) -> bool {
        let open = |now: Instant| Breaker::Open { until: now + Duration::from_millis(config.open_ms.into()) };
        match self {
            Breaker::Closed(window) => {
                if window.reported(failed, config, now) {
                    *self = open(now);
                }
                false
            }
            // An answer to a request from before.
            Breaker::Open { .. } => false,
            Breaker::HalfOpen { .. } if failed => {
                *self = open(now);
                false
            }
            Breaker::HalfOpen { succeeded, .. } => {
                *succeeded += 1;
                let closes = *succeeded >= config.probes;
                if closes {
                    *self = Breaker::Closed(Window::new(now));
                }
                closes
            }
        }
    }
}

impl Window {
    fn new(now: Instant) -> Self {
        Window { since: now, current: (0, 0), before: (0, 0) }
    }

    /// Returns true when the share of errors is too high.
    fn reported(&mut self, failed: bool, config: &BreakerConfig, now: Instant) -> bool {
        let half = Duration::from_millis(u64::from(config.window_ms) / 2);
        let passed = now.saturating_duration_since(self.since);
        if passed >= half {
            self.before = if passed < half * 2 { self.current } else { (0, 0) };
            self.current = (0, 0);
            self.since = now;
        }
        self.current.0 = self.current.0.saturating_add(1);
        self.current.1 = self.current.1.saturating_add(u32::from(failed));
        let answers = u64::from(self.current.0) + u64::from(self.before.0);
        let errors = u64::from(self.current.1) + u64::from(self.before.1);
        failed && answers >= config.requests_min.into() && errors * 100 >= answers * u64::from(config.errors_percent)
    }
}
