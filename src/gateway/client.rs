//! What the gateway keeps for one caller: who it is, and what was decided about the topics it used last.

use std::any::Any;
use std::sync::Arc;

use portable_atomic::Ordering;

use super::durable::Durable;
use super::will::Registered;
use crate::hub::{Filter, Matches, Outbox};
use crate::message::{Caller, Topic};
use crate::policy::{Decision, DecisionCache};
use crate::session::Session;
use crate::spool::SinkId;

/// One caller's state, owned by its connection's task. Everything a message needs is in here or behind one `Arc`.
pub struct Client {
    pub caller: Caller,
    pub session: Arc<Session>,
    pub outbox: Arc<Outbox>,
    pub(super) routes: TopicRoutes,
    /// What was decided about the values it reads.
    pub(super) reads: DecisionCache,
    /// The registry's version at which the device was last found to be current.
    pub(super) registry_version: u64,
    /// The subscriptions it holds, to be removed with it.
    pub(super) filters: Vec<(Filter, u64)>,
    /// What it keeps on disk, if the session is to outlive its connection.
    pub(super) durable: Option<Durable>,
    /// To be published if it leaves without a goodbye.
    pub(super) will: Option<Box<Registered>>,
    /// A subscriber of the message just published to wait for.
    pub(super) crowded: Option<Arc<Outbox>>,
    /// Reused for canonical topics.
    pub(super) scratch: String,
}

impl Client {
    /// Notes a sign of life and one message to the device.
    pub fn count_delivered(&self, messages: u64) {
        self.session.delivered.fetch_add(messages, Ordering::Relaxed);
    }

    /// Notes a sign of life.
    pub fn seen(&self, now_ms: u64) {
        self.session.last_seen_ms.store(now_ms, Ordering::Relaxed);
    }

    /// A subscriber of what was published last that has much waiting at `QoS` 0: who can stop reading for it ([`Outbox::poll_room`]) spares it losses.
    pub fn take_crowded(&mut self) -> Option<Arc<Outbox>> {
        self.crowded.take()
    }

    /// Whether the session is on disk.
    pub fn is_persistent(&self) -> bool {
        self.durable.is_some()
    }

    pub fn subscriptions(&self) -> usize {
        self.filters.len()
    }

    /// Whether it holds this subscription.
    pub fn is_subscribed(&self, filter: &Filter, tag: u64) -> bool {
        self.filters.iter().any(|(f, t)| f == filter && *t == tag)
    }
}

/// What a persistent session leaves for its next connection.
pub struct Resume {
    pub outbox: Arc<Outbox>,
    pub(super) filters: Vec<(Filter, u64)>,
    /// The protocol engine's own state.
    pub state: Box<dyn Any + Send>,
}

/// All that is known about publishing to one topic: good for as long as the versions stand.
pub(super) struct TopicRoute {
    pub topic: Topic,
    pub decision: Decision,
    pub matches: Arc<Matches>,
    pub sinks: Arc<[SinkId]>,
    pub tree_version: u64,
}

/// The routes of the topics used last. Most devices use a handful, so a linear search beats hashing.
#[derive(Default)]
pub(super) struct TopicRoutes {
    entries: Vec<TopicRoute>,
    /// The next to be replaced when full.
    oldest: usize,
    /// The configuration's version these belong to.
    version: u64,
}

impl TopicRoutes {
    const ENTRIES_MAX: usize = 16;

    /// Forgets everything decided under another version of the configuration.
    pub fn at_version(&mut self, version: u64) -> &mut Self {
        if self.version != version {
            self.entries.clear();
            self.oldest = 0;
            self.version = version;
        }
        self
    }

    pub fn find(&mut self, topic: &str) -> Option<&mut TopicRoute> {
        self.entries.iter_mut().find(|route| route.topic.as_str() == topic)
    }

    pub fn insert(&mut self, route: TopicRoute) {
        if self.entries.len() < Self::ENTRIES_MAX {
            self.entries.push(route);
        } else if let Some(slot) = self.entries.get_mut(self.oldest) {
            *slot = route;
            self.oldest = (self.oldest + 1) % Self::ENTRIES_MAX;
        }
    }
}
