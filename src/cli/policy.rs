//! `tidegate policy explain | test`: what the policy files say, asked without a running gateway.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Context, Exit, Failure};
use crate::config::{Config, Loaded, policy_file};
use crate::identity::{Error, Registry};
use crate::message::{Action, DeviceId};
use crate::policy::{Case, CaseOutcome, Effect, Explanation, InvalidCase};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Say whether a device may do something, and which rule decides, with its file and line.
    Explain(Explain),
    /// Ask a table of questions and compare with the answers expected.
    Test {
        /// A file of `[[case]]` tables, such as the policy-cases.toml that `tidegate init` writes.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Explain {
    /// The device; '' is a caller without any credential.
    id: String,
    /// publish, subscribe, read, command, admin, or an HTTP method in capitals.
    action: String,
    /// A topic such as dev/sensor-1/telemetry, a filter for subscribe, a path for an HTTP method.
    resource: String,
    /// Bytes of the payload.
    #[arg(long, default_value_t = 0, value_name = "BYTES")]
    size: u64,
    /// Local time of day [default: now].
    #[arg(long, value_name = "HH:MM")]
    at: Option<String>,
    /// mqtt, http or coap.
    #[arg(long, default_value = "mqtt")]
    protocol: String,
    /// Ask for a device of this role that need not be registered.
    #[arg(long)]
    role: Option<String>,
    /// An attribute of such a device; may be repeated.
    #[arg(long = "attr", value_name = "KEY=VALUE", requires = "role")]
    attributes: Vec<String>,
}

pub fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let loaded = context.load()?;
    match &arguments.command {
        PolicyCommand::Explain(asked) => explain(context, &loaded, asked),
        PolicyCommand::Test { file } => test(context, &loaded, file),
    }
}

fn explain(context: &Context, loaded: &Loaded, asked: &Explain) -> Result<(), Failure> {
    let Caller { device, role, attributes } = caller(&loaded.config, asked)?;
    let case = Case {
        device,
        role,
        attrs: attributes,
        action: asked.action.clone(),
        resource: asked.resource.clone(),
        size: asked.size,
        at: asked.at.clone().unwrap_or_else(|| local_time(&loaded.config)),
        protocol: asked.protocol.clone(),
        expect: Effect::Allow,
        rule: None,
    };
    let outcome = loaded.policy.test(&case).map_err(|invalid| not_understood(&invalid))?;
    if context.json {
        let mut json = to_json(&outcome.explanation, asked.size)?;
        if let Some(object) = json.as_object_mut() {
            object.insert("role".into(), case.role.into());
        }
        return context.print_json(&json);
    }
    context.print(&format!("{}\n", for_people(&outcome.explanation, asked.size)))
}

/// Whom the question is about.
struct Caller {
    device: Option<String>,
    role: String,
    attributes: BTreeMap<String, String>,
}

fn caller(config: &Config, asked: &Explain) -> Result<Caller, Failure> {
    if let Some(role) = &asked.role {
        let pair = |text: &String| {
            let pair = text.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
            pair.ok_or_else(|| Failure::input(format!("--attr `{text}`: write KEY=VALUE")))
        };
        let attributes = asked.attributes.iter().map(pair).collect::<Result<_, _>>()?;
        return Ok(Caller { device: Some(asked.id.clone()), role: role.clone(), attributes });
    }
    if asked.id.is_empty() {
        let role = config.identity.anonymous_role.clone();
        return Ok(Caller { device: None, role, attributes: BTreeMap::new() });
    }
    let id = super::device::device_id(&asked.id)?;
    let record = registered(config, &id)?;
    let record = record.ok_or_else(|| {
        super::device::failure(Error::UnknownDevice(id)).help("`--role ROLE` asks for a device that is not registered")
    })?;
    if !record.enabled {
        return Err(Failure::input(format!("{} is revoked, so it may do nothing", record.id))
            .help("`tidegate device enable` lets it in again; `--role ROLE` asks all the same"));
    }
    let attributes = record.attributes.into_iter().collect();
    Ok(Caller { device: Some(asked.id.clone()), role: record.role, attributes })
}

/// Only reads: a question makes no registry.
fn registered(config: &Config, id: &DeviceId) -> Result<Option<crate::identity::Record>, Failure> {
    let data_dir = &config.gateway.data_dir;
    if !data_dir.join(Registry::FILE).exists() {
        return Ok(None);
    }
    Registry::open(data_dir).and_then(|registry| registry.get(id)).map_err(super::device::failure)
}

fn local_time(config: &Config) -> String {
    let minutes = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 60);
    let local = i64::try_from(minutes).unwrap_or(0) + i64::from(config.gateway.utc_offset_minutes);
    let of_day = local.rem_euclid(1_440);
    format!("{:02}:{:02}", of_day / 60, of_day % 60)
}

fn not_understood(invalid: &InvalidCase) -> Failure {
    let failure = Failure::input(invalid.to_string());
    if invalid.key == "action" {
        let actions: Vec<&str> = Action::ALL.iter().map(|action| action.as_str()).collect();
        return failure.help(format!("actions are {}", actions.join(", ")));
    }
    failure
}

/// Allowed by a rule, and not too large for it.
fn is_allowed(explanation: &Explanation, size: u64) -> bool {
    explanation.effect == Effect::Allow && explanation.bytes_max.is_none_or(|max| size <= max)
}

fn for_people(explanation: &Explanation, size: u64) -> String {
    if explanation.effect == Effect::Allow && !is_allowed(explanation, size) {
        return format!("deny: {size} bytes are too large; {explanation}");
    }
    explanation.to_string()
}

fn to_json(explanation: &Explanation, size: u64) -> Result<Value, Failure> {
    let mut json = serde_json::to_value(explanation).map_err(|error| Failure::fault(error.to_string()))?;
    if let Some(object) = json.as_object_mut() {
        object.insert("allowed".into(), is_allowed(explanation, size).into());
    }
    Ok(json)
}

fn test(context: &Context, loaded: &Loaded, file: &std::path::Path) -> Result<(), Failure> {
    let cases = match policy_file::load_cases(file) {
        Ok(cases) => cases.case,
        Err(report) => {
            context.print_report(&report)?;
            return Err(Failure::silent(Exit::Input));
        }
    };
    let mut failed = 0;
    let mut text = String::new();
    let mut rows = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let outcome = loaded.policy.test(case);
        let passed = outcome.as_ref().is_ok_and(|outcome| outcome.passed);
        failed += usize::from(!passed);
        if context.json {
            rows.push(row(case, &outcome));
        } else if !passed {
            text.push_str(&format!("case {}: {}\n", index + 1, complaint(case, &outcome)));
        }
    }
    if context.json {
        context.print_json(&json!({ "cases": cases.len(), "failed": failed, "results": rows }))?;
    } else {
        let all = format!("{} cases, {failed} failed\n", cases.len());
        context.print(&(text + &all))?;
    }
    if failed == 0 { Ok(()) } else { Err(Failure::silent(Exit::Input)) }
}

fn row(case: &Case, outcome: &Result<CaseOutcome, InvalidCase>) -> Value {
    match outcome {
        Ok(outcome) => json!({ "case": case, "passed": outcome.passed, "explanation": outcome.explanation }),
        Err(invalid) => json!({ "case": case, "passed": false, "error": invalid.to_string() }),
    }
}

fn complaint(case: &Case, outcome: &Result<CaseOutcome, InvalidCase>) -> String {
    let who = case.device.as_deref().unwrap_or("anonymous");
    let question = format!("{who} {} {}", case.action, case.resource);
    let expected = match &case.rule {
        Some(rule) => format!("{} by \"{rule}\"", case.expect.as_str()),
        None => case.expect.as_str().to_owned(),
    };
    match outcome {
        Ok(outcome) => {
            format!("{question}\n  expected {expected}\n  got {}", for_people(&outcome.explanation, case.size))
        }
        Err(invalid) => format!("{question}\n  {invalid}"),
    }
}
