//! `$SYS`: how the gateway is doing, by the topic names that operators know from mosquitto.
//!
//! The values are made when somebody asks: at a subscription, at a read, and every `sys_interval_secs` for those who are subscribed. They are not kept, so
//! that they never wear out a memory card. Counts are over all protocols; a message counts once, whatever packets carried it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use portable_atomic::{AtomicU64, Ordering};

use super::{Gateway, Message, Origin, Protocol, Qos, Topic, wall_ms};
use crate::hub::{Filter, filter_matches};
use crate::telemetry;

/// What is kept between two looks.
#[derive(Default)]
pub(super) struct Sys {
    /// Nanoseconds since the start.
    last: AtomicU64,
    sessions_maximum: AtomicU64,
}

const PREFIX: &str = "$SYS/";

impl Gateway {
    /// Publishes the values to those who are subscribed, when it is time.
    pub(super) fn publish_sys(&self, now: Instant) {
        let (live, _) = self.sessions.counts();
        self.sys.sessions_maximum.fetch_max(live as u64, Ordering::Relaxed);
        let (nanos, interval) = (self.nanos(now), Duration::from_secs(self.config.sys_interval_secs.into()));
        let since = Duration::from_nanos(nanos.saturating_sub(self.sys.last.load(Ordering::Relaxed)));
        if since < interval {
            return;
        }
        self.sys.last.store(nanos, Ordering::Relaxed);
        for message in self.sys_messages(now, |topic| !self.hub.matches(topic).1.is_empty()) {
            let (_, matches) = self.hub.matches(message.topic.as_str());
            self.hub.deliver(&message, &matches, now);
        }
    }

    /// The values that a new subscription is sent.
    pub(super) fn sys_retained(&self, filter: &Filter, now: Instant) -> Vec<Arc<Message>> {
        if filter.group.is_some() || !filter.pattern.starts_with(PREFIX) {
            return Vec::new();
        }
        self.sys_messages(now, |topic| filter_matches(&filter.pattern, topic))
    }

    /// The value of one topic.
    pub(super) fn sys_value(&self, topic: &str, now: Instant) -> Option<Arc<Message>> {
        if !topic.starts_with(PREFIX) {
            return None;
        }
        self.sys_messages(now, |known| known == topic).pop()
    }

    fn sys_messages(&self, now: Instant, wanted: impl Fn(&str) -> bool) -> Vec<Arc<Message>> {
        let chosen: Vec<_> = TOPICS.iter().filter(|(topic, _)| wanted(topic)).collect();
        if chosen.is_empty() {
            // Reading the facts renders all metrics.
            return Vec::new();
        }
        let facts = Facts::read(self, now);
        let messages = chosen.into_iter().filter_map(|(name, value)| {
            Some(Arc::new(Message {
                id: self.message_id(),
                ingested_ms: wall_ms(),
                topic: Topic::parse(name).ok()?,
                payload: value(&facts).into(),
                qos: Qos::AtMostOnce,
                retain: true,
                origin: Origin { device: None, protocol: Protocol::Gateway, session: None },
                properties: None,
            }))
        });
        messages.collect()
    }
}

/// Everything that is said, read at once.
struct Facts {
    uptime_secs: u64,
    live: usize,
    parked: usize,
    maximum: u64,
    received: u64,
    received_bytes: u64,
    sent: u64,
    dropped: u64,
    spooled: u64,
    spooled_bytes: u64,
    retained: usize,
    subscriptions: usize,
}

impl Facts {
    fn read(gateway: &Gateway, now: Instant) -> Self {
        let (live, parked) = gateway.sessions.counts();
        let metrics = telemetry::render();
        let total = |name| telemetry::total(&metrics, name);
        Facts {
            uptime_secs: now.saturating_duration_since(gateway.started).as_secs(),
            live,
            parked,
            maximum: gateway.sys.sessions_maximum.load(Ordering::Relaxed).max(live as u64),
            received: total(telemetry::MESSAGES_RECEIVED_TOTAL),
            received_bytes: total(telemetry::MESSAGES_RECEIVED_BYTES_TOTAL),
            sent: total(telemetry::MESSAGES_DELIVERED_TOTAL),
            dropped: total(telemetry::MESSAGES_DROPPED_TOTAL),
            spooled: total(telemetry::SPOOL_RECORDS),
            spooled_bytes: total(telemetry::SPOOL_BYTES),
            retained: gateway.hub.retained_counts().0,
            subscriptions: gateway.hub.subscriptions(),
        }
    }
}

type Value = fn(&Facts) -> String;

/// Every topic, and what it says.
const TOPICS: [(&str, Value); 18] = [
    ("$SYS/broker/version", |_| concat!("tidegate version ", env!("CARGO_PKG_VERSION")).to_owned()),
    ("$SYS/broker/uptime", |facts| format!("{} seconds", facts.uptime_secs)),
    ("$SYS/broker/clients/connected", |facts| facts.live.to_string()),
    ("$SYS/broker/clients/active", |facts| facts.live.to_string()),
    ("$SYS/broker/clients/disconnected", |facts| facts.parked.to_string()),
    ("$SYS/broker/clients/inactive", |facts| facts.parked.to_string()),
    ("$SYS/broker/clients/total", |facts| (facts.live + facts.parked).to_string()),
    ("$SYS/broker/clients/maximum", |facts| facts.maximum.to_string()),
    ("$SYS/broker/messages/received", |facts| facts.received.to_string()),
    ("$SYS/broker/messages/sent", |facts| facts.sent.to_string()),
    ("$SYS/broker/publish/messages/received", |facts| facts.received.to_string()),
    ("$SYS/broker/publish/messages/sent", |facts| facts.sent.to_string()),
    ("$SYS/broker/publish/messages/dropped", |facts| facts.dropped.to_string()),
    ("$SYS/broker/publish/bytes/received", |facts| facts.received_bytes.to_string()),
    ("$SYS/broker/store/messages/count", |facts| facts.spooled.to_string()),
    ("$SYS/broker/store/messages/bytes", |facts| facts.spooled_bytes.to_string()),
    ("$SYS/broker/retained messages/count", |facts| facts.retained.to_string()),
    ("$SYS/broker/subscriptions/count", |facts| facts.subscriptions.to_string()),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_topic_has_a_value() {
        let facts = Facts {
            uptime_secs: 1,
            live: 2,
            parked: 3,
            maximum: 4,
            received: 5,
            received_bytes: 6,
            sent: 7,
            dropped: 8,
            spooled: 9,
            spooled_bytes: 10,
            retained: 11,
            subscriptions: 12,
        };
        let value = |topic: &str| TOPICS.iter().find(|(known, _)| *known == topic).map(|(_, value)| value(&facts));
        assert!(TOPICS.iter().all(|(topic, _)| value(topic).is_some()));
        assert_eq!(value("$SYS/broker/clients/total").as_deref(), Some("5"));
        assert_eq!(value("$SYS/broker/other"), None);
    }
}
