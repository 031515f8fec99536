//! Messages for persistent sessions: stored once for all of them, with the group commit, before anybody is told that they were accepted.
//!
//! One short lock gives all such messages one order: that of their positions on disk is that of every queue they enter. Publishes that no persistent
//! session wants do not come here.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::durable::{Durable, qos_of, unreleased_key};
use super::publish::Report;
use super::{Address, Client, Done, Gateway, Message, MessageId, Published, Qos, Receipt, Reject, meters};
use crate::hub::{Delivery, Filter, Matches, Outbox, Pushed, Store, Target, Terms, Ticket, View};
use crate::spool::{self, Demand, Kind, Spool};

/// Reads messages from the spool for queues.
pub(super) struct Loader(pub Spool);

impl Store for Loader {
    fn load(&self, positions: Vec<u64>, outbox: Arc<Outbox>) {
        self.0.fetch(positions, move |found| {
            let read = found.into_iter().map(|found| (found.position, found.message.map(Arc::new)));
            let missing = outbox.loaded(read.collect());
            if missing > 0 {
                meters().dropped_session.increment(missing as u64);
            }
        });
    }
}

/// Where messages for persistent sessions are stored, and the one order in which they are.
#[derive(Clone)]
pub(super) struct Backlog {
    pub spool: Spool,
    /// Held while a message for persistent sessions is stored and enters their queues.
    storing: Arc<Mutex<()>>,
}

impl Backlog {
    pub fn new(spool: Spool) -> Self {
        Backlog { spool, storing: Arc::default() }
    }

    /// Stores a message for one persistent session; nobody waits for that. What cannot be stored is dropped and counted.
    pub fn store(&self, outbox: &Outbox, delivery: Delivery) {
        let _one_order = self.storing.lock();
        let Some(kept) = Kept::new(outbox, delivery.qos, delivery.retain, &delivery.terms) else {
            meters().dropped_outbox.increment(1);
            return;
        };
        let demand = Demand { targets: &[kept.target()], ..Demand::default() };
        match self.spool.store(&delivery.message, demand, None, 0) {
            Ok((_, position)) => {
                let ticket = Some(Ticket::new(position, kept.id));
                self.give_up(&outbox.push_stored(Delivery { ticket, ..delivery }));
            }
            Err(reject) => {
                meters().dropped_session.increment(1);
                tracing::debug!(%reject, "message not stored for a session");
            }
        }
    }

    /// Messages that a full queue has dropped.
    fn give_up(&self, positions: &[u64]) {
        if positions.is_empty() {
            return;
        }
        meters().dropped_session.increment(positions.len() as u64);
        positions.iter().for_each(|position| self.spool.release(*position));
    }
}

/// A recipient with a queue, and what its target on disk says.
struct Kept {
    session: u32,
    id: std::num::NonZeroU16,
    flags: u8,
    note: Vec<u8>,
}

impl Gateway {
    /// Spool and queues, subscribers, acknowledgement: as `dispatch`, for a message that some persistent session wants.
    pub(super) fn dispatch_stored(
        &self,
        message: &Arc<Message>,
        matches: &Matches,
        demand: Demand<'_>,
        done: Option<Done<'_>>,
        receipt: Receipt,
        now: Instant,
    ) -> Result<Published, Reject> {
        let slow = done.and_then(|_| self.hub.slow_target(matches, message.qos));
        let report = Report::new(done, slow, true);
        let mut dropped = Vec::new();
        let mut lost: u64 = 0;
        let accepted = {
            let _one_order = self.backlog.storing.lock();
            let recipients = self.hub.recipients(message, matches);
            let kept: Vec<Option<Kept>> = recipients.iter().map(|target| self.admit(target, message)).collect();
            let targets: Vec<spool::Target<'_>> = kept.iter().flatten().map(Kept::target).collect();
            let demand = Demand { targets: &targets, ..demand };
            let (accepted, position) = self.spool.store(message, demand, report.for_spool(), receipt.receivers)?;
            for (target, kept) in recipients.into_iter().zip(&kept) {
                let ticket = kept.as_ref().map(|kept| Ticket::new(position, kept.id));
                let delivery = target.delivery(message, ticket);
                if ticket.is_some() {
                    dropped.append(&mut target.outbox.push_stored(delivery));
                } else if target.stores(message.qos) || target.outbox.push(delivery, now) == Pushed::Dropped {
                    // A client that leaves too many unanswered gets no more.
                    lost += 1;
                }
            }
            accepted
        };
        self.backlog.give_up(&dropped);
        if lost > 0 {
            meters().dropped_outbox.increment(lost);
        }
        Ok(report.finish(Some(accepted), receipt))
    }

    /// A place in the recipient's queue, if it has one.
    fn admit(&self, target: &Target, message: &Message) -> Option<Kept> {
        if !target.stores(message.qos) {
            return None;
        }
        let retain = message.retain && target.retain_as_published;
        Kept::new(&target.outbox, message.qos.min(target.qos), retain, &target.terms)
    }

    /// Stores retained messages for a persistent session that has just subscribed; what cannot be stored is left out.
    pub(super) fn store_retained(&self, client: &Client, deliveries: Vec<Delivery>) -> Vec<Delivery> {
        if client.durable.is_none() {
            return deliveries;
        }
        let (stored, rest): (Vec<_>, Vec<_>) = deliveries.into_iter().partition(|d| d.qos != Qos::AtMostOnce);
        stored.into_iter().for_each(|delivery| self.backlog.store(&client.outbox, delivery));
        rest
    }

    /// The client has taken a message (`QoS` 1: PUBACK), has refused it, or cannot be given it: it need not be kept. Without effect for what is not kept.
    pub fn delivered(&self, client: &Client, delivery: &Delivery) {
        if let Some(ticket) = delivery.ticket
            && client.outbox.done(ticket)
        {
            self.spool.release(ticket.position());
            self.note_change(client);
        }
    }

    /// The client has received a `QoS` 2 message (PUBREC): it is not to be sent again. PUBREL may go once this is done.
    ///
    /// # Errors
    /// [`Reject::Full`] while the disk does not take it.
    pub fn received(&self, client: &Client, delivery: &Delivery, done: Done<'_>) -> Result<Published, Reject> {
        if let Some(ticket) = delivery.ticket {
            client.outbox.received(ticket);
            self.store_cursor(&client.outbox);
        }
        self.settle(client, done)
    }

    /// The client has released the identifier of a message that it has [`published once`](Gateway::publish_once) (PUBREL). PUBCOMP may go once this is done.
    ///
    /// # Errors
    /// [`Reject::Full`] while the disk does not take it.
    pub fn released(&self, client: &mut Client, packet_id: u16, done: Done<'_>) -> Result<Published, Reject> {
        self.free_id(client, packet_id);
        self.settle(client, done)
    }

    /// Reports when everything that a persistent session has changed so far (its subscriptions, for instance) is on disk.
    ///
    /// # Errors
    /// [`Reject::Full`] while the disk does not take it.
    pub fn settle(&self, client: &Client, (completion, token): Done<'_>) -> Result<Published, Reject> {
        let receipt = Receipt { id: MessageId::default(), receivers: 0 };
        if client.durable.is_none() {
            return Ok(Published::Done(receipt));
        }
        self.spool.sync(completion.clone(), token, receipt)?;
        Ok(Published::Pending)
    }

    pub(super) fn take_id(&self, client: &mut Client, packet_id: u16) {
        if let Some(Durable { number, unreleased, .. }) = &mut client.durable {
            self.spool.set(Kind::Unreleased, &unreleased_key(*number, packet_id), Some(&[]));
            unreleased.push(packet_id);
        }
    }

    /// The identifier of an incoming `QoS` 2 message is free: it was refused, or released.
    pub fn free_id(&self, client: &mut Client, packet_id: u16) {
        if let Some(Durable { number, unreleased, .. }) = &mut client.durable {
            unreleased.retain(|id| *id != packet_id);
            self.spool.set(Kind::Unreleased, &unreleased_key(*number, packet_id), None);
        }
    }

    /// The client has completed a `QoS` 2 handshake (PUBCOMP).
    pub fn completed(&self, client: &Client, packet_id: u16) {
        if let Some(position) = client.outbox.completed(packet_id) {
            self.spool.release(position);
            self.note_change(client);
        }
    }

    fn note_change(&self, client: &Client) {
        if client.outbox.note() {
            self.changed.lock().push(client.outbox.clone());
        }
    }

    /// Writes the cursors of sessions that have taken something.
    pub(super) fn store_cursors(&self) {
        for outbox in std::mem::take(&mut *self.changed.lock()) {
            self.store_cursor(&outbox);
        }
    }

    pub(super) fn store_cursor(&self, outbox: &Outbox) {
        if let (Some(number), Some(cursor)) = (outbox.number(), outbox.changed_cursor()) {
            let value = serde_json::to_vec(&cursor).unwrap_or_default();
            self.spool.set(Kind::Cursor, &number.to_be_bytes(), Some(&value));
        }
    }
}

impl Kept {
    fn new(outbox: &Outbox, qos: Qos, retain: bool, terms: &Terms) -> Option<Kept> {
        let (session, id) = (outbox.number()?, outbox.reserve()?);
        let set = |flag, is_set| if is_set { flag } else { 0 };
        let flags = qos as u8 | set(RETAIN, retain) | set(SHARED, terms.shared.is_some());
        Some(Kept { session, id, flags, note: encode_terms(terms) })
    }

    fn target(&self) -> spool::Target<'_> {
        spool::Target { session: self.session, id: self.id.get(), flags: self.flags, note: &self.note }
    }
}

/// What the flags and the note of a target on disk say.
pub(super) fn decode_target(target: &spool::Target<'_>) -> (Qos, bool, Terms) {
    let qos = qos_of(target.flags & QOS);
    let terms = decode_terms(target.note, target.flags & SHARED != 0);
    (qos, target.flags & RETAIN != 0, terms.unwrap_or_default())
}

const QOS: u8 = 0b11;
const RETAIN: u8 = 0b100;
/// The note begins with the filter of a shared subscription.
const SHARED: u8 = 0b1000;

/// `skip u16 | prefix length u8 | prefix | tag u64 | identifiers u32...`, little-endian; nothing for the ordinary case. Before it, for a shared
/// subscription, `length u16 | group / pattern`.
fn encode_terms(terms: &Terms) -> Vec<u8> {
    let mut note = terms.shared.as_deref().map(encode_shared).unwrap_or_default();
    if terms.tag == 0 && terms.view == View::Canonical && terms.identifiers.is_none() {
        return note;
    }
    let (skip, prefix) = match terms.view {
        View::Canonical => (0, ""),
        View::Short { skip, prefix } => (skip, prefix),
    };
    note.extend_from_slice(&skip.to_le_bytes());
    // Names of the device API: a few letters.
    note.push(prefix.len() as u8);
    note.extend_from_slice(prefix.as_bytes());
    note.extend_from_slice(&terms.tag.to_le_bytes());
    for identifier in terms.identifiers.iter().flat_map(|all| all.iter()) {
        note.extend_from_slice(&identifier.to_le_bytes());
    }
    note
}

fn encode_shared(filter: &Filter) -> Vec<u8> {
    let text = [filter.group.as_deref().unwrap_or_default(), "/", &filter.pattern].concat();
    // A filter that was subscribed to came in an MQTT string.
    let mut note = u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes().to_vec();
    note.extend_from_slice(text.as_bytes());
    note
}

fn decode_shared(note: &[u8]) -> Option<(Arc<Filter>, &[u8])> {
    let (length, rest) = note.split_first_chunk()?;
    let (text, rest) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
    // A group has no slash in it.
    let (group, pattern) = std::str::from_utf8(text).ok()?.split_once('/')?;
    Some((Arc::new(Filter { group: Some(group.into()), pattern: pattern.into() }), rest))
}

fn decode_terms(note: &[u8], is_shared: bool) -> Option<Terms> {
    let (shared, note) = match is_shared {
        true => decode_shared(note).map(|(shared, rest)| (Some(shared), rest))?,
        false => (None, note),
    };
    if note.is_empty() {
        return Some(Terms { shared, ..Terms::default() });
    }
    let (skip, rest) = note.split_first_chunk()?;
    let (length, rest) = rest.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*length))?;
    let (tag, rest) = rest.split_first_chunk()?;
    let (identifiers, _) = rest.as_chunks();
    let view = match Address::short_name(std::str::from_utf8(name).ok()?) {
        Some(prefix) => View::Short { skip: u16::from_le_bytes(*skip), prefix },
        None => View::Canonical,
    };
    let identifiers: Vec<u32> = identifiers.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let identifiers = (!identifiers.is_empty()).then(|| identifiers.into());
    Some(Terms { tag: u64::from_le_bytes(*tag), view, identifiers, shared })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_read_back() {
        let short = View::Short { skip: 300, prefix: "c/res" };
        let shared = Some(Arc::new(Filter::parse("$share/g/a/+/#").unwrap()));
        for terms in [
            Terms::default(),
            Terms { tag: 7, ..Terms::default() },
            Terms { view: short, ..Terms::default() },
            Terms { shared: shared.clone(), ..Terms::default() },
            Terms { tag: u64::MAX, view: short, identifiers: Some([1, 268_435_455].into()), shared },
        ] {
            assert_eq!(decode_terms(&encode_terms(&terms), terms.shared.is_some()), Some(terms));
        }
        for noise in [&[1][..], &[0, 0, 9, 1], &[0, 0, 1, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(decode_terms(noise, false), None);
        }
        for noise in [&[][..], &[1], &[2, 0, b'a'], &[1, 0, b'a'], &[3, 0, b'g', b'/', 0xff]] {
            assert_eq!(decode_terms(noise, true), None);
        }
    }
}
