//! The way of one message.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use portable_atomic::{AtomicU8, Ordering};

use super::address::{commanded, is_reserved};
use super::client::TopicRoute;
use super::{
    Action, Address, Caller, Client, Completion, Gateway, Message, Origin, Outbox, Protocol, Qos, Receipt, Reject,
    Snapshot, Topic, meters, wall_ms,
};
use crate::hub::filter_matches;
use crate::message::Properties;
use crate::policy::{Decision, Query};
use crate::spool::{Accepted, Demand, SinkId};

/// A message as a device hands it in.
pub struct Draft {
    pub payload: Bytes,
    pub qos: Qos,
    pub retain: bool,
    pub properties: Option<Box<Properties>>,
}

/// Where to report an outcome that takes time: the receiver and its own token for this message.
pub type Done<'a> = (&'a Arc<dyn Completion>, u64);

/// How a publish went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// Accepted and stored as promised.
    Done(Receipt),
    /// Accepted; the outcome will be reported to [`Done`].
    Pending,
}

impl Gateway {
    /// Admits and routes one message of a caller. Without `done` nothing is ever pending: the sender does not want to know.
    ///
    /// # Errors
    /// Every [`Reject`] but `NotFound`; it is counted here.
    pub fn publish(
        &self,
        client: &mut Client,
        address: Address<'_>,
        draft: Draft,
        done: Option<Done<'_>>,
        now: Instant,
    ) -> Result<Published, Reject> {
        self.publish_counted(client, None, address, draft, done, now)
    }

    fn publish_counted(
        &self,
        client: &mut Client,
        once: Option<u16>,
        address: Address<'_>,
        draft: Draft,
        done: Option<Done<'_>>,
        now: Instant,
    ) -> Result<Published, Reject> {
        let bytes = draft.payload.len() as u64;
        let result = self.try_publish(client, once, address, draft, done, now);
        let meters = meters().of(client.caller.protocol);
        match &result {
            Ok(_) => {
                meters.received.increment(1);
                meters.received_bytes.increment(bytes);
                client.session.received.fetch_add(1, Ordering::Relaxed);
            }
            Err(reject) => self.note_reject(client, reject),
        }
        result
    }

    /// As [`publish`](Gateway::publish), for a `QoS` 2 message: that its packet identifier is taken, until [`released`](Gateway::released), is stored with it.
    ///
    /// # Errors
    /// As [`publish`](Gateway::publish).
    pub fn publish_once(
        &self,
        client: &mut Client,
        packet_id: u16,
        address: Address<'_>,
        draft: Draft,
        done: Option<Done<'_>>,
        now: Instant,
    ) -> Result<Published, Reject> {
        let once = client.durable.is_some().then_some(packet_id);
        self.publish_counted(client, once, address, draft, done, now)
    }

    /// Counts a refusal, and logs it where one looks for why a device is refused.
    pub fn note_reject(&self, client: &Client, reject: &Reject) {
        meters().of(client.caller.protocol).reject(reject);
        client.session.refused.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(
            device = client.caller.device.as_ref().map(|d| d.id.as_str()),
            protocol = client.caller.protocol.as_str(),
            peer = %client.caller.peer,
            reason = %reject,
            "refused"
        );
    }

    fn try_publish(
        &self,
        client: &mut Client,
        once: Option<u16>,
        address: Address<'_>,
        draft: Draft,
        done: Option<Done<'_>>,
        now: Instant,
    ) -> Result<Published, Reject> {
        if self.is_draining() {
            return Err(Reject::ShuttingDown);
        }
        self.check_current(client)?;
        let snapshot = self.snapshot.load();
        let now_ms = wall_ms();
        client.seen(now_ms);
        self.charge(client, &snapshot, now)?;
        address.check_publish()?;

        let mut scratch = std::mem::take(&mut client.scratch);
        let device = client.caller.device.clone();
        let routed = address
            .canonical(device.as_ref().map(|d| &d.id), &mut scratch)
            .and_then(|topic| self.route(client, &snapshot, topic, draft.payload.len(), now_ms));
        client.scratch = scratch;
        let Routed { topic, decision, matches, sinks } = routed?;
        self.check_decision(client, &snapshot, &decision, draft.payload.len(), now)?;

        let message = Arc::new(Message {
            id: self.message_id(),
            ingested_ms: now_ms,
            topic,
            payload: compact(draft.payload),
            qos: draft.qos,
            retain: draft.retain,
            origin: Origin {
                device: device.map(|d| d.id.clone()),
                protocol: client.caller.protocol,
                session: Some(client.session.id),
            },
            properties: draft.properties,
        });
        if let Some(packet_id) = once {
            self.take_id(client, packet_id);
        }
        let result = self.dispatch(message, &matches, &sinks, once.is_some(), done, now);
        if let (Some(packet_id), Err(_)) = (once, &result) {
            self.free_id(client, packet_id);
        }
        let (published, crowded) = result?;
        client.crowded = crowded;
        Ok(published)
    }

    /// Takes one token of the device's bucket; an anonymous caller is charged by address.
    pub(super) fn charge(&self, client: &Client, snapshot: &Snapshot, now: Instant) -> Result<(), Reject> {
        if client.caller.device.is_none() {
            return self.admit_address(client.caller.peer.ip(), now);
        }
        client
            .session
            .standing
            .bucket
            .check(self.nanos(now), snapshot.rules.limits.rate_per_device, 1)
            .map_err(|retry_after| Reject::TooFast { limit: "rate_per_device", retry_after })
    }

    /// What is known about publishing to `topic`: from the caller's cache, or decided and matched now.
    fn route(
        &self,
        client: &mut Client,
        snapshot: &Snapshot,
        topic: &str,
        size: usize,
        now_ms: u64,
    ) -> Result<Routed, Reject> {
        if let Some(route) = client.routes.at_version(snapshot.version).find(topic) {
            if route.tree_version != self.hub.version() {
                let (version, matches) = self.hub.matches(topic);
                (route.tree_version, route.matches) = (version, Arc::new(matches));
            }
            return Ok(Routed {
                topic: route.topic.clone(),
                decision: route.decision,
                matches: route.matches.clone(),
                sinks: route.sinks.clone(),
            });
        }
        let limits = &snapshot.rules.limits;
        if topic.len() > limits.topic_bytes_max as usize {
            return Err(Reject::TooLarge { limit: "topic_bytes_max", bytes_max: u64::from(limits.topic_bytes_max) });
        }
        let parsed = Topic::parse(topic).map_err(|_| Reject::Malformed { what: "not a topic" })?;
        if parsed.levels().count() > limits.topic_levels_max as usize {
            return Err(Reject::Malformed { what: "more levels than topic_levels_max" });
        }
        if is_reserved(topic) {
            return Err(Reject::Forbidden { rule: None });
        }
        let action = if commanded(topic).is_some() { Action::Command } else { Action::Publish };
        let decision = self.decide(client, snapshot, action, topic, size, now_ms);
        if !decision.is_allowed() {
            return Err(forbidden(snapshot, &decision));
        }
        let (tree_version, matches) = self.hub.matches(topic);
        let (matches, sinks) = (Arc::new(matches), self.sinks_of(topic));
        if decision.cacheable {
            client.routes.insert(TopicRoute {
                topic: parsed.clone(),
                decision,
                matches: matches.clone(),
                sinks: sinks.clone(),
                tree_version,
            });
        }
        Ok(Routed { topic: parsed, decision, matches, sinks })
    }

    pub(super) fn decide(
        &self,
        client: &Client,
        snapshot: &Snapshot,
        action: Action,
        resource: &str,
        size: usize,
        now_ms: u64,
    ) -> Decision {
        snapshot.rules.policy.decide(&self.query(&client.caller, action, resource, size, now_ms))
    }

    pub(super) fn query<'a>(
        &self,
        caller: &'a Caller,
        action: Action,
        resource: &'a str,
        size: usize,
        now_ms: u64,
    ) -> Query<'a> {
        Query {
            device: caller.device.as_deref(),
            role: &caller.role,
            action,
            resource,
            size: size as u64,
            minute_of_day: self.minute_of_day(now_ms),
            protocol: caller.protocol,
        }
    }

    /// The part of a decision that differs from message to message: size and the rule's rate.
    pub(super) fn check_decision(
        &self,
        client: &Client,
        snapshot: &Snapshot,
        decision: &Decision,
        size: usize,
        now: Instant,
    ) -> Result<(), Reject> {
        if let Some(bytes_max) = decision.bytes_max
            && size as u64 > bytes_max
        {
            return Err(Reject::TooLarge { limit: "bytes_max", bytes_max });
        }
        let Some((index, rate)) = decision.rate.and_then(|index| Some((index, snapshot.rules.policy.rate(index)?)))
        else {
            return Ok(());
        };
        let device = client.caller.device.as_ref().map_or(u32::MAX, |d| d.index);
        self.per_rule
            .check(&(index.0, device), self.nanos(now), rate, 1)
            .map_err(|retry_after| Reject::TooFast { limit: "rate", retry_after })
    }

    pub(super) fn minute_of_day(&self, now_ms: u64) -> u16 {
        let minutes = i64::try_from(now_ms / 60_000).unwrap_or(0) + i64::from(self.config.utc_offset_minutes);
        u16::try_from(minutes.rem_euclid(24 * 60)).unwrap_or(0)
    }

    fn sinks_of(&self, topic: &str) -> Arc<[SinkId]> {
        let wants = |patterns: &[Box<str>]| patterns.iter().any(|pattern| filter_matches(pattern, topic));
        self.forwards.iter().filter(|f| wants(&f.patterns)).map(|f| f.sink).collect()
    }

    /// A message of the gateway's own, such as presence: no policy, no rate.
    pub fn emit(&self, topic: Topic, payload: Bytes, retain: bool, now: Instant) -> Result<Published, Reject> {
        self.distribute(self.own_message(topic, payload, retain), now)
    }

    /// Dispatches a message to everybody whom its topic concerns; nobody waits for the outcome.
    pub(super) fn distribute(&self, message: Arc<Message>, now: Instant) -> Result<Published, Reject> {
        let (_, matches) = self.hub.matches(message.topic.as_str());
        let sinks = self.sinks_of(message.topic.as_str());
        self.dispatch(message, &matches, &sinks, false, None, now).map(|(published, _)| published)
    }

    /// A message from a broker upstream: to local subscribers alone, never to a sink, where it could go round in a circle.
    ///
    /// # Errors
    /// [`Reject::Malformed`] and [`Reject::Forbidden`] for its topic, [`Reject::Full`].
    pub fn downlink(&self, topic: &str, payload: Bytes, retain: bool, now: Instant) -> Result<Published, Reject> {
        let topic = Topic::parse(topic).map_err(|_| Reject::Malformed { what: "not a topic" })?;
        if is_reserved(topic.as_str()) {
            return Err(Reject::Forbidden { rule: None });
        }
        let (_, matches) = self.hub.matches(topic.as_str());
        let message = self.own_message(topic, payload, retain);
        self.dispatch(message, &matches, &[], false, None, now).map(|(published, _)| published)
    }

    fn own_message(&self, topic: Topic, payload: Bytes, retain: bool) -> Arc<Message> {
        Arc::new(Message {
            id: self.message_id(),
            ingested_ms: wall_ms(),
            topic,
            payload,
            qos: Qos::AtLeastOnce,
            retain,
            origin: Origin { device: None, protocol: Protocol::Gateway, session: None },
            properties: None,
        })
    }

    /// Retain, spool, subscribers, acknowledgement. Names a subscriber that the publisher does well to wait for, if there is one.
    fn dispatch(
        &self,
        message: Arc<Message>,
        matches: &crate::hub::Matches,
        sinks: &[SinkId],
        with_rows: bool,
        done: Option<Done<'_>>,
        now: Instant,
    ) -> Result<(Published, Option<Arc<Outbox>>), Reject> {
        self.remember(&message)?;
        // A retained value is a promise of its own: it is on disk before it is acknowledged.
        let rows = with_rows || (message.retain && message.qos != Qos::AtMostOnce && done.is_some());
        let id = message.id;
        let expected = matches.targets.len() + matches.groups.len() + sinks.len();
        let receipt = Receipt { id, receivers: u32::try_from(expected).unwrap_or(u32::MAX) };
        if matches.stored && message.qos != Qos::AtMostOnce {
            let demand = Demand { sinks, rows, ..Demand::default() };
            let published = self.dispatch_stored(&message, matches, demand, done, receipt, now)?;
            return Ok((published, None));
        }

        // The subscriber whose slowness holds the acknowledgement back has to be known before the spool gets the completion.
        let slow = done.and_then(|_| self.hub.slow_target(matches, message.qos));
        let stores = !sinks.is_empty() || rows;
        let report = Report::new(done, slow, stores);
        let mut accepted = None;
        if stores {
            let demand = Demand { sinks, rows, ..Demand::default() };
            accepted = Some(self.spool.store(&message, demand, report.for_spool(), receipt.receivers)?.0);
        }
        let delivered = self.hub.deliver(&message, matches, now);
        if delivered.dropped > 0 {
            meters().dropped_outbox.increment(u64::from(delivered.dropped));
        }
        Ok((report.finish(accepted, receipt), delivered.crowded))
    }
}

struct Routed {
    topic: Topic,
    decision: Decision,
    matches: Arc<crate::hub::Matches>,
    sinks: Arc<[SinkId]>,
}

pub(super) fn forbidden(snapshot: &Snapshot, decision: &Decision) -> Reject {
    Reject::Forbidden { rule: decision.rule.and_then(|rule| snapshot.rules.policy.rule_name(rule).cloned()) }
}

/// Copies a small payload out of the connection's read buffer, which it would otherwise keep alive as a whole.
pub(super) fn compact(payload: Bytes) -> Bytes {
    const COPIED_MAX: usize = 4096;
    if payload.len() <= COPIED_MAX { Bytes::copy_from_slice(&payload) } else { payload }
}

/// Who tells the publisher that its message is taken: the spool, a subscriber that is too slow, or the two together.
pub(super) struct Report {
    completion: Option<(Arc<dyn Completion>, u64)>,
    slow: Option<Arc<Outbox>>,
}

impl Report {
    /// `stores`: the spool is going to be asked.
    pub(super) fn new(done: Option<Done<'_>>, slow: Option<Arc<Outbox>>, stores: bool) -> Self {
        let completion = done.map(|(completion, token)| match &slow {
            Some(_) if stores => (Join::both(completion.clone(), token) as Arc<dyn Completion>, 0),
            Some(_) | None => (completion.clone(), token),
        });
        Report { completion, slow }
    }

    pub(super) fn for_spool(&self) -> Option<(Arc<dyn Completion>, u64)> {
        self.completion.clone()
    }

    /// What the publisher hears at once, after the spool's answer, if it was asked, and the delivery.
    pub(super) fn finish(self, accepted: Option<Accepted>, receipt: Receipt) -> Published {
        match (self.completion, self.slow) {
            (Some((completion, token)), Some(outbox)) => {
                if accepted == Some(Accepted::Done) {
                    // One half of the join is done already.
                    completion.complete(token, Ok(receipt));
                }
                outbox.when_drained(completion, token, receipt);
                Published::Pending
            }
            (Some(_), None) if accepted == Some(Accepted::Pending) => Published::Pending,
            (Some(_), None) | (None, _) => Published::Done(receipt),
        }
    }
}

/// Reports once both the spool and a slow subscriber have.
struct Join {
    completion: Arc<dyn Completion>,
    token: u64,
    waiting_for: AtomicU8,
    refused: Mutex<Option<Reject>>,
}

impl Join {
    fn both(completion: Arc<dyn Completion>, token: u64) -> Arc<Self> {
        Arc::new(Join { completion, token, waiting_for: AtomicU8::new(2), refused: Mutex::new(None) })
    }
}

impl Completion for Join {
    fn complete(&self, _: u64, outcome: Result<Receipt, Reject>) {
        let receipt = match outcome {
            Ok(receipt) => Some(receipt),
            Err(reject) => {
                self.refused.lock().get_or_insert(reject);
                None
            }
        };
        if self.waiting_for.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let refused = self.refused.lock().take();
        match (refused, receipt) {
            (Some(reject), _) => self.completion.complete(self.token, Err(reject)),
            (None, Some(receipt)) => self.completion.complete(self.token, Ok(receipt)),
            // Without a refusal both outcomes were receipts.
            (None, None) => {}
        }
    }
}
