//! The sessions of one engine: one for each device at one peer.
//!
//! CoAP over UDP has no connection, so a session begins with the first request that shows a credential and ends when it has been quiet for `idle_timeout`,
//! when it is ordered to, or when a newer one needs its place: the table is bounded. Sessions with an observation are not idle: they wait for us.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use portable_atomic::{AtomicBool, AtomicU64, Ordering};

use crate::gateway::{Client, Gateway, Mailbox, Open, Opened, Outbox};
use crate::message::{CloseReason, Control, Device, Protocol, Reject};

/// Names a context for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContextId {
    index: u32,
    generation: u32,
}

/// Who speaks: a device, or nobody in particular, at an address.
type Key = (SocketAddr, Option<u32>);

pub struct Context {
    pub id: ContextId,
    pub client: Client,
    /// Tags of its observations.
    pub observations: Vec<u64>,
    /// When its credential ends.
    pub expires_unix: u64,
    /// The token last shown for it, as text, so that the same one need not be verified again. `None`: every request has to prove itself.
    token: Option<Box<[u8]>>,
    key: Key,
    last_used: Instant,
    /// Second chance: used since the hand of the clock came by.
    used: bool,
}

/// See the module's documentation.
pub struct Contexts {
    rows: Vec<(u32, Option<Context>)>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32>,
    peers: HashMap<SocketAddr, Peer>,
    /// In the order in which they are looked at when room is needed.
    clock: VecDeque<ContextId>,
    contexts_max: usize,
    outbox: Arc<Outbox>,
    orders: Arc<Orders>,
}

/// What is known of an address.
#[derive(Default)]
struct Peer {
    contexts: u32,
    /// The row that it used last: nearly always the one that it uses next.
    last: u32,
}

/// Sessions that somebody ordered to end.
#[derive(Default)]
pub struct Orders {
    any: AtomicBool,
    waiting: Mutex<Vec<(ContextId, CloseReason)>>,
}

impl Orders {
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    pub fn take(&self) -> Vec<(ContextId, CloseReason)> {
        let mut waiting = self.waiting.lock();
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut *waiting)
    }
}

/// Ends one session of the many behind an outbox. An order is given once, so the list of orders is no longer than the table.
struct Order {
    id: ContextId,
    given: AtomicBool,
    orders: Arc<Orders>,
    outbox: Arc<Outbox>,
}

impl Control for Order {
    fn close(&self, reason: CloseReason) {
        if self.given.swap(true, Ordering::AcqRel) {
            return;
        }
        self.orders.waiting.lock().push((self.id, reason));
        self.orders.any.store(true, Ordering::Release);
        self.outbox.wake();
    }
}

impl Contexts {
    pub fn new(contexts_max: usize, outbox: Arc<Outbox>) -> Self {
        Contexts {
            rows: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            peers: HashMap::new(),
            clock: VecDeque::new(),
            contexts_max: contexts_max.max(1),
            outbox,
            orders: Arc::default(),
        }
    }

    pub fn orders(&self) -> &Orders {
        &self.orders
    }

    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Whether anybody at this address has a session.
    pub fn knows(&self, peer: SocketAddr) -> bool {
        self.peers.contains_key(&peer)
    }

    /// The session that `peer` used last, if `token` is what it showed then and has not ended. Whether its device still stands, the
    /// gateway asks with every call.
    pub fn shown_again(&mut self, peer: SocketAddr, token: &[u8], now: Instant, now_unix: u64) -> Option<ContextId> {
        let last = self.peers.get(&peer)?.last;
        let context = self.rows.get_mut(last as usize)?.1.as_mut()?;
        if context.key.0 != peer || context.token.as_deref() != Some(token) || now_unix >= context.expires_unix {
            return None;
        }
        context.last_used = now;
        context.used = true;
        Some(context.id)
    }

    /// The session of `device` at `peer`.
    pub fn find(&mut self, peer: SocketAddr, device: Option<&Device>, now: Instant) -> Option<&mut Context> {
        let index = *self.by_key.get(&(peer, device.map(|d| d.index)))?;
        let context = self.rows.get_mut(index as usize)?.1.as_mut()?;
        let own = context.client.caller.device.as_ref().map(|d| d.generation);
        if own != device.map(|d| d.generation) {
            return None;
        }
        context.last_used = now;
        context.used = true;
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.last = index;
        }
        Some(context)
    }

    pub fn get_mut(&mut self, id: ContextId) -> Option<&mut Context> {
        let (generation, row) = self.rows.get_mut(id.index as usize)?;
        row.as_mut().filter(|_| *generation == id.generation)
    }

    /// Begins a session. There has to be room ([`Contexts::crowded_out`]) and none with this key ([`Contexts::stale`]).
    ///
    /// # Errors
    /// As [`Gateway::open`].
    pub fn open(
        &mut self,
        gateway: &Gateway,
        peer: SocketAddr,
        device: Option<Arc<Device>>,
        now: Instant,
    ) -> Result<&mut Context, Reject> {
        let key = (peer, device.as_ref().map(|d| d.index));
        let (index, generation) = match self.free.last() {
            Some(index) => (*index, self.rows.get(*index as usize).map_or(0, |(generation, _)| *generation)),
            None => (u32::try_from(self.rows.len()).unwrap_or(u32::MAX), 0),
        };
        let id = ContextId { index, generation };
        let control = Arc::new(Order {
            id,
            given: AtomicBool::new(false),
            orders: self.orders.clone(),
            outbox: self.outbox.clone(),
        });
        // Unique, so that no session waits for another to end.
        let name = format!("{peer}#{}", NAMES.fetch_add(1, Ordering::Relaxed));
        let open = Open {
            device,
            protocol: Protocol::Coap,
            peer,
            client: &name,
            clean: true,
            mailbox: Mailbox::Shared { outbox: self.outbox.clone(), control },
        };
        let client = open_now(gateway, open, now)?.client;
        let context = Context {
            id,
            client,
            observations: Vec::new(),
            expires_unix: u64::MAX,
            token: None,
            key,
            last_used: now,
            used: true,
        };
        let row = match self.free.pop() {
            Some(index) => index as usize,
            None => {
                self.rows.push((0, None));
                self.rows.len() - 1
            }
        };
        self.by_key.insert(key, index);
        let at = self.peers.entry(peer).or_default();
        at.contexts += 1;
        at.last = index;
        self.clock.push_back(id);
        // The row is there: it was free, or has just been made.
        let full = Reject::Full { limit: "coap_sessions_max", retry_after: FULL_RETRY };
        self.rows.get_mut(row).map(|(_, place)| place.insert(context)).ok_or(full)
    }

    /// The session that has `device`'s place at `peer` but belongs to an older generation of it.
    pub fn stale(&self, peer: SocketAddr, device: Option<&Device>) -> Option<ContextId> {
        let index = *self.by_key.get(&(peer, device.map(|d| d.index)))?;
        self.rows.get(index as usize)?.1.as_ref().map(|context| context.id)
    }

    /// Who has to go before another session may begin: the one that was not used for longest, by and large.
    ///
    /// # Errors
    /// [`Reject::Full`] when all of those looked at wait for notifications.
    pub fn crowded_out(&mut self) -> Result<Option<ContextId>, Reject> {
        if self.by_key.len() < self.contexts_max {
            return Ok(None);
        }
        // All may be marked as used, so the second round finds one where there is one; the bound keeps a table of observers from stalling the worker.
        for _ in 0..self.clock.len().saturating_mul(2).min(LOOKED_AT_MAX) {
            let Some(id) = self.clock.pop_front() else { break };
            let Some(context) = self.get_mut(id) else { continue };
            let used = std::mem::take(&mut context.used);
            if !used && context.observations.is_empty() {
                self.clock.push_front(id);
                return Ok(Some(id));
            }
            self.clock.push_back(id);
        }
        Err(Reject::Full { limit: "coap_sessions_max", retry_after: FULL_RETRY })
    }

    /// Takes a context out, for its session to be closed.
    pub fn remove(&mut self, id: ContextId) -> Option<Context> {
        let (generation, row) = self.rows.get_mut(id.index as usize)?;
        if *generation != id.generation {
            return None;
        }
        let context = row.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(id.index);
        self.by_key.remove(&context.key);
        if let Some(peer) = self.peers.get_mut(&context.key.0) {
            peer.contexts -= 1;
            if peer.contexts == 0 {
                self.peers.remove(&context.key.0);
            }
        }
        // Stale entries of the clock are dropped as the hand passes; before they outnumber the live ones, all at once.
        if self.clock.len() > 2 * self.by_key.len() + 16 {
            let rows = &self.rows;
            self.clock.retain(|id| {
                rows.get(id.index as usize)
                    .is_some_and(|(generation, row)| *generation == id.generation && row.is_some())
            });
        }
        Some(context)
    }

    /// Those that have been quiet for `idle` and wait for nothing.
    pub fn idle(&self, now: Instant, idle: Duration) -> Vec<ContextId> {
        let quiet = |context: &&Context| {
            context.observations.is_empty() && now.saturating_duration_since(context.last_used) >= idle
        };
        self.rows.iter().filter_map(|(_, row)| row.as_ref()).filter(quiet).map(|context| context.id).collect()
    }

    /// Those whose credential has ended.
    pub fn expired(&self, now_unix: u64) -> Vec<ContextId> {
        let over = |context: &&Context| context.expires_unix <= now_unix;
        self.rows.iter().filter_map(|(_, row)| row.as_ref()).filter(over).map(|context| context.id).collect()
    }

    pub fn ids(&self) -> Vec<ContextId> {
        self.rows.iter().filter_map(|(_, row)| row.as_ref()).map(|context| context.id).collect()
    }
}

impl Context {
    /// The credential that was shown for it: a newer one takes the place of an older one, not the other way round.
    pub fn show(&mut self, token: &[u8], expires_unix: u64) {
        if self.token.is_none() || expires_unix > self.expires_unix {
            self.expires_unix = expires_unix;
            self.token = Some(token.into());
        }
    }
}

/// Opens a session without waiting: only a takeover waits, and a unique name takes nobody over.
fn open_now(gateway: &Gateway, open: Open<'_>, now: Instant) -> Result<Opened, Reject> {
    let opening = pin!(gateway.open(open, now));
    match opening.poll(&mut std::task::Context::from_waker(Waker::noop())) {
        Poll::Ready(opened) => opened,
        Poll::Pending => Err(Reject::Full { limit: "takeover", retry_after: FULL_RETRY }),
    }
}

static NAMES: AtomicU64 = AtomicU64::new(1);
const FULL_RETRY: Duration = Duration::from_secs(10);
const LOOKED_AT_MAX: usize = 4096;
