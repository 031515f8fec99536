//! Tidegate, an IoT edge gateway: MQTT, CoAP and HTTP in, one identity and one policy, a durable queue and a balanced uplink out.
//!
//! `ARCHITECTURE.md` is the map. Modules are layered: a module imports only from layers below its own (`tests/architecture.rs` checks it).
//! This file is the only wiring: [`start`] joins the parts, [`Running::stop`] takes them apart in the order in which nothing is lost.

pub mod admin;
pub mod balance;
pub mod cache;
pub mod cli;
pub mod config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod directory;
pub mod gateway;
pub mod hub;
pub mod identity;
pub mod limit;
pub mod listener;
pub mod message;
pub mod network;
pub mod policy;
pub mod session;
pub mod spool;
pub mod tasks;
pub mod telemetry;
pub mod timer;
pub mod tls;
pub mod units;
pub mod upstream;
pub mod worker;

use std::fmt;
use std::fs;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use admin::{Check, ListenerFacts};
use config::{Config, Inputs, Loaded};
use gateway::{Exchange, ForwardTopics, Gateway, ProxyBody, Routes, Rules, ServedBy, UpstreamFault};
use identity::Identity;
use listener::{Adapters, Listener, Permits};
use spool::Spool;
use tasks::Tasks;
use telemetry::access_log::AccessLog;
use upstream::Upstreams;

/// Where a running gateway can be asked, for `tidegate status` and its kin: in the data folder, gone when the gateway has stopped in order.
pub const RUNNING_FILE: &str = "running.json";

/// Why the gateway did not start. Nothing stays open, bound or running.
#[derive(Debug)]
pub enum StartError {
    /// The data folder cannot be made or written.
    DataDir {
        path: PathBuf,
        source: io::Error,
    },
    Identity(identity::Error),
    Spool(spool::Error),
    Upstream(upstream::Error),
    Listener(listener::Error),
    /// The address of `[admin]`.
    Admin {
        address: String,
        source: io::Error,
    },
    /// The file of `telemetry.access_log`.
    AccessLog(io::Error),
    Worker(worker::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::DataDir { path, source } => {
                write!(f, "gateway.data_dir: cannot use {}: {source}", path.display())
            }
            StartError::Identity(error) => error.fmt(f),
            StartError::Spool(error) => error.fmt(f),
            StartError::Upstream(error) => error.fmt(f),
            StartError::Listener(error) => error.fmt(f),
            StartError::Admin { address, source } => write!(f, "admin.bind: cannot listen on {address}: {source}"),
            StartError::AccessLog(error) => write!(f, "telemetry.access_log: cannot write {error}"),
            StartError::Worker(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            StartError::DataDir { source, .. } | StartError::Admin { source, .. } | StartError::AccessLog(source) => {
                Some(source)
            }
            StartError::Identity(error) => Some(error),
            StartError::Spool(error) => Some(error),
            StartError::Upstream(error) => Some(error),
            StartError::Listener(error) => Some(error),
            StartError::Worker(error) => Some(error),
        }
    }
}

impl StartError {
    /// Whether the same start can succeed later without anybody editing anything (exit code 75, otherwise 1).
    pub fn can_retry(&self) -> bool {
        match self {
            StartError::DataDir { source, .. } => source.kind() != io::ErrorKind::PermissionDenied,
            StartError::AccessLog(source) => source.kind() == io::ErrorKind::StorageFull,
            StartError::Identity(error) => error.blame() == identity::Blame::Machine,
            StartError::Spool(error) => error.can_retry(),
            StartError::Upstream(_) => false,
            StartError::Listener(listener::Error::Bind { source, .. }) | StartError::Worker(source) => {
                !matches!(source, worker::Error::NotAllowed { .. } | worker::Error::NoSuchAddress { .. })
            }
            StartError::Listener(listener::Error::Tls { .. } | listener::Error::NotServed { .. }) => false,
            StartError::Admin { source, .. } => source.kind() == io::ErrorKind::AddrInUse,
        }
    }
}

/// A gateway that runs. Dropping it without [`stop`](Running::stop) leaves its threads to the end of the process.
pub struct Running {
    pub gateway: Arc<Gateway>,
    /// Where the admin side listens; a configured port 0 is resolved.
    pub admin: SocketAddr,
    parts: Arc<Parts>,
    workers: worker::Workers,
    control: worker::Workers,
}

/// What the admin side, a reload and the end need to know.
struct Parts {
    gateway: Arc<Gateway>,
    inputs: Inputs,
    config: ArcSwap<Config>,
    listeners: Vec<Arc<Listener>>,
    addresses: Vec<SocketAddr>,
    upstreams: Upstreams,
    /// One reload at a time.
    reloading: Mutex<()>,
}

/// Starts everything. Sockets are bound before anything is served, and served last. Blocks.
///
/// # Errors
/// [`StartError`].
pub fn start(loaded: Loaded, inputs: Inputs) -> Result<Running, StartError> {
    telemetry::install_metrics();
    let Loaded { config, policy, .. } = loaded;
    let data_dir = config.gateway.data_dir.clone();
    make_data_dir(&data_dir).map_err(|source| StartError::DataDir { path: data_dir.clone(), source })?;

    let identity = Arc::new(Identity::open(&data_dir, &config.identity).map_err(StartError::Identity)?);
    let upstreams = Upstreams::new(&config.upstream).map_err(StartError::Upstream)?;
    let sinks = config.forward.iter().map(upstream::ForwardConfig::sink).collect();
    let spool = Spool::open(&data_dir, config.spool.clone(), sinks).map_err(StartError::Spool)?;
    let forwards = config.forward.iter().filter_map(|rule| {
        let patterns = rule.topics.iter().map(|topic| topic.as_str().into()).collect();
        Some(ForwardTopics { patterns, sink: spool.sink(&rule.name)? })
    });
    let forwards = forwards.collect();
    let rules = rules(&config, policy);
    let gateway =
        Arc::new(Gateway::new(config.gateway.clone(), identity, spool.clone(), forwards, rules, Instant::now()));
    gateway.restore(Instant::now()).map_err(StartError::Spool)?;

    let count = config.gateway.workers.count();
    let bound = listener::bind(&config.listener, count).map_err(StartError::Listener)?;
    let admin_failed = |source| StartError::Admin { address: config.admin.bind.clone(), source };
    let admin_socket = bind_admin(&config.admin.bind).map_err(admin_failed)?;
    let admin = admin_socket.local_addr().map_err(admin_failed)?;
    let access_log = AccessLog::open(&config.telemetry).map_err(StartError::AccessLog)?;

    let parts = Arc::new(Parts {
        gateway: gateway.clone(),
        inputs,
        listeners: bound.listeners,
        addresses: bound.addresses,
        upstreams: upstreams.clone(),
        reloading: Mutex::new(()),
        config: ArcSwap::from_pointee(config),
    });
    let control = start_control(&parts, admin_socket, spool).map_err(StartError::Worker)?;
    let workers = match start_workers(&gateway, &upstreams, access_log, bound.sockets) {
        Ok(workers) => workers,
        Err(error) => {
            control.shutdown_token().cancel();
            return Err(StartError::Worker(error));
        }
    };
    write_running_file(&data_dir, admin, &parts);
    for (listener, address) in parts.listeners.iter().zip(&parts.addresses) {
        tracing::info!(listener = listener.name(), %address, transport = listener.transport().as_str(), "listening");
    }
    tracing::info!(%admin, gateway_id = gateway.identity.gateway_id_hex(), workers = count, "started");
    Ok(Running { gateway, admin, parts, workers, control })
}

impl Running {
    /// The address of the listener of that name.
    pub fn address(&self, listener: &str) -> Option<SocketAddr> {
        let at = self.parts.listeners.iter().position(|l| l.name() == listener)?;
        self.parts.addresses.get(at).copied()
    }

    /// Cancelled when a thread has died: then the gateway is to be stopped.
    pub fn failed(&self) -> &CancellationToken {
        self.workers.shutdown_token()
    }

    /// Reads the configuration again. The text is for the operator either way.
    ///
    /// # Errors
    /// Everything that is wrong with it; what runs keeps running.
    pub fn reload(&self) -> Result<String, String> {
        self.parts.reload()
    }

    /// Refuses what is new, lets what is under way finish within `drain_timeout_ms`, stores what is pending, and ends every thread. Blocks.
    ///
    /// # Errors
    /// A thread had panicked.
    pub fn stop(self) -> Result<(), worker::WorkerDied> {
        let Running { gateway, parts, workers, control, .. } = self;
        gateway.drain();
        workers.shutdown_token().cancel();
        let worked = workers.join();
        control.shutdown_token().cancel();
        let controlled = control.join();
        gateway.spool.close();
        fs::remove_file(parts.config.load().gateway.data_dir.join(RUNNING_FILE)).ok();
        worked.and(controlled)
    }
}

fn rules(config: &Config, policy: policy::Policy) -> Rules {
    Rules {
        policy,
        address_filter: config.address_filter.clone(),
        limits: config.limits.clone(),
        routes: Routes::new(&config.route),
        anonymous_role: config.identity.anonymous_role.as_str().into(),
    }
}

fn start_workers(
    gateway: &Arc<Gateway>,
    upstreams: &Upstreams,
    access_log: Option<Arc<AccessLog>>,
    sockets: Vec<listener::Sockets>,
) -> Result<worker::Workers, worker::Error> {
    let (upstreams, logs) = (upstreams.clone(), access_log.is_some());
    let adapters = Adapters::new(gateway.clone(), access_log);
    let permits = Arc::new(Permits::default());
    let count = sockets.len();
    // Each worker takes its own; a worker starts once.
    let sockets = Mutex::new(sockets.into_iter().map(Some).collect::<Vec<_>>());
    worker::start(count, CancellationToken::new(), move |worker| {
        let sockets = sockets.lock().get_mut(worker.index).and_then(Option::take).unwrap_or_default();
        let (permits, adapters, upstreams) = (permits.clone(), adapters.clone(), upstreams.clone());
        async move {
            let way_out = WayOut { proxy: upstreams.proxy(&worker.tasks), logs };
            listener::run(worker, sockets, permits, adapters.with_exchange(Arc::new(way_out))).await;
        }
    })
}

/// One worker's way to the upstreams, as the gateway asks for it.
struct WayOut {
    proxy: upstream::Proxy,
    /// Whether anybody writes down who served a request.
    logs: bool,
}

impl Exchange for WayOut {
    fn exchange<'a>(
        &'a self,
        to: &'a str,
        key: u64,
        request: http::Request<ProxyBody>,
        deadline: Instant,
    ) -> Pin<Box<dyn Future<Output = Result<http::Response<ProxyBody>, UpstreamFault>> + Send + 'a>> {
        Box::pin(async move {
            match self.proxy.exchange(to, key, request, deadline).await {
                Ok(upstream::Answer { mut response, endpoint }) => {
                    if self.logs {
                        response.extensions_mut().insert(ServedBy(endpoint));
                    }
                    Ok(response)
                }
                Err(upstream::Fault::Unreachable) => Err(UpstreamFault::Unreachable),
                Err(upstream::Fault::Unavailable) => Err(UpstreamFault::Unavailable),
                Err(upstream::Fault::Timeout) => Err(UpstreamFault::Timeout),
                Err(upstream::Fault::RequestBody) => Err(UpstreamFault::RequestBody),
            }
        })
    }

    fn dial<'a>(
        &'a self,
        host: &'a str,
        port: u16,
        deadline: Instant,
    ) -> Pin<Box<dyn Future<Output = gateway::Dialled> + Send + 'a>> {
        let within = deadline.saturating_duration_since(Instant::now());
        Box::pin(async move {
            match upstream::dial(host, port, within).await {
                Ok(stream) => Ok(Box::new(stream) as Box<dyn gateway::Line>),
                Err(upstream::DialFault::ConnectTimeout) => Err(UpstreamFault::Timeout),
                Err(_) => Err(UpstreamFault::Unreachable),
            }
        })
    }
}

/// The runtime beside the workers: admin side, forwarders, bridges, health checks, housekeeping.
fn start_control(parts: &Arc<Parts>, admin: TcpListener, spool: Spool) -> Result<worker::Workers, worker::Error> {
    let parts = parts.clone();
    worker::start_control(CancellationToken::new(), move |tasks| async move {
        let config = parts.config.load_full();
        let downlink = Arc::new(Down(parts.gateway.clone()));
        upstream::spawn(&tasks, &parts.upstreams, &config.forward, &spool, &config.gateway.name, downlink);
        let proxy = Arc::new(parts.upstreams.proxy(&tasks));
        tasks.spawn("housekeeping", housekeeping(parts.gateway.clone(), proxy, tasks.clone()));
        serve_admin(&tasks, &parts, admin, &config.admin);
        tasks.shutdown_token().cancelled().await;
        tasks.drain(CONTROL_DRAIN).await;
    })
}

fn serve_admin(tasks: &Tasks, parts: &Arc<Parts>, socket: TcpListener, config: &admin::Config) {
    let (parts, config, shutdown) = (parts.clone(), config.clone(), tasks.shutdown_token().clone());
    tasks.spawn("admin", async move {
        let served = async {
            let listener = tokio::net::TcpListener::from_std(socket)?;
            admin::serve(listener, &config, parts.gateway.clone(), parts.clone(), shutdown).await
        };
        if let Err(error) = served.await {
            tracing::error!(%error, "the admin side has ended");
        }
    });
}

/// The work of every second.
async fn housekeeping(gateway: Arc<Gateway>, proxy: Arc<upstream::Proxy>, tasks: Tasks) {
    let shutdown = tasks.shutdown_token().clone();
    let mut seconds = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            _ = seconds.tick() => {}
            () = shutdown.cancelled() => return,
        }
        gateway.tick(Instant::now());
        look_after_keys(&gateway, &proxy, &tasks).await;
        telemetry::upkeep();
    }
}

/// The keys of identity providers: files that may have changed, and what is to be fetched.
async fn look_after_keys(gateway: &Gateway, proxy: &Arc<upstream::Proxy>, tasks: &Tasks) {
    let routes = gateway.with_rules(|rules| rules.routes.clone());
    for route in routes.due(Instant::now()) {
        let proxy = proxy.clone();
        tasks.spawn("provider-keys", async move {
            let Some(bearers) = &route.bearers else { return };
            let (to, path) = bearers.source();
            let fetched = upstream::fetch_keys(&proxy, to, path, gateway::Bearers::SET_BYTES_MAX).await;
            if let Err(error) = fetched.and_then(|set| bearers.learn(&set, Instant::now())) {
                tracing::warn!(
                    route = &*route.name,
                    upstream = to,
                    error,
                    "keys not fetched, those that were there stay"
                );
            }
        });
    }
    if routes.read_files() {
        // A file may be on something slow. A panic in there has been reported.
        let _ = tokio::task::spawn_blocking(move || routes.refresh()).await;
    }
}

/// What comes down from a broker goes to the devices that subscribe to it.
struct Down(Arc<Gateway>);

impl upstream::mqtt::Downlink for Down {
    fn received(&self, upstream: &str, message: upstream::mqtt::Received) {
        let published = self.0.downlink(&message.topic, message.payload, message.retain, Instant::now());
        if let Err(reject) = published {
            tracing::warn!(upstream, topic = message.topic, reason = %reject, "downlink message not published");
        }
    }
}

impl Parts {
    fn reload(&self) -> Result<String, String> {
        let _one_at_a_time = self.reloading.lock();
        let outcome = self.try_reload();
        let label = if outcome.is_ok() { "taken" } else { "refused" };
        metrics::counter!(telemetry::CONFIG_RELOADS_TOTAL, "outcome" => label).increment(1);
        match &outcome {
            Ok(text) => tracing::info!("configuration reloaded: {text}"),
            Err(text) => tracing::error!("configuration not reloaded, the old one stays:\n{text}"),
        }
        outcome
    }

    fn try_reload(&self) -> Result<String, String> {
        let loaded = config::load(&self.inputs).map_err(|report| report.to_string())?;
        for listener in &self.listeners {
            listener.reload_tls().map_err(|error| error.to_string())?;
        }
        let restart = config::reload::needs_restart(&self.config.load(), &loaded.config);
        self.gateway.identity.reconfigure(&loaded.config.identity);
        self.gateway.replace_rules(rules(&loaded.config, loaded.policy));
        if restart.is_empty() {
            // Otherwise the running values of those keys stay the measure of the next reload.
            self.config.store(Arc::new(loaded.config));
            return Ok("in force for every message from now on".into());
        }
        Ok(format!("in force, but for what is read at start only: {}", restart.join(", ")))
    }
}

impl admin::Facts for Parts {
    fn checks(&self) -> Vec<Check> {
        let disk = self.gateway.spool.healthy();
        let detail = disk.as_ref().map_or_else(ToString::to_string, |()| "takes writes".into());
        let mut checks = vec![
            Check { name: "listeners", ok: true, detail: format!("{} bound", self.listeners.len()) },
            Check { name: "disk", ok: disk.is_ok(), detail },
        ];
        let required = self.upstreams.required_checks().into_iter();
        checks.extend(required.map(|(name, ok, detail)| Check { name, ok, detail }));
        checks
    }

    fn listeners(&self) -> Vec<ListenerFacts> {
        let both = self.listeners.iter().zip(&self.addresses);
        both.map(|(listener, address)| ListenerFacts {
            name: listener.name().to_owned(),
            address: address.to_string(),
            transport: listener.transport().as_str(),
        })
        .collect()
    }

    fn upstreams(&self) -> serde_json::Value {
        self.upstreams.describe()
    }

    fn reload(&self) -> Result<String, String> {
        Parts::reload(self)
    }
}

/// Makes the folder, for us alone, and sees that it takes a file.
fn make_data_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if !path.is_dir() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    }
    let probe = path.join(".write-probe");
    fs::write(&probe, b"x")?;
    fs::remove_file(probe)
}

fn bind_admin(address: &str) -> io::Result<TcpListener> {
    let socket = TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// A gateway that cannot say where it is runs all the same.
fn write_running_file(data_dir: &Path, admin: SocketAddr, parts: &Parts) {
    let listeners: Vec<_> = admin::Facts::listeners(parts);
    let text = json!({ "pid": std::process::id(), "admin": admin.to_string(), "listeners": listeners });
    let path = data_dir.join(RUNNING_FILE);
    if let Err(error) = fs::write(&path, format!("{text:#}\n")) {
        tracing::warn!(path = %path.display(), %error, "cannot say where the gateway listens");
    }
}

/// How long forwarders and the admin side may take to end; what they have not sent stays in the spool.
const CONTROL_DRAIN: Duration = Duration::from_secs(5);
