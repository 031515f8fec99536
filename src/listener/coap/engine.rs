//! What the two engines (a UDP socket's endpoint, a TCP connection) have in common, and the dealings of either with the service.

use std::future::Future;
use std::net::SocketAddr;
use std::task::{Context, Poll};
use std::time::Instant;

use tidegate_coap::client::{Call, CallId, CallsFull};
use tidegate_coap::endpoint::Delivery;
use tidegate_coap::tcp::Connection;
use tidegate_coap::{Endpoint, Event, Handle, Notification, NotifyError, ObserverId, Request, Response};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;

use super::answer::Answer;
use super::devices;
use super::service::{Moment, Reply, Service};
use crate::gateway::Drained;
use crate::tasks::Tasks;

/// One side of the sans-IO engine. That a request is gone when its answer comes means that it was answered otherwise, for want of room.
pub trait Engine {
    fn respond(&mut self, now: Instant, handle: Handle, response: &Response<'_>);
    fn observe(&mut self, now: Instant, handle: Handle, response: &Response<'_>) -> Option<ObserverId>;
    fn notify(&mut self, now: Instant, to: ObserverId, notification: Notification) -> Result<(), NotifyError>;
    fn poll_event(&mut self) -> Option<Event>;
    /// The peer receives what is sent to its address.
    fn validate(&mut self, now: Instant, peer: SocketAddr);
    /// The answer to this request costs too much to be made again for each of its blocks.
    fn keep_answer(&mut self, request: &Request<'_>);
    fn call(&mut self, now: Instant, peer: SocketAddr, call: Call) -> Result<CallId, CallsFull>;
    fn hang_up(&mut self, now: Instant, call: CallId);
}

impl Engine for Endpoint {
    fn respond(&mut self, now: Instant, handle: Handle, response: &Response<'_>) {
        let _ = Endpoint::respond(self, now, handle, response);
    }

    fn observe(&mut self, now: Instant, handle: Handle, response: &Response<'_>) -> Option<ObserverId> {
        Endpoint::observe(self, now, handle, response).unwrap_or(None)
    }

    fn notify(&mut self, now: Instant, to: ObserverId, notification: Notification) -> Result<(), NotifyError> {
        Endpoint::notify(self, now, to, notification)
    }

    fn poll_event(&mut self) -> Option<Event> {
        Endpoint::poll_event(self)
    }

    fn validate(&mut self, now: Instant, peer: SocketAddr) {
        Endpoint::validate(self, now, peer);
    }

    fn keep_answer(&mut self, request: &Request<'_>) {
        Endpoint::keep_answer(self, request);
    }

    fn call(&mut self, now: Instant, peer: SocketAddr, call: Call) -> Result<CallId, CallsFull> {
        Endpoint::call(self, now, peer, call)
    }

    fn hang_up(&mut self, now: Instant, call: CallId) {
        Endpoint::hang_up(self, now, call);
    }
}

impl Engine for Connection {
    fn respond(&mut self, _: Instant, handle: Handle, response: &Response<'_>) {
        let _ = Connection::respond(self, handle, response);
    }

    fn observe(&mut self, _: Instant, handle: Handle, response: &Response<'_>) -> Option<ObserverId> {
        Connection::observe(self, handle, response).unwrap_or(None)
    }

    fn notify(&mut self, _: Instant, to: ObserverId, notification: Notification) -> Result<(), NotifyError> {
        Connection::notify(self, to, &notification)
    }

    fn poll_event(&mut self) -> Option<Event> {
        Connection::poll_event(self)
    }

    /// TCP's handshake has shown it.
    fn validate(&mut self, _: Instant, _: SocketAddr) {}

    fn keep_answer(&mut self, request: &Request<'_>) {
        Connection::keep_answer(self, request);
    }

    fn call(&mut self, _: Instant, _: SocketAddr, call: Call) -> Result<CallId, CallsFull> {
        Connection::call(self, call)
    }

    fn hang_up(&mut self, _: Instant, call: CallId) {
        Connection::hang_up(self, call);
    }
}

/// Answers a request, now or when its outcome is known.
pub fn answer<E: Engine>(
    engine: &mut E,
    service: &mut Service,
    elsewhere: &mut Elsewhere,
    now: Moment,
    request: &Request<'_>,
) {
    match service.handle(now, request) {
        Reply::Now(answer) => answer.with_location(|response| engine.respond(now.at, request.handle, response)),
        Reply::Validated(answer) => {
            engine.validate(now.at, request.peer);
            engine.respond(now.at, request.handle, &answer.response());
        }
        Reply::Later => {}
        Reply::Elsewhere(answer) => {
            engine.keep_answer(request);
            elsewhere.ask(request.handle, answer);
        }
        Reply::Observe { answer, tag } => {
            let observer = engine.observe(now.at, request.handle, &answer.response());
            service.registered(tag, observer);
            if let Some(observer) = observer {
                advance(engine, service, now, observer);
            }
        }
    }
}

/// Requests that upstreams are answering; as many as the engine keeps open.
pub struct Elsewhere {
    shutdown: CancellationToken,
    /// Made for the first of them: most connections have none.
    answers: Option<Answers>,
}

struct Answers {
    tasks: Tasks,
    sender: UnboundedSender<(Handle, Answer)>,
    receiver: UnboundedReceiver<(Handle, Answer)>,
    received: Vec<(Handle, Answer)>,
}

impl Elsewhere {
    pub fn new(shutdown: &CancellationToken) -> Self {
        Elsewhere { shutdown: shutdown.clone(), answers: None }
    }

    /// A panic is logged; the asker hears nothing and asks again.
    fn ask(&mut self, handle: Handle, answer: impl Future<Output = Answer> + Send + 'static) {
        let answers = self.answers.get_or_insert_with(|| {
            let (sender, receiver) = unbounded_channel();
            Answers { tasks: Tasks::new(self.shutdown.clone()), sender, receiver, received: Vec::new() }
        });
        let sender = answers.sender.clone();
        answers.tasks.spawn("coap-proxy", async move {
            // Nobody hears it whose engine has ended.
            let _ = sender.send((handle, answer.await));
        });
    }

    /// Ready when there are answers to be [given](Self::answer).
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(Answers { receiver, received, .. }) = &mut self.answers else { return Poll::Pending };
        receiver.poll_recv_many(cx, received, ANSWERS_MAX).map(|_| ())
    }

    /// Gives the answers that have come to the engine.
    pub fn answer<E: Engine>(&mut self, engine: &mut E, now: Moment) {
        for (handle, answer) in self.answers.iter_mut().flat_map(|answers| answers.received.drain(..)) {
            engine.respond(now.at, handle, &answer.response());
        }
    }
}

/// Answers taken at a time.
const ANSWERS_MAX: usize = 64;

/// What other threads had for us: outcomes, messages for observers, orders to end sessions.
pub fn take_outbox<E: Engine>(engine: &mut E, service: &mut Service, now: Moment, drained: &mut Drained) {
    for (handle, outcome) in drained.completions.drain(..) {
        let answer = service.completed(handle, &outcome);
        engine.respond(now.at, Handle::from_bits(handle), &answer.response());
    }
    while let Some(delivery) = drained.deliveries.pop_front() {
        if let Some((observer, notification)) = service.deliver(&delivery) {
            notify(engine, service, now, observer, notification);
        }
    }
    // The box is ours, no session's: nobody closes it.
    drained.close = None;
    for observer in service.missed() {
        refresh(engine, service, now, observer);
    }
    if service.has_orders() {
        service.sweep(now);
    }
}

/// What has happened in the engine, and who has to be told that his observation is over.
pub fn follow_events<E: Engine>(engine: &mut E, service: &mut Service, now: Moment) {
    for (observer, last) in service.ended() {
        notify(engine, service, now, observer, last);
    }
    while let Some(event) = engine.poll_event() {
        match event {
            Event::Delivered { observer, .. } => advance(engine, service, now, observer),
            Event::Refresh { observer } => refresh(engine, service, now, observer),
            Event::ObserverGone { observer, .. } => service.left(observer),
            Event::CallFailed { call, error } => devices::failed(service, call, error),
        }
    }
    devices::advance(engine, service, now);
}

/// Hands over what found the engine full.
pub fn advance_all<E: Engine>(engine: &mut E, service: &mut Service, now: Moment) {
    for observer in service.waiting() {
        advance(engine, service, now, observer);
    }
}

fn notify<E: Engine>(engine: &mut E, service: &mut Service, now: Moment, to: ObserverId, notification: Notification) {
    match notification.delivery {
        Delivery::Each { .. } => {
            service.wait(to, notification);
            advance(engine, service, now, to);
        }
        // Gone: its event is on the way. Full is for values that must arrive.
        Delivery::Latest => _ = engine.notify(now.at, to, notification),
    }
}

/// Hands over what waits for an observer, as far as the engine has room.
fn advance<E: Engine>(engine: &mut E, service: &mut Service, now: Moment, to: ObserverId) {
    while let Some(notification) = service.next(to) {
        match engine.notify(now.at, to, notification) {
            Ok(()) => service.sent(to),
            Err(NotifyError::Full | NotifyError::Gone) => return,
        }
    }
}

/// Sends an observer the value as it is now.
fn refresh<E: Engine>(engine: &mut E, service: &mut Service, now: Moment, observer: ObserverId) {
    if let Some(current) = service.current(observer, now.at) {
        notify(engine, service, now, observer, current);
    }
}
