//! `QoS` 1 into the disk class while the backend is down, then `kill -9`: what was acknowledged has to arrive all the same.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::Value;

use crate::Result;
use crate::compare::{Contender, Options};
use crate::gateway::{Gateway, Role, Setup};
use crate::mqtt::engine::{Engine, Ledger, Pace, stamp};
use crate::mqtt::{login, topic};
use crate::origin::request_length;
use crate::process::free_address;
use crate::report::{Fact, Ordering, Sample, Section};

const CLIENTS: usize = 64;
const WINDOW: u32 = 64;
const PAYLOAD_BYTES: usize = 200;
/// How long nothing new may arrive before the rest counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(options: &Options) -> Section {
    let mut section = Section::new("Durable: QoS 1, disk class, backend down, kill -9", "acknowledged message");
    let contenders: Vec<_> = options.own().collect();
    let load = format!("{CLIENTS} clients, window {WINDOW}, {PAYLOAD_BYTES}-byte payload");
    let mut written = Vec::new();
    options.compare(&mut section, &load, &contenders, &[], |contender| {
        let Contender::Tidegate { label, binary } = contender else {
            unreachable!("only builds of Tidegate take part")
        };
        let (sample, factor) = measure(options, binary)?;
        written.push((label.clone(), factor));
        Ok(sample)
    });
    let measured: Vec<_> =
        section.rows.iter().filter_map(|row| Some((row.server.clone(), row.outcome.as_ref().ok()?.clone()))).collect();
    for (server, figures) in measured {
        let mut fact = |what: &str, value, unit, bar| {
            section.facts.push(Fact { what: what.into(), server: server.clone(), value, unit, bar: Some(bar) });
        };
        let factors: Vec<f64> =
            written.iter().filter(|(label, _)| *label == server).map(|(_, factor)| *factor).collect();
        let worst = factors.iter().copied().fold(0.0, f64::max);
        fact("acknowledged after fsync", figures.per_second, "messages/s", (Ordering::AtLeast, 20_000.0));
        fact("bytes written per byte of payload", worst, "", (Ordering::AtMost, 3.0));
        fact(
            "acknowledged and lost after kill -9",
            figures.lost.unwrap_or_default() as f64,
            "messages",
            (Ordering::AtMost, 0.0),
        );
    }
    section
}

fn measure(options: &Options, binary: &std::path::Path) -> Result<(Sample, f64)> {
    let cloud = free_address()?;
    let tables = format!(
        "[[upstream]]\nname = \"cloud\"\nkind = \"http\"\nendpoints = [{{ url = \"http://{cloud}\" }}]\n\n[[forward]]\nname = \"telemetry\"\n\
         topics = [\"dev/+/telemetry/#\"]\nto = \"cloud\"\npath = \"/ingest\"\ndelivery = \"disk\"\n\
         batch = {{ records_max = 500, linger_ms = 50, format = \"ndjson\" }}\n\
         queue = {{ bytes_max = \"4GiB\", when_full = \"refuse\", replay_rate_max = \"1000000/s burst 1000000\" }}\n"
    );
    let gateway = Gateway::prepare(binary, Setup { devices: CLIENTS, tables: &tables, ..Setup::default() })?;
    let (mut process, address, devices) = gateway.launch()?;
    let mut engine = Engine::new(Pace::Window(WINDOW), PAYLOAD_BYTES)?;
    for index in 0..CLIENTS {
        engine.add_publisher(address, &login(Some(&devices), Role::Sensor, index)?, &topic(index), 1)?;
    }
    engine.run(Duration::from_millis(500))?;
    let (before, cpu, written, start) =
        (engine.counts(), process.cpu_seconds(), process.written_bytes(), Instant::now());
    engine.run(Duration::from_secs_f64(options.seconds))?;
    let (after, seconds) = (engine.counts(), start.elapsed().as_secs_f64());
    let (cpu_seconds, written) = (process.cpu_seconds() - cpu, process.written_bytes() - written);
    let pss_bytes = process.pss_bytes();
    // Under full load.
    process.kill_now();
    engine.drain();
    let units = after.acknowledged - before.acknowledged;
    let factor = written as f64 / (units.max(1) * PAYLOAD_BYTES as u64) as f64;

    let backend = Backend::start(cloud, CLIENTS)?;
    let (_process, ..) = gateway.launch()?;
    let replay = Instant::now();
    let (mut last, mut since) = (0, Instant::now());
    let lost = loop {
        thread::sleep(Duration::from_millis(200));
        let (arrived, missing) = backend.compare(engine.ledgers());
        if missing == 0 || since.elapsed() > PATIENCE {
            break missing;
        }
        if arrived != last {
            (last, since) = (arrived, Instant::now());
        }
    };
    let total = engine.counts().acknowledged;
    let note = format!(
        "{total} acknowledged, delivered {:.1} s after the restart, {} twice",
        replay.elapsed().as_secs_f64(),
        backend.twice()
    );
    let sample = Sample {
        units,
        seconds,
        cpu_seconds,
        p99_us: None,
        pss_bytes: Some(pss_bytes),
        lost: Some(lost),
        notes: vec![note],
    };
    Ok((sample, factor))
}

/// The cloud: takes batches of newline-delimited CloudEvents and remembers which message arrived.
struct Backend {
    arrivals: Arc<Mutex<Arrivals>>,
}

struct Arrivals {
    ledgers: Vec<Ledger>,
    count: u64,
    twice: u64,
}

impl Backend {
    fn start(address: SocketAddr, publishers: usize) -> Result<Self> {
        let ledgers = (0..publishers).map(|_| Ledger::default()).collect();
        let arrivals = Arc::new(Mutex::new(Arrivals { ledgers, count: 0, twice: 0 }));
        let listener = TcpListener::bind(address)?;
        let shared = arrivals.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let arrivals = shared.clone();
                thread::spawn(move || serve(stream, &arrivals));
            }
        });
        Ok(Backend { arrivals })
    }

    /// How many arrived, and how many that were acknowledged did not.
    fn compare(&self, acknowledged: &[Ledger]) -> (u64, u64) {
        let Ok(arrivals) = self.arrivals.lock() else { return (0, u64::MAX) };
        let missing = acknowledged
            .iter()
            .zip(&arrivals.ledgers)
            .map(|(mine, theirs)| mine.acknowledged.without(&theirs.arrived))
            .sum();
        (arrivals.count, missing)
    }

    fn twice(&self) -> u64 {
        self.arrivals.lock().map_or(0, |arrivals| arrivals.twice)
    }
}

fn serve(mut stream: TcpStream, arrivals: &Mutex<Arrivals>) {
    let mut input = Vec::new();
    let mut buffer = vec![0; 256 << 10];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        input.extend_from_slice(&buffer[..count]);
        while let Some((length, is_get)) = request_length(&input) {
            if !is_get && let Ok(mut arrivals) = arrivals.lock() {
                input[..length].split(|byte| *byte == b'\n').for_each(|line| arrivals.take(line));
            }
            input.drain(..length);
            if stream.write_all(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n").is_err() {
                return;
            }
        }
    }
}

impl Arrivals {
    /// A line of the head is no JSON and passes by.
    fn take(&mut self, line: &[u8]) {
        if !line.starts_with(b"{") {
            return;
        }
        let Ok(event) = serde_json::from_slice::<Value>(line) else { return };
        let Some((_, sender, number)) = payload(&event).as_deref().and_then(stamp) else { return };
        let Some(ledger) = self.ledgers.get_mut(sender) else { return };
        self.count += 1;
        if !ledger.arrived.set(number) {
            self.twice += 1;
        }
    }
}

/// Of an event in JSON. A stamp is binary, but some happen to be UTF-8, and those travel as text.
fn payload(event: &Value) -> Option<Vec<u8>> {
    if let Some(encoded) = event["data_base64"].as_str() {
        return base64::engine::general_purpose::STANDARD.decode(encoded).ok();
    }
    Some(event["data"].as_str()?.as_bytes().to_vec())
}
