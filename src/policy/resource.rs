//! Brings a resource to the one spelling that rules speak about, or finds that it has none.
//!
//! A topic is what it is. A path is decoded segment by segment, and refused when a program behind the gateway could cut it
//! differently: an encoded slash, a backslash, a dot segment, an empty segment inside, a control character, bytes that are not UTF-8, a `%` that
//! encodes nothing, a query or fragment left on. What remains has the same segments for everybody.

use std::borrow::Cow;

use super::pattern::is_filter;
use super::rule::takes_topic;
use crate::message::Action;

/// The resource as rules see it; `None` if no rule can speak about it.
pub(super) fn canonical(action: Action, resource: &str) -> Option<Cow<'_, str>> {
    if action == Action::Subscribe {
        return is_filter(resource).then_some(Cow::Borrowed(resource));
    }
    if takes_topic(action) {
        let is_topic = !resource.is_empty() && !resource.bytes().any(|b| matches!(b, 0 | b'+' | b'#'));
        return is_topic.then_some(Cow::Borrowed(resource));
    }
    if action == Action::Connect {
        let is_authority = !resource.is_empty() && !resource.bytes().any(|b| b <= b' ' || b == 0x7f || b == b'%');
        return is_authority.then_some(Cow::Borrowed(resource));
    }
    canonical_path(resource)
}

/// A request's path in its one spelling; `None` if programs differ about it.
pub fn canonical_path(path: &str) -> Option<Cow<'_, str>> {
    decode(path).filter(|decoded| is_unambiguous(decoded))
}

fn decode(path: &str) -> Option<Cow<'_, str>> {
    if path.contains(['?', '#']) {
        return None;
    }
    if !path.contains('%') {
        return Some(Cow::Borrowed(path));
    }
    let mut decoded = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
        let byte = u8::try_from(digit()? * 16 + digit()?).ok()?;
        // An encoded slash is a slash to some and text to others.
        if byte == b'/' {
            return None;
        }
        decoded.push(byte);
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

fn is_unambiguous(path: &str) -> bool {
    let Some(segments) = path.strip_prefix('/') else { return false };
    if segments.bytes().any(|b| b < b' ' || b == 0x7f || b == b'\\') {
        return false;
    }
    let mut segments = segments.split('/').peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        if matches!(segment, "." | "..") || (segment.is_empty() && !is_last) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(text: &str) -> Option<String> {
        canonical(Action::Get, text).map(Cow::into_owned)
    }

    #[test]
    fn a_path_has_one_spelling() {
        assert_eq!(path("/a/b").as_deref(), Some("/a/b"));
        assert_eq!(path("/%61/b%20c").as_deref(), Some("/a/b c"));
        assert_eq!(path("/").as_deref(), Some("/"));
        assert_eq!(path("/a/").as_deref(), Some("/a/"));
        assert_eq!(path("/%C3%A4").as_deref(), Some("/ä"));
        // Decoded once, never twice.
        assert_eq!(path("/%2561").as_deref(), Some("/%61"));
    }

    #[test]
    fn a_path_that_two_programs_cut_differently_has_none() {
        for bad in [
            "",
            "a",
            "*",
            "/a%2Fb",
            "/a%2fb",
            "/a//b",
            "//a",
            "/a/../b",
            "/a/%2e%2E/b",
            "/./a",
            "/a/..",
            "/a\\b",
            "/a%5Cb",
            "/%",
            "/%4",
            "/%zz",
            "/%ff",
            "/a%00",
            "/a?b",
            "/a#b",
            "/a%0d%0a",
        ] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_topic_is_taken_as_it_is_and_a_filter_must_be_one() {
        assert_eq!(canonical(Action::Publish, "a%2Fb/..").as_deref(), Some("a%2Fb/.."));
        assert_eq!(canonical(Action::Publish, "a/+"), None);
        assert_eq!(canonical(Action::Subscribe, "a/+/#").as_deref(), Some("a/+/#"));
        for bad in ["", "a#", "a/#/b", "a+/b", "a\0"] {
            assert_eq!(canonical(Action::Subscribe, bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn the_canonical_path_keeps_the_segments_of_the_raw_one(raw in "(/[a-z%0-9./\\\\]{0,6}){1,5}") {
            if let Some(clean) = path(&raw) {
                prop_assert_eq!(clean.split('/').count(), raw.split('/').count());
                prop_assert!(!clean.contains("//") && !clean.contains("/../") && !clean.contains('\\'));
            }
        }
    }
}
