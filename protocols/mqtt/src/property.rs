//! MQTT 5 properties (section 2.2.2): checked once at decode, then read in place.

use std::fmt;

use bytes::BufMut;

use crate::decode::Reader;
use crate::encode::{EncodeError, put_binary, put_varint, varint_bytes};
use crate::error::Error;
use crate::topic;

/// One property, borrowed from the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property<'a> {
    PayloadIsUtf8(bool),
    /// Seconds.
    MessageExpiry(u32),
    ContentType(&'a str),
    ResponseTopic(&'a str),
    Correlation(&'a [u8]),
    SubscriptionId(u32),
    /// Seconds; `u32::MAX` never expires.
    SessionExpiry(u32),
    AssignedClientId(&'a str),
    /// Seconds.
    ServerKeepAlive(u16),
    AuthMethod(&'a str),
    AuthData(&'a [u8]),
    RequestProblemInfo(bool),
    /// Seconds.
    WillDelay(u32),
    RequestResponseInfo(bool),
    ResponseInfo(&'a str),
    ServerReference(&'a str),
    ReasonString(&'a str),
    ReceiveMaximum(u16),
    TopicAliasMaximum(u16),
    TopicAlias(u16),
    MaximumQos(u8),
    RetainAvailable(bool),
    User(&'a str, &'a str),
    /// Bytes.
    MaximumPacketSize(u32),
    WildcardAvailable(bool),
    SubscriptionIdsAvailable(bool),
    SharedAvailable(bool),
}

/// The packet, or part of one, that a property list stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    Connect,
    Connack,
    Publish,
    Will,
    /// PUBACK, PUBREC, PUBREL and PUBCOMP.
    Ack,
    Subscribe,
    /// SUBACK and UNSUBACK.
    Suback,
    Unsubscribe,
    Disconnect,
    Auth,
}

impl Context {
    const fn bit(self) -> u16 {
        1 << self as u16
    }
}

const USER: u8 = 0x26;
const SUBSCRIPTION_ID: u8 = 0x0B;

impl<'a> Property<'a> {
    pub const fn id(&self) -> u8 {
        match self {
            Property::PayloadIsUtf8(_) => 0x01,
            Property::MessageExpiry(_) => 0x02,
            Property::ContentType(_) => 0x03,
            Property::ResponseTopic(_) => 0x08,
            Property::Correlation(_) => 0x09,
            Property::SubscriptionId(_) => SUBSCRIPTION_ID,
            Property::SessionExpiry(_) => 0x11,
            Property::AssignedClientId(_) => 0x12,
            Property::ServerKeepAlive(_) => 0x13,
            Property::AuthMethod(_) => 0x15,
            Property::AuthData(_) => 0x16,
            Property::RequestProblemInfo(_) => 0x17,
            Property::WillDelay(_) => 0x18,
            Property::RequestResponseInfo(_) => 0x19,
            Property::ResponseInfo(_) => 0x1A,
            Property::ServerReference(_) => 0x1C,
            Property::ReasonString(_) => 0x1F,
            Property::ReceiveMaximum(_) => 0x21,
            Property::TopicAliasMaximum(_) => 0x22,
            Property::TopicAlias(_) => 0x23,
            Property::MaximumQos(_) => 0x24,
            Property::RetainAvailable(_) => 0x25,
            Property::User(..) => USER,
            Property::MaximumPacketSize(_) => 0x27,
            Property::WildcardAvailable(_) => 0x28,
            Property::SubscriptionIdsAvailable(_) => 0x29,
            Property::SharedAvailable(_) => 0x2A,
        }
    }

    /// The contexts that the table of section 2.2.2.2 allows an id in, as bits; 0 for an unknown id.
    const fn contexts(id: u8) -> u16 {
        const CONNECT: u16 = Context::Connect.bit();
        const CONNACK: u16 = Context::Connack.bit();
        const PUBLISH: u16 = Context::Publish.bit();
        const WILL: u16 = Context::Will.bit();
        const ACK: u16 = Context::Ack.bit();
        const SUBSCRIBE: u16 = Context::Subscribe.bit();
        const SUBACK: u16 = Context::Suback.bit();
        const DISCONNECT: u16 = Context::Disconnect.bit();
        const AUTH: u16 = Context::Auth.bit();
        match id {
            0x01 | 0x02 | 0x03 | 0x08 | 0x09 => PUBLISH | WILL,
            SUBSCRIPTION_ID => PUBLISH | SUBSCRIBE,
            0x11 => CONNECT | CONNACK | DISCONNECT,
            0x12 | 0x13 | 0x1A | 0x24 | 0x25 | 0x28 | 0x29 | 0x2A => CONNACK,
            0x15 | 0x16 => CONNECT | CONNACK | AUTH,
            0x17 | 0x19 => CONNECT,
            0x18 => WILL,
            0x1C => CONNACK | DISCONNECT,
            0x1F => CONNACK | ACK | SUBACK | DISCONNECT | AUTH,
            0x21 | 0x22 | 0x27 => CONNECT | CONNACK,
            0x23 => PUBLISH,
            USER => u16::MAX,
            _ => 0,
        }
    }

    pub(crate) fn read(r: &mut Reader<'a>) -> Result<Self, Error> {
        // The id is a variable byte integer; every id there is fits in one byte, and a longer form is not minimal.
        let id = r.u8()?;
        let property = match id {
            0x01 => Property::PayloadIsUtf8(flag(r)?),
            0x02 => Property::MessageExpiry(r.u32()?),
            0x03 => Property::ContentType(r.text()?),
            0x08 => {
                let text = r.text()?;
                topic::check_name(text)?;
                Property::ResponseTopic(text)
            }
            0x09 => Property::Correlation(r.binary()?),
            SUBSCRIPTION_ID => match r.varint()? {
                0 => return Err(Error::Protocol("subscription identifier is 0")),
                n => Property::SubscriptionId(n),
            },
            0x11 => Property::SessionExpiry(r.u32()?),
            0x12 => Property::AssignedClientId(r.text()?),
            0x13 => Property::ServerKeepAlive(r.u16()?),
            0x15 => Property::AuthMethod(r.text()?),
            0x16 => Property::AuthData(r.binary()?),
            0x17 => Property::RequestProblemInfo(flag(r)?),
            0x18 => Property::WillDelay(r.u32()?),
            0x19 => Property::RequestResponseInfo(flag(r)?),
            0x1A => Property::ResponseInfo(r.text()?),
            0x1C => Property::ServerReference(r.text()?),
            0x1F => Property::ReasonString(r.text()?),
            0x21 => match r.u16()? {
                0 => return Err(Error::Protocol("receive maximum is 0")),
                n => Property::ReceiveMaximum(n),
            },
            0x22 => Property::TopicAliasMaximum(r.u16()?),
            0x23 => match r.u16()? {
                0 => return Err(Error::TopicAlias),
                n => Property::TopicAlias(n),
            },
            0x24 => match r.u8()? {
                n @ (0 | 1) => Property::MaximumQos(n),
                _ => return Err(Error::Protocol("maximum qos is neither 0 nor 1")),
            },
            0x25 => Property::RetainAvailable(flag(r)?),
            USER => Property::User(r.text()?, r.text()?),
            0x27 => match r.u32()? {
                0 => return Err(Error::Protocol("maximum packet size is 0")),
                n => Property::MaximumPacketSize(n),
            },
            0x28 => Property::WildcardAvailable(flag(r)?),
            0x29 => Property::SubscriptionIdsAvailable(flag(r)?),
            0x2A => Property::SharedAvailable(flag(r)?),
            _ => return Err(Error::Malformed("unknown property")),
        };
        Ok(property)
    }

    /// Bytes on the wire, id included.
    fn encoded_bytes(&self) -> usize {
        1 + match *self {
            Property::PayloadIsUtf8(_)
            | Property::RequestProblemInfo(_)
            | Property::RequestResponseInfo(_)
            | Property::MaximumQos(_)
            | Property::RetainAvailable(_)
            | Property::WildcardAvailable(_)
            | Property::SubscriptionIdsAvailable(_)
            | Property::SharedAvailable(_) => 1,
            Property::ServerKeepAlive(_)
            | Property::ReceiveMaximum(_)
            | Property::TopicAliasMaximum(_)
            | Property::TopicAlias(_) => 2,
            Property::MessageExpiry(_)
            | Property::SessionExpiry(_)
            | Property::WillDelay(_)
            | Property::MaximumPacketSize(_) => 4,
            Property::SubscriptionId(n) => varint_bytes(n as usize),
            Property::ContentType(t)
            | Property::ResponseTopic(t)
            | Property::AssignedClientId(t)
            | Property::AuthMethod(t)
            | Property::ResponseInfo(t)
            | Property::ServerReference(t)
            | Property::ReasonString(t) => 2 + t.len(),
            Property::Correlation(b) | Property::AuthData(b) => 2 + b.len(),
            Property::User(k, v) => 4 + k.len() + v.len(),
        }
    }

    fn write(&self, out: &mut impl BufMut) -> Result<(), EncodeError> {
        out.put_u8(self.id());
        match *self {
            Property::PayloadIsUtf8(b)
            | Property::RequestProblemInfo(b)
            | Property::RequestResponseInfo(b)
            | Property::RetainAvailable(b)
            | Property::WildcardAvailable(b)
            | Property::SubscriptionIdsAvailable(b)
            | Property::SharedAvailable(b) => out.put_u8(b.into()),
            Property::MaximumQos(n) => out.put_u8(n),
            Property::ServerKeepAlive(n)
            | Property::ReceiveMaximum(n)
            | Property::TopicAliasMaximum(n)
            | Property::TopicAlias(n) => out.put_u16(n),
            Property::MessageExpiry(n)
            | Property::SessionExpiry(n)
            | Property::WillDelay(n)
            | Property::MaximumPacketSize(n) => out.put_u32(n),
            Property::SubscriptionId(n) => put_varint(out, n as usize)?,
            Property::ContentType(t)
            | Property::ResponseTopic(t)
            | Property::AssignedClientId(t)
            | Property::AuthMethod(t)
            | Property::ResponseInfo(t)
            | Property::ServerReference(t)
            | Property::ReasonString(t) => put_binary(out, t.as_bytes())?,
            Property::Correlation(b) | Property::AuthData(b) => put_binary(out, b)?,
            Property::User(k, v) => {
                put_binary(out, k.as_bytes())?;
                put_binary(out, v.as_bytes())?;
            }
        }
        Ok(())
    }
}

fn flag(r: &mut Reader<'_>) -> Result<bool, Error> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::Protocol("a property that is 0 or 1 is neither")),
    }
}

/// A property list as it stands in the packet, already checked: every id known, allowed in its context, and not twice.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Properties<'a>(&'a [u8]);

impl fmt::Debug for Properties<'_> {
    /// Only the size: authentication data is among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Properties({} bytes)", self.0.len())
    }
}

impl<'a> Properties<'a> {
    pub const EMPTY: Properties<'static> = Properties(&[]);

    /// Takes the length and the list off `r`.
    #[inline]
    pub(crate) fn read(r: &mut Reader<'a>, context: Context) -> Result<Self, Error> {
        let bytes = r.varint()? as usize;
        if bytes == 0 {
            return Ok(Properties(&[]));
        }
        let list = r.take(bytes)?;
        Properties::check(list, context)?;
        Ok(Properties(list))
    }

    fn check(list: &'a [u8], context: Context) -> Result<(), Error> {
        let mut rest = Reader::new(list);
        let mut seen = 0_u64;
        let mut auth_data_alone = false;
        while !rest.is_empty() {
            let property = Property::read(&mut rest)?;
            let id = property.id();
            if Property::contexts(id) & context.bit() == 0 {
                return Err(Error::Protocol("property is not allowed in this packet"));
            }
            // Ids are at most 0x2A, so the shift is in range.
            let bit = 1_u64 << id;
            let repeats = id == USER || (id == SUBSCRIPTION_ID && context == Context::Publish);
            if seen & bit != 0 && !repeats {
                return Err(Error::Protocol("property is there twice"));
            }
            seen |= bit;
            auth_data_alone = seen & (1 << 0x16) != 0 && seen & (1 << 0x15) == 0;
        }
        if auth_data_alone {
            return Err(Error::Protocol("authentication data without a method"));
        }
        Ok(())
    }

    /// A view of a list that was checked before, in the same packet.
    pub(crate) const fn checked_before(list: &'a [u8]) -> Self {
        Properties(list)
    }

    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub const fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// In the order of the packet.
    pub fn iter(&self) -> impl Iterator<Item = Property<'a>> + use<'a> {
        let mut rest = Reader::new(self.0);
        std::iter::from_fn(move || if rest.is_empty() { None } else { Property::read(&mut rest).ok() })
    }

    /// The user properties, in the order of the packet.
    pub fn user(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        self.iter().filter_map(|p| match p {
            Property::User(key, value) => Some((key, value)),
            _ => None,
        })
    }

    pub(crate) fn find<T>(&self, pick: impl FnMut(Property<'a>) -> Option<T>) -> Option<T> {
        self.iter().find_map(pick)
    }
}

/// Builds a property list for a packet that is to be encoded. What is put in is not checked against a context.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PropertiesBuf(Vec<u8>);

impl fmt::Debug for PropertiesBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_properties().fmt(f)
    }
}

impl PropertiesBuf {
    pub const fn new() -> Self {
        PropertiesBuf(Vec::new())
    }

    pub(crate) fn copy(properties: Properties<'_>) -> Self {
        PropertiesBuf(properties.0.to_vec())
    }

    /// # Errors
    /// A text or binary value above 65,535 bytes; the list is then as before.
    pub fn push(&mut self, property: Property<'_>) -> Result<(), EncodeError> {
        let before = self.0.len();
        property.write(&mut self.0).inspect_err(|_| self.0.truncate(before))
    }

    pub fn as_properties(&self) -> Properties<'_> {
        Properties(&self.0)
    }
}

impl<'a> FromIterator<Property<'a>> for PropertiesBuf {
    /// Leaves out what cannot be encoded.
    fn from_iter<I: IntoIterator<Item = Property<'a>>>(properties: I) -> Self {
        let mut list = PropertiesBuf::new();
        for property in properties {
            let _ = list.push(property);
        }
        list
    }
}

/// Where [`crate::Outgoing::properties`] puts the properties of an outgoing PUBLISH: once to measure, once to write, without a buffer between.
pub struct PropertySink<'a> {
    target: Target<'a>,
}

enum Target<'a> {
    Measure(usize),
    Write(&'a mut bytes::BytesMut),
}

impl<'a> PropertySink<'a> {
    pub(crate) fn measure() -> PropertySink<'static> {
        PropertySink { target: Target::Measure(0) }
    }

    pub(crate) fn write(out: &'a mut bytes::BytesMut) -> Self {
        PropertySink { target: Target::Write(out) }
    }

    pub(crate) fn measured(&self) -> usize {
        match self.target {
            Target::Measure(bytes) => bytes,
            Target::Write(_) => 0,
        }
    }

    /// Adds one property; one that cannot be encoded (a value above 65,535 bytes) is left out, in both passes alike.
    pub fn push(&mut self, property: Property<'_>) {
        let fits = |b: &[u8]| b.len() <= usize::from(u16::MAX);
        let encodable = match property {
            Property::ContentType(t) | Property::ResponseTopic(t) => fits(t.as_bytes()),
            Property::Correlation(b) => fits(b),
            Property::User(k, v) => fits(k.as_bytes()) && fits(v.as_bytes()),
            Property::SubscriptionId(n) => n > 0 && n <= crate::encode::VARINT_MAX as u32,
            Property::PayloadIsUtf8(_) | Property::MessageExpiry(_) => true,
            // Anything else does not belong to a PUBLISH; the topic alias is the connection's own.
            _ => false,
        };
        if !encodable {
            return;
        }
        match &mut self.target {
            Target::Measure(bytes) => *bytes += property.encoded_bytes(),
            Target::Write(out) => {
                // Checked above: it fits.
                let _ = property.write(*out);
            }
        }
    }
}
