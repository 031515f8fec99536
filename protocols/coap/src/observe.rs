//! Observers (RFC 7641, server side): who observes, and how a notification reaches them.
//!
//! An observer is a peer and a token. A notification is a NON, every so often a CON, and while a CON is unacknowledged newer values replace each other, so
//! that a slow observer sees the latest and costs one message of memory. Where each value matters (commands) every notification is a CON and waits its turn.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;

use crate::answer::Token;
use crate::block::Block;
use crate::build::Builder;
use crate::code::Code;
use crate::endpoint::{Endpoint, Event, GoneReason};
use crate::message::Kind;
use crate::outgoing::Purpose;
use crate::peer::{MessageKey, PeerKey, Secret};
use crate::response::{self, Added, Response};
use crate::slots::{Slot, Slots};

/// Names one observer until it is gone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObserverId(pub(crate) Slot);

impl ObserverId {
    /// For carrying the id through an interface that knows only numbers.
    pub fn to_bits(self) -> u64 {
        self.0.to_bits()
    }

    pub fn from_bits(bits: u64) -> Self {
        ObserverId(Slot::from_bits(bits))
    }
}

/// A new value for one observer.
#[derive(Clone, Debug)]
pub struct Notification {
    /// 2.05, or an error, which ends the observation.
    pub code: Code,
    pub content_format: Option<u16>,
    pub max_age: Option<u32>,
    /// Location-Path, written with `/` between its segments: what this value is about, where the observed resource stands for many.
    pub location: Option<Box<str>>,
    pub payload: Bytes,
    pub delivery: Delivery,
}

impl Notification {
    /// 2.05 with a payload, of which only the latest matters.
    pub fn content(content_format: Option<u16>, payload: Bytes) -> Self {
        Notification {
            code: Code::CONTENT,
            content_format,
            max_age: None,
            location: None,
            payload,
            delivery: Delivery::Latest,
        }
    }

    /// An error without a payload, which ends the observation.
    pub fn ended(code: Code) -> Self {
        Notification { code, ..Notification::content(None, Bytes::new()) }
    }
}

/// What happens to a value when a newer one overtakes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// The newer one replaces it: eventual consistency, as RFC 7641 section 1.3 has it.
    Latest,
    /// Each is confirmed, in order; [`Event::Delivered`] carries the ticket.
    Each { ticket: u64 },
}

/// Why a notification was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotifyError {
    /// No such observer any more.
    Gone,
    /// `observe_queue_max` or `observe_bytes_max` is reached; try again after an [`Event::Delivered`].
    Full,
}

#[derive(Clone, Debug)]
pub(crate) struct Registration {
    pub peer: SocketAddr,
    pub token: Token,
    /// Block size for its notifications.
    pub exponent: u8,
}

#[derive(Debug)]
struct Observer {
    of: Registration,
    sequence: u32,
    last_confirmed: Instant,
    unconfirmed: u16,
    /// The confirmable notification in flight and its ticket.
    in_flight: Option<(Slot, Option<u64>)>,
    latest: Option<Notification>,
    queue: VecDeque<Notification>,
    /// Message ids of the last NON notifications, which a reset may name.
    recent: VecDeque<MessageKey>,
    /// A value was dropped for want of room: ask for it again.
    stale: bool,
    refresh_at: Instant,
}

#[derive(Debug)]
pub(crate) struct Observers {
    rows: Slots<Observer>,
    by_token: HashMap<(PeerKey, Token), ObserverId, Secret>,
    of_peer: HashMap<PeerKey, usize, Secret>,
    by_message: HashMap<MessageKey, ObserverId, Secret>,
    refresh: BTreeSet<(Instant, ObserverId)>,
    /// Payload bytes that wait.
    bytes: usize,
}

impl Observers {
    /// NON message ids remembered of each observer.
    const RECENT: usize = 4;

    pub fn new(secret: Secret, observers_max: usize) -> Self {
        Observers {
            rows: Slots::new(observers_max),
            by_token: HashMap::with_hasher(secret.clone()),
            of_peer: HashMap::with_hasher(secret.clone()),
            by_message: HashMap::with_hasher(secret),
            refresh: BTreeSet::new(),
            bytes: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Adds an observer whose first answer carries `sequence`. `None` when there is no room.
    pub fn register(
        &mut self,
        now: Instant,
        of: Registration,
        sequence: u32,
        refresh_at: Instant,
    ) -> Option<ObserverId> {
        let peer = PeerKey::new(of.peer);
        let token = of.token.clone();
        let observer = Observer {
            of,
            sequence,
            last_confirmed: now,
            // The first notification is confirmable: an address that never asked says so before it gets more.
            unconfirmed: u16::MAX,
            in_flight: None,
            latest: None,
            queue: VecDeque::new(),
            recent: VecDeque::new(),
            stale: false,
            refresh_at,
        };
        let id = ObserverId(self.rows.insert(observer)?);
        self.by_token.insert((peer, token), id);
        *self.of_peer.entry(peer).or_default() += 1;
        self.refresh.insert((refresh_at, id));
        Some(id)
    }

    /// How many observers a peer has.
    pub fn of_peer(&self, peer: PeerKey) -> usize {
        self.of_peer.get(&peer).copied().unwrap_or(0)
    }

    /// Where the sequence of this observer goes on (section 4.4), also in the one that replaces it.
    pub fn sequence_after(&self, id: ObserverId) -> u32 {
        self.rows.get(id.0).map_or(1, |observer| next_sequence(observer.sequence))
    }

    pub fn find(&self, peer: PeerKey, token: &Token) -> Option<ObserverId> {
        self.by_token.get(&(peer, token.clone())).copied()
    }

    /// The observer that got the NON with this message id.
    pub fn find_sent(&self, key: MessageKey) -> Option<ObserverId> {
        self.by_message.get(&key).copied()
    }

    pub fn next_refresh(&self) -> Option<Instant> {
        self.refresh.first().map(|(at, _)| *at)
    }

    fn remove(&mut self, id: ObserverId) -> Option<Observer> {
        let observer = self.rows.remove(id.0)?;
        let peer = PeerKey::new(observer.of.peer);
        self.by_token.remove(&(peer, observer.of.token.clone()));
        self.refresh.remove(&(observer.refresh_at, id));
        for key in &observer.recent {
            self.by_message.remove(key);
        }
        if let Some(count) = self.of_peer.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                self.of_peer.remove(&peer);
            }
        }
        let waiting = observer.queue.iter().chain(&observer.latest).map(|n| n.payload.len());
        self.bytes -= waiting.sum::<usize>();
        Some(observer)
    }

    /// Notes the id of a NON, in place of the oldest.
    fn note_sent(&mut self, id: ObserverId, key: MessageKey) {
        let Some(observer) = self.rows.get_mut(id.0) else { return };
        if observer.recent.len() >= Self::RECENT
            && let Some(oldest) = observer.recent.pop_front()
        {
            self.by_message.remove(&oldest);
        }
        observer.recent.push_back(key);
        self.by_message.insert(key, id);
    }
}

impl Endpoint {
    /// Sends a value to one observer, or lets it wait for the one before.
    ///
    /// # Errors
    /// `Gone`, or `Full` when a value that must arrive finds no room; a `Latest` value that finds none becomes an [`Event::Refresh`] later.
    pub fn notify(&mut self, now: Instant, id: ObserverId, notification: Notification) -> Result<(), NotifyError> {
        let (queue_max, bytes_max) = (self.config.observe_queue_max, self.config.observe_bytes_max);
        let observer = self.observers.rows.get_mut(id.0).ok_or(NotifyError::Gone)?;
        let peer = PeerKey::new(observer.of.peer);
        let must_wait = observer.in_flight.is_some() || !observer.queue.is_empty() || self.outgoing.is_busy(peer);
        let confirm = matches!(notification.delivery, Delivery::Each { .. });
        let is_possible = !confirm || !self.outgoing.is_full();
        if !must_wait && is_possible {
            self.send_notification(now, id, notification);
            return Ok(());
        }
        let room = self.observers.bytes + notification.payload.len() <= bytes_max;
        match notification.delivery {
            Delivery::Each { .. } => {
                if !room || !must_wait || observer.queue.len() >= queue_max {
                    return Err(NotifyError::Full);
                }
                self.observers.bytes += notification.payload.len();
                observer.queue.push_back(notification);
            }
            Delivery::Latest => {
                if let Some(old) = observer.latest.take() {
                    self.counters.conflated += 1;
                    self.observers.bytes -= old.payload.len();
                }
                observer.stale = !room;
                if room {
                    self.observers.bytes += notification.payload.len();
                    observer.latest = Some(notification);
                }
            }
        }
        // Without one of its own in flight it waits for its peer's.
        if observer.in_flight.is_none() {
            self.outgoing.wait(peer, id);
        }
        Ok(())
    }

    /// Removes an observer without a word; the next notification that it would have got does not come.
    pub fn forget(&mut self, now: Instant, id: ObserverId) {
        let Some(observer) = self.observers.remove(id) else { return };
        if let Some((slot, _)) = observer.in_flight {
            self.outgoing.remove(slot);
        }
        // Others of the same peer may have waited for this one's acknowledgement.
        self.next_notification(now, PeerKey::new(observer.of.peer));
    }

    pub(crate) fn remove_observer(&mut self, now: Instant, id: ObserverId, reason: GoneReason) {
        if self.observers.rows.get(id.0).is_some() {
            self.events.push_back(Event::ObserverGone { observer: id, reason });
            self.forget(now, id);
        }
    }

    fn send_notification(&mut self, now: Instant, id: ObserverId, notification: Notification) {
        let Some(observer) = self.observers.rows.get_mut(id.0) else { return };
        let ticket = match notification.delivery {
            Delivery::Each { ticket } => Some(ticket),
            Delivery::Latest => None,
        };
        let ends = !notification.code.is_success();
        let due = observer.unconfirmed.saturating_add(1) >= self.config.observe_confirm_every
            || now.saturating_duration_since(observer.last_confirmed) >= self.config.observe_confirm_after;
        let confirm = (ticket.is_some() || due || ends) && !self.outgoing.is_full();
        observer.unconfirmed = observer.unconfirmed.saturating_add(1);
        observer.sequence = next_sequence(observer.sequence);
        let (of, sequence) = (observer.of.clone(), observer.sequence);
        let kind = if confirm { Kind::Confirmable } else { Kind::NonConfirmable };
        let key = self.write_notification(&of, sequence, kind, &notification);
        self.counters.notifications += 1;
        let random = self.secret.random();
        let bytes = self.batch.close(of.peer);
        if confirm {
            // The last word of an ended observation is retransmitted like an answer: nobody is there to lose.
            let purpose = if ends { Purpose::Answer } else { Purpose::Notification(id) };
            let slot = self.outgoing.insert(now, of.peer, key, purpose, bytes, random);
            if let Some(observer) = self.observers.rows.get_mut(id.0).filter(|_| !ends) {
                observer.in_flight = slot.map(|slot| (slot, ticket));
            }
        } else {
            self.observers.note_sent(id, key);
        }
        if ends {
            self.remove_observer(now, id, GoneReason::Ended);
        }
    }

    /// Writes into the open end of the batch and returns the new message's key.
    fn write_notification(
        &mut self,
        of: &Registration,
        sequence: u32,
        kind: Kind,
        notification: &Notification,
    ) -> MessageKey {
        let peer = PeerKey::new(of.peer);
        let message_id = self.message_ids.next(&self.secret, peer);
        let payload = &notification.payload;
        let block = Block { number: 0, more: true, exponent: of.exponent };
        let is_long = payload.len() > block.bytes();
        let piece = payload.get(..block.bytes()).filter(|_| is_long).unwrap_or(payload);
        let etag = is_long.then(|| self.etag(payload));
        let location: Vec<&str> = notification.location.iter().flat_map(|path| path.split('/')).collect();
        let response = Response {
            content_format: notification.content_format,
            max_age: notification.max_age,
            location_path: &location,
            etag: etag.as_ref().map_or(&[], |e| &e[..]),
            ..Response::new(notification.code)
        };
        let added = Added {
            observe: notification.code.is_success().then_some(sequence),
            block2: is_long.then(|| block.bits()),
            size2: is_long.then(|| u32::try_from(payload.len()).ok()).flatten(),
            ..Added::default()
        };
        let builder = Builder::datagram(self.batch.open(), kind, notification.code, message_id, of.token.as_slice());
        response::write(&response, added, piece, builder);
        peer.message(message_id)
    }

    pub(crate) fn notification_confirmed(&mut self, now: Instant, id: ObserverId) {
        let Some(observer) = self.observers.rows.get_mut(id.0) else { return };
        observer.last_confirmed = now;
        observer.unconfirmed = 0;
        let peer = PeerKey::new(observer.of.peer);
        if let Some((_, Some(ticket))) = observer.in_flight.take() {
            self.events.push_back(Event::Delivered { observer: id, ticket });
        }
        let observer = self.observers.rows.get_mut(id.0);
        if observer.is_some_and(|o| !o.queue.is_empty() || o.latest.is_some() || o.stale) {
            self.outgoing.wait(peer, id);
        }
        self.next_notification(now, peer);
    }

    /// Lets the peer's waiting observers go on, as far as NSTART allows.
    fn next_notification(&mut self, now: Instant, peer: PeerKey) {
        while !self.outgoing.is_busy(peer) {
            let Some(id) = self.outgoing.next_waiting(peer) else { return };
            let Some(observer) = self.observers.rows.get_mut(id.0).filter(|o| o.in_flight.is_none()) else { continue };
            if std::mem::take(&mut observer.stale) {
                self.events.push_back(Event::Refresh { observer: id });
            }
            let next = observer.queue.pop_front().or_else(|| observer.latest.take());
            if let Some(notification) = next {
                let more = !observer.queue.is_empty() || observer.latest.is_some();
                self.observers.bytes -= notification.payload.len();
                self.send_notification(now, id, notification);
                if more && self.observers.rows.get(id.0).is_some() {
                    self.outgoing.wait(peer, id);
                }
            }
        }
    }

    /// Sends a confirmable message again; a notification that a newer value has overtaken is replaced by it (section 4.5.2).
    pub(crate) fn retransmit(&mut self, now: Instant, slot: Slot) {
        let Some(sent) = self.outgoing.get(slot) else { return };
        let purpose = sent.purpose;
        if let Purpose::Notification(id) = purpose
            && let Some(observer) = self.observers.rows.get_mut(id.0)
            && matches!(observer.in_flight, Some((_, None)))
            && let Some(newer) = observer.latest.take()
        {
            self.observers.bytes -= newer.payload.len();
            if !newer.code.is_success() {
                // The observation ends with this one; nothing is left to retransmit.
                return self.send_notification(now, id, newer);
            }
            observer.sequence = next_sequence(observer.sequence);
            let (of, sequence) = (observer.of.clone(), observer.sequence);
            let key = self.write_notification(&of, sequence, Kind::Confirmable, &newer);
            let bytes = self.batch.close(of.peer);
            self.outgoing.replace(slot, key, bytes);
        } else {
            self.batch.push(sent.peer, &sent.bytes);
        }
    }

    /// Asks for a value for those who have not confirmed anything for long.
    pub(crate) fn refresh_observers(&mut self, now: Instant) {
        let after = self.config.observe_confirm_after;
        while let Some(&(at, id)) = self.observers.refresh.first().filter(|(at, _)| *at <= now) {
            self.observers.refresh.remove(&(at, id));
            let Some(observer) = self.observers.rows.get_mut(id.0) else { continue };
            let due = observer.last_confirmed + after;
            if due <= now {
                self.events.push_back(Event::Refresh { observer: id });
            }
            observer.refresh_at = if due > now { due } else { now + after };
            self.observers.refresh.insert((observer.refresh_at, id));
        }
    }
}

/// 24 bits, and onwards from zero (section 4.4).
fn next_sequence(sequence: u32) -> u32 {
    (sequence + 1) & 0xff_ffff
}
