//! From a request to its answer: who asks, what for, and what the gateway says. The same over UDP and TCP.
//!
//! A driver owns an engine and one [`Service`]; the service never sees the engine. It is told what happened and says what to send.

mod directory;
mod relay;

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use portable_atomic::{AtomicU64, Ordering};
use tidegate_coap::endpoint::Delivery as Sent;
use tidegate_coap::option::number;
use tidegate_coap::{Code, Notification, ObserverId, Request, content};

use super::answer::{Answer, code, etag, format_of};
use super::call::{self, Call, NoCall, Space};
use super::contexts::{Context, ContextId, Contexts};
use super::devices::Devices;
use super::links::{self, Which};
use super::observations::{Observation, Observations};
use super::patch;
use crate::gateway::{
    Address, Delivery, Draft, Gateway, Limits, NotTaken, Now, Outbox, OutboxLimits, Part, Published, SendRetained,
    SubscribeOptions, is_expired, wall_ms,
};
use crate::listener::Relay;
use crate::message::{CloseReason, Completion, Device, Message, Properties, Protocol, Qos, Receipt, Reject, SessionId};
use crate::telemetry::meters;

/// One instant on the clocks that a request needs; read once for a batch.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub at: Instant,
    pub clock: Now,
}

impl Moment {
    pub fn read() -> Self {
        Moment { at: Instant::now(), clock: Now::read() }
    }
}

/// What the driver is to do with a request.
pub enum Reply {
    Now(Answer),
    /// The same, and the peer has shown that it receives what is sent to its address.
    Validated(Answer),
    /// The outcome will come out of the outbox, under the request's handle.
    Later,
    /// An upstream has to be asked.
    Elsewhere(Pin<Box<dyn Future<Output = Answer> + Send>>),
    /// Register the observer, and tell [`Service::registered`] how that went.
    Observe {
        answer: Answer,
        tag: u64,
    },
}

/// By what the engine is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
    Tls,
}

impl Transport {
    /// Of the URIs of those who ask.
    const fn scheme(self) -> &'static str {
        match self {
            Transport::Udp => "coap",
            Transport::Tcp => "coap+tcp",
            Transport::Tls => "coaps+tcp",
        }
    }
}

/// See the module's documentation.
pub struct Service {
    gateway: Arc<Gateway>,
    relay: Option<Arc<dyn Relay>>,
    limits: Limits,
    contexts: Contexts,
    observations: Observations,
    /// What is asked of devices.
    pub devices: Devices,
    outbox: Arc<Outbox>,
    completion: Arc<dyn Completion>,
    /// Whom the transport itself has authenticated (a TLS certificate).
    presumed: Option<Arc<Device>>,
    transport: Transport,
    /// Requests whose success is 2.02.
    removals: HashSet<u64>,
    /// Observers whose observation has ended on our side, with the last word to them.
    ended: Vec<(ObserverId, Code)>,
    rest: String,
    /// How much the outbox had dropped when observers were last refreshed.
    dropped: u64,
}

impl Service {
    /// `contexts_max` bounds the sessions.
    pub fn new(context: super::Context, contexts_max: usize) -> Self {
        let super::Context { gateway, relay } = context;
        let limits = gateway.limits();
        // One box for all observers of the engine: a message that all of them want has to fit.
        let outbox_limits = OutboxLimits {
            messages_max: (limits.outbox_messages_max as usize).saturating_add(limits.observers_max as usize),
            bytes_max: limits.outbox_bytes_max.in_memory().saturating_mul(4),
            crowded_wait: Duration::from_millis(limits.crowded_wait_ms.into()),
        };
        // From the top down, where the numbers of sessions, which begin at 1, never come.
        let name = SessionId(u64::MAX - OUTBOXES.fetch_add(1, Ordering::Relaxed));
        let outbox = Arc::new(Outbox::counted(name, outbox_limits, &gateway.hub.waiting));
        Service {
            contexts: Contexts::new(contexts_max, outbox.clone()),
            observations: Observations::default(),
            completion: outbox.clone(),
            outbox,
            presumed: None,
            transport: Transport::Udp,
            devices: Devices::default(),
            removals: HashSet::new(),
            ended: Vec::new(),
            rest: String::new(),
            dropped: 0,
            limits,
            relay,
            gateway,
        }
    }

    /// The same over a connection.
    pub fn over_tcp(mut self) -> Self {
        self.transport = Transport::Tcp;
        self
    }

    /// The same behind TLS, where a certificate may already have said who asks.
    pub fn behind_tls(mut self, presumed: Option<Arc<Device>>) -> Self {
        (self.presumed, self.transport) = (presumed, Transport::Tls);
        self
    }

    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether there is nothing that [`Service::sweep`] could end.
    pub fn is_idle(&self) -> bool {
        self.contexts.is_empty() && self.devices.is_idle()
    }

    /// Whether anything is observed, or asked of the peer.
    pub fn observes(&self) -> bool {
        !self.observations.is_empty() || !self.devices.is_idle()
    }

    /// Whether sessions have been ordered to end: then [`Service::sweep`].
    pub fn has_orders(&self) -> bool {
        self.contexts.orders().any()
    }

    /// Decides on a request.
    pub fn handle(&mut self, now: Moment, request: &Request<'_>) -> Reply {
        let mut rest = std::mem::take(&mut self.rest);
        let reply = self.act(now, request, &mut rest);
        self.rest = rest;
        reply
    }

    /// Decides whether the body that begins with this request is taken in.
    ///
    /// # Errors
    /// The answer that refuses it.
    pub fn admit_upload(&mut self, now: Moment, request: &Request<'_>) -> Result<(), Answer> {
        let mut rest = std::mem::take(&mut self.rest);
        let call = call::parse(request, &mut rest);
        self.rest = rest;
        // What has to come in one datagram is asked of strangers; nothing is kept for them.
        let identified = match call {
            Ok(Call::Challenge | Call::Session) => Err(Reject::Unauthenticated),
            _ => self.identify(now, request),
        };
        let id = identified.map_err(|reject| refuse(&reject, false))?;
        let known = self.contexts.get_mut(id).is_some_and(|context| context.client.caller.device.is_some());
        match call {
            // A route decides about the rest when the body is whole.
            Ok(Call::Publish { .. } | Call::Patch { .. } | Call::Register) | Err(NoCall::NotFound) => {}
            Ok(_) => return Err(Answer::new(Code::METHOD_NOT_ALLOWED)),
            Err(no_call) => return Err(Answer::no_call(no_call, known)),
        }
        let bytes = request.size_hint().unwrap_or(0) as usize;
        self.check_size(bytes.max(request.payload.len())).map_err(|reject| refuse(&reject, known))
    }

    fn act(&mut self, now: Moment, request: &Request<'_>, rest: &mut String) -> Reply {
        let call = call::parse(request, rest);
        if let Ok(call @ (Call::Challenge | Call::Session)) = call {
            return self.log_in(now, request, call);
        }
        if let Ok(Call::Publish { space, retain }) = call
            && request.contents.content_format() == Some(content::COSE_SIGN1)
            && request.contents.first(number::URI_QUERY).is_none()
        {
            return self.publish_signed(now, request, space, rest, retain);
        }
        if call == Err(NoCall::NotFound)
            && let Some(reply) = self.proxy(now, request)
        {
            return reply;
        }
        let id = match self.identify(now, request) {
            Ok(id) => id,
            Err(Reject::Unauthenticated) if call == Ok(Call::Core) => {
                let links = listed(links::for_strangers(request.query()));
                return Reply::Now(links.unwrap_or_else(|reject| refuse(&reject, false)));
            }
            Err(reject) => return Reply::Now(refuse(&reject, false)),
        };
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let done = match call {
            Ok(Call::Publish { space, retain }) => {
                let said = Said { payload: &request.payload, format: request.contents.content_format(), retain };
                return self.publish(now, request, id, space, rest, said);
            }
            Ok(Call::Remove { space }) => return self.remove(now, request, id, space, rest),
            Ok(Call::Follow { space, wildcard }) => return self.follow(now, request, id, space, rest, wildcard),
            Ok(Call::Read { space }) => {
                let read = self.gateway.read(&mut context.client, space.address(rest), now.at);
                read.map(|message| value(message, request))
            }
            Ok(Call::Patch { space }) => return self.patch(now, request, id, space, rest),
            Ok(Call::Core) => listed(links::list(&self.gateway, &context.client, Which::All, request.query())),
            Ok(Call::Topics) => {
                listed(links::list(&self.gateway, &context.client, Which::Topics("#"), request.query()))
            }
            Ok(Call::Matching) => match std::str::from_utf8(&request.payload) {
                Ok(filter) => {
                    let which = Which::Topics(filter.trim());
                    listed(links::list(&self.gateway, &context.client, which, request.query()))
                }
                Err(_) => Err(Reject::Malformed { what: "not a topic filter" }),
            },
            Ok(call @ (Call::Register | Call::Renew | Call::Withdraw | Call::FetchLinks | Call::Lookup { .. })) => {
                return self.ask_directory(now, request, id, call, rest);
            }
            // Dealt with above.
            Ok(Call::Challenge | Call::Session) => Err(Reject::NotFound),
            Err(no_call) => Ok(Answer::no_call(no_call, known)),
        };
        Reply::Now(done.unwrap_or_else(|reject| Answer::refusal(&reject, known)))
    }

    /// The challenge flow of the contract. A stranger is answered once for each question, in less than it costs him.
    fn log_in(&mut self, now: Moment, request: &Request<'_>, call: Call) -> Reply {
        let peer = request.peer;
        let outcome = self.gateway.admit_login(peer.ip(), now.at).and_then(|()| match call {
            Call::Session => {
                let answer = self.gateway.identity.coap_session(&request.payload, peer, now.clock)?;
                Ok(Reply::Validated(Answer::content(Code::CHANGED, content::CBOR, answer)))
            }
            _ => {
                let challenge = self.gateway.identity.coap_challenge(&request.payload, peer, now.clock)?;
                let challenge = Bytes::copy_from_slice(&challenge);
                Ok(Reply::Now(Answer::content(Code::CONTENT, content::OCTET_STREAM, challenge)))
            }
        });
        outcome.unwrap_or_else(|reject| {
            // What is wrong with a login is nobody's business.
            let reject = match reject {
                Reject::Malformed { .. } | Reject::Forbidden { .. } => Reject::Unauthenticated,
                reject => reject,
            };
            Reply::Now(refuse(&reject, false))
        })
    }

    /// The session that a request belongs to; it begins with its first request.
    fn identify(&mut self, now: Moment, request: &Request<'_>) -> Result<ContextId, Reject> {
        let peer = request.peer;
        let token = request.query().value("t").unwrap_or_default().as_bytes();
        if let Some(id) = self.contexts.shown_again(peer, token, now.at, now.clock.unix_secs) {
            return Ok(id);
        }
        // Who is known pays for what does not hold, a stranger for everything.
        let known = self.contexts.knows(peer);
        if !known {
            self.gateway.admit_address(peer.ip(), now.at)?;
        }
        let shown = self.shown(now, token);
        if known && shown.is_err() {
            self.gateway.admit_address(peer.ip(), now.at)?;
        }
        let (device, expires_unix) = shown?;
        if let Some(context) = self.contexts.find(peer, device.as_deref(), now.at) {
            context.show(token, expires_unix);
            return Ok(context.id);
        }
        self.begin(now, peer, device, Some(token), expires_unix)
    }

    /// The device behind a token, and the second at which that ends.
    fn shown(&self, now: Moment, token: &[u8]) -> Result<(Option<Arc<Device>>, u64), Reject> {
        if !token.is_empty() {
            let identity = &self.gateway.identity;
            let (device, until) = identity.verify_token_until(token, Protocol::Coap, now.clock)?;
            return Ok((Some(device), until));
        }
        if let Some(device) = &self.presumed {
            return Ok((Some(device.clone()), u64::MAX));
        }
        self.gateway.anonymous_role()?;
        Ok((None, u64::MAX))
    }

    fn begin(
        &mut self,
        now: Moment,
        peer: SocketAddr,
        device: Option<Arc<Device>>,
        token: Option<&[u8]>,
        expires_unix: u64,
    ) -> Result<ContextId, Reject> {
        if let Some(stale) = self.contexts.stale(peer, device.as_deref()) {
            self.close(stale, CloseReason::NotAuthorized, now.at);
        }
        if let Some(id) = self.contexts.crowded_out()? {
            self.close(id, CloseReason::Administrative, now.at);
        }
        let context = self.contexts.open(&self.gateway, peer, device, now.at)?;
        if let Some(token) = token {
            context.show(token, expires_unix);
        }
        Ok(context.id)
    }

    /// A message that carries its own proof (COSE_Sign1): nobody logs in, and nothing else is granted by it. What is not under the signature must
    /// not matter, so it has no query.
    fn publish_signed(&mut self, now: Moment, request: &Request<'_>, space: Space, rest: &str, retain: bool) -> Reply {
        let peer = request.peer;
        // By address, for there is nobody yet; not as a login, of which a whole site behind one address has but a few a second.
        if let Err(reject) = self.gateway.admit_address(peer.ip(), now.at) {
            return Reply::Now(refuse(&reject, false));
        }
        let path: Vec<&str> = request.path.segments().collect();
        let gateway = self.gateway.clone();
        let signed = match gateway.identity.coap_signed(&request.payload, request.code().0, &path, now.clock) {
            Ok(signed) => signed,
            Err(NotTaken::Used) => return Reply::Now(Answer::new(Code::CONFLICT)),
            Err(NotTaken::Reject(reject)) => return Reply::Now(refuse(&reject, false)),
        };
        let id = match self.session_of(now, peer, &signed.device) {
            Ok(id) => id,
            Err(reject) => return Reply::Now(refuse(&reject, true)),
        };
        let said = Said { payload: signed.payload, format: signed.content_format, retain };
        self.publish(now, request, id, space, rest, said)
    }

    fn publish(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        id: ContextId,
        space: Space,
        rest: &str,
        said: Said<'_>,
    ) -> Reply {
        let size = self.check_size(said.payload.len());
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        if let Err(reject) = size {
            self.gateway.note_reject(&context.client, &reject);
            return Reply::Now(Answer::refusal(&reject, known));
        }
        match holds(&self.gateway, context, request, space.address(rest), now.at) {
            Ok(true) => {}
            Ok(false) => return Reply::Now(Answer::new(Code::PRECONDITION_FAILED)),
            Err(reject) => return Reply::Now(Answer::refusal(&reject, known)),
        }
        let draft = said.draft(qos(request));
        let done = Some((&self.completion, request.handle.to_bits()));
        match self.gateway.publish(&mut context.client, space.address(rest), draft, done, now.at) {
            Ok(Published::Done(_)) => Reply::Now(Answer::new(Code::CHANGED)),
            Ok(Published::Pending) => Reply::Later,
            Err(reject) => Reply::Now(Answer::refusal(&reject, known)),
        }
    }

    /// PATCH and iPATCH: reads, changes, publishes. Nothing keeps another writer from coming in between.
    fn patch(&mut self, now: Moment, request: &Request<'_>, id: ContextId, space: Space, rest: &str) -> Reply {
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let old = match self.gateway.read(&mut context.client, space.address(rest), now.at) {
            Ok(message) => Some(message),
            Err(Reject::NotFound) => None,
            Err(reject) => return Reply::Now(Answer::refusal(&reject, known)),
        };
        let text = old.as_ref().map(|message| &message.payload[..]);
        let new = match patch::apply(text, &request.payload, request.contents.content_format()) {
            Ok(new) => new,
            Err(answer) => return Reply::Now(answer),
        };
        let is_state = matches!(space, Space::Device(_, _));
        let retain = is_state || old.is_some_and(|message| message.retain);
        let said = Said { payload: &new, format: Some(patch::PATCHED_FORMAT), retain };
        self.publish(now, request, id, space, rest, said)
    }

    fn remove(&mut self, now: Moment, request: &Request<'_>, id: ContextId, space: Space, rest: &str) -> Reply {
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let draft = Draft { payload: Bytes::new(), qos: qos(request), retain: true, properties: None };
        let handle = request.handle.to_bits();
        match self.gateway.publish(
            &mut context.client,
            space.address(rest),
            draft,
            Some((&self.completion, handle)),
            now.at,
        ) {
            Ok(Published::Done(_)) => Reply::Now(Answer::new(Code::DELETED)),
            Ok(Published::Pending) => {
                self.removals.insert(handle);
                Reply::Later
            }
            Err(reject) => Reply::Now(Answer::refusal(&reject, known)),
        }
    }

    /// GET with Observe 0. Where policy or a limit does not let the asker subscribe, it is a GET (RFC 7641 section 4.1).
    fn follow(
        &mut self,
        now: Moment,
        request: &Request<'_>,
        id: ContextId,
        space: Space,
        rest: &str,
        wildcard: bool,
    ) -> Reply {
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let filter = match space {
            Space::Topic => rest.to_owned(),
            Space::Device(Part::Command, _) => "c/#".to_owned(),
            Space::Device(_, _) => "s".to_owned(),
        };
        let tag = self.observations.next_tag();
        let is_command = matches!(space, Space::Device(Part::Command, _));
        let send = if wildcard && !is_command { SendRetained::Always } else { SendRetained::Never };
        let options =
            SubscribeOptions { qos: Qos::AtLeastOnce, retain_as_published: true, ..SubscribeOptions::default() };
        let subscribed = match self.gateway.subscribe(&mut context.client, &filter, tag, options, send, now.at) {
            Ok(subscribed) => subscribed,
            Err(Reject::Forbidden { .. } | Reject::Full { .. }) if !wildcard => {
                let read = self.gateway.read(&mut context.client, space.address(rest), now.at);
                let answer = read.map(|message| value(message, request));
                return Reply::Now(answer.unwrap_or_else(|reject| Answer::refusal(&reject, known)));
            }
            Err(reject) => return Reply::Now(Answer::refusal(&reject, known)),
        };
        // Subscribed first and read then, so that nothing falls between the two. A topic may be observed before it has a value.
        let mut observation = Observation {
            context: id,
            filter: filter.clone(),
            value: (!wildcard).then(|| (space, rest.to_owned())),
            format: request.contents.accept(),
            observer: None,
            waiting: VecDeque::new(),
        };
        let first = if wildcard {
            Ok(Answer::new(Code::CONTENT))
        } else {
            match self.gateway.read(&mut context.client, space.address(rest), now.at) {
                Ok(message) => {
                    observation.suits(&message);
                    Ok(value(message, request))
                }
                Err(Reject::NotFound | Reject::Forbidden { .. }) => Ok(Answer::new(Code::CONTENT)),
                Err(reject) => Err(reject),
            }
        };
        let answer = match first {
            Ok(answer) if answer.code.is_success() => answer,
            refused => {
                self.gateway.unsubscribe(&mut context.client, &filter, tag);
                return Reply::Now(refused.unwrap_or_else(|reject| Answer::refusal(&reject, known)));
            }
        };
        context.observations.push(tag);
        let waiting = subscribed.retained.iter().take(self.limits.commands_per_device_max as usize);
        observation.waiting = waiting.map(|delivery| notification(delivery, true)).collect();
        self.observations.insert(tag, observation);
        Reply::Observe { answer, tag }
    }

    /// How the engine took an observer of [`Reply::Observe`]. What waits for it is to be sent now ([`Service::next`]).
    pub fn registered(&mut self, tag: u64, observer: Option<ObserverId>) {
        match observer {
            Some(observer) => self.observations.registered(tag, observer),
            None => self.end(tag),
        }
    }

    /// The outcome of a request that was answered by [`Reply::Later`].
    pub fn completed(&mut self, handle: u64, outcome: &Result<Receipt, Reject>) -> Answer {
        let removal = !self.removals.is_empty() && self.removals.remove(&handle);
        match outcome {
            Ok(_) if removal => Answer::new(Code::DELETED),
            Ok(_) => Answer::new(Code::CHANGED),
            // Whoever was let publish is no stranger.
            Err(reject) => Answer::refusal(reject, true),
        }
    }

    /// A message for an observer, and the notification that brings it.
    pub fn deliver(&mut self, delivery: &Delivery) -> Option<(ObserverId, Notification)> {
        let observation = self.observations.get_mut(delivery.terms.tag)?;
        if is_expired(&delivery.message, wall_ms()) {
            return None;
        }
        let observer = observation.observer?;
        if !observation.suits(&delivery.message) {
            return Some((observer, Notification::ended(Code::NOT_ACCEPTABLE)));
        }
        let each = observation.value.is_none();
        let notification = notification(delivery, each);
        if let Some(context) = self.contexts.get_mut(observation.context) {
            context.client.count_delivered(1);
            meters().coap.delivered.increment(1);
        }
        Some((observer, notification))
    }

    /// Lets a notification of which each matters wait for its turn. One more than there is room for is dropped and counted.
    pub fn wait(&mut self, observer: ObserverId, notification: Notification) {
        let waiting_max = self.limits.commands_per_device_max as usize;
        let Some(observation) = self.observations.of(observer) else { return };
        if observation.waiting.len() < waiting_max {
            observation.waiting.push_back(notification);
        } else {
            meters().dropped_outbox.increment(1);
        }
    }

    /// The notification whose turn it is; [`Service::sent`] once the engine has it.
    pub fn next(&mut self, observer: ObserverId) -> Option<Notification> {
        self.observations.of(observer)?.waiting.front().cloned()
    }

    pub fn sent(&mut self, observer: ObserverId) {
        if let Some(observation) = self.observations.of(observer) {
            observation.waiting.pop_front();
        }
    }

    /// Observers for whom something waits.
    pub fn waiting(&self) -> Vec<ObserverId> {
        self.observations.waiting()
    }

    /// The engine has no such observer any more.
    pub fn left(&mut self, observer: ObserverId) {
        if let Some(tag) = self.observations.tag_of(observer) {
            self.end(tag);
        }
    }

    /// The observed value as it is now; nothing for an observer of many topics.
    pub fn current(&mut self, observer: ObserverId, now: Instant) -> Option<Notification> {
        let observation = self.observations.of(observer)?;
        let (space, rest) = observation.value.as_ref()?;
        let context = self.contexts.get_mut(observation.context)?;
        Some(match self.gateway.read(&mut context.client, space.address(rest), now) {
            Ok(message) if !observation.suits(&message) => Notification::ended(Code::NOT_ACCEPTABLE),
            Ok(message) => Notification::content(format_of(&message), message.payload.clone()),
            Err(Reject::NotFound | Reject::TooFast { .. }) => return None,
            Err(reject) => Notification::ended(code(&reject)),
        })
    }

    /// Observers that may have missed a value because the outbox overflowed: each is to be refreshed.
    pub fn missed(&mut self) -> Vec<ObserverId> {
        let dropped = self.outbox.dropped();
        if std::mem::replace(&mut self.dropped, dropped) == dropped {
            Vec::new()
        } else {
            self.observations.observers()
        }
    }

    /// Ends sessions that were ordered to end, whose credential has expired, or that have been quiet for long.
    pub fn sweep(&mut self, now: Moment) {
        for (id, reason) in self.contexts.orders().take() {
            self.close(id, reason, now.at);
        }
        for id in self.contexts.idle(now.at, self.limits.idle_timeout.0) {
            self.close(id, CloseReason::Administrative, now.at);
        }
        for id in self.contexts.expired(now.clock.unix_secs) {
            self.close(id, CloseReason::NotAuthorized, now.at);
        }
        self.limits = self.gateway.limits();
    }

    /// Ends every session.
    pub fn close_all(&mut self, reason: CloseReason, now: Instant) {
        for id in self.contexts.ids() {
            self.close(id, reason, now);
        }
    }

    /// Observers whose observation has ended, each with its last notification.
    pub fn ended(&mut self) -> impl Iterator<Item = (ObserverId, Notification)> + use<> {
        std::mem::take(&mut self.ended).into_iter().map(|(observer, code)| (observer, Notification::ended(code)))
    }

    /// Ends an observation that the observer's side has ended.
    fn end(&mut self, tag: u64) {
        let Some(observation) = self.observations.remove(tag) else { return };
        let Some(context) = self.contexts.get_mut(observation.context) else { return };
        context.observations.retain(|own| *own != tag);
        self.gateway.unsubscribe(&mut context.client, &observation.filter, tag);
    }

    fn close(&mut self, id: ContextId, reason: CloseReason, now: Instant) {
        let Some(context) = self.contexts.remove(id) else { return };
        let last_word = match reason {
            CloseReason::NotAuthorized => Code::UNAUTHORIZED,
            CloseReason::TakenOver | CloseReason::TooSlow | CloseReason::ShuttingDown | CloseReason::Administrative => {
                Code::SERVICE_UNAVAILABLE
            }
        };
        for tag in &context.observations {
            let observer = self.observations.remove(*tag).and_then(|observation| observation.observer);
            self.ended.extend(observer.map(|observer| (observer, last_word)));
        }
        // Its subscriptions go with it.
        self.gateway.close(context.client, None, now);
    }

    fn check_size(&self, bytes: usize) -> Result<(), Reject> {
        let bytes_max = self.limits.packet_bytes_max;
        if bytes <= bytes_max as usize {
            return Ok(());
        }
        Err(Reject::TooLarge { limit: "packet_bytes_max", bytes_max: u64::from(bytes_max) })
    }
}

/// A refusal that the gateway has not counted.
fn refuse(reject: &Reject, known: bool) -> Answer {
    meters().coap.reject(reject);
    Answer::refusal(reject, known)
}

/// A last value as `request` wants it: 2.03 where it has it already, 4.06 where it wants another format.
fn value(message: Arc<Message>, request: &Request<'_>) -> Answer {
    let tag = etag(message.id);
    if request.contents.all(number::ETAG).any(|known| known == tag) {
        return Answer { etag: Some(tag), ..Answer::new(Code::VALID) };
    }
    let answer = Answer::value(message);
    match request.contents.accept() {
        Some(wanted) if wanted != answer.content_format.unwrap_or(content::OCTET_STREAM) => {
            Answer::new(Code::NOT_ACCEPTABLE)
        }
        Some(_) | None => answer,
    }
}

fn listed(links: Result<String, Reject>) -> Result<Answer, Reject> {
    links.map(|links| Answer::content(Code::CONTENT, content::LINK_FORMAT, links))
}

/// If-Match and If-None-Match (RFC 7252 section 5.10.8). They compare with the last value, so who sets one needs leave to read; nothing
/// keeps another writer from coming in between.
///
/// # Errors
/// What keeps the caller from reading.
fn holds(
    gateway: &Gateway,
    context: &mut Context,
    request: &Request<'_>,
    address: Address<'_>,
    now: Instant,
) -> Result<bool, Reject> {
    let must_be_new = request.contents.first(number::IF_NONE_MATCH).is_some();
    let mut wanted = request.contents.all(number::IF_MATCH).peekable();
    if !must_be_new && wanted.peek().is_none() {
        return Ok(true);
    }
    match gateway.read(&mut context.client, address, now) {
        Ok(message) => {
            let tag = etag(message.id);
            // An empty If-Match stands for any value that exists.
            let matches = wanted.peek().is_none() || wanted.any(|known| known.is_empty() || known == tag);
            Ok(!must_be_new && matches)
        }
        Err(Reject::NotFound) => Ok(wanted.peek().is_none()),
        Err(reject) => Err(reject),
    }
}

/// What is to be published.
struct Said<'m> {
    payload: &'m [u8],
    format: Option<u16>,
    retain: bool,
}

impl Said<'_> {
    fn draft(&self, qos: Qos) -> Draft {
        // A number outside the registry names no type that another protocol could carry.
        let properties = self
            .format
            .and_then(content::media_type)
            .map(|media_type| Box::new(Properties { content_type: Some(media_type.into()), ..Properties::default() }));
        Draft { payload: Bytes::copy_from_slice(self.payload), qos, retain: self.retain, properties }
    }
}

fn qos(request: &Request<'_>) -> Qos {
    if request.confirmable { Qos::AtLeastOnce } else { Qos::AtMostOnce }
}

/// A message as a notification. Where the observed resource stands for many topics, it says which one and each counts.
fn notification(delivery: &Delivery, each: bool) -> Notification {
    let message = &delivery.message;
    let mut notification = Notification::content(format_of(message), message.payload.clone());
    if each {
        let (short, rest) = delivery.topic_parts();
        let path = if short.is_empty() { format!("ps/{rest}") } else { format!("{short}{rest}") };
        notification.location = Some(path.into());
        notification.delivery = Sent::Each { ticket: message.id.seq };
    }
    notification
}

static OUTBOXES: AtomicU64 = AtomicU64::new(0);

/// How often [`Service::sweep`] is worth its while.
pub const SWEEP_EVERY: Duration = Duration::from_secs(1);
