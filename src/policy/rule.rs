//! One rule: as written in `policy.toml`, and as checked.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::condition::{self, Condition};
use super::pattern::Pattern;
use crate::message::{Action, DeviceId};
use crate::units::{ByteSize, Rate};

/// The `[policy]` table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Files with `[[rule]]` tables, relative to this file, read in this order. Without a rule that allows it, nothing is allowed.
    #[schemars(extend("format" = "path"))]
    pub files: Vec<String>,
}

/// A policy file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RulesFile {
    /// Rules in the order of their evaluation: any deny that matches wins; otherwise the first allow that matches decides.
    pub rule: Vec<RuleConfig>,
}

/// One `[[rule]]`. Quantities stay text here, so that all problems of a file are reported at once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// A sentence, unique over all files: it stands in refusals, logs and explanations.
    pub name: String,
    /// Whom it speaks about, any of: `device:ID`, `role:NAME`, `attr:KEY=VALUE`, `anyone`.
    pub who: Vec<String>,
    /// Actions, any of: publish, subscribe, read, command, admin, GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, CONNECT.
    #[serde(rename = "do")]
    pub actions: Vec<String>,
    /// Topics or paths, any of: segments between `/`, with `{device}`, `+`, `*`, and `#` or `**` at the end.
    pub on: Vec<String>,
    /// A CEL expression that must hold too, over msg, device, time, protocol and action. At most 1024 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// A token bucket of each caller for what this rule allows: `"10/s burst 50"`. Beyond it: too fast.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<String>,
    /// Largest payload that this rule allows. Beyond it: too large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_max: Option<ByteSize>,
    /// Local time of day in which the rule holds: `"06:00-22:00"`, also over midnight; the end is excluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hours: Option<String>,
    /// `allow` or `deny`. A deny wins over every allow.
    #[serde(default)]
    pub effect: Effect,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    #[default]
    Allow,
    Deny,
}

impl Effect {
    pub const fn as_str(self) -> &'static str {
        match self {
            Effect::Allow => "allow",
            Effect::Deny => "deny",
        }
    }
}

/// A rule and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleSource {
    pub rule: RuleConfig,
    pub file: String,
    pub line: u32,
}

/// Something wrong in a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub file: String,
    pub line: u32,
    /// The key within the rule, e.g. `when`.
    pub key: &'static str,
    pub value: String,
    /// A lowercase clause that continues the value: "is not ...".
    pub what: String,
    pub allowed: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Problem { file, line, key, value, what, allowed } = self;
        write!(f, "{file}:{line}: {key} = {value:?} {what}; allowed: {allowed}")
    }
}

/// A rule, checked.
#[derive(Debug)]
pub(super) struct Rule {
    pub name: Arc<str>,
    pub file: Arc<str>,
    pub line: u32,
    pub effect: Effect,
    pub who: Vec<Principal>,
    pub actions: ActionSet,
    pub on: Vec<Pattern>,
    pub when: Option<Condition>,
    pub rate: Option<Rate>,
    pub bytes_max: Option<u64>,
    pub hours: Option<Hours>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Principal {
    Anyone,
    Device(Box<str>),
    Role(Box<str>),
    Attribute(Box<str>, Box<str>),
}

/// A set of actions in one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ActionSet(u16);

impl ActionSet {
    pub const fn one(action: Action) -> Self {
        ActionSet(1 << action as u16)
    }

    pub const fn union(self, other: ActionSet) -> Self {
        ActionSet(self.0 | other.0)
    }

    pub const fn without(self, other: ActionSet) -> Self {
        ActionSet(self.0 & !other.0)
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub const fn meets(self, other: ActionSet) -> bool {
        self.0 & other.0 != 0
    }

    pub const fn covers(self, other: ActionSet) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A span of the local day, in minutes; over midnight when the start is later than the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hours {
    from: u16,
    to: u16,
}

impl Hours {
    pub fn parse(text: &str) -> Option<Self> {
        let (from, to) = text.split_once('-')?;
        let hours = Hours { from: minute_of_day(from.trim())?, to: minute_of_day(to.trim())? };
        (hours.from != hours.to && hours.from != 1_440).then_some(hours)
    }

    pub fn contains(self, minute: u16) -> bool {
        if self.from < self.to {
            (self.from..self.to).contains(&minute)
        } else {
            minute >= self.from || minute < self.to
        }
    }
}

/// `HH:MM`, up to 24:00.
pub(super) fn minute_of_day(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let number = |t: &str, max: u16| {
        let two_digits = t.len() == 2 && t.bytes().all(|b| b.is_ascii_digit());
        t.parse::<u16>().ok().filter(|n| two_digits && *n <= max)
    };
    let minutes = number(hour, 24)? * 60 + number(minute, 59)?;
    (minutes <= 1_440).then_some(minutes)
}

/// A topic action takes topics and filters; every other action takes a path, and CONNECT an authority.
pub(super) const fn takes_topic(action: Action) -> bool {
    matches!(action, Action::Publish | Action::Subscribe | Action::Read | Action::Command)
}

/// Checks every rule; all problems, in the order of the sources.
pub(super) fn check(sources: Vec<RuleSource>) -> Result<Vec<Rule>, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut names: HashMap<String, (String, u32)> = HashMap::new();
    let mut rules = Vec::with_capacity(sources.len());
    for RuleSource { rule, file, line } in sources {
        let mut checker = Checker { file: &file, line, problems: &mut problems };
        let checked = checker.rule(&rule);
        if let Some((file, line)) = names.insert(rule.name.clone(), (file.clone(), line)) {
            checker.report(
                "name",
                &rule.name,
                format!("is also the name of the rule at {file}:{line}"),
                "a name used once",
            );
        }
        rules.extend(checked);
    }
    if problems.is_empty() { Ok(rules) } else { Err(problems) }
}

struct Checker<'c> {
    file: &'c str,
    line: u32,
    problems: &'c mut Vec<Problem>,
}

impl Checker<'_> {
    fn report(&mut self, key: &'static str, value: &str, what: impl Into<String>, allowed: &str) {
        self.problems.push(Problem {
            file: self.file.to_owned(),
            line: self.line,
            key,
            value: value.to_owned(),
            what: what.into(),
            allowed: allowed.to_owned(),
        });
    }

    fn rule(&mut self, config: &RuleConfig) -> Option<Rule> {
        let before = self.problems.len();
        if config.name.trim().is_empty() || config.name.len() > 200 || config.name.chars().any(char::is_control) {
            self.report("name", &config.name, "is not a name", "1 to 200 bytes of one line");
        }
        let who = self.each("who", &config.who, ALLOWED_WHO, |text| {
            principal(text).ok_or_else(|| "is nobody the registry can know".to_owned())
        });
        let actions = self.each("do", &config.actions, ALLOWED_DO, |text| {
            Action::parse(text).map(ActionSet::one).ok_or_else(|| match Action::parse(&text.to_ascii_uppercase()) {
                Some(action) => format!("is not an action; did you mean {}", action.as_str()),
                None => match Action::parse(&text.to_ascii_lowercase()) {
                    Some(action) => format!("is not an action; did you mean {}", action.as_str()),
                    None => "is not an action".to_owned(),
                },
            })
        });
        let on = self.each("on", &config.on, ALLOWED_ON, |text| Pattern::parse(text).map_err(str::to_owned));
        let actions = actions.into_iter().fold(ActionSet::default(), ActionSet::union);
        self.paths_and_topics(config, actions, &on);
        let when = self.optional("when", config.when.as_deref(), ALLOWED_WHEN, Condition::compile);
        let rate = self.optional("rate", config.rate.as_deref(), Rate::ALLOWED, |text| {
            text.parse::<Rate>().map_err(|_| "is not a rate".to_owned())
        });
        let hours = self.optional("hours", config.hours.as_deref(), "\"HH:MM-HH:MM\", two different times", |text| {
            Hours::parse(text).ok_or_else(|| "is not a span of the day".to_owned())
        });
        if config.effect == Effect::Deny {
            if let Some(rate) = &config.rate {
                self.report("rate", rate, "stands in a deny rule, where it means nothing", "only in allow rules");
            }
            if let Some(size) = config.bytes_max {
                let allowed = format!("only in allow rules; to deny by size write when = \"msg.size > {}\"", size.0);
                self.report("bytes_max", &size.to_string(), "stands in a deny rule", &allowed);
            }
        }
        (self.problems.len() == before).then(|| Rule {
            name: config.name.as_str().into(),
            file: self.file.into(),
            line: self.line,
            effect: config.effect,
            who,
            actions,
            on,
            when,
            rate,
            bytes_max: config.bytes_max.map(|size| size.0),
            hours,
        })
    }

    /// A rule about requests alone needs at least one pattern that a path can match.
    fn paths_and_topics(&mut self, config: &RuleConfig, actions: ActionSet, on: &[Pattern]) {
        let takes_other = |action: Action| takes_topic(action) || action == Action::Connect;
        let only_paths = !Action::ALL.into_iter().filter(|a| takes_other(*a)).any(|a| actions.meets(ActionSet::one(a)));
        if only_paths && !on.is_empty() && !on.iter().any(Pattern::may_match_path) {
            let value = config.on.join(", ");
            self.report(
                "on",
                &value,
                "matches no path, but every action of the rule takes one",
                "a path begins with /",
            );
        }
    }

    fn each<T>(
        &mut self,
        key: &'static str,
        texts: &[String],
        allowed: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        if texts.is_empty() {
            self.report(key, "[]", "is empty, so the rule would never apply", allowed);
        }
        let mut parsed = Vec::with_capacity(texts.len());
        for text in texts {
            match parse(text) {
                Ok(value) => parsed.push(value),
                Err(what) => self.report(key, text, what, allowed),
            }
        }
        parsed
    }

    fn optional<T>(
        &mut self,
        key: &'static str,
        text: Option<&str>,
        allowed: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = text?;
        parse(text).map_err(|what| self.report(key, text, what, allowed)).ok()
    }
}

fn principal(text: &str) -> Option<Principal> {
    if text == "anyone" {
        return Some(Principal::Anyone);
    }
    match text.split_once(':')? {
        ("device", id) => DeviceId::parse(id).ok().map(|id| Principal::Device(id.as_str().into())),
        ("role", role) if !role.is_empty() => Some(Principal::Role(role.into())),
        ("attr", pair) => {
            let (key, value) = pair.split_once('=').filter(|(key, _)| !key.is_empty())?;
            Some(Principal::Attribute(key.into(), value.into()))
        }
        _ => None,
    }
}

const ALLOWED_WHO: &str = "device:ID, role:NAME, attr:KEY=VALUE, anyone";
const ALLOWED_DO: &str =
    "publish, subscribe, read, command, admin, GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, CONNECT";
const ALLOWED_ON: &str = "a topic or path of segments, each text, {device}, + or *, with # or ** only at the end";
const ALLOWED_WHEN: &str = "a CEL expression over msg.size, msg.topic, device.id, device.role, device.attrs, time.hour, \
                            time.minute, time.minute_of_day, protocol, action; at most 1024 bytes";
const _: () = assert!(condition::BYTES_MAX == 1_024);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_may_run_over_midnight_and_exclude_their_end() {
        let day = Hours::parse("06:00-22:00").unwrap();
        assert!(day.contains(6 * 60) && day.contains(22 * 60 - 1));
        assert!(!day.contains(22 * 60) && !day.contains(5 * 60 + 59));
        let night = Hours::parse("22:00-06:00").unwrap();
        assert!(night.contains(23 * 60) && night.contains(0) && !night.contains(6 * 60));
        let evening = Hours::parse("18:00-24:00").unwrap();
        assert!(evening.contains(1_439) && !evening.contains(0));
        for bad in [
            "",
            "6:00-22:00",
            "06:00",
            "06:00-06:00",
            "06:60-07:00",
            "25:00-26:00",
            "24:00-06:00",
            "24:30-01:00",
            "+6:00-07:00",
        ] {
            assert_eq!(Hours::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_action_has_its_own_bit() {
        let mut all = ActionSet::default();
        for action in Action::ALL {
            assert!(!all.meets(ActionSet::one(action)));
            all = all.union(ActionSet::one(action));
        }
        assert!(Action::ALL.into_iter().all(|a| all.covers(ActionSet::one(a))));
    }
}
