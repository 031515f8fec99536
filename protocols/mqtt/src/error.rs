//! Why a connection has to end: every variant is the peer's fault and means close.

use std::fmt;

use crate::reason::Reason;

/// What the peer did wrong. No retry of the same bytes can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The bytes are not a packet of the specification.
    Malformed(&'static str),
    /// A packet that is well formed but not allowed here.
    Protocol(&'static str),
    /// CONNECT with another protocol name or level.
    UnsupportedVersion(u8),
    /// CONNECT with a client identifier that this protocol version cannot have.
    ClientId,
    /// Known from the fixed header alone.
    PacketTooLarge {
        bytes: usize,
        bytes_max: usize,
    },
    /// More QoS 1 and 2 messages in flight than the server's Receive Maximum.
    ReceiveMaximum {
        max: u16,
    },
    /// A topic alias that is zero, above the server's maximum, or unknown.
    TopicAlias,
    TopicName(&'static str),
    TopicFilter(&'static str),
    /// Payload Format Indicator 1 and a payload that is not UTF-8.
    PayloadFormat,
    /// A limit of [`crate::Config`], by the name of its key.
    Limit(&'static str),
    QosNotSupported,
    RetainNotSupported,
    WildcardsNotSupported,
    SharedNotSupported,
    SubscriptionIdsNotSupported,
}

impl Error {
    /// The code for DISCONNECT, or for CONNACK when the connection is not yet accepted.
    pub const fn reason(&self) -> Reason {
        match self {
            Error::Malformed(_) => Reason::MalformedPacket,
            Error::Protocol(_) => Reason::ProtocolError,
            Error::UnsupportedVersion(_) => Reason::UnsupportedProtocolVersion,
            Error::ClientId => Reason::ClientIdentifierNotValid,
            Error::PacketTooLarge { .. } => Reason::PacketTooLarge,
            Error::ReceiveMaximum { .. } => Reason::ReceiveMaximumExceeded,
            Error::TopicAlias => Reason::TopicAliasInvalid,
            Error::TopicName(_) => Reason::TopicNameInvalid,
            Error::TopicFilter(_) => Reason::TopicFilterInvalid,
            Error::PayloadFormat => Reason::PayloadFormatInvalid,
            Error::Limit(_) => Reason::QuotaExceeded,
            Error::QosNotSupported => Reason::QosNotSupported,
            Error::RetainNotSupported => Reason::RetainNotSupported,
            Error::WildcardsNotSupported => Reason::WildcardSubscriptionsNotSupported,
            Error::SharedNotSupported => Reason::SharedSubscriptionsNotSupported,
            Error::SubscriptionIdsNotSupported => Reason::SubscriptionIdentifiersNotSupported,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Malformed(what) => write!(f, "malformed packet: {what}"),
            Error::Protocol(what) => write!(f, "protocol error: {what}"),
            Error::UnsupportedVersion(level) => write!(f, "protocol level {level} is not spoken here"),
            Error::ClientId => f.write_str("an empty client identifier needs a clean session"),
            Error::PacketTooLarge { bytes, bytes_max } => write!(f, "packet of {bytes} bytes is over {bytes_max}"),
            Error::ReceiveMaximum { max } => write!(f, "more than {max} messages in flight"),
            Error::TopicAlias => f.write_str("topic alias is out of range or unknown"),
            Error::TopicName(what) => write!(f, "topic name {what}"),
            Error::TopicFilter(what) => write!(f, "topic filter {what}"),
            Error::PayloadFormat => f.write_str("payload is declared to be UTF-8 and is not"),
            Error::Limit(key) => write!(f, "over {key}"),
            Error::QosNotSupported => f.write_str("quality of service is above the server's maximum"),
            Error::RetainNotSupported => f.write_str("retain is not available"),
            Error::WildcardsNotSupported => f.write_str("wildcard subscriptions are not available"),
            Error::SharedNotSupported => f.write_str("shared subscriptions are not available"),
            Error::SubscriptionIdsNotSupported => f.write_str("subscription identifiers are not available"),
        }
    }
}

impl std::error::Error for Error {}
