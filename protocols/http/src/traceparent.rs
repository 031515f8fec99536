//! `traceparent` (W3C Trace Context, level 1, section 3.2): the same text on HTTP, as an MQTT 5 user property and in `CoAP`.

/// A valid version-00 header: 55 bytes of lower-case hex and dashes, with neither id all zeros.
pub const BYTES: usize = 55;

/// Whether `text` may be passed on as it is. Later versions are accepted by their first 55 bytes, as section 3.2.4 asks; version `ff` is not.
pub fn is_valid(text: &str) -> bool {
    let bytes = text.as_bytes();
    let Some((head, rest)) = bytes.split_at_checked(BYTES) else { return false };
    let is_hex = |field: &[u8]| field.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let is_zero = |field: &[u8]| field.iter().all(|b| *b == b'0');
    let mut fields = head.split(|b| *b == b'-');
    let (Some(version), Some(trace), Some(parent), Some(flags), None) =
        (fields.next(), fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return false;
    };
    let sizes = (version.len(), trace.len(), parent.len(), flags.len()) == (2, 32, 16, 2);
    let hex = [version, trace, parent, flags].into_iter().all(is_hex);
    let tail = rest.is_empty() || (version != b"00" && rest.starts_with(b"-"));
    sizes && hex && tail && version != b"ff" && !is_zero(trace) && !is_zero(parent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_examples_of_the_recommendation() {
        assert!(is_valid(GOOD));
        assert!(is_valid("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-brings"));
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
        ] {
            assert!(!is_valid(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn one_changed_character_is_seen(at in 0..55usize, to in "[^0-9a-f-]") {
            let mut text: Vec<char> = GOOD.chars().collect();
            text[at] = to.chars().next().unwrap_or('x');
            let changed: String = text.into_iter().collect();
            prop_assert!(!is_valid(&changed));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,80}") {
            let _ = is_valid(&text);
        }
    }
}
