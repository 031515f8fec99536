//! `tidegate config show`: the effective configuration as TOML or JSON, secrets masked.

use serde_json::Value as Json;

use super::Loaded;
use super::document::{self, Node, Sources, Value};
use super::problem::{is_secret_key, mask_urls};

/// The effective configuration as TOML, each table under its header.
pub fn toml(loaded: &Loaded) -> String {
    let mut out = String::new();
    for entry in masked(loaded).entries() {
        match &entry.node.value {
            Value::Array(items) if items.is_empty() => {}
            Value::Array(items) => {
                for item in items {
                    out.push_str(&format!("[[{}]]\n", entry.key));
                    fields(&mut out, item);
                }
            }
            Value::Table(_) => {
                out.push_str(&format!("[{}]\n", entry.key));
                fields(&mut out, &entry.node);
            }
            _ => out.push_str(&format!("{} = {}\n", entry.key, entry.node)),
        }
    }
    out
}

/// The same as JSON.
pub fn json(loaded: &Loaded) -> Json {
    to_json(&masked(loaded))
}

fn fields(out: &mut String, table: &Node) {
    for entry in table.entries() {
        out.push_str(&format!("{} = {}\n", entry.key, entry.node));
    }
    out.push('\n');
}

/// The configuration as a tree in which no secret is left.
fn masked(loaded: &Loaded) -> Node {
    let mut sources = Sources::default();
    let text = toml::to_string(&loaded.config).unwrap_or_default();
    let source = sources.add("effective", text, "");
    let mut node = document::parse(&sources, source, &mut Vec::new());
    mask(&mut node, "", Some(&loaded.document));
    node
}

fn mask(node: &mut Node, key: &str, written: Option<&Node>) {
    match &mut node.value {
        Value::Text(text) => {
            let from_file = written.and_then(|w| w.written.as_deref()).filter(|w| w.contains("${file:"));
            if let Some(reference) = from_file {
                // Says where the secret is, not what it is.
                *text = reference.to_owned();
            } else if is_secret_key(key) && !text.is_empty() {
                *text = "***".to_owned();
            } else {
                *text = mask_urls(text);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                mask(item, key, written.and_then(|w| w.items().get(index)));
            }
        }
        Value::Table(entries) => {
            for entry in entries {
                // Any header may be a credential.
                let inner = if key == "headers" { "secret" } else { &entry.key };
                mask(&mut entry.node, inner, written.and_then(|w| w.get(&entry.key)));
            }
        }
        _ => {}
    }
}

fn to_json(node: &Node) -> Json {
    match &node.value {
        Value::Text(text) | Value::Datetime(text) => Json::String(text.clone()),
        Value::Integer(number) => i64::try_from(*number).map_or(Json::Null, Json::from),
        Value::Float(number) => Json::from(*number),
        Value::Bool(flag) => Json::Bool(*flag),
        Value::Array(items) => Json::Array(items.iter().map(to_json).collect()),
        Value::Table(entries) => entries.iter().map(|e| (e.key.clone(), to_json(&e.node))).collect(),
    }
}
