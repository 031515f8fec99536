//! What goes out: the batch for the socket, and confirmable messages of our own that wait for their acknowledgement (RFC 7252 section 4.2).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::client::CallId;
use crate::endpoint::ObserverId;
use crate::peer::{MessageKey, PeerKey, Secret};
use crate::slots::{Slot, Slots};

/// Datagrams to send, one after the other in one buffer, so that a driver can hand all of them to the kernel in one call. Reused: sending
/// allocates nothing once the buffers have grown.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    datagrams: Vec<(SocketAddr, u32)>,
}

impl Batch {
    pub fn new() -> Self {
        Batch::default()
    }

    pub fn len(&self) -> usize {
        self.datagrams.len()
    }

    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// The datagrams in order.
    pub fn iter(&self) -> impl Iterator<Item = (SocketAddr, &[u8])> {
        let mut at = 0;
        self.datagrams.iter().map(move |(peer, end)| {
            let start = std::mem::replace(&mut at, *end as usize);
            (*peer, self.bytes.get(start..*end as usize).unwrap_or_default())
        })
    }

    pub fn get(&self, index: usize) -> Option<(SocketAddr, &[u8])> {
        let (peer, end) = *self.datagrams.get(index)?;
        let start = match index.checked_sub(1) {
            Some(before) => self.datagrams.get(before)?.1,
            None => 0,
        };
        Some((peer, self.bytes.get(start as usize..end as usize)?))
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.datagrams.clear();
    }

    /// Where the next datagram is written; [`Batch::close`] or [`Batch::abandon`] must follow.
    pub(crate) fn open(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    pub(crate) fn close(&mut self, peer: SocketAddr) -> &[u8] {
        let start = self.start();
        self.datagrams.push((peer, self.bytes.len() as u32));
        self.bytes.get(start..).unwrap_or_default()
    }

    pub(crate) fn abandon(&mut self) {
        let start = self.start();
        self.bytes.truncate(start);
    }

    /// Bytes written since the last datagram ended.
    pub(crate) fn open_bytes(&self) -> usize {
        self.bytes.len() - self.start()
    }

    pub(crate) fn push(&mut self, peer: SocketAddr, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.close(peer);
    }

    fn start(&self) -> usize {
        self.datagrams.last().map_or(0, |(_, end)| *end as usize)
    }
}

/// What a confirmable message is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    Answer,
    Notification(ObserverId),
    Call(CallId),
}

#[derive(Debug)]
pub(crate) struct Sent {
    pub peer: SocketAddr,
    pub key: MessageKey,
    pub bytes: Vec<u8>,
    pub purpose: Purpose,
    retransmissions: u8,
    timeout: Duration,
    due: Instant,
}

/// Confirmable messages in flight. Notifications of one peer wait for each other (NSTART, section 4.7); answers do not, their asker paces them.
#[derive(Debug)]
pub(crate) struct Outgoing {
    rows: Slots<Sent>,
    by_key: HashMap<MessageKey, Slot, Secret>,
    due: BTreeSet<(Instant, Slot)>,
    loads: HashMap<PeerKey, Load, Secret>,
    ack_timeout: Duration,
    random_percent: u16,
    retransmissions_max: u8,
    nstart: usize,
}

#[derive(Debug, Default)]
struct Load {
    notifications: usize,
    waiting: VecDeque<ObserverId>,
}

/// What a due message needs.
pub(crate) enum Due {
    Retransmit(Slot),
    GivenUp(Sent),
}

impl Outgoing {
    pub fn new(
        secret: Secret,
        rows_max: usize,
        ack_timeout: Duration,
        random_percent: u16,
        retransmissions_max: u8,
        nstart: usize,
    ) -> Self {
        Outgoing {
            rows: Slots::new(rows_max),
            by_key: HashMap::with_hasher(secret.clone()),
            due: BTreeSet::new(),
            loads: HashMap::with_hasher(secret),
            ack_timeout,
            random_percent,
            retransmissions_max,
            nstart,
        }
    }

    pub fn is_full(&self) -> bool {
        self.rows.is_full()
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Notes a message that goes out now. `random` spreads the first time-out over ACK_TIMEOUT to ACK_TIMEOUT * ACK_RANDOM_FACTOR.
    pub fn insert(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        key: MessageKey,
        purpose: Purpose,
        bytes: &[u8],
        random: u64,
    ) -> Option<Slot> {
        let spread = u32::from(self.random_percent.saturating_sub(100));
        let timeout = self.ack_timeout + self.ack_timeout * (random % u64::from(spread + 1)) as u32 / 100;
        let due = now + timeout;
        let sent = Sent { peer, key, bytes: bytes.to_vec(), purpose, retransmissions: 0, timeout, due };
        let slot = self.rows.insert(sent)?;
        self.by_key.insert(key, slot);
        self.due.insert((due, slot));
        if let Purpose::Notification(_) = purpose {
            self.loads.entry(PeerKey::new(peer)).or_default().notifications += 1;
        }
        Some(slot)
    }

    /// Whether a notification to this peer would exceed NSTART.
    pub fn is_busy(&self, peer: PeerKey) -> bool {
        self.loads.get(&peer).is_some_and(|load| load.notifications >= self.nstart)
    }

    /// Lets an observer wait for its peer's turn. Bounded by the number of observers: each waits once.
    pub fn wait(&mut self, peer: PeerKey, observer: ObserverId) {
        let waiting = &mut self.loads.entry(peer).or_default().waiting;
        if !waiting.contains(&observer) {
            waiting.push_back(observer);
        }
    }

    /// The observer whose turn it is.
    pub fn next_waiting(&mut self, peer: PeerKey) -> Option<ObserverId> {
        let load = self.loads.get_mut(&peer)?;
        let next = load.waiting.pop_front();
        if next.is_none() && load.notifications == 0 {
            self.loads.remove(&peer);
        }
        next
    }

    /// Ends the message with this id, acknowledged or reset.
    pub fn end(&mut self, key: MessageKey) -> Option<Sent> {
        let slot = *self.by_key.get(&key)?;
        self.remove(slot)
    }

    pub fn remove(&mut self, slot: Slot) -> Option<Sent> {
        let sent = self.rows.remove(slot)?;
        self.by_key.remove(&sent.key);
        self.due.remove(&(sent.due, slot));
        if let Purpose::Notification(_) = sent.purpose
            && let Some(load) = self.loads.get_mut(&PeerKey::new(sent.peer))
        {
            load.notifications = load.notifications.saturating_sub(1);
        }
        Some(sent)
    }

    pub fn get(&self, slot: Slot) -> Option<&Sent> {
        self.rows.get(slot)
    }

    pub fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// Takes one message that is due, with its time-out doubled, or given up after MAX_RETRANSMIT.
    pub fn take_due(&mut self, now: Instant) -> Option<Due> {
        let &(at, slot) = self.due.first().filter(|(at, _)| *at <= now)?;
        self.due.remove(&(at, slot));
        let sent = self.rows.get_mut(slot)?;
        if sent.retransmissions >= self.retransmissions_max {
            return self.remove(slot).map(Due::GivenUp);
        }
        sent.retransmissions += 1;
        sent.timeout *= 2;
        // From the instant it was due, so that a late wake-up does not stretch the schedule; never into the past.
        sent.due = (at + sent.timeout).max(now);
        self.due.insert((sent.due, slot));
        Some(Due::Retransmit(slot))
    }

    /// Puts newer content in the place of what is retransmitted, under a new message id, keeping the count (RFC 7641 section 4.5.2).
    pub fn replace(&mut self, slot: Slot, key: MessageKey, bytes: &[u8]) {
        if let Some(sent) = self.rows.get_mut(slot) {
            self.by_key.remove(&sent.key);
            sent.key = key;
            sent.bytes.clear();
            sent.bytes.extend_from_slice(bytes);
            self.by_key.insert(key, slot);
        }
    }
}
