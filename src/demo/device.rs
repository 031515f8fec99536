//! Pretend sensors: one small client per protocol, over real sockets, with real authentication. They know the wire contract and
//! nothing of the gateway's insides.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use coap_lite::{CoapOption, MessageClass, MessageType, Packet as CoapPacket, RequestType, ResponseType};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tidegate_auth::exchange::{ChallengeAnswer, ChallengeRequest, SessionAnswer, SessionRequest};
use tidegate_auth::jwt::{Audience, Claims, NumericDate};
use tidegate_auth::{CbType, ClientNonce, GatewayId, Proto, SecretKey, Transcript, enhanced, jwt, text};
use tidegate_mqtt::{Auth, Subscribe, SubscribeOptions, Version};
use tidegate_mqtt::{
    Connect, Filters, FiltersBuf, Packet, PacketId, Properties, PropertiesBuf, Property, Publish, Qos, Reason,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// What one device was told, and when it last could not send.
#[derive(Default)]
pub struct Tally {
    /// Numbers of the messages that were acknowledged.
    pub acknowledged: Mutex<HashSet<u64>>,
    pub sent: portable_atomic::AtomicU64,
    pub commands: portable_atomic::AtomicU64,
}

/// One pretend sensor.
#[derive(Clone)]
pub struct Device {
    pub id: String,
    pub key: Arc<SecretKey>,
    pub gateway_id: GatewayId,
    pub gateway: SocketAddr,
    pub tally: Arc<Tally>,
    pub every: Duration,
}

impl Device {
    /// Sends readings over MQTT 3.1.1, with a JWT for a password, until the connection ends.
    pub async fn mqtt311(&self) -> io::Result<()> {
        let password = self.jwt()?;
        let mut link = MqttLink::open(self.gateway, Version::V311).await?;
        link.send(&Packet::Connect(Connect {
            version: Version::V311,
            clean_start: true,
            keep_alive: 30,
            properties: Properties::EMPTY,
            client_id: &self.id,
            will: None,
            username: Some(&self.id),
            password: Some(password.as_bytes()),
        }))
        .await?;
        link.expect_connack().await?;
        self.report_over_mqtt(link).await
    }

    /// The same over MQTT 5, proving the key by enhanced authentication.
    pub async fn mqtt5(&self) -> io::Result<()> {
        let mut link = MqttLink::open(self.gateway, Version::V5).await?;
        let client_nonce = nonce()?;
        let key_id = self.key.public().key_id();
        let opening = enhanced::Opening { cb_type: CbType::None, client_nonce, key_id, signature: None }.encode();
        let properties: PropertiesBuf =
            [Property::AuthMethod(enhanced::METHOD), Property::AuthData(&opening)].into_iter().collect();
        link.send(&Packet::Connect(Connect {
            version: Version::V5,
            clean_start: true,
            keep_alive: 30,
            properties: properties.as_properties(),
            client_id: &self.id,
            will: None,
            username: Some(&self.id),
            password: None,
        }))
        .await?;
        let question = link
            .receive(|packet| match packet {
                Packet::Auth(auth) => auth.properties.iter().find_map(|property| match property {
                    Property::AuthData(data) => enhanced::parse_challenge(data),
                    _ => None,
                }),
                _ => None,
            })
            .await?;
        let (challenge, gateway_id) = question.ok_or_else(|| refused("no challenge"))?;
        let transcript = Transcript {
            proto: Proto::Mqtt,
            cb_type: CbType::None,
            gateway_id: &gateway_id,
            device_id: &self.id,
            key_id,
            client_nonce: &client_nonce,
            challenge: &challenge,
            channel_binding: &[],
            ctx: self.id.as_bytes(),
        };
        let signature = transcript.sign(&self.key).map_err(|error| refused(&error.to_string()))?;
        let answer = enhanced::encode_signature(&signature);
        let properties: PropertiesBuf =
            [Property::AuthMethod(enhanced::METHOD), Property::AuthData(&answer)].into_iter().collect();
        link.send(&Packet::Auth(Auth {
            reason: Reason::ContinueAuthentication,
            properties: properties.as_properties(),
        }))
        .await?;
        link.expect_connack().await?;
        self.report_over_mqtt(link).await
    }

    async fn report_over_mqtt(&self, mut link: MqttLink) -> io::Result<()> {
        let mut filters = FiltersBuf::for_subscribe();
        let options = SubscribeOptions { qos: Qos::AtLeastOnce, ..SubscribeOptions::default() };
        filters.push("c/#", options).map_err(|error| refused(&error.to_string()))?;
        let filters: Filters<'_> = filters.as_filters();
        link.send(&Packet::Subscribe(Subscribe {
            packet_id: packet_id(65_535)?,
            properties: Properties::EMPTY,
            filters,
        }))
        .await?;
        let mut ticks = tokio::time::interval(self.every);
        let mut waiting: std::collections::HashMap<PacketId, u64> = std::collections::HashMap::new();
        loop {
            tokio::select! {
                _ = ticks.tick(), if waiting.len() < 32 => {
                    let number = self.next_number();
                    let packet_id = packet_id(number % 60_000 + 1)?;
                    let payload = self.reading(number);
                    waiting.insert(packet_id, number);
                    link.send(&Packet::Publish(Publish {
                        dup: false,
                        qos: Qos::AtLeastOnce,
                        retain: false,
                        topic: "t/climate",
                        packet_id: Some(packet_id),
                        properties: Properties::EMPTY,
                        payload: payload.as_bytes(),
                    })).await?;
                }
                event = link.next(event_of) => match event? {
                    MqttEvent::Acked(id) => {
                        if let Some(number) = waiting.remove(&id) {
                            self.tally.acknowledged.lock().insert(number);
                        }
                    }
                    MqttEvent::Command { id, request } => {
                        self.tally.commands.fetch_add(1, portable_atomic::Ordering::Relaxed);
                        if let Some(packet_id) = id {
                            let ack = tidegate_mqtt::Ack { packet_id, reason: Reason::Success, properties: Properties::EMPTY };
                            link.send(&Packet::Puback(ack)).await?;
                        }
                        let topic = format!("c/res/{request}/200");
                        link.send(&Packet::Publish(Publish {
                            dup: false, qos: Qos::AtMostOnce, retain: false, topic: &topic,
                            packet_id: None, properties: Properties::EMPTY, payload: b"done",
                        })).await?;
                    }
                    MqttEvent::Other => {}
                }
            }
        }
    }

    /// Sends readings as HTTP POSTs with a bearer token from the challenge flow.
    pub async fn http(&self) -> io::Result<()> {
        let stream = TcpStream::connect(self.gateway).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let driver = tokio::spawn(connection);
        let client_nonce = nonce()?;
        let question = ChallengeRequest { device_id: self.id.clone(), client_nonce };
        let question = serde_json::to_vec(&question).map_err(io::Error::other)?;
        let answer: ChallengeAnswer = post_json(&mut sender, "/auth/challenge", question).await?;
        let key_id = self.key.public().key_id();
        let signature = self.sign(Proto::Http, &client_nonce, &answer.challenge)?;
        let proof = SessionRequest {
            device_id: self.id.clone(),
            key_id,
            client_nonce,
            challenge: answer.challenge,
            cb_type: CbType::None,
            signature,
        };
        let proof = serde_json::to_vec(&proof).map_err(io::Error::other)?;
        let session: SessionAnswer = post_json(&mut sender, "/auth/session", proof).await?;
        let bearer = format!("Bearer {}", text::base64url(&session.access_token));
        let mut ticks = tokio::time::interval(self.every);
        loop {
            ticks.tick().await;
            let number = self.next_number();
            let request = hyper::Request::post("/telemetry/climate")
                .header("host", "gateway")
                .header("authorization", &bearer)
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from(self.reading(number))))
                .map_err(io::Error::other)?;
            let answer = sender.send_request(request).await.map_err(io::Error::other)?;
            let status = answer.status();
            answer.into_body().collect().await.map_err(io::Error::other)?;
            if status == hyper::StatusCode::ACCEPTED {
                self.tally.acknowledged.lock().insert(number);
            } else if status == hyper::StatusCode::UNAUTHORIZED {
                driver.abort();
                return Err(refused("the token has expired"));
            }
        }
    }

    /// Sends readings as confirmable CoAP requests with a token from the challenge flow; coap-lite speaks for the device.
    pub async fn coap(&self) -> io::Result<()> {
        let socket = UdpSocket::bind((if self.gateway.is_ipv4() { "127.0.0.1" } else { "::1" }, 0)).await?;
        socket.connect(self.gateway).await?;
        let mut link = CoapLink { socket, message_id: u16::from_be_bytes([nonce()?[0], nonce()?[1]]) };
        let client_nonce = nonce()?;
        let question = ChallengeRequest { device_id: self.id.clone(), client_nonce }.to_cbor();
        let answer = link.request(&["auth", "c"], None, None, question).await?;
        let challenge: [u8; 38] = answer.payload.as_slice().try_into().map_err(|_| refused("no challenge"))?;
        let signature = self.sign(Proto::Coap, &client_nonce, &challenge)?;
        let proof = SessionRequest {
            device_id: self.id.clone(),
            key_id: self.key.public().key_id(),
            client_nonce,
            challenge,
            cb_type: CbType::None,
            signature,
        };
        let answer = link.request(&["auth", "s"], None, None, proof.to_cbor()).await?;
        let session = SessionAnswer::from_cbor(&answer.payload).ok_or_else(|| refused("not let in"))?;
        let token = format!("t={}", text::base64url(&session.access_token));
        let mut ticks = tokio::time::interval(self.every);
        loop {
            ticks.tick().await;
            let number = self.next_number();
            // 50 is application/json in the registry of content formats.
            let answer = link.request(&["t", "climate"], Some(&token), Some(50), self.reading(number).into()).await?;
            match answer.header.code {
                MessageClass::Response(ResponseType::Changed) => {
                    self.tally.acknowledged.lock().insert(number);
                }
                MessageClass::Response(ResponseType::Unauthorized) => return Err(refused("the token has expired")),
                _ => {}
            }
        }
    }

    fn next_number(&self) -> u64 {
        self.tally.sent.fetch_add(1, portable_atomic::Ordering::Relaxed)
    }

    fn reading(&self, number: u64) -> String {
        let celsius = 20.0 + (number as f64 / 10.0).sin() * 4.0;
        format!(r#"{{"device":"{}","n":{number},"celsius":{celsius:.2}}}"#, self.id)
    }

    fn sign(&self, proto: Proto, client_nonce: &ClientNonce, challenge: &[u8]) -> io::Result<tidegate_auth::Signature> {
        let transcript = Transcript {
            proto,
            cb_type: CbType::None,
            gateway_id: &self.gateway_id,
            device_id: &self.id,
            key_id: self.key.public().key_id(),
            client_nonce,
            challenge,
            channel_binding: &[],
            ctx: &[],
        };
        transcript.sign(&self.key).map_err(io::Error::other)
    }

    fn jwt(&self) -> io::Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?.as_secs();
        let claims = Claims {
            iss: self.id.clone(),
            sub: self.id.clone(),
            aud: Audience::One(self.gateway_id.audience()),
            iat: NumericDate(now),
            exp: NumericDate(now + 3600),
            nbf: None,
            jti: text::base64url(&nonce()?),
            nonce: None,
        };
        Ok(jwt::sign(&claims, &self.key))
    }
}

struct MqttLink {
    stream: TcpStream,
    version: Version,
    input: BytesMut,
}

enum MqttEvent {
    Acked(PacketId),
    Command { id: Option<PacketId>, request: String },
    Other,
}

fn event_of(packet: &Packet<'_>) -> MqttEvent {
    match packet {
        Packet::Puback(ack) if !ack.reason.is_error() => MqttEvent::Acked(ack.packet_id),
        // c/REQUEST/NAME
        Packet::Publish(publish) => match publish.topic.split('/').nth(1) {
            Some(request) => MqttEvent::Command { id: publish.packet_id, request: request.to_owned() },
            None => MqttEvent::Other,
        },
        _ => MqttEvent::Other,
    }
}

impl MqttLink {
    async fn open(gateway: SocketAddr, version: Version) -> io::Result<Self> {
        let stream = TcpStream::connect(gateway).await?;
        stream.set_nodelay(true)?;
        Ok(MqttLink { stream, version, input: BytesMut::new() })
    }

    async fn send(&mut self, packet: &Packet<'_>) -> io::Result<()> {
        let mut out = BytesMut::new();
        packet.encode(self.version, &mut out).map_err(|error| refused(&error.to_string()))?;
        self.stream.write_all(&out).await
    }

    /// Reads one packet and hands it to `look`.
    ///
    /// Cancel safe: bytes read stay in `input`.
    async fn next<T>(&mut self, look: impl FnOnce(&Packet<'_>) -> T) -> io::Result<T> {
        loop {
            let decoded = tidegate_mqtt::decode(&self.input, self.version, PACKET_BYTES_MAX)
                .map_err(|error| refused(&error.to_string()))?;
            if let Some((packet, bytes)) = decoded {
                let seen = look(&packet);
                bytes::Buf::advance(&mut self.input, bytes);
                return Ok(seen);
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        }
    }

    async fn receive<T>(&mut self, look: impl FnOnce(&Packet<'_>) -> T) -> io::Result<T> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.next(look)).await?
    }

    async fn expect_connack(&mut self) -> io::Result<()> {
        let accepted = self.receive(|packet| matches!(packet, Packet::Connack(c) if !c.reason.is_error())).await?;
        if accepted { Ok(()) } else { Err(refused("connection refused")) }
    }
}

struct CoapLink {
    socket: UdpSocket,
    message_id: u16,
}

impl CoapLink {
    /// One confirmable POST and its answer, retransmitted as RFC 7252 section 4.2 says; a separate answer is acknowledged.
    async fn request(
        &mut self,
        path: &[&str],
        query: Option<&str>,
        content_format: Option<u8>,
        payload: Vec<u8>,
    ) -> io::Result<CoapPacket> {
        self.message_id = self.message_id.wrapping_add(1);
        let token = self.message_id.to_be_bytes().to_vec();
        let mut packet = CoapPacket::new();
        packet.header.message_id = self.message_id;
        packet.header.set_type(MessageType::Confirmable);
        packet.header.code = MessageClass::Request(RequestType::Post);
        packet.set_token(token.clone());
        for segment in path {
            packet.add_option(CoapOption::UriPath, segment.as_bytes().to_vec());
        }
        if let Some(query) = query {
            packet.add_option(CoapOption::UriQuery, query.as_bytes().to_vec());
        }
        if let Some(format) = content_format {
            packet.add_option(CoapOption::ContentFormat, vec![format]);
        }
        packet.payload = payload;
        let bytes = packet.to_bytes().map_err(|error| refused(&error.to_string()))?;
        let mut buffer = vec![0; 2048];
        let mut timeout = Duration::from_secs(2);
        for _ in 0..5 {
            self.socket.send(&bytes).await?;
            let deadline = tokio::time::Instant::now() + timeout;
            while let Ok(received) = tokio::time::timeout_at(deadline, self.socket.recv(&mut buffer)).await {
                let answer =
                    CoapPacket::from_bytes(&buffer[..received?]).map_err(|error| refused(&error.to_string()))?;
                if answer.get_token() != token || answer.header.code == MessageClass::Empty {
                    continue;
                }
                if answer.header.get_type() == MessageType::Confirmable {
                    let mut ack = CoapPacket::new();
                    ack.header.set_type(MessageType::Acknowledgement);
                    ack.header.code = MessageClass::Empty;
                    ack.header.message_id = answer.header.message_id;
                    self.socket.send(&ack.to_bytes().map_err(|error| refused(&error.to_string()))?).await?;
                }
                return Ok(answer);
            }
            timeout *= 2;
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

type Sender = hyper::client::conn::http1::SendRequest<Full<Bytes>>;

async fn post_json<T: serde::de::DeserializeOwned>(sender: &mut Sender, path: &str, body: Vec<u8>) -> io::Result<T> {
    let request = hyper::Request::post(path)
        .header("host", "gateway")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(io::Error::other)?;
    let answer = sender.send_request(request).await.map_err(io::Error::other)?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
    serde_json::from_slice(&body).map_err(|_| refused(&format!("{path} answered {status}")))
}

fn packet_id(number: u64) -> io::Result<PacketId> {
    u16::try_from(number).ok().and_then(PacketId::new).ok_or_else(|| refused("packet ids are 1 to 65535"))
}

fn nonce() -> io::Result<ClientNonce> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

fn refused(why: &str) -> io::Error {
    io::Error::other(why.to_owned())
}

const PACKET_BYTES_MAX: usize = 65_536;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
