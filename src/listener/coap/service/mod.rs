//! From a request to its answer: who asks, what for, and what the gateway says. The same over UDP and TCP.
//!
//! A driver owns an engine and one [`Service`]; the service never sees the engine. It is told what happened and says what to send.

mod observe;
mod relay;
mod write;

use std::collections::HashSet;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use portable_atomic::{AtomicU64, Ordering};
use tidegate_coap::option::number;
use tidegate_coap::{Code, ObserverId, Request, content};

use super::answer::{Answer, Payload, etag};
use super::call::{self, Call, NoCall};
use super::contexts::{ContextId, Contexts};
use super::links::{self, Which};
use super::observations::Observations;
use crate::gateway::{Gateway, Limits, Now, Outbox, OutboxLimits};
use crate::listener::Relay;
use crate::message::{CloseReason, Completion, Device, Message, Protocol, Reject, SessionId};
use crate::telemetry::meters;
use write::Said;

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
    /// An upstream answers; whatever comes of it, this becomes the answer.
    Elsewhere(Pin<Box<dyn Future<Output = Answer> + Send>>),
    /// Register the observer, and tell [`Service::registered`] how that went.
    Observe {
        answer: Answer,
        tag: u64,
    },
}

/// See the module's documentation.
pub struct Service {
    gateway: Arc<Gateway>,
    relay: Option<Arc<dyn Relay>>,
    limits: Limits,
    contexts: Contexts,
    observations: Observations,
    outbox: Arc<Outbox>,
    completion: Arc<dyn Completion>,
    /// Whom the transport itself has authenticated (a TLS certificate).
    presumed: Option<Arc<Device>>,
    is_tls: bool,
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
            bytes_max: usize::try_from(limits.outbox_bytes_max.bytes()).unwrap_or(usize::MAX).saturating_mul(4),
        };
        // From the top down, where the numbers of sessions, which begin at 1, never come.
        let name = SessionId(u64::MAX - OUTBOXES.fetch_add(1, Ordering::Relaxed));
        let outbox = Arc::new(Outbox::new(name, outbox_limits));
        Service {
            contexts: Contexts::new(contexts_max, outbox.clone()),
            observations: Observations::default(),
            completion: outbox.clone(),
            outbox,
            presumed: None,
            is_tls: false,
            removals: HashSet::new(),
            ended: Vec::new(),
            rest: String::new(),
            dropped: 0,
            limits,
            relay,
            gateway,
        }
    }

    /// The same behind TLS, where the certificate may already have said who asks.
    pub fn behind_tls(mut self, presumed: Option<Arc<Device>>) -> Self {
        (self.presumed, self.is_tls) = (presumed, true);
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
        self.contexts.is_empty()
    }

    /// Whether anything is observed.
    pub fn observes(&self) -> bool {
        !self.observations.is_empty()
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
            Ok(Call::Publish { .. } | Call::Patch { .. }) | Err(NoCall::NotFound) => {}
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
        if let Ok(Call::Publish { space, .. }) = call
            && request.content_format() == Some(content::COSE_SIGN1)
            && request.contents.first(number::URI_QUERY).is_none()
        {
            return self.publish_signed(now, request, space, rest);
        }
        if call == Err(NoCall::NotFound)
            && let Some(reply) = self.proxy(now, request)
        {
            return reply;
        }
        let id = match self.identify(now, request) {
            Ok(id) => id,
            Err(Reject::Unauthenticated) if call == Ok(Call::Core) => {
                let links = Payload::Static(links::FOR_STRANGERS);
                let core = Answer::new(Code::CONTENT);
                return Reply::Now(Answer { content_format: Some(content::LINK_FORMAT), payload: links, ..core });
            }
            Err(reject) => return Reply::Now(refuse(&reject, false)),
        };
        let Some(context) = self.contexts.get_mut(id) else {
            return Reply::Now(refuse(&Reject::ShuttingDown, false));
        };
        let known = context.client.caller.device.is_some();
        let done = match call {
            Ok(Call::Publish { space, retain }) => {
                let said = Said { payload: &request.payload, format: request.content_format(), retain };
                return self.publish(now, request, id, space, rest, said);
            }
            Ok(Call::Remove { space }) => return self.remove(now, request, id, space, rest),
            Ok(Call::Follow { space, wildcard }) => return self.follow(now, request, id, space, rest, wildcard),
            Ok(Call::Read { space }) => {
                let read = self.gateway.read(&mut context.client, space.address(rest), now.at);
                read.map(|message| value(&message, request))
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
fn value(message: &Message, request: &Request<'_>) -> Answer {
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

static OUTBOXES: AtomicU64 = AtomicU64::new(0);

/// How often [`Service::sweep`] is worth its while.
pub const SWEEP_EVERY: Duration = Duration::from_secs(1);
