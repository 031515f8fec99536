//! Malformed, truncated, oversized and hostile input on every port: a protocol-correct refusal or a close, a counter, and the next
//! client is served. Silence and slowness end at a deadline.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use support::coap::{self, CoapClient};
use support::mqtt::{self, MqttClient, PINGRESP};
use support::{Device, Gateway, Wanted, http, wait_until};

struct Subject {
    gateway: Gateway,
    device: Device,
}

impl Subject {
    fn start() -> Subject {
        let limits = "packet_bytes_max = 65536\n".to_owned();
        let gateway = Gateway::start(&Wanted { limits, ..Wanted::default() });
        let device = gateway.add_device("honest");
        Subject { gateway, device }
    }

    /// The next client of each protocol is served.
    fn still_serves(&self) {
        let mut client = self.gateway.mqtt(&self.device, true);
        client.send(0xC0, &[]).unwrap();
        assert_eq!(client.read_packet().unwrap().first, PINGRESP);
        let bearer = format!("Bearer {}", self.gateway.bearer(&self.device));
        let headers = [("Authorization", bearer.as_str())];
        let response = http::once(self.gateway.plain, "POST", "/telemetry", &headers, b"fine").unwrap();
        assert_eq!(response.status, 202, "{response:?}");
        let mut client = CoapClient::connect(self.gateway.coap).unwrap();
        assert_eq!(client.request(coap::GET, ".well-known/core", &[], b"").map(|a| a.code.0 < 6).ok(), Some(true));
        assert!(self.gateway.is_ready());
    }
}

/// Sends bytes and reads until the gateway closes; panics if it does not within `patience`.
fn until_closed(to: SocketAddr, bytes: &[u8], patience: Duration) -> Vec<u8> {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(patience)).unwrap();
    // The gateway may close while we are still sending.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        Err(e) => panic!("still open after {patience:?}: {e}; first bytes {:02x?}", &bytes[..bytes.len().min(16)]),
    }
    answer
}

const SOON: Duration = Duration::from_secs(20);

#[test]
fn bytes_of_no_protocol_are_closed_and_counted() {
    let subject = Subject::start();
    let plain = subject.gateway.plain;
    let before = subject.gateway.metric("tidegate_connections_refused_total", "");
    for bytes in [
        &b"\0\0\0\0\0\0\0\0\0\0\0\0"[..],
        b"\xff\xff\xff\xff\xff\xff\xff\xff",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x03\x00\x00\x00",
        b"HELO mail\r\n",
    ] {
        until_closed(plain, bytes, SOON);
    }
    subject.still_serves();
    assert!(subject.gateway.metric("tidegate_connections_refused_total", "") >= before + 4.0, "not counted");
}

#[test]
fn silence_and_a_slow_drip_end_at_the_deadline() {
    let subject = Subject::start();
    let plain = subject.gateway.plain;
    let silent = thread::spawn(move || until_closed(plain, b"", SOON));
    let half_a_connect = thread::spawn(move || until_closed(plain, b"\x10\x20\x00\x04MQ", SOON));
    let half_a_request =
        thread::spawn(move || until_closed(plain, b"POST /telemetry HTTP/1.1\r\nHost: x\r\nX-", SOON * 3));
    // One byte a second for ever is no way round a deadline.
    let from = Instant::now();
    let mut drip = TcpStream::connect(plain).unwrap();
    for byte in
        b"GET /aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa".iter().cycle()
    {
        if drip.write_all(&[*byte]).is_err() {
            break;
        }
        assert!(from.elapsed() < Duration::from_secs(90), "a drip is served for ever");
        thread::sleep(Duration::from_millis(250));
    }
    silent.join().unwrap();
    half_a_connect.join().unwrap();
    half_a_request.join().unwrap();
    subject.still_serves();
}

#[test]
fn broken_mqtt_is_answered_as_mqtt_says() {
    let subject = Subject::start();
    let plain = subject.gateway.plain;
    // A packet before CONNECT: closed without a word.
    until_closed(plain, b"\x30\x05\x00\x01aaa", SOON);
    // An unknown level gets a CONNACK that says so ([MQTT-3.1.2-2]).
    let mut body = mqtt::connect_body("honest", "honest", "x", false);
    body[6] = 77;
    let mut client = MqttClient::open(plain, false).unwrap();
    client.send(0x10, &body).unwrap();
    let answer = client.read_packet().unwrap();
    assert_eq!(answer.first, mqtt::CONNACK);
    assert_ne!(answer.body[1], 0);
    // A remaining length of five bytes, and one beyond the limit.
    until_closed(plain, b"\x10\xff\xff\xff\xff\x7f\x00\x04MQTT", SOON);
    until_closed(plain, b"\x10\xff\xff\xff\x7f\x00\x04MQTT\x05\xc2\x00\x1e\x00", SOON);

    for (what, first, packet, reason) in [
        ("a topic with a wildcard", 0x30, &b"\x00\x03a/#\x00x"[..], Some(&[0x81, 0x82, 0x90][..])),
        ("a topic that is not UTF-8", 0x30, b"\x00\x02\xff\xfe\x00x", Some(&[0x81, 0x82, 0x90])),
        ("QoS 3", 0x36, b"\x00\x01a\x00\x01\x00x", Some(&[0x81, 0x82])),
        ("packet id 0", 0x32, b"\x00\x01a\x00\x00\x00x", Some(&[0x81, 0x82])),
        ("a second CONNECT", 0x10, b"\x00\x04MQTT\x05\x02\x00\x1e\x00\x00\x01a", Some(&[0x81, 0x82])),
        ("a server's packet", 0x20, b"\x00\x00\x00", Some(&[0x81, 0x82])),
        ("reserved flags", 0x83, b"\x00\x01\x00\x00\x01a\x00", Some(&[0x81, 0x82])),
        ("an empty SUBSCRIBE", 0x82, b"\x00\x01\x00", Some(&[0x81, 0x82])),
        ("a truncated property", 0x30, b"\x00\x01a\x05\x26\x00\x09k", Some(&[0x81, 0x82])),
    ] {
        let mut client = subject.gateway.mqtt(&subject.device, true);
        client.send(first, packet).unwrap();
        let answer = client.read_packet();
        if let (Ok(answer), Some(reasons)) = (&answer, reason) {
            assert_eq!(answer.first, 0xE0, "{what}: {answer:?}");
            let code = answer.body.first().copied().unwrap_or(0);
            assert!(reasons.contains(&code), "{what}: DISCONNECT {code:#04x}");
        }
        let mut rest = Vec::new();
        client.stream.set_read_timeout(Some(SOON)).unwrap();
        let closed = client.stream.read_to_end(&mut rest);
        assert!(closed.is_ok_and(|_| rest.is_empty()) || answer.is_err(), "{what}: not closed");
    }
    // A packet over the limit: 0x95.
    let mut client = subject.gateway.mqtt(&subject.device, true);
    let mut large = mqtt::text("t");
    large.extend([0, 1, 0]);
    large.resize(70_000, b'x');
    let _ = client.send(0x32, &large);
    if let Ok(answer) = client.read_packet() {
        assert_eq!((answer.first, answer.body[0]), (0xE0, 0x95), "{answer:?}");
    }
    subject.still_serves();
}

#[test]
fn broken_http_is_answered_as_http_says() {
    let subject = Subject::start();
    let plain = subject.gateway.plain;
    let status = |bytes: &[u8]| {
        let answer = until_closed(plain, bytes, SOON * 3);
        let text = String::from_utf8_lossy(&answer).into_owned();
        text.split_whitespace().nth(1).and_then(|s| s.parse::<u16>().ok()).unwrap_or(0)
    };
    // 0: closed without an answer, which RFC 9112 allows for what cannot be parsed.
    for (what, bytes, allowed) in [
        ("no such version", &b"GET / HTTP/9.9\r\nHost: x\r\n\r\n"[..], &[0, 400, 505][..]),
        ("a space in a header name", b"GET / HTTP/1.1\r\nHost: x\r\nA B: c\r\n\r\n", &[0, 400]),
        ("two lengths", b"POST /telemetry HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", &[0, 400]),
        (
            "length and chunks (request smuggling)",
            b"POST /telemetry HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
            &[0, 400, 401],
        ),
        ("a NUL in a header", b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n", &[0, 400]),
        ("no host", b"GET /telemetry HTTP/1.1\r\nConnection: close\r\n\r\n", &[0, 400, 401, 404, 405]),
        ("TRACE", b"TRACE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", &[400, 401, 403, 404, 405, 501]),
    ] {
        let status = status(bytes);
        assert!(allowed.contains(&status), "{what}: {status}");
    }
    let long = format!("GET / HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n", "a".repeat(1 << 20));
    assert!([0, 400, 431].contains(&status(long.as_bytes())), "a header of a megabyte");
    // Oversized body: told so, before or after reading it, and not stored.
    let bearer = format!("Bearer {}", subject.gateway.bearer(&subject.device));
    let response =
        http::once(plain, "POST", "/telemetry", &[("Authorization", &bearer)], &vec![b'x'; 300_000]).unwrap();
    assert_eq!(response.status, 413, "{response:?}");
    // Paths that try to be another's.
    for path in
        ["/topics/dev/other/telemetry", "/topics/dev/honest/../other/telemetry", "/topics/dev%2Fother%2Ftelemetry"]
    {
        let response = http::once(plain, "POST", path, &[("Authorization", &bearer)], b"x").unwrap();
        assert!([400, 403, 404].contains(&response.status), "{path}: {}", response.status);
    }
    subject.still_serves();
}

#[test]
fn broken_coap_is_answered_as_coap_says() {
    let subject = Subject::start();
    let client = CoapClient::connect(subject.gateway.coap).unwrap();
    client.set_timeout(Duration::from_millis(300));
    // Not CoAP at all: silence.
    for bytes in [&b""[..], b"\x40", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"] {
        client.send(bytes).unwrap();
        if let Ok(answer) = client.receive() {
            assert_eq!(answer.first().map(|b| b >> 4), Some(7), "only RST may answer: {answer:02x?}");
        }
    }
    // A confirmable message with a format error: RST with its id (RFC 7252 section 4.2).
    client.set_timeout(Duration::from_secs(5));
    let malformed: [&[u8]; 5] = [
        // A token of the reserved length, one shorter than it says (RFC 8974 section 2.1), one whose length is cut off.
        b"\x4f\x01\x12\x34aaaaaaaaa",
        b"\x49\x01\x12\x34aaaaaaaa",
        b"\x4e\x01\x12\x34\x00",
        b"\x40\x01\x12\x34\xff",
        b"\x40\x01\x12\x34\xb9ps",
    ];
    for bytes in malformed {
        client.send(bytes).unwrap();
        assert_eq!(client.receive().unwrap(), [0x70, 0, 0x12, 0x34], "{bytes:02x?}");
    }
    // CoAP ping.
    client.send(b"\x40\x00\x43\x21").unwrap();
    assert_eq!(client.receive().unwrap(), [0x70, 0, 0x43, 0x21]);
    // An unknown critical option: 4.02.
    client.send(b"\x40\x01\x00\x07\x91z").unwrap();
    let answer = client.receive().unwrap();
    assert_eq!((answer[0] >> 4, answer[1]), (6, 0x82), "{answer:02x?}");
    // Segments that cannot be another's path.
    let mut client = CoapClient::connect(subject.gateway.coap).unwrap();
    let token = subject.gateway.coap_token(&mut client, &subject.device);
    let query = format!("t={token}");
    for path in ["ps/dev/other/telemetry", "ps/../dev/other/telemetry"] {
        let answer = client.request(coap::PUT, path, &[&query], b"x").unwrap();
        assert_eq!(answer.code.0, 4, "{path}: {answer:?}");
    }
    subject.still_serves();
}

#[test]
fn a_stranger_gets_no_large_answer_over_udp() {
    let subject = Subject::start();
    let client = CoapClient::connect(subject.gateway.coap).unwrap();
    client.set_timeout(Duration::from_secs(2));
    // 3 x the question or 136 bytes, whichever is more (RFC 9175 section 2.4).
    for question in
        [&b"\x40\x01\x00\x01\xbb.well-known\x04core"[..], b"\x40\x01\x00\x02\xb2ps", b"\x40\x02\x00\x03\xb4auth\x01c"]
    {
        client.send(question).unwrap();
        if let Ok(answer) = client.receive() {
            assert!(answer.len() <= (3 * question.len()).max(136), "{} bytes for {}", answer.len(), question.len());
        }
    }
    subject.still_serves();
}

#[test]
fn a_flood_of_connections_is_bounded_and_passes() {
    let limits = "connections_per_address_max = 50\n".to_owned();
    let gateway = Gateway::start(&Wanted { limits, ..Wanted::default() });
    let device = gateway.add_device("honest");
    let before = gateway.resident_kb();
    let crowd: Vec<TcpStream> = (0..200).filter_map(|_| TcpStream::connect(gateway.plain).ok()).collect();
    let grown = gateway.resident_kb().saturating_sub(before);
    assert!(grown < 8 * 1024, "200 idle connections cost {grown} kB");
    drop(crowd);
    let subject = Subject { gateway, device };
    wait_until("there is room again", || {
        let jwt = subject.gateway.jwt(&subject.device);
        MqttClient::connect(subject.gateway.plain, "honest", &jwt, false).is_ok()
    });
    subject.still_serves();
}

#[test]
fn the_admin_port_gives_nothing_to_strangers() {
    let subject = Subject::start();
    let admin = subject.gateway.admin;
    for path in ["/api/v1/status", "/api/v1/devices", "/api/v1/sessions"] {
        for headers in [&[][..], &[("Authorization", "Bearer wrong")]] {
            let response = http::once(admin, "GET", path, headers, b"").unwrap();
            assert!([401, 404].contains(&response.status), "{path}: {}", response.status);
        }
    }
    for bytes in [&b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00"[..], b"\xff\xff\xff\xff\r\n\r\n"] {
        until_closed(admin, bytes, SOON * 3);
    }
    subject.still_serves();
}

#[test]
fn noise_on_every_port_changes_nothing() {
    let subject = Subject::start();
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let udp = CoapClient::connect(subject.gateway.coap).unwrap();
    let beginnings: [&[u8]; 5] =
        [b"", b"\x10\x20\x00\x04MQTT\x05", b"GET / HTTP/1.1\r\n", b"\x00\xe1", b"\x16\x03\x01\x02\x00\x01"];
    for round in 0..300 {
        let length = usize::try_from(random() % 400).unwrap();
        let mut bytes = beginnings[round % beginnings.len()].to_vec();
        bytes.extend((0..length).map(|_| random().to_be_bytes()[0]));
        let _ = udp.send(&bytes);
        let Ok(mut stream) = TcpStream::connect(subject.gateway.plain) else { continue };
        let _ = stream.write_all(&bytes);
    }
    subject.still_serves();
}
