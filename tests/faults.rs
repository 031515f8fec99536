//! What goes wrong around a gateway: a backend that misbehaves, a disk that is full or read-only, damaged files, wrong permissions, a taken
//! port. Nothing acknowledged is lost, devices are told the truth, and the operator gets one clear line and the right exit code.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use support::cloud::{Cloud, Mood};
use support::coap::{self, CoapClient};
use support::http::HttpClient;
use support::{Device, Gateway, Wanted, http, wait_until};

/// Exit codes of the operator's contract.
const INPUT: i32 = 1;
const CANNOT_NOW: i32 = 75;

fn post(gateway: &Gateway, bearer: &str, body: &[u8]) -> http::Response {
    http::once(gateway.plain, "POST", "/telemetry", &[("Authorization", bearer)], body).unwrap()
}

fn bearer(gateway: &Gateway, device: &Device) -> String {
    format!("Bearer {}", gateway.bearer(device))
}

/// Publishes while the backend is in `mood`, then lets it recover: everything accepted arrives, whole and under one id each.
fn nothing_is_lost_while(mood: Mood) {
    const MESSAGES: usize = 300;
    let cloud = Cloud::start();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let bearer = bearer(&gateway, &gateway.add_device("d"));
    cloud.set(mood);
    let before = gateway.resident_kb();
    let mut client = HttpClient::connect(gateway.plain).unwrap();
    let mut expected = Vec::new();
    for n in 0..MESSAGES {
        let body = format!("{n} {}", "x".repeat(1000));
        let response = client.request("POST", "/telemetry", &[("Authorization", &bearer)], body.as_bytes()).unwrap();
        assert_eq!(response.status, 202, "the spool takes it whatever the backend does: {response:?}");
        expected.push(body);
    }
    let tried = cloud.requests();
    if !matches!(mood, Mood::Down) {
        wait_until("a delivery is tried", || cloud.requests() > tried || tried > 0);
    }
    assert!(gateway.is_ready(), "a backend in trouble is no reason to turn devices away");
    let grown = gateway.resident_kb().saturating_sub(before);
    assert!(grown < 16 * 1024, "memory grew by {grown} kB");
    cloud.set(Mood::Well);
    wait_until("everything arrives", || cloud.by_body().len() >= MESSAGES);
    let arrived = cloud.by_body();
    for body in &expected {
        let ids = arrived.get(body).unwrap_or_else(|| panic!("lost: {}", &body[..8]));
        assert!(ids.iter().all(|id| *id == ids[0]), "one message, several ids: {ids:?}");
    }
    assert_eq!(arrived.len(), MESSAGES, "something arrived that nobody sent");
}

#[test]
fn nothing_is_lost_while_the_backend_is_down() {
    nothing_is_lost_while(Mood::Down);
}

#[test]
fn nothing_is_lost_while_the_backend_is_slow() {
    nothing_is_lost_while(Mood::Slow(700));
}

#[test]
fn nothing_is_lost_while_the_backend_answers_500() {
    nothing_is_lost_while(Mood::Status(500));
}

#[test]
fn nothing_is_lost_while_the_backend_resets_connections() {
    nothing_is_lost_while(Mood::Reset);
}

#[test]
fn nothing_is_lost_while_the_backend_returns_half_a_body() {
    nothing_is_lost_while(Mood::HalfBody);
}

#[test]
fn nothing_is_lost_while_the_backend_stores_and_forgets_to_answer() {
    nothing_is_lost_while(Mood::StoreThenClose);
}

#[test]
fn one_of_two_backends_is_enough() {
    let (first, second) = (Cloud::start(), Cloud::start());
    let gateway = Gateway::start(&Wanted { cloud: vec![first.url(), second.url()], ..Wanted::default() });
    let bearer = bearer(&gateway, &gateway.add_device("d"));
    first.set(Mood::Down);
    for n in 0..50 {
        assert_eq!(post(&gateway, &bearer, format!("{n}").as_bytes()).status, 202);
    }
    wait_until("the second gets everything", || second.by_body().len() == 50);
}

#[test]
fn a_full_queue_says_so_in_every_protocol_and_keeps_what_it_acknowledged() {
    let cloud = Cloud::start();
    let forward = "queue = { bytes_max = \"256KiB\", when_full = \"refuse\" }".to_owned();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], forward, ..Wanted::default() });
    let devices = ["h", "m", "c"].map(|id| gateway.add_device(id));
    cloud.set(Mood::Down);
    let bearer = bearer(&gateway, &devices[0]);
    let mut client = HttpClient::connect(gateway.plain).unwrap();
    let mut accepted = 0;
    let refused = loop {
        let body = format!("{accepted} {}", "x".repeat(2000));
        let response = client.request("POST", "/telemetry", &[("Authorization", &bearer)], body.as_bytes()).unwrap();
        if response.status != 202 {
            break response;
        }
        accepted += 1;
        assert!(accepted < 1000, "a queue of 256 KiB took 2 MB");
    };
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    assert_eq!(refused.header("content-type"), Some("application/problem+json"));

    let mut mqtt = gateway.mqtt(&devices[1], true);
    assert_eq!(mqtt.publish_and_wait("t", &[b'x'; 2000]).unwrap(), 0x97);
    let mut client = CoapClient::connect(gateway.coap).unwrap();
    let token = gateway.coap_token(&mut client, &devices[2]);
    let answer = client.request(coap::POST, "t", &[&format!("t={token}")], &[b'x'; 900]).unwrap();
    assert_eq!(answer.code, (5, 3), "{answer:?}");
    assert!(answer.options.iter().any(|(number, _)| *number == 14), "Max-Age is missing: {answer:?}");

    cloud.set(Mood::Well);
    wait_until("what was acknowledged arrives", || cloud.by_body().len() >= accepted);
    wait_until("there is room again", || post(&gateway, &bearer, b"again").status == 202);
}

#[test]
fn what_a_full_queue_drops_stands_in_the_ledger() {
    let cloud = Cloud::start();
    let forward = "queue = { bytes_max = \"256KiB\", when_full = \"drop_oldest\" }".to_owned();
    let gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], forward, ..Wanted::default() });
    let bearer = bearer(&gateway, &gateway.add_device("d"));
    cloud.set(Mood::Down);
    for n in 0..400 {
        let body = format!("{n} {}", "x".repeat(2000));
        assert_eq!(post(&gateway, &bearer, body.as_bytes()).status, 202);
    }
    let ledger = gateway.command_ok(&["spool", "ledger", "--json"]);
    let ledger: serde_json::Value = serde_json::from_str(&ledger).unwrap();
    let rows = ledger.as_array().unwrap();
    assert!(rows.iter().all(|row| row["sink"] == "everything" && row["reason"] == "queue_full"), "{ledger}");
    let noted: u64 = rows.iter().map(|row| row["records"].as_u64().unwrap()).sum();
    cloud.set(Mood::Well);
    let newest = format!("399 {}", "x".repeat(2000));
    wait_until("the newest arrives", || cloud.by_body().contains_key(&newest));
    let missing = 400 - cloud.by_body().len() as u64;
    assert!(missing > 0, "a queue of 256 KiB kept 800 kB");
    // A batch that was on its way when it was dropped may have arrived all the same.
    assert!(missing <= noted, "{missing} are missing, {noted} are noted: {ledger}");
}

/// A wrapper that gives the gateway a mount namespace of its own, in which `script` runs first with the data folder as `$DATA`.
fn in_namespace(script: &str, data: &Path) -> Vec<String> {
    let root = fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap() == 0;
    let flags = if root { "-m" } else { "-rm" };
    let script = format!("DATA='{}'; {script} && exec \"$@\"", data.display());
    ["unshare", flags, "sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
}

#[test]
fn a_full_disk_refuses_and_loses_nothing() {
    let cloud = Cloud::start();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    let wrapper = in_namespace("mount -t tmpfs -o size=3m,mode=700 none \"$DATA\"", &data);
    // Readiness asks for the room of one more log, which by default is more than this disk has.
    let extra = "\n[spool]\nwal_bytes_max = 262144\n".to_owned();
    let wanted = Wanted { cloud: vec![cloud.url()], wrapper, data_dir: Some(data.clone()), extra, ..Wanted::default() };
    let gateway = Gateway::start(&wanted);
    // The registry lives in the namespace, so the device is added there, too.
    let pid = gateway.pid().to_string();
    let config = gateway.path("tidegate.toml");
    let key = gateway.path("d.key");
    let added = support::program(
        "util-linux",
        &[
            "nsenter",
            "-m",
            "-t",
            &pid,
            "--wd=/",
            env!("CARGO_BIN_EXE_tidegate"),
            "device",
            "add",
            "d",
            "--role",
            "sensor",
            "--out",
            folder.path().to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
        ],
    );
    assert!(added.status.success(), "{}", support::said(&added));
    fs::rename(folder.path().join("d.key"), &key).unwrap();
    let token = support::program(
        "util-linux",
        &[
            "nsenter",
            "-m",
            "-t",
            &pid,
            "--wd=/",
            env!("CARGO_BIN_EXE_tidegate"),
            "device",
            "token",
            "d",
            "--key",
            key.to_str().unwrap(),
            "--config",
            config.to_str().unwrap(),
        ],
    );
    assert!(token.status.success(), "{}", support::said(&token));
    let mut mqtt =
        support::mqtt::MqttClient::connect(gateway.plain, "d", support::stdout(&token).trim(), true).unwrap();

    cloud.set(Mood::Down);
    let mut accepted = Vec::new();
    let from = Instant::now();
    loop {
        assert!(from.elapsed() < Duration::from_secs(60), "3 MB are not full after {} messages", accepted.len());
        let body = format!("{} {}", accepted.len(), "x".repeat(8000));
        match mqtt.publish_and_wait("t", body.as_bytes()).unwrap() {
            0 | 0x10 => accepted.push(body),
            0x97 => break,
            other => panic!("{other:#04x}"),
        }
        assert!(accepted.len() < 1000, "3 MB hold 8 MB");
    }
    assert!(!accepted.is_empty());
    wait_until("readiness tells of it", || !gateway.is_ready());
    cloud.set(Mood::Well);
    wait_until("everything acknowledged arrives", || {
        let arrived = cloud.by_body();
        accepted.iter().all(|body| arrived.contains_key(body))
    });
    // Delivered rows make room, in a file that is already there.
    wait_until("there is room again", || matches!(mqtt.publish_and_wait("t", b"again").unwrap(), 0 | 0x10));
    wait_until("readiness recovers", || gateway.is_ready());
}

/// Starts what cannot start; returns the exit code and what was said.
fn stopped(gateway: &mut Gateway) -> (i32, String) {
    gateway.spawn();
    let status = gateway.wait();
    (status.code().unwrap_or(-1), gateway.log())
}

#[test]
fn a_read_only_data_directory_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    let wrapper = in_namespace("mount --bind \"$DATA\" \"$DATA\" && mount -o remount,ro,bind \"$DATA\"", &data);
    let mut gateway = Gateway::prepare(&Wanted { wrapper, data_dir: Some(data.clone()), ..Wanted::default() });
    let (code, said) = stopped(&mut gateway);
    assert!([INPUT, CANNOT_NOW].contains(&code), "{code}: {said}");
    assert!(said.contains(data.to_str().unwrap()), "{said}");
    assert!(said.to_lowercase().contains("read-only"), "{said}");
}

#[test]
fn a_data_directory_that_is_a_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    fs::write(&data, "a file").unwrap();
    let mut gateway = Gateway::prepare(&Wanted { data_dir: Some(data.clone()), ..Wanted::default() });
    let (code, said) = stopped(&mut gateway);
    assert!([INPUT, CANNOT_NOW].contains(&code), "{code}: {said}");
    assert!(said.contains(data.to_str().unwrap()), "{said}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    for taken in ["plain", "coap", "admin"] {
        let mut gateway = Gateway::prepare(&Wanted::default());
        let address = match taken {
            "plain" => gateway.plain,
            "coap" => gateway.coap,
            _ => gateway.admin,
        };
        let (_tcp, _udp);
        if taken == "coap" {
            _udp = std::net::UdpSocket::bind(address).unwrap();
        } else {
            _tcp = TcpListener::bind(address).unwrap();
        }
        let (code, said) = stopped(&mut gateway);
        assert_eq!(code, CANNOT_NOW, "{said}");
        assert!(said.contains(&address.to_string()), "{said}");
    }
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let mut gateway = Gateway::start(&Wanted::default());
    assert!(gateway.terminate().success());
    let keys: Vec<_> = fs::read_dir(gateway.path("data"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "key"))
        .collect();
    assert!(!keys.is_empty(), "the gateway made no key");
    for key in &keys {
        assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600, "{}", key.display());
        fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let (code, said) = stopped(&mut gateway);
    assert_eq!(code, INPUT, "{said}");
    assert!(said.contains(keys[0].to_str().unwrap()) && said.contains("600"), "{said}");
}

#[test]
fn a_damaged_registry_or_spool_is_named_and_left_as_it_is() {
    let cloud = Cloud::start();
    let mut gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    gateway.add_device("d");
    assert!(gateway.terminate().success());
    let stores: Vec<_> = fs::read_dir(gateway.path("data"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| fs::read(p).is_ok_and(|bytes| bytes.starts_with(b"SQLite format 3\0")))
        .collect();
    assert!(stores.len() >= 2, "registry and spool: {stores:?}");
    // Which tokens were used already is known for as long as they live: that is put aside, said, and begun anew.
    let (replay, stores): (Vec<_>, Vec<_>) =
        stores.into_iter().partition(|path| path.file_name().is_some_and(|name| name == "replay.db"));
    for store in &stores {
        let good = fs::read(store).unwrap();
        let bad = vec![0xA5; good.len().max(4096)];
        fs::write(store, &bad).unwrap();
        let (code, said) = stopped(&mut gateway);
        assert!([INPUT, CANNOT_NOW].contains(&code), "{code}: {said}");
        assert!(said.contains(store.to_str().unwrap()), "{} is not named: {said}", store.display());
        assert!(fs::read(store).unwrap() == bad, "evidence was destroyed: {}", store.display());
        fs::write(store, good).unwrap();
    }
    for store in &replay {
        fs::write(store, "damaged").unwrap();
    }
    gateway.run();
    for store in &replay {
        assert!(gateway.log().contains(store.to_str().unwrap()), "{}", gateway.log());
        let name = store.file_name().unwrap().to_str().unwrap();
        let aside = fs::read_dir(gateway.path("data")).unwrap().map(|entry| entry.unwrap()).any(|entry| {
            let other = entry.file_name().into_string().unwrap();
            other.starts_with(name) && fs::read(entry.path()).is_ok_and(|bytes| bytes == b"damaged")
        });
        assert!(aside, "evidence was destroyed: {}", store.display());
    }
}

#[test]
fn a_wrong_configuration_is_refused_with_every_problem_at_once() {
    let mut gateway = Gateway::prepare(&Wanted { limits: "packet_bytes_maximum = 1\n".into(), ..Wanted::default() });
    let file = gateway.path("tidegate.toml");
    let text = fs::read_to_string(&file).unwrap().replace("workers = 2", "workers = 0");
    fs::write(&file, text).unwrap();
    let (code, said) = stopped(&mut gateway);
    assert_eq!(code, INPUT, "{said}");
    for named in ["tidegate.toml", "packet_bytes_maximum", "workers"] {
        assert!(said.contains(named), "{named} is not named: {said}");
    }
}

#[test]
fn a_drain_finishes_what_was_acknowledged() {
    let cloud = Cloud::start();
    let mut gateway = Gateway::start(&Wanted { cloud: vec![cloud.url()], ..Wanted::default() });
    let bearer = bearer(&gateway, &gateway.add_device("d"));
    cloud.set(Mood::Down);
    for n in 0..100 {
        assert_eq!(post(&gateway, &bearer, format!("{n}").as_bytes()).status, 202);
    }
    assert!(gateway.terminate().success(), "{}", gateway.log());
    cloud.set(Mood::Well);
    gateway.run();
    wait_until("what was queued arrives after the restart", || cloud.by_body().len() == 100);
}
