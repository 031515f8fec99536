//! `tidegate device import FILE`: many devices in one transaction, or a list of everything that is wrong.
//!
//! CSV (RFC 4180): the first line names the columns `id` (needed), `role`, `public_key`, `not_before`, `not_after` and any `attr:KEY`; an empty field
//! is as none. JSON: a list of objects with `id`, `role`, `public_key` or `public_keys`, `not_before`, `not_after` and `attributes`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::json;
use tidegate_auth::keyfile::public_from_text;
use tidegate_auth::{PublicKey, SecretKey};

use super::key_file::KeyFile;
use super::{ATTRIBUTES_MAX, DEFAULT_ROLE, Site, check_attribute, check_role, failure, moment, random, unix_now};
use crate::cli::{Context, Exit, Failure, private_file};
use crate::identity::{GatewayKey, NewDevice, NewKey, Registry};
use crate::message::DeviceId;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// A file whose name ends in .csv or .json.
    #[arg(value_name = "FILE.csv|FILE.json")]
    file: PathBuf,
    /// Generate a key for every device that brings none, and write it to DIR/ID.key.
    #[arg(long, value_name = "DIR")]
    keys: Option<PathBuf>,
    /// Say what is wrong and how many would be added; change nothing.
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(context: &Context, site: &Site, arguments: &Arguments) -> Result<(), Failure> {
    let path = &arguments.file;
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::input(format!("cannot read {}: {error}", path.display())))?;
    let mut problems = Vec::new();
    let rows = match path.extension().and_then(|extension| extension.to_str()) {
        Some("csv") => read_csv(&text, &mut problems),
        Some("json") => read_json(&text, &mut problems),
        Some(_) | None => return Err(Failure::usage(format!("{}: name a .csv or a .json file", path.display()))),
    };
    let mut registry = site.registry()?;
    let gateway = GatewayKey::open(&site.data_dir, &registry).map_err(failure)?;
    let bar = bar(rows.len());
    bar.set_message("checking");
    let mut checker = Checker::new(&registry, arguments.keys.is_some())?;
    let mut devices = Vec::with_capacity(rows.len());
    for row in &rows {
        devices.extend(checker.check(row, &mut problems)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if !problems.is_empty() {
        problems.sort_by_key(|problem| problem.line);
        return report(context, path, &problems);
    }
    if !arguments.dry_run {
        write(&mut registry, devices, arguments.keys.as_deref(), &gateway.public)?;
    }
    let (count, done) = (rows.len(), !arguments.dry_run);
    if context.json {
        return context.print_json(&json!({ "ok": true, "devices": count, "added": done }));
    }
    context.print(&if done { format!("{count} devices added\n") } else { format!("{count} devices would be added\n") })
}

/// A device as the file has it.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    #[serde(skip)]
    line: usize,
    id: String,
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    public_key: Option<String>,
    #[serde(default)]
    public_keys: Vec<String>,
    #[serde(default)]
    not_before: Option<String>,
    #[serde(default)]
    not_after: Option<String>,
    #[serde(default)]
    attributes: BTreeMap<String, String>,
}

/// What is wrong, and where: a line of a CSV file, an entry of a JSON file.
#[derive(Debug, PartialEq, Eq)]
struct Problem {
    line: usize,
    what: String,
}

impl Problem {
    fn new(line: usize, what: impl Into<String>) -> Problem {
        Problem { line, what: what.into() }
    }
}

/// Everything that makes a row a device, against the registry and against the rows before.
struct Checker {
    may_generate: bool,
    known_ids: HashSet<DeviceId>,
    known_keys: HashMap<PublicKey, DeviceId>,
    lines: HashMap<DeviceId, usize>,
}

impl Checker {
    fn new(registry: &Registry, may_generate: bool) -> Result<Checker, Failure> {
        let records = registry.list().map_err(failure)?;
        let known_keys =
            records.iter().flat_map(|record| record.keys.iter().map(|key| (key.public, record.id.clone()))).collect();
        let known_ids = records.into_iter().map(|record| record.id).collect();
        Ok(Checker { may_generate, known_ids, known_keys, lines: HashMap::new() })
    }

    fn check(&mut self, row: &Row, problems: &mut Vec<Problem>) -> Result<Option<Planned>, Failure> {
        let before = problems.len();
        let mut wrong = |what: String| problems.push(Problem::new(row.line, what));
        let Ok(id) = DeviceId::parse(&row.id) else {
            wrong(format!("`{}`: {}", row.id, crate::message::InvalidDeviceId));
            return Ok(None);
        };
        if self.known_ids.contains(&id) {
            wrong(format!("device {id} exists already"));
        }
        if let Some(first) = self.lines.insert(id.clone(), row.line) {
            wrong(format!("device {id} is in this file twice, first at {first}"));
        }
        let role = row.role.clone().filter(|role| !role.is_empty()).unwrap_or_else(|| DEFAULT_ROLE.to_owned());
        if let Err(why) = check_role(&role) {
            wrong(format!("role `{role}`: {why}"));
        }
        for (key, value) in &row.attributes {
            if let Err(why) = check_attribute(key, value) {
                wrong(format!("attribute `{key}`: {why}"));
            }
        }
        if row.attributes.len() > ATTRIBUTES_MAX {
            wrong(format!("a device has at most {ATTRIBUTES_MAX} attributes"));
        }
        let mut time = |name: &str, text: &Option<String>| {
            let text = text.as_deref().filter(|text| !text.is_empty())?;
            moment::parse(text).map_err(|why| wrong(format!("{name} `{text}`: {why}"))).ok()
        };
        let (not_before, not_after) = (time("not_before", &row.not_before), time("not_after", &row.not_after));
        if let (Some(from), Some(until)) = (not_before, not_after)
            && from >= until
        {
            wrong("not_after is not later than not_before".to_owned());
        }
        let mut keys = Vec::new();
        for text in row.public_key.iter().chain(&row.public_keys).filter(|text| !text.is_empty()) {
            match public_from_text(text) {
                Err(why) => wrong(format!("public key `{}`: {why}", shortened(text))),
                Ok(public) => match self.known_keys.insert(public, id.clone()) {
                    Some(owner) => wrong(format!("the key {} belongs to device {owner} already", public.key_id())),
                    None => keys.push(NewKey { public, not_before, not_after }),
                },
            }
        }
        if keys.len() > Registry::KEYS_MAX {
            wrong(format!("a device has at most {} keys", Registry::KEYS_MAX));
        }
        let mut secret = None;
        if row.public_key.iter().chain(&row.public_keys).all(String::is_empty) {
            if self.may_generate {
                let generated = SecretKey::from_seed(&random()?);
                keys.push(NewKey { public: generated.public(), not_before, not_after });
                secret = Some(generated);
            } else {
                wrong("no public_key (--keys DIR generates one)".to_owned());
            }
        }
        let attributes = row.attributes.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let planned = Planned { device: NewDevice { id, role, attributes, keys }, secret };
        Ok((problems.len() == before).then_some(planned))
    }
}

/// A device that can be added, with its private key if that was made here.
struct Planned {
    device: NewDevice,
    secret: Option<SecretKey>,
}

/// Key files first, then all devices at once; if that fails, no key file stays.
fn write(
    registry: &mut Registry,
    planned: Vec<Planned>,
    folder: Option<&Path>,
    gateway: &PublicKey,
) -> Result<(), Failure> {
    let mut written = Vec::new();
    let outcome = (|| {
        if let Some(folder) = folder {
            private_file::create_folder(folder, true)?;
            for Planned { device, secret } in &planned {
                let Some(secret) = secret else { continue };
                let path = folder.join(format!("{}.key", device.id));
                KeyFile::write(&path, &device.id, secret, gateway)?;
                written.push(path);
            }
        }
        let devices: Vec<NewDevice> = planned.into_iter().map(|planned| planned.device).collect();
        let bar = bar(devices.len());
        bar.set_message("adding");
        let outcome = registry.add(&devices, unix_now(), |done| bar.set_position(done as u64));
        bar.finish_and_clear();
        outcome.map_err(failure)
    })();
    if outcome.is_err() {
        for path in written {
            let _ = std::fs::remove_file(path);
        }
    }
    outcome
}

fn report(context: &Context, path: &Path, problems: &[Problem]) -> Result<(), Failure> {
    if context.json {
        let list: Vec<_> = problems.iter().map(|p| json!({ "line": p.line, "problem": p.what })).collect();
        context.print_json(&json!({ "ok": false, "problems": list }))?;
        return Err(Failure::silent(Exit::Input));
    }
    let mut text = String::new();
    for problem in problems {
        text.push_str(&format!("{}:{}: {}\n", path.display(), problem.line, problem.what));
    }
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
    Err(Failure::input(format!("{} problems in {}; nothing was added", problems.len(), path.display())))
}

/// On standard error, and only if that is a terminal.
fn bar(length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:40}] {pos}/{len} devices, {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn shortened(text: &str) -> String {
    let mut start: String = text.chars().take(24).collect();
    if start.len() < text.len() {
        start.push_str("...");
    }
    start
}

fn read_json(text: &str, problems: &mut Vec<Problem>) -> Vec<Row> {
    let entries: Vec<serde_json::Value> = match serde_json::from_str(text) {
        Ok(entries) => entries,
        Err(error) => {
            problems.push(Problem::new(error.line(), format!("not a JSON list of devices: {error}")));
            return Vec::new();
        }
    };
    let mut rows = Vec::with_capacity(entries.len());
    for (number, entry) in (1..).zip(entries) {
        match serde_json::from_value::<Row>(entry) {
            Ok(row) => rows.push(Row { line: number, ..row }),
            Err(error) => problems.push(Problem::new(number, format!("entry {number}: {error}"))),
        }
    }
    rows
}

fn read_csv(text: &str, problems: &mut Vec<Problem>) -> Vec<Row> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut records = Vec::new();
    for record in CsvRecords::new(text) {
        match record {
            Ok(record) => records.push(record),
            Err(problem) => problems.push(problem),
        }
    }
    let mut records = records.into_iter();
    let Some((line, columns)) = records.next() else {
        problems.push(Problem::new(1, "the file is empty; its first line names the columns, at least id"));
        return Vec::new();
    };
    let columns: Vec<String> = columns.iter().map(|column| column.trim().to_owned()).collect();
    let mut seen = HashSet::new();
    for column in &columns {
        let known = ["id", "role", "public_key", "not_before", "not_after"].contains(&column.as_str());
        if !known && column.strip_prefix("attr:").is_none_or(str::is_empty) {
            let allowed = "allowed: id, role, public_key, not_before, not_after, attr:KEY";
            problems.push(Problem::new(line, format!("unknown column `{column}`; {allowed}")));
        }
        if !seen.insert(column) {
            problems.push(Problem::new(line, format!("column `{column}` is there twice")));
        }
    }
    if !columns.iter().any(|column| column == "id") {
        problems.push(Problem::new(line, "there is no column `id`"));
    }
    if !problems.is_empty() {
        return Vec::new();
    }
    let mut rows = Vec::new();
    for (line, fields) in records {
        if fields.len() != columns.len() {
            let what = format!("{} fields, and the first line names {}", fields.len(), columns.len());
            problems.push(Problem::new(line, what));
            continue;
        }
        let mut row = Row { line, ..Row::default() };
        for (column, field) in columns.iter().zip(fields) {
            let field = field.trim().to_owned();
            match column.as_str() {
                "id" => row.id = field,
                "role" => row.role = Some(field),
                "public_key" => row.public_key = Some(field),
                "not_before" => row.not_before = Some(field),
                "not_after" => row.not_after = Some(field),
                attribute if !field.is_empty() => {
                    let key = attribute.strip_prefix("attr:").unwrap_or(attribute);
                    row.attributes.insert(key.to_owned(), field);
                }
                _ => {}
            }
        }
        rows.push(row);
    }
    rows
}

/// The records of a CSV text, each with the line where it begins. Empty lines are skipped.
struct CsvRecords<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    line: usize,
}

impl<'a> CsvRecords<'a> {
    fn new(text: &'a str) -> Self {
        CsvRecords { rest: text.chars().peekable(), line: 1 }
    }

    /// A quoted field, from behind its opening quote.
    fn quoted(&mut self, begun: usize) -> Result<String, Problem> {
        let mut field = String::new();
        loop {
            match self.rest.next() {
                Some('"') if self.rest.peek() == Some(&'"') => {
                    self.rest.next();
                    field.push('"');
                }
                Some('"') => return Ok(field),
                Some(other) => {
                    self.line += usize::from(other == '\n');
                    field.push(other);
                }
                None => return Err(Problem::new(begun, "a quote is not closed")),
            }
        }
    }

    fn record(&mut self, begun: usize) -> Result<Vec<String>, Problem> {
        let mut fields = vec![String::new()];
        loop {
            let next = self.rest.next();
            let Some(field) = fields.last_mut() else { return Ok(fields) };
            match next {
                None => return Ok(fields),
                Some('\n') => {
                    self.line += 1;
                    if field.ends_with('\r') {
                        field.pop();
                    }
                    return Ok(fields);
                }
                Some(',') => fields.push(String::new()),
                Some('"') if field.is_empty() => *field = self.quoted(begun)?,
                Some(other) => field.push(other),
            }
        }
    }
}

impl Iterator for CsvRecords<'_> {
    type Item = Result<(usize, Vec<String>), Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.rest.peek()?;
            let begun = self.line;
            match self.record(begun) {
                Ok(fields) if fields.iter().all(|field| field.trim().is_empty()) && fields.len() == 1 => {}
                other => return Some(other.map(|fields| (begun, fields))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn csv(text: &str) -> (Vec<Row>, Vec<Problem>) {
        let mut problems = Vec::new();
        let rows = read_csv(text, &mut problems);
        (rows, problems)
    }

    #[test]
    fn quotes_line_ends_and_a_byte_order_mark_are_understood() {
        let (rows, problems) =
            csv("\u{feff}id,attr:note,role\r\na,\"says \"\"hi\"\", twice\",sensor\r\n\r\n\"b\",\"two\nlines\",\nc,,");
        assert_eq!(problems, []);
        let seen: Vec<_> = rows
            .iter()
            .map(|row| (row.line, row.id.as_str(), row.attributes.get("note").map(String::as_str), row.role.as_deref()))
            .collect();
        assert_eq!(
            seen,
            [
                (2, "a", Some("says \"hi\", twice"), Some("sensor")),
                (4, "b", Some("two\nlines"), Some("")),
                (6, "c", None, Some("")),
            ]
        );
    }

    #[test]
    fn the_first_line_is_judged_first() {
        for (text, what) in [
            ("", "the file is empty; its first line names the columns, at least id"),
            ("role\n", "there is no column `id`"),
            ("id,id\n", "column `id` is there twice"),
            ("id,color\n", "unknown column `color`; allowed: id, role, public_key, not_before, not_after, attr:KEY"),
            ("id,attr:\n", "unknown column `attr:`; allowed: id, role, public_key, not_before, not_after, attr:KEY"),
            ("id\n\"a\n", "a quote is not closed"),
        ] {
            let (rows, problems) = csv(text);
            assert!(rows.is_empty(), "{text}");
            assert_eq!(problems[0].what, what);
        }
    }

    #[test]
    fn a_json_entry_with_a_typing_error_is_named() {
        let mut problems = Vec::new();
        let rows = read_json(r#"[{"id":"a"},{"id":"b","rol":"x"},{"role":"y"},7]"#, &mut problems);
        assert_eq!(rows.len(), 1);
        assert_eq!(problems.iter().map(|p| p.line).collect::<Vec<_>>(), [2, 3, 4]);
        assert!(problems[0].what.contains("`rol`"), "{problems:?}");
        problems.clear();
        assert!(read_json("[{\n\"id\": }]", &mut problems).is_empty());
        assert_eq!(problems[0].line, 2);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[a,\"\r\n:id]*") {
            let _ = csv(&text);
            let _ = csv(&format!("id,role\n{text}"));
            let _ = read_json(&text, &mut Vec::new());
        }
    }
}
