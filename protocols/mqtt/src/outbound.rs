//! Messages to the client: packet identifiers, what is in flight, redelivery, topic aliases.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::{BufMut, BytesMut};

use crate::encode::{VARINT_MAX, publish_first, publish_head, put_varint, varint_bytes};
use crate::packet::{PacketId, Qos, Version};
use crate::property::PropertySink;
use crate::reason::Reason;
use crate::session::Stage;

/// A message as the application keeps it. Cloned once for each QoS 1 or 2 delivery, so it should be a reference count.
pub trait Outgoing: Clone {
    /// A valid topic name, or the rest of one that begins with `topic_prefix`.
    fn topic(&self) -> &str;

    /// What to write before `topic`, so that a name can be shown differently without being copied.
    fn topic_prefix(&self) -> &str {
        ""
    }

    fn payload(&self) -> &[u8];

    /// The identifier to send it under at QoS 1 and 2, when the application has given it one, as for a session that outlives this process. Then all
    /// messages of the connection must have one, and none two at a time. None: the next free one.
    fn packet_id(&self) -> Option<PacketId> {
        None
    }

    /// Whether the client may have it already from an earlier connection: sent with DUP.
    fn repeated(&self) -> bool {
        false
    }

    /// Puts the MQTT 5 properties of the PUBLISH: expiry (what is left of it at `now`), content type, subscription identifiers and the like.
    /// Called twice for each PUBLISH to a MQTT 5 client and must do the same both times.
    fn properties(&self, now: Instant, sink: &mut PropertySink<'_>) {
        let _ = (now, sink);
    }
}

#[derive(Clone, Debug)]
pub(crate) struct InFlight<M> {
    pub(crate) id: PacketId,
    pub(crate) stage: Stage,
    pub(crate) retain: bool,
    /// None exactly at [`Stage::Pubcomp`].
    pub(crate) message: Option<M>,
}

#[derive(Debug)]
pub(crate) struct Outbound<M> {
    /// In the order of sending, so identifiers ascend (round the corner): the next one is free unless it is the first one's.
    queue: VecDeque<InFlight<M>>,
    next_id: PacketId,
    /// Entries from here on were not yet sent on this connection.
    resend: usize,
    /// Topic of alias n at n - 1.
    aliases: Vec<Box<str>>,
}

/// What the client may be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) version: Version,
    /// The client's Maximum Packet Size.
    pub(crate) packet_bytes_max: usize,
    /// Topic aliases we may define.
    pub(crate) aliases_max: u16,
}

impl<M> Default for Outbound<M> {
    fn default() -> Self {
        Outbound { queue: VecDeque::new(), next_id: PacketId::FIRST, resend: 0, aliases: Vec::new() }
    }
}

impl<M: Outgoing> Outbound<M> {
    pub(crate) fn resume(queue: VecDeque<InFlight<M>>, next_id: PacketId) -> Self {
        Outbound { queue, next_id, resend: 0, aliases: Vec::new() }
    }

    pub(crate) fn into_parts(self) -> (VecDeque<InFlight<M>>, PacketId) {
        (self.queue, self.next_id)
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn resend_pending(&self) -> bool {
        self.resend < self.queue.len()
    }

    /// The identifier for the next message; None when all are taken.
    pub(crate) fn free_id(&self) -> Option<PacketId> {
        if self.queue.front().is_some_and(|e| e.id == self.next_id) { None } else { Some(self.next_id) }
    }

    /// The identifier for `message`; None when it, or every one, is taken.
    pub(crate) fn id_for(&self, message: &M) -> Option<PacketId> {
        match message.packet_id() {
            Some(id) => self.find(id).is_none().then_some(id),
            None => self.free_id(),
        }
    }

    /// Keeps a message that was just sent under the identifier from `free_id`.
    pub(crate) fn sent(&mut self, id: PacketId, qos: Qos, retain: bool, message: M) {
        let stage = if qos == Qos::ExactlyOnce { Stage::Pubrec } else { Stage::Puback };
        self.queue.push_back(InFlight { id, stage, retain, message: Some(message) });
        self.next_id = id.next();
        self.resend = self.queue.len();
    }

    fn find(&self, id: PacketId) -> Option<usize> {
        // Clients answer in order, so this is nearly always the first.
        self.queue.iter().position(|e| e.id == id)
    }

    fn remove(&mut self, index: usize) -> Option<M> {
        let entry = self.queue.remove(index)?;
        if index < self.resend {
            self.resend -= 1;
        }
        entry.message
    }

    /// PUBACK. None when it answers nothing.
    pub(crate) fn puback(&mut self, id: PacketId) -> Result<Option<M>, crate::Error> {
        let Some(index) = self.find(id) else { return Ok(None) };
        if self.queue.get(index).is_some_and(|e| e.stage != Stage::Puback) {
            return Err(crate::Error::Protocol("PUBACK for a QoS 2 message"));
        }
        Ok(self.remove(index))
    }

    /// PUBREC: whether the identifier is known (then PUBREL is due, unless `reason` ended it), and the message the first time.
    pub(crate) fn pubrec(&mut self, id: PacketId, reason: Reason) -> Result<(bool, Option<M>), crate::Error> {
        let Some(index) = self.find(id) else { return Ok((false, None)) };
        let Some(entry) = self.queue.get_mut(index) else { return Ok((false, None)) };
        match entry.stage {
            Stage::Puback => Err(crate::Error::Protocol("PUBREC for a QoS 1 message")),
            Stage::Pubcomp if reason.is_error() => {
                self.remove(index);
                Ok((true, None))
            }
            Stage::Pubcomp => Ok((true, None)),
            Stage::Pubrec if reason.is_error() => Ok((true, self.remove(index))),
            Stage::Pubrec => {
                entry.stage = Stage::Pubcomp;
                Ok((true, entry.message.take()))
            }
        }
    }

    /// Whether the client has received the QoS 2 message and PUBREL is due.
    pub(crate) fn is_received(&self, id: PacketId) -> bool {
        self.find(id).and_then(|index| self.queue.get(index)).is_some_and(|e| e.stage == Stage::Pubcomp)
    }

    /// PUBCOMP: whether it ended a handshake. One that answers nothing is ignored.
    pub(crate) fn pubcomp(&mut self, id: PacketId) -> Result<bool, crate::Error> {
        let Some(index) = self.find(id) else { return Ok(false) };
        match self.queue.get(index).map(|e| e.stage) {
            Some(Stage::Pubcomp) => {
                self.remove(index);
                Ok(true)
            }
            _ => Err(crate::Error::Protocol("PUBCOMP before PUBREC")),
        }
    }

    /// Sends the next entry of a resumed session again (`[MQTT-4.4.0-1]`). `quota` is how many may be in flight on this connection.
    ///
    /// Returns the message when it cannot be sent to this client any more; it is then forgotten.
    pub(crate) fn resend_next(&mut self, now: Instant, terms: Terms, quota: usize, out: &mut BytesMut) -> Resent<M> {
        let sent = self.resend;
        let Some(entry) = self.queue.get_mut(sent) else { return Resent::Done };
        let Some(message) = &entry.message else {
            let [high, low] = entry.id.get().to_be_bytes();
            out.put_slice(&[0x62, 2, high, low]);
            self.resend += 1;
            return Resent::Sent;
        };
        // Every entry before this one counts, PUBRELs too: fewer in flight than allowed is always right.
        if sent >= quota {
            return Resent::QuotaFull;
        }
        let qos = if entry.stage == Stage::Pubrec { Qos::ExactlyOnce } else { Qos::AtLeastOnce };
        let first = publish_first(true, qos, entry.retain);
        if write(message, first, Some(entry.id), None, terms, now, out) {
            self.resend += 1;
            return Resent::Sent;
        }
        self.remove(sent).map_or(Resent::Sent, Resent::TooLarge)
    }

    /// Chooses between the full topic and an alias, and writes the PUBLISH. False when it is too large; nothing is written then.
    pub(crate) fn write_aliased(
        &mut self,
        message: &M,
        first: u8,
        id: Option<PacketId>,
        terms: Terms,
        now: Instant,
        out: &mut BytesMut,
    ) -> bool {
        let (prefix, topic) = (message.topic_prefix(), message.topic());
        let known = self.aliases.iter().position(|t| t.strip_prefix(prefix) == Some(topic));
        let index = known.unwrap_or(self.aliases.len());
        // An alias is worth its three bytes only for a topic that is longer.
        let alias = match u16::try_from(index + 1) {
            Ok(alias) if alias <= terms.aliases_max && prefix.len() + topic.len() > 3 => alias,
            _ => return write(message, first, id, None, terms, now, out),
        };
        let written = write(message, first, id, Some((alias, known.is_some())), terms, now, out);
        if written && known.is_none() {
            self.aliases.push([prefix, topic].concat().into());
        }
        written
    }

    pub(crate) fn shrink(&mut self) {
        self.queue.shrink_to(self.queue.len());
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.aliases.is_empty() && self.next_id == PacketId::FIRST
    }
}

pub(crate) enum Resent<M> {
    Sent,
    TooLarge(M),
    QuotaFull,
    Done,
}

/// Writes one PUBLISH. `alias` is the alias and whether it stands in place of the topic. False when it is too large; nothing is written then.
#[inline]
pub(crate) fn write<M: Outgoing>(
    message: &M,
    first: u8,
    id: Option<PacketId>,
    alias: Option<(u16, bool)>,
    terms: Terms,
    now: Instant,
    out: &mut BytesMut,
) -> bool {
    let payload = message.payload();
    let (prefix, topic) = match alias {
        Some((_, true)) => ("", ""),
        _ => (message.topic_prefix(), message.topic()),
    };
    let mut body = 2 + prefix.len() + topic.len() + if id.is_some() { 2 } else { 0 } + payload.len();
    if terms.version == Version::V311 {
        // A 3.1.1 client cannot say how much it takes; the protocol's own limit stands.
        return body <= VARINT_MAX
            && publish_head(first, body, (prefix, topic), id, out).map(|()| out.put_slice(payload)).is_ok();
    }
    let mut sink = PropertySink::measure();
    message.properties(now, &mut sink);
    let list = sink.measured() + if alias.is_some() { 3 } else { 0 };
    body += varint_bytes(list) + list;
    if body > VARINT_MAX || 1 + varint_bytes(body) + body > terms.packet_bytes_max {
        return false;
    }
    if publish_head(first, body, (prefix, topic), id, out).is_err() {
        return false;
    }
    // Below VARINT_MAX, so it is always written.
    let _ = put_varint(out, list);
    if let Some((alias, _)) = alias {
        let [high, low] = alias.to_be_bytes();
        out.put_slice(&[0x23, high, low]);
    }
    if list > 0 {
        message.properties(now, &mut PropertySink::write(out));
    }
    out.put_slice(payload);
    true
}
