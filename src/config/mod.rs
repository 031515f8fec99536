//! The configuration as a whole: composes every module's `Config`, loads it in layers, and says everything that is wrong with it at once.
//!
//! Promises: a configuration that [`load`] returns is complete and checked; one that it refuses comes with every problem, each with file,
//! line, key, value and what is allowed; arbitrary input never panics. Not here: what the keys mean (each module documents its own)
//! and reacting to changes of files ([`reload`] only compares and loads).

pub mod check;
pub mod defaults;
mod deserialize;
pub mod document;
mod layer;
pub mod policy_file;
pub mod problem;
pub mod reload;
pub mod schema;
pub mod show;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use layer::Inputs;
pub use problem::{Problem, Report, Severity};

use crate::policy::Policy;
use document::{KeyPath, Node, Step};
use schema::Schema;

/// The whole configuration. Each table is documented where its `Config` is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The gateway itself: who it is and where it keeps its data.
    pub gateway: crate::gateway::Config,
    /// Doors for devices.
    pub listener: Vec<crate::listener::Config>,
    /// The operator's address: admin API, metrics, health, dashboard.
    pub admin: crate::admin::Config,
    /// How devices prove who they are.
    pub identity: crate::identity::Config,
    /// Who may do what, in files of their own.
    pub policy: crate::policy::Config,
    /// Networks that may connect at all, checked before a byte is read. Deny wins.
    pub address_filter: crate::policy::address::Config,
    /// Every limit. What happens when one is reached is said at each.
    pub limits: crate::limit::Config,
    /// The durable queue.
    pub spool: crate::spool::Config,
    /// Cloud sides that rules and routes refer to by name.
    pub upstream: Vec<crate::upstream::Config>,
    /// The message plane: which topics go to which upstream, and with what promise.
    pub forward: Vec<crate::upstream::ForwardConfig>,
    /// The request plane: requests that are proxied to an upstream. The longest matching prefix wins.
    pub route: Vec<crate::gateway::RouteConfig>,
    /// Logs.
    pub telemetry: crate::telemetry::Config,
}

/// A configuration that may run.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    /// The compiled rules of the files in `[policy]`.
    pub policy: Policy,
    /// Warnings only.
    pub report: Report,
    /// Every file that was read; a change in one of them may change the configuration.
    pub files: Vec<PathBuf>,
    /// The merged document, with the place of every value that was written.
    pub document: Node,
}

/// Loads, merges and checks every layer.
///
/// # Errors
/// Every problem at once, warnings among them, if at least one is an error.
pub fn load(inputs: &Inputs) -> Result<Loaded, Report> {
    let schema = schema();
    let mut layered = layer::assemble(inputs, &schema, &defaults_text());
    let mut problems = layered.problems;
    let mut policy = Policy::deny_all();
    let mut readable = layered.root.clone();
    let mut config = Config::default();
    if !layered.broken {
        let mut refused = Vec::new();
        for finding in schema.check(&layered.root) {
            problems.push(finding.problem);
            readable.remove(&finding.prune);
            refused.push(finding.prune);
        }
        config = deserialize_all(&mut readable, &layered.root, &schema, &mut refused, &mut problems);
        check::check(&config, &layered.root, &refused, &mut problems);
        let named = |index| {
            let path = [Step::Key("policy".into()), Step::Key("files".into()), Step::Index(index)];
            layered.root.at_path(&path).map(|node| node.at)
        };
        policy = policy_file::load(&config.policy.files, named, &mut layered.sources, &mut problems);
        layered.files.extend(config.policy.files.iter().map(PathBuf::from));
    }
    let mut report = Report { sources: layered.sources, problems };
    report.sort();
    if report.errors() > 0 {
        return Err(report);
    }
    Ok(Loaded { config, policy, report, files: layered.files, document: layered.root })
}

/// The JSON schema of [`Config`].
pub fn schema() -> Schema {
    Schema::of::<Config>()
}

/// The defaults as TOML: the lowest layer, and the order in which keys are shown.
fn defaults_text() -> String {
    // Serialising our own defaults fails only if a `Config` holds a type that TOML cannot write, which the tests below exclude.
    toml::to_string(&Config::default()).unwrap_or_default()
}

/// Deserialises; whatever serde refuses is reported, removed and tried again, so that one bad value does not hide the next.
fn deserialize_all(
    readable: &mut Node,
    document: &Node,
    schema: &Schema,
    refused: &mut Vec<KeyPath>,
    problems: &mut Vec<Problem>,
) -> Config {
    const REFUSALS_MAX: usize = 200;
    for _ in 0..REFUSALS_MAX {
        match deserialize::from_node::<Config>(readable) {
            Ok(config) => return config,
            Err((path, message)) => {
                problems.push(refusal(readable, document, schema, &path, &message));
                if path.is_empty() {
                    break;
                }
                readable.remove(&path);
                refused.push(path);
            }
        }
    }
    Config::default()
}

/// Turns what serde said into a problem at the value's place, without repeating a secret.
fn refusal(readable: &Node, document: &Node, schema: &Schema, path: &[Step], message: &str) -> Problem {
    let node = readable.at_path(path);
    let key = node_key(readable, document, path);
    let secret =
        key.rsplit('.').next().is_some_and(problem::is_secret_key) || node.is_some_and(|n| n.written.is_some());
    let message = if secret { "the value is not valid".to_owned() } else { problem::mask_urls(message) };
    let segments: Vec<String> = path
        .iter()
        .map(|step| match step {
            Step::Key(key) => key.clone(),
            Step::Index(index) => index.to_string(),
        })
        .collect();
    let mut problem = Problem::error(message).key(key);
    if let Some(schema_here) = schema.at(&segments) {
        problem = problem.allowed(schema.describe(schema_here));
    }
    match node {
        Some(node) => problem.value(node).at(node.at),
        None => problem,
    }
}

/// The key path for people. Pruning may have shifted list indexes in `readable`, so entries are found by name where they have one.
fn node_key(readable: &Node, document: &Node, path: &[Step]) -> String {
    let key = readable.render_path(path);
    if key.is_empty() { document.render_path(path) } else { key }
}

#[cfg(test)]
mod tests;
