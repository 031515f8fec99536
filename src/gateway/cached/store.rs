//! What is kept, and what has been made invalid meanwhile.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use portable_atomic::{AtomicU64, Ordering};
use quick_cache::OptionsBuilder;
use quick_cache::sync::{Cache, DefaultLifecycle};

use crate::cache::response::{Entry, Key};

#[derive(Clone)]
pub(super) struct ByCost;

impl quick_cache::Weighter<Key, Arc<Entry>> for ByCost {
    fn weight(&self, _: &Key, entry: &Arc<Entry>) -> u64 {
        entry.cost_bytes()
    }
}

/// The first level.
pub(super) struct Memory {
    entries: Cache<Key, Arc<Entry>, ByCost>,
    /// Counts what has been made invalid, so that an answer asked for before that is not kept after it.
    seq: AtomicU64,
    invalid: Mutex<Invalid>,
}

/// Pages by the count at which they were last made invalid.
#[derive(Debug, Default)]
struct Invalid {
    at: HashMap<u128, u64>,
    order: VecDeque<(u128, u64)>,
    /// What was asked for before this is invalid, whatever its page.
    floor: u64,
}

impl Memory {
    pub(super) fn new(bytes_max: u64) -> Self {
        let options = OptionsBuilder::new()
            // One, since a shard holds nothing that is larger than itself.
            .shards(1)
            .estimated_items_capacity(ITEMS_TYPICAL)
            .weight_capacity(bytes_max)
            .build();
        let entries = match options {
            Ok(options) => Cache::with_options(
                options,
                ByCost,
                quick_cache::DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            Err(_) => Cache::with_weighter(ITEMS_TYPICAL, bytes_max, ByCost),
        };
        Memory { entries, seq: AtomicU64::new(1), invalid: Mutex::default() }
    }

    pub(super) fn seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }

    pub(super) fn get(&self, key: Key) -> Option<Arc<Entry>> {
        let entry = self.entries.get(&key)?;
        if self.is_valid(&entry) {
            return Some(entry);
        }
        self.entries.remove(&key);
        None
    }

    pub(super) fn is_valid(&self, entry: &Entry) -> bool {
        let invalid = self.invalid.lock();
        let seq = entry.seq.load(Ordering::Acquire);
        seq >= invalid.floor && invalid.at.get(&entry.key.page).is_none_or(|at| seq >= *at)
    }

    /// Whether the page was made invalid not long ago.
    pub(super) fn has_invalid(&self, page: u128) -> bool {
        self.invalid.lock().at.contains_key(&page)
    }

    pub(super) fn put(&self, entry: Arc<Entry>) {
        self.entries.insert(entry.key, entry);
    }

    pub(super) fn remove(&self, key: Key) {
        self.entries.remove(&key);
    }

    /// Every form of the page, also what is being fetched.
    pub(super) fn invalidate(&self, page: u128) {
        let now = self.seq.fetch_add(1, Ordering::AcqRel) + 1;
        let mut invalid = self.invalid.lock();
        invalid.at.insert(page, now);
        invalid.order.push_back((page, now));
        while invalid.order.len() > INVALID_MAX {
            let Some((page, at)) = invalid.order.pop_front() else { break };
            // What is forgotten here counts for all that is as old.
            if invalid.at.get(&page) == Some(&at) {
                invalid.at.remove(&page);
                invalid.floor = invalid.floor.max(at);
            }
        }
    }

    /// Removes what `is_meant`, by its URL, and gives back how many that were. What is being fetched is not kept.
    pub(super) fn purge(&self, is_meant: impl Fn(&str) -> bool) -> u64 {
        let now = self.seq.fetch_add(1, Ordering::AcqRel) + 1;
        let removed = AtomicU64::new(0);
        self.entries.retain(|_, entry| {
            let meant = is_meant(&entry.url);
            removed.fetch_add(u64::from(meant), Ordering::Relaxed);
            if !meant {
                // Told apart from what is being fetched, which is not looked at: it may be what is meant.
                entry.seq.fetch_max(now, Ordering::AcqRel);
            }
            !meant
        });
        self.invalid.lock().floor = now;
        removed.into_inner()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.entries.weight()
    }

    pub(super) fn entries(&self) -> u64 {
        self.entries.len() as u64
    }
}

const ITEMS_TYPICAL: usize = 256;
/// Pages remembered as invalid; when there are more, everything that is older than the oldest of them is fetched anew.
const INVALID_MAX: usize = 4096;
