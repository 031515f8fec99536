//! HTTP/1.1 and HTTP/2 on hyper: the device API and the mirror of the wire contract.
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
mod device_api;
mod events;
mod identify;
mod problem;
mod seats;
mod upgrade;

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use http::header::HOST;
use http::{Request, Response, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use portable_atomic::{AtomicU32, AtomicU64, Ordering};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::gateway::{Gateway, Limits};
use crate::listener::{Activity, ConnectionInfo, Deadlined, Deadlines, Prefixed, ProtocolName};
use crate::message::Reject;
use crate::tasks::Tasks;
use crate::telemetry::meters;
use body::Body;
use call::{Call, Prefix};
use problem::Refused;
use seats::Seats;
use upgrade::Upgrade;

pub use upgrade::Upgraded;

/// What all HTTP connections of the gateway share.
#[derive(Debug)]
pub struct Shared {
    prefix: Prefix,
    streams: events::Streams,
    names: AtomicU64,
}

impl Shared {
    pub fn new(gateway: &Gateway) -> Self {
        Shared {
            prefix: Prefix::new(&gateway.config().device_api_prefix),
            streams: Arc::new(AtomicU32::new(0)),
            names: AtomicU64::new(1),
        }
    }

    fn next_name(&self) -> u64 {
        self.names.fetch_add(1, Ordering::Relaxed)
    }
}

/// One connection.
struct Connection {
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    conn: ConnectionInfo,
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
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
) -> Option<Upgraded>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = Connection::new(conn, gateway, shared, shutdown.clone());
    let limits = &connection.limits;
    let head = Some(millis(limits.header_timeout_ms));
    let header_bytes_max = limits.header_bytes_max as usize;
    let mut http = http1::Builder::new();
    http.header_read_timeout(None::<Duration>)
        .max_headers(limits.headers_max as usize)
        .max_header_size(header_bytes_max)
        .max_buf_size(header_bytes_max.max(HTTP1_BUFFER_BYTES_MIN));
    let io = connection.bounded(io, prefix, head);
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
    connection.upgrade.finish().await
}

/// Serves an HTTP/2 connection.
pub async fn serve_http2<IO>(
    io: IO,
    prefix: BytesMut,
    conn: ConnectionInfo,
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = Connection::new(conn, gateway, shared, shutdown.clone());
    let limits = &connection.limits;
    let mut http = http2::Builder::new(Streams(Tasks::new(shutdown.child_token())));
    http.max_concurrent_streams(limits.http2_streams_max)
        .max_header_list_size(limits.header_bytes_max)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(HTTP2_SEND_BUFFER_BYTES)
        // Rapid reset (CVE-2023-44487) and its kin end the connection at these counts.
        .max_pending_accept_reset_streams(HTTP2_RESETS_MAX)
        .max_local_error_reset_streams(HTTP2_RESETS_MAX);
    let io = connection.bounded(io, prefix, None);
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
    fn new(conn: ConnectionInfo, gateway: Arc<Gateway>, shared: Arc<Shared>, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Connection {
            limits: gateway.limits(),
            // Unique, so that a port used again takes nothing over from a connection that is still closing.
            seats: Seats::new(format!("{}#{}", conn.peer, shared.next_name())),
            gateway,
            shared,
            conn,
            activity: Arc::default(),
            upgrade: Upgrade::default(),
            shutdown,
        })
    }

    fn bounded<IO>(&self, io: IO, prefix: BytesMut, head: Option<Duration>) -> TokioIo<Deadlined<Prefixed<IO>>> {
        let deadlines =
            Deadlines { idle: self.limits.idle_timeout.0, head, write: millis(self.limits.write_timeout_ms) };
        TokioIo::new(Deadlined::new(Prefixed::new(prefix, io), deadlines, self.activity.clone()))
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let began = Instant::now();
        let under_way = self.activity.begin();
        let mut known = false;
        let response = match self.act(request, &mut known).await {
            Ok(response) => response,
            Err(refused) => refused.response(known),
        };
        meters().request(response.status().as_u16(), began.elapsed());
        drop(under_way);
        response
    }

    async fn act(&self, request: Request<Incoming>, known: &mut bool) -> Result<Response<Body>, Refused> {
        // RFC 9112 section 3.2: none, or more than one, is answered 400.
        if request.version() == Version::HTTP_11 && request.headers().get_all(HOST).iter().count() != 1 {
            return Err(Reject::Malformed { what: "one Host header is required" }.into());
        }
        let listener = &self.conn.listener;
        if listener.speaks(ProtocolName::Websocket) && upgrade::is_websocket(&request) {
            if let Some(response) = self.upgrade.begin(request) {
                return Ok(response);
            }
            return Err(Refused::NoRoute);
        }
        if !listener.speaks(ProtocolName::Http) {
            return Err(Refused::UpgradeRequired);
        }
        let uri = request.uri();
        let below = self.shared.prefix.strip(uri.path());
        let events = device_api::wants_events(request.headers());
        let call = below.and_then(|path| call::parse(request.method(), path, uri.query(), events));
        let call = match call {
            None => {
                self.gateway.admit_address(self.conn.peer.ip(), Instant::now())?;
                return Err(Refused::NoRoute);
            }
            Some(call) => call,
        };
        if let Ok(call @ (Call::Challenge | Call::Session | Call::Token)) = &call {
            let body = self.body(request, "body_bytes_max", identify::BODY_BYTES_MAX).await?;
            return Ok(match call {
                Call::Token => identify::oauth(&self.gateway, &self.conn, &body),
                _ => identify::exchange(&self.gateway, &self.conn, call, &body),
            });
        }
        let device = match identify::identify(&self.gateway, &self.conn, request.headers()) {
            Ok(device) => device,
            Err(reject) => return Err(self.stranger(reject)),
        };
        if device.is_none()
            && let Err(reject) = self.gateway.anonymous_role()
        {
            return Err(self.stranger(reject));
        }
        *known = device.is_some();
        match call? {
            Call::Publish { target, qos, retain } => {
                let headers = request.headers().clone();
                let body = self.body(request, "packet_bytes_max", self.limits.packet_bytes_max as usize).await?;
                let draft = device_api::draft(&headers, body, qos, retain)?;
                self.publish(device, &target, draft).await
            }
            Call::Read { target } => self.read(device, &target, request.headers()).await,
            Call::Follow { filter } => self.follow(device, &filter).await,
            Call::Command { wait } => self.command(device, wait).await,
            Call::Challenge | Call::Session | Call::Token => Err(Refused::NoRoute),
        }
    }

    /// A refused stranger costs its address a token, so that guessing is slow, and is counted.
    fn stranger(&self, reject: Reject) -> Refused {
        let refused = self.gateway.admit_address(self.conn.peer.ip(), Instant::now()).err().unwrap_or(reject);
        meters().http.reject(&refused);
        refused.into()
    }

    async fn body(
        &self,
        request: Request<Incoming>,
        limit: &'static str,
        bytes_max: usize,
    ) -> Result<bytes::Bytes, Refused> {
        body::read(request.into_body(), limit, bytes_max, millis(self.limits.body_timeout_ms)).await
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
/// Bytes that one stream, and all streams of a connection, may send ahead of what is read (RFC 9113 section 5.2).
const HTTP2_STREAM_WINDOW_BYTES: u32 = 65_535;
const HTTP2_CONNECTION_WINDOW_BYTES: u32 = 262_144;
const HTTP2_SEND_BUFFER_BYTES: usize = 65_536;
/// Streams that a peer may make us reset before it is taken for an attacker.
const HTTP2_RESETS_MAX: usize = 64;
