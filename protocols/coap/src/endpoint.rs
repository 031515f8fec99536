//! The server endpoint of one socket: from datagrams to requests, from answers to datagrams.
//!
//! A confirmable request is answered in its acknowledgement when the application answers within `separate_after`, otherwise acknowledged empty and answered
//! later by a confirmable message of our own, retransmitted until acknowledged (RFC 7252 section 5.2). A NON is answered by a NON. What was answered is
//! remembered (see `exchange`), so that the application sees each message id at most once in EXCHANGE_LIFETIME.
//!
//! [`Endpoint::handle_datagram`] returns the request itself instead of queueing an event, so that it can borrow from the datagram: on the hot path nothing
//! is copied and nothing allocated. Sketch of a confirmable GET answered at once: parse 10 ns, one walk over the options, one keyed hash, one
//! 32-byte entry, the answer written to the batch and copied once to the replay ring.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::answer::{Asked, Token};
use crate::block::{self, Block, Bodies, Untaken};
use crate::build::Builder;
use crate::client::{CallError, CallId, CallLimits, Calls, Reply};
use crate::code::Code;
pub use crate::config::{Config, Counters};
use crate::exchange::{ExchangeKey, Exchanges, Seen, State};
use crate::message::{Contents, Kind, MessageView, TOKEN_BYTES_MAX};
pub use crate::observe::{Delivery, Notification, NotifyError, ObserverId};
use crate::observe::{Observers, Registration};
use crate::outgoing::{Batch, Due, Outgoing, Purpose};
use crate::peer::{self, MessageIds, PeerKey, Secret, Validated};
use crate::request::{self, Inspected, Observe, Refused, Request};
use crate::response::Response;
use crate::slots::{Slot, Slots};

/// Names one request until it is answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Handle(pub(crate) Slot);

impl Handle {
    /// For carrying a handle through an interface that knows only numbers.
    pub fn to_bits(self) -> u64 {
        self.0.to_bits()
    }

    pub fn from_bits(bits: u64) -> Self {
        Handle(Slot::from_bits(bits))
    }
}

/// The request is not waiting for an answer: it was answered already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone;

/// What one datagram led to.
#[derive(Debug)]
pub enum Received<'d> {
    /// The engine has dealt with it.
    Nothing,
    /// Answer now or later: [`Endpoint::respond`] or [`Endpoint::observe`].
    Request(Request<'d>),
    /// An answer to a call of ours ([`Endpoint::call`]).
    Reply(Reply<'d>),
    /// The first block of a longer body: [`Endpoint::accept_upload`] takes the body in, to come as one `Request`; `respond` refuses it before anything is kept.
    Upload(Request<'d>),
}

/// Something that happened by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A notification with this ticket was acknowledged.
    Delivered { observer: ObserverId, ticket: u64 },
    /// The observer needs the current value: it has not confirmed anything for `observe_confirm_after`, or updates were dropped for want of room.
    Refresh { observer: ObserverId },
    /// The observer is no more; what was still queued for it was not delivered.
    ObserverGone { observer: ObserverId, reason: GoneReason },
    /// A call of ours has no answer, or what it observes comes no more.
    CallFailed { call: CallId, error: CallError },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GoneReason {
    /// It asked, by Observe 1.
    Deregistered,
    /// It answered a notification by RST.
    Reset,
    /// It did not acknowledge a notification in MAX_TRANSMIT_WAIT.
    TimedOut,
    /// It registered again with the same token.
    Replaced,
    /// The last notification was an error, which ends the observation (RFC 7641 section 4.2).
    Ended,
}

/// What the endpoint wants next.
#[derive(Debug)]
pub enum Output<'e> {
    Transmit {
        peer: SocketAddr,
        bytes: &'e [u8],
    },
    Event(Event),
    /// Nothing until this instant, or until the next input.
    Timeout(Option<Instant>),
}

/// The endpoint of one UDP socket. See the module documentation.
#[derive(Debug)]
pub struct Endpoint {
    pub(crate) config: Config,
    pub(crate) secret: Secret,
    pub(crate) message_ids: MessageIds,
    pub(crate) observers: Observers,
    pub(crate) outgoing: Outgoing,
    pub(crate) batch: Batch,
    pub(crate) events: VecDeque<Event>,
    pub(crate) counters: Counters,
    pub(crate) exchanges: Exchanges,
    pub(crate) requests: Slots<Asked>,
    /// Confirmable requests in order of arrival, with the time of their empty acknowledgement.
    separate: VecDeque<(Instant, Slot)>,
    pub(crate) bodies: Bodies,
    pub(crate) validated: Validated,
    pub(crate) calls: Calls,
    begun: Instant,
    /// Datagrams of the batch that `poll_output` has handed out.
    polled: usize,
}

impl Endpoint {
    /// `seed` must be secret and new for each start: it keys the hashes and the Echo values.
    pub fn new(config: Config, now: Instant, seed: [u8; 32]) -> Self {
        let mut secret = Secret::new(seed);
        let message_ids = MessageIds::new(&mut secret);
        let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
        Endpoint {
            message_ids,
            observers: Observers::new(secret.clone(), config.observers_max),
            outgoing: Outgoing::new(
                secret.clone(),
                config.outgoing_max,
                config.ack_timeout,
                config.ack_random_percent,
                config.retransmissions_max,
                config.nstart,
            ),
            batch: Batch::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
            exchanges: Exchanges::new(
                config.exchanges_max,
                config.exchange_bytes_max,
                seconds(config.exchange_lifetime),
            ),
            requests: Slots::new(config.requests_max),
            separate: VecDeque::new(),
            bodies: Bodies::new(
                secret.clone(),
                config.blockwise_bytes_max,
                config.blockwise_peer_bytes_max,
                config.body_bytes_max,
                config.blockwise_lifetime,
            ),
            validated: Validated::new(secret.clone(), config.peers_max, seconds(config.peer_lifetime)),
            calls: Calls::new(secret.clone(), call_limits(&config)),
            begun: now,
            polled: 0,
            secret,
            config,
        }
    }

    /// Takes one datagram. Never fails: what is malformed is ignored or reset, and counted.
    pub fn handle_datagram<'d>(&mut self, now: Instant, peer: SocketAddr, datagram: &'d [u8]) -> Received<'d> {
        self.counters.received += 1;
        if peer::is_multicast(peer) || peer.port() == 0 {
            self.counters.malformed += 1;
            return Received::Nothing;
        }
        let view = match MessageView::parse(datagram) {
            Ok(view) => view,
            Err(error) => {
                self.counters.malformed += 1;
                if let Some(message_id) = error.reset {
                    self.send_empty(peer, Kind::Reset, message_id);
                }
                return Received::Nothing;
            }
        };
        let code = view.contents.code;
        match view.kind {
            Kind::Confirmable | Kind::NonConfirmable if code.is_request() => {
                if view.contents.token.len() > TOKEN_BYTES_MAX {
                    self.refuse_token(peer, &view);
                    return Received::Nothing;
                }
                return self.handle_request(now, peer, view, datagram);
            }
            // An empty CON asks whether anybody is there (section 4.3).
            Kind::Confirmable if code == Code::EMPTY => {
                self.counters.pings += 1;
                self.send_empty(peer, Kind::Reset, view.message_id);
            }
            Kind::Confirmable | Kind::NonConfirmable => {
                let (ours, reply) = self.handle_response(now, peer, view.contents);
                self.counters.stray += u64::from(!ours);
                match (view.kind == Kind::Confirmable, ours) {
                    (true, true) => self.send_empty(peer, Kind::Acknowledgement, view.message_id),
                    (true, false) => self.send_empty(peer, Kind::Reset, view.message_id),
                    // RFC 7641 section 3.6: who notifies us of what we no longer want is told so.
                    (false, false) if view.contents.observe().is_some() => {
                        self.send_empty(peer, Kind::Reset, view.message_id);
                    }
                    (false, _) => {}
                }
                return reply.map_or(Received::Nothing, Received::Reply);
            }
            Kind::Acknowledgement => {
                self.handle_end(now, peer, view.message_id, false);
                if code != Code::EMPTY {
                    let (_, reply) = self.handle_response(now, peer, view.contents);
                    return reply.map_or(Received::Nothing, Received::Reply);
                }
            }
            Kind::Reset => self.handle_end(now, peer, view.message_id, true),
        }
        Received::Nothing
    }

    /// Sends what is due: empty acknowledgements, retransmissions; forgets what has stalled.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, slot)) = self.separate.front().copied() {
            if self.requests.get(slot).is_some_and(|asked| asked.confirmable && !asked.acknowledged) {
                if at > now {
                    break;
                }
                self.acknowledge(slot);
            }
            self.separate.pop_front();
        }
        while let Some(due) = self.outgoing.take_due(now) {
            match due {
                Due::Retransmit(slot) => {
                    self.counters.retransmitted += 1;
                    self.retransmit(now, slot);
                }
                Due::GivenUp(sent) => {
                    self.counters.given_up += 1;
                    match sent.purpose {
                        Purpose::Notification(observer) => self.remove_observer(now, observer, GoneReason::TimedOut),
                        Purpose::Call(call) => self.fail_call(now, call, CallError::TimedOut),
                        Purpose::Answer => {}
                    }
                }
            }
        }
        self.counters.bodies_expired += self.bodies.expire(now) as u64;
        self.refresh_observers(now);
        self.expire_calls(now);
    }

    /// Answers a request. The answer is sliced when it is longer than a block, and shortened or put off by Echo when the peer is a stranger and the
    /// answer would be more than three times the question and more than 136 bytes (RFC 9175 section 2.4).
    ///
    /// # Errors
    /// `Gone` when the request was answered before.
    pub fn respond(&mut self, now: Instant, handle: Handle, response: &Response<'_>) -> Result<(), Gone> {
        let asked = self.take_request(handle)?;
        self.finish(now, &asked, response, None);
        Ok(())
    }

    /// Answers a request with [`Observe::Register`] and registers the observer, when the answer is a success and there is room. The first
    /// notification is this answer.
    ///
    /// # Errors
    /// `Gone` when the request was answered before.
    pub fn observe(
        &mut self,
        now: Instant,
        handle: Handle,
        response: &Response<'_>,
    ) -> Result<Option<ObserverId>, Gone> {
        let asked = self.take_request(handle)?;
        if !asked.register || !response.code.is_success() {
            self.finish(now, &asked, response, None);
            return Ok(None);
        }
        let peer = PeerKey::new(asked.peer);
        let old = self.observers.find(peer, &asked.token);
        let sequence = old.map_or(1, |old| self.observers.sequence_after(old));
        if let Some(old) = old {
            self.remove_observer(now, old, GoneReason::Replaced);
        }
        let registration =
            Registration { peer: asked.peer, token: asked.token.clone(), exponent: self.exponent_of(&asked) };
        let refresh_at = now + self.config.observe_confirm_after;
        let room = self.observers.of_peer(peer) < self.config.observers_peer_max;
        let observer = if room { self.observers.register(now, registration, sequence, refresh_at) } else { None };
        let in_full = self.finish(now, &asked, response, observer.map(|_| sequence));
        // A stranger that was sent an Echo instead comes back with it and registers then.
        if let Some(observer) = observer.filter(|_| !in_full) {
            self.forget(now, observer);
            return Ok(None);
        }
        Ok(observer)
    }

    /// Keeps the answer to this GET, when it is longer than a block, for the requests of the other blocks: the application could make it again only at some
    /// cost. What answers another method is always kept.
    pub fn keep_answer(&mut self, request: &Request<'_>) {
        if let Some(asked) = self.requests.get_mut(request.handle.0) {
            asked.body_key = block::body_key(&self.secret, &request.contents);
            asked.keep = true;
        }
    }

    /// Takes in the body whose first block came as [`Received::Upload`].
    ///
    /// # Errors
    /// `Gone` when the request was answered before.
    pub fn accept_upload(&mut self, now: Instant, request: &Request<'_>) -> Result<(), Gone> {
        let asked = self.take_request(request.handle)?;
        let peer = PeerKey::new(asked.peer);
        match self.bodies.begin(now, peer, asked.body_key, &request.payload) {
            Ok(()) => {
                self.finish(now, &asked, &Response::new(Code::CONTINUE), None);
            }
            Err(untaken) => self.refuse_block(now, &asked, untaken),
        }
        Ok(())
    }

    /// Notes that the peer receives what is sent to its address, for example because it signed a challenge that was sent there.
    pub fn validate(&mut self, now: Instant, peer: SocketAddr) {
        let now_s = self.seconds(now);
        self.validated.insert(now_s, PeerKey::new(peer));
    }

    /// The next datagram, event or waiting time. Call until `Timeout`; then, and only then, give the next input.
    pub fn poll_output(&mut self) -> Output<'_> {
        if self.polled < self.batch.len() {
            self.polled += 1;
            return match self.batch.get(self.polled - 1) {
                Some((peer, bytes)) => Output::Transmit { peer, bytes },
                None => Output::Timeout(Some(self.begun)),
            };
        }
        self.batch.clear();
        self.polled = 0;
        match self.events.pop_front() {
            Some(event) => Output::Event(event),
            None => Output::Timeout(self.next_timeout()),
        }
    }

    /// Moves all datagrams out at once, in exchange for an empty batch; then only [`Endpoint::poll_event`] and [`Endpoint::next_timeout`] are left to ask.
    pub fn swap_batch(&mut self, batch: &mut Batch) {
        batch.clear();
        self.polled = 0;
        std::mem::swap(&mut self.batch, batch);
    }

    /// Datagrams waiting to be sent, so that a driver can bound a round.
    pub fn batch_len(&self) -> usize {
        self.batch.len()
    }

    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Endpoint::handle_timeout`].
    pub fn next_timeout(&mut self) -> Option<Instant> {
        while let Some((_, slot)) = self.separate.front() {
            if self.requests.get(*slot).is_some_and(|asked| !asked.acknowledged) {
                break;
            }
            self.separate.pop_front();
        }
        let separate = self.separate.front().map(|(at, _)| *at);
        let calls = self.calls.next_deadline();
        [separate, self.outgoing.next_due(), self.bodies.next_expiry(), self.observers.next_refresh(), calls]
            .into_iter()
            .flatten()
            .min()
    }

    pub fn counters(&self) -> Counters {
        Counters {
            exchanges_evicted: self.exchanges.evicted,
            exchanges: self.exchanges.len(),
            requests_open: self.requests.len(),
            outgoing: self.outgoing.len(),
            observers: self.observers.len(),
            blockwise_bytes: self.bodies.bytes(),
            peers_validated: self.validated.len(),
            calls: self.calls.len(),
            ..self.counters
        }
    }

    fn handle_request<'d>(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        view: MessageView<'d>,
        datagram: &'d [u8],
    ) -> Received<'d> {
        let now_s = self.seconds(now);
        let key = ExchangeKey::new(&self.secret, PeerKey::new(peer), datagram);
        match self.exchanges.look_up(now_s, key) {
            Seen::Never => {}
            Seen::Waiting | Seen::Silent => {
                self.counters.duplicates += 1;
                return Received::Nothing;
            }
            Seen::Acknowledged => {
                self.counters.duplicates += 1;
                self.send_empty(peer, Kind::Acknowledgement, view.message_id);
                return Received::Nothing;
            }
            Seen::Answered(answer) => {
                self.counters.duplicates += 1;
                self.counters.replayed += 1;
                self.batch.push(peer, answer);
                return Received::Nothing;
            }
        }
        let contents = view.contents;
        let mut asked = Asked {
            peer,
            message_id: view.message_id,
            exchange: self.exchanges.insert(now_s, key),
            token: Token::new(contents.token),
            code: contents.code,
            confirmable: view.kind == Kind::Confirmable,
            acknowledged: false,
            register: false,
            no_response: 0,
            block1: None,
            block2: None,
            asked_bytes: datagram.len(),
            body_key: 0,
            keep: contents.code != Code::GET,
        };
        match request::inspect(contents) {
            Ok(inspected) => self.handle_inspected(now, asked, contents, inspected),
            Err(refused) => {
                self.counters.refused += 1;
                // Section 5.4.1: an unrecognised critical option in a NON rejects the message, silently.
                if !asked.confirmable && refused == Refused::BadOption {
                    self.exchanges.set_state(asked.exchange, State::Silent);
                    return Received::Nothing;
                }
                asked.no_response = 0;
                self.finish(now, &asked, &Response::new(refused.code()), None);
                Received::Nothing
            }
        }
    }

    fn handle_inspected<'d>(
        &mut self,
        now: Instant,
        mut asked: Asked,
        contents: Contents<'d>,
        inspected: Inspected<'d>,
    ) -> Received<'d> {
        self.counters.requests += 1;
        let peer_key = PeerKey::new(asked.peer);
        asked.no_response = inspected.no_response;
        asked.block1 = inspected.block1;
        asked.block2 = inspected.block2;
        asked.register = inspected.observe == Some(Observe::Register);
        if let Some(value) = inspected.echo {
            let now_s = self.seconds(now);
            let lifetime_s = self.config.peer_lifetime.as_secs().min(u64::from(u32::MAX)) as u32;
            if peer::echo_is_fresh(&self.secret, now_s, lifetime_s, peer_key, value) {
                self.validated.insert(now_s, peer_key);
            }
        }
        if inspected.observe == Some(Observe::Deregister)
            && let Some(observer) = self.observers.find(peer_key, &asked.token)
        {
            self.remove_observer(now, observer, GoneReason::Deregistered);
        }
        let mut payload = Cow::Borrowed(contents.payload);
        let mut upload = false;
        let later_block = asked.block2.filter(|block| block.number > 0);
        if asked.block1.is_some() || later_block.is_some() || contents.code != Code::GET {
            asked.body_key = block::body_key(&self.secret, &contents);
        }
        if let Some(block) = asked.block1 {
            match self.take_block(now, &asked, block, contents.payload) {
                Taken::Whole => {}
                Taken::First => upload = true,
                Taken::Last(body) => {
                    // All of it came from this address.
                    asked.asked_bytes += body.len();
                    payload = Cow::Owned(body);
                }
                Taken::Answered => return Received::Nothing,
            }
        } else if let Some(block) = later_block
            && (asked.keep || self.bodies.kept(peer_key, asked.body_key).is_some())
        {
            self.respond_kept(now, &asked, block);
            return Received::Nothing;
        }
        if self.requests.is_full() {
            self.counters.requests_full += 1;
            self.finish(now, &asked, &Response::new(Code::SERVICE_UNAVAILABLE).max_age(FULL_RETRY_S), None);
            return Received::Nothing;
        }
        let (peer, confirmable) = (asked.peer, asked.confirmable);
        let Some(slot) = self.requests.insert(asked) else { return Received::Nothing };
        if confirmable {
            // Answers out of order leave stale entries; swept before they outnumber the requests that can be open.
            if self.separate.len() > 2 * self.config.requests_max {
                let requests = &self.requests;
                self.separate.retain(|(_, slot)| requests.get(*slot).is_some());
            }
            self.separate.push_back((now + self.config.separate_after, slot));
        }
        let request = Request {
            handle: Handle(slot),
            peer,
            confirmable,
            contents,
            path: inspected.path,
            payload,
            observe: inspected.observe,
        };
        match upload {
            true => Received::Upload(request),
            false => Received::Request(request),
        }
    }

    /// RFC 8974 section 2.2.2: what can never be handled is answered 4.00 with its token, so that the client learns that extended tokens as such are
    /// understood. Nothing is remembered: a duplicate is answered the same. No answer is longer than its question.
    fn refuse_token(&mut self, peer: SocketAddr, view: &MessageView<'_>) {
        self.counters.refused += 1;
        let (kind, message_id) = match view.kind {
            Kind::Confirmable => (Kind::Acknowledgement, view.message_id),
            _ => (Kind::NonConfirmable, self.message_ids.next(&self.secret, PeerKey::new(peer))),
        };
        Builder::datagram(self.batch.open(), kind, Code::BAD_REQUEST, message_id, view.contents.token).payload(&[]);
        self.batch.close(peer);
    }

    /// Block1 (RFC 7959 section 2.5).
    fn take_block(&mut self, now: Instant, asked: &Asked, block: Block, piece: &[u8]) -> Taken {
        // All blocks but the last are full, and none is longer than it says (section 2.2).
        if piece.len() > block.bytes() || (block.more && piece.len() != block.bytes()) {
            self.finish(now, asked, &Response::new(Code::BAD_REQUEST), None);
            return Taken::Answered;
        }
        let peer = PeerKey::new(asked.peer);
        if block.number == 0 {
            self.bodies.finish(peer, asked.body_key);
            return if block.more { Taken::First } else { Taken::Whole };
        }
        match self.bodies.append(now, peer, asked.body_key, block.offset(), piece) {
            Err(untaken) => self.refuse_block(now, asked, untaken),
            Ok(_) if block.more => {
                self.finish(now, asked, &Response::new(Code::CONTINUE), None);
            }
            Ok(_) => {
                if let Some(body) = self.bodies.finish(peer, asked.body_key) {
                    return Taken::Last(body);
                }
                self.refuse_block(now, asked, Untaken::Incomplete);
            }
        }
        Taken::Answered
    }

    fn refuse_block(&mut self, now: Instant, asked: &Asked, untaken: Untaken) {
        let response = match untaken {
            Untaken::Incomplete => Response::new(Code::REQUEST_ENTITY_INCOMPLETE),
            Untaken::TooLarge(limit) => {
                Response::new(Code::REQUEST_ENTITY_TOO_LARGE).size1(u32::try_from(limit).unwrap_or(u32::MAX))
            }
            Untaken::Full => Response::new(Code::SERVICE_UNAVAILABLE).max_age(FULL_RETRY_S),
        };
        self.finish(now, asked, &response, None);
    }

    /// A later block of an answer that was kept, because asking the application again would repeat its effect.
    fn respond_kept(&mut self, now: Instant, asked: &Asked, block: Block) {
        let peer = PeerKey::new(asked.peer);
        let Some(((code, content_format), bytes)) = self.bodies.kept(peer, asked.body_key) else {
            self.finish(now, asked, &Response::new(Code::REQUEST_ENTITY_INCOMPLETE), None);
            return;
        };
        let bytes = bytes.to_vec();
        let answered = self.finish(now, asked, &Response::new(Code(code)).content(content_format, &bytes), None);
        if answered && block.offset() + block.bytes() >= bytes.len() {
            self.bodies.drop_kept(peer, asked.body_key);
        }
    }

    fn take_request(&mut self, handle: Handle) -> Result<Asked, Gone> {
        let asked = self.requests.remove(handle.0).ok_or(Gone)?;
        if self.separate.back().is_some_and(|(_, slot)| *slot == handle.0) {
            self.separate.pop_back();
        }
        Ok(asked)
    }

    /// An acknowledgement or a reset of something of ours.
    fn handle_end(&mut self, now: Instant, peer: SocketAddr, message_id: u16, is_reset: bool) {
        let peer_key = PeerKey::new(peer);
        let key = peer_key.message(message_id);
        let Some(sent) = self.outgoing.end(key) else {
            // A reset may also answer a NON notification (RFC 7641 section 4.5).
            match is_reset.then(|| self.observers.find_sent(key)).flatten() {
                Some(observer) => self.remove_observer(now, observer, GoneReason::Reset),
                None => self.counters.stray += 1,
            }
            return;
        };
        match (sent.purpose, is_reset) {
            (Purpose::Notification(observer), true) => self.remove_observer(now, observer, GoneReason::Reset),
            (Purpose::Notification(observer), false) => self.notification_confirmed(now, observer),
            (Purpose::Call(call), true) => self.fail_call(now, call, CallError::Reset),
            (Purpose::Call(call), false) => self.call_carried(now, call),
            (Purpose::Answer, _) => {}
        }
    }

    pub(crate) fn send_empty(&mut self, peer: SocketAddr, kind: Kind, message_id: u16) {
        Builder::datagram(self.batch.open(), kind, Code::EMPTY, message_id, &[]).payload(&[]);
        self.batch.close(peer);
    }

    pub(crate) fn seconds(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.begun).as_secs()).unwrap_or(u32::MAX)
    }
}

fn call_limits(config: &Config) -> CallLimits {
    CallLimits {
        calls_max: config.calls_max,
        peer_max: config.calls_peer_max,
        body_bytes_max: config.body_bytes_max,
        bytes_max: config.blockwise_bytes_max,
        block_bytes_max: config.block_bytes_max,
    }
}

/// What became of a block of a request.
enum Taken {
    /// The only block: a plain request.
    Whole,
    First,
    Last(Vec<u8>),
    Answered,
}

/// When to come back after a 5.03 for want of room.
const FULL_RETRY_S: u32 = 2;
