//! The server's side of one connection, as a state machine.
//!
//! Order of the protocol: CONNECT and authentication (`handshake`), then packets in both directions (`receive`, and the commands here), then one
//! [`Close`]. Every error of the peer ends the connection; what it is told depends on its version and on how far it came.

mod handshake;
mod receive;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;

pub use handshake::Accept;

use crate::config::Config;
use crate::decode::Frame;
use crate::encode::{ack, publish_first};
use crate::error::Error;
use crate::event::{Cause, Close, Event, Handle, Output, Published};
use crate::inbound::Inbound;
use crate::outbound::{Outbound, Outgoing, Resent, Terms, write};
use crate::packet::{Ack, Connack, Disconnect, Packet, PacketId, Qos, Reasons, Suback, Unsuback, Version};
use crate::property::{Properties, PropertiesBuf, Property};
use crate::reason::Reason;
use crate::session::SessionState;

/// One connection. `M` is the application's message, see [`Outgoing`].
///
/// Parts that a quiet connection does not use are allocated when they are needed.
#[derive(Debug)]
pub struct Connection<M> {
    config: Arc<Config>,
    /// When the last whole packet arrived.
    last_input: Instant,
    /// End of the handshake, or of a running re-authentication.
    handshake_deadline: Option<Instant>,
    event: Option<Event<M>>,
    close: Option<Close>,
    inbound: Option<Box<Inbound>>,
    outbound: Option<Box<Outbound<M>>>,
    /// Method of enhanced authentication.
    auth_method: Option<Box<str>>,
    /// The client's Maximum Packet Size.
    packet_bytes_max: u32,
    /// The Session Expiry Interval from CONNECT, in seconds.
    session_expiry_secs: u32,
    /// What is in force, in seconds; 0 is none.
    keep_alive: u16,
    /// The client's Receive Maximum.
    receive_maximum: u16,
    /// Topic aliases we may define.
    aliases_out_max: u16,
    version: Version,
    phase: Phase,
    reauth: Reauth,
    /// Whether the client wants reason strings (Request Problem Information).
    problem_info: bool,
    /// See [`Accept::stored`].
    stored: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing but a CONNECT is allowed.
    AwaitConnect,
    /// The application owes `accept`, `refuse` or `challenge`.
    Deciding,
    /// The client owes an AUTH.
    Challenged,
    Connected,
    Closed,
}

/// Where a re-authentication stands; other packets flow meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reauth {
    None,
    Deciding,
    Challenged,
}

impl<M: Outgoing> Connection<M> {
    pub fn new(config: Arc<Config>, now: Instant) -> Self {
        let handshake_deadline = now.checked_add(config.connect_timeout);
        Connection {
            config,
            last_input: now,
            handshake_deadline,
            event: None,
            close: None,
            inbound: None,
            outbound: None,
            auth_method: None,
            packet_bytes_max: u32::MAX,
            session_expiry_secs: 0,
            keep_alive: 0,
            receive_maximum: u16::MAX,
            aliases_out_max: 0,
            version: Version::V311,
            phase: Phase::AwaitConnect,
            reauth: Reauth::None,
            problem_info: true,
            stored: false,
        }
    }

    /// Takes one whole packet off the front of `input`, if there is one and it may be read now; true when it did. Drain `poll_output` after each.
    #[inline]
    pub fn handle_input(&mut self, now: Instant, input: &mut BytesMut, out: &mut BytesMut) -> bool {
        if self.event.is_some() || self.paused() {
            return false;
        }
        let bytes_max = match self.phase {
            Phase::AwaitConnect if input.first().is_some_and(|first| *first != 0x10) => {
                // Said before the packet is whole: a stranger that does not speak MQTT is not waited for.
                self.fail(Error::Protocol("first packet is not CONNECT"), out);
                return true;
            }
            Phase::AwaitConnect | Phase::Challenged => self.config.connect_bytes_max,
            Phase::Connected => self.config.packet_bytes_max,
            Phase::Deciding | Phase::Closed => return false,
        };
        let frame = match Frame::peek(input, bytes_max) {
            Ok(Some(frame)) => frame,
            Ok(None) => return false,
            Err(error) => {
                self.fail(error, out);
                return true;
            }
        };
        if input.len() < frame.packet_bytes {
            return false;
        }
        self.last_input = now;
        let packet = input.split_to(frame.packet_bytes).freeze();
        if let Err(error) = self.receive(frame, packet, out) {
            self.fail(error, out);
        }
        true
    }

    /// How many bytes the packet at the front of `input` lacks, at least 1: what is worth making room for. Its length is the peer's word.
    pub fn missing(&self, input: &[u8]) -> usize {
        let frame = Frame::peek(input, self.config.packet_bytes_max);
        frame.ok().flatten().map_or(1, |frame| frame.packet_bytes.saturating_sub(input.len()).max(1))
    }

    /// The application has not read for a while: the silence until `now` is not the peer's and does not count against its keep-alive.
    pub fn excuse_silence(&mut self, now: Instant) {
        self.last_input = now;
    }

    /// The peer closed its side, or the transport failed.
    pub fn handle_eof(&mut self) {
        self.finish(Cause::Eof, None);
    }

    /// To be called at the instant of [`Output::Timeout`], or later, or earlier without effect.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut BytesMut) {
        if self.handshake_deadline.is_some_and(|deadline| now >= deadline) {
            if self.phase == Phase::Connected {
                self.say_goodbye(Reason::NotAuthorized, None, out);
            }
            self.finish(Cause::ConnectTimeout, None);
            return;
        }
        if self.phase != Phase::Connected {
            return;
        }
        if self.paused() {
            // The silence is our own: nothing is read.
            self.last_input = now;
        } else if self.keep_alive_deadline().is_some_and(|deadline| now >= deadline) {
            self.say_goodbye(Reason::KeepAliveTimeout, None, out);
            self.finish(Cause::KeepAliveTimeout, None);
        } else {
            self.shrink();
        }
    }

    /// Says what happened, one thing at a time. Appends redeliveries of a resumed session to `out`, in pieces of `burst_bytes_max`: call it again
    /// after a flush.
    #[inline]
    pub fn poll_output(&mut self, now: Instant, out: &mut BytesMut) -> Output<M> {
        if let Some(event) = self.event.take() {
            return Output::Event(event);
        }
        if let Some(close) = self.close.take() {
            return Output::Close(close);
        }
        if self.phase == Phase::Closed {
            return Output::Timeout(None);
        }
        if self.outbound.as_ref().is_some_and(|o| o.resend_pending())
            && let Some(message) = self.resend(now, out)
        {
            return Output::Event(Event::Delivered { message, reason: Reason::PacketTooLarge });
        }
        Output::Timeout(self.deadline())
    }

    /// Whether nothing more is read until the application has answered; the driver then stops reading from the transport.
    #[inline]
    pub fn paused(&self) -> bool {
        self.phase == Phase::Deciding
            || (self.version == Version::V311
                && self.inbound.as_ref().is_some_and(|i| i.waiting() >= usize::from(self.config.receive_maximum)))
    }

    pub fn is_connected(&self) -> bool {
        self.phase == Phase::Connected
    }

    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// The Session Expiry Interval in force, in seconds.
    pub fn session_expiry_secs(&self) -> u32 {
        self.session_expiry_secs
    }

    /// Incoming messages that the application has yet to answer, or whose answer waits for an earlier one.
    pub fn waiting(&self) -> usize {
        self.inbound.as_ref().map_or(0, |i| i.waiting())
    }

    /// Outgoing QoS 1 and 2 messages that may be published now.
    #[inline]
    pub fn window(&self) -> usize {
        let limit = usize::from(self.receive_maximum.min(self.config.in_flight_max));
        match &self.outbound {
            _ if self.phase != Phase::Connected => 0,
            None => limit,
            Some(o) if o.resend_pending() => 0,
            Some(o) => limit.saturating_sub(o.in_flight()),
        }
    }

    /// Sends one message to the client. `message` is cloned when it has to be kept until the client acknowledges it.
    #[inline]
    pub fn publish(&mut self, now: Instant, message: &M, qos: Qos, retain: bool, out: &mut BytesMut) -> Published {
        if self.phase != Phase::Connected {
            return Published::Closed;
        }
        let terms = self.terms();
        let first = publish_first(qos != Qos::AtMostOnce && message.repeated(), qos, retain);
        if qos == Qos::AtMostOnce && terms.aliases_max == 0 {
            return if write(message, first, None, None, terms, now, out) {
                Published::Sent
            } else {
                Published::TooLarge
            };
        }
        if qos != Qos::AtMostOnce && self.window() == 0 {
            return Published::WindowFull;
        }
        let outbound = self.outbound.get_or_insert_default();
        let id = if qos == Qos::AtMostOnce {
            None
        } else {
            match outbound.id_for(message) {
                None => return Published::WindowFull,
                some => some,
            }
        };
        if !outbound.write_aliased(message, first, id, terms, now, out) {
            return Published::TooLarge;
        }
        if let Some(id) = id {
            outbound.sent(id, qos, retain, message.clone());
        }
        Published::Sent
    }

    /// Answers [`Event::Publish`]: PUBACK for QoS 1, PUBREC for QoS 2, sent when all earlier ones are. An error refuses the message.
    ///
    /// MQTT 3.1.1 has no refusal: there the client is told that all is well, so close the connection or withhold the answer instead.
    /// After the connection is closed, this still records that a QoS 2 message was accepted, for the session.
    pub fn ack(&mut self, handle: Handle, reason: Reason, text: Option<&str>, out: &mut BytesMut) {
        let text = text.filter(|_| self.version == Version::V5 && self.problem_info).map(Box::from);
        if let Some(inbound) = &mut self.inbound {
            inbound.answer(handle, reason, text);
            self.answer_ready(out);
        }
    }

    /// Writes the acknowledgements whose turn has come.
    fn answer_ready(&mut self, out: &mut BytesMut) {
        let (version, open) = (self.version, self.phase == Phase::Connected);
        let packet_bytes_max = self.packet_bytes_max as usize;
        let Some(inbound) = &mut self.inbound else { return };
        while let Some(ready) = inbound.next_ready(|reason| kept(version, reason)) {
            if !open {
                continue;
            }
            let first = if ready.qos == Qos::ExactlyOnce { 0x50 } else { 0x40 };
            let reason = if ready.reason.in_puback() { ready.reason } else { Reason::UnspecifiedError };
            let list = reason_string(ready.text.as_deref(), packet_bytes_max.saturating_sub(16));
            let packet = Ack { packet_id: ready.id, reason, properties: list.as_properties() };
            // The list is within its limits, so it is always written.
            let _ = ack(first, &packet, version, out);
        }
    }

    /// Answers [`Event::Delivered`] of a QoS 2 message in a stored session: what the client has received is written down, PUBREL can go.
    pub fn release(&mut self, packet_id: PacketId, out: &mut BytesMut) {
        if self.phase == Phase::Connected && self.outbound.as_ref().is_some_and(|o| o.is_received(packet_id)) {
            self.reply(0x62, packet_id, Reason::Success, out);
        }
    }

    /// Answers [`Event::Released`]: that the identifier is free is written down, PUBCOMP can go.
    pub fn complete(&mut self, packet_id: PacketId, out: &mut BytesMut) {
        if self.phase == Phase::Connected {
            self.reply(0x70, packet_id, Reason::Success, out);
        }
    }

    /// The packet identifier of an incoming message that has no answer yet.
    pub fn packet_id(&self, handle: Handle) -> Option<PacketId> {
        self.inbound.as_ref()?.packet_id(handle)
    }

    /// Answers [`Event::Subscribe`], one reason for each filter in order.
    pub fn suback(&mut self, packet_id: PacketId, reasons: &[Reason], text: Option<&str>, out: &mut BytesMut) {
        let list = self.reason_string(text, 16 + reasons.len());
        let properties = list.as_properties();
        self.send(Packet::Suback(Suback { packet_id, properties, reasons: Reasons::new(reasons) }), out);
    }

    /// Answers [`Event::Unsubscribe`], one reason for each filter in order.
    pub fn unsuback(&mut self, packet_id: PacketId, reasons: &[Reason], text: Option<&str>, out: &mut BytesMut) {
        let list = self.reason_string(text, 16 + reasons.len());
        let properties = list.as_properties();
        self.send(Packet::Unsuback(Unsuback { packet_id, properties, reasons: Reasons::new(reasons) }), out);
    }

    /// Ends the connection: DISCONNECT with the reason where MQTT 5 can say it, otherwise just the close. The will becomes due.
    pub fn disconnect(&mut self, reason: Reason, text: Option<&str>, out: &mut BytesMut) {
        self.say_goodbye(reason, text, out);
        self.finish(Cause::Server(reason), None);
    }

    /// What the session needs to be resumed; to be taken once, after the close and after the application's last `ack`.
    pub fn take_session(&mut self) -> SessionState<M> {
        let version = self.version;
        let unreleased =
            self.inbound.take().map(|i| i.into_unreleased(|reason| kept(version, reason))).unwrap_or_default();
        let (in_flight, next_id) = self.outbound.take().unwrap_or_default().into_parts();
        SessionState { in_flight, next_id, unreleased }
    }

    /// Gives back memory that a burst has taken. Called by `handle_timeout`, too.
    pub fn shrink(&mut self) {
        if let Some(inbound) = &mut self.inbound {
            inbound.shrink();
        }
        match &mut self.outbound {
            Some(o) if o.is_idle() => self.outbound = None,
            Some(o) => o.shrink(),
            None => {}
        }
    }

    fn terms(&self) -> Terms {
        Terms {
            version: self.version,
            packet_bytes_max: self.packet_bytes_max as usize,
            aliases_max: self.aliases_out_max,
        }
    }

    fn resend(&mut self, now: Instant, out: &mut BytesMut) -> Option<M> {
        let terms = self.terms();
        let quota = usize::from(self.receive_maximum.min(self.config.in_flight_max));
        let outbound = self.outbound.as_mut()?;
        while out.len() < self.config.burst_bytes_max {
            match outbound.resend_next(now, terms, quota, out) {
                Resent::Sent => {}
                Resent::TooLarge(message) => return Some(message),
                Resent::QuotaFull | Resent::Done => break,
            }
        }
        None
    }

    fn keep_alive_deadline(&self) -> Option<Instant> {
        // One and a half times the keep-alive (`[MQTT-3.1.2-22]`).
        let patience = Duration::from_millis(u64::from(self.keep_alive) * 1500);
        if patience.is_zero() { None } else { self.last_input.checked_add(patience) }
    }

    fn deadline(&self) -> Option<Instant> {
        if self.phase != Phase::Connected {
            return self.handshake_deadline;
        }
        match (self.keep_alive_deadline(), self.handshake_deadline) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn reason_string(&self, text: Option<&str>, other_bytes: usize) -> PropertiesBuf {
        let wanted = self.version == Version::V5 && self.problem_info;
        reason_string(text.filter(|_| wanted), (self.packet_bytes_max as usize).saturating_sub(other_bytes))
    }

    /// Writes a packet of ours to an open connection. What is given is within the format's limits by construction; what is not, is not sent.
    fn send(&mut self, packet: Packet<'_>, out: &mut BytesMut) {
        if self.phase == Phase::Connected {
            let _ = packet.encode(self.version, out);
        }
    }

    fn fail(&mut self, error: Error, out: &mut BytesMut) {
        let reason = error.reason();
        match self.phase {
            Phase::Connected => self.say_goodbye(reason, None, out),
            Phase::AwaitConnect | Phase::Deciding | Phase::Challenged => {
                // Strangers get a CONNACK only where the specification wants one; see `handshake` for those.
                if self.version == Version::V5 {
                    let reason = if reason.in_connack() { reason } else { Reason::ProtocolError };
                    self.connack_refusal(reason, out);
                }
            }
            Phase::Closed => {}
        }
        self.finish(Cause::Error(error), None);
    }

    fn connack_refusal(&mut self, reason: Reason, out: &mut BytesMut) {
        let packet = Packet::Connack(Connack { session_present: false, reason, properties: Properties::EMPTY });
        // Without properties it is always within the limits.
        let _ = packet.encode(self.version, out);
    }

    fn say_goodbye(&mut self, reason: Reason, text: Option<&str>, out: &mut BytesMut) {
        if self.phase != Phase::Connected || self.version != Version::V5 {
            return;
        }
        // DISCONNECT may carry a reason string even to a client that did not ask for problem information.
        let list = reason_string(text, (self.packet_bytes_max as usize).saturating_sub(16));
        let reason = if reason.in_disconnect() { reason } else { Reason::UnspecifiedError };
        self.send(Packet::Disconnect(Disconnect { reason, properties: list.as_properties() }), out);
    }

    fn finish(&mut self, cause: Cause, session_expiry_secs: Option<u32>) {
        if self.phase == Phase::Closed {
            return;
        }
        let will = self.phase == Phase::Connected && cause != Cause::Disconnect(Reason::Success);
        self.phase = Phase::Closed;
        self.handshake_deadline = None;
        self.close = Some(Close { cause, will, session_expiry_secs });
    }
}

/// Whether a QoS 2 identifier stays taken after this PUBREC: an error ends the exchange, but 3.1.1 cannot say an error (`[MQTT-4.3.3-9]`).
fn kept(version: Version, reason: Reason) -> bool {
    version == Version::V311 || !reason.is_error()
}

/// A property list with a reason string, or an empty one when the text is missing or too long.
fn reason_string(text: Option<&str>, bytes_max: usize) -> PropertiesBuf {
    let mut list = PropertiesBuf::new();
    if let Some(text) = text
        && text.len().saturating_add(3) <= bytes_max
    {
        // A text above 65,535 bytes is left out: the reason code says enough.
        let _ = list.push(Property::ReasonString(text));
    }
    list
}
