//! CoAP over UDP: one socket, one engine, one task.
//!
//! Datagrams are taken and answered in batches, inline: one system call brings up to [`BATCH_MAX`] requests, one sends their answers, and nothing is
//! spawned, queued or copied in between. What other threads have for us (commits, messages for observers, orders to end sessions) waits in the
//! service's outbox. The only timer is armed for the engine's next deadline and moved only when that comes earlier.

use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tidegate_coap::{Batch, Config, Endpoint, Received};
use tokio::net::UdpSocket;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use super::Context;
use super::datagrams::{self, BATCH_MAX, Datagram, Locals};
use super::devices;
use super::engine::{self, Elsewhere};
use super::service::{Moment, SWEEP_EVERY, Service};
use super::timer::Timer;
use crate::gateway::{Drained, Gateway, Limits};
use crate::listener::Listener;
use crate::message::CloseReason;
use crate::telemetry::{self, meters};

/// Serves one worker's socket until `shutdown`, then answers what is open and says so to observers.
pub async fn serve_datagrams(
    socket: std::net::UdpSocket,
    listener: Arc<Listener>,
    context: Context,
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
    let locals = match Locals::new(&socket, context.gateway.limits().coap_sessions_max as usize) {
        Ok(locals) => locals,
        Err(error) => {
            tracing::error!(%error, listener = listener.name(), "socket has no address");
            shutdown.cancel();
            return;
        }
    };
    Driver::new(socket, locals, context, seed, &shutdown).run(&shutdown).await;
}

type Stop<'s, 't> = Pin<&'s mut WaitForCancellationFuture<'t>>;

struct Driver {
    socket: UdpSocket,
    locals: Locals,
    gateway: Arc<Gateway>,
    endpoint: Endpoint,
    service: Service,
    elsewhere: Elsewhere,
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
    /// An upstream has answered.
    Elsewhere,
    Time,
    Shutdown,
}

impl Driver {
    fn new(socket: UdpSocket, locals: Locals, context: Context, seed: [u8; 32], shutdown: &CancellationToken) -> Self {
        let gateway = context.gateway.clone();
        let limits = gateway.limits();
        let now = Instant::now();
        Driver {
            socket,
            locals,
            endpoint: Endpoint::new(engine_config(&limits), now, seed),
            service: Service::new(context, limits.coap_sessions_max as usize),
            elsewhere: Elsewhere::new(shutdown),
            gateway,
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
            let woken = self.wait(&mut timer, Some(stop.as_mut())).await;
            let now = Moment::read();
            match woken {
                Woken::Shutdown => break,
                Woken::Socket => self.receive(now),
                Woken::Outbox => self.take_outbox(now),
                Woken::Elsewhere => self.elsewhere.answer(&mut self.endpoint, now),
                Woken::Time => {}
            }
            self.after(now);
        }
        self.drain(&mut timer).await;
    }

    /// Requests that are open get their answers, observers their last word, for as long as `drain_timeout_ms` allows.
    async fn drain(&mut self, timer: &mut Timer) {
        let deadline = Instant::now() + Duration::from_millis(self.service.limits().drain_timeout_ms.into());
        while self.endpoint.counters().requests_open > 0 && Instant::now() < deadline {
            timer.arm(Some(self.deadline().map_or(deadline, |at| at.min(deadline))));
            let woken = self.wait(timer, None).await;
            let now = Moment::read();
            match woken {
                Woken::Outbox => self.take_outbox(now),
                Woken::Elsewhere => self.elsewhere.answer(&mut self.endpoint, now),
                // What arrives now finds the gateway draining and is told so.
                Woken::Socket => self.receive(now),
                Woken::Time | Woken::Shutdown => {}
            }
            self.after(now);
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
            if self.elsewhere.poll(cx).is_ready() {
                return Poll::Ready(Woken::Elsewhere);
            }
            // Requests to devices are begun with what follows from everything else.
            if self.service.devices.poll(cx).is_ready() {
                return Poll::Ready(Woken::Time);
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

    fn receive(&mut self, now: Moment) {
        if self.sent < self.batch.len() {
            return;
        }
        let Driver { socket, locals, gateway, endpoint, service, elsewhere, .. } = self;
        let received = datagrams::receive(socket, locals, |datagram| {
            take(gateway, endpoint, service, elsewhere, now, &datagram);
        });
        match received {
            Ok(count) => meters().datagrams.increment(count as u64),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // An ICMP error of an earlier datagram; the next call is about something else.
            Err(error) => tracing::debug!(%error, "cannot receive"),
        }
    }

    fn take_outbox(&mut self, now: Moment) {
        engine::take_outbox(&mut self.endpoint, &mut self.service, now, &mut self.drained);
    }

    /// What follows from all that was taken in: timers, events, and the datagrams that go out.
    fn after(&mut self, now: Moment) {
        if self.endpoint.next_timeout().is_some_and(|at| at <= now.at) {
            self.endpoint.handle_timeout(now.at);
        }
        if now.at >= self.next_sweep {
            self.next_sweep = now.at + SWEEP_EVERY;
            self.service.sweep(now);
            devices::sweep(&mut self.endpoint, &mut self.service, &self.gateway, now);
            let malformed = self.endpoint.counters().malformed;
            meters().coap.malformed.increment(malformed - std::mem::replace(&mut self.malformed, malformed));
            // Who found the engine full, and so has no acknowledgement to wait for.
            engine::advance_all(&mut self.endpoint, &mut self.service, now);
        }
        engine::follow_events(&mut self.endpoint, &mut self.service, now);
        self.send();
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
            match datagrams::send(&self.socket, &mut self.locals, &self.batch, self.sent) {
                Ok(sent) => self.sent = sent,
                // Taken up again when the socket has room.
                Err(_) => return,
            }
        }
    }
}

fn take(
    gateway: &Gateway,
    endpoint: &mut Endpoint,
    service: &mut Service,
    elsewhere: &mut Elsewhere,
    now: Moment,
    datagram: &Datagram<'_>,
) {
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
        Received::Reply(reply) => devices::replied(service, now, &reply),
        Received::Request(request) => engine::answer(endpoint, service, elsewhere, now, &request),
        Received::Upload(request) => {
            // Gone cannot be: the request came this moment.
            let _ = match service.admit_upload(now, &request) {
                Ok(()) => endpoint.accept_upload(now.at, &request),
                Err(refusal) => endpoint.respond(now.at, request.handle, &refusal.response()),
            };
        }
    }
}

/// The engine's limits out of the configuration's. What has no key of its own follows from one that has.
fn engine_config(limits: &Limits) -> Config {
    let exchanges_max = limits.exchanges_max as usize;
    Config {
        exchanges_max,
        exchange_bytes_max: exchanges_max.saturating_mul(256),
        requests_max: exchanges_max,
        observers_max: limits.observers_max as usize,
        observers_peer_max: limits.observers_per_peer_max as usize,
        observe_queue_max: limits.commands_per_device_max as usize,
        observe_bytes_max: limits.outbox_bytes_max.in_memory().saturating_mul(4),
        body_bytes_max: limits.blockwise_bytes_max.in_memory().min(limits.packet_bytes_max as usize),
        blockwise_bytes_max: limits.blockwise_bytes_total_max.in_memory(),
        blockwise_peer_bytes_max: limits.blockwise_bytes_max.in_memory().saturating_mul(2),
        blockwise_lifetime: Duration::from_millis(limits.blockwise_timeout_ms.into()),
        peers_max: limits.coap_sessions_max as usize,
        calls_max: limits.device_requests_max as usize,
        calls_peer_max: limits.device_requests_per_device_max as usize,
        ..Config::default()
    }
}

/// Messages taken from the outbox at a time, so that requests are not kept waiting.
const DELIVERIES_MAX: usize = 4 * BATCH_MAX;
