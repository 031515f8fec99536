//! `tidegate demo`: the product itself, fed by pretend sensors and forwarding to a pretend cloud, live in the terminal.
//!
//! Nothing of the gateway is mocked: a configuration is written to a temporary folder, loaded like any other and run by the same
//! [`crate::start`]. Devices speak MQTT 3.1.1, MQTT 5, HTTP and CoAP through real sockets and prove real keys. After a while the uplink is cut,
//! the queue fills, the uplink comes back, the queue drains; at the end the books are balanced: what was acknowledged and has not arrived is lost.

mod cloud;
mod device;
mod screen;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use portable_atomic::Ordering;
use tidegate_auth::SecretKey;
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::gateway::{Gateway, wall_ms};
use crate::identity::{GatewayKey, NewDevice, NewKey, Registry};
use crate::message::{DeviceId, Topic};

use cloud::Cloud;
use device::{Device, Tally};
use screen::{Screen, Standing};

/// How long and how.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// `None`: until Ctrl-C.
    pub seconds: Option<u64>,
    /// The summary as JSON on standard output.
    pub json: bool,
}

/// How the books stand at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// Readings that devices sent.
    pub sent: u64,
    /// Readings that the gateway acknowledged.
    pub acknowledged: u64,
    /// Of those, the ones the cloud has.
    pub delivered: u64,
    /// Acknowledged and not at the cloud: 0, or something is wrong.
    pub lost: u64,
    /// Received again under the same id, as at-least-once allows.
    pub duplicates: u64,
}

/// Why the demo could not run.
#[derive(Debug)]
pub enum Error {
    Io {
        what: &'static str,
        source: io::Error,
    },
    /// A fault of ours: the demo's own configuration was refused.
    Config(String),
    Start(crate::StartError),
    Registry(crate::identity::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { what, source } => write!(f, "{what}: {source}"),
            Error::Config(report) => write!(f, "the demo's own configuration was refused:\n{report}"),
            Error::Start(error) => error.fmt(f),
            Error::Registry(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// Runs the demo to its end.
///
/// # Errors
/// Something it needs from this machine is not to be had.
pub fn run(options: Options) -> Result<Summary, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Io { what: "cannot start a runtime", source })?;
    let folder = Folder::create().map_err(|source| Error::Io { what: "cannot make a temporary folder", source })?;
    runtime.block_on(play(options, &folder.0))
}

async fn play(options: Options, folder: &Path) -> Result<Summary, Error> {
    let cloud = Cloud::start().await.map_err(|source| Error::Io { what: "cannot start the pretend cloud", source })?;
    write_files(folder, &cloud).map_err(|source| Error::Io { what: "cannot write the configuration", source })?;
    let everyone: Vec<(&str, &str)> =
        SENSORS.iter().map(|(id, _)| (*id, "sensor")).chain([("guest", "guest")]).collect();
    let mut keys = register(&folder.join("data"), &everyone)?;
    if let Some(guest) = keys.pop() {
        let path = folder.join("guest.key");
        std::fs::write(&path, tidegate_auth::keyfile::secret_to_pem(&guest).as_bytes())
            .map_err(|source| Error::Io { what: "cannot write the guest's key", source })?;
        private(&path);
    }

    let inputs = config::Inputs { path: Some(folder.join("tidegate.toml")), ..config::Inputs::default() };
    let loaded = config::load(&inputs).map_err(|report| Error::Config(report.pretty(false)))?;
    let running = crate::start(loaded, inputs).map_err(Error::Start)?;
    let gateway_id = running.gateway.identity.gateway().id;
    let (tcp, udp) = (running.address("plain"), running.address("coap"));
    let (Some(tcp), Some(udp)) = (tcp, udp) else {
        return Err(Error::Config("a listener is missing".into()));
    };

    let stop = CancellationToken::new();
    let devices: Vec<Device> = SENSORS
        .iter()
        .zip(keys)
        .map(|((id, kind), key)| Device {
            id: (*id).to_owned(),
            key: Arc::new(key),
            gateway_id,
            gateway: if *kind == Kind::Coap { udp } else { tcp },
            tally: Arc::new(Tally::default()),
            every: Duration::from_millis(200),
        })
        .collect();
    for (device, (_, kind)) in devices.iter().zip(SENSORS) {
        tokio::spawn(keep_sending(device.clone(), kind, stop.clone()));
    }

    let screen = Screen::new(options.json);
    screen.introduce(&Introduction { folder, tcp, udp, admin: running.admin });
    let began = Instant::now();
    let (cut_at, restore_at) = outage(options.seconds);
    let end = options.seconds.map(|seconds| began + Duration::from_secs(seconds));
    let mut ticks = tokio::time::interval(Duration::from_millis(500));
    let mut commands = 0_u64;
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = &mut interrupted => break,
        }
        let elapsed = began.elapsed();
        let wanted = elapsed < cut_at || elapsed >= restore_at;
        if wanted != cloud.is_up() {
            cloud.set_up(wanted);
            screen.note(if wanted {
                "the uplink is back: the queue drains"
            } else {
                "the uplink is cut: the queue fills"
            });
        }
        if elapsed.as_secs() / 5 > commands {
            commands = elapsed.as_secs() / 5;
            command(&running.gateway, commands);
        }
        screen.show(&standing(&devices, &cloud, &running.gateway, elapsed));
        if end.is_some_and(|end| Instant::now() >= end) {
            break;
        }
    }

    stop.cancel();
    cloud.set_up(true);
    screen.note("stopping: waiting for the queue to drain");
    settle(&devices, &cloud, &running.gateway).await;
    screen.show(&standing(&devices, &cloud, &running.gateway, began.elapsed()));
    let summary = balance(&devices, &cloud);
    // Stopping joins the gateway's threads, which must not wait for this one.
    tokio::task::spawn_blocking(move || running.stop()).await.ok();
    screen.conclude(&summary);
    Ok(summary)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mqtt311,
    Mqtt5,
    Http,
    Coap,
}

const SENSORS: [(&str, Kind); 8] = [
    ("boiler-1", Kind::Mqtt311),
    ("boiler-2", Kind::Mqtt311),
    ("greenhouse-1", Kind::Mqtt5),
    ("greenhouse-2", Kind::Mqtt5),
    ("meter-1", Kind::Http),
    ("meter-2", Kind::Http),
    ("valve-1", Kind::Coap),
    ("valve-2", Kind::Coap),
];

/// When the uplink is cut and when it returns: the second third of a run with an end, otherwise after 20 s for 20 s.
fn outage(seconds: Option<u64>) -> (Duration, Duration) {
    let third = seconds.map_or(Duration::from_secs(20), |seconds| Duration::from_secs(seconds) / 3);
    (third, third * 2)
}

async fn keep_sending(device: Device, kind: Kind, stop: CancellationToken) {
    loop {
        let session = async {
            match kind {
                Kind::Mqtt311 => device.mqtt311().await,
                Kind::Mqtt5 => device.mqtt5().await,
                Kind::Http => device.http().await,
                Kind::Coap => device.coap().await,
            }
        };
        tokio::select! {
            ended = session => if let Err(error) = ended {
                tracing::debug!(device = device.id, %error, "pretend sensor starts again");
            },
            () = stop.cancelled() => return,
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Sends a command to one device that listens, as a backend would.
fn command(gateway: &Gateway, number: u64) {
    if let Ok(topic) = Topic::parse(&format!("dev/greenhouse-1/cmd/{number}/vent")) {
        let sent = gateway.emit(topic, "open".into(), false, Instant::now());
        if let Err(reject) = sent {
            tracing::debug!(reason = %reject, "command not sent");
        }
    }
}

/// Waits until everything acknowledged has arrived, or it is clear that it does not.
async fn settle(devices: &[Device], cloud: &Cloud, gateway: &Gateway) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        let queued: u64 = gateway.spool.stats().iter().map(|sink| sink.queued_records).sum();
        if queued == 0 && balance(devices, cloud).lost == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn balance(devices: &[Device], cloud: &Cloud) -> Summary {
    let readings = cloud.arrivals.readings.lock();
    let mut summary = Summary {
        sent: 0,
        acknowledged: 0,
        delivered: 0,
        lost: 0,
        duplicates: cloud.arrivals.duplicates.load(Ordering::Relaxed),
    };
    for device in devices {
        let acknowledged = device.tally.acknowledged.lock();
        summary.sent += device.tally.sent.load(Ordering::Relaxed);
        summary.acknowledged += acknowledged.len() as u64;
        let arrived = readings.get(&device.id);
        let here = acknowledged.iter().filter(|number| arrived.is_some_and(|set| set.contains(number))).count();
        summary.delivered += here as u64;
    }
    summary.lost = summary.acknowledged - summary.delivered;
    summary
}

fn standing(devices: &[Device], cloud: &Cloud, gateway: &Gateway, elapsed: Duration) -> Standing {
    Standing {
        elapsed,
        uplink: cloud.is_up(),
        books: balance(devices, cloud),
        sinks: gateway.spool.stats(),
        sessions: gateway.sessions.counts().0,
        requests: cloud.arrivals.requests.load(Ordering::Relaxed),
        at_broker: cloud.arrivals.at_broker.load(Ordering::Relaxed),
        commands: devices.iter().map(|device| device.tally.commands.load(Ordering::Relaxed)).sum(),
    }
}

/// Adds devices with fresh keys to the registry, as `tidegate device add` does.
fn register(data_dir: &Path, devices: &[(&str, &str)]) -> Result<Vec<SecretKey>, Error> {
    let mut registry = Registry::open(data_dir).map_err(Error::Registry)?;
    // First, because a registry with devices and without a key of the gateway's is refused.
    GatewayKey::open(data_dir, &registry).map_err(Error::Registry)?;
    let mut keys = Vec::new();
    let mut new = Vec::new();
    for (id, role) in devices {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed)
            .map_err(|error| Error::Io { what: "no random numbers", source: io::Error::other(error.to_string()) })?;
        let key = SecretKey::from_seed(&seed);
        let id = DeviceId::parse(id).map_err(|error| Error::Config(error.to_string()))?;
        let public = NewKey { public: key.public(), not_before: None, not_after: None };
        new.push(NewDevice { id, role: (*role).to_owned(), attributes: Vec::new(), keys: vec![public] });
        keys.push(key);
    }
    registry.add(&new, wall_ms() / 1000, |_| {}).map_err(Error::Registry)?;
    Ok(keys)
}

/// What a visitor needs to join in.
struct Introduction<'a> {
    folder: &'a Path,
    tcp: SocketAddr,
    udp: SocketAddr,
    admin: SocketAddr,
}

const ADMIN_TOKEN: &str = "demo-token-for-this-machine-only";

fn write_files(folder: &Path, cloud: &Cloud) -> io::Result<()> {
    let data = folder.join("data");
    std::fs::create_dir_all(&data)?;
    private(&data);
    std::fs::write(folder.join("policy.toml"), include_str!("policy.toml"))?;
    let text = include_str!("tidegate.toml")
        .replace("@HTTP@", &cloud.http.to_string())
        .replace("@MQTT@", &cloud.mqtt.to_string())
        .replace("@TOKEN@", ADMIN_TOKEN);
    std::fs::write(folder.join("tidegate.toml"), text)
}

/// Takes the rights of everybody else away; a file system without modes has none to take.
fn private(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mode = if path.is_dir() { 0o700 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).ok();
}

/// A folder of this run alone, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn create() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("tidegate-demo-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        private(&path);
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}
