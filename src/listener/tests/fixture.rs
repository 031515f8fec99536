//! What the tests of the adapters share: a real gateway with three devices and a spool, in a folder of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tidegate_auth::jwt::{Audience, Claims, NumericDate, sign};
use tidegate_auth::{SecretKey, text};

use crate::gateway::{Config, ForwardTopics, Gateway, Limits, Now, Routes, Rules};
use crate::identity::{self, Identity, NewDevice, NewKey, Registry};
use crate::listener::{Config as ListenerConfig, ConnectionInfo, Listener};
use crate::message::{DeviceId, Topic};
use crate::policy::{Policy, RuleConfig, RuleSource};
use crate::spool::{self, SinkConfig, Spool};
use crate::tls::TlsInfo;

/// What a test may change before the gateway starts.
#[derive(Default)]
pub struct Plan<'a> {
    /// A list of rules in JSON.
    pub rules: &'a str,
    pub config: Config,
    pub limits: Limits,
    pub identity: identity::Config,
    /// Topic patterns of class `disk`, each with a sink of that name.
    pub sinks: &'a [&'a str],
    pub routes: Routes,
}

impl Plan<'_> {
    /// The gateway of the sensors `a` and `b` and the operators `op` and `op2`, who hold the keys of [`key`]; and its state folder.
    pub fn start(self) -> (Arc<Gateway>, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let identity = Arc::new(Identity::open(folder.path(), &self.identity).unwrap());
        let devices =
            [("a", "sensor"), ("b", "sensor"), ("op", "operator"), ("op2", "operator")].map(|(id, role)| NewDevice {
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
        let sinks = self.sinks.iter().map(sink).collect();
        let spool = Spool::open(folder.path(), spool::Config::default(), sinks).unwrap();
        let forward = |name: &&str| ForwardTopics { patterns: vec![(*name).into()], sink: spool.sink(name).unwrap() };
        let forwards = self.sinks.iter().map(forward).collect();
        let parsed: Vec<RuleConfig> = serde_json::from_str(self.rules).unwrap();
        let sources = parsed.into_iter().zip(1..).map(|(rule, line)| RuleSource { rule, file: "p".into(), line });
        let rules = Rules {
            policy: Policy::compile(sources.collect()).unwrap(),
            address_filter: Default::default(),
            limits: self.limits,
            routes: self.routes,
            anonymous_role: self.identity.anonymous_role.as_str().into(),
        };
        let gateway = Gateway::new(self.config, identity, spool, forwards, rules, Instant::now());
        (Arc::new(gateway), folder)
    }
}

/// The secret key of a device of [`Plan::start`].
pub fn key(id: &str) -> SecretKey {
    let mut seed = [7; 32];
    seed[..id.len()].copy_from_slice(id.as_bytes());
    SecretKey::from_seed(&seed)
}

/// A JWT that is good once.
pub fn jwt(gateway: &Gateway, id: &str, life_secs: u64) -> String {
    let now = Now::read().unix_secs;
    let claims = Claims {
        iss: id.into(),
        sub: id.into(),
        aud: Audience::One(gateway.identity.gateway().id.audience()),
        iat: NumericDate(now),
        exp: NumericDate(now + life_secs),
        nbf: None,
        jti: text::hex(&random()),
        nonce: None,
    };
    sign(&claims, &key(id))
}

pub fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// Of a connection that no socket stands behind.
pub fn conn(tls: Option<TlsInfo>) -> ConnectionInfo {
    ConnectionInfo {
        peer: SocketAddr::from(([192, 0, 2, 1], 4000)),
        local: SocketAddr::from(([192, 0, 2, 2], 1883)),
        listener: Arc::new(Listener::new(ListenerConfig { name: "test".into(), ..Default::default() }).unwrap()),
        tls,
    }
}

pub fn emit(gateway: &Gateway, topic: &str, payload: &'static str, retain: bool) {
    gateway.emit(Topic::parse(topic).unwrap(), payload.into(), retain, Instant::now()).unwrap();
}
