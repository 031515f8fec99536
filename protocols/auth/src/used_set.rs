//! What has been used and must not work again: the `jti` of a JWT, the random part of a challenge.
//!
//! Bounded in all, and bounded for each owner, so that one device that logs in without pause fills its own share and nobody else's. Only a
//! successful login adds to it, so a stranger cannot make it grow. An entry leaves when what it forbids has expired anyway; nothing is dropped early.
//! About 100 bytes an entry.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Ids that have been used, with the second in which each may be forgotten.
#[derive(Debug)]
pub struct UsedSet {
    entries_max: usize,
    per_owner_max: usize,
    ids: BTreeSet<(u32, Id)>,
    by_expiry: BTreeSet<(u64, u32, Id)>,
    owners: BTreeMap<u32, usize>,
}

/// 16 bytes that are random, or of a hash.
pub type Id = [u8; 16];

/// Why an id may not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotFresh {
    Used,
    /// It could not be remembered, so it must not be accepted: the owner's share is used up.
    OwnerFull,
    /// The same, for the whole set.
    Full,
}

impl fmt::Display for NotFresh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NotFresh::Used => "used before",
            NotFresh::OwnerFull => "too many logins of this device are still remembered",
            NotFresh::Full => "too many logins are still remembered",
        })
    }
}

impl std::error::Error for NotFresh {}

impl UsedSet {
    pub const fn new(entries_max: usize, per_owner_max: usize) -> Self {
        UsedSet {
            entries_max,
            per_owner_max,
            ids: BTreeSet::new(),
            by_expiry: BTreeSet::new(),
            owners: BTreeMap::new(),
        }
    }

    /// Changes the bounds. What is over a smaller one stays until it expires, and nothing is added until then.
    pub const fn set_bounds(&mut self, entries_max: usize, per_owner_max: usize) {
        self.entries_max = entries_max;
        self.per_owner_max = per_owner_max;
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Whether `id` has been used: a cheap look before an expensive check. Only [`insert`](Self::insert) decides.
    pub fn contains(&self, owner: u32, id: &Id) -> bool {
        self.ids.contains(&(owner, *id))
    }

    /// Uses `id`, once. It is remembered while `now_secs < expires_secs`; both count from the same origin.
    ///
    /// # Errors
    /// If it has been used, or cannot be remembered.
    pub fn insert(&mut self, owner: u32, id: Id, expires_secs: u64, now_secs: u64) -> Result<(), NotFresh> {
        self.forget_expired(now_secs);
        if self.contains(owner, &id) {
            return Err(NotFresh::Used);
        }
        if self.ids.len() >= self.entries_max {
            return Err(NotFresh::Full);
        }
        let owned = self.owners.get(&owner).copied().unwrap_or(0);
        if owned >= self.per_owner_max {
            return Err(NotFresh::OwnerFull);
        }
        self.owners.insert(owner, owned.saturating_add(1));
        self.ids.insert((owner, id));
        self.by_expiry.insert((expires_secs, owner, id));
        Ok(())
    }

    /// Drops what has expired. [`insert`](Self::insert) does it too; call it now and then so that an idle set shrinks.
    pub fn forget_expired(&mut self, now_secs: u64) {
        while let Some(&(expires, owner, id)) = self.by_expiry.first() {
            if expires > now_secs {
                break;
            }
            self.by_expiry.pop_first();
            self.ids.remove(&(owner, id));
            match self.owners.get_mut(&owner) {
                Some(owned) if *owned > 1 => *owned -= 1,
                Some(_) | None => {
                    self.owners.remove(&owner);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Id = [1; 16];
    const B: Id = [2; 16];

    #[test]
    fn an_id_works_once_until_it_has_expired() {
        let mut set = UsedSet::new(10, 10);
        assert_eq!(set.insert(1, A, 100, 50), Ok(()));
        assert_eq!(set.insert(1, A, 100, 99), Err(NotFresh::Used));
        assert_eq!(set.insert(1, A, 200, 100), Ok(()));
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn the_same_id_of_another_owner_is_another_id() {
        let mut set = UsedSet::new(10, 10);
        assert_eq!(set.insert(1, A, 100, 0), Ok(()));
        assert_eq!(set.insert(2, A, 100, 0), Ok(()));
        assert!(set.contains(2, &A) && !set.contains(3, &A));
    }

    #[test]
    fn a_full_set_refuses_and_forgets_nothing_early() {
        let mut set = UsedSet::new(1, 10);
        assert_eq!(set.insert(1, A, 100, 0), Ok(()));
        assert_eq!(set.insert(2, B, 100, 0), Err(NotFresh::Full));
        assert_eq!(set.insert(1, A, 100, 0), Err(NotFresh::Used));
        assert_eq!(set.insert(2, B, 200, 100), Ok(()));
    }

    #[test]
    fn one_owner_fills_only_its_own_share() {
        let mut set = UsedSet::new(10, 1);
        assert_eq!(set.insert(1, A, 100, 0), Ok(()));
        assert_eq!(set.insert(1, B, 100, 0), Err(NotFresh::OwnerFull));
        assert_eq!(set.insert(2, B, 100, 0), Ok(()));
        set.forget_expired(100);
        assert!(set.is_empty() && set.owners.is_empty() && set.by_expiry.is_empty());
    }

    proptest! {
        /// Against the obvious model: a list of what was accepted.
        #[test]
        fn it_agrees_with_a_plain_list(steps in proptest::collection::vec((0u32..3, 0u8..6, 0u64..20, 0u64..4), 0..80)) {
            let mut set = UsedSet::new(6, 4);
            let mut list: Vec<(u32, Id, u64)> = Vec::new();
            let mut now = 0;
            for (owner, id, life, passed) in steps {
                now += passed;
                let id = [id; 16];
                let expires = now + 1 + life;
                list.retain(|(.., ends)| *ends > now);
                let expected = if list.iter().any(|(o, i, _)| (*o, *i) == (owner, id)) {
                    Err(NotFresh::Used)
                } else if list.len() >= 6 {
                    Err(NotFresh::Full)
                } else if list.iter().filter(|(o, ..)| *o == owner).count() >= 4 {
                    Err(NotFresh::OwnerFull)
                } else {
                    list.push((owner, id, expires));
                    Ok(())
                };
                prop_assert_eq!(set.insert(owner, id, expires, now), expected);
                prop_assert_eq!(set.len(), list.len());
            }
        }
    }
}
