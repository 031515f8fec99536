//! One bounded mailbox per session: what other workers and the spool's thread have for it.
//!
//! Everything that reaches a session from outside its own task goes through here: messages of its subscriptions, outcomes of
//! its own publishes (a [`Completion`]), and an order to close. The session's task drains all of it in one lock and turns it
//! into one write. A push is one lock and at most one wake.
//!
//! Three marks bound it. Up to the high-water mark everything is taken. From there on `QoS` 0 is dropped and counted, and
//! whoever publishes at `QoS` 1 or 2 gets its acknowledgement only after this outbox has drained: a slow subscriber slows its
//! publishers down instead of losing what they were promised. At the hard bound (four times the mark, reachable only by many
//! publishers at once) messages are refused.

mod total;

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::queue::{Cursor, Entering, Left, SessionQueue, Terms, Ticket};
use crate::message::{CloseReason, Completion, Control, Message, Qos, Receipt, Reject, SessionId};

pub use total::Total;

/// Bounds of one outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutboxLimits {
    /// High-water mark in messages, at least 1.
    pub messages_max: usize,
    /// High-water mark in bytes of [`Message::cost_bytes`], at least 1.
    pub bytes_max: usize,
    /// How long publishers of `QoS` 0 wait for an outbox that is more than half full to come down to a quarter.
    pub crowded_wait: Duration,
}

/// A message on its way to one subscriber.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub message: Arc<Message>,
    /// The lower of what was published and what was granted.
    pub qos: Qos,
    /// The retain flag as this subscriber is to see it.
    pub retain: bool,
    pub terms: Terms,
    /// Where it is stored for a persistent session.
    pub ticket: Option<Ticket>,
    /// The client may have it already.
    pub repeated: bool,
}

/// How a subscriber sees topics: as they are, or by the device API's short names (`dev/ID/cmd/7/reboot` as `c/7/reboot`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum View {
    #[default]
    Canonical,
    /// The bytes to skip at the front, and the short name to put there.
    Short { skip: u16, prefix: &'static str },
}

impl Delivery {
    /// The topic in the two pieces to be written one after the other.
    pub fn topic_parts(&self) -> (&'static str, &str) {
        match self.terms.view {
            View::Canonical => ("", self.message.topic.as_str()),
            View::Short { skip, prefix } => {
                (prefix, self.message.topic.as_str().get(usize::from(skip)..).unwrap_or(""))
            }
        }
    }
}

/// What one drain brings; kept by the session's task and reused.
#[derive(Default)]
pub struct Drained {
    pub deliveries: VecDeque<Delivery>,
    pub completions: Vec<(u64, Result<Receipt, Reject>)>,
    pub close: Option<CloseReason>,
    /// Since when the reader is too slow, if it is; see [`Outbox::slow_since`].
    pub slow_since: Option<Instant>,
}

/// How a push ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    Taken,
    /// `QoS` 0, taken; who can wait is to publish no more until there is room ([`Outbox::poll_room`]).
    Crowded,
    /// Taken, but above the high-water mark: withhold the publisher's acknowledgement ([`Outbox::when_drained`]).
    Slow,
    /// Not taken: `QoS` 0 above the mark, or the hard bound, or the session is gone.
    Dropped,
}

/// See the module's documentation.
pub struct Outbox {
    session: SessionId,
    limits: OutboxLimits,
    total: Option<Arc<Total>>,
    depth: AtomicUsize,
    /// No task drains it: a persistent session between two connections. `QoS` 0 is not kept. Changes under the lock.
    is_parked: AtomicBool,
    persistent: Option<Persistent>,
    inner: Mutex<Inner>,
}

/// What a persistent session has beside others.
struct Persistent {
    number: u32,
    store: Arc<dyn Store>,
    itself: Weak<Outbox>,
    /// Somebody knows that the cursor has changed.
    noted: AtomicBool,
}

/// Where the messages of a persistent session's queue are.
pub trait Store: Send + Sync {
    /// Reads messages and gives them to [`Outbox::loaded`], soon and from another thread. Must not block.
    fn load(&self, positions: Vec<u64>, outbox: Arc<Outbox>);
}

struct Inner {
    /// `QoS` 1 and 2 of a persistent session.
    stored: Option<Box<SessionQueue>>,
    queue: VecDeque<Delivery>,
    bytes: usize,
    /// Of these, what the total knows.
    reported: usize,
    completions: Vec<(u64, Result<Receipt, Reject>)>,
    close: Option<CloseReason>,
    waker: Option<Waker>,
    /// Publishers that wait for this outbox to drain.
    waiting: Vec<Waiting>,
    slow_since: Option<Instant>,
    /// Since when it has been more than half full without coming down to a quarter.
    crowded_since: Option<Instant>,
    /// Publishers of `QoS` 0 that wait for that.
    crowd: Vec<Waker>,
    /// How often a crowd has been let go.
    crowds: u32,
    /// The session's task has no room for messages: a push need not wake it.
    only_outcomes: bool,
    dropped: u64,
}

struct Waiting {
    completion: Arc<dyn Completion>,
    token: u64,
    receipt: Receipt,
}

const HARD_FACTOR: usize = 4;

/// Publishers that need not wait any more: to be told once the lock is let go, for what they do then may lead back here.
#[must_use]
#[derive(Default)]
struct Released {
    crowd: Vec<Waker>,
    waiting: Vec<Waiting>,
}

impl Released {
    /// Everybody.
    fn all(inner: &mut Inner) -> Self {
        Released { crowd: disperse(inner), waiting: std::mem::take(&mut inner.waiting) }
    }

    fn tell(self) {
        self.crowd.into_iter().for_each(Waker::wake);
        for Waiting { completion, token, receipt } in self.waiting {
            completion.complete(token, Ok(receipt));
        }
    }
}

/// Ends the waiting of publishers of `QoS` 0.
fn disperse(inner: &mut Inner) -> Vec<Waker> {
    inner.crowded_since = None;
    inner.crowds = inner.crowds.wrapping_add(1);
    std::mem::take(&mut inner.crowd)
}

impl Outbox {
    /// An outbox that is bounded by itself alone.
    pub fn new(session: SessionId, limits: OutboxLimits) -> Self {
        Outbox::with(session, limits, None, None, None)
    }

    /// An outbox that is bounded together with others too.
    pub fn counted(session: SessionId, limits: OutboxLimits, total: &Arc<Total>) -> Self {
        Outbox::with(session, limits, Some(total.clone()), None, None)
    }

    /// The outbox of a persistent session: its `QoS` 1 and 2 messages are stored under `number`, and read from `store` when they do not fit here.
    pub fn persistent(
        session: SessionId,
        limits: OutboxLimits,
        total: &Arc<Total>,
        queue: SessionQueue,
        number: u32,
        store: Arc<dyn Store>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|itself| {
            let persistent = Persistent { number, store, itself: itself.clone(), noted: AtomicBool::new(false) };
            Outbox::with(session, limits, Some(total.clone()), Some(persistent), Some(Box::new(queue)))
        })
    }

    fn with(
        session: SessionId,
        limits: OutboxLimits,
        total: Option<Arc<Total>>,
        persistent: Option<Persistent>,
        stored: Option<Box<SessionQueue>>,
    ) -> Self {
        Outbox {
            session,
            limits,
            total,
            depth: AtomicUsize::new(0),
            is_parked: AtomicBool::new(false),
            persistent,
            inner: Mutex::new(Inner {
                stored,
                queue: VecDeque::new(),
                bytes: 0,
                reported: 0,
                completions: Vec::new(),
                close: None,
                waker: None,
                waiting: Vec::new(),
                slow_since: None,
                crowded_since: None,
                crowd: Vec::new(),
                crowds: 0,
                only_outcomes: false,
                dropped: 0,
            }),
        }
    }

    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The number of a persistent session.
    pub fn number(&self) -> Option<u32> {
        self.persistent.as_ref().map(|persistent| persistent.number)
    }

    /// Whether no client is connected; without the lock a hint, as the depth.
    pub fn is_parked(&self) -> bool {
        self.is_parked.load(Ordering::Relaxed)
    }

    /// Messages waiting; a hint for balancing shared subscriptions.
    pub fn depth(&self) -> usize {
        self.depth.load(Ordering::Relaxed)
    }

    /// Whether it is at or above its high-water mark in messages; without a lock.
    pub fn is_above(&self) -> bool {
        self.depth() >= self.limits.messages_max
    }

    /// Messages dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.inner.lock().dropped
    }

    /// Whether there is an order to close that nobody has taken.
    pub fn is_ordered_to_close(&self) -> bool {
        self.inner.lock().close.is_some()
    }

    /// Puts one message in and wakes the session's task if it sleeps.
    pub fn push(&self, delivery: Delivery, now: Instant) -> Pushed {
        let cost = delivery.message.cost_bytes();
        let mut inner = self.inner.lock();
        let messages = inner.queue.len();
        let above = messages >= self.limits.messages_max
            || inner.bytes.saturating_add(cost) > self.limits.bytes_max
            || self.is_total_above(1);
        let far_above = above
            && (messages >= self.limits.messages_max.saturating_mul(HARD_FACTOR)
                || inner.bytes.saturating_add(cost) > self.limits.bytes_max.saturating_mul(HARD_FACTOR)
                || self.is_total_above(HARD_FACTOR));
        let refuse = match delivery.qos {
            Qos::AtMostOnce => above || self.is_parked(),
            // Nobody drains a parked outbox, so waiting for it would never end.
            Qos::AtLeastOnce | Qos::ExactlyOnce => far_above || (above && self.is_parked()),
        };
        if refuse || inner.close.is_some() {
            inner.dropped = inner.dropped.saturating_add(1);
            if above && inner.slow_since.is_none() {
                inner.slow_since = Some(now);
            }
            return Pushed::Dropped;
        }
        let newly_slow = above && inner.slow_since.is_none();
        if newly_slow {
            inner.slow_since = Some(now);
        }
        let waits_for_room = delivery.qos == Qos::AtMostOnce;
        inner.queue.push_back(delivery);
        inner.bytes = inner.bytes.saturating_add(cost);
        self.report(&mut inner);
        self.depth.store(messages + 1, Ordering::Relaxed);
        let crowded = waits_for_room && !self.is_low(&inner) && self.has_patience(&mut inner, now);
        let waker = if inner.only_outcomes && !newly_slow { None } else { inner.waker.take() };
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
        match (above, crowded) {
            (true, _) => Pushed::Slow,
            (false, true) => Pushed::Crowded,
            (false, false) => Pushed::Taken,
        }
    }

    /// Pending while a publisher of `QoS` 0 is to wait, with the time when it need not any more. `joined` is None at first and belongs to one wait.
    pub fn poll_room(&self, cx: &mut Context<'_>, joined: &mut Option<u32>, now: Instant) -> Poll<()> {
        let mut inner = self.inner.lock();
        let over = inner.crowded_since.is_none_or(|since| now >= since + self.limits.crowded_wait);
        if over || self.is_parked() || inner.close.is_some() || joined.is_some_and(|joined| joined != inner.crowds) {
            return Poll::Ready(());
        }
        if joined.replace(inner.crowds).is_none() {
            inner.crowd.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Reports `receipt` to `completion` once the outbox has drained to half its mark, or the session has ended.
    pub fn when_drained(&self, completion: Arc<dyn Completion>, token: u64, receipt: Receipt) {
        {
            let mut inner = self.inner.lock();
            if !self.is_parked() && inner.close.is_none() && !self.is_low(&inner) {
                inner.waiting.push(Waiting { completion, token, receipt });
                return;
            }
        }
        completion.complete(token, Ok(receipt));
    }

    /// Takes all there is. Pending until there is something.
    ///
    /// At most `deliveries_max` messages are taken at a time, so that one busy session cannot hold its worker. With 0 only outcomes and orders to
    /// close are taken, and waited for.
    pub fn poll_drain(&self, cx: &mut Context<'_>, into: &mut Drained, deliveries_max: usize) -> Poll<()> {
        let mut inner = self.inner.lock();
        self.take(&mut inner, into, deliveries_max);
        inner.only_outcomes = deliveries_max == 0;
        into.slow_since = inner.slow_since;
        let got = !into.deliveries.is_empty() || !into.completions.is_empty() || into.close.is_some();
        if !got && !inner.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            inner.waker = Some(cx.waker().clone());
        }
        let wanted = self.wanted(&mut inner);
        let released = self.release(&mut inner);
        drop(inner);
        released.tell();
        self.load(wanted);
        if got { Poll::Ready(()) } else { Poll::Pending }
    }

    /// The same as an async call.
    ///
    /// # Cancel safety
    /// Nothing is taken unless it completes.
    pub async fn drain(&self, into: &mut Drained, deliveries_max: usize) {
        std::future::poll_fn(|cx| self.poll_drain(cx, into, deliveries_max)).await;
    }

    /// Wakes the task that drains it although nothing was put in: for a task that waits for more than its outbox.
    pub fn wake(&self) {
        let waker = self.inner.lock().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Gives back memory that a burst has taken.
    pub fn shrink(&self) {
        let mut inner = self.inner.lock();
        if inner.queue.is_empty() {
            inner.queue = VecDeque::new();
        }
        if inner.completions.is_empty() {
            inner.completions = Vec::new();
        }
    }

    /// Since when the reader has been too slow, if it is; its task ends such a session after a grace. Too slow is to take nothing while above the
    /// mark, or, while publishers wait, not to come down to half of it.
    pub fn slow_since(&self) -> Option<Instant> {
        self.inner.lock().slow_since
    }

    /// Leaves the outbox without a reader: queued `QoS` 0 goes, waiting publishers are released.
    pub fn park(&self) {
        let mut inner = self.inner.lock();
        self.is_parked.store(true, Ordering::Relaxed);
        inner.waker = None;
        inner.close = None;
        inner.slow_since = None;
        // What is stored is read again when somebody comes for it.
        inner.queue.retain(|d| d.qos != Qos::AtMostOnce && d.ticket.is_none());
        inner.bytes = inner.queue.iter().map(|d| d.message.cost_bytes()).sum();
        self.report(&mut inner);
        self.depth.store(inner.queue.len(), Ordering::Relaxed);
        let released = Released::all(&mut inner);
        drop(inner);
        released.tell();
    }

    /// Nobody drains it any more, nor will: it takes nothing, and waiting publishers are released. Gives what was in it.
    pub fn end(&self) -> VecDeque<Delivery> {
        let mut inner = self.inner.lock();
        inner.close.get_or_insert(CloseReason::Administrative);
        inner.waker = None;
        let left = std::mem::take(&mut inner.queue);
        inner.bytes = 0;
        self.report(&mut inner);
        self.depth.store(0, Ordering::Relaxed);
        let released = Released::all(&mut inner);
        drop(inner);
        released.tell();
        left
    }

    /// A connection has come back for the session.
    pub fn unpark(&self) {
        let mut inner = self.inner.lock();
        self.is_parked.store(false, Ordering::Relaxed);
        inner.completions.clear();
    }

    fn take(&self, inner: &mut Inner, into: &mut Drained, deliveries_max: usize) {
        if into.deliveries.is_empty() && inner.queue.len() <= deliveries_max {
            std::mem::swap(&mut inner.queue, &mut into.deliveries);
            inner.bytes = 0;
        } else {
            let count = deliveries_max.min(inner.queue.len());
            for delivery in inner.queue.drain(..count) {
                inner.bytes = inner.bytes.saturating_sub(delivery.message.cost_bytes());
                into.deliveries.push_back(delivery);
            }
        }
        self.report(inner);
        into.completions.append(&mut inner.completions);
        into.close = into.close.take().or(inner.close);
        let before = self.depth.swap(inner.queue.len(), Ordering::Relaxed);
        let moves = inner.queue.len() < before && inner.waiting.is_empty();
        if moves || self.is_low(inner) {
            inner.slow_since = None;
        }
    }

    fn is_total_above(&self, factor: usize) -> bool {
        self.total.as_ref().is_some_and(|total| total.is_above(factor))
    }

    fn report(&self, inner: &mut Inner) {
        if let Some(total) = &self.total {
            total.report(&mut inner.reported, inner.bytes);
        }
    }

    fn is_low(&self, inner: &Inner) -> bool {
        inner.queue.len() <= self.limits.messages_max / 2 && inner.bytes <= self.limits.bytes_max / 2
    }

    /// Whether publishers wait for it to come down; the time begins when it is first asked for.
    fn has_patience(&self, inner: &mut Inner, now: Instant) -> bool {
        now < *inner.crowded_since.get_or_insert(now) + self.limits.crowded_wait
    }

    /// Who waited for what it has come down to.
    fn release(&self, inner: &mut Inner) -> Released {
        let quarter = inner.queue.len() <= self.limits.messages_max / 4 && inner.bytes <= self.limits.bytes_max / 4;
        let mut released = Released::default();
        if inner.crowded_since.is_some() && quarter {
            released.crowd = disperse(inner);
        }
        if !inner.waiting.is_empty() && self.is_low(inner) {
            released.waiting = std::mem::take(&mut inner.waiting);
        }
        released
    }
}

/// The queue of a persistent session; without effect for others.
impl Outbox {
    /// The packet identifier of the next stored message; None when the client has left too many unanswered, or the session has no queue.
    pub fn reserve(&self) -> Option<NonZeroU16> {
        self.inner.lock().stored.as_mut()?.reserve()
    }

    /// Takes a stored message: into memory if there is room and nothing before it waits on disk. Gives the positions of messages that it had to drop.
    pub fn push_stored(&self, delivery: Delivery) -> Vec<u64> {
        let Some(ticket) = delivery.ticket else { return Vec::new() };
        let cost = delivery.message.cost_bytes();
        let mut inner = self.inner.lock();
        let fits = inner.queue.len() < self.limits.messages_max
            && inner.bytes.saturating_add(cost) <= self.limits.bytes_max
            && !self.is_total_above(1);
        // A `QoS` 2 message is read after its commit: a message that its publisher repeats because of a crash must not reach anybody twice.
        let open = fits && !self.is_parked() && inner.close.is_none() && delivery.qos != Qos::ExactlyOnce;
        let Some(stored) = &mut inner.stored else { return Vec::new() };
        let in_memory = open && !stored.is_behind();
        let Delivery { qos, retain, .. } = delivery;
        let terms = delivery.terms.clone();
        let dropped = stored.push(Entering { ticket, cost_bytes: cost, qos, retain, terms }, in_memory);
        inner.dropped = inner.dropped.saturating_add(dropped.len() as u64);
        if in_memory {
            inner.queue.push_back(delivery);
            inner.bytes = inner.bytes.saturating_add(cost);
            self.report(&mut inner);
            self.depth.store(inner.queue.len(), Ordering::Relaxed);
        }
        let waker = inner.waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
        dropped
    }

    /// Takes back a message that an earlier run had stored, in the order of the positions.
    pub fn restore(&self, entering: Entering, cursor: &Cursor) {
        if let Some(stored) = &mut self.inner.lock().stored {
            stored.restore(entering, cursor);
        }
    }

    /// What [`Store::load`] has read: position and message, None if it is not there any more. Returns how many are missing.
    pub fn loaded(&self, read: Vec<(u64, Option<Arc<Message>>)>) -> usize {
        let mut inner = self.inner.lock();
        let Inner { stored: Some(stored), queue, bytes, .. } = &mut *inner else { return 0 };
        let mut missing = 0;
        for (position, message) in read {
            let Some(message) = message else {
                missing += usize::from(stored.missing(position));
                continue;
            };
            let Some(leaving) = stored.loaded(position) else { continue };
            *bytes = bytes.saturating_add(message.cost_bytes());
            queue.push_back(Delivery {
                message,
                qos: leaving.qos,
                retain: leaving.retain,
                terms: leaving.terms,
                ticket: Some(leaving.ticket),
                repeated: leaving.repeated,
            });
        }
        stored.reading_over();
        inner.dropped = inner.dropped.saturating_add(missing as u64);
        self.report(&mut inner);
        self.depth.store(inner.queue.len(), Ordering::Relaxed);
        let waker = inner.waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
        missing
    }

    /// The client has taken a stored message, or cannot be given it. True the first time.
    pub fn done(&self, ticket: Ticket) -> bool {
        self.inner.lock().stored.as_mut().is_some_and(|stored| stored.done(ticket))
    }

    /// The client has received a `QoS` 2 message.
    pub fn received(&self, ticket: Ticket) {
        if let Some(stored) = &mut self.inner.lock().stored {
            stored.received(ticket);
        }
    }

    /// The client has completed a `QoS` 2 handshake. Gives the message's position.
    pub fn completed(&self, id: u16) -> Option<u64> {
        self.inner.lock().stored.as_mut()?.completed(id)
    }

    /// As [`park`](Outbox::park), and notes which messages the client has and has not answered, in the order of sending.
    pub fn park_sent(&self, sent: impl IntoIterator<Item = u16>) {
        self.park();
        if let Some(stored) = &mut self.inner.lock().stored {
            stored.park(sent);
            stored.shrink();
        }
    }

    /// `QoS` 2 messages that the client has received and not completed, in order.
    pub fn received_ids(&self) -> Vec<u16> {
        self.inner.lock().stored.as_ref().map(|stored| stored.received_ids()).unwrap_or_default()
    }

    /// To be called after a change; true when nobody knows of it who will ask for [`changed_cursor`](Outbox::changed_cursor).
    pub fn note(&self) -> bool {
        self.persistent.as_ref().is_some_and(|persistent| !persistent.noted.swap(true, Ordering::AcqRel))
    }

    /// What is done, if that has changed since it was asked for.
    pub fn changed_cursor(&self) -> Option<Cursor> {
        if let Some(persistent) = &self.persistent {
            persistent.noted.store(false, Ordering::Release);
        }
        let mut inner = self.inner.lock();
        let stored = inner.stored.as_mut()?;
        stored.take_changed().then(|| stored.cursor())
    }

    /// Stored messages that the client has not taken, and their bytes.
    pub fn stored_counts(&self) -> (usize, u64) {
        self.inner.lock().stored.as_ref().map(|stored| stored.counts()).unwrap_or_default()
    }

    /// Ends the queue of a session without connection; gives what was not done.
    pub fn clear_stored(&self) -> Vec<Left> {
        self.inner.lock().stored.as_mut().map(|stored| stored.clear()).unwrap_or_default()
    }

    /// The names of what is to be read next, when there is room for it.
    fn wanted(&self, inner: &mut Inner) -> Vec<u64> {
        if self.is_parked() || inner.close.is_some() || !self.is_low(inner) {
            return Vec::new();
        }
        let stored = inner.stored.as_mut();
        let bytes_max = (self.limits.bytes_max / 2).max(1);
        stored
            .map(|stored| stored.take_waiting((self.limits.messages_max / 2).clamp(1, READ_MAX), bytes_max))
            .unwrap_or_default()
    }

    fn load(&self, positions: Vec<u64>) {
        if let (false, Some(persistent)) = (positions.is_empty(), &self.persistent)
            && let Some(itself) = persistent.itself.upgrade()
        {
            persistent.store.load(positions, itself);
        }
    }
}

/// Messages read at a time.
const READ_MAX: usize = 128;

impl Completion for Outbox {
    fn complete(&self, token: u64, outcome: Result<Receipt, Reject>) {
        let mut inner = self.inner.lock();
        if self.is_parked() {
            return;
        }
        inner.completions.push((token, outcome));
        let waker = inner.waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        if let Some(total) = &self.total {
            total.report(&mut self.inner.get_mut().reported, 0);
        }
    }
}

impl Control for Outbox {
    fn close(&self, reason: CloseReason) {
        let mut inner = self.inner.lock();
        inner.close.get_or_insert(reason);
        let waker = inner.waker.take();
        let released = Released::all(&mut inner);
        drop(inner);
        released.tell();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests;
