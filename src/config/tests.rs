use super::*;

use std::collections::HashMap;
use std::fs;

/// Loads one file's text from a folder of its own.
fn load_text(text: &str) -> Result<Loaded, Report> {
    load_with(text, &[], &[])
}

fn load_with(text: &str, set: &[&str], environment: &[(&str, &str)]) -> Result<Loaded, Report> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tidegate.toml");
    fs::write(&path, text).unwrap();
    load(&Inputs {
        path: Some(path),
        set: set.iter().map(|s| (*s).to_owned()).collect(),
        environment: environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
    })
}

/// The report without the folder's random name.
fn complaints(text: &str) -> String {
    let report = match load_text(text) {
        Ok(loaded) => loaded.report,
        Err(report) => report,
    };
    let plain = report.to_string();
    plain.lines().map(|l| l.split_once("tidegate.toml:").map_or(l, |(_, l)| l).to_owned() + "\n").collect()
}

#[test]
fn printed_defaults_parse_to_the_default() {
    let printed = defaults::render();
    let table: toml::Table = toml::from_str(&printed).expect("the printed defaults are TOML");
    assert!(table.contains_key("gateway"), "{printed}");
    let config: Config = toml::from_str(&printed).expect("the printed defaults are a configuration");
    assert_eq!(config, Config::default());
}

#[test]
fn the_schema_knows_every_key_and_every_key_is_documented() {
    let schema = schema();
    let keys = schema.keys();
    let defaults = defaults_text();
    let mut sources = document::Sources::default();
    let source = sources.add("", defaults, "");
    let node = document::parse(&sources, source, &mut Vec::new());
    let mut seen = 0;
    for section in node.entries() {
        for entry in section.node.entries() {
            let path = format!("{}.{}", section.key, entry.key);
            assert!(keys.contains(&path), "{path} is serialised but not in the schema");
            seen += 1;
        }
    }
    assert!(seen >= 4);
    let printed = defaults::render();
    for key in keys.iter().filter(|k| !k.contains("[]") && k.matches('.').count() == 1) {
        let (_, leaf) = key.split_once('.').unwrap();
        assert!(
            printed.lines().any(|l| l.trim_start_matches("# ").starts_with(&format!("{leaf} ="))),
            "{key} is not printed"
        );
    }
    let undocumented = undocumented(&schema, schema.as_json(), "");
    assert!(undocumented.is_empty(), "keys without a doc comment: {undocumented:?}");
}

fn undocumented(schema: &Schema, at: &serde_json::Value, path: &str) -> Vec<String> {
    let mut missing = Vec::new();
    for branch in schema.branches(at) {
        if let Some(items) = branch.get("items") {
            missing.extend(undocumented(schema, items, &format!("{path}[]")));
        }
        for (key, property) in branch.get("properties").and_then(|p| p.as_object()).into_iter().flatten() {
            let path = format!("{path}.{key}");
            let described = property.get("description").or_else(|| schema.resolve(property).get("description"));
            if described.is_none() && key != "type" {
                missing.push(path.clone());
            }
            missing.extend(undocumented(schema, property, &path));
        }
    }
    missing
}

#[test]
fn every_problem_is_reported_at_once_with_line_key_value_and_what_is_allowed() {
    let text = "[gateway]\nnmae = \"x\"\nworkers = \"many\"\ndata_dir = 7\ndevice_api_prefix = \"iot/\"\n\n[gatewya]\n";
    assert_eq!(
        complaints(text),
        "2:1: error: gateway.nmae: unknown key; allowed: data_dir, device_api_prefix, name, workers; did you mean `name`?\n\
         3:11: error: gateway.workers = \"many\": unknown word; allowed: \"auto\", or an integer from 1 to 256\n\
         4:12: error: gateway.data_dir = 7: wrong type, this is an integer; allowed: a path\n\
         5:21: error: gateway.device_api_prefix = \"iot/\": not a path prefix; allowed: text such as \"/iot\": begins with `/`, \
         does not end with it\n\
         7:2: error: gatewya: unknown key; allowed: gateway, limits, telemetry; did you mean `gateway`?\n"
    );
}

#[test]
fn layers_override_each_other_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tidegate.toml");
    fs::write(&path, "[gateway]\nname = \"file\"\nworkers = 1\ndata_dir = \"d\"\n").unwrap();
    fs::create_dir(folder.path().join("conf.d")).unwrap();
    fs::write(folder.path().join("conf.d/20.toml"), "[gateway]\nname = \"later\"\n").unwrap();
    fs::write(folder.path().join("conf.d/10.toml"), "[gateway]\nname = \"earlier\"\nworkers = 2\n").unwrap();
    let inputs = |environment: &[(&str, &str)], set: &[&str]| Inputs {
        path: Some(path.clone()),
        environment: environment.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect::<HashMap<_, _>>(),
        set: set.iter().map(|s| (*s).into()).collect(),
    };
    let loaded = load(&inputs(&[], &[])).unwrap();
    assert_eq!(loaded.config.gateway.name, "later");
    assert_eq!(loaded.config.gateway.workers, gateway::Workers::Count(2));
    assert_eq!(loaded.config.gateway.data_dir, folder.path().join("d"));
    assert_eq!(loaded.files.len(), 3);
    let environment = [("TIDEGATE__GATEWAY__NAME", "42"), ("TIDEGATE__GATEWAY__WORKERS", "3")];
    let loaded = load(&inputs(&environment, &[])).unwrap();
    assert_eq!(loaded.config.gateway.name, "42", "a number is text where text is wanted");
    assert_eq!(loaded.config.gateway.workers, gateway::Workers::Count(3));
    let loaded = load(&inputs(&environment, &["gateway.name=\"set\"", "gateway.workers=auto"])).unwrap();
    assert_eq!(loaded.config.gateway.name, "set");
    assert_eq!(loaded.config.gateway.workers, gateway::Workers::Auto);
}

#[test]
fn a_bad_override_is_reported_like_a_bad_file() {
    let report = load_with("", &["gateway.wrokers=2", "gateway"], &[("TIDEGATE__GATEWAY__WORKERS", "0")]).unwrap_err();
    assert_eq!(
        report.to_string(),
        "environment:1:28: error: gateway.workers = 0: out of range; allowed: \"auto\", or an integer from 1 to 256\n\
         --set:1:1: error: gateway.wrokers: unknown key; allowed: data_dir, device_api_prefix, name, workers; did you mean `workers`?\n\
         --set:1:1: error: no `=`; allowed: KEY=VALUE, such as limits.connections_max=100\n"
    );
}

#[test]
fn references_are_expanded_and_missing_ones_reported_with_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tidegate.toml");
    fs::write(folder.path().join("name.txt"), "from-file\n").unwrap();
    let load = |text: &str| {
        fs::write(&path, text).unwrap();
        load(&Inputs {
            path: Some(path.clone()),
            environment: HashMap::from([("SITE".to_owned(), "north".to_owned())]),
            set: Vec::new(),
        })
    };
    let loaded = load("[gateway]\nname = \"${file:name.txt}\"\n").unwrap();
    assert_eq!(loaded.config.gateway.name, "from-file");
    assert!(show::toml(&loaded).contains("name = \"${file:name.txt}\""));
    let loaded = load("[gateway]\nname = \"${SITE}-${NONE:-1}-$${x}\"\n").unwrap();
    assert_eq!(loaded.config.gateway.name, "north-1-${x}");
    let report = load("[gateway]\n\nname = \"${NOPE}\"\ndata_dir = \"${file:absent}\"\n").unwrap_err().to_string();
    assert!(
        report.contains("tidegate.toml:3:8: error: gateway.name = \"${NOPE}\": the environment has no variable `NOPE`"),
        "{report}"
    );
    assert!(
        report.contains("tidegate.toml:4:12: error: gateway.data_dir = \"${file:absent}\": cannot read"),
        "{report}"
    );
}

#[test]
fn a_relative_path_starts_at_the_file_that_names_it() {
    let loaded = load_text("").unwrap();
    assert!(loaded.config.gateway.data_dir.is_absolute());
    assert!(loaded.config.gateway.data_dir.ends_with("data"));
}

#[test]
fn nesting_is_bounded_before_the_parser_recurses() {
    for text in [
        format!("a{} = 1", ".a".repeat(100_000)),
        format!("a = {}", "[".repeat(100_000)),
        format!("a = {}", "{a=".repeat(100_000)),
    ] {
        let report = load_text(&text).unwrap_err();
        assert!(report.to_string().contains("keys nest too deeply"), "{report}");
    }
    let dots = format!("# {}\n[gateway]\nname = \"{}\"\n", ".".repeat(100), ".".repeat(50));
    assert!(load_text(&dots).is_ok(), "dots in comments and strings are not nesting");
}

proptest::proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
        let _ = load_document(&text);
    }

    #[test]
    fn arbitrary_toml_never_panics(
        lines in proptest::collection::vec("(\\[?\\[?(gateway|listener|upstream|limits|x)\\]?\\]?)|((name|bind|workers|[a-z.\"]{1,8}) ?= ?(-?[0-9]{1,20}|\"[^\"\n]{0,12}\"|\\[[0-9, \"a{}]{0,8}\\]|true|\\{ ?[a-z]{1,4} ?= ?1 ?\\}))", 0..12),
    ) {
        let _ = load_document(&lines.join("\n"));
    }

    #[test]
    fn arbitrary_overrides_never_panic(argument in "[a-z0-9.=\"\\[\\]{} ]{0,40}") {
        let inputs = Inputs { path: None, set: vec![argument], environment: HashMap::new() };
        if let Err(report) = load(&inputs) {
            let _ = (report.to_string(), report.pretty(false), report.to_json());
        }
    }
}

/// The whole pipeline on one text, with every rendering.
fn load_document(text: &str) -> String {
    let report = match load_text(text) {
        Ok(loaded) => {
            let _ = (show::toml(&loaded), show::json(&loaded));
            loaded.report
        }
        Err(report) => report,
    };
    assert_eq!(report.errors() + report.warnings(), report.problems.len());
    report.to_string() + &report.pretty(true) + &report.to_json().to_string()
}
