//! What is asked of devices that have registered: requests that came over HTTP, resources that are observed or read, links of a simple registration.
//!
//! A device is asked by the worker whose socket, or over the connection, it registered by, so that address translators and the kernel bring its answers
//! back to who asked. Other workers hand their requests over through a [`Door`]. Everything is bounded: the engine's calls, and requests on their way.
//!
//! Nothing is asked of an address twice that has not answered once: when the first of a registration's resources is given up, so are the others.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tidegate_coap::Code;
use tidegate_coap::client::{Call, CallError, CallId, Reply};
use tokio::sync::{mpsc, oneshot};

use super::device_http;
use super::engine::Engine;
use super::service::{Moment, Service};
use crate::gateway::{Gateway, Link, Reach, ReachFault, Reached};
use crate::message::{Device, DeviceId, Reject};
use crate::telemetry::meters;

/// A resource of a device whose values are published.
#[derive(Debug)]
pub struct Resource {
    pub device: Arc<Device>,
    /// Of the registration that named it.
    pub serial: u64,
    pub peer: SocketAddr,
    pub path: Vec<String>,
    pub topic: String,
}

/// A device that wants its links to be fetched (RFC 9176 section 5.1).
#[derive(Debug)]
pub struct Simple {
    pub device: Arc<Device>,
    pub peer: SocketAddr,
    pub parameters: Vec<(String, String)>,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Devices {
    /// Made for the first registration: most connections have none.
    inbox: Option<(mpsc::Sender<Asked>, mpsc::Receiver<Asked>)>,
    received: Vec<Asked>,
    calls: HashMap<CallId, Open>,
    waiting: VecDeque<(Purpose, SocketAddr, Call)>,
    over: Vec<CallId>,
    /// What has been registered here, by device.
    registered: HashMap<DeviceId, (Arc<Device>, u64)>,
    next_sweep: Option<Instant>,
}

/// A request from elsewhere.
struct Asked {
    peer: SocketAddr,
    device: DeviceId,
    call: Call,
    answer: oneshot::Sender<Reached>,
}

struct Open {
    purpose: Purpose,
    began: Instant,
    /// For engines that keep no time.
    until: Option<Instant>,
    /// Something has come already; what is observed goes on from there.
    answered: Option<Observed>,
}

/// Counts for an observed resource while it lives; for an answer that is the only one, for nothing.
struct Observed(bool);

impl Observed {
    fn new(goes_on: bool) -> Self {
        if goes_on {
            meters().device_observations.increment(1.0);
        }
        Observed(goes_on)
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if self.0 {
            meters().device_observations.decrement(1.0);
        }
    }
}

enum Purpose {
    Answer { device: DeviceId, answer: oneshot::Sender<Reached> },
    Resource { resource: Arc<Resource>, heard: bool },
    Links(Box<Simple>),
}

/// The way to one device.
struct Door {
    peer: SocketAddr,
    sender: mpsc::Sender<Asked>,
}

impl Reach for Door {
    fn reach(
        &self,
        device: &DeviceId,
        request: http::Request<Bytes>,
        timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = Reached> + Send>> {
        let (sender, peer, device) = (self.sender.clone(), self.peer, device.clone());
        Box::pin(async move {
            let call = device_http::to_coap(&request, timeout).map_err(ReachFault::Unmappable)?;
            let (answer, answered) = oneshot::channel();
            sender.try_send(Asked { peer, device, call, answer }).map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => ReachFault::Full,
                mpsc::error::TrySendError::Closed(_) => ReachFault::Refused,
            })?;
            // Its engine gives up by then; should its thread be gone, nobody says so.
            let patience = timeout + GRACE;
            match tokio::time::timeout(patience, answered).await {
                Ok(Ok(reached)) => reached,
                Ok(Err(_)) => Err(ReachFault::Refused),
                Err(_) => Err(ReachFault::TimedOut),
            }
        })
    }
}

impl Devices {
    /// The way to a device at `peer`, for other threads.
    pub fn door(&mut self, peer: SocketAddr) -> Arc<dyn Reach> {
        let (sender, _) = self.inbox.get_or_insert_with(|| mpsc::channel(INBOX_MAX));
        Arc::new(Door { peer, sender: sender.clone() })
    }

    /// Whether nothing is asked, and nobody is known.
    pub fn is_idle(&self) -> bool {
        self.calls.is_empty() && self.registered.is_empty()
    }

    /// Ready when requests have come from elsewhere; [`advance`] takes them up.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some((_, receiver)) = &mut self.inbox else { return Poll::Pending };
        receiver.poll_recv_many(cx, &mut self.received, INBOX_MAX).map(|_| ())
    }

    /// Observes what can be observed of a registration, and reads the rest once. What is observed already goes on.
    pub fn follow(&mut self, device: &Arc<Device>, serial: u64, peer: SocketAddr, links: &[Link], timeout: Duration) {
        let mut running = HashSet::new();
        for (id, open) in &self.calls {
            match &open.purpose {
                Purpose::Resource { resource, .. } if resource.device.id == device.id => {
                    if resource.serial == serial {
                        running.insert(resource.topic.clone());
                    } else {
                        self.over.push(*id);
                    }
                }
                Purpose::Resource { .. } | Purpose::Answer { .. } | Purpose::Links(_) => {}
            }
        }
        self.registered.insert(device.id.clone(), (device.clone(), serial));
        for link in links {
            let topic = format!("dev/{}/{}", device.id, link.topic_level());
            // What it serves is known from its registration.
            if &*link.target == "/.well-known/core" || running.contains(&topic) {
                continue;
            }
            let path: Vec<String> = link.path.iter().map(ToString::to_string).collect();
            let call = Call { observe: link.is_observable(), ..Call::get(path.clone(), timeout) };
            let resource = Resource { device: device.clone(), serial, peer, path, topic };
            let purpose = Purpose::Resource { resource: Arc::new(resource), heard: false };
            self.waiting.push_back((purpose, peer, call));
        }
    }

    /// Asks for the links of a device.
    pub fn fetch_links(&mut self, simple: Simple, timeout: Duration) {
        let call = Call {
            accept: Some(tidegate_coap::content::LINK_FORMAT),
            ..Call::get(vec![".well-known".into(), "core".into()], timeout)
        };
        let peer = simple.peer;
        self.waiting.push_back((Purpose::Links(Box::new(simple)), peer, call));
    }

    /// What was registered over a connection that has ended can be asked no more.
    pub fn end(&mut self, gateway: &Gateway, now: Instant) {
        for (device, (_, serial)) in self.registered.drain() {
            gateway.end_endpoint(&device, serial, now);
        }
    }

    fn drop_where(&mut self, is_over: impl Fn(&Resource, bool) -> bool) {
        for (id, open) in &self.calls {
            if let Purpose::Resource { resource, heard } = &open.purpose
                && is_over(resource, *heard)
            {
                self.over.push(*id);
            }
        }
    }
}

/// Hangs up what is over, and begins what waits, as far as the engine has room.
pub fn advance<E: Engine>(engine: &mut E, service: &mut Service, now: Moment) {
    let devices = &mut service.devices;
    for id in std::mem::take(&mut devices.over) {
        engine.hang_up(now.at, id);
        if devices.calls.remove(&id).is_some_and(|open| open.answered.is_none()) {
            meters().device("abandoned");
        }
    }
    for Asked { peer, device, call, answer } in devices.received.drain(..) {
        devices.waiting.push_back((Purpose::Answer { device, answer }, peer, call));
    }
    for (purpose, peer, call) in std::mem::take(&mut devices.waiting) {
        let until = Some(now.at + call.timeout + GRACE);
        let begun = engine.call(now.at, peer, call);
        if begun.is_err() {
            meters().device("full");
        }
        match (begun, purpose) {
            (Ok(id), purpose) => {
                devices.calls.insert(id, Open { purpose, began: now.at, until, answered: None });
            }
            // Who does not hear has gone.
            (Err(_), Purpose::Answer { answer, .. }) => _ = answer.send(Err(ReachFault::Full)),
            (Err(_), Purpose::Resource { resource, .. }) => {
                tracing::debug!(device = %resource.device.id, topic = resource.topic, "no room to read a device");
            }
            (Err(_), Purpose::Links(simple)) => {
                tracing::debug!(device = %simple.device.id, "no room to read a device's links");
            }
        }
    }
}

/// A device has answered.
pub fn replied(service: &mut Service, now: Moment, reply: &Reply<'_>) {
    let Some(open) = service.devices.calls.get_mut(&reply.call) else { return };
    if open.answered.is_none() {
        open.answered = Some(Observed::new(reply.observed));
        meters().device("answered");
        meters().device_seconds.record(now.at.saturating_duration_since(open.began).as_secs_f64());
    }
    if let Purpose::Resource { resource, heard } = &mut open.purpose {
        (*heard, open.until) = (true, None);
        let resource = resource.clone();
        if !reply.observed {
            service.devices.calls.remove(&reply.call);
        }
        return heard_value(service, now, resource, reply);
    }
    let Some(open) = service.devices.calls.remove(&reply.call) else { return };
    match open.purpose {
        Purpose::Answer { device, answer } => _ = answer.send(Ok(device_http::from_coap(&device, reply))),
        Purpose::Links(simple) if reply.code == Code::CONTENT => service.register_fetched(now, *simple, &reply.payload),
        Purpose::Links(_) | Purpose::Resource { .. } => {}
    }
}

fn heard_value(service: &mut Service, now: Moment, resource: Arc<Resource>, reply: &Reply<'_>) {
    if reply.code != Code::CONTENT {
        return;
    }
    if reply.partial {
        let call = Call::get(resource.path.clone(), service.device_timeout());
        let peer = resource.peer;
        let purpose = Purpose::Resource { resource, heard: true };
        service.devices.waiting.push_back((purpose, peer, call));
        return;
    }
    // Refusals are counted where they are made.
    if let Err(Reject::Unauthenticated) = service.publish_resource(now, &resource, &reply.payload, reply.content_format)
    {
        service.devices.drop_where(|other, _| other.serial == resource.serial);
    }
}

/// A device has not answered, or answers no more.
pub fn failed(service: &mut Service, call: CallId, error: CallError) {
    let Some(open) = service.devices.calls.remove(&call) else { return };
    meters().device(match error {
        CallError::TimedOut => "timed_out",
        CallError::Reset => "reset",
        CallError::Broken => "broken",
        CallError::TooLarge => "too_large",
    });
    match open.purpose {
        Purpose::Answer { answer, .. } => {
            let fault = match error {
                CallError::TimedOut => ReachFault::TimedOut,
                CallError::Reset | CallError::Broken => ReachFault::Refused,
                CallError::TooLarge => ReachFault::AnswerTooLarge,
            };
            // Who does not hear has gone.
            let _ = answer.send(Err(fault));
        }
        Purpose::Resource { resource, heard } => {
            tracing::debug!(device = %resource.device.id, topic = resource.topic, ?error, "cannot read a device");
            // Whoever is silent is asked for nothing more of this registration until it renews it.
            if error == CallError::TimedOut {
                service
                    .devices
                    .drop_where(|other, other_heard| other.serial == resource.serial && (heard || !other_heard));
            }
        }
        Purpose::Links(simple) => tracing::debug!(device = %simple.device.id, ?error, "cannot read a device's links"),
    }
}

/// Ends what nobody waits for any more, and what is registered no longer.
pub fn sweep<E: Engine>(engine: &mut E, service: &mut Service, gateway: &Gateway, now: Moment) {
    if service.devices.next_sweep.is_some_and(|at| now.at < at) {
        return;
    }
    service.devices.next_sweep = Some(now.at + SWEEP_EVERY);
    let devices = &mut service.devices;
    devices.registered.retain(|_, (device, serial)| gateway.is_registered(device, *serial, now.at));
    let (mut late, registered) = (Vec::new(), &devices.registered);
    for (id, open) in &devices.calls {
        let is_over = match &open.purpose {
            Purpose::Answer { answer, .. } => answer.is_closed(),
            Purpose::Resource { resource, .. } => {
                registered.get(&resource.device.id).is_none_or(|(_, serial)| *serial != resource.serial)
            }
            Purpose::Links(_) => false,
        };
        if is_over {
            devices.over.push(*id);
        } else if open.until.is_some_and(|until| until <= now.at) {
            late.push(*id);
        }
    }
    for id in late {
        engine.hang_up(now.at, id);
        failed(service, id, CallError::TimedOut);
    }
    advance(engine, service, now);
}

/// Requests on their way to one engine. One more is refused as full.
const INBOX_MAX: usize = 64;
const SWEEP_EVERY: Duration = Duration::from_secs(2);
/// How much later than the engine this side gives up.
const GRACE: Duration = Duration::from_secs(2);
