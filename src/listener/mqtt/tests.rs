//! The adapter over in-memory pipes, with a real gateway, registry and spool behind it; the client writes and reads packets as bytes.

mod chapters;
mod client;
mod login;
mod messages;
mod sessions;
mod subscriptions;

use std::net::SocketAddr;
use std::time::Instant;

use tidegate_auth::jwt::{Audience, Claims, NumericDate, sign};
use tidegate_auth::{SecretKey, text};

use super::*;
use crate::gateway::{Config, ForwardTopics, Now, Routes, Rules};
use crate::identity::{self, Identity, NewDevice, NewKey, Registry};
use crate::listener::{Config as ListenerConfig, Listener};
use crate::message::{DeviceId, Topic};
use crate::policy::{Policy, RuleConfig, RuleSource};
use crate::spool::{self, SinkConfig, Spool};
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

fn key(id: &str) -> SecretKey {
    let mut seed = [7; 32];
    seed[..id.len()].copy_from_slice(id.as_bytes());
    SecretKey::from_seed(&seed)
}

impl Fixture {
    fn new() -> Self {
        Fixture::with(|_| {}, |_| {}, &[])
    }

    fn configured(adjust: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        adjust(&mut config);
        Fixture::build(config, |_| {}, |_| {}, &[])
    }

    /// `sinks` are topic patterns of class `disk`.
    fn with(limits: impl FnOnce(&mut Limits), identity: impl FnOnce(&mut identity::Config), sinks: &[&str]) -> Self {
        Fixture::build(Config::default(), limits, identity, sinks)
    }

    fn build(
        config: Config,
        limits: impl FnOnce(&mut Limits),
        identity: impl FnOnce(&mut identity::Config),
        sinks: &[&str],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut identity_config = identity::Config::default();
        identity(&mut identity_config);
        let identity = Arc::new(Identity::open(folder.path(), &identity_config).unwrap());
        let roles = [("a", "sensor"), ("b", "sensor"), ("op", "operator"), ("op2", "operator")];
        let devices = roles.map(|(id, role)| NewDevice {
            id: DeviceId::parse(id).unwrap(),
            role: role.into(),
            attributes: vec![],
            keys: vec![NewKey { public: key(id).public(), not_before: None, not_after: None }],
        });
        Registry::open(folder.path()).unwrap().add(&devices, 0, |_| {}).unwrap();
        identity.refresh().unwrap();
        let sink = |name: &&str| SinkConfig {
            name: (*name).into(),
            delivery: spool::Delivery::Disk,
            queue: spool::QueueConfig::default(),
        };
        let spool = Spool::open(folder.path(), spool::Config::default(), sinks.iter().map(sink).collect()).unwrap();
        let forward = |name: &&str| ForwardTopics { patterns: vec![(*name).into()], sink: spool.sink(name).unwrap() };
        let forwards = sinks.iter().map(forward).collect();
        let mut of_limits = Limits::default();
        limits(&mut of_limits);
        let parsed: Vec<RuleConfig> = serde_json::from_str(RULES).unwrap();
        let sources = parsed.into_iter().zip(1..).map(|(rule, line)| RuleSource { rule, file: "p".into(), line });
        let rules = Rules {
            policy: Policy::compile(sources.collect()).unwrap(),
            address_filter: Default::default(),
            limits: of_limits,
            routes: Routes::default(),
            anonymous_role: identity_config.anonymous_role.as_str().into(),
        };
        let gateway = Arc::new(Gateway::new(config, identity, spool, forwards, rules, now()));
        Fixture { gateway, shared: Arc::new(Shared::new()), shutdown: CancellationToken::new(), folder }
    }

    fn conn(&self, tls: Option<TlsInfo>) -> ConnectionInfo {
        ConnectionInfo {
            peer: SocketAddr::from(([192, 0, 2, 1], 4000)),
            local: SocketAddr::from(([192, 0, 2, 2], 1883)),
            listener: Arc::new(Listener::new(ListenerConfig { name: "test".into(), ..Default::default() }).unwrap()),
            tls,
        }
    }

    /// A connection on which nothing was said.
    fn dial(&self, version: Version) -> Client {
        self.dial_tls(version, None, 1 << 16)
    }

    fn dial_tls(&self, version: Version, tls: Option<TlsInfo>, pipe_bytes: usize) -> Client {
        let (near, far) = tokio::io::duplex(pipe_bytes);
        let (gateway, shared) = (self.gateway.clone(), self.shared.clone());
        let serving = serve(far, BytesMut::new(), self.conn(tls), gateway, shared, self.shutdown.clone());
        Client::new(near, version, tokio::spawn(serving))
    }

    /// A JWT that is good once.
    fn jwt(&self, id: &str, life_secs: u64) -> String {
        let now = Now::read().unix_secs;
        let mut jti = [0; 16];
        getrandom::fill(&mut jti).unwrap();
        let claims = Claims {
            iss: id.into(),
            sub: id.into(),
            aud: Audience::One(self.gateway.identity.gateway().id.audience()),
            iat: NumericDate(now),
            exp: NumericDate(now + life_secs),
            nbf: None,
            jti: text::hex(&jti),
            nonce: None,
        };
        sign(&claims, &key(id))
    }

    /// A client that has logged in by JWT, with a clean session.
    async fn login(&self, version: Version, id: &str) -> Client {
        let mut client = self.dial(version);
        client.connect(id).password(&self.jwt(id, 600)).send().await;
        client.accepted().await;
        client
    }

    fn emit(&self, topic: &str, payload: &'static str, retain: bool) {
        self.gateway.emit(Topic::parse(topic).unwrap(), payload.into(), retain, Instant::now()).unwrap();
    }
}

const VERSIONS: [Version; 2] = [Version::V311, Version::V5];
use tidegate_mqtt::Version;
