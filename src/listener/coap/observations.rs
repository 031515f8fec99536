//! Observers and the subscriptions behind them.
//!
//! The hub knows a subscription by its tag, the engine an observer by its id; this table knows both, and what of an observation waits for room.

use std::collections::{HashMap, VecDeque};

use tidegate_coap::{Notification, ObserverId, content};

use super::answer::format_of;
use super::call::Space;
use super::contexts::ContextId;
use crate::message::Message;

pub struct Observation {
    pub context: ContextId,
    /// As it was subscribed.
    pub filter: String,
    /// What to read when the observer needs the current value; nothing for one that stands for many topics.
    pub value: Option<(Space, String)>,
    /// Of its values: asked for by Accept, or the first one's.
    pub format: Option<u16>,
    pub observer: Option<ObserverId>,
    /// Each of its values matters and has found no room in the engine yet; in order.
    pub waiting: VecDeque<Notification>,
}

impl Observation {
    /// Whether this value may be sent as the others were: the values of one resource have one format for as long as it is observed (RFC 7641 section
    /// 4.2). What is empty has none.
    pub fn suits(&mut self, message: &Message) -> bool {
        if self.value.is_none() || message.payload.is_empty() {
            return true;
        }
        let format = format_of(message).unwrap_or(content::OCTET_STREAM);
        *self.format.get_or_insert(format) == format
    }
}

#[derive(Default)]
pub struct Observations {
    by_tag: HashMap<u64, Observation>,
    by_observer: HashMap<ObserverId, u64>,
    last_tag: u64,
}

impl Observations {
    /// A tag that no observation has had.
    pub fn next_tag(&mut self) -> u64 {
        self.last_tag += 1;
        self.last_tag
    }

    pub fn is_empty(&self) -> bool {
        self.by_tag.is_empty()
    }

    pub fn insert(&mut self, tag: u64, observation: Observation) {
        self.by_tag.insert(tag, observation);
    }

    /// The engine has registered the observer.
    pub fn registered(&mut self, tag: u64, observer: ObserverId) {
        if let Some(observation) = self.by_tag.get_mut(&tag) {
            observation.observer = Some(observer);
            self.by_observer.insert(observer, tag);
        }
    }

    pub fn get_mut(&mut self, tag: u64) -> Option<&mut Observation> {
        self.by_tag.get_mut(&tag)
    }

    pub fn tag_of(&self, observer: ObserverId) -> Option<u64> {
        self.by_observer.get(&observer).copied()
    }

    pub fn of(&mut self, observer: ObserverId) -> Option<&mut Observation> {
        let tag = self.tag_of(observer)?;
        self.get_mut(tag)
    }

    /// Observers for whom something waits.
    pub fn waiting(&self) -> Vec<ObserverId> {
        let waiting = self.by_tag.values().filter(|observation| !observation.waiting.is_empty());
        waiting.filter_map(|observation| observation.observer).collect()
    }

    pub fn remove(&mut self, tag: u64) -> Option<Observation> {
        let observation = self.by_tag.remove(&tag)?;
        if let Some(observer) = observation.observer {
            self.by_observer.remove(&observer);
        }
        Some(observation)
    }

    pub fn observers(&self) -> Vec<ObserverId> {
        self.by_observer.keys().copied().collect()
    }
}
