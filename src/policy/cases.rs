//! `tidegate policy test FILE`: a table of questions with the answers they must get.
//!
//! ```toml
//! [[case]]
//! device   = "sensor-1"          # absent: anonymous
//! role     = "sensor"
//! attrs    = { site = "north" }
//! action   = "publish"
//! resource = "dev/sensor-1/telemetry"
//! size     = 100
//! at       = "12:00"
//! protocol = "mqtt"
//! expect   = "allow"
//! rule     = "sensors write their own telemetry"    # optional: the rule that must decide
//! ```

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::rule::minute_of_day;
use super::{Effect, Explanation, Policy, Query};
use crate::message::{Action, Device, DeviceId, Protocol};

/// A file of cases.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CasesFile {
    pub case: Vec<Case>,
}

/// One question and its expected answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// The caller's id; absent: anonymous.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    #[serde(default)]
    pub role: String,
    #[serde(default)]
    pub attrs: BTreeMap<String, String>,
    pub action: String,
    pub resource: String,
    /// Payload bytes.
    #[serde(default)]
    pub size: u64,
    /// Local time of day, `HH:MM`.
    #[serde(default = "noon")]
    pub at: String,
    /// mqtt, http or coap.
    #[serde(default = "mqtt")]
    pub protocol: String,
    pub expect: Effect,
    /// The name of the rule that must decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}

fn noon() -> String {
    "12:00".to_owned()
}

fn mqtt() -> String {
    "mqtt".to_owned()
}

/// A case that asks no question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidCase {
    pub key: &'static str,
    pub value: String,
    pub allowed: &'static str,
}

impl fmt::Display for InvalidCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {:?} is not {}", self.key, self.value, self.allowed)
    }
}

impl std::error::Error for InvalidCase {}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaseOutcome {
    pub passed: bool,
    pub explanation: Explanation,
}

impl Policy {
    /// Asks the question of `case` and compares.
    ///
    /// # Errors
    /// The key of the case that is not understood.
    pub fn test(&self, case: &Case) -> Result<CaseOutcome, InvalidCase> {
        let invalid = |key, value: &str, allowed| InvalidCase { key, value: value.to_owned(), allowed };
        let attributes = case.attrs.iter().map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect();
        let device = match &case.device {
            None => None,
            Some(id) => Some(Device {
                id: DeviceId::parse(id).map_err(|_| invalid("device", id, "a device id"))?,
                index: 0,
                generation: 0,
                role: case.role.as_str().into(),
                attributes,
            }),
        };
        let protocol = [Protocol::Mqtt, Protocol::Http, Protocol::Coap].into_iter();
        let query = Query {
            device: device.as_ref(),
            role: &case.role,
            action: Action::parse(&case.action).ok_or_else(|| invalid("action", &case.action, "an action"))?,
            resource: &case.resource,
            size: case.size,
            minute_of_day: minute_of_day(&case.at)
                .filter(|minute| *minute < 1_440)
                .ok_or_else(|| invalid("at", &case.at, "a time HH:MM"))?,
            protocol: protocol
                .into_iter()
                .find(|p| p.as_str() == case.protocol)
                .ok_or_else(|| invalid("protocol", &case.protocol, "mqtt, http or coap"))?,
        };
        let explanation = self.explain(&query);
        let by_rule = match &case.rule {
            None => true,
            Some(name) => explanation.rule.as_ref().is_some_and(|rule| *rule.name == **name),
        };
        let fits = explanation.bytes_max.is_none_or(|max| case.size <= max);
        let effect = if fits { explanation.effect } else { Effect::Deny };
        Ok(CaseOutcome { passed: effect == case.expect && by_rule, explanation })
    }
}
