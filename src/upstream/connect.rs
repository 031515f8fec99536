//! From an endpoint to a connection that takes requests: name, TCP, TLS, HTTP.

use std::fmt;
use std::io;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use metrics::gauge;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_util::either::Either;

use super::endpoint::Endpoint;
use crate::tasks::Tasks;
use crate::telemetry::UPSTREAM_CONNECTIONS_OPEN;
use crate::tls::{self, Alpn};

/// How one endpoint is connected to.
#[derive(Clone, Debug)]
pub struct Dial {
    pub endpoint: Endpoint,
    /// For `https`.
    pub tls: Option<tls::Client>,
    /// HTTP/2 whatever TLS agrees on.
    pub http2: bool,
    /// For name, TCP and TLS together.
    pub timeout: Duration,
}

/// Why a request got no whole answer.
#[derive(Debug)]
pub enum Fault {
    /// No connection.
    Connect(io::Error),
    /// Connecting took longer than `connect_timeout_ms`.
    ConnectTimeout,
    /// The connection broke off, or what came was not HTTP.
    Broken(hyper::Error),
    /// The answer was not whole after `request_timeout_ms`.
    Timeout,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Connect(error) => write!(f, "cannot connect: {error}"),
            Fault::ConnectTimeout => f.write_str("no connection within connect_timeout_ms"),
            Fault::Broken(error) => {
                // hyper names the kind; what the system said is its source.
                write!(f, "{error}")?;
                std::error::Error::source(error).map_or(Ok(()), |source| write!(f, ": {source}"))
            }
            Fault::Timeout => f.write_str("no whole answer within request_timeout_ms"),
        }
    }
}

impl std::error::Error for Fault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Fault::Connect(error) => Some(error),
            Fault::Broken(error) => Some(error),
            Fault::ConnectTimeout | Fault::Timeout => None,
        }
    }
}

/// The first address of a name that answers.
async fn reach(host: &str, port: u16, within: Duration) -> io::Result<TcpStream> {
    let mut addresses: Vec<_> = lookup_host((host, port)).await?.collect();
    addresses.dedup();
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (index, address) in addresses.iter().enumerate() {
        // An address that swallows everything must not use up the time of the next.
        let share = within / u32::try_from(addresses.len() - index).unwrap_or(1);
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => failed = error,
            Err(_) => failed = io::Error::from(io::ErrorKind::TimedOut),
        }
    }
    Err(failed)
}

/// A bare connection for a tunnel; `host` may be an IPv6 address in brackets.
///
/// # Errors
/// [`Fault::Connect`], [`Fault::ConnectTimeout`].
pub async fn dial(host: &str, port: u16, within: Duration) -> Result<TcpStream, Fault> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match timeout(within, reach(host, port, within)).await {
        Ok(reached) => reached.map_err(Fault::Connect),
        Err(_) => Err(Fault::ConnectTimeout),
    }
}

impl Dial {
    /// Connects, and shakes hands where the endpoint is `https`. Returns whether HTTP/2 is spoken.
    ///
    /// # Errors
    /// [`Fault::Connect`], [`Fault::ConnectTimeout`].
    pub async fn stream(&self) -> Result<(Stream, bool), Fault> {
        match timeout(self.timeout, self.connect()).await {
            Ok(Ok((stream, alpn))) => Ok((stream, self.http2 || alpn == Some(Alpn::Http2))),
            Ok(Err(error)) => Err(Fault::Connect(error)),
            Err(_) => Err(Fault::ConnectTimeout),
        }
    }

    async fn connect(&self) -> io::Result<(Stream, Option<Alpn>)> {
        let host = self.endpoint.host.as_str();
        let stream = reach(host, self.endpoint.port, self.timeout).await?;
        match &self.tls {
            None => Ok((Stream::Left(stream), None)),
            Some(tls) => {
                let (stream, alpn) = tls.connect(host, stream).await?;
                Ok((Stream::Right(Box::new(stream)), alpn))
            }
        }
    }

    /// A connection that takes requests; a task drives it until it ends. `upstream` is its metric's label.
    ///
    /// # Errors
    /// See [`Fault`].
    pub async fn open<B>(&self, upstream: &str, tasks: &Tasks) -> Result<Sender<B>, Fault>
    where
        B: Body + Send + Unpin + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (stream, http2) = self.stream().await?;
        let io = TokioIo::new(stream);
        let open = Open::count(upstream);
        if http2 {
            let handshake =
                timeout(self.timeout, http2_builder().handshake(io)).await.map_err(|_| Fault::ConnectTimeout)?;
            let (sender, connection) = handshake.map_err(Fault::Broken)?;
            tasks.spawn("upstream-connection", async move {
                let _open = open;
                // Whoever waits for an answer is told why there is none.
                let _ = connection.await;
            });
            return Ok(Sender::Http2(sender));
        }
        let (sender, connection) = http1_builder().handshake(io).await.map_err(Fault::Broken)?;
        tasks.spawn("upstream-connection", async move {
            let _open = open;
            let _ = connection.await;
        });
        Ok(Sender::Http1(sender))
    }
}

/// Counts one open connection until it is dropped.
pub struct Open(metrics::Gauge);

impl Open {
    pub fn count(upstream: &str) -> Self {
        let gauge = gauge!(UPSTREAM_CONNECTIONS_OPEN, "upstream" => upstream.to_owned());
        gauge.increment(1.0);
        Open(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// A connection's end for requests.
#[derive(Debug)]
pub enum Sender<B> {
    /// One request at a time.
    Http1(http1::SendRequest<B>),
    /// Many at once, by clones.
    Http2(http2::SendRequest<B>),
}

impl<B> Sender<B>
where
    B: Body + Send + 'static,
    B::Data: Send,
{
    /// Whether a request can be sent without waiting, as far as known.
    pub fn is_ready(&self) -> bool {
        match self {
            Sender::Http1(sender) => sender.is_ready(),
            Sender::Http2(sender) => sender.is_ready(),
        }
    }

    /// Sends one request whose URI has scheme and authority; HTTP/1.1 says them in its own way.
    ///
    /// # Errors
    /// [`hyper::Error`].
    pub async fn send(&mut self, mut request: Request<B>) -> Result<Response<Incoming>, hyper::Error> {
        match self {
            Sender::Http1(sender) => {
                sender.ready().await?;
                let path = request.uri().path_and_query().cloned();
                *request.uri_mut() = path.map_or_else(http::Uri::default, http::Uri::from);
                sender.send_request(request).await
            }
            Sender::Http2(sender) => {
                sender.ready().await?;
                request.headers_mut().remove(http::header::HOST);
                sender.send_request(request).await
            }
        }
    }
}

/// A TCP connection, with or without TLS.
pub type Stream = Either<TcpStream, Box<tls::ClientStream<TcpStream>>>;

/// How HTTP/1.1 is spoken to every upstream.
pub fn http1_builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.max_buf_size(HEAD_BYTES_MAX);
    builder
}

/// How HTTP/2 is spoken to every upstream.
pub fn http2_builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new()).keep_alive_interval(KEEP_ALIVE).keep_alive_timeout(KEEP_ALIVE);
    builder
}

/// The head of an answer, and what is read of its body at once.
pub const HEAD_BYTES_MAX: usize = 64 << 10;
/// How often a silent HTTP/2 connection is asked whether it is there, and how long that may take.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
