//! Requests along routes.

use std::sync::Arc;

use http::HeaderMap;
use tidegate_coap::Request;

use super::{Moment, Reply, Service, Transport};
use crate::gateway::{BodySize, Kept, Route, RouteAuth, Visit, canonical_path};
use crate::listener::Relayed;
use crate::listener::coap::answer::Answer;
use crate::listener::coap::proxy::{self, Asked, Mapped};
use crate::message::{Action, Device, Reject};
use crate::telemetry::meters;

impl Service {
    /// A request that is none of the gateway's own, along its route; nothing where there is none.
    pub(super) fn proxy(&mut self, now: Moment, request: &Request<'_>) -> Option<Reply> {
        let relay = self.relay.clone()?;
        let (method, action) = proxy::method(request.code())?;
        let target = proxy::target(request);
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (&*target, None),
        };
        let canonical = canonical_path(path)?;
        let mapped = proxy::to_http(request, &target);
        let nothing = HeaderMap::new();
        let visit = Visit {
            method: &method,
            path,
            query,
            host: request.contents.uri_host(),
            peer: request.peer.ip(),
            headers: mapped.as_ref().map_or(&nothing, |mapped| mapped.request.headers()),
        };
        let route = self.gateway.with_rules(|rules| rules.routes.find(&visit, &canonical).cloned())?;
        let kept = Kept::of(&visit);
        let refused = |(reject, known): (Reject, bool)| Reply::Now(Answer::refusal(&reject, known));
        if let Some(answer) = route.steps.iter().find_map(|step| step.before_admission(&visit)) {
            return Some(match self.gateway.admit_address(request.peer.ip(), now.at) {
                Ok(()) => Reply::Now(proxy::from_http(&Asked::of(request), Ok(answer), false)),
                Err(reject) => refused((reject, false)),
            });
        }
        let device = match self.admit_proxied(now, request, &route, action, &visit) {
            Ok(device) => device,
            Err(refusal) => return Some(refused(refusal)),
        };
        let known = device.is_some();
        let mapped = match proxy::check_hops(request).and(mapped) {
            Ok(mapped) => mapped,
            Err(answer) => return Some(Reply::Now(answer)),
        };
        let Mapped { request: mapped, host, asked } = mapped;
        let relayed = Relayed {
            route,
            request: mapped,
            peer: request.peer.ip(),
            is_tls: self.transport == Transport::Tls,
            host,
            device,
            kept,
            answer_bytes_max: self.limits.blockwise_bytes_max.in_memory(),
        };
        Some(Reply::Elsewhere(Box::pin(async move {
            let outcome = relay.relay(relayed).await;
            proxy::from_http(&asked, outcome, known)
        })))
    }

    /// Who asks along a route, if that has to be known, and whether he may. A refusal comes with whether it may say why.
    fn admit_proxied(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        route: &Route,
        action: Action,
        visit: &Visit<'_>,
    ) -> Result<Option<Arc<Device>>, (Reject, bool)> {
        let stranger = |reject| {
            meters().coap.reject(&reject);
            (reject, false)
        };
        let bytes_max = route.body_bytes_max.unwrap_or(self.limits.body_bytes_max.bytes());
        let size = request.payload.len() as u64;
        let too_large = || Reject::TooLarge { limit: "body_bytes_max", bytes_max };
        let device = match route.auth {
            RouteAuth::None => {
                self.gateway.admit_address(request.peer.ip(), now.at).map_err(stranger)?;
                if size > bytes_max {
                    return Err(stranger(too_large()));
                }
                None
            }
            // Such a token has no place in CoAP.
            RouteAuth::Jwt => {
                self.gateway.admit_address(request.peer.ip(), now.at).map_err(stranger)?;
                return Err(stranger(Reject::Unauthenticated));
            }
            RouteAuth::Device => {
                let id = self.identify(now, request).map_err(stranger)?;
                let context = self.contexts.get_mut(id).ok_or((Reject::ShuttingDown, false))?;
                let device = context.client.caller.device.clone();
                let known = device.is_some();
                if size > bytes_max {
                    self.gateway.note_reject(&context.client, &too_large());
                    return Err((too_large(), known));
                }
                self.gateway
                    .admit_request(&mut context.client, action, visit.path, BodySize::Exactly(size), now.at)
                    .map_err(|reject| (reject, known))?;
                device
            }
        };
        let known = device.is_some();
        let id = device.as_ref().map(|device| &device.id);
        self.gateway.admit_route(route, visit, id, now.at).map_err(|(reject, _)| {
            meters().coap.reject(&reject);
            (reject, known)
        })?;
        Ok(device)
    }
}
