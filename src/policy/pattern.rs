//! The patterns of `on`, and what they match.
//!
//! A pattern is cut at `/` into segments; a topic, a topic filter and a path are cut the same way, so that `/a` begins with an empty
//! segment and never meets `a`. Segments:
//!
//! | written | matches |
//! |---|---|
//! | text | exactly that segment, byte for byte |
//! | `{device}`, also inside text (`gw-{device}`) | the caller's own id there; nothing for a caller without one |
//! | `+` | any one segment, also an empty one (MQTT) |
//! | `*` | any one segment that is not empty (paths: `/a/*` is not `/a/`) |
//! | `#` or `**`, last | the rest, also none of it: `a/#` matches `a` (MQTT), `/a/**` matches `/a` |
//!
//! As in MQTT, a wildcard in the first segment of an `allow` rule does not match a first segment that begins with `$`. In a `deny` rule it
//! does, for a deny must not have holes.

use super::rule::Effect;

/// One `on` entry, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    pub segments: Vec<Segment>,
    /// Ends with `#` or `**`.
    pub rest: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Literal(Box<str>),
    /// The caller's id between a prefix and a suffix, both often empty.
    Device {
        prefix: Box<str>,
        suffix: Box<str>,
    },
    /// `+`
    One,
    /// `*`
    OneNotEmpty,
}

pub(super) const BYTES_MAX: usize = 1_024;
pub(super) const LEVELS_MAX: usize = 64;
const DEVICE: &str = "{device}";

impl Pattern {
    /// # Errors
    /// What is wrong, as a clause.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("is empty");
        }
        if text.len() > BYTES_MAX || text.split('/').count() > LEVELS_MAX {
            return Err("is longer than 1024 bytes or 64 segments");
        }
        if text.bytes().any(|b| b < b' ' || b == 0x7f) {
            return Err("contains a control character");
        }
        let is_path = text.starts_with('/');
        let mut segments = Vec::new();
        let mut rest = false;
        for written in text.split('/') {
            if rest {
                return Err("has something after `#` or `**`, which must be last");
            }
            match written {
                "#" | "**" => rest = true,
                "+" => segments.push(Segment::One),
                "*" => segments.push(Segment::OneNotEmpty),
                "." | ".." if is_path => return Err("contains a dot segment, which no path keeps"),
                _ => segments.push(Segment::parse(written, is_path)?),
            }
        }
        Ok(Pattern { segments, rest })
    }

    /// True if a path can match: it begins with an empty segment, or with one that stands for it.
    pub fn may_match_path(&self) -> bool {
        match self.segments.first() {
            None => true,
            Some(Segment::Literal(text)) => text.is_empty(),
            Some(Segment::One) => true,
            Some(Segment::OneNotEmpty | Segment::Device { .. }) => false,
        }
    }

    /// The plain definition: does this pattern match that concrete topic or path?
    /// The index gives the same answers faster; `explain` and the tests use this one.
    pub fn matches(&self, resource: &str, device: Option<&str>, effect: Effect) -> bool {
        let mut given = resource.split('/');
        let wild_first = !matches!(self.segments.first(), Some(Segment::Literal(_) | Segment::Device { .. }));
        if wild_first && effect == Effect::Allow && resource.starts_with('$') {
            return false;
        }
        for segment in &self.segments {
            match given.next() {
                Some(text) if segment.matches(text, device) => {}
                _ => return false,
            }
        }
        self.rest || given.next().is_none()
    }

    /// Every topic that `filter` matches is matched by this pattern, in an allow rule.
    pub fn covers(&self, filter: &str, device: Option<&str>) -> bool {
        let wild_first = !matches!(self.segments.first(), Some(Segment::Literal(_) | Segment::Device { .. }));
        if wild_first && filter.starts_with('$') {
            return false;
        }
        // A topic has at least one level, so `#` alone says the same as `+/#`.
        let filter = if filter == "#" { "+/#" } else { filter };
        let mut given = filter.split('/');
        for segment in &self.segments {
            match given.next() {
                Some("#") | None => return false,
                Some("+") if *segment != Segment::One => return false,
                Some("+") => {}
                Some(text) if segment.matches(text, device) => {}
                Some(_) => return false,
            }
        }
        self.rest || given.next().is_none()
    }

    /// Some topic that `filter` matches is matched by this pattern, in a deny rule.
    pub fn meets(&self, filter: &str, device: Option<&str>) -> bool {
        // A filter that begins with a wildcard never delivers a `$` topic.
        let dollar = |s: &Segment| matches!(s, Segment::Literal(text) if text.starts_with('$'));
        if filter.starts_with(['+', '#']) && self.segments.first().is_some_and(dollar) {
            return false;
        }
        let mut given = filter.split('/');
        for segment in &self.segments {
            match given.next() {
                Some("#") => return segment.possible(device) && self.rest_possible(device),
                Some("+") if segment.possible(device) => {}
                Some(text) if text != "+" && segment.matches(text, device) => {}
                _ => return false,
            }
        }
        self.rest || matches!(given.next(), None | Some("#"))
    }

    /// Every placeholder has a value.
    fn rest_possible(&self, device: Option<&str>) -> bool {
        self.segments.iter().all(|s| s.possible(device))
    }
}

impl Segment {
    fn parse(written: &str, is_path: bool) -> Result<Self, &'static str> {
        let parts = written.split_once(DEVICE);
        let literal = parts.map_or((written, ""), |(prefix, suffix)| (prefix, suffix));
        for text in [literal.0, literal.1] {
            if text.contains(['+', '#', '*']) {
                return Err("mixes a wildcard with other characters; a wildcard is a whole segment");
            }
            if text.contains(['{', '}']) {
                return Err("contains a brace; the only placeholder is {device}, once a segment");
            }
            if is_path && text.contains(['%', '?', '\\']) {
                return Err("contains %, ? or \\; paths are written decoded and without a query");
            }
        }
        Ok(match parts {
            Some((prefix, suffix)) => Segment::Device { prefix: prefix.into(), suffix: suffix.into() },
            None => Segment::Literal(written.into()),
        })
    }

    pub fn matches(&self, text: &str, device: Option<&str>) -> bool {
        match self {
            Segment::Literal(literal) => **literal == *text,
            Segment::Device { prefix, suffix } => device.is_some_and(|id| is_id_between(text, prefix, id, suffix)),
            Segment::One => true,
            Segment::OneNotEmpty => !text.is_empty(),
        }
    }

    /// Some segment matches, given the caller.
    pub fn possible(&self, device: Option<&str>) -> bool {
        !matches!(self, Segment::Device { .. }) || device.is_some()
    }
}

/// `text` is `prefix`, then `id`, then `suffix`.
pub(super) fn is_id_between(text: &str, prefix: &str, id: &str, suffix: &str) -> bool {
    text.strip_prefix(prefix).and_then(|t| t.strip_prefix(id)) == Some(suffix)
}

/// A well-formed topic filter (`[MQTT-4.7.1-2]`, `[MQTT-4.7.1-3]`).
pub(super) fn is_filter(text: &str) -> bool {
    let mut levels = text.split('/').peekable();
    if text.is_empty() || text.contains('\0') {
        return false;
    }
    while let Some(level) = levels.next() {
        let well_formed = match level {
            "#" => levels.peek().is_none(),
            "+" => true,
            _ => !level.contains(['+', '#']),
        };
        if !well_formed {
            return false;
        }
    }
    true
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// MQTT's own definition of a filter's matches, for the properties.
    pub fn filter_matches(filter: &str, topic: &str) -> bool {
        if topic.starts_with('$') && filter.starts_with(['+', '#']) {
            return false;
        }
        let (mut f, mut t) = (filter.split('/'), topic.split('/'));
        loop {
            match (f.next(), t.next()) {
                (Some("#"), _) => return true,
                (Some("+"), Some(_)) => {}
                (Some(a), Some(b)) if a == b => {}
                (None, None) => return true,
                _ => return false,
            }
        }
    }

    pub fn any_topic() -> impl Strategy<Value = String> {
        let level = prop_oneof![Just("a"), Just("b"), Just("dev-1"), Just(""), Just("$SYS"), Just("gw-dev-1")];
        prop::collection::vec(level, 1..5)
            .prop_map(|l| l.join("/"))
            .prop_filter("a topic is not empty", |t| !t.is_empty())
    }

    pub fn any_filter() -> impl Strategy<Value = String> {
        let level =
            prop_oneof![Just("a"), Just("b"), Just("dev-1"), Just(""), Just("+"), Just("$SYS"), Just("gw-dev-1")];
        (prop::collection::vec(level, 0..4), any::<bool>())
            .prop_map(|(mut l, rest)| {
                if rest {
                    l.push("#");
                }
                l.join("/")
            })
            .prop_filter("a filter is not empty", |t| !t.is_empty())
    }

    pub fn any_pattern() -> impl Strategy<Value = String> {
        let segment = prop_oneof![
            3 => prop_oneof![Just("a"), Just("b"), Just(""), Just("$SYS")],
            1 => Just("+"),
            1 => Just("*"),
            1 => Just("{device}"),
            1 => Just("gw-{device}"),
        ];
        (prop::collection::vec(segment, 0..4), any::<bool>())
            .prop_map(|(mut s, rest)| {
                if rest {
                    s.push("#");
                }
                s.join("/")
            })
            .prop_filter("a pattern is not empty", |t| !t.is_empty())
    }

    fn matches(pattern: &str, resource: &str) -> bool {
        Pattern::parse(pattern).unwrap().matches(resource, Some("dev-1"), Effect::Allow)
    }

    #[test]
    fn a_pattern_matches_by_segments() {
        assert!(matches("dev/{device}/#", "dev/dev-1/telemetry/x"));
        assert!(matches("dev/{device}/#", "dev/dev-1"));
        assert!(!matches("dev/{device}/#", "dev/dev-2/telemetry"));
        assert!(!matches("dev/{device}/#", "dev/dev-1x"));
        assert!(!matches("dev/{device}/#", "/dev/dev-1/x"));
        assert!(matches("/api/v1/{device}/*", "/api/v1/dev-1/x"));
        assert!(!matches("/api/v1/{device}/*", "/api/v1/dev-1/"));
        assert!(!matches("/api/v1/{device}/*", "/api/v1/dev-1/x/y"));
        assert!(matches("a/+/b", "a//b"));
        assert!(matches("site/gw-{device}-a", "site/gw-dev-1-a"));
        assert!(!matches("#", "$SYS/broker"));
        assert!(matches("$SYS/#", "$SYS/broker"));
    }

    #[test]
    fn a_deny_pattern_has_no_hole_for_dollar_topics() {
        let all = Pattern::parse("#").unwrap();
        assert!(all.matches("$SYS/broker", None, Effect::Deny));
        assert!(!all.matches("$SYS/broker", None, Effect::Allow));
    }

    #[test]
    fn a_caller_without_an_id_matches_no_placeholder() {
        let own = Pattern::parse("dev/{device}/#").unwrap();
        assert!(!own.matches("dev//x", None, Effect::Allow));
        assert!(!own.matches("dev/{device}/x", None, Effect::Allow));
        assert!(!own.meets("dev/#", None));
        assert!(own.meets("dev/#", Some("dev-1")));
    }

    #[test]
    fn a_filter_is_covered_only_as_a_whole() {
        let own = Pattern::parse("dev/{device}/#").unwrap();
        assert!(own.covers("dev/dev-1/#", Some("dev-1")));
        assert!(own.covers("dev/dev-1", Some("dev-1")));
        assert!(own.covers("dev/dev-1/+/x", Some("dev-1")));
        assert!(!own.covers("dev/+/telemetry", Some("dev-1")));
        assert!(!own.covers("dev/#", Some("dev-1")));
        assert!(!own.covers("#", Some("dev-1")));
        assert!(Pattern::parse("+/#").unwrap().covers("#", None));
        assert!(!Pattern::parse("*/#").unwrap().covers("#", None));
        assert!(!Pattern::parse("a/+").unwrap().covers("a/#", None));
    }

    #[test]
    fn nonsense_patterns_are_refused() {
        for bad in [
            "",
            "a/#/b",
            "a+",
            "a/b#",
            "{id}/a",
            "{device}{device}",
            "a/**/b",
            "/a/%41",
            "/a/../b",
            "/a?b",
            "a\nb",
            "x*",
        ] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
        let long = "a/".repeat(LEVELS_MAX);
        assert!(Pattern::parse(&long).is_err());
    }

    proptest! {
        #[test]
        fn a_covered_filter_matches_only_what_the_pattern_matches(
            pattern in any_pattern(), filter in any_filter(), topics in prop::collection::vec(any_topic(), 1..40),
        ) {
            let parsed = Pattern::parse(&pattern).unwrap();
            if parsed.covers(&filter, Some("dev-1")) {
                for topic in topics.iter().filter(|t| filter_matches(&filter, t)) {
                    prop_assert!(parsed.matches(topic, Some("dev-1"), Effect::Allow), "{pattern} {filter} {topic}");
                }
            }
        }

        #[test]
        fn a_filter_that_matches_a_denied_topic_meets_the_pattern(
            pattern in any_pattern(), filter in any_filter(), topics in prop::collection::vec(any_topic(), 1..40),
        ) {
            let parsed = Pattern::parse(&pattern).unwrap();
            for topic in topics.iter().filter(|t| filter_matches(&filter, t)) {
                if parsed.matches(topic, Some("dev-1"), Effect::Deny) {
                    prop_assert!(parsed.meets(&filter, Some("dev-1")), "{pattern} {filter} {topic}");
                }
            }
        }

        #[test]
        fn a_filter_covers_itself(filter in any_filter()) {
            if !filter.contains("dev-1") {
                prop_assert!(Pattern::parse(&filter).unwrap().covers(&filter, None));
            }
        }
    }
}
