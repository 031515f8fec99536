//! The operator's commands against a running gateway and against the folder of a stopped one.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Command, Stdio};

use serde_json::Value;
use support::{Gateway, Wanted, free_address, http, said, stdout, wait_until};

/// A gateway whose cloud is away.
fn gateway() -> Gateway {
    let nobody = free_address();
    Gateway::start(&Wanted { cloud: vec![format!("http://{nobody}")], ..Wanted::default() })
}

fn json(gateway: &Gateway, arguments: &[&str]) -> Value {
    let output = gateway.command(&[arguments, &["--json"]].concat());
    serde_json::from_str(&stdout(&output)).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {}", said(&output)))
}

fn publish(gateway: &Gateway, count: usize) {
    let device = gateway.add_device("sensor-1");
    let bearer = format!("Bearer {}", gateway.bearer(&device));
    for n in 0..count {
        let headers = [("Authorization", bearer.as_str())];
        let answer = http::once(gateway.plain, "POST", "/telemetry", &headers, n.to_string().as_bytes()).unwrap();
        assert_eq!(answer.status, 202, "{answer:?}");
    }
}

#[test]
fn status_shows_a_running_gateway_and_says_when_there_is_none() {
    let mut gateway = gateway();
    let page = gateway.command_ok(&["status"]);
    assert!(page.starts_with("test  ready, up ") && page.contains(&gateway.plain.to_string()), "{page}");
    assert_eq!(json(&gateway, &["status"])["ready"], true);
    let wrong = gateway.command(&["status", "--set", "admin.token=another-token-altogether"]);
    assert_eq!(wrong.status.code(), Some(1), "{}", said(&wrong));
    assert!(said(&wrong).contains("does not take this admin token"), "{}", said(&wrong));
    let closed = gateway.command(&["status", "--set", "admin.token="]);
    assert!(said(&closed).contains("the admin API is closed"), "{}", said(&closed));
    gateway.terminate();
    let stopped = gateway.command(&["status"]);
    assert_eq!(stopped.status.code(), Some(75), "{}", said(&stopped));
    assert!(said(&stopped).contains("tidegate run"), "{}", said(&stopped));
}

#[test]
fn what_waits_is_shown_while_running_and_afterwards_and_can_be_dropped() {
    let mut gateway = gateway();
    publish(&gateway, 3);
    let shown = json(&gateway, &["spool", "show"]);
    assert_eq!((&shown["running"], &shown["sinks"][0]["queued_records"]), (&true.into(), &3.into()), "{shown}");
    assert!(gateway.command_ok(&["spool", "show"]).contains("everything: does not get shorter"));
    assert_eq!(gateway.command_ok(&["spool", "ledger"]), "nothing was lost\n");
    gateway.terminate();

    let shown = json(&gateway, &["spool", "show"]);
    assert_eq!((&shown["running"], &shown["sinks"][0]["queued_records"]), (&false.into(), &3.into()), "{shown}");
    let unsure = gateway.command(&["spool", "drop", "everything"]);
    assert_eq!(unsure.status.code(), Some(2));
    assert!(said(&unsure).contains("throw away 3 messages"), "{}", said(&unsure));
    let unknown = gateway.command(&["spool", "drop", "nothing", "--yes"]);
    assert!(said(&unknown).contains("there are everything"), "{}", said(&unknown));
    assert!(gateway.command_ok(&["spool", "drop", "everything", "--yes"]).starts_with("3 messages dropped"));
    assert_eq!(json(&gateway, &["spool", "show"])["sinks"][0]["queued_records"], 0);
    let ledger = json(&gateway, &["spool", "ledger"]);
    assert_eq!((&ledger[0]["reason"], &ledger[0]["records"]), (&"dropped".into(), &3.into()), "{ledger}");
}

#[test]
fn a_running_gateway_drops_a_queue() {
    let gateway = gateway();
    publish(&gateway, 2);
    assert!(gateway.command_ok(&["spool", "drop", "everything", "--yes"]).starts_with("2 messages dropped"));
    assert!(gateway.command_ok(&["spool", "ledger"]).contains("dropped"));
}

#[test]
fn tail_follows_messages() {
    let gateway = gateway();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(["tail", "dev/+/telemetry/#", "--count", "2", "--config"]).arg(gateway.path("tidegate.toml"));
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("tail subscribes", || json(&gateway, &["status"])["subscriptions"] == 1);
    publish(&gateway, 2);
    let output = child.wait_with_output().unwrap();
    let lines = stdout(&output);
    assert!(output.status.success(), "{}", said(&output));
    let topics: Vec<&str> = lines.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(topics, ["http dev/sensor-1/telemetry 0", "http dev/sensor-1/telemetry 1"]);
}

#[test]
fn top_shows_who_is_busy() {
    let gateway = gateway();
    let words = ["top", "--interval", "1", "--count", "1"];
    let screen = gateway.command_ok(&words);
    assert!(screen.contains("messages: 0.0/s in") && !screen.contains('\x1b'), "{screen}");
    assert_eq!(json(&gateway, &words)["status"]["ready"], true);
}

#[test]
fn the_dashboard_may_only_talk_to_its_gateway() {
    let gateway = gateway();
    let page = http::once(gateway.admin, "GET", "/", &[], b"").unwrap();
    assert_eq!(page.status, 200);
    let policy = page.header("content-security-policy").unwrap_or_default();
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    // Nothing in the page asks for anything elsewhere.
    assert!(!page.body.contains("http://") && !page.body.contains("https://"), "{}", page.body);
    let data = http::once(gateway.admin, "GET", "/api/v1/status", &[], b"").unwrap();
    assert_eq!(data.status, 401, "{data:?}");
}
