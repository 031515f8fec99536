//! Chooses an endpoint for each request, and learns from what came of it.
//!
//! Pure: time is passed in as `now` and chance as `random`. One balancer serves one upstream of one worker, without a lock.
//! Use: [`Balancer::pick`], send, [`Balancer::report`] exactly once for each pick. Active health checks tell [`Balancer::set_health`].
//!
//! Promises, each one a test: only endpoints that are healthy, not ejected, whose breaker permits, below their cap and not excluded are picked,
//! and every such endpoint can be; requests in flight add up; the algorithms keep what their names say (see `tests`).
//! Endpoints of the lowest `priority` that has any available one are used; when all of those are busy the next group helps out.
//!
//! Not here: connections, retries themselves ([`RetryBudget`] only counts), the checks that find out about health.
//! Cost of a pick: one pass over the endpoints, no allocation.

mod algorithm;
mod budget;
mod config;
mod endpoint;
pub mod hash;

use std::time::{Duration, Instant};

pub use budget::RetryBudget;
pub use config::{Algorithm, BreakerConfig, EjectConfig, EndpointConfig, RetryConfig, Settings};
pub use endpoint::{Outcome, State};

use algorithm::Chooser;
use endpoint::Endpoint;

/// An endpoint by its place in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointIndex(pub usize);

/// The endpoints of one upstream.
#[derive(Debug)]
pub struct Balancer {
    settings: Settings,
    endpoints: Vec<Endpoint>,
    chooser: Chooser,
    /// Kept between picks so that none allocates.
    candidates: Vec<usize>,
}

/// One endpoint, for status and metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointStatus<'b> {
    pub url: &'b str,
    pub state: State,
    pub in_flight: u32,
    /// Requests it was picked for.
    pub picks: u64,
    /// Peak-sensitive moving average.
    pub response_time: Option<Duration>,
    pub ejections_in_a_row: u32,
}

impl Balancer {
    pub fn new(settings: Settings, endpoints: &[EndpointConfig], now: Instant) -> Self {
        Balancer {
            settings,
            endpoints: endpoints.iter().map(|config| Endpoint::new(config, now)).collect(),
            chooser: Chooser::default(),
            candidates: Vec::with_capacity(endpoints.len()),
        }
    }

    /// Takes over what `old` knows about endpoints with the same URL; its requests in flight stay its own.
    pub fn inherit(&mut self, old: &Balancer) {
        for endpoint in &mut self.endpoints {
            if let Some(known) = old.endpoints.iter().find(|known| known.url == endpoint.url) {
                endpoint.inherit(known);
            }
        }
    }

    /// Chooses an endpoint and counts a request in flight to it; `None` when there is none to choose.
    ///
    /// `key` places the request in hashing ([`hash::bytes`] of the device id or of the client's address; without one it is placed at
    /// random). `random` is any fresh 64 random bits. `exclude` are endpoints that this request has tried already.
    pub fn pick(
        &mut self,
        key: Option<u64>,
        now: Instant,
        random: u64,
        exclude: &[EndpointIndex],
    ) -> Option<EndpointIndex> {
        let group = self.group(now, exclude)?;
        let picked = self.chooser.choose(
            &self.settings,
            &mut self.endpoints,
            &self.candidates,
            algorithm::Request { group, key: key.unwrap_or(random), now, random },
        )?;
        self.endpoints.get_mut(picked)?.picked(now);
        Some(EndpointIndex(picked))
    }

    /// Fills `candidates` with the endpoints that may be picked, all of one group, and returns the group.
    fn group(&mut self, now: Instant, exclude: &[EndpointIndex]) -> Option<u8> {
        self.candidates.clear();
        let mut group = u8::MAX;
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let permitted = matches!(endpoint.state(&self.settings, now), State::Available | State::HalfOpen);
            if !permitted || exclude.contains(&EndpointIndex(index)) || endpoint.priority > group {
                continue;
            }
            if endpoint.priority < group {
                group = endpoint.priority;
                self.candidates.clear();
            }
            self.candidates.push(index);
        }
        (!self.candidates.is_empty()).then_some(group)
    }

    /// Tells how a picked request ended: exactly once for each pick.
    pub fn report(&mut self, index: EndpointIndex, outcome: Outcome, latency: Duration, now: Instant) {
        let Some(endpoint) = self.endpoints.get_mut(index.0) else { return };
        if !endpoint.reported(outcome, latency, &self.settings, now) {
            return;
        }
        let ejected = self.endpoints.iter().filter(|e| e.is_ejected(now)).count();
        let ejected_max = self.endpoints.len() * usize::from(self.settings.eject.percent_max) / 100;
        if ejected < ejected_max
            && let Some(endpoint) = self.endpoints.get_mut(index.0)
        {
            endpoint.eject(&self.settings, now);
        }
    }

    /// The active health check's judgement. Endpoints are healthy until told otherwise.
    pub fn set_health(&mut self, index: EndpointIndex, healthy: bool, now: Instant) {
        if let Some(endpoint) = self.endpoints.get_mut(index.0) {
            endpoint.set_health(healthy, now);
        }
    }

    /// When the first endpoint that is ejected or whose breaker is open returns by itself: how long to wait after a `None`.
    pub fn returns_at(&self, now: Instant) -> Option<Instant> {
        self.endpoints.iter().filter_map(|endpoint| endpoint.returns_at(now)).min()
    }

    pub fn len(&self) -> usize {
        self.endpoints.len()
    }

    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }

    pub fn url(&self, index: EndpointIndex) -> Option<&str> {
        self.endpoints.get(index.0).map(|endpoint| endpoint.url.as_str())
    }

    /// Requests in flight to all endpoints.
    pub fn in_flight(&self) -> u64 {
        self.endpoints.iter().map(|endpoint| u64::from(endpoint.in_flight)).sum()
    }

    pub fn statuses(&self, now: Instant) -> impl Iterator<Item = EndpointStatus<'_>> {
        self.endpoints.iter().map(move |endpoint| EndpointStatus {
            url: &endpoint.url,
            state: endpoint.state(&self.settings, now),
            in_flight: endpoint.in_flight,
            picks: endpoint.picks,
            response_time: endpoint.response_secs().and_then(|secs| Duration::try_from_secs_f64(secs).ok()),
            ejections_in_a_row: endpoint.ejections,
        })
    }

    /// Picks of the least used endpoint over those of the most used, by weight; 1 is perfect, `None` before the first pick.
    pub fn balance_ratio(&self) -> Option<f64> {
        let shares = self.endpoints.iter().map(|e| e.picks as f64 / f64::from(e.weight));
        let (min, max) = shares.fold((f64::MAX, 0.0f64), |(min, max), share| (min.min(share), max.max(share)));
        (max > 0.0).then_some(min / max)
    }
}

#[cfg(test)]
mod tests;
