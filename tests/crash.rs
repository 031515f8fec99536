//! `kill -9` at any moment, under load from all three protocols: every acknowledged `disk` message reaches the backend, and what
//! arrives twice carries the same id. `TIDEGATE_CRASHES=200 cargo test --test crash -- --nocapture` is the long form; 15 by default.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use support::cloud::{Cloud, Mood};
use support::coap::{self, CoapClient};
use support::http::HttpClient;
use support::mqtt::{MqttClient, PUBACK};
use support::{Device, Gateway, Wanted, wait_until};

/// Payloads that the gateway has acknowledged.
#[derive(Default)]
struct Ledger {
    acknowledged: Mutex<BTreeSet<String>>,
    sent: AtomicU64,
}

impl Ledger {
    fn acknowledge(&self, payload: &str) {
        self.acknowledged.lock().unwrap().insert(payload.to_owned());
    }

    fn next(&self, protocol: &str) -> String {
        format!("{protocol}-{}", self.sent.fetch_add(1, Ordering::Relaxed))
    }

    fn by(&self, protocol: &str) -> usize {
        self.acknowledged.lock().unwrap().iter().filter(|p| p.starts_with(protocol)).count()
    }
}

const PROTOCOLS: [&str; 3] = ["mqtt", "http", "coap"];

#[test]
fn no_acknowledged_message_is_lost_when_the_gateway_is_killed() {
    let crashes: u64 = std::env::var("TIDEGATE_CRASHES").map_or(15, |n| n.parse().unwrap());
    let cloud = Cloud::start();
    // A backlog is replayed at 500 messages a second unless told otherwise; a fast machine leaves one of a hundred thousand.
    let forward = "queue = { replay_rate_max = \"100000/s\" }".to_owned();
    let wanted = Wanted { cloud: vec![cloud.url()], forward, ..Wanted::default() };
    let mut gateway = Gateway::start(&wanted);
    let devices: Vec<Device> = ["by-mqtt", "by-http", "by-coap"].map(|id| gateway.add_device(id)).into();
    let ledger = Arc::new(Ledger::default());
    let mut seed = 0x2545_F491_4F6C_DD1D_u64;
    let mut stored_over_restart = 0;

    for crash in 0..crashes {
        // Every third life begins with the backend away, so that the spool itself is what survives.
        cloud.set(if crash % 3 == 1 { Mood::Status(503) } else { Mood::Well });
        let over = Arc::new(AtomicBool::new(false));
        let before = PROTOCOLS.map(|p| ledger.by(p));
        let clients = start_load(&gateway, &devices, &ledger, &over);
        // The load has to be under way on all three before the blow; the moment of the blow is random from then on.
        wait_until("clients of all protocols are being served", || {
            PROTOCOLS.iter().zip(before).all(|(p, before)| ledger.by(p) > before)
        });
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        thread::sleep(Duration::from_micros(seed >> 44));
        gateway.kill();
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().unwrap();
        }
        let arrived = cloud.by_body();
        stored_over_restart += ledger.acknowledged.lock().unwrap().iter().filter(|p| !arrived.contains_key(*p)).count();
        gateway.run();
    }

    cloud.set(Mood::Well);
    let acknowledged = ledger.acknowledged.lock().unwrap().clone();
    // However much there is, it has time as long as it moves.
    let mut arrived = BTreeMap::new();
    let mut last_progress = Instant::now();
    while last_progress.elapsed() < Duration::from_secs(30) {
        let before = arrived.len();
        arrived = cloud.by_body();
        if acknowledged.iter().all(|p| arrived.contains_key(p)) {
            break;
        }
        if arrived.len() > before {
            last_progress = Instant::now();
        }
        thread::sleep(Duration::from_millis(200));
    }
    let lost: Vec<&String> = acknowledged.iter().filter(|p| !arrived.contains_key(*p)).collect();
    let by = |protocol: &str| ledger.by(protocol);
    let twice = arrived.values().filter(|ids| ids.len() > 1).count();
    println!(
        "{crashes} kills: {} sent, {} acknowledged (mqtt {}, http {}, coap {}), {} arrived, {stored_over_restart} of the \
         acknowledged were only on disk at a kill, {twice} arrived more than once, {} lost",
        ledger.sent.load(Ordering::Relaxed),
        acknowledged.len(),
        by("mqtt"),
        by("http"),
        by("coap"),
        arrived.len(),
        lost.len()
    );
    assert!(lost.is_empty(), "lost: {lost:?}\n{}", gateway.log());
    for protocol in PROTOCOLS {
        assert!(by(protocol) > 0, "{protocol} was never acknowledged, so nothing was tested");
    }
    let mut bodies_of: BTreeMap<&String, BTreeSet<&String>> = BTreeMap::new();
    for (body, ids) in &arrived {
        let different: BTreeSet<&String> = ids.iter().collect();
        assert_eq!(different.len(), 1, "{body} arrived under several ids: {ids:?}");
        bodies_of.entry(&ids[0]).or_default().insert(body);
    }
    // A receiver that deduplicates by id must not lose a message either.
    for (id, bodies) in bodies_of {
        assert_eq!(bodies.len(), 1, "{id} was given to several messages: {bodies:?}");
    }
}

/// Logs all three devices in, then lets each send as fast as it is acknowledged.
fn start_load(
    gateway: &Gateway,
    devices: &[Device],
    ledger: &Arc<Ledger>,
    over: &Arc<AtomicBool>,
) -> Vec<JoinHandle<()>> {
    let mqtt = gateway.mqtt(&devices[0], true);
    let http = HttpClient::connect(gateway.plain).unwrap();
    let bearer = format!("Bearer {}", gateway.bearer(&devices[1]));
    let mut coap = CoapClient::connect(gateway.coap).unwrap();
    let query = format!("t={}", gateway.coap_token(&mut coap, &devices[2]));
    coap.set_timeout(Duration::from_secs(2));
    let (l, o) = (ledger.clone(), over.clone());
    let by_mqtt = thread::spawn(move || mqtt_load(mqtt, &l, &o));
    let (l, o) = (ledger.clone(), over.clone());
    let by_http = thread::spawn(move || http_load(http, &bearer, &l, &o));
    let (l, o) = (ledger.clone(), over.clone());
    let by_coap = thread::spawn(move || coap_load(coap, &query, &l, &o));
    vec![by_mqtt, by_http, by_coap]
}

/// QoS 1 with a window, until the gateway is gone.
fn mqtt_load(mut client: MqttClient, ledger: &Ledger, over: &AtomicBool) {
    const WINDOW: usize = 16;
    let mut waiting: BTreeMap<[u8; 2], String> = BTreeMap::new();
    while !over.load(Ordering::Relaxed) {
        while waiting.len() < WINDOW {
            let payload = ledger.next("mqtt");
            let Ok(id) = client.publish("t", payload.as_bytes()) else { return };
            waiting.insert(id.to_be_bytes(), payload);
        }
        let Ok(packet) = client.read_packet() else { return };
        if packet.first == PUBACK {
            let payload = waiting.remove(&[packet.body[0], packet.body[1]]).unwrap();
            // 0x10: no local subscriber, which is right here.
            if packet.body.get(2).is_none_or(|reason| [0, 0x10].contains(reason)) {
                ledger.acknowledge(&payload);
            }
        }
    }
}

fn http_load(mut client: HttpClient, bearer: &str, ledger: &Ledger, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let payload = ledger.next("http");
        match client.request("POST", "/event/count", &[("Authorization", bearer)], payload.as_bytes()) {
            Ok(response) if response.status == 202 => ledger.acknowledge(&payload),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

/// Confirmable, never repeated by the client: a repetition to the next life would be a new message with a new id.
fn coap_load(mut client: CoapClient, query: &str, ledger: &Ledger, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let payload = ledger.next("coap");
        match client.request(coap::POST, "t", &[query], payload.as_bytes()) {
            Ok(answer) if answer.code == (2, 4) => ledger.acknowledge(&payload),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}
