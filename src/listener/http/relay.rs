//! The request plane: a request that is none of the gateway's own is matched against the routes, admitted, and handed to an upstream; body and
//! answer stream through.
//!
//! Order: path has one spelling → route → its steps → address or device, policy, rates, size → one of `requests_in_flight_max` → headers → steps →
//! upstream → steps. Nothing of the body is read, and no 100 sent, before the upstream wants it.
//!
//! Cost of a request beside the upstream's: one search of the routes, two header maps edited in place, four small allocations.

use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use http::header::{AUTHORIZATION, CONNECTION, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body as _, Incoming};
use hyper::upgrade::OnUpgrade;

use super::body::Body;
use super::headers::{self, Passing};
use super::problem::Refused;
use super::stream::{Download, Held, Upload, Verdict};
use super::upgrade::{self, Far, Tunnel};
use super::{Connection, Facts, identify, millis};
use crate::gateway::cached::{self, CacheOutcome, Errand};
use crate::gateway::{BodySize, Kept, ProxyBody, Route, RouteAuth, ServedBy, UpstreamFault, Visit, canonical_path};
use crate::message::{Action, Device, Reject};
use crate::telemetry::meters;

impl Connection {
    /// Answers a request that is none of the gateway's own.
    pub async fn relay(&self, request: Request<Incoming>, facts: &mut Facts) -> Result<Response<Body>, Refused> {
        let began = Instant::now();
        let route = match self.find_route(&request) {
            Ok(route) => route,
            Err(refused) => {
                self.gateway.admit_address(self.conn.peer.ip(), began)?;
                return Err(refused);
            }
        };
        facts.route = Some(route.name.clone());
        if route.steps.is_empty() {
            return self.through(request, &route, None, facts, began).await;
        }
        let mut kept = Kept::of(&self.visit(&request));
        let early = route.steps.iter().find_map(|step| step.before_admission(&self.visit(&request)));
        let response = match early {
            Some(answer) => {
                self.gateway.admit_address(self.conn.peer.ip(), began)?;
                answer.map(Body::from)
            }
            None => match self.through(request, &route, Some(&mut kept), facts, began).await {
                Ok(response) => response,
                Err(refused) => refused.response(facts.device.is_some()),
            },
        };
        let (mut parts, body) = response.into_parts();
        for step in &route.steps {
            step.after_upstream(&mut parts, &kept);
        }
        Ok(Response::from_parts(parts, body))
    }

    /// Admission, and then the upstream or the step that answers.
    async fn through(
        &self,
        request: Request<Incoming>,
        route: &Route,
        kept: Option<&mut Kept>,
        facts: &mut Facts,
        began: Instant,
    ) -> Result<Response<Body>, Refused> {
        let bytes_max = route.body_bytes_max.unwrap_or(self.limits.body_bytes_max.bytes());
        let size = match request.body().size_hint().exact() {
            Some(bytes) if bytes > bytes_max => {
                self.gateway.admit_address(self.conn.peer.ip(), began)?;
                return Err(Reject::TooLarge { limit: BODY_LIMIT, bytes_max }.into());
            }
            Some(bytes) => BodySize::Exactly(bytes),
            None => BodySize::UpTo(bytes_max),
        };
        let by_rule = match route.auth {
            RouteAuth::None => {
                self.gateway.admit_address(self.conn.peer.ip(), began)?;
                None
            }
            RouteAuth::Jwt => {
                self.gateway.admit_address(self.conn.peer.ip(), began)?;
                believe(route, request.headers())?;
                None
            }
            RouteAuth::Device => {
                let asked = (request.method(), request.uri().path());
                self.admit(asked, request.headers(), size, facts, began).await?
            }
        };
        let device = facts.device.as_ref().map(|device| &device.id);
        let rate = match self.gateway.admit_route(route, &self.visit(&request), device, began) {
            Ok(rate) => rate,
            Err((reject, rate)) => {
                meters().http.reject(&reject);
                let mut response = Refused::from(reject).response(facts.device.is_some());
                headers::say_rate(response.headers_mut(), &route.name, rate);
                return Ok(response);
            }
        };
        let slot = self.shared.request_slot(self.limits.requests_in_flight_max)?;
        let held = Held::new(slot, self.activity.begin());
        let limit = lower(by_rule, (BODY_LIMIT, bytes_max));
        let mut response = self.pass_on(request, route, limit, held, kept, facts, began).await?;
        headers::say_rate(response.headers_mut(), &route.name, rate);
        Ok(response)
    }

    pub(super) fn visit<'v>(&self, request: &'v Request<Incoming>) -> Visit<'v> {
        Visit {
            method: request.method(),
            path: request.uri().path(),
            query: request.uri().query(),
            host: headers::host(request.uri(), request.headers()),
            peer: self.conn.peer.ip(),
            headers: request.headers(),
        }
    }

    fn find_route(&self, request: &Request<Incoming>) -> Result<Arc<Route>, Refused> {
        if request.method() == Method::TRACE {
            return Err(Refused::NotImplemented);
        }
        let path = canonical_path(request.uri().path())
            .ok_or(Reject::Malformed { what: "a path that programs read differently" })?;
        let visit = self.visit(request);
        let found = self.gateway.with_rules(|rules| rules.routes.find(&visit, &path).cloned());
        let route = found.ok_or(Refused::NoRoute)?;
        if headers::is_loop(request.headers(), &self.shared.via) {
            tracing::warn!(route = &*route.name, upstream = &*route.to, "the upstream is this gateway itself");
            return Err(Refused::Loop);
        }
        Ok(route)
    }

    /// Admission of a device to a method of a resource: how large the body may become by the rule that allows it.
    pub(super) async fn admit(
        &self,
        (method, resource): (&Method, &str),
        headers: &HeaderMap,
        size: BodySize,
        facts: &mut Facts,
        now: Instant,
    ) -> Result<Option<u64>, Refused> {
        facts.device = self.caller(headers)?;
        let Some(action) = Action::parse(method.as_str()) else {
            // A rule cannot name it, so none allows it.
            return Err(Reject::Forbidden { rule: None }.into());
        };
        let admitted = self
            .seats
            .with(&self.gateway, &self.conn, facts.device.clone(), |gateway, client| {
                gateway.admit_request(client, action, resource, size, now)
            })
            .await??;
        Ok(admitted)
    }

    #[expect(clippy::too_many_arguments, reason = "one caller; what a request has gathered on its way")]
    async fn pass_on(
        &self,
        mut request: Request<Incoming>,
        route: &Route,
        (limit, bytes_max): (&'static str, u64),
        held: Held,
        kept: Option<&mut Kept>,
        facts: &mut Facts,
        began: Instant,
    ) -> Result<Response<Body>, Refused> {
        let request_id = headers::request_id(request.headers()).unwrap_or_else(|| self.shared.next_request_id());
        facts.request_id = Some(request_id.clone());
        let wanted = wanted_upgrade(&request);
        let upgrade = wanted.is_some().then(|| hyper::upgrade::on(&mut request));
        let verdict = Arc::new(Verdict::default());
        let (mut parts, body) = request.into_parts();
        let url = route
            .cache
            .is_some()
            .then(|| cached::url(self.conn.tls.is_some(), headers::host(&parts.uri, &parts.headers), &parts.uri));
        self.address(&mut parts, route, wanted, facts.device.as_deref(), &request_id);
        if let Some(kept) = kept {
            kept.device = facts.device.as_ref().map(|device| device.id.as_str().into());
            kept.request_id = Some(request_id.clone());
            if let Some(answer) = route.steps.iter().find_map(|step| step.before_upstream(&mut parts, kept)) {
                return Ok(answer.map(Body::from));
            }
        }
        let Some(exchange) = &self.exchange else { return Err(Refused::Upstream(UpstreamFault::Unavailable)) };
        let body = if body.is_end_stream() {
            ProxyBody::new(Empty::new().map_err(|never| match never {}))
        } else {
            let patience = millis(self.limits.body_timeout_ms);
            facts.upload = Some(verdict.clone());
            ProxyBody::new(Upload::new(body, bytes_max, patience, verdict.clone()))
        };
        let key = balancing_key(self.conn.peer.ip());
        let request = Request::from_parts(parts, body);
        let deadline = began + route.timeout;
        let answered = match (&route.cache, url) {
            (Some(rule), Some(url)) => {
                let device = facts.device.as_ref().map(|device| device.id.as_str());
                let errand = Errand { route, rule, url, device, balancing: key, deadline };
                self.gateway.cached().exchange(exchange, errand, request).await
            }
            _ => exchange.exchange(&route.to, key, request, deadline).await,
        };
        facts.upstream = Some(began.elapsed());
        let response = match answered {
            Ok(response) => response,
            Err(fault) => {
                return Err(verdict.refused(limit, bytes_max).unwrap_or(Refused::Upstream(fault)));
            }
        };
        facts.cache = response.extensions().get::<CacheOutcome>().map(|outcome| outcome.as_str());
        facts.endpoint = response.extensions().get::<ServedBy>().map(|served_by| served_by.0.clone());
        self.bring_back(response, route, upgrade, held, &request_id)
    }

    /// Makes the client's head into the one for the upstream.
    fn address(
        &self,
        parts: &mut Parts,
        route: &Route,
        upgrade: Option<HeaderValue>,
        device: Option<&Device>,
        request_id: &HeaderValue,
    ) {
        let passing = Passing {
            whence: &self.whence,
            host: headers::host_value(&parts.uri, &parts.headers),
            preserve_host: route.preserve_host,
            is_proxy: self.conn.listener.believes(self.conn.peer.ip()),
            via: &self.shared.via,
            device: device.map(|device| (device.id.as_str(), &*device.role)),
            hide_authorization: route.auth == RouteAuth::Device,
            request_id,
            upgrade,
            version: parts.version,
        };
        headers::towards_upstream(&mut parts.headers, &passing);
        if parts.uri.authority().is_some() {
            // Absolute-form and HTTP/2 name the host in the target; the upstream gets origin-form.
            let target = parts.uri.path_and_query().cloned();
            parts.uri = target.map_or_else(|| Uri::from_static("/"), Uri::from);
        }
        parts.version = Version::HTTP_11;
        // What our server has put there is not the upstream's.
        parts.extensions.clear();
    }

    fn bring_back(
        &self,
        response: Response<ProxyBody>,
        route: &Route,
        upgrade: Option<OnUpgrade>,
        held: Held,
        request_id: &HeaderValue,
    ) -> Result<Response<Body>, Refused> {
        let (mut parts, body) = response.into_parts();
        let switched = parts.status == StatusCode::SWITCHING_PROTOCOLS;
        headers::towards_client(&mut parts.headers, &self.shared.via, parts.version, switched, request_id);
        if switched {
            let theirs = parts.extensions.remove::<OnUpgrade>();
            let (Some(client), Some(upstream)) = (upgrade, theirs) else {
                tracing::warn!(upstream = &*route.to, "upstream switched protocols unasked");
                return Err(Refused::Upstream(UpstreamFault::Unreachable));
            };
            self.upgrade.tunnel(Tunnel { client, upstream: Far::Upgraded(upstream), idle: route.idle_timeout, held });
            let mut response = Response::new(Body::Empty);
            *response.status_mut() = parts.status;
            *response.headers_mut() = parts.headers;
            return Ok(response);
        }
        let mut response = Response::new(Body::Download(Box::new(Download::new(body, route.idle_timeout, held))));
        *response.status_mut() = parts.status;
        *response.headers_mut() = parts.headers;
        Ok(response)
    }

    /// Who asks, where somebody has to.
    pub fn caller(&self, headers: &HeaderMap) -> Result<Option<Arc<Device>>, Refused> {
        let device = identify::identify(&self.gateway, &self.conn, headers).map_err(|reject| self.stranger(reject))?;
        if device.is_none() {
            self.gateway.anonymous_role().map_err(|reject| self.stranger(reject))?;
        }
        Ok(device)
    }
}

/// The limit that a body meets first: ours, or that of the rule that allows it.
pub(super) fn lower(by_rule: Option<u64>, ours: (&'static str, u64)) -> (&'static str, u64) {
    by_rule.filter(|by_rule| *by_rule < ours.1).map_or(ours, |by_rule| ("bytes_max", by_rule))
}

/// Takes a token of the route's identity provider.
pub(super) fn believe(route: &Route, headers: &HeaderMap) -> Result<(), Refused> {
    let mut shown = headers.get_all(AUTHORIZATION).iter();
    let (Some(authorization), None) = (shown.next(), shown.next()) else {
        meters().http.reject(&Reject::Unauthenticated);
        return Err(Reject::Unauthenticated.into());
    };
    let token = identify::bearer(authorization).and_then(|token| std::str::from_utf8(token).ok());
    let now_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let believed = match (token, &route.bearers) {
        (Some(token), Some(bearers)) => bearers.believe(token, now_unix).map_err(|refusal| format!("{refusal:?}")),
        _ => Err("no bearer token".to_owned()),
    };
    believed.map_err(|why| {
        tracing::debug!(route = &*route.name, why, "token refused");
        meters().http.reject(&Reject::Unauthenticated);
        Refused::Token
    })
}

/// Steers balancing by hash: one client, one endpoint.
pub fn balancing_key(peer: IpAddr) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    peer.hash(&mut hasher);
    hasher.finish()
}

/// The protocol a client wants to change to (RFC 9110 section 7.8).
fn wanted_upgrade(request: &Request<Incoming>) -> Option<HeaderValue> {
    let asks = request.version() == Version::HTTP_11 && upgrade::has_token(request.headers(), &CONNECTION, "upgrade");
    if !asks {
        return None;
    }
    // HTTP/2 is offered by its preface, not by an upgrade of somebody else's connection.
    request.headers().get(UPGRADE).filter(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c")).cloned()
}

const BODY_LIMIT: &str = "body_bytes_max";
