//! CONNECT: a tunnel to where a route allows one (RFC 9110 section 9.3.6, RFC 9113 section 8.5). Without such a route there is none.

use std::sync::Arc;
use std::time::Instant;

use http::header::{AUTHORIZATION, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, WWW_AUTHENTICATE};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper::body::{Body as _, Incoming};

use super::body::Body;
use super::problem::Refused;
use super::relay::believe;
use super::stream::Held;
use super::upgrade::{Far, Tunnel};
use super::{Connection, Facts, headers};
use crate::gateway::{BodySize, Route, RouteAuth, UpstreamFault, asked_tunnel};
use crate::message::Reject;
use crate::tasks::Tasks;
use crate::telemetry::meters;

impl Connection {
    /// Answers CONNECT.
    pub(super) async fn connect(
        &self,
        mut request: Request<Incoming>,
        facts: &mut Facts,
    ) -> Result<Response<Body>, Refused> {
        shown_to_a_proxy(request.headers_mut());
        self.tunnel(request, facts).await.or_else(|refused| {
            let mut response = match refused.status() {
                StatusCode::UNAUTHORIZED => refused.response(facts.device.is_some()),
                _ => return Err(refused),
            };
            *response.status_mut() = StatusCode::PROXY_AUTHENTICATION_REQUIRED;
            if let Some(challenge) = response.headers_mut().remove(WWW_AUTHENTICATE) {
                response.headers_mut().insert(PROXY_AUTHENTICATE, challenge);
            }
            Ok(response)
        })
    }

    async fn tunnel(&self, mut request: Request<Incoming>, facts: &mut Facts) -> Result<Response<Body>, Refused> {
        let began = Instant::now();
        let authority = request.uri().authority().cloned();
        let (route, authority) = match self.find_tunnel(&request, authority) {
            Ok(found) => found,
            Err(refused) => {
                self.gateway.admit_address(self.conn.peer.ip(), began)?;
                return Err(refused);
            }
        };
        facts.route = Some(route.name.clone());
        match route.auth {
            RouteAuth::None => self.gateway.admit_address(self.conn.peer.ip(), began)?,
            RouteAuth::Jwt => {
                self.gateway.admit_address(self.conn.peer.ip(), began)?;
                believe(&route, request.headers())?;
            }
            RouteAuth::Device => {
                let asked = (&Method::CONNECT, authority.as_str());
                self.admit(asked, request.headers(), BodySize::Exactly(0), facts, began).await?;
            }
        }
        let device = facts.device.as_ref().map(|device| &device.id);
        let rate = match self.gateway.admit_route(&route, &self.visit(&request), device, began) {
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
        let Some(exchange) = &self.exchange else { return Err(Refused::Upstream(UpstreamFault::Unavailable)) };
        let (host, port) = asked_tunnel(&authority).ok_or(AMBIGUOUS)?;
        let dialled = exchange.dial(host, port, began + route.timeout).await;
        facts.upstream = Some(began.elapsed());
        let upstream = Far::Dialled(dialled.map_err(Refused::Upstream)?);
        facts.endpoint = Some(authority.as_str().into());
        let client = hyper::upgrade::on(&mut request);
        let tunnel = Tunnel { client, upstream, idle: route.idle_timeout, held };
        if request.version() == Version::HTTP_2 {
            // One stream of many, so the connection goes on beside it.
            let shutdown = self.shutdown.clone();
            Tasks::new(shutdown.clone()).spawn("http2-tunnel", async move {
                tokio::select! {
                    () = tunnel.serve() => {}
                    () = shutdown.cancelled() => {}
                }
            });
        } else {
            self.upgrade.tunnel(tunnel);
        }
        let mut response = Response::new(Body::Empty);
        headers::say_rate(response.headers_mut(), &route.name, rate);
        Ok(response)
    }

    fn find_tunnel(
        &self,
        request: &Request<Incoming>,
        authority: Option<Authority>,
    ) -> Result<(Arc<Route>, Authority), Refused> {
        let visit = self.visit(request);
        let found = self.gateway.with_rules(|rules| {
            if !rules.routes.has_tunnels() {
                return Err(Refused::NotImplemented);
            }
            let authority = authority.filter(|_| request.body().is_end_stream()).ok_or(AMBIGUOUS)?;
            let (host, port) = asked_tunnel(&authority).ok_or(AMBIGUOUS)?;
            let route = rules.routes.find_tunnel(&visit, host, port).cloned();
            // The list is the gateway's to keep, and no rule of a policy stands behind it.
            Ok((route.ok_or(Reject::Forbidden { rule: None })?, authority))
        });
        if let Err(Refused::Reject(reject)) = &found {
            meters().http.reject(reject);
        }
        found
    }
}

/// Credentials for a proxy stand in a field of their own (RFC 9110 section 11.7.2), and win.
fn shown_to_a_proxy(headers: &mut HeaderMap) {
    let shown: Vec<_> = headers.get_all(PROXY_AUTHORIZATION).iter().cloned().collect();
    if !shown.is_empty() {
        headers.remove(PROXY_AUTHORIZATION);
        headers.remove(AUTHORIZATION);
    }
    for value in shown {
        headers.append(AUTHORIZATION, value);
    }
}

const AMBIGUOUS: Refused = Refused::Reject(Reject::Malformed { what: "CONNECT takes HOST:PORT and no body" });
