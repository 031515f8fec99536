//! The policy decision by itself: what every message and request pays.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use tidegate::message::{Action, Device, DeviceId, Protocol};
use tidegate::policy::{DecisionCache, Policy, Query, RuleSource};

use crate::report::{Fact, Ordering, Section};
use crate::{Failure, Result};

const RULES: usize = 1_000;
const DECISIONS: u32 = 500_000;
const ROUNDS: usize = 7;

pub fn run() -> Section {
    let mut section = Section::new("Policy decision", "");
    match measure() {
        Ok((cached, uncached)) => {
            let mut fact = |what: &str, value, bar| {
                let bar = Some((Ordering::AtMost, bar));
                section.facts.push(Fact {
                    what: format!("{what}, {RULES} rules"),
                    server: "tidegate".into(),
                    value,
                    unit: "ns",
                    bar,
                });
            };
            fact("cached", cached, 100.0);
            fact("uncached", uncached, 300.0);
        }
        Err(error) => section.fail("policy decision", "tidegate", error.to_string()),
    }
    section
}

/// Nanoseconds per decision, from memory and anew: the least of a few rounds, for noise only adds.
fn measure() -> Result<(f64, f64)> {
    let policy = Policy::compile(rules("10/s burst 20")?).map_err(|problems| Failure::new(format!("{problems:?}")))?;
    let devices: Vec<Device> = (0..64).map(device).collect::<Result<_>>()?;
    let topics: Vec<String> = devices.iter().map(|device| format!("dev/{}/telemetry/climate", device.id)).collect();
    let mut caches: Vec<DecisionCache> = devices.iter().map(|_| DecisionCache::new()).collect();
    let mut allowed = 0_u32;
    let mut time = |decide: &mut dyn FnMut(usize, &Query<'_>) -> bool| {
        let mut least = f64::MAX;
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for at in 0..DECISIONS as usize {
                let at = at % devices.len();
                let query = Query {
                    device: devices.get(at),
                    role: "sensor",
                    action: Action::Publish,
                    resource: &topics[at],
                    size: 64,
                    minute_of_day: 600,
                    protocol: Protocol::Mqtt,
                };
                allowed += u32::from(decide(at, black_box(&query)));
            }
            least = least.min(start.elapsed().as_nanos() as f64 / f64::from(DECISIONS));
        }
        least
    };
    let cached = time(&mut |at, query| caches[at].decide(&policy, query).is_allowed());
    let uncached = time(&mut |_, query| policy.decide(query).is_allowed());
    if allowed != DECISIONS * ROUNDS as u32 * 2 {
        return Err(Failure::new(format!("{allowed} decisions allowed, all should be")));
    }
    Ok((cached, uncached))
}

fn device(index: usize) -> Result<Device> {
    let id = DeviceId::parse(&format!("bench-{index:05}")).map_err(|error| Failure::new(error.to_string()))?;
    Ok(Device {
        id,
        index: index as u32,
        generation: 1,
        role: Arc::from("sensor"),
        attributes: vec![("site".into(), "7".into())],
    })
}

/// What decides stands in the middle of rules for other roles, attributes, devices and topics.
pub fn rules(rate: &str) -> Result<Vec<RuleSource>> {
    (0..RULES)
        .map(|number| {
            let (who, on) = match number % 4 {
                _ if number == RULES / 2 => ("role:sensor".to_owned(), "dev/{device}/telemetry/#".to_owned()),
                0 => (format!("role:r{number}"), "dev/{device}/#".to_owned()),
                1 => (format!("attr:site={}", number + 1_000), format!("site/{number}/+/#")),
                2 => (format!("device:machine-{number}"), format!("dev/machine-{number}/#")),
                _ => ("role:sensor".to_owned(), format!("plant/{number}/line/+/state")),
            };
            let rule =
                json!({ "name": format!("rule {number}"), "who": [who], "do": ["publish"], "on": [on], "rate": rate });
            Ok(RuleSource { rule: serde_json::from_value(rule)?, file: "bench".into(), line: number as u32 + 1 })
        })
        .collect()
}
