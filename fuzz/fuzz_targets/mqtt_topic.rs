//! Topic filters against a second opinion: a matcher written from the text of section 4.7 by recursion. Input: filter, NUL, topic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_mqtt::topic;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (filter, name) = text.split_once('\0').unwrap_or((text, text));
    assert_eq!(topic::levels(name), name.split('/').count());
    assert_eq!(topic::has_wildcard(name), name.contains(['+', '#']));
    if topic::check_filter(filter).is_err() {
        return;
    }
    let inner = topic::shared(filter).map_or(filter, |(group, inner)| {
        assert!(!group.is_empty() && !topic::has_wildcard(group));
        inner
    });
    assert!(!inner.is_empty());
    if topic::check_name(name).is_err() {
        return;
    }
    assert!(!topic::has_wildcard(name));
    let (filter, levels): (Vec<&str>, Vec<&str>) = (inner.split('/').collect(), name.split('/').collect());
    let hidden = name.starts_with('$') && ["+", "#"].contains(&filter[0]);
    assert_eq!(topic::matches(inner, name), !hidden && selects(&filter, &levels), "{inner:?} {name:?}");
    // A name is a filter that selects itself alone, unless it reads as a shared subscription.
    if topic::check_filter(name).is_ok() && topic::shared(name).is_none() {
        assert!(topic::matches(name, name));
    }
});

fn selects(filter: &[&str], levels: &[&str]) -> bool {
    match filter {
        ["#"] => true,
        [] => levels.is_empty(),
        ["+", rest @ ..] => !levels.is_empty() && selects(rest, &levels[1..]),
        [level, rest @ ..] => levels.first() == Some(level) && selects(rest, &levels[1..]),
    }
}
