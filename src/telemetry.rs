//! Logs and metrics: every metric's name in one place, and the only door to the exporter.
//!
//! Names are `tidegate_<noun>_<unit>[_total]`; labels come from small closed sets. Handles are looked up once (a name look-up per
//! message would cost more than the message), so [`install_metrics`] has to run before [`meters`] is first used; without it, as in
//! unit tests, every handle counts into nothing.

pub mod access_log;

use std::sync::LazyLock;
use std::sync::OnceLock;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::message::{Protocol, Reject};

pub const CONNECTIONS_TOTAL: &str = "tidegate_connections_total";
pub const CONNECTIONS_OPEN: &str = "tidegate_connections_open";
pub const CONNECTIONS_REFUSED_TOTAL: &str = "tidegate_connections_refused_total";
pub const SESSIONS_OPEN: &str = "tidegate_sessions_open";
pub const MESSAGES_RECEIVED_TOTAL: &str = "tidegate_messages_received_total";
pub const MESSAGES_RECEIVED_BYTES_TOTAL: &str = "tidegate_messages_received_bytes_total";
pub const MESSAGES_DELIVERED_TOTAL: &str = "tidegate_messages_delivered_total";
pub const MESSAGES_DROPPED_TOTAL: &str = "tidegate_messages_dropped_total";
pub const REJECTS_TOTAL: &str = "tidegate_rejects_total";
pub const LOGINS_TOTAL: &str = "tidegate_logins_total";
pub const MALFORMED_TOTAL: &str = "tidegate_malformed_total";
pub const DATAGRAMS_TOTAL: &str = "tidegate_datagrams_total";
pub const TASK_PANICS_TOTAL: &str = "tidegate_task_panics_total";
pub const REQUESTS_TOTAL: &str = "tidegate_requests_total";
pub const REQUEST_DURATION_SECONDS: &str = "tidegate_request_duration_seconds";
pub const ACCESS_LOG_DROPPED_TOTAL: &str = "tidegate_access_log_dropped_total";
pub const SPOOL_RECORDS: &str = "tidegate_spool_records";
pub const SPOOL_BYTES: &str = "tidegate_spool_bytes";
pub const SPOOL_OLDEST_SECONDS: &str = "tidegate_spool_oldest_seconds";
pub const SPOOL_ETA_SECONDS: &str = "tidegate_spool_eta_seconds";
pub const SPOOL_APPENDED_TOTAL: &str = "tidegate_spool_appended_total";
pub const SPOOL_DELIVERED_TOTAL: &str = "tidegate_spool_delivered_total";
pub const SPOOL_LOST_TOTAL: &str = "tidegate_spool_lost_total";
pub const SPOOL_COMMITS_TOTAL: &str = "tidegate_spool_commits_total";
pub const SPOOL_COMMIT_SECONDS: &str = "tidegate_spool_commit_seconds";
pub const UPSTREAM_REQUESTS_TOTAL: &str = "tidegate_upstream_requests_total";
pub const UPSTREAM_REQUEST_SECONDS: &str = "tidegate_upstream_request_seconds";
pub const UPSTREAM_HEALTHY: &str = "tidegate_upstream_healthy";
pub const UPSTREAM_CONNECTIONS_OPEN: &str = "tidegate_upstream_connections_open";
pub const CACHE_REQUESTS_TOTAL: &str = "tidegate_cache_requests_total";
pub const CACHE_STORED_BYTES_TOTAL: &str = "tidegate_cache_stored_bytes_total";
pub const DEVICE_REQUESTS_TOTAL: &str = "tidegate_device_requests_total";
pub const DEVICE_REQUEST_SECONDS: &str = "tidegate_device_request_seconds";
pub const DEVICE_OBSERVATIONS_OPEN: &str = "tidegate_device_observations_open";
pub const POLICY_ERRORS_TOTAL: &str = "tidegate_policy_errors_total";
pub const CONFIG_RELOADS_TOTAL: &str = "tidegate_config_reloads_total";

/// The `[telemetry]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What is logged: a level (error, warn, info, debug, trace) or levels by module, such as "info,tidegate::listener=debug".
    pub log: String,
    /// How a log line is written: text for people, json for programs.
    pub log_format: LogFormat,
    /// Where one line per HTTP request goes: "off", "stdout", or a file's path. `log_format` holds for it too.
    pub access_log: String,
    /// Lines waiting to be written there. Further ones are dropped, and counted.
    #[schemars(range(min = 1, max = 1000000))]
    pub access_log_lines_max: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            log: "info".into(),
            log_format: LogFormat::Text,
            access_log: "off".into(),
            access_log_lines_max: 4_096,
        }
    }
}

/// The `log` key is not a filter.
#[derive(Debug)]
pub struct InvalidFilter(pub String);

impl std::fmt::Display for InvalidFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "telemetry.log is not a log filter: {}", self.0)
    }
}

impl std::error::Error for InvalidFilter {}

/// Counter handles of one protocol.
pub struct ProtocolMeters {
    pub received: Counter,
    pub received_bytes: Counter,
    pub delivered: Counter,
    pub malformed: Counter,
    pub sessions: Gauge,
    pub logins_accepted: Counter,
    pub logins_refused: Counter,
    rejects: [Counter; REJECT_REASONS.len()],
}

const REJECT_REASONS: [&str; 8] =
    ["unauthenticated", "forbidden", "too_fast", "too_large", "full", "malformed", "not_found", "shutting_down"];

impl ProtocolMeters {
    fn new(protocol: Protocol) -> Self {
        let protocol = protocol.as_str();
        ProtocolMeters {
            received: counter!(MESSAGES_RECEIVED_TOTAL, "protocol" => protocol),
            received_bytes: counter!(MESSAGES_RECEIVED_BYTES_TOTAL, "protocol" => protocol),
            delivered: counter!(MESSAGES_DELIVERED_TOTAL, "protocol" => protocol),
            malformed: counter!(MALFORMED_TOTAL, "protocol" => protocol),
            sessions: gauge!(SESSIONS_OPEN, "protocol" => protocol),
            logins_accepted: counter!(LOGINS_TOTAL, "protocol" => protocol, "outcome" => "accepted"),
            logins_refused: counter!(LOGINS_TOTAL, "protocol" => protocol, "outcome" => "refused"),
            rejects: REJECT_REASONS.map(|reason| counter!(REJECTS_TOTAL, "protocol" => protocol, "reason" => reason)),
        }
    }

    /// Counts one refusal by its reason.
    pub fn reject(&self, reject: &Reject) {
        let index = match reject {
            Reject::Unauthenticated => 0,
            Reject::Forbidden { .. } => 1,
            Reject::TooFast { .. } => 2,
            Reject::TooLarge { .. } => 3,
            Reject::Full { .. } => 4,
            Reject::Malformed { .. } => 5,
            Reject::NotFound => 6,
            Reject::ShuttingDown => 7,
        };
        if let Some(counter) = self.rejects.get(index) {
            counter.increment(1);
        }
    }
}

/// The handles of the hot path.
pub struct Meters {
    pub http: ProtocolMeters,
    pub mqtt: ProtocolMeters,
    pub coap: ProtocolMeters,
    pub gateway: ProtocolMeters,
    pub connections: Counter,
    pub connections_open: Gauge,
    pub dropped_outbox: Counter,
    /// Stored messages that a persistent session's queue had no room for, or that the disk has lost.
    pub dropped_session: Counter,
    pub datagrams: Counter,
    pub task_panics: Counter,
    pub policy_errors: Counter,
    pub cache_stored_bytes: Counter,
    cache: [Counter; CACHE_OUTCOMES.len()],
    /// Of requests to CoAP devices, from the question to its answer.
    pub device_seconds: Histogram,
    /// Resources of CoAP devices that are observed.
    pub device_observations: Gauge,
    devices: [Counter; DEVICE_OUTCOMES.len()],
    pub request_seconds: Histogram,
    requests: [Counter; STATUS_CLASSES.len()],
}

const CACHE_OUTCOMES: [&str; 6] = ["hit", "stale", "revalidated", "shared", "miss", "bypass"];

const DEVICE_OUTCOMES: [&str; 7] = ["answered", "abandoned", "broken", "full", "reset", "timed_out", "too_large"];

const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

impl Meters {
    /// Counts one HTTP request by the class of its status.
    pub fn request(&self, status: u16, took: std::time::Duration) {
        let class = usize::from(status / 100).saturating_sub(1);
        if let Some(counter) = self.requests.get(class) {
            counter.increment(1);
        }
        self.request_seconds.record(took.as_secs_f64());
    }

    /// Counts one request along a route with a cache; `outcome` is from the closed set.
    pub fn cache(&self, outcome: &str) {
        let at = CACHE_OUTCOMES.iter().position(|known| *known == outcome);
        if let Some(counter) = at.and_then(|at| self.cache.get(at)) {
            counter.increment(1);
        }
    }

    /// Counts the end of one request to a CoAP device; `outcome` is from the closed set.
    pub fn device(&self, outcome: &str) {
        let at = DEVICE_OUTCOMES.iter().position(|known| *known == outcome);
        if let Some(counter) = at.and_then(|at| self.devices.get(at)) {
            counter.increment(1);
        }
    }

    pub fn of(&self, protocol: Protocol) -> &ProtocolMeters {
        match protocol {
            Protocol::Http => &self.http,
            Protocol::Mqtt => &self.mqtt,
            Protocol::Coap => &self.coap,
            Protocol::Gateway => &self.gateway,
        }
    }
}

static METERS: LazyLock<Meters> = LazyLock::new(|| {
    // Tests share one process in any order.
    #[cfg(test)]
    install_metrics();
    Meters {
        http: ProtocolMeters::new(Protocol::Http),
        mqtt: ProtocolMeters::new(Protocol::Mqtt),
        coap: ProtocolMeters::new(Protocol::Coap),
        gateway: ProtocolMeters::new(Protocol::Gateway),
        connections: counter!(CONNECTIONS_TOTAL),
        connections_open: gauge!(CONNECTIONS_OPEN),
        dropped_outbox: counter!(MESSAGES_DROPPED_TOTAL, "reason" => "slow_subscriber"),
        dropped_session: counter!(MESSAGES_DROPPED_TOTAL, "reason" => "session_queue"),
        datagrams: counter!(DATAGRAMS_TOTAL),
        task_panics: counter!(TASK_PANICS_TOTAL),
        policy_errors: counter!(POLICY_ERRORS_TOTAL),
        cache_stored_bytes: counter!(CACHE_STORED_BYTES_TOTAL),
        cache: CACHE_OUTCOMES.map(|outcome| counter!(CACHE_REQUESTS_TOTAL, "outcome" => outcome)),
        device_seconds: histogram!(DEVICE_REQUEST_SECONDS),
        device_observations: gauge!(DEVICE_OBSERVATIONS_OPEN),
        devices: DEVICE_OUTCOMES.map(|outcome| counter!(DEVICE_REQUESTS_TOTAL, "outcome" => outcome)),
        request_seconds: histogram!(REQUEST_DURATION_SECONDS),
        requests: STATUS_CLASSES.map(|class| counter!(REQUESTS_TOTAL, "status" => class)),
    }
});

/// The kept handles.
pub fn meters() -> &'static Meters {
    &METERS
}

/// Counts a connection that was turned away before any protocol was spoken; `reason` is from a closed set.
pub fn connection_refused(reason: &'static str) {
    counter!(CONNECTIONS_REFUSED_TOTAL, "reason" => reason).increment(1);
}

static EXPORTER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the metrics recorder, once per process; later calls (a second gateway in one test process) share it.
pub fn install_metrics() {
    EXPORTER.get_or_init(|| {
        const SECONDS: [f64; 14] =
            [0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)
            .unwrap_or_else(|_| PrometheusBuilder::new())
            .build_recorder();
        let handle = recorder.handle();
        // Only a second recorder of another library in this process can make this fail; then its metrics win.
        if metrics::set_global_recorder(recorder).is_ok() {
            describe();
        }
        handle
    });
}

/// The metrics as Prometheus text (exposition format 0.0.4); empty before [`install_metrics`].
pub fn render() -> String {
    EXPORTER.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// The sum of one metric over all its labels, out of what [`render`] gave; 0 for one that is not there.
pub fn total(rendered: &str, name: &str) -> u64 {
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    let values = rendered.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    // A sum of counts; whatever is not one is 0.
    values.sum::<f64>().max(0.0) as u64
}

/// Folds pending histogram samples; to be called every few seconds, or they pile up between scrapes.
pub fn upkeep() {
    if let Some(handle) = EXPORTER.get() {
        handle.run_upkeep();
    }
}

/// Starts logging to standard error. A second call in one process changes nothing.
///
/// # Errors
/// The filter does not parse.
pub fn install_logs(config: &Config) -> Result<(), InvalidFilter> {
    let filter: Targets =
        config.log.parse().map_err(|error: tracing_subscriber::filter::ParseError| InvalidFilter(error.to_string()))?;
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let _already_installed = match config.log_format {
        LogFormat::Text => registry.with(layer.with_ansi(ansi)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    };
    Ok(())
}

/// Every metric with its unit and meaning; `docs/metrics.md` is made from this list.
pub const DESCRIPTIONS: &[(&str, Kind, &str)] = &[
    (CONNECTIONS_TOTAL, Kind::Counter, "TCP connections accepted."),
    (CONNECTIONS_OPEN, Kind::Gauge, "TCP connections open."),
    (CONNECTIONS_REFUSED_TOTAL, Kind::Counter, "Connections closed before a protocol was spoken, by reason."),
    (SESSIONS_OPEN, Kind::Gauge, "Authenticated sessions, by protocol."),
    (MESSAGES_RECEIVED_TOTAL, Kind::Counter, "Messages accepted from devices, by protocol."),
    (MESSAGES_RECEIVED_BYTES_TOTAL, Kind::Counter, "Payload bytes of accepted messages, by protocol."),
    (MESSAGES_DELIVERED_TOTAL, Kind::Counter, "Messages written to local subscribers, by protocol."),
    (MESSAGES_DROPPED_TOTAL, Kind::Counter, "Messages not delivered to a local subscriber, by reason."),
    (REJECTS_TOTAL, Kind::Counter, "Refusals, by protocol and reason."),
    (LOGINS_TOTAL, Kind::Counter, "Authentications, by protocol and outcome."),
    (MALFORMED_TOTAL, Kind::Counter, "Malformed input, by protocol."),
    (DATAGRAMS_TOTAL, Kind::Counter, "UDP datagrams received."),
    (TASK_PANICS_TOTAL, Kind::Counter, "Tasks that ended in a panic: a fault of the gateway, please report it."),
    (REQUESTS_TOTAL, Kind::Counter, "HTTP requests, and CoAP requests along routes, by status class."),
    (REQUEST_DURATION_SECONDS, Kind::Histogram, "Time from a request's head to its answer's head."),
    (
        ACCESS_LOG_DROPPED_TOTAL,
        Kind::Counter,
        "Lines of the access log that found its queue full or could not be written.",
    ),
    (SPOOL_RECORDS, Kind::Gauge, "Messages waiting for an uplink, by sink."),
    (SPOOL_BYTES, Kind::Gauge, "Bytes waiting for an uplink, by sink."),
    (SPOOL_OLDEST_SECONDS, Kind::Gauge, "Age of the oldest waiting message, by sink."),
    (SPOOL_ETA_SECONDS, Kind::Gauge, "Time until the queue is empty at the present rate, by sink."),
    (SPOOL_APPENDED_TOTAL, Kind::Counter, "Messages taken into the spool, by sink."),
    (SPOOL_DELIVERED_TOTAL, Kind::Counter, "Messages acknowledged by the upstream, by sink."),
    (SPOOL_LOST_TOTAL, Kind::Counter, "Messages given up, by sink and reason; each is in the loss ledger."),
    (SPOOL_COMMITS_TOTAL, Kind::Counter, "Group commits, by outcome."),
    (SPOOL_COMMIT_SECONDS, Kind::Histogram, "Duration of a group commit, fsync included."),
    (UPSTREAM_REQUESTS_TOTAL, Kind::Counter, "Requests to upstreams, by upstream and outcome."),
    (UPSTREAM_REQUEST_SECONDS, Kind::Histogram, "Duration of a request to an upstream, by upstream."),
    (UPSTREAM_HEALTHY, Kind::Gauge, "Endpoints an upstream can use, by upstream."),
    (UPSTREAM_CONNECTIONS_OPEN, Kind::Gauge, "Connections to upstreams, by upstream."),
    (CACHE_REQUESTS_TOTAL, Kind::Counter, "Requests along routes with a cache, by what it did for them."),
    (CACHE_STORED_BYTES_TOTAL, Kind::Counter, "Bytes of answers put into the cache of routes, headers included."),
    (
        DEVICE_REQUESTS_TOTAL,
        Kind::Counter,
        "Requests to CoAP devices, by outcome: for HTTP, to read or observe what they have registered, for their links.",
    ),
    (DEVICE_REQUEST_SECONDS, Kind::Histogram, "Time from a request to a CoAP device to its answer."),
    (DEVICE_OBSERVATIONS_OPEN, Kind::Gauge, "Resources of CoAP devices that are observed."),
    (POLICY_ERRORS_TOTAL, Kind::Counter, "`when` expressions that failed to evaluate; such a rule does not allow."),
    (CONFIG_RELOADS_TOTAL, Kind::Counter, "Configuration reloads, by outcome."),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

fn describe() {
    for (name, kind, meaning) in DESCRIPTIONS.iter().copied() {
        let unit = match name {
            _ if name.contains("_bytes") => Unit::Bytes,
            _ if name.ends_with("_seconds") => Unit::Seconds,
            _ => Unit::Count,
        };
        match kind {
            Kind::Counter => describe_counter!(name, unit, meaning),
            Kind::Gauge => describe_gauge!(name, unit, meaning),
            Kind::Histogram => describe_histogram!(name, unit, meaning),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_described_once_and_named_by_the_rule() {
        let mut names: Vec<&str> = DESCRIPTIONS.iter().map(|(name, _, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DESCRIPTIONS.len());
        for (name, kind, _) in DESCRIPTIONS {
            assert!(name.starts_with("tidegate_"), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
        }
    }

    #[test]
    fn a_counted_refusal_shows_in_the_rendered_text() {
        // Tests share one recorder, so others count as well.
        let counted = || {
            let text = render();
            let sample = r#"tidegate_rejects_total{protocol="coap",reason="not_found"} "#;
            text.lines().find_map(|line| line.strip_prefix(sample)?.parse::<u64>().ok()).unwrap_or(0)
        };
        install_metrics();
        meters();
        let before = counted();
        meters().coap.reject(&Reject::NotFound);
        assert!(counted() > before, "{}", render());
    }

    #[test]
    fn a_total_is_the_sum_over_labels() {
        let text = "# TYPE a_total counter\na_total{p=\"x\"} 2\na_total{p=\"y\"} 3\na_total_other 9\nb 1.5\n";
        assert_eq!((total(text, "a_total"), total(text, "b"), total(text, "c")), (5, 1, 0));
    }

    #[test]
    fn a_bad_filter_is_refused() {
        let config = Config { log: "nonsense=[".into(), ..Config::default() };
        assert!(install_logs(&config).is_err());
    }
}
