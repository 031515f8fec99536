use super::*;

mod route;
mod upstream;

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

/// Something to listen on, behind a text under test.
const LISTENER: &str = "\n[[listener]]\nname = \"plain\"\n";

/// The report without the folder's random name.
fn complaints(text: &str) -> String {
    let report = match load_text(&format!("{text}{LISTENER}")) {
        Ok(loaded) => loaded.report,
        Err(report) => report,
    };
    let folder = report.sources.base(0).display().to_string();
    let plain = report.to_string().replace(&folder, "FOLDER");
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
    assert_eq!(schema.unknown_patterns(), [""; 0], "give each a check in config/schema.rs");
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
        "2:1: error: gateway.nmae: unknown key; allowed: data_dir, device_api_prefix, mqtt311_refused, name, presence, sys_interval_secs, utc_offset_minutes, workers; did you mean `name`?\n\
         3:11: error: gateway.workers = \"many\": unknown word; allowed: \"auto\", or an integer from 1 to 256\n\
         4:12: error: gateway.data_dir = 7: wrong type, this is an integer; allowed: a path\n\
         5:21: error: gateway.device_api_prefix = \"iot/\": not understood; allowed: a path such as \"/\" or \"/gw\", of segments \
         out of A-Z a-z 0-9 . _ ~ -\n\
         7:2: error: gatewya: unknown key; allowed: address_filter, admin, forward, gateway, identity, limits, listener, policy, route, spool, telemetry, upstream; did you mean `gateway`?\n"
    );
}

/// A table of mistakes: what is written, and exactly what is said.
#[test]
fn every_mistake_has_its_message() {
    let table = [
        (
            "[gateway]\nname = \"a b\"\n",
            "2:8: error: gateway.name = \"a b\": not understood; allowed: 1 to 64 characters out of A-Z a-z 0-9 . _ -\n",
        ),
        (
            "[limits]\npacket_bytes_max = 0\n",
            "2:20: error: limits.packet_bytes_max = 0: out of range; allowed: an integer from 256 to 268435455\n",
        ),
        (
            "[limits]\npacket_bytes_max = \"1MiB\"\n",
            "2:20: error: limits.packet_bytes_max = \"1MiB\": wrong type, this is text; allowed: an integer from 256 to 268435455\n",
        ),
        (
            "[limits]\nbody_bytes_max = \"1 MB/s\"\n",
            "2:18: error: limits.body_bytes_max = \"1 MB/s\": not understood; allowed: a size such as 65536, \"64KiB\", \"1MiB\" or \"1GiB\"\n",
        ),
        (
            "[limits]\nrate_per_device = \"100 per second\"\n",
            "2:19: error: limits.rate_per_device = \"100 per second\": not understood; allowed: a rate such as \"100/s\", \"100/s burst 200\", \"30/m\" or \"2/h\"\n",
        ),
        (
            "[limits]\nidle_timeout = 60\n",
            "2:16: error: limits.idle_timeout = 60: wrong type, this is an integer; allowed: a length of time such as \"250ms\", \"90s\", \"15m\", \"12h\" or \"7d\"\n",
        ),
        (
            "connections_max = 5\n",
            "1:1: error: connections_max: unknown key; allowed: KEYS; there is `limits.connections_max`\n",
        ),
        (
            "[telemetry]\nlog_format = \"jsn\"\n",
            "2:14: error: telemetry.log_format = \"jsn\": unknown word; allowed: one of \"text\", \"json\"; did you mean \"json\"?\n",
        ),
        ("[gateway]\nname = \"a\"\nname = \"b\"\n", "3:1: error: syntax: duplicate key\n"),
        ("[gateway\nname = \"a\n", "1:9: error: syntax: unclosed table, expected `]`\n"),
        (
            "[[listener]]\nname = \"a\"\nbind = \"0.0.0.0:1884\"\n",
            "3:8: error: listener.a.bind = \"0.0.0.0:1884\": without encryption, but reachable from public networks; allowed: a loopback or \
             private address, or transport = \"tls\"; `allow_public = true` in this listener accepts it: payloads can be read, logins relayed\n",
        ),
        (
            "[[listener]]\nname = \"a\"\nbind = \"localhost:1884\"\n",
            "3:8: error: listener.a.bind = \"localhost:1884\": not understood; allowed: an address and a port such as \"127.0.0.1:1883\" or \"[::1]:1883\"\n",
        ),
        (
            "[[listener]]\nname = \"a\"\nbind = \"127.0.0.1:1883\"\n",
            "5:1: error: listener.plain.bind: the address is taken by listener \"a\"; allowed: one listener per address and port\n",
        ),
        (
            "[[listener]]\nname = \"plain\"\nbind = \"127.0.0.1:1884\"\n",
            "6:8: error: listener.1.name = \"plain\": the name is taken by entry 0 of the list; allowed: names that differ within one list\n",
        ),
        (
            "[[listener]]\nname = \"s\"\nbind = \"127.0.0.1:1884\"\ntransport = \"tls\"\n",
            "1:1: error: listener.s.certificate: transport = \"tls\" needs a certificate\n1:1: error: listener.s.key: transport = \"tls\" needs a key\n",
        ),
        (
            "[[listener]]\nname = \"s\"\nbind = \"127.0.0.1:1884\"\nproxy_protocol_from = [\"10.0.0.0/33\"]\n",
            "4:24: error: listener.s.proxy_protocol_from.0 = \"10.0.0.0/33\": not understood; allowed: an address or a CIDR range such as \
             \"192.0.2.7\", \"10.0.0.0/8\" or \"2001:db8::/32\"\n",
        ),
        (
            "[address_filter]\ndeny = [\"10.0.0.1/8\"]\n",
            "2:9: error: address_filter.deny.0 = \"10.0.0.1/8\": \"10.0.0.1/8\" is not a network such as \"192.168.0.0/16\", \"10.1.2.3\" or \
             \"2001:db8::/32\" with no bits set beyond the prefix; allowed: an address or a CIDR range such as \"192.0.2.7\", \"10.0.0.0/8\" \
             or \"2001:db8::/32\"\n",
        ),
        (
            "[admin]\ntoken = \"hunter2\"\nbind = \"9883\"\n",
            "2:9: error: admin.token = \"***\": too short to be a secret; allowed: at least 16 characters, or empty to close the API; \
             `tidegate init` writes a random one\n\
             3:8: error: admin.bind = \"9883\": not understood; allowed: an address and a port such as \"127.0.0.1:1883\" or \"[::1]:1883\"\n",
        ),
        (
            "[[route]]\nname = \"r\"\nto = \"cloud\"\npath_prefix = \"api\"\nmethods = [\"GET\", \"get\"]\n",
            "3:6: error: route.r.to = \"cloud\": there is no upstream of this name; add an [[upstream]]\n\
             4:15: error: route.r.path_prefix = \"api\": not a path; allowed: a path that begins with /\n\
             5:19: error: route.r.methods.1 = \"get\": not a method; allowed: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\n",
        ),
        (
            "[[route]]\nname = \"r\"\n",
            "1:1: error: route.r.to: a route needs an upstream in `to`, or `redirect`, `answer` or `connect`\n",
        ),
        (
            "[policy]\nfiles = [\"absent.toml\"]\n",
            "2:10: error: policy.files.0 = \"FOLDER/absent.toml\": cannot read the policy file: No such file or directory (os error 2); \
             allowed: a file, relative to the one that names it\n",
        ),
    ];
    let mut differ = String::new();
    for (text, expected) in table {
        let said = complaints(text);
        let keys = "address_filter, admin, forward, gateway, identity, limits, listener, policy, route, spool, telemetry, upstream";
        let expected = expected.replace("KEYS", keys);
        if said != expected {
            differ.push_str(&format!("--- {text}\n{said}instead of\n{expected}\n"));
        }
    }
    assert!(differ.is_empty(), "{differ}");
}

const RULES: &str =
    "[[rule]]\nname = \"own\"\nwho = [\"role:sensor\"]\ndo = [\"publish\"]\non = [\"dev/{device}/#\"]\n";

#[test]
fn policy_files_are_compiled_and_every_bad_rule_has_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tidegate.toml");
    fs::write(&path, format!("{LISTENER}[policy]\nfiles = [\"policy.toml\"]\n")).unwrap();
    let load = |rules: &str| {
        fs::write(folder.path().join("policy.toml"), rules).unwrap();
        let found = load(&Inputs { path: Some(path.clone()), ..Inputs::default() });
        let (report, rules) = match found {
            Ok(loaded) => (loaded.report, loaded.policy.len()),
            Err(report) => (report, 0),
        };
        let lines: String = report
            .to_string()
            .lines()
            .map(|l| l.split_once("policy.toml:").map_or(l, |(_, l)| l).to_owned() + "\n")
            .collect();
        (rules, lines)
    };
    assert_eq!(load(RULES), (1, String::new()));
    let (_, said) = load(&format!(
        "{RULES}\n[[rule]]\nname = \"two\"\nwho = [\"nobody\"]\ndo = [\"Publish\"]\non = [\"a/#/b\"]\nrate = \"fast\"\nwhen = \"msg.size <\"\n\n[[rule]]\nnmae = \"x\"\n"
    ));
    let lines: Vec<&str> = said.lines().collect();
    let starts = [
        "9:8: error: rule.1.who = \"nobody\": is nobody the registry can know; allowed: device:ID, role:NAME, attr:KEY=VALUE, anyone",
        "10:7: error: rule.1.do = \"Publish\": is not an action; did you mean publish; allowed: publish, subscribe, read",
        "11:7: error: rule.1.on = \"a/#/b\": has something after `#` or `**`, which must be last; allowed: ",
        "12:8: error: rule.1.rate = \"fast\": is not a rate; allowed: a rate such as \"100/s\"",
        "13:8: error: rule.1.when = \"msg.size <\": is not a CEL expression: ",
        "15:1: error: rule.2.name: missing; allowed: text",
        "15:1: error: rule.2.who: missing; allowed: a list of: text",
        "15:1: error: rule.2.do: missing; allowed: a list of: text",
        "15:1: error: rule.2.on: missing; allowed: a list of: text",
        "16:1: error: rule.2.nmae: unknown key; allowed: bytes_max, do, effect, hours, name, on, rate, when, who; did you mean `name`?",
    ];
    assert_eq!(lines.len(), starts.len(), "{said}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}\nshould start with\n{start}");
    }
    let twice = format!("{RULES}{}", RULES.replace("own", "again"));
    let (rules, said) = load(&twice);
    assert_eq!(rules, 2);
    assert!(said.starts_with("7:8: warning: rule.1.name = \"again\": never decides: the rule at "), "{said}");
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
    assert_eq!(loaded.config.gateway.workers, crate::gateway::Workers::Count(2));
    assert_eq!(loaded.config.gateway.data_dir, folder.path().join("d"));
    assert_eq!(loaded.files.len(), 3);
    let environment = [("TIDEGATE__GATEWAY__NAME", "42"), ("TIDEGATE__GATEWAY__WORKERS", "3")];
    let loaded = load(&inputs(&environment, &[])).unwrap();
    assert_eq!(loaded.config.gateway.name, "42", "a number is text where text is wanted");
    assert_eq!(loaded.config.gateway.workers, crate::gateway::Workers::Count(3));
    let loaded = load(&inputs(&environment, &["gateway.name=\"set\"", "gateway.workers=auto"])).unwrap();
    assert_eq!(loaded.config.gateway.name, "set");
    assert_eq!(loaded.config.gateway.workers, crate::gateway::Workers::Auto);
}

#[test]
fn a_bad_override_is_reported_like_a_bad_file() {
    let report =
        load_with(LISTENER, &["gateway.wrokers=2", "gateway"], &[("TIDEGATE__GATEWAY__WORKERS", "0")]).unwrap_err();
    assert_eq!(
        report.to_string(),
        "environment:1:28: error: gateway.workers = 0: out of range; allowed: \"auto\", or an integer from 1 to 256\n\
         --set:1:1: error: gateway.wrokers: unknown key; allowed: data_dir, device_api_prefix, mqtt311_refused, name, presence, sys_interval_secs, utc_offset_minutes, workers; did you mean `workers`?\n\
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
    let loaded = load("[gateway]\nname = \"${SITE}-${NONE:-1}\"\n[telemetry]\nlog = \"$${x}\"\n").unwrap();
    assert_eq!(loaded.config.gateway.name, "north-1");
    assert_eq!(loaded.config.telemetry.log, "${x}");
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
