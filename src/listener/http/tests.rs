//! The adapter over in-memory pipes, with a real gateway, registry and spool behind it.

use std::collections::HashMap;
use std::net::SocketAddr;

use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tidegate_auth::exchange::{ChallengeAnswer, SessionAnswer};
use tidegate_auth::{CbType, Proto, Transcript, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

mod cached;
mod connect;
mod http2;
mod jwt;
mod relay;
mod routes;
mod smuggling;

use super::*;
use crate::gateway::{Client, Mailbox, Open, RouteConfig, Routes, SendRetained, SubscribeOptions};
use crate::identity::Registry;
use crate::listener::tests::fixture::{Plan, conn, emit, jwt, key, random};
use crate::message::{DeviceId, Protocol, Qos};

const RULES: &str = r##"[
    {"name": "own space", "who": ["role:sensor"], "do": ["publish", "subscribe", "read"], "on": ["dev/{device}/#"]},
    {"name": "operators", "who": ["role:operator"], "do": ["publish", "subscribe", "read", "command"], "on": ["dev/#", "plant/#"]},
    {"name": "not there", "effect": "deny", "who": ["anyone"], "do": ["publish"], "on": ["plant/forbidden"]},
    {"name": "its own files", "who": ["role:sensor"], "do": ["GET", "POST"], "on": ["/api/{device}/*"], "bytes_max": 8},
    {"name": "small", "who": ["role:operator"], "do": ["publish"], "on": ["small/#"], "bytes_max": 4},
    {"name": "one way out", "who": ["role:sensor"], "do": ["CONNECT"], "on": ["a.example:443"]},
    {"name": "maps", "who": ["role:sensor"], "do": ["GET"], "on": ["/maps/*"]}
]"##;

struct Fixture {
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    exchange: Option<Arc<dyn Exchange>>,
    shutdown: CancellationToken,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Fixture::with(|_| {}, &[])
    }

    /// `sinks` are topic patterns of class `disk`.
    fn with(adjust: impl FnOnce(&mut Limits), sinks: &[&str]) -> Self {
        Fixture::routed(adjust, sinks, Value::Array(vec![]), None)
    }

    fn routed(
        adjust: impl FnOnce(&mut Limits),
        sinks: &[&str],
        routes: Value,
        exchange: Option<Arc<dyn Exchange>>,
    ) -> Self {
        let routes: Vec<RouteConfig> = serde_json::from_value(routes).unwrap();
        let mut plan = Plan { rules: RULES, sinks, routes: Routes::new(&routes), ..Plan::default() };
        adjust(&mut plan.limits);
        let (gateway, folder) = plan.start();
        let shared = Arc::new(Shared::new(&gateway, None));
        Fixture { gateway, shared, exchange, shutdown: CancellationToken::new(), folder }
    }

    fn context(&self) -> Context {
        Context { gateway: self.gateway.clone(), shared: self.shared.clone(), exchange: self.exchange.clone() }
    }

    /// A new HTTP/1.1 connection.
    fn connect(&self) -> Peer {
        let (near, far) = tokio::io::duplex(1 << 16);
        let serving = serve_http1(far, BytesMut::new(), conn(None), self.context(), self.shutdown.clone());
        let served = tokio::spawn(async move { serving.await.is_some() });
        Peer { io: near, read: Vec::new(), served }
    }

    async fn token(&self, id: &str) -> String {
        let form = oauth_form(&jwt(&self.gateway, id, 600));
        let answer = self.connect().ask("POST", "/oauth2/token", "", form.as_bytes()).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let answer: SessionAnswer = serde_json::from_slice(&answer.body).unwrap();
        text::base64url(&answer.access_token)
    }

    /// A subscriber without HTTP, to see what arrives.
    async fn subscriber(&self, id: &str, filter: &str) -> Client {
        let device = self.gateway.identity.device(&DeviceId::parse(id).unwrap());
        let open = Open {
            device,
            protocol: Protocol::Mqtt,
            peer: SocketAddr::from(([192, 0, 2, 9], 1)),
            client: "subscriber",
            clean: true,
            mailbox: Mailbox::Own,
        };
        let mut client = self.gateway.open(open, Instant::now()).await.unwrap().client;
        let options = SubscribeOptions { qos: Qos::AtLeastOnce, ..Default::default() };
        self.gateway.subscribe(&mut client, filter, 0, options, SendRetained::Never, Instant::now()).unwrap();
        client
    }

    fn emit(&self, topic: &str, payload: &'static str, retain: bool) {
        emit(&self.gateway, topic, payload, retain);
    }
}

fn oauth_form(jwt: &str) -> String {
    format!(
        "grant_type=client_credentials&client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer\
         &client_assertion={jwt}"
    )
}

fn bearer(token: &str) -> String {
    format!("authorization: Bearer {token}\r\n")
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A client that writes bytes as they are given.
struct Peer {
    io: DuplexStream,
    read: Vec<u8>,
    served: tokio::task::JoinHandle<bool>,
}

impl Peer {
    async fn send(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) {
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: gateway\r\n{headers}content-length: {}\r\n\r\n", body.len());
        self.io.write_all(head.as_bytes()).await.unwrap();
        self.io.write_all(body).await.unwrap();
    }

    async fn ask(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
        self.send(method, path, headers, body).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Answer {
        let head = self.until(b"\r\n\r\n").await;
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let pairs = lines.filter_map(|line| line.split_once(": "));
        let headers: HashMap<String, String> = pairs.map(|(n, v)| (n.to_lowercase(), v.to_owned())).collect();
        let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        while self.read.len() < length {
            self.fill().await;
        }
        let body = self.read.drain(..length).collect();
        Answer { status, headers, body }
    }

    async fn until(&mut self, end: &[u8]) -> Vec<u8> {
        loop {
            if let Some(at) = self.read.windows(end.len()).position(|window| window == end) {
                return self.read.drain(..at + end.len()).collect();
            }
            self.fill().await;
        }
    }

    async fn fill(&mut self) {
        assert!(self.io.read_buf(&mut self.read).await.unwrap() > 0, "closed: {}", self.read.escape_ascii());
    }

    async fn is_closed(&mut self) -> bool {
        self.io.read_to_end(&mut self.read).await.is_ok()
    }
}

#[tokio::test]
async fn a_stranger_learns_nothing_but_no() {
    let fixture = Fixture::new();
    let mut peer = fixture.connect();
    for (method, path) in [
        ("POST", "/telemetry"),
        ("GET", "/telemetry"),
        ("GET", "/topics/dev/a/state"),
        ("POST", "/topics/%zz"),
        ("GET", "/command"),
        ("PUT", "/state"),
    ] {
        for headers in ["", "authorization: Bearer AAAA\r\n", "authorization: Basic YTpi\r\n"] {
            let answer = peer.ask(method, path, headers, b"").await;
            assert_eq!(answer.status, 401, "{method} {path}");
            assert_eq!(answer.headers["www-authenticate"], "Bearer realm=\"tidegate\"");
            assert_eq!(answer.json(), json!({ "type": "about:blank", "title": "Unauthorized", "status": 401 }));
        }
    }
    assert_eq!(peer.ask("GET", "/nothing/here", "", b"").await.status, 404);
}

#[tokio::test]
async fn a_device_proves_itself_by_challenge_and_publishes() {
    let fixture = Fixture::new();
    let mut peer = fixture.connect();
    let nonce = random();
    let ask = json!({ "device_id": "a", "client_nonce": text::hex(&nonce) }).to_string();
    let challenge = peer.ask("POST", "/auth/challenge", "", ask.as_bytes()).await;
    assert_eq!((challenge.status, challenge.headers["cache-control"].as_str()), (200, "no-store"));
    let challenge: ChallengeAnswer = serde_json::from_slice(&challenge.body).unwrap();
    let key = key("a");
    let transcript = Transcript {
        proto: Proto::Http,
        cb_type: CbType::None,
        gateway_id: &challenge.gateway_id,
        device_id: "a",
        key_id: key.public().key_id(),
        client_nonce: &nonce,
        challenge: &challenge.challenge,
        channel_binding: &[],
        ctx: &[],
    };
    let answer = json!({
        "device_id": "a",
        "key_id": text::hex(&key.public().key_id().0),
        "client_nonce": text::hex(&nonce),
        "challenge": text::base64url(&challenge.challenge),
        "cb_type": 0,
        "signature": text::base64url(&transcript.sign(&key).unwrap()),
    })
    .to_string();
    let session = peer.ask("POST", "/auth/session", "", answer.as_bytes()).await;
    assert_eq!(session.status, 200, "{session:?}");
    assert_eq!(peer.ask("POST", "/auth/session", "", answer.as_bytes()).await.status, 401, "works once");
    let token = session.json()["access_token"].as_str().unwrap().to_owned();

    let headers = format!("{}content-type: text/plain\r\n", bearer(&token));
    let published = peer.ask("POST", "/telemetry/temp", &headers, b"21.5").await;
    assert_eq!(published.status, 202, "{published:?}");
    assert!(published.headers["tidegate-message-id"].starts_with("tidegate/"));

    let read = peer.ask("GET", "/topics/dev/a/telemetry/temp", &bearer(&token), b"").await;
    assert_eq!((read.status, &read.body[..]), (200, &b"21.5"[..]));
    assert_eq!((read.headers["content-type"].as_str(), read.headers["age"].as_str()), ("text/plain", "0"));
    let conditional = format!("{}if-none-match: {}\r\n", bearer(&token), read.headers["etag"]);
    let unchanged = peer.ask("GET", "/topics/dev/a/telemetry/temp", &conditional, b"").await;
    assert_eq!((unchanged.status, unchanged.body.len()), (304, 0));
    assert_eq!(fixture.gateway.sessions.live().len(), 1, "one session for the whole connection");
    drop(peer.io);
    assert!(!peer.served.await.unwrap());
    assert_eq!(fixture.gateway.sessions.live().len(), 0);
}

#[tokio::test]
async fn an_assertion_works_once_and_its_refusal_has_the_form_of_oauth() {
    let fixture = Fixture::new();
    let mut peer = fixture.connect();
    let refused = peer.ask("POST", "/oauth2/token", "", oauth_form("x.y.z").as_bytes()).await;
    assert_eq!((refused.status, refused.json()), (401, json!({ "error": "invalid_client" })));
    let malformed = peer.ask("POST", "/oauth2/token", "", b"grant_type=password").await;
    assert_eq!((malformed.status, malformed.json()), (400, json!({ "error": "unsupported_grant_type" })));
    let too_long = vec![b'a'; identify::BODY_BYTES_MAX + 1];
    assert_eq!(peer.ask("POST", "/oauth2/token", "", &too_long).await.status, 413);
    assert!(!fixture.token("a").await.is_empty());
}

#[tokio::test]
async fn each_refusal_names_what_decided() {
    let fixture = Fixture::with(|limits| limits.packet_bytes_max = 1000, &[]);
    let (a, operator) = (bearer(&fixture.token("a").await), bearer(&fixture.token("op").await));
    let mut peer = fixture.connect();
    let nobody_allows = peer.ask("POST", "/topics/dev/b/telemetry", &a, b"x").await;
    assert_eq!((nobody_allows.status, &nobody_allows.json()["rule"]), (403, &Value::Null));
    let denied = peer.ask("POST", "/topics/plant/forbidden", &operator, b"x").await;
    assert_eq!((denied.status, denied.json()["rule"].as_str()), (403, Some("not there")));
    let by_rule = peer.ask("POST", "/topics/small/x", &operator, b"12345").await;
    assert_eq!((by_rule.status, by_rule.json()["limit"].as_str()), (413, Some("bytes_max")));
    let missing = peer.ask("GET", "/state", &a, b"").await;
    assert_eq!((missing.status, missing.json()["reason"].as_str()), (404, Some("not_found")));
    let method = peer.ask("DELETE", "/telemetry", &a, b"").await;
    assert_eq!((method.status, method.headers["allow"].as_str()), (405, "POST"));
    let malformed = peer.ask("POST", "/topics/a%2Fb", &a, b"").await;
    assert_eq!((malformed.status, malformed.json()["detail"].as_str()), (400, Some("malformed: an encoded slash")));
}

#[tokio::test]
async fn a_body_is_bounded_before_and_while_it_is_read() {
    let fixture = Fixture::with(|limits| limits.packet_bytes_max = 1000, &[]);
    let token = bearer(&fixture.token("a").await);
    let mut announced = fixture.connect();
    let head =
        format!("POST /telemetry HTTP/1.1\r\nhost: g\r\n{token}expect: 100-continue\r\ncontent-length: 1001\r\n\r\n");
    announced.io.write_all(head.as_bytes()).await.unwrap();
    let answer = announced.answer().await;
    assert_eq!((answer.status, answer.json()["limit"].as_str()), (413, Some("packet_bytes_max")), "no 100 before it");

    let mut chunked = fixture.connect();
    let head = format!("POST /telemetry HTTP/1.1\r\nhost: g\r\n{token}transfer-encoding: chunked\r\n\r\n");
    chunked.io.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..11 {
        chunked.io.write_all(b"64\r\n").await.unwrap();
        chunked.io.write_all(&[b'x'; 100]).await.unwrap();
        chunked.io.write_all(b"\r\n").await.unwrap();
    }
    assert_eq!(chunked.answer().await.status, 413);

    let mut whole = fixture.connect();
    let head = format!("POST /telemetry HTTP/1.1\r\nhost: g\r\n{token}transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n");
    whole.io.write_all(head.as_bytes()).await.unwrap();
    tokio::task::yield_now().await;
    whole.io.write_all(b"3\r\ndef\r\n0\r\n\r\n").await.unwrap();
    assert_eq!(whole.answer().await.status, 202);
    assert_eq!(whole.ask("GET", "/topics/dev/a/telemetry", &token, b"").await.body, b"abcdef");
}

#[tokio::test]
async fn smuggled_and_broken_requests_are_refused() {
    let fixture = Fixture::new();
    let token = bearer(&fixture.token("a").await);
    for (text, status) in [
        ("GET /state HTTP/1.1\r\n\r\n", 400),
        ("GET /state HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        ("POST /telemetry HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
        ("POST /telemetry HTTP/1.1\r\nhost: a\r\ncontent-length: +1\r\n\r\na", 400),
        ("POST /telemetry HTTP/1.1\r\nhost : a\r\n\r\n", 400),
        ("POST /telemetry HTTP/1.1\r\nhost: a\r\n folded: b\r\n\r\n", 400),
        ("POST /telemetry HTTP/1.1\r\nhost: a\r\ntransfer-encoding: x\r\n\r\n", 400),
        ("POST /telemetry HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ] {
        let mut peer = fixture.connect();
        let text = text.replacen("\r\n", &format!("\r\n{token}"), 1);
        peer.io.write_all(text.as_bytes()).await.unwrap();
        assert_eq!(peer.answer().await.status, status, "{text}");
    }
    let mut huge = fixture.connect();
    let _ = huge.io.write_all(format!("GET /{} HTTP/1.1\r\n", "a".repeat(20_000)).as_bytes()).await;
    assert!(matches!(huge.answer().await.status, 414 | 431));
}

#[tokio::test]
async fn acknowledgement_comes_only_when_the_class_holds() {
    let fixture = Fixture::with(|limits| limits.outbox_messages_max = 1, &["dev/+/event/#"]);
    let token = bearer(&fixture.token("a").await);
    let mut peer = fixture.connect();
    // By the spool: the outcome comes from another thread, after the commit.
    assert_eq!(peer.ask("POST", "/event/door", &token, b"open").await.status, 202);
    assert_eq!(fixture.gateway.spool.stats().iter().map(|s| s.queued_records).sum::<u64>(), 1);

    // By a slow subscriber: the answer waits until it has read.
    let slow = fixture.subscriber("op", "dev/a/telemetry").await;
    assert_eq!(peer.ask("POST", "/telemetry", &token, b"1").await.status, 202);
    peer.send("POST", "/telemetry", &token, b"2").await;
    let waiting = tokio::time::timeout(Duration::from_millis(100), peer.fill()).await;
    assert!(waiting.is_err(), "answered too early");
    assert_eq!(
        fixture.connect().ask("POST", "/telemetry?qos=0", &token, b"3").await.status,
        202,
        "QoS 0 waits for nobody"
    );
    let mut drained = Default::default();
    slow.outbox.drain(&mut drained, 100).await;
    slow.outbox.poll_drain(&mut std::task::Context::from_waker(std::task::Waker::noop()), &mut drained, 100).is_ready();
    assert_eq!(peer.answer().await.status, 202);
}

#[tokio::test]
async fn state_is_kept_and_read_back() {
    let fixture = Fixture::new();
    let token = bearer(&fixture.token("a").await);
    let mut peer = fixture.connect();
    let headers = format!("{token}content-type: application/json\r\n");
    assert_eq!(peer.ask("PUT", "/state", &headers, b"{\"on\":true}").await.status, 202);
    let state = peer.ask("GET", "/state", &token, b"").await;
    assert_eq!((state.status, &state.body[..]), (200, &b"{\"on\":true}"[..]));
    assert_eq!(state.headers["content-type"], "application/json");
    // The head alone, with the length the body would have.
    peer.send("HEAD", "/state", &token, b"").await;
    let head = String::from_utf8(peer.until(b"\r\n\r\n").await).unwrap();
    assert!(head.contains("content-length: 11"), "{head}");
    assert_eq!(peer.ask("GET", "/state", &token, b"").await.status, 200);
}

#[tokio::test]
async fn an_event_stream_shows_last_values_and_then_what_comes() {
    let fixture = Fixture::new();
    fixture.emit("dev/a/state", "old", true);
    let operator = bearer(&fixture.token("op").await);
    let mut stream = fixture.connect();
    let headers = format!("{operator}accept: text/event-stream\r\n");
    stream.send("GET", "/topics/dev/+/%23", &headers, b"").await;
    let head = String::from_utf8(stream.until(b"\r\n\r\n").await).unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/event-stream"), "{head}");
    let mut event = async || {
        let text = String::from_utf8(stream.until(b"}\n\n").await).unwrap();
        let data = text.rsplit_once("data: ").unwrap().1.trim().to_owned();
        serde_json::from_str::<Value>(&data).unwrap()
    };
    let mut events = vec![event().await];
    let device = bearer(&fixture.token("a").await);
    let mut peer = fixture.connect();
    peer.ask("POST", "/telemetry", &format!("{device}content-type: text/plain\r\n"), b"21.5").await;
    peer.ask("POST", "/event/raw", &device, b"\xff\xfe").await;
    // Presence of both devices comes in between.
    while events.len() < 4 {
        let next = event().await;
        if !next["topic"].as_str().unwrap().ends_with("presence") {
            events.push(next);
        }
        if events.len() == 3 {
            break;
        }
    }
    let brief = |v: &Value| (v["topic"].clone(), v["payload"].clone(), v["payload_base64"].clone());
    assert_eq!(brief(&events[0]), (json!("dev/a/state"), json!("old"), Value::Null));
    assert_eq!(brief(&events[1]), (json!("dev/a/telemetry"), json!("21.5"), Value::Null));
    assert_eq!(events[1]["content_type"], "text/plain");
    assert_eq!(brief(&events[2]), (json!("dev/a/event/raw"), Value::Null, json!("//4=")));

    fixture.shutdown.cancel();
    assert!(stream.is_closed().await);
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    assert_eq!(fixture.shared.streams.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn event_streams_are_counted_and_bad_filters_refused() {
    let fixture = Fixture::with(|limits| limits.event_streams_max = 1, &[]);
    let headers = format!("{}accept: text/event-stream\r\n", bearer(&fixture.token("a").await));
    let mut first = fixture.connect();
    first.send("GET", "/topics/dev/a/%23", &headers, b"").await;
    first.until(b": subscribed\n\n").await;
    let mut second = fixture.connect();
    let full = second.ask("GET", "/topics/dev/a/%23", &headers, b"").await;
    assert_eq!((full.status, full.json()["limit"].as_str()), (503, Some("event_streams_max")));
    drop(first.io);
    first.served.await.unwrap();
    let foreign = second.ask("GET", "/topics/dev/b/%23", &headers, b"").await;
    assert_eq!(foreign.status, 403);
    assert_eq!(second.ask("GET", "/topics/dev/%23/a", &headers, b"").await.status, 400);
    assert_eq!(fixture.shared.streams.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_command_waits_for_its_device_and_the_device_for_it() {
    let fixture = Fixture::new();
    let (device, operator) = (bearer(&fixture.token("a").await), bearer(&fixture.token("op").await));
    let (mut poll, mut sender) = (fixture.connect(), fixture.connect());
    assert_eq!(poll.ask("GET", "/command", &device, b"").await.status, 204);
    // Sent while nobody polls.
    assert_eq!(sender.ask("POST", "/topics/dev/a/cmd/7/valve/open", &operator, b"50%").await.status, 202);
    assert_eq!(sender.ask("POST", "/topics/dev/a/cmd/8/reboot", &operator, b"").await.status, 202);
    for (request, name, payload) in [("7", "valve/open", &b"50%"[..]), ("8", "reboot", b"")] {
        let command = poll.ask("GET", "/command?wait=5", &device, b"").await;
        assert_eq!(command.status, 200);
        assert_eq!((command.headers["tidegate-request"].as_str(), &command.body[..]), (request, payload));
        assert_eq!(command.headers["tidegate-command"], name);
    }
    // Sent while the device waits.
    poll.send("GET", "/command?wait=30", &device, b"").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(sender.ask("POST", "/topics/dev/a/cmd/9/x", &operator, b"").await.status, 202);
    assert_eq!(poll.answer().await.headers["tidegate-request"], "9");

    let answers = fixture.subscriber("op", "dev/+/cmd-res/#").await;
    assert_eq!(poll.ask("POST", "/command/res/9?status=200", &device, b"done").await.status, 202);
    let mut drained = Default::default();
    answers.outbox.drain(&mut drained, 1).await;
    let answer = drained.deliveries.pop_front().unwrap();
    assert_eq!(answer.message.topic.as_str(), "dev/a/cmd-res/9/200");
}

#[tokio::test]
async fn a_revoked_device_is_out_with_its_next_request() {
    let fixture = Fixture::new();
    let token = bearer(&fixture.token("a").await);
    let mut peer = fixture.connect();
    assert_eq!(peer.ask("POST", "/telemetry", &token, b"1").await.status, 202);
    let mut registry = Registry::open(fixture.folder.path()).unwrap();
    registry.set_enabled(&DeviceId::parse("a").unwrap(), false).unwrap();
    fixture.gateway.identity.refresh().unwrap();
    assert_eq!(peer.ask("POST", "/telemetry", &token, b"1").await.status, 401);
}

#[tokio::test]
async fn too_fast_is_told_when_to_come_back() {
    let fixture = Fixture::with(|limits| limits.rate_per_device = "1/m burst 2".parse().unwrap(), &[]);
    let token = bearer(&fixture.token("a").await);
    let mut peer = fixture.connect();
    for expected in [202, 202, 429] {
        let answer = peer.ask("POST", "/telemetry", &token, b"1").await;
        assert_eq!(answer.status, expected);
        if expected == 429 {
            assert_eq!(answer.json()["limit"], "rate_per_device");
            assert!((1..=60).contains(&answer.headers["retry-after"].parse::<u32>().unwrap()));
        }
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_and_a_drain_lets_the_last_finish() {
    let fixture = Fixture::new();
    let token = bearer(&fixture.token("a").await);
    let mut peer = fixture.connect();
    for payload in [&b"1"[..], b"2", b"3"] {
        peer.send("POST", "/telemetry", &token, payload).await;
    }
    let mut ids = Vec::new();
    for _ in 0..3 {
        let answer = peer.answer().await;
        ids.push(answer.headers["tidegate-message-id"].rsplit('/').next().unwrap().parse::<u64>().unwrap());
    }
    assert!(ids.is_sorted(), "{ids:?}");

    // A poll that waits is ended by the drain with an answer, and the connection after it.
    peer.send("GET", "/command?wait=60", &token, b"").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let mut idle = fixture.connect();
    fixture.shutdown.cancel();
    assert_eq!(peer.answer().await.status, 204);
    assert!(peer.is_closed().await && idle.is_closed().await);
}

#[tokio::test]
async fn a_silent_connection_and_a_stuck_body_end_at_their_deadlines() {
    let fixture = Fixture::with(
        |limits| {
            limits.idle_timeout = "300ms".parse().unwrap();
            limits.header_timeout_ms = 150;
            limits.body_timeout_ms = 200;
        },
        &[],
    );
    let token = bearer(&fixture.token("a").await);
    let began = Instant::now();
    let mut idle = fixture.connect();
    assert!(idle.is_closed().await);
    assert!(began.elapsed() >= Duration::from_millis(290));

    let mut head = fixture.connect();
    head.io.write_all(b"GET /state HT").await.unwrap();
    let began = Instant::now();
    assert!(head.is_closed().await);
    assert!(began.elapsed() < Duration::from_millis(290), "the head's own, shorter deadline");

    let mut body = fixture.connect();
    let head = format!("POST /telemetry HTTP/1.1\r\nhost: g\r\n{token}content-length: 10\r\n\r\nabc");
    body.io.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(body.answer().await.status, 408);
    assert!(body.is_closed().await);
}

#[tokio::test]
async fn http2_requests_run_side_by_side_in_one_session() {
    let fixture = Fixture::new();
    let token = fixture.token("a").await;
    let (near, far) = tokio::io::duplex(1 << 16);
    let serving = serve_http2(far, BytesMut::new(), conn(None), fixture.context(), fixture.shutdown.clone());
    let served = tokio::spawn(serving);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (sender, connection) =
        hyper::client::conn::http2::handshake::<_, _, Full<bytes::Bytes>>(executor, TokioIo::new(near)).await.unwrap();
    tokio::spawn(connection);
    let mut asking = tokio::task::JoinSet::new();
    for n in 0..50 {
        let mut sender = sender.clone();
        let request = Request::post("http://gateway/telemetry")
            .header("authorization", format!("Bearer {token}"))
            .body(Full::from(n.to_string()))
            .unwrap();
        asking.spawn(async move { sender.send_request(request).await.unwrap().status().as_u16() });
    }
    let statuses = asking.join_all().await;
    assert_eq!(statuses, vec![202; 50]);
    assert_eq!(fixture.gateway.sessions.live().len(), 1);
    let mut last = sender.clone();
    let request = Request::get("http://gateway/topics/dev/a/telemetry")
        .header("authorization", format!("Bearer {token}"))
        .body(Full::default())
        .unwrap();
    let response = last.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.into_body().collect().await.unwrap().to_bytes().len() <= 2);
    fixture.shutdown.cancel();
    drop((sender, last));
    served.await.unwrap();
    assert_eq!(fixture.gateway.sessions.live().len(), 0);
}

#[tokio::test]
async fn a_websocket_for_mqtt_is_handed_on_with_what_came_early() {
    let fixture = Fixture::new();
    let (mut near, far) = tokio::io::duplex(4096);
    let serving =
        tokio::spawn(serve_http1(far, BytesMut::new(), conn(None), fixture.context(), fixture.shutdown.clone()));
    // The key and its answer are the example of RFC 6455 section 1.3.
    let head = "GET /mqtt HTTP/1.1\r\nhost: g\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\n\
                sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: mqtt\r\n\r\nearly";
    near.write_all(head.as_bytes()).await.unwrap();
    let mut upgraded = serving.await.unwrap().expect("upgraded");
    let mut early = [0; 5];
    upgraded.read_exact(&mut early).await.unwrap();
    assert_eq!(&early, b"early");
    upgraded.write_all(b"frames").await.unwrap();
    drop(upgraded);
    let mut text = String::new();
    near.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 101 "), "{text}");
    assert!(text.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{text}");
    assert!(text.contains("sec-websocket-protocol: mqtt\r\n") && text.ends_with("frames"), "{text}");

    let mut other = fixture.connect();
    let head = head.replace("protocol: mqtt", "protocol: chat").replace("early", "");
    other.io.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(other.answer().await.status, 404);
}
