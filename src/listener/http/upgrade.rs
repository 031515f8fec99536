//! Streams that stop being HTTP's: MQTT over WebSocket after its opening handshake (RFC 6455 section 4.2), and tunnels to an upstream that has
//! switched protocols, which are copied and not looked into.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use http::header::{
    CONNECTION, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use portable_atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;

use super::body::Body;
use super::stream::Held;
use super::strict::Strict;
use crate::gateway::Line;
use crate::listener::stream::write_through;
use crate::listener::{Deadlined, Prefixed};

/// What an HTTP/1 connection reads and writes.
pub type Wire<IO> = TokioIo<Strict<Deadlined<Prefixed<IO>>>>;

/// The stream after the handshake, rid of HTTP's deadlines; what the client sent early is read first.
pub type Upgraded<IO> = Prefixed<IO>;

/// A switch of protocols that has been answered, until hyper lets go of the stream.
#[derive(Default)]
pub struct Upgrade {
    pending: Mutex<Option<Pending>>,
    fate: Arc<Fate>,
}

/// What becomes of a connection's bytes.
#[derive(Debug, Default)]
pub struct Fate {
    switched: AtomicBool,
    spoilt: AtomicBool,
}

impl Fate {
    /// True from the answer on that says so: what comes then is not HTTP.
    pub fn has_switched(&self) -> bool {
        self.switched.load(Ordering::Relaxed)
    }

    /// What hyper reads is not what came: it must not be taken for another protocol's.
    pub fn spoil(&self) {
        self.spoilt.store(true, Ordering::Relaxed);
    }
}

enum Pending {
    Mqtt(OnUpgrade),
    Tunnel(Tunnel),
}

/// Two streams to be joined.
pub struct Tunnel {
    pub client: OnUpgrade,
    pub upstream: Far,
    /// Without one byte in either direction.
    pub idle: Duration,
    pub held: Held,
}

/// The other end of a tunnel.
pub enum Far {
    /// An upstream that has switched protocols.
    Upgraded(OnUpgrade),
    /// A connection of its own (CONNECT).
    Dialled(Box<dyn Line>),
}

/// Whether a request asks to become a WebSocket for MQTT ([MQTT-6.0.0-3]: the subprotocol is `mqtt`).
pub fn is_for_mqtt<B>(request: &Request<B>) -> bool {
    has_token(request.headers(), &SEC_WEBSOCKET_PROTOCOL, "mqtt")
        && request.version() == Version::HTTP_11
        && request.method() == Method::GET
        && has_token(request.headers(), &UPGRADE, "websocket")
        && has_token(request.headers(), &CONNECTION, "upgrade")
}

impl Upgrade {
    /// Answers the handshake of [`is_for_mqtt`]. `None` if it is none after all.
    pub fn begin(&self, mut request: Request<Incoming>) -> Option<Response<Body>> {
        let headers = request.headers();
        if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            let mut response = Response::new(Body::Empty);
            *response.status_mut() = StatusCode::UPGRADE_REQUIRED;
            response.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            return Some(response);
        }
        let accept = derive_accept_key(headers.get(SEC_WEBSOCKET_KEY)?.as_bytes());
        let mut response = Response::new(Body::Empty);
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let answer = response.headers_mut();
        answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
        answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        answer.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("mqtt"));
        answer.insert(SEC_WEBSOCKET_ACCEPT, HeaderValue::try_from(accept).ok()?);
        self.switch(Pending::Mqtt(hyper::upgrade::on(&mut request)));
        Some(response)
    }

    /// Joins the client's stream to an upstream's, after the answer that is being given.
    pub fn tunnel(&self, tunnel: Tunnel) {
        self.switch(Pending::Tunnel(tunnel));
    }

    pub fn fate(&self) -> Arc<Fate> {
        self.fate.clone()
    }

    fn switch(&self, to: Pending) {
        *self.pending.lock() = Some(to);
        self.fate.switched.store(true, Ordering::Relaxed);
    }

    /// To be called after the HTTP connection has ended. Gives back the stream that is MQTT's, if there was a handshake and its answer went
    /// out; a tunnel is served here to its end.
    pub async fn finish<IO>(&self, shutdown: &CancellationToken) -> Option<Upgraded<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let pending = self.pending.lock().take()?;
        if self.fate.spoilt.load(Ordering::Relaxed) {
            // It did not wait for the answer, and what it said meanwhile could not be read as HTTP, which it still was.
            return None;
        }
        match pending {
            Pending::Mqtt(upgrade) => {
                // This very type was given to hyper.
                let parts = upgrade.await.ok()?.downcast::<Wire<IO>>().ok()?;
                let (unread, io) = parts.io.into_inner().into_inner().into_inner().into_parts();
                // hyper read what the prefix held before it read from the stream.
                let mut early = BytesMut::from(&parts.read_buf[..]);
                early.extend_from_slice(&unread);
                Some(Prefixed::new(early, io))
            }
            Pending::Tunnel(tunnel) => {
                tokio::select! {
                    () = tunnel.serve() => {}
                    () = shutdown.cancelled() => {}
                }
                None
            }
        }
    }
}

impl Tunnel {
    /// Copies both ways until one side has ended and the other has been told, or nothing came for `idle`.
    pub async fn serve(self) {
        let Tunnel { client, upstream, idle, held: _held } = self;
        let upstream = async {
            match upstream {
                Far::Upgraded(upgrade) => upgrade.await.ok().map(|io| Box::new(TokioIo::new(io)) as Box<dyn Line>),
                Far::Dialled(line) => Some(line),
            }
        };
        let (Ok(client), Some(upstream)) = tokio::join!(client, upstream) else { return };
        let seen = Arc::new(LastSeen { began: Instant::now(), ms: AtomicU64::new(0) });
        let mut client = Watched { io: TokioIo::new(client), seen: seen.clone() };
        let mut upstream = Watched { io: upstream, seen: seen.clone() };
        let mut copying = pin!(tokio::io::copy_bidirectional_with_sizes(
            &mut client,
            &mut upstream,
            TUNNEL_BUFFER_BYTES,
            TUNNEL_BUFFER_BYTES
        ));
        loop {
            let silent_at = seen.at() + idle;
            tokio::select! {
                // A side that breaks off ends the tunnel; there is nobody to tell.
                _ended = copying.as_mut() => return,
                () = tokio::time::sleep_until(silent_at) => {
                    if seen.at() + idle <= Instant::now() {
                        return;
                    }
                }
            }
        }
    }
}

/// When the last byte came.
struct LastSeen {
    began: Instant,
    ms: AtomicU64,
}

impl LastSeen {
    fn at(&self) -> Instant {
        self.began + Duration::from_millis(self.ms.load(Ordering::Relaxed))
    }

    fn now(&self) {
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.ms.store(ms, Ordering::Relaxed);
    }
}

/// A stream that notes when something came.
struct Watched<IO> {
    io: IO,
    seen: Arc<LastSeen>,
}

impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.io).poll_read(cx, buffer);
        if poll.is_ready() {
            self.seen.now();
        }
        poll
    }
}

write_through!(Watched);

/// Each way.
const TUNNEL_BUFFER_BYTES: usize = 8192;

/// Whether a comma-separated header has `token`, without case.
pub fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
}
