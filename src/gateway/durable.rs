//! Persistent sessions on disk: who they are, how long they last, what they have subscribed to.
//!
//! A session has a number that is never given again; its rows carry it. What the rows hold is JSON: they are small, and somebody may have to read
//! them one day.

use std::any::Any;
use std::collections::HashMap;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use portable_atomic::Ordering;
use serde::{Deserialize, Serialize};

use super::stored::decode_target;
use super::{Address, Client, Gateway, Keep, Protocol, Qos, Resume, wall_ms};
use crate::hub::{Cursor, Entering, Filter, Outbox, SessionQueue, SubscribeOptions, Ticket};
use crate::message::{DeviceId, SessionId};
use crate::session::SessionKey;
use crate::spool::{self, Kind};

/// What a client keeps on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Durable {
    pub number: u32,
    /// How long the session is kept after its connection; `u32::MAX`: for ever.
    pub expiry_secs: u32,
    /// Identifiers of incoming `QoS` 2 messages that have a row.
    pub unreleased: Vec<u16>,
}

/// The handshakes of a session between two connections, in no engine's terms.
///
/// Messages to the client are not in here: what it has not answered comes out of the outbox again, under the same identifiers.
#[derive(Debug, Default)]
pub struct InFlight {
    /// For [`close`](Gateway::close): identifiers of messages sent and not answered, in the order of sending.
    pub sent: Vec<u16>,
    /// From [`open`](Gateway::open): identifiers of `QoS` 2 messages that the client has received and has to complete.
    pub received: Vec<u16>,
    /// Both: identifiers of incoming `QoS` 2 messages that were accepted and that the client has yet to release.
    pub unreleased: Vec<u16>,
}

/// The row of a session.
#[derive(Serialize, Deserialize)]
struct SessionRow {
    device: Option<String>,
    client: String,
    expiry_secs: u32,
    /// When its connection ended, milliseconds since 1970; none while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parked_ms: Option<u64>,
}

/// The row of a subscription.
#[derive(Serialize, Deserialize)]
struct SubscriptionRow {
    /// As the client wrote it.
    asked: String,
    tag: u64,
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    identifier: Option<u32>,
}

/// A subscription's row and its key.
type Stored = (Box<[u8]>, SubscriptionRow);

/// The row that holds the next free number.
const NEXT_NUMBER: &[u8] = b"session";

impl Gateway {
    /// A number for a new session, and its place on disk.
    pub(super) fn new_number(&self) -> u32 {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        // Set before anything that carries the number, so never behind it on disk.
        self.spool.set(Kind::Counter, NEXT_NUMBER, Some(&(number.saturating_add(1)).to_be_bytes()));
        number
    }

    pub(super) fn store_session(&self, number: u32, expiry_secs: u32, key: &SessionKey, parked_ms: Option<u64>) {
        let row = SessionRow {
            device: key.device.as_ref().map(|device| device.as_str().to_owned()),
            client: key.client.to_string(),
            expiry_secs,
            parked_ms,
        };
        // Text and numbers: it cannot fail.
        let value = serde_json::to_vec(&row).unwrap_or_default();
        self.spool.set(Kind::Session, &number.to_be_bytes(), Some(&value));
    }

    pub(super) fn store_subscription(
        &self,
        client: &Client,
        filter: &Filter,
        tag: u64,
        asked: &str,
        options: &SubscribeOptions,
    ) {
        let Some(Durable { number, .. }) = &client.durable else { return };
        let row = SubscriptionRow {
            asked: asked.to_owned(),
            tag,
            qos: options.qos as u8,
            no_local: options.no_local,
            retain_as_published: options.retain_as_published,
            identifier: options.identifier,
        };
        let value = serde_json::to_vec(&row).unwrap_or_default();
        self.spool.set(Kind::Subscription, &subscription_key(*number, filter, tag), Some(&value));
    }

    pub(super) fn remove_subscription(&self, client: &Client, filter: &Filter, tag: u64) {
        if let Some(Durable { number, .. }) = &client.durable {
            self.spool.set(Kind::Subscription, &subscription_key(*number, filter, tag), None);
        }
    }

    /// An outbox for a new persistent session.
    pub(super) fn persistent_outbox(&self, id: SessionId, number: u32) -> Arc<Outbox> {
        let (outbox, queue) = self.outbox_limits();
        Outbox::persistent(id, outbox, &self.hub.waiting, SessionQueue::new(queue), number, self.loader.clone())
    }

    /// Leaves a session between two connections; gives what the next one is to know.
    pub(super) fn park_session(
        &self,
        durable: Durable,
        key: &SessionKey,
        outbox: &Outbox,
        keep: Keep,
    ) -> Box<dyn Any + Send> {
        let expiry_secs = keep.expiry.map_or(u32::MAX, |e| u32::try_from(e.as_secs()).unwrap_or(u32::MAX - 1));
        let InFlight { sent, unreleased, .. } = keep.state.downcast().map(|state| *state).unwrap_or_default();
        outbox.park_sent(sent);
        self.store_cursor(outbox);
        let number = durable.number;
        self.store_session(number, expiry_secs, key, Some(wall_ms()));
        // The rows say what the engine says: an identifier whose message was refused is free.
        for id in durable.unreleased.iter().filter(|id| !unreleased.contains(id)) {
            self.spool.set(Kind::Unreleased, &unreleased_key(number, *id), None);
        }
        for id in unreleased.iter().filter(|id| !durable.unreleased.contains(id)) {
            self.spool.set(Kind::Unreleased, &unreleased_key(number, *id), Some(&[]));
        }
        Box::new(InFlight { unreleased, ..InFlight::default() })
    }

    /// Deletes a session's rows, and what was stored for it alone.
    pub(super) fn forget_session(&self, number: u32, outbox: &Outbox, filters: &[(Filter, u64)], unreleased: &[u16]) {
        self.reassigner.settle(outbox.clear_stored());
        self.spool.set(Kind::Session, &number.to_be_bytes(), None);
        self.spool.set(Kind::Cursor, &number.to_be_bytes(), None);
        for id in unreleased {
            self.spool.set(Kind::Unreleased, &unreleased_key(number, *id), None);
        }
        for (filter, tag) in filters {
            self.spool.set(Kind::Subscription, &subscription_key(number, filter, *tag), None);
        }
    }

    /// Takes back the sessions of the last run, all of them parked.
    pub(super) fn restore_sessions(&self, now: Instant) -> Result<(), spool::Error> {
        self.spool.rows(Kind::Counter, |key, value| {
            if let (true, Some(next)) = (key == NEXT_NUMBER, number_of(value)) {
                self.next_number.store(next, Ordering::Relaxed);
            }
        })?;
        let mut subscriptions: HashMap<u32, Vec<Stored>> = HashMap::new();
        let mut damaged = 0_u64;
        self.spool.rows(Kind::Subscription, |key, value| match (number_of(key), serde_json::from_slice(value)) {
            (Some(number), Ok(row)) => subscriptions.entry(number).or_default().push((key.into(), row)),
            (None, _) | (_, Err(_)) => damaged += 1,
        })?;
        let mut cursors: HashMap<u32, Cursor> = HashMap::new();
        self.spool.rows(Kind::Cursor, |key, value| match (number_of(key), serde_json::from_slice(value)) {
            (Some(number), Ok(cursor)) => drop(cursors.insert(number, cursor)),
            (None, _) | (_, Err(_)) => damaged += 1,
        })?;
        let mut unreleased: HashMap<u32, Vec<u16>> = HashMap::new();
        self.spool.rows(Kind::Unreleased, |key, _| match (number_of(key), key.last_chunk()) {
            (Some(number), Some(id)) => unreleased.entry(number).or_default().push(u16::from_be_bytes(*id)),
            (None, _) | (_, None) => damaged += 1,
        })?;
        let mut sessions: Vec<(u32, SessionRow)> = Vec::new();
        self.spool.rows(Kind::Session, |key, value| match (number_of(key), serde_json::from_slice(value)) {
            (Some(number), Ok(row)) => sessions.push((number, row)),
            (None, _) | (_, Err(_)) => damaged += 1,
        })?;
        let (now_ms, mut refused) = (wall_ms(), 0_u64);
        let in_flight_max = usize::from(self.limits().in_flight_max);
        let mut queues = HashMap::with_capacity(sessions.len());
        let mut kept = HashMap::with_capacity(sessions.len());
        for (number, row) in sessions {
            let mut cursor = cursors.remove(&number).unwrap_or_default();
            cursor.unsure = if row.parked_ms.is_none() { in_flight_max } else { 0 };
            let subscriptions = subscriptions.remove(&number).unwrap_or_default().into_iter().map(|(_, row)| row);
            let unreleased = unreleased.remove(&number).unwrap_or_default();
            let expiry = (row.expiry_secs < u32::MAX).then(|| Duration::from_secs(row.expiry_secs.into()));
            match self.restore_session(number, row, subscriptions.collect(), unreleased, (now, now_ms)) {
                Some(outbox) => {
                    queues.insert(number, (outbox, cursor));
                    kept.insert(number, expiry.unwrap_or(Duration::MAX));
                }
                None => refused += 1,
            }
        }
        let mut messages = 0_u64;
        self.spool.backlog(|position, cost_bytes, target| {
            let Some((outbox, cursor)) = queues.get(&target.session) else { return false };
            let Some(id) = NonZeroU16::new(target.id).filter(|_| !cursor.is_done(position)) else { return false };
            let (qos, retain, terms) = decode_target(&target);
            let ticket = Ticket::new(position, id);
            outbox.restore(Entering { ticket, cost_bytes: cost_bytes as usize, qos, retain, terms }, cursor);
            messages += 1;
            true
        })?;
        let restored = queues.len();
        self.restore_wills(|number| kept.get(&number).copied(), now)?;
        // Of sessions that were being deleted.
        for number in cursors.into_keys() {
            self.spool.set(Kind::Cursor, &number.to_be_bytes(), None);
        }
        for (number, ids) in unreleased {
            ids.iter().for_each(|id| self.spool.set(Kind::Unreleased, &unreleased_key(number, *id), None));
        }
        for (key, _) in subscriptions.into_values().flatten() {
            self.spool.set(Kind::Subscription, &key, None);
        }
        if damaged > 0 {
            tracing::error!(damaged, "rows of sessions are damaged, left out");
        }
        if refused > 0 {
            tracing::warn!(refused, "persistent_sessions_max reached, sessions dropped");
        }
        tracing::debug!(restored, messages, "persistent sessions loaded");
        Ok(())
    }

    /// None when there is no room for it.
    fn restore_session(
        &self,
        number: u32,
        row: SessionRow,
        subscriptions: Vec<SubscriptionRow>,
        unreleased: Vec<u16>,
        (now, now_ms): (Instant, u64),
    ) -> Option<Arc<Outbox>> {
        let device = row.device.as_deref().and_then(|id| DeviceId::parse(id).ok());
        let key = SessionKey { device: device.clone(), protocol: Protocol::Mqtt, client: row.client.as_str().into() };
        // Its connection ended with the gateway, if not before.
        let parked_ms = row.parked_ms.unwrap_or(now_ms);
        if row.parked_ms.is_none() {
            self.store_session(number, row.expiry_secs, &key, Some(parked_ms));
        }
        let expires = match row.expiry_secs {
            u32::MAX => None,
            secs => {
                // A clock that has gone back makes no session older than it is.
                let away = Duration::from_millis(now_ms.saturating_sub(parked_ms));
                Some(now + Duration::from_secs(secs.into()).saturating_sub(away))
            }
        };
        let mut queue = None;
        let restored = |id| {
            let resume = self.restored(number, id, device.as_ref(), subscriptions, unreleased);
            queue = Some(resume.outbox.clone());
            resume
        };
        match self.sessions.restore(key, expires, restored) {
            Ok(()) => queue,
            Err(refused) => {
                self.discard(refused);
                None
            }
        }
    }

    fn restored(
        &self,
        number: u32,
        id: SessionId,
        device: Option<&DeviceId>,
        subscriptions: Vec<SubscriptionRow>,
        unreleased: Vec<u16>,
    ) -> Resume {
        let outbox = self.persistent_outbox(id, number);
        outbox.park();
        let mut filters = Vec::with_capacity(subscriptions.len());
        for row in subscriptions {
            let Ok(asked) = Filter::parse(&row.asked) else { continue };
            let Ok(filter) = canonical_filter(&asked, device) else { continue };
            let options = SubscribeOptions {
                qos: qos_of(row.qos),
                no_local: row.no_local,
                retain_as_published: row.retain_as_published,
                identifier: row.identifier,
                view: Address::view(&asked.pattern, device),
            };
            match self.hub.subscribe(&filter, &outbox, row.tag, options) {
                Ok(_) => filters.push((filter, row.tag)),
                Err(reject) => tracing::warn!(session = number, %reject, "subscription of a session not restored"),
            }
        }
        let state: Box<dyn Any + Send> = Box::new(InFlight { unreleased, ..InFlight::default() });
        Resume { outbox, filters, state }
    }
}

/// The filter that a text stands for when this device writes it.
///
/// # Errors
/// As [`Address::canonical`].
pub(super) fn canonical_filter(asked: &Filter, device: Option<&DeviceId>) -> Result<Filter, super::Reject> {
    let mut buffer = String::new();
    let pattern = Address::from_mqtt(&asked.pattern).canonical(device, &mut buffer)?.into();
    Ok(Filter { group: asked.group.clone(), pattern })
}

fn subscription_key(number: u32, filter: &Filter, tag: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(16 + filter.pattern.len());
    key.extend_from_slice(&number.to_be_bytes());
    key.extend_from_slice(&tag.to_be_bytes());
    if let Some(group) = &filter.group {
        // A group has no slash in it, so nothing else looks like this.
        key.extend_from_slice(b"$share/");
        key.extend_from_slice(group.as_bytes());
        key.push(b'/');
    }
    key.extend_from_slice(filter.pattern.as_bytes());
    key
}

pub(super) fn unreleased_key(number: u32, id: u16) -> [u8; 6] {
    let ([a, b, c, d], [e, f]) = (number.to_be_bytes(), id.to_be_bytes());
    [a, b, c, d, e, f]
}

/// The number that a key begins with.
fn number_of(key: &[u8]) -> Option<u32> {
    key.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

pub(super) fn qos_of(number: u8) -> Qos {
    match number {
        0 => Qos::AtMostOnce,
        1 => Qos::AtLeastOnce,
        _ => Qos::ExactlyOnce,
    }
}
