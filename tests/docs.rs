//! What the documents name exists: linked files and headings, paths, gates of `ci.sh`, every `tidegate` command with its options, and the tests that
//! stand for conformance.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// README and every other document of the repository, as (path below the root, text).
fn documents() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if !name.starts_with('.') && !["target", "node_modules", "corpus"].contains(&name) {
                    folders.push(path);
                }
            } else if name.ends_with(".md") {
                found.push((path.strip_prefix(root()).unwrap().to_owned(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.iter().any(|(path, _)| path == Path::new("README.md")), "there is no README.md");
    found.sort();
    found
}

#[test]
fn every_link_leads_somewhere() {
    let mut faults = Vec::new();
    for (path, text) in documents() {
        for link in links(&text) {
            let (file, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target =
                if file.is_empty() { root().join(&path) } else { root().join(&path).with_file_name("").join(file) };
            if !target.exists() {
                faults.push(format!("{}: link to {link}, which does not exist", path.display()));
            } else if !heading.is_empty() {
                let text = fs::read_to_string(&target).unwrap_or_default();
                if !headings(&text).contains(heading) {
                    faults.push(format!("{}: link to {link}, where there is no such heading", path.display()));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_path_in_code_marks_exists() {
    let mut faults = Vec::new();
    for (path, text) in documents() {
        // A changelog and a decision record tell what was, too.
        if path.starts_with("docs/adr") || path == Path::new("CHANGELOG.md") {
            continue;
        }
        for named in inline_code(&text).iter().filter(|code| is_repository_path(code)) {
            let here = root().join(&path).with_file_name("").join(named);
            if !root().join(named).exists() && !here.exists() {
                faults.push(format!("{}: `{named}` does not exist", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_command_with_its_options_exists() {
    let mut faults = Vec::new();
    let mut checked = 0;
    for (path, text) in documents() {
        if path.starts_with("docs/adr") || path == Path::new("CHANGELOG.md") {
            continue;
        }
        for command in commands(&text) {
            checked += 1;
            if let Err(fault) = command.check() {
                faults.push(format!("{}: {fault}", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(checked > 0, "no document names a single tidegate command");
}

#[test]
fn every_test_named_as_proof_of_conformance_exists() {
    let folder = root().join("docs/conformance");
    let sources: String = ["src", "protocols", "tests"]
        .iter()
        .flat_map(|folder| rust_files(&root().join(folder)))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let mut named = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        for code in inline_code(&fs::read_to_string(&path).unwrap()) {
            let is_name = code.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:/.".contains(c));
            let Some((_, test)) = code.rsplit_once("::").filter(|_| is_name) else { continue };
            named += 1;
            assert!(sources.contains(&format!("fn {test}(")), "{} names `{code}`, which is no test", path.display());
        }
    }
    assert!(named > 50, "docs/conformance was not found");
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() && !path.ends_with("target") {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn every_gate_named_exists() {
    let ci = fs::read_to_string(root().join("ci.sh")).unwrap();
    let gates = ci.lines().find_map(|l| l.strip_prefix("gates=(")?.strip_suffix(')')).unwrap();
    let gates: BTreeSet<&str> = gates.split(' ').collect();
    for (path, text) in documents() {
        for line in inline_code(&text).into_iter().chain(code_lines(&text)) {
            let Some(rest) = line.trim().strip_prefix("./ci.sh") else { continue };
            for gate in rest.split('#').next().unwrap().split_whitespace() {
                let placeholder = gate.starts_with('-') || gate.chars().all(|c| c.is_uppercase() || c == '.');
                assert!(placeholder || gates.contains(gate), "{}: ./ci.sh has no gate {gate}", path.display());
            }
        }
    }
}

/// The targets of `[text](target)` outside code, web addresses left out.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose_lines(text) {
        let line = without_code(&line);
        let mut rest = line.as_str();
        while let Some(at) = rest.find("](") {
            rest = &rest[at + 2..];
            let Some(end) = rest.find(')') else { break };
            let target = rest[..end].split_whitespace().next().unwrap_or_default();
            if !target.contains("://") && !target.starts_with("mailto:") && !target.is_empty() {
                found.push(target.to_owned());
            }
        }
    }
    found
}

/// The anchors that a Markdown file offers.
fn headings(text: &str) -> BTreeSet<String> {
    let lines = prose_lines(text).into_iter().filter(|l| l.starts_with('#'));
    lines
        .map(|l| {
            let title = l.trim_start_matches('#').trim().to_lowercase();
            title
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
        .collect()
}

/// Lines outside fenced code.
fn prose_lines(text: &str) -> Vec<String> {
    split_fences(text).0
}

/// Lines inside fenced code, continuation lines joined.
fn code_lines(text: &str) -> Vec<String> {
    let mut joined: Vec<String> = Vec::new();
    let mut continues = false;
    for line in split_fences(text).1 {
        let part = line.trim_end_matches('\\');
        match joined.last_mut() {
            Some(last) if continues => last.push_str(part),
            _ => joined.push(part.to_owned()),
        }
        continues = line.ends_with('\\');
    }
    joined
}

fn split_fences(text: &str) -> (Vec<String>, Vec<String>) {
    let (mut prose, mut code, mut fenced) = (Vec::new(), Vec::new(), false);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced {
            code.push(line.to_owned());
        } else {
            prose.push(line.to_owned());
        }
    }
    (prose, code)
}

fn inline_code(text: &str) -> Vec<String> {
    prose_lines(text)
        .iter()
        .flat_map(|l| l.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join(" ")
}

/// `src/tls.rs`, `docs/limits.md`, `tests/data/`: a path into this repository, without wildcards or placeholders.
fn is_repository_path(code: &str) -> bool {
    const FOLDERS: [&str; 10] =
        ["src/", "protocols/", "tests/", "docs/", "config/", "certs/", "cross/", "benches/", "fuzz/", "packaging/"];
    FOLDERS.iter().any(|f| code.starts_with(f)) && code.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
}

/// One `tidegate` invocation as a document shows it.
#[derive(Debug, PartialEq)]
struct Shown {
    words: Vec<String>,
    options: Vec<String>,
}

fn commands(text: &str) -> Vec<Shown> {
    let mut found = Vec::new();
    for line in code_lines(text).into_iter().chain(inline_code(text)) {
        let mut line = line.trim().trim_start_matches("$ ").trim_start_matches("sudo ").to_owned();
        for built in ["./target/release/", "target/release/"] {
            line = line.replace(built, "");
        }
        let rest = ["tidegate ", "cargo run --release -- ", "cargo run -- "].iter().find_map(|p| line.strip_prefix(p));
        if let Some(rest) = rest {
            found.extend(shown(rest));
        }
    }
    found
}

/// Splits `device add ID --role R   # why` into its command words and its options.
fn shown(rest: &str) -> Option<Shown> {
    let rest = rest.split(" #").next().unwrap();
    let rest = rest.split(['>', '|', ';', '&', '<']).next().unwrap();
    let is_word = |w: &str| w.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !w.starts_with('-');
    let words: Vec<String> = rest.split_whitespace().take_while(|w| is_word(w)).map(str::to_owned).collect();
    let trim = |w: &str| w.trim_matches(['[', ']', '.', ',']).split('=').next().unwrap().to_owned();
    let options: Vec<String> = rest.split_whitespace().map(trim).filter(|w| w.starts_with("--")).collect();
    (!words.is_empty() || !options.is_empty()).then_some(Shown { words, options })
}

impl Shown {
    /// Asks the program for help on the longest run of words that is a command, at least the first.
    fn check(&self) -> Result<(), String> {
        let mut help = None;
        for count in (0..=self.words.len().min(3)).rev() {
            if let Some(text) = help_on(&self.words[..count]) {
                help = Some((count, text));
                break;
            }
        }
        let (count, text) = help.ok_or_else(|| "tidegate --help fails".to_owned())?;
        if count == 0 && !self.words.is_empty() {
            return Err(format!("there is no command tidegate {}", self.words.join(" ")));
        }
        // A command of commands takes no arguments of its own, so a further word would have to be one of them.
        if text.contains("<COMMAND>") && self.words.len() > count {
            return Err(format!("there is no command tidegate {}", self.words.join(" ")));
        }
        let known =
            |option: &String| text.contains(option.as_str()) || ["--help", "--version"].contains(&option.as_str());
        match self.options.iter().find(|o| !known(o)) {
            Some(option) => Err(format!("tidegate {} has no option {option}", self.words[..count].join(" "))),
            None => Ok(()),
        }
    }
}

fn help_on(words: &[String]) -> Option<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_tidegate")).args(words).arg("--help").output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

mod checker {
    use super::*;

    #[test]
    fn links_paths_and_commands_are_found_in_text() {
        let text = "See [a](docs/a.md#one) and `[no](x)`, `src/tls.rs`, `src/*.rs`.\n```\n$ tidegate device add \\\n  ID --role sensor  # [no](y)\n```\n# Two Words: here\n";
        assert_eq!(links(text), ["docs/a.md#one"]);
        assert_eq!(headings(text), BTreeSet::from(["two-words-here".to_owned()]));
        assert_eq!(inline_code(text).into_iter().filter(|c| is_repository_path(c)).collect::<Vec<_>>(), ["src/tls.rs"]);
        let add = Shown { words: vec!["device".into(), "add".into()], options: vec!["--role".into()] };
        assert_eq!(commands(text), [add]);
    }

    #[test]
    fn a_command_line_ends_at_its_comment_pipe_or_description() {
        for (line, words, options) in [
            ("run --config x.toml | tee log --no", vec!["run"], vec!["--config"]),
            ("run    [--config FILE] start", vec!["run"], vec!["--config"]),
            ("config defaults | schema | show   all keys", vec!["config", "defaults"], vec![]),
            ("device token t1 --key t1.key > --x", vec!["device", "token"], vec!["--key"]),
        ] {
            let found = shown(line).unwrap();
            assert_eq!(found.words, words, "{line}");
            assert_eq!(found.options, options, "{line}");
        }
    }
}
