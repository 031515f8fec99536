//! The device API's short names, and the canonical topics they stand for.
//!
//! | written by a device | stands for |
//! |---|---|
//! | `t`, `telemetry[/STREAM]` | `dev/DEVICE/telemetry[/STREAM]` |
//! | `e`, `event/TYPE` | `dev/DEVICE/event[/TYPE]` |
//! | `c/#` | `dev/DEVICE/cmd/#` |
//! | `c/res/REQ/STATUS` | `dev/DEVICE/cmd-res/REQ/STATUS` |
//! | `s` | `dev/DEVICE/state` |
//!
//! The device comes from authentication, never from the text. Everything else is a topic as it stands.

use crate::hub::View;
use crate::message::{DeviceId, Reject};

/// One part of a device's own space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    Telemetry,
    Event,
    Command,
    Answer,
    State,
}

impl Part {
    /// The topic level under `dev/DEVICE/`.
    pub const fn level(self) -> &'static str {
        match self {
            Part::Telemetry => "telemetry",
            Part::Event => "event",
            Part::Command => "cmd",
            Part::Answer => "cmd-res",
            Part::State => "state",
        }
    }
}

/// Where a message is going or a subscription points, as a device says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address<'a> {
    /// The mirror: a topic or filter as it stands.
    Topic(&'a str),
    /// The device API: a part, and what follows it.
    Device(Part, Option<&'a str>),
}

impl<'a> Address<'a> {
    /// Reads an MQTT topic name or filter, in which the device API's names are first levels.
    pub fn from_mqtt(text: &'a str) -> Self {
        Self::split_mqtt(text).map_or(Address::Topic(text), |(part, _, rest)| Address::Device(part, rest))
    }

    /// The part, the name by which the device calls it, and the rest.
    fn split_mqtt(text: &'a str) -> Option<(Part, &'static str, Option<&'a str>)> {
        let (first, rest) = match text.split_once('/') {
            Some((first, rest)) => (first, Some(rest)),
            None => (text, None),
        };
        let (part, name) = match first {
            "t" => (Part::Telemetry, "t"),
            "telemetry" => (Part::Telemetry, "telemetry"),
            "e" => (Part::Event, "e"),
            "event" => (Part::Event, "event"),
            "s" => (Part::State, "s"),
            "c" => match rest.and_then(|r| r.strip_prefix("res/")) {
                Some(answer) => return Some((Part::Answer, "c/res", Some(answer))),
                None => (Part::Command, "c"),
            },
            _ => return None,
        };
        Some((part, name, rest))
    }

    /// The short name that `text` is, as [`view`](Address::view) gives it.
    pub(super) fn short_name(text: &str) -> Option<&'static str> {
        SHORT_NAMES.into_iter().find(|name| *name == text)
    }

    /// Writes the canonical topic into `buffer`, or gives the text itself when it already is one.
    ///
    /// # Errors
    /// [`Reject::Forbidden`] for the device API without a device; [`Reject::Malformed`] when a part lacks what it needs.
    pub fn canonical<'b>(self, device: Option<&DeviceId>, buffer: &'b mut String) -> Result<&'b str, Reject>
    where
        'a: 'b,
    {
        let (part, rest) = match self {
            Address::Topic(topic) => return Ok(topic),
            Address::Device(part, rest) => (part, rest),
        };
        let device = device.ok_or(Reject::Forbidden { rule: None })?;
        buffer.clear();
        for piece in ["dev/", device.as_str(), "/", part.level()] {
            buffer.push_str(piece);
        }
        if let Some(rest) = rest {
            buffer.push('/');
            buffer.push_str(rest);
        }
        Ok(buffer)
    }

    /// Checks what a publish needs beyond a topic: an answer names its request and status.
    pub fn check_publish(self) -> Result<(), Reject> {
        match self {
            Address::Device(Part::Answer, rest) => {
                let mut levels = rest.unwrap_or("").split('/').filter(|level| !level.is_empty());
                match (levels.next(), levels.next(), levels.next()) {
                    (Some(_), Some(_), None) => Ok(()),
                    _ => Err(Reject::Malformed { what: "an answer is addressed as REQUEST/STATUS" }),
                }
            }
            Address::Device(Part::State, Some(_)) => Err(Reject::Malformed { what: "state has no parts" }),
            Address::Device(Part::Telemetry | Part::Event | Part::Command | Part::State, _) | Address::Topic(_) => {
                Ok(())
            }
        }
    }

    /// How topics are shown to a device that subscribed in this way.
    pub fn view(text: &str, device: Option<&DeviceId>) -> View {
        let (Some((part, name, _)), Some(device)) = (Address::split_mqtt(text), device) else { return View::Canonical };
        let skip = "dev/".len() + device.as_str().len() + 1 + part.level().len();
        View::Short { skip: u16::try_from(skip).unwrap_or(0), prefix: name }
    }
}

/// Every name that `split_mqtt` gives.
const SHORT_NAMES: [&str; 7] = ["t", "telemetry", "e", "event", "s", "c", "c/res"];

/// The device whose commands a canonical topic or filter is about: `dev/DEVICE/cmd/...`.
pub fn commanded(topic: &str) -> Option<&str> {
    let (device, rest) = topic.strip_prefix("dev/")?.split_once('/')?;
    (rest == "cmd" || rest.starts_with("cmd/")).then_some(device)
}

/// Whether only the gateway itself writes here: presence and `$SYS` (any topic that begins with `$`).
pub fn is_reserved(topic: &str) -> bool {
    if topic.starts_with('$') {
        return true;
    }
    topic.strip_prefix("dev/").and_then(|rest| rest.split_once('/')).is_some_and(|(_, rest)| rest == "presence")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(text: &str) -> Result<String, Reject> {
        let device = DeviceId::parse("d1").unwrap();
        Address::from_mqtt(text).canonical(Some(&device), &mut String::new()).map(str::to_owned)
    }

    #[test]
    fn short_names_stand_for_the_devices_own_topics() {
        for (short, long) in [
            ("t", "dev/d1/telemetry"),
            ("t/temp/in", "dev/d1/telemetry/temp/in"),
            ("telemetry/temp", "dev/d1/telemetry/temp"),
            ("e/door", "dev/d1/event/door"),
            ("event/door", "dev/d1/event/door"),
            ("c/#", "dev/d1/cmd/#"),
            ("c/res/7/200", "dev/d1/cmd-res/7/200"),
            ("s", "dev/d1/state"),
            ("tx/y", "tx/y"),
            ("dev/other/state", "dev/other/state"),
        ] {
            assert_eq!(canonical(short).unwrap(), long);
        }
    }

    #[test]
    fn nobody_without_a_name_has_a_device_space() {
        assert_eq!(Address::from_mqtt("t").canonical(None, &mut String::new()), Err(Reject::Forbidden { rule: None }));
    }

    #[test]
    fn an_answer_needs_a_request_and_a_status() {
        assert!(Address::from_mqtt("c/res/7/200").check_publish().is_ok());
        for bad in ["c/res/7", "c/res//200", "c/res/7/200/x", "c/res/"] {
            assert!(Address::from_mqtt(bad).check_publish().is_err(), "{bad}");
        }
        assert!(Address::from_mqtt("s/x").check_publish().is_err());
    }

    #[test]
    fn a_short_subscription_shows_short_topics() {
        let device = DeviceId::parse("d1").unwrap();
        let View::Short { skip, prefix } = Address::view("c/#", Some(&device)) else { panic!("not short") };
        assert_eq!(format!("{prefix}{}", &"dev/d1/cmd/7/reboot"[usize::from(skip)..]), "c/7/reboot");
        assert_eq!(Address::view("dev/d1/cmd/#", Some(&device)), View::Canonical);
    }

    #[test]
    fn commands_and_reserved_topics_are_told_apart() {
        assert_eq!(commanded("dev/d1/cmd/7/reboot"), Some("d1"));
        assert_eq!(commanded("dev/d1/cmd-res/7/200"), None);
        assert!(is_reserved("dev/d1/presence") && is_reserved("$SYS/broker"));
        assert!(!is_reserved("dev/d1/presence/x") && !is_reserved("dev/d1/state"));
    }
}
