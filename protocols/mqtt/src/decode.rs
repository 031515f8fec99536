//! Bytes to packets: strict, borrowing, without allocation or panic.

use crate::error::Error;
use crate::packet::{
    Ack, Auth, Connack, Connect, Disconnect, Filters, Packet, PacketId, Publish, Qos, ReasonList, Reasons, Suback,
    Subscribe, SubscribeOptions, Unsuback, Unsubscribe, Version, Will,
};
use crate::property::{Context, Properties};
use crate::reason::Reason;
use crate::topic;

/// The fixed header of a packet whose end is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Packet type and flags.
    pub first: u8,
    /// Bytes of the fixed header, 2 to 5.
    pub header_bytes: usize,
    /// Bytes of the whole packet, header included.
    pub packet_bytes: usize,
}

impl Frame {
    /// Reads the fixed header at the start of `input`; None while it is incomplete. The rest of the packet need not be there.
    ///
    /// # Errors
    /// A length of more than four bytes, or a packet above `packet_bytes_max`.
    #[inline]
    pub fn peek(input: &[u8], packet_bytes_max: usize) -> Result<Option<Frame>, Error> {
        let Some((first, rest)) = input.split_first() else { return Ok(None) };
        let mut length = 0_usize;
        for (index, byte) in rest.iter().take(4).enumerate() {
            length |= usize::from(byte & 0x7F) << (7 * index);
            if byte & 0x80 == 0 {
                let header_bytes = index + 2;
                let packet_bytes = header_bytes + length;
                if packet_bytes > packet_bytes_max {
                    return Err(Error::PacketTooLarge { bytes: packet_bytes, bytes_max: packet_bytes_max });
                }
                return Ok(Some(Frame { first: *first, header_bytes, packet_bytes }));
            }
        }
        if rest.len() >= 4 { Err(Error::Malformed("remaining length is longer than four bytes")) } else { Ok(None) }
    }

    /// Whether the length was written in as few bytes as possible, which MQTT 5 demands (`[MQTT-1.5.5-1]`).
    #[inline]
    pub(crate) const fn is_minimal(&self) -> bool {
        let body = self.packet_bytes - self.header_bytes;
        self.header_bytes == 2
            || (self.header_bytes == 3 && body > 127)
            || (self.header_bytes == 4 && body > 16_383)
            || (self.header_bytes == 5 && body > 2_097_151)
    }
}

/// Decodes the packet at the start of `input` and says how many bytes it took; None while it is incomplete.
///
/// `version` is what CONNECT negotiated; a CONNECT says its own.
pub fn decode(input: &[u8], version: Version, packet_bytes_max: usize) -> Result<Option<(Packet<'_>, usize)>, Error> {
    let Some(frame) = Frame::peek(input, packet_bytes_max)? else { return Ok(None) };
    let Some(packet) = input.get(..frame.packet_bytes) else { return Ok(None) };
    Ok(Some((Packet::decode(frame, packet, version)?, frame.packet_bytes)))
}

impl<'a> Packet<'a> {
    /// Decodes one whole packet, header included, as `frame` found it.
    pub fn decode(frame: Frame, packet: &'a [u8], version: Version) -> Result<Self, Error> {
        if version == Version::V5 && !frame.is_minimal() {
            return Err(Error::Malformed("remaining length is not in its shortest form"));
        }
        let body = packet.get(frame.header_bytes..frame.packet_bytes).ok_or(TRUNCATED)?;
        let r = &mut Reader::new(body);
        let flags = frame.first & 0x0F;
        let kind = frame.first >> 4;
        if kind == 3 {
            return Ok(Packet::Publish(publish(flags, r, version)?));
        }
        // PUBREL, SUBSCRIBE and UNSUBSCRIBE have flags 2, all others 0 (`[MQTT-2.1.3-1]`).
        if flags != if matches!(kind, 6 | 8 | 10) { 2 } else { 0 } {
            return Err(Error::Malformed("reserved flags"));
        }
        let packet = match kind {
            1 => Packet::Connect(connect(r)?),
            2 => Packet::Connack(connack(r, version)?),
            4 => Packet::Puback(ack(r, version, Reason::in_puback)?),
            5 => Packet::Pubrec(ack(r, version, Reason::in_puback)?),
            6 => Packet::Pubrel(ack(r, version, Reason::in_pubrel)?),
            7 => Packet::Pubcomp(ack(r, version, Reason::in_pubrel)?),
            8 => Packet::Subscribe(subscribe(r, version)?),
            9 => Packet::Suback(suback(r, version)?),
            10 => Packet::Unsubscribe(unsubscribe(r, version)?),
            11 => Packet::Unsuback(unsuback(r, version)?),
            12 => Packet::Pingreq,
            13 => Packet::Pingresp,
            14 => Packet::Disconnect(disconnect(r, version)?),
            15 if version == Version::V5 => Packet::Auth(auth(r)?),
            _ => return Err(Error::Malformed("reserved packet type")),
        };
        if r.is_empty() { Ok(packet) } else { Err(Error::Malformed("bytes after the end of the packet")) }
    }
}

#[inline]
pub(crate) fn publish<'a>(flags: u8, r: &mut Reader<'a>, version: Version) -> Result<Publish<'a>, Error> {
    let Some(qos) = Qos::from_u8(flags >> 1 & 3) else { return Err(Error::Malformed("publish with QoS 3")) };
    let dup = flags & 8 != 0;
    if dup && qos == Qos::AtMostOnce {
        return Err(Error::Malformed("DUP on a QoS 0 publish"));
    }
    let topic = r.text()?;
    if topic::has_wildcard(topic) {
        return Err(Error::TopicName("has a wildcard"));
    }
    let packet_id = if qos == Qos::AtMostOnce { None } else { Some(r.packet_id()?) };
    let properties = match version {
        Version::V5 => Properties::read(r, Context::Publish)?,
        Version::V311 => Properties::EMPTY,
    };
    if topic.is_empty() && (version == Version::V311 || !has_topic_alias(properties)) {
        return Err(Error::TopicName("is empty"));
    }
    Ok(Publish { dup, qos, retain: flags & 1 != 0, topic, packet_id, properties, payload: r.rest() })
}

fn has_topic_alias(properties: Properties<'_>) -> bool {
    properties.iter().any(|p| matches!(p, crate::property::Property::TopicAlias(_)))
}

fn connect<'a>(r: &mut Reader<'a>) -> Result<Connect<'a>, Error> {
    let name = r.binary()?;
    let level = r.u8()?;
    let version = match (name, level) {
        (b"MQTT", 4) => Version::V311,
        (b"MQTT", 5) => Version::V5,
        (b"MQTT" | b"MQIsdp", _) => return Err(Error::UnsupportedVersion(level)),
        _ => return Err(Error::Malformed("protocol name is not MQTT")),
    };
    let flags = r.u8()?;
    if flags & 1 != 0 {
        return Err(Error::Malformed("reserved connect flag"));
    }
    let has_username = flags & 0x80 != 0;
    let has_password = flags & 0x40 != 0;
    if version == Version::V311 && has_password && !has_username {
        return Err(Error::Malformed("password without a user name"));
    }
    let has_will = flags & 4 != 0;
    let will_retain = flags & 0x20 != 0;
    let Some(will_qos) = Qos::from_u8(flags >> 3 & 3) else { return Err(Error::Malformed("will with QoS 3")) };
    if !has_will && (will_retain || will_qos != Qos::AtMostOnce) {
        return Err(Error::Malformed("will flags without a will"));
    }
    let keep_alive = r.u16()?;
    let properties = match version {
        Version::V5 => Properties::read(r, Context::Connect)?,
        Version::V311 => Properties::EMPTY,
    };
    let client_id = r.text()?;
    let will = if has_will {
        let properties = match version {
            Version::V5 => Properties::read(r, Context::Will)?,
            Version::V311 => Properties::EMPTY,
        };
        let topic = r.text()?;
        topic::check_name(topic)?;
        Some(Will { qos: will_qos, retain: will_retain, properties, topic, payload: r.binary()? })
    } else {
        None
    };
    let username = if has_username { Some(r.text()?) } else { None };
    let password = if has_password { Some(r.binary()?) } else { None };
    Ok(Connect { version, clean_start: flags & 2 != 0, keep_alive, properties, client_id, will, username, password })
}

fn connack<'a>(r: &mut Reader<'a>, version: Version) -> Result<Connack<'a>, Error> {
    let session_present = match r.u8()? {
        0 => false,
        1 => true,
        _ => return Err(Error::Malformed("reserved connect acknowledge flags")),
    };
    let code = r.u8()?;
    let (reason, properties) = match version {
        Version::V5 => (known(code, Reason::in_connack)?, Properties::read(r, Context::Connack)?),
        Version::V311 => {
            let reason = Reason::from_connack_311(code).ok_or(Error::Malformed("reserved connect return code"))?;
            (reason, Properties::EMPTY)
        }
    };
    if session_present && reason.is_error() {
        return Err(Error::Protocol("session present on a refusal"));
    }
    Ok(Connack { session_present, reason, properties })
}

/// In MQTT 5, the reason may be left out when it is success, and the properties when there are none (section 3.4.2.2.1).
fn ack<'a>(r: &mut Reader<'a>, version: Version, allowed: fn(Reason) -> bool) -> Result<Ack<'a>, Error> {
    let packet_id = r.packet_id()?;
    if version == Version::V311 || r.is_empty() {
        return Ok(Ack { packet_id, reason: Reason::Success, properties: Properties::EMPTY });
    }
    let reason = known(r.u8()?, allowed)?;
    let properties = if r.is_empty() { Properties::EMPTY } else { Properties::read(r, Context::Ack)? };
    Ok(Ack { packet_id, reason, properties })
}

fn subscribe<'a>(r: &mut Reader<'a>, version: Version) -> Result<Subscribe<'a>, Error> {
    let packet_id = r.packet_id()?;
    let properties = match version {
        Version::V5 => Properties::read(r, Context::Subscribe)?,
        Version::V311 => Properties::EMPTY,
    };
    let list = r.rest();
    let rest = &mut Reader::new(list);
    if rest.is_empty() {
        return Err(Error::Protocol("subscribe without a topic filter"));
    }
    while !rest.is_empty() {
        let filter = rest.text()?;
        topic::check_filter(filter)?;
        let bits = rest.u8()?;
        let options = SubscribeOptions::from_bits(bits).ok_or(Error::Malformed("reserved subscription options"))?;
        if version == Version::V311 && bits > 2 {
            return Err(Error::Malformed("reserved bits beside the requested QoS"));
        }
        if options.no_local && topic::shared(filter).is_some() {
            return Err(Error::Protocol("no local on a shared subscription"));
        }
    }
    Ok(Subscribe { packet_id, properties, filters: Filters { list, with_options: true } })
}

fn unsubscribe<'a>(r: &mut Reader<'a>, version: Version) -> Result<Unsubscribe<'a>, Error> {
    let packet_id = r.packet_id()?;
    let properties = match version {
        Version::V5 => Properties::read(r, Context::Unsubscribe)?,
        Version::V311 => Properties::EMPTY,
    };
    let list = r.rest();
    let rest = &mut Reader::new(list);
    if rest.is_empty() {
        return Err(Error::Protocol("unsubscribe without a topic filter"));
    }
    while !rest.is_empty() {
        topic::check_filter(rest.text()?)?;
    }
    Ok(Unsubscribe { packet_id, properties, filters: Filters { list, with_options: false } })
}

fn suback<'a>(r: &mut Reader<'a>, version: Version) -> Result<Suback<'a>, Error> {
    let packet_id = r.packet_id()?;
    let (properties, allowed): (_, fn(Reason) -> bool) = match version {
        Version::V5 => (Properties::read(r, Context::Suback)?, Reason::in_suback),
        Version::V311 => (Properties::EMPTY, |reason| {
            matches!(reason, Reason::Success | Reason::GrantedQos1 | Reason::GrantedQos2 | Reason::UnspecifiedError)
        }),
    };
    Ok(Suback { packet_id, properties, reasons: reasons(r, allowed)? })
}

fn unsuback<'a>(r: &mut Reader<'a>, version: Version) -> Result<Unsuback<'a>, Error> {
    let packet_id = r.packet_id()?;
    match version {
        Version::V5 => {
            let properties = Properties::read(r, Context::Suback)?;
            Ok(Unsuback { packet_id, properties, reasons: reasons(r, Reason::in_unsuback)? })
        }
        Version::V311 => Ok(Unsuback { packet_id, properties: Properties::EMPTY, reasons: Reasons::new(&[]) }),
    }
}

fn reasons<'a>(r: &mut Reader<'a>, allowed: fn(Reason) -> bool) -> Result<Reasons<'a>, Error> {
    let codes = r.rest();
    if codes.is_empty() {
        return Err(Error::Malformed("acknowledgement without a reason code"));
    }
    for code in codes {
        known(*code, allowed)?;
    }
    Ok(Reasons(ReasonList::Read(codes)))
}

fn disconnect<'a>(r: &mut Reader<'a>, version: Version) -> Result<Disconnect<'a>, Error> {
    if version == Version::V311 || r.is_empty() {
        return Ok(Disconnect { reason: Reason::Success, properties: Properties::EMPTY });
    }
    let reason = known(r.u8()?, Reason::in_disconnect)?;
    let properties = if r.is_empty() { Properties::EMPTY } else { Properties::read(r, Context::Disconnect)? };
    Ok(Disconnect { reason, properties })
}

fn auth<'a>(r: &mut Reader<'a>) -> Result<Auth<'a>, Error> {
    if r.is_empty() {
        return Ok(Auth { reason: Reason::Success, properties: Properties::EMPTY });
    }
    let reason = known(r.u8()?, Reason::in_auth)?;
    Ok(Auth { reason, properties: Properties::read(r, Context::Auth)? })
}

fn known(code: u8, allowed: fn(Reason) -> bool) -> Result<Reason, Error> {
    Reason::from_u8(code).filter(|r| allowed(*r)).ok_or(Error::Malformed("reason code is not one of this packet's"))
}

const TRUNCATED: Error = Error::Malformed("packet ends too early");

/// A cursor over the body of one packet. Every read is checked; the end is an error, not a wait, because the frame is whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Reader(bytes)
    }

    #[inline]
    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[inline]
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    #[inline]
    pub(crate) fn take(&mut self, bytes: usize) -> Result<&'a [u8], Error> {
        let (head, tail) = self.0.split_at_checked(bytes).ok_or(TRUNCATED)?;
        self.0 = tail;
        Ok(head)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(TRUNCATED)?;
        self.0 = tail;
        Ok(*head)
    }

    #[inline]
    pub(crate) fn u8(&mut self) -> Result<u8, Error> {
        self.array::<1>().map(|[b]| b)
    }

    #[inline]
    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        self.array().map(u16::from_be_bytes)
    }

    #[inline]
    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_be_bytes)
    }

    #[inline]
    pub(crate) fn packet_id(&mut self) -> Result<PacketId, Error> {
        PacketId::new(self.u16()?).ok_or(Error::Malformed("packet identifier is 0"))
    }

    /// A variable byte integer in its shortest form (MQTT 5 section 1.5.5).
    #[inline]
    pub(crate) fn varint(&mut self) -> Result<u32, Error> {
        let mut value = 0_u32;
        for shift in [0, 7, 14, 21] {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(Error::Malformed("variable byte integer is not in its shortest form"));
                }
                return Ok(value);
            }
        }
        Err(Error::Malformed("variable byte integer is longer than four bytes"))
    }

    #[inline]
    pub(crate) fn binary(&mut self) -> Result<&'a [u8], Error> {
        let bytes = self.u16()?;
        self.take(bytes.into())
    }

    /// UTF-8 without NUL (`[MQTT-1.5.4-1]`, `[MQTT-1.5.4-2]`). Control characters and non-characters, which a receiver may refuse, are let through.
    #[inline]
    pub(crate) fn text(&mut self) -> Result<&'a str, Error> {
        let bytes = self.binary()?;
        if bytes.iter().fold(false, |found, b| found | (*b == 0)) {
            return Err(Error::Malformed("text has a NUL"));
        }
        std::str::from_utf8(bytes).map_err(|_| Error::Malformed("text is not UTF-8"))
    }
}
