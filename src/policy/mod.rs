//! Who may do what on which topic or path: one decision for all protocols.
//!
//! Default deny. Any deny rule that matches wins; otherwise the first allow rule, in the order of the files, decides, and its `rate`
//! and `bytes_max` apply. A rule matches when its `who`, `do` and `on` match, the local time lies in its `hours`, and its `when` holds. A
//! `when` that cannot be evaluated does not hold in an allow rule and does hold in a deny rule: it fails closed, and is counted.
//!
//! A subscription is allowed only if every topic its filter can match is allowed by one rule, and none is denied by any.
//!
//! Pure: no clock, no IO. The local time comes with the question; reading files is the configuration's work.
//! Not here: rate buckets (the gateway keeps one per caller and [`RateIndex`]), and identity: `{device}` is the authenticated caller.

pub mod address;
mod cached;
mod cases;
mod condition;
mod explain;
mod index;
mod pattern;
mod resource;
mod rule;
mod shadow;

use std::fmt;
use std::sync::Arc;

use portable_atomic::{AtomicU64, Ordering};

pub use cached::DecisionCache;
pub use cases::{Case, CaseOutcome, CasesFile, InvalidCase};
pub use explain::{Explanation, NearMiss, RuleRef, Unmet};
pub use resource::canonical_path;
pub use rule::{Config, Effect, Problem, RuleConfig, RuleSource, RulesFile};
pub use shadow::Shadowed;

use crate::message::{Action, Device, Protocol};
use crate::units::Rate;
use index::{Hits, Index};
use rule::{ActionSet, Rule};

/// The compiled rules of all policy files: a snapshot, replaced as a whole by a reload.
pub struct Policy {
    rules: Vec<Rule>,
    rates: Vec<Rate>,
    /// For each rule its place in `rates`.
    rate_of: Vec<Option<RateIndex>>,
    index: Index,
    when_errors: AtomicU64,
    serial: u64,
}

/// One question.
#[derive(Clone, Copy, Debug)]
pub struct Query<'q> {
    /// None for an anonymous caller.
    pub device: Option<&'q Device>,
    /// The role the caller has: the device's, or the one for anonymous callers.
    pub role: &'q str,
    pub action: Action,
    /// A topic for publish, read and command; a filter, without `$share/NAME/`, for subscribe; otherwise the path as it came, still
    /// percent-encoded, without the query. CONNECT: the authority.
    pub resource: &'q str,
    /// Payload bytes.
    pub size: u64,
    /// Minutes since local midnight, 0 to 1439.
    pub minute_of_day: u16,
    pub protocol: Protocol,
}

/// The answer. Small and plain, to be kept with a connection: see [`DecisionCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub effect: Effect,
    /// The deciding rule; none for the default deny.
    pub rule: Option<RuleIndex>,
    /// The caller refuses what is larger as [`crate::message::Reject::TooLarge`].
    pub bytes_max: Option<u64>,
    /// The bucket of this caller to take a token from.
    pub rate: Option<RateIndex>,
    /// The same question about another payload at another time gets the same answer.
    pub cacheable: bool,
}

/// A rule within one [`Policy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleIndex(pub u32);

/// A rule's rate within one [`Policy`]: the key of the bucket, together with the caller. Starts anew with each policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RateIndex(pub u32);

/// Distinguishes policies, so that what was cached under one is not taken for the answer of another.
static SERIAL: AtomicU64 = AtomicU64::new(1);

impl Policy {
    /// Checks and compiles all rules.
    ///
    /// # Errors
    /// Every problem of every rule, in the order of the sources.
    pub fn compile(sources: Vec<RuleSource>) -> Result<Self, Vec<Problem>> {
        let rules = rule::check(sources)?;
        let mut rates = Vec::new();
        let rate_of = rules
            .iter()
            .map(|rule| {
                rule.rate.map(|rate| {
                    rates.push(rate);
                    RateIndex(u32::try_from(rates.len() - 1).unwrap_or(u32::MAX))
                })
            })
            .collect();
        let index = Index::new(&rules);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        Ok(Policy { rules, rates, rate_of, index, when_errors: AtomicU64::new(0), serial })
    }

    /// The policy without a rule: nothing is allowed.
    pub fn deny_all() -> Self {
        Policy {
            rules: Vec::new(),
            rates: Vec::new(),
            rate_of: Vec::new(),
            index: Index::default(),
            when_errors: AtomicU64::new(0),
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Decides. Without `when` and `hours` in play: no allocation, except for a path with percent-encoding.
    pub fn decide(&self, query: &Query<'_>) -> Decision {
        let action = ActionSet::one(query.action);
        let hits = match resource::canonical(query.action, query.resource) {
            Some(resource) if query.action == Action::Subscribe => {
                self.index.find_filter(query.device, query.role, action, &resource)
            }
            Some(resource) => self.index.find(query.device, query.role, action, &resource),
            // Two programs could read it as two resources, so no rule can speak about it.
            None => Hits::default(),
        };
        self.weigh(hits, query)
    }

    fn weigh(&self, mut hits: Hits, query: &Query<'_>) -> Decision {
        if let Some(rule) = hits.deny {
            return self.decision(Effect::Deny, Some(rule), true);
        }
        let mut cacheable = hits.conditional_deny.is_empty();
        // A rule may be found by its role and again by an attribute.
        hits.conditional_deny.sort_unstable();
        hits.conditional_deny.dedup();
        if let Some(&rule) = hits.conditional_deny.iter().find(|rule| self.circumstances_hold(**rule, query)) {
            return self.decision(Effect::Deny, Some(rule), false);
        }
        hits.conditional_allow.sort_unstable();
        hits.conditional_allow.dedup();
        for rule in hits.conditional_allow {
            if hits.allow.is_some_and(|sure| sure < rule) {
                break;
            }
            cacheable = false;
            if self.circumstances_hold(rule, query) {
                return self.decision(Effect::Allow, Some(rule), false);
            }
        }
        match hits.allow {
            Some(rule) => self.decision(Effect::Allow, Some(rule), cacheable),
            None => self.decision(Effect::Deny, None, cacheable),
        }
    }

    /// `hours` and `when` of one rule.
    fn circumstances_hold(&self, rule: u32, query: &Query<'_>) -> bool {
        let Some(rule) = self.rules.get(rule as usize) else { return false };
        if rule.hours.is_some_and(|hours| !hours.contains(query.minute_of_day)) {
            return false;
        }
        match rule.when.as_ref().map(|when| when.holds(query)) {
            None => true,
            Some(Ok(answer)) => answer,
            Some(Err(_)) => {
                self.when_errors.fetch_add(1, Ordering::Relaxed);
                rule.effect == Effect::Deny
            }
        }
    }

    fn decision(&self, effect: Effect, rule: Option<u32>, cacheable: bool) -> Decision {
        let known = rule.and_then(|rule| self.rules.get(rule as usize));
        Decision {
            effect,
            rule: rule.map(RuleIndex),
            bytes_max: known.and_then(|rule| rule.bytes_max),
            rate: rule.and_then(|rule| self.rate_of.get(rule as usize).copied().flatten()),
            cacheable,
        }
    }

    /// The rule's name, for [`crate::message::Reject::Forbidden`].
    pub fn rule_name(&self, rule: RuleIndex) -> Option<&Arc<str>> {
        self.rules.get(rule.0 as usize).map(|rule| &rule.name)
    }

    pub fn rate(&self, rate: RateIndex) -> Option<Rate> {
        self.rates.get(rate.0 as usize).copied()
    }

    /// Number of rules.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Evaluations of a `when` that gave an error since this policy was loaded.
    pub fn when_errors(&self) -> u64 {
        self.when_errors.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy").field("rules", &self.rules.len()).field("serial", &self.serial).finish()
    }
}

impl Decision {
    pub fn is_allowed(&self) -> bool {
        self.effect == Effect::Allow
    }
}

#[cfg(test)]
mod tests;
