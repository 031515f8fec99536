//! `[[upstream]]` and `[[forward]]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::balance::{Algorithm, BreakerConfig, EjectConfig, EndpointConfig, RetryConfig};
use crate::spool::{Delivery, QueueConfig, SinkConfig};

/// One cloud side: a set of endpoints that can stand in for each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name that rules and routes use.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// http or mqtt.
    pub kind: Kind,
    /// Where it is: http:// and https:// for http, mqtt:// and mqtts:// for mqtt.
    #[schemars(length(min = 1, max = 256))]
    pub endpoints: Vec<EndpointConfig>,
    /// How an endpoint is chosen.
    #[serde(default)]
    pub balance: Algorithm,
    /// Active health checks; without this table endpoints are judged by their answers alone.
    #[serde(default)]
    pub health: Option<HealthConfig>,
    /// When an endpoint is set aside for its errors.
    #[serde(default)]
    pub eject: EjectConfig,
    /// The circuit breaker of each endpoint.
    #[serde(default)]
    pub breaker: BreakerConfig,
    /// When a failed request is tried again.
    #[serde(default)]
    pub retry: RetryConfig,
    /// Milliseconds over which an endpoint that returns gets back to its whole share; 0 is at once.
    #[serde(default = "slow_start_ms")]
    #[schemars(range(min = 0, max = 3_600_000))]
    pub slow_start_ms: u32,
    /// Connections to it at the most, per worker. Reached: requests wait within their deadline.
    #[serde(default = "connections_max")]
    #[schemars(range(min = 1, max = 100_000))]
    pub connections_max: u32,
    /// HTTP only: requests of the request plane that may wait for a connection, or for an endpoint below its `in_flight_max`, per worker. Reached: 503.
    #[serde(default = "waiting_max")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub waiting_max: u32,
    /// Milliseconds to connect, TLS included. Reached: the next endpoint is tried.
    #[serde(default = "connect_timeout_ms")]
    #[schemars(range(min = 1, max = 600_000))]
    pub connect_timeout_ms: u32,
    /// Milliseconds for one request, from sending it to the end of its answer. Reached: it counts as failed and is tried again.
    #[serde(default = "request_timeout_ms")]
    #[schemars(range(min = 1, max = 3_600_000))]
    pub request_timeout_ms: u32,
    /// Milliseconds after which an idle connection is closed.
    #[serde(default = "idle_timeout_ms")]
    #[schemars(range(min = 1, max = 86_400_000))]
    pub idle_timeout_ms: u32,
    /// HTTP only: "auto" speaks HTTP/2 where TLS agrees on it, HTTP/1.1 otherwise; "always" speaks it to http:// endpoints too, as gRPC wants it; "never".
    #[serde(default)]
    pub http2: Http2,
    /// HTTP only: milliseconds between two tries to deliver at the most; the first pause is half a second, the next ones double, each drawn up to twice as long.
    #[serde(default = "backoff_max_ms")]
    #[schemars(range(min = 500, max = 3_600_000))]
    pub backoff_max_ms: u32,
    /// PEM file of the certificate authorities to trust; without it those of the platform.
    #[serde(default)]
    #[schemars(extend("format" = "path"))]
    pub ca_file: Option<PathBuf>,
    /// PEM certificate for an upstream that asks for one.
    #[serde(default)]
    #[schemars(extend("format" = "path"))]
    pub certificate: Option<PathBuf>,
    /// Its key, PEM, readable by the gateway alone.
    #[serde(default)]
    #[schemars(extend("format" = "path"))]
    pub key: Option<PathBuf>,
    /// Headers added to every request, such as authorization = "Bearer ${file:cloud.token}". Only for http.
    #[serde(default)]
    #[schemars(extend("secret" = true))]
    pub headers: std::collections::BTreeMap<String, String>,
    /// MQTT only: the client identifier; the gateway's name if empty.
    #[serde(default)]
    pub client_id: String,
    /// MQTT only.
    #[serde(default)]
    pub username: String,
    /// MQTT only; best "${file:broker.password}".
    #[serde(default)]
    #[schemars(extend("secret" = true))]
    pub password: String,
    /// MQTT only: "5" carries ids and times as user properties; "3.1.1" for brokers that know no other, and then the ids stay here.
    #[serde(default)]
    pub mqtt_version: MqttVersion,
    /// MQTT only: QoS 1 messages sent and not yet acknowledged.
    #[serde(default = "in_flight_max")]
    #[schemars(range(min = 1, max = 10_000))]
    pub in_flight_max: u16,
    /// MQTT only: downlink. What arrives on these filters is published here under its own topic.
    #[serde(default)]
    pub subscribe: Vec<String>,
    /// Whether /readyz fails while no endpoint of this upstream can be used.
    #[serde(default)]
    pub required_for_ready: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Http,
    Mqtt,
}

impl Kind {
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Http => "http",
            Kind::Mqtt => "mqtt",
        }
    }
}

/// `http2`: when an endpoint is spoken to in HTTP/2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Http2 {
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
pub enum MqttVersion {
    #[default]
    #[serde(rename = "5")]
    V5,
    #[serde(rename = "3.1.1")]
    V311,
}

const fn slow_start_ms() -> u32 {
    10_000
}

const fn connections_max() -> u32 {
    200
}

const fn waiting_max() -> u32 {
    1_000
}

const fn connect_timeout_ms() -> u32 {
    5_000
}

const fn request_timeout_ms() -> u32 {
    30_000
}

const fn idle_timeout_ms() -> u32 {
    60_000
}

const fn backoff_max_ms() -> u32 {
    30_000
}

const fn in_flight_max() -> u16 {
    100
}

/// `health`: active checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// GET this path; 200 to 399 is healthy. Empty: a TCP connection is enough.
    pub path: String,
    /// Milliseconds between two checks of an endpoint, give or take a tenth.
    #[schemars(range(min = 100, max = 3_600_000))]
    pub interval_ms: u32,
    /// Milliseconds for one check.
    #[schemars(range(min = 1, max = 600_000))]
    pub timeout_ms: u32,
    /// Failures in a row that make a healthy endpoint unhealthy.
    #[schemars(range(min = 1, max = 1000))]
    pub unhealthy_after: u32,
    /// Successes in a row that make an unhealthy endpoint healthy.
    #[schemars(range(min = 1, max = 1000))]
    pub healthy_after: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        HealthConfig {
            path: String::new(),
            interval_ms: 5_000,
            timeout_ms: 3_000,
            unhealthy_after: 3,
            healthy_after: 2,
        }
    }
}

/// One rule of the message plane: which topics go where, and with what promise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForwardConfig {
    /// The rule's name, and its queue's.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// Topic filters; one match is enough.
    #[schemars(length(min = 1, max = 256))]
    pub topics: Vec<String>,
    /// The upstream, by name.
    pub to: String,
    /// HTTP only: the path of the request. {device}, {gateway} and {topic} stand for the message's own; a batch then holds messages of one path alone.
    #[serde(default = "path")]
    pub path: String,
    /// MQTT only: what the topic at the broker is. {topic}, {device} and {gateway} stand for the message's own.
    #[serde(default = "topic")]
    pub topic: String,
    /// What an acknowledgement to the device promises: "memory" (received), "os" (written), "disk" (written and synced).
    #[serde(default)]
    pub delivery: Delivery,
    /// HTTP only: how messages are put together.
    #[serde(default)]
    pub batch: BatchConfig,
    /// The durable queue.
    #[serde(default)]
    pub queue: QueueConfig,
    /// HTTP only: requests of this rule under way at once. Messages of one path, and single messages of one device, still follow each other; while
    /// there is trouble it is one.
    #[serde(default = "requests_in_flight_max")]
    #[schemars(range(min = 1, max = 64))]
    pub requests_in_flight_max: u32,
    /// HTTP only: how often a message is tried that the upstream refuses for its own sake before it goes to the loss ledger, so that one message cannot
    /// hold up the rest for ever. Such are 4xx other than 408, 425 and 429, than 401 and 407, and, where all messages have one path, than 403, 404 and 405:
    /// those are about the rule, and everything is kept until it is mended.
    #[serde(default = "refusals_max")]
    #[schemars(range(min = 1, max = 1000))]
    pub refusals_max: u32,
}

impl ForwardConfig {
    /// The queue of this rule, as the spool wants it.
    pub fn sink(&self) -> SinkConfig {
        SinkConfig { name: self.name.clone(), delivery: self.delivery, queue: self.queue.clone() }
    }
}

fn path() -> String {
    "/".into()
}

fn topic() -> String {
    "{topic}".into()
}

const fn requests_in_flight_max() -> u32 {
    8
}

const fn refusals_max() -> u32 {
    3
}

/// `batch`: how messages become requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchConfig {
    /// Messages in one request.
    #[schemars(range(min = 1, max = 100_000))]
    pub records_max: u32,
    /// Bytes of one request's body, before encoding; a larger single message still goes alone.
    #[schemars(range(min = 1, max = 67_108_864))]
    pub bytes_max: u32,
    /// Milliseconds to wait for more when a batch is not full.
    #[schemars(range(min = 0, max = 60_000))]
    pub linger_ms: u32,
    /// "ndjson" (one CloudEvent a line), "json" (an array of CloudEvents), "single" (one message a request, payload as it is, CloudEvents headers).
    pub format: BatchFormat,
}

impl Default for BatchConfig {
    fn default() -> Self {
        BatchConfig { records_max: 500, bytes_max: 262_144, linger_ms: 200, format: BatchFormat::Ndjson }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BatchFormat {
    Ndjson,
    Json,
    Single,
}
