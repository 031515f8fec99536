//! Who hears what: the subscription tree, the last value of every topic, and one bounded [`Outbox`] per session.
//!
//! Cost of a publish whose topic the publisher has used before: one comparison of the tree's version, then per subscriber one
//! lock, one push and at most one wake. Matching runs only when the topic is new to the publisher or subscriptions have changed.
//!
//! Deliberately not here: policy (the gateway asks before it subscribes or delivers) and durability (the spool).

pub mod outbox;
pub mod queue;
pub mod tree;

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use portable_atomic::{AtomicU64, Ordering};

use crate::cache::last_value::LastValues;
use crate::limit;
use crate::message::{Message, Qos, Reject, SessionId, Topic};

pub use outbox::{Delivery, Drained, Outbox, OutboxLimits, Pushed, Store, Total, View};
pub use queue::{Cursor, Entering, Left, QueueLimits, SessionQueue, Terms, Ticket};
/// Whether one filter without group matches a topic.
pub use tidegate_mqtt::topic::matches as filter_matches;
pub use tree::{Filter, Matches, SubscribeOptions, Target};

/// See the module's documentation.
pub struct Hub {
    tree: RwLock<tree::Tree>,
    /// Grows with every change of the tree; a [`Matches`] is good for as long as it stands still.
    version: AtomicU64,
    retained: Mutex<LastValues>,
    /// The latest message of topics that are not retained, for readers; old ones make room.
    recent: quick_cache::sync::Cache<Topic, Arc<Message>, ByCost>,
    subscriptions_max: usize,
    turn: AtomicU64,
    /// What waits in the outboxes of all its subscribers.
    pub waiting: Arc<Total>,
}

#[derive(Clone)]
struct ByCost;

impl quick_cache::Weighter<Topic, Arc<Message>> for ByCost {
    fn weight(&self, _: &Topic, message: &Arc<Message>) -> u64 {
        message.cost_bytes() as u64
    }
}

/// How a delivery ended, over all subscribers.
#[derive(Default)]
pub struct Delivered {
    pub receivers: u32,
    pub dropped: u32,
    /// A subscriber that a publisher of `QoS` 0 does well to wait for: see [`Outbox::poll_room`].
    pub crowded: Option<Arc<Outbox>>,
}

impl Hub {
    pub fn new(limits: &limit::Config) -> Self {
        let recent_bytes = limits.last_values_bytes_max.bytes();
        let recent_items = usize::try_from(recent_bytes / RECENT_BYTES_TYPICAL).unwrap_or(usize::MAX).max(16);
        Hub {
            tree: RwLock::default(),
            version: AtomicU64::new(1),
            retained: Mutex::new(LastValues::new(limits)),
            recent: quick_cache::sync::Cache::with_weighter(recent_items, recent_bytes, ByCost),
            subscriptions_max: limits.subscriptions_max as usize,
            turn: AtomicU64::new(0),
            waiting: Arc::new(Total::new(limits.outbox_bytes_total_max.in_memory())),
        }
    }

    /// The version that a [`Matches`] obtained now belongs to.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Who wants `topic`, with the version it holds for. Takes the tree's read lock.
    pub fn matches(&self, topic: &str) -> (u64, Matches) {
        let tree = self.tree.read();
        (self.version(), tree.matches(topic))
    }

    /// Adds or replaces a subscription; true if it is new.
    ///
    /// # Errors
    /// [`Reject::Full`] at `subscriptions_max`.
    pub fn subscribe(
        &self,
        filter: &Filter,
        outbox: &Arc<Outbox>,
        tag: u64,
        options: SubscribeOptions,
    ) -> Result<bool, Reject> {
        let mut tree = self.tree.write();
        if tree.len() >= self.subscriptions_max {
            return Err(Reject::Full { limit: "subscriptions_max", retry_after: FULL_RETRY });
        }
        let new = tree.subscribe(filter, outbox.clone(), tag, options);
        self.version.fetch_add(1, Ordering::Release);
        Ok(new)
    }

    /// Removes a subscription; true if it was there.
    pub fn unsubscribe(&self, filter: &Filter, session: SessionId, tag: u64) -> bool {
        let mut tree = self.tree.write();
        let removed = tree.unsubscribe(filter, session, tag);
        self.version.fetch_add(1, Ordering::Release);
        removed
    }

    pub fn subscriptions(&self) -> usize {
        self.tree.read().len()
    }

    /// Hands `message` to everybody in `matches` and keeps it as the topic's last value.
    pub fn deliver(&self, message: &Arc<Message>, matches: &Matches, now: Instant) -> Delivered {
        let mut delivered = Delivered::default();
        for target in &matches.targets {
            push(message, target, now, &mut delivered);
        }
        for group in &matches.groups {
            if let Some(target) = self.choose(group) {
                push(message, target, now, &mut delivered);
            }
        }
        delivered
    }

    /// Who gets `message`, one of each shared group among them: for a message that is stored for some of them first.
    pub fn recipients<'m>(&self, message: &Message, matches: &'m Matches) -> Vec<&'m Target> {
        let chosen = matches.groups.iter().filter_map(|group| self.choose(group));
        matches.targets.iter().chain(chosen).filter(|target| target.wants(message)).collect()
    }

    /// A subscriber that is above its mark and would get a message at `qos`, if there is one.
    pub fn slow_target(&self, matches: &Matches, qos: Qos) -> Option<Arc<Outbox>> {
        if qos == Qos::AtMostOnce {
            return None;
        }
        // What does not fit a persistent session's outbox is on disk.
        let waits = |target: &&tree::Target| target.qos != Qos::AtMostOnce && target.outbox.number().is_none();
        let mut acknowledged = matches.targets.iter().filter(waits);
        acknowledged.find(|target| target.outbox.is_above()).map(|target| target.outbox.clone())
    }

    /// The member of a shared subscription that is to have a message which another has left behind.
    pub fn member(&self, shared: &Filter) -> Option<Target> {
        let members = self.tree.read().members(shared);
        self.choose(&members).cloned()
    }

    /// The member of a shared group with the least to do, whoever is connected first; among equals, in turn.
    fn choose<'g>(&self, group: &'g [Target]) -> Option<&'g Target> {
        let start = self.turn.fetch_add(1, Ordering::Relaxed) as usize % group.len().max(1);
        let in_turn = group.iter().cycle().skip(start).take(group.len());
        in_turn.min_by_key(|target| (target.outbox.is_parked(), target.outbox.depth()))
    }

    /// Keeps `message` as the last value of its topic; an empty retained payload removes it (`[MQTT-3.3.1-6]`).
    ///
    /// `changed` is told while no other message can change the retained value: whether there is one now. A copy elsewhere stays in step.
    ///
    /// # Errors
    /// [`Reject::Full`] when the message is to be retained and the store is at its bound.
    pub fn remember(&self, message: &Arc<Message>, now_ms: u64, changed: impl FnOnce(bool)) -> Result<(), Reject> {
        if !message.retain {
            self.recent.insert(message.topic.clone(), message.clone());
            return Ok(());
        }
        let mut retained = self.retained.lock();
        if message.payload.is_empty() {
            retained.remove(message.topic.as_str());
            changed(false);
            drop(retained);
            self.recent.remove(&message.topic);
            return Ok(());
        }
        retained.insert(message, now_ms)?;
        changed(true);
        Ok(())
    }

    /// The last value of a topic, retained or not, whichever is later.
    pub fn last_value(&self, topic: &str, now_ms: u64) -> Option<Arc<Message>> {
        let retained = self.retained.lock().get(topic, now_ms).cloned();
        let recent = self.recent.get(topic).filter(|m| !is_expired(m, now_ms));
        match (retained, recent) {
            (Some(a), Some(b)) => Some(if a.id >= b.id { a } else { b }),
            (a, b) => a.or(b),
        }
    }

    /// The retained messages that a new subscription is sent, at most [`RETAINED_SENT_MAX`].
    pub fn retained(&self, filter: &Filter, now_ms: u64) -> Vec<Arc<Message>> {
        // MQTT 5 section 4.8.2: a shared subscription gets no retained messages.
        if filter.group.is_some() {
            return Vec::new();
        }
        self.retained.lock().matching(&filter.pattern, now_ms, RETAINED_SENT_MAX)
    }

    /// Forgets retained messages whose time is over; `removed` is told each topic, as in [`remember`](Hub::remember).
    pub fn expire(&self, now_ms: u64, removed: impl FnMut(&Topic)) {
        let mut retained = self.retained.lock();
        retained.expire(now_ms);
        retained.take_expired().iter().for_each(removed);
    }

    /// Messages and bytes retained.
    pub fn retained_counts(&self) -> (usize, u64) {
        let retained = self.retained.lock();
        (retained.len(), retained.bytes())
    }
}

/// Whether MQTT 5's Message Expiry Interval has passed.
pub fn is_expired(message: &Message, now_ms: u64) -> bool {
    let expiry = message.properties.as_ref().and_then(|p| p.expiry_secs);
    expiry.is_some_and(|secs| now_ms >= message.ingested_ms.saturating_add(u64::from(secs) * 1000))
}

fn push(message: &Arc<Message>, target: &Target, now: Instant, delivered: &mut Delivered) {
    if !target.wants(message) {
        return;
    }
    match target.outbox.push(target.delivery(message, None), now) {
        Pushed::Taken | Pushed::Slow => delivered.receivers += 1,
        Pushed::Crowded => {
            delivered.receivers += 1;
            delivered.crowded.get_or_insert_with(|| target.outbox.clone());
        }
        Pushed::Dropped => delivered.dropped += 1,
    }
}

/// Bounds what one SUBSCRIBE makes the gateway collect; above the default of `retained_messages_max`.
const RETAINED_SENT_MAX: usize = 100_000;
const FULL_RETRY: std::time::Duration = std::time::Duration::from_secs(10);
/// What a sensor's message costs, for sizing the table of recent values; only its initial size depends on it.
const RECENT_BYTES_TYPICAL: u64 = 512;
