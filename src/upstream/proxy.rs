//! The request plane's way to the upstreams, one for each worker: pick an endpoint, send, stream the answer back.
//!
//! Promises: nothing is buffered beyond one frame and hyper's own windows; a request waits no longer than its deadline for the answer's head; a request
//! is sent a second time only when the first cannot have had an effect (nothing was sent, or the method is idempotent and there is no body), to an
//! endpoint that has not failed it, within the retry budget, or at once over another connection where a kept one had just been closed; an answer that
//! breaks off is an error to whoever reads it, never a shorter answer.
//!
//! Cost of a request on a connection in use: one short lock for the balancer, one for the pool, no task, no timer operation, two allocations (the
//! answer's body and the buffer for what was read).
//!
//! Not here: which requests come here, and what headers they have (`listener`).

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{HOST, UPGRADE};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http2;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;

use super::chooser::{Chooser, Meters};
use super::connect::{Dial, Open, http1_builder, http2_builder};
use super::link::{BoxError, Fault as LinkFault, Link, ProxyBody, SendFault, Upload, with_read};
use super::pool::{Lease, Pool, Queue, Room, Seat};
use super::{Config, Upstream, connect};
use crate::balance::{Balancer, EndpointIndex, Outcome, State};
use crate::tasks::Tasks;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It could not be reached, or broke off before its answer's head was whole.
    Unreachable,
    /// No endpoint is healthy, or none has room.
    Unavailable,
    /// No answer in time.
    Timeout,
    /// The request's own body broke off: the asker's fault.
    RequestBody,
}

/// What came back.
pub struct Answer {
    pub response: Response<ProxyBody>,
    /// The URL of the endpoint that gave it.
    pub endpoint: Arc<str>,
}

/// Every HTTP upstream as one worker uses it.
pub struct Proxy {
    lanes: Vec<Arc<Lane>>,
    tasks: Tasks,
}

/// One upstream as one worker uses it.
pub(super) struct Lane {
    config: Arc<Config>,
    dials: Vec<Dial>,
    /// Like `dials`, without HTTP/2, for connections that are going to change their protocol.
    upgrade_dials: Vec<Dial>,
    names: Vec<Arc<str>>,
    headers: HeaderMap,
    chooser: Chooser,
    /// When an upstream in trouble was last mentioned.
    warned: Mutex<Option<Instant>>,
    pool: Pool,
    /// Requests that wait for an endpoint below its `in_flight_max`.
    queue: Queue,
    meters: Meters,
}

/// A connection that a request goes over.
enum Connection {
    Http1 { lease: Box<Lease>, reused: bool },
    Http2(http2::SendRequest<Upload>),
}

/// What is left of an attempt that failed.
struct Failed {
    fault: Fault,
    why: String,
    /// The request, if it may be sent again.
    again: Option<Box<Request<Upload>>>,
}

impl Proxy {
    /// To be made on the worker's runtime. Connections close with it.
    pub(super) fn new(upstreams: &[Arc<Upstream>], tasks: &Tasks) -> Self {
        let lanes: Vec<Arc<Lane>> = upstreams.iter().filter_map(Lane::new).collect();
        let swept: Vec<Weak<Lane>> = lanes.iter().map(Arc::downgrade).collect();
        if !swept.is_empty() {
            let shutdown = tasks.shutdown_token().clone();
            tasks.spawn("upstream-sweep", async move {
                tokio::select! {
                    () = sweep(swept) => {}
                    () = shutdown.cancelled() => {}
                }
            });
        }
        Proxy { lanes, tasks: tasks.clone() }
    }

    /// Sends `request`, whose headers are those to be sent, to an endpoint of the upstream `to`. Without `Host` the endpoint's own is sent. `key`
    /// steers hashing algorithms. `deadline` is for the answer's head.
    ///
    /// An answer 101 carries hyper's `OnUpgrade` in its extensions.
    ///
    /// # Errors
    /// See [`Fault`].
    ///
    /// # Cancel safety
    /// A dropped future abandons the request and its connection.
    pub async fn exchange(
        &self,
        to: &str,
        key: u64,
        request: Request<ProxyBody>,
        deadline: Instant,
    ) -> Result<Answer, Fault> {
        let lane = self.lanes.iter().find(|lane| lane.config.name == to).ok_or(Fault::Unavailable)?;
        lane.exchange(key, request, deadline, &self.tasks).await
    }
}

async fn sweep(lanes: Vec<Weak<Lane>>) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let now = Instant::now();
        for lane in &lanes {
            let Some(lane) = lane.upgrade() else { return };
            lane.pool.sweep(now);
        }
    }
}

impl Lane {
    fn new(upstream: &Arc<Upstream>) -> Option<Arc<Self>> {
        let upgrade_dials = upstream.upgrade_dials()?;
        let config = upstream.config.clone();
        let idle = Duration::from_millis(config.idle_timeout_ms.into());
        let lane = Arc::new(Lane {
            dials: upstream.dials.clone(),
            upgrade_dials,
            names: upstream.dials.iter().map(|dial| dial.endpoint.url.as_str().into()).collect(),
            headers: super::http::own_headers(&config),
            chooser: Chooser::new(&config, upstream.health.clone(), Instant::now()),
            warned: Mutex::default(),
            pool: Pool::new(upstream.dials.len(), config.connections_max, config.waiting_max, idle),
            queue: Queue::new(config.waiting_max),
            meters: Meters::new(&config.name),
            config,
        });
        upstream.note_lane(&lane);
        Some(lane)
    }

    /// Reads what this worker knows about the endpoints.
    pub(super) fn with_balancer<T>(&self, read: impl FnOnce(&Balancer) -> T) -> T {
        self.chooser.with_balancer(read)
    }

    /// Connections of this worker.
    pub(super) fn connections(&self) -> u32 {
        self.pool.open()
    }

    async fn exchange(
        self: &Arc<Self>,
        key: u64,
        request: Request<ProxyBody>,
        deadline: Instant,
        tasks: &Tasks,
    ) -> Result<Answer, Fault> {
        let mut request = request.map(|rest| Upload { first: None, rest });
        let headers = request.headers_mut();
        headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        let upgrade = headers.contains_key(UPGRADE);
        let own_host = headers.contains_key(HOST);
        let mut began = Instant::now();
        let mut tried: Vec<EndpointIndex> = Vec::new();
        let mut to = match self.chooser.pick(key, &tried, false, began) {
            Some(to) => to,
            None => self.wait_for_one(key, deadline).await.ok_or(Fault::Unavailable)?,
        };
        loop {
            let dial = self.dials.get(to.0).ok_or(Fault::Unavailable)?;
            if !own_host {
                request.headers_mut().insert(HOST, dial.endpoint.authority.clone());
            }
            let mut report = Report::new(self.clone(), to, began, deadline);
            let until = deadline.min(began + Duration::from_millis(self.config.request_timeout_ms.into()));
            let sent = match upgrade {
                true => self.switch(to, request, until, tasks).await,
                false => self.attempt(to, request, until, tasks).await,
            };
            let now = Instant::now();
            let (result, again) = match sent {
                Ok((head, copy)) => {
                    report.head(head.status(), now);
                    self.meters.seconds.record(now.saturating_duration_since(began).as_secs_f64());
                    let again = copy.filter(|_| is_gateway_trouble(head.status()));
                    (Ok(head), again)
                }
                Err(Failed { fault, why, again }) => {
                    if matches!(fault, Fault::Unreachable | Fault::Timeout) {
                        report.failed(now);
                        self.warn(dial, &why, now);
                    }
                    (Err(fault), again)
                }
            };
            // Told before the next endpoint is chosen, where there is a next one.
            let mut report = Some(report);
            if let Some(again) = again
                && tried.len() + 1 < self.config.retry.attempts_max as usize
                && now < deadline
            {
                report = None;
                tried.push(to);
                if let Some(next) = self.chooser.pick(key, &tried, true, now) {
                    (request, to, began) = (*again, next, now);
                    continue;
                }
            }
            let head = match result {
                Ok(head) => head,
                Err(fault) => {
                    self.meters.error.increment(1);
                    return Err(fault);
                }
            };
            self.meters.ok.increment(1);
            let endpoint = self.names.get(to.0).cloned().unwrap_or_else(|| "".into());
            return Ok(Answer { response: self.stream(head, report).await, endpoint });
        }
    }

    /// An endpoint, when one that is only busy has room again.
    async fn wait_for_one(&self, key: u64, deadline: Instant) -> Option<EndpointIndex> {
        let is_busy = || {
            self.chooser
                .with_balancer(|balancer| balancer.statuses(Instant::now()).any(|status| status.state == State::Busy))
        };
        while is_busy() && self.queue.wait(deadline).await {
            if let Some(to) = self.chooser.pick(key, &[], false, Instant::now()) {
                return Some(to);
            }
        }
        None
    }

    /// Says what is wrong, now and then: an outage under load would say it thousands of times a second.
    fn warn(&self, dial: &Dial, why: &str, now: Instant) {
        let mut last = self.warned.lock();
        if last.is_none_or(|last| now.saturating_duration_since(last) >= WARN_EVERY) {
            *last = Some(now);
            drop(last);
            tracing::warn!(
                upstream = self.config.name,
                endpoint = dial.endpoint.url,
                error = why,
                "upstream request failed"
            );
        }
    }

    /// Sends over pooled connections until one that lives has been found. With the answer comes the request, if it may be sent elsewhere too.
    async fn attempt(
        &self,
        to: EndpointIndex,
        mut request: Request<Upload>,
        until: Instant,
        tasks: &Tasks,
    ) -> Result<(Head, Option<Box<Request<Upload>>>), Failed> {
        let mut stale = 0;
        loop {
            let connection = match self.connection(to, until, tasks).await {
                Ok(connection) => connection,
                Err((fault, why)) => return Err(Failed { fault, why, again: Some(Box::new(request)) }),
            };
            if let Err(error) = peek(request.body_mut()).await {
                if let Connection::Http1 { lease, .. } = connection {
                    self.pool.put(to.0, lease, Instant::now());
                }
                return Err(Failed { fault: Fault::RequestBody, why: error.to_string(), again: None });
            }
            let is_repeatable = self.is_repeatable(&request);
            match connection {
                Connection::Http1 { mut lease, reused } => match lease.link.send(&mut request, until).await {
                    Ok(response) => {
                        let again = (is_repeatable && is_gateway_trouble(response.status())).then(|| Box::new(request));
                        return Ok((Head::Http1 { response, lease, endpoint: to.0 }, again));
                    }
                    Err(SendFault::Unsent) if reused => {}
                    Err(SendFault::Unsent) => {
                        let why = "the connection closed at once".to_owned();
                        return Err(Failed { fault: Fault::Unreachable, why, again: Some(Box::new(request)) });
                    }
                    // Most likely it was closed for being idle, just then (RFC 9112 section 9.3.1): no fault of the endpoint's.
                    Err(SendFault::Broken(LinkFault::Closed | LinkFault::Io(_)))
                        if reused && is_repeatable && stale < STALE_MAX =>
                    {
                        stale += 1;
                    }
                    Err(SendFault::Broken(fault)) => {
                        // The body that we were given failed, not the connection.
                        let is_ours = !matches!(fault, LinkFault::Upload(_));
                        let blamed = if is_ours { Fault::Unreachable } else { Fault::RequestBody };
                        let again = (is_repeatable && is_ours).then(|| Box::new(request));
                        return Err(Failed { fault: blamed, why: fault.to_string(), again });
                    }
                    Err(SendFault::Timeout) => {
                        return Err(Failed::timeout(is_repeatable.then(|| Box::new(request))));
                    }
                },
                Connection::Http2(mut sender) => {
                    let dial = self.dials.get(to.0).ok_or_else(|| Failed::timeout(None))?;
                    let copy = (is_repeatable && self.dials.len() > 1).then(|| copy(&request));
                    let sending = sender.try_send_request(for_http2(request, dial));
                    return match tokio::time::timeout_at(until.into(), sending).await {
                        Ok(Ok(response)) => Ok((Head::Http2(response), copy)),
                        Ok(Err(mut error)) => match error.take_message() {
                            Some(unsent) => {
                                let why = error.error().to_string();
                                Err(Failed { fault: Fault::Unreachable, why, again: Some(Box::new(unsent)) })
                            }
                            None => Err(Failed::broken(error.error(), copy)),
                        },
                        Err(_) => Err(Failed::timeout(copy)),
                    };
                }
            }
        }
    }

    /// Whether sending a request twice does no harm (RFC 9110 section 9.2.2) and costs no body.
    fn is_repeatable(&self, request: &Request<Upload>) -> bool {
        let idempotent = matches!(
            *request.method(),
            Method::GET | Method::HEAD | Method::PUT | Method::DELETE | Method::OPTIONS | Method::TRACE
        );
        idempotent && request.body().is_end_stream() && self.config.retry.attempts_max > 1
    }

    async fn connection(
        &self,
        to: EndpointIndex,
        until: Instant,
        tasks: &Tasks,
    ) -> Result<Connection, (Fault, String)> {
        if let Some(sender) = self.pool.http2(to.0) {
            return Ok(Connection::Http2(sender));
        }
        if let Some(lease) = self.pool.take_idle(to.0, Instant::now()) {
            return Ok(Connection::Http1 { lease, reused: true });
        }
        let full = |_| (Fault::Unavailable, "connections_max is reached".to_owned());
        let seat = match self.pool.seat(to.0, until).await.map_err(full)? {
            Room::Idle(lease) => return Ok(Connection::Http1 { lease, reused: true }),
            Room::Seat(seat) => seat,
        };
        let dial = self.dials.get(to.0).ok_or((Fault::Unavailable, String::new()))?;
        let opening = self.open(to, dial, seat, tasks);
        match tokio::time::timeout_at(until.into(), opening).await {
            Ok(opened) => opened.map_err(|error| (Fault::Unreachable, error.to_string())),
            Err(_) => Err((Fault::Timeout, connect::Fault::ConnectTimeout.to_string())),
        }
    }

    async fn open(
        &self,
        to: EndpointIndex,
        dial: &Dial,
        seat: Seat,
        tasks: &Tasks,
    ) -> Result<Connection, connect::Fault> {
        let (stream, http2) = dial.stream().await?;
        let open = Open::count(&self.config.name);
        if http2 {
            let (sender, connection) =
                http2_builder().handshake(TokioIo::new(stream)).await.map_err(connect::Fault::Broken)?;
            tasks.spawn("upstream-connection", async move {
                let _held = (open, seat);
                // Whoever waits for an answer is told why there is none.
                let _ = connection.await;
            });
            return Ok(Connection::Http2(self.pool.keep_http2(to.0, sender)));
        }
        Ok(Connection::Http1 { lease: seat.lease(Link::new(stream, open)), reused: false })
    }

    /// Sends a request that asks for another protocol, over a connection of its own which a task drives: afterwards the connection is the asker's.
    async fn switch(
        &self,
        to: EndpointIndex,
        request: Request<Upload>,
        until: Instant,
        tasks: &Tasks,
    ) -> Result<(Head, Option<Box<Request<Upload>>>), Failed> {
        let Some(dial) = self.upgrade_dials.get(to.0) else { return Err(Failed::timeout(None)) };
        let opened = async {
            let seat = match self.pool.seat(to.0, until).await {
                Ok(Room::Seat(seat)) => Some(seat),
                // What was idle makes room by being closed.
                Ok(Room::Idle(lease)) => {
                    drop(lease);
                    self.pool.seat(to.0, until).await.ok().and_then(Room::into_seat)
                }
                Err(_) => None,
            };
            let Some(seat) = seat else { return Ok(None) };
            let (stream, _) = dial.stream().await?;
            let open = Open::count(&self.config.name);
            let (sender, connection) =
                http1_builder().handshake(TokioIo::new(stream)).await.map_err(connect::Fault::Broken)?;
            tasks.spawn("upstream-connection", async move {
                let _held = (open, seat);
                let _ = connection.with_upgrades().await;
            });
            Ok(Some(sender))
        };
        let opened: Result<_, connect::Fault> = match tokio::time::timeout_at(until.into(), opened).await {
            Ok(opened) => opened,
            Err(_) => Err(connect::Fault::ConnectTimeout),
        };
        let again = Some(Box::new(request));
        let mut sender = match opened {
            Ok(Some(sender)) => sender,
            Ok(None) => {
                return Err(Failed {
                    fault: Fault::Unavailable,
                    why: "connections_max is reached".into(),
                    again: None,
                });
            }
            Err(error) => return Err(Failed { fault: Fault::Unreachable, why: error.to_string(), again }),
        };
        let Some(request) = again else { return Err(Failed::timeout(None)) };
        match tokio::time::timeout_at(until.into(), sender.send_request(*request)).await {
            Ok(Ok(response)) => Ok((Head::Http2(response), None)),
            Ok(Err(error)) => Err(Failed::broken(&error, None)),
            Err(_) => Err(Failed::timeout(None)),
        }
    }

    /// Makes the answer into one that streams, or that is whole already.
    async fn stream(self: &Arc<Self>, head: Head, report: Option<Report>) -> Response<ProxyBody> {
        match head {
            Head::Http1 { response, lease, endpoint } => {
                let mut download = Download { lease: Some(lease), lane: self.clone(), endpoint, report };
                let first = std::future::poll_fn(|cx| Poll::Ready(download.poll_first(cx))).await;
                let body = match first {
                    First::Whole(None) => empty(),
                    First::Whole(Some(data)) => ProxyBody::new(Full::new(data).map_err(|never| match never {})),
                    First::More(frame) => ProxyBody::new(Begun { first: frame, rest: download }),
                };
                response.map(|()| body)
            }
            Head::Http2(response) => response.map(|body| ProxyBody::new(Tracked { body, report })),
        }
    }
}

/// An answer whose body is still to come.
enum Head {
    Http1 {
        response: Response<()>,
        lease: Box<Lease>,
        endpoint: usize,
    },
    /// Over a connection that a task drives.
    Http2(Response<Incoming>),
}

impl Head {
    fn status(&self) -> StatusCode {
        match self {
            Head::Http1 { response, .. } => response.status(),
            Head::Http2(response) => response.status(),
        }
    }
}

impl Failed {
    fn broken(error: &hyper::Error, again: Option<Box<Request<Upload>>>) -> Self {
        let why = match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        // The body that we were given failed, not the connection.
        let fault = if error.is_user() { Fault::RequestBody } else { Fault::Unreachable };
        Failed { fault, why, again }
    }

    fn timeout(again: Option<Box<Request<Upload>>>) -> Self {
        Failed { fault: Fault::Timeout, why: "no answer in time".into(), again }
    }
}

/// The same request without a body once more.
fn copy(request: &Request<Upload>) -> Box<Request<Upload>> {
    let mut copy = Request::new(Upload::empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    Box::new(copy)
}

/// A gateway's own trouble, which another endpoint may not have.
fn is_gateway_trouble(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE)
}

/// Reads the first frame of a body if it is there, so that it leaves together with the head. What is not there is not waited for: an asker may want an
/// answer first.
async fn peek(body: &mut Upload) -> Result<(), BoxError> {
    if body.first.is_some() || body.rest.is_end_stream() {
        return Ok(());
    }
    let mut asked = false;
    let first = std::future::poll_fn(|cx| match Pin::new(&mut body.rest).poll_frame(cx) {
        Poll::Ready(frame) => Poll::Ready(frame),
        // The first question makes the asker's side read; its second answer is the last one.
        Poll::Pending if !asked => {
            asked = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
        Poll::Pending => Poll::Ready(None),
    });
    body.first = first.await.transpose()?;
    Ok(())
}

/// HTTP/2 says in its pseudo-headers what HTTP/1.1 says in `Host`.
fn for_http2(mut request: Request<Upload>, dial: &Dial) -> Request<Upload> {
    let host = request.headers_mut().remove(HOST);
    let authority = host.as_ref().unwrap_or(&dial.endpoint.authority);
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let scheme = if dial.endpoint.tls { "https" } else { "http" };
    if let Ok(uri) = Uri::builder().scheme(scheme).authority(authority.as_bytes()).path_and_query(path).build() {
        *request.uri_mut() = uri;
    }
    *request.version_mut() = http::Version::HTTP_2;
    request
}

fn empty() -> ProxyBody {
    ProxyBody::new(Empty::new().map_err(|never| match never {}))
}

/// The body of an answer over a link; gives the link back when it is at its end.
struct Download {
    /// None: the body has ended.
    lease: Option<Box<Lease>>,
    lane: Arc<Lane>,
    endpoint: usize,
    report: Option<Report>,
}

enum First {
    /// That was all.
    Whole(Option<Bytes>),
    /// There is more to come after this, if it is there already.
    More(Option<Result<Frame<Bytes>, BoxError>>),
}

impl Download {
    /// Looks for a body that came with its head: most do, and need nothing further.
    fn poll_first(&mut self, cx: &mut Context<'_>) -> First {
        if self.finish() {
            return First::Whole(None);
        }
        match self.poll_next(cx) {
            Poll::Pending => First::More(None),
            Poll::Ready(None) => First::Whole(None),
            Poll::Ready(Some(Ok(frame))) if self.lease.is_none() => match frame.into_data() {
                Ok(data) => First::Whole(Some(data)),
                Err(frame) => First::More(Some(Ok(frame))),
            },
            Poll::Ready(Some(frame)) => First::More(Some(frame)),
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(lease) = &mut self.lease else { return Poll::Ready(None) };
        match std::task::ready!(lease.link.poll_body(cx)) {
            Some(Err(fault)) => {
                if let Some(report) = &mut self.report {
                    report.outcome = Outcome::Failure;
                }
                self.lease = None;
                self.report = None;
                Poll::Ready(Some(Err(fault.into())))
            }
            frame => {
                self.finish();
                Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)))
            }
        }
    }

    /// Once the body is whole, the link can take the next request, unless the peer wants to close it or has not had all of this one. False: it is not.
    fn finish(&mut self) -> bool {
        let Some(lease) = self.lease.take_if(|lease| lease.link.is_answered()) else { return self.lease.is_none() };
        if lease.link.is_at_rest() {
            self.lane.pool.put(self.endpoint, lease, Instant::now());
        }
        self.report = None;
        true
    }

    fn size_hint(&self) -> SizeHint {
        self.lease.as_ref().map_or_else(|| SizeHint::with_exact(0), |lease| lease.link.size_hint())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // Whoever knows the length does not read to the end of the stream.
        self.finish();
    }
}

/// A body of which a frame has been read.
struct Begun {
    first: Option<Result<Frame<Bytes>, BoxError>>,
    rest: Download,
}

impl Body for Begun {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.first.take() {
            Some(frame) => Poll::Ready(Some(frame)),
            None => self.rest.poll_next(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.lease.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let frame = self.first.as_ref().and_then(|frame| frame.as_ref().ok());
        with_read(self.rest.size_hint(), frame)
    }
}

/// The body of an answer over a connection that a task drives.
struct Tracked {
    body: Incoming,
    report: Option<Report>,
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(match frame {
            Some(Ok(frame)) => Some(Ok(frame)),
            Some(Err(error)) => {
                if let Some(report) = &mut self.report {
                    report.outcome = Outcome::Failure;
                }
                Some(Err(error.into()))
            }
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Tells the balancer how a picked request ended, when its answer is through or it is given up.
struct Report {
    lane: Arc<Lane>,
    to: EndpointIndex,
    began: Instant,
    deadline: Instant,
    took: Option<Duration>,
    outcome: Outcome,
}

impl Report {
    fn new(lane: Arc<Lane>, to: EndpointIndex, began: Instant, deadline: Instant) -> Self {
        Report { lane, to, began, deadline, took: None, outcome: Outcome::Cancelled }
    }

    fn head(&mut self, status: StatusCode, now: Instant) {
        self.took = Some(now.saturating_duration_since(self.began));
        self.outcome = if status.is_server_error() { Outcome::Failure } else { Outcome::Success };
    }

    fn failed(&mut self, now: Instant) {
        self.took = Some(now.saturating_duration_since(self.began));
        self.outcome = Outcome::Failure;
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        let now = Instant::now();
        if self.took.is_none() && now >= self.deadline {
            // The asker kept the time itself and has given up.
            self.outcome = Outcome::Failure;
        }
        let took = self.took.unwrap_or_else(|| now.saturating_duration_since(self.began));
        self.lane.chooser.report(self.to, self.outcome, took, now);
        self.lane.queue.tell();
    }
}

/// Kept connections over which one request is tried, beside the last attempt.
const STALE_MAX: u32 = 2;
/// How often idle connections are looked after.
const SWEEP_EVERY: Duration = Duration::from_secs(2);
/// How often an upstream in trouble is mentioned in the log.
const WARN_EVERY: Duration = Duration::from_secs(10);
