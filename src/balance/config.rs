//! How an upstream's endpoints share its load: the parts of `[[upstream]]` that the balancer reads.

use serde::{Deserialize, Serialize};

/// `balance`: which endpoint gets the next request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// One after the other; weights are ignored.
    RoundRobin,
    /// In proportion to the weights, evenly spread (smooth weighted round robin).
    WeightedRoundRobin,
    /// The one with the fewest requests in flight for its weight.
    LeastConnections,
    /// The better of two random ones by peak-sensitive response time and requests in flight.
    #[default]
    LeastResponseTime,
    /// By a hash of the client's address; another one only while that one is away.
    IpHash,
    /// By a hash of the key (device), rendezvous hashing with bounded load: a change of endpoints moves few keys.
    ConsistentHash,
    /// At random, in proportion to the weights.
    Random,
    /// By what is seen: least response time while response times differ, weighted round robin while only weights do, else least connections.
    Adaptive,
}

impl Algorithm {
    pub const ALL: [Algorithm; 8] = [
        Algorithm::RoundRobin,
        Algorithm::WeightedRoundRobin,
        Algorithm::LeastConnections,
        Algorithm::LeastResponseTime,
        Algorithm::IpHash,
        Algorithm::ConsistentHash,
        Algorithm::Random,
        Algorithm::Adaptive,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Algorithm::RoundRobin => "round_robin",
            Algorithm::WeightedRoundRobin => "weighted_round_robin",
            Algorithm::LeastConnections => "least_connections",
            Algorithm::LeastResponseTime => "least_response_time",
            Algorithm::IpHash => "ip_hash",
            Algorithm::ConsistentHash => "consistent_hash",
            Algorithm::Random => "random",
            Algorithm::Adaptive => "adaptive",
        }
    }
}

/// One entry of `endpoints`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EndpointConfig {
    /// Where it is, e.g. `http://127.0.0.1:3001`. Names the endpoint in metrics, and in the hash.
    pub url: String,
    /// Its share beside the others.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u32,
    /// Failover group: those of the lowest number that can take the request share it.
    #[serde(default)]
    pub priority: u8,
    /// Requests in flight to it at once, per worker; the next one goes elsewhere, or waits.
    #[serde(default = "in_flight_max")]
    #[schemars(range(min = 1, max = 1000000))]
    pub in_flight_max: u32,
}

fn one() -> u32 {
    1
}

fn in_flight_max() -> u32 {
    1_024
}

/// `eject`: passive outlier ejection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EjectConfig {
    /// Errors in a row after which an endpoint is set aside.
    #[schemars(range(min = 1, max = 10000))]
    pub consecutive_errors: u32,
    /// How long the first time; the n-th time in a row n times as long.
    #[schemars(range(min = 1, max = 86400000))]
    pub base_ms: u32,
    /// Longest time set aside.
    #[schemars(range(min = 1, max = 86400000))]
    pub max_ms: u32,
    /// Share of the endpoints that may be set aside at once, rounded down: one of two at 50, none of one.
    #[schemars(range(min = 0, max = 100))]
    pub percent_max: u8,
}

impl Default for EjectConfig {
    fn default() -> Self {
        EjectConfig { consecutive_errors: 5, base_ms: 30_000, max_ms: 300_000, percent_max: 50 }
    }
}

/// `breaker`: the circuit breaker of each endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BreakerConfig {
    /// Share of errors that opens it.
    #[schemars(range(min = 1, max = 100))]
    pub errors_percent: u8,
    /// Answers within the window below which it stays closed, whatever they were.
    #[schemars(range(min = 1, max = 1000000))]
    pub requests_min: u32,
    /// The window over which errors are counted; counted in two halves, so between one half and one whole is seen.
    #[schemars(range(min = 100, max = 3600000))]
    pub window_ms: u32,
    /// How long it stays open before a trial.
    #[schemars(range(min = 1, max = 3600000))]
    pub open_ms: u32,
    /// Requests let through on trial; it closes when all succeed and opens again when one fails.
    #[schemars(range(min = 1, max = 1000))]
    pub probes: u32,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        BreakerConfig { errors_percent: 50, requests_min: 20, window_ms: 10_000, open_ms: 5_000, probes: 3 }
    }
}

/// `retry`: when a failed request may be tried again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// Attempts for one request, the first included.
    #[schemars(range(min = 1, max = 100))]
    pub attempts_max: u32,
    /// Retries as a share of the requests; beyond it failures are passed on, so that retries cannot multiply an outage.
    #[schemars(range(min = 0, max = 1000))]
    pub budget_percent: u32,
    /// Retries a second allowed besides, so that a quiet gateway can retry too.
    #[schemars(range(min = 0, max = 10000))]
    pub per_second_min: u32,
}

impl Default for RetryConfig {
    fn default() -> Self {
        RetryConfig { attempts_max: 3, budget_percent: 20, per_second_min: 1 }
    }
}

/// What a balancer is made with, beside its endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub algorithm: Algorithm,
    pub eject: EjectConfig,
    pub breaker: BreakerConfig,
    /// Time over which a returning endpoint's share grows from a tenth to the whole; 0: at once. Hashing ignores it.
    pub slow_start_ms: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            algorithm: Algorithm::default(),
            eject: EjectConfig::default(),
            breaker: BreakerConfig::default(),
            slow_start_ms: 10_000,
        }
    }
}
