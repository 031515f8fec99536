//! Deliveries over HTTP, off the request path: one request through the balancer, to another endpoint when one fails, until there is a verdict.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::Config;
use super::batch::Post;
use super::chooser::{Chooser, Meters};
use super::connect::{Dial, Fault, Sender};
use super::health::Health;
use crate::balance::{Balancer, EndpointIndex, Outcome, hash};
use crate::tasks::Tasks;

/// What became of a delivery.
#[derive(Debug)]
pub enum Verdict {
    /// 2xx, with a whole body.
    Taken,
    /// Refused with this status for the sake of what was sent: the same again will be refused again.
    Refused(StatusCode),
    /// Not now, for this reason: worth another try, not before `retry_after` if the upstream said so.
    NotNow { why: String, retry_after: Option<Duration> },
    /// No endpoint may be used; one returns by itself after this time, if known.
    Unavailable { returns_in: Option<Duration> },
}

/// The deliveries' way to one upstream; shared by its forward rules.
pub struct Client {
    config: Arc<Config>,
    dials: Vec<Dial>,
    headers: HeaderMap,
    chooser: Chooser,
    idle: Vec<Mutex<Vec<Idle>>>,
    meters: Meters,
}

struct Idle {
    sender: Sender<Full<Bytes>>,
    since: Instant,
}

/// An answer whose body is whole.
struct Answer {
    status: StatusCode,
    retry_after: Option<Duration>,
}

impl Client {
    pub fn new(config: Arc<Config>, dials: Vec<Dial>, health: Arc<Health>) -> Self {
        Client {
            headers: extra_headers(&config),
            idle: dials.iter().map(|_| Mutex::default()).collect(),
            chooser: Chooser::new(&config, health, Instant::now()),
            meters: Meters::new(&config.name),
            config,
            dials,
        }
    }

    /// Reads what is known about the endpoints.
    pub fn with_balancer<T>(&self, read: impl FnOnce(&Balancer) -> T) -> T {
        self.chooser.with_balancer(read)
    }

    /// Sends `post` to one endpoint after the other, as the retry settings allow, until one takes or refuses it.
    ///
    /// # Cancel safety
    /// Dropping it drops the request under way, which may have been taken; sent again it has the same ids.
    pub async fn deliver(&self, post: &Post, tasks: &Tasks) -> Verdict {
        let key = hash::text(&post.path);
        let mut tried: Vec<EndpointIndex> = Vec::new();
        let mut last = None;
        for attempt in 0..self.config.retry.attempts_max {
            let now = Instant::now();
            let Some(picked) = self.chooser.pick(key, &tried, attempt > 0, now) else { break };
            let Some(dial) = self.dials.get(picked.0) else { break };
            let mut report = Report { client: self, picked, began: now, outcome: Outcome::Cancelled };
            let answered = self.attempt(picked, dial, post, tasks).await;
            self.meters.seconds.record(now.elapsed().as_secs_f64());
            report.outcome = match &answered {
                Ok(answer) if !answer.status.is_server_error() => Outcome::Success,
                Ok(_) | Err(_) => Outcome::Failure,
            };
            drop(report);
            let (why, retry_after) = match answered {
                Ok(Answer { status, .. }) if status.is_success() => {
                    self.meters.ok.increment(1);
                    return Verdict::Taken;
                }
                Ok(Answer { status, retry_after }) if is_temporary(status) => {
                    (format!("{}: status {}", dial.endpoint.url, status.as_u16()), retry_after)
                }
                Ok(Answer { status, .. }) => {
                    self.meters.refused.increment(1);
                    return Verdict::Refused(status);
                }
                Err(fault) => (format!("{}: {fault}", dial.endpoint.url), None),
            };
            self.meters.error.increment(1);
            tried.push(picked);
            last = Some(Verdict::NotNow { why, retry_after });
        }
        last.unwrap_or_else(|| {
            let now = Instant::now();
            let returns = self.chooser.with_balancer(|balancer| balancer.returns_at(now));
            Verdict::Unavailable { returns_in: returns.map(|at| at.saturating_duration_since(now)) }
        })
    }

    async fn attempt(&self, to: EndpointIndex, dial: &Dial, post: &Post, tasks: &Tasks) -> Result<Answer, Fault> {
        if let Some(sender) = self.take_idle(to) {
            match self.exchange(to, dial, sender, post).await {
                // The endpoint closed an idle connection just then; that says nothing about a new one.
                Err((Fault::Broken(_), false)) => {}
                other => return other.map_err(|(fault, _)| fault),
            }
        }
        let sender = dial.open(&self.config.name, tasks).await?;
        self.exchange(to, dial, sender, post).await.map_err(|(fault, _)| fault)
    }

    /// One request over one connection. A fault comes with whether the answer had begun.
    async fn exchange(
        &self,
        to: EndpointIndex,
        dial: &Dial,
        mut sender: Sender<Full<Bytes>>,
        post: &Post,
    ) -> Result<Answer, (Fault, bool)> {
        let limit = Duration::from_millis(self.config.request_timeout_ms.into());
        let mut begun = false;
        let answered = timeout(limit, async {
            let response = sender.send(self.request(dial, post)).await.map_err(Fault::Broken)?;
            begun = true;
            let status = response.status();
            let retry_after = response.headers().get(header::RETRY_AFTER).and_then(retry_after);
            let whole = discard(response).await.map_err(Fault::Broken)?;
            Ok((Answer { status, retry_after }, whole))
        });
        let (answer, whole) = match answered.await {
            Ok(Ok(answered)) => answered,
            Ok(Err(fault)) => return Err((fault, begun)),
            Err(_) => return Err((Fault::Timeout, true)),
        };
        if whole && let Some(idle) = self.idle.get(to.0) {
            idle.lock().push(Idle { sender, since: Instant::now() });
        }
        Ok(answer)
    }

    fn request(&self, dial: &Dial, post: &Post) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(post.body.clone()));
        *request.method_mut() = Method::POST;
        // The configuration's check has seen the path with everything filled in that can be.
        *request.uri_mut() = dial.endpoint.uri(&post.path).unwrap_or_default();
        let headers = request.headers_mut();
        headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        headers.extend(post.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        headers.insert(header::HOST, dial.endpoint.authority.clone());
        request
    }

    /// A connection that was in use a moment ago and is not known to be closed.
    fn take_idle(&self, to: EndpointIndex) -> Option<Sender<Full<Bytes>>> {
        let limit = Duration::from_millis(self.config.idle_timeout_ms.into());
        let mut idle = self.idle.get(to.0)?.lock();
        idle.retain(|idle| idle.since.elapsed() < limit);
        while let Some(found) = idle.pop() {
            if found.sender.is_ready() {
                return Some(found.sender);
            }
        }
        None
    }
}

/// Tells the balancer how a picked request ended, even when it is dropped half way.
struct Report<'a> {
    client: &'a Client,
    picked: EndpointIndex,
    began: Instant,
    outcome: Outcome,
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        self.client.chooser.report(self.picked, self.outcome, now.saturating_duration_since(self.began), now);
    }
}

/// What is added to each request of the gateway's own. The configuration's check has found names and values valid.
pub fn extra_headers(config: &Config) -> HeaderMap {
    let mut headers = own_headers(config);
    headers.insert(header::USER_AGENT, HeaderValue::from_static(concat!("tidegate/", env!("CARGO_PKG_VERSION"))));
    headers
}

/// `headers` of the configuration.
pub fn own_headers(config: &Config) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in &config.headers {
        if let (Ok(name), Ok(mut value)) = (http::HeaderName::try_from(name), HeaderValue::try_from(value)) {
            value.set_sensitive(true);
            headers.insert(name, value);
        }
    }
    headers
}

/// Whether the same request may be answered otherwise another time. A redirect is for the operator to follow, not for a queue.
fn is_temporary(status: StatusCode) -> bool {
    let again = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
    !status.is_client_error() || again.contains(&status)
}

/// Reads a body to its end and throws it away; false: it was so long that the rest was left.
async fn discard(response: Response<Incoming>) -> Result<bool, hyper::Error> {
    let mut body = response.into_body();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame?.data_ref().map_or(0, Bytes::len);
        if bytes > ANSWER_BYTES_MAX {
            return Ok(false);
        }
    }
    Ok(true)
}

/// `Retry-After` in seconds or as a date (RFC 9110 section 10.2.3).
fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if let Ok(secs) = text.parse::<u64>() {
        return Some(Duration::from_secs(secs));
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(Duration::from_secs(super::event::http_date_secs(text)?).saturating_sub(now))
}

/// An answer to a delivery says taken or not; a longer one costs its connection.
const ANSWER_BYTES_MAX: usize = 64 << 10;
