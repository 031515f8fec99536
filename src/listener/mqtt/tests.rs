//! The adapter over in-memory pipes, with a real gateway, registry and spool behind it; the client writes and reads packets as bytes.

mod chapters;
mod client;
mod login;
mod messages;
mod sessions;
mod subscriptions;

use tidegate_mqtt::{Property, Version};

use super::*;
use crate::gateway;
use crate::identity::{self, Registry};
use crate::listener::tests::fixture::{Plan, conn, emit, jwt, key};
use crate::message::DeviceId;
use crate::tls::TlsInfo;
use client::Client;

const RULES: &str = r##"[
    {"name": "own space", "who": ["role:sensor"], "do": ["publish", "subscribe", "read"], "on": ["dev/{device}/#"]},
    {"name": "plant", "who": ["anyone"], "do": ["publish", "subscribe", "read"], "on": ["plant/#"]},
    {"name": "operators", "who": ["role:operator"], "do": ["publish", "subscribe", "read", "command"], "on": ["#", "dev/#", "$SYS/#"]},
    {"name": "not there", "effect": "deny", "who": ["anyone"], "do": ["publish"], "on": ["plant/forbidden"]},
    {"name": "small", "who": ["anyone"], "do": ["publish"], "on": ["small/#"], "bytes_max": 4},
    {"name": "slow", "who": ["anyone"], "do": ["publish"], "on": ["slow/#"], "rate": "1/s burst 1"}
]"##;

struct Fixture {
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Fixture::with(|_| {}, |_| {}, &[])
    }

    /// `sinks` are topic patterns of class `disk`.
    fn with(limits: impl FnOnce(&mut Limits), identity: impl FnOnce(&mut identity::Config), sinks: &[&str]) -> Self {
        Fixture::planned(sinks, |plan| {
            limits(&mut plan.limits);
            identity(&mut plan.identity);
        })
    }

    fn configured(adjust: impl FnOnce(&mut gateway::Config)) -> Self {
        Fixture::planned(&[], |plan| adjust(&mut plan.config))
    }

    fn planned(sinks: &[&str], adjust: impl FnOnce(&mut Plan<'_>)) -> Self {
        let mut plan = Plan { rules: RULES, sinks, ..Plan::default() };
        adjust(&mut plan);
        let (gateway, folder) = plan.start();
        Fixture { gateway, shared: Arc::new(Shared::new()), shutdown: CancellationToken::new(), folder }
    }

    /// A connection on which nothing was said.
    fn dial(&self, version: Version) -> Client {
        self.dial_tls(version, None, 1 << 16)
    }

    fn dial_tls(&self, version: Version, tls: Option<TlsInfo>, pipe_bytes: usize) -> Client {
        let (near, far) = tokio::io::duplex(pipe_bytes);
        let (gateway, shared) = (self.gateway.clone(), self.shared.clone());
        let serving = serve(far, BytesMut::new(), conn(tls), gateway, shared, self.shutdown.clone());
        Client::new(near, version, tokio::spawn(serving))
    }

    /// A JWT that is good once.
    fn jwt(&self, id: &str, life_secs: u64) -> String {
        jwt(&self.gateway, id, life_secs)
    }

    /// A client that has logged in by JWT, with a clean session.
    async fn login(&self, version: Version, id: &str) -> Client {
        let mut client = self.dial(version);
        client.connect(id).password(&self.jwt(id, 600)).send().await;
        client.accepted().await;
        client
    }

    /// The same over MQTT 5, with one property.
    async fn login_with(&self, id: &str, property: Property<'_>) -> Client {
        let mut client = self.dial(Version::V5);
        client.connect(id).password(&self.jwt(id, 600)).property(property).send().await;
        client.accepted().await;
        client
    }

    fn emit(&self, topic: &str, payload: &'static str, retain: bool) {
        emit(&self.gateway, topic, payload, retain);
    }
}

const VERSIONS: [Version; 2] = [Version::V311, Version::V5];
