//! The response cache of the request plane: two levels, one request to the upstream for many clients, stale answers while the uplink is down.
//!
//! Order of a GET: what of the request counts ([`asked`]) → memory, disk → fresh: given; stale and allowed: given, and fetched behind it; otherwise fetched,
//! by one for all who ask the same, with the validators of what is there → kept while it passes.
//!
//! Promises: an answer that is not for all is given only to the device that asked for it; an answer asked for before its URL was changed or purged is not
//! kept after it; who waits for another's fetch waits `cache_wait_ms` at the most; bodies above `entry_bytes_max` are not held. Nothing is allocated
//! before the first request along a route with a cache, and routes without one never come here.
//!
//! Cost of a hit: one SHA-256 over target and headers, two short locks, a copy of the header map; the body is shared.

mod answer;
mod asked;
mod disk;
mod fetch;
mod flight;
mod store;
mod tee;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Body as _;
use parking_lot::Mutex;
use portable_atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Exchange, ProxyBody, Route, UpstreamFault};
use crate::cache::response::{Entry, Key, Rule, Terms, Use};
pub use crate::cache::response::{age_of, is_listed};
use crate::limit;
use crate::tasks::Tasks;
use crate::telemetry::meters;

use answer::{give, mark};
pub use asked::url;
use asked::{Asked, Way};
use disk::Disk;
use fetch::{There, is_trouble, put_back};
use flight::{Flights, Joined, Landed};
use store::Memory;

/// How the cache took part in an answer: an extension of it, for the access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheOutcome {
    Hit,
    /// Stale, and given all the same.
    Stale,
    /// Stale, and good for longer as the upstream has said.
    Revalidated,
    /// Fetched by another request.
    Shared,
    Miss,
    /// Not for the cache.
    Bypass,
}

impl CacheOutcome {
    pub const fn as_str(self) -> &'static str {
        match self {
            CacheOutcome::Hit => "hit",
            CacheOutcome::Stale => "stale",
            CacheOutcome::Revalidated => "revalidated",
            CacheOutcome::Shared => "shared",
            CacheOutcome::Miss => "miss",
            CacheOutcome::Bypass => "bypass",
        }
    }
}

/// A number of each level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Levels {
    pub memory: u64,
    pub disk: u64,
}

/// A request along a route with a cache.
pub struct Errand<'a> {
    pub route: &'a Route,
    pub rule: &'a Arc<Rule>,
    /// By [`url`], as the client said it.
    pub url: String,
    /// Who asks, where the gateway knows.
    pub device: Option<&'a str>,
    /// Steers balancing.
    pub balancing: u64,
    pub deadline: Instant,
}

/// The cache of all routes.
pub struct Cached {
    memory: Arc<Memory>,
    disk: Option<Disk>,
    flights: Arc<Flights>,
    /// Pages whose answers are not worth waiting for, and until when.
    alone: Mutex<HashMap<Key, u64>>,
    waiting: AtomicU32,
    waiting_max: u32,
    wait: Duration,
    tasks: Tasks,
    started: Instant,
}

impl fmt::Debug for Cached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cached")
    }
}

/// An answer whose body is still to come.
struct Draft {
    key: Key,
    url: Box<str>,
    status: StatusCode,
    headers: HeaderMap,
    terms: Terms,
    age: Duration,
    at_ms: u64,
    seq: u64,
}

/// What is needed to ask the upstream, also after whoever wanted it has gone.
struct Fetch {
    exchange: Arc<dyn Exchange>,
    to: Arc<str>,
    balancing: u64,
    timeout: Duration,
    deadline: Instant,
    rule: Arc<Rule>,
    asked: Box<Asked>,
    /// What the upstream is going to see, without validators.
    head: Parts,
}

type Answer = Result<Response<ProxyBody>, UpstreamFault>;

impl Cached {
    pub(super) fn new(limits: &limit::Config, data_dir: &Path) -> Self {
        let memory = Arc::new(Memory::new(limits.cache_memory_bytes_max.bytes()));
        let disk_bytes_max = limits.cache_disk_bytes_max.bytes();
        let interval = Duration::from_secs(limits.cache_disk_interval_secs.into());
        let open = || Disk::open(data_dir.join(FOLDER), disk_bytes_max, interval, memory.clone());
        let disk = if disk_bytes_max > 0 { open() } else { None };
        Cached {
            memory,
            disk,
            flights: Arc::default(),
            alone: Mutex::default(),
            waiting: AtomicU32::new(0),
            waiting_max: limits.cache_waiting_max,
            wait: Duration::from_millis(limits.cache_wait_ms.into()),
            tasks: Tasks::default(),
            started: clock(),
        }
    }

    /// Answers `request`, whose headers are those to be sent, from the cache or by `exchange`.
    ///
    /// # Errors
    /// What the upstream's fault was, where there is nothing to be given instead.
    ///
    /// # Cancel safety
    /// Dropped, whoever waits for the same fetches it.
    pub fn exchange(
        self: &Arc<Self>,
        exchange: &Arc<dyn Exchange>,
        errand: Errand<'_>,
        request: Request<ProxyBody>,
    ) -> Pin<Box<dyn Future<Output = Answer> + Send + 'static>> {
        let (mut head, body) = request.into_parts();
        let Errand { route, rule, url, device, balancing, deadline } = errand;
        let way = Way::of(&mut head, !body.is_end_stream(), &url, &route.name, device);
        let (cached, exchange, to) = (self.clone(), exchange.clone(), route.to.clone());
        let page = match way {
            Way::Cache(asked) => {
                let (timeout, rule) = (route.timeout, rule.clone());
                let fetch = Fetch { exchange, to, balancing, timeout, deadline, rule, asked, head };
                return Box::pin(async move { cached.answer(fetch).await });
            }
            Way::Around => None,
            Way::Change(page) => Some(page),
        };
        Box::pin(async move {
            let request = Request::from_parts(head, body);
            let mut response = exchange.exchange(&to, balancing, request, deadline).await?;
            if let Some(page) = page.filter(|_| response.status().is_success() || response.status().is_redirection()) {
                cached.invalidate(page);
            }
            let why = if page.is_some() { "method" } else { "bypass" };
            mark(&mut response, CacheOutcome::Bypass, &format!("fwd={why}"));
            Ok(response)
        })
    }

    async fn answer(self: &Arc<Self>, fetch: Fetch) -> Answer {
        let shared = fetch.asked.shared;
        for _ in 0..LEADERS_MAX {
            let now_ms = self.now_ms();
            let found = self.find(&fetch.asked, now_ms).await;
            let permitted = found.as_deref().map(|entry| entry.permit(&fetch.asked.says, now_ms));
            let mut fallback = None;
            match (&found, permitted) {
                (Some(entry), Some(Use::Fresh)) => {
                    return Ok(give(entry, &fetch.asked, now_ms, CacheOutcome::Hit, None));
                }
                (Some(entry), Some(Use::WhileRevalidate)) => {
                    if !entry.is_resting(now_ms) {
                        self.revalidate(&fetch, entry);
                    }
                    return Ok(give(entry, &fetch.asked, now_ms, CacheOutcome::Stale, None));
                }
                (Some(entry), Some(Use::Ask { if_error: true })) => fallback = Some(entry.clone()),
                (_, Some(Use::Ask { if_error: false }) | None) | (None, Some(_)) => {}
            }
            if fetch.asked.says.only_if_cached {
                // RFC 9111 section 5.2.1.7.
                let mut response = Response::new(empty());
                *response.status_mut() = StatusCode::GATEWAY_TIMEOUT;
                mark(&mut response, CacheOutcome::Miss, "fwd=miss;detail=\"only-if-cached\"");
                return Ok(response);
            }
            if fetch.asked.is_head {
                return self.head(&fetch, fallback).await;
            }
            if self.is_alone(shared, now_ms) {
                return self.fetch(&fetch, There { found, fallback }, None).await;
            }
            let mut under_way = match self.flights.join(shared) {
                Joined::Lead(lead) => return self.fetch(&fetch, There { found, fallback }, Some(lead)).await,
                Joined::Wait(under_way) => under_way,
            };
            let Some(_waiting) = Waiting::begin(self) else {
                return self.fetch(&fetch, There { found, fallback }, None).await;
            };
            let until = fetch.deadline.min(clock() + self.wait);
            match tokio::time::timeout_at(until.into(), under_way.wait_for(Option::is_some))
                .await
                .map(|landed| landed.map(|l| l.clone()))
            {
                Ok(Ok(Some(Landed::Kept(entry)))) if fetch.asked.takes(entry.key) => {
                    return Ok(give(&entry, &fetch.asked, self.now_ms(), CacheOutcome::Shared, None));
                }
                Ok(Ok(Some(Landed::Failed(fault)))) => {
                    let stale = fallback.ok_or(fault)?;
                    return Ok(give(&stale, &fetch.asked, self.now_ms(), CacheOutcome::Stale, None));
                }
                // It was for another, or took too long.
                Ok(Ok(_)) | Err(_) => return self.fetch(&fetch, There { found, fallback }, None).await,
                // Whoever fetched has gone away.
                Ok(Err(_)) => {}
            }
        }
        let found = self.find(&fetch.asked, self.now_ms()).await;
        self.fetch(&fetch, There { found, fallback: None }, None).await
    }

    async fn find(&self, asked: &Asked, now_ms: u64) -> Option<Arc<Entry>> {
        let keys = [Some(asked.shared), asked.own];
        if let Some(entry) = keys.iter().flatten().find_map(|key| self.memory.get(*key)) {
            return Some(entry);
        }
        let disk = self.disk.as_ref()?;
        for key in keys.into_iter().flatten() {
            if let Some(entry) = disk.read(key, now_ms).await.map(Arc::new)
                && self.memory.is_valid(&entry)
            {
                self.memory.put(entry.clone());
                return Some(entry);
            }
        }
        None
    }

    fn invalidate(&self, page: u128) {
        self.memory.invalidate(page);
        if let Some(disk) = &self.disk {
            disk.remove(Key { page, variant: 0 }, Key { page, variant: u128::MAX });
        }
    }

    /// HEAD is passed on where no answer to GET is there, and keeps nothing.
    async fn head(&self, fetch: &Fetch, fallback: Option<Arc<Entry>>) -> Answer {
        let mut head = fetch.head.clone();
        put_back(&mut head.headers, &fetch.asked);
        let request = Request::from_parts(head, empty());
        let answered = fetch.exchange.exchange(&fetch.to, fetch.balancing, request, fetch.deadline).await;
        match (answered, fallback) {
            (Ok(response), Some(entry)) if is_trouble(response.status()) => {
                Ok(give(&entry, &fetch.asked, self.now_ms(), CacheOutcome::Stale, Some(response.status())))
            }
            (Ok(mut response), _) => {
                mark(&mut response, CacheOutcome::Miss, "fwd=miss");
                Ok(response)
            }
            (Err(_), Some(entry)) => Ok(give(&entry, &fetch.asked, self.now_ms(), CacheOutcome::Stale, None)),
            (Err(fault), None) => Err(fault),
        }
    }

    /// Fetches behind an answer that has been given, unless somebody does.
    fn revalidate(self: &Arc<Self>, fetch: &Fetch, entry: &Arc<Entry>) {
        let Joined::Lead(lead) = self.flights.join(fetch.asked.shared) else { return };
        let (cached, entry) = (self.clone(), entry.clone());
        let mut fetch = Fetch {
            exchange: fetch.exchange.clone(),
            to: fetch.to.clone(),
            deadline: clock() + fetch.timeout,
            rule: fetch.rule.clone(),
            asked: fetch.asked.clone(),
            head: fetch.head.clone(),
            ..*fetch
        };
        fetch.head.method = Method::GET;
        self.tasks.spawn("cache-revalidate", async move {
            let until = fetch.deadline;
            let whole = async {
                let Ok(response) =
                    cached.fetch(&fetch, There { found: Some(entry.clone()), fallback: Some(entry) }, Some(lead)).await
                else {
                    return;
                };
                let mut body = response.into_body();
                while let Some(Ok(_)) = body.frame().await {}
            };
            // Whoever waits for it learns by the dropped lead that nothing came.
            let _ = tokio::time::timeout_at(until.into(), whole).await;
        });
    }

    /// Keeps a whole answer, unless its page has been changed since it was asked for.
    fn keep(&self, draft: Draft, body: Bytes) -> Arc<Entry> {
        let Draft { key, url, status, headers, terms, age, at_ms, seq } = draft;
        let rest_until_ms = AtomicU64::new(0);
        let seq = AtomicU64::new(seq);
        let entry = Arc::new(Entry { key, url, status, headers, body, terms, age, at_ms, seq, rest_until_ms });
        if self.memory.is_valid(&entry) {
            meters().cache_stored_bytes.increment(entry.cost_bytes());
            self.memory.put(entry.clone());
            if let Some(disk) = &self.disk {
                disk.write(&entry, self.now_ms());
            }
        }
        entry
    }

    /// Removes what is kept for whom has asked: there is something newer that is not to be kept.
    fn forget(&self, asked: &Asked) {
        for key in [Some(asked.shared), asked.own].into_iter().flatten() {
            self.memory.remove(key);
            if let Some(disk) = &self.disk {
                disk.remove(key, key);
            }
        }
    }

    /// Whether nobody should wait for another's fetch, since the last one was of no use to the others.
    fn is_alone(&self, key: Key, now_ms: u64) -> bool {
        self.alone.lock().get(&key).is_some_and(|until| now_ms < *until)
    }

    fn leave_alone(&self, key: Key) {
        let mut alone = self.alone.lock();
        if alone.len() >= ALONE_MAX {
            alone.clear();
        }
        alone.insert(key, self.now_ms() + ALONE_MS);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(clock().saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX)
    }

    /// Removes every answer to the URL, which may be a path and query alone; or, with `prefix`, to those that begin with it. Gives back how many were in memory and
    /// on disk. Reads the disk.
    pub fn purge(&self, url: &str, prefix: bool) -> Levels {
        let is_meant = |kept: &str| {
            // Without a scheme it is meant for every host.
            let kept = if url.starts_with('/') { path_of(kept) } else { kept };
            if prefix { kept.starts_with(url) } else { kept == url }
        };
        let memory = self.memory.purge(is_meant);
        let disk = self.disk.as_ref().map_or(0, |disk| disk.purge(is_meant));
        Levels { memory, disk }
    }

    /// What is kept: bytes, and answers.
    pub fn held(&self) -> (Levels, Levels) {
        let (bytes, entries) = self.disk.as_ref().map_or((0, 0), Disk::held);
        (Levels { memory: self.memory.bytes(), disk: bytes }, Levels { memory: self.memory.entries(), disk: entries })
    }
}

/// From the first slash after the host on.
fn path_of(url: &str) -> &str {
    let after_scheme = url.find("://").map_or(0, |at| at + 3);
    url.get(after_scheme..).and_then(|rest| rest.find('/').and_then(|at| rest.get(at..))).unwrap_or("/")
}

/// One of the requests that wait for another's fetch.
struct Waiting(Arc<Cached>);

impl Waiting {
    fn begin(cached: &Arc<Cached>) -> Option<Self> {
        let max = cached.waiting_max;
        let more = |waiting| (waiting < max).then_some(waiting + 1);
        cached.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Waiting(cached.clone()))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Follows a paused clock in tests.
fn clock() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn empty() -> ProxyBody {
    ProxyBody::new(Empty::new().map_err(|never| match never {}))
}

/// In the data folder.
const FOLDER: &str = "cache";
/// How often a request takes part in a fetch whose leader goes away, before it fetches alone.
const LEADERS_MAX: u32 = 3;
/// How long nobody waits for another's fetch of what turned out not to be for others, and of how many forms that is remembered.
const ALONE_MS: u64 = 10_000;
const ALONE_MAX: usize = 4096;
