//! Requests along routes.

use std::sync::Arc;

use tidegate_coap::Request;

use super::{Moment, Reply, Service};
use crate::gateway::{BodySize, Route, RouteAuth, canonical_path};
use crate::listener::Relayed;
use crate::listener::coap::answer::Answer;
use crate::listener::coap::proxy::{self, Mapped};
use crate::message::{Action, Device, Reject};
use crate::telemetry::meters;

impl Service {
    /// A request that is none of the gateway's own, along its route; nothing where there is none.
    pub(super) fn proxy(&mut self, now: Moment, request: &Request<'_>) -> Option<Reply> {
        let relay = self.relay.clone()?;
        let (method, _) = proxy::method(request.code())?;
        let target = proxy::target(request);
        let path = target.split('?').next().unwrap_or_default();
        let canonical = canonical_path(path)?;
        let host = request.contents.uri_host();
        let found = self.gateway.with_rules(|rules| rules.routes.find(host, &canonical, method.as_str()).cloned());
        let route = found?;
        let (device, known) = match self.admit_proxied(now, request, &route, path) {
            Ok(device) => {
                let known = device.is_some();
                (device, known)
            }
            Err((reject, known)) => return Some(Reply::Now(Answer::refusal(&reject, known))),
        };
        let mapped = match proxy::check_hops(request).and_then(|()| proxy::to_http(request, &target)) {
            Ok(mapped) => mapped,
            Err(answer) => return Some(Reply::Now(answer)),
        };
        let Mapped { request: mapped, host, asked } = mapped;
        let relayed = Relayed {
            route,
            request: mapped,
            peer: request.peer.ip(),
            is_tls: self.is_tls,
            host,
            device,
            answer_bytes_max: usize::try_from(self.limits.blockwise_bytes_max.bytes()).unwrap_or(usize::MAX),
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
        path: &str,
    ) -> Result<Option<Arc<Device>>, (Reject, bool)> {
        let stranger = |reject| {
            meters().coap.reject(&reject);
            (reject, false)
        };
        let bytes_max = route.body_bytes_max.unwrap_or(self.limits.body_bytes_max.bytes());
        let size = request.payload.len() as u64;
        let too_large = (size > bytes_max).then_some(Reject::TooLarge { limit: "body_bytes_max", bytes_max });
        match route.auth {
            RouteAuth::None => {
                self.gateway.admit_address(request.peer.ip(), now.at).map_err(stranger)?;
                too_large.map_or(Ok(None), |reject| Err(stranger(reject)))
            }
            RouteAuth::Device => {
                let id = self.identify(now, request).map_err(stranger)?;
                let context = self.contexts.get_mut(id).ok_or((Reject::ShuttingDown, false))?;
                let device = context.client.caller.device.clone();
                let known = device.is_some();
                if let Some(reject) = too_large {
                    self.gateway.note_reject(&context.client, &reject);
                    return Err((reject, known));
                }
                let action = proxy::method(request.code()).map_or(Action::Get, |(_, action)| action);
                self.gateway
                    .admit_request(&mut context.client, action, path, BodySize::Exactly(size), now.at)
                    .map_err(|reject| (reject, known))?;
                Ok(device)
            }
        }
    }
}
