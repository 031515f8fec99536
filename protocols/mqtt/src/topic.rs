//! Topic names, topic filters and how they meet (MQTT 5 section 4.7; the same rules in 3.1.1).

use crate::error::Error;

/// Checks a topic name: at least one byte, no wildcard (`[MQTT-4.7.3-1]`, `[MQTT-3.3.2-2]`). NUL is refused by the text decoder.
pub fn check_name(name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::TopicName("is empty"));
    }
    if has_wildcard(name) {
        return Err(Error::TopicName("has a wildcard"));
    }
    Ok(())
}

/// Whether `+` or `#` is anywhere in it.
#[inline]
pub fn has_wildcard(text: &str) -> bool {
    // Folded rather than short-circuited: topics are short and this vectorises.
    text.bytes().fold(false, |found, b| found | (b == b'+') | (b == b'#'))
}

/// Levels, empty ones included: one more than there are slashes.
#[inline]
pub fn levels(text: &str) -> usize {
    1 + text.bytes().filter(|b| *b == b'/').count()
}

/// Checks a topic filter, `$share/GROUP/FILTER` included (`[MQTT-4.7.1-1]`, `[MQTT-4.7.1-2]`, `[MQTT-4.8.2-1]`, `[MQTT-4.8.2-2]`).
pub fn check_filter(filter: &str) -> Result<(), Error> {
    let filter = match filter.strip_prefix("$share/") {
        None if filter == "$share" => return Err(Error::TopicFilter("is a shared subscription without a group")),
        None => filter,
        Some(shared) => {
            let Some((group, inner)) = shared.split_once('/') else {
                return Err(Error::TopicFilter("is a shared subscription without a filter"));
            };
            if group.is_empty() || has_wildcard(group) {
                return Err(Error::TopicFilter("has a share name that is empty or has a wildcard"));
            }
            inner
        }
    };
    if filter.is_empty() {
        return Err(Error::TopicFilter("is empty"));
    }
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        match level {
            "+" => {}
            "#" if levels.peek().is_none() => {}
            "#" => return Err(Error::TopicFilter("has # before its last level")),
            _ if has_wildcard(level) => return Err(Error::TopicFilter("has a wildcard inside a level")),
            _ => {}
        }
    }
    Ok(())
}

/// `$share/GROUP/FILTER` taken apart; None for an ordinary filter. The filter must have passed [`check_filter`].
pub fn shared(filter: &str) -> Option<(&str, &str)> {
    filter.strip_prefix("$share/")?.split_once('/')
}

/// Whether a topic name is one of those that the filter selects. Both must be valid; a shared filter is taken apart first.
///
/// A topic that begins with `$` is not selected by a leading wildcard (`[MQTT-4.7.2-1]`).
pub fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && (filter.starts_with('+') || filter.starts_with('#')) {
        return false;
    }
    let mut filter = filter.split('/');
    let mut topic = topic.split('/');
    loop {
        match (filter.next(), topic.next()) {
            // `sport/#` also selects the parent, `sport`.
            (Some("#"), _) => return true,
            (Some("+"), Some(_)) => {}
            (Some(f), Some(t)) if f == t => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_section_4_7_match_as_written() {
        for (filter, topic, expected) in [
            ("sport/tennis/player1/#", "sport/tennis/player1", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/ranking", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true),
            ("sport/#", "sport", true),
            ("#", "anything/at/all", true),
            ("#", "/", true),
            ("sport/tennis/+", "sport/tennis/player1", true),
            ("sport/tennis/+", "sport/tennis/player1/ranking", false),
            ("sport/+", "sport", false),
            ("sport/+", "sport/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("+/tennis/#", "sport/tennis", true),
            ("#", "$SYS/broker", false),
            ("+/monitor/Clients", "$SYS/monitor/Clients", false),
            ("$SYS/#", "$SYS/broker", true),
            ("$SYS/monitor/+", "$SYS/monitor/Clients", true),
            ("a", "A", false),
            ("a/b", "a/b/", false),
            ("a//b", "a//b", true),
            ("a/+/b", "a//b", true),
            ("abc", "ab", false),
        ] {
            assert_eq!(matches(filter, topic), expected, "{filter} on {topic}");
        }
    }

    #[test]
    fn filters_with_a_misplaced_wildcard_are_refused() {
        for good in ["#", "+", "a/#", "+/+", "/", "//", "a/+/#", "$SYS/#", "$share/g/#", "$share/g//a", "$shared/x"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        for bad in ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "$share", "$share/", "$share/g", "$share/g/", "$share//a"] {
            assert!(check_filter(bad).is_err(), "{bad}");
        }
        assert!(check_filter("$share/+/a").is_err());
        assert!(check_filter("$share/g#/a").is_err());
    }

    #[test]
    fn a_shared_filter_comes_apart() {
        assert_eq!(shared("$share/group/a/+/#"), Some(("group", "a/+/#")));
        assert_eq!(shared("$share/group//a"), Some(("group", "/a")));
        assert_eq!(shared("a/b"), None);
    }

    #[test]
    fn names_are_not_empty_and_have_no_wildcards() {
        assert_eq!(check_name("a//b"), Ok(()));
        for bad in ["", "a/+", "#", "a#b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert_eq!(levels("a//b/"), 4);
    }
}
