//! A few decisions kept with a connection, for a device repeats itself.
//!
//! Direct-mapped by a hash of action and resource, and compared in full, so a collision costs a decision and never gives a wrong one.
//! 8 bytes until first used, then about 300 bytes and the texts. Emptied by a new policy. Valid for one caller only: role and
//! attributes are fixed for the life of a connection.

use std::hash::Hasher;

use super::index::TextHasher;
use super::{Decision, Policy, Query};
use crate::message::Action;

const ENTRIES: usize = 4;
/// Longer resources are decided anew, so that a cache has a size.
const RESOURCE_BYTES_MAX: usize = 256;

/// Decisions of one caller.
#[derive(Debug, Default)]
pub struct DecisionCache {
    kept: Option<Box<Kept>>,
}

#[derive(Debug)]
struct Kept {
    policy: u64,
    entries: [Option<Entry>; ENTRIES],
}

#[derive(Debug)]
struct Entry {
    action: Action,
    resource: Box<str>,
    decision: Decision,
}

impl DecisionCache {
    pub const fn new() -> Self {
        DecisionCache { kept: None }
    }

    /// [`Policy::decide`], from memory where the decision may be kept. Always ask with the same caller.
    pub fn decide(&mut self, policy: &Policy, query: &Query<'_>) -> Decision {
        let slot = slot(query);
        if let Some(kept) = &self.kept
            && kept.policy == policy.serial
            && let Some(Some(entry)) = kept.entries.get(slot)
            && entry.action == query.action
            && *entry.resource == *query.resource
        {
            return entry.decision;
        }
        let decision = policy.decide(query);
        if decision.cacheable && query.resource.len() <= RESOURCE_BYTES_MAX {
            self.keep(policy.serial, slot, query, decision);
        }
        decision
    }

    fn keep(&mut self, policy: u64, slot: usize, query: &Query<'_>, decision: Decision) {
        let fresh = || Box::new(Kept { policy, entries: [const { None }; ENTRIES] });
        let kept = self.kept.get_or_insert_with(fresh);
        if kept.policy != policy {
            **kept = *fresh();
        }
        if let Some(entry) = kept.entries.get_mut(slot) {
            *entry = Some(Entry { action: query.action, resource: query.resource.into(), decision });
        }
    }
}

fn slot(query: &Query<'_>) -> usize {
    let mut hasher = TextHasher::default();
    hasher.write(query.resource.as_bytes());
    hasher.write_u8(query.action as u8);
    (hasher.finish() >> 32) as usize % ENTRIES
}
