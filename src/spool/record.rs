//! How messages look on disk: a pack is a header and the records of one commit, back to back; a row holds one pack or several.
//!
//! ```text
//! pack    version u8 = 1 | epoch u32 | records u32 | body bytes u32 | crc32 u32 (all little-endian; the crc covers the rest of the header and the body)
//! record  flags u8 | extension flags u8, if flagged | seq, zigzag delta | ingested_ms, zigzag delta | epoch, if flagged
//!         | topic | device, if flagged | payload | properties, as flagged
//! ```
//! Integers are LEB128 varints; texts and bytes are a varint length and the bytes. Deltas run from the record before, the first from zero. A
//! device that is the second level of its topic (`dev/DEVICE/...`) is not written twice.
//!
//! Promises: a message survives the round trip except for `origin.session`, which means nothing after it ended, and an empty set of
//! properties, which becomes none; any bytes decode to messages or to an error, never to a panic; a flipped bit is an error.

use std::fmt;

use bytes::Bytes;

use crate::message::{DeviceId, Message, MessageId, Origin, Properties, Protocol, Qos, Topic};

/// Bytes of a pack's header.
pub(super) const HEADER_BYTES: usize = 17;

const VERSION: u8 = 1;

/// A record's fixed parts at their longest: two flag bytes, three varints of ten bytes, five lengths of five.
const RECORD_OVERHEAD_MAX: usize = 57;

mod flag {
    pub const QOS: u8 = 0b0000_0011;
    pub const RETAIN: u8 = 0b0000_0100;
    pub const PROTOCOL_SHIFT: u8 = 3;
    pub const PROTOCOL: u8 = 0b0001_1000;
    pub const DEVICE_WRITTEN: u8 = 0b0010_0000;
    pub const DEVICE_IN_TOPIC: u8 = 0b0100_0000;
    pub const EXTENDED: u8 = 0b1000_0000;
}

mod extension {
    pub const EPOCH: u8 = 1;
    pub const CONTENT_TYPE: u8 = 1 << 1;
    pub const UTF8: u8 = 1 << 2;
    pub const EXPIRY: u8 = 1 << 3;
    pub const RESPONSE_TOPIC: u8 = 1 << 4;
    pub const CORRELATION: u8 = 1 << 5;
    pub const TRACEPARENT: u8 = 1 << 6;
    pub const USER: u8 = 1 << 7;
    pub const PROPERTIES: u8 = !EPOCH;
}

/// Why bytes are not packs of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Truncated,
    UnknownVersion(u8),
    Checksum,
    Field(&'static str),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::Truncated => f.write_str("truncated"),
            Damage::UnknownVersion(version) => write!(f, "unknown format version {version}"),
            Damage::Checksum => f.write_str("checksum does not match"),
            Damage::Field(name) => write!(f, "field {name} is not valid"),
        }
    }
}

impl std::error::Error for Damage {}

/// A pack being filled. Its buffer is kept from one commit to the next.
#[derive(Debug, Default)]
pub(super) struct Pack {
    data: Vec<u8>,
    records: u32,
    epoch: u32,
    seq: u64,
    ingested_ms: u64,
    oldest_ms: u64,
    newest_ms: u64,
}

impl Pack {
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    pub fn records(&self) -> u32 {
        self.records
    }

    /// Bytes so far, header included; 0 when empty.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    pub fn oldest_ms(&self) -> u64 {
        self.oldest_ms
    }

    pub fn newest_ms(&self) -> u64 {
        self.newest_ms
    }

    pub fn clear(&mut self, keep_bytes_max: usize) {
        self.data.clear();
        self.data.shrink_to(keep_bytes_max);
        *self = Pack { data: std::mem::take(&mut self.data), ..Pack::default() };
    }

    /// Appends one record.
    pub fn push(&mut self, message: &Message) {
        if self.data.is_empty() {
            self.epoch = message.id.epoch;
            self.data.push(VERSION);
            self.data.extend_from_slice(&self.epoch.to_le_bytes());
            self.data.extend_from_slice(&[0; HEADER_BYTES - 5]);
            self.oldest_ms = message.ingested_ms;
            self.newest_ms = message.ingested_ms;
        }
        let out = &mut self.data;
        let device = message.origin.device.as_ref();
        let in_topic = device.is_some_and(|d| message.topic.levels().nth(1) == Some(d.as_str()));
        let properties = message.properties.as_deref();
        let mut extended = properties.map_or(0, extension_flags);
        if message.id.epoch != self.epoch {
            extended |= extension::EPOCH;
        }
        let mut flags = message.qos as u8 | (protocol_code(message.origin.protocol) << flag::PROTOCOL_SHIFT);
        if message.retain {
            flags |= flag::RETAIN;
        }
        match (device, in_topic) {
            (Some(_), true) => flags |= flag::DEVICE_IN_TOPIC,
            (Some(_), false) => flags |= flag::DEVICE_WRITTEN,
            (None, _) => {}
        }
        if extended != 0 {
            flags |= flag::EXTENDED;
        }
        out.push(flags);
        if extended != 0 {
            out.push(extended);
        }
        put_varint(out, zigzag(message.id.seq.wrapping_sub(self.seq)));
        put_varint(out, zigzag(message.ingested_ms.wrapping_sub(self.ingested_ms)));
        if extended & extension::EPOCH != 0 {
            put_varint(out, u64::from(message.id.epoch));
        }
        put_bytes(out, message.topic.as_str().as_bytes());
        if let (Some(device), false) = (device, in_topic) {
            put_bytes(out, device.as_str().as_bytes());
        }
        put_bytes(out, &message.payload);
        if let Some(properties) = properties {
            put_properties(out, properties);
        }
        self.records += 1;
        self.seq = message.id.seq;
        self.ingested_ms = message.ingested_ms;
        self.oldest_ms = self.oldest_ms.min(message.ingested_ms);
        self.newest_ms = self.newest_ms.max(message.ingested_ms);
    }

    /// The bytes; complete once [`seal`](Pack::seal)ed.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Completes the header and lends the bytes.
    pub fn seal(&mut self) -> &[u8] {
        if let Some((header, body)) = self.data.split_at_mut_checked(HEADER_BYTES) {
            header[5..9].copy_from_slice(&self.records.to_le_bytes());
            // A pack stays far below 4 GiB: a commit closes after `commit_bytes_max`, and a message is limited by its protocol.
            header[9..13].copy_from_slice(&(body.len() as u32).to_le_bytes());
            let crc = crc32(crc32(0, &header[..13]), body);
            header[13..].copy_from_slice(&crc.to_le_bytes());
        }
        &self.data
    }
}

/// An upper bound of what [`Pack::push`] adds for this message.
pub(super) fn record_bytes_max(message: &Message) -> usize {
    let text = |t: &Option<Box<str>>| t.as_ref().map_or(0, |t| t.len());
    let properties = message.properties.as_deref().map_or(0, |p| {
        let user: usize = p.user.iter().map(|(key, value)| key.len() + value.len() + 10).sum();
        let texts = text(&p.content_type) + text(&p.response_topic) + text(&p.traceparent);
        texts + p.correlation.as_ref().map_or(0, Bytes::len) + user + 30
    });
    let device = message.origin.device.as_ref().map_or(0, |d| d.as_str().len());
    RECORD_OVERHEAD_MAX + message.topic.as_str().len() + device + message.payload.len() + properties
}

/// Decodes every pack of a row. Payloads are slices of `row`, so they pin it.
pub(super) fn decode(row: &Bytes) -> Result<Vec<Message>, Damage> {
    let mut rest = row.clone();
    let mut messages = Vec::new();
    while !rest.is_empty() {
        decode_pack(&mut rest, &mut messages)?;
    }
    Ok(messages)
}

fn decode_pack(rest: &mut Bytes, messages: &mut Vec<Message>) -> Result<(), Damage> {
    let Header { epoch, records, end } = Header::read(rest)?;
    let pack = rest.split_to(end);
    let mut input = Input::new(pack.slice(HEADER_BYTES..));
    let (mut seq, mut ingested_ms) = (0u64, 0u64);
    // The smallest record is 5 bytes (flags, two deltas, one-byte lengths), so a lying count cannot make us reserve much.
    messages.reserve((records as usize).min((end - HEADER_BYTES) / 5 + 1));
    for _ in 0..records {
        let message = input.record(epoch, &mut seq, &mut ingested_ms)?;
        messages.push(message);
    }
    if input.is_at_end() { Ok(()) } else { Err(Damage::Field("records")) }
}

/// What a pack begins with.
struct Header {
    epoch: u32,
    records: u32,
    /// Where the pack ends.
    end: usize,
}

impl Header {
    fn parse(header: [u8; HEADER_BYTES]) -> Header {
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Header { epoch: word(1), records: word(5), end: HEADER_BYTES.saturating_add(word(9) as usize) }
    }

    /// Reads the header and checks version, length and sum.
    fn read(rest: &Bytes) -> Result<Header, Damage> {
        let bytes: [u8; HEADER_BYTES] =
            rest.get(..HEADER_BYTES).and_then(|h| h.try_into().ok()).ok_or(Damage::Truncated)?;
        if bytes[0] != VERSION {
            return Err(Damage::UnknownVersion(bytes[0]));
        }
        let header = Header::parse(bytes);
        let body = rest.get(HEADER_BYTES..header.end).ok_or(Damage::Truncated)?;
        let crc = u32::from_le_bytes([bytes[13], bytes[14], bytes[15], bytes[16]]);
        if crc32(crc32(0, &bytes[..13]), body) != crc {
            return Err(Damage::Checksum);
        }
        Ok(header)
    }
}

/// Whether a row of one pack is whole.
pub(super) fn check(row: &Bytes) -> Result<(), Damage> {
    let header = Header::read(row)?;
    if header.end == row.len() { Ok(()) } else { Err(Damage::Truncated) }
}

/// The record at `index` of a row of one pack that was [`check`]ed; None behind the last. Its payload is a copy.
pub(super) fn nth(row: &Bytes, index: u32) -> Result<Option<Message>, Damage> {
    let Some(head) = row.get(..HEADER_BYTES).and_then(|h| h.try_into().ok()).map(Header::parse) else {
        return Err(Damage::Truncated);
    };
    if index >= head.records {
        return Ok(None);
    }
    let mut input = Input::new(row.slice(HEADER_BYTES..));
    let (mut seq, mut ingested_ms) = (0u64, 0u64);
    for _ in 0..index {
        input.skip(&mut seq, &mut ingested_ms)?;
    }
    let mut message = input.record(head.epoch, &mut seq, &mut ingested_ms)?;
    message.payload = Bytes::copy_from_slice(&message.payload);
    if let Some(correlation) = message.properties.as_mut().and_then(|p| p.correlation.as_mut()) {
        *correlation = Bytes::copy_from_slice(correlation);
    }
    Ok(Some(message))
}

/// A cursor over encoded bytes.
pub(super) struct Input {
    data: Bytes,
    at: usize,
}

impl Input {
    pub fn new(data: Bytes) -> Input {
        Input { data, at: 0 }
    }

    pub fn is_at_end(&self) -> bool {
        self.at == self.data.len()
    }

    /// Passes over a record without making anything of it but what the next one counts from.
    fn skip(&mut self, seq: &mut u64, ingested_ms: &mut u64) -> Result<(), Damage> {
        let flags = self.byte()?;
        let extended = if flags & flag::EXTENDED != 0 { self.byte()? } else { 0 };
        *seq = seq.wrapping_add(unzigzag(self.varint()?));
        *ingested_ms = ingested_ms.wrapping_add(unzigzag(self.varint()?));
        if extended & extension::EPOCH != 0 {
            self.varint()?;
        }
        self.range()?;
        if flags & flag::DEVICE_WRITTEN != 0 {
            self.range()?;
        }
        self.range()?;
        if extended & extension::CONTENT_TYPE != 0 {
            self.range()?;
        }
        if extended & extension::EXPIRY != 0 {
            self.varint()?;
        }
        for part in [extension::RESPONSE_TOPIC, extension::CORRELATION, extension::TRACEPARENT] {
            if extended & part != 0 {
                self.range()?;
            }
        }
        if extended & extension::USER != 0 {
            for _ in 0..self.varint()? {
                self.range()?;
                self.range()?;
            }
        }
        Ok(())
    }

    fn record(&mut self, epoch: u32, seq: &mut u64, ingested_ms: &mut u64) -> Result<Message, Damage> {
        let flags = self.byte()?;
        let extended = if flags & flag::EXTENDED != 0 { self.byte()? } else { 0 };
        *seq = seq.wrapping_add(unzigzag(self.varint()?));
        *ingested_ms = ingested_ms.wrapping_add(unzigzag(self.varint()?));
        let epoch = match extended & extension::EPOCH {
            0 => epoch,
            _ => u32::try_from(self.varint()?).map_err(|_| Damage::Field("epoch"))?,
        };
        let topic = Topic::parse(self.text("topic")?).map_err(|_| Damage::Field("topic"))?;
        let device = match (flags & flag::DEVICE_WRITTEN != 0, flags & flag::DEVICE_IN_TOPIC != 0) {
            (false, false) => None,
            (true, false) => Some(DeviceId::parse(self.text("device")?).map_err(|_| Damage::Field("device"))?),
            (false, true) => {
                let level = topic.levels().nth(1).ok_or(Damage::Field("device"))?;
                Some(DeviceId::parse(level).map_err(|_| Damage::Field("device"))?)
            }
            (true, true) => return Err(Damage::Field("device")),
        };
        let payload = self.bytes()?;
        let properties = match extended & extension::PROPERTIES {
            0 => None,
            present => Some(Box::new(self.properties(present)?)),
        };
        Ok(Message {
            id: MessageId { epoch, seq: *seq },
            ingested_ms: *ingested_ms,
            topic,
            payload,
            qos: match flags & flag::QOS {
                0 => Qos::AtMostOnce,
                1 => Qos::AtLeastOnce,
                2 => Qos::ExactlyOnce,
                _ => return Err(Damage::Field("qos")),
            },
            retain: flags & flag::RETAIN != 0,
            origin: Origin {
                device,
                protocol: match (flags & flag::PROTOCOL) >> flag::PROTOCOL_SHIFT {
                    0 => Protocol::Http,
                    1 => Protocol::Mqtt,
                    2 => Protocol::Coap,
                    _ => Protocol::Gateway,
                },
                session: None,
            },
            properties,
        })
    }

    fn properties(&mut self, present: u8) -> Result<Properties, Damage> {
        let mut properties = Properties { payload_is_utf8: present & extension::UTF8 != 0, ..Properties::default() };
        if present & extension::CONTENT_TYPE != 0 {
            properties.content_type = Some(self.text("content_type")?.into());
        }
        if present & extension::EXPIRY != 0 {
            properties.expiry_secs = Some(u32::try_from(self.varint()?).map_err(|_| Damage::Field("expiry"))?);
        }
        if present & extension::RESPONSE_TOPIC != 0 {
            properties.response_topic = Some(self.text("response_topic")?.into());
        }
        if present & extension::CORRELATION != 0 {
            properties.correlation = Some(self.bytes()?);
        }
        if present & extension::TRACEPARENT != 0 {
            properties.traceparent = Some(self.text("traceparent")?.into());
        }
        if present & extension::USER != 0 {
            for _ in 0..self.varint()? {
                let key = self.text("user")?.into();
                properties.user.push((key, self.text("user")?.into()));
            }
        }
        Ok(properties)
    }

    pub fn byte(&mut self) -> Result<u8, Damage> {
        let byte = self.data.get(self.at).copied().ok_or(Damage::Truncated)?;
        self.at += 1;
        Ok(byte)
    }

    pub fn varint(&mut self) -> Result<u64, Damage> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                // The tenth byte has room for one bit; more would be lost.
                return if shift == 63 && byte > 1 { Err(Damage::Field("varint")) } else { Ok(value) };
            }
        }
        Err(Damage::Field("varint"))
    }

    fn range(&mut self) -> Result<std::ops::Range<usize>, Damage> {
        let length = usize::try_from(self.varint()?).map_err(|_| Damage::Truncated)?;
        let end = self.at.checked_add(length).filter(|&end| end <= self.data.len()).ok_or(Damage::Truncated)?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    pub fn bytes(&mut self) -> Result<Bytes, Damage> {
        let range = self.range()?;
        Ok(self.data.slice(range))
    }

    fn text(&mut self, name: &'static str) -> Result<&str, Damage> {
        let range = self.range()?;
        std::str::from_utf8(self.data.get(range).unwrap_or_default()).map_err(|_| Damage::Field(name))
    }
}

fn extension_flags(properties: &Properties) -> u8 {
    let mut flags = 0;
    let mut set = |present: bool, bit: u8| flags |= if present { bit } else { 0 };
    set(properties.content_type.is_some(), extension::CONTENT_TYPE);
    set(properties.payload_is_utf8, extension::UTF8);
    set(properties.expiry_secs.is_some(), extension::EXPIRY);
    set(properties.response_topic.is_some(), extension::RESPONSE_TOPIC);
    set(properties.correlation.is_some(), extension::CORRELATION);
    set(properties.traceparent.is_some(), extension::TRACEPARENT);
    set(!properties.user.is_empty(), extension::USER);
    flags
}

fn put_properties(out: &mut Vec<u8>, properties: &Properties) {
    if let Some(text) = &properties.content_type {
        put_bytes(out, text.as_bytes());
    }
    if let Some(secs) = properties.expiry_secs {
        put_varint(out, u64::from(secs));
    }
    if let Some(text) = &properties.response_topic {
        put_bytes(out, text.as_bytes());
    }
    if let Some(data) = &properties.correlation {
        put_bytes(out, data);
    }
    if let Some(text) = &properties.traceparent {
        put_bytes(out, text.as_bytes());
    }
    if !properties.user.is_empty() {
        put_varint(out, properties.user.len() as u64);
        for (key, value) in &properties.user {
            put_bytes(out, key.as_bytes());
            put_bytes(out, value.as_bytes());
        }
    }
}

fn protocol_code(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Http => 0,
        Protocol::Mqtt => 1,
        Protocol::Coap => 2,
        Protocol::Gateway => 3,
    }
}

fn put_bytes(out: &mut Vec<u8>, data: &[u8]) {
    put_varint(out, data.len() as u64);
    out.extend_from_slice(data);
}

pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Maps a wrapping difference to a small number when it is small in either direction.
fn zigzag(difference: u64) -> u64 {
    let signed = difference.cast_signed();
    ((signed << 1) ^ (signed >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> u64 {
    (value >> 1) ^ (value & 1).wrapping_neg()
}

/// CRC-32 of IEEE 802.3 (reflected, 0xEDB88320), eight bytes a step; `crc` is the value so far, 0 at first.
pub(super) fn crc32(crc: u32, data: &[u8]) -> u32 {
    let mut crc = !crc;
    let mut chunks = data.chunks_exact(8);
    for chunk in &mut chunks {
        let low = crc ^ u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        let [a, b, c, d] = low.to_le_bytes();
        crc = CRC_TABLES[7][a as usize]
            ^ CRC_TABLES[6][b as usize]
            ^ CRC_TABLES[5][c as usize]
            ^ CRC_TABLES[4][d as usize]
            ^ CRC_TABLES[3][chunk[4] as usize]
            ^ CRC_TABLES[2][chunk[5] as usize]
            ^ CRC_TABLES[1][chunk[6] as usize]
            ^ CRC_TABLES[0][chunk[7] as usize];
    }
    for &byte in chunks.remainder() {
        crc = (crc >> 8) ^ CRC_TABLES[0][usize::from(crc as u8 ^ byte)];
    }
    !crc
}

static CRC_TABLES: [[u32; 256]; 8] = crc_tables();

const fn crc_tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][i] = crc;
        i += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut i = 0;
        while i < 256 {
            let before = tables[table - 1][i];
            tables[table][i] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            i += 1;
        }
        table += 1;
    }
    tables
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text() -> impl Strategy<Value = Box<str>> {
        "[a-zäß/ -]{0,24}".prop_map(String::into_boxed_str)
    }

    fn properties() -> impl Strategy<Value = Option<Box<Properties>>> {
        let texts = (proptest::option::of(text()), proptest::option::of(text()), proptest::option::of(text()));
        let correlation = proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from));
        let user = proptest::collection::vec((text(), text()), 0..4);
        proptest::option::of((texts, any::<bool>(), proptest::option::of(any::<u32>()), correlation, user).prop_map(
            |((content_type, response_topic, traceparent), payload_is_utf8, expiry_secs, correlation, user)| {
                Box::new(Properties {
                    content_type,
                    payload_is_utf8,
                    expiry_secs,
                    response_topic,
                    correlation,
                    traceparent,
                    user,
                })
            },
        ))
    }

    pub fn message() -> impl Strategy<Value = Message> {
        let id = (any::<u32>(), any::<u64>()).prop_map(|(epoch, seq)| MessageId { epoch, seq });
        let device = proptest::option::of("[a-z]{1,8}".prop_map(|t| DeviceId::parse(&t).unwrap()));
        let protocol =
            prop_oneof![Just(Protocol::Http), Just(Protocol::Mqtt), Just(Protocol::Coap), Just(Protocol::Gateway)];
        let qos = prop_oneof![Just(Qos::AtMostOnce), Just(Qos::AtLeastOnce), Just(Qos::ExactlyOnce)];
        let payload = proptest::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
        let topic = "[a-zé]{1,5}(/[a-z]{0,8}){0,3}";
        let flags = (qos, any::<bool>(), any::<bool>());
        (id, any::<u64>(), device, protocol, flags, payload, topic, properties()).prop_map(
            |(id, ingested_ms, device, protocol, (qos, retain, own_topic), payload, topic, properties)| {
                let topic = match (&device, own_topic) {
                    (Some(device), true) => format!("dev/{device}/{topic}"),
                    _ => topic,
                };
                Message {
                    id,
                    ingested_ms,
                    topic: Topic::parse(&topic).unwrap(),
                    payload,
                    qos,
                    retain,
                    origin: Origin { device, protocol, session: None },
                    properties,
                }
            },
        )
    }

    fn normal(mut message: Message) -> Message {
        message.properties = message.properties.filter(|p| **p != Properties::default());
        message
    }

    fn packed(messages: &[Message]) -> Vec<u8> {
        let mut pack = Pack::default();
        for message in messages {
            pack.push(message);
        }
        pack.seal().to_vec()
    }

    proptest! {
        #[test]
        fn messages_survive_the_round_trip_alone_and_in_concatenated_packs(
            first in proptest::collection::vec(message(), 0..8),
            second in proptest::collection::vec(message(), 0..8),
        ) {
            let mut row = packed(&first);
            row.extend(packed(&second));
            let expected: Vec<Message> = first.into_iter().chain(second).map(normal).collect();
            prop_assert_eq!(decode(&Bytes::from(row)).unwrap(), expected);
        }

        #[test]
        fn a_record_is_never_larger_than_its_bound(message in message()) {
            let before = packed(std::slice::from_ref(&message)).len() - HEADER_BYTES;
            prop_assert!(before <= record_bytes_max(&message));
        }

        #[test]
        fn any_change_of_one_byte_or_of_the_length_is_found(
            messages in proptest::collection::vec(message(), 1..4),
            at in any::<proptest::sample::Index>(),
            flip in 1u8..,
        ) {
            let row = packed(&messages);
            let at = at.index(row.len());
            let mut changed = row.clone();
            changed[at] ^= flip;
            prop_assert!(decode(&Bytes::from(changed)).is_err());
            prop_assert!(at == 0 || decode(&Bytes::from(row[..at].to_vec())).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&Bytes::from(data));
        }

        /// A right checksum over nonsense reaches the field parsers, which the checksum otherwise shields.
        #[test]
        fn arbitrary_bodies_with_a_right_checksum_never_panic(
            body in proptest::collection::vec(any::<u8>(), 0..200),
            records in 0u32..6,
        ) {
            let mut data = vec![VERSION, 0, 0, 0, 0];
            data.extend(records.to_le_bytes());
            data.extend((body.len() as u32).to_le_bytes());
            let crc = crc32(crc32(0, &data), &body);
            data.extend(crc.to_le_bytes());
            data.extend(body);
            let _ = decode(&Bytes::from(data));
        }
    }

    #[test]
    fn the_checksum_is_the_well_known_one() {
        assert_eq!(crc32(0, b"123456789"), 0xCBF4_3926);
        assert_eq!(crc32(crc32(0, b"1234567890abc"), b"de"), crc32(0, b"1234567890abcde"));
    }

    #[test]
    fn a_small_telemetry_record_costs_few_bytes_beyond_its_texts() {
        let message = |seq| Message {
            id: MessageId { epoch: 1, seq },
            ingested_ms: 1_795_000_000_000 + seq,
            topic: Topic::parse("dev/sensor-0042/telemetry").unwrap(),
            payload: Bytes::from_static(b"{\"t\":21.5}"),
            qos: Qos::AtLeastOnce,
            retain: false,
            origin: Origin {
                device: Some(DeviceId::parse("sensor-0042").unwrap()),
                protocol: Protocol::Mqtt,
                session: None,
            },
            properties: None,
        };
        let one = packed(&[message(7)]).len();
        let two = packed(&[message(7), message(8)]).len();
        assert_eq!(two - one, 25 + 10 + 5);
    }
}
