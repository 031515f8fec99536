//! What an accepted message is called on its way up: CloudEvents 1.0 attributes.

use crate::message::Message;
use crate::units::{Date, rfc3339};

/// `id`, `source`, `type` and `time` as user properties or, prefixed with `ce-`, as HTTP headers (CloudEvents bindings, binary mode).
pub fn attributes(message: &Message, gateway: &str) -> Vec<(String, String)> {
    vec![
        ("id".to_owned(), id(message, gateway)),
        ("source".to_owned(), source(message, gateway)),
        ("type".to_owned(), event_type(message).to_owned()),
        ("time".to_owned(), rfc3339(message.ingested_ms)),
        ("specversion".to_owned(), "1.0".to_owned()),
        ("subject".to_owned(), message.topic.as_str().to_owned()),
    ]
}

/// `GATEWAY/EPOCH/SEQ`: the same however often the message is sent.
pub fn id(message: &Message, gateway: &str) -> String {
    format!("{gateway}/{}/{}", message.id.epoch, message.id.seq)
}

/// `urn:tidegate:GATEWAY[:DEVICE]`.
pub fn source(message: &Message, gateway: &str) -> String {
    match &message.origin.device {
        Some(device) => format!("urn:tidegate:{gateway}:{device}"),
        None => format!("urn:tidegate:{gateway}"),
    }
}

/// By the part of the device's space that the topic is in.
pub fn event_type(message: &Message) -> &'static str {
    let mut levels = message.topic.levels();
    match (levels.next(), levels.next(), levels.next()) {
        (Some("dev"), Some(_), Some("telemetry")) => "tidegate.telemetry",
        (Some("dev"), Some(_), Some("event")) => "tidegate.event",
        (Some("dev"), Some(_), Some("cmd")) => "tidegate.command",
        (Some("dev"), Some(_), Some("cmd-res")) => "tidegate.answer",
        (Some("dev"), Some(_), Some("state")) => "tidegate.state",
        (Some("dev"), Some(_), Some("presence")) => "tidegate.presence",
        _ => "tidegate.message",
    }
}

/// Seconds since 1970 of an HTTP date in the form that RFC 9110 section 5.6.7 lets be sent: `Sun, 06 Nov 1994 08:49:37 GMT`.
pub fn http_date_secs(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_, date) = text.split_once(", ")?;
    let mut words = date.split(' ');
    let (day, month, year, time, "GMT", None) =
        (words.next()?, words.next()?, words.next()?, words.next()?, words.next()?, words.next())
    else {
        return None;
    };
    let number = |text: &str, max: u64| text.parse::<u64>().ok().filter(|number| *number <= max);
    let (day, year) = (number(day, 31)?, number(year, 9999)?);
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let mut parts = time.split(':');
    let (hour, minute, second, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else { return None };
    let second = number(hour, 23)? * 3600 + number(minute, 59)? * 60 + number(second, 60)?;
    Date { year, month, day }.days().map(|days| days * 86_400 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_dates_are_read() {
        assert_eq!(http_date_secs("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(http_date_secs("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(http_date_secs("Tue, 29 Feb 2000 00:00:00 GMT"), Some(951_782_400));
        for bad in [
            "",
            "soon",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 06 Nev 1994 08:49:37 GMT",
            "Sun, 0 Nov 1994 08:49:37 GMT",
            "x, 1 Jan 1 1:1:1 GMT",
        ] {
            assert_eq!(http_date_secs(bad), None, "{bad}");
        }
    }
}
