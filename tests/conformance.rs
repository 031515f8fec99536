//! The lists in `docs/conformance/`: every statement once, every test they name there.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn every_test_that_the_mqtt_list_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for folder in ["src", "tests", "protocols"] {
        collect(&root.join(folder), &mut known);
    }
    let list = fs::read_to_string(root.join("docs/conformance/mqtt.md")).unwrap();
    let (mut faults, mut rows) = (Vec::new(), 0);
    for chapter in list.split("\n## ").skip(2) {
        let mut statements = BTreeSet::new();
        for row in chapter.lines().filter(|line| line.starts_with("| MQTT-")) {
            rows += 1;
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [statement, asks, held_by] = cells[..] else { panic!("not a row: {row}") };
            if !statements.insert(statement) {
                faults.push(format!("{statement} stands twice"));
            }
            let names: Vec<&str> = held_by.split('`').skip(1).step_by(2).collect();
            if names.is_empty() && !held_by.contains("ever") && !asks.starts_with("as MQTT 5's ") {
                faults.push(format!("{statement} is held by nothing"));
            }
            faults.extend(names.iter().filter(|n| !known.contains(**n)).map(|n| format!("{statement}: no test {n}")));
        }
    }
    assert!(rows > 300, "only {rows} rows were read");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_test_that_the_http_list_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for folder in ["src", "tests", "protocols"] {
        collect(&root.join(folder), &mut known);
    }
    let list = fs::read_to_string(root.join("docs/conformance/http.md")).unwrap();
    let (mut faults, mut rows) = (Vec::new(), 0);
    for row in list.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| clause")) {
        rows += 1;
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [clause, _, held_by] = cells[..] else { panic!("not a row: {row}") };
        let names: Vec<&str> = held_by.split('`').skip(1).step_by(2).collect();
        if names.is_empty() {
            faults.push(format!("{clause} is held by nothing"));
        }
        faults.extend(names.iter().filter(|n| !known.contains(**n)).map(|n| format!("{clause}: no test {n}")));
    }
    assert!(rows > 40, "only {rows} rows were read");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// A test stands there as `FILE::NAME`, with the name of its file, or one of those that the list explains.
#[test]
fn every_test_that_the_coap_list_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = fs::read_to_string(root.join("docs/conformance/coap.md")).unwrap();
    let (mut faults, mut named) = (Vec::new(), 0);
    let mut by_file = std::collections::BTreeMap::new();
    for name in list.split('`').skip(1).step_by(2) {
        let Some((file, test)) = name.split_once("::").filter(|(f, _)| f.chars().all(|c| c.is_ascii_lowercase()))
        else {
            continue;
        };
        named += 1;
        let stem = match file {
            "stream" => "tcp",
            "interop" => "interop_coap",
            "etsi" => "coap_etsi",
            "peers" => "coap_peers",
            "group" => "interop_coap_multicast",
            "devices" => "interop_coap_devices",
            "mapping" => "device_http",
            "directory" => "mod",
            file => file,
        };
        let known = by_file.entry(stem.to_owned()).or_insert_with(|| {
            let mut known = BTreeSet::new();
            for folder in
                ["src/listener/coap", "src/directory", "src/identity", "tests", "protocols/coap", "protocols/auth"]
            {
                collect_of(&root.join(folder), Some(stem), &mut known);
            }
            known
        });
        if !known.contains(test) {
            faults.push(format!("no test {name}"));
        }
    }
    assert!(named > 100, "only {named} names were read");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The names of all functions below `folder`.
fn collect(folder: &Path, known: &mut BTreeSet<String>) {
    collect_of(folder, None, known);
}

/// The same, of the files of one name.
fn collect_of(folder: &Path, stem: Option<&str>, known: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            collect_of(&path, stem, known);
        } else if path.extension().is_some_and(|e| e == "rs") && stem.is_none_or(|s| path.file_stem().unwrap() == s) {
            let text = fs::read_to_string(&path).unwrap();
            let functions = text.lines().filter_map(|line| {
                let line = line.trim_start();
                let line = line.strip_prefix("async ").unwrap_or(line);
                line.strip_prefix("fn ")?.split(['(', '<']).next().map(str::to_owned)
            });
            known.extend(functions);
        }
    }
}
