//! Packets to bytes. The length is computed before anything is written, so a packet is written once and in place.

use std::fmt;

use bytes::{BufMut, BytesMut};

use crate::packet::{Ack, Connect, Packet, PacketId, Publish, Qos, Version};
use crate::property::Properties;
use crate::reason::Reason;

/// Why a packet cannot be written. Our own mistake, never the peer's; nothing was written then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodeError {
    /// A text or binary field above 65,535 bytes, or a packet above 268,435,455.
    TooLarge,
    /// A publish above QoS 0 without a packet identifier, or one at QoS 0 with one.
    PacketId,
    /// AUTH does not exist in MQTT 3.1.1.
    NotInVersion,
}

impl fmt::Display for EncodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EncodeError::TooLarge => "field or packet is too large for its length",
            EncodeError::PacketId => "packet identifier does not go with the quality of service",
            EncodeError::NotInVersion => "packet does not exist in this protocol version",
        })
    }
}

impl std::error::Error for EncodeError {}

/// Largest value of a variable byte integer.
pub(crate) const VARINT_MAX: usize = 268_435_455;

pub(crate) const fn varint_bytes(value: usize) -> usize {
    match value {
        0..=127 => 1,
        128..=16_383 => 2,
        16_384..=2_097_151 => 3,
        _ => 4,
    }
}

pub(crate) fn put_varint(out: &mut impl BufMut, mut value: usize) -> Result<(), EncodeError> {
    if value > VARINT_MAX {
        return Err(EncodeError::TooLarge);
    }
    while value > 127 {
        // Truncation keeps the low seven bits and sets the continuation bit.
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
    Ok(())
}

pub(crate) fn put_binary(out: &mut impl BufMut, bytes: &[u8]) -> Result<(), EncodeError> {
    let length = u16::try_from(bytes.len()).map_err(|_| EncodeError::TooLarge)?;
    out.put_u16(length);
    out.put_slice(bytes);
    Ok(())
}

impl Packet<'_> {
    /// Appends the packet to `out`.
    ///
    /// # Errors
    /// See [`EncodeError`]; `out` is then as before.
    pub fn encode(&self, version: Version, out: &mut BytesMut) -> Result<(), EncodeError> {
        let start = out.len();
        self.append(version, out).inspect_err(|_| out.truncate(start))
    }

    fn append(&self, version: Version, out: &mut BytesMut) -> Result<(), EncodeError> {
        let v5 = version == Version::V5;
        match self {
            Packet::Connect(p) => connect(p, out),
            Packet::Connack(p) if v5 => {
                header(0x20, 2 + properties_bytes(p.properties), out)?;
                out.put_u8(p.session_present.into());
                out.put_u8(p.reason as u8);
                properties(p.properties, out)
            }
            Packet::Connack(p) => {
                out.put_slice(&[0x20, 2, p.session_present.into(), p.reason.connack_311()]);
                Ok(())
            }
            Packet::Publish(p) => publish(p, version, out),
            Packet::Puback(p) => ack(0x40, p, version, out),
            Packet::Pubrec(p) => ack(0x50, p, version, out),
            Packet::Pubrel(p) => ack(0x62, p, version, out),
            Packet::Pubcomp(p) => ack(0x70, p, version, out),
            Packet::Subscribe(p) => {
                subscription(0x82, p.packet_id, p.properties, p.filters.list.len(), version, out)?;
                if v5 {
                    out.put_slice(p.filters.list);
                    return Ok(());
                }
                // 3.1.1 has only the QoS in the options byte.
                for (filter, options) in p.filters.iter() {
                    put_binary(out, filter.as_bytes())?;
                    out.put_u8(options.qos as u8);
                }
                Ok(())
            }
            Packet::Unsubscribe(p) => {
                subscription(0xA2, p.packet_id, p.properties, p.filters.list.len(), version, out)?;
                out.put_slice(p.filters.list);
                Ok(())
            }
            Packet::Suback(p) => {
                subscription(0x90, p.packet_id, p.properties, p.reasons.len(), version, out)?;
                for reason in p.reasons.iter() {
                    // 3.1.1 knows one failure.
                    let reason = if v5 || !reason.is_error() { reason } else { Reason::UnspecifiedError };
                    out.put_u8(reason as u8);
                }
                Ok(())
            }
            Packet::Unsuback(p) => {
                let reasons = if v5 { p.reasons.len() } else { 0 };
                subscription(0xB0, p.packet_id, p.properties, reasons, version, out)?;
                p.reasons.iter().take(reasons).for_each(|reason| out.put_u8(reason as u8));
                Ok(())
            }
            Packet::Pingreq => {
                out.put_slice(&[0xC0, 0]);
                Ok(())
            }
            Packet::Pingresp => {
                out.put_slice(&[0xD0, 0]);
                Ok(())
            }
            Packet::Disconnect(p) => reasoned(0xE0, p.reason, p.properties, version, out),
            Packet::Auth(_) if !v5 => Err(EncodeError::NotInVersion),
            Packet::Auth(p) => reasoned(0xF0, p.reason, p.properties, version, out),
        }
    }
}

#[inline]
pub(crate) fn header(first: u8, body_bytes: usize, out: &mut BytesMut) -> Result<(), EncodeError> {
    if body_bytes > VARINT_MAX {
        return Err(EncodeError::TooLarge);
    }
    out.reserve(5 + body_bytes);
    if body_bytes < 128 {
        out.put_slice(&[first, body_bytes as u8]);
        return Ok(());
    }
    out.put_u8(first);
    put_varint(out, body_bytes)
}

const fn properties_bytes(properties: Properties<'_>) -> usize {
    let bytes = properties.as_bytes().len();
    varint_bytes(bytes) + bytes
}

fn properties(properties: Properties<'_>, out: &mut BytesMut) -> Result<(), EncodeError> {
    put_varint(out, properties.as_bytes().len())?;
    out.put_slice(properties.as_bytes());
    Ok(())
}

fn connect(p: &Connect<'_>, out: &mut BytesMut) -> Result<(), EncodeError> {
    let v5 = p.version == Version::V5;
    let list = |properties| if v5 { properties_bytes(properties) } else { 0 };
    let will = p.will.map_or(0, |w| list(w.properties) + 4 + w.topic.len() + w.payload.len());
    let username = p.username.map_or(0, |u| 2 + u.len());
    let password = p.password.map_or(0, |p| 2 + p.len());
    header(0x10, 10 + list(p.properties) + 2 + p.client_id.len() + will + username + password, out)?;
    out.put_slice(b"\0\x04MQTT");
    out.put_u8(p.version as u8);
    let will_flags = p.will.map_or(0, |w| 0x04 | (w.qos as u8) << 3 | u8::from(w.retain) << 5);
    let flags = u8::from(p.clean_start) << 1
        | will_flags
        | u8::from(p.password.is_some()) << 6
        | u8::from(p.username.is_some()) << 7;
    out.put_u8(flags);
    out.put_u16(p.keep_alive);
    if v5 {
        properties(p.properties, out)?;
    }
    put_binary(out, p.client_id.as_bytes())?;
    if let Some(w) = &p.will {
        if v5 {
            properties(w.properties, out)?;
        }
        put_binary(out, w.topic.as_bytes())?;
        put_binary(out, w.payload)?;
    }
    if let Some(username) = p.username {
        put_binary(out, username.as_bytes())?;
    }
    if let Some(password) = p.password {
        put_binary(out, password)?;
    }
    Ok(())
}

/// The first byte of a PUBLISH.
#[inline]
pub(crate) const fn publish_first(dup: bool, qos: Qos, retain: bool) -> u8 {
    0x30 | (dup as u8) << 3 | (qos as u8) << 1 | retain as u8
}

/// Fixed header, topic (in two pieces) and packet identifier of a PUBLISH. On an error nothing was written.
#[inline]
pub(crate) fn publish_head(
    first: u8,
    body_bytes: usize,
    (prefix, topic): (&str, &str),
    packet_id: Option<PacketId>,
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    let topic_bytes = u16::try_from(prefix.len() + topic.len()).map_err(|_| EncodeError::TooLarge)?.to_be_bytes();
    if body_bytes > VARINT_MAX {
        return Err(EncodeError::TooLarge);
    }
    out.reserve(5 + body_bytes);
    if body_bytes < 128 {
        out.put_slice(&[first, body_bytes as u8, topic_bytes[0], topic_bytes[1]]);
    } else if body_bytes < 16_384 {
        out.put_slice(&[first, body_bytes as u8 | 0x80, (body_bytes >> 7) as u8, topic_bytes[0], topic_bytes[1]]);
    } else {
        out.put_u8(first);
        put_varint(out, body_bytes)?;
        out.put_slice(&topic_bytes);
    }
    if !prefix.is_empty() {
        out.put_slice(prefix.as_bytes());
    }
    out.put_slice(topic.as_bytes());
    if let Some(id) = packet_id {
        out.put_u16(id.get());
    }
    Ok(())
}

fn publish(p: &Publish<'_>, version: Version, out: &mut BytesMut) -> Result<(), EncodeError> {
    if p.packet_id.is_some() != (p.qos != Qos::AtMostOnce) {
        return Err(EncodeError::PacketId);
    }
    let list = if version == Version::V5 { properties_bytes(p.properties) } else { 0 };
    let id = if p.packet_id.is_some() { 2 } else { 0 };
    let body = 2 + p.topic.len() + id + list + p.payload.len();
    publish_head(publish_first(p.dup, p.qos, p.retain), body, ("", p.topic), p.packet_id, out)?;
    if version == Version::V5 {
        properties(p.properties, out)?;
    }
    out.put_slice(p.payload);
    Ok(())
}

pub(crate) fn ack(first: u8, p: &Ack<'_>, version: Version, out: &mut BytesMut) -> Result<(), EncodeError> {
    let [high, low] = p.packet_id.get().to_be_bytes();
    if version == Version::V311 || (p.reason == Reason::Success && p.properties.is_empty()) {
        out.put_slice(&[first, 2, high, low]);
        return Ok(());
    }
    if p.properties.is_empty() {
        out.put_slice(&[first, 3, high, low, p.reason as u8]);
        return Ok(());
    }
    header(first, 3 + properties_bytes(p.properties), out)?;
    out.put_slice(&[high, low, p.reason as u8]);
    properties(p.properties, out)
}

/// Header, identifier and properties of SUBSCRIBE, SUBACK, UNSUBSCRIBE and UNSUBACK; `rest` bytes are to follow.
fn subscription(
    first: u8,
    packet_id: PacketId,
    list: Properties<'_>,
    rest: usize,
    version: Version,
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    let v5 = version == Version::V5;
    header(first, 2 + if v5 { properties_bytes(list) } else { 0 } + rest, out)?;
    out.put_u16(packet_id.get());
    if v5 { properties(list, out) } else { Ok(()) }
}

/// DISCONNECT and AUTH: reason and properties, both left out when they say nothing.
fn reasoned(
    first: u8,
    reason: Reason,
    list: Properties<'_>,
    version: Version,
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    if version == Version::V311 || (reason == Reason::Success && list.is_empty()) {
        out.put_slice(&[first, 0]);
        return Ok(());
    }
    header(first, 1 + properties_bytes(list), out)?;
    out.put_u8(reason as u8);
    properties(list, out)
}
