//! The examples in `config/` and `certs/` work as they stand, and so does what `tidegate init` makes of them.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn tidegate(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.env_remove("TIDEGATE_ADMIN_TOKEN").env_remove("TIDEGATE_CONFIG").env("NO_COLOR", "1");
    command.current_dir(folder).args(arguments).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a command that has to succeed without a word on standard error.
#[track_caller]
fn works(folder: &Path, arguments: &[&str]) -> String {
    let output = tidegate(folder, arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "tidegate {arguments:?}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A copy of `config/` and `certs/`, as in a fresh clone.
fn clone() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config", "certs"] {
        fs::create_dir(folder.path().join(name)).unwrap();
        for entry in fs::read_dir(root().join(name)).unwrap() {
            let path = entry.unwrap().path();
            let made_here = path.extension().is_some_and(|e| e == "crt" || e == "key");
            if path.is_file() && !made_here {
                fs::copy(&path, folder.path().join(name).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    folder
}

#[test]
fn every_configuration_is_well() {
    let clone = clone();
    let mut checked = 0;
    for entry in fs::read_dir(clone.path().join("config")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("policy") {
            continue;
        }
        let answer = works(clone.path(), &["check", "--config", &format!("config/{name}")]);
        assert!(answer.ends_with(": well\n"), "{name}: {answer}");
        checked += 1;
    }
    assert!(checked >= 3, "{checked} examples");
    // It is also the one that is found without being named.
    works(clone.path(), &["check"]);
}

#[test]
fn certificates_made_by_the_script_serve_the_example() {
    let clone = clone();
    let made = Command::new(clone.path().join("certs/make.sh"))
        .env("TIDEGATE", env!("CARGO_BIN_EXE_tidegate"))
        .args(["gw.example.org", "192.0.2.7"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", said(&made));
    let path = clone.path().join("config/tidegate.toml");
    let example = fs::read_to_string(&path).unwrap();
    let switched_on = |line: &str| {
        let setting = line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' '));
        setting.unwrap_or(line).to_owned() + "\n"
    };
    let on: String = example.lines().map(switched_on).collect();
    assert!(on.contains("\nkey = "), "the listener is on");
    fs::write(&path, on).unwrap();
    assert!(works(clone.path(), &["check"]).ends_with(": well\n"));
}

#[test]
fn init_writes_a_configuration_that_is_well() {
    let parent = tempfile::tempdir().unwrap();
    let said = works(parent.path(), &["init", "site", "--name", "north", "--host", "gw.example.org"]);
    assert!(said.contains("wrote site/tidegate.toml") && said.contains("device add sensor-1"), "{said}");
    let site = parent.path().join("site");
    assert!(works(&site, &["check"]).ends_with(": well\n"));
    for secret in ["admin.token", "certs/gateway.key", "certs/ca.key", "data/gateway.key"] {
        let mode = fs::metadata(site.join(secret)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    assert_eq!(fs::metadata(site.join("data")).unwrap().permissions().mode() & 0o777, 0o700);
    let shown = works(&site, &["config", "show"]);
    assert!(shown.contains("name = \"north\"") && shown.contains("${file:admin.token}"), "{shown}");
    works(&site, &["device", "add", "sensor-1"]);
    assert!(site.join("sensor-1.key").exists());
}

#[test]
fn init_overwrites_nothing() {
    let parent = tempfile::tempdir().unwrap();
    works(parent.path(), &["init"]);
    let token = fs::read(parent.path().join("admin.token")).unwrap();
    let again = tidegate(parent.path(), &["init"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("admin.token"), "{}", said(&again));
    assert_eq!(fs::read(parent.path().join("admin.token")).unwrap(), token);
}

#[test]
fn the_example_policy_answers_its_cases() {
    let clone = clone();
    let said = works(clone.path(), &["policy", "test", "config/policy-cases.toml"]);
    assert!(said.ends_with(" cases, 0 failed\n") && !said.starts_with('0'), "{said}");
}

#[test]
fn a_case_with_another_answer_fails_and_says_why() {
    let clone = clone();
    let cases = r#"
[[case]]
device = "sensor-1"
role = "sensor"
action = "publish"
resource = "dev/sensor-1/presence"
expect = "allow"

[[case]]
action = "fly"
resource = "dev/x"
expect = "deny"
"#;
    fs::write(clone.path().join("cases.toml"), cases).unwrap();
    let output = tidegate(clone.path(), &["policy", "test", "cases.toml"]);
    assert_eq!(output.status.code(), Some(1));
    let said = said(&output);
    assert!(said.contains("expected allow\n  got deny by \"presence is written by the gateway alone\""), "{said}");
    assert!(said.contains("policy.toml:") && said.contains("is not an action") && said.contains("2 failed"), "{said}");
}

#[test]
fn explain_names_the_rule_for_a_device_of_the_registry() {
    let site = tempfile::tempdir().unwrap();
    works(site.path(), &["init"]);
    let ask = |words: &[&str]| tidegate(site.path(), &[&["policy", "explain"], words].concat());
    let telemetry = "dev/sensor-1/telemetry";
    let unknown = ask(&["sensor-1", "publish", telemetry]);
    assert_eq!(unknown.status.code(), Some(1), "{}", said(&unknown));
    assert!(said(&ask(&["sensor-1", "publish", telemetry, "--role", "sensor"])).starts_with("allow by"));
    works(site.path(), &["device", "add", "sensor-1"]);
    let allowed = said(&ask(&["sensor-1", "publish", telemetry]));
    assert!(allowed.starts_with("allow by \"sensors write their own space\" (policy.toml:"), "{allowed}");
    assert!(said(&ask(&["sensor-1", "publish", telemetry, "--size", "70000"])).starts_with("deny: 70000 bytes"));
    assert!(said(&ask(&["sensor-1", "publish", "dev/sensor-2/telemetry"])).starts_with("deny: no rule allows it"));
    assert!(said(&ask(&["", "publish", telemetry])).starts_with("deny: no rule allows it"));
    let json: serde_json::Value =
        serde_json::from_str(&said(&ask(&["sensor-1", "publish", telemetry, "--json"]))).unwrap();
    assert_eq!((&json["allowed"], &json["role"]), (&true.into(), &"sensor".into()));
    works(site.path(), &["device", "revoke", "sensor-1"]);
    assert!(said(&ask(&["sensor-1", "publish", telemetry])).contains("is revoked"));
}
