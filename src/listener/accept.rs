//! The accept loop of one worker, and its drain.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::detect::{Refusal, detect};
use super::permits::{Permit, Permits};
use super::{ConnectionInfo, Listener, Serve, Serving};
use crate::telemetry::{self, meters};
use crate::worker::Worker;

/// One worker's share of the listening sockets.
#[derive(Debug, Default)]
pub struct Sockets {
    pub(super) tcp: Vec<(Arc<Listener>, std::net::TcpListener)>,
    pub(super) udp: Vec<(Arc<Listener>, std::net::UdpSocket)>,
    /// One for each multicast group and interface; with one worker only, for the kernel gives each of several a copy.
    pub(super) groups: Vec<(Arc<Listener>, std::net::UdpSocket)>,
}

/// Serves one worker's sockets until its shutdown token, then drains. The body of a worker thread.
pub async fn run<S: Serve>(worker: Worker, sockets: Sockets, permits: Arc<Permits>, serve: S) {
    let shutdown = worker.tasks.shutdown_token().clone();
    for (listener, socket) in sockets.tcp {
        let socket = match TcpListener::from_std(socket) {
            Ok(socket) => socket,
            Err(error) => {
                // The runtime cannot watch the socket: the worker ends, and with it, by its contract, the gateway.
                tracing::error!(%error, listener = listener.name(), "listening socket cannot be watched");
                shutdown.cancel();
                return;
            }
        };
        let task = accept(worker.clone(), listener, socket, permits.clone(), serve.clone());
        worker.tasks.spawn("accept", task);
    }
    for (listener, socket) in sockets.udp {
        let (serve, shutdown) = (serve.clone(), shutdown.clone());
        worker.tasks.spawn("datagrams", async move { serve.serve_datagrams(socket, listener, shutdown).await });
    }
    for (listener, socket) in sockets.groups {
        let (serve, shutdown) = (serve.clone(), shutdown.clone());
        worker.tasks.spawn("group", async move { serve.serve_group(socket, listener, shutdown).await });
    }
    shutdown.cancelled().await;
    let deadline = Duration::from_millis(u64::from(serve.limits().drain_timeout_ms));
    let drained = worker.tasks.drain(deadline).await;
    if drained.remaining > 0 {
        tracing::warn!(worker = worker.index, connections = drained.remaining, "closed at drain_timeout_ms");
    }
}

async fn accept<S: Serve>(
    worker: Worker,
    listener: Arc<Listener>,
    socket: TcpListener,
    permits: Arc<Permits>,
    serve: S,
) {
    let shutdown = worker.tasks.shutdown_token();
    let mut pause = Pause::default();
    loop {
        let accepted = tokio::select! {
            // Cancel safe: a connection is either returned or still in the backlog.
            accepted = socket.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => {
                pause.reset();
                accepted
            }
            Err(error) => {
                let Some(pause) = pause.after(&error) else { continue };
                telemetry::connection_refused("accept_error");
                tracing::warn!(%error, listener = listener.name(), pause_ms = pause.as_millis() as u64, "cannot accept");
                tokio::select! {
                    () = tokio::time::sleep(pause) => continue,
                    () = shutdown.cancelled() => return,
                }
            }
        };
        match admit(&listener, peer, &permits, &serve) {
            Ok(permit) => {
                meters().connections.increment(1);
                let connection = connection(stream, peer, listener.clone(), permit, serve.clone(), shutdown.clone());
                worker.tasks.spawn("connection", connection);
            }
            Err(refusal) => refuse(refusal, peer),
        }
    }
}

/// The checks that need nothing but the address. Behind a trusted proxy they wait for its header.
fn admit<S: Serve>(
    listener: &Listener,
    peer: SocketAddr,
    permits: &Arc<Permits>,
    serve: &S,
) -> Result<Permit, Refusal> {
    let limits = serve.limits();
    let mut permit = permits.acquire(limits.connections_max).ok_or(Refusal::ConnectionsMax)?;
    if !listener.trusts(peer.ip()) {
        serve.admit(peer.ip())?;
        if !permit.count_for(peer.ip(), limits.connections_per_address_max) {
            return Err(Refusal::ConnectionsPerAddressMax);
        }
    }
    Ok(permit)
}

/// A connection's task. Not an async function: that would keep its arguments, and what serves the connection has them already. Boxed, for the task around
/// it keeps room for its future twice.
fn connection<S: Serve>(
    stream: TcpStream,
    peer: SocketAddr,
    listener: Arc<Listener>,
    permit: Permit,
    serve: S,
    shutdown: CancellationToken,
) -> Serving {
    let begun = Box::pin(begin(stream, peer, listener, permit, serve, shutdown));
    Box::pin(async move {
        match begun.await {
            Ok((serving, _permit)) => serving.await,
            Err(refusal) => refuse(refusal, peer),
        }
    })
}

/// Finds out what is spoken, and who is to serve it.
async fn begin<S: Serve>(
    stream: TcpStream,
    peer: SocketAddr,
    listener: Arc<Listener>,
    mut permit: Permit,
    serve: S,
    shutdown: CancellationToken,
) -> Result<(Serving, Permit), Refusal> {
    // Small answers must not wait for the peer's delayed acknowledgement. A failure here means that the peer is gone.
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().map_err(|_| Refusal::Closed)?;
    let limits = serve.limits();
    let mut conn = ConnectionInfo { peer, local, listener, tls: None };
    let admit = |address| {
        serve.admit(address)?;
        if permit.count_for(address, limits.connections_per_address_max) {
            Ok(())
        } else {
            Err(Refusal::ConnectionsPerAddressMax)
        }
    };
    let detected = tokio::select! {
        detected = detect(stream, &mut conn, &limits, admit) => detected?,
        () = shutdown.cancelled() => return Err(Refusal::ShuttingDown),
    };
    Ok((serve.serve(detected.spoken, detected.io, detected.prefix, conn, shutdown), permit))
}

fn refuse(refusal: Refusal, peer: SocketAddr) {
    telemetry::connection_refused(refusal.reason());
    tracing::debug!(%peer, reason = refusal.reason(), "connection refused");
}

/// How long not to accept after an error, so that a lack of file descriptors does not spin.
#[derive(Debug, Default)]
struct Pause {
    last: Option<Duration>,
}

impl Pause {
    const FIRST: Duration = Duration::from_millis(5);
    const MAX: Duration = Duration::from_secs(1);

    /// `None` when the error was the one connection's, which is gone.
    fn after(&mut self, error: &io::Error) -> Option<Duration> {
        let of_connection = matches!(
            error.kind(),
            io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::Interrupted
                | io::ErrorKind::WouldBlock
                | io::ErrorKind::TimedOut
        );
        if of_connection {
            return None;
        }
        let next = self.last.map_or(Self::FIRST, |last| (last * 2).min(Self::MAX));
        self.last = Some(next);
        Some(next)
    }

    fn reset(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_descriptors_pauses_longer_and_longer_and_success_forgets_it() {
        let too_many = io::Error::from_raw_os_error(24);
        let mut pause = Pause::default();
        let pauses: Vec<u128> = (0..10).filter_map(|_| pause.after(&too_many)).map(|p| p.as_millis()).collect();
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        pause.reset();
        assert_eq!(pause.after(&too_many), Some(Pause::FIRST));
    }

    #[test]
    fn an_aborted_connection_does_not_pause_the_others() {
        assert_eq!(Pause::default().after(&io::ErrorKind::ConnectionAborted.into()), None);
    }
}
