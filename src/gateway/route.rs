//! The request plane's table: which requests go to which upstream, and what the gateway asks of one.
//!
//! Hosts and paths are compared in the one spelling that policy uses too ([`canonical_path`]): `/%61dmin` is `/admin` for a route as it is for
//! a backend, and a path that two programs could cut differently matches nothing.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use serde::{Deserialize, Serialize};

use super::publish::forbidden;
use super::{Action, Client, Gateway, Reject, wall_ms};
use crate::units::ByteSize;

pub use crate::policy::canonical_path;

/// One `[[route]]`: the longest matching prefix wins, then the order of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouteConfig {
    /// The route's name, for logs and messages.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// The host asked for, without port: "*" is any, "*.example.org" any below example.org, anything else that host alone.
    #[serde(default = "any_host")]
    pub host: String,
    /// The path or its beginning, by whole segments: "/api" and "/api/" match /api and /api/x, not /apix.
    #[serde(default = "any_path")]
    pub path_prefix: String,
    /// The methods it takes; empty: all.
    #[serde(default)]
    pub methods: Vec<String>,
    /// The upstream, by name; of kind "http".
    pub to: String,
    /// Who may use it: "device" for authenticated devices whom a policy rule allows the method on the path, "none" for anybody.
    #[serde(default)]
    pub auth: RouteAuth,
    /// Milliseconds from the request's head to that of the upstream's answer, connecting and retries included. Reached: 504.
    #[serde(default = "default_timeout")]
    #[schemars(range(min = 1, max = 3_600_000))]
    pub timeout_ms: u32,
    /// Milliseconds without one byte of the answer's body, or in either direction after an upgrade (WebSocket). Reached: the connection is cut. Event
    /// streams that are silent for longer need more.
    #[serde(default = "default_idle_timeout")]
    #[schemars(range(min = 1, max = 86_400_000))]
    pub idle_timeout_ms: u32,
    /// The largest request body; without it `limits.body_bytes_max` holds. 413 beyond it.
    #[serde(default)]
    pub body_bytes_max: Option<ByteSize>,
    /// Whether the upstream sees the Host that the client asked for; otherwise it sees its endpoint's own, and the client's in X-Forwarded-Host.
    #[serde(default)]
    pub preserve_host: bool,
}

/// Who may use a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RouteAuth {
    #[default]
    Device,
    None,
}

fn any_host() -> String {
    "*".into()
}

fn any_path() -> String {
    "/".into()
}

const fn default_timeout() -> u32 {
    30_000
}

const fn default_idle_timeout() -> u32 {
    60_000
}

/// A route as requests meet it.
#[derive(Clone, Debug)]
pub struct Route {
    pub name: Arc<str>,
    pub to: Arc<str>,
    pub auth: RouteAuth,
    pub timeout: Duration,
    pub idle_timeout: Duration,
    pub body_bytes_max: Option<u64>,
    pub preserve_host: bool,
    host: Host,
    prefix: Box<str>,
    methods: Vec<Box<str>>,
}

#[derive(Clone, Debug)]
enum Host {
    Any,
    /// With the leading dot.
    Below(Box<str>),
    Exactly(Box<str>),
}

/// All routes, longest prefix first.
#[derive(Clone, Debug, Default)]
pub struct Routes(Vec<Arc<Route>>);

impl Routes {
    pub fn new(configs: &[RouteConfig]) -> Self {
        let mut routes: Vec<Arc<Route>> = configs.iter().map(|config| Arc::new(Route::new(config))).collect();
        // Stable: among equals the order of the file stands.
        routes.sort_by_key(|route| std::cmp::Reverse(route.prefix.len()));
        Routes(routes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The route for a request. `host` may carry a port; `path` is canonical ([`canonical_path`]).
    pub fn find(&self, host: Option<&str>, path: &str, method: &str) -> Option<&Arc<Route>> {
        self.0.iter().find(|route| route.matches(host, path, method))
    }
}

impl Route {
    fn new(config: &RouteConfig) -> Self {
        let host = config.host.to_ascii_lowercase();
        let host = match host.as_str() {
            "*" => Host::Any,
            host if host.starts_with("*.") => Host::Below(host.trim_start_matches('*').into()),
            host => Host::Exactly(host.into()),
        };
        Route {
            name: config.name.as_str().into(),
            to: config.to.as_str().into(),
            auth: config.auth,
            timeout: Duration::from_millis(u64::from(config.timeout_ms)),
            idle_timeout: Duration::from_millis(u64::from(config.idle_timeout_ms)),
            body_bytes_max: config.body_bytes_max.map(ByteSize::bytes),
            preserve_host: config.preserve_host,
            host,
            prefix: config.path_prefix.trim_end_matches('/').into(),
            methods: config.methods.iter().map(|method| method.to_ascii_uppercase().into()).collect(),
        }
    }

    fn matches(&self, host: Option<&str>, path: &str, method: &str) -> bool {
        let Some(rest) = path.strip_prefix(&*self.prefix) else { return false };
        if !(rest.is_empty() || rest.starts_with('/')) {
            return false;
        }
        let method_fits = self.methods.is_empty() || self.methods.iter().any(|m| **m == *method);
        method_fits && self.host.matches(host.map(without_port))
    }
}

impl Host {
    fn matches(&self, host: Option<&str>) -> bool {
        let Some(host) = host else { return matches!(self, Host::Any) };
        match self {
            Host::Any => true,
            Host::Exactly(wanted) => host.eq_ignore_ascii_case(wanted),
            Host::Below(suffix) => {
                let at = host.len().checked_sub(suffix.len());
                at.filter(|at| *at > 0)
                    .and_then(|at| host.get(at..))
                    .is_some_and(|end| end.eq_ignore_ascii_case(suffix))
            }
        }
    }
}

/// `[::1]:80` and `host:80` without the port.
fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// Why an upstream gave no answer: 502, 503 or 504 to whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamFault {
    /// It could not be reached, or broke off before its answer's head was whole.
    Unreachable,
    /// No endpoint is healthy, or none has room.
    Unavailable,
    /// No answer in time.
    Timeout,
    /// The request's own body broke off or was too large: the asker's fault.
    RequestBody,
}

/// Why a body ended early.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body on its way through, in either direction: streamed, with trailers.
pub type ProxyBody = UnsyncBoxBody<Bytes, BoxError>;

/// Which endpoint answered, for the access log: an extension of the answer.
#[derive(Clone, Debug)]
pub struct ServedBy(pub Arc<str>);

/// What the gateway asks of the cloud side on the request plane.
pub trait Exchange: Send + Sync {
    /// Sends `request`, whose headers are those to be sent, to a healthy endpoint of the upstream `to`. Without `Host` the endpoint's own is sent. `key`
    /// steers hashing algorithms. `deadline` is for the answer's head.
    ///
    /// An answer 101 carries hyper's `OnUpgrade` in its extensions; whoever gets it joins the two streams.
    ///
    /// # Cancel safety
    /// A dropped future abandons the request and its upstream connection.
    fn exchange<'a>(
        &'a self,
        to: &'a str,
        key: u64,
        request: http::Request<ProxyBody>,
        deadline: Instant,
    ) -> Pin<Box<dyn Future<Output = Result<http::Response<ProxyBody>, UpstreamFault>> + Send + 'a>>;
}

/// How large a request's body is, as far as its head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodySize {
    Exactly(u64),
    /// It will be cut off beyond this. Rules that look at the size see this one, and the deciding rule's `bytes_max` comes back.
    UpTo(u64),
}

impl Gateway {
    /// Admits one request of the request plane: still current, device rate, policy, rule rate, size. The path is as it came, still
    /// percent-encoded. Gives back how large the body may become by the rule that decided.
    ///
    /// # Errors
    /// [`Reject::Unauthenticated`], [`Reject::TooFast`], [`Reject::Forbidden`], [`Reject::TooLarge`]; counted here.
    pub fn admit_request(
        &self,
        client: &mut Client,
        action: Action,
        path: &str,
        size: BodySize,
        now: Instant,
    ) -> Result<Option<u64>, Reject> {
        let result = self.try_admit_request(client, action, path, size, now);
        if let Err(reject) = &result {
            self.note_reject(client, reject);
        }
        result
    }

    fn try_admit_request(
        &self,
        client: &mut Client,
        action: Action,
        path: &str,
        size: BodySize,
        now: Instant,
    ) -> Result<Option<u64>, Reject> {
        self.check_current(client)?;
        let snapshot = self.snapshot.load();
        let now_ms = wall_ms();
        client.seen(now_ms);
        self.charge(client, &snapshot, now)?;
        let (assumed, certain) = match size {
            BodySize::Exactly(bytes) => (bytes, bytes),
            BodySize::UpTo(bytes) => (bytes, 0),
        };
        let in_memory = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        let decision = self.decide(client, &snapshot, action, path, in_memory(assumed), now_ms);
        if !decision.is_allowed() {
            return Err(forbidden(&snapshot, &decision));
        }
        self.check_decision(client, &snapshot, &decision, in_memory(certain), now)?;
        Ok(decision.bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(name: &str, host: &str, path_prefix: &str, methods: &[&str]) -> RouteConfig {
        RouteConfig {
            name: name.into(),
            host: host.into(),
            path_prefix: path_prefix.into(),
            methods: methods.iter().map(|m| (*m).into()).collect(),
            to: "cloud".into(),
            auth: RouteAuth::None,
            timeout_ms: 1000,
            idle_timeout_ms: 1000,
            body_bytes_max: None,
            preserve_host: false,
        }
    }

    fn found<'r>(routes: &'r Routes, host: &str, path: &str, method: &str) -> Option<&'r str> {
        routes.find(Some(host), path, method).map(|route| &*route.name)
    }

    #[test]
    fn the_longest_prefix_wins_and_prefixes_end_at_segments() {
        let routes = Routes::new(&[
            route("all", "*", "/", &[]),
            route("api", "*", "/api/", &[]),
            route("v1", "*", "/api/v1", &["GET", "post"]),
        ]);
        assert_eq!(found(&routes, "h", "/", "GET"), Some("all"));
        assert_eq!(found(&routes, "h", "/apix", "GET"), Some("all"));
        assert_eq!(found(&routes, "h", "/api", "GET"), Some("api"));
        assert_eq!(found(&routes, "h", "/api/v1/x", "POST"), Some("v1"));
        assert_eq!(found(&routes, "h", "/api/v1/x", "DELETE"), Some("api"));
    }

    #[test]
    fn hosts_are_compared_without_port_and_case() {
        let routes = Routes::new(&[
            route("exact", "Gateway.Example", "/", &[]),
            route("below", "*.example.org", "/", &[]),
            route("v6", "[::1]", "/", &[]),
        ]);
        assert_eq!(found(&routes, "gateway.example:8080", "/", "GET"), Some("exact"));
        assert_eq!(found(&routes, "a.Example.org", "/", "GET"), Some("below"));
        assert_eq!(found(&routes, "example.org", "/", "GET"), None);
        assert_eq!(found(&routes, ".example.org", "/", "GET"), None);
        assert_eq!(found(&routes, "evilexample.org", "/", "GET"), None);
        assert_eq!(found(&routes, "[::1]:80", "/", "GET"), Some("v6"));
        assert_eq!(routes.find(None, "/", "GET").map(|r| &*r.name), None);
    }
}
