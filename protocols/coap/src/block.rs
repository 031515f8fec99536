//! Block-wise transfer (RFC 7959): the option value, and the bodies that are half here (Block1) or half sent (Block2).

use std::collections::HashMap;
use std::hash::{BuildHasher as _, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use crate::message::Contents;
use crate::option::{self, number};
use crate::peer::{PeerKey, Secret};
use crate::slots::{Slot, Slots};

/// Value of Block1 and Block2: number of the block, whether more follow, and the size as `2^(exponent + 4)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    /// 0 to 2^20 - 1.
    pub number: u32,
    pub more: bool,
    /// 0 to 6: 16 to 1024 bytes; [`Block::BERT`].
    pub exponent: u8,
}

impl Block {
    /// Over reliable transports: several blocks of 1024 bytes in one message (RFC 8323 section 6).
    pub const BERT: u8 = 7;

    /// `None` for more than three bytes and for the exponent 7, which is reserved over UDP (section 2.2).
    pub fn parse(value: &[u8]) -> Option<Self> {
        Self::parse_reliable(value).filter(|block| block.exponent != Self::BERT)
    }

    /// The same over a reliable transport.
    pub fn parse_reliable(value: &[u8]) -> Option<Self> {
        let bits = (value.len() <= 3).then(|| option::uint32(value)).flatten()?;
        Some(Block { number: bits >> 4, more: bits & 8 != 0, exponent: (bits & 7) as u8 })
    }

    pub fn bits(self) -> u32 {
        (self.number & 0xf_ffff) << 4 | u32::from(self.more) << 3 | u32::from(self.exponent & 7)
    }

    /// Bytes in a block of this size.
    pub fn bytes(self) -> usize {
        16 << self.exponent.min(6)
    }

    /// Offset of this block in the body: below 2^30.
    pub fn offset(self) -> usize {
        self.number as usize * self.bytes()
    }

    /// The largest exponent whose block has at most `bytes` bytes; 16 where even that is too large.
    pub fn exponent_for(bytes: usize) -> u8 {
        (0..=6).rev().find(|e| 16usize << e <= bytes).unwrap_or(0)
    }
}

/// Two requests with the same key belong to one body: everything but the block options, Observe and options outside the cache key (RFC 7959
/// section 2.5, RFC 9175 section 3.3: Request-Tag is part of it).
pub(crate) fn body_key(secret: &Secret, contents: &Contents<'_>) -> u64 {
    let mut hasher = secret.build_hasher();
    contents.code.hash(&mut hasher);
    for (n, value) in contents.options() {
        if !matches!(n, number::BLOCK1 | number::BLOCK2 | number::OBSERVE) && !option::is_no_cache_key(n) {
            (n, value).hash(&mut hasher);
        }
    }
    hasher.finish()
}

/// Why a block was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Untaken {
    /// 4.08: nothing that this block continues.
    Incomplete,
    /// 4.13 with the limit.
    TooLarge(usize),
    /// 5.03: other bodies take the room.
    Full,
}

/// Which way a body goes; the same request may have one each way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Direction {
    Up,
    Down,
}

/// Code and content format of an answer on its way down.
pub(crate) type Head = (u8, Option<u16>);

#[derive(Debug)]
struct Body {
    of: (PeerKey, u64, Direction),
    bytes: Vec<u8>,
    answer: Head,
    expires: Instant,
}

/// Bodies in transfer: bounded in bytes for all, for one peer, and for one body.
#[derive(Debug)]
pub(crate) struct Bodies {
    rows: Slots<Body>,
    by_key: HashMap<(PeerKey, u64, Direction), Slot, Secret>,
    bytes: usize,
    bytes_max: usize,
    peer_bytes_max: usize,
    body_bytes_max: usize,
    lifetime: Duration,
    /// Not later than the first expiry.
    expires: Option<Instant>,
}

impl Bodies {
    /// What a body counts beside its bytes, so that many empty ones are bounded too.
    const OVERHEAD: usize = 256;

    pub fn new(
        secret: Secret,
        bytes_max: usize,
        peer_bytes_max: usize,
        body_bytes_max: usize,
        lifetime: Duration,
    ) -> Self {
        Bodies {
            rows: Slots::new(bytes_max / Self::OVERHEAD),
            by_key: HashMap::with_hasher(secret),
            bytes: 0,
            bytes_max,
            peer_bytes_max,
            body_bytes_max,
            lifetime,
            expires: None,
        }
    }

    /// Begins a body with its first block, in place of an older one of the same key.
    pub fn begin(&mut self, now: Instant, peer: PeerKey, key: u64, first: &[u8]) -> Result<(), Untaken> {
        self.put(now, (peer, key, Direction::Up), first.to_vec(), (0, None))
    }

    /// Appends a block. A block that is here already is taken again without effect. Returns how many bytes are here now.
    pub fn append(
        &mut self,
        now: Instant,
        peer: PeerKey,
        key: u64,
        offset: usize,
        piece: &[u8],
    ) -> Result<usize, Untaken> {
        let of = (peer, key, Direction::Up);
        let slot = *self.by_key.get(&of).ok_or(Untaken::Incomplete)?;
        let peer_bytes = self.bytes_of(peer);
        let body = self.rows.get_mut(slot).ok_or(Untaken::Incomplete)?;
        let end = offset.saturating_add(piece.len());
        if body.bytes.get(offset..end).is_some_and(|here| here == piece && !piece.is_empty()) {
            return Ok(end);
        }
        if offset != body.bytes.len() {
            return Err(Untaken::Incomplete);
        }
        let refused = if end > self.body_bytes_max {
            Some(Untaken::TooLarge(self.body_bytes_max))
        } else if peer_bytes + piece.len() > self.peer_bytes_max || self.bytes + piece.len() > self.bytes_max {
            Some(Untaken::Full)
        } else {
            None
        };
        if let Some(refused) = refused {
            self.remove(of);
            return Err(refused);
        }
        body.bytes.extend_from_slice(piece);
        body.expires = now + self.lifetime;
        self.bytes += piece.len();
        Ok(end)
    }

    /// Takes a finished upload out.
    pub fn finish(&mut self, peer: PeerKey, key: u64) -> Option<Vec<u8>> {
        self.remove((peer, key, Direction::Up)).map(|body| body.bytes)
    }

    /// Keeps an answer whose first block goes out now, for the requests of the others.
    pub fn keep(&mut self, now: Instant, peer: PeerKey, key: u64, answer: Head, bytes: &[u8]) -> Result<(), Untaken> {
        self.put(now, (peer, key, Direction::Down), bytes.to_vec(), answer)
    }

    /// A kept answer.
    pub fn kept(&self, peer: PeerKey, key: u64) -> Option<(Head, &[u8])> {
        let body = self.rows.get(*self.by_key.get(&(peer, key, Direction::Down))?)?;
        Some((body.answer, &body.bytes))
    }

    pub fn drop_kept(&mut self, peer: PeerKey, key: u64) {
        self.remove((peer, key, Direction::Down));
    }

    /// When [`Bodies::expire`] has something to do.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.expires
    }

    pub fn expire(&mut self, now: Instant) -> usize {
        if self.expires.is_none_or(|at| at > now) {
            return 0;
        }
        let over: Vec<_> = self.rows.iter().filter(|(_, b)| b.expires <= now).map(|(_, b)| b.of).collect();
        for of in &over {
            self.remove(*of);
        }
        self.expires = self.rows.iter().map(|(_, b)| b.expires).min();
        over.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn put(
        &mut self,
        now: Instant,
        of: (PeerKey, u64, Direction),
        bytes: Vec<u8>,
        answer: Head,
    ) -> Result<(), Untaken> {
        self.remove(of);
        if bytes.len() > self.body_bytes_max {
            return Err(Untaken::TooLarge(self.body_bytes_max));
        }
        let cost = bytes.len() + Self::OVERHEAD;
        if self.bytes + cost > self.bytes_max || self.bytes_of(of.0) + cost > self.peer_bytes_max {
            return Err(Untaken::Full);
        }
        let expires = now + self.lifetime;
        let slot = self.rows.insert(Body { of, bytes, answer, expires }).ok_or(Untaken::Full)?;
        self.by_key.insert(of, slot);
        self.bytes += cost;
        self.expires = Some(self.expires.map_or(expires, |at| at.min(expires)));
        Ok(())
    }

    fn remove(&mut self, of: (PeerKey, u64, Direction)) -> Option<Body> {
        let body = self.rows.remove(self.by_key.remove(&of)?)?;
        self.bytes -= body.bytes.len() + Self::OVERHEAD;
        Some(body)
    }

    /// What one peer holds: a walk over the table, which the byte limit keeps short and which only block-wise transfers pay.
    fn bytes_of(&self, peer: PeerKey) -> usize {
        self.rows.iter().filter(|(_, b)| b.of.0 == peer).map(|(_, b)| b.bytes.len() + Self::OVERHEAD).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn peer(n: u16) -> PeerKey {
        PeerKey::new(SocketAddr::from(([10, 0, 0, 1], n)))
    }

    fn bodies() -> Bodies {
        Bodies::new(Secret::new([1; 32]), 4000, 2000, 1000, Duration::from_secs(60))
    }

    #[test]
    fn block_values_use_all_twenty_bits_and_refuse_the_reserved_size() {
        assert_eq!(Block::parse(&[]), Some(Block { number: 0, more: false, exponent: 0 }));
        assert_eq!(Block::parse(&[0x0e]), Some(Block { number: 0, more: true, exponent: 6 }));
        let last = Block::parse(&[0xff, 0xff, 0xf6]).unwrap();
        assert_eq!((last.number, last.bytes(), last.bits()), (0xf_ffff, 1024, 0xff_fff6));
        assert_eq!(Block::parse(&[0x07]), None);
        assert_eq!(Block::parse(&[0, 0, 0, 0]), None);
        assert_eq!((Block::exponent_for(64), Block::exponent_for(63), Block::exponent_for(3)), (2, 1, 0));
    }

    #[test]
    fn a_body_arrives_in_order_and_repeats_do_not_count_twice() {
        let (mut bodies, now) = (bodies(), Instant::now());
        bodies.begin(now, peer(1), 9, &[1; 16]).unwrap();
        assert_eq!(bodies.append(now, peer(1), 9, 16, &[2; 16]), Ok(32));
        assert_eq!(bodies.append(now, peer(1), 9, 16, &[2; 16]), Ok(32));
        assert_eq!(bodies.append(now, peer(1), 9, 48, &[3; 16]), Err(Untaken::Incomplete));
        assert_eq!(bodies.append(now, peer(2), 9, 16, &[2; 16]), Err(Untaken::Incomplete), "another peer's");
        assert_eq!(bodies.finish(peer(1), 9).unwrap(), [[1; 16], [2; 16]].concat());
        assert_eq!((bodies.bytes(), bodies.finish(peer(1), 9)), (0, None));
    }

    #[test]
    fn one_body_one_peer_and_all_together_are_bounded() {
        let (mut bodies, now) = (bodies(), Instant::now());
        assert_eq!(bodies.begin(now, peer(1), 1, &[0; 1001]), Err(Untaken::TooLarge(1000)));
        bodies.begin(now, peer(1), 1, &[0; 990]).unwrap();
        assert_eq!(bodies.append(now, peer(1), 1, 990, &[0; 16]), Err(Untaken::TooLarge(1000)));
        assert_eq!(bodies.bytes(), 0, "the rest of a body that is too large is given back");
        bodies.begin(now, peer(1), 1, &[0; 900]).unwrap();
        assert_eq!(bodies.begin(now, peer(1), 2, &[0; 900]), Err(Untaken::Full));
        bodies.begin(now, peer(2), 1, &[0; 900]).unwrap();
        bodies.begin(now, peer(3), 1, &[0; 900]).unwrap();
        assert_eq!(bodies.begin(now, peer(4), 1, &[0; 900]), Err(Untaken::Full));
    }

    #[test]
    fn a_body_that_stalls_expires() {
        let (mut bodies, now) = (bodies(), Instant::now());
        bodies.begin(now, peer(1), 1, &[0; 16]).unwrap();
        bodies.begin(now + Duration::from_secs(30), peer(1), 2, &[0; 16]).unwrap();
        assert_eq!(bodies.next_expiry(), Some(now + Duration::from_secs(60)));
        assert_eq!(bodies.expire(now + Duration::from_secs(60)), 1);
        assert_eq!(bodies.next_expiry(), Some(now + Duration::from_secs(90)));
        assert_eq!(bodies.append(now, peer(1), 1, 16, &[1]), Err(Untaken::Incomplete));
    }
}
