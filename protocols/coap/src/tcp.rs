//! One connection of CoAP over a reliable transport (RFC 8323): framing, capabilities, ping, release, abort, requests and observers.
//!
//! There are no message ids, acknowledgements or retransmissions here; TCP does that. The output buffer is bounded: requests are not read while it is
//! over `output_bytes_max` ([`Connection::wants_input`]), and an observer whose value finds no room is asked for the latest one once there is.
//! Bodies above Max-Message-Size go in blocks, and several blocks in one message (BERT).

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;

use crate::answer::{Token, slice};
use crate::bert::{self, Transfers};
use crate::block::{Block, Untaken};
use crate::build::{Builder, extend};
use crate::client::{Call, CallId, CallLimits, Calls, CallsFull, Heard, Reply};
use crate::code::Code;
use crate::endpoint::{Delivery, Event, Gone, GoneReason, Handle, Notification, NotifyError, ObserverId};
use crate::message::{Contents, TOKEN_BYTES_MAX};
use crate::option;
use crate::peer::Secret;
use crate::request::{self, Observe, Request};
use crate::response::{self, Added, Response};
use crate::slots::Slots;

/// Limits of one connection.
#[derive(Clone, Debug)]
pub struct Config {
    /// Largest message that is read, and what our CSM says; beyond, Abort.
    pub message_bytes_max: usize,
    /// Unsent bytes beyond which nothing more is read and notifications wait.
    pub output_bytes_max: usize,
    /// Requests with the application; beyond, nothing more is read.
    pub requests_max: usize,
    /// Observers; beyond, a registration is answered as a plain GET.
    pub observers_max: usize,
    /// Calls of ours that are open or observe; beyond, none is begun.
    pub calls_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            message_bytes_max: 256 << 10,
            output_bytes_max: 64 << 10,
            requests_max: 64,
            observers_max: 64,
            calls_max: 64,
        }
    }
}

/// Why the connection ends. An Abort with the reason is in the output; send it and close.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Aborted {
    pub what: &'static str,
}

impl fmt::Display for Aborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

impl std::error::Error for Aborted {}

/// What one message led to.
#[derive(Debug)]
pub enum Received<'d> {
    /// The engine has dealt with it.
    Nothing,
    /// Answer now or later.
    Request(Request<'d>),
    /// An answer to a call of ours ([`Connection::call`]).
    Reply(Reply<'d>),
    /// The peer is done (Release) or gives up (Abort): answer what is open, then close.
    Closing,
}

#[derive(Clone, Debug)]
struct Asked {
    token: Token,
    register: bool,
    no_response: u8,
    block1: Option<Block>,
    block2: Option<Block>,
    body_key: u64,
    /// The application is not asked again for the later blocks of its answer.
    keep: bool,
}

#[derive(Clone, Debug)]
struct Observer {
    token: Token,
    sequence: u32,
    /// A value found no room.
    stale: bool,
}

impl Asked {
    fn new(token: Token, code: Code) -> Self {
        let keep = code != Code::GET;
        Asked { token, register: false, no_response: 0, block1: None, block2: None, body_key: 0, keep }
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Connection {
    config: Config,
    peer: SocketAddr,
    out: Vec<u8>,
    /// Bytes of `out` that the driver has sent.
    sent: usize,
    scratch: Vec<u8>,
    requests: Slots<Asked>,
    observers: Slots<Observer>,
    calls: Calls,
    transfers: Transfers,
    events: VecDeque<Event>,
    greeted: bool,
    /// The peer's Max-Message-Size.
    peer_message_bytes_max: usize,
    /// The peer's CSM has Block-Wise-Transfer.
    peer_blocks: bool,
}

impl Connection {
    /// Begins with our CSM in the output (RFC 8323 section 5.3: each side's first message).
    pub fn new(config: Config, peer: SocketAddr) -> Self {
        let mut connection = Connection {
            peer,
            out: Vec::new(),
            sent: 0,
            scratch: Vec::new(),
            requests: Slots::new(config.requests_max),
            observers: Slots::new(config.observers_max),
            // TCP has shown who is at the other end: tokens need only differ.
            calls: Calls::new(Secret::new([0; 32]), call_limits(&config)),
            events: VecDeque::new(),
            greeted: false,
            peer_message_bytes_max: MESSAGE_BYTES_BASE,
            peer_blocks: false,
            transfers: Transfers::new(config.message_bytes_max),
            config,
        };
        let size = u32::try_from(connection.config.message_bytes_max).unwrap_or(u32::MAX);
        let token_bytes_max = TOKEN_BYTES_MAX as u32;
        // Block-Wise-Transfer is empty, as zero is.
        let abilities =
            [(CSM_MAX_MESSAGE_SIZE, size), (CSM_BLOCK_WISE_TRANSFER, 0), (CSM_EXTENDED_TOKEN_LENGTH, token_bytes_max)];
        connection.signal(Code::CSM, &[], &abilities, &[]);
        connection
    }

    /// Takes one message from the front of `input`: how many bytes it had and what came of it, or `None` when it is not all there yet.
    ///
    /// # Errors
    /// What RFC 8323 calls a reason to abort; nothing more may be given in.
    pub fn handle_input<'d>(&mut self, input: &'d [u8]) -> Result<Option<(usize, Received<'d>)>, Aborted> {
        let Some(frame) = Frame::parse(input) else { return Ok(None) };
        if frame.token_length == TOKEN_LENGTH_RESERVED {
            return Err(self.abort("reserved token length", None));
        }
        if frame.bytes > self.config.message_bytes_max as u64 {
            return Err(self.abort("message larger than Max-Message-Size", None));
        }
        let Some((message, _)) = input.split_at_checked(frame.bytes as usize) else { return Ok(None) };
        let rest = message.get(frame.header_bytes..).unwrap_or_default();
        let contents = match Contents::parse(frame.code, frame.token_length, rest) {
            Ok(contents) => contents,
            Err(what) => return Err(self.abort(what, None)),
        };
        if !self.greeted && frame.code != Code::CSM {
            return Err(self.abort("first message is not a CSM", None));
        }
        let received = match frame.code.class() {
            7 => self.handle_signal(contents)?,
            0 if frame.code.is_request() => self.handle_request(contents),
            2..=5 => self.handle_response(contents),
            // Section 3.4: an empty message is ignored.
            _ => Received::Nothing,
        };
        Ok(Some((message.len(), received)))
    }

    /// False while answers pile up or the application has enough to do: then leave the bytes in the socket.
    pub fn wants_input(&self) -> bool {
        self.unsent() < self.config.output_bytes_max && !self.requests.is_full()
    }

    /// Bytes to send.
    pub fn output(&self) -> &[u8] {
        self.out.get(self.sent..).unwrap_or_default()
    }

    /// Notes that the first `bytes` of [`Connection::output`] went out; observers who missed a value are refreshed once there is room.
    pub fn handle_sent(&mut self, bytes: usize) {
        self.sent = self.out.len().min(self.sent.saturating_add(bytes));
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        } else if self.sent > self.out.len() / 2 {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
        if self.unsent() < self.config.output_bytes_max / 2 {
            let stale: Vec<_> = self.observers.iter().filter(|(_, o)| o.stale).map(|(slot, _)| slot).collect();
            for slot in stale {
                if let Some(observer) = self.observers.get_mut(slot) {
                    observer.stale = false;
                    self.events.push_back(Event::Refresh { observer: ObserverId(slot) });
                }
            }
        }
    }

    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Requests that the application has not answered yet.
    pub fn open_requests(&self) -> usize {
        self.requests.len()
    }

    /// Answers a request.
    ///
    /// # Errors
    /// `Gone` when the request was answered before.
    pub fn respond(&mut self, handle: Handle, response: &Response<'_>) -> Result<(), Gone> {
        let asked = self.requests.remove(handle.0).ok_or(Gone)?;
        self.finish(&asked, response, None);
        Ok(())
    }

    /// Answers a request with [`Observe::Register`] and registers the observer, when the answer is a success and there is room.
    ///
    /// # Errors
    /// `Gone` when the request was answered before.
    pub fn observe(&mut self, handle: Handle, response: &Response<'_>) -> Result<Option<ObserverId>, Gone> {
        let asked = self.requests.remove(handle.0).ok_or(Gone)?;
        if !asked.register || !response.code.is_success() {
            self.finish(&asked, response, None);
            return Ok(None);
        }
        self.drop_observer(&asked.token, GoneReason::Replaced);
        let observer =
            self.observers.insert(Observer { token: asked.token.clone(), sequence: 1, stale: false }).map(ObserverId);
        self.finish(&asked, response, observer.map(|_| 1));
        Ok(observer)
    }

    /// Sends a value to one observer. With TCP below, a value that is in the output counts as delivered.
    ///
    /// # Errors
    /// `Gone`, or `Full` for a value that must arrive while the output is full.
    pub fn notify(&mut self, id: ObserverId, notification: &Notification) -> Result<(), NotifyError> {
        let is_full = self.unsent() >= self.config.output_bytes_max;
        let observer = self.observers.get_mut(id.0).ok_or(NotifyError::Gone)?;
        let ends = !notification.code.is_success();
        if is_full && !ends {
            return match notification.delivery {
                Delivery::Each { .. } => Err(NotifyError::Full),
                Delivery::Latest => {
                    observer.stale = true;
                    Ok(())
                }
            };
        }
        observer.sequence = (observer.sequence + 1) & 0xff_ffff;
        let (token, sequence) = (observer.token.clone(), observer.sequence);
        let location: Vec<&str> = notification.location.iter().flat_map(|path| path.split('/')).collect();
        let response = Response {
            max_age: notification.max_age,
            location_path: &location,
            ..Response::new(notification.code).content(notification.content_format, &notification.payload)
        };
        let asked = Asked { register: true, ..Asked::new(token, Code::GET) };
        self.finish(&asked, &response, (!ends).then_some(sequence));
        if let Delivery::Each { ticket } = notification.delivery {
            self.events.push_back(Event::Delivered { observer: id, ticket });
        }
        if ends {
            self.observers.remove(id.0);
            self.events.push_back(Event::ObserverGone { observer: id, reason: GoneReason::Ended });
        }
        Ok(())
    }

    /// Removes an observer without a word.
    pub fn forget(&mut self, id: ObserverId) {
        self.observers.remove(id.0);
    }

    /// Sends a request to the peer. Nobody here keeps the time: [`Connection::hang_up`] when it takes too long.
    ///
    /// # Errors
    /// [`CallsFull`]; nothing was sent.
    pub fn call(&mut self, call: Call) -> Result<CallId, CallsFull> {
        let id = self.calls.begin(self.peer, call, None)?;
        self.send_call(id, false);
        Ok(id)
    }

    /// Ends a call without waiting for its outcome; who is observed is told (RFC 7641 section 3.6, RFC 8323 section 7.4).
    pub fn hang_up(&mut self, id: CallId) {
        if self.calls.observes(id) {
            self.send_call(id, true);
        }
        self.calls.end(id);
    }

    fn send_call(&mut self, id: CallId, goodbye: bool) {
        let Some((_, code, token)) = self.calls.token(id) else { return };
        self.scratch.clear();
        self.calls.write(id, goodbye, Builder::body(&mut self.scratch));
        write_frame(&mut self.out, code, &token, &self.scratch);
    }

    fn handle_response<'d>(&mut self, contents: Contents<'d>) -> Received<'d> {
        match self.calls.hear(self.peer, contents, None) {
            Heard::Stray | Heard::Stale => Received::Nothing,
            Heard::Reply(reply) => Received::Reply(reply),
            Heard::GoOn(id) => {
                self.send_call(id, false);
                Received::Nothing
            }
            Heard::Failed(id, error) => {
                if self.calls.end(id) {
                    self.events.push_back(Event::CallFailed { call: id, error });
                }
                Received::Nothing
            }
        }
    }

    /// Asks whether the peer is there; it answers with a Pong, which counts as input.
    pub fn ping(&mut self) {
        self.signal(Code::PING, &[], &[], &[]);
    }

    /// Says that no further requests will be served (section 5.5), for a drain.
    pub fn release(&mut self) {
        self.signal(Code::RELEASE, &[], &[], &[]);
    }

    fn handle_request<'d>(&mut self, contents: Contents<'d>) -> Received<'d> {
        // Longer than our CSM says: RFC 8974 section 2.2.2.
        if contents.token.len() > TOKEN_BYTES_MAX {
            write_frame(&mut self.out, Code::BAD_REQUEST, contents.token, &[]);
            return Received::Nothing;
        }
        let mut asked = Asked::new(Token::new(contents.token), contents.code);
        let inspected = match request::inspect_reliable(contents) {
            Ok(inspected) => inspected,
            Err(refused) => {
                self.finish(&asked, &Response::new(refused.code()), None);
                return Received::Nothing;
            }
        };
        asked.no_response = inspected.no_response;
        asked.block1 = inspected.block1;
        asked.block2 = inspected.block2;
        asked.register = inspected.observe == Some(Observe::Register);
        let is_later = asked.block2.is_some_and(|block| block.number > 0);
        if asked.keep || asked.block1.is_some() || is_later {
            asked.body_key = self.transfers.key(&contents);
        }
        let mut payload = Cow::Borrowed(contents.payload);
        if let Some(block) = asked.block1 {
            match self.take_block(&asked, block, contents.payload) {
                Some(body) => payload = Cow::Owned(body),
                None => return Received::Nothing,
            }
        } else if is_later && self.respond_kept(&asked) {
            return Received::Nothing;
        }
        if inspected.observe == Some(Observe::Deregister) {
            self.drop_observer(&asked.token, GoneReason::Deregistered);
        }
        if self.requests.is_full() {
            self.finish(&asked, &Response::new(Code::SERVICE_UNAVAILABLE).max_age(2), None);
            return Received::Nothing;
        }
        let Some(slot) = self.requests.insert(asked) else { return Received::Nothing };
        Received::Request(Request {
            handle: Handle(slot),
            peer: self.peer,
            confirmable: true,
            contents,
            path: inspected.path,
            payload,
            observe: inspected.observe,
        })
    }

    /// Keeps the answer to this request, when it goes out in blocks, for the requests of the others.
    pub fn keep_answer(&mut self, request: &Request<'_>) {
        let body_key = self.transfers.key(&request.contents);
        if let Some(asked) = self.requests.get_mut(request.handle.0) {
            (asked.body_key, asked.keep) = (body_key, true);
        }
    }

    /// A block of a request's body; the whole of it when this was the last.
    fn take_block(&mut self, asked: &Asked, block: Block, piece: &[u8]) -> Option<Vec<u8>> {
        let taken = match bert::fits(block, piece.len()) {
            true => self.transfers.take(asked.body_key, block, piece),
            false => {
                self.finish(asked, &Response::new(Code::BAD_REQUEST), None);
                return None;
            }
        };
        let response = match taken {
            Ok(Some(body)) => return Some(body),
            Ok(None) => Response::new(Code::CONTINUE),
            Err(Untaken::TooLarge(limit)) => {
                Response::new(Code::REQUEST_ENTITY_TOO_LARGE).size1(u32::try_from(limit).unwrap_or(u32::MAX))
            }
            Err(Untaken::Incomplete | Untaken::Full) => Response::new(Code::REQUEST_ENTITY_INCOMPLETE),
        };
        self.finish(asked, &response, None);
        None
    }

    /// A later block of an answer that was kept; false when the application is to be asked.
    fn respond_kept(&mut self, asked: &Asked) -> bool {
        match self.transfers.take_kept(asked.body_key) {
            Some((code, content_format, bytes)) => {
                let asked = Asked { keep: true, ..asked.clone() };
                self.finish(&asked, &Response::new(code).content(content_format, &bytes), None);
            }
            // Asking again would repeat its effect.
            None if asked.keep => self.finish(asked, &Response::new(Code::REQUEST_ENTITY_INCOMPLETE), None),
            None => return false,
        }
        true
    }

    /// Signalling messages (section 5). An unknown critical option aborts, an elective one is ignored; so are unknown signals with only elective ones.
    fn handle_signal<'d>(&mut self, contents: Contents<'d>) -> Result<Received<'d>, Aborted> {
        for (number, value) in contents.options() {
            match (contents.code, number) {
                (Code::CSM, CSM_MAX_MESSAGE_SIZE) => {
                    let size = option::uint32(value).unwrap_or(u32::MAX) as usize;
                    self.peer_message_bytes_max = size.max(MESSAGE_BYTES_LEAST);
                    self.calls.set_block_bytes_max(self.peer_message_bytes_max.saturating_sub(OVERHEAD_BYTES));
                }
                (Code::CSM, CSM_BLOCK_WISE_TRANSFER) => self.peer_blocks = true,
                (_, number) if option::is_critical(number) => {
                    let bad = (contents.code == Code::CSM).then_some(number);
                    return Err(self.abort("unknown critical option in a signal", bad));
                }
                _ => {}
            }
        }
        Ok(match contents.code {
            Code::CSM => {
                self.greeted = true;
                Received::Nothing
            }
            Code::PING => {
                self.signal(Code::PONG, contents.token, &[], &[]);
                Received::Nothing
            }
            Code::RELEASE | Code::ABORT => Received::Closing,
            _ => Received::Nothing,
        })
    }

    fn finish(&mut self, asked: &Asked, response: &Response<'_>, observe: Option<u32>) {
        let class = response.code.class();
        if class > 0 && asked.no_response >> (class - 1) & 1 == 1 {
            return;
        }
        // Whole where the peer takes it whole; otherwise in blocks of the largest size that fits, at its request.
        let overhead_bytes = OVERHEAD_BYTES + asked.token.as_slice().len();
        let whole = response.payload.len() + overhead_bytes <= self.peer_message_bytes_max;
        let room_bytes = self.peer_message_bytes_max.saturating_sub(overhead_bytes);
        let peer_berts = self.peer_blocks && self.peer_message_bytes_max > MESSAGE_BYTES_BASE;
        let sliced = match asked.block2 {
            None if whole => Ok((response.payload, None)),
            block2 if peer_berts && block2.is_none_or(|block| block.exponent == Block::BERT) => {
                slice(block2, Block::BERT, bert::size_within(room_bytes), response)
            }
            block2 => {
                let fits = Block::exponent_for(room_bytes);
                let exponent = block2.map_or(fits, |block| block.exponent.min(fits));
                slice(block2, exponent, 16 << exponent, response)
            }
        };
        let (response, piece, block2) = match sliced {
            Ok((piece, block2)) => (*response, piece, block2),
            Err(()) => (Response::new(Code::BAD_REQUEST), &[][..], None),
        };
        if asked.keep && block2.is_some_and(|block| block.more) {
            self.transfers.keep(asked.body_key, &response);
        }
        let wants_etag = block2.is_some() && (asked.keep || response.etag.is_empty());
        let etag = wants_etag.then(|| self.transfers.etag(response.payload));
        let response = Response { etag: etag.as_ref().map_or(response.etag, |e| e), ..response };
        let added = Added {
            observe,
            block1: asked
                .block1
                .map(|block| Block { more: block.more && response.code == Code::CONTINUE, ..block }.bits()),
            block2: block2.map(Block::bits),
            size2: block2.and(u32::try_from(response.payload.len()).ok()),
        };
        self.scratch.clear();
        response::write(&response, added, piece, Builder::body(&mut self.scratch));
        write_frame(&mut self.out, response.code, asked.token.as_slice(), &self.scratch);
    }

    fn signal(&mut self, code: Code, token: &[u8], options: &[(u16, u32)], text: &[u8]) {
        self.scratch.clear();
        let mut builder = Builder::body(&mut self.scratch);
        for (number, value) in options {
            builder = builder.uint(*number, *value);
        }
        builder.payload(text);
        write_frame(&mut self.out, code, token, &self.scratch);
    }

    fn abort(&mut self, what: &'static str, bad_csm_option: Option<u16>) -> Aborted {
        let option = bad_csm_option.map(|number| (ABORT_BAD_CSM_OPTION, u32::from(number)));
        self.signal(Code::ABORT, &[], option.as_slice(), what.as_bytes());
        Aborted { what }
    }

    fn drop_observer(&mut self, token: &Token, reason: GoneReason) {
        let found = self.observers.iter().find(|(_, o)| o.token == *token).map(|(slot, _)| slot);
        if let Some(slot) = found {
            self.observers.remove(slot);
            self.events.push_back(Event::ObserverGone { observer: ObserverId(slot), reason });
        }
    }

    fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }
}

fn call_limits(config: &Config) -> CallLimits {
    CallLimits {
        calls_max: config.calls_max,
        peer_max: config.calls_max,
        body_bytes_max: config.message_bytes_max,
        bytes_max: config.message_bytes_max.saturating_mul(2),
        block_bytes_max: MESSAGE_BYTES_BASE - OVERHEAD_BYTES,
    }
}

/// The part of a message (section 3.2) before its token, and how long all of it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Frame {
    code: Code,
    /// The nibble of the first byte (RFC 8974 section 2.1).
    token_length: u8,
    /// Up to the code; the extension of the token's length and the token follow.
    header_bytes: usize,
    /// The whole message.
    bytes: u64,
}

impl Frame {
    /// `None` until the header with its extended lengths is here.
    fn parse(input: &[u8]) -> Option<Self> {
        let (&first, rest) = input.split_first()?;
        let (extension_bytes, length) = match first >> 4 {
            13 => (1, 13 + u64::from(*rest.first()?)),
            14 => (2, 269 + u64::from(u16::from_be_bytes(*rest.first_chunk()?))),
            15 => (4, 65_805 + u64::from(u32::from_be_bytes(*rest.first_chunk()?))),
            short => (0, u64::from(short)),
        };
        let (&code, rest) = rest.get(extension_bytes..)?.split_first()?;
        let header_bytes = 2 + extension_bytes;
        let token_length = first & 15;
        let token_field = match token_length {
            13 => 1 + 13 + u64::from(*rest.first()?),
            14 => 2 + 269 + u64::from(u16::from_be_bytes(*rest.first_chunk()?)),
            // The reserved length is refused before anything more is waited for.
            TOKEN_LENGTH_RESERVED => 0,
            short => u64::from(short),
        };
        Some(Frame { code: Code(code), token_length, header_bytes, bytes: header_bytes as u64 + token_field + length })
    }
}

/// `body` is options and payload with its marker.
fn write_frame(out: &mut Vec<u8>, code: Code, token: &[u8], body: &[u8]) {
    let length = body.len() as u64;
    let at = out.len();
    match length {
        0..=12 => out.push((length as u8) << 4),
        13..=268 => out.extend_from_slice(&[13 << 4, (length - 13) as u8]),
        269..=65_804 => {
            out.push(14 << 4);
            out.extend_from_slice(&((length - 269) as u16).to_be_bytes());
        }
        _ => {
            out.push(15 << 4);
            out.extend_from_slice(&u32::try_from(length - 65_805).unwrap_or(u32::MAX).to_be_bytes());
        }
    }
    out.push(code.0);
    let token_length = extend(out, token.len());
    if let Some(head) = out.get_mut(at) {
        *head |= token_length;
    }
    out.extend_from_slice(token);
    out.extend_from_slice(body);
}

const TOKEN_LENGTH_RESERVED: u8 = 15;
const CSM_MAX_MESSAGE_SIZE: u16 = 2;
const CSM_BLOCK_WISE_TRANSFER: u16 = 4;
/// RFC 8974 section 2.2.1.
const CSM_EXTENDED_TOKEN_LENGTH: u16 = 6;
const ABORT_BAD_CSM_OPTION: u16 = 2;
/// Max-Message-Size of a peer that has not said otherwise (section 5.3.1).
const MESSAGE_BYTES_BASE: usize = 1152;
/// Less than this nobody can mean; it keeps one block of 16 bytes with its options sendable.
const MESSAGE_BYTES_LEAST: usize = 128;
/// Header, token and options of an answer.
const OVERHEAD_BYTES: usize = 96;

#[cfg(test)]
mod blocks;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::option::number;

    pub fn frame(code: Code, token: &[u8], options: &[(u16, &[u8])], payload: &[u8]) -> Vec<u8> {
        let (mut body, mut out) = (Vec::new(), Vec::new());
        let mut builder = Builder::body(&mut body);
        for (number, value) in options {
            builder = builder.option(*number, value);
        }
        builder.payload(payload);
        write_frame(&mut out, code, token, &body);
        out
    }

    fn greeted() -> Connection {
        let mut connection = Connection::new(Config::default(), "192.0.2.1:1".parse().unwrap());
        connection.handle_sent(usize::MAX);
        let csm = frame(Code::CSM, b"", &[(2, &[0x10, 0, 0])], b"");
        assert!(matches!(connection.handle_input(&csm), Ok(Some((n, Received::Nothing))) if n == csm.len()));
        connection
    }

    /// Code, token, options and payload.
    pub type Sent = (Code, Vec<u8>, Vec<(u16, Vec<u8>)>, Vec<u8>);

    /// Each message in the output.
    pub fn sent(connection: &mut Connection) -> Vec<Sent> {
        let output = connection.output().to_vec();
        connection.handle_sent(output.len());
        let mut left = &output[..];
        let mut messages = Vec::new();
        while let Some(frame) = Frame::parse(left) {
            let (message, rest) = left.split_at(frame.bytes as usize);
            let c = Contents::parse(frame.code, frame.token_length, &message[frame.header_bytes..]).unwrap();
            let options = c.options().map(|(n, v)| (n, v.to_vec())).collect();
            messages.push((c.code, c.token.to_vec(), options, c.payload.to_vec()));
            left = rest;
        }
        assert!(left.is_empty());
        messages
    }

    #[test]
    fn our_first_message_is_a_csm_with_our_limit() {
        let connection = Connection::new(Config::default(), "192.0.2.1:1".parse().unwrap());
        assert_eq!(
            connection.output(),
            b"\x80\xe1\x23\x04\x00\x00\x20\x22\x01\x00",
            "256 KiB, blocks, tokens of 256 bytes"
        );
    }

    #[test]
    fn frames_of_every_length_class_read_back_and_wait_for_their_end() {
        for length in [0, 11, 12, 13, 14, 267, 268, 269, 270, 65_804, 65_805, 65_806, 70_000] {
            let body = vec![1; length];
            let mut out = Vec::new();
            write_frame(&mut out, Code::POST, b"tok", &body);
            let parsed = Frame::parse(&out).unwrap();
            assert_eq!((parsed.bytes, parsed.token_length), (out.len() as u64, 3), "{length}");
            assert_eq!(parsed.bytes as usize, parsed.header_bytes + 3 + length);
        }
        let mut connection = greeted();
        let get = frame(Code::GET, b"t", &[(number::URI_PATH, b"a-longer-path")], b"");
        for end in 0..get.len() {
            assert!(matches!(connection.handle_input(&get[..end]), Ok(None)), "{end}");
        }
        assert!(matches!(connection.handle_input(&get), Ok(Some((_, Received::Request(_))))));
    }

    #[test]
    fn requests_are_answered_by_token_in_any_order() {
        let mut connection = greeted();
        let mut handles = Vec::new();
        for token in [b"1", b"2"] {
            let get = frame(Code::GET, token, &[(number::URI_PATH, b"x")], b"");
            let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&get) else { panic!() };
            handles.push(request.handle);
        }
        connection.respond(handles[1], &Response::new(Code::CONTENT).content(Some(0), b"two")).unwrap();
        connection.respond(handles[0], &Response::new(Code::NOT_FOUND)).unwrap();
        assert_eq!(connection.respond(handles[0], &Response::new(Code::NOT_FOUND)), Err(Gone));
        let answers = sent(&mut connection);
        assert_eq!((answers[0].0, &answers[0].1[..], &answers[0].3[..]), (Code::CONTENT, &b"2"[..], &b"two"[..]));
        assert_eq!((answers[1].0, &answers[1].1[..]), (Code::NOT_FOUND, &b"1"[..]));
    }

    #[test]
    fn long_tokens_come_back_and_one_that_is_too_long_is_answered_4_00() {
        let mut connection = greeted();
        for length in [9, 12, 13, 22, 23, TOKEN_BYTES_MAX] {
            let token = vec![length as u8; length];
            let get = frame(Code::GET, &token, &[(number::URI_PATH, b"x")], b"");
            for end in 0..get.len() {
                assert!(matches!(connection.handle_input(&get[..end]), Ok(None)), "{end}");
            }
            let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&get) else { panic!() };
            connection.respond(request.handle, &Response::new(Code::NOT_FOUND)).unwrap();
            assert_eq!(sent(&mut connection), [(Code::NOT_FOUND, token, vec![], vec![])]);
        }
        for length in [TOKEN_BYTES_MAX + 1, 268, 269, 65_804] {
            let token = vec![1; length];
            let get = frame(Code::GET, &token, &[(number::URI_PATH, b"x")], b"");
            assert!(matches!(connection.handle_input(&get), Ok(Some((_, Received::Nothing)))));
            assert_eq!(sent(&mut connection), [(Code::BAD_REQUEST, token, vec![], vec![])]);
        }
    }

    #[test]
    fn ping_is_answered_by_pong_and_release_closes() {
        let mut connection = greeted();
        assert!(connection.handle_input(&frame(Code::PING, b"p", &[(2, b"")], b"")).is_ok());
        assert_eq!(sent(&mut connection), [(Code::PONG, b"p".to_vec(), vec![], vec![])]);
        assert!(matches!(
            connection.handle_input(&frame(Code::RELEASE, b"", &[], b"")),
            Ok(Some((_, Received::Closing)))
        ));
        assert!(matches!(
            connection.handle_input(&frame(Code::EMPTY, b"", &[], b"")),
            Ok(Some((2, Received::Nothing)))
        ));
    }

    #[test]
    fn what_must_abort_aborts_and_says_why() {
        let mut fresh = Connection::new(Config::default(), "192.0.2.1:1".parse().unwrap());
        fresh.handle_sent(usize::MAX);
        assert_eq!(
            fresh.handle_input(&frame(Code::GET, b"", &[], b"")).unwrap_err().what,
            "first message is not a CSM"
        );
        assert_eq!(sent(&mut fresh)[0].0, Code::ABORT);
        assert!(greeted().handle_input(&[0x0f, 1]).is_err(), "reserved token length");
        assert!(greeted().handle_input(&[0xf0, 0xff, 0xff, 0xff, 0xff, 1]).is_err(), "4 GiB announced");
        assert!(greeted().handle_input(&frame(Code::GET, b"", &[], b"")[..1]).unwrap().is_none());
        assert!(greeted().handle_input(&[0x10, 1, 0xff]).is_err(), "marker without payload");
        let mut connection = greeted();
        assert!(connection.handle_input(&frame(Code::CSM, b"", &[(5, b"x")], b"")).is_err());
        let abort = sent(&mut connection).remove(0);
        assert_eq!((abort.0, abort.2), (Code::ABORT, vec![(2, vec![5])]), "Bad-CSM-Option");
    }

    #[test]
    fn observers_get_values_and_are_refreshed_after_a_full_output() {
        let mut connection = greeted();
        let register = frame(Code::GET, b"ob", &[(number::OBSERVE, b""), (number::URI_PATH, b"x")], b"");
        let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&register) else { panic!() };
        let response = Response::new(Code::CONTENT).content(Some(0), b"1");
        let observer = connection.observe(request.handle, &response).unwrap().unwrap();
        let value = |payload: Vec<u8>, delivery| Notification {
            code: Code::CONTENT,
            content_format: None,
            max_age: None,
            location: None,
            payload: payload.into(),
            delivery,
        };
        connection.notify(observer, &value(b"2".to_vec(), Delivery::Each { ticket: 5 })).unwrap();
        assert_eq!(connection.poll_event(), Some(Event::Delivered { observer, ticket: 5 }));
        let answers = sent(&mut connection);
        assert_eq!((answers[0].2[0].clone(), answers[1].2[0].clone()), ((6, vec![1]), (6, vec![2])));
        connection.notify(observer, &value(vec![0; 70_000], Delivery::Latest)).unwrap();
        assert!(!connection.wants_input());
        assert_eq!(connection.notify(observer, &value(vec![1], Delivery::Each { ticket: 6 })), Err(NotifyError::Full));
        connection.notify(observer, &value(vec![1], Delivery::Latest)).unwrap();
        assert_eq!(connection.poll_event(), None);
        connection.handle_sent(usize::MAX);
        assert_eq!(connection.poll_event(), Some(Event::Refresh { observer }));
        let leave = frame(Code::GET, b"ob", &[(number::OBSERVE, &[1]), (number::URI_PATH, b"x")], b"");
        let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&leave) else { panic!() };
        assert_eq!(connection.poll_event(), Some(Event::ObserverGone { observer, reason: GoneReason::Deregistered }));
        connection.respond(request.handle, &response).unwrap();
    }

    #[test]
    fn an_answer_above_the_peers_limit_goes_out_in_blocks() {
        let mut connection = Connection::new(Config::default(), "192.0.2.1:1".parse().unwrap());
        connection.handle_sent(usize::MAX);
        connection.handle_input(&frame(Code::CSM, b"", &[], b"")).unwrap();
        let get = frame(Code::GET, b"t", &[(number::URI_PATH, b"x")], b"");
        let Ok(Some((_, Received::Request(request)))) = connection.handle_input(&get) else { panic!() };
        connection.respond(request.handle, &Response::new(Code::CONTENT).content(None, &[7; 5000])).unwrap();
        let answer = sent(&mut connection).remove(0);
        assert_eq!(answer.3.len(), 1024);
        assert_eq!(answer.2[1], (number::BLOCK2, vec![0x0e]), "behind its ETag");
    }
}
