//! HTTP/1.1 and HTTP/2 on hyper: the device API and the mirror of the wire contract, and the request plane for everything else.
//!
//! Promises: 202 only once the delivery class holds; a refusal names the rule or limit to who may know it and nothing to a stranger; every
//! wait has a deadline (idle, head, body, write, outcome); every size has a bound. hyper's own timers are off: [`Deadlined`] does their work
//! without a timer operation per request.
//!
//! Cost of a `POST /telemetry` on a connection in use: one HMAC for the token, one map look-up for the device, no copy of a body that came in one
//! piece, and what the gateway's publish costs.
//!
//! Deliberately not here: what a message means (`gateway`), proofs (`identity`), the WebSocket's frames (`websocket`, which is handed the
//! upgraded stream).

mod body;
mod call;
mod connect;
mod device;
mod device_api;
mod events;
mod foreign;
mod headers;
mod identify;
mod problem;
mod relay;
mod seats;
mod stream;
mod strict;
mod upgrade;

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use http::header::{CONNECTION, HOST, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use portable_atomic::{AtomicU32, AtomicU64, Ordering};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::gateway::{Exchange, Gateway, Limits, wall_ms};
use crate::listener::{Activity, ConnectionInfo, Deadlined, Deadlines, Prefixed, ProtocolName};
use crate::message::{Device, Reject};
use crate::tasks::Tasks;
use crate::telemetry::access_log::{AccessLog, Entry, Pending};
use crate::telemetry::meters;
use body::Body;
use call::{Call, Prefix};
use headers::{Via, Whence};
use problem::Refused;
use seats::Seats;
use stream::{Slot, Verdict};
use strict::Strict;
use upgrade::{Upgrade, Wire};

pub use upgrade::Upgraded;

/// Whether the gateway itself answers a path, with `below` also whatever follows it, so that no route sees it.
pub fn is_own_path(device_api_prefix: &str, path: &str, below: bool) -> bool {
    Prefix::new(device_api_prefix).strip(path).is_some_and(|path| call::is_own(path, below))
}

/// What all HTTP connections of the gateway share.
#[derive(Debug)]
pub struct Shared {
    prefix: Prefix,
    streams: events::Streams,
    /// Proxied requests under way.
    in_flight: Arc<AtomicU32>,
    names: AtomicU64,
    /// Where the request ids of this process begin.
    request_ids: u64,
    /// The gateway's name in `Via`, with enough of its id to tell two of one name apart.
    via: Via,
    access_log: Option<Arc<AccessLog>>,
}

impl Shared {
    pub fn new(gateway: &Gateway, access_log: Option<Arc<AccessLog>>) -> Self {
        let id = gateway.identity.gateway_id_hex();
        let mut seed = [0; 8];
        // Without randomness ids are still told apart within the process.
        let _ = getrandom::fill(&mut seed);
        Shared {
            prefix: Prefix::new(&gateway.config().device_api_prefix),
            streams: Arc::default(),
            in_flight: Arc::default(),
            names: AtomicU64::new(1),
            request_ids: u64::from_ne_bytes(seed),
            via: Via::new(format!("{}-{}", gateway.config().name, id.get(..8).unwrap_or_default())),
            access_log,
        }
    }

    /// Sixteen hex digits that no other request of this process has.
    fn next_request_id(&self) -> HeaderValue {
        // Steele, Lea and Flood's SplitMix64: a bijection, so counting never repeats, and neighbours look unrelated.
        let mut z = self.request_ids.wrapping_add(self.next_name().wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let digits: [u8; 16] = std::array::from_fn(|at| {
            let digit = (z >> (60 - 4 * at)) & 0xF;
            HEX.get(digit as usize).copied().unwrap_or(b'0')
        });
        HeaderValue::from_bytes(&digits).unwrap_or_else(|_| HeaderValue::from_static("-"))
    }

    /// One of the proxied requests that may be under way at once.
    ///
    /// # Errors
    /// [`Reject::Full`].
    fn request_slot(&self, requests_max: u32) -> Result<Slot, Reject> {
        Slot::take(&self.in_flight, "requests_in_flight_max", requests_max, Duration::from_secs(1))
    }

    fn next_name(&self) -> u64 {
        self.names.fetch_add(1, Ordering::Relaxed)
    }
}

/// What a connection is served with.
#[derive(Clone)]
pub struct Context {
    pub gateway: Arc<Gateway>,
    pub shared: Arc<Shared>,
    /// The worker's own way to the upstreams; `None` where there are none.
    pub exchange: Option<Arc<dyn Exchange>>,
}

/// What became known of a request on its way, for the answer and the access log.
#[derive(Default)]
struct Facts {
    /// Who has proved to be it, and may learn why something is refused.
    device: Option<Arc<Device>>,
    route: Option<Arc<str>>,
    endpoint: Option<Arc<str>>,
    upstream: Option<Duration>,
    request_id: Option<HeaderValue>,
    cache: Option<&'static str>,
    /// Of a body that was passed on.
    upload: Option<Arc<Verdict>>,
}

/// One connection.
struct Connection {
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    exchange: Option<Arc<dyn Exchange>>,
    conn: ConnectionInfo,
    whence: Whence,
    limits: Limits,
    activity: Arc<Activity>,
    seats: Seats,
    upgrade: Upgrade,
    shutdown: CancellationToken,
}

/// Serves an HTTP/1.1 connection. When the client asked for MQTT over WebSocket, gives back the stream that is one from then on.
pub async fn serve_http1<IO>(
    io: IO,
    prefix: BytesMut,
    conn: ConnectionInfo,
    context: Context,
    shutdown: CancellationToken,
) -> Option<Upgraded<IO>>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = Connection::new(conn, context, shutdown.clone());
    let limits = &connection.limits;
    let head = Some(millis(limits.header_timeout_ms));
    let header_bytes_max = limits.header_bytes_max as usize;
    let mut http = http1::Builder::new();
    http.header_read_timeout(None::<Duration>)
        .max_headers(limits.headers_max as usize)
        .max_header_size(header_bytes_max)
        .max_buf_size(header_bytes_max.max(HTTP1_BUFFER_BYTES_MIN));
    // The type is the one that an upgrade takes back.
    let io: Wire<IO> = TokioIo::new(Strict::new(connection.bounded(io, prefix, head), connection.upgrade.fate()));
    let service = connection.clone();
    let service = service_fn(move |request| {
        let connection = service.clone();
        async move { Ok::<_, Infallible>(connection.answer(request).await) }
    });
    let mut serving = pin!(http.serve_connection(io, service).with_upgrades());
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = shutdown.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    note_end(ended);
    connection.upgrade.finish(&shutdown).await
}

/// Serves an HTTP/2 connection.
pub async fn serve_http2<IO>(
    io: IO,
    prefix: BytesMut,
    conn: ConnectionInfo,
    context: Context,
    shutdown: CancellationToken,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = Connection::new(conn, context, shutdown.clone());
    let limits = &connection.limits;
    let mut http = http2::Builder::new(Streams(Tasks::new(shutdown.child_token())));
    http.max_concurrent_streams(limits.http2_streams_max)
        .max_header_list_size(limits.header_bytes_max)
        .initial_stream_window_size(limits.http2_stream_window_bytes)
        .initial_connection_window_size(limits.http2_connection_window_bytes)
        .max_send_buf_size(limits.http2_send_buffer_bytes as usize)
        // Rapid reset (CVE-2023-44487) and its kin end the connection at these counts.
        .max_pending_accept_reset_streams(limits.http2_resets_max as usize)
        .max_local_error_reset_streams(limits.http2_resets_max as usize);
    let io = TokioIo::new(connection.bounded(io, prefix, None));
    let service = connection.clone();
    let service = service_fn(move |request| {
        let connection = service.clone();
        async move { Ok::<_, Infallible>(connection.answer(request).await) }
    });
    let mut serving = pin!(http.serve_connection(io, service));
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = shutdown.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    note_end(ended);
}

/// A peer that goes away is its own affair; what is malformed is counted.
fn note_end(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        if error.is_parse() {
            meters().http.malformed.increment(1);
        }
        tracing::debug!(%error, "http connection ended");
    }
}

impl Connection {
    fn new(conn: ConnectionInfo, context: Context, shutdown: CancellationToken) -> Arc<Self> {
        let Context { gateway, shared, exchange } = context;
        Arc::new(Connection {
            limits: gateway.limits(),
            // Unique, so that a port used again takes nothing over from a connection that is still closing.
            seats: Seats::new(format!("{}#{}", conn.peer, shared.next_name())),
            gateway,
            shared,
            exchange,
            whence: Whence::new(conn.peer.ip(), conn.tls.is_some()),
            conn,
            activity: Arc::default(),
            upgrade: Upgrade::default(),
            shutdown,
        })
    }

    fn bounded<IO>(&self, io: IO, prefix: BytesMut, head: Option<Duration>) -> Deadlined<Prefixed<IO>> {
        let deadlines =
            Deadlines { idle: self.limits.idle_timeout.0, head, write: millis(self.limits.write_timeout_ms) };
        Deadlined::new(Prefixed::new(prefix, io), deadlines, self.activity.clone())
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let began = Instant::now();
        let under_way = self.activity.begin();
        let mut facts = Facts::default();
        let log = self.shared.access_log.as_ref().map(|log| log.note(self.entry(&request), began));
        let is_http2 = request.version() == Version::HTTP_2;
        let mut response = match self.act(request, &mut facts).await {
            Ok(response) => response,
            Err(refused) => refused.response(facts.device.is_some()),
        };
        // RFC 9112 section 9.6: hyper closes where it has not read a body to its end, and the client is to know before it sends the next request.
        let is_cut = facts.upload.as_ref().is_some_and(|upload| !upload.is_whole());
        if is_cut && !is_http2 && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        meters().request(response.status().as_u16(), began.elapsed());
        if let Some(log) = log {
            facts.complete(log, &mut response);
        }
        drop(under_way);
        response
    }

    async fn act(&self, request: Request<Incoming>, facts: &mut Facts) -> Result<Response<Body>, Refused> {
        // RFC 9112 section 3.2: none, or more than one, is answered 400.
        if request.version() == Version::HTTP_11 && request.headers().get_all(HOST).iter().count() != 1 {
            return Err(Reject::Malformed { what: "one Host header is required" }.into());
        }
        if !headers::is_host_unambiguous(request.version(), request.uri(), request.headers()) {
            return Err(Reject::Malformed { what: "a host that programs read differently" }.into());
        }
        let listener = &self.conn.listener;
        if listener.speaks(ProtocolName::Websocket) && upgrade::is_for_mqtt(&request) {
            return self.upgrade.begin(request).ok_or(Refused::NoRoute);
        }
        if !listener.speaks(ProtocolName::Http) {
            return Err(Refused::UpgradeRequired);
        }
        if request.method() == Method::CONNECT {
            return self.connect(request, facts).await;
        }
        let uri = request.uri();
        let below = self.shared.prefix.strip(uri.path());
        if let Some(target) = below.and_then(device::Target::parse) {
            return self.ask_device(request, target, facts).await;
        }
        let uri = request.uri();
        let events = device_api::wants_events(request.headers());
        let call = below.and_then(|path| call::parse(request.method(), path, uri.query(), events));
        let Some(call) = call else { return self.relay(request, facts).await };
        if let Ok(call @ (Call::Challenge | Call::Session | Call::Token)) = &call {
            let body = self.body(request.into_body(), "body_bytes_max", identify::BODY_BYTES_MAX).await?;
            return Ok(match call {
                Call::Token => identify::oauth(&self.gateway, &self.conn, &body),
                _ => identify::exchange(&self.gateway, &self.conn, call, &body),
            });
        }
        let device = self.caller(request.headers())?;
        facts.device.clone_from(&device);
        match call? {
            Call::Publish { target, qos, retain } => {
                let headers = request.headers().clone();
                let body =
                    self.body(request.into_body(), "packet_bytes_max", self.limits.packet_bytes_max as usize).await?;
                let draft = device_api::draft(&headers, body, qos, retain)?;
                self.publish(device, &target, draft).await
            }
            Call::Read { target } => self.read(device, &target, request.headers()).await,
            Call::Follow { filter } => self.follow(device, &filter).await,
            Call::Command { wait } => self.command(device, wait).await,
            Call::Challenge | Call::Session | Call::Token => Err(Refused::NoRoute),
        }
    }

    fn entry(&self, request: &Request<Incoming>) -> Entry {
        Entry {
            time_ms: wall_ms(),
            peer: self.conn.peer.ip().to_canonical(),
            device: None,
            method: request.method().clone(),
            version: match request.version() {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_2 => "HTTP/2.0",
                _ => "HTTP/1.1",
            },
            host: headers::host(request.uri(), request.headers()).map(str::to_owned),
            target: match request.method() {
                &Method::CONNECT => request.uri().to_string(),
                _ => request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
            },
            status: 0,
            route: None,
            endpoint: None,
            upstream: None,
            request_id: None,
            cache: None,
        }
    }

    /// A refused stranger costs its address a token, so that guessing is slow, and is counted.
    fn stranger(&self, reject: Reject) -> Refused {
        let refused = self.gateway.admit_address(self.conn.peer.ip(), Instant::now()).err().unwrap_or(reject);
        meters().http.reject(&refused);
        refused.into()
    }

    async fn body(&self, body: Incoming, limit: &'static str, bytes_max: usize) -> Result<bytes::Bytes, Refused> {
        body::read(body, limit, bytes_max, millis(self.limits.body_timeout_ms)).await
    }
}

impl Facts {
    /// Completes a line of the access log, and writes it or lets the body do so at its end.
    fn complete(self, mut log: Pending, response: &mut Response<Body>) {
        let entry = &mut log.entry;
        entry.status = response.status().as_u16();
        entry.device = self.device.map(|device| device.id.clone());
        entry.route = self.route;
        entry.endpoint = self.endpoint;
        entry.upstream = self.upstream;
        entry.cache = self.cache;
        entry.request_id = self.request_id.and_then(|id| id.to_str().ok().map(str::to_owned));
        match response.body_mut() {
            Body::Download(download) => download.log_at_end(log),
            Body::Full(bytes) => {
                let bytes = bytes.len() as u64;
                log.write(bytes);
            }
            Body::Empty | Body::Events(_) => log.write(0),
        }
    }
}

/// Runs the streams of one HTTP/2 connection as tracked tasks.
#[derive(Clone)]
struct Streams(Tasks);

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn("http2-stream", async move {
            let _ = future.await;
        });
    }
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

/// What hyper insists on.
const HTTP1_BUFFER_BYTES_MIN: usize = 8192;
const HEX: &[u8; 16] = b"0123456789abcdef";
