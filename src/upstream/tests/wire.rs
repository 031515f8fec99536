//! What a request looks like.

use base64::Engine;
use serde_json::{Value, json};

use super::backend::{Backend, Mood, Received};
use super::{Gateway, forward, message, typed, upstream};
use crate::message::{Message, Properties};

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// What arrives when `messages` are forwarded by a rule with `more`.
async fn sent(messages: &[Message], rule: Value, upstream_more: Value) -> Vec<Received> {
    let backend = Backend::start(Mood::Well).await;
    let gateway = Gateway::start(&upstream(&[backend.url()], upstream_more), &forward(rule));
    messages.iter().for_each(|message| gateway.append(message));
    gateway.drained().await;
    backend.kept()
}

fn batch(format: &str) -> Value {
    json!({ "batch": { "linger_ms": 100, "format": format } })
}

#[tokio::test]
async fn ndjson_is_one_structured_event_a_line() {
    let mut binary = message(3, "d", "");
    binary.payload = bytes::Bytes::from_static(&[0xff, 0]);
    let messages = [
        typed(message(1, "d", "{\n\"t\":21.50}"), "application/json"),
        message(2, "d", "not \"json\""),
        binary,
        typed(message(4, "d", "<a/>"), "text/xml"),
        typed(message(5, "d", "{broken"), "application/senml+json; v=1"),
    ];
    let sent = sent(&messages, batch("ndjson"), json!({})).await;
    let bodies: String = sent.iter().map(|received| received.body.as_str()).collect();
    let events: Vec<Value> = bodies.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        events[0],
        json!({
            "specversion": "1.0", "id": "gw/7/1", "source": "urn:tidegate:gw:d", "type": "tidegate.telemetry",
            "time": "2026-11-20T00:00:00.123Z", "subject": "dev/d/telemetry", "datacontenttype": "application/json",
            "data": { "t": 21.5 },
        })
    );
    assert!(bodies.contains("21.50"), "numbers stay as they were written");
    let part = |n: usize| (events[n]["datacontenttype"].as_str().unwrap(), events[n]["data"].as_str());
    assert_eq!(part(1), ("text/plain", Some("not \"json\"")));
    assert_eq!(part(2), ("application/octet-stream", None));
    assert_eq!(events[2]["data_base64"], base64::engine::general_purpose::STANDARD.encode([0xff, 0]));
    assert_eq!(part(3), ("text/xml", Some("<a/>")));
    assert_eq!(part(4), ("application/senml+json; v=1", Some("{broken")));
    let first = &sent[0];
    assert_eq!((first.method.as_str(), first.path.as_str()), ("POST", "/ingest"));
    assert_eq!(first.header("content-type"), Some("application/x-ndjson"));
    assert!(first.header("idempotency-key").unwrap().starts_with("gw/"));
    assert!(first.header("user-agent").unwrap().starts_with("tidegate/"));
}

#[tokio::test]
async fn json_is_an_array_of_events() {
    let sent = sent(&[message(1, "d", "1"), message(2, "d", "2")], batch("json"), json!({})).await;
    let events: Vec<Value> =
        sent.iter().flat_map(|received| serde_json::from_str::<Vec<Value>>(&received.body).unwrap()).collect();
    assert_eq!(events.iter().map(|event| event["data"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(sent[0].header("content-type"), Some("application/cloudevents-batch+json"));
}

#[tokio::test]
async fn single_is_binary_mode_and_carries_trace_and_extensions() {
    let mut message = typed(message(1, "d", "{\"t\":1}"), "application/json");
    message.properties = Some(Box::new(Properties {
        traceparent: Some(TRACE.into()),
        user: vec![
            ("site".into(), "Köln \"1\"".into()),
            ("Bad-Name".into(), "x".into()),
            ("id".into(), "forged".into()),
        ],
        ..*message.properties.unwrap()
    }));
    let sent = sent(&[message], batch("single"), json!({ "headers": { "authorization": "Bearer s3cret" } })).await;
    let header = |name: &str| sent[0].header(name);
    assert_eq!(sent[0].body, "{\"t\":1}");
    assert_eq!(header("ce-id"), Some("gw/7/1"));
    assert_eq!(header("idempotency-key"), Some("gw/7/1"));
    assert_eq!(header("ce-specversion"), Some("1.0"));
    assert_eq!(header("ce-subject"), Some("dev/d/telemetry"));
    assert_eq!(header("content-type"), Some("application/json"));
    assert_eq!(header("traceparent"), Some(TRACE));
    assert_eq!(header("ce-site"), Some("K%C3%B6ln%20%221%22"));
    assert_eq!(header("ce-bad-name"), None);
    assert_eq!(header("authorization"), Some("Bearer s3cret"));
}

#[tokio::test]
async fn a_batch_holds_messages_of_one_path_in_their_order() {
    let messages: Vec<Message> =
        (0..6).map(|n| message(n, if n % 2 == 0 { "a" } else { "b:1" }, &n.to_string())).collect();
    let mut rule = batch("ndjson");
    super::merge(&mut rule, json!({ "path": "/in/{device}?from={gateway}" }));
    let sent = sent(&messages, rule, json!({})).await;
    let data = |path: &str| -> Vec<u64> {
        let bodies: String =
            sent.iter().filter(|received| received.path == path).map(|received| received.body.as_str()).collect();
        bodies.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["data"].as_u64().unwrap()).collect()
    };
    assert_eq!((data("/in/a?from=gw"), data("/in/b%3A1?from=gw")), (vec![0, 2, 4], vec![1, 3, 5]));
}

#[tokio::test]
async fn single_messages_of_one_device_follow_each_other_and_devices_do_not_wait() {
    let messages: Vec<Message> = (0..60).map(|n| message(n, ["a", "b", "c"][n as usize % 3], &n.to_string())).collect();
    let backend = Backend::start(Mood::Drip(std::time::Duration::from_millis(1))).await;
    let mut rule = batch("single");
    super::merge(&mut rule, json!({ "batch": { "records_max": 100, "linger_ms": 200, "format": "single" } }));
    let gateway = Gateway::start(&upstream(&[backend.url()], json!({ "request_timeout_ms": 30000 })), &forward(rule));
    messages.iter().for_each(|message| gateway.append(message));
    gateway.drained().await;
    for device in ["a", "b", "c"] {
        let of_device =
            |received: &&Received| received.header("ce-subject") == Some(&format!("dev/{device}/telemetry"));
        let numbers: Vec<u64> = backend.kept().iter().filter(of_device).map(|r| r.body.parse().unwrap()).collect();
        assert_eq!(numbers.len(), 20);
        assert!(numbers.is_sorted(), "{numbers:?}");
    }
    assert!(backend.connections() > 1, "one request at a time");
}

#[tokio::test]
async fn the_key_of_a_batch_is_the_same_when_it_is_sent_again() {
    let backend = Backend::start(Mood::Raw { answer: "", keep: true }).await;
    let gateway = Gateway::start(&upstream(&[backend.url()], json!({})), &forward(json!({})));
    gateway.append(&message(1, "d", "1"));
    super::wait_until("two tries", || backend.requests() >= 2).await;
    backend.set(Mood::Well);
    gateway.append(&message(2, "d", "2"));
    gateway.drained().await;
    let key = |n: usize| backend.kept()[n].header("idempotency-key").unwrap().to_owned();
    assert_eq!(key(0), key(1));
    assert_ne!(key(0), key(backend.kept().len() - 1));
}
