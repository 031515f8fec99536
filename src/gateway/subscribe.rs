//! Subscribing and reading.

use std::sync::Arc;
use std::time::Instant;

use super::durable::canonical_filter;
use super::publish::forbidden;
use super::{Action, Address, Client, Gateway, Message, Reject, Snapshot, Topic, wall_ms};
use crate::hub::{Delivery, Filter, SubscribeOptions, Terms};
use crate::message::Qos;

/// When a new subscription is sent the retained messages (MQTT 5 section 3.8.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendRetained {
    Always,
    IfNew,
    Never,
}

/// A granted subscription.
pub struct Subscribed {
    pub qos: Qos,
    /// The retained messages that match, to be sent after the grant. Those at `QoS` 1 and 2 of a persistent session are in its outbox instead.
    pub retained: Vec<Delivery>,
}

impl Gateway {
    /// Subscribes a caller to `text`, a topic filter or a name of the device API (see [`Address::from_mqtt`]).
    /// `tag` tells the caller's own subscriptions apart.
    ///
    /// # Errors
    /// [`Reject::Forbidden`] by policy, [`Reject::Full`] at a bound, [`Reject::Malformed`]; counted here.
    pub fn subscribe(
        &self,
        client: &mut Client,
        text: &str,
        tag: u64,
        options: SubscribeOptions,
        send: SendRetained,
        now: Instant,
    ) -> Result<Subscribed, Reject> {
        let result = self.try_subscribe(client, text, tag, options, send, now);
        if let Err(reject) = &result {
            self.note_reject(client, reject);
        }
        result
    }

    fn try_subscribe(
        &self,
        client: &mut Client,
        text: &str,
        tag: u64,
        mut options: SubscribeOptions,
        send: SendRetained,
        now: Instant,
    ) -> Result<Subscribed, Reject> {
        if self.is_draining() {
            return Err(Reject::ShuttingDown);
        }
        self.check_current(client)?;
        let snapshot = self.snapshot.load();
        let now_ms = wall_ms();
        client.seen(now_ms);
        self.charge(client, &snapshot, now)?;
        let filter = self.canonical_filter(client, text)?;
        let decision = self.decide(client, &snapshot, Action::Subscribe, &filter.pattern, 0, now_ms);
        if !decision.is_allowed() {
            return Err(forbidden(&snapshot, &decision));
        }
        let limits = &snapshot.rules.limits;
        let is_new = !client.is_subscribed(&filter, tag);
        if is_new && client.subscriptions() >= limits.subscriptions_per_session_max as usize {
            let retry_after = std::time::Duration::from_secs(60);
            return Err(Reject::Full { limit: "subscriptions_per_session_max", retry_after });
        }
        options.view = Address::view(&Filter::parse(text)?.pattern, client.caller.device.as_ref().map(|d| &d.id));
        let granted = options.clone();
        self.hub.subscribe(&filter, &client.outbox, tag, options)?;
        self.store_subscription(client, &filter, tag, text, &granted);
        let wanted = match send {
            SendRetained::Always => true,
            SendRetained::IfNew => is_new,
            SendRetained::Never => false,
        };
        let retained = if wanted { self.retained_for(client, &filter, tag, &granted, now) } else { Vec::new() };
        let retained = self.store_retained(client, retained);
        if is_new {
            client.filters.push((filter, tag));
        }
        Ok(Subscribed { qos: granted.qos, retained })
    }

    fn retained_for(
        &self,
        client: &Client,
        filter: &Filter,
        tag: u64,
        granted: &SubscribeOptions,
        now: Instant,
    ) -> Vec<Delivery> {
        let own = Some(client.session.id);
        let identifiers: Option<Arc<[u32]>> = granted.identifier.map(|id| [id].into());
        let messages = self.hub.retained(filter, wall_ms()).into_iter().chain(self.sys_retained(filter, now));
        messages
            .filter(|message| !(granted.no_local && message.origin.session == own))
            .map(|message| Delivery {
                qos: message.qos.min(granted.qos),
                retain: true,
                terms: Terms { tag, view: granted.view, identifiers: identifiers.clone(), shared: None },
                ticket: None,
                repeated: false,
                message,
            })
            .collect()
    }

    /// Ends a subscription; true if there was one.
    pub fn unsubscribe(&self, client: &mut Client, text: &str, tag: u64) -> bool {
        let Ok(filter) = self.canonical_filter(client, text) else { return false };
        client.filters.retain(|(f, t)| !(*f == filter && *t == tag));
        self.remove_subscription(client, &filter, tag);
        self.hub.unsubscribe(&filter, client.outbox.session(), tag)
    }

    /// The last value of a topic.
    ///
    /// # Errors
    /// [`Reject::NotFound`], [`Reject::Forbidden`], [`Reject::TooFast`], [`Reject::Malformed`]; counted here.
    pub fn read(&self, client: &mut Client, address: Address<'_>, now: Instant) -> Result<Arc<Message>, Reject> {
        let result = self.try_read(client, address, now);
        if let Err(reject) = &result {
            self.note_reject(client, reject);
        }
        result
    }

    fn try_read(&self, client: &mut Client, address: Address<'_>, now: Instant) -> Result<Arc<Message>, Reject> {
        self.check_current(client)?;
        let snapshot = self.snapshot.load();
        let now_ms = wall_ms();
        client.seen(now_ms);
        self.charge(client, &snapshot, now)?;
        let mut scratch = std::mem::take(&mut client.scratch);
        let value = address
            .canonical(client.caller.device.as_ref().map(|d| &d.id), &mut scratch)
            .and_then(|topic| self.read_topic(client, &snapshot, topic, now_ms, now));
        client.scratch = scratch;
        value
    }

    fn read_topic(
        &self,
        client: &mut Client,
        snapshot: &Snapshot,
        topic: &str,
        now_ms: u64,
        now: Instant,
    ) -> Result<Arc<Message>, Reject> {
        if !Topic::is_valid(topic) {
            return Err(Reject::Malformed { what: "not a topic" });
        }
        let query = self.query(&client.caller, Action::Read, topic, 0, now_ms);
        let decision = client.reads.decide(&snapshot.rules.policy, &query);
        if !decision.is_allowed() {
            return Err(forbidden(snapshot, &decision));
        }
        self.check_decision(client, snapshot, &decision, 0, now)?;
        self.hub.last_value(topic, now_ms).or_else(|| self.sys_value(topic, now)).ok_or(Reject::NotFound)
    }

    /// Whether policy lets the caller read `topic`, for listings; not counted, not charged.
    pub fn may_read(&self, client: &Client, topic: &str) -> bool {
        let snapshot = self.snapshot.load();
        self.decide(client, &snapshot, Action::Read, topic, 0, wall_ms()).is_allowed()
    }

    fn canonical_filter(&self, client: &Client, text: &str) -> Result<Filter, Reject> {
        canonical_filter(&Filter::parse(text)?, client.caller.device.as_ref().map(|d| &d.id))
    }
}
