//! The adapter over loopback UDP, with a real gateway, registry and spool behind it, and coap-lite as the other side.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coap_lite::{CoapOption, MessageClass, MessageType, Packet, RequestType, ResponseType};
use tidegate_auth::exchange::{ChallengeRequest, SessionAnswer, SessionRequest};
use tidegate_auth::{CbType, Proto, SecretKey, Transcript, text};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use super::{Context, serve_datagrams};
use crate::gateway::{Gateway, Limits, Routes};
use crate::identity::Registry;
use crate::listener::tests::fixture::{Plan, emit, key, random};
use crate::listener::{Config as ListenerConfig, Listener, Relay, TransportKind};
use crate::message::DeviceId;

mod observe;
mod proxy;
mod registration;
mod requests;
mod tcp;

const RULES: &str = r##"[
    {"name": "own space", "who": ["role:sensor"], "do": ["publish", "subscribe", "read"], "on": ["dev/{device}/#"]},
    {"name": "operators", "who": ["role:operator"], "do": ["publish", "subscribe", "read", "command"], "on": ["dev/#", "plant/#"]},
    {"name": "not there", "effect": "deny", "who": ["anyone"], "do": ["publish"], "on": ["plant/forbidden"]},
    {"name": "reads the api", "who": ["role:sensor"], "do": ["GET", "POST"], "on": ["/api/{device}/*"]},
    {"name": "small", "who": ["role:operator"], "do": ["publish"], "on": ["small/#"], "bytes_max": 4}
]"##;

struct Fixture {
    gateway: Arc<Gateway>,
    address: SocketAddr,
    shutdown: CancellationToken,
    served: tokio::task::JoinHandle<()>,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Fixture::with(|_| {}, &[])
    }

    /// `sinks` are topic patterns of class `disk`.
    fn with(adjust: impl FnOnce(&mut Limits), sinks: &[&str]) -> Self {
        let mut plan = Plan { rules: RULES, sinks, ..Plan::default() };
        adjust(&mut plan.limits);
        Fixture::start(plan, None)
    }

    /// With routes, along which `relay` answers.
    fn with_routes(routes: Routes, relay: Arc<dyn Relay>) -> Self {
        Fixture::start(Plan { rules: RULES, routes, ..Plan::default() }, Some(relay))
    }

    fn start(plan: Plan<'_>, relay: Option<Arc<dyn Relay>>) -> Self {
        let (gateway, folder) = plan.start();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = socket.local_addr().unwrap();
        let config = ListenerConfig { name: "coap".into(), transport: TransportKind::Udp, ..Default::default() };
        let shutdown = CancellationToken::new();
        let context = Context { gateway: gateway.clone(), relay };
        let serving = serve_datagrams(socket, Arc::new(Listener::new(config).unwrap()), context, shutdown.clone());
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
        let client_nonce = random();
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
        emit(&self.gateway, topic, payload, true);
    }

    /// Shuts down and waits until all is answered.
    async fn stop(self) {
        self.shutdown.cancel();
        self.served.await.unwrap();
    }
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
