//! Requests of our own: to devices that have registered what they serve (RFC 9176), and observing it (RFC 7641, client side).
//!
//! A call is a confirmable request. Its outcome is one [`Reply`], put together from blocks where the answer is longer (RFC 7959 section 2.4), or an
//! [`crate::Event::CallFailed`]. A call that observes goes on: each fresh notification is a further reply until [`Endpoint::hang_up`].
//!
//! Deliberately not here: bodies of ours that are longer than a block, and choosing whom to call.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::answer::Token;
use crate::block::Block;
use crate::build::Builder;
use crate::code::Code;
use crate::endpoint::{Endpoint, Event};
use crate::message::{Contents, Kind};
use crate::option::number;
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
    pub content_format: Option<u16>,
    pub accept: Option<u16>,
    /// At most one block.
    pub payload: Vec<u8>,
    /// Wants notifications too.
    pub observe: bool,
}

impl Call {
    pub fn get(path: Vec<String>) -> Self {
        Call {
            code: Code::GET,
            path,
            query: Vec::new(),
            content_format: None,
            accept: None,
            payload: Vec::new(),
            observe: false,
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
    /// The answer is larger than `body_bytes_max`, or its blocks do not fit together.
    Broken,
}

/// The call was not begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotCalled {
    /// `calls_max` or `outgoing_max` is reached.
    Full,
    /// The payload is larger than a block.
    TooLarge,
}

#[derive(Debug)]
struct Pending {
    peer: SocketAddr,
    call: Call,
    token: Token,
    /// What is here of an answer in blocks, and its entity tag.
    body: Vec<u8>,
    etag: Vec<u8>,
    /// The last notification's number and time (RFC 7641 section 3.4).
    observed: Option<(u32, Instant)>,
    deadline: Option<Instant>,
    /// The message that carries it, as long as that is unacknowledged.
    sent: Option<Slot>,
}

#[derive(Debug)]
pub(crate) struct Calls {
    rows: Slots<Pending>,
    by_token: HashMap<(PeerKey, Token), CallId, Secret>,
    deadlines: BTreeSet<(Instant, CallId)>,
}

impl Calls {
    pub fn new(secret: Secret, calls_max: usize) -> Self {
        Calls { rows: Slots::new(calls_max), by_token: HashMap::with_hasher(secret), deadlines: BTreeSet::new() }
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    fn remove(&mut self, id: CallId) -> Option<Pending> {
        let pending = self.rows.remove(id.0)?;
        self.by_token.remove(&(PeerKey::new(pending.peer), pending.token));
        if let Some(at) = pending.deadline {
            self.deadlines.remove(&(at, id));
        }
        Some(pending)
    }

    /// Moves the time by which an answer has to come; `None`: notifications come when they come.
    fn set_deadline(&mut self, id: CallId, at: Option<Instant>) {
        let Some(pending) = self.rows.get_mut(id.0) else { return };
        if let Some(old) = std::mem::replace(&mut pending.deadline, at) {
            self.deadlines.remove(&(old, id));
        }
        if let Some(at) = at {
            self.deadlines.insert((at, id));
        }
    }
}

impl Endpoint {
    /// Sends a request to `peer`.
    ///
    /// # Errors
    /// See [`NotCalled`]; nothing was sent.
    pub fn call(&mut self, now: Instant, peer: SocketAddr, call: Call) -> Result<CallId, NotCalled> {
        if call.payload.len() > self.config.block_bytes_max {
            return Err(NotCalled::TooLarge);
        }
        if self.outgoing.is_full() {
            return Err(NotCalled::Full);
        }
        // Eight unpredictable bytes: who is not on the path cannot answer for the device (section 5.3.1).
        let random = self.secret.random();
        let token = Token::new(&self.secret.hash(("call", random)).to_be_bytes());
        let pending = Pending {
            peer,
            call,
            token,
            body: Vec::new(),
            etag: Vec::new(),
            observed: None,
            deadline: None,
            sent: None,
        };
        let id = CallId(self.calls.rows.insert(pending).ok_or(NotCalled::Full)?);
        self.calls.by_token.insert((PeerKey::new(peer), token), id);
        self.send_call(now, id, None);
        Ok(id)
    }

    /// Ends a call without waiting for its outcome; the next notification is reset, which tells the peer.
    pub fn hang_up(&mut self, id: CallId) {
        self.drop_call(id);
    }

    fn drop_call(&mut self, id: CallId) -> Option<Pending> {
        let pending = self.calls.remove(id)?;
        if let Some(slot) = pending.sent {
            self.outgoing.remove(slot);
        }
        Some(pending)
    }

    /// Writes the request, or the one for its answer's next block.
    fn send_call(&mut self, now: Instant, id: CallId, block2: Option<Block>) {
        let Some(pending) = self.calls.rows.get(id.0) else { return };
        let (peer, token, call) = (pending.peer, pending.token, &pending.call);
        let peer_key = PeerKey::new(peer);
        let message_id = self.message_ids.next(&self.secret, peer_key);
        let mut builder =
            Builder::datagram(self.batch.open(), Kind::Confirmable, call.code, message_id, token.as_slice());
        // Section 2.4 of RFC 7959: the requests for later blocks do not observe.
        builder = builder.uint_if(number::OBSERVE, (call.observe && block2.is_none()).then_some(0));
        for segment in &call.path {
            builder = builder.option(number::URI_PATH, segment.as_bytes());
        }
        builder = builder.uint_if(number::CONTENT_FORMAT, call.content_format.map(u32::from));
        for argument in &call.query {
            builder = builder.option(number::URI_QUERY, argument.as_bytes());
        }
        builder
            .uint_if(number::ACCEPT, call.accept.map(u32::from))
            .uint_if(number::BLOCK2, block2.map(Block::bits))
            .payload(&call.payload);
        let random = self.secret.random();
        let bytes = self.batch.close(peer);
        let sent = self.outgoing.insert(now, peer, peer_key.exchange(message_id), Purpose::Call(id), bytes, random);
        if let Some(pending) = self.calls.rows.get_mut(id.0) {
            pending.sent = sent;
        }
        self.calls.set_deadline(id, Some(now + CALL_TIMEOUT));
    }

    pub(crate) fn fail_call(&mut self, id: CallId, error: CallError) {
        if self.drop_call(id).is_some() {
            self.events.push_back(Event::CallFailed { call: id, error });
        }
    }

    pub(crate) fn expire_calls(&mut self, now: Instant) {
        while let Some(&(_, id)) = self.calls.deadlines.first().filter(|(at, _)| *at <= now) {
            self.fail_call(id, CallError::TimedOut);
        }
    }

    /// A response: of which call, and what of it is for the application. The flag says whether it belonged to a call, so that a confirmable one that did
    /// not can be reset.
    pub(crate) fn handle_response<'d>(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        contents: Contents<'d>,
    ) -> (bool, Option<Reply<'d>>) {
        let key = (PeerKey::new(peer), Token::new(contents.token));
        let Some(&id) = self.calls.by_token.get(&key) else { return (false, None) };
        // It has the token that was sent there.
        let now_s = self.seconds(now);
        self.validated.insert(now_s, key.0);
        let Some(pending) = self.calls.rows.get_mut(id.0) else { return (false, None) };
        let etag = contents.first(number::ETAG).unwrap_or_default();
        let observe = contents.observe().filter(|_| pending.call.observe && contents.code.is_success());
        if let Some(sequence) = observe {
            if pending.observed.is_some_and(|(last, at)| !is_fresh(last, at, sequence, now)) {
                return (true, None);
            }
            pending.observed = Some((sequence, now));
        }
        let block2 = contents.first(number::BLOCK2).and_then(Block::parse);
        let reply = |payload, observed, partial| Reply {
            call: id,
            code: contents.code,
            content_format: contents.content_format(),
            max_age: contents.max_age(),
            etag,
            payload,
            observed,
            partial,
        };
        if observe.is_some() {
            self.calls.set_deadline(id, None);
            let partial = block2.is_some_and(|block| block.more);
            return (true, Some(reply(Cow::Borrowed(contents.payload), true, partial)));
        }
        let Some(block) = block2.filter(|block| contents.code.is_success() && (block.more || block.number > 0)) else {
            self.drop_call(id);
            return (true, Some(reply(Cow::Borrowed(contents.payload), false, false)));
        };
        let body_bytes_max = self.config.body_bytes_max;
        let fits = block.offset() == pending.body.len()
            && pending.body.len() + contents.payload.len() <= body_bytes_max
            && (block.number == 0 || pending.etag == etag)
            && (!block.more || contents.payload.len() == block.bytes());
        if !fits {
            self.fail_call(id, CallError::Broken);
            return (true, None);
        }
        pending.body.extend_from_slice(contents.payload);
        pending.etag = etag.to_vec();
        if block.more {
            let next = Block { number: block.number + 1, more: false, exponent: block.exponent };
            self.send_call(now, id, Some(next));
            return (true, None);
        }
        let body = self.drop_call(id).map(|pending| pending.body).unwrap_or_default();
        (true, Some(reply(Cow::Owned(body), false, false)))
    }
}

/// RFC 7641 section 3.4: newer by number, or so much later that the numbers have come round.
fn is_fresh(last: u32, at: Instant, sequence: u32, now: Instant) -> bool {
    let ahead = sequence.wrapping_sub(last) & 0xff_ffff;
    (1..1 << 23).contains(&ahead) || now.saturating_duration_since(at) > Duration::from_secs(128)
}

/// How long an acknowledged request may wait for its answer, from when it was sent: beyond MAX_TRANSMIT_WAIT, so that what is not acknowledged ends by that.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

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
