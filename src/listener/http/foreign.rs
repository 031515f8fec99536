//! What came over another protocol and goes to an upstream as HTTP.

use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};

use super::Context;
use super::headers::{self, Passing, Whence};
use super::problem::{self, Refused};
use super::relay::balancing_key;
use crate::gateway::cached::{self, CacheOutcome, Errand};
use crate::gateway::{ProxyBody, RouteAuth, ServedBy, UpstreamFault, wall_ms};
use crate::listener::{Relay, RelayFault, Relayed};
use crate::message::Reject;
use crate::telemetry::access_log::Entry;
use crate::telemetry::meters;

impl Relay for Context {
    fn relay(&self, relayed: Relayed) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, RelayFault>> + Send>> {
        let context = self.clone();
        Box::pin(async move {
            let began = Instant::now();
            let request_id = context.shared.next_request_id();
            let log = context.shared.access_log.as_ref().map(|log| log.note(entry(&relayed, &request_id), began));
            let outcome = relay(&context, relayed, request_id, began).await;
            let (status, bytes) = match &outcome {
                Ok(response) => (response.status(), response.body().len() as u64),
                Err(RelayFault::Reject(reject)) => (problem::status(reject), 0),
                Err(RelayFault::Upstream(fault)) => (Refused::Upstream(*fault).status(), 0),
                Err(RelayFault::AnswerTooLarge) => (StatusCode::BAD_GATEWAY, 0),
            };
            meters().request(status.as_u16(), began.elapsed());
            if let Some(mut log) = log {
                log.entry.status = status.as_u16();
                if let Ok(response) = &outcome {
                    let said = response.extensions();
                    log.entry.endpoint = said.get::<ServedBy>().map(|served_by| served_by.0.clone());
                    log.entry.cache = said.get::<CacheOutcome>().map(|outcome| outcome.as_str());
                }
                // The answer is read whole before it goes on.
                log.entry.upstream = log.entry.endpoint.as_ref().map(|_| began.elapsed());
                log.write(bytes);
            }
            outcome
        })
    }
}

/// The line of the access log, without its outcome.
fn entry(relayed: &Relayed, request_id: &HeaderValue) -> Entry {
    let Relayed { route, request, peer, host, device, .. } = relayed;
    Entry {
        time_ms: wall_ms(),
        peer: peer.to_canonical(),
        device: device.as_ref().map(|device| device.id.clone()),
        method: request.method().clone(),
        version: "CoAP",
        host: host.clone(),
        target: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
        status: 0,
        route: Some(route.name.clone()),
        endpoint: None,
        upstream: None,
        request_id: request_id.to_str().ok().map(str::to_owned),
        cache: None,
    }
}

async fn relay(
    context: &Context,
    relayed: Relayed,
    request_id: HeaderValue,
    began: Instant,
) -> Result<Response<Bytes>, RelayFault> {
    let Some(exchange) = &context.exchange else { return Err(RelayFault::Upstream(UpstreamFault::Unavailable)) };
    if relayed.host.as_ref().is_some_and(|host| !headers::is_authority(host.as_bytes())) {
        return Err(RelayFault::Reject(Reject::Malformed { what: "a host that programs read differently" }));
    }
    let requests_max = context.gateway.with_rules(|rules| rules.limits.requests_in_flight_max);
    let _slot = context.shared.request_slot(requests_max).map_err(RelayFault::Reject)?;
    let Relayed { route, request, peer, is_tls, host, device, mut kept, answer_bytes_max } = relayed;
    let (mut parts, body) = request.into_parts();
    let url = route.cache.is_some().then(|| cached::url(is_tls, host.as_deref(), &parts.uri));
    let passing = Passing {
        whence: &Whence::new(peer, is_tls),
        host: host.as_deref().and_then(|host| HeaderValue::from_str(host).ok()),
        preserve_host: route.preserve_host,
        is_proxy: false,
        via: &context.shared.via,
        device: device.as_ref().map(|device| (device.id.as_str(), &*device.role)),
        hide_authorization: route.auth == RouteAuth::Device,
        request_id: &request_id,
        upgrade: None,
        version: parts.version,
    };
    headers::towards_upstream(&mut parts.headers, &passing);
    parts.version = Version::HTTP_11;
    kept.device = device.as_ref().map(|device| device.id.as_str().into());
    kept.request_id = Some(request_id.clone());
    let answered = route.steps.iter().find_map(|step| step.before_upstream(&mut parts, &kept));
    let response = match answered {
        Some(response) => response,
        None => {
            let body = ProxyBody::new(Full::new(body).map_err(|never| match never {}));
            let deadline = began + route.timeout;
            let (balancing, request) = (balancing_key(peer), Request::from_parts(parts, body));
            let asked = match (&route.cache, url) {
                (Some(rule), Some(url)) => {
                    let device = device.as_ref().map(|device| device.id.as_str());
                    let errand = Errand { route: &route, rule, url, device, balancing, deadline };
                    context.gateway.cached().exchange(exchange, errand, request)
                }
                _ => exchange.exchange(&route.to, balancing, request, deadline),
            };
            // One deadline for head and body: the asker waits for the whole.
            let whole = tokio::time::timeout_at(deadline.into(), async {
                let (mut parts, body) = asked.await.map_err(RelayFault::Upstream)?.into_parts();
                headers::towards_client(&mut parts.headers, &context.shared.via, parts.version, false, &request_id);
                Ok(Response::from_parts(parts, collect(body, answer_bytes_max).await?))
            });
            whole.await.unwrap_or(Err(RelayFault::Upstream(UpstreamFault::Timeout)))?
        }
    };
    let (mut parts, body) = response.into_parts();
    for step in &route.steps {
        step.after_upstream(&mut parts, &kept);
    }
    Ok(Response::from_parts(parts, body))
}

async fn collect(mut body: ProxyBody, bytes_max: usize) -> Result<Bytes, RelayFault> {
    let mut collected = BytesMut::new();
    while let Some(frame) = body.frame().await {
        // A body that breaks off is worth no more than none.
        let frame = frame.map_err(|_| RelayFault::Upstream(UpstreamFault::Unreachable))?;
        let Ok(data) = frame.into_data() else { continue };
        if collected.len().saturating_add(data.len()) > bytes_max {
            return Err(RelayFault::AnswerTooLarge);
        }
        collected.extend_from_slice(&data);
    }
    Ok(collected.freeze())
}
