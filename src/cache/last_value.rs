//! The last value of each topic: MQTT's retained messages, `GET /topics/T`, CoAP's `GET /ps/T`, `state` and `presence`.
//!
//! Bounded in topics and in bytes. At a bound a message that needs more room is refused and counted; nothing is ever thrown out silently,
//! for a retained value is a promise. Expired values count as absent at once and are removed by [`LastValues::expire`], and before
//! anything is refused.
//!
//! Payloads are copied in: twenty bytes must not pin the read buffer that they came in.
//!
//! Cost: `get` is one hash; `insert` one hash, one tree step and two allocations; a filter visits the topics below its literal prefix in
//! order and leaps over branches that cannot match, so `a/b/#` costs what it yields, and `dev/+/state` three steps a device.
//! Times are milliseconds of the wall clock, as [`Message::ingested_ms`], because that is what expiry counts from.

use std::collections::{BTreeSet, HashMap};
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::limit;
use crate::message::{Message, Reject, Topic};

/// What one entry costs beside [`Message::cost_bytes`]: its places in the map, the order and the expiry list.
const ENTRY_BYTES: u64 = 160;
/// What a refused sender is told: room appears when somebody removes a value, so there is no better guess.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Last values by topic.
#[derive(Debug)]
pub struct LastValues {
    values: HashMap<Topic, Arc<Message>>,
    order: BTreeSet<Topic>,
    /// Topics that expire, soonest first.
    expiring: BTreeSet<(u64, Topic)>,
    /// Topics whose value has expired since somebody asked.
    expired: Vec<Topic>,
    bytes: u64,
    messages_max: usize,
    bytes_max: u64,
    refused: u64,
}

impl LastValues {
    /// Bounded by `retained_messages_max` and `retained_bytes_max`.
    pub fn new(limits: &limit::Config) -> Self {
        LastValues {
            values: HashMap::new(),
            order: BTreeSet::new(),
            expiring: BTreeSet::new(),
            expired: Vec::new(),
            bytes: 0,
            messages_max: limits.retained_messages_max as usize,
            bytes_max: limits.retained_bytes_max.bytes(),
            refused: 0,
        }
    }

    /// Takes new bounds. What is there stays, even above them.
    pub fn set_limits(&mut self, limits: &limit::Config) {
        self.messages_max = limits.retained_messages_max as usize;
        self.bytes_max = limits.retained_bytes_max.bytes();
    }

    /// Keeps `message` as the last value of its topic; an empty payload removes the value (`[MQTT-3.3.1-6]`).
    ///
    /// # Errors
    /// [`Reject::Full`] when a bound is reached; the value that was there stays.
    pub fn insert(&mut self, message: &Message, now_ms: u64) -> Result<(), Reject> {
        if message.payload.is_empty() || expiry_ms(message).is_some_and(|expiry| expiry <= now_ms) {
            self.remove(message.topic.as_str());
            return Ok(());
        }
        self.expire(now_ms);
        let cost = cost(message);
        let replaced = self.values.get(&message.topic);
        if replaced.is_none() && self.values.len() >= self.messages_max {
            self.refused += 1;
            return Err(Reject::Full { limit: "retained_messages_max", retry_after: RETRY_AFTER });
        }
        let freed = replaced.map_or(0, |old| self::cost(old));
        // A value that does not grow is always welcome, or a lowered bound would freeze the old ones.
        if cost > freed && self.bytes - freed + cost > self.bytes_max {
            self.refused += 1;
            return Err(Reject::Full { limit: "retained_bytes_max", retry_after: RETRY_AFTER });
        }
        self.remove(message.topic.as_str());
        let kept = Message { payload: Bytes::copy_from_slice(&message.payload), ..message.clone() };
        if let Some(expiry) = expiry_ms(&kept) {
            self.expiring.insert((expiry, kept.topic.clone()));
        }
        self.bytes += cost;
        self.order.insert(kept.topic.clone());
        self.values.insert(kept.topic.clone(), Arc::new(kept));
        Ok(())
    }

    /// Forgets the value of a topic. False if there was none.
    pub fn remove(&mut self, topic: &str) -> bool {
        let Some(old) = self.values.remove(topic) else { return false };
        self.order.remove(topic);
        if let Some(expiry) = expiry_ms(&old) {
            self.expiring.remove(&(expiry, old.topic.clone()));
        }
        self.bytes -= cost(&old);
        true
    }

    /// The last value of one topic, unless it has expired.
    pub fn get(&self, topic: &str, now_ms: u64) -> Option<&Arc<Message>> {
        self.values.get(topic).filter(|message| is_alive(message, now_ms))
    }

    /// Shows every value whose topic matches `filter`, in the order of the topics, until `visit` breaks.
    /// A filter that begins with a wildcard does not match topics that begin with `$` (`[MQTT-4.7.2-1]`).
    pub fn visit(&self, filter: &str, now_ms: u64, mut visit: impl FnMut(&Arc<Message>) -> ControlFlow<()>) {
        let filter: Vec<&str> = filter.split('/').collect();
        let literals = filter.iter().take_while(|level| !matches!(**level, "+" | "#")).count();
        if literals == filter.len() {
            if let Some(message) = self.get(&filter.join("/"), now_ms) {
                let _ = visit(message);
            }
            return;
        }
        let prefix = filter.get(..literals).unwrap_or_default().join("/");
        let mut from = Bound::Included(prefix.clone());
        loop {
            let bounds = (from.as_ref().map(String::as_str), Bound::Unbounded);
            let Some(topic) = self.order.range::<str, _>(bounds).next() else { return };
            if !topic.as_str().starts_with(prefix.as_str()) {
                return;
            }
            from = match step(&filter, literals, topic.as_str()) {
                Step::Matches => {
                    if let Some(message) = self.get(topic.as_str(), now_ms)
                        && visit(message).is_break()
                    {
                        return;
                    }
                    Bound::Excluded(topic.as_str().to_owned())
                }
                Step::Next => Bound::Excluded(topic.as_str().to_owned()),
                Step::Leap(to) => Bound::Included(to),
            };
        }
    }

    /// Up to `messages_max` values that match `filter`, in the order of the topics.
    pub fn matching(&self, filter: &str, now_ms: u64, messages_max: usize) -> Vec<Arc<Message>> {
        let mut found = Vec::new();
        self.visit(filter, now_ms, |message| {
            if found.len() == messages_max {
                return ControlFlow::Break(());
            }
            found.push(Arc::clone(message));
            ControlFlow::Continue(())
        });
        found
    }

    /// Removes what has expired. Returns how many.
    pub fn expire(&mut self, now_ms: u64) -> usize {
        let mut expired = 0;
        while let Some((expiry, topic)) = self.expiring.first().filter(|(expiry, _)| *expiry <= now_ms) {
            let (expiry, topic) = (*expiry, topic.clone());
            self.expiring.remove(&(expiry, topic.clone()));
            self.remove(topic.as_str());
            self.expired.push(topic);
            expired += 1;
        }
        expired
    }

    /// The topics that [`expire`](LastValues::expire) has removed since the last call and that have no new value: what keeps a copy can let it go.
    pub fn take_expired(&mut self) -> Vec<Topic> {
        let mut expired = std::mem::take(&mut self.expired);
        expired.retain(|topic| !self.values.contains_key(topic));
        expired
    }

    /// When the next value expires.
    pub fn next_expiry_ms(&self) -> Option<u64> {
        self.expiring.first().map(|(expiry, _)| *expiry)
    }

    /// Topics with a value, expired ones included until they are removed.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// What counts against `retained_bytes_max`.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Messages refused at a bound since the start.
    pub fn refused(&self) -> u64 {
        self.refused
    }
}

fn cost(message: &Message) -> u64 {
    message.cost_bytes() as u64 + ENTRY_BYTES
}

fn expiry_ms(message: &Message) -> Option<u64> {
    let secs = message.properties.as_ref()?.expiry_secs?;
    Some(message.ingested_ms.saturating_add(u64::from(secs) * 1_000))
}

fn is_alive(message: &Message, now_ms: u64) -> bool {
    expiry_ms(message).is_none_or(|expiry| expiry > now_ms)
}

enum Step {
    Matches,
    /// Does not match, and says nothing about its neighbours.
    Next,
    /// Nothing before this text matches.
    Leap(String),
}

/// Compares one topic with the levels of a filter that begins with `literals` levels without wildcard.
///
/// Topics are in the order of their bytes. All topics below `p/` stand together, from `p/` to just before `p0`, for `0` follows `/`.
fn step(filter: &[&str], literals: usize, topic: &str) -> Step {
    let mut start = 0;
    for (depth, expected) in filter.iter().enumerate() {
        if *expected == "#" {
            // `$` topics sort together, so one leap passes them.
            return if depth == 0 && topic.starts_with('$') { Step::Leap("%".to_owned()) } else { Step::Matches };
        }
        // The topic ended a level ago: only `#` matches that.
        if start > topic.len() {
            return Step::Next;
        }
        let rest = topic.get(start..).unwrap_or_default();
        let level = rest.split('/').next().unwrap_or_default();
        if *expected == "+" {
            if depth == 0 && topic.starts_with('$') {
                return Step::Leap("%".to_owned());
            }
        } else if level != *expected {
            return leap(topic, start, level, expected, depth >= literals);
        }
        start += level.len() + 1;
    }
    if start > topic.len() {
        return Step::Matches;
    }
    // Longer than the filter: so is everything below this point.
    Step::Leap(format!("{}0", topic.get(..start.saturating_sub(1)).unwrap_or_default()))
}

/// `topic` has `level` at byte `start`, where the filter has `expected`.
fn leap(topic: &str, start: usize, level: &str, expected: &str, below_wildcard: bool) -> Step {
    let before = topic.get(..start).unwrap_or_default();
    let wanted = format!("{before}{expected}");
    if *wanted > *topic {
        return Step::Leap(wanted);
    }
    // Past it: `expected/...` may still follow only if the level continues `expected` with something that sorts before `/`.
    if !below_wildcard || level.starts_with(expected) {
        return Step::Next;
    }
    match before.strip_suffix('/') {
        Some(parent) => Step::Leap(format!("{parent}0")),
        None => Step::Next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{MessageId, Origin, Properties, Protocol, Qos};
    use crate::units::ByteSize;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn message(topic: &str, payload: &str, expiry_secs: Option<u32>) -> Message {
        Message {
            id: MessageId { epoch: 1, seq: 1 },
            ingested_ms: 1_000_000,
            topic: Topic::parse(topic).unwrap(),
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            qos: Qos::AtLeastOnce,
            retain: true,
            origin: Origin { device: None, protocol: Protocol::Gateway, session: None },
            properties: expiry_secs
                .map(|secs| Box::new(Properties { expiry_secs: Some(secs), ..Properties::default() })),
        }
    }

    fn values(messages_max: u32, bytes_max: u64) -> LastValues {
        LastValues::new(&limit::Config {
            retained_messages_max: messages_max,
            retained_bytes_max: ByteSize(bytes_max),
            ..limit::Config::default()
        })
    }

    fn topics(values: &LastValues, filter: &str) -> Vec<String> {
        values.matching(filter, 0, usize::MAX).iter().map(|m| m.topic.to_string()).collect()
    }

    #[test]
    fn an_empty_payload_removes_the_value() {
        let mut values = values(10, 1 << 20);
        values.insert(&message("a", "1", None), 0).unwrap();
        values.insert(&message("a", "22", None), 0).unwrap();
        assert_eq!(values.get("a", 0).unwrap().payload, "22");
        assert_eq!(values.len(), 1);
        values.insert(&message("a", "", None), 0).unwrap();
        assert!(values.get("a", 0).is_none());
        assert_eq!((values.len(), values.bytes()), (0, 0));
    }

    #[test]
    fn at_the_bound_a_new_topic_is_refused_and_known_ones_go_on() {
        let mut values = values(2, 1 << 20);
        values.insert(&message("a", "1", None), 0).unwrap();
        values.insert(&message("b", "1", None), 0).unwrap();
        let refused = values.insert(&message("c", "1", None), 0);
        assert!(matches!(refused, Err(Reject::Full { limit: "retained_messages_max", .. })));
        values.insert(&message("a", "2", None), 0).unwrap();
        assert_eq!(values.get("a", 0).unwrap().payload, "2");
        assert!(values.get("b", 0).is_some());
        assert_eq!(values.refused(), 1);
        assert!(values.remove("b"));
        values.insert(&message("c", "1", None), 0).unwrap();
    }

    #[test]
    fn at_the_byte_bound_a_value_may_not_grow_and_the_old_one_stays() {
        let one = cost(&message("a", "1234567890", None));
        let mut values = values(10, one);
        values.insert(&message("a", "1234567890", None), 0).unwrap();
        let refused = values.insert(&message("a", "12345678901", None), 0);
        assert!(matches!(refused, Err(Reject::Full { limit: "retained_bytes_max", .. })));
        assert_eq!(values.get("a", 0).unwrap().payload, "1234567890");
        values.insert(&message("a", "123", None), 0).unwrap();
        assert!(values.bytes() <= one);
    }

    #[test]
    fn an_expired_value_is_absent_and_makes_room() {
        let mut values = values(1, 1 << 20);
        values.insert(&message("a", "1", Some(5)), 1_000_000).unwrap();
        assert_eq!(values.next_expiry_ms(), Some(1_005_000));
        assert!(values.get("a", 1_004_999).is_some());
        assert!(values.get("a", 1_005_000).is_none());
        assert!(values.matching("#", 1_005_000, 10).is_empty());
        values.insert(&message("b", "1", None), 1_005_000).unwrap();
        assert_eq!((values.len(), values.next_expiry_ms()), (1, None));
    }

    #[test]
    fn a_value_replaced_by_one_without_expiry_stays() {
        let mut values = values(10, 1 << 20);
        values.insert(&message("a", "1", Some(5)), 1_000_000).unwrap();
        values.insert(&message("a", "2", None), 1_000_000).unwrap();
        assert_eq!(values.expire(u64::MAX), 0);
        assert_eq!(values.get("a", u64::MAX).unwrap().payload, "2");
    }

    #[test]
    fn filters_match_as_mqtt_says() {
        let mut values = values(100, 1 << 20);
        for topic in ["a", "a/b", "a/b/c", "a-x/b", "a0", "$SYS/x", "b", "/a", "a//c", "dev/s1/state", "dev/s1-2/state"]
        {
            values.insert(&message(topic, "1", None), 0).unwrap();
        }
        assert_eq!(topics(&values, "a/#"), ["a", "a//c", "a/b", "a/b/c"]);
        assert_eq!(topics(&values, "a"), ["a"]);
        assert_eq!(topics(&values, "a/+/c"), ["a//c", "a/b/c"]);
        assert_eq!(topics(&values, "+/b"), ["a-x/b", "a/b"]);
        assert_eq!(topics(&values, "dev/+/state"), ["dev/s1-2/state", "dev/s1/state"]);
        assert_eq!(topics(&values, "$SYS/#"), ["$SYS/x"]);
        assert_eq!(topics(&values, "#").len(), 10);
        assert_eq!(values.matching("#", 0, 3).len(), 3);
    }

    fn any_level() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec!["a", "b", "a-", "a.b", "a0", "", "$s", "state", "ä"])
    }

    fn matches(filter: &str, topic: &str) -> bool {
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn a_filter_finds_exactly_the_topics_it_matches(
            kept in prop::collection::vec(prop::collection::vec(any_level(), 1..5), 0..40),
            filter in prop::collection::vec(prop_oneof![3 => any_level(), 2 => Just("+")], 0..4),
            rest: bool,
        ) {
            let mut values = values(100, 1 << 20);
            let kept: BTreeSet<String> = kept.into_iter().map(|l| l.join("/")).filter(|t| !t.is_empty()).collect();
            for topic in &kept {
                values.insert(&message(topic, "1", None), 0).unwrap();
            }
            let mut filter = filter;
            if rest || filter.is_empty() {
                filter.push("#");
            }
            let filter = filter.join("/");
            let expected: Vec<&String> = kept.iter().filter(|t| matches(&filter, t)).collect();
            let found = topics(&values, &filter);
            prop_assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{}", filter);
        }

        #[test]
        fn the_bounds_and_the_sums_hold_through_any_history(
            steps in prop::collection::vec((0usize..8, 0usize..60, prop::option::of(1u32..20), 0u64..3_000), 1..100),
        ) {
            let mut values = values(5, 1_500);
            let mut model: BTreeMap<String, (usize, Option<u64>)> = BTreeMap::new();
            let mut now = 1_000_000;
            for (topic, size, expiry, wait) in steps {
                now += wait;
                let topic = format!("t{topic}");
                let sent = message(&topic, &"x".repeat(size), expiry);
                let expires = expiry.map(|secs| 1_000_000 + u64::from(secs) * 1_000);
                if values.insert(&sent, now).is_ok() {
                    if size == 0 || expires.is_some_and(|e| e <= now) {
                        model.remove(&topic);
                    } else {
                        model.insert(topic, (size, expires));
                    }
                }
                model.retain(|_, (_, expires)| expires.is_none_or(|e| e > now));
                for (topic, (size, _)) in &model {
                    prop_assert_eq!(values.get(topic, now).unwrap().payload.len(), *size);
                }
                prop_assert_eq!(values.matching("#", now, usize::MAX).len(), model.len());
                prop_assert!(values.len() <= 5 && values.bytes() <= 1_500);
                let sum: u64 = values.values.values().map(|m| cost(m)).sum();
                prop_assert_eq!(values.bytes(), sum);
                prop_assert_eq!(values.order.len(), values.values.len());
            }
        }
    }
}
