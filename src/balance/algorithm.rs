//! The algorithms. Each gets the candidates (at least one, all of one failover group) and gives one of them.
//!
//! Sources: smooth weighted round robin: nginx, commit 52327e0; power of two choices: Mitzenmacher 2001; peak EWMA: Finagle; rendezvous
//! hashing: Thaler and Ravishankar 1998, with weights as in Schindelhauer and Schomaker 2005; bounded load: Mirrokni et al. 2016.

use std::time::{Duration, Instant};

use super::config::{Algorithm, Settings};
use super::endpoint::{Endpoint, State};
use super::hash::{mix, unit};

/// A loaded endpoint takes this much more than its fair share before a key moves on, in percent.
const BOUNDED_LOAD_PERCENT: u64 = 125;
/// Rehashes of `ip_hash` before it settles for any candidate.
const REHASH_MAX: u64 = 20;
/// Weights are multiplied by this, so that a warming endpoint can have a fraction of one.
const WEIGHT_SCALE: f64 = 1_000.0;
/// How often `adaptive` looks again, and the spread of response times (standard deviation over mean) that it calls different;
/// it goes on calling them different until they are clearly closer.
const ADAPT_EVERY: Duration = Duration::from_secs(1);
const SPREAD_DIFFERENT: f64 = 0.3;
const SPREAD_ALIKE: f64 = 0.15;

/// The memory of the algorithms.
#[derive(Debug, Default)]
pub(super) struct Chooser {
    /// The endpoint chosen last, where round robin goes on and ties begin.
    last: Option<usize>,
    /// What the smooth weighted round robin was counting for; a change begins a new cycle.
    cycle: u64,
    adapted: Option<(Instant, Algorithm)>,
}

#[derive(Clone, Copy)]
pub(super) struct Request {
    pub group: u8,
    pub key: u64,
    pub now: Instant,
    pub random: u64,
}

impl Chooser {
    pub fn choose(
        &mut self,
        settings: &Settings,
        endpoints: &mut [Endpoint],
        candidates: &[usize],
        request: Request,
    ) -> Option<usize> {
        let algorithm = match settings.algorithm {
            Algorithm::Adaptive => self.adapt(endpoints, candidates, request.now),
            fixed => fixed,
        };
        let picked = match algorithm {
            Algorithm::RoundRobin => self.round_robin(settings, endpoints, candidates, request),
            Algorithm::WeightedRoundRobin => self.weighted_round_robin(settings, endpoints, candidates, request),
            Algorithm::LeastConnections | Algorithm::Adaptive => {
                self.least_connections(settings, endpoints, candidates, request)
            }
            Algorithm::LeastResponseTime => least_response_time(settings, endpoints, candidates, request),
            Algorithm::IpHash => ip_hash(endpoints, candidates, request),
            Algorithm::ConsistentHash => consistent_hash(endpoints, candidates, request),
            Algorithm::Random => random(settings, endpoints, candidates, request),
        };
        self.last = picked;
        picked
    }

    /// Candidates in turn, beginning after the last choice.
    fn in_turn<'c>(&self, candidates: &'c [usize]) -> impl Iterator<Item = usize> + use<'c> {
        let start = self.last.map_or(0, |last| candidates.partition_point(|c| *c <= last));
        candidates.iter().cycle().skip(start).take(candidates.len()).copied()
    }

    fn round_robin(
        &self,
        settings: &Settings,
        endpoints: &[Endpoint],
        candidates: &[usize],
        request: Request,
    ) -> Option<usize> {
        // A warming endpoint lets its turn pass, sometimes; if all do, the first takes it.
        let takes_turn = |index: &usize| {
            let draw = unit(mix(request.random ^ *index as u64));
            endpoints.get(*index).is_some_and(|e| draw <= e.warmth(settings, request.now))
        };
        self.in_turn(candidates).find(takes_turn).or_else(|| self.in_turn(candidates).next())
    }

    fn weighted_round_robin(
        &mut self,
        settings: &Settings,
        endpoints: &mut [Endpoint],
        candidates: &[usize],
        request: Request,
    ) -> Option<usize> {
        let is_member = |e: &Endpoint| {
            let state = e.state(settings, request.now);
            e.priority == request.group && matches!(state, State::Available | State::HalfOpen | State::Busy)
        };
        // Who comes or goes begins a new cycle. Who is only busy, or was tried before, stays in it and saves up its turns.
        let members = endpoints.iter().enumerate().filter(|(_, e)| is_member(e));
        let (count, cycle) = members.fold((0, 0), |(n, hash), (index, _)| (n + 1, mix(hash ^ (index as u64 + 1))));
        if cycle != self.cycle {
            self.cycle = cycle;
            endpoints.iter_mut().for_each(|endpoint| endpoint.turn = 0);
        }
        let mut total = 0;
        for endpoint in endpoints.iter_mut().filter(|e| is_member(e)) {
            let share = scaled_weight(settings, endpoint, request.now);
            total += share;
            endpoint.turn += share;
        }
        let index = first_max(candidates, |index| endpoints.get(index).map_or(i64::MIN, |e| e.turn))?;
        endpoints.get_mut(index)?.turn -= total;
        if candidates.len() < count {
            // Nobody owes or is owed more than one round, or who returns would have everything for a while.
            endpoints.iter_mut().for_each(|endpoint| endpoint.turn = endpoint.turn.clamp(-total, total));
        }
        Some(index)
    }

    /// The least `in flight / weight`; among equals, such as idle ones, a smooth weighted round robin.
    fn least_connections(
        &self,
        settings: &Settings,
        endpoints: &mut [Endpoint],
        candidates: &[usize],
        request: Request,
    ) -> Option<usize> {
        let load = |e: &Endpoint| f64::from(e.in_flight) / (f64::from(e.weight) * e.warmth(settings, request.now));
        let least = candidates.iter().filter_map(|index| endpoints.get(*index)).map(load).fold(f64::MAX, f64::min);
        let mut total = 0;
        let mut best: Option<(i64, usize)> = None;
        for &index in candidates {
            let Some(endpoint) = endpoints.get_mut(index).filter(|e| load(e) <= least) else { continue };
            let share = scaled_weight(settings, endpoint, request.now);
            total += share;
            endpoint.turn += share;
            if best.is_none_or(|(turn, _)| endpoint.turn > turn) {
                best = Some((endpoint.turn, index));
            }
        }
        let (_, index) = best?;
        endpoints.get_mut(index)?.turn -= total;
        // The equals of one request are not those of the next, so old accounts are kept short.
        endpoints.iter_mut().for_each(|endpoint| endpoint.turn = endpoint.turn.clamp(-total, total));
        Some(index)
    }

    fn adapt(&mut self, endpoints: &[Endpoint], candidates: &[usize], now: Instant) -> Algorithm {
        if let Some((since, algorithm)) = self.adapted
            && now.saturating_duration_since(since) < ADAPT_EVERY
        {
            return algorithm;
        }
        let known = candidates.iter().filter_map(|index| endpoints.get(*index));
        let times: Vec<f64> = known.clone().filter_map(Endpoint::response_secs).collect();
        let was_different = matches!(self.adapted, Some((_, Algorithm::LeastResponseTime)));
        let threshold = if was_different { SPREAD_ALIKE } else { SPREAD_DIFFERENT };
        let weights_differ = known.clone().map(|e| e.weight).min() != known.map(|e| e.weight).max();
        let algorithm = if spread(&times) > threshold {
            Algorithm::LeastResponseTime
        } else if weights_differ {
            Algorithm::WeightedRoundRobin
        } else {
            Algorithm::LeastConnections
        };
        self.adapted = Some((now, algorithm));
        algorithm
    }

    /// What `adaptive` uses now.
    #[cfg(test)]
    pub fn adapted(&self) -> Option<Algorithm> {
        self.adapted.map(|(_, algorithm)| algorithm)
    }
}

fn scaled_weight(settings: &Settings, endpoint: &Endpoint, now: Instant) -> i64 {
    (f64::from(endpoint.weight) * WEIGHT_SCALE * endpoint.warmth(settings, now)) as i64
}

/// The first of the greatest; `max_by_key` would give the last.
fn first_max(candidates: &[usize], of: impl Fn(usize) -> i64) -> Option<usize> {
    candidates.iter().rev().copied().max_by_key(|index| of(*index))
}

/// Standard deviation over mean.
fn spread(times: &[f64]) -> f64 {
    if times.len() < 2 {
        return 0.0;
    }
    let count = times.len() as f64;
    let mean = times.iter().sum::<f64>() / count;
    let variance = times.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / count;
    if mean > 0.0 { variance.sqrt() / mean } else { 0.0 }
}

/// The cheaper of two that were drawn.
fn least_response_time(
    settings: &Settings,
    endpoints: &[Endpoint],
    candidates: &[usize],
    request: Request,
) -> Option<usize> {
    let count = candidates.len() as u64;
    let first = request.random % count.max(1);
    // Another one, each as likely as the others.
    let second = (first + 1 + mix(request.random) % (count - 1).max(1)) % count.max(1);
    let first = *candidates.get(first as usize)?;
    let second = *candidates.get(second as usize)?;
    let cost = |index: usize| endpoints.get(index).map_or(f64::MAX, |e| e.cost(settings, request.now));
    Some(if cost(second) < cost(first) { second } else { first })
}

fn random(settings: &Settings, endpoints: &[Endpoint], candidates: &[usize], request: Request) -> Option<usize> {
    let weight =
        |index: usize| endpoints.get(index).map_or(0.0, |e| f64::from(e.weight) * e.warmth(settings, request.now));
    let total: f64 = candidates.iter().map(|index| weight(*index)).sum();
    let mut left = unit(mix(request.random)) * total;
    for &index in candidates {
        left -= weight(index);
        if left <= 0.0 {
            return Some(index);
        }
    }
    candidates.last().copied()
}

/// The key's place among all endpoints of the group by weight, whether available or not; rehashed while that one is not.
fn ip_hash(endpoints: &[Endpoint], candidates: &[usize], request: Request) -> Option<usize> {
    let members = || endpoints.iter().enumerate().filter(|(_, e)| e.priority == request.group);
    let total: u64 = members().map(|(_, e)| u64::from(e.weight)).sum();
    for attempt in 0..REHASH_MAX {
        let mut place = mix(request.key.wrapping_add(attempt)) % total.max(1);
        for (index, endpoint) in members() {
            let weight = u64::from(endpoint.weight);
            if place < weight {
                if candidates.binary_search(&index).is_ok() {
                    return Some(index);
                }
                break;
            }
            place -= weight;
        }
    }
    candidates.get((mix(request.key) % candidates.len() as u64) as usize).copied()
}

/// The candidate that draws the best lot for this key and is not overloaded.
fn consistent_hash(endpoints: &[Endpoint], candidates: &[usize], request: Request) -> Option<usize> {
    let of = |index: usize| endpoints.get(index);
    let (weights, in_flight) = candidates
        .iter()
        .filter_map(|index| of(*index))
        .fold((0u64, 0u64), |sum, e| (sum.0 + u64::from(e.weight), sum.1 + u64::from(e.in_flight)));
    // ceil(1.25 * (all + 1) * weight / weights): at least one, and all bounds together exceed the load, so one is always below its own.
    let has_room = |e: &Endpoint| {
        let share = BOUNDED_LOAD_PERCENT * (in_flight + 1) * u64::from(e.weight);
        u64::from(e.in_flight) < share.div_ceil(100 * weights.max(1))
    };
    let lot = |e: &Endpoint| -f64::from(e.weight) / unit(mix(request.key ^ mix(e.id))).ln();
    candidates
        .iter()
        .filter_map(|index| of(*index).map(|e| (*index, e)))
        .filter(|(_, e)| has_room(e))
        .max_by(|a, b| lot(a.1).total_cmp(&lot(b.1)))
        .map(|(index, _)| index)
}
