//! Rules that can never decide, because others always do so before them: for `tidegate check`.
//!
//! A rule is one statement for each of its callers, actions and patterns, and never decides when every one of them is decided elsewhere: by a deny rule
//! wherever it stands, or by an earlier rule of the same effect; in both cases without `when` and `hours`. What is not seen: conditions that imply each
//! other, and patterns that only several others cover together. So a warning is always right, and silence proves nothing.

use super::pattern::{Pattern, Segment};
use super::rule::{ActionSet, Effect, Principal, Rule};
use super::{Policy, RuleIndex};

/// A rule that never decides, and those that do instead, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shadowed {
    pub rule: RuleIndex,
    pub by: Vec<RuleIndex>,
}

impl Policy {
    /// All rules that never decide.
    pub fn shadowed(&self) -> Vec<Shadowed> {
        let index = |at: usize| RuleIndex(u32::try_from(at).unwrap_or(u32::MAX));
        let numbered = || self.rules.iter().enumerate();
        let found = numbered().filter_map(|(at, rule)| {
            let before = numbered().filter(|(other_at, other)| {
                let decides_first = *other_at < at && other.effect == rule.effect
                    || other.effect == Effect::Deny && rule.effect == Effect::Allow;
                decides_first && other.when.is_none() && other.hours.is_none() && other.actions.meets(rule.actions)
            });
            let by = deciders(rule, before)?;
            Some(Shadowed { rule: index(at), by: by.into_iter().map(index).collect() })
        });
        found.collect()
    }
}

/// Those of `before` that decide all that `rule` speaks about; `None` when something is left to it.
fn deciders<'r>(rule: &Rule, before: impl Iterator<Item = (usize, &'r Rule)>) -> Option<Vec<usize>> {
    let mut left: Vec<(&Principal, &Pattern, ActionSet)> =
        rule.who.iter().flat_map(|who| rule.on.iter().map(move |on| (who, on, rule.actions))).collect();
    let mut by = Vec::new();
    for (at, other) in before {
        let mut decides = false;
        for (who, on, actions) in &mut left {
            if other.actions.meets(*actions)
                && other.who.iter().any(|principal| *principal == Principal::Anyone || principal == *who)
                && other.on.iter().any(|pattern| includes(pattern, on, other.effect))
            {
                *actions = actions.without(other.actions);
                decides = true;
            }
        }
        if decides {
            by.push(at);
            left.retain(|(_, _, actions)| !actions.is_empty());
            if left.is_empty() {
                return Some(by);
            }
        }
    }
    None
}

/// Whether `outer`, in a rule of this effect, matches whatever `inner` does.
fn includes(outer: &Pattern, inner: &Pattern, effect: Effect) -> bool {
    let begins_wild = !matches!(outer.segments.first(), Some(Segment::Literal(_) | Segment::Device { .. }));
    let dollar = match inner.segments.first() {
        Some(Segment::Literal(text) | Segment::Device { prefix: text, .. }) => text.starts_with('$'),
        _ => false,
    };
    if effect == Effect::Allow && begins_wild && dollar {
        return false;
    }
    let long_enough = if outer.rest {
        inner.segments.len() >= outer.segments.len()
    } else {
        inner.segments.len() == outer.segments.len() && !inner.rest
    };
    long_enough && outer.segments.iter().zip(&inner.segments).all(|(outer, inner)| outer.includes(inner))
}

impl Segment {
    fn includes(&self, inner: &Segment) -> bool {
        match self {
            Segment::One => true,
            // An id is never empty.
            Segment::OneNotEmpty => match inner {
                Segment::Literal(text) => !text.is_empty(),
                Segment::Device { .. } | Segment::OneNotEmpty => true,
                Segment::One => false,
            },
            Segment::Literal(_) | Segment::Device { .. } => self == inner,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pattern::tests::{any_pattern, any_topic};
    use super::super::{RuleConfig, RuleSource};
    use super::*;
    use crate::message::{Action, Device, DeviceId, Protocol};
    use crate::policy::Query;
    use proptest::prelude::*;

    fn policy(rules: &[&str]) -> Policy {
        let source = |(at, text): (usize, &&str)| {
            let mut rule: RuleConfig = toml::from_str(&format!("name = \"{at}\"\n{text}")).unwrap();
            rule.name = at.to_string();
            RuleSource { rule, file: "p".into(), line: u32::try_from(at).unwrap() }
        };
        Policy::compile(rules.iter().enumerate().map(source).collect()).unwrap()
    }

    fn shadowed(rules: &[&str]) -> Vec<(u32, Vec<u32>)> {
        let found = policy(rules).shadowed();
        found.into_iter().map(|Shadowed { rule, by }| (rule.0, by.into_iter().map(|by| by.0).collect())).collect()
    }

    const OWN: &str = "who = [\"role:sensor\"]\ndo = [\"publish\"]\non = [\"dev/{device}/#\"]\n";

    #[test]
    fn a_rule_that_leaves_nothing_shadows_what_follows() {
        let wide = "who = [\"anyone\"]\ndo = [\"publish\", \"read\"]\non = [\"dev/#\"]\n";
        assert_eq!(shadowed(&[wide, OWN]), [(1, vec![0])]);
        assert_eq!(shadowed(&[OWN, wide]), []);
        let plus = "who = [\"role:sensor\"]\ndo = [\"publish\"]\non = [\"dev/*/#\"]\n";
        assert_eq!(shadowed(&[plus, OWN]), [(1, vec![0])]);
    }

    #[test]
    fn a_deny_shadows_an_allow_wherever_it_stands_and_never_the_other_way() {
        let deny = "who = [\"anyone\"]\ndo = [\"publish\"]\non = [\"#\"]\neffect = \"deny\"\n";
        assert_eq!(shadowed(&[OWN, deny]), [(0, vec![1])]);
        assert_eq!(shadowed(&[OWN, &format!("{OWN}effect = \"deny\"\nhours = \"06:00-07:00\"\n")]), []);
        let allow = "who = [\"anyone\"]\ndo = [\"publish\"]\non = [\"#\"]\n";
        assert_eq!(shadowed(&[allow, &format!("{OWN}effect = \"deny\"\n")]), []);
    }

    #[test]
    fn several_rules_may_share_the_work() {
        let read = "who = [\"role:a\"]\ndo = [\"read\"]\non = [\"x/#\"]\n";
        let publish = "who = [\"anyone\"]\ndo = [\"publish\"]\non = [\"x/#\"]\n";
        let both = "who = [\"role:a\"]\ndo = [\"read\", \"publish\"]\non = [\"x/y\", \"x\"]\n";
        assert_eq!(shadowed(&[read, publish, both]), [(2, vec![0, 1])]);
        assert_eq!(shadowed(&[read, publish, &both.replace("role:a", "role:b")]), []);
        assert_eq!(shadowed(&[read, publish, &both.replace("\"x\"]", "\"z\"]")]), []);
    }

    #[test]
    fn an_allow_for_everything_leaves_the_dollar_topics() {
        let all = "who = [\"anyone\"]\ndo = [\"read\"]\non = [\"#\"]\n";
        let own = "who = [\"anyone\"]\ndo = [\"read\"]\non = [\"$SYS/#\"]\n";
        assert_eq!(shadowed(&[all, own]), []);
        assert_eq!(shadowed(&[&format!("{all}effect = \"deny\"\n"), own]), [(1, vec![0])]);
    }

    proptest! {
        #[test]
        fn a_shadowed_rule_never_decides(
            on in prop::collection::vec(any_pattern(), 1..6),
            deny in prop::collection::vec(any::<bool>(), 6),
            topics in prop::collection::vec(any_topic(), 1..40),
        ) {
            let rules: Vec<String> = on.iter().zip(deny).map(|(on, deny)| {
                let effect = if deny { "deny" } else { "allow" };
                format!("who = [\"anyone\"]\ndo = [\"publish\"]\non = [\"{on}\"]\neffect = \"{effect}\"\n")
            }).collect();
            let policy = policy(&rules.iter().map(String::as_str).collect::<Vec<_>>());
            let device = Device { id: DeviceId::parse("dev-1").unwrap(), index: 1, generation: 0, role: "r".into(), attributes: vec![] };
            for shadowed in policy.shadowed() {
                for topic in &topics {
                    let decided = policy.decide(&Query {
                        device: Some(&device), role: "r", action: Action::Publish, resource: topic, size: 0, minute_of_day: 0, protocol: Protocol::Mqtt,
                    });
                    prop_assert_ne!(decided.rule, Some(shadowed.rule), "{} by {:?}", topic, rules);
                }
            }
        }
    }
}
