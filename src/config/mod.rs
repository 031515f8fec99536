//! The configuration as a whole: composes every module's `Config`, loads it in layers, and says everything that is wrong with it at once.
//!
//! Promises: a configuration that [`load`] returns is complete and checked; one that it refuses comes with every problem, each with file,
//! line, key, value and what is allowed; arbitrary input never panics. Not here: what the keys mean (each module documents its own)
//! and reacting to changes of files ([`reload`] only compares and loads).

pub mod check;
pub mod defaults;
mod deserialize;
pub mod document;
pub mod gateway;
mod layer;
pub mod problem;
pub mod reload;
pub mod schema;
pub mod show;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use layer::Inputs;
pub use problem::{Problem, Report, Severity};

use document::Node;
use schema::Schema;

/// The whole configuration. Each table is documented where its `Config` is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The gateway itself: who it is and where it keeps its data.
    pub gateway: gateway::Config,
    /// Every limit. What happens when one is reached is said at each.
    pub limits: crate::limit::Config,
    /// Logs.
    pub telemetry: crate::telemetry::Config,
}

/// A configuration that may run.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
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
    let layered = layer::assemble(inputs, &schema, &defaults_text());
    let mut problems = layered.problems;
    let mut readable = layered.root.clone();
    let mut config = Config::default();
    if !layered.broken {
        for finding in schema.check(&layered.root) {
            problems.push(finding.problem);
            prune(&mut readable, &finding.prune);
        }
        config = deserialize_all(&mut readable, &layered.root, &mut problems);
        check::check(&config, &layered.root, &mut problems);
    }
    let mut report = Report { sources: layered.sources, problems };
    report.sort();
    if report.errors() > 0 {
        return Err(report);
    }
    Ok(Loaded { config, report, files: layered.files, document: layered.root })
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
fn deserialize_all(readable: &mut Node, document: &Node, problems: &mut Vec<Problem>) -> Config {
    const REFUSALS_MAX: usize = 200;
    for _ in 0..REFUSALS_MAX {
        match deserialize::from_node::<Config>(readable) {
            Ok(config) => return config,
            Err((path, message)) => {
                problems.push(refusal(readable, document, &path, &message));
                if path.is_empty() {
                    break;
                }
                prune(readable, &path);
            }
        }
    }
    Config::default()
}

/// Turns what serde said into a problem at the value's place, without repeating a secret.
fn refusal(readable: &Node, document: &Node, path: &[document::Step], message: &str) -> Problem {
    let node = readable.at_path(path);
    let key = node_key(readable, document, path);
    let secret =
        key.rsplit('.').next().is_some_and(problem::is_secret_key) || node.is_some_and(|n| n.written.is_some());
    let message = if secret { "the value is not valid".to_owned() } else { problem::mask_urls(message) };
    let problem = Problem::error(message).key(key);
    match node {
        Some(node) => problem.value(node).at(node.at),
        None => problem,
    }
}

/// The key path for people. Pruning may have shifted list indexes in `readable`, so entries are found by name where they have one.
fn node_key(readable: &Node, document: &Node, path: &[document::Step]) -> String {
    let key = readable.render_path(path);
    if key.is_empty() { document.render_path(path) } else { key }
}

/// Takes out what cannot be read. An entry of a list goes as a whole if one of its keys is required; serde says so on the next try.
fn prune(readable: &mut Node, path: &[document::Step]) {
    readable.remove(path);
}

#[cfg(test)]
mod tests;
