//! Requests of our own: to devices that have registered what they serve (RFC 9176), and observing it (RFC 7641, client side).
//!
//! A call is a confirmable request, over the socket or connection that its peer is known by, so that address translators let it through. Its outcome is
//! one [`Reply`], put together from blocks where the answer is longer (RFC 7959 section 2.4), or an [`crate::Event::CallFailed`]. A call that observes goes
//! on: each fresh notification is a further reply until it is hung up; it registers again when Max-Age passes in silence (RFC 7641 section 3.3.1).
//!
//! One unacknowledged call to a peer; further ones wait for their turn (NSTART, RFC 7252 section 4.7). Calls, all and those of one peer, and the bytes of
//! an answer are bounded by [`crate::Config`].
//!
//! Deliberately not here: choosing whom to call, and whether.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::bert;
use crate::block::Block;
use crate::build::Builder;
use crate::code::Code;
use crate::endpoint::{Endpoint, Event};
use crate::message::{Contents, Kind};
use crate::option::{self, number};
use crate::outgoing::Purpose;
use crate::peer::{PeerKey, Secret};
use crate::slots::{Slot, Slots};

/// Names one call until its outcome.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CallId(pub(crate) Slot);

/// What is asked.
#[derive(Clone, Debug)]
pub struct Call {
    pub code: Code,
    pub path: Vec<String>,
    pub query: Vec<String>,
    pub if_match: Vec<Vec<u8>>,
    pub if_none_match: bool,
    /// Entity tags that the asker holds: 2.03 says that one is current.
    pub etags: Vec<Vec<u8>>,
    pub content_format: Option<u16>,
    pub accept: Option<u16>,
    /// Sent in blocks where it is longer than one.
    pub payload: Vec<u8>,
    /// Wants notifications too.
    pub observe: bool,
    /// Time for the whole answer; of a call that observes, for the first.
    pub timeout: Duration,
}

impl Call {
    pub fn get(path: Vec<String>, timeout: Duration) -> Self {
        Call {
            code: Code::GET,
            path,
            query: Vec::new(),
            if_match: Vec::new(),
            if_none_match: false,
            etags: Vec::new(),
            content_format: None,
            accept: None,
            payload: Vec::new(),
            observe: false,
            timeout,
        }
    }
}

/// An answer to a call.
#[derive(Clone, Debug)]
pub struct Reply<'d> {
    pub call: CallId,
    pub code: Code,
    pub content_format: Option<u16>,
    pub max_age: Option<u32>,
    pub etag: &'d [u8],
    /// The segments of Location-Path.
    pub location: Vec<&'d [u8]>,
    pub payload: Cow<'d, [u8]>,
    /// The call goes on: further values will come.
    pub observed: bool,
    /// A notification's first block: who wants all of it calls again without observing.
    pub partial: bool,
}

/// Why a call has no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallError {
    /// Nobody acknowledged or answered in time.
    TimedOut,
    /// The peer does not know what to do with it.
    Reset,
    /// The answer is larger than `body_bytes_max`, or has no room beside the others that are half here.
    TooLarge,
    /// Its blocks do not fit together, or it has a critical option that we do not know (RFC 7252 section 5.4.1).
    Broken,
}

/// The call was not begun: `calls_max` or `calls_peer_max` is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CallsFull;

/// The token of a call.
pub(crate) type CallToken = [u8; 8];

#[derive(Debug)]
struct Pending {
    peer: SocketAddr,
    call: Call,
    token: CallToken,
    /// The block of the payload that is sent.
    up: Option<Block>,
    /// The block of the answer that is asked for, behind the first.
    down: Option<Block>,
    /// What is here of an answer in blocks, and its entity tag.
    body: Vec<u8>,
    etag: Vec<u8>,
    /// The last notification's number and time (RFC 7641 section 3.4).
    observed: Option<(u32, Instant)>,
    /// The registration is being renewed.
    renewing: bool,
    deadline: Option<Instant>,
    /// The message that carries it, as long as that is unacknowledged.
    sent: Option<Slot>,
}

/// What a response means for its call.
pub(crate) enum Heard<'d> {
    /// Not an answer to anything asked; `observed` when it notifies.
    Stray,
    /// An answer that came before, or a notification that is older than the last.
    Stale,
    Reply(Reply<'d>),
    /// The next block has to be asked for or sent.
    GoOn(CallId),
    Failed(CallId, CallError),
}

/// All calls of one endpoint or connection.
#[derive(Debug)]
pub(crate) struct Calls {
    rows: Slots<Pending>,
    by_token: HashMap<(PeerKey, CallToken), CallId, Secret>,
    deadlines: BTreeSet<(Instant, CallId)>,
    lines: HashMap<PeerKey, Line, Secret>,
    /// Whose answers may come once more, because our acknowledgement was lost.
    answered: VecDeque<(PeerKey, CallToken)>,
    secret: Secret,
    peer_max: usize,
    body_bytes_max: usize,
    /// Bytes of all answers that are half here, and their limit.
    bytes: usize,
    bytes_max: usize,
    /// Largest block that we send.
    block_bytes_max: usize,
}

/// The bounds of [`Calls`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallLimits {
    pub calls_max: usize,
    pub peer_max: usize,
    pub body_bytes_max: usize,
    pub bytes_max: usize,
    pub block_bytes_max: usize,
}

/// The calls to one peer.
#[derive(Debug, Default)]
struct Line {
    calls: usize,
    carrying: Option<CallId>,
    waiting: VecDeque<CallId>,
}

impl Calls {
    pub fn new(secret: Secret, limits: CallLimits) -> Self {
        let CallLimits { calls_max, peer_max, body_bytes_max, bytes_max, block_bytes_max } = limits;
        Calls {
            rows: Slots::new(calls_max),
            by_token: HashMap::with_hasher(secret.clone()),
            deadlines: BTreeSet::new(),
            lines: HashMap::with_hasher(secret.clone()),
            answered: VecDeque::new(),
            secret,
            peer_max,
            body_bytes_max,
            bytes: 0,
            bytes_max,
            block_bytes_max,
        }
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Begins a call; `deadline` where the transport keeps the time.
    pub fn begin(&mut self, peer: SocketAddr, call: Call, deadline: Option<Instant>) -> Result<CallId, CallsFull> {
        let key = PeerKey::new(peer);
        if self.rows.is_full() || self.lines.get(&key).is_some_and(|line| line.calls >= self.peer_max) {
            return Err(CallsFull);
        }
        // Eight unpredictable bytes: who is not on the path cannot answer for the device (RFC 7252 section 5.3.1).
        let random = self.secret.random();
        let token = self.secret.hash(("call", random)).to_be_bytes();
        let exponent = Block::exponent_for(self.block_bytes_max);
        let up = (call.payload.len() > self.block_bytes_max).then_some(Block { number: 0, more: true, exponent });
        let pending = Pending {
            peer,
            call,
            token,
            up,
            down: None,
            body: Vec::new(),
            etag: Vec::new(),
            observed: None,
            renewing: false,
            deadline: None,
            sent: None,
        };
        let id = CallId(self.rows.insert(pending).ok_or(CallsFull)?);
        self.by_token.insert((key, token), id);
        self.lines.entry(key).or_default().calls += 1;
        self.set_deadline(id, deadline);
        Ok(id)
    }

    /// Moves the time by which something has to come.
    fn set_deadline(&mut self, id: CallId, at: Option<Instant>) {
        let Some(pending) = self.rows.get_mut(id.0) else { return };
        if let Some(old) = std::mem::replace(&mut pending.deadline, at) {
            self.deadlines.remove(&(old, id));
        }
        if let Some(at) = at {
            self.deadlines.insert((at, id));
        }
    }

    fn remove(&mut self, id: CallId) -> Option<Pending> {
        self.set_deadline(id, None);
        let pending = self.rows.remove(id.0)?;
        self.bytes = self.bytes.saturating_sub(pending.body.len());
        let key = PeerKey::new(pending.peer);
        self.by_token.remove(&(key, pending.token));
        if let Some(line) = self.lines.get_mut(&key) {
            line.calls = line.calls.saturating_sub(1);
            line.waiting.retain(|waiting| *waiting != id);
            if line.calls == 0 {
                self.lines.remove(&key);
            }
        }
        Some(pending)
    }

    /// Ends a call that was answered. Its answer may come again.
    fn complete(&mut self, id: CallId) -> Option<Pending> {
        let pending = self.remove(id)?;
        if self.answered.len() >= ANSWERED_MAX {
            self.answered.pop_front();
        }
        self.answered.push_back((PeerKey::new(pending.peer), pending.token));
        Some(pending)
    }

    pub fn token(&self, id: CallId) -> Option<(SocketAddr, Code, CallToken)> {
        self.rows.get(id.0).map(|pending| (pending.peer, pending.call.code, pending.token))
    }

    /// Notes how long a message the peer takes.
    pub fn set_block_bytes_max(&mut self, bytes_max: usize) {
        self.block_bytes_max = bytes_max;
    }

    /// Ends a call whose transport keeps no time; says whether there was one.
    pub fn end(&mut self, id: CallId) -> bool {
        self.remove(id).is_some()
    }

    pub fn observes(&self, id: CallId) -> bool {
        self.rows.get(id.0).is_some_and(|pending| pending.call.observe)
    }

    /// Writes the options and the part of the payload that go out now; `goodbye` when what is observed is wanted no more.
    pub fn write(&self, id: CallId, goodbye: bool, mut builder: Builder<'_>) {
        let Some(pending) = self.rows.get(id.0) else { return };
        let call = &pending.call;
        for tag in &call.if_match {
            builder = builder.option(number::IF_MATCH, tag);
        }
        for tag in &call.etags {
            builder = builder.option(number::ETAG, tag);
        }
        if call.if_none_match {
            builder = builder.option(number::IF_NONE_MATCH, &[]);
        }
        // RFC 7959 section 2.4: the requests for later blocks do not observe.
        let observe = call.observe && pending.down.is_none();
        builder = builder.uint_if(number::OBSERVE, observe.then_some(u32::from(goodbye)));
        for segment in &call.path {
            builder = builder.option(number::URI_PATH, segment.as_bytes());
        }
        builder = builder.uint_if(number::CONTENT_FORMAT, call.content_format.map(u32::from));
        for argument in &call.query {
            builder = builder.option(number::URI_QUERY, argument.as_bytes());
        }
        builder = builder.uint_if(number::ACCEPT, call.accept.map(u32::from));
        builder = builder.uint_if(number::BLOCK2, pending.down.map(Block::bits));
        builder = builder.uint_if(number::BLOCK1, pending.up.map(Block::bits));
        let size = pending.up.filter(|block| block.number == 0).map(|_| call.payload.len());
        builder = builder.uint_if(number::SIZE1, size.and_then(|size| u32::try_from(size).ok()));
        let piece = match pending.up {
            Some(block) => {
                let end = call.payload.len().min(block.offset().saturating_add(block.bytes()));
                call.payload.get(block.offset()..end).unwrap_or_default()
            }
            // The answer is being fetched: the request has been heard.
            None if pending.down.is_some() => &[],
            None => &call.payload,
        };
        builder.payload(piece);
    }

    /// Takes a response in. `now` where notifications can overtake each other (RFC 8323 section 7.1: over TCP they do not).
    pub fn hear<'d>(&mut self, peer: SocketAddr, contents: Contents<'d>, now: Option<Instant>) -> Heard<'d> {
        let Ok(token) = CallToken::try_from(contents.token) else { return Heard::Stray };
        let key = (PeerKey::new(peer), token);
        let Some(&id) = self.by_token.get(&key) else {
            return if self.answered.contains(&key) { Heard::Stale } else { Heard::Stray };
        };
        let understood = |n| matches!(n, number::BLOCK1 | number::BLOCK2 | number::OSCORE) || !option::is_critical(n);
        if !contents.options().all(|(n, _)| understood(n)) {
            return Heard::Failed(id, CallError::Broken);
        }
        let Some(pending) = self.rows.get_mut(id.0) else { return Heard::Stray };
        if let Some(up) = pending.up {
            match next_up(up, pending.call.payload.len(), &contents) {
                Up::Next(next) => {
                    pending.up = Some(next);
                    return Heard::GoOn(id);
                }
                Up::Stale => return Heard::Stale,
                Up::Over => pending.up = None,
            }
        }
        let etag = contents.first(number::ETAG).unwrap_or_default();
        // Who has no time to keep speaks over a reliable transport.
        let parse = if now.is_some() { Block::parse } else { Block::parse_reliable };
        let block2 = contents.first(number::BLOCK2).and_then(parse);
        // Part of an answer must not pass for the whole.
        if block2.is_none() && contents.first(number::BLOCK2).is_some() {
            return Heard::Failed(id, CallError::Broken);
        }
        let reply = |payload, observed, partial| {
            Heard::Reply(Reply {
                call: id,
                code: contents.code,
                content_format: contents.content_format(),
                max_age: contents.max_age(),
                etag,
                location: contents.all(number::LOCATION_PATH).collect(),
                payload,
                observed,
                partial,
            })
        };
        if pending.call.observe
            && contents.code.is_success()
            && let Some(sequence) = contents.observe()
        {
            if let Some(now) = now {
                if pending.observed.is_some_and(|(last, at)| !is_fresh(last, at, sequence, now)) && !pending.renewing {
                    return Heard::Stale;
                }
                pending.observed = Some((sequence, now));
                pending.renewing = false;
                let silence = Duration::from_secs(contents.max_age().unwrap_or(60).into());
                self.set_deadline(id, Some(now + silence.clamp(SILENCE_MIN, SILENCE_MAX) + SILENCE_GRACE));
            }
            let partial = block2.is_some_and(|block| block.more);
            return reply(Cow::Borrowed(contents.payload), true, partial);
        }
        let Some(block) = block2.filter(|block| contents.code.is_success() && (block.more || block.number > 0)) else {
            self.complete(id);
            return reply(Cow::Borrowed(contents.payload), false, false);
        };
        // A duplicate of a block that is here already.
        if block.offset() < pending.body.len() {
            return Heard::Stale;
        }
        let more = contents.payload.len();
        if pending.body.len() + more > self.body_bytes_max || self.bytes + more > self.bytes_max {
            return Heard::Failed(id, CallError::TooLarge);
        }
        let fits = block.offset() == pending.body.len()
            && (block.number == 0 || pending.etag == etag)
            && (!block.more || bert::fits(block, contents.payload.len()));
        if !fits {
            return Heard::Failed(id, CallError::Broken);
        }
        pending.body.extend_from_slice(contents.payload);
        self.bytes += more;
        pending.etag = etag.to_vec();
        if block.more {
            let number = (pending.body.len() / block.bytes()) as u32;
            pending.down = Some(Block { number, more: false, exponent: block.exponent });
            return Heard::GoOn(id);
        }
        let body = self.complete(id).map(|pending| pending.body).unwrap_or_default();
        reply(Cow::Owned(body), false, false)
    }
}

impl Endpoint {
    /// Sends a request to `peer`, when no other call to it is unacknowledged.
    ///
    /// # Errors
    /// [`CallsFull`]; nothing was sent.
    pub fn call(&mut self, now: Instant, peer: SocketAddr, call: Call) -> Result<CallId, CallsFull> {
        let deadline = now + call.timeout;
        let id = self.calls.begin(peer, call, Some(deadline))?;
        self.send_call(now, id);
        Ok(id)
    }

    /// Ends a call without waiting for its outcome. Who is observed is told by a reset of its next notification (RFC 7641 section 3.6).
    pub fn hang_up(&mut self, now: Instant, id: CallId) {
        if let Some(pending) = self.calls.remove(id) {
            self.free_line(now, id, &pending);
        }
    }

    /// Sends a call's next message, or lets it wait for its peer's turn.
    fn send_call(&mut self, now: Instant, id: CallId) {
        let Some((peer, code, token)) = self.calls.token(id) else { return };
        let key = PeerKey::new(peer);
        let Some(line) = self.calls.lines.get_mut(&key) else { return };
        if line.carrying.is_some_and(|other| other != id) {
            line.waiting.push_back(id);
            return;
        }
        line.carrying = Some(id);
        let message_id = self.message_ids.next(&self.secret, key);
        let builder = Builder::datagram(self.batch.open(), Kind::Confirmable, code, message_id, &token);
        self.calls.write(id, false, builder);
        let random = self.secret.random();
        let bytes = self.batch.close(peer);
        // Without room it is not sent again; its deadline ends it.
        let sent = self.outgoing.insert(now, peer, key.message(message_id), Purpose::Call(id), bytes, random);
        if let Some(pending) = self.calls.rows.get_mut(id.0) {
            pending.sent = sent;
        }
    }

    /// The message that carries a call is acknowledged or at its end: the next call's turn.
    pub(crate) fn call_carried(&mut self, now: Instant, id: CallId) {
        let Some(pending) = self.calls.rows.get_mut(id.0) else { return };
        if let Some(slot) = pending.sent.take() {
            self.outgoing.remove(slot);
        }
        let key = PeerKey::new(pending.peer);
        self.next_call(now, key, id);
    }

    fn free_line(&mut self, now: Instant, id: CallId, pending: &Pending) {
        if let Some(slot) = pending.sent {
            self.outgoing.remove(slot);
        }
        self.next_call(now, PeerKey::new(pending.peer), id);
    }

    fn next_call(&mut self, now: Instant, key: PeerKey, done: CallId) {
        let Some(line) = self.calls.lines.get_mut(&key) else { return };
        if line.carrying != Some(done) {
            return;
        }
        line.carrying = None;
        if let Some(next) = line.waiting.pop_front() {
            self.send_call(now, next);
        }
    }

    pub(crate) fn fail_call(&mut self, now: Instant, id: CallId, error: CallError) {
        if let Some(pending) = self.calls.remove(id) {
            self.free_line(now, id, &pending);
            self.events.push_back(Event::CallFailed { call: id, error });
        }
    }

    pub(crate) fn expire_calls(&mut self, now: Instant) {
        while let Some(&(_, id)) = self.calls.deadlines.first().filter(|(at, _)| *at <= now) {
            let Some(pending) = self.calls.rows.get_mut(id.0) else {
                // Every deadline has its row; one without would be looked at for ever.
                self.calls.deadlines.pop_first();
                continue;
            };
            // An observed resource that has been silent for its Max-Age is asked again, once.
            if pending.observed.is_some() && !pending.renewing {
                pending.renewing = true;
                let timeout = pending.call.timeout;
                self.calls.set_deadline(id, Some(now + timeout));
                self.send_call(now, id);
            } else {
                self.fail_call(now, id, CallError::TimedOut);
            }
        }
    }

    /// A response: what of it is for the application, and whether it belonged to a call, so that one that did not can be reset.
    pub(crate) fn handle_response<'d>(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        contents: Contents<'d>,
    ) -> (bool, Option<Reply<'d>>) {
        let key = PeerKey::new(peer);
        let token = CallToken::try_from(contents.token).ok();
        if let Some(id) = token.and_then(|token| self.calls.by_token.get(&(key, token)).copied()) {
            // It has the token that was sent there. A response acknowledges its request too (RFC 7252 section 5.2.2).
            let now_s = self.seconds(now);
            self.validated.insert(now_s, key);
            self.call_carried(now, id);
        }
        match self.calls.hear(peer, contents, Some(now)) {
            Heard::Stray => (false, None),
            Heard::Stale => (true, None),
            Heard::Reply(reply) => (true, Some(reply)),
            Heard::GoOn(id) => {
                self.send_call(now, id);
                (true, None)
            }
            Heard::Failed(id, error) => {
                self.fail_call(now, id, error);
                (true, None)
            }
        }
    }
}

enum Up {
    Next(Block),
    Stale,
    /// The last block was heard, or the peer wants no more.
    Over,
}

/// What follows from the answer to one block of ours (RFC 7959 section 2.3 and 2.5).
fn next_up(sent: Block, payload_bytes: usize, contents: &Contents<'_>) -> Up {
    if contents.code != Code::CONTINUE || !sent.more {
        return Up::Over;
    }
    let Some(heard) = contents.first(number::BLOCK1).and_then(Block::parse) else { return Up::Over };
    if heard.number != sent.number {
        return Up::Stale;
    }
    // Section 2.3: the peer may ask for smaller blocks from here on.
    let exponent = heard.exponent.min(sent.exponent);
    let offset = sent.offset() + sent.bytes();
    let size = 16usize << exponent;
    match u32::try_from(offset / size) {
        Ok(number) if number < 1 << 20 => Up::Next(Block { number, more: offset + size < payload_bytes, exponent }),
        _ => Up::Over,
    }
}

/// RFC 7641 section 3.4: newer by number, or so much later that the numbers have come round.
fn is_fresh(last: u32, at: Instant, sequence: u32, now: Instant) -> bool {
    let ahead = sequence.wrapping_sub(last) & 0xff_ffff;
    (1..1 << 23).contains(&ahead) || now.saturating_duration_since(at) > Duration::from_secs(128)
}

/// A Max-Age is taken for at least and at most this much of silence, and a little later (RFC 7641 section 3.3.1 wants 5 to 15 s).
const SILENCE_MIN: Duration = Duration::from_secs(30);
const SILENCE_MAX: Duration = Duration::from_secs(24 * 3600);
const SILENCE_GRACE: Duration = Duration::from_secs(10);

/// Answered calls remembered.
const ANSWERED_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_ordered_as_rfc_7641_says() {
        let at = Instant::now();
        assert!(is_fresh(1, at, 2, at) && !is_fresh(2, at, 1, at) && !is_fresh(2, at, 2, at));
        assert!(is_fresh(0xff_ffff, at, 0, at), "round the end");
        assert!(is_fresh(0, at, (1 << 23) - 1, at) && !is_fresh(0, at, 1 << 23, at));
        assert!(is_fresh(2, at, 1, at + Duration::from_secs(129)), "after two minutes any number is new");
    }
}
