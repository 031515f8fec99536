//! CoAP over UDP: one socket, one engine, one task.
//!
//! Datagrams are taken and answered in batches, inline: one system call brings up to [`BATCH_MAX`] requests, one sends their answers, and nothing is
//! spawned, queued or copied in between. What other threads have for us (commits, messages for observers, orders to end sessions) waits in the
//! service's outbox. The only timer is armed for the engine's next deadline and moved only when that comes earlier.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tidegate_coap::endpoint::Delivery;
use tidegate_coap::{Batch, Config, Endpoint, Event, Handle, Notification, NotifyError, ObserverId, Received, Request};
use tokio::net::UdpSocket;
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use super::datagrams::{self, BATCH_MAX, Datagram};
use super::service::{Moment, Reply, SWEEP_EVERY, Service};
use crate::gateway::{Drained, Gateway, Limits};
use crate::listener::Listener;
use crate::message::CloseReason;
use crate::telemetry::{self, meters};

/// Serves one worker's socket until `shutdown`, then answers what is open and says so to observers.
pub async fn serve_datagrams(
    socket: std::net::UdpSocket,
    listener: Arc<Listener>,
    gateway: Arc<Gateway>,
    shutdown: CancellationToken,
) {
    let socket = match UdpSocket::from_std(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(%error, listener = listener.name(), "socket cannot be watched");
            shutdown.cancel();
            return;
        }
    };
    let mut seed = [0; 32];
    if let Err(error) = getrandom::fill(&mut seed) {
        tracing::error!(%error, listener = listener.name(), "no randomness, CoAP is not served");
        shutdown.cancel();
        return;
    }
    Driver::new(socket, &gateway, seed).run(&shutdown).await;
}

type Stop<'s, 't> = Pin<&'s mut WaitForCancellationFuture<'t>>;

struct Driver {
    socket: UdpSocket,
    gateway: Arc<Gateway>,
    endpoint: Endpoint,
    service: Service,
    batch: Batch,
    /// Datagrams of the batch that are sent.
    sent: usize,
    drained: Drained,
    next_sweep: Instant,
    /// Malformed datagrams that are counted already.
    malformed: u64,
}

/// Why the driver goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    /// Datagrams, or room for them.
    Socket,
    Outbox,
    Time,
    Shutdown,
}

impl Driver {
    fn new(socket: UdpSocket, gateway: &Arc<Gateway>, seed: [u8; 32]) -> Self {
        let limits = gateway.limits();
        let now = Instant::now();
        Driver {
            socket,
            endpoint: Endpoint::new(engine_config(&limits), now, seed),
            service: Service::new(gateway.clone(), limits.coap_sessions_max as usize, None),
            gateway: gateway.clone(),
            batch: Batch::new(),
            sent: 0,
            drained: Drained::default(),
            next_sweep: now + SWEEP_EVERY,
            malformed: 0,
        }
    }

    async fn run(&mut self, shutdown: &CancellationToken) {
        let mut timer = Timer::new();
        let mut stop = pin!(shutdown.cancelled());
        loop {
            timer.arm(self.deadline());
            match self.wait(&mut timer, Some(stop.as_mut())).await {
                Woken::Shutdown => break,
                Woken::Socket => self.receive(),
                Woken::Outbox => self.take_outbox(Moment::read()),
                Woken::Time => {}
            }
            self.after(Moment::read());
        }
        self.drain(&mut timer).await;
    }

    /// Requests that are open get their answers, observers their last word, for as long as `drain_timeout_ms` allows.
    async fn drain(&mut self, timer: &mut Timer) {
        let deadline = Instant::now() + Duration::from_millis(self.service.limits().drain_timeout_ms.into());
        while self.endpoint.counters().requests_open > 0 && Instant::now() < deadline {
            timer.arm(Some(self.deadline().map_or(deadline, |at| at.min(deadline))));
            match self.wait(timer, None).await {
                Woken::Outbox => self.take_outbox(Moment::read()),
                // What arrives now finds the gateway draining and is told so.
                Woken::Socket => self.receive(),
                Woken::Time | Woken::Shutdown => {}
            }
            self.after(Moment::read());
        }
        self.service.close_all(CloseReason::ShuttingDown, Instant::now());
        self.after(Moment::read());
    }

    /// When something has to be done that nobody else wakes us for.
    fn deadline(&mut self) -> Option<Instant> {
        let sweep = (!self.service.is_idle()).then_some(self.next_sweep);
        [self.endpoint.next_timeout(), sweep].into_iter().flatten().min()
    }

    /// Waits for the first of everything that can happen.
    ///
    /// # Cancel safety
    /// What the outbox gave stays in `drained`.
    async fn wait(&mut self, timer: &mut Timer, mut stop: Option<Stop<'_, '_>>) -> Woken {
        poll_fn(|cx| {
            if let Some(stop) = &mut stop
                && stop.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Woken::Shutdown);
            }
            let outbox = self.service.outbox();
            // The waker is in the outbox before orders are looked for, so none is overlooked.
            if outbox.poll_drain(cx, &mut self.drained, DELIVERIES_MAX).is_ready() || self.service.has_orders() {
                return Poll::Ready(Woken::Outbox);
            }
            // While answers wait for room nothing more is read.
            let ready = if self.sent < self.batch.len() {
                self.socket.poll_send_ready(cx)
            } else {
                self.socket.poll_recv_ready(cx)
            };
            if ready.is_ready() {
                return Poll::Ready(Woken::Socket);
            }
            timer.poll(cx).map(|()| Woken::Time)
        })
        .await
    }

    fn receive(&mut self) {
        if self.sent < self.batch.len() {
            return;
        }
        let now = Moment::read();
        let Driver { socket, gateway, endpoint, service, .. } = self;
        let received = datagrams::receive(socket, |datagram| {
            take(gateway, endpoint, service, now, &datagram);
        });
        match received {
            Ok(count) => meters().datagrams.increment(count as u64),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // An ICMP error of an earlier datagram; the next call is about something else.
            Err(error) => tracing::debug!(%error, "cannot receive"),
        }
    }

    /// Completions and messages, then orders.
    fn take_outbox(&mut self, now: Moment) {
        for (handle, outcome) in self.drained.completions.drain(..) {
            let answer = self.service.completed(handle, &outcome);
            // Gone: the asker was answered otherwise, for want of room.
            let _ = self.endpoint.respond(now.at, Handle::from_bits(handle), &answer.response());
        }
        while let Some(delivery) = self.drained.deliveries.pop_front() {
            if let Some((observer, notification)) = self.service.deliver(&delivery) {
                notify(&mut self.endpoint, &mut self.service, now, observer, notification);
            }
        }
        // The box is ours, no session's: nobody closes it.
        self.drained.close = None;
        for observer in self.service.missed() {
            self.refresh(observer, now);
        }
        if self.service.has_orders() {
            self.service.sweep(now);
        }
    }

    /// What follows from all that was taken in: timers, events, and the datagrams that go out.
    fn after(&mut self, now: Moment) {
        if self.endpoint.next_timeout().is_some_and(|at| at <= now.at) {
            self.endpoint.handle_timeout(now.at);
        }
        if now.at >= self.next_sweep {
            self.next_sweep = now.at + SWEEP_EVERY;
            self.service.sweep(now);
            let malformed = self.endpoint.counters().malformed;
            meters().coap.malformed.increment(malformed - std::mem::replace(&mut self.malformed, malformed));
            // Who found the engine full, and so has no acknowledgement to wait for.
            for observer in self.service.waiting() {
                advance(&mut self.endpoint, &mut self.service, now, observer);
            }
        }
        for (observer, last) in self.service.ended() {
            notify(&mut self.endpoint, &mut self.service, now, observer, last);
        }
        while let Some(event) = self.endpoint.poll_event() {
            match event {
                Event::Delivered { observer, .. } => advance(&mut self.endpoint, &mut self.service, now, observer),
                Event::Refresh { observer } => self.refresh(observer, now),
                Event::ObserverGone { observer, .. } => self.service.left(observer),
            }
        }
        self.send();
    }

    /// Sends an observer the value as it is now.
    fn refresh(&mut self, observer: ObserverId, now: Moment) {
        if let Some(current) = self.service.current(observer, now.at) {
            notify(&mut self.endpoint, &mut self.service, now, observer, current);
        }
    }

    fn send(&mut self) {
        loop {
            if self.sent >= self.batch.len() {
                if self.endpoint.batch_len() == 0 {
                    return;
                }
                self.endpoint.swap_batch(&mut self.batch);
                self.sent = 0;
            }
            match datagrams::send(&self.socket, &self.batch, self.sent) {
                Ok(sent) => self.sent = sent,
                // Taken up again when the socket has room.
                Err(_) => return,
            }
        }
    }
}

fn take(gateway: &Gateway, endpoint: &mut Endpoint, service: &mut Service, now: Moment, datagram: &Datagram<'_>) {
    // The filter comes before everything: not even a reset goes out.
    if !gateway.with_rules(|rules| rules.address_filter.permits(datagram.peer.ip())) {
        telemetry::connection_refused("address_filter");
        return;
    }
    if datagram.truncated {
        meters().coap.malformed.increment(1);
        return;
    }
    match endpoint.handle_datagram(now.at, datagram.peer, datagram.bytes) {
        Received::Nothing => {}
        Received::Request(request) => answer(endpoint, service, now, &request),
        Received::Upload(request) => {
            // Gone cannot be: the request came this moment.
            let _ = match service.admit_upload(now, &request) {
                Ok(()) => endpoint.accept_upload(now.at, &request),
                Err(refusal) => endpoint.respond(now.at, request.handle, &refusal.response()),
            };
        }
    }
}

fn answer(endpoint: &mut Endpoint, service: &mut Service, now: Moment, request: &Request<'_>) {
    // Gone cannot be: the request came this moment.
    match service.handle(now, request) {
        Reply::Now(answer) => {
            let _ = endpoint.respond(now.at, request.handle, &answer.response());
        }
        Reply::Validated(answer) => {
            endpoint.validate(now.at, request.peer);
            let _ = endpoint.respond(now.at, request.handle, &answer.response());
        }
        Reply::Later => {}
        Reply::Observe { answer, tag } => {
            let observer = endpoint.observe(now.at, request.handle, &answer.response()).unwrap_or(None);
            service.registered(tag, observer);
            if let Some(observer) = observer {
                advance(endpoint, service, now, observer);
            }
        }
    }
}

fn notify(endpoint: &mut Endpoint, service: &mut Service, now: Moment, to: ObserverId, notification: Notification) {
    match notification.delivery {
        Delivery::Each { .. } => {
            service.wait(to, notification);
            advance(endpoint, service, now, to);
        }
        // Gone: its event is on the way. Full is for values that must arrive.
        Delivery::Latest => _ = endpoint.notify(now.at, to, notification),
    }
}

/// Hands over what waits for an observer, as far as the engine has room.
fn advance(endpoint: &mut Endpoint, service: &mut Service, now: Moment, to: ObserverId) {
    while let Some(notification) = service.next(to) {
        match endpoint.notify(now.at, to, notification) {
            Ok(()) => service.sent(to),
            Err(NotifyError::Full | NotifyError::Gone) => return,
        }
    }
}

/// The engine's limits out of the configuration's. What has no key of its own follows from one that has.
fn engine_config(limits: &Limits) -> Config {
    let bytes = |size: crate::units::ByteSize| usize::try_from(size.bytes()).unwrap_or(usize::MAX);
    let exchanges_max = limits.exchanges_max as usize;
    Config {
        exchanges_max,
        exchange_bytes_max: exchanges_max.saturating_mul(256),
        requests_max: exchanges_max,
        observers_max: limits.observers_max as usize,
        observers_peer_max: limits.observers_per_peer_max as usize,
        observe_queue_max: limits.commands_per_device_max as usize,
        observe_bytes_max: bytes(limits.outbox_bytes_max).saturating_mul(4),
        body_bytes_max: bytes(limits.blockwise_bytes_max).min(limits.packet_bytes_max as usize),
        blockwise_bytes_max: bytes(limits.blockwise_bytes_total_max),
        blockwise_peer_bytes_max: bytes(limits.blockwise_bytes_max).saturating_mul(2),
        blockwise_lifetime: Duration::from_millis(limits.blockwise_timeout_ms.into()),
        peers_max: limits.coap_sessions_max as usize,
        ..Config::default()
    }
}

/// A timer that is moved only to come earlier: a deadline that moves away costs nothing, and the early wake-up finds nothing to do.
struct Timer {
    sleep: Pin<Box<Sleep>>,
    armed: Option<Instant>,
}

impl Timer {
    fn new() -> Self {
        Timer { sleep: Box::pin(tokio::time::sleep(Duration::ZERO)), armed: None }
    }

    fn arm(&mut self, at: Option<Instant>) {
        let Some(at) = at else { return };
        if self.armed.is_none_or(|armed| at < armed) {
            self.sleep.as_mut().reset(at.into());
            self.armed = Some(at);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.armed.is_none() {
            return Poll::Pending;
        }
        let over = self.sleep.as_mut().poll(cx);
        if over.is_ready() {
            self.armed = None;
        }
        over
    }
}

/// Messages taken from the outbox at a time, so that requests are not kept waiting.
const DELIVERIES_MAX: usize = 4 * BATCH_MAX;
