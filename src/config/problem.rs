//! What is wrong with a configuration, and how it is told: as a picture on a terminal, as a line in a log, as JSON for programs.
//!
//! Every problem carries its file, line, key, value and what would be allowed. Secrets never appear: they are masked in the text
//! before anything is rendered.

use std::fmt;

use annotate_snippets::renderer::DecorStyle;
use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use serde_json::json;

use super::document::{Place, Sources};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The gateway does not start, or a reload is refused.
    Error,
    /// It starts, but this is probably not what was meant.
    Warning,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    /// None: there is no text to point at, e.g. a missing file; then `file` says which.
    pub place: Option<Place>,
    pub file: Option<String>,
    /// Dotted, as `--set` takes it; empty for a syntax error.
    pub key: String,
    /// As TOML; secrets masked.
    pub value: Option<String>,
    /// One lowercase clause.
    pub message: String,
    pub allowed: Option<String>,
    /// What to do next.
    pub help: Option<String>,
}

impl Problem {
    pub fn error(message: impl Into<String>) -> Self {
        Problem {
            severity: Severity::Error,
            place: None,
            file: None,
            key: String::new(),
            value: None,
            message: message.into(),
            allowed: None,
            help: None,
        }
    }

    pub fn warning(message: impl Into<String>) -> Self {
        Problem { severity: Severity::Warning, ..Problem::error(message) }
    }

    pub fn at(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    pub fn file(mut self, file: impl Into<String>) -> Self {
        self.file = Some(file.into());
        self
    }

    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = key.into();
        self
    }

    /// The offending value, as TOML. Call after `key`: the key decides whether it is a secret.
    pub fn value(mut self, value: impl fmt::Display) -> Self {
        let leaf = self.key.rsplit('.').next().unwrap_or("");
        // Any header may be a credential.
        let secret = is_secret_key(leaf) || self.key.split('.').any(|segment| segment == "headers");
        let text = value.to_string();
        self.value = Some(if secret { MASK.to_owned() } else { shorten(&mask_urls(&text)) });
        self
    }

    pub fn allowed(mut self, allowed: impl Into<String>) -> Self {
        self.allowed = Some(allowed.into());
        self
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// All problems of one load, with the texts they point into.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub sources: Sources,
    pub problems: Vec<Problem>,
}

impl Report {
    pub fn errors(&self) -> usize {
        self.problems.iter().filter(|p| p.severity == Severity::Error).count()
    }

    pub fn warnings(&self) -> usize {
        self.problems.len() - self.errors()
    }

    /// Errors before warnings, then by source and position.
    pub fn sort(&mut self) {
        self.problems.sort_by_key(|p| (p.severity, p.place.map(|at| (at.source, at.start, at.end))));
        self.problems.dedup();
    }

    /// File and one-based line and column of a problem, as far as it has them.
    pub fn locate<'a>(&'a self, problem: &'a Problem) -> (Option<&'a str>, Option<(usize, usize)>) {
        match problem.place.and_then(|at| Some((at, self.sources.get(at.source)?))) {
            Some((at, source)) => (Some(&source.name), Some(self.sources.line_column(at))),
            None => (problem.file.as_deref(), None),
        }
    }

    /// For a terminal: the line of the file with the culprit underlined. `color` adds colour.
    pub fn pretty(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() }.decor_style(DecorStyle::Unicode);
        let mut out = String::new();
        for problem in &self.problems {
            let level = match problem.severity {
                Severity::Error => Level::ERROR,
                Severity::Warning => Level::WARNING,
            };
            let title = match problem.key.as_str() {
                "" => problem.message.clone(),
                key => format!("{key}: {}", problem.message),
            };
            let title = level.primary_title(title);
            let label = problem.allowed.as_ref().map(|a| format!("allowed: {a}"));
            let source = problem.place.and_then(|at| Some((at, self.sources.get(at.source)?)));
            let mut group = match source {
                Some((at, source)) => {
                    let text = mask_text(&source.text);
                    let end = at.end.min(text.len()).max(at.start.min(text.len()));
                    // One line of a long value is enough to find it.
                    let stop = text.get(at.start..end).and_then(|t| t.find('\n')).map_or(end, |n| at.start + n);
                    let mut annotation = AnnotationKind::Primary.span(at.start.min(text.len())..stop);
                    if let Some(label) = &label {
                        annotation = annotation.label(label.clone());
                    }
                    let snippet = Snippet::source(text).path(source.name.clone()).annotation(annotation);
                    Group::with_title(title).element(snippet)
                }
                None => {
                    let mut group = Group::with_title(title);
                    if let Some(file) = &problem.file {
                        group = group.element(Level::NOTE.message(file.clone()));
                    }
                    if let Some(label) = label {
                        group = group.element(Level::NOTE.message(label));
                    }
                    group
                }
            };
            if let Some(help) = &problem.help {
                group = group.element(Level::HELP.message(help.clone()));
            }
            out.push_str(&renderer.render(&[group]));
            out.push_str("\n\n");
        }
        out
    }

    pub fn to_json(&self) -> serde_json::Value {
        let problems: Vec<_> = self
            .problems
            .iter()
            .map(|p| {
                let (file, at) = self.locate(p);
                json!({
                    "severity": match p.severity { Severity::Error => "error", Severity::Warning => "warning" },
                    "file": file,
                    "line": at.map(|(line, _)| line),
                    "column": at.map(|(_, column)| column),
                    "key": p.key,
                    "value": p.value,
                    "message": p.message,
                    "allowed": p.allowed,
                    "help": p.help,
                })
            })
            .collect();
        json!({ "ok": self.errors() == 0, "errors": self.errors(), "warnings": self.warnings(), "problems": problems })
    }
}

/// One line each: `file:line:column: error: key = value: message; allowed: ...; help`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            let (file, at) = self.locate(problem);
            if let Some(file) = file {
                write!(f, "{file}:")?;
            }
            if let Some((line, column)) = at {
                write!(f, "{line}:{column}:")?;
            }
            if file.is_some() {
                f.write_str(" ")?;
            }
            f.write_str(match problem.severity {
                Severity::Error => "error: ",
                Severity::Warning => "warning: ",
            })?;
            match (&problem.key, &problem.value) {
                (key, _) if key.is_empty() => {}
                (key, None) => write!(f, "{key}: ")?,
                (key, Some(value)) => write!(f, "{key} = {value}: ")?,
            }
            f.write_str(&problem.message)?;
            if let Some(allowed) = &problem.allowed {
                write!(f, "; allowed: {allowed}")?;
            }
            if let Some(help) = &problem.help {
                write!(f, "; {help}")?;
            }
            f.write_str("\n")?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}

pub const MASK: &str = "\"***\"";

/// Whether a key holds a secret by its name.
pub fn is_secret_key(key: &str) -> bool {
    ["token", "password", "secret", "authorization", "api_key", "api-key", "cookie"]
        .iter()
        .any(|word| key == *word || key.strip_suffix(word).is_some_and(|k| k.ends_with(['_', '-'])))
}

/// Replaces `user:password@` in URLs by `user:***@`; keeps the length, so that spans still fit.
pub fn mask_urls(text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let mut from = 0;
    while let Some(found) = text.get(from..).and_then(|t| t.find("://")) {
        let start = from + found + 3;
        let rest = text.get(start..).unwrap_or("");
        let end = rest.find(['/', '"', '\'', ' ', '\n', '\t', '?', '#']).map_or(text.len(), |n| start + n);
        let authority = text.get(start..end).unwrap_or("");
        if let Some(host) = authority.rfind('@') {
            let secret = authority.get(..host).and_then(|user| user.find(':')).map(|n| start + n + 1..start + host);
            bytes.get_mut(secret.unwrap_or(0..0)).into_iter().flatten().for_each(|b| *b = b'*');
        }
        from = end.max(start);
    }
    String::from_utf8(bytes).unwrap_or_default()
}

/// Masks a whole source for display: values of secret keys and passwords in URLs, byte for byte.
///
/// Works on the text, not on the parsed tree, so that a line that does not parse is masked too.
fn mask_text(text: &str) -> String {
    let mut out = mask_urls(text).into_bytes();
    let mut from = 0;
    while let Some(found) = text.get(from..).and_then(|t| t.find('=')) {
        let equals = from + found;
        let key = text.get(..equals).unwrap_or("").trim_end().trim_end_matches(['"', '\'']);
        let start = key.rfind(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))).map_or(0, |n| n + 1);
        let leaf = key.get(start..).unwrap_or("").to_ascii_lowercase();
        let line_end = text.get(equals..).and_then(|t| t.find('\n')).map_or(text.len(), |n| equals + n);
        if is_secret_key(leaf.trim_start_matches(['_', '-'])) {
            out.get_mut(equals + 1..line_end).into_iter().flatten().filter(|b| **b != b' ').for_each(|b| *b = b'*');
            from = line_end;
        } else {
            from = equals + 1;
        }
    }
    String::from_utf8(out).unwrap_or_default()
}

fn shorten(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => format!("{}...", text.get(..at).unwrap_or("")),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked_in_text_that_does_not_even_parse() {
        let text = "[admin]\ntoken = \"hunter2\nurl = \"mqtt://me:hunter2@host:1883/x\" # hunter2@\n";
        let masked = mask_text(text);
        assert_eq!(masked.len(), text.len());
        assert!(!masked.contains("\"hunter2"), "{masked}");
        assert!(!masked.contains("me:hunter2"), "{masked}");
        assert!(masked.contains("mqtt://me:*******@host:1883/x"), "{masked}");
    }

    #[test]
    fn the_value_of_a_secret_key_is_never_kept() {
        let problem = Problem::error("too short").key("admin.token").value("\"abc\"");
        assert_eq!(problem.value.as_deref(), Some(MASK));
        let problem = Problem::error("x").key("upstream.broker.endpoints.0.url").value("\"mqtt://a:b@c\"");
        assert_eq!(problem.value.as_deref(), Some("\"mqtt://a:*@c\""));
    }
}
