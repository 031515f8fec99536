//! What a connection tells the application.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::error::Error;
use crate::packet::{PacketId, Qos, RetainHandling, Version, Will};
use crate::property::{Properties, PropertiesBuf, Property};
use crate::reason::Reason;

/// Answer of [`crate::Connection::poll_output`].
#[derive(Debug)]
pub enum Output<M> {
    Event(Event<M>),
    /// Flush what was written, then close the transport. Said once; after it, only `Timeout(None)`.
    Close(Close),
    /// Nothing more until input, a command, or this instant.
    Timeout(Option<Instant>),
}

#[derive(Debug)]
pub enum Event<M> {
    /// Answer with `accept`, `refuse` or `challenge`. Nothing more is read until then.
    Connect(Box<ConnectEvent>),
    /// The client's answer to a challenge, of the first authentication (then answer as to `Connect`) or of a further one (`auth_success`,
    /// `challenge` or `disconnect`).
    Auth { data: Secret },
    /// The client wants to authenticate again. Answer with `challenge`, `auth_success` or `disconnect`.
    Reauthenticate { data: Secret },
    /// Answer with `ack` when it has a handle.
    Publish(PublishEvent),
    /// Answer with `suback`.
    Subscribe(Box<SubscribeEvent>),
    /// Answer with `unsuback`.
    Unsubscribe(Box<UnsubscribeEvent>),
    /// The client took over an outgoing QoS 1 or 2 message (or refused it, `reason` then is an error): it need not be kept.
    /// At QoS 2 that is PUBREC; [`Event::Completed`] follows.
    Delivered { message: M, reason: Reason },
    /// The handshake of an outgoing QoS 2 message is over (PUBCOMP): its identifier is free.
    Completed { packet_id: PacketId },
    /// The client has released an incoming QoS 2 message of a stored session. Answer with `complete`.
    Released { packet_id: PacketId },
}

/// Why and how a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    pub cause: Cause,
    /// Whether the will message is due (`[MQTT-3.1.2-8]`); false before the connection was accepted.
    pub will: bool,
    /// A Session Expiry Interval that the client's DISCONNECT set in place of the one in CONNECT.
    pub session_expiry_secs: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The client said goodbye.
    Disconnect(Reason),
    /// The transport ended without a DISCONNECT.
    Eof,
    KeepAliveTimeout,
    /// No accepted CONNECT, or no end to an authentication, in time.
    ConnectTimeout,
    /// The peer broke a rule.
    Error(Error),
    /// `refuse` was called.
    Refused(Reason),
    /// `disconnect` was called.
    Server(Reason),
}

/// Names one incoming QoS 1 or 2 message until it is acknowledged; unique for the life of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub(crate) u64);

impl Handle {
    /// For a completion that carries an integer.
    pub const fn token(self) -> u64 {
        self.0
    }

    pub const fn from_token(token: u64) -> Self {
        Handle(token)
    }
}

/// What became of an outgoing message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    Sent,
    /// The client's or our own in-flight limit is reached, or redelivery is not finished: try again after the next `Delivered` or when `window()` is above 0.
    WindowFull,
    /// Larger than the client's Maximum Packet Size, or than the protocol can carry: to be dropped as if it had been delivered (`[MQTT-3.1.2-25]`).
    TooLarge,
    /// Not connected, or no longer.
    Closed,
}

/// Bytes that do not show in logs.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(Bytes);

impl Secret {
    pub(crate) fn copy(bytes: &[u8]) -> Self {
        Secret(Bytes::copy_from_slice(bytes))
    }

    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectEvent {
    pub version: Version,
    pub clean_start: bool,
    /// As sent, in seconds; the connection itself watches it.
    pub keep_alive: u16,
    /// Seconds to keep the session after the connection; `u32::MAX` is for ever. 3.1.1: 0 for a clean session, else `u32::MAX`.
    pub session_expiry_secs: u32,
    /// As sent; empty means that the server is to assign one.
    pub client_id: Box<str>,
    pub username: Option<Box<str>>,
    pub password: Option<Secret>,
    /// Enhanced authentication: method and first data.
    pub auth: Option<(Box<str>, Secret)>,
    pub will: Option<WillMessage>,
    pub request_response_info: bool,
    pub user: Vec<(Box<str>, Box<str>)>,
}

/// The will of a client, copied out of the CONNECT because it lives as long as the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WillMessage {
    pub topic: Box<str>,
    pub payload: Bytes,
    pub qos: Qos,
    pub retain: bool,
    /// Seconds to wait after the close; a resumed session cancels it.
    pub delay_secs: u32,
    pub(crate) properties: PropertiesBuf,
}

impl WillMessage {
    pub(crate) fn copy(will: &Will<'_>) -> Self {
        WillMessage {
            topic: will.topic.into(),
            payload: Bytes::copy_from_slice(will.payload),
            qos: will.qos,
            retain: will.retain,
            delay_secs: will
                .properties
                .find(|p| if let Property::WillDelay(s) = p { Some(s) } else { None })
                .unwrap_or(0),
            properties: PropertiesBuf::copy(will.properties),
        }
    }

    /// The will's properties, those of a PUBLISH among them.
    pub fn properties(&self) -> Properties<'_> {
        self.properties.as_properties()
    }
}

/// One incoming message, as a slice of the read buffer: copy out what is kept, so that a small payload does not hold a large buffer.
#[derive(Clone)]
pub struct PublishEvent {
    /// Some exactly when `qos` is above 0.
    pub handle: Option<Handle>,
    pub qos: Qos,
    pub retain: bool,
    pub dup: bool,
    pub(crate) packet: Bytes,
    pub(crate) topic_at: u32,
    pub(crate) topic_bytes: u32,
    pub(crate) properties_at: u32,
    pub(crate) payload_at: u32,
    /// In place of the packet's topic, when that is an alias.
    pub(crate) alias: Option<Arc<str>>,
}

impl PublishEvent {
    /// The topic name as bytes: free of cost, for a comparison with one seen before.
    #[inline]
    pub fn topic_bytes(&self) -> &[u8] {
        match &self.alias {
            Some(topic) => topic.as_bytes(),
            None => self.slice(self.topic_at, self.topic_at.saturating_add(self.topic_bytes)),
        }
    }

    /// The topic name. Costs a UTF-8 check of its bytes.
    pub fn topic(&self) -> &str {
        // The decoder has checked it; there is no other way to say so without `unsafe`.
        std::str::from_utf8(self.topic_bytes()).unwrap_or_default()
    }

    #[inline]
    pub fn payload(&self) -> &[u8] {
        self.packet.get(self.payload_at as usize..).unwrap_or_default()
    }

    /// The payload, still sharing the read buffer.
    pub fn payload_shared(&self) -> Bytes {
        // In range by construction: the offset comes from decoding this very packet.
        self.packet.slice((self.payload_at as usize).min(self.packet.len())..)
    }

    /// The MQTT 5 properties; empty in 3.1.1. The topic alias among them is already resolved.
    #[inline]
    pub fn properties(&self) -> Properties<'_> {
        Properties::checked_before(self.slice(self.properties_at, self.payload_at))
    }

    /// The same message, holding nothing but its own bytes: to be kept for a while.
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.packet = Bytes::copy_from_slice(&self.packet);
        self
    }

    #[inline]
    fn slice(&self, from: u32, to: u32) -> &[u8] {
        self.packet.get(from as usize..to as usize).unwrap_or_default()
    }
}

impl fmt::Debug for PublishEvent {
    /// Without the payload.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishEvent")
            .field("handle", &self.handle)
            .field("qos", &self.qos)
            .field("retain", &self.retain)
            .field("dup", &self.dup)
            .field("topic", &self.topic())
            .field("payload_bytes", &self.payload().len())
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeEvent {
    pub packet_id: PacketId,
    /// Given back with every message that one of these subscriptions selects.
    pub subscription_id: Option<u32>,
    /// In the order of the packet: SUBACK answers each in turn.
    pub subscriptions: Vec<Subscription>,
    pub user: Vec<(Box<str>, Box<str>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// Valid; `$share/GROUP/FILTER` still whole, see [`crate::topic::shared`].
    pub filter: Box<str>,
    pub qos: Qos,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub retain_handling: RetainHandling,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnsubscribeEvent {
    pub packet_id: PacketId,
    /// In the order of the packet: UNSUBACK answers each in turn.
    pub filters: Vec<Box<str>>,
    pub user: Vec<(Box<str>, Box<str>)>,
}

pub(crate) fn user_properties(properties: Properties<'_>) -> Vec<(Box<str>, Box<str>)> {
    properties.user().map(|(key, value)| (key.into(), value.into())).collect()
}
