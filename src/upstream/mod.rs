//! The cloud side: who can be reached, and how what the spool holds gets there.
//!
//! [`Upstreams`] is what is known about every `[[upstream]]`; [`spawn`] starts what runs beside the workers: health checks, a [`forwarder`] for
//! each forward rule to an HTTP upstream, and a bridge ([`mqtt`]) for each one to a broker.

mod batch;
mod chooser;
mod config;
mod connect;
pub mod endpoint;
pub mod event;
mod forwarder;
mod health;
mod http;
mod keys;
mod link;
pub mod mqtt;
mod pace;
mod pool;
mod proxy;
mod random;
pub mod template;

use std::fmt;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use metrics::gauge;
use serde_json::json;

use crate::balance::{Balancer, Settings, State};
use crate::spool::Spool;
use crate::tasks::Tasks;
use crate::telemetry::UPSTREAM_HEALTHY;
use crate::tls::{self, Alpn, KeyPair};
use connect::Dial;
use endpoint::Endpoint;
use forwarder::{Courier, Forwarder, Replays};
use health::{Health, Watch};
use http::Client;
use mqtt::{Broker, Downlink, Links};
use parking_lot::Mutex;
use portable_atomic::AtomicBool;
use proxy::Lane;
use random::Random;
use template::Template;

pub use connect::{Fault as DialFault, dial};
pub use keys::fetch as fetch_keys;
pub use link::{BoxError, ProxyBody};
pub use proxy::{Answer, Fault, Proxy};

pub use config::{BatchConfig, BatchFormat, Config, ForwardConfig, HealthConfig, Http2, Kind, MqttVersion};

/// Why an upstream cannot be used. All are the operator's to mend.
#[derive(Debug)]
pub enum Error {
    /// The URL of an endpoint.
    Endpoint { upstream: String, url: String, what: &'static str },
    /// Its certificates.
    Tls { upstream: String, source: tls::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Endpoint { upstream, url, what } => {
                let url = url.rsplit('@').next().unwrap_or(url);
                write!(f, "upstream \"{upstream}\", endpoint \"{url}\": {what}; mend its `url`")
            }
            Error::Tls { upstream, source } => write!(f, "upstream \"{upstream}\": {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Tls { source, .. } => Some(source),
            Error::Endpoint { .. } => None,
        }
    }
}

/// Every upstream of the configuration. Cheap to clone.
#[derive(Clone)]
pub struct Upstreams(Arc<[Arc<Upstream>]>);

struct Upstream {
    config: Arc<Config>,
    health: Arc<Health>,
    /// How each endpoint is connected to; a check of a broker needs it too.
    dials: Vec<Dial>,
    side: Side,
    /// What the workers know, each for itself.
    lanes: Mutex<Vec<Weak<Lane>>>,
}

enum Side {
    Http {
        client: Arc<Client>,
        replays: Arc<Replays>,
        /// TLS without HTTP/2, for connections that are going to change their protocol.
        upgrade_tls: Option<tls::Client>,
    },
    Mqtt {
        endpoints: Arc<[mqtt::Endpoint]>,
        tls: Option<tls::Client>,
        links: Arc<Links>,
    },
}

impl Upstreams {
    /// Prepares connections to every upstream. Blocks on reading certificates; connects to nothing.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(configs: &[Config]) -> Result<Self, Error> {
        configs.iter().map(|config| Upstream::new(config).map(Arc::new)).collect::<Result<_, _>>().map(Upstreams)
    }

    /// Every upstream with its endpoints, for people.
    pub fn describe(&self) -> serde_json::Value {
        self.0.iter().map(|upstream| upstream.describe()).collect()
    }

    /// For `/readyz`: each upstream without which the gateway is not ready, whether an endpoint of it can be used, and what is known.
    pub fn required_checks(&self) -> Vec<(&'static str, bool, String)> {
        let required = self.0.iter().filter(|upstream| upstream.config.required_for_ready);
        required
            .map(|upstream| {
                let name = &upstream.config.name;
                if let Side::Mqtt { links, .. } = &upstream.side {
                    let (up, wanted) = links.count();
                    return ("upstream", up == wanted, format!("{name}: {up} of {wanted} connections stand"));
                }
                let (usable, of) = (upstream.usable(), upstream.dials.len());
                ("upstream", usable > 0, format!("{name}: {usable} of {of} endpoints can be used"))
            })
            .collect()
    }

    /// A worker's way to the HTTP upstreams, for the request plane. To be made on its runtime.
    pub fn proxy(&self, tasks: &Tasks) -> Proxy {
        Proxy::new(&self.0, &own_tasks(tasks))
    }

    fn find(&self, name: &str) -> Option<&Arc<Upstream>> {
        self.0.iter().find(|upstream| upstream.config.name == name)
    }
}

impl Upstream {
    fn new(config: &Config) -> Result<Self, Error> {
        let wrong = |url: &str, what| Error::Endpoint { upstream: config.name.clone(), url: url.to_owned(), what };
        let connect = Duration::from_millis(config.connect_timeout_ms.into());
        let health = Arc::new(Health::new(config.endpoints.len()));
        let shared = Arc::new(config.clone());
        let urls = config.endpoints.iter().map(|endpoint| endpoint.url.as_str());
        Ok(match config.kind {
            Kind::Http => {
                let parsed = urls.map(|url| Endpoint::parse(url).map_err(|what| wrong(url, what)));
                let endpoints = parsed.collect::<Result<Vec<_>, _>>()?;
                let encrypted = endpoints.iter().any(|endpoint| endpoint.tls);
                let alpn = match config.http2 {
                    Http2::Auto => vec![Alpn::Http2, Alpn::Http1],
                    Http2::Always => vec![Alpn::Http2],
                    Http2::Never => vec![Alpn::Http1],
                };
                let tls = encrypted.then(|| client_tls(config, alpn)).transpose()?;
                let http2 = config.http2 == Http2::Always;
                let dial = |endpoint: Endpoint| Dial {
                    tls: tls.clone().filter(|_| endpoint.tls),
                    http2,
                    endpoint,
                    timeout: connect,
                };
                let dials: Vec<Dial> = endpoints.into_iter().map(dial).collect();
                let client = Client::new(shared.clone(), dials.clone(), health.clone());
                let upgrade_tls = encrypted.then(|| client_tls(config, vec![Alpn::Http1])).transpose()?;
                let side = Side::Http { client: Arc::new(client), replays: Arc::default(), upgrade_tls };
                Upstream { config: shared, health, dials, side, lanes: Mutex::default() }
            }
            Kind::Mqtt => {
                let parsed =
                    urls.map(|url| mqtt::Endpoint::parse(url).ok_or_else(|| wrong(url, "not the address of a broker")));
                let endpoints = parsed.collect::<Result<Arc<[_]>, _>>()?;
                let encrypted = endpoints.iter().any(|endpoint| endpoint.tls);
                let tls = encrypted.then(|| client_tls(config, Vec::new())).transpose()?;
                let dials = endpoints.iter().zip(&config.endpoints).map(|(endpoint, named)| Dial {
                    endpoint: Endpoint {
                        url: named.url.clone(),
                        tls: endpoint.tls,
                        host: endpoint.host.clone(),
                        port: endpoint.port,
                        authority: ::http::HeaderValue::from_static(""),
                    },
                    tls: tls.clone().filter(|_| endpoint.tls),
                    http2: false,
                    timeout: connect,
                });
                let dials = dials.collect();
                Upstream {
                    config: shared,
                    health,
                    dials,
                    side: Side::Mqtt { endpoints, tls, links: Arc::default() },
                    lanes: Mutex::default(),
                }
            }
        })
    }

    /// How each endpoint is connected to for another protocol; `None` if this is no HTTP upstream.
    fn upgrade_dials(&self) -> Option<Vec<Dial>> {
        let Side::Http { upgrade_tls, .. } = &self.side else { return None };
        let plain =
            |dial: &Dial| Dial { tls: dial.tls.as_ref().and(upgrade_tls.clone()), http2: false, ..dial.clone() };
        Some(self.dials.iter().map(plain).collect())
    }

    fn note_lane(&self, lane: &Arc<Lane>) {
        let mut lanes = self.lanes.lock();
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(lane));
    }

    fn lanes(&self) -> Vec<Arc<Lane>> {
        self.lanes.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Each endpoint as whoever thinks best of it sees it: deliveries and workers judge for themselves.
    fn views(&self) -> Vec<View> {
        let mut views: Vec<View> = (0..self.dials.len())
            .map(|index| View {
                state: if self.health.is_healthy(index) { State::Available } else { State::Unhealthy },
                in_flight: 0,
                requests: 0,
            })
            .collect();
        let Side::Http { client, .. } = &self.side else { return views };
        let mut seen = 0;
        let mut look = |balancer: &Balancer| {
            for (view, status) in views.iter_mut().zip(balancer.statuses(Instant::now())) {
                if seen == 0 || usable(status.state) && !usable(view.state) {
                    view.state = status.state;
                }
                view.in_flight += u64::from(status.in_flight);
                view.requests += status.picks;
            }
            seen += 1;
        };
        client.with_balancer(&mut look);
        self.lanes().iter().for_each(|lane| lane.with_balancer(&mut look));
        views
    }

    fn usable(&self) -> usize {
        self.views().iter().filter(|view| usable(view.state)).count()
    }

    fn describe(&self) -> serde_json::Value {
        let endpoint = |(dial, view): (&Dial, View)| {
            json!({
                "url": dial.endpoint.url,
                "healthy": view.state != State::Unhealthy,
                "state": view.state.as_str(),
                "in_flight": view.in_flight,
                "requests": view.requests,
            })
        };
        let endpoints: Vec<serde_json::Value> = self.dials.iter().zip(self.views()).map(endpoint).collect();
        let mut described =
            json!({ "name": self.config.name, "kind": self.config.kind.as_str(), "endpoints": endpoints });
        match &self.side {
            Side::Http { .. } => {
                let connections: u32 = self.lanes().iter().map(|lane| lane.connections()).sum();
                described["worker_connections"] = connections.into();
            }
            Side::Mqtt { links, .. } => {
                let (up, wanted) = links.count();
                described["connections"] = json!({ "up": up, "wanted": wanted });
            }
        }
        described
    }

    fn export(&self) {
        let usable = match &self.side {
            Side::Mqtt { links, .. } if links.count() == (0, 0) => self.health.healthy_count(),
            // Which endpoint a bridge uses it does not tell.
            Side::Mqtt { links, .. } => links.count().0.min(1) as usize,
            Side::Http { .. } => self.usable(),
        };
        gauge!(UPSTREAM_HEALTHY, "upstream" => self.config.name.clone()).set(usable as f64);
    }
}

/// An endpoint for people.
struct View {
    state: State,
    in_flight: u64,
    requests: u64,
}

fn usable(state: State) -> bool {
    matches!(state, State::Available | State::HalfOpen | State::Busy)
}

fn settings(config: &Config) -> Settings {
    Settings {
        algorithm: config.balance,
        eject: config.eject.clone(),
        breaker: config.breaker.clone(),
        slow_start_ms: config.slow_start_ms,
    }
}

fn client_tls(config: &Config, alpn: Vec<Alpn>) -> Result<tls::Client, Error> {
    let pair = config.certificate.clone().zip(config.key.clone());
    let identity = pair.map(|(certificate, key)| KeyPair { certificate, key });
    let client = tls::ClientConfig { ca_file: config.ca_file.clone(), identity, alpn };
    tls::Client::new(&client).map_err(|source| Error::Tls { upstream: config.name.clone(), source })
}

/// Starts health checks, forwarders and bridges on the runtime it is called on; they end with `tasks`.
///
/// A rule whose upstream or queue does not exist is left out; the configuration's check has refused such.
pub fn spawn(
    tasks: &Tasks,
    upstreams: &Upstreams,
    forwards: &[ForwardConfig],
    spool: &Spool,
    gateway_name: &str,
    downlink: Arc<dyn Downlink>,
) {
    let gateway: Arc<str> = gateway_name.into();
    let connections = own_tasks(tasks);
    let private_dir = match upstreams.0.iter().any(|upstream| matches!(upstream.side, Side::Mqtt { tls: Some(_), .. }))
    {
        true => PrivateDir::make().map(Arc::new).map_err(|error| {
            tracing::error!(%error, "no folder for the relay to brokers behind TLS, they cannot be reached");
        }),
        false => Err(()),
    };
    for upstream in upstreams.0.iter() {
        spawn_checks(tasks, &connections, upstream);
        if let Some(broker) = upstream.broker(&gateway, private_dir.as_deref().ok())
            && !upstream.config.subscribe.is_empty()
        {
            let (downlink, shutdown, kept) = (downlink.clone(), tasks.shutdown_token().clone(), private_dir.clone());
            tasks.spawn("mqtt-downlink", async move {
                let _kept = kept;
                broker.listen(downlink, shutdown).await;
            });
        }
    }
    let (all, shutdown) = (upstreams.clone(), tasks.shutdown_token().clone());
    tasks.spawn("upstream-metrics", async move {
        let mut rounds = tokio::time::interval(EXPORT_EVERY);
        loop {
            tokio::select! {
                _ = rounds.tick() => all.0.iter().for_each(|upstream| upstream.export()),
                () = shutdown.cancelled() => return,
            }
        }
    });
    for rule in forwards {
        let (Some(upstream), Some(sink)) = (upstreams.find(&rule.to), spool.sink(&rule.name)) else { continue };
        let (rule, reader, shutdown) = (rule.clone(), spool.reader(sink), tasks.shutdown_token().clone());
        match &upstream.side {
            Side::Http { client, replays, .. } => {
                let Ok(path) = Template::parse(&rule.path) else { continue };
                let courier = Courier {
                    rule,
                    path,
                    client: client.clone(),
                    pause_max: Duration::from_millis(upstream.config.backoff_max_ms.into()),
                    health: upstream.health.clone(),
                    gateway: gateway.clone(),
                    replays: replays.clone(),
                    in_trouble: AtomicBool::new(false),
                    connections: connections.clone(),
                };
                let forwarder = Forwarder { courier, reader };
                tasks.spawn("forwarder", forwarder.run(shutdown));
            }
            Side::Mqtt { .. } => {
                let Some(broker) = upstream.broker(&gateway, private_dir.as_deref().ok()) else { continue };
                let kept = private_dir.clone();
                tasks.spawn("mqtt-bridge", async move {
                    let _kept = kept;
                    broker.forward(rule, reader, shutdown).await;
                });
            }
        }
    }
}

/// How often it is counted which endpoints can be used: ejections and breakers come and go by themselves.
const EXPORT_EVERY: Duration = Duration::from_secs(2);

/// For connections, which end with the runtime and which no drain has to wait for: whoever uses one is waited for.
fn own_tasks(tasks: &Tasks) -> Tasks {
    Tasks::new(tasks.shutdown_token().child_token())
}

fn spawn_checks(tasks: &Tasks, connections: &Tasks, upstream: &Arc<Upstream>) {
    let Some(config) = &upstream.config.health else { return };
    for (index, dial) in upstream.dials.iter().enumerate() {
        let (upstream, dial, config, inner) = (upstream.clone(), dial.clone(), config.clone(), connections.clone());
        let shutdown = tasks.shutdown_token().clone();
        tasks.spawn("health-check", async move {
            let headers = http::extra_headers(&upstream.config);
            let watch = Watch { upstream: &upstream.config.name, index, dial, config, headers };
            watch.run(&upstream.health, &inner, shutdown, || upstream.export()).await;
        });
    }
}

impl Upstream {
    /// What a bridge needs; `None` for HTTP, and for TLS without a folder for its relay.
    fn broker(&self, gateway: &Arc<str>, private_dir: Option<&PrivateDir>) -> Option<Broker> {
        let Side::Mqtt { endpoints, tls, links } = &self.side else { return None };
        if tls.is_some() && private_dir.is_none() {
            return None;
        }
        Some(Broker {
            config: self.config.clone(),
            links: links.clone(),
            endpoints: endpoints.clone(),
            tls: tls.clone(),
            gateway_name: gateway.clone(),
            private_dir: private_dir.map(|dir| dir.0.clone()).unwrap_or_default(),
        })
    }
}

/// A fresh folder that this user alone may enter; gone when it is dropped.
#[derive(Debug)]
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn make() -> io::Result<Self> {
        let base = std::env::var_os("RUNTIME_DIRECTORY").map_or_else(std::env::temp_dir, PathBuf::from);
        let path = base.join(format!("tidegate-{:016x}", Random::new().next()));
        // Fails on anything that is there already, so nobody can have prepared it.
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(PrivateDir(path))
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "folder of the tls relay not removed");
        }
    }
}

#[cfg(test)]
mod tests;
