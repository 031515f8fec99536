//! The request plane's table: which requests go to which upstream, and what the gateway asks of one.
//!
//! Hosts and paths are compared in the one spelling that policy uses too ([`canonical_path`]): `/%61dmin` is `/admin` for a route as it is for
//! a backend, and a path that two programs could cut differently matches nothing.

mod bearers;
mod config;
mod connect;
mod cors;
mod edits;
mod fixed;
mod rewrite;
mod shadow;
pub mod step;
mod template;

use std::future::Future;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::combinators::UnsyncBoxBody;
use tokio::io::{AsyncRead, AsyncWrite};

use super::publish::forbidden;
use super::{Action, AddressKey, Client, DeviceId, Gateway, Reject, wall_ms};
use crate::cache::response::Rule as CacheRule;
use crate::limit::Left;
use crate::network::Network;
use crate::units::{ByteSize, Quota, Rate, SlidingRate};

pub use crate::policy::canonical_path;
pub use bearers::Bearers;
pub use config::{Auth as RouteAuth, Config as RouteConfig};
use connect::Target;
pub use connect::asked as asked_tunnel;
pub use shadow::shadowed;
use step::{Step, Visit};

/// A route as requests meet it.
#[derive(Debug)]
pub struct Route {
    pub name: Arc<str>,
    /// Empty: its steps answer.
    pub to: Arc<str>,
    pub auth: RouteAuth,
    /// With `RouteAuth::Jwt`.
    pub bearers: Option<Bearers>,
    pub timeout: Duration,
    pub idle_timeout: Duration,
    pub body_bytes_max: Option<u64>,
    pub preserve_host: bool,
    pub steps: Box<[Box<dyn Step>]>,
    /// Whether and how answers are kept.
    pub cache: Option<Arc<CacheRule>>,
    /// Not empty: for CONNECT, and nothing else.
    connect: Vec<Target>,
    host: Host,
    path: Path,
    methods: Vec<Box<str>>,
    /// `None`: any value.
    headers: Vec<(HeaderName, Option<HeaderValue>)>,
    has_cors: bool,
    allow: Vec<Network>,
    deny: Vec<Network>,
    rate: Option<(Quota, RateBy)>,
}

#[derive(Clone, Debug, PartialEq)]
enum Host {
    Any,
    /// With the leading dot.
    Below(Box<str>),
    Exactly(Box<str>),
}

#[derive(Clone, Debug, PartialEq)]
enum Path {
    Exactly(Box<str>),
    /// Without its last slash.
    Below(Box<str>),
}

/// Whom a route's rate counts.
#[derive(Clone, Debug)]
enum RateBy {
    Address,
    Device,
    Route,
    Header(HeaderName),
}

/// All routes, those that win first.
#[derive(Clone, Debug, Default)]
pub struct Routes(Vec<Arc<Route>>);

impl Routes {
    pub fn new(configs: &[RouteConfig]) -> Self {
        let mut routes: Vec<Arc<Route>> = configs.iter().map(|config| Arc::new(Route::new(config))).collect();
        // Stable: among equals the order of the file stands.
        routes.sort_by_key(|route| std::cmp::Reverse(route.path.rank()));
        Routes(routes)
    }

    fn bearers(&self) -> impl Iterator<Item = &Bearers> {
        self.0.iter().filter_map(|route| route.bearers.as_ref())
    }

    /// Whether keys of identity providers come from files.
    pub fn read_files(&self) -> bool {
        self.bearers().any(Bearers::reads_file)
    }

    /// Reads the files with keys of identity providers that have changed. Blocks.
    pub fn refresh(&self) {
        self.bearers().for_each(Bearers::refresh);
    }

    /// Routes whose provider is to be asked for its keys now.
    pub fn due(&self, now: Instant) -> Vec<Arc<Route>> {
        let is_due = |route: &&Arc<Route>| route.bearers.as_ref().is_some_and(|bearers| bearers.is_due(now));
        self.0.iter().filter(is_due).cloned().collect()
    }

    /// Goes on with the keys that the routes before a reload had.
    pub fn take_over(&self, old: &Routes) {
        for bearers in self.bearers() {
            old.bearers().for_each(|old| bearers.take_over(old));
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The route for a request, whose `path` is canonical ([`canonical_path`]).
    pub fn find(&self, visit: &Visit<'_>, path: &str) -> Option<&Arc<Route>> {
        if let Some(method) = cors::preflighted(visit.method, visit.headers)
            && let Some(route) = self.find_for(method, visit, path)
            && route.has_cors
        {
            return Some(route);
        }
        self.find_for(visit.method.as_str(), visit, path)
    }

    /// The route for a tunnel to `host` and `port`; `None` where no route allows it.
    pub fn find_tunnel(&self, visit: &Visit<'_>, host: &str, port: u16) -> Option<&Arc<Route>> {
        let has =
            |route: &Route| route.headers.iter().all(|(name, value)| has_header(visit.headers, name, value.as_ref()));
        self.0.iter().find(|route| route.connect.iter().any(|target| target.allows(host, port)) && has(route))
    }

    /// Whether any route is for tunnels.
    pub fn has_tunnels(&self) -> bool {
        self.0.iter().any(|route| !route.connect.is_empty())
    }

    fn find_for(&self, method: &str, visit: &Visit<'_>, path: &str) -> Option<&Arc<Route>> {
        self.0.iter().find(|route| route.matches(method, visit, path))
    }
}

impl Route {
    fn new(config: &RouteConfig) -> Self {
        let header = |(name, value): (&String, &String)| {
            let value = if value == "*" { None } else { Some(HeaderValue::from_str(value).ok()?) };
            Some((HeaderName::try_from(name).ok()?, value))
        };
        let rate_by = match config.rate_by.as_str() {
            "device" => RateBy::Device,
            "route" => RateBy::Route,
            by => match by.strip_prefix("header:").and_then(|name| HeaderName::try_from(name).ok()) {
                Some(name) => RateBy::Header(name),
                None => RateBy::Address,
            },
        };
        Route {
            name: config.name.as_str().into(),
            to: config.to.as_str().into(),
            auth: config.auth,
            bearers: config.jwt.as_ref().filter(|_| config.auth == RouteAuth::Jwt).map(Bearers::new),
            timeout: Duration::from_millis(u64::from(config.timeout_ms)),
            idle_timeout: Duration::from_millis(u64::from(config.idle_timeout_ms)),
            body_bytes_max: config.body_bytes_max.map(ByteSize::bytes),
            preserve_host: config.preserve_host,
            steps: step::of(config),
            cache: config.cache.as_ref().map(|cache| Arc::new(CacheRule::new(cache))),
            connect: config.connect.iter().filter_map(|target| Target::parse(target)).collect(),
            host: Host::of(config),
            path: Path::of(config),
            methods: config.methods.iter().map(|method| method.to_ascii_uppercase().into()).collect(),
            headers: config.headers.iter().filter_map(header).collect(),
            has_cors: config.cors.is_some(),
            allow: config.allow.clone(),
            deny: config.deny.clone(),
            rate: config.rate.map(|rate| (rate, rate_by)),
        }
    }

    fn matches(&self, method: &str, visit: &Visit<'_>, path: &str) -> bool {
        self.connect.is_empty()
            && self.path.matches(path)
            && (self.methods.is_empty() || self.methods.iter().any(|m| **m == *method))
            && self.host.matches(visit.host.map(without_port))
            && self.headers.iter().all(|(name, value)| has_header(visit.headers, name, value.as_ref()))
    }

    fn permits(&self, peer: IpAddr) -> bool {
        let within = |networks: &[Network]| networks.iter().any(|network| network.contains(peer));
        !within(&self.deny) && (self.allow.is_empty() || within(&self.allow))
    }
}

fn has_header(headers: &HeaderMap, name: &HeaderName, value: Option<&HeaderValue>) -> bool {
    match value {
        None => headers.contains_key(name),
        Some(value) => headers.get_all(name).iter().any(|has| has == value),
    }
}

impl Path {
    fn of(config: &RouteConfig) -> Self {
        if config.path.is_empty() {
            Path::Below(config.path_prefix.trim_end_matches('/').into())
        } else {
            Path::Exactly(config.path.as_str().into())
        }
    }

    /// Exact paths before prefixes, longer ones before shorter.
    fn rank(&self) -> (bool, usize) {
        match self {
            Path::Exactly(path) => (true, path.len()),
            Path::Below(prefix) => (false, prefix.len()),
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Path::Exactly(exact) => **exact == *path,
            Path::Below(prefix) => {
                path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl Host {
    fn of(config: &RouteConfig) -> Self {
        Host::parse(&config.host)
    }

    fn parse(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "*" => Host::Any,
            host if host.starts_with("*.") => Host::Below(host.trim_start_matches('*').into()),
            host => Host::Exactly(host.into()),
        }
    }

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

/// A stream to somewhere, of which nothing more is known.
pub trait Line: AsyncRead + AsyncWrite + Send + Unpin {}

impl<IO: AsyncRead + AsyncWrite + Send + Unpin> Line for IO {}

/// What a tunnel is made of.
pub type Dialled = Result<Box<dyn Line>, UpstreamFault>;

/// What the gateway asks of the cloud side on the request plane.
pub trait Exchange: Send + Sync {
    /// Sends `request`, whose headers are those to be sent, to a healthy endpoint of the upstream `to`. Without `Host` the endpoint's own is sent. `key`
    /// steers hashing algorithms. By `deadline` there is the answer's head or [`UpstreamFault::Timeout`].
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

    /// Connects to a host and port that a route allows, for a tunnel (CONNECT), by `deadline`.
    ///
    /// # Cancel safety
    /// A dropped future abandons the connection.
    fn dial<'a>(
        &'a self,
        host: &'a str,
        port: u16,
        deadline: Instant,
    ) -> Pin<Box<dyn Future<Output = Dialled> + Send + 'a>>;
}

/// How large a request's body is, as far as its head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodySize {
    Exactly(u64),
    /// It will be cut off beyond this. Rules that look at the size see this one, and the deciding rule's `bytes_max` comes back.
    UpTo(u64),
}

/// What is left of a route's rate, for whoever asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLeft {
    /// Requests per window, and the window.
    pub quota: u32,
    pub window: Duration,
    pub left: u32,
    /// Until all of it is there again, or, where nothing is left, until something is.
    pub reset: Duration,
}

impl Gateway {
    /// Admits a request to a route by what the route itself says, with what is left of its rate if it has one.
    ///
    /// # Errors
    /// [`Reject::Forbidden`] by `allow` and `deny`; [`Reject::TooFast`] over `rate`, with the rate that is exhausted.
    pub fn admit_route(
        &self,
        route: &Route,
        visit: &Visit<'_>,
        device: Option<&DeviceId>,
        now: Instant,
    ) -> Result<Option<RateLeft>, (Reject, Option<RateLeft>)> {
        if !route.permits(visit.peer) {
            return Err((Reject::Forbidden { rule: None }, None));
        }
        let Some((quota, by)) = &route.rate else { return Ok(None) };
        let of_address = || self.route_hasher.hash_one(AddressKey::from(visit.peer));
        let who = match by {
            RateBy::Address => of_address(),
            RateBy::Device => device.map_or_else(of_address, |device| self.route_hasher.hash_one(device.as_str())),
            RateBy::Route => 0,
            RateBy::Header(name) => self.route_hasher.hash_one(visit.headers.get(name).map(HeaderValue::as_bytes)),
        };
        let (nanos, name) = (self.nanos(now), &*route.name);
        let (count, period, taken) = match *quota {
            Quota::Bucket(rate @ Rate { count, period, .. }) => {
                let key = (self.route_hasher.hash_one(name), who);
                (count, period, self.per_route.take(&key, nanos, rate, 1))
            }
            Quota::Sliding(rate @ SlidingRate { count, period }) => {
                // A window of another length has other slots, after a reload.
                let key = (self.route_hasher.hash_one((name, period.duration())), who);
                (count, period, self.per_route_windows.take(&key, nanos, rate, 1))
            }
        };
        let state =
            |left: Left| RateLeft { quota: count, window: period.duration(), left: left.tokens, reset: left.full_in };
        match taken {
            Ok(left) => Ok(Some(state(left))),
            Err(retry_after) => {
                let nothing = state(Left { tokens: 0, full_in: retry_after });
                Err((Reject::TooFast { limit: "route.rate", retry_after }, Some(nothing)))
            }
        }
    }

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
            ..RouteConfig::default()
        }
    }

    /// A request's head, as the steps see it.
    pub(super) fn head(method: &str, target: &str, headers: &[(&'static str, &'static str)]) -> http::request::Parts {
        let mut request = http::Request::builder().method(method).uri(target).body(()).unwrap();
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        request.into_parts().0
    }

    pub(super) fn answered(headers: &[(&'static str, &'static str)]) -> http::response::Parts {
        let mut response = http::Response::new(());
        for (name, value) in headers {
            response.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        response.into_parts().0
    }

    pub(super) fn kept(target: &str) -> step::Kept {
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        step::Kept {
            peer: [192, 0, 2, 1].into(),
            device: Some("d1".into()),
            host: Some("gateway.example:8080".into()),
            path: path.into(),
            query: query.map(Into::into),
            request_id: Some(HeaderValue::from_static("id1")),
            origin: None,
        }
    }

    fn find<'r>(routes: &'r Routes, host: Option<&str>, path: &str, head: &http::request::Parts) -> Option<&'r str> {
        let visit = Visit {
            method: &head.method,
            path,
            query: None,
            host,
            peer: [192, 0, 2, 1].into(),
            headers: &head.headers,
        };
        routes.find(&visit, path).map(|route| &*route.name)
    }

    fn found<'r>(routes: &'r Routes, host: &str, path: &str, method: &str) -> Option<&'r str> {
        find(routes, Some(host), path, &head(method, "/", &[]))
    }

    #[test]
    fn the_longest_prefix_wins_and_prefixes_end_at_segments() {
        let routes = Routes::new(&[
            route("all", "*", "/", &[]),
            route("api", "*", "/api/", &[]),
            route("v1", "*", "/api/v1", &["GET", "post"]),
            RouteConfig { path: "/api/v1/x".into(), ..route("exact", "*", "/", &["GET"]) },
        ]);
        assert_eq!(found(&routes, "h", "/", "GET"), Some("all"));
        assert_eq!(found(&routes, "h", "/apix", "GET"), Some("all"));
        assert_eq!(found(&routes, "h", "/api", "GET"), Some("api"));
        assert_eq!(found(&routes, "h", "/api/v1/x", "POST"), Some("v1"));
        assert_eq!(found(&routes, "h", "/api/v1/x", "DELETE"), Some("api"));
        assert_eq!(found(&routes, "h", "/api/v1/x", "GET"), Some("exact"));
        assert_eq!(found(&routes, "h", "/api/v1/x/", "GET"), Some("v1"));
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
        assert_eq!(find(&routes, None, "/", &head("GET", "/", &[])), None);
    }

    #[test]
    fn headers_choose_among_routes_of_one_path() {
        let with = |name: &str, header: &str, value: &str| RouteConfig {
            headers: [(header.to_owned(), value.to_owned())].into(),
            ..route(name, "*", "/", &[])
        };
        let routes =
            Routes::new(&[with("v2", "X-Version", "2"), with("some", "x-version", "*"), route("none", "*", "/", &[])]);
        for (version, name) in [("2", "v2"), ("3", "some")] {
            assert_eq!(find(&routes, None, "/", &head("GET", "/", &[("x-version", version)])), Some(name));
        }
        assert_eq!(find(&routes, None, "/", &head("GET", "/", &[])), Some("none"));
    }

    #[test]
    fn a_preflight_belongs_to_the_route_of_the_request_it_asks_for() {
        let cors = Some(serde_json::from_str(r#"{ "origins": ["*"] }"#).unwrap());
        let routes = Routes::new(&[
            RouteConfig { cors, ..route("api", "*", "/api", &["PUT"]) },
            route("closed", "*", "/closed", &["PUT"]),
            route("rest", "*", "/", &[]),
        ]);
        let preflight = head("OPTIONS", "/", &[("origin", "https://a"), ("access-control-request-method", "PUT")]);
        assert_eq!(find(&routes, None, "/api", &preflight), Some("api"));
        assert_eq!(find(&routes, None, "/closed", &preflight), Some("rest"), "without cors the upstream answers it");
        assert_eq!(find(&routes, None, "/api", &head("OPTIONS", "/", &[])), Some("rest"));
    }

    #[test]
    fn networks_are_kept_out_by_deny_before_allow() {
        let network = |text: &str| text.parse::<Network>().unwrap();
        let config = RouteConfig {
            allow: vec![network("10.0.0.0/8")],
            deny: vec![network("10.1.0.0/16")],
            ..route("r", "*", "/", &[])
        };
        let route = Route::new(&config);
        assert!(route.permits([10, 0, 0, 1].into()));
        assert!(!route.permits([10, 1, 0, 1].into()) && !route.permits([192, 0, 2, 1].into()));
        assert!(Route::new(&RouteConfig::default()).permits([192, 0, 2, 1].into()));
    }
}
