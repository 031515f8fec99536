//! The adapter over loopback UDP, with a real gateway, registry and spool behind it, and coap-lite as the other side.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coap_lite::{CoapOption, MessageClass, MessageType, Packet, RequestType, ResponseType};
use tidegate_auth::exchange::{ChallengeRequest, SessionAnswer, SessionRequest};
use tidegate_auth::{CbType, Proto, SecretKey, Transcript, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use super::{serve, serve_datagrams};
use crate::gateway::{Config, ForwardTopics, Gateway, Limits, Routes, Rules};
use crate::identity::{self, Identity, NewDevice, NewKey, Registry};
use crate::listener::{Config as ListenerConfig, ConnectionInfo, Listener, TransportKind};
use crate::message::{DeviceId, Topic};
use crate::policy::{Policy, RuleConfig, RuleSource};
use crate::spool::{self, SinkConfig, Spool};

const RULES: &str = r##"[
    {"name": "own space", "who": ["role:sensor"], "do": ["publish", "subscribe", "read"], "on": ["dev/{device}/#"]},
    {"name": "operators", "who": ["role:operator"], "do": ["publish", "subscribe", "read", "command"], "on": ["dev/#", "plant/#"]},
    {"name": "not there", "effect": "deny", "who": ["anyone"], "do": ["publish"], "on": ["plant/forbidden"]},
    {"name": "small", "who": ["role:operator"], "do": ["publish"], "on": ["small/#"], "bytes_max": 4}
]"##;

struct Fixture {
    gateway: Arc<Gateway>,
    address: SocketAddr,
    shutdown: CancellationToken,
    served: tokio::task::JoinHandle<()>,
    folder: tempfile::TempDir,
}

fn key(id: &str) -> SecretKey {
    let mut seed = [7; 32];
    seed[..id.len()].copy_from_slice(id.as_bytes());
    SecretKey::from_seed(&seed)
}

impl Fixture {
    fn new() -> Self {
        Fixture::with(|_| {}, &[])
    }

    /// `sinks` are topic patterns of class `disk`.
    fn with(adjust: impl FnOnce(&mut Limits), sinks: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identity = Arc::new(Identity::open(folder.path(), &identity::Config::default()).unwrap());
        let roles = [("a", "sensor"), ("b", "sensor"), ("op", "operator")];
        let devices = roles.map(|(id, role)| NewDevice {
            id: DeviceId::parse(id).unwrap(),
            role: role.into(),
            attributes: vec![],
            keys: vec![NewKey { public: key(id).public(), not_before: None, not_after: None }],
        });
        Registry::open(folder.path()).unwrap().add(&devices, 0, |_| {}).unwrap();
        identity.refresh().unwrap();
        let sink = |name: &&str| SinkConfig {
            name: (*name).into(),
            delivery: spool::Delivery::Disk,
            queue: spool::QueueConfig::default(),
        };
        let spool = Spool::open(folder.path(), spool::Config::default(), sinks.iter().map(sink).collect()).unwrap();
        let forward = |name: &&str| ForwardTopics { patterns: vec![(*name).into()], sink: spool.sink(name).unwrap() };
        let forwards = sinks.iter().map(forward).collect();
        let mut limits = Limits::default();
        adjust(&mut limits);
        let parsed: Vec<RuleConfig> = serde_json::from_str(RULES).unwrap();
        let sources = parsed.into_iter().zip(1..).map(|(rule, line)| RuleSource { rule, file: "p".into(), line });
        let rules = Rules {
            policy: Policy::compile(sources.collect()).unwrap(),
            address_filter: Default::default(),
            limits,
            routes: Routes::default(),
            anonymous_role: "".into(),
        };
        let gateway = Arc::new(Gateway::new(Config::default(), identity, spool, forwards, rules, Instant::now()));
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = socket.local_addr().unwrap();
        let config = ListenerConfig { name: "coap".into(), transport: TransportKind::Udp, ..Default::default() };
        let shutdown = CancellationToken::new();
        let serving =
            serve_datagrams(socket, Arc::new(Listener::new(config).unwrap()), gateway.clone(), shutdown.clone());
        Fixture { gateway, address, shutdown, served: tokio::spawn(serving), folder }
    }

    async fn peer(&self) -> Peer {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(self.address).await.unwrap();
        Peer { socket, message_id: 100 }
    }

    /// A peer that has logged in, with its token.
    async fn device(&self, id: &str) -> (Peer, String) {
        let mut peer = self.peer().await;
        let token = self.log_in(&mut peer, id, &key(id)).await.unwrap();
        (peer, token)
    }

    async fn log_in(&self, peer: &mut Peer, id: &str, key: &SecretKey) -> Result<String, Packet> {
        let session = self.session_request(peer, id, key).await;
        let answer = peer.ask(post("auth/s").payload(&session.to_cbor())).await;
        if answer.header.code != MessageClass::Response(ResponseType::Changed) {
            return Err(answer);
        }
        let session_answer = SessionAnswer::from_cbor(&answer.payload).unwrap();
        assert!(session_answer.gateway_signature.is_some());
        Ok(text::base64url(&session_answer.access_token))
    }

    async fn session_request(&self, peer: &mut Peer, id: &str, key: &SecretKey) -> SessionRequest {
        let client_nonce = rand();
        let ask = ChallengeRequest { device_id: id.into(), client_nonce };
        let answer = peer.ask(post("auth/c").payload(&ask.to_cbor())).await;
        assert_eq!(code(&answer), "2.05");
        let challenge: [u8; 38] = answer.payload.as_slice().try_into().unwrap();
        let transcript = Transcript {
            proto: Proto::Coap,
            cb_type: CbType::None,
            gateway_id: &self.gateway.identity.gateway().id,
            device_id: id,
            key_id: key.public().key_id(),
            client_nonce: &client_nonce,
            challenge: &challenge,
            channel_binding: &[],
            ctx: &[],
        };
        SessionRequest {
            device_id: id.into(),
            key_id: key.public().key_id(),
            client_nonce,
            challenge,
            cb_type: CbType::None,
            signature: transcript.sign(key).unwrap(),
        }
    }

    fn emit(&self, topic: &str, payload: &'static str) {
        self.gateway.emit(Topic::parse(topic).unwrap(), payload.into(), true, Instant::now()).unwrap();
    }

    /// A new connection over TCP, with the CSM exchanged.
    async fn connect(&self) -> Stream {
        let (near, far) = tokio::io::duplex(1 << 16);
        let conn = ConnectionInfo {
            peer: SocketAddr::from(([192, 0, 2, 1], 4000)),
            local: SocketAddr::from(([192, 0, 2, 2], 1883)),
            listener: Arc::new(Listener::new(ListenerConfig { name: "tcp".into(), ..Default::default() }).unwrap()),
            tls: None,
        };
        let serving = serve(far, Default::default(), conn, self.gateway.clone(), self.shutdown.clone());
        let mut stream = Stream { io: near, read: Vec::new(), served: tokio::spawn(serving) };
        assert_eq!(stream.next().await.code, "7.01");
        stream.send("7.01", b"", &[], b"").await;
        stream
    }

    /// Shuts down and waits until all is answered.
    async fn stop(self) {
        self.shutdown.cancel();
        self.served.await.unwrap();
    }
}

fn rand() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// A request under construction.
struct Ask(Packet);

fn request(method: RequestType, target: &str) -> Ask {
    let mut packet = Packet::new();
    packet.header.set_type(MessageType::Confirmable);
    packet.header.code = MessageClass::Request(method);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    for segment in path.split('/') {
        packet.add_option(CoapOption::UriPath, segment.into());
    }
    for argument in query.split('&').filter(|argument| !argument.is_empty()) {
        packet.add_option(CoapOption::UriQuery, argument.into());
    }
    Ask(packet)
}

fn post(target: &str) -> Ask {
    request(RequestType::Post, target)
}

fn put(target: &str) -> Ask {
    request(RequestType::Put, target)
}

fn get(target: &str) -> Ask {
    request(RequestType::Get, target)
}

impl Ask {
    fn payload(mut self, payload: &[u8]) -> Self {
        self.0.payload = payload.to_vec();
        self
    }

    fn option(mut self, option: CoapOption, value: &[u8]) -> Self {
        self.0.add_option(option, value.to_vec());
        self
    }

    fn observe(self, value: &[u8]) -> Self {
        self.option(CoapOption::Observe, value)
    }

    fn token(mut self, token: &[u8]) -> Self {
        self.0.set_token(token.to_vec());
        self
    }

    fn unconfirmed(mut self) -> Self {
        self.0.header.set_type(MessageType::NonConfirmable);
        self
    }
}

struct Peer {
    socket: UdpSocket,
    message_id: u16,
}

impl Peer {
    async fn send(&mut self, mut ask: Ask) -> u16 {
        self.message_id += 1;
        ask.0.header.message_id = self.message_id;
        if ask.0.get_token().is_empty() {
            ask.0.set_token(self.message_id.to_be_bytes().to_vec());
        }
        self.socket.send(&ask.0.to_bytes().unwrap()).await.unwrap();
        self.message_id
    }

    /// The next datagram. Its time limit is there to end a test that has failed.
    async fn next(&mut self) -> Packet {
        let mut buffer = [0; 2048];
        let received = tokio::time::timeout(Duration::from_secs(20), self.socket.recv(&mut buffer));
        let length = received.await.expect("no datagram came").unwrap();
        Packet::from_bytes(&buffer[..length]).unwrap()
    }

    /// The answer to a request, piggy-backed or separate; what is confirmable is acknowledged.
    async fn ask(&mut self, ask: Ask) -> Packet {
        let message_id = self.send(ask).await;
        loop {
            let packet = self.next().await;
            if packet.header.get_type() == MessageType::Confirmable {
                self.acknowledge(&packet, MessageType::Acknowledgement).await;
            }
            if packet.header.code != MessageClass::Empty && packet.get_token() == message_id.to_be_bytes() {
                return packet;
            }
        }
    }

    async fn acknowledge(&mut self, packet: &Packet, how: MessageType) {
        let mut acknowledgement = Packet::new();
        acknowledgement.header.set_type(how);
        acknowledgement.header.code = MessageClass::Empty;
        acknowledgement.header.message_id = packet.header.message_id;
        self.socket.send(&acknowledgement.to_bytes().unwrap()).await.unwrap();
    }

    /// The next notification, confirmed if it wants to be.
    async fn notification(&mut self) -> Packet {
        let packet = self.next().await;
        assert!(packet.get_option(CoapOption::Observe).is_some(), "{packet:?}");
        if packet.header.get_type() == MessageType::Confirmable {
            self.acknowledge(&packet, MessageType::Acknowledgement).await;
        }
        packet
    }
}

fn code(packet: &Packet) -> String {
    packet.header.get_code()
}

fn option(packet: &Packet, option: CoapOption) -> Option<Vec<u8>> {
    packet.get_option(option)?.front().cloned()
}

fn location(packet: &Packet) -> String {
    let segments = packet.get_option(CoapOption::LocationPath).unwrap();
    segments.iter().map(|s| std::str::from_utf8(s).unwrap()).collect::<Vec<_>>().join("/")
}

#[tokio::test]
async fn a_device_logs_in_publishes_and_reads_its_value_back() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(post(&format!("t/room?t={t}")).payload(b"21")).await), "2.04");
    let ask = put(&format!("s?t={t}")).payload(b"{}").option(CoapOption::ContentFormat, &[50]);
    assert_eq!(code(&peer.ask(ask).await), "2.04");
    let state = peer.ask(get(&format!("s?t={t}"))).await;
    assert_eq!((code(&state).as_str(), &state.payload[..]), ("2.05", &b"{}"[..]));
    assert_eq!(option(&state, CoapOption::ContentFormat), Some(vec![50]));
    let mirrored = peer.ask(get(&format!("ps/dev/a/telemetry/room?t={t}"))).await;
    assert_eq!(mirrored.payload, b"21");
    fixture.stop().await;
}

#[tokio::test]
async fn a_challenge_works_once_and_every_wrong_login_is_the_same_4_01() {
    let fixture = Fixture::new();
    let mut peer = fixture.peer().await;
    let session = fixture.session_request(&mut peer, "a", &key("a")).await.to_cbor();
    assert_eq!(code(&peer.ask(post("auth/s").payload(&session)).await), "2.04");
    let wrong_key = fixture.session_request(&mut peer, "a", &key("b")).await.to_cbor();
    let nobody = fixture.session_request(&mut peer, "nobody", &key("a")).await.to_cbor();
    for body in [&session[..], &wrong_key, &nobody, b"not cbor", b""] {
        let answer = peer.ask(post("auth/s").payload(body)).await;
        assert_eq!((code(&answer).as_str(), &answer.payload[..]), ("4.01", &b""[..]));
    }
    // The challenge is bound to the address that asked for it.
    let mut thief = fixture.peer().await;
    let session = fixture.session_request(&mut peer, "a", &key("a")).await.to_cbor();
    assert_eq!(code(&thief.ask(post("auth/s").payload(&session)).await), "4.01");
    fixture.stop().await;
}

#[tokio::test]
async fn a_stranger_learns_nothing_but_no() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("a").await;
    let other = if &t[50..51] == "A" { "B" } else { "A" };
    let broken = format!("{}{other}{}", &t[..50], &t[51..]);
    for ask in [
        post("t").payload(b"x"),
        post(&format!("t?t={broken}")).payload(b"x"),
        get("s"),
        get("nothing/here"),
        put("ps/plant/x"),
        request(RequestType::Delete, "t"),
    ] {
        let answer = fixture.peer().await.ask(ask).await;
        assert_eq!((code(&answer).as_str(), &answer.payload[..]), ("4.01", &b""[..]));
    }
    let core = fixture.peer().await.ask(get(".well-known/core")).await;
    assert!(core.payload.starts_with(b"</auth/c>") && !String::from_utf8(core.payload).unwrap().contains("/ps"));
    fixture.stop().await;
}

#[tokio::test]
async fn a_device_is_told_the_rule_or_limit_that_decided() {
    let fixture = Fixture::with(|limits| limits.packet_bytes_max = 256, &[]);
    let (mut peer, t) = fixture.device("op").await;
    for (ask, expected, reason) in [
        (put(&format!("ps/plant/forbidden?t={t}")).payload(b"x"), "4.03", "not there"),
        (put(&format!("ps/else/where?t={t}")).payload(b"x"), "4.03", "no rule"),
        (put(&format!("ps/small/x?t={t}")).payload(b"12345"), "4.13", "bytes_max"),
        (put(&format!("ps/plant/x?t={t}")).payload(&[0; 257]), "4.13", "packet_bytes_max"),
        (get(&format!("ps/plant/nothing?t={t}")), "4.04", "nothing there"),
        (get(&format!("nothing?t={t}")), "4.04", "nothing there"),
        (post(&format!("cr/7?t={t}")), "4.00", "status"),
        (put(&format!("ps/a+/x?t={t}")), "4.00", "not a topic"),
    ] {
        let answer = peer.ask(ask).await;
        let payload = String::from_utf8(answer.payload.clone()).unwrap();
        assert_eq!(code(&answer), expected, "{payload}");
        assert!(payload.contains(reason), "{payload}");
        assert_eq!(option(&answer, CoapOption::Size1).is_some(), expected == "4.13");
    }
    fixture.stop().await;
}

#[tokio::test]
async fn too_fast_is_4_29_with_the_time_to_wait() {
    let fixture = Fixture::with(|limits| limits.rate_per_device = "1/m burst 2".parse().unwrap(), &[]);
    let (mut peer, t) = fixture.device("a").await;
    let mut last = None;
    for _ in 0..3 {
        last = Some(peer.ask(post(&format!("t?t={t}")).payload(b"x")).await);
    }
    let last = last.unwrap();
    assert_eq!(code(&last), "4.29");
    let wait = option(&last, CoapOption::MaxAge).unwrap();
    assert!((50..=60).contains(&wait[0]), "{wait:?}");
    fixture.stop().await;
}

#[tokio::test]
async fn what_is_acknowledged_is_in_the_spool() {
    let fixture = Fixture::with(|_| {}, &["dev/+/telemetry/#"]);
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(post(&format!("t?t={t}")).payload(b"kept")).await), "2.04");
    assert_eq!(code(&peer.ask(post(&format!("t?t={t}")).payload(b"kept too").unconfirmed()).await), "2.04");
    let folder = fixture.folder.path().to_owned();
    let sink = spool_texts(&folder);
    assert!(sink.contains("kept too"), "acknowledged before it was stored");
    fixture.stop().await;
}

/// All that lies in the spool's files, as text.
fn spool_texts(folder: &std::path::Path) -> String {
    let mut found = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.push_str(&spool_texts(&path));
        } else {
            found.push_str(&String::from_utf8_lossy(&std::fs::read(path).unwrap()));
        }
    }
    found
}

#[tokio::test]
async fn a_retransmission_gets_the_same_answer_and_publishes_once() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let mut ask = put(&format!("ps/plant/x?t={t}")).payload(b"1").0;
    ask.header.message_id = 9;
    ask.set_token(vec![1]);
    let bytes = ask.to_bytes().unwrap();
    let mut answers = Vec::new();
    for _ in 0..2 {
        peer.socket.send(&bytes).await.unwrap();
        answers.push(peer.next().await.to_bytes().unwrap());
    }
    assert_eq!(answers[0], answers[1]);
    let value = peer.ask(get(&format!("ps/plant/x?t={t}"))).await;
    let again = peer.ask(get(&format!("ps/plant/x?t={t}"))).await;
    assert_eq!(option(&value, CoapOption::ETag), option(&again, CoapOption::ETag));
    let live = fixture.gateway.sessions.live();
    assert_eq!(live.len(), 1, "one session for one device at one address");
    fixture.stop().await;
}

#[tokio::test]
async fn an_observer_sees_what_others_publish_until_it_resets() {
    let fixture = Fixture::new();
    fixture.emit("plant/a/temp", "first");
    let (mut peer, t) = fixture.device("op").await;
    let first = peer.ask(get(&format!("ps/plant/a/temp?t={t}")).observe(&[])).await;
    assert_eq!((code(&first).as_str(), &first.payload[..]), ("2.05", &b"first"[..]));
    let mut sequence = option(&first, CoapOption::Observe).unwrap();
    for value in ["second", "third"] {
        fixture.emit("plant/a/temp", value);
        let notification = peer.notification().await;
        assert_eq!(notification.payload, value.as_bytes());
        let next = option(&notification, CoapOption::Observe).unwrap();
        assert!(next > sequence, "{next:?} after {sequence:?}");
        sequence = next;
    }
    fixture.emit("plant/a/temp", "fourth");
    let notification = peer.next().await;
    peer.acknowledge(&notification, MessageType::Reset).await;
    // The answer to a later request comes without a notification before it.
    fixture.emit("plant/a/temp", "fifth");
    let read = peer.ask(get(&format!("ps/plant/a/temp?t={t}"))).await;
    assert_eq!(read.payload, b"fifth");
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn a_topic_may_be_observed_before_it_has_a_value_and_left_by_observe_1() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("op").await;
    let target = format!("ps/plant/new?t={t}");
    let mut ask = get(&target).observe(&[]).token(b"same").0;
    ask.header.message_id = 1;
    peer.socket.send(&ask.to_bytes().unwrap()).await.unwrap();
    let first = peer.next().await;
    assert_eq!((code(&first).as_str(), first.payload.len()), ("2.05", 0));
    fixture.emit("plant/new", "value");
    assert_eq!(peer.notification().await.payload, b"value");
    let mut ask = get(&target).observe(&[1]).token(b"same").0;
    ask.header.message_id = 2;
    peer.socket.send(&ask.to_bytes().unwrap()).await.unwrap();
    let last = peer.next().await;
    assert_eq!((last.payload.as_slice(), option(&last, CoapOption::Observe)), (&b"value"[..], None));
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn every_command_arrives_in_order_and_says_which_it_is() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    let first = peer.ask(get(&format!("c?t={t}")).observe(&[])).await;
    assert_eq!(code(&first), "2.05");
    for n in 0..5 {
        fixture.emit(&format!("dev/a/cmd/{n}/blink"), "now");
    }
    for n in 0..5 {
        let command = peer.next().await;
        assert_eq!(command.header.get_type(), MessageType::Confirmable);
        assert_eq!((location(&command), &command.payload[..]), (format!("c/{n}/blink"), &b"now"[..]));
        // The next one comes only now.
        peer.acknowledge(&command, MessageType::Acknowledgement).await;
    }
    assert_eq!(code(&peer.ask(post(&format!("cr/4?status=200&t={t}")).payload(b"done")).await), "2.04");
    let (mut operator, t) = fixture.device("op").await;
    let answer = operator.ask(get(&format!("ps/dev/a/cmd-res/4/200?t={t}"))).await;
    assert_eq!(answer.payload, b"done");
    fixture.stop().await;
}

#[tokio::test]
async fn an_observer_of_many_topics_is_told_which_one_changed() {
    let fixture = Fixture::new();
    fixture.emit("plant/a/temp", "kept");
    let (mut peer, t) = fixture.device("op").await;
    assert_eq!(code(&peer.ask(get(&format!("ps/plant/+/temp?t={t}")).observe(&[])).await), "2.05");
    let kept = peer.notification().await;
    assert_eq!((location(&kept).as_str(), &kept.payload[..]), ("ps/plant/a/temp", &b"kept"[..]));
    fixture.emit("plant/b/temp", "new");
    let new = peer.notification().await;
    assert_eq!((location(&new).as_str(), &new.payload[..]), ("ps/plant/b/temp", &b"new"[..]));
    fixture.stop().await;
}

#[tokio::test]
async fn who_may_not_subscribe_gets_a_plain_answer_or_a_refusal() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    let refused = peer.ask(get(&format!("ps/plant/a?t={t}")).observe(&[])).await;
    assert_eq!((code(&refused).as_str(), option(&refused, CoapOption::Observe)), ("4.03", None));
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn observers_are_told_when_the_gateway_stops() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(get(&format!("s?t={t}")).observe(&[])).await), "2.05");
    fixture.shutdown.cancel();
    let last = peer.next().await;
    assert_eq!((code(&last).as_str(), option(&last, CoapOption::Observe)), ("5.03", None));
    fixture.served.await.unwrap();
}

#[tokio::test]
async fn a_revoked_device_is_out_at_once() {
    let fixture = Fixture::new();
    let (mut peer, t) = fixture.device("a").await;
    assert_eq!(code(&peer.ask(get(&format!("s?t={t}")).observe(&[])).await), "2.05");
    let device = DeviceId::parse("a").unwrap();
    Registry::open(fixture.folder.path()).unwrap().set_enabled(&device, false).unwrap();
    fixture.gateway.identity.refresh().unwrap();
    assert_eq!(code(&peer.ask(post(&format!("t?t={t}")).payload(b"x")).await), "4.01");
    fixture.gateway.tick(Instant::now());
    let last = peer.next().await;
    assert_eq!((code(&last).as_str(), option(&last, CoapOption::Observe)), ("4.01", None));
    fixture.stop().await;
}

/// A client of CoAP over TCP that writes its frames by hand (RFC 8323 section 3.2).
struct Stream {
    io: DuplexStream,
    read: Vec<u8>,
    served: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Frame {
    code: String,
    token: Vec<u8>,
    options: Vec<(u16, Vec<u8>)>,
    payload: Vec<u8>,
}

impl Frame {
    fn option(&self, number: u16) -> Option<&[u8]> {
        self.options.iter().find(|(n, _)| *n == number).map(|(_, value)| &value[..])
    }
}

const OBSERVE: u16 = 6;
const LOCATION_PATH: u16 = 8;
const URI_PATH: u16 = 11;
const URI_QUERY: u16 = 15;

impl Stream {
    async fn send(&mut self, code: &str, token: &[u8], options: &[(u16, &[u8])], payload: &[u8]) {
        let mut body = Vec::new();
        let mut last = 0;
        for (number, value) in options {
            let (delta, length) = (number - last, value.len());
            assert!(delta < 13 && length < 269);
            if length < 13 {
                body.push((delta << 4) as u8 | length as u8);
            } else {
                body.extend([(delta << 4) as u8 | 13, (length - 13) as u8]);
            }
            body.extend_from_slice(value);
            last = *number;
        }
        if !payload.is_empty() {
            body.push(0xff);
            body.extend_from_slice(payload);
        }
        let tkl = token.len() as u8;
        let mut frame = match body.len() {
            short @ 0..=12 => vec![(short as u8) << 4 | tkl],
            more @ 13..=268 => vec![13 << 4 | tkl, (more - 13) as u8],
            long @ 269..=65_804 => {
                let [a, b] = ((long - 269) as u16).to_be_bytes();
                vec![14 << 4 | tkl, a, b]
            }
            huge => {
                let mut head = vec![15 << 4 | tkl];
                head.extend(((huge - 65_805) as u32).to_be_bytes());
                head
            }
        };
        let (class, detail) = code.split_once('.').unwrap();
        frame.push(class.parse::<u8>().unwrap() << 5 | detail.parse::<u8>().unwrap());
        frame.extend_from_slice(token);
        frame.extend(body);
        self.io.write_all(&frame).await.unwrap();
    }

    async fn request(&mut self, method: &str, token: &[u8], target: &str, observe: Option<&[u8]>, payload: &[u8]) {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut options: Vec<(u16, &[u8])> = observe.iter().map(|value| (OBSERVE, *value)).collect();
        options.extend(path.split('/').map(|segment| (URI_PATH, segment.as_bytes())));
        options.extend(query.split('&').filter(|a| !a.is_empty()).map(|argument| (URI_QUERY, argument.as_bytes())));
        self.send(method, token, &options, payload).await;
    }

    async fn ask(&mut self, method: &str, target: &str, payload: &[u8]) -> Frame {
        self.request(method, b"ask", target, None, payload).await;
        loop {
            let frame = self.next().await;
            if frame.token == b"ask" {
                return frame;
            }
        }
    }

    async fn next(&mut self) -> Frame {
        tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                if let Some((frame, bytes)) = parse(&self.read) {
                    self.read.drain(..bytes);
                    return frame;
                }
                assert!(self.io.read_buf(&mut self.read).await.unwrap() > 0, "the connection ended");
            }
        })
        .await
        .expect("no message came")
    }
}

fn parse(bytes: &[u8]) -> Option<(Frame, usize)> {
    let (&first, rest) = bytes.split_first()?;
    let (extension, length) = match first >> 4 {
        13 => (1, 13 + usize::from(*rest.first()?)),
        14 => (2, 269 + usize::from(u16::from_be_bytes(*rest.first_chunk()?))),
        15 => (4, 65_805 + u32::from_be_bytes(*rest.first_chunk()?) as usize),
        short => (0, usize::from(short)),
    };
    let tkl = usize::from(first & 15);
    let all = 2 + extension + tkl + length;
    let message = bytes.get(..all)?;
    let code = message[1 + extension];
    let token = message[2 + extension..2 + extension + tkl].to_vec();
    // coap-lite reads the rest as it stands in a datagram.
    let mut datagram = vec![0x40, 0x01, 0, 0];
    datagram.extend_from_slice(&message[2 + extension + tkl..]);
    let packet = Packet::from_bytes(&datagram).unwrap();
    let options = packet.options().flat_map(|(n, values)| values.iter().map(|v| (*n, v.clone()))).collect();
    let code = format!("{}.{:02}", code >> 5, code & 31);
    Some((Frame { code, token, options, payload: packet.payload }, all))
}

#[tokio::test]
async fn over_tcp_a_device_publishes_reads_and_observes() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("op").await;
    let mut stream = fixture.connect().await;
    let long = "long ".repeat(10_000);
    assert_eq!(stream.ask("0.03", &format!("ps/plant/long?t={t}"), long.as_bytes()).await.code, "2.04");
    assert_eq!(stream.ask("0.02", "t", b"x").await.code, "4.01");
    stream.request("0.01", b"ob", &format!("ps/plant/x?t={t}"), Some(&[]), b"").await;
    let first = stream.next().await;
    assert_eq!((first.code.as_str(), first.option(OBSERVE).is_some()), ("2.05", true));
    fixture.emit("plant/x", "new");
    let notification = stream.next().await;
    assert_eq!((&notification.token[..], &notification.payload[..]), (&b"ob"[..], &b"new"[..]));
    stream.send("7.02", b"ping", &[], b"").await;
    let pong = stream.next().await;
    assert_eq!((pong.code.as_str(), &pong.token[..]), ("7.03", &b"ping"[..]));
    drop(stream.io);
    stream.served.await.unwrap();
    assert_eq!(fixture.gateway.hub.subscriptions(), 0);
    fixture.stop().await;
}

#[tokio::test]
async fn over_tcp_a_long_value_comes_in_blocks_to_who_takes_no_more() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("op").await;
    let mut stream = fixture.connect().await;
    // Our peer has not said that it takes more than 1152 bytes.
    assert_eq!(stream.ask("0.03", &format!("ps/plant/long?t={t}"), &[7; 3000]).await.code, "2.04");
    let first = stream.ask("0.01", &format!("ps/plant/long?t={t}"), b"").await;
    assert_eq!((first.payload.len(), first.option(23)), (1024, Some(&[0x0e][..])));
    fixture.stop().await;
}

#[tokio::test]
async fn over_tcp_every_command_arrives_and_a_stop_is_announced() {
    let fixture = Fixture::new();
    let (_, t) = fixture.device("a").await;
    let mut stream = fixture.connect().await;
    stream.request("0.01", b"c", &format!("c?t={t}"), Some(&[]), b"").await;
    assert_eq!(stream.next().await.code, "2.05");
    for n in 0..40 {
        fixture.emit(&format!("dev/a/cmd/{n}/blink"), "now");
    }
    for n in 0..40 {
        let command = stream.next().await;
        let path: Vec<_> = command.options.iter().filter(|(number, _)| *number == LOCATION_PATH).collect();
        assert_eq!(path[1].1, n.to_string().as_bytes());
    }
    fixture.shutdown.cancel();
    // The gateway says goodbye, and the observation ends.
    let mut codes = vec![stream.next().await.code, stream.next().await.code];
    codes.sort();
    assert_eq!(codes, ["5.03", "7.04"]);
    stream.served.await.unwrap();
    fixture.stop().await;
}

#[tokio::test]
async fn over_tcp_what_breaks_the_rules_is_aborted() {
    let fixture = Fixture::new();
    let mut stream = fixture.connect().await;
    // A payload marker without a payload.
    stream.io.write_all(&[0x10, 0x01, 0xff]).await.unwrap();
    assert_eq!(stream.next().await.code, "7.05");
    stream.served.await.unwrap();
    let mut stream = fixture.connect().await;
    stream.send("7.04", b"", &[], b"").await;
    stream.served.await.unwrap();
    fixture.stop().await;
}
