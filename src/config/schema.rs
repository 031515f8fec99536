//! Checks a document against the JSON schema that `schemars` derives from the `Config` structs.
//!
//! Reports everything at once, which serde cannot: it stops at the first error. Covers the keywords that those structs produce; what a
//! schema cannot say (a topic filter, an address) is left to deserialisation, which runs afterwards and has the last word.

use std::net::SocketAddr;

use serde_json::{Map, Value as Json};

use crate::network::Network;
use crate::units::{Age, ByteSize, Quota, Rate};

use super::document::{KeyPath, Node, Step, Value};
use super::problem::Problem;

/// A JSON schema with its definitions, as `schemars` writes them.
#[derive(Clone, Debug)]
pub struct Schema {
    root: Json,
}

/// A problem, and what must go for the rest of the document to be readable.
#[derive(Clone, Debug)]
pub struct Finding {
    pub problem: Problem,
    pub prune: KeyPath,
    /// What is wrong with a value whose type is right.
    what: Option<&'static str>,
}

impl Schema {
    pub fn of<T: schemars::JsonSchema>() -> Self {
        Schema { root: schemars::schema_for!(T).to_value() }
    }

    pub fn as_json(&self) -> &Json {
        &self.root
    }

    /// Follows `$ref`s; a definition that is missing reads as "anything".
    pub fn resolve<'a>(&'a self, mut schema: &'a Json) -> &'a Json {
        // The bound only stops a cycle, which schemars does not produce.
        for _ in 0..16 {
            let Some(target) = schema.get("$ref").and_then(Json::as_str) else { break };
            let pointer = target.trim_start_matches('#');
            schema = self.root.pointer(pointer).unwrap_or(&Json::Null);
        }
        schema
    }

    /// What may stand at a key path, if the schema knows it. List entries may be given by name or index.
    pub fn at(&self, path: &[String]) -> Option<&Json> {
        path.iter().try_fold(self.resolve(&self.root), |schema, segment| self.below(schema, segment))
    }

    /// What may stand one segment below a schema: any entry of a list, a known key, or a free key of a map.
    pub fn below<'a>(&'a self, schema: &'a Json, segment: &str) -> Option<&'a Json> {
        self.branches(schema).into_iter().find_map(|branch| {
            let found = branch
                .get("items")
                .or_else(|| branch.get("properties").and_then(|p| p.get(segment)))
                .or_else(|| branch.get("additionalProperties").filter(|a| a.is_object()))?;
            Some(self.resolve(found))
        })
    }

    /// The alternatives of a schema without "null": itself, or what stands in `anyOf` / `oneOf`.
    pub fn branches<'a>(&'a self, schema: &'a Json) -> Vec<&'a Json> {
        let schema = self.resolve(schema);
        let Some(branches) = ["anyOf", "oneOf"].iter().find_map(|word| schema.get(*word)).and_then(Json::as_array)
        else {
            return vec![schema];
        };
        branches
            .iter()
            .map(|b| self.resolve(b))
            .filter(|b| b.get("type").and_then(Json::as_str) != Some("null"))
            .flat_map(|b| self.branches(b))
            .collect()
    }

    /// Whether only text may stand here.
    pub fn is_text_only(&self, schema: &Json) -> bool {
        self.branches(schema).iter().all(|b| types(b) == ["string"])
    }

    pub fn is_list(&self, schema: &Json) -> bool {
        self.branches(schema).iter().any(|b| types(b).contains(&"array"))
    }

    pub fn is_table(&self, schema: &Json) -> bool {
        self.branches(schema).iter().any(|b| types(b).contains(&"object"))
    }

    /// Everything in `document` that the schema does not allow.
    pub fn check(&self, document: &Node) -> Vec<Finding> {
        let mut walk = Walk { schema: self, document, findings: Vec::new(), path: Vec::new() };
        walk.node(document, &self.root);
        walk.findings
    }

    /// Dotted paths of every key, lists shown as `listener[]`.
    pub fn keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        self.collect_keys(&self.root, "", &mut keys, 0);
        keys
    }

    fn collect_keys(&self, schema: &Json, prefix: &str, keys: &mut Vec<String>, depth: usize) {
        if depth > 16 {
            return;
        }
        for branch in self.branches(schema) {
            if let Some(items) = branch.get("items") {
                self.collect_keys(items, &format!("{prefix}[]"), keys, depth + 1);
            }
            for (key, property) in properties(branch) {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                keys.push(path.clone());
                self.collect_keys(property, &path, keys, depth + 1);
            }
        }
    }

    /// Every `pattern` that [`pattern`] does not know.
    #[cfg(test)]
    pub fn unknown_patterns(&self) -> Vec<String> {
        fn walk(at: &Json, found: &mut Vec<String>) {
            if at.get("pattern").is_some_and(Json::is_string) && pattern(at).is_none() {
                found.push(at.to_string());
            }
            let children =
                at.as_object().into_iter().flat_map(|o| o.values()).chain(at.as_array().into_iter().flatten());
            children.for_each(|child| walk(child, found));
        }
        let mut found = Vec::new();
        walk(&self.root, &mut found);
        found
    }

    /// What a schema allows, as the end of the sentence "allowed: ...".
    pub fn describe(&self, schema: &Json) -> String {
        let branches = self.branches(schema);
        let words: Vec<String> = branches.iter().flat_map(|b| words(b)).collect();
        let mut parts: Vec<String> = Vec::new();
        if !words.is_empty() {
            let quoted: Vec<String> = words.iter().map(|w| format!("\"{w}\"")).collect();
            parts.push(if quoted.len() == 1 { quoted.concat() } else { format!("one of {}", quoted.join(", ")) });
        }
        for branch in branches.iter().filter(|b| self::words(b).is_empty()) {
            let part = self.describe_one(branch);
            if !parts.contains(&part) {
                parts.push(part);
            }
        }
        parts.join(", or ")
    }

    fn describe_one(&self, schema: &Json) -> String {
        match schema.get("format").and_then(Json::as_str) {
            Some("byte-size") => return ByteSize::ALLOWED.to_owned(),
            Some("age") => return Age::ALLOWED.to_owned(),
            Some("rate") => return Rate::ALLOWED.to_owned(),
            Some("quota") => return Quota::ALLOWED.to_owned(),
            Some("path") if types(schema).contains(&"array") => return "a list of paths".to_owned(),
            Some("path") => return "a path".to_owned(),
            Some("socket-address") => return SOCKET_ADDRESS.to_owned(),
            Some("cidr") => return Network::ALLOWED.to_owned(),
            _ => {}
        }
        if let Some((_, allowed)) = pattern(schema) {
            return allowed.to_owned();
        }
        let kinds: Vec<String> = types(schema)
            .into_iter()
            .filter(|t| *t != "null")
            .map(|kind| match kind {
                "integer" => match range(schema) {
                    (Some(min), Some(max)) => format!("an integer from {min} to {max}"),
                    (Some(min), None) => format!("an integer of at least {min}"),
                    (None, Some(max)) => format!("an integer of at most {max}"),
                    (None, None) => "an integer".to_owned(),
                },
                "number" => match range(schema) {
                    (Some(min), Some(max)) => format!("a number from {min} to {max}"),
                    (Some(min), None) => format!("a number of at least {min}"),
                    (None, Some(max)) => format!("a number of at most {max}"),
                    (None, None) => "a number".to_owned(),
                },
                "string" => match (number(schema, "minLength"), number(schema, "maxLength")) {
                    (Some(1.0), None) => "text that is not empty".to_owned(),
                    (Some(min), Some(max)) => format!("text of {min} to {max} characters"),
                    (Some(min), None) => format!("text of at least {min} characters"),
                    (None, Some(max)) => format!("text of at most {max} characters"),
                    (None, None) => "text".to_owned(),
                },
                "boolean" => "true or false".to_owned(),
                "array" => match schema.get("items") {
                    Some(items) if self.is_table(items) => "a list of tables".to_owned(),
                    Some(items) => format!("a list of: {}", self.describe(items)),
                    None => "a list".to_owned(),
                },
                _ => "a table".to_owned(),
            })
            .collect();
        if kinds.is_empty() { "anything".to_owned() } else { kinds.join(", or ") }
    }
}

struct Walk<'a> {
    schema: &'a Schema,
    document: &'a Node,
    findings: Vec<Finding>,
    path: KeyPath,
}

impl Walk<'_> {
    fn node(&mut self, node: &Node, schema: &Json) {
        let branches = self.schema.branches(schema);
        let [only] = branches.as_slice() else {
            return self.alternatives(node, schema, &branches);
        };
        self.single(node, only);
    }

    /// One of several: fine if any fits; otherwise the complaint of the one that was evidently meant.
    fn alternatives(&mut self, node: &Node, schema: &Json, branches: &[&Json]) {
        let mut closest: Option<(usize, Vec<Finding>)> = None;
        let mut right_type: Option<&'static str> = None;
        for branch in branches {
            let mut attempt =
                Walk { schema: self.schema, document: self.document, findings: Vec::new(), path: self.path.clone() };
            attempt.single(node, branch);
            if attempt.findings.is_empty() {
                return;
            }
            // Only a complaint about something inside says more than "none of these".
            let inside = attempt.findings.iter().all(|f| f.prune.len() > self.path.len());
            right_type = right_type.or(attempt.findings.iter().find_map(|f| f.what));
            if inside && closest.as_ref().is_none_or(|(n, _)| attempt.findings.len() < *n) {
                closest = Some((attempt.findings.len(), attempt.findings));
            }
        }
        match closest {
            Some((_, findings)) => self.findings.extend(findings),
            None => self.refuse(node, schema, right_type),
        }
    }

    fn single(&mut self, node: &Node, schema: &Json) {
        let allowed_words = words(schema);
        if !allowed_words.is_empty() {
            match node.as_text() {
                Some(text) if allowed_words.iter().any(|w| w == text) => {}
                _ => self.refuse(node, schema, None),
            }
            return;
        }
        let types = types(schema);
        if types.is_empty() {
            return; // anything goes
        }
        let format = schema.get("format").and_then(Json::as_str);
        match &node.value {
            Value::Text(text) if types.contains(&"string") => {
                let length = text.chars().count() as f64;
                let short = number(schema, "minLength").is_some_and(|min| length < min);
                let long = number(schema, "maxLength").is_some_and(|max| length > max);
                let malformed = match format {
                    Some("byte-size") => text.parse::<ByteSize>().is_err(),
                    Some("age") => text.parse::<Age>().is_err(),
                    Some("rate") => text.parse::<Rate>().is_err(),
                    Some("quota") => text.parse::<Quota>().is_err(),
                    Some("socket-address") => text.parse::<SocketAddr>().is_err(),
                    Some("cidr") => text.parse::<Network>().is_err(),
                    _ => pattern(schema).is_some_and(|(fits, _)| !fits(text)),
                };
                if short || long || malformed {
                    self.refuse(node, schema, Some(if malformed { "not understood" } else { "wrong length" }));
                }
            }
            Value::Integer(found) if types.contains(&"integer") || types.contains(&"number") => {
                let (min, max) = range(schema);
                let found = *found as f64;
                if min.is_some_and(|min| found < min.value) || max.is_some_and(|max| found > max.value) {
                    self.refuse(node, schema, Some("out of range"));
                }
            }
            Value::Float(found) if types.contains(&"number") => {
                let (min, max) = range(schema);
                if found.is_nan()
                    || min.is_some_and(|min| *found < min.value)
                    || max.is_some_and(|max| *found > max.value)
                {
                    self.refuse(node, schema, Some("out of range"));
                }
            }
            Value::Bool(_) if types.contains(&"boolean") => {}
            Value::Array(items) if types.contains(&"array") => {
                let few = number(schema, "minItems").is_some_and(|min| (items.len() as f64) < min);
                let many = number(schema, "maxItems").is_some_and(|max| (items.len() as f64) > max);
                if few || many {
                    self.refuse(node, schema, Some(if few { "too few entries" } else { "too many entries" }));
                }
                if let Some(item_schema) = schema.get("items") {
                    for (index, item) in items.iter().enumerate() {
                        self.path.push(Step::Index(index));
                        self.node(item, item_schema);
                        self.path.pop();
                    }
                }
            }
            Value::Table(_) if types.contains(&"object") => self.table(node, schema),
            _ => self.refuse(node, schema, None),
        }
    }

    fn table(&mut self, node: &Node, schema: &Json) {
        let empty = Map::new();
        let known = schema.get("properties").and_then(Json::as_object).unwrap_or(&empty);
        for entry in node.entries() {
            self.path.push(Step::Key(entry.key.clone()));
            match (known.get(&entry.key), schema.get("additionalProperties")) {
                (Some(property), _) => self.node(&entry.node, property),
                (None, Some(Json::Bool(false))) => self.unknown_key(&entry.key, entry.key_at, known),
                (None, Some(any)) => self.node(&entry.node, any),
                (None, None) => {}
            }
            self.path.pop();
        }
        let required = schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str);
        for key in required.filter(|key| node.get(key).is_none()) {
            let mut path = self.path.clone();
            path.push(Step::Key(key.to_owned()));
            let allowed = known.get(key).map(|p| self.schema.describe(p)).unwrap_or_default();
            let problem = Problem::error("missing")
                .key(self.document.render_path(&path))
                .at(super::document::Place { end: node.at.start + first_line(node), ..node.at })
                .allowed(allowed);
            self.findings.push(Finding { problem, prune: self.path.clone(), what: None });
        }
    }

    fn unknown_key(&mut self, key: &str, at: super::document::Place, known: &Map<String, Json>) {
        let mut problem = Problem::error("unknown key").key(self.document.render_path(&self.path)).at(at);
        if let Some(near) = nearest(key, known.keys().map(String::as_str)) {
            problem = problem.help(format!("did you mean `{near}`?"));
        } else if let Some(elsewhere) = self.elsewhere(key) {
            problem = problem.help(format!("there is `{elsewhere}`"));
        }
        problem = problem.allowed(list(known.keys().map(String::as_str)));
        self.findings.push(Finding { problem, prune: self.path.clone(), what: None });
    }

    /// The same key in another table, where it was perhaps meant.
    fn elsewhere(&self, key: &str) -> Option<String> {
        self.schema.keys().into_iter().find(|path| path.rsplit('.').next() == Some(key))
    }

    fn refuse(&mut self, node: &Node, schema: &Json, what: Option<&'static str>) {
        let words: Vec<String> = self.schema.branches(schema).iter().flat_map(|b| words(b)).collect();
        let message = match (what, node.as_text()) {
            (Some(what), _) => what.to_owned(),
            (None, Some(_)) if !words.is_empty() => "unknown word".to_owned(),
            (None, _) => format!("wrong type, this is {}", node.kind()),
        };
        let mut problem = Problem::error(message)
            .key(self.document.render_path(&self.path))
            .value(node)
            .at(node.at)
            .allowed(self.schema.describe(schema));
        if let Some(near) = node.as_text().and_then(|text| nearest(text, words.iter().map(String::as_str))) {
            problem = problem.help(format!("did you mean \"{near}\"?"));
        }
        self.findings.push(Finding { problem, prune: self.path.clone(), what });
    }
}

/// Bytes of the header a missing key is reported at: a table's place is its header, an inline table's its text.
fn first_line(node: &Node) -> usize {
    node.at.end.saturating_sub(node.at.start)
}

fn properties(schema: &Json) -> impl Iterator<Item = (&String, &Json)> {
    schema.get("properties").and_then(Json::as_object).into_iter().flatten()
}

fn types(schema: &Json) -> Vec<&str> {
    match schema.get("type") {
        Some(Json::String(one)) => vec![one.as_str()],
        Some(Json::Array(several)) => several.iter().filter_map(Json::as_str).filter(|t| *t != "null").collect(),
        _ => Vec::new(),
    }
}

/// The words of an enumeration: `enum`, or a `const`.
fn words(schema: &Json) -> Vec<String> {
    let listed = schema.get("enum").and_then(Json::as_array).into_iter().flatten();
    listed.chain(schema.get("const")).filter_map(Json::as_str).map(str::to_owned).collect()
}

pub(super) const SOCKET_ADDRESS: &str = "an address and a port such as \"127.0.0.1:1883\" or \"[::1]:1883\"";

/// A check for text, and what it allows.
type Pattern = (fn(&str) -> bool, &'static str);

/// The regular expressions that our schemas use, as code: few enough to need no engine. A test fails on one that is missing here.
fn pattern(schema: &Json) -> Option<Pattern> {
    match schema.get("pattern")?.as_str()? {
        "^[A-Za-z0-9._-]{1,64}$" => Some((
            |t| (1..=64).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)),
            "1 to 64 characters out of A-Z a-z 0-9 . _ -",
        )),
        "^(/|(/[A-Za-z0-9._~-]+)+)$" => Some((
            |t| {
                let segment =
                    |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._~-".contains(&b));
                t == "/" || t.strip_prefix('/').is_some_and(|t| t.split('/').all(segment))
            },
            "a path such as \"/\" or \"/gw\", of segments out of A-Z a-z 0-9 . _ ~ -",
        )),
        "^/[^?#]*$" => {
            Some((|t| t.starts_with('/') && !t.contains(['?', '#']), "a path that begins with /, without ? and #"))
        }
        "^(address|device|route|header:[A-Za-z0-9!#$%&'*+.^_`|~-]+)$" => Some((
            |t| {
                let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+.^_`|~-".contains(c);
                let header = |name: &str| !name.is_empty() && name.chars().all(token);
                ["address", "device", "route"].contains(&t) || t.strip_prefix("header:").is_some_and(header)
            },
            "\"address\", \"device\", \"route\" or \"header:NAME\"",
        )),
        _ => None,
    }
}

fn number(schema: &Json, keyword: &str) -> Option<f64> {
    schema.get(keyword).and_then(Json::as_f64)
}

/// A bound that prints as it was written: integers without a fraction.
#[derive(Clone, Copy)]
struct Bound {
    value: f64,
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.value.fract() == 0.0 { write!(f, "{:.0}", self.value) } else { write!(f, "{}", self.value) }
    }
}

/// Lowest and highest value, from `minimum` / `maximum` or, for integers, from the width of the type.
fn range(schema: &Json) -> (Option<Bound>, Option<Bound>) {
    let (low, high) = match schema.get("format").and_then(Json::as_str) {
        Some("uint8") => (Some(0.0), Some(f64::from(u8::MAX))),
        Some("uint16") => (Some(0.0), Some(f64::from(u16::MAX))),
        Some("uint32") => (Some(0.0), Some(f64::from(u32::MAX))),
        Some("uint" | "uint64") => (Some(0.0), None),
        Some("int32") => (Some(f64::from(i32::MIN)), Some(f64::from(i32::MAX))),
        _ => (None, None),
    };
    let bound = |value: Option<f64>| value.map(|value| Bound { value });
    (bound(number(schema, "minimum").or(low)), bound(number(schema, "maximum").or(high)))
}

fn list<'a>(keys: impl Iterator<Item = &'a str>) -> String {
    const SHOWN_MAX: usize = 14;
    let keys: Vec<&str> = keys.collect();
    let shown = keys.iter().take(SHOWN_MAX).copied().collect::<Vec<_>>().join(", ");
    match keys.len().saturating_sub(SHOWN_MAX) {
        0 if keys.is_empty() => "no keys".to_owned(),
        0 => shown,
        more => format!("{shown} and {more} more (`tidegate config defaults` lists all)"),
    }
}

/// The candidate that differs by the fewest edits, if they are few for its length.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let folded = word.to_ascii_lowercase().replace('-', "_");
    candidates
        .map(|c| (edits(&folded, c), c))
        .filter(|(edits, c)| *edits <= (c.chars().count() / 3).clamp(1, 4))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, c)| c)
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours.
fn edits(a: &str, b: &str) -> usize {
    const CHARS_MAX: usize = 64;
    let a: Vec<char> = a.chars().take(CHARS_MAX).collect();
    let b: Vec<char> = b.chars().take(CHARS_MAX).collect();
    let (mut before, mut row): (Vec<usize>, Vec<usize>) = (Vec::new(), (0..=b.len()).collect());
    for (i, x) in a.iter().enumerate() {
        let mut next = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let at = |row: &[usize], n: usize| row.get(n).copied().unwrap_or(usize::MAX - 1);
            let mut best = (at(&row, j) + usize::from(x != y)).min(at(&row, j + 1) + 1).min(at(&next, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(y) && b.get(j - 1) == Some(x);
            if swapped {
                best = best.min(at(&before, j - 1) + 1);
            }
            next.push(best);
        }
        before = std::mem::replace(&mut row, next);
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_recognised_and_another_word_is_not() {
        let keys = ["connections_max", "packet_bytes_max", "name", "bind"];
        assert_eq!(nearest("conections_max", keys.into_iter()), Some("connections_max"));
        assert_eq!(nearest("packet-bytes-max", keys.into_iter()), Some("packet_bytes_max"));
        assert_eq!(nearest("bnid", keys.into_iter()), Some("bind"));
        assert_eq!(nearest("zebra", keys.into_iter()), None);
    }
}
