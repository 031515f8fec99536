//! Reads the sources and fails where they break the rules of dependence of `ARCHITECTURE.md`.
//!
//! The checker works on text: comments and literals are blanked out, then paths (`crate::x`, `super::x`, `tidegate_x::`,
//! `rusqlite::`) are resolved. It needs no compiler, sees code behind every `cfg`, and is itself tested on small bad samples below.
//! Test code, which is `#[cfg(test)]` items and files named `tests.rs`, is exempt: a test may set up a neighbour.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 900;

/// What a top-level module of `src/` may import of the crate, besides itself. Who is not listed here is an error.
/// `lib.rs`, `main.rs`, `cli` and `demo` are above everything; `config` may name every module's `Config`.
fn may_import(module: &str) -> Option<Vec<&'static str>> {
    const L1: [&str; 3] = ["message", "network", "units"];
    const L2: [&str; 5] = ["policy", "limit", "cache", "balance", "directory"];
    const L3: [&str; 4] = ["identity", "session", "hub", "spool"];
    const INFRASTRUCTURE: [&str; 5] = ["worker", "tls", "telemetry", "tasks", "timer"];
    let allowed: Vec<&[&'static str]> = match module {
        "message" | "units" => vec![],
        "network" => vec![&["units"]],
        "policy" | "limit" | "balance" | "directory" => vec![&L1],
        // `limit` holds the table of limits, the cache's among them; it imports nothing back.
        "cache" => vec![&L1, &["limit"]],
        // Metric names live in one file, so every layer that counts something knows it.
        "identity" | "session" | "hub" | "spool" => vec![&L1, &L2, &["telemetry", "tasks"]],
        "gateway" => vec![&L1, &L2, &L3, &["telemetry", "tasks"]],
        "worker" | "tls" | "telemetry" | "tasks" | "timer" => vec![&L1, &INFRASTRUCTURE],
        "listener" => vec![&L1, &INFRASTRUCTURE, &["gateway", "limit"]],
        "upstream" => vec![&L1, &INFRASTRUCTURE, &["spool", "balance"]],
        "admin" => vec![&L1, &L2, &L3, &INFRASTRUCTURE, &["gateway", "upstream"]],
        "cluster" => vec![&L1, &L2, &L3, &INFRASTRUCTURE],
        _ => return None,
    };
    Some(allowed.concat())
}

const ABOVE_EVERYTHING: [&str; 5] = ["lib", "main", "cli", "demo", "config"];

/// The protocols' drivers below `listener/`: only `listener/mod.rs` names them, neither each other nor the plumbing beside them does.
const DRIVERS: [&str; 4] = ["http", "mqtt", "websocket", "coap"];

/// Who may name an engine crate. Engines agree on method names, not on a type, so each has one driver.
const ENGINES: [(&str, &[&str]); 5] = [
    ("tidegate_sniff", &["listener"]),
    ("tidegate_auth", &["identity", "gateway", "listener"]),
    // `listener/mqtt` for `traceparent`, which is the same text in every protocol; the gateway's response cache for what ends at a hop.
    ("tidegate_http", &["gateway", "listener/http", "listener/mqtt", "listener/mod", "upstream"]),
    // Its `topic` module is the grammar of the one address space, which the admin side's `tail` takes filters of.
    ("tidegate_mqtt", &["hub", "session", "listener/mqtt", "listener/websocket", "admin"]),
    ("tidegate_coap", &["listener/coap"]),
];

/// Foreign crates behind one door.
const DOORS: [(&str, &[&str]); 11] = [
    ("rusqlite", &["spool", "identity"]),
    ("tidegate_memory", &["cli"]),
    ("rumqttc", &["upstream/mqtt"]),
    ("rumqttd", &["demo", "cli"]),
    ("coap_lite", &["demo", "cli"]),
    ("ring", &["tls", "gateway"]),
    ("rustls", &["tls"]),
    ("tokio_rustls", &["tls"]),
    ("toml", &["config"]),
    ("toml_edit", &["config"]),
    ("metrics_exporter_prometheus", &["telemetry"]),
];

/// What the pure layers (L1, L2, engines) never name: runtimes, clocks, sockets, randomness.
const IMPURE: [&str; 16] = [
    "tokio",
    "hyper",
    "mio",
    "socket2",
    "nix",
    "getrandom",
    "rand",
    "Instant::now",
    "SystemTime::now",
    "std::thread",
    "std::fs",
    "std::process",
    "std::env",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
];

#[test]
fn modules_import_only_from_layers_below_their_own() {
    let sources = Source::read_all(&root().join("src"));
    assert!(sources.len() >= 4, "src/ was not found");
    let faults: Vec<String> = sources.iter().flat_map(layer_faults).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_module_graph_has_no_cycle() {
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in Source::read_all(&root().join("src")) {
        for path in source.crate_paths().iter().filter(|p| !p.in_test) {
            if path.module() != source.module() && !ABOVE_EVERYTHING.contains(&source.module()) {
                edges.entry(source.module().to_owned()).or_default().insert(path.module().to_owned());
            }
        }
    }
    assert_eq!(cycle(&edges), None, "modules import each other in a circle");
}

#[test]
fn every_foreign_crate_has_one_door() {
    let faults: Vec<String> = Source::read_all(&root().join("src")).iter().flat_map(door_faults).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn pure_layers_name_no_runtime_clock_socket_or_randomness() {
    let mut faults = Vec::new();
    for source in Source::read_all(&root().join("src")) {
        if ["message", "network", "units", "policy", "limit", "cache", "balance", "directory"]
            .contains(&source.module())
        {
            faults.extend(impurities(&source));
        }
    }
    for engine in engines() {
        let sources = Source::read_all(&engine.join("src"));
        assert!(!sources.is_empty(), "{} has no sources", engine.display());
        for source in &sources {
            faults.extend(impurities(source));
            faults.extend(foreign_faults(source, &[("tidegate", &[])]));
            for (other, _) in ENGINES {
                faults.extend(foreign_faults(source, &[(other, &[])]));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn engines_depend_on_no_io_crate_and_not_on_each_other() {
    const FORBIDDEN: [&str; 8] = ["tokio", "tokio-util", "hyper", "rustls", "rusqlite", "rand", "getrandom", "socket2"];
    for engine in engines() {
        let manifest = fs::read_to_string(engine.join("Cargo.toml")).unwrap();
        let manifest: toml::Table = manifest.parse().unwrap();
        let Some(dependencies) = manifest.get("dependencies").and_then(|d| d.as_table()) else { continue };
        for name in dependencies.keys() {
            assert!(!FORBIDDEN.contains(&name.as_str()), "{} depends on {name}", engine.display());
            assert!(!name.starts_with("tidegate"), "{} depends on {name}, an engine stands alone", engine.display());
        }
    }
}

#[test]
fn no_file_is_too_long_and_no_module_is_a_drawer() {
    let mut faults = Vec::new();
    for folder in ["src", "protocols", "tests", "benches", "fuzz"] {
        for source in Source::read_all(&root().join(folder)) {
            faults.extend(length_fault(&source));
            faults.extend(drawer_faults(&source));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn engines() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(root().join("protocols")).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    folders.sort();
    assert!(folders.len() >= 5, "protocols/ was not found");
    folders
}

/// One source file: its path below the source folder without `.rs`, and its text without comments and literals.
struct Source {
    name: String,
    lines: usize,
    tokens: Vec<Token>,
}

#[derive(Clone, Debug)]
struct Token {
    text: String,
    line: usize,
    in_test: bool,
    /// Module path of this place below the crate root, inline modules included.
    within: Vec<String>,
}

/// A path into our own crate, resolved: `["spool", "Writer"]`.
struct CratePath {
    parts: Vec<String>,
    line: usize,
    in_test: bool,
}

impl CratePath {
    fn module(&self) -> &str {
        self.parts.first().map_or("", String::as_str)
    }
}

impl Source {
    fn read_all(folder: &Path) -> Vec<Source> {
        let mut found = Vec::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(next) = folders.pop() {
            let Ok(entries) = fs::read_dir(&next) else { continue };
            for path in entries.map(|e| e.unwrap().path()) {
                if path.is_dir() && !path.ends_with("target") && !path.ends_with("corpus") {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") {
                    let name = path.strip_prefix(folder).unwrap().with_extension("");
                    found.push(Source::new(name.to_str().unwrap(), &fs::read_to_string(&path).unwrap()));
                }
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// `name` is the path below `src/` without `.rs`: `spool/writer`, `listener/mod`, `lib`.
    fn new(name: &str, text: &str) -> Source {
        let mut within: Vec<String> = name.split('/').map(str::to_owned).collect();
        if ["mod", "lib", "main"].contains(&within.last().unwrap().as_str()) {
            within.pop();
        }
        let mut tokens = tokens(text, within);
        if name.split('/').skip(1).any(|part| part == "tests") {
            tokens.iter_mut().for_each(|token| token.in_test = true);
        }
        Source { name: name.to_owned(), lines: text.lines().count(), tokens }
    }

    fn module(&self) -> &str {
        self.name.split('/').next().unwrap()
    }

    /// True when this file is `place` or lies below it: `spool` covers `spool/writer`, `upstream/mqtt` only itself and its folder.
    fn is_within(&self, place: &str) -> bool {
        self.name == place || self.name.strip_prefix(place).is_some_and(|rest| rest.starts_with('/'))
    }

    /// Every `crate::…`, `super::…` and `self::…` path, groups unfolded.
    fn crate_paths(&self) -> Vec<CratePath> {
        let mut paths = Vec::new();
        let mut at = 0;
        while at < self.tokens.len() {
            let token = &self.tokens[at];
            let continues = at > 0 && self.tokens[at - 1].text == "::";
            let restricted = at > 0 && self.tokens[at - 1].text == "(" && at > 1 && self.tokens[at - 2].text == "pub";
            let mut base = match token.text.as_str() {
                "crate" => Vec::new(),
                "self" => token.within.clone(),
                "super" => token.within[..token.within.len().saturating_sub(1)].to_vec(),
                _ => {
                    at += 1;
                    continue;
                }
            };
            at += 1;
            if continues || restricted || self.tokens.get(at).is_none_or(|t| t.text != "::") {
                continue;
            }
            while self.word(at) == "::" && self.word(at + 1) == "super" {
                base.pop();
                at += 2;
            }
            unfold(&self.tokens, at, base, &mut paths);
        }
        paths
    }

    fn word(&self, at: usize) -> &str {
        self.tokens.get(at).map_or("", |t| t.text.as_str())
    }
}

/// Follows `::a::{b, c::d}` from `at` and adds each full path; returns where it ended.
fn unfold(tokens: &[Token], mut at: usize, mut base: Vec<String>, paths: &mut Vec<CratePath>) -> usize {
    let text = |at: usize| tokens.get(at).map_or("", |t| t.text.as_str());
    let is_word = |at: usize| text(at).starts_with(|c: char| c.is_alphanumeric() || c == '_');
    let start = at.min(tokens.len() - 1);
    while text(at) == "::" {
        if is_word(at + 1) {
            base.push(text(at + 1).to_owned());
            at += 2;
        } else if text(at + 1) == "{" {
            at += 2;
            while at < tokens.len() && text(at) != "}" {
                if is_word(at) {
                    let mut inner = base.clone();
                    inner.push(text(at).to_owned());
                    at = unfold(tokens, at + 1, inner, paths);
                } else {
                    at += 1;
                }
            }
            return at + 1;
        } else {
            break;
        }
    }
    if !base.is_empty() {
        paths.push(CratePath { parts: base, line: tokens[start].line, in_test: tokens[start].in_test });
    }
    at
}

/// Cuts text into words, `::` and single signs; knows which inline module and whether a `#[cfg(test)]` item holds each.
fn tokens(text: &str, file: Vec<String>) -> Vec<Token> {
    let mut out: Vec<Token> = Vec::new();
    // One entry per open brace: the module it opened, if it did, and whether it is test code.
    let mut braces: Vec<(Option<String>, bool)> = Vec::new();
    let mut test_item_next = false;
    for (word, line) in words(text) {
        let in_test = test_item_next || braces.iter().any(|b| b.1);
        let mut within = file.clone();
        within.extend(braces.iter().filter_map(|b| b.0.clone()));
        out.push(Token { text: word.clone(), line, in_test, within });
        let before = |back: usize| out.len().checked_sub(back + 1).map_or("", |at| out[at].text.as_str());
        match word.as_str() {
            "]" if ["test", "all"].iter().any(|w| tail_is_cfg(&out, w)) => test_item_next = true,
            "{" => {
                let module = (before(2) == "mod").then(|| before(1).to_owned());
                braces.push((module, test_item_next));
                test_item_next = false;
            }
            "}" => {
                braces.pop();
            }
            ";" => test_item_next = false,
            _ => {}
        }
    }
    out
}

/// True when the tokens end in `#[cfg(test)]`, or in `#[cfg(all(test, …))]` for `word` = `all`.
fn tail_is_cfg(tokens: &[Token], word: &str) -> bool {
    let Some(open) = tokens.iter().rposition(|t| t.text == "[") else { return false };
    let attribute: Vec<&str> = tokens[open..].iter().map(|t| t.text.as_str()).collect();
    match word {
        "test" => attribute == ["[", "cfg", "(", "test", ")", "]"],
        _ => attribute.starts_with(&["[", "cfg", "(", "all", "(", "test"]),
    }
}

/// Words and signs with their line; comments, strings, characters and lifetimes left out.
fn words(text: &str) -> Vec<(String, usize)> {
    let bytes = text.as_bytes();
    let (mut out, mut at, mut line) = (Vec::new(), 0, 1);
    let at_is = |at: usize, with: &str| text.as_bytes()[at..].starts_with(with.as_bytes());
    while at < bytes.len() {
        let from = at;
        let byte = bytes[at];
        if at_is(at, "//") {
            at += text[at..].find('\n').unwrap_or(text.len() - at);
        } else if at_is(at, "/*") {
            let mut depth = 0;
            while at < bytes.len() {
                if at_is(at, "/*") {
                    (depth, at) = (depth + 1, at + 2);
                } else if at_is(at, "*/") {
                    (depth, at) = (depth - 1, at + 2);
                    if depth == 0 {
                        break;
                    }
                } else {
                    at += 1;
                }
            }
        } else if let Some(hashes) = raw_string(&bytes[at..]) {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = at + text[at..].find('"').unwrap() + 1;
            at = text[open..].find(&close).map_or(bytes.len(), |end| open + end + close.len());
        } else if byte == b'"' || at_is(at, "b\"") || at_is(at, "c\"") {
            at += if byte == b'"' { 1 } else { 2 };
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at += 1;
        } else if byte == b'\'' {
            at += character_or_lifetime(&text[at..]);
        } else if byte.is_ascii_alphanumeric() || byte == b'_' {
            while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_') {
                at += 1;
            }
            out.push((text[from..at].to_owned(), line));
        } else if at_is(at, "::") {
            at += 2;
            out.push(("::".to_owned(), line));
        } else {
            at += 1;
            if byte.is_ascii_punctuation() {
                out.push(((byte as char).to_string(), line));
            }
        }
        at = at.min(bytes.len());
        line += bytes[from..at].iter().filter(|b| **b == b'\n').count();
    }
    out
}

/// The number of `#` of a raw string that begins here.
fn raw_string(bytes: &[u8]) -> Option<usize> {
    let rest = bytes.strip_prefix(b"br").or_else(|| bytes.strip_prefix(b"r"))?;
    let hashes = rest.iter().take_while(|b| **b == b'#').count();
    (rest.get(hashes) == Some(&b'"')).then_some(hashes)
}

/// The length of `'x'`, `'\n'` or `'\u{1f}'`; of the quote and the name alone for a lifetime.
fn character_or_lifetime(text: &str) -> usize {
    let mut inner = text.chars().skip(1);
    match (inner.next(), inner.next()) {
        (Some('\\'), Some(escaped)) => {
            let skip = 2 + escaped.len_utf8();
            skip + text[skip..].find('\'').map_or(0, |end| end + 1)
        }
        (Some(c), Some('\'')) => 2 + c.len_utf8(),
        (Some(c), _) if c.is_alphabetic() || c == '_' => {
            1 + text[1..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').map(char::len_utf8).sum::<usize>()
        }
        _ => 1,
    }
}

fn layer_faults(source: &Source) -> Vec<String> {
    let module = source.module();
    if ABOVE_EVERYTHING.contains(&module) {
        return Vec::new();
    }
    let Some(allowed) = may_import(module) else {
        return vec![format!(
            "src/{}.rs: module {module} has no layer; give it one in tests/architecture.rs",
            source.name
        )];
    };
    let mut faults = Vec::new();
    for path in source.crate_paths().iter().filter(|p| !p.in_test) {
        let target = path.module();
        if target != module && !allowed.contains(&target) {
            faults.push(format!("src/{}.rs:{}: {module} must not import crate::{target}", source.name, path.line));
        }
        if let (Some(own), Some(other)) = (source.name.strip_prefix("listener/"), path.parts.get(1)) {
            let own = own.split('/').next().unwrap();
            if target == "listener" && own != "mod" && own != other && DRIVERS.contains(&other.as_str()) {
                faults.push(format!("src/{}.rs:{}: {own} must not know its sibling {other}", source.name, path.line));
            }
        }
    }
    faults.extend(foreign_faults(source, &ENGINES));
    faults.dedup();
    faults
}

fn door_faults(source: &Source) -> Vec<String> {
    foreign_faults(source, &DOORS)
}

/// Every place that names one of `crates` outside the places allowed for it.
fn foreign_faults(source: &Source, crates: &[(&str, &[&str])]) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, places) in crates {
        // The command line stands above everything, but a door is a door.
        let open = places.iter().any(|place| source.is_within(place));
        let engine = name.starts_with("tidegate_") && ABOVE_EVERYTHING.contains(&source.module());
        if open || engine {
            continue;
        }
        for (at, token) in source.tokens.iter().enumerate().filter(|(_, t)| t.text == *name && !t.in_test) {
            // `a::toml` is somebody else's name; `::toml` and `toml::` are the crate.
            let continued = at > 1 && source.word(at - 1) == "::" && is_word(source.word(at - 2));
            let used = source.word(at + 1) == "::" || (at > 0 && source.word(at - 1) == "use");
            if used && !continued {
                faults.push(format!("{}.rs:{}: {name} belongs behind {places:?}", source.name, token.line));
            }
        }
    }
    faults
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphanumeric() || c == '_')
}

fn impurities(source: &Source) -> Vec<String> {
    let mut faults = Vec::new();
    for (at, token) in source.tokens.iter().enumerate().filter(|(_, t)| !t.in_test) {
        for name in IMPURE {
            let parts: Vec<&str> = name.split("::").collect();
            let spelled = parts
                .iter()
                .enumerate()
                .all(|(n, part)| source.word(at + 2 * n) == *part && (n == 0 || source.word(at + 2 * n - 1) == "::"));
            // A lone crate name counts as a path or an import, not as a local variable of that name.
            let path = source.word(at + 1) == "::" || (at > 0 && ["use", "::"].contains(&source.word(at - 1)));
            let type_name = name.starts_with(char::is_uppercase);
            if spelled && (parts.len() > 1 || path || type_name) {
                faults.push(format!("{}.rs:{}: a pure layer names {name}", source.name, token.line));
            }
        }
    }
    faults
}

fn length_fault(source: &Source) -> Option<String> {
    (source.lines > FILE_LINES_MAX)
        .then(|| format!("{}.rs has {} lines, more than {FILE_LINES_MAX}", source.name, source.lines))
}

fn drawer_faults(source: &Source) -> Vec<String> {
    const DRAWERS: [&str; 6] = ["utils", "util", "common", "helpers", "helper", "misc"];
    if source.name.contains("tests/") {
        return Vec::new();
    }
    let pairs = source.tokens.windows(2).filter(|w| w[0].text == "mod" && DRAWERS.contains(&w[1].text.as_str()));
    pairs.map(|w| format!("{}.rs:{}: a module is named after what it holds", source.name, w[0].line)).collect()
}

/// The first circle found, as the modules on it.
fn cycle(edges: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn visit(
        node: &str,
        edges: &BTreeMap<String, BTreeSet<String>>,
        path: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<String>> {
        if let Some(from) = path.iter().position(|p| p == node) {
            return Some(path[from..].to_vec());
        }
        if !done.insert(node.to_owned()) {
            return None;
        }
        path.push(node.to_owned());
        let found = edges.get(node).into_iter().flatten().find_map(|next| visit(next, edges, path, done));
        path.pop();
        found
    }
    let mut done = BTreeSet::new();
    edges.keys().find_map(|node| visit(node, edges, &mut Vec::new(), &mut done))
}

/// The checker on small samples: each rule must refuse what it is there for, and let pass what it is not.
mod checker {
    use super::*;

    fn layers(name: &str, text: &str) -> Vec<String> {
        layer_faults(&Source::new(name, text))
    }

    #[test]
    fn a_forbidden_import_is_found_however_it_is_written() {
        for text in [
            "use crate::spool::Writer;",
            "use crate::{message::Topic, spool::{Writer, Reader}};",
            "fn f() -> crate::spool::Writer { todo() }",
            "use super::spool;",
            "use super::{message, spool};",
            "mod inner { use super::super::spool::Writer; }",
            "use crate\n  ::\n  spool::Writer;",
        ] {
            let faults = layers("hub/mod", text);
            assert_eq!(faults.len(), 1, "{text}: {faults:?}");
            assert!(faults[0].contains("hub must not import crate::spool"), "{faults:?}");
        }
    }

    #[test]
    fn allowed_imports_comments_and_literals_pass() {
        for text in [
            "use crate::{message::Topic, limit::Bucket, telemetry};",
            "// use crate::spool::Writer;\n/* crate::spool /* nested */ crate::spool */",
            "const A: &str = \"crate::spool::Writer\"; const B: &str = r#\"crate::\"spool\"#; const C: char = '\"';",
            "fn f<'a>(x: &'a str) -> char { '\\'' } use self::tree::Node;",
            "pub(crate) fn f() {} pub(super) mod tree;",
            "#[cfg(test)]\nmod tests { use super::*; use crate::spool::Writer; }",
            "#[cfg(all(test, unix))]\nmod tests { use crate::spool::Writer; }",
        ] {
            assert_eq!(layers("hub/mod", text), Vec::<String>::new(), "{text}");
        }
    }

    #[test]
    fn a_test_module_ends_where_its_brace_closes() {
        let text = "#[cfg(test)]\nmod tests { fn f() { } }\nuse crate::spool::Writer;";
        assert_eq!(layers("hub/mod", text).len(), 1);
        let text = "#[cfg(test)]\nmod tests;\nuse crate::spool::Writer;";
        assert_eq!(layers("hub/mod", text).len(), 1);
    }

    #[test]
    fn a_fault_names_the_line() {
        let faults = layers("policy/mod", "//! Policy.\n\n\"a\nb\";\nuse crate::gateway::Gateway;\n");
        assert_eq!(faults, ["src/policy/mod.rs:5: policy must not import crate::gateway"]);
    }

    #[test]
    fn listeners_are_siblings_that_do_not_know_each_other() {
        assert_eq!(layers("listener/http", "use super::mqtt::Driver;").len(), 1);
        assert_eq!(layers("listener/http/stream", "use crate::listener::coap;").len(), 1);
        assert_eq!(layers("listener/http/stream", "use super::body::Body;").len(), 0);
        assert_eq!(layers("listener/mod", "use self::mqtt::Driver; use http::Uri;").len(), 0);
        assert_eq!(layers("listener/http", "use crate::listener::Accepted; use super::stream::Stream;").len(), 0);
        assert_eq!(layers("listener/accept", "use super::mqtt::Driver;").len(), 1);
    }

    #[test]
    fn an_engine_has_one_driver() {
        assert_eq!(layers("listener/http", "use tidegate_mqtt::Packet;").len(), 1);
        assert_eq!(layers("listener/mqtt", "use tidegate_mqtt::Packet;").len(), 0);
        assert_eq!(layers("spool/mod", "fn f(p: tidegate_coap::Message) {}").len(), 1);
        assert_eq!(layers("cli/device", "use tidegate_auth::Key;").len(), 0);
    }

    #[test]
    fn a_module_without_a_layer_is_refused() {
        assert_eq!(layers("surprise", "").len(), 1);
    }

    #[test]
    fn a_second_door_is_found() {
        let faults = |name, text| door_faults(&Source::new(name, text)).len();
        assert_eq!(faults("hub/mod", "use rusqlite::Connection;"), 1);
        assert_eq!(faults("hub/mod", "fn f(c: &::rusqlite::Connection) {}"), 1);
        assert_eq!(faults("hub/mod", "use rusqlite as db;"), 1);
        assert_eq!(faults("spool/commit", "use rusqlite::Connection;"), 0);
        assert_eq!(faults("upstream/http", "use rumqttc::Client;"), 1);
        assert_eq!(faults("upstream/mqtt", "use rumqttc::Client;"), 0);
        assert_eq!(faults("listener/mod", "use tokio_rustls::TlsAcceptor;"), 1);
        assert_eq!(faults("listener/mod", "use tokio_rustls_helpers::x; let toml = 1; f(toml);"), 0);
        assert_eq!(faults("cli/config", "let doc: toml_edit::DocumentMut = x;"), 1);
        assert_eq!(faults("cli/config", "use crate::config::toml::Span;"), 0);
    }

    #[test]
    fn a_clock_or_a_socket_in_a_pure_layer_is_found() {
        let faults = |text| impurities(&Source::new("limit", text)).len();
        assert_eq!(faults("use std::time::Instant; fn f(now: Instant) {}"), 0);
        assert_eq!(faults("let now = std::time::Instant::now();"), 1);
        assert_eq!(faults("use tokio::sync::Mutex;"), 1);
        assert_eq!(faults("fn f(s: &TcpStream) {}"), 1);
        assert_eq!(faults("use std::net::SocketAddr; let rand = 3;"), 0);
        assert_eq!(faults("#[cfg(test)] mod tests { fn f() { Instant::now(); } }"), 0);
        assert_eq!(impurities(&Source::new("limit/tests", "fn f() { Instant::now(); }")).len(), 0);
        assert_eq!(impurities(&Source::new("limit/tested", "fn f() { Instant::now(); }")).len(), 1);
    }

    #[test]
    fn a_long_file_and_a_drawer_are_found() {
        assert!(length_fault(&Source::new("a", &"\n".repeat(FILE_LINES_MAX + 1))).is_some());
        assert!(length_fault(&Source::new("a", &"\n".repeat(FILE_LINES_MAX))).is_none());
        assert_eq!(drawer_faults(&Source::new("lib", "pub mod utils;")).len(), 1);
        assert_eq!(drawer_faults(&Source::new("lib", "pub mod units;")).len(), 0);
    }

    #[test]
    fn a_circle_is_found() {
        let edge = |from: &str, to: &str| (from.to_owned(), BTreeSet::from([to.to_owned()]));
        assert_eq!(cycle(&BTreeMap::from([edge("a", "b"), edge("b", "c")])), None);
        let circle = cycle(&BTreeMap::from([edge("a", "b"), edge("b", "c"), edge("c", "a")])).unwrap();
        assert_eq!(circle, ["a", "b", "c"]);
    }
}
