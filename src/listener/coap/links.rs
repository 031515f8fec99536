//! `/.well-known/core` (RFC 6690): what the asker may see, as links.

use std::fmt::Write as _;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tidegate_coap::uri::Query;

use super::answer::format_of;
use crate::gateway::{Client, Filter, Gateway, wall_ms};
use crate::message::{Message, Reject};

/// What a stranger is shown: how to stop being one.
const FOR_STRANGERS: [(&str, &str); 2] =
    [("/auth/c", "rt=\"tidegate.auth\";ct=60"), ("/auth/s", "rt=\"tidegate.auth\";ct=60")];

/// Links of the device API, with their attributes.
const DEVICE_API: [(&str, &str); 9] = [
    ("/t", "rt=\"tidegate.telemetry\""),
    ("/e", "rt=\"tidegate.event\""),
    ("/s", "rt=\"tidegate.state\";obs"),
    ("/c", "rt=\"tidegate.command\";obs"),
    ("/cr", "rt=\"tidegate.answer\""),
    ("/ps", "rt=\"core.ps core.ps.coll\";ct=40"),
    ("/rd", "rt=\"core.rd\";ct=40"),
    ("/rd-lookup/res", "rt=\"core.rd-lookup-res\";ct=40"),
    ("/rd-lookup/ep", "rt=\"core.rd-lookup-ep\";ct=40"),
];

/// Retained topics looked at for one listing.
const TOPICS_MAX: usize = 1000;

/// Which links.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// Everything.
    All,
    /// The topics that match a filter of MQTT.
    Topics(&'a str),
}

/// The links that `query` leaves of what policy shows to `client`.
///
/// # Errors
/// [`Reject::Malformed`] for a filter that is none, of MQTT or of RFC 6690 section 4.1.
pub fn list(gateway: &Gateway, client: &Client, which: Which<'_>, query: Query<'_>) -> Result<String, Reject> {
    let wanted = Wanted::of(query)?;
    let mut links = String::new();
    let topics = match which {
        Which::Topics(filter) => Filter::parse(filter)?,
        Which::All => {
            let api = DEVICE_API.iter().filter(|_| client.caller.device.is_some());
            api.for_each(|(path, attributes)| push(&mut links, &wanted, path, attributes));
            Filter { group: None, pattern: "#".into() }
        }
    };
    let mut attributes = String::new();
    for message in gateway.hub.retained(&topics, wall_ms()).iter().take(TOPICS_MAX) {
        let topic = message.topic.as_str();
        if !gateway.may_read(client, topic) {
            continue;
        }
        attributes.clear();
        describe(message, &mut attributes);
        push(&mut links, &wanted, &reference(topic), &attributes);
    }
    Ok(links)
}

/// The links that `query` leaves of what everybody may see.
///
/// # Errors
/// [`Reject::Malformed`] for a filter that is none of RFC 6690 section 4.1.
pub fn for_strangers(query: Query<'_>) -> Result<String, Reject> {
    let wanted = Wanted::of(query)?;
    let mut links = String::new();
    FOR_STRANGERS.iter().for_each(|(path, attributes)| push(&mut links, &wanted, path, attributes));
    Ok(links)
}

fn describe(message: &Message, attributes: &mut String) {
    attributes.push_str("rt=\"core.ps.data\";obs");
    if let Some(format) = format_of(message) {
        // Writing to a String cannot fail.
        let _ = write!(attributes, ";ct={format}");
    }
}

/// A topic as a URI reference: what RFC 3986 does not allow in a path segment is percent-encoded.
fn reference(topic: &str) -> String {
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
        .remove(b'/')
        .remove(b'-')
        .remove(b'.')
        .remove(b'_')
        .remove(b'~')
        .remove(b'!')
        .remove(b'$')
        .remove(b'&')
        .remove(b'\'')
        .remove(b'(')
        .remove(b')')
        .remove(b'*')
        .remove(b'+')
        .remove(b';')
        .remove(b'=')
        .remove(b':')
        .remove(b'@');
    format!("/ps/{}", utf8_percent_encode(topic, ENCODED))
}

fn push(links: &mut String, filter: &Wanted<'_>, path: &str, attributes: &str) {
    if !filter.takes(path, attributes) {
        return;
    }
    if !links.is_empty() {
        links.push(',');
    }
    let _ = write!(links, "<{path}>;{attributes}");
}

/// One filter of RFC 6690 section 4.1: `NAME=VALUE`, VALUE possibly ending in `*`.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted<'q> {
    name: Option<&'q str>,
    value: &'q str,
    prefix: bool,
}

impl<'q> Wanted<'q> {
    fn of(query: Query<'q>) -> Result<Self, Reject> {
        let mut filters = query.pairs().filter(|(name, _)| *name != "t");
        let Some((name, value)) = filters.next() else { return Ok(Wanted::default()) };
        if filters.next().is_some() {
            return Err(Reject::Malformed { what: "one filter at a time (RFC 6690 section 4.1)" });
        }
        let (value, prefix) = value.strip_suffix('*').map_or((value, false), |value| (value, true));
        Ok(Wanted { name: Some(name), value, prefix })
    }

    fn takes(&self, path: &str, attributes: &str) -> bool {
        let Some(name) = self.name else { return true };
        if name == "href" {
            return self.fits(path);
        }
        let mut values = attributes.split(';').filter_map(|attribute| {
            let (own, value) = attribute.split_once('=').unwrap_or((attribute, ""));
            (own == name).then(|| value.trim_matches('"'))
        });
        // A value may be a list separated by blanks.
        values.any(|value| value.split(' ').any(|word| self.fits(word)))
    }

    fn fits(&self, text: &str) -> bool {
        if self.prefix { text.starts_with(self.value) } else { text == self.value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(name: &'static str, value: &'static str, path: &str, attributes: &str) -> bool {
        let (value, prefix) = value.strip_suffix('*').map_or((value, false), |value| (value, true));
        Wanted { name: Some(name), value, prefix }.takes(path, attributes)
    }

    #[test]
    fn links_are_filtered_as_rfc_6690_says() {
        let attributes = "rt=\"core.ps.data other\";obs;ct=50";
        assert!(taken("rt", "core.ps.data", "/ps/a", attributes));
        assert!(taken("rt", "other", "/ps/a", attributes));
        assert!(taken("rt", "core*", "/ps/a", attributes));
        assert!(taken("ct", "50", "/ps/a", attributes));
        assert!(taken("href", "/ps*", "/ps/a", attributes));
        assert!(taken("obs", "*", "/ps/a", attributes) && taken("obs", "", "/ps/a", attributes));
        for (name, value) in [("rt", "core"), ("href", "/ps"), ("if", "x"), ("ct", "5")] {
            assert!(!taken(name, value, "/ps/a", attributes), "{name}={value}");
        }
        assert!(Wanted::default().takes("/x", ""));
    }

    #[test]
    fn a_topic_cannot_break_out_of_its_link() {
        assert_eq!(reference("plant/a b>;rt=\"x\",</y"), "/ps/plant/a%20b%3E;rt=%22x%22%2C%3C/y");
        assert_eq!(reference("ä"), "/ps/%C3%A4");
    }
}
