//! The device side: accept, find out what is spoken, hand over.
//!
//! ```text
//! accept > permits > address > [PROXY header] > sniff > [TLS > ALPN or sniff] > adapter
//! ```
//! Promises: everything before the adapter is bounded in bytes and time, whatever the peer does; what ends there is a [`Refusal`], counted by
//! reason; the adapter gets every byte the peer sent; accepting goes on after any error, without spinning; at shutdown nothing new is
//! accepted, adapters are told through their token, and what is left at `drain_timeout_ms` is closed.
//!
//! An adapter is a module beside this one with
//! ```text
//! pub async fn serve<IO>(io: IO, prefix: BytesMut, conn: ConnectionInfo, gateway: Arc<Gateway>, shutdown: CancellationToken)
//! where IO: AsyncRead + AsyncWrite + Unpin + Send + 'static
//! ```
//! It owns the connection until it returns: its deadlines, its session, its last words on `shutdown`. `prefix` was read already and
//! comes before everything else (`Prefixed::new(prefix, io)` for engines that want one stream). A WebSocket's opening handshake is done by the HTTP
//! adapter; `websocket` gets the stream after it. Adapters do not know each other; only this file names them all, in [`Adapters`].

mod accept;
mod coap;
mod config;
mod deadline;
mod detect;
mod http;
mod mqtt;
mod permits;
mod relay;
mod stream;
mod websocket;

use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwapOption;
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::gateway::{Exchange, Gateway, Limits};
use crate::message::Reject;
use crate::network::Network;
use crate::telemetry::access_log::AccessLog;
use crate::tls::{self, Alpn, TlsInfo};
use crate::worker;

pub use accept::{Sockets, run};
pub use config::{ClientCertificates, Config, ProtocolName, TransportKind};
pub use deadline::{Activity, Deadlined, Deadlines, UnderWay};
pub use detect::{Detected, Refusal, detect};
pub use http::is_own_path;
pub use permits::{Permit, Permits};
pub use relay::{Relay, RelayFault, Relayed};
pub use stream::{Prefixed, Transport, read_some};

/// A recognised protocol of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spoken {
    /// HTTP/1.1, which may become a WebSocket.
    Http1,
    Http2,
    Mqtt,
    CoapTcp,
}

/// What is known of a connection before its first message.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// The device's address; behind a trusted proxy, the one from its PROXY header.
    pub peer: SocketAddr,
    pub local: SocketAddr,
    pub listener: Arc<Listener>,
    /// `None` without TLS.
    pub tls: Option<TlsInfo>,
}

/// One listener while it runs. Shared by all workers.
#[derive(Debug)]
pub struct Listener {
    config: Config,
    tls: ArcSwapOption<tls::Server>,
}

/// Why the listeners did not come up.
#[derive(Debug)]
pub enum Error {
    /// The address.
    Bind { listener: String, source: worker::Error },
    /// The certificate or the key.
    Tls { listener: String, source: tls::Error },
    /// The configuration asks for what this build has not.
    NotServed { listener: String, transport: TransportKind },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Bind { listener, source } => write!(f, "listener \"{listener}\": {source}"),
            Error::Tls { listener, source } => write!(f, "listener \"{listener}\": {source}"),
            Error::NotServed { listener, transport } => {
                write!(f, "listener \"{listener}\": {} is not served by this build", transport.as_str())
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Bind { source, .. } => Some(source),
            Error::Tls { source, .. } => Some(source),
            Error::NotServed { .. } => None,
        }
    }
}

impl Listener {
    /// Reads certificate and key, if the transport wants them. Blocks.
    ///
    /// # Errors
    /// [`Error::Tls`], [`Error::NotServed`].
    pub fn new(config: Config) -> Result<Self, Error> {
        if config.transport == TransportKind::Dtls {
            return Err(Error::NotServed { listener: config.name, transport: TransportKind::Dtls });
        }
        let listener = Listener { tls: ArcSwapOption::empty(), config };
        listener.reload_tls()?;
        Ok(listener)
    }

    /// Reads certificate and key again; connections from now on see the new ones, connections that exist keep theirs. Blocks.
    ///
    /// # Errors
    /// [`Error::Tls`]; the old ones stay in force.
    pub fn reload_tls(&self) -> Result<(), Error> {
        if self.config.transport != TransportKind::Tls {
            return Ok(());
        }
        let failed = |source| Error::Tls { listener: self.config.name.clone(), source };
        let pair = self.config.key_pair().ok_or_else(|| {
            failed(tls::Error::NoCertificate { path: self.config.certificate.clone().unwrap_or_default() })
        })?;
        let ask = self.config.client_certificates == ClientCertificates::Optional;
        let server = tls::Server::new(&pair, &self.alpn(), ask).map_err(failed)?;
        self.tls.store(Some(Arc::new(server)));
        Ok(())
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    pub fn transport(&self) -> TransportKind {
        self.config.transport
    }

    /// Whether `protocol` may be spoken here.
    pub fn speaks(&self, protocol: ProtocolName) -> bool {
        self.config.protocols.contains(&protocol)
    }

    fn offers(&self, spoken: Spoken) -> bool {
        match spoken {
            // Which of the two it is, the HTTP adapter sees from the request.
            Spoken::Http1 => self.speaks(ProtocolName::Http) || self.speaks(ProtocolName::Websocket),
            Spoken::Http2 => self.speaks(ProtocolName::Http),
            Spoken::Mqtt => self.speaks(ProtocolName::Mqtt),
            Spoken::CoapTcp => self.speaks(ProtocolName::Coap),
        }
    }

    fn alpn(&self) -> Vec<Alpn> {
        let offered = [
            (Alpn::Mqtt, Spoken::Mqtt),
            (Alpn::Http2, Spoken::Http2),
            (Alpn::Http1, Spoken::Http1),
            (Alpn::Coap, Spoken::CoapTcp),
        ];
        offered.into_iter().filter(|(_, spoken)| self.offers(*spoken)).map(|(alpn, _)| alpn).collect()
    }

    fn trusts(&self, proxy: IpAddr) -> bool {
        self.config.proxy_protocol_from.iter().any(|network: &Network| network.contains(proxy))
    }

    /// Whether `Forwarded` and `X-Forwarded-*` from this peer are believed.
    pub fn believes(&self, peer: IpAddr) -> bool {
        self.config.forwarded_from.iter().any(|network: &Network| network.contains(peer))
    }

    fn tls(&self) -> Option<Arc<tls::Server>> {
        self.tls.load_full()
    }
}

/// A connection while it is served. Boxed by what serves it and not in an async function, which would keep its arguments: a connection's memory is that
/// of its own protocol.
pub type Serving = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the listeners serve: the gateway's adapters, or a recorder in tests.
pub trait Serve: Clone + Send + Sync + 'static {
    /// The limits now in force.
    fn limits(&self) -> Limits;

    /// Asked once per connection with its address, and again with the one from a PROXY header.
    ///
    /// # Errors
    /// [`Refusal::AddressFilter`], [`Refusal::RatePerAddress`].
    fn admit(&self, peer: IpAddr) -> Result<(), Refusal>;

    /// Owns a connection to its end.
    fn serve<IO>(
        &self,
        spoken: Spoken,
        io: IO,
        prefix: BytesMut,
        conn: ConnectionInfo,
        shutdown: CancellationToken,
    ) -> Serving
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Serves one worker's socket of a UDP listener until `shutdown`.
    fn serve_datagrams(
        &self,
        socket: std::net::UdpSocket,
        listener: Arc<Listener>,
        shutdown: CancellationToken,
    ) -> impl Future<Output = ()> + Send;

    /// Serves a socket in a multicast group of a UDP listener until `shutdown`.
    fn serve_group(
        &self,
        socket: std::net::UdpSocket,
        listener: Arc<Listener>,
        shutdown: CancellationToken,
    ) -> impl Future<Output = ()> + Send;
}

/// The gateway's adapters.
#[derive(Clone)]
pub struct Adapters {
    gateway: Arc<Gateway>,
    http: http::Context,
    mqtt: Arc<mqtt::Shared>,
}

impl Adapters {
    pub fn new(gateway: Arc<Gateway>, access_log: Option<Arc<AccessLog>>) -> Self {
        let shared = Arc::new(http::Shared::new(&gateway, access_log));
        let http = http::Context { gateway: gateway.clone(), shared, exchange: None };
        Adapters { http, mqtt: Arc::new(mqtt::Shared::new()), gateway }
    }

    /// The same with a way to the upstreams: each worker has its own.
    pub fn with_exchange(&self, exchange: Arc<dyn Exchange>) -> Self {
        let mut adapters = self.clone();
        adapters.http.exchange = Some(exchange);
        adapters
    }

    fn coap(&self) -> coap::Context {
        let has_upstreams = self.http.exchange.is_some();
        let relay = has_upstreams.then(|| Arc::new(self.http.clone()) as Arc<dyn Relay>);
        coap::Context { gateway: self.gateway.clone(), relay }
    }

    fn serve_mqtt<IO>(&self, io: IO, prefix: BytesMut, conn: ConnectionInfo, shutdown: CancellationToken) -> Serving
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        mqtt::serve(io, prefix, conn, self.gateway.clone(), self.mqtt.clone(), shutdown)
    }
}

impl Serve for Adapters {
    fn limits(&self) -> Limits {
        self.gateway.limits()
    }

    fn admit(&self, peer: IpAddr) -> Result<(), Refusal> {
        self.gateway.admit_address(peer, Instant::now()).map_err(|reject| match reject {
            Reject::TooFast { .. } => Refusal::RatePerAddress,
            Reject::Unauthenticated
            | Reject::Forbidden { .. }
            | Reject::TooLarge { .. }
            | Reject::Full { .. }
            | Reject::Malformed { .. }
            | Reject::NotFound => Refusal::AddressFilter,
            Reject::ShuttingDown => Refusal::ShuttingDown,
        })
    }

    fn serve<IO>(
        &self,
        spoken: Spoken,
        io: IO,
        prefix: BytesMut,
        conn: ConnectionInfo,
        shutdown: CancellationToken,
    ) -> Serving
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let context = self.http.clone();
        match spoken {
            Spoken::Http1 => {
                let adapters = self.clone();
                Box::pin(async move {
                    let http = http::serve_http1(io, prefix, conn.clone(), context, shutdown.clone());
                    if let Some(upgraded) = Box::pin(http).await {
                        let bytes_max = adapters.gateway.limits().packet_bytes_max as usize;
                        let io = websocket::open(upgraded, bytes_max).await;
                        adapters.serve_mqtt(io, BytesMut::new(), conn, shutdown).await;
                    }
                })
            }
            Spoken::Http2 => Box::pin(http::serve_http2(io, prefix, conn, context, shutdown)),
            Spoken::CoapTcp => Box::pin(coap::serve(io, prefix, conn, self.coap(), shutdown)),
            Spoken::Mqtt => self.serve_mqtt(io, prefix, conn, shutdown),
        }
    }

    async fn serve_datagrams(&self, socket: std::net::UdpSocket, listener: Arc<Listener>, shutdown: CancellationToken) {
        coap::serve_datagrams(socket, listener, self.coap(), shutdown).await;
    }

    async fn serve_group(&self, socket: std::net::UdpSocket, listener: Arc<Listener>, shutdown: CancellationToken) {
        coap::serve_group(socket, listener, self.coap(), shutdown).await;
    }
}

/// Listeners whose sockets are bound and not yet served.
#[derive(Debug)]
pub struct Bound {
    pub listeners: Vec<Arc<Listener>>,
    /// As many as workers; each goes to one of them.
    pub sockets: Vec<Sockets>,
    /// The address each listener has, in the order of the configuration; port 0 is resolved.
    pub addresses: Vec<SocketAddr>,
}

/// Prepares all listeners for `workers` workers: certificates read, sockets bound. Blocks.
///
/// # Errors
/// The first [`Error`]; then nothing stays bound.
pub fn bind(configs: &[Config], workers: usize) -> Result<Bound, Error> {
    let mut bound = Bound {
        listeners: Vec::with_capacity(configs.len()),
        sockets: (0..workers).map(|_| Sockets::default()).collect(),
        addresses: Vec::with_capacity(configs.len()),
    };
    for config in configs {
        let listener = Arc::new(Listener::new(config.clone())?);
        let failed = |source| Error::Bind { listener: config.name.clone(), source };
        let address = match config.transport {
            TransportKind::Tcp | TransportKind::Tls => {
                let (address, sockets) = worker::bind_tcp(config.bind, workers).map_err(failed)?;
                for (of_worker, socket) in bound.sockets.iter_mut().zip(sockets) {
                    of_worker.tcp.push((listener.clone(), socket));
                }
                address
            }
            TransportKind::Udp | TransportKind::Dtls => {
                let (address, sockets) = worker::bind_udp(config.bind, workers).map_err(failed)?;
                for (of_worker, socket) in bound.sockets.iter_mut().zip(sockets) {
                    of_worker.udp.push((listener.clone(), socket));
                }
                for interface in &config.multicast_interfaces {
                    for group in config.multicast_groups() {
                        let socket = worker::bind_group(*group, address.port(), interface).map_err(failed)?;
                        if let Some(first) = bound.sockets.first_mut() {
                            first.groups.push((listener.clone(), socket));
                        }
                    }
                }
                address
            }
        };
        bound.listeners.push(listener);
        bound.addresses.push(address);
    }
    Ok(bound)
}

#[cfg(test)]
mod tests;
