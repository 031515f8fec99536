//! A bounded table of token buckets, or of sliding windows, for keys that outsiders choose.
//!
//! Per check: one SipHash (keys come from strangers, so a weak hash would be an invitation), one short lock of one shard, one look-up.
//! The hash stands for the key: of 64 bits, so that two keys share a bucket but once in ages, and nobody can choose which. 40 bytes or so per key. At the bound a new key first takes the place of a count that is as good as new (a bucket that is full again), which loses nothing; a hand
//! goes round the shard and looks at [`LOOK_MAX`] entries per new key, so a flood of new keys costs each of them a constant. Only when
//! all of those are in debt does the new key share the shard's one overflow bucket: strangers then slow down each other, and the
//! keys already known keep what is theirs. No debt is ever forgotten to make room.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::marker::PhantomData;
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::Mutex;
use portable_atomic::{AtomicU64, Ordering};

use super::gcra::{Left, Tat};
use super::window::Window;

/// Entries inspected per new key when the shard is full.
const LOOK_MAX: usize = 8;
const SHARDS_MAX: usize = 16;

/// What is counted for one key.
pub trait Count: Copy + Default {
    type Rate: Copy;

    /// Takes `cost`, or takes nothing and says how long to wait.
    ///
    /// # Errors
    /// The time to wait.
    fn take(&mut self, now_nanos: u64, rate: Self::Rate, cost: u32) -> Result<Left, Duration>;

    /// Whether forgetting it changes nothing.
    fn is_as_new(&self, now_nanos: u64) -> bool;
}

/// Token buckets by key, at most as many as it was made with.
pub type KeyedBuckets<K> = Keyed<K, Tat>;

/// Sliding windows by key, likewise.
pub type KeyedWindows<K> = Keyed<K, Window>;

/// Counts by key, at most as many as it was made with.
pub struct Keyed<K, C> {
    shards: Box<[Mutex<Shard<C>>]>,
    hasher: RandomState,
    keys_per_shard_max: usize,
    overflowed: AtomicU64,
    keys: PhantomData<fn(&K)>,
}

struct Shard<C> {
    places: HashMap<u64, usize, BuildHasherDefault<AsItIs>>,
    /// The keys' hashes and what is counted for them, dense, so that the hand can go round.
    entries: Vec<(u64, C)>,
    hand: usize,
    /// The count that keys without a place share.
    overflow: C,
}

impl<K: Hash, C: Count> Keyed<K, C> {
    /// `keys_max` is rounded up to a multiple of the number of shards (1 to 16).
    pub fn new(keys_max: usize) -> Self {
        let shards = (keys_max / 64).clamp(1, SHARDS_MAX);
        Keyed {
            shards: (0..shards).map(|_| Mutex::new(Shard::new())).collect(),
            hasher: RandomState::new(),
            keys_per_shard_max: keys_max.div_ceil(shards).max(1),
            overflowed: AtomicU64::new(0),
            keys: PhantomData,
        }
    }

    /// Takes `cost` tokens from what `key` has, or takes none and says how long to wait.
    ///
    /// # Errors
    /// The time to wait, as [`super::Gcra::check`].
    pub fn check(&self, key: &K, now_nanos: u64, rate: C::Rate, cost: u32) -> Result<(), Duration> {
        self.take(key, now_nanos, rate, cost).map(|_| ())
    }

    /// The same, and what is left.
    ///
    /// # Errors
    /// The time to wait.
    pub fn take(&self, key: &K, now_nanos: u64, rate: C::Rate, cost: u32) -> Result<Left, Duration> {
        let hash = self.hasher.hash_one(key);
        // The table inside goes by the lowest and the highest bits.
        let index = (hash >> 32) as usize % self.shards.len();
        let Some(shard) = self.shards.get(index) else { return C::default().take(now_nanos, rate, cost) };
        let mut shard = shard.lock();
        let shard = &mut *shard;
        let count = match shard.place(hash, now_nanos, self.keys_per_shard_max) {
            Some(count) => count,
            None => {
                self.overflowed.fetch_add(1, Ordering::Relaxed);
                &mut shard.overflow
            }
        };
        count.take(now_nanos, rate, cost)
    }

    /// Drops up to `look_max` counts per shard that are as good as new, to give memory back in quiet times. Returns how many.
    pub fn sweep(&self, now_nanos: u64, look_max: usize) -> usize {
        self.shards.iter().map(|shard| shard.lock().sweep(now_nanos, look_max)).sum()
    }

    /// Keys that hold a place now.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().entries.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks that had to use a shared overflow count since the start.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }
}

/// A key that is a hash already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.0 = self.0 << 8 | u64::from(*byte));
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl<C: Count> Shard<C> {
    fn new() -> Self {
        Shard { places: HashMap::default(), entries: Vec::new(), hand: 0, overflow: C::default() }
    }

    /// What is kept for `key`, made if there is room; `None` when every place looked at is in debt.
    fn place(&mut self, key: u64, now_nanos: u64, keys_max: usize) -> Option<&mut C> {
        let place = match self.places.get(&key) {
            Some(&place) => place,
            None => {
                if self.entries.len() >= keys_max && self.sweep(now_nanos, LOOK_MAX) == 0 {
                    return None;
                }
                let place = self.entries.len();
                self.entries.push((key, C::default()));
                self.places.insert(key, place);
                place
            }
        };
        self.entries.get_mut(place).map(|(_, count)| count)
    }

    fn sweep(&mut self, now_nanos: u64, look_max: usize) -> usize {
        let mut dropped = 0;
        for _ in 0..look_max.min(self.entries.len()) {
            if self.hand >= self.entries.len() {
                self.hand = 0;
            }
            match self.entries.get(self.hand) {
                Some((_, count)) if count.is_as_new(now_nanos) => {
                    let (key, _) = self.entries.swap_remove(self.hand);
                    self.places.remove(&key);
                    if let Some((moved, _)) = self.entries.get(self.hand) {
                        self.places.insert(*moved, self.hand);
                    }
                    dropped += 1;
                }
                Some(_) => self.hand += 1,
                None => break,
            }
        }
        if self.entries.len() < self.entries.capacity() / 4 {
            self.entries.shrink_to(self.entries.len() * 2);
            self.places.shrink_to(self.entries.len() * 2);
        }
        dropped
    }
}

/// What counts as one peer address: an IPv4 address, or the /64 of an IPv6 address, which one host can fill at will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AddressKey {
    V4(u32),
    /// The upper 64 bits.
    V6(u64),
}

impl From<IpAddr> for AddressKey {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => AddressKey::V4(v4.to_bits()),
            IpAddr::V6(v6) => AddressKey::V6((v6.to_bits() >> 64) as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gcra::advance;
    use super::*;
    use crate::units::{Period, Rate, SlidingRate};
    use proptest::prelude::*;
    use std::collections::HashMap;

    const RATE: Rate = Rate::per_second(10, 5);
    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn keys_do_not_share_a_bucket_while_there_is_room() {
        let buckets = KeyedBuckets::new(1_000);
        for key in 0..100u32 {
            for _ in 0..RATE.burst {
                assert_eq!(buckets.check(&key, 0, RATE, 1), Ok(()));
            }
            assert!(buckets.check(&key, 0, RATE, 1).is_err());
        }
        assert_eq!(buckets.overflowed(), 0);
    }

    #[test]
    fn what_is_left_is_told() {
        let buckets = KeyedBuckets::new(64);
        let half = SECOND / 2;
        assert_eq!(buckets.take(&1, 0, RATE, 1), Ok(Left { tokens: 4, full_in: Duration::from_millis(100) }));
        assert_eq!(buckets.take(&1, 0, RATE, 4), Ok(Left { tokens: 0, full_in: Duration::from_nanos(half) }));
        assert_eq!(buckets.take(&1, 0, RATE, 1), Err(Duration::from_millis(100)));
        assert_eq!(buckets.take(&1, SECOND, RATE, 0), Ok(Left { tokens: 5, full_in: Duration::ZERO }));
    }

    #[test]
    fn a_flood_of_random_keys_stays_within_the_bound() {
        let buckets = KeyedBuckets::new(256);
        for key in 0..100_000u64 {
            let _ = buckets.check(&key, 0, RATE, 1);
        }
        assert!(buckets.len() <= 256, "{}", buckets.len());
        assert!(buckets.overflowed() > 0);
    }

    #[test]
    fn a_known_key_keeps_its_tokens_and_its_debt_through_a_flood() {
        let buckets = KeyedBuckets::new(64);
        for _ in 0..RATE.burst {
            assert_eq!(buckets.check(&u64::MAX, 0, RATE, 1), Ok(()));
        }
        for key in 0..10_000u64 {
            let _ = buckets.check(&key, 0, RATE, 5);
        }
        assert!(buckets.check(&u64::MAX, 0, RATE, 1).is_err(), "the debt was forgotten");
        assert_eq!(buckets.check(&u64::MAX, SECOND / 10, RATE, 1), Ok(()), "the bucket was lost");
    }

    #[test]
    fn at_the_bound_strangers_share_one_bucket_per_shard_and_no_more() {
        let buckets = KeyedBuckets::new(64);
        let mut admitted = 0;
        for key in 0..10_000u64 {
            admitted += u32::from(buckets.check(&key, 0, RATE, 5).is_ok());
        }
        assert_eq!(admitted, 64 + 1);
    }

    #[test]
    fn a_bucket_that_is_full_again_makes_room_for_a_new_key() {
        let buckets = KeyedBuckets::new(64);
        for key in 0..64u64 {
            assert_eq!(buckets.check(&key, 0, RATE, 1), Ok(()));
        }
        for key in 1_000..1_064u64 {
            assert_eq!(buckets.check(&key, SECOND, RATE, 5), Ok(()));
        }
        assert_eq!(buckets.overflowed(), 0);
        assert_eq!(buckets.len(), 64);
    }

    #[test]
    fn a_sweep_gives_idle_buckets_back() {
        let buckets = KeyedBuckets::new(1_000);
        for key in 0..500u64 {
            assert_eq!(buckets.check(&key, 0, RATE, 1), Ok(()));
        }
        assert_eq!(buckets.sweep(0, 1_000), 0);
        assert_eq!(buckets.sweep(SECOND, 1_000), 500);
        assert!(buckets.is_empty());
    }

    #[test]
    fn windows_of_a_flood_of_keys_stay_within_the_bound_and_known_ones_keep_theirs() {
        let windows = KeyedWindows::new(64);
        let rate = SlidingRate { count: 2, period: Period::Second };
        assert!(windows.check(&u64::MAX, 0, rate, 2).is_ok());
        let mut admitted = 0;
        for key in 0..10_000u64 {
            admitted += u32::from(windows.check(&key, 0, rate, 2).is_ok());
        }
        assert_eq!((windows.len(), admitted), (64, 63 + 1), "one place was taken, and strangers share one window");
        assert!(windows.check(&u64::MAX, 0, rate, 1).is_err(), "what it had taken was forgotten");
        assert_eq!(windows.sweep(2 * SECOND, 1_000), 64);
    }

    #[test]
    fn addresses_are_counted_by_host_or_by_v6_network() {
        let key = |text: &str| AddressKey::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(key("2001:db8:1:2::1"), key("2001:db8:1:2:ffff::9"));
        assert_ne!(key("2001:db8:1:2::1"), key("2001:db8:1:3::1"));
        assert_eq!(key("::ffff:192.0.2.1"), key("192.0.2.1"));
        assert_ne!(key("192.0.2.1"), key("192.0.2.2"));
    }

    proptest! {
        #[test]
        fn under_the_bound_it_agrees_with_one_bucket_per_key(
            steps in prop::collection::vec((0u8..40, 0u64..SECOND / 4, 1u32..4), 1..300),
        ) {
            let buckets = KeyedBuckets::new(64);
            let mut model: HashMap<u8, u64> = HashMap::new();
            let mut now = 0;
            for (n, (key, wait, cost)) in steps.into_iter().enumerate() {
                now += wait;
                if n % 7 == 0 {
                    buckets.sweep(now, 10);
                }
                let tat = model.entry(key).or_default();
                let (next, expected) = advance(*tat, now, RATE, cost);
                *tat = next;
                prop_assert_eq!(buckets.check(&key, now, RATE, cost), expected);
            }
        }
    }
}
