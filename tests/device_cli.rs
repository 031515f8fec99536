//! `tidegate device`, run as an operator runs it: the real binary, a temporary data directory, exit codes and output.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coap_lite::{MessageClass, MessageType, Packet, ResponseType};
use serde_json::Value;
use tidegate::identity::auth::SecretKey;
use tidegate::identity::auth::exchange::{ChallengeAnswer, SessionAnswer, TokenType};
use tidegate::identity::auth::keyfile::{public_to_pem, secret_from_text};
use tidegate::identity::{Channel, Config, Identity, Now};
use tidegate::message::{DeviceId, Protocol};

/// A folder with a data directory in it, and the command run in it.
struct Place(tempfile::TempDir);

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).unwrap();
        name.to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let output = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .current_dir(self.0.path())
            .args(["device", "--data-dir", "data"])
            .args(arguments)
            .env_remove("TIDEGATE_CONFIG")
            .output()
            .unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let ran = self.run(arguments);
        assert_eq!(ran.code, 0, "{arguments:?}: {}{}", ran.out, ran.err);
        ran.out
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[&["--json"], arguments].concat())).unwrap()
    }

    fn refused(&self, arguments: &[&str], code: i32, words: &str) {
        let ran = self.run(arguments);
        assert_eq!(ran.code, code, "{arguments:?}: {}{}", ran.out, ran.err);
        assert!(ran.err.contains(words), "{arguments:?}: {}", ran.err);
    }

    fn identity(&self) -> Identity {
        Identity::open(&self.path("data"), &Config::default()).unwrap()
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn hex_key(seed: u8) -> String {
    SecretKey::from_seed(&[seed; 32]).public().to_string()
}

#[test]
fn add_without_a_key_writes_one_and_prints_lines_to_run() {
    let place = Place::new();
    let out = place.ok(&["add", "sensor-1", "--attr", "site=north", "--attr", "floor=2"]);
    let key = fs::read_to_string(place.path("sensor-1.key")).unwrap();
    assert_eq!(mode(&place.path("sensor-1.key")), 0o600);
    assert_eq!(mode(&place.path("data/gateway.key")), 0o600);
    for words in ["role        sensor", "floor=2 site=north", "mosquitto_pub ", "curl ", "coap-client", "sensor-1.key"]
    {
        assert!(out.contains(words), "{words}: {out}");
    }
    let public = secret_from_text(&key).unwrap().public();
    assert!(out.contains(&public.key_id().to_string()));
    // The private half is in the file and nowhere else.
    let body = key.lines().nth(3).unwrap();
    assert!(body.starts_with("MC4CAQAwBQYDK2VwBCIEI"), "{key}");
    assert!(!out.contains(body));

    place.refused(&["add", "sensor-1"], 1, "device sensor-1 exists already");
    assert_eq!(fs::read_to_string(place.path("sensor-1.key")).unwrap(), key);
    place.write("sensor-2.key", "precious");
    place.refused(&["add", "sensor-2"], 1, "sensor-2.key exists already");
    assert_eq!(fs::read_to_string(place.path("sensor-2.key")).unwrap(), "precious");
    place.refused(&["show", "sensor-2"], 1, "there is no device sensor-2");
}

#[test]
fn add_takes_a_public_key_in_any_form_and_refuses_what_is_none() {
    let place = Place::new();
    let file = place.write("s.pub", &public_to_pem(&SecretKey::from_seed(&[1; 32]).public()));
    let json = place.json(&["add", "a", "--public-key", &file, "--role", "actuator"]);
    assert_eq!(json["keys"][0]["public_key"], hex_key(1));
    assert_eq!((json["role"].as_str(), json["key_file"].as_str()), (Some("actuator"), None));
    assert!(!place.path("a.key").exists());
    place.ok(&["add", "b", "--public-key", &hex_key(2)]);

    place.refused(&["add", "c", "--public-key", &hex_key(1)], 1, "belongs to device a already");
    place.refused(&["add", "c", "--public-key", &"00".repeat(32)], 1, "weak");
    place.refused(&["add", "c", "--public-key", "no-such-file"], 1, "neither a key nor a file");
    let private = place.write("p.key", "-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n");
    place.refused(&["add", "c", "--public-key", &private], 1, "a private key");
    place.refused(&["add", "a/b"], 1, "a device id is");
    place.refused(&["add", "c", "--role", "two words"], 1, "a role is");
    place.refused(&["add", "c", "--attr", "x"], 1, "KEY=VALUE");
    place.refused(&["add", "c", "--attr", "x=1", "--attr", "x=2"], 1, "twice");
    place.refused(&["add"], 2, "ID");
    assert_eq!(place.json(&["list"]).as_array().unwrap().len(), 2);
}

#[test]
fn a_running_gateway_sees_what_the_command_does_within_a_second_or_so() {
    let place = Place::new();
    place.ok(&["add", "s", "--public-key", &hex_key(1)]);
    let identity = place.identity();
    let id = DeviceId::parse("s").unwrap();
    let device = identity.device(&id).unwrap();
    let seen = |what: &str, holds: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    assert!(place.ok(&["revoke", "s"]).contains("revoked"));
    seen("revocation", &|| !identity.is_current(&device) && identity.device(&id).is_none());
    place.ok(&["enable", "s"]);
    seen("enabling", &|| identity.device(&id).is_some());
    place.ok(&["add", "t", "--public-key", &hex_key(2)]);
    seen("addition", &|| identity.device(&DeviceId::parse("t").unwrap()).is_some());
}

#[test]
fn keys_are_added_with_their_time_and_removed_by_their_id() {
    let place = Place::new();
    place.ok(&["add", "s", "--public-key", &hex_key(1)]);
    let json = place.json(&[
        "key",
        "add",
        "s",
        &hex_key(2),
        "--not-before",
        "2026-11-20",
        "--not-after",
        "2027-11-20T12:00:00Z",
    ]);
    let key = json["keys"].as_array().unwrap().iter().find(|key| key["public_key"] == hex_key(2)).unwrap();
    assert_eq!(
        (&key["not_before"], &key["not_after"]),
        (&"2026-11-20T00:00:00Z".into(), &"2027-11-20T12:00:00Z".into())
    );
    assert_eq!(json["generation"], 2);
    let key_id = key["key_id"].as_str().unwrap();
    let out = place.ok(&["key", "remove", "s", key_id]);
    assert!(out.contains("key removed"), "{out}");
    place.refused(&["key", "remove", "s", key_id], 1, "has no key");
    place.refused(&["key", "remove", "s", "xyz"], 1, "16 hex digits");
    place.refused(&["key", "add", "nobody", &hex_key(3)], 1, "there is no device nobody");
    place.refused(&["key", "add", "s", &hex_key(3), "--not-after", "soon"], 2, "2026-11-20");
    let backwards = ["key", "add", "s", &hex_key(3), "--not-before", "2027-01-01", "--not-after", "2026-01-01"];
    place.refused(&backwards, 1, "not later");
    let last = place.json(&["show", "s"])["keys"][0]["key_id"].as_str().unwrap().to_owned();
    assert!(place.ok(&["key", "remove", "s", &last]).contains("cannot log in"));
}

#[test]
fn list_filters_by_role_and_says_who_is_revoked() {
    let place = Place::new();
    assert!(place.ok(&["list"]).starts_with("no devices"));
    place.ok(&["add", "b", "--public-key", &hex_key(1)]);
    place.ok(&["add", "a", "--public-key", &hex_key(2), "--role", "admin"]);
    place.ok(&["revoke", "b"]);
    let out = place.ok(&["list"]);
    assert!(out.contains("2 devices, 1 revoked"), "{out}");
    assert!(out.find("a ").unwrap() < out.find("b ").unwrap());
    let json = place.json(&["list", "--role", "admin"]);
    assert_eq!(json.as_array().unwrap().len(), 1);
    assert_eq!(json[0]["id"], "a");
    place.refused(&["revoke", "x"], 1, "there is no device x");
}

#[test]
fn a_token_of_the_command_logs_in_once() {
    let place = Place::new();
    place.ok(&["add", "s"]);
    let identity = place.identity();
    let token = place.ok(&["token", "s", "--key", "s.key", "--ttl", "10m"]);
    let login = identity.login_jwt(Some("s"), "", token.trim().as_bytes(), Now::read()).unwrap();
    assert!((590..=600).contains(&login.lifetime.as_secs()), "{login:?}");
    assert!(identity.login_jwt(Some("s"), "", token.trim().as_bytes(), Now::read()).is_err());
    // A key file that says nothing of its gateway, and the ways to say it.
    let pem = fs::read_to_string(place.path("s.key")).unwrap();
    let bare = pem.split_once("-----BEGIN").unwrap().1;
    fs::write(place.path("bare.key"), format!("-----BEGIN{bare}")).unwrap();
    let gateway = identity.gateway_id_hex();
    for more in [vec![], vec!["--gateway", &gateway], vec!["--gateway", "data/gateway.pub"]] {
        let token = place.ok(&[&["token", "s", "--key", "bare.key"], more.as_slice()].concat());
        assert!(identity.login_jwt(Some("s"), "", token.trim().as_bytes(), Now::read()).is_ok(), "{more:?}");
    }
    // Far from any gateway.
    fs::create_dir(place.path("far")).unwrap();
    let far = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .current_dir(place.path("far"))
        .args(["device", "token", "s", "--key", "../bare.key"])
        .env_remove("TIDEGATE_CONFIG")
        .output()
        .unwrap();
    assert_eq!(far.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&far.stderr).contains("which gateway is it for?"), "{far:?}");
    place.refused(&["token", "s", "--key", "s.key", "--gateway", "x"], 1, "neither");
    place.refused(&["token", "s", "--key", "s.key", "--ttl", "25h"], 2, "1s to 24h");
    place.refused(&["token", "s", "--key", "no.key"], 1, "cannot read");
    place.refused(&["token", "s", "--key", "data/gateway.pub"], 1, "not an Ed25519 key");
}

// Import.

#[test]
fn a_thousand_devices_are_imported_at_once_with_keys_of_their_own() {
    let place = Place::new();
    let mut csv = "id,role,attr:site\n".to_owned();
    for n in 0..1000 {
        csv.push_str(&format!("sensor-{n},{},hall {}\n", if n % 10 == 0 { "actuator" } else { "" }, n % 7));
    }
    place.write("d.csv", &csv);
    place.refused(&["import", "d.csv"], 1, "1000 problems");
    assert!(place.ok(&["import", "d.csv", "--keys", "keys", "--dry-run"]).contains("would be added"));
    assert!(!place.path("keys").exists());
    let begun = Instant::now();
    assert!(place.ok(&["import", "d.csv", "--keys", "keys"]).contains("1000 devices added"));
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(fs::read_dir(place.path("keys")).unwrap().count(), 1000);
    assert_eq!((mode(&place.path("keys")), mode(&place.path("keys/sensor-7.key"))), (0o700, 0o600));
    let list = place.json(&["list"]);
    let actuators = list.as_array().unwrap().iter().filter(|device| device["role"] == "actuator").count();
    assert_eq!((list.as_array().unwrap().len(), actuators), (1000, 100));
    let token = place.ok(&["token", "sensor-7", "--key", "keys/sensor-7.key"]);
    assert!(place.identity().login_jwt(None, "sensor-7", token.trim().as_bytes(), Now::read()).is_ok());
}

#[test]
fn every_bad_line_of_an_import_is_reported_and_nothing_is_added() {
    let place = Place::new();
    place.ok(&["add", "old", "--public-key", &hex_key(1)]);
    let csv = format!(
        "id,role,public_key,not_before\nnew,,{},\nold,,{},\nb/c,,{},\nd,two words,{},\ne,,zz,\nf,,{},\nnew,,{},\ng,,{},soon\nh,\ni,,,\n",
        hex_key(2),
        hex_key(3),
        hex_key(4),
        hex_key(5),
        hex_key(1),
        hex_key(6),
        hex_key(7),
    );
    place.write("d.csv", &csv);
    let ran = place.run(&["import", "d.csv"]);
    assert_eq!(ran.code, 1);
    for (line, words) in [
        (3, "device old exists already"),
        (4, "a device id is"),
        (5, "a role is"),
        (6, "not an Ed25519 key"),
        (7, "belongs to device old already"),
        (8, "twice, first at 2"),
        (9, "not_before `soon`"),
        (10, "2 fields, and the first line names 4"),
        (11, "no public_key"),
    ] {
        let found = ran.err.lines().any(|text| text.starts_with(&format!("d.csv:{line}: ")) && text.contains(words));
        assert!(found, "{line} {words}: {}", ran.err);
    }
    assert!(ran.err.contains("9 problems in d.csv; nothing was added"), "{}", ran.err);
    assert_eq!(place.json(&["list"]).as_array().unwrap().len(), 1);
    let ran = place.run(&["--json", "import", "d.csv"]);
    let json: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((ran.code, json["problems"].as_array().unwrap().len()), (1, 9));
}

#[test]
fn json_is_imported_too_and_other_files_are_not() {
    let place = Place::new();
    let json = format!(
        r#"[{{"id":"a","role":"actuator","public_keys":["{}","{}"],"attributes":{{"k":"v"}}}},{{"id":"b","public_key":"{}"}}]"#,
        hex_key(1),
        hex_key(2),
        hex_key(3)
    );
    place.write("d.json", &json);
    assert!(place.ok(&["import", "d.json"]).contains("2 devices added"));
    let a = place.json(&["show", "a"]);
    assert_eq!((a["keys"].as_array().unwrap().len(), &a["attributes"]["k"]), (2, &"v".into()));
    place.refused(&["import", "d.json"], 1, "exists already");
    place.refused(&["import", "d.txt"], 1, "cannot read");
    place.write("d.txt", "x");
    place.refused(&["import", "d.txt"], 2, ".csv or a .json");
}

// What can be wrong with the files.

#[test]
fn a_damaged_registry_and_an_open_key_end_with_code_1_and_stay() {
    let place = Place::new();
    place.ok(&["add", "s", "--public-key", &hex_key(1)]);
    fs::set_permissions(place.path("data/gateway.key"), fs::Permissions::from_mode(0o644)).unwrap();
    place.refused(&["add", "t", "--public-key", &hex_key(2)], 1, "chmod 600");
    fs::set_permissions(place.path("data/gateway.key"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(place.path("data/registry.db"), [0x5a; 8192]).unwrap();
    place.refused(&["list"], 1, "damaged");
    assert_eq!(fs::read(place.path("data/registry.db")).unwrap(), [0x5a; 8192]);
    let ran = place.run(&["--json", "list"]);
    let json: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["ok"], false);
}

// Logging in over a wire, at a gateway that is our identity behind the thinnest of servers.

/// Answers HTTP requests, one a connection, until the test ends.
fn http_server(answer: impl Fn(&str, &[u8]) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let body_at = loop {
                let mut buffer = [0; 4096];
                let length = stream.read(&mut buffer).unwrap();
                request.extend_from_slice(&buffer[..length]);
                let text = String::from_utf8_lossy(&request).to_lowercase();
                if let Some(at) = text.find("\r\n\r\n") {
                    let length = text.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap();
                    if request.len() >= at + 4 + length.parse::<usize>().unwrap() {
                        break at + 4;
                    }
                }
            };
            let body = &request[body_at..];
            let path = String::from_utf8_lossy(&request).split(' ').nth(1).unwrap().to_owned();
            let answer = answer(&path, body);
            let (status, body) = answer.map_or(("401 Unauthorized", Vec::new()), |body| ("200 OK", body));
            write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len()).unwrap();
            stream.write_all(&body).unwrap();
        }
    });
    address
}

/// The gateway's side of the flow, under the prefix `/iot`.
fn http_gateway(identity: Arc<Identity>) -> SocketAddr {
    http_server(move |path, body| match path {
        "/iot/auth/challenge" => identity.http_challenge(body, Now::read()).ok(),
        "/iot/auth/session" => identity.http_session(body, &Channel::default(), Now::read()).ok(),
        other => panic!("{other}"),
    })
}

/// Answers CoAP requests; the first datagram of all is lost, so that a client has to retransmit.
fn coap_server(identity: Arc<Identity>) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        socket.recv_from(&mut buffer).unwrap();
        loop {
            let (length, peer) = socket.recv_from(&mut buffer).unwrap();
            let request = Packet::from_bytes(&buffer[..length]).unwrap();
            if request.header.code == MessageClass::Empty {
                continue;
            }
            let path: Vec<_> = request.get_option(coap_lite::CoapOption::UriPath).unwrap().iter().collect();
            let now = Now::read();
            let answer = match path[1].as_slice() {
                b"c" => {
                    identity.coap_challenge(&request.payload, peer, now).map(|c| (ResponseType::Content, c.to_vec()))
                }
                b"s" => identity.coap_session(&request.payload, peer, now).map(|body| (ResponseType::Changed, body)),
                other => panic!("{other:?}"),
            };
            let (code, payload) = answer.unwrap_or((ResponseType::Unauthorized, Vec::new()));
            let mut response = Packet::new();
            response.set_token(request.get_token().to_vec());
            response.header.code = MessageClass::Response(code);
            response.payload = payload;
            if code == ResponseType::Changed {
                // A separate response: first the bare acknowledgement, then the answer to be confirmed.
                let mut empty = Packet::new();
                empty.header.set_type(MessageType::Acknowledgement);
                empty.header.code = MessageClass::Empty;
                empty.header.message_id = request.header.message_id;
                socket.send_to(&empty.to_bytes().unwrap(), peer).unwrap();
                response.header.set_type(MessageType::Confirmable);
                response.header.message_id = 7;
            } else {
                response.header.set_type(MessageType::Acknowledgement);
                response.header.message_id = request.header.message_id;
            }
            socket.send_to(&response.to_bytes().unwrap(), peer).unwrap();
        }
    });
    address
}

#[test]
fn login_over_http_prints_a_token_that_works_there() {
    let place = Place::new();
    place.ok(&["add", "s"]);
    let identity = Arc::new(place.identity());
    let url = format!("http://{}/iot", http_gateway(Arc::clone(&identity)));
    let json = place.json(&["login", "s", "--key", "s.key", "--url", &url]);
    assert_eq!((&json["expires_in"], &json["gateway_verified"]), (&900.into(), &true.into()));
    let token = place.ok(&["login", "s", "--key", "s.key", "--url", &url]);
    let device = identity.verify_token(token.trim().as_bytes(), Protocol::Http, Now::read()).unwrap();
    assert_eq!(device.id.as_str(), "s");
    // By its id alone the gateway is named, not verified.
    let named = place.json(&["login", "s", "--key", "s.key", "--url", &url, "--gateway", &identity.gateway_id_hex()]);
    assert_eq!(named["gateway_verified"], false);

    place.refused(&["login", "t", "--key", "s.key", "--url", &url], 1, "refused the login (401");
    place.refused(&["login", "s", "--key", "s.key", "--url", &url, "--gateway", &"00".repeat(32)], 1, "belongs to");
    place.refused(&["login", "s", "--key", "s.key", "--url", "ftp://x"], 2, "http, https, coap");
    place.refused(&["login", "s", "--key", "s.key", "--url", "http://127.0.0.1:1/"], 75, "cannot reach");
}

#[test]
fn login_over_coap_survives_a_lost_datagram_and_a_separate_response() {
    let place = Place::new();
    place.ok(&["add", "s"]);
    let identity = Arc::new(place.identity());
    let url = format!("coap://{}", coap_server(Arc::clone(&identity)));
    let token = place.ok(&["login", "s", "--key", "s.key", "--url", &url]);
    assert!(identity.verify_token(token.trim().as_bytes(), Protocol::Coap, Now::read()).is_ok());
    assert!(identity.verify_token(token.trim().as_bytes(), Protocol::Http, Now::read()).is_err());
    place.refused(&["login", "t", "--key", "s.key", "--url", &url], 1, "refused the login (4.01");
    // Something that speaks no CoAP: the port is closed.
    place.refused(&["login", "s", "--key", "s.key", "--url", "coap://127.0.0.1:1"], 75, "cannot reach");
}

#[test]
fn an_impostor_that_says_yes_to_everything_is_found_out() {
    let place = Place::new();
    place.ok(&["add", "s"]);
    let gateway_id = place.identity().gateway().id;
    let forged_by = SecretKey::from_seed(&[66; 32]);
    let url = format!(
        "http://{}",
        http_server(move |path, _| {
            let challenge = ChallengeAnswer { challenge: [1; 38], gateway_id, expires_in: 60 };
            let session = SessionAnswer {
                access_token: [1; 43],
                token_type: TokenType::Bearer,
                expires_in: 900,
                gateway_signature: Some(forged_by.sign(b"anything")),
            };
            let is_first = path == "/auth/challenge";
            let answer = if is_first { serde_json::to_vec(&challenge) } else { serde_json::to_vec(&session) };
            Some(answer.unwrap())
        })
    );
    place.refused(&["login", "s", "--key", "s.key", "--url", &url], 1, "did not prove");
}

#[test]
fn a_proof_for_one_gateway_is_of_no_use_at_another() {
    let place = Place::new();
    place.ok(&["add", "s"]);
    // Another gateway with the device in its registry; over CoAP it need not say who it is.
    let other = Place::new();
    let key = secret_from_text(&fs::read_to_string(place.path("s.key")).unwrap()).unwrap();
    other.ok(&["add", "s", "--public-key", &key.public().to_string()]);
    let url = format!("coap://{}", coap_server(Arc::new(other.identity())));
    place.refused(&["login", "s", "--key", "s.key", "--url", &url], 1, "refused the login");
}
