//! Why a decision fell as it did: the deciding rule with file and line, and the rules that almost applied.
//!
//! For the operator (`tidegate policy explain`, the admin API, the audit log), never for a device. Reads every rule by the plain
//! definition of a match, so it also checks the index.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::rule::{ActionSet, Effect, Principal, Rule};
use super::{Policy, Query, RuleIndex, resource};
use crate::message::{Action, Device};
use crate::units::Rate;

const NEAR_MAX: usize = 5;

/// A rule and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleRef {
    pub name: Arc<str>,
    pub effect: Effect,
    pub file: Arc<str>,
    pub line: u32,
}

/// What kept a rule from applying.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unmet {
    /// `hours` does not contain the time of the question.
    Hours,
    /// `when` is false.
    When,
    /// `when` cannot be evaluated; the text is CEL's.
    WhenError(String),
    /// `do` lacks the action.
    Do,
    /// `on` does not match the resource.
    On,
    /// `who` does not include the caller.
    Who,
}

/// An allow rule with one condition unmet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NearMiss {
    pub rule: RuleRef,
    pub unmet: Unmet,
}

/// A decision and its reasons.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    pub effect: Effect,
    /// None: no rule allows it.
    pub rule: Option<RuleRef>,
    pub bytes_max: Option<u64>,
    pub rate: Option<Rate>,
    /// The resource has no unambiguous spelling, so that no rule can allow it.
    pub confusable: bool,
    /// Allow rules that lack one condition, nearest first; only for a denial.
    pub near: Vec<NearMiss>,
}

impl Policy {
    /// Decides, and says why.
    pub fn explain(&self, query: &Query<'_>) -> Explanation {
        let decision = self.decide(query);
        let canonical = resource::canonical(query.action, query.resource);
        let near = match (&canonical, decision.effect) {
            (Some(resource), Effect::Deny) => self.near_misses(query, resource),
            _ => Vec::new(),
        };
        Explanation {
            effect: decision.effect,
            rule: decision.rule.and_then(|rule| self.rule_ref(rule)),
            bytes_max: decision.bytes_max,
            rate: decision.rate.and_then(|rate| self.rate(rate)),
            confusable: canonical.is_none(),
            near,
        }
    }

    pub fn rule_ref(&self, rule: RuleIndex) -> Option<RuleRef> {
        self.rules.get(rule.0 as usize).map(RuleRef::from)
    }

    fn near_misses(&self, query: &Query<'_>, resource: &str) -> Vec<NearMiss> {
        let mut near: Vec<(u8, NearMiss)> = Vec::new();
        for rule in self.rules.iter().filter(|rule| rule.effect == Effect::Allow) {
            let mut unmet = self.unmet(rule, query, resource);
            if let (Some(first), None) = (unmet.next(), unmet.next()) {
                near.push((first.distance(), NearMiss { rule: rule.into(), unmet: first }));
            }
        }
        // Stable: rules of one distance stay in the order of the files.
        near.sort_by_key(|(distance, _)| *distance);
        near.truncate(NEAR_MAX);
        near.into_iter().map(|(_, miss)| miss).collect()
    }

    fn unmet<'u>(
        &self,
        rule: &'u Rule,
        query: &'u Query<'_>,
        resource: &'u str,
    ) -> impl Iterator<Item = Unmet> + use<'u> {
        let who = !rule.who.iter().any(|principal| principal.is(query.device, query.role));
        let action = !rule.actions.meets(ActionSet::one(query.action));
        let on = !rule.speaks_about(query, resource);
        let hours = rule.hours.is_some_and(|hours| !hours.contains(query.minute_of_day));
        let when = match rule.when.as_ref().map(|when| when.holds(query)) {
            None | Some(Ok(true)) => None,
            Some(Ok(false)) => Some(Unmet::When),
            Some(Err(error)) => Some(Unmet::WhenError(error.0)),
        };
        let simple = [(hours, Unmet::Hours), (action, Unmet::Do), (on, Unmet::On), (who, Unmet::Who)];
        when.into_iter().chain(simple.into_iter().filter(|(unmet, _)| *unmet).map(|(_, unmet)| unmet))
    }

    /// The decision by the plain definition, rule by rule: the oracle for the index.
    #[cfg(test)]
    pub(super) fn decide_plainly(&self, query: &Query<'_>) -> (Effect, Option<RuleIndex>) {
        let Some(resource) = resource::canonical(query.action, query.resource) else { return (Effect::Deny, None) };
        let applies = |rule: &Rule| {
            self.unmet(rule, query, &resource)
                .all(|unmet| rule.effect == Effect::Deny && matches!(unmet, Unmet::WhenError(_)))
        };
        let first = |effect: Effect, sure: bool| {
            self.rules
                .iter()
                .enumerate()
                .filter(|(_, rule)| !sure || (rule.when.is_none() && rule.hours.is_none()))
                .find(|(_, rule)| rule.effect == effect && applies(rule))
                .map(|(at, _)| RuleIndex(at as u32))
        };
        // Among deny rules one that always holds is named first, because that answer can be kept.
        match (first(Effect::Deny, true).or_else(|| first(Effect::Deny, false)), first(Effect::Allow, false)) {
            (Some(rule), _) => (Effect::Deny, Some(rule)),
            (None, Some(rule)) => (Effect::Allow, Some(rule)),
            (None, None) => (Effect::Deny, None),
        }
    }
}

impl Rule {
    fn speaks_about(&self, query: &Query<'_>, resource: &str) -> bool {
        let device = query.device.map(|d| d.id.as_str());
        self.on.iter().any(|pattern| match (query.action, self.effect) {
            (Action::Subscribe, Effect::Allow) => pattern.covers(resource, device),
            (Action::Subscribe, Effect::Deny) => pattern.meets(resource, device),
            (_, effect) => pattern.matches(resource, device, effect),
        })
    }
}

impl Principal {
    pub(super) fn is(&self, device: Option<&Device>, role: &str) -> bool {
        match self {
            Principal::Anyone => true,
            Principal::Role(name) => **name == *role,
            Principal::Device(id) => device.is_some_and(|d| d.id.as_str() == &**id),
            Principal::Attribute(key, value) => {
                device.is_some_and(|d| d.attributes.iter().any(|(k, v)| k == key && v == value))
            }
        }
    }
}

impl Unmet {
    const fn distance(&self) -> u8 {
        match self {
            Unmet::Hours => 0,
            Unmet::WhenError(_) => 1,
            Unmet::When => 2,
            Unmet::Do => 3,
            Unmet::On => 4,
            Unmet::Who => 5,
        }
    }
}

impl From<&Rule> for RuleRef {
    fn from(rule: &Rule) -> Self {
        RuleRef { name: Arc::clone(&rule.name), effect: rule.effect, file: Arc::clone(&rule.file), line: rule.line }
    }
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" ({}:{})", self.name, self.file, self.line)
    }
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unmet::Hours => f.write_str("the time lies outside its hours"),
            Unmet::When => f.write_str("its when is false"),
            Unmet::WhenError(error) => write!(f, "its when cannot be evaluated: {error}"),
            Unmet::Do => f.write_str("its do lacks the action"),
            Unmet::On => f.write_str("its on does not match"),
            Unmet::Who => f.write_str("its who does not include the caller"),
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.rule, self.effect) {
            (Some(rule), effect) => write!(f, "{} by {rule}", effect.as_str())?,
            (None, _) if self.confusable => f.write_str("deny: the resource has no unambiguous spelling")?,
            (None, _) => f.write_str("deny: no rule allows it")?,
        }
        if let Some(bytes) = self.bytes_max {
            write!(f, ", up to {bytes} bytes")?;
        }
        if let Some(rate) = &self.rate {
            write!(f, ", {rate}")?;
        }
        for miss in &self.near {
            write!(f, "\n  near: {}: {}", miss.rule, miss.unmet)?;
        }
        Ok(())
    }
}
