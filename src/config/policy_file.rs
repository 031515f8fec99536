//! Reads the policy files named by `[policy]` and compiles their rules; every problem with the place of its rule.

use std::path::Path;

use crate::policy::{CasesFile, Policy, RuleConfig, RuleSource, RulesFile, Shadowed};

use super::document::{self, Node, Place, Sources, Step};
use super::problem::{Problem, Report};
use super::schema::Schema;
use super::{deserialize, layer};

/// A policy file beyond this is a mistake; ten thousand rules fit.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Where a rule stands in its document.
struct Located<'a> {
    file: String,
    line: u32,
    index: usize,
    node: &'a Node,
}

/// Reads and compiles all files. What is wrong goes to `problems`; the policy is then one that denies everything.
///
/// `named` gives the place of each file's name in the configuration, for files that cannot be read.
pub fn load(
    files: &[String],
    named: impl Fn(usize) -> Option<Place>,
    sources: &mut Sources,
    problems: &mut Vec<Problem>,
) -> Policy {
    let schema = Schema::of::<RulesFile>();
    let mut documents: Vec<(String, Node)> = Vec::new();
    for (index, file) in files.iter().enumerate() {
        match layer::read(Path::new(file), FILE_BYTES_MAX) {
            Ok(text) => {
                let source = sources.add(file.clone(), text, "");
                documents.push((file.clone(), document::parse(sources, source, problems)));
            }
            Err(why) => {
                let problem =
                    Problem::error(format!("cannot read the policy file: {why}")).key(format!("policy.files.{index}"));
                let problem =
                    problem.value(document::quoted(file)).allowed("a file, relative to the one that names it");
                problems.push(match named(index) {
                    Some(place) => problem.at(place),
                    None => problem,
                });
            }
        }
    }
    let mut rules = Vec::new();
    let mut located = Vec::new();
    for (file, document) in &documents {
        let mut broken: Vec<usize> = Vec::new();
        for finding in schema.check(document) {
            if let Some(Step::Index(index)) = finding.prune.get(1) {
                broken.push(*index);
            }
            problems.push(finding.problem);
        }
        let items = document.get("rule").map_or(&[][..], Node::items);
        for (index, node) in items.iter().enumerate().filter(|(index, _)| !broken.contains(index)) {
            let line = u32::try_from(sources.line_column(node.at).0).unwrap_or(u32::MAX);
            match deserialize::from_node::<RuleConfig>(node) {
                Ok(rule) => {
                    rules.push(RuleSource { rule, file: file.clone(), line });
                    located.push(Located { file: file.clone(), line, index, node });
                }
                Err((path, message)) => {
                    let place = node.at_path(&path).map_or(node.at, |n| n.at);
                    let key = format!("rule.{index}.{}", node.render_path(&path));
                    problems.push(Problem::error(message).key(key).at(place));
                }
            }
        }
    }
    match Policy::compile(rules) {
        Ok(policy) => {
            warn_about_shadowed(&policy, &located, problems);
            policy
        }
        Err(found) => {
            problems.extend(found.iter().map(|p| place(p, &located)));
            Policy::deny_all()
        }
    }
}

/// A compiler's problem at the value it speaks about.
fn place(found: &crate::policy::Problem, located: &[Located<'_>]) -> Problem {
    let Some(rule) = located.iter().find(|l| l.file == found.file && l.line == found.line) else {
        return Problem::error(found.to_string()).file(found.file.clone());
    };
    let value = rule.node.get(found.key);
    let entry = value.and_then(|v| v.items().iter().find(|i| i.as_text() == Some(&found.value))).or(value);
    Problem::error(found.what.clone())
        .key(format!("rule.{}.{}", rule.index, found.key))
        .value(document::quoted(&found.value))
        .at(entry.map_or(rule.node.at, |n| n.at))
        .allowed(found.allowed.clone())
}

/// Warns about rules that others always decide before them. `located` has them in the policy's order.
fn warn_about_shadowed(policy: &Policy, located: &[Located<'_>], problems: &mut Vec<Problem>) {
    for Shadowed { rule, by } in policy.shadowed() {
        let Some(rule) = located.get(rule.0 as usize) else { continue };
        let mut deciding: Vec<String> = by
            .iter()
            .filter_map(|by| located.get(by.0 as usize))
            .map(|by| format!("{}:{}", by.file, by.line))
            .collect();
        let more = deciding.len().saturating_sub(NAMED_MAX);
        deciding.truncate(NAMED_MAX);
        let what = match (deciding.as_slice(), more) {
            ([one], _) => format!("never decides: the rule at {one} always does"),
            (some, 0) => format!("never decides: the rules at {} together always do", some.join(", ")),
            (some, more) => format!("never decides: the rules at {} and {more} more always do", some.join(", ")),
        };
        let name = rule.node.get("name");
        let problem = Problem::warning(what).key(format!("rule.{}.name", rule.index));
        let problem = match name {
            Some(name) => problem.value(name),
            None => problem,
        };
        problems.push(
            problem
                .at(name.map_or(rule.node.at, |n| n.at))
                .help("remove it, or put the narrower rule first; a deny wins wherever it stands"),
        );
    }
}

/// Places named in one warning.
const NAMED_MAX: usize = 3;

/// Reads a table of cases for `tidegate policy test`.
///
/// # Errors
/// Every problem of the file.
pub fn load_cases(path: &Path) -> Result<CasesFile, Report> {
    let mut report = Report::default();
    let name = path.display().to_string();
    match layer::read(path, FILE_BYTES_MAX) {
        Ok(text) => {
            let source = report.sources.add(name, text, "");
            let document = document::parse(&report.sources, source, &mut report.problems);
            if report.problems.is_empty() {
                let findings = Schema::of::<CasesFile>().check(&document);
                report.problems.extend(findings.into_iter().map(|f| f.problem));
            }
            if report.problems.is_empty() {
                match deserialize::from_node(&document) {
                    Ok(cases) => return Ok(cases),
                    Err((path, message)) => {
                        let place = document.at_path(&path).map_or(document.at, |n| n.at);
                        let key = document.render_path(&path);
                        report.problems.push(Problem::error(message).key(key).at(place));
                    }
                }
            }
        }
        Err(why) => report.problems.push(Problem::error(format!("cannot read the file: {why}")).file(name)),
    }
    report.sort();
    Err(report)
}
