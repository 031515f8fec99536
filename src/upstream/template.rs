//! `path` and `topic` of a forward rule: text with `{device}`, `{gateway}` and `{topic}` in it.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::message::Message;

/// A checked template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    Device,
    Gateway,
    Topic,
}

impl Template {
    /// What may stand in braces.
    pub const PLACEHOLDERS: &'static str = "{device}, {gateway}, {topic}";

    /// Reads a template.
    ///
    /// # Errors
    /// The braces that mean nothing.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            let end = from.find('}').ok_or_else(|| from.to_owned())? + 1;
            let (placeholder, after) = from.split_at(end);
            if !before.is_empty() {
                parts.push(Part::Text(before.into()));
            }
            parts.push(match placeholder {
                "{device}" => Part::Device,
                "{gateway}" => Part::Gateway,
                "{topic}" => Part::Topic,
                other => return Err(other.to_owned()),
            });
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.into()));
        }
        Ok(Template(parts))
    }

    /// Whether every message has the same path.
    pub fn is_constant(&self) -> bool {
        self.0.iter().all(|part| matches!(part, Part::Text(_) | Part::Gateway))
    }

    /// As the path of a URL: values are percent-encoded, slashes too, so that no value adds a segment. A value that is a dot segment, which servers
    /// resolve even when it is encoded, becomes `-`; the message's own subject still tells it.
    pub fn path(&self, message: &Message, gateway: &str, into: &mut String) {
        into.clear();
        for part in &self.0 {
            match part.of(message, gateway) {
                (text, true) => into.push_str(text),
                ("." | "..", false) => into.push('-'),
                (value, false) => encode(value, into),
            }
        }
    }
}

impl Part {
    /// The text, and whether it is the template's own.
    fn of<'a>(&'a self, message: &'a Message, gateway: &'a str) -> (&'a str, bool) {
        match self {
            Part::Text(text) => (text, true),
            Part::Device => (message.origin.device.as_ref().map_or("", |device| device.as_str()), false),
            Part::Gateway => (gateway, false),
            Part::Topic => (message.topic.as_str(), false),
        }
    }
}

/// RFC 3986: unreserved characters stay.
fn encode(value: &str, into: &mut String) {
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    into.extend(utf8_percent_encode(value, ENCODED));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{DeviceId, MessageId, Origin, Protocol, Qos, Topic};

    fn message(topic: &str, device: Option<&str>) -> Message {
        Message {
            id: MessageId { epoch: 1, seq: 1 },
            ingested_ms: 0,
            topic: Topic::parse(topic).unwrap(),
            payload: bytes::Bytes::new(),
            qos: Qos::AtLeastOnce,
            retain: false,
            origin: Origin {
                device: device.map(|id| DeviceId::parse(id).unwrap()),
                protocol: Protocol::Http,
                session: None,
            },
            properties: None,
        }
    }

    fn path(template: &str, topic: &str, device: Option<&str>) -> String {
        let mut text = String::from("left over");
        Template::parse(template).unwrap().path(&message(topic, device), "gw 1", &mut text);
        text
    }

    #[test]
    fn values_are_filled_in_and_encoded() {
        assert_eq!(path("/ingest", "t", None), "/ingest");
        assert_eq!(path("/{gateway}/{device}/x?t={topic}", "a/ö b", Some("d:1")), "/gw%201/d%3A1/x?t=a%2F%C3%B6%20b");
        assert_eq!(path("/{device}{topic}", "{device}", None), "/%7Bdevice%7D");
    }

    #[test]
    fn no_value_climbs_out_of_its_place() {
        assert_eq!(path("/in/{topic}/x", "..", None), "/in/-/x");
        assert_eq!(path("/in/{topic}/x", "../../admin", None), "/in/..%2F..%2Fadmin/x");
    }

    #[test]
    fn braces_that_mean_nothing_are_named() {
        for (text, named) in
            [("/{devise}", "{devise}"), ("/{", "{"), ("/a}b", "}"), ("/{}", "{}"), ("/{{topic}}", "{{topic}")]
        {
            assert_eq!(Template::parse(text), Err(named.to_owned()), "{text}");
        }
        assert!(Template::parse("/{gateway}/x").unwrap().is_constant());
        assert!(!Template::parse("/{device}").unwrap().is_constant());
    }
}
