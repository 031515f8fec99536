//! The resource directory's side of the service (RFC 9176), and what is heard from devices.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tidegate_coap::{Code, Request, content};

use super::{ContextId, Moment, Reply, Service, listed, refuse};
use crate::gateway::{Address, Draft, Endpoint, Wanted};
use crate::listener::coap::answer::Answer;
use crate::listener::coap::call::Call;
use crate::listener::coap::devices::{Resource, Simple};
use crate::message::{Device, Properties, Qos, Reject};

impl Service {
    /// Answers what is asked of the directory; `rest` is the name of a registration.
    pub(super) fn ask_directory(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        id: ContextId,
        call: Call,
        rest: &str,
    ) -> Reply {
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let done = match call {
            Call::Lookup { endpoints } => wanted(request).map_or_else(Err, |wanted| {
                let client = &context.client;
                listed(Ok(match endpoints {
                    true => self.gateway.registered_endpoints(client, &wanted, now.at),
                    false => self.gateway.registered_resources(client, &wanted, now.at),
                }))
            }),
            Call::Register => self.register(now, request, id),
            Call::FetchLinks => self.fetch_links(now, request, id),
            Call::Renew => self.renew(now, request, id, rest),
            _ => {
                let removed = self.gateway.remove_endpoint(&mut context.client, rest, now.at);
                removed.map(|()| Answer::new(Code::DELETED))
            }
        };
        Reply::Now(done.unwrap_or_else(|reject| Answer::refusal(&reject, known)))
    }

    fn register(&mut self, now: Moment, request: &Request<'_>, id: ContextId) -> Result<Answer, Reject> {
        if request.content_format().is_some_and(|format| format != content::LINK_FORMAT) {
            return Ok(Answer::new(Code::UNSUPPORTED_CONTENT_FORMAT));
        }
        let parameters = parameters(request);
        let device = self.register_links(now, request.peer, id, &parameters, &request.payload)?;
        Ok(Answer { location: Some(device.id.clone()), ..Answer::new(Code::CREATED) })
    }

    /// Registers, and follows what was registered.
    fn register_links(
        &mut self,
        now: Moment,
        peer: SocketAddr,
        id: ContextId,
        parameters: &[(&str, &str)],
        links: &[u8],
    ) -> Result<Arc<Device>, Reject> {
        let endpoint = Endpoint { parameters, base: self.base(peer), via: self.devices.door(peer) };
        let context = self.contexts.get_mut(id).ok_or(Reject::ShuttingDown)?;
        let (serial, links) = self.gateway.register_endpoint(&mut context.client, endpoint, links, now.at)?;
        let device = context.client.caller.device.clone().ok_or(Reject::Unauthenticated)?;
        let timeout = self.device_timeout();
        self.devices.follow(&device, serial, peer, &links, timeout);
        Ok(device)
    }

    fn renew(&mut self, now: Moment, request: &Request<'_>, id: ContextId, rest: &str) -> Result<Answer, Reject> {
        let parameters = parameters(request);
        let peer = request.peer;
        let endpoint = Endpoint { parameters: &parameters, base: self.base(peer), via: self.devices.door(peer) };
        let context = self.contexts.get_mut(id).ok_or(Reject::ShuttingDown)?;
        let (serial, links) = self.gateway.renew_endpoint(&mut context.client, rest, endpoint, now.at)?;
        let device = context.client.caller.device.clone().ok_or(Reject::Unauthenticated)?;
        let timeout = self.device_timeout();
        self.devices.follow(&device, serial, peer, &links, timeout);
        Ok(Answer::new(Code::CHANGED))
    }

    /// Simple registration (RFC 9176 section 5.1): answered now, fetched later.
    fn fetch_links(&mut self, now: Moment, request: &Request<'_>, id: ContextId) -> Result<Answer, Reject> {
        let context = self.contexts.get_mut(id).ok_or(Reject::ShuttingDown)?;
        let device = self.gateway.admit_endpoint(&mut context.client, 0, now.at)?;
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let parameters = parameters(request).into_iter().map(owned).collect();
        let timeout = self.device_timeout();
        self.devices.fetch_links(Simple { device, peer: request.peer, parameters }, timeout);
        Ok(Answer::new(Code::CHANGED))
    }

    /// The links of a simple registration have come.
    pub fn register_fetched(&mut self, now: Moment, simple: Simple, links: &[u8]) {
        let Simple { device, peer, parameters } = simple;
        if !self.gateway.identity.is_current(&device) {
            return;
        }
        let parameters: Vec<_> = parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let done = self
            .session_of(now, peer, &device)
            .and_then(|id| self.register_links(now, peer, id, &parameters, links).map(drop));
        if let Err(reject) = done {
            tracing::debug!(device = %device.id, %reject, "simple registration refused");
        }
    }

    /// A value of a device's resource, published in the device's name.
    ///
    /// # Errors
    /// As a publish; [`Reject::Unauthenticated`] when the device is not what it was.
    pub fn publish_resource(
        &mut self,
        now: Moment,
        resource: &Resource,
        payload: &[u8],
        format: Option<u16>,
    ) -> Result<(), Reject> {
        if !self.gateway.is_registered(&resource.device, resource.serial, now.at) {
            return Err(Reject::Unauthenticated);
        }
        self.check_size(payload.len())?;
        let id = self.session_of(now, resource.peer, &resource.device)?;
        let context = self.contexts.get_mut(id).ok_or(Reject::ShuttingDown)?;
        let media_type = format.and_then(content::media_type);
        let properties = media_type
            .map(|media_type| Box::new(Properties { content_type: Some(media_type.into()), ..Properties::default() }));
        // A representation stands until the next: whoever comes later is shown it.
        let draft = Draft { payload: Bytes::copy_from_slice(payload), qos: Qos::AtLeastOnce, retain: true, properties };
        let address = Address::Topic(&resource.topic);
        self.gateway.publish(&mut context.client, address, draft, None, now.at).map(drop)
    }

    /// The session of a device that has shown before who it is.
    pub(super) fn session_of(
        &mut self,
        now: Moment,
        peer: SocketAddr,
        device: &Arc<Device>,
    ) -> Result<ContextId, Reject> {
        let found = self.contexts.find(peer, Some(device), now.at).map(|context| context.id);
        found.map_or_else(|| self.begin(now, peer, Some(device.clone()), None, u64::MAX), Ok)
    }

    pub fn device_timeout(&self) -> Duration {
        self.gateway.device_timeout()
    }

    fn base(&self, peer: SocketAddr) -> String {
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        format!("{}://{peer}", self.transport.scheme())
    }
}

/// The query without the credential.
fn parameters<'d>(request: &Request<'d>) -> Vec<(&'d str, &'d str)> {
    request.query().pairs().filter(|(name, _)| *name != "t").collect()
}

fn wanted<'d>(request: &Request<'d>) -> Result<Wanted<'d>, Reject> {
    let mut wanted = Wanted::default();
    let number = |value: &str| value.parse().map_err(|_| Reject::Malformed { what: "page and count are numbers" });
    for (name, value) in parameters(request) {
        match name {
            "page" => wanted.page = number(value)?,
            "count" => wanted.count = Some(number(value)?),
            _ => wanted.filters.push((name, value)),
        }
    }
    Ok(wanted)
}
