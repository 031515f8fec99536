//! What is published when a client is gone: wills, on disk for as long as they may be due.
//!
//! A will has a row while its client is connected, and after it until its delay is over. A gateway that was killed publishes the wills of all who were
//! connected, each after its delay: their connections ended without a goodbye. It may do so twice if it is killed again in between.
//!
//! Whether the client may publish it is asked when it is published, under the rules in force then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::publish::compact;
use super::{Action, Address, Client, Draft, Gateway, Message, MessageId, Origin, Reject, Topic, wall_ms};
use crate::policy::Query;
use crate::spool::{self, Kind, decode_message, encode_message};

/// A will as a client hands it in.
pub struct Will {
    /// As the client writes it.
    pub topic: Box<str>,
    pub draft: Draft,
    /// How long to wait after the connection, at most until the session ends; a client that comes back cancels it.
    pub delay_secs: u32,
}

/// A will of a connected client.
pub(super) struct Registered {
    number: u32,
    message: Message,
    delay_secs: u32,
}

/// A will that is due unless its client comes back.
pub(super) struct Pending {
    message: Message,
    due: Instant,
}

impl Gateway {
    /// Takes a client's will, in place of an earlier one.
    ///
    /// # Errors
    /// [`Reject::Malformed`] and [`Reject::Forbidden`] for its topic.
    pub fn set_will(&self, client: &mut Client, will: Will) -> Result<(), Reject> {
        self.cancel_will(client);
        let Will { topic, draft, delay_secs } = will;
        let device = client.caller.device.as_ref().map(|device| device.id.clone());
        let mut buffer = String::new();
        let address = Address::from_mqtt(&topic);
        address.check_publish()?;
        let topic = Topic::parse(address.canonical(device.as_ref(), &mut buffer)?);
        let message = Message {
            id: MessageId::default(),
            ingested_ms: wall_ms(),
            topic: topic.map_err(|_| Reject::Malformed { what: "not a topic" })?,
            payload: compact(draft.payload),
            qos: draft.qos,
            retain: draft.retain,
            origin: Origin { device, protocol: client.caller.protocol, session: Some(client.session.id) },
            properties: draft.properties,
        };
        let number = client.durable.as_ref().map_or_else(|| self.new_number(), |durable| durable.number);
        self.store_will(number, &message, delay_secs, 0);
        client.will = Some(Box::new(Registered { number, message, delay_secs }));
        Ok(())
    }

    /// The client has said goodbye: its will is void (`[MQTT-3.1.2-10]`).
    pub fn cancel_will(&self, client: &mut Client) {
        if let Some(will) = client.will.take() {
            self.remove_will(will.number);
        }
    }

    /// The connection is over: publishes the will, or sees that it will be, when the session lasts for `kept`.
    pub(super) fn end_will(&self, will: Registered, kept: Option<Duration>, now: Instant) {
        let Registered { number, message, delay_secs } = will;
        let delay = Duration::from_secs(delay_secs.into()).min(kept.unwrap_or_default());
        if delay.is_zero() {
            return self.publish_will(number, message, now);
        }
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.store_will(number, &message, delay_secs, wall_ms().saturating_add(delay_ms));
        self.wills.lock().insert(number, Pending { message, due: now + delay });
    }

    /// The client has come back in time.
    pub(super) fn keep_will_back(&self, number: u32) {
        if self.wills.lock().remove(&number).is_some() {
            self.remove_will(number);
        }
    }

    /// The session has ended: its will is due at once (`[MQTT-3.1.2-8]`).
    pub(super) fn hurry_will(&self, number: u32, now: Instant) {
        let pending = self.wills.lock().remove(&number);
        if let Some(pending) = pending {
            self.publish_will(number, pending.message, now);
        }
    }

    /// Publishes the wills whose delay is over.
    pub(super) fn publish_wills(&self, now: Instant) {
        let mut wills = self.wills.lock();
        if wills.is_empty() {
            return;
        }
        let due: Vec<u32> = wills.iter().filter(|(_, will)| will.due <= now).map(|(number, _)| *number).collect();
        let due: Vec<_> = due.into_iter().filter_map(|number| Some((number, wills.remove(&number)?))).collect();
        drop(wills);
        for (number, will) in due {
            self.publish_will(number, will.message, now);
        }
    }

    fn publish_will(&self, number: u32, will: Message, now: Instant) {
        match self.admit_will(&will) {
            Ok(()) => {
                let message = Arc::new(Message { id: self.message_id(), ingested_ms: wall_ms(), ..will });
                if let Err(reject) = self.distribute(message, now) {
                    tracing::warn!(%reject, "a will could not be published");
                }
            }
            Err(reject) => {
                tracing::debug!(device = will.origin.device.as_ref().map(|d| d.as_str()), %reject, "a will was refused")
            }
        }
        // After the message, so not on disk before it.
        self.remove_will(number);
    }

    fn admit_will(&self, will: &Message) -> Result<(), Reject> {
        let device = match &will.origin.device {
            Some(id) => Some(self.identity.device(id).ok_or(Reject::Unauthenticated)?),
            None => None,
        };
        let role = match &device {
            Some(device) => device.role.clone(),
            None => self.anonymous_role()?,
        };
        if super::address::is_reserved(will.topic.as_str()) {
            return Err(Reject::Forbidden { rule: None });
        }
        let commands = super::address::commanded(will.topic.as_str()).is_some();
        let snapshot = self.snapshot.load();
        let size = will.payload.len() as u64;
        let decision = snapshot.rules.policy.decide(&Query {
            device: device.as_deref(),
            role: &role,
            action: if commands { Action::Command } else { Action::Publish },
            resource: will.topic.as_str(),
            size,
            minute_of_day: self.minute_of_day(wall_ms()),
            protocol: will.origin.protocol,
        });
        if !decision.is_allowed() {
            return Err(super::publish::forbidden(&snapshot, &decision));
        }
        match decision.bytes_max {
            Some(bytes_max) if size > bytes_max => Err(Reject::TooLarge { limit: "bytes_max", bytes_max }),
            Some(_) | None => Ok(()),
        }
    }

    /// `due_ms` is 0 while the client is connected.
    fn store_will(&self, number: u32, message: &Message, delay_secs: u32, due_ms: u64) {
        let mut value = delay_secs.to_le_bytes().to_vec();
        value.extend_from_slice(&due_ms.to_le_bytes());
        value.extend_from_slice(&encode_message(message));
        self.spool.set(Kind::Will, &number.to_be_bytes(), Some(&value));
    }

    fn remove_will(&self, number: u32) {
        self.spool.set(Kind::Will, &number.to_be_bytes(), None);
    }

    /// Takes back the wills of the last run. `kept` says for how long a session will last.
    pub(super) fn restore_wills(
        &self,
        kept: impl Fn(u32) -> Option<Duration>,
        now: Instant,
    ) -> Result<(), spool::Error> {
        let (mut found, mut damaged) = (Vec::new(), 0_u64);
        self.spool.rows(Kind::Will, |key, value| match decode_will(key, value) {
            Some(will) => found.push(will),
            None => damaged += 1,
        })?;
        if damaged > 0 {
            tracing::error!(damaged, "wills are damaged, left out");
        }
        for (will, due_ms) in found {
            let kept = kept(will.number);
            let left = Duration::from_millis(due_ms.saturating_sub(wall_ms()));
            match due_ms {
                // Its client was connected when the gateway was killed.
                0 => self.end_will(will, kept, now),
                _ => self.end_will(will, kept.map(|kept| kept.min(left)), now),
            }
        }
        Ok(())
    }
}

fn decode_will(key: &[u8], value: &[u8]) -> Option<(Registered, u64)> {
    let number = u32::from_be_bytes(*key.first_chunk()?);
    let (delay_secs, rest) = value.split_first_chunk()?;
    let (due_ms, message) = rest.split_first_chunk()?;
    let message = decode_message(message)?;
    Some((Registered { number, message, delay_secs: u32::from_le_bytes(*delay_secs) }, u64::from_le_bytes(*due_ms)))
}
