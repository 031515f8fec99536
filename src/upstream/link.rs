//! One HTTP/1.1 connection that is driven by whoever uses it, not by a task of its own.
//!
//! hyper's connection future is polled where the answer is waited for and where its body is read, so one proxied request costs one task and no wake-up
//! between tasks. What hyper wakes while it is being polled is polled again at once instead of being scheduled. A link that is idle is polled by
//! nobody; before it is used again one poll shows whether the peer has closed it.

use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use portable_atomic::{AtomicBool, Ordering};

use super::connect::{Open, Stream};
use crate::timer::LazyTimer;

/// Why a body ended early.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body on its way through, in either direction: streamed, with trailers.
pub type ProxyBody = UnsyncBoxBody<Bytes, BoxError>;

/// What is sent: a body whose first frame may have been read already, so that it goes out with the head.
pub struct Upload {
    pub first: Option<Frame<Bytes>>,
    pub rest: ProxyBody,
}

/// The body that was to be sent failed.
#[derive(Debug)]
pub struct UploadFailed(BoxError);

impl fmt::Display for UploadFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the request's body failed: {}", self.0)
    }
}

impl std::error::Error for UploadFailed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = UploadFailed;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UploadFailed>>> {
        match self.first.take() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => Pin::new(&mut self.rest).poll_frame(cx).map_err(UploadFailed),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        with_read(self.rest.size_hint(), self.first.as_ref())
    }
}

/// The size of a body of which `read` has been taken from the front.
pub fn with_read(mut rest: SizeHint, read: Option<&Frame<Bytes>>) -> SizeHint {
    let bytes = read.and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
    match rest.exact() {
        Some(exact) => rest.set_exact(exact + bytes),
        None => {
            let (lower, upper) = (rest.lower(), rest.upper());
            rest = SizeHint::new();
            rest.set_lower(lower + bytes);
            upper.into_iter().for_each(|upper| rest.set_upper(upper + bytes));
        }
    }
    rest
}

/// See the module's documentation.
pub struct Link {
    sender: http1::SendRequest<Upload>,
    engine: Engine,
    timer: LazyTimer,
    _open: Open,
}

/// Why there is no answer.
pub enum SendFault {
    /// Nothing of the request was sent; here it is.
    Unsent(Box<Request<Upload>>),
    /// The connection broke, or what came was not HTTP.
    Broken(hyper::Error),
    /// The deadline passed.
    Timeout,
}

impl Link {
    pub fn new(
        sender: http1::SendRequest<Upload>,
        connection: http1::Connection<TokioIo<Stream>, Upload>,
        open: Open,
    ) -> Self {
        let relay = Arc::new(Relay::default());
        let waker = Waker::from(relay.clone());
        let engine = Engine { connection, relay, waker, ended: false };
        Link { sender, engine, timer: LazyTimer::default(), _open: open }
    }

    /// Whether an idle connection can take a request. Looks only if something has happened to it.
    pub fn is_usable(&mut self) -> bool {
        (!self.is_disturbed() || self.settle()) && self.sender.is_ready()
    }

    /// Lets a connection whose answer has been read come to rest; false: it has ended.
    pub fn settle(&mut self) -> bool {
        let _: Poll<()> = self.engine.run(&mut Context::from_waker(Waker::noop()), |_| Poll::Pending);
        !self.engine.ended && self.sender.is_ready()
    }

    fn is_disturbed(&self) -> bool {
        self.engine.relay.again.load(Ordering::Relaxed)
    }

    /// Sends a request in origin-form and waits for the answer's head.
    ///
    /// # Cancel safety
    /// Dropped, the request may have been sent; the link has to be dropped with it.
    pub async fn send(&mut self, request: Request<Upload>, deadline: Instant) -> Result<Response<Incoming>, SendFault> {
        let mut answer = pin!(self.sender.try_send_request(request));
        let (engine, timer) = (&mut self.engine, &mut self.timer);
        let answered = std::future::poll_fn(|cx| match engine.run(cx, |cx| answer.as_mut().poll(cx)) {
            Poll::Ready(answer) => Poll::Ready(Some(answer)),
            Poll::Pending => timer.poll_past(cx, deadline.into()).map(|()| None),
        });
        match answered.await {
            Some(Ok(response)) => Ok(response),
            Some(Err(mut error)) => Err(match error.take_message() {
                Some(request) => SendFault::Unsent(Box::new(request)),
                None => SendFault::Broken(error.into_error()),
            }),
            None => Err(SendFault::Timeout),
        }
    }

    /// The next frame of an answer that came over this link.
    pub fn poll_body(
        &mut self,
        body: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.engine.run(cx, |cx| Pin::new(&mut *body).poll_frame(cx))
    }
}

/// The connection, and how it is polled.
struct Engine {
    connection: http1::Connection<TokioIo<Stream>, Upload>,
    relay: Arc<Relay>,
    /// Wakes through `relay`.
    waker: Waker,
    ended: bool,
}

impl Engine {
    /// Moves bytes and asks for what is waited for, in turn, until it is there or nothing moves.
    ///
    /// What is wrong with the connection is told to whoever waits for an answer or a body.
    fn run<T>(&mut self, cx: &mut Context<'_>, mut ask: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        self.relay.wake_through(cx.waker());
        self.relay.driving.store(true, Ordering::SeqCst);
        let mut inner = Context::from_waker(&self.waker);
        let mut asked = Poll::Pending;
        for _ in 0..ROUNDS_MAX {
            self.relay.again.store(false, Ordering::SeqCst);
            self.ended = self.ended || Pin::new(&mut self.connection).poll(&mut inner).is_ready();
            asked = ask(&mut inner);
            if asked.is_ready() || self.ended || !self.relay.again.load(Ordering::SeqCst) {
                break;
            }
        }
        self.relay.driving.store(false, Ordering::SeqCst);
        if asked.is_pending() && !self.ended && self.relay.again.load(Ordering::SeqCst) {
            // It could go on, but others want to run (the runtime's budget for this task may be used up), or somebody else has just woken us.
            self.relay.tell();
        }
        asked
    }
}

/// Polls of a connection in a row before others get their turn.
const ROUNDS_MAX: u32 = 4;

/// Passes wake-ups on to whoever drives the link, and only notes those that come while it is being driven.
#[derive(Default)]
struct Relay {
    driving: AtomicBool,
    again: AtomicBool,
    driver: Mutex<Option<Waker>>,
}

impl Relay {
    fn wake_through(&self, waker: &Waker) {
        let mut driver = self.driver.lock();
        if !driver.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *driver = Some(waker.clone());
        }
    }

    fn tell(&self) {
        if let Some(driver) = &*self.driver.lock() {
            driver.wake_by_ref();
        }
    }
}

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.again.store(true, Ordering::SeqCst);
        if !self.driving.load(Ordering::SeqCst) {
            self.tell();
        }
    }
}
