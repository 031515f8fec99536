//! The layers of a configuration, later over earlier: built-in defaults, the file, `conf.d/*.toml` beside it, the environment
//! (`TIDEGATE__SECTION__KEY`), `--set KEY=VALUE`. Then `${...}` is expanded and relative paths are resolved against the file that names them.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::document::{self, DEPTH_MAX, Entry, Lists, Node, Place, Sources, Value};
use super::problem::Problem;
use super::schema::{Schema, nearest};

/// A configuration file beyond this is a mistake, not a configuration.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// A secret or a fragment read by `${file:...}`.
const FRAGMENT_BYTES_MAX: u64 = 64 << 10;
/// Drop-ins in `conf.d`.
const DROP_INS_MAX: usize = 1_000;
pub const ENVIRONMENT_PREFIX: &str = "TIDEGATE__";

/// Where a configuration comes from.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// None: no file, only defaults, environment and overrides.
    pub path: Option<PathBuf>,
    /// The process's environment: for `TIDEGATE__...` and for `${NAME}`.
    pub environment: HashMap<String, String>,
    /// `KEY=VALUE`, in the order given.
    pub set: Vec<String>,
}

impl Inputs {
    /// A file with this process's environment; variables that are not UTF-8 are left out.
    pub fn from_process(path: Option<PathBuf>, set: Vec<String>) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Inputs { path, environment, set }
    }
}

/// The merged layers, and all that was wrong with them.
#[derive(Debug)]
pub struct Layered {
    pub sources: Sources,
    pub root: Node,
    pub problems: Vec<Problem>,
    /// Files whose change would change the configuration; what a watcher watches.
    pub files: Vec<PathBuf>,
    /// A file did not parse: what it lacks says nothing about what was meant.
    pub broken: bool,
}

/// Reads and merges every layer.
pub fn assemble(inputs: &Inputs, schema: &Schema, defaults: &str) -> Layered {
    let mut sources = Sources::default();
    let mut problems = Vec::new();
    let mut files = Vec::new();
    let base = inputs.path.as_deref().map(folder_of).unwrap_or_default();

    let defaults = sources.add("built-in defaults", defaults, &base);
    let mut root = document::parse(&sources, defaults, &mut problems);
    if let Some(path) = &inputs.path {
        let mut written: Option<Node> = None;
        for path in std::iter::once(path.clone()).chain(drop_ins(&base, &mut problems)) {
            files.push(path.clone());
            match read(&path, FILE_BYTES_MAX) {
                Ok(text) => {
                    let source = sources.add(path.display().to_string(), text, folder_of(&path));
                    let layer = document::parse(&sources, source, &mut problems);
                    match &mut written {
                        Some(written) => written.overlay(layer, Lists::Merge),
                        None => written = Some(layer),
                    }
                }
                Err(why) => problems.push(
                    Problem::error(format!("cannot read the file: {why}"))
                        .file(path.display().to_string())
                        .help("`tidegate init` writes a first configuration, `--config FILE` names another"),
                ),
            }
        }
        if let Some(written) = written {
            root.overlay(written, Lists::Replace);
        }
    }
    let broken = !problems.is_empty();

    let mut variables: Vec<_> =
        inputs.environment.iter().filter(|(name, _)| name.starts_with(ENVIRONMENT_PREFIX)).collect();
    variables.sort();
    for (name, value) in variables {
        let source = sources.add("environment", format!("{name}={value}"), "");
        let key: Vec<String> =
            name.trim_start_matches(ENVIRONMENT_PREFIX).to_lowercase().split("__").map(str::to_owned).collect();
        let assignment = Assignment { schema, source, key, key_bytes: name.len(), value, loose: true };
        assignment.apply(&mut root).unwrap_or_else(|p| problems.push(*p));
    }
    for argument in &inputs.set {
        let source = sources.add("--set", argument.clone(), "");
        let Some((key, value)) = argument.split_once('=') else {
            let whole = Place { source, start: 0, end: argument.len() };
            problems.push(Problem::error("no `=`").at(whole).allowed("KEY=VALUE, such as limits.connections_max=100"));
            continue;
        };
        let assignment = Assignment { schema, source, key: segments(key), key_bytes: key.len(), value, loose: false };
        assignment.apply(&mut root).unwrap_or_else(|p| problems.push(*p));
    }

    let mut expansion = Expansion { inputs, schema, sources: &sources, problems: Vec::new(), files: Vec::new() };
    expansion.node(&mut root, schema.as_json(), &mut String::new());
    problems.append(&mut expansion.problems);
    files.append(&mut expansion.files);
    Layered { sources, root, problems, files, broken }
}

fn drop_ins(base: &Path, problems: &mut Vec<Problem>) -> Vec<PathBuf> {
    let folder = base.join("conf.d");
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(why) => {
            let problem = Problem::error(format!("cannot read the folder: {why}"));
            problems.push(problem.file(folder.display().to_string()));
            return Vec::new();
        }
    };
    let mut paths: Vec<PathBuf> =
        entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.extension().is_some_and(|e| e == "toml")).collect();
    paths.sort();
    if paths.len() > DROP_INS_MAX {
        let problem = Problem::error("too many drop-in files").allowed(format!("at most {DROP_INS_MAX}"));
        problems.push(problem.file(folder.display().to_string()));
        paths.truncate(DROP_INS_MAX);
    }
    paths
}

/// The folder a file is in, such that joining a relative name to it works; empty for the current one.
fn folder_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_owned()
}

/// Reads text of bounded size; an error is a clause for people.
pub fn read(path: &Path, bytes_max: u64) -> Result<String, String> {
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let mut text = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut text).map_err(|e| e.to_string())?;
    if text.len() as u64 > bytes_max {
        return Err(format!("more than {bytes_max} bytes"));
    }
    String::from_utf8(text).map_err(|e| format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
}

/// `a.b."c.d".0` as its segments.
fn segments(key: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut quoted = false;
    for c in key.trim().chars() {
        match (c, quoted, out.last_mut()) {
            ('"', _, _) => quoted = !quoted,
            ('.', false, _) => out.push(String::new()),
            (c, _, Some(last)) => last.push(c),
            _ => {}
        }
    }
    out
}

/// One `KEY=VALUE` from outside a file.
struct Assignment<'a> {
    schema: &'a Schema,
    source: usize,
    key: Vec<String>,
    key_bytes: usize,
    value: &'a str,
    /// From the environment, where letters are upper case and `-` cannot be written.
    loose: bool,
}

impl Assignment<'_> {
    fn apply(&self, root: &mut Node) -> Result<(), Box<Problem>> {
        if self.key.len() > DEPTH_MAX || self.key.iter().any(String::is_empty) {
            return Err(Box::new(self.problem("not a key path").allowed("segments joined by dots, at most 32")));
        }
        let at = Place { source: self.source, start: self.key_bytes + 1, end: self.key_bytes + 1 + self.value.len() };
        let text_only = self.schema.at(&self.key).is_some_and(|s| self.schema.is_text_only(s));
        let parsed = if text_only { None } else { document::parse_value(self.value, self.source, self.key_bytes + 1) };
        let value = match parsed {
            Some(node) => node,
            // Quoted text is accepted where text is wanted, so that both habits work.
            None => match document::parse_value(self.value, self.source, self.key_bytes + 1) {
                Some(node) if self.value.trim_start().starts_with(['"', '\'']) && node.as_text().is_some() => node,
                _ => Node::new(Value::Text(self.value.to_owned()), at),
            },
        };
        self.descend(root, 0, value)
    }

    fn descend(&self, node: &mut Node, depth: usize, value: Node) -> Result<(), Box<Problem>> {
        let Some(segment) = self.key.get(depth) else {
            *node = value;
            return Ok(());
        };
        let kind = node.kind();
        match &mut node.value {
            Value::Table(entries) => {
                if let Some(entry) = entries.iter_mut().find(|e| e.key == *segment) {
                    return self.descend(&mut entry.node, depth + 1, value);
                }
                let mut child = self.empty(depth + 1);
                self.descend(&mut child, depth + 1, value)?;
                let key_at = Place { source: self.source, start: 0, end: self.key_bytes };
                entries.push(Entry { key: segment.clone(), key_at, node: child });
                Ok(())
            }
            Value::Array(items) => {
                let index = match segment.parse::<usize>() {
                    Ok(index) if index <= items.len() => index,
                    _ => match items.iter().position(|i| self.is_named(i, segment)) {
                        Some(index) => index,
                        None => return Err(Box::new(self.no_such_entry(items, depth))),
                    },
                };
                if let Some(item) = items.get_mut(index) {
                    return self.descend(item, depth + 1, value);
                }
                let mut child = self.empty(depth + 1);
                self.descend(&mut child, depth + 1, value)?;
                items.push(child);
                Ok(())
            }
            _ => {
                let parent = self.key.get(..depth).unwrap_or(&[]).join(".");
                let help = format!("`{parent}` is {kind}, it has no keys of its own");
                Err(Box::new(self.problem("no such key").help(help)))
            }
        }
    }

    /// What a path leads through that does not exist yet: a list if the schema says so, else a table.
    fn empty(&self, depth: usize) -> Node {
        let at = Place { source: self.source, start: 0, end: self.key_bytes };
        let schema = self.key.get(..depth).and_then(|path| self.schema.at(path));
        match schema {
            Some(schema) if self.schema.is_list(schema) && !self.schema.is_table(schema) => {
                Node::new(Value::Array(Vec::new()), at)
            }
            _ => Node::table(at),
        }
    }

    fn is_named(&self, item: &Node, segment: &str) -> bool {
        let plain = |s: &str| s.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        item.name().is_some_and(|name| name == segment || self.loose && plain(name) == plain(segment))
    }

    fn no_such_entry(&self, items: &[Node], depth: usize) -> Problem {
        let names: Vec<&str> = items.iter().filter_map(Node::name).collect();
        let segment = self.key.get(depth).map_or("", String::as_str);
        let problem = self.problem(format!("no entry `{segment}`"));
        let problem = match nearest(segment, names.iter().copied()) {
            Some(near) => problem.help(format!("did you mean `{near}`?")),
            None => problem,
        };
        let count = items.len();
        problem.allowed(match names.as_slice() {
            [] => format!("an index from 0 to {count}"),
            names => format!("a name ({}), or an index from 0 to {count}", names.join(", ")),
        })
    }

    fn problem(&self, message: impl Into<String>) -> Problem {
        let at = Place { source: self.source, start: 0, end: self.key_bytes };
        Problem::error(message).key(self.key.join(".")).at(at)
    }
}

/// Expands `${NAME}`, `${NAME:-otherwise}` and `${file:PATH}` in every text, and resolves what the schema calls a path.
struct Expansion<'a> {
    inputs: &'a Inputs,
    schema: &'a Schema,
    sources: &'a Sources,
    problems: Vec<Problem>,
    files: Vec<PathBuf>,
}

impl Expansion<'_> {
    fn node(&mut self, node: &mut Node, schema: &Json, path: &mut String) {
        let at = node.at;
        match &mut node.value {
            Value::Text(text) => {
                if text.contains("${") {
                    match self.expand(text, at.source) {
                        Ok(expanded) => {
                            node.written = Some(std::mem::replace(text, expanded).into());
                        }
                        Err((message, help)) => {
                            let problem = Problem::error(message).key(path.clone()).value(document::quoted(text));
                            self.problems.push(problem.at(at).help(help));
                        }
                    }
                }
                let is_path =
                    self.schema.branches(schema).iter().any(|b| b.get("format").and_then(Json::as_str) == Some("path"));
                if is_path && !text.is_empty() {
                    let resolved = self.sources.base(at.source).join(text.as_str());
                    // A path is text in TOML, so it was UTF-8 before the join and still is.
                    *text = resolved.to_string_lossy().into_owned();
                }
            }
            Value::Array(items) => {
                let names: Vec<Option<String>> = items.iter().map(|i| i.name().map(str::to_owned)).collect();
                for (index, item) in items.iter_mut().enumerate() {
                    let name = names.get(index).cloned().flatten().unwrap_or_else(|| index.to_string());
                    self.child(item, schema, &name, path);
                }
            }
            Value::Table(entries) => {
                for entry in entries {
                    self.child(&mut entry.node, schema, &entry.key, path);
                }
            }
            _ => {}
        }
    }

    fn child(&mut self, node: &mut Node, schema: &Json, segment: &str, path: &mut String) {
        let mut below = self.schema.below(schema, segment).cloned().unwrap_or(Json::Null);
        if let (Some(Json::String(format)), Json::Object(below)) = (schema.get("format"), &mut below) {
            // A list of paths says so once.
            below.insert("format".into(), Json::String(format.clone()));
        }
        let length = path.len();
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(segment);
        self.node(node, &below, path);
        path.truncate(length);
    }

    /// The text with every reference replaced, or a message and what to do about it.
    fn expand(&mut self, text: &str, source: usize) -> Result<String, (String, String)> {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            if let Some(before) = before.strip_suffix('$') {
                // `$${` is a literal `${`.
                out.push_str(before);
                out.push_str("${");
                rest = after;
                continue;
            }
            out.push_str(before);
            let Some((name, after)) = after.split_once('}') else {
                return Err(("`${` without `}`".into(), "write `$${` for a literal `${`".into()));
            };
            out.push_str(&self.reference(name, source)?);
            rest = after;
        }
        out.push_str(rest);
        Ok(out)
    }

    fn reference(&mut self, name: &str, source: usize) -> Result<String, (String, String)> {
        if let Some(file) = name.strip_prefix("file:") {
            let path = self.sources.base(source).join(file);
            self.files.push(path.clone());
            let mut text = read(&path, FRAGMENT_BYTES_MAX).map_err(|why| {
                let help = "the path is relative to the file that names it";
                (format!("cannot read `{}`: {why}", path.display()), help.to_owned())
            })?;
            let trimmed = text.trim_end_matches(['\n', '\r']).len();
            text.truncate(trimmed);
            return Ok(text);
        }
        let (name, otherwise) = match name.split_once(":-") {
            Some((name, otherwise)) => (name, Some(otherwise)),
            None => (name, None),
        };
        match (self.inputs.environment.get(name), otherwise) {
            (Some(value), _) => Ok(value.clone()),
            (None, Some(otherwise)) => Ok(otherwise.to_owned()),
            (None, None) => Err((
                format!("the environment has no variable `{name}`"),
                format!("set it, or write `${{{name}:-otherwise}}`"),
            )),
        }
    }
}
