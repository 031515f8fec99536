//! MQTT 3.1.1: messages through the broker, and connections that wait.

pub mod engine;
pub mod wire;

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use engine::{Engine, Login, Pace};

use crate::Result;
use crate::compare::{Contender, Options};
use crate::gateway::{Devices, Gateway, Role, Setup, device_id};
use crate::peers::{Peer, Server};
use crate::process::Process;
use crate::report::{Fact, Ordering, Sample, Section};

const PEERS: [Peer; 2] = [Peer::Mosquitto, Peer::Rumqttd];
const PAYLOAD_BYTES: usize = 64;
const WARM_UP: Duration = Duration::from_millis(500);

/// Who talks to whom, and how much.
#[derive(Clone, Copy)]
pub struct Load {
    name: &'static str,
    publishers: usize,
    subscribers: usize,
    /// Subscriber N hears publisher N only; otherwise all hear all.
    pairs: bool,
    qos: u8,
    pace: Pace,
    bars: &'static [(Peer, f64)],
}

/// Saturated: a fifth of mosquitto, and below rumqttd.
const SATURATED: &[(Peer, f64)] = &[(Peer::Mosquitto, 0.2), (Peer::Rumqttd, 1.0)];

const LOADS: [Load; 6] = [
    Load {
        name: "QoS 0, 10 -> 1",
        publishers: 10,
        subscribers: 1,
        pairs: false,
        qos: 0,
        pace: Pace::Flood,
        bars: SATURATED,
    },
    Load {
        name: "QoS 0, 1 -> 1",
        publishers: 1,
        subscribers: 1,
        pairs: false,
        qos: 0,
        pace: Pace::Flood,
        bars: SATURATED,
    },
    Load {
        name: "QoS 0, 1 -> 100",
        publishers: 1,
        subscribers: 100,
        pairs: false,
        qos: 0,
        pace: Pace::Flood,
        bars: SATURATED,
    },
    Load {
        name: "QoS 1, 10 -> 1, window 64",
        publishers: 10,
        subscribers: 1,
        pairs: false,
        qos: 1,
        pace: Pace::Window(64),
        bars: SATURATED,
    },
    Load {
        name: "QoS 1, 50 pairs, window 64",
        publishers: 50,
        subscribers: 50,
        pairs: true,
        qos: 1,
        pace: Pace::Window(64),
        bars: SATURATED,
    },
    Load {
        name: "QoS 0, 50 pairs, 200/s each",
        publishers: 50,
        subscribers: 50,
        pairs: true,
        qos: 0,
        pace: Pace::PerSecond(200.0),
        bars: &[(Peer::Mosquitto, 0.6)],
    },
];

pub fn run(options: &Options) -> Section {
    let mut section = Section::new("MQTT 3.1.1, 64-byte payload", "delivered message");
    let contenders = options.contenders(&PEERS, &mut section);
    for load in &LOADS {
        options.compare(&mut section, load.name, &contenders, load.bars, |contender| {
            let (server, devices) = start(contender, load.publishers.max(load.subscribers))?;
            measure(options, load, &server, devices.as_ref())
        });
    }
    section
}

/// Connections that say nothing after they are let in.
pub fn run_idle_connections(options: &Options) -> Section {
    let mut section = Section::new("MQTT connections, idle", "connection accepted");
    let contenders = options.contenders(&PEERS, &mut section);
    let count = if options.seconds < 3.0 { 500 } else { 10_000 };
    for subscribed in [false, true] {
        let load = format!("{count} connections{}", if subscribed { ", one subscription each" } else { "" });
        options.compare(&mut section, &load, &contenders, &[(Peer::Mosquitto, 1.0)], |contender| {
            let (server, devices) = start(contender, count)?;
            accept(&server, devices.as_ref(), count, subscribed)
        });
        for row in section.rows.iter().filter(|row| row.load == load) {
            let Ok(figures) = &row.outcome else { continue };
            let bar = row.server.starts_with("tidegate").then_some((Ordering::AtMost, 2.0));
            section.facts.push(Fact {
                what: format!("memory per connection, {load}"),
                server: row.server.clone(),
                value: figures.pss_bytes.unwrap_or_default() / 1024.0,
                unit: "kB",
                bar: bar.filter(|_| !subscribed),
            });
        }
    }
    section.remarks.push(
        "Tidegate proves an Ed25519 signature per connection (JWT); the peers let anybody in. `PSS MB` is here the growth per connection.".into(),
    );
    section
}

pub fn start(contender: &Contender, devices: usize) -> Result<(Server, Option<Devices>)> {
    match contender {
        Contender::Peer(peer) => Ok((peer.start(&[])?, None)),
        Contender::Tidegate { binary, .. } => {
            let (server, devices) = Gateway::prepare(binary, Setup { devices, ..Setup::default() })?.start()?;
            Ok((server, Some(devices)))
        }
    }
}

pub fn login(devices: Option<&Devices>, role: Role, index: usize) -> Result<Login> {
    let client_id = device_id(role, index);
    let password = devices.map(|devices| devices.jwt(role, index)).transpose()?;
    Ok(Login { credentials: password.map(|password| (client_id.clone(), password)), client_id })
}

pub fn topic(index: usize) -> String {
    format!("dev/{}/telemetry", device_id(Role::Sensor, index))
}

fn measure(options: &Options, load: &Load, server: &Server, devices: Option<&Devices>) -> Result<Sample> {
    let mut engine = Engine::new(load.pace, PAYLOAD_BYTES)?;
    for index in 0..load.subscribers {
        let filter = if load.pairs { topic(index) } else { "dev/+/telemetry".to_owned() };
        engine.add_subscriber(server.address, &login(devices, Role::Watcher, index)?, &filter, load.qos)?;
    }
    for index in 0..load.publishers {
        engine.add_publisher(server.address, &login(devices, Role::Sensor, index)?, &topic(index), load.qos)?;
    }
    engine.begin();
    engine.run(WARM_UP)?;
    engine.latency.clear();
    let (before, cpu, start) = (engine.counts(), server.process.cpu_seconds(), Instant::now());
    engine.run(Duration::from_secs_f64(options.seconds))?;
    let (after, cpu_after, seconds) = (engine.counts(), server.process.cpu_seconds(), start.elapsed().as_secs_f64());
    let (p99_us, pss_bytes) = (engine.latency.quantile_us(0.99), server.process.pss_bytes());
    engine.settle(Duration::from_millis(300), Duration::from_secs(5))?;
    let mut notes = Vec::new();
    let end = engine.counts();
    let fan_out = if load.pairs { 1 } else { load.subscribers as u64 };
    let never_came = (end.sent * fan_out).saturating_sub(end.delivered);
    if load.qos == 0 && never_came > 0 {
        notes.push(format!("{:.0} % not delivered", never_came as f64 * 100.0 / (end.sent * fan_out) as f64));
    }
    Ok(Sample {
        units: after.delivered - before.delivered,
        seconds,
        cpu_seconds: cpu_after - cpu,
        p99_us,
        pss_bytes: Some(pss_bytes),
        lost: (load.qos > 0).then(|| engine.lost()),
        notes,
    })
}

fn accept(server: &Server, devices: Option<&Devices>, count: usize, subscribed: bool) -> Result<Sample> {
    // Signing is the device's work: before the clock starts.
    let logins = (0..count).map(|index| login(devices, Role::Watcher, index)).collect::<Result<Vec<_>>>()?;
    // The first few make the server allocate what it has once.
    let (first, rest) = logins.split_at(count / 10);
    let mut streams =
        first.iter().map(|login| connect(server.address, login, subscribed)).collect::<Result<Vec<_>>>()?;
    let (memory, cpu, start) = (settled_pss(&server.process), server.process.cpu_seconds(), Instant::now());
    for login in rest {
        streams.push(connect(server.address, login, subscribed)?);
    }
    let (seconds, cpu_after) = (start.elapsed().as_secs_f64(), server.process.cpu_seconds());
    let grown = settled_pss(&server.process).saturating_sub(memory);
    Ok(Sample {
        units: rest.len() as u64,
        seconds,
        cpu_seconds: cpu_after - cpu,
        pss_bytes: Some(grown / rest.len().max(1) as u64),
        ..Sample::default()
    })
}

fn connect(server: SocketAddr, login: &Login, subscribed: bool) -> Result<std::net::TcpStream> {
    use std::io::Write;
    let mut stream = engine::open(server, login)?;
    if subscribed {
        stream.write_all(&wire::subscribe("dev/bench-00000/telemetry", 0))?;
        engine::answer(&mut stream)?;
    }
    Ok(stream)
}

fn settled_pss(process: &Process) -> u64 {
    thread::sleep(Duration::from_millis(500));
    process.pss_bytes()
}
