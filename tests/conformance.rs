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

/// The names of all functions below `folder` that follow a test attribute.
fn collect(folder: &Path, known: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, known);
        } else if path.extension().is_some_and(|e| e == "rs") {
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
