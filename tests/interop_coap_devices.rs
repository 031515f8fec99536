//! A CoAP device of aiocoap's that registers itself, read by curl, `mosquitto_sub` and libcoap's coap-client through the real binary.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use support::coap::CoapClient;
use support::{Gateway, Running, Wanted, program, python, said, stdout, wait_until};

const RULES: &str = r#"
[[rule]]
name = "who may use the lamp"
who = ["device:reader"]
do = ["GET", "PUT"]
on = ["/hc/lamp-1/**", "/hc/reader/*"]

[[rule]]
name = "who may see the lamp"
who = ["device:reader"]
do = ["subscribe", "read"]
on = ["dev/lamp-1/coap/#"]
"#;

struct Curl {
    status: u16,
    headers: String,
    body: String,
}

/// curl of a path, with the options of curl's command line.
fn curl(gateway: &Gateway, bearer: &str, path: &str, options: &[&str]) -> Curl {
    let (authorization, url) = (format!("Authorization: Bearer {bearer}"), format!("http://{}{path}", gateway.plain));
    let words = [&["curl", "-s", "-i", "-m", "25", "-H", &authorization, &url], options].concat();
    let output = program("Debian package curl", &words);
    let text = stdout(&output);
    let (headers, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{url}: {}", said(&output)));
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    Curl { status, headers: headers.to_ascii_lowercase(), body: body.to_owned() }
}

#[test]
fn a_device_of_aiocoap_registers_itself_and_is_read_over_http_and_mqtt() {
    let limits = "device_request_timeout_ms = 3000\n".to_owned();
    let mut gateway = Gateway::prepare(&Wanted { limits, ..Wanted::default() });
    OpenOptions::new().append(true).open(gateway.path("policy.toml")).unwrap().write_all(RULES.as_bytes()).unwrap();
    gateway.run();
    let (lamp, reader) = (gateway.add_device("lamp-1"), gateway.add_device("reader"));
    let bearer = gateway.bearer(&reader);
    assert_eq!(curl(&gateway, &bearer, "/hc/lamp-1/lamp", &[]).status, 404, "not registered yet");

    let token = gateway.coap_token(&mut CoapClient::connect(gateway.coap).unwrap(), &lamp);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/coap_lamp.py");
    let mut child = Command::new(python())
        .args([script, &gateway.coap.port().to_string(), "lamp-1", &token])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("PyPI aiocoap");
    let _input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let serving = Running(child);
    assert_eq!(lines.next().expect("the device registers").unwrap(), "registered rd/lamp-1");

    let temp = curl(&gateway, &bearer, "/hc/lamp-1/sensors/temp", &[]);
    assert_eq!((temp.status, temp.body.as_str()), (200, "21.5"), "{}", temp.headers);
    assert!(temp.headers.contains("content-type: text/plain") && temp.headers.contains("etag: \"0102\""));
    assert!(temp.headers.contains("max-age=60"), "{}", temp.headers);
    let cached = ["-H", "If-None-Match: \"0102\""];
    let unchanged = curl(&gateway, &bearer, "/hc/lamp-1/sensors/temp", &cached);
    assert_eq!((unchanged.status, unchanged.body.as_str()), (304, ""));
    // The default mapping of RFC 8075, and JSON both ways.
    let put = ["-X", "PUT", "-H", "Content-Type: application/json", "-d", "{\"on\":true}"];
    assert_eq!(curl(&gateway, &bearer, "/hc/coap://lamp-1/lamp", &put).status, 204);
    let lit = curl(&gateway, &bearer, "/hc/lamp-1/lamp", &[]);
    assert_eq!((lit.status, lit.body.as_str()), (200, "{\"on\":true}"));
    assert!(lit.headers.contains("content-type: application/json"), "{}", lit.headers);
    assert_eq!(curl(&gateway, &bearer, "/hc/lamp-1/lamp", &["-I"]).body, "");
    // In blocks, both ways.
    let long = curl(&gateway, &bearer, "/hc/lamp-1/long", &[]);
    assert!(long.status == 200 && long.body == "long ".repeat(1000), "{}", long.headers);
    let text = "0123456789".repeat(400);
    let put = ["-X", "PUT", "-H", "Content-Type: text/plain", "-d", &text];
    let changed = curl(&gateway, &bearer, "/hc/lamp-1/lamp", &put);
    assert_eq!(changed.status, 204, "{}", changed.body);
    assert!(curl(&gateway, &bearer, "/hc/lamp-1/lamp", &[]).body == text);

    for (path, status) in [
        ("/hc/lamp-1/nothing", 404),
        ("/hc/lamp-1/silent", 504),
        ("/hc/reader/x", 404),
        ("/hc/other/x", 403),
        ("/hc/lamp-1/a%2Fb", 403),
    ] {
        let refused = curl(&gateway, &bearer, path, &[]);
        assert_eq!(refused.status, status, "{path}: {}", refused.body);
    }
    let unknown = curl(&gateway, &bearer, "/hc/lamp-1/lamp", &["-X", "PUT", "-H", "Content-Type: text/x", "-d", "x"]);
    assert_eq!(unknown.status, 415);
    assert_eq!(curl(&gateway, "stranger", "/hc/lamp-1/lamp", &[]).status, 401);
    let other = gateway.bearer(&gateway.add_device("other"));
    assert_eq!(curl(&gateway, &other, "/hc/lamp-1/lamp", &[]).status, 403);

    // Over MQTT: what is observed as it changes, the rest as it was when the device registered.
    let (host, port) = (gateway.plain.ip().to_string(), gateway.plain.port().to_string());
    let jwt = gateway.jwt(&reader);
    let mut child = Command::new("mosquitto_sub")
        .args(["-h", &host, "-p", &port, "-V", "5", "-i", "reader", "-u", "reader", "-P", &jwt])
        .args(["-t", "dev/lamp-1/coap/#", "-q", "1", "-F", "%t %p", "-W", "25"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("Debian package mosquitto-clients");
    let mut messages = BufReader::new(child.stdout.take().unwrap()).lines().map(|line| line.unwrap());
    let _subscriber = Running(child);
    let retained: Vec<String> = messages.by_ref().take(3).collect();
    for expected in ["dev/lamp-1/coap/sensors/temp 21.5", "dev/lamp-1/coap/lamp {\"on\":false}"] {
        assert!(retained.iter().any(|message| message == expected), "{expected}: {retained:?}");
    }
    assert_eq!(
        curl(
            &gateway,
            &bearer,
            "/hc/lamp-1/sensors/temp",
            &["-X", "PUT", "-d", "22.5", "-H", "Content-Type: text/plain"]
        )
        .status,
        204
    );
    assert_eq!(messages.next().expect("a notification"), "dev/lamp-1/coap/sensors/temp 22.5");
    let mirrored = curl(&gateway, &bearer, "/topics/dev/lamp-1/coap/sensors/temp", &[]);
    assert_eq!((mirrored.status, mirrored.body.as_str()), (200, "22.5"));

    // The directory itself, for who may see the links.
    let look_up = |token: &str, query: &str| {
        let url = format!("coap://{}/rd-lookup/{query}&t={token}", gateway.coap);
        let output = program("Debian package libcoap3-bin", &["coap-client-notls", "-B", "10", "-m", "get", &url]);
        stdout(&output).trim().to_owned()
    };
    let mut client = CoapClient::connect(gateway.coap).unwrap();
    let reader_token = gateway.coap_token(&mut client, &reader);
    let found = look_up(&reader_token, "res?rt=temperature");
    assert!(
        found.starts_with("<coap://127.0.0.1:") && found.ends_with("/sensors/temp>;rt=\"temperature\";ct=\"0\";obs"),
        "{found}"
    );
    let endpoints = look_up(&reader_token, "ep?et=lamp");
    assert!(endpoints.starts_with("</rd/lamp-1>;ep=\"lamp-1\";base=\"coap://127.0.0.1:"), "{endpoints}");
    let other = gateway.add_device("nosy");
    assert_eq!(look_up(&gateway.coap_token(&mut client, &other), "res?rt=*"), "", "policy shows it nothing");

    // What was asked of the device has been counted: one of its resources is observed, and one request found it silent.
    let counted = |outcome: &str| gateway.metric("tidegate_device_requests_total", &format!("\"{outcome}\""));
    assert_eq!(["timed_out", "reset", "full"].map(counted), [1.0, 0.0, 0.0], "{}", gateway.metrics());
    assert!(counted("answered") >= 10.0, "{}", gateway.metrics());
    assert_eq!(gateway.metric("tidegate_device_request_seconds_count", ""), counted("answered"));
    assert_eq!(gateway.metric("tidegate_device_observations_open", ""), 1.0);

    drop(serving);
    wait_until("a device that has gone is waited for in vain", || {
        curl(&gateway, &bearer, "/hc/lamp-1/lamp", &[]).status == 504
    });
}
