//! The packet model: one set of types for MQTT 3.1.1 and 5, both directions, borrowed from the bytes they were read from.
//!
//! Where 3.1.1 has no such field, decoding fills in what 5 calls the default and encoding leaves it out.

use std::num::NonZeroU16;

use crate::decode::Reader;
use crate::encode::{EncodeError, put_binary};
use crate::property::Properties;
use crate::reason::Reason;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Version {
    V311 = 4,
    V5 = 5,
}

/// Quality of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum Qos {
    #[default]
    AtMostOnce = 0,
    AtLeastOnce = 1,
    ExactlyOnce = 2,
}

impl Qos {
    pub const fn from_u8(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Qos::AtMostOnce),
            1 => Some(Qos::AtLeastOnce),
            2 => Some(Qos::ExactlyOnce),
            _ => None,
        }
    }

    /// What SUBACK says when this is granted.
    pub const fn granted(self) -> Reason {
        match self {
            Qos::AtMostOnce => Reason::Success,
            Qos::AtLeastOnce => Reason::GrantedQos1,
            Qos::ExactlyOnce => Reason::GrantedQos2,
        }
    }
}

/// A packet identifier: 1 to 65,535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PacketId(NonZeroU16);

impl PacketId {
    pub const FIRST: PacketId = PacketId(NonZeroU16::MIN);

    pub const fn new(id: u16) -> Option<Self> {
        match NonZeroU16::new(id) {
            Some(id) => Some(PacketId(id)),
            None => None,
        }
    }

    pub const fn get(self) -> u16 {
        self.0.get()
    }

    /// The one after, round the corner past 0.
    pub const fn next(self) -> Self {
        match self.0.checked_add(1) {
            Some(id) => PacketId(id),
            None => PacketId::FIRST,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    Connect(Connect<'a>),
    Connack(Connack<'a>),
    Publish(Publish<'a>),
    Puback(Ack<'a>),
    Pubrec(Ack<'a>),
    Pubrel(Ack<'a>),
    Pubcomp(Ack<'a>),
    Subscribe(Subscribe<'a>),
    Suback(Suback<'a>),
    Unsubscribe(Unsubscribe<'a>),
    Unsuback(Unsuback<'a>),
    Pingreq,
    Pingresp,
    Disconnect(Disconnect<'a>),
    /// MQTT 5 only.
    Auth(Auth<'a>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Connect<'a> {
    pub version: Version,
    pub clean_start: bool,
    /// Seconds; 0 is none.
    pub keep_alive: u16,
    pub properties: Properties<'a>,
    pub client_id: &'a str,
    pub will: Option<Will<'a>>,
    pub username: Option<&'a str>,
    pub password: Option<&'a [u8]>,
}

impl std::fmt::Debug for Connect<'_> {
    /// Without the password and the properties, which can carry authentication data.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connect")
            .field("version", &self.version)
            .field("clean_start", &self.clean_start)
            .field("keep_alive", &self.keep_alive)
            .field("client_id", &self.client_id)
            .field("will", &self.will)
            .field("username", &self.username)
            .field("password", &self.password.map(|_| "***"))
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Will<'a> {
    pub qos: Qos,
    pub retain: bool,
    pub properties: Properties<'a>,
    pub topic: &'a str,
    pub payload: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connack<'a> {
    pub session_present: bool,
    /// Encoded for 3.1.1 as the nearest return code.
    pub reason: Reason,
    pub properties: Properties<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish<'a> {
    pub dup: bool,
    pub qos: Qos,
    pub retain: bool,
    /// Empty only in MQTT 5, and then the properties have a topic alias.
    pub topic: &'a str,
    /// Some exactly when `qos` is above 0.
    pub packet_id: Option<PacketId>,
    pub properties: Properties<'a>,
    pub payload: &'a [u8],
}

/// PUBACK, PUBREC, PUBREL and PUBCOMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack<'a> {
    pub packet_id: PacketId,
    pub reason: Reason,
    pub properties: Properties<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscribe<'a> {
    pub packet_id: PacketId,
    pub properties: Properties<'a>,
    /// With options.
    pub filters: Filters<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsubscribe<'a> {
    pub packet_id: PacketId,
    pub properties: Properties<'a>,
    /// Without options.
    pub filters: Filters<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suback<'a> {
    pub packet_id: PacketId,
    pub properties: Properties<'a>,
    pub reasons: Reasons<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsuback<'a> {
    pub packet_id: PacketId,
    pub properties: Properties<'a>,
    /// Empty in 3.1.1.
    pub reasons: Reasons<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disconnect<'a> {
    pub reason: Reason,
    pub properties: Properties<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Auth<'a> {
    pub reason: Reason,
    pub properties: Properties<'a>,
}

impl std::fmt::Debug for Auth<'_> {
    /// Without the properties, which carry authentication data.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").field("reason", &self.reason).finish_non_exhaustive()
    }
}

/// When a subscription gets the retained messages that it matches (MQTT 5 section 3.8.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum RetainHandling {
    /// At every SUBSCRIBE; what 3.1.1 does.
    #[default]
    Send = 0,
    /// Only when the subscription is new.
    SendIfNew = 1,
    DoNotSend = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SubscribeOptions {
    /// The highest the client wants.
    pub qos: Qos,
    /// Not the messages that this client published itself.
    pub no_local: bool,
    /// Keep the RETAIN flag as the publisher set it.
    pub retain_as_published: bool,
    pub retain_handling: RetainHandling,
}

impl SubscribeOptions {
    pub const fn bits(self) -> u8 {
        self.qos as u8
            | (self.no_local as u8) << 2
            | (self.retain_as_published as u8) << 3
            | (self.retain_handling as u8) << 4
    }

    /// None when reserved bits are set or a field has a reserved value.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        let retain_handling = match bits >> 4 {
            0 => RetainHandling::Send,
            1 => RetainHandling::SendIfNew,
            2 => RetainHandling::DoNotSend,
            _ => return None,
        };
        match Qos::from_u8(bits & 3) {
            None => None,
            Some(qos) => Some(SubscribeOptions {
                qos,
                no_local: bits & 4 != 0,
                retain_as_published: bits & 8 != 0,
                retain_handling,
            }),
        }
    }
}

/// The topic filters of a SUBSCRIBE or UNSUBSCRIBE, already checked, in the order of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filters<'a> {
    pub(crate) list: &'a [u8],
    pub(crate) with_options: bool,
}

impl<'a> Filters<'a> {
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, SubscribeOptions)> + use<'a> {
        let mut rest = Reader::new(self.list);
        let with_options = self.with_options;
        std::iter::from_fn(move || {
            let filter = rest.text().ok()?;
            let options = if with_options { SubscribeOptions::from_bits(rest.u8().ok()?)? } else { Default::default() };
            Some((filter, options))
        })
    }
}

/// Builds the filters of a SUBSCRIBE or UNSUBSCRIBE that is to be encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FiltersBuf {
    list: Vec<u8>,
    with_options: bool,
}

impl FiltersBuf {
    pub const fn for_subscribe() -> Self {
        FiltersBuf { list: Vec::new(), with_options: true }
    }

    pub const fn for_unsubscribe() -> Self {
        FiltersBuf { list: Vec::new(), with_options: false }
    }

    /// `options` are left out of an UNSUBSCRIBE.
    ///
    /// # Errors
    /// A filter above 65,535 bytes.
    pub fn push(&mut self, filter: &str, options: SubscribeOptions) -> Result<(), EncodeError> {
        put_binary(&mut self.list, filter.as_bytes())?;
        if self.with_options {
            self.list.push(options.bits());
        }
        Ok(())
    }

    pub fn as_filters(&self) -> Filters<'_> {
        Filters { list: &self.list, with_options: self.with_options }
    }
}

/// Reason codes of a SUBACK or UNSUBACK, already checked, in the order of the filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reasons<'a>(pub(crate) ReasonList<'a>);

#[derive(Clone, Copy, Debug, Eq)]
pub(crate) enum ReasonList<'a> {
    Read(&'a [u8]),
    Given(&'a [Reason]),
}

impl<'a> Reasons<'a> {
    pub const fn new(reasons: &'a [Reason]) -> Self {
        Reasons(ReasonList::Given(reasons))
    }

    pub fn iter(&self) -> impl Iterator<Item = Reason> + use<'a> {
        let (read, given) = match self.0 {
            ReasonList::Read(codes) => (codes, &[][..]),
            ReasonList::Given(reasons) => (&[][..], reasons),
        };
        read.iter().filter_map(|code| Reason::from_u8(*code)).chain(given.iter().copied())
    }

    pub const fn len(&self) -> usize {
        match self.0 {
            ReasonList::Read(codes) => codes.len(),
            ReasonList::Given(reasons) => reasons.len(),
        }
    }

    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl PartialEq for ReasonList<'_> {
    fn eq(&self, other: &Self) -> bool {
        Reasons(*self).iter().eq(Reasons(*other).iter())
    }
}
