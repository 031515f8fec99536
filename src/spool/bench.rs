//! `cargo test --release --lib spool::bench -- --ignored --nocapture`: durable acknowledgements a second and bytes written, beside the bare disk.

use std::io::{Seek, Write};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::*;
use crate::message::{DeviceId, MessageId, Origin, Protocol, Qos, Topic};

struct Next(std::sync::mpsc::Sender<u64>);

impl Completion for Next {
    fn complete(&self, token: u64, outcome: Result<Receipt, Reject>) {
        assert!(outcome.is_ok(), "{outcome:?}");
        let _ = self.0.send(token);
    }
}

fn written_bytes() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).unwrap().parse().unwrap()
}

/// Syncs of 20 kB a second: what no group commit can exceed.
fn bare_syncs_per_sec(dir: &Path) -> f64 {
    let mut file = std::fs::File::create(dir.join("bare")).unwrap();
    file.write_all(&vec![0; 4 << 20]).unwrap();
    file.sync_all().unwrap();
    let start = Instant::now();
    let mut syncs = 0;
    while start.elapsed() < Duration::from_secs(1) {
        file.seek(std::io::SeekFrom::Start(syncs * 20_000 % (3 << 20))).unwrap();
        file.write_all(&[1; 20_000]).unwrap();
        file.sync_all().unwrap();
        syncs += 1;
    }
    syncs as f64 / start.elapsed().as_secs_f64()
}

fn run(clients: u64, seconds: u64, drained: bool) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let syncs = bare_syncs_per_sec(dir.path());
    let sink = SinkConfig { name: "a".into(), delivery: Delivery::Disk, queue: QueueConfig::default() };
    let spool = Spool::open(dir.path(), Config::default(), vec![sink]).unwrap();
    let id = spool.sink("a").unwrap();
    let (sender, answers) = channel();
    let completion: Arc<dyn Completion> = Arc::new(Next(sender));
    let messages: Vec<Message> = (0..clients)
        .map(|client| {
            let device = format!("sensor-{client:04}");
            Message {
                id: MessageId::default(),
                ingested_ms: 1_795_000_000_000,
                topic: Topic::parse(&format!("dev/{device}/telemetry")).unwrap(),
                payload: vec![b'x'; 200].into(),
                qos: Qos::AtLeastOnce,
                retain: false,
                origin: Origin { device: DeviceId::parse(&device).ok(), protocol: Protocol::Mqtt, session: None },
                properties: None,
            }
        })
        .collect();
    let user_bytes = messages[0].topic.as_str().len() + messages[0].payload.len();
    let reading = drained.then(|| {
        let mut reader = spool.reader(id);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                while let Some(batch) = reader.next_batch(500, 262_144, Duration::from_millis(20)).await {
                    reader.done(batch.cursor);
                }
            });
        })
    });
    let (start, written) = (Instant::now(), written_bytes());
    let send = |client: u64, seq: u64| {
        let mut message = messages[client as usize].clone();
        message.id.seq = seq;
        spool.append(&message, &[id], Some((completion.clone(), client)), 1).unwrap();
    };
    (0..clients).for_each(|client| send(client, client));
    let mut acks = 0u64;
    while start.elapsed() < Duration::from_secs(seconds) {
        let client = answers.recv().unwrap();
        acks += 1;
        send(client, clients + acks);
    }
    let elapsed = start.elapsed().as_secs_f64();
    spool.close();
    let written = written_bytes() - written;
    let rows: u32 = rusqlite::Connection::open(dir.path().join("spool.db"))
        .unwrap()
        .query_row("SELECT count(*) FROM queue_1", [], |row| row.get(0))
        .unwrap();
    if let Some(reading) = reading {
        reading.join().unwrap();
    }
    println!(
        "{clients} clients, {}: {:.0} acks/s ({:.2} of {clients} x {syncs:.0} bare syncs/s), {:.2} bytes written per user byte, {rows} rows left",
        if drained { "drained" } else { "uplink down" },
        acks as f64 / elapsed,
        acks as f64 / elapsed / (syncs * clients as f64),
        written as f64 / (acks * user_bytes as u64) as f64,
    );
}

#[test]
#[ignore = "measures; run by hand"]
fn durable_acknowledgements() {
    for _ in 0..2 {
        run(64, 5, false);
        run(64, 5, true);
    }
    run(1, 3, false);
    run(1000, 5, false);
}
