//! Multicast discovery (RFC 7252 section 8): one socket in one group on one interface, apart from the listener's own, so that nothing that came to a group
//! is ever taken for unicast.
//!
//! What is answered and when is the engine's business ([`Group`]); here it is `GET /.well-known/core` alone, as a stranger sees it. Where strangers have
//! sessions (an anonymous role), there is one for all who ask, of the last of them.

use std::sync::Arc;
use std::time::Instant;

use tidegate_coap::Request;
use tidegate_coap::multicast::{Config, Group};
use tidegate_coap::option::number;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use super::Context;
use super::datagrams::DATAGRAM_BYTES_MAX;
use super::service::{Moment, Reply, Service};
use crate::listener::Listener;
use crate::message::CloseReason;
use crate::telemetry::meters;

/// Serves one group until `shutdown`. That a group cannot be served ends nothing else.
pub async fn serve_group(
    socket: std::net::UdpSocket,
    listener: Arc<Listener>,
    context: Context,
    shutdown: CancellationToken,
) {
    let mut seed = [0; 32];
    let ready = getrandom::fill(&mut seed).map_err(std::io::Error::from).and_then(|()| UdpSocket::from_std(socket));
    let socket = match ready {
        Ok(socket) => socket,
        Err(error) => return tracing::error!(%error, listener = listener.name(), "multicast group is not served"),
    };
    let mut group = Group::new(Config::default(), seed);
    let mut service = Service::new(context, 1);
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX + 1];
    loop {
        let due = group.next_due();
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = wait(due) => {
                while let Some((peer, bytes)) = group.take_due(Instant::now()) {
                    // Lost like any datagram; whoever wants to know asks again.
                    let _ = socket.try_send_to(&bytes, peer);
                }
                continue;
            }
            () = shutdown.cancelled() => break,
        };
        match received {
            Ok((length, peer)) => {
                meters().datagrams.increment(1);
                let datagram = buffer.get(..length).filter(|_| length <= DATAGRAM_BYTES_MAX).unwrap_or_default();
                if let Some(request) = group.handle_datagram(peer, datagram) {
                    take(&mut group, &mut service, Moment::read(), &request, datagram.len());
                }
            }
            Err(error) => tracing::debug!(%error, "cannot receive"),
        }
    }
    service.close_all(CloseReason::ShuttingDown, Instant::now());
}

/// Ends at `due`, or never.
async fn wait(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn take(group: &mut Group, service: &mut Service, now: Moment, request: &Request<'_>, asked_bytes: usize) {
    // A token is for one gateway, and not for a group to read.
    if !is_discovery(request) || request.query().value("t").is_some() {
        return;
    }
    if let Reply::Now(answer) = service.handle(now, request)
        && request.contents.accept().is_none_or(|wanted| answer.content_format == Some(wanted))
    {
        group.respond(now.at, request, asked_bytes, &answer.response());
    }
}

fn is_discovery(request: &Request<'_>) -> bool {
    request.path.segments().eq([".well-known", "core"]) && request.contents.first(number::OBSERVE).is_none()
}
