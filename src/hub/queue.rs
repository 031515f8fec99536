//! One persistent session's `QoS` 1 and 2 messages, from storing to acknowledgement: their names, not the messages.
//!
//! A message is stored under a position that is the same for all its sessions, and has in each a packet identifier of its own, given when it enters the
//! queue: what is sent again, over a new connection or after a crash, has the identifier under which the client may know it (`[MQTT-4.4.0-1]`).
//!
//! In the order of the queue: what the client has and has not answered, what is in memory on its way to it, and what waits on disk. 16 bytes a message.

use std::collections::VecDeque;
use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::outbox::View;
use super::tree::Filter;
use crate::message::Qos;

/// A stored message's position and its packet identifier in one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(NonZeroU64);

impl Ticket {
    /// `position` has at most 48 bits.
    pub fn new(position: u64, id: NonZeroU16) -> Self {
        Ticket(NonZeroU64::from(id) | (position << 16))
    }

    pub fn position(self) -> u64 {
        self.0.get() >> 16
    }

    /// The packet identifier.
    pub fn id(self) -> u16 {
        self.0.get() as u16
    }
}

/// How one subscriber sees its messages: the same for nearly all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// The subscriber's own mark, as given with the subscription (a `CoAP` observer, for instance).
    pub tag: u64,
    /// How the topic is to be shown: see [`View`].
    pub view: View,
    /// MQTT 5 Subscription Identifiers of all subscriptions that matched.
    pub identifiers: Option<Arc<[u32]>>,
    /// The shared subscription by which it came: another member may have it instead.
    pub shared: Option<Arc<Filter>>,
}

/// Bounds of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    pub messages_max: usize,
    pub bytes_max: u64,
}

/// A message that enters a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entering {
    pub ticket: Ticket,
    pub cost_bytes: usize,
    pub qos: Qos,
    pub retain: bool,
    pub terms: Terms,
}

/// What of a delivery is not the message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    pub ticket: Ticket,
    pub qos: Qos,
    pub retain: bool,
    pub terms: Terms,
    /// The client may have it.
    pub repeated: bool,
}

/// A message that a session has left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub position: u64,
    /// The shared subscription another member of which is to have it.
    pub shared: Option<Arc<Filter>>,
}

/// Which messages of a queue are done, as it is written to disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cursor {
    /// All before this position.
    pub before: u64,
    /// And those from the first to the last position of each.
    pub beyond: Vec<(u64, u64)>,
    /// What is before this position may have been sent.
    pub sent: u64,
    /// `QoS` 2 messages that the client has received and not completed.
    pub received: Vec<u64>,
    /// So many of the first may have been sent, too: the gateway was killed while the client was connected.
    #[serde(skip)]
    pub unsure: usize,
}

impl Cursor {
    /// Whether the message at `position` is done.
    pub fn is_done(&self, position: u64) -> bool {
        position < self.before || self.beyond.iter().any(|(first, last)| (*first..=*last).contains(&position))
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct SessionQueue {
    limits: QueueLimits,
    /// By position.
    entries: VecDeque<Entry>,
    /// Entries that left at the front, so that the place of an entry does not change while others leave.
    gone: u64,
    /// The place of the first entry that may wait on disk.
    first_waiting: u64,
    waiting: usize,
    loading: bool,
    /// Of what is not done.
    bytes: u64,
    live: usize,
    next_id: NonZeroU16,
    terms: Vec<Terms>,
    /// Behind the last entry that left.
    done_before: u64,
    changed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    ticket: Ticket,
    cost_bytes: u32,
    terms: u16,
    qos: Qos,
    flags: Flags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flags(u8);

const STATE: u8 = 0b0000_0111;
const RETAIN: u8 = 0b0000_1000;
const REPEATED: u8 = 0b0001_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On disk only.
    Waiting = 0,
    /// Asked for.
    Loading = 1,
    /// In memory: in the outbox, with the session's task, or with the client.
    Out = 2,
    /// `QoS` 2: the client has it and has to complete the handshake.
    Received = 3,
    Done = 4,
}

impl Flags {
    fn state(self) -> State {
        match self.0 & STATE {
            0 => State::Waiting,
            1 => State::Loading,
            2 => State::Out,
            3 => State::Received,
            _ => State::Done,
        }
    }

    fn set(&mut self, state: State) {
        self.0 = (self.0 & !STATE) | state as u8;
    }
}

/// Entries beyond the bound that a client can cause by never answering the oldest while it answers others.
const SPAN_FACTOR: usize = 2;
const SPAN_MIN: usize = 1024;
/// Identifiers are 16 bits wide, and some are to be free.
const SPAN_MAX: usize = 60_000;
/// Kinds of terms kept before unused ones are thrown out.
const TERMS_KEPT: usize = 64;

impl SessionQueue {
    pub fn new(limits: QueueLimits) -> Self {
        SessionQueue {
            limits,
            entries: VecDeque::new(),
            gone: 0,
            first_waiting: 0,
            waiting: 0,
            loading: false,
            bytes: 0,
            live: 0,
            next_id: NonZeroU16::MIN,
            terms: Vec::new(),
            done_before: 0,
            changed: false,
        }
    }

    /// Messages that are not done, and their bytes.
    pub fn counts(&self) -> (usize, u64) {
        (self.live, self.bytes)
    }

    /// Whether something waits on disk or is being read: whatever comes now is behind it.
    pub fn is_behind(&self) -> bool {
        self.waiting > 0 || self.loading
    }

    /// The packet identifier of the next message; None when the client has left too many unanswered.
    pub fn reserve(&mut self) -> Option<NonZeroU16> {
        let span_max = self.limits.messages_max.saturating_mul(SPAN_FACTOR).clamp(SPAN_MIN, SPAN_MAX);
        if self.entries.len() >= span_max {
            return None;
        }
        let mut id = self.next_id;
        if let (Some(front), Some(back)) = (self.entries.front(), self.entries.back()) {
            // Identifiers ascend round the corner, so only one between the first and the last can be taken.
            let from = |id: u16| id.wrapping_sub(front.ticket.id());
            if from(id.get()) <= from(back.ticket.id()) {
                while self.entries.iter().any(|entry| entry.ticket.id() == id.get()) {
                    id = next(id);
                }
            }
        }
        self.next_id = next(id);
        Some(id)
    }

    /// Puts a message at the end. Gives the positions of the oldest messages on disk that had to make room.
    pub fn push(&mut self, entering: Entering, in_memory: bool) -> Vec<u64> {
        let cost = u32::try_from(entering.cost_bytes).unwrap_or(u32::MAX);
        let mut dropped = Vec::new();
        while self.live >= self.limits.messages_max || self.bytes + u64::from(cost) > self.limits.bytes_max {
            let Some(position) = self.drop_oldest() else { break };
            dropped.push(position);
        }
        let state = if in_memory { State::Out } else { State::Waiting };
        self.insert(entering, cost, state, false);
        dropped
    }

    /// Puts back a message that an earlier run had stored, in the order of the positions.
    pub fn restore(&mut self, entering: Entering, cursor: &Cursor) {
        let position = entering.ticket.position();
        let cost = u32::try_from(entering.cost_bytes).unwrap_or(u32::MAX);
        if let Some(id) = NonZeroU16::new(entering.ticket.id()) {
            self.next_id = next(id);
        }
        let received = cursor.received.binary_search(&position).is_ok();
        let state = if received { State::Received } else { State::Waiting };
        let repeated = position < cursor.sent || self.live < cursor.unsure;
        self.insert(entering, cost, state, repeated);
    }

    fn insert(&mut self, entering: Entering, cost_bytes: u32, state: State, repeated: bool) {
        let Entering { ticket, qos, retain, terms, .. } = entering;
        let mut flags = Flags(if retain { RETAIN } else { 0 } | if repeated { REPEATED } else { 0 });
        flags.set(state);
        let terms = self.intern(terms);
        self.entries.push_back(Entry { ticket, cost_bytes, terms, qos, flags });
        self.bytes += u64::from(cost_bytes);
        self.live += 1;
        self.waiting += usize::from(state == State::Waiting);
    }

    /// Takes the names of what is to be read next; nothing while a reading is under way.
    pub fn take_waiting(&mut self, messages_max: usize, bytes_max: usize) -> Vec<u64> {
        if self.loading || self.waiting == 0 {
            return Vec::new();
        }
        let (mut positions, mut bytes) = (Vec::new(), 0);
        while positions.len() < messages_max.min(self.waiting)
            && bytes < bytes_max
            && let Some(at) = self.next_waiting()
        {
            let Some(entry) = self.entries.get_mut(at) else { break };
            entry.flags.set(State::Loading);
            bytes += entry.cost_bytes as usize;
            positions.push(entry.ticket.position());
        }
        self.waiting -= positions.len();
        self.loading = !positions.is_empty();
        positions
    }

    /// The message at `position` was read. None when nobody waits for it any more.
    pub fn loaded(&mut self, position: u64) -> Option<Leaving> {
        let at = self.find(position)?;
        let entry = self.entries.get_mut(at).filter(|entry| entry.flags.state() == State::Loading)?;
        entry.flags.set(State::Out);
        let entry = *entry;
        Some(Leaving {
            ticket: entry.ticket,
            qos: entry.qos,
            retain: entry.flags.0 & RETAIN != 0,
            terms: self.terms.get(usize::from(entry.terms)).cloned().unwrap_or_default(),
            repeated: entry.flags.0 & REPEATED != 0,
        })
    }

    /// The message at `position` is not on disk any more. True if somebody waited for it.
    pub fn missing(&mut self, position: u64) -> bool {
        let at = self.find(position);
        let waited = at.and_then(|at| self.entries.get(at)).is_some_and(|e| e.flags.state() == State::Loading);
        if let (true, Some(at)) = (waited, at) {
            self.finish(at);
        }
        waited
    }

    /// A reading is over; what it did not bring waits again.
    pub fn reading_over(&mut self) {
        self.loading = false;
        self.wait_again(|state| state == State::Loading);
    }

    /// The client has taken the message, or cannot be given it. True the first time.
    pub fn done(&mut self, ticket: Ticket) -> bool {
        let at = self.find(ticket.position());
        let live = at.and_then(|at| self.entries.get(at)).is_some_and(|e| e.flags.state() != State::Done);
        if let (true, Some(at)) = (live, at) {
            self.finish(at);
        }
        live
    }

    /// As [`done`](SessionQueue::done), by the packet identifier; gives the position.
    pub fn completed(&mut self, id: u16) -> Option<u64> {
        let live = |entry: &Entry| entry.ticket.id() == id && entry.flags.state() != State::Done;
        let at = self.entries.iter().position(live)?;
        let position = self.entries.get(at)?.ticket.position();
        self.finish(at);
        Some(position)
    }

    /// The client has received a `QoS` 2 message and will complete the handshake.
    pub fn received(&mut self, ticket: Ticket) {
        if let Some(at) = self.find(ticket.position())
            && let Some(entry) = self.entries.get_mut(at).filter(|e| e.flags.state() == State::Out)
        {
            entry.flags.set(State::Received);
            self.changed = true;
        }
    }

    /// The connection is over. `sent` are the identifiers of what the client has and has not answered.
    pub fn park(&mut self, sent: impl IntoIterator<Item = u16>) {
        let mut from = 0;
        for id in sent {
            // They come in the order of the queue.
            let behind = self.entries.iter().skip(from).position(|entry| entry.ticket.id() == id);
            let Some(at) = behind.map(|at| from + at) else { continue };
            if let Some(entry) = self.entries.get_mut(at) {
                entry.flags.0 |= REPEATED;
            }
            from = at + 1;
        }
        self.loading = false;
        self.wait_again(|state| matches!(state, State::Loading | State::Out));
        self.changed = true;
    }

    /// Ends the queue of a session without connection; gives what was not done.
    pub fn clear(&mut self) -> Vec<Left> {
        let live = self.entries.iter().filter(|entry| entry.flags.state() != State::Done);
        let left = live.map(|entry| {
            // [MQTT-4.8.2-5]: what was begun at QoS 2 is nobody else's.
            let begun = entry.flags.state() == State::Received || entry.flags.0 & REPEATED != 0;
            let terms = self.terms.get(usize::from(entry.terms)).filter(|_| entry.qos != Qos::ExactlyOnce || !begun);
            Left { position: entry.ticket.position(), shared: terms.and_then(|terms| terms.shared.clone()) }
        });
        let left = left.collect();
        *self = SessionQueue { next_id: self.next_id, ..SessionQueue::new(self.limits) };
        left
    }

    /// The identifiers of `QoS` 2 messages that the client has received and not completed, in order.
    pub fn received_ids(&self) -> Vec<u16> {
        let received = self.entries.iter().filter(|entry| entry.flags.state() == State::Received);
        received.map(|entry| entry.ticket.id()).collect()
    }

    /// Whether the [`cursor`](SessionQueue::cursor) has changed since it was asked for.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    pub fn cursor(&self) -> Cursor {
        let before = self.entries.front().map_or(self.done_before, |entry| entry.ticket.position());
        let mut cursor = Cursor { before, sent: before, ..Cursor::default() };
        let mut last_was_done = false;
        for entry in &self.entries {
            let (position, state) = (entry.ticket.position(), entry.flags.state());
            match (state, cursor.beyond.last_mut()) {
                (State::Done, Some((_, last))) if last_was_done => *last = position,
                (State::Done, _) => cursor.beyond.push((position, position)),
                (State::Received, _) => cursor.received.push(position),
                (State::Waiting | State::Loading | State::Out, _) => {}
            }
            last_was_done = state == State::Done;
            let sent = matches!(state, State::Out | State::Received) || entry.flags.0 & REPEATED != 0;
            if sent {
                cursor.sent = position + 1;
            }
        }
        cursor
    }

    /// Gives back memory that a burst has taken.
    pub fn shrink(&mut self) {
        self.entries.shrink_to(self.entries.len());
    }

    fn find(&self, position: u64) -> Option<usize> {
        self.entries.binary_search_by_key(&position, |entry| entry.ticket.position()).ok()
    }

    fn finish(&mut self, at: usize) {
        let Some(entry) = self.entries.get_mut(at) else { return };
        self.waiting -= usize::from(entry.flags.state() == State::Waiting);
        entry.flags.set(State::Done);
        self.bytes -= u64::from(entry.cost_bytes);
        self.live -= 1;
        self.changed = true;
        while let Some(entry) = self.entries.pop_front_if(|entry| entry.flags.state() == State::Done) {
            self.gone += 1;
            self.done_before = entry.ticket.position() + 1;
        }
    }

    /// The index of the first entry that waits on disk.
    fn next_waiting(&mut self) -> Option<usize> {
        let from = usize::try_from(self.first_waiting.saturating_sub(self.gone)).unwrap_or(0);
        let behind = self.entries.iter().skip(from).position(|entry| entry.flags.state() == State::Waiting)?;
        self.first_waiting = self.gone + (from + behind) as u64;
        Some(from + behind)
    }

    fn drop_oldest(&mut self) -> Option<u64> {
        let at = self.next_waiting()?;
        let position = self.entries.get(at)?.ticket.position();
        self.finish(at);
        Some(position)
    }

    fn wait_again(&mut self, which: impl Fn(State) -> bool) {
        let mut first = None;
        for (at, entry) in self.entries.iter_mut().enumerate() {
            if which(entry.flags.state()) {
                entry.flags.set(State::Waiting);
                self.waiting += 1;
                first = first.or(Some(at));
            }
        }
        if let Some(first) = first {
            self.first_waiting = self.first_waiting.min(self.gone + first as u64);
        }
    }

    fn intern(&mut self, terms: Terms) -> u16 {
        if let Some(at) = self.terms.iter().position(|known| *known == terms) {
            return at as u16;
        }
        if self.terms.len() >= TERMS_KEPT.max(self.entries.len()) {
            self.forget_unused_terms();
        }
        self.terms.push(terms);
        // There are at most as many as entries, and some.
        (self.terms.len() - 1) as u16
    }

    fn forget_unused_terms(&mut self) {
        let mut renamed: Vec<Option<u16>> = vec![None; self.terms.len()];
        let mut kept = Vec::new();
        for entry in &mut self.entries {
            let Some(new) = renamed.get_mut(usize::from(entry.terms)) else { continue };
            entry.terms = *new.get_or_insert_with(|| {
                kept.push(self.terms.get(usize::from(entry.terms)).cloned().unwrap_or_default());
                (kept.len() - 1) as u16
            });
        }
        self.terms = kept;
    }
}

fn next(id: NonZeroU16) -> NonZeroU16 {
    id.checked_add(1).unwrap_or(NonZeroU16::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: QueueLimits = QueueLimits { messages_max: 5, bytes_max: 1000 };

    fn entering(position: u64, id: u16) -> Entering {
        let ticket = Ticket::new(position, NonZeroU16::new(id).unwrap());
        Entering { ticket, cost_bytes: 10, qos: Qos::AtLeastOnce, retain: false, terms: Terms::default() }
    }

    /// Pushes under the next identifier.
    fn push(queue: &mut SessionQueue, position: u64, in_memory: bool) -> (Ticket, Vec<u64>) {
        let id = queue.reserve().unwrap();
        let ticket = Ticket::new(position, id);
        (ticket, queue.push(Entering { ticket, ..entering(0, 1) }, in_memory))
    }

    fn read(queue: &mut SessionQueue, messages_max: usize) -> Vec<Leaving> {
        let positions = queue.take_waiting(messages_max, usize::MAX);
        let read = positions.into_iter().filter_map(|position| queue.loaded(position)).collect();
        queue.reading_over();
        read
    }

    #[test]
    fn an_entry_is_sixteen_bytes() {
        assert_eq!(size_of::<Entry>(), 16);
        let ticket = Ticket::new((1 << 48) - 1, NonZeroU16::MAX);
        assert_eq!((ticket.position(), ticket.id()), ((1 << 48) - 1, 65_535));
    }

    #[test]
    fn what_was_sent_comes_again_first_under_its_identifier() {
        let mut queue = SessionQueue::new(LIMITS);
        let tickets: Vec<Ticket> = (10..14).map(|position| push(&mut queue, position, true).0).collect();
        assert!(queue.done(tickets[1]) && !queue.done(tickets[1]));
        // The client has the first and the third; the fourth was not sent.
        queue.park([1, 3]);
        assert_eq!(push(&mut queue, 14, false).0.id(), 5);
        let again = read(&mut queue, 100);
        let seen: Vec<(u64, u16, bool)> =
            again.iter().map(|l| (l.ticket.position(), l.ticket.id(), l.repeated)).collect();
        assert_eq!(seen, [(10, 1, true), (12, 3, true), (13, 4, false), (14, 5, false)]);
    }

    #[test]
    fn while_something_waits_on_disk_it_is_behind_and_reads_in_order() {
        let mut queue = SessionQueue::new(LIMITS);
        push(&mut queue, 1, true);
        assert!(!queue.is_behind());
        for position in 2..5 {
            push(&mut queue, position, false);
        }
        assert!(queue.is_behind());
        assert_eq!(queue.take_waiting(2, usize::MAX), [2, 3]);
        assert!(queue.take_waiting(2, usize::MAX).is_empty());
        assert!(queue.loaded(2).is_some());
        // The reading brought one only, and the other is gone from the disk meanwhile.
        queue.reading_over();
        assert_eq!(queue.take_waiting(1, usize::MAX), [3]);
        assert!(queue.missing(3) && !queue.missing(3));
        queue.reading_over();
        assert_eq!(read(&mut queue, 9).len(), 1);
        assert!(!queue.is_behind());
        assert_eq!(queue.counts(), (3, 30));
    }

    #[test]
    fn at_its_bound_the_oldest_on_disk_makes_room_and_what_is_under_way_does_not() {
        let mut queue = SessionQueue::new(LIMITS);
        push(&mut queue, 1, true);
        for position in 2..6 {
            push(&mut queue, position, false);
        }
        assert_eq!(push(&mut queue, 6, false).1, [2]);
        assert_eq!(push(&mut queue, 7, false).1, [3]);
        assert_eq!(read(&mut queue, 9).iter().map(|l| l.ticket.position()).collect::<Vec<_>>(), [4, 5, 6, 7]);
        let mut large = entering(8, 8);
        large.cost_bytes = 970;
        assert!(queue.push(large, false).is_empty());
        assert_eq!(push(&mut queue, 9, false).1, [8]);
    }

    #[test]
    fn identifiers_go_round_past_those_that_are_taken() {
        let mut queue = SessionQueue::new(QueueLimits { messages_max: 60_000, bytes_max: 1 << 40 });
        let first = push(&mut queue, 0, true).0;
        let second = push(&mut queue, 1, true).0;
        let mut position = 2;
        for _ in 2..65_535 {
            let ticket = push(&mut queue, position, true).0;
            queue.done(ticket);
            position += 1;
            if position % 1000 == 0 {
                // A client that answers all but two: done entries stay until the two are.
                queue.done(first);
                let again = queue.reserve();
                assert!(again.is_some());
                break;
            }
        }
        queue.done(second);
        let mut queue = SessionQueue::new(LIMITS);
        queue.restore(entering(5, 65_535), &Cursor::default());
        queue.restore(entering(6, 1), &Cursor::default());
        queue.next_id = NonZeroU16::MAX;
        assert_eq!(queue.reserve().unwrap().get(), 2);
    }

    #[test]
    fn a_client_that_never_answers_the_oldest_is_given_no_more_at_some_point() {
        let mut queue = SessionQueue::new(LIMITS);
        push(&mut queue, 0, true);
        let mut position = 1;
        while let Some(id) = queue.reserve() {
            let ticket = Ticket::new(position, id);
            queue.push(Entering { ticket, ..entering(0, 1) }, true);
            queue.done(ticket);
            position += 1;
        }
        assert_eq!(position as usize, SPAN_MIN);
    }

    #[test]
    fn terms_are_kept_once_and_forgotten_when_unused() {
        let mut queue = SessionQueue::new(QueueLimits { messages_max: 3, bytes_max: 1 << 20 });
        for n in 0..1000_u32 {
            let id = queue.reserve().unwrap();
            let terms = Terms { identifiers: Some([n].into()), ..Terms::default() };
            queue.push(Entering { ticket: Ticket::new(n.into(), id), terms, ..entering(0, 1) }, false);
        }
        assert!(queue.terms.len() <= TERMS_KEPT + 1, "{}", queue.terms.len());
        let left: Vec<u32> = read(&mut queue, 9).into_iter().filter_map(|l| Some(l.terms.identifiers?[0])).collect();
        assert_eq!(left, [997, 998, 999]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(bool),
        Read(usize),
        Done(usize),
        Received(usize),
        Park,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => any::<bool>().prop_map(Step::Push),
            2 => (1_usize..4).prop_map(Step::Read),
            3 => (0_usize..6).prop_map(Step::Done),
            1 => (0_usize..6).prop_map(Step::Received),
            1 => Just(Step::Park),
        ]
    }

    proptest! {
        #[test]
        fn after_a_crash_the_queue_is_what_the_cursor_left(steps in prop::collection::vec(step(), 1..80)) {
            let mut queue = SessionQueue::new(QueueLimits { messages_max: 1000, bytes_max: 1 << 20 });
            // (entry, in memory, received)
            let mut model: Vec<(Ticket, bool, bool)> = Vec::new();
            let mut stored: Vec<Ticket> = Vec::new();
            let mut position = 0;
            for step in steps {
                match step {
                    Step::Push(wanted) => {
                        position += 3;
                        let in_memory = wanted && !queue.is_behind();
                        let (ticket, dropped) = push(&mut queue, position, in_memory);
                        prop_assert!(dropped.is_empty());
                        model.push((ticket, in_memory, false));
                        stored.push(ticket);
                    }
                    Step::Read(count) => {
                        let waiting: Vec<Ticket> = model.iter().filter(|m| !m.1 && !m.2).map(|m| m.0).take(count).collect();
                        let got: Vec<Ticket> = read(&mut queue, count).iter().map(|l| l.ticket).collect();
                        prop_assert_eq!(&got, &waiting);
                        model.iter_mut().filter(|m| got.contains(&m.0)).for_each(|m| m.1 = true);
                    }
                    Step::Done(at) => {
                        if let Some(at) = model.iter().enumerate().filter(|(_, m)| m.1 || m.2).map(|(at, _)| at).nth(at) {
                            prop_assert!(queue.done(model.remove(at).0));
                        }
                    }
                    Step::Received(at) => {
                        if let Some(m) = model.iter_mut().filter(|m| m.1).nth(at) {
                            queue.received(m.0);
                            (m.1, m.2) = (false, true);
                        }
                    }
                    Step::Park => {
                        queue.park(model.iter().filter(|m| m.1).map(|m| m.0.id()));
                        model.iter_mut().for_each(|m| m.1 = false);
                    }
                }
                prop_assert_eq!(queue.counts().0, model.len());
                let cursor = queue.cursor();
                let left: Vec<Ticket> = stored.iter().copied().filter(|t| !cursor.is_done(t.position())).collect();
                prop_assert_eq!(&left, &model.iter().map(|m| m.0).collect::<Vec<_>>());
                let mut restored = SessionQueue::new(LIMITS);
                for ticket in &left {
                    restored.restore(Entering { ticket: *ticket, ..entering(0, 1) }, &cursor);
                }
                prop_assert_eq!(restored.received_ids(), model.iter().filter(|m| m.2).map(|m| m.0.id()).collect::<Vec<_>>());
                let again = read(&mut restored, 1000);
                let expected: Vec<Ticket> = model.iter().filter(|m| !m.2).map(|m| m.0).collect();
                prop_assert_eq!(again.iter().map(|l| l.ticket).collect::<Vec<_>>(), expected);
                for (leaving, (_, in_memory, _)) in again.iter().zip(model.iter().filter(|m| !m.2)) {
                    prop_assert!(!in_memory || leaving.repeated);
                }
            }
        }
    }
}
