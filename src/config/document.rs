//! The configuration as written: a tree of values that each know the text they came from.
//!
//! Every layer (file, drop-in, environment, `--set`) is a source with a text, so that one kind of place serves all diagnostics.
//! Parsing keeps going after a syntax error where the TOML parser can; it never panics and its depth is bounded.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::Problem;

/// Dotted keys nest deeper than any key of ours long before this; the bound keeps recursion away from the stack's end.
pub const DEPTH_MAX: usize = 32;

/// A span of bytes in one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Place {
    pub source: usize,
    pub start: usize,
    pub end: usize,
}

/// One text that took part: where it is and what it says.
#[derive(Clone, Debug)]
pub struct Source {
    /// What a person would look for: a path, `--set`, `environment`.
    pub name: String,
    pub text: String,
    /// Relative paths named in this source start here.
    pub base: PathBuf,
}

#[derive(Clone, Debug, Default)]
pub struct Sources {
    all: Vec<Source>,
}

impl Sources {
    pub fn add(&mut self, name: impl Into<String>, text: impl Into<String>, base: impl Into<PathBuf>) -> usize {
        self.all.push(Source { name: name.into(), text: text.into(), base: base.into() });
        self.all.len() - 1
    }

    pub fn get(&self, source: usize) -> Option<&Source> {
        self.all.get(source)
    }

    pub fn base(&self, source: usize) -> &Path {
        self.get(source).map_or(Path::new(""), |s| &s.base)
    }

    /// The text of a place; empty if the place is not in its source.
    pub fn text(&self, place: Place) -> &str {
        self.get(place.source).and_then(|s| s.text.get(place.start..place.end)).unwrap_or("")
    }

    /// One-based line and column (in characters) of the start of a place.
    pub fn line_column(&self, place: Place) -> (usize, usize) {
        let Some(before) = self.get(place.source).and_then(|s| s.text.get(..place.start)) else { return (1, 1) };
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
        (line, column)
    }
}

#[derive(Clone, Debug)]
pub struct Node {
    pub value: Value,
    pub at: Place,
    /// The text before `${...}` was expanded; shown instead of the value, which may be a secret.
    pub written: Option<Box<str>>,
}

#[derive(Clone, Debug)]
pub enum Value {
    Text(String),
    Integer(i128),
    Float(f64),
    Bool(bool),
    /// TOML dates and times; no key of ours takes one.
    Datetime(String),
    Array(Vec<Node>),
    Table(Vec<Entry>),
}

/// What an overlay does with a list of tables that have names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lists {
    /// An entry with a known name changes that entry, another one is added: files over files.
    Merge,
    /// The later list is the list: files over the built-in defaults.
    Replace,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub key: String,
    pub key_at: Place,
    pub node: Node,
}

/// One step from a table or an array to a value in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Key(String),
    Index(usize),
}

/// A key path. Rendered with the name of a list's entry where it has one, so that it can be pasted behind `--set`.
pub type KeyPath = Vec<Step>;

impl Node {
    pub fn new(value: Value, at: Place) -> Self {
        Node { value, at, written: None }
    }

    pub fn table(at: Place) -> Self {
        Node::new(Value::Table(Vec::new()), at)
    }

    /// The value under `key`, if this is a table that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Table(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.node),
            _ => None,
        }
    }

    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn items(&self) -> &[Node] {
        match &self.value {
            Value::Array(items) => items,
            _ => &[],
        }
    }

    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Table(entries) => entries,
            _ => &[],
        }
    }

    /// The `name` of a list's entry.
    pub fn name(&self) -> Option<&str> {
        self.get("name").and_then(Node::as_text)
    }

    pub fn at_path(&self, path: &[Step]) -> Option<&Node> {
        path.iter().try_fold(self, |node, step| match step {
            Step::Key(key) => node.get(key),
            Step::Index(index) => node.items().get(*index),
        })
    }

    /// Removes what is at `path`; does nothing if it is not there.
    pub fn remove(&mut self, path: &[Step]) {
        let Some((step, rest)) = path.split_first() else {
            return;
        };
        match (step, &mut self.value) {
            (Step::Key(key), Value::Table(entries)) => {
                if rest.is_empty() {
                    entries.retain(|e| e.key != *key);
                } else if let Some(entry) = entries.iter_mut().find(|e| e.key == *key) {
                    entry.node.remove(rest);
                }
            }
            (Step::Index(index), Value::Array(items)) => {
                if let Some(item) = items.get_mut(*index) {
                    if rest.is_empty() {
                        items.remove(*index);
                    } else {
                        item.remove(rest);
                    }
                }
            }
            _ => {}
        }
    }

    /// Writes a path as `listener.plain.bind`: entries by name where they have one, by index otherwise.
    pub fn render_path(&self, path: &[Step]) -> String {
        let mut out = String::new();
        let mut node = Some(self);
        for step in path {
            if !out.is_empty() {
                out.push('.');
            }
            match step {
                Step::Key(key) => {
                    push_segment(&mut out, key);
                    node = node.and_then(|n| n.get(key));
                }
                Step::Index(index) => {
                    node = node.and_then(|n| n.items().get(*index));
                    match node.and_then(Node::name) {
                        Some(name) if !name.is_empty() => push_segment(&mut out, name),
                        _ => out.push_str(&index.to_string()),
                    }
                }
            }
        }
        out
    }

    pub fn kind(&self) -> &'static str {
        match self.value {
            Value::Text(_) => "text",
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Bool(_) => "true or false",
            Value::Datetime(_) => "a date or time",
            Value::Array(_) => "a list",
            Value::Table(_) => "a table",
        }
    }

    /// Puts a later layer on top: tables key by key, everything else replaced; with [`Lists::Merge`] also lists of named
    /// tables entry by entry.
    pub fn overlay(&mut self, later: Node, lists: Lists) {
        match (&mut self.value, later.value) {
            (Value::Table(entries), Value::Table(new)) => {
                for entry in new {
                    match entries.iter_mut().find(|e| e.key == entry.key) {
                        Some(old) => old.node.overlay(entry.node, lists),
                        None => entries.push(entry),
                    }
                }
            }
            (Value::Array(items), Value::Array(new)) if lists == Lists::Merge && named(items) && named(&new) => {
                for item in new {
                    match items.iter_mut().find(|i| i.name() == item.name()) {
                        Some(old) => old.overlay(item, lists),
                        None => items.push(item),
                    }
                }
            }
            (_, value) => *self = Node { value, at: later.at, written: later.written },
        }
    }
}

impl fmt::Display for Node {
    /// As TOML on one line; a table inside a list becomes an inline table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Value::Text(text) => f.write_str(&quoted(self.written.as_deref().unwrap_or(text))),
            Value::Integer(number) => write!(f, "{number}"),
            Value::Float(number) => write!(f, "{number:?}"),
            Value::Bool(flag) => write!(f, "{flag}"),
            Value::Datetime(text) => f.write_str(text),
            Value::Array(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str("]")
            }
            Value::Table(entries) if entries.is_empty() => f.write_str("{}"),
            Value::Table(entries) => {
                for (i, entry) in entries.iter().enumerate() {
                    let mut key = String::new();
                    push_segment(&mut key, &entry.key);
                    write!(f, "{}{key} = {}", if i == 0 { "{ " } else { ", " }, entry.node)?;
                }
                f.write_str(" }")
            }
        }
    }
}

/// A text as a TOML basic string.
pub fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Parses one source. On a syntax error the tree holds what could be read, and `problems` every error.
pub fn parse(sources: &Sources, source: usize, problems: &mut Vec<Problem>) -> Node {
    let text = sources.get(source).map_or("", |s| s.text.as_str());
    let whole = Place { source, start: 0, end: 0 };
    if let Some(place) = too_deep(text, source) {
        problems.push(Problem::error("keys nest too deeply").at(place).allowed(format!("at most {DEPTH_MAX} levels")));
        return Node::table(whole);
    }
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        let place = clamp(text, source, span);
        problems.push(Problem::error(format!("syntax: {}", error.message().replace('\n', "; "))).at(place));
    }
    let mut problems_of_values = Vec::new();
    let node = from_table(table.get_ref(), whole, source, &mut problems_of_values);
    problems.append(&mut problems_of_values);
    node
}

/// Parses the text of one value, as after `--set KEY=`. None: not a TOML value, so it is meant as plain text.
pub fn parse_value(text: &str, source: usize, offset: usize) -> Option<Node> {
    if too_deep(text, source).is_some() || text.contains('\n') {
        return None;
    }
    let value = DeValue::parse(text).ok()?;
    let mut problems = Vec::new();
    let mut node = from_value(&value, source, &mut problems);
    shift(&mut node, offset);
    problems.is_empty().then_some(node)
}

fn shift(node: &mut Node, offset: usize) {
    node.at.start += offset;
    node.at.end += offset;
    match &mut node.value {
        Value::Array(items) => items.iter_mut().for_each(|i| shift(i, offset)),
        Value::Table(entries) => {
            for entry in entries {
                entry.key_at.start += offset;
                entry.key_at.end += offset;
                shift(&mut entry.node, offset);
            }
        }
        _ => {}
    }
}

fn from_table(table: &DeTable<'_>, at: Place, source: usize, problems: &mut Vec<Problem>) -> Node {
    let mut entries: Vec<Entry> = table
        .iter()
        .map(|(key, value)| {
            let span = key.span();
            let node = from_value(value, source, problems);
            let key = key.get_ref().to_string();
            Entry { key, key_at: Place { source, start: span.start, end: span.end }, node }
        })
        .collect();
    // The order of the text, which is the order people expect problems and output in.
    entries.sort_by_key(|e| e.key_at.start);
    Node::new(Value::Table(entries), at)
}

fn from_value(value: &Spanned<DeValue<'_>>, source: usize, problems: &mut Vec<Problem>) -> Node {
    let span = value.span();
    let at = Place { source, start: span.start, end: span.end };
    let value = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Boolean(flag) => Value::Bool(*flag),
        DeValue::Datetime(datetime) => Value::Datetime(datetime.to_string()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => {
                problems.push(Problem::error("the integer is too large").at(at).allowed("64 bits"));
                Value::Integer(0)
            }
        },
        DeValue::Float(number) => match number.as_str().parse::<f64>() {
            Ok(number) => Value::Float(number),
            Err(_) => {
                problems.push(Problem::error("not a number").at(at));
                Value::Float(0.0)
            }
        },
        DeValue::Array(items) => Value::Array(items.iter().map(|i| from_value(i, source, problems)).collect()),
        DeValue::Table(table) => return from_table(table, at, source, problems),
    };
    Node::new(value, at)
}

/// Measures nesting without recursion, before a recursive parser sees the text: brackets, and dots in one key.
fn too_deep(text: &str, source: usize) -> Option<Place> {
    let bytes = text.as_bytes();
    let (mut depth, mut dots, mut at) = (0usize, 0usize, 0usize);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'#' => at += bytes.iter().skip(at).take_while(|b| **b != b'\n').count() - 1,
            b'"' | b'\'' => {
                at = end_of_string(bytes, at, *byte);
                continue;
            }
            b'[' | b'{' => (depth, dots) = (depth + 1, 0),
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'.' => dots += 1,
            b'=' | b',' | b'\n' => dots = 0,
            _ => {}
        }
        if depth > DEPTH_MAX || dots > DEPTH_MAX {
            return Some(Place { source, start: at, end: at + 1 });
        }
        at += 1;
    }
    None
}

/// Index behind a string that opens at `at`; the end of the line, or of the text, if it never closes.
fn end_of_string(bytes: &[u8], at: usize, quote: u8) -> usize {
    let triple = [quote; 3];
    let multi = bytes.get(at..at + 3) == Some(&triple);
    let mut end = if multi { at + 3 } else { at + 1 };
    while let Some(byte) = bytes.get(end) {
        match byte {
            b'\\' if quote == b'"' => end += 1,
            b'\n' if !multi => return end,
            _ if multi && bytes.get(end..end + 3) == Some(&triple) => return end + 3,
            byte if !multi && *byte == quote => return end + 1,
            _ => {}
        }
        end += 1;
    }
    end
}

fn clamp(text: &str, source: usize, span: Range<usize>) -> Place {
    let floor = |mut at: usize| {
        at = at.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let start = floor(span.start);
    Place { source, start, end: floor(span.end).max(start) }
}

fn named(items: &[Node]) -> bool {
    items.iter().all(|i| i.name().is_some())
}

fn push_segment(out: &mut String, key: &str) {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if bare {
        out.push_str(key);
    } else {
        out.push_str(&quoted(key));
    }
}
