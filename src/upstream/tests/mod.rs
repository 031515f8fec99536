//! Forwarding against backends that misbehave: nothing is lost, order is kept, ids are stable.

mod backend;
mod forwarding;
mod proxying;
mod raw;
mod secure;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::mqtt::{Downlink, Received};
use super::{Config, ForwardConfig, Upstreams};
use crate::message::{DeviceId, Message, MessageId, Origin, Properties, Protocol, Qos, Topic};
use crate::spool::{self, Spool};
use crate::tasks::Tasks;

/// Longer than anything takes that is going to happen.
const PATIENCE: Duration = Duration::from_secs(60);

struct NoDownlink;

impl Downlink for NoDownlink {
    fn received(&self, _: &str, _: Received) {}
}

fn message(seq: u64, device: &str, payload: &str) -> Message {
    Message {
        id: MessageId { epoch: 7, seq },
        ingested_ms: 1_795_132_800_123,
        topic: Topic::parse(&format!("dev/{device}/telemetry")).unwrap(),
        payload: Bytes::from(payload.to_owned()),
        qos: Qos::AtLeastOnce,
        retain: false,
        origin: Origin { device: Some(DeviceId::parse(device).unwrap()), protocol: Protocol::Mqtt, session: None },
        properties: None,
    }
}

fn typed(mut message: Message, content_type: &str) -> Message {
    message.properties =
        Some(Box::new(Properties { content_type: Some(content_type.into()), ..Properties::default() }));
    message
}

/// An upstream of the name `cloud`, impatient, so that tests are quick.
fn upstream(urls: &[String], more: Value) -> Config {
    let endpoints: Vec<Value> = urls.iter().map(|url| json!({ "url": url })).collect();
    let mut config = json!({
        "name": "cloud", "kind": "http", "endpoints": endpoints, "balance": "round_robin",
        "connect_timeout_ms": 500, "request_timeout_ms": 500,
    });
    merge(&mut config, more);
    serde_json::from_value(config).unwrap()
}

/// A rule of the name `rule`.
fn forward(more: Value) -> ForwardConfig {
    let mut config = json!({
        "name": "rule", "topics": ["#"], "to": "cloud", "path": "/ingest", "delivery": "os",
        "batch": { "records_max": 10, "linger_ms": 1 },
    });
    merge(&mut config, more);
    serde_json::from_value(config).unwrap()
}

fn merge(into: &mut Value, more: Value) {
    let (Value::Object(into), Value::Object(more)) = (into, more) else { return };
    into.extend(more);
}

/// A spool with one rule and what forwards it.
struct Gateway {
    _folder: tempfile::TempDir,
    spool: Spool,
    upstreams: Upstreams,
    rule: ForwardConfig,
    tasks: Tasks,
    appended: std::cell::Cell<u64>,
}

impl Gateway {
    fn start(upstream: &Config, rule: &ForwardConfig) -> Gateway {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(folder.path(), spool::Config::default(), vec![rule.sink()]).unwrap();
        let upstreams = Upstreams::new(std::slice::from_ref(upstream)).unwrap();
        let gateway = Gateway {
            _folder: folder,
            spool,
            upstreams,
            rule: rule.clone(),
            tasks: Tasks::default(),
            appended: Default::default(),
        };
        gateway.forward();
        gateway
    }

    fn forward(&self) {
        let rules = std::slice::from_ref(&self.rule);
        super::spawn(&self.tasks, &self.upstreams, rules, &self.spool, "gw", Arc::new(NoDownlink));
    }

    fn append(&self, message: &Message) {
        let sink = self.spool.sink("rule").unwrap();
        self.spool.append(message, &[sink], None, 0).unwrap();
        self.appended.set(self.appended.get() + 1);
    }

    /// Waits until the queue is empty.
    async fn drained(&self) {
        let done = |sink: &spool::SinkStats| sink.appended == self.appended.get() && sink.queued_records == 0;
        wait_until("everything left the queue", || self.spool.stats().iter().all(done)).await;
    }

    fn lost(&self) -> Vec<(spool::Reason, u64)> {
        self.spool.close();
        self.spool.ledger(100).unwrap().iter().map(|loss| (loss.reason, loss.records)).collect()
    }
}

async fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "never came: {what}");
}
