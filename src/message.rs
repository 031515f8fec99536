//! L1, the vocabulary every layer shares: who speaks, about what, and how it ended.
//!
//! Knows no protocol's encoding and no upstream. Everything here is cheap to clone.

use std::borrow::Borrow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

/// A device's name: 1 to 128 bytes of `A-Z a-z 0-9 . _ ~ : -`, so that it is one topic level and one path segment everywhere.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(Arc<str>);

/// Why a text is not a device id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidDeviceId;

impl fmt::Display for InvalidDeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a device id is 1 to 128 characters out of A-Z a-z 0-9 . _ ~ : -")
    }
}

impl std::error::Error for InvalidDeviceId {}

impl DeviceId {
    pub const BYTES_MAX: usize = 128;

    /// Checks and keeps a copy of `text`.
    pub fn parse(text: &str) -> Result<Self, InvalidDeviceId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'~' | b':' | b'-');
        // `.` and `..` vanish when a URL is normalised, so they cannot name a path segment.
        if text.is_empty() || text.len() > Self::BYTES_MAX || text == "." || text == ".." || !text.bytes().all(allowed)
        {
            return Err(InvalidDeviceId);
        }
        Ok(DeviceId(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceId({})", self.0)
    }
}

/// A device as the registry knows it. A snapshot: compare `generation` with the registry to see a revocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub id: DeviceId,
    /// Row number in the registry, stable for the life of the device; what a bearer token carries.
    pub index: u32,
    /// Incremented by revocation, re-enabling and every change of keys; a credential issued before no longer matches.
    pub generation: u32,
    pub role: Arc<str>,
    /// Free attributes, sorted by key, for `attr:KEY=VALUE` in policy.
    pub attributes: Vec<(Box<str>, Box<str>)>,
}

/// A concrete topic: 1 to 65,535 bytes of UTF-8 without NUL, `+` and `#` (`[MQTT-4.7.3]`, `[MQTT-3.3.2-2]`).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Arc<str>);

/// Why a text is not a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidTopic;

impl fmt::Display for InvalidTopic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a topic is 1 to 65535 bytes of UTF-8 without NUL, + and #")
    }
}

impl std::error::Error for InvalidTopic {}

impl Topic {
    pub const BYTES_MAX: usize = 65_535;

    /// Checks and keeps a copy of `text`.
    pub fn parse(text: &str) -> Result<Self, InvalidTopic> {
        if Self::is_valid(text) { Ok(Topic(text.into())) } else { Err(InvalidTopic) }
    }

    /// Whether [`Topic::parse`] would take it.
    pub fn is_valid(text: &str) -> bool {
        (1..=Self::BYTES_MAX).contains(&text.len()) && !text.bytes().any(|b| matches!(b, 0 | b'+' | b'#'))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The levels, in order; an empty level is a level.
    pub fn levels(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Equality, order and hash are those of the text, so that maps keyed by topic are searched with a `&str`.
impl Borrow<str> for Topic {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Topic({})", self.0)
    }
}

/// The protocol a device spoke, as a closed set: it is a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Http,
    Mqtt,
    Coap,
    /// The gateway itself: presence, `$SYS`, downlink from an upstream.
    Gateway,
}

impl Protocol {
    pub const fn as_str(self) -> &'static str {
        match self {
            Protocol::Http => "http",
            Protocol::Mqtt => "mqtt",
            Protocol::Coap => "coap",
            Protocol::Gateway => "gateway",
        }
    }
}

/// Delivery promise asked for by the sender. CON and HTTP are `AtLeastOnce`, NON is `AtMostOnce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Qos {
    #[default]
    AtMostOnce = 0,
    AtLeastOnce = 1,
    ExactlyOnce = 2,
}

/// One live connection or security context; unique for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// `GATEWAY/EPOCH/SEQ`: unique over restarts, ordered within one. The epoch grows by one with every start of the gateway on one data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MessageId {
    pub epoch: u32,
    pub seq: u64,
}

/// Where a message came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// None for the gateway itself and for anonymous devices.
    pub device: Option<DeviceId>,
    pub protocol: Protocol,
    /// The publishing session, for MQTT's No Local.
    pub session: Option<SessionId>,
}

/// What travels beside the payload. Boxed in [`Message`] because most messages have none of it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Properties {
    /// A media type: MQTT 5 Content Type = HTTP `Content-Type` = CoAP Content-Format by the IANA table.
    pub content_type: Option<Box<str>>,
    /// MQTT 5 Payload Format Indicator 1: the payload is UTF-8.
    pub payload_is_utf8: bool,
    /// MQTT 5 Message Expiry Interval, seconds from `ingested_ms`.
    pub expiry_secs: Option<u32>,
    pub response_topic: Option<Box<str>>,
    pub correlation: Option<Bytes>,
    /// W3C Trace Context, already validated.
    pub traceparent: Option<Box<str>>,
    pub user: Vec<(Box<str>, Box<str>)>,
}

/// One message on its way through the gateway, stamped at admission. Shared as `Arc<Message>`; never changed after that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub id: MessageId,
    /// Wall clock at admission, milliseconds since 1970, UTC. For people and backends, never for intervals.
    pub ingested_ms: u64,
    pub topic: Topic,
    pub payload: Bytes,
    pub qos: Qos,
    pub retain: bool,
    pub origin: Origin,
    pub properties: Option<Box<Properties>>,
}

impl Message {
    pub fn content_type(&self) -> Option<&str> {
        self.properties.as_ref().and_then(|p| p.content_type.as_deref())
    }

    /// What the message counts for in every byte limit: topic, payload and a fixed overhead for the rest.
    pub fn cost_bytes(&self) -> usize {
        const OVERHEAD: usize = 96;
        let properties = self.properties.as_ref().map_or(0, |p| {
            let text = |t: &Option<Box<str>>| t.as_ref().map_or(0, |t| t.len());
            let user: usize = p.user.iter().map(|(k, v)| k.len() + v.len() + 32).sum();
            64 + text(&p.content_type)
                + text(&p.response_topic)
                + text(&p.traceparent)
                + p.correlation.as_ref().map_or(0, Bytes::len)
                + user
        });
        OVERHEAD + self.topic.as_str().len() + self.payload.len() + properties
    }
}

/// What a caller wants to do, as policy names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Publish,
    Subscribe,
    Read,
    Command,
    Admin,
    /// Request plane: one HTTP method. CoAP methods map onto them (RFC 8075).
    Get,
    Head,
    Post,
    Put,
    Patch,
    Delete,
    Options,
    Connect,
}

impl Action {
    pub const ALL: [Action; 13] = [
        Action::Publish,
        Action::Subscribe,
        Action::Read,
        Action::Command,
        Action::Admin,
        Action::Get,
        Action::Head,
        Action::Post,
        Action::Put,
        Action::Patch,
        Action::Delete,
        Action::Options,
        Action::Connect,
    ];

    /// The word in `do = [...]`; exact, case and all.
    pub const fn as_str(self) -> &'static str {
        match self {
            Action::Publish => "publish",
            Action::Subscribe => "subscribe",
            Action::Read => "read",
            Action::Command => "command",
            Action::Admin => "admin",
            Action::Get => "GET",
            Action::Head => "HEAD",
            Action::Post => "POST",
            Action::Put => "PUT",
            Action::Patch => "PATCH",
            Action::Delete => "DELETE",
            Action::Options => "OPTIONS",
            Action::Connect => "CONNECT",
        }
    }

    pub fn parse(word: &str) -> Option<Self> {
        Action::ALL.into_iter().find(|a| a.as_str() == word)
    }
}

/// A message was accepted, and stored as its route's delivery class says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub id: MessageId,
    /// Local subscribers and forward rules it went to; 0 becomes MQTT 5's 0x10.
    pub receivers: u32,
}

/// Why something was refused. Every protocol renders every variant (the table in the wire contract); there is no catch-all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reject {
    /// Who are you: 0x87 / 5 / 401 / 4.01. Deliberately without a reason.
    Unauthenticated,
    /// Known, but not allowed. `rule` is the deciding rule's name, `None` when nothing matched (default deny).
    Forbidden { rule: Option<Arc<str>> },
    /// A rate or quota, by the name of its key, e.g. `rate_per_device`.
    TooFast { limit: &'static str, retry_after: Duration },
    /// A size limit, by the name of its key, e.g. `packet_bytes_max`.
    TooLarge { limit: &'static str, bytes_max: u64 },
    /// The spool, or a table that the request needs, has no room or cannot write: `limit` names the key or the store.
    Full { limit: &'static str, retry_after: Duration },
    /// The sender's fault; `what` is a lowercase clause that carries nothing of the payload.
    Malformed { what: &'static str },
    /// Nothing there, for reads.
    NotFound,
    /// The gateway is draining; come back to another, or later.
    ShuttingDown,
}

impl Reject {
    /// The metric label and the `reason` field in logs.
    pub const fn reason(&self) -> &'static str {
        match self {
            Reject::Unauthenticated => "unauthenticated",
            Reject::Forbidden { .. } => "forbidden",
            Reject::TooFast { .. } => "too_fast",
            Reject::TooLarge { .. } => "too_large",
            Reject::Full { .. } => "full",
            Reject::Malformed { .. } => "malformed",
            Reject::NotFound => "not_found",
            Reject::ShuttingDown => "shutting_down",
        }
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reject::Unauthenticated => f.write_str("not authenticated"),
            Reject::Forbidden { rule: Some(rule) } => write!(f, "denied by rule \"{rule}\""),
            Reject::Forbidden { rule: None } => f.write_str("no rule allows it"),
            Reject::TooFast { limit, retry_after } => {
                write!(f, "over {limit}, retry after {} ms", retry_after.as_millis())
            }
            Reject::TooLarge { limit, bytes_max } => write!(f, "over {limit} of {bytes_max} bytes"),
            Reject::Full { limit, .. } => write!(f, "{limit} is full"),
            Reject::Malformed { what } => write!(f, "malformed: {what}"),
            Reject::NotFound => f.write_str("nothing there"),
            Reject::ShuttingDown => f.write_str("shutting down"),
        }
    }
}

/// Where an outcome that takes time (a commit) is reported. Called from the spool's thread: it must not block.
pub trait Completion: Send + Sync {
    /// `token` is the caller's own, given with the message; called exactly once for each.
    fn complete(&self, token: u64, outcome: Result<Receipt, Reject>);
}

/// Why the gateway ends a session of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The same client connected again: MQTT 5 0x8E.
    TakenOver,
    /// The device was revoked or its credential has expired: 0x87.
    NotAuthorized,
    /// It did not read its messages for too long: 0x97.
    TooSlow,
    /// The gateway stops: 0x8B.
    ShuttingDown,
    /// An operator asked for it: 0x98.
    Administrative,
}

/// The handle by which a live session is told to end.
pub trait Control: Send + Sync {
    fn close(&self, reason: CloseReason);
}

/// Who is asking, for admission: fixed for the life of a connection or a security context.
#[derive(Clone, Debug)]
pub struct Caller {
    /// None: anonymous, where the configuration gives anonymous callers a role.
    pub device: Option<Arc<Device>>,
    pub role: Arc<str>,
    pub protocol: Protocol,
    pub peer: SocketAddr,
    pub session: SessionId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_id_is_one_topic_level_and_one_path_segment() {
        for good in ["a", "sensor-0042", "urn:dev:mac:0024befffe804ff1", "A.b_c~d"] {
            assert_eq!(DeviceId::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "+", "#", "$SYS", "ä", "a\0", &"x".repeat(129)] {
            assert_eq!(DeviceId::parse(bad), Err(InvalidDeviceId), "{bad}");
        }
    }

    #[test]
    fn a_topic_has_no_wildcards_and_keeps_empty_levels() {
        let topic = Topic::parse("/a//b").unwrap();
        assert_eq!(topic.levels().collect::<Vec<_>>(), ["", "a", "", "b"]);
        for bad in ["", "a/+", "#", "a\0b"] {
            assert_eq!(Topic::parse(bad), Err(InvalidTopic));
        }
    }

    #[test]
    fn every_action_parses_back_from_its_word() {
        for action in Action::ALL {
            assert_eq!(Action::parse(action.as_str()), Some(action));
        }
        assert_eq!(Action::parse("get"), None);
    }
}
