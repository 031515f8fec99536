//! How a request is answered: sliced, limited, in an acknowledgement or in a message of its own, and remembered.

use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::block::Block;
use crate::build::Builder;
use crate::code::Code;
use crate::endpoint::Endpoint;
use crate::exchange::State;
use crate::message::Kind;
use crate::outgoing::Purpose;
use crate::peer::{self, PeerKey};
use crate::response::{self, Added, Response};
use crate::slots::Slot;

/// A token, kept: in place up to 22 bytes, which costs no more room than the pointer to a longer one.
#[derive(Clone, Debug)]
pub(crate) enum Token {
    Short { length: u8, bytes: [u8; Token::SHORT_BYTES_MAX] },
    Long(Arc<[u8]>),
}

impl Token {
    const SHORT_BYTES_MAX: usize = 22;

    pub fn new(token: &[u8]) -> Self {
        let mut bytes = [0; Token::SHORT_BYTES_MAX];
        match bytes.get_mut(..token.len()) {
            Some(room) => {
                room.copy_from_slice(token);
                Token::Short { length: token.len() as u8, bytes }
            }
            None => Token::Long(token.into()),
        }
    }

    pub fn as_slice(&self) -> &[u8] {
        match self {
            Token::Short { length, bytes } => bytes.get(..usize::from(*length)).unwrap_or_default(),
            Token::Long(bytes) => bytes,
        }
    }
}

/// No token, of messages that answer nothing.
impl Default for Token {
    fn default() -> Self {
        Token::new(&[])
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Token {}

impl Hash for Token {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_slice().hash(state);
    }
}

/// What must be known of a request to answer it later.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub peer: SocketAddr,
    pub message_id: u16,
    pub exchange: u64,
    pub token: Token,
    pub code: Code,
    pub confirmable: bool,
    pub acknowledged: bool,
    pub register: bool,
    pub no_response: u8,
    pub block1: Option<Block>,
    pub block2: Option<Block>,
    /// Size of the question, for the limit on answers to strangers.
    pub asked_bytes: usize,
    pub body_key: u64,
    /// The application is not asked again for the later blocks of its answer.
    pub keep: bool,
}

impl Endpoint {
    /// Encodes and sends an answer and notes it for replay. False when something else went out in its place.
    pub(crate) fn finish(
        &mut self,
        now: Instant,
        asked: &Asked,
        response: &Response<'_>,
        observe: Option<u32>,
    ) -> bool {
        // RFC 7967: bit n-1 silences class n. A confirmable request is still acknowledged.
        let class = response.code.class();
        if class > 0 && asked.no_response >> (class - 1) & 1 == 1 {
            self.finish_silently(asked);
            return true;
        }
        let exponent = self.exponent_of(asked);
        let Ok((piece, block2)) = slice(asked.block2, exponent, 16 << exponent, response) else {
            // The asked block lies behind the end.
            self.finish(now, &without_blocks(asked), &Response::new(Code::BAD_REQUEST), None);
            return false;
        };
        // What is kept is kept without its tag: all its blocks have the one that is made of it.
        let wants_etag = asked.keep || (asked.code == Code::GET && response.etag.is_empty());
        let etag = block2.filter(|_| wants_etag).map(|_| self.etag(response.payload));
        let response = Response { etag: etag.as_ref().map_or(response.etag, |e| e), ..*response };
        let ours = Block::exponent_for(self.config.block_bytes_max);
        let block1 = asked.block1.map(|block| {
            let more = block.more && response.code == Code::CONTINUE;
            Block { more, exponent: block.exponent.min(ours), ..block }.bits()
        });
        let added = Added {
            observe,
            block1,
            block2: block2.map(Block::bits),
            size2: block2.filter(|b| b.number == 0).and(u32::try_from(response.payload.len()).ok()),
        };
        let (kind, message_id) = self.answer_header(asked);
        let builder = Builder::datagram(self.batch.open(), kind, response.code, message_id, asked.token.as_slice());
        response::write(&response, added, piece, builder);
        let bytes = self.batch.open_bytes();
        let peer = PeerKey::new(asked.peer);
        if bytes > ANSWER_BYTES_ALWAYS
            && bytes > 3 * asked.asked_bytes
            && !self.validated.contains(self.seconds(now), peer)
        {
            self.batch.abandon();
            self.finish_stranger(now, asked, &response, kind, message_id);
            return false;
        }
        if asked.keep && block2.is_some_and(|b| b.more && b.number == 0) {
            let answer = (response.code.0, response.content_format);
            if self.bodies.keep(now, peer, asked.body_key, answer, response.payload).is_err() {
                self.batch.abandon();
                self.finish(now, &without_blocks(asked), &Response::new(Code::INTERNAL_SERVER_ERROR), None);
                return false;
            }
        }
        self.close_answer(now, asked, kind, message_id);
        true
    }

    /// An answer that is too long for a stranger: a request without an effect is to be repeated with an Echo, which costs nothing; another has had its
    /// effect and is answered without a payload.
    pub(crate) fn finish_stranger(
        &mut self,
        now: Instant,
        asked: &Asked,
        response: &Response<'_>,
        kind: Kind,
        message_id: u16,
    ) {
        self.counters.echoes += 1;
        let echo = peer::echo(&self.secret, self.seconds(now), PeerKey::new(asked.peer));
        // The later blocks of an answer have none.
        let is_later_block = asked.block2.is_some_and(|block| block.number > 0);
        let code = if asked.code.is_safe() || is_later_block { Code::UNAUTHORIZED } else { response.code };
        let short = Response { code, echo: &echo, etag: &[], content_format: None, payload: &[], ..*response };
        let builder = Builder::datagram(self.batch.open(), kind, code, message_id, asked.token.as_slice());
        response::write(&short, Added::default(), &[], builder);
        self.close_answer(now, asked, kind, message_id);
    }

    /// Type and message id of an answer: in the acknowledgement while there is none, else a message of our own.
    fn answer_header(&mut self, asked: &Asked) -> (Kind, u16) {
        if asked.confirmable && !asked.acknowledged {
            return (Kind::Acknowledgement, asked.message_id);
        }
        let message_id = self.message_ids.next(&self.secret, PeerKey::new(asked.peer));
        let reliable = asked.confirmable && !self.outgoing.is_full();
        self.counters.outgoing_full += u64::from(asked.confirmable && !reliable);
        (if reliable { Kind::Confirmable } else { Kind::NonConfirmable }, message_id)
    }

    fn close_answer(&mut self, now: Instant, asked: &Asked, kind: Kind, message_id: u16) {
        let random = self.secret.random();
        let bytes = self.batch.close(asked.peer);
        match kind {
            Kind::Acknowledgement => self.exchanges.answer(asked.exchange, bytes),
            Kind::Confirmable => {
                let key = PeerKey::new(asked.peer).message(message_id);
                self.outgoing.insert(now, asked.peer, key, Purpose::Answer, bytes, random);
            }
            // A duplicate NON is ignored (section 4.5); one of a separately answered CON still gets its empty acknowledgement.
            Kind::NonConfirmable | Kind::Reset => {
                if !asked.confirmable {
                    self.exchanges.set_state(asked.exchange, State::Silent);
                }
            }
        }
    }

    pub(crate) fn finish_silently(&mut self, asked: &Asked) {
        if !asked.confirmable {
            self.exchanges.set_state(asked.exchange, State::Silent);
        } else if !asked.acknowledged {
            self.exchanges.set_state(asked.exchange, State::Acknowledged);
            self.send_empty(asked.peer, Kind::Acknowledgement, asked.message_id);
        }
    }

    /// Acknowledges a request whose answer takes longer.
    pub(crate) fn acknowledge(&mut self, slot: Slot) {
        let Some(asked) = self.requests.get_mut(slot) else { return };
        asked.acknowledged = true;
        let (peer, message_id, exchange) = (asked.peer, asked.message_id, asked.exchange);
        self.counters.separate += 1;
        self.exchanges.set_state(exchange, State::Acknowledged);
        self.send_empty(peer, Kind::Acknowledgement, message_id);
    }

    /// Block size of an answer: what the asker wants, at most what we want.
    pub(crate) fn exponent_of(&self, asked: &Asked) -> u8 {
        let ours = Block::exponent_for(self.config.block_bytes_max);
        asked.block2.map_or(ours, |block| block.exponent.min(ours))
    }

    /// An entity tag for an answer in blocks, so that the asker notices when blocks of two versions mix (RFC 7959 section 2.4).
    pub(crate) fn etag(&self, payload: &[u8]) -> [u8; 8] {
        self.secret.hash(payload).to_be_bytes()
    }
}

/// The part of an answer's payload that goes out now, at most `size` bytes in blocks of `exponent`, and its Block2 when that is not all. An error when
/// the asked block lies behind the end (RFC 7959 section 2.4).
pub(crate) fn slice<'r>(
    asked: Option<Block>,
    exponent: u8,
    size: usize,
    response: &Response<'r>,
) -> Result<(&'r [u8], Option<Block>), ()> {
    let payload = response.payload;
    // A diagnostic longer than a block is cut: nobody fetches the rest of an error.
    if !response.code.is_success() {
        return Ok((payload.get(..size).unwrap_or(payload), None));
    }
    let asked = asked.filter(|block| block.number > 0 || !payload.is_empty());
    if asked.is_none() && payload.len() <= size {
        return Ok((payload, None));
    }
    let offset = asked.map_or(0, Block::offset);
    if offset > 0 && offset >= payload.len() {
        return Err(());
    }
    let end = payload.len().min(offset + size);
    let mut block = Block { number: 0, more: end < payload.len(), exponent };
    block.number = (offset / block.bytes()) as u32;
    Ok((payload.get(offset..end).unwrap_or_default(), Some(block)))
}

fn without_blocks(asked: &Asked) -> Asked {
    Asked { block1: None, block2: None, ..asked.clone() }
}

/// Bytes of an answer that anybody gets (RFC 9175 section 2.4, item 3).
pub(crate) const ANSWER_BYTES_ALWAYS: usize = 136;
