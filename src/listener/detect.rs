//! From an accepted socket to a recognised protocol: PROXY header, first sniff, TLS, ALPN or second sniff.
//!
//! Bounded in bytes (`sniff_bytes_max`) and in time (`sniff_timeout_ms` from accept and again inside TLS, `handshake_timeout_ms` for
//! TLS), whatever the peer does or does not send. The buffer for the first bytes exists only once there are some, so a silent peer
//! costs its socket, its task and one timer. Every other end than a recognised protocol is a [`Refusal`], counted by reason.

use std::net::IpAddr;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use proxy_header::{ParseConfig, ProxyHeader};
use tidegate_sniff::{Verdict, classify};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout, timeout_at};

use super::stream::{Prefixed, Transport, read_some};
use super::{ConnectionInfo, Listener, Spoken, TransportKind};
use crate::gateway::Limits;
use crate::tls::{Alpn, TlsInfo};

/// A connection whose protocol is known.
#[derive(Debug)]
pub struct Detected<IO> {
    pub spoken: Spoken,
    pub io: Transport<IO>,
    /// Read already; the adapter begins with these.
    pub prefix: BytesMut,
}

/// Why a connection ended before a protocol was spoken; a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// `connections_max`.
    ConnectionsMax,
    /// `connections_per_address_max`.
    ConnectionsPerAddressMax,
    /// The address filter.
    AddressFilter,
    /// `rate_per_address`.
    RatePerAddress,
    /// Nothing recognisable by `sniff_timeout_ms`.
    Silent,
    /// The peer closed or reset before it was recognised: a port scan, a health check of TCP.
    Closed,
    /// Nothing recognisable in `sniff_bytes_max`.
    SniffBytesMax,
    /// Certainly no protocol of ours.
    Unknown,
    /// A PROXY header from somebody who may not send one, or a malformed one.
    ProxyHeader,
    /// TLS on a listener without.
    TlsOnPlain,
    /// No TLS on a listener with.
    PlainOnTls,
    /// The TLS handshake failed.
    TlsHandshake,
    /// `handshake_timeout_ms`.
    TlsTimeout,
    /// Recognised, but not among the listener's `protocols`.
    ProtocolNotOffered,
    /// The gateway is draining.
    ShuttingDown,
}

impl Refusal {
    pub const fn reason(self) -> &'static str {
        match self {
            Refusal::ConnectionsMax => "connections_max",
            Refusal::ConnectionsPerAddressMax => "connections_per_address_max",
            Refusal::AddressFilter => "address_filter",
            Refusal::RatePerAddress => "rate_per_address",
            Refusal::Silent => "silent",
            Refusal::Closed => "closed",
            Refusal::SniffBytesMax => "sniff_bytes_max",
            Refusal::Unknown => "unknown",
            Refusal::ProxyHeader => "proxy_header",
            Refusal::TlsOnPlain => "tls_on_plain",
            Refusal::PlainOnTls => "plain_on_tls",
            Refusal::TlsHandshake => "tls_handshake",
            Refusal::TlsTimeout => "tls_timeout",
            Refusal::ProtocolNotOffered => "protocol_not_offered",
            Refusal::ShuttingDown => "shutting_down",
        }
    }
}

/// Finds out what `io` speaks. A PROXY header from a trusted peer replaces the addresses in `conn`, after which `admit` is asked
/// about the new one.
///
/// # Errors
/// Why the connection is to be closed.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub async fn detect<IO>(
    mut io: IO,
    conn: &mut ConnectionInfo,
    limits: &Limits,
    mut admit: impl FnMut(IpAddr) -> Result<(), Refusal>,
) -> Result<Detected<IO>, Refusal>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let listener = conn.listener.clone();
    let bytes_max = usize::try_from(limits.sniff_bytes_max).unwrap_or(usize::MAX);
    let sniff_timeout = Duration::from_millis(u64::from(limits.sniff_timeout_ms));
    let deadline = Instant::now() + sniff_timeout;
    let mut prefix = BytesMut::new();

    let mut verdict = sniff(&mut io, &mut prefix, bytes_max, deadline).await?;
    if matches!(verdict, Verdict::ProxyV1 | Verdict::ProxyV2) {
        if !listener.trusts(conn.peer.ip()) {
            return Err(Refusal::ProxyHeader);
        }
        proxy_header(&mut io, &mut prefix, bytes_max, deadline, conn).await?;
        admit(conn.peer.ip())?;
        verdict = sniff(&mut io, &mut prefix, bytes_max, deadline).await?;
    }

    let (verdict, io) = match (listener.transport(), verdict) {
        (_, Verdict::ProxyV1 | Verdict::ProxyV2) => return Err(Refusal::ProxyHeader),
        (_, Verdict::Unknown | Verdict::Need(_)) => return Err(Refusal::Unknown),
        (TransportKind::Tls, Verdict::Tls) => {
            let handshake_timeout = Duration::from_millis(u64::from(limits.handshake_timeout_ms));
            let (mut io, info) = handshake(io, prefix, &listener, handshake_timeout).await?;
            prefix = BytesMut::new();
            let verdict = match info.alpn {
                Some(Alpn::Mqtt) => Verdict::Mqtt,
                Some(Alpn::Http2) => Verdict::Http2,
                Some(Alpn::Http1) => Verdict::Http1,
                Some(Alpn::Coap) => Verdict::CoapTcp,
                None => sniff(&mut io, &mut prefix, bytes_max, Instant::now() + sniff_timeout).await?,
            };
            conn.tls = Some(info);
            (verdict, io)
        }
        (TransportKind::Tls, _) => return Err(Refusal::PlainOnTls),
        (_, Verdict::Tls) => return Err(Refusal::TlsOnPlain),
        (_, plain) => (plain, Transport::Left(io)),
    };
    let spoken = match verdict {
        Verdict::Http1 => Spoken::Http1,
        Verdict::Http2 => Spoken::Http2,
        Verdict::Mqtt => Spoken::Mqtt,
        Verdict::CoapTcp => Spoken::CoapTcp,
        // Inside TLS: neither a second TLS nor a PROXY header belongs there.
        Verdict::Need(_) | Verdict::Tls | Verdict::ProxyV1 | Verdict::ProxyV2 | Verdict::Unknown => {
            return Err(Refusal::Unknown);
        }
    };
    if !listener.offers(spoken) {
        return Err(Refusal::ProtocolNotOffered);
    }
    Ok(Detected { spoken, io, prefix })
}

/// Reads until the verdict is final.
async fn sniff<IO: AsyncRead + Unpin>(
    io: &mut IO,
    prefix: &mut BytesMut,
    bytes_max: usize,
    deadline: Instant,
) -> Result<Verdict, Refusal> {
    loop {
        match classify(prefix) {
            Verdict::Need(_) => more(io, prefix, bytes_max, deadline).await?,
            verdict => return Ok(verdict),
        }
    }
}

async fn more<IO: AsyncRead + Unpin>(
    io: &mut IO,
    prefix: &mut BytesMut,
    bytes_max: usize,
    deadline: Instant,
) -> Result<(), Refusal> {
    if prefix.len() >= bytes_max {
        return Err(Refusal::SniffBytesMax);
    }
    match timeout_at(deadline, read_some(io, prefix, bytes_max)).await {
        Err(_) => Err(Refusal::Silent),
        Ok(Err(_) | Ok(0)) => Err(Refusal::Closed),
        Ok(Ok(_)) => Ok(()),
    }
}

/// Takes one PROXY header off `prefix`.
async fn proxy_header<IO: AsyncRead + Unpin>(
    io: &mut IO,
    prefix: &mut BytesMut,
    bytes_max: usize,
    deadline: Instant,
    conn: &mut ConnectionInfo,
) -> Result<(), Refusal> {
    let config = ParseConfig { include_tlvs: false, allow_v1: true, allow_v2: true };
    loop {
        match ProxyHeader::parse(prefix, config) {
            Ok((header, length)) => {
                // None: the proxy speaks for itself (LOCAL, a health check) or does not know.
                if let Some(address) = header.proxied_address() {
                    conn.peer = address.source;
                    conn.local = address.destination;
                }
                if length > prefix.len() {
                    return Err(Refusal::ProxyHeader);
                }
                prefix.advance(length);
                return Ok(());
            }
            Err(proxy_header::Error::BufferTooShort) => more(io, prefix, bytes_max, deadline).await?,
            Err(_) => return Err(Refusal::ProxyHeader),
        }
    }
}

async fn handshake<IO>(
    io: IO,
    prefix: BytesMut,
    listener: &Listener,
    handshake_timeout: Duration,
) -> Result<(Transport<IO>, TlsInfo), Refusal>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    // Checked at start: a TLS listener has a server.
    let Some(server) = listener.tls() else { return Err(Refusal::TlsHandshake) };
    match timeout(handshake_timeout, server.accept(Prefixed::new(prefix, io))).await {
        Err(_) => Err(Refusal::TlsTimeout),
        Ok(Err(error)) => {
            tracing::debug!(%error, "tls handshake failed");
            Err(Refusal::TlsHandshake)
        }
        Ok(Ok((stream, info))) => Ok((Transport::Right(Box::new(stream)), info)),
    }
}
