//! One worker's connections to one upstream.
//!
//! Bounded by `connections_max`: beyond it an idle connection to another endpoint makes room, or the request waits. Idle connections are used
//! newest first, so that the oldest can time out, and looked at before they are used.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::client::conn::http2;
use parking_lot::Mutex;
use portable_atomic::{AtomicU32, Ordering};
use tokio::sync::Notify;

use super::link::{Link, Upload};

/// A connection in use, and its place among `connections_max`.
pub struct Lease {
    pub link: Link,
    _seat: Seat,
}

/// See the module's documentation.
pub struct Pool {
    endpoints: Vec<Mutex<Connections>>,
    seats: Arc<Seats>,
    connections_max: u32,
    idle_timeout: Duration,
}

struct Connections {
    /// Oldest first.
    idle: Vec<Idle>,
    /// The one HTTP/2 connection, once there is one.
    http2: Option<http2::SendRequest<Upload>>,
}

struct Idle {
    // Boxed, so that the list is cheap to shift.
    lease: Box<Lease>,
    since: Instant,
}

impl Pool {
    pub fn new(endpoints: usize, connections_max: u32, waiting_max: u32, idle_timeout: Duration) -> Self {
        let connections = || Mutex::new(Connections { idle: Vec::new(), http2: None });
        Pool {
            endpoints: (0..endpoints).map(|_| connections()).collect(),
            seats: Arc::new(Seats { open: AtomicU32::new(0), queue: Queue::new(waiting_max) }),
            connections_max,
            idle_timeout,
        }
    }

    /// The HTTP/2 connection to an endpoint, if there is one that lives.
    pub fn http2(&self, endpoint: usize) -> Option<http2::SendRequest<Upload>> {
        let mut connections = self.endpoints.get(endpoint)?.lock();
        if connections.http2.as_ref().is_some_and(http2::SendRequest::is_closed) {
            connections.http2 = None;
        }
        connections.http2.clone()
    }

    /// Keeps an HTTP/2 connection for all; the one to use is returned, which is another one if that was faster.
    pub fn keep_http2(&self, endpoint: usize, sender: http2::SendRequest<Upload>) -> http2::SendRequest<Upload> {
        if let Some(known) = self.http2(endpoint) {
            return known;
        }
        if let Some(connections) = self.endpoints.get(endpoint) {
            connections.lock().http2 = Some(sender.clone());
        }
        sender
    }

    /// An idle connection to an endpoint that can take a request.
    pub fn take_idle(&self, endpoint: usize, now: Instant) -> Option<Box<Lease>> {
        loop {
            let Idle { mut lease, since } = self.endpoints.get(endpoint)?.lock().idle.pop()?;
            if now.saturating_duration_since(since) < self.idle_timeout && lease.link.is_usable() {
                return Some(lease);
            }
        }
    }

    /// Room for one more connection, waited for until `deadline`; or, while waiting, an idle connection after all.
    ///
    /// # Errors
    /// The deadline passed, or `waiting_max` others wait.
    pub async fn seat(&self, endpoint: usize, deadline: Instant) -> Result<Room, Full> {
        loop {
            if let Some(seat) = self.seats.take(self.connections_max) {
                return Ok(Room::Seat(seat));
            }
            if let Some(lease) = self.take_idle(endpoint, Instant::now()) {
                return Ok(Room::Idle(lease));
            }
            if self.evict() {
                continue;
            }
            if !self.seats.queue.wait(deadline).await {
                return Err(Full);
            }
        }
    }

    /// Gives a connection back that can take the next request.
    pub fn put(&self, endpoint: usize, lease: Box<Lease>, now: Instant) {
        if let Some(connections) = self.endpoints.get(endpoint) {
            connections.lock().idle.push(Idle { lease, since: now });
            self.seats.queue.tell();
        }
    }

    /// Closes what has been idle for too long or was closed by its peer.
    pub fn sweep(&self, now: Instant) {
        for connections in &self.endpoints {
            let fresh = |idle: &mut Idle| {
                let young = now.saturating_duration_since(idle.since) < self.idle_timeout;
                young && idle.lease.link.is_usable()
            };
            connections.lock().idle.retain_mut(fresh);
        }
    }

    /// Connections, idle and in use, HTTP/2 not among them.
    pub fn open(&self) -> u32 {
        self.seats.open.load(Ordering::Relaxed)
    }

    /// Closes the oldest idle connection of the endpoint that has most.
    fn evict(&self) -> bool {
        let most = self.endpoints.iter().max_by_key(|connections| connections.lock().idle.len());
        let oldest = most.and_then(|connections| {
            let mut connections = connections.lock();
            (!connections.idle.is_empty()).then(|| connections.idle.remove(0))
        });
        oldest.is_some()
    }
}

/// What was waited for.
pub enum Room {
    Seat(Seat),
    Idle(Box<Lease>),
}

impl Room {
    pub fn into_seat(self) -> Option<Seat> {
        match self {
            Room::Seat(seat) => Some(seat),
            Room::Idle(_) => None,
        }
    }
}

/// `connections_max` is reached, and nothing was given back in time or too many wait for it.
#[derive(Debug)]
pub struct Full;

impl Seat {
    pub fn lease(self, link: Link) -> Box<Lease> {
        Box::new(Lease { link, _seat: self })
    }
}

struct Seats {
    open: AtomicU32,
    queue: Queue,
}

impl Seats {
    fn take(self: &Arc<Self>, max: u32) -> Option<Seat> {
        let free = |open: u32| (open < max).then_some(open + 1);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok()?;
        Some(Seat(self.clone()))
    }
}

/// One of `connections_max`, given back when it is dropped.
pub struct Seat(Arc<Seats>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.queue.tell();
    }
}

/// A bounded number of requests that wait for something to be given back.
#[derive(Debug)]
pub struct Queue {
    waiting: AtomicU32,
    waiting_max: u32,
    freed: Notify,
}

impl Queue {
    pub fn new(waiting_max: u32) -> Self {
        Queue { waiting: AtomicU32::new(0), waiting_max, freed: Notify::new() }
    }

    /// Waits for something given back; false: the queue is full, or the deadline has passed.
    pub async fn wait(&self, deadline: Instant) -> bool {
        let room = |waiting: u32| (waiting < self.waiting_max).then_some(waiting + 1);
        if self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_err() {
            return false;
        }
        let _place = Place(&self.waiting);
        tokio::time::timeout_at(deadline.into(), self.freed.notified()).await.is_ok()
    }

    /// Something was given back.
    pub fn tell(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.freed.notify_one();
        }
    }
}

/// A place in a queue, given up when it is dropped.
struct Place<'a>(&'a AtomicU32);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
