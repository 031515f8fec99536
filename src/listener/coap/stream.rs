//! CoAP over TCP and TLS (RFC 8323): one connection, one engine, one task.
//!
//! Nothing is read while answers pile up or the gateway has enough to do for this peer, so a peer that does not read slows itself down. A connection without
//! a request or an observation ends after `idle_timeout`; one that observes is pinged then, and ends when it does not answer within the same time.

use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{self, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use tidegate_coap::tcp::{Config, Connection, Received};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use super::Context;
use super::devices;
use super::engine::{self, Elsewhere};
use super::service::{Moment, SWEEP_EVERY, Service};
use super::timer::Timer;
use crate::gateway::{Drained, Gateway, Limits, Now, PublicKey};
use crate::listener::{Activity, ConnectionInfo, Deadlined, Deadlines, Prefixed, UnderWay};
use crate::message::CloseReason;
use crate::telemetry::meters;

/// Serves one connection to its end.
pub async fn serve<IO>(io: IO, prefix: BytesMut, conn: ConnectionInfo, context: Context, shutdown: CancellationToken)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = Stream::new(io, prefix, &conn, context, &shutdown);
    let reason = stream.run(&shutdown).await;
    tracing::debug!(peer = %conn.peer, ?reason, "coap connection ended");
    stream.close(Instant::now());
    stream.service.devices.end(&stream.gateway, Instant::now());
    // The peer may be gone already.
    let _ = stream.io.shutdown().await;
}

struct Stream<IO> {
    io: Deadlined<Prefixed<IO>>,
    activity: Arc<Activity>,
    gateway: Arc<Gateway>,
    input: BytesMut,
    connection: Connection,
    service: Service,
    elsewhere: Elsewhere,
    drained: Drained,
    last_input: Instant,
    next_sweep: Instant,
    pinged: bool,
    /// Held while a request is open or something is observed: then silence is no reason to end.
    busy: Option<UnderWay>,
    /// Nothing more is taken in; what is open is answered.
    closing: bool,
    flushed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The peer closed, or a deadline of the stream passed.
    Peer,
    /// The peer did not keep to RFC 8323; it has been told.
    Aborted(&'static str),
    /// It said goodbye, or the gateway stops.
    Finished,
    /// It no longer answers a ping.
    Silent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    Io,
    Outbox,
    /// An upstream has answered.
    Elsewhere,
    Time,
    Shutdown,
}

impl<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream<IO> {
    fn new(io: IO, prefix: BytesMut, conn: &ConnectionInfo, context: Context, shutdown: &CancellationToken) -> Self {
        let gateway = context.gateway.clone();
        let limits = gateway.limits();
        let mut service = Service::new(context, CONTEXTS_MAX).over_tcp();
        if let Some(tls) = &conn.tls {
            let pinned = tls.client_key.and_then(|key| PublicKey::register(key).ok());
            service = service.behind_tls(pinned.and_then(|key| gateway.identity.by_public_key(&key, Now::read())));
        }
        let activity = Arc::new(Activity::default());
        let deadlines = Deadlines {
            idle: limits.idle_timeout.0,
            head: Some(Duration::from_millis(limits.header_timeout_ms.into())),
            write: Duration::from_millis(limits.write_timeout_ms.into()),
        };
        let now = Instant::now();
        Stream {
            io: Deadlined::new(Prefixed::new(prefix, io), deadlines, activity.clone()),
            activity,
            gateway,
            input: BytesMut::new(),
            connection: Connection::new(engine_config(&limits), conn.peer),
            service,
            elsewhere: Elsewhere::new(shutdown),
            drained: Drained::default(),
            last_input: now,
            next_sweep: now + SWEEP_EVERY,
            pinged: false,
            busy: None,
            closing: false,
            flushed: true,
        }
    }

    async fn run(&mut self, shutdown: &CancellationToken) -> End {
        let mut timer = Timer::new();
        let mut stop = pin!(shutdown.cancelled());
        let mut stopping = false;
        loop {
            let now = Moment::read();
            if let Err(what) = self.take_input(now) {
                meters().coap.malformed.increment(1);
                self.last_words().await;
                return End::Aborted(what);
            }
            self.after(now);
            if self.closing && self.connection.open_requests() == 0 && self.connection.output().is_empty() {
                return End::Finished;
            }
            timer.arm(self.deadline(now.at));
            let stop = (!stopping).then_some(stop.as_mut());
            match self.wait(&mut timer, stop).await {
                Err(_) => return End::Peer,
                Ok(Woken::Io) => {}
                Ok(Woken::Outbox) => {
                    engine::take_outbox(&mut self.connection, &mut self.service, Moment::read(), &mut self.drained);
                }
                Ok(Woken::Elsewhere) => self.elsewhere.answer(&mut self.connection, Moment::read()),
                Ok(Woken::Time) => {
                    if let Some(end) = self.check_peer(Instant::now()) {
                        return end;
                    }
                }
                Ok(Woken::Shutdown) => {
                    stopping = true;
                    self.closing = true;
                    self.close(Instant::now());
                    self.connection.release();
                }
            }
        }
    }

    /// Whole messages out of what was read.
    fn take_input(&mut self, now: Moment) -> Result<(), &'static str> {
        let Stream { input, connection, service, elsewhere, .. } = self;
        let mut taken = 0;
        let outcome = loop {
            if self.closing || !connection.wants_input() {
                break Ok(());
            }
            match connection.handle_input(input.get(taken..).unwrap_or_default()) {
                Ok(None) => break Ok(()),
                Err(aborted) => break Err(aborted.what),
                Ok(Some((bytes, received))) => {
                    taken += bytes;
                    // A whole message ends the time that its sender has for it.
                    drop(self.activity.begin());
                    match received {
                        Received::Nothing => {}
                        Received::Reply(reply) => devices::replied(service, now, &reply),
                        Received::Request(request) => engine::answer(connection, service, elsewhere, now, &request),
                        Received::Closing => self.closing = true,
                    }
                }
            }
        };
        input.advance(taken);
        if input.is_empty() {
            // Gives the memory back: this connection may be quiet for long.
            *input = BytesMut::new();
        }
        outcome
    }

    fn after(&mut self, now: Moment) {
        if now.at >= self.next_sweep {
            self.next_sweep = now.at + SWEEP_EVERY;
            self.service.sweep(now);
            devices::sweep(&mut self.connection, &mut self.service, &self.gateway, now);
        }
        engine::advance_all(&mut self.connection, &mut self.service, now);
        engine::follow_events(&mut self.connection, &mut self.service, now);
        let busy = self.connection.open_requests() > 0 || self.service.observes();
        match (&self.busy, busy) {
            (None, true) => self.busy = Some(self.activity.begin()),
            (Some(_), false) => self.busy = None,
            (Some(_), true) | (None, false) => {}
        }
    }

    fn deadline(&self, now: Instant) -> Option<Instant> {
        let sweep = (!self.service.is_idle()).then_some(self.next_sweep);
        let quiet = self.service.observes().then(|| {
            let idle = self.service.limits().idle_timeout.0;
            (self.last_input + if self.pinged { idle * 2 } else { idle }).max(now)
        });
        [sweep, quiet].into_iter().flatten().min()
    }

    /// Pings a peer that has been quiet while it observes; says whether it has been so for too long.
    fn check_peer(&mut self, now: Instant) -> Option<End> {
        if !self.service.observes() {
            return None;
        }
        let (quiet, idle) = (now.saturating_duration_since(self.last_input), self.service.limits().idle_timeout.0);
        if quiet >= idle * 2 {
            return Some(End::Silent);
        }
        if quiet >= idle && !self.pinged {
            self.pinged = true;
            self.connection.ping();
        }
        None
    }

    /// Waits for the first of everything that can happen.
    ///
    /// # Cancel safety
    /// What was read or drained stays in its buffer.
    async fn wait(&mut self, timer: &mut Timer, mut stop: Option<Stop<'_, '_>>) -> std::io::Result<Woken> {
        poll_fn(|cx| {
            if let Some(stop) = &mut stop
                && stop.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Ok(Woken::Shutdown));
            }
            let outbox = self.service.outbox();
            // The waker is in the outbox before orders are looked for, so none is overlooked.
            if outbox.poll_drain(cx, &mut self.drained, DELIVERIES_MAX).is_ready() || self.service.has_orders() {
                return Poll::Ready(Ok(Woken::Outbox));
            }
            if self.elsewhere.poll(cx).is_ready() {
                return Poll::Ready(Ok(Woken::Elsewhere));
            }
            if self.service.devices.poll(cx).is_ready() {
                return Poll::Ready(Ok(Woken::Time));
            }
            if let Poll::Ready(written) = self.poll_output(cx) {
                return Poll::Ready(written.map(|()| Woken::Io));
            }
            if !self.closing
                && self.connection.wants_input()
                && let Poll::Ready(read) = self.poll_input(cx)
            {
                return Poll::Ready(read.map(|()| Woken::Io));
            }
            timer.poll(cx).map(|()| Ok(Woken::Time))
        })
        .await
    }

    /// Ready when something was written, so that what waits for room can follow.
    fn poll_output(&mut self, cx: &mut task::Context<'_>) -> Poll<std::io::Result<()>> {
        if self.connection.output().is_empty() {
            if !self.flushed {
                ready!(Pin::new(&mut self.io).poll_flush(cx))?;
                self.flushed = true;
            }
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, self.connection.output()))?;
        if written == 0 {
            return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
        }
        self.flushed = false;
        self.connection.handle_sent(written);
        Poll::Ready(Ok(()))
    }

    fn poll_input(&mut self, cx: &mut task::Context<'_>) -> Poll<std::io::Result<()>> {
        let mut room = [0; READ_BYTES];
        let mut room = ReadBuf::new(&mut room);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut room))?;
        if room.filled().is_empty() {
            return Poll::Ready(Err(std::io::ErrorKind::UnexpectedEof.into()));
        }
        self.input.extend_from_slice(room.filled());
        self.last_input = Instant::now();
        self.pinged = false;
        Poll::Ready(Ok(()))
    }

    /// What is in the output still goes out: the reason of an abort.
    async fn last_words(&mut self) {
        let Stream { io, connection, .. } = self;
        if io.write_all(connection.output()).await.is_ok() {
            let _ = io.flush().await;
        }
    }

    /// Ends the sessions; observers that are still there get their last word.
    fn close(&mut self, now: Instant) {
        self.service.close_all(CloseReason::ShuttingDown, now);
    }
}

type Stop<'s, 't> = Pin<&'s mut WaitForCancellationFuture<'t>>;

fn engine_config(limits: &Limits) -> Config {
    Config {
        message_bytes_max: (limits.packet_bytes_max as usize).saturating_add(OPTIONS_BYTES),
        output_bytes_max: limits.outbox_bytes_max.in_memory(),
        requests_max: usize::from(limits.in_flight_max),
        observers_max: limits.observers_per_peer_max as usize,
        calls_max: limits.device_requests_per_device_max as usize,
    }
}

/// Devices behind one connection, as through a proxy.
const CONTEXTS_MAX: usize = 16;
/// Messages taken from the outbox at a time.
const DELIVERIES_MAX: usize = 64;
const READ_BYTES: usize = 4096;
/// Header, token and options beside a payload of `packet_bytes_max`.
const OPTIONS_BYTES: usize = 2048;
