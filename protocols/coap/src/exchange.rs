//! Deduplication: what was asked lately, and what was answered (RFC 7252 section 4.5).
//!
//! A peer that retransmits gets the same bytes again for EXCHANGE_LIFETIME, and the application does not see the request twice. A retransmission is the same
//! datagram from the same address and port: the same message id on something else is a new request. Address translators hand a port to the next device
//! long before EXCHANGE_LIFETIME is over, and that device must neither lose its request nor see what the last one was answered. Everything lives as
//! long as everything else, so the table is a ring in order of arrival: entries are overwritten in turn, the hash chains run from new to old and simply end
//! at the first entry that is too old, and nothing is ever unlinked, moved or freed. Answers lie in a second ring, of bytes. Both grow as
//! needed up to their limit and never shrink. Cost of one new exchange: one keyed hash over the datagram, 32 bytes, the answer's bytes; no allocation once grown.
//!
//! When a ring has come round before the lifetime is over, the oldest exchanges are forgotten; a retransmission of one of those is handled as new.

use crate::peer::{PeerKey, Secret};

/// A datagram from a peer, as a keyed hash of both: of 64 bits, so that two differ but once in ages, and not even then where a sender could aim at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ExchangeKey(u64);

impl ExchangeKey {
    pub fn new(secret: &Secret, peer: PeerKey, datagram: &[u8]) -> Self {
        ExchangeKey(secret.hash((peer, datagram)))
    }
}

/// Where an exchange stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// With the application; a duplicate is ignored.
    Waiting,
    /// An empty acknowledgement went out; a duplicate gets it again.
    Acknowledged,
    /// Answered, with the bytes to repeat.
    Answered,
    /// Over, and a duplicate gets nothing (NON requests, suppressed answers).
    Silent,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: ExchangeKey,
    /// Sequence number of the next older entry in the same chain; 0 ends it.
    older: u64,
    answer_at: u64,
    expires_s: u32,
    answer_bytes: u16,
    state: State,
}

/// What the table knows of a datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Seen<'e> {
    Never,
    Waiting,
    Acknowledged,
    Answered(&'e [u8]),
    Silent,
}

#[derive(Debug)]
pub(crate) struct Exchanges {
    ring: Vec<Entry>,
    /// The newest sequence number of each chain; its length is a power of two.
    heads: Vec<u64>,
    /// Sequence number of the next entry; the first is 1.
    next: u64,
    exchanges_max: usize,
    lifetime_s: u32,
    answers: ByteRing,
    /// Entries overwritten before their time.
    pub evicted: u64,
}

impl Exchanges {
    pub const ENTRY_BYTES: usize = size_of::<Entry>() + 2 * size_of::<u64>();

    pub fn new(exchanges_max: usize, bytes_max: usize, lifetime_s: u32) -> Self {
        Exchanges {
            ring: Vec::new(),
            heads: vec![0; 64],
            next: 1,
            exchanges_max: exchanges_max.max(1),
            lifetime_s,
            answers: ByteRing::new(bytes_max),
            evicted: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.ring.len()
    }

    pub fn look_up(&self, now_s: u32, key: ExchangeKey) -> Seen<'_> {
        let mut sequence = self.heads.get(self.bucket(key)).copied().unwrap_or(0);
        // Older entries follow, so the first one that is overwritten or expired ends the walk.
        while let Some(entry) = self.entry(sequence).filter(|e| e.expires_s >= now_s) {
            if entry.key == key {
                return match entry.state {
                    State::Waiting => Seen::Waiting,
                    State::Acknowledged => Seen::Acknowledged,
                    State::Silent => Seen::Silent,
                    State::Answered => {
                        self.answers.get(entry.answer_at, entry.answer_bytes).map_or(Seen::Never, Seen::Answered)
                    }
                };
            }
            sequence = entry.older;
        }
        Seen::Never
    }

    /// Notes a new exchange and returns its sequence number.
    pub fn insert(&mut self, now_s: u32, key: ExchangeKey) -> u64 {
        if self.ring.len() >= self.heads.len() && self.ring.len() < self.exchanges_max {
            self.rehash();
        }
        let bucket = self.bucket(key);
        let sequence = self.next;
        self.next += 1;
        let older = match self.heads.get_mut(bucket) {
            Some(head) => std::mem::replace(head, sequence),
            None => 0,
        };
        let expires_s = now_s.saturating_add(self.lifetime_s);
        let entry = Entry { key, older, answer_at: 0, expires_s, answer_bytes: 0, state: State::Waiting };
        if self.ring.len() < self.exchanges_max {
            self.ring.push(entry);
        } else {
            let at = self.index(sequence);
            if let Some(old) = self.ring.get_mut(at) {
                self.evicted += u64::from(old.expires_s >= now_s);
                *old = entry;
            }
        }
        sequence
    }

    /// Keeps the bytes to repeat. They stand for nothing when larger than the whole ring: then a duplicate is handled as new.
    pub fn answer(&mut self, sequence: u64, bytes: &[u8]) {
        if self.entry(sequence).is_some()
            && let Some(at) = self.answers.push(bytes)
            && let Some(entry) = self.entry_mut(sequence)
        {
            entry.answer_at = at;
            entry.answer_bytes = bytes.len() as u16;
            entry.state = State::Answered;
        }
    }

    pub fn set_state(&mut self, sequence: u64, state: State) {
        if let Some(entry) = self.entry_mut(sequence) {
            entry.state = state;
        }
    }

    fn bucket(&self, key: ExchangeKey) -> usize {
        key.0 as usize & (self.heads.len() - 1)
    }

    fn index(&self, sequence: u64) -> usize {
        (sequence.wrapping_sub(1) % self.exchanges_max as u64) as usize
    }

    fn is_kept(&self, sequence: u64) -> bool {
        sequence != 0 && sequence < self.next && self.next - sequence <= self.exchanges_max as u64
    }

    fn entry(&self, sequence: u64) -> Option<&Entry> {
        if !self.is_kept(sequence) {
            return None;
        }
        self.ring.get(self.index(sequence))
    }

    fn entry_mut(&mut self, sequence: u64) -> Option<&mut Entry> {
        if !self.is_kept(sequence) {
            return None;
        }
        let at = self.index(sequence);
        self.ring.get_mut(at)
    }

    /// Doubles the number of chains while the ring is still growing (it has not come round, so index = sequence - 1).
    fn rehash(&mut self) {
        self.heads = vec![0; self.heads.len() * 2];
        for at in 0..self.ring.len() {
            let Some(key) = self.ring.get(at).map(|e| e.key) else { continue };
            let bucket = self.bucket(key);
            let sequence = at as u64 + 1;
            let older = self.heads.get_mut(bucket).map_or(0, |head| std::mem::replace(head, sequence));
            if let Some(entry) = self.ring.get_mut(at) {
                entry.older = older;
            }
        }
    }
}

/// The last `bytes_max` bytes of answers, each in one piece. A position counts bytes since the beginning, so that it tells whether it was overwritten.
#[derive(Debug)]
struct ByteRing {
    bytes: Vec<u8>,
    bytes_max: usize,
    next: u64,
}

impl ByteRing {
    fn new(bytes_max: usize) -> Self {
        ByteRing { bytes: Vec::new(), bytes_max: bytes_max.max(1), next: 0 }
    }

    fn push(&mut self, piece: &[u8]) -> Option<u64> {
        if piece.len() > self.bytes_max || piece.len() > usize::from(u16::MAX) {
            return None;
        }
        let offset = (self.next % self.bytes_max as u64) as usize;
        let offset = match self.bytes_max - offset >= piece.len() {
            true => offset,
            false => {
                self.next += (self.bytes_max - offset) as u64;
                0
            }
        };
        if self.bytes.len() < offset + piece.len() {
            self.bytes.resize(offset + piece.len(), 0);
        }
        self.bytes.get_mut(offset..offset + piece.len())?.copy_from_slice(piece);
        let at = self.next;
        self.next += piece.len() as u64;
        Some(at)
    }

    fn get(&self, at: u64, length: u16) -> Option<&[u8]> {
        if at + (self.bytes_max as u64) < self.next {
            return None;
        }
        let offset = (at % self.bytes_max as u64) as usize;
        self.bytes.get(offset..offset + usize::from(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn key(port: u16, id: u16) -> ExchangeKey {
        let peer = PeerKey::new(SocketAddr::from(([10, 0, 0, 1], port)));
        ExchangeKey::new(&Secret::new([3; 32]), peer, &id.to_be_bytes())
    }

    fn table(exchanges_max: usize, bytes_max: usize) -> Exchanges {
        Exchanges::new(exchanges_max, bytes_max, 247)
    }

    #[test]
    fn every_kept_exchange_is_found_with_its_own_answer_while_the_ring_grows_and_turns() {
        let mut table = table(1000, 1 << 16);
        for n in 0..5000u32 {
            let sequence = table.insert(0, key((n / 7) as u16, n as u16));
            table.answer(sequence, &n.to_be_bytes());
            if n % 97 == 0 {
                for back in n.saturating_sub(1100)..=n {
                    let seen = table.look_up(0, key((back / 7) as u16, back as u16));
                    match n - back < 1000 {
                        true => assert_eq!(seen, Seen::Answered(&back.to_be_bytes()), "{back} at {n}"),
                        false => assert_eq!(seen, Seen::Never, "{back} at {n}"),
                    }
                }
            }
        }
        assert_eq!((table.len(), table.evicted), (1000, 4000));
    }

    #[test]
    fn an_exchange_is_forgotten_after_its_lifetime_and_not_before() {
        let mut table = table(10, 100);
        let sequence = table.insert(5, key(1, 1));
        assert_eq!(table.look_up(5, key(1, 1)), Seen::Waiting);
        table.set_state(sequence, State::Acknowledged);
        assert_eq!(table.look_up(252, key(1, 1)), Seen::Acknowledged);
        assert_eq!(table.look_up(253, key(1, 1)), Seen::Never);
        assert_eq!(table.look_up(5, key(1, 2)), Seen::Never);
        assert_eq!(table.look_up(5, key(2, 1)), Seen::Never);
    }

    #[test]
    fn an_answer_that_was_overwritten_or_never_fitted_is_not_replayed() {
        let mut table = table(10, 100);
        let first = table.insert(0, key(1, 1));
        table.answer(first, &[1; 60]);
        let second = table.insert(0, key(1, 2));
        table.answer(second, &[2; 60]);
        assert_eq!(table.look_up(0, key(1, 1)), Seen::Never);
        assert_eq!(table.look_up(0, key(1, 2)), Seen::Answered(&[2; 60]));
        let third = table.insert(0, key(1, 3));
        table.answer(third, &[3; 101]);
        assert_eq!(table.look_up(0, key(1, 3)), Seen::Waiting);
    }
}
