//! What came over another protocol and goes to an upstream as HTTP.

use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Full};

use super::Context;
use super::headers::{self, Passing};
use super::relay::balancing_key;
use crate::gateway::cached::{self, Errand};
use crate::gateway::{ProxyBody, RouteAuth, UpstreamFault};
use crate::listener::{Relay, RelayFault, Relayed};
use crate::message::Reject;

impl Relay for Context {
    fn relay(&self, relayed: Relayed) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, RelayFault>> + Send>> {
        let context = self.clone();
        Box::pin(async move { relay(&context, relayed).await })
    }
}

async fn relay(context: &Context, relayed: Relayed) -> Result<Response<Bytes>, RelayFault> {
    let began = Instant::now();
    let Some(exchange) = &context.exchange else { return Err(RelayFault::Upstream(UpstreamFault::Unavailable)) };
    if relayed.host.as_ref().is_some_and(|host| !headers::is_authority(host.as_bytes())) {
        return Err(RelayFault::Reject(Reject::Malformed { what: "a host that programs read differently" }));
    }
    let requests_max = context.gateway.with_rules(|rules| rules.limits.requests_in_flight_max);
    let _slot = context.shared.request_slot(requests_max).map_err(RelayFault::Reject)?;
    let Relayed { route, request, peer, is_tls, host, device, mut kept, answer_bytes_max } = relayed;
    let (mut parts, body) = request.into_parts();
    let url = route.cache.is_some().then(|| cached::url(is_tls, host.as_deref(), &parts.uri));
    let request_id = context.shared.next_request_id();
    let passing = Passing {
        peer: peer.to_canonical(),
        is_tls,
        host: host.as_deref(),
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
