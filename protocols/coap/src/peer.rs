//! Who is at the other end: compact keys, a keyed hash that a peer cannot aim at, message ids, and which addresses have proved that they receive.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

/// A peer and the id of a message of ours to it, in 24 bytes (RFC 7252 section 4.4).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct MessageKey {
    ip: [u64; 2],
    scope: u32,
    port: u16,
    message_id: u16,
}

/// A peer: the same with message id 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct PeerKey(MessageKey);

impl PeerKey {
    pub fn new(peer: SocketAddr) -> Self {
        let (ip, scope) = match peer {
            SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), 0),
            SocketAddr::V6(v6) => (*v6.ip(), v6.scope_id()),
        };
        let bits = u128::from(ip);
        PeerKey(MessageKey { ip: [(bits >> 64) as u64, bits as u64], scope, port: peer.port(), message_id: 0 })
    }

    pub fn message(self, message_id: u16) -> MessageKey {
        MessageKey { message_id, ..self.0 }
    }
}

/// Hashes with a secret prefix (SipHash from std), so that a peer cannot aim at one bucket, and makes the other unpredictable numbers.
#[derive(Clone, Debug)]
pub(crate) struct Secret {
    key: [u64; 2],
    random: u64,
}

impl Secret {
    pub fn new(seed: [u8; 32]) -> Self {
        let mut hasher = DefaultHasher::new();
        let word = |hasher: &mut DefaultHasher, salt: u8| {
            hasher.write(&seed);
            hasher.write_u8(salt);
            hasher.finish()
        };
        Secret { key: [word(&mut hasher, 1), word(&mut hasher, 2)], random: word(&mut hasher, 3) }
    }

    pub fn hash(&self, value: impl Hash) -> u64 {
        self.hash_one(value)
    }

    /// SplitMix64: jitter and starting points, nothing that must stay secret.
    pub fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

impl BuildHasher for Secret {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.key[0]);
        hasher.write_u64(self.key[1]);
        hasher
    }
}

/// Message ids for what this endpoint sends on its own account: peers share 4096 counters by hash, which needs no memory per peer and repeats an id
/// towards one peer only after 65536 of that counter (RFC 7252 section 4.4, implementation note).
#[derive(Debug)]
pub(crate) struct MessageIds(Vec<u16>);

impl MessageIds {
    const COUNTERS: usize = 4096;

    pub fn new(secret: &mut Secret) -> Self {
        MessageIds((0..Self::COUNTERS).map(|_| secret.random() as u16).collect())
    }

    pub fn next(&mut self, secret: &Secret, peer: PeerKey) -> u16 {
        let bucket = secret.hash(peer) as usize % Self::COUNTERS;
        self.0.get_mut(bucket).map_or(0, |id| {
            *id = id.wrapping_add(1);
            *id
        })
    }
}

/// Peers that have shown that they receive what is sent to their address, for a while. Full: the one validated longest ago goes.
#[derive(Debug)]
pub(crate) struct Validated {
    until_s: HashMap<PeerKey, u32, Secret>,
    order: VecDeque<(PeerKey, u32)>,
    peers_max: usize,
    lifetime_s: u32,
}

impl Validated {
    pub fn new(secret: Secret, peers_max: usize, lifetime_s: u32) -> Self {
        Validated { until_s: HashMap::with_hasher(secret), order: VecDeque::new(), peers_max, lifetime_s }
    }

    pub fn insert(&mut self, now_s: u32, peer: PeerKey) {
        let until_s = now_s.saturating_add(self.lifetime_s);
        // Renewing more often than every eighth of a lifetime would only churn the queue.
        if self.until_s.get(&peer).is_some_and(|old| until_s - (*old).min(until_s) < self.lifetime_s / 8 + 1) {
            return;
        }
        self.until_s.insert(peer, until_s);
        self.order.push_back((peer, until_s));
        // A renewed peer leaves a stale entry behind, at most eight in a lifetime; only a current one counts.
        while let Some((oldest, at)) = self.order.front().copied() {
            if self.until_s.get(&oldest) == Some(&at) {
                if at >= now_s && self.until_s.len() <= self.peers_max {
                    break;
                }
                self.until_s.remove(&oldest);
            }
            self.order.pop_front();
        }
    }

    pub fn contains(&self, now_s: u32, peer: PeerKey) -> bool {
        self.until_s.get(&peer).is_some_and(|until| *until >= now_s)
    }

    pub fn len(&self) -> usize {
        self.until_s.len()
    }
}

/// An Echo value (RFC 9175 section 2): the time it was made and a keyed hash over time and peer, so that nothing is stored for it.
pub(crate) fn echo(secret: &Secret, now_s: u32, peer: PeerKey) -> [u8; 12] {
    let tag = secret.hash(("echo", now_s, peer)).to_be_bytes();
    let mut value = [0; 12];
    let (time, rest) = value.split_at_mut(4);
    time.copy_from_slice(&now_s.to_be_bytes());
    rest.copy_from_slice(&tag);
    value
}

/// Whether `value` was made by [`echo`] for this peer within `lifetime_s`.
pub(crate) fn echo_is_fresh(secret: &Secret, now_s: u32, lifetime_s: u32, peer: PeerKey, value: &[u8]) -> bool {
    let Some(time) = value.first_chunk::<4>().map(|t| u32::from_be_bytes(*t)) else { return false };
    let age_ok = time <= now_s && now_s - time <= lifetime_s;
    let expected = echo(secret, time, peer);
    // The comparison takes the same time wherever the difference is.
    let differs = value.len() != expected.len() || value.iter().zip(expected).fold(0, |sum, (a, b)| sum | (a ^ b)) != 0;
    age_ok && !differs
}

pub(crate) fn is_multicast(peer: SocketAddr) -> bool {
    match peer.ip() {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_multicast() || ip.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u16) -> PeerKey {
        PeerKey::new(SocketAddr::from(([192, 0, 2, 1], n)))
    }

    #[test]
    fn an_echo_value_counts_for_its_peer_and_its_time_only() {
        let secret = Secret::new([7; 32]);
        let value = echo(&secret, 100, peer(1));
        assert!(echo_is_fresh(&secret, 100, 60, peer(1), &value));
        assert!(echo_is_fresh(&secret, 160, 60, peer(1), &value));
        assert!(!echo_is_fresh(&secret, 161, 60, peer(1), &value), "too old");
        assert!(!echo_is_fresh(&secret, 99, 60, peer(1), &value), "from the future");
        assert!(!echo_is_fresh(&secret, 100, 60, peer(2), &value), "of another peer");
        assert!(!echo_is_fresh(&Secret::new([8; 32]), 100, 60, peer(1), &value), "of another gateway");
        assert!(!echo_is_fresh(&secret, 100, 60, peer(1), &value[..11]));
        assert!(!echo_is_fresh(&secret, 100, 60, peer(1), &[]));
    }

    #[test]
    fn validated_peers_are_bounded_and_expire() {
        let mut validated = Validated::new(Secret::new([1; 32]), 100, 80);
        for n in 0..10_000 {
            validated.insert(u32::from(n) / 1000, peer(n));
        }
        assert_eq!(validated.len(), 100);
        assert!(validated.contains(9, peer(9_999)) && !validated.contains(9, peer(1)));
        assert!(!validated.contains(90, peer(9_999)));
        for second in 0..10_000 {
            validated.insert(100 + second, peer(1));
        }
        assert!(validated.order.len() < 20, "a renewed peer does not fill the queue: {}", validated.order.len());
        assert_eq!(validated.len(), 1);
    }

    #[test]
    fn a_mapped_address_is_the_same_peer() {
        let v6: SocketAddr = "[::ffff:192.0.2.1]:5".parse().unwrap();
        assert_eq!(PeerKey::new(v6), peer(5));
        assert_ne!(peer(5), peer(6));
    }
}
