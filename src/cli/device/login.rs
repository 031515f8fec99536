//! `tidegate device login`: the challenge flow of HTTP or CoAP from the device's side; prints the bearer token.
//!
//! It needs no clock and works for both protocols, because a token is good for the protocol that issued it alone.

use std::net::{SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use coap_lite::{CoapOption, MessageClass, MessageType, Packet, RequestType, ResponseType};
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tidegate_auth::challenge::CHALLENGE_BYTES;
use tidegate_auth::exchange::{ChallengeAnswer, ChallengeRequest, SessionAnswer, SessionRequest};
use tidegate_auth::{CbType, Challenge, ClientNonce, GatewayId, Proto, PublicKey, SecretKey, Transcript, text};

use super::key_file::{KeyFile, Target, no_gateway};
use super::{Context, Failure, Site, device_id, random};
use crate::message::DeviceId;
use crate::tls;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    id: String,
    /// The device's private key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// `http://HOST:PORT[/PREFIX]`, `https://...` or `coap://HOST[:PORT]` [default: this machine's gateway].
    #[arg(long)]
    url: Option<String>,
    /// The gateway's id, or its gateway.pub [default: as the key file says, else this machine's gateway].
    #[arg(long, value_name = "ID|FILE")]
    gateway: Option<String>,
    /// For https: certificate authority in PEM [default: those of the platform].
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

pub(super) fn run(
    context: &Context,
    site: &impl Fn() -> Result<Site, Failure>,
    arguments: &Arguments,
) -> Result<(), Failure> {
    let id = device_id(&arguments.id)?;
    let key_file = KeyFile::read(&arguments.key)?;
    let target = Target::find(arguments.gateway.as_deref(), &key_file, site)?;
    let url = match &arguments.url {
        Some(url) => url.clone(),
        None => {
            site()?.endpoints.login_url().ok_or_else(|| Failure::usage("no HTTP or CoAP listener here; give --url"))?
        }
    };
    let uri: Uri = url.parse().map_err(|error| Failure::usage(format!("--url {url}: {error}")))?;
    let device = Device { id, secret: key_file.secret, client_nonce: random()?, target };
    let session = match uri.scheme_str() {
        Some("http" | "https") => http_login(&device, &uri, arguments.ca.clone())?,
        Some("coap") => coap_login(&device, &uri)?,
        Some(_) | None => return Err(Failure::usage(format!("--url {url}: allowed: http, https, coap"))),
    };
    let token = text::base64url(&session.answer.access_token);
    if context.json {
        return context.print_json(&json!({
            "token": token,
            "expires_in": session.answer.expires_in,
            "gateway_verified": session.gateway_verified,
        }));
    }
    context.print(&format!("{token}\n"))
}

/// The device's side of one login.
struct Device {
    id: DeviceId,
    secret: SecretKey,
    client_nonce: ClientNonce,
    target: Option<Target>,
}

/// A login that went well.
struct Session {
    answer: SessionAnswer,
    /// Whether the gateway proved the key that was expected of it; false if none was.
    gateway_verified: bool,
}

impl Device {
    fn ask(&self) -> ChallengeRequest {
        ChallengeRequest { device_id: self.id.as_str().to_owned(), client_nonce: self.client_nonce }
    }

    fn transcript<'a>(&'a self, proto: Proto, gateway_id: &'a GatewayId, challenge: &'a Challenge) -> Transcript<'a> {
        Transcript {
            proto,
            cb_type: CbType::None,
            gateway_id,
            device_id: self.id.as_str(),
            key_id: self.secret.public().key_id(),
            client_nonce: &self.client_nonce,
            challenge,
            channel_binding: &[],
            ctx: &[],
        }
    }

    fn prove(&self, proto: Proto, gateway_id: &GatewayId, challenge: &Challenge) -> Result<SessionRequest, Failure> {
        let transcript = self.transcript(proto, gateway_id, challenge);
        Ok(SessionRequest {
            device_id: self.id.as_str().to_owned(),
            key_id: transcript.key_id,
            client_nonce: self.client_nonce,
            challenge: *challenge,
            cb_type: CbType::None,
            signature: transcript.sign(&self.secret).map_err(|error| Failure::fault(error.to_string()))?,
        })
    }

    /// Checks the gateway's proof, if its key is known.
    fn conclude(
        &self,
        proto: Proto,
        gateway_id: &GatewayId,
        request: &SessionRequest,
        answer: SessionAnswer,
    ) -> Result<Session, Failure> {
        let Some(key) = self.target.as_ref().and_then(|target| target.key) else {
            return Ok(Session { answer, gateway_verified: false });
        };
        let transcript = self.transcript(proto, gateway_id, &request.challenge);
        let proved = |key: &PublicKey| {
            answer.gateway_signature.is_some_and(|proof| transcript.verify_gateway(key, &request.signature, &proof))
        };
        if !proved(&key) {
            return Err(Failure::input("the gateway did not prove that it is the one this device belongs to")
                .help("is something between you and it? do not use the network as it is"));
        }
        Ok(Session { answer, gateway_verified: true })
    }
}

// HTTP.

fn http_login(device: &Device, uri: &Uri, ca: Option<PathBuf>) -> Result<Session, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::unavailable(format!("cannot start: {error}")))?;
    runtime.block_on(async {
        let ask = serde_json::to_vec(&device.ask()).map_err(|error| Failure::fault(error.to_string()))?;
        let body = post(uri, "/auth/challenge", ask, ca.clone()).await?;
        let answer: ChallengeAnswer = read_json(&body)?;
        if let Some(target) = &device.target
            && target.id != answer.gateway_id
        {
            let what = format!("{uri} is gateway {}, and the device belongs to {}", answer.gateway_id, target.id);
            return Err(Failure::input(what).help("give --gateway with the right id, or another --url"));
        }
        let request = device.prove(Proto::Http, &answer.gateway_id, &answer.challenge)?;
        let body = serde_json::to_vec(&request).map_err(|error| Failure::fault(error.to_string()))?;
        let body = post(uri, "/auth/session", body, ca).await?;
        device.conclude(Proto::Http, &answer.gateway_id, &request, read_json(&body)?)
    })
}

fn read_json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| Failure::input(format!("the answer is not a gateway's: {error}")))
}

/// One request on one connection; the body of a 200.
async fn post(base: &Uri, path: &str, body: Vec<u8>, ca: Option<PathBuf>) -> Result<Vec<u8>, Failure> {
    let host = base.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let is_tls = base.scheme_str() == Some("https");
    let port = base.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let target = format!("{}{path}", base.path().trim_end_matches('/'));
    let unreachable = |error: &dyn std::fmt::Display| {
        Failure::unavailable(format!("cannot reach {base}: {error}")).help("is the gateway running there?")
    };
    let request = Request::post(target)
        .header("host", base.authority().map_or(host, http::uri::Authority::as_str))
        .header("content-type", "application/json")
        .body(Full::new(bytes::Bytes::from(body)))
        .map_err(|error| Failure::usage(format!("--url {base}: {error}")))?;
    let exchange = async {
        let stream = tokio::net::TcpStream::connect((host, port)).await.map_err(|error| unreachable(&error))?;
        if !is_tls {
            return send(stream, request, &unreachable).await;
        }
        let config = tls::ClientConfig { ca_file: ca, ..tls::ClientConfig::default() };
        let client = tls::Client::new(&config).map_err(|error| Failure::input(error.to_string()))?;
        let (stream, _) = client.connect(host, stream).await.map_err(|error| unreachable(&error))?;
        send(stream, request, &unreachable).await
    };
    let answer = tokio::time::timeout(DEADLINE, exchange).await;
    let (status, body) = answer.map_err(|_| unreachable(&"no answer in time"))??;
    if status == http::StatusCode::OK {
        return Ok(body);
    }
    Err(refused(&status.to_string()))
}

async fn send<IO>(
    stream: IO,
    request: Request<Full<bytes::Bytes>>,
    unreachable: &impl Fn(&dyn std::fmt::Display) -> Failure,
) -> Result<(http::StatusCode, Vec<u8>), Failure>
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| unreachable(&error))?;
    // The sender goes with the exchange; then the connection, which drives it, ends too.
    let exchange = async move {
        let answer = sender.send_request(request).await.map_err(|error| unreachable(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok((status, body.map_err(|error| unreachable(&error))?.to_bytes().to_vec()))
    };
    let (outcome, _) = tokio::join!(exchange, connection);
    outcome
}

// CoAP.

fn coap_login(device: &Device, uri: &Uri) -> Result<Session, Failure> {
    // The answer to the question carries no gateway id: nothing larger than the question goes to an address that may be forged.
    let gateway_id = device.target.as_ref().ok_or_else(no_gateway)?.id;
    let mut client = CoapClient::connect(uri)?;
    let challenge = client.post(["auth", "c"], device.ask().to_cbor(), ResponseType::Content)?;
    let challenge: [u8; CHALLENGE_BYTES] =
        challenge.try_into().map_err(|_| Failure::input("the answer is not a gateway's challenge"))?;
    let request = device.prove(Proto::Coap, &gateway_id, &challenge)?;
    let answer = client.post(["auth", "s"], request.to_cbor(), ResponseType::Changed)?;
    let answer = SessionAnswer::from_cbor(&answer).ok_or_else(|| Failure::input("the answer is not a gateway's"))?;
    device.conclude(Proto::Coap, &gateway_id, &request, answer)
}

/// One request at a time over UDP, retransmitted as RFC 7252 section 4.2 says.
struct CoapClient {
    socket: UdpSocket,
    peer: SocketAddr,
    message_id: u16,
}

impl CoapClient {
    fn connect(uri: &Uri) -> Result<Self, Failure> {
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let unreachable = |error: std::io::Error| Failure::unavailable(format!("cannot reach {uri}: {error}"));
        let mut addresses = (host, uri.port_u16().unwrap_or(5683)).to_socket_addrs().map_err(unreachable)?;
        let peer = addresses.next().ok_or_else(|| Failure::unavailable(format!("{host} has no address")))?;
        let any: SocketAddr = if peer.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let socket =
            UdpSocket::bind(any).and_then(|socket| socket.connect(peer).map(|()| socket)).map_err(unreachable)?;
        Ok(CoapClient { socket, peer, message_id: u16::from_be_bytes(random()?) })
    }

    /// The payload of the answer, if it has the code that is expected.
    fn post(&mut self, path: [&str; 2], payload: Vec<u8>, expected: ResponseType) -> Result<Vec<u8>, Failure> {
        self.message_id = self.message_id.wrapping_add(1);
        let token = random::<4>()?.to_vec();
        let mut request = Packet::new();
        request.header.set_type(MessageType::Confirmable);
        request.header.code = MessageClass::Request(RequestType::Post);
        request.header.message_id = self.message_id;
        request.set_token(token.clone());
        for segment in path {
            request.add_option(CoapOption::UriPath, segment.as_bytes().to_vec());
        }
        request.add_option(CoapOption::ContentFormat, vec![CBOR]);
        request.payload = payload;
        let request =
            request.to_bytes().map_err(|error| Failure::fault(format!("cannot encode a request: {error}")))?;
        let answer = self.exchange(&request, &token)?;
        if answer.header.code == MessageClass::Response(expected) {
            return Ok(answer.payload);
        }
        Err(refused(&answer.header.get_code()))
    }

    fn exchange(&self, request: &[u8], token: &[u8]) -> Result<Packet, Failure> {
        let unreachable = |why: &dyn std::fmt::Display| {
            Failure::unavailable(format!("cannot reach coap://{}: {why}", self.peer))
                .help("is the gateway running there?")
        };
        let mut wait = ACK_TIMEOUT;
        let mut acknowledged = false;
        for _ in 0..=MAX_RETRANSMIT {
            if !acknowledged {
                self.socket.send(request).map_err(|error| unreachable(&error))?;
            }
            let deadline = Instant::now() + wait;
            while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                self.socket.set_read_timeout(Some(left)).map_err(|error| unreachable(&error))?;
                let mut buffer = [0; 1500];
                let received = match self.socket.recv(&mut buffer) {
                    Ok(length) => buffer.get(..length).unwrap_or_default(),
                    Err(error)
                        if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
                    {
                        break;
                    }
                    Err(error) => return Err(unreachable(&error)),
                };
                let Ok(answer) = Packet::from_bytes(received) else { continue };
                match answer.header.code {
                    MessageClass::Response(_) if answer.get_token() == token => {
                        self.acknowledge(&answer);
                        return Ok(answer);
                    }
                    MessageClass::Empty if answer.header.message_id == self.message_id => {
                        if answer.header.get_type() == MessageType::Reset {
                            return Err(unreachable(&"it does not speak CoAP there"));
                        }
                        acknowledged = true;
                    }
                    _ => {}
                }
            }
            wait = wait.saturating_mul(2);
        }
        Err(unreachable(&"no answer in time"))
    }

    /// A separate response is confirmed (RFC 7252 section 5.2.2), or it would come again.
    fn acknowledge(&self, answer: &Packet) {
        if answer.header.get_type() != MessageType::Confirmable {
            return;
        }
        let mut empty = Packet::new();
        empty.header.set_type(MessageType::Acknowledgement);
        empty.header.code = MessageClass::Empty;
        empty.header.message_id = answer.header.message_id;
        if let Ok(bytes) = empty.to_bytes() {
            let _ = self.socket.send(&bytes);
        }
    }
}

fn refused(status: &str) -> Failure {
    Failure::input(format!("the gateway refused the login ({status})")).help(
        "it does not say why; check on it that `tidegate device show` lists the device as enabled and with this key",
    )
}

const DEADLINE: Duration = Duration::from_secs(15);
const ANSWER_BYTES_MAX: usize = 65_536;
const ACK_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_RETRANSMIT: u32 = 3;
/// Content-Format of CBOR.
const CBOR: u8 = 60;
