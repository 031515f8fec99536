//! MQTT 3.1.1 and 5: one task per connection, the engine of `tidegate-mqtt` inside, the gateway behind.
//!
//! ```text
//! read > engine > event > gateway.publish / subscribe ---.
//!                                                         |  completions, deliveries
//! write < engine < ack / publish < outbox <--------------'
//! ```
//! Promises: an acknowledgement leaves only when the gateway has said yes, in the order of the PUBLISHes; everything that one wake brings
//! leaves in one write; a peer that does not read, does not finish a packet, or says nothing is closed at a deadline; no buffer is held by a
//! connection on which nothing is under way.
//!
//! Cost of a QoS 0 PUBLISH beside the gateway's: decode in place, a comparison of the topic's first level. Of a delivery: one encode into the
//! thread's buffer. A wake costs one clock, one read, one lock of the outbox and one write, however many messages it brings.
//!
//! Deliberately not here: packets (`tidegate-mqtt`), what a message means (`gateway`), proofs (`identity`), WebSocket framing (`websocket`).

mod link;
mod login;
mod message;
mod outcome;
mod session;

#[cfg(test)]
mod tests;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use parking_lot::Mutex;
use portable_atomic::{AtomicU64, Ordering};
use tidegate_mqtt::{self as mqtt, Cause, Close, ConnectEvent, Event, Output};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::gateway::{Gateway, Limits, MqttPending};
use crate::listener::{ConnectionInfo, Serving};
use crate::telemetry::meters;
use link::{Engine, Link, now};
use login::{Entered, Step};
use session::Session;

/// What all MQTT connections of the gateway share.
#[derive(Debug)]
pub struct Shared {
    terms: Mutex<Option<(Limits, Arc<Terms>)>>,
    connections: AtomicU64,
    /// What assigned client identifiers begin with, so that no two starts of the gateway assign the same.
    run: u64,
}

/// The limits that a connection lives by, as they were when it came.
#[derive(Debug)]
struct Terms {
    engine: Arc<mqtt::Config>,
    write_timeout: Duration,
    packet_timeout: Duration,
    slow_timeout: Duration,
    /// How long a subscriber of QoS 0 messages is waited for.
    crowded_wait: Duration,
    /// How long a drain may wait for the outcomes of what was published before.
    drain_timeout: Duration,
}

impl Shared {
    pub fn new() -> Self {
        let mut run = [0; 8];
        // Without randomness the names are still unique within one run.
        let _ = getrandom::fill(&mut run);
        Shared { terms: Mutex::default(), connections: AtomicU64::new(1), run: u64::from_be_bytes(run) }
    }

    /// The terms under the limits now in force; one allocation serves all connections between two reloads.
    fn terms(&self, gateway: &Gateway) -> Arc<Terms> {
        let limits = gateway.limits();
        let mut known = self.terms.lock();
        if let Some((of, terms)) = &*known
            && *of == limits
        {
            return terms.clone();
        }
        let terms = Arc::new(Terms::new(&limits));
        *known = Some((limits, terms.clone()));
        terms
    }

    fn assign_client_id(&self) -> String {
        format!("tidegate-{:016x}-{}", self.run, self.next_connection())
    }

    fn next_connection(&self) -> u64 {
        self.connections.fetch_add(1, Ordering::Relaxed)
    }
}

impl Terms {
    fn new(limits: &Limits) -> Self {
        let millis = |ms: u32| Duration::from_millis(ms.into());
        let keep_alive_max_secs = u16::try_from(limits.keep_alive_max.0.as_secs()).unwrap_or(u16::MAX).max(1);
        let engine = mqtt::Config {
            connect_timeout: millis(limits.auth_timeout_ms),
            packet_bytes_max: limits.packet_bytes_max as usize,
            topic_bytes_max: limits.topic_bytes_max as usize,
            topic_levels_max: limits.topic_levels_max as usize,
            receive_maximum: limits.in_flight_max,
            unreleased_max: limits.in_flight_max,
            in_flight_max: limits.in_flight_max,
            topic_alias_maximum: limits.topic_aliases_max,
            topic_alias_out_max: limits.topic_aliases_max,
            keep_alive_max_secs,
            ..mqtt::Config::default()
        };
        Terms {
            engine: Arc::new(engine),
            write_timeout: millis(limits.write_timeout_ms),
            packet_timeout: millis(limits.header_timeout_ms),
            slow_timeout: millis(limits.slow_reader_timeout_ms),
            crowded_wait: millis(limits.crowded_wait_ms),
            drain_timeout: millis(limits.drain_timeout_ms) / 2,
        }
    }
}

/// Serves one connection to its end.
///
/// What outlives a step is boxed, and so is each step: an idle connection, of which there are thousands, holds its session and little else.
pub fn serve<IO>(
    io: IO,
    prefix: BytesMut,
    conn: ConnectionInfo,
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
) -> Serving
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let terms = shared.terms(&gateway);
    let write_timeout = terms.write_timeout;
    let link = Box::new(Link::new(io, prefix, Engine::new(terms.engine.clone(), now())));
    let entering = Box::pin(enter(link, conn, gateway, shared, terms, shutdown.clone()));
    Box::pin(async move {
        let link = match entering.await {
            Err(link) => link,
            Ok(mut session) => {
                let close = {
                    let mut shutdown = pin!(shutdown.cancelled());
                    poll_fn(|cx| session.poll(cx, |cx| shutdown.as_mut().poll(cx).is_ready())).await
                };
                Box::pin(session.end(close)).await
            }
        };
        Box::pin(link.close(write_timeout)).await;
    })
}

/// From CONNECT to a session; without one the connection is to be closed.
async fn enter<IO>(
    mut link: Box<Link<IO>>,
    conn: ConnectionInfo,
    gateway: Arc<Gateway>,
    shared: Arc<Shared>,
    terms: Arc<Terms>,
    shutdown: CancellationToken,
) -> Result<Box<Session<IO>>, Box<Link<IO>>>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let Some(entered) = begin(&mut link, &conn, &gateway, &shared, &terms, &shutdown).await else { return Err(link) };
    let channel = entered.names.is_some().then(|| Box::new(login::channel(&conn)));
    Ok(Box::new(Session::new(link, entered, gateway, shared.next_connection(), terms, channel)))
}

/// What is under way before a session begins.
enum Waiting {
    Connect,
    Answer(Box<ConnectEvent>, Box<MqttPending>),
}

/// Takes CONNECT, and AUTH as often as it needs. `None`: the connection is to be closed.
async fn begin<IO>(
    link: &mut Link<IO>,
    conn: &ConnectionInfo,
    gateway: &Gateway,
    shared: &Shared,
    terms: &Terms,
    shutdown: &CancellationToken,
) -> Option<Entered>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut waiting = Waiting::Connect;
    loop {
        let event = match next(link, terms, shutdown).await {
            Ok(event) => event,
            Err(close) => {
                note_end(&close);
                return None;
            }
        };
        let (connect, step) = match (event, waiting) {
            (Event::Connect(connect), _) => {
                let step = login::identify(gateway, conn, &connect, now());
                (connect, step)
            }
            (Event::Auth { data }, Waiting::Answer(connect, pending)) => {
                let known = login::answer(gateway, &login::channel(conn), pending, data.expose(), now());
                (connect, known.map(Step::Known))
            }
            // The engine lets nothing else come before the session.
            (_, unchanged) => {
                waiting = unchanged;
                continue;
            }
        };
        let entered = match step {
            Ok(Step::Challenge(data, pending)) => {
                let mut out = link.begin();
                link.engine.challenge(&data, &mut out.bytes);
                waiting = Waiting::Answer(connect, pending);
                flush(link, out).await;
                continue;
            }
            Ok(Step::Known(known)) => login::enter(shared, gateway, conn, connect, known, link).await,
            Err(reason) => Err(reason),
        };
        return match entered {
            Ok((entered, out)) => {
                flush(link, out).await;
                Some(entered)
            }
            Err(reason) => {
                tracing::debug!(peer = %conn.peer, %reason, "mqtt connect refused");
                let mut out = link.begin();
                link.engine.refuse(reason, None, &mut out.bytes);
                flush(link, out).await;
                None
            }
        };
    }
}

/// Hands what was written to the transport; what it does not take at once goes out later.
async fn flush<IO: AsyncRead + AsyncWrite + Unpin>(link: &mut Link<IO>, out: link::Out) {
    let mut out = Some(out);
    poll_fn(|cx| {
        if let Some(out) = out.take()
            && link.poll_write(cx, out, now()).is_err()
        {
            link.engine.handle_eof();
        }
        Poll::Ready(())
    })
    .await;
}

/// The next event of a connection that has no session yet.
async fn next<IO>(
    link: &mut Link<IO>,
    terms: &Terms,
    shutdown: &CancellationToken,
) -> Result<Event<crate::gateway::Delivery>, Close>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut told = pin!(shutdown.cancelled());
    poll_fn(|cx| {
        loop {
            let now = now();
            let mut out = link.begin();
            let mut rest = std::mem::take(&mut link.input);
            let whole = link.engine.handle_input(now, &mut rest, &mut out.bytes);
            link.keep(rest, whole, false, now);
            let said = link.engine.poll_output(now, &mut out.bytes);
            let written = link.poll_write(cx, out, now);
            let deadline = match said {
                Output::Event(event) => return Poll::Ready(Ok(event)),
                Output::Close(close) => return Poll::Ready(Err(close)),
                Output::Timeout(deadline) => deadline,
            };
            if written.is_err() || link.is_stalled(terms.write_timeout, now) || told.as_mut().poll(cx).is_ready() {
                link.engine.handle_eof();
                continue;
            }
            match link.poll_read(cx) {
                Poll::Ready(Ok(chunk)) if !chunk.is_empty() => link.keep(chunk, false, false, now),
                Poll::Ready(_) => link.engine.handle_eof(),
                Poll::Pending => {
                    let deadline = link::earliest(deadline, link.deadline(terms.packet_timeout, terms.write_timeout));
                    if link.poll_timer(cx, deadline).is_pending() {
                        return Poll::Pending;
                    }
                    let mut out = link.begin();
                    link.engine.handle_timeout(now, &mut out.bytes);
                    if link.is_partial_overdue(terms.packet_timeout, now) {
                        link.engine.handle_eof();
                    }
                    if link.poll_write(cx, out, now).is_err() {
                        link.engine.handle_eof();
                    }
                }
            }
        }
    })
    .await
}

/// Counts and logs how a connection ended.
fn note_end(close: &Close) {
    match close.cause {
        Cause::Error(error) => {
            meters().mqtt.malformed.increment(1);
            tracing::debug!(%error, "mqtt connection ended");
        }
        Cause::Disconnect(reason) => tracing::debug!(%reason, "mqtt client disconnected"),
        Cause::Server(reason) | Cause::Refused(reason) => tracing::debug!(%reason, "mqtt connection closed"),
        Cause::Eof | Cause::KeepAliveTimeout | Cause::ConnectTimeout => {
            tracing::debug!(cause = ?close.cause, "mqtt connection ended");
        }
    }
}
